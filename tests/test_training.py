"""fit(): schedules, refusals, kill and resume, stop and rerun, damage, two processes."""

import contextlib
import json
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
import training_target as target
from safetensors.torch import save_file

from finematch import training
from finematch.checkpoints import (
    TrainingError,
    check_writable,
    load_best,
    read_checkpoint,
    read_weights,
    save_weights,
    state_digest,
    unique_state,
)
from finematch.files import DataError
from finematch.hold import Busy, hold
from finematch.training import (
    EpochBatches,
    Plan,
    by_one_process,
    fit,
    make_optimizer,
    make_schedule,
    seed_everything,
)

SCRIPT = Path(target.__file__)


def run(out, *, kill_after=None):
    """The target in a process of its own; kill -9 after so many batches if asked. Returns its last line."""
    sleep = "0.02" if kill_after else "0"
    process = subprocess.Popen(
        [sys.executable, str(SCRIPT), str(out), sleep], stdout=subprocess.PIPE, text=True
    )
    seen, last = 0, ""
    for line in process.stdout:
        last = line
        seen += line.startswith("batch")
        if kill_after and seen == kill_after:
            process.send_signal(signal.SIGKILL)
            process.wait()
            return None
    assert process.wait() == 0
    return last


def test_killed_and_resumed_is_bit_for_bit_the_same(tmp_path):
    whole = run(tmp_path / "whole")
    assert whole.startswith("END")
    when = random.Random().randrange(2, 30)  # any of the 32 batches
    assert run(tmp_path / "killed", kill_after=when) is None
    assert not (tmp_path / "killed" / "log.jsonl").exists() or (
        len((tmp_path / "killed" / "log.jsonl").read_text().splitlines()) < 4
    )
    assert run(tmp_path / "killed") == whole, f"killed at batch {when}"
    logs = [[json.loads(line) for line in (tmp_path / d / "log.jsonl").open()] for d in ("whole", "killed")]
    for a, b in zip(*logs, strict=True):
        assert {k: v for k, v in a.items() if k != "seconds"} == {
            k: v for k, v in b.items() if k != "seconds"
        }


def test_a_finished_run_is_not_trained_again(tmp_path):
    seed_everything(0)
    model = target.Toy()
    first = fit(model, target.Data(), target.plan(), tmp_path, echo=None)
    again = target.Toy()
    second = fit(again, target.Data(), target.plan(), tmp_path, echo=None)
    assert target.digest(model) == target.digest(again)
    assert first["history"] == second["history"]


def test_workers_and_checkpoints_change_no_number(tmp_path):
    """Nor need they be the same when a broken run goes on."""

    class Broken(target.Data):
        def __init__(self, at=10**9):
            super().__init__()
            self.at = at

        def __getitems__(self, index):
            self.at -= 1
            if self.at < 0:
                raise KeyboardInterrupt
            return super().__getitems__(index)

    found = []
    for name, first, then in (
        ("whole", None, {}),
        ("read by others", None, {"workers": 2}),
        ("broken", {"checkpoint_steps": 2}, {"workers": 1, "checkpoint_steps": 5}),
    ):
        if first is not None:
            seed_everything(0)
            with pytest.raises(KeyboardInterrupt):
                fit(target.Toy(), Broken(13), target.plan(**first), tmp_path / name, echo=None)
        seed_everything(0 if first is None else 7)
        model = target.Toy()
        fit(model, target.Data(), target.plan(**then), tmp_path / name, echo=None)
        found.append(target.digest(model))
    assert found[0] == found[1] == found[2]


def test_a_plan_refuses_what_makes_no_sense():
    for name in ("workers", "checkpoint_steps"):
        with pytest.raises(ValueError, match=f"{name} = -1: must not be negative"):
            target.plan(**{name: -1})


def test_auto_is_the_precision_of_the_device(monkeypatch):
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    for capable, expected in ((True, "bf16"), (False, "no")):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda capable=capable, **_: capable)
        assert training.precision_on(gpu) == expected
        assert training.precision_on(cpu) == "no"
    assert training.precision_on(torch.device("mps")) == "no"
    assert [training.precision_on(gpu, one) for one in ("no", "bf16", "fp16")] == ["no", "bf16", "fp16"]
    assert target.plan(precision="auto").precision == "no"


def test_bf16_on_a_cpu_without_instructions_warns_with_the_factor(monkeypatch):
    monkeypatch.setattr(training, "bf16_slowdown", lambda: 46.2)
    with pytest.warns(UserWarning, match="takes 46 times as long"):
        assert training.precision_on(torch.device("cpu"), "bf16") == "bf16"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert training.precision_on(torch.device("cuda"), "bf16") == "bf16"
        assert training.precision_on(torch.device("cpu"), "auto") == "no"
        monkeypatch.setattr(training, "bf16_slowdown", lambda: 0.5)
        assert training.precision_on(torch.device("cpu"), "bf16") == "bf16"


@pytest.mark.skipif(not torch.backends.cpu.get_cpu_capability().startswith("AVX"), reason="another processor")
def test_the_factor_is_measured():
    """A process whose libraries are told to use AVX2 alone has no instructions for bf16: 34 to 59 times as long."""
    script = (
        "import torch; from finematch.training import precision_on; precision_on(torch.device('cpu'), 'bf16')"
    )
    hidden = {"ONEDNN_MAX_CPU_ISA": "AVX2", "MKL_ENABLE_INSTRUCTIONS": "AVX2", "ATEN_CPU_CAPABILITY": "avx2"}
    ran = subprocess.run(
        [sys.executable, "-c", script], env=os.environ | hidden, capture_output=True, text=True
    )
    assert re.search(r"UserWarning: precision=bf16: .* takes \d+ times as long", ran.stderr), ran.stderr


def test_what_runs_share_is_refused_in_several_processes(monkeypatch):
    """Made under a lock it would wait for processes that wait for the lock."""
    by_one_process("a detector")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(
        TrainingError, match="a detector is made once, by one process, and is not in the cache"
    ):
        by_one_process("a detector")


def torchrun(script, *arguments):
    """Two gloo processes of one thread each."""
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node",
        "2",
        str(script),
    ]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, *map(str, arguments)], env=environment, capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 0, done.stderr


def test_two_processes_train_as_one(tmp_path):
    torchrun(SCRIPT, tmp_path / "two", "parallel")
    seed_everything(0)
    model = target.Toy()
    model.net[1].p = 0.0
    fit(model, target.Data(), target.plan(epochs=2), tmp_path / "one", echo=None)
    for rank in (0, 1):
        theirs = torch.load(tmp_path / "two" / f"weights{rank}.pt", weights_only=True)
        for name, value in model.state_dict().items():
            torch.testing.assert_close(theirs[name], value, rtol=1e-4, atol=1e-5)


def test_processes_go_on_from_the_latest_step_that_all_have(tmp_path):
    """A kill may fall between the moments at which two processes put their checkpoints in place."""

    def weights(name):
        return [torch.load(tmp_path / name / f"weights{rank}.pt", weights_only=True) for rank in (0, 1)]

    torchrun(SCRIPT, tmp_path / "whole", "parallel", 0.3)
    for step, stop in ((3, 4), (6, 7)):
        torchrun(SCRIPT, tmp_path / f"at{step}", "parallel", 0.3, stop)
    left = {  # files of both processes, and of which step they are
        "between": ({"": 6}, {"": 3, ".next": 6}),
        "before": ({"": 3, ".next": 6}, {"": 3}),
        "lost": ({"": 6}, {"": 3}),
    }
    for name, ranks in left.items():
        (tmp_path / name).mkdir()
        for rank, files in enumerate(ranks):
            own = f"checkpoint{f'.{rank}' if rank else ''}.pt"
            for end, step in files.items():
                shutil.copy(tmp_path / f"at{step}" / own, tmp_path / name / f"{own}{end}")
        if name == "lost":
            with pytest.raises(
                AssertionError, match=r"no common \(epoch, step\): \{0: \[\(0, 6\)\], 1: \[\(0, 3\)\]\}"
            ):
                torchrun(SCRIPT, tmp_path / name, "parallel", 0.3)
            continue
        torchrun(SCRIPT, tmp_path / name, "parallel", 0.3)
        for mine, theirs in zip(weights(name), weights("whole"), strict=True):
            assert all(torch.equal(value, theirs[key]) for key, value in mine.items()), name
        assert not list((tmp_path / name).glob("*.next"))


def test_epoch_batches_partition_an_epoch():
    whole = list(EpochBatches(20, 6, seed=3, epoch=1))
    assert len(whole) == 3
    assert len({i for b in whole for i in b}) == 18
    halves = [list(EpochBatches(20, 6, seed=3, epoch=1, rank=r, world=2)) for r in (0, 1)]
    assert [a + b for a, b in zip(*halves, strict=True)] == whole
    assert list(EpochBatches(20, 6, seed=3, epoch=1, first=2)) == whole[2:]
    assert list(EpochBatches(20, 6, seed=3, epoch=2)) != whole
    assert list(EpochBatches(20, 6, seed=4, epoch=1)) != whole


def test_epoch_batches_refuse():
    with pytest.raises(ValueError, match="divide"):
        EpochBatches(20, 5, seed=0, epoch=0, world=2)
    with pytest.raises(ValueError, match="lower batch_size"):
        EpochBatches(4, 5, seed=0, epoch=0)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"schedule": "constant"}, [1, 1, 1, 1, 1, 1, 1, 1]),
        ({"schedule": "step", "milestones": (1.0, 3.0)}, [1, 1, 0.1, 0.1, 0.1, 0.1, 0.01, 0.01]),
        ({"schedule": "linear", "warmup": 0.25}, [0.5, 1, 1, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6]),
        ({"schedule": "cosine", "warmup": 0.25}, [0.5, 1, 1, 0.9330127, 0.75, 0.5, 0.25, 0.0669873]),
    ],
)
def test_schedules_by_hand(options, expected):
    plan = Plan(epochs=4, batch_size=1, lr=1.0, **options)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    schedule, seen = make_schedule(optimizer, plan, 8), []
    for _ in range(8):
        seen.append(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
    assert seen == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("name", ["adamw", "adam", "sgd"])
def test_optimizers_do_not_decay_biases(name):
    groups = make_optimizer(
        list(target.Toy().parameters()), target.plan(optimizer=name, weight_decay=0.3)
    ).param_groups
    assert [(g["weight_decay"], {p.ndim for p in g["params"]}) for g in groups] == [(0.3, {2}), (0.0, {1})]


def test_accumulated_batches_give_the_gradient_of_their_mean(tmp_path):
    results = []
    for accumulate, batch in ((1, 16), (2, 8)):
        seed_everything(0)
        model = target.Toy()
        model.net[1].p = 0.0
        fit(model, target.Data(), target.plan(epochs=1, batch_size=batch, accumulate=accumulate, optimizer="sgd",
                                              warmup=0.0), tmp_path / str(accumulate), echo=None)  # fmt: skip
        results.append(model.state_dict())
    for name in results[0]:
        torch.testing.assert_close(results[0][name], results[1][name])


def test_best_epoch_by_validation_is_kept(tmp_path):
    seed_everything(0)
    model, scores, kept = target.Toy(), iter([1.0, 3.0, 2.0, 2.5]), []

    def evaluate(m):
        kept.append({k: v.clone() for k, v in m.state_dict().items()})
        return {"rsum": next(scores)}

    summary = fit(model, target.Data(), target.plan(), tmp_path, evaluate=evaluate, echo=None)
    assert summary["best_epoch"] == 2
    for name, value in model.state_dict().items():
        assert torch.equal(value, kept[1][name])


def test_frozen_parameters_stay(tmp_path):
    seed_everything(0)
    model = target.Toy()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    fit(
        model,
        target.Data(),
        target.plan(epochs=1),
        tmp_path,
        trainable=lambda n: n.startswith("net.2"),
        echo=None,
    )
    after = model.state_dict()
    assert torch.equal(after["net.0.weight"], before["net.0.weight"])
    assert not torch.equal(after["net.2.weight"], before["net.2.weight"])
    assert all(p.requires_grad for p in model.parameters())
    with pytest.raises(TrainingError, match="no parameter"):
        fit(
            model,
            target.Data(),
            target.plan(epochs=1),
            tmp_path / "none",
            trainable=lambda n: False,
            echo=None,
        )


def test_nan_stops_and_names_step_and_terms(tmp_path):
    data = target.Data()
    data.y[5] = float("nan")
    with pytest.raises(TrainingError, match=r"epoch 1, step \d+ of 8.*'error': nan"):
        fit(target.Toy(), data, target.plan(), tmp_path, echo=None)


def test_another_plan_or_model_is_refused(tmp_path):
    fit(target.Toy(), target.Data(), target.plan(epochs=1), tmp_path, echo=None)
    with pytest.raises(TrainingError, match=r"another plan.*'lr': \(0.01, 0.5\)"):
        fit(target.Toy(), target.Data(), target.plan(epochs=1, lr=0.5), tmp_path, echo=None)
    other = target.Toy()
    other.net = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Dropout(0.3), torch.nn.Linear(16, 4))
    with pytest.raises(TrainingError, match="another model"):
        fit(other, target.Data(), target.plan(epochs=1), tmp_path, echo=None)


def test_missing_selection_metric_is_named(tmp_path):
    with pytest.raises(TrainingError, match="rsum"):
        fit(
            target.Toy(),
            target.Data(),
            target.plan(epochs=1),
            tmp_path,
            evaluate=lambda m: {"r1": 1.0},
            echo=None,
        )


def test_broken_checkpoint_is_named(tmp_path):
    (tmp_path / "checkpoint.pt").write_bytes(b"not a checkpoint")
    with pytest.raises(TrainingError, match=r"checkpoint\.pt cannot be read"):
        fit(target.Toy(), target.Data(), target.plan(), tmp_path, echo=None)


def test_unwritable_out_fails_before_training(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(TrainingError, match="cannot hold this run"):
        fit(target.Toy(), target.Data(), target.plan(), tmp_path / "file" / "out", echo=None)


def test_full_disk_fails_before_training(tmp_path):
    """The kernel's file size limit stands in for a full disk: the same write, the same OSError."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    previous = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, hard))
        check_writable(tmp_path / "small", room=500_000)
        with pytest.raises(TrainingError, match=r"cannot hold this run \(2.0 MB\)"):
            check_writable(tmp_path / "large", room=2_000_000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, previous)
    assert not list(tmp_path.rglob(".probe"))


@pytest.mark.parametrize(
    "bad",
    [
        {"epochs": 0},
        {"lr": float("nan")},
        {"lr": -1.0},
        {"optimizer": "lion"},
        {"schedule": "exp"},
        {"warmup": 1.0},
    ],
)
def test_plan_refuses(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        target.plan(**bad)


def test_unique_state_keeps_shared_tensors_once():
    model = torch.nn.ModuleDict({"a": torch.nn.Linear(2, 2), "b": torch.nn.Linear(2, 2)})
    model["b"].weight = model["a"].weight
    assert set(unique_state(model)) == {"a.weight", "a.bias", "b.bias"}


# ------------------------------------------------------------------------------------------- stop and rerun
class Stops(target.Data):
    """The target's data, which raise what Ctrl-C raises before batch `at`."""

    def __init__(self, at):
        super().__init__()
        self.left = at

    def __getitems__(self, index):
        self.left -= 1
        if self.left < 0:
            raise KeyboardInterrupt
        return super().__getitems__(index)


def in_two_stages(model, data, folder):
    """As a notebook's training cell: the last layer alone, then all; what remains of the random state counts too."""
    options = {"echo": None, "evaluate": lambda m: {"rsum": float(m.net[0].weight.detach().sum())}}
    fit(model, data, target.plan(epochs=2, accumulate=2), folder / "stage1",
        trainable=lambda name: name.startswith("net.2"), **options)  # fmt: skip
    second = fit(model, data, target.plan(epochs=2), folder / "stage2", **options)
    return target.digest(model), [line["loss"] for line in second["history"]], float(torch.rand(()))


@pytest.mark.parametrize("at", [0, 1, 5, 9, 15, 16, 17, 20, 31])
def test_a_cell_that_is_stopped_and_run_again_gives_what_an_unbroken_one_gives(tmp_path, at):
    """Same model, same process; 16 batches of two epochs a stage. At odd batches a gradient is left half summed."""
    seed_everything(0)
    whole = in_two_stages(target.Toy(), target.Data(), tmp_path / "whole")
    seed_everything(0)
    model = target.Toy()
    with pytest.raises(KeyboardInterrupt):
        in_two_stages(model, Stops(at), tmp_path / "stopped")
    assert all(p.requires_grad for p in model.parameters())
    assert in_two_stages(model, target.Data(), tmp_path / "stopped") == whole


# ------------------------------------------------------------------------------------------- identity
def test_a_checkpoint_of_another_identity_is_refused_with_two_ways_on(tmp_path):
    options = {"echo": None, "identity": "a" * 64}
    fit(target.Toy(), target.Data(), target.plan(epochs=1), tmp_path, **options)
    before = (tmp_path / "checkpoint.pt").read_bytes()
    for other in ("b" * 64, ""):
        with pytest.raises(TrainingError, match=r"another run.*aaaaaaaa.*another `out`.*resume='fresh'"):
            fit(target.Toy(), target.Data(), target.plan(epochs=1), tmp_path, echo=None, identity=other)
    assert (tmp_path / "checkpoint.pt").read_bytes() == before
    fit(target.Toy(), target.Data(), target.plan(epochs=1), tmp_path, **options)


def test_a_run_that_never_took_a_step_is_in_nobodys_way(tmp_path):
    for name, batches in (("first", 0), ("other", 100)):
        seed_everything(0)
        model = target.Toy()
        stopped = pytest.raises(KeyboardInterrupt) if not batches else contextlib.nullcontext()
        with stopped:
            fit(model, Stops(batches), target.plan(epochs=1), tmp_path, echo=None, identity=name)
    seed_everything(0)
    fresh = target.Toy()
    fit(fresh, target.Data(), target.plan(epochs=1), tmp_path / "fresh", echo=None)
    assert target.digest(model) == target.digest(fresh)


# ------------------------------------------------------------------------------------------- damage
def same(a, b):
    """Equality of nested dicts and lists of tensors and values."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


@pytest.mark.parametrize("name", ["checkpoint.pt", "best.safetensors"])
def test_a_flipped_byte_is_refused_or_changes_nothing(tmp_path, name):
    """40 places spread over the file, and 40 in its last kilobyte, where a zip keeps its directory."""
    fit(target.Toy(), target.Data(), target.plan(epochs=1), tmp_path, echo=None)
    file = tmp_path / name
    read = read_checkpoint if name.endswith(".pt") else lambda path: read_weights(path)[0]
    whole, content = file.read_bytes(), read(file)
    places = {len(whole) * k // 40 for k in range(40)} | {len(whole) - 1 - 25 * k for k in range(40)}
    refused = 0
    for place in places:
        file.write_bytes(whole[:place] + bytes([whole[place] ^ 0x10]) + whole[place + 1 :])
        try:
            assert same(read(file), content), f"byte {place} of {len(whole)} was taken"
        except TrainingError:
            refused += 1
    assert refused > len(places) / 3
    file.write_bytes(whole[:-100])
    with pytest.raises(TrainingError, match="cannot be read"):
        read(file)


def test_weights_carry_their_digest_and_files_without_one_still_open(tmp_path):
    model, other = target.Toy(), target.Toy()
    save_weights(model, tmp_path / "new.safetensors")
    save_file(unique_state(model), tmp_path / "old.safetensors")
    digests = {load_best(other, tmp_path / f"{age}.safetensors") for age in ("new", "old")}
    assert digests == {state_digest(model.state_dict())}
    assert target.digest(model) == target.digest(other)
    assert state_digest({"a": torch.zeros(2)}) != state_digest({"a": torch.zeros(2, 1)})
    assert state_digest({"a": torch.zeros(2)}) != state_digest({"b": torch.zeros(2)})


def test_a_disk_that_fills_up_keeps_the_old_checkpoint(tmp_path):
    seed_everything(0)
    fit(target.Toy(), target.Data(), target.plan(epochs=1), tmp_path, echo=None)
    old = {name: (tmp_path / name).read_bytes() for name in ("checkpoint.pt", "best.safetensors")}
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    previous = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (500, hard))
        with pytest.raises(DataError, match=r"best\.safetensors: the file: cannot be written"):
            save_weights(target.Toy(), tmp_path / "best.safetensors")
        with pytest.raises(TrainingError, match="cannot hold this run"):
            fit(target.Toy(), target.Data(), target.plan(epochs=1), tmp_path, echo=None)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, previous)
    assert {name: (tmp_path / name).read_bytes() for name in old} == old
    assert not list(tmp_path.glob("*.part"))


# ------------------------------------------------------------------------------------------- two runs, one folder
def test_a_second_process_is_told_who_trains_there(tmp_path):
    first = subprocess.Popen(
        [sys.executable, str(SCRIPT), str(tmp_path), "3"], stdout=subprocess.PIPE, text=True
    )
    assert first.stdout.readline() == "batch\n"
    with pytest.raises(Busy, match=f"another run is at work in .*pid {first.pid}.*since") as told:
        fit(target.Toy(), target.Data(), target.plan(), tmp_path, echo=None)
    assert "another `out`" in str(told.value)
    first.kill()
    first.wait()
    with hold(tmp_path):  # a killed process holds nothing
        pass


def test_of_two_that_start_together_one_goes_on(tmp_path):
    jobs = [subprocess.Popen([sys.executable, str(SCRIPT), str(tmp_path), "0.2"], stdout=subprocess.PIPE,
                             stderr=subprocess.PIPE, text=True) for _ in range(2)]  # fmt: skip
    ended = [(job, *job.communicate()) for job in jobs]
    assert sorted(job.returncode for job, _, _ in ended) == [0, 1]
    assert sum("another run is at work" in error for _, _, error in ended) == 1


def test_a_process_may_take_its_folder_twice_and_lets_go_with_the_last(tmp_path, monkeypatch):
    ask = [sys.executable, "-c", f"from finematch.hold import hold; hold({str(tmp_path)!r}).take()"]
    outer = hold(tmp_path).take()
    with hold(tmp_path):
        pass
    assert subprocess.run(ask, capture_output=True).returncode == 1
    outer.release()
    outer.release()
    assert subprocess.run(ask, capture_output=True).returncode == 0
    monkeypatch.setenv("RANK", "1")  # the other processes of torchrun take nothing
    with hold(tmp_path):
        assert subprocess.run(ask, env={**os.environ, "RANK": "0"}).returncode == 0


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's allocator")
def test_freed_memory_is_kept_and_no_number_changes():
    """Twice the same tensors: with the allocator told, the second time faults (almost) no page in again."""
    code = """
import resource, sys, torch
from finematch.training import keep_freed_memory
if sys.argv[1] == "kept" and not keep_freed_memory():
    print("other"), sys.exit()
def work():
    torch.manual_seed(0)
    # 64 MiB each: up to 32 MiB glibc learns by itself to keep a block
    return sum((torch.randn(2**24) * n).sum().item() for n in range(4))
work(), work()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
total = work()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before, total)
"""
    kept, given = (
        subprocess.run(
            [sys.executable, "-c", code, way], check=True, capture_output=True, text=True
        ).stdout.split()
        for way in ("kept", "given back")
    )
    if kept == ["other"]:
        pytest.skip("another C library than glibc")
    assert int(kept[0]) < int(given[0]) / 4
    assert kept[1] == given[1]
