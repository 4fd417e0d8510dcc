"""What a recipe trains on: a folder, files or a Hub repository, recognised by its content."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Literal

from datasets import Dataset, IterableDataset, get_dataset_config_names, load_dataset
from datasets.exceptions import DatasetsError

from st_corrector import Corpus, CorpusError, InputError, StCorrectorError
from st_corrector.data.columns import column_names

DEV = ("dev", "validation")
# What data sets call their columns where they have more than two.
_QUERY = ("query", "question", "anchor")
_POSITIVE = ("positive", "positives", "pos", "answer", "passage")
_NEGATIVE = re.compile(r"neg(ative)?s?(_\d+)?")


@dataclass
class DataArguments:
    """What is trained on."""

    dataset: str = field(
        default="",
        metadata={
            "help": "A BEIR folder; the Hub id of a retrieval data set (configs corpus, queries and judgements); or "
            "pairs or triplets of texts: a Hub id, or a folder or file of parquet, jsonl or csv."
        },
    )
    dataset_config: str | None = field(
        default=None,
        metadata={"help": "Which config of a Hub id: of the pairs, or of the judgements of a retrieval data set."},
    )
    dataset_revision: str | None = field(
        default=None, metadata={"help": "Commit, branch or tag of the data set on the Hub, to have the same one again."}
    )
    qrels: str | None = field(
        default=None,
        metadata={"help": "The Hub id of the judgements where they have a repository of their own, as BeIR's have."},
    )
    corpus_config: str = field(
        default="corpus", metadata={"help": "Which config of a Hub id holds the targets, as en-corpus of several."}
    )
    queries_config: str = field(default="queries", metadata={"help": "Likewise that of the queries, as en-queries."})
    query_column: str | None = field(
        default=None, metadata={"help": "The pairs' column of queries; by default told by its name, or one of two."}
    )
    positive_column: str | None = field(
        default=None, metadata={"help": "That of positives, texts or lists of texts; by its name, or one of two."}
    )
    negative_columns: str | None = field(
        default=None,
        metadata={"help": "Columns whose texts are targets too, with commas; by default negative, negative_1, neg …"},
    )
    streaming: bool = field(default=False, metadata={"help": "Read from the Hub without downloading files first."})
    max_targets: int | None = field(
        default=None, metadata={"help": "Keep the first N targets of a BEIR folder or retrieval data set."}
    )
    missing_targets: Literal["error", "drop"] = field(
        default="error",
        metadata={"help": "Judgements of targets that are not in the data end the recipe, or are left out (drop)."},
    )
    eval_queries: int = field(
        default=2000, metadata={"help": "Training queries that are held out as dev, where the data has no dev split."}
    )
    hold_out: int = field(
        default=0,
        metadata={
            "help": "Hold this many training queries out and evaluate on them, whatever dev split there is: to choose "
            "settings by."
        },
    )


HELD_OUT = "held-out"
"""The split of --hold_out."""
# Which arguments each kind of data uses, in addition to dataset, eval_queries and hold_out.
_KINDS = {
    "a BEIR folder": {"max_targets", "missing_targets"},
    "a retrieval data set": {
        *("dataset_config", "dataset_revision", "qrels", "corpus_config", "queries_config"),
        *("streaming", "max_targets", "missing_targets"),
    },
    "a data set of pairs": {
        *("dataset_config", "dataset_revision", "streaming"),
        *("query_column", "positive_column", "negative_columns"),
    },
}


def load_corpus(args: DataArguments) -> Corpus:
    """What ``--dataset`` names, with a split ``train`` and one of :data:`DEV`; prints what it was taken for.

    Raises:
        InputError: it is not there, cannot be told, or has nothing to train on; or an argument does not fit to it.
        CorpusError: what is in it cannot be read.
    """
    path = Path(args.dataset)
    try:
        configs = [] if path.is_file() else get_dataset_config_names(args.dataset, revision=args.dataset_revision)
        if {args.corpus_config, args.queries_config} <= set(configs):
            _refuse_arguments(args, kind := "a retrieval data set")
            corpus = Corpus.from_hub(
                args.dataset,
                qrels=args.qrels,
                corpus_config=args.corpus_config,
                queries_config=args.queries_config,
                qrels_config=args.dataset_config,
                revision=args.dataset_revision,
                streaming=args.streaming,
                max_targets=args.max_targets,
                missing_targets=args.missing_targets,
            )
        elif any((path / name).is_file() for name in ("corpus.jsonl", "corpus.jsonl.gz")):
            _refuse_arguments(args, kind := "a BEIR folder")
            corpus = Corpus.from_beir(path, max_targets=args.max_targets, missing_targets=args.missing_targets)
        else:
            _refuse_arguments(args, kind := "a data set of pairs")
            splits = _load_pairs(args, configs)
            query, positive, negatives = choose_columns(args, column_names(splits["train"]))
            kind = f"pairs of {query!r} and {positive!r}" + (f", negatives {negatives}" if negatives else "")
            corpus = Corpus.from_pairs(splits, query, positive, negatives)
            corpus.name = path.stem if path.exists() else args.dataset
    except StCorrectorError:
        raise
    except (DatasetsError, FileNotFoundError, ConnectionError, ValueError) as error:
        missing = "" if path.exists() else " (and there is no such folder or file here)"
        raise InputError(f"--dataset {args.dataset}: {error}{missing}") from error
    if "train" not in corpus.splits or not len(corpus.qrels("train")):
        raise InputError(f"--dataset {args.dataset} has judgements for {corpus.splits}, expected some for 'train'.")
    dev = next((split for split in DEV if split in corpus.splits), None)
    if dev is None:
        try:
            corpus.hold_out(args.eval_queries)
        except CorpusError as error:
            raise InputError(f"--eval_queries: {error}") from error
    if args.hold_out:
        try:
            corpus.hold_out(args.hold_out, into=HELD_OUT)
        except CorpusError as error:
            raise InputError(f"--hold_out: {error}") from error
    print(f"{args.dataset} is {kind}; dev is {f'its split {dev!r}' if dev else 'held out of its training queries'}.")
    return corpus


def _refuse_arguments(args: DataArguments, kind: str) -> None:
    meant = {"dataset", "eval_queries", "hold_out", *_KINDS[kind]}
    given = [f"--{each.name}" for each in fields(DataArguments) if getattr(args, each.name) != each.default]
    if wrong := [option for option in given if option.removeprefix("--") not in meant]:
        raise InputError(f"--dataset {args.dataset} is {kind}: leave out {', '.join(wrong)}.")


def _load_pairs(args: DataArguments, configs: list[str]) -> dict[str, Dataset | IterableDataset]:
    """The split ``train``, and one of :data:`DEV` if it is there."""
    path, config = Path(args.dataset), args.dataset_config
    splits: Mapping[str, Dataset | IterableDataset]
    if path.is_file():
        splits = load_dataset(str(path.resolve().parent), data_files=path.name, streaming=True)
    else:
        if config is None:
            config = configs[0] if len(configs) == 1 else "default"
        if config not in configs:
            raise InputError(f"--dataset {args.dataset} has the configs {configs}: name one with --dataset_config.")
        # A local folder is read as it is: load_dataset would copy it once, and take that copy ever after, whatever
        # becomes of its files.
        streaming = args.streaming or path.is_dir()
        splits = load_dataset(args.dataset, config, revision=args.dataset_revision, streaming=streaming)
    if "train" not in splits:
        raise InputError(f"--dataset {args.dataset} has the splits {list(splits)}, expected one named 'train'.")
    dev = [split for split in DEV if split in splits][:1]
    return {split: splits[split] for split in ["train", *dev]}


def choose_columns(args: DataArguments, found: list[str]) -> tuple[str, str, list[str]]:
    """The columns of queries, of positives, and of negatives: as they are given, else told by name, else the only two.

    Raises:
        InputError: a given column is not there, or which is which cannot be told.
    """
    if args.negative_columns is None:
        negatives = [name for name in found if _NEGATIVE.fullmatch(name)]
    else:
        negatives = [name for name in args.negative_columns.split(",") if name]
    for name in (args.query_column, args.positive_column, *negatives):
        if name and name not in found:
            raise InputError(f"--dataset {args.dataset} has no column {name!r}; it has {found}.")
    rest = [name for name in found if name not in negatives]
    query = args.query_column or next((name for name in _QUERY if name in rest), None)
    positive = args.positive_column or next((name for name in _POSITIVE if name in rest and name != query), None)
    if len(rest) == 2:
        query = query or next(name for name in rest if name != positive)
        positive = positive or next(name for name in rest if name != query)
    if query is None or positive is None or query == positive:
        raise InputError(
            f"--dataset {args.dataset} has the columns {found}: say which holds the queries and which the positives "
            "with --query_column and --positive_column."
        )
    return query, positive, negatives
