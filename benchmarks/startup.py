"""How long it takes until something happens: the command line, the import, and the start of a run over many targets.

Each is measured in a process of its own, five times, in seconds of CPU and of the clock; medians are kept. With
``--dataset`` a corpus of ``--targets`` passages is made of its passages, each time behind another number, and a run's
start over it is timed: reading it, its fingerprint, and which targets have the same text. The first start makes what
is kept on disk; the later ones are what is timed::

    python benchmarks/startup.py --dataset ../shared/data/nq --results benchmarks/results/startup.json

``--checkout`` measures another checkout of the project (an earlier commit) instead of this one.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import platform
import resource
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
COMMANDS = {
    "import sentence_transformers": ["-c", "import sentence_transformers"],
    "import st_corrector": ["-c", "import st_corrector"],
    "import st_corrector and its loss": ["-c", "from st_corrector import CorrectedMultipleNegativesLoss"],
    "st-corrector --help": ["-c", "from st_corrector.cli import main; main(['--help'])"],
    "st-corrector --version": ["-c", "from st_corrector.cli import main; main(['--version'])"],
}
START = """
import json, sys, time, resource
from st_corrector import Corpus

def spent():
    both = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(each.ru_utime + each.ru_stime for each in both)

wall, cpu = time.perf_counter(), spent()
corpus = Corpus.from_beir(sys.argv[1])
told = [len(corpus), corpus.fingerprint, corpus.duplicates_of(3).tolist()]
print(json.dumps({"wall": time.perf_counter() - wall, "cpu": spent() - cpu, "told": told}))
"""


def timed(command: list[str], checkout: Path) -> tuple[dict[str, float], str]:
    """Seconds of one process, and what it printed."""
    environment = {**os.environ, "PYTHONPATH": str(checkout), "HF_HUB_OFFLINE": "1"}
    environment.pop("PYTHONDONTWRITEBYTECODE", None)  # packages are compiled once, as on any machine
    before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    done = subprocess.run([sys.executable, *command], env=environment, capture_output=True, text=True, cwd=checkout)
    wall, after = time.perf_counter() - began, resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode:
        raise SystemExit(done.stderr[-2000:])
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {"wall": wall, "cpu": cpu}, done.stdout


def medians(runs: list[dict[str, float]]) -> dict[str, float]:
    return {name: round(statistics.median(run[name] for run in runs), 3) for name in ("wall", "cpu")}


def tile(dataset: Path, folder: Path, targets: int) -> None:
    """A BEIR folder of ``targets`` different passages."""
    with gzip.open(dataset / "corpus.jsonl.gz", "rt", encoding="utf-8") as file:
        passages = [json.loads(line) for line in file]
    with (folder / "corpus.jsonl").open("w", encoding="utf-8") as file:
        for row in range(targets):
            passage = passages[row % len(passages)]
            text = f"{row // len(passages)} {passage['text']}"
            line = {"_id": f"{row}", "title": passage.get("title", ""), "text": text}
            file.write(json.dumps(line, ensure_ascii=False) + "\n")
    (folder / "queries.jsonl").write_text(json.dumps({"_id": "q", "text": "a question"}) + "\n")
    (folder / "qrels").mkdir()
    (folder / "qrels" / "train.tsv").write_text("query-id\tcorpus-id\tscore\nq\t3\t1\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", type=Path, help="a BEIR folder with corpus.jsonl.gz")
    parser.add_argument("--targets", type=int, default=1_000_000)
    parser.add_argument("--checkout", type=Path, default=ROOT)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--results", type=Path)
    args = parser.parse_args()
    commit = ["git", "-C", str(args.checkout), "rev-parse", "--short=12", "HEAD"]
    found: dict[str, object] = {
        "commit": subprocess.run(commit, capture_output=True, text=True, check=True).stdout.strip(),
        "command": shlex.join(["python", *sys.argv]),
        "versions": {name: version(name) for name in ("torch", "transformers", "sentence-transformers", "datasets")},
        "machine": {"python": platform.python_version(), "cores": os.cpu_count()},
        "repeats": args.repeats,
        "seconds": {
            name: medians([timed(command, args.checkout)[0] for _ in range(args.repeats)])
            for name, command in COMMANDS.items()
        },
    }
    if args.dataset is not None:
        with tempfile.TemporaryDirectory() as name:
            tile(args.dataset, Path(name), args.targets)
            starts = [json.loads(timed(["-c", START, name], args.checkout)[1]) for _ in range(args.repeats + 1)]
        first, *later = starts
        if any(each["told"] != first["told"] for each in later) or first["told"][0] != args.targets:
            raise SystemExit(f"the starts do not agree: {[each['told'] for each in starts]}")
        found["start"] = {"targets": args.targets, "first": medians([first]), "later": medians(later)}
    text = json.dumps(found, indent=2) + "\n"
    print(text, end="")
    if args.results is not None:
        args.results.parent.mkdir(parents=True, exist_ok=True)
        args.results.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
