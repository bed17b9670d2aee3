"""The map on 0_start_here: all pages in order, with measured times; each page leads to the next."""

from __future__ import annotations

import json
import re

import nbformat
import pytest
from notebook_text import NOTEBOOKS, ROOT
from test_run_notebooks import ORDER

LINK = r"\[[^\]]+\]\(([^)]+)\.ipynb\)"


def last_cell(page: str) -> str:
    cell = nbformat.read(NOTEBOOKS / f"{page}.ipynb", as_version=4).cells[-1]
    return cell.source.splitlines()[-1] if cell.cell_type == "markdown" else ""


def target(page: str, word: str) -> str:
    """The page that a line of navigation names after a word."""
    found = re.search(rf"{word}: {LINK}", last_cell(page))
    path = (NOTEBOOKS / page).parent / found[1] if found else None
    return str(path.resolve().relative_to(NOTEBOOKS)) if path else ""


def test_the_map_has_all_pages_with_the_times_that_were_measured():
    cells = nbformat.read(NOTEBOOKS / "0_start_here.ipynb", as_version=4).cells
    (page,) = [cell.source for cell in cells if cell.source.startswith("## The map")]
    rows = re.findall(rf"^\| {LINK} \|.*\| ([^|]+) \|$", page, re.M)
    assert [name for name, _ in rows] == ORDER
    seconds = json.loads((ROOT / "benchmarks" / "workbook.json").read_text(encoding="utf-8"))[
        "page_wall_seconds"
    ]
    for name, said in rows:
        if name in seconds:
            assert said == f"{max(1, round(seconds[name] / 60))} min", name
        else:  # not among the measured pages: what the page says of itself
            assert said.endswith("*"), name


@pytest.mark.parametrize("number", range(len(ORDER)), ids=ORDER)
def test_each_page_leads_to_the_one_before_and_the_next(number):
    page = ORDER[number]
    if page.endswith("1_lesson") and "Previous: [" not in last_cell(page):
        pytest.skip("the lesson has no such line yet")
    assert target(page, "Previous") == (ORDER[number - 1] if number else "")
    assert target(page, "Next") == (ORDER[number + 1] if number + 1 < len(ORDER) else "")
