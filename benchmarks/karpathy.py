"""Speed of reading Karpathy's JSON, beside `json.load` of the same file, which checks and builds nothing.

The file is drawn at COCO's size: 123,287 images with five sentences of tokens, in COCO's splits and folders. `--file`
adds a real one. Both read alternately in one process, on CPU time; ours returns the checked records of a split.

    python benchmarks/karpathy.py         writes benchmarks/karpathy.json (2 minutes on one core, 3 GB)
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np

from finematch.data.karpathy import load_karpathy
from finematch.files import write_json
from finematch.runs import git_commit, versions

SPLITS = {"train": 82783, "restval": 30504, "val": 5000, "test": 5000}  # COCO's


def draw(path: Path) -> Path:
    """A file of COCO's size in Karpathy's format."""
    rng, words = np.random.default_rng(0), [f"word{i}" for i in range(5000)]
    images, sentid = [], 0
    for split, count in SPLITS.items():
        folder = "train2014" if split == "train" else "val2014"
        for _ in range(count):
            imgid, sentences = len(images), []
            for _ in range(5):
                tokens = [words[i] for i in rng.integers(0, len(words), int(rng.integers(8, 14)))]
                sentences.append(
                    {"tokens": tokens, "raw": " ".join(tokens) + ".", "imgid": imgid, "sentid": sentid}
                )
                sentid += 1
            images.append({"filepath": folder, "sentids": [s["sentid"] for s in sentences],
                           "filename": f"COCO_{folder}_{imgid:012d}.jpg", "imgid": imgid, "split": split,
                           "sentences": sentences, "cocoid": imgid})  # fmt: skip
    path.write_text(json.dumps({"images": images, "dataset": "coco"}))
    return path


def clock(function) -> tuple[float, object]:
    start = time.process_time()
    result = function()
    return time.process_time() - start, result


def measure(path: Path, split: str, repeats: int) -> dict:
    """CPU seconds of both, one after the other, `repeats` times."""
    ours, theirs = [], []
    for _ in range(repeats):
        with path.open(encoding="utf-8") as file:
            seconds, content = clock(lambda f=file: json.load(f))
        theirs.append(seconds)
        wanted = ("train", "restval") if split == "trainrestval" else (split,)
        count = sum(entry["split"] in wanted for entry in content["images"])
        del content
        seconds, records = clock(lambda: load_karpathy(path, path.parent, split, check_images=False))
        ours.append(seconds)
        assert len(records) == count
        del records
    speed = statistics.median(theirs) / statistics.median(ours)
    return {"bytes": path.stat().st_size, "split": split, "records": count, "ours_cpu_seconds": ours,
            "json_load_cpu_seconds": theirs, "speed_relative_to_json_load": speed}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--file", type=Path, help="a real dataset_*.json, whose train split is read too")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".json"))
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = {
            "coco_size": measure(draw(Path(folder) / "dataset_coco.json"), "trainrestval", options.repeats)
        }
    if options.file:
        found[options.file.name] = measure(options.file, "train", options.repeats)
    found |= {
        "load_average": os.getloadavg()[0],
        "device": processor(),
        "versions": versions(),
        "commit": git_commit(),
    }
    write_json(options.out, found)
    print(json.dumps(found, indent=1))


def processor() -> str:
    from finematch.training import device_name

    return device_name()


if __name__ == "__main__":
    main()
