"""A grid run for real, with toy notebooks: what a failed row leaves, what a second attempt repeats."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from notebook_text import ROOT, build

from finematch import tables
from finematch.__main__ import main
from finematch.config import Settings
from finematch.files import DataError, run_reference
from finematch.grids import earlier, grid, label, metrics_files, mismatches, names, readings, shared, stale
from finematch.grids import settings as grid_settings
from finematch.runs import write_metrics
from finematch.tables import printed

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
resume: str = ""  # fresh or replace

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
facts = {"how": p.resume, "resumed": resumed, "threads": os.environ["OMP_NUM_THREADS"], "data_root": p.data_root}
Path(p.out, "metrics.json").write_text(json.dumps({"parameters": p.as_dict(), "metrics": facts}))
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


def write_grid(book: Path, name: str, rows: str, **more: str) -> None:
    """Both files of a grid; `more` replaces lines of the toml."""
    (book / "grids" / f"{name}.csv").write_text(rows)
    names = [line.split(",")[0] for line in rows.splitlines()[1:]]
    lines = {"title": '"A grid"', "axis": '"row"', "seeds": "2", **more}
    text = "".join(f"{key} = {value}\n" for key, value in lines.items())
    text += "[rows]\n" + "".join(f'{row} = "{row}"\n' for row in dict.fromkeys(names))
    (book / "grids" / f"{name}.toml").write_text(text + '[columns]\n"R@1" = "i2t_r1"\n')


def snakemake(book: Path, *options: str, **config: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "snakemake", "--workflow-profile", "profiles/default", *options]
    settings = {"grid": "toy_rows", "seeds": "0,1", "data_root": "my data", **config}
    command += ["--config", *(f"{key}={value}" for key, value in settings.items())]
    return subprocess.run(command, cwd=book, capture_output=True, text=True, timeout=900)


def planned(book: Path, **config: str) -> set[str]:
    """The folders of the runs that a dry run would make."""
    return set(re.findall(r"-p out \S+/(\S+) -p", snakemake(book, "-n", **config).stdout))


def test_a_failed_row_keeps_its_traceback_and_only_it_is_repeated(tmp_path):
    book = tmp_path / "book"
    (book / "notebooks" / "toy").mkdir(parents=True)
    (book / "grids").mkdir()
    shutil.copy(ROOT / "Snakefile", book)
    shutil.copy(ROOT / "pyproject.toml", book)
    shutil.copytree(ROOT / "profiles", book / "profiles")
    (book / "notebooks" / "toy" / "2_train.py").write_text(TRAIN)
    (book / "notebooks" / "toy" / "3_ablations.py").write_text(TABLE)
    build.main(["--folder", str(book / "notebooks")])
    write_grid(book, "toy_rows", "name,views,weights\none,1,\neight,8,{run:one}/encoder\n")
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
    assert metrics["parameters"] | metrics["metrics"] == {
        "dataset": "scenes",
        "data_root": "my data",
        "scale": "tiny",
        "seed": 1,
        "out": "papermill_runs/toy/scenes.tiny.eight.s1",
        "smoke": False,
        "views": 8,
        "weights": "papermill_runs/toy/scenes.tiny.one.s1/encoder",
        "resume": "replace",
        "how": "replace",
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


@pytest.fixture
def book(tmp_path) -> Path:
    """A workbook that shares all with this one but the grids, the runs and the figures."""
    for name in ("notebooks", "profiles", "Snakefile", "pyproject.toml", "benchmarks"):
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / "grids").mkdir()
    return tmp_path


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ("name,views\none,16\none,32\n", r"line 3: is named 'one' like a row before it"),
        ("name,seed,views\none,3,16\n", "column seed"),
        ("name,out,views\none,elsewhere,16\n", "column out"),
        ("name,dataset\none,scenes\n", "column dataset"),
        ("name,smoke\none,True\n", "column smoke"),
        ("name, seed\none,3\n", "column seed"),
        ("name,resume\none,fresh\n", "column resume"),
        ("name,views,views\none,16,32\n", "column 'views': stands twice"),
        ("name,,views\none,3,16\n", "column '': has no name"),
        ("name,views,tau\none,16\n", "line 2: has more or fewer cells"),
        ("name,views,\none,16,note\n", "line 2: has more or fewer cells"),
        ('name,views\none,"16\n', "cannot be read"),
        (
            "name,tau\none,Apr 01\n",
            r"row one: is refused at scale tiny: 'tau' must be float, not str 'Apr 01'",
        ),
        ("name,views\none,16.0\n", "row one: is refused.*'views' must be int"),
        ('name,tau\none,"0,07"\n', "row one: is refused.*'tau' must be float, not str '0,07'"),
        ("name,include_special\none,TRUE\n", "row one: is refused.*include_special.*spreadsheet"),
        ("name,Views\none,16\n", "row one: is refused.*unknown parameter 'Views': did you mean 'views'"),
        ("name,views\none,0\n", r"row one: is refused.*must lie in \[1, 256\]"),
        ("name,views\none,16,17\n", "line 2: has more or fewer cells"),
        ("name,views\nOne row,16\n", "line 2: is named 'One row'"),
        ("name;views\none;16\n", "no column `name`"),
        ("name,text_weights\none,{run:two}\ntwo,{run:three}\nthree,\n", "row one: builds on 'two'"),
        ("name,views\n", "lists no runs"),
    ],
)
def test_rows_that_would_not_run_as_they_stand_are_refused(book, rows, message):
    write_grid(book, "mvam_mine", rows)
    with pytest.raises(DataError, match=message):
        grid("mvam_mine", folder=book / "grids")


def test_the_rows_of_a_task_build_on_runs_of_another_grid(book):
    """The run that is built on is made first, by its own page; the table waits for the task's rows."""
    write_grid(book, "toy_rows", "name,views\none,1\ntwo,2\n")
    page = {"page": '"5_say"', "builds_on": '"toy_rows"'}
    write_grid(book, "toy_task", "name,pretrained,start\nsay,{run:one},\nscratch,{run:one},scratch\n", **page)
    found = grid("toy_task", folder=book / "grids")
    assert (found.presets, found.linked, found.of("one").name) == ("toy_say", ("one",), "toy_rows")
    assert found.of("say") is found
    said = snakemake(book, "-n", "--cores", "1", grid="toy_task", seeds="1")
    assert said.returncode == 0, said.stdout + said.stderr
    lines = [line for line in said.stdout.splitlines() if " -p seed " in line]
    pages = {
        re.search(r"tiny\.(\w+)\.s1", line)[1]: re.search(r"notebooks/(\S+)\.ipynb", line)[1]
        for line in lines
    }
    assert pages == {"one": "toy/2_train", "say": "toy/5_say", "scratch": "toy/5_say"}
    assert all(
        "-p pretrained papermill_runs/toy/scenes.tiny.one.s1 " in line for line in lines if "5_say" in line
    )
    (inputs,) = re.findall(r"rule table:\n +input: (.*)", said.stdout)
    assert inputs.split(", ") == [
        f"papermill_runs/toy/scenes.tiny.{row}.s1/metrics.json" for row in ("say", "scratch")
    ]
    for rows, more, message in (("say,{run:three}", page, "row say: builds on 'three'"),
                                ("one,{run:two}", page, "row one: has the name of a row of toy_rows"),
                                ("say,{run:one}", {**page, "builds_on": '"toy_none"'}, "toy_none.csv: the file: is"),
                                ("say,{run:one}", {"page": '"5_say"'}, "row say: builds on 'one'")):  # fmt: skip
        write_grid(book, "toy_task", f"name,pretrained\n{rows}\n", **more)
        with pytest.raises(DataError, match=message):
            grid("toy_task", folder=book / "grids")


@pytest.mark.parametrize("rows", ["name,views\none,16\none,32\n", "name,seed,views\none,3,16\n"])
def test_snakemake_refuses_such_a_grid_before_anything_runs(book, rows):
    write_grid(book, "mvam_mine", rows)
    refused = snakemake(book, "-n", "--cores", "1", grid="mvam_mine")
    assert refused.returncode != 0
    assert "mvam_mine.csv" in refused.stderr + refused.stdout


@pytest.mark.parametrize(
    "rows", [b"\xef\xbb\xbfname,views\none,16\ntwo,8\n", b"name,views\r\none,16\r\n\r\ntwo,8\r\n,\r\n",
             b"name,views,,\none,16,,\n two , 8 ,,\n,,,\n"],
)  # fmt: skip
def test_a_grid_that_a_spreadsheet_saved_is_read(book, rows):
    write_grid(book, "mvam_mine", "name,views\none,16\ntwo,8\n")
    (book / "grids" / "mvam_mine.csv").write_bytes(rows)
    found = grid("mvam_mine", folder=book / "grids").rows
    assert found == {"one": {"views": "16"}, "two": {"views": "8"}}


@pytest.mark.parametrize("encoding", ["utf-16", "latin-1"])
def test_a_grid_in_another_encoding_is_refused_by_name(book, encoding):
    write_grid(book, "mvam_mine", "name,views\none,16\n")
    (book / "grids" / "mvam_mine.csv").write_bytes("name,views\né,16\n".encode(encoding))
    with pytest.raises(
        DataError, match=r"mvam_mine\.csv: the file: cannot be read .*Save it as CSV in UTF-8"
    ):
        grid("mvam_mine", folder=book / "grids")


def test_a_toml_with_a_byte_order_mark_is_read_and_one_in_another_encoding_refused(book):
    write_grid(book, "mvam_mine", "name,views\none,16\n")
    path = book / "grids" / "mvam_mine.toml"
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert list(grid("mvam_mine", folder=book / "grids").rows) == ["one"]
    path.write_text(path.read_text("utf-8-sig"), encoding="utf-16")
    with pytest.raises(DataError, match=r"mvam_mine\.toml: the file: is not TOML"):
        grid("mvam_mine", folder=book / "grids")


def test_rows_that_read_boxes_wait_for_them(book):
    """Without a file they are left out, with one it is theirs alone."""
    write_grid(book, "hslm_mine", "name,proposals\ncells,grid\nboxes,{PROPOSALS}\nplain,\n")
    without = snakemake(book, "-n", "--cores", "1", grid="hslm_mine", seeds="0")
    assert "PROPOSALS=<file in COCO's results format>): boxes" in without.stderr
    assert set(re.findall(r"-p out \S+tiny\.(\w+)\.s0 ", without.stdout)) == {"cells", "plain"}
    given = snakemake(book, "-n", "--cores", "1", grid="hslm_mine", seeds="0", proposals="my boxes.json")
    lines = [line for line in given.stdout.splitlines() if "2_train.ipynb" in line]
    found = {
        re.search(r"tiny\.(\w+)\.s0", line)[1]: re.findall(r"proposals ('[^']*'|\S+)", line) for line in lines
    }
    assert found == {"cells": ["grid"], "boxes": ["'my boxes.json'"], "plain": []}


def test_on_another_data_set_a_task_builds_on_another_grid(book):
    """`[on.<pattern>.cells.<row>]` names the run there; where that reads a detector's boxes, the task waits for them
    too, and they are given to that run alone."""
    write_grid(book, "toy_drawn", "name\nbase\n")
    write_grid(book, "toy_mine", "name,proposals\nboxes,{PROPOSALS}\n")
    write_grid(book, "toy_task", "name,pretrained\nsay,{run:base}\n", page='"5_say"', builds_on='"toy_drawn"')
    toml = book / "grids" / "toy_task.toml"
    plain = toml.read_text()
    cells = '[on."photos*".cells.say]\npretrained = "{run:boxes}"\n'
    toml.write_text(f'{plain}\n[on."photos*"]\nbuilds_on = "toy_mine"\n{cells}')
    rows = [grid("toy_task", dataset, folder=book / "grids") for dataset in ("scenes", "photos8k")]
    assert [one.linked for one in rows] == [("base",), ("boxes",)]
    assert [one.boxes for one in rows] == [(), ("say", "boxes")]
    on = {"grid": "toy_task", "dataset": "photos8k", "seeds": "0"}
    given = snakemake(book, "-n", "--cores", "1", **on, proposals="boxes.json")
    lines = {
        re.search(r"tiny\.(\w+)\.s0", line)[1]: line
        for line in given.stdout.splitlines()
        if "-p seed" in line
    }
    assert "-p proposals boxes.json" in lines["boxes"]
    assert "proposals" not in lines["say"]
    assert "-p pretrained papermill_runs/toy/photos8k.tiny.boxes.s0" in lines["say"]
    without = snakemake(book, "-n", "--cores", "1", **on)
    assert "): say, boxes" in without.stderr
    toml.write_text(f'{plain}\n[on."photos*".cells.tell]\npretrained = "x"\n')
    with pytest.raises(DataError, match=r"\[cells.tell\]: is no row"):
        grid("toy_task", "photos8k", folder=book / "grids")


@pytest.mark.parametrize("seeds", ["0,1,0", "0-2"])
def test_seeds_that_are_not_different_numbers_are_refused(book, seeds):
    write_grid(book, "mvam_mine", "name,views\none,16\n")
    refused = snakemake(book, "-n", "--cores", "1", grid="mvam_mine", seeds=seeds)
    assert refused.returncode != 0
    assert "SEEDS=0,1,2" in refused.stderr + refused.stdout


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (
            {"claims": '[{ text = "x", better = "on", worse = "two", metrics = ["rsum"] }]'},
            "names the row 'on'",
        ),
        (
            {"claims": '[{ text = "x", better = "one", worse = "one", metrics = ["rsum"] }]'},
            "a row with itself",
        ),
        (
            {"claims": '[{text = "x", row = "one", metric = "rsum", baseline = "b", better = "two"}]'},
            "has or lacks better",
        ),
        ({"claims": '[{text = "x", row = "one", baseline = "b"}]'}, "has or lacks metric"),
        ({"claims": '[{text = "x", row = "on", metric = "m", baseline = "b"}]'}, "names the row 'on'"),
        ({"claims": '[{ text = "x", better = "one" }]'}, "lacks worse"),
        ({"claims": '[{ text = "x", better = "one", worse = "two" }]'}, "has no metric"),
        ({"seeds": "1"}, "at least 2"),
        ({"titel": '"x"'}, "titel: is no key"),
        ({"plot": '["R@5"]'}, r"names the column 'R@5'"),
        ({"untrained": '["three"]'}, "names the row 'three'"),
        ({"scale": "{ paper = { seed = 3 } }"}, r"\[scale\.paper\] seed: is not for a grid to set"),
        ({"scale": "{ paper = 3 }"}, r"\[scale\.paper\]: is not a section"),
        ({"scale": "{ paper = { views = [3] } }"}, r"\[scale\.paper\]: is not a section"),
    ],
)
def test_a_toml_that_speaks_of_what_is_not_there_is_refused(book, more, message):
    write_grid(book, "mvam_mine", "name,views\none,16\ntwo,8\n", **more)
    with pytest.raises(DataError, match=message):
        grid("mvam_mine", folder=book / "grids")


def test_a_row_has_parameters_of_its_own_at_a_scale(book, monkeypatch):
    monkeypatch.chdir(book)
    scale = "{ paper = { views = 32, tau = 0.5, two = { views = 64 } }, tiny = { one = { tau = 0.1 } } }"
    write_grid(book, "mvam_mine", "name,views\none,16\ntwo,8\n", scale=scale)
    found = grid("mvam_mine", folder=book / "grids")
    assert found.cells("one", "tiny") == {"views": "16", "tau": "0.1"}
    assert found.cells("two", "tiny") == {"views": "8"}
    assert found.cells("one", "paper") == {"views": "16", "tau": "0.5"}
    assert found.cells("two", "paper") == {"views": "64", "tau": "0.5"}  # before its cell
    assert (
        "-p views 64 -p tau 0.5"
        in snakemake(book, "-n", "-p", grid="mvam_mine", scale="paper", seeds="0").stdout
    )
    for wrong, message in (
        ("{ three = { views = 1 } }", r"\[scale\.paper\]: is not a section"),
        ("{ two = { seed = 1 } }", r"\[scale\.paper\.two\] seed: is not for a grid to set"),
    ):
        write_grid(book, "mvam_mine", "name,views\none,16\ntwo,8\n", scale=f"{{ paper = {wrong} }}")
        with pytest.raises(DataError, match=message):
            grid("mvam_mine", folder=book / "grids")


def test_slans_zero_shot_rows_and_backbones_are_asked_for_at_both_scales():
    retrieval, coco = grid("slan_retrieval"), grid("slan_retrieval", "coco_karpathy")
    for row in retrieval.rows:
        tiny, paper = retrieval.cells(row, "tiny"), retrieval.cells(row, "paper")
        assert tiny["unseen"] == ("pretrain" if row.startswith("pretrain") else "test")
        assert "unseen" not in paper
        assert ("shards" in paper) == row.startswith("pretrain")
        assert paper["vision"] == "vit_huge_patch14_224"
    assert set(printed(retrieval)["row"]) == {"Zero-shot Ours", "Fine-tune Ours"}
    cells = printed(retrieval).set_index(["row", "column"])["value"]
    assert (cells["Zero-shot Ours", "i2t@1"], cells["Fine-tune Ours", "t2i@1"]) == (96.0, 90.2)
    cells = printed(coco).set_index(["row", "column"])["value"]
    assert dict(cells) == {("Ours", "i2t@1"): 85.7, ("Ours", "t2i@1"): 69.2}
    backbones = grid("slan_backbones")
    order = [
        Settings("slan", {"scale": "paper", "dataset": "flickr30k", "vision": cells.get("vision", "")})
        for cells in (backbones.cells(row, "paper") for row in backbones.rows)
    ]
    assert [s.batch_size for s in order] == [1280, 960, 640, 640]
    found = printed(backbones).set_index(["row", "column"])["value"]
    assert [found[name, "R@1"] for name in backbones.names.values()] == [86.8, 87.4, 89.1, 90.6]
    assert set(printed(grid("slan_backbones", "coco_karpathy"))["row"]) == {"Ours"}


def test_a_scale_has_parameters_for_all_rows_and_a_cell_goes_before_them(book, monkeypatch):
    monkeypatch.chdir(book)
    scale = '{ paper = { views = 32, tau = 0.5, text = "bert" } }'
    write_grid(book, "mvam_mine", "name,views\none,16\ntwo,\n", scale=scale)
    found = grid("mvam_mine", folder=book / "grids")
    assert found.cells("one", "tiny") == {"views": "16"}
    assert found.cells("one", "paper") == {"views": "16", "tau": "0.5", "text": "bert"}
    assert found.cells("two", "paper") == {"views": "32", "tau": "0.5", "text": "bert"}
    planned = snakemake(book, "-n", "-p", grid="mvam_mine", scale="paper", seeds="0").stdout
    assert "-p views 32 -p tau 0.5 -p text bert" in planned
    assert "-p views 16 -p tau 0.5 -p text bert" in planned
    for name, smoke in (("paper", False), ("smoke", True)):
        given = {"scale": "paper", "smoke": smoke, "views": 32, "tau": 0.5, "text": "bert"}
        fake = fake_run(book, "two", 0, 1.0, **given)
        file = fake.parent.rename(fake.parent.with_name(f"scenes.{name}.two.s0")) / fake.name
        content = json.loads(file.read_text())
        file.write_text(json.dumps(content))
        assert mismatches(found, file) == []
        content["parameters"]["views"] = 16
        file.write_text(json.dumps(content))
        assert mismatches(found, file) == ["views is 16, the row says 32"]


def test_both_files_are_needed_and_name_the_same_rows(book):
    with pytest.raises(DataError, match=r"mvam_mine\.csv.*missing"):
        grid("mvam_mine", folder=book / "grids")
    write_grid(book, "mvam_mine", "name,views\none,16\ntwo,8\n")
    (book / "grids" / "mvam_mine.csv").write_text("name,views\none,16\nthree,8\n")
    with pytest.raises(DataError, match=r"\[rows\] three"):
        grid("mvam_mine", folder=book / "grids")
    (book / "grids" / "mvam_mine.toml").unlink()
    with pytest.raises(DataError, match=r"mvam_mine\.toml.*missing"):
        grid("mvam_mine", folder=book / "grids")


@pytest.mark.parametrize("name", names(ROOT / "grids"))
def test_a_grid_and_the_papers_table_agree(name):
    """Every row that [rows] maps into a paper's table is there, unless it is said to be ours."""
    for dataset in ("scenes", "coco_karpathy", "coco2014", "flickr8k"):
        table = grid(name, dataset, folder=ROOT / "grids")
        if not table.table:
            continue
        cells = tables.printed(table)
        assert set(cells["column"]) >= set(table.columns)
        missing = {row for row in table.names.values() if "(ours)" not in row} - set(cells["row"])
        assert missing <= {"baseline (Table 4, row 1)"}, missing


def fake_run(book: Path, row: str, seed: int, value: float, **parameters) -> Path:
    folder = book / "papermill_runs" / "mvam" / f"scenes.tiny.{row}.s{seed}"
    content = {
        "parameters": {"dataset": "scenes", "scale": "tiny", "seed": seed, "smoke": False, **parameters},
        "metrics": {"i2t_r1": value, "rsum": 6 * value}, "protocol": "scenes test", "seconds": 60.0,
        "peak_memory_bytes": 1, "device": "a CPU", "versions": {}, "commit": "0" * 40,
    }  # fmt: skip
    folder.mkdir(parents=True)
    (folder / "metrics.json").write_text(json.dumps(content))
    return folder / "metrics.json"


CLAIM = '[{ text = "16 beat 8", better = "one", worse = "two", metrics = ["i2t_r1"] }]'


def test_a_new_table_is_two_files(book, tmp_path):
    """The page knows no grid by name: it draws one that was written a moment ago."""
    write_grid(book, "mvam_mine", "name,views\none,16\ntwo,8\n", plot='["R@1"]', claims=CLAIM)
    for seed in range(2):
        fake_run(book, "one", seed, 50.0 + seed, views=16)
        fake_run(book, "two", seed, 40.0 + 1.5 * seed, views=8)
    command = [sys.executable, "-m", "papermill", "--no-progress-bar", "--cwd", str(book)]
    command += ["notebooks/mvam/3_ablations.ipynb", str(tmp_path / "page.ipynb"), "-p", "grid", "mvam_mine"]
    ran = subprocess.run(command, cwd=book, capture_output=True, text=True, timeout=900)
    assert ran.returncode == 0, ran.stderr[-3000:]
    stem = "mvam_mine.scenes.tiny"
    assert {path.name for path in (book / "figures").iterdir()} == {
        f"{stem}.{ending}" for ending in ("md", "csv", "svg", "claims.csv", "claims.svg")
    }
    text = (book / "figures" / f"{stem}.md").read_text()
    assert "16 beat 8" in text
    assert "50.50 ± 0.71" in text
    assert "legacy" in text


def test_a_table_refuses_metrics_of_other_parameters_and_stale_names_them(book, monkeypatch, capsys):
    monkeypatch.chdir(book)
    write_grid(book, "mvam_mine", "name,views,text\none,16,\ntwo,8,gru\n", claims=CLAIM)
    good = fake_run(book, "two", 0, 1.0, views=8, text="gru")
    fake_run(book, "one", 0, 1.0, views=16, text="bert")
    mine = grid("mvam_mine")
    assert len(tables.runs_of(mine, "scenes", "tiny")["default"]) == 2
    assert main(["stale", "mvam_mine"]) == 0
    assert capsys.readouterr().out == ""
    bad = fake_run(book, "one", 1, 1.0, views=32)
    with pytest.raises(DataError, match=r"one\.s1.*views is 32, the row says 16"):
        tables.runs_of(mine, "scenes", "tiny")
    assert main(["stale", "mvam_mine"]) == 0
    assert capsys.readouterr().out.split() == [str(bad.relative_to(book))]
    content = json.loads(good.read_text())
    content["parameters"]["seed"] = 7
    good.write_text(json.dumps(content))
    assert mismatches(mine, good) == ["seed is 7, the row says 0"]
    assert main(["stale", "mvam_nine"]) == 1
    assert "mvam_nine.csv" in capsys.readouterr().err


def test_a_run_with_numbers_in_a_list_is_that_of_its_row(tmp_path):
    """SLAN's `stages`, `scales` and `ratios` are tuples, which a metrics file writes with commas."""
    for scale in ("tiny", "paper"):
        given = {"score_norm": "minmax", "dataset": "scenes", "scale": scale, "smoke": False, "seed": 0}
        settings = Settings("slan", given | ({"vision": "vit_base_patch16_224"} if scale == "paper" else {}))
        folder = tmp_path / f"scenes.{scale}.levels-3.s0"
        parameters = settings.replace(levels=3).as_dict()
        identity = {"method": "slan", "settings": parameters, "features": ""}
        write_metrics(folder, parameters, {"rsum": 1.0}, seconds=1, protocol="toy", identity=identity)
        assert mismatches(grid("slan_adaptors"), folder / "metrics.json") == []


def test_a_cell_that_was_emptied_makes_its_run_stale(book, monkeypatch):
    """The run has 32 views, the row no longer says so: the notebook would take its default."""
    monkeypatch.chdir(book)
    write_grid(book, "mvam_mine", "name,views,diversity\none,32,\ntwo,8,none\n")
    where = {"dataset": "scenes", "scale": "tiny", "seed": 0, "smoke": False}
    settings = Settings("mvam", {**where, "views": 32}).as_dict()
    file = fake_run(
        book, "one", 0, 1.0, **{key: value for key, value in settings.items() if key not in where}
    )
    content = json.loads(file.read_text())
    file.write_text(json.dumps(content | {"identity": {"method": "mvam"}}))
    assert mismatches(grid("mvam_mine"), file) == []
    (book / "grids" / "mvam_mine.csv").write_text("name,views,diversity\none,,\ntwo,8,none\n")
    assert mismatches(grid("mvam_mine"), file) == ["views is 32, the row says 16"]
    assert stale(grid("mvam_mine"), "scenes", "tiny") == [file]


def test_a_row_takes_any_precision_that_its_device_chose_and_no_other_than_it_asks_for(book, monkeypatch):
    monkeypatch.chdir(book)
    other = ["precision is 'bf16', the row says 'no'"]
    for seed, (asked, ran, differs) in enumerate(
        [("", "bf16", []), ("auto", "no", []), ("no", "bf16", other)]
    ):
        where = {"dataset": "scenes", "scale": "tiny", "seed": seed, "smoke": False}
        write_grid(book, "mvam_mine", f"name,views,precision\none,32,{asked}\ntwo,8,\n")
        settings = Settings("mvam", {**where, "views": 32, "precision": ran}).as_dict()
        file = fake_run(
            book, "one", seed, 1.0, **{k: value for k, value in settings.items() if k not in where}
        )
        file.write_text(json.dumps(json.loads(file.read_text()) | {"identity": {"method": "mvam"}}))
        assert mismatches(grid("mvam_mine"), file) == differs


def test_what_builds_on_a_stale_run_is_stale(book, monkeypatch):
    monkeypatch.chdir(book)
    write_grid(book, "mvam_mine", "name,views,text_weights\none,16,\ntwo,8,{run:one}/encoder\n")
    first = fake_run(book, "one", 0, 1.0, views=16)
    linked = "papermill_runs/mvam/scenes.tiny.one.s0/encoder"
    second = fake_run(book, "two", 0, 1.0, views=8, text_weights=linked)
    assert stale(grid("mvam_mine"), "scenes", "tiny") == []
    write_grid(
        book,
        "mvam_next",
        f"name,views,text_weights\nthree,8,{'{run:one}'}/encoder\n",
        builds_on='"mvam_mine"',
    )
    third = fake_run(book, "three", 0, 1.0, views=8, text_weights=linked)
    assert stale(grid("mvam_next"), "scenes", "tiny") == []
    first.write_text(first.read_text().replace('"views": 16', '"views": 4'))
    assert stale(grid("mvam_mine"), "scenes", "tiny") == [first, second]
    assert stale(grid("mvam_next"), "scenes", "tiny") == [third]


def test_what_builds_on_a_run_that_was_made_again_is_stale_and_legacy(book, monkeypatch):
    monkeypatch.chdir(book)
    write_grid(book, "mvam_mine", "name,views\none,16\n")
    write_grid(book, "mvam_next", "name,views,text_weights\ntwo,8,{run:one}\n", builds_on='"mvam_mine"')
    first = fake_run(book, "one", 0, 1.0, views=16)
    where = "papermill_runs/mvam/scenes.tiny.one.s0"
    second = fake_run(book, "two", 0, 1.0, views=8, text_weights=where)
    content = json.loads(second.read_text())
    settings = Settings("mvam", content["parameters"]).as_dict()
    content["parameters"] |= settings
    settings |= {"text_weights": run_reference(json.loads(first.read_text()))}
    content["identity"] = {
        "method": "mvam",
        "numerics": 1,
        "data": {},
        "features": {},
        "settings": settings,
    }
    second.write_text(json.dumps(content))
    assert stale(grid("mvam_next"), "scenes", "tiny") == []
    frame = tables.runs_of(grid("mvam_next"), "scenes", "tiny")["default"]
    assert list(frame["run_status"]) == [
        "legacy: the run that it builds on is legacy"
    ]  # for it has no identity
    first.write_text(
        json.dumps(json.loads(first.read_text()) | {"weights": {"best.safetensors": "of another day"}})
    )
    assert stale(grid("mvam_mine"), "scenes", "tiny") == []
    assert stale(grid("mvam_next"), "scenes", "tiny") == [second]
    frame = tables.runs_of(grid("mvam_next"), "scenes", "tiny")["default"]
    assert list(frame["run_status"]) == ["legacy: its text_weights was made again since"]


def test_seeds_of_a_row_differ_in_nothing_else(book, monkeypatch):
    monkeypatch.chdir(book)
    write_grid(book, "mvam_mine", "name,views\none,16\n")

    def run(seed, numerics=1, data=None, features=None, made=None, **parameters):
        file = fake_run(book, "one", seed, 1.0, views=16)
        content = json.loads(file.read_text())
        settings = Settings("mvam", content["parameters"]).as_dict() | parameters
        identity = {"method": "mvam", "numerics": numerics, "settings": settings, "data": data or {},
                    "features": features or {}} | ({"made": made} if made else {})  # fmt: skip
        file.write_text(json.dumps(content | {"parameters": settings, "identity": identity}))
        return file

    run(0, precision="no")
    run(1, precision="no")
    assert len(tables.runs_of(grid("mvam_mine"), "scenes", "tiny")["default"]) == 2
    other = run(2, precision="bf16")
    with pytest.raises(DataError, match=r"one\.s2.*than the row's seed 0: precision is 'bf16', not 'no'"):
        tables.runs_of(grid("mvam_mine"), "scenes", "tiny")
    shutil.rmtree(other.parent)
    run(2, numerics=7, precision="no")
    with pytest.raises(DataError, match="other arithmetic than the row's seed 0: 7 in place of 1"):
        tables.runs_of(grid("mvam_mine"), "scenes", "tiny")
    for what, other in (
        ("data", {"data": {"train": {"captions": "1"}}}),
        ("features", {"features": {"train": [{"weights": "1"}]}}),
        ("settings", {"made": {"detector": "sha256:1"}}),
    ):
        shutil.rmtree(tmp := book / "papermill_runs" / "mvam" / "scenes.tiny.one.s2")
        assert tmp == run(2, precision="no", **other).parent
        with pytest.raises(DataError, match=f"other {what} than the row's seed 0"):
            tables.runs_of(grid("mvam_mine"), "scenes", "tiny")


def test_a_run_of_the_other_reading_has_a_name_of_its_own():
    assert label("tiny") == label("tiny", "default") == label("tiny", "both") == "tiny"
    assert label("paper") == label("paper", "literal") == "paper"
    assert label("tiny", "literal") == "tiny-literal"
    assert label("paper", "default") == "paper-default"
    assert label("tiny", smoke=True) == "smoke"
    assert label("tiny", "literal", smoke=True) == "smoke-literal"
    assert label("paper", "literal", smoke=True) == "smoke"


def test_make_grid_runs_the_rows_under_a_reading(book):
    write_grid(book, "slan_mine", "name,levels,pretrained\none,1,\ntwo,2,{run:one}/best.safetensors\n")
    own = snakemake(book, "-n", "-p", grid="slan_mine", seeds="0").stdout
    assert set(re.findall(r"-p out (\S+)", own)) == {
        f"papermill_runs/slan/scenes.tiny.{row}.s0" for row in ("one", "two")
    }
    assert "-p reading" not in own
    other = snakemake(book, "-n", "-p", grid="slan_mine", seeds="0", reading="literal").stdout
    folders = {f"papermill_runs/slan/scenes.tiny-literal.{row}.s0" for row in ("one", "two")}
    assert set(re.findall(r"-p out (\S+)", other)) == folders
    assert other.count("-p reading literal") == 2
    assert "-p pretrained papermill_runs/slan/scenes.tiny-literal.one.s0/best.safetensors" in other
    assert "scenes.tiny-literal.two.s0/metrics.json" in other
    assert "figures/slan_mine.scenes.tiny.md" in other, "one table has both readings"
    assert "scenes.paper-default.one.s0" in "".join(
        planned(book, grid="slan_mine", scale="paper", reading="default")
    )
    refused = snakemake(book, "-n", grid="slan_mine", reading="literally")
    assert refused.returncode != 0
    assert "The reading is 'literally'" in refused.stderr + refused.stdout


def test_a_row_that_no_reading_changes_is_run_once(book, monkeypatch):
    monkeypatch.chdir(book)
    write_grid(book, "hslm_mine", "name,reading,width\none,literal,8\ntwo,,16\n")
    mine = grid("hslm_mine")
    assert (shared(mine, "one", "scenes", "tiny"), shared(mine, "two", "scenes", "tiny")) == (True, False)
    assert readings(mine, "scenes", "tiny") == ("default", "literal")
    assert planned(book, grid="hslm_mine", seeds="0", reading="literal") == {
        "scenes.tiny.one.s0",
        "scenes.tiny-literal.two.s0",
    }
    write_grid(
        book,
        "slan_mine",
        "name,zero_shot,pretrained,reading\none,,,\ntwo,True,{run:one}/best.safetensors,literal\n",
    )
    assert not shared(grid("slan_mine"), "two", "scenes", "tiny"), "it builds on a run that differs"
    write_grid(book, "hslm_mine", "name,reading,width\none,literal,8\ntwo,literal,16\n")
    assert readings(grid("hslm_mine"), "scenes", "tiny") == ("both",)


def test_settings_of_a_cell_go_before_those_of_the_reading(book, monkeypatch):
    monkeypatch.chdir(book)
    write_grid(book, "hslm_mine", "name,context_norm\none,True\ntwo,\n")
    found = [grid_settings(grid("hslm_mine"), row, reading="literal", scale="tiny") for row in ("one", "two")]
    assert [s.context_norm for s in found] == [True, False]
    assert [s.loss_score for s in found] == ["logit", "logit"]


def hslm_run(book: Path, name: str, reading: str, *, legacy: bool = False) -> Path:
    """The metrics of a run with all its settings, in a folder of any name."""
    seed = int(name.rpartition(".s")[2])
    settings = Settings("hslm", {"dataset": "scenes", "seed": seed, "reading": reading}).as_dict()
    settings |= {"width": 8} if legacy else {}
    content = {"parameters": settings, "metrics": {"i2t_r1": 1.0 + seed}, "protocol": "toy", "seconds": 1.0,
               "peak_memory_bytes": 1, "device": "a CPU", "versions": {}, "commit": "0" * 40}  # fmt: skip
    if legacy:
        del settings["reading"]
    else:
        content["identity"] = {"method": "hslm"}
    file = book / "papermill_runs" / "hslm" / name / "metrics.json"
    file.parent.mkdir(parents=True)
    file.write_text(json.dumps(content))
    return file


def test_a_run_is_never_taken_for_one_of_the_other_reading(book, monkeypatch, capsys):
    monkeypatch.chdir(book)
    write_grid(book, "hslm_mine", "name,width\none,\ntwo,8\n")
    mine = grid("hslm_mine")
    own = hslm_run(book, "scenes.tiny.one.s0", "default")
    other = hslm_run(book, "scenes.tiny-literal.one.s0", "literal")
    old = hslm_run(book, "scenes.tiny.two.s0", "default", legacy=True)  # says no reading: its scale's own
    assert [mismatches(mine, file) for file in (own, other, old)] == [[], [], []]
    assert (
        metrics_files(mine, "scenes", "tiny")
        == metrics_files(mine, "scenes", "tiny", "default")
        == [own, old]
    )
    assert metrics_files(mine, "scenes", "tiny", "literal") == [other]
    wrong = hslm_run(book, "scenes.tiny.one.s1", "literal")
    assert "reading is 'literal', the row says 'default'" in mismatches(mine, wrong)
    swapped = hslm_run(book, "scenes.tiny-literal.one.s1", "default")
    assert "reading is 'default', the row says 'literal'" in mismatches(mine, swapped)
    older = hslm_run(book, "scenes.tiny-literal.two.s1", "default", legacy=True)
    assert mismatches(mine, older) == ["reading is 'default', the row says 'literal'"]
    assert stale(mine, "scenes", "tiny") == [wrong]
    assert main(["stale", "hslm_mine", "--reading", "literal"]) == 0
    assert capsys.readouterr().out.split() == [str(file.relative_to(book)) for file in (swapped, older)]
    with pytest.raises(DataError, match=r"tiny\.one\.s1.*make grid GRID=hslm_mine\)"):
        tables.runs_of(mine, "scenes", "tiny")
    wrong.unlink()
    with pytest.raises(DataError, match="make grid GRID=hslm_mine READING=literal"):
        tables.runs_of(mine, "scenes", "tiny")
    for file in (swapped, older):
        file.unlink()
    assert {reading: list(of["row"]) for reading, of in tables.runs_of(mine, "scenes", "tiny").items()} == {
        "default": ["one", "two"], "literal": ["one"]}  # fmt: skip


def test_the_page_draws_both_readings(book, tmp_path):
    write_grid(book, "hslm_mine", "name,width\none,16\ntwo,8\n", plot='["R@1"]', claims=CLAIM)
    for name, reading in (("tiny", "default"), ("tiny-literal", "literal")):
        for seed in (0, 1):
            for row, width in (("one", 16), ("two", 8)):
                file = hslm_run(book, f"scenes.{name}.{row}.s{seed}", reading)
                content = json.loads(file.read_text())
                content["parameters"]["width"] = width
                file.write_text(json.dumps(content))
    command = [sys.executable, "-m", "papermill", "--no-progress-bar", "--cwd", str(book)]
    command += ["notebooks/hslm/3_ablations.ipynb", str(tmp_path / "page.ipynb"), "-p", "grid", "hslm_mine"]
    ran = subprocess.run(command, cwd=book, capture_output=True, text=True, timeout=300)
    assert ran.returncode == 0, ran.stderr[-3000:]
    stem = "hslm_mine.scenes.tiny"
    drawn = {f"{stem}{reading}{ending}.svg" for reading in ("", "-literal") for ending in ("", ".claims")}
    assert {path.name for path in (book / "figures").iterdir()} == drawn | {
        f"{stem}.{ending}" for ending in ("md", "csv", "claims.csv")
    }
    text = (book / "figures" / f"{stem}.md").read_text()
    assert "the readings default and literal" in text
    assert "R@1 literal" in text


def test_a_claim_may_name_its_metrics_by_a_pattern(book):
    claim = '[{ text = "x", better = "one", worse = "two", metrics = ["i2t*"] }]'
    write_grid(
        book, "mvam_mine", "name,views\none,16\ntwo,8\n", claims=claim, judge='["rsum", "i2t_r1", "i2t_r5"]'
    )
    assert [one.metric for one in grid("mvam_mine", folder=book / "grids").claims] == ["i2t_r1", "i2t_r5"]
    write_grid(book, "mvam_mine", "name,views\none,16\ntwo,8\n", claims=claim, judge='["rsum"]')
    with pytest.raises(DataError, match=r"has the metric 'i2t\*'"):
        grid("mvam_mine", folder=book / "grids")


@pytest.mark.parametrize("dataset", ["scenes", "flickr8k", "flickr30k", "coco_karpathy", "coco2014"])
@pytest.mark.parametrize("name", names(ROOT / "grids"))
def test_claims_are_the_papers_own_order(name, dataset):
    """In each column that a claim names and the paper prints for both rows, the better row has the higher number."""
    table = grid(name, dataset, folder=ROOT / "grids")
    if not table.table or (dataset == "coco2014" and table.method != "felga"):
        return
    cells = printed(table).set_index(["row", "column"])["value"]
    columns = {metric: column for column, metric in table.columns.items()}
    for claim in table.claims:
        if claim.baseline:
            continue
        pair = [
            cells.get((table.names[row], columns.get(claim.metric))) for row in (claim.better, claim.worse)
        ]
        assert None in pair or pair[0] > pair[1], (claim.text, claim.metric, pair)


def test_committed_metrics_are_those_of_their_rows():
    for name in names(ROOT / "grids"):
        for dataset in ("scenes", "flickr8k"):
            table = grid(name, dataset, folder=ROOT / "grids")
            runs = ROOT / "papermill_runs" / table.method
            for reading in ("default", "literal"):
                assert stale(table, dataset, "tiny", reading, runs=runs) == []


def test_a_run_of_earlier_defaults_says_which_settings(tmp_path):
    """An old file without an identity: a setting it does not name is younger, and had its literal value."""
    hslm = grid("hslm_modules", "scenes")
    today = grid_settings(hslm, "row-12", dataset="scenes", scale="tiny").as_dict()
    literal = grid_settings(hslm, "row-12", dataset="scenes", scale="tiny", reading="literal").as_dict()

    def told(scale: str, **content) -> list[str]:
        file = tmp_path / f"scenes.{scale}.row-12.s0" / "metrics.json"
        file.parent.mkdir(exist_ok=True)
        file.write_text(json.dumps(content))
        return earlier(hslm, file)

    old = {key: value for key, value in today.items() if key != "start"} | {"self_residual": False, "seed": 3}
    assert sorted(told("tiny", parameters=old)) == ["self_residual", "start"]
    assert told("tiny", parameters=today | {"seed": 3}) == []
    assert told("tiny", parameters=old, identity={}) == []  # its own digest tells
    without = {key: value for key, value in literal.items() if key != "start"}
    assert told("tiny-literal", parameters=without) == []
