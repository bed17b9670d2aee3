"""Counted costs against hand counts, torchvision's printed table, and what the counter must refuse."""

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import nn
from torch.utils.flop_counter import flop_registry

from finematch.boxes import box_mean, roi_align_mean, summed_area
from finematch.evaluation.cost import HARMLESS, UNSEEN, cost, parameters
from finematch.models.configs import LocatorConfig
from finematch.models.slan.locator import SelfLocator


def test_linear():
    found = cost(nn.Linear(5, 7), torch.randn(2, 3, 5))
    assert found["parameters"] == 5 * 7 + 7
    assert found["multiply_adds"] == 2 * 3 * 5 * 7  # rows, in, out; the bias is an addition and not counted
    assert found["flops"] == 2 * found["multiply_adds"]
    assert found["by_operator"] == {"aten.addmm": found["flops"]}


@pytest.mark.parametrize(("groups", "stride", "cells"), [(1, 1, 8 * 6), (2, 2, 4 * 3)])
def test_convolution(groups, stride, cells):
    layer = nn.Conv2d(4, 10, 3, stride, 1, groups=groups, bias=False)
    found = cost(layer, torch.randn(2, 4, 8, 6))
    assert found["parameters"] == 10 * (4 // groups) * 9
    assert found["multiply_adds"] == 2 * cells * 10 * (4 // groups) * 9  # pictures, cells, out, in, window


def test_transposed_convolution_counts_the_cells_it_reads():
    found = cost(nn.ConvTranspose2d(4, 6, 2, 2), torch.randn(1, 4, 5, 3))
    assert found["multiply_adds"] == 5 * 3 * 4 * 6 * 4


def attention_by_hand(b, asked, answering, d):
    """Four projections, two products of every token with every other."""
    return b * (2 * asked * d * d + 2 * answering * d * d + 2 * asked * answering * d)


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("training", [True, False])
def test_attention_is_its_products_whatever_kernel_there_is(grad, training):
    b, n, m, d = 2, 3, 5, 8
    module = nn.MultiheadAttention(d, 4, batch_first=True).train(training)
    x, memory = torch.randn(b, n, d), torch.randn(b, m, d)
    mask = torch.zeros(b, m, dtype=torch.bool)
    with torch.set_grad_enabled(grad):
        found = cost(module, x, memory, memory, key_padding_mask=mask, need_weights=False)
        fused = cost(lambda q: F.scaled_dot_product_attention(q, q, q), torch.randn(b, 4, n, 2), modules=())
    assert found["multiply_adds"] == attention_by_hand(b, n, m, d)
    assert found["parameters"] == 4 * d * d + 4 * d
    assert fused["multiply_adds"] == 2 * b * 4 * n * n * 2


@pytest.mark.parametrize("grad", [True, False])
def test_a_transformer_layer_takes_no_uncounted_short_cut(grad):
    layer = nn.TransformerEncoderLayer(8, 2, 32, batch_first=True).eval().requires_grad_(False)
    before = torch.backends.mha.get_fastpath_enabled()
    with torch.set_grad_enabled(grad):
        found = cost(layer, torch.randn(2, 5, 8))
    assert found["multiply_adds"] == attention_by_hand(2, 5, 5, 8) + 2 * 2 * 5 * 8 * 32
    assert torch.backends.mha.get_fastpath_enabled() == before


def test_backward_is_counted_where_the_call_makes_one():
    """Of two layers the second costs three times its forward pass, the first twice: its input needs no gradient."""
    first, second = nn.Linear(4, 6, bias=False), nn.Linear(6, 5, bias=False)
    x = torch.randn(7, 4)
    found = cost(lambda: second(first(x)).sum().backward(), modules=(first, second))
    assert found["multiply_adds"] == 7 * (2 * 4 * 6 + 3 * 6 * 5)
    assert found["parameters"] == 4 * 6 + 6 * 5


def test_roi_pooling_is_one_product():
    b, c, h, w, r = 2, 3, 6, 5, 4
    boxes = torch.tensor([0.1, 0.2, 0.6, 0.9]).expand(b, r, 4)
    found = cost(roi_align_mean, torch.randn(b, c, h, w), boxes, modules=())
    assert found["multiply_adds"] == b * r * h * w * c


def test_gru_is_taken_apart():
    found = cost(nn.GRU(5, 4, batch_first=True), torch.randn(2, 3, 5))
    assert found["multiply_adds"] == 2 * 3 * 3 * 4 * (5 + 4)  # rows, steps, gates, out, in


@pytest.mark.parametrize("name", ["resnet50", "vit_b_16", "mobilenet_v2"])
def test_published_counts_on_the_meta_device(name):
    """torchvision prints parameters, and GFLOPS that are multiply-adds."""
    printed = torchvision.models.get_model_weights(name).IMAGENET1K_V1.meta
    with torch.device("meta"):
        found = cost(torchvision.models.get_model(name).eval(), torch.zeros(1, 3, 224, 224))
    assert found["parameters"] == printed["num_params"]
    assert found["multiply_adds"] / 1e9 == pytest.approx(printed["_ops"], rel=2e-3)


def test_meta_and_cpu_agree_and_weights_do_not_count():
    def model():
        return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 4))

    here = cost(model(), torch.randn(2, 3, 8, 8))
    with torch.device("meta"):
        there = cost(model(), torch.zeros(2, 3, 8, 8))
    assert here == there


def test_views_of_parameters_without_gradients():
    """torch's counter fails on such a view as a module's input; the queries of a locator are one."""

    class Queries(nn.Module):
        def __init__(self):
            super().__init__()
            self.queries, self.layer = nn.Parameter(torch.randn(3, 4)), nn.Linear(4, 5)

        def forward(self, x):
            return self.layer(self.queries.expand(len(x), -1, -1))

    with torch.no_grad():
        assert cost(Queries(), torch.randn(2, 1))["multiply_adds"] == 2 * 3 * 4 * 5


def test_shared_parameters_count_once():
    one, two = nn.Embedding(7, 3), nn.Linear(3, 7)
    two.weight = one.weight
    assert parameters(one, two) == 7 * 3 + 7
    assert parameters(two, two) == 7 * 3 + 7
    assert parameters(nn.BatchNorm1d(4)) == 8  # not its running statistics


def test_parts_of_a_locator_add_up():
    torch.manual_seed(0)
    locator = SelfLocator(
        (8, 8, 8), LocatorConfig(width=16, pyramid=8, heads=2, count=20, samples=2, anchor=2.0)
    )
    maps = [torch.randn(2, 8, n, n) for n in (8, 4, 2)]
    words, mask = torch.randn(2, 5, 16), torch.ones(2, 5, dtype=torch.bool)
    whole = cost(locator, maps, words, mask)
    once = cost(locator.prepare, maps, modules=(locator,))
    each = cost(locator.locate, locator.prepare(maps), words, mask, modules=(locator,))
    assert whole["flops"] == once["flops"] + each["flops"] > 0
    assert whole["parameters"] == once["parameters"] == parameters(locator)


REFUSED = {
    "aten::grid_sampler_2d": lambda: F.grid_sample(
        torch.randn(1, 2, 4, 4), torch.zeros(1, 3, 3, 2), align_corners=False
    ),
    "torchvision::roi_align": lambda: torchvision.ops.roi_align(
        torch.randn(1, 2, 4, 4), [torch.tensor([[0.0, 0, 2, 2]])], 2
    ),
    "aten::_embedding_bag": lambda: box_mean(
        summed_area(torch.randn(1, 2, 4, 4).requires_grad_()), torch.tensor([[[0.1, 0.1, 0.6, 0.6]]])
    ),
    "aten::mv": lambda: torch.randn(3, 4) @ torch.randn(4),
    "aten::dot": lambda: torch.randn(4) @ torch.randn(4),
    "aten::_cdist_forward": lambda: torch.cdist(torch.randn(3, 4), torch.randn(5, 4), p=1.0),
    "aten::_trilinear": lambda: nn.Bilinear(2, 3, 4)(torch.randn(5, 2), torch.randn(5, 3)),
}


@pytest.mark.parametrize("operator", REFUSED)
def test_what_the_counter_does_not_see_is_refused(operator):
    with pytest.raises(ValueError, match=rf"{operator}\w* does work that torch's flop counter does not see"):
        cost(REFUSED[operator], modules=())


def test_comparisons_and_an_optimiser_are_let_through():
    boxes = torch.tensor([[0.0, 0, 2, 2], [0, 0, 1, 1]])
    assert cost(torchvision.ops.nms, boxes, torch.ones(2), 0.5, modules=())["flops"] == 0
    layer = nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(layer.parameters())

    def step():
        layer(torch.randn(4, 3)).sum().backward()
        optimizer.step()

    assert cost(step, modules=(layer,))["multiply_adds"] == 4 * 2 * 3 * 2


def test_a_function_must_say_whose_parameters_count():
    with pytest.raises(ValueError, match=r"relu is no module: name those whose parameters count"):
        cost(F.relu, torch.randn(3))
    assert cost(F.relu, torch.randn(3), modules=())["parameters"] == 0


def test_lists_name_what_there_is():
    """A misspelt operator would refuse nothing; one that the counter knows would be refused for no reason."""
    known = {str(k) for k in flop_registry}
    assert not [name for name in UNSEEN if not hasattr(torch.ops.aten, name)]
    assert not [name for name in UNSEEN if f"aten.{name}" in known]
    assert all(hasattr(getattr(torch.ops, n.split("::")[0]), n.split("::")[1]) for n in HARMLESS)
