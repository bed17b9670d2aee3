"""`python -m finematch`: what the cache holds, and how it is cleared."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from finematch.__main__ import main, size
from finematch.files import cached, entries
from finematch.standins import write_data


def fill(count: int):
    return lambda folder: (folder / "a").write_bytes(b"0" * count)


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    cached(tmp_path / "cache" / "scenes", "cells", {"a": 1}, fill(2000))
    cached(tmp_path / "cache", "crops", {"a": 1}, fill(10))
    with pytest.raises(RuntimeError):
        cached(tmp_path / "cache", "crops", {"a": 2}, lambda folder: exec("raise RuntimeError"))
    return tmp_path / "cache"


def test_the_cache_is_listed(cache, capsys):
    main(["cache", "list", "--cache", str(cache)])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4
    assert sum("(not finished)" in line for line in lines) == 1
    assert "scenes/cells-" in "".join(lines)
    assert f"{cache}: 3 entries, " in lines[-1]
    main(["cache", "list", "--cache", str(cache), "--kind", "cells"])
    assert "2.2 kB" in capsys.readouterr().out


def test_one_kind_one_entry_or_all_is_cleared(cache, capsys):
    name = next(cache.glob("crops-*[0-9a-f]")).name
    main(["cache", "clear", name, "--cache", str(cache)])
    assert "1 entries, removed" in capsys.readouterr().out
    main(["cache", "clear", "--kind", "crops", "--cache", str(cache)])
    assert [entry.kind for entry in entries(cache)] == ["cells"]
    main(["cache", "clear", "--cache", str(cache)])
    assert entries(cache) == []


def test_it_runs_as_a_module(tmp_path):
    command = [sys.executable, "-m", "finematch", "cache", "list", "--cache", str(tmp_path / "none")]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert said == f"{tmp_path / 'none'}: 0 entries, 0 B\n"
    wrong = subprocess.run([sys.executable, "-m", "finematch", "cash"], capture_output=True, text=True)
    assert wrong.returncode == 2
    assert "invalid choice" in wrong.stderr


def test_sizes_read_well():
    assert [size(n) for n in (0, 999, 1000, 1_540_000, 2 * 10**9)] == [
        "0 B",
        "999 B",
        "1.0 kB",
        "1.5 MB",
        "2.0 GB",
    ]


@pytest.mark.parametrize(
    ("grid", "dataset", "removed", "kind"),
    [
        (
            "hslm_main",
            "flickr30k",
            "flickr30k",
            "arrays",
        ),  # their captions are their own: no image is looked for
        ("felga_variants", "coco2014", None, "fragments"),
        ("slan_filter", "coco_karpathy", "coco_precomp", "images"),
    ],
)
def test_only_what_the_rows_of_a_grid_read_is_looked_for(tmp_path, capsys, grid, dataset, removed, kind):
    write_data(dataset, tmp_path, images=2, size=(80, 64))
    if removed:
        shutil.rmtree(tmp_path / removed)
    command = ["data", grid, "--dataset", dataset, "--data-root", str(tmp_path), "--scale", "paper"]
    assert main(command) == 0
    assert capsys.readouterr().out.startswith(f"{grid} reads {kind} of {dataset}: train ")
    for folder in tmp_path.iterdir():
        if folder.is_dir():
            shutil.rmtree(folder)
    assert main(command) == 1
    assert str(tmp_path) in capsys.readouterr().err


def test_a_grid_of_two_kinds_looks_for_both(tmp_path, capsys):
    write_data("coco_karpathy", tmp_path, images=2, size=(80, 64))
    command = ["data", "mvam_backbones", "--dataset", "coco_karpathy", "--data-root", str(tmp_path)]
    assert main([*command, "--scale", "paper"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines == [
        "mvam_backbones reads images of coco_karpathy: train 4, val 2, test 2",
        "mvam_backbones reads arrays of coco_karpathy: train 2, val 2, test 2",
    ]
