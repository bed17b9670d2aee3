"""Checks of the exercises of `slan/1_lesson`."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from finematch.exercises import exercise, function, named_numbers, number, prediction, random, tensor
from finematch.models.slan import locator


@exercise("slan.best", "compute")
def best(answer: Any) -> str:
    """dS_t / dx of the best region, for sigmoids of 0.2, 0.8, 0.4, 0.6 and the normalisation `max`."""
    right = torch.tensor([-0.25 * 0.2, 0.0, -0.5 * 0.2, -0.75 * 0.2])
    return tensor(answer, right, slips={
        "a score rises with its own logit, but the best one's logit stands in the denominator: mind the sign": -right,
        "the derivative of a sigmoid is s (1 - s), and the s cancels in part": torch.tensor([-0.25, 0, -0.5, -0.75]),
        "the best region's own score is 1 whatever its logit": torch.tensor([-0.05, 0.16, -0.1, -0.15]),
    })  # fmt: skip


@exercise("slan.ramp", "compute")
def ramp(answer: Any) -> str:
    """Gradient of the mean of the map f(x, y) = x over a box, with respect to (x, y, w, h)."""
    return tensor(answer, torch.tensor([1.0, 0, 0, 0]), slips={
        "these are of the edges (x1, y1, x2, y2): asked is of (x, y, w, h)": torch.tensor([0.5, 0, 0.5, 0]),
        "a wider box about the same centre has the same mean": torch.tensor([1.0, 0, 0.5, 0]),
    })  # fmt: skip


@exercise("slan.attend", "build")
def attend(answer: Any) -> str:
    """Eq. 1 as printed: regions "t d" and words "n d" -> new regions "t d"."""
    layer = locator.CrossAttention(1, 1, attn="literal")

    def library(regions: Tensor, words: Tensor) -> Tensor:
        real = (torch.ones(1, len(x), dtype=torch.bool) for x in (regions, words))
        return layer(regions[None], words[None], *real)[0][0]

    def by_hand(
        r: Tensor, w: Tensor, *, over: int = 1, scale: bool = True, what: Tensor | None = None
    ) -> Tensor:
        a = r @ w.T / (math.sqrt(r.shape[1]) if scale else 1)
        return a.softmax(over) @ (w if what is None else what)

    cases = [(random(t, 4, seed=t), random(n, 4, seed=n + 30)) for t, n in ((2, 3), (5, 2))]
    return function(answer, library, cases, slips={
        "the square root of D is missing": lambda r, w: by_hand(r, w, scale=False),
        "the softmax runs over the regions: it runs over the words": lambda r, w: by_hand(r, w, over=0),
        "a residual is added, which Eq. 1 does not print": lambda r, w: by_hand(r, w) + r,
    })  # fmt: skip


@exercise("slan.offset", "build")
def moved(answer: Any) -> str:
    """Eq. 2 in our reading: weights "k k" of the cells, the neighbourhood's (width, height) -> (dx, dy)."""

    def library(weights: Tensor, extent: Tensor) -> Tensor:
        return locator.offset(weights.flatten()[None, None], extent[None, None])[0, 0]

    def other(weights: Tensor, extent: Tensor, **how: str) -> Tensor:
        return locator.offset(weights.flatten()[None, None], extent[None, None], **how)[0, 0]

    cases = [
        (random(k, k, seed=k).flatten().softmax(0).unflatten(0, (k, k)), torch.tensor([0.4, 0.2]))
        for k in (3, 5)
    ]
    return function(answer, library, cases, slips={
        "rows and columns have changed places: the column of a cell moves x": lambda w, e: library(w.T, e),
        "this is Eq. 2 as printed, where the row of a cell moves x": lambda w, e: other(w, e, axes="paper"),
        "the steps are whole neighbourhoods: cells are N / K apart": lambda w, e: other(w, e, unit="N"),
        "the steps count from the first cell: they count from the middle one":
            lambda w, e: library(w, e) + (w.shape[0] // 2) * e / w.shape[0],
    })  # fmt: skip


@exercise("slan.reach", "compute")
def reach(answer: Any) -> str:
    """How far a region can go in three levels with K = 5 and neighbourhoods of 1, 1/2 and 1/4 of the image."""
    return number(answer, 0.7, within=0.005, hints={
        1.75: "a whole neighbourhood a level: the outermost cell's centre is 2/5 of it away",
        0.875: "half of each neighbourhood: that is its edge, not the centre of its outermost cell",
        0.4: "three levels, not one",
    })  # fmt: skip


@exercise("slan.whole", "change")
def whole(predicted: Any, measured: Any) -> str:
    """Eq. 3 of a proposal that is the whole image, wherever its words push it."""
    if message := prediction(predicted, ("zero", "above zero")):
        return message
    if message := number(measured, 0.0, within=1e-4):
        return f"measured: {message}: let the pushed boxes `stop` at the border"
    return "" if predicted == "zero" else "look at the loss again: it is not what you have predicted"


@exercise("slan.matching", "compute")
def matching(answer: Any) -> str:
    """Eq. 4 of the three pairs of section 10, by pair."""
    right = {
        "true": math.log(1 + math.exp(-2)),
        "other text": math.log(2),
        "other picture": math.log(1 + math.e),
    }
    return named_numbers(answer, right, within=0.002, hints={
        math.log(1 + math.exp(2)): "this is -log of the wrong answer: the pair belongs together",
        math.log(1 + math.exp(-1)): "this is -log of the wrong answer: the pair does not belong together",
    })  # fmt: skip


@exercise("slan.lonely", "compute")
def lonely(answer: Any) -> str:
    """The region-word contrast of b = 4 pairs whose words have met their one region by the literal Eq. 1."""
    return number(answer, math.log(4), within=0.002, hints={
        0.0: "every caption fits every image perfectly, the wrong ones too",
        4.0: "the logarithm of the number of rivals",
        math.log(3): "the true pair is in the denominator as well",
    })  # fmt: skip


@exercise("slan.median", "compute")
def median(answer: Any) -> str:
    """The least median rank that goes with R@1 = 46.8 % of 1,000 queries."""
    return number(answer, 2.0, within=0.01, hints={
        1.5: "1.5 needs the 500th query at rank 1",
        1.0: "fewer than half of the queries have rank 1",
    })  # fmt: skip
