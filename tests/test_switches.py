"""Each switch of each model changes what the model computes: none is declared, shown on the page and then ignored.

A tiny model is built from the page's settings, its weights are drawn by their names, so that a layer more leaves the
others theirs, and three steps are taken. Another value of a setting must give other numbers.
"""

import zlib

import pytest
import torch
from test_numerics import SMALL, made
from test_settings import CONFIGS, other_value

from finematch.config import Settings, declared

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
