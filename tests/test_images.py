"""One place opens images: deep grey keeps its greys, EXIF turns count, and whatever a decoder raises names the file."""

from __future__ import annotations

import ast
import io
import struct
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

import finematch
from finematch.data import DataError, Object, Record, open_rgb
from finematch.data.shards import write_shards

RAMP = np.linspace(0, 1, 64 * 48).reshape(48, 64)


def test_nothing_else_opens_images():
    for path in Path(finematch.__file__).parent.rglob("*.py"):
        opened = [node for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
                  if isinstance(node, ast.Attribute) and ast.unparse(node) == "Image.open"]  # fmt: skip
        assert not opened or path.name == "images.py", path


@pytest.mark.parametrize("suffix", ["png", "tif", "pgm", "jp2"])
def test_sixteen_bits_are_scaled(tmp_path, suffix):
    path = tmp_path / f"deep.{suffix}"
    Image.fromarray((RAMP * 65535).round().astype(np.uint16)).save(path)
    seen = np.asarray(open_rgb(path), float)
    assert np.abs(seen - 255 * RAMP[..., None]).max() <= 1


def tiff(path: Path, data: bytes, bits: int, *, order: str = "<", photometric: int = 1) -> Path:
    """A grey TIFF of 64 x 48, one strip, without compression."""
    values = {256: 64, 257: 48, 258: bits, 259: 1, 262: photometric, 273: 8 + 2 + 10 * 12 + 4, 277: 1, 278: 48,
              279: len(data), 339: 1}  # fmt: skip
    entries = b"".join(struct.pack(f"{order}HHII", tag, 4, 1, value) for tag, value in values.items())
    head = (b"II" if order == "<" else b"MM") + struct.pack(f"{order}HI", 42, 8)
    path.write_bytes(head + struct.pack(f"{order}H", len(values)) + entries + bytes(4) + data)
    return path


@pytest.mark.parametrize(("order", "photometric"), [("<", 1), ("<", 0), (">", 1)])
def test_tiff_of_sixteen_bits_by_its_tags(tmp_path, order, photometric):
    """Big-endian, and grey whose 0 is white: Pillow does not turn the latter round."""
    data = (RAMP * 65535).round().astype(f"{order}u2").tobytes()
    path = tiff(tmp_path / "x.tif", data, 16, order=order, photometric=photometric)
    seen = np.asarray(open_rgb(path), float)[..., 0] / 255
    assert np.abs(seen - (RAMP if photometric else 1 - RAMP)).max() < 0.01


def test_twelve_bits_are_scaled(tmp_path):
    values = (RAMP * 4095).round().astype(int).reshape(-1, 2)
    packed = np.stack(
        [values[:, 0] >> 4, (values[:, 0] & 15) << 4 | values[:, 1] >> 8, values[:, 1] & 255], 1
    )
    path = tiff(tmp_path / "x.tif", packed.astype(np.uint8).tobytes(), 12)
    with Image.open(path) as opened:
        assert opened.mode == "I;16"
    seen = np.asarray(open_rgb(path), float)[..., 0] / 255
    assert np.abs(seen - RAMP).max() < 0.01


@pytest.mark.parametrize("kind", [np.int32, np.float32])
def test_grey_without_a_range_is_refused(tmp_path, kind):
    path = tmp_path / "deep.tif"
    Image.fromarray((RAMP * 2**20).astype(kind)).save(path)
    with pytest.raises(DataError, match=r"deep\.tif: image 7: .*32 bits.*save it as 8 or 16 bits"):
        open_rgb(path, "image 7")


# ------------------------------------------------------------------------------------------- decoders
def damaged(folder: Path) -> list[Path]:
    """Files for which Pillow raises ValueError, DecompressionBombError and others, no OSError."""
    info = PngImagePlugin.PngInfo()
    info.add_text("prompt", "a" * (3 * 2**20), zip=True)
    small = Image.new("RGB", (8, 8))
    small.save(folder / "text.png", pnginfo=info)
    small.save(folder / "profile.png", icc_profile=b"a" * (3 * 2**20))
    (folder / "header.ppm").write_bytes(b"P6\n8 8\n40A255\n" + bytes(192))
    sgi = bytearray(512 + 64)
    sgi[:12] = b"\x01\xda\x00\x01\x00\x07\x00\x08\x00\x08\x00\x05"
    (folder / "mode.sgi").write_bytes(bytes(sgi))
    (folder / "huge.pbm").write_bytes(b"P4\n60000 60000\n")
    file = io.BytesIO()
    small.save(file, "GIF")
    (folder / "cut.gif").write_bytes(file.getvalue()[:15])
    (folder / "pointer.jpg").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    (folder / "page.jpg").write_text("<!DOCTYPE html><html>Sign in</html>")
    (folder / "zeros.jpg").write_bytes(bytes(4096))
    (folder / "note.jpg").write_text("This is a text.")
    return sorted(folder.iterdir())


def test_what_a_decoder_raises_names_file_and_record(tmp_path):
    files = damaged(tmp_path)
    assert len(files) == 10
    for path in files:
        record = Record(path.stem, "train", ("a thing",), path, source=f"d.json: image {path.stem}")
        with pytest.raises(DataError, match=r"cannot be decoded \(") as caught:
            record.open()
        assert (caught.value.file, caught.value.record) == (str(path), f"d.json: image {path.stem}")
    reasons = {"pointer": "git lfs pull", "page": "web page", "zeros": "cut off", "note": "no image format"}
    for name, said in reasons.items():
        with pytest.raises(DataError, match=said):
            open_rgb(tmp_path / f"{name}.jpg")


def test_damaged_images_are_skipped_in_shards(tmp_path, caplog):
    (tmp_path / "in").mkdir()
    records = [Record(path.stem, "train", ("a thing",), path) for path in damaged(tmp_path / "in")]
    Image.new("RGB", (8, 8)).save(tmp_path / "fine.png")
    fine = Record("fine", "train", ("a thing",), tmp_path / "fine.png")
    write_shards([fine, *records], tmp_path / "shards", broken="skip", echo=None)
    assert caplog.text.count("left out: ") == len(records)


# ------------------------------------------------------------------------------------------- turns
def turned(path: Path, orientation: int, size: tuple[int, int] = (64, 48)) -> np.ndarray:
    """An image whose tag says that it is turned; as it is stored. Its upper left quarter is white."""
    stored = np.zeros((size[1], size[0], 3), np.uint8)
    stored[: size[1] // 2, : size[0] // 2] = 255
    exif = Image.Exif()
    exif[274] = orientation
    Image.fromarray(stored).save(path, exif=exif)
    return stored


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", ["png", "tif", "webp"])
def test_images_are_turned_as_their_tag_says(tmp_path, orientation, suffix):
    path = tmp_path / f"x.{suffix}"
    stored = turned(path, orientation)
    flipped = {2: stored[:, ::-1], 4: stored[::-1], 3: stored[::-1, ::-1]}
    swapped = stored.transpose(1, 0, 2)
    flipped |= {5: swapped, 6: swapped[:, ::-1], 7: swapped[::-1, ::-1], 8: swapped[::-1]}
    expected = flipped.get(orientation, stored)
    seen = np.asarray(open_rgb(path))
    assert seen.shape == expected.shape
    assert np.abs(seen.astype(float) - expected).mean() < 16


def test_the_stated_size_says_which_side_boxes_are_of(tmp_path):
    path, thing = tmp_path / "x.png", (Object((1.0, 1.0, 9.0, 9.0), "dog"),)
    stored = turned(path, 6)
    boxed = Record("x", "train", (), path, (48, 64), thing)
    assert boxed.open().size == (48, 64)
    boxed = Record("x", "train", (), path, (64, 48), thing)
    np.testing.assert_array_equal(np.asarray(boxed.open()), stored)
    with pytest.raises(DataError, match=r"x\.png: x: is 48 x 64, its annotation says 32 x 24"):
        Record("x", "train", (), path, (32, 24), thing).open()


@pytest.mark.parametrize(("orientation", "size"), [(3, (64, 48)), (2, (64, 48)), (6, (48, 48))])
def test_boxes_on_an_image_that_may_be_turned_are_refused(tmp_path, orientation, size):
    path, thing = tmp_path / "x.png", (Object((1.0, 1.0, 9.0, 9.0), "dog"),)
    turned(path, orientation, size)
    assert Record("x", "train", (), path, size).open().size == size  # no boxes, no question
    with pytest.raises(DataError, match="EXIF tag turns or mirrors it, and its boxes may be of either side"):
        Record("x", "train", (), path, size, thing).open()


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_a_damaged_tag_turns_nothing(tmp_path):
    stored = turned(tmp_path / "x.png", 6)
    info = b"Exif\0\0II*\0\x08\0\0\0\xff\xff" + bytes(3)
    Image.fromarray(stored).save(tmp_path / "x.jpg", exif=info)
    assert open_rgb(tmp_path / "x.jpg").size == (64, 48)
