"""Images for learning and searching fragments: captions to train on, and a gallery with ground-truth boxes.

dataset     trains on                  gallery                             annotated phrases
scenes      its train captions         its test (or val) images            its own
flickr8k    its train captions         the COCO images under data_root     Flickr8k's val
coco        COCO 2017's train          COCO 2017's val                     none
coco2014    COCO 2014's train          COCO 2014's val                     none
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from finematch.data import categories as category_names
from finematch.data import load, load_coco
from finematch.data.coco import SYNONYMS
from finematch.data.record import Record
from finematch.data.splits import SMOKE, data_folder
from finematch.scenes.language import SHAPES


@dataclass(frozen=True)
class FragmentSets:
    """Records by what they are for. Those for training carry no boxes and no phrases: no code can look at them."""

    train: list[Record]
    val: list[Record]  # chooses the epoch of a small CLIP; may be empty
    gallery: list[Record]  # with ground-truth boxes
    annotated: list[Record]  # with annotated phrases; may be empty
    categories: list[str]
    synonyms: Mapping[str, tuple[str, ...]]  # other words for a category
    name: str  # of the gallery, for protocols
    annotated_name: str  # "" if there are none
    data_root: Path  # where the records were read: a smoke run of scenes has images of its own


def open_fragment_sets(
    dataset: str, data_root: str | Path, cache: str | Path, *, report: str = "test", smoke: bool = False
) -> FragmentSets:
    """The records of a dataset, see the table above.

    Args:
        report: split of the gallery, `test`, or `val` to choose settings by; only scenes has boxes for both.
        smoke: a few images of each; those of scenes are drawn under `cache`.

    Raises:
        ValueError: For a dataset or a split that has no boxes.
        DataError: If the files are not where they are looked for.
    """
    if report not in ("test", "val") or (report == "val" and dataset != "scenes"):
        raise ValueError(f"report is {report!r}; use 'test', or 'val' on scenes")
    root = data_folder(dataset, data_root, cache, smoke=smoke)
    if dataset == "scenes":
        return _scenes(root, report)
    if dataset == "flickr8k":
        sets = _flickr8k(root)
    elif dataset in ("coco", "coco2014"):
        sets = _coco(root, "2014" if dataset == "coco2014" else "2017")
    else:
        raise ValueError(
            f"{dataset!r} has no boxes to report on; use 'scenes', 'flickr8k', 'coco', 'coco2014'"
        )
    if not smoke:
        return sets
    count = {
        "train": SMOKE["train"],
        "val": SMOKE["val"],
        "gallery": SMOKE["test"],
        "annotated": SMOKE["test"],
    }
    return replace(sets, **{part: getattr(sets, part)[:n] for part, n in count.items()})


def _scenes(root: Path, report: str) -> FragmentSets:
    train, val, gallery = (load("scenes_coco", root, split) for split in ("train", "val", report))
    names = category_names(root / "scenes" / "annotations" / f"instances_{report}.json")
    synonyms = {label: tuple(others) for label, (_, *others) in SHAPES.items()}
    annotated, name = load("scenes_entities", root, report), f"scenes {report}"
    return FragmentSets(_bare(train), _bare(val), gallery, annotated, names, synonyms, name, name, root)


def _flickr8k(root: Path) -> FragmentSets:
    train, val = (_bare(load("flickr8k", root, split)) for split in ("train", "val"))
    gallery = [record for split in ("train", "val") for record in load("coco", root, split)]
    names = category_names(root / "coco" / "annotations" / "instances_val2017.json")
    there = (root / "flickr8k_entities").is_dir()  # optional
    annotated, name = (load("flickr8k_entities", root, "val"), "flickr8k val") if there else ([], "")
    return FragmentSets(train, val, gallery, annotated, names, SYNONYMS, "COCO 2017 (the pictures at hand)", name,
                        root)  # fmt: skip


def _coco(root: Path, year: str) -> FragmentSets:
    folder = root / "coco"
    notes = folder / "annotations"
    train, gallery = (
        load_coco(
            folder / f"{split}{year}",
            captions=notes / f"captions_{split}{year}.json",
            instances=None if split == "train" else notes / f"instances_{split}{year}.json",
            split=split,
        )
        for split in ("train", "val")
    )
    names, name = category_names(notes / f"instances_val{year}.json"), f"COCO {year} val"
    return FragmentSets(_bare(train), [], gallery, [], names, SYNONYMS, name, "", root)


def _bare(records: list[Record]) -> list[Record]:
    return [replace(record, objects=(), phrases=()) for record in records]
