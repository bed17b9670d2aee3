"""A forest plot: effects with their intervals, one line each."""

from __future__ import annotations

import pandas as pd
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from finematch.figures import MARKERS, PALETTE


def forest(frame: pd.DataFrame, *, xlabel: str, linear: float | None = None) -> Figure:
    """Effects in the order of the frame, the first at the top.

    Args:
        frame: `label`, `group` (what has a colour and a marker), `effect`, `lower`, `upper`.
        xlabel: what an effect is.
        linear: the axis is linear up to here on both sides of zero and logarithmic beyond, so that one large effect
            does not hide the others; None: linear.
    """
    figure, ax = plt.subplots(figsize=(7.2, 0.9 + 0.26 * len(frame)), layout="constrained")
    places = range(len(frame), 0, -1)
    groups = frame.assign(y=list(places)).groupby("group", sort=True)
    for (group, of), color, marker in zip(groups, PALETTE, MARKERS, strict=False):
        sure = (of["lower"] > 0) | (of["upper"] < 0)
        ax.hlines(of["y"], of["lower"], of["upper"], color=color, linewidth=1.6)
        for those, face in ((of[~sure], "white"), (of[sure], color)):
            ax.scatter(
                those["effect"], those["y"], s=30, marker=marker, facecolor=face, edgecolor=color, zorder=3
            )
        ax.scatter([], [], s=30, marker=marker, color=color, label=group)
    ax.axvline(0, color="0.4", linewidth=0.8)
    if linear is not None:
        ax.set_xscale("symlog", linthresh=linear, linscale=1)
        farthest = frame[["lower", "upper"]].abs().to_numpy().max()
        sizes = [one * linear for one in (0.4, 1, 2, 4, 10, 20, 40) if one * linear <= farthest]
        low, high = frame["lower"].min(), frame["upper"].max()
        ticks = [-one for one in reversed(sizes) if -one >= low] + [0] + [one for one in sizes if one <= high]
        ax.set_xticks(ticks, [f"{one:+g}".replace("-", "−") if one else "0" for one in ticks])
        ax.xaxis.set_minor_locator(NullLocator())
    ax.set(yticks=list(places), yticklabels=frame["label"], ylim=(0.3, len(frame) + 0.7), xlabel=xlabel)
    ax.grid(axis="y", visible=False)
    ax.legend(loc="best", frameon=True)
    return figure
