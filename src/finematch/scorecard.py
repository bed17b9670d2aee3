"""The scorecard: for each table of each paper its claims, published beside measured, what was run and at what cost.

A line is a claim of a grid on one of its main metrics. A number links to the metrics files that it is the mean of, one
link per seed, relative to the repository.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pandas as pd

from finematch import grids, tables
from finematch.config import own_reading
from finematch.tables import CONTRADICTED, HOLDS, LEVEL, NOT_RUN, UNDECIDED

Line = pd.Series | dict[str, Any]  # of `lines`
PAPERS = ("MVAM", "HSLM", "FELGA", "SLAN", "SLAN-v1")
PAPERS_OWN = ("flickr30k", "coco_karpathy")  # data sets of the papers' own tables
MARKS = {HOLDS: "✓", CONTRADICTED: "✗", UNDECIDED: "?", NOT_RUN: "·"}
SAME = "="  # the literal reading where one run stands for both
DIGITS = str.maketrans("0123456789", "⁰¹²³⁴⁵⁶⁷⁸⁹")
BESIDES = "[as printed](#what-the-papers-print-besides-numbers-of-runs)"
# Tables that no grid runs: what they are, and what stands in their place.
OTHERS = {
    ("HSLM", "2"): "COCO 1K: the runs of Table 3 in five folds; not run",
    ("HSLM", "Figure 3"): f"weights of words before and after self-attention: {BESIDES}",
    ("SLAN", "1"): f"symbols: {BESIDES}",
    ("SLAN", "8"): "parameters and operations, counted: [table](figures/slan_cost.md)",
    ("SLAN-v1", "8"): "sizes of the pretraining sets: nothing to run",
}  # fmt: skip


def place(grid: grids.Grid) -> tuple[str, str] | None:
    """The paper and the table of a grid, or the table that it is nearest to; None of a grid that is about no paper."""
    paper = grid.paper or grid.method.upper()
    return (paper, grid.table or grid.beside) if paper in PAPERS and (grid.table or grid.beside) else None


def read(
    datasets: Sequence[str], scale: str, out: Path, *, smoke: bool = False
) -> tuple[pd.DataFrame, dict[tuple[str, str, str], dict]]:
    """The lines of all grids that are about a paper, and what the runs of each took: paper, table and grid to `cost`.

    Claims are looked up on the data sets asked for, on every one with a run at the paper's scale, and on those whose
    columns stand in another table of the paper (`[on.<data set>]` in the toml).
    """
    grid_of = cache(grids.grid)
    at_paper = {folder.name.split(".")[0] for folder in out.glob("*/*.paper*.*.s[0-9]*")}
    frames, runs_of = [], {}
    for name in grids.names():
        if place(grid_of(name)) is None:
            continue
        own = {one for one in PAPERS_OWN if place(grid_of(name, one)) != place(grid_of(name))}
        asked = [*((one, scale) for one in datasets), *((one, "paper") for one in sorted(at_paper | own))]
        for dataset, at in dict.fromkeys(asked):
            grid = grid_of(name, dataset)
            runs = tables.runs_of(grid, dataset, at, out / grid.method, smoke=smoke)
            frames.append(lines(grid, dataset, at, runs))
            runs_of.setdefault((*place(grid), name), []).extend(runs.values())
    return pd.concat(frames, ignore_index=True), {key: cost(runs) for key, runs in runs_of.items()}


def lines(grid: grids.Grid, dataset: str, scale: str, runs: Mapping[str, pd.DataFrame]) -> pd.DataFrame:
    """The grid's claims under each reading, on the metrics that the paper prints, or on its main ones.

    Columns: `paper`, `table`, `grid`, `title`, `data` (of the paper), `dataset`, `scale`, `reading`, `claim`, `metric`
    (the paper's column, or ours), `better` and `worse`; `verdict`, `difference`, `lower`, `upper`; and of both sides
    `a` and `b` the printed number, mean, standard deviation, and seeds with their metrics files.
    """
    paper, table = place(grid) or ("", "")
    cells = tables.printed(grid).set_index(["row", "column"])["value"]
    column = {metric: name for name, metric in grid.columns.items()} if grid.table else {}
    ran = any(len(of) for of in runs.values())
    judged = tables.verdicts(grid, runs).to_dict("records") if ran else []
    judged = {(line["reading"], line["claim"], line["metric"]): line for line in reversed(judged)}
    found = []
    for reading, of in runs.items():
        for text in dict.fromkeys(claim.text for claim in grid.claims):
            asked = {claim.metric: claim for claim in grid.claims if claim.text == text}
            main = tables.main_metrics(grid, list(asked))
            for metric in [metric for metric in main if metric in column] or main[-1:]:
                claim, line = asked[metric], judged.get((reading, text, metric), tables.NOTHING)
                shown = {key: line[key] for key in ("verdict", "difference", "lower", "upper", "earlier")}
                for side, row in (("a", claim.better), ("b", claim.worse)):
                    within = side == "b" and claim.baseline
                    shown |= _side(side, of[of["row"] == row], claim.baseline if within else metric)
                    cell = (grid.names[row], column.get(metric))
                    shown[f"printed_{side}"] = None if claim.baseline else cells.get(cell)
                about = {"paper": paper, "table": table, "grid": grid.name, "title": grid.title, "data": grid.data,
                         "dataset": dataset, "scale": scale, "reading": reading, "claim": text,
                         "metric": column.get(metric, metric)}  # fmt: skip
                found.append(about | {"better": claim.better, "worse": claim.baseline or claim.worse} | shown)
    return pd.DataFrame(found)


def _side(side: str, runs: pd.DataFrame, metric: str) -> dict[str, Any]:
    values = runs[metric].dropna() if metric in runs else pd.Series(dtype=float)
    files = (
        [(int(run["seed"]), link(run["run_file"])) for run in runs.to_dict("records")] if len(values) else []
    )
    return {side: values.mean(), f"{side}_sd": values.std(ddof=1), f"{side}_files": files}


def link(file: str | Path) -> str:
    """A metrics file relative to the repository: runs lie in papermill_runs/<method>/<run>/, wherever that is."""
    return "/".join(("papermill_runs", *Path(file).parts[-3:]))


def cost(runs: Iterable[pd.DataFrame]) -> dict[str, Any]:
    """Number of runs, minutes, machines and commits; a run that several tables read counts once."""
    some = [of for of in runs if len(of)]
    if not some:
        return {}
    every = pd.concat(some).drop_duplicates("run_file")
    machines = {re.sub(r"\(R\)|\(TM\)|, 1 threads?$| Processor", "", name) for name in every["run_device"]}
    return {"runs": len(every), "minutes": max(1, round(every["run_seconds"].sum() / 60)),
            "machines": ", ".join(sorted(machines)),
            "commits": ", ".join(sorted({str(one)[:7] for one in every["run_commit"]}))}  # fmt: skip


# ------------------------------------------------------------------------------------------- as Markdown
def columns_of(frame: pd.DataFrame) -> dict[str, tuple[str, str, str]]:
    """Titles of the measured columns, with data set, scale and reading of each; a column where nothing ran is left out.

    Runs that stand for both readings are in the column of their scale's own.
    """
    ran, found = frame[frame["a"].notna() & frame["b"].notna()], {}
    for dataset, scale, reading in (
        ran[["dataset", "scale", "reading"]].drop_duplicates().itertuples(index=False)
    ):
        named = own_reading(scale) if reading == "both" else reading
        at = f"{dataset}, paper scale" if scale == "paper" else dataset
        found.setdefault(f"{at}, {named}", (dataset, scale, named))
    order = list(dict.fromkeys(frame["dataset"]))
    return dict(
        sorted(found.items(), key=lambda one: (one[1][1] == "paper", order.index(one[1][0]), one[1][2]))
    )


def of_column(frame: pd.DataFrame, column: tuple[str, str, str]) -> tuple[pd.DataFrame, bool]:
    """The lines of a measured column, and whether they are those of the scale's own reading, which is the same."""
    dataset, scale, reading = column
    there = frame[(frame["dataset"] == dataset) & (frame["scale"] == scale)]
    own = reading == own_reading(scale)
    same = not own and "both" in set(there["reading"])
    return there[there["reading"].isin([reading, "both"] if own else [reading])], same


def number(line: Line, side: str) -> str:
    """Mean ± standard deviation with a link per seed."""
    spread = "" if pd.isna(line[f"{side}_sd"]) else f" ± {line[f'{side}_sd']:.2f}"
    seeds = "".join(f"[{str(seed).translate(DIGITS)}]({file})" for seed, file in line[f"{side}_files"])
    return f"{line[side]:.2f}{spread} {seeds}"


def cell(line: Line) -> str:
    """A verdict with its numbers: "✓ +4.01 (+2.35 to +5.68): 43.69 ± 0.48 against 39.68 ± 0.30"."""
    if pd.isna(line["a"]) or pd.isna(line["b"]):
        return MARKS[NOT_RUN]
    judged = f" {line['difference']:+.2f}" if pd.notna(line["difference"]) else ""
    judged += f" ({line['lower']:+.2f} to {line['upper']:+.2f})" if pd.notna(line["lower"]) else ""
    judged += tables.of_then(line)
    return f"{MARKS[line['verdict']]}{judged}: {number(line, 'a')} against {number(line, 'b')}"


def published_cell(line: Line) -> str:
    """The same of the paper's numbers."""
    a, b = line["printed_a"], line["printed_b"]
    return "" if pd.isna(a) or pd.isna(b) else f"{a - b:+.2f}: {a:g} against {b:g}"


def anchor(paper: str, table: str) -> str:
    """The id of a table of a paper in the tables of claims."""
    return f"{paper}-{table}".lower().replace(" ", "-")


def tables_of(paper: str, frame: pd.DataFrame) -> list[str]:
    """The tables of a paper that the scorecard has, in order."""
    names = {*frame[frame["paper"] == paper]["table"], *(table for own, table in OTHERS if own == paper)}
    return sorted(names, key=lambda name: (not name.isdigit(), name.zfill(4)))


def claims_table(paper: str, frame: pd.DataFrame) -> str:
    """All tables of a paper, a line per claim and metric: published, then every measured column."""
    of = frame[frame["paper"] == paper]
    measured, rows = columns_of(of), []
    for table in tables_of(paper, frame):
        first = f'<a id="{anchor(paper, table)}"></a>**{table}**'
        if (paper, table) in OTHERS:
            rows.append({"table": first, "claim": OTHERS[paper, table]})
        for name, grid in of[of["table"] == table].groupby("grid", sort=False):
            data = f"*{grid['data'].iloc[0]}*" if grid["data"].iloc[0] else "*not printed*"
            rows.append({"table": first, "claim": f"*{grid['title'].iloc[0]}* (`{name}`)", "published": data})
            first, said = "", ""
            for (claim, metric), line in grid.groupby(["claim", "metric"], sort=False):
                row = {"claim": claim if claim != said else "", "metric": metric}
                row["published"], said = published_cell(line.iloc[0]), claim
                for title, column in measured.items():
                    mine, same = of_column(line, column)
                    row[title] = SAME if same else cell(mine.iloc[0]) if len(mine) else MARKS[NOT_RUN]
                rows.append(row)
    return _compact(pd.DataFrame(rows, columns=["table", "claim", "metric", "published", *measured]))


def glance(
    frame: pd.DataFrame, costs: Mapping[tuple[str, str, str], Mapping], pages: Mapping[str, str]
) -> str:
    """A line per table and grid: a mark per claim and metric, how many verdicts chance would give, and the cost.

    Args:
        costs: from `read`.
        pages: by grid, the page of its whole table.
    """
    measured, rows = columns_of(frame), []
    for paper in PAPERS:
        for table in tables_of(paper, frame):
            title = f"[{paper} {table}](#{anchor(paper, table)})"
            if (paper, table) in OTHERS:
                rows.append({"table": title, "what": OTHERS[paper, table]})
            of = frame[(frame["paper"] == paper) & (frame["table"] == table)]
            for name, grid in of.groupby("grid", sort=False):
                what = grid["title"].iloc[0]
                if (
                    name in pages and costs[paper, table, name]
                ):  # not where another data set's table has the name
                    what = f"[{what}]({pages[name]})"
                elif not costs[paper, table, name]:
                    what += f": not run on {' or '.join(dict.fromkeys(grid['dataset']))}"
                row = {"table": title, "what": what}
                for heading, column in measured.items():
                    mine, same = of_column(grid, column)
                    row[heading] = SAME if same else "".join(MARKS[verdict] for verdict in mine["verdict"])
                judged = int(grid["lower"].notna().sum())
                if judged:
                    row |= {"judged": str(judged), "by chance": f"{judged * (1 - LEVEL) / 2:.1f}"}
                rows.append(row | {key: str(value) for key, value in costs[paper, table, name].items()})
                title = ""
    columns = ["table", "what", *measured, "judged", "by chance", "runs", "minutes", "machines", "commits"]
    return _compact(pd.DataFrame(rows, columns=columns))


def _compact(frame: pd.DataFrame) -> str:
    """A pipe table without the blanks that align its cells: links make them long."""
    return re.sub(r" {2,}\|", " |", tables.to_markdown(frame.fillna("")))


def total(frame: pd.DataFrame) -> str:
    """What all comparisons say, each counted once however many tables ask for it, and what chance alone would give."""
    of = frame.assign(method=frame["grid"].str.split("_").str[0])
    of = of.drop_duplicates(["method", "dataset", "scale", "reading", "better", "worse", "metric"])
    counts = ", ".join(
        f"{(of['verdict'] == verdict).sum()} *{verdict}* ({mark})" for verdict, mark in MARKS.items()
    )
    chance = tables.chance_note(tables.judged(of))
    return f"Each comparison on a metric that a paper prints, once: {counts}. {chance}"


def drawn(paper: str, frame: pd.DataFrame) -> pd.DataFrame:
    """What `figures.intervals` draws of a paper: claims whose difference it prints and that were judged anywhere, with
    a panel (`metric`) for the published differences and one for every measured column."""
    of = frame[(frame["paper"] == paper) & frame["printed_a"].notna() & frame["printed_b"].notna()]
    found = []
    for table in tables_of(paper, of):
        for (claim, metric), line in of[of["table"] == table].groupby(["claim", "metric"], sort=False):
            if line["lower"].isna().all():
                continue
            several = of[(of["table"] == table) & (of["claim"] == claim)]["metric"].nunique() > 1
            name = {"claim": f"{table}: {claim}{f', {metric}' if several else ''}"}
            gap = line.iloc[0]["printed_a"] - line.iloc[0]["printed_b"]
            printed = {"metric": f"{line.iloc[0]['data']}, published", "verdict": "published"}
            found.append(name | printed | {"difference": gap, "lower": gap, "upper": gap})
            for title, column in columns_of(of).items():
                for one in of_column(line, column)[0].dropna(subset="lower").to_dict("records"):
                    shown = {key: one[key] for key in ("difference", "lower", "upper", "verdict")}
                    found.append(name | {"metric": f"{title}, {len(one['a_files'])} seeds"} | shown)
    return pd.DataFrame(found)
