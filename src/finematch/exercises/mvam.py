"""Checks of the exercises of `mvam/1_lesson`."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from finematch.encoders import Tokens
from finematch.exercises import exercise, function, named_numbers, number, prediction, random, tensor
from finematch.losses import contrastive
from finematch.models import mvam
from finematch.tables import published


@exercise("mvam.collisions", "compute")
def collisions(answer: Any) -> str:
    """Pairs of captions of one image in a batch of 1,024 of COCO's training captions, drawn without replacement."""
    pairs, captions = math.comb(1024, 2), 5 * 113_287
    return number(answer, pairs * 4 / (captions - 1), hints={
        2 * pairs * 4 / (captions - 1): "each pair was counted twice",
        pairs * 5 / captions: "a caption is no other caption of its image: four are left, of all others",
        1024 * 4 / (captions - 1): "this is the number for one caption, times the batch's size: count pairs",
    })  # fmt: skip


@exercise("mvam.contrast", "build")
def contrast(answer: Any) -> str:
    """Eq. 5 and 6 of unit vectors and 1 / tau."""
    cases = [(F.normalize(random(n, 6, seed=n), dim=1), F.normalize(random(n, 6, seed=n + 9), dim=1), scale)
             for n, scale in ((3, 5.0), (7, 14.0))]  # fmt: skip

    def one_way(image: Tensor, text: Tensor, scale: float) -> Tensor:
        return F.cross_entropy(scale * image @ text.T, torch.arange(len(image)))

    def both_ways(image: Tensor, text: Tensor, scale: float) -> Tensor:
        return contrastive(image, text, scale)

    def mean_of(loss: Callable[[Tensor], Tensor], image: Tensor, text: Tensor, scale: float) -> Tensor:
        logits = scale * image @ text.T
        return (loss(logits) + loss(logits.T)) / 2

    def others_alone(logits: Tensor) -> Tensor:
        own = torch.eye(len(logits), dtype=torch.bool)
        return (logits.masked_fill(own, -math.inf).logsumexp(1) - logits.diagonal()).mean()

    def twice(logits: Tensor) -> Tensor:
        return F.cross_entropy(logits.softmax(1), torch.arange(len(logits)))

    return function(answer, contrastive, cases, slips={
        "only images are asked for their captions: the captions' direction is missing": one_way,
        "only captions are asked for their images: the images' direction is missing": lambda i, t, s: one_way(t, i, s),
        "the two directions are added, and the half before them is missing": lambda i, t, s: 2 * contrastive(i, t, s),
        "the temperature is missing": lambda i, t, s: contrastive(i, t, 1.0),
        "scale is 1/tau already: multiply by it, do not divide": lambda i, t, s: both_ways(i, t, 1 / s),
        "the sign: a loss is minus the mean of the logarithms": lambda i, t, s: -both_ways(i, t, s),
        "the sum over the batch, not its mean": lambda i, t, s: len(i) * both_ways(i, t, s),
        "the sum over the batch and over both directions: both are means":
            lambda i, t, s: 2 * len(i) * both_ways(i, t, s),
        "the own pair is left out of the denominator": lambda *a: mean_of(others_alone, *a),
        "the softmax is taken twice: `cross_entropy` takes logits": lambda *a: mean_of(twice, *a),
        "the logarithm has base e, not 2": lambda i, t, s: both_ways(i, t, s) / math.log(2),
    })  # fmt: skip


@exercise("mvam.sharp", "change")
def sharp(predicted: Any, measured: Any) -> str:
    """What ten times the code does to the attention of section 4's two views."""
    keys = torch.tensor([[[2.0, 0], [0, 2], [1, 1]]])
    codes = torch.tensor([[10 * math.log(2), 0], [0, 10 * math.log(2)]])
    right = (codes @ keys[0].T).softmax(-1)[None]
    once = (codes @ keys[0].T / 10).softmax(-1)[None]
    if message := prediction(predicted, ("sharper", "flatter", "the same")):
        return message
    if message := tensor(measured, right, slips={"these are the weights of the codes as they were": once}):
        return f"measured: {message}"
    return "" if predicted == "sharper" else "look at the weights again: it is not what you have predicted"


@exercise("mvam.views", "build")
def views(answer: Any) -> str:
    """Eq. 7 to 9 of codes "m k", keys "b n k" and mask "b n": "b (m k)"."""

    def library(codes: Tensor, keys: Tensor, mask: Tensor) -> Tensor:
        m, k = codes.shape
        layer = mvam.ViewAttention(k, views=m, projection="shared", view_dim=k)
        with torch.no_grad():
            layer.project.weight.copy_(torch.eye(k))
            layer.project.bias.zero_()
            layer.codes.copy_(codes)
            return layer(Tokens(keys, mask, torch.zeros_like(mask), keys[:, 0])).vector

    def by_hand(codes: Tensor, keys: Tensor, mask: Tensor, *, over: int = -1, hidden: float | None = -math.inf,
                scale: float = 1.0, late: bool = False) -> Tensor:  # fmt: skip
        logits = torch.einsum("vk,bnk->bvn", codes, keys) * scale
        if hidden is not None:
            logits = logits.masked_fill(~mask[:, None], hidden)
        weights = logits.softmax(over).nan_to_num()
        weights = weights * mask[:, None] if late else weights
        return torch.einsum("bvn,bnk->bvk", weights, keys).flatten(1)

    def emptied(codes: Tensor, keys: Tensor, mask: Tensor) -> Tensor:
        return by_hand(codes, keys * mask[..., None], mask, hidden=None)

    def other_order(codes: Tensor, keys: Tensor, mask: Tensor) -> Tensor:
        return library(codes, keys, mask).unflatten(1, codes.shape).mT.flatten(1)

    masks = torch.ones(2, 5, dtype=torch.bool), torch.tensor([[True] * 4, [True, True, False, False]])
    cases = [(random(3, 4), random(len(mask), mask.shape[1], 4, seed=1), mask) for mask in masks]
    return function(answer, library, cases, slips={
        "the softmax runs over the views: it runs over the tokens": lambda c, k, m: by_hand(c, k, m, over=1),
        "padding is attended to": lambda c, k, m: by_hand(c, k, m, hidden=None),
        "a logit of 0 still gets a weight: padding needs a logit of -inf": lambda c, k, m: by_hand(c, k, m, hidden=0.0),
        "the mask comes after the softmax: the weights of the real tokens no longer sum to 1":
            lambda c, k, m: by_hand(c, k, m, hidden=None, late=True),
        "a key of 0 still gets a weight: the weights of the real tokens no longer sum to 1": emptied,
        "the order is (k m): put the k numbers of one view next to each other": other_order,
        "the logits are divided by sqrt(k), which is not printed": lambda c, k, m: by_hand(c, k, m, scale=0.5),
    })  # fmt: skip


@exercise("mvam.permuted", "change")
def permuted(both: Any, one: Any, measured: Any, answers: tuple[Tensor, Tensor]) -> str:
    """The score of `answers`, "m k" of an image and of a caption, with the views of both sides, and of one, in another
    order."""
    for name, predicted in (("both", both), ("one", one)):
        if message := prediction(predicted, ("higher", "lower", "the same")):
            return f"{name}: {message}"
    total, moved, broken = measured
    image, text = (side.double().flatten() for side in answers)
    slips = {
        "measured, the score as it is: this is the mean of the views' cosines; the score is one cosine": (
            torch.cosine_similarity(*answers).mean()
        ),
        "measured, the score as it is: the vectors are not scaled to unit length": image @ text,
    }
    hints = {float(slip): hint for hint, slip in slips.items()}
    right = float(torch.cosine_similarity(image, text, dim=0))
    if message := number(total, right, within=6e-4, hints=hints):
        return message if message in slips else f"measured, the score as it is: {message}"
    if abs(total - moved) > 1e-4:
        return "measured: permute both sides in the same way"
    if not broken < total:
        return "measured: permute one side alone"
    if (both, one) == ("the same", "lower"):
        return ""
    return "look at the scores again: they are not what you have predicted"


@exercise("mvam.diversity", "build")
def apart(answer: Any) -> str:
    """Eq. 10 of attention "b m n": the squared norm, mean over the batch."""
    cases = [(random(2, 4, 6).softmax(-1),), (random(3, 5, 3, seed=1).softmax(-1),)]

    def product(a: Tensor) -> Tensor:
        return a @ a.mT

    def excess(a: Tensor) -> Tensor:
        return product(a) - torch.eye(a.shape[1])

    def others(a: Tensor) -> Tensor:
        return excess(a).masked_fill(torch.eye(a.shape[1], dtype=torch.bool), 0.0)

    return function(answer, mvam.diversity, cases, slips={
        "the norm is not squared": lambda a: mvam.diversity(a, power=1),
        "the sum over the batch, not its mean": lambda a: mvam.diversity(a, reduce="sum"),
        "the identity is not subtracted": lambda a: product(a).square().sum((1, 2)).mean(),
        "the mean over the matrix, not its sum": lambda a: excess(a).square().mean(),
        "this compares tokens, n n: Eq. 10 compares views, m m": lambda a: excess(a.mT).square().sum((1, 2)).mean(),
        "the diagonal is left out: Eq. 10 charges it too": lambda a: others(a).square().sum((1, 2)).mean(),
        "absolute values are added: the norm adds squares": lambda a: excess(a).abs().sum((1, 2)).mean(),
        "this is Eq. 11: no root is drawn in Eq. 10": lambda a: mvam.diversity(a, variant="sqrt"),
    })  # fmt: skip


@exercise("mvam.floor", "compute")
def floor(answer: Any) -> str:
    """The lower bound of Eq. 10 that the rank of A A^T implies, for m views over l tokens, as a function of the two."""
    if not callable(answer):
        return f"give a function of the views and the tokens, not {type(answer).__name__}"
    for m, n in ((16, 12), (9, 9), (4, 30), (32, 5)):
        if message := number(answer(m, n), max(m - n, 0), hints={m - n: "a squared norm is not negative"}):
            return f"{m} views and {n} tokens: {message}"
    return ""


@exercise("mvam.gains", "compute")
def gains(answer: Any) -> str:
    """MVAM over +Attn on MSCOCO-5K, mean over the six recalls, by encoder."""
    cells = published("MVAM", 1).pivot(index="row", columns="column", values="value")

    def over(baseline: str, columns: str) -> dict[str, float]:
        chosen = cells[[name for name in cells.columns if name.startswith(columns)]]
        return {name: float((chosen.loc[f"{name} +MVAM"] - chosen.loc[f"{name} {baseline}"]).mean())
                for name in ("ViT", "FRCNN", "CLIP")}  # fmt: skip

    slips = {
        "this is over +[CLS]: there is another baseline": over("+[CLS]", "MSCOCO-5K"),
        "these are the paper's numbers on MSCOCO-1K: asked is MSCOCO-5K": over("+Attn", "MSCOCO-1K"),
        "this is the mean at rank 1 alone: take all six recalls": {
            name: (over("+Attn", "MSCOCO-5K i2t@1")[name] + over("+Attn", "MSCOCO-5K t2i@1")[name]) / 2
            for name in ("ViT", "FRCNN", "CLIP")
        },
    }
    message = named_numbers(answer, over("+Attn", "MSCOCO-5K"), within=0.015)
    if message:
        for hint, slip in slips.items():
            if not named_numbers(answer, slip, within=0.015):
                return hint
    return message
