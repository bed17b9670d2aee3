"""COCO captions and instances: boxes, crowds, pictures without annotations, dangling references."""

from __future__ import annotations

import json
import logging

import pytest
from formats import coco

from finematch.data import DataError, categories, load, load_coco

CAPTIONS = [(14, "second "), (7, "first, a"), (7, "first, b")]
BOXES = [(7, 90, [1.0, 2.0, 10.0, 5.5], 0), (7, 1, [0, 0, 32, 24], 1)]


def test_captions_and_objects(tmp_path, capsys):
    captions, instances = coco(tmp_path, captions=CAPTIONS, boxes=BOXES)
    first, second = load_coco(tmp_path, captions=captions, instances=instances, split="val")
    assert (first.image_id, first.split, first.size) == ("7", "val", (32, 24))
    assert first.captions == ("first, a", "first, b")
    assert [(o.box, o.category, o.crowd) for o in first.objects] == [
        ((1.0, 2.0, 11.0, 7.5), "toothbrush", False),
        ((0.0, 0.0, 32.0, 24.0), "person", True),
    ]
    assert (second.captions, second.objects) == (("second",), ())
    assert first.open().size == (32, 24)
    assert capsys.readouterr().out == ""


def test_one_file_alone(tmp_path):
    captions, instances = coco(tmp_path, captions=CAPTIONS, boxes=BOXES)
    assert [len(r.captions) for r in load_coco(tmp_path, captions=captions)] == [2, 1]
    assert [len(r.objects) for r in load_coco(tmp_path, instances=instances)] == [2, 0]
    with pytest.raises(ValueError, match="captions=, instances="):
        load_coco(tmp_path)


def test_categories_in_file_order(tmp_path):
    assert categories(coco(tmp_path)[1]) == ["toothbrush", "person"]


def test_unknown_image_and_category(tmp_path):
    captions, instances = coco(tmp_path, captions=[*CAPTIONS, (8, "lost")], boxes=[(7, 3, [1, 1, 2, 2], 0)])
    with pytest.raises(DataError, match=r"captions\.json: annotation 103: refers to image 8"):
        load_coco(tmp_path, captions=captions)
    with pytest.raises(DataError, match=r"instances\.json: image 7, annotation 500: refers to category 3"):
        load_coco(tmp_path, instances=instances)


def test_a_picture_without_captions(tmp_path):
    captions, instances = coco(tmp_path, captions=CAPTIONS[1:], boxes=BOXES)
    with pytest.raises(DataError, match=r"captions\.json: image 14: has no captions"):
        load_coco(tmp_path, captions=captions, instances=instances)
    assert len(load_coco(tmp_path, instances=instances)) == 2


def test_files_that_disagree_about_a_picture(tmp_path):
    captions, instances = coco(tmp_path, captions=CAPTIONS, boxes=BOXES)
    data = json.loads(instances.read_text())
    data["images"][0]["width"] = 640
    instances.write_text(json.dumps(data))
    with pytest.raises(DataError, match=r"instances\.json: image 7: is .*640.* but .*32"):
        load_coco(tmp_path, captions=captions, instances=instances)


def test_no_images(tmp_path):
    captions, _ = coco(tmp_path, n=0)
    with pytest.raises(DataError, match=r"captions\.json: the list `images`: is empty"):
        load_coco(tmp_path, captions=captions)


def test_a_repeated_image_id(tmp_path):
    captions, _ = coco(tmp_path, captions=CAPTIONS)
    data = json.loads(captions.read_text())
    data["images"].append(data["images"][0])
    captions.write_text(json.dumps(data))
    with pytest.raises(DataError, match=r"captions\.json: image 7: is listed more than once"):
        load_coco(tmp_path, captions=captions)


def test_a_box_a_pixel_out_is_clipped_and_others_are_skipped_with_one_warning(tmp_path, caplog):
    boxes = [(7, 1, [0.0, 0.0, 32.9, 24.9], 0), (7, 1, [5, 5, 0, 9], 0), (14, 1, [40, 1, 5, 5], 0)]
    _, instances = coco(tmp_path, boxes=boxes)
    with caplog.at_level(logging.WARNING):
        first, second = load_coco(tmp_path, instances=instances)
    assert [o.box for o in first.objects] == [(0.0, 0.0, 32.0, 24.0)]
    assert second.objects == ()
    (warning,) = caplog.records
    assert "instances.json: skipped 2 invalid boxes" in warning.getMessage()
    assert "image 7, annotation 501" in warning.getMessage()
    with pytest.raises(ValueError, match="invalid_boxes"):
        load_coco(tmp_path, instances=instances, invalid_boxes="drop")


def test_scenes(scenes):
    coco_records, karpathy_records = (load(name, scenes.parent, "val") for name in ("scenes_coco", "scenes"))
    assert [r.captions for r in coco_records] == [r.captions for r in karpathy_records]
    assert [r.image for r in coco_records] == [r.image for r in karpathy_records]
    assert all(r.objects for r in coco_records)


def test_real_coco(real_data, caplog):
    records = {split: load("coco", real_data, split) for split in ("train", "val")}
    assert {split: len(found) for split, found in records.items()} == {"train": 230, "val": 100}
    assert {split: sum(len(r.objects) for r in found) for split, found in records.items()} == {
        "train": 2030,
        "val": 839,
    }
    assert {len(r.captions) for found in records.values() for r in found} == {5}
    names = categories(real_data / "coco" / "annotations" / "instances_val2017.json")
    assert len(names) == 80
    assert names[0] == "person"
    assert not caplog.records
    for record in records["val"][:5]:
        assert record.open().size == record.size
