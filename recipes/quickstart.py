"""Code search over the Python packages installed on this machine: the whole method in minutes, nothing downloaded.

    python recipes/quickstart.py
    python recipes/quickstart.py "parse a date from a string" "retry a request with backoff"
    python recipes/quickstart.py --packages torch transformers

The targets are the functions and classes of the environment's packages (name, signature and body, docstrings
left out), the queries the first paragraphs of some of their docstrings. It trains a small encoder several times from
the same weights: with in-batch negatives; with corrected negatives from all targets; with the corpus's own pairs (a
function's name, in words, and the function) in every batch besides; and with a teacher's labels as well, the model
whose token vectors the encoder began with. It compares them on docstrings that were held out, whatever comes out, and
then answers questions with the functions that the last one finds.
"""

from __future__ import annotations

import argparse
import ast
import random
import re
import site
import sys
import tempfile
import time
import warnings
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import NamedTuple

import torch
from common import default_model, static_encoder, table, train
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.training_args import BatchSamplers
from tqdm.auto import tqdm
from transformers import set_seed

from st_corrector import (
    Corpus,
    CorpusRetrievalEvaluator,
    CorrectedSearch,
    CorrectorTrainingArguments,
    EmbeddingCache,
    IdentityCorrector,
)

QUESTIONS = (
    "compute the cosine similarity between two sets of vectors",
    "split a string into tokens",
    "download a file from a url and show a progress bar",
    "randomly drop units of a neural network during training",
    "check whether a path exists",
)
METRICS = ("mrr@10", "ndcg@10", "recall@1", "recall@5", "recall@20", "recall@100")
RUNS = (  # what is trained with: its name, the strategy, whether with own pairs, whether with a teacher
    ("in-batch negatives", "in-batch", False, False),
    ("corrected negatives", "corrected", False, False),
    ("corrected, own pairs", "corrected", True, False),
    ("corrected, own pairs, teacher", "corrected", True, True),
)
_TEACHER_TOKENS = 64
_MAX_LINES = 40
_SKIPPED_FOLDERS = {"tests", "test", "testing", "_vendor", "vendored", "__pycache__"}
_Definition = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef


class Function(NamedTuple):
    """One function or class: where it is, its code without docstrings, and what its docstring says first."""

    name: str
    code: str
    summary: str


def functions_of(path: Path, module: str) -> list[Function]:
    """The documented functions and classes of one source file."""
    try:
        source = path.read_text(encoding="utf-8")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tree = ast.parse(source)
    except (SyntaxError, ValueError, OSError):
        return []  # templates and files for other Python versions lie in site-packages too
    lines = source.splitlines()

    def visit(node: ast.AST, prefix: str) -> Iterator[Function]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, _Definition):
                name = f"{prefix}.{child.name}"
                summary = _summary(child)
                code = _code(child, lines)
                if len(summary.split()) >= 4 and len(code) >= 3:
                    yield Function(name, "\n".join(code[:_MAX_LINES]), summary)
                yield from visit(child, name)

    return list(visit(tree, module))


def _summary(node: _Definition) -> str:
    """The first paragraph of the docstring, on one line."""
    return " ".join((ast.get_docstring(node) or "").strip().split("\n\n")[0].split())[:400]


def _code(node: _Definition, lines: list[str]) -> list[str]:
    """The definition's lines, without any docstring in it and without empty lines."""
    docstrings: set[int] = set()
    for inner in ast.walk(node):
        if isinstance(inner, _Definition) and ast.get_docstring(inner, clean=False) is not None:
            docstrings.update(range(inner.body[0].lineno, inner.body[0].end_lineno + 1))
    numbers = (number for number in range(node.lineno, node.end_lineno + 1) if number not in docstrings)
    return [lines[number - 1].strip() for number in numbers if lines[number - 1].strip()]


def functions_in(
    folders: Iterable[Path], packages: list[str] | None = None, limit: int | None = None
) -> list[Function]:
    """The documented functions and classes of the packages in some folders, in a fixed order, without repetitions.

    Args:
        folders: where packages are installed.
        packages: top-level names; by default all.
        limit: keep at most this many, a fixed random choice.
    """
    modules: dict[Path, str] = {}
    for folder in folders:
        for path in sorted(folder.rglob("*.py")):
            parts = path.relative_to(folder).with_suffix("").parts
            if not _SKIPPED_FOLDERS & set(parts) and (packages is None or parts[0] in packages):
                modules[path] = ".".join(part for part in parts if part != "__init__")
    found: list[Function] = []
    summaries: set[str] = set()
    codes: set[str] = set()
    with ProcessPoolExecutor() as pool:
        files = pool.map(functions_of, modules, modules.values(), chunksize=64)
        for functions in tqdm(files, total=len(modules), desc="Reading the packages", unit=" files"):
            for function in functions:
                # The same docstring on several functions would make the others false negatives.
                if function.summary not in summaries and function.code not in codes:
                    summaries.add(function.summary)
                    codes.add(function.code)
                    found.append(function)
    if limit and len(found) > limit:
        found = random.Random(0).sample(found, limit)
    return found


def code_corpus(functions: list[Function], train: int, dev: int) -> Corpus:
    """All functions as targets, their names in words as titles; some summaries as queries, to train and to evaluate."""
    ids = [str(number) for number in range(len(functions))]
    titles = [words(function.name.rpartition(".")[2]) for function in functions]
    corpus = Corpus.from_texts([function.code for function in functions], ids=ids, titles=titles)
    shuffled = random.Random(0).sample(ids, len(ids))
    for split, members in (("dev", shuffled[:dev]), ("train", shuffled[dev : dev + train])):
        queries = {id: functions[int(id)].summary for id in members}
        corpus.add_split(split, queries, {id: [id] for id in members})
    return corpus


def words(identifier: str) -> str:
    """``"readHTTPHeader_fast"`` → ``"read HTTP Header fast"``."""
    return " ".join(re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+", identifier)) or identifier


def answer(
    model: SentenceTransformer, corpus: Corpus, functions: list[Function], questions: list[str], folder: Path
) -> None:
    """Print the first functions found for each question."""
    cache = EmbeddingCache.build(model, corpus, folder, progress=False)
    search = CorrectedSearch(cache, IdentityCorrector(cache.dim))
    scores, rows, _ = search.search(model.encode_query(questions, convert_to_tensor=True), k=3)
    for question, question_scores, question_rows in zip(questions, scores.tolist(), rows.tolist(), strict=True):
        print(f"\n{question}")
        for score, row in zip(question_scores, question_rows, strict=True):
            print(f"  {score:.2f}  {functions[row].name}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("questions", nargs="*", default=list(QUESTIONS), help="what to look for after training")
    parser.add_argument("--model", help="Hub id or folder of the model whose token vectors are the start")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--learning_rate", type=float, default=1e-3)
    parser.add_argument("--num_negatives", type=int, default=16)
    parser.add_argument("--corrector", default="mlp")
    parser.add_argument("--packages", nargs="+", help="top-level packages to search; by default all that are installed")
    parser.add_argument("--limit", type=int, default=20_000, help="at most N functions, a fixed random choice")
    parser.add_argument("--train", type=int, default=3_000, help="docstrings that are trained on")
    parser.add_argument("--dev", type=int, default=1_000, help="docstrings that are held out")
    parser.add_argument("--own_pairs_share", type=float, default=0.36, help="of every batch, where there are own pairs")
    parser.add_argument(
        "--no_teacher", action="store_true", help="leave out the run with a teacher, which takes longest"
    )
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    started = time.perf_counter()
    functions = functions_in(map(Path, site.getsitepackages()), args.packages, args.limit)
    if len(functions) <= args.dev:
        parser.error(f"{len(functions)} documented functions found in {args.packages or 'the environment'}: too few")
    corpus = code_corpus(functions, args.train, args.dev)
    print(f"{corpus}, collected in {time.perf_counter() - started:.0f} s")
    evaluator = CorpusRetrievalEvaluator(corpus, "dev")
    rows, before = {}, None
    with tempfile.TemporaryDirectory() as folder:
        for name, strategy, share, is_taught in RUNS[: len(RUNS) - args.no_teacher]:
            set_seed(args.seed)
            model = static_encoder(args.model or default_model(), args.seed)
            teacher = SentenceTransformer(args.model or default_model()) if is_taught else None
            if teacher is not None:
                teacher.max_seq_length = _TEACHER_TOKENS
            training = CorrectorTrainingArguments(
                output_dir=str(Path(folder) / name),
                max_steps=args.steps,
                per_device_train_batch_size=args.batch_size,
                learning_rate=args.learning_rate,
                warmup_steps=0.1,
                batch_sampler=BatchSamplers.NO_DUPLICATES,
                corrector=args.corrector,
                num_negatives=args.num_negatives,
                write_back=strategy == "corrected",
                own_pairs_share=args.own_pairs_share if share else 0.0,
                seed=args.seed,
                logging_steps=50,
                save_strategy="no",
                report_to="none",
                disable_tqdm=not sys.stderr.isatty(),
                dataloader_pin_memory=torch.cuda.is_available(),
            )
            print(f"\nTraining with {name} …", flush=True)
            results = train(
                model,
                corpus,
                training,
                strategy,
                Path(folder) / "cache",
                teacher=teacher,
                evaluator=evaluator,
                before=before,
            )
            before = results["before"]
            rows |= {"before": before, name: results["after"]}
            print(f"{results['seconds']['train']:.0f} s, {results['targets_encoded']:,} targets encoded")
        print(f"\nHeld-out docstrings, all {len(corpus):,} functions and classes searched:\n\n{table(rows, METRICS)}")
        answer(model, corpus, functions, args.questions, Path(folder) / "answers")
    print(f"\n{time.perf_counter() - started:.0f} s in all")


if __name__ == "__main__":
    main()
