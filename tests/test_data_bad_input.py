"""Bad input: every error names the file and the record; what the field converts or skips is not refused."""

from __future__ import annotations

import functools
import json
import re

import numpy as np
import pytest
from formats import coco, entities, entity_object, five, karpathy, karpathy_entry, picture, precomp
from PIL import Image

from finematch.data import (
    DataError,
    Record,
    dataset_help,
    load,
    load_coco,
    load_entities,
    load_karpathy,
    load_regions,
)


def tiny(root, *entries: dict, pictures: bool = True) -> list[Record]:
    return load_karpathy(karpathy(root, list(entries), pictures), root / "images", "train")


@pytest.mark.parametrize("kept", [0.5, 0.05, 0])
def test_truncated_jpeg(tmp_path, kept):
    (record,) = tiny(tmp_path, karpathy_entry(3, "train", five(3)))
    whole = record.image.read_bytes()
    record.image.write_bytes(whole[: int(kept * len(whole))])
    with pytest.raises(DataError, match=r"images.p3\.jpg: .*dataset_tiny\.json: image p3\.jpg \(imgid 3\)"):
        record.open()


@pytest.mark.parametrize("mode", ["CMYK", "L", "RGB"])
def test_cmyk_and_greyscale_are_converted(tmp_path, mode):
    (record,) = tiny(tmp_path, karpathy_entry(3, "train", five(3)))
    picture(record.image, mode=mode)
    with Image.open(record.image) as stored:
        assert stored.mode == mode
    opened = record.open()
    assert (opened.mode, opened.size) == ("RGB", (32, 24))
    reference = np.asarray(Image.open(picture(tmp_path / "grey.png", mode="L")).convert("RGB"), float)
    assert np.abs(np.asarray(opened, float) - reference).mean() < 8


def test_missing_pictures_are_found_when_loading(tmp_path):
    entries = [karpathy_entry(k, "train", five(k)) for k in range(9)]
    path = karpathy(tmp_path, entries)
    for k in (2, 3, 5, 7):
        (tmp_path / "images" / f"p{k}.jpg").unlink()
    with pytest.raises(
        DataError, match=r"dataset_tiny\.json: pictures .*p2\.jpg, .*p3\.jpg, .*p5\.jpg: 4 of 9"
    ):
        load_karpathy(path, tmp_path / "images", "train")
    records = load_karpathy(path, tmp_path / "images", "train", check_images=False)
    with pytest.raises(DataError, match=r"p2\.jpg: .*image p2\.jpg.*: the image is missing"):
        records[2].open()
    with pytest.raises(
        DataError, match=r"nowhere: pictures of .*dataset_tiny\.json: the folder cannot be read"
    ):
        load_karpathy(path, tmp_path / "nowhere", "train")


@pytest.mark.parametrize("blank", ["", "  \n"])
def test_empty_caption(tmp_path, blank):
    texts = [*five(4)[:3], blank]
    with pytest.raises(
        DataError, match=r"dataset_tiny\.json: image p4\.jpg \(imgid 4\), sentence 43: .*empty"
    ):
        tiny(tmp_path, karpathy_entry(4, "train", texts))
    captions, _ = coco(tmp_path, captions=[(7, "a"), (14, blank)])
    with pytest.raises(DataError, match=r"captions\.json: image 14, caption 101: the caption is empty"):
        load_coco(tmp_path, captions=captions)
    root = entities(tmp_path / "entities", f"A dog .\n{blank.strip()}\nTwo dogs .\n", [])
    with pytest.raises(DataError, match=r"55\.txt: caption 2: the caption is empty"):
        load_entities(root, "val")
    folder = precomp(tmp_path, "train", np.zeros((1, 2, 3), np.float32), [*five(1)[:3], blank.strip(), "e"])
    with pytest.raises(DataError, match=r"train_caps\.txt: line 4: the caption is empty"):
        load_regions(folder, "train")


def test_caption_that_is_not_text(tmp_path):
    entry = karpathy_entry(4, "train", five(4))
    entry["sentences"][1]["raw"] = None
    with pytest.raises(DataError, match=r"image p4\.jpg \(imgid 4\), sentence 41: the caption is NoneType"):
        tiny(tmp_path, entry)


def test_no_captions(tmp_path):
    with pytest.raises(DataError, match=r"dataset_tiny\.json: image p4\.jpg \(imgid 4\): has no captions"):
        tiny(tmp_path, karpathy_entry(4, "train", []))


@pytest.mark.parametrize(
    ("box", "problem"),
    [
        ((5, 5, 0, 9), "has no area"),
        ((40, 1, 5, 5), "lies outside"),
        ((0, 0, 5, float("nan")), "not finite"),
    ],
)
def test_boxes_outside_or_of_no_area(tmp_path, box, problem):
    _, instances = coco(tmp_path, boxes=[(7, 1, [1, 1, 2, 2], 0), (14, 1, box, 0)])
    with pytest.raises(DataError, match=rf"instances\.json: image 14, annotation 501: .*{problem}"):
        load_coco(tmp_path, instances=instances, invalid_boxes="raise")
    assert [len(r.objects) for r in load_coco(tmp_path, instances=instances)] == [1, 0]
    corners = (box[0], box[1], box[0] + box[2], box[1] + box[3])
    good = entity_object(["1"], (1, 1, 3, 3))
    root = entities(
        tmp_path / "e", "[/EN#1/other A] and [/EN#2/other b]", [good, entity_object(["2"], corners)]
    )
    with pytest.raises(DataError, match=rf"55\.xml: object 2 \(entity 2\): .*{problem}"):
        load_entities(root, "val")
    (record,) = load_entities(root, "val", invalid_boxes="skip")
    assert [len(phrase.boxes) for phrase in record.phrases] == [1, 0]


def test_a_box_with_three_numbers(tmp_path):
    _, instances = coco(tmp_path, boxes=[(7, 1, [1, 1, 2, 2], 0)])
    instances.write_text(instances.read_text().replace("[1, 1, 2, 2]", "[1, 1, 2]"))
    with pytest.raises(DataError, match=r"instances\.json: image 7, annotation 500: malformed entry"):
        load_coco(tmp_path, instances=instances)


def test_malformed_json(tmp_path):
    path = karpathy(tmp_path, [karpathy_entry(1, "train", five(1))])
    captions, _ = coco(tmp_path, captions=[(7, "a"), (14, "b")])
    for file, read in (
        (path, lambda: load_karpathy(path, tmp_path / "images", "train")),
        (captions, lambda: load_coco(tmp_path, captions=captions)),
    ):
        whole = file.read_text()
        file.write_text("\n" + whole[: len(whole) // 2])
        with pytest.raises(DataError, match=rf"{re.escape(file.name)}: line 2 column \d+: malformed JSON"):
            read()
        file.write_text("[1, 2]")
        with pytest.raises(DataError, match=rf"{re.escape(file.name)}: the list"):
            read()
        file.write_text(json.dumps({"images": [7], "annotations": [7]}))
        with pytest.raises(DataError, match=rf"{re.escape(file.name)}: (entry 0|the list)"):
            read()


def test_malformed_xml(tmp_path):
    root = entities(tmp_path, "[/EN#1/other A dog] .", [entity_object(["1"], (1, 1, 3, 3))])
    xml = root / "Annotations" / "55.xml"
    whole = xml.read_text()
    xml.write_text(whole.replace("</object>", "</objekt>"))
    with pytest.raises(DataError, match=r"55\.xml: line 4: malformed XML"):
        load_entities(root, "val")
    xml.write_text(whole.replace("<xmin>1</xmin>", ""))
    with pytest.raises(DataError, match=r"55\.xml: object 1 \(entity 1\): malformed entry"):
        load_entities(root, "val")
    xml.write_text(whole.replace("<width>32</width>", ""))
    with pytest.raises(DataError, match=r"55\.xml: <filename> and <size>: malformed entry"):
        load_entities(root, "val")


def test_captions_and_features_of_different_lengths(tmp_path):
    folder = precomp(tmp_path, "train", np.zeros((3, 2, 3), np.float32), [*five(1), *five(2), *five(3)[:4]])
    with pytest.raises(
        DataError, match=r"split train: .*train_caps\.txt has 14 captions and .*train_ims\.npy has 3"
    ):
        load_regions(folder, "train")


def test_a_picture_of_a_dataset_without_pictures(tmp_path):
    precomp(tmp_path, "train", np.zeros((1, 2, 3), np.float32), five(1), ["id9"])
    with pytest.raises(DataError, match=r"id9: this dataset publishes features, no images"):
        load_regions(tmp_path, "train").records()[0].open()


def test_unknown_dataset_suggests_the_nearest(tmp_path):
    with pytest.raises(
        DataError, match=r"dataset 'flikr30k': is not known; near to 'flickr30k'\. Choose one of scenes"
    ):
        load("flikr30k", tmp_path, "train")
    with pytest.raises(DataError, match=r"dataset '17': is not known\. Choose"):
        load("17", tmp_path, "train")


@pytest.mark.parametrize("root", [".", "nowhere"])
def test_missing_data_root_says_what_is_expected(tmp_path, root):
    with pytest.raises(
        DataError, match=r"flickr8k: dataset 'flickr8k': .*flickr8k/dataset_flickr8k\.json, flickr8k/im"
    ):
        load("flickr8k", tmp_path / root, "train")
    with pytest.raises(
        DataError, match=r"coco: .*captions_val2017\.json, .*instances_val2017\.json, coco/val2017"
    ):
        load("coco", tmp_path / root, "val")


def test_help_lists_every_dataset():
    text = dataset_help()
    assert "<data_root>/coco/annotations/instances_<split>2017.json" in text
    assert dataset_help("flickr8k") in text
    assert text.count("\n    ") > 20


def test_coco_karpathy_and_options_reach_the_loader(tmp_path):
    entries = [
        karpathy_entry(1, "train", [*five(1), "sixth"], filepath="train2014"),
        karpathy_entry(2, "restval", five(2), filepath="val2014"),
    ]
    path = karpathy(tmp_path / "coco", entries)
    path.rename(tmp_path / "coco" / "dataset_coco.json")
    for folder in ("train2014", "val2014"):
        (tmp_path / "coco" / "images" / folder).rename(tmp_path / "coco" / folder)
    records = load("coco_karpathy", tmp_path, "trainrestval", max_captions=None)
    assert [len(r.captions) for r in records] == [6, 5]
    assert all(r.open().mode == "RGB" for r in records)


def test_scenes_are_drawn_once_where_absent(tmp_path, monkeypatch):
    from finematch.scenes import generator as scenes

    calls = []

    def small(out, **options):
        calls.append(out)
        return draw(out, train=4, val=2, test=2, **options)

    draw = functools.partial(scenes.generate, seed=0, size=64)
    monkeypatch.setattr(scenes, "generate", small)
    root = tmp_path / "new" / "root"
    assert len(load("scenes", root, "train")) == 4
    assert len(load("scenes_entities", root, "val")) == 2
    assert len(calls) == 1
    assert [path.name for path in root.iterdir()] == ["scenes"]
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(DataError, match=r"scenes: whole folder: cannot be written"):
        load("scenes", tmp_path / "file", "train")
