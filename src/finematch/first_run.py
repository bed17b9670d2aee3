"""A first run of a method where there is none to open: its own training page on a few hundred drawn images.

The set is drawn and the networks are trained below one folder of their own, so that no grid, table or lesson takes such
a run for one of the whole embedded set.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from finematch.config import root
from finematch.data.record import DataError
from finematch.data.splits import SMOKE
from finematch.runs import Run, openable
from finematch.scenes.generator import generate

IMAGES = {"train": 700, "val": 100, "test": 200}
FEWER = {
    "felga": {"train": 450, "val": 60, "test": 120}
}  # it trains a network and a CLIP of its own before it begins
# beside the presets of `tiny`; less of what a page does for its tables
SETTINGS = {"mvam": {}, "hslm": {}, "felga": {}, "slan": {"epochs": 1}}


def is_first_run(run: Run) -> bool:
    """Whether `first_run` made it: its data lie beside it."""
    return root() / run.parameters["data_root"] == run.folder.parent.parent


def first_run(
    method: str,
    folder: str | Path,
    *,
    seed: int = 0,
    smoke: bool = False,
    echo: Callable[[str], None] | None = None,
) -> Path:
    """Train a run of `method` in `folder`, or find the one that is there.

    Args:
        folder: of the drawn set, the cache and the runs, relative to the workbook.
        smoke: in seconds, on the few images of a smoke run; its weights mean nothing.
        echo: receives a line for each epoch and step of the page.

    Returns:
        The run's folder.

    Raises:
        DataError: If the page failed; the message has its last line.
    """
    folder = root() / folder / (method if method in FEWER else "")
    if found := openable(method, folder / "runs", smoke=smoke, seed=seed):
        return found[0][0]
    if echo:
        echo("drawing the images")
    generate(folder / "scenes", **(SMOKE if smoke else FEWER.get(method, IMAGES)))
    out = folder / "runs" / f"{method}{'-smoke' if smoke else ''}.s{seed}"
    out.mkdir(parents=True, exist_ok=True)
    given = {"data_root": folder, "cache": folder / "cache", "out": out, "seed": seed, "resume": "replace",
             "smoke": smoke, **({} if smoke else SETTINGS[method])}  # fmt: skip
    command = [sys.executable, "-m", "papermill", "--no-progress-bar", "--log-output", "--cwd", str(root()),
               str(root() / "notebooks" / method / "2_train.ipynb"), str(out / "run.ipynb")]  # fmt: skip
    for name, value in given.items():
        command += ["-p", name, str(value)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    with subprocess.Popen(command, env={**os.environ, "MPLBACKEND": "agg"}, **pipes) as page:
        last = ""
        for line in page.stdout:
            line = line.strip()
            last = line or last
            if echo and re.match(r"epoch \d|\w+: \d", line):
                echo(line)
    if page.returncode:
        raise DataError(
            out / "run.ipynb", f"the first run of {method}", f"failed ({last})", "The page says where"
        )
    return out
