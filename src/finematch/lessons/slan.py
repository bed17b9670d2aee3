"""SLAN's lesson: an example out of the data, small models, and what its page draws.

A function that draws leaves its figure open and returns nothing, so that a page shows it once.
"""

from __future__ import annotations

import itertools
import textwrap
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle
from PIL import Image
from torch import Tensor, nn

from finematch import figures
from finematch.boxes import convert, iou, neighbourhood, roi_align_mean
from finematch.config import root
from finematch.data import load
from finematch.data.splits import SMOKE
from finematch.encoders import BertTower, small_bert
from finematch.features.proposals import propose
from finematch.figures.diagram import diagram
from finematch.lessons import slan_toy
from finematch.models.configs import LocatorConfig, SLANConfig
from finematch.models.slan.adaptor import RegionAdaptor, RegionEmbedding, stop
from finematch.models.slan.locator import SelfLocator
from finematch.models.slan.matching import Words
from finematch.models.slan.objective import SLAN
from finematch.models.slan.towers import SmallStages, Towers
from finematch.scenes.generator import TOKENIZER, attributes, generate
from finematch.text import tokenise, word_level

WIDTH, LEVELS = 32, 3  # D and L of the small model
PRINTED = {"extent": "map", "steer": "fused"}  # what the paper prints where our default is another
OUTLINE = {"fill": False, "edgecolor": figures.FAINT, "linewidth": 0.8}


# ------------------------------------------------------------------------------------------- data and models
class Scenes(NamedTuple):
    """The first images of the embedded set's val split, what is true of them, and the tokenizer of their captions."""

    records: list
    truths: list
    tokenizer: object

    def pixels(self, n: int) -> Tensor:
        """Image n, "3 h w" in [0, 1]."""
        return torch.from_numpy(np.asarray(self.records[n].open(), np.float32) / 255).permute(2, 0, 1)

    def text(self, captions: Sequence[str]) -> dict[str, Tensor]:
        """`input_ids`, `mask` and `special` of captions."""
        return tokenise(list(captions), self.tokenizer).batch(range(len(captions)))

    def batch(self, n: int, caption: int = 0) -> dict:
        """n pairs: images 0 to n - 2 with a caption each, and once more image 0, with its next caption."""
        rows = [*range(n - 1), 0]
        said = [self.records[i].captions[caption + (k == n - 1)] for k, i in enumerate(rows)]
        pixels = torch.stack([self.pixels(i) for i in rows])
        return {"image": {"pixels": pixels}, "text": self.text(said), "image_id": torch.tensor(rows)}


def scenes(data_root: str, cache: str, *, smoke: bool) -> Scenes:
    """The embedded set, drawn now if it is not there; with `smoke` a small one of its own in `cache`."""
    folder = root() / (f"{cache}/smoke" if smoke else data_root)
    if smoke:
        generate(folder / "scenes", **SMOKE)
    records = load("scenes", folder, "val")[:200]
    return Scenes(records, attributes(folder / "scenes", "val")[:200], word_level(TOKENIZER))


class Example(NamedTuple):
    """An image with two captions that name different things, and the boxes of what each names."""

    number: int
    image: Image.Image
    captions: list[str]
    boxes: list[Tensor]


def example(of: Scenes) -> Example:
    """The first image with at least three things, two of whose captions name one or two things each, none in common."""
    for number, truth in enumerate(of.truths):
        named = [
            {thing for mention in one["mentions"] for thing in mention["objects"]}
            for one in truth["captions"]
        ]
        for a, b in itertools.combinations(range(len(named)), 2):
            few = all(0 < len(named[k]) <= 2 for k in (a, b))
            if len(truth["objects"]) >= 3 and few and not named[a] & named[b]:
                boxes = [torch.tensor([truth["objects"][k]["box"] for k in sorted(named[c])]) for c in (a, b)]
                record = of.records[number]
                return Example(number, record.open(), [record.captions[k] for k in (a, b)], boxes)
    raise ValueError(
        f"none of {len(of.truths)} images has two captions that name different things: load more images"
    )


def proposals(image: Image.Image, n: int) -> tuple[str, Tensor]:
    """The name of a proposal method that reads no text, and up to n of its boxes."""
    method, search = propose("auto")
    return method, torch.as_tensor(search(image, n)).float()


def small(
    seed: int, locator: Mapping | None = None, objective: Mapping | None = None, *, random_steps: int = 0
) -> SLAN:
    """A small SLAN for the embedded set; one seed, one start.

    The saliency and the scales would be alike for all regions at their own start, so they are given other weights.
    """
    torch.manual_seed(seed)
    tokenizer = word_level(TOKENIZER)
    bert = BertTower(small_bert(len(tokenizer), width=WIDTH, depth=1, heads=2))
    towers = Towers(SmallStages((8, 16, 24)), bert, WIDTH)
    shape = {"levels": LEVELS, "pyramid": 16, "heads": 4, "count": 30, "anchor": 1.5, "top": 8, "samples": 4,
             "query_depth": 1, "query_heads": 2, **PRINTED} | dict(locator or {})  # fmt: skip
    terms = {"embed": 12, "queue": 12, "region_word": 0.0} | dict(objective or {})
    part = SelfLocator(towers.channels, LocatorConfig(width=WIDTH, **shape))
    model = SLAN(
        towers, part, SLANConfig(width=WIDTH, **terms), words=Words.of(tokenizer), random_steps=random_steps
    )
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith("theta"):
                weight.copy_(0.2 * torch.randn(weight.shape, generator=g))
            elif "cls_logits.weight" in name or "saliency.weight" in name:
                weight.copy_(3 * torch.randn(weight.shape, generator=g))
            elif "cls_logits.bias" in name:
                weight.fill_(-6.0)  # the best of many anchors is not yet sure
    return model.eval()


def slopes(loss: Tensor, of: nn.Module) -> dict[str, float]:
    """The largest gradient of each parameter, by name; 0 where there is none."""
    of.zero_grad()
    loss.backward()
    return {name: 0.0 if q.grad is None else float(q.grad.abs().max()) for name, q in of.named_parameters()}


def millions(of: nn.Module) -> float:
    """Parameters in millions."""
    return sum(q.numel() for q in of.parameters()) / 1e6


def bump() -> Tensor:
    """A map "1 1 32 32" with one round bump."""
    y, x = torch.meshgrid(*[(torch.arange(32) + 0.5) / 32] * 2, indexing="ij")
    return torch.exp(-((x - 0.62) ** 2 + (y - 0.4) ** 2) / (2 * 0.08**2))[None, None]


# ------------------------------------------------------------------------------------------- one thing in an image
THING = torch.tensor([0.68, 0.28])  # its centre
_AT = (torch.arange(64) + 0.5) / 64
IS_THING = ((_AT[None, :] - THING[0]).abs() < 0.1) & ((_AT[:, None] - THING[1]).abs() < 0.1)
# F_1 to F_3: how much of a cell is the thing, how much the ground
PLANES = [F.avg_pool2d(torch.stack([IS_THING, ~IS_THING]).float()[None], k) for k in (8, 4, 2)]
SAID, A_WORD = (
    torch.tensor([[[0.0, 1], [1, 0], [0, 1]]]),
    torch.tensor([[False, True, False]]),
)  # [CLS], thing, [SEP]


def starts() -> Tensor:
    """25 boxes of side 0.16, "25 4"."""
    ticks = torch.linspace(0.15, 0.85, 5)
    centres = torch.stack(torch.meshgrid(ticks, ticks, indexing="xy"), -1).reshape(-1, 2)
    return torch.cat([centres - 0.08, centres + 0.08], -1)


def searcher(ratio: float | int, **reading: str) -> RegionAdaptor:
    """A level of the library whose embedding of a box is the mean of the map."""
    embed = RegionEmbedding(2, 2, norm="none", samples=8)
    config = LocatorConfig(width=2, heads=1, **(PRINTED | reading))
    one = RegionAdaptor(embed, config, ratio=float(ratio), slots=1).requires_grad_(False)
    embed.project.weight.copy_(torch.eye(2))
    embed.project.bias.zero_()
    return one


def walk(boxes: Tensor, **reading: str) -> Tensor:
    """Centres "l r 2" of boxes "r 4" before the first level and after each: Eq. 2 alone, p_w = p_h = 1."""
    boxes, way = boxes[None], []
    for ratio, plane in zip((1, 0.5, 0.25), PLANES, strict=True):
        x, y, w, h = convert(boxes, "xyxy", "cxcywh").unbind(-1)
        way.append(torch.stack([x, y], -1)[0])
        _, moved = searcher(ratio, **reading).search(plane, boxes, SAID, A_WORD)
        boxes = stop(torch.stack([x + moved[..., 0], y + moved[..., 1], w, h], -1))
    return torch.stack([*way, convert(boxes, "xyxy", "cxcywh")[0, :, :2]])


# ------------------------------------------------------------------------------------------- the first sections
def _wrapped(sentence: str, width: int = 26) -> str:
    return textwrap.fill(f"“{sentence}”", width)


def draw_problem(of: Example, proposals) -> None:
    """Left: the proposals, the same for every sentence. Then for each of two sentences the boxes of what it names."""
    _, axes = plt.subplots(1, 3, figsize=(7.2, 3.0), layout="constrained")
    figures.show_boxes(axes[0], of.image, proposals, np.linspace(1, 0.05, len(proposals)))
    axes[0].set_title(f"{len(proposals)} proposals, whatever is said", pad=8, fontsize=8)
    for ax, boxes, caption in zip(axes[1:], of.boxes, of.captions, strict=True):
        figures.show_boxes(ax, of.image, boxes)
        ax.set_title(_wrapped(caption), pad=8, fontsize=8)


def draw_model(size: Mapping[str, str]) -> None:
    """The model: left the image, right the sentence, in the middle the self-locator where they meet.

    Args:
        size: what `shapes` recorded; every label comes from it.
    """
    towers = "encoders.towers"
    parts = {
        "image": (0, 0, "data"), "sentence": (3, 0, "data"), "image encoder\n(3.1)": (0, 1, "trained"),
        "BERT\n(3.1)": (3, 1, "trained"), "region\nproposals (3.2)": (1, 0, "trained"),
        "vision decoder\n(3.2.1)": (1, 1, "trained"), "region filter\n(3.2.2)": (2, 0, "step"),
        "region adaptor 1\n(3.2.3)": (2, 1, "trained"), "region adaptor 2": (2, 2, "trained"),
        "region adaptor 3": (2, 3, "trained"), "matching head\n(Eq. 4)": (2, 4, "trained"),
        "mean of V,\nprojected: $T_v$": (0, 3, "trained"), "[CLS],\nprojected: $T_t$": (3, 3, "trained"),
        "contrast\n(Eq. 5, 6)": (2, 5, "step"),
    }  # fmt: skip
    encoder, bert, decoder = "image encoder\n(3.1)", "BERT\n(3.1)", "vision decoder\n(3.2.1)"
    adaptors = ["region adaptor 1\n(3.2.3)", "region adaptor 2", "region adaptor 3"]
    boxes, words = "locator.adaptors.{}.0", "locator.adaptors.{}.2"
    arrows = [
        ("image", encoder, size["pixels"]), ("sentence", bert, size["input_ids"]),
        (encoder, decoder, size[f"{towers}.image_encoder.2"]),
        (decoder, "region\nproposals (3.2)", size["locator.decoder.0"]),
        ("region\nproposals (3.2)", "region filter\n(3.2.2)", size["locator.proposals.boxes"]),
        ("region filter\n(3.2.2)", adaptors[0], size["image.prepared.boxes"]),
        (bert, adaptors[0], size["text.words"]),
        *((decoder, one, size[f"locator.decoder.{i}"]) for i, one in enumerate(adaptors)),
        *((a, b, f"{size[boxes.format(i)]}, {size[words.format(i)]}")
          for i, (a, b) in enumerate(itertools.pairwise(adaptors))),
        (adaptors[2], "matching head\n(Eq. 4)", f"{size['located.picture']}, {size['located.text']}"),
        (encoder, "mean of V,\nprojected: $T_v$", size[f"{towers}.image_encoder.2"]),
        (bert, "[CLS],\nprojected: $T_t$", size[f"{towers}.project_text"]),
        ("mean of V,\nprojected: $T_v$", "contrast\n(Eq. 5, 6)", size["image.vector"]),
        ("[CLS],\nprojected: $T_t$", "contrast\n(Eq. 5, 6)", size["text.vector"]),
    ]  # fmt: skip
    diagram(parts, arrows, cell=(2.15, 0.86), box=(1.15, 0.46))


def draw_filter(scores: Mapping[str, Tensor], threshold: float) -> None:
    """The saliency of four regions under each normalisation: a sure image and an unsure one. Above the line stays."""
    figure, axes = plt.subplots(1, len(scores), figsize=(7.2, 2.5), layout="constrained", sharey=True)
    for ax, (name, of) in zip(axes, scores.items(), strict=True):
        regions = [str(i + 1) for i in range(of.shape[1])]
        figures.bars(ax, regions, {"a sure image": of[0].tolist(), "an unsure one": of[1].tolist()})
        ax.axhline(threshold, color=figures.INK, linestyle="--", linewidth=1, marker="")
        ax.set(title=f'score_norm="{name}"', xlabel="region", ylim=(0, 1.05))
        ax.get_legend().remove()
    axes[0].set_ylabel("S")
    axes[-1].text(3.45, threshold + 0.02, "h", fontsize=8, ha="right")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=2)


def draw_climb(plane: Tensor, track: Sequence[Tensor], at: Sequence[int]) -> None:
    """Four boxes after some steps of gradient ascent on the mean of a map under each; below stand the means."""
    _, axes = plt.subplots(1, len(at), figsize=(7.2, 2.6), layout="constrained")
    grey = (0.95 - 0.6 * plane[0].expand(3, -1, -1)).permute(1, 2, 0).numpy()
    for ax, k in zip(axes, at, strict=True):
        means = roi_align_mean(plane, track[k])[0, :, 0]
        lines = figures.show_boxes(ax, grey, 32 * track[k][0].numpy())
        for n, (value, line) in enumerate(zip(means.tolist(), lines, strict=True)):
            look = {"edgecolor": line.get_edgecolor(), "linestyle": line.get_linestyle()}
            below = {"transform": ax.transAxes, "bbox": {"facecolor": "none", "pad": 2, **look}}
            ax.text((n + 0.5) / len(means), -0.09, f"{value:.2f}", fontsize=8, ha="center", **below)
        ax.set_title(f"{k} steps", pad=10, fontsize=8)


def draw_turned(before: Tensor, after: Tensor) -> None:
    """Two words by their first two numbers, before and after Eq. 1 as printed: two directions become one."""
    _, axes = plt.subplots(1, 2, figsize=(5.0, 2.4), layout="constrained", sharex=True, sharey=True)
    for ax, words, title in zip(axes, (before, after), ("before", "after Eq. 1 as printed"), strict=True):
        for k, word in enumerate(words[0, :, :2].tolist()):
            arrow = {"arrowstyle": "-|>", "color": figures.PALETTE[k], "linewidth": 3 - 1.6 * k, "shrinkA": 0,
                     "shrinkB": 0, "linestyle": figures.DASHES[k]}  # fmt: skip
            ax.annotate("", word, (0, 0), arrowprops=arrow)
            aside = (0.0, 0.14) if word[0] else (0.2, 0.0)
            if title != "before" and k:
                aside = (0.0, -0.24)
            ax.text(
                word[0] + aside[0], word[1] + aside[1], f"$t_{k + 1}$", color=figures.PALETTE[k], ha="center"
            )
        ax.set(title=title, xlim=(-0.2, 2.4), ylim=(-0.4, 2.4), xlabel="first number")
    axes[0].set_ylabel("second number")


def draw_matrices(
    panels: Mapping[str, tuple], *, label: str = "", marked: Sequence[tuple[int, int]] = ()
) -> None:
    """Matrices side by side, dark is much: title → (values, names of rows, names of columns).

    Args:
        marked: (row, column) of the places that have a frame.
    """
    wide = [0.55 * len(columns) + 1.6 for _, _, columns in panels.values()]
    high = max(0.42 * len(rows) + 0.9 for _, rows, _ in panels.values())
    _, axes = plt.subplots(
        1, len(panels), figsize=(sum(wide), high), layout="constrained", squeeze=False, width_ratios=wide
    )
    for ax, (title, (values, rows, columns)) in zip(axes[0], panels.items(), strict=True):
        figures.matrix(ax, values, rows, columns, label=label)
        ax.set_title(title)
        for i, j in marked:
            frame = {"fill": False, "edgecolor": figures.WRONG, "linewidth": 2}
            ax.add_patch(Rectangle((j - 0.44, i - 0.44), 0.88, 0.88, **frame))


def draw_axes(ways: Mapping[tuple[str, str], Tensor], far: Mapping[tuple[str, str], Tensor]) -> None:
    """Eq. 2 on an image of one thing: cells of level 1, where regions go in two readings, how far off they end."""
    _, axes = plt.subplots(1, 4, figsize=(9.2, 2.6), layout="constrained", width_ratios=[1, 1, 1, 1.15])
    canvas = np.where(IS_THING[..., None].numpy(), [0.55, 0.75, 0.9], [0.97, 0.97, 0.96]).astype(np.float32)
    for ax in axes[:3]:
        figures.show_picture(ax, canvas)
        ax.add_patch(Rectangle((0, 0), 64, 64, **OUTLINE))
    _first_move(axes[0])
    panels = {
        ("image", "N/K"): (axes[1], "ours, three levels"),
        ("paper", "N/K"): (axes[2], "axes as printed"),
    }
    for k, (key, (ax, title)) in enumerate(panels.items()):
        for way in 64 * ways[key].transpose(0, 1):
            ax.plot(
                *way.T, "-", color=(figures.PALETTE[0], figures.WRONG)[k], linewidth=0.9, marker="", alpha=0.7
            )
            ax.plot(*way[0], "o", color=figures.FAINT, markersize=2.5)
            ax.plot(*way[-1], "D", color=figures.INK, markersize=3)
        ax.set_title(title)
    for k, ((order, unit), values) in enumerate(far.items()):
        name = f"{'ours' if order == 'image' else 'as printed'}, {unit}"
        _line(axes[3], range(len(values)), values, k, name)
    axes[3].set(xlabel="level", ylabel="distance from the thing", ylim=(0, 1))
    axes[3].set_xticks(range(4))
    axes[3].legend(fontsize=6.5, title="axes, unit", title_fontsize=6.5)


def _first_move(ax: Axes) -> None:
    """The nine cells of level 1 about one region with their M, and its two moves."""
    box = torch.tensor([[0.42, 0.42, 0.58, 0.58]])
    match, _ = searcher(1).search(PLANES[0], box[None], SAID, A_WORD)
    for j, (x1, y1, x2, y2) in enumerate((64 * neighbourhood(box, 3, 1.0)[0]).tolist()):
        ax.add_patch(Rectangle((x1, y1), x2 - x1, y2 - y1, **OUTLINE | {"linestyle": ":", "linewidth": 0.6}))
        ax.text(x1 + 1.5, y2 - 1.5, f"{match[0, 0, j]:.2f}", fontsize=6.5, color=figures.INK)
    x1, y1, x2, y2 = (64 * box[0]).tolist()
    ax.add_patch(
        Rectangle((x1, y1), x2 - x1, y2 - y1, **OUTLINE | {"edgecolor": figures.INK, "linewidth": 1.4})
    )
    origin = torch.tensor([32.0, 32.0])
    for order, name, colour, line, aside in (("image", "ours", figures.PALETTE[0], "-", -3.0),
                                             ("paper", "as printed", figures.WRONG, "--", 6.0)):  # fmt: skip
        _, moved = searcher(1, axes=order).search(PLANES[0], box[None], SAID, A_WORD)
        end = origin + 64 * moved[0, 0]
        arrow = {
            "arrowstyle": "-|>",
            "color": colour,
            "linewidth": 1.8,
            "linestyle": line,
            "shrinkA": 0,
            "shrinkB": 0,
        }
        ax.annotate("", end.tolist(), origin.tolist(), arrowprops=arrow)
        ax.text(float(end[0]) - 2, float(end[1]) + aside, name, fontsize=7, ha="center", color=figures.INK)
    ax.set_title("level 1, $M_j$ of the cells")


def _line(ax: Axes, x, y, k: int, name: str, **look) -> None:
    """Line k of a plot, told from the others by colour, dashes and marker."""
    look = {"color": figures.PALETTE[k], "marker": figures.MARKERS[k], "markersize": 4, "label": name} | look
    ax.plot(list(x), [float(value) for value in y], figures.DASHES[k % len(figures.DASHES)], **look)


def draw_border(asked: Tensor, stopped: Tensor, cut: Tensor) -> None:
    """A box that would leave the image: a region stops at the border and keeps its size, a proposal loses a part."""
    _, axes = plt.subplots(1, 2, figsize=(5.0, 2.2), layout="constrained")
    x, y, w, h = asked.tolist()
    panels = ((axes[0], stopped, "a region stops"), (axes[1], cut, "a proposal is cut"))
    for ax, (x1, y1, x2, y2), title in panels:
        ax.add_patch(Rectangle((0, 0), 1, 1, facecolor="#e6eaee", edgecolor=figures.INK, linewidth=0.8))
        ax.text(0.62, 0.72, "inside the image", fontsize=7, ha="right")
        ax.add_patch(
            Rectangle((x1, y1), x2 - x1, y2 - y1, fill=False, edgecolor=figures.PALETTE[0], linewidth=2.8)
        )
        dashed = OUTLINE | {"linestyle": "--", "edgecolor": figures.INK, "linewidth": 1.2}
        ax.add_patch(Rectangle((x - w / 2, y - h / 2), w, h, **dashed))
        ax.set(title=title, xlim=(-0.15, 0.65), ylim=(0.76, 0.26), aspect="equal")
        ax.set_axis_off()


def draw_levels(of: Example, boxes: Tensor, valid: Tensor) -> None:
    """Algorithm 1 on one image and two sentences: the regions of each level, best first, with untrained weights."""
    _, axes = plt.subplots(2, len(boxes), figsize=(1.8 * len(boxes), 4.3), layout="constrained")
    side = torch.tensor([*of.image.size] * 2)
    for row, level in itertools.product(range(2), range(len(boxes))):
        ax, found = axes[row, level], boxes[level, row, valid[row]] * side
        figures.show_boxes(ax, of.image, found, np.linspace(1, 0.2, len(found)))
        ax.set_title(f"$G_{level + 1}$: " + (f"level {level}" if level else "proposals"), fontsize=8, pad=7)
        if not level:
            ax.text(-0.06, 0.5, _wrapped(of.captions[row], 24), rotation=90, va="center", ha="right",
                    transform=ax.transAxes, fontsize=7)  # fmt: skip


def draw_lines(lines: Mapping[str, Sequence[float]], *, xlabel: str, ylabel: str) -> None:
    """Lines from 0 on, one a name."""
    _, ax = plt.subplots(figsize=(4.6, 2.2), layout="constrained")
    for k, (name, values) in enumerate(lines.items()):
        _line(ax, range(len(values)), values, k, name, marker="")
    ax.set(xlabel=xlabel, ylabel=ylabel, ylim=(0, None))
    if len(lines) > 1:
        ax.legend()


def draw_bars(values: Mapping[str, float], *, ylabel: str = "") -> None:
    """One bar a name."""
    _, ax = plt.subplots(figsize=(4.6, 2.2), layout="constrained")
    figures.bars(ax, list(values), {"": [float(value) for value in values.values()]}, ylabel=ylabel)


# ------------------------------------------------------------------------------------------- the toy's sections
def draw_toy(model: SLAN, history: Sequence[Mapping], words: pd.DataFrame) -> None:
    """One held-out image under two words: the one that is found best, and the one that is found worst.

    Thin lines are all ten regions, the thick one is the region that in the end matches the word best, followed back to
    the proposal that it came from. Right: the distance from what is named, by level.
    """
    found, (best_word, worst_word) = slan_toy.held_out(), (words.index[0], words.index[-1])
    at, names = slan_toy.look(model, found), list(slan_toy.COLOURS)
    best = slan_toy.best_region(at)
    pair = torch.tensor([names.index(best_word), names.index(worst_word)])
    both = (found.colours == pair).all(1)
    first = int(both.int().argmax())
    rows = (first, (first + slan_toy.HELD_OUT // 2) % slan_toy.HELD_OUT)
    figure = plt.figure(figsize=(9.2, 3.7), layout="constrained")
    grid = figure.add_gridspec(2, len(at.boxes) + 1, width_ratios=[1] * len(at.boxes) + [1.35])
    for (row, k), level in itertools.product(enumerate(rows), range(len(at.boxes))):
        ax = figure.add_subplot(grid[row, level])
        order = [i for i in range(at.boxes.shape[2]) if i != best[k]] + [int(best[k])]  # the best on top
        image, boxes = found.images[k].permute(1, 2, 0).numpy(), 64 * at.boxes[level, k, order]
        lines = figures.show_boxes(ax, image, boxes, weights=[0.12] * (len(order) - 1) + [1.0])
        for line in lines:
            line.set(edgecolor=figures.INK, linestyle="-", alpha=0.55)
        lines[-1].set(alpha=1, linewidth=2.2)
        value = float(iou(at.boxes[level, k, best[k]][None], found.boxes[k, :1]))
        ax.set_title(f"{f'level {level}' if level else 'proposals'}, IoU {value:.2f}", fontsize=8, pad=7)
        if not level:
            ax.text(-0.06, 0.5, f"“{names[int(found.colours[k, 0])]}”", rotation=90, va="center", ha="right",
                    transform=ax.transAxes, fontsize=9)  # fmt: skip
    ax = figure.add_subplot(grid[:, -1])
    of = [column for column in words.columns if column.startswith(("proposals", "level"))]
    curves = {"the named blob": history[-1]["named"], "the other blob": history[-1]["other"],
              "the named, untrained": history[0]["named"], f"“{best_word}”, named": words.loc[best_word, of],
              f"“{worst_word}”, named": words.loc[worst_word, of]}  # fmt: skip
    for k, (name, values) in enumerate(curves.items()):
        _line(ax, range(len(of)), values, k, name, linewidth=2.2 if k < 2 else 1.2)
    ax.set(xlabel="level", ylabel="distance of all regions from", ylim=(0, 0.95))
    ax.set_title(f"{slan_toy.HELD_OUT} held-out pairs")
    ax.set_xticks(range(len(of)))
    ax.legend(fontsize=7)


def draw_collapse(runs: Mapping[str, Sequence[Mapping]], apart: float) -> None:
    """The toy trained further under four sums of losses: do regions move, do they arrive, how large are they?"""
    panels = {
        "target off": lambda one: one["off"],
        "distance, level 3": lambda one: one["named"][-1],
        "side of the proposals": lambda one: one["side"][0],
    }
    figure, axes = plt.subplots(1, 3, figsize=(8.4, 2.9), layout="constrained")
    for ax, (ylabel, value) in zip(axes, panels.items(), strict=True):
        for k, (name, history) in enumerate(runs.items()):
            _line(ax, [one["step"] for one in history], [value(one) for one in history], k, name)
        ax.set(xlabel="steps", ylabel=ylabel, ylim=(0, None))
    axes[1].axhline(apart, color=figures.FAINT, linestyle=":", linewidth=1, marker="")
    at = {"ha": "right", "va": "top", "transform": axes[1].get_yaxis_transform()}
    axes[1].text(1, apart - 0.01, "the windows of the start", fontsize=7, **at)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=7.5)


def draw_margins(of_words: pd.DataFrame) -> None:
    """For each word: its margin, and how far the regions of level 3 end from what it names, by way of training."""
    _, axes = plt.subplots(1, 2, figsize=(7.2, 2.6), layout="constrained")
    for ax, what, ylabel in (
        (axes[0], "margin", "margin of the cosine"),
        (axes[1], "distance", "distance, level 3"),
    ):
        for k, name in enumerate(name for name in of_words if name.startswith(what)):
            look = {"color": figures.PALETTE[k], "label": name.removeprefix(f"{what}, ")}
            # words have no order, so no line joins them
            ax.plot(range(len(of_words)), of_words[name], figures.MARKERS[k], **look)
        ax.set_xticks(range(len(of_words)), list(of_words.index), rotation=45)
        ax.set_ylabel(ylabel)
    axes[0].axhline(0, color=figures.FAINT, linestyle=":", linewidth=1, marker="")
    axes[1].set_ylim(0, None)
    axes[0].legend(fontsize=7)
