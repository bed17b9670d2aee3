"""Visual Genome: pictures whose regions people described, one phrase and one box each.

Krishna et al., IJCV 2017. `region_descriptions.json` gives boxes as x, y, width and height in pixels of the picture;
records give `(x1, y1, x2, y2)`. Release 1.0 calls a picture's id `id` in both files, later ones `image_id` in one or in
both. A picture's file is the end of its `url`, folder and name: its name need not be its id.

As captions for pretraining, these phrases are short and many, some 50 a picture. Papers that speak of 769 thousand
texts of Visual Genome (SLAN among them) do not say how they made them; `max_captions` takes the first of each picture.

Half of its pictures are COCO's, those of COCO's val and test splits among them (`coco_id` in `image_data.json`), and
all of them are Flickr's (`flickr_id`): trained on whole, it leaks what retrieval papers report. `held_out` names the
files whose val and test are left out.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import urlsplit

from finematch.data.checks import (
    BoxPolicy,
    check_max_captions,
    check_name,
    check_sizes,
    clean_caption,
    read_json,
    reading,
    require_pictures,
    require_unique,
    stated_size,
)
from finematch.data.names import held_out_names, known_names
from finematch.data.record import Box, DataError, Phrase, Record

logger = logging.getLogger(__name__)


def load_visual_genome(
    regions: str | Path,
    images: str | Path,
    image_dir: str | Path,
    *,
    held_out: Sequence[str | Path],
    max_captions: int | None = None,
    split: str = "train",
    invalid: str = "skip",
    check_images: bool = True,
) -> list[Record]:
    """Read the pictures that have regions: each region is a caption, and as a phrase it is linked to its box.

    Args:
        regions, images: `region_descriptions.json` and `image_data.json`, of one release.
        image_dir: folder above `VG_100K` and `VG_100K_2`.
        held_out: files of other datasets whose val and test pictures are left out, with a warning that counts them:
            Karpathy's `dataset_coco.json` and `dataset_flickr30k.json`, or COCO's `captions_val2017.json` (all of it).
            `()` leaves none out: then do not report on COCO or Flickr30k.
        max_captions: keep the first so many regions of each picture; None keeps all.
        split: copied into the records. The set has no splits of its own: all of it is `train`.
        invalid: `"skip"` leaves out empty phrases, links to boxes without area or outside the picture, and pictures
            without a phrase, each with one counted warning; `"raise"` stops.
        check_images: look for every picture now, not when it is first opened.

    Returns:
        Records in the order of `regions`, `image_id` being Visual Genome's as text.

    Raises:
        DataError: malformed JSON, a picture that occurs twice or that `images` lacks, a missing picture file; with
            `"raise"` also what else would be left out.
        ValueError: another split than train, or a `max_captions` below 1.
    """
    if split != "train":
        raise ValueError(f"Visual Genome has no split {split!r}: all of it is 'train'")
    check_max_captions(max_captions)
    policy, empty, bare = BoxPolicy(invalid), [], []
    known = {key: _stated(entry, images, name) for key, name, entry in _pictures(images)}
    left_out, leaks = {path: held_out_names(path) for path in held_out}, dict.fromkeys(held_out, 0)
    records = []
    for key, name, entry in _pictures(regions):
        if key not in known:
            raise DataError(regions, name, f"is not in {images}", "Use both files of one release")
        file, size, known_as = known[key]
        if where := [path for path, names in left_out.items() if not names.isdisjoint(known_as)]:
            leaks[where[0]] += 1
            continue
        captions, phrases = [], []
        for caption, which, box in _regions(entry, regions, name):
            try:
                caption = clean_caption(caption, regions, which)
            except DataError as error:
                if invalid == "raise" or not isinstance(caption, str):
                    raise
                empty.append(error.record)
                continue
            if (box := policy.check(box, size, regions, which)) is not None:
                phrases.append(
                    Phrase(len(captions), 0, len(caption), (box,), "region", which.rsplit(" ", 1)[-1])
                )
            captions.append(caption)
            if len(captions) == max_captions:
                break
        if not captions:
            if invalid == "raise":
                raise DataError(regions, name, "has no described region", "Remove the entry")
            bare.append(name)
            continue
        records.append(Record(key, split, tuple(captions), Path(image_dir) / file, size, phrases=tuple(phrases),
                              source=f"{regions}: {name}", known_as=known_as))  # fmt: skip
    policy.report(regions)
    for path, count in leaks.items():
        logger.warning("%s: left out %d pictures that are held out by %s", regions, count, path)
    for left, what in ((empty, "empty phrases"), (bare, "pictures without a phrase")):
        if left:
            logger.warning("%s: skipped %d %s; the first is %s", regions, len(left), what, left[0])
    if not records:
        raise DataError(
            regions, "the list of pictures", "has none with a described region", "Download it again"
        )
    require_unique(records, regions)
    if check_images:
        require_pictures((record.image for record in records), images)
        check_sizes(records, lambda _: images)
    return records


def _pictures(path: str | Path) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Of a file's entries: the picture's id, how messages name it, the entry. Each picture once."""
    entries = read_json(path)
    if not isinstance(entries, list):
        raise DataError(
            path, "the file", f"is a {type(entries).__name__}, not a list of pictures", "Download it again"
        )
    seen = set()
    for number, entry in enumerate(entries):
        with reading(path, f"entry {number}"):
            key = str(entry["image_id"] if "image_id" in entry else entry["id"])
        if key in seen:
            raise DataError(path, f"image {key}", "is listed more than once", "Remove the repetition")
        seen.add(key)
        yield key, f"image {key}", entry


def _regions(entry: dict[str, Any], path: str | Path, name: str) -> Iterator[tuple[Any, str, Box]]:
    """What a picture's regions say, how messages name them, and their boxes (x, y, width, height)."""
    with reading(path, name):
        described = list(entry["regions"])
    for number, region in enumerate(described):
        with reading(path, f"{name}, region number {number}"):
            which = f"{name}, region {region.get('region_id', region.get('id'))}"
            box = tuple(float(region[key]) for key in ("x", "y", "width", "height"))
            said = region["phrase"]
        yield said, which, box


def _stated(
    entry: dict[str, Any], path: str | Path, name: str
) -> tuple[Path, tuple[int, int], tuple[str, ...]]:
    """Folder and name of the picture's file, its width and height, and its names in other datasets."""
    with reading(path, name):
        parts = PurePosixPath(urlsplit(entry["url"]).path).parts[-2:]
        if len(parts) < 2 or parts[0] == "/":
            raise ValueError(f"url {entry['url']!r} has no folder and file name")
        file = Path(check_name("/".join(parts), path, name))
        return file, stated_size(entry["width"], entry["height"]), known_names(entry)
