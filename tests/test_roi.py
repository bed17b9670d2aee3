"""RoI pooling: against torchvision, against naive loops, by hand, and its gradients."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import gradcheck
from torchvision.ops import roi_align

from finematch.boxes import (
    SMALLEST,
    box_mean,
    giou,
    neighbourhood,
    neighbourhood_mean,
    roi_align_mean,
    summed_area,
)

H, W = 5, 7


def random_map(b=2, c=3, h=H, w=W, dtype=torch.float64):
    return torch.randn(b, c, h, w, dtype=dtype, generator=torch.Generator().manual_seed(0))


def random_boxes(b=2, r=40, *, beyond=0.0, seed=1, dtype=torch.float64):
    """Boxes of all sizes from half a cell; with `beyond`, centres that far outside the picture."""
    generator = torch.Generator().manual_seed(seed)
    uniform = torch.rand(b, r, 4, dtype=dtype, generator=generator)
    size = 0.1 + 0.8 * uniform[..., 2:]
    low = uniform[..., :2] * (1 - size + 2 * beyond) - beyond
    return torch.cat([low, low + size], dim=-1)


def by_table(features, boxes):
    return box_mean(summed_area(features), boxes)


POOLINGS = pytest.mark.parametrize("pool", [roi_align_mean, by_table])


# ----------------------------------------------------------------------------------------- values
@pytest.mark.parametrize(("bins", "sampling"), [(7, 2), (1, 1), (3, 2), (1, 5)])
@pytest.mark.parametrize("beyond", [0.0, 0.3, 1.5])
def test_roi_align_is_torchvisions_also_at_and_beyond_the_border(bins, sampling, beyond):
    features, boxes = random_map(dtype=torch.float32), random_boxes(beyond=beyond, dtype=torch.float32)
    features.requires_grad_()
    cells = list(boxes * torch.tensor([W, H, W, H]))
    theirs = roi_align(features, cells, bins, sampling_ratio=sampling, aligned=True).mean((2, 3))
    ours = roi_align_mean(features, boxes, bins * sampling)
    assert torch.allclose(ours.flatten(0, 1), theirs, atol=1e-5)
    if beyond != 0.3:
        assert (theirs == 0).all(1).any() == (beyond == 1.5)  # some boxes lie outside altogether
    upstream = torch.randn_like(ours)
    (got,) = torch.autograd.grad(ours, features, upstream)
    (wanted,) = torch.autograd.grad(theirs, features, upstream.flatten(0, 1))
    assert torch.allclose(got, wanted, atol=1e-4)


def bilinear(plane, x, y):
    """One plane "h w" at (x, y) in cells: kept for half a cell beyond the border, then 0."""
    h, w = plane.shape
    if not (-0.5 <= x <= w + 0.5 and -0.5 <= y <= h + 0.5):
        return 0.0
    x, y = min(max(x - 0.5, 0), w - 1), min(max(y - 0.5, 0), h - 1)
    total = 0.0
    for i, j in itertools.product(range(h), range(w)):
        total += max(0, 1 - abs(y - i)) * max(0, 1 - abs(x - j)) * float(plane[i, j])
    return total


def integral(plane, box):
    """Mean over a box in cells: it is cut at cells' centres and where the map ends; on each piece the map is
    bilinear, whose mean is that of the four corners."""
    h, w = plane.shape
    x1, y1, x2, y2 = box

    def cuts(low, high, n):
        inner = [-0.5, *(i + 0.5 for i in range(n)), n + 0.5]
        on_map = max(low, -0.5), min(high, n + 0.5)
        return [on_map[0], *(k for k in inner if on_map[0] < k < on_map[1]), on_map[1]]

    total = 0.0
    for a, b in itertools.pairwise(cuts(x1, x2, w)):
        for c, d in itertools.pairwise(cuts(y1, y2, h)):
            if b > a and d > c:
                corners = [bilinear(plane, x, y) for x in (a, b) for y in (c, d)]
                total += (b - a) * (d - c) * sum(corners) / 4
    return total / ((x2 - x1) * (y2 - y1))


@pytest.mark.parametrize("beyond", [0.0, 0.4])
def test_the_table_gives_the_exact_mean_of_the_bilinear_map(beyond):
    features, boxes = random_map(1, 2), random_boxes(1, 12, beyond=beyond)
    got = by_table(features, boxes)
    for r, box in enumerate((boxes[0] * torch.tensor([W, H, W, H])).tolist()):
        for channel in range(2):
            wanted = integral(features[0, channel], box)
            assert got[0, r, channel].item() == pytest.approx(wanted, abs=1e-12)


def test_more_samples_tend_to_the_exact_mean():
    features, boxes = random_map(), random_boxes()
    exact = by_table(features, boxes)
    errors = [(roi_align_mean(features, boxes, n) - exact).abs().max().item() for n in (4, 16, 64)]
    assert errors[0] > 8 * errors[1] > 64 * errors[2]  # of second order: 16 times smaller at best
    assert errors[2] < 1e-3


def test_by_hand():
    plane = torch.tensor([[[[0.0, 1.0], [2.0, 3.0]]]])  # centres at 1/4 and 3/4 of the picture
    whole, between, corner = [0, 0, 1, 1], [0.25, 0.25, 0.75, 0.75], [0, 0, 0.25, 0.25]
    boxes = torch.tensor([[whole, between, corner]])
    for pool in (roi_align_mean, by_table):
        assert pool(plane, boxes).flatten().tolist() == pytest.approx([1.5, 1.5, 0.0], abs=1e-6)
    # from one centre to the other the map is a ramp; from 1/4 to 1/2 of it, columns give 1/4 and rows 1/2
    box = torch.tensor([[[0.25, 0.25, 0.5, 0.5]]])
    assert by_table(plane, box).item() == pytest.approx(0.25 + 2 * 0.25)
    assert roi_align_mean(plane, box, 1).item() == pytest.approx(0.25 + 2 * 0.25)


@POOLINGS
def test_a_ramp_is_its_value_at_the_boxs_centre(pool):
    x = (torch.arange(W) + 0.5) / W
    y = (torch.arange(H) + 0.5) / H
    features = torch.stack([x.expand(H, W), y[:, None].expand(H, W)])[None].double()
    boxes = 0.1 + 0.8 * random_boxes(1, 30)  # the outer half cell, where the ramp stops, left out
    centre = (boxes[..., :2] + boxes[..., 2:]) / 2
    assert torch.allclose(pool(features, boxes), centre, atol=1e-7)


@POOLINGS
def test_any_number_of_axes_of_boxes_in_any_order(pool):
    features, boxes = random_map(), random_boxes(r=24, beyond=0.2)
    flat = pool(features, boxes)
    assert torch.equal(pool(features, boxes.unflatten(1, (2, 3, 4))), flat.unflatten(1, (2, 3, 4)))
    assert torch.allclose(pool(features, boxes.flip(1)), flat.flip(1))
    for i in range(2):
        assert torch.allclose(pool(features[i : i + 1], boxes[i : i + 1]), flat[i : i + 1])
        assert torch.allclose(pool(features, boxes[:, :1]), flat[:, :1])
    assert pool(features, boxes[:, :0]).shape == (2, 0, 3)


@POOLINGS
def test_channels_last_changes_nothing(pool):
    features, boxes = random_map(), random_boxes()
    results = []
    for layout in (torch.contiguous_format, torch.channels_last):
        leaf = features.clone(memory_format=layout).requires_grad_()
        out = pool(leaf, boxes)
        results.append((out.detach(), *torch.autograd.grad(out.square().sum(), leaf)))
    assert all(torch.allclose(a, b) for a, b in zip(*results, strict=True))
    if pool is by_table:
        assert results[0][1].is_contiguous()
        assert results[1][1].is_contiguous(memory_format=torch.channels_last)


# ----------------------------------------------------------------------------------------- gradients
@POOLINGS
@pytest.mark.parametrize("beyond", [0.0, 0.4])
def test_gradients_to_features_and_boxes_agree_with_finite_differences(pool, beyond):
    features = random_map().requires_grad_()
    boxes = random_boxes(r=4, beyond=beyond, seed=3).requires_grad_()
    if pool is roi_align_mean:  # of few samples, none within a difference's step of a cell's centre
        assert gradcheck(lambda f, b: roi_align_mean(f, b, 3), (features, boxes), eps=1e-7, atol=1e-5)
    assert gradcheck(pool, (features, boxes), eps=1e-7, atol=1e-5)


def test_gradients_are_those_of_grid_sample():
    """The mean over torch's own bilinear sampling, which keeps the outermost value without end."""
    features, boxes = random_map(), random_boxes()
    steps = (torch.arange(6, dtype=torch.float64) + 0.5) / 6
    leaves = [features.requires_grad_(), boxes.requires_grad_()]
    low, size = boxes[..., :2], boxes[..., 2:] - boxes[..., :2]
    x = low[..., :1] + steps * size[..., :1]
    y = low[..., 1:] + steps * size[..., 1:]
    grid = torch.stack(torch.broadcast_tensors(x[..., None, :], y[..., :, None]), dim=-1)  # b r 6 6 2
    at = 2 * grid.flatten(2, 3) - 1
    sampled = F.grid_sample(features, at, padding_mode="border", align_corners=False)
    wanted, got = sampled.mean(3).mT, roi_align_mean(features, boxes, 6)
    assert torch.allclose(got, wanted)
    upstream = torch.randn_like(got)
    pairs = zip(
        *(torch.autograd.grad(out, leaves, upstream, retain_graph=True) for out in (got, wanted)), strict=True
    )
    assert all(torch.allclose(a, b) for a, b in pairs)


def test_the_tables_gradient_to_boxes_is_continuous():
    """A right edge swept across cells in small steps; a piecewise constant map would give a staircase's jumps."""
    edge = torch.linspace(0.4, 0.95, 2000, dtype=torch.float64)
    boxes = torch.stack([torch.full_like(edge, 0.2), torch.full_like(edge, 0.3), edge,
                         torch.full_like(edge, 0.6)], dim=-1)[None].requires_grad_()  # fmt: skip
    (gradient,) = torch.autograd.grad(by_table(random_map(1, 1), boxes).sum(), boxes)
    along = gradient[0, :, 2]
    assert along.diff().abs().max() < 0.01 * (along.max() - along.min())


def test_a_table_read_twice_gathers_both_gradients():
    features, (one, two) = random_map().requires_grad_(), random_boxes(r=20).split(10, dim=1)
    table = summed_area(features)
    twice = box_mean(table, one).square().sum() + box_mean(table, two).sin().sum()
    apart = by_table(features, one).square().sum() + by_table(features, two).sin().sum()
    (a,), (b,) = (torch.autograd.grad(loss, features) for loss in (twice, apart))
    assert torch.allclose(a, b)


def test_a_gradient_handed_to_the_table_is_left_as_it_was():
    features = random_map().requires_grad_()
    table = summed_area(features)
    upstream = torch.randn_like(table.sums)
    kept = upstream.clone()
    (gradient,) = torch.autograd.grad(table.sums, features, upstream)
    assert torch.equal(upstream, kept)
    # a cell counts in all corners below and right of it
    wanted = [[upstream[:, i + 1 :, j + 1 :].sum((1, 2)) for j in range(W)] for i in range(H)]
    assert torch.allclose(gradient, torch.stack([torch.stack(row, -1) for row in wanted], -2))


@POOLINGS
def test_a_box_climbs_to_what_it_is_asked_for(pool):
    """A blob away from the box: by the pooled value alone the box finds it and shrinks onto it."""
    y, x = torch.meshgrid(torch.arange(16) + 0.5, torch.arange(16) + 0.5, indexing="ij")
    blob = torch.exp(-((x - 11) ** 2 + (y - 5) ** 2) / 18)[None, None]
    box = torch.tensor([[[0.2, 0.4, 0.6, 0.8]]]).requires_grad_()
    optimizer = torch.optim.Adam([box], lr=0.01)
    for _ in range(150):
        optimizer.zero_grad()
        (-pool(blob, box)).sum().backward()
        optimizer.step()
    centre = (box[0, 0, :2] + box[0, 0, 2:]).detach() / 2
    assert torch.allclose(centre, torch.tensor([11 / 16, 5 / 16]), atol=0.02)
    assert ((box[0, 0, 2:] - box[0, 0, :2]) < 0.2).all()


# ----------------------------------------------------------------------------------------- SLAN's boxes
def moved(boxes, shift, log_scale):
    """Eq. 2: centre + shift, size times p = exp(log_scale)."""
    centre, size = (boxes[..., :2] + boxes[..., 2:]) / 2, boxes[..., 2:] - boxes[..., :2]
    centre, size = centre + shift, size * log_scale.exp()
    return torch.cat([centre - size / 2, centre + size / 2], dim=-1)


@POOLINGS
def test_a_downstream_loss_reaches_boxes_and_scales(pool):
    """Where torchvision's pooling stops it: neither the proposals nor p_w and p_h would learn from anything."""
    features, proposals = random_map(1), 0.1 + 0.8 * random_boxes(1)  # half a cell at the border is constant
    wide = ((proposals[..., 2:] - proposals[..., :2]) > 1 / H).all(-1)  # on a plane, a mean ignores the size
    assert wide.sum() > 20
    proposals = proposals[wide][None]
    leaves = [proposals.requires_grad_(), torch.zeros_like(proposals[..., :2]).requires_grad_()]
    boxes = moved(proposals, torch.tensor(0.02), leaves[1])
    gradients = torch.autograd.grad(pool(features, boxes).square().sum(), leaves, retain_graph=True)
    assert all((gradient.abs() > 1e-7).all() for gradient in gradients)
    cells = boxes * torch.tensor([W, H, W, H])
    theirs = (
        roi_align(features.requires_grad_(), list(cells), 7, sampling_ratio=2, aligned=True).square().sum()
    )
    assert torch.autograd.grad(theirs, leaves, allow_unused=True) == (None, None)


@pytest.mark.parametrize("levels", [1, 3])
def test_with_its_target_not_detached_the_box_loss_asks_not_to_move(levels):
    """Eq. 3 for proposals g against the mean of their updates: detached it says nothing to the updates; else its
    only optimum is that they stay, on average over the levels."""
    proposals = random_boxes(1, 4, dtype=torch.float32)[0]
    generator = torch.Generator().manual_seed(5)
    shift, log_scale = (0.1 * torch.randn(levels, 4, 2, generator=generator) for _ in range(2))
    leaves = [shift.requires_grad_(), log_scale.requires_grad_()]

    def mean_of_updates():
        boxes, updates = proposals, []
        for level in range(levels):
            boxes = moved(boxes, shift[level], log_scale[level])
            updates.append(boxes)
        return torch.stack(updates).mean(0)

    def regression(target):
        return (proposals - target).abs().sum(-1).mean() + (1 - giou(proposals, target).diagonal()).mean()

    assert not regression(mean_of_updates().detach()).requires_grad
    optimizer = torch.optim.Adam(leaves, lr=0.01)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.01, total_iters=300)
    before = regression(mean_of_updates()).item()
    for _ in range(300):
        optimizer.zero_grad()
        regression(mean_of_updates()).backward()
        optimizer.step()
        schedule.step()
    assert before > 0.2
    assert torch.allclose(mean_of_updates(), proposals, atol=5e-3)
    if levels == 1:
        assert shift.abs().max() < 5e-3
        assert torch.allclose(log_scale.exp(), torch.ones(()), atol=0.02)  # p = 1


def test_neighbourhood_by_hand():
    boxes = torch.tensor([[[0.4, 0.3, 0.6, 0.5], [0.0, 0.0, 0.2, 1.0]]])
    cells = neighbourhood(boxes, 3, 0.3)
    assert cells.shape == (1, 2, 9, 4)
    # about (0.5, 0.4), cells of 0.1; j = 1 is up, j = 3 left: x goes with the column, y with the row
    centres = (cells[0, 0, :, :2] + cells[0, 0, :, 2:]) / 2
    wanted = [(x, y) for y in (0.3, 0.4, 0.5) for x in (0.4, 0.5, 0.6)]
    assert torch.allclose(centres, torch.tensor(wanted))
    assert torch.allclose(cells[..., 2:] - cells[..., :2], torch.tensor(0.1))
    # offsets of Eq. 2 in units of N / K: floor(j / 3) - 1 by rows, j mod 3 - 1 by columns
    j = torch.arange(9)
    offsets = (cells[0, 1, :, :2] + cells[0, 1, :, 2:]) / 2 - torch.tensor([0.1, 0.5])
    assert torch.allclose(offsets / 0.1, torch.stack([j % 3 - 1, j // 3 - 1], dim=-1).float(), atol=1e-5)


def test_neighbourhood_sizes():
    boxes = random_boxes(dtype=torch.float32)
    size = boxes[..., 2:] - boxes[..., :2]
    cells = neighbourhood(boxes, 5, size)  # the region's own size: the window is the box
    assert torch.allclose(cells[..., 0, :2], boxes[..., :2])
    assert torch.allclose(cells[..., 24, 2:], boxes[..., 2:])
    assert torch.allclose(neighbourhood(boxes, 1, size)[..., 0, :], boxes, atol=1e-6)
    wide = neighbourhood(boxes, 3, torch.tensor([0.6, 0.3]))
    assert torch.allclose(wide[..., 2:] - wide[..., :2], torch.tensor([0.2, 0.1]))
    with pytest.raises(ValueError, match="no middle"):
        neighbourhood(boxes, 4, 0.5)
    with pytest.raises(ValueError, match="no middle"):
        neighbourhood(boxes, -1, 0.5)


@POOLINGS
def test_a_neighbourhood_is_pooled_in_one_call(pool):
    features, boxes = random_map(), random_boxes(r=6)
    pooled = pool(features, neighbourhood(boxes, 3, 0.3))
    assert pooled.shape == (2, 6, 9, 3)
    for r, (j, (row, col)) in itertools.product(range(6), enumerate(itertools.product(range(3), repeat=2))):
        low = (boxes[:, r, :2] + boxes[:, r, 2:]) / 2 + torch.tensor([col - 1.5, row - 1.5]) * 0.1
        alone = torch.cat([low, low + 0.1], dim=-1)[:, None]
        assert torch.allclose(pooled[:, r, j], pool(features, alone)[:, 0])


@pytest.mark.parametrize("k", [1, 3, 5])
def test_cells_that_share_edges_pool_as_single_boxes_do(k):
    """Value and both gradients; windows that leave the picture, and a map that is no square."""
    results = []
    for pool in (neighbourhood_mean, roi_align_mean):
        features, boxes = random_map().requires_grad_(), random_boxes(r=6, beyond=0.2).requires_grad_()
        pooled = pool(features, neighbourhood(boxes, k, 0.6), 4)
        assert pooled.shape == (2, 6, k**2, 3)
        weight = torch.randn(pooled.shape, dtype=pooled.dtype, generator=torch.Generator().manual_seed(3))
        (pooled * weight).sum().backward()
        results.append((pooled.detach(), features.grad, boxes.grad))
    for mine, theirs in zip(*results, strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-12, rtol=1e-9)


def test_a_neighbourhood_that_is_no_square_is_refused():
    with pytest.raises(ValueError, match="a square number"):
        neighbourhood_mean(random_map(), random_boxes(r=6)[:, :, None].expand(-1, -1, 8, -1))


def test_cells_of_a_box_average_to_the_box():
    features, boxes = random_map(), random_boxes(beyond=0.3)
    cells = neighbourhood(boxes, 3, boxes[..., 2:] - boxes[..., :2])
    wide = ((boxes[..., 2:] - boxes[..., :2]) * torch.tensor([W, H]) / 3 > SMALLEST).all(-1)
    assert wide.sum() > 50
    means = box_mean(summed_area(features), cells).mean(2)
    assert torch.allclose(means[wide], by_table(features, boxes)[wide])


# ----------------------------------------------------------------------------------------- odd boxes and maps
ODD = {
    "a point": [0.4, 0.3, 0.4, 0.3],
    "a line": [0.2, 0.5, 0.7, 0.5],
    "turned round": [0.6, 0.7, 0.3, 0.2],
    "at the corner": [1.0, 1.0, 1.0, 1.0],
    "far outside": [7.0, -9.0, 8.0, -8.0],
    "huge": [-1e6, -1e6, 1e6, 1e6],
}


@POOLINGS
@pytest.mark.parametrize("box", ODD.values(), ids=ODD)
def test_odd_boxes_have_finite_values_and_gradients(pool, box):
    features = random_map(1, 2, dtype=torch.float32).requires_grad_()
    boxes = torch.tensor([[box]]).requires_grad_()
    pooled = pool(features, boxes)
    pooled.square().sum().backward()
    assert all(torch.isfinite(t).all() for t in (pooled, features.grad, boxes.grad))


def test_a_box_without_area_is_read_at_its_centre():
    features = random_map(1, 2)
    point, line, turned = (
        torch.tensor([[ODD[name]]], dtype=torch.float64) for name in ("a point", "a line", "turned round")
    )
    for box, x, y in ((point, 0.4, 0.3), (turned, 0.45, 0.45)):
        wanted = [bilinear(plane, x * W, y * H) for plane in features[0]]
        assert roi_align_mean(features, box)[0, 0].tolist() == pytest.approx(wanted)
        # the table widens it to SMALLEST cells
        cell = [x - SMALLEST / 2 / W, y - SMALLEST / 2 / H, x + SMALLEST / 2 / W, y + SMALLEST / 2 / H]
        small = by_table(features, torch.tensor([[cell]], dtype=torch.float64))
        assert torch.allclose(by_table(features, box), small)
    tall = line + torch.tensor([0, -SMALLEST / 2 / H, 0, SMALLEST / 2 / H]).double()
    assert torch.allclose(by_table(features, line), by_table(features, tall))
    # its centre gets a gradient, its size none
    point.requires_grad_()
    (gradient,) = torch.autograd.grad(by_table(features, point).sum(), point)
    assert gradient.abs().min() > 0
    assert torch.allclose(gradient[..., :2], gradient[..., 2:])


@POOLINGS
def test_outside_there_is_nothing(pool):
    features = random_map(1, 2)
    outside = torch.tensor([ODD["far outside"]], dtype=torch.float64)[None].requires_grad_()
    pooled = pool(features, outside)
    assert (pooled == 0).all()
    assert (torch.autograd.grad(pooled.sum(), outside)[0] == 0).all()
    # half of it on the map, which reaches half a cell beyond its picture; columns are constant, so that 28 x 28
    # samples of the one are 14 x 14 of the other
    columns = features[:, :, :1].expand_as(features)
    lows = (-0.4 - 0.5 / W, -0.5 / W)
    half, inner = (torch.tensor([[[low, 0.2, 0.4 - 0.5 / W, 0.8]]], dtype=torch.float64) for low in lows)
    more = (28,) if pool is roi_align_mean else ()
    assert torch.allclose(pool(columns, half, *more), pool(columns, inner) / 2)


@POOLINGS
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_box_that_is_not_finite_stays_its_own_trouble(pool, bad):
    features, boxes = random_map(), random_boxes(r=3)
    good = pool(features, boxes)
    boxes[1, 2, 0] = bad
    pooled = pool(features, boxes)
    assert pooled[1, 2].isnan().all()  # seen, not read from some other place
    pooled[1, 2] = good[1, 2]
    assert torch.allclose(pooled, good)


def test_small_maps_and_bad_arguments():
    boxes = random_boxes(1, 5)
    constant = random_map(1, 3, 1, 1)
    assert torch.allclose(roi_align_mean(constant, boxes), constant[:, :, 0, 0].expand(5, 3)[None])
    strip = random_map(1, 3, 1, 6)
    cells = list(boxes * torch.tensor([6, 1, 6, 1]))
    theirs = roi_align(strip, cells, 7, sampling_ratio=2, aligned=True).mean((2, 3))
    assert torch.allclose(roi_align_mean(strip, boxes)[0], theirs)
    with pytest.raises(ValueError, match="1 x 6 cells is too small"):
        summed_area(strip)
    tiny = random_map(1, 1, 2, 2)
    for r, box in enumerate((2 * boxes[0]).tolist()):
        assert by_table(tiny, boxes)[0, r, 0].item() == pytest.approx(integral(tiny[0, 0], box))
    with pytest.raises(ValueError, match="0 samples"):
        roi_align_mean(tiny, boxes, 0)


# ----------------------------------------------------------------------------------------- precision
def test_a_table_of_a_map_with_an_offset_keeps_its_digits():
    features = 100 + random_map(1, 4, 56, 56)
    centre = (
        torch.rand(1, 200, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(2)) * 0.9 + 0.05
    )
    half = 0.5 / 56  # boxes of one cell
    boxes = torch.cat([centre - half, centre + half], dim=-1)
    exact = by_table(features, boxes)
    error = (by_table(features.float(), boxes.float()) - exact).abs().max()
    assert error < 2e-4  # features themselves are rounded to 4e-6, boxes to 6e-8 of the picture
    # sums with the offset left in reach 300,000, where floats lie 0.03 apart
    table = summed_area(features.float())
    plain = F.pad(features.float().cumsum(2).cumsum(3), (1, 0, 1, 0)).permute(0, 2, 3, 1)
    naive = box_mean(table._replace(sums=plain.contiguous(), mean=torch.zeros(1, 4)), boxes.float())
    assert (naive - exact).abs().max() > 50 * error


def test_half_precision():
    features, boxes = random_map(dtype=torch.float32), random_boxes(dtype=torch.float32)
    rounded = features.bfloat16()
    table = summed_area(rounded)
    assert table.sums.dtype == torch.float32
    assert torch.allclose(box_mean(table, boxes), by_table(rounded.float(), boxes))
    assert roi_align_mean(rounded, boxes).dtype == torch.bfloat16
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.allclose(by_table(features, boxes), box_mean(summed_area(features), boxes), atol=1e-6)
        aligned = roi_align_mean(features, boxes)
    assert torch.allclose(aligned.float(), roi_align_mean(features, boxes), atol=0.03)
    leaf = rounded.requires_grad_()
    by_table(leaf, boxes).sum().backward()
    assert leaf.grad.dtype == torch.bfloat16
