"""Grids as data: `grids/<name>.csv` lists the runs of a table, `grids/<name>.toml` says what the table shows.

A row of the csv is one run (a run per seed): its `name` and its parameters. The toml names the paper's table,
which row of the paper each of ours stands for, the metrics, the claims and the number of seeds. Adding a
table means adding these two files; no code knows a grid by name. Standard library only, so that the Snakefile
and the command line can check a grid without loading anything heavy.
"""

from __future__ import annotations

import csv
import json
import re
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from fnmatch import filter as matching
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from finematch.config import PRESETS, READINGS, ParameterError, Settings, declared, own_reading, root
from finematch.entrants import own_settings
from finematch.files import DataError, run_reference
from finematch.runs import recipe_of

RESERVED = ("seed", "out", "dataset", "scale", "data_root", "smoke", "resume")  # the command line sets these
LINK = re.compile(r"\{run:([a-z0-9-]+)\}")
OF_READINGS = "_readings"  # the end of the name of a grid whose rows are readings
BOXES = "{PROPOSALS}"  # a cell: the file of boxes that the command line names, another on each machine
_SLUG = re.compile(r"[a-z0-9]+(-[a-z0-9]+)*")


@dataclass(frozen=True)
class Claim:
    """One statement to judge: `better` is above `worse` on `metric`; both are rows of the grid. With a `baseline` they
    are one row, whose `metric` is above that other metric of the same run."""

    text: str
    better: str
    worse: str
    metric: str
    baseline: str = ""


@dataclass(frozen=True)
class Grid:
    """A grid as its two files declare it; see docs/adding_a_table.md for the toml's keys.

    `dataset` is the one of the paper's table, on which `make walk` starts the rows.

    `rows` are the cells of the csv, `scales` the parameters that all rows have at a scale beside them (`cells` joins
    both). `names` maps our rows to the paper's, `columns` the paper's columns to our metrics, `also` further
    measured columns (title to metric), `chance` the metric that a random order gives for a column, `plot` the
    columns that are drawn. `untrained` rows do not depend on the seed, `levels` is the row whose levels of
    boxes are judged. `data` is what the paper's numbers were measured on, `measured_on` what ours were, where that is
    not the data set that trained (a slice of COCO); of a grid without a table, `beside` is the table of the paper that
    it is nearest to.
    """

    name: str
    rows: Mapping[str, Mapping[str, str]]
    title: str
    axis: str
    seeds: int
    names: Mapping[str, str]
    columns: Mapping[str, str]
    claims: tuple[Claim, ...]
    paper: str = ""
    table: str = ""
    data: str = ""
    measured_on: str = ""
    beside: str = ""
    dataset: str = ""
    prefix: str | tuple[str, ...] = ""
    ylabel: str = ""
    plot: tuple[str, ...] = ()
    also: Mapping[str, str] = field(default_factory=dict)
    chance: Mapping[str, str] = field(default_factory=dict)
    headline: tuple[str, ...] = ()
    untrained: tuple[str, ...] = ()
    levels: str = ""
    remarks: tuple[str, ...] = ()
    scales: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    page: str = "2_train"
    builds_on: str = ""
    base: Grid | None = None

    @property
    def method(self) -> str:
        """The method whose pages run the rows: the grid's name up to the first underscore."""
        return self.name.split("_")[0]

    @property
    def presets(self) -> str:
        """Whose presets the page takes: the method's, or those of its task (`slan_captioning` of `5_captioning`)."""
        return self.method if self.page == "2_train" else f"{self.method}_{self.page.partition('_')[2]}"

    def of(self, row: str) -> Grid:
        """The grid that has a row: this one, or the one that it builds on."""
        return self if row in self.rows or self.base is None else self.base

    @property
    def linked(self) -> tuple[str, ...]:
        """The rows of `base` that rows build on."""
        names = dict.fromkeys(link for cells in self.rows.values() for link in _links(cells))
        return tuple(name for name in names if name not in self.rows)

    @property
    def boxes(self) -> tuple[str, ...]:
        """The rows, here and of `base`, that read the boxes which the command line names, and those that build on them;
        where there is none, it names them for all."""
        reads = {row for row in (*self.rows, *self.linked) if BOXES in self.of(row).rows[row].values()}
        return tuple(row for row in (*self.rows, *self.linked)
                     if row in reads or reads.intersection(_links(self.of(row).rows[row])))  # fmt: skip

    def cells(self, row: str, scale: str) -> dict[str, str]:
        """A row's parameters at a scale, as cells are written: what its own leave unset, `[scale.<scale>]` may set, and
        `[scale.<scale>.<row>]` goes before both."""
        return {**self.scales.get(scale, {}), **self.rows[row], **self.scales.get(f"{scale}.{row}", {})}


def names(folder: str | Path | None = None) -> list[str]:
    """The grids that there are."""
    return sorted(path.stem for path in _folder(folder).glob("*.csv"))


def grid(name: str, dataset: str = "", *, folder: str | Path | None = None) -> Grid:
    """Read and check both files of a grid.

    Args:
        name: the files' name without its ending.
        dataset: applies the toml's `[on."pattern"]` sections whose pattern matches it (a paper prints several
            datasets; our runs stand beside the columns of the one that they resemble). Their `cells.<row>` replace
            cells of the csv on those datasets.
        folder: where the files are; default: the workbook's `grids/`.

    Raises:
        DataError: a file is missing or malformed, a row or a column is named twice, a column is one that the command
            line sets for every row, a cell is not a value of its parameter (a spreadsheet may have changed it), or the
            toml speaks of a row or key that does not exist.
    """
    rows = read_rows(name, folder=folder)
    path = _folder(folder) / f"{name}.toml"
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError as error:
        problem = f"is missing; {name}.csv lists runs, but nothing says what their table shows"
        raise DataError(path, "the file", problem, "See docs/adding_a_table.md") from error
    except ValueError as error:  # TOML or UTF-8
        raise DataError(path, "the file", f"is not TOML ({error})", "Correct it") from error
    for pattern, section in content.pop("on", {}).items():
        if fnmatch(dataset, pattern):
            content |= section
    for row, cells in content.pop("cells", {}).items():
        if row not in rows:
            raise DataError(path, f"[cells.{row}]", "is no row", f"Rows: {', '.join(rows)}")
        rows[row] |= _parameters(path, f"[cells.{row}]", cells)
    base = content.get("builds_on", "")
    found = _checked(
        path, name, rows, content | {"base": grid(base, dataset, folder=folder) if base else None}
    )
    _check_links(path.with_suffix(".csv"), found)
    _check_values(path.with_suffix(".csv"), found)
    return found


def read_rows(name: str, *, folder: str | Path | None = None) -> dict[str, dict[str, str]]:
    """The rows of `grids/<name>.csv`: name to its cells; empty cells (the notebook's default) are left out.

    Raises:
        DataError: as `grid`.
    """
    path = _folder(folder) / f"{name}.csv"
    if not path.is_file():
        known = ", ".join(names(folder)) or "none"
        raise DataError(path, "the file", "is missing", f"Choose one of the grids that exist: {known}")
    columns, lines = _table(path)
    if "name" not in columns:
        raise DataError(
            path, "the header", f"has no column `name` ({','.join(columns)})", "Separate by commas"
        )
    if twice := [column for column in columns if not column or columns.count(column) > 1]:
        problem = "stands twice: one of its cells would be lost" if twice[0] else "has no name"
        raise DataError(path, f"column {twice[0]!r}", problem, "Rename or remove it")
    if taken := [column for column in columns if column in RESERVED]:
        remedy = "Remove it: the command line sets it for every row (SEEDS=, DATASET=, SCALE= ...)"
        raise DataError(path, f"column {taken[0]}", "is not for a grid to set", remedy)
    rows: dict[str, dict[str, str]] = {}
    for number, line in lines.items():
        label = f"line {number}"
        if len(line) < len(columns) or any(line[len(columns) :]):
            raise DataError(path, label, "has more or fewer cells than the header", "Correct the line")
        cells = {key: cell for key, cell in zip(columns, line, strict=False) if cell}
        row = cells.pop("name", "")
        if not _SLUG.fullmatch(row):
            raise DataError(
                path, label, f"is named {row!r}", "A name is lower-case letters, digits and hyphens"
            )
        if row in rows:
            remedy = "Rename one: the second would never run"
            raise DataError(path, label, f"is named {row!r} like a row before it", remedy)
        rows[row] = cells
    if not rows:
        raise DataError(path, "the file", "lists no runs", "Add a row")
    return rows


def _table(path: Path) -> tuple[list[str], dict[int, list[str]]]:
    """The header of a csv, and its lines that are not empty by their numbers; no cell has blanks around it."""
    found: dict[int, list[str]] = {}
    try:
        with path.open(
            newline="", encoding="utf-8-sig"
        ) as file:  # -sig: spreadsheets write a byte order mark
            lines = csv.reader(file, strict=True)
            for line in lines:
                if any(map(str.strip, line)):
                    found[lines.line_num] = [cell.strip() for cell in line]
    except (UnicodeDecodeError, csv.Error) as error:
        remedy = "Save it as CSV in UTF-8, with commas"
        raise DataError(path, "the file", f"cannot be read ({error})", remedy) from error
    columns = found.pop(next(iter(found), 0), [])
    while columns and not columns[-1]:  # a spreadsheet's empty columns
        columns.pop()
    return columns, found


def _check_links(path: Path, found: Grid) -> None:
    """Refuse a link to no row, or to one that builds on another, and a row that has the folder of another one's run."""
    for row, cells in found.rows.items():
        if found.base and row in found.base.rows:
            problem = f"has the name of a row of {found.builds_on}, whose run it would be taken for"
            raise DataError(path, f"row {row}", problem, "Rename it")
        for linked in _links(cells):
            rows = found.of(linked).rows
            if linked not in rows or _links(rows[linked]):
                problem = f"builds on {linked!r}, which is no row here, or builds on another itself"
                raise DataError(path, f"row {row}", problem, "A link names a row without links")


def _check_values(path: Path, found: Grid) -> None:
    """Refuse a cell that the page would refuse, at either scale."""
    if not (PRESETS / f"{found.presets}.toml").is_file():
        return
    for scale, row in ((scale, row) for scale in ("tiny", "paper") for row in found.rows):
        try:
            settings(found, row, scale=scale)
        except ParameterError as error:
            said = str(error).partition("\nDeclared parameters")[0].replace("\n", "; ")
            remedy = "Correct it; a spreadsheet may have changed it (1e-4 to a date, True to TRUE)"
            raise DataError(path, f"row {row}", f"is refused at scale {scale}: {said}", remedy) from error


def _folder(folder: str | Path | None) -> Path:
    return root() / "grids" if folder is None else Path(folder)


def _links(cells: Mapping[str, str]) -> list[str]:
    return [row for cell in cells.values() for row in LINK.findall(cell)]


def _checked(path: Path, name: str, rows: dict, content: dict) -> Grid:
    """The grid that the toml's `content` declares."""
    known = {
        "title",
        "axis",
        "seeds",
        "rows",
        "columns",
        "judge",
        "claims",
        "scale",
        *Grid.__dataclass_fields__,
    }
    known -= {"name", "names", "scales", "base"}
    if unknown := sorted(content.keys() - known - {"base"}):
        raise DataError(path, unknown[0], "is no key of a grid", f"Known: {', '.join(sorted(known))}")
    if missing := [key for key in ("title", "axis", "seeds", "rows", "columns") if key not in content]:
        raise DataError(path, missing[0], "is missing", "See docs/adding_a_table.md")
    scales = {}
    for scale, found in content.pop("scale", {}).items():
        of_rows = {row: one for row, one in found.items() if row in rows} if isinstance(found, dict) else {}
        for row, one in of_rows.items():
            scales[f"{scale}.{row}"] = _parameters(path, f"[scale.{scale}.{row}]", one)
        of_all = {key: value for key, value in found.items() if key not in of_rows} if of_rows else found
        scales[scale] = _parameters(path, f"[scale.{scale}]", of_all)
    ours = content.pop("rows")
    if ours.keys() != rows.keys():
        odd = sorted(ours.keys() ^ rows.keys())
        raise DataError(
            path, f"[rows] {odd[0]}", f"is not in both {name}.csv and [rows]", "Name each row in both"
        )
    if not (isinstance(content["seeds"], int) and content["seeds"] >= 2):
        raise DataError(
            path, "seeds", "is not an integer of at least 2", "Without a spread nothing is judged"
        )
    judged = content.pop("judge", [])
    claims = []
    for entry in content.pop("claims", []):
        label = f"claim {entry.get('text', '')!r}"
        if "baseline" in entry:
            claims.append(_beside_baseline(path, label, entry, rows))
            continue
        if lacking := [key for key in ("text", "better", "worse") if key not in entry]:
            raise DataError(path, label, f"lacks {lacking[0]}", "A claim has text, better and worse")
        for which in ("better", "worse"):
            if entry[which] not in rows:
                raise DataError(path, label, f"names the row {entry[which]!r}", f"Rows: {', '.join(rows)}")
        if entry["better"] == entry["worse"]:
            raise DataError(path, label, "compares a row with itself", "Name two rows")
        metrics = [name for one in entry.get("metrics", judged) for name in matching(judged, one) or [one]]
        if lost := [name for name in metrics if "*" in name]:
            raise DataError(path, label, f"has the metric {lost[0]!r}", f"`judge` has {', '.join(judged)}")
        if not metrics:
            raise DataError(path, label, "has no metric", "Give the claim `metrics`, or the grid `judge`")
        claims += [Claim(entry["text"], entry["better"], entry["worse"], metric) for metric in metrics]
    for key in ("untrained", "levels"):
        named = content.get(key, ())
        for row in [named] if isinstance(named, str) else named:
            if row not in rows:
                raise DataError(path, key, f"names the row {row!r}", f"Rows: {', '.join(rows)}")
    for key in ("plot", "chance"):
        for column in content.get(key, ()):
            if column not in content["columns"]:
                raise DataError(path, key, f"names the column {column!r}", "It is not in [columns]")
    lists = {key: tuple(value) for key, value in content.items() if isinstance(value, list)}
    return Grid(name=name, rows=rows, names=ours, claims=tuple(claims), scales=scales, **(content | lists))


def _beside_baseline(path: Path, label: str, entry: dict, rows: dict) -> Claim:
    """The claim that a row's metric is above a baseline that its runs have measured beside it."""
    wanted = ("text", "row", "metric", "baseline")
    if odd := sorted(entry.keys() ^ set(wanted)):
        raise DataError(
            path, label, f"has or lacks {odd[0]}", f"A claim with a baseline has {', '.join(wanted)}"
        )
    if entry["row"] not in rows:
        raise DataError(path, label, f"names the row {entry['row']!r}", f"Rows: {', '.join(rows)}")
    return Claim(entry["text"], entry["row"], entry["row"], entry["metric"], entry["baseline"])


def _parameters(path: Path, label: str, found: Any) -> dict[str, str]:
    """The parameters of a section of the toml, as cells."""
    if not isinstance(found, dict) or any(isinstance(value, (dict, list)) for value in found.values()):
        raise DataError(
            path, label, "is not a section of parameters", "Write one parameter a line: name = value"
        )
    if taken := [name for name in found if name in RESERVED]:
        remedy = "Remove it: the command line sets it for every row (SEEDS=, DATASET=, SCALE= ...)"
        raise DataError(path, f"{label} {taken[0]}", "is not for a grid to set", remedy)
    return {name: str(value) for name, value in found.items()}


def label(scale: str, reading: str = "", *, smoke: bool = False) -> str:
    """What stands for the scale in the names of runs: `tiny`; `tiny-literal` where the reading is not the scale's own;
    `smoke` and `smoke-literal` of smoke runs. So a run is never taken for one of the other reading."""
    name = "smoke" if smoke else scale
    return name if reading in ("", "both", own_reading(scale)) else f"{name}-{reading}"


def shared(grid: Grid, row: str, dataset: str, scale: str) -> bool:
    """Whether a row, and what it builds on, has the same settings under both readings: then one run stands for both."""
    try:
        for name in (row, *_links(grid.of(row).cells(row, scale))):
            default, literal = (
                _but_reading(settings(grid.of(name), name, reading=reading, dataset=dataset, scale=scale))
                for reading in READINGS
            )
            if default != literal:
                return False
    except ParameterError:  # no presets of such a method
        return False
    return True


def _but_reading(s: Settings) -> dict[str, Any]:
    """What the numbers of a run depend on, without the names of the readings that made it."""
    found = {name: value for name, value in s.identity().items() if name not in ("reading", "recipe")}
    if s.method == "arena":
        found["recipe"] = _but_reading(own_settings(s))
    return found


def readings(grid: Grid, dataset: str, scale: str) -> tuple[str, ...]:
    """The readings under which a grid is run: ("both",) where no row differs between them; the scale's own where the
    rows of the grid are themselves readings."""
    if grid.name.endswith(OF_READINGS):
        return (own_reading(scale),)
    return ("both",) if all(shared(grid, row, dataset, scale) for row in grid.rows) else READINGS


def run_name(
    grid: Grid, row: str, dataset: str, scale: str, reading: str = "", *, smoke: bool = False
) -> str:
    """The name of a row's run folders, up to the seed."""
    if reading not in ("", own_reading(scale)) and shared(grid, row, dataset, scale):
        reading = ""
    return f"{dataset}.{label(scale, reading, smoke=smoke)}.{row}"


def command(grid: Grid, dataset: str, scale: str, reading: str = "") -> str:
    """The line that runs a grid under a reading; it names a file of boxes where rows read one."""
    given = {"SCALE": scale if scale != "tiny" else "", "DATASET": dataset if dataset != "scenes" else "",
             "DATA_ROOT": "<folder>" if dataset != "scenes" else "",
             "PROPOSALS": "<file>" if grid.boxes else "",
             "READING": reading if reading not in ("", "both", own_reading(scale)) else ""}  # fmt: skip
    return " ".join(
        ["make grid", f"GRID={grid.name}", *(f"{key}={value}" for key, value in given.items() if value)]
    )


def unrun_scale(grid: Grid) -> str:
    """The scale that a grid without any run is started at: the paper's; ours where it is no table of a paper."""
    return "paper" if grid.paper else "tiny"


def metrics_files(
    grid: Grid,
    dataset: str,
    scale: str,
    reading: str = "",
    *,
    smoke: bool = False,
    seeds: Iterable[int] | None = None,
    runs: str | Path | None = None,
) -> list[Path]:
    """The metrics files that the grid's rows have under a reading ("" and "both" are the scale's own), in the order of
    rows and seeds."""
    folder = root() / "papermill_runs" / grid.method if runs is None else Path(runs)
    found = []
    for row in grid.rows:
        name = run_name(grid, row, dataset, scale, reading, smoke=smoke)
        of_row = {int(f.parent.name.rpartition(".s")[2]): f
                  for f in folder.glob(f"{name}.s*/metrics.json")
                  if f.parent.name.rpartition(".s")[2].isdigit()}  # fmt: skip
        found += [of_row[seed] for seed in sorted(of_row) if seeds is None or seed in seeds]
    return found


def mismatches(grid: Grid, file: Path) -> list[str]:
    """What a run's parameters have against the row that its folder is named after; empty where they agree.

    A cell of the csv is read as papermill's `-p` reads it. Settings that the row leaves to the notebook are
    compared too where the metrics file has an identity; older files name some of them otherwise, and are of their
    scale's own reading.

    Raises:
        DataError: a file that is no metrics file.
    """
    dataset, name, row, seed = _parts(file)
    try:
        content = json.loads(Path(file).read_text(encoding="utf-8"))
        parameters = content["parameters"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(
            file, "the file", f"is not a metrics file ({error})", "Delete it and run again"
        ) from error
    said, _, other = name.partition("-")
    smoke, scale = said == "smoke", parameters.get("scale", said)
    parameters = {"reading": own_reading(scale)} | parameters

    def linked(link: re.Match) -> str:  # a neighbour's folder
        neighbour = run_name(grid.of(link[1]), link[1], dataset, scale, other, smoke=smoke)
        return str(Path(file).parent.with_name(f"{neighbour}.s{seed}"))

    wanted = {"reading": other or own_reading(scale)}
    wanted |= {key: _typed(LINK.sub(linked, cell)) for key, cell in grid.cells(row, scale).items()}
    wanted |= {"seed": int(seed), "dataset": dataset, "smoke": smoke}
    if not smoke:
        wanted["scale"] = said
    if "identity" in content:
        wanted = _resolved(grid, wanted) | wanted
    if wanted.get("precision") == "auto":  # whatever the run's device made of it
        del wanted["precision"]
    own = {"detector": ("", "boxes"), "proposals": ("auto", "selective_search", "grid", "rpn", "queries")}
    for key, words in own.items():  # PROPOSALS=<file>: as DATA_ROOT, it is for whoever runs
        cell = grid.rows[row].get(key, "" if grid.method == "slan" else BOXES)
        if cell == BOXES and parameters.get(key) not in (None, *words):
            wanted.pop(key, None)
    return [f"{key} is {parameters.get(key)!r}, the row says {value!r}" for key, value in wanted.items()
            if not _same(parameters.get(key), value)] + _recipe_changed(content)  # fmt: skip


def _recipe_changed(content: Mapping[str, Any]) -> list[str]:
    """What an entrant of the arena had from its method's presets and has otherwise today."""
    if not (was := content.get("identity", {}).get("recipe")):
        return []
    s = Settings("arena", {name: content["parameters"].get(name) for name in declared("arena")})
    now = recipe_of(s, own_settings(s))
    names = was["settings"].keys() | now["settings"].keys()
    return [f"{now['method']}'s {name} was {was['settings'].get(name)!r}, is {now['settings'].get(name)!r}"
            for name in sorted(names) if not _same(was["settings"].get(name), now["settings"].get(name))]  # fmt: skip


def earlier(grid: Grid, file: Path) -> list[str]:
    """Settings of a run without an identity that its row would have otherwise today: a default changed since the run.

    A setting that the file does not name came after the run, which had its literal value: new defaults begin so.
    """
    content = json.loads(Path(file).read_text(encoding="utf-8"))
    parameters = content["parameters"]
    dataset, name, row, _ = _parts(file)
    if "identity" in content or not (PRESETS / f"{grid.presets}.toml").is_file():
        return []
    scale, _, other = name.partition("-")
    cells = {key: _typed(cell) for key, cell in grid.cells(row, scale).items() if not LINK.search(cell)}
    reading = other or own_reading(scale)
    today, literal = (_resolved(grid, {**cells, "dataset": dataset, "scale": scale, "reading": one})
                      for one in (reading, "literal"))  # fmt: skip
    was = literal | {key: value for key, value in parameters.items() if value is not None}
    return [key for key, value in today.items()
            if value != "auto" and key not in (*RESERVED, "reading") and not _same(was[key], value)]  # fmt: skip


def _resolved(grid: Grid, given: Mapping[str, Any]) -> dict[str, Any]:
    """All settings that can change the numbers of a run with these parameters, as its notebook resolves them."""
    try:
        settings = Settings(grid.presets, given).identity()
    except ParameterError as error:
        raise DataError(
            f"grids/{grid.name}.csv", "a row", f"is refused: {error}", "Correct the row"
        ) from error
    # numbers with commas, as a metrics file has them
    return {name: ", ".join(map(str, value)) if isinstance(value, tuple) else value
            for name, value in settings.items()}  # fmt: skip


def stale(
    grid: Grid,
    dataset: str,
    scale: str,
    reading: str = "",
    *,
    smoke: bool = False,
    runs: str | Path | None = None,
) -> list[Path]:
    """Metrics files whose parameters are not their row's, those of rows that build on such a run (here, or of the grid
    that this one builds on), and those whose run was made again since they read it."""

    def changed(table: Grid, file: Path) -> bool:
        row, seed = _parts(file)[2:]
        if mismatches(table, file) or made_again(file):
            return True
        for link in _links(table.rows[row]):
            name = run_name(table.of(link), link, dataset, scale, reading, smoke=smoke)
            other = file.parent.with_name(f"{name}.s{seed}") / "metrics.json"
            if other.is_file() and changed(table.of(link), other):
                return True
        return False

    files = metrics_files(grid, dataset, scale, reading, smoke=smoke, runs=runs)
    return [file for file in files if changed(grid, file)]


def made_again(file: Path) -> list[str]:
    """The parameters of a run that name another one (a folder beside it), where that is not the run which it read."""
    settings = json.loads(Path(file).read_text(encoding="utf-8")).get("identity", {}).get("settings", {})
    return [name for name, content in built_on(file).items() if run_reference(content) != settings[name]]


def built_on(file: Path) -> dict[str, dict]:
    """The metrics files, read, of the runs beside this one that its parameters name, by parameter."""
    content = json.loads(Path(file).read_text(encoding="utf-8"))
    found = {}
    for name, value in content.get("identity", {}).get("settings", {}).items():
        if str(value).startswith("run:"):
            other = Path(file).parent.with_name(Path(str(content["parameters"][name])).name) / "metrics.json"
            if other.is_file():
                found[name] = json.loads(other.read_text(encoding="utf-8"))
    return found


def _parts(file: str | Path) -> tuple[str, str, str, str]:
    """Dataset, `label`, row and seed of `.../<dataset>.<label>.<row>.s<seed>/metrics.json`."""
    dataset, name, row, seed = Path(file).parent.name.rsplit(".", 3)
    return dataset, name, row, seed.removeprefix("s")


def settings(grid: Grid, row: str, *, reading: str = "", **given: Any) -> Settings:
    """The settings of a row's runs under a reading, which its cells go before; `given` is what the command line sets,
    `scale` at least.

    Raises:
        ParameterError: a cell that the method refuses.
    """
    cells = {key: _typed(cell) for key, cell in grid.cells(row, given["scale"]).items()}
    return Settings(grid.presets, {"reading": reading or None} | cells | given)


def _typed(cell: str) -> Any:
    """A cell as papermill's `-p` reads it."""
    if cell in ("True", "False", "None"):
        return {"True": True, "False": False, "None": None}[cell]
    for kind in (int, float):
        try:
            return kind(cell)
        except ValueError:
            continue
    return cell


def _same(found: Any, wanted: Any) -> bool:
    if isinstance(found, bool) or isinstance(wanted, bool):
        return found is wanted
    if isinstance(wanted, str) and isinstance(found, str) and "/" in wanted:  # a path: the same last parts
        parts = Path(found).parts, Path(wanted).parts
        return parts[0][-2:] == parts[1][-2:]
    return found == wanted
