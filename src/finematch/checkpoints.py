"""What a training run leaves on disk: its checkpoint, and the weights of its best epoch.

Both are written atomically and checked before they are used: a file with a damaged byte is refused, never loaded.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import random
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from finematch.files import reserve, write_atomically

START_OVER = "Two ways on: give the run another `out`, or start over with resume='fresh' (or remove the file)"


class TrainingError(RuntimeError):
    """The run cannot go on; the message says at which step, why, and what to do."""


# ------------------------------------------------------------------------------------------- checkpoints
class Checkpoint:
    """Everything a run needs to go on: weights, optimiser, schedule, scaler, random states, place in the data.

    Each process keeps a file of its own (its random states differ), replaced atomically. Several processes write the
    new ones beside the old (`.next`), meet, and only then put them in their place: wherever a run is killed, all have
    files of one step.

    Args:
        plan: the `Plan` of the run; a checkpoint of another one is refused.
        identity: digest of all else that the run's numbers depend on; a checkpoint of another one is refused.
    """

    def __init__(self, path: Path, plan, accelerator: Accelerator, *, identity: str = ""):
        self.path, self.next = path, Path(f"{path}.next")
        self.scaler, self.world = accelerator.scaler, accelerator.num_processes
        self.meet = accelerator.wait_for_everyone
        self.identity = identity
        free = ("workers", "checkpoint_steps")  # change no number
        kept = {name: value for name, value in asdict(plan).items() if name not in free}
        self.plan = {**json.loads(json.dumps(kept)), "processes": self.world}

    def save(self, model: nn.Module, optimizer, scheduler, at: dict) -> None:
        """Write all states and the place `at`."""
        content = {
            "identity": self.identity,
            "plan": self.plan,
            "at": at,
            "model": model.state_dict(),
            "optimizer": optimizer.state_dict(),
            "scheduler": scheduler.state_dict(),
            "scaler": self.scaler.state_dict() if self.scaler else {},
            **random_states(),
        }
        content["sha256"] = content_digest(content)
        if self.world == 1:
            write_atomically(self.path, lambda path: torch.save(content, path))
            return
        write_atomically(self.next, lambda path: torch.save(content, path))
        self.meet()
        self.next.replace(self.path)

    def latest(self) -> dict | None:
        """The content of the latest step that all processes have files of; None if none has any.

        Raises:
            TrainingError: A file cannot be read or is damaged, or the processes have files of no common step.
        """
        found = {}
        for path in (self.path, self.next) if self.world > 1 else (self.path,):
            if path.exists():
                content = read_checkpoint(path)
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

    def load(self, model: nn.Module, optimizer, scheduler) -> dict | None:
        """Restore all states and return the place; None without a checkpoint.

        A checkpoint of another run that has not trained a step holds nothing and counts as none.

        Raises:
            TrainingError: The checkpoint is damaged, or belongs to another run, plan or model.
        """
        content = self.latest()
        if content is None:
            return None
        if refusal := self.refusal(content):
            if (content["at"]["epoch"], content["at"]["step"]) == (0, 0):
                return None
            raise TrainingError(refusal)
        try:
            model.load_state_dict(content["model"])
        except RuntimeError as error:
            raise TrainingError(f"{self.path} belongs to another model: {error}. {START_OVER}") from error
        optimizer.load_state_dict(content["optimizer"])
        scheduler.load_state_dict(content["scheduler"])
        if self.scaler and content["scaler"]:
            self.scaler.load_state_dict(content["scaler"])
        restore_random_states(content)
        return content["at"]

    def refusal(self, content: dict) -> str:
        """Why this run may not go on from `content`; empty if it may."""
        theirs = content["plan"]
        changed = {k: (theirs.get(k), v) for k, v in self.plan.items() if theirs.get(k) != v}
        plan = f" another plan (was, is): {changed}." if changed else ""
        was = content.get("identity", "")
        if was != self.identity:
            return (
                f"{self.path} belongs to another run: its identity was {was[:8] or 'not stated'}, is "
                f"{self.identity[:8] or 'not stated'}, so settings, data or features differ"
                f"{'; it belongs to' + plan if plan else '.'} {START_OVER}"
            )
        return f"{self.path} belongs to{plan} {START_OVER}" if plan else ""


def read_checkpoint(path: Path) -> dict:
    """The content of a checkpoint, after its SHA-256 was found right.

    Raises:
        TrainingError: The file cannot be read, or is damaged.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
        stated = content.pop("sha256", None)
        found = content_digest(content)
    except Exception as error:
        raise TrainingError(f"{path} cannot be read ({error}); remove it to start over") from error
    if found != stated:
        raise TrainingError(
            f"{path} cannot be trusted: its content is not what was written, or was written without a digest; "
            "remove it to start over"
        )
    return content


def content_digest(content) -> str:
    """SHA-256 of nested dicts and lists of tensors and plain values."""
    found = hashlib.sha256()

    def add(value) -> None:
        if isinstance(value, Tensor):
            found.update(f"tensor {value.dtype} {list(value.shape)}".encode())
            found.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
        elif isinstance(value, Mapping):
            found.update(f"dict {len(value)}".encode())
            for key, item in value.items():
                found.update(repr(key).encode())
                add(item)
        elif isinstance(value, (list, tuple)):
            found.update(f"list {len(value)}".encode())
            for item in value:
                add(item)
        else:
            found.update(repr(value).encode())

    add(content)
    return found.hexdigest()


def random_states() -> dict:
    """States of the random numbers of Python, NumPy, torch and its GPUs, as plain values and tensors."""
    python = random.getstate()
    kind, keys, position, has_gauss, gauss = np.random.get_state()  # noqa: NPY002
    return {
        "python": [python[0], list(python[1]), python[2]],
        "numpy": [kind, torch.from_numpy(keys.astype(np.int64)), position, has_gauss, gauss],
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def restore_random_states(states: dict) -> None:
    """Put back what `random_states` returned."""
    version, internal, gauss = states["python"]
    random.setstate((version, tuple(internal), gauss))
    kind, keys, *rest = states["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), *rest))  # noqa: NPY002
    torch.set_rng_state(states["torch"])
    if states["cuda"] and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(states["cuda"])


# ------------------------------------------------------------------------------------------- weights
def unique_state(model: nn.Module) -> dict[str, Tensor]:
    """The state for safetensors: contiguous, each shared tensor once under its first name."""
    seen, state = set(), {}
    for name, value in model.state_dict().items():
        if value.data_ptr() in seen and value.numel():
            continue
        seen.add(value.data_ptr())
        state[name] = value.detach().cpu().contiguous()
    return state


def state_digest(state: Mapping[str, Tensor]) -> str:
    """SHA-256 over the names, types, shapes and bytes of tensors, in the order of their names."""
    return content_digest({name: state[name] for name in sorted(state)})


def save_weights(model: nn.Module, path: Path) -> None:
    """Write a model's weights as safetensors, with their SHA-256 in the file's metadata."""
    state = unique_state(model)
    write_atomically(path, lambda part: save_file(state, part, metadata={"sha256": state_digest(state)}))


def read_weights(path: str | Path) -> tuple[dict[str, Tensor], str]:
    """Tensors that `save_weights` wrote, and their digest, which was found right.

    Files without a digest (of before there was one, or of others) are read as they are.

    Raises:
        TrainingError: The file cannot be read, or is damaged.
    """
    try:
        with safe_open(path, framework="pt") as file:
            stated = (file.metadata() or {}).get("sha256")
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    except (OSError, SafetensorError, ValueError) as error:
        raise TrainingError(f"{path} cannot be read ({error}); run again, or restore the file") from error
    found = state_digest(state)
    if stated and found != stated:
        raise TrainingError(f"{path} is damaged: its weights are not those that were written; run again")
    return state, found


def load_best(model: nn.Module, path: str | Path) -> str:
    """Load what `save_weights` saved; every tensor of the model must be there, or share memory with one that is.

    Returns:
        The SHA-256 of the weights.

    Raises:
        TrainingError: The file is damaged, or belongs to another model.
    """
    state, found = read_weights(path)
    try:
        fits = model.load_state_dict(state, strict=False)
    except RuntimeError as error:
        raise TrainingError(f"{path} belongs to another model: {error}") from error
    here = {v.data_ptr() for k, v in model.state_dict().items() if k in state}
    missing = [k for k in fits.missing_keys if model.state_dict()[k].data_ptr() not in here]
    if missing or fits.unexpected_keys:
        raise TrainingError(
            f"{path} belongs to another model: missing {missing[:5]}, unknown {fits.unexpected_keys[:5]}"
        )
    return found


# ------------------------------------------------------------------------------------------- the disk
def room_for(model: nn.Module, out: Path) -> int:
    """Bytes that a run may still need in `out`: two checkpoints and two weights files, old and new beside each other.

    A checkpoint has the weights, and two moments of each trained one.
    """
    weights = sum(v.numel() * v.element_size() for v in model.state_dict().values())
    trained = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
    there = sum(file.stat().st_size for file in out.glob("*") if file.is_file()) if out.is_dir() else 0
    return max(2 * (weights + 2 * trained) + 2 * weights - there, weights)


def check_writable(out: Path, *, room: int) -> None:
    """Fail now rather than after an epoch: `out` must take a file of `room` bytes.

    Raises:
        TrainingError: If it cannot be made or written, or the disk cannot hold that much more.
    """
    probe = out / ".probe"
    try:
        out.mkdir(parents=True, exist_ok=True)
        with open(probe, "wb") as file:
            if not reserve(file, max(room, 1)):
                file.write(b"\0" * max(room, 1))
    except OSError as error:
        raise TrainingError(
            f"out = {out} cannot hold this run ({room / 1e6:.1f} MB): {error}. "
            "Free space, or give another `out`"
        ) from error
    finally:
        with contextlib.suppress(OSError):
            probe.unlink(missing_ok=True)
