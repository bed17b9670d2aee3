"""Published against measured: metrics files in, tables and verdicts out.

`write_metrics` is what the last cell of a run calls; everything else reads. A number is printed with its
spread over seeds, a claim is judged by a stated test, and what was not run is said to be not run.
"""

from __future__ import annotations

import json
import math
import platform
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import numpy as np
import pandas as pd

from finematch.files import DataError, write_atomically, write_json
from finematch.training import device_name, peak_memory

PUBLISHED = Path(__file__).with_name("published.csv")
FIELDS = ("parameters", "metrics", "protocol", "seconds", "peak_memory_bytes", "device", "versions", "commit")
PACKAGES = ("torch", "transformers", "timm", "numpy", "finematch")


def write_metrics(
    out: str | Path,
    parameters: Mapping,
    metrics: Mapping,
    *,
    seconds: float | int,
    protocol: str | None = None,
    peak_memory_bytes: int | None = None,
) -> Path:
    """Write `out/metrics.json`, the sole proof that a run succeeded, atomically.

    Args:
        out: the run's folder; made if absent.
        parameters: the run's flat parameters (numbers, strings, booleans, None, paths).
        metrics: name to number; a `protocol` among them is used as `protocol`.
        seconds: wall time of the run.
        protocol: how the numbers were made (split, folds, gallery size, tie policy).
        peak_memory_bytes: default: this process's peak so far, the GPU's where there is one.

    Raises:
        DataError: a metric that is not finite, a value that is neither number nor text, no protocol.
    """
    path = Path(out) / "metrics.json"
    metrics = _flat(metrics, path, "metrics")
    stated = metrics.pop("protocol", None)
    protocol = protocol or stated
    if not protocol:
        raise DataError(path, "protocol", "is missing", "Every number carries its protocol: pass protocol=")
    content = {
        "parameters": _flat(parameters, path, "parameters"),
        "metrics": metrics,
        "protocol": protocol,
        "seconds": round(float(seconds), 3),
        "peak_memory_bytes": int(peak_memory() if peak_memory_bytes is None else peak_memory_bytes),
        "device": device_name(),
        "versions": versions(),
        "commit": git_commit(),
    }
    write_json(path, content)
    return path


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that can change a number."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


def git_commit(folder: str | Path | None = None) -> str:
    """Commit of the checkout that holds `folder` (default: this package), "unknown" outside one.

    "-dirty" is added if sources or notebooks differ from the commit; results (figures, runs) do not count.
    """
    folder = Path(__file__).parent if folder is None else Path(folder)

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(folder), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        if not git("ls-files", "."):  # an environment that happens to lie inside another repository
            return "unknown"
        commit = git("rev-parse", "HEAD")
        changed = git("status", "--porcelain", "--", ":/src", ":/notebooks", ":/pyproject.toml")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return commit + ("-dirty" if changed else "")


def _flat(values: Mapping, path: Path, part: str) -> dict:
    result = {}
    for name, value in values.items():
        value = value.item() if hasattr(value, "item") and np.ndim(value) == 0 else value
        value = str(value) if isinstance(value, Path) else value
        if not (value is None and part == "parameters") and not isinstance(value, (bool, int, float, str)):
            raise DataError(path, f"{part}.{name}", f"is {type(value).__name__}", "Give a number or text")
        if isinstance(value, float) and not math.isfinite(value):
            raise DataError(
                path, f"{part}.{name}", f"is {value}", "The run failed: find out why, don't report it"
            )
        result[str(name)] = value
    return result


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


def measured(runs: str | Path | Iterable[str | Path]) -> pd.DataFrame:
    """One row per metrics file: its parameters, its metrics, and what made it.

    Args:
        runs: a folder (every `metrics.json` below it), a glob pattern, or the files themselves.

    Returns:
        Columns: parameters and metrics under their names; `run_protocol`, `run_seconds`,
        `run_peak_memory_bytes`, `run_device`, `run_commit`, `run_file`, `version_<package>`. Empty if nothing
        was run.

    Raises:
        DataError: a file that is missing, is cut off or malformed, lacks a field or holds a NaN.
    """
    rows = []
    for file in _files(runs):
        content = _read_metrics(file)
        parameters, metrics = content["parameters"], content["metrics"]
        if both := sorted(parameters.keys() & metrics.keys()):
            raise DataError(file, f"names {both}", "are parameters and metrics at once", "Rename the metrics")
        rows.append(
            {
                **parameters,
                **metrics,
                **{
                    f"run_{name}": content[name]
                    for name in FIELDS
                    if name not in ("parameters", "metrics", "versions")
                },
                **{f"version_{name}": value for name, value in content["versions"].items()},
                "run_file": str(file),
            }
        )
    return pd.DataFrame(rows)


def _files(runs) -> list[Path]:
    if not isinstance(runs, (str, Path)):
        return [Path(file) for file in runs]
    if any(mark in str(runs) for mark in "*?["):
        path = Path(runs)
        anchor = Path(path.anchor)
        return sorted(anchor.glob(str(path.relative_to(anchor))))
    return sorted(Path(runs).rglob("metrics.json")) if Path(runs).is_dir() else [Path(runs)]


def _read_metrics(file: Path) -> dict:
    def refuse(constant: str):
        raise ValueError(f"it contains {constant}")

    remedy = "Delete it and run again"
    try:
        content = json.loads(file.read_text(encoding="utf-8"), parse_constant=refuse)
    except OSError as error:
        raise DataError(file, "the file", f"cannot be read ({error.strerror})", "Run it first") from error
    except ValueError as error:
        raise DataError(file, "the file", f"is not a whole metrics file ({error})", remedy) from error
    if not isinstance(content, dict):
        raise DataError(file, "the file", "is not a JSON object", remedy)
    if missing := [name for name in FIELDS if name not in content]:
        raise DataError(file, "the file", f"lacks {', '.join(missing)}", remedy)
    for name in ("parameters", "metrics", "versions"):
        if not isinstance(content[name], dict):
            raise DataError(file, name, "is not a JSON object", remedy)
    return content


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
