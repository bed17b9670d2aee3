"""The ids by which one photo is known in several datasets: what pretraining must leave out of a held-out split.

Visual Genome is made of COCO's photos; COCO, Flickr30k, Flickr8k and SBU are made of Flickr's. Their files have other
names and sizes, so that bytes say nothing; COCO's image id and Flickr's photo id do.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path

from finematch.data.checks import read_json, reading
from finematch.data.record import Record

FLICKR_URL = re.compile(r"flickr\.com/(?:.*/)?(\d+)_[0-9a-f]+")


def known_names(entry: Mapping, dataset: str = "") -> tuple[str, ...]:
    """`coco:<image id>` and `flickr:<photo id>` of an image, where its entry states them.

    Args:
        entry: of Karpathy's `dataset_*.json`, COCO's annotations, Visual Genome's `image_data.json`, or the json of a
            sample in shards (our `known_as`; the `url` that img2dataset keeps).
        dataset: `dataset` of Karpathy's file: Flickr30k and Flickr8k name their files by Flickr's photo id.
    """
    coco = entry.get("cocoid", entry.get("coco_id", entry.get("id") if "coco_url" in entry else None))
    names = {*entry.get("known_as", ()), *([] if coco is None else [f"coco:{int(coco)}"])}
    if entry.get("flickr_id") is not None:
        names.add(f"flickr:{int(entry['flickr_id'])}")
    for url in {"flickr_url", "url"} & entry.keys():
        if found := FLICKR_URL.search(str(entry[url])):
            names.add(f"flickr:{found[1]}")
    if dataset.startswith("flickr") and (found := re.match(r"\d+", str(entry.get("filename", "")))):
        names.add(f"flickr:{found[0]}")
    return tuple(sorted(names))


def held_out_names(path: str | Path) -> set[str]:
    """The names of the images that a file holds out: val and test of Karpathy's `dataset_*.json`, all of one of COCO's
    annotation files (`captions_val2017.json`).

    Raises:
        DataError: a file that is missing or malformed.
    """
    data = read_json(path)
    with reading(path, "the list `images`"):
        entries = [entry for entry in data["images"] if entry.get("split", "val") in ("val", "test")]
        return {name for entry in entries for name in known_names(entry, str(data.get("dataset", "")))}


def in_common(records: Iterable[Record], others: Iterable[Record]) -> int:
    """How many of the records' images are among the others' by an id that both sides state (`Record.known_as`)."""
    names = {name for record in others for name in record.known_as}
    return sum(not names.isdisjoint(record.known_as) for record in records)


def result_id(image_id: str) -> int | str:
    """An image's id as COCO's result files have it: one that is a number in text is written as a number."""
    return int(image_id) if str(image_id).isdecimal() else image_id
