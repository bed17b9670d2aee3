"""The detector for SLAN's frozen proposals: its targets and losses against loops, its weights in the locator, and that
it finds things."""

from __future__ import annotations

import io
import itertools
import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn

from finematch import standins
from finematch.boxes import convert, iou
from finematch.checkpoints import TrainingError
from finematch.data import load, splits
from finematch.data.pairs import MapSource
from finematch.data.precomp import Regions
from finematch.data.record import DataError, Object, Record
from finematch.features.backbones import timm_backbone
from finematch.features.inputs import boxed_images, frozen_network, labelled_images, map_images, pixel_images
from finematch.models.configs import LocatorConfig
from finematch.models.slan.detector import (
    PLAN,
    BoxedImages,
    Detector,
    recall,
    rpn_targets,
    set_loss,
    train_detector,
    untaught,
)
from finematch.models.slan.locator import SelfLocator
from finematch.models.slan.proposals import Proposals, cut, decode, load_proposals
from finematch.models.slan.towers import CachedStages, pixel_stages
from finematch.training import Plan, fit, seed_everything

CHANNELS = (3, 4, 5)
SIDES = (4, 2, 1)


def source(count=3, split="train", sides=SIDES, seed=0, meta=None) -> MapSource:
    """Random maps of pictures p0, p1 ..., fine to coarse, in half precision as those on disk."""
    rng = np.random.default_rng(seed)
    return stages(
        [rng.normal(size=(count, side**2, c)) for c, side in zip(CHANNELS, sides, strict=True)], split, meta
    )


def stages(features, split="train", meta=None) -> MapSource:
    ids = [f"p{i}" for i in range(len(features[0]))]
    return MapSource([Regions(split, x.astype(np.float16), [], np.zeros(0, np.int64), ids, None, None,
                              meta or {}) for x in features])  # fmt: skip


def record(name, boxes, size=(64, 32)) -> Record:
    return Record(
        name, "train", (), size=size, objects=tuple(Object(tuple(map(float, b)), "thing") for b in boxes)
    )


RECORDS = [
    record("p2", []),
    record("p0", [(7, 8, 40, 21), (0, 1, 16, 30)]),
    record("p1", [(16, 4, 61, 27)]),
]


def moved(seed=0, **options) -> Detector:
    """A detector away from its start, where all deltas are nearly zero."""
    torch.manual_seed(seed)
    model = Detector(CachedStages(CHANNELS), LocatorConfig(**{"pyramid": 6, "anchor": 1.0, **options}))
    for layer in (model.proposals.head.cls_logits, model.proposals.head.bbox_pred):
        nn.init.normal_(layer.weight, std=0.3)
    return model


# ------------------------------------------------------------------------------------------- data
def test_pictures_find_their_records_whatever_their_order():
    data = BoxedImages(source(), RECORDS)
    assert len(data) == 3
    batch = data.__getitems__([1, 0, 2])
    assert [tuple(m.shape) for m in batch["picture"].values()] == [(3, 3, 4, 4), (3, 4, 2, 2), (3, 5, 1, 1)]
    assert batch["picture"]["map0"].dtype == torch.float16
    assert batch["real"].tolist() == [[True, False], [True, True], [False, False]]
    torch.testing.assert_close(batch["boxes"][0, 0], torch.tensor([0.25, 0.125, 0.953125, 0.84375]))
    torch.testing.assert_close(batch["boxes"][1, 1], torch.tensor([0.0, 0.03125, 0.25, 0.9375]))
    cells = data.images.stages[1].features[1]
    assert batch["picture"]["map1"][0].flatten(1).T.tolist() == cells.tolist()


def test_pictures_are_found_by_the_name_of_their_file_and_crowds_are_left_out(tmp_path):
    numbered = [
        replace(r, image_id=str(i), image=tmp_path / f"{r.image_id}.png") for i, r in enumerate(RECORDS)
    ]
    plain, named = BoxedImages(source(), RECORDS), BoxedImages(source(), numbered)
    assert torch.equal(named.boxes, plain.boxes)
    assert torch.equal(named.real, plain.real)
    crowd = replace(RECORDS[1], objects=(RECORDS[1].objects[0], replace(RECORDS[1].objects[1], crowd=True)))
    data = BoxedImages(source(), [RECORDS[0], crowd, RECORDS[2]])
    assert data.real.tolist() == [[True], [True], [False]]


def test_bad_records_are_named():
    with pytest.raises(DataError, match="picture p1: has no record"):
        BoxedImages(source(), RECORDS[:2])
    with pytest.raises(DataError, match="p1: has boxes but no size"):
        BoxedImages(source(), [*RECORDS[:2], replace(RECORDS[2], size=None)])
    with pytest.raises(DataError, match="no picture has a box"):
        BoxedImages(source(), [replace(r, objects=()) for r in RECORDS])


# ------------------------------------------------------------------------------------------- targets and losses
@pytest.mark.parametrize("offset", [0.0, 0.5])
def test_a_box_encoded_against_any_anchor_is_decoded_by_the_rpn_to_itself(offset):
    model = Detector(CachedStages(CHANNELS), LocatorConfig(pyramid=6, anchor=1.5, anchor_offset=offset))
    maps = [torch.zeros(1, 6, 1, 2), torch.zeros(1, 6, 3, 4)]
    anchors = model.proposals.anchors(maps)
    true = torch.tensor([[[0.3, 0.2, 0.7, 0.9]]])
    # every anchor is told its delta to the box, whether it is positive or not
    _, (wanted,) = rpn_targets(model.rules, anchors, true, torch.ones(1, 1).bool())
    torch.testing.assert_close(cut(decode(anchors, wanted)), true[0].expand(len(anchors), 4))
    # through the whole of `forward`: on a map of one cell a bias is the delta of its anchor
    boxes = torch.tensor([[0.1, 0.2, 0.5, 0.6], [0.4, 0.0, 1.0, 0.7], [0.05, 0.5, 0.2, 0.9]])
    maps, head = [torch.zeros(1, 6, 1, 1)], model.proposals.head
    anchors = model.proposals.anchors(maps)
    deltas = torch.cat(
        [
            rpn_targets(model.rules, a[None], b[None, None], torch.ones(1, 1).bool())[1][0]
            for a, b in zip(anchors, boxes, strict=True)
        ]
    )
    with torch.no_grad():
        head.bbox_pred.weight.zero_()
        head.bbox_pred.bias.copy_(deltas.flatten())
        head.cls_logits.weight.zero_()
        head.cls_logits.bias.copy_(torch.tensor([2.0, 3.0, 1.0]))
    found, logits, _ = model.proposals(maps)
    torch.testing.assert_close(found[0], boxes[[1, 0, 2]])
    assert logits[0].tolist() == [3.0, 2.0, 1.0]


def overlap_of(a, b) -> float:
    """IoU by hand."""
    width, height = (min(a[i + 2], b[i + 2]) - max(a[i], b[i]) for i in (0, 1))
    common = max(width, 0) * max(height, 0)
    return common / (sum((x[2] - x[0]) * (x[3] - x[1]) for x in (a, b)) - common)


def naive_targets(anchors, boxes):
    """Label and deltas of each anchor (x, y, w, h), by Ren et al.'s rules."""
    corners = [(x - w / 2, y - h / 2, x + w / 2, y + h / 2) for x, y, w, h in anchors]
    table = [[overlap_of(box, c) for c in corners] for box in boxes]
    labels, deltas = [], []
    for j, (x, y, w, h) in enumerate(anchors):
        if not boxes:
            labels.append(0)
            deltas.append(None)
            continue
        column = [row[j] for row in table]
        mine = boxes[column.index(max(column))]
        best = any(math.isclose(row[j], max(row), rel_tol=1e-5) for row in table)
        labels.append(1 if best or max(column) >= 0.7 else 0 if max(column) < 0.3 else -1)
        across, down = mine[2] - mine[0], mine[3] - mine[1]
        deltas.append(((mine[0] + across / 2 - x) / w, (mine[1] + down / 2 - y) / h,
                       math.log(across / w), math.log(down / h)))  # fmt: skip
    return labels, deltas


def test_targets_are_those_of_loops():
    data, model = BoxedImages(source(), RECORDS), moved()
    maps = model.read(data.images.batch([0, 1, 2]))
    anchors = model.proposals.anchors(maps)
    labels, wanted = rpn_targets(model.rules, anchors, data.boxes, data.real)
    kinds = set()
    for i in range(3):
        own, deltas = naive_targets(anchors.tolist(), data.boxes[i, data.real[i]].tolist())
        assert labels[i].tolist() == own
        kinds |= set(own)
        for j, label in enumerate(own):
            if label == 1:
                assert wanted[i][j].tolist() == pytest.approx(deltas[j], abs=1e-4)
    assert kinds == {-1, 0, 1}
    assert (labels[2] == 0).all()  # a picture without boxes is all background


def test_the_loss_is_that_of_loops():
    """Few enough anchors that all positive and negative ones are taken: nothing is left to chance."""
    data, model = BoxedImages(source(), RECORDS), moved()
    batch = data.__getitems__([0, 1, 2])
    with torch.no_grad():
        terms = model(batch)
        maps = model.read(batch["picture"])
        logits, deltas = model.proposals.predict(maps)
    anchors = model.proposals.anchors(maps).tolist()
    assert len(anchors) == 3 * (16 + 4 + 1) < 128
    entropy = distance = count = 0.0
    for i in range(3):
        labels, wanted = naive_targets(anchors, data.boxes[i, data.real[i]].tolist())
        for j, label in enumerate(labels):
            if label == -1:
                continue
            count += 1
            p = 1 / (1 + math.exp(-float(logits[i, j])))
            entropy -= math.log(p if label else 1 - p)
            for a, b in zip(
                deltas[i, j].tolist(), wanted[j] if label else deltas[i, j].tolist(), strict=True
            ):
                gap = abs(a - b)
                distance += 0.5 * gap**2 * 9 if gap < 1 / 9 else gap - 0.5 / 9
    assert float(terms["objectness_loss"]) == pytest.approx(entropy / count, rel=1e-4)
    assert float(terms["box_loss"]) == pytest.approx(distance / count, rel=1e-4)
    assert float(terms["loss"]) == pytest.approx((entropy + distance) / count, rel=1e-4)
    assert distance > 0


def test_of_each_picture_256_anchors_are_sampled_at_most_half_of_them_positive():
    model = moved()
    maps = source(2, sides=(16, 8, 4))
    # a box as large as the anchors about it, and one picture that is all such boxes
    crowd = [(x, y, x + 4, y + 4) for x in range(0, 60, 2) for y in range(0, 60, 2)]
    data = BoxedImages(maps, [record("p0", [(20, 20, 24, 24)], (64, 64)), record("p1", crowd, (64, 64))])
    read = model.read(maps.batch([0, 1]))
    labels, wanted = rpn_targets(model.rules, model.proposals.anchors(read), data.boxes, data.real)
    logits = torch.zeros(2, len(labels[0]), requires_grad=True)
    deltas = torch.full((2 * len(labels[0]), 4), 0.01, requires_grad=True)
    sum(model.rules.compute_loss(logits, deltas, labels, wanted)).backward()
    assert ((logits.grad != 0).sum(1) == 256).all()
    taken = [int(((g != 0) & (label == 1)).sum()) for g, label in zip(logits.grad, labels, strict=True)]
    assert taken[0] == int((labels[0] == 1).sum()) < 128 == taken[1] < int((labels[1] == 1).sum())


# ------------------------------------------------------------------------------------------- recall
def test_recall_by_hand():
    truth = torch.tensor([[[0.0, 0, 1, 1], [0, 0, 0.2, 0.2]], [[0.5, 0.5, 1, 1], [0, 0, 1, 1]]])
    real = torch.tensor([[True, True], [True, False]])
    boxes = torch.tensor([0.8, 0.8, 0.9, 0.9]).repeat(2, 12, 1)
    valid = torch.ones(2, 12).bool()
    boxes[0, 3] = torch.tensor([0.0, 0.0, 0.5, 1.0])  # IoU 1/2 with the whole picture
    boxes[1, 10] = torch.tensor([0.5, 0.5, 1.0, 1.0])  # the eleventh
    assert recall(boxes, valid, truth, real) == {"recall_10": 1 / 3, "recall_50": 2 / 3}
    valid[1, 10] = False
    assert recall(boxes, valid, truth, real) == {"recall_10": 1 / 3, "recall_50": 1 / 3}
    assert math.isnan(recall(boxes, valid, truth, real & False)["recall_10"])


def test_what_is_untaught_is_anchors_and_the_grid():
    truth = record("p0", [(0, 0, 64, 64), (0, 0, 32, 32), (3, 3, 6, 6)], (64, 64))
    data, model = BoxedImages(source(1), [truth]), moved()
    found = untaught(model, data)
    assert found["grid"] == {"recall_10": 2 / 3, "recall_50": 2 / 3}
    maps = model.read(data.images.batch([0]))
    every = iou(data.boxes[0], cut(model.proposals.anchors(maps))).amax(1) >= 0.5
    assert found["random anchors"]["recall_50"] <= every.float().mean()
    assert found == untaught(model, data)


# ------------------------------------------------------------------------------------------- training
SIZE = 64


def squares(count: int, split: str, seed: int):
    """Pictures of one or two squares on nothing as maps that show, cell by cell, how much of it is covered."""
    rng = np.random.default_rng(seed)
    pixels, records = np.zeros((count, SIZE, SIZE), np.float32), []
    for i in range(count):
        boxes = []
        for _ in range(rng.integers(1, 3)):
            side = int(rng.integers(10, 30))
            x, y = (int(v) for v in rng.integers(0, SIZE - side, 2))
            pixels[i, y : y + side, x : x + side] += 1
            boxes.append((x, y, x + side, y + side))
        records.append(record(f"p{i}", boxes, (SIZE, SIZE)))
    maps = [F.avg_pool2d(torch.from_numpy(pixels)[:, None], s) for s in (4, 8, 16)]
    return stages([m.flatten(2).mT.numpy() for m in maps], split, {"drawn": seed}), records


@pytest.fixture(scope="module")
def drawn():
    train, val = squares(128, "train", 0), squares(32, "val", 1)
    return {"train": train[0], "val": val[0]}, {"train": train[1], "val": val[1]}


FAST = {"pyramid": 16, "anchor": 3.0, "batch_size": 8, "lr": 1e-2, "echo": None}


def taught(out, maps, records, *, echo=None, **options):
    """The weights of a detector with a few settings of its shape and of its training."""
    plan = {name: options.pop(name) for name in ("epochs", "batch_size", "lr", "seed") if name in options}
    config = LocatorConfig(**{"pyramid": 32, "anchor": 4.0, **options})
    return train_detector(out, maps, records, config, plan=replace(PLAN, **plan), echo=echo)


def test_it_finds_squares_and_is_made_once(drawn, tmp_path):
    path = taught(tmp_path, *drawn, epochs=8, **FAST)
    told = json.loads(path.with_name("recall.json").read_text())
    table = told["recall"]
    rest = [table[name]["recall_10"] for name in ("untrained", "random anchors", "grid")]
    assert table["detector"]["recall_10"] > 0.75 > 0.5 > max(rest), table
    assert all(row["recall_50"] >= row["recall_10"] for row in table.values())
    assert set(table) == {
        "detector",
        "detector, nothing suppressed",
        "untrained",
        "random anchors",
        "grid",
    }
    assert 1 <= told["best_epoch"] <= 8
    written = path.stat().st_mtime_ns
    assert taught(tmp_path, *drawn, epochs=8, **FAST) == path
    assert path.stat().st_mtime_ns == written, "a finished detector is opened, not trained again"


def test_other_settings_boxes_or_maps_make_another_detector(drawn, tmp_path):
    maps, records = drawn
    maps = {s: stages([x.features[:16] for x in m.stages], s, {"weights": "a"}) for s, m in maps.items()}
    base = taught(tmp_path, maps, records, epochs=1, **FAST)
    paths = {
        base,
        taught(tmp_path, maps, records, epochs=1, **FAST | {"anchor": 2.0}),
        taught(tmp_path, maps, records, epochs=1, **FAST, seed=1),
        taught(tmp_path, maps, {**records, "train": records["train"][::-1]}, epochs=1, **FAST),
        taught(
            tmp_path,
            maps,
            {**records, "val": [record(r.image_id, [(1, 2, 30, 40)], r.size) for r in records["val"]]},
            epochs=1,
            **FAST,
        ),
        taught(
            tmp_path,
            {**maps, "train": stages([x.features for x in maps["train"].stages], "train", {"weights": "b"})},
            records,
            epochs=1,
            **FAST,
        ),
    }
    assert len(paths) == 5, "the order of the records alone changes nothing"


def test_a_broken_off_detector_is_resumed(drawn, tmp_path):
    """Killed after an epoch, it ends with the weights of one that ran through."""
    maps, records = drawn
    whole = taught(tmp_path / "whole", maps, records, epochs=3, **FAST)
    folder = tmp_path / "killed" / whole.parent.name

    class Killed(Exception):
        pass

    def echo(line):
        if "epoch 2/3" in line:
            raise Killed

    with pytest.raises(Killed):
        taught(tmp_path / "killed", maps, records, epochs=3, **FAST | {"echo": echo})
    assert (folder.with_name(f"{folder.name}.part") / "checkpoint.pt").is_file()
    assert not folder.exists()
    lines = []
    again = taught(tmp_path / "killed", maps, records, epochs=3, **FAST | {"echo": lines.append})
    assert [line.split()[1] for line in lines] == ["3/3"]
    assert again.read_bytes() == whole.read_bytes()
    theirs, ours = (json.loads(p.with_name("recall.json").read_text()) for p in (whole, again))
    assert ours["recall"] == theirs["recall"]


@pytest.mark.parametrize("source_of", ["decoder", "encoder"])
def test_its_weights_load_into_the_locator(drawn, tmp_path, source_of):
    maps, records = drawn
    path = taught(tmp_path, maps, records, epochs=1, **FAST | {"source": source_of})
    options = {"pyramid": 16, "anchor": 3.0, "count": 50, "heads": 2, "frozen": True, "source": source_of}
    torch.manual_seed(5)
    locator = SelfLocator((1, 1, 1), LocatorConfig(width=16, **options)).eval()
    load_proposals(locator.proposals, path, decoder=locator.decoder)
    val = BoxedImages(maps["val"], records["val"])
    seed_everything(0)
    same = Detector(CachedStages((1, 1, 1)), LocatorConfig(pyramid=16, anchor=3.0, source=source_of))
    plan = Plan(epochs=1, batch_size=8, lr=1e-2, warmup=0.1)
    fit(same, BoxedImages(maps["train"], records["train"]), plan, tmp_path / "same", echo=None)
    wanted = same.propose(val, nms=0.0)
    with torch.no_grad():
        found = locator.proposals(locator.decoder([m.float() for m in maps["val"].batch(range(32)).values()]))
    torch.testing.assert_close(found.boxes, wanted.boxes)
    torch.testing.assert_close(found.logits, wanted.logits)
    queries = SelfLocator(
        (1, 1, 1), LocatorConfig(width=16, **options, proposals="queries", query_heads=2, query_depth=1)
    )
    before = {k: v.clone() for k, v in queries.state_dict().items()}
    with pytest.raises(ValueError, match=r"detector\.safetensors holds an RPN.*queries.*proposals='rpn'"):
        load_proposals(queries.proposals, path, decoder=queries.decoder)
    assert all(torch.equal(v, before[k]) for k, v in queries.state_dict().items())


def test_a_batch_larger_than_the_split_is_refused(drawn, tmp_path):
    maps, records = drawn
    with pytest.raises((TrainingError, ValueError), match="lower batch_size"):
        taught(tmp_path, maps, records, epochs=1, **FAST | {"batch_size": 500})


def test_it_trains_on_the_maps_of_a_frozen_network(tmp_path, monkeypatch):
    monkeypatch.setattr(splits, "SMOKE", {"train": 64, "val": 20, "test": 20})
    data_root = splits.data_folder("scenes", tmp_path / "data", tmp_path / "cache", smoke=True)
    records = splits.open_records("scenes", data_root, smoke=True)
    network = frozen_network("scenes", data_root, tmp_path / "cache", told="captions", smoke=True)
    maps = map_images(records, network, tmp_path / "cache", echo=None)
    boxes = {s: load("scenes_coco", data_root, s) for s in ("train", "val")}
    path = taught(tmp_path, {s: maps[s] for s in boxes}, boxes, epochs=1, echo=None)
    channels = maps["train"].channels
    locator = SelfLocator(channels, LocatorConfig(width=16, pyramid=32, anchor=4.0, count=50, heads=2))
    load_proposals(locator.proposals, path, decoder=locator.decoder)
    told = json.loads(path.with_name("recall.json").read_text())["recall"]
    assert all(0 <= value <= 1 for row in told.values() for value in row.values())


# ------------------------------------------------------------------------------------------- queries and pixels
def test_the_set_loss_takes_the_best_of_all_assignments():
    """By every assignment of queries to boxes, as loops; a picture without boxes teaches its queries to be silent."""
    generator = torch.Generator().manual_seed(0)
    low = torch.rand(3, 4, 2, generator=generator) * 0.5
    boxes = torch.cat([low, low + 0.1 + 0.4 * torch.rand(3, 4, 2, generator=generator)], -1)
    logits = torch.randn(3, 4, generator=generator)
    true = boxes.roll(1, 0)[:, [2, 0]]
    real = torch.tensor([[True, True], [False, True], [False, False]])
    objectness, box = set_loss(Proposals(boxes, logits, torch.ones(3, 4, dtype=torch.bool)), true, real)

    def apart(a, b):
        x1, y1, x2, y2 = torch.maximum(a[:2], b[:2]).tolist() + torch.minimum(a[2:], b[2:]).tolist()
        inter = max(x2 - x1, 0) * max(y2 - y1, 0)
        union = sum(float((c[2] - c[0]) * (c[3] - c[1])) for c in (a, b)) - inter
        hull = float((torch.maximum(a[2:], b[2:]) - torch.minimum(a[:2], b[:2])).prod())
        near = (convert(a, "xyxy", "cxcywh") - convert(b, "xyxy", "cxcywh")).abs().sum()
        return 5 * float(near), inter / union - (hull - union) / hull

    terms, wanted, total = [], torch.zeros(3, 4), 0.0
    for i in range(3):
        there = true[i, real[i]]
        costs = {}
        for chosen in itertools.permutations(range(4), len(there)):
            pairs = [apart(boxes[i, q], there[j]) for j, q in enumerate(chosen)]
            certain = sum(logits[i, q].sigmoid().item() for q in chosen)
            costs[chosen] = sum(near - 2 * overlap for near, overlap in pairs) - certain
        best = min(costs, key=costs.get)
        wanted[i, list(best)] = 1
        total += sum(near + 2 * (1 - overlap) for near, overlap in
                     (apart(boxes[i, q], there[j]) for j, q in enumerate(best)))  # fmt: skip
    weight = 0.1 + 0.9 * wanted
    for logit, one, w in zip(logits.flatten(), wanted.flatten(), weight.flatten(), strict=True):
        p = logit.sigmoid()
        terms.append(-w * (one * p.log() + (1 - one) * (1 - p).log()))
    assert box.item() == pytest.approx(total / 3, rel=1e-4)
    assert objectness.item() == pytest.approx(sum(terms).item() / weight.sum().item(), rel=1e-4)


def test_queries_learn_boxes_and_load_into_the_locator(drawn, tmp_path):
    """Table 9 of arXiv: DETR's queries, trained on boxes first."""
    maps, records = drawn
    options = {"proposals": "queries", "count": 12, "query_depth": 1, "query_heads": 2}
    path = taught(tmp_path, maps, records, epochs=12, **FAST | {"lr": 3e-3}, **options)
    table = json.loads(path.with_name("recall.json").read_text())["recall"]
    assert set(table) == {"detector", "detector, nothing suppressed", "untrained", "grid"}
    rest = [table[name]["recall_10"] for name in ("grid", "untrained")]
    assert table["detector"]["recall_10"] > max(rest) + 0.1, table
    locator = SelfLocator((1, 1, 1), LocatorConfig(width=16, pyramid=16, heads=2, scaling="query", **options))
    said = load_proposals(locator.proposals, path, decoder=locator.decoder, encoder=CachedStages((1, 1, 1)))
    assert said == "detector.safetensors: decoder, proposals"
    saved = load_file(path)
    assert torch.equal(locator.proposals.reference, saved["reference"])


def photographed(folder, count, split, seed):
    """`squares` as pictures on disk."""
    rng, records = np.random.default_rng(seed), []
    folder.mkdir(exist_ok=True)
    for i in range(count):
        side = int(rng.integers(16, 40))
        x, y = (int(v) for v in rng.integers(0, SIZE - side, 2))
        pixels = np.zeros((SIZE, SIZE, 3), np.uint8)
        pixels[y : y + side, x : x + side] = 255
        path = folder / f"{split}{i}.png"
        Image.fromarray(pixels).save(path)
        records.append(replace(record(f"{split}{i}", [(x, y, x + side, y + side)], (SIZE, SIZE)), image=path))
    return records


def test_a_detector_of_pixels_brings_its_image_network(tmp_path):
    """Scale `paper`: the image encoder is trained with the proposals, and is loaded with them."""
    records = {
        s: photographed(tmp_path / "images", n, s, i) for i, (s, n) in enumerate((("train", 64), ("val", 16)))
    }
    images = pixel_images(records, SIZE)

    def encoder(seed=0):
        torch.manual_seed(seed)
        return pixel_stages("test_resnet", stages=(1, 2, 3))

    config = LocatorConfig(width=16, heads=2, pyramid=16, anchor=3.0, count=20)
    plan = Plan(epochs=6, batch_size=8, lr=5e-3, warmup=0.1)
    path = train_detector(tmp_path, images, records, config, encoder=encoder(), plan=plan, echo=None)
    table = json.loads(path.with_name("recall.json").read_text())["recall"]
    assert table["detector"]["recall_10"] > table["untrained"]["recall_10"] + 0.2, table
    written = path.stat().st_mtime_ns
    again = train_detector(tmp_path, images, records, config, encoder=encoder(), plan=plan, echo=None)
    assert (again, again.stat().st_mtime_ns) == (path, written)
    other = train_detector(
        tmp_path, images, records, config, encoder=encoder(1), plan=replace(plan, epochs=1), echo=None
    )
    assert other != path, "other first weights make another detector"
    image = encoder(7)
    other = SelfLocator(image.channels, replace(config, anchor=5.0, anchor_offset=0.0))
    with pytest.raises(ValueError, match=r"set anchor=3 and anchor_offset=0\.5"):
        load_proposals(other.proposals, path, decoder=other.decoder, encoder=image)
    locator = SelfLocator(image.channels, config).eval()
    said = load_proposals(locator.proposals, path, decoder=locator.decoder, encoder=image)
    assert said == "detector.safetensors: image network, decoder, proposals, anchors of 3 cells at 0.5"
    with torch.no_grad():
        pixels = images["val"].batch(range(16))["pixels"]
        boxes, _, valid = locator.proposals(locator.decoder(image.eval()(pixels)))
    data = BoxedImages(images["val"], records["val"])
    found = recall(boxes, valid, data.boxes, data.real)["recall_10"]
    assert found == pytest.approx(table["detector, nothing suppressed"]["recall_10"], abs=0.07)
    with pytest.raises(ValueError, match=r"image network of its own.*scale='paper'"):
        load_proposals(locator.proposals, path, decoder=locator.decoder, encoder=CachedStages(image.channels))
    with pytest.raises(ValueError, match=r"does not fit.*vision='resnet50'.*detector='boxes'"):
        load_proposals(locator.proposals, path, encoder=pixel_stages("resnet18"))
    state = {k: v for k, v in load_file(path).items() if not k.startswith("image_encoder.")}
    save_file(state, tmp_path / "bare.safetensors")
    with pytest.raises(ValueError, match=r"no image network.*whole detector"):
        load_proposals(
            locator.proposals, tmp_path / "bare.safetensors", decoder=locator.decoder, encoder=image
        )


def test_a_plain_vit_has_a_detector_too(tmp_path):
    records = {
        s: photographed(tmp_path / "images", n, s, i) for i, (s, n) in enumerate((("train", 8), ("val", 4)))
    }
    images = pixel_images(records, 64)
    image = pixel_stages("vit_tiny_patch16_224")
    config = LocatorConfig(pyramid=8, anchor=2.0, scales=(0.5, 1.0, 4.0))
    plan = Plan(epochs=1, batch_size=4, lr=1e-3)
    path = train_detector(tmp_path, images, records, config, encoder=image, plan=plan, echo=None)
    locator = SelfLocator(image.channels, replace(config, width=16, heads=2))
    assert "image network" in load_proposals(locator.proposals, path, decoder=locator.decoder, encoder=image)


def test_boxes_come_from_the_images_that_a_run_trains_on(tmp_path):
    """COCO's own images with their boxes, so none of test's; of a set without boxes, COCO's images of 2017."""

    def refuse(records: dict) -> dict:
        raise AssertionError("the run's own images are there")

    root = standins.write_data("coco_karpathy", tmp_path / "karpathy", images=4, size=(96, 64))
    records = splits.open_records("coco_karpathy", root)
    images, boxes = boxed_images("coco_karpathy", root, pixel_images(records, 32), refuse)
    train = BoxedImages(images["train"], boxes["train"])
    assert train.ids == [r.image_id for r in records["train"]]
    assert len(train) == 8  # train and restval
    assert {r.image_id for r in records["test"]} & set(train.ids) == set()
    of = {r.image.stem: r for r in boxes["train"]}
    first = [o.box for o in of[train.ids[0]].objects]
    assert (train.boxes[0, : len(first)] * torch.tensor([96, 64, 96, 64])).tolist() == [
        pytest.approx(box) for box in first
    ]
    turned, before = records["train"][0].image, records["train"][0].image.read_bytes()
    for orientation, told in ((6, "is shown as 64 x 96 by its EXIF tag"), (2, "by its EXIF tag")):
        exif = Image.Exif()
        exif[274] = orientation
        Image.open(io.BytesIO(before)).save(turned, exif=exif)
        with pytest.raises(DataError, match=rf"{turned.name}.*{told}.*boxes are of 96 x 64"):
            BoxedImages(images["train"], boxes["train"])
    turned.write_bytes(before)
    folder = root / "coco" / "annotations"
    for split in ("train", "val"):  # the names of 2017 are the numbers alone
        text = (folder / f"instances_{split}2014.json").read_text().replace(f"COCO_{split}2014_", "")
        (folder / f"instances_{split}2014.json").unlink()
        (folder / f"instances_{split}2017.json").write_text(text)
    images, boxes = boxed_images("coco_karpathy", root, images, refuse)
    assert torch.equal(BoxedImages(images["train"], boxes["train"]).boxes, train.boxes)

    root = standins.write_data("coco", tmp_path / "coco", images=3, size=(96, 64))
    images, boxes = boxed_images("flickr30k", root, {}, lambda records: pixel_images(records, 32))
    train = BoxedImages(images["train"], boxes["train"])
    assert len(train) == 3
    assert train.__getitems__([0, 2])["picture"]["pixels"].shape == (2, 3, 32, 32)
    network = timm_backbone(
        "test_resnet", size=96
    )  # kept maps lie beside a line of text; COCO's records have none

    def see(records):
        return map_images(records, network, tmp_path / "cache", stages=1, echo=None)

    assert len(boxed_images("flickr30k", root, {}, see)[0]["val"]) == 3
    parts, ids = labelled_images("flickr30k", root, {}, see)
    source, labelled, rows = parts["train"]
    assert len(source) == len(labelled) == len(rows) == 3
    assert labelled[0].captions == ()
    assert set(ids) >= {one.category for record in labelled for one in record.objects}
    (root / "coco" / "annotations" / "instances_val2017.json").unlink()
    with pytest.raises(DataError, match="instances"):
        boxed_images("flickr30k", root, {}, lambda records: pixel_images(records, 32))
