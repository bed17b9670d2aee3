"""Files: one atomic writer, digests of contents, and one cache for everything that is expensive to make.

A cache entry is a folder `<root>/<kind>-<16 hex digits>/`, named by the digest of its key. The key says what made the
content: digests of the data, weights and all settings, never paths. `entry.json` in it repeats the key and has the size
and the SHA-256 of every other file, so that damage is noticed when the entry is read.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import io
import json
import os
import pickle
import re
import shutil
import sqlite3
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from itertools import chain
from pathlib import Path
from typing import IO, Any

import numpy as np
from filelock import FileLock, Timeout
from safetensors import SafetensorError

ENTRY = "entry.json"
THREADS = 8  # that read files at once: on a network disk the waiting is shared
RECENT = 1.0  # seconds: a file that changed just now may change again within one tick of its clock
# what an operating system says of a disk that is full, or a folder that cannot be written
NO_ROOM = {
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EFBIG,
    errno.EROFS,
    errno.EACCES,
    errno.EPERM,
    errno.ENOTDIR,
    errno.EEXIST,
}


class DataError(ValueError):
    """Bad input. The message names the file, the record in it, and the remedy."""

    def __init__(self, file: str | Path, record: str, problem: str, remedy: str):
        super().__init__(f"{file}: {record}: {problem}. {remedy}.")
        self.file, self.record, self.problem, self.remedy = str(file), record, problem, remedy


DISGUISES = {  # what stands in a file's place, by its first bytes
    b"version https://git-lfs": "it is a pointer of git-lfs: run git lfs pull",
    b"<!doctype html": "it is a web page: the link has moved, or wants a login",
    b"<html": "it is a web page: the link has moved, or wants a login",
    b"PK\x03\x04": "it is a zip archive, such as an .npz or a file of torch",
    b"\x1f\x8b": "it is packed with gzip: unpack it",
    b"\x89HDF": "it is HDF5",
    b"\x80": "it is a pickle, which could run code",
}


def disguise(file: str | Path | bytes) -> str:
    """What a file really is, of the things that are often found in the place of another; empty if none of them."""
    try:
        with open(file, "rb") if not isinstance(file, bytes) else io.BytesIO(file) as opened:
            head = opened.read(32).lstrip()
    except OSError:
        return ""
    if not head.strip(b"\0"):
        return "it is empty, or zeros: a download that was cut off"
    return next((what for start, what in DISGUISES.items() if head.lower().startswith(start.lower())), "")


def why_unreadable(file: str | Path, error: Exception) -> str:
    """Why an array or weights cannot be read. The reason never tells a user to load a pickle, which could run code."""
    what = disguise(file)
    zipped = "zip" in what  # as torch's files are, and no .npy
    if (not what or zipped) and ("Python objects" in str(error) or isinstance(error, pickle.UnpicklingError)):
        return "it holds Python objects, which could run code"
    what = "" if zipped and Path(file).suffix != ".npy" else what
    if "allow_pickle" in str(error):
        return what or "it is no array"
    return what or getattr(error, "strerror", None) or str(error)


def read_tensors(path: str | Path) -> dict[str, Any]:
    """The tensors of a safetensors file, or of one that torch wrote, on the CPU; nothing in it is executed.

    Raises:
        DataError: If it is missing, cut off or something else; the message says what.
    """
    import torch  # which the command line does without
    from safetensors.torch import load_file

    try:
        safe = Path(path).suffix == ".safetensors"
        content = load_file(path) if safe else torch.load(path, "cpu", weights_only=True)
        if not all(isinstance(value, torch.Tensor) for value in content.values()):
            raise TypeError("not all of its entries are tensors")
        return content
    except Exception as error:  # torch's readers raise whatever they like
        problem = f"holds no weights that can be read ({why_unreadable(path, error)})"
        raise DataError(path, "the file", problem, "Make or download it again") from error


# ------------------------------------------------------------------------------------------- writing
def write_atomically(path: str | Path, write: Callable[[Path], Any]) -> None:
    """`write` a file beside `path`, flush it to disk, rename it into place: a reader sees the old or the new.

    The folder is made if absent. Who may read the folder may read the file.

    Raises:
        DataError: If it cannot be written; what stood there before still does, and nothing is left beside it.
    """
    path = Path(path)
    part = path.with_name(f"{path.name}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(part)
        with open(part, "rb+") as file:
            os.fsync(file.fileno())
        _share(part)
        os.replace(part, path)
    except (OSError, RuntimeError, SafetensorError) as error:  # torch, safetensors: of a full disk
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)
        raise DataError(
            path, "the file", f"cannot be written ({error})", "Free space, or choose another folder"
        ) from error


def write_text(path: str | Path, text: str) -> None:
    """UTF-8 with line feeds, atomically."""
    write_atomically(path, lambda part: part.write_bytes(text.encode()))


def write_json(path: str | Path, content: Mapping) -> None:
    """Strict JSON (no NaN), atomically."""
    write_text(path, json.dumps(content, indent=1, allow_nan=False, ensure_ascii=False) + "\n")


def new_array(path: str | Path, dtype: np.dtype | type | str, shape: tuple[int, ...]) -> np.memmap:
    """A new .npy file, mapped for writing, whose space is reserved: a full disk is an error now, not SIGBUS later.

    Raises:
        DataError: If the disk cannot hold it, or the file cannot be made; nothing is left behind.
    """
    path, kind = Path(path), np.dtype(dtype)
    size = int(np.prod(shape, dtype=np.int64)) * kind.itemsize
    try:
        free = shutil.disk_usage(path.parent).free
        if size > free:
            raise OSError(errno.ENOSPC, f"needs {size:,} bytes, {free:,} are free")
        array = np.lib.format.open_memmap(path, "w+", kind, shape)
        with open(path, "rb+") as file:
            reserve(file, os.fstat(file.fileno()).st_size)
    except OSError as error:
        with contextlib.suppress(OSError):
            path.unlink(missing_ok=True)
        raise DataError(
            path,
            f"array {shape} of {kind}",
            f"cannot be written ({error.strerror or error})",
            "Free space, or choose another folder",
        ) from error
    return array


def reserve(file: IO, size: int) -> bool:
    """Claim `size` bytes of the disk for an open file; False where the system cannot: macOS, some network disks.

    Raises:
        OSError: The disk cannot hold them.
    """
    try:
        os.posix_fallocate(file.fileno(), 0, size)
    except AttributeError:  # Python on macOS has no such function
        return False
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):
            raise
        return False
    return True


def _share(path: Path) -> None:
    """Let those read a file who can read its folder: some writers make files for their owner alone."""
    mode = path.stat().st_mode
    wanted = mode | (path.parent.stat().st_mode & 0o044)
    if wanted != mode:
        with contextlib.suppress(PermissionError):
            path.chmod(wanted)


# ------------------------------------------------------------------------------------------- digests
def digest(value: Any) -> str:
    """SHA-256 of what JSON can say, whatever the order of its keys; TypeError for anything else."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def run_reference(content: Mapping[str, Any]) -> str:
    """How another run's identity names a finished run, of the content of its metrics file: what made it (`identity`),
    and what it became (`weights`)."""
    return f"run:{digest([content.get('identity', {}), content.get('weights', {})])}"


def file_digest(path: str | Path) -> str:
    """SHA-256 of a file's bytes, or of the names and bytes of all files in a folder; see `file_digests`."""
    path = Path(path)
    if not path.is_dir():
        return file_digests([path])[0]
    files = sorted(p for p in path.rglob("*") if p.is_file())
    names = [p.relative_to(path).as_posix() for p in files]
    return digest(list(zip(names, file_digests(files), strict=True)))


def file_digests(paths: Sequence[str | Path], *, remember: bool = True) -> list[str]:
    """SHA-256 of many files' bytes, in their order.

    A digest is remembered with the file's size and times of change, in `digests.sqlite` of the user's cache folder
    ($FINEMATCH_CACHE, or finematch in $XDG_CACHE_HOME or ~/.cache). Where that cannot be written, this process alone
    remembers it.

    Args:
        remember: False for files that will soon have other names.

    Raises:
        DataError: For a file that cannot be read.
    """
    names = [os.path.abspath(path) for path in paths]
    with ThreadPoolExecutor(THREADS) as pool:
        blocks = [
            names[i : i + 128] for i in range(0, len(names), 128)
        ]  # a task a file costs more than its stamp
        stamped = chain.from_iterable(pool.map(lambda block: [_stamp(name) for name in block], blocks))
        stamps = dict(zip(names, stamped, strict=True))
        found = _recall(stamps)
        missing = [name for name in stamps if name not in found]
        read = dict(zip(missing, pool.map(_sha256, missing), strict=True))
    if remember:
        _remember({name: (stamps[name], read[name]) for name in missing if stamps[name] == _stamp(name)})
    found |= read
    return [found[name] for name in names]


def digest_within(path: str | Path, what: str, make: Callable[[], str]) -> str:
    """The digest of something that a file holds, `make()`; remembered by its name `what` until the file changes."""
    file = os.path.abspath(path)
    name, stamp = f"{file}: {what}", _stamp(file)
    if not (found := _recall({name: stamp})):
        found = {name: make()}
        if stamp == _stamp(file):
            _remember({name: (stamp, found[name])})
    return found[name]


_known: dict[str, tuple[str, str]] = {}  # of this process: path to stamp and digest


def _stamp(name: str) -> str:
    """A file's size and its times of change: of its content, and of that time itself."""
    try:
        state = os.stat(name)
    except OSError as error:
        raise DataError(name, "the file", f"cannot be read ({error.strerror})", "Restore it") from error
    return f"{state.st_size} {state.st_mtime_ns} {state.st_ctime_ns}"


def _sha256(name: str) -> str:
    try:
        with open(name, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise DataError(name, "the file", f"cannot be read ({error.strerror})", "Restore it") from error


@contextlib.contextmanager
def _memory() -> Iterator[sqlite3.Connection]:
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "finematch"
    folder = Path(os.environ.get("FINEMATCH_CACHE") or home)
    folder.mkdir(parents=True, exist_ok=True)
    memory = sqlite3.connect(folder / "digests.sqlite", timeout=20)
    memory.execute("create table if not exists digests (path text primary key, stamp text, sha256 text)")
    try:
        with memory:
            yield memory
    finally:
        memory.close()


def _recall(stamps: Mapping[str, str]) -> dict[str, str]:
    found = {name: _known[name][1] for name, stamp in stamps.items()
             if name in _known and _known[name][0] == stamp}  # fmt: skip
    unknown = [name for name in stamps if name not in found]
    if unknown:
        with contextlib.suppress(sqlite3.Error, OSError, RuntimeError), _memory() as memory:
            for name in unknown:
                query = "select sha256 from digests where path = ? and stamp = ?"
                if row := memory.execute(query, (name, stamps[name])).fetchone():
                    found[name] = row[0]
                    _known[name] = (stamps[name], row[0])
    return found


def _remember(found: Mapping[str, tuple[str, str]]) -> None:
    """Keep stamps and digests by path, but those of files that changed just now."""
    now = time.time()
    settled = {name: (stamp, sha256) for name, (stamp, sha256) in found.items()
               if now - int(stamp.split()[1]) / 1e9 > RECENT}  # fmt: skip
    if not settled:
        return
    _known.update(settled)
    with contextlib.suppress(sqlite3.Error, OSError, RuntimeError), _memory() as memory:
        rows = [(name, *values) for name, values in settled.items()]
        memory.executemany("insert or replace into digests values (?, ?, ?)", rows)


# ------------------------------------------------------------------------------------------- the cache
@dataclass(frozen=True)
class Entry:
    """What a cache holds: `key` says what made it (empty while it is not whole), `size` is in bytes."""

    kind: str
    folder: Path
    key: dict
    size: int
    whole: bool


def cached(root: str | Path, kind: str, key: Mapping[str, Any], make: Callable[[Path], Any]) -> Path:
    """The folder of what `key` names; `make(folder)` fills it where the cache has none.

    `make` works in a folder with the ending `.part`, which survives a kill: called again, it finds what it had written
    and may go on from there. When it returns, `entry.json` is written and the folder gets its name. One process makes
    while others wait. Sizes are checked whenever an entry is asked for, and digests once for each state of a file.

    Args:
        key: JSON values: everything that the content depends on.

    Raises:
        DataError: For an entry that is damaged, or a cache that cannot be written; and what `make` raises.
    """
    folder = _folder(root, kind, key)
    if not folder.is_dir():
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            with FileLock(_lock(folder)):
                if not folder.is_dir():
                    part = folder.with_name(f"{folder.name}.part")
                    part.mkdir(exist_ok=True)
                    make(part)
                    sums = _seal(part, kind, key)
                    part.rename(folder)
                    paths = {os.path.abspath(folder / name): sha256 for name, sha256 in sums.items()}
                    _remember({path: (_stamp(path), sha256) for path, sha256 in paths.items()})
        except OSError as error:
            if error.errno not in NO_ROOM:
                raise
            raise DataError(
                folder, kind, f"cannot be written ({error})", "Free space, or choose another folder"
            ) from error
    _verify(folder, kind, key)
    for asked in _asking:
        asked.append(folder)
    return folder


_asking: list[list[Path]] = []


@contextlib.contextmanager
def asked_for() -> Iterator[list[Path]]:
    """The folders of all entries that `cached` is asked for meanwhile."""
    _asking.append(found := [])
    try:
        yield found
    finally:
        _asking.pop()


def entries(root: str | Path) -> list[Entry]:
    """What lies in a cache, whole or begun, by kind."""
    found = []
    for folder in _entry_folders(Path(root)):
        kind = folder.name.removesuffix(".part").rpartition("-")[0]
        try:
            key = json.loads((folder / ENTRY).read_text(encoding="utf-8"))["key"]
        except (OSError, ValueError, KeyError, TypeError):
            key = {}
        size = sum(path.stat().st_size for path in _files(folder))
        found.append(Entry(kind, folder, key, size, not folder.name.endswith(".part")))
    return found


def clear(root: str | Path, *, kind: str | None = None, only: Iterable[str] = ()) -> list[Entry]:
    """Remove entries of a cache: all, those of one `kind`, or those with the folder names `only`.

    An entry that a process is making is left. Returns what was removed.
    """
    only, removed = {name.removesuffix(".part") for name in only}, []
    for entry in entries(root):
        name = entry.folder.name.removesuffix(".part")
        if (kind is not None and entry.kind != kind) or (only and name not in only):
            continue
        with contextlib.suppress(Timeout), FileLock(_lock(entry.folder.with_name(name)), timeout=0):
            shutil.rmtree(entry.folder)
            removed.append(entry)
    return removed


def _entry_folders(root: Path) -> Iterator[Path]:
    """The folders of all entries under `root`: a cache may have folders of its own, for data sets say."""
    for folder in sorted(root.iterdir()) if root.is_dir() else []:
        if not folder.is_dir() or folder.is_symlink():
            continue
        if re.fullmatch(r".+-[0-9a-f]{16}(\.part)?", folder.name):
            yield folder
        else:
            yield from _entry_folders(folder)


def _folder(root: str | Path, kind: str, key: Mapping[str, Any]) -> Path:
    return Path(root) / f"{kind}-{digest(key)[:16]}"


def _lock(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.lock")


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def _seal(folder: Path, kind: str, key: Mapping[str, Any]) -> dict[str, str]:
    """Write `entry.json`: what the folder is, and the size and digest of every file in it. Returns the digests."""
    files = [path for path in _files(folder) if path.name != ENTRY]
    for path in files:
        _share(path)
    try:
        made_by = version("finematch")
    except PackageNotFoundError:
        made_by = "unknown"
    names = [path.relative_to(folder).as_posix() for path in files]
    sums = dict(zip(names, file_digests(files, remember=False), strict=True))
    parts = {
        name: {"bytes": (folder / name).stat().st_size, "sha256": sha256} for name, sha256 in sums.items()
    }
    write_json(
        folder / ENTRY,
        {"kind": kind, "key": key, "parts": parts, "made_by": made_by},
    )
    return sums


def _verify(folder: Path, kind: str, key: Mapping[str, Any]) -> None:
    """DataError, naming the file and the remedy, unless an entry is what was sealed."""
    remedy = (
        f"Remove {folder}; it is then made again (python -m finematch cache clear --cache {folder.parent})"
    )
    try:
        entry = json.loads((folder / ENTRY).read_text(encoding="utf-8"))
        stated, parts = (
            entry["key"],
            {str(n): (int(p["bytes"]), str(p["sha256"])) for n, p in entry["parts"].items()},
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(folder / ENTRY, kind, f"is damaged ({error!r})", remedy) from error
    if digest(stated) != digest(key):
        raise DataError(folder / ENTRY, kind, "is damaged: it has the key of another entry", remedy)
    for name, (size, _) in parts.items():
        path = folder / name
        if not path.is_file():
            raise DataError(path, kind, "is missing", remedy)
        if path.stat().st_size != size:
            raise DataError(
                path, kind, f"has {path.stat().st_size} bytes, not {size}: it was cut off", remedy
            )
    sums = file_digests([folder / name for name in parts])
    for (name, (_, sha256)), now in zip(parts.items(), sums, strict=True):
        if sha256 != now:
            raise DataError(
                folder / name, kind, "is damaged: its bytes are not those that were written", remedy
            )
