"""Region proposals: up to `m` boxes a picture with scores, from a detector or its file, from OpenCV, or as annotated.

FELGA 3.2.1. One function, `extract_proposals`, whatever finds the boxes; what it finds is cached on disk, keyed by
what made it. A picture may have fewer boxes than `m`, or none: rows beyond them are padding, and a mask says so.

Axes: `n` pictures, `m` boxes of the fullest picture, `r` boxes of one picture.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from PIL import Image

from finematch.boxes import clip, iou, multi_scale_grid
from finematch.data.images import opening
from finematch.data.record import DataError, Object, Record, digests, is_entity
from finematch.features.blockwise import write_rows
from finematch.features.detections import Detections
from finematch.files import cached

BLOCK = 32  # pictures that are searched before their boxes are written
SEARCHED = 640 * 640  # pixels of a picture that is searched as it is; the time grows faster than their number
SURPLUS = 4  # times as many boxes are asked for, so that small ones can go


def selective_search(picture: Image.Image, top: int) -> Float[np.ndarray, "r 4"]:
    """The first `top` distinct boxes of OpenCV contrib's fast selective search, xyxy pixels.

    Boxes under 4 % of the picture's shorter side are dropped; a picture with fewer proposals than `top` is
    filled up from the multi-scale grid, so that every picture has as many. A picture of more than `SEARCHED`
    pixels, as a phone takes it, is searched at that size: minutes become a second. OpenCV ranks its proposals with
    the C library's `rand`; it is seeded here, or a picture's boxes would depend on the pictures before it.
    """
    import cv2

    ctypes.CDLL(None).srand(1)
    search = cv2.ximgproc.segmentation.createSelectiveSearchSegmentation()
    scale = min(1.0, (SEARCHED / (picture.width * picture.height)) ** 0.5)
    size = picture.size if scale == 1 else tuple(max(1, round(side * scale)) for side in picture.size)
    search.setBaseImage(np.asarray(picture.resize(size))[:, :, ::-1].copy())
    search.switchToSelectiveSearchFast()
    found = search.process().astype(np.float32)
    found[:, 2:] += found[:, :2]
    found *= np.tile(np.array(picture.size, np.float32) / size, 2)
    sides = found[:, 2:] - found[:, :2]
    found = distinct(found[(sides >= 0.04 * min(picture.size)).all(1)])
    spare = multi_scale_grid(*picture.size, top).numpy()
    return np.concatenate([found, spare])[:top]


def searched(records: Sequence[Record]) -> dict:
    """What the key of boxes found by selective search has besides: the size at which large pictures are searched.

    Empty where no picture is larger, so that it changes the key of no other set.
    """
    for record in records:
        width, height = record.size or _size(record)
        if width * height > SEARCHED:
            return {"searched": SEARCHED}
    return {}


def _size(record: Record) -> tuple[int, int]:
    with opening(record.image, record.source or record.image_id) as picture:
        return picture.size


def distinct(boxes: Float[np.ndarray, "m 4"], threshold: float = 0.9) -> Float[np.ndarray, "k 4"]:
    """Boxes in order, without those that overlap an earlier one by more than `threshold` IoU."""
    if not len(boxes):
        return boxes
    overlap, keep = iou(torch.from_numpy(boxes), torch.from_numpy(boxes)).numpy(), []
    for i in range(len(boxes)):
        if not keep or overlap[i, keep].max() <= threshold:
            keep.append(i)
    return boxes[keep]


def propose(method: str) -> tuple[str, Callable[[Image.Image, int], np.ndarray]]:
    """A proposal method by name, and the name of what it really is.

    `"auto"` takes selective search where OpenCV has its contrib modules and the grid where it has not; the
    returned name goes into the features' key, so the file says which.

    Raises:
        ValueError: For an unknown method, or selective search without OpenCV contrib.
    """
    if method not in ("auto", "selective_search", "grid"):
        raise ValueError(f"proposals is {method!r}; use 'auto', 'selective_search' or 'grid'")
    if method != "grid":
        try:
            import cv2

            cv2.ximgproc.segmentation.createSelectiveSearchSegmentation()
            return "selective_search", selective_search
        except (ImportError, AttributeError) as error:
            if method == "selective_search":
                raise ValueError("selective search needs opencv-contrib-python-headless; "
                                 "install it, or use proposals='grid'") from error  # fmt: skip
    return "grid", lambda picture, top: multi_scale_grid(*picture.size, top).numpy()


@runtime_checkable
class Detector(Protocol):
    """Boxes of one picture in xyxy pixels and their scores, the best first; `key` is all that makes them."""

    key: dict

    def __call__(self, picture: Image.Image) -> tuple[Float[np.ndarray, "r 4"], Float[np.ndarray, "r"]]: ...


@dataclass(frozen=True, eq=False)
class Proposals:
    """Boxes of a split in xyxy pixels, the best first, zeros where `mask` is False."""

    boxes: Float[np.ndarray, "n m 4"]
    scores: Float[np.ndarray, "n m"]
    mask: Bool[np.ndarray, "n m"]
    sizes: Int[np.ndarray, "n 2"]  # width, height of the pictures in pixels
    ids: list[str]
    meta: dict = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.ids)

    def of(self, i: int) -> Float[np.ndarray, "r 4"]:
        """The boxes of picture `i`, without padding."""
        return self.boxes[i, self.mask[i]]

    @property
    def key(self) -> str:
        """SHA-256 of the pictures' ids and of their boxes: features of the same boxes are the same features."""
        digest = hashlib.sha256(json.dumps(self.ids).encode())
        for array in (self.boxes, self.mask):
            digest.update(np.ascontiguousarray(array).tobytes())
        return digest.hexdigest()


@dataclass(frozen=True)
class _Ranked:
    """Selective search or the grid as a detector. They rank boxes without a score; 1 / rank stands for it."""

    search: Callable[[Image.Image, int], np.ndarray]
    asked: int
    key: dict

    def __call__(self, picture: Image.Image) -> tuple[np.ndarray, np.ndarray]:
        boxes = self.search(picture, self.asked)
        return boxes, (1 / np.arange(1, len(boxes) + 1)).astype(np.float32)


def extract_proposals(
    records: list[Record],
    method: str | Detector | Detections,
    cache: str | Path,
    split: str,
    *,
    top: int = 10,
    min_side: float | int = 8,
    echo: Callable[[str], None] | None = print,
) -> Proposals:
    """The `top` best boxes of every picture; finished work is read back, broken off work resumed.

    Boxes are clamped to the picture, and those with a side under `min_side` pixels are dropped (register F17) before
    the `top` are taken, so that a box that nothing could be read from takes no place.

    Args:
        method: a `Detector` (`DETReg`), the `Detections` of a file, or `"selective_search"`, `"grid"`, `"auto"` (see
            `features.propose`), or `"given"`: the records' own objects (see `given`), which are not cached.
        cache: they are found there by the pictures' content and all settings.
        split: what messages call the pictures.
        min_side: 8 is for photos; pictures of 64 pixels need less.

    Raises:
        ValueError: For an unknown `method`.
        DataError: For a picture that cannot be read, or a box or score that is not finite.
    """
    if method == "given":
        return given(records, top=top, min_side=min_side)
    if isinstance(method, str):
        try:
            name, search = propose(method)
        except ValueError as error:
            raise ValueError(f"{error}; or 'given', or a detector such as DETReg, or Detections") from error
        key = {"proposals": name, "asked": SURPLUS * top}
        method = _Ranked(
            search, SURPLUS * top, key | (searched(records) if search is selective_search else {})
        )
    if isinstance(method, Detections):
        without = method.check(records, split)
        if echo and without:
            echo(f"{split}: {without} of {len(records)} images have no box in {method.path.name}")
    meta = {**method.key, "top": top, "min_side": float(min_side)}
    ids = [r.image_id for r in records]
    if not records:
        raise DataError(
            cache, f"split {split}", "there are no pictures to search", "Check the dataset's split"
        )

    def search_block(items: range) -> dict[str, np.ndarray]:
        scores, boxes, sizes = _best(method, [records[i] for i in items], top, min_side)
        return {"all_ims": scores, "all_boxes": boxes, "all_sizes": sizes}

    def say(done: int) -> None:
        if echo:
            echo(f"{split}: {done} of {len(records)} pictures ({meta['proposals']})")

    def make(folder: Path) -> None:
        write_rows(folder, np.arange(len(records) + 1), search_block, ids, block=BLOCK, echo=say)

    folder = cached(cache, "proposals", {**meta, "images": digests(records).get("images", "")}, make)
    boxes, scores, sizes = (np.load(folder / f"all_{a}.npy") for a in ("boxes", "ims", "sizes"))
    return Proposals(boxes, scores[..., 0], boxes[..., 2] > boxes[..., 0], sizes, ids, meta)


def _best(
    method: Detector | Detections, records: list[Record], top: int, min_side: float | int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Scores "b top 1", boxes "b top 4" and sizes "b 2" of a few pictures."""
    pictures = [record.open() for record in records]
    boxes = np.zeros((len(pictures), top, 4), np.float32)
    scores = np.zeros((len(pictures), top, 1), np.float32)
    for i, (record, picture) in enumerate(zip(records, pictures, strict=True)):
        found, score = method.of(record, picture.size) if isinstance(method, Detections) else method(picture)
        if not (np.isfinite(found).all() and np.isfinite(score).all()):
            raise DataError(
                record.image or "(no file)",
                f"image {record.image_id}",
                f"{method.key['proposals']} gives a box or a score that is not finite",
                "Check the detector's weights",
            )
        kept, usable = usable_boxes(found, picture.size, min_side)
        kept, score = kept[:top], score[usable][:top]
        boxes[i, : len(kept)], scores[i, : len(kept), 0] = kept, score
    return scores, boxes, np.array([p.size for p in pictures], np.int32)


def usable_boxes(
    boxes: Float[np.ndarray, "r 4"], size: tuple[int, int], min_side: float | int
) -> tuple[Float[np.ndarray, "k 4"], Bool[np.ndarray, "r"]]:
    """The boxes clamped to a picture of `size` (width, height), without those whose side is then under `min_side`
    pixels or nothing; and which of them stayed."""
    clamped = clip(torch.from_numpy(np.asarray(boxes, np.float32)), *size).numpy()
    sides = (clamped[:, 2:] - clamped[:, :2]).min(1)
    usable = (sides >= min_side) & (sides > 0)
    return clamped[usable], usable


def usable_objects(record: Record, *, min_side: float | int = 1) -> list[Object]:
    """The objects of a record that are boxes of one thing (no crowd) and large enough, in its order.

    With the default these are the queries of FELGA's description assignment (`query_boxes`, by the same rule). The j-th
    box that `given` finds on a picture is that of the j-th of them.
    """
    return [thing for thing in record.objects if is_entity(thing, min_side)]


def given(records: list[Record], *, top: int | None = None, min_side: float | int = 1) -> Proposals:
    """The records' own objects as proposals, score 1, in their order; crowds are left out.

    Args:
        top: at most so many a picture; None for all.

    Raises:
        DataError: For an object outside its picture, which could be no crop.
    """
    objects = [usable_objects(r, min_side=min_side)[:top] for r in records]
    sizes, ids = [r.size or r.open().size for r in records], [r.image_id for r in records]
    m = top if top is not None else max(map(len, objects), default=0)
    boxes, mask = np.zeros((len(records), m, 4), np.float32), np.zeros((len(records), m), bool)
    for i, (mine, size) in enumerate(zip(objects, sizes, strict=True)):
        if mine:
            own, usable = usable_boxes(np.array([o.box for o in mine], np.float32), size, 0)
            if not usable.all():
                outside = mine[int(usable.argmin())].box
                raise DataError(records[i].source or "(records)", f"image {ids[i]}",
                                f"box {outside} has no area on the {size[0]} x {size[1]} picture",
                                "Correct or remove the object")  # fmt: skip
            boxes[i, : len(mine)], mask[i, : len(mine)] = own, True
    meta = {"proposals": "given", "top": top, "min_side": float(min_side)}
    return Proposals(boxes, mask.astype(np.float32), mask, np.array(sizes, np.int32), ids, meta)
