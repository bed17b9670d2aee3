"""What each reading of a paper changes: the rows of the grids `<method>_readings` against their first one.

The first row of such a grid is the default, every other has one setting beside it that is declared as a switch of the
method's register. An effect is the other value's metric less the default's, over the seeds that both have run.
"""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from finematch import grids
from finematch.config import declared
from finematch.files import DataError
from finematch.tables import LEVEL, judge, not_comparable, runs_of

COLUMNS = ["method", "id", "switch", "default", "other", "row", "metric", "of default", "effect", "lower", "upper",
           "percent", "percent lower", "percent upper", "test", "seeds", "minutes", "status"]  # fmt: skip


def names(folder: str | Path | None = None) -> list[str]:
    """The grids of readings."""
    return [name for name in grids.names(folder) if name.endswith(grids.OF_READINGS)]


def switch_of(grid: grids.Grid, row: str) -> tuple[str, str]:
    """The one setting that a row has beside those of the grid's first row, and its value as the cell says it.

    Raises:
        DataError: None, several, or one that is no declared switch of the register.
    """
    first = grid.rows[next(iter(grid.rows))]
    cells = grid.rows[row]
    other = {name: cell for name, cell in cells.items() if first.get(name) != cell}
    other |= {name: "" for name in first if name not in cells}
    known = declared(grid.method)
    if len(other) != 1 or not known[next(iter(other))].register:
        problem = f"differs from the first row in {', '.join(other) or 'nothing'}"
        raise DataError(f"grids/{grid.name}.csv", f"row {row}", problem, "Change one switch of the register")
    return next(iter(other.items()))


def effects(
    dataset: str, scale: str, *, folder: str | Path | None = None, runs: str | Path | None = None
) -> pd.DataFrame:
    """A line for each alternative and each of its grid's main metrics, of those that have run: `COLUMNS`.

    `effect` has the interval of `tables.judge`, also in percent of the default's mean; where there is none (a single
    seed), or the two rows cannot be compared (`tables.not_comparable`), it is left out. `minutes` are of training, of
    the alternative's runs in all. `status` is that of the older of the two rows.

    Args:
        folder: of the grids. runs: the folder of all methods' runs.
    """
    lines = []
    for name in names(folder):
        grid = grids.grid(name, dataset, folder=folder)
        of_method = None if runs is None else Path(runs) / grid.method
        frame = next(iter(runs_of(grid, dataset, scale, of_method).values()))  # of the default reading
        frame = (
            frame[frame["run_earlier"] == ""] if len(frame) else frame
        )  # else more than the switch would differ
        first, *others = grid.rows
        known, default = declared(grid.method), grids.settings(grid, first, dataset=dataset, scale=scale)
        for row in others:
            switch, value = switch_of(grid, row)
            found = frame[frame["row"] == row]
            of_first = frame[(frame["row"] == first) & frame["seed"].isin(found["seed"])]
            if not len(found) or not len(of_first) or not_comparable(found, of_first):
                continue
            current = all(status == "current" for of in (found, of_first) for status in of["run_status"])
            for metric in grid.headline:
                verdict = judge(found[found["seed"].isin(of_first["seed"])], of_first, metric)
                if verdict["lower"] is None:
                    continue
                mean = float(of_first[metric].mean())
                shares = {f"percent{end and ' '}{end}": 100 * verdict[of] / mean
                          for end, of in (("", "difference"), ("lower", "lower"), ("upper", "upper"))}  # fmt: skip
                lines.append({
                    "method": grid.method, "id": known[switch].register, "switch": switch,
                    "default": _plain(getattr(default, switch)), "other": value, "row": row, "metric": metric,
                    "of default": mean, "effect": verdict["difference"], "lower": verdict["lower"],
                    "upper": verdict["upper"], **shares, "test": verdict["test"], "seeds": verdict["n_a"],
                    "minutes": found["run_seconds"].sum() / 60, "status": "current" if current else "legacy",
                })  # fmt: skip
    return pd.DataFrame(lines, columns=COLUMNS)


def _plain(value: object) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def in_words(frame: pd.DataFrame) -> dict[tuple[str, str], str]:
    """By method and switch: each other value, its effect on the method's first metric in percent, and the interval.

    An effect of runs that are not current is marked `legacy`.
    """
    found: dict[tuple[str, str], list[str]] = {}
    for one in by_size(frame).to_dict("records"):
        interval = f"{one['percent lower']:+.1f} to {one['percent upper']:+.1f}"
        said = f"`{one['other']}`: {one['percent']:+.1f} % ({interval}{', legacy' * (one['status'] != 'current')})"
        found.setdefault((one["method"], one["switch"]), []).append(said)
    return {key: "; ".join(said) for key, said in found.items()}


def by_size(frame: pd.DataFrame, folder: str | Path | None = None) -> pd.DataFrame:
    """The effects on each grid's first metric, the largest first."""
    of = [grids.grid(name, folder=folder) for name in names(folder)]
    first = {grid.method: grid.headline[0] for grid in of}
    main = frame[frame["metric"] == frame["method"].map(first)]
    return main.sort_values("percent", key=abs, ascending=False, ignore_index=True)


def planned(folder: str | Path | None = None) -> int:
    """How many alternatives the grids name."""
    return sum(len(grids.grid(name, folder=folder).rows) - 1 for name in names(folder))


def printed(frame: pd.DataFrame) -> pd.DataFrame:
    """The effects for a page, the largest of a method first."""
    frame = frame.sort_values("percent", key=abs, ascending=False).sort_values("method", kind="stable")
    interval = [
        f"{low:+.1f} to {high:+.1f}" for low, high in zip(frame["lower"], frame["upper"], strict=True)
    ]
    return pd.DataFrame({
        "reading": frame["id"], "switch": [f"`{one}`" for one in frame["switch"]], "default": frame["default"],
        "other": frame["other"], "metric": frame["metric"], "of default": frame["of default"],
        "other less default": [f"{one:+.1f}" for one in frame["effect"]], "95 % interval": interval,
        "test": frame["test"], "seeds": frame["seeds"], "minutes": frame["minutes"].round().astype(int),
        "status": frame["status"],
    })  # fmt: skip


def advice(main: pd.DataFrame, effects: pd.DataFrame) -> str:
    """Which other values lower the main metric, which raise it, which show no difference in it, which of these
    differ in another metric, and how many intervals would leave zero out by chance alone.

    Args:
        main: from `by_size`. effects: all effects, from `effects`.
    """

    def named(of: pd.DataFrame, *, metric: bool = False) -> str:
        each = [
            f"{one['method'].upper()}'s `{one['switch']}={one['other']}` ({one['id']}, "
            f"{one['metric'] + ' ' if metric else ''}{one['percent']:+.0f} %)"
            for one in of.to_dict("records")
        ]
        return ", ".join(each) or "none"

    worse, better = main[main["upper"] < 0], main[main["lower"] > 0]
    unclear = main[(main["upper"] >= 0) & (main["lower"] <= 0)]
    decided = effects[(effects["upper"] < 0) | (effects["lower"] > 0)]
    beside = decided.merge(unclear[["method", "switch", "other"]])
    beside = beside.sort_values("percent", key=abs, ascending=False)
    return (
        f"Keep the default where the other value costs something, by an interval over seeds: {named(worse)}. "
        f"The other value is better here, and a candidate for your data: {named(better)}. "
        f"For the other {len(unclear)} readings the interval contains zero; of these, another metric differs by an "
        f"interval: {named(beside, metric=True)}. Where neither does, choose what is simpler, and say which. "
        f"If no choice made a difference, chance alone would leave zero out of about {len(main) * (1 - LEVEL):.1f} of "
        f"these {len(main)} intervals."
    )
