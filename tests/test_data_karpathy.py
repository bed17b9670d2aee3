"""Karpathy JSON: splits, the rule of five captions, and the records of tiny, embedded and real sets."""

from __future__ import annotations

import json

import pytest
from formats import five, karpathy, karpathy_entry

from finematch.data import DataError, load, load_karpathy


def test_splits_and_subfolders(tmp_path):
    entries = [
        karpathy_entry(1, "train", five(1), filepath="train2014", cocoid=11),
        karpathy_entry(2, "val", five(2), filepath="val2014", cocoid=12),
        karpathy_entry(3, "restval", five(3), filepath="val2014", cocoid=13),
        karpathy_entry(4, "test", five(4), filepath="val2014", cocoid=14),
    ]
    path = karpathy(tmp_path, entries)
    got = {
        split: [r.image_id for r in load_karpathy(path, tmp_path / "images", split)]
        for split in ("train", "restval", "val", "test", "trainrestval")
    }
    assert got == {
        "train": ["p1"],
        "restval": ["p3"],
        "val": ["p2"],
        "test": ["p4"],
        "trainrestval": ["p1", "p3"],
    }
    (record,) = load_karpathy(path, tmp_path / "images", "val")
    assert record.image == tmp_path / "images" / "val2014" / "p2.jpg"
    assert record.captions == tuple(five(2))
    assert record.open().size == (32, 24)


def test_first_five_by_sentids_not_by_position(tmp_path):
    entry = karpathy_entry(1, "train", [f"c{k}" for k in range(7)])
    entry["sentids"] = [16, 15, 14, 13, 12, 11, 10]
    path = karpathy(tmp_path, [entry])
    captions = {
        n: load_karpathy(path, tmp_path / "images", "train", max_captions=n)[0].captions for n in (5, None)
    }
    assert captions == {5: ("c6", "c5", "c4", "c3", "c2"), None: ("c6", "c5", "c4", "c3", "c2", "c1", "c0")}


def test_fewer_captions_are_kept_and_white_space_is_stripped(tmp_path):
    path = karpathy(tmp_path, [karpathy_entry(1, "val", ["  A dog .\n", "Two  dogs"])])
    assert load_karpathy(path, tmp_path / "images", "val")[0].captions == ("A dog .", "Two  dogs")


def test_zero_captions_asked_for_is_refused(tmp_path):
    path = karpathy(tmp_path, [karpathy_entry(1, "val", five(1))])
    with pytest.raises(ValueError, match="max_captions"):
        load_karpathy(path, tmp_path / "images", "val", max_captions=0)


@pytest.mark.parametrize("split", ["dev", "trainrestval"])
def test_unknown_split_lists_what_there_is(tmp_path, split):
    path = karpathy(tmp_path, [karpathy_entry(1, "train", five(1)), karpathy_entry(2, "val", five(2))])
    with pytest.raises(DataError, match=rf"dataset_tiny\.json: split '{split}': .*train, val"):
        load_karpathy(path, tmp_path / "images", split)


@pytest.mark.parametrize(("field", "value"), [("filename", "p1.jpg"), ("imgid", 1)])
def test_a_duplicate_in_another_split_is_refused(tmp_path, field, value):
    entries = [karpathy_entry(1, "train", five(1)), karpathy_entry(2, "test", five(2), **{field: value})]
    with pytest.raises(DataError, match=r"dataset_tiny\.json: image p\d\.jpg .*duplicates image p1\.jpg"):
        load_karpathy(karpathy(tmp_path, entries), tmp_path / "images", "train")


def test_same_file_name_in_two_subfolders_is_no_duplicate(tmp_path):
    entries = [karpathy_entry(k, "train", five(k), filename="p.jpg", filepath=f"f{k}") for k in (1, 2)]
    assert len(load_karpathy(karpathy(tmp_path, entries), tmp_path / "images", "train")) == 2


def test_a_sentence_id_that_no_sentence_has(tmp_path):
    entry = karpathy_entry(1, "train", five(1))
    entry["sentids"][2] = 999
    with pytest.raises(DataError, match=r"image p1\.jpg \(imgid 1\): `sentids` and `sentences` disagree"):
        load_karpathy(karpathy(tmp_path, [entry]), tmp_path / "images", "train")


@pytest.mark.parametrize("field", ["split", "filename", "imgid", "sentids", "sentences"])
def test_a_missing_field_is_named(tmp_path, field):
    entry = karpathy_entry(1, "train", five(1))
    path = karpathy(tmp_path, [entry])
    del entry[field]
    path.write_text(json.dumps({"images": [karpathy_entry(0, "train", five(0)), entry]}))
    with pytest.raises(
        DataError, match=rf"dataset_tiny\.json: (entry 1|image p1\.jpg).*'{field}' is missing"
    ):
        load_karpathy(path, tmp_path / "images", "train", check_images=False)


def test_scenes(scenes):
    records = {split: load("scenes", scenes.parent, split) for split in ("train", "val", "test")}
    assert {split: len(found) for split, found in records.items()} == {"train": 40, "val": 12, "test": 12}
    assert all(len(r.captions) == 5 and r.image.exists() for found in records.values() for r in found)
    assert records["val"][0].open().size == (64, 64)


def test_flickr8k(real_data):
    records = {split: load("flickr8k", real_data, split) for split in ("train", "val")}
    assert {split: len(found) for split, found in records.items()} == {"train": 6000, "val": 1000}
    assert {len(r.captions) for found in records.values() for r in found} == {5}
    assert records["train"][0].captions[1] == "A girl going into a wooden building ."
    assert records["val"][-1].open().size == (224, 224)
    assert not {r.image_id for r in records["train"]} & {r.image_id for r in records["val"]}


def test_what_is_not_read_may_be_anything(tmp_path):
    """A file that the typed reader refuses is read entry by entry: same records, and only wanted entries count."""
    entries = [karpathy_entry(1, "train", five(1), weight=float("nan")), karpathy_entry(2, "val", five(2))]
    path = karpathy(tmp_path, entries)
    records = load_karpathy(path, tmp_path / "images", "train")
    del entries[0]["weight"], entries[1]["sentences"]
    path.write_text("\ufeff" + json.dumps({"images": entries, "info": [1, {"a": None}]}), encoding="utf-8")
    assert load_karpathy(path, tmp_path / "images", "train") == records
    with pytest.raises(DataError, match=r"image p2\.jpg \(imgid 2\): .*'sentences' is missing"):
        load_karpathy(path, tmp_path / "images", "val")
