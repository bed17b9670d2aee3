"""The explorer: choose a run, an image and a sentence, and see what the model does with them.

    explorer("mvam")    explorer("all")    explorer("papermill_runs/slan/scenes.tiny.levels-3.s0")

Every number, box and word comes from `finematch.explore`, every picture from `figures.explorer`; this file binds them
to ipywidgets, and all state is in the widget that `explorer` returns. What a sentence needs is computed once; a slider
only draws again (SLAN's filter asks the model again). An error is a sentence in the page, never a stopped kernel.
"""

from __future__ import annotations

import html
import textwrap
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import ipywidgets as W
import numpy as np
from PIL import Image

from finematch.config import root
from finematch.data.images import open_rgb
from finematch.data.record import DataError
from finematch.explore import MATCHES, Match, Seen, box_texts, largest_top, see, unread
from finematch.figures import explorer as pictures
from finematch.first_run import first_run, is_first_run
from finematch.runs import Run, open_run, openable
from finematch.search import place, scores_of_set

WIDE = {"description_width": "initial"}
RANKS_BY = {"felga": "discovery_map"}  # a run's score in the list; rsum of the others
TINY = "data/cache/explore"
FIRST = "A small run, trained here on a few drawn images: to try things out, no result."


def explorer(
    run: str | Path | Run = "mvam", *, image: int = 0, sentence: str = "", folder: str | Path = TINY, seed: int = 0,
    smoke: bool = False, echo: Callable[[str], None] = print,
) -> Explorer:  # fmt: skip
    """The widget of one run, of the newest run of a method, or of all four methods side by side.

    Args:
        run: a run or its folder; a method, whose finished runs are then to choose from; or "all".
        image: number in the set of the (first) run. sentence: the image's first caption if empty.
        folder: where a small run is trained if a method has none, see `first_run`. seed: of such a run.
        smoke: of runs and of training: seconds, and numbers that mean nothing.
        echo: receives what takes longer than a moment.

    Raises:
        DataError: There is no such run, or it cannot be opened.
    """
    if isinstance(run, Run) or str(run) not in (*MATCHES, "all"):
        given = run if isinstance(run, Run) else _open(run)
        return Explorer([Panel(given.method, {_label(given.folder, given.metrics): given})], image, sentence)
    panels = []
    for method in MATCHES if run == "all" else [str(run)]:
        found = [] if smoke else [(path, content["metrics"]) for path, content in openable(method)]
        if not found:
            echo(
                f"{method}: no finished run has its weights here. A small one is trained, in about two minutes:"
            )
            made = first_run(method, folder, seed=seed, smoke=smoke, echo=lambda line: echo(f"  {line}"))
            found = [(made, _open(made).metrics)]
        panels.append(Panel(method, {_label(path, metrics): path for path, metrics in found}))
    return Explorer(panels, image, sentence)


def _open(folder: str | Path) -> Run:
    """A run whose status stands in the page instead of in a warning."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        run = open_run(folder)
        run.model  # noqa: B018
    return run


def _label(folder: Path, metrics: dict) -> str:
    name = RANKS_BY.get(folder.parent.name, "rsum")
    score = metrics.get(name, metrics.get("rsum", metrics.get("discovery_map")))
    return folder.name if score is None else f"{folder.name}   {name} {score:.1f}"


def _plain_words(error: Exception) -> str:
    """What went wrong, for the page."""
    if isinstance(error, DataError):
        named = f"{Path(error.file).name}: {error.problem}."
    else:
        named = str(error) if isinstance(error, (ValueError, OSError)) else f"{type(error).__name__}: {error}"
    return f"<b>This did not work.</b> {html.escape(named)}"


class Explorer(W.VBox):
    """The image and the sentence that are asked about, above a panel for each run."""

    def __init__(self, panels: Sequence[Panel], image: int = 0, sentence: str = ""):
        self.panels = list(panels)
        self.number = W.BoundedIntText(
            description="image of the set", style=WIDE, layout=W.Layout(width="190px")
        )
        self.file = W.Text(description="or a file", placeholder="photo.jpg", continuous_update=False, style=WIDE,
                           layout=W.Layout(width="280px"))  # fmt: skip
        self.upload = W.FileUpload(accept="image/*", multiple=False, description="upload an image",
                                   layout=W.Layout(width="180px"))  # fmt: skip
        self.caption = W.Dropdown(description="its captions", style=WIDE,
                                  layout=W.Layout(width="98%", max_width="640px"))  # fmt: skip
        self.sentence = W.Text(description="sentence", placeholder="type a sentence and press Enter", style=WIDE,
                               continuous_update=False, layout=W.Layout(width="98%", max_width="640px"))  # fmt: skip
        self.said = W.HTML()
        self.image: str | Image.Image | None = None
        self._quiet = False
        columns = "minmax(0, 1fr)" if len(self.panels) == 1 else "repeat(auto-fit, minmax(440px, 1fr))"
        grid = W.GridBox(self.panels, layout=W.Layout(grid_template_columns=columns, grid_gap="12px"))
        super().__init__([W.HBox([self.number, self.file, self.upload], layout=W.Layout(flex_flow="row wrap")),
                          self.caption, self.sentence, self.said, grid])  # fmt: skip
        with self._working():
            for panel in self.panels:
                panel.open_chosen()
            records = self._records()
            self.number.max = len(records) - 1
            self.number.value = min(max(image, 0), len(records) - 1)
            self._from_set(sentence)
        self.number.observe(self._on(lambda: self._from_set()), "value")
        self.file.observe(self._on(self._from_file), "value")
        self.upload.observe(self._on(self._from_upload), "value")
        self.caption.observe(self._on(self._from_caption), "value")
        self.sentence.observe(self._on(self._ask), "value")
        for panel in self.panels:
            panel.choice.observe(self._on(lambda panel=panel: self._other_run(panel)), "value")

    # ---- what is asked about
    def _records(self) -> list:
        data = self.panels[0].run.data
        return (
            data.gallery.records if self.panels[0].method == "felga" else data.splits[data.reported].records
        )

    def _from_set(self, sentence: str = "") -> None:
        record = self._records()[self.number.value]
        self.caption.options, self.caption.index = record.captions, 0
        self.sentence.value = sentence or record.captions[0]
        self._show(str(record.image))

    def _from_file(self) -> None:
        given = self.file.value.strip()
        if given:
            path = Path(given).expanduser()
            self._show(str(path if path.is_file() else root() / path))

    def _from_upload(self) -> None:
        for one in self.upload.value:
            self._clear()
            self._show(open_rgb(bytes(one["content"]), "the upload", file=one["name"]))

    def _from_caption(self) -> None:
        if self.caption.value is not None:
            self.sentence.value = self.caption.value
            self._ask()

    def _other_run(self, panel: Panel) -> None:
        panel.open_chosen()
        panel.see(self.image)
        self._ask([panel])

    def _show(self, image: str | Image.Image) -> None:
        self._clear()
        for panel in self.panels:
            panel.see(image)
        self.image = image  # all could read it
        self._ask()

    def _clear(self) -> None:
        self.image = None
        for panel in self.panels:
            panel.clear()

    def _ask(self, panels: Sequence[Panel] = ()) -> None:
        if self.image is None:
            raise ValueError("choose an image first: by its number, a file or an upload")
        try:
            for panel in panels or self.panels:
                panel.ask(self.sentence.value)
        except Exception:
            for panel in panels or self.panels:
                panel.blank()
            raise

    # ---- how the page behaves
    def _on(self, work: Callable[[], None]) -> Callable:
        """A handler that says that it works, and what went wrong; what it sets itself calls no handler."""

        def handle(_) -> None:
            if not self._quiet:
                with self._working():
                    work()

        return handle

    @contextmanager
    def _working(self) -> Iterator[None]:
        self._quiet, self.said.value = True, "working …"
        try:
            yield
            self.said.value = ""
        except Exception as error:  # a page has no other place for it
            self.said.value = _plain_words(error)
        finally:
            self._quiet = False


class Panel(W.VBox):
    """One run: its controls, its pictures and its numbers."""

    def __init__(self, method: str, runs: dict[str, Path | Run]):
        self.method, self.runs = method, runs
        self.run: Run | None = None
        self.seen: Seen | None = None
        self.found: Match | None = None
        self.note = ""  # on what the run cannot read of the sentence
        self.choice = W.Dropdown(options=list(runs), description=f"{method.upper()} run", style=WIDE,
                                 layout=W.Layout(width="98%", max_width="640px"))  # fmt: skip
        self.controls, self.score, self.said = W.VBox(), W.HTML(), W.HTML()
        self.picture, self.overview = _picture(), _picture()
        self.text = W.HTML()
        self._quiet = False
        super().__init__(
            [self.choice, self.score, self.controls, self.said, self.picture, self.overview, self.text]
        )
        self.controls.children = BOUND[method].controls(self)

    # ---- from the explorer
    def open_chosen(self) -> None:
        """Open the run that is chosen."""
        chosen = self.runs[self.choice.value]
        self.clear()
        self.run = chosen if isinstance(chosen, Run) else _open(chosen)

    def see(self, image: str | Image.Image | None) -> None:
        if image is not None:
            self.seen = see(self.run, image)

    def ask(self, sentence: str) -> None:
        """Match the sentence, rank the set's images for it, and draw everything."""
        self.found = self.seen.match(sentence)
        unknown, rest = unread(self.run, sentence)
        self.note = f"<br>not in the vocabulary: {html.escape(', '.join(unknown))}" if unknown else ""
        self.note += (
            "<br>too long: the model reads what stands below, and nothing of the rest" if rest else ""
        )
        self.records, self.scores = scores_of_set(self.run, sentence)
        self._quiet = True
        try:
            BOUND[self.method].set(self)
        finally:
            self._quiet = False
        self.draw(whole=True)

    def clear(self) -> None:
        """Forget the image, and show nothing."""
        self.seen = None
        self.blank()

    def blank(self) -> None:
        """Show nothing, so that no picture stands beside words that it does not belong to."""
        self.found = None
        self.picture.value = self.overview.value = b""
        self.score.value = self.text.value = self.said.value = ""

    # ---- from its own controls
    def changed(self, work: Callable[[], None] | None = None) -> Callable:
        """A handler of a control: `work`, then drawn again; an error stands in the panel."""

        def handle(_) -> None:
            if self._quiet or self.found is None:
                return
            self.said.value, self._quiet = "working …", True
            try:
                if work is not None:
                    work()
                self.draw(whole=False)
                self.said.value = ""
            except Exception as error:  # a page has no other place for it
                self.said.value = _plain_words(error)
            finally:
                self._quiet = False

        return handle

    def draw(self, *, whole: bool) -> None:
        BOUND[self.method].focus(self)
        rank, of = place(self.records, self.scores, self.found.ranked, self.seen.file)
        by = ", by its two-stream score" if self.method == "slan" else ""
        said = (
            f"<b>score {self.found.score:.3f}</b>: this image is number {rank} of {of} for the sentence{by}"
        )
        status = FIRST if is_first_run(self.run) else "" if self.run.status == "current" else self.run.status
        status = status and f"<br><small>{html.escape(status)}</small>"
        self.score.value = said + self.note + status
        if whole:
            BOUND[self.method].whole(self)


# ------------------------------------------------------------------------------------------- the methods
def _picture() -> W.Image:
    """An image that is not there as long as it is empty."""
    image = W.Image(format="png", layout=W.Layout(max_width="100%", align_self="flex-start", display="none"))

    def show(change) -> None:
        image.layout.display = None if len(change["new"]) else "none"

    image.observe(show, "value")
    return image


def _slider(panel: Panel, name: str, work: Callable[[], None] | None = None, *, low: int = 1) -> W.IntSlider:
    layout = W.Layout(width="98%", max_width="420px")
    slider = W.IntSlider(min=low, max=low, value=low, description=name, style=WIDE, layout=layout)
    slider.observe(panel.changed(work), "value")
    return slider


def _range(slider: W.IntSlider, low: int, high: int, value: int | None = None) -> None:
    """Limits that never cross on the way; the value stays where it can."""
    value = slider.value if value is None else value
    slider.max = max(high, slider.min)
    slider.min, slider.max = low, max(high, low)
    slider.value = min(max(value, low), slider.max)
    slider.disabled = high <= low


def _buttons(panel: Panel, name: str) -> W.ToggleButtons:
    buttons = W.ToggleButtons(description=name, style={**WIDE, "button_width": "auto"})
    buttons.observe(panel.changed(), "value")
    return buttons


def _choices(buttons: W.ToggleButtons, words: Sequence[str], first: int = 0) -> None:
    """A button a word; the word that was chosen stays chosen where it is there, else it is the `first`."""
    was = buttons.label
    buttons.options = [(word, n) for n, word in enumerate(words)]
    buttons.value = next((n for n, word in enumerate(words) if word == was), first)


class MVAM:
    """Views of the image and of the sentence."""

    @staticmethod
    def controls(panel: Panel) -> list[W.Widget]:
        panel.view, panel.of_text = (
            _slider(panel, "view of the image"),
            _slider(panel, "view of the sentence"),
        )
        panel.paired = W.Checkbox(value=True, indent=False, description="same view of image and sentence")
        panel.paired.observe(panel.changed(), "value")
        return [panel.view, panel.paired, panel.of_text]

    @staticmethod
    def set(panel: Panel) -> None:
        views = len(panel.found.looks)
        most = (
            int(panel.found.parts.argmax()) + 1 if panel.view.max != views else None
        )  # begin with what counts most
        for slider in (panel.view, panel.of_text):
            _range(slider, 1, max(1, views), most)

    @staticmethod
    def focus(panel: Panel) -> None:
        if not panel.found.looks:
            panel.text.value = "This run pools without attention: it has no views to show."
            return
        if panel.paired.value:
            panel.of_text.value = panel.view.value
        panel.of_text.disabled = panel.paired.value
        panel.picture.value = pictures.views_focus(
            panel.seen.image, panel.found, panel.view.value - 1, panel.of_text.value - 1
        )

    @staticmethod
    def whole(panel: Panel) -> None:
        panel.overview.value = pictures.views_whole(panel.found)


class HSLM:
    """Words over regions, words over words, and the score taken apart."""

    @staticmethod
    def controls(panel: Panel) -> list[W.Widget]:
        panel.word = _buttons(panel, "word")
        return [panel.word]

    @staticmethod
    def set(panel: Panel) -> None:
        found = panel.found
        local = found.parts[: len(found.words)] if found.nodes[:-1] or found.nodes[0] != "(whole)" else [0.0]
        _choices(panel.word, found.words, int(np.abs(local).argmax()))

    @staticmethod
    def focus(panel: Panel) -> None:
        panel.picture.value = pictures.word_focus(panel.seen.image, panel.found, panel.word.value)

    @staticmethod
    def whole(panel: Panel) -> None:
        panel.overview.value = pictures.words_whole(panel.found)


class FELGA:
    """Keywords and proposals; the set's images for the sentence, and its texts for a proposal."""

    @staticmethod
    def controls(panel: Panel) -> list[W.Widget]:
        panel.keyword, panel.region = _buttons(panel, "keyword"), _slider(panel, "proposal")
        return [panel.keyword, panel.region]

    @staticmethod
    def set(panel: Panel) -> None:
        wins = np.bincount(panel.found.similarity.argmax(1), minlength=len(panel.found.tokens))
        _choices(panel.keyword, panel.found.tokens, int(wins.argmax()))
        _range(panel.region, 1, len(panel.found.boxes))

    @staticmethod
    def focus(panel: Panel) -> None:
        at = panel.region.value - 1
        panel.picture.value = pictures.keyword_focus(panel.seen.image, panel.found, panel.keyword.value, at)
        lines = [
            f"<li><b>{html.escape(word)}</b> {score:.2f}: {html.escape(start)}</li>"
            for score, word, text in box_texts(panel.seen, at)
            for start in [textwrap.shorten(text, 110, placeholder=" …")]
        ]
        head = f"Keywords of the set that fit proposal {at + 1} best, each with a text"
        panel.text.value = (
            f"<div style='line-height: 1.4; max-width: 46em'>{head}:<ol>{''.join(lines)}</ol></div>"
        )

    @staticmethod
    def whole(panel: Panel) -> None:
        best = np.argsort(-panel.scores, kind="stable")[:5]
        images = [(panel.records[i].open(), float(panel.scores[i])) for i in best]
        panel.overview.value = pictures.keywords_whole(panel.found, images)


class SLAN:
    """Boxes level by level, and the filter that chooses the proposals."""

    @staticmethod
    def controls(panel: Panel) -> list[W.Widget]:
        panel.level, panel.box = _slider(panel, "level", low=0), _slider(panel, "box whose cells are shown")

        def again() -> None:
            panel.found = panel.seen.match(
                panel.found.sentence, top=panel.top.value, threshold=panel.threshold.value
            )
            _range(panel.box, 1, len(panel.found.saliency))

        panel.top = _slider(panel, "T, most boxes", again)
        panel.threshold = W.FloatSlider(min=0, max=0.95, step=0.05, description="threshold of saliency", style=WIDE,
                                        layout=W.Layout(width="98%", max_width="420px"))  # fmt: skip
        panel.threshold.observe(panel.changed(again), "value")
        return [panel.level, panel.box, panel.top, panel.threshold]

    @staticmethod
    def set(panel: Panel) -> None:
        found, locator = panel.found, panel.run.model.locator
        new = panel.top.disabled or panel.top.max != largest_top(locator)  # another run
        _range(panel.top, 1, largest_top(locator), found.top or largest_top(locator) if new else None)
        if new:
            panel.threshold.value = found.threshold
        elif (panel.top.value, panel.threshold.value) != (found.top, found.threshold):
            panel.found = panel.seen.match(
                found.sentence, top=panel.top.value, threshold=panel.threshold.value
            )
        _range(panel.level, 0, len(found.levels) - 1)
        _range(panel.box, 1, len(panel.found.saliency))

    @staticmethod
    def focus(panel: Panel) -> None:
        found, level = panel.found, panel.level.value
        panel.picture.value = pictures.level_focus(panel.seen.image, found, level, panel.box.value - 1)
        at = found.levels[level]
        rows = [
            f"<tr><td>{r + 1}</td><td>{html.escape(found.tokens[at.words[r]])}</td><td>{at.scores[r]:.2f}</td>"
            f"<td>{found.saliency[r]:.2f}</td></tr>" for r in range(len(at.boxes))
        ]  # fmt: skip
        head = "<tr><th>box</th><th>its word</th><th>cosine</th><th>saliency</th></tr>"
        table = f"<table style='border-spacing: 1em 0'>{head}{''.join(rows)}</table>"
        panel.text.value = f"<div style='line-height: 1.4'>Level {level}:{table}</div>"

    @staticmethod
    def whole(panel: Panel) -> None:
        """Everything hangs on the level."""


BOUND = {"mvam": MVAM, "hslm": HSLM, "felga": FELGA, "slan": SLAN}
