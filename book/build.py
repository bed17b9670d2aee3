"""Builds the book: a static site of the executed notebooks, the docs and the results that are on disk. It runs nothing.

    python book/build.py            writes book/html; open book/html/index.html        (make book)

The pages are laid out in book/pages as in the repository, so that their links to one another hold, and Sphinx makes
the site from there (conf.py). A notebook is shown as papermill_runs/workbook has it (`make workbook`), under its title
the command line that made it; one that was not run is shown without outputs and says so. Beside 3_ablations stand its
executed copies for single grids (`make grid`). The front page is made here: the figures, each with its page.
"""

import argparse
import datetime
import importlib.util
import re
import shlex
import shutil
import sys
import tomllib
from pathlib import Path

import nbformat

ROOT = Path(__file__).resolve().parents[1]
METHODS = ("mvam", "hslm", "felga", "slan", "arena")
LAST = "6789"  # pages that begin so come after the methods
RUN = "papermill_runs/workbook"
PAPERMILL_SAYS = "papermill-error-cell-tag"  # cells that it adds to a page that failed
FOLDED = '<details class="admonition solution"><summary class="admonition-title">Solution</summary>'


def notebooks(root: Path) -> dict[str, Path]:
    """The pages in reading order: `mvam/1_lesson` and the executed copy, which may not exist. The copy for a grid is
    called `mvam/3_ablations.mvam_views.scenes.tiny`."""
    found = {}
    for folder in ("", *METHODS):
        for path in (root / "notebooks" / folder).glob("[0-9]_*.ipynb"):
            name = f"{folder}/{path.stem}".lstrip("/")
            found[name] = root / RUN / f"{name}.ipynb"
    for path in (root / "papermill_runs").glob("*/*.*.*.ipynb"):
        dataset, scale, grid = path.stem.split(".", 2)
        if (root / "grids" / f"{grid}.csv").is_file() and "smoke" not in scale:
            found[f"{page_of_grids(path.parent.name)}.{grid}.{dataset}.{scale}"] = path
    place = {folder: number for number, folder in enumerate(("", *METHODS))}
    return {
        name: found[name]
        for name in sorted(found, key=lambda one: (one[0] in LAST, place[one.rpartition("/")[0]], one))
    }


def page_of_grids(method: str) -> str:
    """The page that draws the tables of a method's grids."""
    return "7_compare" if method == "arena" else f"{method}/3_ablations"


def committed(name: str, root: Path) -> Path:
    """The notebook of the repository that a page is of."""
    return root / "notebooks" / f"{name.partition('.')[0]}.ipynb"


def cells(notebook) -> list[str]:
    """The sources as committed, without the cell of parameters that papermill puts in."""
    return [
        cell.source
        for cell in notebook.cells
        if not {"injected-parameters", PAPERMILL_SAYS}.intersection(cell.metadata.get("tags", []))
    ]


def about(name: str, notebook, executed) -> str:
    """What stands under a page's title: the command line that made it, or would make it."""

    def command(source, target, given):
        pairs = [word for key, value in given.items() for word in ("-p", key, str(value))]
        return f"```bash\n{shlex.join(['papermill', source, target, *pairs])}\n```\n"

    if executed is None:
        line = command(f"notebooks/{name}.ipynb", f"{RUN}/{name}.ipynb", {})
        return (
            ":::{note}\nThis page was not run here, so it has no outputs. `make workbook` runs every page in turn, and "
            f"then `make book` shows their outputs. The command line of this page alone:\n\n{line}:::\n"
        )
    run = executed.metadata.get("papermill", {})
    if not run.get("start_time"):
        return ":::{note}\nThe outputs were not made by papermill, so their command line is not known.\n:::\n"
    day = datetime.datetime.fromisoformat(run["start_time"]).date()
    took = f", in {run['duration']:,.0f} s" if run.get("duration") else ""
    line = command(run["input_path"], run["output_path"], run["parameters"])
    text = f"The command line that made this page, on {day}{took}:\n\n{line}"
    if run.get("exception") or not run.get("end_time"):
        text += "\n:::{warning}\nThis run did not come to its end: the page shows how far it came.\n:::\n"
    elif cells(executed) != cells(notebook):
        again = f"make grid GRID={name.split('.')[1]}" if "." in name else "make workbook"
        text += f"\n:::{{note}}\nThe notebook was edited after this run. `{again}` runs it again.\n:::\n"
    return text


def page(name: str, notebook, executed):
    """The notebook as the book shows it: its command line under its title, solutions and hidden sources folded."""
    shown = executed or notebook
    shown.cells = [cell for cell in shown.cells if PAPERMILL_SAYS not in cell.metadata.get("tags", [])]
    title, _, rest = shown.cells[0].source.partition("\n")
    if not title.startswith("# "):
        raise ValueError(f"notebooks/{name}.ipynb begins with {title!r}; begin it with a title, `# ...`")
    grid = f" ({name.partition('.')[2]})" if "." in name else ""
    shown.cells[0].source = f"{title}{grid}\n\n{about(name, notebook, executed)}\n{rest}"
    shown.metadata.pop(
        "widgets", None
    )  # scripts from the network would draw them; the text in their place stays
    for cell in shown.cells:
        tags = cell.metadata.setdefault("tags", [])
        if "solution" in tags and cell.cell_type == "markdown":
            cell.source = f"{FOLDED}\n\n{cell.source}\n\n</details>"
        elif "solution" in tags:
            tags.append("hide-cell")
            cell.metadata["mystnb"] = {"code_prompt_show": "Solution", "code_prompt_hide": "Solution"}
        elif cell.metadata.get("jupyter", {}).get("source_hidden"):
            tags.append("hide-input")
    return shown


def maker(path: str, root: Path, pages: list[str]) -> str:
    """The page that makes a figure: that of its grid, the one it is named after, or the one whose code names it."""
    key, *rest = Path(path).stem.split(".")
    if (root / "grids" / f"{key}.csv").is_file():
        page_of_all = page_of_grids(key.partition("_")[0])
        own = ".".join([page_of_all, key, *rest[:2]]).removesuffix("-literal")
        return own if own in pages else page_of_all
    for name in pages:
        if f"{key}_".startswith(re.sub(r"(^|/)\d_", r"\1", name).replace("/", "_") + "_"):
            return name
    for name in pages:
        if f"{key}.svg" in committed(name, root).read_text("utf-8"):
            return name
    raise ValueError(
        f"{path}: no page makes it. Name it <method>_<page>..., or after a grid, or have a page name it"
    )


def told(stem: str, root: Path) -> str:
    """A figure or table in words, from its name: `mvam_views.scenes.tiny` is "Number of views: scenes, tiny"."""
    key, _, rest = stem.partition(".")
    grid = root / "grids" / f"{key}.toml"
    words = tomllib.loads(grid.read_text("utf-8"))["title"] if grid.is_file() else key.replace("_", " ")
    return f"{words}: {rest.replace('.', ', ')}" if rest else words


def figure(path: str, alt: str, caption: str, target: str) -> str:
    return f":::{{figure}} {path}\n:alt: {alt}\n:target: notebooks/{target}.html\n:loading: lazy\n\n{caption}\n:::\n"


def gallery(root: Path, pages: list[str]) -> str:
    """The front page: the README's figures with their words, then all others, under the pages that make them."""
    readme = (root / "README.md").read_text("utf-8")
    intro = re.search(r"^# finematch\n\n(.*?)\n\n", readme, re.S)[1]
    text = [f"# finematch: the book\n\n{intro}\n\nEach figure leads to the page that makes it.\n"]
    text += ["::::{container} gallery large\n"]
    first = re.findall(r"^!\[(.+?)\]\((figures/.+?)\)\n\n\*(.+?)\*$", readme, re.M)
    text += [figure(path, alt, caption, maker(path, root, pages)) for alt, path, caption in first]
    text += ["::::\n\n## All figures\n"]
    shown = {Path(path).stem for _, path, _ in first}
    others: dict[str, dict[str, str]] = {}
    for kind in ("svg", "png"):  # of a figure that is there as both the png, which is smaller
        for path in sorted((root / "figures").glob(f"*.{kind}")):
            if ".smoke." not in path.name and path.stem not in shown:
                others.setdefault(maker(f"figures/{path.name}", root, pages), {})[path.stem] = path.name
    for target in sorted(others, key=pages.index):
        text += [f"### [](notebooks/{target}.ipynb)\n\n::::{{container}} gallery\n"]
        for stem, name in sorted(others[target].items()):
            key, words = stem.partition(".")[0], [told(stem, root)]
            if (root / "grids" / f"{key}.csv").is_file():
                words += [f"`make grid GRID={key}`"]
            if (root / "figures" / f"{stem}.md").is_file():
                words += [f"[table](figures/{stem}.md)"]
            text += [figure(f"figures/{name}", words[0], "; ".join(words), target)]
        text += ["::::\n"]
    return "\n".join(text)


def contents(root: Path, pages: list[str]) -> str:
    """The table of contents, for the front page."""
    parts = {"Start": [f"notebooks/{name}" for name in pages if "/" not in name and name[0] not in LAST]}
    for method in METHODS:
        parts[method.upper()] = [f"notebooks/{name}" for name in pages if name.startswith(f"{method}/")]
    parts["Results"] = [f"notebooks/{name}" for name in pages if name[0] in LAST] + [
        "RESULTS",
        "docs/findings",
    ]
    docs = sorted(f"docs/{path.stem}" for path in (root / "docs").glob("*.md") if path.stem != "findings")
    parts["Documentation"] = ["Readme <README>", *docs]
    lists = [
        [f"```{{toctree}}\n:hidden:\n:caption: {caption}\n", *names, "```\n"]
        for caption, names in parts.items()
    ]
    return "\n".join(line for lines in lists for line in lines)


def lay_out(root: Path, folder: Path) -> None:
    """Writes the pages of the repository at `root` into `folder`, each at its place in the repository."""
    shutil.rmtree(folder, ignore_errors=True)
    pages = notebooks(root)
    for name, copy in pages.items():
        notebook = nbformat.read(committed(name, root), as_version=4)
        executed = nbformat.read(copy, as_version=4) if copy.is_file() else None
        target = folder / "notebooks" / f"{name}.ipynb"
        target.parent.mkdir(parents=True, exist_ok=True)
        nbformat.write(page(name, notebook, executed), target)
    for path in [root / "README.md", root / "RESULTS.md", *(root / "docs").glob("*.md")]:
        (folder / path.relative_to(root)).parent.mkdir(exist_ok=True)
        shutil.copy(path, folder / path.relative_to(root))
    (folder / "figures").mkdir()
    for path in (root / "figures").iterdir():
        target = folder / "figures" / path.name
        if path.suffix == ".md":  # a table, which has no title
            title = f"---\norphan: true\n---\n# {told(path.stem, root)}\n\n"
            target.write_text(title + path.read_text("utf-8"), "utf-8")
        else:
            target.symlink_to(path.resolve())
    names = list(pages)
    (folder / "index.md").write_text(f"{gallery(root, names)}\n{contents(root, names)}", "utf-8")


def main(arguments: list[str] | None = None) -> int:
    """Returns the exit status: with `--strict` 1 where Sphinx warns, of a dead link for example."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--root", type=Path, default=ROOT, help="the repository")
    parser.add_argument(
        "--out", type=Path, default=ROOT / "book", help="folder for html/, and for its sources pages/"
    )
    parser.add_argument("--strict", action="store_true", help="a warning is an error")
    options = parser.parse_args(arguments)
    if missing := [name for name in ("furo", "mathjax", "myst_nb") if importlib.util.find_spec(name) is None]:
        sys.exit(
            f"The book needs {', '.join(missing)}, not installed here: make book, or pip install -e '.[book]'"
        )
    from sphinx.application import Sphinx

    root, pages, site = options.root.resolve(), options.out / "pages", options.out / "html"
    lay_out(root, pages)
    shutil.rmtree(site, ignore_errors=True)
    given = {"confoverrides": {"book_root": str(root)}, "status": None, "warningiserror": options.strict}
    app = Sphinx(pages, Path(__file__).parent, site, pages / ".doctrees", "html", **given)
    app.build()
    print(f"The book: {site / 'index.html'}")
    return app.statuscode


if __name__ == "__main__":
    sys.exit(main())
