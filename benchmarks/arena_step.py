"""Seconds of a training step of each entrant of the arena, which turn its minutes into steps (`arena/2_train`).

A step is forward, backward and the optimiser's, with reading its batch, on one core, at the entrant's own batch, on the
first images of the set (time does not depend on how many there are), over the same drawn batches for all, for captions
differ in length. An entrant that changes its objective during training (HSLM, SCAN and SAF begin with a contrast;
SLAN's encoders are trained without its locator first) is measured in both parts, which are weighted as in a run.
Entrants are measured in turn, several rounds, and the median counts.
The clock is the process's own: other work on the machine does not count, but for the caches that it takes.

    python benchmarks/arena_step.py                                                        scenes
    python benchmarks/arena_step.py --dataset flickr8k --data-root <folder> --proposals <boxes.json>

writes benchmarks/arena_step.json and, from it, the block of src/finematch/presets/arena.toml; `--only "slan, detector"`
writes the line of that entrant alone. Runs that were made with other seconds are other runs: measure once, before a
grid.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from datetime import date
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from tabulate import tabulate

from finematch import arena, entrants
from finematch.config import PRESETS, Settings, root
from finematch.files import write_json, write_text
from finematch.models.slan.objective import SLAN, Unimodal
from finematch.runs import git_commit, versions
from finematch.training import Loop, device_name, open_accelerator

BEGIN, END = "# measured: benchmarks/arena_step.py\n", "# end of what was measured\n"


def variants(dataset: str, proposals: str) -> dict[str, dict]:
    """What is measured on a set, by name: settings of the arena."""
    detector = {"entrant": "slan", "detector": "boxes"}
    found = {name: {"entrant": name} for name in entrants.BESIDE} | {"slan, detector": detector}
    if dataset != "scenes":
        del found["slan, detector"]  # a detector is trained on COCO there, a set of its own
    if proposals:
        for name in entrants.BESIDE:
            boxes = (
                {"detector": proposals} if name == "slan" else {"backbone": "regions", "proposals": proposals}
            )
            found[f"{name}, detected"] = {"entrant": name} | boxes
    return found


BATCHES = 6  # that are drawn


def parts(dataset: str, given: dict, data_root: str, cache: str) -> list[tuple[float, Loop, list[list[int]]]]:
    """The parts of an entrant's training: share of the steps, loop, rows of each batch."""
    s = Settings("arena", given | {"dataset": dataset, "data_root": data_root, "cache": cache})
    small = Settings("arena", {**s.as_dict(), "smoke": True})
    entrant, own = arena.open_entrant(small, root()), entrants.own_settings(s)
    model, data = entrant.model, entrant.inputs.splits["train"].pairs()
    how = arena.plan(entrant, "no")
    draw = torch.Generator().manual_seed(0)
    rows = [torch.randperm(len(data), generator=draw)[: s.batch_size].tolist() for _ in range(BATCHES)]

    def loop(of: torch.nn.Module) -> tuple:
        made = Loop(of, data, how, open_accelerator(how), None)
        made.model.train()
        return made, rows

    if isinstance(model, SLAN):
        first = arena.first_rounds(s, own) / s.rounds
        return [(first, *loop(Unimodal(model))), (1 - first, *loop(model))]
    if own.method == "mvam":
        return [(1.0, *loop(model))]
    start = min(1.0, own.warmup_epochs / own.epochs)
    first, rest = arena.open_entrant(small, root()).model, arena.open_entrant(small, root()).model
    for of, begins in ((first, 10**9), (rest, 0)):
        if hasattr(of, "objective"):
            of.objective.start_steps = begins
        else:
            of.warmup_steps = begins
    return [(start, *loop(first)), (1 - start, *loop(rest))]


def seconds(loop: Loop, batches: list[list[int]], least: float) -> float:
    """CPU seconds of a step: mean over all batches, repeated for that long at least, after one that does not count."""
    loop.step(loop.data.__getitems__(batches[0]), True, "benchmark")
    started, calls = time.process_time(), 0
    while not calls or time.process_time() - started < least:
        for rows in batches:
            loop.step(loop.data.__getitems__(rows), True, "benchmark")
        calls += len(batches)
    return (time.process_time() - started) / calls


def measure(
    dataset: str, data_root: str, proposals: str, repeats: int, least: float, cache: str, only: list[str]
) -> dict[str, float]:
    wanted = variants(dataset, proposals)
    if unknown := set(only) - set(wanted):
        raise SystemExit(f"--only {', '.join(sorted(unknown))}: entrants are {'; '.join(wanted)}")
    opened = {
        name: parts(dataset, given, data_root, cache)
        for name, given in wanted.items()
        if not only or name in only
    }
    found: dict[str, list[float]] = {name: [] for name in opened}
    for _ in range(repeats):
        for name, of in opened.items():
            found[name].append(sum(share * seconds(loop, rows, least) for share, loop, rows in of))
    return {name: float(f"{statistics.median(values):.3g}") for name, values in found.items()}


def block(measured: dict[str, dict[str, float]]) -> str:
    """The overlays of the presets: general ones first, for a later one goes before."""
    lines = []
    for dataset, of in measured.items():
        for name, value in of.items():
            entrant, _, how = name.partition(", ")
            also = {"": "", "detector": 'detector = "boxes"\n'}.get(how)
            if also is None:
                # SLAN's: a file, or a grid's {PROPOSALS}; not the word `boxes`
                also = 'detector = "*[.{]*"\n' if entrant == "slan" else 'backbone = "regions"\n'
            lines.append(f'[[when]]\ndataset = "{dataset}"\nentrant = "{entrant}"\n{also}'
                         f"set = {{ seconds_a_step = {value!r} }}\n")  # fmt: skip
    return "\n".join(lines)


def in_presets(text: str, measured: dict) -> str:
    """The presets' text with the block of what was measured."""
    before, _, rest = text.partition(BEGIN)
    return before + BEGIN + "\n" + block(measured) + "\n" + END + rest.partition(END)[2]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dataset", default="scenes")
    parser.add_argument("--data-root", default="data")
    parser.add_argument("--proposals", default="", help="boxes of a detector, in COCO's results format")
    parser.add_argument("--only", action="append", default=[], help="an entrant; repeat it for several")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--least", type=float, default=3.0, help="seconds of steps that a measurement takes")
    options = parser.parse_args()
    torch.set_num_threads(1)
    path, presets = root() / "benchmarks" / "arena_step.json", PRESETS / "arena.toml"
    content = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"seconds_a_step": {}}
    with tempfile.TemporaryDirectory() as cache:
        of_set = (options.dataset, options.data_root, options.proposals)
        found = measure(*of_set, options.repeats, options.least, cache, options.only)
    made = {
        "device": device_name(),
        "versions": versions(),
        "commit": git_commit(),
        "date": str(date.today()),
    }
    if options.only:  # the rest of the file stays what its commit and date say
        content["seconds_a_step"][options.dataset] |= found
        again = content.setdefault("again", {}).setdefault(options.dataset, {})
        again |= dict.fromkeys(found, made)
    else:
        content["seconds_a_step"][options.dataset] = found
        content.get("again", {}).pop(options.dataset, None)
        content.setdefault("made", {})[options.dataset] = made
    write_json(path, content)
    write_text(presets, in_presets(Path(presets).read_text(encoding="utf-8"), content["seconds_a_step"]))
    print(tabulate(found.items(), headers=["entrant", "seconds a step"]))


if __name__ == "__main__":
    main()
