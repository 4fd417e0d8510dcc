import ast
import re
import subprocess
import sys
from importlib.metadata import requires, version
from pathlib import Path

from conftest import ROOT

import st_corrector


def test_importing_needs_neither_faiss_nor_peft():
    # sentence-transformers itself imports peft where it is installed.
    script = "import sys, sentence_transformers; before = set(sys.modules); import st_corrector; "
    script += "print([name for name in ('faiss', 'peft') if name in set(sys.modules) - before])"
    found = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    assert found.strip() == "[]"


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
    assert {extra.strip().strip("'\"") for extra in extras} == {"faiss-cpu", "faiss-gpu", "peft", "demo", "dev"}


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
