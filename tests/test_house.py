"""The walls of the house: imports go one way, no machine's paths, what git keeps of runs, grids resolve."""

import ast
import json
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from finematch import grids

ROOT = Path(__file__).resolve().parents[1]
LIBRARY = ROOT / "src" / "finematch"
MODULES = sorted(LIBRARY.rglob("*.py"))
METHODS = {"mvam", "hslm", "felga", "slan", "rivals"}
BOTTOM = {"boxes", "files", "hold", "text", "losses", "config"}  # import nothing of ours
TOP = {"checkpoints", "training", "evaluation", "tables", "figures", "features", "runs"}
# open a run again, or before it is run, or run a student's answer beside the library: they know the models by name
OPENERS = {"rebuild", "explore", "search", "widgets", "rehearsal", "exercises", "lessons", "arena"}
MIDDLE = {"data", "encoders", "scenes"}  # stand on the bottom alone
GRIDS = sorted((ROOT / "grids").glob("*.csv"))


def imported(text: str, package: str) -> set[str]:
    """Dotted names that a module of `package` imports, anywhere in it; `from a import b` gives a.b."""
    names = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            parent = package.split(".")
            base = ".".join(parent[: len(parent) - node.level + 1]) if node.level else ""
            module = ".".join(part for part in (base, node.module) if part)
            names |= {f"{module}.{alias.name}" for alias in node.names}
    return names


def unit_of(name: str) -> str:
    """The room that a dotted name of ours belongs to: `finematch.models.mvam.MVAM` is of `mvam`."""
    parts = name.split(".")[1:]
    return "" if not parts else parts[1] if parts[0] == "models" and len(parts) > 1 else parts[0]


def complaints(module: str, text: str, *, is_package: bool = False) -> list[str]:
    """What `module` (dotted, from finematch) imports against the rules."""
    names = imported(text, module if is_package else module.rpartition(".")[0])
    unit = unit_of(module)
    ours = {unit_of(name) for name in names if name.startswith("finematch.")} - {unit}
    forbidden = METHODS  # a method is known by name to nobody, other methods included
    if unit in BOTTOM:
        forbidden = ours
    elif unit in MIDDLE:
        forbidden = METHODS | TOP
    elif unit in OPENERS:
        forbidden = set()
    found = [f"{module} imports finematch.{name}" for name in sorted(ours & forbidden)]
    if unit not in (
        "encoders",
        "standins",
    ):  # the one opens networks, the other writes them with random weights
        found += [f"{module} imports {name}" for name in sorted(names) if _is_model(name)]
    return found


def _is_model(name: str) -> bool:
    """Whether a dotted name is of timm, or a model (or a configuration) of transformers, or all of it."""
    package, _, rest = name.partition(".")
    if package == "transformers":
        return not rest or bool(re.search(r"^models\b|Model$|Model[A-Z]|For[A-Z]\w+$|Config$", rest))
    return package == "timm"


@pytest.mark.parametrize("path", MODULES, ids=[str(path.relative_to(LIBRARY)) for path in MODULES])
def test_imports_go_one_way(path):
    parts = path.relative_to(LIBRARY.parent).with_suffix("").parts
    is_package = parts[-1] == "__init__"
    module = ".".join(parts[:-1] if is_package else parts)
    assert complaints(module, path.read_text(encoding="utf-8"), is_package=is_package) == []


@pytest.mark.parametrize(
    ("module", "text"),
    [
        ("finematch.boxes", "from finematch.data.record import Box"),
        ("finematch.losses", "from . import text"),
        ("finematch.config", "import finematch.training"),
        ("finematch.models.mvam", "def f():\n    from finematch.models.hslm import x"),
        ("finematch.models.slan.tasks", "from ..mvam import pool"),
        ("finematch.models.slan.tasks", "from finematch.models import felga"),
        ("finematch.evaluation.retrieval", "from ..mvam import MVAM"),
        ("finematch.training", "import finematch.models.slan.locator"),
        ("finematch.scenes.generator", "from ..training import fit"),
        ("finematch.encoders", "from finematch.evaluation import retrieval"),
        ("finematch.models.mvam", "import timm"),
        ("finematch.scenes.generator", "from timm.models import create_model"),
        ("finematch.text", "from transformers import AutoModel"),
        ("finematch.text", "import transformers"),
        ("finematch.text", "from transformers import BertForMaskedLM"),
        ("finematch.models.slan.tasks", "from transformers.models.bert import modeling_bert"),
    ],
)
def test_forbidden_imports_are_found(module, text):
    assert complaints(module, text)


@pytest.mark.parametrize(
    ("module", "text"),
    [
        ("finematch.models.slan.tasks", "from .locator import Locator\nfrom ..losses import contrastive"),
        ("finematch.data.karpathy", "from finematch.data.record import Record"),
        ("finematch.encoders", "import timm\nfrom transformers import AutoModel"),
        ("finematch.text", "from transformers import BertTokenizerFast\nimport re"),
        ("finematch.models.mvam", "from finematch import encoders, losses"),
    ],
)
def test_allowed_imports_are_let_through(module, text):
    assert complaints(module, text) == []


def tracked() -> list[Path]:
    """What git tracks, or would once it is added."""
    listing = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    if listing.returncode:
        pytest.skip("not a git checkout")
    return sorted({ROOT / name for name in listing.stdout.split("\0") if name} - {Path(__file__)})


def test_no_machine_paths():
    personal = re.compile(
        r"(?<![\w.~}])/(home|Users|root|work|mnt|scratch|private)/[\w.-]+|\b[A-Z]:\\Users\\"
    )
    assert personal.search('data_root = "/home/somebody/data"')
    assert not personal.search("https://example.org/home/page and data/work/x")
    found = []
    for path in tracked():
        try:
            text = path.read_text(encoding="utf-8")
        except (
            UnicodeDecodeError,
            FileNotFoundError,
        ):  # a picture; a file deleted but not yet in git's index
            continue
        found += [f"{path.relative_to(ROOT)}: {match[0]}" for match in personal.finditer(text)]
    assert not found


@pytest.mark.parametrize(
    ("path", "ignored"),
    [
        ("papermill_runs/mvam/scenes.tiny.views-1.s0/metrics.json", False),
        ("papermill_runs/mvam/scenes.tiny.views-1.s0/run.ipynb", True),
        ("papermill_runs/mvam/scenes.tiny.views-1.s0/log.jsonl", True),
        ("papermill_runs/mvam/scenes.tiny.views-1.s0/checkpoint/state.pt", True),
        ("papermill_runs/mvam/scenes.tiny.clip-cls.s0/encoder/metrics.json", True),
        ("papermill_runs/mvam/scenes.tiny.table.ipynb", True),
        ("papermill_runs/mvam/scenes.smoke.views-1.s0/metrics.json", True),
        ("papermill_runs/workbook/1_data.ipynb", True),
        ("papermill_runs/workbook/mvam/metrics.json", True),
        ("figures/mvam_views.scenes.tiny.svg", False),
        ("figures/mvam_views.scenes.smoke.svg", True),
        ("data/scenes/meta.json", True),
        ("src/finematch/scenes/generator.py", False),
        (".venv/bin/python", True),
    ],
)
def test_git_keeps_metrics_of_real_runs_only(path, ignored, tmp_path):
    subprocess.run(["git", "init", "-q", tmp_path], check=True)
    (tmp_path / ".gitignore").write_text((ROOT / ".gitignore").read_text())
    (tmp_path / path).parent.mkdir(parents=True)
    (tmp_path / path).touch()
    shown = subprocess.run(
        ["git", "ls-files", "--others", "--exclude-standard"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    assert (path not in shown.stdout.split()) == ignored


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="no checkout of git")
def test_committed_runs_name_no_place_of_a_machine():
    listed = subprocess.run(
        ["git", "ls-files", "papermill_runs"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    files = [ROOT / name for name in listed.stdout.split()]
    assert files
    for file in files:
        parameters = json.loads(file.read_text(encoding="utf-8"))["parameters"]
        odd = [key for key, value in parameters.items() if isinstance(value, str) and os.path.isabs(value)]
        assert odd == [], f"{file}: {odd}"


@pytest.mark.parametrize(
    ("grid", "profile"),
    [*((grid, "default") for grid in GRIDS), *((grid, "slurm") for grid in GRIDS[::8])],
    ids=lambda one: one if isinstance(one, str) else one.stem,
)
def test_a_grid_resolves_to_its_runs(grid, profile):
    """A dry run lists rows x seeds runs and one table, at every row's own cells."""
    one = grids.grid(grid.stem, "flickr8k")
    rows = [{"name": name, **cells} for name, cells in one.rows.items()]
    command = [
        sys.executable,
        "-m",
        "snakemake",
        "--workflow-profile",
        f"profiles/{profile}",
        "-n",
        "--forceall",
    ]
    command += ["--config", f"grid={grid.stem}", "seeds=0,1", "dataset=flickr8k", "scale=paper"]
    command += ["proposals=boxes.json"] if one.boxes else []
    if profile == "slurm":  # its executor is a plugin that only a cluster needs
        command += ["--executor", "local", "--cores", "1"]
    dry = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=900)
    said = dry.stdout + dry.stderr
    assert dry.returncode == 0, said
    runs = 2 * (len(rows) + len(one.linked))  # those of another grid that rows build on come too
    assert set(re.findall(r"^run +(\d+)$", said, re.M)) == {str(runs)}, said
    assert set(re.findall(r"^table +(\d+)$", said, re.M)) == {"1"}
    for row in rows:
        for seed in (0, 1):
            run = f"papermill_runs/{grid.stem.split('_')[0]}/flickr8k.paper.{row['name']}.s{seed}"
            (line,) = (line for line in said.splitlines() if f"-p out {run} " in line and "papermill" in line)
            at_paper = tomllib.loads(grid.with_suffix(".toml").read_text()).get("scale", {}).get("paper", {})
            for key, cell in {
                **row,
                **at_paper.get(row["name"], {}),
            }.items():  # a row's own there go before its cells
                if key != "name" and cell:
                    linked = re.sub(
                        r"\{run:([^}]*)\}",
                        rf"papermill_runs/{grid.stem.split('_')[0]}/flickr8k.paper.\1.s{seed}",
                        str(cell),
                    )
                    assert f"-p {key} {linked.replace('{PROPOSALS}', 'boxes.json')}" in line


def test_profiles_agree_on_when_a_run_is_repeated():
    import yaml

    here, cluster = (
        yaml.safe_load((ROOT / "profiles" / name / "config.yaml").read_text())
        for name in ("default", "slurm")
    )
    for key in ("rerun-triggers", "keep-going", "rerun-incomplete", "printshellcmds"):
        assert here[key] == cluster[key]
    assert "code" not in here["rerun-triggers"]


def test_make_lists_its_commands():
    listed = subprocess.run(["make"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    commands = {line.split()[0] for line in listed.splitlines()}
    assert {"workbook", "test", "lab", "bench", "grid", "notebooks", "lint", "clean"} <= commands


def test_make_grid_without_a_grid_names_them():
    refused = subprocess.run(["make", "grid"], cwd=ROOT, capture_output=True, text=True)
    assert refused.returncode != 0
    assert all(path.stem in refused.stderr for path in GRIDS)


def test_running_and_saving_a_notebook_leaves_git_clean(tmp_path):
    """The filter that `make install` sets up: git sees a saved notebook as `make notebooks` builds it."""
    from finematch.config import root

    notebook = root(ROOT) / "notebooks" / "0_start_here.ipynb"
    (tmp_path / "notebooks").mkdir()
    copy = tmp_path / "notebooks" / notebook.name
    copy.write_text(notebook.read_text(encoding="utf-8"), encoding="utf-8")
    (tmp_path / ".gitattributes").write_text((ROOT / ".gitattributes").read_text())
    where = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}

    def call(*command: str) -> str:
        return subprocess.run(
            command, cwd=tmp_path, env=where, check=True, capture_output=True, text=True
        ).stdout

    call("git", "init", "-q")
    call("make", "-f", str(ROOT / "Makefile"), "git-filter")
    call("git", "add", ".")
    assert call("git", "show", ":notebooks/0_start_here.ipynb") == notebook.read_text(encoding="utf-8")
    saved = json.loads(copy.read_text(encoding="utf-8"))
    code = next(cell for cell in saved["cells"] if cell["cell_type"] == "code")
    code["outputs"] = [{"name": "stdout", "output_type": "stream", "text": ["hello\n"]}]
    code["execution_count"] = 7
    code["metadata"] |= {"trusted": True, "editable": True, "execution": {"iopub.status.busy": "2026"}}
    saved["metadata"]["language_info"] |= {
        "version": "3.12.1",
        "file_extension": ".py",
        "mimetype": "text/x-python",
    }
    copy.write_text(json.dumps(saved), encoding="utf-8")
    assert call("git", "diff", "--stat") == ""
    code["source"] = ["print('a reader changed this')"]
    copy.write_text(json.dumps(saved), encoding="utf-8")
    assert "1 file changed" in call("git", "diff", "--stat")


def test_the_workbook_runs_every_notebook_after_what_it_opens():
    command = [
        sys.executable,
        "-m",
        "snakemake",
        "--snakefile",
        "workbook.smk",
        "-n",
        "--forceall",
        "--cores",
        "2",
    ]
    dry = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=900)
    said = dry.stdout + dry.stderr
    assert dry.returncode == 0, said
    planned = re.findall(r"papermill .*? notebooks/(\S+)\.ipynb papermill_runs/workbook/\S+", said)
    pages = {
        str(p.relative_to(ROOT / "notebooks").with_suffix(""))
        for p in (ROOT / "notebooks").rglob("[0-9]_*.py")
    }
    assert set(planned) == pages
    assert "--config grid=mvam_views seeds=0 smoke=1" in said
