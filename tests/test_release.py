"""Trained runs as one archive: the same bytes, opened elsewhere, and nothing that is damaged, strange or another's."""

import http.server
import json
import shutil
import stat
import threading
import zipfile
from functools import partial
from pathlib import Path

import pytest
from test_runs import DATA, page, trained

from finematch import release
from finematch.__main__ import main
from finematch.data import digests, splits
from finematch.features import inputs as features_inputs
from finematch.files import DataError
from finematch.release import pack, unpack
from finematch.runs import begin, latest, open_run

pack = partial(pack, networks=False, echo=lambda line: None)


def workbook(folder: Path) -> Path:
    (folder / "notebooks").mkdir(parents=True)
    (folder / "pyproject.toml").touch()
    return folder


@pytest.fixture
def book(tmp_path, monkeypatch):
    """A workbook with two trained runs; another one, `there`, lies beside it."""
    workbook(tmp_path / "there")
    monkeypatch.chdir(workbook(tmp_path / "here"))
    trained(out="papermill_runs/mvam/toy.tiny.a.s0")
    trained(out="papermill_runs/mvam/toy.tiny.a.s1", seed=1)
    return tmp_path / "here"


RUNS = ["papermill_runs/mvam/toy.tiny.a.s0", "papermill_runs/mvam/toy.tiny.a.s1"]


def content(folder: Path) -> dict[str, bytes]:
    return {
        f.relative_to(folder).as_posix(): f.read_bytes() for f in sorted(folder.rglob("*")) if f.is_file()
    }


def test_runs_are_packed_to_the_same_bytes_and_opened_elsewhere(book, monkeypatch, capsys):
    assert main(["release", "one.zip", *RUNS, "--no-networks"]) == 0
    assert "one.zip: " in capsys.readouterr().out
    other = pack("other.zip", reversed(RUNS))
    assert other.read_bytes() == Path("one.zip").read_bytes()
    assert not list(book.glob("*.part"))
    monkeypatch.chdir(book.parent / "there")
    assert main(["release", "--open", str(book / "one.zip")]) == 0
    said = capsys.readouterr().out
    assert said.count("\n") == 2
    assert "already" not in said
    for name in RUNS:
        run, was = open_run(name), open_run(book / name)
        assert (run.digest, run.metrics, run.content) == (was.digest, was.metrics, was.content)
        kept = content(book / name)
        assert content(Path(name)) == {
            one: kept[one] for one in ("best.safetensors", "log.jsonl", "metrics.json")
        }
    assert latest("mvam", seed=1).name == "toy.tiny.a.s1"
    before = {file: file.stat().st_mtime_ns for file in Path().rglob("*")}
    assert main(["release", "--open", str(book / "one.zip")]) == 0
    assert capsys.readouterr().out.count("(is here already)") == 2
    assert {file: file.stat().st_mtime_ns for file in Path().rglob("*")} == before


def test_metrics_that_git_keeps_get_their_weights(book):
    archive, there = pack("one.zip", RUNS), book.parent / "there/papermill_runs"
    (there / "mvam/toy.tiny.a.s0").mkdir(parents=True)
    shutil.copy(f"{RUNS[0]}/metrics.json", there / "mvam/toy.tiny.a.s0")
    assert all(unpack(archive, runs=there, cache=there).values())
    assert open_run(there / "mvam/toy.tiny.a.s0").digest == open_run(RUNS[0]).digest
    assert (there / "mvam/toy.tiny.a.s0/best.safetensors").is_file()


def test_another_run_is_never_overwritten_and_then_nothing_is_unpacked(book, monkeypatch, capsys):
    archive, there = pack("one.zip", RUNS).resolve(), book.parent / "there"
    monkeypatch.chdir(there)
    trained(out=RUNS[1], seed=2)
    kept = content(there)
    with pytest.raises(
        DataError, match=r"toy\.tiny\.a\.s1: the run: is another run: nothing was unpacked.*--into"
    ):
        unpack(archive)
    assert content(there) == kept
    assert main(["release", "--open", str(archive)]) == 1
    assert "another run" in capsys.readouterr().err
    assert main(["release", "--open", str(archive), "--into", "elsewhere"]) == 0
    assert open_run("elsewhere/mvam/toy.tiny.a.s1").seed == 1
    shutil.rmtree(RUNS[1])
    run = begin(
        "mvam", page(seed=1), data=DATA, features="f" * 64, out=RUNS[1]
    )  # of this identity, at its beginning
    run.release()
    with pytest.raises(DataError, match="is a training of its own of this run"):
        unpack(archive)


def rewritten(archive: Path, target: Path, change, more=()) -> Path:
    """The archive with `change(name, bytes)` of each member (None: without it), and more members."""
    with zipfile.ZipFile(archive) as old, zipfile.ZipFile(target, "w") as new:
        for info in old.infolist():
            if (data := change(info.filename, old.read(info))) is not None:
                new.writestr(info.filename, data)
        for name, data in more:
            new.writestr(name, data)
    return target


def stating(**added):
    """Adds members to release.json, so that they are no strangers there."""

    def change(name: str, data: bytes) -> bytes:
        if name != "release.json":
            return data
        stated = json.loads(data)
        return json.dumps(stated | {"members": stated["members"] | added}).encode()

    return change


def test_damaged_and_strange_archives_are_refused_before_anything_is_written(book, tmp_path):
    archive, runs = pack("one.zip", RUNS[:1]), tmp_path / "into"
    weights, target = "runs/mvam/toy.tiny.a.s0/best.safetensors", tmp_path / "bad.zip"

    def same(name, data):
        return data

    def one(which, new):
        return lambda name, data: new(data) if name == which else data

    def refused(message: str, bad: Path = target) -> None:
        with pytest.raises(DataError, match=message):
            unpack(bad, runs=runs, cache=tmp_path / "cache")
        assert not runs.exists()
        assert not (tmp_path / "cache").exists()

    sha = {"bytes": 1, "sha256": "ca978112ca1bbdcafac231b39a23dc4da786eff8147c4e72b9807785afee48bb"}  # of "a"
    for name in ("../evil", "/tmp/evil", "runs/mvam/../../evil/metrics.json", "runs/mvam/x/../metrics.json",
                 "runs/../mvam/metrics.json", "runs/mvam/x/run.ipynb", "runs/mvam/..", "cache/../evil/entry.json",
                 "cache/regions-0123456789abcdef/entry.json", "cache/word_net-0123456789abcdef/../x",
                 "runs\\mvam\\x\\metrics.json", "runs/mvam/.. /metrics.json", "C:/x/metrics.json"):  # fmt: skip
        rewritten(archive, target, stating(**{name: sha}), [(name, "a")])
        refused("is nothing that a release holds")
    link = zipfile.ZipInfo("runs/mvam/x/metrics.json")
    link.external_attr = (stat.S_IFLNK | 0o777) << 16
    rewritten(
        archive, target, stating(**{link.filename: sha}), [(link, "a")]
    )  # a link is written as the file it is
    refused("run mvam/x: has no metrics")
    rewritten(archive, target, one(weights, lambda data: data[:-1] + bytes([data[-1] ^ 1])))
    refused(f"{weights}: is damaged")
    rewritten(archive, target, one(weights, lambda data: data[:-1]))
    refused(f"{weights}: is damaged")
    rewritten(archive, target, one(weights, lambda data: None))
    refused(f"{weights}: is in the archive or in release.json, not in both")
    rewritten(archive, target, same, [("runs/mvam/x/metrics.json", "a")])
    refused("runs/mvam/x/metrics.json: is in the archive or in release.json, not in both")
    with pytest.warns(UserWarning, match="Duplicate name"):
        rewritten(archive, target, same, [(weights, "a")])
    refused(f"{weights}: is in the archive or in release.json, not in both, or twice")
    rewritten(archive, target, one("release.json", lambda data: None))
    refused("release.json: is missing or damaged")
    rewritten(archive, target, one("release.json", lambda data: b"[]"))
    refused("release.json: is missing or damaged")
    rewritten(archive, target, one("release.json", lambda data: data.replace(b'"format": 1', b'"format": 2')))
    refused("it is of format 2; update finematch")
    rewritten(archive, target, one("runs/mvam/toy.tiny.a.s0/metrics.json", lambda data: None))
    refused("not in both")
    whole = archive.read_bytes()
    for cut in (0, 100, len(whole) // 2, len(whole) - 10):
        target.write_bytes(whole[:cut])
        refused("is no whole zip")
    raw = bytearray(whole)
    raw[raw.find(weights.encode()) + len(weights) + 200] ^= (
        1  # in the stored weights, whose CRC the zip has as well
    )
    target.write_bytes(raw)
    refused("is no whole zip|is damaged")
    target.write_text("<!doctype html><p>moved")
    refused("it is a web page")
    refused("the archive: cannot be read", tmp_path / "nowhere.zip")
    assert all(unpack(archive, runs=runs, cache=tmp_path / "cache").values())


def test_a_release_is_read_from_an_address(book, tmp_path):
    pack("one.zip", RUNS[:1])
    handler = partial(http.server.SimpleHTTPRequestHandler, directory=str(book))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}"
        assert len(unpack(f"{address}/one.zip", runs=tmp_path / "into", cache=tmp_path / "cache")) == 1
        with pytest.raises(DataError, match=r"two\.zip: the address: cannot be read .*404"):
            unpack(f"{address}/two.zip")
        server.shutdown()
    with pytest.raises(DataError, match="the address: cannot be read"):
        unpack(f"{address}/one.zip")
    assert open_run(tmp_path / "into/mvam/toy.tiny.a.s0").status == "current"


def test_what_cannot_be_packed_is_named(book):
    with pytest.raises(DataError, match="has not finished"):
        pack("one.zip", ["papermill_runs/mvam/nothing"])
    shutil.copytree(RUNS[0], "papermill_runs/mvam/bare")
    Path("papermill_runs/mvam/bare/best.safetensors").unlink()
    with pytest.raises(DataError, match=r"bare: best\.safetensors: is not here"):
        pack("one.zip", ["papermill_runs/mvam/bare"])
    shutil.copytree(RUNS[0], "elsewhere/mvam/toy.tiny.a.s0")
    with pytest.raises(DataError, match="is the name of two runs"):
        pack("one.zip", [RUNS[0], "elsewhere/mvam/toy.tiny.a.s0"])
    shutil.copytree(RUNS[0], "papermill_runs/mvam/two words")
    with pytest.raises(DataError, match="has a name that no release has"):
        pack("one.zip", ["papermill_runs/mvam/two words"])
    assert not Path("one.zip").exists()
    shutil.rmtree("papermill_runs")
    with pytest.raises(DataError, match="are not here with their weights"):
        pack("one.zip")
    assert main(["release", "one.zip"]) == 1


def test_a_first_look_needs_no_training(tmp_path, monkeypatch, capsys):
    """The run nearest to its preset is packed with the network that looks at its images, which is not trained again."""
    from finematch import match, rebuild
    from finematch.checkpoints import save_weights
    from finematch.config import Settings
    from finematch.training import seed_everything

    for module in (splits, features_inputs):
        monkeypatch.setattr(module, "SMOKE", {"train": 80, "val": 40, "test": 20})
    monkeypatch.chdir(workbook(tmp_path / "here"))
    for name, changes in (
        ("far", {"views": 2, "diversity": "none"}),
        ("near", {"views": 2}),
        ("seed", {"seed": 3}),
    ):
        s = Settings("mvam", {"smoke": True, **changes})
        data = rebuild.open_inputs(s, Path())
        parts = {n: digests(part.records) for n, part in data.splits.items()}
        made = features_inputs.origin({n: part.images for n, part in data.splits.items()})
        run = begin("mvam", s, data=parts, features=made, out=f"papermill_runs/mvam/{name}")
        seed_everything(1)
        save_weights(rebuild.build(s, data), run.folder / "best.safetensors")
        run.finish({"rsum": 1.0}, seconds=1.0, protocol="smoke")
    assert "epoch 1/1" in capsys.readouterr().out
    with pytest.raises(DataError, match="are not here"):
        release.reference_runs()  # smoke runs
    for file in Path("papermill_runs").rglob("metrics.json"):
        file.write_text(file.read_text().replace('"smoke": true', '"smoke": false', 1))
    assert [folder.name for folder in release.reference_runs()] == ["seed"]
    shutil.rmtree("papermill_runs/mvam/seed")
    assert [folder.name for folder in release.reference_runs()] == ["near"]
    for file in Path("papermill_runs").rglob("metrics.json"):
        file.write_text(file.read_text().replace('"smoke": false', '"smoke": true', 1))
    archive = release.pack(tmp_path / "one.zip", ["papermill_runs/mvam/near"])
    with zipfile.ZipFile(archive) as file:
        assert any(name.startswith("cache/attribute_net-") for name in file.namelist())
    run = open_run("papermill_runs/mvam/near")
    record = run.data.splits["test"].records[0]
    wanted = match(run, record.image, record.captions[0]).score
    workbook(tmp_path / "there")
    (tmp_path / "there/data").mkdir()
    for name in ("scenes", "cache/scenes-smoke"):  # the images: drawn here, and known by their bytes
        if (source := tmp_path / "here/data" / name).exists():
            shutil.copytree(source, tmp_path / "there/data" / name)
    monkeypatch.chdir(tmp_path / "there")
    capsys.readouterr()
    unpack(archive)
    there = open_run("latest", method="mvam", smoke=True)
    assert match(there, record.image, record.captions[0]).score == wanted
    assert there.status == "current"
    assert "epoch" not in capsys.readouterr().out
