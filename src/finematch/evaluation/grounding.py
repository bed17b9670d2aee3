"""Phrase grounding: does what a model scores highest for a phrase lie where the phrase's boxes are?

Definitions (Flickr30k Entities, Plummer et al. 2015, as MDETR and GLIP evaluate it):

* `R@k`: percentage of phrases for which one of the k best candidates has an IoU of at least 0.5 with a true
  box. There are two protocols for a phrase with several boxes, and a result has both: any of them counts (AnyBox,
  `r1`), or the smallest box around all of them alone (MergedBox, `merged_r1`). They give different orders of merit.
* Pointing game (Zhang et al. 2016): percentage of phrases for which the centre of the best candidate, or
  the best of the points where a model points instead of drawing boxes, lies inside any true box, edges
  included. No tolerance: that paper forgives 15 pixels.
* Every phrase counts the same (micro-average). A phrase without true boxes is dropped and counted.
* A tie counts against the model: among candidates of one score those that miss come first. A score that is
  not finite is refused.
* Beside a score stand what the candidates allow (`upper_bound`: one of them hits), what a random order of
  them gives (`chance`, the exact expectation) and what needs no model (`centre`: the box in the middle of the
  picture with half its sides, and the picture's centre as a point).

With k candidates or fewer, R@k only asks whether any candidate hits: the protocol string states how many
there were.

All phrases of a block are scored at once, on arrays in which their candidates follow one another.

Axes: `w` words or tokens of a caption, `r` candidates (regions, cells, patches, points), `g` true boxes; of a block of
phrases: `p` phrases, `n` candidates of all of them, `m` true boxes of all of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from functools import cache
from itertools import chain, islice
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from finematch.data.record import Box

KS = (1, 5, 10)
THRESHOLD = 0.5
BLOCK = 4096  # phrases scored at once


class GroundedPhrase(NamedTuple):
    """One phrase: what a model proposes for it, and what is true. Pixels of the picture that has `size`."""

    regions: Float[Tensor, "r 4"] | Float[Tensor, "r 2"]  # candidate boxes xyxy, or candidate points (x, y)
    scores: Float[Tensor, " r"]  # higher is better; logits, because a saturating sigmoid makes ties
    boxes: Sequence[Box] | Float[Tensor, "g 4"]  # the true ones, xyxy; `Phrase.boxes` of a record fits
    size: tuple[float | int, float | int]  # width, height
    kind: str = ""  # Entities' type; several joined by "/" count in each of them


def phrase_scores(
    word_scores: Float[Tensor, "w r"], words: Bool[Tensor, " w"] | Sequence[int], *, reduce: str = "max"
) -> Float[Tensor, " r"]:
    """A phrase's score of every region, from the scores of its words.

    Args:
        word_scores: how well word (or token) w fits region r; for an attention, its logits.
        words: the phrase's words, as a mask (`correspondence.on_span` makes one of character offsets) or as
            indices.
        reduce: `"max"`, each region by the word that likes it most (MDETR; S36), or `"mean"`.

    Raises:
        ValueError: an unknown `reduce`, a word that is not there, or no word at all: a phrase beyond the
            tokenizer's `max_length`.
    """
    if reduce not in ("max", "mean"):
        raise ValueError(f"reduce is {reduce!r}; use 'max' or 'mean'")
    chosen = torch.as_tensor(words, device=word_scores.device)
    if chosen.dtype != torch.bool:
        if not all(0 <= word < len(word_scores) for word in chosen.tolist()):
            raise ValueError(f"words {chosen.tolist()} of a caption of {len(word_scores)} words")
        chosen = chosen.long()  # an empty list makes a float tensor
    of_phrase = word_scores[chosen]
    if not len(of_phrase):
        raise ValueError(
            "the phrase has no words here: it was cut off. Raise max_length, or give all its regions the "
            "same score, which counts as a miss"
        )
    return of_phrase.amax(0) if reduce == "max" else of_phrase.mean(0)


def grounding(phrases: Iterable[GroundedPhrase], *, split: str = "") -> dict:
    """Pointing game and, for candidate boxes, R@1/5/10 over phrases, with upper bound, chance and centre.

    Args:
        phrases: one item a phrase, all of boxes or all of points; consumed once, so a generator will do.
            A phrase without candidates (a detector may find none) is a miss.
        split: what was scored, for the protocol string ("scenes test").

    Returns:
        Percentages: `r1, r5, r10, upper_bound, chance_r1, chance_r5, chance_r10, centre_r1` (for boxes; AnyBox, and
        again as `merged_r1` and so on, MergedBox), `pointing, upper_bound_pointing, chance_pointing, centre_pointing`,
        for which any box counts. Counts: `phrases`, `dropped` (without true boxes), `without_candidates`, `ties_r` and
        `ties_pointing` (phrases whose best hit a tie moved down). `protocol`. If the phrases are of several types also,
        for each, the percentages and the count of its own: `r1/people`, `phrases/people`; all flat, as a metrics file
        wants them.

    Raises:
        ValueError: no phrase with boxes, a score that is not finite, shapes that do not match, true boxes
            without area or outside the picture (in another unit, often), candidates in [0, 1] instead of
            pixels; the message names the phrase by its number.
    """
    kinds, parts, counts, dropped, reach, width, start = [], [], [], 0, 0.0, None, 0
    phrases = iter(phrases)
    while block := list(islice(phrases, BLOCK)):
        kept = [(number, phrase) for number, phrase in enumerate(block, start) if len(phrase.boxes)]
        dropped, start = dropped + len(block) - len(kept), start + len(block)
        if not kept:
            continue
        flat = _flat([phrase for _, phrase in kept])
        if flat is None or (width or len(flat.regions)) != len(flat.regions):
            _refuse(kept, width)
        width = len(flat.regions)
        parts.append(_score(flat))
        counts.append(flat.counts)
        kinds += [phrase.kind for _, phrase in kept]
        reach = max(reach, float(flat.regions.max(initial=0.0)))
    if not parts:
        raise ValueError(f"no phrase with boxes among {dropped}: there is nothing to ground")
    candidates = np.concatenate(counts)
    if candidates.any() and reach <= 1:
        raise ValueError("all candidates lie within one pixel: boxes are pixels here, scale them by the size")

    columns = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    ties = {name: int(columns.pop(name).sum()) for name in list(columns) if "ties" in name}
    result = _average(columns) | {
        "phrases": len(candidates),
        "dropped": dropped,
        "without_candidates": int((candidates == 0).sum()),
    }
    result |= ties
    types = {kind: {one for one in kind.split("/") if one} for kind in set(kinds)}
    if len(every := sorted(set().union(*types.values()))) > 1:
        for kind in every:
            few = np.array([kind in types[one] for one in kinds])
            own = _average({name: values[few] for name, values in columns.items()})
            result |= {f"{name}/{kind}": value for name, value in (own | {"phrases": int(few.sum())}).items()}
    both = "any box of the phrase (AnyBox; merged_*: the box around all of its boxes, MergedBox)"
    recall = f"R@k at IoU >= {THRESHOLD} with {both}, " if width == 4 else ""
    low, high = int(candidates.min()), int(candidates.max())
    result["protocol"] = (
        f"{split + ': ' if split else ''}{len(candidates)} phrases ({dropped} without boxes dropped), {recall}"
        f"pointing game without tolerance, {low if low == high else f'{low} to {high}'} candidate "
        f"{'boxes' if width == 4 else 'points'} a phrase, ties against the model"
    )
    return result


class _Flat(NamedTuple):
    """A block of phrases, one after another, in float64: in half precision 300 pixels have no 0.1."""

    regions: Float[np.ndarray, "c n"]  # candidates by coordinate, 4 of boxes or 2 of points
    scores: Float[np.ndarray, " n"]
    counts: Int[np.ndarray, " p"]  # candidates of each phrase
    true: Float[np.ndarray, "4 m"]
    of: Int[np.ndarray, " p"]  # true boxes of each phrase, at least 1
    sizes: Float[np.ndarray, "2 p"]


def _flat(phrases: list[GroundedPhrase]) -> _Flat | None:
    """The phrases as arrays; None if one of them is refused (`_complain` says which and why)."""
    regions = [torch.as_tensor(phrase.regions) for phrase in phrases]
    scores = [torch.as_tensor(phrase.scores) for phrase in phrases]
    boxes = [
        phrase.boxes.tolist() if isinstance(phrase.boxes, Tensor) else phrase.boxes for phrase in phrases
    ]
    shapes, width = [part.shape for part in regions], regions[0].shape[-1]
    fits = all(
        len(shape) == 2 and shape[1] == width and shape[:1] == score.shape
        for shape, score in zip(shapes, scores, strict=True)
    )
    if not fits or width not in (2, 4) or any(len(box) != 4 for box in chain.from_iterable(boxes)):
        return None
    found = _Flat(
        np.ascontiguousarray(torch.cat(regions).detach().cpu().double().numpy().T),
        torch.cat(scores).detach().cpu().double().numpy(),
        np.array([len(score) for score in scores]),
        np.ascontiguousarray(np.array(list(chain.from_iterable(boxes)), dtype=np.float64).T),
        np.array([len(box) for box in boxes]),
        np.array([phrase.size for phrase in phrases], dtype=np.float64).T,
    )
    true, right, bottom = found.true, *np.repeat(found.sizes, found.of, axis=1)
    good = np.isfinite(found.scores).all() and np.isfinite(found.regions).all()
    good = good and (width == 2 or (found.regions[2:] >= found.regions[:2]).all())
    good = good and (true[2:] > true[:2]).all() and true.min() >= -1  # published boxes are rounded
    return found if good and (true[2] <= right + 1).all() and (true[3] <= bottom + 1).all() else None


def _refuse(phrases: list[tuple[int, GroundedPhrase]], width: int | None) -> None:
    """Raise for the first phrase of a block that cannot be scored, by its number."""
    for number, phrase in phrases:
        _complain(phrase, f"phrase {number}")
        regions = torch.as_tensor(phrase.regions)
        width = width or regions.shape[1]
        if regions.shape[1] != width:
            raise ValueError(f"phrase {number}: boxes and points cannot be mixed in one evaluation")


def _complain(phrase: GroundedPhrase, name: str) -> None:
    """Say what is wrong with one phrase, if anything is."""
    regions, scores = (torch.as_tensor(part).detach().cpu().double() for part in phrase[:2])
    true = torch.as_tensor(phrase.boxes).detach().cpu().double()
    if regions.ndim != 2 or regions.shape[1] not in (2, 4) or scores.shape != regions.shape[:1]:
        raise ValueError(
            f"{name}: candidates of shape {tuple(regions.shape)} with scores of shape {tuple(scores.shape)}; "
            "they are r boxes of 4 or r points of 2 numbers, and r scores"
        )
    if not torch.isfinite(scores).all():
        raise ValueError(
            f"{name}: score {int((~torch.isfinite(scores)).nonzero()[0])} is not finite; leave padding out"
        )
    if not torch.isfinite(regions).all():
        raise ValueError(f"{name}: candidate {int((~torch.isfinite(regions)).nonzero()[0, 0])} is not finite")
    if regions.shape[1] == 4 and not (regions[:, 2:] >= regions[:, :2]).all():
        wrong = int((regions[:, 2:] < regions[:, :2]).any(1).nonzero()[0])
        raise ValueError(f"{name}: candidate {wrong} is no x1 <= x2, y1 <= y2 box: {regions[wrong].tolist()}")
    if true.ndim != 2 or true.shape[1] != 4 or not (true[:, 2:] > true[:, :2]).all():
        raise ValueError(f"{name}: a true box has no area or is not xyxy: {true.tolist()}")
    # a pixel outside is forgiven: published boxes are rounded
    if true.min() < -1 or (true[:, 2:] > torch.tensor(phrase.size, dtype=torch.float64) + 1).any():
        raise ValueError(f"{name}: a true box lies outside the picture of {phrase.size}: {true.tolist()}")


def _score(block: _Flat) -> dict[str, np.ndarray]:
    """Each phrase's hits as 0 or 1 (chance: a probability), and whether a tie cost it places, "p" each."""
    counts, one, found = block.counts, np.ones_like(block.counts), {}
    middle, points = block.sizes / 2, block.regions
    if len(block.regions) == 4:
        half = np.concatenate([middle - 0.5 * middle, middle + 0.5 * middle])
        first = np.cumsum(block.of) - block.of
        around = np.concatenate(
            [np.minimum.reduceat(block.true[:2], first, 1), np.maximum.reduceat(block.true[2:], first, 1)]
        )
        for name, true, of in (("", block.true, block.of), ("merged_", around, one)):
            recalls = _ranked(_hits(_overlap, block.regions, counts, true, of), block.scores, counts, KS)
            recalls["centre_r1"] = _hits(_overlap, half, one, true, of)
            found |= {name + key: values for key, values in recalls.items()}
        points = (block.regions[:2] + block.regions[2:]) / 2
    hit = _hits(_inside, points, counts, block.true, block.of)
    game = _ranked(hit, block.scores, counts, (1,))
    names = {"r1": "pointing", "chance_r1": "chance_pointing", "upper_bound": "upper_bound_pointing",
             "ties_r": "ties_pointing"}  # fmt: skip
    found |= {names[key]: values for key, values in game.items()}
    return found | {"centre_pointing": _hits(_inside, middle, one, block.true, block.of)}


def _hits(
    test: Callable, regions: np.ndarray, counts: np.ndarray, true: np.ndarray, of: np.ndarray
) -> np.ndarray:
    """For every candidate whether it passes `test` with any true box of its phrase, "n".

    The first box of all phrases, then the second of those that have two, and so on: most have one.
    """
    hit, first = np.zeros(regions.shape[1], dtype=bool), np.cumsum(of) - of
    for j in range(of.max()):
        more = of > j
        rows = np.flatnonzero(np.repeat(more, counts)) if j else slice(None)
        hit[rows] |= test(regions[:, rows], np.repeat(true[:, (first + j)[more]], counts[more], axis=1))
    return hit


def _overlap(a: Float[np.ndarray, "4 n"], b: Float[np.ndarray, "4 n"]) -> Bool[np.ndarray, " n"]:
    """Whether the IoU of boxes, pair by pair, reaches the threshold; `b` has an area."""
    width = np.minimum(a[2], b[2]) - np.maximum(a[0], b[0])
    height = np.minimum(a[3], b[3]) - np.maximum(a[1], b[1])
    both = width.clip(min=0) * height.clip(min=0)
    return both / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - both) >= THRESHOLD


def _inside(points: Float[np.ndarray, "2 n"], b: Float[np.ndarray, "4 n"]) -> Bool[np.ndarray, " n"]:
    """Whether points, pair by pair, lie inside boxes or on their edges."""
    return ((points >= b[:2]) & (points <= b[2:])).all(0)


def _ranked(
    hit: np.ndarray, scores: np.ndarray, counts: np.ndarray, ks: tuple[int, ...]
) -> dict[str, np.ndarray]:
    """R@k, its expectation for a random order and for the best one, and ties, of every phrase, "p" each.

    The rank of the best hit is how many misses score at least as high.
    """
    ends, hits = np.cumsum(counts), _totals(hit, counts)
    best, some = np.full(len(counts), np.nan), counts > 0
    if some.any():
        best[some] = np.maximum.reduceat(np.where(hit, scores, -np.inf), (ends - counts)[some])
    level = np.repeat(best, counts)
    rank = _totals((scores >= level) & ~hit, counts)
    tied = (hits > 0) & (rank != _totals((scores > level) & ~hit, counts))
    found = {f"r{k}": (hits > 0) & (rank < k) for k in ks}
    pairs = list(zip(counts.tolist(), (counts - hits).tolist(), strict=True))
    found |= {f"chance_r{k}": np.array([_chance(r, misses, k) for r, misses in pairs]) for k in ks}
    return found | {"upper_bound": hits > 0, "ties_r": tied}


def _totals(values: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """How many of each phrase's candidates are true, "p"."""
    sums = np.concatenate([[0], np.cumsum(values)])
    ends = np.cumsum(counts)
    return sums[ends] - sums[ends - counts]


@cache
def _chance(r: int, misses: int, k: int) -> float:
    """Probability that k of r candidates drawn at random, without repetition, contain a hit."""
    k = min(k, r)
    return 1 - math.comb(misses, k) / math.comb(r, k)


def _average(columns: dict[str, np.ndarray]) -> dict[str, float]:
    return {name: 100 * math.fsum(values.tolist()) / len(values) for name, values in columns.items()}
