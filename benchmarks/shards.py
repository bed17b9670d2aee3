"""Reading shards: our loader, which stands on webdataset, beside a plain webdataset pipeline.

Images of 640 x 480 (JPEG, quality 90, 5 captions each) in shards; both decode by PIL, resize to 224 x 224, tokenise
one caption an image, and give batches of 64. The plain pipeline is webdataset's own: its shard list, its tar reader,
its shuffle buffer, `WebLoader` and its batches; it has no order that could be entered again. Both are read
alternately, from the page cache, from beginning to end; the ratio is of median images a second of whole passes.
"resume" is the time to the first batch of an epoch entered in the middle: by skipping shards, and by decoding and
dropping what lies before it.

    python benchmarks/shards.py       writes benchmarks/shards.json
"""

from __future__ import annotations

import argparse
import io
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch
import webdataset as wds
from PIL import Image, ImageFilter
from tabulate import tabulate

from finematch.data import Record
from finematch.data.pairs import to_pixels
from finematch.data.shards import ShardPairs, write_shards
from finematch.files import write_json
from finematch.runs import git_commit, versions
from finematch.scenes.generator import TOKENIZER
from finematch.text import tokenise, word_level
from finematch.training import device_name

BATCH, SIDE = 64, 224


def drawn(folder: Path, images: int) -> list[Record]:
    """Records of smoothed noise: about the bytes of a photo of that size."""
    rng, records = np.random.default_rng(0), []
    folder.mkdir()
    for k in range(images):
        noise = rng.integers(0, 256, (120, 160, 3), np.uint8)
        picture = Image.fromarray(noise).resize((640, 480), Image.Resampling.BICUBIC)
        picture.filter(ImageFilter.GaussianBlur(1)).save(folder / f"{k}.jpg", quality=90)
        captions = tuple(f"a small red thing left of a large blue thing {k} {c}" for c in range(5))
        records.append(Record(str(k), "train", captions, image=folder / f"{k}.jpg"))
    return records


def plain(folder: Path, transform: Callable, tokenizer, workers: int, buffer: int) -> Iterator:
    """webdataset's usual pipeline, over the same shards."""

    def pair(sample: dict) -> tuple:
        with Image.open(io.BytesIO(sample["jpg"])) as picture:
            pixels = transform(picture.convert("RGB"))
        return pixels, json.loads(sample["json"])["captions"][0]

    def batch(pairs: list[tuple]) -> dict:
        texts = tokenise([caption for _, caption in pairs], tokenizer).batch(np.arange(len(pairs)))
        return {"image": torch.stack([pixels for pixels, _ in pairs]), "text": texts}

    urls = [str(path) for path in sorted(folder.glob("*.tar"))]
    data = wds.WebDataset(urls, shardshuffle=len(urls), seed=0, empty_check=False).shuffle(buffer).map(pair)
    return iter(wds.WebLoader(data.batched(BATCH, collation_fn=batch), batch_size=None, num_workers=workers))


def rate(batches: Iterator) -> float:
    """Images a second of a whole pass."""
    start = time.perf_counter()
    count = sum(len(batch["text"]["input_ids"]) for batch in batches)
    return count / (time.perf_counter() - start)


def first_batch(batches: Iterator) -> float:
    start = time.perf_counter()
    next(iter(batches))
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=384)
    parser.add_argument("--samples-per-shard", type=int, default=48)
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 2])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".json"))
    options = parser.parse_args()
    torch.set_num_threads(1)

    transform = to_pixels(SIDE, (0.5,) * 3, (0.5,) * 3)
    tokenizer = word_level(TOKENIZER)
    with tempfile.TemporaryDirectory() as root:
        folder = Path(root) / "shards"
        records = drawn(Path(root) / "images", options.images)
        size = statistics.mean(record.image.stat().st_size for record in records)
        write_shards(records, folder, samples_per_shard=options.samples_per_shard, echo=None)
        ours = ShardPairs({"set": folder}, transform, tokenizer)
        content: dict = {"images": options.images, "bytes_an_image": size, "batch_size": BATCH, "side": SIDE,
                         "repeats": options.repeats, "samples_per_shard": options.samples_per_shard}  # fmt: skip
        rows = []
        for workers in options.workers:
            rates: dict[str, list[float]] = {"ours": [], "webdataset": []}
            for repeat in range(options.repeats):
                rates["ours"].append(rate(ours.batches(BATCH, seed=0, epoch=repeat, workers=workers)))
                buffer = ours.shards_at_once * options.samples_per_shard
                rates["webdataset"].append(rate(plain(folder, transform, tokenizer, workers, buffer)))
            median = {name: statistics.median(values) for name, values in rates.items()}
            ratio = median["ours"] / median["webdataset"]
            content[f"{workers}_workers"] = {"images_a_second": rates, "median": median, "ratio": ratio}
            rows.append([workers, median["ours"], median["webdataset"], ratio])
        half = ours.steps(BATCH) // 2
        content["resume_in_the_middle_seconds"] = {
            "ours": first_batch(ours.batches(BATCH, seed=0, epoch=0, first=half)),
            "read_and_dropped": first_batch(
                batch for step, batch in enumerate(ours.batches(BATCH, seed=0, epoch=0)) if step >= half
            ),
        }
    made_by = {"device": device_name(), "versions": versions() | {"webdataset": wds.__version__}}
    write_json(options.out, content | made_by | {"commit": git_commit()})
    print(tabulate(rows, ["workers", "ours images/s", "webdataset", "ratio"], floatfmt=".3g"))
    print(content["resume_in_the_middle_seconds"])


if __name__ == "__main__":
    main()
