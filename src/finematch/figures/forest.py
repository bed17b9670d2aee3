"""A forest plot: effects with their intervals, one line each."""

from __future__ import annotations

import pandas as pd
from matplotlib import pyplot as plt
from matplotlib.figure import Figure

from finematch.figures import MARKERS, PALETTE


def forest(frame: pd.DataFrame, *, xlabel: str) -> Figure:
    """Effects in the order of the frame, the first at the top.

    Args:
        frame: `label`, `group` (what has a colour and a marker), `effect`, `lower`, `upper`.
        xlabel: what an effect is.
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
    ax.set(yticks=list(places), yticklabels=frame["label"], ylim=(0.3, len(frame) + 0.7), xlabel=xlabel)
    ax.grid(axis="y", visible=False)
    ax.legend(loc="best", frameon=True)
    return figure
