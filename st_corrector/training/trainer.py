"""The sentence-transformers trainer, with what the corrected loss needs in addition: its metrics, its checkpoints."""

from __future__ import annotations

import logging
import os
import shutil
import signal
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, cast
from urllib.parse import quote

import torch
from datasets import Dataset, IterableDataset
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer
from sentence_transformers.sentence_transformer.losses import AdaptiveLayerLoss
from sentence_transformers.sentence_transformer.training_args import BatchSamplers
from torch import Tensor, nn
from torch.utils.data import BatchSampler, ConcatDataset
from transformers import TrainerCallback
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, SaveStrategy, sort_checkpoints

from ..cache.embedding_cache import EmbeddingCache
from ..correctors import Corrector, Frames, IdentityCorrector
from ..correctors.saving import FOLDER as CORRECTOR_FOLDER
from ..data.corpus import Corpus
from ..data.encoding import ONE_PROCESS_FOR_SEVERAL_GPUS, DocumentEncoder, prompt_for
from ..data.routing import QUERY
from ..errors import CheckpointError, InputError, NonFiniteError, ProcessError, StorageError
from ..losses.cached_multiple_negatives import CachedCorrectedMultipleNegativesLoss
from ..losses.checks import LAYERS
from ..losses.multiple_negatives import CorrectedMultipleNegativesLoss
from ..negatives.filters import Check
from ..reporting.model_card import CorrectorModelCardData
from ..runtime.distributed import Processes
from ..runtime.memory import describe_memory, require_memory
from ..runtime.precision import warn_of_rounded_weights
from ..storage.files import storing
from ..storage.fingerprint import digest_json
from ..teachers import Teacher
from .arguments import CorrectorTrainingArguments
from .callbacks import FidelityCallback, RefreshCallback
from .checkpoint import FOLDER, fault_of, load_losses, save_losses, seal, unseal
from .columns import prompts_by_column, require_columns, texts_in
from .guard import Guard, NonFinitePolicy
from .own_pairs import SHARE, OwnPairsBatchSampler, own_positions
from .plan import batches, corrector_for, training_pairs
from .recorder import Recorder
from .several_data_sets import JoinedBatches, SplitBatches

logger = logging.getLogger(__name__)


class CorrectorTrainer(SentenceTransformerTrainer):
    """:class:`~sentence_transformers.SentenceTransformerTrainer` with what the plain trainer cannot give a loss:

    - the metrics of :meth:`CorrectedMultipleNegativesLoss.pop_metrics` are logged next to the loss (TensorBoard,
      Weights & Biases, Trackio, the console);
    - checkpoints hold the corrector and what has been written back, so that a resumed run is the run that was not
      interrupted, and ``load_best_model_at_end`` brings back the corrector of that step;
    - checkpoints that are incomplete or damaged are recognised, and skipped when a run is resumed;
    - SIGTERM is answered with a checkpoint, unless ``save_strategy="no"``, and what is NaN or infinite ends the run
      before it has touched the weights, or costs one step: :class:`~st_corrector.training.guard.Guard`;
    - before the first step it prints what choosing negatives will take in memory, and refuses what does not fit;
    - what the model puts before queries and documents (``model.prompts``) is put before the columns of the data sets
      that a corrected loss learns from, unless the arguments have ``prompts``;
    - with ``corpus`` it makes the loss, the cache and the data set itself, as its arguments say, and where they leave
      own pairs and the corrector open, as the plan of the run says: :mod:`st_corrector.training.plan`.

    The plain trainer trains the same.

    Args:
        model, args: see :class:`~sentence_transformers.SentenceTransformerTrainer`.
        corpus: the targets. Without ``loss``, :class:`CorrectedMultipleNegativesLoss` is taken (or with
            ``mini_batch_size`` its cached twin); without ``train_dataset``, ``corpus.pairs(args.train_split)``, and
            with ``own_pairs_share`` as many of ``corpus.own_pairs()`` as the run will draw.
        checks: rules on false negatives that look at texts, e.g. ``[AnswerCheck(corpus)]``, for a loss that is made
            here.
        teacher: labels the candidates of a loss that is made here, e.g. an :class:`EmbeddingTeacher`.
        kwargs: the other arguments of :class:`~sentence_transformers.SentenceTransformerTrainer`. What the arguments
            say of negatives goes into a loss that is made here, not into one that is passed. With ``model_init``,
            :meth:`train` and every trial of a hyperparameter search begin with a new model, and so with a loss, a
            corrector and a record of their own, as the arguments are then: pass ``corpus`` alone, or a ``loss`` that
            is a function of the model.

    Raises:
        InputError: a loss is to be made without a corpus, a ready-made corrected loss is passed with ``model_init``,
            batches of a streamed training set are to be dispatched, the encoder's weights are to be cut between
            processes, or one process is to use several GPUs.
    """

    training_args_class = CorrectorTrainingArguments
    args: CorrectorTrainingArguments
    _evaluates = False  # while loaders of data sets that nothing is learnt of are made

    def __init__(
        self,
        model: SentenceTransformer | None = None,
        args: CorrectorTrainingArguments | None = None,
        *,
        corpus: Corpus | None = None,
        checks: Sequence[Check] = (),
        teacher: Teacher | None = None,
        **kwargs: Any,
    ) -> None:
        self.corpus, self.checks, self.teacher = corpus, tuple(checks), teacher
        self._loss_given = kwargs.get("loss")
        if corpus is not None and kwargs.get("train_dataset") is None:
            if args is None:
                args = CorrectorTrainingArguments(output_dir="tmp_trainer")  # as the plain trainer
            elif not isinstance(args, CorrectorTrainingArguments):
                raise InputError(
                    f"args is a {type(args).__name__}, expected CorrectorTrainingArguments, which takes the same and "
                    "says how negatives are chosen."
                )
            kwargs["train_dataset"] = training_pairs(corpus, args, teacher or _teacher_in(self._loss_given))
        if model is not None:
            model.model_card_data = CorrectorModelCardData.of(model.model_card_data)
        super().__init__(model, args, **kwargs)
        dispatched = getattr(self.args.accelerator_config, "dispatch_batches", None) is not False
        if isinstance(self.train_dataset, IterableDataset) and dispatched:
            raise InputError(
                "When accelerate dispatches batches, as it does for an IterableDataset, it cuts every tensor to as "
                "many rows as there are pairs, a static encoder's token ids too, and fails with several processes: "
                "pass accelerator_config={'dispatch_batches': False} in the arguments."
            )
        if any(
            isinstance(module, AdaptiveLayerLoss)
            for loss in filter(_is_corrected, _each(self.loss))
            for module in loss.modules()
        ):
            raise InputError(LAYERS)
        losses = self._corrected_losses()
        for data in (self.train_dataset, self.eval_dataset):
            for name, each in data.items() if isinstance(data, dict) else [("", data)]:
                if _is_corrected(self.loss.get(name) if isinstance(self.loss, dict) else self.loss):
                    require_columns(each)
        if losses and (self.is_fsdp_enabled or is_deepspeed_zero3_enabled()):
            raise InputError(
                "FSDP and DeepSpeed's ZeRO-3 cut the encoder's weights between processes, which then have to call it "
                "equally often, while each encodes its own share of targets here: use DDP, with mini_batch_size, LoRA "
                "or gradient checkpointing where memory is short."
            )
        if losses and self.args.n_gpu > 1:
            raise InputError(ONE_PROCESS_FOR_SEVERAL_GPUS)
        if self.model_init is not None and any(map(_is_corrected, _each(self._loss_given))):
            raise InputError(
                "With model_init every run begins with a new model, while the loss that was passed keeps its corrector "
                "and what it has counted: pass loss=lambda model: CorrectedMultipleNegativesLoss(model, …), or "
                "corpus=… alone."
            )
        # A collator of the user's own may have none either: what the arguments say decides.
        self._puts_prompts = self.args.prompts is None and not getattr(self.data_collator, "prompts", True)
        self.guard = Guard(cast(NonFinitePolicy, self.args.non_finite), Processes.current())
        """What has been skipped, and whether the run was told to stop."""
        self.add_callback(self.guard)
        self._of_run: list[TrainerCallback] = []
        self._begin_run(self.model)

    def _prompts(self, model: SentenceTransformer) -> dict[str, Any]:
        """The model's prompts by column; where each data set has a loss of its own, by data set and column."""
        query, losses, several = prompt_for(model, None, QUERY), self._corrected_losses(), isinstance(self.loss, dict)
        train, others = (
            {} if each is None else dict(each) if isinstance(each, dict) else {"": each}
            for each in (self.train_dataset, self.eval_dataset)
        )
        found = {
            name: prompts_by_column(
                query,
                loss.encoder.prompt,
                *([some for of, some in data.items() if of == name or not several] for data in (train, others)),
            )
            for name, loss in losses.items()
        }
        return found if several else next(iter(found.values()))

    def _query_prompt(self, name: str) -> str | None:
        """What is put before the queries that a loss learns from, with several data sets those of the first; None where
        a collator of the user's own decides.
        """
        prompts, data = getattr(self.data_collator, "prompts", None), self.train_dataset
        if isinstance(data, dict):
            of = name.partition("#")[0]  # of several losses in one wrapper the others are numbered
            of = of if of in data else next(iter(data))
            data, prompts = data[of], prompts.get(of, prompts) if isinstance(prompts, dict) else prompts
        if data is None or prompts is None or not (columns := texts_in(data)):
            return None
        return prompts if isinstance(prompts, str) else str(prompts.get(columns[0]) or "")

    def _begin_run(self, model: SentenceTransformer) -> None:
        """Make what belongs to one run: its record, and what measures or refreshes its losses."""
        for callback in self._of_run:
            self.remove_callback(callback)
        losses = self._corrected_losses()
        if losses:
            warn_of_rounded_weights(model)
            if self._puts_prompts:
                self.data_collator.prompts = self._prompts(model)
            for name, loss in losses.items():
                loss.query_prompt = self._query_prompt(name)
        self.guard.begin(cast(NonFinitePolicy, self.args.non_finite))
        self.recorder = Recorder(model, losses, self.args.example_queries)
        """Keeps the record of the run."""
        self.fidelity: FidelityCallback | None = None
        """Measures fidelity every ``probe_every`` steps."""
        self._of_run = [self.recorder] if losses else []
        if losses and isinstance(model.model_card_data, CorrectorModelCardData):
            model.model_card_data.tell_of(self.recorder.record)
        for loss in losses.values():
            args, batch_size = self.args, self.args.cache_batch_size
            if args.refresh_every is not None:
                self._of_run.append(RefreshCallback(loss, args.refresh_every, batch_size=batch_size))
            if args.probe_every is not None:
                self.fidelity = FidelityCallback(
                    loss, args.probe_every, targets=args.probe_targets, batch_size=batch_size
                )
                self._of_run.append(self.fidelity)
        for callback in self._of_run:
            self.add_callback(callback)

    def call_model_init(self, trial: Any = None) -> SentenceTransformer:
        if trial is not None:
            self._hp_search_setup(trial)  # which the plain trainer does later: the loss is made of these arguments
        model = cast(SentenceTransformer, super().call_model_init(trial))
        model.model_card_data = CorrectorModelCardData.of(model.model_card_data)
        if hasattr(self, "loss"):  # a run begins; otherwise the trainer is still being made
            given = self.get_default_loss if self._loss_given is None else self._loss_given
            made: Any = (
                {name: self._loss_of(each, model) for name, each in given.items()}
                if isinstance(given, dict)
                else self._loss_of(given, model)
            )
            self.loss = made
            self._begin_run(model)
            self._plan_memory()
        return model

    def _loss_of(self, given: Any, model: SentenceTransformer) -> nn.Module:
        """The loss of a new model: what a given function makes for it, or a given loss with it instead of the other."""
        if isinstance(given, nn.Module):
            return self.override_model_in_loss(given, model)
        return self.prepare_loss(given, model)

    def get_default_loss(self, model: SentenceTransformer) -> nn.Module:  # type: ignore[override]
        """:class:`CorrectedMultipleNegativesLoss` over :attr:`corpus`, as the arguments say.

        Raises:
            InputError: there is no corpus.
        """
        args = self.args
        if self.corpus is None:
            raise InputError("Pass a loss, or corpus=…, over which CorrectorTrainer makes one.")
        cache, correction = None, args.correction()
        if args.num_negatives:
            cache = self._cache(model, self.corpus)
            is_taught = self.teacher is not None and args.teacher_weight != 0
            planned = corrector_for(args, self.train_dataset, self.corpus, is_taught)
            correction = replace(correction, corrector=planned)
        settings: dict[str, Any] = {
            "negatives": args.negatives(self.checks),
            "correction": correction,
            "distillation": args.distillation(self.teacher),
        }
        if args.mini_batch_size is None:
            return CorrectedMultipleNegativesLoss(model, self.corpus, cache, **settings)
        return CachedCorrectedMultipleNegativesLoss(
            model, self.corpus, cache, mini_batch_size=args.mini_batch_size, **settings
        )

    def get_batch_sampler(
        self,
        dataset: Any,
        batch_size: int,
        drop_last: bool,
        valid_label_columns: list[str] | None = None,
        generator: torch.Generator | None = None,
        seed: int = 0,
    ) -> BatchSampler | None:
        """The sampler that the arguments ask for; of a training set with own pairs, their share of every batch."""
        make, share = super().get_batch_sampler, self.args.own_pairs_share
        if self._evaluates:
            return make(dataset, batch_size, drop_last, valid_label_columns, generator, seed)
        has_own = isinstance(dataset, Dataset) and len(own_positions(dataset)) > 0
        if share is None:
            share = SHARE if has_own else 0.0
        how = (batch_size, drop_last, valid_label_columns, generator, seed)
        if not share or not has_own:
            if share and dataset is self.train_dataset:
                logger.warning(
                    "own_pairs_share=%s has no effect: the data set has no own pairs (or is a stream). Without a "
                    "train_dataset, CorrectorTrainer(…, corpus=corpus) makes one; or concatenate corpus.own_pairs(…).",
                    share,
                )
            return make(dataset, *how)
        # accelerate replaces the plain sampler where it finds it, by one that a resumed run can repeat.
        make_base = None if self.args.batch_sampler == BatchSamplers.BATCH_SAMPLER else make
        return OwnPairsBatchSampler(dataset, *how, share=share, make_base=make_base)

    def get_multi_dataset_batch_sampler(
        self,
        dataset: ConcatDataset[Any],
        batch_samplers: list[BatchSampler],
        generator: torch.Generator | None = None,
        seed: int | None = 0,
    ) -> BatchSampler:
        """The sampler that the arguments ask for; with several processes all take the same data set in every step."""
        make, processes = super().get_multi_dataset_batch_sampler, self.args.world_size
        if processes == 1:
            return make(dataset, batch_samplers, generator, seed)
        joined = [JoinedBatches(each, processes) for each in batch_samplers]
        return SplitBatches(make(dataset, cast(Any, joined), generator, seed), processes, joined[0].batch_size)

    @contextmanager
    def in_training_precision(self) -> Iterator[None]:
        """Compute as training does (``bf16``, ``fp16``) while the block runs: what is embedded or evaluated before the
        first step compares with what comes after.
        """
        dtype = torch.bfloat16 if self.args.bf16 else torch.float16 if self.args.fp16 else None
        with nullcontext() if dtype is None else torch.autocast(self.args.device.type, dtype):
            yield

    def _cache(self, model: SentenceTransformer, corpus: Corpus) -> EmbeddingCache:
        """The cache of the model as it is now, which is where training starts, also where it is resumed."""
        args, path = self.args, self.args.cache_path
        if path is None or self.model_init is not None:  # each run may begin with another model
            fingerprint = DocumentEncoder(model, corpus).fingerprint(model)
            # What begins with "_" the trainer does not push to the Hub.
            path = os.path.join(path or str(args.output_dir), f"_cache-{digest_json(fingerprint)[:12]}")
        with self.in_training_precision():
            cache = EmbeddingCache.build(
                model, corpus, path, args.cache_batch_size, args.cache_dtype, progress=not args.disable_tqdm
            )
        if not args.cache_on_device:
            return cache
        return cache.share(args.device)

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs: Any) -> Any:  # type: ignore[override]
        """As the plain trainer's, after the memory plan.

        Args:
            resume_from_checkpoint: a checkpoint's folder, or True for the last one in ``output_dir`` that is complete:
                one whose writing was cut short is passed over, with a warning.
            kwargs: see the plain trainer.

        Raises:
            InputError: what choosing negatives needs does not fit on the model's device.
            CheckpointError: a checkpoint that is to be resumed is not complete, or damaged.
            StorageError: a checkpoint cannot be written; those before are as they were, nothing of this one is left.
            NonFiniteError: embeddings, the loss, the corrector or gradients are NaN or infinite.
            SystemExit: status 143, with SIGTERM, when the checkpoint is written.
        """
        if self.model_init is None:
            self._plan_memory()
        if resume_from_checkpoint is True:
            resume_from_checkpoint = self._last_complete_checkpoint()
        elif resume_from_checkpoint and (fault := fault_of(resume_from_checkpoint)):
            raise CheckpointError(f"{resume_from_checkpoint} {fault}: go on from another checkpoint.")
        with nullcontext() if self.args.save_strategy == SaveStrategy.NO else self.guard.listening():
            return super().train(resume_from_checkpoint, **kwargs)

    def _plan_memory(self) -> None:
        """Print what choosing negatives will take, and refuse what does not fit."""
        batch_size, planned = self.args.train_batch_size, batches(self.args, self.train_dataset)
        for name, loss in self._corrected_losses().items():
            if needs := loss.memory(batch_size, planned):
                require_memory(needs, self.args.device)
                if self.is_world_process_zero():
                    print(_prefix(name) + describe_memory(needs, self.args.device))

    def get_eval_dataloader(self, *args: Any, **kwargs: Any) -> Any:
        with self._evaluating():
            return super().get_eval_dataloader(*args, **kwargs)

    def get_test_dataloader(self, *args: Any, **kwargs: Any) -> Any:
        with self._evaluating():
            return super().get_test_dataloader(*args, **kwargs)

    @contextmanager
    def _evaluating(self) -> Iterator[None]:
        """Have each process make its own batches of streamed data (see what the constructor says of dispatched ones),
        each pair once.
        """
        config = self.accelerator.dataloader_config
        dispatches, config.dispatch_batches, self._evaluates = config.dispatch_batches, False, True
        try:
            yield
        finally:
            config.dispatch_batches, self._evaluates = dispatches, False

    def _run_epoch(self, model: nn.Module, epoch: int, train_dataloader: Any, *args: Any, **kwargs: Any) -> None:
        # The plain trainer takes one step too many where it resumes what was finished already.
        if 0 < self.state.max_steps <= self.state.global_step:
            self.control.should_training_stop = True
            return
        # Where it resumes with several processes, it does not reach a sampler that lies deeper than it expects.
        sampler = getattr(train_dataloader, "batch_sampler", None)
        while sampler is not None:
            if hasattr(sampler, "set_epoch"):
                sampler.set_epoch(epoch)
            sampler = getattr(sampler, "batch_sampler", None)
        super()._run_epoch(model, epoch, train_dataloader, *args, **kwargs)  # type: ignore[no-untyped-call]

    def training_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Tensor:
        try:
            return super().training_step(model, inputs, *args, **kwargs)
        except NonFiniteError as error:
            self.guard.drop_step(error, model, self.state.global_step)
            return torch.tensor(torch.nan, device=self.args.device)  # left out of the mean that is logged

    def _clip_grad_norm(self, model: nn.Module) -> Any:
        # Before clipping, which spreads what is not finite over all parameters.
        self.guard.check_gradients(self.model, self.args, self.state.global_step)
        return super()._clip_grad_norm(model)  # type: ignore[no-untyped-call]

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        checkpoint = Path(self._get_output_dir(trial)) / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        advice = (
            "The checkpoints before are as they were, and what is not complete is removed: resume from the last one."
        )
        try:
            with storing(checkpoint, advice):
                if self.args.should_save:
                    unseal(checkpoint)
                super()._save_checkpoint(model, trial)
                if self.args.should_save and not self.args.save_only_model:
                    seal(checkpoint)  # what was written last
        except (StorageError, ProcessError):
            # With its last file it is complete, and what has failed came after.
            if self.args.should_save and not (checkpoint / "trainer_state.json").exists():
                shutil.rmtree(checkpoint, ignore_errors=True)
            raise
        if self.guard.is_stopping:
            self.guard.processes.wait()  # a launcher ends all as soon as one has ended
            raise SystemExit(128 + signal.SIGTERM)

    def _last_complete_checkpoint(self) -> str | bool:
        incomplete = []
        for checkpoint in reversed(sort_checkpoints(str(self.args.output_dir))):
            fault = fault_of(checkpoint)
            if fault is None:
                return checkpoint
            incomplete.append(f"{Path(checkpoint).name} {fault}")
            logger.warning("Passing over a checkpoint that cannot be trusted: %s.", incomplete[-1])
        if incomplete:
            faults = "; ".join(incomplete)
            raise CheckpointError(f"No checkpoint in {self.args.output_dir} is complete and undamaged: {faults}.")
        return True  # the plain trainer says that there is none

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        components = self.accum_loss_components["train"]
        if not self.guard.processes.any(bool(components.get("steps")), self.args.device):
            components.clear()  # after skipped steps, or steps of other losses alone, their mean would be 0 / 0
        if "loss" in logs or "train_loss" in logs:  # the latter at the end, after steps that were not logged yet
            for name, loss in self._corrected_losses().items():
                metrics = {f"{_prefix(name)}{key}": round(value, 6) for key, value in loss.pop_metrics().items()}
                logs = logs | metrics
        super().log(logs, start_time)

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        if self.state.global_step:
            self.recorder.update(self.state)  # which the model's card tells about
        super()._save(output_dir, state_dict)
        folder = Path(output_dir if output_dir is not None else str(self.args.output_dir))
        if (corrector := self.trained_corrector()) is not None:
            corrector.save_pretrained(folder)
        else:  # one that was saved before it diverged, or before a refresh, would belong to another model
            shutil.rmtree(folder / CORRECTOR_FOLDER, ignore_errors=True)

    def trained_corrector(self) -> Corrector | None:
        """The corrector, and between which embeddings it maps: from the cache's to those of the model as it is now.

        None where no corrector has learnt anything; where the corpus was re-embedded during the run, since the
        corrector would map from embeddings that are not kept; and where there are several, of several data sets.
        """
        learnt = [loss.corrected for loss in self._stateful_losses().values()]
        learnt = [each for each in learnt if each.steps and not each.refreshed]
        if len(learnt) != 1 or isinstance(learnt[0].corrector, IdentityCorrector):
            return None
        (corrected,) = learnt
        fresh = corrected.encoder.fingerprint(self.model)
        corrector = corrected.corrector
        corrector.frames = Frames(dict(corrected.cache.fingerprint), fresh, corrected.similarity.normalizes)
        return corrector

    def _save_rng_state(self, output_dir: str) -> None:
        # Here every process writes what it alone has, before the trainer's state says that all is there.
        super()._save_rng_state(output_dir)
        save_losses(self._stateful_losses(), output_dir)
        if self.args.should_save:
            seal(output_dir)

    def _load_best_model(self) -> None:
        # Of the best step are the weights and the corrector; what the run has cost and met is that of all its steps.
        self.recorder.update(self.state)
        losses = list(self._stateful_losses().values())
        counted = [
            (loss.targets_encoded, loss.targets_verified, loss.removed, loss.corrected.targets_reencoded)
            for loss in losses
        ]
        super()._load_best_model()
        for loss, (encoded, verified, removed, reencoded) in zip(losses, counted, strict=True):
            loss.targets_encoded, loss.targets_verified, loss.removed = encoded, verified, removed
            loss.corrected.targets_reencoded = reencoded

    def _load_from_checkpoint(self, checkpoint_path: str, *args: Any) -> None:
        super()._load_from_checkpoint(checkpoint_path, *args)
        if self.args.save_only_model:
            logger.warning("%s was saved without the corrector (save_only_model): it stays as it is.", checkpoint_path)
            return
        load_losses(self._stateful_losses(), checkpoint_path)

    def _checkpoint_push_skip_names(self, checkpoint_folder: str) -> set[str]:
        return super()._checkpoint_push_skip_names(checkpoint_folder) | {FOLDER}

    def _stateful_losses(self) -> dict[str, CorrectedMultipleNegativesLoss]:
        """Those that have a corrector, by a name that can stand in a file's name."""
        return {
            quote(name, safe="") or "loss": loss
            for name, loss in self._corrected_losses().items()
            if loss.has_corrected
        }

    def _corrected_losses(self) -> dict[str, CorrectedMultipleNegativesLoss]:
        """The corrected losses among what is trained with, inside wrappers too, each once, by their data set's name:
        nothing, where there is one data set. Of several inside one wrapper the others are numbered.
        """
        losses = self.loss if isinstance(self.loss, dict) else {"": self.loss}
        found: dict[str, CorrectedMultipleNegativesLoss] = {}
        for name, loss in losses.items():
            for module in loss.modules():
                if isinstance(module, CorrectedMultipleNegativesLoss) and module not in found.values():
                    number = sum(each.partition("#")[0] == name for each in found)
                    found[f"{name}#{number}" if number else name] = module
        return found


def _each(losses: Any) -> Iterable[Any]:
    return losses.values() if isinstance(losses, dict) else [losses]


def _is_corrected(loss: Any) -> bool:
    """Whether it is a corrected loss that has been made, inside a wrapper or not."""
    return isinstance(loss, nn.Module) and any(
        isinstance(module, CorrectedMultipleNegativesLoss) for module in loss.modules()
    )


def _teacher_in(losses: Any) -> Teacher | None:
    """The teacher of a corrected loss that has been made."""
    modules = (module for loss in _each(losses) if isinstance(loss, nn.Module) for module in loss.modules())
    found = (each.distillation for each in modules if isinstance(each, CorrectedMultipleNegativesLoss))
    return next((each.teacher for each in found if each is not None), None)


def _prefix(name: str) -> str:
    return f"{name}/" if name else ""
