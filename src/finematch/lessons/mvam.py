"""What the lesson of MVAM draws, and its set-ups that teach nothing: tiny models, an example in the data.

A function that draws leaves its figure open, so that a notebook shows it once.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from matplotlib import pyplot as plt
from torch import Tensor, nn

from finematch import figures
from finematch.config import root
from finematch.data import load
from finematch.data.record import Record
from finematch.data.splits import data_folder
from finematch.encoders import Tokens, TokenTransformer, open_clip_model, small_clip, text_tower
from finematch.figures.diagram import diagram
from finematch.files import DataError
from finematch.grids import grid
from finematch.losses import contrastive
from finematch.models.configs import MVAMConfig
from finematch.models.mvam import MVAM, ViewAttention, view_statistics
from finematch.scenes.baselines import bag_of_words
from finematch.scenes.generator import attributes
from finematch.scenes.language import solutions
from finematch.tables import published


# ------------------------------------------------------------------------------------------- an example in the data
class Rivals(NamedTuple):
    """A caption of the embedded set, its image first, and images in which a bag of words finds the same words."""

    caption: str
    images: list[Record]
    word_scores: list[float]
    true: list[bool]


def find_rivals(data_root: Path, cache: Path, *, smoke: bool = False, images: int = 200) -> Rivals:
    """The caption of val with a relation in it that ties for the best with most other images, up to four of them."""
    folder = data_folder("scenes", data_root, cache, smoke=smoke)
    records = load("scenes", folder, "val")[:images]  # drawn now if it is not there
    scenes = attributes(folder / "scenes", "val")[:images]
    captions = [(i, caption) for i, scene in enumerate(scenes) for caption in scene["captions"]]
    scores, tied = bag_of_words(scenes, [caption["text"] for _, caption in captions]), {}
    for c, (own, caption) in enumerate(captions):
        others = [i for i in np.flatnonzero(scores[:, c] == scores[own, c]) if i != own]
        confused = others and caption["relations"] and scores[own, c] == scores[:, c].max()
        if confused and not any(solutions(scenes[i], caption) for i in others):
            tied[c] = others
    chosen = max(tied, key=lambda c: (min(len(tied[c]), 4), -c))
    own, caption = captions[chosen]
    shown = [own, *tied[chosen][:4]]
    return Rivals(caption["text"], [records[i] for i in shown], [float(scores[i, chosen]) for i in shown],
                  [bool(solutions(scenes[i], caption)) for i in shown])  # fmt: skip


def draw_rivals(rivals: Rivals) -> None:
    """Images in which every word of the caption is found; the caption is true of the first one alone."""
    figure, axes = plt.subplots(1, len(rivals.images), figsize=(1.5 * len(rivals.images), 1.9), layout="constrained",
                                squeeze=False)  # fmt: skip
    for ax, record, true in zip(axes[0], rivals.images, rivals.true, strict=True):
        figures.show_picture(ax, record.open())
        ax.set_title("✓ its image" if true else "✗ same words", fontsize=8)
    figure.suptitle(figures.plain(f"“{rivals.caption}”"), fontsize=9)


# ------------------------------------------------------------------------------------------- tiny models
def tokens(states: Tensor, real: int | None = None) -> Tokens:
    """States "b n d" as a tower would return them; only the first `real` tokens exist, none is special."""
    mask = (torch.arange(states.shape[1]) < (real or states.shape[1])).expand(states.shape[:2])
    return Tokens(states, mask, torch.zeros_like(mask), states[:, 0])


def unchanged(layer: nn.Module) -> nn.Module:
    """A pooling whose projection changes nothing: the identity matrix, and no bias."""
    layer.requires_grad_(False)
    layer.project.weight.copy_(torch.eye(len(layer.project.weight)))
    layer.project.bias.zero_()
    return layer.eval()


def with_codes(codes: Sequence[Sequence[float]]) -> ViewAttention:
    """The library's attention with codes that we choose, and a projection that changes nothing."""
    codes = torch.tensor(codes)
    layer = unchanged(
        ViewAttention(codes.shape[1], views=len(codes), projection="shared", view_dim=codes.shape[1])
    )
    layer.codes.copy_(codes)
    return layer


def tiny(seed: int, **options: Any) -> MVAM:
    """A tiny MVAM with random weights, the same for a seed: regions of width 9, a vocabulary of 30 words."""
    torch.manual_seed(seed)
    vision = TokenTransformer(9, width=8, depth=1, heads=2)
    text = text_tower("bert", 30, width=8, depth=1, heads=2)
    return MVAM(vision, text, MVAMConfig(**{"views": 4, "total_dim": 40, **options})).eval()


def pairs(seed: int) -> dict:
    """A batch for `tiny`: two images of five regions each, and two captions of seven tokens each."""
    generator = torch.Generator().manual_seed(seed)
    whole = torch.ones(2, 7, dtype=torch.bool)
    return {
        "image": {"features": torch.randn(2, 5, 9, generator=generator), "mask": whole[:, :5]},
        "text": {
            "input_ids": torch.randint(30, (2, 7), generator=generator),
            "mask": whole,
            "special": ~whole,
        },
        "image_id": torch.arange(2),
    }


def once(model: MVAM, batch: dict) -> dict:
    """The batch, the scores of all images with all captions, and the terms of the loss."""
    image, text = model.encode_image(**batch["image"]), model.encode_text(**batch["text"])
    return {"batch": batch, "scores": image.vector @ text.vector.T, **model(batch)}


def random_clip(seed: int) -> nn.Module:
    """A tiny CLIP with random weights; the gain of its last norm is 4, to stand for what training does to it."""
    torch.manual_seed(seed)
    clip = open_clip_model(small_clip(40, bos=38, eos=39, size=32, width=32, depth=2, positions=16))
    clip.eval().requires_grad_(False).vision_model.post_layernorm.weight.mul_(4)
    return clip


def caption_ids(length: int) -> dict[str, Tensor]:
    """Start, three words and end-of-text (id 39), padded to `length` with that same id, as some tokenizers do."""
    ids = torch.full((1, length), 39)
    ids[0, :4] = torch.tensor([38, 7, 21, 9])
    whole = torch.ones(1, length, dtype=torch.bool)
    return {"input_ids": ids, "mask": whole, "special": ~whole}


# ------------------------------------------------------------------------------------------- the paper's tables
def printed(table: int) -> pd.DataFrame:
    """A table of the paper as it is printed; of Table 1 the columns of MSCOCO-5K."""
    numbers = published("MVAM", table)
    if table == 1:
        numbers = numbers[numbers.column.str.startswith("MSCOCO-5K")]
    numbers = numbers.assign(column=numbers.column.str.removeprefix("MSCOCO-5K "))
    return numbers.pivot(index="row", columns="column", values="value")[list(numbers.column.unique())]


def verdicts(*grids: str) -> pd.DataFrame:
    """What was judged on `scenes` by each grid's first metric, one line per claim; none where there is no `figures`.

    Raises:
        DataError: a grid has no verdicts yet.
    """
    if not (root() / "figures").is_dir():
        return pd.DataFrame(columns=["claim", "reading"])
    frames = []
    for name in grids:
        file = root() / "figures" / f"{name}.scenes.tiny.claims.csv"
        if not file.is_file():
            raise DataError(file, f"the grid {name}", "has no verdicts", f"Run `make grid GRID={name}`")
        found = pd.read_csv(file)
        frames.append(found[found["metric"].isin(grid(name).headline[:1]) & found["lower"].notna()])
    return pd.concat(frames, ignore_index=True)


# ------------------------------------------------------------------------------------------- drawings
def draw_model(found: Mapping[str, str]) -> None:
    """The whole model: what flows where, with the shapes that `lessons.shapes` found."""
    parts = {
        "regions\nof images": (0, 0, "data"),
        "captions": (0, 2, "data"),
        "image tower\nEq. 1": (1, 0, "trained"),
        "text tower\nEq. 3": (1, 2, "trained"),
        "views of images\nEq. 7 to 9": (2, 0, "trained"),
        "views of captions\nEq. 7 to 9": (2, 2, "trained"),
        "cosine\n3.2": (3, 1, "step"),
        "diversity\nEq. 10": (3, 0, "step"),
        "diversity\nEq. 10 ": (3, 2, "step"),
        "loss\nEq. 5, 6, 12, 13": (4, 1, "step"),
    }
    arrows = [
        ("regions\nof images", "image tower\nEq. 1", found["batch.image.features"]),
        ("captions", "text tower\nEq. 3", found["batch.text.input_ids"]),
        ("image tower\nEq. 1", "views of images\nEq. 7 to 9", found["vision.states"]),
        ("text tower\nEq. 3", "views of captions\nEq. 7 to 9", found["text.states"]),
        ("views of images\nEq. 7 to 9", "cosine\n3.2", found["image_pooling.vector"]),
        ("views of captions\nEq. 7 to 9", "cosine\n3.2", found["text_pooling.vector"]),
        ("views of images\nEq. 7 to 9", "diversity\nEq. 10", found["image_pooling.attention"]),
        ("views of captions\nEq. 7 to 9", "diversity\nEq. 10 ", found["text_pooling.attention"]),
        ("cosine\n3.2", "loss\nEq. 5, 6, 12, 13", found["scores"]),
        ("diversity\nEq. 10", "loss\nEq. 5, 6, 12, 13", found["diversity_image"]),
        ("diversity\nEq. 10 ", "loss\nEq. 5, 6, 12, 13", found["diversity_text"]),
    ]
    diagram(parts, arrows, cell=(1.85, 0.72))


def draw_answers(mean: Tensor, view: Tensor) -> None:
    """Two images as vectors of four numbers: the mean of the regions is the same, the answer of a view is not."""
    axes = plt.subplots(1, 2, figsize=(6.4, 1.7), layout="constrained")[1]
    names = ["red", "blue", "circle", "square"]
    for ax, values, title in zip(
        axes, (mean, view), ("mean of the regions", "answer of the view “red”"), strict=True
    ):
        figures.matrix(ax, values, ["image X", "image Y"], names, label="value")
        ax.set_title(title)


def draw_first_token(states: Tensor, vector: Tensor) -> None:
    """States "n d" of one image, of which the framed first row alone becomes the vector."""
    left, right = plt.subplots(1, 2, figsize=(6.4, 1.9), layout="constrained")[1]
    rows, columns = ["[IMG]", *(f"token {j}" for j in range(1, len(states)))], ["1st number", "2nd number"]
    figures.matrix(left, states, rows, columns, low=-4, high=4, label="state")
    frame = {"fill": False, "edgecolor": figures.PALETTE[4], "linewidth": 2.5, "clip_on": False}
    left.add_patch(plt.Rectangle((-0.5, -0.5), 2, 1, **frame))
    left.set_title("the first row alone is read")
    figures.matrix(right, vector[None], ["R"], columns, low=-1, high=1, label="value")
    right.set_title("R = tanh(W h + c)")
    for ax in (left, right):
        ax.set_aspect("auto")


def draw_contrast(image: Tensor, text: Tensor, scale: float) -> None:
    """The logits of two pairs, and how the loss of the same cosines depends on the temperature."""
    left, right = plt.subplots(1, 2, figsize=(6.6, 2.4), layout="constrained", width_ratios=[1, 1.7])[1]
    rows, columns = ["image 1", "image 2"], ["caption 1", "caption 2"]
    figures.matrix(left, scale * image @ text.T, rows, columns, high=6, label="logit")
    left.set_title(f"logits, 1/τ = {scale:g}")
    scales = np.geomspace(0.1, 100, 60)
    right.plot(scales, [float(contrastive(image, text, float(s))) for s in scales], marker="")
    right.axhline(math.log(2), color=figures.FAINT, linestyle="--", marker="")
    right.text(0.1, math.log(2) + 0.02, "ln 2: equal scores", fontsize=7)
    for x, name in ((scale, "example"), (1 / 0.07, "start"), (100, "largest")):
        right.axvline(x, color=figures.FAINT, linestyle=":", marker="")
        right.text(x, 0.4, name + " ", fontsize=7, ha="right", rotation=90)
    right.set(xscale="log", xlabel="1/τ (no unit)", ylabel="$L_c$ (nats)", ylim=(0, 0.8))
    right.set_title("the same cosines, another temperature")


def draw_views(codes: Tensor, keys: Tensor, attention: Tensor) -> None:
    """Codes (arrows), tokens (dots) and answers of two views in the plane, and their attention "m n"."""
    left, right = plt.subplots(1, 2, figsize=(6.6, 2.6), layout="constrained", width_ratios=[1, 1.25])[1]
    near = {"xytext": (5, 4), "textcoords": "offset points", "fontsize": 7}
    for j, token in enumerate(keys.tolist()):
        left.plot(*token, "o", color=figures.INK, markersize=6)
        left.annotate(f"token {j + 1}", token, **near)
    for v, (code, answer) in enumerate(zip(codes.tolist(), (attention @ keys).tolist(), strict=True)):
        look = {
            "color": figures.PALETTE[v],
            "linestyle": ("-", "--")[v],
            "arrowstyle": "-|>",
            "linewidth": 1.6,
        }
        left.annotate("", code, (0, 0), arrowprops={**look, "shrinkA": 0, "shrinkB": 0})
        left.annotate(f"code {v + 1}", code, **near)
        left.plot(*answer, figures.MARKERS[v + 1], color=figures.PALETTE[v], markersize=7)
        left.annotate(f"answer {v + 1}", answer, **near)
    left.set(
        xlim=(-0.15, 2.6), ylim=(-0.15, 2.4), xlabel="first number", ylabel="second number", aspect="equal"
    )
    names = [f"token {j + 1}" for j in range(len(keys))]
    figures.matrix(right, attention, ["view 1", "view 2"], names, label="weight")
    right.set_title("A: every row sums to 1")


def draw_split(m: int, total_dim: int) -> None:
    """One projected state of `total_dim` numbers, as `split` cuts it for one view and for `m` views."""
    axes = plt.subplots(2, 1, figsize=(6.4, 1.5), layout="constrained", sharex=True)[1]
    for ax, views in zip(axes, (1, m), strict=True):
        width = total_dim // views
        for v in range(views):
            ax.barh(0, width, left=v * width, height=0.8, edgecolor="white", linewidth=1.5,
                    color=figures.PALETTE[0] if v % 2 == 0 else figures.PALETTE[3])  # fmt: skip
        ax.set_yticks([0], [f"{views} view{'s' * (views > 1)} of {width}"])
        ax.spines[:].set_visible(False)
        ax.tick_params(length=0)
    axes[1].set_xlabel("numbers of the projected state")
    axes[1].set_xticks([0, total_dim])


def draw_score(products: Tensor) -> None:
    """Products "m m" of all views of an image with all views of a caption, of which the diagonal alone is read."""
    figure, (left, right) = plt.subplots(
        1, 2, figsize=(7.2, 2.7), layout="constrained", width_ratios=[1.1, 1]
    )
    figure.get_layout_engine().set(wspace=0.08)
    own, names = products.diagonal(), [str(v + 1) for v in range(len(products))]
    low, high = min(0.0, float(products.min())), float(products.max())
    figures.matrix(left, products, names, low=low, high=high, label="contribution")
    for v in range(len(products)):
        left.add_patch(
            plt.Rectangle((v - 0.5, v - 0.5), 1, 1, fill=False, edgecolor=figures.PALETTE[4], linewidth=1.6)
        )
    left.set(xlabel="view of the caption", ylabel="view of the image", title="only the diagonal is read")
    right.bar(names, own, color=figures.PALETTE[0], edgecolor="white")
    right.axhline(0, color=figures.INK, linewidth=0.6, marker="")
    right.set(
        xlabel="view u", ylabel="$w_u \\cos(r_v^u, r_t^u)$", title=f"their sum is the score, {own.sum():.2f}"
    )


def draw_overlaps(attention: Tensor) -> None:
    """Attention "m n" of a few views, and the matrices that Eq. 10 and Eq. 11 compare with the identity."""
    axes = plt.subplots(1, 3, figsize=(7.6, 1.9), layout="constrained", width_ratios=[1.3, 1, 1])[1]
    views = [f"view {v + 1}" for v in range(len(attention))]
    named = [f"token {j + 1}" for j in range(attention.shape[1])]
    root_ = attention.sqrt()
    for ax, title, values, columns in (
        (axes[0], "A", attention, named),
        (axes[1], "Eq. 10: $A A^T$", attention @ attention.T, views),
        (axes[2], r"Eq. 11: $\sqrt{A}\sqrt{A}^T$", root_ @ root_.T, views),
    ):
        figures.matrix(ax, values, views, columns, label="weight" if title == "A" else "overlap")
        ax.set_title(title)


def draw_weight(costs: Mapping[str, float | int]) -> None:
    """What the terms of the loss cost at the start, on a logarithmic axis; the first bar is the contrastive loss."""
    ax = plt.subplots(figsize=(5.8, 2.0), layout="constrained")[1]
    bars = ax.barh(list(costs), list(costs.values()), edgecolor="white",
                   color=[figures.PALETTE[1], *[figures.PALETTE[0]] * (len(costs) - 1)])  # fmt: skip
    bars[0].set_hatch("///")
    for y, value in enumerate(costs.values()):
        ax.text(value * 1.1, y, f"{value:,.0f}" if value > 20 else f"{value:.2g}", va="center", fontsize=7)
    ax.invert_yaxis()
    low, high = min(costs.values()), max(costs.values())
    ax.set(xscale="log", xlim=(low / 4, 5 * high), xlabel="loss at the start of training (log scale)")


def draw_padding(naive: Tensor, cut: Tensor, real: int) -> None:
    """Mean attention on each token of a padded caption, without and with a mask; hatched bars are padding."""
    axes = plt.subplots(1, 2, figsize=(6.8, 2.0), layout="constrained", sharey=True)[1]
    names = ["start", "w1", "w2", "w3", "end", *["pad"] * (len(naive) - real)]
    for ax, title, mean in (
        (axes[0], "every position is taken for a word", naive),
        (axes[1], "mask cut after the end", cut),
    ):
        ax.bar(range(real), mean[:real], color=figures.PALETTE[0], edgecolor="white")
        ax.bar(range(real, len(mean)), mean[real:], color=figures.PALETTE[1], hatch="///", edgecolor="white")
        ax.set_xticks(range(len(mean)), names)
        ax.set_title(f"{title}: {100 * mean[real:].sum():.0f} % on padding", fontsize=8)
    axes[0].set_ylabel("attention, mean of 4 views")


def draw_verdicts(found: pd.DataFrame) -> None:
    """Differences here with their 95 % intervals: right of zero the claim holds, left of it it is contradicted."""
    if len(found):
        figures.intervals(found, xlabel="difference (points)")


# ------------------------------------------------------------------------------------------- the toy of section 9
def blobs(views: int, side: int, seed: int) -> Tensor:
    """Logits "1 m n" of broad bumps on a square arrangement of `side` x `side` cells, with a little noise."""
    per = math.isqrt(views)
    at, cells = (torch.arange(per) + 0.5) * side / per - 0.5, torch.arange(side).float()
    y, x = (c.reshape(views, 1, 1) for c in torch.meshgrid(at, at, indexing="ij"))
    squared = (cells[None, :, None] - y) ** 2 + (cells[None, None, :] - x) ** 2
    noise = torch.randn(views, side * side, generator=torch.Generator().manual_seed(seed))
    return (-squared.flatten(1) / (2 * (0.215 * side) ** 2) + 0.3 * noise)[None]


def _statistics(attention: Tensor) -> tuple[Tensor, Tensor]:
    return view_statistics(attention, torch.ones(attention.shape[0], attention.shape[2], dtype=torch.bool))


def spread(attention: Tensor) -> Tensor:
    """Entropy of each view as a share of the largest one, "m": 0 is one cell, 1 is all cells alike."""
    return _statistics(attention)[0]


def cells_used(attention: Tensor) -> Tensor:
    """Over how many cells each view is spread, "m": the exponential of its entropy."""
    return attention.shape[2] ** spread(attention)


def overlap(attention: Tensor) -> float:
    """The mean overlap of two different views: 0 is apart, 1 is the same."""
    found = _statistics(attention)[1]
    return float(found[~torch.eye(len(found), dtype=torch.bool)].mean())


def draw_toy(started: Tensor, ended: Mapping[tuple[str, float], Tensor]) -> None:
    """All views before and after: each small square is a view; below left, over how many cells each is spread.

    Args:
        ended: attention "1 m n" by variant and pull; the first pull is none.
    """
    axes = plt.subplots(2, 3, figsize=(7.0, 4.9), layout="constrained")[1]
    titles = {"base": "Eq. 10, base", "sqrt": "Eq. 11, square root"}
    _mosaic(axes[0, 0], started, "the start")
    for at, ((variant, pull), attention) in enumerate(ended.items()):
        _mosaic(axes[at // 2, 1 + at % 2], attention, titles[variant] + (", with pull" if pull else ""))
    ax, views, cells = axes[1, 0], *started.shape[1:]
    for at, ((variant, _), attention) in enumerate(ended.items()):
        kind = variant == "sqrt"
        ax.plot(at + np.linspace(-0.18, 0.18, views), cells_used(attention).sort().values, figures.MARKERS[kind],
                color=figures.PALETTE[kind], markersize=3)  # fmt: skip
    ax.axhline(cells / views, color=figures.FAINT, linestyle="--", marker="")
    ax.text(-0.45, cells / views * 1.1, "an equal share", fontsize=7)
    ax.set(yscale="log", ylim=(0.9, 1.4 * cells), xlim=(-0.5, 3.5), ylabel="cells per view (log scale)")
    ax.yaxis.set_major_formatter("{x:g}")
    ax.set_xticks(range(4), ["Eq. 10", "Eq. 11", "10\n+ pull", "11\n+ pull"])


def _mosaic(ax: plt.Axes, attention: Tensor, title: str) -> None:
    """All views side by side, each scaled to its own largest weight; white between them."""
    per, side = math.isqrt(attention.shape[1]), math.isqrt(attention.shape[2])
    sheet = np.full((per * (side + 1) - 1,) * 2, np.nan)
    for v, view in enumerate(attention[0]):
        r, c = (side + 1) * (v // per), (side + 1) * (v % per)
        sheet[r : r + side, c : c + side] = (view / view.max()).reshape(side, side)
    heat = plt.get_cmap("magma").copy()
    heat.set_bad("white")
    ax.imshow(sheet, cmap=heat, vmin=0, vmax=1)
    measured = f"{cells_used(attention).mean():.1f} cells per view, overlap {overlap(attention):.2f}"
    ax.set_title(f"{title}\n{measured}", fontsize=8)
    ax.set_axis_off()
