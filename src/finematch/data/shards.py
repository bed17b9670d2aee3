"""Caption sets as WebDataset shards: written, mixed, and read so that a run can stop and go on anywhere.

A shard is a tar file in which the files of a sample follow one another: `<key>.jpg` (or .png) and `<key>.json` with
`image_id` and `captions`. Shards that other tools wrote (`<key>.txt`, or a json with one `caption`) are read too, once
`index_shards` has counted them: beside the shards of a set lies `index.json`, with the number of samples in each and
of captions in each sample. Tar files are written and read through the webdataset library.

What the library leaves to its users is added here: an epoch in which no pair is missing or comes twice, and going on
in the middle of it. The order of an epoch is not drawn while reading but computed before, from the counts alone:

* The shards of all sets are shuffled together by seed and epoch and dealt to the processes; a process deals its own
  to `streams` that are read side by side. A stream's pairs are shuffled as a buffer of `buffer` pairs would do it,
  only that the buffer moves numbers instead of pictures. Then the streams take turns, `CHUNK` pairs each.
* So it is known without reading which pair stands at any position of a process's epoch. To go on at a position means
  to pass over the shards of which nothing is left, and in the others not to hand on what came before. The order does
  not depend on the number of workers, nor on where a run was broken off.
* A pair that cannot be read (no picture, an undecodable one, no caption, no known word) is logged, counted and
  skipped. Its position is used up all the same.

Axes: `b` pairs of a batch, `n` tokens.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import logging
import random
import re
import tarfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import webdataset as wds
from filelock import FileLock
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info
from transformers import PreTrainedTokenizerBase
from webdataset.tariterators import group_by_keys

from finematch.data.checks import clean_caption, read_json, reading, require_unique
from finematch.data.record import Record
from finematch.files import DataError, digest, file_digests, write_atomically, write_text
from finematch.text import Ragged, tokenise

logger = logging.getLogger(__name__)

INDEX, PROGRESS = "index.json", "progress.json"
PICTURES = ("jpg", "jpeg", "png", "webp")
CHUNK = 16  # pairs that a stream gives before it is the next one's turn


# ------------------------------------------------------------------------------------------- writing
def write_shards(
    records: Sequence[Record],
    folder: str | Path,
    *,
    samples_per_shard: int = 1000,
    seed: int = 0,
    broken: str = "raise",
    echo: Callable[[str], None] | None = print,
) -> list[Path]:
    """Write records as shards `000000.tar`, `000001.tar` ... and their index.

    The records are shuffled once, so that a shard is a fair sample of the set. JPEG and PNG files go in byte for byte
    after they were decoded to see that they are sound; other formats become PNG. Shards are of one size, give or take
    a sample. A shard appears whole or not at all, the index last, and the same records give the same bytes. A writer
    that was stopped goes on after the last whole shard.

    Args:
        records: pictures with their captions.
        folder: of this set alone; made if absent.
        samples_per_shard: at most. Reading needs at least `streams` shards for each process.
        seed: of the shuffling.
        broken: a record without a readable picture or a caption stops the writer (`raise`), or is logged and left out
            (`skip`), the field's practice with pictures from the web.

    Returns:
        The shards.

    Raises:
        DataError: for no records, a broken one, two with one id (their captions would be positives of one picture), a
            folder that holds other shards, or one that cannot be written.
    """
    if broken not in ("raise", "skip"):
        raise ValueError(f"broken is {broken!r}; use 'raise' or 'skip'")
    if samples_per_shard < 1:
        raise ValueError(f"samples_per_shard = {samples_per_shard}: must be at least 1")
    folder = Path(folder)
    if not records:
        raise DataError(folder, "the records", "there are none to write", "Check the split and the filters")
    require_unique(records, folder)
    key = {
        "records": digest([[record.image_id, *record.captions] for record in records]),
        "samples_per_shard": samples_per_shard,
        "seed": seed,
        "broken": broken,
    }
    order = list(records)
    random.Random(seed).shuffle(order)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder.with_name(f".{folder.name}.lock")):
            _write_missing(folder, order, key, echo)
    except OSError as error:
        raise DataError(
            folder, "the shards", f"cannot be written ({error})", "Free space or choose another folder"
        ) from error
    return [shard.path for shard in read_index(folder)]


def _write_missing(
    folder: Path, order: Sequence[Record], key: dict, echo: Callable[[str], None] | None
) -> None:
    """Write the shards that an earlier writer of the same key has not, and the index."""
    finished, shards = _resumable(folder, key)
    known = {shard["file"]: shard for shard in shards}
    count = -(-len(order) // key["samples_per_shard"])
    for number in range(count):
        start = len(order) * number // count
        mine = order[start : len(order) * (number + 1) // count]
        path, pictures = folder / f"{number:06d}.tar", _content(mine)
        if path.name in known and known[path.name]["pictures"] != pictures:
            raise DataError(path, "the shard", "is of other pictures of the same names",
                            "Choose another folder, or remove this one")  # fmt: skip
        if path.name in known or finished:  # a shard without a sound record is not in the index
            continue
        samples = _samples_of(mine, start, key["broken"])
        shards.append({**_write_tar(path, samples), "pictures": pictures})
        write_text(folder / PROGRESS, json.dumps({"key": key, "shards": shards}))
        if echo:
            echo(f"{path.name}: {len(samples)} of {len(mine)} samples, {number + 1} of {count} shards")
    if not any(shard["samples"] for shard in shards):
        raise DataError(folder, "the records", "all are broken", "The log says what is wrong with each")
    if not finished:
        kept = [shard for shard in shards if shard["samples"]]
        write_text(folder / INDEX, json.dumps({"key": key, "shards": kept}))
        (folder / PROGRESS).unlink()


def _content(records: Sequence[Record]) -> str:
    """SHA-256 of the bytes of the pictures; one whose file is not there counts as missing."""
    there = [record.image for record in records if record.image is not None and record.image.is_file()]
    found = dict(zip(there, file_digests(there), strict=True))
    return digest([found.get(record.image) for record in records])


def _resumable(folder: Path, key: dict) -> tuple[bool, list[dict]]:
    """Whether an earlier writer of the same key finished, and the shards that it left whole."""
    for name in (INDEX, PROGRESS):
        if (folder / name).exists():
            state = read_json(folder / name)
            if state.get("key") != key:
                raise DataError(folder / name, "the shards", "are of other records, or were cut otherwise",
                                "Choose another folder, or remove this one")  # fmt: skip
            return name == INDEX, state["shards"]
    if any(folder.glob("*.tar")):
        raise DataError(
            folder, "the folder", "holds shards without an index", "Choose another, or index_shards it"
        )
    return False, []


def _samples_of(records: Sequence[Record], start: int, broken: str) -> list[dict]:
    """The samples of a shard whose first record is number `start`."""
    samples = []
    for place, record in enumerate(records, start):
        try:
            samples.append(_sample(record, f"{place:09d}"))
        except DataError as error:
            if broken == "raise":
                raise
            logger.warning("left out: %s", error)
    return samples


def _sample(record: Record, key: str) -> dict[str, bytes | str]:
    """A record as the files of a sample."""
    source = record.source or record.image_id
    if not record.captions:
        raise DataError(record.image or "(no file)", source, "it has no caption", "Remove the record")
    captions = [clean_caption(caption, record.image or "(no file)", source) for caption in record.captions]
    picture = record.open()
    data = record.image.read_bytes()
    with Image.open(io.BytesIO(data)) as opened:
        suffix = {"JPEG": "jpg", "PNG": "png"}.get(opened.format)
    if suffix is None:
        file, suffix = io.BytesIO(), "png"
        picture.save(file, "PNG")
        data = file.getvalue()
    text = json.dumps({"image_id": record.image_id, "captions": captions}, ensure_ascii=False)
    return {"__key__": key, suffix: data, "json": text.encode()}


def _write_tar(path: Path, samples: list[dict]) -> dict:
    """Write a shard, flush it to disk and rename it into place; its entry in the index. No samples, no file."""
    counts = [len(json.loads(sample["json"])["captions"]) for sample in samples]
    entry = {"file": path.name, "samples": len(samples), "captions": _short(counts), "bytes": 0}
    if samples:
        file = io.BytesIO()
        with wds.TarWriter(file, user="", group="", mtime=0, encoder=False) as tar:
            for sample in samples:
                tar.write(sample)
        write_atomically(path, lambda part: part.write_bytes(file.getvalue()))
        entry["bytes"] = len(file.getvalue())
    return entry


def _short(counts: list[int]) -> int | list[int]:
    return counts[0] if len(set(counts)) == 1 else counts


# ------------------------------------------------------------------------------------------- the index
@dataclass(frozen=True, eq=False)
class Shard:
    """A tar file, how many samples it holds, and how many captions each of them has."""

    path: Path
    samples: int
    counts: int | list[int]

    @cached_property
    def captions(self) -> np.ndarray:
        return np.broadcast_to(np.asarray(self.counts, np.int64), (self.samples,))


def index_shards(folder: str | Path, *, echo: Callable[[str], None] | None = print) -> list[Path]:
    """Count what is in the shards of a folder that another tool wrote, and write `index.json`.

    Reads names and texts, no pictures. Every sample should have a picture and a caption (`.json` with `captions` or
    `caption`, or `.txt`); those without are reported here, and skipped when they are read.

    Returns:
        The shards.

    Raises:
        DataError: for no shards, an empty one, or one that is cut off.
    """
    folder, shards, lacking = Path(folder), [], 0
    paths = sorted(folder.glob("*.tar"))
    if not paths:
        raise DataError(
            folder, "the folder", "holds no .tar file", "Give the folder of the shards themselves"
        )
    for path in paths:
        counts = []
        try:
            for sample in group_by_keys(_names_and_texts(path)):
                try:
                    if not any(sample.get(suffix) is not None for suffix in PICTURES):
                        raise DataError(path, sample["__key__"], "no picture", "")
                    counts.append(len(_described(sample, path)[1]))
                except DataError:
                    counts.append(1)
                    lacking += 1
        except (tarfile.TarError, EOFError, OSError, ValueError) as error:
            raise DataError(
                path,
                f"sample {len(counts)}",
                f"the shard cannot be read ({error})",
                "Download it again, or remove it",
            ) from error
        if not counts:
            raise DataError(path, "the shard", "is empty", "Remove it")
        shards.append({"file": path.name, "samples": len(counts), "captions": _short(counts),
                       "bytes": path.stat().st_size})  # fmt: skip
    if lacking:
        logger.warning("%s: %d samples have no picture or no caption; they will be skipped", folder, lacking)
    write_text(folder / INDEX, json.dumps({"shards": shards}))
    if echo:
        echo(f"{folder}: {len(shards)} shards, {sum(shard['samples'] for shard in shards)} samples")
    return paths


def _names_and_texts(path: Path) -> Iterator[dict]:
    """The files of a shard as webdataset groups them into samples; of pictures the name alone."""
    with tarfile.open(path) as tar:
        for member in tar:
            if member.isreg() and not re.match(r"__[^/]*__($|/)", member.name):
                text = member.name.lower().endswith((".json", ".txt"))
                yield {
                    "fname": member.name,
                    "data": tar.extractfile(member).read() if text else b"",
                    "__url__": str(path),
                }


def read_index(folder: str | Path) -> list[Shard]:
    """The shards of a set.

    Raises:
        DataError: for a missing index, shards that are not there, empty, or of another size than the index says.
    """
    file = Path(folder) / INDEX
    if not file.exists():
        raise DataError(
            file, "the index", "is missing", "Run write_shards to its end, or index_shards on the folder"
        )
    shards = []
    with reading(file, "the index"):
        entries = read_json(file)["shards"]
        if not entries:
            raise DataError(file, "the index", "lists no shards", "Write or index them again")
        for entry in entries:
            path, samples, counts = (
                file.parent / Path(entry["file"]).name,
                int(entry["samples"]),
                entry["captions"],
            )
            if not path.exists():
                raise DataError(path, "the shard", "is missing", "Restore it, or index the folder again")
            if path.stat().st_size != entry["bytes"]:
                raise DataError(
                    path,
                    "the shard",
                    f"has {path.stat().st_size} bytes, {entry['bytes']} when it was indexed",
                    "Copy it again, or index the folder again",
                )
            if samples < 1:
                raise DataError(path, "the shard", "is empty", "Remove it, and index the folder again")
            if (isinstance(counts, list) and len(counts) != samples) or min(np.ravel(counts)) < 1:
                raise DataError(
                    file, path.name, f"{samples} samples, but captions {counts}", "Index the folder again"
                )
            shards.append(Shard(path, samples, counts))
    return shards


# ------------------------------------------------------------------------------------------- one epoch's order
class Stream(NamedTuple):
    """Shards that are read one after the other, the number of each one's first pair, and the pairs' order."""

    shards: list[tuple[str, Shard]]
    first: np.ndarray
    order: np.ndarray


def buffered(n: int, size: int, rng: np.random.Generator) -> np.ndarray:
    """The order in which a shuffle buffer of `size` hands on 0 ... n - 1: the t-th is at most t + size - 1."""
    held, out = list(range(min(size, n))), np.empty(n, np.int64)
    for t, lot in enumerate(rng.random(n).tolist()):
        pick = int(lot * len(held))
        out[t] = held[pick]
        if t + size < n:
            held[pick] = t + size
        else:
            held[pick] = held[-1]
            held.pop()
    return out


class Turns:
    """Streams of the given lengths take turns, `CHUNK` each; one that has ended passes.

    Turn k is of stream k mod `streams`, so that workers whose number divides that of the streams share them out.
    """

    def __init__(self, lengths: Sequence[int]):
        self.lengths = np.asarray(lengths, np.int64)
        rounds = -(-int(self.lengths.max(initial=0)) // CHUNK)
        self.sizes = (self.lengths[None] - CHUNK * np.arange(rounds)[:, None]).clip(0, CHUNK).ravel()
        self.ends = self.sizes.cumsum()

    def find(self, position: int) -> tuple[int, int]:
        """The turn in which a position stands, and how many stand before it there."""
        turn = int(np.searchsorted(self.ends, position, side="right"))
        return turn, position - int(self.ends[turn - 1] if turn else 0)

    def before(self, turn: int) -> int:
        """How many its stream has given before a turn."""
        stream = turn % len(self.lengths)
        return int(min(self.lengths[stream], turn // len(self.lengths) * CHUNK))


# ------------------------------------------------------------------------------------------- reading
class Broken(NamedTuple):
    """A pair that was skipped, and why."""

    set: str
    shard: str
    key: str
    problem: str


class ShardPairs:
    """Picture-caption pairs of several sets of shards, an epoch of all of them at a time.

    `len()` is the number of pairs of an epoch. `batches` is what training reads, `samples` gives one pair at a time.

    Args:
        sets: the mixture: a name for each set, and the folder of its shards. Every pair of every set is in an epoch
            once. Pictures of two sets are never the same one.
        transform: RGB picture to a tensor, all of one shape. If it draws, then from torch, which is seeded for every
            pair: a pair is transformed alike wherever a run was broken off.
        tokenizer: of the captions, cut to `max_length` tokens.
        captions: `one` caption of a picture, another each epoch (ALBEF; the paper's 14M pairs are pictures), or
            `every` caption.
        streams: shards that a process reads side by side. More mix better; there must be as many for each process.
        buffer: pairs of a stream that are shuffled; their encoded pictures are held in memory.
        tolerance: the share of broken pairs beyond which reading stops (and more than 10 of them): then it is not
            single samples that are broken.

    Attributes:
        broken: pairs skipped so far, by set.

    Raises:
        DataError: as `read_index`.
        ValueError: for no sets, or switches out of range.
    """

    def __init__(
        self,
        sets: Mapping[str, str | Path],
        transform: Callable[[Image.Image], Tensor],
        tokenizer: PreTrainedTokenizerBase,
        *,
        captions: str = "one",
        max_length: int = 32,
        streams: int = 4,
        buffer: int = 1000,
        tolerance: float = 0.05,
    ):
        if not sets:
            raise ValueError("sets is empty: name at least one set and its folder")
        if captions not in ("one", "every"):
            raise ValueError(f"captions is {captions!r}; use 'one' or 'every'")
        if streams < 1 or buffer < 1 or not 0 <= tolerance <= 1:
            raise ValueError(
                f"streams = {streams} and buffer = {buffer} must be at least 1, tolerance = {tolerance} in [0, 1]"
            )
        self.transform, self.tokenizer, self.max_length = transform, tokenizer, max_length
        self.captions, self.streams, self.buffer, self.tolerance = captions, streams, buffer, tolerance
        self.sets = {name: Path(folder) for name, folder in sets.items()}
        self.shards = [(name, shard) for name, folder in self.sets.items() for shard in read_index(folder)]
        self.broken: Counter[str] = Counter()
        self.read = 0

    def pairs_in(self, shard: Shard) -> int:
        return shard.samples if self.captions == "one" else int(shard.captions.sum())

    def __len__(self) -> int:
        return sum(self.pairs_in(shard) for _, shard in self.shards)

    def mixture(self) -> list[dict]:
        """The declared mixture as a table: of each set its shards, pictures, captions and pairs of an epoch."""
        return [
            {
                "set": name,
                "shards": len(mine),
                "pictures": sum(s.samples for s in mine),
                "captions": sum(int(s.captions.sum()) for s in mine),
                "pairs": sum(map(self.pairs_in, mine)),
            }
            for name in self.sets
            for mine in [[s for n, s in self.shards if n == name]]
        ]

    def steps(self, batch_size: int, world: int = 1) -> int:
        """Batches of an epoch, the same in every epoch and process: as many as the fewest shards make whole.

        Raises:
            DataError: for too few shards, or pairs for less than one batch.
            ValueError: for a batch that does not divide among the processes.
        """
        self._check(world, 0)
        if batch_size % world:
            raise ValueError(f"a batch of {batch_size} does not divide among {world} processes")
        fewest = sorted(self.pairs_in(shard) for _, shard in self.shards)[: len(self.shards) // world]
        steps = sum(fewest) // (batch_size // world)
        if not steps:
            raise DataError(
                ", ".join(map(str, self.sets.values())),
                "the shards",
                f"a process may have {sum(fewest)} pairs, too few for its share of a batch of {batch_size}",
                "Lower batch_size, or add pairs",
            )
        return steps

    def _check(self, world: int, workers: int) -> None:
        if len(self.shards) < world * self.streams:
            raise DataError(
                ", ".join(map(str, self.sets.values())),
                "the shards",
                f"{len(self.shards)} are too few for {world} processes with {self.streams} streams each",
                f"Write smaller ones (samples_per_shard), or use streams={max(1, len(self.shards) // world)}",
            )
        if workers and self.streams % workers:
            raise ValueError(f"{workers} workers cannot share {self.streams} streams evenly: use a divisor")

    def dealt(self, *, seed: int, epoch: int, rank: int = 0, world: int = 1) -> list[list[tuple[str, Shard]]]:
        """The shards of a process in an epoch, stream by stream: all processes' together are all shards."""
        order = np.random.default_rng([seed, epoch]).permutation(len(self.shards))[rank::world]
        return [[self.shards[i] for i in order[s :: self.streams]] for s in range(self.streams)]

    # -------------------------------------------------------------------------- pair by pair
    def samples(
        self, *, seed: int, epoch: int, first: int = 0, rank: int = 0, world: int = 1, workers: int = 0
    ) -> Iterator[dict]:
        """This process's pairs of an epoch, from position `first` on.

        Yields:
            `pixels`, `caption`, `input_ids` and `special` (lists), `image_id` (a number of 63 bits, the same for all
            captions of a picture), `set`, `key`, and `position`: `first = position + 1` goes on after it.
        """
        for position, found in self._outcomes(seed, epoch, first, rank, world, workers, 2):
            if isinstance(found, dict):
                yield {**found, "position": position}

    def batches(
        self,
        batch_size: int,
        *,
        seed: int,
        epoch: int,
        first: int = 0,
        rank: int = 0,
        world: int = 1,
        workers: int = 0,
        pin_memory: bool = False,
    ) -> Iterator[dict]:
        """This process's share of the batches of an epoch, from batch `first` on, as `data.pairs.Pairs` makes them.

        Batch k is made of the positions k b ... (k + 1) b - 1 of each process, b its share; what is left after
        `steps` batches is dropped. Every process must hold as many rows and take as many steps as the others: the
        place of a broken pair is therefore taken by another one of the same batch.

        Args:
            batch_size: of all processes together.

        Raises:
            DataError, ValueError: as `steps`; a batch of which every pair is broken.
        """
        steps, share = self.steps(batch_size, world), batch_size // world
        ahead = -(-2 * share // (CHUNK * max(1, workers)))
        found = self._outcomes(seed, epoch, first * share, rank, world, workers, max(2, ahead))
        with contextlib.closing(found):  # workers go with it
            for step in range(first, steps):
                rows = [outcome for _, outcome in islice(found, share)]
                good = [row for row in rows if isinstance(row, dict)]
                if not good:
                    raise DataError(
                        rows[0].shard,
                        rows[0].key,
                        f"all pairs of batch {step} are broken, the first: {rows[0].problem}",
                        "Write or download the shards again",
                    )
                spare = iter(good * len(rows))
                batch = self._collate([row if isinstance(row, dict) else next(spare) for row in rows])
                yield _pinned(batch) if pin_memory else batch

    def _collate(self, rows: list[dict]) -> dict:
        start = np.cumsum([0, *(len(row["input_ids"]) for row in rows)])
        ids = np.concatenate([row["input_ids"] for row in rows]).astype(np.int32)
        special = np.concatenate([row["special"] for row in rows]).astype(bool)
        pad = self.tokenizer.pad_token_id if self.tokenizer.pad_token_id is not None else 0
        return {
            "image": {"pixels": torch.stack([row["pixels"] for row in rows])},
            "text": Ragged(ids, special, start, pad).batch(np.arange(len(rows))),
            "image_id": torch.tensor([row["image_id"] for row in rows]),
        }

    def _outcomes(
        self, seed: int, epoch: int, first: int, rank: int, world: int, workers: int, ahead: int
    ) -> Iterator[tuple[int, dict | Broken]]:
        """Position by position, what was read there; broken pairs are logged and counted here, in the main process."""
        self._check(world, workers)
        dealt = self.dealt(seed=seed, epoch=epoch, rank=rank, world=world)
        turns = Turns([sum(self.pairs_in(shard) for _, shard in shards) for shards in dealt])
        total = int(turns.ends[-1])
        if not 0 <= first <= total:
            raise ValueError(f"first = {first}: this process's epoch has {total} pairs")
        if first == total:
            return
        reader = _Reader(self, dealt, turns, first, (seed, epoch, rank))
        # a generator of its own: a loader must not draw from the random state that the model uses
        loader = DataLoader(reader, batch_size=None, num_workers=workers, collate_fn=_as_it_is,
                            prefetch_factor=ahead if workers else None, generator=torch.Generator())  # fmt: skip
        position = first
        for rows, pixels in loader:
            pictures = iter(() if pixels is None else pixels)
            for row in rows:
                if isinstance(row, DataError):
                    raise row
                self.read += 1
                if isinstance(row, Broken):
                    self._skip(row)
                yield position, row if isinstance(row, Broken) else {**row, "pixels": next(pictures)}
                position += 1

    def _skip(self, row: Broken) -> None:
        self.broken[row.set] += 1
        total = sum(self.broken.values())
        logger.warning(
            "%s: %s: skipped, %s (%d broken of %d read)", row.shard, row.key, row.problem, total, self.read
        )
        if total > 10 and total > self.tolerance * self.read:
            raise DataError(
                row.shard,
                row.key,
                f"{total} of {self.read} pairs read are broken, the last: {row.problem}",
                f"Look after the shards, or raise tolerance ({self.tolerance})",
            )

    # -------------------------------------------------------------------------- in a worker
    def _stream(self, shards: list[tuple[str, Shard]], key: tuple[int, ...]) -> Stream:
        lengths = [self.pairs_in(shard) for _, shard in shards]
        order = buffered(sum(lengths), self.buffer, np.random.default_rng(key))
        return Stream(shards, np.cumsum([0, *lengths[:-1]]), order)

    def _emit(self, stream: Stream, begin: int, key: tuple[int, ...]) -> Iterator[dict | Broken]:
        """A stream's pairs in their order from the `begin`-th on, reading no shard of which nothing is left."""
        due = np.empty_like(stream.order)
        due[stream.order] = np.arange(len(due))
        waiting, at = {}, begin
        for (name, shard), first in zip(stream.shards, stream.first.tolist(), strict=True):
            if due[first : first + self.pairs_in(shard)].max() < begin:
                continue
            pair = first
            for number, sample in enumerate(_samples(name, shard)):
                for caption in range(1 if self.captions == "one" else int(shard.captions[number])):
                    if due[pair] >= begin:
                        waiting[pair] = (name, shard, number, sample, caption)
                    pair += 1
                while at < len(due) and stream.order[at] in waiting:
                    yield self._pair(*waiting.pop(stream.order[at]), key)
                    at += 1

    def _pair(
        self, name: str, shard: Shard, number: int, sample: dict | Broken, caption: int, key: tuple[int, ...]
    ) -> dict | Broken:
        """One pair, decoded, tokenised and transformed."""
        if isinstance(sample, Broken):
            return sample
        try:
            picture, (image_id, captions) = _decoded(sample, shard.path), _described(sample, shard.path)
            lot = random.Random(f"{key} {name} {shard.path.name} {number} {caption}")
            if self.captions == "one":
                caption = lot.randrange(len(captions))
            elif len(captions) != shard.captions[number]:
                raise DataError(
                    shard.path, sample["__key__"], "its captions are not as many as the index says", ""
                )
            ids = tokenise([captions[caption]], self.tokenizer, max_length=self.max_length)
        except (DataError, ValueError) as error:  # of tokenise: no known word
            problem = error.problem if isinstance(error, DataError) else str(error)
            return Broken(name, str(shard.path), sample["__key__"], problem)
        with _seeded(lot.getrandbits(63)):
            pixels = self.transform(picture)
        return {
            "pixels": pixels,
            "caption": captions[caption],
            "input_ids": ids.ids.tolist(),
            "special": ids.special.tolist(),
            "image_id": number_of(f"{name}/{image_id}"),
            "set": name,
            "key": f"{shard.path.stem}/{sample['__key__']}",
        }


class _Reader(IterableDataset):
    """The turns of a process's epoch, shared out among its workers: `(rows, pixels)`, pixels in one tensor a turn."""

    def __init__(
        self,
        pairs: ShardPairs,
        dealt: list[list[tuple[str, Shard]]],
        turns: Turns,
        first: int,
        key: tuple[int, ...],
    ):
        super().__init__()
        self.pairs, self.dealt, self.turns, self.first, self.key = pairs, dealt, turns, first, key

    def __iter__(self) -> Iterator[tuple[list, Tensor | None]]:
        info = get_worker_info()
        me, workers = (info.id, info.num_workers) if info else (0, 1)
        start, skip = self.turns.find(self.first)
        emitters: dict[int, Iterator] = {}
        for turn in range(start + me, len(self.turns.sizes), workers):
            stream, gone = turn % len(self.dealt), skip if turn == start else 0
            if stream not in emitters:
                made = self.pairs._stream(self.dealt[stream], (*self.key, stream))
                emitters[stream] = self.pairs._emit(made, self.turns.before(turn) + gone, self.key[:2])
            rows, pixels = [], []
            try:
                for row in islice(emitters[stream], int(self.turns.sizes[turn]) - gone):
                    if isinstance(row, dict):
                        pixels.append(row.pop("pixels"))
                    rows.append(row)
            except DataError as error:  # the loader would make another exception of it
                yield [*rows, _Passed(error)], torch.stack(pixels) if pixels else None
                return
            yield rows, torch.stack(pixels) if pixels else None


class _Passed(DataError):
    """A DataError that survives the way from a worker."""

    def __init__(self, error: DataError):
        super().__init__(error.file, error.record, error.problem, error.remedy)

    def __reduce__(self):
        return DataError, (self.file, self.record, self.problem, self.remedy)


def _as_it_is(x):
    return x


def _pinned(batch: dict) -> dict:
    return {k: _pinned(v) if isinstance(v, dict) else v.pin_memory() for k, v in batch.items()}


@contextlib.contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """torch's generator of the CPU seeded for a while. (`torch.manual_seed` also seeds GPUs that nothing has used yet,
    which costs more than to decode a picture.)"""
    before = torch.get_rng_state()
    torch.default_generator.manual_seed(seed)
    try:
        yield
    finally:
        torch.set_rng_state(before)


def _samples(name: str, shard: Shard) -> Iterator[dict | Broken]:
    """The samples of a shard as webdataset groups them, exactly as many as the index says."""
    problems: list[str] = []

    def note(error: Exception) -> bool:
        problems.append(str(error))
        return True

    if not shard.path.exists():
        raise DataError(shard.path, "the shard", "is missing", "Restore it, or index the folder again")
    urls = wds.SimpleShardList([str(shard.path.absolute())])
    number = 0
    for sample in wds.DataPipeline(urls, wds.tarfile_to_samples(handler=note)):
        if number == shard.samples:
            raise DataError(
                shard.path,
                sample["__key__"],
                f"the shard holds more samples than the {number} of its index",
                "Index the folder again",
            )
        number += 1
        yield sample
    why = f" ({problems[0]})" if problems else ""
    for missing in range(number, shard.samples):
        yield Broken(name, str(shard.path), f"sample {missing}", f"the shard ends before it{why}")


def _decoded(sample: dict, path: Path) -> Image.Image:
    """The picture of a sample as RGB; DataError if there is none or it cannot be decoded."""
    key = sample["__key__"]
    data = next((sample[suffix] for suffix in PICTURES if sample.get(suffix)), None)
    if data is None:
        raise DataError(path, key, f"it has no picture ({', '.join(PICTURES)})", "Write the shard again")
    try:
        with Image.open(io.BytesIO(data)) as picture:
            picture.load()
            return picture.convert("RGB")
    except Exception as error:  # PIL raises whatever its decoders do
        raise DataError(
            path, key, f"the picture cannot be decoded ({error})", "Write the shard again"
        ) from error


def _described(sample: dict, path: Path) -> tuple[str, list[str]]:
    """The picture's id and captions: of our json, of another tool's, or of a .txt; DataError if there is no caption."""
    key = sample["__key__"]
    with reading(path, key):
        meta = json.loads(sample["json"]) if sample.get("json") else {}
        captions = meta.get("captions") or meta.get("caption") or sample.get("txt", b"").decode("utf-8")
        captions = [
            clean_caption(c, path, key) for c in ([captions] if isinstance(captions, str) else captions)
        ]
        return str(meta.get("image_id", meta.get("key", f"{path.stem}/{key}"))), captions


def number_of(name: str) -> int:
    """A number in [0, 2^63) for a picture's name: a hash, so that sets need no common numbering."""
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "big") >> 1
