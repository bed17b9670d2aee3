"""The explorer's pictures: where a model looked for one sentence, drawn from what `finematch.explore` found, fast.

Every method has a picture that its sliders change (`..._focus`), and most have one that the sentence alone changes
(`..._whole`), so that a slider redraws no more than it must. `png` makes the bytes; nothing is saved and pyplot keeps
nothing. What colour tells, a number or a dash tells too.
"""

from __future__ import annotations

import io
import textwrap
from collections.abc import Callable, Sequence

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from PIL import Image

from finematch import figures as draw

DPI = 100


def png(make: Callable[[Figure], None], width: float, height: float) -> bytes:
    """The bytes of a figure of so many inches in the house style, as `make` fills it."""
    with mpl.rc_context(draw.HOUSE):
        figure = Figure(figsize=(width, height), dpi=DPI)
        FigureCanvasAgg(figure)
        make(figure)
        content = io.BytesIO()
        figure.savefig(
            content, format="png", dpi=DPI, metadata={"Software": None}, pil_kwargs={"compress_level": 1}
        )
    return content.getvalue()


def small(picture: Image.Image, side: int = 320) -> tuple[Image.Image, float]:
    """A picture no larger than it is drawn, and the factor for its boxes: photos of millions of pixels draw slowly."""
    factor = min(1.0, side / max(picture.size))
    if factor == 1:
        return picture, 1.0
    return picture.resize([max(1, round(n * factor)) for n in picture.size]), factor


def _on(ax: Axes, picture: Image.Image, boxes: np.ndarray, weights: np.ndarray) -> None:
    """Attention on a picture, whose boxes are in its own pixels."""
    shown, factor = small(picture)
    boxes, size = np.asarray(boxes) * factor, np.tile(shown.size, 2)
    real = (np.minimum(boxes, size)[:, 2:] > np.maximum(boxes, 0)[:, :2]).all(1)
    weights = np.clip(weights, 0, None)[real]
    if len(weights) and weights.any():
        draw.show_attention(ax, shown, boxes[real], weights)
    else:
        draw.show_picture(ax, shown)
    ax.set_anchor("NW")  # the title of a narrow image stays in its column


def _marked(ax: Axes, picture: Image.Image, boxes: np.ndarray, labels: Sequence[str], weights=None) -> None:
    """Boxes with labels on a picture, the first box on top."""
    shown, factor = small(picture)
    boxes = np.clip(np.asarray(boxes).reshape(-1, 4) * factor, 0, np.tile(shown.size, 2))
    for order, line in enumerate(draw.show_boxes(ax, shown, boxes, weights)):
        line.set_zorder(3 - 0.01 * order)
    ax.set_anchor("NW")
    for order, (label, (x1, y1, x2, y2)) in enumerate(zip(labels, boxes, strict=True)):
        right, low = (
            order % 2,
            order // 2 % 2 == 1,
        )  # labels of boxes that lie on one another are at other corners
        top = (
            "top" if y1 < 0.06 * shown.height else "bottom"
        )  # inside, where the image's edge would cut it off
        ax.text(x2 if right else x1, y2 if low else y1, draw.plain(label), fontsize=7, zorder=5, color=draw.INK,
                ha="right" if right else "left", va="bottom" if low else top,
                bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 0.8})  # fmt: skip


def _bars(ax: Axes, names: Sequence[str], values: np.ndarray, notes: Sequence[str] | None = None) -> None:
    """Horizontal bars from zero, the first on top, with their numbers."""
    at, values = np.arange(len(names)), np.asarray(values, float)
    ax.barh(at, values, color=[draw.PALETTE[0] if v >= 0 else draw.PALETTE[1] for v in values],
            hatch=["" if v >= 0 else "///" for v in values], edgecolor="white", linewidth=0.3)  # fmt: skip
    ax.axvline(0, color=draw.INK, linewidth=0.6)
    size = 8.0 if len(names) <= 14 else 6.5 if len(names) <= 24 else 5.0
    _names(ax, names, size)
    ax.set_ylim(len(names) - 0.4, -0.6)
    low, high = min(0.0, values.min(initial=0)), max(1e-6, values.max(initial=0))
    room = (high - low) * (0.9 if notes else 0.35)
    ax.set_xlim(low, high + room)
    for y, value in enumerate(values):  # the numbers stand in a column of their own
        ax.text(high + room, y, f"{value:+.3f}" + (f"  {notes[y]}" if notes else ""), va="center", ha="right",
                fontsize=size)  # fmt: skip


def _matrix(
    ax: Axes, values: np.ndarray, rows: Sequence[str], columns: Sequence[str], *, low: float, high: float
) -> None:
    """A matrix as shades, with names."""
    ax.imshow(values, cmap=draw.COOL, vmin=low, vmax=high, aspect="auto", interpolation="nearest")
    size = 7.0 if max(len(rows), len(columns)) <= 16 else 5.5
    _names(ax, rows, size)
    turn = 90 if max(map(len, columns), default=0) > 2 else 0
    for n, name in enumerate(columns):
        ax.text(n, -0.03, draw.plain(name), fontsize=size, rotation=turn, ha="center", va="top",
                transform=ax.get_xaxis_transform())  # fmt: skip


def _names(ax: Axes, rows: Sequence[str], size: float) -> None:
    """Names left of rows. Texts, for ticks take several times as long to draw."""
    ax.set_axis_off()
    for n, name in enumerate(rows):
        ax.text(
            -0.02,
            n,
            draw.plain(name),
            fontsize=size,
            ha="right",
            va="center",
            transform=ax.get_yaxis_transform(),
        )


# ------------------------------------------------------------------------------------------- MVAM
def views_focus(picture: Image.Image, found, view: int, of_text: int) -> bytes:
    """One view on the image, beside one view on the words."""

    def make(figure: Figure) -> None:
        one, other = found.looks[view], found.looks[of_text]
        ax = figure.add_axes([0.42, 0.02, 0.56, 0.86])
        draw.show_words(ax, found.tokens, other.words, size=13.0 if len(found.tokens) <= 20 else 10.0)
        ax.set_title(f"sentence, {other.label}   cosine of the two {found.pairs[view, of_text]:.2f}")
        ax = figure.add_axes([0.01, 0.02, 0.38, 0.86])
        _on(ax, picture, one.boxes, one.weights)
        elsewhere = 1 - one.weights.sum()
        note = f"   ({elsewhere:.0%} on [IMG])" if elsewhere > 0.005 else ""
        ax.set_title(f"image, {one.label}{note}")

    return png(make, 7.6, 3.0)


def views_whole(found) -> bytes:
    """Cosines of all views of the image with all of the sentence, and what each pair of one number adds."""

    def make(figure: Figure) -> None:
        left, right = figure.subplots(1, 2, width_ratios=[1.1, 1])
        figure.subplots_adjust(left=0.08, right=0.98, top=0.9, bottom=0.16, wspace=0.22)
        names = [str(v + 1) for v in range(len(found.parts))]
        _matrix(left, found.pairs, names, names, low=-1.0, high=1.0)
        left.set_title("cosine of two views (dark: 1)")
        left.text(0.5, -0.12, "view of the sentence", ha="center", va="top", transform=left.transAxes)
        left.text(
            -0.09, 0.5, "view of the image", ha="right", va="center", rotation=90, transform=left.transAxes
        )
        _bars(right, names, found.parts)
        right.set_title("what each view adds to the score")

    return png(make, 7.6, 3.4)


# ------------------------------------------------------------------------------------------- HSLM
def word_focus(picture: Image.Image, found, word: int) -> bytes:
    """Where a word looks, and which words it is like, before and after self-attention."""

    def make(figure: Figure) -> None:
        for bottom, when, values in ((0.48, "before", found.before), (0.01, "after", found.after)):
            ax = figure.add_axes([0.42, bottom, 0.56, 0.38])
            draw.show_words(ax, found.words, np.clip(values[word], 0, None), size=9.0, top=0.6)
            ax.set_title(draw.plain(f"words like “{found.words[word]}”, {when} self-attention"), fontsize=8)
        ax = figure.add_axes([0.01, 0.02, 0.38, 0.86])
        if found.looks:
            weights = found.looks[word].weights
            _on(ax, picture, found.looks[word].boxes, weights)
            ax.set_title(draw.plain(f"“{found.words[word]}”: {weights.min():.2f} to {weights.max():.2f}"))
        else:
            draw.show_picture(ax, small(picture)[0])
            ax.set_title("this run has no cross attention")

    return png(make, 7.6, 3.2)


def words_whole(found) -> bytes:
    """Correlation of all words before and after self-attention, and the score taken apart."""

    height = max(3.4, 0.16 * len(found.nodes) + 1.0)

    def make(figure: Figure) -> None:
        first, second, third = figure.subplots(1, 3, width_ratios=[1, 1, 0.9])
        figure.subplots_adjust(
            left=0.09, right=0.99, top=1 - 0.34 / height, bottom=0.68 / height, wspace=0.42
        )
        for ax, values, when in ((first, found.before, "before"), (second, found.after, "after")):
            _matrix(ax, values, found.words, found.words, low=-1.0, high=1.0)
            ax.set_title(f"cosine of words, {when}")
        _bars(third, found.nodes, found.parts, [f"({gate:.2f})" for gate in found.gates])
        third.set_title("adds to the score (gate)")

    return png(make, 9.4, height)


# ------------------------------------------------------------------------------------------- FELGA
def keyword_focus(picture: Image.Image, found, keyword: int, region: int) -> bytes:
    """The proposals that a keyword wins, and one proposal."""

    def make(figure: Figure) -> None:
        won = found.won(keyword)
        left, right = figure.add_axes([0.01, 0.02, 0.38, 0.86]), figure.add_axes([0.51, 0.02, 0.38, 0.86])
        shown = won[:4]
        _marked(
            left, picture, found.boxes[shown], [f"{r + 1}: {found.similarity[r, keyword]:.2f}" for r in shown]
        )
        few = f" (shown: the best {len(shown)})" if len(won) > len(shown) else ""
        left.set_title(draw.plain(f"“{found.tokens[keyword]}” wins {len(won)} proposals{few}"))
        best = int(found.similarity[region].argmax())
        _marked(
            right, picture, found.boxes[[region]], [f"{region + 1}: {found.similarity[region, best]:.2f}"]
        )
        right.set_title(draw.plain(f"proposal {region + 1}: most like “{found.tokens[best]}”"))

    return png(make, 7.6, 3.0)


def keywords_whole(found, images: Sequence[tuple[Image.Image, float]]) -> bytes:
    """The similarity of all keywords and proposals, and the set's images that fit the sentence best."""

    def make(figure: Figure) -> None:
        ax = figure.add_axes([0.16, 0.58, 0.82, 0.34])
        values = found.similarity.T
        low = min(0.0, float(values.min()))
        names = [textwrap.shorten(word, 18, placeholder=" …") for word in found.tokens]
        _matrix(
            ax,
            values,
            names,
            [str(r + 1) for r in range(values.shape[1])],
            low=low,
            high=max(1.0, low + 1e-6),
        )
        for r, best in enumerate(values.argmax(0)):  # what wins the proposal
            dark = (values[best, r] - low) / max(1e-6, 1 - low) > 0.55
            ax.text(r, best, f"{values[best, r]:.2f}", ha="center", va="center", fontsize=6.5,
                    color="white" if dark else draw.INK)  # fmt: skip
        ax.set_title("cosine of keywords and proposals (with its number: the keyword that wins)")
        figure.text(0.01, 0.47, "images of the set that fit the sentence best, with their scores")
        for n, (image, score) in enumerate(images):
            ax = figure.add_axes([0.01 + 0.198 * n, 0.02, 0.185, 0.36])
            draw.show_picture(ax, small(image, 160)[0])
            ax.set_title(f"{n + 1}.  {score:.2f}", fontsize=8)

    return png(make, 7.6, 3.9)


# ------------------------------------------------------------------------------------------- SLAN
def level_focus(picture: Image.Image, found, level: int, region: int, most: int = 5) -> bytes:
    """The boxes of a level with the words that chose them, and the neighbourhood that moves one of them on."""

    def make(figure: Figure) -> None:
        at, size = found.levels[level], 8.5 if len(found.tokens) <= 20 else 7.0
        best = np.argsort(-at.scores, kind="stable")[:most]
        ax = figure.add_axes([0.725, 0.02, 0.27, 0.86])
        draw.show_words(ax, found.tokens, np.clip(found.looks[level].words, 0, None), size=size, smallest=3.0)
        ax.set_title("dark: a box fits the word", fontsize=8)
        left, middle = figure.add_axes([0.01, 0.02, 0.34, 0.86]), figure.add_axes([0.37, 0.02, 0.34, 0.86])
        _marked(left, picture, at.boxes[best], [str(r + 1) for r in best], np.linspace(1, 0.5, len(best)))
        left.set_title(f"level {level}: the best {len(best)} of {len(at.boxes)} boxes", fontsize=8)
        _moved(middle, picture, found, level, region)

    return png(make, 7.6, 2.85)


def _moved(ax: Axes, picture: Image.Image, found, level: int, region: int) -> None:
    """One box, the cells about it shaded by their weights, and where the next level has moved it."""
    at = found.levels[level]
    shown, factor = small(picture)
    draw.show_picture(ax, draw.as_array(shown) * 0.6 + 0.4)
    if at.cells is None:
        boxes, title = at.boxes[[region]], f"box {region + 1}: this is the last level"
    else:
        weights = at.weights[region] / max(1e-9, at.weights[region].max())
        for (x1, y1, x2, y2), share, weight in zip(
            at.cells[region] * factor, weights, at.weights[region], strict=True
        ):
            ax.add_patch(Rectangle((x1, y1), x2 - x1, y2 - y1, facecolor=mpl.colormaps[draw.HEAT](0.9 * share),
                                   edgecolor=draw.INK, linewidth=0.4, alpha=0.75))  # fmt: skip
            if len(weights) <= 9 and (x2 - x1) > 0.05 * shown.width:
                ax.text((x1 + x2) / 2, (y1 + y2) / 2, f"{weight:.2f}"[1:] if 0 <= weight < 1 else f"{weight:.1f}",
                        ha="center", va="center", fontsize=6, color="white" if share > 0.8 else draw.INK)  # fmt: skip
        boxes = np.stack([at.boxes[region], found.levels[level + 1].boxes[region]])
        title = f"box {region + 1}: weights of its cells (dashed: level {level + 1})"
    for (x1, y1, x2, y2), style in zip(boxes * factor, ("-", (0, (3, 2))), strict=False):
        for colour, width in (("white", 2.6), (draw.PALETTE[2], 1.5)):
            ax.add_patch(Rectangle((x1, y1), x2 - x1, y2 - y1, fill=False, edgecolor=colour, linewidth=width,
                                   linestyle=style if colour != "white" else "-"))  # fmt: skip
    ax.set(xlim=(0, shown.width), ylim=(shown.height, 0), anchor="NW")
    ax.set_title(title, fontsize=8)
