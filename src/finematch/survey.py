"""What a data folder has: sets with their counts beside the published ones, and the tables that it allows.

Printed by `python -m finematch data`; where the sets can be had says docs/data.md.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from finematch.data import Entry, ImagePair, Question, dataset_names, load, load_regions
from finematch.data.record import DataError

# images and captions of a split as the papers print them; 0: not printed. COCO is cut to five captions an image. Of
# VQAv2 images and questions, of NLVR2 examples and distinct sentences, of MSR-VTT videos and sentences.
UNITS = {"vqav2": ("images", "questions"), "nlvr2": ("pairs", "sentences"), "msrvtt": ("videos", "captions")}
PUBLISHED: dict[str, dict[str, tuple[int, int]]] = {
    "flickr8k": {"train": (6000, 30000), "val": (1000, 5000), "test": (1000, 5000)},
    "flickr30k": {"train": (29000, 145000), "val": (1014, 5070), "test": (1000, 5000)},
    "coco_karpathy": {"trainrestval": (113287, 566435), "val": (5000, 25000), "test": (5000, 25000)},
    "coco": {"train": (118287, 591435), "val": (5000, 25000)},
    "flickr30k_entities": {"train": (29783, 148915), "val": (1000, 5000), "test": (1000, 5000)},
    "visual_genome": {"train": (0, 0)},  # 108,077 images without COCO's and Flickr30k's val and test
    "vqav2": {"train": (82783, 443757), "val": (40504, 214354), "test-dev": (0, 0)},
    "nlvr2": {"train": (86373, 23671), "val": (6982, 2018), "test": (6967, 1995)},
    "msrvtt": {"test": (1000, 1000)},
    "f30k_precomp": {"train": (29000, 145000), "dev": (1014, 5070), "test": (1000, 5000)},
    "coco_precomp": {"train": (113287, 566435), "dev": (5000, 25000), "testall": (5000, 25000)},
}


def survey(data_root: str | Path, dataset: str = "") -> Iterator[str]:
    """Lines that say what is there: all sets and the tables that they allow, or `dataset` alone."""
    if dataset:
        yield from _set(dataset, Path(data_root))
        return
    other = set()  # sets whose counts are not the published ones
    for name in (*dataset_names(), *(name for name in PUBLISHED if name.endswith("_precomp"))):
        if not name.startswith("scenes"):
            for line in _set(name, Path(data_root)):
                yield line
                other |= {name} if "PUBLISHED" in line else set()
    yield "\nTables at scale paper, as far as data goes (weights are not looked for):"
    yield from _tables(data_root, other)


def _set(name: str, root: Path) -> Iterator[str]:
    """A line for each split of a set, or one that says what is missing."""
    for split, wanted in PUBLISHED.get(name, dict.fromkeys(("train", "val", "test"), (0, 0))).items():
        try:
            if name.endswith("_precomp"):
                regions = load_regions(root / name, split)
                found = len(regions), len(regions.captions)
            else:
                found = _counts(load(name, root, split))
        except DataError as error:
            yield f"{name} {split}: {_short(error)}"
            if error.record == f"dataset {name!r}":  # no folder: the other splits are not there either
                return
            continue
        units = UNITS.get(name, ("images", "captions"))
        line = f"{name} {split}: {found[0]:,} {units[0]}, {found[1]:,} {units[1]}"
        if any(wanted):
            line += ", as published" if found == wanted else f"; PUBLISHED {wanted[0]:,} and {wanted[1]:,}"
        yield line


def _counts(records: list[Entry]) -> tuple[int, int]:
    """How many images (pairs, videos) and how many captions (questions, sentences)."""
    if isinstance(records[0], Question):
        return len({record.image_id for record in records}), len(records)
    if isinstance(records[0], ImagePair):
        return len(records), len(
            {record.identifier.rsplit("-", 2)[0] + record.sentence for record in records}
        )
    return len(records), sum(len(record.captions) for record in records)


def _tables(data_root: str | Path, other: set[str]) -> Iterator[str]:
    """The grids by what they lack; those whose data differs from the published are said to."""
    from finematch.features.inputs import check_data, reads
    from finematch.grids import grid, names, settings

    said: dict[tuple[str, str], str] = {}
    by: dict[str, list[str]] = {}
    for one in map(grid, names()):
        lacks = {}
        for row in one.rows if one.base is None else one.linked:  # a task reads what its run has read
            s = settings(one.of(row), row, dataset=one.dataset, data_root=str(data_root), scale="paper")
            key = reads(s), one.dataset
            if key not in said:
                try:
                    check_data(s, Path())
                    said[key] = ""
                except DataError as error:
                    said[key] = f"no, {_short(error)}"
            lacks[row] = said[key]
        missing = [row for row in lacks if lacks[row]]
        whole = "yes" if one.dataset not in other else f"yes, on other images than the paper's {one.dataset}"
        reason = lacks[missing[0]] if missing else whole
        some = f" ({', '.join(missing)})" if 0 < len(missing) < len(lacks) else ""
        by.setdefault(reason, []).append(f"{one.name}{some}")
    for reason, grids in by.items():
        yield f"{reason}: {', '.join(grids)}"


def _short(error: DataError) -> str:
    """What is missing or wrong, in one line."""
    return f"{error.file}: {error.record}: {error.problem}"
