"""Parquet files and folders of the `datasets` library, images inside or beside, become Karpathy's layout."""

from __future__ import annotations

import io
import json

import numpy as np
import pytest
from formats import five, picture
from PIL import Image

from finematch.data import DataError, load
from finematch.data.packed import unpack

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")


def jpeg(number: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (32, 24), (20 * number, 0, 0)).save(file, "JPEG")
    return file.getvalue()


def parquet(path, rows: list[dict]):
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), path)
    return path


def saved(folder, rows: list[dict]) -> None:
    """What `datasets.Dataset.save_to_disk` writes, and a leftover of its cache."""
    folder.mkdir(parents=True)
    table = pa.Table.from_pylist(rows)
    for name, part in (("data-00000-of-00001.arrow", table), ("cache-0.arrow", table.slice(0, 1))):
        with pa.OSFile(str(folder / name), "wb") as file, pa.ipc.new_stream(file, table.schema) as stream:
            stream.write_table(part, max_chunksize=3)
    (folder / "state.json").write_text(
        json.dumps({"_data_files": [{"filename": "data-00000-of-00001.arrow"}]})
    )


def inside(number: int, split: str) -> dict:
    """A row as copies of Flickr30k have it: the split is a column, all rows lie in files called `test`."""
    name, sentids = f"{number}.jpg", [str(5 * number + k) for k in range(5)]
    return {"image": {"bytes": jpeg(number), "path": name}, "caption": five(number), "split": split,
            "sentids": sentids, "img_id": str(number), "filename": name}  # fmt: skip


SPLITS = ["train", "train", "val", "test"]


@pytest.mark.parametrize("form", ["parquet", "saved"])
def test_images_inside(tmp_path, form):
    rows = [inside(number, split) for number, split in enumerate(SPLITS)]
    if form == "parquet":
        for half in (0, 1):
            parquet(
                tmp_path / "flickr30k" / f"test-0000{half}-of-00002.parquet", rows[2 * half : 2 * half + 2]
            )
    else:
        saved(tmp_path / "flickr30k" / "test", rows)
    records = {split: load("flickr30k", tmp_path, split) for split in ("train", "val", "test")}
    assert {split: [r.image_id for r in rs] for split, rs in records.items()} == {
        "train": ["0", "1"], "val": ["2"], "test": ["3"]
    }  # fmt: skip
    assert records["val"][0].captions == tuple(five(2))
    assert records["val"][0].known_as == ("flickr:2",)
    assert records["val"][0].image.read_bytes() == jpeg(2)
    np.testing.assert_array_equal(
        np.asarray(records["val"][0].open())[0, 0], np.asarray(Image.open(io.BytesIO(jpeg(2))))[0, 0]
    )


def test_images_beside_and_splits_by_file(tmp_path):
    """COCO's copies: Karpathy's columns, the images where COCO has them."""
    for number, split in enumerate(("train", "validation", "test")):
        picture(tmp_path / "coco" / "val2014" / f"COCO_{number}.jpg")
        sentences = [
            {"raw": said, "sentid": 5 * number + k, "tokens": said.split()}
            for k, said in enumerate(five(number))
        ]
        row = {"filepath": "val2014", "filename": f"COCO_{number}.jpg", "imgid": number, "cocoid": 40 + number,
               "sentids": [5 * number + k for k in range(5)], "sentences": sentences}  # fmt: skip
        parquet(tmp_path / "coco" / "data" / f"{split}-00000-of-00001.parquet", [row])
    (record,) = load("coco_karpathy", tmp_path, "val")
    assert record.captions == tuple(five(1))
    assert record.known_as == ("coco:41",)
    assert record.image == tmp_path / "coco" / "val2014" / "COCO_1.jpg"
    (tmp_path / "coco" / "val2014" / "COCO_2.jpg").unlink()
    with pytest.raises(DataError, match="1 of 1 picture files are missing"):
        load("coco_karpathy", tmp_path, "test")


def test_a_row_for_every_caption(tmp_path):
    rows = [
        {"image": {"bytes": jpeg(n), "path": None}, "filepath": "train2014", "filename": f"{n}.jpg", "split": "restval",
         "sentids": [10 * n, 10 * n + 1], "sentences": {"raw": f"caption {k} of {n}", "sentid": 10 * n + k}}
        for k in (0, 1) for n in (1, 2)
    ]  # fmt: skip
    parquet(tmp_path / "coco" / "train.parquet", rows)
    records = load("coco_karpathy", tmp_path, "restval")
    assert [r.captions for r in records] == [
        ("caption 0 of 1", "caption 1 of 1"),
        ("caption 0 of 2", "caption 1 of 2"),
    ]


OTHER = {
    "numbered": lambda n: {f"caption_{k}": said for k, said in enumerate(five(n))},
    "structs of lists": lambda n: {"sentences": {"raw": five(n), "sentid": [5 * n + k for k in range(5)]}},
    "texts": lambda n: {"captions": five(n)},
    "raw": lambda n: {"sentences_raw": five(n), "sentences_sentid": [5 * n + k for k in range(5)]},
}


@pytest.mark.parametrize("columns", OTHER)
@pytest.mark.parametrize("image", ["bytes", "struct"])
def test_other_columns(tmp_path, columns, image):
    """Without a name an image is called by its bytes."""
    rows = [
        {"image": jpeg(n) if image == "bytes" else {"bytes": jpeg(n), "path": None}, **OTHER[columns](n)}
        for n in range(3)
    ]
    parquet(tmp_path / "flickr8k" / "dev" / "0000.parquet", rows)
    records = load("flickr8k", tmp_path, "val")
    assert [r.captions for r in records] == [tuple(five(n)) for n in range(3)]
    assert [r.image.read_bytes() for r in records] == [jpeg(n) for n in range(3)]


def test_an_unpacking_that_was_stopped_is_begun_again(tmp_path):
    rows = [inside(number, split) for number, split in enumerate(SPLITS)]
    parquet(tmp_path / "flickr30k" / "a.parquet", rows)
    images = tmp_path / "flickr30k" / "images"
    images.mkdir()
    (images / "0.jpg").write_bytes(jpeg(0)[:20])
    records = load("flickr30k", tmp_path, "train")
    assert records[0].image.read_bytes() == jpeg(0)
    (tmp_path / "flickr30k" / "a.parquet").unlink()  # it is not needed any more
    assert load("flickr30k", tmp_path, "train") == records


WRONG = {
    "leads out": lambda rows: rows[1].update(filename="../x.jpg"),
    "row 1: is of split": lambda rows: rows[1].update(split="held out"),
    "row 1: 0.jpg is of val, and above of train": lambda rows: rows[1].update(filename="0.jpg", split="val"),
    "row 0: has no captions; its columns are image, split": lambda rows: [row.pop("caption") for row in rows],
    "row 0: the field 'filename' is missing": lambda rows: [
        row.pop(name) for row in rows for name in ("filename", "image")
    ],
}


@pytest.mark.parametrize("said", WRONG)
def test_rows_that_are_wrong(tmp_path, said):
    rows = [inside(number, "train") for number in range(2)]
    WRONG[said](rows)
    path = parquet(tmp_path / "a.parquet", rows)
    with pytest.raises(DataError, match=said) as caught:
        unpack(tmp_path, tmp_path / "dataset.json", tmp_path / "images")
    assert caught.value.file == str(path)
    assert not (tmp_path / "dataset.json").exists()


def test_tables_that_are_something_else(tmp_path):
    path = tmp_path / "train.parquet"
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    with pytest.raises(DataError, match=r"train\.parquet: the table: cannot be read \(.*git lfs pull"):
        unpack(tmp_path, tmp_path / "d.json", tmp_path)
    path.write_bytes(parquet(tmp_path / "b.parquet", [inside(0, "train")]).read_bytes()[:-30])
    with pytest.raises(DataError, match=r"(train|b)\.parquet: the table: cannot be read"):
        unpack(tmp_path, tmp_path / "d.json", tmp_path)
    saved(tmp_path / "arrow", [inside(0, "train")])
    state = {
        "_data_files": [{"filename": "data-00000-of-00001.arrow"}],
        "_indices_data_files": [{"filename": "i.arrow"}],
    }
    (tmp_path / "arrow" / "state.json").write_text(json.dumps(state))
    with pytest.raises(DataError, match=r"state\.json: the indices: choose rows"):
        unpack(tmp_path / "arrow", tmp_path / "d.json", tmp_path)
