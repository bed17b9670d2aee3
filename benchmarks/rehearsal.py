"""Are the hours that `make rehearse` predicts those of a run? One row a method, rehearsed and then really run.

The run is the page `2_train` itself, its cells one after another in a process of its own, on scenes at scale tiny with
every setting as the row has it; by default on the first images of each split (160, 40, 40), with --whole on all of
them. Compared are training (what `fit` counts), SLAN's encoders, and evaluation (all other cells behind `begin`). With
one thread both clocks are the process's own (CPU seconds): other work on the machine does not count. Committed runs
of the same rows, on the whole set and other machines, stand beside the prediction for the whole set.

    python benchmarks/rehearsal.py                     writes benchmarks/rehearsal.json (8 minutes on one core)
    python benchmarks/rehearsal.py --method hslm --whole --cache data/cache    takes up a run that was stopped
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
from tempfile import TemporaryDirectory
from types import SimpleNamespace

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from tabulate import tabulate

from finematch import grids, rehearsal, training
from finematch.config import Settings, root
from finematch.data.splits import SMOKE
from finematch.files import write_json
from finematch.runs import git_commit, measured, versions

ROWS = {"mvam": ("mvam_views", "regions-mvam"), "hslm": ("hslm_modules", "row-12"),
        "felga": ("felga_variants", "felga"), "slan": ("slan_adaptors", "levels-3")}  # fmt: skip
PARTS = ("training", "encoders", "evaluation")


def settings(method: str) -> Settings:
    """The row's settings on scenes at scale tiny."""
    name, row = ROWS[method]
    return grids.settings(grids.grid(name, "scenes"), row, scale="tiny")


def real(method: str, out: Path, cache: Path, *, whole: bool) -> dict[str, float]:
    """Run the page in this process; seconds of each part."""
    import jupytext

    s, small = settings(method), settings(method).replace(smoke=not whole)
    given = s.given | {n: value for n, value in s.as_dict().items() if small.as_dict()[n] != value}
    given |= {"out": str(out), "cache": str(cache), "smoke": not whole, "threads": torch.get_num_threads()}
    training.time = SimpleNamespace(
        monotonic=rehearsal.clock, perf_counter=rehearsal.clock
    )  # what `fit` counts by
    page, namespace = jupytext.read(root() / "notebooks" / method / "2_train.py"), {"__name__": "__main__"}
    spent, encoders, begun = 0.0, 0.0, False
    for cell in page.cells:
        if cell.cell_type != "code":
            continue
        started = rehearsal.clock()
        exec(compile(cell.source, f"{method}/2_train", "exec"), namespace)
        if "parameters" in cell.metadata.get("tags", ()):
            namespace |= given
        seconds = rehearsal.clock() - started
        spent += seconds if begun else 0.0
        encoders += seconds if "train_encoders(model" in cell.source else 0.0
        begun |= "= begin(" in cell.source
    found = json.loads((out / "metrics.json").read_text())
    return {
        "training": found["seconds"],
        "encoders": encoders,
        "evaluation": spent - found["seconds"] - encoders,
    }


def committed(method: str) -> dict | None:
    """Training seconds of the row's committed runs on the whole set."""
    files = sorted(
        (root() / "papermill_runs" / method).glob(f"scenes.tiny.{ROWS[method][1]}.s*/metrics.json")
    )
    if not files:
        return None
    frame = measured(files)
    return {"training": frame["run_seconds"].tolist(), "device": sorted(set(frame["run_device"]))}


def compare(method: str, whole: bool, cache: Path | None) -> dict:
    """Prediction and run of one method, in this process."""
    s = settings(method)
    with TemporaryDirectory() as folder:
        folder = Path(folder)
        few = tuple(SMOKE.values())
        run = real(method, (cache or folder) / f"{method}-run", cache or folder / "cold", whole=whole)
        predicted = rehearsal.rehearse_run(s, folder, counts=() if whole else few)
        large = predicted if whole else rehearsal.rehearse_run(s, folder)
    total = [sum(of[part] for part in PARTS) for of in (predicted, run)]
    before = committed(method)
    whole_set = {part: large[part] for part in (*PARTS, "features", "memory", "step")}
    return {
        "row": "/".join(ROWS[method]), "images": list(rehearsal.IMAGES["scenes"] if whole else few),
        "predicted": {part: predicted[part] for part in PARTS}, "real": run, "predicted_to_real": total[0] / total[1],
        "whole_set": {"predicted": whole_set, "committed": before,
                      "predicted_to_committed": before and large["training"] / statistics.median(before["training"])},
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--method", nargs="+", choices=ROWS, default=list(ROWS))
    parser.add_argument("--whole", action="store_true", help="run on the whole set")
    parser.add_argument(
        "--cache", type=Path, help="folder of what runs share, and of the runs, to go on from"
    )
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".json"))
    parser.add_argument("--alone", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.alone:  # the process of one method: its line of the file on stdout's last line
        print(
            json.dumps(compare(options.method[0], options.whole, options.cache and options.cache.resolve()))
        )
        return
    content = json.loads(options.out.read_text()) if options.out.exists() else {"methods": {}}
    for method in options.method:
        command = [sys.executable, __file__, "--alone", "--method", method, *["--whole"] * options.whole,
                   *(["--cache", str(options.cache)] if options.cache else [])]  # fmt: skip
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        about = {"device": training.device_name(), "versions": versions(), "commit": git_commit(),
                 "date": time.strftime("%Y-%m-%d"), "threads": torch.get_num_threads()}  # fmt: skip
        content["methods"][method] = json.loads(done.stdout.splitlines()[-1]) | about
        write_json(options.out, content)
    rows = [
        [m, *(f"{of[k][p]:.0f}" for p in PARTS for k in ("predicted", "real")), f"{of['predicted_to_real']:.2f}",
         f"{of['whole_set']['predicted_to_committed'] or float('nan'):.2f}"] for m, of in content["methods"].items()
    ]  # fmt: skip
    heads = [f"{part}, {which} (s)" for part in PARTS for which in ("predicted", "real")]
    print(tabulate(rows, ["method", *heads, "predicted/real", "whole set: predicted/committed"]))


if __name__ == "__main__":
    main()
