"""Each switch of each model changes what the model computes: none is declared, shown on the page and then ignored.

A tiny model is built from the page's settings, its weights are drawn by their names, so that a layer more leaves the
others theirs, and three steps are taken. Another value of a setting must give other numbers.
"""

import zlib

import pytest
import test_hslm
import test_slan
import torch
from test_numerics import SMALL, made
from test_settings import CONFIGS, other_value

from finematch.config import Settings, declared
from finematch.models.slan.adaptor import RegionFilter, best_word, regression_loss, regression_target
from finematch.models.slan.locator import ends

# a setting that has an effect only under others
UNDER = {
    ("mvam", "view_dim"): {"projection": "shared"},
    ("hslm", "cross_attn"): {"loc": False},
    ("hslm", "gate_pool"): {"cross": "gate"},
    ("hslm", "start_scale"): {"start": "contrastive"},
    ("felga", "literal_scale"): {"loss": "batch"},
    ("felga", "hinge"): {"lambda1": -5.0, "lambda2": -5.0},
    ("felga", "empty"): {"labels": "sparse"},
    ("slan", "query_depth"): {"proposals": "queries"},
    ("slan", "query_heads"): {"proposals": "queries"},
    ("slan", "scaling"): {"proposals": "queries"},
    ("slan", "threshold"): {"score_norm": "minmax", "threshold": 0.1},
    ("slan", "contrast"): {"queue": 0},
    ("slan", "outside"): {"extent": "map"},
}
# values that fit the tiny model
VALUES = {
    ("mvam", "views"): [8], ("mvam", "total_dim"): [32],
    ("slan", "width"): [32], ("slan", "levels"): [2], ("slan", "count"): [3], ("slan", "threshold"): [0.9],
    ("slan", "heads"): [4], ("slan", "query_heads"): [4], ("slan", "k"): [5], ("slan", "ratios"): ["1.0, 1.0, 1.0"],
    ("slan", "queue"): [0, 6],
}  # fmt: skip
# settings that no step of training sees, and the test that holds them
ELSEWHERE = {
    ("slan", "scales"): "of an encoder with a single map: test_slan.py",
    ("slan", "match_score"): "ranks only: test_slan_objective.py",
}
SWITCHES = dict.fromkeys((m, n) for m, known in CONFIGS.items() for c in known for n in c.declared())


def redraw(model):
    """Weights that depend on their names alone; scalars, the temperatures, stay what the settings made them."""
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim and (weight.numel() > 1 or name.endswith("bias")):
                g = torch.Generator().manual_seed(zlib.crc32(name.encode()))
                weight.copy_(0.3 * torch.randn(weight.shape, generator=g))


def computed(method, **chosen):
    """Terms of the loss in three steps, and the shapes of the weights."""
    s = Settings(method, {**SMALL[method], **chosen})
    torch.manual_seed(0)
    model, batch = made(method, s, torch.Generator().manual_seed(1))
    redraw(model)
    optimiser, found = torch.optim.SGD(model.train().parameters(), lr=0.01), {}
    for step in range(3):
        torch.manual_seed(2 + step)
        now = model(batch)
        optimiser.zero_grad()
        now["loss"].backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        found |= {f"{name} {step}": round(float(value.detach()), 6) for name, value in now.items()}
    return found


@pytest.mark.parametrize(("method", "name"), [switch for switch in SWITCHES if switch not in ELSEWHERE])
def test_a_switch_changes_what_the_model_computes(method, name):
    given = {**SMALL[method], **UNDER.get((method, name), {})}
    one = declared(method)[name]
    was = getattr(Settings(method, given), name)
    base = computed(method, **given)
    values = VALUES.get((method, name)) or [v for v in one.choices if v != was] or [other_value(one, was)]
    for value in values:
        assert computed(method, **{**given, name: value}) != base, f"{name} = {value!r} is {was!r}"


# ------------------------------------------------------------------------------------------- what a switch leaves alone
def test_a_graph_norm_of_the_batch_is_of_regions_alone():
    """Words of one caption are no sample: their graph has no norm then."""
    model = test_hslm.tiny(graph_norm="batch")
    norms = [[type(layer.norm).__name__ for layer in part.graph] for part in (model.image, model.text)]
    assert norms == [["BatchNorm1d"] * 2, ["Identity"] * 2]


@pytest.mark.parametrize("include_special", [False, True])
def test_a_weighted_target_counts_words_as_the_moves_do(include_special):
    """[CLS] and [SEP] match no region where they are no words (S9), in Eq. 3 as little as in Eq. 2."""
    model = test_slan.tiny(target="weighted", include_special=include_special)
    maps, words, mask = test_slan.inputs(lengths=(3, 4, 3))  # so few that no word may match
    located = model(maps, words, mask)
    counted = mask if include_special else mask & ~ends(mask)
    losses = []
    for which in (counted, mask):
        matches = torch.stack([best_word(level, which) for level in located.cosine[1:]])
        target = regression_target(located.boxes[1:], matches, model.config.cell_tau)
        losses.append(regression_loss(located.boxes[0], target, located.valid))
    torch.testing.assert_close(located.reg_loss, losses[0])
    assert torch.equal(*losses) == include_special


def test_a_score_of_exactly_h_is_not_above_it():
    """3.2.2: "saliency scores above a threshold h"."""
    logits = torch.tensor([[3.0, 2.0, 1.0, -1.0]])  # minmax: 1, 3/4, 1/2, 0
    every = torch.ones(1, 4, dtype=torch.bool)
    for threshold, kept in ((0.5, 2), (0.49, 3), (0.75, 1)):
        part = RegionFilter(8, top=4, threshold=threshold, score_norm="minmax")
        assert int(part(logits, every)[2].sum()) == kept
