"""One id, one picture; and digests that say what was in a set, wherever it lies."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from formats import coco, five, karpathy, karpathy_entry, picture
from PIL import Image

from finematch.data import (
    DataError,
    Object,
    Phrase,
    Record,
    digests,
    load_coco,
    load_entities,
    load_karpathy,
    load_regions,
)
from finematch.data.checks import require_unique


# ------------------------------------------------------------------------------------------- ids
def ids_of(root: Path, *names: dict) -> list[str]:
    entries = [karpathy_entry(k, "train", five(k), **name) for k, name in enumerate(names)]
    return [r.image_id for r in load_karpathy(karpathy(root, entries), root / "images", "train")]


def test_an_ordinary_set_is_named_by_its_files(tmp_path):
    names = ({"filename": "55.jpg", "filepath": "val2014"}, {"filename": "56.jpg", "filepath": "train2014"})
    assert ids_of(tmp_path, *names) == ["55", "56"]


def test_one_name_in_two_folders_gives_two_ids(tmp_path):
    found = ids_of(tmp_path, {"filename": "0001.png", "filepath": "clip0"}, {"filename": "clip7/0001.png"},
                   {"filename": "0002.png", "filepath": "clip0"})  # fmt: skip
    assert found == ["clip0/0001", "clip7/0001", "0002"]


def test_one_stem_with_two_suffixes_gives_two_ids(tmp_path):
    assert ids_of(tmp_path, {"filename": "1.png"}, {"filename": "1.bmp"}) == ["1.png", "1.bmp"]


def test_an_id_does_not_depend_on_the_split_that_is_loaded(tmp_path):
    entries = [karpathy_entry(k, split, five(k), filename="55.jpg", filepath=split)
               for k, split in enumerate(("train", "val"))]  # fmt: skip
    path = karpathy(tmp_path, entries)
    (record,) = load_karpathy(path, tmp_path / "images", "val")
    assert record.image_id == "val/55"


def test_names_that_no_path_tells_apart_are_refused(tmp_path):
    names = ({"filename": "1.png"}, {"filename": "1.bmp"}, {"filename": "1.png.gif"})
    with pytest.raises(
        DataError, match=r"image id '1\.png': is that of two pictures: .*imgid 0.*imgid 2.*Rename"
    ):
        ids_of(tmp_path, *names)


def test_phrases_never_land_on_another_picture(tmp_path):
    """Two pictures are called 55 in Karpathy's file, so Entities' 55 is neither's."""
    entries = [karpathy_entry(k, "val", [said], filename="55.png", filepath=folder)
               for k, (folder, said) in enumerate((("train", "a right dog"), ("val", "a wrong cat")))]  # fmt: skip
    records = load_karpathy(karpathy(tmp_path / "k", entries), tmp_path / "k" / "images", "val")
    e = tmp_path / "e"
    for name in ("Sentences", "Annotations"):
        (e / name).mkdir(parents=True)
    (e / "val.txt").write_text("55\n")
    (e / "Sentences" / "55.txt").write_text("[/EN#1/animals a right dog]\n")
    (e / "Annotations" / "55.xml").write_text(
        "<annotation><filename>55.png</filename><size><width>32</width><height>24</height></size></annotation>"
    )
    picture(e / "images" / "55.png")
    (linked,) = load_entities(e, "val")
    assert linked.image_id not in {record.image_id for record in records}


def test_coco_ids_that_read_alike_are_refused(tmp_path):
    captions, _ = coco(tmp_path, captions=[(7, "a"), (14, "b")])
    data = json.loads(captions.read_text())
    data["images"][1]["id"], data["annotations"][1]["image_id"] = "7", "7"
    captions.write_text(json.dumps(data))
    with pytest.raises(DataError, match=r"captions\.json: image id '7': is that of two pictures"):
        load_coco(tmp_path, captions=captions)


def test_precomputed_features_with_one_id_twice_are_refused(tmp_path):
    np.save(tmp_path / "dev_ims.npy", np.ones((3, 2, 4), np.float32))
    (tmp_path / "dev_caps.txt").write_text("a\nb\nc\n" * 5)
    (tmp_path / "dev_ids.txt").write_text("1\n2\n1\n")
    with pytest.raises(DataError, match=r"dev_ids\.txt: id '1': is that of 2 pictures"):
        load_regions(tmp_path, "dev")


def test_records_without_files_are_named_too():
    with pytest.raises(
        DataError, match=r"image id 'a': is that of two pictures: a record without a file and x: 2"
    ):
        require_unique([Record("a", "val", ()), Record("a", "val", (), source="x: 2")], "list")


# ------------------------------------------------------------------------------------------- digests
def made(folder: Path) -> list[Record]:
    """Four pictures of noise with captions, boxes and phrases."""
    folder.mkdir(parents=True)
    rng, found = np.random.default_rng(0), []
    for k in range(4):
        path = folder / f"p{k}.png"
        Image.fromarray((rng.random((8, 8, 3)) * 255).astype(np.uint8)).save(path)
        phrase = Phrase(0, 0, 3, ((0.0, 0.0, 2.0, 2.0),))
        found.append(Record(f"p{k}", "train", (f"one {k}", "two"), path, (8, 8), (Object((1.0, 1.0, 2.0, 2.0), "x"),),
                            (phrase,)))  # fmt: skip
    return found


def test_a_moved_or_copied_set_is_the_same_set(tmp_path):
    records = made(tmp_path / "a")
    before = digests(records)
    assert set(before) == {"images", "captions", "boxes", "phrases"}
    shutil.move(tmp_path / "a", tmp_path / "b")
    moved = [replace(r, image=tmp_path / "b" / r.image.name, source="elsewhere") for r in records]
    assert digests(moved) == before


@pytest.mark.parametrize(
    ("change", "part"),
    [
        ({"captions": ("one 2", "too")}, "captions"),
        ({"objects": (Object((1.0, 1.0, 2.0, 2.0), "y"),)}, "boxes"),
        ({"phrases": ()}, "phrases"),
    ],
)
def test_a_change_shows_in_its_part_alone(tmp_path, change, part):
    records = made(tmp_path / "a")
    before, after = digests(records), digests([*records[:2], replace(records[2], **change), records[3]])
    assert {name for name in before if before[name] != after[name]} == {part}


def test_a_changed_picture_shows(tmp_path):
    records = made(tmp_path / "a")
    before, path = digests(records), records[1].image
    data, state = bytearray(path.read_bytes()), path.stat()
    data[-20] ^= 1
    path.write_bytes(data)
    os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns))
    after = digests(records)
    assert {name for name in before if before[name] != after[name]} == {"images"}


def test_order_and_split_belong_to_a_set(tmp_path):
    records = made(tmp_path / "a")
    before = digests(records)
    assert digests(records[::-1])["images"] != before["images"]
    assert digests([replace(r, split="val") for r in records])["captions"] != before["captions"]


def test_what_a_set_lacks_has_no_digest(tmp_path):
    assert set(digests([Record("a", "val", ("x",))])) == {"captions"}
    with pytest.raises(DataError, match=r"nowhere\.png: the file: cannot be read"):
        digests([Record("a", "val", ("x",), tmp_path / "nowhere.png")])
    with pytest.raises(DataError, match="image id 'a': is that of two records"):
        digests([Record("a", "val", ("x",)), Record("a", "val", ("y",))])
