"""The toy of SLAN's lesson: images of two blobs, sentences of one word, and a small SLAN that reads both.

Here it is drawn, built, trained and measured. The losses that train it stand on the page.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from typing import NamedTuple

import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from finematch.boxes import convert, iou
from finematch.encoders import BertTower, small_bert
from finematch.models.configs import LocatorConfig, SLANConfig
from finematch.models.slan.locator import Located, SelfLocator
from finematch.models.slan.objective import SLAN, Caption, Picture
from finematch.models.slan.towers import CachedStages, Towers

COLOURS = {"red": (0.85, 0.15, 0.15), "green": (0.15, 0.65, 0.2), "blue": (0.2, 0.3, 0.85), "yellow": (0.9, 0.8, 0.15),
           "purple": (0.6, 0.2, 0.7), "cyan": (0.2, 0.75, 0.8)}  # fmt: skip
WORDS = ["[PAD]", "[CLS]", "[SEP]", "[MASK]", *COLOURS]
HELD_OUT = 160  # pairs: 80 images, both sentences of each


class Pairs(NamedTuple):
    """Images of two blobs, each image twice, once with either sentence: pair i and pair i + n / 2 are of one image.

    Attributes:
        images: "n 3 64 64" in [0, 1].
        maps: their mean colours in 16 x 16, 8 x 8 and 4 x 4 cells.
        boxes: "n 2 4" in [0, 1], the blob that is named first.
        colours: "n 2", their numbers.
    """

    images: Tensor
    maps: list[Tensor]
    boxes: Tensor
    colours: Tensor


class Batch(NamedTuple):
    """What the encoders made of pairs: images, sentences that are true and that name an absent colour; the boxes."""

    image: Picture
    named: Caption
    absent: Caption
    boxes: Tensor
    image_id: Tensor


def pairs(n: int, g: torch.Generator) -> Pairs:
    """n pairs of n / 2 images, whose blobs lie in different halves."""
    half = n // 2
    images, grain = torch.full((half, 3, 64, 64), 0.5), 0.03 * torch.randn(half, 3, 16, 16, generator=g)
    boxes = torch.zeros(half, 2, 4)
    colours = torch.stack([torch.randperm(len(COLOURS), generator=g)[:2] for _ in range(half)])
    paint = torch.tensor(list(COLOURS.values()))
    for i, k in itertools.product(range(half), range(2)):
        s = int(torch.randint(14, 23, (), generator=g))
        along, across = (int(torch.randint(0, room - s + 1, (), generator=g)) for room in (32, 64))
        x, y = (along + 32 * k, across) if i % 2 else (across, along + 32 * k)
        boxes[i, k] = torch.tensor([x, y, x + s, y + s]) / 64
        images[i, :, y : y + s, x : x + s] = paint[colours[i, k]][:, None, None]
    images = (images + F.interpolate(grain, scale_factor=4)).clamp(0, 1).repeat(2, 1, 1, 1)
    maps = [F.avg_pool2d((images - 0.5) / 0.25, k) for k in (4, 8, 16)]  # fine to coarse
    return Pairs(images, maps, torch.cat([boxes, boxes.flip(1)]), torch.cat([colours, colours.flip(1)]))


def held_out() -> Pairs:
    """The pairs that nothing is trained on, always the same."""
    return pairs(HELD_OUT, torch.Generator().manual_seed(99))


def sentence(colours: Tensor) -> dict[str, Tensor]:
    """ "[CLS] red [SEP]" for each colour."""
    first, last = (torch.full_like(colours, WORDS.index(word)) for word in ("[CLS]", "[SEP]"))
    input_ids = torch.stack([first, WORDS.index("red") + colours, last], 1)
    special = torch.tensor([True, False, True]).expand(input_ids.shape)
    return {"input_ids": input_ids, "mask": torch.ones_like(special), "special": special}


def images_of(model: SLAN, found: Pairs) -> Picture:
    return model.encode_image(**{str(k): one for k, one in enumerate(found.maps)})


def batch(model: SLAN, g: torch.Generator, n: int = 48) -> Batch:
    """New pairs, encoded; the absent colour is drawn anew for each."""
    found = pairs(n, g)
    free = torch.ones(n, len(COLOURS)).scatter_(1, found.colours, 0)
    absent = torch.multinomial(free, 1, generator=g)[:, 0]
    said = [model.encode_text(**sentence(colour)) for colour in (found.colours[:, 0], absent)]
    return Batch(images_of(model, found), *said, found.boxes, torch.arange(n) % (n // 2))


def build(seed: int, objective: Mapping | None = None, **options) -> SLAN:
    """The toy before training: Algorithm 1 and its losses as printed where `options` and `objective` say nothing else.

    Its encoder hands on the maps that it is given. Its proposals are ten fixed windows.
    """
    torch.manual_seed(seed)
    bert = BertTower(small_bert(len(WORDS), width=16, depth=1, heads=2))
    towers = Towers(CachedStages((3, 3, 3)), bert, 16)
    shape = {"pyramid": 16, "heads": 2, "count": 10, "threshold": 0.0, "samples": 4, "source": "encoder",
             "frozen": True, "proposals": "queries", "query_depth": 1, "query_heads": 2, "region_update": "reweight",
             "extent": "map", "steer": "fused"}  # fmt: skip
    locator = SelfLocator(towers.channels, LocatorConfig(width=16, **(shape | options)))
    terms = {"mlm_weight": 0.0, "itc_weight": 0.0, "region_word": 0.0} | dict(objective or {})
    return SLAN(towers, locator, SLANConfig(width=16, queue=0, **terms)).eval()


def unfrozen(model: SLAN, seed: int, **options) -> SLAN:
    """A copy of a toy whose proposals are trained from now on."""
    one = build(seed, frozen=False, **options)
    # `kept` is what frozen proposals read
    one.load_state_dict({key: value for key, value in model.state_dict().items() if ".kept." not in key})
    return one


def train(
    model: SLAN,
    losses: Callable[[SLAN, Batch], dict[str, Tensor]],
    weights: Mapping[str, float],
    steps: int,
    *,
    seed: int = 0,
    every: int = 0,
) -> list[dict]:
    """Steps of AdamW on the weighted losses. Returns what `measure` says before, every so many steps, and after."""
    g = torch.Generator().manual_seed(seed + 6)
    optimiser = torch.optim.AdamW([q for q in model.parameters() if q.requires_grad], lr=3e-3)
    history = [measure(model) | {"step": 0}]
    for step in range(1, steps + 1):
        terms = losses(model, batch(model, g))
        optimiser.zero_grad()
        sum(weight * terms[name] for name, weight in weights.items()).backward()
        optimiser.step()
        if step == steps or (every and step % every == 0):
            now = {name: float(value.detach()) for name, value in terms.items()}
            history.append(measure(model) | now | {"step": step})
    return history


def gradient(value: Tensor, weights: list[nn.Parameter]) -> Tensor:
    """The gradient of a value with respect to all weights as one vector; 0 where there is none."""
    got = torch.autograd.grad(value, weights, retain_graph=True, allow_unused=True)
    return torch.cat(
        [(torch.zeros_like(w) if x is None else x).flatten() for w, x in zip(weights, got, strict=True)]
    )


# ------------------------------------------------------------------------------------------- what came of it
@torch.no_grad()
def look(model: SLAN, found: Pairs) -> Located:
    """Algorithm 1 on pairs."""
    return model.locate(images_of(model, found), model.encode_text(**sentence(found.colours[:, 0])))


def best_region(at: Located) -> Tensor:
    """The region of each pair that in the end matches its sentence best."""
    return at.cosine[-1].amax(-1).argmax(1)


def distances(boxes: Tensor, blob: Tensor) -> Tensor:
    """From the centre of each region to that of a blob, "l b t"."""
    at, middle = (convert(one, "xyxy", "cxcywh")[..., :2] for one in (boxes, blob))
    return (at - middle[:, None]).norm(dim=-1)


def measure(model: SLAN) -> dict[str, Tensor]:
    """On held-out pairs, by level: the mean distance of all regions from the named blob and from the other, their side,
    the IoU of the best region with both; and how far the target of Eq. 3 is from the proposals."""
    found = held_out()
    at = look(model, found)
    best = at.boxes[:, torch.arange(HELD_OUT), best_region(at)]
    named, other = found.boxes.unbind(1)
    return {
        "named": distances(at.boxes, named).mean((1, 2)),
        "other": distances(at.boxes, other).mean((1, 2)),
        "side": (at.boxes[..., 2:] - at.boxes[..., :2]).mean((1, 2, 3)),
        "iou": torch.stack([iou(one, named).diagonal().mean() for one in best]),
        "iou other": torch.stack([iou(one, other).diagonal().mean() for one in best]),
        "off": (at.boxes[1:].mean(0) - at.boxes[0]).abs().mean(),
    }


@torch.no_grad()
def by_word(model: SLAN) -> pd.DataFrame:
    """For each word, best first: how far the regions are from what it names, by level; how often matching is right.

    Matching is right where it says yes to an image that has the colour, and no to one that has not, in equal shares.
    """
    found = held_out()
    images, colours = images_of(model, found), found.colours
    far, lines = distances(look(model, found).boxes, found.boxes[:, 0]).mean(2), {}
    for number, name in enumerate(COLOURS):
        said = model.encode_text(**sentence(torch.full((HELD_OUT,), number)))
        yes, has = model.match(images, said) > 0, (colours == number).any(1)
        right = (yes[has].float().mean() + (~yes[~has]).float().mean()) / 2
        level = far[:, colours[:, 0] == number].mean(1).tolist()
        lines[name] = {f"level {i}" if i else "proposals": value for i, value in enumerate(level)}
        lines[name]["matching right (%)"] = 100 * float(right)
    return pd.DataFrame(lines).T.sort_values(f"level {len(far) - 1}")


@torch.no_grad()
def margins(model: SLAN, margin: Callable[[SLAN, Batch], Tensor]) -> Tensor:
    """The mean margin of each word on held-out pairs."""
    found = held_out()
    said = model.encode_text(**sentence(found.colours[:, 0]))
    value = margin(model, Batch(images_of(model, found), said, said, found.boxes, torch.arange(HELD_OUT)))
    return torch.stack([value[found.colours[:, 0] == number].mean() for number in range(len(COLOURS))])
