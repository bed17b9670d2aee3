"""Image-text retrieval: R@1/5/10 both ways, median and mean rank, rsum, by counting instead of sorting.

Definitions (Karpathy's protocol, as every paper of this workbook uses it):

* image to text (`i2t`): the rank of an image is the number of captions of *other* images that score at
  least as high as the best of its own captions. Any of the picture's captions counts as a hit.
* text to image (`t2i`): the rank of a caption is the number of other images that score at least as high
  as its own image.
* `R@k` is the percentage of queries with rank < k; `medr = floor(median rank) + 1` and
  `meanr = mean rank + 1` (VSE++'s convention: 1 is best); `rsum` is the sum of the six recalls.
* A tie counts against the model, and the queries whose rank a tie changed are reported. ("Count what
  scores strictly higher" gives a constant score matrix 100 %.)
* A score that is not finite is refused (NaN sorts first in a reversed argsort: 100 % again).

How it is done. Images are cut into blocks, and every block of images takes its own captions along, so the
score matrix falls into tiles whose diagonal holds every true pair. The diagonal tiles are scored first: they
give each query the score to beat. Then every tile, each scored exactly once, adds two counts per query
(`>=` and `>`). Only one tile is in memory at a time, and the whole costs one matrix product: a rank needs
no order, so nothing is sorted.

Ties must be exact, and a matrix product is not a function of two vectors alone: BLAS adds up in another order
for another shape, so the same pair can differ in the last bit between a full tile and the narrower last one.
`retrieval` therefore makes every product of one call the same shape (the last tile is padded with zeros).

Axes: `b` images, `c` captions, `i` images and `j` captions of one tile, `d` width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F

KS = (1, 5, 10)
BLOCK = 500  # images a tile; with five captions each a tile is 500 x 2,500 scores, 5 MB

PROTOCOLS = {"coco1k": (5000, 5), "coco5k": (5000, 1), "flickr1k": (1000, 1)}  # test images, folds


def karpathy_protocol(name: str, images: int) -> dict:
    """`split` and `folds` of a published protocol, to be passed on to `retrieval`.

    `coco1k` is the mean over five *contiguous* folds of the 5,000 test images, `coco5k` the same images
    at once, `flickr1k` the 1,000 test images of Flickr30k.

    Raises ValueError for an unknown name, or if `images` is not the protocol's number: the first 1,000
    COCO images alone, for one, give a higher number that is not "COCO 1K".
    """
    if name not in PROTOCOLS:
        raise ValueError(f"unknown protocol {name!r}: choose one of {', '.join(PROTOCOLS)}")
    expected, folds = PROTOCOLS[name]
    if images != expected:
        raise ValueError(
            f"{name} is defined on {expected} test images, not on {images}: "
            "score the whole test split, or call retrieval() without a protocol name"
        )
    return {"split": f"{name} test", "folds": folds}


def retrieval(
    image: Float[Tensor, "b d"],
    text: Float[Tensor, "c d"],
    image_of: Sequence[int] | np.ndarray | Tensor,
    *,
    block: int = BLOCK,
    split: str = "",
    folds: int = 1,
) -> dict:
    """Retrieval metrics of two-stream embeddings; the score is the dot product, so normalise for a cosine.

    Computed in float32 whatever the inputs are: half-precision embeddings are widened tile by tile (exact),
    float64 is rounded; autocast and TF32 are switched off for the products. Scores in bf16 would make
    ties that the model did not.

    Args:
        image: one row per image.
        text: one row per caption.
        image_of: for each caption the row of its image; any order, any number (>= 1) of captions an image.
        block: images a tile; memory grows with `block` times its captions, results do not change with it
            (captions that are not in the order of their images are copied once).
        split: what was scored, for the protocol string ("scenes test").
        folds: number of contiguous folds of the images, evaluated apart and averaged (COCO 1K: 5).

    Returns:
        `i2t_r1, i2t_r5, i2t_r10, i2t_medr, i2t_meanr`, the same for `t2i`, `rsum`, `ties_i2t`, `ties_t2i`
        (queries whose rank a tie changed, summed over folds), `images`, `captions`, `protocol`.

    Raises:
        ValueError: embeddings or scores that are not finite, an image without caption, a caption of no
            image, or folds that do not divide the images; the message names the offender.
    """
    for name, rows in (("image", image), ("text", text)):
        for row in (~torch.isfinite(rows.sum(dim=1, dtype=torch.float32))).nonzero():  # NaN survives a sum
            if not torch.isfinite(rows[row]).all():
                raise ValueError(
                    f"{name} embedding {int(row)} is not finite: the model diverged, or an input was empty"
                )
    layout = _layout(image_of, len(image), len(text), image.device)
    text = text if layout.sorted else text[layout.order]

    def score(images: slice, captions: slice, shape: tuple[int, int]) -> Tensor:
        i, j = image[images].float(), text[captions].float()
        product = _pad(i, shape[0]) @ _pad(j, shape[1]).T
        return product[: len(i), : len(j)]

    with torch.no_grad(), full_precision(image.device):
        return _evaluate(score, layout, block, split, folds)


def retrieval_from_scores(
    scores: Float[Tensor, "b c"],
    image_of: Sequence[int] | np.ndarray | Tensor,
    *,
    block: int = BLOCK,
    split: str = "",
    folds: int = 1,
) -> dict:
    """As `retrieval`, from a score matrix, higher is better. Give logits: a saturating sigmoid makes ties."""
    layout = _layout(image_of, *scores.shape, scores.device)

    def score(images: slice, captions: slice, shape: tuple[int, int]) -> Tensor:
        rows = scores[images]
        return (rows[:, captions] if layout.sorted else rows[:, layout.order[captions]]).float()

    with torch.no_grad():
        return _evaluate(score, layout, block, split, folds)


def retrieval_blocks(
    score_block: Callable[[Tensor, Tensor], Tensor],
    b: int,
    c: int,
    image_of: Sequence[int] | np.ndarray | Tensor,
    *,
    block: int = 100,
    split: str = "",
    folds: int = 1,
    device: torch.device | str = "cpu",
) -> dict:
    """As `retrieval`, for scorers that must see both sides of a pair (HSLM, SLAN's matching head).

    Args:
        score_block: takes the indices of the tile's images (`i`) and captions (`j`) and returns their scores
            `i j`. Every pair of the `b c` matrix is asked for exactly once (per fold), tile by tile.
        b: number of images.
        c: number of captions.
        block: images a tile; the tile's captions are those of as many images.
        device: where the index tensors given to `score_block` live.

    Raises:
        ValueError: as `retrieval`, and for a tile of the wrong shape.
    """
    layout = _layout(image_of, b, c, torch.device(device))
    index = torch.arange(b, device=device)

    def score(images: slice, captions: slice, shape: tuple[int, int]) -> Tensor:
        i, j = index[images], layout.order[captions]
        tile = score_block(i, j)
        if tuple(tile.shape) != (len(i), len(j)):
            raise ValueError(
                f"score_block returned shape {tuple(tile.shape)} for {len(i)} images and {len(j)} captions"
            )
        return tile.float()

    with torch.no_grad():
        return _evaluate(score, layout, block, split, folds)


def video_retrieval(
    scores: Float[Tensor, "v c"],
    video_of: Sequence[int] | np.ndarray | Tensor,
    *,
    split: str = "",
    frames: str = "",
    skipped: int = 0,
) -> dict:
    """Text-to-video retrieval (and back) from a score matrix: R@1/5/10 and the median rank MdR.

    MdR is the median of ranks that start at 1: of an even number of captions it may be x.5, as in BLIP's evaluator
    (`medr` of the other functions is rounded down).

    Args:
        scores: higher is better.
        video_of: for each caption the row of its video.
        frames: which frames were looked at ("8 uniform frames"), for the protocol.
        skipped: videos of the split that were missing or broken (`data.video.read_clips`). They are no candidates,
            their captions no queries, so the numbers are not those of the whole split.

    Returns:
        `t2v_r1, t2v_r5, t2v_r10, t2v_mdr, t2v_meanr, ties_t2v`, the same for `v2t`, `videos`, `captions`, `skipped`,
        `protocol`.

    Raises:
        ValueError: As `retrieval`.
    """
    layout = _layout(video_of, *scores.shape, scores.device)

    def score(videos: slice, captions: slice, shape: tuple[int, int]) -> Tensor:
        return scores[videos][:, layout.order[captions]].float()

    with torch.no_grad():
        v2t, t2v = _count(score, layout, 0, layout.images, BLOCK)
    return video_metrics(v2t, t2v, layout, split=split, frames=frames, skipped=skipped)


def video_metrics(
    v2t: _Counts, t2v: _Counts, layout: _Layout, *, split: str, frames: str, skipped: int, ranked: str = ""
) -> dict:
    """What `video_retrieval` returns, from the ranks both ways; `ranked` says for the protocol how they came about."""
    found = _metrics(v2t, t2v)
    names = {"i2t": "v2t", "t2i": "t2v"}
    kept = (*(f"r{k}" for k in KS), "meanr")
    result = {f"{new}_{name}": found[f"{old}_{name}"] for old, new in names.items() for name in kept}
    result |= {f"ties_{new}": found[f"ties_{old}"] for old, new in names.items()}
    for name, counts in (("v2t", v2t), ("t2v", t2v)):
        result[f"{name}_mdr"] = float(np.median(counts.at_least.cpu().numpy()) + 1)
    left_out = f"{skipped} missing or broken videos left out" if skipped else "no video left out"
    parts = (
        f"{layout.images} videos x {len(layout.order)} captions",
        frames,
        ranked,
        left_out,
        "ties against the model",
    )
    return result | {
        "videos": layout.images,
        "captions": len(layout.order),
        "skipped": skipped,
        "protocol": f"{split + ': ' if split else ''}{', '.join(part for part in parts if part)}",
    }


@dataclass(frozen=True)
class _Layout:
    """Captions in the order of their images: those of image `k` are `order[start[k]:start[k + 1]]`."""

    order: Int[Tensor, "c"]
    owner: Int[Tensor, "c"]  # image of each caption, in that order
    start: list[int]
    sorted: bool  # captions came in that order already

    @property
    def images(self) -> int:
        return len(self.start) - 1


@dataclass
class _Counts:
    """Per query: how many wrong answers score at least as high, and how many strictly higher."""

    at_least: Int[Tensor, "q"]
    above: Int[Tensor, "q"]


# takes a tile's images, its captions (both slices of the sorted layout) and the largest tile's shape
_Score = Callable[[slice, slice, tuple[int, int]], Tensor]


def _layout(image_of, b: int, c: int, device: torch.device) -> _Layout:
    owner = torch.as_tensor(image_of).cpu()
    if owner.is_floating_point() or owner.dtype == torch.bool or owner.ndim != 1:
        raise ValueError(
            f"image_of must be one integer per caption, got {owner.dtype} of shape {tuple(owner.shape)}"
        )
    if len(owner) != c:
        raise ValueError(f"image_of names the images of {len(owner)} captions, but there are {c} captions")
    outside = ((owner < 0) | (owner >= b)).nonzero()
    if len(outside):
        caption = int(outside[0])
        raise ValueError(
            f"caption {caption} belongs to image {int(owner[caption])}, but the images are 0 to {b - 1}"
        )
    if b == 0:
        raise ValueError("there are no images to rank")
    captions = torch.bincount(owner, minlength=b)
    if not captions.all():
        raise ValueError(
            f"image {int((captions == 0).nonzero()[0])} has no caption: drop it from the gallery"
        )
    order = torch.argsort(owner, stable=True)
    start = [0, *torch.cumsum(captions, 0).tolist()]
    in_order = bool((owner[1:] >= owner[:-1]).all())
    return _Layout(order.to(device), owner[order].to(device), start, in_order)


def _evaluate(score: _Score, layout: _Layout, block: int, split: str, folds: int) -> dict:
    b, c = layout.images, layout.start[-1]
    if block < 1 or folds < 1:
        raise ValueError(f"block and folds must be at least 1, got {block} and {folds}")
    if b % folds:
        raise ValueError(f"{folds} folds do not divide {b} images")
    size = b // folds
    parts = [_metrics(*_count(score, layout, k * size, (k + 1) * size, block)) for k in range(folds)]
    result = {name: float(np.mean([part[name] for part in parts])) for name in parts[0]}
    for name in ("ties_i2t", "ties_t2i"):
        result[name] = int(sum(part[name] for part in parts))
    cut = "1 fold" if folds == 1 else f"mean over {folds} contiguous folds of {size} images"
    result |= {
        "images": b,
        "captions": c,
        "protocol": f"{split + ': ' if split else ''}{b} images x {c} captions, image-to-text counts any of "
        f"the picture's captions, ties against the model, {cut}",
    }
    return result


def _metrics(i2t: _Counts, t2i: _Counts) -> dict[str, float]:
    result = {}
    for name, counts in (("i2t", i2t), ("t2i", t2i)):
        rank = counts.at_least.cpu().numpy()
        result |= {f"{name}_r{k}": 100.0 * float(np.mean(rank < k)) for k in KS}
        result[f"{name}_medr"] = float(np.floor(np.median(rank)) + 1)
        result[f"{name}_meanr"] = float(rank.mean() + 1)
        result[f"ties_{name}"] = int((counts.at_least != counts.above).sum())
    result["rsum"] = sum(result[f"{name}_r{k}"] for name in ("i2t", "t2i") for k in KS)
    return result


def _count(score: _Score, layout: _Layout, low: int, high: int, block: int) -> tuple[_Counts, _Counts]:
    """Rank counts of images `low` to `high` against the captions of these images, and the reverse."""
    blocks = -(-(high - low) // block)
    edges = [low + (high - low) * k // blocks for k in range(blocks + 1)]  # equal blocks: least padding
    images = [slice(*edge) for edge in pairwise(edges)]
    captions = [slice(layout.start[s.start], layout.start[s.stop]) for s in images]
    shape = tuple(max(s.stop - s.start for s in side) for side in (images, captions))
    first = layout.start[low]
    device = layout.owner.device

    best = torch.full((high - low,), -torch.inf, device=device)  # of an image: its best own caption
    own = torch.empty(layout.start[high] - first, device=device)  # of a caption: its image
    i2t, t2i = (_Counts(*torch.zeros(2, len(q), dtype=torch.long, device=device)) for q in (best, own))

    diagonal = [(k, k) for k in range(blocks)]
    rest = [(x, y) for y in range(blocks) for x in range(blocks) if x != y]
    for x, y in diagonal + rest:
        tile = score(images[x], captions[y], shape)
        _check_finite(tile, images[x], layout.order[captions[y]])
        i, j = _shift(images[x], low), _shift(captions[y], first)
        true = None
        if x == y:
            true = (layout.owner[captions[y]] - images[x].start, torch.arange(tile.shape[1], device=device))
            own[j] = tile[true]
            best[i] = best[i].scatter_reduce(0, true[0], own[j], "amax")
        # A tile off the diagonal comes after both its diagonal tiles: every score to beat is known.
        hits = torch.zeros(tile.shape[0], -(-tile.shape[1] // 8) * 8, dtype=torch.bool, device=device)
        for compare, name in ((torch.ge, "at_least"), (torch.gt, "above")):
            getattr(i2t, name)[i] += _hits(compare, tile, best[i, None], true, hits, dim=1)
            getattr(t2i, name)[j] += _hits(compare, tile, own[None, j], true, hits, dim=0)[: tile.shape[1]]
    return i2t, t2i


def _hits(compare, tile, threshold, true, hits: Bool[Tensor, "i j8"], dim: int) -> Int[Tensor, "q"]:
    """How many entries of `tile` beat the threshold along `dim`, the true pairs left out.

    `hits` is scratch space, as wide as the tile rounded up to 8; its surplus columns stay False.
    """
    compare(tile, threshold, out=hits[:, : tile.shape[1]])
    if true is not None:
        hits[true] = False
    return _count_true(hits, dim)


def _count_true(hits: Bool[Tensor, "i j8"], dim: int) -> Int[Tensor, "q"]:
    """`hits.sum(dim)`, 20 times faster: eight flags are added at once, as the bytes of one 64-bit integer.

    A byte holds 255, so at most 255 integers are added before the bytes are read out.
    """
    words = hits.view(torch.int64)
    if dim == 0:
        return sum(part.sum(0).view(torch.uint8).long() for part in words.split(255, dim=0))
    return sum(part.sum(1)[:, None].view(torch.uint8).sum(1) for part in words.split(255, dim=1))


def _shift(part: slice, by: int) -> slice:
    return slice(part.start - by, part.stop - by)


def _pad(rows: Float[Tensor, "n d"], size: int) -> Float[Tensor, "m d"]:
    """Zero rows up to `size`, and at least 16: BLAS treats thinner products as vectors, entry by entry."""
    missing = max(size, 16) - len(rows)
    return F.pad(rows, (0, 0, 0, missing)) if missing else rows


def _check_finite(tile: Float[Tensor, "i j"], images: slice, captions: Int[Tensor, "j"]) -> None:
    if torch.isfinite(tile.sum()):  # a NaN or infinity survives the sum; the exact test runs only then
        return
    bad = (~torch.isfinite(tile)).nonzero()
    if len(bad):
        i, j = bad[0].tolist()
        raise ValueError(
            f"the score of image {images.start + i} and caption {int(captions[j])} is "
            f"{float(tile[i, j])}: scores must be finite"
        )


@contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """Float32 products in float32: neither autocast nor TF32 or bf16 passes, whatever training left set."""
    libraries = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)
    before = [library.fp32_precision for library in libraries]
    try:
        for library in libraries:
            library.fp32_precision = "ieee"
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        for library, precision in zip(libraries, before, strict=True):
            library.fp32_precision = precision
