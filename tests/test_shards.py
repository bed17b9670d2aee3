"""WebDataset shards: written whole, mixed, every pair once an epoch, and going on anywhere."""

import errno
import io
import json
import logging
import os
import random
import tarfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import webdataset as wds
from formats import karpathy, karpathy_entry
from PIL import Image

from finematch.data import DataError, Record, load, load_karpathy
from finematch.data import shards as shards_module
from finematch.data.pairs import to_pixels
from finematch.data.shards import (
    Shard,
    ShardPairs,
    index_shards,
    number_of,
    read_index,
    refuse_overlap,
    write_shards,
)
from finematch.scenes.generator import TOKENIZER
from finematch.text import word_level
from finematch.training import Plan, fit

WORDS = word_level(TOKENIZER)


def tiny_pixels(picture):
    """A transform that workers can be started with, however they are."""
    return to_pixels(4, [0.5] * 3, [0.5] * 3)(picture)


def noisy_pixels(picture):
    return tiny_pixels(picture) + torch.rand(3, 4, 4)


def records(folder, n, captions=(2, 1, 3), suffix="png", name="p"):
    """Pictures of one colour each, their number; known words, and the number, in each caption."""
    folder.mkdir(parents=True, exist_ok=True)
    out = []
    for k in range(n):
        path = folder / f"{name}{k}.{suffix}"
        Image.new("RGB", (6, 5), (k % 256, k // 256, 77)).save(path)
        texts = tuple(f"red thing {name}{k} {c}" for c in range(captions[k % len(captions)]))
        out.append(Record(f"{name}{k}", "train", texts, image=path))
    return out


def shards(root, name, n, size=5, **options):
    """A written set of `n` pictures."""
    write_shards(records(root / f"{name}_pictures", n, name=name, **options), root / name, samples_per_shard=size,
                 echo=None)  # fmt: skip
    return root / name


def pairs(sets, transform=tiny_pixels, **options):
    return ShardPairs(sets, transform, WORDS, **{"shards_at_once": 2, **options})


def samples(source, *, seed=0, epoch=0, first=0, **options):
    """The sound pairs of an epoch one by one, each with its position."""
    position = first
    for rows, pixels in source.groups(16, seed=seed, epoch=epoch, first=first, **options):
        images = iter(pixels)
        for row in rows:
            if isinstance(row, dict):
                yield {**row, "pixels": next(images), "position": position}
            position += 1


def listed(source, **options):
    return [(s["set"], s["caption"]) for s in samples(source, **options)]


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """Two sets: 23 pictures with 45 captions in 5 shards, 14 with 14 in 3."""
    root = tmp_path_factory.mktemp("shards")
    return {"coco": shards(root, "coco", 23), "sbu": shards(root, "sbu", 14, captions=(1,))}


# ------------------------------------------------------------------------------------------- writing
def test_shards_are_plain_webdataset(tmp_path):
    made = records(tmp_path / "in", 12, suffix="jpg")
    paths = write_shards(made, tmp_path / "out", samples_per_shard=5, echo=None)
    assert [p.name for p in paths] == ["000000.tar", "000001.tar", "000002.tar"]
    found = list(wds.WebDataset([str(p) for p in paths], shardshuffle=False, empty_check=False))
    by_id = {json.loads(s["json"])["image_id"]: s for s in found}
    assert len(found) == len(by_id) == 12
    for record in made:
        sample = by_id[record.image_id]
        assert sample["jpg"] == record.image.read_bytes()
        assert tuple(json.loads(sample["json"])["captions"]) == record.captions
    assert [json.loads(s["json"])["image_id"] for s in found] != [r.image_id for r in made]  # shuffled
    assert [s.samples for s in read_index(tmp_path / "out")] == [4, 4, 4]


def test_other_formats_become_png(tmp_path):
    Image.new("P", (3, 2), 7).save(tmp_path / "a.gif")
    Image.new("CMYK", (3, 2), (10, 20, 30, 0)).save(tmp_path / "b.jpg")
    made = [Record(n[0], "train", ("red",), image=tmp_path / n) for n in ("a.gif", "b.jpg")]
    (path,) = write_shards(made, tmp_path / "out", echo=None)
    found = {json.loads(s["json"])["image_id"]: s for s in wds.WebDataset([str(path)], shardshuffle=False)}
    assert (np.asarray(Image.open(io.BytesIO(found["a"]["png"]))) == np.asarray(made[0].open())).all()
    assert found["b"]["jpg"] == (tmp_path / "b.jpg").read_bytes()


def test_the_same_records_give_the_same_bytes(tmp_path):
    made = records(tmp_path / "in", 9)
    one, two = (
        write_shards(made, tmp_path / name, samples_per_shard=4, echo=None) for name in ("one", "two")
    )
    other = write_shards(made, tmp_path / "other", samples_per_shard=4, seed=1, echo=None)
    assert [p.read_bytes() for p in one] == [p.read_bytes() for p in two]
    assert [p.read_bytes() for p in one] != [p.read_bytes() for p in other]


def test_a_stopped_writer_goes_on_after_the_last_whole_shard(tmp_path):
    made = records(tmp_path / "in", 20)
    whole = write_shards(made, tmp_path / "whole", samples_per_shard=5, echo=None)
    order = list(range(20))
    random.Random(0).shuffle(order)
    missing = made[order[12]].image  # in the third shard
    data = missing.read_bytes()
    missing.unlink()
    with pytest.raises(DataError, match=rf"{missing.name}.*missing"):
        write_shards(made, tmp_path / "out", samples_per_shard=5, echo=None)
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        "000000.tar",
        "000001.tar",
        "written.json",
    ]
    with pytest.raises(DataError, match="the index: is missing"):
        read_index(tmp_path / "out")
    missing.write_bytes(data)
    before = [p.stat().st_mtime_ns for p in sorted((tmp_path / "out").glob("*.tar"))]
    lines = []
    out = write_shards(made, tmp_path / "out", samples_per_shard=5, echo=lines.append)
    assert [p.read_bytes() for p in out] == [p.read_bytes() for p in whole]
    assert [p.stat().st_mtime_ns for p in out[:2]] == before
    assert lines == ["000002.tar: 5 of 5 samples", "000003.tar: 5 of 5 samples"]
    for name in ("index.json", "images.npy"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert (
        write_shards(made, tmp_path / "out", samples_per_shard=5, echo=lines.append) == out
    )  # nothing to do
    assert len(lines) == 2


def test_a_full_disk_leaves_no_half_shard(tmp_path, monkeypatch):
    made, plain = records(tmp_path / "in", 8), os.fsync
    calls = []

    def full(descriptor):
        calls.append(descriptor)
        if len(calls) == 3:  # the second shard, after the note of what it is and the first
            raise OSError(errno.ENOSPC, "No space left on device")
        plain(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(DataError, match=r"No space left on device.*Free space"):
        write_shards(made, tmp_path / "out", samples_per_shard=4, echo=None)
    assert [p.name for p in (tmp_path / "out").glob("*.tar")] == ["000000.tar"]
    monkeypatch.undo()
    assert len(write_shards(made, tmp_path / "out", samples_per_shard=4, echo=None)) == 2


def test_other_pictures_of_the_same_names_are_refused(tmp_path):
    made = records(tmp_path / "in", 8)
    write_shards(made, tmp_path / "out", samples_per_shard=4, echo=None)
    write_shards(
        records(tmp_path / "copy", 8), tmp_path / "out", samples_per_shard=4, echo=None
    )  # the same bytes
    Image.new("RGB", (5, 5), (1, 2, 3)).save(made[6].image)
    with pytest.raises(
        DataError, match=rf"\.tar: the shard: has another image than the records, {made[6].image_id}"
    ):
        write_shards(made, tmp_path / "out", samples_per_shard=4, echo=None)


def test_two_pictures_of_one_id_are_refused(tmp_path):
    made = records(tmp_path / "in", 4)
    with pytest.raises(
        DataError, match=r"out: image id 'p1': is that of two pictures: .*p1\.png and .*p2\.png"
    ):
        write_shards([*made, replace(made[2], image_id="p1")], tmp_path / "out", echo=None)


@pytest.mark.parametrize("name", [lambda k: {"filepath": f"clip{k}", "filename": "0001.png"},
                                  lambda k: {"filename": f"clip{k}/0001.png"},
                                  lambda k: {"filename": f"{k // 2}.{('png', 'bmp')[k % 2]}"}])  # fmt: skip
def test_pictures_of_one_name_stay_apart(tmp_path, name):
    """Frames of clips, files inside folders, one stem with two suffixes: captions stay those of one picture."""
    entries = [karpathy_entry(k, "train", [f"red thing {k}"], **name(k)) for k in range(8)]
    made = load_karpathy(karpathy(tmp_path, entries), tmp_path / "images", "train")
    assert len({record.image_id for record in made}) == 8
    write_shards(made, tmp_path / "shards", samples_per_shard=2, echo=None)
    found = list(samples(pairs({"x": tmp_path / "shards"})))
    assert len({row["image_id"] for row in found}) == 8


def test_two_writers_at_once_give_one_set(tmp_path):
    made = records(tmp_path / "in", 12)
    whole = write_shards(made, tmp_path / "whole", samples_per_shard=2, echo=None)
    with ThreadPoolExecutor(2) as pool:
        both = list(
            pool.map(lambda _: write_shards(made, tmp_path / "out", samples_per_shard=2, echo=None), range(2))
        )
    assert both[0] == both[1]
    assert [p.read_bytes() for p in both[0]] == [p.read_bytes() for p in whole]


def test_writing_refuses(tmp_path):
    made = records(tmp_path / "in", 6)
    with pytest.raises(DataError, match="none to write"):
        write_shards([], tmp_path / "out")
    for options, said in (
        ({"samples_per_shard": 0}, "samples_per_shard"),
        ({"broken": "x"}, "broken is 'x'"),
    ):
        with pytest.raises(ValueError, match=said):
            write_shards(made, tmp_path / "out", **options)
    write_shards(made, tmp_path / "out", samples_per_shard=3, echo=None)
    for other, options in ((made[:5], {}), (made, {"samples_per_shard": 2}), (made, {"seed": 2})):
        with pytest.raises(DataError, match="other records, or were cut otherwise"):
            write_shards(other, tmp_path / "out", **{"samples_per_shard": 3, **options})
    (tmp_path / "out" / "written.json").unlink()
    with pytest.raises(DataError, match="shards that write_shards did not write"):
        write_shards(made, tmp_path / "out", samples_per_shard=3)
    with pytest.raises(DataError, match="it has no caption"):
        write_shards([Record("a", "train", (), image=made[0].image)], tmp_path / "none")
    with pytest.raises(DataError, match="the caption is empty"):
        write_shards([Record("a", "train", ("red", " "), image=made[0].image)], tmp_path / "none")
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(DataError, match="cannot be written"):
        write_shards(made, tmp_path / "file" / "out")


def test_broken_records_can_be_left_out(tmp_path, caplog):
    made = records(tmp_path / "in", 10)
    made[3].image.write_bytes(made[3].image.read_bytes()[:40])
    with pytest.raises(DataError, match="cannot be decoded"):
        write_shards(made, tmp_path / "raise", echo=None)
    with caplog.at_level(logging.WARNING):
        write_shards(made, tmp_path / "out", samples_per_shard=1, broken="skip", echo=None)
    assert [r.message for r in caplog.records] == [
        m for m in caplog.messages if "left out" in m and "p3.png" in m
    ]
    assert len(caplog.records) == 1
    index = read_index(tmp_path / "out")
    assert [s.samples for s in index] == [1] * 9  # its shard would be empty: there is none
    assert {s["image_id"] for s in samples(pairs({"x": tmp_path / "out"}))} == {
        number_of(f"x/p{k}") for k in range(10) if k != 3
    }
    for record in made:
        record.image.write_bytes(b"")
    with pytest.raises(DataError, match="all are broken"):
        write_shards(made, tmp_path / "all", broken="skip", echo=None)


# ------------------------------------------------------------------------------------------- the index
def tar(path, files):
    with tarfile.open(path, "w") as out:
        for name, data in files:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            out.addfile(info, io.BytesIO(data))
    return path


def png(k=0):
    file = io.BytesIO()
    Image.new("RGB", (4, 4), (k, 9, 9)).save(file, "PNG")
    return file.getvalue()


def test_shards_of_other_tools_are_indexed_and_read(tmp_path, caplog):
    """As img2dataset lays them out; one with texts alone; a sample without a picture, one without words."""
    files = [("00003.txt", b"red thing without picture"), ("__pax__/x", b"not a sample")]
    for k in range(3):
        meta = json.dumps({"caption": f"blue thing {k}", "key": f"0000{k}"}).encode()
        files += [
            (f"0000{k}.{suffix}", data)
            for suffix, data in (("jpg", png(k)), ("txt", b"red thing"), ("json", meta))
        ]
    tar(tmp_path / "00000.tar", files)
    tar(tmp_path / "00001.tar", [("a.txt", b"green thing"), ("a.png", png()), ("b.png", png())])
    with caplog.at_level(logging.WARNING):
        assert [p.name for p in index_shards(tmp_path, echo=None)] == ["00000.tar", "00001.tar"]
    assert "2 samples have no image or no caption" in caplog.text
    assert [(s.samples, s.counts) for s in read_index(tmp_path)] == [(4, 1), (2, 1)]
    caplog.clear()
    source = pairs({"cc": tmp_path})
    with caplog.at_level(logging.WARNING):
        found = sorted(samples(source), key=lambda s: s["key"])
    assert [(s["key"], s["caption"]) for s in found] == [
        *((f"00000/0000{k}", f"blue thing {k}") for k in range(3)), ("00001/a", "green thing"),
    ]  # fmt: skip
    assert [s["image_id"] for s in found] == [
        number_of(f"cc/{k}") for k in ("00000", "00001", "00002", "00001/a")
    ]
    assert source.broken == {"cc": 2}
    assert "00003: skipped, it has no image" in caplog.text
    assert "b: skipped, the caption is empty" in caplog.text
    assert "(2 broken of" in caplog.text


def test_indexing_refuses(tmp_path):
    with pytest.raises(DataError, match=r"holds no \.tar file"):
        index_shards(tmp_path)
    tar(tmp_path / "0.tar", [])
    with pytest.raises(DataError, match=r"0\.tar: the shard: is empty\. Remove it"):
        index_shards(tmp_path)
    (tmp_path / "0.tar").write_bytes(b"")
    with pytest.raises(DataError, match=r"0\.tar: sample 0: the shard cannot be read"):
        index_shards(tmp_path)
    whole = tar(
        tmp_path / "0.tar", [("a.png", png()), ("a.txt", b"red"), ("b.png", png() * 50), ("b.txt", b"red")]
    )
    whole.write_bytes(whole.read_bytes()[:3000])
    with pytest.raises(DataError, match=r"cannot be read \(unexpected end of data\)\. Download it again"):
        index_shards(tmp_path)


def test_an_index_that_does_not_fit_is_refused(tmp_path):
    folder = shards(tmp_path, "x", 12)
    index = json.loads((folder / "index.json").read_text())

    def write(change):
        state = json.loads(json.dumps(index))
        change(state)
        (folder / "index.json").write_text(json.dumps(state))

    for change, said in [
        (lambda s: s["shards"].clear(), "lists no shards"),
        (lambda s: s["shards"][1].pop("bytes"), "'bytes' is missing"),
        (lambda s: s["shards"][1].update(samples=0), r"000001\.tar: the shard: is empty"),
        (
            lambda s: s["shards"][1].update(bytes=7),
            r"000001\.tar: the shard: has \d+ bytes, 7 when it was indexed",
        ),
        (lambda s: s["shards"][1].update(captions=[1]), "4 samples, but captions"),
        (lambda s: s["shards"][1].update(captions=0), "4 samples, but captions 0"),
        (lambda s: s["shards"][1].update(file="../000009.tar"), r"000009\.tar: the shard: is missing"),
    ]:
        write(change)
        with pytest.raises(DataError, match=said):
            pairs({"x": folder})
    (folder / "index.json").write_text("{")
    with pytest.raises(DataError, match="malformed JSON"):
        pairs({"x": folder})


# ------------------------------------------------------------------------------------------- held-out images
def test_shards_with_held_out_images_are_refused(tmp_path):
    """By the bytes of a file, by an id in COCO or Flickr; whoever wrote the shards."""
    made = records(tmp_path / "in", 6)
    made[4] = replace(made[4], known_as=("coco:7", "flickr:70"))
    write_shards(made, tmp_path / "ours", samples_per_shard=3, echo=None)
    sbu = {"caption": "a", "url": "http://static.flickr.com/27/4385058960_b0f291553e.jpg"}
    (tmp_path / "other").mkdir()
    tar(
        tmp_path / "other" / "0.tar",
        [("0.png", png(3)), ("0.json", json.dumps(sbu).encode()), ("1.png", png(4)), ("1.txt", b"b")],
    )
    index_shards(tmp_path / "other", echo=None)
    sets = {"ours": tmp_path / "ours", "other": tmp_path / "other"}
    elsewhere = records(tmp_path / "elsewhere", 9, name="q")
    Image.new("RGB", (6, 5), (1, 2, 3)).save(elsewhere[4].image)

    def refused(record, by):
        with pytest.raises(
            DataError, match=rf"{by}: images {record.image_id}: 1 of the 2 images of test are in"
        ):
            refuse_overlap(sets, [elsewhere[8], record], "test")

    refuse_overlap(sets, [elsewhere[4], *elsewhere[6:], replace(elsewhere[7], known_as=("coco:70",))], "test")
    refused(elsewhere[0], "ours")  # another name, the same bytes
    refused(replace(elsewhere[8], image_id="x", known_as=("coco:7",)), "ours")
    refused(replace(elsewhere[8], image_id="x", known_as=("flickr:70",)), "ours")
    refused(Record("x", "test", ("a",), known_as=("flickr:4385058960",)), "other")
    (tmp_path / "same.png").write_bytes(png(4))
    refused(Record("x", "test", ("a",), image=tmp_path / "same.png"), "other")
    with pytest.raises(
        DataError, match=r"images q0, q1, q2: 5 of the 9 images of val are in these shards.*leak"
    ):
        refuse_overlap(sets, elsewhere, "val")
    (tmp_path / "other" / "images.npy").unlink()
    with pytest.raises(DataError, match=r"images\.npy: the index: is missing\. Call index_shards"):
        refuse_overlap(sets, elsewhere[6:], "val")


# ------------------------------------------------------------------------------------------- the order
def test_the_sets_are_spread_evenly_over_an_epoch():
    """Of 60 shards, 6 and 54 of a set: every tenth of the epoch has its share, whatever the process."""
    source = object.__new__(ShardPairs)
    source.sets, source.captions, source.shards_at_once = {"few": "x", "many": "x"}, "one", 3
    source.shards = [
        (name, Shard(Path(f"{name}{i}"), 1, 1)) for name, n in (("few", 6), ("many", 54)) for i in range(n)
    ]
    firsts = set()
    for seed in range(20):
        (order,) = [[one for group in source.dealt(seed=seed, epoch=1) for one in group]]
        assert sorted(shard.path for _, shard in order) == sorted(shard.path for _, shard in source.shards)
        counts = [sum(name == "few" for name, _ in order[k : k + 10]) for k in range(0, 60, 10)]
        assert sum(counts) == 6
        assert max(counts) <= 2
        firsts.add(order[0][1].path)
        both = [source.dealt(seed=seed, epoch=1, rank=rank, world=2) for rank in (0, 1)]
        assert [[len(group) for group in mine] for mine in both] == [[3] * 10] * 2
        assert sorted(s.path for mine in both for group in mine for _, s in group) == sorted(
            s.path for _, s in order
        )
    assert len(firsts) > 10


# ------------------------------------------------------------------------------------------- an epoch
@pytest.mark.parametrize("workers", [0, 1, 2])
@pytest.mark.parametrize("captions", ["one", "every"])
def test_an_epoch_has_every_pair_once_whatever_the_workers(two, captions, workers):
    source = pairs(two, captions=captions, shards_at_once=4)
    found = listed(source, workers=workers)
    assert len(found) == len(source) == (37 if captions == "one" else 59)
    assert found == listed(source)
    if captions == "every":
        texts = [("coco", f"red thing coco{k} {c}") for k in range(23) for c in range((2, 1, 3)[k % 3])]
        assert sorted(found) == sorted([*texts, *(("sbu", f"red thing sbu{k} 0") for k in range(14))])
    else:
        pictures = [(name, text.split()[2]) for name, text in found]
        assert sorted(pictures) == sorted(
            [*(("coco", f"coco{k}") for k in range(23)), *(("sbu", f"sbu{k}") for k in range(14))]
        )
    assert found != listed(source, epoch=1)
    assert found != listed(source, seed=1)
    assert sorted(found) != sorted(listed(source, epoch=1)) or captions == "every"  # other captions
    assert len({name for name, _ in found[:16]}) == 2  # the sets are mixed
    assert source.broken == {}


def test_one_caption_of_a_picture_another_each_epoch(tmp_path):
    source = pairs({"x": shards(tmp_path, "x", 10, captions=(3,))})
    seen = [dict.fromkeys(range(3), 0) for _ in range(10)]
    for epoch in range(60):
        for _, text in listed(source, epoch=epoch):
            *_, picture, caption = text.split()
            seen[int(picture[1:])][int(caption)] += 1
    assert all(sum(counts.values()) == 60 for counts in seen)
    assert min(n for counts in seen for n in counts.values()) > 5


@pytest.mark.parametrize("at_once", [1, 3, 100])
def test_an_epoch_can_be_entered_at_any_position(two, at_once):
    source = pairs(two, noisy_pixels, captions="every", shards_at_once=at_once)
    whole = list(samples(source, seed=3, epoch=2))
    assert [s["position"] for s in whole] == list(range(59))
    for first in range(59):  # the next pairs
        rows, pixels = next(source.groups(2, seed=3, epoch=2, first=first))
        there = whole[first : first + 2]
        assert [row["key"] + row["caption"] for row in rows] == [s["key"] + s["caption"] for s in there]
        assert torch.equal(pixels, torch.stack([s["pixels"] for s in there]))
    for first in (0, 7, 30, 59):  # and all
        rest = list(samples(source, seed=3, epoch=2, first=first))
        assert [s["key"] + s["caption"] for s in rest] == [s["key"] + s["caption"] for s in whole[first:]]
        assert all(torch.equal(a["pixels"], b["pixels"]) for a, b in zip(rest, whole[first:], strict=True))
    for first in (1, 33):
        rest = list(samples(source, seed=3, epoch=2, first=first, workers=2))
        assert all(torch.equal(a["pixels"], b["pixels"]) for a, b in zip(rest, whole[first:], strict=True))
    with pytest.raises(ValueError, match="first = 60: this process's epoch has 59 pairs"):
        next(samples(source, seed=3, epoch=2, first=60))


def test_no_more_shards_are_read_than_twice_those_at_once(two, monkeypatch):
    """While the pairs of some shards are handed on the next ones are read, and no others."""
    source, opened, read = pairs(two, captions="every"), [], shards_module._read
    monkeypatch.setattr(
        shards_module, "_read", lambda path, handler: opened.append(path) or read(path, handler)
    )
    groups = source.dealt(seed=0, epoch=0)
    assert [len(group) for group in groups] == [2] * 4
    given, done = samples(source), 0
    for number, group in enumerate(groups):
        for _ in range(sum(source.pairs_in(shard) for _, shard in group)):
            next(given)
            done += 1
            assert len(opened) <= 2 * (number + 3)  # those of the next 16 pairs may be of the next group
    assert done == 59
    assert opened == [shard.path for group in groups for _, shard in group]


def test_shards_of_which_nothing_is_left_are_not_opened(tmp_path):
    folder = shards(tmp_path, "x", 40)
    source = pairs({"x": folder}, shards_at_once=1)
    whole = listed(source)
    (first, *_), *_ = source.dealt(seed=0, epoch=0)
    first[1].path.unlink()
    assert listed(source, first=5) == whole[5:]
    with pytest.raises(DataError, match="the shard: is missing"):
        listed(source, first=4)
    with pytest.raises(DataError, match="the shard: is missing"):
        listed(source, first=0, workers=1)


def test_a_pair_is_transformed_without_touching_the_model_s_random_state(two):
    source = pairs(two, noisy_pixels)
    before = torch.get_rng_state()  # (Python's is used by the type checker of the tests)
    found = list(samples(source)) + list(samples(source, epoch=1, workers=2))
    assert torch.equal(torch.get_rng_state(), before)
    assert len({float(s["pixels"].sum()) for s in found}) == len(found)


# ------------------------------------------------------------------------------------------- processes
def read_share(rank, sets):
    source = pairs(sets, captions="every")
    found = [listed(source, epoch=epoch, rank=rank, world=2, workers=2) for epoch in (0, 1)]
    batches = list(source.batches(8, seed=0, epoch=0, rank=rank, world=2, workers=2))
    return found, [b["image_id"] for b in batches]


def other_process(_, sets, out):
    torch.set_num_threads(1)
    torch.multiprocessing.set_start_method(
        "fork", force=True
    )  # of workers, as everywhere but in a spawned process
    torch.save(read_share(1, sets), out)


def test_two_processes_with_two_workers_each_read_every_pair_once(two, tmp_path):
    """This one and a spawned one, which has nothing of this one's state."""
    spawned = torch.multiprocessing.spawn(other_process, args=(two, str(tmp_path / "1.pt")), join=False)
    one, rows_one = read_share(0, two)
    while not spawned.join():
        pass
    other, rows_other = torch.load(tmp_path / "1.pt", weights_only=True)
    whole = sorted(listed(pairs(two, captions="every")))
    for epoch in (0, 1):
        assert sorted([*one[epoch], *other[epoch]]) == whole
        assert abs(len(one[epoch]) - len(other[epoch])) < 30
        assert one[epoch]
        assert other[epoch]
    assert one[0] != one[1]
    steps = pairs(two, captions="every").steps(8, world=2)
    assert len(rows_one) == len(rows_other) == steps > 3
    assert all(len(rows) == 4 for rows in (*rows_one, *rows_other))
    # without processes and workers, the same
    assert listed(pairs(two, captions="every"), rank=1, world=2) == other[0]


def test_steps_are_those_of_the_fewest_shards():
    """Whatever the epoch deals to a process, it has that many."""
    rng = np.random.default_rng(0)
    source = object.__new__(ShardPairs)
    source.sets, source.shards_at_once, source.captions = {"x": "x"}, 1, "one"
    for world in (1, 2, 3):
        source.shards = [("x", Shard(Path("x"), n, 1)) for n in rng.integers(1, 40, 11).tolist()]
        counts = []
        for epoch in range(40):
            for rank in range(world):
                dealt = source.dealt(seed=0, epoch=epoch, rank=rank, world=world)
                counts.append(sum(s.samples for shards in dealt for _, s in shards))
        steps = source.steps(2 * world, world)
        assert steps <= min(counts) // 2
        if world == 1:
            assert steps == len(source) // 2
        else:  # and no fewer: some deal could be as poor
            fewest = sorted(s.samples for _, s in source.shards)[: 11 // world]
            assert steps == sum(fewest) // 2


# ------------------------------------------------------------------------------------------- batches
@pytest.mark.parametrize("workers", [0, 2])
def test_batches_are_the_epoch_s_pairs_in_order(two, workers):
    source = pairs(two, captions="every")
    whole = list(samples(source, seed=4, epoch=1))
    batches = list(source.batches(8, seed=4, epoch=1, workers=workers))
    assert len(batches) == source.steps(8) == 7  # of 59: the last 3 are dropped, as in every epoch
    for k, batch in enumerate(batches):
        rows = whole[8 * k : 8 * k + 8]
        assert batch["image_id"].tolist() == [r["image_id"] for r in rows]
        torch.testing.assert_close(batch["image"]["pixels"], torch.stack([r["pixels"] for r in rows]))
        text = batch["text"]
        for i, row in enumerate(rows):
            n = len(row["input_ids"])
            assert text["input_ids"][i, :n].tolist() == row["input_ids"] == WORDS(row["caption"])["input_ids"]
            assert text["mask"][i].tolist() == [j < n for j in range(text["mask"].shape[1])]
            assert text["special"][i, :n].tolist() == [j in (0, n - 1) for j in range(n)]
    for first in (0, 3, 6):
        again = list(source.batches(8, seed=4, epoch=1, first=first, workers=workers))
        for a, b in zip(again, batches[first:], strict=True):
            assert torch.equal(a["image"]["pixels"], b["image"]["pixels"])
            assert torch.equal(a["text"]["input_ids"], b["text"]["input_ids"])


def test_captions_of_a_picture_share_its_number(two):
    source = pairs(two, captions="every")
    by_picture = {}
    for s in samples(source):
        by_picture.setdefault(s["image_id"], set()).add(s["caption"].rsplit(" ", 1)[0])
    assert len(by_picture) == 37
    assert all(len(texts) == 1 for texts in by_picture.values())
    assert min(by_picture) >= 0
    assert max(by_picture) < 2**63


def test_the_declared_mixture(two):
    source = pairs(two)
    assert source.mixture() == [
        {"set": "coco", "shards": 5, "pictures": 23, "captions": 45, "pairs": 23},
        {"set": "sbu", "shards": 3, "pictures": 14, "captions": 14, "pairs": 14},
    ]
    assert pairs(two, captions="every").mixture()[0]["pairs"] == 45


def test_too_little_is_refused_with_a_remedy(two):
    source = pairs(two)
    with pytest.raises(DataError, match=r"8 are too few for 9 processes\. Write smaller ones"):
        source.steps(9, world=9)
    with pytest.raises(DataError, match=r"a process may have 37 pairs, too few.*Lower batch_size"):
        source.steps(38)
    with pytest.raises(ValueError, match="does not divide among 2"):
        source.steps(5, world=2)
    for wrong, said in (
        ({"captions": "two"}, "captions is"),
        ({"shards_at_once": 0}, "shards_at_once = 0"),
        ({"tolerance": 2.0}, "tolerance = 2.0"),
    ):
        with pytest.raises(ValueError, match=said):
            pairs(two, **wrong)
    with pytest.raises(ValueError, match="sets is empty"):
        pairs({})


# ------------------------------------------------------------------------------------------- broken samples
def spoil(folder, changes):
    """Rewrite the shards of a set, sample n with `changes[n](sample)`; the index is made again, counts and all."""
    n = 0
    for path in sorted(folder.glob("*.tar")):
        samples = list(wds.WebDataset([str(path)], shardshuffle=False))
        with wds.TarWriter(str(path), encoder=False) as out:
            for sample in samples:
                sample = {k: v for k, v in sample.items() if k == "__key__" or not k.startswith("_")}
                if n in changes:
                    changes[n](sample)
                out.write(sample)
                n += 1
    index = json.loads((folder / "index.json").read_text())
    for entry in index["shards"]:
        entry["bytes"] = (folder / entry["file"]).stat().st_size
    (folder / "index.json").write_text(json.dumps(index))


def text_of(sample, **changes):
    sample["json"] = json.dumps({**json.loads(sample["json"]), **changes}).encode()


BREAKS = {
    2: (lambda s: s.update(png=s["png"][:50]), "cannot be decoded"),
    5: (lambda s: s.update(png=b"hello"), "cannot be decoded"),
    7: (lambda s: s.pop("png"), "no image"),
    9: (lambda s: s.update(json=b"{"), "malformed entry"),
    11: (lambda s: text_of(s, captions=["  "]), "caption is empty"),
    13: (lambda s: text_of(s, captions=["qwertz uiop"]), "no known word"),
    15: (lambda s: text_of(s, captions=[7]), "int, not text"),
}


@pytest.mark.parametrize("workers", [0, 2])
def test_broken_samples_are_logged_counted_and_skipped(tmp_path, caplog, workers):
    folder = shards(tmp_path, "x", 24, captions=(1,))
    source = pairs({"x": folder})
    whole = listed(source)
    stored = [s for p in sorted(folder.glob("*.tar")) for s in wds.WebDataset([str(p)], shardshuffle=False)]
    lost = {json.loads(stored[n]["json"])["captions"][0] for n in BREAKS}
    spoil(folder, {n: change for n, (change, _) in BREAKS.items()})
    source = pairs({"x": folder})
    with caplog.at_level(logging.WARNING):
        found = listed(source, workers=workers)
    assert found == [pair for pair in whole if pair[1] not in lost]
    assert source.broken == {"x": len(BREAKS)}
    assert source.read == 24
    for _, said in BREAKS.values():
        assert said in caplog.text
    assert len([m for m in caplog.messages if "skipped" in m]) == len(BREAKS)
    assert f"({len(BREAKS)} broken of" in caplog.messages[-1]
    # positions are used up, so that going on is as exact as ever
    source = pairs({"x": folder}, tolerance=1.0)
    everything = [(s["position"], s["key"]) for s in samples(source)]
    for first in range(25):
        rest = [(s["position"], s["key"]) for s in samples(source, first=first)]
        assert rest == [pair for pair in everything if pair[0] >= first]


def test_batches_keep_their_rows_and_steps(tmp_path):
    """A row that breaks is taken by another of its batch: no process may have fewer rows or steps."""
    folder = shards(tmp_path, "x", 24, captions=(1,))
    clean = list(pairs({"x": folder}).batches(6, seed=0, epoch=0))
    spoil(folder, {n: change for n, (change, _) in BREAKS.items()})
    source = pairs({"x": folder})
    batches = list(source.batches(6, seed=0, epoch=0))
    assert len(batches) == len(clean) == 4
    replaced = 0
    for batch, before in zip(batches, clean, strict=True):
        same = batch["image_id"] == before["image_id"]
        replaced += int((~same).sum())
        assert set(batch["image_id"].tolist()) == set(before["image_id"][same].tolist())
    assert replaced == len(BREAKS)
    with pytest.raises(DataError, match=r"all pairs of batch \d+ are broken"):
        list(source.batches(1, seed=0, epoch=0))


def test_more_than_single_broken_samples_stop_the_reading(tmp_path):
    folder = shards(tmp_path, "x", 24, captions=(1,))
    spoil(folder, {n: BREAKS[5][0] for n in range(12)})
    with pytest.raises(DataError, match=r"11 of \d+ pairs read are broken.*raise tolerance \(0\.05\)"):
        listed(pairs({"x": folder}))
    assert len(listed(pairs({"x": folder}, tolerance=0.9))) == 12


def test_a_shard_that_ends_early_or_late(tmp_path, caplog):
    folder = shards(tmp_path, "x", 12, captions=(1,))
    first = folder / "000000.tar"
    data = first.read_bytes()
    index = json.loads((folder / "index.json").read_text())
    for cut, said in ((5 * 512 + 40, "(unexpected end of data"), (8 * 512, "ends before it")):
        first.write_bytes(data[:cut])
        index["shards"][0] |= {"bytes": len(data)}
        (folder / "index.json").write_text(json.dumps(index))
        with pytest.raises(DataError, match=r"bytes.*Copy it again"):  # before anything is read
            pairs({"x": folder})
        index["shards"][0]["bytes"] = cut
        (folder / "index.json").write_text(json.dumps(index))
        source = pairs({"x": folder})
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            found = listed(source)
        assert len(found) + source.broken["x"] == 12
        assert 1 <= source.broken["x"] <= 3
        assert said in caplog.text
    first.write_bytes(data)
    index["shards"][0] |= {"bytes": len(data), "samples": 2, "captions": 1}
    (folder / "index.json").write_text(json.dumps(index))
    with pytest.raises(
        DataError, match=r"holds more samples than the 2 of its index.*Index the folder again"
    ):
        listed(pairs({"x": folder}))


# ------------------------------------------------------------------------------------------- the embedded set
def test_a_real_set_from_records_to_batches(scenes, tmp_path):
    made = load("scenes", scenes.parent, "train")
    write_shards(made, tmp_path / "scenes", samples_per_shard=10, echo=None)
    source = ShardPairs(
        {"scenes": tmp_path / "scenes"}, to_pixels(64, [0.5] * 3, [0.25] * 3), WORDS, captions="every"
    )
    assert len(source) == sum(len(r.captions) for r in made)
    found = [(s["image_id"], s["caption"]) for s in samples(source)]
    assert sorted(found) == sorted((number_of(f"scenes/{r.image_id}"), c) for r in made for c in r.captions)
    batch = next(source.batches(16, seed=0, epoch=0))
    assert batch["image"]["pixels"].shape == (16, 3, 64, 64)
    by_id = {number_of(f"scenes/{r.image_id}"): r for r in made}
    record = by_id[int(batch["image_id"][3])]
    torch.testing.assert_close(
        batch["image"]["pixels"][3], to_pixels(64, [0.5] * 3, [0.25] * 3)(record.open())
    )


# ------------------------------------------------------------------------------------------- training
class Seen(torch.nn.Module):
    """Learns the mean of the pixels, with dropout, and writes down what it was shown."""

    def __init__(self, stop=None):
        super().__init__()
        self.mean, self.stop, self.shown = torch.nn.Parameter(torch.zeros(3)), stop, []

    def forward(self, batch):
        if len(self.shown) == self.stop:
            raise KeyboardInterrupt
        self.shown.append(batch["image_id"].tolist())
        pixels = torch.nn.functional.dropout(batch["image"]["pixels"], 0.2, self.training)
        return {"loss": (pixels.mean((2, 3)) - self.mean).square().sum(1).mean()}


@pytest.mark.parametrize("stop", [3, 8])
def test_a_run_on_shards_that_is_stopped_goes_on_where_it_was(two, tmp_path, stop):
    plan = Plan(epochs=2, batch_size=8, lr=0.1, checkpoint_steps=1)
    runs = {}
    for name, model in (("whole", Seen()), ("stopped", Seen(stop)), ("again", Seen())):
        torch.manual_seed(7 if name == "again" else 0)  # the checkpoint brings the random state back
        if name == "stopped":
            with pytest.raises(KeyboardInterrupt):
                fit(model, pairs(two, captions="every"), plan, tmp_path / "b", echo=None)
        else:
            fit(
                model,
                pairs(two, captions="every"),
                plan,
                tmp_path / ("a" if name == "whole" else "b"),
                echo=None,
            )
        runs[name] = model
    assert len(runs["whole"].shown) == 2 * 7
    assert runs["stopped"].shown + runs["again"].shown == runs["whole"].shown
    assert torch.equal(runs["again"].mean, runs["whole"].mean)
