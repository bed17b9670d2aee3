"""Region and cell features of frozen networks, extracted once into SCAN's layout plus boxes.

Cells and regions have one layout, features "n r d" with boxes "n r 4" in pixels, so that one tower reads both
and any attention over them can be drawn on the picture. What made them (backbone and its weights, proposals,
size) is their key: features with another key are never mistaken for these.

Axes: `n` pictures, `r` cells or regions, `d` width.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from torchvision.ops import roi_align

from finematch.boxes import grid_boxes
from finematch.data.precomp import Regions, RegionsWriter, finished, load_regions
from finematch.data.record import DataError, Record
from finematch.features.backbones import Backbone
from finematch.features.proposals import propose


def extract(
    records: list[Record],
    backbone: Backbone,
    folder: str | Path,
    split: str,
    *,
    kind: str = "cells",
    regions: int = 36,
    proposals: str = "auto",
    block: int = 32,
    dtype: str = "float16",
    echo: Callable[[str], None] | None = print,
) -> Regions:
    """Features of every picture, read back memory-mapped; finished work is reused, broken off work resumed.

    `cells`: the backbone's feature map, a box a cell. `regions`: `regions` proposals a picture, each the
    mean of a 3 x 3 RoI-align of the map (aligned, 2 samples a bin and axis).

    Raises:
        ValueError: For an unknown `kind`.
        DataError: For a picture that cannot be read: it is named, nothing is skipped, because the files
            would no longer pair up.
    """
    if kind not in ("cells", "regions"):
        raise ValueError(f"kind is {kind!r}; use 'cells' or 'regions'")
    method, search = ("cells", None) if kind == "cells" else propose(proposals)
    meta = {**backbone.key, "kind": kind, "proposals": method, "regions": 0 if kind == "cells" else regions}
    ids = [r.image_id for r in records]
    if finished(folder, split, meta, ids):
        made = load_regions(folder, split)
        if made.features.dtype == dtype:
            return made
    writer, start = None, 0
    while start < len(records):
        if writer is None:  # the first picture tells the shape
            maps = backbone([records[0].open()])
            r = maps.shape[2] * maps.shape[3] if kind == "cells" else regions
            writer = RegionsWriter(folder, split, len(records), r, maps.shape[1], meta, dtype, ids=ids)
            start = writer.done
            continue
        pictures = [record.open() for record in records[start : start + block]]
        maps, sizes = backbone(pictures), np.array([p.size for p in pictures], np.int32)
        if kind == "cells":
            features = maps.flatten(2).transpose(1, 2)
            boxes = np.stack([grid_boxes(*p.size, maps.shape[2], maps.shape[3]).numpy() for p in pictures])
        else:
            boxes = np.stack([search(p, regions) for p in pictures])
            features = pool_regions(maps, torch.from_numpy(boxes), torch.from_numpy(sizes))
        writer.write(features.cpu().numpy(), boxes, sizes)
        start += len(pictures)
        if echo and (start == len(records) or (start // block) % 32 == 0):
            echo(f"{split}: {start} of {len(records)} pictures ({method})")
    if writer is None:
        raise DataError(
            folder, f"split {split}", "there are no pictures to extract", "Check the dataset's split"
        )
    writer.finish(records)
    return load_regions(folder, split)


def pool_regions(
    maps: Float[Tensor, "b d h w"], boxes: Float[Tensor, "b r 4"], sizes: Tensor
) -> Float[Tensor, "b r d"]:
    """Mean of a 3 x 3 RoI-align for boxes in xyxy pixels of pictures of `sizes` "b 2" (width, height)."""
    h, w = maps.shape[2:]
    scale = sizes.new_tensor([w, h, w, h]) / sizes.repeat(1, 2)[:, None]  # b 1 4, pixels to cells
    scaled = (boxes * scale).to(maps)
    pooled = roi_align(maps, list(scaled), output_size=3, sampling_ratio=2, aligned=True)
    return pooled.mean((2, 3)).unflatten(0, boxes.shape[:2])
