"""`python -m finematch data`: what a folder has, beside the published counts, and which tables it allows."""

from __future__ import annotations

import numpy as np
import pytest
from formats import coco_year, five, karpathy, karpathy_entry, picture, precomp

from finematch import survey as of
from finematch.__main__ import main
from finematch.grids import names


@pytest.fixture
def folder(tmp_path):
    """Flickr30k's images of two splits and its arrays, COCO 2017, each a few images."""
    entries = [karpathy_entry(k, split, five(k)) for k, split in enumerate(("train", "train", "val"))]
    karpathy(tmp_path / "flickr30k", entries).rename(tmp_path / "flickr30k" / "dataset_flickr30k.json")
    coco_year(tmp_path, "2017", {"train": 3, "val": 2})
    for split, n in (("train", 3), ("dev", 1), ("test", 1)):
        features, said = np.ones((n, 2, 3), np.float32), [c for k in range(n) for c in five(k)]
        precomp(tmp_path / "f30k_precomp", split, features, said)
    return tmp_path


def test_counts_stand_beside_the_published_ones(folder, monkeypatch):
    counts = {"train": (2, 10), "val": (1014, 5070), "test": (1000, 5000)}
    monkeypatch.setitem(of.PUBLISHED, "flickr30k", counts)
    train, val, test = of.survey(folder, "flickr30k")
    assert train == "flickr30k train: 2 images, 10 captions, as published"
    assert val == "flickr30k val: 1 images, 5 captions; PUBLISHED 1,014 and 5,070"
    assert test.endswith("split 'test': the file has only train, val")


def test_published_counts():
    """Karpathy's splits, and what MVAM, HSLM and SLAN print."""
    assert of.PUBLISHED["flickr30k"] == {"train": (29000, 145000), "val": (1014, 5070), "test": (1000, 5000)}
    assert [n for n, _ in of.PUBLISHED["coco_karpathy"].values()] == [113287, 5000, 5000]
    tasks = {"vqav2", "nlvr2", "msrvtt"}
    for counts in (of.PUBLISHED[name] for name in of.PUBLISHED if name not in tasks):
        assert all(captions == 5 * images for images, captions in counts.values())


def test_counts_of_tasks(tmp_path):
    """NLVR2's splits are published with their examples and distinct sentences; 29,680 sentences are in all four."""
    lines = [f'{{"identifier": "dev-1-{pair}-0", "sentence": "Two.", "label": "True"}}' for pair in (0, 1)]
    (tmp_path / "nlvr2").mkdir()
    (tmp_path / "nlvr2/dev.json").write_text("\n".join(lines))
    for name in ("dev-1-0-img0", "dev-1-0-img1", "dev-1-1-img0", "dev-1-1-img1"):
        picture(tmp_path / f"nlvr2/images/dev/{name}.png")
    line = list(of.survey(tmp_path, "nlvr2"))[1]
    assert line == "nlvr2 val: 2 pairs, 1 sentences; PUBLISHED 6,982 and 2,018"
    assert (
        sum(sentences for _, sentences in of.PUBLISHED["nlvr2"].values()) == 29680 - 1996
    )  # test-U is hidden


def test_what_the_folder_allows(folder, capsys):
    assert main(["data", "--data-root", str(folder)]) == 0
    sets, tables = capsys.readouterr().out.split("\nTables at scale paper")
    assert "flickr30k train: 2 images, 10 captions; PUBLISHED 29,000 and 145,000" in sets
    assert "f30k_precomp dev: 1 images, 5 captions; PUBLISHED 1,014 and 5,070" in sets
    assert "coco_karpathy val: " in sets
    assert sets.count("visual_genome") >= 1
    lines = tables.splitlines()[1:]
    (allowed,) = [line for line in lines if line.startswith("yes") and "hslm_main" in line]
    assert "hslm_modules" in allowed
    (felga,) = [line for line in lines if "felga_variants" in line]
    assert felga.startswith("yes, on other images than the paper's coco: ")
    (mvam,) = [line for line in lines if "mvam_views" in line]
    assert mvam.startswith("no, ")
    assert "coco_precomp" in mvam
    for name in names():
        assert name in tables


def test_one_set_says_whether_it_is_there(folder, capsys):
    assert main(["data", "--data-root", str(folder), "--dataset", "flickr30k"]) == 0
    assert main(["data", "--data-root", str(folder), "--dataset", "flickr8k"]) == 1
    assert "flickr8k: dataset 'flickr8k': the folder does not exist" in capsys.readouterr().out
    assert main(["data", "--data-root", str(folder), "--dataset", "flickr31k"]) == 1
    assert "is not known; near to 'flickr30k'" in capsys.readouterr().out
    assert main(["data", "--data-root", str(folder), "--dataset", "f30k_precomp"]) == 0
