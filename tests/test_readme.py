"""README, RESULTS and docs: short, true to the runs that are kept; the files that they name exist; the snippet runs."""

import re
import shutil
import subprocess

import pytest
from notebook_text import NOTEBOOKS, ROOT
from test_run_notebooks import run_notebook

README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = [ROOT / "README.md", ROOT / "RESULTS.md", *sorted((ROOT / "docs").glob("*.md"))]


def test_readme_and_results_have_what_the_runs_gave(tmp_path):
    """Both are those of the metrics files and `figures/` that are kept with them, whatever else has been run."""
    names = subprocess.run(
        ["git", "ls-files", "-z", "papermill_runs", "figures"], cwd=ROOT, capture_output=True, text=True
    )
    kept = [name for name in names.stdout.split("\0") if name]
    if names.returncode or not kept:
        pytest.skip("not a git checkout")
    for name in kept:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    shutil.copy(ROOT / "README.md", tmp_path)
    given = {"out": tmp_path / "papermill_runs", "figures": tmp_path / "figures"}
    given |= {"readme": tmp_path / "README.md", "results": tmp_path / "RESULTS.md"}
    run_notebook("9_scorecard", tmp_path / "page", given)
    for name in ("README.md", "RESULTS.md"):
        assert (tmp_path / name).read_text(encoding="utf-8") == (ROOT / name).read_text(encoding="utf-8"), (
            name
        )


def test_tables_in_figures_are_those_of_the_metrics():
    """Published beside measured and the claims of every kept table, made again from the kept metrics."""
    from finematch import grids, readings, tables

    found = sorted((ROOT / "figures").glob("*.tiny.md"))
    assert found
    for path in found:
        name, dataset, scale, _ = path.name.split(".")
        if name == "readings":  # of 8_readings
            effects = readings.effects(dataset, scale, runs=ROOT / "papermill_runs")
            table = tables.to_markdown(readings.printed(effects), digits=1)
            assert path.read_text(encoding="utf-8") == table + "\n", path.name
            continue
        grid = grids.grid(name, dataset, folder=ROOT / "grids")
        runs = tables.runs_of(grid, dataset, scale, ROOT / "papermill_runs" / grid.method)
        assert path.read_text(encoding="utf-8") == tables.page(grid, dataset, scale, runs) + "\n", path.name
        claims = path.with_suffix(".claims.csv")  # of which README, findings and lessons are made
        if claims.exists() or len(tables.verdicts(grid, runs)):
            assert claims.read_text(encoding="utf-8") == tables.verdicts(grid, runs).to_csv(index=False), (
                claims.name
            )


def test_recipes_name_what_exists_and_results_show_them():
    """Columns, methods, settings and commits are checked by the reader of the file."""
    from finematch.tables import read_recipes

    recipes = read_recipes(ROOT / "benchmarks" / "recipes.csv")
    results = (ROOT / "RESULTS.md").read_text(encoding="utf-8")
    for method in recipes["method"].unique():
        assert f"## What was tried: {method.upper()}" in results, "make results"
    for verdict in recipes["verdict"]:
        assert verdict in results.replace("\\|", "|"), "make results"


def test_results_say_for_each_method_what_literal_sets():
    from finematch.config import literal_switches

    results = (ROOT / "RESULTS.md").read_text(encoding="utf-8")
    part = results.partition("\n## What the literal reading sets\n")[2].partition("\n## ")[0]
    for method in ("felga", "hslm", "mvam", "slan"):
        own = part.partition(f"**{method.upper()}**: ")[2].partition("**")[0]
        named = re.findall(r"^\| (\w+) +\|", own, re.M)[1:]
        assert named == [line["setting"] for line in literal_switches(method)]


def test_the_readme_is_short():
    assert len(README.splitlines()) <= 200
    assert len(re.findall(r"!\[", README)) <= 6


@pytest.mark.parametrize("page", PAGES, ids=[page.name for page in PAGES])
def test_files_that_are_named_exist(page):
    text = page.read_text(encoding="utf-8")
    for name in re.findall(r"`((?:notebooks|grids|src|tests|figures|benchmarks|docs)/[\w./-]+)`", text):
        if "mine" not in name and "my_" not in name:  # what a reader writes
            assert any((ROOT / f"{name}{ending}").exists() for ending in ("", ".py", ".csv")), name


def test_numbers_of_the_readme_are_those_of_the_results():
    results = (ROOT / "RESULTS.md").read_text(encoding="utf-8")
    numbers = re.findall(r"\d+\.\d+ ± \d+\.\d+", README)
    assert numbers
    for number in numbers:
        assert f" {number} " in results, number


def test_every_page_of_the_map_exists():
    named = {name for name in re.findall(r"^\| `([\w<>/*]+)` \|", README, re.M) if "_" in name}
    for name in named:
        for method in ("mvam", "hslm", "felga", "slan") if "<method>" in name else ("",):
            assert list(
                NOTEBOOKS.glob(f"{name.replace('<method>', method).rstrip('*')}*.py")
            ) or name.endswith("/"), name


def test_the_snippet_runs(tmp_path, monkeypatch, capsys):
    """On a smoke run in place of the newest one, and on its few scenes."""
    given = {"smoke": True, "out": tmp_path / "run", "cache": tmp_path / "cache"}
    run_notebook("mvam/2_train", tmp_path / "page", given)
    (snippet,) = re.findall(r"```python\n(.*?)```", README, re.S)
    snippet = snippet.replace('open_run("latest", method="mvam")', f"open_run({str(tmp_path / 'run')!r})")
    monkeypatch.chdir(ROOT)
    namespace: dict = {}
    exec(snippet, namespace)
    first, second, view = capsys.readouterr().out.splitlines()
    assert re.fullmatch(r"-?\d\.\d{3}  .+", first)
    assert first.endswith(namespace["sentences"][0])
    assert re.fullmatch(r"-?\d\.\d{3}  two green stars below a purple ring", second)
    assert namespace["view"] is namespace["matches"][0].looks[0]
    assert re.fullmatch(r"view 1 looks most at the box \[(\d+\.\d, ){3}\d+\.\d\]", view)
