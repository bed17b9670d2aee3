"""How long does the explorer take to react? Wall and CPU seconds of each control, of the newest run of each method.

Every reaction is what a person would set off: a value is set, and the time until picture and numbers are there is
taken, ten times; the median counts. The first, which loads fonts and fills caches, is left out. The goal is half a
second on two cores; on a machine that is busy with something else (`load`) the CPU seconds tell more. Then the page
itself, in JupyterLab in a headless Chromium where there is one: from the key press until another picture is there, its
share of the kernel included.

    python benchmarks/explore.py                     the newest finished run of each method
    python benchmarks/explore.py --runs FOLDER ...   these
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

from finematch.files import DataError, write_json
from finematch.runs import git_commit, latest, versions
from finematch.training import device_name
from finematch.widgets import Explorer, explorer

GOAL, TIMES = 0.5, 10
CONTROLS = {"mvam": ("view",), "hslm": ("word",), "felga": ("keyword", "region"),
            "slan": ("level", "box", "top", "threshold")}  # fmt: skip


def other(control, n: int) -> float:
    """Another value of a control, turn by turn."""
    if hasattr(control, "options"):
        return control.options[n % len(control.options)][1]
    steps = int((control.max - control.min) / control.step)
    return control.min + control.step * (n % (steps + 1))


def taken(page: Explorer, act: Callable[[int], None]) -> dict:
    """Median and largest wall and CPU seconds of a reaction."""
    wall, cpu = [], []
    for n in range(TIMES + 1):
        begun = time.perf_counter(), time.process_time()
        act(n)
        wall.append(time.perf_counter() - begun[0])
        cpu.append(time.process_time() - begun[1])
        if problem := page.said.value or page.panels[0].said.value:
            raise RuntimeError(problem)
    if not min(cpu[1:]) > 1e-3:
        raise RuntimeError("a value was set that was there already: nothing was measured")
    return {"wall_seconds": statistics.median(wall[1:]), "most_wall_seconds": max(wall[1:]),
            "cpu_seconds": statistics.median(cpu[1:]), "most_cpu_seconds": max(cpu[1:])}  # fmt: skip


def reactions(page: Explorer) -> dict:
    """Of every control of one panel, and of what is asked about."""
    (panel,) = page.panels
    sentences = [caption for record in page._records()[: TIMES + 1] for caption in record.captions[:1]]
    found = {
        "another image": taken(page, lambda n: setattr(page.number, "value", n + 1)),
        "another sentence": taken(page, lambda n: setattr(page.sentence, "value", sentences[n] + " " * n)),
    }
    for name in CONTROLS[panel.method]:
        control = getattr(panel, name)
        found[name] = taken(page, lambda n, control=control: setattr(control, "value", other(control, n)))
    return found


def in_browser(folder: Path, method: str) -> dict:
    """Wall seconds from the key press in the page to the new picture; empty without playwright or a Chromium."""
    sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
    import lab

    if find_spec("playwright") is None or lab.chromium() is None:
        return {}
    with tempfile.TemporaryDirectory() as book:
        lab.copy_of_the_book(Path(book), method=method, trained=str(folder.resolve()))
        for name in ("data", "papermill_runs"):
            if (lab.ROOT / name).exists():
                (Path(book) / name).symlink_to(lab.ROOT / name)
        with lab.server(Path(book)) as address, lab.browser(width=1180) as (page, _):
            lab.run_all(page, address, "notebooks/6_explore.ipynb")
            source = f"document.querySelector('{lab.PICTURE}[src]')?.src"
            sentence = page.get_by_label("sentence", exact=True)
            words = sentence.input_value()

            def waited(act: Callable[[int], None]) -> dict:
                wall = []
                for n in range(TIMES + 1):
                    before, begun = page.evaluate(source), time.perf_counter()
                    act(n)
                    page.wait_for_function(f"before => ({source} ?? before) !== before", arg=before)
                    wall.append(time.perf_counter() - begun)
                return {"wall_seconds": statistics.median(wall[1:]), "most_wall_seconds": max(wall[1:])}

            def say(n: int) -> None:
                sentence.fill(words if n % 2 else words.rpartition(" ")[0])
                sentence.press("Enter")

            found = {"page: another sentence": waited(say)}
            if method != "hslm":  # its words are buttons
                page.get_by_role("slider").first.focus()
                page.keyboard.press("Home")
                page.wait_for_timeout(3000)
                key = ("ArrowRight", "ArrowLeft")
                found["page: a slider"] = waited(lambda n: page.keyboard.press(key[n % 2]))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--runs", nargs="+", type=Path, default=[], help="folders of finished runs")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".json"))
    options = parser.parse_args()
    folders = list(options.runs)
    for method in () if folders else CONTROLS:
        try:
            folders.append(latest(method))
        except DataError as error:
            print(f"{method}: not measured. {error}")
    found = {}
    for folder in folders:
        begun = time.perf_counter(), time.process_time()
        page = explorer(folder)
        opened = {
            "wall_seconds": time.perf_counter() - begun[0],
            "cpu_seconds": time.process_time() - begun[1],
        }
        panel, p = page.panels[0], page.panels[0].run.parameters
        found[panel.method] = {"dataset": p["dataset"], "scale": p["scale"], "opening": opened,
                               **reactions(page), **in_browser(folder, panel.method)}  # fmt: skip
        for name, one in found[panel.method].items():
            if isinstance(one, dict):
                cpu = f", {one['cpu_seconds']:.3f} CPU s" if "cpu_seconds" in one else ""
                print(f"{panel.method}  {name:<22} {one['wall_seconds']:.3f} s{cpu}", flush=True)
    if found:
        about = {"device": device_name(), "versions": versions(), "commit": git_commit(), "goal": GOAL,
                 "load": os.getloadavg()[0],
                 "date": time.strftime("%Y-%m-%d")}  # fmt: skip
        write_json(options.out, {**about, "runs": found})


if __name__ == "__main__":
    main()
