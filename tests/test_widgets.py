"""The explorer without a browser: values are set as a person would set them, and pictures and texts follow."""

import io
from datetime import UTC, datetime

import numpy as np
import pytest
from PIL import Image
from test_explore import book, run_of  # noqa: F401 (fixtures)

from finematch.__main__ import main
from finematch.explore import match
from finematch.widgets import Explorer, Panel, explorer


@pytest.fixture
def page_of(run_of):  # noqa: F811
    """`page_of(method)`: the explorer of a smoke run of random weights."""

    def make(*methods: str, **changes) -> Explorer:
        panels = [Panel(method, {method: run_of(method, **changes)[0]}) for method in methods]
        page = Explorer(panels)
        assert page.said.value == ""
        return page

    return make


def shown(panel) -> tuple:
    return bytes(panel.picture.value), bytes(panel.overview.value), panel.score.value, panel.text.value


def is_png(value: bytes) -> bool:
    return Image.open(io.BytesIO(value)).size > (100, 100)


def changes(panel, control, value) -> list[bool]:
    """Which of picture, overview, score and text another value of a control changes."""
    before = shown(panel)
    control.value = value
    assert panel.said.value == ""
    return [one != other for one, other in zip(before, shown(panel), strict=True)]


def another(control, value: int, instead: int) -> int:
    """A value that the control does not show: what a page opens with is what counts most in its run."""
    return instead if control.value == value else value


def upload(page, name: str, content: bytes) -> None:
    """As the browser sends a file."""
    page.upload.value = ({"name": name, "type": "image/png", "size": len(content), "content": memoryview(content),
                          "last_modified": datetime.now(UTC)},)  # fmt: skip


def as_png(image: Image.Image) -> bytes:
    content = io.BytesIO()
    image.save(content, "PNG")
    return content.getvalue()


def test_views(page_of):
    page = page_of("mvam")
    (panel,) = page.panels
    assert is_png(panel.picture.value)
    assert is_png(panel.overview.value)
    assert panel.view.max == panel.run.model.views
    view = another(panel.view, 2, 1)
    assert changes(panel, panel.view, view) == [True, False, False, False]
    assert panel.of_text.value == view  # the same view
    assert panel.of_text.disabled
    panel.paired.value = False
    assert not panel.of_text.disabled
    assert changes(panel, panel.of_text, another(panel.of_text, 1, 2))[0]
    assert panel.view.value == view


def test_words(page_of):
    (panel,) = page_of("hslm").panels
    assert is_png(panel.overview.value)
    assert list(panel.word.options) == [(word, n) for n, word in enumerate(panel.found.words)]
    assert changes(panel, panel.word, another(panel.word, 2, 1)) == [True, False, False, False]


def test_keywords_and_proposals(page_of):
    (panel,) = page_of("felga").panels
    assert [word for word, _ in panel.keyword.options] == panel.found.tokens
    assert is_png(panel.overview.value)
    assert changes(panel, panel.region, 2) == [True, False, False, True]
    assert "proposal 2" in panel.text.value
    if len(panel.found.tokens) > 1:
        assert changes(panel, panel.keyword, another(panel.keyword, 1, 0)) == [True, False, False, False]


def test_levels_and_the_filter(page_of):
    page = page_of("slan")
    (panel,) = page.panels
    own = panel.run.model.locator.filter
    was = own.top, own.threshold
    assert panel.level.max == len(panel.run.model.locator.adaptors)
    assert changes(panel, panel.level, 1) == [True, False, False, True]
    assert changes(panel, panel.top, 1)[0]
    assert len(panel.found.saliency) == panel.box.max == 1
    assert panel.found.score == panel.seen.match(panel.found.sentence, top=1).score
    page.sentence.value = "a red circle"  # the filter stays as it was set
    assert page.said.value == ""
    assert panel.found.top == panel.top.value == 1
    panel.top.value, panel.threshold.value = panel.top.max, 0.0
    many = len(panel.found.saliency)
    panel.threshold.value = 0.95
    assert 1 <= len(panel.found.saliency) <= many
    assert (own.top, own.threshold) == was  # of the run itself nothing changed


@pytest.mark.parametrize("method", ["mvam", "hslm", "felga", "slan"])
def test_page_function_and_command_give_the_same_numbers(page_of, method, capsys):
    page = page_of(method)
    (panel,) = page.panels
    before = shown(panel)
    page.sentence.value = "there is a yellow star on the grass"
    assert shown(panel) != before
    expected = match(panel.run, page.image, page.sentence.value)
    assert panel.found.score == pytest.approx(expected.score, abs=1e-6)
    assert f"score {expected.score:.3f}" in panel.score.value
    for one, other in zip(panel.found.looks, expected.looks, strict=True):
        np.testing.assert_allclose(one.weights, other.weights, atol=1e-6)
    capsys.readouterr()  # what making the run has said
    assert main(["look", str(panel.run.folder), "--image", page.image, "--text", page.sentence.value]) == 0
    score, sentence = capsys.readouterr().out.strip().split("\t")
    assert sentence == page.sentence.value
    assert float(score) == pytest.approx(panel.found.score, abs=1e-4)
    page.number.value = 1
    assert page.sentence.value == page._records()[1].captions[0]
    assert page.image == str(page._records()[1].image)
    page.caption.value = page._records()[1].captions[2]
    assert panel.found.sentence == page.sentence.value == page._records()[1].captions[2]


def test_an_image_of_ones_own(page_of, tmp_path):
    page = page_of("mvam")
    (panel,) = page.panels
    image = Image.new("RGB", (80, 60), "navy")
    image.paste("gold", (20, 10, 50, 40))
    before = panel.picture.value
    upload(page, "mine.png", as_png(image))
    assert page.said.value == ""
    uploaded = panel.found.score
    assert panel.picture.value != before
    assert panel.seen.image.size == (80, 60)
    image.save(tmp_path / "mine.png")
    page.file.value = str(tmp_path / "mine.png")
    assert panel.found.score == pytest.approx(uploaded, abs=1e-6)
    assert "of 41 for" in panel.score.value  # the smoke run's 40 images, and this one


def test_what_goes_wrong_stands_in_the_page_and_the_page_goes_on(page_of, tmp_path):
    page = page_of("mvam")
    (panel,) = page.panels
    upload(page, "broken.png", b"no image at all")
    assert "broken.png: the image cannot be decoded" in page.said.value
    assert shown(panel) == (b"", b"", "", "")  # no picture of another image stands there
    page.file.value = str(tmp_path / "none.png")
    assert "none.png: the image is missing" in page.said.value
    page.sentence.value = "a star"
    assert "choose an image first" in page.said.value
    page.sentence.value = "   "
    page.number.value = 1
    assert page.said.value == ""
    assert is_png(panel.picture.value)
    page.sentence.value = " "
    assert "at least one sentence" in page.said.value
    assert shown(panel) == (b"", b"", "", "")
    page.sentence.value = "a circle"
    assert page.said.value == ""
    page.sentence.value = "a star <script>alert(1)</script> " * 30  # cut, and never markup
    assert page.said.value == ""
    assert "too long" in panel.score.value
    assert "not in the vocabulary: &lt;" in panel.score.value
    assert "<script>" not in panel.text.value + panel.score.value + page.said.value


def test_side_by_side(page_of):
    page = page_of("mvam", "slan")
    before = [shown(panel) for panel in page.panels]
    page.sentence.value = "two blue squares"
    assert all(one != shown(panel) for one, panel in zip(before, page.panels, strict=True))
    page.panels[0].view.value = 2
    assert [panel.found.sentence for panel in page.panels] == ["two blue squares"] * 2


def test_two_pages_share_nothing(page_of):
    one, other = page_of("hslm"), page_of("hslm")
    before = shown(other.panels[0])
    one.sentence.value = "a big heart"
    assert shown(other.panels[0]) == before


def test_another_run_is_opened(run_of):  # noqa: F811
    few, many = run_of("mvam", views=2)[0], run_of("mvam", views=4)[0]
    page = Explorer([Panel("mvam", {"two": few, "four": many.folder})])
    (panel,) = page.panels
    panel.view.value = 2
    before = shown(panel)
    panel.choice.value = "four"
    assert page.said.value == ""
    assert panel.view.max == 4
    assert shown(panel) != before
    assert panel.found.score == pytest.approx(match(many, page.image, page.sentence.value).score, abs=1e-6)


def test_explorer_opens_a_run_or_its_folder(run_of):  # noqa: F811
    run = run_of("hslm")[0]
    assert explorer(run, sentence="a ring").panels[0].found.sentence == "a ring"
    assert explorer(run.folder, image=2).number.value == 2
