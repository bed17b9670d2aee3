"""The scorecard on hand-made runs: verdicts, links, columns, costs; every table of the papers has a line."""

import re
from dataclasses import replace

import pandas as pd
import pytest

from finematch import grids, scorecard
from finematch.tables import published

VIEWS = grids.grid("mvam_views")
REPEATED = {"1", "2", "3", "4", "5", "6", "7"}  # tables of SLAN's arXiv version that the ICCV version has too


def runs(values, dataset="scenes", device="AMD EPYC, 1 threads"):
    """A frame as `tables.runs_of` gives: row to the t2i@1 of its seeds."""
    return pd.DataFrame(
        [
            {"row": row, "seed": seed, "dataset": dataset, "i2t_r1": value, "t2i_r1": value, "rsum": 6 * value,
             "run_file": f"/x/papermill_runs/mvam/{dataset}.tiny.{row}.s{seed}/metrics.json", "run_seconds": 90.0,
             "run_device": device, "run_commit": "abcdef0123", "run_conditions": row, "run_earlier": "",
             "run_status": "current", "run_behind": "[]", "run_networks": "{}"}
            for row, of in values.items()
            for seed, value in enumerate(of)
        ]
    )  # fmt: skip


ONE, EIGHT = "regions-attention", "views-8"
RAN = runs({ONE: [40.0, 40.2, 40.4], EIGHT: [44.0, 44.3, 44.4], "regions-mvam": [30.0]})
NONE = RAN[:0]


@pytest.fixture
def frame():
    scenes = scorecard.lines(VIEWS, "scenes", "tiny", {"both": RAN})
    photos = scorecard.lines(VIEWS, "flickr8k", "tiny", {"both": NONE})
    return pd.concat([scenes, photos], ignore_index=True)


def test_a_line_has_both_sides_published_and_measured(frame):
    line = frame.iloc[0]
    assert (line["paper"], line["table"], line["data"], line["metric"]) == ("MVAM", "4", "COCO 5K", "t2i@1")
    assert (line["printed_a"], line["printed_b"]) == (38.52, 35.25)
    assert (line["a"], line["b"]) == (pytest.approx(44.2333, abs=1e-3), pytest.approx(40.2))
    assert line["verdict"] == "holds"
    assert line["lower"] < line["a"] - line["b"] < line["upper"]
    assert line["a_files"][2] == (2, "papermill_runs/mvam/scenes.tiny.views-8.s2/metrics.json")
    assert set(frame["claim"]) == {claim.text for claim in VIEWS.claims}
    assert len(frame) == 8, "one printed metric of each of four claims, on two data sets"


def test_cells_say_verdict_interval_and_both_numbers(frame):
    text = scorecard.cell(frame.iloc[0])
    assert re.match(r"✓ \+4\.03 \(\+\d\.\d\d to \+\d\.\d\d\): 44\.23 ± 0\.21 ", text)
    assert "[⁰](papermill_runs/mvam/scenes.tiny.views-8.s0/metrics.json)[¹](" in text
    assert " against 40.20 ± 0.20 [⁰](" in text
    single = scorecard.cell(frame.iloc[1])  # 16 views against 1: one seed, no interval
    assert re.match(r"·: 30\.00 \[⁰\]\(papermill_runs/\S+\) against 40\.20 ± 0\.20", single)
    assert scorecard.cell(frame.iloc[4]) == "·"
    assert scorecard.published_cell(frame.iloc[0]) == "+3.27: 38.52 against 35.25"
    assert scorecard.published_cell({"printed_a": None, "printed_b": 1.0}) == ""


def test_columns_are_those_where_something_ran(frame):
    assert scorecard.columns_of(frame) == {"scenes, default": ("scenes", "tiny", "default")}
    literal = scorecard.lines(VIEWS, "coco_karpathy", "paper", {"literal": RAN, "default": NONE})
    both = pd.concat([frame, literal], ignore_index=True)
    assert list(scorecard.columns_of(both)) == ["scenes, default", "coco_karpathy, paper scale, literal"]


def test_the_literal_reading_of_one_run_for_both_is_the_same(frame):
    own, same = scorecard.of_column(frame, ("scenes", "tiny", "default"))
    assert (len(own), same) == (4, False)
    other, same = scorecard.of_column(frame, ("scenes", "tiny", "literal"))
    assert (len(other), same) == (0, True)


def test_the_glance_has_a_mark_per_claim_and_the_cost(frame):
    costs = {("MVAM", "4", "mvam_views"): scorecard.cost([RAN, NONE])}
    text = scorecard.glance(frame, costs, {"mvam_views": "figures/mvam_views.scenes.tiny.md"})
    (line,) = [line for line in text.splitlines() if "Number of views" in line]
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    assert cells == ["[MVAM 4](#mvam-4)", "[Number of views](figures/mvam_views.scenes.tiny.md)", "✓···", "1", "0.0",
                     "7", "10", "AMD EPYC", "abcdef0"]  # fmt: skip
    assert "1 *holds* (✓), 0 *contradicted* (✗), 0 *undecided* (?), 7 *not run* (·)" in scorecard.total(frame)


def test_a_comparison_of_two_tables_counts_once(frame):
    again = frame.assign(grid="mvam_other", table="5")
    assert scorecard.total(pd.concat([frame, again])) == scorecard.total(frame)


def test_runs_of_several_tables_cost_once():
    assert scorecard.cost([RAN, RAN.head(2)])["runs"] == 7
    assert scorecard.cost([NONE]) == {}
    mixed = pd.concat([RAN, runs({"x": [1.0]}, device="Intel(R) Xeon(R) Processor, 1 threads")])
    assert scorecard.cost([mixed])["machines"] == "AMD EPYC, Intel Xeon"


def test_claims_of_a_paper_stand_below_their_table(frame):
    text = scorecard.claims_table("MVAM", frame)
    head, _, *rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines()]
    assert head == ["table", "claim", "metric", "published", "scenes, default"]
    assert rows[0][:4] == ['<a id="mvam-4"></a>**4**', "*Number of views* (`mvam_views`)", "", "*COCO 5K*"]
    assert [row[1] for row in rows[1:]] == [claim for claim in dict.fromkeys(c.text for c in VIEWS.claims)]
    assert not re.search(r"  +\|", text), "cells are not filled with blanks"


def test_a_grid_without_a_table_stands_at_the_nearest():
    assert scorecard.place(grids.grid("mvam_photos")) == ("MVAM", "2")
    assert scorecard.place(grids.grid("slan_features")) == ("SLAN-v1", "10")
    assert scorecard.place(grids.grid("hslm_main", "coco_karpathy")) == ("HSLM", "3")
    assert scorecard.place(replace(VIEWS, paper="", table="", beside="")) is None
    assert scorecard.place(replace(VIEWS, name="compare_all", paper="")) is None


def test_a_claim_within_runs_has_its_baseline_on_the_other_side():
    grid = grids.grid("slan_nlvr2")
    claim = next(one for one in grid.claims if one.baseline)
    values = {claim.metric: [52.0, 53.0, 51.0], claim.baseline: [48.0, 48.5, 48.2]}
    own = runs({claim.better: [0.0, 0.0, 0.0]}).assign(**values)
    for other in grid.claims:
        for metric in (other.metric, other.baseline):
            if metric and metric not in own:
                own[metric] = 1.0 + own["seed"]
    line = scorecard.lines(grid, "scenes", "tiny", {"default": own}).set_index("claim").loc[claim.text]
    line = line.iloc[0] if isinstance(line, pd.DataFrame) else line
    assert (line["a"], line["b"]) == (52.0, pytest.approx(48.2333, abs=1e-3))
    assert line["a_files"] == line["b_files"]
    assert pd.isna(line["printed_a"])


def test_published_and_measured_differences_are_drawn_in_panels(frame):
    drawn = scorecard.drawn("MVAM", frame)
    assert list(dict.fromkeys(drawn["metric"])) == ["COCO 5K, published", "scenes, default, 3 seeds"]
    assert set(drawn["claim"]) == {"4: 8 views beat 1"}, "what was not judged is not drawn"
    assert drawn["difference"].tolist() == pytest.approx([3.27, 4.0333], abs=1e-3)
    assert scorecard.drawn("HSLM", frame).empty


def test_every_table_of_the_papers_has_a_line():
    """Of a grid, on any data set, or among those that no grid runs."""
    placed = {
        scorecard.place(grids.grid(name, on)) for name in grids.names() for on in ("", *scorecard.PAPERS_OWN)
    }
    for paper in scorecard.PAPERS:
        for table in published(paper)["table"].unique():
            repeated = paper == "SLAN-v1" and table in REPEATED
            assert repeated or (paper, table) in placed | set(scorecard.OTHERS), (paper, table)


@pytest.mark.parametrize("name", grids.names())
def test_a_grid_with_a_table_names_the_data_of_its_numbers(name):
    for on in ("", *scorecard.PAPERS_OWN, "coco2014"):
        grid = grids.grid(name, on)
        assert bool(grid.table) == bool(grid.data), "data = ... in the toml"
