"""Runs: identity, refusal, resumption, what is written, and how a run is found and opened again."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import training_target as target

from finematch import runs, training
from finematch.config import Settings
from finematch.files import DataError
from finematch.hold import Busy
from finematch.runs import IdentityError, begin, latest, measured, open_run, status_of
from finematch.training import fit, seed_everything

REPOSITORY = Path(__file__).resolve().parents[1]
DATA = {"train": {"images": "1" * 64, "captions": "2" * 64}, "val": {"captions": "3" * 64}}


def page(**changes):
    """The settings of a page, with the four things that `begin` asks of them."""
    values = {"dataset": "toy", "scale": "tiny", "smoke": False, "seed": 0, "tau": 0.07, "layers": (1, 2),
              "text_weights": "", "threads": 0, "out": None, **changes}  # fmt: skip
    return SimpleNamespace(
        numerics=1,
        as_dict=lambda: dict(values),
        identity=lambda: {name: value for name, value in values.items() if name not in ("threads", "out")},
        paths=lambda: {"text_weights": values["text_weights"]} if values["text_weights"] else {},
    )


@pytest.fixture
def book(tmp_path, monkeypatch):
    """A workbook's folder, where relative paths lie."""
    (tmp_path / "notebooks").mkdir()
    (tmp_path / "pyproject.toml").touch()
    monkeypatch.chdir(tmp_path)
    return tmp_path


def trained(resume=None, *, out="run", data=DATA, epochs=1, **changes):
    """One run of the toy, as a page makes it."""
    run = begin("mvam", page(**changes), data=data, features="f" * 64, out=out, resume=resume)
    seed_everything(changes.get("seed", 0))
    model = target.Toy()
    summary = fit(
        model, target.Data(), target.plan(epochs=epochs), run.folder, identity=run.digest, echo=None
    )
    run.finish({"loss": summary["history"][-1]["loss"]}, seconds=summary["seconds"], protocol="toy")
    return run


def test_an_identity_is_what_numbers_depend_on(book):
    def digest(*, data=DATA, features="f", numerics=1, **changes):
        s = page(**changes)
        s.numerics = numerics
        run = runs.Run("mvam", book, {}, runs.identity_of("mvam", s, data=data, features=features))
        return run.digest

    first = digest()
    assert first == digest() == digest(threads=2, out="elsewhere") == digest(layers=[1, 2])
    others = [digest(tau=0.5), digest(seed=1), digest(layers=(1,)), digest(features="g"), digest(numerics=2),
              digest(data={**DATA, "val": {"captions": "4" * 64}}), digest(text_weights="a/hub-name")]  # fmt: skip
    for name, text in (("a", "one"), ("b", "one"), ("c", "two")):
        (book / name).mkdir()
        (book / name / "weights").write_text(text)
        others.append(digest(text_weights=name))
    assert others[-3] == others[-2]  # the same content at another place
    assert len({first, *others}) == len(others)


def test_a_page_run_again_with_other_parameters_has_a_folder_of_its_own(book):
    one, other, smoke = (trained(out=None, **changes) for changes in ({}, {"tau": 0.5}, {"smoke": True}))
    assert one.folder == book / "papermill_runs/mvam" / f"toy.tiny.{one.digest[:8]}"
    assert other.folder != one.folder
    assert smoke.folder.name == f"toy.smoke.{smoke.digest[:8]}"
    assert trained(out=None).folder == one.folder


def test_another_runs_checkpoint_is_refused_with_what_differs_and_two_ways_on(book):
    first = trained()
    kept = {file.name: file.read_bytes() for file in first.folder.iterdir() if not file.name.startswith(".")}
    with pytest.raises(
        IdentityError, match=r"another run: tau was 0.07, is 0.5\. .*another `out`.*resume='fresh'"
    ):
        trained(tau=0.5)
    with pytest.raises(
        IdentityError, match=r"data\.val\.captions was 333333333333333\.\.\., is 444444444444444"
    ):
        trained(data={**DATA, "val": {"captions": "4" * 64}})
    assert kept == {name: (first.folder / name).read_bytes() for name in kept}
    trained(threads=4)  # its own
    assert (first.folder / "best.safetensors").read_bytes() == kept["best.safetensors"]


def on_a_gpu(monkeypatch):
    """What `begin` reads where a GPU has bf16: the device, and what torch says of it."""
    monkeypatch.setattr(training, "accelerator", lambda: torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: True)


@pytest.mark.parametrize("out", ["run", None])
def test_a_run_goes_on_in_the_precision_in_which_it_began(book, monkeypatch, capsys, out):
    with monkeypatch.context() as gpu:
        on_a_gpu(gpu)
        first = begin("mvam", page(precision="auto"), data=DATA, out=out)
        assert capsys.readouterr().out == "precision: bf16 (auto on cuda)\n"
    assert (
        first.precision == first.parameters["precision"] == first.identity["settings"]["precision"] == "bf16"
    )
    fit(target.Toy(), target.Data(), target.plan(epochs=1), first.folder, identity=first.digest, echo=None)
    again = begin("mvam", page(precision="auto"), data=DATA, out=out)
    assert (again.folder, again.digest, again.parameters) == (first.folder, first.digest, first.parameters)
    assert "precision: bf16 (in which this run began; auto on cpu is no" in capsys.readouterr().out
    again.finish({"loss": 1.0}, seconds=1.0, protocol="toy")
    assert open_run(first.folder).precision == again.content["parameters"]["precision"] == "bf16"
    fresh = begin("mvam", page(precision="auto"), data=DATA, out=out, resume="fresh")
    assert fresh.precision == "no"
    fresh.release()
    other = begin("mvam", page(precision="auto", tau=0.5), data=DATA, out=out and "other")
    assert other.precision == "no"
    other.release()


def test_a_run_without_a_checkpoint_begins_in_the_precision_of_the_device(book, monkeypatch):
    """As those of git, which have metrics alone: bf16 is refused, not taken over, where nothing can go on."""
    with monkeypatch.context() as gpu:
        on_a_gpu(gpu)
        run = begin("mvam", page(precision="auto"), data=DATA, out="run")
        run.finish({"loss": 1.0}, seconds=1.0, protocol="toy")
    with pytest.raises(IdentityError, match="precision was bf16, is no"):
        begin("mvam", page(precision="auto"), data=DATA, out="run")
    replaced = begin("mvam", page(precision="auto"), data=DATA, out="run", resume="replace")
    assert replaced.precision == "no"
    replaced.release()
    asked = begin("mvam", page(precision="fp16"), data=DATA, out="asked")
    assert asked.precision == "fp16"
    asked.release()


def test_fresh_and_replace(book):
    first = trained()
    again = trained("replace")  # of the same identity it goes on: nothing is trained
    assert again.content["metrics"] == first.content["metrics"]
    log = first.folder / "log.jsonl"
    log.write_text(log.read_text() + '{"epoch": "a mark"}\n')
    assert trained("fresh").metrics == first.metrics
    assert "a mark" not in log.read_text()  # it was written again from its first line
    other = trained("replace", seed=1)
    assert other.metrics != first.metrics
    assert json.loads((first.folder / "metrics.json").read_text())["parameters"]["seed"] == 1
    with pytest.raises(ValueError, match="resume is 'no'"):
        trained("no")


def test_what_was_left_before_there_were_identities_is_refused_or_replaced(book):
    (book / "run").mkdir()
    runs.write_metrics(book / "run", {"seed": 0}, {"loss": 1.0}, seconds=1, protocol="toy")
    with pytest.raises(IdentityError, match="it does not say with which settings, data and features"):
        trained()
    trained("replace")


def test_starting_over_removes_its_own_stages_and_nobody_elses_runs(book):
    first = trained(out="run")
    for name in ("run/stage1", "run/encoder", "run/another"):
        (book / name).mkdir()
        for file in ("checkpoint.pt", "best.safetensors", "model.safetensors"):
            (book / name / file).touch()
    (book / "run/another/metrics.json").write_text("{}")
    runs.wipe(first.folder)
    left = {file.relative_to(book).as_posix() for file in first.folder.rglob("*") if file.is_file()}
    assert {name for name in left if not name.startswith("run/.")} == {
        "run/stage1/model.safetensors", "run/encoder/model.safetensors", "run/another/checkpoint.pt",
        "run/another/best.safetensors", "run/another/model.safetensors", "run/another/metrics.json"}  # fmt: skip


def test_a_run_holds_its_folder_until_it_has_finished(book):
    ask = [sys.executable, "-c", f"from finematch.hold import hold; hold({str(book / 'run')!r}).take()"]
    begin("mvam", page(), data=DATA, out="run")
    run = begin("mvam", page(), data=DATA, out="run")  # the cell run again
    busy = subprocess.run(ask, capture_output=True, text=True)
    assert f"another run is at work in {book / 'run'}: pid {os.getpid()}" in busy.stderr
    run.finish({"loss": 1.0}, seconds=1, protocol="toy")
    assert subprocess.run(ask, capture_output=True).returncode == 0
    assert issubclass(Busy, RuntimeError)
    with pytest.raises(IdentityError):
        begin("mvam", page(tau=0.5), data=DATA, out="run")
    assert subprocess.run(ask, capture_output=True).returncode == 0  # who was refused holds nothing


# ------------------------------------------------------------------------------------------- open again
def test_a_run_is_found_and_opened(book):
    trained(out="papermill_runs/mvam/a")
    newest = trained(out="papermill_runs/mvam/b", seed=1)
    os.utime(book / "papermill_runs/mvam/a/metrics.json", (1, 1))
    os.utime(book / "papermill_runs/mvam/b/metrics.json", (2, 2))
    assert latest("mvam") == newest.folder
    assert latest("mvam", seed=0).name == "a"
    trained(out="papermill_runs/mvam/smoke", smoke=True)
    assert latest("mvam") == newest.folder, "a smoke run is not taken for a real one"
    assert latest("mvam", smoke=True).name == "smoke"
    with pytest.raises(DataError, match=r"latest run of mvam with tau=0\.3.*2_train"):
        latest("mvam", tau=0.3)
    run = open_run("latest", method="mvam", seed=1)
    assert (run.method, run.seed, run.status, run.digest) == ("mvam", 1, "current", newest.digest)
    assert run.identity == newest.identity
    assert run.metrics == newest.metrics
    (book / "notebooks/mvam").mkdir()
    os.chdir(book / "notebooks/mvam")  # as a page in JupyterLab
    assert open_run("papermill_runs/mvam/a").seed == 0
    with pytest.raises(DataError, match="has not finished"):
        open_run("papermill_runs/mvam/c")


def test_metrics_beside_other_weights_are_noticed(book):
    run = trained()
    old = (run.folder / "metrics.json").read_bytes()
    trained("fresh", seed=1)
    (run.folder / "metrics.json").write_bytes(old)
    with pytest.raises(DataError, match=r"are not those that metrics\.json was measured with"):
        open_run("run")


def test_a_run_says_when_code_or_data_are_others_now(book, monkeypatch):
    run = trained()
    content = run.content
    assert status_of(content) == "current"
    changed = {**DATA, "train": {"captions": "5" * 64}}
    assert "train.captions was 222" in runs.differences(content["identity"]["data"], changed)
    monkeypatch.setattr(runs, "_commits", lambda: frozenset({"1" * 40}))
    assert status_of({**content, "commit": "1" * 40 + "-dirty"}) == "current"
    assert "is in no history here" in status_of({**content, "commit": "2" * 40})
    on_scenes = {**content, "commit": "1" * 40, "parameters": {**content["parameters"], "dataset": "scenes"}}
    assert "its scenes are not those that are drawn now: train.captions" in status_of(on_scenes)
    stated = json.loads((Path(runs.__file__).parent / "scenes" / "digests.json").read_text())["digests"]
    drawn = {"train": stated["scenes train"], "annotated": stated["scenes_entities test"]}
    assert status_of({**on_scenes, "identity": {**content["identity"], "data": drawn}}) == "current"
    monkeypatch.setattr(runs, "_commits", frozenset)
    monkeypatch.setattr(runs, "numerics", lambda method, parameters: 2)
    with pytest.warns(UserWarning, match="its arithmetic is version 1, now 2"):
        assert open_run("run").status.startswith("legacy")


def test_a_change_that_reaches_some_runs_leaves_the_others_their_version():
    """SLAN's frozen proposals once moved with what they read; all other runs have the numbers of before."""
    plain, frozen = Settings("slan", {}), Settings("slan", {"frozen": True})
    assert frozen.numerics == plain.numerics + 1
    assert runs.numerics("slan", {"frozen": True}) == frozen.numerics
    assert runs.numerics("slan", {}) == runs.numerics("slan", {"frozen": False}) == plain.numerics
    assert runs.identity_of("slan", frozen, data={})["numerics"] == frozen.numerics


# ------------------------------------------------------------------------------------------- tables
def test_metrics_files_tell_their_status(book):
    run = trained(layers=(1, 2))
    runs.write_metrics(book / "old", {"seed": 3}, {"loss": 1.0}, seconds=1, protocol="toy")
    frame = measured(book).set_index("seed")
    assert frame.loc[0, ["run_status", "run_digest", "layers"]].tolist() == ["current", run.digest, "1, 2"]
    assert frame.loc[3, "run_status"].startswith("legacy: it does not say which data")
    assert measured([run.folder / "metrics.json"])["run_status"].tolist() == ["current"]
    file = json.loads((run.folder / "metrics.json").read_text())
    assert file["identity"]["data"] == DATA
    assert list(file["weights"]) == ["best.safetensors"]


def test_the_committed_metrics_files_stay_readable():
    files = sorted((REPOSITORY / "papermill_runs").glob("*/*/metrics.json"))
    listed = subprocess.run(
        ["git", "ls-files", "papermill_runs"], cwd=REPOSITORY, capture_output=True, text=True
    )
    if not listed.stdout:
        pytest.skip("not a git checkout")
    kept = [file for file in files if str(file.relative_to(REPOSITORY)) in listed.stdout.split()]
    frame = measured(kept)
    assert len(frame) == len(kept) > 100
    told = frame["run_status"]
    assert ((told == "current") | told.str.startswith("legacy: ")).all()
    assert (told[frame["run_digest"] == ""].str.startswith("legacy")).all()


def test_weights_of_stages_and_members_are_named(tmp_path):
    seed_everything(0)
    fit(target.Toy(), target.Data(), target.plan(epochs=1), tmp_path / "member0", echo=None)
    found = runs.weights_digests(tmp_path)
    assert list(found) == ["member0/best.safetensors"]
    assert len(found["member0/best.safetensors"]) == 64


def test_a_run_that_another_builds_on_counts_by_what_made_it_and_what_it_became(tmp_path):
    """Not by its folder's name: the same run elsewhere is the same, the same folder with other weights is not."""

    class Given:
        numerics = 1

        def __init__(self, folder):
            self.folder = str(folder)

        def identity(self):
            return {"pretrained": self.folder, "start": "pretrained"}

        def paths(self):
            return {"pretrained": self.folder}

    def of(name: str, weights: str, epochs: int = 1) -> dict:
        folder = tmp_path / name
        folder.mkdir(exist_ok=True)
        content = dict.fromkeys(runs.FIELDS) | {"parameters": {}, "metrics": {}, "versions": {}}
        content |= {"identity": {"settings": {"epochs": epochs}}, "weights": {"best.safetensors": weights}}
        (folder / "metrics.json").write_text(json.dumps(content))
        return runs.identity_of("slan_captioning", Given(folder), data={})

    first = of("one", "aa")
    assert first["settings"]["pretrained"].startswith("run:")
    assert of("elsewhere", "aa") == first
    others = (of("one", "bb"), of("one", "aa", epochs=2))
    assert len({one["settings"]["pretrained"] for one in (first, *others)}) == 3
