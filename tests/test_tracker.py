"""Trackers of accelerate: losses and metrics by step, read back; a run that goes on; a package that is not there."""

import json
import time
from importlib.util import find_spec

import pytest
import training_target as target

from finematch.checkpoints import TrainingError, read_weights
from finematch.config import ParameterError, Settings
from finematch.training import fit, seed_everything

needs_extra = pytest.mark.skipif(
    find_spec("tensorboard") is None, reason="no tensorboard: pip install -e '.[tensorboard]'"
)
METHODS = ("mvam", "hslm", "felga", "slan")


class Stopped(Exception):
    pass


def shown(folder) -> dict[str, dict[int, float]]:
    """What TensorBoard shows of a run: by name the value of each step, none of them twice."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "finematch"), size_guidance={"scalars": 0}).Reload()
    found = {}
    for name in events.Tags()["scalars"]:
        scalars = events.Scalars(name)
        found[name] = {one.step: one.value for one in scalars}
        assert len(found[name]) == len(scalars), f"{name} has a step twice"
    return found


def trained(out, *, stop: int = 0, tracker: str = "tensorboard"):
    """The toy in `out`, broken off after so many batches; each batch's loss by its step, and the summary."""
    if (out / "finematch").exists():
        time.sleep(1.1)  # TensorBoard reads files in the order of their names, which have the second
    losses = {}
    seed_everything(0)
    model = target.Toy()

    def remember(module, inputs, output):
        if module.training:
            losses[len(losses) + 1] = float(output["loss"].detach())
            if len(losses) == stop:
                raise Stopped

    model.register_forward_hook(remember)

    def evaluate(of):
        return {"rsum": float(of.net[0].weight.detach().sum()), "protocol": "toy"}

    try:
        summary = fit(model, target.Data(), target.plan(), out, evaluate=evaluate, echo=None, tracker=tracker)
    except Stopped:
        return losses, None
    return losses, summary


@needs_extra
def test_tensorboard_has_each_loss_and_metric_at_its_step(tmp_path):
    losses, summary = trained(tmp_path / "run")
    found = shown(tmp_path / "run")
    assert set(found) == {"train/loss", "train/error", "val/rsum"}
    assert found["train/loss"] == pytest.approx(losses)
    assert list(losses) == list(range(1, summary["steps"] + 1))
    per_epoch = summary["steps"] // len(summary["history"])
    assert found["val/rsum"] == pytest.approx(
        {line["epoch"] * per_epoch: line["rsum"] for line in summary["history"]}
    )


@needs_extra
def test_a_run_that_goes_on_continues_its_curve(tmp_path):
    """It goes on from the latest checkpoint, two batches before the end of the first session: none is shown twice."""
    trained(tmp_path / "whole")
    _, nothing = trained(
        tmp_path / "broken", stop=12
    )  # of 32; the last checkpoint is of batch 11, 3 of its epoch
    assert nothing is None
    before = shown(tmp_path / "broken")["train/loss"]
    trained(tmp_path / "broken")
    whole, broken = (shown(tmp_path / name) for name in ("whole", "broken"))
    assert broken == whole
    assert before.items() <= whole["train/loss"].items()
    files = len(list((tmp_path / "broken/finematch").glob("events*")))
    trained(tmp_path / "broken")  # has finished
    assert len(list((tmp_path / "broken/finematch").glob("events*"))) == files
    assert shown(tmp_path / "broken") == whole


@needs_extra
def test_a_run_that_starts_over_shows_nothing_of_before(tmp_path):
    trained(tmp_path / "run", stop=20)
    (tmp_path / "run/checkpoint.pt").unlink()
    losses, _ = trained(tmp_path / "run")
    assert shown(tmp_path / "run")["train/loss"] == pytest.approx(losses)


@needs_extra
def test_a_tracker_changes_no_number(tmp_path):
    _, shown_ = trained(tmp_path / "shown")
    _, alone = trained(tmp_path / "alone", tracker="")
    assert not (tmp_path / "alone/finematch").exists()
    for one, other in zip(shown_["history"], alone["history"], strict=True):
        assert one | {"seconds": 0} == other | {"seconds": 0}
    weights = [read_weights(tmp_path / name / "best.safetensors")[1] for name in ("shown", "alone")]
    assert weights[0] == weights[1]
    trained(tmp_path / "both", stop=12, tracker="")
    _, both = trained(tmp_path / "both")  # a run may get one later
    assert [line["rsum"] for line in both["history"]] == [line["rsum"] for line in alone["history"]]


def test_a_package_that_is_not_installed_is_named(tmp_path):
    lacking = next(name for name in ("dvclive", "clearml", "aim", "swanlab") if find_spec(name) is None)
    with pytest.raises(TrainingError, match=f"{lacking} is not installed.*pip install {lacking}"):
        trained(tmp_path / "run", tracker=lacking)
    assert not (tmp_path / "run").exists()
    with pytest.raises(ValueError, match="Unsupported logging capability: excel"):
        trained(tmp_path / "run", tracker="excel")


@pytest.mark.parametrize("method", METHODS)
def test_a_tracker_is_a_setting_outside_of_the_identity(method):
    off, on = Settings(method, {}), Settings(method, {"tracker": "tensorboard"})
    assert (off.tracker, on.tracker) == ("", "tensorboard")
    assert json.dumps(off.identity()) == json.dumps(on.identity())
    with pytest.raises(ParameterError, match=r"tracker is 'tensorbord'.*did you mean 'tensorboard'"):
        Settings(method, {"tracker": "tensorbord"})
