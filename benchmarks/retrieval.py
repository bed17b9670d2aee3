"""Speed and memory of retrieval evaluation at the size of COCO 5K: 5,000 images x 25,000 captions, both ways.

Ours (`finematch.evaluation.retrieval`) against a loop as the field's evaluators have it: for every query one
vector-matrix product, one argsort, and a search for the true answers. Both from embeddings (what a two-stream
model gives) and from a given score matrix (what a pairwise model gives). The numbers must agree.

The floor is one matrix product, 2 b c d operations, at the rate this machine reaches on a square product.
Memory is the growth of a fresh process's peak while it evaluates, beside what the score matrix would take.

    python benchmarks/retrieval.py          writes benchmarks/retrieval.json (3 minutes on 2 cores)
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "2")

import numpy as np
import torch
from torch.nn import functional as F

from finematch.evaluation.retrieval import BLOCK, retrieval, retrieval_from_scores
from finematch.files import write_json
from finematch.runs import git_commit, versions
from finematch.training import device_name

CAPTIONS = 5


def embeddings(images: int, width: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Random unit vectors; captions scatter about their image so that recall is neither 0 nor 100 %."""
    generator = torch.Generator().manual_seed(0)
    image = F.normalize(torch.randn(images, width, generator=generator), dim=1)
    image_of = torch.arange(images).repeat_interleave(CAPTIONS)
    noise = F.normalize(torch.randn(len(image_of), width, generator=generator), dim=1)
    return image, F.normalize(0.1 * image[image_of] + noise, dim=1), image_of


def argsort_loop(rows, columns, image_of: np.ndarray) -> dict:
    """The field's evaluator; `rows(i)` are the scores of image i, `columns(j)` those of caption j."""
    i2t = np.zeros(image_of[-1] + 1)
    for i in range(len(i2t)):
        order = np.argsort(rows(i))[::-1]
        own = range(CAPTIONS * i, CAPTIONS * (i + 1))
        i2t[i] = min(np.where(order == caption)[0][0] for caption in own)
    t2i = np.zeros(len(image_of))
    for j in range(len(t2i)):
        order = np.argsort(columns(j))[::-1]
        t2i[j] = np.where(order == image_of[j])[0][0]
    result = {}
    for name, rank in (("i2t", i2t), ("t2i", t2i)):
        result |= {f"{name}_r{k}": 100 * np.mean(rank < k) for k in (1, 5, 10)}
        result |= {f"{name}_medr": np.floor(np.median(rank)) + 1, f"{name}_meanr": rank.mean() + 1}
    return result


def seconds(function, repeats: int) -> dict:
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return {"min": min(times), "median": statistics.median(times), "repeats": repeats}


def largest_difference(ours: dict, theirs: dict) -> float:
    """Over recalls (in points) and ranks; asserts that they are the same numbers.

    From embeddings the loop's vector products round differently from ours, so that a query in thousands whose
    two best answers differ in the last bit may move: 0.02 points are allowed, 5 of 25,000 queries.
    """
    difference = max(abs(ours[name] - theirs[name]) for name in theirs)
    assert difference <= 0.02, (ours, theirs)
    return difference


def peak_growth(images: int, width: int, block: int) -> int:
    """Bytes by which a fresh process's peak grows while it evaluates from embeddings (run as a child)."""
    command = [sys.executable, __file__, "--memory", "--images", str(images), "--width", str(width)]
    done = subprocess.run([*command, "--block", str(block)], capture_output=True, text=True, check=True)
    return int(done.stdout)


def print_peak_growth(images: int, width: int, block: int) -> None:
    image, text = torch.randn(images, width), torch.randn(CAPTIONS * images, width)  # no temporaries
    image_of = torch.arange(images).repeat_interleave(CAPTIONS)
    small = 64
    retrieval(image[:small], text[: CAPTIONS * small], image_of[: CAPTIONS * small])  # load the libraries
    before = own_peak()
    retrieval(image, text, image_of, block=block)
    growth = own_peak() - before
    assert growth > 0, "the peak did not move: this measurement says nothing"
    print(growth)


def own_peak() -> int:
    """Peak bytes of this process alone (Linux); getrusage's peak is inherited from the parent process."""
    status = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in status if line.startswith("VmHWM"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=5000)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--block", type=int, default=BLOCK)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument(
        "--memory", action="store_true", help="print the growth of the peak in bytes, and stop"
    )
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".json"))
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.memory:
        print_peak_growth(options.images, options.width, options.block)
        return

    image, text, image_of = embeddings(options.images, options.width)
    b, c, d = len(image), len(text), options.width
    side = 2048
    square = torch.randn(side, side)
    retrieval(image[:64], text[: 64 * CAPTIONS], image_of[: 64 * CAPTIONS])

    scores = image @ text.T
    load = {"before": os.getloadavg()[0]}
    ours = seconds(lambda: retrieval(image, text, image_of, block=options.block), options.repeats)
    gemm = seconds(lambda: square @ square, 3 * options.repeats)
    given = seconds(lambda: retrieval_from_scores(scores, image_of, block=options.block), options.repeats)
    load["after_ours"] = os.getloadavg()[0]
    rate = 2 * side**3 / gemm["min"]
    floor = 2 * b * c * d / rate
    result = retrieval(image, text, image_of, block=options.block)
    result_given = retrieval_from_scores(scores, image_of, block=options.block)

    x, y, matrix, owner = image.numpy(), text.numpy(), scores.numpy(), image_of.numpy()
    theirs, theirs_given = {}, {}
    loop_given = seconds(
        lambda: theirs_given.update(argsort_loop(lambda i: matrix[i], lambda j: matrix[:, j], owner)), 1
    )
    loop = seconds(lambda: theirs.update(argsort_loop(lambda i: x[i] @ y.T, lambda j: y[j] @ x.T, owner)), 1)
    load["after_loop"] = os.getloadavg()[0]
    difference = largest_difference(result, theirs)
    difference_given = largest_difference(result_given, theirs_given)
    matrix_bytes = scores.numel() * 4
    del scores, matrix

    content = {
        "parameters": {
            "images": b,
            "captions": c,
            "width": d,
            "block": options.block,
            "threads": options.threads,
        },
        "embeddings_to_recall": {
            "ours_seconds": ours,
            "argsort_loop_seconds": loop["min"],
            "times_faster": loop["min"] / ours["median"],
            "largest_difference": difference,
            "floor_seconds": floor,
            "floor": f"2 b c d operations at {rate / 1e9:.0f} GFLOP/s, float32, {side} x {side} x {side}",
            "times_the_floor": ours["min"] / floor,
        },
        "given_matrix_to_recall": {
            "ours_seconds": given,
            "argsort_loop_seconds": loop_given["min"],
            "times_faster": loop_given["min"] / given["median"],
            "largest_difference": difference_given,
        },
        "memory": {
            "peak_growth_bytes": {str(k): peak_growth(b, d, k) for k in (100, options.block, 1000)},
            "score_matrix_bytes": matrix_bytes,
            "what": "by images a tile; a tile of k images holds 5 k² scores of 4 bytes",
        },
        "ties": {"i2t": result["ties_i2t"], "t2i": result["ties_t2i"]},
        "recall": {name: value for name, value in result.items() if "_r" in name},
        "load_average": load,
        "device": device_name(),
        "versions": versions(),
        "commit": git_commit(),
    }
    write_json(options.out, content)
    print(json.dumps(content, indent=1))


if __name__ == "__main__":
    main()
