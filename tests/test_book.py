"""The book: all pages of the repository, one of them run, as a site without dead links, networks or open solutions."""

from __future__ import annotations

import functools
import http.server
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import threading
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import nbformat
import pytest
from filelock import FileLock
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook
from notebook_text import build as notebooks_build

ROOT = Path(__file__).resolve().parents[1]
LACKING = [name for name in ("furo", "mathjax", "myst_nb") if importlib.util.find_spec(name) is None]
needs_extra = pytest.mark.skipif(bool(LACKING), reason=f"no {LACKING}: pip install -e '.[book]'")

_spec = importlib.util.spec_from_file_location("book_build", ROOT / "book" / "build.py")
build = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(build)

TINY = [
    new_markdown_cell("# A tiny page\n\nThe quokkaword of $x_1 + x_2$, and\n\n$$y = \\frac{a}{b}$$"),
    new_markdown_cell(
        "[lesson](../slan/1_lesson.ipynb), [words](../../docs/glossary.md), [rows](../../grids/mvam_views.csv), "
        "[table](../../figures/mvam_views.scenes.tiny.md), [line](../../src/finematch/boxes.py#L12), [here](#spot).\n\n"
        '<a id="spot"></a>'
    ),
    new_code_cell("steps: int = 3", metadata={"tags": ["parameters"]}),
    new_code_cell("hidden = 7", metadata={"jupyter": {"source_hidden": True}}),
    new_code_cell("%matplotlib inline\nimport matplotlib.pyplot as plt\nplt.plot([steps, 1])\nplt.show()"),
    new_code_cell(
        "import pandas as pd\nfrom IPython.display import Markdown, display\n"
        "display(pd.DataFrame({'cell': [f'{steps} steps']}), Markdown('| a | b |\\n|--|--|\\n| $z$ | mark**down** |'))"
    ),
    new_code_cell("answer = ...  # the exercise", metadata={"tags": ["exercise"]}),
    new_markdown_cell("In words: **fortytwo**.", metadata={"tags": ["solution"], "jupyter": {"source_hidden": True}}),
    new_code_cell("answer = 42\nprint(answer)", metadata={"tags": ["solution"], "jupyter": {"source_hidden": True}}),
]  # fmt: skip


def ran(command: list[str], cwd: Path) -> None:
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(scope="session")
def site(tmp_path_factory) -> Path:
    """A book of the repository's committed pages and of a tiny page, which papermill has run, and once more as if it
    were the page of a grid. Built once, also where the tests are spread over processes."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "book"
    root = folder / "root"
    with FileLock(f"{folder}.lock"):
        if (folder / "done").exists():
            return folder / "html"
        root.mkdir(parents=True)
        for path in ROOT.iterdir():
            if path.name not in ("notebooks", "papermill_runs") and not path.name.startswith("."):
                (root / path.name).symlink_to(path)
        shutil.copytree(
            ROOT / "notebooks", root / "notebooks", ignore=shutil.ignore_patterns(".*", "__pycache__")
        )
        nbformat.write(
            new_notebook(cells=TINY, metadata=notebooks_build.KERNEL),
            root / "notebooks" / "mvam" / "8_tiny.ipynb",
        )
        run, grid = root / "papermill_runs" / "workbook" / "mvam", root / "papermill_runs" / "mvam"
        run.mkdir(parents=True)
        for path in ROOT.glob("papermill_runs/*/*/metrics.json"):  # RESULTS.md leads to them
            (root / path.relative_to(ROOT)).parent.mkdir(parents=True)
            shutil.copy(path, root / path.relative_to(ROOT))
        line = [
            "notebooks/mvam/8_tiny.ipynb",
            "papermill_runs/workbook/mvam/8_tiny.ipynb",
            "-p",
            "steps",
            "5",
        ]
        ran([sys.executable, "-m", "papermill", "--no-progress-bar", *line], root)
        shutil.copy(run / "8_tiny.ipynb", grid / "scenes.tiny.mvam_views.ipynb")
        build = [sys.executable, str(ROOT / "book" / "build.py")]
        ran([*build, "--root", ".", "--out", str(folder), "--strict"], root)
        (folder / "done").touch()
    return folder / "html"


class Page(HTMLParser):
    """The anchors of a page, and what it refers to: (tag, attribute, target)."""

    def __init__(self, path: Path):
        super().__init__()
        self.anchors: set[str] = {"", "top"}
        self.links: list[tuple[str, str, str]] = []
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attrs):
        given = dict(attrs)
        self.anchors |= {given[key] for key in ("id", "name") if given.get(key)}
        self.links += [(tag, key, given[key]) for key in ("href", "src", "data", "srcset") if given.get(key)]


def faults(site: Path) -> list[str]:
    """Links of the site that lead nowhere, and resources that come from elsewhere."""
    pages = {path.resolve(): Page(path) for path in site.rglob("*.html")}
    found = []
    for path, page in pages.items():
        for tag, _, link in page.links:
            parts = urlsplit(link)
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            if parts.scheme in ("data", "mailto"):
                continue
            elsewhere = bool(parts.scheme or parts.netloc)
            wrong = (tag != "a") if elsewhere else not target.is_file()
            wrong |= (
                not elsewhere and target in pages and unquote(parts.fragment) not in pages[target].anchors
            )
            found += [f"{path.name}: <{tag}> {link}"] if wrong else []
    return found


def text(site: Path, name: str) -> str:
    return (site / f"{name}.html").read_text(encoding="utf-8")


@needs_extra
def test_all_links_lead_to_a_page_and_an_anchor_and_nothing_comes_from_elsewhere(site):
    assert len(list(site.rglob("*.html"))) > 100
    assert faults(site) == []
    for path in site.rglob("*.css"):
        assert not re.search(r"(url\(|@import)\s*['\"]?(https?:)?//", path.read_text(encoding="utf-8")), path


def test_faults_are_found(tmp_path):
    (tmp_path / "one.html").write_text(
        '<a id="x" href="two.html#y">a</a><a href="https://e.org">b</a><img src="c.png">'
    )
    (tmp_path / "two.html").write_text('<a href="one.html#x">a</a><script src="https://e.org/d.js"></script>')
    assert sorted(fault.split()[-1] for fault in faults(tmp_path)) == [
        "c.png",
        "https://e.org/d.js",
        "two.html#y",
    ]


@needs_extra
def test_a_page_that_was_run_shows_its_command_line_and_outputs(site):
    page = text(site, "notebooks/mvam/8_tiny")
    shown = re.sub(r"<[^>]+>", "", page)
    assert (
        "papermill notebooks/mvam/8_tiny.ipynb papermill_runs/workbook/mvam/8_tiny.ipynb -p steps 5" in shown
    )
    assert "was not run here" not in shown
    assert "edited after" not in shown
    assert "5 steps" in shown
    assert "mark<strong>down</strong>" in page
    assert len(re.findall(r'<img [^>]*src="\.\./\.\./_images/\w+\.png"', page)) == 1


@needs_extra
def test_a_page_that_was_not_run_says_so_and_how_to_run_it(site):
    shown = re.sub(r"<[^>]+>", "", text(site, "notebooks/mvam/1_lesson"))
    assert "This page was not run here" in shown
    assert "papermill notebooks/mvam/1_lesson.ipynb papermill_runs/workbook/mvam/1_lesson.ipynb" in shown


@needs_extra
def test_solutions_are_folded_and_exercises_are_open(site):
    page = text(site, "notebooks/mvam/8_tiny")
    folded = "".join(re.findall(r"<details.*?</details>", page, re.S))
    assert "<details open" not in page
    for secret in ("fortytwo", '<span class="mi">42</span>', '<span class="mi">7</span>'):
        assert page.count(secret) == folded.count(secret) > 0, secret
    assert "# the exercise" in page
    assert "# the exercise" not in folded


@needs_extra
def test_a_link_to_a_line_of_code_leads_to_that_line(site):
    assert 'href="../../source/src/finematch/boxes.py.html#L12"' in text(site, "notebooks/mvam/8_tiny")
    line = (ROOT / "src" / "finematch" / "boxes.py").read_text(encoding="utf-8").splitlines()[11]
    code = text(site, "source/src/finematch/boxes.py")
    (shown,) = re.findall(r'<span id="L12"><span class="linenos"> *12</span>(.*?)\n</span>', code, re.S)
    assert re.sub(r"<[^>]+>", "", shown).strip() == line.strip()


@needs_extra
def test_the_front_page_shows_each_figure_with_its_page(site):
    front = text(site, "index")
    shown = re.findall(r'<a class="[^"]*" href="(notebooks/[^"]+)"><img [^>]*src="_images/([^"]+)"', front)
    stems = {Path(name).stem for _, name in shown}
    assert stems == {path.stem for kind in ("svg", "png") for path in (ROOT / "figures").glob(f"*.{kind}")
                     if ".smoke." not in path.name}  # fmt: skip
    readme = re.findall(r"!\[.+?\]\(figures/(.+?)\)", (ROOT / "README.md").read_text(encoding="utf-8"))
    assert sorted(name for _, name in shown[: len(readme)]) == sorted(readme)
    of = {Path(name).stem: page for page, name in shown}
    assert of["mvam_views.scenes.tiny"] == "notebooks/mvam/3_ablations.mvam_views.scenes.tiny.html"
    assert of["mvam_lambda.scenes.tiny"] == "notebooks/mvam/3_ablations.html"
    assert of["hslm_attention.scenes.5"] == "notebooks/hslm/4_attention.html"
    assert of["data_proposals"] == "notebooks/1_data.html"
    assert of["slan_cost"] == "notebooks/slan/3_ablations.html"


@needs_extra
def test_the_page_of_a_grid_is_called_after_it_and_says_that_the_notebook_is_another(site):
    page = text(site, "notebooks/mvam/3_ablations.mvam_views.scenes.tiny")
    assert "<h1>A tiny page (mvam_views.scenes.tiny)" in page
    shown = re.sub(r"<[^>]+>", "", page)
    assert "The notebook was edited after this run. make grid GRID=mvam_views runs it again." in shown


def test_a_figure_that_no_page_makes_is_an_error():
    with pytest.raises(ValueError, match=r"figures/holiday\.svg: no page makes it"):
        build.maker("figures/holiday.svg", ROOT, list(build.notebooks(ROOT)))


@pytest.mark.parametrize(
    ("run", "said"),
    [
        ({"end_time": None}, "did not come to its end"),
        ({"exception": True}, "did not come to its end"),
        ({"start_time": None}, "not made by papermill"),
        ({"parameters": {"note": "two words"}}, "-p note 'two words'"),
    ],
)
def test_what_stands_under_a_title(run, said):
    notebook, executed = (new_notebook(cells=[new_markdown_cell("# A")]) for _ in range(2))
    times = {"start_time": "2025-01-02T03:04:05", "end_time": "2025-01-02T03:04:07", "duration": 2.0}
    line = {"input_path": "a.ipynb", "output_path": "b.ipynb", "parameters": {}}
    executed.metadata["papermill"] = {**times, **line, **run}
    assert said in build.about("a", notebook, executed)


def test_a_notebook_without_a_title_is_an_error():
    with pytest.raises(ValueError, match=r"notebooks/a\.ipynb begins with 'No title'"):
        build.page("a", new_notebook(cells=[new_markdown_cell("No title")]), None)


@pytest.fixture(scope="module")
def browser():
    sync = pytest.importorskip("playwright.sync_api", reason="no playwright: pip install playwright")
    found = [
        path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))
    ]
    if not found:
        pytest.skip("no Chromium on the PATH: on Debian and Ubuntu, apt install chromium")
    with sync.sync_playwright() as play:
        browser = play.chromium.launch(executable_path=found[0], args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(params=["file", "server"])
def visit(request, site, browser):
    """Opens a page of the site, from the disk or from a plain web server, and holds what it asks for and complains of
    against nothing at all."""
    base, server = f"{site.as_uri()}/", None
    if request.param == "server":
        handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(site))
        handler.func.log_message = lambda *_: None
        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        base = f"http://127.0.0.1:{server.server_port}/"
    wrong: list[str] = []
    tab = browser.new_page(viewport={"width": 390, "height": 800})
    tab.on("request", lambda one: one.url.startswith((base, "data:")) or wrong.append(f"asks for {one.url}"))
    left = "net::ERR_ABORTED"  # the page was left before a picture had come
    tab.on("requestfailed", lambda one: one.failure == left or wrong.append(f"{one.failure} {one.url}"))
    tab.on("response", lambda one: one.status < 400 or wrong.append(f"{one.status} {one.url}"))
    tab.on("console", lambda one: one.type == "error" and wrong.append(one.text))
    tab.on("pageerror", lambda one: wrong.append(str(one)))

    def opened(path: str):
        tab.goto(base + path)
        return tab

    yield opened
    tab.close()
    if server:
        server.shutdown()
    assert wrong == []


@needs_extra
def test_formulas_are_drawn_and_pictures_are_there(visit):
    tab = visit("notebooks/mvam/8_tiny.html")
    tab.wait_for_selector("mjx-container svg")
    assert tab.locator("mjx-container > svg").count() == 3  # one of them is in an output
    assert tab.locator("mjx-merror, .MathJax_Error").count() == 0
    assert tab.evaluate("[...document.images].every(one => one.complete && one.naturalWidth > 0)")
    assert not tab.get_by_text("fortytwo").is_visible()
    tab.locator("details.solution summary").click()
    assert tab.get_by_text("fortytwo").is_visible()


@needs_extra
@pytest.mark.parametrize("method", ["mvam", "hslm", "felga", "slan"])
def test_no_formula_of_a_lesson_is_an_error_and_no_line_widens_a_phone(visit, method):
    tab = visit(f"notebooks/{method}/1_lesson.html")
    tab.wait_for_selector("mjx-container svg")
    wanted = tab.evaluate("document.querySelectorAll('.math.notranslate').length")
    tab.wait_for_function(f"document.querySelectorAll('mjx-container > svg').length >= {wanted}")
    assert wanted > 20
    assert tab.locator("[data-mjx-error]").count() == 0
    assert tab.evaluate("document.documentElement.scrollWidth") <= 390


@needs_extra
def test_the_gallery_loads_its_pictures_as_they_are_scrolled_to(visit):
    tab = visit("index.html")
    figures = tab.locator("figure img")
    figures.last.scroll_into_view_if_needed()
    tab.wait_for_function("[...document.querySelectorAll('figure img')].at(-1).naturalWidth > 0")
    assert figures.count() > 50


@needs_extra
def test_search_finds_a_word_and_its_page(visit):
    tab = visit("index.html")
    tab.goto(tab.url.replace("index.html", "search.html?q=quokkaword"))
    tab.wait_for_selector("#search-results li a")
    assert "A tiny page" in tab.locator("#search-results li a").all_inner_texts()
    tab.locator("#search-results").get_by_role("link", name="A tiny page", exact=True).click()
    tab.wait_for_selector("h1:has-text('A tiny page')")


def test_a_page_that_failed_is_shown_as_far_as_it_came(tmp_path):
    notebook = new_notebook(
        cells=[new_markdown_cell("# Title"), new_code_cell("1 / 0")], metadata=notebooks_build.KERNEL
    )
    nbformat.write(notebook, tmp_path / "page.ipynb")
    command = [sys.executable, "-m", "papermill", "--no-progress-bar", "page.ipynb", "done.ipynb"]
    assert subprocess.run(command, cwd=tmp_path, capture_output=True, timeout=300).returncode
    executed = nbformat.read(tmp_path / "done.ipynb", as_version=4)
    assert len(executed.cells) > 2, "papermill adds cells that say so"
    shown = build.page("a", notebook, executed)
    assert shown.cells[0].source.startswith("# Title\n\nThe command line that made this page")
    assert "This run did not come to its end" in shown.cells[0].source
    assert [cell.source for cell in shown.cells[1:]] == ["1 / 0"]
