"""A training step of FELGA at the paper's size: steps a second, where the time goes, and how far from the floor.

8 pairs of 10 regions and 10 keywords, random features of 512 (CLIP's), FENet 512-4096-4096-512: what the time
depends on. A step is what `fit` does with a batch: gather it, forward, backward, SGD.

The floor is FENet's own matrix products, those of the forward and the backward pass, at the same shapes into
memory that is already there, timed in turn with the steps. A second floor is the update's: SGD with momentum
reads three arrays of 21 M parameters (weight, gradient, momentum) and writes two; at the rate at which this
machine copies arrays of that size, that takes as long as it says. The least times are compared.

SGD is timed in three forms: a loop of operators (`loop`, torch's default on a CPU), `foreach` and `fused`; `fit`
is whatever `finematch.training` makes. `huge pages` is a process of its own with THP_MEM_ALLOC_ENABLE=1, where
the weights' gradients, 84 MB made anew at each step, are mapped in pages of 2 MB. `tiny` is the embedded set's
step, for which operators' overhead counts, not the products.

With one thread the clock is the process's own (CPU seconds): other work on the machine does not count;
with more it is the wall's, and the machine should be quiet.

    python benchmarks/felga_step.py          writes benchmarks/felga_step.json (1 minute on one core)
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from tabulate import tabulate
from torch import Tensor, nn

from finematch.config import preset
from finematch.files import write_json
from finematch.models.configs import FELGAConfig
from finematch.models.felga import FELGA, FragmentPairs
from finematch.runs import git_commit, versions
from finematch.training import Plan, device_name, make_optimizer

PAIRS = 256
GOAL = 0.7
UPDATE = {"loop": {"foreach": False}, "foreach": {"foreach": True}, "fused": {"fused": True}}
PARTS = ("gather", "forward", "backward", "optimiser")


def clock() -> float:
    """CPU seconds of this process where it has one thread, else the wall's."""
    return time.process_time() if torch.get_num_threads() == 1 else time.perf_counter()


class Step:
    """One training step in its parts, as `fit` does it; `update` is a form of SGD, or `fit` for fit's own."""

    def __init__(self, scale: str, width: int, update: str):
        s = preset("felga", scale)
        torch.manual_seed(0)
        self.size = s["batch_size"]
        n, m = s["regions"], s["words"]
        self.data = FragmentPairs(
            torch.randn(PAIRS, n, width), torch.randn(PAIRS, m, width),
            torch.ones(PAIRS, n, dtype=torch.bool), torch.ones(PAIRS, m, dtype=torch.bool),
        )  # fmt: skip
        form = {name: s[name] for name in ("hidden_dim", "out_dim", "dropout")}
        self.model = FELGA(width, FELGAConfig(**form, global_negatives="all")).train()  # as the kept numbers
        plan = Plan(epochs=1, batch_size=self.size, lr=1e-3, optimizer="sgd", momentum=s["momentum"],
                    weight_decay=s["weight_decay"])  # fmt: skip
        self.optimizer = make_optimizer(list(self.model.parameters()), plan)
        if update != "fit":
            groups = [{k: v for k, v in group.items() if k in ("params", "lr", "momentum", "weight_decay")}
                      for group in self.optimizer.param_groups]  # fmt: skip
            self.optimizer = torch.optim.SGD(groups, **UPDATE[update])

    def __call__(self) -> dict[str, float]:
        """Seconds of each part."""
        times = [clock()]
        batch = self.data.__getitems__(torch.randperm(PAIRS)[: self.size].tolist())
        times.append(clock())
        loss = self.model(batch)["loss"]
        times.append(clock())
        loss.backward()
        times.append(clock())
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        times.append(clock())
        seconds = [after - before for before, after in pairwise(times)]
        return {"step": sum(seconds), **dict(zip(PARTS, seconds, strict=True))}


class Products:
    """The matrix products of one step of `model`'s FENet, forward and backward, and nothing else."""

    def __init__(self, model: FELGA, rows: int):
        self.layers = []
        for layer in model.region_net:
            if isinstance(layer, nn.Linear):
                n, d = layer.weight.shape
                places = (torch.empty(rows, n), torch.empty(n, d), torch.empty(rows, d))
                self.layers.append(
                    (layer.weight.detach(), torch.randn(rows, d), torch.randn(rows, n), places)
                )

    def __call__(self) -> dict[str, float]:
        start = clock()
        for weight, x, gradient, (y, of_weight, of_x) in self.layers:
            torch.mm(x, weight.T, out=y)
            torch.mm(gradient.T, x, out=of_weight)
            if weight is not self.layers[0][0]:  # frozen features need no gradient
                torch.mm(gradient, weight, out=of_x)
        return {"step": clock() - start}

    def operations(self) -> int:
        """Two a multiply-add."""
        one = [2 * len(x) * weight.numel() for weight, x, _, _ in self.layers]
        return 3 * sum(one) - one[0]


def copies(parameters: list[Tensor]) -> Callable[[], dict[str, float]]:
    """Arrays of the parameters' sizes, each read once and written once."""
    of, to = [p.detach() for p in parameters], [torch.empty_like(p) for p in parameters]

    def run() -> dict[str, float]:
        start = clock()
        for a, b in zip(of, to, strict=True):
            b.copy_(a)
        return {"step": clock() - start}

    return run


def masks(model: FELGA, rows: int) -> Callable[[], dict[str, float]]:
    """Dropout's random numbers for one step, and nothing else."""
    layers = [layer for layer in model.region_net if isinstance(layer, nn.Linear)][:-1]
    out = [torch.empty(rows, layer.out_features) for layer in layers]

    def run() -> dict[str, float]:
        start = clock()
        for mask in out:
            mask.bernoulli_(0.8)
        return {"step": clock() - start}

    return run


def in_turn(jobs: dict, repeats: int) -> dict[str, list[dict[str, float]]]:
    """Every job once a round, so that a busy moment of the machine meets all of them."""
    found: dict[str, list] = {name: [] for name in jobs}
    for job in jobs.values():  # the first makes momentum and fills caches
        job()
    for _ in range(repeats):
        for name, job in jobs.items():
            found[name].append(job())
    return found


def summary(runs: list[dict[str, float]]) -> dict[str, float]:
    """Median and least seconds of a step, and the parts of the least."""
    best = min(runs, key=lambda run: run["step"])
    return {"median": statistics.median(run["step"] for run in runs), "min": best["step"],
            **{part: value for part, value in best.items() if part != "step"}}  # fmt: skip


def measure(scale: str, width: int, updates: list[str], repeats: int) -> dict:
    """The floors and a step with each form of SGD, in turn."""
    steps = {update: Step(scale, width, update) for update in updates}
    model = steps[updates[0]].model
    s = preset("felga", scale)
    rows = s["batch_size"] * (s["regions"] + s["words"])
    products = Products(model, rows)
    parameters = list(model.parameters())
    alone = {"products": products, "copy": copies(parameters), "masks": masks(model, rows)}
    found = in_turn({**alone, **steps}, repeats)
    times = {name: summary(runs) for name, runs in found.items()}
    count = sum(p.numel() for p in parameters)
    floor, copy = times["products"]["min"], times["copy"]["min"]
    return {
        "width": width,
        "parameters": count,
        "operations": products.operations(),
        "floor_seconds": floor,
        "floor_flop_per_second": products.operations() / floor,
        "copy_bytes_per_second": 2 * 4 * count / copy,
        "update_floor_seconds": 5 / 2 * copy,
        "dropout_masks_seconds": times["masks"]["min"],
        "steps": {
            name: {
                "seconds": times[name],
                "steps_per_second": 1 / times[name]["min"],
                "share_of_floor": floor / times[name]["min"],
                "share_of_both_floors": (floor + 5 / 2 * copy) / times[name]["min"],
            }
            for name in steps
        },
    }


def with_huge_pages(repeats: int, threads: int) -> dict:
    """`measure` at the paper's size in a process whose arrays lie in pages of 2 MB (run as a child)."""
    command = [sys.executable, __file__, "--child", f"--repeats={repeats}", f"--threads={threads}"]
    environment = {**os.environ, "THP_MEM_ALLOC_ENABLE": "1"}
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=environment)
    return json.loads(done.stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--child", action="store_true", help="print the paper's size as JSON, and stop")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".json"))
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.child:
        print(json.dumps(measure("paper", 512, ["fit", "fused"], options.repeats)))
        return

    setups = {
        "paper": measure("paper", 512, ["fit", *UPDATE], options.repeats),
        "paper, huge pages": with_huge_pages(options.repeats, options.threads),
        "tiny": measure("tiny", 128, ["fit", "fused"], 20 * options.repeats),
    }
    content = {
        "parameters": {"threads": options.threads, "repeats": options.repeats, "goal": GOAL,
                       "clock": "CPU seconds" if options.threads == 1 else "wall seconds"},
        "setups": setups, "reached": setups["paper"]["steps"]["fit"]["share_of_floor"] >= GOAL,
        "device": device_name(), "versions": versions(), "commit": git_commit(),
    }  # fmt: skip
    write_json(options.out, content)
    rows = []
    for setup, found in setups.items():
        print(f"{setup}: products {1e3 * found['floor_seconds']:.2f} ms "
              f"({found['floor_flop_per_second'] / 1e9:.0f} GFLOP/s), "
              f"update's memory {1e3 * found['update_floor_seconds']:.2f} ms "
              f"({found['copy_bytes_per_second'] / 1e9:.1f} GB/s), "
              f"dropout's masks {1e3 * found['dropout_masks_seconds']:.2f} ms")  # fmt: skip
        for update, step in found["steps"].items():
            times = [1e3 * step["seconds"][name] for name in ("median", "min", *PARTS)]
            rows.append([setup, update, step["steps_per_second"], *times, step["share_of_floor"],
                         step["share_of_both_floors"]])  # fmt: skip
    columns = ["setup", "SGD", "steps/s", "median ms", "min ms", *PARTS, "of the floor", "of both"]
    print(tabulate(rows, columns, floatfmt=".3g"))


if __name__ == "__main__":
    main()
