"""A grid run for real, with toy notebooks: what a failed row leaves, what a second attempt repeats."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

from notebook_text import ROOT, build

TRAIN = """# %% [markdown]
# # A training notebook that trains nothing

# %% tags=["parameters"]
dataset: str = "scenes"  # data set
data_root: str = "data"  # folder of the data sets
scale: str = "tiny"  # tiny | paper
seed: int = 0  # random seed
out: str = "run"  # run folder
smoke: bool = False  # seconds instead of minutes
views: int = 1  # number of view codes
weights: str = ""  # another run's folder

# %%
from finematch.config import parameters

p = parameters(globals(), views=(1, 256), scale={"tiny", "paper"})

# %%
import json
import os
from pathlib import Path

checkpoint = Path(p.out, "checkpoint")
resumed = checkpoint.exists()
checkpoint.mkdir(exist_ok=True)
with open("attempts", "a") as file:
    print(p.views, p.seed, file=file)
if (p.views, p.seed) == (8, 1) and Path("broken").exists():
    raise RuntimeError("the loss is not finite")
if p.weights:
    assert Path(p.weights).is_dir()
else:
    Path(p.out, "encoder").mkdir(exist_ok=True)
facts = {"resumed": resumed, "threads": os.environ["OMP_NUM_THREADS"], "data_root": p.data_root}
Path(p.out, "metrics.json").write_text(json.dumps(p.as_dict() | facts))
"""

TABLE = """# %% [markdown]
# # A table of nothing

# %% tags=["parameters"]
grid: str = ""  # name of the grid
dataset: str = "scenes"  # data set
data_root: str = "data"  # folder of the data sets
scale: str = "tiny"  # tiny | paper
smoke: bool = False  # as the runs

# %%
from pathlib import Path

from finematch.config import parameters

p = parameters(globals())
name = f"{p.grid}.{p.dataset}.{'smoke' if p.smoke else p.scale}"
for kind in ("csv", "md", "svg"):
    Path("figures", f"{name}.{kind}").write_text(name)
"""


def snakemake(book: Path, *options: str, **config: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "snakemake", "--workflow-profile", "profiles/default", *options]
    settings = {"grid": "toy_rows", "seeds": "0,1", "data_root": "my data", **config}
    command += ["--config", *(f"{key}={value}" for key, value in settings.items())]
    return subprocess.run(command, cwd=book, capture_output=True, text=True, timeout=120)


def planned(book: Path, **config: str) -> set[str]:
    """The folders of the runs that a dry run would make."""
    return set(re.findall(r"-p out \S+/(\S+) -p", snakemake(book, "-n", **config).stdout))


def test_a_failed_row_keeps_its_traceback_and_only_it_is_repeated(tmp_path):
    book = tmp_path / "book"
    (book / "notebooks" / "toy").mkdir(parents=True)
    (book / "grids").mkdir()
    shutil.copy(ROOT / "Snakefile", book)
    shutil.copytree(ROOT / "profiles", book / "profiles")
    (book / "notebooks" / "toy" / "2_train.py").write_text(TRAIN)
    (book / "notebooks" / "toy" / "3_ablations.py").write_text(TABLE)
    build.main(["--folder", str(book / "notebooks")])
    (book / "grids" / "toy_rows.csv").write_text("name,views,weights\none,1,\neight,8,{run:one}/encoder\n")
    (book / "broken").touch()
    runs = book / "papermill_runs" / "toy"
    names = {f"scenes.tiny.{row}.s{seed}" for row in ("one", "eight") for seed in (0, 1)}
    failed = runs / "scenes.tiny.eight.s1"
    assert planned(book) == names

    first = snakemake(book)
    assert first.returncode != 0
    assert {path.parent.name for path in runs.glob("*/metrics.json")} == names - {failed.name}
    assert "the loss is not finite" in (failed / "run.ipynb").read_text()
    assert (failed / "checkpoint").is_dir()
    assert not list((book / "figures").glob("*"))
    attempts = (book / "attempts").read_text().splitlines()
    assert sorted(attempts) == ["1 0", "1 1", "8 0", "8 1", "8 1"]  # a failure is tried once more

    (book / "broken").unlink()
    (book / "attempts").unlink()
    assert planned(book) == {failed.name}
    second = snakemake(book)
    assert second.returncode == 0, second.stderr
    assert (book / "attempts").read_text().split() == ["8", "1"]
    metrics = json.loads((failed / "metrics.json").read_text())
    assert metrics == {
        "dataset": "scenes",
        "data_root": "my data",
        "scale": "tiny",
        "seed": 1,
        "out": "papermill_runs/toy/scenes.tiny.eight.s1",
        "smoke": False,
        "views": 8,
        "weights": "papermill_runs/toy/scenes.tiny.one.s1/encoder",
        "resumed": True,
        "threads": "1",
    }
    figures = {path.name for path in (book / "figures").iterdir()}
    assert figures == {f"toy_rows.scenes.tiny.{kind}" for kind in ("csv", "md", "svg")}

    assert planned(book) == set()
    notebook = book / "notebooks" / "toy" / "2_train.ipynb"
    notebook.write_text(notebook.read_text().replace("trains nothing", "still trains nothing"))
    assert planned(book) == set(), "an edited notebook throws no run away"
    assert planned(book, data_root="elsewhere") == set()
    assert len(planned(book, smoke="1")) == 4, "a smoke run never stands for a real one"
    (book / "grids" / "toy_rows.csv").write_text("name,views,weights\none,2,\neight,8,{run:one}/encoder\n")
    ones = [f"papermill_runs/toy/scenes.tiny.one.s{seed}/metrics.json" for seed in (0, 1)]
    assert planned(book) == {"scenes.tiny.one.s0", "scenes.tiny.one.s1"}, "changed parameters repeat a row"
    snakemake(book, *ones, "--touch")  # as if they had been repeated
    assert planned(book) == {"scenes.tiny.eight.s0", "scenes.tiny.eight.s1"}, "... and then what builds on it"
    shutil.rmtree(book / ".snakemake")  # as in a fresh clone: metrics without provenance, times in any order
    for path in sorted(runs.glob("*eight*/metrics.json")) + sorted(runs.glob("*one*/metrics.json")):
        path.write_text(path.read_text())
    assert planned(book) == set()
