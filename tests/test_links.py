"""Every relative link leads somewhere: its file exists, its #anchor is a heading there, its #L line defines the name.

Links of the notebooks' Markdown cells, of docs/, README and RESULTS.
"""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path
from urllib.parse import unquote

import nbformat
import pytest
from notebook_text import NOTEBOOKS, ROOT, build

LINK = re.compile(r"\[((?:[^\[\]]|\[[^\]]*\])*)\]\(([^()\s]+(?:\([^()\s]*\)[^()\s]*)*)(?: \"[^\"]*\")?\)")
PAGES = [ROOT / "README.md", ROOT / "RESULTS.md", *sorted((ROOT / "docs").glob("*.md")),
         *(source.with_suffix(".ipynb") for source in build.sources(NOTEBOOKS))]  # fmt: skip


@cache
def prose(page: Path) -> str:
    """The Markdown of a page without its code."""
    text = page.read_text(encoding="utf-8")
    if page.suffix == ".ipynb":
        found = nbformat.reads(text, as_version=4).cells
        text = "\n\n".join(cell.source for cell in found if cell.cell_type == "markdown")
    return re.sub(r"^```.*?^```", "", text, flags=re.M | re.S)


@cache
def anchors(page: Path) -> set[str]:
    """What a link may name after the #: headings as GitHub and Sphinx write them, as JupyterLab does, and ids."""
    text = prose(page)
    found = set(re.findall(r"<a (?:id|name)=\"([^\"]+)\"", text))
    for heading in re.findall(r"^#+ (.+?) *#*$", text, re.M):
        words = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).replace("`", "").replace("*", "")
        found.add(words.replace(" ", "-"))
        found.add("".join(c for c in words.lower().replace(" ", "-") if c.isalnum() or c in "-_"))
    return found


def complaint(page: Path, text: str, target: str) -> str:
    """What is wrong with a link, or nothing."""
    path, _, anchor = unquote(target).partition("#")
    file = (page.parent / path).resolve() if path else page
    if not file.exists():
        return "leads to no file"
    if not file.is_relative_to(ROOT):
        return "leads out of the repository"
    if file.suffix in (".md", ".ipynb"):
        return "names no heading there" if anchor and anchor not in anchors(file) else ""
    line = re.fullmatch(r"L(\d+)", anchor)
    if anchor and not line:
        return "has an anchor that is no line"
    named = re.fullmatch(r"`([\w.]+)(?:\(\))?`", text)
    if file.suffix == ".py" and named:
        defined = build.definitions(file)
        if named[1] not in defined:
            return f"names {named[1]}, which the file does not define"
        if not line or int(line[1]) != defined[named[1]]:
            return f"should end in #L{defined[named[1]]}: run make notebooks"
    if line and int(line[1]) > len(file.read_text(encoding="utf-8").splitlines()):
        return "names a line that the file does not have"
    return ""


@pytest.mark.parametrize("page", PAGES, ids=[str(page.relative_to(ROOT)) for page in PAGES])
def test_relative_links_lead_somewhere(page):
    links = [(text, target) for text, target in LINK.findall(prose(page))
             if "://" not in target and not target.startswith("mailto:")]  # fmt: skip
    assert not {target: why for text, target in links if (why := complaint(page, text, target))}


def test_what_is_wrong_is_seen():
    """Files, anchors and lines that are not there, on the glossary as an example."""
    page, losses = ROOT / "docs" / "glossary.md", "../src/finematch/losses.py"
    line = build.definitions(ROOT / "src" / "finematch" / "losses.py")["contrastive"]
    right = {"#retrieval": "x", "../notebooks/1_data.ipynb": "x", "../README.md#the-notebooks": "x",
             f"{losses}#L{line}": "`contrastive`", f"{losses}#L1": "x", losses: "x"}  # fmt: skip
    assert not {target: why for target, text in right.items() if (why := complaint(page, text, target))}
    for text, target, why in (
        ("x", "nothing.md", "leads to no file"),
        ("x", "../..", "leads out of the repository"),
        ("x", "#no-such-term", "names no heading"),
        ("x", "../README.md#nothing", "names no heading"),
        ("`contrastive`", f"{losses}#L{line + 1}", f"should end in #L{line}"),
        ("`contrastive`", losses, f"should end in #L{line}"),
        ("`nothing`", f"{losses}#L1", "does not define"),
        ("x", f"{losses}#L99999", "a line that the file does not have"),
        ("x", f"{losses}#contrastive", "an anchor that is no line"),
    ):
        assert why in complaint(page, text, target), target
