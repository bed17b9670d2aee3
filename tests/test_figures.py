"""Figures are drawn for real (Agg): what stands on the axes, the same bytes twice, and what is refused."""

from __future__ import annotations

from itertools import pairwise

import matplotlib as mpl
import nbformat
import numpy as np
import pandas as pd
import papermill
import pytest
from matplotlib import pyplot as plt
from PIL import Image

from finematch import figures
from finematch.boxes import grid_boxes

PICTURE = Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 60, 3), dtype=np.uint8))  # 60 wide
CELLS = grid_boxes(60, 40, 2, 3).numpy()
EVEN = np.full(6, 1 / 6)


@pytest.fixture(autouse=True)
def _close():
    yield
    plt.close("all")


def rendered(figure) -> np.ndarray:
    figure.canvas.draw()
    return np.asarray(figure.canvas.buffer_rgba())[..., :3].astype(float) / 255


def luminance(colour) -> float:
    return float(np.dot(mpl.colors.to_rgb(colour), (0.299, 0.587, 0.114)))


# --- style and saving


@pytest.mark.parametrize("backend", ["agg", None])
def test_figures_appear_in_a_page_whatever_backend_the_machine_names(tmp_path, monkeypatch, backend):
    if backend:
        monkeypatch.setenv("MPLBACKEND", backend)
    else:
        monkeypatch.delenv("MPLBACKEND", raising=False)
    page = nbformat.v4.new_notebook(
        metadata={"kernelspec": {"name": "python3", "display_name": "", "language": "python"}},
        cells=[nbformat.v4.new_code_cell("import matplotlib.pyplot as plt\nfrom finematch import figures"),
               nbformat.v4.new_code_cell("figures.style()\nplt.plot([1, 2]);")])  # fmt: skip
    nbformat.write(page, tmp_path / "page.ipynb")
    done = papermill.execute_notebook(tmp_path / "page.ipynb", tmp_path / "done.ipynb", progress_bar=False)
    assert [output.output_type for output in done.cells[1].outputs] == ["display_data"]


def test_style_stays_or_ends_with_its_block():
    before = mpl.rcParams["axes.spines.top"]
    with figures.style():
        assert mpl.rcParams["axes.spines.top"] is False
    assert mpl.rcParams["axes.spines.top"] == before
    undo = figures.style()
    assert mpl.rcParams["font.size"] == figures.HOUSE["font.size"]
    undo.close()
    assert mpl.rcParams["axes.spines.top"] == before


def test_the_font_is_one_that_matplotlib_ships():
    from matplotlib.font_manager import FontProperties, findfont

    path = findfont(FontProperties(family=figures.HOUSE["font.family"]), fallback_to_default=False)
    assert path.startswith(mpl.get_data_path())


def test_neighbours_in_the_palette_differ_in_lightness():
    light = [luminance(colour) for colour in figures.PALETTE]
    assert min(abs(a - b) for a, b in pairwise(light)) > 0.1
    assert abs(luminance(figures.RIGHT) - luminance(figures.WRONG)) > 0.1  # a mark and dashes tell them too


@pytest.mark.parametrize("cmap", [figures.HEAT, figures.COOL])
def test_shades_darken_steadily(cmap):
    light = [luminance(colour) for colour in mpl.colormaps[cmap](np.linspace(0, 1, 33))]
    assert (np.diff(light) < 0).all()


def everything():
    """One figure with all that this module draws."""
    rng = np.random.default_rng(1)
    figure, axes = plt.subplots(4, 4, figsize=(9, 9))
    figures.show_attention(axes[0, 0], PICTURE, CELLS, rng.dirichlet(np.ones(6)))
    figures.show_boxes(axes[0, 1], PICTURE, CELLS, EVEN, list("abcdef"))
    figures.show_words(axes[0, 2], ["a", "red", "star"], [0.1, 0.6, 0.3])
    figures.matrix(axes[0, 3], rng.random((3, 3)), list("abc"), label="overlap")
    figures.bars(axes[1, 0], ["1", "8"], {"a": [2, 3]})
    figures.bars(axes[1, 1], ["x", "y"], {"a": [1, 2], "b": [2, 1]})
    figures.retrieval_strip(axes[2], "a caption", lambda i: PICTURE, rng.random(9), 4)
    return figure


@pytest.mark.parametrize("suffix", ["svg", "png"])
def test_the_same_figure_has_the_same_bytes(tmp_path, suffix, monkeypatch):
    saved = []
    for name, epoch in (("a", "0"), ("b", "86400")):
        monkeypatch.setenv("SOURCE_DATE_EPOCH", epoch)  # another day
        with figures.style():
            saved.append(figures.save(everything(), tmp_path / "new" / f"{name}.{suffix}"))
    first, second = (path.read_bytes() for path in saved)
    assert first == second
    assert len(first) > 10_000
    assert b"dc:date" not in first
    assert mpl.__version__.encode() not in first


def test_another_figure_has_other_bytes(tmp_path):
    figure, ax = plt.subplots()
    paths = [figures.save(figure, tmp_path / "a.svg")]
    ax.plot([0, 1])
    paths.append(figures.save(figure, tmp_path / "b.svg"))
    assert paths[0].read_bytes() != paths[1].read_bytes()


@pytest.mark.parametrize("name", ["a.pdf", "a"])
def test_other_formats_are_refused(tmp_path, name):
    with pytest.raises(ValueError, match=r"\.svg or \.png"):
        figures.save(plt.figure(), tmp_path / name)


# --- on pictures


def test_density_of_cells_that_tile():
    weights = np.arange(1, 7) / 21
    found = figures.density(CELLS, weights, 60, 40)
    assert found.shape == (40, 60)
    assert found.sum() == pytest.approx(1)
    assert found[0, 0] == pytest.approx(weights[0] / 400)
    assert found[39, 59] == pytest.approx(weights[5] / 400)


def test_density_of_overlapping_regions_adds_up():
    found = figures.density([(0, 0, 4, 4), (0, 0, 2, 2), (1, 1, 2, 2)], [0.5, 0.4, 0.1], 4, 4)
    assert found[3, 3] == pytest.approx(0.5 / 16)
    assert found[0, 0] == pytest.approx(0.5 / 16 + 0.4 / 4)
    assert found[1, 1] == pytest.approx(0.5 / 16 + 0.4 / 4 + 0.1)
    assert found.sum() == pytest.approx(1)


def test_density_of_an_edge_within_a_pixel():
    assert figures.density([(0.5, 0, 2, 1)], [1.5], 3, 1)[0] == pytest.approx([0.5, 1, 0])


def test_attention_is_bright_where_the_weight_is():
    figure, ax = plt.subplots(figsize=(3, 2))
    ax.set_position([0, 0, 1, 1])
    heat = figures.show_attention(ax, PICTURE, CELLS, [0, 0, 1, 0, 0, 0])
    assert heat.shape == (40, 60)
    assert heat[:20, 40:].min() == 1
    assert heat.sum() == 400
    grey = rendered(figure) @ (0.299, 0.587, 0.114)
    h, w = grey.shape
    assert grey[: h // 2, 2 * w // 3 + 2 :].mean() > grey[h // 2 :].mean() + 0.15
    assert ax.get_xlim() == (0, 60)
    assert ax.get_ylim() == (40, 0)


def test_maps_on_one_scale_can_be_compared():
    _, ax = plt.subplots()
    sharp = [0.5, 0.1, 0.1, 0.1, 0.1, 0.1]
    assert figures.show_attention(ax, PICTURE, CELLS, sharp).max() == pytest.approx(1)
    assert figures.show_attention(ax, PICTURE, CELLS, EVEN).max() == pytest.approx(1 / 3)
    assert figures.show_attention(ax, PICTURE, CELLS, EVEN, top=1 / 400).max() == pytest.approx(1 / 6)


def test_boxes_stand_in_pixels_and_heavy_ones_are_thick():
    _, ax = plt.subplots()
    drawn = figures.show_boxes(ax, PICTURE, [(1, 2, 11, 22), (30, 5, 60, 40)], [0.2, 0.8], ["one", "two"])
    assert drawn[0].get_bbox().bounds == (1, 2, 10, 20)
    assert drawn[1].get_linewidth() > drawn[0].get_linewidth()
    assert [text.get_text() for text in ax.texts] == ["one", "two"]
    # a title stands above the first
    assert [text.get_verticalalignment() for text in ax.texts] == ["top", "bottom"]
    assert (
        len({(box.get_edgecolor(), box.get_linestyle()) for box in figures.show_boxes(ax, PICTURE, CELLS)})
        == 6
    )


@pytest.mark.parametrize(
    ("boxes", "weights", "message"),
    [
        (CELLS, EVEN[:5], "one weight a box"),
        (CELLS, -EVEN, "not negative"),
        (CELLS, EVEN * np.nan, "finite"),
        (CELLS[:, :3], EVEN, r"\(r, 4\)"),
        ([(0, 0, 0, 9)], [1], "box 0 .* area"),
        ([(0, 0, 9, 9), (0, 0, 99, 9)], [1, 1], "box 1 .* outside the 60 x 40"),
        (CELLS, EVEN * 0, "no weight"),
    ],
)
def test_attention_refuses(boxes, weights, message):
    _, ax = plt.subplots()
    with pytest.raises(ValueError, match=message):
        figures.show_attention(ax, PICTURE, boxes, weights)


@pytest.mark.parametrize("more", [{"weights": [1]}, {"labels": ["a"]}, {"weights": -EVEN}])
def test_boxes_refuse(more):
    _, ax = plt.subplots()
    with pytest.raises(ValueError, match="weights"):
        figures.show_boxes(ax, PICTURE, CELLS, **more)


@pytest.mark.parametrize("picture", [np.zeros((4, 4)), np.full((4, 4, 3), 2.0), np.zeros((0, 4, 3))])
def test_what_is_no_picture(picture):
    with pytest.raises(ValueError, match="picture"):
        figures.as_array(picture)


# --- on words


@pytest.mark.parametrize("dpi", [72, 110, 160])
def test_words_wrap_inside_the_axes_and_do_not_touch(dpi):
    """Laid out once, at the figure's own resolution, they must still be apart when saved at another."""
    with figures.style():
        figure, ax = plt.subplots(figsize=(3, 2))
        caption = "there is a tiny crimson star with dots to the left of two golden hearts"
        words = caption.split()
        texts = figures.show_words(ax, words, np.linspace(0, 1, len(words)))
        figure.set_dpi(dpi)
        figure.canvas.draw()
        renderer, frame = figure.canvas.get_renderer(), ax.get_window_extent()
        extents = [text.get_window_extent(renderer) for text in texts]
    lines = sorted({round(text.get_position()[1], 4) for text in texts}, reverse=True)
    assert len(lines) > 1
    assert all(frame.x0 - 1 <= e.x0 and e.x1 <= frame.x1 + 1 for e in extents)
    assert all(frame.y0 - 1 <= e.y0 and e.y1 <= frame.y1 + 1 for e in extents)
    for a, b in pairwise(zip(texts, extents, strict=True)):
        if a[0].get_position()[1] == b[0].get_position()[1]:
            assert b[1].x0 - a[1].x1 > 0.2 * 9 * dpi / 72
    assert [text.get_text() for text in texts] == words


def test_heavier_words_are_darker_and_stay_readable():
    _, ax = plt.subplots(figsize=(6, 2))
    texts = figures.show_words(ax, list("abcdefghi"), np.linspace(0, 1, 9), top=1.0)
    assert figures.show_words(ax, ["a", "b"], [1, 1])[0].get_bbox_patch().get_facecolor()[:3] < (1, 1, 0.9)
    boxes = [luminance(np.array(t.get_bbox_patch().get_facecolor()[:3])) for t in texts]
    assert (np.diff(boxes) < 0).all()
    assert all(abs(luminance(t.get_color()) - box) > 0.35 for t, box in zip(texts, boxes, strict=True))


def test_a_long_caption_is_set_smaller_or_refused():
    _, ax = plt.subplots(figsize=(3, 1))
    words = ["word"] * 40
    assert figures.show_words(ax, words, np.ones(40))[0].get_fontsize() < 9
    with pytest.raises(ValueError, match="make the axes larger"):
        figures.show_words(ax, words * 9, np.ones(360))


@pytest.mark.parametrize(("words", "weights"), [([], []), (["a"], [1, 2]), (["a"], [-1]), (["a"], [np.inf])])
def test_words_refuse(words, weights):
    _, ax = plt.subplots()
    with pytest.raises(ValueError, match="weights"):
        figures.show_words(ax, words, weights)


# --- retrieval and plots


def strip(scores, true_index):
    _, axes = plt.subplots(1, 7, figsize=(9, 2))
    opened = []

    def picture(index):
        opened.append(index)
        return PICTURE

    rank = figures.retrieval_strip(axes, "a query", picture, scores, true_index, note=lambda i: f"number {i}")
    marks = [[text.get_text() for text in ax.texts if text.get_text() in "✓✗"] for ax in axes]
    return rank, opened, marks, axes


def test_a_strip_with_the_right_picture_among_the_first():
    rank, opened, marks, axes = strip(np.array([0.1, 0.9, 0.5, 0.4, 0.8, 0.7, 0.2]), 4)
    assert rank == 2
    assert opened == [1, 4, 5, 2, 3]
    assert marks == [[], ["✗"], ["✓"], ["✗"], ["✗"], ["✗"], []]
    right, wrong = axes[2].patches[0], axes[1].patches[0]
    assert right.get_linewidth() > wrong.get_linewidth()
    assert (right.get_linestyle(), right.get_edgecolor()) != (wrong.get_linestyle(), wrong.get_edgecolor())
    assert axes[0].texts[0].get_text() == "a query"
    assert "number 4" in axes[2].texts[-1].get_text()


def test_a_strip_shows_the_right_picture_even_when_it_is_missed():
    rank, opened, marks, axes = strip(np.arange(100)[::-1] / 100, 41)
    assert rank == 42
    assert opened == [0, 1, 2, 3, 4, 41]
    assert marks == [[], *[["✗"]] * 5, ["✓"]]
    assert axes[6].texts[-1].get_text().startswith("42.")


def test_a_tie_counts_against_the_model_in_a_strip_too():
    rank, opened, _, _ = strip(np.zeros(7), 0)
    assert rank == 7
    assert opened == [1, 2, 3, 4, 5, 0]


def test_a_gallery_smaller_than_the_strip():
    rank, opened, marks, _ = strip(np.array([0.1, 0.2]), 0)
    assert (rank, opened) == (2, [1, 0])
    assert marks == [[], ["✗"], ["✓"], [], [], [], []]


@pytest.mark.parametrize(("scores", "true_index"), [([0.1, np.nan], 0), ([[0.1]], 0), ([0.1, 0.2], 2)])
def test_a_strip_refuses(scores, true_index):
    with pytest.raises(ValueError, match=r"scores|gallery"):
        strip(scores, true_index)


def test_a_matrix_shows_values_labels_and_a_bar():
    figure, ax = plt.subplots(figsize=(4, 4))
    figures.matrix(ax, [[1, 0.25], [0.5, 1]], ["a", "b"], ["x", "y"], label="overlap")
    assert [text.get_text() for text in ax.texts] == ["1.00", "0.25", "0.50", "1.00"]
    assert [label.get_text() for label in ax.get_xticklabels()] == ["x", "y"]
    assert ax.images[0].get_clim() == (0, 1)
    assert figure.axes[1].get_ylabel() == "overlap"


def test_a_signed_matrix_is_white_at_zero_and_its_ends_differ():
    _, ax = plt.subplots(figsize=(4, 4))
    figures.matrix(ax, [[-2, 0, 2]], ["a"], list("xyz"), low=-2.0, high=2.0, signed=True)
    (image,) = ax.images
    low, zero, high = image.cmap(image.norm(np.array([-2.0, 0.0, 2.0])))[:, :3]
    assert zero.min() > 0.95 > 0.6 > low.min()
    assert np.abs(low - high).max() > 0.2
    assert [text.get_color() for text in ax.texts] == ["white", figures.INK, "white"]


def test_small_cells_carry_no_numbers():
    _, ax = plt.subplots(figsize=(4, 4))
    figures.matrix(ax, np.eye(16), [str(i) for i in range(16)])
    assert not ax.texts


def test_bars_differ_in_hatch():
    _, ax = plt.subplots()
    figures.bars(ax, ["x", "y"], {"a": [1, 2], "b": [2, 1]}, errors={"a": [0.1, 0.1], "b": [0.2, 0.2]})
    assert len({patch.get_hatch() for patch in ax.patches}) == 2
    assert [patch.get_height() for patch in ax.patches] == [1, 2, 2, 1]


@pytest.mark.parametrize(
    ("draw", "arguments"),
    [
        (figures.matrix, ([[1, 2]], ["a"])),
        (figures.matrix, ([[np.nan]], ["a"])),
        (figures.bars, (["a"], {})),
        (figures.bars, (["a"], {"x": [1, 2]})),
        (figures.bars, (["a"], {str(k): [1] for k in range(9)})),
    ],
)
def test_plots_refuse(draw, arguments):
    _, ax = plt.subplots()
    with pytest.raises(ValueError, match=r"\d|finite|negative"):
        draw(ax, *arguments)


# --- tables as figures


def a_table(rows=("1", "8", "16")):
    columns = {"row": list(rows), "R@1 published": [40.0, 45.0, np.nan], "R@1 measured": [50.0, np.nan, 55.0]}
    return pd.DataFrame(columns | {"R@1 measured sd": [1.0, np.nan, np.nan]})


def test_published_and_measured_stand_in_panels_of_their_own():
    """Each is titled with its data; the rows are the same, the scales are not."""
    figure = figures.beside(
        a_table(), ["R@1"], data=("COCO 1K, published", "scenes, 3 seeds"), rows="views", label="%"
    )
    left, right = figure.axes
    assert [ax.get_title(loc="left") or ax.get_title() for ax in (left, right)] == [
        "R@1\nCOCO 1K, published", "R@1\nscenes, 3 seeds",
    ]  # fmt: skip
    assert [text.get_text() for text in left.get_yticklabels()] == ["1", "8", "16"]
    assert left.get_ylim() == right.get_ylim() == (2.5, -0.5), "the first row is on top in both"
    assert left.get_xlim() != right.get_xlim()
    (diamonds,) = left.lines
    assert list(diamonds.get_xdata())[:2] == [40, 45]
    assert diamonds.get_markerfacecolor() == "white"
    (points,) = (bar.lines[0] for bar in right.containers)
    assert list(points.get_xdata())[::2] == [50, 55]
    assert not set(diamonds.get_xdata()) & set(points.get_xdata())
    (spread,) = right.containers[0].lines[2]
    assert next(np.ptp(path.vertices[:, 0]) for path in spread.get_paths()) == pytest.approx(2)
    assert (left.get_ylabel(), left.get_xlabel()) == ("views", "%")


def test_a_table_is_drawn_with_every_seed_and_a_random_order():
    runs = {"R@1": {"1": [49.0, 51.0], "16": [55.0]}}
    dashes = {"R@1": ("contrast", [48.0, np.nan, 54.0])}
    figure = figures.beside(a_table(), ["R@1"], runs=runs, dashes=dashes, lines={"R@1": 5.0})
    left, right = figure.axes
    assert len(left.lines) == 1, "what was measured stands in the other panel alone"
    (dots,) = [line for line in right.lines if line.get_label() == "one seed"]
    assert set(zip(dots.get_xdata(), dots.get_ydata(), strict=True)) == {(49, 0), (51, 0), (55, 2)}
    said = [text.get_text() for text in figure.legends[0].get_texts()]
    assert said[:2] == ["published", "measured, mean ± sd"]
    assert set(said[2:]) == {"contrast", "a random order", "one seed"}


def test_a_panel_without_numbers_is_left_out():
    frame = a_table().assign(**{"R@1 published": np.nan})
    (ax,) = figures.beside(frame, ["R@1"]).axes
    assert (ax.get_title(loc="left") or ax.get_title()) == "R@1\nmeasured"
    frame = frame.assign(**{"R@1 measured": np.nan})
    assert len(figures.beside(frame, ["R@1"]).axes) == 1, "nothing published, nothing run: an empty panel"


def test_a_table_gives_the_same_bytes_twice(tmp_path):
    for name in ("a.svg", "b.svg"):
        with figures.style():
            figures.save(
                figures.beside(a_table(), ["R@1"], runs={"R@1": {"1": [49.0, 51.0]}}), tmp_path / name
            )
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()


def test_intervals_show_each_verdict_by_marker_and_colour():
    frame = pd.DataFrame(
        {"claim": ["a", "b", "c", "d"], "metric": "rsum", "difference": [2.0, -2.0, 0.1, np.nan],
         "lower": [1.0, -3.0, -1.0, np.nan], "upper": [3.0, -1.0, 1.2, np.nan],
         "verdict": ["holds", "contradicted", "undecided", "not run"]}
    )  # fmt: skip
    figure = figures.intervals(frame, data="scenes, 3 seeds")
    (ax,) = figure.axes
    assert (ax.get_title(loc="left") or ax.get_title()) == "rsum\nscenes, 3 seeds"
    assert [label.get_text() for label in ax.get_yticklabels()] == ["a", "b", "c"], (
        "what was not run is left out"
    )
    points = [line for line in ax.lines if len(line.get_xdata()) == 1]
    assert len({line.get_marker() for line in points}) == len({line.get_color() for line in points}) == 3
    bars = [
        line for line in ax.lines if len(line.get_xdata()) == 2 and line.get_ydata()[0] == line.get_ydata()[1]
    ]
    assert [list(bar.get_xdata()) for bar in bars] == [[1, 3], [-3, -1], [-1, 1.2]]
    with pytest.raises(ValueError, match="no line"):
        figures.intervals(frame.iloc[3:])


def test_levels_are_drawn_from_the_proposals_on():
    names = [
        f"{metric}{which}"
        for metric in ("pointing", "R@1")
        for which in ("", ", before", ", chance", ", centre", ", upper bound")
    ]
    frame = pd.DataFrame(
        {
            "level": [0, 1],
            **{name: [1.0, 2.0] for name in names},
            **{f"{name} sd": [0.1, 0.1] for name in names},
        }
    )
    left, right = figures.levels(frame).axes
    assert [label.get_text() for label in left.get_xticklabels()] == ["proposals", "1"]
    assert (left.get_ylabel(), right.get_ylabel()) == ("pointing (%)", "R@1 (%)")


# ------------------------------------------------------------------------------------------- as it stands
PRICES = ("$$", "Ka$$a", "$5_$", "$1.99 and $2.99", r"\$9 or $8", "$", "100 % $x^2$ \\frac")


def drawn(figure) -> bytes:
    figure.canvas.draw()
    return bytes(figure.canvas.buffer_rgba())


@pytest.mark.parametrize("said", PRICES)
def test_dollars_are_no_formula(said):
    figure, ax = plt.subplots()
    ax.text(0, 0, said.replace(r"\$", "$"), parse_math=False)
    expected = drawn(figure)
    ax.texts[0].remove()
    ax.text(0, 0, figures.plain(said))
    assert drawn(figure) == expected


@pytest.mark.parametrize("said", PRICES)
def test_figures_draw_words_as_they_stand(tmp_path, said):
    figure, axes = plt.subplots(2, 4, figsize=(9, 4))
    figures.show_words(axes[0, 0], ["a", said], np.ones(2))
    figures.show_boxes(axes[0, 1], PICTURE, [(1, 1, 5, 5)], labels=[said])
    figures.matrix(axes[0, 2], np.eye(2), [said, "b"], ["a", said])
    figures.retrieval_strip(axes[1], said, lambda i: PICTURE, [0.3, 0.2, 0.1], 0, note=lambda i: said)
    figures.save(figure, tmp_path / "all.svg")
    for text in figure.findobj(mpl.text.Text):
        assert not text._preprocess_math(text.get_text())[1]
