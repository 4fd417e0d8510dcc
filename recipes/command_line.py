"""The command line of the recipes that train a retriever: they differ in their data and defaults alone."""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import shlex
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from common import STRATEGIES, Strategy, default_model, static_encoder, table, train
from data import DEV, HELD_OUT, DataArguments, load_corpus
from rivals import MINED_BY
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainingArguments
from sentence_transformers.sentence_transformer.training_args import BatchSamplers
from transformers import HfArgumentParser, set_seed

from st_corrector import (
    AnswerCheck,
    CorpusRetrievalEvaluator,
    CorrectorTrainingArguments,
    InputError,
    StCorrectorError,
)
from st_corrector.storage.files import whole

METRICS = ("mrr@10", "ndcg@10", "recall@1", "recall@5", "recall@20", "recall@100", "answer_recall@20")
# What suits each kind of encoder; everything can be given on the command line.
DEFAULTS = {
    "transformer": {"learning_rate": 2e-5, "per_device_train_batch_size": 32},
    "static": {"learning_rate": 1e-3, "per_device_train_batch_size": 64, "max_steps": 150},
}
INHERITED = {option.name for option in dataclasses.fields(SentenceTransformerTrainingArguments)}
# How negatives are chosen; and what of that every strategy may be given: what it looks at, and how a cache is held.
OPTIONS = [option for option in dataclasses.fields(CorrectorTrainingArguments) if option.name not in INHERITED]
FOR_ALL = {
    *("num_negatives", "scale", "corrector", "corrector_settings", "train_split"),
    *("cache_batch_size", "cache_dtype", "cache_on_device", "own_pairs_share", "own_question"),
    *("distillation_loss", "teacher_weight", "teacher_scale"),
}
# The strategy decides over these.
NOT_HERE = ("refresh_every", "cache_path", "train_split")


@dataclass
class RecipeArguments(DataArguments):
    """What is trained on what, and how its negatives are chosen."""

    model: str | None = field(
        default=None, metadata={"help": "Hub id or folder of the model to start from; by default all-MiniLM-L6-v2."}
    )
    model_revision: str | None = field(
        default=None, metadata={"help": "Commit, branch or tag of the model on the Hub, to have the same one again."}
    )
    encoder: Literal["transformer", "static"] = field(
        default="transformer",
        metadata={"help": "static: the mean of the model's token vectors and a residual dense block, for the CPU."},
    )
    from_scratch: bool = field(default=False, metadata={"help": "Initialise the transformer's weights at random."})
    lora_r: int | None = field(
        default=None,
        metadata={"help": "Train a LoRA adapter of this rank instead of the model's weights (needs peft)."},
    )
    lora_alpha: int = field(default=32, metadata={"help": "The adapter's scale is lora_alpha / lora_r."})
    lora_dropout: float = field(default=0.0, metadata={"help": "Dropout before the adapter."})
    lora_target_modules: str | None = field(
        default=None,
        metadata={
            "help": "Names of the layers that get one, with commas, or all-linear; by default the model's usual."
        },
    )
    num_layers: int | None = field(
        default=None, metadata={"help": "Keep only the first layers of a BERT: a smaller model, with more to learn."}
    )
    strategy: str = field(default="corrected", metadata={"help": f"{STRATEGIES}."})
    answer_check: bool = field(
        default=False, metadata={"help": "No target that contains one of the question's answers is a negative."}
    )
    ignore_identical_ids: bool = field(
        default=False,
        metadata={"help": "Evaluate without the target that has the query's id, where queries are targets (as BEIR)."},
    )
    test_split: str | None = field(default=None, metadata={"help": "Evaluate the trained model on this split, too."})
    max_seq_length: int | None = field(
        default=None, metadata={"help": "Longest text in tokens; the model's by default."}
    )
    teacher_model: str | None = field(
        default=None,
        metadata={
            "help": "Hub id or folder of an embedder whose similarities are soft labels: it embeds all once. "
            "default: all-MiniLM-L6-v2."
        },
    )
    teacher_max_seq_length: int | None = field(
        default=None, metadata={"help": "Longest text of the teacher in tokens; the teacher's by default."}
    )
    caches: str = field(default="outputs/caches", metadata={"help": "Where embedding caches are kept between runs."})
    results: str | None = field(
        default=None, metadata={"help": "Where results.json goes; by default into --output_dir."}
    )


def load_model(args: RecipeArguments, seed: int) -> SentenceTransformer:
    name = args.model or default_model()
    if args.encoder == "static":
        model = static_encoder(name, seed, args.model_revision)
    else:
        # As published they may be in bfloat16, in which most updates of what is trained are rounded away.
        how = {} if args.lora_r else {"model_kwargs": {"dtype": "float32"}}
        model = SentenceTransformer(name, revision=args.model_revision, **how)
    if args.num_layers:
        transformer = model.transformers_model
        transformer.encoder.layer = transformer.encoder.layer[: args.num_layers]
        transformer.config.num_hidden_layers = len(transformer.encoder.layer)
    if args.from_scratch:
        pretrained = model.transformers_model
        pretrained.load_state_dict(type(pretrained)(pretrained.config).state_dict())
    if args.max_seq_length:
        model.max_seq_length = args.max_seq_length
    if args.lora_r:
        try:
            from peft import LoraConfig, TaskType
        except ImportError as error:
            raise InputError("--lora_r needs peft: pip install 'st-corrector[peft]'") from error
        adapter = LoraConfig(
            task_type=TaskType.FEATURE_EXTRACTION,
            r=args.lora_r,
            lora_alpha=args.lora_alpha,
            lora_dropout=args.lora_dropout,
            target_modules=_layers(args.lora_target_modules),
        )
        model.add_adapter(adapter)
        # Not of modules behind the transformer, which take what it says as it is.
        for parameter in model.transformers_model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()
    return model


def _layers(named: str | None) -> str | list[str] | None:
    return named.split(",") if named and named != "all-linear" else named


def load_teacher(args: RecipeArguments) -> SentenceTransformer | None:
    if args.teacher_model is None:
        return None
    teacher = SentenceTransformer(default_model() if args.teacher_model == "default" else args.teacher_model)
    if args.teacher_max_seq_length:
        teacher.max_seq_length = args.teacher_max_seq_length
    return teacher


class _Help(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    """The description as it stands above, and every default."""


def parse_arguments(
    name: str, description: str, dataset: str, **defaults: Any
) -> tuple[RecipeArguments, CorrectorTrainingArguments]:
    """The arguments of the command line; what is wrong with them ends the process, as argparse does it.

    Args:
        name: the recipe's, for its usage and its output folder.
        dataset: what it trains on where --dataset is not given.
        defaults: further defaults of its own, by argument.
    """
    parser = HfArgumentParser(
        [RecipeArguments, CorrectorTrainingArguments],
        description=description,
        formatter_class=_Help,
        usage=f"{name}.py [options]",
    )
    # Which encoder and strategy it is decides over defaults, those in --help too.
    first = argparse.ArgumentParser(add_help=False)
    first.add_argument("--encoder", default=RecipeArguments.encoder)
    first.add_argument("--strategy", default=RecipeArguments.strategy)
    early = first.parse_known_args()[0]
    parser.set_defaults(
        dataset=dataset,
        batch_sampler=BatchSamplers.NO_DUPLICATES,
        save_strategy="no",
        logging_steps=10,
        report_to="none",
        warmup_steps=0.1,
        num_train_epochs=1,
        dataloader_pin_memory=torch.cuda.is_available(),
        write_back=early.strategy == "corrected",
        **DEFAULTS.get(early.encoder, {}),
        **defaults,
    )
    try:
        recipe, training = parser.parse_args_into_dataclasses()
        strategy = Strategy.parse(recipe.strategy)
    except (argparse.ArgumentTypeError, InputError) as error:
        parser.error(str(error))
    if recipe.from_scratch and recipe.encoder == "static":
        parser.error("--from_scratch is for transformers: the static encoder is made of pretrained token vectors")
    if recipe.max_seq_length is not None and recipe.encoder == "static":
        parser.error("--max_seq_length is for transformers: the static encoder takes the mean of all tokens of a text")
    if recipe.lora_r is not None and (recipe.encoder == "static" or recipe.lora_r < 1):
        parser.error("--lora_r is the rank of a transformer's adapter: at least 1, and not with static")
    _check_teacher(parser, recipe, training, strategy)
    if recipe.num_layers is not None and (recipe.encoder == "static" or recipe.num_layers < 1):
        parser.error("--num_layers is how many layers of a transformer are kept: at least 1, and not with static")
    if not strategy.chooses:
        heard = FOR_ALL | ({*MINED_BY, "range_max"} if strategy.mines else {"mini_batch_size"})
        options = {option.name: getattr(training, option.name) for option in OPTIONS if option.name not in heard}
        given = [f"--{name}" for name, value in options.items() if value != parser.get_default(name)]
        given += ["--answer_check"] * recipe.answer_check
        if given:
            parser.error(
                f"--strategy {recipe.strategy} chooses nothing from the corpus while training: leave out "
                f"{', '.join(given)}"
            )
    if misplaced := [name for name in NOT_HERE if getattr(training, name) != parser.get_default(name)]:
        parser.error(f"--{misplaced[0]} is for CorrectorTrainer: here --strategy, --caches and the data set say it")
    if recipe.dataset.startswith((".", "/")) and not Path(recipe.dataset).exists():
        parser.error(f"--dataset {recipe.dataset}: there is no such folder or file")
    if training.output_dir in (None, "trainer_output"):  # transformers' own default
        parts = [recipe.strategy.replace(":", "-")]
        if strategy.name == "corrected" and training.corrector != parser.get_default("corrector"):
            parts.append(training.corrector)
        if training.write_back != parser.get_default("write_back"):
            parts.append("write-back" if training.write_back else "no-write-back")
        training.output_dir = str(Path("outputs") / name / "-".join(parts))
    return recipe, training


def _check_teacher(
    parser: HfArgumentParser, recipe: RecipeArguments, training: CorrectorTrainingArguments, strategy: Strategy
) -> None:
    """Refuse what would have no effect, and ask for what the corpus cannot find out."""
    options = ("teacher_weight", "teacher_scale", "distillation_loss")
    given = [name for name in options if getattr(training, name) != parser.get_default(name)]
    unheard, why = [], ""
    if recipe.teacher_model is None and strategy.name in ("gist", "mined-by-teacher"):
        parser.error(f"--strategy {strategy.name} has a teacher: give --teacher_model")
    if recipe.teacher_model is None:
        unheard, why = given, "there is no --teacher_model"
    elif strategy.name == "gist":
        unheard, why = given, "the teacher is a guide here"
    elif strategy.mines:
        unheard = [name for name in given if name != "teacher_scale"]
        why = "a teacher's scores of mined tuples are learnt by DistillKLDivLoss alone"
    if unheard:
        parser.error(f"leave out {', '.join(f'--{name}' for name in unheard)}: {why}")
    needed = {"in-batch": options[:2], "mined": options[1:2]}.get(strategy.name, ())
    if recipe.teacher_model is not None and (missing := [name for name in needed if name not in given]):
        parser.error(
            f"give {' and '.join(f'--{name}' for name in missing)}: it is found out where negatives are chosen from "
            "the corpus, and here they are not"
        )


def main(name: str, description: str, dataset: str, **defaults: Any) -> None:
    """Run a recipe; see :func:`parse_arguments`."""
    try:
        run(*parse_arguments(name, description, dataset, **defaults))
    except StCorrectorError as error:
        raise SystemExit(f"error: {error}") from error


def run(recipe: RecipeArguments, training: CorrectorTrainingArguments) -> None:
    """Train, evaluate before and after, and write the model and ``results.json``."""
    set_seed(training.seed)
    corpus = load_corpus(recipe)
    print(corpus)
    model = load_model(recipe, training.seed)
    dev = next(split for split in (HELD_OUT, *DEV) if split in corpus.splits)
    output = Path(training.output_dir)
    # An adapter is saved with the name of its base, which would be another model than this one.
    final = None if recipe.lora_r and (recipe.num_layers or recipe.from_scratch) else output / "final"
    evaluator_of = functools.partial(
        CorpusRetrievalEvaluator,
        corpus,
        batch_size=training.cache_batch_size,
        show_progress_bar=not training.disable_tqdm,
        ignore_identical_ids=recipe.ignore_identical_ids,
    )
    results = train(
        model,
        corpus,
        training,
        recipe.strategy,
        recipe.caches,
        teacher=load_teacher(recipe),
        checks=[AnswerCheck(corpus, training.train_split)] if recipe.answer_check else [],
        evaluator=evaluator_of(dev),
        final=final,
        test=None if recipe.test_split is None else evaluator_of(recipe.test_split),
    )
    if not training.should_save:  # one process writes
        return
    named = [*(option.name for option in OPTIONS), "max_steps", "learning_rate", "per_device_train_batch_size", "seed"]
    results["args"] = dataclasses.asdict(recipe) | {name: getattr(training, name) for name in named}
    results["command"] = shlex.join(["python", *sys.argv])
    rows = {"before": results["before"], f"after ({recipe.strategy})": results["after"]}
    if recipe.test_split is not None:
        rows[f"after, {recipe.test_split}"] = results["test"]
    print(table(rows, METRICS))
    path = Path(recipe.results or output / "results.json")
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole(path) as partial:
        partial.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    kept = "not saved (an adapter of a base that is nowhere)" if final is None else f"in {final}"
    print(f"Model {kept}, figures in {path}.")
