"""Boxes, by hand."""

import pytest
import torch

from finematch.boxes import FORMATS, area, clip, convert, giou, grid_boxes, iou, multi_scale_grid, nms


def boxes(*rows):
    return torch.tensor(rows, dtype=torch.float32).reshape(-1, 4)


def test_formats_by_hand_and_round_trip():
    box = boxes([10, 20, 40, 80])
    assert convert(box, "xyxy", "xywh").tolist() == [[10, 20, 30, 60]]
    assert convert(box, "xyxy", "cxcywh").tolist() == [[25, 50, 30, 60]]
    assert convert(boxes([25, 50, 30, 60]), "cxcywh", "xywh").tolist() == [[10, 20, 30, 60]]
    for source in FORMATS:
        for target in FORMATS:
            there = convert(box, source, target)
            assert torch.allclose(convert(there, target, source), box)
    assert convert(box.expand(2, 3, 1, 4), "xyxy", "xywh").shape == (2, 3, 1, 4)
    with pytest.raises(ValueError, match="unknown box format 'yxyx'"):
        convert(box, "yxyx", "xyxy")


def test_clip_cuts_at_the_borders_of_width_by_height():
    result = clip(boxes([-5, -5, 300, 300], [10, 20, 30, 40], [210, 5, 220, 9]), width=200, height=100)
    assert result.tolist() == [[0, 0, 200, 100], [10, 20, 30, 40], [200, 5, 200, 9]]
    assert area(result).tolist() == [20000, 400, 0]


def test_overlaps_by_hand():
    a = boxes([0, 0, 10, 10], [0, 0, 4, 4])
    b = boxes([5, 0, 15, 10], [0, 0, 10, 10], [20, 20, 30, 30])
    expected = torch.tensor([[50 / 150, 1, 0], [0, 16 / 100, 0]])
    assert torch.allclose(iou(a, b), expected)
    # GIoU: enclosing boxes of the first row are 150, 100 and 900 square pixels
    assert torch.allclose(giou(a, b)[0], torch.tensor([1 / 3, 1, 0 - (900 - 200) / 900]))
    assert torch.equal(giou(a, b), giou(b, a).T)


def test_boxes_without_area():
    flat = boxes([3, 3, 3, 8], [3, 3, 3, 8])
    assert iou(flat, flat).tolist() == [[0, 0], [0, 0]]
    with pytest.raises(ValueError, match="box 1 has no area"):
        giou(boxes([0, 0, 1, 1], [3, 3, 3, 8]), boxes([0, 0, 1, 1]))


def test_giou_has_a_gradient_where_boxes_do_not_touch():
    moving = boxes([0, 0, 10, 10]).requires_grad_()
    still = boxes([20, 0, 30, 10])
    giou(moving, still).sum().backward()
    assert moving.grad[0, 2] > 0  # growing to the right helps
    assert torch.isfinite(moving.grad).all()


@pytest.mark.parametrize("bad", [[10, 20, 5, 80], [0, 0, 5, float("nan")], [0, 0, float("inf"), 5]])
@pytest.mark.parametrize("function", [area, lambda b: iou(b, b), lambda b: nms(b, torch.ones(len(b)), 0.5)])
def test_boxes_in_another_format_are_refused(function, bad):
    with pytest.raises(ValueError, match="box 1 is no"):
        function(boxes([0, 0, 1, 1], bad))


def test_suppression_keeps_the_best_of_a_cluster():
    candidates = boxes([0, 0, 10, 10], [1, 0, 11, 10], [20, 20, 30, 30], [0, 0, 10, 5])
    scores = torch.tensor([0.8, 0.9, 0.1, 0.7])  # overlaps with box 1: 9/11, -, 0, 45/105
    assert nms(candidates, scores, 0.5).tolist() == [1, 3, 2]
    assert nms(candidates, scores, 0.4).tolist() == [1, 2]
    assert nms(candidates, scores, 0.9).tolist() == [1, 0, 3, 2]
    assert nms(candidates, scores, 0.5, keep=2).tolist() == [1, 3]
    with pytest.raises(ValueError, match=r"in \[0, 1\]"):
        nms(candidates, scores, 50.0)
    with pytest.raises(ValueError, match="score 2 is not finite"):
        nms(candidates, torch.tensor([0.8, 0.9, float("nan"), 0.7]), 0.5)


def test_grid_tiles_the_picture_row_by_row():
    grid = grid_boxes(60, 20, rows=2, cols=3)
    assert grid[:4].tolist() == [[0, 0, 20, 10], [20, 0, 40, 10], [40, 0, 60, 10], [0, 10, 20, 20]]
    odd = grid_boxes(335, 223, rows=7, cols=7)
    assert odd.shape == (49, 4)
    assert area(odd).sum() == pytest.approx(335 * 223, rel=1e-6)
    assert odd[:, 2:].amax(dim=0).tolist() == [335, 223]
    overlap = iou(odd, odd) - torch.eye(49)
    assert overlap.abs().max() < 1e-5
    with pytest.raises(ValueError, match="cannot be cut"):
        grid_boxes(60, 20, rows=0, cols=3)


def test_multi_scale_grid_covers_evenly_and_grows():
    ten = multi_scale_grid(80, 40, 10)
    assert ten[0].tolist() == [0, 0, 80, 40]
    assert ten[1].tolist() == [20, 10, 60, 30]  # the central half first
    assert {tuple(b) for b in ten[1:].tolist()} == {
        (x, y, x + 40, y + 20) for x in (0.0, 20.0, 40.0) for y in (0.0, 10.0, 20.0)
    }
    many = multi_scale_grid(500, 333, 36)
    assert torch.equal(many, multi_scale_grid(500, 333, 100)[:36])
    assert many.shape == (36, 4)
    assert len(many.unique(dim=0)) == 36
    assert (many >= 0).all()
    assert (many[:, 2] <= 500).all()
    assert (many[:, 3] <= 333).all()
    assert (area(many) > 0).all()
    with pytest.raises(ValueError, match="no 0 boxes"):
        multi_scale_grid(80, 40, 0)
