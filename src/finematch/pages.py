"""The generated parts of docs/: `readings.md` from the declared switches, `findings.md` from the judged claims.

A part stands between two comments; what stands around it is written by hand and kept.

    <!-- readings slan -->                              the readings of a page, by the name of its presets
    <!-- claims mvam_views: 8 views beat 1; ... -->     claims of a grid; all of its own where none is named
    <!-- end -->
"""

from __future__ import annotations

import html
import re
from pathlib import Path
from typing import Any

import pandas as pd

from finematch import grids
from finematch.config import READINGS, Declared, declared, root
from finematch.files import DataError, write_text
from finematch.readings import in_words
from finematch.tables import NOT_RUN, main_metrics, said, title_of, to_markdown

PART = re.compile(r"(<!-- (readings|claims) (\w+)(?:: ([^\n]+?))? -->\n).*?(<!-- end -->)", re.S)


def rewrite(folder: Path | None = None, figures: Path | None = None) -> list[Path]:
    """Make the parts of the pages in `folder` (docs/) anew; the pages that changed.

    Raises:
        DataError: a part names presets, a grid or a claim that is not there.
    """
    changed = []
    for page in sorted((folder or root() / "docs").glob("*.md")):
        text = page.read_text(encoding="utf-8")
        try:
            new = PART.sub(lambda part: _made(part, figures or root() / "figures"), text)
        except (ValueError, DataError) as error:  # ValueError: presets that are not there
            raise DataError(
                page, "a generated part", f"cannot be made: {error}", "Correct its comment"
            ) from error
        if new != text:
            write_text(page, new)
            changed.append(page)
    return changed


def _made(part: re.Match, figures: Path) -> str:
    begin, kind, name, claims, end = part.groups()
    text = (
        to_markdown(readings(name, figures))
        if kind == "readings"
        else came_out(name, claims and claims.split("; "), figures)
    )
    return f"{begin}\n{text}\n\n{end}"


# ------------------------------------------------------------------------------------------- readings
def readings(presets: str, figures: Path | None = None) -> pd.DataFrame:
    """The readings that a page's parameters choose among, in the order of their register, with what the other values
    change where `8_readings` has measured any of the method."""
    found = [one for one in declared(presets).values() if one.register]
    file = (figures or root() / "figures") / "readings.scenes.tiny.csv"
    measured = in_words(pd.read_csv(file, dtype={"other": str, "default": str})) if file.is_file() else {}
    effects = {switch: said for (method, switch), said in measured.items() if method == presets}
    lines = [
        {
            "id": one.register.replace("-", "–"),
            "argument": f"`{one.name}`",
            "values": _values(one),
            "default": _default(one),
            "literal": "–" if one.literal is None else f"`{_plain(one.literal)}`",
            "what the paper says": html.escape(one.says, quote=False),
        }
        | ({"effect on scenes": effects.get(one.name, "–")} if effects else {})
        for one in sorted(found, key=_place)
    ]
    return pd.DataFrame(lines)


def _place(one: Declared) -> tuple:
    """S2 before S10, what has no number of the register at the end."""
    number = re.fullmatch(r"[A-Z](\d+)", one.register)
    return (0, int(number[1])) if number else (1, one.register)


def _values(one: Declared) -> str:
    if one.choices:
        return ", ".join(f"`{_plain(value)}`" for value in one.choices)
    if one.range:
        return f"{_plain(one.range[0])} to {_plain(one.range[1])}"
    return "`True`, `False`"


def _default(one: Declared) -> str:
    """The value, or those of the presets where they differ: 2 (tiny), 0 (photos, paper)."""
    presets: dict[Any, list[str]] = {}
    for preset, value in one.presets.items():
        presets.setdefault(value, []).append(preset)
    if len(presets) < 2:
        return f"`{_plain(next(iter(presets), one.default))}`"
    return ", ".join(f"`{_plain(value)}` ({', '.join(names)})" for value, names in presets.items())


def _plain(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


# ------------------------------------------------------------------------------------------- claims
def came_out(name: str, claims: list[str] | None, figures: Path) -> str:
    """A table with a line per claim, data set and main metric: the paper's difference, the verdict under each reading.

    Of a grid that has not run at all, its claims and the command that runs it: as the paper did, or a grid of ours at
    our scale.
    """
    grid = grids.grid(name)
    files = sorted(
        figures.glob(f"{name}.*.claims.csv"), key=lambda file: ("scenes" not in file.name, file.name)
    )
    judged = {file: pd.read_csv(file, keep_default_na=False, na_values={"lower": [""]}) for file in files}
    own = list(dict.fromkeys(claim.text for claim in grid.claims))
    claims, known = claims or own, set(own).union(*(frame["claim"] for frame in judged.values()))
    if unknown := [claim for claim in claims if claim not in known]:
        raise DataError(
            root() / "grids" / f"{name}.toml", unknown[0], "is no claim there", "Take one of its texts"
        )
    if not files:
        line = grids.command(grid, grid.dataset, grids.unrun_scale(grid))
        return f"*Not run here*: {'; '.join(claims)}. The command is `{line}`."
    lines = []
    for claim in claims:
        found = [_line(grid, metric, file, of[of["metric"] == metric])
                 for file, frame in judged.items() if len(of := frame[frame["claim"] == claim])
                 for metric in main_metrics(grid, list(dict.fromkeys(of["metric"])))]  # fmt: skip
        found = found or [
            dict.fromkeys(("metric", "data", "the paper"), "") | dict.fromkeys(READINGS, NOT_RUN)
        ]
        lines += [{"claim": "" if number else claim} | line for number, line in enumerate(found)]
    return to_markdown(pd.DataFrame(lines))


def _line(grid: grids.Grid, metric: str, file: Path, of: pd.DataFrame) -> dict[str, str]:
    found = {line["reading"]: said(line) for line in of.to_dict("records")}
    if "both" in found:
        found = dict(zip(READINGS, (found["both"], "the same"), strict=True))
    printed = [float(value) for value in of.get("printed", []) if value != ""]
    dataset = file.name.split(".")[1]
    return {
        "metric": title_of(grid, metric),
        "data": f"[{dataset}](../figures/{file.name.replace('.claims.csv', '.md')})",
        "the paper": f"{printed[0]:+.2f}" if printed else "",
    } | {reading: found.get(reading, NOT_RUN) for reading in READINGS}
