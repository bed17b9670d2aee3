"""Lessons to hand out: student pages without solutions, and a folder or zip that works without a network.

A student page is a lesson without the cells that are tagged `solution`; its exercise cells are empty (`...`).
"""

from __future__ import annotations

import shutil
from pathlib import Path

import nbformat

from finematch.config import root
from finematch.data import load
from finematch.exercises import METHODS
from finematch.files import DataError

FILES = ("pyproject.toml", "requirements.lock", "environment.yml", "LICENSE", "README.md", "docs")
START = """\
# Lessons of fine-grained image-text matching

Each notebook under `notebooks/` is one lesson. Cells with `...` are exercises; `check(...)` says what is wrong.

    python -m venv .venv && source .venv/bin/activate
    pip install -r requirements.lock -e .
    jupyter lab

The images are in `data/scenes`. After the installation no network is needed.
"""


def student_page(notebook: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """A copy of a lesson without solutions and outputs."""
    page = nbformat.from_dict(notebook)
    page.cells = [cell for cell in page.cells if "solution" not in cell.metadata.get("tags", [])]
    for cell in page.cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    return page


def write_student(out: str | Path) -> list[Path]:
    """Write the student page of each lesson to `out/<method>/1_lesson.ipynb`."""
    written = []
    for method in METHODS:
        page = student_page(nbformat.read(root() / "notebooks" / method / "1_lesson.ipynb", as_version=4))
        target = Path(out) / method / "1_lesson.ipynb"
        target.parent.mkdir(parents=True, exist_ok=True)
        nbformat.write(page, target)
        written.append(target)
    return written


def write_handout(archive: str | Path, data_root: str | Path) -> Path:
    """Write a zip with the student pages, the library, what installs it, and the embedded data set (drawn if missing).

    Raises:
        DataError: The zip cannot be written.
    """
    archive = Path(archive).with_suffix(".zip")
    folder = archive.with_suffix(".part")
    shutil.rmtree(folder, ignore_errors=True)
    load("scenes", data_root, "train")  # drawn now if it is not there
    try:
        inside = folder / archive.stem
        write_student(inside / "notebooks")
        (inside / "START.md").write_text(START, encoding="utf-8")
        for name in FILES:
            source = root() / name
            (shutil.copytree if source.is_dir() else shutil.copy)(source, inside / name)
        skip = shutil.ignore_patterns("__pycache__", "*.egg-info")
        shutil.copytree(root() / "src", inside / "src", ignore=skip)
        (inside / "figures").mkdir()
        for table in (*(root() / "figures").glob("*.claims.csv"), *(root() / "figures").glob("*.md")):
            shutil.copy(table, inside / "figures")
        shutil.copytree(root() / "grids", inside / "grids")
        lessons_need = shutil.ignore_patterns("vqa", "nlvr2", "clips", "videos", ".*")
        shutil.copytree(Path(data_root) / "scenes", inside / "data" / "scenes", ignore=lessons_need)
        shutil.make_archive(str(folder / "zip"), "zip", folder, archive.stem)
        (folder / "zip.zip").replace(archive)
    except OSError as error:
        raise DataError(
            archive, "the handout", f"cannot be written ({error})", "Choose another place"
        ) from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return archive
