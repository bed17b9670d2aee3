"""Sources and pairs: what a batch holds, and that no caption meets another's picture."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from formats import picture
from PIL import Image
from torch.utils.data import DataLoader

from finematch.data.pairs import MapSource, Pairs, PixelSource, RegionSource, StateSource, to_pixels
from finematch.data.precomp import Regions
from finematch.data.record import DataError, Record
from finematch.text import Ragged
from finematch.training import EpochBatches, whole


def regions(n: int = 3, r: int = 2, d: int = 4, *, boxes=None, sizes=None, dtype=np.float16) -> Regions:
    array = np.arange(n * r * d).reshape(n, r, d).astype(dtype)
    return Regions(
        "train", array, [str(i) for i in range(n)], np.arange(n), [str(i) for i in range(n)], boxes, sizes, {}
    )


def texts(lengths: list[int]) -> Ragged:
    """Caption i is the token 10 i, 10 i + 1, ..."""
    ids = np.concatenate([10 * i + np.arange(n) for i, n in enumerate(lengths)]).astype(np.int32)
    return Ragged(ids, np.zeros(len(ids), bool), np.concatenate([[0], np.cumsum(lengths)]))


# ------------------------------------------------------------------------------------------ sources
def test_cells_are_laid_out_as_maps_row_by_row():
    source = MapSource([regions(3, r=4, d=2), regions(3, r=1, d=5)])
    batch = source.batch([2, 0])
    assert list(batch) == ["map0", "map1"]
    assert [tuple(m.shape) for m in batch.values()] == [(2, 2, 2, 2), (2, 5, 1, 1)]
    cells = regions(3, r=4, d=2).features
    for row, picture_ in enumerate((2, 0)):
        for y in range(2):
            for x in range(2):
                assert batch["map0"][row, :, y, x].tolist() == cells[picture_, 2 * y + x].tolist()
    assert batch["map0"].dtype == torch.float16
    assert len(source) == 3


def test_stages_that_do_not_fit_are_refused():
    with pytest.raises(DataError, match="3 cells make no square"):
        MapSource([regions(3, r=3)])
    with pytest.raises(DataError, match="stage 1: is of other pictures"):
        MapSource([regions(3, r=4), regions(2, r=4)])


def test_places_by_hand():
    """Fractions of the width and of the height, and the area as a fraction of the picture's."""
    boxes = np.array([[[0, 0, 200, 100], [50, 25, 100, 75]]], np.float32)
    source = RegionSource(regions(1, boxes=boxes, sizes=np.array([[200, 100]], np.int32)))
    expected = [[0, 0, 1, 1, 1], [0.25, 0.25, 0.5, 0.75, 0.125]]
    np.testing.assert_allclose(source.batch([0])["places"][0].numpy(), expected)


def test_places_of_each_picture_use_its_own_size():
    boxes = np.array([[[0, 0, 10, 10]], [[0, 0, 10, 10]]], np.float32)
    source = RegionSource(regions(2, 1, boxes=boxes, sizes=np.array([[20, 10], [40, 80]])))
    np.testing.assert_allclose(source.batch([1, 0])["places"][:, 0, 2:4].numpy(), [[0.25, 0.125], [0.5, 1.0]])


def test_region_source_gathers_rows_as_fp32():
    source = RegionSource(regions())
    got = source.batch([2, 0])
    assert set(got) == {"features", "mask"}
    assert got["features"].dtype == torch.float32
    assert got["features"].tolist() == [source.regions.features[i].tolist() for i in (2, 0)]
    assert got["mask"].tolist() == [[True, True]] * 2
    assert len(source) == 3


def test_places_can_be_left_out():
    boxes = np.tile(np.array([0, 0, 1, 1], np.float32), (3, 2, 1))
    given = regions(boxes=boxes, sizes=np.ones((3, 2), int))
    assert "places" in RegionSource(given).batch([0])
    assert "places" not in RegionSource(given, places=False).batch([0])


def test_boxes_without_picture_sizes_are_refused():
    with pytest.raises(DataError, match="sizes"):
        RegionSource(regions(boxes=np.zeros((3, 2, 4), np.float32)))


def test_pixel_source(tmp_path):
    records = [
        Record(str(i), "train", ("x",), image=picture(tmp_path / f"{i}.png", (8 + i, 6))) for i in range(3)
    ]
    transform = to_pixels(4, [0.5] * 3, [0.5] * 3)
    fresh, kept = PixelSource(records, transform), PixelSource(records, transform, keep=True)
    assert fresh.cache is None
    for index in ([2, 0], [1]):
        got = fresh.batch(index)["pixels"]
        assert got.shape == (len(index), 3, 4, 4)
        assert torch.equal(got, torch.stack([transform(records[i].open()) for i in index]))
        assert torch.equal(got, kept.batch(index)["pixels"])
    records[1].image.unlink()
    assert len(kept.batch([1])["pixels"]) == 1
    with pytest.raises(DataError, match=r"1\.png.*missing"):
        fresh.batch([1])


def test_state_source_pads_with_zeros():
    states = np.arange(12, dtype=np.float16).reshape(6, 2)
    states[0] = np.nan  # padding points at row 0: it must not leak
    source = StateSource(states, np.array([1, 0, 1, 1, 0, 1], bool), np.array([0, 1, 3, 6]))
    assert source.lengths.tolist() == [1, 2, 3]
    got = source.batch([2, 1])
    assert got["features"].tolist() == [[[6, 7], [8, 9], [10, 11]], [[2, 3], [4, 5], [0, 0]]]
    assert got["mask"].tolist() == [[True] * 3, [True, True, False]]
    assert got["special"].tolist() == [[True, False, True], [False, True, False]]


# ------------------------------------------------------------------------------------------ pairs
def test_pairs_join_each_caption_with_its_own_picture():
    """Pictures and captions carry their numbers, so a shift by one would show in every batch of an epoch."""
    image_of = np.array([0, 0, 1, 2, 2, 2, 3])
    data = Pairs(RegionSource(regions(4)), texts([2, 3, 1, 4, 2, 2, 1]), image_of)
    assert len(data) == 7
    loader = DataLoader(data, batch_sampler=EpochBatches(7, 3, seed=1, epoch=0), collate_fn=whole)
    seen = set()
    for batch in loader:
        caption = (batch["text"]["input_ids"][:, 0] // 10).tolist()
        picture_ = (batch["image"]["features"][:, 0, 0] // 8).int().tolist()
        assert picture_ == image_of[caption].tolist() == batch["image_id"].tolist()
        seen |= set(caption)
    assert len(seen) == 6
    one = data[4]
    assert one["text"]["input_ids"].tolist() == [[40, 41]]
    assert one["image_id"].tolist() == [2]


@pytest.mark.parametrize("n", [6, 8])
def test_pairs_refuse_another_number_of_captions(n):
    with pytest.raises(ValueError, match=f"7 captions, but {n} picture numbers"):
        Pairs(RegionSource(regions(4)), texts([1] * 7), np.zeros(n, int))


@pytest.mark.parametrize("image_of", [[0, 1, 4], [-1, 0, 1]])
def test_pairs_refuse_captions_of_no_picture(image_of):
    with pytest.raises(ValueError, match=rf"pictures {min(image_of)} to {max(image_of)}, but there are 4"):
        Pairs(RegionSource(regions(4)), texts([1] * 3), np.array(image_of))


# ------------------------------------------------------------------------------------------ pixels
def test_to_pixels_by_hand():
    array = np.zeros((2, 2, 3), np.uint8)
    array[0, 1] = (255, 51, 0)  # top right
    got = to_pixels(2, [0.0, 0.2, 0.5], [1.0, 0.5, 0.25])(Image.fromarray(array))
    assert got.shape == (3, 2, 2)
    torch.testing.assert_close(got[:, 0, 1], torch.tensor([1.0, 0.0, -2.0]))
    torch.testing.assert_close(got[:, 1, 0], torch.tensor([0.0, -0.4, -2.0]))


def test_to_pixels_squashes_and_does_not_crop():
    """The left half stays the left half of a wide picture: boxes as fractions hold."""
    array = np.zeros((20, 80, 3), np.uint8)
    array[:, :40] = 255
    got = to_pixels(8, [0.0] * 3, [1.0] * 3)(Image.fromarray(array))[0]
    assert (got[:, :3] > 0.9).all()
    assert (got[:, 5:] < 0.1).all()
