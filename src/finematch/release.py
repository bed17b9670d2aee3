"""Reference runs as one archive, so that a first look at a trained model needs no training.

    python -m finematch release finematch-release.zip                # one run a method, or those that are named
    python -m finematch release --open finematch-release.zip         # a file or an address
    open_run("latest", method="mvam")                                # as any run; make lab opens the archive by itself

A zip with, of each run, `metrics.json` (settings, metrics, identity), weights and log, and the frozen networks of the
cache that look at its images. `release.json` in it has the size and the SHA-256 of every other member. The same runs
give the same bytes.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
import shutil
import tempfile
import urllib.request
import warnings
import zipfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from finematch.config import OUTSIDE_IDENTITY, root
from finematch.files import ENTRY, DataError, asked_for, disguise, file_digests, write_atomically
from finematch.runs import _identity_in, _read_metrics, open_run

CONTENTS = "release.json"
METHODS = ("mvam", "hslm", "felga", "slan")
NETWORKS = (
    "attribute_net",
    "word_net",
    "small_clip",
)  # kinds of cache entries: frozen networks that were trained here
# nothing else is packed, or unpacked: no page, no code, no way out of the two folders
_PART = r"(?!\.\.?(?:/|$))[\w.+=-]+"
MEMBER = re.compile(
    rf"runs/[a-z]+/{_PART}/(?:{_PART}/)?(?:metrics\.json|log\.jsonl|best\.safetensors)"
    rf"|cache/(?:{_PART}/)?(?:{'|'.join(NETWORKS)})-[0-9a-f]{{16}}/{_PART}"
)
REMEDY = "Download it again, or pack it again (python -m finematch release)"


# ------------------------------------------------------------------------------------------- pack
def reference_runs() -> list[Path]:
    """Of each method the finished run with weights that is nearest to its preset on the embedded set."""
    found = []
    for method in METHODS:
        runs = []
        for file in sorted((root() / "papermill_runs" / method).glob("*/metrics.json")):
            content = _read_metrics(file)
            weights, p = content.get("weights", {}), content["parameters"]
            of = content.get("identity", {}).get("method")
            if (
                of != method
                or p["smoke"]
                or not weights
                or not all((file.parent / w).is_file() for w in weights)
            ):
                continue
            with warnings.catch_warnings():  # of a legacy run, which comes after all others
                warnings.simplefilter("ignore")
                run = open_run(file.parent)
            changed = run.settings.changed.keys() - OUTSIDE_IDENTITY.keys() - {"seed"}
            order = (
                p["dataset"] != "scenes",
                p["scale"] != "tiny",
                len(changed),
                p["seed"],
                file.parent.name,
            )
            runs.append((*order, file.parent.name, file.parent))
        found += [min(runs)[-1]] if runs else []
    if not found:
        raise DataError(root() / "papermill_runs", "finished runs", "are not here with their weights",
                        "Run a method's 2_train first, or name runs")  # fmt: skip
    return found


def pack(
    archive: str | Path, runs: Iterable[str | Path] = (), *, networks: bool = True, echo: Callable = print
) -> Path:
    """Write finished runs into an archive, atomically.

    Args:
        runs: their folders; none: `reference_runs`.
        networks: with the frozen networks that look at their images, for which the runs' data are opened.

    Raises:
        DataError: A run has not finished, or lacks weights; two have one name; the archive cannot be written.
    """
    archive, members, stated = Path(archive).expanduser(), {}, {}
    for folder in list(runs) or reference_runs():
        run = open_run(folder)
        name, weights = (
            f"{run.folder.parent.name}/{run.folder.resolve().name}",
            run.content.get("weights", {}),
        )
        if lacking := [one for one in weights if not (run.folder / one).is_file()] or (
            [] if weights else ["weights"]
        ):
            raise DataError(
                run.folder, lacking[0], "is not here, or its digest was never stated", "Run it again"
            )
        if name in stated:
            raise DataError(run.folder, name, "is the name of two runs", "Name one of them alone")
        stated[name] = run.digest
        parts = ["metrics.json", *weights, *(["log.jsonl"] if (run.folder / "log.jsonl").is_file() else [])]
        members |= {f"runs/{name}/{part}": run.folder / part for part in parts}
        for entry in _networks(run) if networks else ():
            within = entry.relative_to(root() / run.parameters["cache"]).as_posix()
            kept = json.loads((entry / ENTRY).read_text(encoding="utf-8"))["parts"]
            members |= {f"cache/{within}/{part}": entry / part for part in (ENTRY, *kept)}
        echo(f"{name}: {len(parts)} files")
    if odd := [name for name in members if not MEMBER.fullmatch(name)]:
        raise DataError(members[odd[0]], odd[0], "has a name that no release has",
                        "Name the folder <method>/<letters, digits, . + = ->")  # fmt: skip
    names = sorted(members)
    sums = file_digests([members[name] for name in names])
    sizes = {name: {"bytes": members[name].stat().st_size, "sha256": sha256}
             for name, sha256 in zip(names, sums, strict=True)}  # fmt: skip
    contents = json.dumps({"format": 1, "runs": stated, "members": sizes}, indent=1, sort_keys=True)

    def write(part: Path) -> None:
        with zipfile.ZipFile(part, "w", zipfile.ZIP_STORED) as file:  # weights do not shrink
            for name in (CONTENTS, *names):
                source = io.BytesIO(contents.encode()) if name == CONTENTS else members[name].open("rb")
                info = zipfile.ZipInfo(
                    name
                )  # of 1980, with the rights of an ordinary file: bytes say nothing of when
                info.external_attr = 0o644 << 16
                info.file_size = len(contents) if name == CONTENTS else sizes[name]["bytes"]
                with source, file.open(info, "w") as target:
                    shutil.copyfileobj(source, target, 2**20)

    write_atomically(archive, write)
    return archive


def _networks(run) -> list[Path]:
    """The cache's folders of the frozen networks that a run's images pass, known by what opening its data asks for."""
    with asked_for() as folders:
        run.data  # noqa: B018
    return [folder for folder in dict.fromkeys(folders) if folder.name.rpartition("-")[0] in NETWORKS]


# ------------------------------------------------------------------------------------------- unpack
def unpack(archive: str | Path, *, runs: str | Path = "", cache: str | Path = "") -> dict[Path, bool]:
    """Unpack an archive into the workbook; by run folder, whether something was missing in it.

    Nothing is written before all members were found whole and every run has a place. A run that is here already is
    left as it is, but gets what it lacks (git keeps the metrics of runs, not the weights).

    Args:
        archive: a file, or an address (http, https).
        runs, cache: where to; the workbook's `papermill_runs` and `data/cache`.

    Raises:
        DataError: The archive is damaged or holds what no release holds, or another run lies where one belongs.
    """
    runs, cache = (
        Path(given or root() / own) for given, own in ((runs, "papermill_runs"), (cache, "data/cache"))
    )
    with _local(archive) as file:
        try:
            with zipfile.ZipFile(file) as opened:
                members = _checked(archive, opened)
                names = sorted(
                    {"/".join(name.split("/")[1:3]) for name in members if name.startswith("runs/")}
                )
                for name in names:
                    _place(archive, name, opened, runs)
                _write_networks(opened, cache, members)
                wrote = {runs / name: False for name in names}
                for name in sorted(
                    members, key=lambda name: name.endswith("metrics.json")
                ):  # the proof comes last
                    if name.startswith("runs/"):
                        target = runs / name.removeprefix("runs/")
                        if not target.exists():
                            wrote[runs.joinpath(*name.split("/")[1:3])] = True
                            _write(opened, name, target)
        except (zipfile.BadZipFile, EOFError, NotImplementedError, RuntimeError) as error:
            raise DataError(
                archive, "the archive", f"is no whole zip ({disguise(file) or error})", REMEDY
            ) from error
        except OSError as error:
            raise DataError(archive, "the archive", f"cannot be read ({error})", "Check the file") from error
    return wrote


@contextmanager
def _local(archive: str | Path) -> Iterator[Path]:
    """The archive as a file here, downloaded for the while if it is an address."""
    if not re.match(r"https?://", str(archive)):
        yield Path(archive).expanduser()
        return
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "release.zip"
        try:
            with urllib.request.urlopen(str(archive), timeout=60) as source, file.open("wb") as target:
                shutil.copyfileobj(source, target, 2**20)
        except (OSError, ValueError) as error:
            raise DataError(archive, "the address", f"cannot be read ({error})",
                            "Check it and your network, or download the file and give its path") from error  # fmt: skip
        yield file


def _checked(archive: str | Path, opened: zipfile.ZipFile) -> dict[str, tuple[int, str]]:
    """The members that release.json states, each found whole."""
    infos = opened.infolist()
    try:
        if opened.getinfo(CONTENTS).file_size > 2**24:
            raise ValueError("it is too large")
        stated = json.loads(opened.read(CONTENTS))
        members = {
            str(name): (int(one["bytes"]), str(one["sha256"])) for name, one in stated["members"].items()
        }
        if stated["format"] != 1:
            raise ValueError(f"it is of format {stated['format']}; update finematch")
    except (KeyError, ValueError, TypeError, AttributeError) as error:
        raise DataError(archive, CONTENTS, f"is missing or damaged ({error})", REMEDY) from error
    for info in infos:
        if info.filename != CONTENTS and not MEMBER.fullmatch(info.filename):
            raise DataError(archive, info.filename, "is nothing that a release holds: it is not unpacked",
                            "Take a release of a source that you trust")  # fmt: skip
    names = [info.filename for info in infos]
    if sorted(names) != sorted([CONTENTS, *members]):
        odd = sorted({*names} ^ {CONTENTS, *members}) or sorted(
            name for name in names if names.count(name) > 1
        )
        raise DataError(archive, odd[0], f"is in the archive or in {CONTENTS}, not in both, or twice", REMEDY)
    for info in infos:
        if info.filename != CONTENTS:
            size, sha256 = members[info.filename]
            if info.file_size != size or _sha256(opened, info.filename) != sha256:
                raise DataError(
                    archive, info.filename, "is damaged: its bytes are not those that were packed", REMEDY
                )
    return members


def _sha256(opened: zipfile.ZipFile, name: str) -> str:
    with opened.open(name) as member:
        return hashlib.file_digest(member, "sha256").hexdigest()


def _place(archive: str | Path, name: str, opened: zipfile.ZipFile, runs: Path) -> None:
    """Refuse a folder that holds another run, or one of this identity that was trained elsewhere."""
    folder = runs / name
    try:
        now = json.loads(opened.read(f"runs/{name}/metrics.json"))
        identity, weights = now.get("identity"), now.get("weights")
    except (KeyError, ValueError, AttributeError) as error:
        raise DataError(archive, f"run {name}", f"has no metrics ({error})", REMEDY) from error
    if (was := _identity_in(folder)) is None:
        return
    file = folder / "metrics.json"
    here = _read_metrics(file).get("weights") if file.is_file() else None
    if was != identity or here != weights:
        why = "another run" if was != identity else "a training of its own of this run"
        raise DataError(folder, "the run", f"is {why}: nothing was unpacked",
                        "Move the folder away, or unpack elsewhere (--into)")  # fmt: skip


def _write(opened: zipfile.ZipFile, name: str, target: Path) -> None:
    def copy(part: Path) -> None:
        with opened.open(name) as source, part.open("wb") as file:
            shutil.copyfileobj(source, file, 2**20)

    write_atomically(target, copy)


def _write_networks(opened: zipfile.ZipFile, cache: Path, members: Iterable[str]) -> None:
    """Entries of the cache that are not there yet, each under its name when it is whole."""
    for folder in sorted({name.removeprefix("cache/").rpartition("/")[0] for name in members
                          if name.startswith("cache/")}):  # fmt: skip
        if (cache / folder).exists():
            continue
        part = (cache / folder).with_name(f"{Path(folder).name}.unpacking")
        shutil.rmtree(part, ignore_errors=True)
        for name in (name for name in members if name.rpartition("/")[0] == f"cache/{folder}"):
            _write(opened, name, part / name.rpartition("/")[2])
        part.rename(cache / folder)
