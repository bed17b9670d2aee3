"""The ids by which a photo is known in other datasets, from each format's own entries."""

import json

import pytest
from formats import coco, five, karpathy, karpathy_entry

from finematch.data import DataError, load_coco, load_karpathy
from finematch.data.names import held_out_names, in_common, known_names
from finematch.data.record import Record


@pytest.mark.parametrize(
    ("entry", "dataset", "names"),
    [
        ({"filename": "COCO_val2014_000000391895.jpg", "cocoid": 391895}, "coco", ("coco:391895",)),
        ({"filename": "1000092795.jpg"}, "flickr30k", ("flickr:1000092795",)),
        ({"filename": "1000268201_693b08cb0e.jpg"}, "flickr8k", ("flickr:1000268201",)),
        ({"filename": "1000092795.jpg"}, "frames", ()),  # of a set of one's own: a number is no photo id
        ({"image_id": 1, "coco_id": None, "flickr_id": None}, "", ()),
        ({"image_id": 1, "coco_id": 42, "flickr_id": 7}, "", ("coco:42", "flickr:7")),
        (
            {"id": 9, "coco_url": "http://images.cocodataset.org/val2017/000000000009.jpg",
             "flickr_url": "http://farm4.staticflickr.com/3153/2970773875_164f0c0b83_z.jpg"},
            "", ("coco:9", "flickr:2970773875"),
        ),
        ({"id": 9, "file_name": "9.jpg"}, "", ()),  # of a set of one's own in COCO's format
        ({"url": "http://static.flickr.com/2723/4385058960_b0f291553e.jpg"}, "", ("flickr:4385058960",)),
        ({"url": "https://example.org/2723/4385058960_b0f291553e.jpg"}, "", ()),
        ({"known_as": ["coco:5"]}, "", ("coco:5",)),
    ],
)  # fmt: skip
def test_names_by_format(entry, dataset, names):
    assert known_names(entry, dataset) == names


def test_images_in_common_are_those_of_one_id():
    """COCO's val2017 is part of what Karpathy's split trains on, under other file names. No id, no image in common."""
    one, other = (
        [Record(str(k), "val", (), None, known_as=names) for k, names in enumerate(known)]
        for known in ([("coco:9", "flickr:7"), ("coco:8",), ()], [("coco:9",), (), ("flickr:8",)])
    )
    assert in_common(one, other) == in_common(other, one) == 1
    assert in_common(one, one) == 2


def test_records_carry_their_names(tmp_path):
    path = karpathy(tmp_path, [karpathy_entry(k, "test", five(k), cocoid=70 + k) for k in range(2)])
    assert [r.known_as for r in load_karpathy(path, tmp_path / "images", "test")] == [
        ("coco:70",),
        ("coco:71",),
    ]
    path.write_text(path.read_text().replace('"cocoid": 70', '"cocoid": "70"'))  # read entry by entry then
    assert [r.known_as for r in load_karpathy(path, tmp_path / "images", "test")] == [
        ("coco:70",),
        ("coco:71",),
    ]
    path = karpathy(tmp_path, [karpathy_entry(0, "test", five(0), filename="1000268201_693b08cb0e.jpg")])
    path.write_text(path.read_text().replace('"dataset": "tiny"', '"dataset": "flickr8k"'))
    assert [r.known_as for r in load_karpathy(path, tmp_path / "images", "test")] == [("flickr:1000268201",)]
    captions, _ = coco(tmp_path, captions=[(7, "one"), (14, "two")])
    data = json.loads(captions.read_text())
    data["images"][1]["coco_url"] = "http://images.cocodataset.org/val2017/000000000014.jpg"
    captions.write_text(json.dumps(data))
    assert [r.known_as for r in load_coco(tmp_path, captions=captions)] == [(), ("coco:14",)]


def test_names_that_a_file_holds_out(tmp_path):
    path = karpathy(tmp_path, [karpathy_entry(k, split, five(k), cocoid=k) for k, split in
                               enumerate(("train", "restval", "val", "test"))], pictures=False)  # fmt: skip
    assert held_out_names(path) == {"coco:2", "coco:3"}
    path.write_text(json.dumps({"annotations": []}))
    with pytest.raises(DataError, match="the field 'images' is missing"):
        held_out_names(path)
