import ast
import re
import shlex
import shutil
import subprocess
import sys
import tarfile
from importlib.metadata import requires, version
from pathlib import Path
from typing import Any
from zipfile import ZipFile

import pytest
import yaml
from conftest import ROOT

import st_corrector


def test_importing_needs_neither_faiss_nor_peft():
    # sentence-transformers itself imports peft where it is installed.
    script = "import sys, sentence_transformers; before = set(sys.modules); from st_corrector import *; "
    script += "print([name for name in ('faiss', 'peft') if name in set(sys.modules) - before])"
    found = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    assert found.strip() == "[]"


def test_help_and_version_are_said_without_what_commands_need():
    script = "import sys; from st_corrector.cli import main\n"
    script += "try: main(sys.argv[1:])\nexcept SystemExit as ended: assert not ended.code\n"
    script += "print([name for name in ('torch', 'transformers', 'datasets', 'numpy') if name in sys.modules])"
    for asked in (["--help"], ["--version"], ["cache", "build", "--help"], ["upgrade-index", "--help"]):
        done = subprocess.run([sys.executable, "-c", script, *asked], capture_output=True, text=True, check=True)
        assert done.stdout.endswith("[]\n") and len(done.stdout) > 10, done.stdout


def test_the_package_is_typed_and_versioned():
    assert (Path(st_corrector.__file__).parent / "py.typed").is_file()
    assert version("st-corrector") == st_corrector.__version__


def test_everything_public_is_there_and_documented():
    for name in st_corrector.__all__:
        assert getattr(st_corrector, name) is not None
    undocumented = [
        name
        for name in st_corrector.__all__
        if isinstance(getattr(st_corrector, name), type) and not getattr(st_corrector, name).__doc__
    ]
    losses = ["CachedCorrectedMultipleNegativesLoss", "CorrectedMultipleNegativesLoss"]
    assert undocumented == losses, "their docstrings are the constructors', as in the host library"
    assert all(getattr(st_corrector, name).__init__.__doc__ for name in losses)


def test_the_extras_are_declared():
    extras = {extra for line in requires("st-corrector") for extra in line.split("extra ==")[1:]}
    assert {extra.strip().strip("'\"") for extra in extras} == {
        "faiss-cpu",
        "faiss-gpu",
        "peft",
        "demo",
        "report",
        "pgvector",
        "lancedb",
        "qdrant",
        "docs",
        "dev",
    }


def test_the_readmes_python_is_python():
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.DOTALL)
    assert blocks
    for block in blocks:
        names = {node.id for node in ast.walk(ast.parse(block)) if isinstance(node, ast.Name)}
        assert {"CorrectedMultipleNegativesLoss", "CorrectorTrainer"} & names


def test_nothing_runs_what_a_file_says():
    """No pickle, no eval, and no code of a model's unless the user says so."""
    files = [*(ROOT / "st_corrector").rglob("*.py"), *(ROOT / "recipes").rglob("*.py")]
    assert len(files) > 30
    for file in files:
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                names = {alias.name.partition(".")[0] for alias in node.names} | {getattr(node, "module", "") or ""}
                assert not names & {"pickle", "cPickle", "dill", "cloudpickle", "marshal", "shelve", "joblib"}, file
            if isinstance(node, ast.Call):
                called = ast.unparse(node.func)
                assert called not in ("eval", "exec", "compile", "__import__", "os.system", "torch.load"), (
                    file,
                    called,
                )
                arguments = {each.arg for each in node.keywords}
                assert not arguments & {"trust_remote_code", "allow_pickle", "weights_only", "shell"}, (file, called)


def read_yaml(path: str) -> Any:
    return yaml.safe_load((ROOT / path).read_text(encoding="utf-8"))


def steps(workflow: str) -> list[str]:
    """The commands of a workflow's jobs."""
    jobs = read_yaml(f".github/workflows/{workflow}.yml")["jobs"]
    return [step["run"] for job in jobs.values() for step in job.get("steps", []) if "run" in step]


def targets() -> set[str]:
    """What can be made."""
    return set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))


def test_ci_runs_the_readmes_test_command_on_every_python_that_is_declared():
    matrix = read_yaml(".github/workflows/test.yml")["jobs"]["test"]["strategy"]["matrix"]["python"]
    project = (ROOT / "pyproject.toml").read_text()
    assert matrix == re.findall(r'"Programming Language :: Python :: (3\.\d+)"', project)
    assert f'requires-python = ">={matrix[0]}"' in project

    assert steps("test") == [".ci/run", "make lint"]
    script = (ROOT / ".ci/run").read_text().splitlines()
    assert script[-1] == "exec make test"
    assert (ROOT / ".ci/run").stat().st_mode & 0o111, "GitHub's runner starts it as a program"
    assert "\nmake test " in (ROOT / "README.md").read_text()


def test_what_workflows_make_is_in_the_makefile():
    long = read_yaml(".github/workflows/long.yml")["jobs"]["test"]["strategy"]["matrix"]["target"]
    made = {
        words[1] for name in ("test", "release") for step in steps(name) if (words := shlex.split(step))[0] == "make"
    }
    assert "make ${{ matrix.target }}" in steps("long")
    assert {"lint", "package", "test-long", "test-oldest"} == {*made, *long}
    assert made | {*long} <= targets()


def test_only_what_is_tested_and_built_is_published_and_with_no_token():
    release = read_yaml(".github/workflows/release.yml")
    assert release["jobs"]["test"]["uses"] == "./.github/workflows/test.yml"
    assert set(release["jobs"]["publish"]["needs"]) == {"test", "build"}
    assert release["jobs"]["publish"]["permissions"] == {"id-token": "write"}
    for file in (ROOT / ".github/workflows").iterdir():
        text = file.read_text()
        assert read_yaml(f".github/workflows/{file.name}")["permissions"] == {"contents": "read"}
        assert "secrets." not in text
        assert all(
            re.fullmatch(r"[\w./-]+@(v\d+|release/v\d+)", uses) for uses in re.findall(r"uses: ([^.\s]\S*)", text)
        )


def test_a_tag_that_is_not_the_version_is_not_released(tmp_path):
    (check,) = (step for step in steps("release") if "GITHUB_REF_NAME" in step)

    def status(tag: str) -> int:
        return subprocess.run(
            ["bash", "-c", check], cwd=ROOT, env={"GITHUB_REF_NAME": tag, "PATH": "/usr/bin:/bin"}
        ).returncode

    assert status(f"v{st_corrector.__version__}") == 0
    assert status(f"v{st_corrector.__version__}1") == status("v9.9.9") == 1


def test_changelog_and_citation_are_of_this_version():
    entries = re.findall(r"^## \[(.+?)\](?: - (\S+))?$", (ROOT / "CHANGELOG.md").read_text(), flags=re.MULTILINE)
    citation = read_yaml("CITATION.cff")
    name, date = entries[0]
    if ".dev" in st_corrector.__version__:
        assert (name, date) == ("Unreleased", "")
        assert "date-released" not in citation
    else:
        assert name == st_corrector.__version__
        assert date == str(citation["date-released"])
    assert citation["version"] == st_corrector.__version__
    assert [date for _, date in entries[1:]] == sorted((date for _, date in entries[1:]), reverse=True)


def test_the_papers_reference_is_the_readmes():
    (paper,) = read_yaml("CITATION.cff")["references"]
    (bibtex,) = re.findall(r"```bibtex\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.DOTALL)
    fields = dict(re.findall(r"(\w+)\s*= \{(.*)\}", bibtex))
    authors = " and ".join(f"{each['family-names']}, {each['given-names']}" for each in paper["authors"])
    found = {
        "title": paper["title"],
        "author": authors,
        "booktitle": paper["collection-title"],
        "year": str(paper["year"]),
        "url": paper["url"],
    }
    assert found == fields


def test_contributors_are_told_of_targets_that_there_are():
    """And pre-commit runs what `make lint` does."""
    named = re.findall(r"`make ([a-z -]+)`", (ROOT / "CONTRIBUTING.md").read_text())
    assert {"test", "test-long", "test-oldest", "lint", "package", "report"} <= {
        word for each in named for word in each.split()
    }
    assert {word for each in named for word in each.split()} <= targets()
    (lint,) = re.findall(r"^lint:.*\n\t(.*)$", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
    (local,) = read_yaml(".pre-commit-config.yaml")["repos"]
    hooks = [hook["entry"].removeprefix(".venv/bin/").removesuffix(" --force-exclude") for hook in local["hooks"]]
    of_make = [part.strip().removeprefix("$(BIN)/") for part in lint.split("&&")]
    assert hooks == [re.sub(r" (--check )?\.$", "", part) for part in of_make]


@pytest.fixture(scope="module")
def distributions(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The sdist of this checkout, and the wheel that is built of it."""
    folder = tmp_path_factory.mktemp("distributions")
    # Without what earlier builds have left: setuptools would take over what was in them.
    ignored = [line.rstrip("/") for line in (ROOT / ".gitignore").read_text().split()]
    shutil.copytree(ROOT, folder / "checkout", ignore=shutil.ignore_patterns(".git", *ignored))
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder), str(folder / "checkout")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    (sdist,), (wheel,) = folder.glob("*.tar.gz"), folder.glob("*.whl")
    return sdist, wheel


def files_in(folder: Path) -> set[str]:
    return {str(path.relative_to(ROOT)) for path in folder.rglob("*") if path.is_file() and path.suffix != ".pyc"}


def test_the_wheel_is_the_package_and_nothing_else(distributions):
    names = {name for name in ZipFile(distributions[1]).namelist() if ".dist-info/" not in name}
    assert names == files_in(ROOT / "st_corrector")
    assert {"st_corrector/py.typed", "st_corrector/reporting/templates/negatives.md"} <= names


def test_the_sdist_is_the_repository(distributions):
    """So that its tests run, which read recipes, results, pages and workflows."""
    with tarfile.open(distributions[0]) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    found = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if found.returncode:
        pytest.skip("this is no checkout of git")
    assert {name for name in found.stdout.splitlines() if (ROOT / name).is_file()} <= names


def test_both_are_what_pypi_takes(distributions):
    command = [sys.executable, "-m", "twine", "check", "--strict", *map(str, distributions)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
