"""Corpora that grow: what was there keeps its row, and what is withdrawn is never seen again."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from conftest import make_static_model, make_texts
from datasets import Dataset, Value, load_from_disk
from datasets.table import InMemoryTable
from support.batches import batch_of
from support.runs import arguments, difference

from st_corrector import (
    Corpus,
    CorpusError,
    CorpusRetrievalEvaluator,
    CorrectedMultipleNegativesLoss,
    CorrectorTrainer,
    EmbeddingCache,
    EmbeddingTeacher,
    InputError,
    NegativeSettings,
    mine_negatives,
)
from st_corrector.data import tokens
from st_corrector.data.targets import Targets

QUERIES, TEXTS = make_texts(240)
IDS = [f"d{n}" for n in range(240)]


def judged(corpus, count=60):
    corpus.add_split("train", {f"q{n}": QUERIES[n] for n in range(count)}, {f"q{n}": f"d{n}" for n in range(count)})
    return corpus


@pytest.fixture
def base(tmp_path):
    """160 targets, of which 60 are asked for."""
    return judged(Corpus.from_texts(TEXTS[:160], IDS[:160], cache_dir=tmp_path / "derived"))


@pytest.fixture
def changed(base):
    """The same, two of them new, two changed, and two no longer there."""
    texts = [*TEXTS[160:162], "passage " + TEXTS[3], "passage " + TEXTS[100]]
    return base.extend(texts, ["d160", "d161", "d3", "d100"], withdrawn=["d5", "d120"])


def test_a_corpus_that_has_grown_is_the_one_made_at_once(tmp_path, static_model, monkeypatch):
    """In texts, ids, rows, fingerprint and token ids; and what was there is tokenized once."""
    asked = []
    tokenize = tokens._tokenize
    monkeypatch.setattr(tokens, "_tokenize", lambda texts, *how: asked.extend(texts) or tokenize(texts, *how))
    titles = [text.split()[0] if n % 3 else None for n, text in enumerate(TEXTS)]
    corpus = Corpus.from_texts(TEXTS[:100], IDS[:100], titles[:100], cache_dir=tmp_path / "derived")
    corpus.tokenize(static_model, progress=False)
    for first, end in ((100, 101), (101, 240)):
        some = slice(first, end)
        corpus = corpus.extend(iter(TEXTS[some]), IDS[some], titles[some])
        corpus.tokenize(static_model, progress=False)
    assert sorted(asked) == sorted(corpus.texts(range(240)))
    at_once = Corpus.from_texts(TEXTS, IDS, titles, cache_dir=tmp_path / "other")
    assert corpus.fingerprint == at_once.fingerprint and len(corpus) == 240 and len(corpus.withdrawn) == 0
    assert corpus.texts(range(240)) == at_once.texts(range(240)) and corpus.ids(range(240)) == IDS
    assert corpus.rows_of(IDS).tolist() == list(range(240)) and [corpus[7], corpus[200]] == [at_once[7], at_once[200]]
    ours, theirs = (each.tokenize(static_model, progress=False).features([3, 239, 100]) for each in (corpus, at_once))
    assert torch.equal(ours["input_ids"], theirs["input_ids"]) and torch.equal(ours["offsets"], theirs["offsets"])
    assert corpus.fingerprint_of(100) == Corpus.from_texts(TEXTS[:100], IDS[:100], titles[:100]).fingerprint


def test_without_ids_rows_go_on(base):
    numbered = Corpus.from_texts(TEXTS[:5], cache_dir=base.cache_dir)
    assert numbered.extend(TEXTS[5:12]).ids([0, 5, 11]) == ["0", "5", "11"]


def test_what_has_not_changed_is_left_out(base, changed):
    """Tonight's whole export may be given again and again."""
    export = [changed.texts([row])[0] for row in range(len(changed)) if row not in changed.withdrawn]
    ids = [changed.ids([row])[0] for row in range(len(changed)) if row not in changed.withdrawn]
    again = changed.extend(reversed(export), ids[::-1])
    assert again.fingerprint == changed.fingerprint and again.withdrawn.tolist() == changed.withdrawn.tolist()
    assert base.extend(TEXTS[:160], IDS[:160]).fingerprint == base.fingerprint and len(base) == 160


def test_rows_stay_and_ids_and_judgements_follow_what_has_changed(base, changed, caplog):
    assert len(changed) == 164 and changed.withdrawn.tolist() == [3, 5, 100, 120]
    gone = changed.is_withdrawn
    assert changed.ids(gone) == ["d3", "d5", "d100", "d120"] and len(changed.texts(~gone)) == 160
    assert changed.texts(range(160)) == base.texts(range(160))
    assert changed.rows_of(["d160", "d161", "d3", "d100", "d4"]).tolist() == [160, 161, 162, 163, 4]
    assert changed.rows_of(["d5", "d120"], missing=-1).tolist() == [-1, -1]
    qrels = changed.qrels("train")
    assert len(qrels) == 59 and "q5" not in qrels.queries["id"][:]
    (place,) = np.flatnonzero(np.array(qrels.queries["id"][:]) == "q3")
    assert qrels.rows_of(int(place)).tolist() == [162]
    assert len(base.qrels("train")) == 60 and base.withdrawn.tolist() == []
    assert "3 of them withdrawn" not in repr(base) and "4 of them withdrawn" in repr(changed)
    told = [record.getMessage() for record in caplog.get_records("setup")]
    assert any("1 of 60 queries of split 'train' are dropped" in each for each in told)


def test_it_is_kept_as_any_dataset_is(changed, tmp_path):
    changed.targets.save_to_disk(str(tmp_path / "saved"))
    kept = judged(Corpus(load_from_disk(str(tmp_path / "saved"))), 3)
    assert kept.fingerprint == changed.fingerprint and kept.withdrawn.tolist() == changed.withdrawn.tolist()
    assert kept.rows_of(["d3"], missing=-1).tolist() == [162] and kept[162].keys() == {"id", "title", "text"}


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ((["a"], ["d1", "d2"]), "1 texts but 2 ids"),
        ((["a", "b"], ["new", "new"]), "1 ids are given more than once, e.g. ['new']"),
        ((["a", "b"], ["d7", "d7"]), "1 ids are given more than once, e.g. ['d7']"),
        ((["a"], [1.5]), "An id is a float"),
        (([None], ["new"]), "Text 0 is a NoneType"),
        (("a text", None), "texts is one string"),
        (([], [], None, ["nowhere"]), "1 ids are not in the corpus, e.g. ['nowhere']"),
        ((["a"], ["d7"], None, ["d7"]), "1 ids are given and withdrawn, e.g. ['d7']"),
        (([], [], None, IDS[:160]), "All targets have been withdrawn"),
    ],
)
def test_what_cannot_be_added_is_refused_and_leaves_nothing_half_written(base, how, message):
    before = sorted(path.name for path in Path(base.cache_dir).iterdir())
    texts, ids, titles, withdrawn = (*how, None, ())[:4] if len(how) < 4 else how
    with pytest.raises(CorpusError) as error:
        base.extend(texts, ids, titles, withdrawn=withdrawn)
    assert message in str(error.value)
    after = sorted(path.name for path in Path(base.cache_dir).iterdir())
    assert [name for name in after if name not in before and not name.startswith("targets-")] == []
    assert not [name for name in after if "partial" in name]


def test_nothing_sees_what_has_been_withdrawn(changed, static_model, tmp_path):
    """Selection, in-batch ranking, mining, own pairs, a teacher's best, texts of negatives: each would, otherwise."""
    withdrawn = changed.withdrawn.tolist()
    cache = EmbeddingCache.build(static_model, changed, tmp_path / "cache", progress=False)
    loss = CorrectedMultipleNegativesLoss(static_model, changed, cache, num_negatives=150)
    selected, select = [], loss.select
    loss.select = lambda *how, **more: selected.append(select(*how, **more)) or selected[-1]
    features, labels = batch_of(static_model, changed, range(8))
    loss(features, labels)
    chosen = selected[0].rows.unique()
    assert not set(withdrawn) & set(chosen.tolist()) and len(chosen) > 150

    ranked = CorpusRetrievalEvaluator(changed, "train", chunk_size=50)
    for rows in (ranked.retrieve(static_model), ranked.retrieve(static_model, cache)):
        assert not set(withdrawn) & set(rows.unique().tolist())
        # The changed text is found in the place of the earlier one.
        assert len(rows.unique()) > 150 and 162 in rows.unique()

    settings = NegativeSettings(num_negatives=150)
    mined = mine_negatives(static_model, changed, cache, tmp_path / "mined", negatives=settings, progress=False)
    texts = {text for name in mined.column_names if name.startswith("negative") for text in mined[name] if text}
    assert len(texts) > 150 and not texts & set(changed.texts(withdrawn))

    own = changed.own_pairs(question=lambda target: " ".join(target["text"].split()[:2]))
    assert len(own) > 90 and not set(withdrawn) & {row for row, _ in own["label"]}

    teacher = EmbeddingTeacher.build(static_model, changed, tmp_path / "teacher", [changed.pairs("train")])
    everything = teacher.best_rows(torch.from_numpy(changed.qrels("train").keys), torch.empty(59, 0).long(), 164)
    assert (everything >= 0).sum(1).unique().tolist() == [160]


def test_data_that_still_names_what_has_been_withdrawn(base, changed, static_model, tmp_path):
    """A positive is refused; a negative is left out."""
    cache = EmbeddingCache.build(static_model, changed, tmp_path / "cache", progress=False)
    loss = CorrectedMultipleNegativesLoss(static_model, changed, cache, num_negatives=2)
    features, labels = batch_of(static_model, base, range(8))
    with pytest.raises(InputError, match=r"2 positives of the batch have been withdrawn from the corpus, e\.g\. row 3"):
        loss(features, labels)
    pairs = base.pairs("train")[[0, 1]]
    both = [static_model.preprocess(pairs["anchor"]), static_model.preprocess(pairs["positive"])]
    keys = [key for _, key in pairs["label"]]
    selected, seen = [], loss.encoder.features
    loss.encoder.features = lambda rows, *more: selected.extend(np.asarray(rows).tolist()) or seen(rows, *more)
    loss(both, torch.tensor([[0, keys[0], 100, 130], [1, keys[1], 120, -1]]))
    assert 130 in selected and 100 not in selected and 120 not in selected
    gone = [static_model.preprocess(base.texts([100, 120]))]
    with pytest.raises(InputError, match="is no target of the corpus"):
        loss([*both, *gone], torch.tensor([[0, keys[0]], [1, keys[1]]]))


def test_what_was_there_is_tokenized_once_wherever_it_comes_from(base, static_model, monkeypatch, tmp_path):
    """Saved and loaded, or read from a longer file: the token ids of the first rows are found by their texts."""
    asked = []
    tokenize = tokens._tokenize
    monkeypatch.setattr(tokens, "_tokenize", lambda texts, *how: asked.extend(texts) or tokenize(texts, *how))
    base.tokenize(static_model, progress=False)
    corpus = base
    for night, (first, end) in enumerate(((160, 200), (200, 201), (201, 240))):
        corpus = corpus.extend(TEXTS[first:end], IDS[first:end])
        corpus.targets.save_to_disk(str(tmp_path / str(night)))
        corpus = Corpus(load_from_disk(str(tmp_path / str(night))), cache_dir=base.cache_dir)
        kept = corpus.tokenize(static_model, progress=False)
    assert asked == TEXTS
    for rows in ([0, 159, 160], [200, 199, 201, 239]):
        assert torch.equal(
            kept.features(rows)["input_ids"], static_model.preprocess([TEXTS[row] for row in rows])["input_ids"]
        )
    Corpus.from_texts(TEXTS, cache_dir=base.cache_dir).tokenize(static_model, progress=False)
    assert len(asked) == 240
    # A file that was cut short where Arrow does not notice is written again.
    longest = max(base.cache_dir.glob("tokens-*.arrow"), key=lambda path: int(path.name.split("-")[2]))
    table = Dataset.from_file(str(longest)).data.table
    with pa.OSFile(str(longest), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table.slice(0, 100))
    assert len(corpus.tokenize(static_model, progress=False)) == 240 and len(asked) > 240
    asked[240:] = []
    Corpus.from_texts(["passage", *TEXTS], cache_dir=base.cache_dir).tokenize(static_model, progress=False)
    assert len(asked) == 240 + 241, "what does not begin with the same texts is tokenized"


def test_what_was_made_before_a_withdrawal_is_not_taken_for_what_is_made_after(static_model, base, tmp_path):
    """Mined files, a loss that mines, a checkpoint: all know what was withdrawn when they were made."""
    cache = EmbeddingCache.build(static_model, base, tmp_path / "cache", progress=False)
    less = base.extend([], [], withdrawn=["d120"])
    assert less.fingerprint == base.fingerprint
    settings = NegativeSettings(num_negatives=150)
    how = {"negatives": settings, "progress": False}
    mine_negatives(static_model, base, cache, tmp_path / "mined", **how)
    with pytest.raises(InputError, match="withdrawn"):
        mine_negatives(static_model, less, cache, tmp_path / "mined", **how)
    loss = CorrectedMultipleNegativesLoss(static_model, base, cache, num_negatives=4)
    with pytest.raises(InputError, match="another model or corpus"):
        mine_negatives(static_model, less, loss.corrected, tmp_path / "other", **how)
    state = loss.training_state()
    after = CorrectedMultipleNegativesLoss(static_model, less, cache, num_negatives=4)
    with pytest.raises(InputError, match="withdrawn"):
        after.load_training_state([state])
    loss.load_training_state([state])


def test_a_column_that_says_what_is_withdrawn_is_never_passed_over(changed):
    targets = changed.targets
    with pytest.raises(CorpusError, match=r"The column 'withdrawn' says which targets .* holds int64"):
        Corpus(targets.cast_column("withdrawn", Value("int64")))
    with pytest.raises(CorpusError, match=r"Corpus\(dataset\) reads it"):
        Corpus.from_dataset(targets, id="id", title="title")


def test_more_text_than_one_arrow_array_holds(tmp_path):
    """Arrow's strings hold 2 GiB in one piece: nothing may join the pieces of a column."""
    long = pa.array(["a" * (1 << 20)] * 64)
    text = pa.chunked_array([long] * 34)  # one buffer, used again and again
    assert text.nbytes > 1 << 31
    ids = pa.chunked_array([[str(n) for n in range(len(text))]])
    table = pa.table({"id": ids, "title": pa.nulls(len(text), pa.string()), "text": text})
    targets = Targets(Dataset(InMemoryTable(table), fingerprint="made"), tmp_path)
    assert [len(each) for each in targets.digests._sketch()] == [32, 32]
    assert targets.rows_of(["2000", "7"]).tolist() == [2000, 7]


@pytest.mark.parametrize("grown", ["cache extended", "cache built"])
def test_a_run_over_a_corpus_that_has_grown_equals_one_over_the_same_at_once(grown, static_model, tmp_path):
    results = []
    for name, way in (("at once", Corpus.from_texts), ("grown", None)):
        folder = tmp_path / name
        if way is not None:
            corpus = way(TEXTS, IDS, cache_dir=folder)
        else:
            corpus = Corpus.from_texts(TEXTS[:100], IDS[:100], cache_dir=folder)
            if grown == "cache extended":
                EmbeddingCache.build(static_model, corpus, folder / "cache", shard_size=64, progress=False)
            corpus = corpus.extend(TEXTS[100:], IDS[100:])
            if grown == "cache extended":
                EmbeddingCache.extend(static_model, corpus, folder / "cache", progress=False)
        results.append(trained(judged(corpus), folder))
    assert difference(*results) is None
    before = static_model.state_dict()
    assert all(not torch.equal(value, before[name]) for name, value in results[0]["model"].items())


def trained(corpus, folder):
    torch.manual_seed(0)
    settings = arguments(folder / "out", cache_path=str(folder / "cache"), save_strategy="no", max_steps=10)
    trainer = CorrectorTrainer(make_static_model(), settings, corpus=corpus)
    (loss,) = trainer._corrected_losses().values()
    selected, select = [], loss.select
    loss.select = lambda *how, **more: selected.append(select(*how, **more)) or selected[-1]
    trainer.train()
    search = loss.corrected.search
    return {
        "selected": [each.rows for each in selected],
        "model": trainer.model.state_dict(),
        "corrector": search.corrector.state_dict(),
        "overlay": search.overlay.state_dict(),
        "steps": search.steps,
        "targets_encoded": loss.targets_encoded,
    }
