"""Train a retriever on Natural Questions (or any data set in BEIR's layout) and evaluate it on the whole corpus.

    accelerate launch recipes/train_nq.py                                # the Hub's natural-questions, on what is there
    python recipes/train_nq.py --dataset data/nq --encoder static        # a BEIR folder, minutes on a CPU
    python recipes/train_nq.py --dataset data/nq --strategy exhaustive   # the dear baseline

All of sentence-transformers' training arguments are understood; those of this recipe come first in --help.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import shlex
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
from common import STRATEGIES, Strategy, default_model, static_encoder, table, train
from datasets import load_dataset
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainingArguments
from sentence_transformers.sentence_transformer.training_args import BatchSamplers
from transformers import HfArgumentParser, set_seed

from st_corrector import AnswerCheck, Corpus, CorpusRetrievalEvaluator, FalseNegativeFilter, StCorrectorError
from st_corrector.correctors import CORRECTORS

METRICS = ("mrr@10", "ndcg@10", "recall@1", "recall@5", "recall@20", "recall@100", "answer_recall@20")
# What suits each kind of encoder; everything can be given on the command line.
DEFAULTS = {
    "transformer": {"learning_rate": 2e-5, "per_device_train_batch_size": 32},
    "static": {"learning_rate": 1e-3, "per_device_train_batch_size": 64, "max_steps": 150},
}


# What only strategies that choose negatives while training look at.
SELECTION_OPTIONS = {
    *("write_back", "sampler", "budget", "share_negatives", "candidates", "background_targets", "probe_every"),
    *("max_score", "absolute_margin", "relative_margin", "range_min", "range_max", "answer_check"),
}


@dataclass
class RecipeArguments:
    """What is trained on what, and how its negatives are chosen."""

    dataset: str = field(
        default="sentence-transformers/natural-questions",
        metadata={
            "help": "A BEIR folder, or the Hub id of a data set of (query, answer) pairs: its answers are the corpus."
        },
    )
    model: str | None = field(
        default=None, metadata={"help": "Hub id or folder of the model to start from; by default all-MiniLM-L6-v2."}
    )
    encoder: Literal["transformer", "static"] = field(
        default="transformer",
        metadata={"help": "static: the mean of the model's token vectors and a residual dense block, for the CPU."},
    )
    from_scratch: bool = field(default=False, metadata={"help": "Initialise the transformer's weights at random."})
    num_layers: int | None = field(
        default=None, metadata={"help": "Keep only the first layers of a BERT: a smaller model, with more to learn."}
    )
    strategy: str = field(default="corrected", metadata={"help": f"{STRATEGIES}."})
    corrector: str = field(default="mlp", metadata={"help": f"With --strategy corrected: {', '.join(CORRECTORS)}."})
    corrector_settings: str = field(
        default="{}", metadata={"help": "The corrector's settings as JSON, e.g. '{\"hidden\": 128}'."}
    )
    write_back: bool | None = field(
        default=None,
        metadata={
            "help": "Let freshly encoded targets stand for their stale embeddings from then on; by default only with "
            "--strategy corrected."
        },
    )
    num_negatives: int = field(default=16, metadata={"help": "Targets that each query takes as negatives."})
    sampler: Literal["top_k", "gumbel", "mixed", "uniform"] = field(
        default="top_k",
        metadata={"help": "The hardest, a sample from the corrected softmax, half and half, or from all alike."},
    )
    budget: Literal["query", "batch"] = field(
        default="query", metadata={"help": "Whether num_negatives are every query's, or the batch's to share out."}
    )
    share_negatives: bool = field(
        default=True, metadata={"help": "Whether every query sees the targets taken by the others of its batch."}
    )
    candidates: int | None = field(
        default=None, metadata={"help": "Verify so many targets for each query by encoding them, and keep the hardest."}
    )
    max_score: float | None = field(default=None, metadata={"help": "No negative may score higher."})
    absolute_margin: float | None = field(
        default=None, metadata={"help": "Negatives score at least so much less than the positive."}
    )
    relative_margin: float | None = field(
        default=None, metadata={"help": "Negatives score at most (1 - relative_margin) times what the positive does."}
    )
    range_min: int = field(default=0, metadata={"help": "Leave out so many of the hardest targets."})
    range_max: int | None = field(default=None, metadata={"help": "Take negatives from so many of the hardest."})
    answer_check: bool = field(
        default=False, metadata={"help": "No target that contains one of the question's answers is a negative."}
    )
    background_targets: int = field(
        default=0, metadata={"help": "Random targets encoded at each step for the corrector alone."}
    )
    probe_every: int = field(default=0, metadata={"help": "Measure the selection's fidelity every so many steps."})
    probe_targets: int | None = field(
        default=4096, metadata={"help": "Targets of the corpus among which fidelity is measured."}
    )
    scale: float = field(default=20.0, metadata={"help": "Inverse temperature of the softmax."})
    max_targets: int | None = field(
        default=None, metadata={"help": "Keep the first so many passages of a BEIR folder."}
    )
    eval_queries: int = field(default=2000, metadata={"help": "Pairs of a Hub data set that are held out as dev."})
    max_seq_length: int | None = field(
        default=None, metadata={"help": "Longest text in tokens; the model's by default."}
    )
    caches: str = field(default="outputs/caches", metadata={"help": "Where embedding caches are kept between runs."})
    results: str | None = field(
        default=None, metadata={"help": "Where results.json goes; by default into --output_dir."}
    )


def load_corpus(args: RecipeArguments) -> Corpus:
    """The BEIR folder or the Hub data set that --dataset names."""
    if Path(args.dataset).is_dir():
        return Corpus.from_beir(args.dataset, max_targets=args.max_targets)
    pairs = load_dataset(args.dataset, split="train").train_test_split(args.eval_queries, seed=0)
    query, answer = pairs["train"].column_names[:2]
    return Corpus.from_pairs({"train": pairs["train"], "dev": pairs["test"]}, query=query, positive=answer)


def load_model(args: RecipeArguments, seed: int) -> SentenceTransformer:
    name = args.model or default_model()
    model = static_encoder(name, seed) if args.encoder == "static" else SentenceTransformer(name)
    if args.num_layers:
        transformer = model.transformers_model
        transformer.encoder.layer = transformer.encoder.layer[: args.num_layers]
        transformer.config.num_hidden_layers = len(transformer.encoder.layer)
    if args.from_scratch:
        pretrained = model.transformers_model
        pretrained.load_state_dict(type(pretrained)(pretrained.config).state_dict())
    if args.max_seq_length:
        model.max_seq_length = args.max_seq_length
    return model


class _Help(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    """The description as it stands above, and every default."""


def parse_arguments() -> tuple[RecipeArguments, SentenceTransformerTrainingArguments]:
    parser = HfArgumentParser(
        [RecipeArguments, SentenceTransformerTrainingArguments],
        description=__doc__,
        formatter_class=_Help,
        usage="train_nq.py [options]",
    )
    # Which encoder it is decides over defaults, those in --help too.
    first = argparse.ArgumentParser(add_help=False)
    first.add_argument("--encoder", default=RecipeArguments.encoder)
    encoder = first.parse_known_args()[0].encoder
    parser.set_defaults(
        batch_sampler=BatchSamplers.NO_DUPLICATES,
        save_strategy="no",
        logging_steps=10,
        report_to="none",
        warmup_steps=0.1,
        num_train_epochs=1,
        dataloader_pin_memory=torch.cuda.is_available(),
        **DEFAULTS.get(encoder, {}),
    )
    recipe, training = parser.parse_args_into_dataclasses()
    try:
        strategy = Strategy.parse(recipe.strategy)
        json.loads(recipe.corrector_settings)
    except (argparse.ArgumentTypeError, ValueError) as error:
        parser.error(str(error))
    if recipe.corrector not in CORRECTORS:
        parser.error(f"--corrector {recipe.corrector!r} is not one of {', '.join(CORRECTORS)}")
    if recipe.from_scratch and recipe.encoder == "static":
        parser.error("--from_scratch is for transformers: the static encoder is made of pretrained token vectors")
    if recipe.num_layers is not None and (recipe.encoder == "static" or recipe.num_layers < 1):
        parser.error("--num_layers is how many layers of a transformer are kept: at least 1, and not with static")
    if not strategy.chooses:
        unused = [field for field in dataclasses.fields(recipe) if field.name in SELECTION_OPTIONS]
        given = [f"--{field.name}" for field in unused if getattr(recipe, field.name) != field.default]
        if given:
            parser.error(
                f"--strategy {recipe.strategy} chooses nothing from the corpus while training: leave out "
                f"{', '.join(given)}"
            )
    if training.world_size > 1 and strategy.chooses:
        parser.error(f"{training.world_size} processes are not supported yet: accelerate launch --num_processes 1")
    if recipe.dataset.startswith((".", "/")) and not Path(recipe.dataset).is_dir():
        parser.error(f"--dataset {recipe.dataset}: there is no such folder")
    if training.output_dir in (None, "trainer_output"):  # transformers' own default
        parts = [recipe.strategy.replace(":", "-"), recipe.corrector if strategy.name == "corrected" else None]
        if recipe.write_back is not None:
            parts.append("write-back" if recipe.write_back else "no-write-back")
        training.output_dir = str(Path("outputs/train_nq") / "-".join(part for part in parts if part))
    return recipe, training


def main() -> None:
    try:
        run(*parse_arguments())
    except StCorrectorError as error:
        raise SystemExit(f"error: {error}") from error


def run(recipe: RecipeArguments, training: SentenceTransformerTrainingArguments) -> None:
    set_seed(training.seed)
    strategy = Strategy.parse(recipe.strategy)
    corpus = load_corpus(recipe)
    model = load_model(recipe, training.seed)
    print(corpus)
    output = Path(training.output_dir)
    results = train(
        model,
        corpus,
        training,
        recipe.strategy,
        recipe.caches,
        corrector=recipe.corrector,
        corrector_settings=json.loads(recipe.corrector_settings),
        write_back=strategy.name == "corrected" if recipe.write_back is None else recipe.write_back,
        num_negatives=recipe.num_negatives,
        sampler=recipe.sampler,
        budget=recipe.budget,
        share_negatives=recipe.share_negatives,
        candidates=recipe.candidates,
        background_targets=recipe.background_targets,
        false_negatives=FalseNegativeFilter(
            recipe.max_score,
            recipe.absolute_margin,
            recipe.relative_margin,
            recipe.range_min,
            recipe.range_max,
            (AnswerCheck(corpus, "train"),) if recipe.answer_check else (),
        ),
        probe_every=recipe.probe_every,
        probe_targets=recipe.probe_targets,
        scale=recipe.scale,
        evaluator=CorpusRetrievalEvaluator(corpus, "dev", show_progress_bar=not training.disable_tqdm),
    )
    results["args"] = dataclasses.asdict(recipe) | {
        name: getattr(training, name) for name in ("max_steps", "learning_rate", "per_device_train_batch_size", "seed")
    }
    results["command"] = shlex.join(["python", *sys.argv])
    print(table({"before": results["before"], f"after ({recipe.strategy})": results["after"]}, METRICS))
    model.save_pretrained(str(output / "final"))
    path = Path(recipe.results or output / "results.json")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    print(f"Model in {output / 'final'}, figures in {path}.")


if __name__ == "__main__":
    main()
