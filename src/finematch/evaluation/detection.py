"""Object detection: COCO's average precision of boxes with classes and scores, and how many things any box finds.

Definitions:

* AP (Lin et al. 2014): pycocotools' `COCOeval` on boxes, the mean over IoU 0.50, 0.55 ... 0.95, over 101 levels of
  recall and over the categories that have a true box; at most 100 boxes an image. Crowds are neither found nor missed.
* Class-agnostic recall: percentage of the true boxes, crowds left out, that one of an image's 10 (100) best boxes
  overlaps with an IoU of at least 0.5, one to one and whatever the classes (`useCats=0`). A box that is listed with
  several classes counts once, with its best score.

Truth and predictions have COCO's formats: `instances_*.json`, and a list of `{image_id, category_id, bbox, score}`. A
bbox is [x, y, width, height] in pixels of the original image, and category ids may have holes.
"""

from __future__ import annotations

import contextlib
import copy
import io
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from finematch.data.names import result_id
from finematch.data.record import DataError, Record
from finematch.files import write_text

ENGINES = ("pycocotools", "faster-coco-eval")
KS = (10, 100)
REMEDY = "Give a list of {image_id, category_id, bbox: [x, y, width, height], score}, COCO's results format"


def coco_truth(records: Sequence[Record], categories: Mapping[str, int]) -> dict:
    """The true boxes of records as COCO's annotations. Their area is that of the box; COCO's own files have the
    object's, which is smaller, so that AP by size (`ap_small` and its like) is not theirs.

    Args:
        categories: id of each class name, as in the dataset's own file.

    Raises:
        DataError: a record without a size, or an object of an unknown class.
    """
    images, annotations = [], []
    for record in records:
        name = record.source or "(records)"
        if record.size is None:
            raise DataError(name, f"image {record.image_id}", "has no size", "Give records that state sizes")
        width, height = record.size
        images.append({"id": record.image_id, "width": width, "height": height})
        for thing in record.objects:
            if thing.category not in categories:
                raise DataError(name, f"image {record.image_id}", f"has a {thing.category!r}, which is no class",
                                f"Give its id; known are {', '.join(categories)}")  # fmt: skip
            x1, y1, x2, y2 = thing.box
            annotations.append({
                "id": len(annotations) + 1, "image_id": record.image_id, "category_id": categories[thing.category],
                "bbox": [x1, y1, x2 - x1, y2 - y1], "area": (x2 - x1) * (y2 - y1), "iscrowd": int(thing.crowd),
            })  # fmt: skip
    named = [{"id": number, "name": name} for name, number in categories.items()]
    return {"images": images, "annotations": annotations, "categories": named}


def result_rows(
    record: Record,
    boxes: Float[Tensor, "r 4"],
    labels: Int[Tensor, " r"],
    scores: Float[Tensor, " r"],
    ids: Sequence[int],
) -> list[dict]:
    """The boxes of one image in COCO's results format.

    Args:
        boxes: (x1, y1, x2, y2) in fractions of the image; one without area is left out.
        labels: number of each box's class in `ids`, the category ids.
    """
    frame = torch.tensor([*record.size, *record.size], dtype=torch.float64)
    found = []
    for box, label, score in zip(
        (boxes.double() * frame).tolist(), labels.tolist(), scores.tolist(), strict=True
    ):
        x1, y1, x2, y2 = box
        if x2 > x1 and y2 > y1:
            found.append({"image_id": record.image_id, "category_id": ids[label],
                          "bbox": [x1, y1, x2 - x1, y2 - y1], "score": score})  # fmt: skip
    return found


def frequency_rows(
    train: Sequence[Record], records: Sequence[Record], categories: Mapping[str, int]
) -> list[dict]:
    """Predictions that look at no image: every class of `train` in every image, at the mean of its true boxes (in
    fractions of their images), with its share of all boxes as the score."""
    of_class: dict[str, list] = {}
    for record in train:
        for thing in record.objects:
            if not thing.crowd:
                frame = (*record.size, *record.size)
                of_class.setdefault(thing.category, []).append(np.array(thing.box) / frame)
    total, ids = sum(map(len, of_class.values())), [categories[name] for name in of_class]
    boxes = torch.from_numpy(np.stack([np.mean(some, 0) for some in of_class.values()]))
    scores = torch.tensor([len(some) / total for some in of_class.values()])
    return [
        row for record in records for row in result_rows(record, boxes, torch.arange(len(ids)), scores, ids)
    ]


def uniform_class_rows(
    records: Sequence[Record],
    proposals: Sequence[tuple[Float[Tensor, "_ 4"], Float[Tensor, " _"]]],
    categories: Mapping[str, int],
    *,
    seed: int = 0,
) -> list[dict]:
    """Proposals (boxes and saliency of each image) with a class drawn uniformly for each: what alignment must beat."""
    g, ids, found = torch.Generator().manual_seed(seed), list(categories.values()), []
    for record, (boxes, saliency) in zip(records, proposals, strict=True):
        found += result_rows(
            record, boxes, torch.randint(len(ids), (len(boxes),), generator=g), saliency, ids
        )
    return found


def write_results(path: str | Path, rows: list[dict]) -> None:
    """The predictions as a file in COCO's results format: coordinates to a hundredth of a pixel, scores to six digits.

    COCO numbers its images, so an image id that is a number in text is written as one.
    """
    kept = [
        {"image_id": result_id(row["image_id"]), "category_id": row["category_id"],
         "bbox": [round(v, 2) for v in row["bbox"]], "score": float(f"{row['score']:.6g}")} for row in rows
    ]  # fmt: skip
    write_text(path, json.dumps(kept, allow_nan=False))


def detection(
    truth: Mapping,
    rows: Sequence[Mapping],
    *,
    engine: str = "pycocotools",
    split: str = "",
    file: str = "(predictions)",
) -> dict:
    """COCO's AP and class-agnostic recall, in percent.

    Args:
        truth: COCO's annotations (`coco_truth`, or the content of `instances_*.json`).
        rows: predictions in COCO's results format; any number, in any order. Among equal scores of an image the earlier
            counts as the better one, as in pycocotools.
        engine: `pycocotools`, or `faster-coco-eval`, an optional package that gives the same numbers in less time.
        split: what was scored, for the protocol string. file: of the predictions, for messages.

    Returns:
        `ap, ap50, ap75`, and `ap_small, ap_medium, ap_large` where the truth has such boxes (an area in pixels below
        32 x 32, below 96 x 96, above); `recall_10, recall_100`; counts `images, true_boxes, boxes`; `protocol`.

    Raises:
        DataError: a prediction that is malformed, not finite, of an unknown image or category; the message names its
            number.
        ValueError: an unknown engine, a truth without a box.
    """
    if engine not in ENGINES:
        raise ValueError(f"engine is {engine!r}; use one of {ENGINES}")
    true = [one for one in truth["annotations"] if not one.get("iscrowd", 0)]
    if not true:
        raise ValueError(f"no true box in {len(truth['images'])} images: there is nothing to detect")
    check_rows(truth, rows, file)
    by_class = _evaluate(truth, rows, engine)
    precision = by_class.eval["precision"]  # IoU, recall, category, area, boxes an image
    found = {"ap": _mean(precision[:, :, :, 0, -1]), "ap50": _mean(precision[0, :, :, 0, -1]),
             "ap75": _mean(precision[5, :, :, 0, -1])}  # fmt: skip
    found |= {
        f"ap_{name}": _mean(precision[:, :, :, i, -1])
        for i, name in enumerate(("small", "medium", "large"), 1)
    }
    recall = _evaluate(truth, _once(rows), engine, agnostic=True).eval["recall"][0, 0, 0]
    found |= {f"recall_{k}": 100 * float(recall[i]) for i, k in enumerate(KS)}
    found = {name: value for name, value in found.items() if value is not None}
    protocol = (
        f"{split + ': ' if split else ''}COCO AP on boxes by {engine}, IoU 0.50 to 0.95, at most 100 boxes an image; "
        f"recall_k: class-agnostic, IoU >= 0.5, k best boxes an image; {len(truth['images'])} images, {len(true)} true "
        f"boxes, {len(truth['categories'])} categories"
    )
    return found | {
        "images": len(truth["images"]),
        "true_boxes": len(true),
        "boxes": len(rows),
        "protocol": protocol,
    }


def check_rows(truth: Mapping, rows: Iterable[Mapping], file: str = "(predictions)") -> None:
    """DataError for the first prediction that cannot be scored, with its number and the remedy."""
    images = {str(one["id"]): max(one["width"], one["height"]) for one in truth["images"]}
    categories = {one["id"] for one in truth["categories"]}
    reach = side = 0.0
    for number, row in enumerate(rows):
        try:
            name = f"entry {number} (image {row['image_id']})"
            values = [float(v) for v in (*row["bbox"], row["score"])]
            x, y, width, height, score = values
            image, category = str(row["image_id"]), row["category_id"]
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(file, f"entry {number}", f"is {str(row)[:120]} ({error!r})", REMEDY) from error
        if image not in images:
            raise DataError(
                file,
                name,
                "is of an image that the truth does not list",
                "Score the images of the truth alone",
            )
        if category not in categories:
            raise DataError(file, name, f"has category_id {category!r}, which the truth does not list",
                            "Give the ids of the annotations' categories (COCO's have holes)")  # fmt: skip
        if not all(map(math.isfinite, values)):
            raise DataError(
                file, name, f"is not finite: bbox {row['bbox']}, score {score}", "Check the model"
            )
        if width <= 0 or height <= 0:
            raise DataError(file, name, f"has a bbox without width or height: {row['bbox']}",
                            "Give [x, y, width, height], not two corners")  # fmt: skip
        reach, side = max(reach, x + width, y + height), max(side, images[image])
    if 0 < reach <= 1 < side:
        raise DataError(file, "all entries", "lie within the first pixel: these are fractions of the image",
                        "Multiply by its width and height")  # fmt: skip


def _once(rows: Sequence[Mapping]) -> list[Mapping]:
    """Equal boxes of an image once, with their best score."""
    best: dict = {}
    for row in rows:
        key = (str(row["image_id"]), *row["bbox"])
        if key not in best or row["score"] > best[key]["score"]:
            best[key] = row
    return list(best.values())


def _evaluate(truth: Mapping, rows: Iterable[Mapping], engine: str, *, agnostic: bool = False):
    """COCOeval after `accumulate`; `agnostic` for class-agnostic recall."""
    if engine == "pycocotools":
        from pycocotools.coco import COCO
        from pycocotools.cocoeval import COCOeval
    else:
        try:
            from faster_coco_eval import COCO
            from faster_coco_eval import COCOeval_faster as COCOeval
        except ImportError as error:
            raise ImportError(
                "engine='faster-coco-eval' needs the package: pip install 'finematch[coco]', or use pycocotools"
            ) from error
    # ids of images in text: COCO's own are numbers, and a result file's may be either
    images = [{**one, "id": str(one["id"])} for one in truth["images"]]
    true = [
        {**one, "image_id": str(one["image_id"]), "iscrowd": one.get("iscrowd", 0)}
        for one in truth["annotations"]
    ]
    given = []
    for i, row in enumerate(rows, start=1):
        box = [float(v) for v in row["bbox"]]
        given.append({"id": i, "image_id": str(row["image_id"]), "category_id": row["category_id"], "bbox": box,
                      "area": box[2] * box[3], "iscrowd": 0, "score": float(row["score"])})  # fmt: skip
    with contextlib.redirect_stdout(io.StringIO()):
        tables = []
        for annotations in (true, given):
            table = COCO()
            table.dataset = copy.deepcopy(
                {"images": images, "annotations": annotations, "categories": list(truth["categories"])}
            )
            table.createIndex()
            tables.append(table)
        evaluation = COCOeval(*tables, iouType="bbox")
        if agnostic:
            evaluation.params.useCats, evaluation.params.maxDets = 0, list(KS)
            evaluation.params.iouThrs = np.array([0.5])
        evaluation.evaluate()
        evaluation.accumulate()
    return evaluation


def _mean(values: np.ndarray) -> float | None:
    """Percent, over what has a true box; None if nothing has (COCO writes -1)."""
    known = values[values > -1]
    return 100 * float(known.mean()) if known.size else None
