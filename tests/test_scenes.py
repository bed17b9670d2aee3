"""The embedded set: what it writes, that its captions and boxes are true, and how hard it is."""

from __future__ import annotations

import hashlib
import json
import os
from functools import partial
from itertools import pairwise
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from PIL import Image
from tokenizers import Tokenizer

from finematch.data import digests as digests_of_parts
from finematch.data import load
from finematch.data.coco import categories, load_coco
from finematch.data.entities import load_entities
from finematch.data.karpathy import load_karpathy
from finematch.data.record import DataError
from finematch.data.splits import open_records, reported_split, selection
from finematch.scenes import generator as scenes_module
from finematch.scenes import tasks as tasks_module
from finematch.scenes.baselines import bag_of_words, difficulty, full_oracle, recalls
from finematch.scenes.generator import (
    CATEGORIES,
    MIN_VISIBLE,
    RGB,
    SPLITS,
    TOKENIZER,
    VERSION,
    attributes,
    build_tokenizer,
    draw_picture,
    entity,
    generate,
    main,
    owners,
    part_digests,
    picture_of,
)
from finematch.scenes.language import (
    TABLES,
    UNSEEN,
    labels,
    noun_phrase,
    plural,
    solutions,
    unseen,
    vocabulary,
)

COUNTS = {"train": 60, "val": 20, "test": 20}


@pytest.fixture(scope="session")
def small(tmp_path_factory) -> Path:
    return generate(tmp_path_factory.mktemp("embedded") / "scenes", **COUNTS)


@pytest.fixture(scope="session")
def truths(small) -> list[dict]:
    return [picture for split in SPLITS for picture in attributes(small, split)]


def digests(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def test_counts(small, truths):
    images = json.loads((small / "dataset_scenes.json").read_text())["images"]
    assert [sum(image["split"] == split for image in images) for split in SPLITS] == list(COUNTS.values())
    assert len(list((small / "images").iterdir())) == len(truths) == sum(COUNTS.values())
    assert all(len(image["sentences"]) == 5 for image in images)
    assert len({sentence["sentid"] for image in images for sentence in image["sentences"]}) == 5 * len(images)
    assert {len(picture["objects"]) for picture in truths} == {2, 3, 4, 5}
    for key, table in TABLES.items():
        assert {thing[key] for picture in truths for thing in picture["objects"]} == set(table)


def test_same_bytes_for_a_seed_whatever_the_workers(tmp_path):
    counts = {"train": 3, "val": 2, "test": 2}
    one = digests(generate(tmp_path / "one", seed=5, **counts))
    two = digests(generate(tmp_path / "two", seed=5, workers=2, **counts))
    other = digests(generate(tmp_path / "other", seed=6, **counts))
    assert one == two
    assert "meta.json" in one
    pictures = [name for name in one if name.startswith("images/")]
    assert len(pictures) == 7
    assert all(one[name] != other[name] for name in pictures)
    assert not list(tmp_path.glob(".*"))


def test_the_set_is_what_it_always_was(tmp_path):
    """Pixels, and the bytes of all other files. Raise `VERSION` when this digest has to change."""
    folder, found = generate(tmp_path / "scenes", seed=3, train=6, val=2, test=2), hashlib.sha256()
    for path in sorted(p for p in folder.rglob("*") if p.is_file() and p.name != "version.json"):
        found.update(path.relative_to(folder).as_posix().encode())
        found.update(np.asarray(Image.open(path)).tobytes() if path.suffix == ".png" else path.read_bytes())
    assert VERSION == 2
    assert found.hexdigest() == "5efac9a3711a43e051639ff7e88c8b3d955ba612e615115aefac266b703ea5e0"


def test_every_part_has_a_digest_of_its_own(tmp_path):
    counts = {"train": 2, "val": 1, "test": 1}
    folder, other = (generate(tmp_path / name, seed=s, **counts) for name, s in (("one", 0), ("two", 1)))
    said = json.loads((folder / "version.json").read_text())
    assert said == {"version": VERSION, "parts": part_digests(folder)}
    assert set(said["parts"]) == {"images", "captions", "boxes", "phrases"}
    theirs = part_digests(other)
    assert all(theirs[part] != found for part, found in said["parts"].items())
    (folder / "questions.json").write_text("{}")  # a part that comes later
    assert part_digests(folder) == said["parts"]
    (folder / "annotations" / "captions_val.json").write_text("{}")
    changed = part_digests(folder)
    assert {part for part in changed if changed[part] != said["parts"][part]} == {"captions"}


def age(folder: Path) -> None:
    """As an older generator left it: other captions, no version."""
    (folder / "version.json").unlink()
    (folder / "dataset_scenes.json").write_text("{}")


def test_the_set_of_an_older_generator_is_never_used(tmp_path):
    counts = {"train": 2, "val": 1, "test": 1}
    folder = generate(tmp_path / "scenes", seed=4, **counts)
    load("scenes", tmp_path, "val")
    age(folder)
    with pytest.raises(
        DataError, match=r"drawn by version 1, this is 2\. .*generator .*scenes --seed 4 --size 64"
    ):
        load("scenes_coco", tmp_path, "val")
    generate(folder, seed=4, **counts)  # the remedy
    assert len(load("scenes", tmp_path, "val")) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["scenes"]


def test_the_default_set_of_an_older_generator_is_drawn_again(tmp_path, monkeypatch):
    counts = {"train": 2, "val": 1, "test": 1}
    monkeypatch.setattr(scenes_module, "DEFAULTS", {"seed": 0, "size": 64, **counts})
    monkeypatch.setattr(scenes_module, "generate", partial(generate, **counts))
    age(generate(tmp_path / "scenes", **counts))
    assert len(load("scenes_entities", tmp_path, "train")) == 2
    assert scenes_module.version_of(tmp_path / "scenes") == VERSION


def test_the_set_of_a_newer_generator_is_left_alone(tmp_path):
    counts = {"train": 2, "val": 1, "test": 1}
    folder = generate(tmp_path / "scenes", **counts)
    (folder / "version.json").write_text(json.dumps({"version": VERSION + 1, "parts": {}}))
    for action in (lambda: load("scenes", tmp_path, "val"), lambda: generate(folder, **counts)):
        with pytest.raises(DataError, match=r"drawn by version 3, this is 2\. Update finematch"):
            action()


def test_a_picture_does_not_depend_on_the_size_of_the_splits(small, tmp_path):
    fewer = generate(tmp_path / "fewer", train=2, val=1, test=3)
    for name in ("images/scenes_test_00002.png", "entities/Sentences/scenes_val_00000.txt"):
        assert (fewer / name).read_bytes() == (small / name).read_bytes()
    assert attributes(fewer, "test") == attributes(small, "test")[:3]


@pytest.mark.parametrize("size", [32, 48, 128])
def test_size_is_a_parameter(size):
    picture = picture_of(0, "train", 0, size)
    assert draw_picture(0, picture, size).size == (size, size)
    assert all(max(thing["box"]) <= size for thing in picture["objects"])


def test_boxes_are_tight_around_the_visible_pixels(truths):
    for picture in truths:
        owner, full = owners(picture["objects"], 64)
        for i, thing in enumerate(picture["objects"]):
            x1, y1, x2, y2 = thing["box"]
            shown = owner == i
            assert 0 <= x1 < x2 <= 64
            assert 0 <= y1 < y2 <= 64
            inside = shown[y1:y2, x1:x2]
            assert inside.sum() == shown.sum() == thing["area"]
            assert all(edge.any() for edge in (inside[0], inside[-1], inside[:, 0], inside[:, -1]))
            assert thing["visible"] == pytest.approx(shown.sum() / full[i].sum(), abs=1e-4)
            assert thing["visible"] >= MIN_VISIBLE
            whole = full[i]  # lies in the picture
            assert not any(edge.any() for edge in (whole[0], whole[-1], whole[:, 0], whole[:, -1]))


def test_some_objects_are_partly_hidden(truths):
    visible = np.array([thing["visible"] for picture in truths for thing in picture["objects"]])
    assert 0.05 < np.mean(visible < 0.95) < 0.5


def test_pixels_have_the_colour_that_is_named(small, truths):
    """Of the pixels that an object shows, the median is nearest to its own colour (plain objects)."""
    names, palette = list(RGB), np.array(list(RGB.values()), float)
    right = []
    for picture in truths:
        pixels = np.asarray(Image.open(small / "images" / picture["filename"]), float)
        owner, _ = owners(picture["objects"], 64)
        for i, thing in enumerate(picture["objects"]):
            if thing["texture"] == "plain":
                median = np.median(pixels[owner == i], axis=0)
                right.append(names[np.abs(palette - median).sum(1).argmin()] == thing["colour"])
    assert len(right) > 80
    assert np.mean(right) > 0.97


def test_relations_and_positions_agree_with_the_boxes(truths):
    opposite = {"left of": "right of", "above": "below", "next to": "next to", "in front of": "behind"}
    seen = set()
    for picture in truths:
        things, relations = picture["objects"], picture["relations"]
        for i, name, j in relations:
            seen.add(name)
            mirrored = opposite.get(name) or next(key for key, value in opposite.items() if value == name)
            assert [j, mirrored, i] in relations
            a, b = things[i]["box"], things[j]["box"]
            if name == "left of":
                assert a[0] + a[2] < b[0] + b[2]
            elif name == "above":
                assert a[1] + a[3] < b[1] + b[3]
            elif name == "in front of":
                assert i > j
                assert things[j]["visible"] < 1
        for thing in things:
            x, y = (thing["box"][0] + thing["box"][2]) / 128, (thing["box"][1] + thing["box"][3]) / 128
            assert ("left" not in thing["position"]) or x < 0.45
            assert ("right" not in thing["position"]) or x > 0.55
            assert ("top" not in thing["position"]) or y < 0.45
            assert ("bottom" not in thing["position"]) or y > 0.55
    assert seen == {*opposite, *opposite.values()}


def test_captions_are_true_partial_and_have_one_reading(truths):
    for picture in truths:
        assert len({caption["text"] for caption in picture["captions"]}) == 5
        for caption in picture["captions"]:
            named = tuple(tuple(mention["objects"]) for mention in caption["mentions"])
            assert solutions(picture, caption) == [named]
            claims = sum(len(mention) - 1 for mention in caption["mentions"])
            assert claims < 5 * len(picture["objects"])


def test_phrases_say_what_their_objects_are(truths):
    """Read back from the words alone, not from the meaning that the generator kept."""
    meaning = labels()
    numbers = {"two": 2, "three": 3, "four": 4, "five": 5}
    for picture in truths:
        for caption in picture["captions"]:
            assert caption["phrases"]
            for start, end, mention in caption["phrases"]:
                words = caption["text"][start:end].lower().split()
                found = [meaning[word][0] for word in words if word in meaning]
                if mention < 0:
                    assert found == [picture["background"]]
                    continue
                objects = [picture["objects"][i] for i in caption["mentions"][mention]["objects"]]
                assert len(objects) == numbers.get(words[0], 1)
                for thing in objects:
                    assert set(found) <= {thing[key] for key in TABLES}


def test_captions_are_grammatical(truths):
    for caption in (caption for picture in truths for caption in picture["captions"]):
        text = caption["text"]
        words = text.lower().split()
        assert text[0].isupper()
        assert text == " ".join(text.split())
        assert len(words) >= 5
        for article, following in pairwise(words):
            if article in ("a", "an"):
                assert (article == "an") == (following[0] in "aeiou"), text
        assert all(first != second for first, second in pairwise(words)), text


def test_noun_phrases_use_paraphrases_and_plurals():
    rng = np.random.default_rng(0)
    made = {noun_phrase(rng, {"shape": "circle", "colour": "red"})[0] for _ in range(60)}
    assert {"a red circle", "a crimson ball", "a scarlet disc"} <= made
    group = {"shape": "cross", "count": 2, "objects": [0, 1]}
    assert {noun_phrase(rng, group) for _ in range(60)} == {
        ("two crosses", "crosses"),
        ("two plus signs", "plus signs"),
    }
    assert [plural(noun) for noun in ("box", "rhombus", "star")] == ["boxes", "rhombuses", "stars"]


def thing(shape, colour, texture="plain", size="small", position=("left",)):
    return {"shape": shape, "colour": colour, "texture": texture, "size": size, "position": list(position)}


def test_solutions_bind_attributes_relations_and_counts():
    picture = {
        "background": "sea",
        "objects": [thing("star", "red"), thing("ring", "blue"), thing("star", "blue", position=["right"])],
        "relations": [[0, "left of", 1], [1, "right of", 0]],
    }

    def truth(mentions, relations=(), **rest):
        return solutions(picture, {"mentions": mentions, "relations": relations} | rest)

    assert truth([{"shape": "star", "colour": "red"}]) == [((0,),)]
    assert truth([{"shape": "ring", "colour": "red"}]) == []  # both words are there, on different objects
    assert truth([{"shape": "star"}]) == [((0,),), ((2,),)]
    assert truth([{"shape": "star"}, {"shape": "ring"}], [[0, "left of", 1]]) == [((0,), (1,))]
    assert truth([{"shape": "ring"}, {"shape": "star"}], [[0, "left of", 1]]) == []
    assert truth([{"shape": "star", "count": 2}]) == [((0, 2),)]
    assert truth([{"shape": "star", "count": 3}]) == []
    assert truth([{"shape": "ring"}, {"colour": "blue"}]) == [((1,), (2,))]  # never one object twice
    assert truth([{"count": 3}, {"shape": "ring"}]) == [((0, 1, 2), (1,))]  # but for "one of them"
    assert truth([{"shape": "star", "count": 2}, {"colour": "red"}]) == []
    assert truth([{"shape": "star", "count": 2}, {"shape": "ring"}], [[0, "left of", 1]]) == []
    assert truth([{"shape": "star", "position": ["right"]}]) == [((2,),)]
    assert truth([{"shape": "ring"}], background="sky") == []
    assert truth([{"shape": "ring"}], background="sea") == [((1,),)]


def test_the_three_loaders_agree(small):
    for split in SPLITS:
        karpathy = load_karpathy(small / "dataset_scenes.json", small / "images", split)
        instances = small / f"annotations/instances_{split}.json"
        coco = load_coco(
            small / "images",
            captions=small / f"annotations/captions_{split}.json",
            instances=instances,
            split=split,
            invalid_boxes="raise",
        )
        entities = load_entities(small / "entities", split, image_dir=small / "images")
        assert categories(instances) == list(CATEGORIES)
        truths = attributes(small, split)
        assert len(karpathy) == len(coco) == len(entities) == len(truths) == COUNTS[split]
        for k, c, e, truth in zip(karpathy, coco, entities, truths, strict=True):
            assert k.image.name == c.image.name == e.image.name == truth["filename"]
            assert k.captions == c.captions == e.captions == tuple(x["text"] for x in truth["captions"])
            assert c.size == e.size == k.open().size == (64, 64)
            boxes = [tuple(map(float, thing["box"])) for thing in truth["objects"]]
            assert [(o.box, o.category) for o in c.objects] == [
                (box, thing["shape"]) for box, thing in zip(boxes, truth["objects"], strict=True)
            ]
            assert not any(o.crowd for o in c.objects)
            wanted = []
            for n, caption in enumerate(truth["captions"]):
                for start, end, mention in caption["phrases"]:
                    objects = caption["mentions"][mention]["objects"] if mention >= 0 else []
                    kind = "shapes" if mention >= 0 else "scene"
                    named = tuple(boxes[i] for i in objects)
                    wanted.append((n, start, end, named, kind, entity(truth, objects)))
            assert [(p.caption, p.start, p.end, p.boxes, p.kind, p.entity) for p in e.phrases] == wanted


def test_published_details_of_the_formats(small):
    image = json.loads((small / "dataset_scenes.json").read_text())["images"][0]
    assert image.keys() == {"sentids", "imgid", "sentences", "split", "filename"}
    sentence = image["sentences"][0]
    assert sentence["tokens"] == sentence["raw"].lower().split()
    coco = [json.loads((small / f"annotations/instances_{split}.json").read_text()) for split in SPLITS]
    ids = [image["id"] for split in coco for image in split["images"]]
    assert len(ids) == len(set(ids)) == sum(COUNTS.values())
    for annotation in (annotation for split in coco for annotation in split["annotations"]):
        assert 0 < annotation["area"] <= annotation["bbox"][2] * annotation["bbox"][3]
    # the authors' own reader splits at spaces: a phrase ends with a token that ends with its bracket
    for path in (small / "entities/Sentences").iterdir():
        for line in path.read_text().splitlines():
            assert line.count("[") == line.count("]") > 0
            assert all(token.endswith("]") for token in line.split() if "]" in token)
    for path in (small / "entities/Annotations").iterdir():
        for box in ElementTree.parse(path).iter("bndbox"):
            assert all(value.text.isdigit() for value in box)


def test_every_shape_and_every_colour_is_held_out_once():
    assert set(UNSEEN) == set(TABLES["shape"])
    assert sorted(UNSEEN.values()) == sorted(TABLES["colour"])
    assert unseen({"shape": "circle", "colour": UNSEEN["circle"]})
    for claim in (
        {"shape": "circle"},
        {"colour": "blue"},
        {"shape": "star", "colour": "blue"},
        {"size": "small"},
    ):
        assert not unseen(claim)


def test_unseen_combinations_are_in_no_image_of_pretraining_and_in_every_test_image(small):
    whole = open_records("scenes", small.parent)
    seen, tested = (open_records("scenes", small.parent, unseen=which) for which in ("pretrain", "test"))
    for split in SPLITS:
        truths = {Path(one["filename"]).stem: one for one in attributes(small, split)}
        left = {record.image_id for record in seen[split]}
        for name, truth in truths.items():
            pairs = {(thing["shape"], thing["colour"]) for thing in truth["objects"]}
            assert (name in left) == (not pairs & set(UNSEEN.items()))
            if name in left:  # no caption can mention what the image does not show
                assert not any(unseen(m) for caption in truth["captions"] for m in caption["mentions"])
        assert [r for r in whole[split] if r.image_id in left] == seen[split]  # whole records, in their order
    assert (tested["train"], tested["val"]) == (whole["train"], whole["val"])
    truths = {Path(one["filename"]).stem: one for one in attributes(small, "test")}
    told = {
        name
        for name, one in truths.items()
        if any(
            (m.get("shape"), m.get("colour")) in set(UNSEEN.items())
            for c in one["captions"]
            for m in c["mentions"]
        )
    }
    assert 0 < len(told) < len(truths)
    assert {record.image_id for record in tested["test"]} == told
    assert not told & {record.image_id for record in seen["test"]}
    with pytest.raises(ValueError, match=r"unseen='test' is of dataset 'scenes'.*flickr30k"):
        open_records("flickr30k", small.parent, unseen="test")


def test_settings_are_chosen_without_a_look_at_test(small):
    whole, val = open_records("scenes", small.parent), open_records("scenes", small.parent, report="val")
    assert val == {"train": whole["train"], "val": whole["val"]}
    assert (reported_split(whole), selection(whole)) == ("test", "rsum")
    assert (reported_split(val), selection(val)) == ("val", "epoch")
    with pytest.raises(ValueError, match=r"report='dev'.*report='val'"):
        open_records("scenes", small.parent, report="dev")


def test_the_difficulty_of_unseen_combinations_is_that_of_their_images(small):
    count = len(open_records("scenes", small.parent, unseen="test")["test"])
    chance = difficulty(small, "test", which="unseen")["chance"]
    assert chance["t2i R@1 expected"] == pytest.approx(100 / count)


def test_an_existing_set_is_reused(small):
    before = {path: path.stat().st_mtime_ns for path in small.rglob("*")}
    assert generate(small, **COUNTS) == small
    assert {path: path.stat().st_mtime_ns for path in small.rglob("*")} == before


def test_another_set_is_never_overwritten(small):
    with pytest.raises(DataError, match=r"meta\.json.*another set.*Remove the folder"):
        generate(small, seed=1, **COUNTS)


def test_a_foreign_folder_is_never_overwritten(tmp_path):
    (tmp_path / "mine.txt").write_text("keep")
    with pytest.raises(DataError, match="not a scenes set"):
        generate(tmp_path, train=1, val=1, test=1)
    (tmp_path / "meta.json").write_text('{"seed": ')
    with pytest.raises(DataError, match="malformed JSON"):
        generate(tmp_path, train=1, val=1, test=1)
    assert (tmp_path / "mine.txt").read_text() == "keep"


def test_bad_targets_and_numbers(tmp_path):
    (tmp_path / "file").write_text("")
    for out in (tmp_path / "file", tmp_path / "file" / "scenes"):
        with pytest.raises(DataError, match=r"Choose a writable folder|Remove the folder"):
            generate(out, train=1, val=1, test=1)
    for wrong in ({"train": 0}, {"test": 100_001}, {"seed": -1}, {"size": 16}, {"workers": -1}):
        with pytest.raises(DataError, match="out of range"):
            generate(tmp_path / "never", **({"train": 1, "val": 1, "test": 1} | wrong))
    assert os.listdir(tmp_path) == ["file"]


def test_an_empty_folder_is_filled_and_an_interrupted_run_leaves_nothing(tmp_path, monkeypatch):
    out = tmp_path / "scenes"
    out.mkdir()

    def stop(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(scenes_module, "_write_lists", stop)
        with pytest.raises(KeyboardInterrupt):
            generate(out, train=1, val=1, test=1)
    assert [path.name for path in tmp_path.iterdir()] == ["scenes"]
    assert not any(out.iterdir())
    assert (generate(out, train=1, val=1, test=1) / "meta.json").is_file()


def test_attributes_of_a_missing_set(tmp_path, small):
    with pytest.raises(DataError, match=r"attributes\.json"):
        attributes(tmp_path, "train")
    with pytest.raises(DataError, match="split restval"):
        attributes(small, "restval")


def test_the_committed_tokenizer_is_the_built_one(tmp_path):
    build_tokenizer().save(str(tmp_path / "again.json"), pretty=True)
    assert (tmp_path / "again.json").read_bytes() == TOKENIZER.read_bytes()


def test_the_tokenizer_knows_every_word(truths):
    tokenizer = Tokenizer.from_file(str(TOKENIZER))
    specials = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    assert [tokenizer.token_to_id(token) for token in specials] == list(range(5))
    words = sorted(tokenizer.get_vocab(), key=tokenizer.token_to_id)[5:]
    assert words == vocabulary() == sorted(set(words))
    used = set()
    for picture in truths:
        for caption in picture["captions"]:
            tokens = tokenizer.encode(caption["text"]).tokens
            assert tokens == ["[CLS]", *caption["text"].lower().split(), "[SEP]"]
            used |= set(tokens)
    assert "[UNK]" not in used
    assert len(used) > 0.8 * len(words)
    both = tokenizer.encode("A star, unheard-yet", "the ring")
    assert both.tokens == ["[CLS]", "a", "star", *["[UNK]"] * 4, "[SEP]", "the", "ring", "[SEP]"]
    assert both.type_ids == [0] * 8 + [1] * 3


def test_recalls_by_hand():
    # picture 0 owns captions 0 and 1, picture 1 owns caption 2
    scores = np.array([[3.0, 1.0, 1.0], [1.0, 1.0, 2.0]])
    found = recalls(scores, np.array([0, 0, 1]))
    assert found["t2i R@1"] == pytest.approx(100 * 2 / 3)  # caption 1 ties with the wrong picture
    assert found["t2i R@1 expected"] == pytest.approx(100 * 2.5 / 3)
    assert found["i2t R@1"] == 100
    tied = recalls(np.zeros((4, 8)), np.repeat(np.arange(4), 2))
    assert (tied["t2i R@1"], tied["t2i R@1 expected"]) == (0, 25)
    assert (tied["i2t R@1"], tied["i2t R@1 expected"]) == (0, 25)
    assert tied["i2t R@5"] == 0
    assert tied["i2t R@5 expected"] == pytest.approx(100 * (1 - 3 / 28))  # 1 - C(6,5) / C(8,5)


def test_bag_of_words_cannot_bind_but_the_full_oracle_can():
    pictures = [
        {"background": "sea", "relations": [], "objects": [thing("star", "red"), thing("ring", "blue")]},
        {"background": "sea", "relations": [], "objects": [thing("star", "blue"), thing("ring", "red")]},
        {"background": "sky", "relations": [], "objects": [thing("heart", "red"), thing("star", "green")]},
    ]
    texts = ["A crimson star", "Two red shapes"]
    meanings = [
        {"mentions": [{"shape": "star", "colour": "red"}], "relations": []},
        {"mentions": [{"colour": "red", "count": 2}], "relations": []},
    ]
    bag = bag_of_words(pictures, texts)
    assert bag[0, 0] == bag[1, 0] == bag[2, 0]
    full = full_oracle(pictures, meanings)
    assert full[:, 0].tolist() == pytest.approx([np.log(3), -1, -1])
    assert (full[:, 1] == -1).all()


def test_difficulty_is_designed(tmp_path, capsys):
    """On 150 test pictures already: chance < bag of words < full oracle, and nothing saturates."""
    main([str(tmp_path / "scenes"), "--train", "1", "--val", "1", "--test", "150"])
    printed = capsys.readouterr().out.splitlines()
    assert [line.split("|")[1].strip() for line in printed[4:]] == ["chance", "bag of words", "full"]
    with pytest.raises(SystemExit):
        main([str(tmp_path / "scenes"), "--seed", "1"])
    assert "another set" in capsys.readouterr().err
    found = difficulty(tmp_path / "scenes", "test")
    chance, bag, full = (found[name]["t2i R@1 expected"] for name in ("chance", "bag of words", "full"))
    assert chance == pytest.approx(100 / 150)
    assert 30 < bag < 60
    assert bag + 25 < full < 97
    for name in found:
        assert all(found[name][f"t2i R@{k}"] <= found[name][f"t2i R@{k} expected"] for k in (1, 5, 10))


def test_difficulty_refuses_files_that_disagree(tmp_path):
    out = generate(tmp_path / "scenes", train=1, val=1, test=1)
    path = out / "dataset_scenes.json"
    data = json.loads(path.read_text())
    data["images"][2]["sentences"][0]["raw"] += " indeed"
    path.write_text(json.dumps(data))
    with pytest.raises(DataError, match="differ from attributes"):
        difficulty(out, "test")


def test_the_stated_digests_are_those_of_the_set_that_is_drawn(tmp_path, monkeypatch):
    """Tables tell by them whether a run used the embedded set as it is drawn now.

    All but the pixels, which enter none of the digests compared here: to paint them takes most of the time.
    """
    stated = json.loads(Path(scenes_module.__file__).with_name("digests.json").read_text())
    assert stated["version"] == scenes_module.VERSION, "another version: compute digests.json again"
    monkeypatch.setattr(
        scenes_module, "draw_picture", lambda seed, picture, size: Image.new("RGB", (size, size))
    )
    generate(tmp_path / "scenes")
    assert stated["tasks"] == {name: tasks_module.VERSIONS[name] for name in stated["tasks"]}, (
        "compute those, too"
    )
    of_tasks = {f"scenes_{name}" for name in stated["tasks"]}  # whose parts take minutes to draw
    for name, parts in stated["digests"].items():
        if name.split()[0] in of_tasks:
            continue
        dataset, split, *part = name.split()  # "scenes train pretrain": what `open_records` leaves of it
        records = (
            open_records(dataset, tmp_path, unseen=part[0])[split] if part else load(dataset, tmp_path, split)
        )
        found = digests_of_parts(records)
        found.pop("images")  # the bytes of the files depend on Pillow's release as well
        assert found == parts, name
