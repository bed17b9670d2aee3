"""The rehearsal: what is measured, what is predicted from it, and the grid's total."""

import math
from dataclasses import make_dataclass

import numpy as np
import pytest
import training_target as target

from finematch import rehearsal
from finematch.config import Settings
from finematch.features.fragments import Fragments
from finematch.grids import grid


@pytest.fixture
def s():
    return Settings("mvam", {"batch_size": 64})


def test_a_step_is_measured_up_to_the_rows_batch_and_takes_its_power(monkeypatch, s):
    """A clock that a step of b items advances by b^1.5, and an item's reading by 0.01."""
    now = [0.0]
    monkeypatch.setattr(rehearsal, "clock", lambda: now[0])

    class Slow(target.Toy):
        def forward(self, batch):
            now[0] += len(batch["x"]) ** 1.5
            return super().forward(batch)

    class Read(target.Data):
        def __getitems__(self, index):
            now[0] += 0.01 * len(index)
            return super().__getitems__(index)

    whole = rehearsal.step_cost(Slow(), Read(), s, patience=math.inf)
    assert whole["measured_batch"] == 64
    assert whole["step_without_reading"] == pytest.approx(64**1.5)
    assert whole["step"] == pytest.approx(64**1.5 + 0.64)
    short = rehearsal.step_cost(Slow(), Read(), s, patience=100.0)
    assert short["measured_batch"] == 16  # 16^1.5 = 64 seconds, and the next would take 2.5 times as long
    assert short["step_without_reading"] == pytest.approx(64**1.5)
    assert short["memory"] > 0
    assert short["checkpoints"] > 4 * sum(p.numel() for p in target.Toy().parameters())
    read_beside = rehearsal.step_cost(Slow(), Read(), s.replace(workers=2), patience=math.inf)
    assert read_beside["step"] == pytest.approx(64**1.5)


@pytest.mark.parametrize("method", ["mvam", "hslm", "felga", "slan"])
def test_the_small_run_has_the_rows_settings(method, tmp_path):
    s = Settings(method, {"epochs": 3})
    small = rehearsal.small_settings(s, tmp_path, tmp_path / "data").as_dict()
    places = {"smoke": True, "cache": str(tmp_path / "cache"), "data_root": str(tmp_path / "data")}
    assert small == s.as_dict() | places


def test_a_set_that_is_not_there_has_its_published_number_of_images(tmp_path):
    s = Settings("hslm", {"scale": "paper", "dataset": "coco_karpathy", "data_root": str(tmp_path)})
    assert rehearsal.images_of(s) == ("", (113_287, 5000, 5000))


def test_rows_of_one_shape_are_measured_once(monkeypatch, tmp_path):
    asked = []

    def rehearse_run(s, folder, *, patience):
        asked.append(s)
        return {"training": float(len(asked))}

    monkeypatch.setattr(rehearsal, "rehearse_run", rehearse_run)
    lines = rehearsal.rehearse(grid("mvam_lambda"), "scenes", "tiny", tmp_path, echo=lambda *_, **__: None)
    assert len(asked) == 2  # without a diversity loss, and with it by any weight
    assert [line["training"] for line in lines] == [1.0, 2.0, 2.0, 2.0, 2.0]
    (line,) = rehearsal.rehearse(
        grid("mvam_lambda"), "scenes", "tiny", tmp_path, row="lambda-1e1", echo=print
    )
    assert line["row"] == "lambda-1e1"
    assert asked[-1].diversity_weight == 10


def test_the_total_sums_runs_and_shares_features():
    line = {"training": 3600.0, "evaluation": 360.0, "encoders": 720.0, "features": 7200.0, "memory": 2e9, "batch": 8,
            "feature_disk": 1e9, "checkpoints": 5e8, "measured_batch": 8, "fits": 9}  # fmt: skip
    frame = rehearsal.table([{"row": "a", **line}, {"row": "b", **line, "features": 3600.0}], 3)
    total = frame.iloc[-1]
    assert total["row"] == "all, 3 seeds"
    assert total["training (h)"] == 6.0
    assert total["encoders (h)"] == pytest.approx(0.6)  # shared by the rows of a seed
    assert (total["features (h)"], total["features (GB)"], total["peak memory (GB)"]) == (2.0, 1.0, 2.0)
    assert total["checkpoints (GB)"] == 3.0


def test_a_tiled_gallery_repeats_items_and_shares_fragments():
    kind = make_dataclass("Gallery", ["records", "classes", "boxes", "regions", "keywords"])
    one = Fragments(
        np.eye(3, dtype=np.float32), np.array([[0, 1], [2, 0]]), np.array([[True, True], [True, False]])
    )
    large = rehearsal.tiled(kind(["r", "s"], one, one, one, one), 2)
    assert large.records == ["r", "s", "r", "s"]
    assert large.regions.index.tolist() == [[0, 1], [2, 0]] * 2
    assert large.boxes.features is one.features
    assert large.classes is one


def test_a_row_at_the_papers_scale_is_rehearsed_on_stand_ins(tmp_path):
    """The real thing, with published arrays and a smaller model: what grows with the set, and what does not."""
    given = {"scale": "paper", "dataset": "flickr30k", "data_root": str(tmp_path / "none"), "width": 16, "embed": 8,
             "sim": 8, "depth": 1, "batch_size": 4, "epochs": 2}  # fmt: skip
    s = Settings("hslm", given)
    cost = rehearsal.rehearse_run(s, tmp_path, patience=1.0)
    assert cost["measured_batch"] == 4
    assert cost["training"] > 2 * 36_250 * cost["step"] > 0  # steps of two epochs, and val
    assert cost["evaluation"] > 0
    assert (cost["features"], cost["encoders"]) == (0, 0)
