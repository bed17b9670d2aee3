"""Region and cell features of frozen networks, extracted once into SCAN's layout plus boxes.

Cells and regions have one layout, features "n r d" with boxes "n r 4" in pixels, so that one tower reads both
and any attention over them can be drawn on the picture. What made them (pictures, captions, the backbone's weights,
proposals, size) is their key: features with another key are never mistaken for these.

Axes: `n` pictures, `r` cells or regions, `d` width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from finematch.boxes import grid_boxes, multi_scale_grid, roi_align
from finematch.data.precomp import Regions, load_regions, write_layout
from finematch.data.record import DataError, Record, digests
from finematch.features.backbones import Backbone
from finematch.features.blockwise import write_rows
from finematch.features.detections import Detections
from finematch.features.proposals import propose, searched, selective_search
from finematch.files import cached

FILES = "all"  # what SCAN's layout calls the split in files that are a folder of their own
BLOCK = 32  # pictures whose features are made and written at once


def extract(
    records: list[Record],
    backbone: Backbone,
    cache: str | Path,
    split: str,
    *,
    kind: str = "cells",
    regions: int = 36,
    proposals: str | Detections = "auto",
    echo: Callable[[str], None] | None = print,
) -> Regions:
    """Features of every picture, read back memory-mapped; finished work is reused, broken off work resumed.

    `cells`: the backbone's feature map, a box a cell. `regions`: `regions` proposals a picture, each the
    mean of a 3 x 3 RoI-align of the map (aligned, 2 samples a bin and axis). An image with fewer `Detections` than
    `regions` is filled up from the multi-scale grid, as with selective search: all images have as many.

    They are found in the cache by their content: the pictures' bytes, ids and captions, the network's weights and all
    settings. `meta["content"]` holds the digests.

    Args:
        split: what the result is called.

    Raises:
        ValueError: For an unknown `kind`.
        DataError: For a picture that cannot be read: it is named, nothing is skipped, because the files
            would no longer pair up. For features that were damaged since, or a disk without room for them.
    """
    if kind not in ("cells", "regions"):
        raise ValueError(f"kind is {kind!r}; use 'cells' or 'regions'")
    if not records:
        raise DataError(
            cache, f"split {split}", "there are no pictures to extract", "Check the dataset's split"
        )
    meta = {**backbone.key, "kind": kind, "proposals": "cells", "regions": 0 if kind == "cells" else regions}
    search = None
    if kind == "regions" and isinstance(proposals, Detections):
        meta |= {"proposals": proposals.key["proposals"], "boxes": proposals.key["weights"]}
        without = proposals.check(records, split)
        if echo and without:
            echo(f"{split}: {without} of {len(records)} images have no box in {proposals.path.name}")
    elif kind == "regions":
        meta["proposals"], search = propose(proposals)
        meta |= searched(records) if search is selective_search else {}
    found = digests(records)
    content = {
        "network": backbone.digest,
        **{k: found[k] for k in ("images", "captions") if k in found},
    }

    def block_of(items: range) -> dict[str, np.ndarray]:
        pictures = [records[i].open() for i in items]
        maps, sizes = backbone(pictures), np.array([p.size for p in pictures], np.int32)
        if kind == "cells":
            features = maps.flatten(2).transpose(1, 2)
            boxes = np.stack([grid_boxes(*p.size, maps.shape[2], maps.shape[3]).numpy() for p in pictures])
        else:
            found = (
                [search(p, regions) for p in pictures]
                if search
                else [
                    _filled(proposals, records[i], p.size, regions)
                    for i, p in zip(items, pictures, strict=True)
                ]
            )
            boxes = np.stack(found)
            features = pool_regions(maps, torch.from_numpy(boxes), torch.from_numpy(sizes))
        arrays = {
            "ims": features.cpu().numpy().astype(np.float16),
            "boxes": boxes.astype(np.float32),
            "sizes": sizes,
        }
        return {f"{FILES}_{name}": array for name, array in arrays.items()}

    def say(done: int) -> None:
        if echo:
            echo(f"{split}: {done} of {len(records)} pictures ({meta['proposals']})")

    def make(folder: Path) -> None:
        ids = [record.image_id for record in records]
        write_rows(folder, np.arange(len(records) + 1), block_of, ids, block=BLOCK, echo=say)
        write_layout(folder, FILES, records, {**meta, "content": content})

    folder = cached(cache, kind, {**meta, "content": content, "dtype": "float16"}, make)
    return replace(load_regions(folder, FILES), split=split)


def _filled(
    detections: Detections, record: Record, size: tuple[int, int], regions: int
) -> Float[np.ndarray, "r 4"]:
    """The `regions` best boxes of an image, then those of the grid."""
    boxes = detections.of(record, size)[0][:regions]
    return np.concatenate([boxes, multi_scale_grid(*size, regions).numpy()])[:regions]


def pool_regions(
    maps: Float[Tensor, "b d h w"], boxes: Float[Tensor, "b r 4"], sizes: Tensor
) -> Float[Tensor, "b r d"]:
    """Mean of a 3 x 3 RoI-align for boxes in xyxy pixels of pictures of `sizes` "b 2" (width, height)."""
    h, w = maps.shape[2:]
    scale = sizes.new_tensor([w, h, w, h]) / sizes.repeat(1, 2)[:, None]  # b 1 4, pixels to cells
    scaled = (boxes * scale).to(maps)
    pooled = roi_align(maps, list(scaled), 3)
    return pooled.mean((2, 3)).unflatten(0, boxes.shape[:2])
