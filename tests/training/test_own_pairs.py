"""The corpus's own questions: how they are drawn, what they exclude, and their share of every batch."""

from functools import partial

import numpy as np
import pytest
import torch
from accelerate import skip_first_batches
from accelerate.data_loader import BatchSamplerShard, DataLoaderShard
from conftest import make_static_model, make_texts
from datasets import Dataset, concatenate_datasets
from sentence_transformers import SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from sentence_transformers.base.sampler import NoDuplicatesBatchSampler
from sentence_transformers.sentence_transformer.training_args import BatchSamplers
from support.labels import rows_in
from support.runs import arguments

from st_corrector import (
    Corpus,
    CorpusError,
    CorrectedMultipleNegativesLoss,
    CorrectorTrainer,
    DistillationSettings,
    EmbeddingCache,
    EmbeddingTeacher,
    InputError,
)
from st_corrector.data.own_questions import first_sentence
from st_corrector.data.query_keys import is_own
from st_corrector.negatives.filters import known_positives
from st_corrector.training.own_pairs import OwnPairsBatchSampler, own_positions
from st_corrector.training.several_data_sets import JoinedBatches, SplitBatches


def keys_in(pairs):
    return [key for _, key in pairs["label"][:]]


# ---------------------------------------------------------------------- drawing


def test_they_are_drawn_from_all_that_no_training_question_asks_for_and_from_nothing_else(titled):
    pairs = titled.own_pairs()
    asked = set(titled.qrels("train").row.tolist())
    assert sorted(rows_in(pairs)) == sorted(set(range(200)) - asked) and rows_in(pairs) != sorted(rows_in(pairs))
    for pair in pairs:
        row, key = pair["label"]
        assert pair["anchor"] == titled[row]["title"] and pair["positive"] == titled.texts([row])[0] and is_own(key)
    assert len(set(keys_in(pairs))) == 50, "targets with one title have one key"
    assert not is_own(torch.tensor(keys_in(titled.pairs("train")))).any()
    # The first ones of a draw are the same for every number; another seed draws others.
    assert titled.own_pairs(30).to_list() == pairs.to_list()[:30]
    assert rows_in(titled.own_pairs(30, seed=1)) != rows_in(titled.own_pairs(30))


def test_development_splits_have_no_part_in_the_draw(titled):
    drawn = titled.own_pairs(100).to_list()
    of_dev = set(titled.qrels("dev").row.tolist())
    assert of_dev & {pair["label"][0] for pair in drawn}, "they are drawn like all others"
    queries, texts = make_texts()
    for dev in ({}, {"other": [str(n) for n in range(200)]}):
        corpus = Corpus.from_texts(texts, titles=titled.targets["title"][:])
        rows = range(0, 180, 3)
        corpus.add_split("train", {f"q{n}": queries[n] for n in rows}, {f"q{n}": [str(n)] for n in rows})
        for split, relevant in dev.items():
            corpus.add_split(split, {"q": "word1"}, {"q": relevant})
        assert corpus.own_pairs(100).to_list() == drawn


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("One sentence. And another.", "One sentence."),
        ("Is it? It is.", "Is it?"),
        ('He said "no." She left.', 'He said "no."'),
        ("日本語です。次の文です。", "日本語です。"),
        ("यह एक वाक्य है। यह दूसरा है।", "यह एक वाक्य है।"),
        ("جملة أولى؟ جملة ثانية.", "جملة أولى؟"),
        ("def f(x):\n    return x", "def f(x):"),
        ("Version 3.5 is out. Install it.", "Version 3.5 is out."),
        ("Dr. Smith met Mrs. J. Doe there. She left.", "Dr. Smith met Mrs. J. Doe there."),
        ("The U.S. Army, e.g. its band, is big. It is.", "The U.S. Army, e.g. its band, is big."),
        ("Quick. It does this. And that.", "Quick. It does this."),
        ("Overview\nIt does this.", "Overview"),
        ("No other sentence.", None),
        ("", None),
    ],
)
def test_the_first_sentence_ends_where_it_ends_in_any_script(text, expected):
    assert first_sentence(text) == expected


def test_questions_of_ones_own(titled):
    by_function = titled.own_pairs(question=lambda target: target["text"].split()[0] if target["id"] != "1" else None)
    assert 1 not in rows_in(by_function)
    assert all(pair["anchor"] == titled[pair["label"][0]]["text"].split()[0] for pair in by_function)
    given = [f"question {n}" if n % 2 else None for n in range(200)]
    assert all(pair["anchor"] == f"question {pair['label'][0]}" for pair in titled.own_pairs(question=given))
    plain = Corpus.from_texts(["It is one. Two.", "Three", "It is four. Five."], titles=[None, "", None])
    plain.add_split("train", {"q": "what"}, {"q": ["1"]})
    assert sorted(plain.own_pairs()["anchor"]) == ["It is four.", "It is one."], "without titles the first sentence"
    # A target that says nothing but its question teaches nothing.
    same = Corpus.from_texts(["Paris", "a river", "x"], titles=["paris", "Seine", None])
    same.add_split("train", {"q": "what"}, {"q": ["2"]})
    assert rows_in(same.own_pairs()) == [1]


def test_questions_that_differ_in_case_alone_are_not_taken_for_one_another(titled):
    first = titled.own_pairs(5, "title")
    other = titled.own_pairs(5, lambda target: target["title"].upper())
    assert other["anchor"] == [text.upper() for text in first["anchor"]] != first["anchor"]
    assert rows_in(other) == rows_in(first)


def test_what_is_no_question_is_refused(titled):
    with pytest.raises(CorpusError, match="'section' is not one of title, first_sentence"):
        titled.own_pairs(question="section")
    with pytest.raises(CorpusError, match="3 questions for 200 targets"):
        titled.own_pairs(question=["a", "b", "c"])
    with pytest.raises(CorpusError, match="of row 0 is a int, expected a string or None"):
        titled.own_pairs(question=lambda target: 7)
    with pytest.raises(CorpusError, match="No target has a question"):
        titled.own_pairs(question=lambda target: None)
    with pytest.raises(CorpusError, match="no judgements for split 'test'"):
        titled.own_pairs(split="test")


def test_a_second_start_asks_no_target_again(titled, monkeypatch):
    asked = []

    def question(target):
        asked.append(target["id"])
        return target["title"]

    first = titled.own_pairs(20, question)
    assert len(asked) >= 200
    asked.clear()
    again = Corpus(titled.targets, {"train": titled.qrels("train")}, cache_dir=titled.cache_dir)
    assert again.own_pairs(20, question).to_list() == first.to_list()
    assert len(asked) <= 140, "the drawn ones alone, for their texts"


# ---------------------------------------------------------------------- as negatives of one another


def test_targets_that_share_a_question_are_not_one_anothers_negatives(titled, tmp_path):
    model = make_static_model()
    cache = EmbeddingCache.build(model, titled, tmp_path / "cache", progress=False)
    loss = CorrectedMultipleNegativesLoss(model, titled, cache, num_negatives=190)
    own, split = titled.own_pairs()[:4], titled.pairs("train")[:4]
    pairs = {name: own[name] + split[name] for name in own}
    seen = []
    select = loss.select
    loss.select = lambda *given, **how: seen.append(select(*given, **how)) or seen[-1]
    columns = [model.preprocess(pairs["anchor"]), model.preprocess(pairs["positive"])]
    labels = torch.tensor(pairs["label"])
    loss(columns, labels)
    for number, (row, _) in enumerate(pairs["label"]):
        chosen = set(seen[0].rows[number].tolist())
        article = set(range(row // 4 * 4, row // 4 * 4 + 4))
        assert len(chosen) > 150
        if number < 4:
            assert not chosen & article, "passages of the article answer its title"
        else:
            assert chosen >= article - {row}, "to a question of the split they are negatives as before"


def test_own_pairs_from_disk_are_known_beside_a_corpus_that_was_not_asked_or_are_refused(titled):
    def fresh():
        return Corpus(titled.targets, {"train": titled.qrels("train")}, cache_dir=titled.cache_dir)

    row, key = titled.own_pairs()[0]["label"]
    article = list(range(row // 4 * 4, row // 4 * 4 + 4))
    assert fresh().relevant_to_own(key).tolist() == article, "made by the default, so that the corpus can ask by itself"
    row, key = titled.own_pairs(question=lambda target: "about " + target["title"])[0]["label"]
    corpus = fresh()
    with pytest.raises(CorpusError, match=r"does not know.*corpus.own_pairs\(0, question"):
        known_positives(corpus, corpus.qrels("train"), [row], [key])
    corpus.own_pairs(0, lambda target: "about " + target["title"])
    assert len(known_positives(corpus, corpus.qrels("train"), [row], [key])[0]) == 4


def test_what_has_an_own_questions_text_or_answers_it_in_the_split_is_no_negative_of_it(tmp_path):
    texts = ["of Paris", "Paris", "PARIS", "a river", "the capital", "of Rome"]
    titles = ["Paris", None, "Rome", None, None, "Rome"]
    corpus = Corpus.from_texts(texts, titles=titles, cache_dir=tmp_path)
    corpus.add_split("train", {"a": "paris ", "b": "what"}, {"a": ["4"], "b": ["3"]})
    rows = {pair["label"][0]: pair["label"] for pair in corpus.own_pairs()}
    known = known_positives(corpus, corpus.qrels("train"), *zip(rows[0], rows[5], strict=True))
    assert known[0].tolist() == [0, 1, 2, 4], "itself, what says Paris, and what answers the split's question Paris"
    assert known[1].tolist() == [2, 5], "those with one title"
    assert known_positives(corpus, None, [rows[0][0]], [rows[0][1]])[0].tolist() == [0, 1, 2]


# ---------------------------------------------------------------------- batches


def sampler_of(titled, share, seed=0, base=None, batch_size=16, drop_last=False):
    data = concatenate_datasets([titled.own_pairs(), titled.pairs("train")]).shuffle(seed=4)
    generator = torch.Generator()
    made = OwnPairsBatchSampler(
        data, batch_size, drop_last, ["label"], generator, seed, share=share, make_base=base and partial(base)
    )
    return data, made


@pytest.mark.parametrize("base", [None, NoDuplicatesBatchSampler])
def test_every_batch_has_its_share_and_an_epoch_every_pair_of_the_split(titled, base):
    data, sampler = sampler_of(titled, 0.25, base=base)
    own = set(own_positions(data).tolist())
    epochs = []
    for epoch in range(3):
        sampler.set_epoch(epoch)
        batches = list(sampler)
        assert len(batches) == len(sampler) == 5
        assert [len(own & set(batch)) for batch in batches] == [4] * 5
        assert all(len(batch) == 16 for batch in batches)
        of_split = [place for batch in batches for place in batch if place not in own]
        assert sorted(of_split) == sorted(set(range(len(data))) - own)
        epochs.append([place for batch in batches for place in batch if place in own])
        assert len(set(epochs[-1])) == 20
        # The same again: what a resumed run skips is what was taken.
        sampler.set_epoch(epoch)
        assert next(iter(sampler)) == batches[0]
    assert not set(epochs[0]) & set(epochs[1]) and not set(epochs[1]) & set(epochs[2]), "other ones in each epoch"


def test_when_all_have_had_their_turn_they_come_again(titled):
    data, sampler = sampler_of(titled, 0.5)
    own = set(own_positions(data).tolist())
    seen = []
    for epoch in range(3):
        sampler.set_epoch(epoch)
        seen += [place for batch in sampler for place in batch if place in own]
    assert len(seen) == 3 * 8 * 8 and set(seen) == own
    counts = np.bincount(seen)
    assert counts[sorted(own)].max() - counts[sorted(own)].min() <= 1


def test_a_share_without_room_and_data_without_a_split_are_refused(titled):
    with pytest.raises(InputError, match=r"own_pairs_share=0.99 makes 8 own pairs in a batch of 8"):
        sampler_of(titled, 0.99, batch_size=8)
    with pytest.raises(InputError, match=r"own_pairs_share=0.01 makes 0 own pairs"):
        sampler_of(titled, 0.01, batch_size=8)
    with pytest.raises(InputError, match="only own pairs"):
        OwnPairsBatchSampler(titled.own_pairs(), 8, False, share=0.5)
    with pytest.raises(InputError, match="a share of a batch, below 1, got 1"):
        arguments("x", own_pairs_share=1.0)


def test_a_share_that_has_no_effect_is_told(titled, tmp_path, caplog):
    args = arguments(tmp_path, own_pairs_share=0.25, max_steps=1)
    CorrectorTrainer(make_static_model(), args, corpus=titled, train_dataset=titled.pairs("train")).train()
    assert "own_pairs_share=0.25 has no effect" in caplog.text


def spying(loss):
    """The labels of every batch that a loss gets."""
    seen = []
    forward = loss.forward
    loss.forward = lambda features, labels: seen.append(labels.clone()) or forward(features, labels)
    return seen


@pytest.mark.parametrize("sampler", [BatchSamplers.BATCH_SAMPLER, BatchSamplers.NO_DUPLICATES])
def test_the_trainer_draws_them_and_logs_them_apart(titled, tmp_path, sampler):
    args = arguments(tmp_path, own_pairs_share=0.25, max_steps=30, logging_steps=5, batch_sampler=sampler)
    trainer = CorrectorTrainer(make_static_model(), args, corpus=titled)
    (loss,) = trainer._corrected_losses().values()
    seen = spying(loss)
    trainer.train()
    assert len(seen) == 30 and all(is_own(labels[:, 1]).sum() == 4 for labels in seen)
    own = torch.cat([labels[is_own(labels[:, 1]), 0] for labels in seen])
    assert len(own) == len(own.unique()) == 120, "as many as the run draws, each once"
    logged = [entry for entry in trainer.state.log_history if "task_loss_own_pairs" in entry]
    assert len(logged) == 6
    for entry in logged:
        mixed = 0.25 * entry["task_loss_own_pairs"] + 0.75 * entry["task_loss_split_pairs"]
        assert entry["task_loss"] == pytest.approx(mixed, rel=1e-3)
    assert logged[-1]["task_loss_split_pairs"] < logged[0]["task_loss_split_pairs"]


def test_a_resumed_run_draws_what_the_whole_one_drew(titled, tmp_path):
    def trained(**how):
        args = arguments(tmp_path / "run", own_pairs_share=0.25, max_steps=12, save_steps=7)
        trainer = CorrectorTrainer(make_static_model(), args, corpus=titled)
        (loss,) = trainer._corrected_losses().values()
        seen = spying(loss)
        trainer.train(**how)
        return trainer, seen

    whole, seen = trained()
    resumed, after = trained(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-7"))
    assert len(after) == 5 and all(torch.equal(one, other) for one, other in zip(seen[7:], after, strict=True))
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, resumed.model.state_dict()[name]), name


@pytest.mark.parametrize("kind", ["own pairs", "several data sets", "no duplicates"])
@pytest.mark.parametrize("processes", [1, 2])
def test_a_resumed_epoch_takes_what_it_would_have_taken(titled, tmp_path, monkeypatch, processes, kind):
    """The plain trainer skips what was trained on, and then does not reach samplers below accelerate's."""
    base = NoDuplicatesBatchSampler if kind == "no duplicates" else None
    _, sampler = sampler_of(titled, 0.25, base=base, batch_size=8)
    if kind == "several data sets":
        sampler = SplitBatches(JoinedBatches(sampler, processes), processes, 8)
    elif kind == "no duplicates":
        sampler = sampler._base
    shard = BatchSamplerShard(sampler, num_processes=processes, process_index=0)
    resumed = []

    def run_epoch(self, model, epoch, loader, *others, **named):
        loader = skip_first_batches(loader, 1)
        loader.set_epoch(epoch)
        resumed.append(list(loader.batch_sampler))

    monkeypatch.setattr(SentenceTransformerTrainer, "_run_epoch", run_epoch)
    trainer = CorrectorTrainer(make_static_model(), arguments(tmp_path), corpus=titled)
    for epoch in (2, 1):
        trainer._run_epoch(trainer.model, epoch, DataLoaderShard(range(1_000), batch_sampler=shard))
        sampler.set_epoch(epoch)
        assert resumed[-1] == list(shard)[1:] and len(resumed[-1]) > 2
    assert resumed[0] != resumed[1]


@pytest.mark.parametrize("columns", ["row", "floats", "lists of one", "ragged lists", "nothing"])
def test_labels_of_other_losses_are_no_own_pairs(titled, columns):
    labels = {
        "row": [0, 1, 2],
        "floats": [[0.1, 0.2], [0.3, 0.4], [0.5, 0.6]],
        "lists of one": [[0], [1], [2]],
        "ragged lists": [[0, 1], [1], [2, 3, 4]],
    }
    data = Dataset.from_dict({"anchor": ["a", "b", "c"], **({"label": labels[columns]} if columns in labels else {})})
    assert own_positions(data).tolist() == []
    pairs = concatenate_datasets([titled.pairs("train"), titled.own_pairs(10)])
    assert own_positions(pairs.select([3, 61, 65])).tolist() == [1, 2], "of what was selected"


def test_an_evaluation_looks_at_every_pair_once(titled, tmp_path):
    own, args = titled.own_pairs(), arguments(tmp_path, own_pairs_share=0.25, per_device_eval_batch_size=8)
    for data in (own, concatenate_datasets([titled.pairs("train"), own])):
        trainer = CorrectorTrainer(make_static_model(), args, corpus=titled, eval_dataset=data)
        looked_at = [place for batch in trainer.get_eval_dataloader().batch_sampler for place in batch]
        assert sorted(looked_at) == list(range(len(data)))
        trainer.evaluate()


def test_a_teacher_of_a_loss_of_ones_own_is_asked_whether_it_knows_their_questions(titled, tmp_path):
    model, settings = make_static_model(), {"max_steps": -1, "num_train_epochs": 4}
    cache = EmbeddingCache.build(model, titled, tmp_path / "cache", progress=False)

    def drawn(**knows):
        teacher = EmbeddingTeacher(torch.randn(200, 4), torch.randn(len(knows["keys"]), 4), knows["keys"])
        loss = CorrectedMultipleNegativesLoss(
            model, titled, cache, teacher=teacher, distillation=DistillationSettings(None, "kl", 1.0, 10.0)
        )
        trainer = CorrectorTrainer(model, arguments(tmp_path / "out", **settings), corpus=titled, loss=loss)
        return len(own_positions(trainer.train_dataset))

    split, own = (np.array(pairs["label"][:])[:, 1] for pairs in (titled.pairs("train"), titled.own_pairs()))
    assert drawn(keys=split) == 0 and drawn(keys=np.unique(np.concatenate([split, own]))) > 0


def test_they_are_a_data_set_of_the_plain_trainer(titled, tmp_path):
    model = make_static_model()
    cache = EmbeddingCache.build(model, titled, tmp_path / "cache", progress=False)
    loss = CorrectedMultipleNegativesLoss(model, titled, cache, num_negatives=4)
    seen = spying(loss)
    args = SentenceTransformerTrainingArguments(
        output_dir=str(tmp_path / "out"),
        per_device_train_batch_size=16,
        max_steps=4,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        batch_sampler=partial(OwnPairsBatchSampler, share=0.25),
    )
    pairs = concatenate_datasets([titled.pairs("train"), titled.own_pairs(40)])
    SentenceTransformerTrainer(model=model, args=args, train_dataset=pairs, loss=loss).train()
    assert len(seen) == 4 and all(is_own(labels[:, 1]).sum() == 4 for labels in seen)
