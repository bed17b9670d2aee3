"""RoI pooling forward and backward, at the size of a SLAN level: 8 pictures, 10 regions, 9 neighbours of each.

torchvision's `roi_align` with averaging against ours, on maps of 256 x 56 x 56:

* torchvision: 7 x 7 bins of 2 x 2 samples, then the mean; and a coarse 3 x 3 bins. Gradients to the features alone, it
  has none to the boxes.
* grid_sample: torch's bilinear sampling at the same 14 x 14 points, then the mean; gradients to both.
* roi_align_mean: the same value as torchvision's by one matrix product; gradients to both.
* neighbourhood_mean: the same of whole neighbourhoods, whose boxes share their edges: what a level calls.
* box_mean: the exact mean by a summed-area table, the table included; gradients to both. "read" is one more reading
  of a table that is there already.

Every job ends with the gradients in the layout of the features (b c h w). The yardstick is one copy of the features.
With one thread the clock is the process's own (CPU seconds): other work on the machine does not count; with more
it is the wall's, and the machine should be quiet: a busy core there holds up whoever waits for both. Ratios are of
least times.

Errors are those of float32 against float64 for boxes of one size anywhere on a map, on noise, on noise far from
0, and on a ramp, whose sums grow most; in units of the map's standard deviation. "plain table" has the mean left in.

    python benchmarks/roi_pooling.py          writes benchmarks/roi_pooling.json (less than a minute on 2 cores)
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "2")

import torch
import torch.nn.functional as F
from tabulate import tabulate
from torch import Tensor
from torchvision.ops import roi_align

from finematch.boxes import (
    AreaTable,
    box_mean,
    neighbourhood,
    neighbourhood_mean,
    roi_align_mean,
    summed_area,
)
from finematch.files import write_json
from finematch.runs import git_commit, versions
from finematch.training import device_name

SIDES = (0.25, 0.5, 1, 4, 16)  # cells, of the boxes whose errors are measured
COUNTS = (10, 90, 360)  # boxes a picture


def regions(pictures: int, count: int) -> Tensor:
    """Random boxes of a tenth to a half of the picture, "b r 4" in [0, 1]."""
    generator = torch.Generator().manual_seed(0)
    uniform = torch.rand(pictures, count, 4, generator=generator)
    size = 0.1 + 0.4 * uniform[..., 2:]
    low = uniform[..., :2] * (1 - size)
    return torch.cat([low, low + size], dim=-1)


def torchvision_mean(bins: int) -> Callable[[Tensor, Tensor], Tensor]:
    def pool(features: Tensor, boxes: Tensor) -> Tensor:
        h, w = features.shape[2:]
        cells = list(boxes.detach() * torch.tensor([w, h, w, h]))
        pooled = roi_align(features, cells, bins, sampling_ratio=2, aligned=True)
        return pooled.mean((2, 3)).unflatten(0, boxes.shape[:2])

    return pool


def grid_sample_mean(features: Tensor, boxes: Tensor, samples: int = 14) -> Tensor:
    steps = (torch.arange(samples) + 0.5) / samples
    low, size = boxes[..., :2], boxes[..., 2:] - boxes[..., :2]
    x = (low[..., :1] + steps * size[..., :1])[:, :, None, :]
    y = (low[..., 1:] + steps * size[..., 1:])[:, :, :, None]
    at = 2 * torch.stack(torch.broadcast_tensors(x, y), dim=-1).flatten(2, 3) - 1
    return F.grid_sample(features, at, padding_mode="border", align_corners=False).mean(3).mT


def table_mean(features: Tensor, boxes: Tensor) -> Tensor:
    return box_mean(summed_area(features), boxes)


POOLINGS = {
    "torchvision": torchvision_mean(7),
    "torchvision_3x3": torchvision_mean(3),
    "grid_sample": grid_sample_mean,
    "roi_align_mean": roi_align_mean,
    "box_mean": table_mean,
}


def clock() -> float:
    """CPU seconds of this process where it has one thread, else the wall's."""
    return time.process_time() if torch.get_num_threads() == 1 else time.perf_counter()


Job = Callable[[], dict[str, float]]


def job(pool: Callable[[Tensor, Tensor], Tensor], features: Tensor, boxes: Tensor, upstream: Tensor) -> Job:
    """Forward, and backward to whatever of the two it can reach."""

    def run() -> dict[str, float]:
        leaves = [features.requires_grad_(), boxes.requires_grad_()]
        start = clock()
        pooled = pool(*leaves)
        middle = clock()
        gradients = torch.autograd.grad(pooled, leaves, upstream, allow_unused=True)
        gradients[0].contiguous()
        end = clock()
        return {"both": end - start, "forward": middle - start, "backward": end - middle}

    return run


def read(features: Tensor, boxes: Tensor, upstream: Tensor) -> Job:
    """One more reading of a table, and backward to the table."""
    table = AreaTable(*(part.detach() for part in summed_area(features)))

    def pool(sums: Tensor, boxes: Tensor) -> Tensor:
        return box_mean(table._replace(sums=sums), boxes)

    return job(pool, table.sums, boxes, upstream)


def copy(features: Tensor) -> Job:
    def run() -> dict[str, float]:
        start = clock()
        features.detach().clone()
        return {"both": clock() - start}

    return run


def in_turn(jobs: dict[str, Job], repeats: int) -> dict[str, dict[str, float]]:
    """Every job once a round, so that a busy moment of the machine meets all of them; median, and the parts of
    the least."""
    runs: dict[str, list] = {name: [] for name in jobs}
    for one in jobs.values():
        one()
    for _ in range(repeats):
        for name, one in jobs.items():
            runs[name].append(one())
    found = {}
    for name, times in runs.items():
        best = min(times, key=lambda run: run["both"])
        found[name] = {"median": statistics.median(run["both"] for run in times), "min": best["both"],
                       **{part: value for part, value in best.items() if part != "both"}}  # fmt: skip
    return found


def errors(side: int) -> dict[str, dict[str, dict[str, float]]]:
    """Largest errors of float32 on a map of `side` x `side` cells, by map and size of box."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(2, 16, side, side, generator=generator)
    ramp = torch.linspace(-1, 1, side).expand(2, 16, side, side)
    result: dict = {}
    for name, features in (("noise", noise), ("noise + 10", noise + 10), ("ramp", ramp)):
        unit = features.std().item()
        plain = F.pad(features.cumsum(2).cumsum(3), (1, 0, 1, 0)).permute(0, 2, 3, 1).contiguous()
        tables = {"table": summed_area(features), "plain table": AreaTable(plain, torch.zeros(2, 16))}
        result[name] = {}
        for cells in SIDES:
            low = torch.rand(2, 500, 2, generator=generator) * (1 - cells / side)
            boxes = torch.cat([low, low + cells / side], dim=-1)
            exact = table_mean(features.double(), boxes.double())
            sampled = roi_align_mean(features.double(), boxes.double())
            found = {key: box_mean(table, boxes) - exact for key, table in tables.items()}
            found["roi_align_mean"] = roi_align_mean(features, boxes) - sampled
            result[name][f"{cells:g}"] = {key: e.abs().max().item() / unit for key, e in found.items()}
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pictures", type=int, default=8)
    parser.add_argument("--regions", type=int, default=10)
    parser.add_argument("--k", type=int, default=3, help="a side of the neighbourhood")
    parser.add_argument("--channels", type=int, default=256)
    parser.add_argument("--side", type=int, default=56, help="cells a side of the map")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".json"))
    options = parser.parse_args()

    torch.manual_seed(0)
    b, side = options.pictures, options.side
    features = torch.randn(b, options.channels, side, side)
    boxes = neighbourhood(regions(b, options.regions), options.k, 0.5).flatten(1, 2)
    upstream = torch.randn(*boxes.shape[:2], options.channels)

    def together(features: Tensor, boxes: Tensor) -> Tensor:
        return neighbourhood_mean(features, boxes.unflatten(1, (options.regions, -1))).flatten(1, 2)

    poolings = POOLINGS | {"neighbourhood_mean": together}

    # the same numbers, wherever boxes lie; grid_sample has another rule outside the picture
    inside = ((boxes >= 0) & (boxes <= 1)).all(-1)
    with torch.no_grad():
        wanted = POOLINGS["torchvision"](features, boxes)
        difference = {name: (pool(features, boxes) - wanted).abs() for name, pool in poolings.items()}
    agreement = {
        name: {"inside": d[inside].max().item(), "anywhere": d.max().item()} for name, d in difference.items()
    }
    assert max(agreement[name]["anywhere"] for name in ("roi_align_mean", "neighbourhood_mean")) < 1e-4, (
        agreement
    )

    content: dict = {
        "parameters": {
            name: getattr(options, name) for name in ("pictures", "regions", "k", "channels", "side")
        }
        | {"repeats": options.repeats, "boxes_inside": inside.float().mean().item()}
    }
    rows = []
    for threads in options.threads:
        torch.set_num_threads(threads)
        load = os.getloadavg()[0]
        jobs = {name: job(pool, features, boxes, upstream) for name, pool in poolings.items()}
        times = in_turn(
            {"copy": copy(features), **jobs, "read": read(features, boxes, upstream)}, options.repeats
        )
        base = times["torchvision"]["min"]
        content[f"{threads}_threads"] = {
            "clock": "CPU seconds" if threads == 1 else "wall seconds",
            "load_average_before": load,
            "seconds": times,
            "times_faster_than_torchvision": {
                name: base / times[name]["min"] for name in times if name != "copy"
            },
        }
        for name, t in times.items():
            parts = (1e3 * t.get(part, float("nan")) for part in ("median", "min", "forward", "backward"))
            rows.append([threads, name, *parts, base / t["min"]])

    torch.set_num_threads(1)
    counts = {}
    for count in COUNTS:
        given = regions(b, count), torch.randn(b, count, options.channels)
        ours = {name: job(POOLINGS[name], features, *given) for name in ("roi_align_mean", "box_mean")}
        counts[str(count)] = {name: t["min"] for name, t in in_turn(ours, options.repeats).items()}
    content |= {
        "cpu_seconds_by_boxes_a_picture": counts,
        "largest_difference_from_torchvision": agreement,
        "largest_error_of_float32": errors(side),
        "device": device_name(),
        "versions": versions(),
        "commit": git_commit(),
    }
    write_json(options.out, content)
    print(
        tabulate(
            rows, ["threads", "pooling", "median ms", "min ms", "forward", "backward", "x"], floatfmt=".4g"
        )
    )
    print(counts, agreement, *content["largest_error_of_float32"].items(), sep="\n")


if __name__ == "__main__":
    main()
