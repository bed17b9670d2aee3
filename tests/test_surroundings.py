"""What a machine brings along: odd folder names, a user's folder, another program's settings, a killed grid."""

import json
import os
import shutil
import site
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import training_target as target
from notebook_text import ROOT, build
from test_grids import TABLE, TRAIN, write_grid

from finematch import training
from finematch.__main__ import main
from finematch.config import ParameterError, Settings, located, parameters
from finematch.features import inputs
from finematch.models.slan import towers
from finematch.runs import FIELDS, measured, open_run
from finematch.training import fit, own_environment, seed_everything


# ------------------------------------------------------------------------------------------- folders
def finished(folder, seed):
    """A run of which nothing is left but its metrics."""
    content = dict.fromkeys(FIELDS, "x") | {
        "parameters": {"seed": seed},
        "metrics": {"rsum": 1.0},
        "versions": {},
    }
    folder.mkdir(parents=True)
    (folder / "metrics.json").write_text(json.dumps(content))


def test_a_grid_runs_in_a_folder_with_blanks_and_brackets_and_by_a_python_in_another(tmp_path):
    book, env = tmp_path / "my book [1]", tmp_path / "my env"
    (book / "notebooks" / "toy").mkdir(parents=True)
    (book / "grids").mkdir()
    env.mkdir()
    (env / "python").symlink_to(sys.executable)
    for name in ("Snakefile", "pyproject.toml"):
        shutil.copy(ROOT / name, book)
    shutil.copytree(ROOT / "profiles", book / "profiles")
    (book / "notebooks" / "toy" / "2_train.py").write_text(TRAIN)
    (book / "notebooks" / "toy" / "3_ablations.py").write_text(TABLE)
    build.main(["--folder", str(book / "notebooks")])
    write_grid(book, "toy_rows", "name,views\none,1\n")
    command = [str(env / "python"), "-m", "snakemake", "--workflow-profile", "profiles/default"]
    command += ["--config", "grid=toy_rows", "seeds=0"]
    where = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT / "src"), *site.getsitepackages()])}
    ran = subprocess.run(command, cwd=book, env=where, capture_output=True, text=True, timeout=900)
    assert ran.returncode == 0, ran.stderr
    assert (book / "figures" / "toy_rows.scenes.tiny.md").is_file()


@pytest.mark.parametrize("file", ["Snakefile", "workbook.smk"])
def test_the_python_that_runs_a_page_is_quoted(file):
    assert 'f"{shlex.quote(sys.executable)} -m papermill' in (ROOT / file).read_text()


@pytest.mark.parametrize("name", ["runs", "my runs [1]", "runs [ab]*", "a?b"])
def test_runs_are_found_in_a_folder_of_any_name(tmp_path, name):
    for seed in (0, 1):
        finished(tmp_path / name / f"one.s{seed}", seed)
    for runs in (
        tmp_path / name,
        f"{tmp_path / name}/*/metrics.json",
        f"{tmp_path / name}/one.s[0-9]/metrics.json",
    ):
        assert measured(runs)["seed"].tolist() == [0, 1]
    assert measured(tmp_path / name / "one.s1" / "metrics.json")["seed"].tolist() == [1]
    assert measured(f"{tmp_path / name}/two*/metrics.json").empty


# ------------------------------------------------------------------------------------------- paths as they are typed
def test_the_users_folder_may_be_written_short(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HOME", str(tmp_path))
    s = Settings("mvam", {"data_root": "~/data", "out": "~/runs/a", "vision_weights": "~/w.safetensors"})
    assert (s.data_root, s.out, s.vision_weights) == tuple(
        f"{tmp_path}/{name}" for name in ("data", "runs/a", "w.safetensors")
    )
    namespace = {"__annotations__": {"cache": "str"}, "cache": "~/cache"}
    assert parameters(namespace).cache == f"{tmp_path}/cache"
    finished(tmp_path / "runs", 3)
    assert measured("~/runs")["seed"].tolist() == [3]
    with pytest.warns(UserWarning, match="legacy"):
        assert open_run("~/runs", method="mvam").seed == 3
    assert main(["cache", "list", "--cache=~/cache"]) == 0
    assert f"{tmp_path}/cache: 0 entries" in capsys.readouterr().out


@pytest.mark.parametrize("value", ["$HOME/data", "~nobody-of-this-name/data", " data", "data\t"])
def test_what_would_make_a_folder_of_that_name_is_refused(value):
    with pytest.raises(ParameterError, match=r"data_root is .*, taken as it stands"):
        Settings("mvam", {"data_root": value})
    with pytest.raises(ParameterError, match=r"cache is .*, taken as it stands"):
        parameters({"__annotations__": {"cache": "str"}, "cache": value})


@pytest.fixture
def in_jupyterlab(tmp_path, monkeypatch):
    """A workbook, and a kernel that has started in its notebook's folder."""
    (tmp_path / "notebooks" / "mvam").mkdir(parents=True)
    (tmp_path / "pyproject.toml").touch()
    monkeypatch.chdir(tmp_path / "notebooks" / "mvam")
    return tmp_path


def test_names_of_files_are_found_from_a_notebooks_folder(in_jupyterlab):
    (in_jupyterlab / "w.safetensors").touch()
    assert located("w.safetensors") == str(in_jupyterlab / "w.safetensors")
    assert [located(name) for name in ("", "hub", "bert-base-uncased")] == ["", "hub", "bert-base-uncased"]
    assert located(in_jupyterlab / "w.safetensors") == str(in_jupyterlab / "w.safetensors")


def test_weights_and_vocabularies_are_found_from_a_notebooks_folder(in_jupyterlab, monkeypatch):
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "dog"]
    (in_jupyterlab / "text").mkdir()
    (in_jupyterlab / "text" / "vocab.txt").write_text("\n".join(words) + "\n")
    (in_jupyterlab / "w.safetensors").write_bytes(b"junk")
    assert len(inputs.open_tokenizer("flickr8k", "data", weights="text/vocab.txt")) == len(words)
    found = []
    monkeypatch.setattr(towers, "Cells", lambda name, *, weights, options: found.append(weights) or 1 / 0)
    monkeypatch.setattr(inputs, "timm_backbone", lambda name, *, weights: found.append(weights) or 1 / 0)
    monkeypatch.setattr(inputs, "mobilenet", lambda file: found.append(file) or 1 / 0)
    opened = {"weights": "w.safetensors"}
    for use in (
        lambda: towers.pixel_stages("resnet50", **opened),
        lambda: inputs.frozen_network("flickr8k", "data", "cache", vision="resnet18", **opened),
        lambda: inputs.frozen_network("flickr8k", "data", "cache", **opened),
    ):
        with pytest.raises(ZeroDivisionError):
            use()
    assert list(map(Path, found)) == [in_jupyterlab / "w.safetensors"] * 3


# ------------------------------------------------------------------------------------------- other programs' settings
@pytest.mark.parametrize(
    "left",
    [
        {"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4"},
        {"ACCELERATE_MIXED_PRECISION": "bf16", "ACCELERATE_USE_FSDP": "true"},
        {"ACCELERATE_DYNAMO_BACKEND": "INDUCTOR"},
        {"LOCAL_RANK": "0"},
        {"RANK": "1", "WORLD_SIZE": "2"},
        {"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "1"},
        {"PMI_SIZE": "2", "PMI_RANK": "0"},
    ],
    ids=lambda left: "+".join(left),
)
def test_what_another_program_left_in_the_environment_changes_nothing(tmp_path, monkeypatch, left):
    def trained(name):
        seed_everything(0)
        model = target.Toy()
        fit(model, target.Data(), target.plan(epochs=1), tmp_path / name, echo=None)
        return target.digest(model)

    alone = trained("alone")
    for name, value in left.items():
        monkeypatch.setenv(name, value)
    with pytest.warns(UserWarning, match=f"ignored: .*{min(left)}={left[min(left)]}"):
        assert trained("beside") == alone
    assert not left.keys() & os.environ.keys()


def test_torchruns_own_settings_stay(monkeypatch):
    own = {
        "RANK": "0",
        "WORLD_SIZE": "2",
        "LOCAL_RANK": "0",
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": "29500",
    }
    for name, value in own.items():
        monkeypatch.setenv(name, value)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        own_environment()
    assert {name: os.environ[name] for name in own} == own


def test_a_run_that_goes_on_with_other_threads_says_so(tmp_path, monkeypatch):
    class Stops(target.Data):
        def __getitems__(self, index):
            if (tmp_path / "run" / "best.safetensors").exists():  # in the second epoch
                raise KeyboardInterrupt
            return super().__getitems__(index)

    plan = target.plan(epochs=3)
    monkeypatch.setattr(training.torch, "get_num_threads", lambda: 2)
    with pytest.raises(KeyboardInterrupt):
        fit(target.Toy(), Stops(), plan, tmp_path / "run", echo=None)
    monkeypatch.setattr(training.torch, "get_num_threads", lambda: 1)
    with pytest.warns(UserWarning, match="began with 2 threads and goes on with 1"):
        found = fit(target.Toy(), target.Data(), plan, tmp_path / "run", echo=None)
    assert [line.get("threads") for line in found["history"]] == [None, 1, 1]
    assert '"threads": 1' in (tmp_path / "run" / "log.jsonl").read_text()


# ------------------------------------------------------------------------------------------- a killed grid
@pytest.mark.parametrize("command", [("grid", "GRID=mvam_views"), ("workbook",)])
def test_a_locked_folder_names_the_command_that_helps(tmp_path, command):
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    for name, status in (("python", 0), ("snakemake", 1)):
        (tmp_path / ".venv" / "bin" / name).write_text(f"#!/bin/sh\nexit {status}\n")
        (tmp_path / ".venv" / "bin" / name).chmod(0o755)
    (tmp_path / "pyproject.toml").touch()
    (tmp_path / ".venv" / ".installed").touch()
    (tmp_path / "grids").mkdir()
    shutil.copy(ROOT / "Makefile", tmp_path)

    def make(*arguments):
        return subprocess.run(["make", *arguments], cwd=tmp_path, capture_output=True, text=True)

    failed = make(*command)
    assert failed.returncode != 0
    assert "make unlock" not in failed.stderr
    locks = tmp_path / ".snakemake" / "locks"
    locks.mkdir(parents=True)
    (locks / "0.input.lock").touch()
    locked = make(*command)
    assert locked.returncode != 0
    assert "If none is: make unlock" in locked.stderr
    assert make("unlock").returncode == 0
    assert not locks.exists()


# ------------------------------------------------------------------------------------------- a page edited elsewhere
@pytest.fixture
def page(tmp_path):
    """A .py, an hour old, and the .ipynb that was built of it."""
    source = tmp_path / "1_page.py"
    source.write_text("# %% [markdown]\n# # A page\n\n# %%\nx = 1\n")
    os.utime(source, (source.stat().st_mtime - 3600,) * 2)
    assert build.main(["--folder", str(tmp_path)]) == 0
    return source


def test_a_notebook_that_was_edited_by_itself_is_not_overwritten(page, capsys):
    notebook = page.with_suffix(".ipynb")
    theirs = notebook.read_text().replace("x = 1", "x = 2")
    notebook.write_text(theirs)
    assert build.main(["--folder", str(page.parent)]) == 1
    assert notebook.read_text() == theirs
    assert "1_page.ipynb: was edited, its .py was not, and it is left as it is" in capsys.readouterr().out
    assert build.main(["--folder", str(page.parent), "--force"]) == 0
    assert "x = 1" in notebook.read_text()


def test_the_newer_text_and_a_notebook_that_was_only_run_are_built(page):
    notebook = page.with_suffix(".ipynb")
    ran = notebook.read_text().replace('"execution_count": null', '"execution_count": 7')
    notebook.write_text(ran)
    assert build.main(["--folder", str(page.parent)]) == 0
    assert notebook.read_text() != ran
    page.write_text(page.read_text().replace("x = 1", "x = 3"))
    os.utime(page, (notebook.stat().st_mtime + 5,) * 2)
    assert build.main(["--folder", str(page.parent)]) == 0
    assert "x = 3" in notebook.read_text()
