"""How far can a corrector follow? Synthetic drift with a known map, after section 5.3 of Monath et al. 2024.

    python recipes/synthetic_staleness.py --output outputs/synthetic

Targets are unit vectors in clusters. Their fresh embeddings come from the stale ones by a map of growing strength:

    linear    g = z + t·zA              what ridge can follow
    smooth    g = z + t·u((cos(8·zA) − ½)B), u to unit length: most of an even function is no matrix's
    clusters  g = z + t·(the shift of its cluster)
    noise     g = z + t·ε               what nothing can: no function of z is nearer than z itself

(all brought to unit length). A corrector learns from a few (stale, fresh) pairs and is judged on all other targets.
Beside its true risk, E‖h(z) − g‖² over those, stand the terms of the paper's bound (Theorem 4.3) as far as they can be
measured:

    empirical risk     (1/n) Σ ‖h(zᵢ) − gᵢ‖² over its pairs
    staleness          d times the squared sliced Wasserstein-2 distance between stale and fresh embeddings, in the
                       units of the risk: a common shift by v counts ‖v‖²
    complexity         an estimate of the Rademacher complexity of the losses of its class over the pairs,
                       E_σ sup_h (1/n) Σ σᵢ‖h(zᵢ) − gᵢ‖², the supremum found by the corrector's own training on
                       random signs σ: what it reaches, and so an estimate from below

The bound itself has constants that cannot be measured; what is shown is whether the terms move as the risk does.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from torch import Tensor

from st_corrector import Corrector, MLPCorrector, RidgeCorrector
from st_corrector.search.fidelity import selection_fidelity

TARGETS, DIM, CLUSTERS, QUERIES = 6_000, 48, 20, 300
MAPS = ("linear", "smooth", "clusters", "noise")
WIDTHS = (4, 16, 64, 256)
PAIRS = (64, 256, 1024, 4096)
DRIFTS = (0.1, 0.3, 1.0, 3.0)
MIDDLE = {"pairs": 1024, "drift": 1.0}


class Case(NamedTuple):
    """One measurement: which drift, which corrector, how many pairs."""

    map: str
    drift: float
    corrector: str
    pairs: int


def cases() -> list[Case]:
    """One axis at a time, from the middle of the others."""
    networks = [f"mlp-{width}" for width in WIDTHS]
    main = ["ridge", "mlp-64"]
    found = [Case(name, MIDDLE["drift"], corrector, MIDDLE["pairs"]) for name in MAPS for corrector in networks]
    found += [Case(name, MIDDLE["drift"], corrector, pairs) for name in MAPS for corrector in main for pairs in PAIRS]
    found += [Case(name, drift, corrector, MIDDLE["pairs"]) for name in MAPS for corrector in main for drift in DRIFTS]
    return sorted(set(found))


def drifted(name: str, drift: float, seed: int) -> tuple[Tensor, Tensor]:
    """Stale and fresh embeddings of all targets, both ``(N, d)`` and of unit length."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    centres, cluster = (
        F.normalize(normal(CLUSTERS, DIM), dim=-1),
        torch.randint(CLUSTERS, (TARGETS,), generator=generator),
    )
    stale = F.normalize(centres[cluster] + 1.0 / math.sqrt(DIM) * normal(TARGETS, DIM), dim=-1)
    first, second = normal(DIM, DIM) / math.sqrt(DIM), normal(DIM, DIM) / math.sqrt(DIM)
    shift = {
        "linear": lambda: stale @ first,
        "smooth": lambda: F.normalize((torch.cos(8 * stale @ first) - 0.5) @ second, dim=-1),
        "clusters": lambda: F.normalize(normal(CLUSTERS, DIM), dim=-1)[cluster],
        "noise": lambda: normal(TARGETS, DIM) / math.sqrt(DIM),
    }[name]()
    return stale, F.normalize(stale + drift * shift, dim=-1)


def sliced_wasserstein(one: Tensor, other: Tensor, directions: int = 200, seed: int = 0) -> float:
    """Sliced Wasserstein-2 distance of two equally large samples ``(n, d)``: the root mean square over random
    directions of the distance of their sorted projections.
    """
    generator = torch.Generator().manual_seed(seed)
    slices = F.normalize(torch.randn(one.shape[1], directions, generator=generator), dim=0)
    difference = (one @ slices).sort(dim=0).values - (other @ slices).sort(dim=0).values
    return difference.square().mean().sqrt().item()


def make(name: str, seed: int) -> Corrector:
    if name == "ridge":
        return RidgeCorrector(DIM, regularization=0.1, forgetting=1.0)
    return MLPCorrector(DIM, hidden=int(name.removeprefix("mlp-")), loss="mse", learning_rate=3e-3, seed=seed)


def fit(
    corrector: Corrector, stale: Tensor, fresh: Tensor, seed: int, steps: int = 1000, batch: int = 128
) -> Corrector:
    """Train on these pairs: a closed form in one step, a network in ``steps`` batches."""
    if isinstance(corrector, RidgeCorrector):
        corrector.fit_step(stale, fresh, stale[:1], 1.0)
        return corrector
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        rows = torch.randint(len(stale), (batch,), generator=generator)
        corrector.fit_step(stale[rows], fresh[rows], stale[:1], 1.0)
    return corrector


def risk(corrector: Callable[[Tensor], Tensor], stale: Tensor, fresh: Tensor) -> Tensor:
    """``‖h(z) − g‖²`` of each target, ``(n,)``."""
    return (corrector(stale) - fresh).square().sum(-1)


def complexity(name: str, stale: Tensor, fresh: Tensor, seed: int, draws: int = 1) -> float:
    """What a corrector of this kind reaches of ``sup_h (1/n) Σ σᵢ‖h(zᵢ) − gᵢ‖²``, the mean over draws of σ.

    For unit vectors the loss is ``2 − 2⟨h, g⟩``: where σ = 1 it is largest at ``h = −g``, where σ = −1 smallest at
    ``h = g``, so that it is ``−σg`` that is fitted.
    """
    reached = []
    for draw in range(draws):
        generator = torch.Generator().manual_seed(1_000 * seed + draw)
        signs = torch.randint(2, (len(stale), 1), generator=generator) * 2.0 - 1
        corrector = fit(make(name, seed), stale, -signs * fresh, seed)
        # Less its part 2σ that no corrector changes, whose expectation is 0.
        reached.append((signs[:, 0] * (risk(corrector, stale, fresh) - 2)).mean().item())
    return statistics.mean(reached)


def measure(case: Case, seed: int) -> dict[str, float]:
    stale, fresh = drifted(case.map, case.drift, seed)
    generator = torch.Generator().manual_seed(10_000 + seed)
    order = torch.randperm(TARGETS, generator=generator)
    seen, unseen = order[: case.pairs], order[case.pairs :]
    corrector = fit(make(case.corrector, seed), stale[seen], fresh[seen], seed)
    asked = unseen[:QUERIES]
    queries = F.normalize(fresh[asked] + 0.5 / math.sqrt(DIM) * torch.randn(QUERIES, DIM, generator=generator), dim=-1)
    return {
        "true_risk": risk(corrector, stale[unseen], fresh[unseen]).mean().item(),
        "stale_risk": risk(lambda z: z, stale[unseen], fresh[unseen]).mean().item(),
        "empirical_risk": risk(corrector, stale[seen], fresh[seen]).mean().item(),
        "staleness": DIM * sliced_wasserstein(stale, fresh) ** 2,
        "complexity": complexity(case.corrector, stale[seen], fresh[seen], seed),
        "fidelity": selection_fidelity(queries, corrector(stale[unseen]), fresh[unseen], 10).item(),
        "stale_fidelity": selection_fidelity(queries, stale[unseen], fresh[unseen], 10).item(),
    }


def plot(results: dict[Case, list[dict[str, float]]], path: Path) -> None:
    """True risk and the terms of the bound along each axis, one row of panels for each map."""
    plt.rcParams["svg.hashsalt"] = "st_corrector"
    figure, axes = plt.subplots(len(MAPS), 3, figsize=(13, 3.2 * len(MAPS)), squeeze=False)
    terms = {"true_risk": "k-", "stale_risk": "k:", "empirical_risk": "C0-", "staleness": "C1-", "complexity": "C2-"}
    for row, name in zip(axes, MAPS, strict=True):
        along = {
            "width of the MLP": [
                (width, Case(name, MIDDLE["drift"], f"mlp-{width}", MIDDLE["pairs"])) for width in WIDTHS
            ],
            "pairs seen (mlp-64)": [(pairs, Case(name, MIDDLE["drift"], "mlp-64", pairs)) for pairs in PAIRS],
            "drift t (mlp-64)": [(drift, Case(name, drift, "mlp-64", MIDDLE["pairs"])) for drift in DRIFTS],
        }
        for axis, (label, points) in zip(row, along.items(), strict=True):
            for term, style in terms.items():
                values = [statistics.mean(run[term] for run in results[case]) for _, case in points]
                axis.plot([x for x, _ in points], values, style, marker="o", markersize=3, label=term.replace("_", " "))
            axis.set_xscale("log")
            axis.set(xlabel=label, title=name)
            axis.grid(alpha=0.3)
    axes[0][-1].legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.tight_layout()
    for suffix in ("png", "svg"):
        metadata = {"Date": None} if suffix == "svg" else None
        figure.savefig(path.with_suffix(f".{suffix}"), dpi=100, bbox_inches="tight", metadata=metadata)


def table(results: dict[Case, list[dict[str, float]]]) -> str:
    names = list(next(iter(results.values()))[0])
    lines = [
        f"| map | drift | corrector | pairs | {' | '.join(name.replace('_', ' ') for name in names)} |",
        "|---|---|---|---|" + "---:|" * len(names),
    ]
    for case, runs in results.items():
        cells = []
        for name in names:
            values = [run[name] for run in runs]
            deviation = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
            cells.append(f"{statistics.mean(values):.3f}{deviation}")
        lines.append(f"| {case.map} | {case.drift:g} | {case.corrector} | {case.pairs} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--output", type=Path, default=Path("outputs/synthetic"), help="folder of report, JSON and plots"
    )
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    results = {case: [measure(case, seed) for seed in args.seeds] for case in cases()}
    records = [{**case._asdict(), "seeds": args.seeds, "runs": runs} for case, runs in results.items()]
    (args.output / "synthetic.json").write_text(json.dumps(records, indent=1) + "\n", encoding="utf-8")
    plot(results, args.output / "synthetic")
    seeds = " ".join(map(str, args.seeds))
    sections = [
        "# Synthetic drift: a corrector's risk and the terms of its bound",
        f"`python recipes/synthetic_staleness.py --seeds {seeds}`: {TARGETS:,} targets in {CLUSTERS} clusters of {DIM} "
        f"dimensions, mean ± sample sd over {len(args.seeds)} seeds. What the columns are stands in the recipe.",
        "![risk and bound](synthetic.png)",
        table(results),
    ]
    (args.output / "README.md").write_text("\n\n".join(sections) + "\n", encoding="utf-8")
    print(table(results))


if __name__ == "__main__":
    main()
