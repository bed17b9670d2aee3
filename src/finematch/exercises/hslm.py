"""Checks of the exercises of `hslm/1_lesson`."""

from __future__ import annotations

import math
from itertools import product
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from finematch.exercises import exercise, function, named_numbers, number, prediction, random
from finematch.models import hslm
from finematch.tables import published


@exercise("hslm.short", "compute")
def short(answer: Any) -> str:
    """By what factor |E_f| / |E| is smaller if the word vectors have deviation 0.1 / sqrt(3) in place of 1.

    Measured with fresh weights, that of the softmax is about 1.05.
    """
    return named_numbers(answer, {"word": 300.0, "channel": 300.0, "softmax": 1.0}, within=0.1, hints={
        math.sqrt(300): "E_f is cubic in E, and E itself has become shorter as well: count the powers",
        300**1.5: "this is the factor of E_f alone; asked is that of the ratio of E_f to E",
        1 / 300: "asked is how much shorter: the inverse",
    })  # fmt: skip


@exercise("hslm.words", "build")
def words(answer: Any) -> str:
    """Eq. 6 with a residual: words "l e" and the matrices of keys, queries and values "e e" -> "l e"."""

    def library(e: Tensor, key: Tensor, query: Tensor, value: Tensor) -> Tensor:
        layer = hslm.WordSelfAttention(e.shape[1], residual=True).requires_grad_(False)
        for name, weight in (("key", key), ("query", query), ("value", value)):
            getattr(layer, name).weight.copy_(weight)
        return layer(e[None], torch.ones(1, len(e), dtype=torch.bool))[0]

    def by_hand(e: Tensor, key: Tensor, query: Tensor, value: Tensor, *, divide: bool = True, skip: bool = True,
                softmax: bool = False) -> Tensor:  # fmt: skip
        relations = (e @ key.T) @ (e @ query.T).T
        relations = relations.softmax(1) if softmax else relations / len(e) if divide else relations
        return relations @ (e @ value.T) + (e if skip else 0)

    cases = [(random(n, 4, seed=n), *(random(4, 4, seed=n + k) for k in (1, 2, 3))) for n in (3, 5)]
    return function(answer, library, cases, slips={
        "the relations are not divided by the number of words": lambda *a: by_hand(*a, divide=False),
        "the residual is missing: each word is lost": lambda *a: by_hand(*a, skip=False),
        "Eq. 6 has no softmax": lambda *a: by_hand(*a, softmax=True),
        "the matrices stand on the wrong side: a layer maps e to e W'": lambda e, k, q, v: by_hand(e, k.T, q.T, v.T),
        "keys and queries have changed places": lambda e, k, q, v: by_hand(e, q, k, v),
    })  # fmt: skip


@exercise("hslm.contexts", "build")
def contexts(answer: Any) -> str:
    """Eq. 15 and 16: words "l d", regions "n d", a scale -> unit contexts "l d"."""

    def by_hand(w: Tensor, r: Tensor, scale: float, *, unit: bool = True, softmax: bool = False) -> Tensor:
        f = scale * w @ r.T
        found = (f.softmax(1) if softmax else f.sigmoid()) @ r
        return F.normalize(found, dim=1) if unit else found

    cases = [(F.normalize(random(m, 5, seed=m), dim=1), F.normalize(random(n, 5, seed=n + 20), dim=1), scale)
             for m, n, scale in ((3, 4, 4.0), (6, 2, 9.0))]  # fmt: skip
    return function(answer, by_hand, cases, slips={
        "the contexts are not unit vectors": lambda w, r, s: by_hand(w, r, s, unit=False),
        "Eq. 16 is a sigmoid: regions do not compete": lambda w, r, s: by_hand(w, r, s, softmax=True),
        "the scale is missing": lambda w, r, s: by_hand(w, r, 1.0),
    })  # fmt: skip


@exercise("hslm.longer", "change")
def longer(raw: Any, l1: Any, measured: Any) -> str:
    """What saying a caption twice does to the logit, with gates added and with gates averaged."""
    for name, predicted in (("raw", raw), ("l1", l1)):
        if message := prediction(predicted, ("higher", "lower", "the same")):
            return f"{name}: {message}"
    expected = {"raw": 2 * (2.0965 - 0.5) + 0.5, "l1": 2.4430}
    if not isinstance(measured, dict) or set(measured) != set(expected):
        return "measured: give a dict with the logits of the caption said twice, by the keys 'raw' and 'l1'"
    hints = {"raw": {2.0965: "this is the caption said once"}, "l1": {expected["raw"]: "these gates are added"}}
    for name, right in expected.items():
        if message := number(measured[name], right, hints=hints[name]):
            return f"measured, {name}: {message}"
    return (
        ""
        if (raw, l1) == ("higher", "the same")
        else "look at the logits again: it is not what you have predicted"
    )


@exercise("hslm.hinge", "build")
def hardest(answer: Any) -> str:
    """Eq. 23 of scores "b b" with the hardest negatives and a margin of 0.2, summed over the batch."""

    def library(scores: Tensor) -> Tensor:
        return hslm.hinge(scores, torch.eye(len(scores), dtype=torch.bool))

    def one_way(scores: Tensor) -> Tensor:
        excess = (0.2 - scores.diagonal()[:, None] + scores).clamp(min=0)
        return excess.masked_fill(torch.eye(len(scores), dtype=torch.bool), 0.0).amax(1).sum()

    def all_of_them(scores: Tensor) -> Tensor:
        total = scores.new_zeros(())
        for table in (scores, scores.T):
            excess = (0.2 - table.diagonal()[:, None] + table).clamp(min=0)
            total = total + excess.masked_fill(torch.eye(len(scores), dtype=torch.bool), 0.0).sum()
        return total

    def with_itself(scores: Tensor) -> Tensor:
        return sum((0.2 - t.diagonal()[:, None] + t).clamp(min=0).amax(1).sum() for t in (scores, scores.T))

    def masked_by_zero(scores: Tensor) -> Tensor:
        itself = torch.eye(len(scores), dtype=torch.bool)
        rivals = scores.masked_fill(itself, 0.0)
        return sum((0.2 - scores.diagonal() + rivals.amax(side)).clamp(min=0).sum() for side in (0, 1))

    cases = [(random(n, n, seed=n).sigmoid(),) for n in (3, 6)]
    return function(answer, library, [*cases, (random(5, 5, seed=5).sigmoid() - 1,)], slips={
        "0 is higher than a negative score: mask with -inf": masked_by_zero,
        "only captions are negatives: the hardest image of each caption is missing": one_way,
        "only images are negatives: the hardest caption of each image is missing": lambda s: one_way(s.T),
        "all negatives are added: only the hardest counts": all_of_them,
        "a pair is its own negative: leave out the diagonal": with_itself,
        "the mean over the batch: Eq. 23 is a sum": lambda s: library(s) / len(s),
    })  # fmt: skip


@exercise("hslm.half", "compute")
def half(answer: Any) -> str:
    """The lead at which the contrastive loss with scale 10 has fallen to half of ln B, for B = 128."""
    right = math.log(127 / (math.sqrt(128) - 1)) / 10
    return number(answer, right, within=0.005, hints={10 * right: "the scores are multiplied by 10"})


@exercise("hslm.signal", "compute")
def signal(answer: Any) -> str:
    """The signal, in deviations of the noise, from which telling pairs apart pays: by batch size."""
    if isinstance(answer, dict) and set(answer) == {32, 128, 1024}:
        answer = {f"B = {size}": value for size, value in answer.items()}
    right = {"B = 32": 2.06, "B = 128": 2.60, "B = 1024": 3.24}
    message = named_numbers(answer, right, within=0.05)
    if message and not named_numbers(answer, right, within=0.15):
        return f"{message.partition(':')[0]}: near, but drawn too few times: average over 1,000 repetitions"
    return message


@exercise("hslm.modules", "compute")
def modules(answer: Any) -> str:
    """What each module gains in the published Rsum, a mean over the pairs of rows that differ in it alone."""
    cells = published("HSLM", 4).query("column == 'Rsum'").set_index("row")["value"].to_dict()
    names = ("mgcn", "self_attn", "glob", "cross_attn and loc")
    on = {"1": "g", "2": "sg", "3": "mg", "4": "msg", "5": "l", "6": "sl", "7": "ml", "8": "msl", "9": "gl",
          "10": "sgl", "11": "mgl", "12": "msgl"}  # fmt: skip
    right = {}
    for name, letter in zip(names, "msgl", strict=True):
        gains = [cells[b] - cells[a] for a, b in product(on, on) if set(on[b]) - set(on[a]) == {letter}
                 and set(on[a]) < set(on[b])]  # fmt: skip
        right[name] = sum(gains) / len(gains)
    return named_numbers(answer, right, within=0.01)
