"""One training loop for all methods, on accelerate: a CPU, a GPU or many processes, the same code.

A model's `forward(batch)` returns named loss terms, `loss` among them; a dataset's `__getitems__(index)` returns a
batch. `fit` optimises `loss`, and a run that is killed at any moment and started again ends as if it had never
stopped: bit for bit on a CPU.
"""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
import random
import resource
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from accelerate import Accelerator, DistributedDataParallelKwargs, PartialState
from accelerate.utils import gather_object
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils.data import DataLoader, Sampler

from finematch import files


class TrainingError(RuntimeError):
    """The run cannot go on; the message says at which step, why, and what to do."""


@dataclass(frozen=True)
class Plan:
    """How to train. `batch_size` is the whole batch, of all processes together.

    Args:
        schedule: `cosine` or `linear` (to zero), `step` (x 0.1 at each of `milestones`, in epochs) or `constant`; each
            after a linear `warmup`, a fraction of all steps.
        clip_norm: largest gradient norm, 0 for none.
        accumulate: batches per optimiser step. A contrastive batch is still one batch: accumulation does
            not add negatives.
        precision: `no`, `bf16`, `fp16` (accelerate's names).
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
    milestones: tuple[float, ...] = ()
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
    if "RANK" in os.environ:
        PartialState(cpu=not torch.accelerator.is_available())
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


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
    evaluate: Callable[[nn.Module], dict[str, float]] | None = None,
    select: str = "rsum",
    trainable: Callable[[str], bool] | None = None,
    echo: Callable[[str], None] | None = print,
) -> dict:
    """Train `model` in place, or take up where a killed run stopped; leave it at its best epoch.

    Args:
        data: has `len()` and `__getitems__(index) -> batch` (nested dicts of tensors); or, where it is read in an
            order of its own, `steps(batch_size, world)` and `batches(...)` (`data.shards.ShardPairs`).
        out: folder for `checkpoint.pt`, `best.safetensors` and `log.jsonl` (a line an epoch).
        evaluate: gives validation metrics after each epoch (main process only, in eval mode, no gradient).
            The weights of the epoch with the largest `select` are kept; without it, the last epoch's.
        trainable: names of the parameters to train; the others are frozen for this call.
        echo: receives one line an epoch.

    Returns:
        `{"history": [...], "best_epoch", "steps", "seconds", "peak_memory_bytes", "device"}`; seconds include
        those before an interruption.

    Raises:
        TrainingError: For an unwritable or full `out`, a checkpoint of another plan, a loss that is not
            finite (the step and the terms are named), a `select` that `evaluate` does not return.
    """
    out = Path(out)
    # told outright: without `cpu`, accelerate under torchrun on a machine without GPUs runs N lone processes
    accelerator = Accelerator(
        cpu=not torch.accelerator.is_available(),
        mixed_precision=plan.precision,
        step_scheduler_with_optimizer=False,
        # a switch may leave parts of a model without use; processes would wait for their gradients for ever
        kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=True)],
    )
    main, rank, world = accelerator.is_main_process, accelerator.process_index, accelerator.num_processes
    if main:
        check_writable(out, room=sum(p.numel() * p.element_size() for p in model.parameters()) * 5)
    accelerator.wait_for_everyone()

    frozen = [p for n, p in model.named_parameters() if trainable and not trainable(n) and p.requires_grad]
    for p in frozen:
        p.requires_grad_(False)
    parameters = [p for p in model.parameters() if p.requires_grad]
    if not parameters:
        raise TrainingError("no parameter is left to train: check `trainable`")
    optimizer = make_optimizer(parameters, plan)
    streamed = hasattr(data, "batches")  # shards: read in an order of their own
    steps_per_epoch = (
        data.steps(plan.batch_size, world)
        if streamed
        else len(EpochBatches(len(data), plan.batch_size, seed=0, epoch=0, world=world))
    )
    scheduler = make_schedule(optimizer, plan, math.ceil(steps_per_epoch / plan.accumulate) * plan.epochs)
    plain = model
    model, optimizer = accelerator.prepare(model, optimizer)

    state = Checkpoint(
        out / f"checkpoint{f'.{rank}' if rank else ''}.pt", plain, optimizer, scheduler, accelerator
    )
    at = state.load(plan) or {"epoch": 0, "step": 0, "sums": {}, "best": None, "history": [], "seconds": 0.0}
    if main:
        rewrite_log(out / "log.jsonl", at["history"])
    started = time.monotonic() - at["seconds"]

    # data that live on the GPU already cannot be pinned
    on_cpu = getattr(data, "device", torch.device("cpu")).type == "cpu"
    pinned = accelerator.device.type == "cuda" and on_cpu
    for epoch in range(at["epoch"], plan.epochs):
        place = {"seed": plan.seed, "epoch": epoch, "first": at["step"], "rank": rank, "world": world}
        if streamed:
            loader = data.batches(plan.batch_size, **place, workers=plan.workers, pin_memory=pinned)
        else:
            batches = EpochBatches(
                len(data),
                plan.batch_size,
                seed=plan.seed,
                epoch=epoch,
                first=at["step"],
                rank=rank,
                world=world,
            )
            # a generator of its own: a loader must not draw from the random state that the model uses
            loader = DataLoader(data, batch_sampler=batches, num_workers=plan.workers, collate_fn=whole,
                                generator=torch.Generator(), pin_memory=pinned)  # fmt: skip
        model.train()
        for step, batch in enumerate(loader, start=at["step"]):
            # the last batches of an epoch close their accumulation group even if it is incomplete
            last = (step + 1) % plan.accumulate == 0 or step + 1 == steps_per_epoch
            with contextlib.nullcontext() if last else accelerator.no_sync(model):
                terms = model(to_device(batch, accelerator.device))
                values = {k: float(v.detach()) for k, v in terms.items()}
                if not all(math.isfinite(v) for v in values.values()):
                    raise TrainingError(
                        f"epoch {epoch + 1}, step {step + 1} of {steps_per_epoch}: the loss is not "
                        f"finite ({values}). Lower lr or raise warmup; in fp16, try bf16"
                    )
                accelerator.backward(terms["loss"] / plan.accumulate)
            if last:
                if plan.clip_norm:
                    accelerator.clip_grad_norm_(parameters, plan.clip_norm)
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
                scheduler.step()
            for name, value in values.items():
                at["sums"][name] = at["sums"].get(name, 0.0) + value
            at["step"] = step + 1
            if (
                plan.checkpoint_steps
                and last
                and at["step"] % plan.checkpoint_steps == 0
                and at["step"] < steps_per_epoch
            ):
                state.save(plan, {**at, "seconds": time.monotonic() - started})

        line = {"epoch": epoch + 1, "steps": steps_per_epoch, "lr": scheduler.get_last_lr()[0]}
        line |= {name: total / steps_per_epoch for name, total in at["sums"].items()}
        if evaluate is not None and main:
            plain.eval()
            with torch.no_grad():
                line |= evaluate(plain)
            if select not in line:
                raise TrainingError(
                    f"`evaluate` returned {sorted(line)}, not {select!r}, by which to choose the epoch"
                )
        score = line.get(select) if evaluate is not None else float(epoch)
        if main and (at["best"] is None or score > at["best"][0]):
            at["best"] = [score, epoch + 1]
            write_atomically(out / "best.safetensors", lambda path: save_file(unique_state(plain), path))
        line["seconds"] = round(time.monotonic() - started, 3)
        at |= {
            "epoch": epoch + 1,
            "step": 0,
            "sums": {},
            "history": [*at["history"], line],
            "seconds": line["seconds"],
        }
        state.save(plan, at)
        if main:
            rewrite_log(out / "log.jsonl", at["history"])
            if echo:
                echo(describe(line, plan.epochs))
        accelerator.wait_for_everyone()

    for p in frozen:
        p.requires_grad_(True)
    accelerator.wait_for_everyone()
    load_best(plain, out / "best.safetensors")
    plain.to(accelerator.device).eval()
    return {
        "history": at["history"],
        "best_epoch": at["best"][1] if at["best"] else plan.epochs,
        "steps": steps_per_epoch * plan.epochs,
        "seconds": at["seconds"],
        "peak_memory_bytes": peak_memory(),
        "device": device_name(),
    }


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


# ------------------------------------------------------------------------------------------- checkpoints
class Checkpoint:
    """Everything a run needs to go on: weights, optimiser, schedule, scaler, random states, place in the data.

    Each process keeps a file of its own (its random states differ), replaced atomically. Several processes write the
    new ones beside the old (`.next`), meet, and only then put them in their place: wherever a run is killed, all have
    files of one step.
    """

    def __init__(self, path: Path, model: nn.Module, optimizer, scheduler, accelerator: Accelerator):
        self.path, self.next, self.model, self.optimizer = path, Path(f"{path}.next"), model, optimizer
        self.scheduler, self.scaler, self.world = scheduler, accelerator.scaler, accelerator.num_processes
        self.meet = accelerator.wait_for_everyone

    def identity(self, plan: Plan) -> dict:
        """What must not change between a run and its continuation: all that its numbers depend on."""
        free = ("workers", "checkpoint_steps")
        kept = {name: value for name, value in asdict(plan).items() if name not in free}
        return {**json.loads(json.dumps(kept)), "processes": self.world}

    def save(self, plan: Plan, at: dict) -> None:
        python = random.getstate()
        kind, keys, position, has_gauss, gauss = np.random.get_state()  # noqa: NPY002
        content = {
            "plan": self.identity(plan),
            "at": at,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "scaler": self.scaler.state_dict() if self.scaler else {},
            "python": [python[0], list(python[1]), python[2]],
            "numpy": [kind, torch.from_numpy(keys.astype(np.int64)), position, has_gauss, gauss],
            "torch": torch.get_rng_state(),
            "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        }
        if self.world == 1:
            write_atomically(self.path, lambda path: torch.save(content, path))
            return
        write_atomically(self.next, lambda path: torch.save(content, path))
        self.meet()
        self.next.replace(self.path)

    def latest(self) -> dict | None:
        """The content of the latest step that all processes have files of; None if none has any.

        Raises:
            TrainingError: A file cannot be read, or the processes have files of no common step.
        """
        found = {}
        for path in (self.path, self.next) if self.world > 1 else (self.path,):
            if not path.exists():
                continue
            try:
                content = torch.load(path, map_location="cpu", weights_only=True)
            except Exception as error:
                raise TrainingError(f"{path} cannot be read ({error}); remove it to start over") from error
            found[content["at"]["epoch"], content["at"]["step"]] = path, content
        places = gather_object([sorted(found)]) if self.world > 1 else [sorted(found)]
        if not any(places):
            return None
        common = set.intersection(*map(set, places))
        if not common:
            raise TrainingError(
                f"{self.path.parent}: the processes have checkpoints of no common (epoch, step): "
                f"{dict(enumerate(places))}. Remove all of them to start over"
            )
        path, content = found[max(common)]
        path.replace(self.path)  # a kill has left it beside
        return content

    def load(self, plan: Plan) -> dict | None:
        """Restore all states and return the place; None without a checkpoint."""
        content = self.latest()
        if content is None:
            return None
        mine, theirs = self.identity(plan), content["plan"]
        changed = {k: (theirs.get(k), v) for k, v in mine.items() if theirs.get(k) != v}
        if changed:
            raise TrainingError(
                f"{self.path} belongs to another plan (was, is): {changed}. "
                "Remove it to start over, or give the run another `out`"
            )
        try:
            self.model.load_state_dict(content["model"])
        except RuntimeError as error:
            raise TrainingError(
                f"{self.path} belongs to another model: {error}. "
                "Remove it to start over, or give the run another `out`"
            ) from error
        self.optimizer.load_state_dict(content["optimizer"])
        self.scheduler.load_state_dict(content["scheduler"])
        if self.scaler and content["scaler"]:
            self.scaler.load_state_dict(content["scaler"])
        version, internal, gauss = content["python"]
        random.setstate((version, tuple(internal), gauss))
        kind, keys, *rest = content["numpy"]
        np.random.set_state((kind, keys.numpy().astype(np.uint32), *rest))  # noqa: NPY002
        torch.set_rng_state(content["torch"])
        if content["cuda"] and torch.cuda.is_available():
            torch.cuda.set_rng_state_all(content["cuda"])
        return content["at"]


def unique_state(model: nn.Module) -> dict[str, torch.Tensor]:
    """The state for safetensors: contiguous, each shared tensor once under its first name."""
    seen, state = set(), {}
    for name, value in model.state_dict().items():
        if value.data_ptr() in seen and value.numel():
            continue
        seen.add(value.data_ptr())
        state[name] = value.detach().cpu().contiguous()
    return state


def load_best(model: nn.Module, path: Path) -> None:
    """Load what `unique_state` saved; every tensor of the model must be there, or share memory with one that is."""
    state = load_file(path)
    fits = model.load_state_dict(state, strict=False)
    here = {v.data_ptr() for k, v in model.state_dict().items() if k in state}
    missing = [k for k in fits.missing_keys if model.state_dict()[k].data_ptr() not in here]
    if missing or fits.unexpected_keys:
        raise TrainingError(
            f"{path} belongs to another model: missing {missing[:5]}, unknown {fits.unexpected_keys[:5]}"
        )


def write_atomically(path: Path, write: Callable[[Path], None]) -> None:
    """`files.write_atomically` for what a run leaves in its `out`.

    Raises:
        TrainingError: If the file cannot be written.
    """
    try:
        files.write_atomically(path, write)
    except files.DataError as error:
        raise TrainingError(
            f"{path} cannot be written: {error.__cause__}. Free space, or give another `out`"
        ) from error


def check_writable(out: Path, *, room: int) -> None:
    """Fail now rather than after an epoch: `out` must take a file of `room` bytes.

    Raises:
        TrainingError: If it cannot be made or written, or the disk cannot hold that much more.
    """
    probe = out / ".probe"
    try:
        out.mkdir(parents=True, exist_ok=True)
        with open(probe, "wb") as file:
            try:
                os.posix_fallocate(file.fileno(), 0, max(room, 1))
            except OSError as error:
                if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):
                    raise
                file.write(b"\0" * max(room, 1))  # file systems without fallocate
    except OSError as error:
        raise TrainingError(
            f"out = {out} cannot hold this run ({room / 1e6:.1f} MB): {error}. "
            "Free space, or give another `out`"
        ) from error
    finally:
        with contextlib.suppress(OSError):
            probe.unlink(missing_ok=True)


def rewrite_log(path: Path, history: list[dict]) -> None:
    """`log.jsonl`, a line an epoch, exactly the epochs that count (a killed run's surplus is dropped)."""
    text = "".join(json.dumps(line) + "\n" for line in history)
    write_atomically(path, lambda part: part.write_text(text))


def describe(line: dict, epochs: int) -> str:
    """One printed line an epoch."""
    numbers = (f"{k} {v:.4g}" for k, v in line.items()
               if isinstance(v, (int, float)) and k not in ("epoch", "steps"))  # fmt: skip
    return f"epoch {line['epoch']}/{epochs}  " + "  ".join(numbers)


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
