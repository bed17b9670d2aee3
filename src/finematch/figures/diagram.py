"""A model as one picture: boxes for its parts, arrows that carry the shapes of what flows between them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

from finematch.figures import INK

# What a colour tells, the outline tells too: round is data, a thick line has trained weights, dashed is frozen.
KINDS = {
    "data": {
        "facecolor": "#ffffff",
        "boxstyle": "round,pad=0,rounding_size=0.18",
        "linewidth": 0.8,
        "linestyle": "-",
    },
    "trained": {"facecolor": "#ffe7b8", "boxstyle": "square,pad=0", "linewidth": 2.0, "linestyle": "-"},
    "frozen": {"facecolor": "#eef1f4", "boxstyle": "square,pad=0", "linewidth": 1.2, "linestyle": "--"},
    "step": {"facecolor": "#dcebf7", "boxstyle": "square,pad=0", "linewidth": 0.8, "linestyle": "-"},
}
SAYS = {"data": "data", "trained": "trained weights", "frozen": "frozen weights", "step": "no weights"}


def diagram(
    parts: Mapping[str, tuple[float | int, float | int, str]],
    arrows: Sequence[tuple[str, str, str]],
    *,
    cell: tuple[float, float] = (1.95, 0.82),
    box: tuple[float, float] = (1.15, 0.46),
) -> Figure:
    """Boxes and arrows.

    Args:
        parts: text in the box → (column, row, kind); rows go down; halves are allowed. Kinds: `data`, `trained`,
            `frozen` (a network that is not trained), `step` (no weights).
        arrows: (from, to, label); the label, usually a shape ("b n d"), stands at the arrow's middle.
        cell, box: inches between places, and of a box, width and height.

    Raises:
        ValueError: an arrow or a kind that is not known, or two boxes at one place.
    """
    for start, end, _ in arrows:
        if missing := [name for name in (start, end) if name not in parts]:
            raise ValueError(f"an arrow names {missing[0]!r}, which is no part: {', '.join(parts)}")
    if len({at[:2] for at in parts.values()}) < len(parts):
        raise ValueError("two parts have one place")
    if unknown := {kind for *_, kind in parts.values()} - set(KINDS):
        raise ValueError(f"kinds are {', '.join(KINDS)}, not {', '.join(sorted(unknown))}")
    at = {name: (column * cell[0], -row * cell[1]) for name, (column, row, _) in parts.items()}
    left, right = min(x for x, _ in at.values()), max(x for x, _ in at.values())
    low, high = min(y for _, y in at.values()), max(y for _, y in at.values())
    width, height = right - left + box[0] + 0.1, high - low + box[1] + 0.42
    figure = plt.figure(figsize=(width, height))
    ax = figure.add_axes((0, 0, 1, 1))
    ax.set_xlim(left - box[0] / 2 - 0.05, left - box[0] / 2 - 0.05 + width)
    ax.set_ylim(low - box[1] / 2 - 0.37, low - box[1] / 2 - 0.37 + height)  # one inch is one unit
    ax.set_axis_off()
    drawn = {}
    for name, (_, _, kind) in parts.items():
        x, y = at[name]
        drawn[name] = ax.add_patch(
            FancyBboxPatch((x - box[0] / 2, y - box[1] / 2), *box, edgecolor=INK, **KINDS[kind])
        )
        ax.text(x, y, name, ha="center", va="center", fontsize=7.5, linespacing=1.05)
    for start, end, label in arrows:
        ax.add_patch(FancyArrowPatch(at[start], at[end], patchA=drawn[start], patchB=drawn[end], arrowstyle="-|>",
                                     mutation_scale=9, shrinkA=0, shrinkB=1, color=INK, linewidth=1))  # fmt: skip
        a, b = _edge(at[start], at[end], box), _edge(at[end], at[start], box)
        look = {"boxstyle": "square,pad=0.12", "facecolor": "white", "edgecolor": "none"}
        if label:
            middle = ((a[0] + b[0]) / 2, (a[1] + b[1]) / 2)
            ax.text(
                *middle, label, ha="center", va="center", fontsize=7, family="DejaVu Sans Mono", bbox=look
            )
    used = [kind for kind in KINDS if any(kind == one for *_, one in parts.values())]
    for n, kind in enumerate(used):
        x, y = left - box[0] / 2 + 1.25 * n + 0.02, low - box[1] / 2 - 0.3
        ax.add_patch(FancyBboxPatch((x, y), 0.2, 0.13, edgecolor=INK, **KINDS[kind] | (
            {"boxstyle": "round,pad=0,rounding_size=0.05"} if kind == "data" else {})))  # fmt: skip
        ax.text(x + 0.26, y + 0.065, SAYS[kind], va="center", fontsize=7)
    return figure


def _edge(
    start: tuple[float, float], end: tuple[float, float], box: tuple[float, float]
) -> tuple[float, float]:
    """Where the line from a box's middle to another leaves the box."""
    dx, dy = end[0] - start[0], end[1] - start[1]
    share = min(box[0] / 2 / abs(dx) if dx else 1, box[1] / 2 / abs(dy) if dy else 1)
    return start[0] + share * dx, start[1] + share * dy
