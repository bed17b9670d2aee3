"""A training step of MVAM: seconds, where they go, and how far that is from the floor.

Three setups with random inputs of the right shape, as the presets have them: Flickr8k (49 cells of MobileNetV2,
cached MiniLM states), scenes (regions of the attribute net, a small BERT from scratch) and the paper's CLIP (ViT-B/32,
77 tokens, 8 pairs, for a CPU), each with the projected first token ("cls": the bare towers), mean pooling, one view
("attention") and 16 views. The pooling head alone is timed too, against [CLS]'s projection.

The floor is the multiply-adds of a step's matrix products (torch.utils.flop_counter, forward and backward) at
the fp32 rate that this machine reaches on a square product, timed in turn with the steps; the least times are
compared. What exceeds the floor is elementwise work, dropout's random numbers and memory traffic.

With one thread the clock is the process's own (CPU seconds): other work on the machine does not count;
with more it is the wall's, and the machine should be quiet.

Peak memory is that of a fresh process that does a few steps, less what it holds before its first one.

    python benchmarks/mvam_step.py          writes benchmarks/mvam_step.json (2 minutes on one core)
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import date
from itertools import pairwise
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from tabulate import tabulate
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import CLIPConfig

from finematch.config import preset
from finematch.encoders import (
    BertTower,
    CLIPText,
    CLIPVision,
    Tokens,
    TokenTransformer,
    open_clip_model,
    small_bert,
)
from finematch.files import write_json
from finematch.models.configs import MVAMConfig
from finematch.models.mvam import MVAM, TokenPooling, ViewAttention
from finematch.runs import git_commit, versions
from finematch.training import Plan, device_name, make_optimizer

VIEWS = 16
SIDE = 1024  # of the square product that gives the machine's rate
POOLINGS = ("cls", "mean", "attention", "mvam")
BATCH, PAPER_BATCH = 128, 8


def flickr8k() -> tuple[tuple, dict]:
    """Grid cells of MobileNetV2 (49 x 1280) and 16 cached MiniLM states (384-d) a caption."""
    s = preset("mvam", "photos")
    eye = TokenTransformer(1280, width=s["width"], depth=s["depth"], boxes=True)
    words = TokenTransformer(384, width=s["width"], depth=1, token=False)
    text = {"features": torch.randn(BATCH, 16, 384), "mask": real_words(16), "special": ends(16)}
    return (eye, words), {"image": pictures(49, 1280), "text": text}


def scenes() -> tuple[tuple, dict]:
    """Regions of the attribute net (128-d), and 15 words of the embedded set through a small BERT."""
    s = preset("mvam", "tiny")
    eye = TokenTransformer(128, width=s["width"], depth=s["depth"], boxes=True)
    words = BertTower(small_bert(164, width=s["width"], depth=s["depth"]))
    text = {"input_ids": torch.randint(5, 164, (BATCH, 15)), "mask": real_words(15), "special": ends(15)}
    return (eye, words), {"image": pictures(s["regions"], 128), "text": text}


def paper() -> tuple[tuple, dict]:
    """CLIP ViT-B/32 at 224 px, and captions of up to 30 of its 77 tokens."""
    clip = open_clip_model(CLIPConfig())
    ids = torch.randint(1, 49406, (PAPER_BATCH, 77))
    ends_at = torch.arange(23, 23 + PAPER_BATCH)
    ids[torch.arange(PAPER_BATCH), ends_at] = clip.config.text_config.eos_token_id
    mask = torch.arange(77)[None] <= ends_at[:, None]
    text = {"input_ids": ids, "mask": mask, "special": ids == clip.config.text_config.eos_token_id}
    return (CLIPVision(clip), CLIPText(clip)), {
        "image": {"pixels": torch.randn(PAPER_BATCH, 3, 224, 224)},
        "text": text,
    }


def pictures(n: int, width: int) -> dict[str, Tensor]:
    """Features, mask and places of a batch of pictures."""
    return {"features": torch.randn(BATCH, n, width), "mask": torch.ones(BATCH, n, dtype=torch.bool),
            "places": torch.rand(BATCH, n, 5)}  # fmt: skip


def real_words(n: int) -> Tensor:
    """Captions of 9 to `n` tokens, one at least of `n`."""
    lengths = torch.randint(9, n + 1, (BATCH,))
    lengths[0] = n
    return torch.arange(n)[None] < lengths[:, None]


def ends(n: int) -> Tensor:
    special = torch.zeros(BATCH, n, dtype=torch.bool)
    special[:, 0] = True
    return special


SETUPS = {"flickr8k": (flickr8k, "photos"), "scenes": (scenes, "tiny"), "paper": (paper, "paper")}


def clock() -> float:
    """CPU seconds of this process where it has one thread, else the wall's."""
    return time.process_time() if torch.get_num_threads() == 1 else time.perf_counter()


class Step:
    """One training step in its parts, as `fit` does it: forward, backward, and clipping with AdamW."""

    def __init__(self, setup: str, pooling: str):
        make, scale = SETUPS[setup]
        torch.manual_seed(0)
        towers, batch = make()
        s = preset("mvam", scale)
        pairs = len(batch["text"]["mask"])
        self.batch = {**batch, "image_id": torch.arange(pairs)}
        config = MVAMConfig(
            pooling=pooling, views=VIEWS, total_dim=s["total_dim"], diversity_weight=s["diversity_weight"]
        )
        self.model = MVAM(*towers, config).train()
        plan = Plan(epochs=1, batch_size=pairs, lr=1e-6, weight_decay=s["weight_decay"])
        self.parameters = list(self.model.parameters())
        self.optimizer = make_optimizer(self.parameters, plan)

    def __call__(self) -> dict[str, float]:
        """Seconds of each part."""
        times = [clock()]
        loss = self.model(self.batch)["loss"]
        times.append(clock())
        loss.backward()
        times.append(clock())
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        times.append(clock())
        parts = [after - before for before, after in pairwise(times)]
        return {"step": sum(parts), **dict(zip(("forward", "backward", "optimiser"), parts, strict=True))}

    def operations(self) -> int:
        """Floating-point operations (two a multiply-add) of the matrix products, forward and backward."""
        # the counter knows attention by its products, not the CPU's fused kernel
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            self.model(self.batch)["loss"].backward()
        self.optimizer.zero_grad(set_to_none=True)
        return counter.get_total_flops()


def head(pooling: str, setup: str) -> "Job":
    """Forward and backward of a picture's pooling head alone, on states of the setup's shape."""
    s = preset("mvam", SETUPS[setup][1])
    torch.manual_seed(0)
    n, pairs = (s["regions"] if setup == "scenes" else 49) + 1, PAPER_BATCH if setup == "paper" else BATCH
    if pooling == "cls":
        module = TokenPooling(s["width"], s["total_dim"])
    else:
        module = ViewAttention(s["width"], views=VIEWS, total_dim=s["total_dim"])
    states = torch.randn(pairs, n, s["width"], requires_grad=True)
    mask = torch.ones(pairs, n, dtype=torch.bool)
    gradient = torch.randn(pairs, s["total_dim"])

    def run() -> dict[str, float]:
        start = clock()
        module(Tokens(states, mask, ~mask, states[:, 0])).vector.backward(gradient)
        seconds = clock() - start
        module.zero_grad(set_to_none=True)
        states.grad = None
        return {"step": seconds}

    return run


def product() -> "Job":
    """The square product whose rate is the machine's."""
    a, b = torch.randn(2, SIDE, SIDE)
    out = torch.empty(SIDE, SIDE)

    def run() -> dict[str, float]:
        start = clock()
        torch.mm(a, b, out=out)
        return {"step": clock() - start}

    return run


Job = Callable[[], dict[str, float]]


def in_turn(jobs: dict[str, Job], repeats: int) -> dict[str, list[dict[str, float]]]:
    """Every job once a round, so that a busy moment of the machine meets all of them."""
    found: dict[str, list] = {name: [] for name in jobs}
    for job in jobs.values():
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


def own_peak() -> int:
    """Peak bytes of this process alone (Linux); getrusage's peak is inherited from the parent process."""
    status = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in status if line.startswith("VmHWM"))


def print_peak_growth(setup: str, pooling: str) -> None:
    step = Step(setup, pooling)
    before = own_peak()
    for _ in range(3):
        step()
    growth = own_peak() - before
    assert growth > 0, "the peak did not move: this measurement says nothing"
    print(growth)


def peak_growth(setup: str, pooling: str) -> int:
    """Bytes by which a fresh process's peak grows with its first steps (run as a child)."""
    command = [sys.executable, __file__, "--memory", setup, pooling]
    return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument(
        "--memory",
        nargs=2,
        metavar=("SETUP", "POOLING"),
        help="print the growth of the peak in bytes, and stop",
    )
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".json"))
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.memory:
        print_peak_growth(*options.memory)
        return

    given = {"batch": BATCH, "views": VIEWS, "threads": options.threads, "repeats": options.repeats,
             "clock": "CPU seconds" if options.threads == 1 else "wall seconds"}  # fmt: skip
    content: dict = {"parameters": given}
    rows = []
    for setup, (_, scale) in SETUPS.items():
        steps = {pooling: Step(setup, pooling) for pooling in POOLINGS}
        heads = {f"{pooling} head": head(pooling, setup) for pooling in ("cls", "mvam")}
        found = in_turn({"product": product(), **steps, **heads}, options.repeats)
        times = {name: summary(runs) for name, runs in found.items()}
        rate = 2 * SIDE**3 / times["product"]["min"]
        settings = {name: preset("mvam", scale)[name] for name in ("width", "depth", "total_dim")}
        content[setup] = {"settings": settings, "flop_per_second": rate}
        for pooling, step in steps.items():
            t, operations = times[pooling], step.operations()
            line = {
                "seconds": t,
                "operations": operations,
                "floor_seconds": operations / rate,
                "times_the_floor": t["min"] * rate / operations,
                "peak_growth_bytes": peak_growth(setup, pooling),
            }
            content[setup][pooling] = line
            parts = (t[name] for name in ("median", "min", "forward", "backward", "optimiser"))
            rows.append([setup, pooling, *(1e3 * part for part in parts), 1e3 * line["floor_seconds"],
                         line["times_the_floor"], line["peak_growth_bytes"] / 1e6])  # fmt: skip
        both = zip(found["mvam"], found["cls"], strict=True)
        content[setup]["method_over_towers"] = statistics.median(a["step"] / b["step"] for a, b in both)
        ratio = times["mvam head"]["min"] / times["cls head"]["min"]
        content[setup]["heads"] = {**{name: times[name] for name in heads}, "mvam_over_cls": ratio}
        rows += [[setup, name, 1e3 * times[name]["median"], 1e3 * times[name]["min"]] for name in heads]
        print(f"{setup}: {rate / 1e9:.0f} GFLOP/s on a square product, {options.threads} thread(s)")

    content |= {
        "device": device_name(),
        "versions": versions(),
        "commit": git_commit(),
        "date": str(date.today()),
    }
    write_json(options.out, content)
    columns = "setup, pooling, median ms, min ms, forward, backward, optimiser, floor ms, x floor, MB"
    print(tabulate(rows, columns.split(", "), floatfmt=".4g"))


if __name__ == "__main__":
    main()
