"""The layouts in which people bring targets, queries and judgements: BEIR's folders, the Hub's repositories, qrels
files by every writer, mined data sets, data sets with a format or a transform.
"""

from __future__ import annotations

import codecs
import csv
import gzip
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from datasets import Dataset
from huggingface_hub import HfApi
from sentence_transformers import SentenceTransformer
from sentence_transformers.util import mine_hard_negatives

TARGETS = [
    {"_id": "a", "title": "Paris", "text": "capital of France"},
    {"_id": "b", "title": "", "text": "a river"},
    {"_id": "c", "text": "Paris capital of France"},
    {"_id": "d", "title": "Rome", "text": "capital of Italy"},
]
QUERIES = [
    {"_id": "q1", "text": "which city", "answers": ["Paris"]},
    {"_id": "q2", "text": "what flows"},
    {"_id": "q3", "text": "unused"},
]
HEADER = ("query-id", "corpus-id", "score")


def write_beir(
    folder: Path,
    corpus: Iterable[Mapping[str, Any]],
    queries: Iterable[Mapping[str, Any]],
    qrels: Mapping[str, Iterable[Sequence[Any]]],
    header: bool = True,
    compress: bool = False,
) -> Path:
    """A folder in BEIR's layout: records, and the judgements of each split."""
    opener, suffix = (gzip.open, ".gz") if compress else (open, "")
    for name, records in (("corpus", corpus), ("queries", queries)):
        with opener(folder / f"{name}.jsonl{suffix}", "wt") as file:
            file.writelines(json.dumps(record) + "\n" for record in records)
    (folder / "qrels").mkdir()
    for split, lines in qrels.items():
        write_by_hand(folder / "qrels" / f"{split}.tsv", lines, header=HEADER if header else ())
    return folder


def write_repository(folder: Path, configs: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> Path:
    """The files of a repository of parquet on the Hub: config → split → columns."""
    card = ["---", "configs:"]
    for config, splits in configs.items():
        card += [f"- config_name: {config}", "  data_files:"]
        for split, columns in splits.items():
            (folder / config).mkdir(parents=True, exist_ok=True)
            Dataset.from_dict(columns).to_parquet(folder / config / f"{split}-00000-of-00001.parquet")
            card += [f"  - split: {split}", f"    path: {config}/{split}-*"]
    (folder / "README.md").write_text("\n".join([*card, "---"]))
    return folder


def upload(folder: Path, repo_id: str) -> Any:
    """The folder as a repository of data on the Hub."""
    api = HfApi()
    api.create_repo(repo_id, repo_type="dataset")
    return api.upload_folder(repo_id=repo_id, repo_type="dataset", folder_path=folder)


def columns_of(records: Iterable[Mapping[str, Any]]) -> dict[str, list[Any]]:
    """Records as the columns of a data set, null where one lacks a field."""
    records = list(records)
    return {name: [record.get(name) for record in records] for name in dict.fromkeys(key for r in records for key in r)}


# ---------------------------------------------------------------------- qrels files


def write_by_hand(path: Path, rows: Iterable[Sequence[Any]], header: Sequence[str] = HEADER, end: str = "\n") -> None:
    """Columns joined by tabs, whatever is in them."""
    lines = ["\t".join(map(str, row)) + end for row in ([header] if header else []) + list(rows)]
    path.write_bytes("".join(lines).encode())


def write_csv(path: Path, rows: Iterable[Sequence[Any]], header: Sequence[str] = HEADER, **options: Any) -> None:
    """As :func:`csv.writer` writes them."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, delimiter="\t", **options)
        writer.writerows(([header] if header else []) + list(rows))


def write_pandas(path: Path, rows: Iterable[Sequence[Any]], **options: Any) -> None:
    """As pandas writes them."""
    pd.DataFrame(list(rows), columns=HEADER).to_csv(path, sep="\t", index=False, **options)


def _with_mark(write: Callable[..., None]) -> Callable[..., None]:
    def marked(path: Path, rows: Iterable[Sequence[Any]]) -> None:
        write(path, rows)
        path.write_bytes(codecs.BOM_UTF8 + path.read_bytes())

    return marked


QRELS_WRITERS: dict[str, Callable[[Path, Iterable[Sequence[Any]]], None]] = {
    "csv": write_csv,
    "csv, Unix ends": lambda path, rows: write_csv(path, rows, lineterminator="\n"),
    "csv, all quoted": lambda path, rows: write_csv(path, rows, quoting=csv.QUOTE_ALL),
    "csv, strings quoted": lambda path, rows: write_csv(path, rows, quoting=csv.QUOTE_NONNUMERIC),
    "csv, no header": lambda path, rows: write_csv(path, rows, header=()),
    "csv, byte-order mark": _with_mark(write_csv),
    "pandas": write_pandas,
    "pandas, all quoted": lambda path, rows: write_pandas(path, rows, quoting=csv.QUOTE_ALL),
    "pandas, byte-order mark": lambda path, rows: write_pandas(path, rows, encoding="utf-8-sig"),
}
"""Writers that quote what needs it."""


def beirs_reader(path: Path) -> dict[str, dict[str, int]]:
    """What BEIR's own ``GenericDataLoader`` reads of a qrels file: query id → target id → score."""
    found: dict[str, dict[str, int]] = {}
    with path.open(encoding="utf-8") as file:
        reader = csv.reader(file, delimiter="\t", quoting=csv.QUOTE_MINIMAL)
        next(reader)
        for row in reader:
            found.setdefault(row[0], {})[row[1]] = int(row[2])
    return found


# ---------------------------------------------------------------------- data sets


def mined(model: SentenceTransformer, pairs: Dataset, output_format: str, output_scores: bool = False) -> Dataset:
    """``pairs`` with two negatives each, as sentence-transformers mines and writes them."""
    return mine_hard_negatives(
        pairs,
        model,
        num_negatives=2,
        output_format=output_format,
        output_scores=output_scores,
        verbose=False,
    )


def shouted(columns: Mapping[str, list[str]]) -> dict[str, Dataset]:
    """Data sets whose transform writes their texts in capitals, by the way in which it was set."""

    def upper(batch: dict[str, list[str]]) -> dict[str, list[str]]:
        return {name: [text.upper() for text in values] for name, values in batch.items()}

    dataset = Dataset.from_dict(columns)
    in_place, as_format = (Dataset.from_dict(columns) for _ in range(2))
    in_place.set_transform(upper)
    as_format.set_format("custom", transform=upper)
    return {
        "with_transform": dataset.with_transform(upper),
        "set_transform": in_place,
        "set_format": as_format,
        "selected later": Dataset.from_dict({name: ["x", *v] for name, v in columns.items()})
        .with_transform(upper)
        .select(range(1, 1 + len(dataset))),
        "after a selection": Dataset.from_dict({name: ["x", *v] for name, v in columns.items()})
        .select(range(1, 1 + len(dataset)))
        .with_transform(upper),
        "some columns": dataset.add_column("more", [1] * len(dataset)).with_transform(upper, columns=list(columns)),
        "tuples": dataset.with_transform(lambda batch: {name: tuple(v) for name, v in upper(batch).items()}),
        "made of other columns": dataset.rename_columns({name: f"raw_{name}" for name in columns}).with_transform(
            lambda batch: {name.removeprefix("raw_"): v for name, v in upper(batch).items()}
        ),
    }


FORMATS = ("numpy", "torch", "pandas", "arrow", "python")
"""Formats in which ``datasets`` gives the same values."""
