"""Runs: what identifies one, where it lies, what it leaves, and how it is opened again.

    run = begin("mvam", s, data=digests, features=key)    # s: the page's settings; takes hold of run.folder
    fit(model, pairs, plan, run.folder, identity=run.digest)
    run.finish(metrics, seconds=seconds)                  # writes metrics.json, lets go of the folder

    run = open_run("latest", method="mvam", dataset="scenes")
    run.parameters, run.metrics, run.status, run.data, run.model

A run's identity is everything that its numbers depend on: the settings that can change them (files by their content),
the digests of the data and of the features, and the version of the method's arithmetic (`numerics` in its presets).
"""

from __future__ import annotations

import json
import math
import os
import platform
import subprocess
import time
import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache, cached_property
from importlib import metadata
from pathlib import Path

import numpy as np
import pandas as pd

from finematch.config import Settings, declared, numerics, root
from finematch.files import DataError, digest, file_digest, run_reference, write_json
from finematch.hold import hold

FIELDS = ("parameters", "metrics", "protocol", "seconds", "peak_memory_bytes", "device", "versions", "commit")
PACKAGE = Path(__file__).parent
PACKAGES = ("torch", "transformers", "timm", "numpy", "finematch")
# what a run leaves in its folder and in those of its stages and members
LEFT = ("checkpoint*.pt", "checkpoint*.pt.next", "*.part", "best.safetensors", "log.jsonl", "metrics.json",
        "identity.json")  # fmt: skip
RESUME = ("", "fresh", "replace")


class IdentityError(ValueError):
    """A folder holds another run; the message says what differs and which two ways lead on."""


@dataclass
class Run:
    """One training run: a folder, and what identifies it.

    Attributes:
        identity: `method`, `numerics`, `settings`, `data`, `features`; empty for a run of before it was kept.
        digest: SHA-256 of the identity.
        parameters: all settings by name. metrics: those of its `metrics.json`; empty before it has finished.
        status: `current`, or `legacy: ` and why its numbers are not those that the same run would give now.
    """

    method: str
    folder: Path
    parameters: dict
    identity: dict = field(default_factory=dict)
    metrics: dict = field(default_factory=dict)
    status: str = "current"
    content: dict = field(default_factory=dict, repr=False)  # of metrics.json

    @property
    def digest(self) -> str:
        return digest(self.identity) if self.identity else ""

    @property
    def settings(self) -> Settings:
        """The parameters as the settings of the method's training page; what an older run lacks is filled in."""
        known = declared(self.method)
        return Settings(
            self.method, {name: value for name, value in self.parameters.items() if name in known}
        )

    @property
    def seed(self) -> int:
        return self.parameters["seed"]

    @property
    def precision(self) -> str:
        """The precision it is trained in: never `auto`, and that of its first step wherever it goes on."""
        return self.parameters["precision"]

    def finish(
        self,
        metrics: Mapping,
        *,
        seconds: float | int,
        facts: Mapping | None = None,
        protocol: str | None = None,
    ) -> Path:
        """Write `metrics.json` and let go of the folder.

        Args:
            seconds: of training. facts: what the page found out and a table may ask for, kept with the parameters.
            protocol: as of `write_metrics`.
        """
        path = write_metrics(
            self.folder, {**self.parameters, **(facts or {})}, metrics, seconds=seconds, protocol=protocol,
            identity=self.identity, weights=weights_digests(self.folder),
        )  # fmt: skip
        self.content = json.loads(path.read_text(encoding="utf-8"))
        self.metrics = self.content["metrics"]
        self.release()
        return path

    def untrained(self, seed: int):
        """The run's model with the random weights of `seed`, for a start from scratch."""
        from finematch.rebuild import untrained

        return untrained(self, seed)

    def release(self) -> None:
        """Let go of the folder before the run has finished."""
        hold(self.folder).release()

    @cached_property
    def _rebuilt(self) -> tuple:
        from finematch.rebuild import rebuild

        if next(self.folder.rglob("best.safetensors"), None) is None:  # before anything is made for it
            raise DataError(
                self.folder, "the run", "has no weights here (git keeps the metrics alone)",
                "Run its method's 2_train with the parameters of its metrics.json",
            )  # fmt: skip
        data, model = rebuild(self)
        if changed := self._changed(data):
            self.status = f"legacy: {changed}"
            warnings.warn(f"{self.folder}: {self.status}. Run 2_train again", stacklevel=3)
        return data, model

    def _changed(self, data) -> str:
        """What of the opened data and features is other than in the identity; empty if nothing is, or it is unknown."""
        from finematch.data import digests
        from finematch.features.inputs import origin

        splits, sets, was = getattr(data, "splits", {}), getattr(data, "sets", None), self.identity
        parts = {name: split.records for name, split in splits.items()}
        if sets is not None:  # FELGA's, whose features `rebuild.open_gallery` compares by what made them
            parts = {"train": sets.train, "gallery": sets.gallery, "annotated": sets.annotated}
        if not was or not parts:
            return ""
        now = {name: digests(records) for name, records in parts.items()}
        known = {name: was["data"].get(name) for name in now}
        if known != now:
            return f"the data are others: {differences(known, now)}"
        if not splits:
            return ""
        features = _plain(origin({name: split.images for name, split in splits.items()}))
        return (
            ""
            if features == was["features"]
            else f"the features are others: {differences(was['features'], features)}"
        )

    @property
    def data(self):
        """The data, features and tokenizer that the run was made with, opened again."""
        return self._rebuilt[0]

    @property
    def model(self):
        """The model with the weights of the run's best epoch, in eval mode."""
        return self._rebuilt[1]

    def save_pretrained(self, folder: str | Path) -> Path:
        """Write the model into a folder that `<its class>.from_pretrained` opens without the data; see `hub`.

        Raises:
            DataError: As `open_run`; or for a run of a task, whose model stands on another run's.
        """
        from finematch.hub import save

        return save(self, folder)

    def push_to_hub(self, repository: str, **options) -> str:
        """Save the model and upload it to the Hugging Face hub; the address of the commit.

        Args:
            repository: `owner/name`; made if it does not exist.
            options: `private`, `token`, and those of `huggingface_hub.HfApi.upload_folder`.
        """
        from finematch.hub import push

        return push(self, repository, **options)


# ------------------------------------------------------------------------------------------- begin
def begin(
    method: str, s, *, data: Mapping, features: Mapping | str = "", recipe=None, made: Mapping[str, Path] | None = None,
    out: str | Path | None = None, resume: str | None = None,
) -> Run:  # fmt: skip
    """Find a run's folder, take hold of it, and refuse what another run has left there.

    Args:
        s: the page's settings (`config.settings`).
        data: digests of the data, of any nesting (`data.digests` of each split).
        features: digest, or key, of the frozen features that are read.
        recipe: settings of the method that the run trains, where the page is not the method's own (the arena).
        made: files that the page made for the run, by the setting whose word asks for them (`detector=boxes`).
        out: the folder, relative to the workbook; without one `papermill_runs/<method>/<dataset>.<scale>.<digest>`,
            where a run with other settings has another folder.
        resume: "" goes on with a run of the same identity and refuses another's; "fresh" starts over; "replace" goes on
            with the same and starts over from another's. Where `precision` is `auto`, a run that has begun goes on in
            its own, on whatever device; a new one takes that of the device (`training.precision_on`).

    Raises:
        IdentityError: The folder holds another run.
        Busy: Another process is at work there.
    """
    resume = resume or ""
    if resume not in RESUME:
        raise ValueError(f"resume is {resume!r}; use one of {RESUME}")
    identity = identity_of(method, s, data=data, features=features, recipe=recipe, made=made)
    run = _in_precision(method, s, identity, out, resume)
    held = hold(run.folder)
    held.release()  # of a cell that was stopped in this process
    held.take()
    if first_process():
        try:
            _make_room(run, resume)
        except BaseException:
            held.release()
            raise
        write_json(run.folder / "identity.json", run.identity)
    _meet()
    return run


def _in_precision(method: str, s, identity: dict, out, resume: str) -> Run:
    """The run with its precision: where that is `auto`, the one in which it began, or else that of the device here."""
    from finematch.training import accelerator, precision_on

    parameters = dict(s.as_dict())

    def run_in(**precision: str) -> Run:
        settings = identity["settings"] | precision
        run = Run(method, Path(), parameters | precision, identity | {"settings": settings})
        run.folder = root() / (out or default_folder(run))
        return run

    if parameters.get("precision") != "auto":
        return run_in()
    device = accelerator()
    run = run_in(precision=(here := precision_on(device)))
    for begun in (run, run_in(precision="bf16"), run_in(precision="no")) if resume != "fresh" else ():
        if _identity_in(begun.folder) == begun.identity and next(begun.folder.rglob("checkpoint*.pt"), None):
            run = begun
            break
    note = f"auto on {device.type}"
    if run.precision != here:
        note = f"in which this run began; {note} is {here}, and resume='fresh' starts over in that"
    if first_process():
        print(f"precision: {run.precision} ({note})")
    return run


def identity_of(
    method: str, s, *, data: Mapping, features: Mapping | str = "", recipe=None, made: Mapping[str, Path] | None = None
) -> dict:  # fmt: skip
    """All that the numbers of a run depend on, as plain values; files by their content."""
    found = {"method": method, "numerics": s.numerics, "settings": _by_content(s), "data": data,
             "features": features}  # fmt: skip
    if recipe is not None:
        found["recipe"] = recipe_of(s, recipe)
    if made:
        found["made"] = {name: f"sha256:{file_digest(path)}" for name, path in made.items()}
    return _plain(found)


def recipe_of(s, recipe) -> dict:
    """What a run has from the presets of the method that it trains: all that its own settings do not name."""
    own = s.identity()
    settings = {name: value for name, value in _by_content(recipe).items() if name not in own}
    return _plain({"method": recipe.method, "numerics": recipe.numerics, "settings": settings})


def _by_content(s) -> dict:
    """Settings that can change a number; files by their content, and runs by what made them and what they became."""
    settings = dict(s.identity())
    for name, value in s.paths().items():
        path = root() / str(value)
        if name in settings and (path / "metrics.json").is_file():
            settings[name] = run_reference(_read_metrics(path / "metrics.json"))
        elif name in settings and path.exists():
            settings[name] = f"sha256:{file_digest(path)}"
    return settings


# What a table has to say beside a run's numbers, by label.
LABELS = {
    "supervised proposals": "its regions are boxes of a detector that was trained on annotated boxes",
    "selective search": "its proposals are selective search's, where the paper's are DETReg's (register F18)",
}


def labels_of(identity: Mapping) -> list[str]:
    """The `LABELS` of a run, by the source of the proposals that its numbers depend on."""
    settings = identity["settings"]
    if settings.get("features") == "whole":
        return []
    by = set(_proposals(identity["features"]))
    found = ["supervised proposals"] if "detections" in by else []
    paper = identity["method"] == "felga" and settings.get("scale") == "paper"
    return found + (["selective search"] if paper and "selective_search" in by else [])


def _proposals(features) -> Iterator[str]:
    """What proposed the regions of all features of an identity."""
    if isinstance(features, Mapping):
        for name, value in features.items():
            yield from [value] if name == "proposals" and isinstance(value, str) else _proposals(value)
    elif isinstance(features, (list, tuple)):
        for value in features:
            yield from _proposals(value)


def default_folder(run: Run) -> Path:
    """`papermill_runs/<method>/<dataset>.<scale>.<8 digits of the identity>`; a smoke run's scale is `smoke`; runs of a
    task (`slan_localization`) lie beside those of its method."""
    p = run.parameters
    scale = "smoke" if p.get("smoke") else p["scale"]
    return Path("papermill_runs", run.method.split("_")[0], f"{p['dataset']}.{scale}.{run.digest[:8]}")


def _plain(value):
    """As JSON gives it back: tuples are lists, and so compare equal with what was read."""
    return json.loads(json.dumps(value, default=str))


def _make_room(run: Run, resume: str) -> None:
    """Refuse or remove what another run, or an earlier try of this one, has left in the folder."""
    was = _identity_in(run.folder)
    if resume == "fresh":
        wipe(run.folder)
    elif was is not None and was != run.identity:
        if resume != "replace":
            raise IdentityError(
                f"{run.folder} belongs to another run: {differences(was, run.identity)}. Two ways on: give another "
                "`out` (without one, the folder's name carries the identity), or start over with resume='fresh'"
            )
        wipe(run.folder)


def _identity_in(folder: Path) -> dict | None:
    """The identity of the run that lies in a folder; {} if it has none, None if there is no run."""
    for name in ("identity.json", "metrics.json"):
        if (folder / name).is_file():
            try:
                content = json.loads((folder / name).read_text(encoding="utf-8"))
                return content if name == "identity.json" else content.get("identity", {})
            except (ValueError, AttributeError):
                return {}
    return {} if any(next(folder.glob(pattern), None) for pattern in LEFT) else None


def differences(was: Mapping, now: Mapping, *, most: int = 6) -> str:
    """What differs between two identities, as a sentence's part: "tau was 0.07, is 0.5"."""
    if not was:
        return "it does not say with which settings, data and features"
    before, after = dict(_leaves(was)), dict(_leaves(now))
    found = []
    for name in [*before, *(name for name in after if name not in before)]:
        one, other = before.get(name, "not there"), after.get(name, "not there")
        if one != other:
            found.append(f"{name.removeprefix('settings.')} was {_short(one)}, is {_short(other)}")
    return "; ".join(found[:most]) + (f"; and {len(found) - most} more" if len(found) > most else "")


def _leaves(value, name: str = "") -> Iterator[tuple[str, object]]:
    if isinstance(value, Mapping) and value:
        for key, item in value.items():
            yield from _leaves(item, f"{name}.{key}" if name else str(key))
    else:
        yield name, value


def _short(value) -> str:
    text = str(value)
    return f"{text[:15]}..." if text.startswith("sha256:") or len(text) == 64 else text or "empty"


def wipe(folder: Path) -> None:
    """Remove what a run left in its folder and in those below, but no other run's."""
    for one in sorted(folder.iterdir()) if folder.is_dir() else ():
        if one.is_dir() and not any((one / name).exists() for name in ("metrics.json", "identity.json")):
            wipe(one)
        elif any(one.match(pattern) for pattern in LEFT):
            one.unlink()


def first_process() -> bool:
    """Whether this process writes: the only one, or of torchrun's the first."""
    return int(os.environ.get("RANK", "0")) == 0


def _meet() -> None:
    """Under torchrun, wait until the first process has prepared the folder."""
    import torch.distributed as dist

    if dist.is_available() and dist.is_initialized():
        dist.barrier()


# ------------------------------------------------------------------------------------------- open again
def open_run(folder: str | Path = "latest", *, method: str | None = None, **filters) -> Run:
    """A finished run: parameters, metrics, data and model.

    Args:
        folder: of the run, relative to the workbook (or to where you are); or "latest", the newest run of `method`
            whose parameters are `filters`.

    Warns:
        UserWarning: If the numbers are not those that the same run would give now; `status` says why.

    Raises:
        DataError: There is no such run, it has not finished, or its weights are not those that its metrics were
            measured with.
    """
    if str(folder) == "latest":
        folder = latest(method, **filters)
    folder = Path(folder).expanduser()
    path = folder if folder.is_dir() else root() / folder
    file = path / "metrics.json"
    if not file.is_file():
        raise DataError(
            file, "the run", "has not finished, or was never started", "Run the method's 2_train first"
        )
    content = _read_metrics(file)
    for name, stated in content.get("weights", {}).items():
        if (path / name).is_file() and weights_digest(path / name) != stated:
            raise DataError(
                path / name, "weights", "are not those that metrics.json was measured with",
                "Run again with resume='fresh'",
            )  # fmt: skip
    identity = content.get("identity", {})
    run = Run(
        identity.get("method") or method or path.parent.name, path, content["parameters"], identity,
        content["metrics"], status_of(content), content,
    )  # fmt: skip
    if run.status != "current":
        warnings.warn(f"{path}: {run.status}", stacklevel=2)
    return run


def latest(method: str | None = None, **filters) -> Path:
    """Folder of the newest of `openable` runs, see there.

    Raises:
        DataError: If there is none.
    """
    if found := openable(method, **filters):
        return found[0][0]
    folder, asked = (
        root() / "papermill_runs",
        ", ".join(f"{name}={value!r}" for name, value in filters.items()),
    )
    smoke = 0 if "smoke" in filters else len(openable(method, smoke=True))
    raise DataError(
        folder, f"the latest run of {method or 'any method'}{' with ' + asked if asked else ''}",
        "is not there (committed runs have metrics, no weights)",
        f"Run the method's 2_train first{f', or open one of {smoke} smoke runs with smoke=True' if smoke else ''}",
    )  # fmt: skip


def openable(method: str | None = None, folder: Path | None = None, **filters) -> list[tuple[Path, dict]]:
    """The finished runs that have their weights, of `method` and with these parameters, the newest first.

    Smoke runs, whose weights mean nothing, are passed over unless `smoke=True` is asked for.

    Args:
        folder: below which they are looked for; by default the workbook's `papermill_runs`.

    Returns:
        Each run's folder and the content of its `metrics.json`.
    """
    found = []
    for file in (folder or root() / "papermill_runs").rglob("metrics.json"):
        if next(file.parent.glob("**/best.safetensors"), None) is None:
            continue
        content = _read_metrics(file)
        if method not in (None, content.get("identity", {}).get("method") or file.parent.parent.name):
            continue
        parameters = content["parameters"]
        if parameters.get("smoke") and "smoke" not in filters:
            continue
        if all(parameters.get(name) == value for name, value in filters.items()):
            found.append((content.get("finished", ""), file.stat().st_mtime, file.parent, content))
    return [(path, content) for *_, path, content in sorted(found, key=lambda one: one[:3], reverse=True)]


def status_of(content: Mapping) -> str:
    """`current`, or `legacy: ` and why: of the content of a metrics file."""
    identity, commit = content.get("identity"), str(content["commit"]).removesuffix("-dirty")
    if not identity:
        return "legacy: it does not say which data and features it used"
    if (known := _commits()) and commit != "unknown" and commit not in known:
        return f"legacy: its commit {commit[:8]} is in no history here"
    if identity["method"] == "arena" and "recipe" not in identity:
        return "legacy: it does not say the presets of the method that it trained"
    for was, now in versions_of(content):
        if was != now:
            return f"legacy: its arithmetic is version {was}, now {now}"
    p = content["parameters"]
    if p["dataset"] == "scenes" and not p["smoke"] and (parts := _unknown_scenes(identity["data"])):
        return f"legacy: its scenes are not those that are drawn now: {', '.join(parts)}"
    return "current"


def versions_of(content: Mapping) -> list[tuple[int, int]]:
    """The version of the arithmetic that a run was made with and today's: of its page, and of its recipe."""
    identity, parameters = content.get("identity") or {}, content["parameters"]
    found = (
        [(identity["numerics"], numerics(identity["method"], parameters))] if "numerics" in identity else []
    )
    if recipe := identity.get("recipe"):
        found.append((recipe["numerics"], numerics(recipe["method"], parameters | recipe["settings"])))
    return found


def _unknown_scenes(data: Mapping) -> list[str]:
    """The parts of a run's data that the embedded set, as it is drawn now, does not have.

    Bytes of the files are not compared: they depend on the release of Pillow as well.
    """
    known = {digest for parts in _scenes()["digests"].values() for digest in parts.values()}
    return [f"{split}.{part}" for split, parts in data.items() for part, digest in parts.items()
            if part not in ("images", "files") and digest not in known]  # fmt: skip


@cache
def _scenes() -> dict:
    """The digests of every part of every split of the embedded set, as each of its three loaders gives them."""
    return json.loads(Path(__file__).with_name("scenes").joinpath("digests.json").read_text(encoding="utf-8"))


@cache
def _commits() -> frozenset[str]:
    """All commits of the checkout that holds this package; none outside one, or in a shallow clone."""
    try:
        shallow = _git(PACKAGE, "rev-parse", "--is-shallow-repository") == "true"
        return frozenset() if shallow else frozenset(_git(PACKAGE, "rev-list", "--all", "HEAD").split())
    except (OSError, subprocess.CalledProcessError):
        return frozenset()


def weights_digest(path: Path) -> str:
    """SHA-256 of the weights in a safetensors file, by what its metadata state."""
    from safetensors import safe_open

    from finematch.checkpoints import read_weights

    with safe_open(path, framework="pt") as file:
        stated = (file.metadata() or {}).get("sha256")
    return stated or read_weights(path)[1]


def weights_digests(folder: Path) -> dict[str, str]:
    """By name relative to the folder: the weights of the run, of its stages and of its members."""
    files = sorted(folder.rglob("best.safetensors"))
    return {file.relative_to(folder).as_posix(): weights_digest(file) for file in files}


# ------------------------------------------------------------------------------------------- metrics files
def write_metrics(
    out: str | Path,
    parameters: Mapping,
    metrics: Mapping,
    *,
    seconds: float | int,
    protocol: str | None = None,
    identity: Mapping | None = None,
    weights: Mapping | None = None,
) -> Path:
    """Write `out/metrics.json`, the sole proof that a run succeeded, atomically.

    Args:
        out: the run's folder; made if absent.
        parameters: the run's flat parameters (numbers, strings, booleans, None, paths, tuples of numbers).
        metrics: name to number; a `protocol` among them is used as `protocol`.
        seconds: wall time of the run.
        protocol: how the numbers were made (split, folds, gallery size, tie policy).
        identity, weights: of a run, see `begin` and `weights_digests`; left out where there are none.

    Raises:
        DataError: a metric that is not finite, a value that is neither number nor text, no protocol.
    """
    from finematch.training import device_name, peak_memory

    path = Path(out) / "metrics.json"
    metrics = _flat(metrics, path, "metrics")
    stated = metrics.pop("protocol", None)
    protocol = protocol or stated
    if not protocol:
        raise DataError(path, "protocol", "is missing", "Every number carries its protocol: pass protocol=")
    content = {
        "parameters": _flat(parameters, path, "parameters"),
        "metrics": metrics,
        "protocol": protocol,
        "seconds": round(float(seconds), 3),
        "peak_memory_bytes": peak_memory(),
        "device": device_name(),
        "versions": versions(),
        "commit": git_commit(),
    }
    if identity:
        content |= {"identity": dict(identity), "digest": digest(identity), "weights": dict(weights or {}),
                    "labels": labels_of(identity),
                    "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())}  # fmt: skip
    write_json(path, content)
    return path


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that can change a number."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


def _git(folder: Path, *arguments: str) -> str:
    command = ["git", "-C", str(folder), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def git_commit(folder: Path = PACKAGE) -> str:
    """Commit of the checkout that holds `folder` (default: this package), "unknown" outside one.

    "-dirty" is added if sources or notebooks differ from the commit; results (figures, runs) do not count.
    """
    try:
        if not _git(folder, "ls-files", "."):  # an environment that happens to lie inside another repository
            return "unknown"
        commit = _git(folder, "rev-parse", "HEAD")
        changed = _git(folder, "status", "--porcelain", "--", ":/src", ":/notebooks", ":/pyproject.toml")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return commit + ("-dirty" if changed else "")


def _flat(values: Mapping, path: Path, part: str) -> dict:
    result = {}
    for name, value in values.items():
        value = value.item() if hasattr(value, "item") and np.ndim(value) == 0 else value
        value = str(value) if isinstance(value, Path) else value
        value = ", ".join(map(str, value)) if isinstance(value, tuple) else value
        if not (value is None and part == "parameters") and not isinstance(value, (bool, int, float, str)):
            raise DataError(path, f"{part}.{name}", f"is {type(value).__name__}", "Give a number or text")
        if isinstance(value, float) and not math.isfinite(value):
            raise DataError(
                path, f"{part}.{name}", f"is {value}", "The run failed: find out why, don't report it"
            )
        result[str(name)] = value
    return result


def measured(runs: str | Path | Iterable[str | Path]) -> pd.DataFrame:
    """One row per metrics file: its parameters, its metrics, and what made it.

    Args:
        runs: a folder (every `metrics.json` below it), a glob pattern, or the files themselves.

    Returns:
        Columns: parameters and metrics under their names; `run_protocol`, `run_seconds`,
        `run_peak_memory_bytes`, `run_device`, `run_commit`, `run_file`, `version_<package>`; `run_status`
        (`current`, or `legacy: ` and why), `run_digest` (of its identity, "" without), `run_labels` (see `LABELS`).
        Empty if nothing was run.

    Raises:
        DataError: a file that is missing, is cut off or malformed, lacks a field or holds a NaN.
    """
    rows = []
    for file in _files(runs):
        content = _read_metrics(file)
        parameters, metrics = content["parameters"], content["metrics"]
        if both := sorted(parameters.keys() & metrics.keys()):
            raise DataError(file, f"names {both}", "are parameters and metrics at once", "Rename the metrics")
        rows.append(
            {
                **parameters,
                **metrics,
                **{
                    f"run_{name}": content[name]
                    for name in FIELDS
                    if name not in ("parameters", "metrics", "versions")
                },
                **{f"version_{name}": value for name, value in content["versions"].items()},
                "run_file": str(file),
                "run_status": status_of(content),
                "run_digest": content.get("digest", ""),
                "run_labels": ", ".join(content.get("labels", ())),
            }
        )
    return pd.DataFrame(rows)


def _files(runs) -> list[Path]:
    if not isinstance(runs, (str, Path)):
        return [Path(file) for file in runs]
    path = base = Path(runs).expanduser()
    if path.is_dir():
        return sorted(path.rglob("metrics.json"))
    if path.exists() or not any(mark in str(path) for mark in "*?["):
        return [path]
    while not base.is_dir():  # the folders that exist are no pattern, whatever their names
        base = base.parent
    return sorted(base.glob(str(path.relative_to(base))))


def _read_metrics(file: Path) -> dict:
    def refuse(constant: str):
        raise ValueError(f"it contains {constant}")

    remedy = "Delete it and run again"
    try:
        content = json.loads(file.read_text(encoding="utf-8"), parse_constant=refuse)
    except OSError as error:
        raise DataError(file, "the file", f"cannot be read ({error.strerror})", "Run it first") from error
    except ValueError as error:
        raise DataError(file, "the file", f"is not a whole metrics file ({error})", remedy) from error
    if not isinstance(content, dict):
        raise DataError(file, "the file", "is not a JSON object", remedy)
    if missing := [name for name in FIELDS if name not in content]:
        raise DataError(file, "the file", f"lacks {', '.join(missing)}", remedy)
    for name in ("parameters", "metrics", "versions"):
        if not isinstance(content[name], dict):
            raise DataError(file, name, "is not a JSON object", remedy)
    return content
