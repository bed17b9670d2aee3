"""Caption sets as WebDataset shards: written, indexed and read by webdataset, in an order that a run can resume.

A shard is a tar file in which the files of a sample follow one another: `<key>.jpg` (or .png) and `<key>.json` with
`image_id`, `captions`, `sha256` (of the image's file) and `known_as` (its ids in COCO and Flickr, where the source
states them). Shards that other tools wrote (`<key>.txt`, or a json with one `caption`) are read too, once
`index_shards` has read through them: beside the shards of a set lies `index.json`, with the number of samples in each
and of captions in each sample, and `images.npy`, a number for every name by which an image is known (see
`refuse_overlap`).

webdataset opens, reads, groups and writes; torch's DataLoader decodes in `workers` processes. webdataset leaves the
order of a stopped epoch to its users (its shuffle depends on the number of workers and cannot be entered in the
middle), and its 1.0 has no access by number. So the order is made here, of whole shards:

* The shards of every set are spread evenly over the epoch, at random by seed and epoch, and dealt to the processes. A
  process reads `shards_at_once` of them, shuffles their pairs together, and reads the next ones in the meantime. In
  memory are the encoded images of twice that many shards.
* So the counts alone say which pairs stand at which positions. To resume is to skip the shards that lie before a
  position without opening them. The order does not depend on the number of workers.
* A pair that cannot be read (no image, an undecodable one, no caption, no known word) is logged, counted and skipped.
  Its position is used up all the same.

Axes: `b` pairs of a batch, `n` tokens.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import logging
import random
import tarfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from itertools import cycle, islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import webdataset as wds
from filelock import FileLock
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from transformers import PreTrainedTokenizerBase
from webdataset.handlers import reraise_exception

from finematch.data.checks import clean_caption, open_array, read_json, reading, require_unique
from finematch.data.images import open_rgb, opening
from finematch.data.names import known_names
from finematch.data.record import Record
from finematch.files import DataError, digest, file_digests, write_atomically, write_text
from finematch.text import Ragged, tokenise

logger = logging.getLogger(__name__)

INDEX, IMAGES, WRITTEN = "index.json", "images.npy", "written.json"
SUFFIXES = ("jpg", "jpeg", "png", "webp")


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
    """Write records as shards `000000.tar`, `000001.tar` ... and index them.

    The records are shuffled once, so that a shard is a fair sample of the set. JPEG and PNG files go in byte for byte
    after they were decoded to see that they are sound; other formats become PNG. Shards are of one size, give or take
    a sample. A shard appears whole or not at all, the index last, and the same records give the same bytes. A writer
    that was stopped continues with the shards that are missing.

    Args:
        records: images with their captions.
        folder: of this set alone; made if absent.
        samples_per_shard: at most. Reading needs at least one shard for each process, and mixes better with many.
        seed: of the shuffling.
        broken: a record without a readable image or a caption stops the writer (`raise`), or is logged and left out
            (`skip`), the field's practice with images from the web.

    Returns:
        The shards.

    Raises:
        DataError: for no records, a broken one, two with one id (their captions would be positives of one image), a
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
    made_of = {
        "records": digest([[record.image_id, *record.captions] for record in records]),
        "samples_per_shard": samples_per_shard,
        "seed": seed,
        "broken": broken,
    }
    order = list(records)
    random.Random(seed).shuffle(order)
    count = -(-len(order) // samples_per_shard)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder.with_name(f".{folder.name}.lock")):
            _claim(folder, made_of)
            for number in range(count):
                start, end = (len(order) * n // count for n in (number, number + 1))
                _write_shard(folder / f"{number:06d}.tar", order[start:end], start, broken, echo)
            if not any(folder.glob("*.tar")):
                raise DataError(
                    folder, "the records", "all are broken", "The log says what is wrong with each"
                )
            return index_shards(folder, echo=None)
    except OSError as error:
        raise DataError(
            folder, "the shards", f"cannot be written ({error})", "Free space or choose another folder"
        ) from error


def _claim(folder: Path, made_of: dict) -> None:
    """Note in the folder what its shards are made of; DataError if they are made of something else."""
    if not any(folder.glob("*.tar")):
        write_text(folder / WRITTEN, json.dumps(made_of))
    elif not (folder / WRITTEN).exists():
        problem = "holds shards that write_shards did not write"
        raise DataError(folder, "the folder", problem, "Choose another folder")
    elif read_json(folder / WRITTEN) != made_of:
        problem = "are of other records, or were cut otherwise"
        raise DataError(folder, "the shards", problem, "Choose another folder, or remove this one")


def _write_shard(
    path: Path, records: Sequence[Record], start: int, broken: str, echo: Callable[[str], None] | None
) -> None:
    """Write the shard whose first record is number `start`, or see that the one that is there has the same images.
    No sound record, no shard."""
    if path.exists():
        there = {r.image_id: r.image for r in records if r.image is not None and r.image.is_file()}
        now = dict(zip(there, file_digests(list(there.values())), strict=True))
        for sample in _read(path, reraise_exception):
            stored = json.loads(sample["json"])
            if now.get(stored["image_id"]) != stored["sha256"]:
                raise DataError(path, "the shard", f"has another image than the records, {stored['image_id']}",
                                "Choose another folder, or remove this one")  # fmt: skip
        return
    samples = []
    for place, record in enumerate(records, start):
        try:
            samples.append(_sample(record, f"{place:09d}"))
        except DataError as error:
            if broken == "raise":
                raise
            logger.warning("left out: %s", error)
    if samples:
        file = io.BytesIO()
        with wds.TarWriter(file, user="", group="", mtime=0, encoder=False) as tar:
            for sample in samples:
                tar.write(sample)
        write_atomically(path, lambda part: part.write_bytes(file.getvalue()))
    if echo:
        echo(f"{path.name}: {len(samples)} of {len(records)} samples")


def _sample(record: Record, key: str) -> dict[str, bytes | str]:
    """A record as the files of a sample."""
    source = record.source or record.image_id
    if not record.captions:
        raise DataError(record.image or "(no file)", source, "it has no caption", "Remove the record")
    captions = [clean_caption(caption, record.image or "(no file)", source) for caption in record.captions]
    image = record.open()
    data = record.image.read_bytes()
    about = {"image_id": record.image_id, "captions": captions, "sha256": hashlib.sha256(data).hexdigest()}
    if record.known_as:
        about["known_as"] = record.known_as
    with opening(data, source, record.image) as opened:
        suffix = {"JPEG": "jpg", "PNG": "png"}.get(opened.format)
    if suffix is None:
        file, suffix = io.BytesIO(), "png"
        image.save(file, "PNG")
        data = file.getvalue()
    return {"__key__": key, suffix: data, "json": json.dumps(about, ensure_ascii=False).encode()}


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
    """Read through the shards of a folder, of whatever tool, and write `index.json` and `images.npy`.

    Every sample should have an image and a caption (`.json` with `captions` or `caption`, or `.txt`); those without
    are reported here, and skipped when they are read. An image is known by the SHA-256 of its file (as `sha256` of
    its json has it, else of the bytes in the shard) and by its ids in COCO and Flickr where the json names them.

    Returns:
        The shards.

    Raises:
        DataError: for no shards, an empty one, or one that is cut off.
    """
    folder, shards, names, lacking = Path(folder), [], set(), 0
    paths = sorted(folder.glob("*.tar"))
    if not paths:
        raise DataError(
            folder, "the folder", "holds no .tar file", "Give the folder of the shards themselves"
        )
    for path in paths:
        counts, contents = [], []
        try:
            for sample in _read(path, reraise_exception):
                image = _image(sample)
                try:
                    about, captions = _described(sample, path)
                except DataError:
                    about, captions = {}, []
                lacking += not (image and captions)
                counts.append(len(captions) if image and captions else 1)
                contents.append(about.get("sha256") or hashlib.sha256(image).hexdigest())
                names.update(number_of(name) for name in (f"sha256:{contents[-1]}", *known_names(about)))
        except (tarfile.TarError, EOFError, OSError, ValueError) as error:
            raise DataError(
                path,
                f"sample {len(counts)}",
                f"the shard cannot be read ({_said(error)})",
                "Download it again, or remove it",
            ) from error
        if not counts:
            raise DataError(path, "the shard", "is empty", "Remove it")
        shards.append({"file": path.name, "samples": len(counts), "bytes": path.stat().st_size,
                       "captions": counts[0] if len(set(counts)) == 1 else counts,
                       "images": digest(contents)})  # fmt: skip
    if lacking:
        logger.warning("%s: %d samples have no image or no caption; they will be skipped", folder, lacking)
    found = np.sort(np.fromiter(names, np.int64, len(names)))
    write_atomically(folder / IMAGES, lambda part: _save(part, found))
    write_text(folder / INDEX, json.dumps({"shards": shards}))
    if echo:
        echo(f"{folder}: {len(shards)} shards, {sum(shard['samples'] for shard in shards)} samples")
    return paths


def _save(path: Path, array: np.ndarray) -> None:
    with open(path, "wb") as file:
        np.save(file, array)


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
    with reading(file, "the index"):
        entries = read_json(file)["shards"]
        if not entries:
            raise DataError(file, "the index", "lists no shards", "Write or index them again")
        return [_shard(file, entry) for entry in entries]


def _shard(file: Path, entry: Mapping) -> Shard:
    """A shard of the index; DataError unless it is there as it was indexed."""
    path, samples, counts = file.parent / Path(entry["file"]).name, int(entry["samples"]), entry["captions"]
    again = "index the folder again"
    if not path.exists():
        problem, remedy = "is missing", f"Restore it, or {again}"
    elif (size := path.stat().st_size) != entry["bytes"]:
        problem, remedy = (
            f"has {size} bytes, {entry['bytes']} when it was indexed",
            f"Copy it again, or {again}",
        )
    elif samples < 1:
        problem, remedy = "is empty", f"Remove it, and {again}"
    elif (isinstance(counts, list) and len(counts) != samples) or min(np.ravel(counts)) < 1:
        problem, remedy = f"has {samples} samples, but captions {counts}", again.capitalize()
    else:
        return Shard(path, samples, counts)
    raise DataError(path, "the shard", problem, remedy)


def refuse_overlap(sets: Mapping[str, str | Path], records: Sequence[Record], split: str) -> None:
    """Stop a run whose pretraining shards hold images that it will be judged on.

    An image is recognised by the bytes of its file, and by its ids in COCO and Flickr where both sides state one: the
    same photo stands in Visual Genome, COCO and Flickr30k under other names and in other sizes.

    Args:
        sets: folders of shards by name, as of `ShardPairs`.
        records: of the held-out split, val or test.
        split: its name, for the message.

    Raises:
        DataError: for a set with such an image (they are counted, the first three named), or with an index of before
            images were listed in it.
    """
    files = [record.image for record in records if record.image is not None]
    content = dict(zip(files, file_digests(files), strict=True))
    names = [
        (number_of(name), record.image_id)
        for record in records
        for name in (*record.known_as, *([f"sha256:{content[record.image]}"] if record.image else []))
    ]
    for folder in map(Path, sets.values()):
        if not (folder / IMAGES).exists():
            raise DataError(folder / IMAGES, "the index", "is missing", "Call index_shards on the folder")
        held = np.isin([number for number, _ in names], open_array(folder / IMAGES))
        found = sorted({image for (_, image), there in zip(names, held, strict=True) if there})
        if found:
            raise DataError(
                folder,
                f"images {', '.join(found[:3])}",
                f"{len(found)} of the {len(records)} images of {split} are in these shards",
                "Write the shards again without them: pretraining on them would leak what is reported",
            )


# ------------------------------------------------------------------------------------------- reading
class Raw(NamedTuple):
    """A pair as it stands in a shard: the sample's encoded files, and which of its captions."""

    set: str
    shard: Path
    sample: dict
    caption: int
    captions: int  # that the index counts in the sample
    lot: str  # what its random numbers are seeded with


class Broken(NamedTuple):
    """A pair that was skipped, and why."""

    set: str
    shard: str
    key: str
    problem: str


class ShardPairs(Dataset):
    """Image-caption pairs of several sets of shards, an epoch of all of them at a time.

    `len()` is the number of pairs of an epoch. `batches` is what training reads.

    Args:
        sets: the mixture: a name for each set, and the folder of its shards. Every pair of every set is in an epoch
            once. Images of two sets are never the same one.
        transform: RGB image to a tensor, all of one shape. If it draws, then from torch, which is seeded for every
            pair: a pair is transformed alike wherever a run was stopped.
        tokenizer: of the captions, cut to `max_length` tokens.
        captions: `one` caption of an image, another each epoch (ALBEF; the paper's 14M pairs are images), or
            `every` caption.
        shards_at_once: shards whose pairs a process shuffles together. More mix better; the encoded images of twice
            as many are in memory.
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
        shards_at_once: int = 4,
        tolerance: float = 0.05,
    ):
        if not sets:
            raise ValueError("sets is empty: name at least one set and its folder")
        if captions not in ("one", "every"):
            raise ValueError(f"captions is {captions!r}; use 'one' or 'every'")
        if shards_at_once < 1 or not 0 <= tolerance <= 1:
            raise ValueError(
                f"shards_at_once = {shards_at_once} must be at least 1, tolerance = {tolerance} in [0, 1]"
            )
        self.transform, self.tokenizer, self.max_length = transform, tokenizer, max_length
        self.captions, self.shards_at_once, self.tolerance = captions, shards_at_once, tolerance
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
            DataError: for fewer shards than processes, or pairs for less than one batch.
            ValueError: for a batch that does not divide among the processes.
        """
        if batch_size % world:
            raise ValueError(f"a batch of {batch_size} does not divide among {world} processes")
        where, shards = ", ".join(map(str, self.sets.values())), len(self.shards)
        if shards < world:
            problem, remedy = (
                f"{shards} are too few for {world} processes",
                "Write smaller ones (samples_per_shard)",
            )
            raise DataError(where, "the shards", problem, remedy)
        fewest = sum(sorted(self.pairs_in(shard) for _, shard in self.shards)[: shards // world])
        if not (steps := fewest // (batch_size // world)):
            problem = f"a process may have {fewest} pairs, too few for its share of a batch of {batch_size}"
            raise DataError(where, "the shards", problem, "Lower batch_size, or add pairs")
        return steps

    # -------------------------------------------------------------------------- the order
    def dealt(self, *, seed: int, epoch: int, rank: int = 0, world: int = 1) -> list[list[tuple[str, Shard]]]:
        """The shards of a process in an epoch, as they are read together: all processes' are all shards, once each.

        Every stretch of the epoch has the sets in their proportion: shard k of a set's n, in random order, stands at
        a random place of the k-th n-th of the epoch.
        """
        rng, names = np.random.default_rng([seed, epoch]), np.array([name for name, _ in self.shards])
        place = np.empty(len(names))
        for name in self.sets:
            n = int((names == name).sum())
            place[names == name] = (rng.permutation(n) + rng.random(n)) / n
        mine = [self.shards[i] for i in place.argsort(kind="stable")[rank::world]]
        return [mine[i : i + self.shards_at_once] for i in range(0, len(mine), self.shards_at_once)]

    def _todo(
        self, dealt: list[list[tuple[str, Shard]]], key: tuple[int, ...], first: int
    ) -> list[tuple[list[tuple[str, Shard]], tuple[int, ...], int]]:
        """What is left of an epoch at position `first`, as arguments of `_shuffled`; DataError for a missing shard."""
        todo = []
        for number, group in enumerate(dealt):
            n = sum(self.pairs_in(shard) for _, shard in group)
            if first < n:
                todo.append((group, (*key, number), first))
            first = max(0, first - n)
        for shard in (shard for group, *_ in todo for _, shard in group):
            if not shard.path.exists():
                raise DataError(
                    shard.path, "the shard", "is missing", "Restore it, or index the folder again"
                )
        return todo

    def _pairs(self, todo: list[tuple]) -> Iterator[Raw]:
        """Pairs read and in order, decoded later. One thread reads the next shards while these are handed on."""
        with ThreadPoolExecutor(1) as thread:
            ahead = thread.submit(self._shuffled, *todo[0])
            for following in [*todo[1:], None]:
                pairs = ahead.result()
                ahead = following and thread.submit(self._shuffled, *following)
                yield from pairs

    def _shuffled(self, group: list[tuple[str, Shard]], key: tuple[int, ...], first: int) -> list[Raw]:
        """All pairs of some shards, shuffled together, without the `first` ones."""
        pairs = []
        for name, shard in group:
            for number, sample in enumerate(_samples(shard)):
                captions, lot = int(shard.captions[number]), f"{key[:2]} {name} {shard.path.name} {number}"
                which = range(1 if self.captions == "one" else captions)
                pairs += [Raw(name, shard.path, sample, i, captions, f"{lot} {i}") for i in which]
        return [pairs[i] for i in np.random.default_rng(key).permutation(len(pairs))[first:]]

    # -------------------------------------------------------------------------- group by group
    def groups(
        self,
        size: int,
        *,
        seed: int,
        epoch: int,
        first: int = 0,
        rank: int = 0,
        world: int = 1,
        workers: int = 0,
    ) -> Iterator[tuple[list[dict | Broken], Tensor]]:
        """This process's pairs of an epoch from position `first` on, `size` at a time.

        Broken ones are logged and counted.

        Yields:
            Of every pair `caption`, `input_ids` and `special` (lists), `image_id` (a number of 63 bits, the same for
            all captions of an image), `set` and `key`, or what is broken; and the pixels "b 3 h w" of the sound ones.
        """
        dealt = self.dealt(seed=seed, epoch=epoch, rank=rank, world=world)
        total = sum(self.pairs_in(shard) for group in dealt for _, shard in group)
        if not 0 <= first <= total:
            raise ValueError(f"first = {first}: this process's epoch has {total} pairs")
        if first == total:
            return
        pairs = self._pairs(self._todo(dealt, (seed, epoch, rank), first))
        # What a sampler gives the loader are numbers as a rule; here, encoded pairs: this process reads, others decode.
        # A generator of its own: a loader must not draw from the random state that the model uses.
        loader = DataLoader(self, batch_sampler=iter(lambda: list(islice(pairs, size)), []), num_workers=workers,
                            collate_fn=_as_it_is, generator=torch.Generator())  # fmt: skip
        with contextlib.closing(pairs):
            for rows, pixels in loader:
                for row in rows:
                    self.read += 1
                    if isinstance(row, Broken):
                        self._skip(row)
                yield rows, pixels

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
        place = {"seed": seed, "epoch": epoch, "first": first * share, "rank": rank, "world": world}
        with contextlib.closing(self.groups(share, **place, workers=workers)) as groups:  # workers go with it
            for step, (rows, pixels) in enumerate(islice(groups, steps - first), first):
                batch = self._collate(rows, pixels, step)
                yield _pinned(batch) if pin_memory else batch

    def _collate(self, rows: list[dict | Broken], pixels: Tensor, step: int) -> dict:
        good = [row for row in rows if isinstance(row, dict)]
        if not good:
            problem = f"all pairs of batch {step} are broken, the first: {rows[0].problem}"
            raise DataError(rows[0].shard, rows[0].key, problem, "Write or download the shards again")
        if len(good) < len(rows):
            own, spare = iter(range(len(good))), cycle(range(len(good)))
            index = [next(own if isinstance(row, dict) else spare) for row in rows]
            good, pixels = [good[i] for i in index], pixels[index]
        start = np.cumsum([0, *(len(row["input_ids"]) for row in good)])
        ids = np.concatenate([row["input_ids"] for row in good]).astype(np.int32)
        special = np.concatenate([row["special"] for row in good]).astype(bool)
        pad = self.tokenizer.pad_token_id if self.tokenizer.pad_token_id is not None else 0
        return {
            "image": {"pixels": pixels},
            "text": Ragged(ids, special, start, pad).batch(np.arange(len(good))),
            "image_id": torch.tensor([row["image_id"] for row in good]),
        }

    def _skip(self, row: Broken) -> None:
        self.broken[row.set] += 1
        lost, read = sum(self.broken.values()), self.read
        logger.warning(
            "%s: %s: skipped, %s (%d broken of %d read)", row.shard, row.key, row.problem, lost, read
        )
        if lost > 10 and lost > self.tolerance * read:
            problem = f"{lost} of {read} pairs read are broken, the last: {row.problem}"
            remedy = f"Look after the shards, or raise tolerance ({self.tolerance})"
            raise DataError(row.shard, row.key, problem, remedy)

    # -------------------------------------------------------------------------- in a worker
    def __getitems__(self, pairs: list[Raw]) -> tuple[list[dict | Broken], Tensor]:
        """Pairs decoded, tokenised and transformed, and the pixels "b 3 h w" of those that are sound."""
        rows, pixels = [], []
        for pair in pairs:
            lot = random.Random(pair.lot)
            try:
                image, row = self._pair(pair, lot)
            except ValueError as error:
                problem = error.problem if isinstance(error, DataError) else str(error)
                rows.append(Broken(pair.set, str(pair.shard), pair.sample["__key__"], problem))
                continue
            with _seeded(lot.getrandbits(63)):
                pixels.append(self.transform(image))
            rows.append(row)
        return rows, torch.stack(pixels) if pixels else torch.empty(0)

    def _pair(self, pair: Raw, lot: random.Random) -> tuple[Image.Image, dict]:
        """The image and what belongs to it; ValueError if the pair is broken."""
        image, (about, captions), which = _rgb(pair.sample), _described(pair.sample, pair.shard), pair.caption
        if self.captions == "one":
            which = lot.randrange(len(captions))
        elif len(captions) != pair.captions:
            raise ValueError("its captions are not as many as the index says")
        ids = tokenise(
            [captions[which]], self.tokenizer, max_length=self.max_length
        )  # ValueError: no known word
        return image, {
            "caption": captions[which],
            "input_ids": ids.ids.tolist(),
            "special": ids.special.tolist(),
            "image_id": number_of(f"{pair.set}/{about['image_id']}"),
            "set": pair.set,
            "key": f"{pair.shard.stem}/{pair.sample['__key__']}",
        }


def _as_it_is(x):
    return x


def _pinned(batch: dict) -> dict:
    return {k: _pinned(v) if isinstance(v, dict) else v.pin_memory() for k, v in batch.items()}


@contextlib.contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """torch's generator of the CPU seeded for a while. (`torch.manual_seed` also seeds GPUs that nothing has used yet,
    which costs more than to decode an image.)"""
    before = torch.get_rng_state()
    torch.default_generator.manual_seed(seed)
    try:
        yield
    finally:
        torch.set_rng_state(before)


def _read(path: Path, handler: Callable[[Exception], bool]) -> Iterator[dict]:
    """The samples of a shard as webdataset groups them: `__key__`, and the bytes of each file by its suffix."""
    urls = wds.SimpleShardList([str(path.absolute())])
    return iter(wds.DataPipeline(urls, wds.tarfile_to_samples(handler=handler)))


def _said(error: Exception) -> str:
    """The message of an error, without the file objects that webdataset adds to it."""
    return str(error.args[0] if error.args else error).partition(" @ <")[0]


def _samples(shard: Shard) -> Iterator[dict]:
    """The samples of a shard, exactly as many as the index says; those that are missing say so as `problem`."""
    problems: list[str] = []
    number = 0
    for sample in _read(shard.path, lambda error: not problems.append(_said(error))):  # true: it is handled
        if number == shard.samples:
            problem = f"the shard holds more samples than the {number} of its index"
            raise DataError(shard.path, sample["__key__"], problem, "Index the folder again")
        number += 1
        yield sample
    why = f" ({problems[0]})" if problems else ""
    for missing in range(number, shard.samples):
        yield {"__key__": f"sample {missing}", "problem": f"the shard ends before it{why}"}


def _image(sample: Mapping) -> bytes:
    """The encoded image of a sample, empty if it has none."""
    return next((sample[suffix] for suffix in SUFFIXES if sample.get(suffix)), b"")


def _rgb(sample: Mapping) -> Image.Image:
    """The image of a sample as RGB; ValueError if there is none or it cannot be decoded."""
    if not (data := _image(sample)):
        raise ValueError(sample.get("problem", f"it has no image ({', '.join(SUFFIXES)})"))
    return open_rgb(data, sample["__key__"])


def _described(sample: Mapping, path: Path) -> tuple[dict, list[str]]:
    """What the json of a sample says, with `image_id`, and its captions: of our json, of another tool's, or of a .txt;
    DataError if there is no caption."""
    key = sample["__key__"]
    with reading(path, key):
        about = json.loads(sample["json"]) if sample.get("json") else {}
        captions = about.get("captions") or about.get("caption") or sample.get("txt", b"").decode("utf-8")
        captions = [
            clean_caption(c, path, key) for c in ([captions] if isinstance(captions, str) else captions)
        ]
        image_id = str(about.get("image_id", about.get("key", f"{path.stem}/{key}")))
        return {**about, "image_id": image_id}, captions


def number_of(name: str) -> int:
    """A number in [0, 2^63) for an image's name: a hash, so that sets need no common numbering."""
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "big") >> 1
