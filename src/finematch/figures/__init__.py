"""House style, overlays of attention, boxes and words, plots, deterministic save; readable in greyscale.

Nothing here knows a method: a map is boxes with weights, whether they are cells, patches or regions. Warm
shades are attention, cool shades are overlaps; what colour tells, a marker, a hatch or a mark tells too.

Boxes are (x1, y1, x2, y2) in pixels of the picture that they are drawn on. A picture is a PIL image or an
array "h w 3", bytes or floats in [0, 1]. Axes of arrays: `r` boxes, `h` `w` pixels.
"""

from __future__ import annotations

import io
import re
import sys
import textwrap
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from itertools import zip_longest
from pathlib import Path

import matplotlib as mpl
import numpy as np
from jaxtyping import Float
from matplotlib import patheffects
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
from matplotlib.text import Text
from matplotlib.ticker import MaxNLocator
from PIL import Image

from finematch.data.images import open_rgb
from finematch.files import write_atomically

# Okabe and Ito's colours in an order whose lightness alternates; markers and hatches go with them.
PALETTE = ("#0072B2", "#E69F00", "#332288", "#56B4E9", "#882255", "#009E73")
MARKERS = ("o", "D", "s", "^", "v", "P")
HATCHES = ("", "///", "...", "xx", "\\\\\\", "++")
DASHES = ("-", "--", ":", "-.")
RIGHT, WRONG = PALETTE[0], "#D55E00"
INK, FAINT = "#1f2328", "#8c959f"
HEAT, COOL, SIGNED = "YlOrBr", "YlGnBu", "PuOr"  # a signed matrix is white in the middle
HOUSE = {
    "font.family": "DejaVu Sans", "font.size": 9, "axes.titlesize": 9, "axes.labelsize": 9,
    "xtick.labelsize": 8, "ytick.labelsize": 8, "legend.fontsize": 8, "figure.titlesize": 11,
    "axes.titlelocation": "left", "text.color": INK, "axes.labelcolor": INK, "axes.edgecolor": FAINT,
    "xtick.color": INK, "ytick.color": INK, "axes.spines.top": False, "axes.spines.right": False,
    "axes.linewidth": 0.8, "axes.axisbelow": True, "axes.grid": False, "grid.color": "#d8dee4",
    "grid.linewidth": 0.6, "legend.frameon": False, "lines.linewidth": 1.5, "lines.markersize": 5,
    "axes.prop_cycle": mpl.cycler(color=PALETTE, marker=MARKERS), "hatch.linewidth": 0.6,
    "figure.figsize": (6.4, 3.2), "figure.dpi": 110, "figure.facecolor": "white", "savefig.dpi": 160,
    "savefig.facecolor": "white", "svg.fonttype": "path",
    "text.hinting": "no_hinting",  # words laid out at one resolution keep their places at another
}  # fmt: skip


# ------------------------------------------------------------------------------------------- style and saving
def style() -> ExitStack:
    """Set the house style from here on; as `with style():` only inside the block.

    In a notebook's kernel figures appear in the page, also where MPLBACKEND=agg is set, as batch machines have it.
    """
    kernel = sys.modules.get("ipykernel.kernelapp")
    if kernel and kernel.IPKernelApp.initialized() and mpl.get_backend().lower() == "agg":
        kernel.IPKernelApp.instance().shell.run_line_magic("matplotlib", "inline")
    before = {name: value for name, value in mpl.rcParams.items() if name != "backend"}
    mpl.rcParams.update(HOUSE)
    undo = ExitStack()
    undo.callback(mpl.rcParams.update, before)
    return undo


def save(figure: Figure, path: str | Path) -> Path:
    """Write an SVG or PNG whose bytes depend on the figure alone: no date, no random ids; atomically.

    Raises:
        ValueError: For another suffix.
        DataError: If it cannot be written.
    """
    path = Path(path)
    kind = path.suffix.lstrip(".")
    if kind not in ("svg", "png"):
        raise ValueError(f"{path} ends in {path.suffix!r}: figures are saved as .svg or .png")
    metadata = {"svg": {"Date": None, "Creator": "finematch"}, "png": {"Software": None}}[kind]
    content = io.BytesIO()
    with mpl.rc_context({"svg.hashsalt": "finematch"}):
        figure.savefig(content, format=kind, metadata=metadata, bbox_inches="tight", pad_inches=0.08)
    write_atomically(path, lambda part: part.write_bytes(content.getvalue()))
    return path


def plain(text: str) -> str:
    """Text as it stands, for matplotlib: it would set what lies between two dollar signs as a formula."""
    return re.sub(r"(?<!\\)\$", r"\\$", text)


# ------------------------------------------------------------------------------------------- on pictures
def as_array(picture: Image.Image | np.ndarray) -> Float[np.ndarray, "h w 3"]:
    """RGB in [0, 1] from a PIL image or an array; ValueError for anything else."""
    if isinstance(picture, Image.Image):
        picture = np.asarray(picture.convert("RGB"))
    array = np.asarray(picture)
    if array.ndim != 3 or array.shape[2] != 3 or not array.size:
        raise ValueError(f"a picture has the shape (h, w, 3), not {array.shape}")
    if array.dtype == np.uint8:
        return array.astype(np.float32) / 255
    array = array.astype(np.float32)
    if not (np.isfinite(array).all() and array.min() >= 0 and array.max() <= 1):
        raise ValueError("a picture of floats lies in [0, 1]; give bytes (uint8) for 0 to 255")
    return array


def density(boxes, weights, width: int, height: int) -> Float[np.ndarray, "h w"]:
    """Weight by pixel: each box spreads its weight evenly over its area, and where boxes overlap they add up.

    The sum over all pixels is the sum of the weights; a pixel that an edge cuts receives its share. One large
    region and the small ones inside it are thus drawn by what each says of a pixel.

    Args:
        boxes: "r 4", xyxy pixels inside the picture.
        weights: "r", not negative.

    Raises:
        ValueError: For lengths that differ, a box outside the picture or without area, a weight that is
            negative or not finite.
    """
    boxes, weights = _boxes(boxes, width, height), np.asarray(weights, np.float64)
    if weights.shape != (len(boxes),):
        raise ValueError(f"{len(boxes)} boxes, but weights of shape {weights.shape}: one weight a box")
    if not (np.isfinite(weights).all() and (weights >= 0).all()):
        raise ValueError("weights are finite and not negative: give attention after its softmax")

    def covered(low: np.ndarray, high: np.ndarray, size: int) -> np.ndarray:
        """Length of each pixel "r size" that lies between the edges."""
        at = np.arange(size)
        return np.clip(np.minimum(high[:, None], at + 1) - np.maximum(low[:, None], at), 0, 1)

    x1, y1, x2, y2 = boxes.T
    per_area = weights / ((x2 - x1) * (y2 - y1))
    return np.einsum("r,rh,rw->hw", per_area, covered(y1, y2, height), covered(x1, x2, width))


def show_picture(ax: Axes, picture) -> tuple[int, int]:
    """Draw a picture in pixel coordinates, without axes. Returns its width and height in pixels."""
    array = as_array(picture)
    height, width = array.shape[:2]
    # small pictures are enlarged by whole numbers, so that no resampling makes their pixels unequal
    sharp = array.repeat(max(1, 256 // max(width, height)), axis=0).repeat(
        max(1, 256 // max(width, height)), axis=1
    )
    ax.imshow(sharp, extent=(0, width, height, 0), interpolation="auto")
    ax.set_axis_off()
    return width, height


def show_attention(
    ax: Axes, picture, boxes, weights, *, top: float | None = None
) -> Float[np.ndarray, "h w"]:
    """One attention map over a picture: grey and dark without weight, bright and warm with it.

    Args:
        boxes, weights: see `density`; cells that tile the picture or regions that overlap.
        top: the density that is drawn at full heat, to compare several maps; by default the map's own
            largest, but at least three times its mean: a view that spreads evenly stays pale.

    Returns:
        The map in [0, 1] as drawn, "h w".

    Raises:
        ValueError: As `density`; a `top` that is not positive.
    """
    array = as_array(picture)
    found = density(boxes, weights, array.shape[1], array.shape[0])
    top = max(float(found.max()), 3 * float(found.mean())) if top is None else top
    if not top > 0:
        raise ValueError(f"top is {top}: there is no weight to draw")
    heat = np.clip(found / top, 0, 1)
    lit = heat[..., None].astype(np.float32)
    dimmed = 0.1 + 0.38 * (array @ np.array([0.299, 0.587, 0.114], np.float32))[..., None]
    warm = mpl.colormaps["inferno"](0.35 + 0.55 * heat)[..., :3].astype(np.float32)
    ground = (1 - lit) * dimmed + lit * array  # what is attended keeps its own colours under the tint
    veil = 0.55 * np.minimum(1, 2 * lit)
    show_picture(ax, (1 - veil) * ground + veil * warm)
    return heat


def show_boxes(
    ax: Axes, picture, boxes, weights=None, labels: Sequence[str] | None = None
) -> list[Rectangle]:
    """Boxes on a picture; a weight makes the line thicker, a label stands on the top left corner, or in it where the
    box begins at the top of the picture, for a title stands above.

    Boxes differ in colour and in dashes. Raises ValueError as `density`, and for a wrong number of labels.
    """
    array = as_array(picture)
    width, height = show_picture(ax, array)
    boxes = _boxes(boxes, width, height)
    share = np.ones(len(boxes)) if weights is None else np.asarray(weights, float)
    if share.shape != (len(boxes),) or (labels is not None and len(labels) != len(boxes)):
        raise ValueError(f"{len(boxes)} boxes, but weights of shape {share.shape} and "
                         f"{'no' if labels is None else len(labels)} labels: one of each a box")  # fmt: skip
    if not (np.isfinite(share).all() and (share >= 0).all()):
        raise ValueError("weights are finite and not negative")
    share = share / max(share.max(initial=0), 1e-12)
    drawn = []
    for i, ((x1, y1, x2, y2), weight) in enumerate(zip(boxes, share, strict=True)):
        line = Rectangle(
            (x1, y1), x2 - x1, y2 - y1, fill=False, edgecolor=PALETTE[i % len(PALETTE)], clip_on=False,
            linewidth=0.6 + 1.9 * weight, alpha=0.35 + 0.65 * weight, linestyle=DASHES[i // 2 % len(DASHES)],
            path_effects=[patheffects.withStroke(linewidth=1.6 + 1.9 * weight, foreground="white")],
        )  # fmt: skip
        ax.add_patch(line)
        drawn.append(line)
        if labels is not None:
            ax.text(
                x1, y1, plain(labels[i]), fontsize=7, va="bottom" if y1 > height / 15 else "top", ha="left",
                clip_on=False, color=INK,
                bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 0.8},
            )  # fmt: skip
    return drawn


def _boxes(boxes, width: int, height: int) -> np.ndarray:
    """Boxes "r 4" as float64, clipped to the picture; ValueError unless they are xyxy boxes inside it."""
    boxes = np.asarray(boxes, np.float64)
    if boxes.ndim != 2 or boxes.shape[1] != 4:
        raise ValueError(f"boxes have the shape (r, 4), not {boxes.shape}")
    for i, (x1, y1, x2, y2) in enumerate(boxes):
        if not (np.isfinite(boxes[i]).all() and x1 < x2 and y1 < y2):
            raise ValueError(f"box {i} is no xyxy box with an area: {boxes[i].tolist()}")
        if x1 < -1 or y1 < -1 or x2 > width + 1 or y2 > height + 1:
            raise ValueError(f"box {i} {boxes[i].tolist()} lies outside the {width} x {height} picture: "
                             "scale it to the pixels of this picture")  # fmt: skip
    return boxes.clip(0, [width, height, width, height])


# ------------------------------------------------------------------------------------------- on words
def show_words(
    ax: Axes,
    words: Sequence[str],
    weights,
    *,
    top: float | None = None,
    size: float = 9.0,
    smallest: float = 5.0,
) -> list[Text]:
    """A caption whose words are shaded by weight, wrapped to the width of the axes.

    Words are laid out by the size that they really have on the page. Where the lines need more height than
    there is, the font shrinks, but not below `smallest` points.

    Args:
        words: in order; weights: one each, not negative.
        top: the weight that is shaded fully; by default the largest here, but at least three times the mean.

    Raises:
        ValueError: For no words, lengths that differ, negative or non-finite weights, or a caption that does
            not fit at the smallest size.
    """
    weights = np.asarray(weights, float)
    if not len(words) or weights.shape != (len(words),):
        raise ValueError(f"{len(words)} words, but weights of shape {weights.shape}: one weight a word")
    if not (np.isfinite(weights).all() and (weights >= 0).all()):
        raise ValueError("weights are finite and not negative: give attention after its softmax")
    top = max(float(weights.max()), 3 * float(weights.mean())) if top is None else top
    shades = np.clip(weights / max(top, 1e-12), 0, 1)
    ax.set_axis_off()
    ax.set(xlim=(0, 1), ylim=(0, 1))
    figure = ax.figure
    if figure.get_layout_engine() is not None:
        figure.draw_without_rendering()  # where the axes lie is known once the layout has been made
    renderer, frame = figure.canvas.get_renderer(), ax.get_window_extent()
    texts = []
    for word, shade in zip(words, shades, strict=True):
        colour = mpl.colormaps[HEAT](0.85 * shade)
        dark = np.dot(colour[:3], (0.299, 0.587, 0.114)) < 0.55
        texts.append(
            ax.text(
                0, 0, plain(word), fontsize=size, va="baseline", ha="left", color="white" if dark else INK,
                bbox={"boxstyle": "round,pad=0.12,rounding_size=0.15", "edgecolor": "none",
                      "facecolor": (*colour[:3], min(1, 3 * shade))},
            )
        )  # fmt: skip
        texts[-1].set_in_layout(False)
    while not _flow(texts, renderer, frame):
        size -= 0.5
        if size < smallest:
            for text in texts:
                text.remove()
            raise ValueError(f"{' '.join(words)!r} does not fit {frame.width:.0f} x {frame.height:.0f} px at "
                             f"{smallest} points: make the axes larger")  # fmt: skip
        for text in texts:
            text.set_fontsize(size)
    return texts


def _flow(texts: list[Text], renderer, frame) -> bool:
    """Put texts in lines from the top left of `frame` (display pixels); False if they don't fit."""
    em = texts[0].get_fontsize() * renderer.points_to_pixels(1.0)
    gap, line = 0.5 * em, 1.65 * em
    x, y, fits = 0.0, 1.15 * em, True
    for text in texts:
        wide = text.get_window_extent(renderer).width
        if x and x + wide > frame.width:
            x, y = 0.0, y + line
        fits &= wide <= frame.width
        text.set_position((x / frame.width, 1 - y / frame.height))
        x += wide + gap
    return bool(fits and y + 0.35 * em <= frame.height)


# ------------------------------------------------------------------------------------------- retrieval
def retrieval_strip(
    axes,
    query: str,
    picture: Callable[[int], Image.Image],
    scores,
    true_index: int,
    *,
    note: Callable[[int], str] = lambda index: "",
) -> int:
    """A caption and the pictures that a model ranks first for it, with the right one marked.

    The right picture has a thick solid frame and a tick, a wrong one a thin dashed frame and a cross. Where
    the right one is not among the first, it stands apart in the last axes with its rank.

    Args:
        axes: one for the query, one for each of the top pictures, one for the right picture if it is missed.
        picture: gives picture number i of the gallery; called only for what is drawn.
        scores: "b", of every picture of the gallery for this query, higher is better.
        true_index: the right picture's number in the gallery.
        note: a few words under picture i, after its score.

    Returns:
        The rank of the right picture, from 1; ties count against the model.

    Raises:
        ValueError: For fewer than three axes, scores that are not finite, a `true_index` outside the gallery.
    """
    scores, axes = np.asarray(scores, float), list(axes)
    if len(axes) < 3:
        raise ValueError(f"{len(axes)} axes: one for the query, at least one for a picture, one for a miss")
    if scores.ndim != 1 or not np.isfinite(scores).all():
        raise ValueError(f"scores are finite, one a picture; got the shape {scores.shape}")
    if not 0 <= true_index < len(scores):
        raise ValueError(f"true_index = {true_index}, but the gallery has pictures 0 to {len(scores) - 1}")
    others = np.delete(np.arange(len(scores)), true_index)
    rank = 1 + int((scores[others] >= scores[true_index]).sum())
    # the right picture after those that tie with it, as its rank says
    order = sorted(range(len(scores)), key=lambda i: (-scores[i], i == true_index, i))
    head, *shown, missed = axes
    head.set_axis_off()
    wrapped = head.text(
        0, 0.5, plain(query), va="center", ha="left", fontsize=9, wrap=True, transform=head.transAxes
    )
    wrapped._get_wrap_line_width = lambda: (
        head.get_window_extent().width
    )  # matplotlib wraps at the figure's edge
    for place, (ax, index) in enumerate(zip(shown, order, strict=False), start=1):
        _framed(ax, picture(index), index == true_index)
        _under(ax, f"{place}.  {scores[index]:.2f}", note(index))
    for ax in (*shown[len(scores) :], missed):
        ax.set_axis_off()
    if rank > len(shown):
        _framed(missed, picture(true_index), True)
        _under(missed, f"{rank}.  {scores[true_index]:.2f}", note(true_index))
    return rank


def _framed(ax: Axes, picture, right: bool) -> None:
    width, height = show_picture(ax, picture)
    colour, mark = (RIGHT, "✓") if right else (WRONG, "✗")
    ax.add_patch(
        Rectangle((0, 0), width, height, fill=False, edgecolor=colour, linewidth=3 if right else 1.2,
                  linestyle="-" if right else (0, (3, 2)), clip_on=False)
    )  # fmt: skip
    ax.text(
        0.97, 0.97, mark, transform=ax.transAxes, ha="right", va="top", fontsize=8, color="white",
        weight="bold",
        bbox={"boxstyle": "round,pad=0.15", "facecolor": colour, "edgecolor": "white", "linewidth": 0.6},
    )  # fmt: skip


def _under(ax: Axes, text: str, note: str) -> None:
    ax.text(
        0,
        -0.04,
        plain(f"{text}\n{note}" if note else text),
        transform=ax.transAxes,
        va="top",
        ha="left",
        fontsize=7,
    )


def looks(picture, found, *, most: int = 6) -> Figure:
    """Where a model looked for a sentence: a panel for each of the first `most` looks.

    Attention (weights of a sum of at most one: a part may rest on a special token) is drawn as a map, other weights by
    their three best boxes.

    Args:
        picture: the image, or its file.
        found: the `Match` of `finematch.explore.match`.
    """
    if isinstance(picture, (str, Path)):
        picture = open_rgb(Path(picture))
    drawn = found.looks[:most]
    columns = max(min(len(drawn), 3), 1)
    rows = max(-(-len(drawn) // columns), 1)
    size = (2.4 * columns, 2.4 * rows + 0.5)
    figure, axes = plt.subplots(rows, columns, figsize=size, layout="constrained", squeeze=False)
    for ax, one in zip_longest(axes.flat, drawn):
        if one is None:
            ax.set_axis_off()
            continue
        weights = np.asarray(one.weights, float)
        if (weights >= 0).all() and weights.sum() <= 1.01:
            show_attention(ax, picture, one.boxes, weights)
        else:
            best = np.argsort(-weights, kind="stable")[:3]
            show_boxes(ax, picture, one.boxes[best], labels=[f"{weight:.2f}" for weight in weights[best]])
        ax.set_title(plain(one.label))
    if not drawn:
        show_picture(axes[0, 0], picture)
    figure.suptitle(
        textwrap.fill(plain(f"“{found.sentence}”  score {found.score:.3f}"), 30 * columns), fontsize=9
    )
    return figure


# ------------------------------------------------------------------------------------------- plots
def matrix(
    ax: Axes,
    values,
    rows: Sequence[str],
    columns: Sequence[str] | None = None,
    *,
    low: float = 0.0,
    high: float = 1.0,
    label: str = "",
    signed: bool = False,
) -> None:
    """A matrix as shades, dark is much, with a colour bar; numbers stand in cells that have room for them.

    With `signed` the middle of the range is white, and both of its ends are dark, in two colours.

    Raises ValueError for labels that are not one a row (and column), values not finite, or `low >= high`.
    """
    values = np.asarray(values, float)
    columns = rows if columns is None else columns
    if values.shape != (len(rows), len(columns)):
        raise ValueError(f"values of shape {values.shape} for {len(rows)} rows and {len(columns)} columns")
    if not np.isfinite(values).all() or not low < high:
        raise ValueError(f"values are finite, and low = {low} is below high = {high}")
    drawn = ax.imshow(values, cmap=SIGNED if signed else COOL, vmin=low, vmax=high)
    ax.set_xticks(range(len(columns)), [plain(name) for name in columns])
    ax.set_yticks(range(len(rows)), [plain(name) for name in rows])
    ax.tick_params(length=0)
    ax.spines[:].set_visible(False)
    if ax.get_position().width * ax.figure.get_figwidth() / len(columns) > 0.27:  # inches: room for a number
        for i, j in np.ndindex(*values.shape):
            share = (values[i, j] - low) / (high - low)
            dark = abs(2 * share - 1) > 0.7 if signed else share > 0.55
            ax.text(
                j,
                i,
                f"{values[i, j]:.2f}",
                ha="center",
                va="center",
                fontsize=6.5,
                color="white" if dark else INK,
            )
    bar = ax.figure.colorbar(drawn, ax=ax, fraction=0.046, pad=0.03, label=label)
    bar.outline.set_visible(False)


def bars(ax: Axes, labels: Sequence[str], groups: Mapping, *, errors=None, ylabel: str = "") -> None:
    """Grouped bars, groups told apart by colour and hatch; `errors` has half-lengths in the same layout.

    Raises:
        ValueError: For no groups, more groups than hatches, or lengths that differ.
    """
    if not 0 < len(groups) <= len(HATCHES):
        raise ValueError(f"{len(groups)} groups: 1 to {len(HATCHES)} can be told apart")
    width = 0.8 / len(groups)
    for k, (name, values) in enumerate(groups.items()):
        if len(values) != len(labels) or (errors is not None and len(errors[name]) != len(labels)):
            raise ValueError(f"{len(labels)} labels, but {len(values)} values of {name!r}")
        at = np.arange(len(labels)) + (k - (len(groups) - 1) / 2) * width
        spread = None if errors is None else errors[name]
        ax.bar(at, values, 0.9 * width, yerr=spread, capsize=2.5, label=name, color=PALETTE[k],
               hatch=HATCHES[k], edgecolor="white", ecolor=INK)  # fmt: skip
    ax.set_xticks(range(len(labels)), labels)
    ax.set_ylabel(ylabel)
    ax.grid(axis="y")
    if len(groups) > 1:
        ax.legend(loc="best")


def beside(
    frame,
    columns: Sequence[str],
    *,
    data: tuple[str, str] = ("published", "measured"),
    runs: Mapping[str, Mapping[str, Sequence[float]]] | None = None,
    dashes: Mapping[str, tuple[str, Sequence[float]]] | None = None,
    lines: Mapping[str, float] | None = None,
    rows: str = "",
    label: str = "",
) -> Figure:
    """A table as a figure: of each column one panel with the published and one with the measured numbers.

    The rows stand in one order in all panels, and each panel has a scale of its own: shapes can be compared, levels
    cannot. A panel without any number is left out.

    Args:
        frame: rows `row`, `<column> published`, `<column> measured`, `<column> measured sd` (`tables.beside`).
        columns: what is drawn, left to right.
        data: what the published and the measured numbers are of; it stands in the titles.
        runs: by column and row, the value of every seed: small dots.
        dashes: by column, a name and one value per row: short strokes.
        lines: by column, a value that is drawn across (a random order's).
        rows, label: labels of the rows and of the numbers.
    """
    frame = frame.reset_index(drop=True)
    names = [textwrap.fill(plain(str(row)), 30) for row in frame["row"]]
    sides = ("published", "measured")
    drawn = [
        (column, side) for column in columns for side in sides if frame[f"{column} {side}"].notna().any()
    ]
    drawn = drawn or [(column, "measured") for column in columns]
    at = np.arange(len(names))
    widest = max((len(part) for name in names for part in name.split("\n")), default=0)
    size = (
        0.6 + 0.075 * widest + 2.1 * len(drawn),
        1.5 + 0.17 * sum(name.count("\n") + 1.3 for name in names),
    )
    figure, panels = plt.subplots(
        1, len(drawn), figsize=size, sharey=True, layout="constrained", squeeze=False
    )
    for ax, (column, side) in zip(panels[0], drawn, strict=True):
        values = frame[f"{column} {side}"].astype(float)
        if side == "published":
            ax.plot(
                values,
                at,
                "D",
                color=PALETTE[1],
                markerfacecolor="white",
                markeredgewidth=1.5,
                label="published",
            )
        else:
            if lines and column in lines:
                ax.axvline(
                    lines[column], color=INK, linestyle="--", linewidth=1, marker="", label="a random order"
                )
            spread = frame[f"{column} measured sd"].fillna(0)
            ax.errorbar(
                values, at, xerr=spread, fmt="o", color=PALETTE[0], capsize=3, label="measured, mean ± sd"
            )
            of_row = (runs or {}).get(column, {})
            found = [(one, k) for k, row in enumerate(frame["row"]) for one in of_row.get(row, ())]
            if found:
                ax.plot(
                    *zip(*found, strict=True), "o", color=INK, markersize=2.2, alpha=0.6, label="one seed"
                )
            if dashes and column in dashes:
                name, also = dashes[column]
                ax.plot(
                    np.asarray(also, float),
                    at,
                    "|",
                    color=INK,
                    markersize=11,
                    markeredgewidth=1.5,
                    label=name,
                )
        title = [*textwrap.wrap(column, 24), *textwrap.wrap(data[sides.index(side)], 24)]
        ax.set_title(plain("\n".join(title)))
        ax.set(xlabel=label, ylim=(len(names) - 0.5, -0.5))
        ax.set_yticks(at, names)
        ax.tick_params(axis="y", length=0)
        ax.xaxis.set_major_locator(MaxNLocator(4))
        ax.margins(x=0.12)
        ax.grid()
    panels[0, 0].set_ylabel(rows)
    named = {
        name: handle for ax in panels[0] for handle, name in zip(*ax.get_legend_handles_labels(), strict=True)
    }
    first = [name for name in ("published", "measured, mean ± sd") if name in named]
    handles = {name: named[name] for name in dict.fromkeys([*first, *named])}
    figure.legend(
        handles.values(), handles, loc="outside lower center", ncols=min(len(handles), 2 * len(drawn))
    )
    return figure


def intervals(frame, *, data: str = "", xlabel: str = "difference") -> Figure:
    """Differences with their intervals, one line per claim, one panel per metric.

    Args:
        frame: rows `claim`, `metric`, `difference`, `lower`, `upper`, `verdict` (`tables.verdicts`); lines
            without an interval are left out. A `verdict` "published" is a printed difference, without an interval.
        data: what the numbers are of; it stands in the titles.

    Raises:
        ValueError: no line has an interval.
    """
    frame = frame[frame["lower"].notna()]
    if not len(frame):
        raise ValueError("no line of the frame has an interval to draw")
    claims, metrics = list(dict.fromkeys(frame["claim"])), list(dict.fromkeys(frame["metric"]))
    names = {claim: textwrap.fill(plain(claim), 56) for claim in claims}
    widest = max(len(part) for name in names.values() for part in name.split("\n"))
    wide = 2.2 if len(metrics) <= 4 else 1.75
    height = 1.3 + 0.16 * sum(1.7 + name.count("\n") for name in names.values())
    size = (0.066 * widest + wide * len(metrics), height)
    figure, panels = plt.subplots(1, len(metrics), figsize=size, sharey=True, layout="constrained")
    look = {
        "holds": ("o", PALETTE[0], PALETTE[0]),
        "contradicted": ("X", WRONG, WRONG),
        "undecided": ("s", FAINT, "white"),
        "published": ("D", PALETTE[1], "white"),
    }
    for ax, metric in zip(np.atleast_1d(panels), metrics, strict=True):
        ax.axvline(0, color=INK, linewidth=0.8, marker="")
        for line in frame[frame["metric"] == metric].to_dict("records"):
            marker, colour, face = look[line["verdict"]]
            at, y = line["difference"], claims.index(line["claim"])
            ax.plot([line["lower"], line["upper"]], [y, y], color=colour, linewidth=1.4, marker="")
            ax.plot([at], [y], marker=marker, color=colour, markerfacecolor=face, linestyle="")
        title = [*textwrap.wrap(metric.replace("_", " "), 12 * wide), *textwrap.wrap(data, 12 * wide)]
        ax.set(title=plain("\n".join(title)), xlabel=xlabel)
        ax.xaxis.set_major_locator(MaxNLocator(4))
        ax.grid(axis="x")
        ax.tick_params(axis="y", length=0)
    first = np.atleast_1d(panels)[0]
    first.set_yticks(range(len(claims)), list(names.values()))
    first.set_ylim(len(claims) - 0.5, -0.5)
    drawn = [verdict for verdict in look if verdict in set(frame["verdict"])]
    handles = [Line2D([], [], marker=look[v][0], color=look[v][1], markerfacecolor=look[v][2]) for v in drawn]
    figure.legend(handles, drawn, loc="outside lower center", ncols=len(drawn))
    return figure


def levels(frame, metrics: Sequence[str] = ("pointing", "R@1"), *, data: str = "") -> Figure:
    """How well the boxes of each level find annotated phrases: one panel per metric.

    Args:
        frame: lines of one row of `tables.grounding` that has levels.
        data: what the numbers are of; it stands in the titles.
    """
    figure, panels = plt.subplots(1, len(metrics), figsize=(9.5, 3.4), layout="constrained")
    drawn = (("upper bound", "upper bound (oracle)", PALETTE[2], "-", "^"), ("", "trained", PALETTE[0], "-", "o"),
             ("before", "before training", PALETTE[1], "--", "D"), ("chance", "a random box", INK, ":", ""),
             ("centre", "the image's middle", FAINT, "-.", ""))  # fmt: skip
    for ax, metric in zip(np.atleast_1d(panels), metrics, strict=True):
        for which, name, colour, dash, marker in drawn:
            column = f"{metric}, {which}" if which else metric
            spread = frame[f"{column} sd"].fillna(0) if which in ("", "before") else None
            at = frame["level"] + 0.04 * ((marker == "D") - (marker == "o"))
            look = {"color": colour, "linestyle": dash, "marker": marker, "capsize": 3, "label": name}
            ax.errorbar(at, frame[column], spread, **look)
        ax.set_xticks(frame["level"], ["proposals" if level == 0 else str(level) for level in frame["level"]])
        ax.set(xlabel="level", ylabel=f"{metric} (%)", title=data)
        ax.set_ylim(bottom=0)
        ax.grid(axis="y")
    figure.legend(
        *np.atleast_1d(panels)[0].get_legend_handles_labels(), loc="outside lower center", ncols=len(drawn)
    )
    return figure
