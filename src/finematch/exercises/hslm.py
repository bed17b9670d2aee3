"""Checks of the exercises of `hslm/1_lesson`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from itertools import product
from statistics import mean
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

    def by_hand(e: Tensor, key: Tensor, query: Tensor, value: Tensor, *, by: float | None = None,
                added: Tensor | float | None = None, softmax: bool = False) -> Tensor:  # fmt: skip
        relations = (e @ key.T) @ (e @ query.T).T / (by or len(e))
        relations = relations.softmax(1) if softmax else relations
        return relations @ (e @ value.T) + (e if added is None else added)

    def channel(e: Tensor, key: Tensor, query: Tensor, value: Tensor) -> Tensor:
        return (e @ value.T) @ ((e @ query.T).T @ (e @ key.T)) / len(e) + e

    cases = [(random(n, 4, seed=n), *(random(4, 4, seed=n + k) for k in (1, 2, 3))) for n in (3, 5)]
    return function(answer, library, cases, slips={
        "the relations are not divided by the number of words": lambda *a: by_hand(*a, by=1.0),
        "divide by the number of words, not by their width e": lambda *a: by_hand(*a, by=float(a[0].shape[1])),
        "divide by the number of words, not by the root of their width e":
            lambda *a: by_hand(*a, by=a[0].shape[1] ** 0.5),
        "the residual is missing: each word is lost": lambda *a: by_hand(*a, added=0.0),
        "the residual adds the words E, not their values": lambda e, k, q, v: by_hand(e, k, q, v, added=e @ v.T),
        "Eq. 6 has no softmax": lambda *a: by_hand(*a, by=1.0, softmax=True),
        "Eq. 6 has no softmax, and divides by the number of words":
            lambda *a: by_hand(*a, by=a[0].shape[1] ** 0.5, softmax=True),
        "this is the form `channel`; asked is `word`, which relates words with words": channel,
        "the matrices stand on the wrong side: a layer maps e to e W'": lambda e, k, q, v: by_hand(e, k.T, q.T, v.T),
        "keys and queries have changed places": lambda e, k, q, v: by_hand(e, q, k, v),
    })  # fmt: skip


@exercise("hslm.contexts", "build")
def contexts(answer: Any) -> str:
    """Eq. 15 and 16: words "l d", regions "n d", a scale -> unit contexts "l d"."""

    def by_hand(
        w: Tensor, r: Tensor, scale: float, *, length: str = "unit", squash: str = "sigmoid"
    ) -> Tensor:
        f = scale * w @ r.T
        f = {"sigmoid": f.sigmoid(), "softmax": f.softmax(1), "none": f}[squash]
        f = f / {"mean": len(r), "share": f.sum(1, keepdim=True)}.get(length, 1)
        return F.normalize(f @ r, dim=1 - (length == "channel")) if length in ("unit", "channel") else f @ r

    cases = [(F.normalize(random(m, 5, seed=m), dim=1), F.normalize(random(n, 5, seed=n + 20), dim=1), scale)
             for m, n, scale in ((3, 4, 4.0), (6, 2, 9.0))]  # fmt: skip
    return function(answer, by_hand, cases, slips={
        "the contexts are not unit vectors": lambda w, r, s: by_hand(w, r, s, length="raw"),
        "this divides by the number of regions: divide each context by its own length":
            lambda w, r, s: by_hand(w, r, s, length="mean"),
        "this divides by the sum of the weights: divide each context by its own length":
            lambda w, r, s: by_hand(w, r, s, length="share"),
        "each channel is made unit: each context, a row, should be": lambda w, r, s: by_hand(w, r, s, length="channel"),
        "Eq. 16 is a sigmoid: regions do not compete": lambda w, r, s: by_hand(w, r, s, squash="softmax"),
        "the sigmoid of Eq. 16 is missing": lambda w, r, s: by_hand(w, r, s, squash="none"),
        "the scale has no effect: it is missing, or outside the sigmoid, where it cancels":
            lambda w, r, s: by_hand(w, r, 1.0),
        "multiply by the scale, do not divide": lambda w, r, s: by_hand(w, r, 1 / s),
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
    hints = {
        "raw": {2.0965: "this is the caption said once"},
        "l1": {expected["raw"]: "these gates are added"},
    }
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

    def brackets(scores: Tensor, margin: float = 0.2, sign: int = 1) -> Tensor:
        rivals = scores.masked_fill(torch.eye(len(scores), dtype=torch.bool), -math.inf)
        return torch.stack([margin + sign * (rivals.amax(side) - scores.diagonal()) for side in (0, 1)])

    def one_rival(scores: Tensor) -> Tensor:
        rivals = scores.masked_fill(torch.eye(len(scores), dtype=torch.bool), -math.inf)
        return rivals.max() - scores.diagonal()

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
        "a bracket is never below 0: [z]+ is missing": lambda s: brackets(s).sum(),
        "the sign: a true pair with a high score makes the loss smaller":
            lambda s: brackets(s, sign=-1).clamp(min=0).sum(),
        "the margin is missing": lambda s: brackets(s, margin=0.0).clamp(min=0).sum(),
        "there are two brackets for each pair: here only the larger one counts":
            lambda s: brackets(s).clamp(min=0).amax(0).sum(),
        "each pair has a hardest negative of its own, not one for the whole batch":
            lambda s: 2 * (0.2 + one_rival(s)).clamp(min=0).sum(),
    })  # fmt: skip


@exercise("hslm.half", "compute")
def half(answer: Any) -> str:
    """The lead at which the contrastive loss with scale 10 has fallen to half of ln B, for B = 128, and what is then
    left of the hinge, as a share of its plateau, if it compares logits, and if it compares their sigmoids."""
    lead = math.log(127 / (math.sqrt(128) - 1)) / 10
    right = {"lead": lead, "logit": 0.0, "sigmoid": (0.7 - 1 / (1 + math.exp(-lead))) / 0.2}
    message = named_numbers(answer, right, within=0.005, hints={
        10 * lead: "the logits are multiplied by 10",
        0.2 * right["sigmoid"]: "this is one bracket: give it as a share of its plateau, 0.2",
        (0.2 - lead) / 0.2: "a bracket is never below 0",
    })  # fmt: skip
    if message.startswith("sigmoid") and answer["sigmoid"] == answer["logit"]:
        return "sigmoid: this is the answer for logits; their sigmoids are closer together"
    return message


@exercise("hslm.signal", "compute")
def signal(answer: Any) -> str:
    """The signal, in deviations of the noise, from which telling pairs apart pays: by batch size."""
    if isinstance(answer, dict):
        answer = {name if name == "mean" else f"B = {name}": value for name, value in answer.items()}
    right = {"B = 32": 2.06, "B = 128": 2.60, "B = 1024": 3.24, "mean": 0.0}
    message = named_numbers(answer, right, within=0.05)
    if message and not named_numbers(
        answer, {"B = 32": 2.34, "B = 128": 2.82, "B = 1024": 3.44}, within=0.03
    ):
        return "this is the largest absolute value: the hardest negative has the largest value"
    if message and not named_numbers(answer, right, within=0.15):
        return f"{message.partition(':')[0]}: near, but drawn too few times: average over 1,000 repetitions"
    return message


@exercise("hslm.modules", "compute")
def modules(answer: Any) -> str:
    """What each module gains in the published Rsum, a mean over the pairs of rows that differ in it alone; and the row
    whose Rsum is not the sum of its recalls."""
    printed = published("HSLM", 4).pivot(index="row", columns="column", values="value")
    cells, recalls = printed["Rsum"].to_dict(), printed.drop(columns="Rsum").sum(axis=1).to_dict()
    names = ("mgcn", "self_attn", "glob", "cross_attn and loc")
    on = {"1": "g", "2": "sg", "3": "mg", "4": "msg", "5": "l", "6": "sl", "7": "ml", "8": "msl", "9": "gl",
          "10": "sgl", "11": "mgl", "12": "msgl"}  # fmt: skip

    def paired(values: Mapping[str, float]) -> dict[str, float]:
        return {name: mean(values[b] - values[a] for a, b in product(on, on)
                           if set(on[a]) < set(on[b]) and set(on[b]) - set(on[a]) == {letter})
                for name, letter in zip(names, "msgl", strict=True)}  # fmt: skip

    right = paired(cells)
    slips = {
        "the sign: the row with the module, minus the row without it": {
            n: -gain for n, gain in right.items()
        },
        "take the printed Rsum, not the sum of the recalls": paired(recalls),
        "these are points per recall: asked is the gain in Rsum": {n: gain / 6 for n, gain in right.items()},
        "this is row 12 against one other row: take all pairs": {
            name: cells["12"] - next(cells[row] for row in on if set(on[row]) == set("msgl") - {letter})
            for name, letter in zip(names, "msgl", strict=True)
        },
        "some rows are in no pair: compare only rows that differ in this module alone": {
            name: mean(cells[row] for row in on if letter in on[row])
            - mean(cells[row] for row in on if letter not in on[row])
            for name, letter in zip(names, "msgl", strict=True)
        },
    }
    message = named_numbers(answer, {**right, "row": 2}, within=0.01)
    if message.startswith("row: the number"):
        return "row: the six recalls of this row sum to its Rsum, to 0.1"
    for hint, slip in slips.items():
        if message and not named_numbers(answer, slip, within=0.01):
            return hint
    return message
