"""Reading files so that every failure names the file, the record and the remedy; shared by the loaders."""

from __future__ import annotations

import codecs
import json
import logging
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from finematch.data.images import possible_sizes
from finematch.data.record import Box, DataError, Record, check_box

logger = logging.getLogger(__name__)
SAMPLE = 64  # images whose sizes are compared while a set is loaded


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
        line = error.object[: error.start].count(b"\n") + 1
        raise DataError(path, f"line {line}", "is not UTF-8 text", "Convert the file to UTF-8") from error


def read_json(path: str | Path) -> Any:
    """A JSON file; DataError with line and column if it is malformed."""
    try:
        return json.loads(read_text(path))
    except json.JSONDecodeError as error:
        raise DataError(
            path,
            f"line {error.lineno} column {error.colno}",
            f"malformed JSON ({error.msg})",
            "Download the file again; it may be cut off",
        ) from error


@contextmanager
def reading(file: str | Path, record: str) -> Iterator[None]:
    """Turn a missing or mistyped field, met while reading, into a DataError that names the record."""
    try:
        yield
    except DataError:
        raise
    except KeyError as error:
        raise DataError(
            file, record, f"the field {error} is missing", "Add it, or remove the record"
        ) from error
    except (TypeError, ValueError, AttributeError) as error:
        raise DataError(file, record, f"malformed entry ({error})", "Correct or remove it") from error


def clean_caption(text: object, file: str | Path, record: str) -> str:
    """The caption without surrounding white space; DataError if nothing is left or it is not text."""
    if not isinstance(text, str):
        raise DataError(file, record, f"the caption is {type(text).__name__}, not text", "Correct it")
    if not (caption := text.strip()):
        raise DataError(file, record, "the caption is empty", "Write it, or remove it from the file")
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
    """DataError if two records have one `image_id`: features, phrases and boxes are joined to pictures by it."""
    seen: dict[str, Record] = {}
    for record in records:
        if (other := seen.setdefault(record.image_id, record)) is not record:
            one, two = (r.source or str(r.image or "a record without a file") for r in (other, record))
            raise DataError(
                file,
                f"image id {record.image_id!r}",
                f"is that of two pictures: {one} and {two}",
                "Rename one of the two, or remove its record",
            )


class BoxPolicy:
    """What happens to a box that has no area or lies outside its picture.

    `"raise"` stops with a DataError. `"skip"` leaves the box out and counts it, as is the field's practice
    with COCO (its training split has boxes of no width); `report` then logs one warning for the file.
    """

    def __init__(self, invalid_boxes: str):
        if invalid_boxes not in ("skip", "raise"):
            raise ValueError(f'invalid_boxes is "skip" or "raise", not {invalid_boxes!r}')
        self.skip, self.skipped = invalid_boxes == "skip", []

    def check(self, box, size: tuple[int, int] | None, file: str | Path, record: str) -> Box | None:
        """The box as checked by `check_box`, or None if it is to be left out."""
        try:
            return check_box(box, size, file, record)
        except DataError as error:
            if not self.skip:
                raise
            self.skipped.append(f"{error.record}: {error.problem}")
            return None

    def report(self, file: str | Path) -> None:
        """One warning for all boxes left out."""
        if self.skipped:
            logger.warning(
                "%s: skipped %d invalid boxes; the first is %s", file, len(self.skipped), self.skipped[0]
            )
