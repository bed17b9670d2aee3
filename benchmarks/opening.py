"""What does it cost to open a finished run whose data and features are cached? CPU seconds, beyond the imports.

For each method the run is opened (`open_run`, `.data`, `.model`) in a process of its own: once so that everything is
in the caches, then three times, of which the least counts. What the process imports before is said beside it.

    python benchmarks/opening.py                     the newest finished run of each method
    python benchmarks/opening.py --runs FOLDER ...   these
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

from finematch.files import DataError, write_json
from finematch.runs import git_commit, latest, versions
from finematch.training import device_name

METHODS = ("mvam", "hslm", "felga", "slan")
# all that a page which opens a run imports anyhow: torch, and the classes of the text towers and tokenizers
IMPORTS = (
    "import torch, finematch.rebuild, finematch.runs\n"
    "from transformers import AutoTokenizer, BertModel, CLIPModel, PreTrainedTokenizerFast\n"
)
OPEN = IMPORTS + (
    "import sys, time, warnings\n"
    "warnings.simplefilter('ignore')\n"
    "imported = time.process_time()\n"
    "run = finematch.runs.open_run(sys.argv[1])\n"
    "run.data, run.model\n"
    "print(imported, time.process_time() - imported)\n"
)


def opened(folder: Path) -> tuple[float, float]:
    """CPU seconds of the imports and of opening the run, in a new process."""
    done = subprocess.run(
        [sys.executable, "-c", OPEN, str(folder)], stdout=subprocess.PIPE, text=True, check=True
    )
    imports, seconds = done.stdout.splitlines()[-1].split()
    return float(imports), float(seconds)


def newest() -> Iterator[Path]:
    """The newest finished run of each method that has one."""
    for method in METHODS:
        try:
            yield latest(method)
        except DataError as error:
            print(f"{method}: not measured. {error}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--runs", nargs="+", type=Path, default=[], help="folders of finished runs")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".json"))
    options = parser.parse_args()
    found = {}
    for folder in options.runs or list(newest()):
        opened(folder)  # fills the caches
        imports, seconds = zip(*(opened(folder) for _ in range(3)), strict=True)
        was = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
        method, p = was["identity"]["method"], was["parameters"]
        found[method] = {"seconds": min(seconds), "all": seconds, "imports": min(imports), "goal": 2.0,
                         "dataset": p["dataset"], "scale": "smoke" if p["smoke"] else p["scale"]}  # fmt: skip
        each = ", ".join(f"{s:.2f}" for s in seconds)
        print(f"{method}: {min(seconds):.2f} CPU s ({each}), imports {min(imports):.2f}")
    if not found:
        return
    about = {
        "device": device_name(),
        "versions": versions(),
        "commit": git_commit(),
        "date": time.strftime("%Y-%m-%d"),
    }
    write_json(options.out, {**about, "runs": found})


if __name__ == "__main__":
    main()
