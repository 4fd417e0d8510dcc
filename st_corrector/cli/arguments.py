"""Arguments shared by commands: a corpus, a model, JSON."""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ..errors import InputError

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

    from ..data.corpus import Corpus

Commands = Any  # argparse's type of subparsers is private


def add_command(commands: Commands, name: str, help: str, run: Any, epilog: str = "") -> argparse.ArgumentParser:
    """A command; ``run`` gets its parsed arguments."""
    made: argparse.ArgumentParser = commands.add_parser(
        name,
        help=help,
        description=help[0].upper() + help[1:] + ".",
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    made.set_defaults(command=run)
    return made


def add_json(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of text")


def add_corpus(parser: argparse.ArgumentParser, required: bool = True) -> None:
    parser.add_argument(
        "--corpus", required=required, help="the targets: a folder in BEIR's layout, or a BEIR repository on the Hub"
    )
    parser.add_argument("--prompt", help="prompt of the targets, if not the model's own")
    parser.add_argument("--max_targets", type=at_least_one, metavar="N", help="the corpus is the first N of them")
    parser.add_argument(
        "--missing_targets",
        choices=("error", "drop"),
        default="error",
        help="judgements of targets that are not in the corpus are an error, or dropped (default: error)",
    )


def at_least_one(text: str) -> int:
    """A count of things that there must be.

    Raises:
        argparse.ArgumentTypeError: it is none.
    """
    if not text.isdecimal() or not (count := int(text)):
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number from 1 on")
    return count


def add_model(parser: argparse.ArgumentParser, help: str, required: bool = True) -> None:
    parser.add_argument("--model", required=required, help=f"{help}: a folder or a Hub id")
    parser.add_argument("--revision", help="commit, branch or tag of a model on the Hub")
    parser.add_argument("--batch_size", type=at_least_one, default=64, metavar="N", help="texts in one forward pass")


def add_queries(parser: argparse.ArgumentParser, help: str) -> None:
    parser.add_argument("--split", default="dev", help=f"{help}: those of this split of the corpus (default: dev)")
    parser.add_argument("--queries", type=Path, metavar="FILE", help="or of a file with one query per line")


def add_judging(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--k", type=int, default=10, help="depth of the recall (default: 10)")
    parser.add_argument(
        "--judged", type=int, default=200, metavar="N", help="how many queries judge it, at most (default: 200)"
    )


class Amount(NamedTuple):
    """A share of the targets, or a number of them."""

    value: float
    is_share: bool

    def of(self, count: int) -> int:
        """How many of ``count`` it is, at least one."""
        return max(1, round(self.value * count)) if self.is_share else min(count, int(self.value))


def amount(text: str) -> Amount:
    """``"5%"`` or ``"4000"``.

    Raises:
        argparse.ArgumentTypeError: it is neither.
    """
    if match := re.fullmatch(r"(\d+(?:\.\d+)?)\s*%", text.strip()):
        if 0 < float(match[1]) <= 100:
            return Amount(float(match[1]) / 100, is_share=True)
    elif text.strip().isdigit() and int(text):
        return Amount(int(text), is_share=False)
    raise argparse.ArgumentTypeError(f"{text!r} is neither a share of the targets, such as 5%, nor a number of them")


def read_queries(args: argparse.Namespace, corpus: Corpus | None) -> list[str]:
    """The queries that the arguments name, each once.

    Raises:
        InputError: there are none, or the file is not text.
    """
    if args.queries is None:
        if corpus is None:
            raise InputError("Which queries? Pass --queries, or --corpus for those of its --split.")
        return list(dict.fromkeys(corpus.qrels(args.split).queries["text"]))
    try:
        lines = args.queries.read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise InputError(f"{args.queries} is not UTF-8 text ({error}).") from error
    # A log repeats them: one that teaches may not judge.
    queries = list(dict.fromkeys(line.strip() for line in lines if line.strip()))
    if len(queries) < 2:
        raise InputError(f"{args.queries} has {len(queries)} queries: expected many, one per line.")
    return queries


def open_corpus(args: argparse.Namespace) -> Corpus:
    """The corpus that the arguments name."""
    from ..data.corpus import Corpus

    read = Corpus.from_beir if Path(args.corpus).is_dir() else Corpus.from_hub
    return read(args.corpus, max_targets=args.max_targets, missing_targets=args.missing_targets, prompt=args.prompt)


def open_model(args: argparse.Namespace) -> SentenceTransformer:
    """The model that the arguments name."""
    from sentence_transformers import SentenceTransformer

    try:
        return SentenceTransformer(args.model, revision=args.revision)
    except ValueError as error:  # what transformers says of a folder that holds no model
        raise InputError(f"{args.model} cannot be loaded as a model: {error}") from error


def show(value: dict[str, Any]) -> None:
    """Print a result as JSON."""
    print(json.dumps(value, indent=2, ensure_ascii=False))


def table(rows: dict[str, list[str]], columns: list[str]) -> str:
    """Rows of cells under column names, aligned."""
    cells = [["", *columns], *([name, *values] for name, values in rows.items())]
    widths = [max(len(row[n]) for row in cells) for n in range(len(columns) + 1)]
    lines = []
    for name, *values in cells:
        aligned = [value.rjust(width) for value, width in zip(values, widths[1:], strict=True)]
        lines.append("  ".join([name.ljust(widths[0]), *aligned]))
    return "\n".join(lines)
