"""What each reading changes: effects of the grids of readings, by hand-made metrics."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from matplotlib import pyplot as plt

from finematch import figures, grids, pages, readings
from finematch.config import declared
from finematch.figures.forest import forest
from finematch.files import DataError
from finematch.runs import write_metrics

TOML = """title = "Readings"
axis = "reading"
seeds = 2
headline = ["rsum"]
[rows]
{names}
[columns]
rsum = "rsum"
"""


@pytest.fixture
def book(tmp_path):
    """A folder of one grid of readings of MVAM, and runs of the default and of one alternative."""
    rows = {"views-16": "", "dot-scaled": "scaled", "dot-tanh": "tanh"}
    write_grid(tmp_path, "mvam_readings", "name,scoring\n" + "".join(f"{n},{v}\n" for n, v in rows.items()))
    grid = grids.grid("mvam_readings", folder=tmp_path)
    for row, values in {"views-16": (100.0, 104.0, 96.0), "dot-scaled": (111.0, 113.0, 107.0)}.items():
        for seed, value in enumerate(values):
            settings = grids.settings(grid, row, dataset="scenes", scale="tiny", seed=seed)
            folder = tmp_path / "runs" / "mvam" / f"scenes.tiny.{row}.s{seed}"
            write_metrics(folder, settings.as_dict(), {"rsum": value}, seconds=120.0, protocol="scenes test")
    return tmp_path


def write_grid(folder, name, rows):
    names = "\n".join(f'{line.split(",")[0]} = "{line}"' for line in rows.splitlines()[1:])
    (folder / f"{name}.csv").write_text(rows)
    (folder / f"{name}.toml").write_text(TOML.format(names=names))


def test_an_effect_is_the_other_value_less_the_default(book):
    """By hand: 111 - 100, 113 - 104, 107 - 96 are 11, 9, 11; their mean 31/3 and sd 2/sqrt(3), t(0.975, 2) 4.3027."""
    found = readings.effects("scenes", "tiny", folder=book, runs=book / "runs")
    (line,) = found.to_dict("records")  # tanh has no run
    assert (line["method"], line["id"], line["switch"]) == ("mvam", "M2", "scoring")
    assert (line["default"], line["other"], line["seeds"], line["minutes"]) == ("dot", "scaled", 3, 6.0)
    assert line["effect"] == pytest.approx(31 / 3)
    half = 4.302653 * (2 / 3**0.5) / 3**0.5
    assert (line["lower"], line["upper"]) == pytest.approx((31 / 3 - half, 31 / 3 + half), abs=1e-4)
    assert line["of default"] == pytest.approx(100)
    assert line["percent"] == pytest.approx(31 / 3)
    assert readings.planned(book) == 2


def test_seeds_that_one_of_the_two_lacks_are_left_out(book):
    for name in ("views-16.s2", "dot-scaled.s0"):
        (book / "runs" / "mvam" / f"scenes.tiny.{name}" / "metrics.json").unlink()
    assert readings.effects(
        "scenes", "tiny", folder=book, runs=book / "runs"
    ).empty  # one common seed: no interval
    assert (
        list(readings.effects("scenes", "tiny", folder=book, runs=book / "runs").columns) == readings.COLUMNS
    )


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        (
            "name,scoring,projection\none,,\ntwo,tanh,full\n",
            "differs from the first row in scoring, projection",
        ),
        ("name,scoring\none,tanh\ntwo,tanh\n", "differs from the first row in nothing"),
        ("name,views\none,\ntwo,8\n", "differs from the first row in views"),  # no reading of the paper
    ],
)
def test_a_row_changes_one_switch_of_the_register(tmp_path, rows, said):
    write_grid(tmp_path, "mvam_readings", rows)
    grid = grids.grid("mvam_readings", folder=tmp_path)
    with pytest.raises(DataError, match=said):
        readings.switch_of(grid, "two")


@pytest.mark.parametrize("name", readings.names())
def test_each_row_of_ours_changes_one_switch_to_another_value(name):
    grid = grids.grid(name, "scenes")
    first, *others = grid.rows
    default = grids.settings(grid, first, dataset="scenes", scale="tiny")
    assert len(others) >= 3
    for row in others:
        switch, _ = readings.switch_of(grid, row)
        assert declared(grid.method)[switch].register
        assert getattr(grids.settings(grid, row, dataset="scenes", scale="tiny"), switch) != getattr(
            default, switch
        )


def test_the_advice_names_what_costs_what_gains_and_how_many_are_open():
    frame = pd.DataFrame({
        "method": ["mvam", "slan", "hslm"], "switch": ["a", "b", "c"], "other": ["x", "y", "z"],
        "id": ["M1", "S1", "H1"], "percent": [-20.0, 8.0, 1.0], "lower": [-3.0, 1.0, -1.0], "upper": [-1.0, 2.0, 3.0],
    })  # fmt: skip
    frame["metric"] = "rsum"
    other = frame.assign(metric="r1", lower=[2.0, 2.0, 2.0], upper=3.0, percent=[30.0, 30.0, 40.0])
    said = readings.advice(frame, pd.concat([frame, other]))
    assert "costs something, by an interval over seeds: MVAM's `a=x` (M1, -20 %)." in said
    assert "a candidate for your data: SLAN's `b=y` (S1, +8 %)." in said
    assert "For the other 1 readings" in said
    assert "another metric differs by an interval: HSLM's `c=z` (H1, r1 +40 %)." in said
    assert "differs by an interval: none." in readings.advice(frame, frame)
    assert "zero out of about 0.2 of these 3 intervals" in said  # 5 % of three
    assert "over seeds: none." in readings.advice(frame[1:], frame)


def test_a_forest_has_a_line_an_effect_the_first_at_the_top():
    frame = pd.DataFrame({"label": ["big", "small"], "group": ["A", "B"], "effect": [5.0, -1.0],
                          "lower": [3.0, -3.0], "upper": [7.0, 1.0]})  # fmt: skip
    with figures.style():
        figure = forest(frame, xlabel="effect")
    (ax,) = figure.axes
    assert [text.get_text() for text in ax.get_yticklabels()] == ["big", "small"]
    assert list(ax.get_yticks()) == [2, 1]
    lines = [one for one in ax.collections if hasattr(one, "get_segments")]
    ends = [line.get_segments()[0][:, 0].tolist() for line in lines]
    assert ends == [[3.0, 7.0], [-3.0, 1.0]]
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["A", "B"]
    plt.close(figure)


def test_a_forest_shows_a_small_effect_beside_a_large_one():
    frame = pd.DataFrame({"label": ["big", "small"], "group": ["A", "B"], "effect": [-60.0, 1.0],
                          "lower": [-65.0, 0.5], "upper": [-55.0, 3.0]})  # fmt: skip
    with figures.style():
        figure = forest(frame, xlabel="effect", linear=5.0)
    (ax,) = figure.axes
    assert [text.get_text() for text in ax.get_xticklabels()] == ["−50", "−20", "−10", "−5", "−2", "0", "+2"]
    place = [ax.transAxes.inverted().transform(ax.transData.transform((x, 1)))[0] for x in (-65, -55, 0.5, 3)]
    assert place[3] - place[2] > 2 * (place[1] - place[0]) > 0
    plt.close(figure)


def test_the_page_of_readings_shows_the_effects(book, tmp_path):
    frame = readings.effects("scenes", "tiny", folder=book, runs=book / "runs").assign(metric="rsum")
    frame.assign(status="current").to_csv(tmp_path / "readings.scenes.tiny.csv", index=False)
    page = pages.readings("mvam", tmp_path).set_index("argument")["effect on scenes"]
    assert page["`scoring`"] == "`scaled`: +10.3 % (+7.5 to +13.2)"
    assert page["`projection`"] == "–"
    assert "effect on scenes" not in pages.readings("hslm", tmp_path)
    assert "effect on scenes" not in pages.readings("mvam", tmp_path / "nowhere")
    frame.assign(status="legacy").to_csv(tmp_path / "readings.scenes.tiny.csv", index=False)
    page = pages.readings("mvam", tmp_path).set_index("argument")["effect on scenes"]
    assert page["`scoring`"] == "`scaled`: +10.3 % (+7.5 to +13.2, legacy)"


def test_runs_of_earlier_defaults_do_not_count(book, monkeypatch):
    """Beside today's runs they would differ in more than the switch."""
    monkeypatch.setattr(
        "finematch.tables.earlier", lambda grid, file: ["tau"] if "dot-scaled" in str(file) else []
    )
    assert readings.effects("scenes", "tiny", folder=book, runs=book / "runs").empty


def test_a_grid_of_readings_is_run_under_the_scales_own_alone(book):
    """Its rows are readings themselves: a literal run of `scoring = tanh` would be no run of the literal reading."""
    grid = grids.grid("mvam_readings", folder=book)
    assert grids.readings(grid, "scenes", "tiny") == ("default",)
    assert grids.readings(grid, "scenes", "paper") == ("literal",)
    assert grids.readings(grids.grid("hslm_modules"), "scenes", "tiny") == ("default", "literal")


def test_rows_of_another_arithmetic_have_no_effect_and_old_ones_say_so(book, monkeypatch):
    def found():
        return readings.effects("scenes", "tiny", folder=book, runs=book / "runs")

    real, last = readings.runs_of, {}

    def changed(*args, **options):
        frames = real(*args, **options)
        return {name: frame.assign(**{key: np.where(frame["row"] == last["row"], value, frame[key])
                                      for key, value in last["set"].items()})
                if len(frame) else frame for name, frame in frames.items()}  # fmt: skip

    whole = found()
    row = whole["row"].iloc[0]
    monkeypatch.setattr(readings, "runs_of", changed)
    last |= {"row": row, "set": {"run_behind": "[1]"}}
    assert row not in set(found()["row"])
    assert len(found()) == len(whole) - (whole["row"] == row).sum()
    last |= {"set": {"run_status": "legacy: why"}}
    assert found().loc[found()["row"] == row, "status"].unique().tolist() == ["legacy"]
    last |= {"set": {"run_status": "current"}}
    assert "legacy" in set(found()["status"])  # the row that it is compared with
    assert readings.printed(found())["status"].isin(["current", "legacy"]).all()
