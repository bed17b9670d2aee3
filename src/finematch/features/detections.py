"""Boxes with scores that a detector found elsewhere, from files in COCO's results format.

`[{"image_id": 139, "category_id": 72, "bbox": [x, y, width, height], "score": 0.73}, ...]`, in pixels of the image as
it is stored. A proposal has no class, so `category_id` is not read. Such boxes come from a detector that was trained on
annotated boxes: runs that read them carry the label `supervised proposals`.
"""

from __future__ import annotations

import gc
import json
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from jaxtyping import Float

from finematch.data.record import DataError, Record
from finematch.files import digest, disguise, file_digests

REMEDY = "Give a list of {image_id, category_id, bbox: [x, y, width, height], score}, COCO's results format"


def is_detections(name: str | Path) -> bool:
    """Whether a name is that of a file, or of a folder of files, of boxes: a folder, or an ending `.json`."""
    return Path(name).suffix == ".json" or Path(name).is_dir()


class Detections:
    """The boxes of a file, or of all `.json` files of a folder (one for each split, say).

    An image's boxes are those of its `image_id`, of its file's name, or of that without the ending. Where several files
    of a folder have the image, the one counts that is named after the image's folder: `flickr8k.json` for
    flickr8k/images, `coco_val2017.json` for coco/val2017.

    Attributes:
        key: SHA-256 of the contents.

    Raises:
        DataError: For what is no such file; the file, the number of the entry and the remedy are named.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        files = sorted(self.path.glob("*.json")) if self.path.is_dir() else [self.path]
        if not files or not files[0].is_file():
            raise DataError(
                path, "the boxes", "there is no such file, or no .json file in the folder",
                "Give proposals=auto, selective_search, grid, or a file of boxes in COCO's results format",
            )  # fmt: skip
        self.files = {file: _Boxes(file) for file in files}
        sums = file_digests(files)
        self.key = {"proposals": "detections", "weights": sums[0] if len(sums) == 1 else digest(sums)}

    def of(
        self, record: Record, size: tuple[int, int]
    ) -> tuple[Float[np.ndarray, "r 4"], Float[np.ndarray, "r"]]:
        """Boxes of one image in xyxy pixels, clamped to it, and their scores, the best first; equal boxes once.

        Args:
            size: width and height of the image.

        Raises:
            DataError: For a box of which less than half lies on the image, or boxes in two files.
        """
        file, name = self._entry(record)
        if file is None:
            return np.zeros((0, 4), np.float32), np.zeros(0, np.float32)
        boxes, scores, numbers = self.files[file].of(name)
        low, high = np.clip(boxes[:, :2], 0, size), np.clip(boxes[:, 2:], 0, size)
        inside = (high - low).prod(1) / (boxes[:, 2:] - boxes[:, :2]).prod(1)
        if (inside < 0.5).any():
            i = int(inside.argmin())
            x1, y1, x2, y2 = (round(float(v), 1) for v in boxes[i])
            raise DataError(
                file, f"entry {numbers[i]} (image {name})",
                f"bbox {[x1, y1, round(x2 - x1, 1), round(y2 - y1, 1)]} lies mostly outside the "
                f"{size[0]} x {size[1]} image",
                "Give [x, y, width, height] in pixels of the image as it is stored (not xyxy, not of a resized image)",
            )  # fmt: skip
        return np.concatenate([low, high], 1).astype(np.float32), scores.astype(np.float32)

    def check(self, records: Iterable[Record], split: str) -> int:
        """How many of the images have no box.

        Raises:
            DataError: If none has any.
        """
        records = list(records)
        without = sum(self._entry(record)[0] is None for record in records)
        if without == len(records) and records:
            stated = next(iter(next(iter(self.files.values())).start))
            raise DataError(
                self.path, f"split {split}",
                f"has no box of any of {without} images; its first image_id is {stated!r}, the split's "
                f"{records[0].image_id!r} ({Path(records[0].image or '').name})",
                "Give the boxes of these images: image_id is COCO's id, the file's name, or its stem",
            )  # fmt: skip
        return without

    def _entry(self, record: Record) -> tuple[Path | None, str]:
        """The file that has an image, and its name there."""
        image = Path(record.image or record.image_id)
        names = (record.image_id, image.name, image.stem)
        found = [
            (f, n) for f, of in self.files.items() if (n := next((n for n in names if n in of.start), None))
        ]
        if len(found) > 1:
            folder = image.parent
            mine = {folder.name, folder.parent.name, f"{folder.parent.name}_{folder.name}"}
            named = [one for one in found if one[0].stem in mine]
            if len(named) != 1:
                listed = ", ".join(one[0].name for one in found)
                raise DataError(self.path, f"image {record.image_id}", f"has boxes in {listed}",
                                f"Keep one of them, or name it after the folder {image.parent}")  # fmt: skip
            found = named
        return found[0] if found else (None, "")


class _Boxes:
    """One file: boxes xyxy, scores and numbers of entries, image by image, the best first; `start` says where."""

    def __init__(self, file: Path):
        entries = _read(file)
        names, xywh, scores = _columns(file, entries)
        xywh, scores = _finite(file, entries, xywh, scores)
        number = {name: i for i, name in enumerate(dict.fromkeys(names))}
        image = np.fromiter((number[name] for name in names), np.int64, len(names))
        order = np.lexsort((-scores, image))  # stable: of equal scores the first of the file
        image, xywh, scores = image[order], xywh[order], scores[order]
        _, first = np.unique(np.column_stack([image, xywh]), axis=0, return_index=True)
        kept = np.sort(first)  # the best of equal boxes: they may differ in their categories
        bounds = np.searchsorted(image[kept], np.arange(len(number) + 1))
        self.start = {name: (int(bounds[i]), int(bounds[i + 1])) for name, i in number.items()}
        self.boxes = np.concatenate([xywh[kept, :2], xywh[kept, :2] + xywh[kept, 2:]], 1)
        self.scores, self.number = scores[kept], order[kept]

    def of(self, name: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        rows = slice(*self.start[name])
        return self.boxes[rows], self.scores[rows], self.number[rows]


def _read(file: Path) -> list[dict]:
    collecting = gc.isenabled()
    gc.disable()  # hundreds of thousands of small objects, none of them garbage: half of the time
    try:
        content = json.loads(file.read_bytes())
    except (OSError, ValueError) as error:
        raise DataError(
            file, "the file", f"cannot be read as JSON ({disguise(file) or error})", REMEDY
        ) from error
    finally:
        if collecting:
            gc.enable()
    if not isinstance(content, list):
        what = "COCO's annotations" if isinstance(content, dict) and "annotations" in content else "no list"
        raise DataError(file, "the file", f"holds {what}", REMEDY)
    if not content:
        raise DataError(file, "the file", "lists no box", REMEDY)
    return content


def _columns(file: Path, entries: list[dict]) -> tuple[list[str], np.ndarray, np.ndarray]:
    """Names of images, bbox and score of every entry."""
    try:
        ids = [entry["image_id"] for entry in entries]
        if not {type(one) for one in ids} <= {int, str}:
            raise TypeError("an image_id is neither a number nor a text")
        xywh = np.array([entry["bbox"] for entry in entries], np.float64)
        scores = np.array([entry["score"] for entry in entries], np.float64)
        if xywh.shape != (len(entries), 4) or scores.shape != (len(entries),):
            raise ValueError("a bbox is not four numbers, or a score is not one")
    except (KeyError, TypeError, ValueError) as error:
        number = next((i for i, entry in enumerate(entries) if not _whole(entry)), 0)
        raise DataError(
            file, f"entry {number}", f"is {str(entries[number])[:120]} ({error!r})", REMEDY
        ) from error
    return [str(one) for one in ids], xywh, scores


def _whole(entry) -> bool:
    """Whether an entry has an image's id, four numbers and a score."""
    number = lambda v: type(v) in (int, float)  # noqa: E731
    if not isinstance(entry, dict) or type(entry.get("image_id")) not in (int, str):
        return False
    box = entry.get("bbox")
    return number(entry.get("score")) and isinstance(box, list) and len(box) == 4 and all(map(number, box))


def _finite(
    file: Path, entries: list[dict], xywh: np.ndarray, scores: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """The same; DataError for a number that is not finite or a side that is none."""
    for problem, wrong, remedy in (
        ("has a score or a bbox that is not finite", ~(np.isfinite(scores) & np.isfinite(xywh).all(1)),
         "Check the detector, or remove the entry"),
        ("has a bbox without width or height", (xywh[:, 2:] <= 0).any(1),
         "Give [x, y, width, height], not two corners; or remove the entry"),
        ("and all others lie within the first pixel: these are fractions of the image",
         np.full(len(xywh), (xywh[:, :2] + xywh[:, 2:]).max() <= 1), "Multiply by its width and height"),
    ):  # fmt: skip
        if wrong.any():
            number = int(wrong.argmax())
            entry = entries[number]
            raise DataError(file, f"entry {number} (image {entry['image_id']})",
                            f"{problem}: {entry['bbox']}, score {entry['score']}", remedy)  # fmt: skip
    return xywh, scores
