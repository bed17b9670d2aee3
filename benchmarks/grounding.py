"""Speed of phrase grounding at the size of Flickr30k Entities' test split, beside MDETR's evaluator.

Ours (`finematch.evaluation.grounding`) gives R@1, 5, 10 and the upper bound by any box and by the merged box, and the
pointing game, chance and centre besides; MDETR's `Flickr30kEntitiesRecallEvaluator` (datasets/flickr_eval.py of
github.com/ashkamath/mdetr, Apache 2.0) gives the recalls of one of the two protocols. Annotations in Entities' format
are drawn into a temporary folder, 1,000 images with five sentences each and about 14,500 phrases with one to five
boxes, and both read them there: opening is timed apart. Candidates and scores are random, 20 to 100 boxes a phrase with
distinct scores, some near the truth. MDETR's takes candidates in order of score, as arrays: sorting them is not part
of its time, but it is of ours. The two run alternately, any box and merged; the recalls must agree.

    git clone https://github.com/ashkamath/mdetr && pip install prettytable
    python benchmarks/grounding.py --mdetr mdetr        writes benchmarks/grounding.json (2 minutes on one core)
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import statistics
import sys
import tempfile
import time
import types
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch

from finematch.data.entities import load_entities
from finematch.evaluation.grounding import GroundedPhrase, grounding
from finematch.files import write_json
from finematch.runs import git_commit, versions
from finematch.training import device_name

SIZE = (500, 375)
KINDS = ("people", "clothing", "bodyparts", "animals", "vehicles", "instruments", "scene", "other")


def draw(folder: Path, images: int, rng: np.random.Generator) -> None:
    """Annotations in Entities' format: five sentences an image, of one to five phrases, mostly with one box."""
    for name in ("Annotations", "Sentences"):
        (folder / name).mkdir()
    ids = [str(1000 + i) for i in range(images)]
    (folder / "test.txt").write_text("\n".join(ids))
    for image in ids:
        objects = []
        for entity in range(1, 7):
            for _ in range(rng.choice(6, p=[0.04, 0.7, 0.13, 0.06, 0.04, 0.03])):
                x, y = rng.integers(1, SIZE[0] - 60), rng.integers(1, SIZE[1] - 60)
                w, h = rng.integers(40, SIZE[0] - x + 1), rng.integers(40, SIZE[1] - y + 1)
                corners = zip(("xmin", "ymin", "xmax", "ymax"), (x, y, x + w - 1, y + h - 1), strict=True)
                box = "".join(f"<{tag}>{value}</{tag}>" for tag, value in corners)
                objects.append(f"<object><name>{entity}</name><bndbox>{box}</bndbox></object>")
        size = f"<size><width>{SIZE[0]}</width><height>{SIZE[1]}</height><depth>3</depth></size>"
        text = f"<annotation><filename>{image}.jpg</filename>{size}{''.join(objects)}</annotation>"
        (folder / "Annotations" / f"{image}.xml").write_text(text)
        lines = []
        for _ in range(5):
            said = rng.permutation(np.arange(1, 7))[: rng.integers(1, 6)]
            lines.append(
                " and ".join(f"[/EN#{entity}/{KINDS[entity % 8]} a thing]" for entity in said) + " ."
            )
        (folder / "Sentences" / f"{image}.txt").write_text("\n".join(lines) + "\n")


def candidates(boxes: tuple, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Random boxes, some of them near a true one, in order of their distinct scores."""
    n = int(rng.integers(20, 101))
    corner = rng.uniform(0, 0.8, (n, 2)) * SIZE
    found = np.concatenate([corner, corner + rng.uniform(0.05, 0.2, (n, 2)) * SIZE], 1)
    near = rng.random(n) < 0.05
    found[near] = np.asarray(boxes)[rng.integers(0, len(boxes), near.sum())] + rng.normal(
        0, 12, (near.sum(), 4)
    )
    found[:, 2:] = np.maximum(found[:, 2:], found[:, :2] + 1)
    return found.astype(np.float32), -np.sort(-rng.permutation(10 * n)[:n].astype(np.float32))


def mdetr_module(folder: Path) -> types.ModuleType:
    """datasets/flickr_eval.py by itself; its distributed helper, which is not called, is stood in for."""
    sys.modules["util"], sys.modules["util.dist"] = types.ModuleType("util"), types.ModuleType("util.dist")
    sys.modules["util"].dist = sys.modules["util.dist"]
    spec = importlib.util.spec_from_file_location("flickr_eval", folder / "datasets" / "flickr_eval.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def predictions(records: list, rng: np.random.Generator) -> tuple[list[GroundedPhrase], list[dict]]:
    """The same candidates for both: a tensor a phrase for ours, a list of arrays a sentence for MDETR's."""
    ours, theirs = [], {}
    for record in records:
        for phrase in record.phrases:
            if not phrase.boxes:
                ours.append(GroundedPhrase(torch.zeros(0, 4), torch.zeros(0), (), record.size, phrase.kind))
                continue
            boxes, scores = candidates(phrase.boxes, rng)
            order = rng.permutation(len(boxes))
            regions, fit = torch.from_numpy(boxes[order]), torch.from_numpy(scores[order])
            ours.append(GroundedPhrase(regions, fit, phrase.boxes, record.size, phrase.kind))
            theirs.setdefault((record.image_id, phrase.caption), []).append(boxes.astype(np.float64))
    return ours, [{"image_id": i, "sentence_id": k, "boxes": found} for (i, k), found in theirs.items()]


def clock(function) -> tuple[float, object]:
    start = time.process_time()
    result = function()
    return time.process_time() - start, result


def compare(ours: dict, theirs: dict, prefix: str) -> float:
    """The largest difference of recalls in points, of all phrases and of each type; asserts that it is rounding."""
    names = {1: "r1", 5: "r5", 10: "r10", -1: "upper_bound"}
    pairs = [(ours[prefix + names[k] + ("" if kind == "all" else f"/{kind}")], 100 * value)
             for k, by_kind in theirs.items() for kind, value in by_kind.items()]  # fmt: skip
    difference = max(abs(a - b) for a, b in pairs)
    assert difference < 1e-9, pairs
    return difference


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--mdetr", type=Path, help="a checkout of ashkamath/mdetr")
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".json"))
    options = parser.parse_args()
    if options.mdetr is None:
        print("Skipped: give --mdetr, a checkout of MDETR, to stand beside it")
        return
    torch.set_num_threads(1)
    mdetr, rng = mdetr_module(options.mdetr), np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as name:
        draw(Path(name), options.images, rng)
        opened, records = clock(lambda: load_entities(name, "test", check_images=False))
        build, evaluators = mdetr.Flickr30kEntitiesRecallEvaluator, {}
        for merged in (False, True):
            seconds, evaluators[merged] = clock(lambda m=merged: build(name, merge_boxes=m, verbose=False))
    phrases, asked = predictions(records, rng)
    load, times, agreed = [os.getloadavg()[0]], {"ours": [], "mdetr_any": [], "mdetr_merged": []}, {}
    for _ in range(options.repeats):
        taken, result = clock(lambda: grounding(phrases))
        times["ours"].append(taken)
        for merged, label in ((False, "any"), (True, "merged")):
            with contextlib.redirect_stdout(None):
                taken, theirs = clock(lambda e=evaluators[merged]: e.evaluate(asked))
            times[f"mdetr_{label}"].append(taken)
            agreed[label] = compare(result, theirs, "merged_" if merged else "")
    load.append(os.getloadavg()[0])
    median = {name: statistics.median(values) for name, values in times.items()}
    content = {
        "phrases": result["phrases"],
        "dropped": result["dropped"],
        "images": options.images,
        "sentences": len(asked),
        "candidates": sum(len(phrase.scores) for phrase in phrases),
        "cpu_seconds": times,
        "times_faster_than_mdetr": {
            "any": median["mdetr_any"] / median["ours"],
            "merged": median["mdetr_merged"] / median["ours"],
            "both, which ours gives in one call": (median["mdetr_any"] + median["mdetr_merged"])
            / median["ours"],
        },
        "largest_difference": agreed,
        "recalls": {name: value for name, value in result.items() if "r1" in name and "/" not in name},
        "opening_cpu_seconds": {"ours": opened, "mdetr": seconds},
        "load_average": load,
        "device": device_name(),
        "versions": versions(),
        "commit": git_commit(),
    }
    write_json(options.out, content)
    print(json.dumps(content, indent=1))


if __name__ == "__main__":
    main()
