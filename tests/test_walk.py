"""Rows start at the paper's scale: each kind of architecture once, with smaller widths of the same classes.

The true sizes are walked by `make walk`, whose table is committed; here each kind runs its page with a BERT of width 32
in place of 768, and so on, and fails where a row of it would.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from finematch import grids
from finematch.files import DataError
from finematch.walk import parameters, rows, said, summary, walk, write

SHRINK = {
    "mvam": {"width": 32, "depth": 1, "total_dim": 64},
    "hslm": {"width": 32, "embed": 16, "sim": 16, "depth": 2},
    "felga": {"hidden_dim": 64, "out_dim": 32, "proposals": "grid", "keywords": "words"},
    "slan": {"vision": "vit_tiny_patch16_224", "size": 64, "width": 32, "heads": 4, "pyramid": 16, "embed": 16,
             "queue": 16, "query_heads": 4, "count": 20},
}  # fmt: skip


def test_a_run_is_walked_once_for_all_its_grids_after_what_it_builds_on():
    found = rows()
    every = {(name, row) for name in grids.names() for row in grids.grid(name).rows}
    assert every == {(name, row.name) for row in found for name in row.grids}
    assert len({(row.method, row.name, row.dataset) for row in found}) == len(found) < len(every)
    names = [(row.method, row.name, row.dataset) for row in found]
    for place, row in enumerate(found):
        assert all(names.index((row.method, link, row.dataset)) < place for link in row.links)
    assert [row.name for row in rows(["slan_retrieval"], "fine-tuned-0")] == ["pretrain-0", "fine-tuned-0"]


def test_only_what_makes_a_run_small_is_set(tmp_path):
    (first, second) = rows(["slan_retrieval"], "fine-tuned-0")
    given = parameters(second, tmp_path / "slan" / "flickr30k.paper.fine-tuned-0.s0", tmp_path, {})
    assert given["pretrained"] == f"{tmp_path}/slan/flickr30k.paper.pretrain-0.s0/best.safetensors"
    free = {
        "scale",
        "dataset",
        "data_root",
        "cache",
        "out",
        "resume",
        "epochs",
        "batch_size",
        "precision",
        "workers",
    }
    assert set(given) - free - {"threads"} == set(second.cells)
    own = {name: cell for name, cell in first.cells.items() if name != "shards"}  # the walk writes its own
    assert own.items() <= parameters(first, tmp_path / "a", tmp_path, {}).items()


def test_a_grid_that_names_no_data_set_is_refused(monkeypatch):
    monkeypatch.setattr(grids, "grid", lambda name: type("Grid", (), {"dataset": "", "rows": {}})())
    with pytest.raises(DataError, match="data set"):
        rows(["mvam_views"])


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("walk")


@pytest.mark.parametrize(
    ("grid", "row", "did"),
    [
        ("mvam_backbones", "grid-attention", "step"),
        ("mvam_backbones", "regions-mvam", "step"),
        ("mvam_backbones", "clip-mvam", "step"),
        ("hslm_main", "row-12", "step"),
        ("hslm_photos", "detected-9", "step"),
        ("felga_variants", "whole", "forward"),
        ("felga_variants", "felga", "step"),
        ("felga_blip", "blip-felga", "step"),
        ("felga_blip2", "blip2-proposals", "forward"),
        ("slan_adaptors", "levels-3", "step"),
    ],
)
def test_each_kind_starts(folder, grid, row, did):
    said_so = []
    found = walk(
        [grid], row, out=folder, shrink=SHRINK, echo=lambda *words, **_: said_so.append(" ".join(words))
    )
    assert [result["did"] for result in found] == [did] * len(found), found
    result = found[-1]
    assert (result["row"], result["error"]) == (row, "")
    assert 0 < result["peak_gib"] < 8
    assert result["seconds"] > 0
    if did == "step":
        assert result["steps"] >= 1
        assert result["parameters"] > 0
    (where,) = (folder / result["method"]).glob(f"*.paper.{row}.s0")
    assert not list(where.rglob("*.safetensors"))
    again = []
    assert walk([grid], row, out=folder, shrink=SHRINK, echo=lambda *words, **_: again.append(words)) == found
    assert again == []


def test_what_a_row_builds_on_is_walked_again_where_its_weights_are_gone(tmp_path):
    begun = []
    told = {
        "out": tmp_path,
        "shrink": SHRINK,
        "echo": lambda *words, **_: begun.append(words[0].split()[2:3]),
    }
    walk(["slan_retrieval"], "pretrain-0", **told)
    assert not list(tmp_path.glob("slan/*/**/*.safetensors"))
    begun.clear()
    found = walk(["slan_retrieval"], "fine-tuned-0", **told)
    assert begun[::2] == [["pretrain-0"], ["fine-tuned-0"]]
    assert [result["did"] for result in found] == ["step", "step"]
    assert not list(tmp_path.glob("slan/*/**/*.safetensors"))


def test_a_row_that_fails_says_how_and_is_walked_again(tmp_path):
    wrong = {"hslm": {**SHRINK["hslm"], "margin": "wide"}}
    (found,) = walk(["hslm_main"], "row-1", out=tmp_path, shrink=wrong, echo=lambda *words, **_: None)
    assert found["did"] == "failed"
    assert "margin" in found["error"]
    assert said(found).startswith("FAILED: ")
    again = walk(
        ["hslm_main"], "row-1", out=tmp_path, shrink={"hslm": SHRINK["hslm"]}, echo=lambda *words, **_: None
    )
    assert [result["did"] for result in again] == ["step"]
    assert summary([found], ["hslm_main"]).loc[0, ["walked", "failed"]].tolist() == [1, 1]
    write([found], tmp_path / "walk.json")
    content = json.loads((tmp_path / "walk.json").read_text())
    assert content["rows"] == [found]
    assert "torch" in content["versions"]
