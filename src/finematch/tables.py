"""Published against measured: metrics files in, tables and verdicts out.

A number is printed with its spread over seeds, a claim is judged by a stated test, and what was not run is said to be
not run.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from scipy import stats

from finematch.config import OUTSIDE_IDENTITY, READINGS, ParameterError, declared
from finematch.files import DataError, write_text
from finematch.grids import (
    Claim,
    Grid,
    built_on,
    command,
    earlier,
    made_again,
    metrics_files,
    mismatches,
    readings,
)
from finematch.runs import LABELS, measured, status_of, versions_of

PUBLISHED = Path(__file__).with_name("published.csv")


def published(paper: str, table: str | int | None = None, *, path: str | Path = PUBLISHED) -> pd.DataFrame:
    """Numbers a paper prints, in its order: `paper, table, row, column, value, note`.

    Raises:
        DataError: an unknown paper or table.
    """
    frame = pd.read_csv(
        path, dtype={"table": str, "row": str, "column": str, "note": str}, keep_default_na=False
    )
    for column, wanted in (("paper", paper), ("table", table)):
        if wanted is None:
            continue
        known = list(frame[column].unique())
        if str(wanted) not in known:
            raise DataError(path, f"{column} {wanted}", "is not there", f"Choose one of {', '.join(known)}")
        frame = frame[frame[column] == str(wanted)]
    return frame.reset_index(drop=True)


def summary(frame: pd.DataFrame, by: Sequence[str], metrics: Sequence[str]) -> pd.DataFrame:
    """Mean, standard deviation (`n - 1`; blank for one run) and number of runs over seeds.

    Returns:
        The columns `by`, then `<metric>` and `<metric> sd` for each metric, then `n`; in order of appearance.

    Raises:
        ValueError: an unknown column, or two runs of a group with one seed: they differ in something else,
            and would be averaged as if they were independent.
    """
    by, metrics = list(by), list(metrics)
    columns = [*by, *metrics, *(f"{metric} sd" for metric in metrics), "n"]
    if frame.empty:
        return pd.DataFrame(columns=columns)
    if unknown := [name for name in (*by, *metrics, "seed") if name not in frame]:
        raise ValueError(f"no column {', '.join(unknown)}; there are {', '.join(map(str, frame.columns))}")
    for key, group in frame.groupby([*by, "seed"], sort=False, dropna=False):
        if len(group) > 1:
            same = ", ".join(f"{name}={value}" for name, value in zip([*by, "seed"], key, strict=True))
            differ = [
                name
                for name in frame
                if name not in metrics
                and not name.startswith("run_")
                and group[name].nunique(dropna=False) > 1
            ]
            raise ValueError(
                f"{len(group)} runs have {same}; group by what differs ({', '.join(differ) or 'nothing'}), "
                "or drop the copies"
            )
    rows = []
    for key, group in frame.groupby(by, sort=False, dropna=False):
        row = dict(zip(by, key, strict=True))
        for metric in metrics:
            values = group[metric].astype(float)
            if values.isna().any():
                raise ValueError(f"a run of {row} has no {metric}")
            row[metric], row[f"{metric} sd"] = values.mean(), values.std(ddof=1)
        rows.append(row | {"n": len(group)})
    return pd.DataFrame(rows)[columns]


def table(
    published: pd.DataFrame,
    measured: pd.DataFrame,
    *,
    row: str,
    columns: Mapping[str, str],
    rows: Mapping | None = None,
) -> pd.DataFrame:
    """A paper's table with our numbers beside it.

    Args:
        published: one table, from `published()`.
        measured: from `summary()`.
        row: the column of `measured` that says which row of the paper a line belongs to.
        columns: the paper's column name to ours: `{"i2t@1": "i2t_r1"}`.
        rows: our value of `row` to the paper's row name, where they differ: `{"mvam": "FRCNN +MVAM"}`.

    Returns:
        `row`, then for each column `<column> published`, `<column> measured`, `<column> measured sd`; `n`.
        Rows in the paper's order, blank (and n = 0) where nothing was run; then rows of ours alone.

    Raises:
        ValueError: a column that the paper's table does not have, or two lines of ours for one row.
    """
    if unknown := set(columns) - set(published["column"]):
        raise ValueError(
            f"the table has no column {sorted(unknown)}; it has {list(published['column'].unique())}"
        )
    rows = rows or {}
    ours = {}
    for line in measured.to_dict("records"):
        value = line[row]
        if isinstance(value, float) and value.is_integer():
            value = int(value)  # a column of integers becomes floats where other runs lack the parameter
        name = str(rows.get(value, value))
        if name in ours:
            raise ValueError(f"two measured lines for the row {name!r}: select one dataset and scale first")
        ours[name] = line
    printed = published.set_index(["row", "column"])["value"]
    result = []
    for name in dict.fromkeys([*published["row"], *ours]):
        line = {"row": name}
        for theirs, mine in columns.items():
            line[f"{theirs} published"] = printed.get((name, theirs), np.nan)
            line[f"{theirs} measured"] = ours[name][mine] if name in ours else np.nan
            line[f"{theirs} measured sd"] = ours[name][f"{mine} sd"] if name in ours else np.nan
        result.append(line | {"n": int(ours[name]["n"]) if name in ours else 0})
    return pd.DataFrame(result)


def to_markdown(frame: pd.DataFrame, *, digits: int = 2) -> str:
    """A pipe table. `x` and `x sd` become one column "mean ± sd"; blanks are "–"; integers stay integers."""

    def cell(value: Any, spread: Any = None) -> str:
        if value is None or (isinstance(value, float) and math.isnan(value)):
            return "–"
        if not isinstance(value, (float, np.floating)):
            return str(value).replace("|", "\\|")
        text = f"{value:.{digits}f}"
        return text if spread is None or pd.isna(spread) else f"{text} ± {spread:.{digits}f}"

    spreads = {name for name in frame if name.endswith(" sd") and name[:-3] in frame}
    shown, sides = pd.DataFrame(index=frame.index), []
    for name in [name for name in frame if name not in spreads]:
        of = frame[f"{name} sd"] if f"{name} sd" in spreads else [None] * len(frame)
        shown[name] = [cell(value, spread) for value, spread in zip(frame[name], of, strict=True)]
        text = frame[name].dtype == object or pd.api.types.is_string_dtype(frame[name])
        sides.append("left" if text else "right")
    return shown.to_markdown(index=False, tablefmt="pipe", disable_numparse=True, colalign=sides)


def replace_block(path: str | Path, name: str, markdown: str) -> bool:
    """Put `markdown` between `<!-- name:begin -->` and `<!-- name:end -->`; True if the file changed.

    Raises:
        DataError: the markers are not there exactly once each, in this order.
    """
    path = Path(path)
    text = path.read_text(encoding="utf-8")
    begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
    if text.count(begin) != 1 or text.count(end) != 1 or text.index(begin) > text.index(end):
        raise DataError(
            path, f"block {name}", f"is not marked by one {begin} and one {end}", "Add the two lines"
        )
    head, rest = text.split(begin)
    new = f"{head}{begin}\n{markdown.strip()}\n{end}{rest.split(end)[1]}"
    if new != text:
        write_text(path, new)
    return new != text


HOLDS, CONTRADICTED, UNDECIDED, NOT_RUN = VERDICTS = ("holds", "contradicted", "undecided", "not run")
LEVEL = 0.95  # of the two-sided interval
# Parameters that set which data is read and in which order; two rows that share them and their seeds see the
# same batches, so that their runs are compared in pairs.
ORDER = ("dataset", "scale", "smoke", "data", "epochs", "encoder_epochs", "batch_size", "report", "shards")
# A verdict where no run is.
NOTHING = {"verdict": NOT_RUN, "difference": None, "lower": None, "upper": None, "test": None, "n_a": 0, "n_b": 0,
           "note": "", "earlier": ""}  # fmt: skip
# Runs that differ in nothing else are one condition.
OUTSIDE = ("seed", *OUTSIDE_IDENTITY)


def judge(
    frame_a: pd.DataFrame,
    frame_b: pd.DataFrame,
    metric: str,
    *,
    higher_is_better: bool = True,
) -> dict:
    """Is A above B on `metric`, over seeds? By Student's two-sided t interval on the difference of means.

    The verdict is "holds" where the interval lies above zero, "contradicted" where it lies below, "undecided"
    where it contains zero, and "not run" where a frame has fewer than two runs, for without a spread there is
    no interval. With two to five seeds the test is weak: "undecided" is not evidence against a claim.

    The test is paired where both frames have the same seeds, the same data and the same order of the training
    pairs (the columns of `ORDER` agree): the interval is that of the differences seed by seed. Otherwise it is
    Welch's (independent runs whose variances may differ).

    Returns:
        `verdict`, `difference` (A minus B; B minus A where lower is better), `lower`, `upper` (the interval),
        `test` ("paired" or "Welch"), `n_a`, `n_b`, `note` (why nothing was judged); None where undefined.

    Raises:
        ValueError: a seed twice in one frame, a run without the metric, or frames that hold one condition:
            the same files, or parameters that differ in the seed alone.
    """
    result = NOTHING | {"n_a": len(frame_a), "n_b": len(frame_b)}
    frames = [frame_a, frame_b] if higher_is_better else [frame_b, frame_a]
    for frame in frames:
        twice = frame["seed"][frame["seed"].duplicated()] if len(frame) else []
        if len(twice):
            raise ValueError(f"seed {twice.iloc[0]} occurs twice: narrow the selection")
        if len(frame) and (metric not in frame or frame[metric].isna().any()):
            raise ValueError(f"a run has no {metric}")
    if len(frame_a) and len(frame_b) and _one_condition(frame_a, frame_b):
        raise ValueError("both hold runs of one condition: there is nothing to compare")
    few = [f"{name} has {len(frame) or 'no'} run{'s' * (len(frame) != 1)}"
           for name, frame in (("the first", frame_a), ("the second", frame_b)) if len(frame) < 2]  # fmt: skip
    if few:
        return result | {"note": f"{' and '.join(few)}; an interval needs two seeds"}
    a, b = (frame.set_index("seed")[metric].astype(float).sort_index() for frame in frames)
    if _same_batches(*frames):
        test, found = "paired", stats.ttest_rel(a, b) if (a - b).std() > 0 else None
    else:
        test, found = "Welch", stats.ttest_ind(a, b, equal_var=False) if a.std() or b.std() else None
    difference = float(a.mean() - b.mean())
    lower, upper = (difference, difference) if found is None else map(float, found.confidence_interval(LEVEL))
    result |= {"difference": difference, "lower": lower, "upper": upper, "test": test}
    if found is None and difference == 0:
        result["note"] = "the numbers are the same in every seed"
    return result | {"verdict": HOLDS if lower > 0 else CONTRADICTED if upper < 0 else UNDECIDED}


def _one_condition(a: pd.DataFrame, b: pd.DataFrame) -> bool:
    if "run_file" in a and "run_file" in b and set(a["run_file"]) & set(b["run_file"]):
        return True
    if "run_conditions" not in a or "run_conditions" not in b:
        return False
    return bool(set(a["run_conditions"]) & set(b["run_conditions"]))


def _same_batches(a: pd.DataFrame, b: pd.DataFrame) -> bool:
    """Whether the runs of one seed saw the same data in the same order in both frames."""
    if set(a["seed"]) != set(b["seed"]):
        return False
    shared = [name for name in (*ORDER, "run_data") if name in a or name in b]
    if any(name not in a or name not in b for name in shared):
        return False
    a, b = (frame.set_index("seed")[shared].sort_index().astype(str) for frame in (a, b))
    return a.equals(b)


def runs_of(
    grid: Grid, dataset: str, scale: str, runs: str | Path | None = None, *, smoke: bool = False
) -> dict[str, pd.DataFrame]:
    """All finished runs of a grid's rows by reading, "default" and "literal", or "both" where no row differs.

    A frame has `measured`'s columns and `row`, `run_conditions`, `run_data`, and may be empty. `run_conditions` holds
    all parameters that can change a number but the seed, `run_data` the digests of the data where the metrics file has
    them, `run_earlier` the settings whose defaults have changed since (`grids.earlier`). `run_status` is `legacy`, too,
    where a run that this one read was made again (`grids.made_again`) or is legacy itself.

    Raises:
        DataError: a metrics file whose parameters are not those of its row (the row was edited after the
            run), or seeds of a row whose settings differ: `make grid` runs such a row again, `python -m finematch
            stale` lists the first kind.
    """
    found = {}
    for reading in readings(grid, dataset, scale):
        files = metrics_files(grid, dataset, scale, reading, smoke=smoke, runs=runs)
        for file in files:
            if wrong := mismatches(grid, file):
                raise DataError(file, "parameters", f"are not those of its row: {'; '.join(wrong)}",
                                f"Run the row again ({command(grid, dataset, scale, reading)})")  # fmt: skip
        frame = _with_rows(files).assign(run_earlier=[", ".join(earlier(grid, file)) for file in files])
        _check_seeds(frame, command(grid, dataset, scale, reading))
        for i, file in enumerate(files):
            if names := made_again(file):
                frame.loc[i, "run_status"] = f"legacy: its {', '.join(names)} was made again since"
            elif any(status_of(content).startswith("legacy") for content in built_on(file).values()):
                frame.loc[i, "run_status"] = "legacy: the run that it builds on is legacy"
        found[reading] = frame
    return found


# what all seeds of a row have in common, and what it is called where they have not
SHARED_BY_SEEDS = {"run_conditions": "settings", "run_numerics": "arithmetic", "run_data": "data",
                   "run_features": "features"}  # fmt: skip


def _check_seeds(runs: pd.DataFrame, line: str) -> None:
    """Seeds of a row differ in nothing else: not in their settings, their arithmetic, their data or their features.
    Runs of before these were recorded are left out."""
    for row, of in runs[runs["run_numerics"] > 0].groupby("row") if len(runs) else ():
        for column, what in SHARED_BY_SEEDS.items():
            if column in of and of[column].nunique() > 1:
                first, other = of[column].iloc[0], of.loc[of[column] != of[column].iloc[0]].iloc[0]
                raise DataError(other["run_file"], f"row {row}", f"has other {what} than the row's seed "
                                f"{of['seed'].iloc[0]}: {_difference(first, other[column])}",
                                f"Run all seeds of the row in one way ({line} FORCE=1)")  # fmt: skip


def _difference(one: Any, other: Any) -> str:
    """What differs between two conditions, as JSON, or two numbers."""
    if not isinstance(one, str):
        return f"{other} in place of {one}"
    one, other = json.loads(one), json.loads(other)
    names = sorted(name for name in one.keys() | other.keys() if one.get(name) != other.get(name))
    return ", ".join(f"{name} is {other.get(name)!r}, not {one.get(name)!r}" for name in names)


def _with_rows(files: Sequence[Path]) -> pd.DataFrame:
    frame = measured(files)
    if frame.empty:
        return pd.DataFrame(columns=["row", "seed"])
    frame["row"] = [file.parent.name.rsplit(".", 2)[1] for file in files]
    contents = [json.loads(file.read_text(encoding="utf-8")) for file in files]
    frame["run_conditions"] = [json.dumps(_conditions(one), sort_keys=True) for one in contents]
    frame["run_numerics"] = [one.get("identity", {}).get("numerics", 0) for one in contents]
    frame["run_data"] = [json.dumps(one.get("identity", {}).get("data"), sort_keys=True) for one in contents]
    frame["run_features"] = [
        json.dumps(one.get("identity", {}).get("features"), sort_keys=True) for one in contents
    ]
    frame["run_networks"] = [
        json.dumps(networks_of(one.get("identity", {})), sort_keys=True) for one in contents
    ]
    frame["run_behind"] = [
        json.dumps([now - was for was, now in versions_of(one) if now != was]) for one in contents
    ]
    return frame


def networks_of(identity: Mapping[str, Any]) -> dict[str, str]:
    """The frozen networks of a run's features, and what a detector learned for it: the digest of the weights of each,
    by what it says of itself. Two trainings of one network have one name here and two digests."""
    found = {f"made: {name}": value for name, value in identity.get("made", {}).items()}

    def walk(part: Any) -> None:
        if isinstance(part, Mapping):
            if isinstance(part.get("weights"), str):
                said = {
                    name: part[name] for name in ("backbone", "model", "size", "trained_on") if name in part
                }
                found[json.dumps(_without_weights(said), sort_keys=True)] = part["weights"]
            for value in part.values():
                walk(value)
        elif isinstance(part, (list, tuple)):
            for value in part:
                walk(value)

    walk(identity.get("features"))
    return found


def _without_weights(part: Any) -> Any:
    if isinstance(part, Mapping):
        return {name: _without_weights(value) for name, value in part.items() if name != "weights"}
    return part


def _conditions(content: Mapping[str, Any]) -> dict[str, Any]:
    """The parameters of a run that can change a number, but the seed: a file by its content where that is known, a run
    that this one builds on by its folder without the seed. With what its recipe and its detector are, under names that
    no parameter has."""
    identity = content.get("identity", {})
    settings = identity.get("settings", {})
    found = {f"identity.{name}": identity[name] for name in ("recipe", "made") if name in identity}
    for name, value in content["parameters"].items():
        if name in OUTSIDE:
            continue
        if isinstance(value, str) and value:
            of_run = re.fullmatch(r"(.*)\.s\d+((?:/.*)?)", value)
            value = of_run[1] + of_run[2] if of_run else settings.get(name, value)
        found[name] = value
    return found


def about(grid: Grid, runs: Mapping[str, pd.DataFrame]) -> str:
    """What the runs of a grid are, by reading: how many, by which protocol, from which commits, which are missing."""
    if all(of.empty for of in runs.values()):
        return f"No run of {grid.name} has finished here: make grid GRID={grid.name} makes them."
    return "\n\n".join(
        f"Reading {reading if reading != 'both' else 'default, which here is literal too'}. {_about(grid, of)}"
        for reading, of in runs.items()
    )


def _about(grid: Grid, runs: pd.DataFrame) -> str:
    if runs.empty:
        return "No run has finished."
    lines = [f"{len(runs)} runs, {runs['run_seconds'].sum() / 60:.0f} minutes of training in all."]
    lines += [f"Protocol: {protocol}." for protocol in runs["run_protocol"].unique()]
    lines.append(f"Commits: {', '.join(sorted({str(c)[:9] for c in runs['run_commit']}))}.")
    for status, of in runs[runs["run_status"].str.startswith("legacy")].groupby("run_status"):
        lines.append(f"{len(of)} of them are {status}.")
    for names, of in runs[runs["run_earlier"] != ""].groupby("run_earlier"):
        lines.append(f"{len(of)} of them were made with earlier defaults of {names}: today's give others.")
    counts = runs.groupby("row").size().reindex(list(grid.rows), fill_value=0)
    if len(few := counts[counts < grid.seeds]):
        lines.append(
            f"{grid.seeds} seeds are planned; fewer have run of "
            + ", ".join(f"{row} ({count})" for row, count in few.items()) + "."
        )  # fmt: skip
    return "\n".join(lines)


def printed(grid: Grid) -> pd.DataFrame:
    """The paper's cells that the grid's columns name, without the prefix; empty cells if there is no table.

    Of several prefixes each gives rows of its own, the prefix before the paper's row: "Zero-shot Ours".
    """
    if not grid.table:
        cells = [{"row": row, "column": column} for row in grid.names.values() for column in grid.columns]
        return pd.DataFrame(cells).assign(value=float("nan"), note="")
    frame, parts = published(grid.paper, grid.table), []
    for prefix in [grid.prefix] if isinstance(grid.prefix, str) else grid.prefix:
        part = frame[frame["column"].str.startswith(prefix)]
        named = part["row"] if isinstance(grid.prefix, str) else prefix + part["row"]
        parts.append(part.assign(row=named, column=part["column"].str.removeprefix(prefix)))
    frame = pd.concat(parts)
    ours = frame["row"].isin(grid.names.values()) & frame["column"].isin(grid.columns)
    return frame[ours].reset_index(drop=True)


def beside(grid: Grid, runs: pd.DataFrame) -> pd.DataFrame:
    """The grid's table: published and measured columns side by side, one line per row, and a random order's."""
    ours = summary(runs, ["row"], list(grid.columns.values()))
    frame = table(printed(grid), ours, row="row", columns=grid.columns, rows=grid.names)
    frame["status"] = frame["row"].map(_status(grid, runs))
    if grid.chance and len(runs):
        line = {f"{column} measured": runs[metric].mean() for column, metric in grid.chance.items()}
        frame = pd.concat([frame, pd.DataFrame([{"row": "a random order"} | line])], ignore_index=True)
        frame["n"] = frame["n"].astype("Int64").astype(object).where(frame["n"].notna(), None)
    return frame


def beside_readings(grid: Grid, runs: Mapping[str, pd.DataFrame]) -> pd.DataFrame:
    """`beside` of every reading that has runs, in one table: `<column> published`, `<column> default`, `<column>
    literal`. Where one has, it is that one's `beside`."""
    ran = {reading: of for reading, of in runs.items() if len(of)} or dict([*runs.items()][:1])
    tables = {reading: beside(grid, of) for reading, of in ran.items()}
    if len(tables) == 1:
        return next(iter(tables.values()))
    joined = None
    for reading, frame in tables.items():
        frame = frame.rename(columns=lambda name, by=reading: re.sub(r" measured( sd)?$", rf" {by}\1", name))
        frame = frame.rename(columns={"n": f"n {reading}", "status": f"status {reading}"})
        new = ["row", *(name for name in frame if joined is None or name not in joined)]
        joined = frame if joined is None else joined.merge(frame[new], on="row", how="outer", sort=False)
    order = ["row"]
    for column in grid.columns:
        order += [f"{column} published", *(f"{column} {by}{sd}" for by in tables for sd in ("", " sd"))]
    rows = list(dict.fromkeys(row for frame in tables.values() for row in frame["row"]))
    joined = joined.set_index("row").loc[rows].reset_index()
    return joined[[*order, *(f"{name} {by}" for name in ("n", "status") for by in tables)]]


def by_reading(frames: Mapping[str, pd.DataFrame], *, digits: int = 2, otherwise: str) -> str:
    """A table of each reading as Markdown, one below the other; a sentence where it is empty."""
    return "\n\n".join(
        f"Reading {reading}:\n\n{to_markdown(frame, digits=digits) if len(frame) else otherwise}"
        for reading, frame in frames.items()
    )


def _status(grid: Grid, runs: pd.DataFrame) -> dict[str, str]:
    """By the paper's row: "legacy" if any run of it is, else "current"; changed defaults; the labels of its runs."""
    found = {}
    for row, of_row in runs.groupby("row"):
        old = of_row["run_status"].astype(str).str.startswith("legacy").any()
        was = [f"earlier defaults of {names}" for names in sorted(set(of_row["run_earlier"]) - {""})]
        found[grid.names[row]] = "; ".join(["legacy" if old else "current", *was, *_labels(of_row)])
    return found


def _labels(runs: pd.DataFrame) -> list[str]:
    """The labels of any of the runs, in the order of `LABELS`."""
    stated = set(", ".join(map(str, runs.get("run_labels", ()))).split(", "))
    return [label for label in LABELS if label in stated]


def footnotes(grid: Grid, runs: pd.DataFrame) -> tuple[dict[str, str], list[str]]:
    """The paper's rows whose runs have labels, with a mark for each label, and what the marks mean."""
    signs, used = dict(zip(LABELS, "†‡", strict=True)), {}
    for row, of_row in runs.groupby("row"):
        if labels := _labels(of_row):
            used[grid.names[row]] = labels
    marked = {name: f"{name} {''.join(signs[label] for label in labels)}" for name, labels in used.items()}
    said = {label for labels in used.values() for label in labels}
    return marked, [f"{signs[label]} {label}: {LABELS[label]}." for label in LABELS if label in said]


def also(grid: Grid, runs: pd.DataFrame) -> pd.DataFrame:
    """What the grid measures beyond the paper's columns: one line per row that has run; may be empty.

    A metric that not every run has is left out: it is younger than some of them.
    """
    whole = {metric for metric in grid.also.values() if metric in runs and runs[metric].notna().all()}
    titles = {metric: title for title, metric in grid.also.items() if metric in whole}
    if runs.empty or not titles:
        return pd.DataFrame()
    frame = summary(runs, ["row"], list(titles))
    frame = frame.rename(columns=titles | {f"{metric} sd": f"{title} sd" for metric, title in titles.items()})
    return frame.assign(row=frame["row"].map(grid.names))


GROUNDING = {"pointing": "pointing", "r1": "R@1", "chance_pointing": "pointing, chance", "chance_r1": "R@1, chance",
             "centre_pointing": "pointing, centre", "centre_r1": "R@1, centre",
             "upper_bound_pointing": "pointing, upper bound", "upper_bound": "R@1, upper bound"}  # fmt: skip
_GROUNDING = re.compile(rf"grounding_(?:level(\d+)_)?({'|'.join(GROUNDING)})_(before|after)")


def grounding(runs: pd.DataFrame, names: Mapping[str, str] | None = None) -> pd.DataFrame:
    """How well attention or boxes find annotated phrases, by row, and by level where a model has levels.

    Columns: `row`, `level` (absent if no run has levels), `boxes` (candidates a phrase), then mean and sd of
    pointing and R@1: trained, `before` training, of a random candidate (chance), of the image's centre, and
    the upper bound that the candidates allow. Empty if no run has linked phrases.
    """
    lines = []
    for run in runs.to_dict("records"):
        by_level: dict[Any, dict] = {}
        for name, value in run.items():
            found = _GROUNDING.fullmatch(str(name))
            if found and pd.notna(value):
                title = GROUNDING[found[2]] + (", before" if found[3] == "before" else "")
                by_level.setdefault(found[1], {})[title] = value
        for level, values in by_level.items():
            part = "" if level is None else f"level{level}_"
            said = re.search(
                r"(\d+)(?: to (\d+))? candidate", str(run.get(f"grounding_{part}protocol_after"))
            )
            few, many = (said[1], said[2] or said[1]) if said else ("0", "0")
            lines.append({"row": run["row"], "level": -1 if level is None else int(level), "seed": run["seed"],
                          "few": int(few), "many": int(many), **values})  # fmt: skip
    if not lines:
        return pd.DataFrame()
    frame = pd.DataFrame(lines)
    titles = [title + late for title in GROUNDING.values() for late in ("", ", before")]
    titles = [title for title in titles if title in frame
              and not (title.endswith("before") and title.split(",")[1:] != [" before"])]  # fmt: skip
    # what one seed of a row lacks is left out of that row
    parts = [
        summary(of, ["row", "level"], [title for title in titles if of[title].notna().all()])
        for _, of in frame.groupby(["row", "level"], sort=False)
    ]
    titles = [title for title in titles if any(title in part for part in parts)]
    order = ["row", "level", *titles, *(f"{title} sd" for title in titles), "n"]
    found = pd.DataFrame([line for part in parts for line in part.to_dict("records")], columns=order)
    counts = frame.groupby(["row", "level"], sort=False).agg({"few": "min", "many": "max"}).to_numpy()
    if counts.any():  # older files, and FELGA's, do not say how many
        found.insert(2, "boxes", ["" if not b else f"{a}" if a == b else f"{a} to {b}" for a, b in counts])
    if names is not None:
        found["row"] = found["row"].map(names)
    return found.drop(columns="level") if (found["level"] == -1).all() else found


def verdicts(grid: Grid, runs: Mapping[str, pd.DataFrame]) -> pd.DataFrame:
    """Every claim of the grid judged, one line per reading, claim and metric.

    Columns: `reading`, `claim`, `metric`, `verdict`, `difference`, `lower`, `upper`, `test`, `n_a`, `n_b`, `note`,
    `earlier` (settings of the runs whose defaults have changed since: such a line is of neither reading), `better`,
    `worse` (rows), and `printed <column>`: the difference in the paper's own table, where it prints
    the metric. Claims about levels of boxes (`levels` in the toml) compare within each run.
    """
    every = {reading: _verdicts(grid, of) for reading, of in runs.items()}
    keys = {(line["claim"], line["metric"]): line for lines in every.values() for line in lines}
    lines = []
    for reading, of in every.items():
        there = {(line["claim"], line["metric"]) for line in of}
        of += [line | NOTHING for key, line in keys.items() if key not in there]  # levels, where none has run
        lines += [{"reading": reading} | line for line in of]
    return pd.DataFrame(lines or {name: [] for name in ("reading", "claim", "metric", "verdict", "lower")})


def _verdicts(grid: Grid, runs: pd.DataFrame) -> list[dict]:
    cells = printed(grid).set_index(["row", "column"])["value"]
    lines = []
    for claim in grid.claims:
        if claim.baseline:
            of_row = runs[runs["row"] == claim.better]
            lines.append(_within(of_row, claim) | {"earlier": _earlier(of_row)})
            continue
        better, worse = (runs[runs["row"] == row] for row in (claim.better, claim.worse))
        if {claim.better, claim.worse} <= set(grid.untrained):  # one number each, however many seeds were run
            line = judge(better.iloc[:1], worse.iloc[:1], claim.metric)
            if len(better) and len(worse):
                line["verdict"] = UNDECIDED
                line["note"] = "neither row is trained: one number each, no seeds to judge by"
                line["difference"] = float(better[claim.metric].iloc[0] - worse[claim.metric].iloc[0])
        elif (
            len(better) and len(worse) and _one_condition(better, worse)
        ):  # a switch whose reading both rows share
            line = NOTHING | {"verdict": UNDECIDED, "n_a": len(better), "n_b": len(worse),
                              "note": "under this reading the two rows have the same settings"}  # fmt: skip
        elif len(better) and len(worse) and (other := not_comparable(better, worse)):
            line = NOTHING | {"n_a": len(better), "n_b": len(worse), "note": other}
        else:
            line = judge(better, worse, claim.metric)
            line["note"] = line["note"].replace("the first", claim.better).replace("the second", claim.worse)
        line |= {
            "better": claim.better,
            "worse": claim.worse,
            "earlier": _earlier(pd.concat([better, worse])),
        }
        for column in (column for column, metric in grid.columns.items() if metric == claim.metric):
            pair = [cells.get((grid.names[row], column), np.nan) for row in (claim.better, claim.worse)]
            line["printed"] = round(float(pair[0] - pair[1]), 2)
        lines.append({"claim": claim.text, "metric": claim.metric} | line)
    return lines + _level_verdicts(grid, runs)


def _earlier(runs: pd.DataFrame) -> str:
    return ", ".join(sorted({name for of in runs.get("run_earlier", ()) for name in of.split(", ") if name}))


def not_comparable(better: pd.DataFrame, worse: pd.DataFrame) -> str:
    """Why two rows cannot be compared though both have run: one was made with other defaults, by another version of
    the arithmetic, or over another training of the same frozen network, than the other. "" where they can be."""
    defaults, behind = ([set(of[name]) for of in (better, worse)] for name in ("run_earlier", "run_behind"))
    if defaults[0] != defaults[1]:
        return "one of the rows was made with earlier defaults"
    if behind[0] != behind[1]:
        return "one of the rows was made by an earlier version of the arithmetic"
    one, other = ({name: digest for of in rows["run_networks"] for name, digest in json.loads(of).items()}
                  for rows in (better, worse))  # fmt: skip
    if any(one[name] != other[name] for name in one.keys() & other.keys()):
        return "the rows read the features of two trainings of one frozen network"
    return ""


def _within(runs: pd.DataFrame, claim: Claim) -> dict:
    """Whether the metric of a row is above a baseline of the same runs, seed by seed.

    Raises:
        DataError: the runs have not measured one of the two.
    """
    if missing := [name for name in (claim.metric, claim.baseline) if len(runs) and name not in runs]:
        raise DataError(runs["run_file"].iloc[0], f"claim {claim.text!r}", f"asks for {missing[0]}, not measured",
                        "Name metrics that the page writes into metrics.json")  # fmt: skip
    a, b = (
        pd.DataFrame({"seed": runs["seed"], "value": runs.get(name)})
        for name in (claim.metric, claim.baseline)
    )
    line = judge(a, b, "value")
    line["note"] = line["note"].split(" and the second")[0].replace("the first", claim.better)
    return {"claim": claim.text, "metric": claim.metric} | line | {
        "better": f"{claim.better} {claim.metric}", "worse": f"{claim.better} {claim.baseline}",
    }  # fmt: skip


def _level_verdicts(grid: Grid, runs: pd.DataFrame) -> list[dict]:
    """Do levels improve boxes? Levels of one run, and the baselines of each, compared seed by seed."""
    runs = runs[runs["row"] == grid.levels]
    ran = [
        re.fullmatch(r"grounding_level(\d+)_r1_after", str(name)) for name in runs if runs[name].notna().all()
    ]
    measured_at = [int(found[1]) for found in ran if found]
    if runs.empty or not measured_at:
        return []
    last, lines = max(measured_at), []
    for metric in ("pointing", "r1"):
        end, start = f"level{last}_{metric}_after", f"level0_{metric}_after"
        asked = [(f"level {last} beats the proposals", end, start)]
        asked += [(f"level {k} beats level {k - 1}", f"level{k}_{metric}_after", f"level{k - 1}_{metric}_after")
                  for k in range(1, last + 1)]  # fmt: skip
        asked += [
            (f"level {last} beats a random one of its boxes", end, f"level{last}_chance_{metric}_after"),
            (f"level {last} beats the box in the middle of the image", end, f"level{last}_centre_{metric}_after"),
            (f"level {last} beats itself before training", end, f"level{last}_{metric}_before"),
            (f"a random box of level {last} beats a random proposal", f"level{last}_chance_{metric}_after",
             f"level0_chance_{metric}_after"),
        ]  # fmt: skip
        for text, better, worse in dict.fromkeys(asked):
            a, b = (
                pd.DataFrame({"seed": runs["seed"], "value": runs[f"grounding_{one}"]})
                for one in (better, worse)
            )
            line = judge(a, b, "value") | {
                "better": f"{grid.levels} {better}",
                "worse": f"{grid.levels} {worse}",
            }
            line["note"] = line["note"].split(" and the second")[0].replace("the first", grid.levels)
            line["earlier"] = _earlier(runs)
            lines.append({"claim": f"{grid.levels}: {text}", "metric": f"grounding_{metric}"} | line)
    return lines


def judged(claims: pd.DataFrame) -> int:
    """How many comparisons have an interval; one of the same runs under both readings counts once."""
    columns = ("method", "grid", "dataset", "claim", "metric", "difference", "lower", "upper")
    return len(claims[claims["lower"].notna()].drop_duplicates([name for name in columns if name in claims]))


def chance_note(judged: int) -> str:
    """How many of `judged` verdicts chance alone would give."""
    a_side = judged * (1 - LEVEL) / 2
    return (
        f"{judged} comparisons were judged, each by a two-sided {LEVEL:.0%} interval. If no difference were real, "
        f"chance alone would give about {a_side:.1f} times *{HOLDS}* and {a_side:.1f} "
        f"times *{CONTRADICTED}*. Metrics of one comparison are correlated, so such errors come together."
    )


def verdict_table(frame: pd.DataFrame) -> str:
    """The claims as a pipe table, one line per claim and metric with the verdicts of both readings side by side, and
    how many verdicts chance would give."""
    if frame.empty:
        return "No claim is judged by these runs."
    keys = ["claim", "metric"]
    shown = frame[keys].drop_duplicates().set_index(keys)
    for reading, of in frame.groupby("reading", sort=False):
        of = of.set_index(keys)
        by = {"verdict": "verdict"} if reading == "both" else {"verdict": reading}
        of[by["verdict"]] = of["verdict"]
        of["difference"] = of["difference"].astype(float)
        of["95 % interval"] = [f"{a:+.2f} to {b:+.2f}" if pd.notna(a) else None
                               for a, b in zip(of["lower"], of["upper"], strict=True)]  # fmt: skip
        of["n"] = [f"{a}, {b}" for a, b in zip(of["n_a"], of["n_b"], strict=True)]
        parts = ["difference", "95 % interval", "test", "n"] if of[["n_a", "n_b"]].any(axis=None) else []
        more = {part: part if reading == "both" else f"{part}, {reading}" for part in parts}
        shown = shown.join(of[[by["verdict"], *parts]].rename(columns=more))
    if "printed" in frame and frame["printed"].notna().any():
        shown["printed difference"] = frame.groupby(keys)["printed"].first()
    noted = frame[frame["note"].astype(bool) & (frame[["n_a", "n_b"]] > 0).any(axis=1)]
    if len(noted):
        shown["note"] = noted.groupby(keys)["note"].agg(lambda notes: "; ".join(dict.fromkeys(notes)))
        shown["note"] = shown["note"].fillna("")
    count = judged(frame)
    return to_markdown(shown.reset_index()) + (f"\n\n{chance_note(count)}" if count else "")


def said(claim: Mapping[str, Any]) -> str:
    """The verdict of one line of a claims file, with the interval and the seeds where it has them; and that the runs
    were made with earlier defaults, where they were."""
    if pd.isna(claim["lower"]):
        return str(claim["verdict"])
    difference, lower, upper = (float(claim[name]) for name in ("difference", "lower", "upper"))
    seeds = "" if claim["n_a"] == claim["n_b"] else f" and {claim['n_b']}"
    found = f"**{claim['verdict']}**: {difference:+.1f} ({lower:+.1f} to {upper:+.1f}), {claim['n_a']}{seeds} seeds"
    return found + of_then(claim)


def of_then(claim: Mapping[str, Any] | pd.Series) -> str:
    """What is said behind a verdict where its runs were made with earlier defaults. An empty cell of a claims file may
    have been read as NaN."""
    return ", earlier defaults" if isinstance(claim["earlier"], str) and claim["earlier"] else ""


def title_of(grid: Grid, metric: str) -> str:
    """What the grid's tables call a metric: the paper's column, or that of what is measured beside; else its name."""
    return {ours: title for title, ours in (*grid.also.items(), *grid.columns.items())}.get(metric, metric)


def main_metrics(grid: Grid, judged: Sequence[str]) -> list[str]:
    """The grid's main metrics among those judged, after the first that the paper prints if it prints none of them."""
    printed = set(grid.columns.values())
    judged = [name for name in judged if name in grid.headline or not name.endswith("_expected")]
    main = [metric for metric in grid.headline if metric in judged] or judged[:1]
    return main if printed.intersection(main) else [name for name in judged if name in printed][:1] + main


def verdict_counts(claims: pd.DataFrame) -> pd.DataFrame:
    """Verdicts by `method` and `dataset`; a cell is "default / literal". What is one under both counts in both."""
    every = claims.assign(
        reading=[READINGS if reading == "both" else (reading,) for reading in claims["reading"]]
    )
    every, lines = every.explode("reading"), []
    for (method, name), of in every.groupby(["method", "dataset"]):
        found = of.groupby(["reading", "verdict"]).size()
        counts = {verdict: " / ".join(str(found.get((reading, verdict), 0)) for reading in READINGS)
                  for verdict in VERDICTS}  # fmt: skip
        lines.append({"method": method, "dataset": name} | counts)
    return pd.DataFrame(lines, columns=["method", "dataset", *VERDICTS])


def headlines(claims: pd.DataFrame) -> list[str]:
    """A line per `method` and `dataset`: what was decided, with the interval of the difference, under each reading."""
    lines = []
    for (method, name), of in claims.groupby(["method", "dataset"], sort=False):
        said = [f"{'default and literal' if reading == 'both' else reading}: {_headline(part)}."
                for reading, part in of.groupby("reading", sort=False)]  # fmt: skip
        metrics = ", ".join(dict.fromkeys(of["metric"]))
        lines.append(f"* **{method.upper()}, {name}** ({metrics}), {' '.join(said)}")
    return lines


def _headline(claims: pd.DataFrame) -> str:
    said = []
    for verdict in (HOLDS, CONTRADICTED):
        found = [f"{c['claim']} ({c['difference']:+.1f}, {c['lower']:+.1f} to {c['upper']:+.1f}{of_then(c)})"
                 for c in claims[claims["verdict"] == verdict].to_dict("records")]  # fmt: skip
        said += [f"*{verdict}*: {'; '.join(found)}"] if found else []
    rest = claims["verdict"].value_counts()
    return ". ".join(
        said + [f"{rest[verdict]} *{verdict}*" for verdict in (UNDECIDED, NOT_RUN) if verdict in rest]
    )


RECIPES = ("method", "dataset", "split", "seed", "settings", "metrics", "commit", "verdict")


def read_recipes(path: str | Path) -> pd.DataFrame:
    """What was tried before a default was chosen: `RECIPES`, one line per run.

    `settings` and `metrics` are words `name=value`; the settings are what differs from the preset.

    Raises:
        DataError: other columns, or a line of an unknown method, setting or split, or without a whole commit.
    """
    frame = pd.read_csv(path, dtype=str, keep_default_na=False)
    if tuple(frame.columns) != RECIPES:
        raise DataError(path, "the header", f"is {','.join(frame.columns)}", f"Write {','.join(RECIPES)}")
    for number, line in enumerate(frame.to_dict("records"), start=2):
        try:
            known = declared(line["method"])
        except ParameterError as error:
            raise DataError(path, f"line {number}", f"has {error}", "Correct the method") from error
        names = {
            kind: [word.partition("=")[0] for word in line[kind].split()] for kind in ("settings", "metrics")
        }
        wrong = [f"the setting {name!r}" for name in names["settings"] if name not in known]
        wrong += [f"the word {word!r}" for kind in names for word in line[kind].split()
                  if not re.fullmatch(r"\w+=\S*", word)]  # fmt: skip
        wrong += [] if re.fullmatch("[0-9a-f]{40}", line["commit"]) else [f"the commit {line['commit']!r}"]
        wrong += [] if line["split"] in ("val", "dev") else [f"the split {line['split']!r}"]
        wrong += [] if line["seed"].isdigit() and line["verdict"] else ["no seed or no verdict"]
        if wrong:
            raise DataError(path, f"line {number}", f"has {', '.join(wrong)}", "See docs/adding_a_table.md")
    return frame


def not_run(grid: Grid, dataset: str, scale: str, frame: pd.DataFrame) -> list[str]:
    """For each reading under which a claim is not run, the line that runs it."""
    return [f"*not run*, {reading}: `{command(grid, dataset, scale, reading)}`"
            for reading, of in frame.groupby("reading", sort=False) if (of["verdict"] == NOT_RUN).any()]  # fmt: skip


def oddities(grid: Grid) -> list[str]:
    """What the transcription noted where the paper's cells contradict its text, its sums or another table."""
    odd = ("Table", "text", "elsewhere", "says", "sum to", "the same")
    said: dict[str, list[str]] = {}
    for note, cells in printed(grid).groupby("note", sort=False):
        parts = str(note).split("; ")
        first = next((k for k, part in enumerate(parts) if any(word in part for word in odd)), None)
        if first is None:
            continue  # the note only describes the row
        where = [
            f"{row}, {' and '.join(own['column'])}" if len(own) < len(grid.columns) else str(row)
            for row, own in cells.groupby("row", sort=False)
        ]
        said.setdefault("; ".join(parts[first:]), []).extend(where)
    return [f"{'; '.join(where)}: {part}." for part, where in said.items()]


def page(grid: Grid, dataset: str, scale: str, runs: Mapping[str, pd.DataFrame]) -> str:
    """The whole table as Markdown: published beside measured, what else was measured, grounding, claims.

    Args:
        runs: by reading, from `runs_of`; a reading without runs has verdicts alone.
    """
    source = f"{grid.paper}, Table {grid.table}" if grid.table else "no table of a paper"
    if grid.prefix:
        several = [grid.prefix] if isinstance(grid.prefix, str) else grid.prefix
        source += f" ({', '.join(prefix.strip() for prefix in several)})"
    frame = beside_readings(grid, runs)
    statuses = [name for name in frame if name.startswith("status")]
    frame = frame.drop(columns=[name for name in statuses if (frame[name].dropna() == "current").all()])
    if not grid.table:
        frame = frame.drop(columns=[f"{column} published" for column in grid.columns])
    ran = {reading: of for reading, of in runs.items() if len(of)}
    parts = [f"Published: {source}. Measured: {grid.measured_on or dataset}, {_said_readings(runs)}."]
    marks, notes = footnotes(grid, pd.concat(ran.values())) if ran else ({}, [])

    def shown(frame: pd.DataFrame) -> pd.DataFrame:
        return frame.assign(row=frame["row"].replace(marks))

    parts.append(to_markdown(shown(frame)))
    if len(remarks := [*notes, *grid.remarks, *oddities(grid)]):
        parts.append("\n".join(f"* {remark}" for remark in remarks))
    for reading, of in ran.items():
        which = f", {reading}" if len(ran) > 1 else ""
        if len(more := also(grid, of)):
            parts.append(f"Measured only{which}:\n\n{to_markdown(shown(more))}")
        if len(found := grounding(of, grid.names)):
            parts.append(f"Annotated phrases found{which}:\n\n{to_markdown(shown(found), digits=1)}")
    judged = verdicts(grid, runs)
    parts.append(verdict_table(judged))
    if len(judged) and len(lines := not_run(grid, dataset, scale, judged)):
        parts.append("\n".join(f"* {line}" for line in lines))
    return "\n\n".join(parts)


def _said_readings(runs: Mapping[str, pd.DataFrame]) -> str:
    if "both" in runs:
        return "the reading default, which is literal too: no setting of these rows differs"
    ran = [reading for reading, of in runs.items() if len(of)]
    return f"the reading{'s' * (len(ran) > 1)} {' and '.join(ran)}" if ran else "nothing yet"


def write(grid: Grid, dataset: str, scale: str, runs: Mapping[str, pd.DataFrame], stem: str | Path) -> None:
    """Write `<stem>.md` (`page`), `.csv`, `.claims.csv`, and where there is any `.also.csv`, `.grounding.csv`; the last
    two have a column `reading`."""
    write_text(f"{stem}.md", page(grid, dataset, scale, runs) + "\n")
    parts = {"": beside_readings(grid, runs), ".claims": verdicts(grid, runs)}
    for ending, made in (
        (".also", {reading: also(grid, of) for reading, of in runs.items()}),
        (".grounding", {reading: grounding(of, grid.names) for reading, of in runs.items()}),
    ):
        parts[ending] = pd.concat([of.assign(reading=reading) for reading, of in made.items()])
    for ending, frame in parts.items():
        if len(frame):
            write_text(f"{stem}{ending}.csv", frame.to_csv(index=False))


def seeds_of(dataset: str, runs: pd.DataFrame, reading: str = "default") -> str:
    """What measured numbers are of, for titles: "scenes, 3 seeds"; "1 to 3" where rows have run under so many.

    The literal reading is named: "scenes, literal, 3 seeds"; and where rows were made with "earlier defaults", that.
    """
    if reading == "literal":
        dataset = f"{dataset}, literal"
    if runs.empty:
        return f"{dataset}, not run"
    few, many = (int(count) for count in runs.groupby("row").size().agg(["min", "max"]))
    old = [bool(_earlier(of)) for _, of in runs.groupby("row")]
    when = "" if not any(old) else ", earlier defaults" if all(old) else ", some of earlier defaults"
    return f"{dataset}, {few if few == many else f'{few} to {many}'} seed{'s' * (many > 1)}{when}"


def drawn(grid: Grid, runs: pd.DataFrame, dataset: str, reading: str = "default") -> dict[str, Any]:
    """What `figures.beside` draws of a grid beyond its table: its data, seeds, strokes, a random order, labels.

    Strokes are the first measured-only column whose title begins with the drawn column's name.
    """
    more, rows = also(grid, runs), list(dict.fromkeys(printed(grid)["row"]))
    rows += [
        row for row in grid.names.values() if row not in rows and row in set(runs["row"].map(grid.names))
    ]
    dashes, seeds = {}, {}
    for column in grid.plot:
        of_row = runs.assign(row=runs["row"].map(grid.names)).groupby("row")
        seeds[column] = {row: own[grid.columns[column]].tolist() for row, own in of_row}
        title = next((one for one in grid.also if one.lower().startswith(f"{column.lower()}, ")), None)
        if title and len(more):
            dashes[column] = (title.partition(", ")[2], more.set_index("row")[title].reindex(rows).tolist())
    lines = {column: float(runs[metric].mean()) for column, metric in grid.chance.items() if len(runs)}
    data = (
        f"{grid.data}, published".removeprefix(", "),
        seeds_of(grid.measured_on or dataset, runs, reading),
    )
    return {
        "data": data,
        "runs": seeds,
        "dashes": dashes,
        "lines": lines,
        "rows": grid.axis,
        "label": grid.ylabel,
    }
