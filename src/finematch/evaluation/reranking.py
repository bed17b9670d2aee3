"""Image-text retrieval in two stages: everything ranked by embeddings, the best `k` again by a matching head.

The protocol of ALBEF and BLIP, with which SLAN compares itself (4.2; it does not say how it ranks). A query's gallery
is ranked by ITC, the dot product of unit vectors. The `k` best are put in order anew by a score of the pair (`itm`, or
`itm+itc`, to which the dot product is added, as BLIP does); all others stay below them, *in the order of ITC*. (The
public evaluators put a constant there, which ties most of the gallery: a median or mean rank then means nothing.)

* Metrics, ties and scores that are not finite are treated as in `evaluation.retrieval`: any caption of the picture is
  a hit, a tie counts against the model and is reported, NaN is refused.
* A tie in ITC at the edge of the top `k` counts against the model too: of equal candidates the wrong ones are taken
  first, in the order of their images. A query that loses a candidate so is reported among the ties.
* A pair that both directions want is scored once. Pairs are asked for picture by picture, `PAIRS` at a time. ITC is
  computed in blocks of queries, of one shape, so that equal embeddings tie exactly. Memory holds one block of it, and
  of every pair wanted two numbers.

Axes: `b` images, `c` captions, `d` width, `p` pairs; of one direction, `q` queries, `g` their gallery, `k` candidates.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from tqdm import tqdm

from finematch.evaluation.retrieval import (
    _Counts,
    _Layout,
    _layout,
    _metrics,
    _pad,
    full_precision,
    video_metrics,
)

BLOCK = 500  # images of a block of ITC, as queries; captions are as many as fill a block of the same size
PAIRS = 4096  # that `score_pairs` is given at a time
SCORES = ("itm", "itm+itc")


def reranked_retrieval(
    image: Float[Tensor, "b d"],
    text: Float[Tensor, "c d"],
    image_of: Sequence[int] | np.ndarray | Tensor,
    score_pairs: Callable[[Tensor, Tensor], Tensor],
    *,
    k: int = 128,
    score: str = "itm",
    split: str = "",
    folds: int = 1,
    progress: bool = False,
) -> dict:
    """Retrieval metrics, both ways, with the best `k` of each query re-ranked by a matching head.

    Args:
        image: one row per image; a unit vector, so that the dot product is ITC's cosine.
        text: one row per caption.
        image_of: for each caption the row of its image; any order, any number (>= 1) of captions an image.
        score_pairs: takes the rows of images and of captions, pair by pair (`p` of each, on the CPU, in the order of
            the images), and returns the pairs' matching scores " p": logits, higher is better.
        k: candidates of a query that are re-ranked (ALBEF: 128 on Flickr30k, 256 on COCO). With the whole gallery
            the ranking is the matching head's alone.
        score: `itm`, or `itm+itc`.
        split, folds: as `retrieval` (a fold is ranked apart, candidates included).
        progress: show a bar over the pairs.

    Returns:
        What `retrieval` returns, and `pairs`, the number of pairs that were scored. The protocol names `k` and `score`.

    Raises:
        ValueError: as `retrieval`; for a matching score that is not finite (the pair is named), another `score`, a `k`
            below 1, or scores of the wrong shape.
    """
    _check(image, text, k, score)
    layout = _layout(image_of, len(image), len(text), image.device)
    b, c = len(image), len(text)
    if folds < 1 or b % folds:
        raise ValueError(f"{folds} folds do not divide {b} images")
    bounds, scored = [fold * b // folds for fold in range(folds + 1)], 0
    parts = []
    for low, high in pairwise(bounds):
        counts, pairs = _fold(image, text, layout, low, high, score_pairs, k, score, progress)
        scored += pairs
        ties = {f"ties_{way}": int(tied.sum()) for way, (_, tied) in zip(("i2t", "t2i"), counts, strict=True)}
        parts.append(_metrics(*(found for found, _ in counts)) | ties)
    return _mean_of_folds(parts) | {
        "images": b,
        "captions": c,
        "pairs": scored,
        "protocol": f"{split + ': ' if split else ''}{b} images x {c} captions, image-to-text counts any of the "
        f"picture's captions, {_ranked(k, score)}, ties against the "
        f"model, {'1 fold' if folds == 1 else f'mean over {folds} contiguous folds of {b // folds} images'}",
    }


def reranked_video_retrieval(
    video: Float[Tensor, "b d"],
    text: Float[Tensor, "c d"],
    video_of: Sequence[int] | np.ndarray | Tensor,
    score_pairs: Callable[[Tensor, Tensor], Tensor],
    *,
    k: int = 128,
    score: str = "itm",
    split: str = "",
    frames: str = "",
    skipped: int = 0,
    progress: bool = False,
) -> dict:
    """What `retrieval.video_retrieval` returns, with the best `k` of each query re-ranked; and `pairs`.

    Args:
        video, text, video_of, score_pairs, k, score, progress: as of `reranked_retrieval`.
        split, frames, skipped: as of `video_retrieval`.

    Raises:
        ValueError: As `reranked_retrieval`.
    """
    _check(video, text, k, score)
    layout = _layout(video_of, len(video), len(text), video.device)
    counts, pairs = _fold(video, text, layout, 0, len(video), score_pairs, k, score, progress)
    (v2t, tied_videos), (t2v, tied_texts) = counts
    found = video_metrics(
        v2t, t2v, layout, split=split, frames=frames, skipped=skipped, ranked=_ranked(k, score)
    )
    return found | {"ties_v2t": int(tied_videos.sum()), "ties_t2v": int(tied_texts.sum()), "pairs": pairs}


def _ranked(k: int, score: str) -> str:
    return f"best {k} by ITC re-ranked by {score}, the others below in ITC's order"


def _check(image: Tensor, text: Tensor, k: int, score: str) -> None:
    """Refuse what has no ranking."""
    if score not in SCORES:
        raise ValueError(f"score is {score!r}; use {' or '.join(map(repr, SCORES))}")
    if k < 1:
        raise ValueError(f"k is at least 1, got {k}")
    for name, rows in (("image", image), ("text", text)):
        bad = (~torch.isfinite(rows).all(1)).nonzero()
        if len(bad):
            raise ValueError(
                f"{name} embedding {int(bad[0])} is not finite: the model diverged, or an input was empty"
            )


@torch.no_grad()
def _fold(
    image: Float[Tensor, "b d"],
    text: Float[Tensor, "c d"],
    layout: _Layout,
    low: int,
    high: int,
    score_pairs: Callable[[Tensor, Tensor], Tensor],
    k: int,
    score: str,
    progress: bool,
) -> tuple[list[tuple[_Counts, Bool[Tensor, " q"]]], int]:
    """Ranks both ways among images `low` to `high` and their captions, with the queries whose rank a tie decided; and
    how many pairs were scored."""
    with full_precision(image.device):
        inside = slice(layout.start[low], layout.start[high])
        captions, owner = layout.order[inside], layout.owner[inside]
        pictures = torch.arange(low, high, device=image.device)
        i, j = image[low:high].float(), text[captions].float()
        captions_a_block = max(1, BLOCK * len(captions) // len(pictures))
        i2t = _Direction(i, j, pictures, owner, captions, BLOCK, False)
        t2i = _Direction(j, i, owner, pictures, captions, captions_a_block, True)
        chosen = [[d.choose(itc, own, k) for itc, own in d.blocks()] for d in (i2t, t2i)]
        wanted = torch.cat([d.keys(rows, len(text)) for d, found in zip((i2t, t2i), chosen, strict=True)
                            for rows in d.numbered(found)]).unique()  # fmt: skip
        scores = _score(score_pairs, wanted, len(text), progress)
        counts = [
            d.count(found, wanted, scores, len(text), score)
            for d, found in zip((i2t, t2i), chosen, strict=True)
        ]
    return counts, len(wanted)


def _mean_of_folds(parts: list[dict]) -> dict:
    """The mean of every metric, and the sum of the ties."""
    means = {name: float(np.mean([part[name] for part in parts])) for name in parts[0]}
    return means | {name: sum(part[name] for part in parts) for name in ("ties_i2t", "ties_t2i")}


class _Rows(NamedTuple):
    """Candidates of a block of queries: columns of the gallery, and whether an own one lost a tie for a place."""

    columns: Int[Tensor, "q k"]
    lost: Bool[Tensor, " q"]


class _Direction(NamedTuple):
    """One direction of a fold.

    Attributes:
        queries, gallery: embeddings.
        image_of_query, image_of_gallery: rows of images.
        captions: rows of the fold's captions, in the order of their images.
        size: queries a block.
        reverse: queries are the captions.
    """

    queries: Float[Tensor, "q d"]
    gallery: Float[Tensor, "g d"]
    image_of_query: Int[Tensor, " q"]
    image_of_gallery: Int[Tensor, " g"]
    captions: Int[Tensor, " c"]
    size: int
    reverse: bool

    def blocks(self) -> Iterator[tuple[Float[Tensor, "q g"], Bool[Tensor, "q g"]]]:
        """ITC of a block of queries with the whole gallery, and which of it is the queries' own."""
        g = len(self.gallery)
        columns = _pad(self.gallery, g).T
        size = min(self.size, len(self.queries))
        for start in range(0, len(self.queries), size):
            part = self.queries[start : start + size]
            itc = (_pad(part, size) @ columns)[: len(part), :g]
            if not torch.isfinite(itc).all():
                raise ValueError("a dot product of embeddings is not finite: give unit vectors")
            yield itc, self.image_of_query[start : start + size, None] == self.image_of_gallery[None]

    def choose(self, itc: Float[Tensor, "q g"], own: Bool[Tensor, "q g"], k: int) -> _Rows:
        """The best `k` by ITC, the wrong ones first where the last place is tied."""
        k = min(k, itc.shape[1])
        edge = itc.topk(k, dim=1).values[:, -1:]
        above, tied = itc > edge, itc == edge
        room = k - above.sum(1, keepdim=True)
        taken = above
        for candidates in (tied & ~own, tied & own):
            taken = taken | (candidates & (candidates.cumsum(1) <= room))
            room = (room - candidates.sum(1, keepdim=True)).clamp(min=0)
        return _Rows(taken.nonzero()[:, 1].view(-1, k).int(), (tied & own & ~taken).any(1))

    def numbered(self, found: list[_Rows]) -> Iterator[tuple[int, Tensor]]:
        """The blocks' columns with the number of their first query."""
        start = 0
        for rows in found:
            yield start, rows.columns
            start += len(rows.columns)

    def keys(self, block: tuple[int, Tensor], c: int) -> Int[Tensor, "p"]:
        """A number for each candidate pair, that orders pairs by image, then by caption; on the CPU."""
        start, columns = block
        query = torch.arange(start, start + len(columns), device=columns.device)[:, None].expand_as(columns)
        columns = columns.long()
        image = self.image_of_gallery[columns] if self.reverse else self.image_of_query[query]
        caption = self.captions[query if self.reverse else columns]
        return (image * c + caption).flatten().cpu()

    def count(
        self, found: list[_Rows], wanted: Int[Tensor, " p"], scores: Float[Tensor, " p"], c: int, score: str
    ) -> tuple[_Counts, Bool[Tensor, " q"]]:
        """Per query: how many wrong ones stand at least as high as its best own one, and above; whether a tie mattered.

        Who is among the candidates stands above who is not. A query with an own candidate needs to look at the
        candidates alone; of one without, all candidates are wrong, and ITC tells the rest.
        """
        at_least, above, ties = [], [], []
        for (itc, own), rows, block in zip(self.blocks(), found, self.numbered(found), strict=True):
            columns = rows.columns.long()
            place = torch.searchsorted(wanted, self.keys(block, c))
            value = scores[place].to(itc.device).view(columns.shape)
            if score == "itm+itc":
                value = value + itc.gather(1, columns)
            mine = own.gather(1, columns)
            best = value.masked_fill(~mine, -torch.inf).amax(1, keepdim=True)
            low = itc.masked_fill(~own, -torch.inf).amax(1, keepdim=True)
            reached = mine.any(1)
            ranks = [torch.where(reached, (compare(value, best) & ~mine).sum(1), (compare(itc, low) & ~own).sum(1))
                     for compare in (torch.ge, torch.gt)]  # fmt: skip
            at_least.append(ranks[0])
            above.append(ranks[1])
            ties.append((ranks[0] != ranks[1]) | rows.lost)
        return _Counts(torch.cat(at_least), torch.cat(above)), torch.cat(ties)


def _score(
    score_pairs: Callable[[Tensor, Tensor], Tensor],
    wanted: Int[Tensor, " p"],
    c: int,
    progress: bool,
) -> Float[Tensor, " p"]:
    scores = torch.empty(len(wanted))
    for start in tqdm(range(0, len(wanted), PAIRS), "re-ranking", disable=not progress):
        i, j = wanted[start : start + PAIRS] // c, wanted[start : start + PAIRS] % c
        found = score_pairs(i, j)
        if tuple(found.shape) != tuple(i.shape):
            raise ValueError(f"score_pairs returned shape {tuple(found.shape)} for {len(i)} pairs")
        bad = (~torch.isfinite(found)).nonzero()
        if len(bad):
            at = int(bad[0])
            raise ValueError(
                f"the matching score of image {int(i[at])} and caption {int(j[at])} is {float(found[at])}: "
                "scores must be finite"
            )
        scores[start : start + PAIRS] = found.float().cpu()
    return scores
