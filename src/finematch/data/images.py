"""The one place that opens images. Whatever a decoder raises becomes a DataError that names the file and the record.

What an image is, in this project: its first frame, as RGB of 8 bits, turned as its EXIF tag says.

* Greyscale, palette, alpha and CMYK are converted. Grey of 16 or 12 bits is scaled by the range of its type; grey of 32
  bits (integers or floats) states no range and is refused.
* An annotated size says whether boxes are in pixels of the turned image or of the stored one. Where it cannot (a half
  turn, a mirrored or a square image) and there are boxes, the image is refused.
* Pillow's limit against decompression bombs (twice `Image.MAX_IMAGE_PIXELS`, 179 million pixels) stays.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

from finematch.files import DataError, disguise

ORIENTATION, BITS, PHOTOMETRIC = 274, 258, 262  # tags of EXIF and TIFF
TURNS = dict(enumerate((  # what rights an image, by the value of its tag; 1 needs nothing
    Image.Transpose.FLIP_LEFT_RIGHT, Image.Transpose.ROTATE_180, Image.Transpose.FLIP_TOP_BOTTOM,
    Image.Transpose.TRANSPOSE, Image.Transpose.ROTATE_270, Image.Transpose.TRANSVERSE, Image.Transpose.ROTATE_90,
), 2))  # fmt: skip


@contextmanager
def opening(image: Path | bytes | None, record: str, file: str | Path = "") -> Iterator[Image.Image]:
    """An image whose header was read; what is done with it inside the block raises DataError alone.

    Args:
        image: its file, or its encoded bytes, which lie in `file`.
    """
    file = image if isinstance(image, Path) else file
    if image is None:
        raise DataError(
            "(no file)",
            record,
            "this dataset publishes features, no images",
            "Use the feature arrays, or a dataset with images",
        )
    try:
        with Image.open(io.BytesIO(image) if isinstance(image, bytes) else image) as opened:
            yield opened
    except DataError:
        raise
    except FileNotFoundError:
        raise DataError(file, record, "the image is missing", "Restore it or remove its record") from None
    except Exception as error:  # Pillow's decoders raise whatever they like
        why = (
            "it is in no image format that is known"
            if isinstance(error, UnidentifiedImageError)
            else str(error)
        )
        why = disguise(image) or why or type(error).__name__
        raise DataError(
            file,
            record,
            f"the image cannot be decoded ({why})",
            "Download or convert it again, or remove its record",
        ) from error


def open_rgb(
    image: Path | bytes | None,
    record: str = "",
    *,
    file: str | Path = "",
    size: tuple[int, int] | None = None,
    boxed: bool = False,
) -> Image.Image:
    """Decode a whole image to RGB, turned as the module says.

    An image that cannot be read is never replaced, because that would pair a caption with the wrong pixels.

    Args:
        image: its file, or its encoded bytes, which lie in `file`.
        size: width and height that its annotation states.
        boxed: whether boxes of it are known.

    Raises:
        DataError: For a missing or undecodable image, deep grey without a range, another size than stated, or a turn
            that leaves open where its boxes lie.
    """
    with opening(image, record, file) as opened:
        opened.load()
        found, turn = _eight_bits(opened).convert("RGB"), TURNS.get(_orientation(opened))
    file = image if isinstance(image, Path) else file
    if turn is not None:
        turned = found.transpose(turn)
        if boxed and turned.size == found.size:
            raise DataError(
                file,
                record,
                "its EXIF tag turns or mirrors it, and its boxes may be of either side",
                "Write its pixels turned and without the tag, and look at the boxes",
            )
        found = found if size == found.size else turned
    if size is not None and found.size != size:
        raise DataError(
            file,
            record,
            f"is {found.size[0]} x {found.size[1]}, its annotation says {size[0]} x {size[1]}",
            "Use the images that were annotated, or scale the boxes",
        )
    return found


def possible_sizes(image: Path) -> set[tuple[int, int]]:
    """Width and height of an image, as stored and as turned. Only its header is read; DataError if that fails."""
    with opening(image, "the header") as opened:
        quarter = _orientation(opened) > 4  # a turn that swaps the sides
        return {opened.size, opened.size[::-1] if quarter else opened.size}


def check_shown(image: Path, record: str, size: tuple[int, int]) -> None:
    """Refuse boxes in pixels of an image of `size` for an image that `open_rgb` was not told of when it showed it.

    Raises:
        DataError: If the image as shown has another size, or its EXIF tag leaves open where the boxes lie.
    """
    with opening(image, record) as opened:
        turn, (width, height) = _orientation(opened), opened.size
    shown = (height, width) if turn > 4 else (width, height)
    if shown != size or turn in (2, 3, 4) or (turn > 4 and width == height):
        problem = f"is shown as {shown[0]} x {shown[1]}{' by its EXIF tag' if turn > 1 else ''}"
        raise DataError(image, record, f"{problem}, its boxes are of {size[0]} x {size[1]}",
                        "Write its pixels turned and without the tag; use the images that were annotated")  # fmt: skip


def _orientation(opened: Image.Image) -> int:
    try:
        return int(opened.getexif().get(ORIENTATION, 1))
    except Exception:  # a damaged tag turns nothing; the pixels are sound
        return 1


def _eight_bits(opened: Image.Image) -> Image.Image:
    """Deep grey as 8 bits, by the range of its type; other images as they are. Pillow alone would clip it to white."""
    deep = opened.mode == "I" and opened.format in ("PNG", "PPM")  # of 16 bits in these two
    if opened.mode in ("I", "F") and not deep:
        raise ValueError(f"grey of 32 bits, mode {opened.mode}, has no stated range; save it as 8 or 16 bits")
    if not (deep or opened.mode.startswith("I;16")):
        return opened
    tags = getattr(opened, "tag_v2", {})  # of TIFF, where 16 bits may hold 12, and 0 may be white
    top = 2 ** int(np.ravel(tags.get(BITS, 16))[0]) - 1
    share = np.asarray(opened).astype(np.float32) / top
    share = 1 - share if tags.get(PHOTOMETRIC) == 0 else share
    return Image.fromarray((share.clip(0, 1) * 255).round().astype(np.uint8))
