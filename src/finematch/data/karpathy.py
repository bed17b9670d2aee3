"""Karpathy's `dataset_*.json`: the splits of Flickr8k, Flickr30k and COCO that retrieval papers report on.

Karpathy and Fei-Fei, CVPR 2015. An entry has `filename`, `split`, `imgid`, `sentids` and `sentences` (each
with `raw` and `sentid`); COCO's entries add `filepath`, the sub-folder. COCO has 113,287 training pictures
only with `trainrestval` (82,783 train + 30,504 restval), which is what the papers train on.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path, PurePosixPath

import msgspec

from finematch.data.checks import (
    check_max_captions,
    check_name,
    clean_caption,
    read_bytes,
    read_json,
    reading,
    require_pictures,
    require_unique,
)
from finematch.data.names import known_names
from finematch.data.record import DataError, Record


class _Sentence(msgspec.Struct, gc=False):
    raw: str
    sentid: int | str


class _Entry(msgspec.Struct, gc=False):
    """What is read of an image's entry. The tokens, most of the file, are passed over."""

    split: str
    filename: str
    imgid: int | str
    sentids: list[int | str]
    sentences: list[_Sentence]
    filepath: str = ""
    cocoid: int | None = None

    @property
    def name(self) -> str:
        return f"image {self.filename} (imgid {self.imgid})"

    def known_as(self, dataset: str) -> tuple[str, ...]:
        """By which ids other datasets know the image (`data.names`)."""
        if self.cocoid is not None:
            return (f"coco:{self.cocoid}",)
        return known_names({"filename": self.filename}, dataset)


class _File(msgspec.Struct, gc=False):
    images: list[_Entry]
    dataset: str = ""


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
    check_max_captions(max_captions)
    wanted = ("train", "restval") if split == "trainrestval" else (split,)
    entries, dataset = _read(json_path, wanted)
    available = list(dict.fromkeys(entry.split for entry in entries))
    if not set(wanted) <= set(available):
        raise DataError(
            json_path,
            f"split {split!r}",
            f"the file has only {', '.join(map(str, available))}",
            "Choose a split that it has",
        )
    _check_unique(entries, json_path)
    root, folders, records = Path(image_dir), {}, []
    for entry, image_id in zip(entries, _ids(entries), strict=True):
        if entry.split in wanted:
            for name in (entry.filepath, entry.filename):
                check_name(name, json_path, entry.name)
            folder = folders.setdefault(entry.filepath, root / entry.filepath)
            captions, source = _captions(entry, json_path, max_captions), f"{json_path}: {entry.name}"
            records.append(Record(image_id, entry.split, captions, folder / entry.filename, source=source,
                                  known_as=entry.known_as(dataset)))  # fmt: skip
    require_unique(records, json_path)
    if check_images:
        require_pictures((record.image for record in records), json_path)
    return records


def _read(json_path: str | Path, wanted: tuple[str, ...]) -> tuple[list[_Entry], str]:
    """All entries, those of other splits than `wanted` perhaps without sentences; and what the file calls its dataset.

    A file that is not as it should be is read again, entry by entry, to say what is wrong and where.
    """
    try:
        file = msgspec.json.decode(read_bytes(json_path), type=_File)
        return file.images, file.dataset
    except (msgspec.DecodeError, UnicodeDecodeError):
        data = read_json(json_path)
    with reading(json_path, "the list `images`"):
        listed = list(data["images"])
    entries = []
    for number, one in enumerate(listed):
        with reading(json_path, f"entry {number}"):
            path = PurePosixPath(one.get("filepath", ""), one["filename"])  # both are text
            entry = _Entry(one["split"], one["filename"], one["imgid"], [], [], one.get("filepath", ""),
                           None if one.get("cocoid") is None else int(one["cocoid"]))  # fmt: skip
            hash((entry.split, entry.imgid, path))
        if entry.split in wanted:
            with reading(json_path, entry.name):
                entry.sentences = [_Sentence(said["raw"], said["sentid"]) for said in one["sentences"]]
                entry.sentids = list(one["sentids"])
                hash(tuple(entry.sentids + [said.sentid for said in entry.sentences]))
        entries.append(entry)
    return entries, str(data.get("dataset", ""))


def _check_unique(entries: list[_Entry], json_path: str | Path) -> None:
    """A picture that occurs twice may sit in two splits, or be its own false negative."""
    for keys in ([(entry.filepath, entry.filename) for entry in entries], [entry.imgid for entry in entries]):
        if len(set(keys)) < len(keys):
            seen: dict = {}
            for key, entry in zip(keys, entries, strict=True):
                if key in seen:
                    raise DataError(json_path, entry.name, f"duplicates {seen[key]}", "Remove one of the two")
                seen[key] = entry.name


def _ids(entries: list[_Entry]) -> list[str]:
    """An id for every entry: the file's stem, by which Flickr30k Entities names pictures too.

    Stems that the file has more than once (`clip0/0001.png` and `clip7/0001.png`) become paths without suffix, and
    paths that it has more than once (`1.png` and `1.bmp`) keep their suffix. All splits count, so that an id means one
    picture whichever split is loaded.
    """
    ids = []
    for entry in entries:  # pathlib's stem, in a tenth of its time
        name = entry.filename.rpartition("/")[2]
        dot = name.rfind(".")
        ids.append(name[:dot] if 0 < dot < len(name) - 1 else name)
    count = Counter(ids)
    if len(count) < len(ids):
        paths = {number: PurePosixPath(entry.filepath, entry.filename)
                 for number, (stem, entry) in enumerate(zip(ids, entries, strict=True)) if count[stem] > 1}  # fmt: skip
        bare = Counter(str(path.with_suffix("")) for path in paths.values())
        for number, path in paths.items():
            short = str(path.with_suffix(""))
            ids[number] = short if bare[short] == 1 else str(path)
    return ids


def _captions(entry: _Entry, json_path: str | Path, max_captions: int | None) -> tuple[str, ...]:
    """The captions of one entry in the order of its `sentids`."""
    sentences = {said.sentid: said.raw for said in entry.sentences}
    if len(sentences) != len(entry.sentids) or sentences.keys() != set(entry.sentids):
        raise DataError(json_path, entry.name, "`sentids` and `sentences` disagree", "Correct the entry")
    captions = tuple(
        clean_caption(sentences[sentid], json_path, f"{entry.name}, sentence {sentid}")
        for sentid in entry.sentids[:max_captions]
    )
    if not captions:
        raise DataError(json_path, entry.name, "has no captions", "Remove the entry")
    return captions
