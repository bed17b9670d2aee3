"""Sets that are passed on as tables: parquet files, or a folder that the `datasets` library saved (`load_from_disk`).

They are unpacked once into Karpathy's layout, which `load_karpathy` then reads: an image stands inside a row (as bytes,
or a struct of `bytes` and `path`) and is written to a file, or beside the tables, under the row's name. Columns:

    captions   `sentences` (texts, or structs with `raw` and `sentid`), `sentences_raw`, `captions`, `caption` or
               `text` (a text or several), or `caption_0`, `caption_1` ...
    name       `filepath`, `filename` or `file_name`, or the `path` inside the image; else the image's bytes name it
    split      `split`; else as the file or folder is called (`train-00000-of-00009.parquet`, `validation/...`)
    ids        `cocoid`, and `sentids` or `sentences_sentid`, where there are any

Some copies have a row for every caption: rows of one name become one image.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from filelock import FileLock

from finematch.data.checks import check_name, read_json, reading
from finematch.data.record import DataError
from finematch.files import why_unreadable, write_text

ROWS = 64  # that are in memory at a time, images and all
SPLITS = {"train": "train", "restval": "restval", "val": "val", "validation": "val", "valid": "val", "dev": "val",
          "test": "test"}  # fmt: skip


def tables(folder: str | Path) -> list[Path]:
    """The tables of a folder: parquet files, or the arrow files that its `state.json` (of `datasets`) lists."""
    folder, found = Path(folder), []
    for state in sorted(folder.rglob("state.json")):
        content = read_json(state)
        with reading(state, "`_data_files`"):
            if content.get("_indices_data_files") or content.get("_indices_files"):
                raise DataError(
                    state, "the indices", "choose rows of the table", "Save it with save_to_disk again"
                )
            found += [
                state.parent / check_name(one["filename"], state, "a file") for one in content["_data_files"]
            ]
    return found or sorted(folder.rglob("*.parquet"))


def unpack(folder: str | Path, json_path: str | Path, image_dir: str | Path, dataset: str = "") -> None:
    """Write the tables of `folder` as Karpathy's `dataset_*.json`, and the images that stand in them below `image_dir`.

    The json comes last: an unpacking that was stopped is begun again, and images that are there stay.

    Args:
        dataset: the name that the json states; Flickr's photo ids are recognised by it (`data.names`).

    Raises:
        DataError: pyarrow is not installed, a table that cannot be read or has no captions, a row of an unknown split,
            an image in two splits, a name that leads out of the folder.
    """
    json_path, entries = Path(json_path), {}
    with FileLock(json_path.with_name(f".{json_path.name}.lock")):
        if json_path.exists():
            return
        for table in tables(folder):
            for number, row in enumerate(_rows(table)):
                with reading(table, f"row {number}"):
                    _add(entries, row, table, number, Path(image_dir))
        content = {"dataset": dataset, "images": list(entries.values())}
        write_text(json_path, json.dumps(content, ensure_ascii=False))


def _rows(table: Path) -> Iterator[dict[str, Any]]:
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError as error:
        raise DataError(table, "the table", "pyarrow is not installed", "pip install pyarrow") from error
    try:
        if table.suffix == ".parquet":
            batches = pq.ParquetFile(table).iter_batches(batch_size=ROWS)
        else:
            stream = pa.ipc.open_stream(pa.memory_map(str(table)))
            batches = (b.slice(i, ROWS) for b in stream for i in range(0, b.num_rows, ROWS))
        for batch in batches:
            yield from batch.to_pylist()
    except (pa.ArrowException, OSError) as error:
        raise DataError(
            table, "the table", f"cannot be read ({why_unreadable(table, error)})", "Download it again"
        ) from error


def _add(entries: dict[str, dict], row: dict[str, Any], table: Path, number: int, image_dir: Path) -> None:
    """Put a row's captions with those of its image, and the image into a file."""
    data, name = _image(row)
    check_name(name, table, f"row {number}")
    split = _split(row, table, number)
    said = _captions(row)
    if not said:
        raise DataError(table, f"row {number}", f"has no captions; its columns are {', '.join(row)}",
                        "Rename the column that has them to `captions`")  # fmt: skip
    if name not in entries:
        entries[name] = {
            "filename": name,
            "split": split,
            "imgid": len(entries),
            "sentids": [],
            "sentences": [],
        }
        if row.get("cocoid") is not None:
            entries[name]["cocoid"] = int(row["cocoid"])
        path = image_dir / name
        if data is not None and not (path.exists() and path.stat().st_size == len(data)):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
    entry = entries[name]
    if entry["split"] != split:
        raise DataError(
            table, f"row {number}", f"{name} is of {split}, and above of {entry['split']}", "Remove one"
        )
    for raw, sentid in said:
        sentid = f"{name} {len(entry['sentids'])}" if sentid is None else sentid
        if sentid not in entry["sentids"]:
            entry["sentids"].append(sentid)
            entry["sentences"].append({"raw": raw, "sentid": sentid})


def _image(row: dict[str, Any]) -> tuple[bytes | None, str]:
    """The image's bytes where the row has them, and the name of its file below the image folder."""
    image = row.get("image")
    data, path = (image.get("bytes"), image.get("path")) if isinstance(image, dict) else (image, None)
    data, path = (None, data) if isinstance(data, str) else (data, path)
    name = row.get("filename") or row.get("file_name") or (path and Path(path).name)
    if not name:
        if data is None:
            raise KeyError("filename")
        name = f"x{hashlib.sha256(data).hexdigest()[:24]}.jpg"
    return data, f"{row['filepath']}/{name}" if row.get("filepath") else str(name)


def _split(row: dict[str, Any], table: Path, number: int) -> str:
    stated = [row["split"]] if row.get("split") else [re.split(r"[-.]", table.name)[0], table.parent.name]
    found = next((SPLITS[name] for name in stated if name in SPLITS), None)
    if found is None:
        raise DataError(
            table, f"row {number}", f"is of split {' or '.join(stated)!r}", f"Use {', '.join(SPLITS)}"
        )
    return found


def _captions(row: dict[str, Any]) -> list[tuple[str, Any]]:
    """Captions, each with its id where there is one."""
    found = next(
        (row[n] for n in ("sentences", "sentences_raw", "captions", "caption", "text") if row.get(n)), None
    )
    if found is None:
        numbered = (name for name in row if re.fullmatch(r"caption_?\d+", name) and row[name])
        found = [row[name] for name in sorted(numbered, key=lambda name: int(re.sub(r"\D", "", name)))]
    if isinstance(found, dict):  # a struct, of one caption or of lists
        raw, ids = found["raw"], found.get("sentid")
        found = [{"raw": raw, "sentid": ids}] if isinstance(raw, str) else raw
    else:
        found = [found] if isinstance(found, str) else found
        ids = row.get("sentences_sentid") or row.get("sentids")
    if found and isinstance(found[0], dict):
        return [(one["raw"], one.get("sentid")) for one in found]
    if not isinstance(ids, list) or len(ids) != len(found):
        ids = [None] * len(found)
    return list(zip(found, ids, strict=True))
