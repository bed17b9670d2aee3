"""Every notebook runs headless with smoke=True, in the order of the workbook, and leaves what it promises."""

import json
import os
import subprocess
import sys

import pytest
from filelock import FileLock
from notebook_text import NOTEBOOKS, ROOT, declaration

ORDER = [
    "0_start_here",
    "1_data",
    "mvam/1_lesson",
    "mvam/2_train",
    "mvam/3_ablations",
    "mvam/4_attention",
    "hslm/1_lesson",
    "hslm/2_train",
    "hslm/3_ablations",
    "hslm/4_attention",
    "felga/0_vlp",
    "felga/1_lesson",
    "felga/2_train",
    "felga/3_ablations",
    "felga/4_retrieval",
    "slan/1_lesson",
    "slan/2_train",
    "slan/3_ablations",
    "slan/4_regions",
    "9_scorecard",
]
SOURCES = {str(path.relative_to(NOTEBOOKS).with_suffix("")) for path in NOTEBOOKS.rglob("*.py")} - {"build"}


def test_the_order_names_every_notebook():
    assert set(ORDER) == SOURCES


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """One folder for all tests of this file, also where they are spread over processes."""
    base = tmp_path_factory.getbasetemp()
    shared = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "workbook"
    shared.mkdir(exist_ok=True)
    return shared


def executed(name, folder):
    """Runs a notebook once, whoever asks first; where another process is at it, waits.
    What a notebook opens (`run`) is made before it."""
    with FileLock(folder / f"{name.replace('/', '-')}.lock"):
        done = folder / f"{name.replace('/', '-')}.done"
        if done.exists():
            return
        declared = declaration(NOTEBOOKS / f"{name}.py")
        given = {"smoke": "True", "out": folder / name.replace("/", "-")}
        given |= {key: folder / key for key in ("figures", "cache") if key in declared}
        if "run" in declared:
            trained = f"{name.split('/')[0]}/2_train"
            executed(trained, folder)
            given["run"] = folder / trained.replace("/", "-")
        command = [sys.executable, "-m", "papermill", "--no-progress-bar", "--cwd", str(ROOT),
                   str(NOTEBOOKS / f"{name}.ipynb"), str(folder / f"{name.replace('/', '-')}.ipynb")]  # fmt: skip
        for key, value in given.items():
            command += ["-p", key, str(value)]
        environment = {**os.environ, "MPLBACKEND": "agg", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
        ran = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)
        assert ran.returncode == 0, ran.stderr[-4000:]
        done.touch()


@pytest.mark.parametrize("name", ORDER)
def test_it_runs(name, folder):
    executed(name, folder)
    if name.endswith("/2_train"):
        metrics = json.loads((folder / name.replace("/", "-") / "metrics.json").read_text())
        assert metrics["parameters"]["smoke"] is True
        if name.startswith("felga"):
            assert metrics["metrics"]["pictures"] == 40
            assert metrics["protocol"].startswith(
                "scenes test: object discovery, 8 class names x 40 pictures"
            )
        else:
            assert metrics["metrics"]["images"] == 40
            assert metrics["protocol"].startswith("scenes test: 40 images x 200 captions")
    if "/4_" in name:
        pictures = name.replace("/4", "")  # mvam_attention, felga_retrieval
        assert len(list((folder / "figures").glob(f"{pictures}.*.png"))) >= 4
