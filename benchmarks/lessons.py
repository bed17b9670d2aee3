"""Does each lesson run to its end at ten seeds, and how long does it take?

    python benchmarks/lessons.py                            ten seeds, all lessons (make lesson-seeds)
    python benchmarks/lessons.py --seeds 0 --methods mvam   these

A lesson that stops is named, with the end of its traceback; the exit status is then 1 and no result is written.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from finematch.exercises import METHODS
from finematch.files import write_json
from finematch.runs import git_commit, versions
from finematch.training import device_name

ROOT = Path(__file__).resolve().parents[1]


def run(method: str, seed: int, data_root: str, page: Path) -> tuple[float, str]:
    """Wall seconds of a lesson, papermill and the kernel's start included, and what it said when it stopped."""
    command = [sys.executable, "-m", "papermill", "--no-progress-bar", f"notebooks/{method}/1_lesson.ipynb", str(page),
               "-p", "seed", str(seed), "-p", "data_root", data_root]  # fmt: skip
    start = time.perf_counter()
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    return time.perf_counter() - start, done.stderr[-2000:] if done.returncode else ""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seeds", nargs="+", type=int, default=list(range(10)))
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--data-root", default="data")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".json"))
    options = parser.parse_args()
    seconds, stopped = {method: {} for method in options.methods}, 0
    with tempfile.TemporaryDirectory() as folder:
        for method in options.methods:
            for seed in options.seeds:
                took, error = run(method, seed, options.data_root, Path(folder) / "page.ipynb")
                said = f", stopped\n{error}" if error else ""
                print(f"{method}, seed {seed}: {took:.0f} s{said}", flush=True)
                seconds[method][str(seed)] = round(took, 1)
                stopped += bool(error)
    if stopped:
        print(f"{stopped} of {len(options.methods) * len(options.seeds)} stopped: nothing is written")
        return 1
    about = {"device": device_name(), "cores": os.cpu_count(), "versions": versions(), "commit": git_commit()}
    write_json(options.out, {**about, "wall_seconds": seconds})
    return 0


if __name__ == "__main__":
    sys.exit(main())
