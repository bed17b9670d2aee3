"""Rows of many items, made block by block into arrays on disk; work that was broken off goes on from its last block.

Axes: `n` items, `r` rows of a block.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Int

from finematch.files import DataError, new_array, write_text


def write_rows(
    folder: Path,
    start: Int[np.ndarray, "_"],
    make: Callable[[range], Mapping[str, np.ndarray]],
    names: Sequence[str],
    *,
    block: int,
    echo: Callable[[int], None] | None = None,
) -> None:
    """Write `<name>.npy` for each array that `make` returns; item i has the rows `start[i]` to `start[i + 1]`.

    After every block the arrays are flushed, and `progress.json` says how many items are done. Called again in the same
    folder, it goes on from there: it is meant for the folder that `files.cached` gives.

    Args:
        folder: its name belongs to these items and settings alone.
        make: the rows "r ..." of a range of items by name, in the type that they are kept in; it is not asked for items
            that have none.
        names: of the items, for errors.
        block: items at a time.
        echo: told how many items are done, every 32 blocks and at the end.

    Raises:
        DataError: For a value that is not finite, or a disk without room.
    """
    n, note = len(start) - 1, folder / "progress.json"
    done, arrays = _begun(folder, note)
    while done < n:
        stop = min(done + block, n)
        if start[stop] > start[done]:
            with np.errstate(over="ignore"):  # infinities are found below
                made = make(range(done, stop))
            for name, values in made.items():
                path = folder / f"{name}.npy"
                finite = np.isfinite(values).all(axis=tuple(range(1, values.ndim)))
                if not finite.all():
                    bad = int(np.searchsorted(start, start[done] + np.argmin(finite), side="right")) - 1
                    raise DataError(path, f"item {names[bad]!r}", f"a value is not finite in {values.dtype}",
                                    "Check the item and the model's weights")  # fmt: skip
                if name not in arrays:
                    arrays[name] = new_array(path, values.dtype, (int(start[-1]), *values.shape[1:]))
                arrays[name][start[done] : start[stop]] = values
                arrays[name].flush()
        done = stop
        write_text(note, json.dumps({"done": done, "arrays": list(arrays)}))
        if echo and (done == n or (done // block) % 32 == 0):
            echo(done)
    note.unlink()


def _begun(folder: Path, note: Path) -> tuple[int, dict[str, np.ndarray]]:
    """How many items a stopped run has done, and its arrays; none where a note or an array was cut off."""
    try:
        state = json.loads(note.read_text())
        paths = {name: folder / f"{name}.npy" for name in state["arrays"]}
        for path in paths.values():
            np.load(path, mmap_mode="r")  # ValueError if it was cut off; "r+" fills it with zeros
        arrays = {name: np.lib.format.open_memmap(path, "r+") for name, path in paths.items()}
        return (int(state["done"]), arrays) if arrays else (0, {})
    except (OSError, ValueError, KeyError, TypeError):
        return 0, {}
