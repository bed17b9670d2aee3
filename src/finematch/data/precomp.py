"""Region features in SCAN's layout, memory-mapped: `f30k_precomp`, `coco_precomp`, and those made here.

Lee et al., ECCV 2018. A split is `<split>_ims.npy` (rows, r, d), `<split>_caps.txt` (a caption a line) and
`<split>_ids.txt`. Published train files store a picture once and have five captions a row; published dev and
test files store it five times, a row for every caption. The release has no boxes. Files made here store a
picture once and add `<split>_boxes.npy` (n, r, 4; xyxy pixels), `<split>_sizes.npy` (n, 2; width, height) and
`<split>_meta.json` (see `write_layout`).

COCO's train file is 31 GiB: nothing here reads a feature array as a whole. Axes: n images, c captions,
r regions, d width.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import numpy as np
from jaxtyping import Float, Int, Num

from finematch.data.checks import clean_caption, open_array, read_json, read_text, reading
from finematch.data.record import DataError, Record
from finematch.files import write_text

SAMPLE = 16  # pictures whose five rows are compared
BYTES_LITERAL = re.compile(r"""b(['"]).*\1""")


@dataclass(frozen=True, eq=False)
class Regions:
    """One split: every picture once, every caption, and which picture each caption belongs to."""

    split: str
    features: Float[np.ndarray, "n r d"]  # memory-mapped
    captions: list[str]
    image_of: Int[np.ndarray, "c"]
    ids: list[str]
    boxes: Num[np.ndarray, "n r 4"] | None  # memory-mapped, xyxy pixels
    sizes: Num[np.ndarray, "n 2"] | None  # width, height in pixels
    meta: dict

    def __len__(self) -> int:
        return len(self.features)

    def records(self) -> list[Record]:
        """The pictures as records without picture files, for what needs captions by picture."""
        captions: list[list[str]] = [[] for _ in range(len(self))]
        for image, caption in zip(self.image_of.tolist(), self.captions, strict=True):
            captions[image].append(caption)
        sizes = [None] * len(self) if self.sizes is None else [tuple(size) for size in self.sizes.tolist()]
        rows = zip(self.ids, captions, sizes, strict=True)
        return [Record(name, self.split, tuple(texts), size=size) for name, texts, size in rows]


def load_regions(folder: str | Path, split: str) -> Regions:
    """Open one split; reads captions and a sample of rows, maps the rest.

    Which picture a caption belongs to is taken from `<split>_image_of.npy` (c,) if there is one, else from
    `captions_per_image` (a number or a list) in `<split>_meta.json`, else from SCAN's rule: five captions a
    row if there are five times as many captions as rows, one row a caption if there are as many. Any other
    proportion raises, since every later pair would be shifted.

    Args:
        folder: holds the files of the split.
        split: `train`, `dev`, `test`, `testall`, or a name of one's own.

    Raises:
        DataError: a missing or malformed file, files of different lengths, an empty caption or one written as
            `b'...'`, five rows of a picture that differ.
    """
    folder = Path(folder)
    images, caption_file = folder / f"{split}_ims.npy", folder / f"{split}_caps.txt"
    meta_file = folder / f"{split}_meta.json"
    meta = read_json(meta_file) if meta_file.exists() else {}
    features, captions = open_array(images), _read_captions(caption_file)
    if features.ndim != 3 or features.dtype.kind != "f" or not len(features):
        raise DataError(
            images,
            f"array {features.shape} of {features.dtype}",
            "is not (images, regions, width) floats",
            "Write it as SCAN's layout has it",
        )
    counts = f"{caption_file} has {len(captions)} captions and {images} has {len(features)} rows"
    image_of, stride = _layout(folder, split, meta, len(features), len(captions), counts)
    if stride > 1:
        _check_repeats(features, stride, images)

    def beside(name: str) -> np.ndarray | None:
        path = folder / f"{split}_{name}.npy"
        array = open_array(path) if path.exists() else None
        if array is not None and len(array) != len(features):
            raise DataError(path, f"{len(array)} rows", f"{images} has {len(features)}", "Make both again")
        return None if array is None else array[::stride]

    boxes, sizes = beside("boxes"), beside("sizes")
    _check_boxes(folder, split, boxes, sizes)
    ids = _ids(folder / f"{split}_ids.txt", len(features), stride, image_of)
    return Regions(split, features[::stride], captions, image_of, ids, boxes, sizes, meta)


def write_layout(folder: Path, split: str, records: Sequence[Record], meta: dict) -> None:
    """Write the captions, ids and meta file of a split whose arrays are in place, in the order of their rows.

    Args:
        meta: what made the features (backbone, its weights, proposals, ...), JSON values.
    """
    features = open_array(folder / f"{split}_ims.npy")
    ids, counts = [r.image_id for r in records], [len(r.captions) for r in records]
    lines = [" ".join(caption.split()) for record in records for caption in record.captions]
    for name, texts in (("caps", lines), ("ids", ids)):
        write_text(folder / f"{split}_{name}.txt", "".join(f"{text}\n" for text in texts))
    key = {
        "meta": meta,
        "ids": hashlib.sha256("\n".join(ids).encode()).hexdigest(),
        "shape": list(features.shape),
        "dtype": features.dtype.name,
    }
    stated = {"captions_per_image": counts[0] if len(set(counts)) == 1 else counts, "key": key}
    content = {**meta, **stated, "finematch": version("finematch")}
    write_text(folder / f"{split}_meta.json", json.dumps(content, indent=1))


def _check_boxes(folder: Path, split: str, boxes: np.ndarray | None, sizes: np.ndarray | None) -> None:
    """DataError for sizes that are none, or boxes that are not pixels (x1, y1, x2, y2) of images of these sizes."""
    if sizes is not None and (sizes.ndim != 2 or sizes.shape[1] != 2 or not (sizes >= 1).all()):
        problem = "are not (images, 2): width and height in pixels"
        raise DataError(folder / f"{split}_sizes.npy", "the sizes", problem, "Make them again")
    if boxes is None:
        return
    file, remedy = folder / f"{split}_boxes.npy", "Write (x1, y1, x2, y2) in pixels"
    if boxes.ndim != 3 or boxes.shape[2] != 4:
        raise DataError(file, f"array {boxes.shape}", "is not (images, regions, 4)", remedy)
    if sizes is not None:
        top = np.tile(sizes, 2)[:, None] + 1
        wrong = ~((boxes >= -1) & (boxes <= top)).all(2) | (boxes[..., 2:] < boxes[..., :2]).any(2)
        if wrong.any():
            row, region = np.unravel_index(int(wrong.argmax()), wrong.shape)
            problem = f"{boxes[row, region].tolist()} is no box on an image of {sizes[row].tolist()} pixels"
            raise DataError(file, f"image {row}, region {region}", problem, remedy)
        if len(boxes) and boxes.max() <= 1 < sizes.min():
            raise DataError(file, "all boxes", "lie within the first pixel: these are fractions", remedy)


def _read_captions(path: Path) -> list[str]:
    """Lines as text. Only a line feed ends a caption: `str.splitlines` would shift all after a U+2028."""
    captions = []
    for number, line in enumerate(read_text(path).removesuffix("\n").split("\n"), start=1):
        caption = clean_caption(line, path, f"line {number}")
        if BYTES_LITERAL.fullmatch(caption):
            raise DataError(
                path,
                f"line {number}",
                f"the caption {caption[:40]} is a printed bytes object",
                "Write the captions again from decoded text; its first and last word are unreadable",
            )
        captions.append(caption)
    return captions


def _layout(folder: Path, split: str, meta: dict, rows: int, c: int, counts: str) -> tuple[np.ndarray, int]:
    """`image_of` (c,) and how many rows each picture takes in the file."""
    own, stated = folder / f"{split}_image_of.npy", meta.get("captions_per_image")
    if own.exists():
        image_of = np.array(open_array(own))
    elif stated is not None:
        with reading(folder / f"{split}_meta.json", "`captions_per_image`"):
            image_of = np.repeat(np.arange(rows), stated)
    elif c in (5 * rows, rows) and c % 5 == 0:
        return np.arange(c) // 5, 5 * rows // c
    else:
        raise DataError(
            folder,
            f"split {split}",
            f"{counts}, neither five a row nor a row each in fives",
            "Make them again together, or state captions_per_image in the meta file",
        )
    whole = image_of.shape == (c,) and image_of.dtype.kind in "iu"
    if not whole or not np.array_equal(np.unique(image_of), np.arange(rows)):
        raise DataError(
            folder,
            f"split {split}",
            f"{counts}, which the stated captions a picture do not fit",
            "Every picture needs captions and every caption a picture; make the files again together",
        )
    return image_of.astype(np.int64), 1


def _check_repeats(features: np.ndarray, stride: int, path: Path) -> None:
    pictures = len(features) // stride
    for picture in np.unique(np.linspace(0, pictures - 1, min(SAMPLE, pictures)).astype(int)):
        rows = features[picture * stride : (picture + 1) * stride]
        if not (rows == rows[0]).all():
            raise DataError(
                path,
                f"rows {picture * stride} to {(picture + 1) * stride - 1}",
                "there are as many rows as captions, yet five rows in turn are not one picture",
                "For one caption a picture state captions_per_image in the meta file",
            )


def _ids(path: Path, rows: int, stride: int, image_of: np.ndarray) -> list[str]:
    """An id a picture, from a file with one a picture, a row or a caption; row numbers if there is none."""
    if not path.exists():
        return [str(row) for row in range(0, rows, stride)]
    ids, pictures = read_text(path).removesuffix("\n").split("\n"), rows // stride
    if len(ids) == pictures:
        index = range(pictures)
    elif len(ids) == rows:
        index = range(0, rows, stride)
    elif len(ids) == len(image_of):
        index = np.unique(image_of, return_index=True)[1]
    else:
        raise DataError(path, f"{len(ids)} ids", f"for {pictures} pictures in {rows} rows", "Make both again")
    found = [ids[i].strip() for i in index]
    if repeated := [name for name, count in Counter(found).items() if count > 1]:
        raise DataError(
            path,
            f"id {repeated[0]!r}",
            f"is that of {found.count(repeated[0])} pictures",
            "Correct it; without the file, pictures are numbered by their rows",
        )
    return found
