"""The record that every dataset of images and captions yields, those of three tasks, and the errors loaders raise.

Boxes are absolute pixels of the stored picture, `(x1, y1, x2, y2)`, no "+1"; character spans are
half-open `[start, end)` into the caption they belong to.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path

from PIL import Image

from finematch.data.images import open_rgb
from finematch.files import DataError, digest, file_digests

Box = tuple[float, float, float, float]


@dataclass(frozen=True, slots=True)
class Object:
    """A labelled box. `crowd` is COCO's `iscrowd`."""

    box: Box
    category: str
    crowd: bool = False


def is_entity(thing: Object, min_side: float | int = 1) -> bool:
    """Whether a box is one thing, no crowd, with both sides of `min_side` pixels or more.

    A thousandth of a pixel is left to rounding: x + 1 - x is less than 1 for many x.
    """
    x1, y1, x2, y2 = thing.box
    return not thing.crowd and min(x2 - x1, y2 - y1) >= min_side - 1e-3


@dataclass(frozen=True, slots=True)
class Phrase:
    """Characters `[start, end)` of caption number `caption`, and the boxes they name (none for "scene")."""

    caption: int
    start: int
    end: int
    boxes: tuple[Box, ...] = ()
    kind: str = "other"
    entity: str = ""


@dataclass(frozen=True, slots=True)
class Record:
    """One picture and what is known of it. `image` is None where only features are published."""

    image_id: str
    split: str
    captions: tuple[str, ...]
    image: Path | None = None
    size: tuple[int, int] | None = None  # (width, height) in pixels, where the source states it
    objects: tuple[Object, ...] = ()
    phrases: tuple[Phrase, ...] = ()
    source: str = field(default="", compare=False)  # file and entry, for error messages
    known_as: tuple[str, ...] = field(default=(), compare=False)  # in other datasets: see `data.names`

    def open(self) -> Image.Image:
        """The image as RGB of the stated size, see `data.images`; DataError if it cannot be read or is of another."""
        boxed = bool(self.objects) or any(phrase.boxes for phrase in self.phrases)
        return open_rgb(self.image, self.source or self.image_id, size=self.size, boxed=boxed)


@dataclass(frozen=True, slots=True)
class Question:
    """A question about an image (VQAv2). `answers` are those of ten people, none where they are withheld."""

    question_id: int
    split: str
    text: str
    image_id: str
    image: Path
    answers: tuple[str, ...] = ()
    question_type: str = ""  # its first words, "how many"
    answer_type: str = ""  # "yes/no", "number" or "other"
    source: str = field(default="", compare=False)

    def open(self) -> Image.Image:
        """The image as RGB; DataError if it cannot be read."""
        return open_rgb(self.image, self.source)


@dataclass(frozen=True, slots=True)
class ImagePair:
    """A sentence about a left and a right image (NLVR2). `label`: whether it is true; None where it is withheld."""

    identifier: str
    split: str
    sentence: str
    images: tuple[Path, Path]
    label: bool | None = None
    source: str = field(default="", compare=False)

    def open(self) -> tuple[Image.Image, Image.Image]:
        """The left and the right image as RGB; DataError if one cannot be read."""
        left, right = self.images
        return open_rgb(left, self.source), open_rgb(right, self.source)


@dataclass(frozen=True, slots=True)
class Clip:
    """A video and its captions. `video` is its file, or a folder of frames; `data.video` reads either."""

    video_id: str
    split: str
    captions: tuple[str, ...]
    video: Path
    source: str = field(default="", compare=False)


Entry = Record | Question | ImagePair | Clip


def check_box(box, size: tuple[int, int] | None, file: str | Path, record: str, *, slack: float = 1.0) -> Box:
    """`box` (xyxy pixels) as floats, clipped to the picture; DataError if it has no area or lies outside.

    `slack` pixels beyond the border are clipped silently: published boxes are rounded.
    """
    x1, y1, x2, y2 = (float(v) for v in box)
    if not all(map(math.isfinite, (x1, y1, x2, y2))):
        raise DataError(file, record, f"box {box} is not finite", "Correct or remove the annotation")
    if size is not None:
        width, height = size
        if x1 < -slack or y1 < -slack or x2 > width + slack or y2 > height + slack:
            raise DataError(
                file,
                record,
                f"box {(x1, y1, x2, y2)} lies outside the {width} x {height} picture",
                "Correct the box, or scale it with the picture",
            )
        if max(x2, y2) <= 1 < min(size) and x2 > x1 and y2 > y1:
            raise DataError(
                file,
                record,
                f"box {(x1, y1, x2, y2)} lies within the first pixel: these are fractions of the image",
                "Multiply by its width and height",
            )
        x1, x2 = (min(max(v, 0.0), float(width)) for v in (x1, x2))
        y1, y2 = (min(max(v, 0.0), float(height)) for v in (y1, y2))
    if x2 <= x1 or y2 <= y1:
        raise DataError(
            file, record, f"box {(x1, y1, x2, y2)} has no area", "Correct or remove the annotation"
        )
    return x1, y1, x2, y2


def digests(records: Sequence[Record]) -> dict[str, str]:
    """SHA-256 of each part of a set: what was in it, wherever it lies.

    Returns:
        `images` (ids, splits and the bytes of the files), `captions`, `boxes` (with the stated sizes and the
        categories), `phrases`; parts that no record has are left out.

    Raises:
        DataError: A picture file that is missing, or two records with one id.
    """
    names = [record.image_id for record in records]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise DataError("(records)", f"image id {twice!r}", "is that of two records", "Make ids unique")
    with_files = [record for record in records if record.image is not None]
    contents = zip(with_files, file_digests([r.image for r in with_files]), strict=True)
    parts = {
        "images": [[r.image_id, r.split, content] for r, content in contents],
        "captions": [[r.image_id, r.split, *r.captions] for r in records if r.captions],
        "boxes": [[r.image_id, r.size, [_values(o) for o in r.objects]] for r in records if r.objects],
        "phrases": [[r.image_id, r.size, [_values(p) for p in r.phrases]] for r in records if r.phrases],
    }
    return {name: digest(rows) for name, rows in parts.items() if rows}


def _values(one: Object | Phrase) -> list:
    """What `dataclasses.astuple` gives, which copies each value and takes ten times as long."""
    return [getattr(one, name) for name in one.__slots__]


def task_digests(entries: Sequence[Question] | Sequence[ImagePair] | Sequence[Clip]) -> dict[str, str]:
    """`digests` of the records of a task: `files` (what images or frames are in them) and `texts` (all the rest).

    A video that is missing counts as such; frames of a folder count in their order.

    Raises:
        DataError: An image file that is missing, or two records with one id.
    """
    names = [getattr(entry, fields(entry)[0].name) for entry in entries]
    if len(set(names)) < len(names):
        twice = next(name for name, count in Counter(names).items() if count > 1)
        raise DataError("(records)", f"id {twice!r}", "is that of two records", "Make ids unique")
    groups = [_files(entry) for entry in entries]
    distinct = list(dict.fromkeys(path for group in groups for path in group))
    content = dict(zip(distinct, file_digests(distinct), strict=True))
    texts = [
        [getattr(e, f.name) for f in fields(e) if f.compare and f.name not in ("image", "images", "video")]
        for e in entries
    ]
    return {"files": digest([[content[path] for path in group] for group in groups]), "texts": digest(texts)}


def _files(entry: Question | ImagePair | Clip) -> list[Path]:
    if not isinstance(entry, Clip):
        return [entry.image] if isinstance(entry, Question) else list(entry.images)
    if entry.video.is_dir():
        return sorted(entry.video.iterdir())
    return [entry.video] if entry.video.exists() else []


def pairs(records) -> list[tuple[int, str]]:
    """`(index of the picture, caption)` for every caption, in order: the text side of a retrieval gallery."""
    return [(i, caption) for i, record in enumerate(records) for caption in record.captions]
