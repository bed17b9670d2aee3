"""Lessons as slides: what begins one, what is left out, which run is taken, and that nothing comes from the network."""

from __future__ import annotations

import re

import nbformat
import papermill
import pytest
from lab import browser, chromium
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from finematch import slides as S
from finematch.files import DataError


def printed(text: str) -> nbformat.NotebookNode:
    return new_output("stream", name="stdout", text=text)


@pytest.fixture
def lesson():
    """A lesson that was run, with a cell of each kind."""
    folded = {"jupyter": {"source_hidden": True}}
    return new_notebook(
        cells=[
            new_markdown_cell("# The lesson\n\nIt begins here, see [the code](../../src/a.py#L3)."),
            new_code_cell("seed: int = 0", metadata={"tags": ["parameters"]}),
            new_code_cell("from a import b", outputs=[]),
            new_markdown_cell("## One\n\nA formula:\n\n$$\na\n\n= b\n$$\n\nand text."),
            new_code_cell(
                "1 + 1", outputs=[printed("2"), new_output("stream", name="stderr", text="a warning")]
            ),
            new_code_cell("draw()", metadata=folded, outputs=[printed("drawn")]),
            new_markdown_cell("### Below\n\nMore."),
            new_code_cell("...", metadata={"tags": ["exercise"]}),
            new_markdown_cell("The answer.", metadata={"tags": ["solution"]}),
            new_code_cell("\n".join(["x = 1"] * 20), outputs=[printed("long\n" * 20)]),
            new_markdown_cell("Previous: [a](a.ipynb) · Next: [b](b.ipynb)"),
        ]
    )


def test_headings_begin_slides_and_set_up_is_left_out(lesson):
    cells = S.slides(lesson).cells
    assert [(cell.source, cell.metadata.slideshow.slide_type) for cell in cells[:-2]] == [
        ("# The lesson", "slide"),
        ("It begins here, see the code.", "-"),
        ("## One", "slide"),
        ("A formula:", "-"),
        ("$$\na\n\n= b\n$$", "-"),
        ("and text.", "-"),
        ("1 + 1", "-"),
        ("", "-"),  # the folded cell: its output alone
        ("### Below", "subslide"),
        ("More.", "-"),
    ]
    assert [one.text for one in cells[6].outputs] == ["2"], "no warnings"
    assert cells[7].metadata.transient.remove_source
    assert cells[7].outputs[0].text == "drawn"
    code, output = cells[-2:]  # both do not fit on one slide
    assert code.source.count("x = 1") == 20
    assert not code.outputs
    assert output.metadata.slideshow.slide_type == "subslide"
    assert not lesson.cells[9].metadata.get("slideshow"), "the lesson itself is as it was"


def test_a_text_is_cut_at_blank_lines_outside_of_code_and_formulas():
    text = "one\ntwo\n\n```python\na\n\nb\n```\n\n$$\nc\n\nd\n$$\n\n## three\nfour"
    assert S.paragraphs(text) == ["one\ntwo", "```python\na\n\nb\n```", "$$\nc\n\nd\n$$", "## three", "four"]


def test_a_run_of_the_lesson_as_it_stands_is_taken_and_another_is_made_anew(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pyproject.toml").touch()
    lesson = tmp_path / "notebooks" / "mvam" / "1_lesson.ipynb"
    done = tmp_path / "papermill_runs" / "workbook" / "mvam" / "1_lesson.ipynb"
    for file in (lesson, done):
        file.parent.mkdir(parents=True)
    injected = new_code_cell("seed = 1", metadata={"tags": ["injected-parameters"]})
    nbformat.write(new_notebook(cells=[new_code_cell("1 + 1", id="one")]), lesson)
    nbformat.write(
        new_notebook(cells=[injected, new_code_cell("1 + 1", id="one", outputs=[printed("2")])]), done
    )
    assert S.executed("mvam", "data").cells[1].outputs[0].text == "2"
    nbformat.write(new_notebook(cells=[new_code_cell("1 + 2", id="one")]), lesson)
    asked = []

    def run(*given, **more):
        asked.append((given, more))
        return new_notebook()

    monkeypatch.setattr(papermill, "execute_notebook", run)
    S.executed("mvam", "elsewhere")
    ((given, more),) = asked
    assert given == (lesson, tmp_path / "handout" / "teacher" / "mvam.ipynb", {"data_root": "elsewhere"})
    assert more["cwd"] == str(tmp_path)


def test_without_the_packages_it_is_said_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setattr(S, "find_spec", lambda name: None)
    with pytest.raises(DataError, match=r"sphinx-revealjs.*is not installed.*pip install -e '\.\[book\]'"):
        S.write_slides(tmp_path, "data")


def test_slides_load_nothing_from_the_network(tmp_path, monkeypatch, lesson):
    for package in ("sphinx_revealjs", "mathjax"):
        if S.find_spec(package) is None:
            pytest.skip(f"{package}: pip install -e '.[book]'")
    monkeypatch.setattr(S, "executed", lambda method, data_root: lesson)
    pages = S.write_slides(tmp_path, "data")
    assert [page.name for page in pages] == ["mvam.html", "hslm.html", "felga.html", "slan.html"]
    page = pages[0].read_text(encoding="utf-8")
    loaded = re.findall(r"<(?:script|link|img)[^>]* (?:src|href)=\"([^\"]+)\"", page)
    assert {"reveal/dist/reveal.js", "reveal/dist/reveal.css", "tex-svg.js"} <= set(loaded)
    for name in loaded:
        assert (tmp_path / name).is_file(), name
    for sheet in (tmp_path / "reveal" / "dist").rglob("*.css"):
        if sheet.name == "white.css" or "theme" not in sheet.parts:
            assert not re.search(r"url\(['\"]?http", sheet.read_text(encoding="utf-8")), sheet
    assert not re.search(r"@import[^;]*http|import .* from 'http", page)
    assert page.count("<section") == 6  # two side by side: one slide alone, and three below one another


def test_a_slide_that_is_too_tall_is_shown_smaller(tmp_path, monkeypatch):
    for package in ("sphinx_revealjs", "mathjax", "playwright"):
        if S.find_spec(package) is None:
            pytest.skip(f"{package}: pip install -e '.[dev,book]'")
    if chromium() is None:
        pytest.skip("no Chromium on this system")
    table = "\n".join(["| a | b |", "|:--|:--|", *["| $x$ | row |"] * 30])  # no place to cut
    lesson = new_notebook(
        cells=[new_markdown_cell("## Short\n\ntext"), new_markdown_cell(f"## Tall\n\n{table}")]
    )
    monkeypatch.setattr(S, "executed", lambda method, data_root: lesson)
    (page_of_mvam, *_) = S.write_slides(tmp_path, "data")
    with browser(S.WIDTH, S.HEIGHT) as (page, errors):
        page.goto(page_of_mvam.as_uri())
        page.wait_for_function("() => Reveal.isReady() && Reveal.getCurrentSlide().style.zoom === '1'")
        page.evaluate("Reveal.slide(1, 1)")  # below its heading
        page.wait_for_function("() => Reveal.getCurrentSlide().style.zoom")
        slide = page.evaluate(
            "() => { const s = Reveal.getCurrentSlide(); return [+s.style.zoom, s.scrollHeight, s.clientHeight]; }"
        )
        assert not errors
    assert S.SMALLEST <= slide[0] < 1
    assert slide[1] <= slide[2]
