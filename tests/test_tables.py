"""Published numbers (checked by the papers' own arithmetic), metrics files, tables and verdicts."""

import json
import math
import re
import subprocess
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from scipy import stats

from finematch import grids, tables
from finematch.files import DataError
from finematch.grids import Claim, Grid
from finematch.runs import FIELDS, git_commit, measured, write_metrics
from finematch.tables import (
    HOLDS,
    NOT_RUN,
    RECIPES,
    also,
    beside_readings,
    chance_note,
    headlines,
    judge,
    judged,
    networks_of,
    oddities,
    page,
    printed,
    published,
    read_recipes,
    replace_block,
    summary,
    table,
    to_markdown,
    verdict_counts,
    verdicts,
    write,
)

RECALLS = ["i2t@1", "i2t@5", "i2t@10", "t2i@1", "t2i@5", "t2i@10"]


def wide(number):
    return published("MVAM", number).pivot(index="row", columns="column", values="value")


# --- published.csv


def test_every_cell_of_mvam_is_there_once():
    frame = published("MVAM")
    assert frame["table"].value_counts().to_dict() == {"1": 144, "2": 69, "4": 24, "5": 18, "3": 12}
    assert not frame.duplicated(["paper", "table", "row", "column"]).any()
    assert frame["value"].between(20, 100).all()
    assert set(published("MVAM", 1)["column"]) == {f"MSCOCO-{k} {r}" for k in ("1K", "5K") for r in RECALLS}
    assert all(set(published("MVAM", k)["column"]) == set(RECALLS) for k in (2, 3, 4, 5))
    # recall grows with k, in every row: a digit mistyped in front breaks this
    for number in range(1, 6):
        cells = wide(number)
        for prefix in ("MSCOCO-1K ", "MSCOCO-5K ") if number == 1 else ("",):
            for way in ("i2t", "t2i"):
                for low, high in ((1, 5), (5, 10)):
                    pair = cells[[f"{prefix}{way}@{low}", f"{prefix}{way}@{high}"]].dropna()
                    assert (pair.iloc[:, 0] < pair.iloc[:, 1]).all(), (number, prefix, way)


@pytest.mark.parametrize(
    ("number", "prefix", "improvements"),
    [
        (1, "MSCOCO-1K ", {"ViT": 1.61, "FRCNN": 2.17, "CLIP": 0.71}),
        (1, "MSCOCO-5K ", {"ViT": 2.755, "FRCNN": 4.055, "CLIP": 0.915}),
        (2, "", {"ViT": 0.56, "FRCNN": 5.54, "CLIP": 0.83}),
    ],
)
def test_average_improvement_over_attention_is_what_the_paper_says(number, prefix, improvements):
    # The paper's text: 1.62/2.17/0.71, 2.76/4.06/0.92, 0.56/5.54/0.83. The cells give 1.61 for the first.
    cells = wide(number)[[prefix + recall for recall in RECALLS]]
    for backbone, value in improvements.items():
        gain = (cells.loc[f"{backbone} +MVAM"] - cells.loc[f"{backbone} +Attn"]).mean()
        assert gain == pytest.approx(value, abs=0.0052), backbone


def test_tables_of_mvam_repeat_each_other():
    main = wide(1)[[f"MSCOCO-5K {recall}" for recall in RECALLS]]
    attention, mvam = main.loc["FRCNN +Attn"].tolist(), main.loc["FRCNN +MVAM"].tolist()
    assert wide(4).loc["1", RECALLS].tolist() == attention
    for number, row in ((3, "MVAM-FRCNN"), (4, "16"), (5, "base diversity loss")):
        assert wide(number).loc[row, RECALLS].tolist() == mvam


def test_published_names_what_there_is():
    assert list(dict.fromkeys(published("MVAM", 4)["row"])) == ["1", "8", "16", "32"]
    with pytest.raises(DataError, match=r"paper MVAN.*MVAM"):
        published("MVAN")
    with pytest.raises(DataError, match=r"table 6.*1, 2, 3, 4, 5"):
        published("MVAM", 6)


# --- metrics files


def run(folder, seed, value, **parameters):
    return write_metrics(
        folder,
        {"seed": seed, **parameters},
        {"i2t_r1": value, "rsum": 6 * value},
        seconds=1.5,
        protocol="scenes test: 500 images",
    )


def test_a_metrics_file_round_trips(tmp_path):
    parameters = {"seed": 3, "dataset": "scenes", "out": tmp_path, "lr": 1e-4, "smoke": False, "limit": None}
    metrics = {
        "i2t_r1": np.float64(12.5),
        "rsum": torch.tensor(75.0),
        "images": 500,
        "protocol": "scenes test",
    }
    file = write_metrics(tmp_path / "new" / "run", parameters, metrics, seconds=2.0)
    assert file == tmp_path / "new" / "run" / "metrics.json"
    assert [f.name for f in file.parent.iterdir()] == ["metrics.json"]  # nothing temporary is left
    content = json.loads(file.read_text())
    assert tuple(content) == FIELDS
    assert content["parameters"] == {**parameters, "out": str(tmp_path)}
    assert content["metrics"] == {"i2t_r1": 12.5, "rsum": 75.0, "images": 500}
    assert content["protocol"] == "scenes test"
    assert content["versions"]["torch"] == torch.__version__.split("+")[0]
    assert set(content["versions"]) == {"python", "torch", "transformers", "timm", "numpy", "finematch"}
    assert content["peak_memory_bytes"] > 10_000_000
    assert content["device"]
    assert "protocol" in metrics  # the caller's dictionary is left alone
    (line,) = measured(tmp_path).to_dict("records")
    assert line["i2t_r1"] == 12.5
    assert line["dataset"] == "scenes"
    assert line["run_protocol"] == "scenes test"
    assert line["run_file"] == str(file)


@pytest.mark.parametrize("value", [math.nan, math.inf, np.float32("nan"), torch.tensor(math.nan)])
def test_non_finite_metrics_are_refused(tmp_path, value):
    with pytest.raises(DataError, match=r"metrics\.i2t_r1"):
        write_metrics(tmp_path, {"seed": 0}, {"i2t_r1": value}, seconds=1, protocol="p")
    assert not list(tmp_path.iterdir())


def test_a_metric_without_protocol_or_that_is_no_number_is_refused(tmp_path):
    with pytest.raises(DataError, match="protocol"):
        write_metrics(tmp_path, {"seed": 0}, {"i2t_r1": 1.0}, seconds=1)
    for value in ([1.0], None, {"a": 1}):
        with pytest.raises(DataError, match=r"metrics\.i2t_r1"):
            write_metrics(tmp_path, {"seed": 0}, {"i2t_r1": value}, seconds=1, protocol="p")


def test_an_old_metrics_file_survives_a_failed_write(tmp_path):
    file = run(tmp_path, 0, 10.0)
    before = file.read_text()
    with pytest.raises(DataError):
        run(tmp_path, 0, math.nan)
    assert file.read_text() == before


def test_measured_takes_folders_patterns_and_files(tmp_path):
    files = [run(tmp_path / f"grid/run{k}", k, 10.0 + k, views=16) for k in range(3)]
    run(tmp_path / "other", 0, 1.0, views=1)
    assert len(measured(tmp_path)) == 4
    assert measured(tmp_path / "grid")["seed"].tolist() == [0, 1, 2]
    assert measured(str(tmp_path / "grid/*/metrics.json"))["i2t_r1"].tolist() == [10, 11, 12]
    assert len(measured(files[:2])) == 2
    assert measured(tmp_path / "nothing*/metrics.json").empty


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda text: text[: len(text) // 2], "not a whole metrics file"),
        (lambda text: "", "not a whole metrics file"),
        (lambda text: "[]", "not a JSON object"),
        (lambda text: text.replace("10.0", "NaN"), "contains NaN"),
        (lambda text: text.replace('"protocol"', '"protocl"'), "lacks protocol"),
        (lambda text: text.replace('"seed"', '"rsum"'), "parameters and metrics at once"),
    ],
)
def test_a_broken_metrics_file_is_named(tmp_path, damage, message):
    run(tmp_path / "good", 0, 10.0)
    bad = run(tmp_path / "bad", 1, 10.0)
    bad.write_text(damage(bad.read_text()))
    with pytest.raises(DataError, match=message) as error:
        measured(tmp_path)
    assert str(bad) in str(error.value)


def test_a_missing_metrics_file_is_named(tmp_path):
    with pytest.raises(DataError, match=r"gone/metrics\.json"):
        measured([tmp_path / "gone/metrics.json"])


def test_commit_is_that_of_the_checkout_and_says_when_sources_differ(tmp_path):
    def git(*arguments):
        identity = ["-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false"]
        done = subprocess.run(["git", "-C", tmp_path, *identity, *arguments], capture_output=True, check=True)
        return done.stdout.decode().strip()

    package = tmp_path / "src" / "package"
    package.mkdir(parents=True)
    assert git_commit(package) == "unknown"  # no repository
    git("init")
    (package / "a.py").write_text("x = 1\n")
    assert git_commit(package) == "unknown"  # nothing of it is tracked: an environment inside a repository
    git("add", ".")
    git("commit", "-m", "one")
    commit = git("rev-parse", "HEAD")
    assert git_commit(package) == commit
    (tmp_path / "figures").mkdir()
    (tmp_path / "figures" / "table.md").write_text("results are no sources\n")
    assert git_commit(package) == commit
    (package / "a.py").write_text("x = 2\n")
    assert git_commit(package) == f"{commit}-dirty"


# --- tables


def runs(**values):
    """A frame of runs: `runs(a=[...])` is one run per value, seeds 0, 1, ..."""
    return pd.DataFrame(
        [
            {"method": m, "seed": k, "dataset": "scenes", "i2t_r1": v}
            for m, vs in values.items()
            for k, v in enumerate(vs)
        ]
    )


def test_summary_is_mean_sd_and_n():
    result = summary(runs(b=[1.0, 2.0, 4.0], a=[7.0]), ["method"], ["i2t_r1"])
    assert list(result.columns) == ["method", "i2t_r1", "i2t_r1 sd", "n"]
    assert result["method"].tolist() == ["b", "a"]  # order of appearance
    assert result["i2t_r1"].tolist() == pytest.approx([7 / 3, 7])
    assert result["i2t_r1 sd"][0] == pytest.approx(1.5275252)  # n - 1
    assert np.isnan(result["i2t_r1 sd"][1])
    assert result["n"].tolist() == [3, 1]
    assert summary(pd.DataFrame(), ["method"], ["i2t_r1"]).empty


def test_summary_refuses_to_average_what_differs():
    frame = runs(a=[1.0, 2.0])
    other = frame.assign(dataset="flickr8k")
    with pytest.raises(ValueError, match=r"2 runs have method=a, seed=0; .*\(dataset\)"):
        summary(pd.concat([frame, other]), ["method"], ["i2t_r1"])
    with pytest.raises(ValueError, match="no column views"):
        summary(frame, ["views"], ["i2t_r1"])
    with pytest.raises(ValueError, match="has no i2t_r1"):
        summary(pd.concat([frame, frame.iloc[:1].assign(seed=5, i2t_r1=None)]), ["method"], ["i2t_r1"])


def test_a_measured_column_that_is_younger_than_a_run_is_left_out():
    grid = replace(grids.grid("mvam_views"), also={"rsum": "i2t_r1", "new": "younger", "newer": "youngest"})
    frame = runs(a=[1.0, 3.0]).rename(columns={"method": "row"}).assign(row="views-8", younger=[None, 2.0])
    assert list(also(grid, frame)) == ["row", "rsum", "rsum sd", "n"]
    assert also(grid, frame)["rsum"].tolist() == [2.0]
    assert "new" in also(grid, frame.assign(younger=2.0))
    assert also(replace(grid, also={"newer": "youngest"}), frame).empty


def cells_of(text):
    """The cells of a pipe table, line by line."""
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in text.splitlines()]


def test_table_puts_measured_beside_published():
    frame = pd.DataFrame({"views": [16, 16, 4], "seed": [0, 1, 0], "i2t_r1": [50.0, 52.0, 40.0]})
    result = table(
        published("MVAM", 4), summary(frame, ["views"], ["i2t_r1"]), row="views", columns={"i2t@1": "i2t_r1"}
    )
    assert result["row"].tolist() == ["1", "8", "16", "32", "4"]
    assert result["n"].tolist() == [0, 0, 2, 0, 1]
    assert result.loc[2, "i2t@1 published"] == 54.08
    assert result.loc[2, "i2t@1 measured"] == 51
    assert np.isnan(result.loc[0, "i2t@1 measured"])
    assert np.isnan(result.loc[4, "i2t@1 published"])
    text = to_markdown(result)
    lines = cells_of(text)
    assert lines[0] == ["row", "i2t@1 published", "i2t@1 measured", "n"]
    assert [mark.replace("-", "") for mark in lines[1]] == [":", ":", ":", ":"]
    assert lines[1][0].startswith(":")
    assert lines[1][1].endswith(":")
    assert lines[4] == ["16", "54.08", "51.00 ± 1.41", "2"]
    assert lines[6] == ["4", "–", "40.00", "1"]
    with_others = pd.concat([frame, pd.DataFrame({"seed": [7], "i2t_r1": [1.0]})])  # a run without views
    ours = summary(with_others.dropna(), ["views"], ["i2t_r1"])
    again = table(published("MVAM", 4), ours, row="views", columns={"i2t@1": "i2t_r1"})
    assert again["n"].tolist() == [0, 0, 2, 0, 1]
    assert cells_of(to_markdown(result, digits=1))[2] == ["1", "47.5", "–", "0"]
    assert cells_of(to_markdown(pd.DataFrame({"a": ["x|y"], "b": [1]})))[2] == ["x\\|y", "1"]


def test_table_maps_names_and_refuses_ambiguity():
    printed = published("MVAM", 5)
    ours = summary(runs(base=[1.0, 2.0], none=[0.0]), ["method"], ["i2t_r1"])
    names = {"base": "base diversity loss", "none": "w/o diversity loss"}
    result = table(printed, ours, row="method", columns={"i2t@1": "i2t_r1"}, rows=names)
    assert result["n"].tolist() == [1, 0, 2]
    same = {"base": "base diversity loss", "none": "base diversity loss"}
    with pytest.raises(ValueError, match="two measured lines"):
        table(printed, ours, row="method", columns={"i2t@1": "i2t_r1"}, rows=same)
    with pytest.raises(ValueError, match="no column"):
        table(printed, ours, row="method", columns={"R@1": "i2t_r1"}, rows=names)
    nothing = summary(pd.DataFrame(), ["method"], ["i2t_r1"])
    assert table(printed, nothing, row="method", columns={"i2t@1": "i2t_r1"})["n"].tolist() == [0, 0, 0]


def test_replace_block_changes_only_what_is_between_the_markers(tmp_path):
    file = tmp_path / "README.md"
    file.write_text("before\n<!-- results:begin -->\nold\n<!-- results:end -->\nafter é\n", encoding="utf-8")
    assert replace_block(file, "results", "| new |\n") is True
    expected = "before\n<!-- results:begin -->\n| new |\n<!-- results:end -->\nafter é\n"
    assert file.read_text(encoding="utf-8") == expected
    assert replace_block(file, "results", "| new |") is False
    with pytest.raises(DataError, match="block gallery"):
        replace_block(file, "gallery", "x")
    file.write_text(expected + expected, encoding="utf-8")
    with pytest.raises(DataError, match="block results"):
        replace_block(file, "results", "x")


# --- claims


def verdict(a, b, **options):
    return judge(runs(a=a), runs(b=b), "i2t_r1", **options)["verdict"]


def test_verdicts():
    assert verdict([50.0, 51.0, 52.0], [40.0, 41.5, 42.0]) == "holds"
    assert verdict([40.0, 41.0, 42.0], [50.0, 51.5, 52.0]) == "contradicted"
    assert verdict([50.0, 51.0], [50.0, 51.0]) == "undecided"  # no difference is no advantage
    assert verdict([50.0, 60.0, 40.0], [49.0, 61.0, 38.0]) == "undecided"
    assert (
        verdict([49.0, 61.0, 38.0], [50.0, 60.0, 40.0]) == "undecided"
    )  # the wrong sign alone contradicts nothing
    assert verdict([50.0], [40.0, 41.0]) == "not run"  # one seed has no spread
    assert verdict([50.0, 51.0], [60.0]) == "not run"
    assert verdict([2.0, 2.0], [1.0, 1.0]) == "holds"  # no spread at all
    assert verdict([10.0, 11.0], [20.0, 21.1], higher_is_better=False) == "holds"
    for nothing in (pd.DataFrame(), runs(b=[1.0]).iloc[:0]):
        assert judge(nothing, runs(a=[1.0, 2.0]), "i2t_r1")["verdict"] == "not run"
        assert judge(runs(a=[1.0, 2.0]), nothing, "i2t_r1")["verdict"] == "not run"


def test_what_is_not_run_is_named():
    one, two = runs(a=[1.0]), runs(b=[1.0, 2.0])
    assert judge(one, two, "i2t_r1")["note"] == "the first has 1 run; an interval needs two seeds"
    assert judge(two, one.iloc[:0], "i2t_r1")["note"] == "the second has no runs; an interval needs two seeds"
    assert judge(one, two, "i2t_r1")["lower"] is None


def test_the_interval_is_paired_where_seeds_and_batches_are_shared():
    # by hand: differences 3, 2, 1 have the mean 2 and s = 1; t(0.975, 2) is 4.303 in any table
    a, b = runs(a=[11.0, 12.0, 13.0]), runs(b=[8.0, 10.0, 12.0])
    result = judge(a, b, "i2t_r1")
    assert result["test"] == "paired"
    assert result["difference"] == 2
    assert result["lower"] == pytest.approx(2 - 4.30265 / math.sqrt(3), abs=1e-4)
    assert result["upper"] == pytest.approx(2 + 4.30265 / math.sqrt(3), abs=1e-4)
    assert (result["n_a"], result["n_b"]) == (3, 3)
    shuffled = judge(a.iloc[::-1], b, "i2t_r1")
    assert shuffled == result, "a pair is two runs of one seed, whatever the order of the rows"


@pytest.mark.parametrize("other", [{"seed": [3, 4, 5]}, {"dataset": "flickr8k"}, {"batch_size": 64}])
def test_the_interval_is_welchs_where_they_are_not(other):
    # by hand: means 12 and 10, variances 1 and 4, n = 3; se² = 5/3, ν = (5/3)² / ((1/9 + 16/9) / 2) = 50/17
    a, b = runs(a=[11.0, 12.0, 13.0]), runs(b=[8.0, 10.0, 12.0])
    a = a.assign(batch_size=32)
    b = b.assign(batch_size=32).assign(**other)
    result = judge(a, b, "i2t_r1")
    margin = stats.t.ppf(0.975, 50 / 17) * math.sqrt(5 / 3)
    assert result["test"] == "Welch"
    assert result["difference"] == 2
    assert result["lower"] == pytest.approx(2 - margin, abs=1e-9)
    assert result["upper"] == pytest.approx(2 + margin, abs=1e-9)
    assert result["verdict"] == "undecided"


def test_verdicts_err_as_often_as_their_level_says():
    # without any difference, about 2.5 % of the pairs must "hold" and as many be "contradicted"
    rng = np.random.default_rng(0)
    found = [verdict(rng.normal(size=4), rng.normal(size=4)) for _ in range(400)]
    assert 2 <= found.count("holds") <= 20
    assert 2 <= found.count("contradicted") <= 20
    assert "about 0.5 times *holds* and 0.5 times *contradicted*" in chance_note(20)


def test_one_condition_is_not_compared_with_itself():
    a = runs(a=[1.0, 2.0]).assign(run_conditions="views=16", run_file=["one", "two"])
    with pytest.raises(ValueError, match="one condition"):
        judge(a, a, "i2t_r1")
    again = a.assign(run_file=["three", "four"])
    with pytest.raises(ValueError, match="one condition"):
        judge(a, again, "i2t_r1")
    assert judge(a, again.assign(run_conditions="views=8"), "i2t_r1")["verdict"] == "undecided"


def test_judge_refuses_a_seed_that_counts_twice_and_a_missing_metric():
    twice = pd.concat([runs(a=[1.0]), runs(a=[2.0])])
    with pytest.raises(ValueError, match="seed 0 occurs twice"):
        judge(twice, runs(b=[0.0, 1.0]), "i2t_r1")
    with pytest.raises(ValueError, match="no t2i_r1"):
        judge(runs(a=[1.0, 2.0]), runs(b=[0.0, 1.0]), "t2i_r1")


# --- both readings

VIEWS = Grid(
    "mvam_mine", rows={"one": {}, "two": {}, "three": {}}, title="Views", axis="views", seeds=2,
    names={"one": "1", "two": "8", "three": "3"}, columns={"i2t@1": "i2t_r1"}, paper="MVAM", table="4",
    claims=(Claim("8 views beat 1", "two", "one", "i2t_r1"), Claim("8 beat 3", "two", "three", "i2t_r1")),
)  # fmt: skip


def by_row(**values):
    """Runs of a reading, as `runs_of` gives them."""
    frame = runs(**values).rename(columns={"method": "row"})
    return (
        frame.assign(run_status="current", run_earlier="", run_labels="", run_behind="[]", run_networks="{}")
        if len(frame)
        else pd.DataFrame(columns=["row", "seed"])
    )


BOTH = {
    "default": by_row(one=[40.0, 41.0], two=[50.0, 51.5]),
    "literal": by_row(one=[45.0, 46.0], two=[30.0, 31.5], three=[1.0, 2.0]),
}


def test_rows_of_different_defaults_or_arithmetic_are_not_compared():
    one, two = by_row(one=[40.0, 41.0]), by_row(two=[50.0, 51.5])
    grid = replace(VIEWS, claims=VIEWS.claims[:1])

    def line(better, worse=one):
        return verdicts(grid, {"default": pd.concat([worse, better])}).iloc[0]

    assert line(two)["verdict"] == HOLDS
    for changed, why in (
        ({"run_earlier": "extent"}, "one of the rows was made with earlier defaults"),
        # whatever else its status says: only one of several reasons stands there
        (
            {"run_behind": "[1]", "run_status": "legacy: its shortlist was made again since"},
            "an earlier version",
        ),
        ({"run_behind": "[2]"}, "an earlier version of the arithmetic"),
    ):
        found = line(two.assign(**changed))
        assert (found["verdict"], found["n_a"], found["n_b"]) == (NOT_RUN, 2, 2)
        assert why in found["note"]
        assert line(two.assign(**changed), one.assign(**changed))["verdict"] == HOLDS  # both alike
    assert line(two.assign(run_behind="[1]"), one.assign(run_behind="[2]"))["verdict"] == NOT_RUN
    assert (
        line(two.assign(run_status="legacy: it does not say which data and features it used"))["verdict"]
        == HOLDS
    )


def test_a_verdict_from_runs_of_earlier_defaults_says_so():
    """They are of neither reading, whichever column they stand in."""
    old = by_row(one=[40.0, 41.0], two=[50.0, 51.5]).assign(run_earlier="steer, extent")
    grid = replace(VIEWS, claims=VIEWS.claims[:1])
    line = verdicts(grid, {"default": old}).iloc[0]
    assert line["earlier"] == "extent, steer"
    assert tables.said(line.to_dict()).endswith("2 seeds, earlier defaults")
    assert (
        "earlier defaults)"
        in tables.headlines(pd.DataFrame([line]).assign(method="mvam", dataset="scenes"))[0]
    )
    now = verdicts(grid, {"default": old.assign(run_earlier="")}).iloc[0]
    assert tables.said(now.to_dict() | {"earlier": math.nan}) == tables.said(
        now.to_dict()
    )  # as read from a file
    assert (now["earlier"], tables.said(now.to_dict())[-7:]) == ("", "2 seeds")
    within = replace(grid, claims=(Claim("1 view beats chance", "one", "one", "i2t_r1", baseline="chance"),))
    assert verdicts(within, {"default": old.assign(chance=1.0)}).iloc[0]["earlier"] == "extent, steer"
    assert tables.seeds_of("scenes", old) == "scenes, 2 seeds, earlier defaults"
    half = old.assign(run_earlier=old["run_earlier"].where(old["row"] == "one", ""))
    assert tables.seeds_of("scenes", half) == "scenes, 2 seeds, some of earlier defaults"


def test_what_a_row_did_not_measure_is_blank_in_that_row_alone():
    """FELGA's untrained rows have no "after"; one seed without a number takes the number from its row."""
    of = by_row(one=[0.0, 0.0], two=[0.0, 0.0]).assign(
        grounding_pointing_before=[50.0, 50.0, 50.0, 50.0],
        grounding_pointing_after=[np.nan, np.nan, 60.0, 62.0],
        grounding_r1_after=[np.nan, np.nan, 30.0, np.nan],
    )
    found = tables.grounding(of).set_index("row")
    assert found["pointing"].isna().tolist() == [True, False]
    assert found.loc["two", "pointing"] == 61
    assert found["pointing, before"].tolist() == [50, 50]
    assert "R@1" not in found


def test_a_metric_that_a_grid_names_as_its_headline_is_shown():
    """Ties count against the model, and keywords tie where whole texts do not: the neutral number stands beside."""
    grid = grids.grid("felga_variants")
    shown = tables.main_metrics(
        grid, ["assignment_map", "assignment_expected", "assignment_lexical_expected"]
    )
    assert shown == ["assignment_map", "assignment_expected"]


def test_a_comparison_of_the_same_runs_under_both_readings_counts_once():
    default = by_row(one=[40.0, 41.0], two=[50.0, 51.5])
    grid = replace(VIEWS, claims=VIEWS.claims[:1])
    assert judged(verdicts(grid, {"default": default, "literal": default})) == 1
    other = by_row(one=[40.0, 41.0], two=[50.0, 51.0])
    assert judged(verdicts(grid, {"default": default, "literal": other})) == 2


def test_rows_over_two_trainings_of_one_frozen_network_are_not_compared():
    """A network that is trained again on another machine is another network: its features are others."""
    network = {"backbone": "resnet18", "size": 64, "trained_on": "captions"}
    first, second, other = (
        json.dumps(networks_of({"features": {"train": [{"weights": weights, "kind": "cells"} | network]}}))
        for weights, network in (("a", network), ("b", network), ("c", network | {"size": 224}))
    )
    one, two = by_row(one=[40.0, 41.0]), by_row(two=[50.0, 51.5])
    grid = replace(VIEWS, claims=VIEWS.claims[:1])

    def verdict(left, right):
        frame = pd.concat([one.assign(run_networks=left), two.assign(run_networks=right)])
        return verdicts(grid, {"default": frame}).iloc[0]

    assert verdict(first, first)["verdict"] == verdict(first, other)["verdict"] == HOLDS
    refused = verdict(first, second)
    assert refused["verdict"] == NOT_RUN
    assert "two trainings of one frozen network" in refused["note"]
    detectors = [json.dumps(networks_of({"made": {"detector": digest}})) for digest in "xy"]
    assert verdict(*detectors)["verdict"] == NOT_RUN
    # a network is named by what it was trained from, whatever the weights of that are
    nested = networks_of({"features": [{"weights": "d", "backbone": {"weights": "a", "size": 64}}]})
    assert nested == {'{"backbone": {"size": 64}}': "d", '{"size": 64}': "a"}


def test_published_cells_are_those_of_the_grids_columns():
    for name in ("slan_captioning", "slan_vqa", "slan_nlvr2"):  # Table 3 has retrieval, too
        one = grids.grid(name)
        assert set(printed(one)["column"]) <= set(one.columns), name
        assert not any("average R@1" in said for said in oddities(one)), name


def test_a_table_has_published_default_and_literal_side_by_side():
    frame = beside_readings(VIEWS, BOTH)
    measured = ["i2t@1 default", "i2t@1 default sd", "i2t@1 literal", "i2t@1 literal sd"]
    facts = ["n default", "n literal", "status default", "status literal"]
    assert list(frame) == ["row", "i2t@1 published", *measured, *facts]
    line = frame.set_index("row").loc["8"]
    assert (line["i2t@1 published"], line["i2t@1 default"], line["i2t@1 literal"]) == (53.52, 50.75, 30.75)
    three = frame.set_index("row").loc["3"]  # a row of ours alone, which has run under one reading
    assert np.isnan(three["i2t@1 default"])
    assert three["i2t@1 literal"] == 1.5
    text = to_markdown(frame)
    assert "50.75 ± 1.06" in text
    assert "30.75 ± 1.06" in text
    one = beside_readings(VIEWS, {"default": BOTH["default"], "literal": by_row()})
    assert "i2t@1 measured" in one
    assert not any("literal" in name for name in one)


def test_each_claim_has_a_line_with_both_verdicts():
    found = verdicts(VIEWS, BOTH)
    assert list(zip(found["reading"], found["verdict"], strict=True)) == [
        ("default", "holds"), ("default", "not run"), ("literal", "contradicted"), ("literal", "holds")]  # fmt: skip
    text = page(VIEWS, "scenes", "tiny", BOTH)
    assert "Measured: scenes, the readings default and literal." in text
    head, *lines = [
        line for line in cells_of(text) if (len(line) > 5 and "i2t_r1" in line) or line[:1] == ["claim"]
    ]
    first = dict(zip(head, lines[0], strict=True))
    assert len(lines) == 2
    assert (first["default"], first["literal"]) == ("holds", "contradicted")
    assert (first["difference, default"], first["difference, literal"]) == ("10.25", "-14.75")
    assert first["95 % interval, literal"].endswith(" to -11.57")
    assert first["printed difference"] == "6.06"
    assert text.count("*not run*") == 1
    assert text.endswith("* *not run*, default: `make grid GRID=mvam_mine`")
    assert "3 comparisons were judged" in text


def test_a_reading_without_runs_is_not_run_and_its_line_is_given_once():
    text = page(VIEWS, "flickr8k", "tiny", {"default": BOTH["literal"], "literal": by_row()})
    line = "`make grid GRID=mvam_mine DATASET=flickr8k DATA_ROOT=<folder> READING=literal`"
    assert text.count(line) == text.count("make grid") == 1
    assert [cells[-2] for cells in cells_of(text) if "i2t_r1" in cells] == ["not run", "not run"]
    assert "difference, literal" not in text
    paper = page(VIEWS, "coco_karpathy", "paper", {"default": by_row(), "literal": by_row()})
    assert "GRID=mvam_mine SCALE=paper DATASET=coco_karpathy DATA_ROOT=<folder> READING=default`" in paper
    assert "GRID=mvam_mine SCALE=paper DATASET=coco_karpathy DATA_ROOT=<folder>`" in paper
    assert "Measured: coco_karpathy, nothing yet." in paper


def test_where_no_row_differs_the_readings_are_one(tmp_path):
    runs = {"both": BOTH["literal"]}
    text = page(VIEWS, "scenes", "tiny", runs)
    assert "the reading default, which is literal too" in text
    assert "make grid" not in text
    assert next(line for line in cells_of(text) if line[:1] == ["claim"])[2] == "verdict"
    write(VIEWS, "scenes", "tiny", runs, tmp_path / "table")
    kept = pd.read_csv(tmp_path / "table.claims.csv")
    assert kept["reading"].tolist() == ["both", "both"]
    counts = verdict_counts(kept.assign(method="mvam", dataset="scenes")).iloc[0]
    assert [counts[name] for name in ("holds", "contradicted", "undecided", "not run")] == [
        "1 / 1",
        "1 / 1",
        "0 / 0",
        "0 / 0",
    ]


def test_headlines_say_default_and_literal():
    claims = verdicts(VIEWS, BOTH).assign(method="mvam", dataset="scenes")
    (line,) = headlines(claims)
    assert line.startswith("* **MVAM, scenes** (i2t_r1), default: *holds*: 8 views beat 1 (+10.2, ")
    assert ". 1 *not run*. literal: *holds*: 8 beat 3 (" in line
    assert "*contradicted*: 8 views beat 1 (-14.8, " in line
    counts = verdict_counts(claims).iloc[0]
    assert [counts[name] for name in ("holds", "contradicted", "undecided", "not run")] == [
        "1 / 1",
        "0 / 1",
        "0 / 0",
        "1 / 0",
    ]


def test_two_rows_without_training_are_undecided_and_not_counted():
    text = page(
        replace(VIEWS, untrained=("one", "two")),
        "scenes",
        "tiny",
        {"both": by_row(one=[1.0, 1.0], two=[2.0, 2.0])},
    )
    (line,) = [cells for cells in cells_of(text) if cells[:1] == ["8 views beat 1"]]
    assert line[2:4] == ["undecided", "1.00"]
    assert "one number each" in line[-1]
    assert "comparisons were judged" not in text


# --- recipes


def recipe(**changes):
    line = {"method": "hslm", "dataset": "scenes", "split": "val", "seed": "0"}
    line |= {"settings": "width=32 start=contrastive", "metrics": "rsum=300.5"}
    line |= {"commit": "a" * 40, "verdict": "no better, and slower"}
    return pd.DataFrame([line | changes])[list(RECIPES)]


def test_recipes_are_read(tmp_path):
    file = tmp_path / "recipes.csv"
    pd.concat([recipe(), recipe(settings="", split="dev")]).to_csv(file, index=False)
    found = read_recipes(file)
    assert found["settings"].tolist() == ["width=32 start=contrastive", ""]
    assert found["verdict"][0] == "no better, and slower"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": "hsln"}, "line 2: has no presets for 'hsln'"),
        ({"settings": "widht=32"}, "the setting 'widht'"),
        ({"settings": "width 32"}, "the setting '32'"),
        ({"metrics": "300.5"}, "the word '300.5'"),
        ({"commit": "abc1234"}, "the commit 'abc1234'"),
        ({"split": "test"}, "the split 'test'"),
        ({"verdict": ""}, "no seed or no verdict"),
    ],
)
def test_a_recipe_that_names_what_is_not_there_is_refused(tmp_path, changes, message):
    file = tmp_path / "recipes.csv"
    recipe(**changes).to_csv(file, index=False)
    with pytest.raises(DataError, match=message):
        read_recipes(file)
    recipe().rename(columns={"seed": "seeds"}).to_csv(file, index=False)
    with pytest.raises(DataError, match="the header: is method,dataset,split,seeds"):
        read_recipes(file)


def test_a_row_is_judged_beside_a_baseline_of_its_own_runs():
    claim = Claim("beats the images shuffled", "two", "two", "i2t_r1", "shuffled")
    grid = replace(VIEWS, claims=(claim,))
    runs = pd.DataFrame(
        {"row": ["two"] * 3 + ["one"] * 3, "seed": [0, 1, 2] * 2, "i2t_r1": [51.0, 52.0, 53.0] + [0.0] * 3,
         "shuffled": [10.0, 12.0, 11.0] + [99.0] * 3}
    )  # fmt: skip
    (line,) = verdicts(grid, {"default": runs}).to_dict("records")
    assert (line["verdict"], line["difference"], line["n_a"]) == ("holds", 41.0, 3)
    assert (line["better"], line["worse"]) == ("two i2t_r1", "two shuffled")
    (line,) = verdicts(grid, {"default": runs[runs["seed"] == 0]}).to_dict("records")
    assert (line["verdict"], line["note"]) == ("not run", "two has 1 run")
    (line,) = verdicts(grid, {"default": runs.iloc[:0]}).to_dict("records")
    assert line["verdict"] == "not run"


def test_rows_that_a_reading_makes_one_are_not_compared():
    grid = replace(VIEWS, claims=(Claim("8 views beat 1", "two", "one", "i2t_r1"),))
    runs = pd.DataFrame({"row": ["two", "two", "one", "one"], "seed": [0, 1, 0, 1], "i2t_r1": [1.0, 2.0, 1.0, 2.0],
                         "run_conditions": ["a", "b", "a", "b"]})  # fmt: skip
    (line,) = verdicts(grid, {"literal": runs}).to_dict("records")
    assert (line["verdict"], line["note"]) == (
        "undecided",
        "under this reading the two rows have the same settings",
    )
    assert pd.isna(line["lower"])


def test_a_claim_beside_a_metric_that_no_run_has_is_refused():
    claim = Claim("beats the images shuffled", "one", "one", "t2i_r1", "shuffled_t2i_r1")
    runs = pd.DataFrame({"seed": [0, 1], "t2i_r1": [40.0, 41.0], "run_file": ["one.s0/metrics.json"] * 2})
    with pytest.raises(
        DataError, match=r"one.s0/metrics.json.*images shuffled.*asks for shuffled_t2i_r1, not"
    ):
        tables._within(runs, claim)
    assert tables._within(runs.assign(shuffled_t2i_r1=[1.0, 2.0]), claim)["verdict"] in tables.VERDICTS


def test_a_picture_names_its_data_its_seeds_and_the_literal_reading():
    of = pd.DataFrame({"row": ["one", "one", "two"]})
    assert tables.seeds_of("scenes", of) == tables.seeds_of("scenes", of, "both") == "scenes, 1 to 2 seeds"
    assert tables.seeds_of("scenes", of, "literal") == "scenes, literal, 1 to 2 seeds"
    assert tables.seeds_of("scenes", of[:0], "literal") == "scenes, literal, not run"


def test_a_task_on_photos_names_what_was_measured(tmp_path):
    """Its runs are of flickr8k, which trained them; AP is of COCO."""
    for dataset, said in (("flickr8k", "COCO val2017, a slice"), ("scenes", "scenes")):
        table = grids.grid("slan_detection", dataset)
        runs = tables.runs_of(table, dataset, "tiny", tmp_path)
        assert f"Measured: {said}, " in tables.page(table, dataset, "tiny", runs)
        assert tables.drawn(table, runs["default"], dataset)["data"] == (
            "COCO, published",
            f"{said}, not run",
        )
