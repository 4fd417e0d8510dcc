"""The documentation does what it says: every code block of README.md and docs/ runs, or its program understands it.

- **python** runs as it stands: a page's blocks in their order, in one namespace, in a folder that holds what the pages
  name (``data/nq``, ``pairs.jsonl``, …), 168 short texts of each. Nothing is patched: the models' names are found in a
  cache of the Hub that holds a small stand-in (two narrow layers, a few hundred words, as many dimensions), and runs
  are short because the data are few. A block with ``title="train.py"`` is such a file as well.
- **bash**: the commands of ``st-corrector`` for caches and for what serves run, on a trained run and on real vector
  stores (and in ``make test-long`` ``torchrun`` of such a file). Other programs, which take longer or need machines,
  are stopped when their own parsers have read the arguments; scripts behind a launcher likewise. ``make`` plans its
  target (``--dry-run``), extras of ``pip install`` are looked up.
- **yaml** and **json** are parsed.
- **text**, **bibtex** and **mermaid** are for the eye. Anything else is an error, so that nothing is left out silently.
"""

from __future__ import annotations

import argparse
import ast
import importlib.util
import json
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, NamedTuple

import faiss
import huggingface_hub.constants
import numpy as np
import psycopg
import pytest
import torch
import yaml
from conftest import ROOT, make_bert_model, make_texts
from packaging.requirements import Requirement
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Dense
from support.encoders import CHECKPOINTS, ENCODERS

import st_corrector
from st_corrector import Corpus, CorrectorTrainer, CorrectorTrainingArguments, EmbeddingCache

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # which pytest needs there

DOCS = ROOT / "docs"
FIGURES = DOCS / "figures"
PAGES = [ROOT / "README.md", *sorted(DOCS.rglob("*.md"))]
FOR_THE_EYE = ("text", "bibtex", "mermaid")
CACHES = (("cache", "build"), ("cache", "info"), ("cache", "verify"), ("cache", "repair"), ("cache", "extend"))
"""Commands of ``st-corrector`` that need nothing but what the page has made."""
SERVING = ("serve-plan", "adapter", "upgrade-index")
"""Commands that need a run, ``outputs/nq``, and what it started from, ``old.npy`` and ``old.faiss``."""
STAND_IN, DECODER = "sentence-transformers/all-MiniLM-L6-v2", "Qwen/Qwen3-Embedding-0.6B"
_FENCE = re.compile(r"^(?P<indent> *)(?P<fence>`{3,}|~{3,}) *(?P<language>[^\s`]*) *(?P<rest>[^`]*)$")
_INCLUDED = re.compile(r'^ *--8<-- "(?P<path>[^":]+)(?::(?P<section>[-\w]+))?"$', re.MULTILINE)


class Block(NamedTuple):
    """A fenced block of a page, as it is shown: without the page's indentation, with what it includes.

    Args:
        page: whose it is.
        line: of its first line of code.
        language: what its fence says.
        title: the file that it shows, if it says so.
    """

    page: Path
    line: int
    language: str
    title: str | None
    code: str

    @property
    def place(self) -> str:
        return f"{self.page.name}, line {self.line}"


def blocks_of(page: Path) -> Iterator[Block]:
    """The fenced blocks of a page, in order.

    Raises:
        AssertionError: one of them is not closed.
    """
    opened: re.Match[str] | None = None
    lines: list[str] = []
    for number, line in enumerate(page.read_text(encoding="utf-8").splitlines(), 1):
        found = _FENCE.match(line)
        if opened is None:
            if found:
                opened, first, lines = found, number + 1, []
        elif found and found["fence"].startswith(opened["fence"]) and not found["language"]:
            title = re.search(r'title="([^"]+)"', opened["rest"])
            code = _INCLUDED.sub(_included, textwrap.dedent("\n".join(lines)))
            yield Block(page, first, opened["language"], title and title[1], code + "\n")
            opened = None
        else:
            lines.append(line)
    assert opened is None, f"{page.name}, line {first - 1}: this block is not closed"


def _included(found: re.Match[str]) -> str:
    path, section = ROOT / found["path"], found["section"]
    assert path.is_file(), f"there is no {found['path']} to include"
    text = path.read_text(encoding="utf-8")
    if section is None:
        return text
    _, begun, rest = text.partition(f"--8<-- [start:{section}]")
    shown, ended, _ = rest.partition(f"--8<-- [end:{section}]")
    assert begun and ended, f"{found['path']} has no section {section}"
    return shown


# ---------------------------------------------------------------------- running a page


class Runner:
    """Runs the blocks of one page in ``folder``, where its code finds what it names.

    Args:
        launches: whether ``torchrun`` starts the scripts that a page shows.
    """

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch, launches: bool = False) -> None:
        self.folder, self.monkeypatch, self.launches = folder, monkeypatch, launches
        self.namespace: dict[str, Any] = {"__name__": "__main__"}
        monkeypatch.chdir(folder)
        for scripts in ("recipes", "benchmarks"):
            monkeypatch.syspath_prepend(str(ROOT / scripts))

    def run(self, block: Block) -> None:
        if block.title is not None:
            (self.folder / block.title).write_text(block.code)
        if block.language == "python":
            # As many lines before it as the page has, so that a traceback shows where it is.
            code = compile("\n" * (block.line - 1) + block.code, str(block.page), "exec", dont_inherit=True)
            exec(code, self.namespace)
        elif block.language == "bash":
            for command in commands_of(block.code):
                self.command(command)
        elif block.language == "yaml":
            yaml.safe_load(block.code)
        elif block.language == "json":
            json.loads(block.code)
        else:
            assert block.language in FOR_THE_EYE, f"no way to check {block.language or 'what has no language'}"

    def command(self, command: list[str]) -> None:
        program, *arguments = command
        if program == "make":
            plan = subprocess.run(["make", "--dry-run", *arguments], capture_output=True, text=True, cwd=ROOT)
            assert plan.returncode == 0, plan.stderr
            for variable in (argument.partition("=")[0] for argument in arguments if "=" in argument):
                assert f"$({variable})" in (ROOT / "Makefile").read_text(), f"{variable} changes nothing"
        elif program == "pip":
            check_pip(arguments)
        elif program in ("python", ".venv/bin/python"):
            self.script(arguments)
        else:
            self.program(program, arguments)

    def program(self, name: str, arguments: list[str]) -> None:
        """A console script: of this package, or a launcher of another script."""
        found = entry_points(group="console_scripts", name=name)
        assert found, f"there is no program {name!r}"
        main = next(iter(found)).load()
        read = self.read(main, name, arguments)
        serves = name == "st-corrector" and arguments[0] in SERVING
        if serves:
            self.train()
        if serves or (name == "st-corrector" and tuple(arguments[:2]) in CACHES):
            self.monkeypatch.setattr(sys, "argv", [name, *arguments])
            assert main() == 0, f"{shlex.join([name, *arguments])} has failed"
        if hasattr(read, "training_script"):
            self.script([read.training_script, *read.training_script_args])
            if self.launches and name == "torchrun" and (self.folder / read.training_script).is_file():
                command = [sys.executable, "-m", "torch.distributed.run", *arguments]
                done = subprocess.run(command, capture_output=True, text=True, cwd=self.folder)
                assert done.returncode == 0, done.stderr[-3000:]

    def train(self) -> None:
        """The run that commands for what serves begin with, as a recipe leaves it."""
        if Path("outputs/nq").exists():
            return
        model, corpus = SentenceTransformer(STAND_IN, device="cpu"), Corpus.from_beir("data/nq")
        cache = EmbeddingCache.build(model, corpus, "caches/untrained")
        index = faiss.IndexFlatIP(cache.dim)
        index.add(cache[range(len(corpus))].numpy())
        faiss.write_index(index, "old.faiss")
        np.save("old.npy", cache[range(len(corpus))].numpy())
        args = CorrectorTrainingArguments(
            "outputs/nq",
            max_steps=2,
            num_negatives=2,
            corrector="mlp",
            per_device_train_batch_size=8,
            save_strategy="no",
            use_cpu=True,
        )
        trainer = CorrectorTrainer(model, args, corpus=corpus)
        trainer.train()
        trainer.model.save_pretrained("outputs/nq/final")
        trainer.trained_corrector().save_pretrained("outputs/nq/final")

    def script(self, command: list[str]) -> None:
        """A Python file: one of this repository, or one that the page has shown."""
        path, *arguments = command
        if (self.folder / path).is_file():
            assert not arguments, f"{path} takes no arguments"
            return
        assert (ROOT / path).is_file(), f"there is no file {path}"
        self.read(lambda: runpy.run_path(str(ROOT / path), run_name="__main__"), path, arguments)

    def read(self, program: Callable[[], Any], name: str, arguments: list[str]) -> argparse.Namespace:
        """What the program's own parser makes of its arguments; it is stopped there.

        Raises:
            AssertionError: it does not understand them, or parses none.
        """
        parse, depth = argparse.ArgumentParser.parse_known_args, 0

        def parse_and_stop(self, *args, **settings):
            nonlocal depth
            depth += 1
            try:
                found, unknown = parse(self, *args, **settings)
            finally:
                depth -= 1
            # Neither a command's own parser, nor one that only looks for some options first.
            if depth == 0 and self.add_help:
                if unknown:
                    self.error(f"unrecognized arguments: {unknown}")
                raise _Read(found)
            return found, unknown

        with self.monkeypatch.context() as patched:
            patched.setattr(argparse.ArgumentParser, "parse_known_args", parse_and_stop)
            patched.setattr(sys, "argv", [name, *arguments])
            try:
                program()
            except _Read as read:
                return read.args[0]
            except SystemExit as error:
                raise AssertionError(f"{name} does not understand {shlex.join(arguments)} ({error})") from error
        raise AssertionError(f"{name} has no argument parser")


class _Read(Exception):
    """A program has read its arguments."""


def commands_of(code: str) -> Iterator[list[str]]:
    """The commands of a block of shell, without comments and settings of the environment."""
    for line in code.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
            words = words[1:]
        assert not {"|", "||", "&&", ";", "&", ">", "<"} & set(words), f"more than one command: {line}"
        if words:
            yield words


def check_pip(arguments: list[str]) -> None:
    """``pip install`` of this package with extras that it has."""
    assert arguments[0] == "install", arguments
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for argument in arguments[1:]:
        local = re.fullmatch(r"\.(\[.+\])?", argument)
        found = Requirement(f"st-corrector{local[1] or ''}" if local else argument)
        assert found.name == "st-corrector", f"{argument} is not this package"
        assert found.extras <= extras.keys(), f"there are no extras {found.extras - extras.keys()}"


# ---------------------------------------------------------------------- what the pages find


def write_lines(path: Path, records: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


@pytest.fixture(scope="module")
def shelf(tmp_path_factory) -> Path:
    """The files that pages name, under ``data``, and a cache of the Hub with the stand-in, under ``hub``."""
    shelf = tmp_path_factory.mktemp("shelf")
    data, nq = shelf / "data", shelf / "data" / "data" / "nq"
    (nq / "qrels").mkdir(parents=True)
    queries, texts = make_texts(168)
    numbered = list(enumerate(zip(queries, texts, strict=True)))
    write_lines(nq / "corpus.jsonl", [{"_id": f"d{n}", "title": "", "text": text} for n, (_, text) in numbered])
    write_lines(
        nq / "queries.jsonl",
        [{"_id": f"q{n}", "text": query, "answers": [text.split()[0]]} for n, (query, text) in numbered],
    )
    for split, members in (("train", range(64)), ("dev", range(64, 168))):
        lines = "".join(f"q{n}\td{n}\t1\n" for n in members)
        (nq / "qrels" / f"{split}.tsv").write_text("query-id\tcorpus-id\tscore\n" + lines)
    write_lines(data / "pairs.jsonl", [{"question": query, "answer": text} for _, (query, text) in numbered])
    write_lines(data / "passages.jsonl", [{"pid": f"p{n}", "title": "", "text": text} for n, (_, text) in numbered])
    write_lines(
        data / "questions.jsonl",
        [{"qid": f"q{n}", "question": query, "pid": f"p{n}"} for n, (query, _) in numbered],
    )
    for name, model in {
        STAND_IN: make_stand_in(shelf),
        DECODER: ENCODERS["a decoder, last token"].make(shelf).bfloat16(),
    }.items():
        stored = shelf / "hub" / f"models--{name.replace('/', '--')}"
        (stored / "refs").mkdir(parents=True)
        (stored / "refs" / "main").write_text("0" * 40)
        model.save(str(stored / "snapshots" / ("0" * 40)))
    return shelf


def make_stand_in(folder: Path) -> SentenceTransformer:
    """A small transformer with as many dimensions as all-MiniLM-L6-v2."""
    transformer, pooling, normalize = make_bert_model(folder)
    widened = Dense(32, 384, activation_function=torch.nn.Identity())
    return SentenceTransformer(modules=[transformer, pooling, widened, normalize], device="cpu")


@pytest.fixture
def shop(postgres, quick_sqlite, monkeypatch) -> Iterator[None]:
    """The database that a page names, where a client looks for its server."""
    with psycopg.connect(postgres, autocommit=True) as connection:
        monkeypatch.setenv("PGHOST", connection.info.host)
        monkeypatch.setenv("PGUSER", connection.info.user)
        connection.execute("CREATE DATABASE shop")
        yield
        connection.execute("DROP DATABASE shop WITH (FORCE)")


@pytest.fixture
def runner(shelf, tmp_path, monkeypatch) -> Runner:
    shutil.copytree(shelf / "data", tmp_path / "page")
    # Read when huggingface_hub is imported: for this process there, for others in the environment.
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(shelf / "hub"))
    monkeypatch.setenv("HF_HUB_CACHE", str(shelf / "hub"))
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "datasets"))
    return Runner(tmp_path / "page", monkeypatch)


# ---------------------------------------------------------------------- tests


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_code_block_does_what_it_shows(page, runner, request):
    if "postgresql:///shop" in page.read_text():
        request.getfixturevalue("shop")
    if page.name == "llm-embedders.md" and not CHECKPOINTS:
        pytest.skip("sentence-transformers is too old for this transformers: gradient checkpointing fails")
    for block in blocks_of(page):
        try:
            runner.run(block)
        except Exception as error:
            raise AssertionError(f"{block.place}: {type(error).__name__}: {error}") from error


@pytest.mark.long
def test_the_script_for_many_processes_runs_in_two(runner, request):
    runner.launches = True
    test_every_code_block_does_what_it_shows(DOCS / "multi-gpu.md", runner, request)
    assert list(runner.folder.glob("outputs/many/checkpoint-20/st_corrector/*-of-00002.safetensors"))


def test_the_stand_in_is_found_by_its_name_and_tells_texts_apart(runner):
    model = SentenceTransformer(STAND_IN, device="cpu")
    one, other = model.encode(["word12 word3", "word7 word155"])
    assert model.get_embedding_dimension() == 384 and float(one @ other) < 0.999


@pytest.mark.parametrize(
    "text, complaint",
    [
        ("```python\nmodel = Sentencetransformer()\n```", "page.md, line 4: NameError"),
        ("```python\nfrom st_corrector import Corpus\nCorpus.from_beir('data/none')\n```", "CorpusError"),
        ("    ```python\n    assert False, 'indented'\n    ```", "indented"),
        ("```\nmake test\n```", "no way to check what has no language"),
        ("```ruby\nputs 1\n```", "no way to check ruby"),
        ("```python\n1", "is not closed"),
        ("```bash\nmake nothing\n```", "nothing"),
        ("```bash\nmake bench COLOUR=red\n```", "COLOUR changes nothing"),
        ("```bash\npip install '.[everything]'\n```", "no extras"),
        ("```bash\npip install torch\n```", "is not this package"),
        ("```bash\nst-corrector cache inspect caches/nq\n```", "does not understand"),
        ("```bash\nst-corrector cache info caches/none\n```", "has failed"),
        ("```bash\npython recipes/train_nq.py --dataset data/nq --negatives 3\n```", "does not understand"),
        ("```bash\npython recipes/train_nq.py --num_negatives many\n```", "does not understand"),
        ("```bash\npython recipes/quickstart.py --stepz 3\n```", "does not understand"),
        ("```bash\npython recipes/train.py\n```", "there is no file"),
        ("```bash\naccelerate launch --processes 8 recipes/train_nq.py\n```", "does not understand"),
        ("```bash\naccelerate launch recipes/train_nq.py \\\n    --strategie stale\n```", "does not understand"),
        ("```bash\ntorchrun --nproc_per_node 2 recipes/none.py\n```", "there is no file"),
        ("```bash\nrm -r caches\n```", "there is no program 'rm'"),
        ("```bash\nmake test && make lint\n```", "more than one command"),
        ("```yaml\nnum_processes: [8\n```", "Error"),
        ('```yaml\n--8<-- "recipes/configs/none.yaml"\n```', "none.yaml"),
        ("```json\n{'hidden': 128}\n```", "Error"),
    ],
    ids=lambda value: re.sub(r"\W+", "-", value) if len(value) < 30 else "",
)
def test_a_broken_block_is_found(text, complaint, runner, request):
    page = runner.folder / "page.md"
    page.write_text(f"# A page\n\n{text}\n")
    with pytest.raises(AssertionError, match=re.escape(complaint)):
        test_every_code_block_does_what_it_shows(page, runner, request)


def test_blocks_are_taken_as_they_are_shown(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(
        '# A page\n\n=== "Tab"\n\n    ```python title="a.py" hl_lines="1"\n    x = """\n      y\n    ```\n'
        "\n````text\n```python\n````\n"
    )
    first, second = blocks_of(page)
    assert first[1:] == (6, "python", "a.py", 'x = """\n  y\n')
    assert second.language == "text" and second.code == "```python\n"


def test_every_public_name_is_in_the_reference():
    pages = "".join(page.read_text() for page in (DOCS / "reference").glob("*.md"))
    shown = re.findall(r"^::: (\S+)$", pages, re.MULTILINE)
    assert len(shown) == len(set(shown)), "each once"
    assert {f"st_corrector.{name}" for name in st_corrector.__all__} <= set(shown)


def test_what_pages_include_is_there():
    included = [found for page in PAGES for found in _INCLUDED.finditer(page.read_text())]
    assert {found["section"] for found in included} >= {"low-coverage", "high-coverage"}
    for found in included:
        text = _included(found)
        assert "| strategy |" in text if found["section"] else text


def test_the_links_of_the_readme_lead_somewhere():
    links = re.findall(r"\]\(([^)#\s]+)[^)]*\)", (ROOT / "README.md").read_text())
    local = [link for link in links if "://" not in link]
    assert len(local) > 5
    assert not [link for link in local if not (ROOT / link).exists()]


def test_the_symptoms_are_what_the_package_says():
    said = [
        "".join(part.value if isinstance(part, ast.Constant) else "…" for part in parts if part is not None)
        for file in (ROOT / "st_corrector").rglob("*.py")
        for node in ast.walk(ast.parse(file.read_text()))
        for parts in [node.values if isinstance(node, ast.JoinedStr) else [node]]
        if isinstance(node, ast.JoinedStr) or (isinstance(node, ast.Constant) and isinstance(node.value, str))
    ]
    page = (DOCS / "troubleshooting.md").read_text()
    symptoms = re.findall(r"^\| `([^`]+)`(?: \(a warning\))? \|", page[page.index("## Data and labels") :], re.M)
    assert len(symptoms) > 30
    said = [re.sub(r"%[.\d]*[a-z]", "…", each) for each in said]
    unsaid = [
        symptom
        for symptom in symptoms
        if not any(re.search(".*".join(map(re.escape, re.split("… ?| ?…", symptom))), each, re.S) for each in said)
    ]
    assert not unsaid


def test_the_drawings_are_what_their_script_draws(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["figures.py", "--output", str(tmp_path)])
    runpy.run_path(str(DOCS / "figures.py"), run_name="__main__")
    drawn, kept = ({path.name: path.read_text() for path in folder.glob("*.svg")} for folder in (tmp_path, FIGURES))
    assert drawn == kept and len(drawn) > 1


@pytest.mark.skipif(not importlib.util.find_spec("mkdocs"), reason="the site needs pip install '.[docs]'")
@pytest.mark.long
def test_the_site_builds_without_a_warning_and_asks_nobody_for_anything(tmp_path):
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=ROOT, env={**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    )
    assert done.returncode == 0 and "WARNING" not in done.stderr, done.stderr
    pages = {path.parent.name: path.read_text() for path in tmp_path.rglob("index.html")}
    assert {"quickstart", "losses", "selection", "reliability"} <= pages.keys()
    for name, html in pages.items():
        fetched = re.findall(r"<(?:script|link|img|iframe|source)\b[^>]*?(?:src|href)=[\"']?(https?:[^\s\"'>]+)", html)
        assert not fetched, f"{name} is not complete without {fetched}"
        assert not re.search(r":(?:class|meth|func|attr|data|math):`|<code>\w*`", html), f"{name} shows markup"
        assert "--8<--" not in html.replace("<!-- --8<--", ""), name
    reference = "".join(path.read_text() for path in (tmp_path / "reference").rglob("*.html"))
    assert not [name for name in st_corrector.__all__ if f'id="st_corrector.{name}"' not in reference]
    assert (tmp_path / "search" / "search_index.json").stat().st_size > 100_000
