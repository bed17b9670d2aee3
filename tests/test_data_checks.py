"""What one loader checks, all check: sizes, boxes, ids, flags, names of files, and files that are something else."""

from __future__ import annotations

import io
import json
import pickle

import numpy as np
import pytest
import torch
from formats import coco, entities, entity_object, five, karpathy, karpathy_entry, picture, precomp

from finematch.data import (
    DataError,
    load_coco,
    load_entities,
    load_karpathy,
    load_regions,
    load_visual_genome,
)
from finematch.data.checks import BoxPolicy, check_name, clean_caption, flag, read_json, stated_size
from finematch.data.pairs import RegionSource
from finematch.features.blockwise import write_rows
from finematch.features.detections import Detections
from finematch.features.detreg import read_checkpoint


def visual_genome(root, *, boxes=((1, 1, 9, 9),), n: int = 2, **stated):
    """Visual Genome's two files with `n` pictures of 32 x 24, and a loader of them."""
    entries, described = [], []
    for k in range(1, n + 1):
        picture(root / "VG_100K" / f"{k}.jpg")
        entries.append(
            {"image_id": k, "url": f"https://x/VG_100K/{k}.jpg", "width": 32, "height": 24, **stated}
        )
        keys = ("x", "y", "width", "height")
        regions = [
            {"region_id": 10 * k + i, "phrase": "a dog", **dict(zip(keys, box, strict=True))}
            for i, box in enumerate(boxes)
        ]
        described.append({"id": k, "regions": regions})
    (root / "image_data.json").write_text(json.dumps(entries))
    (root / "regions.json").write_text(json.dumps(described))
    return lambda **options: load_visual_genome(
        root / "regions.json", root / "image_data.json", root, held_out=(), **options
    )


def edited(path, change) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def boxed_coco(root, boxes, n: int = 2):
    _, instances = coco(root, boxes=[(7, 1, list(box), 0) for box in boxes], n=n)
    return lambda **options: load_coco(root, instances=instances, **options)


# ------------------------------------------------------------------------------------------- sizes
@pytest.mark.parametrize("size", [(16, 12), (24, 32), (64, 48)])
def test_images_of_another_size_are_refused_by_all(tmp_path, size):
    loaders = {"coco": boxed_coco(tmp_path, [(1, 1, 9, 9)]), "vg": visual_genome(tmp_path)}
    root = entities(tmp_path / "e", "[/EN#1/other A]", [entity_object(["1"], (1, 1, 3, 3))])
    loaders["entities"] = lambda **options: load_entities(root, "val", **options)
    for path in (*tmp_path.glob("*.jpg"), *(tmp_path / "VG_100K").iterdir(), root / "images" / "55.jpg"):
        picture(path, size)
    for load in loaders.values():
        with pytest.raises(DataError, match=rf"size 32 x 24: the image .* is {size[0]} x {size[1]}"):
            load()
        for record in load(check_images=False):
            with pytest.raises(DataError, match=rf"is {size[0]} x {size[1]}, its annotation says 32 x 24"):
                record.open()


def test_an_image_that_the_sample_of_sizes_leaves_out_is_refused_when_it_is_opened(tmp_path):
    load = boxed_coco(tmp_path, [(1, 1, 9, 9)], n=200)
    picture(tmp_path / f"{7 * 2:012d}.jpg", (16, 12))
    records = load()
    assert records[0].open().size == (32, 24)
    with pytest.raises(DataError, match="is 16 x 12"):
        records[1].open()


@pytest.mark.parametrize(("width", "height"), [(0, 24), (-32, 24), (32.5, 24), (None, 24), ("wide", 24)])
def test_sizes_that_are_none(tmp_path, width, height):
    load = visual_genome(tmp_path, width=width, height=height)
    with pytest.raises(DataError, match=r"image_data\.json: image 1: "):
        load()
    load = boxed_coco(tmp_path, [(1, 1, 9, 9)])
    edited(tmp_path / "instances.json", lambda d: d["images"][1].update(width=width, height=height))
    with pytest.raises(DataError, match=r"instances\.json: image 14: "):
        load()
    root = entities(tmp_path / "e", "A", [], size=(width, height))
    with pytest.raises(DataError, match=r"55\.xml: <filename> and <size>"):
        load_entities(root, "val")
    assert stated_size("32", 24.0) == (32, 24)


# ------------------------------------------------------------------------------------------- boxes
FRACTIONS = [(0.1, 0.1, 0.5, 0.4), (0, 0, 1, 1), (0.5, 0.5, 0.25, 0.5)]
CORNERS = [(k, k, 20 + k, 12 + k) for k in range(1, 12)]  # x1 y1 x2 y2


@pytest.mark.parametrize("invalid", ["skip", "raise"])
def test_fractions_are_refused_by_all(tmp_path, invalid):
    with pytest.raises(DataError, match="fractions"):
        boxed_coco(tmp_path, FRACTIONS)(invalid_boxes=invalid)
    with pytest.raises(DataError, match="fractions"):
        visual_genome(tmp_path, boxes=FRACTIONS)(invalid=invalid)
    root = entities(tmp_path / "e", "[/EN#1/other A]", [entity_object(["1"], (0.1, 0.1, 0.5, 0.4))])
    with pytest.raises(DataError, match="fractions"):
        load_entities(root, "val", invalid_boxes=invalid)
    entries = [{"image_id": 7, "category_id": 1, "bbox": list(box), "score": 0.5} for box in FRACTIONS]
    (tmp_path / "d.json").write_text(json.dumps(entries))
    with pytest.raises(DataError, match=r"d\.json: entry 0 .*fractions"):
        Detections(tmp_path / "d.json")
    boxes = np.array([FRACTIONS[:2]], np.float32)
    boxes[..., 2:] = 1
    folder = precomp(tmp_path / "p", "train", np.ones((1, 2, 3), np.float32), five(1))
    np.save(folder / "train_boxes.npy", boxes)
    np.save(folder / "train_sizes.npy", np.array([[32, 24]]))
    with pytest.raises(DataError, match=r"train_boxes\.npy: all boxes: .*fractions"):
        load_regions(folder, "train")


def test_corners_where_sides_are_due(tmp_path):
    for load in (boxed_coco(tmp_path, CORNERS), visual_genome(tmp_path, boxes=CORNERS)):
        with pytest.raises(DataError, match=r"all would be sound as \(x1, y1, x2, y2\), not \(x, y, width"):
            load()


def test_sides_where_corners_are_due(tmp_path):
    sides = [entity_object([str(k)], (8 + k, 8, 10, 9)) for k in range(1, 12)]
    root = entities(tmp_path, "[/EN#1/other A]", sides)
    with pytest.raises(DataError, match=r"all would be sound as \(x, y, width, height\), not \(x1"):
        load_entities(root, "val", invalid_boxes="skip")
    folder = precomp(tmp_path, "train", np.ones((1, 2, 3), np.float32), five(1))
    np.save(folder / "train_boxes.npy", np.array([[[1, 1, 9, 9], [20, 20, 10, 4]]]))
    np.save(folder / "train_sizes.npy", np.array([[32, 24]]))
    with pytest.raises(DataError, match=r"train_boxes\.npy: image 0, region 1: \[20, 20, 10, 4\] is no box"):
        load_regions(folder, "train")


def test_percent_are_refused():
    policy = BoxPolicy("skip")
    for k in range(64):
        policy.check((k, 10, 30, 40), (640, 480), "a.json", f"box {k}")
    with pytest.raises(DataError, match="these are percent"):
        policy.report("a.json")
    policy.check((300, 10, 30, 40), (640, 480), "a.json", "box 64")
    policy.report("a.json")


# ------------------------------------------------------------------------------------------- ids and flags
MERGED = {
    "category 1": lambda d: d["categories"].append({"id": 1, "name": "car"}),
    "category person": lambda d: d["categories"].append({"id": 2, "name": "person"}),
    "annotation 500": lambda d: d["annotations"][1].update(id=500),
    "image 7": lambda d: d["images"].append(dict(d["images"][0])),
}


@pytest.mark.parametrize("said", MERGED)
def test_coco_files_that_were_merged(tmp_path, said):
    _, instances = coco(tmp_path, boxes=[(7, 1, [1, 1, 9, 9], 0), (14, 1, [1, 1, 9, 9], 0)])
    edited(instances, MERGED[said])
    with pytest.raises(DataError, match=rf"instances\.json: {said}: is listed more than once"):
        load_coco(tmp_path, instances=instances)


def test_one_file_under_two_ids(tmp_path):
    load = boxed_coco(tmp_path, [(1, 1, 9, 9)])
    edited(
        tmp_path / "instances.json", lambda d: d["images"][1].update(file_name=d["images"][0]["file_name"])
    )
    with pytest.raises(DataError, match=r"image file .*7\.jpg: is that of two pictures"):
        load()
    load = visual_genome(tmp_path)
    edited(tmp_path / "image_data.json", lambda d: d[1].update(url=d[0]["url"]))
    with pytest.raises(DataError, match=r"image file .*1\.jpg: is that of two pictures"):
        load()


@pytest.mark.parametrize("value", ["0", "1", "false", None, 2, 0.0, [0]])
def test_flags_that_are_none(tmp_path, value):
    load = boxed_coco(tmp_path, [(1, 1, 9, 9)])
    edited(tmp_path / "instances.json", lambda d: d["annotations"][0].update(iscrowd=value))
    with pytest.raises(DataError, match=r"image 7, annotation 500: malformed entry .*neither 0 nor 1"):
        load()
    assert [flag(v) for v in (0, 1, False, True)] == [False, True, False, True]


def test_coco_keeps_five_captions(tmp_path):
    said = [(7, f"number {k}") for k in range(7)] + [(14, "only one")]
    captions, _ = coco(tmp_path, captions=said)
    records = load_coco(tmp_path, captions=captions)
    assert records[0].captions == tuple(f"number {k}" for k in range(5))
    assert len(load_coco(tmp_path, captions=captions, max_captions=None)[0].captions) == 7
    with pytest.raises(ValueError, match="max_captions is at least 1"):
        load_coco(tmp_path, captions=captions, max_captions=0)


def test_half_a_character(tmp_path):
    with pytest.raises(DataError, match="half a character"):
        clean_caption("a dog \ud83d", "a.json", "image 7")
    assert clean_caption(" a dog \U0001f415", "a.json", "image 7") == "a dog \U0001f415"


# ------------------------------------------------------------------------------------------- names of files
OUTSIDE = ["/etc/x.jpg", "../x.jpg", "a/../../x.jpg", "..\\x.jpg", "C:\\x.jpg", "x\0.jpg"]


@pytest.mark.parametrize("name", OUTSIDE)
def test_names_that_lead_out_of_the_folder(tmp_path, name):
    for field in ("filename", "filepath"):
        path = karpathy(tmp_path, [karpathy_entry(1, "train", five(1), **{field: name})], pictures=False)
        with pytest.raises(DataError, match=r"dataset_tiny\.json: image .*leads out of the image folder"):
            load_karpathy(path, tmp_path / "images", "train", check_images=False)
    load = boxed_coco(tmp_path, [(1, 1, 9, 9)])
    edited(tmp_path / "instances.json", lambda d: d["images"][0].update(file_name=name))
    with pytest.raises(DataError, match=r"instances\.json: image 7: .*leads out of the image folder"):
        load(check_images=False)
    for ordinary in ("a..b.jpg", "train2014/x.jpg", "...jpg", "x y.jpg"):
        assert check_name(ordinary, "a.json", "image 7") == ordinary


def test_entities_and_visual_genome_stay_below_their_folders(tmp_path):
    root = entities(tmp_path, "A dog", [])
    (root / "val.txt").write_text("../Sentences/55\n")
    with pytest.raises(DataError, match=r"val\.txt: picture .*leads out"):
        load_entities(root, "val")
    (root / "val.txt").write_text("55\n")
    xml = root / "Annotations" / "55.xml"
    xml.write_text(xml.read_text().replace("<filename>55.jpg", "<filename>../55.jpg"))
    with pytest.raises(DataError, match=r"55\.xml: <filename>: .*leads out"):
        load_entities(root, "val")
    with pytest.raises(DataError, match=r"image_data\.json: image 1: .*leads out"):
        visual_genome(tmp_path, url="https://x/../1.jpg")()


# ------------------------------------------------------------------------------------------- something else
def torch_file() -> bytes:
    file = io.BytesIO()
    torch.save({"features": torch.zeros(2)}, file)
    return file.getvalue()


def npz() -> bytes:
    file = io.BytesIO()
    np.savez(file, features=np.zeros(2))
    return file.getvalue()


def objects() -> bytes:
    file = io.BytesIO()
    np.save(file, np.array([{"a": 1}], dtype=object), allow_pickle=True)
    return file.getvalue()


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"
PAGE = b"\n<!DOCTYPE html><html>Sign in</html>"
DISGUISED = {
    "npz": (npz(), "zip archive"),
    "torch": (torch_file(), "zip archive"),
    "pointer": (POINTER, "git lfs pull"),
    "page": (PAGE, "web page"),
    "pickle": (pickle.dumps({"a": 1}), "could run code"),
    "objects": (objects(), "could run code"),
    "gzip": (b"\x1f\x8b\x08" + bytes(9), "gzip"),
    "hdf5": (b"\x89HDF\r\n\x1a\n" + bytes(9), "HDF5"),
    "nothing": (b"", "empty"),
    "zeros": (bytes(4096), "empty, or zeros"),
}


@pytest.mark.parametrize("what", DISGUISED)
def test_an_array_that_is_something_else(tmp_path, what):
    folder = precomp(tmp_path, "train", np.ones((1, 2, 3), np.float32), five(1))
    content, said = DISGUISED[what]
    (folder / "train_ims.npy").write_bytes(content)
    with pytest.raises(DataError, match=rf"train_ims\.npy: the array: cannot be mapped \(.*{said}") as caught:
        load_regions(folder, "train")
    assert "allow_pickle" not in str(caught.value)


@pytest.mark.parametrize("what", ["pointer", "page", "pickle", "gzip", "nothing"])
def test_json_that_is_something_else(tmp_path, what):
    content, said = DISGUISED[what]
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(DataError, match=rf"a\.json: line .*{said}"):
        read_json(tmp_path / "a.json")


def test_weights_that_are_something_else_give_no_advice_to_unpickle(tmp_path):
    path = tmp_path / "w.pth"
    torch.save({"model": pytest.Item}, path)
    for content in (path.read_bytes(), pickle.dumps({"a": 1}), POINTER):
        path.write_bytes(content)
        with pytest.raises(
            ValueError, match=r"w\.pth cannot be read .*(could run code|git lfs pull)"
        ) as caught:
            read_checkpoint(path)
        assert "weights_only" not in str(caught.value)


def test_a_row_that_is_not_finite_is_named(tmp_path):
    features = np.ones((4, 2, 3), np.float32)
    for value in (np.nan, np.inf):
        features[2, 1, 0] = value
        folder = precomp(tmp_path, "train", features, [c for k in range(4) for c in five(k)], list("abcd"))
        source = RegionSource(load_regions(folder, "train"))
        source.batch([0, 1, 3])
        with pytest.raises(DataError, match=r"train_ims\.npy: image c \(row 2 .*not finite"):
            source.batch([3, 2])


@pytest.mark.parametrize("damage", ["note", "array"])
def test_work_that_was_cut_off_is_begun_again(tmp_path, damage):
    made = []

    def make(items: range) -> dict[str, np.ndarray]:
        made.append(items.start)
        if items.start == 4 and len(made) == 3:
            raise KeyboardInterrupt
        return {"rows": np.array([[float(k)] for k in items])}

    start, names = np.arange(7), list("abcdef")
    with pytest.raises(KeyboardInterrupt):
        write_rows(tmp_path, start, make, names, block=2, echo=None)
    path = tmp_path / {"note": "progress.json", "array": "rows.npy"}[damage]
    path.write_bytes(path.read_bytes()[:-8])
    write_rows(tmp_path, start, make, names, block=2, echo=None)
    assert made == [0, 2, 4, 0, 2, 4]
    assert np.load(tmp_path / "rows.npy")[:, 0].tolist() == list(range(6))
