"""Writing region features in SCAN's layout: block by block, resumable, and complete or not there at all."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

import numpy as np
from jaxtyping import Float, Num

from finematch.data.record import Record
from finematch.files import DataError, new_array, write_text


class RegionsWriter:
    """Writes one split; axes: n images, b images of a block, r regions, d width.

    Arrays grow in `<split>_*.npy.part` files; after every block they are flushed and `<split>_progress.json`
    says how many images are done. A writer made again with the same `meta`, ids and shape goes on from there
    (`done`); with any other it starts over. `finish` renames the arrays, and writes the meta file last, so a
    split that has its meta file is whole. An older finished split stays readable until then.

    Args:
        folder: made if absent.
        split: prefix of the files.
        n: number of images.
        r: regions an image.
        d: width of a feature.
        meta: what made the features (backbone, hash of its weights, proposals, ...), plain JSON values.
        dtype: of the features on disk.
        ids: the images' ids in order; they are part of what makes a run the same run.

    Raises:
        DataError: at once, if the folder cannot be written or the disk has too little space.
    """

    def __init__(self, folder: str | Path, split: str, n: int, r: int, d: int, meta: dict,
                 dtype: str = "float16", *, ids: Sequence[str]):  # fmt: skip
        self.folder, self.split, self.ids = Path(folder), split, list(ids)
        if len(self.ids) != n:
            raise DataError(
                folder, f"split {split}", f"{len(self.ids)} ids for {n} images", "Give one id an image"
            )
        self.dtype, self.meta = np.dtype(dtype), json.loads(json.dumps(meta))
        self.key = {"meta": self.meta, "ids": _hash(self.ids), "shape": [n, r, d], "dtype": self.dtype.name}
        layout = {
            "ims": ((n, r, d), self.dtype),
            "boxes": ((n, r, 4), np.float32),
            "sizes": ((n, 2), np.int32),
        }
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self.done = self._resumable()
            needed = (n - self.done) * (r * d * self.dtype.itemsize + r * 16 + 8)
            free = shutil.disk_usage(self.folder).free
            if needed > free:
                raise DataError(
                    self.folder,
                    f"split {split}",
                    f"needs {needed:,} bytes, {free:,} are free",
                    "Free space or choose another folder",
                )
            self.arrays = {
                name: np.lib.format.open_memmap(self._path(f"{name}.npy.part"), mode="r+")
                if self.done
                else new_array(self._path(f"{name}.npy.part"), kind, shape)
                for name, (shape, kind) in layout.items()
            }
            self._save_progress()
        except OSError as error:
            raise DataError(
                self.folder,
                f"split {split}",
                f"cannot be written ({error})",
                "Choose a folder that can be written",
            ) from error

    def write(
        self,
        features: Float[np.ndarray, "b r d"],
        boxes: Num[np.ndarray, "b r 4"],
        sizes: Num[np.ndarray, "b 2"],
    ) -> None:
        """The next block of images: features, boxes in xyxy pixels, and each picture's width and height.

        Raises DataError naming the image if a value is not finite (after the cast to `dtype`).
        """
        start, stop = self.done, self.done + len(features)
        if stop > len(self.ids):
            raise DataError(
                self.folder, f"split {self.split}", f"image {stop} of {len(self.ids)}", "Write fewer"
            )
        with np.errstate(over="ignore"):
            block = {"ims": features.astype(self.dtype), "boxes": boxes.astype(np.float32), "sizes": sizes}
        for name in ("ims", "boxes"):
            finite = np.isfinite(block[name]).all(axis=(1, 2))
            if not finite.all():
                raise DataError(
                    self._path(f"{name}.npy"),
                    f"image {self.ids[start + int(np.argmin(finite))]}",
                    f"a value is not finite in {block[name].dtype}",
                    "Check the picture and the backbone's weights, or use dtype float32",
                )
        for name, values in block.items():
            self.arrays[name][start:stop] = values
            self.arrays[name].flush()
        self.done = stop
        self._save_progress()

    def finish(self, records: Sequence[Record]) -> None:
        """Put the files in place; `records`, in the order of `ids`, give the captions (a line each)."""
        if self.done != len(self.ids) or [record.image_id for record in records] != self.ids:
            raise DataError(
                self.folder,
                f"split {self.split}",
                f"{self.done} of {len(self.ids)} images written, {len(records)} records given",
                "Write every image first, and give the records of the same images in the same order",
            )
        counts = [len(record.captions) for record in records]
        self._path("meta.json").unlink(missing_ok=True)
        lines = [" ".join(caption.split()) for record in records for caption in record.captions]
        write_text(self._path("caps.txt"), "".join(f"{line}\n" for line in lines))
        write_text(self._path("ids.txt"), "".join(f"{image_id}\n" for image_id in self.ids))
        for name in list(self.arrays):
            del self.arrays[name]
            os.replace(self._path(f"{name}.npy.part"), self._path(f"{name}.npy"))
        stated = {"captions_per_image": counts[0] if len(set(counts)) == 1 else counts, "key": self.key}
        made_by = {"finematch": version("finematch")}
        write_text(self._path("meta.json"), json.dumps({**self.meta, **stated, **made_by}, indent=1))
        self._path("progress.json").unlink()

    def _path(self, name: str) -> Path:
        return self.folder / f"{self.split}_{name}"

    def _resumable(self) -> int:
        """Images done by an earlier writer of the same key, 0 if there is none."""
        try:
            progress = json.loads(self._path("progress.json").read_text(encoding="utf-8"))
        except (FileNotFoundError, json.JSONDecodeError):
            return 0
        parts = all(self._path(f"{name}.npy.part").exists() for name in ("ims", "boxes", "sizes"))
        return int(progress["done"]) if parts and progress["key"] == self.key else 0

    def _save_progress(self) -> None:
        write_text(self._path("progress.json"), json.dumps({"key": self.key, "done": self.done}))


def finished(folder: str | Path, split: str, meta: dict, ids: Sequence[str] | None = None) -> bool:
    """Whether the split is whole and was made by the same `meta` (and for the same `ids`, if given)."""
    try:
        key = json.loads((Path(folder) / f"{split}_meta.json").read_text(encoding="utf-8"))["key"]
    except (OSError, json.JSONDecodeError, KeyError):
        return False
    return key["meta"] == json.loads(json.dumps(meta)) and (ids is None or key["ids"] == _hash(ids))


def _hash(ids: Sequence[str]) -> str:
    return hashlib.sha256("\n".join(ids).encode()).hexdigest()
