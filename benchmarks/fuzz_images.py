"""Damaged images of twelve formats: does anything but a DataError come out of the one place that opens them?

    python benchmarks/fuzz_images.py [--each 300] [--seed 0]

Of every format `each` files are made from a sound one: cut off, bytes changed, a stretch removed, a stretch repeated,
the header changed. Each is opened as a record is. The results are data: `benchmarks/fuzz_images.json`.
"""

from __future__ import annotations

import argparse
import io
import json
import random
import tempfile
import time
import warnings
from collections import Counter
from pathlib import Path

import numpy as np
import PIL
from PIL import Image

from finematch.data import DataError, Record
from finematch.files import write_json
from finematch.runs import git_commit, versions

FORMATS = ("JPEG", "PNG", "GIF", "BMP", "TIFF", "WEBP", "PPM", "SGI", "TGA", "ICO", "JPEG2000", "AVIF")


def sound(kind: str) -> bytes:
    """An image with content, small, with EXIF where the format has a place for it."""
    rng, file = np.random.default_rng(0), io.BytesIO()
    noise = Image.fromarray(rng.integers(0, 256, (6, 8, 3), np.uint8))
    picture, exif = noise.resize((64, 48), Image.Resampling.BICUBIC), Image.Exif()
    exif[274] = 6
    more = {"exif": exif} if kind in ("JPEG", "PNG", "WEBP", "AVIF", "TIFF") else {}
    (picture.convert("P") if kind == "GIF" else picture).save(file, kind, **more)
    return file.getvalue()


def damage(data: bytes, rng: random.Random) -> bytes:
    """One of five kinds of damage."""
    a, b = sorted(rng.sample(range(len(data)), 2))
    kind, changed = rng.randrange(5), bytearray(data)
    if kind == 0:
        return data[:a]
    if kind == 1:
        for _ in range(rng.randint(1, 20)):
            changed[rng.randrange(len(data))] = rng.randrange(256)
        return bytes(changed)
    if kind == 2:
        return data[:a] + data[b:]
    if kind == 3:
        return data[:b] + data[a:]
    for _ in range(rng.randint(1, 6)):
        changed[rng.randrange(min(64, len(data)))] = rng.randrange(256)
    return bytes(changed)


def fuzz(kind: str, each: int, seed: int, folder: Path) -> dict:
    """What becomes of `each` damaged files of a format."""
    rng, data, found, bare = random.Random(f"{seed} {kind}"), sound(kind), Counter(), Counter()
    for number in range(each):
        path = folder / f"{kind}{number}"
        path.write_bytes(damage(data, rng))
        try:
            Record(path.name, "train", ("a thing",), path).open()
            found["opened"] += 1
        except DataError as error:
            found["refused"] += 1
            if error.file != str(path) or not error.record:
                raise RuntimeError(f"it names no file or no record: {error}") from error
            if not isinstance(error.__cause__, OSError):
                found["of them no OSError"] += 1
        except Exception as error:
            bare[type(error).__name__] += 1
        path.unlink()
    return {"files": each, **found, "bare": dict(bare)}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--each", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    options, start = parser.parse_args(), time.perf_counter()
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as folder:
        results = {kind: fuzz(kind, options.each, options.seed, Path(folder)) for kind in FORMATS}
    total = {"formats": len(results), "files": sum(r["files"] for r in results.values()),
             "bare": sum(sum(r["bare"].values()) for r in results.values())}  # fmt: skip
    print(json.dumps({**results, "all": total}, indent=1))
    content = {"each": options.each, "seed": options.seed, "results": results, "all": total,
               "seconds": round(time.perf_counter() - start, 1),
               "versions": versions() | {"pillow": PIL.__version__}, "commit": git_commit()}  # fmt: skip
    write_json(Path(__file__).with_suffix(".json"), content)


if __name__ == "__main__":
    main()
