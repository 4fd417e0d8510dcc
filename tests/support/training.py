"""One training run of the tests, by however many processes a launcher starts; see ``--help``.

It says in ``results.pt`` what each step selected and lost, and what was learnt in the end.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # it is started as a script, too
from conftest import load_bert_model, make_bert_model, make_static_model, make_texts, router_of
from datasets import Dataset, disable_progress_bars
from sentence_transformers import CrossEncoder, SentenceTransformer
from sentence_transformers.sentence_transformer.losses import MatryoshkaLoss
from transformers import TrainerCallback

from st_corrector import (
    Corpus,
    CorpusRetrievalEvaluator,
    CorrectedMultipleNegativesLoss,
    CorrectionSettings,
    CorrectorTrainer,
    CorrectorTrainingArguments,
    CrossEncoderTeacher,
    EmbeddingCache,
    EmbeddingTeacher,
    MLPCorrector,
    RidgeCorrector,
    Shortlist,
    TeacherCheck,
)
from st_corrector.cache.folder import CacheFolder
from st_corrector.runtime.distributed import Processes
from st_corrector.training.plan import training_pairs

CASES: dict[str, dict] = {
    "mlp": {"corrector_settings": {"hidden": 16}},
    "ridge, gumbel, int8": {"corrector": "ridge", "sampler": "gumbel", "cache_dtype": "int8"},
    "uniform, stale warm-up": {"sampler": "uniform", "corrector_warmup_steps": 5, "cache_on_device": True},
    "verified, with background and margin": {"candidates": 12, "background_targets": 7, "relative_margin": 0.02},
    "in-batch warm-up": {"corrector_warmup_steps": 3, "corrector_warmup_negatives": "in-batch"},
    "in-batch": {"num_negatives": 0},
    "refreshed": {"refresh_every": 4, "corrector": "identity"},
    "shortlist": {"corrector": "ridge"},
    "gradient cache": {"mini_batch_size": 3},
    "accumulated": {"gradient_accumulation_steps": 2},
    "evaluated": {"eval_strategy": "steps", "eval_steps": 5},
    "Matryoshka": {},
    "two towers": {"router_mapping": {"anchor": "query", "positive": "document"}},
    "frozen documents": {"router_mapping": {"anchor": "query", "positive": "document"}},
    "two towers, gradient cache": {
        "router_mapping": {"anchor": "query", "positive": "document"},
        "mini_batch_size": 3,
    },
    "adapters": {},
    "a query that breaks the encoder": {"non_finite": "skip"},
    "taught, accumulated": {"gradient_accumulation_steps": 2},
    "taught, adapters": {"teacher_weight": 2.0, "teacher_scale": 12.0},
    "taught by margins, gradient cache": {
        **{"distillation_loss": "margin-mse", "teacher_weight": 0.5, "teacher_scale": 12.0, "mini_batch_size": 3},
    },
    "taught and checked by a cross-encoder": {
        **{"share_negatives": False, "in_batch_negatives": False, "teacher_weight": 1.0, "teacher_scale": 20.0},
    },
    "judged: a cross-encoder": {"share_negatives": False, "in_batch_negatives": False},
    "negatives of one's own": {"num_negatives": 3},
    "a corpus that has grown": {},
    "several data sets": {"multi_dataset_batch_sampler": "round_robin"},
    "several corpora": {"multi_dataset_batch_sampler": "round_robin"},
    "own pairs, taught": {"own_pairs_share": 0.25, "teacher_weight": 1.0, "teacher_scale": 12.0},
}
TRANSFORMERS = (
    "gradient cache",
    "two towers, gradient cache",
    "adapters",
    "taught by margins, gradient cache",
    "taught, adapters",
)
"""Cases whose encoders are transformers; the others' are static."""


class KillAt(TrainerCallback):
    """Kills this process, as nothing can prevent, in the middle of a step."""

    def __init__(self, step: int, rank: int | None) -> None:
        self.step, self.rank = step, rank

    def on_pre_optimizer_step(self, args, state, control, **kwargs) -> None:
        if state.global_step == self.step and self.rank in (None, args.process_index):
            os.kill(os.getpid(), signal.SIGKILL)


class SayStep(TrainerCallback):
    """Writes to a file how many steps have been taken, for who waits for that."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def on_step_end(self, args, state, control, **kwargs) -> None:
        self.file.write_text(str(state.global_step))


class BeganAt(TrainerCallback):
    """Notes how many steps had been taken when this run took its first."""

    step: int | None = None

    def on_step_begin(self, args, state, control, **kwargs) -> None:
        if self.step is None:
            self.step = state.global_step


def build(folder: Path, case: str, args: argparse.Namespace) -> CorrectorTrainer:
    queries, texts = make_texts(203)
    if case == "a query that breaks the encoder":
        queries[7] += " passage"  # see encoder()
    titles = [text.split()[0] for text in texts] if "own_pairs_share" in CASES[case] else [None] * len(texts)
    # Two rows with the same words score the same: a tie.
    corpus = Corpus.from_texts([*texts, *texts[:20]], titles=[*titles, *titles[:20]])
    ids = [str(n) for n in range(100 if "own_pairs_share" in CASES[case] else len(texts))]
    corpus.add_split("train", dict(zip(ids, queries, strict=False)), {id: [id] for id in ids})
    model, loss = encoder(folder, case), None
    if case == "a corpus that has grown":
        EmbeddingCache.build(model, corpus, folder / "cache", shard_size=3, progress=False)
        if Processes.current().rank == 1:  # who looks later must not find less to do
            missing = CacheFolder.missing
            CacheFolder.missing = lambda self, described: time.sleep(1) or missing(self, described)
        changed = ["passage " + texts[n] for n in range(0, 40, 3)]
        corpus = corpus.extend(changed, range(0, 40, 3), withdrawn=range(100, 200, 3))
        EmbeddingCache.extend(model, corpus, folder / "cache", progress=False)
    transformer = case in TRANSFORMERS
    training = CorrectorTrainingArguments(
        output_dir=str(folder / "out"),
        **{"num_negatives": 5, "corrector": "mlp", "dataloader_drop_last": True, **CASES[case]},
        cache_path=str(folder / "cache"),
        per_device_train_batch_size=args.batch_size // int(os.environ.get("WORLD_SIZE", 1)),
        max_steps=args.steps,
        learning_rate=5e-3 if "adapters" in case else 1e-3 if transformer else 0.02,
        lr_scheduler_type="constant",
        logging_steps=1,
        save_strategy="steps" if args.save_every else "no",
        save_steps=args.save_every or 500,
        report_to="none",
        disable_tqdm=True,
        # A GPU is hidden from all tests but those for it; accelerate's variable stands for another device.
        use_cpu=not torch.cuda.is_available() and "ACCELERATE_TORCH_DEVICE" not in os.environ,
        bf16=args.bf16,
        dataloader_pin_memory=torch.cuda.is_available(),
        ddp_backend=os.environ.get("DDP_BACKEND"),
        ddp_find_unused_parameters=True,
        seed=3,
    )
    if case in ("shortlist", "Matryoshka"):
        cache = EmbeddingCache.build(model, corpus, folder / "cache", progress=False)
        correction = {
            "shortlist": CorrectionSettings(
                RidgeCorrector(cache.dim, normalize=False), shortlist=Shortlist("Flat", size=30, check_every=4)
            ),
            "Matryoshka": CorrectionSettings(MLPCorrector(cache.dim, hidden=16)),
        }[case]
        loss = CorrectedMultipleNegativesLoss(model, corpus, cache, 5, correction=correction)
        if case == "Matryoshka":
            loss = MatryoshkaLoss(model, loss, [24, 8])
    callbacks: list[TrainerCallback] = [SayStep(folder / "step")]
    if args.kill_at is not None:
        callbacks.append(KillAt(args.kill_at, args.kill_rank))
    watched: dict[str, Any] = {"callbacks": callbacks}
    if case == "evaluated":
        watched["evaluator"] = CorpusRetrievalEvaluator(corpus, "train")
    if "cross-encoder" in case:
        # What a teacher is judged by is asked first.
        reader = cross_encoder(folder, args.teacher_fails_on, at=0 if case.startswith("judged") else 2)
        watched["teacher"] = CrossEncoderTeacher(reader, corpus, folder / "scores.sqlite")
        if "checked" in case:
            watched["checks"] = [TeacherCheck(watched["teacher"])]
    elif "taught" in case:
        pairs = [corpus.pairs("train")]
        if training.own_pairs_share:
            watched["train_dataset"] = training_pairs(corpus, training)
            pairs.append(watched["train_dataset"])
        watched["teacher"] = EmbeddingTeacher.build(make_static_model(7), corpus, folder / "teacher", pairs)
    if case == "negatives of one's own":
        # Known ones, repeated ones, and ones that are chosen besides are among them.
        rows = [[str((n + step) % 203) for step in (40, 90, 40)][: 1 + n % 3] for n in range(len(ids))]
        labels = corpus.labels(ids, queries, rows)
        watched["train_dataset"] = Dataset.from_dict({"anchor": queries, "positive": texts, "label": labels})
    if case == "several data sets":
        pairs = corpus.pairs("train")
        watched["train_dataset"] = {"a": pairs.select(range(120)), "b": pairs.select(range(120, 203))}
    if case == "several corpora":
        other = Corpus.from_texts(texts[::-1])
        other.add_split("train", dict(zip(ids, queries, strict=False)), {id: [str(202 - int(id))] for id in ids})
        corpora = {"a": corpus, "b": other}
        watched["train_dataset"] = {name: each.pairs("train") for name, each in corpora.items()}
        loss = {
            name: CorrectedMultipleNegativesLoss(
                model, each, EmbeddingCache.build(model, each, folder / f"cache-{name}", progress=False), 5, "mlp"
            )
            for name, each in corpora.items()
        }
    return CorrectorTrainer(model, training, corpus=corpus, loss=loss, **watched)


def cross_encoder(folder: Path, fails_on: int | None, at: int) -> CrossEncoder:
    """A small one with random weights, the same in every process.

    Args:
        fails_on: the rank of the process in which it cannot score a batch.
        at: which batch, from 0.
    """
    processes = Processes.current()
    if processes.rank == 0:
        make_bert_model(folder)
        torch.manual_seed(0)
        CrossEncoder(str(folder / "bert-right"), num_labels=1).save_pretrained(str(folder / "cross-encoder"))
    processes.wait()
    model = CrossEncoder(str(folder / "cross-encoder"), num_labels=1)
    if fails_on == processes.rank:
        predict, calls = model.predict, iter(range(10**6))
        model.predict = lambda pairs, **how: predict(pairs, **how) * (torch.nan if next(calls) == at else 1.0)
    return model


def encoder(folder: Path, case: str) -> SentenceTransformer:
    """A case's encoder, the same in every process."""
    if case not in TRANSFORMERS:
        if "router_mapping" not in CASES[case]:
            model = make_static_model()
            if case == "a query that breaks the encoder":
                with torch.no_grad():
                    model[0].embedding.weight[model.tokenizer.token_to_id("passage")] = torch.inf
            return model
        model = router_of(make_static_model(), make_static_model())
        model[0].sub_modules["document"].requires_grad_(case != "frozen documents")
        return model
    processes = Processes.current()
    if processes.rank == 0:
        make_bert_model(folder)
    processes.wait()
    model = load_bert_model(folder / "bert-right")
    if "router_mapping" in CASES[case]:
        model = router_of(model, load_bert_model(folder / "bert-right"))
    if "adapters" in case:
        from peft import LoraConfig, TaskType

        torch.manual_seed(0)
        model.add_adapter(LoraConfig(task_type=TaskType.FEATURE_EXTRACTION, r=8, lora_alpha=32, lora_dropout=0.0))
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0  # processes draw masks of their own
    return model


def run(folder: Path, case: str, args: argparse.Namespace) -> None:
    trainer = build(folder, case, args)
    loss, *others = trainer._corrected_losses().values()
    selected = []

    def recording(select, *inputs, **settings):
        selection = select(*inputs, **settings)
        selected.append(selection.rows)
        return selection

    for each in (loss, *others):
        each.select = partial(recording, each.select)
    before = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    began = BeganAt()
    trainer.add_callback(began)
    trainer.train(resume_from_checkpoint=args.resume)
    search = loss.corrected.search if loss.has_corrected else None
    results = {
        "began_at": began.step,
        "device": trainer.model.device.type,
        "selected": selected,
        "log": [entry for entry in trainer.state.log_history if "task_loss" in entry],
        "evaluations": [
            {name: value for name, value in entry.items() if "@" in name}
            for entry in trainer.state.log_history
            if any("@" in name for name in entry)
        ],
        "before": before,
        "model": trainer.model.state_dict(),
        "corrector": {
            f"{number}.{name}": value
            for number, each in enumerate((loss, *others) if search else ())
            for name, value in each.corrected.corrector.state_dict().items()
        },
        "overlay": search.overlay.state_dict() if search else {},
        "steps": search.steps if search else 0,
        "rows": (search.cache.first_row, search.cache.end) if search else (0, 0),
        "targets_encoded": loss.targets_encoded,
        "skipped": trainer.guard.steps_skipped,
    }
    torch.save(results, folder / f"results-{args.name}-{loss.processes.rank}-of-{loss.processes.size}.pt")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--cases", type=json.loads, default=list(CASES))
    parser.add_argument("--name", default="run")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--batch_size", type=int, default=16, help="of all processes together")
    parser.add_argument("--save_every", type=int)
    parser.add_argument("--kill_at", type=int)
    parser.add_argument("--kill_rank", type=int, help="by default all are killed")
    parser.add_argument("--teacher_fails_on", type=int, help="a rank")
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--bf16", action="store_true", help="encode in bfloat16, by autocast")
    args = parser.parse_args()
    disable_progress_bars()
    torch.set_num_threads(1)
    for number, case in enumerate(args.cases):
        run(args.folder / str(number), case, args)
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
