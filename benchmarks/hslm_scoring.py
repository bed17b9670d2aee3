"""HSLM's pair scores: microseconds a pair, against the loop over captions and against the bare matrix product.

Every picture with every caption, at the paper's sizes: 60 pictures of 36 regions, 160 captions of 13 words on
average, 1,024-d, similarity vectors of 256. The loop (`tests/hslm_naive.py`) goes caption by caption, all pictures
of the block at once, as public code of such models does; it takes the same time for every caption, so a part of the
captions is timed. Both are timed in turn in one process.

`rank` is the scorer that ranks a split, `tile` the one that training keeps (its last bits decide which negatives are
the hardest); both do the same matrix products.

The floor is the operations of the fast scorer's own matrix products at the rate that this machine reaches on a
square product in the same run. `memory` is the growth of a fresh process's peak while it scores, for 40 and for
160 captions: it depends on the tile, not on the number of captions.

`--run` adds what bfloat16 products change in the ranking of a trained model.

    python benchmarks/hslm_scoring.py --run papermill_runs/hslm/scenes.tiny.row-12.s0     writes hslm_scoring.json
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from datetime import date
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from tabulate import tabulate
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

from hslm_naive import naive_scores

from finematch.files import write_json
from finematch.models.configs import HSLMConfig
from finematch.models.hslm import HSLM, Caption, Picture, score
from finematch.runs import git_commit, versions
from finematch.training import device_name

ROOT = Path(__file__).resolve().parents[1]
PICTURES, CAPTIONS, REGIONS, WIDTH, SIM, WORDS = 60, 160, 36, 1024, 256, 13
SIDE = 2048


def inputs(captions: int, cross: str) -> tuple[HSLM, Picture, Caption]:
    """A model with random weights, and encoded pictures and captions: the encoders are not part of the pairs."""
    torch.manual_seed(0)
    model = HSLM(8, 8, HSLMConfig(width=WIDTH, embed=8, sim=SIM, depth=0, cross=cross)).eval()

    def unit(*shape: int) -> torch.Tensor:
        return torch.nn.functional.normalize(torch.randn(*shape), dim=-1)

    lengths = torch.randint(WORDS - 5, WORDS + 6, (captions,))
    mask = torch.arange(WORDS + 5)[None] < lengths[:, None]
    picture = Picture(unit(PICTURES, REGIONS, WIDTH), torch.ones(PICTURES, REGIONS, dtype=torch.bool))
    return model, picture, Caption(unit(captions, WORDS + 5, WIDTH), mask, unit(captions, WIDTH))


def seconds(job) -> float:
    """CPU seconds of this process where it has one thread, for other work does not count then; else the wall's."""
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    start = clock()
    job()
    return clock() - start


@torch.no_grad()
def measure(cross: str, repeats: int, part: int) -> dict:
    model, picture, caption = inputs(CAPTIONS, cross)
    some = caption[torch.arange(0, CAPTIONS, CAPTIONS // part)]
    words = [w[m] for w, m in zip(some.words, some.mask, strict=True)]
    square = torch.randn(2, SIDE, SIDE)

    def fast(dtype=None, ranking=True):
        return score(model.pairs, model.pairs.prepare(picture), caption, dtype=dtype, ranking=ranking)

    with FlopCounterMode(display=False) as counter:
        exact = fast(ranking=False)
    naive = naive_scores(model, picture.regions, words, some.vector)
    error = max(float((found[:, :: CAPTIONS // part] - naive).abs().max()) for found in (exact, fast()))
    jobs = {
        "product": lambda: torch.mm(*square),
        "tile": lambda: fast(ranking=False),
        "rank": fast,
        "bf16": lambda: fast(torch.bfloat16),
        "loop": lambda: naive_scores(model, picture.regions, words, some.vector),
    }
    times: dict[str, list] = {name: [] for name in jobs}
    for _ in range(repeats):
        for name, job in jobs.items():
            times[name].append(seconds(job))
    best = {name: min(found) for name, found in times.items()}
    pairs, operations, rate = PICTURES * CAPTIONS, counter.get_total_flops(), 2 * SIDE**3 / best["product"]
    loop = best["loop"] * CAPTIONS / part
    return {
        "seconds": {name: sorted(found) for name, found in times.items()},
        "captions_of_the_loop": part,
        "microseconds_a_pair": {**{name: 1e6 * best[name] / pairs for name in ("tile", "rank", "bf16")},
                                "loop": 1e6 * loop / pairs},
        "times_faster": loop / best["rank"],
        "times_faster_bf16": loop / best["bf16"],
        "rank_over_tile": best["tile"] / best["rank"],
        "operations": operations,
        "flop_per_second": operations / best["rank"],
        "product_flop_per_second": rate,
        "times_the_floor": best["rank"] * rate / operations,
        "largest_difference": error,
    }  # fmt: skip


def own_peak() -> int:
    """Peak bytes of this process alone (Linux); getrusage's peak is inherited from the parent process."""
    status = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in status if line.startswith("VmHWM"))


def peak_growth(captions: int) -> dict[str, int]:
    """Of a fresh process: bytes before scoring, and by how much its peak grows."""
    command = [sys.executable, __file__, "--memory", str(captions)]
    return json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


@torch.no_grad()
def print_peak_growth(captions: int) -> None:
    model, picture, caption = inputs(captions, "attend")
    before = own_peak()
    score(model.pairs, model.pairs.prepare(picture), caption, ranking=True)
    print(json.dumps({"before": before, "growth": own_peak() - before}))


def bf16_on_run(folder: Path) -> dict:
    """R@K of a trained model with products in single precision and in bfloat16."""
    from finematch.evaluation.retrieval import retrieval_blocks
    from finematch.models.hslm import tile_scores
    from finematch.runs import open_run

    run = open_run(folder)
    split, found = run.data.splits[run.data.reported], {}
    for name, dtype in (("fp32", None), ("bf16", torch.bfloat16)):
        scorer = tile_scores(run.model, split.images.batch, split.texts.batch, dtype=dtype)
        result = retrieval_blocks(scorer, len(split.records), len(split.captions), split.image_of, block=1000)
        found[name] = {k: v for k, v in result.items() if k[:3] in ("i2t", "t2i", "rsu", "tie")}
    return {"run": folder.name, "protocol": result["protocol"], **found}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--part", type=int, default=10, help="captions that the loop is timed on")
    parser.add_argument("--run", type=Path, help="folder of a finished run, for the effect of bfloat16")
    parser.add_argument("--memory", type=int, metavar="CAPTIONS", help="print the peak's growth, and stop")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".json"))
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.memory:
        print_peak_growth(options.memory)
        return
    given = {"pictures": PICTURES, "captions": CAPTIONS, "regions": REGIONS, "width": WIDTH, "sim": SIM, "words": WORDS,
             "threads": options.threads, "repeats": options.repeats}  # fmt: skip
    content: dict = {"parameters": given}
    for cross in ("attend", "gate"):
        content[cross] = measure(cross, options.repeats if cross == "attend" else 1, options.part)
    content["memory"] = {str(n): peak_growth(n) for n in (CAPTIONS // 4, CAPTIONS)}
    if options.run:
        content["bf16_on_a_run"] = bf16_on_run(options.run)
    elif options.out.exists():  # kept: it says what it was measured on
        content["bf16_on_a_run"] = json.loads(options.out.read_text())["bf16_on_a_run"]
    content |= {"device": device_name(), "versions": versions(), "commit": git_commit(), "date": str(date.today()),
                "load_average": os.getloadavg()[0]}  # fmt: skip
    write_json(options.out, content)
    rows = [
        [cross, *content[cross]["microseconds_a_pair"].values(), content[cross]["times_faster"],
         content[cross]["flop_per_second"] / 1e9, content[cross]["product_flop_per_second"] / 1e9,
         content[cross]["times_the_floor"], content[cross]["rank_over_tile"], content[cross]["largest_difference"]]
        for cross in ("attend", "gate")
    ]  # fmt: skip
    columns = "cross, tile us, rank us, bf16 us, loop us, x loop, GFLOP/s, product GFLOP/s, x floor, x tile, difference"
    print(tabulate(rows, columns.split(", "), floatfmt=".4g"))
    print(content["memory"])


if __name__ == "__main__":
    main()
