"""Images for fragments: what is trained on carries no boxes, the gallery does."""

from __future__ import annotations

import pytest
from formats import coco_year

from finematch.data.fragment_sets import open_fragment_sets
from finematch.data.record import DataError
from finematch.features.small_clip import open_small_clip
from finematch.scenes.generator import CATEGORIES


def test_training_records_carry_no_objects_and_reported_ones_do(scenes, tmp_path):
    sets = open_fragment_sets("scenes", scenes.parent, tmp_path)
    assert (len(sets.train), len(sets.val), len(sets.gallery)) == (40, 12, 12)
    assert not any(r.objects or r.phrases for r in (*sets.train, *sets.val))
    assert all(len(r.objects) >= 2 and len(r.captions) == 5 for r in sets.gallery)
    assert tuple(sets.categories) == CATEGORIES
    assert sets.synonyms["circle"] == ("ball", "disc")
    assert [r.image for r in sets.annotated] == [r.image for r in sets.gallery]
    assert all(r.split == "test" for r in sets.gallery)
    val = open_fragment_sets("scenes", scenes.parent, tmp_path, report="val")
    assert [r.image for r in val.gallery] == [r.image for r in sets.val]
    assert val.name == "scenes val"


@pytest.mark.parametrize(
    ("dataset", "report", "message"),
    [
        ("flickr8k", "val", "'val' on scenes"),
        ("scenes", "train", "report is 'train'"),
        ("flickr9k", "test", "'flickr9k' has no boxes"),
    ],
)
def test_what_has_no_boxes_is_refused(tmp_path, dataset, report, message):
    with pytest.raises(ValueError, match=message):
        open_fragment_sets(dataset, tmp_path, tmp_path, report=report)


@pytest.mark.parametrize("year", ["2014", "2017"])
def test_coco_trains_on_captions_and_reports_on_val(tmp_path, year):
    coco_year(tmp_path, year, {"train": 3, "val": 2})
    sets = open_fragment_sets("coco2014" if year == "2014" else "coco", tmp_path, tmp_path)
    assert (len(sets.train), len(sets.val), len(sets.gallery), sets.annotated) == (3, 0, 2, [])
    assert not any(r.objects for r in sets.train)
    assert all(r.objects for r in sets.gallery)
    assert sets.name == f"COCO {year} val"
    with pytest.raises(DataError, match="vlp="):
        open_small_clip(sets, "coco", tmp_path / "cache", echo=None)
