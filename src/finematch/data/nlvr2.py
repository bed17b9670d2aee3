"""NLVR2: sentences that are true or false of a pair of images, as JSON lines.

Suhr et al., ACL 2019. A line has `identifier` ("dev-850-0-1": split, set, pair, sentence), `sentence` and `label`
("True", "False"); the hidden test has no label. Lines of train say in `directory` where their images lie.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

from finematch.data.checks import (
    check_name,
    clean_caption,
    read_text,
    reading,
    require_distinct,
    require_pictures,
)
from finematch.data.record import DataError, ImagePair
from finematch.files import disguise

FILES = {"train": "train", "val": "dev", "test": "test1"}  # a split by the release's name
IDENTIFIER = re.compile(r"(\w+-\d+-\d+)-\d+")


def load_nlvr2(
    lines: str | Path, image_dir: str | Path, split: str, *, check_images: bool = True
) -> list[ImagePair]:
    """Read the sentences of a split with their two images.

    Args:
        lines: `train.json`, `dev.json` or `test1.json`.
        image_dir: images lie in it as `<pair>-img0.png` (left) and `<pair>-img1.png` (right), those of train in
            `<directory>/` below it.

    Raises:
        DataError: A line that is no JSON, an identifier of another form, an empty sentence, a label other than True
            and False, two lines with one identifier, a missing image file.
    """
    found = []
    for number, line in enumerate(read_text(lines).split("\n"), 1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
        except json.JSONDecodeError as error:
            why = disguise(lines) or error.msg
            raise DataError(lines, f"line {number}", f"malformed JSON ({why})",
                            "Download the file again; it may be cut off") from error  # fmt: skip
        with reading(lines, f"line {number}"):
            identifier, sentence = entry["identifier"], entry["sentence"]
            label, folder = entry.get("label"), str(entry.get("directory", ""))
            match = IDENTIFIER.fullmatch(identifier)
        if match is None:
            raise DataError(lines, f"line {number}", f"the identifier {identifier!r} is not <split>-<set>-<pair>-"
                            "<sentence>", "Correct it: the images are found by it")  # fmt: skip
        if label not in (None, "True", "False"):
            problem = f"the label {label!r} is neither True nor False"
            raise DataError(lines, f"example {identifier}", problem, "Correct it")
        names = [f"{folder}/{match[1]}-img{side}.png".lstrip("/") for side in (0, 1)]
        left, right = (Path(image_dir) / check_name(name, lines, f"line {number}") for name in names)
        found.append(
            ImagePair(
                identifier,
                split,
                clean_caption(sentence, lines, f"example {identifier}"),
                (left, right),
                None if label is None else label == "True",
                source=f"{lines}: example {identifier}",
            )
        )
    if not found:
        raise DataError(lines, "the file", "has no lines", "Download it again")
    require_distinct((pair.identifier for pair in found), lines, "example")
    if check_images:
        require_pictures(dict.fromkeys(path for pair in found for path in pair.images), lines)
    return found
