"""The parts of the embedded set for three tasks: real formats, true answers, balance, and how far shortcuts get."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tokenizers import Tokenizer

from finematch import shortcuts as of
from finematch.data import load, read_clips, task_digests
from finematch.data.record import DataError
from finematch.evaluation.vqa import accuracy
from finematch.scenes import tasks as tasks_module
from finematch.scenes.clips import FRAMES, GROUP, TWINS, group_of, moved, true_of
from finematch.scenes.generator import SPLITS, VERSION, attributes, generate, part_digests
from finematch.scenes.questions import answer_of, people
from finematch.scenes.sentences import STATES, count, truth
from finematch.scenes.tasks import (
    NLVR2_NAMES,
    TOKENIZER,
    VERSIONS,
    build_task_tokenizer,
    clip_truths,
    draw,
    encode,
    part_digest,
    sentence_truths,
    task_words,
)

COUNTS = {"train": 60, "val": 20, "test": 40}


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """A data root; its parts are drawn by `load`."""
    folder = tmp_path_factory.mktemp("root")
    generate(folder / "scenes", **COUNTS)
    return folder


@pytest.fixture(scope="module")
def pictures(root) -> dict[str, dict]:
    return {p["filename"]: p for split in SPLITS for p in attributes(root / "scenes", split)}


@pytest.fixture(scope="module")
def questions(root) -> dict:
    return {split: load("scenes_vqa", root, split) for split in SPLITS}


@pytest.fixture(scope="module")
def pairs(root) -> dict:
    return {split: load("scenes_nlvr2", root, split) for split in SPLITS}


@pytest.fixture(scope="module")
def clips(root) -> dict:
    return {split: load("scenes_clips", root, split) for split in SPLITS}


# --- parts -------------------------------------------------------------------------------------------------------


def test_parts_are_drawn_on_demand_and_leave_the_set_as_it_was(tmp_path):
    folder = generate(tmp_path / "scenes", train=16, val=8, test=8)
    before = part_digests(folder)
    load("scenes", tmp_path, "train")
    assert not {*VERSIONS} & {path.name for path in folder.iterdir()}
    assert len(load("scenes_vqa", tmp_path, "train")) == 32
    assert {*VERSIONS} & {path.name for path in folder.iterdir()} == {"vqa"}
    load("scenes_nlvr2", tmp_path, "val")
    load("scenes_clips", tmp_path, "val")
    assert part_digests(folder) == before == json.loads((folder / "version.json").read_text())["parts"]
    assert not list(folder.glob(".*"))
    stamp = (folder / "vqa/version.json").stat().st_mtime_ns
    load("scenes_vqa", tmp_path, "val")
    assert (folder / "vqa/version.json").stat().st_mtime_ns == stamp


def test_a_part_has_the_same_bytes_for_a_seed(tmp_path):
    found = {}
    for name, seed in (("one", 5), ("two", 5), ("other", 6)):
        folder = generate(tmp_path / name, seed=seed, train=8, val=4, test=4)
        found[name] = {part: part_digest(draw(folder, part)) for part in ("vqa", "nlvr2", "clips")}
        for part, value in found[name].items():
            said = json.loads((folder / part / "version.json").read_text())
            assert said == {"version": VERSIONS[part], "digest": value}
    assert found["one"] == found["two"]
    assert all(found["one"][part] != found["other"][part] for part in found["one"])


def test_a_part_of_an_older_version_is_drawn_again(tmp_path, monkeypatch):
    folder = generate(tmp_path / "scenes", train=8, val=8, test=8)
    draw(folder, "vqa")
    (folder / "vqa/v2_scenes_val_annotations.json").write_text("{}")
    monkeypatch.setitem(tasks_module.VERSIONS, "vqa", 2)
    assert len(load("scenes_vqa", tmp_path, "val")) == 16
    assert json.loads((folder / "vqa/version.json").read_text())["version"] == 2


def test_a_part_that_cannot_be_written_leaves_nothing(tmp_path, monkeypatch):
    folder = generate(tmp_path / "scenes", train=8, val=8, test=8)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setitem(tasks_module.WRITERS, "vqa", full)
    with pytest.raises(DataError, match=r"scenes.vqa: whole folder: cannot be written.*No space"):
        draw(folder, "vqa")
    assert not list(folder.glob("*vqa*"))
    with pytest.raises(DataError, match=r"meta\.json"):
        draw(tmp_path / "none", "nlvr2")


def test_the_parts_are_what_they_always_were(root, questions, pairs, clips):
    """Raise the part's version in `VERSIONS` when one of these has to change."""
    assert VERSION == 2
    assert VERSIONS == {"vqa": 1, "nlvr2": 1, "clips": 1, "videos": 1}
    texts = {
        name: task_digests(found["test"])["texts"][:16]
        for name, found in (("vqa", questions), ("nlvr2", pairs), ("clips", clips))
    }
    assert texts == {"vqa": "cbedffdf9b061cbf", "nlvr2": "ae214f887cf142f6", "clips": "cbdea796fb4179b4"}


# --- questions ---------------------------------------------------------------------------------------------------


def test_answers_are_those_of_ten_people(questions):
    for found in questions.values():
        for question in found:
            assert len(question.answers) == 10
            (first, most), *others = Counter(question.answers).most_common()
            assert all(number < most for _, number in others)
            assert {"yes/no": ("yes", "no"), "number": tuple("012345")}.get(
                question.answer_type, (first,)
            ).count(first)
    every = [question for found in questions.values() for question in found]
    agreed = [question.answers.count(of.frequent(question)) for question in every]
    assert 0.3 < np.mean(np.array(agreed) == 10) < 0.7
    assert np.mean([accuracy(of.frequent(q), q.answers) for q in every]) > 0.97
    assert {question.answer_type for question in every} == {"yes/no", "number", "other"}


def test_people_say_the_same_in_other_words_or_are_wrong():
    rng = np.random.default_rng(0)
    said = Counter(word for _ in range(300) for word in people(rng, "red", "colour"))
    assert {"red", "crimson", "scarlet", "Red", "the red", "blue"} <= set(said)
    said = Counter(word for _ in range(300) for word in people(rng, "0", "count"))
    assert {"0", "none", "None", "0.", "1"} == set(said)  # one fewer than none is no answer
    assert set(Counter(w for _ in range(300) for w in people(rng, "no", "exists"))) == {
        "no",
        "No",
        "no.",
        "no, it is",
        "yes",
    }


def thing(shape, colour, texture="plain"):
    return {"shape": shape, "colour": colour, "texture": texture, "size": "small", "position": []}


def test_answers_by_hand():
    picture = {
        "objects": [thing("star", "red"), thing("ring", "blue"), thing("ring", "red", "dotted")],
        "relations": [[0, "left of", 1], [1, "right of", 0]],
    }

    def answer(kind, *mentions, **more):
        return answer_of(picture, {"kind": kind, "mentions": mentions} | more)

    assert answer("exists", {"shape": "star", "colour": "red"}) == "yes"
    assert answer("exists", {"shape": "star", "colour": "blue"}) == "no"  # a star, and something blue
    assert answer("count", {"shape": "ring"}) == "2"
    assert answer("colour", {"shape": "star"}) == "red"
    assert answer("colour", {"shape": "ring"}) is None  # which one?
    assert answer("shape", {"texture": "dotted"}) == "ring"
    sides = {"shape": "star"}, {"colour": "blue"}
    assert answer("relation", *sides, relation="left of") == "yes"
    assert answer("relation", *sides, relation="right of") == "no"
    assert answer("relation", *sides, relation="above") is None  # neither it nor its opposite
    assert answer("neighbour", {"colour": "blue"}, relation="left of") == "star"
    assert answer("neighbour", {"colour": "blue"}, relation="above") is None


def test_every_text_has_two_answers(questions):
    """Texts come in pairs: asked of two images, with two answers."""
    for found in questions.values():
        for one, two in zip(found[::2], found[1::2], strict=True):
            assert one.text == two.text
            assert one.image != two.image
            assert of.frequent(one) != of.frequent(two)


def test_questions_are_in_the_published_format(root):
    folder = root / "scenes/vqa"
    data = json.loads((folder / "v2_OpenEnded_scenes_val_questions.json").read_text())
    assert data.keys() == {"info", "license", "data_type", "data_subtype", "task_type", "questions"}
    assert data["questions"][0].keys() == {"image_id", "question", "question_id"}
    annotation = json.loads((folder / "v2_scenes_val_annotations.json").read_text())["annotations"][0]
    assert annotation.keys() == {
        *("question_type", "multiple_choice_answer", "answers", "image_id", "answer_type", "question_id"),
    }
    assert annotation["answers"][9].keys() == {"answer", "answer_confidence", "answer_id"}
    assert (
        annotation["multiple_choice_answer"]
        == Counter(a["answer"] for a in annotation["answers"]).most_common()[0][0]
    )


def test_what_the_question_alone_tells(questions):
    found = of.vqa_shortcuts(questions["train"], questions["test"])
    assert found["majority answer"]["vqa"] < 40
    assert found["question alone"]["vqa"] < 55
    assert found["full"]["vqa"] > 97


# --- image pairs -------------------------------------------------------------------------------------------------


def test_sentences_are_true_of_two_pairs_and_false_of_two(root, pairs, pictures):
    for split, found in pairs.items():
        truths = sentence_truths(root / "scenes", split)
        lines = (root / f"scenes/nlvr2/{NLVR2_NAMES[split]}.json").read_text().splitlines()
        assert len(found) == len(lines) == 4 * len(truths)
        for number, one in enumerate(truths):
            four = found[4 * number : 4 * number + 4]
            assert len({pair.sentence for pair in four}) == 1
            assert sum(pair.label for pair in four) == 2
            for pair, line, told in zip(four, lines[4 * number :], one["pairs"], strict=False):
                entry = json.loads(line)
                left, right = (pictures[entry[key]] for key in ("left_url", "right_url"))
                assert left is not right
                assert truth(one["kind"], one["mentions"], left, right) == pair.label == told["label"]
                assert tuple(told["states"]) in STATES[one["kind"]][not pair.label]
                for image, url in zip(pair.open(), ("left_url", "right_url"), strict=True):
                    assert image == Image.open(root / "scenes/images" / entry[url]).convert("RGB")


def test_sentences_by_hand():
    one, two = (
        {"objects": things}
        for things in ([thing("star", "red")], [thing("star", "red"), thing("ring", "blue")])
    )
    star, ring = {"shape": "star"}, {"shape": "ring"}
    assert [count(one, star), count(one, ring)] == [1, 0]
    assert [truth("one", [mention], one, two) for mention in (star, ring)] == [False, True]
    assert [truth("both", [mention], one, two) for mention in (star, ring)] == [True, False]
    assert [truth("some", [mention], one, one) for mention in (star, ring)] == [True, False]
    assert [truth("same", [mention], one, two) for mention in (star, ring)] == [True, False]
    assert [truth("more", [ring], *both) for both in ((one, two), (two, one), (one, one))] == [
        False,
        True,
        False,
    ]
    assert truth("each", [star, ring], one, two)
    assert not truth("each", [ring, star], one, two)


def test_what_one_image_or_the_sentence_tells(root, pairs):
    truths = [sentence_truths(root / "scenes", split) for split in ("train", "test")]
    found = of.nlvr2_shortcuts(pairs["test"], *truths, pairs["train"])
    assert found["constant"]["nlvr2_accuracy"] == 50
    assert found["sentence alone"]["nlvr2_accuracy"] <= 55
    assert found["sentence alone"]["nlvr2_consistency"] == 0
    for side in ("left", "right"):
        assert found[f"{side} image alone"]["nlvr2_accuracy"] < 76
        assert found[f"{side} image alone"]["nlvr2_consistency"] == 0
    assert found["full"]["nlvr2_accuracy"] == found["full"]["nlvr2_consistency"] == 100


# --- clips -------------------------------------------------------------------------------------------------------


def test_twins_show_the_same_frames_in_opposite_order(root, clips):
    kept, frames, skipped = read_clips(clips["test"], FRAMES, keep=np.asarray)
    assert (len(kept), skipped) == (len(clips["test"]), [])
    truths = clip_truths(root / "scenes", "test")
    assert [clip["video_id"] for clip in truths] == [clip.video_id for clip in kept]
    for first in range(0, len(truths), GROUP):
        assert len({truths[first + k]["group"] for k in range(GROUP)}) == 1
        assert (truths[first]["motion"], truths[first + 1]["motion"]) in TWINS
        one, two = frames[first : first + 2]
        assert all(np.array_equal(a, b) for a, b in zip(one, two[::-1], strict=True))
        assert not any(np.array_equal(a, b) for a, b in zip(one, two, strict=True))


def test_motions_by_hand():
    things = [
        {"x": 0.3, "y": 0.5, "angle": 0.0, "radius": 0.1},
        {"x": 0.7, "y": 0.5, "angle": 0.0, "radius": 0.1},
    ]
    end = FRAMES - 1

    def move(motion, frame):
        return moved(things, {"1": motion}, frame)[1]

    assert move("left", 0)["x"] == pytest.approx(0.92)
    assert move("left", end)["x"] == move("right", 0)["x"] == pytest.approx(0.48)
    assert move("up", end)["y"] < move("up", 0)["y"]
    assert move("grow", end)["radius"] == pytest.approx(2.2 * move("grow", 0)["radius"])
    before, after = (moved(things, {"0": "swap", "1": "swap"}, frame) for frame in (0, end))
    assert [thing["x"] for thing in before] == [0.3, 0.7]
    assert [thing["x"] for thing in after] == pytest.approx([0.7, 0.3])
    assert [thing["y"] for thing in after] == pytest.approx([0.5, 0.5])
    assert things[0]["x"] == 0.3


def test_captions_of_clips_are_true_and_the_others_say_something_else():
    for group in range(20):
        four = group_of(0, "val", group)
        for clip in four:
            assert true_of(clip, clip)
            assert true_of(clip, clip, frame=0)
            assert [other["video_id"] for other in four if true_of(other, clip)] == [clip["video_id"]]
        assert true_of(four[0], four[1], order=False)
        assert not true_of(
            four[0] | {"background": "none"}, four[1] | {"said_background": "sea"}, order=False
        )
    assert group_of(0, "val", 3) == group_of(0, "val", 3) != group_of(1, "val", 3)


def test_one_frame_is_not_enough():
    found = of.clip_shortcuts([clip for group in range(25) for clip in group_of(0, "test", group)])
    values = [
        found[name]["t2i R@1 expected"] for name in ("chance", "one frame", "frames without order", "full")
    ]
    assert values[0] == pytest.approx(1)
    assert values[1] < 25
    assert values[2] < 60
    assert values[3] > 75
    assert found["one frame"]["i2t R@1 expected"] < 25


def test_clips_are_listed_as_msrvtt(root, clips):
    lines = (root / "scenes/clips/train.csv").read_text().splitlines()
    assert lines[0] == "key,vid_key,video_id,sentence"
    assert len(lines) - 1 == len(clips["train"]) == GROUP * 3
    assert all(len(clip.captions) == 1 and clip.video.is_dir() for clip in clips["train"])


def test_videos_are_the_clips_encoded(root, clips, tmp_path):
    pytest.importorskip("av")
    videos = load("scenes_videos", root, "val")
    assert [(one.video_id, one.captions) for one in videos] == [
        (c.video_id, c.captions) for c in clips["val"]
    ]
    (_, frames, _), (_, wanted, _) = (
        read_clips(these[:4], FRAMES, keep=np.asarray) for these in (videos, clips["val"])
    )
    difference = np.abs(np.array(frames, float) - np.array(wanted, float))
    assert difference.mean() < 6  # of 255: colour is stored at half the size
    images = [Image.fromarray(frame) for frame in wanted[0]]
    for name in ("one.mp4", "two.mp4"):
        encode(images, tmp_path / name)
    assert (tmp_path / "one.mp4").read_bytes() == (tmp_path / "two.mp4").read_bytes()
    encode([image.resize((33, 33)) for image in images], tmp_path / "odd.mp4")


# --- words -------------------------------------------------------------------------------------------------------


def test_the_committed_tokenizer_of_tasks_is_the_built_one(tmp_path):
    build_task_tokenizer().save(str(tmp_path / "again.json"), pretty=True)
    assert (tmp_path / "again.json").read_bytes() == TOKENIZER.read_bytes()


def test_the_tokenizer_of_tasks_keeps_the_ids_of_captions_and_knows_every_word(questions, pairs, clips):
    tasks = Tokenizer.from_file(str(TOKENIZER))
    plain = Tokenizer.from_file(str(TOKENIZER.with_name("tokenizer.json")))
    known = plain.get_vocab()
    assert {word: tasks.token_to_id(word) for word in known} == known
    words = sorted(set(tasks.get_vocab()) - set(known), key=tasks.token_to_id)
    assert words == task_words()
    assert [tasks.token_to_id(word) for word in words] == list(range(len(known), len(known) + len(words)))
    texts = [q.text for found in questions.values() for q in found]
    texts += [of.frequent(q) for found in questions.values() for q in found]
    texts += [pair.sentence for found in pairs.values() for pair in found]
    texts += [text for found in clips.values() for clip in found for text in clip.captions]
    assert not any("[UNK]" in tasks.encode(text).tokens for text in texts)


def test_the_table_of_shortcuts(root):
    found = of.shortcuts(root)
    text = of.table(found)
    assert [name for name in of.COLUMNS if f"| {name} |" in text] == list(found)
    assert "| full | 100.0 | 100.0 |" in text
    groups = defaultdict(int)
    for clip in clip_truths(root / "scenes", "test"):
        groups[clip["group"]] += 1
    assert set(groups.values()) == {GROUP}
