"""Every row of every grid, started once at the paper's scale: `make walk`.

A row is its real `2_train` page, run by papermill in a process of its own, with `scale=paper` and the row's own
parameters: the published architecture, with stand-ins for what a machine may lack (`standins`): a few pictures in the
format of the paper's set, and networks of random weights. Only what makes the run small is set (`SMALL`), never what
makes the model. The table says what a row did, not how good it is: its numbers mean nothing.

A row that was walked with the same parameters, page and code is not walked again unless it failed, so a walk that was
stopped goes on.
Rows of two grids that are one run (same method, data and parameters) are walked once.
"""

from __future__ import annotations

import ast
import json
import math
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from finematch import grids
from finematch.config import declared, root
from finematch.files import DataError, digest, write_json
from finematch.runs import PACKAGE, git_commit, versions
from finematch.standins import HUB, SIZE, write_boxes, write_data, write_hub, write_network

IMAGES = 2  # of each split
SMALL = {"epochs": 1, "batch_size": 2, "precision": "no", "workers": 0, "threads": 1}
SMALL |= {"budget_minutes": 0.01, "rounds": 1}  # of the arena
LEFT = (
    "*.pt",
    "*.safetensors",
)  # of a run, removed once no row needs them: those of one row may be gigabytes
RESULT = "walk.json"


@dataclass(frozen=True)
class Row:
    """One run, and the rows of grids that it stands for; `links` are the rows whose runs it builds on."""

    method: str
    name: str
    dataset: str
    cells: Mapping[str, str]
    grids: tuple[str, ...]
    page: str = "2_train"
    presets: str = ""

    @property
    def links(self) -> tuple[str, ...]:
        return tuple(row for cell in self.cells.values() for row in grids.LINK.findall(cell))


def rows(names: Iterable[str] = (), only: str = "") -> list[Row]:
    """The runs of the named grids (all of them), those that others build on first.

    Args:
        only: a row's name, and what it builds on.

    Raises:
        DataError: a grid that does not say its paper's data set, or rows of one name with different cells.
    """
    found: dict[tuple[str, str, str], Row] = {}
    for name in names or grids.names():
        grid = grids.grid(name)
        if not grid.dataset:
            raise DataError(
                f"grids/{name}.toml", "the key `dataset`", "is missing", "Name the paper's data set"
            )
        for row in (*grid.rows, *grid.linked):
            of = grid.of(row)
            stands = (name,) if row in grid.rows else ()
            one = Row(of.method, row, grid.dataset, of.cells(row, "paper"), stands, of.page, of.presets)
            key = (one.method, one.name, one.dataset)
            if key in found and found[key].cells != one.cells:
                problem = f"has other cells than in {', '.join(found[key].grids) or 'what another builds on'}"
                raise DataError(f"grids/{name}.csv", f"row {row}", problem, "Rows of one name are one run")
            found[key] = replace(one, grids=(*(found[key].grids if key in found else ()), *stands))
    wanted = {key for key in found if only in ("", key[1])}
    wanted |= {(m, link, d) for m, r, d in wanted for link in found[m, r, d].links}
    chosen = [row for key, row in found.items() if key in wanted]
    return sorted(chosen, key=lambda row: bool(row.links))


def parameters(row: Row, out: Path, folder: Path, shrink: Mapping[str, Any]) -> dict[str, Any]:
    """What papermill is given: the row's cells, `SMALL`, and a stand-in for the one file that has no default name."""
    given: dict[str, Any] = {
        key: grids.LINK.sub(
            lambda link: str(out.with_name(out.name.replace(f".{row.name}.", f".{link[1]}."))), cell
        )
        for key, cell in row.cells.items()
    }
    known = declared(row.presets)
    # zero epochs, of a page that trains nothing at that scale, stay
    small = {
        key: value for key, value in SMALL.items() if key in known and known[key].presets.get("paper") != 0
    }
    given |= small | dict(shrink)
    given |= {key: write_boxes(folder / "data" / row.dataset) for key in given if given[key] == grids.BOXES}
    if "shards" in given:  # of caption sets beside the paper's: its own train split takes their place
        given["shards"] = ""
    if row.method == "felga" and "proposals" not in given:
        given["proposals"] = write_network(
            "detreg-r50", folder / "detreg"
        )  # the paper's, whose file is to be named
    return given | {"scale": "paper", "dataset": row.dataset, "data_root": folder / "data" / row.dataset,
                    "cache": folder / "cache", "out": out, "resume": "fresh"}  # fmt: skip


def code_of(page: Path) -> str:
    """A digest of a page and of every module of ours that it imports, directly or not."""
    seen: dict[str, str] = {}
    texts = [page.with_suffix(".py").read_text(encoding="utf-8")]
    while texts:
        text = texts.pop()
        for module in sorted(_imports(text)):
            path = PACKAGE.joinpath(*module.split(".")[1:])
            path = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
            if module not in seen and path.is_file():
                seen[module] = path.read_text(encoding="utf-8")
                texts.append(seen[module])
    return digest([page.with_suffix(".py").read_text(encoding="utf-8"), sorted(seen.items())])


def _imports(text: str) -> set[str]:
    """Modules of ours that a text imports (`from finematch.a import b` may name the module `a.b`)."""
    found = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("finematch"):
            found |= {node.module, *(f"{node.module}.{name.name}" for name in node.names)}
        elif isinstance(node, ast.Import):
            found |= {name.name for name in node.names if name.name.startswith("finematch")}
    return found


def walk(
    names: Iterable[str] = (),
    only: str = "",
    *,
    out: str | Path = "",
    again: bool = False,
    keep: bool = False,
    limit: float = 0,
    shrink: Mapping[str, Mapping[str, Any]] | None = None,
    echo=print,
) -> list[dict[str, Any]]:
    """Walk rows and return their results, also those of earlier walks.

    Args:
        out: where runs, data, networks and the caches lie; `papermill_runs/walk` by default.
        again: also the rows whose result is there.
        keep: a result stands whatever the code was (its commit is in the table).
        limit: no row is begun after so many seconds; 0 has no limit. The next walk goes on.
        shrink: parameters by method that go before the row's own, with small networks and pictures, where the true
            size takes too long (tests).
    """
    folder = Path(out or root() / "papermill_runs" / "walk").resolve()
    begun, found = time.monotonic(), []
    chosen, to_walk = rows(names, only), []
    for row in reversed(chosen):  # what others build on comes last here
        result, gone = _result(folder, row), _needed(row, to_walk) and not _weights(_place(folder, row))
        stands = (result and result["key"] == _key(row, shrink) and result["did"] != "failed"
                  and (keep or result["code"] == code_of(_page(row))))  # fmt: skip
        if again or gone or not stands:
            to_walk.append(row)
    for number, row in enumerate(chosen, 1):
        where, result = _place(folder, row), _result(folder, row)
        late = limit and time.monotonic() - begun > limit
        if late and not result:
            continue
        if not late and row in to_walk:
            echo(f"{number}/{len(chosen)} {row.method} {row.name} on {row.dataset}", end=": ", flush=True)
            key = _key(row, shrink)
            result = {"key": key, "code": code_of(_page(row))} | _walk(
                row, where, _page(row), folder, key["shrink"]
            )
            write_json(where / RESULT, result)
            echo(said(result))
            to_walk.remove(row)
        for one in (row, *(other for other in chosen if other.name in row.links)):
            for file in () if _needed(one, to_walk) else _weights(_place(folder, one)):
                file.unlink()
        about = {"method": row.method, "row": row.name, "grids": list(row.grids), "dataset": row.dataset,
                 "cells": dict(row.cells)}  # fmt: skip
        found.append(about | {name: value for name, value in result.items() if name not in ("key", "code")})
    if left := len(chosen) - len(found):
        echo(f"{left} of {len(chosen)} rows are left: walk again")
    return found


def _key(row: Row, shrink: Mapping[str, Mapping[str, Any]] | None) -> dict[str, Any]:
    return {"cells": dict(row.cells), "dataset": row.dataset, "small": SMALL,
            "shrink": (shrink or {}).get(row.method)}  # fmt: skip


def _page(row: Row) -> Path:
    return root() / "notebooks" / row.method / f"{row.page}.ipynb"


def _place(folder: Path, row: Row) -> Path:
    return folder / row.method / f"{row.dataset}.paper.{row.name}.s0"


def _result(folder: Path, row: Row) -> dict | None:
    path = _place(folder, row) / RESULT
    return json.loads(path.read_text()) if path.is_file() else None


def _weights(where: Path) -> list[Path]:
    return [file for pattern in LEFT for file in where.rglob(pattern)]


def _needed(row: Row, to_walk: Iterable[Row]) -> bool:
    """Whether the weights of a row's run are needed by one that is still to be walked."""
    return any(row.name in other.links for other in to_walk
               if (other.method, other.dataset) == (row.method, row.dataset))  # fmt: skip


def said(result: Mapping[str, Any]) -> str:
    """A result in a line."""
    if result["did"] == "failed":
        return f"FAILED: {result['error']}"
    return (f"{result['did']}, {result['parameters']} M parameters, {result['seconds']:.0f} s, "
            f"{result['peak_gib']:.1f} GiB")  # fmt: skip


def _walk(
    row: Row, where: Path, page: Path, folder: Path, shrink: Mapping[str, Any] | None
) -> dict[str, Any]:
    """One run in a process of its own, and what became of it."""
    shutil.rmtree(where, ignore_errors=True)
    where.mkdir(parents=True)
    size = SIZE if shrink is None else (80, 64)
    write_data(row.dataset, folder / "data" / row.dataset, images=IMAGES, captions=1, size=size)
    if row.cells.get("detector") == "boxes" and not row.dataset.startswith("coco"):  # trained on COCO's boxes
        write_data("coco", folder / "data" / row.dataset, images=IMAGES, captions=1, size=size)
    hub = write_hub(folder / "hub", only=tuple(_named(row)), tiny=shrink is not None)
    given = parameters(row, where, folder, shrink or {})
    command = [sys.executable, "-m", "papermill", "--no-progress-bar", str(page), str(where / "run.ipynb")]
    for name, value in given.items():
        command += ["-p", name, str(value)]
    environment = {**os.environ, "HF_HUB_CACHE": str(hub), "HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1",
                   "MPLBACKEND": "agg", "OMP_NUM_THREADS": "1"}  # fmt: skip
    begun = time.monotonic()
    with (where / "stderr").open("w+", encoding="utf-8") as file:
        process = subprocess.Popen(command, env=environment, cwd=root(), stdout=file, stderr=file)
        _, status, used = os.wait4(process.pid, 0)  # the kernel is papermill's child, and counts with it
        process.returncode = os.waitstatus_to_exitcode(status)
        file.seek(0)
        printed = file.read()
    result = {"seconds": round(time.monotonic() - begun, 1), "cpu_seconds": round(used.ru_utime + used.ru_stime, 1),
              "peak_gib": round(used.ru_maxrss / 2**20, 2), "commit": git_commit()}  # fmt: skip
    return result | (_done(where) if process.returncode == 0 else _failed(printed))


def _named(row: Row) -> list[str]:
    """The hub's names that a row may open: what its method reads, without the networks that it does not name."""
    vlp = row.cells.get("vlp", "clip")
    if row.method == "felga":
        return [name for name in HUB if {"clip": "patch32", "blip": "blip-", "blip2": "blip2-"}[vlp] in name]
    clip = row.cells.get("backbone") == "clip"
    return [name for name in HUB if "Salesforce" not in name and (clip or "clip" not in name)]


def _done(where: Path) -> dict[str, Any]:
    """What a finished run did: training steps, or the forward pass alone; the digest of its weights' shapes tells
    architectures apart."""
    logs = [
        json.loads(line)
        for file in sorted(where.rglob("log.jsonl"))
        for line in file.read_text().splitlines()
    ]
    if bad := [line for line in logs if not math.isfinite(line["loss"])]:
        return {"did": "failed", "error": f"the loss is {bad[0]['loss']}"}
    page = json.loads((where / "run.ipynb").read_text(encoding="utf-8"))
    printed = json.dumps([cell.get("outputs") for cell in page["cells"]])  # not the words of the page
    counts = re.findall(r"([\d.]+) M parameters", printed)
    shapes = [_shapes(file) for file in sorted(where.rglob("best.safetensors"))[:1]]
    return {
        "did": "step" if logs else "forward", "steps": sum(line["steps"] for line in logs),
        "parameters": float(counts[-1]) if counts else None,
        "shapes": digest(shapes)[:8] if shapes else None, "error": "",
    }  # fmt: skip


def _shapes(file: Path) -> dict[str, list[int]]:
    """The weights of a file by name, without reading them."""
    from safetensors import safe_open

    with safe_open(file, framework="pt") as weights:
        return {name: weights.get_slice(name).get_shape() for name in weights.keys()}  # noqa: SIM118


def _failed(printed: str) -> dict[str, Any]:
    """The last line that names an exception, else the last line at all."""
    lines = [line.strip() for line in re.sub(r"\x1b\[[0-9;]*m", "", printed).splitlines() if line.strip()]
    named = [line for line in lines if re.match(r"[A-Za-z_.]*(Error|Exception|Interrupt)\b", line)]
    return {"did": "failed", "error": (named or lines or ["nothing was printed"])[-1][:400], "steps": 0,
            "parameters": None, "shapes": None}  # fmt: skip


def write(results: list[dict[str, Any]], path: str | Path) -> None:
    """The table as data, with what it was made on."""
    from finematch.training import device_name

    write_json(
        path, {"machine": device_name(), "cores": os.cpu_count(), "versions": versions(), "rows": results}
    )


def summary(results: list[dict[str, Any]], names: Iterable[str] = ()):
    """A line a grid (of all, or of `names`): how many of its rows were walked, distinct architectures among them, what
    was done, the worst memory and time. Seconds are the processor's own: other work on the machine does not count."""
    import pandas as pd

    lines = []
    for name in names or grids.names():
        grid = grids.grid(name)
        of = [result for result in results if name in result["grids"]]
        lines.append({
            "grid": name, "data": grid.dataset, "rows": len(grid.rows), "walked": len(of),
            "architectures": len({result["shapes"] or json.dumps(result["cells"]) for result in of}),
            "training steps": sum(result["did"] == "step" for result in of),
            "forward pass": sum(result["did"] == "forward" for result in of),
            "failed": sum(result["did"] == "failed" for result in of),
            "parameters (M), largest": max((r["parameters"] or 0 for r in of), default=0),
            "peak memory (GiB)": max((r["peak_gib"] for r in of), default=0),
            "CPU seconds, longest": max((r["cpu_seconds"] for r in of), default=0),
        })  # fmt: skip
    return pd.DataFrame(lines)
