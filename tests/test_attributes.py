"""The embedded set's backbone: it learns attributes from the train split's boxes, the same for a seed."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from finematch.data import load
from finematch.data.record import DataError, Record
from finematch.encoders import Cells
from finematch.features.attribute_net import AttributeNet, BoxLabels, attribute_backbone
from finematch.features.backbones import fingerprint
from finematch.scenes.generator import attributes, generate
from finematch.scenes.language import TABLES
from finematch.training import Plan

NETWORK = {"name": "test_resnet", "stage": 1, "echo": None}
CLASSES = {name: list(values) for name, values in TABLES.items()}


def labelled(root: Path, split: str) -> tuple[list[Record], list[list[dict]]]:
    records = load("scenes", root, split)
    truth = {Path(t["filename"]).stem: t["objects"] for t in attributes(root / "scenes", split)}
    return records, [truth[r.image_id] for r in records]


@pytest.fixture(scope="module")
def sides(tmp_path_factory) -> dict:
    root = tmp_path_factory.mktemp("root")
    generate(root / "scenes", seed=0, train=320, val=60, test=1)
    return {split: labelled(root, split) for split in ("train", "val")}


def train(out: Path, sides: dict, **options):
    plan = Plan(
        **{
            "epochs": 4,
            "batch_size": 32,
            "lr": 2e-3,
            "weight_decay": 0.02,
            "warmup": 0.1,
            "seed": 0,
            **options,
        }
    )
    train, val = ((records, lambda made=labels: made) for records, labels in (sides["train"], sides["val"]))
    return attribute_backbone(out, train, val, CLASSES, plan, **NETWORK)


def log(out: Path) -> list[dict]:
    return [json.loads(line) for line in next(out.glob("attribute_net-*/log.jsonl")).open()]


@pytest.fixture(scope="module")
def run(sides, tmp_path_factory):
    out = tmp_path_factory.mktemp("attributes")
    return train(out, sides), out


def test_it_learns(run, sides):
    backbone, out = run
    lines = log(out)
    losses = [line["loss"] for line in lines]
    assert all(later < earlier for earlier, later in pairwise(losses))
    assert set(lines[0]) >= {f"{name}_loss" for name in CLASSES} | {f"val_{name}" for name in CLASSES}
    colours = [thing["colour"] for row in sides["val"][1] for thing in row]
    commonest = max(colours.count(c) for c in set(colours)) / len(colours)
    assert max(line["val_colour"] for line in lines) > commonest + 0.3
    assert backbone([r.open() for r in sides["val"][0][:2]]).shape[0] == 2
    assert not any(p.requires_grad for p in backbone.net.parameters())


def test_its_key_is_the_hash_of_its_weights_and_the_same_for_a_seed(sides, tmp_path):
    made = [train(tmp_path / str(i), sides, epochs=1, seed=seed) for i, seed in enumerate((3, 3, 4))]
    digests = [b.key["weights"] for b in made]
    assert digests[0] == digests[1] != digests[2]
    assert digests[0] == fingerprint(made[0].net)
    assert made[0].key["trained_on"] == "attributes of the train split"


def test_a_finished_run_is_reused(run, sides):
    backbone, out = run
    (kept,) = out.glob("attribute_net-*/cells.safetensors")
    stamp = kept.stat().st_mtime_ns
    assert train(out, sides).key == backbone.key
    assert kept.stat().st_mtime_ns == stamp


def test_other_labels_or_pictures_train_another_network(run, sides, tmp_path):
    """And one flipped bit of the weights is noticed."""
    backbone, _ = run
    records, labels = sides["train"]
    other = [[{**thing, "colour": "red"} for thing in row] for row in labels]
    asked = train(tmp_path, {**sides, "train": (records, other)}, epochs=1)
    same = train(tmp_path, sides, epochs=1)
    assert len(list(tmp_path.glob("attribute_net-*"))) == 2
    assert asked.key["weights"] != same.key["weights"] != backbone.key["weights"]
    for path in tmp_path.glob("attribute_net-*/cells.safetensors"):
        data = bytearray(path.read_bytes())
        data[-1] ^= 1
        path.write_bytes(data)
    with pytest.raises(DataError, match=r"cells\.safetensors: attribute_net: is damaged"):
        train(tmp_path, sides, epochs=1)


def things(tmp_path) -> tuple[list[Record], list[list[dict]]]:
    """Two pictures of 40 x 20, one labelled box and two."""
    records = []
    for i in range(2):
        Image.fromarray(np.full((20, 40, 3), 50 * i, np.uint8)).save(tmp_path / f"{i}.png")
        records.append(Record(str(i), "train", ("x",), image=tmp_path / f"{i}.png"))
    red, blue = {"box": [0, 0, 8, 16], "colour": "red"}, {"box": [32, 4, 40, 20], "colour": "blue"}
    return records, [[red], [blue, red]]


def test_box_labels(tmp_path):
    batch = BoxLabels(*things(tmp_path), {"colour": ["blue", "red"]}, jitter=False).__getitems__([1, 0])
    assert batch["pixels"].shape == (2, 3, 20, 40)
    assert batch["pixels"][0, 0, 0, 0] == pytest.approx(50 / 255)
    assert batch["sizes"].tolist() == [[40, 20], [40, 20]]
    assert batch["real"].tolist() == [[True, True], [True, False]]
    assert batch["boxes"][0].tolist() == [[32, 4, 40, 20], [0, 0, 8, 16]]
    assert batch["colour"][batch["real"]].tolist() == [0, 1, 1]


def test_jitter_is_small_stays_inside_and_is_the_same_every_time(tmp_path):
    given = things(tmp_path), {"colour": ["blue", "red"]}
    plain, one, two = (BoxLabels(*given[0], given[1], jitter=j) for j in (False, True, True))
    assert torch.equal(one.boxes, two.boxes)
    moved = (one.boxes - plain.boxes)[plain.real].abs()
    assert moved.max() > 0
    assert (moved <= torch.tensor([1, 2, 1, 2])).all()  # an eighth of 8 x 16
    assert one.boxes.min() >= 0
    assert one.boxes[..., 2].max() <= 40
    assert one.boxes[..., 3].max() <= 20


def test_padding_boxes_do_not_enter_the_loss(tmp_path):
    data = BoxLabels(*things(tmp_path), {"colour": ["blue", "red"]}, jitter=False)
    torch.manual_seed(0)
    net = AttributeNet(Cells("test_resnet", stage=1), {"colour": 2}).eval()
    both = net(data.__getitems__([0, 1]))
    data.labels["colour"][0, 1] = 1 - data.labels["colour"][0, 1]
    data.boxes[0, 1] = torch.tensor([3.0, 3.0, 30.0, 17.0])
    changed = net(data.__getitems__([0, 1]))
    assert both["loss"] == changed["loss"] == both["colour_loss"]
    alone = [net(data.__getitems__([i]))["loss"].item() for i in (0, 1)]
    assert both["loss"].item() == pytest.approx((alone[0] + 2 * alone[1]) / 3, rel=1e-4)
