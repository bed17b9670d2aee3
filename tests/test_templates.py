"""The templates of docs/adding_*.md: followed word for word in a copy of the workbook, their tests pass."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from notebook_text import ROOT

BLOCK = re.compile(r"^`([\w./]+)`(?:, after the line `([^\n]+)`)?:\n\n```\w*\n(.*?)^```$", re.M | re.S)
PAGES = {
    "adding_a_dataset": "test_data_my_photos",
    "adding_a_method": "test_mine",
    "adding_a_table": "test_mvam_mine",
}


def follow(page: str, book: Path) -> list[str]:
    """Do what a page says in a copy of the workbook; the files that it writes or changes."""
    done = []
    for name, after, text in BLOCK.findall((ROOT / "docs" / f"{page}.md").read_text(encoding="utf-8")):
        file = book / name
        if after:
            lines = file.read_text(encoding="utf-8").splitlines(keepends=True)
            assert lines.count(f"{after}\n") == 1, f"{page}: {name} has no line, or two, {after!r}"
            place = lines.index(f"{after}\n") + 1
            text = "".join([*lines[:place], text, *lines[place:]])
        else:
            assert not file.exists(), f"{page}: {name} exists already"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text, encoding="utf-8")
        done.append(name)
    return done


@pytest.mark.parametrize("page", PAGES)
def test_a_template_works(page, tmp_path):
    for folder in ("src", "grids", "notebooks"):
        skipped = shutil.ignore_patterns("__pycache__", "*.egg-info", ".*")
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=skipped)
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    (tmp_path / "tests").mkdir()
    shutil.copy(ROOT / "tests" / "conftest.py", tmp_path / "tests")
    written = follow(page, tmp_path)
    test = f"tests/{PAGES[page]}.py"
    assert test in written
    code = [name for name in written if name.endswith(".py")]
    for style in (["check"], ["format", "--check"]):
        looked = subprocess.run(
            [sys.executable, "-m", "ruff", *style, *code], cwd=tmp_path, capture_output=True, text=True
        )
        assert not looked.returncode, looked.stdout + looked.stderr
    ran = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-o", "pythonpath=src", test],
        cwd=tmp_path, capture_output=True, text=True,
    )  # fmt: skip
    assert not ran.returncode, ran.stdout + ran.stderr
    assert re.search(r"\d passed", ran.stdout), ran.stdout
