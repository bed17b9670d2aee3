"""Checks of the exercises of `slan/1_lesson`."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from finematch.boxes import convert
from finematch.exercises import exercise, function, named_numbers, number, prediction, random, tensor
from finematch.models.slan import adaptor


@exercise("slan.best", "compute")
def best(answer: Any) -> str:
    """dS_t / dx of the best region, for sigmoids of 0.2, 0.8, 0.4, 0.6 and the normalisation `max`."""
    right = torch.tensor([-0.25 * 0.2, 0.0, -0.5 * 0.2, -0.75 * 0.2])
    message = tensor(answer, right, slips={
        "a score rises with its own logit, but the best one's logit stands in the denominator: mind the sign": -right,
        "the derivative of a sigmoid is s (1 - s), and the s cancels in part": torch.tensor([-0.25, 0, -0.5, -0.75]),
        "the best region's own score is 1 whatever its logit": torch.tensor([-0.05, 0.16, -0.1, -0.15]),
        "its own score has no gradient, but the scores of the others are divided by its sigmoid": torch.zeros(4),
        "asked is one logit, that of the best, and not each region's own": torch.tensor([0.2, 0.0, 0.3, 0.3]),
        "S_t is divided by the best sigmoid, σ(x_t) is not": torch.tensor([-0.04, 0.0, -0.08, -0.12]),
        "this is with respect to the sigmoid of the best: one factor more leads to its logit":
            torch.tensor([-0.3125, 0.0, -0.625, -0.9375]),
    })  # fmt: skip
    hint = "; differentiate S_t = σ(x_t)/σ(x_m) by x_m"
    return message + hint if message.startswith("the shape is right") else message


@exercise("slan.ramp", "compute")
def ramp(answer: Any) -> str:
    """Gradient of the mean of the map f(x, y) = x over a box, with respect to (x, y, w, h)."""
    message = tensor(answer, torch.tensor([1.0, 0, 0, 0]), slips={
        "these are of the edges (x1, y1, x2, y2): asked is of (x, y, w, h)": torch.tensor([0.5, 0, 0.5, 0]),
        "a wider box about the same centre has the same mean": torch.tensor([1.0, 0, 0.5, 0]),
        "x and y have changed places: f grows to the right": torch.tensor([0.0, 1, 0, 0]),
        "does the mean stay if the box moves a little to the right?": torch.zeros(4),
    })  # fmt: skip
    hint = "; write the mean between the two edges, then the edges by (x, y, w, h)"
    return message + hint if message.startswith("the shape is right") else message


@exercise("slan.attend", "build")
def attend(answer: Any) -> str:
    """Eq. 1 as printed: regions "t d" and words "n d" -> new regions "t d"."""
    layer = adaptor.CrossAttention(1, 1, attn="literal")

    def library(regions: Tensor, words: Tensor) -> Tensor:
        real = (torch.ones(1, len(x), dtype=torch.bool) for x in (regions, words))
        return layer(regions[None], words[None], *real)[0][0]

    def by_hand(
        r: Tensor, w: Tensor, *, over: int = 1, by: float | int | None = None, unit: bool = False
    ) -> Tensor:
        a = normalize(r, dim=1) @ normalize(w, dim=1).T if unit else r @ w.T
        return (a / (math.sqrt(r.shape[1]) if by is None else by)).softmax(over) @ w

    cases = [(random(t, d, seed=t), random(n, d, seed=n + 30)) for t, n, d in ((2, 3, 4), (5, 2, 9))]
    return function(answer, library, cases, slips={
        "the square root of D is missing": lambda r, w: by_hand(r, w, by=1),
        "A is divided by the square root of D, and not by D": lambda r, w: by_hand(r, w, by=r.shape[1]),
        "D is the width of the embeddings that are given, which is not always 4": lambda r, w: by_hand(r, w, by=2),
        "the softmax runs over the regions: it runs over the words": lambda r, w: by_hand(r, w, over=0),
        "a residual is added, which Eq. 1 does not print": lambda r, w: by_hand(r, w) + r,
        "the softmax is missing": lambda r, w: r @ w.T / math.sqrt(r.shape[1]) @ w,
        "A is divided by the square root of D, and not multiplied": lambda r, w: by_hand(r, w, by=r.shape[1] ** -0.5),
        "D is the width, and not the number of words": lambda r, w: by_hand(r, w, by=math.sqrt(len(w))),
        "D is the width, and not the number of regions": lambda r, w: by_hand(r, w, by=math.sqrt(len(r))),
        "A has the embeddings as they are, and not unit vectors": lambda r, w: by_hand(r, w, unit=True),
        "A has unit vectors here, and the square root of D is missing": lambda r, w: by_hand(r, w, by=1, unit=True),
    })  # fmt: skip


@exercise("slan.offset", "build")
def moved(answer: Any) -> str:
    """Eq. 2 in our reading: weights "k k" of the cells, the neighbourhood's (width, height) -> (dx, dy)."""

    def library(weights: Tensor, extent: Tensor) -> Tensor:
        return adaptor.offset(weights.flatten()[None, None], extent[None, None])[0, 0]

    def other(weights: Tensor, extent: Tensor, **how: str) -> Tensor:
        return adaptor.offset(weights.flatten()[None, None], extent[None, None], **how)[0, 0]

    def counted(weights: Tensor, extent: Tensor, *, middle: float | None = None) -> Tensor:
        steps = torch.arange(len(weights)) - (len(weights) / 2 if middle is None else middle)
        moved = torch.stack([(weights.sum(0) * steps).sum(), (weights.sum(1) * steps).sum()])
        return moved * extent / len(weights)

    def cases(k: int) -> list[tuple[Tensor, Tensor]]:
        raw = random(k, k, seed=k)
        return [
            (one, torch.tensor([0.4, 0.2])) for one in (raw.flatten().softmax(0).unflatten(0, (k, k)), raw)
        ]

    slips = {
        "rows and columns have changed places: the column of a cell moves x": lambda w, e: library(w.T, e),
        "this is Eq. 2 as printed, where the row of a cell moves x": lambda w, e: other(w, e, axes="paper"),
        "width and height have changed places: x moves by shares of the width": lambda w, e: library(w, e.flip(0)),
        "the steps are whole neighbourhoods: cells are N / K apart": lambda w, e: other(w, e, unit="N"),
        "the steps count from the first cell: they count from the middle one": lambda w, e: counted(w, e, middle=0.0),
        "K / 2 is rounded down: the middle cell does not move the region": counted,
        "y grows downwards: a lower row moves the region down": lambda w, e: library(w, e) * torch.tensor([1, -1]),
        "the weights are divided by their sum: Eq. 2 takes them as they are": lambda w, e: library(w / w.sum(), e),
        "these are weights already: no softmax": lambda w, e: library(w.flatten().softmax(0).view_as(w), e),
    }  # fmt: skip
    if message := function(answer, library, cases(3), slips=slips):
        return message
    try:
        message = function(answer, library, cases(5), slips=slips)
    except Exception as error:
        message = f"{type(error).__name__}: {error}"
    return message and f"right for K = 3 alone: K is the number of rows of the weights. With K = 5: {message}"


@exercise("slan.reach", "compute")
def reach(answer: Any) -> str:
    """How far a region can go in three levels with K = 5 and neighbourhoods of 1, 1/2 and 1/4 of the image."""
    return number(answer, 0.7, within=0.005, hints={
        1.75: "a whole neighbourhood a level: the outermost cell's centre is 2/5 of it away",
        0.875: "half of each neighbourhood: that is its edge, not the centre of its outermost cell",
        0.4: "three levels, not one",
        1.75 / 3: "this is the reach with K = 3",
        0.35: "one cell a level: with K = 5 the outermost cell is the second one from the middle",
    })  # fmt: skip


PUSHES = (
    [0.3, 0.0, 0.2, 0.2],
    [-0.2, 0.4, 0.2, 0.2],
    [0.1, 0.1, 0.2, 0.2],
)  # of (x, y, w, h), at three levels


def pushed(box: Tensor) -> Tensor:
    """What a box (x, y, w, h) that is pushed and grows becomes at three levels, "l b t 4"."""
    return adaptor.stop(box + torch.tensor(PUSHES))[:, None, None]


@exercise("slan.whole", "change")
def whole(predicted: Any, measured: Any) -> str:
    """Eq. 3 of a proposal that is the whole image and of one of half its sides, under the same pushes."""
    if message := prediction(predicted, ("zero", "above zero")):
        return message
    half = torch.tensor([0.5, 0.5, 0.5, 0.5])
    mean, valid = adaptor.regression_target(pushed(half)), torch.ones(1, 1, dtype=torch.bool)
    right = {
        "whole": 0.0,
        "half": float(adaptor.regression_loss(adaptor.stop(half)[None, None], mean, valid)),
    }

    def not_stopped(box: Tensor) -> float:
        pushed_out = convert(box + torch.tensor(PUSHES), "cxcywh", "xyxy")[:, None, None]
        return float(adaptor.regression_loss(adaptor.stop(box)[None, None], pushed_out.mean(0), valid))

    message = named_numbers(measured, right, within=1e-3, hints={
        not_stopped(half): "the pushed boxes must `stop` at the border",
        not_stopped(torch.tensor([0.5, 0.5, 1.0, 1.0])): "the pushed boxes must `stop` at the border",
        right["half"]: "the two have changed places",
    })  # fmt: skip
    if message:
        return f"measured: {message}"
    return (
        "" if predicted == "zero" else "look at the loss of `whole` again: it is not what you have predicted"
    )


@exercise("slan.matching", "compute")
def matching(answer: Any) -> str:
    """Eq. 4 of three pairs whose logits of "matched" are 1, 2 and -3, by pair."""
    logits = {"true": 1, "other text": 2, "other image": -3}
    right = {name: math.log(1 + math.exp(-x if name == "true" else x)) for name, x in logits.items()}
    return named_numbers(answer, right, within=0.004, hints={
        math.log(1 + math.e): "this is -log of the wrong answer: the pair belongs together",
        math.log(1 + math.exp(-2)): "this is -log of the wrong answer: the pair does not belong together",
        math.log(1 + math.exp(3)): "this is -log of the wrong answer: the pair does not belong together",
        **{math.exp(-value): "this is a probability: take -log of it" for value in right.values()},
        **{float(x): "this is the logit: take -log of the softmax" for x in logits.values()},
    })  # fmt: skip


@exercise("slan.lonely", "compute")
def lonely(answer: Any) -> str:
    """The region-word contrast of b = 4 pairs: words first pass the literal Eq. 1 with the one region of each image."""
    return number(answer, math.log(4), within=0.004, hints={
        0.0: "every caption fits every image perfectly, the wrong ones too",
        4.0: "the logarithm of the number of rivals",
        math.log(2): "this is the loss of two pairs",
        math.log(3): "the true pair is in the denominator as well",
    })  # fmt: skip


@exercise("slan.median", "compute")
def median(answer: Any) -> str:
    """The least median rank that goes with R@1 = 46.8 % of 1,000 queries."""
    return number(answer, 2.0, within=0.01, hints={
        1.5: "1.5 needs the 500th query at rank 1",
        1.0: "fewer than half of the queries have rank 1",
    })  # fmt: skip
