"""SCAN's region features: pairing rules, mapping without reading, the resumable writer."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from formats import five, precomp

from finematch.data import DataError, Record, load_regions
from finematch.data.precomp import write_layout
from finematch.features.blockwise import write_rows
from finematch.features.inputs import first_images

META = {"backbone": "tiny", "weights": "abc", "proposals": "grid"}


def features(n: int, r: int = 3, d: int = 4, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(n, r, d)).astype(np.float32)


def captions(n: int) -> list[str]:
    return [text for k in range(n) for text in five(k)]


def records(n: int, counts: list[int] | None = None) -> list[Record]:
    counts = counts or [5] * n
    return [Record(f"p{k}", "train", tuple(f"{k} caption\n{c}" for c in range(counts[k]))) for k in range(n)]


def blocks(n: int, r: int = 3, d: int = 4) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    boxes = np.tile(np.array([1, 2, 9, 8], np.float32), (n, r, 1))
    return features(n, r, d), boxes, np.tile(np.array([32, 24]), (n, 1))


def test_train_stores_a_picture_once(tmp_path):
    array = features(4)
    got = load_regions(precomp(tmp_path, "train", array, captions(4), ["a", "b", "c", "d"]), "train")
    np.testing.assert_array_equal(got.features, array)
    assert got.captions == captions(4)
    assert got.image_of.tolist() == [k for k in range(4) for _ in range(5)]
    assert got.ids == ["a", "b", "c", "d"]
    assert (got.boxes, got.sizes, got.meta, len(got)) == (None, None, {}, 4)


@pytest.mark.parametrize("ids", [["a", "b"], [i for i in "ab" for _ in range(5)], None])
def test_dev_stores_a_picture_five_times_and_gives_a_view_of_it(tmp_path, ids):
    array = features(2)
    got = load_regions(precomp(tmp_path, "dev", np.repeat(array, 5, axis=0), captions(2), ids), "dev")
    np.testing.assert_array_equal(got.features, array)
    assert isinstance(got.features, np.memmap)
    assert got.features.strides[0] == 5 * array.strides[0]
    assert got.image_of.tolist() == [0] * 5 + [1] * 5
    assert got.ids == (["a", "b"] if ids else ["0", "5"])


def test_rows_that_should_repeat_and_do_not(tmp_path):
    with pytest.raises(DataError, match=r"test_ims\.npy: rows 0 to 4: .*not one picture"):
        load_regions(precomp(tmp_path, "test", features(10), captions(2)), "test")


@pytest.mark.parametrize(("rows", "n_captions"), [(2, 9), (2, 11), (3, 10), (6, 6), (10, 9), (10, 11)])
def test_other_proportions_are_refused_with_both_counts(tmp_path, rows, n_captions):
    folder = precomp(tmp_path, "dev", features(rows), captions(3)[:n_captions])
    with pytest.raises(
        DataError, match=rf"dev_caps\.txt has {n_captions} captions and .*dev_ims\.npy has {rows} rows"
    ):
        load_regions(folder, "dev")


def test_dev_cut_to_the_first_captions(tmp_path):
    folder = precomp(
        tmp_path, "dev", np.repeat(features(4), 5, axis=0), captions(4), list("aabbccddeeffgghhiijj")
    )
    np.save(folder / "dev_sizes.npy", np.repeat(np.arange(1, 9).reshape(4, 2), 5, axis=0))
    whole = load_regions(folder, "dev")
    got = first_images(whole, 3)
    assert (len(got.captions), len(got.features), len(got.ids), len(got.image_of)) == (15, 3, 3, 15)
    assert got.sizes.tolist() == [[1, 2], [3, 4], [5, 6]]
    assert len(whole.captions) == len(first_images(whole, 1000).captions) == 20


def test_other_counts_of_captions_are_stated(tmp_path):
    folder = precomp(tmp_path, "val", features(3), [f"c{k}" for k in range(6)])
    (folder / "val_meta.json").write_text(json.dumps({"captions_per_image": [3, 1, 2]}))
    assert load_regions(folder, "val").image_of.tolist() == [0, 0, 0, 1, 2, 2]
    (folder / "val_meta.json").write_text(json.dumps({"captions_per_image": 2}))
    assert load_regions(folder, "val").image_of.tolist() == [0, 0, 1, 1, 2, 2]
    np.save(folder / "val_image_of.npy", np.array([2, 0, 1, 1, 0, 0]))
    assert load_regions(folder, "val").image_of.tolist() == [2, 0, 1, 1, 0, 0]


@pytest.mark.parametrize("stated", [[3, 1, 1], [6, 0, 0], [1, 5], 5])
def test_stated_counts_that_do_not_fit(tmp_path, stated):
    folder = precomp(tmp_path, "val", features(3), [f"c{k}" for k in range(6)])
    (folder / "val_meta.json").write_text(json.dumps({"captions_per_image": stated}))
    with pytest.raises(DataError, match=r"6 captions .* 3 rows|val_meta\.json: `captions_per_image`"):
        load_regions(folder, "val")


@pytest.mark.parametrize("name", ["boxes", "sizes"])
def test_arrays_beside_with_other_lengths(tmp_path, name):
    folder = precomp(tmp_path, "train", features(2), captions(2))
    np.save(folder / f"train_{name}.npy", np.zeros((3, 3, 4)))
    with pytest.raises(DataError, match=rf"train_{name}\.npy: 3 rows: .*train_ims\.npy has 2"):
        load_regions(folder, "train")


def test_ids_of_another_length(tmp_path):
    with pytest.raises(DataError, match=r"train_ids\.txt: 3 ids: for 2 pictures"):
        load_regions(precomp(tmp_path, "train", features(2), captions(2), list("abc")), "train")


@pytest.mark.parametrize("quote", ["'", '"'])
def test_captions_printed_as_bytes_are_refused(tmp_path, quote):
    texts = captions(2)
    texts[6] = f"b{quote}A dog runs .{quote}"
    with pytest.raises(DataError, match=r"train_caps\.txt: line 7: .*printed bytes object.*decoded text"):
        load_regions(precomp(tmp_path, "train", features(2), texts), "train")


def test_captions_are_text_and_only_a_line_feed_ends_one(tmp_path):
    texts = captions(1)
    texts[1], texts[2] = "un café\u2028noir", "b for 'ball'"
    got = load_regions(precomp(tmp_path, "train", features(1), texts), "train")
    assert got.captions == texts
    (tmp_path / "train_caps.txt").write_bytes("\n".join(texts).encode().replace(b"\n", b"\r\n"))
    assert load_regions(tmp_path, "train").captions == texts


def test_captions_that_are_not_utf8(tmp_path):
    folder = precomp(tmp_path, "train", features(1), captions(1))
    (folder / "train_caps.txt").write_bytes("a\nb\ncafé\nd\ne\n".encode("latin-1"))
    with pytest.raises(DataError, match=r"train_caps\.txt: line 3: is not UTF-8"):
        load_regions(folder, "train")


def test_feature_files_that_are_no_feature_files(tmp_path):
    folder = precomp(tmp_path, "train", features(2), captions(2))
    whole = (folder / "train_ims.npy").read_bytes()
    (folder / "train_ims.npy").write_bytes(whole[:-8])
    with pytest.raises(DataError, match=r"train_ims\.npy: the array: cannot be mapped"):
        load_regions(folder, "train")
    np.save(folder / "train_ims.npy", np.zeros((2, 4), np.float32))
    with pytest.raises(DataError, match=r"train_ims\.npy: array \(2, 4\)"):
        load_regions(folder, "train")


MEASURE = """
import os, sys
import psutil
from finematch.data import load_regions
before = psutil.Process().memory_info().rss
regions = load_regions(sys.argv[1], sys.argv[2])
total = sum(float(regions.features[k].sum()) for k in (0, 11, len(regions) - 1))
print(len(regions), total, psutil.Process().memory_info().rss - before)
"""


@pytest.mark.parametrize(("split", "pictures"), [("train", 7000), ("dev", 1400)])
def test_two_gigabytes_are_not_read(tmp_path, split, pictures):
    """A sparse file of 7,000 rows of 36 x 2048 (2 GB), opened and read in three places in its own process."""
    path = tmp_path / f"{split}_ims.npy"
    header = {"descr": "<f4", "fortran_order": False, "shape": (7000, 36, 2048)}
    with path.open("wb") as file:
        np.lib.format.write_array_header_2_0(file, header)
        file.truncate(file.tell() + 7000 * 36 * 2048 * 4)
    assert path.stat().st_size > 2e9
    (tmp_path / f"{split}_caps.txt").write_text("a caption\n" * (5 * pictures))
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, tmp_path, split], capture_output=True, text=True, check=True
    )
    count, total, grown = done.stdout.split()
    assert (int(count), float(total)) == (pictures, 0.0)
    assert int(grown) < 100e6


def write(folder, n: int, *, stop: int = 100, block: int = 2, counts: list[int] | None = None) -> None:
    """A split written in blocks; KeyboardInterrupt where item `stop` would be made."""
    arrays = dict(zip(("ims", "boxes", "sizes"), blocks(n), strict=True))

    def make(items: range) -> dict[str, np.ndarray]:
        if stop in items:
            raise KeyboardInterrupt
        return {f"train_{name}": array[items.start : items.stop] for name, array in arrays.items()}

    folder.mkdir(exist_ok=True)
    write_rows(folder, np.arange(n + 1), make, [f"p{k}" for k in range(n)], block=block)
    write_layout(folder, "train", records(n, counts), META)


def test_written_and_read_back(tmp_path):
    write(tmp_path, 6, counts=[5, 1, 2, 3, 4, 7])
    got = load_regions(tmp_path, "train")
    for found, expected in zip((got.features, got.boxes, got.sizes), blocks(6), strict=True):
        np.testing.assert_array_equal(found, expected)
    assert got.ids == [f"p{k}" for k in range(6)]
    assert got.captions[:6] == [
        "0 caption 0",
        "0 caption 1",
        "0 caption 2",
        "0 caption 3",
        "0 caption 4",
        "1 caption 0",
    ]
    assert np.bincount(got.image_of).tolist() == [5, 1, 2, 3, 4, 7]
    assert {key: got.meta[key] for key in META} == META
    assert got.meta["finematch"]
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        f"train_{name}" for name in ("boxes.npy", "caps.txt", "ids.txt", "ims.npy", "meta.json", "sizes.npy")
    ]
    third = got.records()[2]
    assert (third.image_id, third.captions, third.size) == ("p2", ("2 caption 0", "2 caption 1"), (32, 24))


def test_five_captions_each_is_plain_scan_layout(tmp_path):
    write(tmp_path, 4)
    (tmp_path / "train_meta.json").unlink()
    assert load_regions(tmp_path, "train").image_of.tolist() == [k for k in range(4) for _ in range(5)]


def test_a_killed_writer_goes_on_where_it_was(tmp_path):
    script = """
import os, signal, sys
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from test_data_precomp import write
try:
    write(Path(sys.argv[1]), 6, stop=4)
except KeyboardInterrupt:
    os.kill(os.getpid(), signal.SIGKILL)
"""
    killed = subprocess.run([sys.executable, "-c", script, tmp_path, Path(__file__).parent])
    assert killed.returncode == -9
    with pytest.raises(DataError, match="cannot be read"):
        load_regions(tmp_path, "train")
    write(tmp_path, 6, stop=3)  # the first four are not made again
    np.testing.assert_array_equal(load_regions(tmp_path, "train").features, blocks(6)[0])


@pytest.mark.parametrize("gone", ["progress.json", "train_boxes.npy"])
def test_without_its_note_or_an_array_a_writer_starts_over(tmp_path, gone):
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path, 6, stop=4)
    (tmp_path / gone).unlink()
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path, 6, stop=0)
    write(tmp_path, 6)
    np.testing.assert_array_equal(load_regions(tmp_path, "train").boxes, blocks(6)[1])


def test_values_that_are_not_finite_name_the_picture(tmp_path):
    array, boxes, sizes = blocks(4)
    for name, place, bad, dtype in (
        ("ims", 3, np.nan, "float16"),
        ("ims", 3, 1e5, "float16"),
        ("boxes", 2, np.inf, "float32"),
    ):
        wrong = {"ims": array.copy(), "boxes": boxes.copy(), "sizes": sizes}
        wrong[name][place, 2, 0] = bad

        def make(items: range, wrong=wrong) -> dict[str, np.ndarray]:
            part = {f"train_{k}": v[items.start : items.stop] for k, v in wrong.items()}
            return part | {"train_ims": part["train_ims"].astype(np.float16)}

        said = []
        with pytest.raises(
            DataError, match=rf"train_{name}\.npy: item '{'abcd'[place]}': .* not finite in {dtype}"
        ):
            write_rows(tmp_path, np.arange(5), make, "abcd", block=2, echo=said.append)
        assert json.loads((tmp_path / "progress.json").read_text())["done"] == 2


def test_a_disk_that_is_too_small_fails_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    write(tmp_path / "a", 10)
    with pytest.raises(DataError, match="needs 4,800 bytes, 1,000 are free"):
        write(tmp_path / "b", 100)
    assert not list((tmp_path / "b").glob("train_ims.npy"))
