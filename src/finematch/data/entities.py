"""Flickr30k Entities: phrases of the captions linked to boxes.

Plummer et al., ICCV 2015. `Sentences/<id>.txt` has a caption a line with phrases in brackets,
`[/EN#<entity>/<type>[/<type>...] words]`; `Annotations/<id>.xml` has the boxes of every entity. Entity 0 is
"not visual". Coordinates are kept as published, as xyxy pixels: the authors' own reader subtracts 1 from all
four, which moves the boxes by a pixel and leaves IoU between boxes of the same file as it is.
"""

from __future__ import annotations

import logging
import re
from pathlib import Path

from defusedxml.common import DefusedXmlException
from defusedxml.ElementTree import ParseError, fromstring

from finematch.data.checks import (
    BoxPolicy,
    check_name,
    check_sizes,
    clean_caption,
    read_text,
    reading,
    require_distinct,
    require_pictures,
    require_unique,
    stated_size,
)
from finematch.data.record import Box, DataError, Phrase, Record

logger = logging.getLogger(__name__)
PHRASE = re.compile(r"\[/EN#(\d+)/([^\s\[\]]+)\s+([^\[\]]*[^\s\[\]])\s*\]")


def load_entities(
    root: str | Path,
    split: str,
    *,
    image_dir: str | Path | None = None,
    invalid_boxes: str = "raise",
    check_images: bool = True,
) -> list[Record]:
    """Read the pictures that `<root>/<split>.txt` lists, one id a line.

    Args:
        root: folder with `Annotations/`, `Sentences/` and `<split>.txt`.
        split: name of the list.
        image_dir: folder of the pictures; `<root>/images` if not given.
        invalid_boxes: `"raise"`, or `"skip"` for a counted warning, where a box has no area or lies outside.
        check_images: look for every picture now, and compare the sizes of some with those that the XMLs state (all are
            compared when they are opened).

    Returns:
        Records in list order. A phrase's boxes are all boxes whose `<name>`s include its entity, none for
        entity 0, scenes and entities marked as having no box; `kind` is the type, several joined by "/".

    Raises:
        DataError: a missing list, sentence, XML or picture file, malformed XML, brackets that do not pair, an
            empty caption, an XML that is about another picture or another size.
    """
    root = Path(root)
    image_dir = Path(image_dir) if image_dir is not None else root / "images"
    listing, policy, unknown = root / f"{split}.txt", BoxPolicy(invalid_boxes, corners=True), 0
    ids = [check_name(image_id, listing, f"picture {image_id}") for image_id in read_text(listing).split()]
    require_distinct(ids, listing, "picture")
    if not ids:
        raise DataError(listing, "the list", "names no pictures", "Restore it; it has an id a line")
    records = []
    for image_id in ids:
        sentence_file = root / "Sentences" / f"{image_id}.txt"
        size, filename, boxes = _annotation(root / "Annotations" / f"{image_id}.xml", image_id, policy)
        captions, phrases = [], []
        for number, line in enumerate(read_text(sentence_file).rstrip("\r\n").split("\n")):
            caption, found = parse_sentence(line, sentence_file, f"caption {number + 1}")
            captions.append(caption)
            for start, end, kind, entity in found:
                phrases.append(Phrase(number, start, end, tuple(boxes.get(entity, ())), kind, entity))
        unknown += sum(phrase.entity not in boxes and phrase.entity != "0" for phrase in phrases)
        texts, links, source = tuple(captions), tuple(phrases), f"{sentence_file}: picture {image_id}"
        records.append(Record(image_id, split, texts, image_dir / filename, size, (), links, source))
    policy.report(root / "Annotations")
    if unknown:
        logger.warning("%s: %d phrases name an entity that no XML lists; they have no boxes", root, unknown)
    require_unique(records, listing)
    if check_images:
        require_pictures((record.image for record in records), listing)
        check_sizes(records, lambda record: root / "Annotations" / f"{record.image_id}.xml")
    return records


def parse_sentence(line: str, file: str | Path, record: str) -> tuple[str, list[tuple[int, int, str, str]]]:
    """The caption without brackets, and `(start, end, kind, entity)` of each phrase, `caption[start:end]`."""
    pieces, found, position, length, line = [], [], 0, 0, line.strip()
    for match in PHRASE.finditer(line):
        before, (entity, kind, words) = line[position : match.start()], match.groups()
        start = length + len(before)
        length = start + len(words)
        pieces += [before, words]
        found.append((start, length, kind, entity))
        position = match.end()
    caption = "".join([*pieces, line[position:]])
    if "[" in caption or "]" in caption:
        problem = f"brackets that do not form [/EN#id/type words] in {line!r}"
        raise DataError(file, record, problem, "Correct the sentence")
    return clean_caption(caption, file, record), found


def _annotation(
    file: Path, image_id: str, policy: BoxPolicy
) -> tuple[tuple[int, int], str, dict[str, list[Box]]]:
    """Stated size, file name, and the boxes of each entity (an empty list where it has none)."""
    try:
        tree = fromstring(read_text(file))
    except ParseError as error:
        line = f"line {error.position[0]}"
        raise DataError(file, line, f"malformed XML ({error})", "Download it again") from error
    except DefusedXmlException as error:
        remedy = "Remove its document type definition"
        raise DataError(file, "the file", f"unsafe XML ({error})", remedy) from error
    boxes: dict[str, list[Box]] = {}
    with reading(file, "<filename> and <size>"):
        filename = check_name(tree.find("filename").text.strip(), file, "<filename>")
        size = stated_size(tree.find("size/width").text, tree.find("size/height").text)
    if Path(filename).stem != image_id:
        raise DataError(file, f"<filename> {filename}", f"is not picture {image_id}", "Restore the right XML")
    for number, item in enumerate(tree.iter("object"), start=1):
        names = [name.text.strip() for name in item.iter("name") if name.text]
        record = f"object {number} (entity {', '.join(names)})"
        flags = [item.findtext(tag, "0").strip() for tag in ("nobndbox", "scene")]
        found = item.findall("bndbox")
        if not names or (not found and "1" not in flags):
            raise DataError(file, record, "has no name, or neither box nor nobndbox nor scene", "Correct it")
        with reading(file, record):
            corners = [
                [float(box.find(tag).text) for tag in ("xmin", "ymin", "xmax", "ymax")] for box in found
            ]
        checked = [policy.check(box, size, file, record) for box in corners]
        for name in set(names) - {"0"}:
            boxes.setdefault(name, []).extend(box for box in checked if box is not None)
    return size, filename, boxes
