"""The splits of a dataset: which records a run trains on, chooses its epoch by, and reports.

Axes: `c` captions of a split, in the order of its records.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from finematch.data import load
from finematch.data.pairs import Pairs, Source
from finematch.data.record import DataError, Record, pairs
from finematch.scenes.generator import attributes, choose, generate

SMOKE = {"train": 160, "val": 40, "test": 40}  # images of a run that only shows that everything works
DEV = 1000  # images of train that are held out to choose settings on


def data_folder(dataset: str, data_root: str | Path, cache: str | Path, *, smoke: bool = False) -> Path:
    """The folder above the dataset's own: `data_root`, or, for a smoke run of the embedded set, a folder in `cache`
    where a few scenes are drawn."""
    if not (smoke and dataset.startswith("scenes")):
        return Path(data_root)
    folder = Path(cache) / "smoke"
    generate(folder / "scenes", **SMOKE)
    return folder


def open_records(
    dataset: str, data_root: str | Path, *, report: str = "test", smoke: bool = False, unseen: str = ""
) -> dict[str, list[Record]]:
    """The records of train, val and, where the dataset has it, test. COCO trains on train and restval, as papers do.

    Args:
        report: what numbers are for. `test`: all splits as they are. To choose settings without a look at test, `val`
            leaves test out; `dev` leaves out both, and takes the last `DEV` images of train in their place (`val` and
            `dev` are then the same records, which no step trains on).
        smoke: only the first images of each split.
        unseen: of scenes, what becomes of the combinations of shape and colour in `scenes.language.UNSEEN`. `pretrain`:
            no image of any split has one. `test`: every image of test has one in a caption; train and val are whole.

    Raises:
        DataError: If the dataset is not there, or a split is broken.
        ValueError: `unseen` for another dataset, which does not say what its images show; `report="dev"` for scenes,
            whose frozen network has learned from all of train.
    """
    if report == "dev" and dataset.startswith("scenes"):
        raise ValueError(
            "report='dev': the frozen network of scenes has learned from all of train, so images of train tell "
            "nothing; choose settings on val (report='val')"
        )
    if unseen and dataset != "scenes":
        raise ValueError(
            f"unseen={unseen!r} is of dataset 'scenes', which says what each image shows; for {dataset!r} pretrain on "
            "other data (shards) and give the run as `pretrained`"
        )
    train = "trainrestval" if dataset == "coco_karpathy" else "train"
    records = {"train": load(dataset, data_root, train)}
    if not isinstance(records["train"][0], Record):
        raise DataError(
            "(records)",
            f"dataset {dataset!r}",
            "has questions, pairs or videos, not images with captions",
            "Choose a set of images and captions",
        )
    if report == "dev":
        held = min(DEV, len(records["train"]) // 4)
        records["val"] = records["dev"] = records["train"][-held:]
        records["train"] = records["train"][:-held]
    else:
        records["val"] = load(dataset, data_root, "val")
    if report == "test":
        try:
            records["test"] = load(dataset, data_root, "test")
        except DataError as error:
            if error.record != "split 'test'":  # there is one, and it is broken
                raise
    records = (
        {split: r[: SMOKE.get(split, SMOKE["val"])] for split, r in records.items()} if smoke else records
    )
    for split in {"pretrain": list(records), "test": ["test"], "": []}[unseen]:
        pictures = choose(
            attributes(Path(data_root) / "scenes", split), "seen" if unseen == "pretrain" else "unseen"
        )
        names = {Path(picture["filename"]).stem for picture in pictures}
        records[split] = [record for record in records[split] if record.image_id in names]
    return records


def reported_split(records: Mapping) -> str:
    """The split whose numbers a run reports: test or dev, or val where there is neither (see `open_records`).

    A run that reports val keeps its last epoch: selecting the epoch on it would be optimistic (`selection`).
    """
    return next((split for split in ("test", "dev") if split in records), "val")


def selection(records: Mapping) -> str:
    """The validation metric that chooses the epoch: `rsum` on val, or `epoch` (the last) where val is reported."""
    return "rsum" if "test" in records else "epoch"


@dataclass
class Split:
    """One split as a model reads it: records, the images' source and the captions' source."""

    records: list[Record]
    images: Source
    texts: Source

    @cached_property
    def captions(self) -> list[str]:
        """Every caption, in the order of the records."""
        return [caption for _, caption in pairs(self.records)]

    @cached_property
    def image_of(self) -> np.ndarray:
        """For every caption the row of its image, "c"."""
        return np.array([i for i, _ in pairs(self.records)])

    def pairs(self) -> Pairs:
        """Every (image, caption) pair of the split."""
        return Pairs(self.images, self.texts, self.image_of)


def open_splits(
    records: dict[str, list[Record]], images: dict[str, Source], texts: dict[str, Source]
) -> dict[str, Split]:
    """A `Split` of each part of a dataset."""
    return {name: Split(records[name], images[name], texts[name]) for name in records}
