"""Boxes: formats, areas, overlaps, suppression, regular proposals. Pure torch, on torchvision's operators.

A box is `(x1, y1, x2, y2)` in pixels unless a name says otherwise, with real-valued edges and no "+1": a box
from 0 to 10 is 10 wide. `xywh` is corner and size (COCO's files), `cxcywh` centre and size (DETR's heads).

Axes: `n`, `m` boxes.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torchvision import ops

FORMATS = ("xyxy", "xywh", "cxcywh")


def convert(boxes: Float[Tensor, "*n 4"], source: str, target: str) -> Float[Tensor, "*n 4"]:
    """Boxes from one of `xyxy`, `xywh`, `cxcywh` to another, in any unit. ValueError for another name."""
    for name in (source, target):
        if name not in FORMATS:
            raise ValueError(f"unknown box format {name!r}: choose one of {', '.join(FORMATS)}")
    return ops.box_convert(boxes, source, target)


def clip(boxes: Float[Tensor, "*n 4"], width: float | int, height: float | int) -> Float[Tensor, "*n 4"]:
    """Boxes cut at the borders of a `width` x `height` picture; one outside of it is left without area."""
    return ops.clip_boxes_to_image(boxes, (height, width))


def area(boxes: Float[Tensor, "n 4"]) -> Float[Tensor, "n"]:
    """Areas in square pixels. ValueError for a box whose edges are in the wrong order."""
    return ops.box_area(_ordered(boxes))


def iou(a: Float[Tensor, "n 4"], b: Float[Tensor, "m 4"]) -> Float[Tensor, "n m"]:
    """Intersection over union of every pair, in [0, 1]; 0 where neither box has an area.

    Raises:
        ValueError: a box whose edges are in the wrong order or not finite (boxes in another format, often).
    """
    return torch.nan_to_num(ops.box_iou(_ordered(a), _ordered(b)), nan=0.0)


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
    return ops.generalized_box_iou(a, b)


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
    return ops.nms(_ordered(boxes), scores, threshold)[:keep]


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
