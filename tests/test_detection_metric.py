"""COCO's AP and class-agnostic recall on hand-made cases, and bad predictions by name."""

from __future__ import annotations

import importlib.util
import json

import numpy as np
import pytest
import torch

from finematch.data.coco import category_ids
from finematch.data.record import DataError, Object, Record
from finematch.evaluation.detection import (
    coco_truth,
    detection,
    frequency_rows,
    result_rows,
    uniform_class_rows,
    write_results,
)

IDS = {"cat": 3, "dog": 7, "bird": 90}  # with holes, as COCO's
SIZE = (200, 100)
THINGS = {
    "1": [((10, 10, 50, 50), "cat"), ((100, 20, 180, 80), "dog")],
    "2": [((0, 0, 40, 40), "cat")],
    "3": [],
}


def record(name, things, size=SIZE):
    return Record(
        name, "val", (), size=size, objects=tuple(Object(tuple(map(float, b)), c) for b, c in things)
    )


RECORDS = [record(name, things) for name, things in THINGS.items()]
TRUTH = coco_truth(RECORDS, IDS)


def row(image, box, category, score=0.9):
    x1, y1, x2, y2 = box
    return {
        "image_id": image,
        "category_id": IDS[category],
        "bbox": [x1, y1, x2 - x1, y2 - y1],
        "score": score,
    }


PERFECT = [row(name, box, kind) for name, things in THINGS.items() for box, kind in things]


def official(rows):
    """pycocotools by the book: files, `loadRes`, `evaluate`, `accumulate`, `summarize`."""
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    true, given = COCO(), COCO()
    true.dataset = json.loads(json.dumps(TRUTH))
    for image in true.dataset["images"]:
        image["id"] = int(image["id"])
    for one in true.dataset["annotations"]:
        one["image_id"] = int(one["image_id"])
    true.createIndex()
    given = true.loadRes([{**one, "image_id": int(one["image_id"])} for one in rows])
    evaluation = COCOeval(true, given, "bbox")
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    return dict(
        zip(("ap", "ap50", "ap75", "ap_small", "ap_medium", "ap_large"), 100 * evaluation.stats, strict=False)
    )


def test_true_boxes_are_perfect():
    found = detection(TRUTH, PERFECT, split="toy val")
    assert found["ap"] == found["ap50"] == found["ap75"] == found["recall_10"] == found["recall_100"] == 100
    assert (found["images"], found["true_boxes"], found["boxes"]) == (3, 3, 3)
    assert "toy val: COCO AP" in found["protocol"]
    assert "3 categories" in found["protocol"]
    assert "ap_large" not in found  # no true box of 96 x 96 pixels or more: nothing to average


def test_shifted_boxes_lose_the_strict_thresholds():
    # 40 x 40 moved by 8 to the right: IoU 32 / 48 = 0.667, which passes 0.50, 0.55, 0.60, 0.65: 4 of 10 thresholds
    moved = [row("1", (18, 10, 58, 50), "cat"), row("2", (8, 0, 48, 40), "cat"), PERFECT[1]]
    found = detection(TRUTH, moved)
    assert found["ap"] == pytest.approx(
        (40 + 100) / 2
    )  # cats and dogs; no bird is true, so birds do not count
    assert found["ap50"] == found["recall_10"] == 100
    assert found["ap75"] == pytest.approx(50)


def test_nothing_predicted_is_zero_and_not_an_error():
    found = detection(TRUTH, [])
    assert found["ap"] == found["ap50"] == found["recall_10"] == found["recall_100"] == 0


def test_a_duplicate_is_a_false_positive():
    # the dog's duplicate scores higher than nothing else of its class: precision 1 at recall 1 before it comes
    assert detection(TRUTH, [*PERFECT, row("1", (100, 20, 180, 80), "dog", 0.5)])["ap"] == 100
    # two cats, and the first one's duplicate between them: hit, miss, hit; precision 1 up to recall 1/2, then 2/3.
    # of 101 levels of recall 51 (0 to 0.50) have precision 1 and 50 have 2/3
    rows = [row("1", (10, 10, 50, 50), "cat", 0.9), row("1", (10, 10, 50, 50), "cat", 0.8),
            row("2", (0, 0, 40, 40), "cat", 0.7), PERFECT[1]]  # fmt: skip
    cats = 100 * (51 + 50 * 2 / 3) / 101
    assert detection(TRUTH, rows)["ap"] == pytest.approx((cats + 100) / 2)


def test_a_box_of_the_wrong_class_is_found_by_the_class_agnostic_recall_alone():
    wrong = [
        row("1", (10, 10, 50, 50), "bird"),
        row("1", (100, 20, 180, 80), "cat"),
        row("2", (0, 0, 40, 40), "dog"),
    ]
    found = detection(TRUTH, wrong)
    assert found["ap"] == 0
    assert found["recall_10"] == 100


def test_recall_counts_the_best_boxes_and_equal_boxes_once():
    # 12 boxes beside the dog come first: the dog is the 13th box, but among the first 100
    beside = [row("1", (x, 0, x + 5, 5), "bird", 0.95) for x in range(12)]
    found = detection(TRUTH, [*beside, *PERFECT])
    assert found["recall_10"] == pytest.approx(100 / 3)  # image 2's cat
    assert found["recall_100"] == 100
    # one box with three classes is one box: 5 of these and 1 true one are 6 of 10 places
    several = [row("1", (x, 0, x + 5, 5), kind, 0.95) for x in range(5) for kind in IDS]
    assert detection(TRUTH, [*several, *PERFECT])["recall_10"] == 100


def test_a_crowd_is_neither_found_nor_missed():
    crowd = record("4", [((0, 0, 90, 90), "cat")])
    crowd = Record("4", "val", (), size=SIZE, objects=(Object((0.0, 0.0, 90.0, 90.0), "cat", crowd=True),))
    truth = coco_truth([*RECORDS, crowd], IDS)
    assert detection(truth, PERFECT)["ap"] == 100
    assert detection(truth, [*PERFECT, row("4", (0, 0, 80, 90), "cat", 1.0)])["ap"] == 100
    assert detection(truth, PERFECT)["true_boxes"] == 3


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_equals_pycocotools_by_the_book_in_any_order(seed):
    rng = np.random.default_rng(seed)
    rows = []
    for name in THINGS:
        for _ in range(12):
            x, y = rng.integers(0, 120), rng.integers(0, 50)
            near = [*PERFECT[rng.integers(len(PERFECT))]["bbox"][:2], *rng.integers(20, 60, 2)]
            x, y, w, h = near if rng.random() < 0.7 else (x, y, *rng.integers(20, 60, 2))
            rows.append(row(name, (x, y, x + w, y + h), rng.choice(list(IDS)), float(rng.random())))
    wanted, found = official(rows), detection(TRUTH, rows)
    for key, value in wanted.items():
        assert found.get(key, -100) == pytest.approx(value), key  # -1 where no true box is of that size
    again = detection(TRUTH, [rows[i] for i in rng.permutation(len(rows))])
    assert {k: v for k, v in again.items() if k != "protocol"} == {
        k: v for k, v in found.items() if k != "protocol"
    }


@pytest.mark.skipif(not importlib.util.find_spec("faster_coco_eval"), reason="an optional package")
def test_the_faster_engine_gives_the_same_numbers():
    rows = [*PERFECT[:2], row("2", (8, 0, 48, 40), "cat", 0.4), row("1", (0, 0, 30, 30), "dog", 0.95)]
    slow, fast = detection(TRUTH, rows), detection(TRUTH, rows, engine="faster-coco-eval")
    assert "faster-coco-eval" in fast.pop("protocol")
    slow.pop("protocol")
    assert fast == pytest.approx(slow)


def test_without_the_package_the_remedy_is_named(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "faster_coco_eval", None)
    with pytest.raises(ImportError, match=r"finematch\[coco\]"):
        detection(TRUTH, PERFECT, engine="faster-coco-eval")
    with pytest.raises(ValueError, match="engine is 'mine'"):
        detection(TRUTH, PERFECT, engine="mine")


def test_model_boxes_become_pixels_of_the_original_image(tmp_path):
    boxes = torch.tensor([[0.05, 0.1, 0.25, 0.5], [0.5, 0.2, 0.9, 0.8], [0.3, 0.3, 0.3, 0.6]])
    rows = result_rows(
        RECORDS[0], boxes, torch.tensor([0, 1, 2]), torch.tensor([0.9, 0.8, 0.7]), list(IDS.values())
    )
    assert [one["category_id"] for one in rows] == [3, 7]  # a box without area is left out
    assert np.allclose([one["bbox"] for one in rows], [[10, 10, 40, 40], [100, 20, 80, 60]])
    write_results(tmp_path / "results.json", rows)
    read = json.loads((tmp_path / "results.json").read_text())
    assert read[0] == {"image_id": 1, "category_id": 3, "bbox": [10.0, 10.0, 40.0, 40.0], "score": 0.9}
    assert detection(TRUTH, read, file="results.json")["ap50"] == pytest.approx(
        50 + 50 * 51 / 101
    )  # one cat of two


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image_id": 9}, r"entry 1 \(image 9\): is of an image that the truth does not list"),
        ({"category_id": 4}, "has category_id 4, which the truth does not list"),
        ({"score": float("nan")}, "is not finite"),
        ({"bbox": [1, 1, float("inf"), 2]}, "is not finite"),
        ({"bbox": [50, 50, 10, -10]}, r"without width or height.*not two corners"),
        ({"bbox": [1, 2, 3]}, r"entry 1: is .*COCO's results format"),
        ({"score": None}, "entry 1: is "),
    ],
)
def test_bad_predictions_are_named(change, message):
    with pytest.raises(DataError, match="(?s)mine.json.*" + message):
        detection(TRUTH, [PERFECT[0], {**PERFECT[1], **change}], file="mine.json")


def test_fractions_and_a_truth_without_boxes_are_refused():
    small = [{**one, "bbox": [v / 200 for v in one["bbox"]]} for one in PERFECT]
    with pytest.raises(DataError, match="fractions of the image"):
        detection(TRUTH, small)
    with pytest.raises(ValueError, match="no true box in 1 images"):
        detection(coco_truth([record("1", [])], IDS), [])
    with pytest.raises(DataError, match="has a 'cow', which is no class"):
        coco_truth([record("1", [((0, 0, 5, 5), "cow")])], IDS)
    with pytest.raises(DataError, match="has no size"):
        coco_truth([record("1", [], size=None)], IDS)


def test_baselines_that_look_at_no_image_or_no_text():
    train = [
        record("a", [((0, 0, 100, 50), "cat"), ((100, 50, 200, 100), "dog")]),
        record("b", [((0, 0, 60, 30), "cat")]),
    ]
    rows = frequency_rows(train, RECORDS[:2], IDS)
    assert [(one["image_id"], one["category_id"]) for one in rows] == [("1", 3), ("1", 7), ("2", 3), ("2", 7)]
    assert [one["bbox"] for one in rows[:2]] == [[0, 0, 80, 40], [100, 50, 100, 50]]  # the mean of both cats
    assert np.allclose([one["score"] for one in rows[:2]], [2 / 3, 1 / 3])
    proposals = [(torch.rand(50, 4).sort(-1).values, torch.rand(50)) for _ in RECORDS]
    some = uniform_class_rows(RECORDS, proposals, IDS)
    assert {one["category_id"] for one in some} == {3, 7, 90}
    assert some == uniform_class_rows(RECORDS, proposals, IDS)
    assert some != uniform_class_rows(RECORDS, proposals, IDS, seed=1)


def test_category_ids_keep_their_holes(real_data):
    ids = category_ids(real_data / "coco" / "annotations" / "instances_val2017.json")
    assert (len(ids), min(ids.values()), max(ids.values())) == (80, 1, 90)
    assert ids["toothbrush"] == 90
