"""HSLM's lesson: the example that it looks for, layers with weights that it chooses, and what its page draws.

A function that draws returns nothing and leaves its figure open: the page shows it once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib import pyplot as plt
from PIL import Image
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from finematch import figures
from finematch.boxes import iou
from finematch.config import root
from finematch.data import load
from finematch.data.splits import data_folder
from finematch.features.proposals import propose
from finematch.figures.diagram import diagram
from finematch.lessons import full
from finematch.models.configs import HSLMConfig
from finematch.models.hslm import (
    HSLM,
    Caption,
    GraphLayer,
    PairScorer,
    Picture,
    SelfAttentionPooling,
    WordEncoder,
    WordSelfAttention,
    score,
)
from finematch.scenes.generator import TOKENIZER, attributes
from finematch.text import tokenise, word_level

EYE = [[1.0, 0], [0, 1]]


# ------------------------------------------------------------------------------------------- an example of the data
class Example(NamedTuple):
    """An image of the embedded set with a caption that relates two of its objects, and other captions."""

    image: Image.Image
    text: str  # the caption
    phrases: list[str]  # of the two objects that it names
    boxes: Tensor  # theirs, "2 4"
    relation: tuple[int, str, int]  # which of the two, its relation, to which
    objects: int  # in the image
    proposals: Tensor  # "n 4", best first
    overlap: Tensor  # "n", the IoU of each proposal with the nearer of the two boxes
    spoken: dict[str, Tensor]  # the first captions of up to 200 images, ready for the word encoder
    lengths: Tensor  # tokens of each caption of these images
    vocabulary: int


def example(p: Any) -> Example:
    """The first image of val with at least four objects and a caption that names and relates two of them.

    Args:
        p: the page's parameters.
    """
    figures.style()
    torch.manual_seed(p.seed)
    folder = data_folder(p.dataset, root() / p.data_root, root() / p.cache, smoke=p.smoke)
    records, truth = load("scenes", folder, "val")[:200], attributes(folder / "scenes", "val")[:200]

    def fits(image: dict, caption: dict) -> bool:
        single = [len(mention["objects"]) for mention in caption["mentions"]] == [1, 1]
        return single and len(caption["relations"]) == 1 and len(image["objects"]) >= 4

    number, caption = next((i, c) for i, one in enumerate(truth) for c in one["captions"] if fits(one, c))
    image, objects = records[number].open(), truth[number]["objects"]
    phrases = {mention: caption["text"][a:b] for a, b, mention in caption["phrases"] if mention >= 0}
    boxes = torch.tensor([objects[mention["objects"][0]]["box"] for mention in caption["mentions"]]).float()
    proposals = torch.as_tensor(propose("auto")[1](image, p.regions)).float()
    tokenizer = word_level(TOKENIZER)
    spoken = tokenise([record.captions[0] for record in records], tokenizer).batch(range(len(records)))
    lengths = tokenise([c for record in records for c in record.captions], tokenizer).lengths
    relation = tuple(caption["relations"][0])
    return Example(image, caption["text"], [phrases[0], phrases[1]], boxes, relation, len(objects), proposals,
                   iou(proposals, boxes).amax(1), spoken, torch.tensor(lengths), len(tokenizer))  # fmt: skip


# ------------------------------------------------------------------------------------------- layers with chosen weights
@torch.no_grad()
def fill(layer: nn.Linear, weight: Any, bias: float = 0.0) -> None:
    """Weights that we choose: a matrix, or a number for so many times the identity."""
    if isinstance(weight, (int, float)):
        weight = weight * torch.eye(layer.in_features)
    layer.weight.copy_(torch.as_tensor(weight))
    if layer.bias is not None:
        layer.bias.fill_(bias)


def attention(form: str, value: Any = EYE, **options: Any) -> WordSelfAttention:
    """The library's self-attention of width 2; its matrices are the identity, that of the values is `value`."""
    layer = WordSelfAttention(2, form=form, **options).requires_grad_(False)
    fill(layer.key, EYE), fill(layer.query, EYE), fill(layer.value, value)
    return layer


def graph_layer(strength: float = 1.0, width: int = 2, **options: Any) -> GraphLayer:
    """The library's graph layer; its four matrices are the identity times `strength`."""
    layer = GraphLayer(width, **options).requires_grad_(False)
    for part in (layer.mu, layer.nu, layer.gather, layer.update):
        fill(part, strength)
    return layer


def pooling() -> SelfAttentionPooling:
    """The library's pooling of width 2; its matrices are the identity, and the vote looks at the first number."""
    layer = SelfAttentionPooling(2).requires_grad_(False)
    fill(layer.local, EYE), fill(layer.query, EYE), fill(layer.vote, [[1.0, 0.0]])
    return layer


def pair_scorer(**options: Any) -> PairScorer:
    """The library's scorer of width 2 without global alignment: W = I, w = (1, -2), FC = (2, 1) with bias 1/2."""
    scorer = PairScorer(HSLMConfig(width=2, sim=2, glob=False, **options)).requires_grad_(False)
    fill(scorer.compare_local, EYE), fill(scorer.gate, [[1.0, -2.0]]), fill(scorer.score, [[2.0, 1.0]], 0.5)
    return scorer


def echo(values: Sequence[float]) -> Tensor:
    """Forward and backward states "2 M" of a `WordEncoder`'s GRU of width 1, for words with these tanh(x).

    All weights are 0 but the candidate's, which is 1.
    """
    encoder = WordEncoder(len(values), HSLMConfig(embed=1, width=1, depth=0, self_attn=False))
    encoder.requires_grad_(False)
    for weight in encoder.gru.parameters():
        weight.zero_()
    encoder.gru.weight_ih_l0[2] = encoder.gru.weight_ih_l0_reverse[2] = 1  # rows: reset, update, candidate
    encoder.embed.weight.copy_(torch.tensor(values).atanh()[:, None])
    return encoder.gru(encoder.embed(torch.arange(len(values)))[None])[0][0].T


def rate(scorer: PairScorer, regions: Tensor, words: Tensor, vector: Tensor | None = None) -> Tensor:
    """Logits "b c" of images "b n d" with captions "c l d" (and their global vectors), nothing padded."""
    picture, caption = Picture(regions, full(regions)), Caption(words, full(words), vector)
    return score(scorer, scorer.prepare(picture), caption)


def relate(words: Tensor, regions: Tensor, scale: float = 1.0) -> Tensor:
    """Eq. 16 by the library for one image: words "l d", regions "n d" -> f, "l n"."""
    scorer = PairScorer(HSLMConfig(width=words.shape[-1], sim=2, glob=False, cross_scale=scale))
    scorer.requires_grad_(False)
    return scorer.relate(scorer.prepare(Picture(regions[None], full(regions[None]))), words[None])[0]


def refused(product: Callable[[], Tensor]) -> bool:
    """Whether the shapes of a product do not conform."""
    try:
        product()
    except RuntimeError:
        return True
    return False


def operations(work: Callable[[], Any]) -> int:
    """How many additions and multiplications torch counts."""
    with FlopCounterMode(display=False) as counter:
        work()
    return counter.get_total_flops()


# ------------------------------------------------------------------------------------------- small models and batches
def batch_of(n: int, *, equal: bool = False, captions: int | None = None) -> dict[str, Any]:
    """Random images of 4 regions, 11 numbers each, and captions of 7 words, one of each for a pair.

    Args:
        equal: all images are one image, and all captions are one caption, under different names.
    """
    g, c = torch.Generator().manual_seed(1), captions or n
    features, ids = torch.randn(n, 4, 11, generator=g), torch.randint(1, 29, (c, 7), generator=g)
    if equal:
        features, ids = features[:1].expand(n, -1, -1), ids[:1].expand(c, -1)
    real = torch.ones(c, 7, dtype=torch.bool)
    return {"image": {"features": features, "mask": full(features)}, "image_id": torch.arange(n),
            "text": {"input_ids": ids, "mask": real, "special": ~real}}  # fmt: skip


def tiny(seed: int, *, warmup_steps: int = 0, **options: Any) -> HSLM:
    """A tiny HSLM for `batch_of`, with the same start for a seed."""
    torch.manual_seed(seed)
    config = HSLMConfig(**{"width": 8, "embed": 5, "sim": 6, **options})
    return HSLM(11, 29, config, warmup_steps=warmup_steps).eval()


class Watched(PairScorer):
    """The scorer, and the tensors that its steps gave when it last scored pairs."""

    def __init__(self, config: HSLMConfig):
        super().__init__(config)
        self.kept: dict[str, Tensor] = {}

    def relate(self, *given: Any) -> Tensor:
        return self._keep("f", super().relate(*given))

    def region_weights(self, *given: Any) -> Tensor:
        return self._keep("pooled", super().region_weights(*given))

    def similarity(self, layer: nn.Linear, difference: Tensor) -> Tensor:
        name = "local" if layer is self.compare_local else "global"
        self._keep(f"{name} difference", difference.clone())  # it is overwritten
        return self._keep(name, super().similarity(layer, difference))

    def _keep(self, name: str, value: Tensor) -> Tensor:
        self.kept[name] = value
        return value


def stages(model: HSLM, batch: Mapping[str, Any]) -> dict[str, Tensor]:
    """What the model makes of a batch when it scores each image with each caption, by name, from input to logit."""
    scorer = Watched(model.config).requires_grad_(False)
    scorer.load_state_dict(model.pairs.state_dict())
    regions, words = model.encode_image(**batch["image"]), model.encode_text(**batch["text"])
    logit = score(scorer, scorer.prepare(regions), words)
    given = {"features": batch["image"]["features"], "ids": batch["text"]["input_ids"]}
    return {**given, **scorer.kept, "logit": logit}


@torch.no_grad()
def material(
    width: int, sim: int, images: int, lengths: Sequence[int], seed: int
) -> tuple[PairScorer, Picture, Caption]:
    """A scorer with random images of 36 regions, and random captions of these lengths, padded."""
    torch.manual_seed(seed)
    scorer, longest = PairScorer(HSLMConfig(width=width, sim=sim)).requires_grad_(False), max(lengths)
    regions = F.normalize(torch.randn(images, 36, width), dim=-1)
    real = torch.arange(longest)[None] < torch.tensor(lengths)[:, None]
    words = F.normalize(torch.randn(len(lengths), longest, width), dim=-1) * real[..., None]
    caption = Caption(words, real, F.normalize(words.sum(1), dim=-1))
    return scorer, Picture(regions, full(regions)), caption


# ------------------------------------------------------------------------------------------- drawings
def draw_levels(one: Example) -> None:
    """Three panels: what a proposal method finds, level 1 (two objects that are named), level 2 (their relation).
    The caption, level 3, stands below."""
    figure, axes = plt.subplots(1, 3, figsize=(6.8, 3.0), layout="constrained")
    figures.show_boxes(axes[0], one.image, one.proposals, np.linspace(1, 0.05, len(one.proposals)))
    axes[0].set_title(f"{len(one.proposals)} proposals (thicker: higher rank)", pad=12)
    figures.show_boxes(axes[1], one.image, one.boxes, labels=one.phrases)
    axes[1].set_title("level 1: objects that are named", pad=12)
    figures.show_boxes(axes[2], one.image, one.boxes)
    first, relation, second = one.relation
    ends = (one.boxes[[first, second], :2] + one.boxes[[first, second], 2:]) / 2
    axes[2].plot(*ends.T, color=figures.INK, linewidth=2, marker="o", markerfacecolor="white")
    axes[2].text(*ends.mean(0), relation, fontsize=8, ha="center", va="center",
                 bbox={"facecolor": "white", "edgecolor": figures.INK, "boxstyle": "round,pad=0.25"})  # fmt: skip
    axes[2].set_title("level 2: a relation of two", pad=12)
    figure.supxlabel(f"level 3, the sentence: “{one.text}”", fontsize=9)


def draw_model(found: Mapping[str, str]) -> None:
    """HSLM from top to bottom: captions on the left, images on the right, their pairs below; shapes on the arrows.

    Args:
        found: the shapes, from `shapes` and `stages`.
    """
    parts = {
        "word ids": (0, 0, "data"), "region features": (2, 0, "data"),
        "embedding\nEq. 2": (0, 1, "trained"), "linear, unit length\nEq. 1": (2, 1, "trained"),
        "self-attention\nEq. 3-6": (0, 2, "trained"), "graph of regions\nEq. 7-10": (2, 2, "trained"),
        "graph of words\nEq. 11": (0, 3, "trained"),
        "GRU, two directions\nEq. 12-14": (0, 4, "trained"), "cross attention\nEq. 16": (1.05, 4, "step"),
        "contexts\nEq. 15": (2, 5, "step"), "pool the words\n3.5": (0, 6, "trained"),
        "pool the contexts\n3.5": (1.28, 6.25, "trained"), "difference\nEq. 17": (2, 6.4, "step"),
        "global similarity\nEq. 17, 19": (0.6, 7.4, "trained"), "local similarity\nEq. 17, 18": (2, 7.4, "trained"),
        "gates, sum, FC\nEq. 20-22": (2, 8.4, "trained"), "score": (2, 9.4, "data"),
    }  # fmt: skip
    name = {part.split("\n")[0]: part for part in parts}
    arrows = [
        ("word ids", "embedding", "ids"), ("embedding", "self-attention", "text.embed"),
        ("self-attention", "graph of words", "text.attention"),
        ("graph of words", "GRU, two directions", "text.graph"),
        ("GRU, two directions", "cross attention", "text.0"), ("GRU, two directions", "pool the words", "text.0"),
        ("region features", "linear, unit length", "features"),
        ("GRU, two directions", "difference", "text.0"),
        ("linear, unit length", "graph of regions", "image.embed"), ("graph of regions", "cross attention", "image"),
        ("graph of regions", "contexts", "image"), ("cross attention", "contexts", "f"),
        ("contexts", "difference", "local difference"), ("contexts", "pool the contexts", "local difference"),
        ("graph of regions", "global similarity", ""),
        ("pool the words", "global similarity", "pool_text"), ("pool the contexts", "global similarity", "pooled"),
        ("difference", "local similarity", "local difference"), ("local similarity", "gates, sum, FC", "local"),
        ("global similarity", "gates, sum, FC", "global"), ("gates, sum, FC", "score", "logit"),
    ]  # fmt: skip
    diagram(
        parts,
        [(name[a], name[b], found.get(key, "")) for a, b, key in arrows],
        cell=(2.1, 0.78),
        box=(1.25, 0.46),
    )


def draw_words(words: Tensor, names: Sequence[str], after: Mapping[str, Tensor]) -> None:
    """Left: the relations of Eq. 6 between words "l e"; right: how long each word is, before and after."""
    _, (left, right) = plt.subplots(1, 2, figsize=(6.6, 2.3), layout="constrained", width_ratios=[1, 1.7])
    relations = words @ words.T / len(words)
    figures.matrix(left, relations, names, high=float(relations.max()), label="relation / M")
    groups = {"E, before": words, **after}
    figures.bars(right, names, {k: v.norm(dim=-1) for k, v in groups.items()}, ylabel="length of the word")


def draw_graph(nodes: Tensor, moved: Tensor, relations: Tensor) -> None:
    """Left: three nodes and their relations, to themselves as well; right: where Eq. 8 moves each node "3 2"."""
    _, (left, right) = plt.subplots(1, 2, figsize=(5.6, 2.5), layout="constrained")
    at = np.array([[0, 0], [1, 0], [0.5, 0.85]])
    white = {"facecolor": "white", "edgecolor": "none", "pad": 1}
    for i, j in ((0, 1), (0, 2), (1, 2)):
        strength = float(relations[i, j])
        left.plot(*at[[i, j]].T, color=figures.PALETTE[0], linewidth=0.8 + 8 * strength, marker="", zorder=1,
                  linestyle="-" if strength else ":")  # fmt: skip
        left.text(
            *at[[i, j]].mean(0), f"{strength:.2f}", fontsize=7, ha="center", va="center", bbox=white, zorder=2
        )
    for i, place in enumerate(at):
        left.plot(*place, "o", markersize=18, color=figures.INK, zorder=2)
        left.text(*place, str(i + 1), color="white", ha="center", va="center", fontsize=9, zorder=3)
        side = -1 if i == 0 else 1
        left.text(place[0] + 0.14 * side, place[1], f"to itself\n{float(relations[i, i]):.2f}", fontsize=7,
                  ha="right" if i == 0 else "left", va="center")  # fmt: skip
    left.set(xlim=(-0.45, 1.45), ylim=(-0.2, 1.05), aspect="equal", title="$A_{ij}$ between the nodes")
    left.set_axis_off()
    for i, (before, after) in enumerate(zip(nodes.tolist(), moved.tolist(), strict=True)):
        right.annotate("", after, before, arrowprops={"arrowstyle": "-|>", "color": figures.PALETTE[1],
                       "linewidth": 1.6, "shrinkA": 4, "shrinkB": 4})  # fmt: skip
        right.plot(*before, "o", color=figures.INK, label="" if i else "before")
        right.plot(*after, "D", color=figures.PALETTE[0], label="" if i else "after Eq. 8")
        right.annotate(str(i + 1), before, xytext=(-9, -9), textcoords="offset points", fontsize=8)
    right.set(
        xlim=(-0.3, 2.4), ylim=(-0.3, 2.4), aspect="equal", xlabel="first number", ylabel="second number"
    )
    right.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=2)


def draw_growth(by_layer: Mapping[str, list], by_nodes: Mapping[str, list], counts: Sequence[int]) -> None:
    """The mean length of a node for each `relation`: left after each layer, right after four layers of N nodes."""
    _, (left, right) = plt.subplots(1, 2, figsize=(6.6, 2.6), layout="constrained")
    for k, name in enumerate(by_layer):
        look = {"color": figures.PALETTE[k], "marker": figures.MARKERS[k], "label": name}
        left.plot(by_layer[name], **look)
        right.plot(counts, by_nodes[name], **look)
    left.set(yscale="log", xlabel="layers", ylabel="mean length of a node", title="36 nodes")
    left.set_xticks(range(len(next(iter(by_layer.values())))))
    right.set(xscale="log", yscale="log", xlabel="nodes N", title="after 4 layers")
    right.set_xticks(counts, [str(n) for n in counts], minor=False)
    right.minorticks_off()
    left.legend()


def draw_echo(forward: Sequence[float], backward: Sequence[float]) -> None:
    """The states of both directions at each word, and their average t."""
    average = [(a + b) / 2 for a, b in zip(forward, backward, strict=True)]
    _, ax = plt.subplots(figsize=(5.4, 2.2), layout="constrained")
    words = [f"word {k + 1}" for k in range(len(average))]
    figures.bars(
        ax, words, {"forward": forward, "backward": backward, "average t": average}, ylabel="state $h$"
    )


def draw_contexts(
    looks: Mapping[str, Tensor], scales: Sequence[float], curves: Mapping[str, list], words: float
) -> None:
    """Left: f of the toy, each word with each region, for two scales; right: how alike two contexts are, by scale.

    Args:
        words: the mean cosine of two words, a dotted line on the right.
    """
    _, axes = plt.subplots(1, 3, figsize=(7.2, 2.6), layout="constrained", width_ratios=[1.15, 1.15, 1])
    for ax, (title, f) in zip(axes, looks.items(), strict=False):
        figures.matrix(ax, f, [""] * f.shape[0], [""] * f.shape[1], label="$f$")
        ax.set(xlabel=f"{f.shape[1]} regions", ylabel=f"{f.shape[0]} words", title=title, aspect="auto")
    for (name, values), dash, colour in zip(curves.items(), figures.DASHES, figures.PALETTE, strict=False):
        axes[2].plot(scales, values, dash, color=colour, marker="", label=name)
    axes[2].axhline(words, color=figures.FAINT, linestyle=":", marker="", label="mean cosine of two words")
    axes[2].set(xscale="log", ylim=(-0.08, 1.05), xlabel="cross_scale", ylabel="cosine of two contexts")
    axes[2].set_xticks([1, 4, 16, 64], ["1", "4", "16", "64"])
    axes[2].minorticks_off()
    axes[2].legend(loc="lower left", bbox_to_anchor=(-0.1, 1), fontsize=7, borderaxespad=0)


def draw_nodes(steps: Mapping[str, Tensor]) -> None:
    """A matrix for each step from the difference to the gated similarity vector: rows are words, columns channels."""
    _, axes = plt.subplots(1, len(steps), figsize=(2.5 * len(steps), 2.0), layout="constrained")
    for ax, (title, values) in zip(axes, steps.items(), strict=True):
        rows = [f"word {k + 1}" for k in range(len(values))]
        figures.matrix(ax, values, rows, ["channel 1", "channel 2"], label="value")
        ax.set_title(title)


def draw_plateau(spread: Sequence[float], curves: Mapping[tuple[str, float], list], pairs: int) -> None:
    """Losses as shares of their plateaus while the scores spread: above the dotted line, telling pairs apart costs."""
    _, ax = plt.subplots(figsize=(6.8, 2.8), layout="constrained")
    signals = sorted({signal for _, signal in curves})
    kinds = list(dict.fromkeys(kind for kind, _ in curves))
    for (kind, signal), values in curves.items():
        k = signals.index(signal)
        ax.plot(spread, values, figures.DASHES[kinds.index(kind)], color=figures.PALETTE[k], markevery=4,
                marker=figures.MARKERS[k], label=f"{kind}, signal {signal:g}")  # fmt: skip
    ax.axhline(1, color=figures.FAINT, linestyle=":", marker="", label="plateau")
    ax.set(xlabel="spread of the scores (deviation of the noise)", ylabel="loss / its plateau", ylim=(0, 2.1),
           title=f"{pairs} pairs")  # fmt: skip
    ax.legend(loc="center left", bbox_to_anchor=(1, 0.5))


def draw_slopes(slopes: Mapping[str, Tensor]) -> None:
    """dL/dS of each loss at scores that are alike: negative (orange) is pushed up, positive (violet) is pushed down."""
    _, axes = plt.subplots(1, len(slopes), figsize=(3.2 * len(slopes), 2.6), layout="constrained")
    for ax, (name, table) in zip(axes, slopes.items(), strict=True):
        names = [str(k + 1) for k in range(len(table))]
        figures.matrix(ax, table, names, low=-2, high=2, label="$dL/dS$", signed=True)
        ax.set(title=name, xlabel="caption", ylabel="image")


def draw_operations(steps: Any) -> None:
    """Millions of operations for one pair: each step by the book and in the library."""
    _, ax = plt.subplots(figsize=(6.6, 2.3), layout="constrained")
    figures.bars(
        ax, list(steps.index), {name: steps[name] for name in steps}, ylabel="million operations\nper pair"
    )
