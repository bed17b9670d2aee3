"""Visual Genome: regions as captions linked to boxes, both releases' names, and what is left out."""

from __future__ import annotations

import json
import logging

import pytest
from PIL import Image

from finematch.data import DataError, load, load_visual_genome
from finematch.data.shards import read_index, write_shards

URL = "https://example.org/people/{folder}/{file}.jpg"
FIRST = [
    {
        "region_id": 11,
        "image_id": 2,
        "phrase": " the clock is green ",
        "x": 4,
        "y": 2,
        "width": 10,
        "height": 20,
    },
    {"region_id": 12, "image_id": 2, "phrase": "a tall pole", "x": 0, "y": 0, "width": 32, "height": 24},
    {"region_id": 13, "image_id": 2, "phrase": "shade", "x": 1, "y": 1, "width": 0, "height": 5},
]
SECOND = [{"region_id": 21, "phrase": "a red car", "x": 30, "y": 20, "width": 3, "height": 4}]


def write(root, regions=None, images=None, *, pictures=True):
    """The two files, and pictures of 32 x 24 under names that are not their ids."""
    folder = root / "visual_genome"
    regions = regions if regions is not None else [{"id": 2, "regions": FIRST}, {"id": 1, "regions": SECOND}]
    images = images if images is not None else [
        {"image_id": key, "width": 32, "height": 24, "url": URL.format(folder=where, file=100 + key)}
        for key, where in ((1, "VG_100K"), (2, "VG_100K_2"))
    ]  # fmt: skip
    for where, key in (("VG_100K", 101), ("VG_100K_2", 102)) if pictures else ():
        (folder / where).mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (32, 24), (key, 0, 0)).save(folder / where / f"{key}.jpg", quality=100)
    folder.mkdir(exist_ok=True)
    (folder / "region_descriptions.json").write_text(json.dumps(regions))
    (folder / "image_data.json").write_text(json.dumps(images))
    hold_out(root / "coco" / "dataset_coco.json", "coco", test=[{"cocoid": 9}])
    return {
        "regions": folder / "region_descriptions.json",
        "images": folder / "image_data.json",
        "image_dir": folder,
        "held_out": (),
    }


def hold_out(path, dataset, **splits):
    """One of Karpathy's files, as far as its splits."""
    path.parent.mkdir(parents=True, exist_ok=True)
    entries = [{**entry, "split": split} for split, part in splits.items() for entry in part]
    path.write_text(json.dumps({"dataset": dataset, "images": entries}))
    return path


def test_regions_become_captions_and_linked_phrases(tmp_path, caplog):
    write(tmp_path)
    with caplog.at_level(logging.WARNING):
        two, one = load("visual_genome", tmp_path, "train")
    assert (two.image_id, two.split, two.size) == ("2", "train", (32, 24))
    assert two.captions == ("the clock is green", "a tall pole", "shade")
    assert [(p.caption, p.start, p.end, p.boxes, p.entity) for p in two.phrases] == [
        (0, 0, 18, ((4.0, 2.0, 14.0, 22.0),), "11"),
        (1, 0, 11, ((0.0, 0.0, 32.0, 24.0),), "12"),
    ]
    assert one.phrases[0].boxes == ((30.0, 20.0, 32.0, 24.0),)  # a pixel out: clipped
    boxes, leaks = (record.getMessage() for record in caplog.records)
    assert "skipped 1 invalid boxes; the first is image 2, region 13" in boxes
    assert "left out 0 pictures that are held out by" in leaks
    red = [record.open().getpixel((0, 0))[0] for record in (two, one)]
    assert red == pytest.approx([102, 101], abs=3)  # by the url, not by the id


def test_the_first_release_calls_ids_otherwise(tmp_path):
    files = write(
        tmp_path,
        [{"image_id": 1, "regions": [{"id": 5, "phrase": "a", "x": 0, "y": 0, "width": 3, "height": 3}]}],
        [{"id": 1, "width": 32, "height": 24, "url": URL.format(folder="VG_100K", file=101)}],
    )
    (record,) = load_visual_genome(**files)
    assert (record.image_id, record.phrases[0].entity) == ("1", "5")


def test_so_many_regions_a_picture(tmp_path):
    files = write(tmp_path)
    assert [len(r.captions) for r in load_visual_genome(**files, max_captions=2)] == [2, 1]
    assert [len(r.captions) for r in load("visual_genome", tmp_path, "train", max_captions=1)] == [1, 1]
    with pytest.raises(ValueError, match="max_captions is at least 1"):
        load_visual_genome(**files, max_captions=0)


def test_what_is_left_out_is_counted_or_stops(tmp_path, caplog):
    files = write(
        tmp_path, [{"id": 1, "regions": [{**SECOND[0], "phrase": " "}, SECOND[0]]}, {"id": 2, "regions": []}]
    )
    with caplog.at_level(logging.WARNING):
        (record,) = load_visual_genome(**files)
    assert record.captions == ("a red car",)
    assert record.phrases[0].caption == 0  # the link goes to the caption that is there
    said = [one.getMessage() for one in caplog.records]
    assert "skipped 1 empty phrases; the first is image 1, region 21" in said[0]
    assert "skipped 1 pictures without a phrase; the first is image 2" in said[1]
    with pytest.raises(DataError, match=r"image 1, region 21: the caption is empty"):
        load_visual_genome(**files, invalid="raise")
    files = write(tmp_path, [{"id": 2, "regions": []}])
    with pytest.raises(DataError, match=r"image 2: has no described region"):
        load_visual_genome(**files, invalid="raise")
    with pytest.raises(DataError, match=r"has none with a described region"):
        load_visual_genome(**files)


@pytest.mark.parametrize(
    ("regions", "images", "message"),
    [
        ([{"id": 3, "regions": SECOND}], None, r"image 3: is not in .*image_data"),
        ([{"id": 1, "regions": SECOND}] * 2, None, r"image 1: is listed more than once"),
        ({"id": 1}, None, r"is a dict, not a list"),
        ([{"id": 1}], None, r"image 1: the field 'regions' is missing"),
        ([{"regions": []}], None, r"entry 0: the field 'id' is missing"),
        (
            [{"id": 1, "regions": [{"phrase": "a"}]}],
            None,
            r"image 1, region number 0: the field 'x' is missing",
        ),
        (
            [{"id": 1, "regions": [{**SECOND[0], "phrase": 7}]}],
            None,
            r"region 21: the caption is int, not text",
        ),
        (
            None,
            [{"image_id": 1, "width": 3, "height": 3, "url": "1.jpg"}],
            r"image 1: malformed entry \(url '1.jpg'",
        ),
        (None, [{"image_id": 1, "width": 3, "url": "a/b/1.jpg"}], r"image 1: the field 'height' is missing"),
    ],
)
def test_bad_files_are_named(tmp_path, regions, images, message):
    with pytest.raises(DataError, match=message):
        load_visual_genome(**write(tmp_path, regions, images))


def test_a_missing_picture_and_a_split_that_there_is_not(tmp_path):
    files = write(tmp_path)
    (tmp_path / "visual_genome" / "VG_100K" / "101.jpg").unlink()
    with pytest.raises(DataError, match=r"1 of 2 picture files are missing"):
        load_visual_genome(**files)
    assert len(load_visual_genome(**files, check_images=False)) == 2
    with pytest.raises(ValueError, match="no split 'val'"):
        load("visual_genome", tmp_path, "val")


def described(*ids, **known):
    """Regions and entries of pictures; `known` are further fields of one, as `coco_id=[None, 7]`."""
    entries = [
        {"image_id": key, "width": 32, "height": 24, "url": URL.format(folder="VG_100K", file=key),
         **{name: values[i] for name, values in known.items()}}
        for i, key in enumerate(ids)
    ]  # fmt: skip
    return [{"id": key, "regions": SECOND} for key in ids], entries


def test_pictures_of_val_and_test_are_left_out(tmp_path, caplog):
    """COCO's by its id, Flickr30k's by Flickr's; those of train and restval, and of unknown origin, stay."""
    regions, images = described(
        1, 2, 3, 4, 5, 6, coco_id=[11, 12, 13, 14, None, None], flickr_id=[None, 1, 2, 3, 105, 106]
    )
    write(tmp_path, regions, images, pictures=False)
    coco = hold_out(
        tmp_path / "coco" / "dataset_coco.json", "coco",
        train=[{"cocoid": 11}], restval=[{"cocoid": 12}], val=[{"cocoid": 13}], test=[{"cocoid": 77}],
    )  # fmt: skip

    def loaded(**options):
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            return [
                r.image_id for r in load("visual_genome", tmp_path, "train", check_images=False, **options)
            ]

    assert loaded() == ["1", "2", "4", "5", "6"]
    assert f"left out 1 pictures that are held out by {coco}" in caplog.text
    flickr = hold_out(
        tmp_path / "flickr30k" / "dataset_flickr30k.json", "flickr30k",
        train=[{"filename": "105.jpg"}], test=[{"filename": "106.jpg"}],
    )  # fmt: skip
    assert loaded() == ["1", "2", "4", "5"]
    assert f"left out 1 pictures that are held out by {flickr}" in caplog.text
    val2017 = tmp_path / "coco" / "annotations" / "captions_val2017.json"
    val2017.parent.mkdir()
    val2017.write_text(
        json.dumps(
            {"images": [{"id": 14, "coco_url": "http://images.cocodataset.org/val2017/000000000014.jpg"}]}
        )
    )
    assert loaded() == ["1", "2", "5"]
    assert loaded(held_out=[flickr]) == ["1", "2", "3", "4", "5"]
    assert loaded(held_out=()) == ["1", "2", "3", "4", "5", "6"]
    assert "held out" not in caplog.text
    coco.unlink()
    with pytest.raises(
        DataError, match=r"dataset_coco\.json: COCO's val and test: are missing.*held_out=\(\)"
    ):
        loaded()
    with pytest.raises(DataError, match=r"dataset_coco\.json: the file: cannot be read"):
        loaded(held_out=[coco])
    assert len(loaded(held_out=())) == 6


def test_it_goes_into_shards(tmp_path):
    write(tmp_path)
    write_shards(
        load("visual_genome", tmp_path, "train"), tmp_path / "shards", samples_per_shard=1, echo=None
    )
    assert len(read_index(tmp_path / "shards")) == 2
