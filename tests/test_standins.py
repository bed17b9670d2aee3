"""Stand-ins: the loaders read the data, and what opens a published network opens the networks."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from finematch import standins
from finematch.data import load, load_regions, read_clips
from finematch.data.record import DataError, open_rgb
from finematch.encoders import BertTower
from finematch.features.detreg import DETReg
from finematch.features.fragments import open_vlp
from finematch.standins import DATASETS, bert_vocabulary, write_data, write_network
from finematch.text import tokenise, wordpiece

SIZE = (80, 64)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("standins")
    for dataset in DATASETS:
        if dataset != "coco2014":  # coco_karpathy's files of 2014
            write_data(dataset, folder, images=2, size=SIZE)
    return folder


@pytest.mark.parametrize(
    ("dataset", "splits"),
    [
        ("flickr8k", {"train": 2, "val": 2, "test": 2}),
        ("flickr30k", {"train": 2, "val": 2, "test": 2}),
        ("coco_karpathy", {"train": 2, "restval": 2, "trainrestval": 4, "val": 2, "test": 2}),
        ("coco", {"train": 2, "val": 2}),
        ("visual_genome", {"train": 2}),
    ],
)
def test_the_loaders_read_it(root, dataset, splits):
    for split, count in splits.items():
        records = load(dataset, root, split)
        assert len(records) == count
        assert len({record.image for record in records}) == count
        for record in records:
            assert open_rgb(record.image, record.source).size == SIZE
            assert len(record.captions) == 5 or dataset == "visual_genome"
            assert all(len(caption.split()) > 2 for caption in record.captions)
    if dataset == "coco":
        assert all(record.objects for record in records)
    if dataset == "visual_genome":
        assert all(phrase.boxes for record in records for phrase in record.phrases)


def test_the_tasks_have_images_and_answers(root):
    for split in ("train", "val"):
        questions = load("vqav2", root, split)
        assert len(questions) == 2
        assert all(len(set(question.answers)) == 2 for question in questions)  # one of ten has counted wrong
        assert all(question.open().size == SIZE for question in questions)
    for split in ("train", "val", "test"):
        pairs = load("nlvr2", root, split)
        assert [pair.label for pair in pairs] == [True, False] * 2
        for pair in pairs:
            left, right = map(np.asarray, pair.open())
            assert np.array_equal(left, right) == pair.label
    clips = load("msrvtt", root, "test")
    kept, frames, skipped = read_clips(clips, 4)
    assert (len(kept), skipped) == (2, [])
    assert not np.array_equal(*map(np.asarray, frames[0][:2]))


@pytest.mark.parametrize("dataset", ["flickr8k", "flickr30k"])
def test_entities_are_of_the_same_pictures_and_captions(root, dataset):
    for split in ("train", "val", "test"):
        ours, linked = load(dataset, root, split), load(f"{dataset}_entities", root, split)
        assert [(r.image_id, r.captions) for r in ours] == [(r.image_id, r.captions) for r in linked]
        boxes = [box for record in linked for phrase in record.phrases for box in phrase.boxes]
        assert boxes
        assert all(0 <= x1 < x2 <= SIZE[0] and 0 <= y1 < y2 <= SIZE[1] for x1, y1, x2, y2 in boxes)


@pytest.mark.parametrize(
    ("dataset", "name", "test"), [("flickr30k", "f30k", "test"), ("coco_karpathy", "coco", "testall")]
)
def test_region_features_are_of_the_same_captions(root, dataset, name, test):
    for split, file in (("train", "train"), ("val", "dev"), ("test", test)):
        regions = load_regions(root / f"{name}_precomp", file)
        assert regions.features.shape == (2, 36, 2048)
        assert regions.boxes is None
        assert regions.captions == [c for record in load(dataset, root, split) for c in record.captions]
    assert not np.array_equal(regions.features[0], regions.features[1])


def test_a_box_lies_on_its_object(root):
    """Set into a wider picture, an object is still where its box says: its middle is no grey margin."""
    for record in load("coco", root, "train"):
        pixels = np.asarray(open_rgb(record.image, record.source)).astype(int)
        for thing in record.objects:
            x1, y1, x2, y2 = (int(v) for v in thing.box)
            inside, frame = pixels[y1:y2, x1:x2], pixels[:, :4]
            assert np.abs(frame - 128).max() < 12
            assert np.abs(inside - 128).max() > 40


def test_it_is_written_once_and_never_over_anything(tmp_path):
    write_data("flickr30k", tmp_path, images=1, size=SIZE)
    file = tmp_path / "f30k_precomp" / "train_ims.npy"
    before = file.stat().st_mtime_ns
    write_data("flickr30k", tmp_path, images=1, size=SIZE)
    assert file.stat().st_mtime_ns == before
    with pytest.raises(DataError, match="there already"):
        write_data("flickr30k", tmp_path, images=2, size=SIZE)
    with pytest.raises(DataError, match="no stand-in"):
        write_data("msrvtt", tmp_path, images=1)


def test_its_words_are_berts_in_number_and_place(root):
    words = wordpiece(root / "vocab" / "bert-base-uncased-vocab.txt")
    assert len(words) == len(bert_vocabulary()) == 30522
    assert (words.pad_token_id, words.unk_token_id, words.cls_token_id, words.sep_token_id) == (
        0,
        100,
        101,
        102,
    )
    ids = words("Two zebras, striped like a red circle!")["input_ids"]
    assert words.unk_token_id not in ids


def test_towers_open_the_networks(tmp_path):
    bert = write_network("bert-base", tmp_path / "bert", tiny=True)
    assert BertTower(bert).width == 32
    again = (bert / "model.safetensors").stat().st_mtime_ns
    write_network("bert-base", tmp_path / "bert", tiny=True)
    assert (bert / "model.safetensors").stat().st_mtime_ns == again
    for kind, queries in (("clip-vit-b-32", 1), ("blip-itm-base", 1), ("blip2-itm-vit-g", 32)):
        folder = write_network(kind, tmp_path / kind, tiny=True)
        vlp = open_vlp(folder)
        assert vlp.queries == queries
        ids = tokenise(["a red circle", "two stars"], vlp.tokenizer).batch([0, 1])
        text = vlp.net.text(ids["input_ids"], ids["mask"].long())
        assert torch.isfinite(text).all()
        assert not torch.allclose(text[0], text[1])
    with pytest.raises(ValueError, match="no stand-in"):
        write_network("gpt", tmp_path / "gpt")
    with pytest.raises(ValueError, match="no tiny"):
        write_network("detreg-r50", tmp_path / "detreg", tiny=True)


def test_architectures_are_the_published_ones():
    """Numbers of parameters as published: only configurations are made, on no device."""
    with torch.device("meta"):
        clip, blip2 = standins._clip(32, False)[0], standins._blip2(False)[0]
    assert sum(p.numel() for p in clip.parameters()) == 151_277_313  # openai/clip-vit-base-patch32
    assert 1.16e9 < sum(p.numel() for p in blip2.parameters()) < 1.19e9


def test_detectors_open_the_checkpoints(tmp_path):
    path = write_network("detreg-r50", tmp_path / "detreg")
    boxes, scores = DETReg(path, shortest=64, longest=96)(Image.new("RGB", SIZE, (90, 120, 30)))
    assert boxes.shape == (300, 4)
    assert scores.shape == (300,)
