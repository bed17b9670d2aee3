"""Flickr30k Entities: bracketed sentences, spans, boxes by entity, and entities that have none."""

from __future__ import annotations

import logging

import pytest
from formats import entities, entity_object

from finematch.data import DataError, load, load_entities
from finematch.data.entities import parse_sentence

SENTENCES = (
    "[/EN#1/people Two men] and [/EN#2/people/animals one of their dogs] see [/EN#0/notvisual it] .\n"
    "Nobody bracketed this , café .\n"
    "[/EN#3/scene The beach] has [/EN#4/other wind] .\n"
)
OBJECTS = [
    entity_object(["1"], (1, 2, 10, 12)),
    entity_object(["1", "2"], (11, 2, 20, 24)),
    entity_object(["3"], nobndbox=1, scene=1),
    entity_object(["4"], nobndbox=1, scene=0),
]


def test_phrases_and_boxes(tmp_path):
    (record,) = load_entities(entities(tmp_path, SENTENCES, OBJECTS), "val")
    assert (record.image_id, record.split, record.size) == ("55", "val", (32, 24))
    assert record.captions == (
        "Two men and one of their dogs see it .",
        "Nobody bracketed this , café .",
        "The beach has wind .",
    )
    found = [(record.captions[p.caption][p.start : p.end], p.kind, p.entity, p.boxes) for p in record.phrases]
    assert found == [
        ("Two men", "people", "1", ((1, 2, 10, 12), (11, 2, 20, 24))),
        ("one of their dogs", "people/animals", "2", ((11, 2, 20, 24),)),
        ("it", "notvisual", "0", ()),
        ("The beach", "scene", "3", ()),
        ("wind", "other", "4", ()),
    ]
    assert record.open().size == (32, 24)


def test_entity_0_has_no_boxes_even_if_the_xml_gives_some(tmp_path):
    root = entities(tmp_path, "See [/EN#0/notvisual it] .\n", [entity_object(["0"], (1, 2, 10, 12))])
    assert load_entities(root, "val")[0].phrases[0].boxes == ()


def test_white_space_is_not_part_of_a_phrase():
    caption, found = parse_sentence("  a [/EN#12/other  red ball ] rolls\r", "f", "r")
    assert caption == "a red ball rolls"
    assert [caption[start:end] for start, end, _, _ in found] == ["red ball"]


@pytest.mark.parametrize(
    "line",
    [
        "[/EN#1/people A man runs .",
        "A man] runs .",
        "[/EN#1/people A [/EN#2/other man] runs] .",
        "[A man] runs .",
        "[/EN#1 A man] runs .",
        "[/EN#x/people A man] runs .",
        "[/EN#1/people ] runs .",
    ],
)
def test_brackets_that_do_not_pair(tmp_path, line):
    root = entities(tmp_path, f"A fine caption .\n{line}\n", [entity_object(["1"], (1, 2, 10, 12))])
    with pytest.raises(DataError, match=r"55\.txt: caption 2: brackets"):
        load_entities(root, "val")


def test_an_entity_that_the_xml_lacks_is_counted(tmp_path, caplog):
    root = entities(tmp_path, "[/EN#1/people A man] and [/EN#9/people a boy]\n", OBJECTS)
    with caplog.at_level(logging.WARNING):
        (record,) = load_entities(root, "val")
    assert [len(p.boxes) for p in record.phrases] == [2, 0]
    assert "1 phrases name an entity that no XML lists" in caplog.text


def test_another_size_or_another_picture(tmp_path):
    root = entities(tmp_path, SENTENCES, OBJECTS, size=(64, 48))
    with pytest.raises(DataError, match=r"55\.xml: image 55, size 64 x 48: the image .*55\.jpg is 32 x 24"):
        load_entities(root, "val")
    assert load_entities(root, "val", check_images=False)[0].size == (64, 48)
    xml = root / "Annotations" / "55.xml"
    xml.write_text(xml.read_text().replace("55.jpg", "56.jpg"))
    with pytest.raises(DataError, match=r"55\.xml: <filename> 56\.jpg: is not picture 55"):
        load_entities(root, "val", check_images=False)


def test_an_object_with_neither_box_nor_flag(tmp_path):
    root = entities(tmp_path, SENTENCES, [OBJECTS[0], entity_object(["2"])])
    with pytest.raises(DataError, match=r"55\.xml: object 2 \(entity 2\): has no name, or neither"):
        load_entities(root, "val")


@pytest.mark.parametrize(
    ("folder", "name"), [("Sentences", "55.txt"), ("Annotations", "55.xml"), (".", "val.txt")]
)
def test_a_missing_file_is_named(tmp_path, folder, name):
    root = entities(tmp_path, SENTENCES, OBJECTS)
    (root / folder / name).unlink()
    with pytest.raises(DataError, match=rf"{name}: the file: cannot be read"):
        load_entities(root, "val")


def test_a_list_that_is_empty_or_repeats(tmp_path):
    root = entities(tmp_path, SENTENCES, OBJECTS)
    (root / "val.txt").write_text("\n")
    with pytest.raises(DataError, match=r"val\.txt: the list: names no pictures"):
        load_entities(root, "val")
    (root / "val.txt").write_text("55\n55\n")
    with pytest.raises(DataError, match=r"val\.txt: picture 55: is listed more than once"):
        load_entities(root, "val")


def test_unsafe_xml(tmp_path):
    root = entities(tmp_path, SENTENCES, OBJECTS)
    xml = root / "Annotations" / "55.xml"
    xml.write_text('<!DOCTYPE a [<!ENTITY e "x">]>' + xml.read_text())
    with pytest.raises(DataError, match=r"55\.xml: the file: unsafe XML"):
        load_entities(root, "val")


def test_scenes(scenes):
    records, plain = (load(name, scenes.parent, "val") for name in ("scenes_entities", "scenes"))
    assert [r.image_id for r in records] == [r.image_id for r in plain]
    assert [r.captions for r in records] == [r.captions for r in plain]
    assert sum(len(p.boxes) > 0 for r in records for p in r.phrases) > len(records)
    assert all(r.captions[p.caption][p.start : p.end].strip() for r in records for p in r.phrases)


def test_real_entities(real_data):
    """2,807 phrases with 3,650 phrase boxes: every entity here is named by one phrase."""
    records = {split: load("flickr8k_entities", real_data, split) for split in ("train", "val")}
    assert {split: len(found) for split, found in records.items()} == {"train": 726, "val": 108}
    found = [(r, p) for split in records.values() for r in split for p in r.phrases]
    assert len(found) == 2807
    assert sum(len(p.boxes) for _, p in found) == 3650
    for record, phrase in found:
        number = phrase.caption
        line = (
            (real_data / "flickr8k_entities" / "Sentences" / f"{record.image_id}.txt")
            .read_text()
            .split("\n")[number]
        )
        text = record.captions[number][phrase.start : phrase.end]
        assert f"[/EN#{phrase.entity}/{phrase.kind} {text}]" in line
    assert (
        records["train"][0].captions[0]
        == "A child in a pink dress is climbing up a set of stairs in an entry way ."
    )
