"""Caches that grow: what is there is not written again, and until all is there the cache is what it was."""

import json
import shutil
import time
from collections import Counter
from itertools import product

import datasets
import numpy as np
import pytest
import torch
from conftest import FORKS, make_bert_model, make_static_model, make_texts

from st_corrector import CacheError, Corpus, EmbeddingCache, NonFiniteError
from st_corrector.cache.folder import CacheFolder
from st_corrector.cli import main
from st_corrector.data.encoding import DocumentEncoder

TEXTS = make_texts(200)[1]


@pytest.fixture
def base(tmp_path):
    return Corpus.from_texts(TEXTS[:90], cache_dir=tmp_path / "derived")


@pytest.fixture
def grown(base):
    return base.extend(TEXTS[90:])


@pytest.fixture
def folder(static_model, base, tmp_path):
    """A finished cache of the first 90 targets, in three shards."""
    EmbeddingCache.build(static_model, base, tmp_path / "cache", shard_size=40, progress=False)
    return tmp_path / "cache"


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != ".lock"}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
@pytest.mark.parametrize("kind", ["static", "bert"])
def test_an_extended_cache_is_the_one_built_at_once(kind, dtype, base, grown, tmp_path, monkeypatch):
    model = make_static_model() if kind == "static" else make_bert_model(tmp_path)
    folder = tmp_path / "cache"
    EmbeddingCache.build(model, base, folder, dtype=dtype, shard_size=40, progress=False)
    before, encoded, encode = contents(folder), [], DocumentEncoder.encode
    monkeypatch.setattr(
        DocumentEncoder, "encode", lambda self, m, rows, *a, **k: encoded.extend(rows) or encode(self, m, rows, *a, **k)
    )
    half = base.extend(TEXTS[90:91])
    EmbeddingCache.extend(model, half, folder, progress=False)
    cache = EmbeddingCache.extend(model, half.extend(TEXTS[91:]), folder, progress=False)
    assert sorted(encoded) == list(range(90, 200))  # only what is new, and once
    after = contents(folder)
    assert all(after[name] == content for name, content in before.items() if name != "manifest.json")
    assert not {"extension.json", "build.json"} & after.keys()
    at_once = EmbeddingCache.build(model, grown, tmp_path / "at once", dtype=dtype, progress=False)
    assert cache.fingerprint == at_once.fingerprint and len(cache) == cache.corpus_size == 200
    every = np.arange(200)
    # Other batches round otherwise; int8 and bfloat16 to another number.
    torch.testing.assert_close(cache[every], at_once[every], atol=1e-6 if dtype == "float32" else 0.02, rtol=0)
    # For who asks for the cache of the whole corpus it is that one, and it is undamaged.
    assert len(EmbeddingCache.build(model, grown, folder, dtype=dtype, progress=False)) == 200
    assert len(EmbeddingCache.load(folder, verify=True)) == 200
    assert torch.equal(cache.save(tmp_path / "saved")[every], cache[every])
    assert torch.equal(cache.part(slice(80, 95))[every[80:95]], cache[every[80:95]])


def test_what_is_appended_to_a_source_needs_no_extend_of_the_corpus(static_model, base, folder, tmp_path):
    """The first targets' texts are compared, wherever the corpus comes from."""
    longer = Corpus.from_texts(TEXTS, cache_dir=tmp_path / "other")
    assert len(EmbeddingCache.extend(static_model, longer, folder, progress=False)) == 200
    again = contents(folder)
    assert len(EmbeddingCache.extend(static_model, longer, folder, progress=False)) == 200
    assert contents(folder) == again


@pytest.mark.parametrize("shard", [0, 2, 3, 5])
def test_a_damaged_shard_of_any_extension_is_encoded_again(shard, static_model, base, grown, folder):
    EmbeddingCache.extend(static_model, grown, folder, progress=False)
    whole = contents(folder)
    assert len([name for name in whole if name.startswith("embeddings")]) == 6
    path = folder / f"embeddings-{shard:06}.safetensors"
    path.write_bytes(whole[path.name][:-4] + b"oops")
    with pytest.raises(CacheError, match=f"embeddings-{shard:06}"):
        EmbeddingCache.load(folder, verify=True)
    EmbeddingCache.repair(static_model, grown, folder)
    assert contents(folder) == whole


def test_a_shard_of_another_place_is_not_taken(static_model, base, grown, folder):
    EmbeddingCache.extend(static_model, grown, folder, progress=False)
    shutil.copy(folder / "embeddings-000000.safetensors", folder / "embeddings-000003.safetensors")
    with pytest.raises(CacheError, match="is not the file that was written"):
        EmbeddingCache.load(folder)


def other_texts(base, model):
    return model, Corpus.from_texts(TEXTS[1:])


def changed_in_place(base, model):
    return model, Corpus.from_texts(["passage", *TEXTS[1:]])


def fewer(base, model):
    return model, Corpus.from_texts(TEXTS[:50])


def other_weights(base, model):
    with torch.no_grad():
        model[0].embedding.weight[0] += 1
    return model, base.extend(TEXTS[90:])


def other_prompt(base, model):
    return model, base.extend(TEXTS[90:]).with_prompt("passage: ")


def other_tokenizer(base, model):
    model[0].tokenizer.enable_truncation(max_length=2)
    return model, base.extend(TEXTS[90:])


@pytest.mark.parametrize(
    ("how", "message"),
    [
        (other_texts, "holds a cache of 90 targets, and the 199 of the corpus do not begin with the same texts"),
        (changed_in_place, "do not begin with the same texts in the same order"),
        (fewer, "and the 50 of the corpus do not begin"),
        (other_weights, "is of another encoder:\n  weights"),
        (other_prompt, "is of another encoder:"),
        (other_tokenizer, "is of another encoder:\n  tokenizer"),
    ],
)
def test_what_is_no_extension_is_refused_and_nothing_is_written(how, message, base, folder):
    before = contents(folder)
    model, corpus = how(base, make_static_model())
    with pytest.raises(CacheError) as error:
        EmbeddingCache.extend(model, corpus, folder, progress=False)
    assert message in str(error.value)
    assert contents(folder) == before


def test_what_is_no_finished_cache_of_a_corpus_is_refused(static_model, base, grown, folder, tmp_path):
    with pytest.raises(CacheError, match="holds no embedding cache"):
        EmbeddingCache.extend(static_model, grown, tmp_path / "nowhere")
    assert not (tmp_path / "nowhere").exists()
    EmbeddingCache.from_tensor(torch.randn(90, 16)).save(tmp_path / "foreign")
    with pytest.raises(CacheError, match="do not begin with the same texts"):
        EmbeddingCache.extend(static_model, grown, tmp_path / "foreign")
    CacheFolder(folder).reopen([1])
    with pytest.raises(CacheError, match=r"is not finished: EmbeddingCache\.build with the corpus"):
        EmbeddingCache.extend(static_model, grown, folder)
    with pytest.raises(CacheError, match="batch_size must be at least 1"):
        EmbeddingCache.extend(static_model, grown, folder, batch_size=0)


def test_a_build_of_the_larger_corpus_names_what_adds_to_the_cache(static_model, grown, folder):
    with pytest.raises(CacheError, match=r"a cache of the first 90 of the 200 targets: EmbeddingCache\.extend"):
        EmbeddingCache.build(static_model, grown, folder, progress=False)


def test_an_embedding_that_is_not_finite_leaves_the_cache_as_it_was(base, tmp_path):
    model, folder = make_static_model(), tmp_path / "cache"
    with torch.no_grad():
        model[0].embedding.weight[model.tokenizer.token_to_id("passage")] = torch.inf
    EmbeddingCache.build(model, base, folder, shard_size=40, progress=False)
    before = EmbeddingCache.load(folder)[np.arange(90)]
    with pytest.raises(NonFiniteError, match=r"1 targets are NaN or infinite, e\.g\. rows \[140\]"):
        EmbeddingCache.extend(model, base.extend([*TEXTS[90:140], "passage"]), folder, progress=False)
    kept = EmbeddingCache.load(folder, verify=True)
    assert len(kept) == 90 and torch.equal(kept[np.arange(90)], before)
    # A text that was mended is another extension.
    assert len(EmbeddingCache.extend(model, base.extend(TEXTS[90:141]), folder, progress=False)) == 141


def interrupted(model, corpus, folder, monkeypatch, at):
    """Extend, and be killed before shard ``at`` is written, or (None) before the manifest is."""
    write, finish = CacheFolder.write, CacheFolder.finish_extension

    def stop(*how):
        raise KeyboardInterrupt

    def until(self, description, number, shard):
        (stop if number == at else write)(self, description, number, shard)

    monkeypatch.setattr(CacheFolder, "write", until)
    monkeypatch.setattr(CacheFolder, "finish_extension", stop)
    with pytest.raises(KeyboardInterrupt):
        EmbeddingCache.extend(model, corpus, folder, progress=False)
    monkeypatch.setattr(CacheFolder, "write", write)
    monkeypatch.setattr(CacheFolder, "finish_extension", finish)


def test_what_another_extension_has_left_is_removed(static_model, base, grown, folder, monkeypatch, caplog):
    interrupted(static_model, grown, folder, monkeypatch, 5)
    assert len(EmbeddingCache.load(folder)) == 90 and (folder / "embeddings-000004.safetensors").exists()
    other = base.extend(reversed(TEXTS[90:]))
    cache = EmbeddingCache.extend(static_model, other, folder, progress=False)
    assert "was being extended to 200 targets, and not these" in caplog.text
    expected = EmbeddingCache.build(static_model, other, folder.with_name("at once"), progress=False)
    torch.testing.assert_close(cache[np.arange(200)], expected[np.arange(200)], atol=1e-6, rtol=0)
    assert len(EmbeddingCache.load(folder)) == 200


@pytest.mark.parametrize("at", [5, None])
def test_what_was_begun_is_finished_first_where_the_corpus_has_grown_further(
    at, static_model, base, grown, folder, monkeypatch
):
    """Nothing of it is encoded again; and who asks for the smaller corpus meanwhile loses nothing of it."""
    interrupted(static_model, grown, folder, monkeypatch, at)
    assert len(EmbeddingCache.extend(static_model, base, folder, progress=False)) == 90
    encoded, encode = [], DocumentEncoder.encode
    monkeypatch.setattr(
        DocumentEncoder, "encode", lambda self, m, rows, *a, **k: encoded.extend(rows) or encode(self, m, rows, *a, **k)
    )
    more = grown.extend(["passage", "query"])
    cache = EmbeddingCache.extend(static_model, more, folder, progress=False)
    assert sorted(encoded) == [*range(170, 200), 200, 201] if at else sorted(encoded) == [200, 201]
    at_once = EmbeddingCache.build(static_model, more, folder.with_name("at once"), progress=False)
    torch.testing.assert_close(cache[np.arange(202)], at_once[np.arange(202)], atol=1e-6, rtol=0)
    assert not (folder / "extension.json").exists()


@pytest.mark.parametrize(
    "damage", [lambda data: data[:-7], lambda data: b"", lambda data: data.replace(b"shard", b"sharp")]
)
def test_what_is_damaged_of_an_interrupted_extension_is_encoded_again(
    damage, static_model, base, grown, folder, monkeypatch
):
    interrupted(static_model, grown, folder, monkeypatch, 5)
    path = folder / "embeddings-000004.safetensors"
    path.write_bytes(damage(path.read_bytes()))
    EmbeddingCache.extend(static_model, grown, folder, progress=False)
    assert len(EmbeddingCache.load(folder, verify=True)) == 200
    shutil.rmtree(folder)
    EmbeddingCache.build(static_model, base, folder, shard_size=40, progress=False)
    interrupted(static_model, grown, folder, monkeypatch, 5)
    (folder / "extension.json").write_text("{")
    EmbeddingCache.extend(static_model, grown, folder, progress=False)
    assert len(EmbeddingCache.load(folder, verify=True)) == 200


def test_a_cache_that_is_being_extended_is_not_pushed(static_model, grown, folder, monkeypatch):
    interrupted(static_model, grown, folder, monkeypatch, 5)
    with pytest.raises(CacheError, match="is being extended"):
        EmbeddingCache.load(folder).push_to_hub("tester/cache")


def test_a_finished_shard_that_is_missing_is_not_encoded_along(static_model, grown, folder):
    (folder / "embeddings-000001.safetensors").unlink()
    with pytest.raises(CacheError, match=r"embeddings-000001\.safetensors is missing: EmbeddingCache\.repair"):
        EmbeddingCache.extend(static_model, grown, folder, progress=False)
    assert not (folder / "extension.json").exists()


def test_a_run_that_began_before_finds_what_the_cache_was(static_model, base, grown, folder):
    """So that it can be resumed after the cache has been extended, twice."""
    before = EmbeddingCache.load(folder)
    half = base.extend(TEXTS[90:95])
    for corpus in (half, grown):
        EmbeddingCache.extend(static_model, corpus, folder, progress=False)
    whole = contents(folder)
    for make, (corpus, rows) in product(
        (EmbeddingCache.build, EmbeddingCache.extend), ((base, 90), (half, 95), (grown, 200))
    ):
        found = make(static_model, corpus, folder, progress=False)
        assert contents(folder) == whole
        assert len(found) == found.corpus_size == rows and found.fingerprint["corpus"] == corpus.fingerprint
        assert torch.equal(found[np.arange(90)], before[np.arange(90)])
    assert EmbeddingCache.build(static_model, base, folder, progress=False).fingerprint == before.fingerprint
    with pytest.raises(CacheError, match="holds a cache of something else"):
        EmbeddingCache.build(static_model, Corpus.from_texts(TEXTS[:91]), folder, progress=False)
    with pytest.raises(CacheError, match="holds a cache of something else"):
        EmbeddingCache.build(make_static_model(5), base, folder, progress=False)


@pytest.mark.parametrize(
    "damage",
    [
        {"earlier": [{"rows": 200, "corpus": "x"}]},
        {"earlier": [{"rows": 90, "corpus": "x"}, {"rows": 80, "corpus": "x"}]},
        {"earlier": [{"rows": "90", "corpus": "x"}]},
        {"earlier": [{"rows": 90}]},
        {"earlier": {"rows": 90, "corpus": "x"}},
        {"earlier": []},
    ],
)
def test_a_manifest_that_contradicts_itself_is_refused(damage, static_model, grown, folder):
    EmbeddingCache.extend(static_model, grown, folder, progress=False)
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps({**manifest, **damage}))
    with pytest.raises(CacheError):
        EmbeddingCache.load(folder)


def test_the_command_extends_and_says_from_what(static_model, folder, tmp_path, capsys):
    static_model.save_pretrained(str(tmp_path / "model"))
    lines = [json.dumps({"_id": str(n), "text": text}) for n, text in enumerate(TEXTS)]
    (tmp_path / "beir" / "qrels").mkdir(parents=True)
    (tmp_path / "beir" / "corpus.jsonl").write_text("\n".join(lines))
    (tmp_path / "beir" / "queries.jsonl").write_text(json.dumps({"_id": "q", "text": "one"}))
    (tmp_path / "beir" / "qrels" / "dev.tsv").write_text("query-id\tcorpus-id\tscore\nq\t0\t1\n")
    paths = ["--model", str(tmp_path / "model"), "--corpus", str(tmp_path / "beir")]
    assert main(["cache", "extend", str(folder), *paths]) == 0
    assert "200 × " in capsys.readouterr().out
    assert main(["cache", "info", str(folder)]) == 0
    assert "extended from 90 targets" in capsys.readouterr().out


# ---------------------------------------------------------------------- kills


def extend(folder, derived, ready):
    torch.set_num_threads(1)
    datasets.config.HF_DATASETS_CACHE = derived
    model, corpus = make_static_model(), Corpus.from_texts(TEXTS[:90]).extend(TEXTS[90:])
    corpus.tokenize(model, progress=False)
    ready.set()
    EmbeddingCache.extend(model, corpus, folder, progress=False)


def start(folder, tmp_path):
    ready = FORKS.Event()
    process = FORKS.Process(target=extend, args=(folder, tmp_path / "derived", ready))
    process.start()
    assert ready.wait(120)
    return process


def killed_extensions(static_model, base, tmp_path, kills, seed):
    """Extensions that were killed, each then repeated; counts of what came of them."""
    generator = np.random.default_rng(seed)
    original = tmp_path / "original"
    EmbeddingCache.build(static_model, base, original, shard_size=2, progress=False)
    shutil.copytree(original, tmp_path / "first")
    start(tmp_path / "first", tmp_path).join()  # tokenizes
    shutil.copytree(original, tmp_path / "whole")
    whole, began = start(tmp_path / "whole", tmp_path), time.monotonic()
    whole.join()
    duration = time.monotonic() - began
    assert whole.exitcode == 0
    expected, before = contents(tmp_path / "whole"), contents(original)
    counts = Counter(kills=kills, before_its_end=0, same_bytes=0, shards_kept=0, written_again=0, loaded=0)
    for number in range(kills):
        folder = tmp_path / f"killed-{number}"
        shutil.copytree(original, folder)
        process = start(folder, tmp_path)
        time.sleep(generator.uniform(0, duration))
        process.kill()
        process.join()
        done = {path: path.stat().st_mtime_ns for path in folder.glob("*.safetensors")}
        size = len(EmbeddingCache.load(folder, verify=True))  # what it was, or what it was to be
        counts["loaded"] += size in (90, 200)
        if size == 90:
            counts["before_its_end"] += 1
            counts["shards_kept"] += len(done) - len([name for name in before if name.startswith("embeddings")])
        again = start(folder, tmp_path)
        again.join()
        assert again.exitcode == 0
        counts["same_bytes"] += contents(folder) == expected
        counts["written_again"] += sum(path.stat().st_mtime_ns != written for path, written in done.items())
        shutil.rmtree(folder)
    return counts


def test_an_extension_killed_at_any_moment_is_completed_to_the_same_bytes(static_model, base, tmp_path):
    counts = killed_extensions(static_model, base, tmp_path, 3, seed=0)
    assert counts["same_bytes"] == counts["loaded"] == 3 and counts["written_again"] == 0
    assert counts["before_its_end"] > 0


@pytest.mark.long
@pytest.mark.timeout(1800)
def test_twenty_extensions_killed_at_any_moment(static_model, base, tmp_path, report):
    counts = killed_extensions(static_model, base, tmp_path, 20, seed=1)
    report("kills of a cache's extension", **counts)
    assert counts["same_bytes"] == counts["loaded"] == 20 and counts["written_again"] == 0
    assert counts["before_its_end"] > 10 and counts["shards_kept"] > counts["before_its_end"]
