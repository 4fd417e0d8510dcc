"""Two corpora beside Natural Questions, as BEIR folders, made from what PyPI and Debian give.

    python benchmarks/corpora.py code         # docstring → function, 50,000 functions of pinned packages
    python benchmarks/corpora.py packages     # synopsis → description, all packages of Debian 12

**code**: the functions and classes of the wheels below, as `recipes/quickstart.py` reads them: the code without its
docstrings is the target, the name in words its title, the first paragraph of the docstring the question.

**packages**: the long description of every package, its own name left out, is the target; the synopsis is the question.
Packages that say the same (`-dev`, `-doc` and `-data` packages) are relevant to one another, so that one question is
asked for all of them; where they are more than 20, none is asked. Two say the same if their descriptions begin with the
same paragraph, or if at least four fifths of the sequences of four words that either has are in both. The lists must
have been fetched: `apt-get -o Acquire::Languages=en update`.

Each has splits train, dev and test, drawn once, and the targets that answer them first, the others in random order, so
that fewer targets (``--max_targets``) leave all questions answered. The data is not part of the project; the digest of
what came out is printed, kept in `made.json`, and compared with what the figures of this project were measured on.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np
from debian.deb822 import Deb822
from scipy import sparse
from scipy.sparse import csgraph
from sklearn.feature_extraction.text import CountVectorizer

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "recipes"))
from quickstart import functions_in, words  # noqa: E402

WHEELS = (
    *("ansible-core==2.19.14", "astropy==8.0.2", "biopython==1.88", "dask==2026.8.0", "django==5.2.19", "jax==0.10.2"),
    *("keras==3.15.1", "matplotlib==3.11.2", "mne==1.13.2", "monai==1.6.1", "music21==10.5.1", "mypy==2.4.1"),
    *("networkx==3.6.1", "nltk==3.10.4", "numba==0.68.1", "obspy==1.5.1", "pandas==3.1.1", "pylint==4.1.4"),
    *("qiskit==2.6.2", "scikit-learn==1.9.1", "scipy==1.17.1", "sphinx==9.0.4", "sqlalchemy==2.1.9"),
    *("statsmodels==0.15.0", "sympy==1.14.0", "textual==8.2.8", "twisted==26.10.0", "xarray==2026.9.0"),
)
PLATFORMS = ("any", "manylinux2014_x86_64", "manylinux_2_28_x86_64")
FUNCTIONS = 50_000
MOST_ALIKE = 20  # packages that say the same; more have it from a template
WORDS = 4  # in a sequence, by which texts are compared
ALIKE = 0.8  # of the sequences that either of two texts has, those that both have (Jaccard)
RARE = 100  # texts that have a sequence
# Questions of each split.
SPLITS = {
    "code": {"dev": 1_500, "test": 1_500, "train": 5_000},
    "packages": {"dev": 1_500, "test": 1_500, "train": 6_000},
}
# What the project's own figures were measured on.
DIGESTS = {
    "code": "201eaeffedd37b100eef88fb2ec3f977e5acff383f5e3f8c61a3b957a2949e9c",
    "packages": "b0def1d6ffa9b24e0ace79a29d7a068dc36e7cea4b5c1a9aa67b5e8f149bfa61",
}


class Target(NamedTuple):
    """A target, and the question that may be asked for it and for ``relevant``."""

    id: str
    title: str
    text: str
    question: str | None
    relevant: tuple[str, ...]


def code() -> list[Target]:
    """The functions of :data:`WHEELS`."""
    with tempfile.TemporaryDirectory() as folder:
        wheels, sources = Path(folder) / "wheels", Path(folder) / "sources"
        options = [option for platform in PLATFORMS for option in ("--platform", platform)]
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
        subprocess.run([*pip, "--python-version", "3.11", *options, "--dest", wheels, *WHEELS], check=True)
        for wheel in sorted(wheels.iterdir()):
            with zipfile.ZipFile(wheel) as archive:
                archive.extractall(sources, [name for name in archive.namelist() if name.endswith(".py")])
        functions = functions_in([sources], limit=FUNCTIONS)
    return [
        Target(str(n), words(each.name.rpartition(".")[2]), each.code, each.summary, (str(n),))
        for n, each in enumerate(functions)
    ]


def packages() -> list[Target]:
    """The packages of Debian's main archive that this machine knows."""
    told = "$(CREATED_BY) $(CODENAME) $(COMPONENT) $(FILENAME)"
    command = ["apt-get", "-o", "Acquire::Languages=en", "indextargets", "--format", told]
    listed = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split("\n")
    files = [line.split(maxsplit=3)[3] for line in listed if line.startswith("Translations bookworm main ")]
    if not files:
        sys.exit("There are no descriptions of Debian 12's packages here: run apt-get -o Acquire::Languages=en update.")
    read = subprocess.run(["/usr/lib/apt/apt-helper", "cat-file", *files], capture_output=True, check=True).stdout
    found = {}
    for paragraph in Deb822.iter_paragraphs(read.decode()):
        synopsis, _, long = paragraph["Description-en"].partition("\n")
        # Without its name, which the synopsis of many gives away; lines joined, paragraphs kept.
        text = re.sub(rf"(?<![\w-]){re.escape(paragraph['Package'])}(?![\w-])", "", long, flags=re.IGNORECASE)
        paragraphs = [" ".join(part.split()) for part in re.split(r"\n \.\s*(?=\n|$)", text)]
        if any(paragraphs):
            found[paragraph["Package"]] = synopsis.strip(), [part for part in paragraphs if part]
    names = sorted(found)
    group_of = alike([found[name][1] for name in names])
    members = defaultdict(list)
    for name, group in zip(names, group_of, strict=True):
        members[group].append(name)
    asked: set[str] = set()
    targets = []
    for name, number in zip(names, group_of, strict=True):
        synopsis, paragraphs = found[name]
        group = members[number]
        # The first of those that are alike asks for all.
        asks = group[0] == name and len(group) <= MOST_ALIKE and synopsis.casefold() not in asked
        asked.add(synopsis.casefold())
        targets.append(Target(name, "", "\n".join(paragraphs), synopsis if asks else None, tuple(group)))
    # By name they would be neighbours in a family, of which fewer targets would keep a part.
    random.Random(1).shuffle(targets)
    return targets


def alike(texts: list[list[str]]) -> list[int]:
    """The group of each text, which is given by its paragraphs: those that say the same, directly or by way of others,
    are in one.
    """
    words_of = CountVectorizer(ngram_range=(WORDS, WORDS), token_pattern=r"\w+", binary=True, dtype=np.int32)
    grams = words_of.fit_transform("\n".join(paragraphs) for paragraphs in texts)
    # Sequences that many have are looked at in pairs that share a rare one as well.
    rare = grams[:, np.asarray(grams.sum(axis=0)).ravel() <= RARE]
    pairs = sparse.triu(rare @ rare.T, k=1).tocoo()
    of_each = np.asarray(grams.sum(axis=1)).ravel()
    one, other = pairs.row, pairs.col
    # No more can be alike than the shorter has of the longer.
    likely = np.minimum(of_each[one], of_each[other]) >= ALIKE * np.maximum(of_each[one], of_each[other])
    one, other = one[likely], other[likely]
    both = np.concatenate(
        [
            np.asarray(grams[one[at : at + 100_000]].multiply(grams[other[at : at + 100_000]]).sum(axis=1)).ravel()
            for at in range(0, len(one), 100_000)
        ]
        or [np.zeros(0)]
    )
    same = both >= ALIKE * (of_each[one] + of_each[other] - both)
    beginnings: dict[str, int] = {}
    first = np.array([beginnings.setdefault(paragraphs[0].casefold(), n) for n, paragraphs in enumerate(texts)])
    edges = [np.concatenate([one[same], np.arange(len(texts))]), np.concatenate([other[same], first])]
    graph = sparse.coo_matrix((np.ones(len(edges[0])), edges), shape=(len(texts), len(texts)))
    return csgraph.connected_components(graph, directed=False)[1].tolist()


def write(targets: list[Target], counts: dict[str, int], folder: Path) -> str:
    """Write a BEIR folder, whole or not at all, the judged targets first; the digest of its files."""
    asking = [target for target in targets if target.question]
    drawn = random.Random(0).sample(asking, sum(counts.values()))
    judged = {id for target in drawn for id in target.relevant}
    targets = sorted(targets, key=lambda target: target.id not in judged)
    partial = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    (partial / "qrels").mkdir(parents=True)
    _write(partial / "corpus.jsonl", ({"_id": each.id, "title": each.title, "text": each.text} for each in targets))
    _write(partial / "queries.jsonl", ({"_id": f"q-{each.id}", "text": each.question} for each in drawn))
    for split, count in counts.items():
        members, drawn = drawn[:count], drawn[count:]
        lines = [f"q-{each.id}\t{id}\t1" for each in members for id in each.relevant]
        (partial / "qrels" / f"{split}.tsv").write_text("\n".join(["query-id\tcorpus-id\tscore", *lines]) + "\n")
    files = sorted(path for path in partial.rglob("*") if path.is_file())
    digest = hashlib.sha256(b"".join(hashlib.sha256(path.read_bytes()).digest() for path in files)).hexdigest()
    made = {"targets": len(targets), "asking": len(asking), "splits": counts, "digest": digest}
    (partial / "made.json").write_text(json.dumps(made, indent=1) + "\n")
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)
    return digest


def _write(path: Path, records: Iterable[dict[str, str | None]]) -> None:
    with path.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(record, ensure_ascii=False) + "\n" for record in records)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("corpus", choices=SPLITS)
    parser.add_argument(
        "--into", type=Path, default=ROOT / "outputs" / "corpora", help="a folder for each is made in it"
    )
    args = parser.parse_args()
    folder = args.into / args.corpus
    folder.parent.mkdir(parents=True, exist_ok=True)
    digest = write({"code": code, "packages": packages}[args.corpus](), SPLITS[args.corpus], folder)
    print(f"{folder}: {(folder / 'made.json').read_text()}")
    if digest != DIGESTS[args.corpus]:
        print(
            f"Its digest is not that of this project's figures, {DIGESTS[args.corpus]}: another version of Python or "
            "of Debian's lists reads a little differently. Figures are comparable, but not the same."
        )


if __name__ == "__main__":
    main()
