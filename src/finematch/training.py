"""One training loop for all methods, on accelerate: a CPU, a GPU or many processes, the same code.

A model's `forward(batch)` returns named loss terms, `loss` among them; a dataset's `__getitems__(index)` returns a
batch. `fit` optimises `loss`, and a run that is killed at any moment and started again ends as if it had never
stopped: bit for bit on a CPU.
"""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import json
import math
import os
import random
import re
import resource
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from accelerate import Accelerator, DistributedDataParallelKwargs, PartialState
from torch import nn
from torch.utils.data import DataLoader, Sampler

from finematch.checkpoints import (
    Checkpoint,
    TrainingError,
    check_writable,
    load_best,
    room_for,
    save_weights,
)
from finematch.files import write_text
from finematch.hold import hold
from finematch.losses import world


@dataclass(frozen=True)
class Plan:
    """How to train. `batch_size` is the whole batch, of all processes together.

    Args:
        schedule: `cosine` or `linear` (to zero), `step` (x 0.1 at each of `milestones`, in epochs) or `constant`; each
            after a linear `warmup`, a fraction of all steps.
        clip_norm: largest gradient norm, 0 for none.
        accumulate: batches per optimiser step. A contrastive batch is still one batch: accumulation does
            not add negatives.
        precision: `no` (fp32), `bf16`, `fp16` (accelerate's names); `auto` becomes the device's, see `precision_on`.
        workers: processes that read the data, beside each that trains; 0 reads where it trains.
        checkpoint_steps: a checkpoint at least every so many batches, besides one per epoch; 0: per epoch.
    """

    epochs: int
    batch_size: int
    lr: float
    optimizer: str = "adamw"
    weight_decay: float = 0.01
    momentum: float = 0.9
    schedule: str = "cosine"
    warmup: float = 0.0
    milestones: tuple[float | int, ...] = ()
    clip_norm: float = 0.0
    accumulate: int = 1
    precision: str = "no"
    seed: int = 0
    workers: int = 0
    checkpoint_steps: int = 0

    def __post_init__(self):
        for name in ("epochs", "batch_size", "accumulate"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} = {getattr(self, name)}: must be at least 1")
        for name in ("workers", "checkpoint_steps"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} = {getattr(self, name)}: must not be negative")
        if not (math.isfinite(self.lr) and self.lr > 0):
            raise ValueError(f"lr = {self.lr}: must be positive")
        if self.optimizer not in ("adamw", "adam", "sgd"):
            raise ValueError(f"optimizer is {self.optimizer!r}; use 'adamw', 'adam' or 'sgd'")
        if self.schedule not in ("cosine", "linear", "step", "constant"):
            raise ValueError(f"schedule is {self.schedule!r}; use 'cosine', 'linear', 'step' or 'constant'")
        if not 0 <= self.warmup < 1:
            raise ValueError(f"warmup = {self.warmup}: a fraction of all steps, in [0, 1)")
        object.__setattr__(self, "precision", precision_on(accelerator(), self.precision))


class EpochBatches(Sampler[list[int]]):
    """The batches of one epoch, this process's share of each, from batch `first` on.

    The order depends on the seed and the epoch alone, so that it can be entered anywhere. The last,
    incomplete batch is dropped: a contrastive loss on a smaller batch is another loss.
    """

    def __init__(
        self, n: int, batch: int, *, seed: int, epoch: int, first: int = 0, rank: int = 0, world: int = 1
    ):
        if batch % world:
            raise ValueError(f"a batch of {batch} does not divide among {world} processes")
        if n < batch:
            raise ValueError(f"{n} training pairs are fewer than one batch of {batch}: lower batch_size")
        self.n, self.batch, self.seed, self.epoch = n, batch, seed, epoch
        self.first, self.rank, self.share = first, rank, batch // world

    def __len__(self) -> int:
        return self.n // self.batch - self.first

    def __iter__(self) -> Iterator[list[int]]:
        generator = torch.Generator().manual_seed(self.seed * 100_003 + self.epoch)
        order = torch.randperm(self.n, generator=generator)
        for step in range(self.first, self.n // self.batch):
            start = step * self.batch + self.rank * self.share
            yield order[start : start + self.share].tolist()


class Rounds:
    """Training data in rounds of so many steps, for a budget that is no whole number of epochs.

    What `fit` calls an epoch is then a round. The batches are those of `EpochBatches`, one epoch after another, so that
    the order of a run is that of any other run of its seed and batch.
    """

    def __init__(self, data, steps: int):
        self.data, self.n = data, steps

    def steps(self, batch_size: int, world: int) -> int:
        return self.n

    def batches(
        self,
        size: int,
        *,
        seed: int,
        epoch: int,
        first: int,
        rank: int,
        world: int,
        workers: int,
        pin_memory: bool,
    ) -> DataLoader:
        """The rest of a round (`epoch`), from its step `first` on."""
        left, at, chosen = self.n - first, self.n * epoch + first, []
        while left > len(chosen):
            number, step = divmod(at + len(chosen), len(self.data) // size)
            rest = {"epoch": number, "first": step, "rank": rank, "world": world}
            of_epoch = EpochBatches(len(self.data), size, seed=seed, **rest)
            chosen += itertools.islice(of_epoch, left - len(chosen))
        return DataLoader(self.data, batch_sampler=chosen, num_workers=workers, collate_fn=whole,
                          generator=torch.Generator(), pin_memory=pin_memory)  # fmt: skip


def seed_everything(seed: int) -> None:
    """Seed Python, NumPy and torch. Call before the model is built, so that its start depends on the seed."""
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002 (libraries below us draw from it)
    torch.manual_seed(seed)


# ------------------------------------------------------------------------------------------- processes
def join_processes() -> int:
    """Under torchrun, meet the other processes and take this one's GPU; how many there are, 1 without.

    Call it before anything asks how many there are. A notebook runs in several processes, each with a kernel and an
    executed page of its own, as

        torchrun --nproc-per-node 8 --no-python bash -c 'papermill 2_train.ipynb run.$RANK.ipynb -p ...'
    """
    own_environment()
    if "RANK" in os.environ:
        PartialState(cpu=not torch.accelerator.is_available())
    return world()


TORCHRUN = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")  # it sets all of them
STRAY = re.compile(r"ACCELERATE_\w+")  # settings that accelerate reads, such as another project's precision
STRAY_RANK = re.compile(r"(LOCAL_)?RANK|(LOCAL_)?WORLD_SIZE|(PMI|MV2_COMM_WORLD|OMPI_COMM_WORLD)_\w+")


def own_environment() -> None:
    """Drop what another program has left in the environment and accelerate would follow: its settings, which would
    silently give other weights, and the rank of a process where torchrun has started none.

    Warns:
        UserWarning: With the names that were dropped.
    """
    alone = not all(name in os.environ for name in TORCHRUN)
    strays = [n for n in os.environ if STRAY.fullmatch(n) or (alone and STRAY_RANK.fullmatch(n))]
    if strays:
        dropped = ", ".join(f"{name}={os.environ.pop(name)}" for name in sorted(strays))
        warnings.warn(f"set by another program and ignored: {dropped}", stacklevel=3)


def by_one_process(what: str) -> None:
    """Refuse to make in several processes what runs share: while one holds the lock, `fit` would wait for the others.

    Raises:
        TrainingError: Under torchrun, with more than one process.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise TrainingError(
            f"{what} is made once, by one process, and is not in the cache: first run this page, or 1_data, without "
            "torchrun and with the same `cache`"
        )


def leave_to_first() -> None:
    """Training is over: the first process goes on alone, the others of torchrun end here.

    Raises:
        SystemExit: In all but the first (status 0, which papermill takes as a page that has ended well).
    """
    if not (dist.is_available() and dist.is_initialized()):
        return
    first = dist.get_rank() == 0
    dist.barrier()
    dist.destroy_process_group()
    if not first:
        raise SystemExit(0)


# ------------------------------------------------------------------------------------------- the loop
def fit(
    model: nn.Module,
    data,
    plan: Plan,
    out: str | Path,
    *,
    identity: str = "",
    evaluate: Callable[[nn.Module], dict[str, float]] | None = None,
    select: str = "rsum",
    trainable: Callable[[str], bool] | None = None,
    echo: Callable[[str], None] | None = print,
    tracker: str = "",
) -> dict:
    """Train `model` in place, or take up where a killed run stopped; leave it at its best epoch.

    Weights and random states are kept before the first step too, so that a call that was stopped (Ctrl-C, JupyterLab's
    stop) and is made again, with the same model in the same process, gives what an unbroken one gives.

    Args:
        data: has `len()` and `__getitems__(index) -> batch` (nested dicts of tensors); or, where it is read in an
            order of its own, `steps(batch_size, world)` and `batches(...)` (`data.shards.ShardPairs`).
        out: folder for `checkpoint.pt`, `best.safetensors` and `log.jsonl` (a line an epoch).
        identity: digest of what the run's numbers depend on besides `plan`; a checkpoint of another one is refused.
        evaluate: gives validation metrics after each epoch (main process only, in eval mode, no gradient).
            The weights of the epoch with the largest `select` are kept; without it, the last epoch's.
        trainable: names of the parameters to train; the others are frozen for this call.
        echo: receives one line an epoch.
        tracker: a tracker that accelerate knows (tensorboard, wandb, mlflow ...), see `tracking`; changes no number.

    Returns:
        `{"history": [...], "best_epoch", "steps", "seconds", "cpu_seconds", "peak_memory_bytes", "device"}`; seconds
        include those before an interruption. `cpu_seconds` are this process's own, of the steps alone: neither
        evaluation nor checkpoints nor other work on the machine count.

    Raises:
        TrainingError: For an unwritable or full `out`, a checkpoint that is damaged or of another identity, plan or
            model, a loss that is not finite (the step and the terms are named), a `select` that `evaluate` does not
            return.
        Busy: If another process trains in `out`.
    """
    out, accelerator = Path(out), open_accelerator(plan, tracker, out)
    main = accelerator.is_main_process
    if main:
        check_writable(out, room=room_for(model, out))
    with hold(out) if main else contextlib.nullcontext(), training_only(model, trainable):
        accelerator.wait_for_everyone()
        loop = Loop(model, data, plan, accelerator, Checkpoint(
            out / f"checkpoint{f'.{accelerator.process_index}' if not main else ''}.pt", plan, accelerator,
            identity=identity))  # fmt: skip
        loop.begin()
        at = loop.at
        if main:
            rewrite_log(out / "log.jsonl", at["history"])
        config = {"run": f"{out.parent.name}/{out.name}", **asdict(plan)}
        with tracking(accelerator, config, first=loop.count + 1, last=loop.steps * plan.epochs):
            for epoch in range(at["epoch"], plan.epochs):
                line = loop.epoch(epoch)
                if evaluate is not None and main:
                    known = set(line)
                    line = validate(model, evaluate, select, line)
                    loop.track("val", {name: value for name, value in line.items() if name not in known})
                score = line.get(select) if evaluate is not None else float(epoch)
                if main and (at["best"] is None or score > at["best"][0]):
                    at["best"] = [score, epoch + 1]
                    save_weights(model, out / "best.safetensors")
                loop.close_epoch(epoch, line)
                if main:
                    rewrite_log(out / "log.jsonl", at["history"])
                    if echo:
                        echo(describe(line, plan.epochs))
                accelerator.wait_for_everyone()
        accelerator.wait_for_everyone()
        load_best(model, out / "best.safetensors")
    model.to(accelerator.device).eval()
    return {
        "history": at["history"],
        "best_epoch": at["best"][1] if at["best"] else plan.epochs,
        "steps": loop.steps * plan.epochs,
        "seconds": at["seconds"],
        "cpu_seconds": at["cpu_seconds"],
        "peak_memory_bytes": peak_memory(),
        "device": device_name(),
    }


def open_accelerator(plan: Plan, tracker: str = "", out: Path | None = None) -> Accelerator:
    """The processes and devices to train on, in which precision, and with which tracker, whose files go to `out`.

    Raises:
        TrainingError: The tracker's package is not installed (accelerate would go on without a word).
        ValueError: accelerate knows no such tracker.
    """
    own_environment()
    accelerator = Accelerator(
        # told outright: without `cpu`, accelerate under torchrun on a machine without GPUs runs N lone processes
        cpu=not torch.accelerator.is_available(),
        mixed_precision=plan.precision,
        step_scheduler_with_optimizer=False,
        # a switch may leave parts of a model without use; processes would wait for their gradients for ever
        kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=True)],
        log_with=tracker or None,
        project_dir=out,
    )
    if tracker and not accelerator.log_with:
        raise TrainingError(
            f"tracker={tracker}: the package {tracker} is not installed. Install it (pip install {tracker}), or leave "
            "tracker empty"
        )
    return accelerator


@contextlib.contextmanager
def tracking(accelerator: Accelerator, config: dict, *, first: int, last: int) -> Iterator[None]:
    """Open the accelerator's tracker, if it has one and a step is left, and close it however the training ends.

    A run that goes on does so at its own step, the `first` of this session. TensorBoard drops what was logged from
    there on before the run was killed; other trackers show the session as a run of its own.
    """
    if accelerator.log_with and first <= last:
        plain = {name: str(value) if isinstance(value, tuple) else value for name, value in config.items()}
        accelerator.init_trackers("finematch", plain, {"tensorboard": {"purge_step": first}})
    try:
        yield
    finally:
        for one in accelerator.trackers:  # `end_training` would end the process group as well
            one.finish()


@contextlib.contextmanager
def training_only(model: nn.Module, trainable: Callable[[str], bool] | None) -> Iterator[None]:
    """Freeze all parameters but those that `trainable` names, and drop gradients that a stopped call has left.

    Raises:
        TrainingError: If no parameter is left to train.
    """
    frozen = [p for n, p in model.named_parameters() if trainable and not trainable(n) and p.requires_grad]
    model.zero_grad(set_to_none=True)
    try:
        for p in frozen:
            p.requires_grad_(False)
        if not any(p.requires_grad for p in model.parameters()):
            raise TrainingError("no parameter is left to train: check `trainable`")
        yield
    finally:
        for p in frozen:
            p.requires_grad_(True)


def validate(model: nn.Module, evaluate: Callable, select: str, line: dict) -> dict:
    """An epoch's line of the log with the metrics of the model in eval mode.

    Raises:
        TrainingError: If `select` is not in it.
    """
    model.eval()
    with torch.no_grad():
        line |= evaluate(model)
    if select not in line:
        raise TrainingError(
            f"`evaluate` returned {sorted(line)}, not {select!r}, by which to choose the epoch"
        )
    return line


class Loop:
    """The parts of one `fit`, and the place where it is: `at` holds epoch, step and what was summed up so far."""

    def __init__(self, model: nn.Module, data, plan: Plan, accelerator: Accelerator,
                 checkpoint: Checkpoint | None):  # fmt: skip
        self.plain, self.data, self.plan = model, data, plan
        self.threads: dict[str, int] = {}  # for the log, where they are not those that the run began with
        self.accelerator, self.checkpoint = accelerator, checkpoint
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        optimizer = make_optimizer(self.parameters, plan)
        self.streamed = hasattr(data, "batches")  # shards: read in an order of their own
        world = accelerator.num_processes
        self.steps = (
            data.steps(plan.batch_size, world)
            if self.streamed
            else len(EpochBatches(len(data), plan.batch_size, seed=0, epoch=0, world=world))
        )
        updates = math.ceil(self.steps / plan.accumulate) * plan.epochs
        self.scheduler = make_schedule(optimizer, plan, updates)
        self.model, self.optimizer = accelerator.prepare(model, optimizer)

    def begin(self) -> None:
        """Restore the latest checkpoint; without one, keep the weights and random states of before the first step."""
        at = self.checkpoint.load(self.plain, self.optimizer, self.scheduler)
        self.at = at or {"epoch": 0, "step": 0, "sums": {}, "best": None, "history": [], "seconds": 0.0}
        self.at.setdefault("cpu_seconds", 0.0)
        here = torch.get_num_threads()
        if self.accelerator.device.type == "cpu" and self.at.setdefault("threads", here) != here:
            self.threads = {"threads": here}
            warnings.warn(
                f"this run began with {self.at['threads']} threads and goes on with {here}: sums are made in another "
                "order, so the last bits are not those of an unbroken run. log.jsonl says from which epoch on",
                stacklevel=3,
            )
        self.started = time.monotonic() - self.at["seconds"]
        if at is None:
            self.save()

    @property
    def count(self) -> int:
        """Batches of the run so far."""
        return self.at["epoch"] * self.steps + self.at["step"]

    def track(self, part: str, values: dict) -> None:
        """Hand numbers to the tracker, as `train/loss` or `val/rsum` of this step."""
        if self.accelerator.trackers:
            numbers = {f"{part}/{k}": v for k, v in values.items() if isinstance(v, (int, float))}
            self.accelerator.log(numbers, step=self.count)

    def save(self) -> None:
        """Write a checkpoint of this place."""
        self.checkpoint.save(self.plain, self.optimizer, self.scheduler, self.at)

    def loader(self, epoch: int):
        """The rest of an epoch's batches, this process's share of each."""
        rank, world = self.accelerator.process_index, self.accelerator.num_processes
        place = {
            "seed": self.plan.seed,
            "epoch": epoch,
            "first": self.at["step"],
            "rank": rank,
            "world": world,
        }
        # data that live on the GPU already cannot be pinned
        on_cpu = getattr(self.data, "device", torch.device("cpu")).type == "cpu"
        pinned = self.accelerator.device.type == "cuda" and on_cpu
        size, workers = self.plan.batch_size, self.plan.workers
        if self.streamed:
            return self.data.batches(size, **place, workers=workers, pin_memory=pinned)
        # a generator of its own: a loader must not draw from the random state that the model uses
        return DataLoader(self.data, batch_sampler=EpochBatches(len(self.data), size, **place), num_workers=workers,
                          collate_fn=whole, generator=torch.Generator(), pin_memory=pinned)  # fmt: skip

    def epoch(self, epoch: int) -> dict:
        """Train the rest of an epoch; its line of the log: the mean of each loss term."""
        plan, at, clock = self.plan, self.at, time.process_time()
        self.model.train()
        for step, batch in enumerate(self.loader(epoch), start=at["step"]):
            # the last batches of an epoch close their accumulation group even if it is incomplete
            update = (step + 1) % plan.accumulate == 0 or step + 1 == self.steps
            values = self.step(batch, update, f"epoch {epoch + 1}, step {step + 1} of {self.steps}")
            for name, value in values.items():
                at["sums"][name] = at["sums"].get(name, 0.0) + value
            at["step"] = step + 1
            self.track("train", values)
            due = plan.checkpoint_steps and at["step"] % plan.checkpoint_steps == 0
            if due and update and at["step"] < self.steps:
                at["seconds"] = time.monotonic() - self.started
                at["cpu_seconds"] += time.process_time() - clock
                self.save()
                clock = time.process_time()
        at["cpu_seconds"] += time.process_time() - clock
        line = {
            "epoch": epoch + 1,
            "steps": self.steps,
            "lr": self.scheduler.get_last_lr()[0],
            **self.threads,
        }
        return line | {name: total / self.steps for name, total in at["sums"].items()}

    def step(self, batch, update: bool, where: str) -> dict[str, float]:
        """Forward and backward of one batch, and the optimiser's step where `update` says so; the loss terms.

        Raises:
            TrainingError: If a term is not finite.
        """
        plan, accelerator = self.plan, self.accelerator
        with contextlib.nullcontext() if update else accelerator.no_sync(self.model):
            terms = self.model(to_device(batch, accelerator.device))
            values = {k: float(v.detach()) for k, v in terms.items()}
            if not all(math.isfinite(v) for v in values.values()):
                raise TrainingError(
                    f"{where}: the loss is not finite ({values}). Lower lr or raise warmup; in fp16, try bf16"
                )
            accelerator.backward(terms["loss"] / plan.accumulate)
        if update:
            if plan.clip_norm:
                accelerator.clip_grad_norm_(self.parameters, plan.clip_norm)
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
            self.scheduler.step()
        return values

    def close_epoch(self, epoch: int, line: dict) -> None:
        """Add `line` to the history and write a checkpoint of the next epoch's beginning."""
        line["seconds"] = round(time.monotonic() - self.started, 3)
        self.at |= {"epoch": epoch + 1, "step": 0, "sums": {}, "history": [*self.at["history"], line],
                    "seconds": line["seconds"]}  # fmt: skip
        self.save()


def whole(batch: dict) -> dict:
    """Collation: `__getitems__` already returned a batch."""
    return batch


def to_device(batch, device: torch.device):
    """Nested dicts of tensors, moved."""
    if isinstance(batch, dict):
        return {k: to_device(v, device) for k, v in batch.items()}
    return batch.to(device, non_blocking=True)


def make_optimizer(parameters: list[nn.Parameter], plan: Plan) -> torch.optim.Optimizer:
    """AdamW, Adam or SGD; biases, norms, codes of one axis and scalars are not decayed."""
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": plan.weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
    groups = [g for g in groups if g["params"]]
    if plan.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=plan.lr, momentum=plan.momentum, fused=True)
    # fused: one pass over the memory; about 5 times faster on a vocabulary of 30,000 words than a loop of operators
    return {"adamw": torch.optim.AdamW, "adam": torch.optim.Adam}[plan.optimizer](
        groups, lr=plan.lr, fused=True
    )


def make_schedule(optimizer, plan: Plan, steps: int) -> torch.optim.lr_scheduler.LambdaLR:
    """The factor on `lr` at each optimiser step: linear warm-up, then the plan's schedule."""
    warm = int(plan.warmup * steps)
    per_epoch = steps / plan.epochs

    def factor(step: int) -> float:
        if step < warm:
            return (step + 1) / warm
        if plan.schedule == "cosine":
            return 0.5 * (1 + math.cos(math.pi * min(1.0, (step - warm) / max(1, steps - warm))))
        if plan.schedule == "linear":
            return 1 - min(1.0, (step - warm) / max(1, steps - warm))
        if plan.schedule == "step":
            return 0.1 ** sum(step >= m * per_epoch for m in plan.milestones)
        return 1.0

    return torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


def rewrite_log(path: Path, history: list[dict]) -> None:
    """`log.jsonl`, a line an epoch, exactly the epochs that count (a killed run's surplus is dropped)."""
    write_text(path, "".join(json.dumps(line) + "\n" for line in history))


def describe(line: dict, epochs: int) -> str:
    """One printed line an epoch."""
    numbers = (f"{k} {v:.4g}" for k, v in line.items()
               if isinstance(v, (int, float)) and k not in ("epoch", "steps"))  # fmt: skip
    return f"epoch {line['epoch']}/{epochs}  " + "  ".join(numbers)


def accelerator() -> torch.device:
    """The GPU where there is one, else the CPU, whose freed memory is then kept (`keep_freed_memory`)."""
    if torch.accelerator.is_available():
        return torch.accelerator.current_accelerator()
    keep_freed_memory()
    return torch.device("cpu")


@cache
def keep_freed_memory() -> bool:
    """Keep the memory of freed tensors for the next ones, where the C library is glibc; whether it is.

    By default glibc gives every large block back to the system at once, and the next step pays for each of its pages
    again: up to half of the CPU time (`benchmarks/allocator.json`). No number changes; the peak of memory may grow.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # macOS, Windows, musl
        return False
    trim, top_pad, mmaps = -1, -2, -4  # malloc.h: M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX
    return all([mallopt(mmaps, 0), mallopt(trim, 2**31 - 1), mallopt(top_pad, 2**26)])


def precision_on(device: torch.device, wanted: str = "auto") -> str:
    """What `auto` is on a device: `bf16` on a GPU that computes it, else `no` (fp32). Any other precision stays.

    Warns:
        UserWarning: bf16 is asked for on a CPU without instructions for it; the message has the factor.
    """
    if wanted == "auto":
        capable = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        return "bf16" if capable else "no"
    if wanted == "bf16" and device.type == "cpu" and (factor := bf16_slowdown()) > 2:
        warnings.warn(
            f"precision=bf16: this CPU lacks instructions for it, a matrix product takes {factor:.0f} times as long as "
            "in fp32 (measured just now). Leave precision at auto, or set it to no",
            stacklevel=2,
        )
    return wanted


@cache
def bf16_slowdown(size: int = 256) -> float:
    """How many times as long a matrix product on this CPU takes in bf16 as in fp32: the best of five of each.

    Measured, for the instructions (AVX512-BF16, AMX, those of ARM) have another name, and another place where they are
    listed, on each platform.
    """
    best = {}
    for dtype in (torch.float32, torch.bfloat16):
        a, seconds = torch.ones(size, size, dtype=dtype), []
        for _ in range(6):
            started = time.perf_counter()
            torch.mm(a, a)
            seconds.append(time.perf_counter() - started)
        best[dtype] = min(seconds[1:])
    return best[torch.bfloat16] / best[torch.float32]


def device_name() -> str:
    """The GPU's name, or the processor's."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    if sys.platform == "linux":
        for entry in Path("/proc/cpuinfo").read_text().splitlines():
            if entry.startswith("model name"):
                return f"{entry.split(':', 1)[1].strip()}, {torch.get_num_threads()} threads"
    import platform

    return f"{platform.machine()}, {torch.get_num_threads()} threads"


def peak_memory() -> int:
    """Peak bytes so far: of the GPU where there is one, else of this process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    status = Path("/proc/self/status")
    if (
        status.exists()
    ):  # ru_maxrss of a child process starts at its parent's peak; the high-water mark does not
        kilobytes = next(
            line for line in status.read_text().splitlines() if line.startswith("VmHWM")
        ).split()[1]
        return int(kilobytes) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
