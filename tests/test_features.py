"""Frozen features: where cells and regions lie, proposals, resumable extraction, cached text states."""

from __future__ import annotations

import copy
import hashlib
import re
import resource
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import extract_target
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from transformers import BertModel

from finematch.boxes import multi_scale_grid
from finematch.data.record import DataError, Record
from finematch.encoders import BertTower, small_bert
from finematch.features import backbones, proposals, regions, texts
from finematch.files import entries
from finematch.text import tokenise, wordpiece


@pytest.fixture(scope="module")
def backbone() -> backbones.Backbone:
    return backbones.timm_backbone("test_resnet", size=96)


def noise(size: tuple[int, int], seed: int = 0) -> Image.Image:
    """A few flat rectangles: something that selective search finds, without a file."""
    rng = np.random.default_rng(seed)
    array = np.full((size[1], size[0], 3), 128, np.uint8)
    for _ in range(8):
        x, y = rng.integers(0, size[0] - 8), rng.integers(0, size[1] - 8)
        w, h = rng.integers(6, max(8, size[0] // 2)), rng.integers(6, max(8, size[1] // 2))
        array[y : y + h, x : x + w] = rng.integers(0, 256, 3)
    return Image.fromarray(array)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("pictures")
    for i in range(10):
        noise((60 + 7 * i, 50), i).save(folder / f"p{i}.png")
    return folder


def contents(folder: Path, *names: str) -> dict[str, bytes]:
    (entry,) = entries(folder)
    return {name: (entry.folder / f"all_{name}").read_bytes() for name in names}


ARRAYS = ("ims.npy", "boxes.npy", "sizes.npy", "caps.txt", "ids.txt", "meta.json")


# ------------------------------------------------------------------------------------------ backbones
def test_key_of_a_random_network_says_so_and_is_one_network():
    torch.manual_seed(1)
    a = backbones.timm_backbone("test_resnet")
    state = torch.get_rng_state()
    torch.manual_seed(2)
    b = backbones.timm_backbone("test_resnet")
    assert a.key == b.key
    assert a.key["weights"] == "random"
    assert (a.key["backbone"], a.key["size"]) == ("test_resnet", a.size)
    assert backbones.fingerprint(a.net) == backbones.fingerprint(b.net)
    torch.manual_seed(1)
    assert torch.equal(torch.get_rng_state(), state)  # the caller's random state is left alone
    assert not a.net.training
    assert not any(p.requires_grad for p in a.net.parameters())


def test_key_holds_the_hash_of_the_weights_file(tmp_path):
    path = tmp_path / "w.safetensors"
    state = backbones.timm_backbone("test_resnet").net.net.state_dict()
    save_file(state, path)
    one = backbones.timm_backbone("test_resnet", weights=path)
    assert one.key["weights"] == hashlib.sha256(path.read_bytes()).hexdigest()
    name = next(iter(state))
    save_file({**state, name: state[name] + 1}, path)
    two = backbones.timm_backbone("test_resnet", weights=path)
    assert two.key["weights"] == hashlib.sha256(path.read_bytes()).hexdigest() != one.key["weights"]
    assert backbones.fingerprint(one.net) != backbones.fingerprint(two.net)


def test_key_tells_what_else_changes_features():
    keys = [
        backbones.timm_backbone("test_resnet", **o).key
        for o in ({}, {"size": 64}, {"stage": 2}, {"mean": 0.5})
    ]
    assert all(a != b for i, a in enumerate(keys) for b in keys[:i])


def test_mobilenet_reads_as_its_weights_were_made(real_data):
    """Padding and range of the TensorFlow release: with others, the wrong classes light up."""
    net = backbones.mobilenet(real_data / "weights" / "mobilenetv2_100_tf_imagenet.safetensors")
    assert net.net.mean.flatten().tolist() == net.net.sd.flatten().tolist() == [0.5] * 3
    photo = next(iter(sorted((real_data / "flickr8k" / "images").glob("*.jpg"))))
    with Image.open(photo) as picture:
        got = net([picture.convert("RGB")])
    assert got.shape == (1, 1280, 7, 7)
    assert torch.isfinite(got).all()


# ------------------------------------------------------------------------------------------ cells
@pytest.mark.parametrize("name", ["test_resnet", "test_vit"])
@pytest.mark.parametrize("size", [(120, 60), (50, 110)])
def test_the_cell_whose_box_holds_a_patch_answers_it(tmp_path, name, size):
    """A bright patch at a known place of a picture that is not square: the cell there changes most."""
    net = backbones.timm_backbone(name, size=160)
    rows, cols = net([Image.new("RGB", size)]).shape[2:]
    width, height = size
    places = [(0, 0), (0, cols - 1), (rows - 1, 0), (rows - 1, cols - 1), (1, cols - 2), (rows // 2, 1)]
    records = []
    for i, place in enumerate([None, *places]):
        array = np.full((height, width, 3), 90, np.uint8)
        if place is not None:
            y1, y2 = (round(height * (place[0] + k) / rows) for k in (0, 1))
            x1, x2 = (round(width * (place[1] + k) / cols) for k in (0, 1))
            array[y1:y2, x1:x2] = np.random.default_rng(0).integers(0, 256, (y2 - y1, x2 - x1, 3))
        Image.fromarray(array).save(tmp_path / f"{i}.png")
        records.append(Record(str(i), "train", ("x",), image=tmp_path / f"{i}.png"))
    made = regions.extract(records, net, tmp_path / name, "train", echo=None)
    assert made.features.shape[:2] == (7, rows * cols)
    for i, (row, col) in enumerate(places, start=1):
        change = np.abs(made.features[i].astype(np.float32) - made.features[0]).sum(-1)
        x1, y1, x2, y2 = made.boxes[i, change.argmax()]
        centre = ((col + 0.5) * width / cols, (row + 0.5) * height / rows)
        assert x1 < centre[0] < x2, (row, col)
        assert y1 < centre[1] < y2, (row, col)


def test_cells_boxes_tile_each_picture(pictures, tmp_path, backbone):
    made = regions.extract(extract_target.records(pictures), backbone, tmp_path, "train", echo=None)
    assert made.sizes[3].tolist() == [81, 50]
    for (width, height), boxes in zip(made.sizes, made.boxes, strict=True):
        area = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
        assert area.sum() == pytest.approx(width * height, rel=1e-5)
        assert boxes.min() == 0
        assert boxes[:, 2].max() == width
        assert boxes[:, 3].max() == height
    assert made.captions[:2] == ["caption of p0", "caption of p1"]


def test_cells_equal_the_networks_own_map(pictures, tmp_path, backbone, monkeypatch):
    monkeypatch.setattr(regions, "BLOCK", 4)
    records = extract_target.records(pictures)
    made = regions.extract(records, backbone, tmp_path, "train", echo=None)
    assert made.features.dtype == np.float16
    one = backbone([records[5].open()])[0].flatten(1).T
    np.testing.assert_allclose(made.features[5], one.numpy(), rtol=2e-3, atol=2e-3)


# ------------------------------------------------------------------------------------------ regions
def test_pooling_aligned_boxes_against_a_naive_average():
    """On maps linear along each axis, RoI-align of whole cells is the mean over those cells. Not square."""
    b, h, w = 2, 4, 6
    sizes = torch.tensor([[120, 40], [30, 80]])  # width, height: a cell is 20 x 10 and 5 x 20 pixels
    y, x = torch.meshgrid(torch.arange(h).float(), torch.arange(w).float(), indexing="ij")
    maps = torch.stack([torch.stack([x, y, 2 * x - 3 * y]), torch.stack([x + 7, -y, x + y])])
    cells = torch.tensor([[1, 1, 5, 3], [2, 1, 4, 3], [1, 1, 3, 2]])  # x1 y1 x2 y2 in cells, off the border
    boxes = torch.stack([cells * (s / torch.tensor([w, h])).repeat(2) for s in sizes])
    got = regions.pool_regions(maps, boxes, sizes)
    assert got.shape == (b, 3, 3)
    for i in range(b):
        for j, (x1, y1, x2, y2) in enumerate(cells.tolist()):
            torch.testing.assert_close(got[i, j], maps[i, :, y1:y2, x1:x2].mean((1, 2)))


def test_pooling_a_constant_map_gives_the_constant():
    maps = torch.full((1, 5, 3, 7), 2.5)
    boxes = torch.tensor([[[0.0, 0.0, 64.0, 48.0], [3.3, 1.7, 4.1, 2.2], [50.0, 40.0, 64.0, 48.0]]])
    torch.testing.assert_close(
        regions.pool_regions(maps, boxes, torch.tensor([[64, 48]])), torch.full((1, 3, 5), 2.5)
    )


def test_pooling_does_not_swap_width_and_height():
    """The right half of a wide picture and the lower half of it, on a map that tells them apart."""
    maps = torch.zeros(1, 2, 8, 8)
    maps[0, 0, :, 4:], maps[0, 1, 4:] = 1, 1
    boxes = torch.tensor([[[100.0, 0.0, 200.0, 50.0], [0.0, 25.0, 200.0, 50.0], [0.0, 0.0, 90.0, 22.0]]])
    got = regions.pool_regions(maps, boxes, torch.tensor([[200, 50]]))[0]
    assert got[0, 0] > 0.9
    assert 0.4 < got[0, 1] < 0.6
    assert got[1, 1] > 0.9
    assert 0.4 < got[1, 0] < 0.6
    assert got[2].max() < 0.1


def test_regions_are_pooled_at_their_boxes(pictures, tmp_path, backbone):
    records = extract_target.records(pictures)
    made = regions.extract(
        records, backbone, tmp_path, "train", kind="regions", regions=5, proposals="grid", echo=None
    )
    assert made.features.shape[:2] == (10, 5)
    assert made.meta["proposals"] == "grid"
    picture = records[2].open()
    np.testing.assert_array_equal(made.boxes[2], multi_scale_grid(*picture.size, 5).numpy())
    boxes, size = torch.from_numpy(np.array(made.boxes[2:3])), torch.tensor([picture.size])
    one = regions.pool_regions(backbone([picture]), boxes, size)[0]
    np.testing.assert_allclose(made.features[2], one.numpy(), rtol=2e-3, atol=2e-3)


# ------------------------------------------------------------------------------------------ proposals
@pytest.mark.parametrize("size", [(100, 60), (33, 90), (8, 8)])
@pytest.mark.parametrize("top", [1, 7, 200])
def test_selective_search_gives_as_many_boxes_as_asked(size, top):
    picture = noise(size) if min(size) > 8 else Image.new("RGB", size, (9, 9, 9))
    boxes = proposals.selective_search(picture, top)
    assert boxes.shape == (top, 4)
    assert boxes.dtype == np.float32
    assert (boxes >= 0).all()
    assert (boxes[:, [0, 2]] <= size[0]).all()
    assert (boxes[:, [1, 3]] <= size[1]).all()
    assert (boxes[:, 2:] > boxes[:, :2]).all()


def test_selective_search_finds_a_thing():
    array = np.full((80, 120, 3), 60, np.uint8)
    array[20:60, 70:100] = (250, 30, 30)
    boxes = proposals.selective_search(Image.fromarray(array), 20)
    assert proposals.iou(torch.from_numpy(boxes), torch.tensor([[70.0, 20.0, 100.0, 60.0]])).max() > 0.85


def test_selective_search_looks_at_a_large_picture_in_small(monkeypatch):
    """The boxes are in pixels of the large one."""
    picture = noise((90, 60)).resize((360, 240))
    monkeypatch.setattr(proposals, "SEARCHED", 90 * 60)
    found = proposals.selective_search(picture, 12)
    expected = proposals.selective_search(picture.resize((90, 60)), 12)
    np.testing.assert_allclose(found, expected * 4, rtol=1e-6)


def test_boxes_of_large_pictures_have_the_size_of_their_search_in_their_key(tmp_path, monkeypatch):
    """Those of a set without a large picture have the key that they always had."""
    noise((90, 60)).save(tmp_path / "a.png")
    record = Record("a", "test", ("a caption",), tmp_path / "a.png")
    for records in ([record], [replace(record, size=(90, 60))]):
        assert proposals.searched(records) == {}
        before = proposals.extract_proposals(
            records, top=4, method="selective_search", cache=tmp_path, split="test"
        )
        assert "searched" not in before.meta
    monkeypatch.setattr(proposals, "SEARCHED", 90 * 60 - 1)
    for records in ([record], [replace(record, size=(90, 60))]):
        found = proposals.extract_proposals(
            records, top=4, method="selective_search", cache=tmp_path, split="test"
        )
        assert found.meta == before.meta | {"searched": 90 * 60 - 1}
    grid = proposals.extract_proposals([record], top=4, method="grid", cache=tmp_path, split="test")
    assert "searched" not in grid.meta


def test_selective_search_of_a_picture_does_not_depend_on_those_before_it():
    pictures = [noise((90, 70), seed) for seed in range(3)]
    first = [proposals.selective_search(p, 12) for p in pictures]
    again = [proposals.selective_search(p, 12) for p in reversed(pictures)][::-1]
    for a, b in zip(first, again, strict=True):
        np.testing.assert_array_equal(a, b)


def test_distinct_keeps_the_first_of_near_copies():
    boxes = np.array(
        [[0, 0, 10, 10], [0, 0, 10, 9.5], [20, 0, 30, 10], [0, 0, 10, 5], [20, 0, 30, 10]], np.float32
    )
    np.testing.assert_array_equal(proposals.distinct(boxes), boxes[[0, 2, 3]])
    np.testing.assert_array_equal(proposals.distinct(boxes, 0.4), boxes[[0, 2]])
    assert proposals.distinct(boxes[:0]).shape == (0, 4)


def test_proposals_by_name():
    assert proposals.propose("selective_search") == ("selective_search", proposals.selective_search)
    name, method = proposals.propose("grid")
    assert name == "grid"
    np.testing.assert_array_equal(method(Image.new("RGB", (40, 20)), 6), multi_scale_grid(40, 20, 6).numpy())
    with pytest.raises(ValueError, match=r"'edge_boxes'; use 'auto', 'selective_search' or 'grid'"):
        proposals.propose("edge_boxes")


def test_auto_says_which_it_took(monkeypatch):
    import cv2

    assert proposals.propose("auto")[0] == "selective_search"
    monkeypatch.delattr(cv2.ximgproc.segmentation, "createSelectiveSearchSegmentation")  # plain opencv
    assert proposals.propose("auto")[0] == "grid"
    with pytest.raises(ValueError, match="opencv-contrib"):
        proposals.propose("selective_search")


# ------------------------------------------------------------------------------------------ extraction
def test_killed_extraction_resumes_to_the_same_bytes(pictures, tmp_path):
    command = [sys.executable, extract_target.__file__, str(pictures), str(tmp_path / "killed")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    for line in process.stdout:
        if line == "block 6\n":
            process.send_signal(signal.SIGKILL)
            break
    assert process.wait() == -signal.SIGKILL
    assert not any(entry.whole for entry in entries(tmp_path / "killed"))
    said = []
    extract_target.run(pictures, tmp_path / "killed", said.append)
    extract_target.run(pictures, tmp_path / "whole")
    assert contents(tmp_path / "killed", *ARRAYS) == contents(tmp_path / "whole", *ARRAYS)
    (entry,) = entries(tmp_path / "killed")
    assert sorted(p.name for p in entry.folder.iterdir()) == sorted(
        ["entry.json", *(f"all_{name}" for name in ARRAYS)]
    )
    assert said == ["train: 10 of 10 pictures (selective_search)"]


def test_finished_features_are_reused_and_others_made_again(pictures, tmp_path, backbone):
    records = extract_target.records(pictures)

    def extract(**options) -> tuple[str, regions.Regions]:
        given, before = (
            (options.pop("records", records), options.pop("backbone", backbone)),
            len(entries(tmp_path)),
        )
        made = regions.extract(*given, tmp_path, "train", echo=None, **options)
        return ("made" if len(entries(tmp_path)) > before else "reused"), made

    assert [extract()[0] for _ in range(2)] == ["made", "reused"]
    other = backbones.Backbone(backbone.net, backbone.size, {**backbone.key, "weights": "others"})
    for change in ({"backbone": other}, {"records": records[:4]},
                   {"records": [replace(r, captions=("another",)) for r in records]},
                   {"kind": "regions", "regions": 3, "proposals": "grid"},
                   {"kind": "regions", "regions": 4, "proposals": "grid"}):  # fmt: skip
        what, made = extract(**dict(change))
        assert what == "made", change
        assert extract(**dict(change))[0] == "reused"
        assert len(made) == len(change.get("records", records))
        assert made.features.dtype == np.float16
        assert made.features.shape[1] == change.get("regions", 9)


@pytest.mark.parametrize("damage", ["text", "cut", "gone"])
def test_a_picture_that_cannot_be_read_is_named(tmp_path, backbone, damage, monkeypatch):
    monkeypatch.setattr(regions, "BLOCK", 2)
    for i in range(5):
        noise((64, 48), i).save(tmp_path / f"p{i}.png")
    bad = tmp_path / "p3.png"
    if damage == "gone":
        records = extract_target.records(tmp_path)
        bad.unlink()
    else:
        bad.write_bytes(b"no picture" if damage == "text" else bad.read_bytes()[:90])
        records = extract_target.records(tmp_path)
    with pytest.raises(DataError, match=r"p3\.png"):
        regions.extract(records, backbone, tmp_path / "out", "train", echo=None)
    assert not any(entry.whole for entry in entries(tmp_path / "out"))  # nothing half is taken for whole
    noise((64, 48), 3).save(bad)
    assert len(regions.extract(records, backbone, tmp_path / "out", "train", echo=None)) == 5


def test_other_pictures_of_the_same_names_have_features_of_their_own(tmp_path, backbone):
    """A fixed or resized copy, another folder, scenes of another seed; a mere copy is the same set."""
    made = {}
    for name, seeds in (("a", range(4)), ("copy", range(4)), ("b", range(4, 8))):
        (tmp_path / name).mkdir()
        for i, seed in enumerate(seeds):
            noise((64, 48), seed).save(tmp_path / name / f"p{i}.png")
        records = extract_target.records(tmp_path / name)
        made[name] = regions.extract(records, backbone, tmp_path / "cache", "train", echo=None)
        true = regions.extract(records, backbone, tmp_path / f"cache of {name}", "train", echo=None)
        np.testing.assert_array_equal(made[name].features, true.features)
    assert len(entries(tmp_path / "cache")) == 2
    assert not np.array_equal(made["a"].features, made["b"].features)
    assert made["a"].meta["content"] == made["copy"].meta["content"] != made["b"].meta["content"]


def test_other_weights_under_one_key_have_features_of_their_own(tmp_path, backbone, pictures):
    records = extract_target.records(pictures)
    other = backbones.Backbone(copy.deepcopy(backbone.net), backbone.size, backbone.key)
    with torch.no_grad():
        next(other.net.parameters()).mul_(1.1)
    one, two = (regions.extract(records, net, tmp_path, "train", echo=None) for net in (backbone, other))
    assert not np.array_equal(one.features, two.features)


@pytest.mark.parametrize("name", ["ims.npy", "boxes.npy", "ids.txt", "caps.txt", "meta.json"])
def test_damaged_features_are_named(tmp_path, backbone, pictures, name):
    records = extract_target.records(pictures)
    regions.extract(records, backbone, tmp_path, "train", echo=None)
    (path,) = tmp_path.glob(f"cells-*/all_{name}")
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(DataError, match=rf"all_{name}: cells: is damaged.*Remove"):
        regions.extract(records, backbone, tmp_path, "train", echo=None)
    path.write_bytes(data[:-1])
    with pytest.raises(DataError, match=rf"all_{name}: cells: has \d+ bytes, not \d+: it was cut off"):
        regions.extract(records, backbone, tmp_path, "train", echo=None)


@pytest.mark.parametrize("name", ["cells.json", "cells.safetensors"])
@pytest.mark.parametrize("share", [0.5, 0.0])
def test_a_saved_backbone_that_was_cut_off_is_named(tmp_path, backbone, name, share):
    backbones.save_backbone(backbone, tmp_path)
    opened = backbones.open_backbone(tmp_path)
    assert opened.key == backbone.key
    data = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(data[: int(len(data) * share)])
    with pytest.raises(DataError, match=re.escape(str(tmp_path / name))):
        backbones.open_backbone(tmp_path)


def test_features_have_their_space_before_they_are_written(tmp_path, backbone, pictures):
    """The kernel's limit of a file's size stands in for a full disk: an error, where a mapped file would kill."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    previous = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (2000, hard))
        with pytest.raises(DataError, match=r"ims\.npy: array .*cannot be written .*Free space"):
            regions.extract(extract_target.records(pictures), backbone, tmp_path, "train", echo=None)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, previous)


def test_extraction_refuses(tmp_path, backbone):
    with pytest.raises(ValueError, match="'patches'; use 'cells' or 'regions'"):
        regions.extract([], backbone, tmp_path, "train", kind="patches")
    with pytest.raises(DataError, match="no pictures"):
        regions.extract([], backbone, tmp_path, "train")


# ------------------------------------------------------------------------------------------ text states
WORDS = [
    "[PAD]",
    "[UNK]",
    "[CLS]",
    "[SEP]",
    "[MASK]",
    "a",
    "dog",
    "##s",
    "run",
    "##ning",
    "on",
    "the",
    "beach",
]
CAPTIONS = ["a dog", "the dogs running on the beach", "running", "a beach", "the dog on a beach"]


@pytest.fixture(scope="module")
def bert(tmp_path_factory) -> Path:
    """A tiny BERT with its tokenizer, as `save_pretrained` leaves them."""
    folder = tmp_path_factory.mktemp("bert")
    torch.manual_seed(0)
    BertModel(small_bert(len(WORDS), width=32, heads=2, positions=40)).save_pretrained(folder)
    (folder / "words.txt").write_text("\n".join(WORDS))
    wordpiece(folder / "words.txt").save_pretrained(folder)
    return folder


def states(folder, bert, captions=CAPTIONS, **options):
    options = {"key": "k", "block": 2, **options}
    return texts.text_states(captions, BertTower(bert), wordpiece(bert), folder, "val", **options)


def test_cached_states_equal_the_live_towers(tmp_path, bert):
    source = states(tmp_path, bert)
    tower, ragged = BertTower(bert).eval(), tokenise(CAPTIONS, wordpiece(bert))
    assert source.states.dtype == np.float16
    assert isinstance(source.states, np.memmap)
    for index in ([0, 1, 2, 3, 4], [4, 1], [2]):
        got, batch = source.batch(index), ragged.batch(index)
        with torch.no_grad():
            live = tower(**batch)
        assert torch.equal(got["mask"], batch["mask"])
        assert torch.equal(got["special"], batch["special"])
        torch.testing.assert_close(got["features"], live.states * live.mask[..., None], rtol=2e-3, atol=4e-3)


def test_states_are_made_once(tmp_path, bert):
    first = states(tmp_path, bert)
    (entry,) = entries(tmp_path)
    stamps = {p.name: p.stat().st_mtime_ns for p in entry.folder.iterdir()}
    again = states(tmp_path, bert)
    assert {p.name: p.stat().st_mtime_ns for p in entry.folder.iterdir()} == stamps
    np.testing.assert_array_equal(first.states, again.states)
    assert set(stamps) == {"entry.json", "index.npz", "states.npy"}


@pytest.mark.parametrize(
    "change", [{"captions": CAPTIONS[::-1]}, {"captions": CAPTIONS[:4]}, {"key": "other"}, {"max_length": 5}]
)
def test_other_captions_or_another_model_make_another_file(tmp_path, bert, change):
    first = states(tmp_path, bert)
    other = states(tmp_path, bert, **change)
    assert len(entries(tmp_path)) == 2
    assert len(other) == len(change.get("captions", CAPTIONS))
    np.testing.assert_array_equal(states(tmp_path, bert).states, first.states)


@pytest.mark.parametrize("when", ["in the states", "before the index"])
def test_interrupted_states_are_made_again(tmp_path, bert, monkeypatch, when):
    def stop(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(*((BertTower, "forward") if when == "in the states" else (np, "savez")), stop)
        with pytest.raises(KeyboardInterrupt):
            states(tmp_path, bert)
    assert not any(entry.whole for entry in entries(tmp_path))
    for left in tmp_path.glob("*.part/*.npy"):  # what lies there must not be taken for done
        np.save(left, np.zeros(np.load(left).shape, np.float16))
    after = states(tmp_path, bert)
    assert np.abs(after.states).sum(1).min() > 0
    assert not list(tmp_path.glob("*.part"))


def test_states_that_were_lost_or_damaged_are_named(tmp_path, bert):
    states(tmp_path, bert)
    (path,) = tmp_path.glob("text_states-*/states.npy")
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(DataError, match=r"states\.npy: text_states: is damaged.*Remove"):
        states(tmp_path, bert)
    path.unlink()
    with pytest.raises(DataError, match=r"states\.npy: text_states: is missing.*Remove"):
        states(tmp_path, bert)


def test_another_tokenizer_makes_another_file(tmp_path, bert):
    states(tmp_path, bert)
    tokenizer = wordpiece(bert)
    tokenizer.add_tokens(["dogs"])
    texts.text_states(CAPTIONS[:1], BertTower(bert), wordpiece(bert), tmp_path, "val", key="k")
    texts.text_states(CAPTIONS[:1], BertTower(bert), tokenizer, tmp_path, "val", key="k")
    assert len(entries(tmp_path)) == 3


def test_states_that_overflow_fp16_are_refused(tmp_path, bert):
    tower = BertTower(bert)
    with torch.no_grad():
        tower.net.encoder.layer[-1].output.LayerNorm.weight.mul_(1e6)
    with pytest.raises(ValueError, match=r"caption \d .*not finite in fp16"):
        texts.text_states(CAPTIONS, tower, wordpiece(bert), tmp_path, "val", key="k")
    assert not any(entry.whole for entry in entries(tmp_path))
