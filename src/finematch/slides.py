"""Lessons as slides (reveal.js) that need no network: a page for each method, with reveal.js and MathJax beside it.

A heading `##` begins a slide; `###`, and whatever does not fit any more, a slide below it. Cells of set-up, exercises
and solutions are left out, and so is the source of folded cells.
"""

from __future__ import annotations

import base64
import re
import shutil
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import nbformat
from nbformat import NotebookNode

from finematch.config import root
from finematch.data.images import open_rgb
from finematch.exercises import METHODS
from finematch.files import DataError

WIDTH, HEIGHT = 1280, 800  # of a slide, in pixels
LINE = 27  # height of a line of text
FULL = 26  # lines on a slide
LEFT_OUT = {"parameters", "injected-parameters", "exercise", "solution"}
TEMPLATE = """\
{%- extends 'index.html.j2' -%}
{%- block html_head_js -%}{%- endblock -%}
{%- block html_head_js_mathjax -%}
<script>
window.MathJax = {tex: {inlineMath: [['$', '$'], ['\\\\(', '\\\\)']]}, options: {enableMenu: false}};
</script>
<script defer src="tex-svg.js"></script>
{%- endblock -%}
{%- block html_head_css -%}
<style>
.reveal, .reveal p, .reveal li, .reveal td, .reveal th { font-size: 20px; line-height: 1.35; }
.reveal .slides { text-align: left; }
.reveal .slides section section { height: 100%; overflow-y: auto; }
.reveal h1, .reveal h2, .reveal h3 { text-transform: none !important; font-size: 32px !important; margin: 0 0 12px; }
.reveal img, .reveal svg.figure { max-height: {{ limit }}px; max-width: 100%; width: auto; margin: 0; }
.reveal pre { width: auto; margin: 0; box-shadow: none; font-size: 17px; }
.jp-Cell { padding: 4px; }
.jp-RenderedHTMLCommon > *:last-child { margin-bottom: 4px; }
.jp-InputPrompt, .jp-OutputPrompt, .jp-InputCollapser, .jp-OutputCollapser, .jp-Collapser { display: none; }
</style>
{%- endblock -%}
{%- block footer_js -%}
<script src="reveal/dist/reveal.js"></script>
<script src="reveal/plugin/notes/notes.js"></script>
<script>
Reveal.initialize({hash: true, slideNumber: 'c/t', center: false, transition: 'none', margin: 0.03,
                   width: {{ resources.reveal.width }}, height: {{ resources.reveal.height }}, plugins: [RevealNotes]});
// What is too tall for its slide is shown smaller, down to {{ smallest }}; only what does not fit then scrolls.
const fit = slide => {
  for (let zoom = 1; zoom >= {{ smallest }}; zoom -= 0.05) {
    slide.style.zoom = zoom;
    if (slide.scrollHeight <= slide.clientHeight) return;
  }
};
const now = () => MathJax.startup.promise.then(() => fit(Reveal.getCurrentSlide()));
Reveal.on('slidechanged', now);
window.addEventListener('load', now);
</script>
{%- endblock -%}
"""
FIGURE = 20 * LINE  # tallest figure
SMALLEST = 0.6  # share of its size that a slide is shrunk to
TEMPLATE = TEMPLATE.replace("{{ limit }}", str(FIGURE)).replace("{{ smallest }}", str(SMALLEST))


def write_slides(out: str | Path, data_root: str | Path) -> list[Path]:
    """Write `out/<method>.html` and what the pages load, `out/reveal` and `out/tex-svg.js`; the pages.

    A lesson that was not run, or was run before it was changed, is run now.

    Raises:
        DataError: a package that ships reveal.js or MathJax is not installed.
    """
    from nbconvert import SlidesExporter

    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    reveal = _package("sphinx_revealjs", "sphinx-revealjs") / "_static" / "revealjs"
    for part in ("dist", "plugin/notes"):
        shutil.copytree(
            reveal / part, out / "reveal" / part, dirs_exist_ok=True, ignore=shutil.ignore_patterns("*.map")
        )
    shutil.copy(reveal / "LICENSE", out / "reveal")
    shutil.copy(_package("mathjax", "django-static-mathjax") / "static/mathjax/es5/tex-svg.js", out)
    exporter = SlidesExporter(raw_template=TEMPLATE, reveal_url_prefix="reveal", reveal_theme="white",
                              reveal_width=str(WIDTH), reveal_height=str(HEIGHT))  # fmt: skip
    written = []
    for method in METHODS:
        page, _ = exporter.from_notebook_node(
            slides(executed(method, data_root)), {"metadata": {"name": method.upper()}}
        )
        written.append(out / f"{method}.html")
        written[-1].write_text(page, encoding="utf-8")
    return written


def _package(name: str, installed_as: str) -> Path:
    """The folder of a package that is read and not imported."""
    found = find_spec(name)
    if found is None:
        raise DataError("(packages)", installed_as, "is not installed", "pip install -e '.[book]'")
    return Path(found.submodule_search_locations[0])


def executed(method: str, data_root: str | Path) -> NotebookNode:
    """The lesson of a method with its outputs: a copy that was run as it stands now, else it is run."""
    lesson = root() / "notebooks" / method / "1_lesson.ipynb"
    taught = root() / "handout" / "teacher" / f"{method}.ipynb"
    wanted = _sources(nbformat.read(lesson, as_version=4))
    for file in (taught, root() / "papermill_runs" / "workbook" / method / "1_lesson.ipynb"):
        if file.is_file():
            found = nbformat.read(file, as_version=4)
            if _sources(found) == wanted and not found.metadata.get("papermill", {}).get("exception"):
                return found
    import papermill

    taught.parent.mkdir(parents=True, exist_ok=True)
    return papermill.execute_notebook(
        lesson, taught, {"data_root": str(data_root)}, cwd=str(root()), progress_bar=False
    )


def _sources(page: NotebookNode) -> list[str]:
    """What the cells say, but for those that papermill adds."""
    return [cell.source for cell in page.cells if "injected-parameters" not in cell.metadata.get("tags", [])]


def slides(lesson: NotebookNode) -> NotebookNode:
    """A copy of an executed lesson, cut into slides: each cell says where it stands in `metadata.slideshow`."""
    page = nbformat.v4.new_notebook(metadata=lesson.metadata)
    filled = 0.0
    for cell in _parts(lesson):
        height = _lines(cell)
        heading = re.match(r"(#+) ", cell.source) if cell.cell_type == "markdown" else None
        kind = "-"
        if heading and len(heading[1]) <= 2:
            kind = "slide"
        elif (heading and len(heading[1]) == 3 and filled > 2) or (filled and filled + height > FULL):
            kind = "subslide"
        filled = height if kind != "-" else filled + height
        cell.metadata["slideshow"] = {"slide_type": kind}
        page.cells.append(cell)
    return page


def _parts(lesson: NotebookNode) -> Iterator[NotebookNode]:
    """The cells that are shown: text paragraph by paragraph, code apart from its outputs where both do not fit."""
    for cell in lesson.cells:
        if LEFT_OUT.intersection(cell.metadata.get("tags", [])):
            continue
        if cell.cell_type == "markdown":
            for text in paragraphs(_unlinked(cell.source)):
                if not re.match(r"(Previous|Next): ", text):
                    yield nbformat.v4.new_markdown_cell(text)
            continue
        outputs = [one for one in cell.outputs if one.get("name") != "stderr"]
        for one in outputs:
            if "text/markdown" in one.get("data", {}):
                one.data["text/markdown"] = _unlinked(one.data["text/markdown"])
        code = nbformat.v4.new_code_cell(cell.source)
        shown = nbformat.v4.new_code_cell(
            "", outputs=outputs, metadata={"transient": {"remove_source": True}}
        )
        if cell.metadata.get("jupyter", {}).get("source_hidden") or re.match(r"(from|import) ", cell.source):
            parts = [shown] if outputs else []
        elif outputs and _lines(code) + _lines(shown) > FULL:
            parts = [code, shown]
        else:
            code.outputs = outputs
            parts = [code]
        yield from parts


def paragraphs(text: str) -> list[str]:
    """A Markdown text cut at its blank lines, but not inside code, formulas and lists."""
    found, inside = [], ""
    for block in re.split(r"\n\s*\n", text.strip()):
        whole = f"{inside}\n\n{block}" if inside else block
        if whole.count("$$") % 2 or len(re.findall(r"^```", whole, re.M)) % 2:
            inside = whole
            continue
        inside = ""
        heading, _, rest = whole.partition("\n") if re.match(r"#+ ", whole) else ("", "", whole)
        found += [part for part in (heading, rest) if part]
    return [*found, inside] if inside else found


def _unlinked(text: str) -> str:
    """Links within the workbook become plain text: slides stand elsewhere."""
    return re.sub(r"(?<!!)\[([^\[\]]*)\]\((?!https?:)[^()\s]*\)", r"\1", text)


def _lines(cell: NotebookNode) -> float:
    """How many lines of a slide a cell takes, roughly."""
    if cell.cell_type == "markdown":
        if cell.source.startswith("#"):
            return 2.5
        displayed = cell.source.count("$$") // 2
        rows = [
            1.4 if line.startswith("|") else max(1, -(-len(line) // 115)) for line in _joined(cell.source)
        ]
        return sum(rows) + 1.5 * displayed + 0.8
    source = 0.0 if cell.metadata.get("transient") else 0.85 * len(cell.source.splitlines()) + 0.8
    return source + sum(map(_output_lines, cell.outputs))


def _joined(text: str) -> list[str]:
    """Lines as they are shown: those of a paragraph run on."""
    return re.sub(r"(?<=[^|\n])\n(?=[^|\n*\d#>-])", " ", text).splitlines()


def _output_lines(output: NotebookNode) -> float:
    if output.output_type == "stream":
        return 0.85 * len(output.text.splitlines()) + 0.5
    data = output.get("data", {})
    if "image/png" in data:
        width, height = open_rgb(base64.b64decode(data["image/png"])).size
        return min(height * min(1, WIDTH / width), FIGURE) / LINE + 0.5
    if "text/html" in data:
        return 1.5 * data["text/html"].count("<tr") + 1
    text = data.get("text/markdown", data.get("text/plain", ""))
    return (
        sum(1.4 if line.startswith("|") else max(1, -(-len(line) // 115)) for line in text.splitlines()) + 0.5
    )
