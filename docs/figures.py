"""The drawings of the documentation, as SVG that takes its colours from the page's palette.

    python docs/figures.py

writes ``docs/figures/*.svg``; pages include them as they are. What was measured is not drawn here but by
``benchmarks/report.py``.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import torch
from torch import Tensor

from st_corrector import RidgeCorrector

FOLDER = Path(__file__).resolve().parent / "figures"
INK = "var(--md-default-fg-color, #222)"
FAINT = "var(--md-default-fg-color--light, #777)"
PAPER = "var(--md-code-bg-color, #f5f5f5)"
ACCENT = "var(--md-typeset-a-color, #4051b5)"
WARM = "#e8710a"


class Drawing:
    """An SVG of ``width × height`` user units; everything is given by its centre.

    Args:
        name: its file's name, which keeps its ids apart from those of others on the same page.
        title: what a screen reader says of it.
    """

    def __init__(self, name: str, title: str, width: int, height: int) -> None:
        self.name = name
        self._parts = [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img" '
            f'aria-label="{title}" font-family="inherit" font-size="14">',
            "<defs>",
            *(self._arrow_head(kind, colour) for kind, colour in (("ink", INK), ("faint", FAINT), ("accent", ACCENT))),
            "</defs>",
        ]

    def _arrow_head(self, kind: str, colour: str) -> str:
        return (
            f'<marker id="{self.name}-{kind}" viewBox="0 0 10 10" refX="9" refY="5" markerUnits="userSpaceOnUse" '
            f'markerWidth="10" markerHeight="10" orient="auto-start-reverse">'
            f'<path d="M0 0.5L10 5L0 9.5z" fill="{colour}"/></marker>'
        )

    def text(self, x: float, y: float, *lines: str, colour: str = INK, size: int = 14, anchor: str = "middle") -> None:
        top = y - (len(lines) - 1) * 0.62 * size + 0.35 * size
        for number, line in enumerate(lines):
            self._parts.append(
                f'<text x="{x:g}" y="{top + number * 1.24 * size:.1f}" fill="{colour}" font-size="{size}" '
                f'text-anchor="{anchor}">{line}</text>'
            )

    def box(self, x: float, y: float, width: float, height: float, *lines: str, round: int = 4) -> None:
        self._parts.append(
            f'<rect x="{x - width / 2:g}" y="{y - height / 2:g}" width="{width:g}" height="{height:g}" rx="{round}" '
            f'fill="{PAPER}" stroke="{FAINT}"/>'
        )
        self.text(x, y, *lines)

    def cylinder(self, x: float, y: float, width: float, height: float, *lines: str) -> None:
        left, top, bottom, half = x - width / 2, y - height / 2, y + height / 2, width / 2
        self._parts.append(
            f'<path d="M{left:g} {top:g}V{bottom:g}a{half:g} 9 0 0 0 {width:g} 0V{top:g}" fill="{PAPER}" '
            f'stroke="{FAINT}"/><ellipse cx="{x:g}" cy="{top:g}" rx="{half:g}" ry="9" fill="{PAPER}" stroke="{FAINT}"/>'
        )
        self.text(x, y + 6, *lines)

    def arrow(self, path: str, kind: str = "ink", *, dashed: bool = False, thick: bool = False) -> None:
        colour = {"ink": INK, "faint": FAINT, "accent": ACCENT}[kind]
        dashes = ' stroke-dasharray="5 4"' if dashed else ""
        self._parts.append(
            f'<path d="{path}" fill="none" stroke="{colour}" stroke-width="{3 if thick else 1.4}"{dashes} '
            f'marker-end="url(#{self.name}-{kind})"/>'
        )

    def dot(self, x: float, y: float, colour: str, *, radius: float = 4.5, hollow: bool = False) -> None:
        paint = f'fill="none" stroke="{colour}" stroke-width="2"' if hollow else f'fill="{colour}"'
        self._parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{radius:g}" {paint}/>')

    def cross(self, x: float, y: float, colour: str) -> None:
        self._parts.append(
            f'<path d="M{x - 5:.1f} {y - 5:.1f}l10 10m0 -10l-10 10" stroke="{colour}" stroke-width="2.5"/>'
        )

    def write(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{self.name}.svg").write_text("\n".join([*self._parts, "</svg>", ""]), encoding="utf-8")


def step() -> Drawing:
    """What happens in one training step."""
    drawing = Drawing("step", "The data flow of one training step, as the steps below say.", 1014, 420)
    drawing.arrow("M150 55H208")
    drawing.arrow("M150 140H208")
    drawing.arrow("M300 55H748")
    drawing.arrow("M300 140H748")
    drawing.arrow("M430 55V203", "faint", dashed=True)
    drawing.text(438, 180, "no gradient", colour=FAINT, size=12, anchor="start")
    drawing.arrow("M150 335H208", "faint")
    drawing.arrow("M300 335H430V277", "faint")
    drawing.arrow("M520 240H570", "faint")
    drawing.arrow("M708 240H748")
    drawing.arrow("M805 213V167")
    drawing.arrow("M805 267V308", "faint", dashed=True)
    drawing.arrow("M320 140V385H805V362", "faint", dashed=True)
    drawing.text(328, 302, "detached", colour=FAINT, size=12, anchor="start")
    drawing.text(812, 288, "detached", colour=FAINT, size=12, anchor="start")
    drawing.arrow("M860 97H920", "accent", thick=True)
    drawing.arrow("M860 335H920", "accent", thick=True)
    drawing.text(890, 84, "gradient", colour=ACCENT, size=12)
    drawing.text(890, 322, "its own", colour=ACCENT, size=12)
    drawing.arrow("M966 362V407H255V362", "faint")
    drawing.text(600, 398, "the next step's corrector", colour=FAINT, size=12)
    drawing.box(85, 55, 130, 50, "queries x")
    drawing.box(255, 55, 90, 50, "f(x)")
    drawing.box(85, 140, 130, 50, "positives y⁺")
    drawing.box(255, 140, 90, 50, "g(y⁺)")
    drawing.cylinder(85, 335, 130, 66, "stale cache 𝓑", "N vectors g′(y)")
    drawing.box(255, 335, 90, 50, "corrector", "h(g′(y))")
    drawing.box(430, 240, 180, 70, "score all N targets,", "mask known positives,", "take the k hardest")
    drawing.box(640, 240, 136, 50, "the batch’s", "distinct negatives")
    drawing.box(805, 240, 110, 50, "g(y)")
    drawing.box(805, 97, 110, 136, "task loss L", "fresh", "embeddings", "only")
    drawing.box(805, 335, 110, 50, "correction", "loss ℓ")
    drawing.box(966, 97, 88, 50, "encoder", "Θ", round=25)
    drawing.box(966, 335, 88, 50, "corrector", "Ψ", round=25)
    return drawing


def frame() -> Drawing:
    """How a row that was encoded afresh is kept where later corrections move it on: a real corrector in the plane."""
    drawing = Drawing(
        "frame",
        "A target is encoded at step t, pulled back into the stale frame, moved on at step t + n.",
        1000,
        380,
    )
    stale = torch.tensor(
        [[-1.2, -0.5], [-0.7, 0.6], [-0.5, -0.9], [0.1, 0.2], [0.4, 1.0], [0.7, -0.6], [1.1, 0.5], [-0.2, -0.2]]
    )
    mine = 3
    others = torch.arange(len(stale)) != mine
    panels = ((170, "the stale frame", None), (500, "at step t", 1), (830, "at step t + n", 2))
    # What this target's drift has of its own, which its stale embedding does not tell, and a little more of it later.
    own = {1: torch.tensor([0.35, -0.45]), 2: torch.tensor([0.42, -0.5])}
    fresh = {}
    for when, angle in ((1, 0.25), (2, 0.8)):
        moved = stale.clone()
        moved[mine] += own[when]
        fresh[when] = _drifted(moved, angle)
    correctors = {when: _fitted(stale[others], fresh[when][others]) for when in fresh}
    pulled = correctors[1].pull_back(fresh[1][[mine]]).stale
    for centre, title, when in panels:
        drawing.text(centre, 20, title)
        drawing.arrow(f"M{centre - 140} 300H{centre + 140}", "faint")
        drawing.arrow(f"M{centre - 140} 300V40", "faint")
        cached = stale if when is None else correctors[when](stale)
        kept = pulled if when is None else correctors[when](pulled)
        for x, y in _on_paper(cached[others], centre):
            drawing.dot(x, y, FAINT)
        (before,), (after,) = _on_paper(cached[[mine]], centre), _on_paper(kept, centre)
        drawing.dot(*before, FAINT, hollow=True)
        if when is not None:
            (true,) = _on_paper(fresh[when][[mine]], centre)
            drawing.dot(*true, ACCENT, radius=9, hollow=True)
        if when == 2:
            (left,) = _on_paper(fresh[1][[mine]], centre)
            drawing.cross(*left, WARM)
        drawing.dot(*after, ACCENT)
    drawing.arrow("M320 180H346", "accent", thick=True)
    drawing.text(333, 160, "h", colour=ACCENT)
    drawing.arrow("M346 215H320", "accent", thick=True)
    drawing.text(333, 238, "h⁻¹", colour=ACCENT)
    drawing.arrow("M650 198H676", "accent", thick=True)
    drawing.text(663, 178, "drift", colour=ACCENT)
    legend = (
        (30, lambda x, y: drawing.dot(x, y, FAINT), "other targets"),
        (170, lambda x, y: drawing.dot(x, y, FAINT, hollow=True), "y, never written back"),
        (360, lambda x, y: drawing.dot(x, y, ACCENT), "y, pulled back at step t"),
        (560, lambda x, y: drawing.dot(x, y, ACCENT, radius=9, hollow=True), "what the encoder says of y"),
        (790, lambda x, y: drawing.cross(x, y, WARM), "y, left as it was at step t"),
    )
    for x, mark, meaning in legend:
        mark(x, 350)
        drawing.text(x + 15, 350, meaning, size=13, anchor="start")
    return drawing


def _drifted(points: Tensor, angle: float) -> Tensor:
    turn = torch.tensor([[math.cos(angle), math.sin(angle)], [-math.sin(angle), math.cos(angle)]])
    return (points @ turn) * (1 + 0.1 * angle) + angle * torch.tensor([0.3, 0.5])


def _fitted(stale: Tensor, fresh: Tensor) -> RidgeCorrector:
    corrector = RidgeCorrector(2, regularization=1e-3, bias=1.0, normalize=False)
    for _ in range(100):
        corrector.fit_step(stale, fresh, stale, 1.0)
    return corrector


def _on_paper(points: Tensor, centre: float) -> list[tuple[float, float]]:
    return [(centre + 85 * x - 15, 180 - 85 * y) for x, y in points.tolist()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=FOLDER)
    folder = parser.parse_args().output
    for drawing in (step(), frame()):
        drawing.write(folder)


if __name__ == "__main__":
    main()
