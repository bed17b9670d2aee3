"""Every notebook is a pair that agrees and refuses parameters it does not declare; every grid's row fits."""

import ast
import csv
import sys
from itertools import product
from pathlib import Path

import nbformat
import papermill
import pytest
from notebook_text import NOTEBOOKS, ROOT, accepted, build, cells, declaration, until_checked
from papermill.cli import _resolve_type

from finematch import grids
from finematch.config import ParameterError, Settings

SOURCES = build.sources(NOTEBOOKS)
GRIDS = sorted((ROOT / "grids").glob("*.csv"))
ALWAYS = {"dataset", "data_root", "scale", "seed", "out", "smoke"}
LIGHT = sys.stdlib_module_names | {"finematch.config"}

each_notebook = pytest.mark.parametrize(
    "source", SOURCES, ids=[str(path.relative_to(NOTEBOOKS).with_suffix("")) for path in SOURCES]
)
each_grid = pytest.mark.parametrize("grid", GRIDS, ids=[path.stem for path in GRIDS])

TINY = """# %% [markdown]
# # A tiny notebook

# %% tags=["parameters"]
dataset: str = "scenes"  # data set
views: int = 16  # number of view codes

# %% jupyter={"source_hidden": true}
from finematch.config import parameters

p = parameters(globals(), views=(1, 256))
"""


def rows(grid: Path) -> list[dict[str, str]]:
    with grid.open(newline="") as file:
        return list(csv.DictReader(file))


def trainer(grid: Path) -> Path:
    """The notebook that a grid's rows are runs of."""
    found = grids.grid(grid.stem, folder=grid.parent)
    return NOTEBOOKS / found.method / f"{found.page}.py"


def test_there_are_notebooks_and_grids():
    assert SOURCES
    assert GRIDS


@each_notebook
def test_the_pair_agrees(source):
    stored = source.with_suffix(".ipynb")
    assert stored.exists(), "run make notebooks"
    assert stored.read_text(encoding="utf-8") == build.build(source), "run make notebooks"


@each_notebook
def test_cells_and_kernel(source):
    notebook = nbformat.reads(build.build(source), as_version=4)
    nbformat.validate(notebook)
    assert notebook.metadata.kernelspec.name == "python3"
    assert notebook.cells[0].cell_type == "markdown"
    tagged = [n for n, cell in enumerate(notebook.cells) if "parameters" in cell.metadata.get("tags", [])]
    assert tagged == [1], "the second cell, and no other, is tagged parameters"
    assert notebook.cells[2].cell_type == "code"
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert not any(cell.outputs or cell.execution_count for cell in code)


@each_notebook
def test_parameters_are_flat_scalars_with_comments(source):
    declared = declaration(source)
    assert set(declared) >= ALWAYS
    for name, (kind, default, comment) in declared.items():
        assert kind in ("int", "float", "str", "bool"), f"{name}: {kind}"
        assert default is None or type(default).__name__ == kind, f"{name}: {kind} = {default!r}"
        assert comment, f"{name} has no comment on its line"


@each_notebook
def test_papermill_sees_the_same_parameters(source):
    """Its inspector is a regular expression: what that misses, `--help-notebook` does not show."""
    seen = papermill.inspect_notebook(str(source.with_suffix(".ipynb")))
    declared = declaration(source)
    assert {name: one["inferred_type_name"] for name, one in seen.items()} == {
        name: kind for name, (kind, _, _) in declared.items()
    }
    assert all(one["help"] for one in seen.values())


@each_notebook
def test_the_third_cell_accepts_the_defaults_and_refuses_a_misspelling(source):
    defaults = {name: default for name, (_, default, _) in declaration(source).items()}
    taken = accepted(source)
    if isinstance(taken, Settings):  # what is unset is resolved
        assert taken.given == {}
        assert taken.as_dict().keys() == defaults.keys()
        assert None not in taken.as_dict().values()
    else:
        assert taken.as_dict() == defaults
    with pytest.raises(ParameterError, match=r"unknown parameter 'sead': did you mean 'seed'"):
        accepted(source, {"sead": 1})


@each_notebook
def test_nothing_heavy_is_imported_before_the_parameters_are_checked(source):
    for statement in until_checked(source):
        for node in ast.walk(statement):
            if isinstance(node, ast.Import):
                modules = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                modules = [node.module]
            else:
                continue
            assert all(name in LIGHT or name.split(".")[0] in sys.stdlib_module_names for name in modules), (
                modules
            )


@each_notebook
def test_no_model_is_defined_in_a_notebook(source):
    for cell in cells(source):
        if cell.cell_type != "code":
            continue
        plain = "\n".join(
            line for line in cell.source.splitlines() if not line.lstrip().startswith(("%", "!"))
        )
        for node in ast.walk(ast.parse(plain)):
            if isinstance(node, ast.ClassDef):
                bases = [ast.unparse(base).split(".")[-1] for base in node.bases]
                assert "Module" not in bases, f"class {node.name}: models live in src/finematch"


@each_grid
def test_rows_of_a_grid_are_slugs(grid):
    names = [row["name"] for row in rows(grid)]
    assert len(set(names)) == len(names) > 1
    assert all(name.replace("-", "").isalnum() and name == name.lower() for name in names), names
    for row in rows(grid):
        assert None not in row, f"{row['name']}: more cells than columns"
        assert None not in row.values(), f"{row['name']}: fewer cells than columns"


@each_grid
def test_rows_of_a_grid_are_accepted_by_its_notebook(grid):
    """Columns, types, ranges and choices, with each cell read the way papermill's -p reads it."""
    source = trainer(grid)
    assert source.exists(), f"{grid.name} has no notebook {source.relative_to(ROOT)}"
    assert set(rows(grid)[0]) - {"name"} <= set(declaration(source))
    assert not (set(rows(grid)[0]) & ALWAYS), "these come from the command line, for every row"
    declared = grids.grid(grid.stem, folder=grid.parent)
    for row, scale in product(declared.rows, ("tiny", "paper")):
        cells = declared.cells(row, scale)
        injected = {"scale": scale} | {key: _resolve_type(cell) for key, cell in cells.items()}
        params = accepted(source, injected).as_dict()
        assert params == params | injected


@each_grid
def test_links_name_rows_without_links(grid):
    declared = grids.grid(grid.stem, folder=grid.parent)
    linked = {
        part.split("}")[0] for row in rows(grid) for cell in row.values() for part in cell.split("{run:")[1:]
    }
    for name in linked:
        of = declared.of(name)
        assert name in of.rows
        assert not any("{run:" in cell for cell in of.rows[name].values())


def test_build_keeps_tags_and_nothing_that_changes(tmp_path):
    (tmp_path / "sub").mkdir()
    source = tmp_path / "sub" / "tiny.py"
    header = (
        "---",
        "jupyter:",
        "  jupytext:",
        "    jupytext_version: 1.0.0",
        "  kernelspec: {display_name: Other, language: python, name: other}",
        "---",
    )
    source.write_text(TINY)
    assert build.main(["--folder", str(tmp_path)]) == 0
    text = source.with_suffix(".ipynb").read_text()
    notebook = nbformat.reads(text, as_version=4)
    assert [cell.id for cell in notebook.cells] == ["cell-001", "cell-002", "cell-003"]
    assert [dict(cell.metadata) for cell in notebook.cells] == [
        {},
        {"tags": ["parameters"]},
        {"jupyter": {"source_hidden": True}},
    ]
    assert notebook.metadata.kernelspec.name == "python3"
    assert "jupytext" not in text
    source.write_text("".join(f"# {line}\n" for line in header) + TINY)
    assert build.build(source) == text, "a jupytext header changes nothing"
    assert accepted(source).as_dict() == {"dataset": "scenes", "views": 16}


def test_check_names_stale_pairs_and_writes_nothing(tmp_path, capsys):
    source, stored = tmp_path / "tiny.py", tmp_path / "tiny.ipynb"
    check = ["--check", "--folder", str(tmp_path)]
    source.write_text(TINY)
    assert build.main(check) == 1
    assert "tiny.ipynb" in capsys.readouterr().out
    assert not stored.exists()
    assert build.main(check[1:]) == 0
    assert build.main(check) == 0
    source.write_text(TINY + "\n# %%\nprint(p.views)\n")
    before = stored.read_text()
    assert build.main(check) == 1
    assert stored.read_text() == before
    capsys.readouterr()
    source.rename(tmp_path / "renamed.py")
    assert build.main(check[1:]) == 0
    assert build.main(check) == 1
    assert "tiny.ipynb: has no .py" in capsys.readouterr().out


def test_a_saved_or_executed_notebook_is_stale_until_it_is_built_again(tmp_path):
    source, stored = tmp_path / "tiny.py", tmp_path / "tiny.ipynb"
    source.write_text(TINY)
    folder = ["--folder", str(tmp_path)]
    build.main(folder)
    notebook = nbformat.read(stored, as_version=4)
    notebook.cells[1].outputs = [nbformat.v4.new_output("stream", text="an output")]
    nbformat.write(notebook, stored)
    assert build.main(["--check", *folder]) == 1
    build.main(folder)
    assert "an output" not in stored.read_text()


def test_jupyterlab_writes_the_py_beside_the_notebook(tmp_path):
    """Saving in JupyterLab keeps the pair: jupytext.toml is read, the .py comes back as it was."""
    from jupyter_server.services.contents.largefilemanager import LargeFileManager
    from jupytext.sync_contentsmanager import build_sync_jupytext_contents_manager_class

    source = tmp_path / "tiny.py"
    source.write_text(TINY)
    (tmp_path / "jupytext.toml").write_text((NOTEBOOKS / "jupytext.toml").read_text())
    build.main(["--folder", str(tmp_path)])
    manager = build_sync_jupytext_contents_manager_class(LargeFileManager)(root_dir=str(tmp_path))
    opened = manager.get("tiny.ipynb")["content"]
    opened["cells"][1]["outputs"] = [nbformat.v4.new_output("stream", text="an output")]
    manager.save({"type": "notebook", "format": "json", "content": opened}, "tiny.ipynb")
    assert source.read_text() == TINY
    opened["cells"][1]["source"] = opened["cells"][1]["source"].replace("16", "8")
    manager.save({"type": "notebook", "format": "json", "content": opened}, "tiny.ipynb")
    assert source.read_text() == TINY.replace("16", "8")


def test_rows_of_one_name_are_one_run():
    """Two grids of a method share the run folder of a row's name, so its parameters must agree, at every scale."""
    seen: dict[tuple[str, str, str], dict] = {}
    for name, scale in product(grids.names(ROOT / "grids"), ("tiny", "paper")):
        grid = grids.grid(name, folder=ROOT / "grids")
        for row in grid.rows:
            cells_ = grid.cells(row, scale)
            first = seen.setdefault((grid.method, row, scale), cells_)
            assert first == cells_, f"{name}: {row} is {cells_}, elsewhere {first}"
