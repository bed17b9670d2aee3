"""Files: atomic writing, digests, and the one cache with its lock, its resumption and its checks."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from finematch import files
from finematch.files import (
    DataError,
    cached,
    clear,
    digest,
    entries,
    file_digest,
    file_digests,
    new_array,
    write_atomically,
    write_json,
    write_text,
)

KEY = {"weights": "abc", "size": 3}


@pytest.fixture(autouse=True)
def memory(tmp_path, monkeypatch):
    """Digests are remembered in a folder of the test's own."""
    monkeypatch.setenv("FINEMATCH_CACHE", str(tmp_path / "memory"))
    files._known.clear()
    return tmp_path / "memory"


def fill(folder: Path) -> None:
    (folder / "sub").mkdir(exist_ok=True)
    (folder / "a.bin").write_bytes(b"0123456789")
    (folder / "sub" / "b.txt").write_text("more")


def old(path: Path) -> Path:
    """The same file, with a time of change that lies well back: its digest is worth remembering."""
    os.utime(path, (1e9, 1e9))
    return path


# ------------------------------------------------------------------------------------------- writing
def test_a_file_that_cannot_be_written_leaves_the_old_one(tmp_path):
    write_text(tmp_path / "deep" / "a.txt", "old\n")

    def stop(part):
        part.write_text("ne")
        raise OSError(28, "No space left on device")

    with pytest.raises(DataError, match=r"a\.txt: the file: cannot be written .*No space left.*Free space"):
        write_atomically(tmp_path / "deep" / "a.txt", stop)
    assert (tmp_path / "deep" / "a.txt").read_bytes() == b"old\n"


def test_who_reads_the_folder_reads_the_file(tmp_path):
    tmp_path.chmod(0o750)

    def private(part):
        part.write_text("x")
        part.chmod(0o600)

    write_atomically(tmp_path / "a", private)
    assert (tmp_path / "a").stat().st_mode & 0o777 == 0o640


def test_json_has_no_nan(tmp_path):
    write_json(tmp_path / "a.json", {"é": 1.5})
    assert (tmp_path / "a.json").read_text(encoding="utf-8") == '{\n "é": 1.5\n}\n'
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(tmp_path / "a.json", {"b": float("nan")})


@pytest.fixture
def small_disk():
    """The kernel's limit of a file's size stands in for a full disk: the same write, the same OSError."""
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    previous = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    signal.signal(signal.SIGXFSZ, previous)


def test_an_array_has_its_space_before_it_is_written(tmp_path, small_disk):
    array = new_array(tmp_path / "a.npy", "float16", (10, 5))
    array[:] = 1
    array.flush()
    assert np.load(tmp_path / "a.npy").sum() == 50
    assert (tmp_path / "a.npy").stat().st_blocks * 512 >= 100
    with pytest.raises(DataError, match=r"b\.npy: array \(1000, 100\) of float32: cannot be written"):
        new_array(tmp_path / "b.npy", np.float32, (1000, 100))
    assert not (tmp_path / "b.npy").exists()


def test_an_array_larger_than_the_disk_is_refused_at_once(tmp_path):
    with pytest.raises(DataError, match=r"needs 4,000,000,000,000,000 bytes, [\d,]+ are free"):
        new_array(tmp_path / "a.npy", "float32", (10**15,))


# ------------------------------------------------------------------------------------------- digests
def test_digest_is_of_the_value_and_not_of_its_order():
    assert digest({"a": 1, "b": [1, 2]}) == digest({"b": (1, 2), "a": 1})
    assert digest({"a": 1}) != digest({"a": 1.5}) != digest({"a": None})
    with pytest.raises(TypeError):
        digest({"a": Path("a")})


def test_file_digest_follows_the_content(tmp_path):
    first, second = tmp_path / "a", tmp_path / "b"
    first.write_bytes(b"one")
    second.write_bytes(b"one")
    assert file_digest(first) == file_digest(second)
    time.sleep(0.02)
    second.write_bytes(b"two")
    assert file_digest(first) != file_digest(second)
    assert file_digests([second, first, second])[1] == file_digest(first)
    with pytest.raises(DataError, match="nowhere: the file: cannot be read"):
        file_digest(tmp_path / "nowhere")


def test_a_folder_is_its_names_and_contents(tmp_path):
    for name in ("x", "y"):
        (tmp_path / name / "sub").mkdir(parents=True)
        (tmp_path / name / "sub" / "a").write_text("one")
    assert file_digest(tmp_path / "x") == file_digest(tmp_path / "y")
    (tmp_path / "y" / "sub" / "a").rename(tmp_path / "y" / "sub" / "b")
    assert file_digest(tmp_path / "x") != file_digest(tmp_path / "y")


@pytest.fixture
def settled(monkeypatch):
    """Files of this very second count as settled."""
    monkeypatch.setattr(files, "RECENT", -1.0)


def test_digests_are_remembered_across_processes(tmp_path, memory, monkeypatch, settled):
    path = tmp_path / "a"
    path.write_bytes(b"one")
    expected = file_digest(path)
    files._known.clear()  # as a new process
    monkeypatch.setattr(files, "_sha256", lambda name: pytest.fail("was read again"))
    assert file_digest(path) == expected
    assert (memory / "digests.sqlite").is_file()


def test_another_content_of_the_same_size_and_time_is_seen(tmp_path, settled):
    path = tmp_path / "a"
    path.write_bytes(b"one")
    old(path)
    before = file_digest(path)
    time.sleep(0.02)
    path.write_bytes(b"two")
    old(path)
    assert file_digest(path) != before


def test_a_file_of_this_moment_is_read_again(tmp_path):
    path = tmp_path / "a"
    path.write_bytes(b"one")
    file_digest(path)
    assert str(path) not in files._known


def test_digests_work_without_a_place_to_remember(tmp_path, monkeypatch, settled):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("FINEMATCH_CACHE", str(tmp_path / "file" / "memory"))
    (tmp_path / "a").write_bytes(b"one")
    assert file_digest(tmp_path / "a") == file_digest(tmp_path / "a")


def test_a_damaged_memory_is_no_obstacle(tmp_path, memory, settled):
    memory.mkdir()
    (memory / "digests.sqlite").write_bytes(b"no database at all" * 100)
    (tmp_path / "a").write_bytes(b"one")
    assert file_digest(tmp_path / "a") == file_digest(tmp_path / "a")


# ------------------------------------------------------------------------------------------- the cache
def is_cached(root, kind, key):
    return any((one.kind, one.key, one.whole) == (kind, key, True) for one in entries(root))


def test_what_is_cached_is_made_once(tmp_path):
    made = []
    root = tmp_path / "cache"
    assert not is_cached(root, "thing", KEY)
    for _ in range(2):
        folder = cached(root, "thing", KEY, lambda part: (made.append(part), fill(part)))
    assert len(made) == 1
    assert made[0].name == f"{folder.name}.part"
    assert folder.name == f"thing-{digest(KEY)[:16]}"
    assert is_cached(root, "thing", KEY)
    assert (folder / "sub" / "b.txt").read_text() == "more"
    other = cached(root, "thing", {**KEY, "size": 4}, fill)
    assert other != folder
    entry = json.loads((folder / "entry.json").read_text())
    assert entry["key"] == KEY
    assert entry["parts"]["a.bin"]["bytes"] == 10


def test_broken_off_work_goes_on_where_it_stopped(tmp_path):
    root, seen = tmp_path / "cache", []

    def make(part):
        seen.append(sorted(path.name for path in part.iterdir()))
        (part / f"{len(seen)}.txt").write_text("x")
        if len(seen) == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cached(root, "thing", KEY, make)
    assert not is_cached(root, "thing", KEY)
    folder = cached(root, "thing", KEY, make)
    assert seen == [[], ["1.txt"]]
    assert sorted(path.name for path in folder.iterdir()) == ["1.txt", "2.txt", "entry.json"]


def flips_are_noticed(root: Path, path: Path, places) -> None:
    whole = path.read_bytes()
    for place in places:
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        with pytest.raises(DataError, match=r"(is damaged|is missing|cut off).*Remove .*thing-"):
            cached(root, "thing", KEY, fill)
    path.write_bytes(whole)
    cached(root, "thing", KEY, fill)


@pytest.mark.parametrize("name", ["a.bin", "sub/b.txt"])
def test_one_flipped_bit_of_a_part_is_noticed(tmp_path, name):
    path = cached(tmp_path / "cache", "thing", KEY, fill) / name
    flips_are_noticed(tmp_path / "cache", path, range(path.stat().st_size))


@pytest.mark.parametrize("field", ["weights", "abc", "3", "parts", "a.bin", "bytes", "10", "sha256"])
def test_one_flipped_bit_of_what_the_entry_says_is_noticed(tmp_path, field):
    path = cached(tmp_path / "cache", "thing", KEY, fill) / "entry.json"
    flips_are_noticed(tmp_path / "cache", path, [path.read_bytes().index(field.encode())])


def test_a_truncated_or_lost_part_is_named(tmp_path):
    root = tmp_path / "cache"
    folder = cached(root, "thing", KEY, fill)
    os.truncate(folder / "a.bin", 9)
    with pytest.raises(
        DataError, match=r"a\.bin: thing: has 9 bytes, not 10.*python -m finematch cache clear"
    ):
        cached(root, "thing", KEY, fill)
    (folder / "a.bin").unlink()
    with pytest.raises(DataError, match=r"a\.bin: thing: is missing"):
        cached(root, "thing", KEY, fill)
    clear(root)
    cached(root, "thing", KEY, fill)


def test_a_cache_that_cannot_be_written_is_named(tmp_path, small_disk):
    with pytest.raises(DataError, match=r"thing-.*cannot be written .*File too large.*Free space"):
        cached(tmp_path, "thing", KEY, lambda part: (part / "a").write_bytes(b"0" * 200_000))
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(DataError, match=r"cannot be written.*choose another folder"):
        cached(tmp_path / "file", "thing", KEY, fill)


def test_errors_of_making_pass_through(tmp_path):
    def make(part):
        raise FileNotFoundError(2, "No such file", "weights.pth")

    with pytest.raises(FileNotFoundError, match=r"weights\.pth"):
        cached(tmp_path, "thing", KEY, make)


WORKER = """
import sys, time
from pathlib import Path
from finematch.files import cached
def make(part):
    with open(sys.argv[2], "a") as log:
        log.write("made\\n")
    (part / "first").write_text("1")
    time.sleep(float(sys.argv[3]))
    (part / "second").write_text("2")
print(sorted(p.name for p in cached(sys.argv[1], "thing", {"a": 1}, make).iterdir()))
"""


def start(tmp_path: Path, seconds: float) -> subprocess.Popen:
    command = [sys.executable, "-c", WORKER, str(tmp_path / "cache"), str(tmp_path / "log"), str(seconds)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def test_two_processes_make_it_once(tmp_path):
    both = [start(tmp_path, 0.5) for _ in range(2)]
    said = [process.communicate(timeout=900)[0] for process in both]
    assert [process.returncode for process in both] == [0, 0]
    assert said == ["['entry.json', 'first', 'second']\n"] * 2
    assert (tmp_path / "log").read_text() == "made\n"


def test_a_killed_maker_is_followed_by_the_next(tmp_path):
    killed = start(tmp_path, 60)
    deadline = time.monotonic() + 60
    while not list((tmp_path / "cache").glob("*.part/first")) and time.monotonic() < deadline:
        time.sleep(0.05)
    killed.kill()
    killed.wait()
    killed.stdout.close()
    assert [entry.whole for entry in entries(tmp_path / "cache")] == [False]
    assert start(tmp_path, 0).communicate(timeout=900)[0] == "['entry.json', 'first', 'second']\n"
    assert [entry.whole for entry in entries(tmp_path / "cache")] == [True]


def test_entries_are_listed_and_cleared(tmp_path):
    root = tmp_path / "cache"
    assert entries(root) == []
    (root / "something else").mkdir(parents=True)
    (root / "detector-old").mkdir()
    one, two = cached(root, "one", KEY, fill), cached(root, "two-words", KEY, fill)
    assert [(e.kind, e.folder, e.key, e.whole) for e in entries(root)] == [
        ("one", one, KEY, True),
        ("two-words", two, KEY, True),
    ]
    assert entries(root)[0].size == sum(p.stat().st_size for p in one.rglob("*") if p.is_file())
    assert [e.kind for e in clear(root, kind="two-words")] == ["two-words"]
    assert clear(root, only=["nothing"]) == []
    assert [e.folder for e in clear(root, only=[one.name])] == [one]
    assert entries(root) == []
    assert (root / "detector-old").is_dir()


def test_what_is_being_made_is_not_cleared(tmp_path):
    root, begun, go = tmp_path / "cache", threading.Event(), threading.Event()

    def make(part):
        fill(part)
        begun.set()
        assert go.wait(60)

    thread = threading.Thread(target=cached, args=(root, "thing", KEY, make))
    thread.start()
    assert begun.wait(60)
    assert clear(root) == []
    go.set()
    thread.join()
    assert is_cached(root, "thing", KEY)


def test_a_digest_of_what_a_file_holds_is_remembered_until_it_changes(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "RECENT", -1.0)
    monkeypatch.setenv("FINEMATCH_CACHE", str(tmp_path / "memory"))
    path, made = tmp_path / "labels.json", []
    path.write_text("one")

    def make() -> str:
        made.append(path.read_text())
        return made[-1] * 2

    assert [files.digest_within(path, "a", make) for _ in range(2)] == ["oneone"] * 2
    files._known.clear()  # another process
    assert files.digest_within(path, "a", make) == "oneone"
    assert made == ["one"]
    files.digest_within(path, "b", make)
    path.write_text("three")
    assert files.digest_within(path, "a", make) == "threethree"
    assert made == ["one", "one", "three"]


def test_space_is_reserved_or_done_without(tmp_path, monkeypatch):
    """macOS has no posix_fallocate: arrays and runs must be written there, too."""
    from finematch.checkpoints import check_writable
    from finematch.files import new_array, reserve

    with open(tmp_path / "file", "wb") as file:
        assert reserve(file, 1000)
        monkeypatch.delattr(os, "posix_fallocate")
        assert not reserve(file, 2000)
    assert (tmp_path / "file").stat().st_size == 1000
    new_array(tmp_path / "a.npy", "float32", (3, 2))[:] = 1
    check_writable(tmp_path / "run", room=100)
    assert (tmp_path / "run").is_dir()
