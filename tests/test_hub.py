"""What is pushed to the Hub comes back the same in a fresh process, and nothing else goes there."""

import json
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
import torch
from conftest import make_bert_model, make_static_model
from huggingface_hub import HfApi, ModelCard
from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError
from support.runs import trainer_of

from st_corrector import (
    CacheError,
    Corpus,
    CorpusRetrievalEvaluator,
    Corrector,
    EmbeddingCache,
    InputError,
    MLPCorrector,
    RidgeCorrector,
)

TEXTS = ["word1 word3 word5", "word7 word9"]
LOADS = """
import sys, torch
from sentence_transformers import SentenceTransformer
from st_corrector import Corrector

model = SentenceTransformer("tester/retriever", device="cpu")
corrector = Corrector.from_pretrained("tester/retriever")
torch.save(
    {
        "embeddings": model.encode(%r, convert_to_tensor=True),
        "corrector": repr(corrector),
        "corrected": corrector(torch.linspace(-1, 1, 3 * corrector.dim).view(3, -1)),
        "frames": corrector.frames._asdict(),
    },
    sys.argv[1],
)
"""


@pytest.fixture
def dev_corpus(corpus: Corpus) -> Corpus:
    queries = dict(zip(corpus.qrels("train").queries["id"], corpus.qrels("train").queries["text"], strict=True))
    corpus.add_split("dev", queries, {id: [id] for id in queries})
    corpus.name = "made-up words"
    return corpus


def loaded_in_a_fresh_process(hub, path: Path) -> dict:
    run = subprocess.run(
        [sys.executable, "-c", LOADS % TEXTS, str(path)],
        env=hub.environment(),
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    return torch.load(path)


def validate(card: ModelCard) -> None:
    """By huggingface_hub's own check; the stand-in has made it with the push already."""
    if (
        int(huggingface_hub.__version__.partition(".")[0]) > 1
    ):  # before, it asks huggingface.co whatever the endpoint is
        card.validate()


def assert_no_token(hub, repo_id: str, **where) -> None:
    for path, content in hub.files(repo_id, **where).items():
        assert hub.token.encode() not in content and b"hf_" not in content.replace(b"hf_hub", b""), path


@pytest.mark.parametrize("kind", [pytest.param("static", marks=pytest.mark.long), "transformer"])
def test_a_run_is_pushed_and_loaded_back(hub, dev_corpus, tmp_path, kind):
    model = make_static_model() if kind == "static" else make_bert_model(tmp_path)
    evaluator = CorpusRetrievalEvaluator(dev_corpus, "dev")
    evaluator(model)
    trainer = trainer_of(
        dev_corpus,
        tmp_path / "run",
        model,
        max_steps=6,
        learning_rate=1e-2,
        push_to_hub=True,
        hub_model_id="tester/retriever",
        hub_token=hub.token,
        hub_private_repo=True,
        max_score=0.95,
        logging_steps=2,
    )
    before = model.encode(TEXTS, convert_to_tensor=True)
    trainer.train()
    evaluator(model)
    trainer.push_to_hub()
    expected = model.encode(TEXTS, convert_to_tensor=True)
    assert (before - expected).abs().max() > 1e-3, "it has been trained"

    found = loaded_in_a_fresh_process(hub, tmp_path / "loaded.pt")
    assert torch.equal(found["embeddings"], expected)
    corrector = trainer.trained_corrector()
    grid = torch.linspace(-1, 1, 3 * corrector.dim).view(3, -1)
    assert found["corrector"] == repr(corrector) and torch.equal(found["corrected"], corrector(grid))
    (loss,) = trainer._corrected_losses().values()
    assert found["frames"]["stale"] == loss.corrected.search.cache.fingerprint
    assert found["frames"]["fresh"]["weights"] != found["frames"]["stale"]["weights"]

    files = hub.files("tester/retriever")
    card = ModelCard(files["README.md"].decode())
    validate(card)
    assert "st-corrector" in card.content and "made-up words, 200 targets" in card.content
    assert "before training" in card.content and "after training" in card.content
    assert "1,200 targets (6 steps × 200)" in card.content
    assert "assets/staleness.png" in card.content and files["assets/staleness.png"].startswith(b"\x89PNG")
    assert {"corrector/config.json", "corrector/corrector.safetensors", "modules.json"} <= files.keys()
    assert not [path for path in files if path.startswith("_") or "checkpoint" in path or "embeddings-" in path]
    assert_no_token(hub, "tester/retriever")
    for path, content in files.items():
        if path != "training_args.bin":  # the trainer's own, which names its folders
            assert str(tmp_path).encode() not in content, path
    with pytest.raises(RepositoryNotFoundError):
        HfApi().repo_info("tester/retriever", token=False)


def test_a_model_pushed_by_itself_has_the_card_and_its_corrector_follows(hub, dev_corpus, tmp_path):
    model = make_static_model()
    trainer = trainer_of(dev_corpus, tmp_path / "run", model, max_steps=4, corrector="ridge", learning_rate=1e-2)
    trainer.train()
    model.push_to_hub("retriever")
    alone = dict(hub.files("tester/retriever"))
    validate(ModelCard(alone["README.md"].decode()))
    assert "How the Negatives Were Chosen" in alone["README.md"].decode()
    assert not [path for path in alone if path.startswith("corrector/")]
    with pytest.raises(InputError, match="holds no corrector"):
        Corrector.from_pretrained("tester/retriever")

    trainer.trained_corrector().push_to_hub("tester/retriever")
    both = hub.files("tester/retriever")
    assert {path: both[path] for path in alone} == alone, "nothing of the model has changed"
    assert set(both) - set(alone) == {"corrector/config.json", "corrector/corrector.safetensors"}
    found = loaded_in_a_fresh_process(hub, tmp_path / "loaded.pt")
    assert torch.equal(found["embeddings"], model.encode(TEXTS, convert_to_tensor=True))
    assert isinstance(RidgeCorrector.from_pretrained("tester/retriever"), RidgeCorrector)
    with pytest.raises(InputError, match="not a MLPCorrector"):
        MLPCorrector.from_pretrained("tester/retriever")


def test_a_corrector_in_a_repository_of_its_own_and_by_revision(hub):
    first, second = RidgeCorrector(4), RidgeCorrector(4)
    pairs = torch.randn(30, 4)
    second.learn(pairs, pairs.flip(1), pairs, 1.0)
    old = first.push_to_hub("tester/corrector", private=True).rsplit("/", 1)[1]
    second.push_to_hub("tester/corrector", revision="next")
    assert torch.equal(Corrector.from_pretrained("tester/corrector")(pairs), first(pairs))
    assert torch.equal(Corrector.from_pretrained("tester/corrector", revision=old)(pairs), first(pairs))
    newer = Corrector.from_pretrained("tester/corrector", revision="next")
    assert torch.equal(newer(pairs), second(pairs)) and not torch.equal(first(pairs), second(pairs))
    card = ModelCard(hub.files("tester/corrector")["README.md"].decode())
    validate(card)
    assert 'from_pretrained("tester/corrector")' in card.content


def test_what_was_loaded_once_is_there_offline(hub, tmp_path):
    RidgeCorrector(4).push_to_hub("tester/corrector")
    EmbeddingCache.from_tensor(torch.randn(9, 4)).push_to_hub("tester/cache")
    code = (
        "from st_corrector import Corrector, EmbeddingCache\n"
        "print(Corrector.from_pretrained('tester/corrector').dim)\n"
        f"print(len(EmbeddingCache.from_hub('tester/cache', {str(tmp_path / 'cache')!r})))\n"
    )
    assert Corrector.from_pretrained("tester/corrector").dim == 4
    assert len(EmbeddingCache.from_hub("tester/cache", tmp_path / "cache")) == 9
    asked = len(hub.requests)
    environment = {**hub.environment(), "HF_HUB_OFFLINE": "1"}
    offline = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert offline.stdout == "4\n9\n", offline.stderr[-2000:]
    assert len(hub.requests) == asked


def test_a_cache_is_pushed_and_memory_mapped_from_its_copy(hub, corpus, tmp_path):
    built = EmbeddingCache.build(make_static_model(), corpus, tmp_path / "built", shard_size=50, dtype="int8")
    (tmp_path / "built" / "notes.txt").write_text("mine")
    built.push_to_hub("tester/cache", private=True)
    files = hub.files("tester/cache", repo_type="dataset")
    assert len([path for path in files if path.startswith("embeddings-")]) == 4
    assert set(files) - {f"embeddings-00000{n}.safetensors" for n in range(4)} <= {
        "manifest.json",
        "README.md",
        ".gitattributes",
    }
    assert_no_token(hub, "tester/cache", repo_type="dataset")
    found = EmbeddingCache.from_hub("tester/cache", tmp_path / "copy")
    assert found.path == tmp_path / "copy" and found.fingerprint == built.fingerprint
    rows = np.arange(len(corpus))
    assert torch.equal(found[rows], built[rows])
    assert not [file for file in (tmp_path / "copy").glob("embeddings-*") if file.is_symlink()]
    assert len(EmbeddingCache.from_hub("tester/cache")) == len(corpus), "into a folder of its own choice"


def test_interrupted_transfers_of_a_cache_go_on(hub, corpus, tmp_path):
    built = EmbeddingCache.build(make_static_model(), corpus, tmp_path / "built", shard_size=50)
    hub.fail("^POST .*/commit/main", times=1, status=400)
    with pytest.raises(HfHubHTTPError):
        built.push_to_hub("tester/cache")
    sent = len(hub.requested("^PUT"))
    built.push_to_hub("tester/cache")
    assert sent == 4 and len(hub.requested("^PUT")) == 4, "what the Hub had received is not sent again"

    hub.fail("^GET .*embeddings-000002", times=1, status=403)
    with pytest.raises(HfHubHTTPError):
        EmbeddingCache.from_hub("tester/cache", tmp_path / "copy")
    before = len(hub.requests)
    found = EmbeddingCache.from_hub("tester/cache", tmp_path / "copy")
    rows = np.arange(len(corpus))
    assert torch.equal(found[rows], built[rows])
    fetched = [request.path for request in hub.requests[before:] if request.method == "GET" and request.sent]
    assert any("embeddings-000002" in path for path in fetched)
    assert len([path for path in fetched if "resolve" in path]) < 4, "not what had come already"


def test_a_cache_pushed_again_replaces_the_one_before(hub, tmp_path):
    EmbeddingCache.build(
        make_static_model(), Corpus.from_texts(["word1", "word3", "word5"]), tmp_path / "a", shard_size=1
    )
    EmbeddingCache.load(tmp_path / "a").push_to_hub("tester/cache")
    small = EmbeddingCache.from_tensor(torch.randn(2, 8))
    small.push_to_hub("tester/cache")
    files = hub.files("tester/cache", repo_type="dataset")
    assert [name for name in files if name.startswith("embeddings-")] == ["embeddings-000000.safetensors"]
    assert "EmbeddingCache(2 × 8" in files["README.md"].decode()
    assert torch.equal(EmbeddingCache.from_hub("tester/cache", tmp_path / "copy")[[0, 1]], small[[0, 1]])
    mine = files["README.md"].decode().partition("<!-- written")[0] + "My words."
    HfApi().upload_file(
        path_or_fileobj=mine.encode(), path_in_repo="README.md", repo_id="tester/cache", repo_type="dataset"
    )
    EmbeddingCache.from_tensor(torch.randn(3, 8)).push_to_hub("tester/cache")
    assert hub.files("tester/cache", repo_type="dataset")["README.md"].decode() == mine, "a card of one's own is kept"


def test_a_copy_does_not_overwrite_a_cache_that_was_built(hub, corpus, tmp_path):
    EmbeddingCache.from_tensor(torch.randn(9, 8)).push_to_hub("tester/cache")
    EmbeddingCache.build(make_static_model(), corpus, tmp_path / "built", progress=False)
    with pytest.raises(CacheError, match="not downloaded from the Hub"):
        EmbeddingCache.from_hub("tester/cache", tmp_path / "built")
    assert len(EmbeddingCache.load(tmp_path / "built", verify=True)) == 200


def test_a_folder_that_is_not_there_is_named(tmp_path):
    RidgeCorrector(4).save_pretrained(tmp_path / "run" / "final")
    with pytest.raises(InputError, match=r"Did you mean .*final"):
        Corrector.from_pretrained(tmp_path / "run")
    with pytest.raises(InputError, match="neither an existing folder"):
        Corrector.from_pretrained(f"{tmp_path}/none/at/all")


def test_a_damaged_copy_is_refused(hub, tmp_path):
    EmbeddingCache.from_tensor(torch.randn(50, 8)).push_to_hub("tester/cache")
    files = hub.files("tester/cache", repo_type="dataset")
    shard = bytearray(files["embeddings-000000.safetensors"])
    shard[-5] ^= 1
    HfApi().upload_file(
        path_or_fileobj=bytes(shard),
        path_in_repo="embeddings-000000.safetensors",
        repo_id="tester/cache",
        repo_type="dataset",
    )
    with pytest.raises(CacheError, match="not what was written"):
        EmbeddingCache.from_hub("tester/cache", tmp_path / "copy")


def test_a_part_of_a_cache_is_not_pushed(hub):
    part = EmbeddingCache.from_tensor(torch.randn(50, 8)).part(slice(0, 10))
    with pytest.raises(CacheError, match="save the whole one"):
        part.push_to_hub("tester/cache")
    assert not hub.repositories


def test_a_failing_upload_leaves_no_half_corrector(hub):
    hub.fail("POST .*commit", times=20, status=500)
    with pytest.raises(HfHubHTTPError):
        RidgeCorrector(4).push_to_hub("tester/corrector")
    hub._faults.clear()
    assert not [path for path in hub.files("tester/corrector") if path.startswith("corrector/")]


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (b"not JSON", "not readable"),
        (b"[]", "not readable"),
        (b'{"schema": 1, "corrector": "os.system", "dim": 4, "settings": {}}', "not one of"),
        (b'{"schema": 1, "corrector": "ridge", "dim": 1e9, "settings": {}}', "dim must be"),
        (b'{"schema": 1, "corrector": "ridge", "dim": 4, "settings": {"hidden": 1}}', "no setting"),
        (b'{"schema": 1, "corrector": "mlp", "dim": 4, "settings": {}}', "not the state"),
        (b'{"schema": 1, "corrector": "ridge", "dim": 8, "settings": {}}', "not the state"),
        (b'{"schema": 1, "corrector": "ridge", "dim": 4, "settings": {}, "maps": {"stale": 1}}', "its frames"),
        (b'{"schema": 1, "corrector": "affine-map", "dim": 4, "settings": {}}', "needs the setting"),
        (b'{"schema": 2}', "another version"),
    ],
)
def test_a_corrector_from_a_stranger_is_a_corrector_or_an_error(tmp_path, config, message):
    RidgeCorrector(4).save_pretrained(tmp_path)
    (tmp_path / "corrector" / "config.json").write_bytes(config)
    with pytest.raises(InputError, match=message):
        Corrector.from_pretrained(tmp_path)


def test_every_corrector_comes_back_as_it_was(tmp_path):
    from st_corrector.correctors import CORRECTORS, make_corrector

    generator = torch.Generator().manual_seed(0)
    stale, fresh, more = (torch.randn(60, 12, generator=generator) for _ in range(3))
    for name in CORRECTORS:
        corrector = make_corrector(name, 12)
        corrector.learn(stale, fresh, stale[:9], 20.0)
        corrector.save_pretrained(tmp_path / name)
        found = Corrector.from_pretrained(tmp_path / name)
        assert repr(found) == repr(corrector) and torch.equal(found(more), corrector(more)), name
        for each in (corrector, found):  # and it goes on learning as if nothing had been
            each.learn(more, stale, stale[:9], 20.0)
        assert torch.equal(found(more), corrector(more)), name
        assert name == "identity" or not torch.equal(found(more), make_corrector(name, 12)(more))
    assert json.loads((tmp_path / "mlp/corrector/config.json").read_text())["settings"]["hidden"] == 128
