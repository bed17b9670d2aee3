"""Reading files so that every failure names the file, the record and the remedy; shared by the loaders."""

from __future__ import annotations

import codecs
import json
import logging
import os
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from finematch.data.images import possible_sizes
from finematch.data.record import Box, DataError, Record, check_box
from finematch.files import disguise, why_unreadable

logger = logging.getLogger(__name__)
SAMPLE = 64  # images whose sizes are compared while a set is loaded
FEW = 8  # boxes that say nothing of how a file writes them


def read_bytes(path: str | Path) -> bytes:
    """A whole file without a byte order mark; DataError if it is missing."""
    try:
        return Path(path).read_bytes().removeprefix(codecs.BOM_UTF8)
    except OSError as error:
        raise DataError(
            path,
            "the file",
            f"cannot be read ({error.strerror})",
            "Check the path; finematch.data.dataset_help() prints the expected layouts",
        ) from error


def read_text(path: str | Path) -> str:
    """A whole UTF-8 text file (a byte order mark is dropped); DataError if it is missing or not UTF-8."""
    try:
        return read_bytes(path).decode()
    except UnicodeDecodeError as error:
        line, why = error.object[: error.start].count(b"\n") + 1, disguise(path)
        problem = f"is not UTF-8 text{why and f' ({why})'}"
        raise DataError(path, f"line {line}", problem, "Convert the file to UTF-8") from error


def read_json(path: str | Path) -> Any:
    """A JSON file; DataError with line and column if it is malformed."""
    try:
        return json.loads(read_text(path))
    except json.JSONDecodeError as error:
        raise DataError(
            path,
            f"line {error.lineno} column {error.colno}",
            f"malformed JSON ({disguise(path) or error.msg})",
            "Download the file again; it may be cut off",
        ) from error


def open_array(path: str | Path) -> np.ndarray:
    """A .npy file, mapped; DataError if it is cut off, something else under that name, or holds Python objects."""
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
        if not isinstance(array, np.ndarray):  # an .npz
            array.close()
            raise ValueError("several arrays")
        return array
    except (OSError, ValueError, EOFError) as error:
        raise DataError(
            path,
            "the array",
            f"cannot be mapped ({why_unreadable(path, error)})",
            "Restore it; a download that was cut off is shorter than its header says",
        ) from error


class reading:  # a class, for it is entered once a record: a generator takes five times as long
    """Turn a missing or mistyped field, met while reading, into a DataError that names the record."""

    __slots__ = ("file", "record")

    def __init__(self, file: str | Path, record: str):
        self.file, self.record = file, record

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind, error: BaseException | None, traceback) -> None:
        if error is None or isinstance(error, DataError):
            return
        if isinstance(error, KeyError):
            problem, remedy = f"the field {error} is missing", "Add it, or remove the record"
        elif isinstance(error, (TypeError, ValueError, AttributeError)):
            problem, remedy = f"malformed entry ({error})", "Correct or remove it"
        else:
            return
        raise DataError(self.file, self.record, problem, remedy) from error


def clean_caption(text: object, file: str | Path, record: str) -> str:
    """The caption without surrounding white space; DataError if nothing is left or it is not text."""
    if not isinstance(text, str):
        raise DataError(file, record, f"the caption is {type(text).__name__}, not text", "Correct it")
    if not (caption := text.strip()):
        raise DataError(file, record, "the caption is empty", "Write it, or remove it from the file")
    if not caption.isascii() and any("\ud800" <= character <= "\udfff" for character in caption):
        raise DataError(file, record, f"the caption {caption!r} has half a character", "Decode it again")
    return caption


def require_pictures(paths: Iterable[Path], source: str | Path) -> None:
    """DataError if a picture file is missing: the first three are named, and how many there are.

    One directory scan per folder, because a stat per picture takes minutes on a network disk.
    """
    paths, present = list(paths), {}
    names = [os.path.split(path) for path in paths]  # a third of the time of `path.parent` and `path.name`
    for folder in {folder for folder, _ in names}:
        try:
            with os.scandir(folder or ".") as entries:
                present[folder] = {entry.name for entry in entries}
        except OSError as error:
            raise DataError(
                folder,
                f"pictures of {source}",
                f"the folder cannot be read ({error.strerror})",
                "Put the pictures there, or pass another image folder",
            ) from error
    if missing := [
        path for path, (folder, name) in zip(paths, names, strict=True) if name not in present[folder]
    ]:
        first = ", ".join(str(path) for path in missing[:3])
        raise DataError(
            source,
            f"pictures {first}",
            f"{len(missing)} of {len(paths)} picture files are missing",
            "Restore them, or remove their records",
        )


def check_sizes(records: Sequence[Record], stated_in: Callable[[Record], str | Path]) -> None:
    """DataError if an image is of another size than its annotation states: boxes would lie in wrong places.

    Only the headers of `SAMPLE` images, spread evenly, are read here, which finds a set that was resized or turned; the
    others are compared when they are opened. An image that cannot be decoded is left to those who open it.
    """
    sized = [record for record in records if record.image is not None and record.size is not None]
    for number in sorted({len(sized) * k // SAMPLE for k in range(SAMPLE)} if sized else ()):
        record = sized[number]
        try:
            found = possible_sizes(record.image)
        except DataError:
            continue
        if record.size not in found:
            raise DataError(
                stated_in(record),
                f"image {record.image_id}, size {record.size[0]} x {record.size[1]}",
                f"the image {record.image} is {' x '.join(map(str, min(found)))}",
                "Use the images that were annotated, or scale the boxes",
            )


def require_unique(records: Iterable[Record], file: str | Path) -> None:
    """DataError if two records have one `image_id` (features, phrases and boxes are joined to pictures by it) or one
    image file (each would be a wrong answer to the other's captions)."""
    seen: dict[str | Path, Record] = {}
    for record in records:
        for name in (record.image_id, record.image):
            if name is not None and (other := seen.setdefault(name, record)) is not record:
                one, two = (r.source or str(r.image or "a record without a file") for r in (other, record))
                raise DataError(
                    file,
                    f"image id {name!r}" if isinstance(name, str) else f"image file {name}",
                    f"is that of two pictures: {one} and {two}",
                    "Rename one of the two, or remove its record",
                )


def require_distinct(values: Iterable[Hashable], file: str | Path, what: str) -> None:
    """DataError if a value stands twice: of two entries with one id the last would count in silence."""
    repeated = [value for value, count in Counter(values).items() if count > 1]
    if repeated:
        raise DataError(file, f"{what} {repeated[0]}", "is listed more than once", "Remove the repetition")


def check_name(name: str, file: str | Path, record: str) -> str:
    """The name of a file below its folder; DataError for an absolute one, or one that leads out of the folder."""
    if name.startswith("/") or "\\" in name or "\0" in name or (".." in name and ".." in name.split("/")):
        raise DataError(
            file, record, f"the name {name!r} leads out of the image folder", "Give names below it, with /"
        )
    return name


def stated_size(width: object, height: object) -> tuple[int, int]:
    """Width and height of an image as an annotation states them; ValueError unless they are whole pixels."""
    size = float(width), float(height)  # text is let through
    if not all(side >= 1 and side == int(side) for side in size):
        raise ValueError(f"an image of {width} x {height} pixels")
    return int(size[0]), int(size[1])


def flag(value: object) -> bool:
    """0, 1, false or true; ValueError for anything else: the text "0" would count as true."""
    if value not in (0, 1) or isinstance(value, float):
        raise ValueError(f"{value!r} is neither 0 nor 1")
    return bool(value)


def check_max_captions(count: int | None) -> int | None:
    """How many captions of an image are kept; ValueError below 1."""
    if count is not None and count < 1:
        raise ValueError(f"max_captions is at least 1 or None, not {count}")
    return count


class BoxPolicy:
    """What happens to a box that has no area or lies outside its picture.

    `"raise"` stops with a DataError. `"skip"` leaves the box out and counts it, as is the field's practice
    with COCO (its training split has boxes of no width); `report` then logs one warning for the file. Where most boxes
    would be left out, or where all fit another way to write boxes, the file is misread, and `report` stops.

    Args:
        corners: whether the file gives (x1, y1, x2, y2); else (x, y, width, height), as COCO's do.
    """

    def __init__(self, invalid_boxes: str, *, corners: bool = False):
        if invalid_boxes not in ("skip", "raise"):
            raise ValueError(f'invalid_boxes is "skip" or "raise", not {invalid_boxes!r}')
        self.skip, self.skipped, self.corners = invalid_boxes == "skip", [], corners
        self.seen = self.otherwise = 0  # boxes; those that would be sound in the other way to write them
        self.reach, self.smallest = 0.0, float("inf")  # the largest coordinate, the shortest side

    def check(self, box, size: tuple[int, int], file: str | Path, record: str) -> Box | None:
        """The box as checked by `check_box`, or None if it is to be left out."""
        with reading(file, record):
            x, y, a, b = map(float, box)
        readings = (x, y, x + a, y + b), (x, y, a, b)
        mine, (x1, y1, x2, y2) = readings[self.corners], readings[not self.corners]
        self.seen += 1
        self.otherwise += 0 <= x1 < x2 <= size[0] and 0 <= y1 < y2 <= size[1]
        self.reach, self.smallest = max(self.reach, *mine), min(self.smallest, *size)
        try:
            return check_box(mine, size, file, record)
        except DataError as error:
            if not self.skip:
                raise
            self.skipped.append(f"{error.record}: {error.problem}")
            return None

    def report(self, file: str | Path) -> None:
        """One warning for all boxes left out.

        Raises:
            DataError: All are left out, or more than half of `FEW` or more; some are, and all would be sound as
                (x1, y1, x2, y2), or as x, y, width and height; all of `SAMPLE` or more lie within 100 pixels of
                pictures of twice that side or more, as percent do.
        """
        count, problem = f"{len(self.skipped)} of {self.seen} boxes have no area or lie outside", ""
        if self.skipped and self.otherwise == self.seen >= FEW:
            ways = ["(x, y, width, height)", "(x1, y1, x2, y2)"]
            problem = f"{count}, and all would be sound as {ways[not self.corners]}, not {ways[self.corners]}"
        elif self.skipped and len(self.skipped) > self.seen / (2 if self.seen >= FEW else 1.01):
            problem = f"{count}; the first is {self.skipped[0]}"
        elif self.seen >= SAMPLE and self.reach <= 100 <= self.smallest / 2:
            problem = f"all {self.seen} boxes lie within 100 pixels: these are percent of the image"
        if problem:
            raise DataError(
                file, "the boxes", problem, "Write them in pixels of the image, as the format has them"
            )
        if self.skipped:
            logger.warning(
                "%s: skipped %d invalid boxes; the first is %s", file, len(self.skipped), self.skipped[0]
            )
