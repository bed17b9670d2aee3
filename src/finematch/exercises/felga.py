"""Checks of the exercises of `felga/1_lesson`."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from finematch.exercises import exercise, function, named_numbers, number, prediction, random, tensor
from finematch.models import felga
from finematch.tables import published


def every(similarity: Tensor) -> Tensor:
    return torch.ones_like(similarity, dtype=torch.bool)


@exercise("felga.dynamic", "build")
def dynamic(answer: Any) -> str:
    """Eq. 5 and 6 for one image and text: similarities "r k" -> labels "r k"."""

    def library(s: Tensor) -> Tensor:
        return felga.dynamic(s[None], every(s)[None])[0].float()

    def said(s: Tensor) -> Tensor:
        found = answer(s)
        return found.float() if isinstance(found, Tensor) else found

    if not callable(answer):
        return f"give a function, not {type(answer).__name__}"
    tie = torch.tensor([[0.5, 0.5], [1.0, 0.0]])  # two equal their mean
    many = random(6, 7, seed=2).exp()  # each slip gives other labels here
    return function(said, library, [(many,), (random(5, 2, seed=3),), (tie,)], slips={
        "this is the median of all similarities: Eq. 5 is their mean": lambda s: (s >= s.median()).float(),
        "0 is the threshold here: Eq. 5 is the mean of these similarities": lambda s: (s >= 0).float(),
        "½ is the threshold here: Eq. 5 is the mean of these similarities": lambda s: (s >= 0.5).float(),
        "Eq. 6 has ≥: a similarity that equals the mean is a positive": lambda s: (s > s.mean()).float(),
        "each keyword has its own threshold here: Eq. 5 is one mean over all pairs": lambda s: (s >= s.mean(0)).float(),
        "each region has its own threshold here: Eq. 5 is one mean over all pairs":
            lambda s: (s >= s.mean(1, keepdim=True)).float(),
        "these are the sparse labels of Eq. 4": lambda s: felga.sparse(s[None], every(s)[None])[0].float(),
        "the labels are the wrong way round": lambda s: 1 - library(s),
    })  # fmt: skip


@exercise("felga.unrelated", "compute")
def unrelated(answer: Any) -> str:
    """How many positives each label finds in a text of ten keywords that has nothing to do with its ten boxes."""
    right = {"dense": 100.0, "sparse": 10.0, "dynamic": 50.0}
    return named_numbers(
        answer, right, within=0.1, hints={0: "no label of the three can say that nothing fits"}
    )


@exercise("felga.third", "change")
def third(predicted: Any, measured: Any) -> str:
    """What a third box that shows nothing does to the dynamic labels of two boxes and two words."""
    if message := prediction(predicted, ("more", "fewer", "as many")):
        return message
    both = torch.tensor([[0.9, 0.5], [0.5, 0.9], [-0.6, -0.4]])
    right = felga.dynamic(both[None], every(both)[None])[0].float()
    message = tensor(measured, right, slips={
        "measured: these are the labels without the third box": torch.tensor([[1.0, 0], [0, 1], [0, 0]])})  # fmt: skip
    if message:
        return message if message.startswith("measured") else f"measured: {message}"
    return "" if predicted == "more" else "count the positives again: it is not what you have predicted"


@exercise("felga.relu", "compute")
def relu(answer: Any) -> str:
    """The cosine of two independent normal vectors after a ReLU."""
    return number(answer, 1 / math.pi, within=0.005, hints={
        1 / (2 * math.pi): "this is the mean product: divide by the mean square of one of them",
        0.5: "this is the mean square: asked is a cosine",
        0.0: "that is the cosine before the ReLU: after it all numbers are positive",
        2 / math.pi: "this is with absolute values: a ReLU sets negative numbers to 0",
        0.25: "this is the share of places where both are positive: their sizes count as well",
        0.3: "near: give at least two digits",
    })  # fmt: skip


@exercise("felga.limit", "compute")
def limit(answer: Any) -> str:
    """The temperature below which the hinge of Eq. 10 can close for 10 positives and 70 negatives."""
    return number(answer, 1.5 / math.log(700), within=0.005, hints={
        2 / (math.log(700) + 0.5): "tau divides lambda1, too",
        1.5 / math.log(80): "the logarithms of both sums are added: ln 10 + ln 70",
        0.5 / math.log(700): "the best similarities are 1 and -1: the difference is 2, less the margin",
    })  # fmt: skip


@exercise("felga.best", "build")
def best(answer: Any) -> str:
    """Eq. 11: similarities "b r c k" and which are real -> "b c"."""

    def library(s: Tensor, real: Tensor) -> Tensor:
        return felga.global_affinity(s, real)[0]

    def over(s: Tensor, real: Tensor, how: str) -> Tensor:
        s = s.transpose(1, 2).flatten(2)
        real = real.transpose(1, 2).flatten(2)
        if how == "mean":
            return s.masked_fill(~real, 0).sum(-1) / real.sum(-1)
        return s.max(-1).values

    if not callable(answer):
        return f"give a function, not {type(answer).__name__}"
    real = torch.ones(2, 3, 2, 4, dtype=torch.bool)
    if isinstance(answer(random(2, 3, 2, 4), real), tuple):
        return "your function returns several things: return the maxima alone"
    real[:, 2], real[:, :, 1, 3] = False, False
    s = random(2, 3, 2, 4)
    s[:, 2] = 9.0  # padding, which is nearest
    opposite = -random(2, 3, 2, 4, seed=5).abs()  # all cosines are negative
    cases = [(random(2, 3, 2, 4, seed=4), torch.ones_like(real)), (s, real), (opposite, real)]
    return function(answer, library, cases, slips={
        "padding counts as 0 here, which is more than a negative cosine": lambda s, r: (s * r).amax((1, 3)),
        "padding is among the fragments": lambda s, r: over(s, r, "max"),
        "the mean over fragments: Eq. 11 takes the best pair": lambda s, r: over(s, r, "mean"),
        "rows are texts here: image k, text l stands at [k, l]": lambda s, r: library(s, r).T,
    })  # fmt: skip


@exercise("felga.weight", "compute")
def weight(answer: Any) -> str:
    """lambda_3 in terms of means, if both terms are sums over 80 x 80 and 8 x 8 places."""
    return number(answer, 0.002, within=0.0001, hints={
        20.0: "the other way round: the fragment term has more places",
        0.02: "both axes count: 80 x 80 places, and 8 x 8",
    })  # fmt: skip


@exercise("felga.ties", "compute")
def ties(answer: Any) -> str:
    """AP of a constant score with three relevant items of five: ties against the model, and for it."""
    right = {"against": (1 / 3 + 2 / 4 + 3 / 5) / 3, "for": 1.0}
    swapped = "the other way round: ties against the model put the irrelevant items first"
    return named_numbers(answer, right, within=0.003, hints={
        right["for"]: swapped,
        right["against"]: swapped,
        47.8: "give shares of 1, not per cent",
        100.0: "give shares of 1, not per cent",
        0.7283: "this is the average over all orders",
        0.6: "precision of the whole list: AP is the mean of the precisions at each relevant item",
    })  # fmt: skip


ASKED = "Microsoft COCO 2017 Description Assignment"


@exercise("felga.gains", "compute")
def gains(answer: Any) -> str:
    """What the global term gains in description assignment, COCO 2017, by label (Table 5)."""
    cells = published("FELGA", 5).pivot(index="row", columns="column", values="value")
    with_it = {row: next(name for name in cells.index if name.startswith(f"{row} +"))
               for row in ("Dense", "Sparse", "Dynamic")}  # fmt: skip
    gain = {row: cells.loc[name] - cells.loc[row] for row, name in with_it.items()}
    right = {row: float(of[ASKED]) for row, of in gain.items()}
    if message := named_numbers(answer, right, within=math.inf):
        return message  # no dictionary, a row is missing, no number
    for row, of in gain.items():
        other = {name: float(value) for name, value in of.items() if name != ASKED}
        hints = {
            value: f"the wrong column: this is the gain in {name.removeprefix('Microsoft ')}"
            for name, value in other.items()
        }
        hints[-right[row]] = "the sign: it is the row with “+” less the row without"
        if message := named_numbers(answer, {row: right[row]}, within=0.03, hints=hints):
            return message
    return ""
