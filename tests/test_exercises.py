"""Exercises of the lessons: solutions pass, empty cells do not, and each plausible slip is told by what is wrong."""

from __future__ import annotations

import math
import re
import zipfile

import nbformat
import pytest
import torch
import torch.nn.functional as F
from notebook_text import NOTEBOOKS

from finematch.exercises import KINDS, check, exercise, exercises, number, tensor
from finematch.handout import student_page, write_handout, write_student
from finematch.models import felga

METHODS = ("mvam", "hslm", "felga", "slan")
# Eq. 3 of exercise 6: boxes that stop at the border, boxes that leave the image
HALF, NOT_STOPPED, WHOLE_NOT_STOPPED = 1.0065, 1.2442, 1.0226


def softmax_over_views(codes, keys, mask):
    weights = torch.einsum("vk,bnk->bvn", codes, keys).softmax(1)
    return torch.einsum("bvn,bnk->bvk", weights, keys).flatten(1)


def without_mask(codes, keys, mask):
    weights = torch.einsum("vk,bnk->bvn", codes, keys).softmax(-1)
    return torch.einsum("bvn,bnk->bvk", weights, keys).flatten(1)


def mask_of_zeros(codes, keys, mask):
    weights = (torch.einsum("vk,bnk->bvn", codes, keys) * mask[:, None]).softmax(-1)
    return torch.einsum("bvn,bnk->bvk", weights, keys).flatten(1)


def numbers_first(codes, keys, mask):
    logits = torch.einsum("vk,bnk->bvn", codes, keys).masked_fill(~mask[:, None], -math.inf)
    return torch.einsum("bvn,bnk->bkv", logits.softmax(-1), keys).flatten(1)


def one_way(image, text, scale):
    return F.cross_entropy(scale * image @ text.T, torch.arange(len(image)))


def twice(image, text, scale):
    return one_way(image, text, scale) + one_way(text, image, scale)


def own_left_out(image, text, scale):
    logits, own = scale * image @ text.T, torch.eye(len(image), dtype=torch.bool)
    rest = (table.masked_fill(own, -math.inf).logsumexp(1) - table.diagonal() for table in (logits, logits.T))
    return sum(one.mean() for one in rest) / 2


def softmax_twice(image, text, scale):
    logits, own = scale * image @ text.T, torch.arange(len(image))
    return (F.cross_entropy(logits.softmax(1), own) + F.cross_entropy(logits.T.softmax(1), own)) / 2


def masked_late(codes, keys, mask):
    weights = torch.einsum("vk,bnk->bvn", codes, keys).softmax(-1) * mask[:, None]
    return torch.einsum("bvn,bnk->bvk", weights, keys).flatten(1)


def score_of(image, text):
    return float(F.cosine_similarity(image.flatten(), text.flatten(), dim=0))


def excess(a):
    return a @ a.mT - torch.eye(a.shape[1])


def filtered(words, key, query, value, by=None):
    return (words @ key.T) @ (words @ query.T).T / (by or len(words)) @ (words @ value.T)


def by_channel(words, key, query, value):
    return (words @ value.T) @ ((words @ query.T).T @ (words @ key.T)) / len(words) + words


def by_softmax(words, key, query, value, by=1.0):
    return ((words @ key.T) @ (words @ query.T).T / by).softmax(1) @ (words @ value.T) + words


def looked(words, regions, scale):
    return (scale * words @ regions.T).sigmoid() @ regions


def brackets(scores, margin=0.2):
    rivals = scores.masked_fill(torch.eye(len(scores), dtype=torch.bool), -math.inf)
    return torch.stack([margin - scores.diagonal() + rivals.amax(side) for side in (0, 1)])


def rival(scores):
    excess = (0.2 - scores.diagonal()[:, None] + scores).clamp(min=0)
    return excess.masked_fill(torch.eye(len(scores), dtype=torch.bool), 0.0).amax(1).sum()


def masked_by_zero(scores):
    rivals = scores.masked_fill(torch.eye(len(scores), dtype=torch.bool), 0.0)
    return sum((0.2 - scores.diagonal() + rivals.amax(side)).clamp(min=0).sum() for side in (0, 1))


def shifted(weights, extent, *, middle=True):
    steps = torch.arange(len(weights)) - (len(weights) // 2 if middle else 0)
    return (
        torch.stack([(weights.sum(0) * steps).sum(), (weights.sum(1) * steps).sum()]) * extent / len(weights)
    )


STEPS = torch.tensor([-1.0, 0, 1])
KEYS = torch.tensor([[2.0, 0], [0, 2], [1, 1]])
# of an image, of a caption
ANSWERS = torch.randn(2, 8, 6, generator=torch.Generator().manual_seed(0)).cumsum(0).unbind()
MODULES = {"mgcn": 7.53, "self_attn": 4.1, "glob": 6.4, "cross_attn and loc": 53.2, "row": 2}  # of exercise 8
SCORE, MOVED = score_of(*ANSWERS), score_of(ANSWERS[0].roll(1, 0), ANSWERS[1])
WRONG = {  # at least two plausible answers to each, and what is said to them
    "mvam.collisions": [
        ((7.4,), "counted twice"),
        ((1024 * 4 / (5 * 113_287),), "count pairs"),
        ((4000.0,), "too large"),
        (("many",), "give a number"),
    ],
    "mvam.contrast": [
        ((one_way,), "captions' direction is missing"),
        ((twice,), "half before them"),
        ((lambda i, t, s: len(i) * twice(i, t, s) / 2,), "sum over the batch, not its mean"),
        ((lambda i, t, s: len(i) * twice(i, t, s),), "both are means"),
        ((own_left_out,), "left out of the denominator"),
        ((softmax_twice,), "taken twice"),
        ((lambda i, t, s: twice(i, t, s) / 2 / math.log(2),), "base e"),
        ((lambda i, t, s: twice(i, t, 1.0) / 2,), "temperature is missing"),
        ((lambda i, t, s: twice(i / s, t, 1.0) / 2,), "do not divide"),
        ((lambda i, t, s: -twice(i, t, s) / 2,), "the sign"),
        ((lambda i, t, s: (s * i @ t.T).softmax(1),), "the shape is"),
        ((lambda i, t, s: None,), "returns nothing"),
    ],
    "mvam.views": [
        ((softmax_over_views,), "over the tokens"),
        ((without_mask,), "padding is attended"),
        ((mask_of_zeros,), "-inf"),
        ((masked_late,), "after the softmax: the weights of the real tokens no longer sum to 1"),
        ((lambda c, k, m: without_mask(c, k * m[..., None], m),), "a key of 0 still gets a weight"),
        ((numbers_first,), "next to each other"),
        ((lambda c, k, m: without_mask(c / 3, k, m),), "values are not"),
    ],
    "mvam.sharp": [
        (("sharper", (torch.eye(2) * math.log(2) @ KEYS.T).softmax(-1)[None]), "as they were"),
        (
            ("flatter", (torch.eye(2) * 10 * math.log(2) @ KEYS.T).softmax(-1)[None]),
            "not what you have predicted",
        ),
        (("louder", torch.ones(1, 2, 3)), "predict one of"),
    ],
    "mvam.permuted": [
        (("the same", "the same", (SCORE, SCORE, MOVED), ANSWERS), "not what you have predicted"),
        (("the same", "lower", (SCORE, MOVED, MOVED), ANSWERS), "both sides in the same way"),
        (("the same", "lower", (SCORE, SCORE, SCORE), ANSWERS), "one side alone"),
        (
            ("the same", "lower", (SCORE + 0.01, SCORE + 0.01, 0.0), ANSWERS),
            "as it is: the number is too large",
        ),
        (("the same", "lower", ([F.cosine_similarity(*ANSWERS).mean()] * 2 + [0.0]), ANSWERS), "one cosine"),
        (("the same", "lower", ([(ANSWERS[0] * ANSWERS[1]).sum()] * 2 + [0.0]), ANSWERS), "unit length"),
        (("the same", "lower", SCORE, ANSWERS), "checking your answer ended in TypeError"),
    ],
    "mvam.diversity": [
        ((lambda a: excess(a).square().sum((1, 2)).sqrt().mean(),), "not squared"),
        ((lambda a: (a @ a.mT).square().sum((1, 2)).mean(),), "identity"),
        ((lambda a: excess(a).square().mean(),), "not its sum"),
        ((lambda a: excess(a.mT).square().sum((1, 2)).mean(),), "compares tokens"),
        (
            (lambda a: (excess(a) * (1 - torch.eye(a.shape[1]))).square().sum((1, 2)).mean(),),
            "diagonal is left out",
        ),
        ((lambda a: excess(a).abs().sum((1, 2)).mean(),), "absolute values"),
    ],
    "mvam.floor": [
        ((lambda m, n: m - n,), "not negative"),
        ((lambda m, n: n,), "too large"),
        ((4,), "give a function"),
    ],
    "mvam.gains": [
        (({"ViT": 2.75, "FRCNN": 4.05},), "'CLIP' is missing"),
        (({"ViT": 2.75, "FRCNN": 4.05, "CLIP": 1.7},), "CLIP: the number is too large"),
        (({"ViT": 1.62, "FRCNN": 2.17, "CLIP": 0.71},), "asked is MSCOCO-5K"),
        (({"ViT": 3.62, "FRCNN": 6.19, "CLIP": 2.26},), "another baseline"),
        ((1.62,), "give a dict"),
    ],
    "hslm.short": [
        (({"word": 17.3, "channel": 17.3, "softmax": 1},), "count the powers"),
        (({"word": 1 / 300, "channel": 300, "softmax": 1},), "the inverse"),
        (({"word": 300, "channel": 300, "softmax": 300},), "softmax: the number is too large"),
        (({"word": 300, "channel": 300, "softmax": 3.5},), "softmax: the number is too large"),
    ],
    "hslm.words": [
        ((filtered,), "residual is missing"),
        ((lambda e, k, q, v: filtered(e, k, q, v) * len(e) + e,), "number of words"),
        ((lambda e, k, q, v: filtered(e, k, q, v, by=4) + e,), "not by their width e"),
        ((lambda e, k, q, v: filtered(e, k, q, v, by=2) + e,), "not by the root of their width"),
        ((by_softmax,), "no softmax"),
        ((lambda *a: by_softmax(*a, by=2),), "no softmax, and divides by the number of words"),
        ((by_channel,), "form `channel`"),
        ((lambda e, k, q, v: filtered(e, k, q, v) + e @ v.T,), "not their values"),
        ((lambda e, k, q, v: filtered(e, q, k, v) + e,), "changed places"),
        ((lambda e, k, q, v: filtered(e, k.T, q.T, v.T) + e,), "wrong side"),
    ],
    "hslm.contexts": [
        ((looked,), "unit vectors"),
        ((lambda w, r, s: F.normalize((s * w @ r.T).softmax(1) @ r, dim=1),), "do not compete"),
        ((lambda w, r, s: F.normalize(looked(w, r, 1.0), dim=1),), "scale has no effect: it is missing"),
        ((lambda w, r, s: F.normalize(s * (w @ r.T).sigmoid() @ r, dim=1),), "outside the sigmoid"),
        ((lambda w, r, s: F.normalize(looked(w, r, 1 / s), dim=1),), "do not divide"),
        ((lambda w, r, s: F.normalize(s * w @ r.T @ r, dim=1),), "sigmoid of Eq. 16 is missing"),
        ((lambda w, r, s: F.normalize(looked(w, r, s), dim=0),), "each channel"),
        ((lambda w, r, s: looked(w, r, s) / len(r),), "number of regions"),
        (
            (lambda w, r, s: looked(w, r, s) / (s * w @ r.T).sigmoid().sum(1, keepdim=True),),
            "sum of the weights",
        ),
    ],
    "hslm.longer": [
        (("higher", "higher", {"raw": 3.693, "l1": 2.443}), "not what you have predicted"),
        (("higher", "the same", {"raw": 2.0965, "l1": 2.443}), "said once"),
        (("higher", "the same", {"raw": 3.693, "l1": 3.693}), "gates are added"),
        (("higher", "the same", 4.152), "give a dict"),
    ],
    "hslm.hinge": [
        ((rival,), "hardest image of each caption"),
        ((lambda s: (rival(s) + rival(s.T)) / len(s),), "is a sum"),
        (
            (lambda s: sum((0.2 - t.diagonal()[:, None] + t).clamp(min=0).amax(1).sum() for t in (s, s.T)),),
            "its own",
        ),
        ((masked_by_zero,), "mask with -inf"),
        ((lambda s: brackets(s).sum(),), "never below 0"),
        ((lambda s: (0.4 - brackets(s)).clamp(min=0).sum(),), "the sign"),
        ((lambda s: brackets(s, 0.0).clamp(min=0).sum(),), "margin is missing"),
        ((lambda s: brackets(s).clamp(min=0).amax(0).sum(),), "two brackets for each pair"),
        (
            (lambda s: 2 * (brackets(s) + s.diagonal()).amax().sub(s.diagonal()).clamp(min=0).sum(),),
            "whole batch",
        ),
    ],
    "hslm.half": [
        (({"lead": 2.51, "logit": 0, "sigmoid": 0.688},), "multiplied by 10"),
        (({"lead": 0.2, "logit": 0, "sigmoid": 0.688},), "lead: the number is too small"),
        (({"lead": 0.251, "logit": -0.255, "sigmoid": 0.688},), "logit: a bracket is never below 0"),
        (({"lead": 0.251, "logit": 0, "sigmoid": 0.1376},), "share of its plateau"),
        (({"lead": 0.251, "logit": 0, "sigmoid": 0},), "this is the answer for logits"),
        ((0.251,), "give a dict"),
    ],
    "hslm.signal": [
        (({32: 2.06, 128: 2.6, 1024: 2.6, "mean": 0},), "B = 1024: the number is too small"),
        (({32: 2.06, 128: 2.6, "mean": 0},), "'B = 1024' is missing"),
        (({32: 2.06, 128: 2.6, 1024: 3.24},), "'mean' is missing"),
        (({32: 2.06, 128: 2.6, 1024: 3.24, "mean": 1},), "mean: the number is too large"),
        (({32: 2.25, 128: 2.6, 1024: 3.24, "mean": 0},), "B = 32: near, but drawn too few times"),
        (({32: 2.34, 128: 2.82, 1024: 3.44, "mean": 0},), "largest absolute value"),
    ],
    "hslm.modules": [
        ((MODULES | {"mgcn": 70.0},), "mgcn: the number is too large"),
        (({"mgcn": 7.0, "self_attn": 4.0, "glob": 6.0, "row": 2},), "'cross_attn and loc' is missing"),
        ((MODULES | {"row": 4},), "row: the six recalls"),
        (({name: -value for name, value in MODULES.items()},), "the sign"),
        (({name: value / 6 for name, value in MODULES.items()},), "points per recall"),
        (
            (MODULES | {"mgcn": 10.5, "self_attn": 3.2, "glob": 8.3, "cross_attn and loc": 53.6},),
            "one other row",
        ),
        ((MODULES | {"glob": -20.2, "cross_attn and loc": 50.0},), "some rows are in no pair"),
        ((MODULES | {"mgcn": 7.27, "self_attn": 4.37, "cross_attn and loc": 52.8},), "the printed Rsum"),
    ],
    "felga.dynamic": [
        ((lambda s: s >= s.mean(0),), "keyword has its own"),
        ((lambda s: s >= s.mean(1, keepdim=True),), "region has its own"),
        ((lambda s: s < s.mean(),), "wrong way round"),
        ((lambda s: s > s.mean(),), "equals the mean"),
        ((lambda s: s >= s.median(),), "is the median"),
        ((lambda s: s >= 0,), "0 is the threshold"),
        ((lambda s: s >= 0.5,), "½ is the threshold"),
    ],
    "felga.unrelated": [
        (({"dense": 100, "sparse": 10, "dynamic": 0},), "nothing fits"),
        (({"dense": 100, "sparse": 100, "dynamic": 50},), "sparse: the number is too large"),
    ],
    "felga.third": [
        (("more", torch.tensor([[1, 0], [0, 1], [0, 0]])), "without the third box"),
        (("fewer", torch.tensor([[1, 1], [1, 1], [0, 0]])), "not what you have predicted"),
        (("more", torch.tensor([[[1, 1], [1, 1], [0, 0]]])), r"the shape is \(1, 3, 2\)"),
    ],
    "felga.relu": [
        ((0.25,), "where both are positive"),
        ((0.3,), "two digits"),
        ((2 / math.pi,), "absolute values"),
        ((0.1592,), "mean square of one"),
        ((0.0,), "all numbers are positive"),
        ((0.5,), "asked is a cosine"),
    ],
    "felga.limit": [
        ((1.5 / math.log(80),), "ln 10"),
        ((0.5 / math.log(700),), "the difference is 2"),
        ((2 / (math.log(700) + 0.5),), "divides lambda1"),
    ],
    "felga.best": [
        ((lambda s, r: s.amax((1, 3)),), "padding is among"),
        ((felga.global_affinity,), "the maxima alone"),
        ((lambda s, r: (s * r).amax((1, 3)),), "padding counts as 0"),
        ((lambda s, r: s.masked_fill(~r, -math.inf).amax((1, 3)).T,), "rows are texts"),
        ((lambda s, r: s.masked_fill(~r, 0).sum((1, 3)) / r.sum((1, 3)),), "takes the best pair"),
    ],
    "felga.weight": [((20.0,), "other way round"), ((0.02,), "both axes")],
    "felga.ties": [
        (({"against": 0.7283, "for": 1.0},), "average over all orders"),
        (({"against": 0.478, "for": 0.6},), "for: precision of the whole"),
        (({"against": 1.0, "for": 0.478},), "against: the other way round"),
        (({"against": 0.478, "for": 0.478},), "for: the other way round"),
        (({"against": 47.8, "for": 100.0},), "per cent"),
        (({"against": 0.478, "for": 100.0},), "per cent"),
    ],
    "felga.gains": [
        (({"Dense": 8.7, "Sparse": 1.6, "Dynamic": 5.6},), "Dense: the wrong column"),
        (({"Dense": 2.9, "Sparse": 0.7, "Dynamic": 1.2},), "Dense: the number is too large"),
        (({"Dense": 2.5, "Dynamic": 1.2},), "'Sparse' is missing"),
        (({"Dense": 2.2, "Sparse": 0.6, "Dynamic": 1.1},), "Dense: the wrong column.*2014"),
        (({"Dense": 2.5, "Sparse": 0.6, "Dynamic": 1.1},), "Sparse: the wrong column.*2014"),
        (({"Dense": -2.5, "Sparse": -0.7, "Dynamic": -1.2},), "Dense: the sign"),
        (("2.5",), "give a dict"),
    ],
    "slan.best": [
        (([0.05, 0.0, 0.1, 0.15],), "mind the sign"),
        (([-0.05, 0.16, -0.1, -0.15],), "own score is 1"),
        (([0.0, 0.0, 0.0, 0.0],), "scores of the others"),
        (([-0.05, -0.1, -0.15],), "the shape is"),
        (([0.2, 0.0, 0.3, 0.3],), "each region's own"),
        (([-0.04, 0.0, -0.08, -0.12],), "divided by the best"),
        (([-0.3125, 0.0, -0.625, -0.9375],), "one factor more"),
        (([-0.05, 0.1, -0.1, -0.15],), "1 of 4 values are not; differentiate"),
    ],
    "slan.ramp": [
        (([0.5, 0, 0.5, 0],), "of the edges"),
        (([1.0, 0, 0.5, 0],), "same mean"),
        (([0.0, 1, 0, 0],), "grows to the right"),
        (([0.0, 0, 0, 0],), "a little to the right"),
        (([1.0, 0, 1, 0],), "between the two edges"),
    ],
    "slan.attend": [
        ((lambda r, w: (r @ w.T).softmax(1) @ w,), "square root of D is missing"),
        ((lambda r, w: (r @ w.T / r.shape[1]).softmax(1) @ w,), "not by D"),
        ((lambda r, w: (r @ w.T / 2).softmax(1) @ w,), "not always 4"),
        ((lambda r, w: (r @ w.T / math.sqrt(r.shape[1])).softmax(0) @ w,), "runs over the words"),
        ((lambda r, w: (r @ w.T / math.sqrt(r.shape[1])).softmax(1) @ w + r,), "residual"),
        ((lambda r, w: r @ w.T / math.sqrt(r.shape[1]) @ w,), "softmax is missing"),
        ((lambda r, w: (r @ w.T * math.sqrt(r.shape[1])).softmax(1) @ w,), "not multiplied"),
        ((lambda r, w: (r @ w.T / math.sqrt(len(w))).softmax(1) @ w,), "number of words"),
        ((lambda r, w: (r @ w.T / math.sqrt(len(r))).softmax(1) @ w,), "number of regions"),
        (
            (lambda r, w: (F.normalize(r, dim=1) @ F.normalize(w, dim=1).T).softmax(1) @ w,),
            "unit vectors here",
        ),
        ((lambda r, w: (w @ r.T / math.sqrt(r.shape[1])).softmax(1) @ r,), "the shape is"),
    ],
    "slan.offset": [
        ((lambda w, e: shifted(w.T, e),), "changed places"),
        ((lambda w, e: shifted(w, e) * len(w),), "cells are N / K apart"),
        ((lambda w, e: shifted(w, e, middle=False),), "from the middle one"),
        ((lambda w, e: shifted(w / w.sum(), e),), "as they are"),
        ((lambda w, e: shifted(w, e.flip(0)),), "shares of the width"),
        ((lambda w, e: shifted(w, e) * torch.tensor([1, -1]),), "downwards"),
        ((lambda w, e: shifted(w, e, middle=False) - w.sum() * e / 2,), "rounded down"),
        ((lambda w, e: shifted(w.flatten().softmax(0).view_as(w), e),), "weights already"),
        (
            (lambda w, e: torch.stack([w.sum(0) @ STEPS, w.sum(1) @ STEPS]) * e / 3,),
            "K = 3 alone.*RuntimeError",
        ),
        ((lambda w, e: shifted(w[:3, :3], e),), "K = 3 alone.*values are not"),
    ],
    "slan.reach": [
        ((1.75,), "a whole neighbourhood"),
        ((0.875,), "its edge"),
        ((0.4,), "three levels"),
        ((0.583,), "with K = 3"),
        ((0.35,), "second one from the middle"),
    ],
    "slan.whole": [
        (("above zero", {"whole": 0.0, "half": HALF}), "not what you have predicted"),
        (("zero", {"whole": 0.0, "half": NOT_STOPPED}), "stop"),
        (("zero", {"whole": 0.4, "half": HALF}), "whole: the number is too large"),
        (("zero", {"whole": 0.0, "half": 0.0}), "half: the number is too small"),
        (("zero", {"whole": WHOLE_NOT_STOPPED, "half": NOT_STOPPED}), "whole: .*stop"),
        (("zero", {"whole": HALF, "half": 0.0}), "changed places"),
        (("zero", 0), "give a dict"),
    ],
    "slan.matching": [
        (({"true": 1.3133, "other text": 2.1269, "other image": 0.0486},), "true: this is -log of the wrong"),
        (({"true": 0.3133, "other text": 0.1269, "other image": 0.0486},), "other text: .*does not belong"),
        (({"true": 0.3133, "other text": 2.1269, "other image": 3.0486},), "other image: .*does not belong"),
        (({"true": 0.7311, "other text": 0.1192, "other image": 0.9526},), "true: this is a probability"),
        (({"true": 1, "other text": 2, "other image": -3},), "true: this is the logit"),
    ],
    "slan.lonely": [
        ((0.0,), "wrong ones too"),
        ((4.0,), "logarithm"),
        ((math.log(3),), "in the denominator"),
        ((math.log(2),), "two pairs"),
    ],
    "slan.median": [((1.5,), "500th"), ((1.0,), "fewer than half")],
}
ROUNDED = [("slan.matching", {"true": 0.31, "other text": 2.13, "other image": 0.05}), ("slan.lonely", 1.39),
           ("felga.relu", 0.32)]  # fmt: skip


@pytest.mark.parametrize("method", METHODS)
def test_a_lesson_has_at_least_six_exercises_of_three_kinds(method):
    found = exercises(method)
    assert len(found) >= 6
    assert {one.kind for one in found.values()} == set(KINDS)
    assert set(found) == {key for key in WRONG if key.startswith(method)}


@pytest.mark.parametrize("key", WRONG)
def test_slips_are_told_and_the_answer_is_not(key):
    assert len(WRONG[key]) >= 2
    for answer, said in WRONG[key]:
        verdict = check(key, *answer)
        assert not verdict.passed
        assert re.search(said, verdict.message), verdict
        assert str(verdict).startswith(f"✗ {key}: ")


@pytest.mark.parametrize(("key", "answer"), ROUNDED)
def test_two_digits_are_enough(key, answer):
    assert check(key, answer).passed


@pytest.mark.parametrize("key", WRONG)
def test_an_empty_cell_does_not_pass_and_nothing_raises(key):
    assert check(key, ...).message == "no answer yet"
    assert not check(key, None).passed
    assert not check(key, object()).passed
    assert not check(key, lambda *_: 1 / 0).passed
    assert not check(key, "x", "y", "z", "w").passed


@pytest.mark.parametrize("method", METHODS)
def test_each_exercise_of_the_page_has_an_empty_cell_and_a_solution(method):
    page = nbformat.read(NOTEBOOKS / method / "1_lesson.ipynb", as_version=4)
    asked = {"exercise": [], "solution": []}
    for cell in page.cells:
        for tag in set(cell.metadata.get("tags", [])) & set(asked):
            if cell.cell_type == "code":
                assert cell.source.splitlines()[-1].startswith("check("), cell.source
                asked[tag].append(cell.source.splitlines()[-1].split('"')[1])
                assert tag == "solution" or "..." in cell.source
            if tag == "solution":
                assert cell.metadata["jupyter"]["source_hidden"], cell.source
    assert asked["exercise"] == asked["solution"]
    assert sorted(asked["exercise"]) == sorted(exercises(method))
    kinds = {key: one.kind for key, one in exercises(method).items()}
    told = [line for cell in page.cells if cell.cell_type == "markdown" for line in cell.source.splitlines()
            if line.startswith("**Exercise ")]  # fmt: skip
    assert [line.split("(")[1].split(")")[0] for line in told] == [kinds[key] for key in asked["exercise"]]


def test_student_pages_have_no_solutions(tmp_path):
    for path in write_student(tmp_path):
        page = nbformat.read(path, as_version=4)
        assert not any("solution" in cell.metadata.get("tags", []) for cell in page.cells)
        whole = nbformat.read(NOTEBOOKS / path.relative_to(tmp_path), as_version=4)
        kept = [cell.source for cell in whole.cells if "solution" not in cell.metadata.get("tags", [])]
        assert [cell.source for cell in page.cells] == kept
    run = nbformat.v4.new_code_cell(
        "1", outputs=[nbformat.v4.new_output("stream", text="1")], execution_count=3
    )
    (cell,) = student_page(nbformat.v4.new_notebook(cells=[run])).cells
    assert (cell.outputs, cell.execution_count) == ([], None)


def test_the_handout_holds_pages_library_and_data(tmp_path, scenes):
    archive = write_handout(tmp_path / "lessons.zip", scenes.parent)
    assert [path.name for path in tmp_path.glob("lessons*")] == ["lessons.zip"]
    names = zipfile.ZipFile(archive).namelist()
    for wanted in ("START.md", "notebooks/mvam/1_lesson.ipynb", "src/finematch/exercises/mvam.py", "pyproject.toml",
                   "requirements.lock", "environment.yml", "data/scenes/dataset_scenes.json"):  # fmt: skip
        assert f"lessons/{wanted}" in names
    assert not any("__pycache__" in name or name.endswith("2_train.ipynb") for name in names)


def test_what_is_compared():
    assert number(3, 3) == ""
    assert "not finite" in number(math.nan, 3)
    assert tensor([1.0, 2.0], torch.tensor([1.0, 2.0])) == ""
    assert "the shape is (1,), not (2,)" in tensor(torch.ones(1), torch.ones(2))
    assert "not all values are finite" in tensor(torch.tensor([math.inf]), torch.ones(1))
    assert "1 of 2 values" in tensor(torch.tensor([1.0, 5.0]), torch.ones(2))
    with pytest.raises(KeyError, match=r"'mvam\.none' is no exercise; known: mvam\.collisions"):
        check("mvam.none", 1)
    with pytest.raises(KeyError, match="none of that name"):
        check("else.none", 1)
    with pytest.raises(ValueError, match="a key is"):
        exercise("mvam.floor", "compute")
