"""What does the whole workbook cost? CPU minutes of `make workbook`, and the wall minutes of each page.

Run it in a fresh clone: pages that were run before are not run again, and what they cost is then not counted.

    python benchmarks/workbook.py
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import time
from pathlib import Path

from finematch.files import DataError, write_json
from finematch.runs import git_commit, versions
from finematch.training import device_name

ROOT = Path(__file__).resolve().parents[1]
PAGES = ROOT / "papermill_runs" / "workbook"
GOAL = 70  # CPU minutes


def durations(pages: Path, *, smoke: bool) -> dict[str, float]:
    """Wall seconds of every executed page below a folder, by its name without the ending: of those that ran as smoke
    runs, or of the others."""
    found = {}
    for path in sorted(pages.rglob("*.ipynb")):
        about = json.loads(path.read_text(encoding="utf-8"))["metadata"]["papermill"]
        if bool(about["parameters"].get("smoke")) == smoke:
            found[path.relative_to(pages).with_suffix("").as_posix()] = about["duration"]
    return found


def main() -> None:
    if PAGES.exists():
        raise DataError(PAGES, "the folder", "is there: pages were run before", "Measure in a fresh clone")
    start = time.time()
    subprocess.run(["make", "workbook"], cwd=ROOT, check=True)
    wall, used = time.time() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
    result = {
        "device": device_name(), "cores": os.cpu_count(), "versions": versions(), "commit": git_commit(),
        "cpu_seconds": used.ru_utime + used.ru_stime, "wall_seconds": wall, "goal_cpu_minutes": GOAL,
        "peak_mib_of_one_process": used.ru_maxrss / 1024, "page_wall_seconds": durations(PAGES, smoke=False),
        "smoke_page_wall_seconds": durations(PAGES, smoke=True),
    }  # fmt: skip
    write_json(Path(__file__).with_suffix(".json"), result)
    print(f"{result['cpu_seconds'] / 60:.0f} CPU minutes in {wall / 60:.0f} minutes; goal {GOAL} CPU minutes")


if __name__ == "__main__":
    main()
