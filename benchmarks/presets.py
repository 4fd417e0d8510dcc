"""What the study runs: regimes, strategies, and in which order (:mod:`strategies` runs them)."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import NamedTuple


def options(**settings: object) -> list[str]:
    """``max_steps=60`` → ``["--max_steps", "60"]``; dictionaries as JSON."""
    texts = {
        name: json.dumps(value) if isinstance(value, (dict, bool)) else str(value) for name, value in settings.items()
    }
    return [part for name, text in texts.items() for part in (f"--{name}", text)]


def on_gpu(**settings: object) -> list[str]:
    """A transformer on all passages, with what keeps a GPU busy: large batches where nothing is learnt, the cache in
    its memory, texts tokenized beside.
    """
    for_gpu = {"bf16": True, "cache_on_device": True, "cache_batch_size": 1_024, "dataloader_num_workers": 2}
    return options(max_seq_length=128, **for_gpu, **settings)


def low_coverage(**settings: object) -> list[str]:
    return on_gpu(**{"max_steps": 100, "per_device_train_batch_size": 32, "num_negatives": 4, **settings})


def high_coverage(**settings: object) -> list[str]:
    return on_gpu(max_steps=300, per_device_train_batch_size=64, num_negatives=8, **settings)


def gold(**settings: object) -> list[str]:
    return options(max_targets=9_383, num_negatives=4, max_seq_length=32) + options(**settings)


def static(**settings: object) -> list[str]:
    return options(encoder="static") + options(**settings)


# Of MiniLM's architecture with random weights; see benchmarks/README.md for what it was chosen by.
FROM_SCRATCH = "1e-4"
# How much of the corpus a run encodes, which decides what write-back can do by itself, and how far the encoder drifts.
REGIMES = {
    "smoke": static(max_targets=9_400, max_steps=4, per_device_train_batch_size=8, num_negatives=2, logging_steps=2),
    "nq-high-coverage": static(max_targets=30_000, max_steps=300, num_negatives=8),
    "nq-medium-coverage": static(),
    "nq-low-coverage": static(max_steps=60, per_device_train_batch_size=32, num_negatives=8),
    "labels-high-coverage": static(max_targets=30_000, max_steps=300, num_negatives=8),
    # Settings are chosen here: on 1,000 of the training questions, which nothing that is reported is measured on.
    "labels-choice": static(max_targets=30_000, max_steps=300, num_negatives=8, hold_out=1_000),
    "labels-low-coverage": static(max_steps=60, per_device_train_batch_size=32, num_negatives=8),
    # At 64 questions a step, 112 steps are an epoch.
    **{
        f"labels-epochs-{epochs}": static(max_targets=30_000, max_steps=round(112 * epochs), num_negatives=8)
        for epochs in (0.25, 0.5, 1, 2, 4, 10)
    },
    "nq-coverage-0.05": static(max_steps=40, per_device_train_batch_size=16, num_negatives=8),
    "nq-coverage-15": static(max_targets=10_000, max_steps=300, num_negatives=8),
    **{
        f"nq-rate-{rate}": static(max_targets=10_000, max_steps=100, num_negatives=8, learning_rate=rate)
        for rate in ("1e-4", "3e-4", "1e-3", "3e-3", "1e-2")
    },
    # As much of a transformer as two CPU cores train in minutes: the gold passages alone, short texts. MiniLM has
    # learnt these questions already; its first two layers have not.
    "minilm-cpu": gold(max_steps=60, per_device_train_batch_size=16, learning_rate="1e-4"),
    "minilm-2-layers": gold(num_layers=2, max_steps=100, per_device_train_batch_size=32, learning_rate="5e-4"),
    "minilm-2-layers-lora": gold(
        num_layers=2, lora_r=8, max_steps=100, per_device_train_batch_size=32, learning_rate="5e-3"
    ),
    # The same on all passages, of which a run encodes few: encoding them all once takes longer than training.
    "minilm-2-layers-all-passages": options(
        **{"num_layers": 2, "num_negatives": 4, "max_seq_length": 32},
        **{"max_steps": 100, "per_device_train_batch_size": 32, "learning_rate": "5e-4"},
    ),
    # All passages, with a GPU. What decides is low coverage where the encoder learns and drifts: MiniLM's first layers.
    "minilm-2-layers-low-coverage": low_coverage(num_layers=2, learning_rate="5e-4"),
    "minilm-2-layers-high-coverage": high_coverage(num_layers=2, learning_rate="5e-4"),
    # From random weights it takes more steps to learn anything: with one negative a question they are of low coverage.
    "bert-from-scratch-low-coverage": low_coverage(
        from_scratch=True, learning_rate=FROM_SCRATCH, max_steps=600, num_negatives=1
    ),
    "bert-from-scratch": high_coverage(from_scratch=True, learning_rate=FROM_SCRATCH),
    **{f"minilm-{rate}-low-coverage": low_coverage(learning_rate=rate) for rate in ("1e-4", "2e-5")},
    **{f"minilm-{rate}": high_coverage(learning_rate=rate) for rate in ("1e-4", "2e-5")},
}
# What a package is judged by that claims to beat what one would pick instead: three corpora and three encoders.
# all-MiniLM-L6-v2 has learnt the first corpus, and of the kind of the second CodeSearchNet; the third is new to it. The
# corpora beside --dataset are those of corpora.py.
CORPORA = {"nq": {}, "code": {"dataset": "outputs/corpora/code"}, "packages": {"dataset": "outputs/corpora/packages"}}
TOKENS = {"nq": 32, "code": 48, "packages": 48}
_TWO_LAYERS = {"num_layers": 2, "max_steps": 100, "per_device_train_batch_size": 32, "num_negatives": 4}
for name, where in CORPORA.items():
    short = {**where, "max_seq_length": TOKENS[name]}
    # Natural Questions has none: its dev questions are those of all studies.
    tested = {} if name == "nq" else {"test_split": "test"}
    REGIMES |= {
        f"{name}-2-layers": options(**short, **_TWO_LAYERS, **tested, max_targets=30_000, learning_rate="5e-4"),
        # Settings are chosen here: on questions held out of the training questions, among fewer targets.
        f"{name}-2-layers-choice": options(
            **short, **_TWO_LAYERS, max_targets=15_000, learning_rate="5e-4", hold_out=1_000
        ),
        f"{name}-static-choice": static(**where, max_steps=200, num_negatives=8, hold_out=1_000),
        f"{name}-static": static(**where, **tested, max_steps=200, num_negatives=8),
    }
# All of MiniLM, for which encoding a corpus takes longer than training: among fewer targets, in fewer steps.
_CODE = {"max_seq_length": TOKENS["code"], "max_targets": 15_000, "max_steps": 40}
REGIMES |= {
    "code-minilm": options(**CORPORA["code"], test_split="test", **_CODE, learning_rate="1e-4"),
    "code-minilm-lora": options(**CORPORA["code"], test_split="test", **_CODE, learning_rate="1e-3", lora_r=8),
}
# Whether what holds of two epochs holds of five and of ten.
REGIMES |= {
    f"code-static-{name}": static(**CORPORA["code"], test_split="test", max_steps=steps, num_negatives=8)
    for name, steps in (("long", 400), ("longer", 800))
}
# Fidelity is measured with seed 0 alone, over the whole corpus where the encoder is cheap; at intervals that are no
# multiple of those of the refreshes, right after which it is 1.
PROBES = {
    "smoke": options(probe_every=2, probe_targets=100),
    "nq-high-coverage": options(probe_every=19, probe_targets=30_000),
    "minilm-cpu": options(probe_every=19, probe_targets=1_000),
    "minilm-2-layers": options(probe_every=19, probe_targets=9_383),
    "minilm-2-layers-lora": options(probe_every=19, probe_targets=9_383),
    "minilm-2-layers-all-passages": options(probe_every=19, probe_targets=10_000),
    "nq-low-coverage": options(probe_every=7, probe_targets=99_471),
    **{
        f"nq-rate-{rate}": options(probe_every=10, probe_targets=10_000)
        for rate in ("1e-4", "3e-4", "1e-3", "3e-3", "1e-2")
    },
    **{
        name: options(probe_every=19, probe_targets=99_471)
        for name in ("minilm-2-layers-low-coverage", "minilm-1e-4-low-coverage", "minilm-2e-5-low-coverage")
    },
    **{
        name: options(probe_every=37, probe_targets=99_471)
        for name in ("minilm-2-layers-high-coverage", "minilm-1e-4", "minilm-2e-5", "bert-from-scratch")
    },
    "bert-from-scratch-low-coverage": options(probe_every=59, probe_targets=99_471),
}


def stale(**settings: object) -> list[str]:
    return options(strategy="stale", **{"write_back": False, **settings})


def corrected(corrector: str, **settings: object) -> list[str]:
    given = {name: value for name, value in settings.items() if name not in ("normalize", "hidden", "depth", "loss")}
    of_corrector = {name: value for name, value in settings.items() if name not in given}
    given = {"write_back": True, **given}
    return options(
        strategy="corrected",
        corrector=corrector,
        **({"corrector_settings": of_corrector} if of_corrector else {}),
        **given,
    )


# name → the recipe's options.
STRATEGIES = {
    "in-batch": options(strategy="in-batch"),
    "uniform": stale(sampler="uniform"),
    "mined-once": options(strategy="mined-once"),
    "stale": stale(),
    "stale-write-back": stale(write_back=True),
    "refresh-50": options(strategy="refresh:50", write_back=False),
    "refresh-10": options(strategy="refresh:10", write_back=False),
    "exhaustive": options(strategy="exhaustive", write_back=False),
    "corrected-mlp": corrected("mlp", hidden=512, write_back=False),  # the paper's setting
    "corrected-ridge": corrected("ridge", write_back=False),
    "mlp-pull-back": corrected("mlp", hidden=128),  # what is meant by corrected
    "ridge-pull-back": corrected("ridge"),
    "ridge-pull-back-query-side": corrected("ridge", normalize=False),
    # the other correctors
    "kernel-ridge-pull-back": corrected("kernel-ridge"),
    "ridge-mlp-pull-back": corrected("ridge-mlp"),
    "mlp-32-pull-back": corrected("mlp", hidden=32),
    "mlp-512-pull-back": corrected("mlp", hidden=512),
    "mlp-depth-2-pull-back": corrected("mlp", hidden=128, depth=2),
    "mlp-mse-pull-back": corrected("mlp", hidden=128, loss="mse"),
    "mlp-unnormalised-pull-back": corrected("mlp", hidden=128, normalize=False),
    # ways to select, with that corrector
    "mlp-gumbel": corrected("mlp", hidden=128, sampler="gumbel"),
    "mlp-window-32": corrected("mlp", hidden=128, sampler="uniform", range_max=32),
    "mlp-own-negatives": corrected("mlp", hidden=128, share_negatives=False),
    "mlp-margin": corrected("mlp", hidden=128, relative_margin=0.05),
    "mlp-answer-check": corrected("mlp", hidden=128, answer_check=True),
    "mlp-verify-32": corrected("mlp", hidden=128, candidates=32),
    "mlp-verify-8": corrected("mlp", hidden=128, candidates=8),
    "mlp-background-256": corrected("mlp", hidden=128, background_targets=256),
    "mlp-k4": corrected("mlp", hidden=128, num_negatives=4),
    "mlp-k16": corrected("mlp", hidden=128, num_negatives=16),
    "exhaustive-k4": options(strategy="exhaustive", write_back=False, num_negatives=4),
    "exhaustive-k16": options(strategy="exhaustive", write_back=False, num_negatives=16),
    "exhaustive-gumbel": options(strategy="exhaustive", write_back=False, sampler="gumbel"),
}
BASELINES = (
    "in-batch",
    "uniform",
    "mined-once",
    "stale",
    "refresh-50",
    "refresh-10",
    "corrected-mlp",
    "corrected-ridge",
)
DECIDING = ("stale-write-back", "mlp-pull-back", "ridge-pull-back", "ridge-pull-back-query-side", "exhaustive")
SELECTION = tuple(
    name for name in STRATEGIES if name.startswith(("mlp-", "exhaustive-")) and not name.endswith("pull-back")
)
OTHERS = tuple(name for name in STRATEGIES if name not in (*BASELINES, *DECIDING, "mlp-verify-8"))
DRIFT = (
    "stale",
    "stale-write-back",
    "corrected-mlp",
    "corrected-ridge",
    "mlp-pull-back",
    "ridge-pull-back",
    "exhaustive",
)


TRANSFORMER = (
    "in-batch",
    "mined-once",
    "stale",
    "stale-write-back",
    "mlp-pull-back",
    "ridge-pull-back",
    "mlp-verify-8",
    "refresh-10",
)


# With a GPU: whether correcting gains anything over write-back alone, what lies below and above both, and what else.
DECISIVE = ("stale-write-back", "mlp-pull-back", "corrected-mlp")
BESIDE = ("stale", "in-batch", "ridge-pull-back")
DEAR = ("mined-once", "mlp-verify-32", "refresh-50", "refresh-10")


class Block(NamedTuple):
    """Every one of some strategies with every one of some seeds."""

    regime: str
    strategies: tuple[str, ...]
    seeds: tuple[int, ...]


# What a target hears besides: the corpus's own questions, a teacher's labels, both (--preset labels).
LABELLED = ("in-batch", "mined-once", "stale", "stale-write-back", "mlp-pull-back", "exhaustive")
OWN = options(own_pairs_share=0.36)
TEACHER = options(teacher_model="default", teacher_max_seq_length=96)
# Where nothing is chosen from the corpus, how far a teacher is to be trusted is not found out: as it is elsewhere.
TRUSTED, SCALED = options(teacher_weight=4, teacher_scale=10), options(teacher_scale=10)
for name in LABELLED:
    taught = TEACHER + {"in-batch": TRUSTED, "mined-once": SCALED}.get(name, [])
    added = {"own-pairs": OWN, "teacher": taught, "own-pairs-teacher": OWN + taught}
    STRATEGIES |= {f"{name}-{kind}": STRATEGIES[name] + given for kind, given in added.items()}


# What was chosen among.
CHOICES = {
    **{f"own-pairs-{share}": options(own_pairs_share=share) for share in (0.25, 0.36, 0.5)},
    "own-pairs-first-sentence": options(own_pairs_share=0.36, own_question="first_sentence"),
    **{
        f"teacher-weight-{weight}-scale-{scale}": TEACHER + options(teacher_weight=weight, teacher_scale=scale)
        for weight, scale in ((1, 7), (1, 10), (1, 15), (1, 20), (2, 10), (4, 10), (8, 10))
    },
    "teacher": TEACHER,
}
STRATEGIES |= {f"mlp-pull-back-{name}": STRATEGIES["mlp-pull-back"] + given for name, given in CHOICES.items()}


MARGIN = {"relative_margin": 0.05}  # which sentence-transformers recommends
# What one would pick instead, at about as many texts encoded with gradient as 32 questions with 4 negatives each take:
# a batch of 96 pairs, or tuples of 6 texts for 32 questions.
STRATEGIES |= {
    "in-batch-larger": options(strategy="in-batch", per_device_train_batch_size=96),
    # A static encoder's runs take 64 questions with 8 negatives each, of which the batch shares some.
    "in-batch-larger-static": options(strategy="in-batch", per_device_train_batch_size=288),
    "mined-margin": options(strategy="mined-once", **MARGIN),
    "mined-again": options(strategy="mined:25", **MARGIN),
    # Whoever has a teacher mines with it, and may learn its scores.
    "mined-by-teacher": options(strategy="mined-by-teacher", **MARGIN) + TEACHER,
    "mined-by-teacher-scores": options(strategy="mined-by-teacher", **MARGIN) + TEACHER + SCALED,
    "gist": options(strategy="gist", per_device_train_batch_size=96) + TEACHER,
}
# Where questions come more than once, they are given the corpus's own pairs, too.
STRATEGIES["in-batch-larger-static-own-pairs"] = STRATEGIES["in-batch-larger-static"] + OWN
RATES = {"2-layers": ("2e-4", "1e-3"), "static": ("5e-4", "2e-3", "4e-3")}
TUNED = {
    "2-layers": ("mlp-pull-back", "in-batch-larger"),
    "static": ("mlp-pull-back", "in-batch-larger-static", "mined-margin"),
}
WEIGHTS = (1, 4)
WAYS = ("mlp-pull-back", "mlp-margin", "mlp-window-32", "stale-write-back", "mined-margin")
OTHER_WAYS = ("mined-by-teacher", "mined-by-teacher-scores", "mined-again", "refresh-50", "corrected-mlp")
# As many texts a step, spent on more questions with fewer negatives each.
SPENT = {"2-layers": {2: 48, 1: 64}, "static": {3: 115, 1: 192}}
for encoder, names in TUNED.items():
    STRATEGIES |= {
        f"{name}-{count}-negatives-{encoder}": STRATEGIES[name]
        + options(num_negatives=count, per_device_train_batch_size=questions)
        for name in (*WAYS, *OTHER_WAYS)
        for count, questions in SPENT[encoder].items()
    }
    STRATEGIES |= {
        f"{name}-{count}-negatives-{encoder}-{kind}": STRATEGIES[f"{name}-{count}-negatives-{encoder}"] + given
        for name in ("mlp-pull-back", "stale-write-back")
        for count in SPENT[encoder]
        for kind, given in (("own-pairs", OWN), ("teacher", TEACHER), ("own-pairs-teacher", OWN + TEACHER))
    }
    # Whether what is found out of a teacher is as good as what one would set.
    STRATEGIES |= {
        f"mlp-pull-back-{count}-negatives-{encoder}-teacher-weight-{weight}": STRATEGIES[
            f"mlp-pull-back-{count}-negatives-{encoder}-teacher"
        ]
        + options(teacher_weight=weight)
        for count in SPENT[encoder]
        for weight in WEIGHTS
    }
    for name in names:
        STRATEGIES |= {f"{name}-rate-{rate}": STRATEGIES[name] + options(learning_rate=rate) for rate in RATES[encoder]}


# A teacher's scores are learnt of a question's own tuple alone, so that it may want more of them.
STRATEGIES["mined-by-teacher-scores-8-negatives-2-layers"] = STRATEGIES["mined-by-teacher-scores"] + options(
    num_negatives=8, per_device_train_batch_size=16
)
SCORES = tuple(f"mined-by-teacher-scores{spent}" for spent in ("-2-negatives-2-layers", "", "-8-negatives-2-layers"))

# With own pairs a step's questions are not the same few again and again: whether more of them beat more negatives each.
PAIRED_SPENT = (
    *(f"stale-write-back{spent}-own-pairs" for spent in ("", "-3-negatives-static", "-1-negatives-static")),
    "in-batch-larger-static-own-pairs",
)


def _taught(encoder: str, weights: Iterable[int]) -> tuple[str, ...]:
    """A teacher's weight, found out and set."""
    name = f"mlp-pull-back-{max(SPENT[encoder])}-negatives-{encoder}-teacher"
    return (name, *(f"{name}-weight-{weight}" for weight in weights))


# With three seeds, on each corpus; then those that tell less, with two or one.
_TWICE = "-2-negatives-2-layers"
# What is compared on code search before anything is reported, beside learning rates.
CHOICES_OF = {
    "2-layers": (
        *("mined-margin", "mined-once", "mlp-pull-back-1-negatives-2-layers"),
        *(f"{name}{_TWICE}" for name in WAYS),
        *_taught("2-layers", WEIGHTS),
    ),
    "static": (
        *("mined-margin", "mined-once", "mlp-margin"),
        *(f"mlp-pull-back-{count}-negatives-static" for count in SPENT["static"]),
    ),
}


def _choices(encoder: str) -> tuple[str, ...]:
    rates = (f"{name}-rate-{rate}" for name in TUNED[encoder] for rate in RATES[encoder])
    return tuple(dict.fromkeys((*TUNED[encoder], *rates, *CHOICES_OF[encoder])))


# Steps for which these take about as long as corrected negatives do with their cache, on code search: with a static
# encoder, for which correcting and choosing take longer than encoding, and with two layers.
AS_LONG = {"stale-write-back": 350, "in-batch-larger-static": 400, "in-batch-larger": 190}
STRATEGIES |= {f"{name}-as-long": STRATEGIES[name] + options(max_steps=steps) for name, steps in AS_LONG.items()}
DECIDES = (
    *(f"mlp-pull-back{_TWICE}", "in-batch-larger", f"stale-write-back{_TWICE}", f"mined-margin{_TWICE}"),
    *(f"mlp-pull-back{_TWICE}-teacher", f"stale-write-back{_TWICE}-teacher"),
)
SECOND = (f"mined-by-teacher{_TWICE}", "in-batch-larger-as-long")
ONCE = (
    *(f"stale-write-back{_TWICE}-own-pairs", f"mlp-pull-back{_TWICE}-own-pairs"),
    *(f"refresh-50{_TWICE}", "gist", "mined-by-teacher-scores", f"mined-by-teacher-scores{_TWICE}"),
    *(f"corrected-mlp{_TWICE}", f"mlp-pull-back{_TWICE}-own-pairs-teacher"),
)
MINILM = (f"stale-write-back{_TWICE}", f"mlp-pull-back{_TWICE}", "in-batch-larger")
DECIDES_STATIC = (
    *("mlp-pull-back", "in-batch-larger-static", "stale-write-back", "mined-margin", "stale-write-back-own-pairs"),
    *("mlp-pull-back-own-pairs", "in-batch-larger-static-own-pairs", "mlp-pull-back-teacher"),
    *("stale-write-back-teacher", "mlp-pull-back-own-pairs-teacher"),
)
LONG = (
    *("mlp-pull-back-own-pairs-teacher", "mlp-pull-back-teacher", "stale-write-back-own-pairs"),
    *("in-batch-larger-static-own-pairs", "stale-write-back"),
)
TWICE_STATIC = (
    "mined-once",
    "refresh-10",
    *(f"{name}-as-long" for name in ("stale-write-back", "in-batch-larger-static")),
)


def _labelled(name: str) -> tuple[str, ...]:
    """A strategy with the corpus's own pairs, with a teacher, with both."""
    return tuple(f"{name}-{kind}" for kind in ("own-pairs", "teacher", "own-pairs-teacher"))


PRESETS = {
    "smoke": [
        Block(
            "smoke",
            ("in-batch", "mined-once", "stale-write-back", "mlp-pull-back", "mlp-verify-32", "exhaustive"),
            (0,),
        )
    ],
    "cpu": [
        Block("nq-high-coverage", BASELINES + DECIDING, (0, 1, 2)),
        Block("nq-low-coverage", BASELINES + DECIDING, (0, 1, 2)),
        Block("nq-high-coverage", DECIDING, (3, 4)),
        Block("nq-low-coverage", DECIDING, (3, 4)),
        Block("nq-high-coverage", OTHERS, (0,)),
        Block("nq-low-coverage", OTHERS, (0,)),
        *(Block(name, DECIDING, (0, 1, 2)) for name in ("nq-coverage-0.05", "nq-coverage-15", "nq-medium-coverage")),
        *(Block(name, DRIFT, (0,)) for name in REGIMES if name.startswith("nq-rate-")),
        Block("minilm-2-layers", TRANSFORMER, (0,)),
        Block("minilm-2-layers", ("in-batch", "stale", "stale-write-back", "mlp-pull-back"), (1, 2)),
        Block("minilm-2-layers-all-passages", ("stale-write-back", "mlp-pull-back", "stale", "in-batch"), (0, 1, 2)),
        Block("minilm-2-layers-all-passages", ("corrected-mlp", "mlp-verify-8", "ridge-pull-back"), (0, 1, 2)),
        Block("minilm-2-layers-all-passages", ("refresh-10", "refresh-50", "mined-once"), (0,)),
        Block("minilm-2-layers-lora", ("in-batch", "stale", "stale-write-back", "mlp-pull-back"), (0,)),
        Block("minilm-cpu", TRANSFORMER, (0,)),
    ],
    # The most telling first, seed by seed: what own pairs and a teacher give beside corrected negatives and exhaustive.
    "labels": [
        Block("labels-choice", ("mlp-pull-back", *(f"mlp-pull-back-{name}" for name in CHOICES)), (0, 1)),
        Block("labels-high-coverage", ("mlp-pull-back", *_labelled("mlp-pull-back"), "exhaustive"), (0, 1, 2)),
        Block("labels-high-coverage", ("in-batch", *_labelled("in-batch"), "stale-write-back"), (0, 1, 2)),
        Block("labels-high-coverage", (*_labelled("stale-write-back"), "stale", *_labelled("stale")), (0, 1, 2)),
        Block("labels-high-coverage", ("mined-once", *_labelled("mined-once"), *_labelled("exhaustive")), (0, 1, 2)),
        Block("labels-low-coverage", ("mlp-pull-back", *_labelled("mlp-pull-back"), "exhaustive"), (0, 1, 2)),
        Block("labels-low-coverage", ("in-batch", *_labelled("in-batch"), "stale-write-back"), (0, 1, 2)),
        Block("labels-low-coverage", (*_labelled("stale-write-back"), "stale", *_labelled("stale")), (0, 1, 2)),
        Block("labels-low-coverage", ("mined-once", *_labelled("mined-once"), *_labelled("exhaustive")), (0, 1, 2)),
        *(
            Block(
                f"labels-epochs-{epochs}",
                ("mlp-pull-back", *_labelled("mlp-pull-back"), "in-batch", "stale-write-back", "exhaustive"),
                (0, 1, 2),
            )
            for epochs in (1, 10, 0.25, 0.5, 2, 4)
        ),
        # What the trainer takes by itself, in runs of more than one epoch.
        *(Block(f"labels-epochs-{epochs}", ("stale-write-back-own-pairs",), (0,)) for epochs in (1, 2, 4, 10)),
        *(
            Block(regime, tuple(each for name in LABELLED for each in (name, *_labelled(name))), (3, 4))
            for regime in ("labels-high-coverage", "labels-low-coverage")
        ),
    ],
    # The most telling first: low coverage with a transformer; then what one would pick instead, corpus by corpus.
    "evidence": [
        Block("minilm-2-layers-all-passages", ("stale-write-back", "mlp-pull-back"), (0, 1, 2, 3, 4)),
        *(Block(f"code-{encoder}-choice", _choices(encoder), (0,)) for encoder in TUNED),
        Block(
            "packages-2-layers-choice",
            ("in-batch-larger", *(f"{way}{_TWICE}" for way in WAYS if way != "mined-margin")),
            (0,),
        ),
        Block("code-2-layers-choice", (f"mlp-pull-back{_TWICE}", *_taught("2-layers", (max(WEIGHTS),))), (1,)),
        Block("code-2-layers-choice", SCORES, (0,)),
        Block("code-static-choice", PAIRED_SPENT, (0,)),
        *(Block(f"{name}-2-layers", DECIDES, (0, 1, 2)) for name in ("code", "packages", "nq")),
        Block("code-2-layers", ("mlp-pull-back", "stale-write-back", "mined-margin"), (0, 1, 2)),
        *(Block(f"{name}-static", DECIDES_STATIC, (0, 1, 2)) for name in CORPORA),
        # Where each target is encoded five times, by the present rule for a teacher's weight.
        Block("labels-high-coverage", ("mlp-pull-back-teacher", "stale-write-back-teacher"), (0, 1, 2)),
        Block("labels-high-coverage", ("mlp-pull-back-own-pairs-teacher",), (0, 1, 2)),
        Block("code-static-longer", LONG, (0,)),
        Block("code-static-long", LONG[:2], (0,)),
        *(Block(f"{name}-2-layers", SECOND, (0, 1)) for name in CORPORA),
        *(Block(f"{name}-2-layers", ONCE, (0,)) for name in CORPORA),
        Block("code-2-layers", (f"mined-again{_TWICE}",), (0,)),
        *(Block(f"{name}-static", ("mined-by-teacher",), (0,)) for name in CORPORA),
        Block("code-minilm", MINILM, (0,)),
        Block("code-minilm-lora", MINILM[:2], (0,)),
        Block("code-static", TWICE_STATIC, (0, 1)),
        Block("code-static", ("mined-once",), (2,)),
    ],
    # The most telling first: whatever time there is, it buys these. Verifying 8 needs fewer negatives than 8.
    "gpu": [
        Block("minilm-2-layers-low-coverage", ("exhaustive", *DECISIVE, "mlp-verify-8", *BESIDE), (0,)),
        Block("minilm-2-layers-low-coverage", (*DECISIVE, "mlp-verify-8", "stale"), (1, 2)),
        Block("bert-from-scratch-low-coverage", ("refresh-10", *DECISIVE, "mlp-verify-8", *BESIDE), (0,)),
        Block("minilm-1e-4-low-coverage", (*DECISIVE, "mlp-verify-8", *BESIDE), (0,)),
        Block("minilm-2-layers-high-coverage", (*DECISIVE, "mlp-verify-32", *BESIDE), (0,)),
        Block("bert-from-scratch-low-coverage", (*DECISIVE, "mlp-verify-8", "stale"), (1, 2)),
        Block("minilm-2-layers-low-coverage", ("exhaustive",), (1, 2)),
        Block("minilm-2-layers-low-coverage", (*BESIDE, *DEAR), (0, 1, 2)),
        *(
            Block(name, (*DECISIVE, *BESIDE, *DEAR), (0,))
            for name in ("bert-from-scratch", "minilm-1e-4", "minilm-2e-5")
        ),
        Block("minilm-2e-5-low-coverage", (*DECISIVE, "mlp-verify-8", *BESIDE), (0,)),
        Block("minilm-2-layers-high-coverage", (*DECISIVE, "mlp-verify-32", *BESIDE, *DEAR), (0, 1, 2)),
        *(Block(name, (*DECISIVE, *BESIDE), (1, 2)) for name in ("minilm-1e-4-low-coverage", "bert-from-scratch")),
    ],
}
