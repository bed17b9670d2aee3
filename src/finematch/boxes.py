"""Boxes: formats, areas, overlaps, suppression, regular proposals, RoI pooling. Pure torch, on torchvision's operators.

A box is `(x1, y1, x2, y2)` in pixels unless a name says otherwise, with real-valued edges and no "+1": a box
from 0 to 10 is 10 wide. `xywh` is corner and size (COCO's files), `cxcywh` centre and size (DETR's heads).

RoI pooling takes boxes in fractions of the picture, [0, 1], so that one box serves the maps of all levels, with any
number of axes of boxes. A map covers its picture; its cell i reaches from i to i + 1 and has its value at the
centre, i + 1/2. Between centres the map is bilinear; from the outermost centres to half a cell beyond the
picture it keeps the outermost value; further out it is 0. That is RoIAlign's rule (`aligned=True`).

Axes: `n`, `m` boxes; of RoI pooling: `b` pictures, `r` boxes, `k2` cells of a neighbourhood, `c` channels, `h` `w`
cells of a map.
"""

from __future__ import annotations

import math
from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

FORMATS = ("xyxy", "xywh", "cxcywh")


def _ops():
    """torchvision's operators: imported when one is called, because that takes as long as importing torch."""
    from torchvision import ops

    return ops


def convert(boxes: Float[Tensor, "*n 4"], source: str, target: str) -> Float[Tensor, "*n 4"]:
    """Boxes from one of `xyxy`, `xywh`, `cxcywh` to another, in any unit. ValueError for another name."""
    for name in (source, target):
        if name not in FORMATS:
            raise ValueError(f"unknown box format {name!r}: choose one of {', '.join(FORMATS)}")
    return _ops().box_convert(boxes, source, target)


def clip(boxes: Float[Tensor, "*n 4"], width: float | int, height: float | int) -> Float[Tensor, "*n 4"]:
    """Boxes cut at the borders of a `width` x `height` picture; one outside of it is left without area."""
    return _ops().clip_boxes_to_image(boxes, (height, width))


def area(boxes: Float[Tensor, "n 4"]) -> Float[Tensor, "n"]:
    """Areas in square pixels. ValueError for a box whose edges are in the wrong order."""
    return _ops().box_area(_ordered(boxes))


def iou(a: Float[Tensor, "n 4"], b: Float[Tensor, "m 4"]) -> Float[Tensor, "n m"]:
    """Intersection over union of every pair, in [0, 1]; 0 where neither box has an area.

    Raises:
        ValueError: a box whose edges are in the wrong order or not finite (boxes in another format, often).
    """
    return torch.nan_to_num(_ops().box_iou(_ordered(a), _ordered(b)), nan=0.0)


def giou(a: Float[Tensor, "n 4"], b: Float[Tensor, "m 4"]) -> Float[Tensor, "n m"]:
    """Generalised IoU of every pair, in [-1, 1]: IoU minus the part of the enclosing box that neither covers.

    Differentiable with respect to both. Unlike `iou` it needs boxes with an area: without one its gradient is
    not defined.

    Raises:
        ValueError: as `iou`, and for a box without area.
    """
    for boxes in (_ordered(a), _ordered(b)):
        flat = (boxes[:, 2:] <= boxes[:, :2]).any(dim=1).nonzero()
        if len(flat):
            raise ValueError(f"box {int(flat[0])} has no area: {boxes[flat[0, 0]].tolist()}")
    return _ops().generalized_box_iou(a, b)


def nms(
    boxes: Float[Tensor, "n 4"], scores: Float[Tensor, "n"], threshold: float, *, keep: int | None = None
) -> Int[Tensor, "k"]:
    """Non-maximum suppression: indices of the boxes kept, best score first, at most `keep`.

    A box goes if its IoU with a better one that stays is above `threshold`.

    Raises:
        ValueError: as `iou`, a score that is not finite, a threshold outside [0, 1].
    """
    if not 0 <= threshold <= 1:
        raise ValueError(f"threshold is an IoU in [0, 1], got {threshold}")
    if not torch.isfinite(scores).all():
        raise ValueError(f"score {int((~torch.isfinite(scores)).nonzero()[0])} is not finite")
    return _ops().nms(_ordered(boxes), scores, threshold)[:keep]


def grid_boxes(width: float | int, height: float | int, rows: int, cols: int) -> Float[Tensor, "n 4"]:
    """The `rows * cols` equal cells of a `width` x `height` picture, row by row; together they tile it."""
    if width <= 0 or height <= 0 or rows < 1 or cols < 1:
        raise ValueError(f"a {width} x {height} picture cannot be cut into {rows} x {cols} cells")
    x = torch.arange(cols + 1) * (width / cols)
    y = torch.arange(rows + 1) * (height / rows)
    x[-1], y[-1] = width, height  # exactly, whatever the division rounded to
    top, left = torch.meshgrid(y[:-1], x[:-1], indexing="ij")
    bottom, right = torch.meshgrid(y[1:], x[1:], indexing="ij")
    return torch.stack([left, top, right, bottom], dim=-1).reshape(-1, 4)


def multi_scale_grid(width: float | int, height: float | int, n: int) -> Float[Tensor, "n 4"]:
    """`n` proposals that need no picture: the whole, then windows of 1/2, 1/3, 1/4 ... of its sides.

    The windows of side 1/s stand half a window apart, (2 s - 1)² of them, so that neighbours overlap by half:
    1, 9, 25, 49 ... boxes. Of the last scale begun, the windows nearest the centre are taken (ties by row):
    pictures have their subject there. Deterministic; a larger `n` keeps the earlier boxes.
    """
    if width <= 0 or height <= 0 or n < 1:
        raise ValueError(f"no {n} boxes on a {width} x {height} picture")
    scales, found, side = [], 0, 1
    while found < n:
        steps = torch.arange(2 * side - 1)
        row, col = torch.meshgrid(steps, steps, indexing="ij")
        off_centre = ((row - (side - 1)) ** 2 + (col - (side - 1)) ** 2).flatten()
        order = torch.argsort(off_centre, stable=True)
        corner = torch.stack([col, row], dim=-1).reshape(-1, 2)[order] / (2 * side)
        scales.append(torch.cat([corner, corner + 1 / side], dim=1))
        found, side = found + len(order), side + 1
    size = torch.tensor([width, height, width, height], dtype=torch.float32)
    return clip(torch.cat(scales)[:n] * size, width, height)


def _ordered(boxes: Float[Tensor, "n 4"]) -> Float[Tensor, "n 4"]:
    """The boxes; ValueError if one is not finite or has its edges in the wrong order."""
    wrong = (~(boxes[:, 2:] >= boxes[:, :2]).all(dim=1) | ~torch.isfinite(boxes).all(dim=1)).nonzero()
    if len(wrong):
        index = int(wrong[0])
        raise ValueError(
            f"box {index} is no x1 <= x2, y1 <= y2 box: {boxes[index].tolist()}; convert it to xyxy first"
        )
    return boxes


# ------------------------------------------------------------------ RoI pooling, with gradients to the boxes
SMALLEST = 0.25  # cells: the least side over which a table is averaged


def neighbourhood(
    boxes: Float[Tensor, "*r 4"], k: int, extent: float | int | Float[Tensor, "*#r 2"]
) -> Float[Tensor, "*r k2 4"]:
    """The k x k equal cells of a window about the centre of each box, row by row (SLAN, 3.2.3).

    Cell j stands in row j // k and column j mod k, as in Eq. 2; the middle one shares the box's centre. Cells keep
    their size at the border and may leave the picture. Differentiable; a box's own size does not count.

    Args:
        boxes: xyxy in any unit.
        k: cells a side.
        extent: width and height of the whole window in the boxes' unit, for all boxes or for each; a number is
            both. SLAN: the level's r_i for boxes in [0, 1] (1, 1/2, 1/4), or r_i times each box's size.

    Raises:
        ValueError: k is even (floor(k / 2) of Eq. 2 is then off the centre) or not positive.
    """
    if k < 1 or k % 2 == 0:
        raise ValueError(f"a neighbourhood of {k} x {k} cells has no middle: k is odd and positive")
    centre = (boxes[..., :2] + boxes[..., 2:]) / 2
    side = torch.as_tensor(extent, dtype=boxes.dtype, device=boxes.device).expand_as(centre) / k
    steps = torch.arange(k, dtype=boxes.dtype, device=boxes.device) - k // 2
    row, col = torch.meshgrid(steps, steps, indexing="ij")
    steps = torch.stack([col, row], dim=-1).reshape(-1, 2)  # k2 (x, y)
    low = centre[..., None, :] + (steps - 0.5) * side[..., None, :]
    return torch.cat([low, low + side[..., None, :]], dim=-1)


def roi_align(
    maps: Float[Tensor, "b c h w"], boxes: list[Float[Tensor, "_ 4"]] | Float[Tensor, "n 5"], side: int
) -> Float[Tensor, "n c side side"]:
    """torchvision's RoIAlign (aligned, 2 samples a bin and axis) for boxes in cells of the maps: those of each map, or
    all of them with the number of their map before them."""
    return _ops().roi_align(maps, boxes, output_size=side, sampling_ratio=2, aligned=True)


def roi_align_mean(
    features: Float[Tensor, "b c h w"], boxes: Float[Tensor, "b *r 4"], samples: int = 14
) -> Float[Tensor, "b *r c"]:
    """RoIAlign, then average pooling, with gradients to features and boxes.

    The value is that of torchvision's `roi_align(..., o, sampling_ratio=s, aligned=True).mean((2, 3))` for
    `samples = o * s`, at the borders too; torchvision's has no gradient with respect to boxes (nor have the usual
    implementations). The mean over a regular grid of bilinear samples is `y^T F x` with a vector of weights
    for each axis, which depend on the box alone: one matrix product pools all boxes of a picture, no sample is
    ever stored, and autograd does the rest. It takes memory for b r h w weights.

    A box without size is read at its centre; one whose edges are in the wrong order counts as such a box. Beyond
    half a cell outside the picture all is 0, the gradient too. The result has the features' dtype.

    Args:
        boxes: xyxy in [0, 1]; float32, also where the features are of half precision.
        samples: a side; 14 is 7 x 7 bins of 2 x 2 samples.
    """
    if samples < 1:
        raise ValueError(f"{samples} samples a side")
    h, w = features.shape[2:]
    low, size, _ = _in_cells(boxes, w, h, smallest=0)
    x, y = (_sampling_weights(low[..., i], size[..., i], n, samples) for i, n in enumerate((w, h)))
    weights = (y[..., :, None] * x[..., None, :]).to(features.dtype)
    # this way round the gradient comes in the features' layout
    pooled = torch.einsum("bchw,brhw->bcr", features, weights).mT
    return pooled.unflatten(1, boxes.shape[1:-1])


def neighbourhood_mean(
    features: Float[Tensor, "b c h w"], cells: Float[Tensor, "b t k2 4"], samples: int = 14
) -> Float[Tensor, "b t k2 c"]:
    """`roi_align_mean` of the cells of neighbourhoods (`neighbourhood`), for less work: a third of it with K = 3.

    Cells of one column have one pair of x edges, and those of one row one pair of y edges. So `y^T F x` is taken in two
    steps: F with the K columns of each neighbourhood (b t K c h numbers are kept), then that with its K rows.

    Args:
        cells: xyxy in [0, 1], row by row of a K x K grid; only the edges of its first row and column are read.

    Raises:
        ValueError: samples below 1, or a number of cells that is no square.
    """
    k = math.isqrt(cells.shape[2])
    if samples < 1 or k**2 != cells.shape[2]:
        raise ValueError(f"{samples} samples a side, {cells.shape[2]} cells: at least 1, and a square number")
    h, w = features.shape[2:]
    low, size, _ = _in_cells(cells, w, h, smallest=0)
    low, size = (part.unflatten(1, cells.shape[1:3]) for part in (low, size))  # b t k2 2
    x = _sampling_weights(low[:, :, :k, 0].flatten(1), size[:, :, :k, 0].flatten(1), w, samples)
    y = _sampling_weights(low[:, :, ::k, 1].flatten(1), size[:, :, ::k, 1].flatten(1), h, samples)
    columns = torch.einsum("bchw,bmw->bmch", features, x.to(features.dtype))  # m: t k
    columns = columns.unflatten(1, (-1, k)).flatten(2, 3)  # b t (k c) h
    rows = y.to(features.dtype).unflatten(1, (-1, k))  # b t k h
    pooled = (rows @ columns.mT).unflatten(3, (k, -1))  # b t row column c
    return pooled.flatten(2, 3)


class AreaTable(NamedTuple):
    """Summed areas of a map (`summed_area`), to be read by `box_mean` as often as one likes.

    Attributes:
        sums: at the corners of cells (h1 = h + 1, w1 = w + 1), of the map less `mean`.
        mean: of each channel.
    """

    sums: Float[Tensor, "b h1 w1 c"]
    mean: Float[Tensor, "b c"]


def summed_area(features: Float[Tensor, "b c h w"]) -> AreaTable:
    """The summed-area table of a map: `sums[b, i, j]` is the sum of the cells above row i and left of column j.

    The mean of each channel is taken out first and put back by `box_mean`: sums of a map with an offset grow
    with the area and a small box would be the difference of two large numbers. Channels come last, so that a read
    is contiguous; a map in torch's channels_last format saves the copy. float32, or float64 for such maps: in
    float32, on 56 x 56 cells, the mean of a box of one cell is off by 1e-5 of the map's standard deviation on noise,
    by 2e-4 on a ramp from border to border, and by 16 times that for a box of `SMALLEST` (measured).

    Raises:
        ValueError: a map of fewer than 2 cells a side; `roi_align_mean` takes it.
    """
    h, w = features.shape[2:]
    if min(h, w) < 2:
        raise ValueError(f"a map of {h} x {w} cells is too small for a table: use roi_align_mean")
    features = features.to(torch.promote_types(features.dtype, torch.float32))
    # detached: whatever is taken out and put back, the result is the same
    mean = features.detach().mean((2, 3))
    return AreaTable(_RunningSums.apply(features, mean), mean)


def box_mean(table: AreaTable, boxes: Float[Tensor, "b *r 4"]) -> Float[Tensor, "b *r c"]:
    """Exact mean of a bilinear map over each box: what `roi_align_mean` tends to with ever more samples.

    A box is four reads of the table, at its corners, whatever its size. The integral of a bilinear map between
    its cells' corners is quadratic, so a read weighs 3 x 3 entries (a quadratic B-spline; 2 x 2 would take the map
    for piecewise constant, and a box inside one cell would get no gradient). The gradient with respect to
    the boxes is continuous inside the picture.

    A side below `SMALLEST` cells, or with its edges in the wrong order, is widened about its centre to that, as
    the difference of reads so close has few digits left; the size gets no gradient there, the centre does. Of a box
    that leaves the picture, what lies more than half a cell outside counts as 0.

    Args:
        boxes: xyxy in [0, 1]; float32.
    """
    b, h1, w1, c = table.sums.shape
    low, size, area = _in_cells(boxes.to(table.sums.dtype), w1 - 1, h1 - 1, smallest=SMALLEST)
    (col, x, width), (row, y, height) = (
        _reads(low[..., i], low[..., i] + size[..., i], n - 1) for i, n in enumerate((w1, h1))
    )
    picture = torch.arange(b, device=row.device)[:, None, None, None]
    index = (picture * h1 + row[..., :, None]) * w1 + col[..., None, :]  # b r 6 6
    weights = (y / area[..., None])[..., :, None] * x[..., None, :]
    # a weighted sum of rows that is never spelt out as b r 36 c
    pooled = F.embedding_bag(
        index.flatten(0, 1).flatten(1),
        table.sums.flatten(0, 2),
        per_sample_weights=weights.flatten(0, 1).flatten(1),
        mode="sum",
    )
    covered = width * height / area
    pooled = pooled.view(b, -1, c) + covered[..., None] * table.mean[:, None]
    return pooled.unflatten(1, boxes.shape[1:-1])


def _in_cells(
    boxes: Float[Tensor, "b *r 4"], w: int, h: int, *, smallest: float | int
) -> tuple[Float[Tensor, "b n 2"], Float[Tensor, "b n 2"], Float[Tensor, "b n"]]:
    """Low corner (x, y), size and area, in cells, of boxes widened about their centres to `smallest` a side at least.

    NaN for what is not finite.
    """
    corners = boxes.flatten(1, -2).unflatten(-1, (2, 2)) * boxes.new_tensor([w, h])
    low, high = corners.unbind(-2)
    size = (high - low).clamp(min=smallest)
    return low + (high - low - size) / 2, size, size.prod(-1)


def _sampling_weights(
    low: Float[Tensor, "b n"], size: Float[Tensor, "b n"], cells: int, samples: int
) -> Float[Tensor, "b n cells"]:
    """How much each cell of an axis counts in the mean of `samples` linear interpolations along a box."""
    steps = (torch.arange(samples, dtype=low.dtype, device=low.device) + 0.5) / samples
    at = low[..., None] + steps * size[..., None]
    share = ((at >= -0.5) & (at <= cells + 0.5)).to(at.dtype) / samples
    at = (at - 0.5).clamp(0, cells - 1)
    left = at.floor().long().clamp(0, cells - 1)  # clamped again: what is not finite must not become an index
    right = (left + 1).clamp(max=cells - 1)
    part = at - left
    weights = low.new_zeros(*low.shape, cells).scatter_add(-1, left, (1 - part) * share)
    return weights.scatter_add(-1, right, part * share)


def _reads(
    low: Float[Tensor, "b n"], high: Float[Tensor, "b n"], cells: int
) -> tuple[Int[Tensor, "b n 6"], Float[Tensor, "b n 6"], Float[Tensor, "b n"]]:
    """Along one axis: which entries of running sums give the integral from `low` to `high`, how each counts, and
    the length of it that lies on the map."""
    low, high = (edge.clamp(-0.5, cells + 0.5) for edge in (low, high))
    edges = torch.stack([low, high], dim=-1)
    # the entry nearest to the edge and its two neighbours; at the border the outermost three
    middle = edges.round().long().clamp(1, cells - 1)
    t = edges - middle
    # the spline is quadratic to half a cell from its middle; then, at the border, the map is constant and the spline
    # goes on straight, which extrapolates the sums beyond their ends
    s = t.clamp(-0.5, 0.5)
    e = t - s
    spline = [(0.5 - s) ** 2 / 2 - e * (0.5 - s), 0.75 - s**2 - 2 * e * s, (0.5 + s) ** 2 / 2 + e * (0.5 + s)]
    sign = edges.new_tensor([-1, 1])[:, None]
    weights = (torch.stack(spline, dim=-1) * sign).flatten(-2)
    entries = (middle[..., None] + torch.arange(-1, 2, device=middle.device)).flatten(-2)
    return entries, weights, high - low


class _RunningSums(torch.autograd.Function):
    """Sums of `features - mean` over all rows above and columns left of a corner, channels last.

    Slices are added in a loop: on a CPU that takes a tenth of `cumsum`'s time along axes that are not the last. The
    backward pass is the same from the other end: a cell counts in all corners below and right of it.
    """

    @staticmethod
    def forward(ctx, features: Float[Tensor, "b c h w"], mean: Float[Tensor, "b c"]) -> Tensor:
        b, c, h, w = features.shape
        sums = features.new_empty(b, h + 1, w + 1, c)
        sums[:, 0] = 0
        sums[:, :, 0] = 0
        torch.sub(features.permute(0, 2, 3, 1), mean[:, None, None], out=sums[:, 1:, 1:])
        ctx.channels_last = features.is_contiguous(memory_format=torch.channels_last)
        for dim in (2, 1):
            parts = sums.unbind(dim)
            for before, part in pairwise(parts[1:]):
                part += before
        return sums

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Float[Tensor, "b h1 w1 c"]) -> tuple[Tensor, None]:
        result = torch.empty_like(gradient[:, 1:, 1:])  # the engine may still need what it handed in
        columns, given = result.unbind(2), gradient[:, 1:, 1:].unbind(2)
        columns[-1].copy_(given[-1])
        for i in range(len(columns) - 2, -1, -1):
            torch.add(given[i], columns[i + 1], out=columns[i])
        rows = result.unbind(1)
        for i in range(len(rows) - 2, -1, -1):
            rows[i].add_(rows[i + 1])
        if ctx.channels_last:
            return result.permute(0, 3, 1, 2), None
        b, h, w, c = result.shape
        # picture by picture, as torch transposes a matrix in blocks, but a batch of them element by element
        maps = result.new_empty(b, c, h, w)
        for target, cells in zip(maps, result, strict=True):
            target.flatten(1).copy_(cells.flatten(0, 1).T)
        return maps, None
