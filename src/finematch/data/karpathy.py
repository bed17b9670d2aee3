"""Karpathy's `dataset_*.json`: the splits of Flickr8k, Flickr30k and COCO that retrieval papers report on.

Karpathy and Fei-Fei, CVPR 2015. An entry has `filename`, `split`, `imgid`, `sentids` and `sentences` (each
with `raw` and `sentid`); COCO's entries add `filepath`, the sub-folder. COCO has 113,287 training pictures
only with `trainrestval` (82,783 train + 30,504 restval), which is what the papers train on.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path, PurePosixPath

from finematch.data.checks import clean_caption, read_json, reading, require_pictures, require_unique
from finematch.data.names import known_names
from finematch.data.record import DataError, Record


def load_karpathy(
    json_path: str | Path,
    image_dir: str | Path,
    split: str,
    *,
    max_captions: int | None = 5,
    check_images: bool = True,
) -> list[Record]:
    """Read one split, in file order.

    Args:
        json_path: the `dataset_*.json`.
        image_dir: folder of the pictures, above `filepath` where entries have one.
        split: `train`, `restval`, `val`, `test`, or `trainrestval` for train and restval together.
        max_captions: keep the first so many captions in the order of `sentids`; some COCO pictures have six
            or seven and the published numbers use five. None keeps all.
        check_images: look for every picture of the split now, not when it is first opened.

    Returns:
        Records whose `split` is the file's own and whose `image_id` is the file name without extension; where the whole
        file has that name more than once, its path below `image_dir` (see `_ids`).

    Raises:
        DataError: malformed JSON, a split that the file lacks, a duplicated picture, an empty caption, a
            picture without captions, a missing picture file, two pictures that no id tells apart.
    """
    if max_captions is not None and max_captions < 1:
        raise ValueError(f"max_captions is at least 1 or None, not {max_captions}")
    data = read_json(json_path)
    with reading(json_path, "the list `images`"):
        entries = list(data["images"])
    for number, entry in enumerate(entries):
        with reading(json_path, f"entry {number}"):
            entry["split"], entry["filename"], entry["imgid"]
    available = list(dict.fromkeys(entry["split"] for entry in entries))
    wanted = ("train", "restval") if split == "trainrestval" else (split,)
    if not set(wanted) <= set(available):
        raise DataError(
            json_path,
            f"split {split!r}",
            f"the file has only {', '.join(map(str, available))}",
            "Choose a split that it has",
        )
    _check_unique(entries, json_path)
    records = [
        _record(entry, image_id, json_path, Path(image_dir), max_captions, str(data.get("dataset", "")))
        for entry, image_id in zip(entries, _ids(entries, json_path), strict=True)
        if entry["split"] in wanted
    ]
    require_unique(records, json_path)
    if check_images:
        require_pictures((record.image for record in records), json_path)
    return records


def _check_unique(entries: list[dict], json_path: str | Path) -> None:
    """A picture that occurs twice may sit in two splits, or be its own false negative."""
    files, ids = {}, {}
    for entry in entries:
        for seen, key in ((files, (entry.get("filepath", ""), entry["filename"])), (ids, entry["imgid"])):
            if key in seen:
                raise DataError(
                    json_path,
                    f"image {entry['filename']} (imgid {entry['imgid']})",
                    f"duplicates image {seen[key]}",
                    "Remove one of the two",
                )
            seen[key] = f"{entry['filename']} (imgid {entry['imgid']})"


def _ids(entries: list[dict], json_path: str | Path) -> list[str]:
    """An id for every entry: the file's stem, by which Flickr30k Entities names pictures too.

    Stems that the file has more than once (`clip0/0001.png` and `clip7/0001.png`) become paths without suffix, and
    paths that it has more than once (`1.png` and `1.bmp`) keep their suffix. All splits count, so that an id means one
    picture whichever split is loaded.
    """
    paths = []
    for number, entry in enumerate(entries):
        with reading(json_path, f"entry {number}"):
            paths.append(PurePosixPath(entry.get("filepath", ""), entry["filename"]))
    stems = Counter(path.stem for path in paths)
    bare = Counter(str(path.with_suffix("")) for path in paths)
    return [
        path.stem if stems[path.stem] == 1
        else str(path.with_suffix("")) if bare[str(path.with_suffix(""))] == 1
        else str(path)
        for path in paths
    ]  # fmt: skip


def _record(
    entry: dict, image_id: str, json_path: str | Path, image_dir: Path, max_captions: int | None, dataset: str
) -> Record:
    name = f"image {entry['filename']} (imgid {entry['imgid']})"
    with reading(json_path, name):
        sentences = {sentence["sentid"]: sentence["raw"] for sentence in entry["sentences"]}
        if sorted(sentences) != sorted(entry["sentids"]):
            raise DataError(json_path, name, "`sentids` and `sentences` disagree", "Correct the entry")
        captions = tuple(
            clean_caption(sentences[sentid], json_path, f"{name}, sentence {sentid}")
            for sentid in entry["sentids"][:max_captions]
        )
        if not captions:
            raise DataError(json_path, name, "has no captions", "Remove the entry")
        return Record(
            image_id=image_id,
            split=entry["split"],
            captions=captions,
            image=image_dir / entry.get("filepath", "") / entry["filename"],
            source=f"{json_path}: {name}",
            known_as=known_names(entry, dataset),
        )
