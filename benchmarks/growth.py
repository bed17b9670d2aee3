"""How time and memory of an evaluation grow with the gallery: data, and a picture of it.

Three evaluations of `b` images with five captions each, at four sizes: `retrieval` of embeddings (512-d), `pairs`, in
which HSLM scores every image with every caption (36 regions, 13 words on average, 256-d), and `re-ranking`, in which
SLAN's small model scores the best 16 candidates of each query. Time is expected to grow with b squared, b squared and
b; memory, that of a fresh process beyond what it held before (models and inputs), hardly at all in the first two.

With one thread the clock is the process's own (CPU seconds): other work on the machine does not count.

    python benchmarks/growth.py          writes benchmarks/growth.json and figures/growth.svg (2 minutes of one core)
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from torch.nn import functional as F

ROOT = Path(__file__).resolve().parents[1]
EACH, CANDIDATES = 5, 16
SIZES = {
    "retrieval": (1000, 2000, 4000, 8000),
    "pairs": (20, 40, 80, 160),
    "re-ranking": (20, 40, 80, 160),
}
WHAT = {
    "retrieval": "retrieval from embeddings",
    "pairs": "all pairs scored (HSLM)",
    "re-ranking": f"best {CANDIDATES} re-ranked (SLAN)",
}


def unit(*shape: int) -> torch.Tensor:
    return F.normalize(torch.randn(*shape), dim=-1)


def lengths_mask(captions: int) -> torch.Tensor:
    """8 to 18 words a caption."""
    lengths = torch.randint(8, 19, (captions, 1))
    lengths[0] = 18
    return torch.arange(18)[None] < lengths


def retrieval(images: int) -> Callable[[], dict]:
    from finematch.evaluation.retrieval import retrieval

    image, text = unit(images, 512), unit(images * EACH, 512)
    return lambda: retrieval(image, text, torch.arange(images).repeat_interleave(EACH))


def pairs(images: int) -> Callable[[], dict]:
    from finematch.evaluation.retrieval import retrieval_blocks
    from finematch.models.configs import HSLMConfig
    from finematch.models.hslm import HSLM, Caption, Picture, score

    scorer = HSLM(8, 8, HSLMConfig(width=256, embed=8, sim=64, depth=0)).eval().pairs
    captions, mask = images * EACH, lengths_mask(images * EACH)
    caption = Caption(unit(captions, 18, 256), mask, unit(captions, 256))
    with torch.no_grad():
        view = scorer.prepare(Picture(unit(images, 36, 256), torch.ones(images, 36, dtype=torch.bool)))

    def block(i: torch.Tensor, j: torch.Tensor) -> torch.Tensor:
        return score(scorer, view[i], caption[j], ranking=True)

    return lambda: retrieval_blocks(
        block, images, captions, torch.arange(images).repeat_interleave(EACH), block=25
    )


def reranking(images: int) -> Callable[[], dict]:
    from slan_cost import Step

    from finematch.evaluation.reranking import reranked_retrieval
    from finematch.models.slan.objective import pair_scorer

    model, captions = Step("tiny", "iccv").model.eval(), images * EACH
    pixels, ids, mask = (
        torch.rand(images, 3, 64, 64),
        torch.randint(5, 164, (captions, 18)),
        lengths_mask(captions),
    )
    special = torch.zeros_like(mask)
    special[:, 0] = True
    scorer = pair_scorer(
        model, lambda rows: {"pixels": pixels[list(rows)]},
        lambda rows: {"input_ids": ids[list(rows)], "mask": mask[list(rows)], "special": special[list(rows)]},
    )  # fmt: skip
    image, text = unit(images, 64), unit(captions, 64)
    owner = torch.arange(images).repeat_interleave(EACH)
    return lambda: reranked_retrieval(image, text, owner, scorer, k=CANDIDATES)


JOBS = {"retrieval": retrieval, "pairs": pairs, "re-ranking": reranking}


def own_peak() -> int:
    """Peak bytes of this process alone (Linux); getrusage's peak is inherited from the parent process."""
    status = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in status if line.startswith("VmHWM"))


def one(kind: str, images: int, threads: int) -> None:
    """Print seconds and growth of the peak of one evaluation, after a smaller one that loads the libraries."""
    torch.set_num_threads(threads)
    clock = time.process_time if threads == 1 else time.perf_counter
    torch.manual_seed(0)
    JOBS[kind](10)()
    job = JOBS[kind](images)
    Path("/proc/self/clear_refs").write_text(
        "5"
    )  # the peak is now what is held: making the inputs does not count
    before, start = own_peak(), clock()
    job()
    print(
        json.dumps({"images": images, "seconds": clock() - start, "peak_growth_bytes": own_peak() - before})
    )


def draw(content: dict, path: Path) -> None:
    """Seconds, on two logarithmic axes, and megabytes against the number of images."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    from finematch.figures import save, style

    with style():
        figure, (left, right) = plt.subplots(1, 2, figsize=(7.2, 3.0), layout="constrained")
        for kind, label in WHAT.items():
            images = [row["images"] for row in content[kind]]
            left.plot(images, [row["seconds"] for row in content[kind]], label=label)
            right.plot(images, [row["peak_growth_bytes"] / 1e6 for row in content[kind]], label=label)
        for axes, name in ((left, "time (CPU s)"), (right, "memory beyond the inputs (MB)")):
            axes.set(xscale="log", yscale="log", xlabel="images, with five captions each", ylabel=name)
            axes.grid(axis="y")
        right.set_yscale("linear")
        right.set_ylim(bottom=0)
        figure.legend(*left.get_legend_handles_labels(), loc="outside upper center", ncols=3)
        save(figure, path)
        plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument(
        "--one", nargs=2, metavar=("KIND", "IMAGES"), help="print the figures of one, and stop"
    )
    parser.add_argument("--draw", action="store_true", help="draw the picture anew from the data, and stop")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".json"))
    parser.add_argument("--figure", type=Path, default=ROOT / "figures" / "growth.svg")
    options = parser.parse_args()
    if options.one:
        one(options.one[0], int(options.one[1]), options.threads)
        return
    if options.draw:
        draw(json.loads(options.out.read_text()), options.figure)
        return
    from finematch.files import write_json
    from finematch.runs import git_commit, versions
    from finematch.training import device_name

    torch.set_num_threads(options.threads)
    content: dict = {
        "parameters": {"threads": options.threads, "captions_each": EACH, "candidates": CANDIDATES}
    }
    for kind, sizes in SIZES.items():
        content[kind] = []
        for images in sizes:
            command = [
                sys.executable,
                __file__,
                "--threads",
                str(options.threads),
                "--one",
                kind,
                str(images),
            ]
            found = subprocess.run(command, capture_output=True, text=True, check=True).stdout
            content[kind].append(json.loads(found.splitlines()[-1]))
            print(kind, content[kind][-1], flush=True)
    content |= {
        "device": device_name(),
        "versions": versions(),
        "commit": git_commit(),
        "date": str(date.today()),
    }
    write_json(options.out, content)
    draw(content, options.figure)


if __name__ == "__main__":
    main()
