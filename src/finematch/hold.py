"""One run at a time in a folder: a second process is told at once who is at work there."""

from __future__ import annotations

import json
import os
import socket
import sys
import time
from contextlib import suppress
from pathlib import Path

from filelock import FileLock, Timeout

WHO = ".running.json"
_held: dict[Path, FileLock] = {}  # of this process


class Busy(RuntimeError):
    """Another process is at work in the folder; the message says which, and since when."""


class hold:
    """Hold `folder` for this process: `with hold(folder):`, or `held = hold(folder).take()` until `held.release()`.

    Within one process it may be taken again, so that a notebook's cell can run twice: the process lets go when all
    that took the folder have released it. The system frees the folder of a process that ends or is killed.
    Of several processes that train together (torchrun) only the first takes it; the others go on without.

    Raises:
        Busy: By `take` and `with`, if another process holds the folder.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder).resolve()

    def take(self) -> hold:
        if int(os.environ.get("RANK", "0")):
            return self
        self.folder.mkdir(parents=True, exist_ok=True)
        lock = _held.get(self.folder) or FileLock(self.folder / ".running.lock", timeout=0)
        try:
            lock.acquire()
        except Timeout:
            raise Busy(self._message()) from None
        _held[self.folder] = lock
        if lock.lock_counter == 1:
            who = {
                "pid": os.getpid(),
                "host": socket.gethostname(),
                "since": time.strftime("%Y-%m-%d %H:%M:%S"),
                "command": " ".join(sys.argv)[:300],
            }
            part = self.folder / f"{WHO}.{os.getpid()}"
            part.write_text(json.dumps(who))
            part.replace(self.folder / WHO)
        return self

    def release(self) -> None:
        """Let go once; nothing happens if this process does not hold the folder."""
        lock = _held.get(self.folder)
        if lock is None:
            return
        if lock.lock_counter == 1:
            (self.folder / WHO).unlink(missing_ok=True)
            del _held[self.folder]
        lock.release()

    def __enter__(self) -> hold:
        return self.take()

    def __exit__(self, *_) -> None:
        self.release()

    def _message(self) -> str:
        who = {}
        for _ in range(10):  # who has just taken it writes this a moment later
            with suppress(OSError, ValueError):
                who = json.loads((self.folder / WHO).read_text())
                break
            time.sleep(0.05)
        said = (
            ": pid {pid} on {host}, since {since} ({command})".format(**who)
            if {"pid", "host", "since", "command"} <= who.keys()
            else ""
        )
        return (
            f"another run is at work in {self.folder}{said}. "
            "Wait for it, end it (in JupyterLab: shut its kernel down), or give this run another `out`"
        )
