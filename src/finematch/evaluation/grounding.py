"""Phrase grounding: does what a model scores highest for a phrase lie where the phrase's boxes are?

Definitions (Flickr30k Entities, Plummer et al. 2015, as MDETR and GLIP evaluate it):

* `R@k`: percentage of phrases for which one of the k best candidates has an IoU of at least 0.5 with a true
  box. Of a phrase with several boxes (`boxes=`): `"any"` one of them counts (AnyBox), or `"merged"` the
  smallest box around all of them alone (MergedBox). The two give different orders of merit; never mix them.
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

Axes: `w` words or tokens of a caption, `r` candidates (regions, cells, patches, points), `g` true boxes.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from finematch.boxes import convert, iou
from finematch.data.record import Box

READINGS = [
    # (register, argument, values with the default first, what the paper says)
    ("S36", "reduce", "max | mean", "does not say how the words of a phrase become one score; MDETR: max"),
    ("4.4", "boxes", "any | merged", "does not say how several boxes of a phrase count; its rivals: any"),
]
KS = (1, 5, 10)
THRESHOLD = 0.5
BOXES = {"any": "any box of the phrase (AnyBox)", "merged": "the box around all of its boxes (MergedBox)"}


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
        reduce: `"max"`, each region by the word that likes it most (MDETR; METHODS S36), or `"mean"`.

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


def grounding(phrases: Iterable[GroundedPhrase], *, boxes: str = "any", split: str = "") -> dict:
    """Pointing game and, for candidate boxes, R@1/5/10 over phrases, with upper bound, chance and centre.

    Args:
        phrases: one item a phrase, all of boxes or all of points; consumed once, so a generator will do.
            A phrase without candidates (a detector may find none) is a miss.
        boxes: `"any"` or `"merged"`, what R@k compares with; the pointing game always accepts any box.
        split: what was scored, for the protocol string ("scenes test").

    Returns:
        Percentages: `r1, r5, r10, upper_bound, chance_r1, chance_r5, chance_r10, centre_r1` (for boxes),
        `pointing, upper_bound_pointing, chance_pointing, centre_pointing`. Counts: `phrases`, `dropped`
        (without true boxes), `without_candidates`, `ties_r` and `ties_pointing` (phrases whose best hit a tie
        moved down). `protocol`. If the phrases are of several types also, for each, the percentages and the
        count of its own: `r1/people`, `phrases/people`; all flat, as a metrics file wants them.

    Raises:
        ValueError: no phrase with boxes, a score that is not finite, shapes that do not match, true boxes
            without area or outside the picture (in another unit, often), candidates in [0, 1] instead of
            pixels, an unknown `boxes`; the message names the phrase by its number.
    """
    if boxes not in BOXES:
        raise ValueError(f"unknown protocol boxes={boxes!r}: choose one of {', '.join(BOXES)}")
    rows, kinds, candidates, dropped, reach, width = [], [], [], 0, 0.0, None
    for number, phrase in enumerate(phrases):
        if not len(phrase.boxes):
            dropped += 1
            continue
        regions, scores, true = _checked(phrase, f"phrase {number}")
        width = regions.shape[1] if width is None else width
        if regions.shape[1] != width:
            raise ValueError(f"phrase {number}: boxes and points cannot be mixed in one evaluation")
        rows.append(_score(regions, scores, true, phrase.size, boxes))
        kinds.append({kind for kind in phrase.kind.split("/") if kind})
        candidates.append(len(regions))
        reach = max(reach, float(regions.max()) if len(regions) else 0.0)
    if not rows:
        raise ValueError(f"no phrase with boxes among {dropped}: there is nothing to ground")
    if any(candidates) and reach <= 1:
        raise ValueError("all candidates lie within one pixel: boxes are pixels here, scale them by the size")

    result = _average(rows) | {
        "phrases": len(rows),
        "dropped": dropped,
        "without_candidates": candidates.count(0),
    }
    result |= {name: sum(row[name] for row in rows) for name in rows[0] if name.startswith("ties")}
    if len(every := sorted(set().union(*kinds))) > 1:
        for kind in every:
            few = [row for row, has in zip(rows, kinds, strict=True) if kind in has]
            own = _average(few) | {"phrases": len(few)}
            result |= {f"{name}/{kind}": value for name, value in own.items()}
    recall = f"R@k at IoU >= {THRESHOLD} with {BOXES[boxes]}, " if width == 4 else ""
    low, high = min(candidates), max(candidates)
    result["protocol"] = (
        f"{split + ': ' if split else ''}{len(rows)} phrases ({dropped} without boxes dropped), {recall}"
        f"pointing game without tolerance, {low if low == high else f'{low} to {high}'} candidate "
        f"{'boxes' if width == 4 else 'points'} a phrase, ties against the model"
    )
    return result


def _checked(phrase: GroundedPhrase, name: str) -> tuple[Tensor, Tensor, Tensor]:
    """Candidates, scores and true boxes in float64 on the CPU; in half precision 300 pixels have no 0.1."""
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
    return regions, scores, true


def _score(
    regions: Tensor, scores: Tensor, true: Tensor, size: tuple[float | int, float | int], boxes: str
) -> dict:
    """One phrase: its hits as 0 or 1 (chance: a probability), and whether a tie cost it places."""
    frame = torch.tensor([[0.0, 0.0, *size]], dtype=torch.float64)
    middle = convert(frame, "xyxy", "cxcywh")
    row = {}
    if regions.shape[1] == 4:
        against = true
        if boxes == "merged":
            against = torch.cat([true[:, :2].amin(0), true[:, 2:].amax(0)])[None]
        half = middle * torch.tensor([1, 1, 0.5, 0.5], dtype=torch.float64)
        hit = (iou(regions, against) >= THRESHOLD).any(1)
        rank, row["ties_r"] = _rank(hit, scores)
        row |= {f"r{k}": rank < k for k in KS}
        row |= {f"chance_r{k}": _chance(hit, k) for k in KS}
        row["upper_bound"] = bool(hit.any())
        row["centre_r1"] = bool((iou(convert(half, "cxcywh", "xyxy"), against) >= THRESHOLD).any())
        regions = convert(regions, "xyxy", "cxcywh")[:, :2]
    hit = _inside(regions, true)
    rank, row["ties_pointing"] = _rank(hit, scores)
    return row | {
        "pointing": rank < 1,
        "chance_pointing": _chance(hit, 1),
        "upper_bound_pointing": bool(hit.any()),
        "centre_pointing": bool(_inside(middle[:, :2], true)[0]),
    }


def _inside(points: Tensor, true: Tensor) -> Tensor:
    return ((points[:, None] >= true[:, :2]) & (points[:, None] <= true[:, 2:])).all(-1).any(1)


def _rank(hit: Tensor, scores: Tensor) -> tuple[float | int, bool]:
    """How many misses score at least as high as the best hit (infinity without one); whether ties are in it."""
    if not hit.any():
        return math.inf, False
    best, misses = scores[hit].max(), scores[~hit]
    at_least = int((misses >= best).sum())
    return at_least, at_least != int((misses > best).sum())


def _chance(hit: Tensor, k: int) -> float:
    """Probability that k candidates drawn at random, without repetition, contain a hit."""
    r, misses = len(hit), int((~hit).sum())
    k = min(k, r)
    return 1 - math.comb(misses, k) / math.comb(r, k)


def _average(rows: list[dict]) -> dict[str, float]:
    names = [name for name in rows[0] if not name.startswith("ties")]
    return {name: 100 * math.fsum(row[name] for row in rows) / len(rows) for name in names}
