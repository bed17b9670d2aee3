"""Speed and memory of description assignment at the size of COCO val2017: 36,800 boxes x 5,000 texts.

Every box is scored against every keyword of every text (10 a text, 512-d), each text takes its best keyword,
and each box gets its average precision over the whole ranking (`finematch.evaluation.average_precision`,
relevance `category`). Features are random; classes have COCO's skew: "person" is 30 % of the boxes and in 54 %
of the pictures, the others fall off. A sample of the queries is checked against a plain sort.

The floor is the multiply-adds of the scores, 2 q g m d operations, at the rate this machine reaches on a square
product, measured before and after, in the same process and on the same clock. Wall seconds are what a user
waits; CPU seconds are what the process itself used, which says more where the machine is shared (threads that
wait for one another count too). Each number of threads has a fresh process; its peak memory during the evaluation
is given whole (Python, torch and the features included) and as the growth.

FELGA reports three kinds of relevance. `relevances` measures them over a gallery of distinct keywords, as a run has it
(`evaluation.fragments`): scored once for all three, against a scoring for each, alternately in one process, on a part
of the boxes.

    python benchmarks/average_precision.py --only relevances     measures and replaces that part alone
    python benchmarks/average_precision.py      writes benchmarks/average_precision.json (best on a quiet machine)
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import torch
from torch.nn import functional as F

from finematch.evaluation.average_precision import (
    BLOCK,
    SCORES,
    TILE,
    average_precision,
    average_precision_blocks,
)
from finematch.evaluation.fragments import best_fragments, crop_scores, frozen
from finematch.features.fragments import Fragments
from finematch.files import write_json
from finematch.runs import git_commit, versions
from finematch.training import device_name

CLASSES = 80
SIDE = 2048  # of the square product that gives the machine's rate
SAMPLE = 40  # queries checked against a plain sort
DISTINCT = 12_000  # keywords of all texts; a keyword's share of the texts falls with its rank
PART = 20  # of the boxes one in so many is measured in `relevances`
ROUNDS = 2


def features(options) -> tuple[torch.Tensor, torch.Tensor]:
    """Random unit vectors of boxes and of keywords."""
    g = torch.Generator().manual_seed(0)
    boxes = F.normalize(torch.randn(options.boxes, options.width, generator=g), dim=1)
    return boxes, F.normalize(torch.randn(options.texts, options.keywords, options.width, generator=g), dim=2)


def labels(options) -> tuple[torch.Tensor, torch.Tensor]:
    """Classes of the boxes and which texts are relevant to a class, with COCO's skew."""
    g = torch.Generator().manual_seed(1)
    falling = 1 / torch.arange(1, CLASSES).double() ** 0.7
    boxes = torch.cat([torch.tensor([0.3]), 0.7 * falling / falling.sum()])
    pictures = torch.cat([torch.tensor([0.54]), 2.4 * falling / falling.sum()])  # 2.9 classes a picture
    relevant = torch.rand(CLASSES, options.texts, generator=g) < pictures[:, None]
    relevant[:, 0] = True  # no class without a picture
    return relevant, torch.multinomial(boxes, options.boxes, replacement=True, generator=g)


def clock(function) -> dict:
    wall, cpu = time.perf_counter(), time.process_time()
    result = function()
    return {"wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu, "result": result}


def largest_difference(boxes, keywords, relevant, class_of) -> float:
    """Over a sample of queries, between our mAP and that of a plain sort, in points.

    Of 5,000 random scores some are equal in float32, and the plain sort breaks such a tie by chance; products
    of another shape also round differently. So the two agree closely, not to the last bit.
    """
    rows = torch.linspace(0, len(boxes) - 1, SAMPLE).long()
    scores = torch.einsum("qd,gmd->qgm", boxes[rows], keywords).amax(2)
    hit = relevant[class_of[rows]].gather(1, scores.argsort(1, descending=True)).double()
    precision = hit.cumsum(1) / torch.arange(1, hit.shape[1] + 1)
    plain = 100 * float(((precision * hit).sum(1) / hit.sum(1)).mean())
    ours = average_precision(boxes[rows], keywords, None, relevant, class_of[rows])
    difference = abs(ours["map"] - plain)
    assert difference < 1e-4, (ours, plain)
    return difference


def own_peak() -> int:
    """Peak bytes of this process alone (Linux); getrusage's peak is inherited from the parent process."""
    status = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in status if line.startswith("VmHWM"))


def measure(options, threads: int) -> dict:
    """One full evaluation, in this process."""
    torch.set_num_threads(threads)
    boxes, keywords = features(options)
    relevant, class_of = labels(options)
    square = torch.randn(SIDE, SIDE)
    small = average_precision(
        boxes[:64], keywords[:64], None, relevant[:, :64], class_of[:64]
    )  # libraries load
    assert small["queries"] == 64
    difference = largest_difference(boxes, keywords, relevant, class_of)  # before minutes are spent

    load, products = [os.getloadavg()[0]], [clock(lambda: square @ square) for _ in range(8)]
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak of making the features
    before = own_peak()
    run = clock(lambda: average_precision(boxes, keywords, None, relevant, class_of))
    peak = own_peak()
    assert peak > before, "the peak did not move: this measurement says nothing"
    products += [clock(lambda: square @ square) for _ in range(8)]
    load.append(os.getloadavg()[0])
    discovery = clock(
        lambda: average_precision(boxes[:CLASSES], keywords, None, relevant, torch.arange(CLASSES))
    )

    result, operations = run.pop("result"), 2 * len(boxes) * keywords.numel()
    rate = {name: 2 * SIDE**3 / min(product[name] for product in products) for name in ("wall", "cpu")}
    return {
        "seconds": run,
        "gflop_per_second": {name: operations / run[name] / 1e9 for name in rate},
        "matrix_product_gflop_per_second": {name: value / 1e9 for name, value in rate.items()},
        "share_of_matrix_product": {name: operations / run[name] / rate[name] for name in rate},
        "object_discovery_seconds": {name: discovery[name] for name in rate},
        "peak_bytes": peak,
        "peak_growth_bytes": peak - before,
        "load_average": load,
        "map": result["map"],
        "random": result["random"],
        "prevalence": result["prevalence"],
        "queries": result["queries"],
        "ties": result["ties"],
        "difference_to_a_plain_sort": difference,
    }


def relevances(options) -> dict:
    """Description assignment under category, lexical and instance relevance, by one scoring and by three."""
    torch.set_num_threads(options.threads or 2)
    options.boxes //= PART
    g = torch.Generator().manual_seed(2)
    boxes = F.normalize(torch.randn(options.boxes, options.width, generator=g), dim=1).numpy()
    words = F.normalize(torch.randn(DISTINCT, options.width, generator=g), dim=1)
    share = (1 / torch.arange(1, DISTINCT + 1).double()).expand(options.texts, -1)
    index = torch.multinomial(share, options.keywords, generator=g).numpy()
    texts = Fragments(words.numpy(), index, index >= 0)
    relevant, class_of = labels(options)
    kinds = {"category": relevant, "lexical": relevant.roll(1, 1),
             "instance": torch.randint(options.texts, (options.boxes,), generator=g)}  # fmt: skip

    def score(rows):
        return best_fragments(crop_scores(boxes[rows.numpy()], words, frozen), texts)

    def each():
        return {
            name: average_precision_blocks(score, options.texts, one, class_of) for name, one in kinds.items()
        }

    def once():
        return average_precision_blocks(score, options.texts, kinds, class_of)

    assert once() == each(), "one scoring changes no number"
    found = {"once": [], "each": []}
    for _ in range(ROUNDS):
        for name, way in (("each", each), ("once", once)):
            one = clock(way)
            found[name].append({kind: one[kind] for kind in ("wall", "cpu")})
    best = {
        name: {kind: min(run[kind] for run in runs) for kind in ("wall", "cpu")}
        for name, runs in found.items()
    }
    return {
        "boxes": options.boxes,
        "distinct_keywords": DISTINCT,
        "threads": options.threads or 2,
        "seconds": best,
        "times_faster": {kind: best["each"][kind] / best["once"][kind] for kind in ("wall", "cpu")},
        "peak_bytes": own_peak(),
        "commit": git_commit(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--boxes", type=int, default=36800)
    parser.add_argument("--texts", type=int, default=5000)
    parser.add_argument("--keywords", type=int, default=10)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--threads", type=int, help="measure in this process, print, and stop")
    parser.add_argument("--only", choices=["relevances"], help="measure this part alone")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".json"))
    options = parser.parse_args()
    if options.only:
        content = json.loads(options.out.read_text()) if options.out.exists() else {}
        write_json(options.out, content | {"relevances": relevances(options)})
        return
    if options.threads:
        print(json.dumps(measure(options, options.threads)))
        return

    sizes = {name: getattr(options, name) for name in ("boxes", "texts", "keywords", "width")}
    arguments = [str(part) for name, value in sizes.items() for part in (f"--{name}", value)]
    by_threads = {}
    for threads in (2, 1):
        done = subprocess.run(
            [sys.executable, __file__, *arguments, "--threads", str(threads)],
            env=os.environ | {"OMP_NUM_THREADS": str(threads)},
            capture_output=True,
            text=True,
        )
        if done.returncode:
            sys.exit(done.stderr)
        by_threads[str(threads)] = json.loads(done.stdout)
    content = {
        "parameters": sizes | {"classes": CLASSES, "block": BLOCK, "scores": SCORES, "tile": TILE},
        "operations": 2 * options.boxes * options.texts * options.keywords * options.width,
        "threads": by_threads,
        "relevances": relevances(options),
        "device": device_name(),
        "machine_was_shared": by_threads["2"]["load_average"][0] > 0.5,  # before any of this began
        "versions": versions(),
        "commit": git_commit(),
    }
    write_json(options.out, content)
    print(json.dumps(content, indent=1))


if __name__ == "__main__":
    main()
