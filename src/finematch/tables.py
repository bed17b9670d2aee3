"""Published against measured: metrics files in, tables and verdicts out.

A number is printed with its spread over seeds, a claim is judged by a stated test, and what was not run is said to be
not run.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from finematch.files import DataError, write_atomically
from finematch.runs import FIELDS, git_commit, measured, versions, write_metrics  # noqa: F401 (pages)

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


def summary(
    frame: pd.DataFrame, by: Sequence[str], metrics: Sequence[str], *, seed: str = "seed"
) -> pd.DataFrame:
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
    if unknown := [name for name in (*by, *metrics, seed) if name not in frame]:
        raise ValueError(f"no column {', '.join(unknown)}; there are {', '.join(map(str, frame.columns))}")
    for key, group in frame.groupby([*by, seed], sort=False, dropna=False):
        if len(group) > 1:
            same = ", ".join(f"{name}={value}" for name, value in zip([*by, seed], key, strict=True))
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
    measured: pd.DataFrame,  # noqa: F811
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
    shown = [name for name in frame.columns if not (name.endswith(" sd") and name[:-3] in frame.columns)]

    def cell(line, name: str) -> str:
        value = line[name]
        if value is None or (isinstance(value, float) and math.isnan(value)):
            return "–"
        text = (
            f"{value:.{digits}f}"
            if isinstance(value, (float, np.floating))
            else str(value).replace("|", "\\|")
        )
        spread = line.get(f"{name} sd")
        return text if spread is None or pd.isna(spread) else f"{text} ± {spread:.{digits}f}"

    lines = [
        shown,
        [
            ":--" if frame[n].dtype == object or pd.api.types.is_string_dtype(frame[n]) else "--:"
            for n in shown
        ],
    ]
    lines += [[cell(line, name) for name in shown] for line in frame.to_dict("records")]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


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
        write_atomically(path, lambda part: part.write_bytes(new.encode()))
    return new != text


HOLDS, FAILS, UNDECIDED = "holds", "does not hold", "not separated"
ONE_SEED, NOT_RUN = "one seed only", "not run"


@dataclass(frozen=True)
class Claim:
    """ "`better` beats `worse` on `metric`", as a paper says it.

    `better` and `worse` are parameter values that select runs, `where` those that both sides share (dataset,
    scale): `Claim("16 views beat 1", "i2t_r1", {"views": 16}, {"views": 1}, {"dataset": "scenes"})`.
    """

    text: str
    metric: str
    better: Mapping
    worse: Mapping
    where: Mapping
    higher_is_better: bool = True

    def judge(self, frame: pd.DataFrame) -> dict:
        """A line of the scorecard: the claim, where it was tested, `judge`'s verdict and numbers."""
        sides = [_select(frame, {**self.where, **side}) for side in (self.better, self.worse)]
        where = ", ".join(f"{name}={value}" for name, value in self.where.items())
        verdict = judge(*sides, self.metric, higher_is_better=self.higher_is_better)
        return {"claim": self.text, "where": where, "metric": self.metric, **verdict}


def claims(frame: pd.DataFrame, all_claims: Iterable[Claim]) -> pd.DataFrame:
    """The scorecard of several claims, one row each."""
    return pd.DataFrame([claim.judge(frame) for claim in all_claims])


def judge(
    frame_a: pd.DataFrame,
    frame_b: pd.DataFrame,
    metric: str,
    *,
    higher_is_better: bool = True,
    level: float = 0.95,
    seed: str = "seed",
) -> dict:
    """Does A beat B on `metric`, over seeds?

    The test is Welch's one-sided t interval on the difference of means (seeds are independent runs, variances
    may differ). The verdict is

    * "not run": a side has no runs;
    * "one seed only": a side has fewer than two, so that there is no spread to judge by;
    * "does not hold": the difference is zero or of the wrong sign;
    * "holds": the difference is positive and the interval's lower end is above zero;
    * "not separated": positive, but within the noise.

    With two to five seeds the test is weak: "not separated" is not evidence against a claim.

    Returns:
        `verdict`, `difference` (A minus B, or B minus A where lower is better), `lower` (of the interval),
        `n_a`, `n_b`; None where undefined.

    Raises:
        ValueError: a seed twice on one side, or a run without the metric.
    """
    result = {"verdict": NOT_RUN, "difference": None, "lower": None, "n_a": len(frame_a), "n_b": len(frame_b)}
    if not len(frame_a) or not len(frame_b):
        return result
    sides = []
    for side in (frame_a, frame_b):
        if side[seed].duplicated().any():
            raise ValueError(
                f"seed {side[seed][side[seed].duplicated()].iloc[0]} occurs twice: narrow the selection"
            )
        if metric not in side or side[metric].isna().any():
            raise ValueError(f"a run has no {metric}")
        sides.append(side[metric].to_numpy(dtype=float))
    a, b = sides if higher_is_better else sides[::-1]
    difference = float(a.mean() - b.mean())
    if min(len(a), len(b)) < 2:
        return result | {"verdict": ONE_SEED, "difference": difference}
    lower = difference - _welch_margin(a, b, level)
    verdict = FAILS if difference <= 0 else HOLDS if lower > 0 else UNDECIDED
    return result | {"verdict": verdict, "difference": difference, "lower": lower}


def _select(frame: pd.DataFrame, values: Mapping) -> pd.DataFrame:
    if frame.empty:
        return frame
    if unknown := [name for name in values if name not in frame]:
        raise ValueError(f"no run has the parameter {', '.join(unknown)}")
    return frame[np.logical_and.reduce([frame[name] == value for name, value in values.items()])]


def _welch_margin(a: np.ndarray, b: np.ndarray, level: float) -> float:
    parts = np.array([a.var(ddof=1) / len(a), b.var(ddof=1) / len(b)])
    if not parts.any():
        return 0.0
    freedom = parts.sum() ** 2 / (parts**2 / np.array([len(a) - 1, len(b) - 1])).sum()
    return float(t_quantile(level, freedom) * np.sqrt(parts.sum()))


def t_quantile(level: float, freedom: float | int) -> float:
    """Quantile of Student's t for `freedom` >= 1, to about six digits.

    With t = √ν tan θ the density is proportional to cos^(ν-1) θ on (-π/2, π/2): smooth, and easy to sum.
    """
    theta = np.linspace(-np.pi / 2, np.pi / 2, 200_001)
    density = np.cos(theta).clip(0) ** (freedom - 1)
    total = np.concatenate([[0], np.cumsum((density[1:] + density[:-1]) / 2)])
    return float(np.sqrt(freedom) * np.tan(np.interp(level, total / total[-1], theta)))
