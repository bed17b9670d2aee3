"""Boxes of a detector from files in COCO's results format: read, refused, and used as proposals and regions."""

from __future__ import annotations

import json
import os
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from finematch import tables
from finematch.data import load
from finematch.data.record import DataError, Record
from finematch.features import regions
from finematch.features.backbones import timm_backbone
from finematch.features.detections import Detections, is_detections
from finematch.features.detreg import open_proposals
from finematch.features.proposals import extract_proposals
from finematch.grids import BOXES as NAMED
from finematch.grids import Grid, mismatches
from finematch.runs import LABELS, labels_of

W, H = 40, 30


def entry(image_id, bbox, score=0.5, category_id=1) -> dict:
    return {"image_id": image_id, "category_id": category_id, "bbox": bbox, "score": score}


def write(path: Path, entries) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(entries if isinstance(entries, str) else json.dumps(entries))
    return path


@pytest.fixture
def records(tmp_path) -> list[Record]:
    """Four images 139 to 142, in the folder coco/val2017."""
    folder, made = tmp_path / "coco" / "val2017", []
    folder.mkdir(parents=True)
    for i in range(139, 143):
        file = folder / f"{i:012}.png"
        Image.new("RGB", (W, H), (i, 0, 0)).save(file)
        made.append(Record(str(i), "val", ("a cat",), file))
    return made


BOXES = [
    entry(139, [20, 10, 10, 10], 0.2), entry(139, [1.5, 2, 20, 9], 0.9), entry(139, [20, 10, 10, 10], 0.7, 5),
    entry(139, [-4, 5, 20, 20], 0.4), entry(140, [0, 0, W, H], 0.3), entry(141, [3, 3, 20, 9.5], 0.6),
]  # fmt: skip


def test_boxes_are_xyxy_clamped_the_best_first_and_once(records, tmp_path):
    found = Detections(write(tmp_path / "b.json", BOXES))
    boxes, scores = found.of(records[0], (W, H))
    np.testing.assert_allclose(boxes, [[1.5, 2, 21.5, 11], [20, 10, 30, 20], [0, 5, 16, 25]])
    np.testing.assert_allclose(scores, [0.9, 0.7, 0.4])
    assert found.of(records[3], (W, H))[0].shape == (0, 4)
    assert found.check(records, "val") == 1


@pytest.mark.parametrize("name", [lambda r: int(r.image_id), lambda r: r.image_id, lambda r: r.image.name,
                                  lambda r: r.image.stem])  # fmt: skip
def test_an_image_is_known_by_its_id_its_file_or_its_stem(records, tmp_path, name):
    found = Detections(write(tmp_path / "b.json", [entry(name(records[1]), [1, 2, 3, 4])]))
    assert found.of(records[1], (W, H))[0].tolist() == [[1, 2, 4, 6]]


def test_a_folder_has_a_file_for_each_split_or_dataset(records, tmp_path):
    boxes = tmp_path / "boxes"
    write(boxes / "coco_train2017.json", BOXES[:4])
    write(boxes / "coco_val2017.json", BOXES[4:])
    apart, whole = Detections(boxes), Detections(write(tmp_path / "all.json", BOXES))
    for record in records:
        np.testing.assert_array_equal(apart.of(record, (W, H))[0], whole.of(record, (W, H))[0])
    other = [entry(140, [7, 7, 3, 3])]  # the same id elsewhere: the file of the image's own folder counts
    write(boxes / "other.json", other)
    assert Detections(boxes).of(records[1], (W, H))[0].tolist() == [[0, 0, W, H]]
    (boxes / "coco_val2017.json").rename(boxes / "another.json")
    with pytest.raises(DataError, match=r"image 140: has boxes in another\.json, other\.json.*name it after"):
        Detections(boxes).of(records[1], (W, H))


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ("[{", r"b\.json: the file: cannot be read as JSON"),
        ({"annotations": []}, r"holds COCO's annotations.*COCO's results format"),
        ([], "lists no box"),
        ([BOXES[0], {"image_id": 1, "bbox": [1, 2, 3, 4]}], r"entry 1: is \{'image_id': 1.*KeyError"),
        ([entry(139, [1, 2, 3])], r"entry 0: is .*four numbers"),
        ([BOXES[0], entry(139, [1, 2, 3, "4"]), entry(None, 1)], "entry 1: is"),
        ([entry([1], [1, 2, 3, 4])], "entry 0: is .*image_id"),
        ('[{"image_id": 7, "bbox": [1, 2, 3, 4], "score": NaN}]', r"entry 0 \(image 7\): has a score .* not finite"),
        ([entry(7, [1, 2, 3, float("inf")])], "not finite"),
        ([BOXES[0], entry(139, [20, 10, -10, 5])], r"entry 1 \(image 139\): has a bbox without width or height"),
    ],
)  # fmt: skip
def test_bad_files_are_refused(tmp_path, entries, message):
    with pytest.raises(DataError, match=message):
        Detections(write(tmp_path / "b.json", entries))


def test_other_boxes_than_those_of_the_images_are_refused(records, tmp_path):
    far = Detections(
        write(tmp_path / "b.json", [BOXES[1], entry(139, [30, 20, 38, 29])])
    )  # corners, not sides
    stated = r"entry 1 \(image 139\): bbox \[30\.0, 20\.0, 38\.0, 29\.0\] lies mostly outside the 40 x 30 image\. Give"
    with pytest.raises(DataError, match=stated):
        far.of(records[0], (W, H))
    strange = Detections(write(tmp_path / "b.json", [entry("dog.jpg", [1, 2, 3, 4])]))
    with pytest.raises(DataError, match=r"split val: has no box of any of 4 images; its first image_id is 'dog\.jpg', "
                                        r"the split's '139' \(000000000139\.png\)"):  # fmt: skip
        strange.check(records, "val")
    for gone in (tmp_path / "gone.json", tmp_path / "coco"):
        with pytest.raises(DataError, match=r"there is no such file.*proposals=auto"):
            Detections(gone)


def test_proposals_of_a_file_are_padded_and_found_by_their_content(records, tmp_path):
    file, said = write(tmp_path / "b.json", BOXES), []
    opened = open_proposals(str(file))
    made = extract_proposals(records, opened, tmp_path / "p", "val", top=2, min_side=8, echo=said.append)
    assert made.mask.tolist() == [[True, True], [True, False], [True, False], [False, False]]
    np.testing.assert_allclose(made.boxes[0], [[1.5, 2, 21.5, 11], [20, 10, 30, 20]])
    assert made.meta["proposals"] == "detections"
    assert said[0] == "val: 1 of 4 images have no box in b.json"
    copied = Detections(write(tmp_path / "elsewhere.json", BOXES))
    assert copied.key == opened.key, "the content, not the path"
    changed = Detections(write(tmp_path / "b.json", [*BOXES[:-1], entry(141, [3, 3, 21, 9.5])]))
    assert changed.key != opened.key
    other = extract_proposals(records, changed, tmp_path / "p", "val", top=2, echo=None)
    assert other.key != made.key


def test_regions_of_a_file_are_filled_up_from_the_grid(records, tmp_path):
    network = timm_backbone("test_resnet", size=96)
    made = regions.extract(records, network, tmp_path / "r", "val", kind="regions", regions=3,
                           proposals=Detections(write(tmp_path / "b.json", BOXES)), echo=None)  # fmt: skip
    assert made.boxes.shape == (4, 3, 4)
    np.testing.assert_allclose(made.boxes[0, 0], [1.5, 2, 21.5, 11])
    np.testing.assert_allclose(made.boxes[2, 0], [3, 3, 23, 12.5])
    assert (made.boxes[..., 2:] > made.boxes[..., :2]).all(), "the rest are boxes of the grid, no padding"
    assert made.meta["proposals"] == "detections"
    assert {"boxes", "content"} <= made.meta.keys()
    with Image.open(records[0].image) as picture:
        expected = regions.pool_regions(network([picture.convert("RGB")]), torch.from_numpy(made.boxes[:1].copy()),
                                        torch.tensor([[W, H]]))  # fmt: skip
    np.testing.assert_allclose(made.features[0], expected[0].cpu().numpy(), atol=2e-3)


# ------------------------------------------------------------------------------------------ what a run says of them
def identity(by: str, **settings) -> dict:
    """As a run of FELGA records it; the ground-truth boxes of its gallery are `given`."""
    made = {"train_regions": {"proposals": {"proposals": by}}, "boxes": {"proposals": {"proposals": "given"}}}
    return {
        "method": "felga",
        "settings": {"features": "fenet", "scale": "tiny"} | settings,
        "features": made,
    }


def test_a_run_is_labelled_by_what_proposed_its_regions():
    assert labels_of(identity("detections")) == ["supervised proposals"]
    assert labels_of(identity("selective_search")) == []
    assert labels_of(identity("selective_search", scale="paper")) == ["selective search"]
    assert labels_of(identity("detreg", scale="paper")) == []
    assert labels_of(identity("detections", features="whole")) == [], "the row reads no proposals"
    hslm = {"method": "hslm", "settings": {}, "features": {"train": [{"proposals": "detections"}]}}
    assert labels_of(hslm) == ["supervised proposals"]
    assert labels_of(hslm | {"features": "sha256"}) == []


def test_tables_mark_labelled_rows():
    grid = Grid(name="felga_x", paper="", table="", prefix="", title="", axis="", seeds=2, rows={"a": {}, "b": {}},
                names={"a": "Row A", "b": "Row B"}, columns={"mAP": "map"}, claims=())  # fmt: skip
    runs = pd.DataFrame({"row": ["a", "b"], "seed": [0, 0], "map": [1.0, 2.0], "run_status": ["current"] * 2,
                         "run_earlier": "",
                         "run_labels": ["", "supervised proposals"], "run_seconds": [1.0] * 2})  # fmt: skip
    shown = tables.page(grid, "coco", "tiny", {"default": runs})
    assert "Row B †" in shown
    assert "Row A †" not in shown
    assert f"* † supervised proposals: {LABELS['supervised proposals']}." in shown
    assert tables.beside(grid, runs)["status"].tolist() == ["current", "current; supervised proposals"]
    plain = tables.page(grid, "coco", "tiny", {"default": runs.assign(run_labels="")})
    assert "†" not in plain
    assert "status" not in plain


def test_boxes_of_the_command_line_do_not_make_a_row_stale(tmp_path):
    """`make grid PROPOSALS=<file>`: as DATA_ROOT it is for whoever runs; another method of proposing is another row."""
    grid = Grid(name="felga_x", paper="", table="", prefix="", title="", axis="", seeds=2, rows={"a": {}},
                names={"a": "A"}, columns={}, claims=())  # fmt: skip
    from finematch.config import Settings

    file = tmp_path / "coco.paper.a.s0" / "metrics.json"
    for proposals, stale in (("boxes/coco.json", False), ("boxes", False), ("auto", False), ("grid", True)):
        given = {"dataset": "coco", "scale": "paper", "proposals": proposals, "seed": 0}
        parameters = Settings("felga", given).as_dict()
        plain = {k: list(v) if isinstance(v, tuple) else v for k, v in parameters.items()}
        write(file, {"parameters": plain, "identity": {"x": 1}})
        assert bool(mismatches(grid, file)) == stale


def test_a_row_that_reads_boxes_is_not_a_run_without_them(tmp_path):
    grid = Grid(name="hslm_x", title="", axis="", seeds=2, names={}, columns={}, claims=(),
                rows={"a": {"proposals": NAMED}, "b": {"proposals": "grid"}})  # fmt: skip
    from finematch.config import Settings

    assert grid.boxes == ("a",)
    for row, proposals, stale in (("a", "boxes.json", False), ("a", "grid", True), ("a", "auto", True),
                                  ("b", "boxes.json", True), ("b", "grid", False)):  # fmt: skip
        given = {"dataset": "flickr8k", "scale": "tiny", "proposals": proposals, "seed": 0}
        parameters = Settings("hslm", given).as_dict()
        file = tmp_path / f"flickr8k.tiny.{row}.s0" / "metrics.json"
        write(file, {"parameters": parameters, "identity": {"x": 1}})
        assert bool(mismatches(grid, file)) == stale, (row, proposals)


def test_auto_at_scale_paper_is_detreg_or_says_what_stands_in(tmp_path):
    said: list[str] = []
    assert open_proposals("auto", echo=said.append) == "auto"
    assert open_proposals("auto", scale="paper", weights=tmp_path, echo=said.append) == "selective_search"
    assert said == [f"proposals=auto: there is no DETReg checkpoint {tmp_path / 'detreg.pth'}; selective search "
                    "stands in for it (F18)"]  # fmt: skip
    with pytest.raises(ValueError, match="proposals=given: name the file"):
        open_proposals("given")
    (tmp_path / "detreg.pth").write_bytes(b"no checkpoint")
    with pytest.raises(ValueError, match=r"detreg\.pth cannot be read as a checkpoint"):
        open_proposals("auto", scale="paper", weights=tmp_path)


# ------------------------------------------------------------------------------------------ real boxes
DATA = Path(os.environ.get("FINEMATCH_DATA", "/nonexistent"))
needs_boxes = pytest.mark.skipif(
    not (DATA / "detections").is_dir(), reason="boxes of the real photos are not here"
)


@needs_boxes
def test_real_boxes_of_every_dataset_lie_on_their_photos():
    """One folder serves all datasets, though two of them name different photos alike."""
    folder = DATA / "detections"
    assert is_detections(folder)
    started = time.process_time()
    found = Detections(folder)
    assert sum(len(one.boxes) for one in found.files.values()) > 200_000
    assert time.process_time() - started < 20, "28 MB are a matter of a second"
    for dataset, split in (("coco", "val"), ("flickr8k", "val"), ("flickr8k_entities", "val")):
        some = load(dataset, DATA, split)[:20]
        assert found.check(some, split) == 0
        for record in some:
            size = record.open().size
            boxes, scores = found.of(replace(record, size=None), size)
            assert 0 < len(boxes) <= 40
            assert (np.diff(scores) <= 0).all()
            assert (boxes[:, 2:] <= np.array(size) + 1e-3).all()


# ------------------------------------------------------------------------------------------ SLAN's level 0
def test_slan_takes_given_boxes_as_its_proposals(records, tmp_path, monkeypatch):
    """Boxes and scores reach the filter as they are in the file, and nothing trains them; padding is no region."""
    from finematch.data.pairs import BoxedSource, PixelSource, to_pixels
    from finematch.features import inputs
    from finematch.models.configs import LocatorConfig
    from finematch.models.slan.locator import SelfLocator
    from finematch.models.slan.objective import Boxed, pixels_or_maps

    monkeypatch.setattr(inputs, "root", lambda: tmp_path)
    write(tmp_path / "boxes.json", BOXES)
    pixels, said = {"train": PixelSource(records, to_pixels(16, (0.0,) * 3, (1.0,) * 3))}, []
    assert inputs.given_images({"train": records}, pixels, "", count=4) is pixels
    assert inputs.given_images({"train": records}, pixels, "weights.pth", count=4) is pixels
    images = inputs.given_images({"train": records}, pixels, "boxes.json", count=4, echo=said.append)
    assert said == ["train: 1 of 4 images have no box; the whole image is their proposal"]
    source = images["train"]
    assert isinstance(source, BoxedSource)
    assert labels_of({"method": "slan", "settings": {}, "features": inputs.origin(images)}) == [
        "supervised proposals"
    ]
    batch = source.batch([0, 3])
    torch.testing.assert_close(batch["given"][0, 0], torch.tensor([1.5 / W, 2 / H, 21.5 / W, 11 / H, 0.9]))
    assert batch["given"][0, 3].tolist() == [0] * 5
    assert batch["given"][1, :, 4].tolist() == [1, 0, 0, 0], "the whole image"
    seen = pixels_or_maps(**batch)
    assert isinstance(seen, Boxed)
    assert torch.equal(seen.seen, batch["pixels"])

    config = LocatorConfig(width=8, levels=1, decoder_levels=1, pyramid=8, count=4, heads=2, top=3, samples=2)
    locator = SelfLocator((6,), config)
    before = sum(1 for _ in locator.parameters())
    locator.take_given()
    assert sum(1 for _ in locator.parameters()) < before, "no proposals of its own"
    maps = [torch.randn(2, 6, 4, 4)]
    pictures = locator.prepare(maps, None, seen.given)
    assert pictures.valid.tolist() == [[True, True, False], [True, False, False]], "0.4 / 0.9 is below h"
    torch.testing.assert_close(pictures.boxes[0, :2], batch["given"][0, :2, :4])
    torch.testing.assert_close(pictures.boxes[1, 0], torch.tensor([0.0, 0, 1, 1]))
    torch.testing.assert_close(pictures.scores[0, :2], torch.tensor([1, 0.7 / 0.9]))
    with pytest.raises(ValueError, match="which has none of these images"):
        locator.prepare(maps)
    write(tmp_path / "boxes.json", [entry(139, [1, 2, 3, 4], 7.5)])
    with pytest.raises(DataError, match=r"image 139: a score is 7\.5"):
        inputs.given_images({"train": records}, pixels, "boxes.json", count=4)
