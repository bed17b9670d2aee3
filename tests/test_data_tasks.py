"""Loaders of questions (VQAv2), image pairs (NLVR2) and videos (MSR-VTT): real formats, bad input, decoded frames."""

from __future__ import annotations

import json
import logging
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from formats import picture
from PIL import Image

from finematch.data import load, load_msrvtt, load_nlvr2, load_vqa, read_clips, task_digests
from finematch.data.record import Clip, DataError, ImagePair, Question
from finematch.data.splits import open_records
from finematch.data.video import frame_numbers, read_frames
from finematch.features.tasks import task_entries, task_frames, task_images, task_tokenizer
from finematch.scenes.tasks import TOKENIZER
from finematch.text import word_level

NAME = "COCO_val2014_{:012d}.jpg".format


def vqa(root: Path, subset: str = "val2014", *, annotated: bool = True, people: int = 10) -> Path:
    """Two questions about one image, as released; `root` is a data root."""
    folder, images = root / "vqav2", "test2015" if subset.startswith("test") else subset
    folder.mkdir(parents=True, exist_ok=True)
    picture(root / "coco" / images / f"COCO_{images}_000000000042.jpg")
    texts = {42000: "What is on the table?", 42001: "Is it red?"}
    questions = [{"image_id": 42, "question": text, "question_id": n} for n, text in texts.items()]
    head = {"info": {}, "data_type": "mscoco", "data_subtype": subset, "license": {}}
    file = folder / f"v2_OpenEnded_mscoco_{subset}_questions.json"
    file.write_text(json.dumps(head | {"task_type": "Open-Ended", "questions": questions}))
    answers = [
        {
            "question_type": "what is on the" if number == 42000 else "is it",
            "multiple_choice_answer": word,
            "answers": [
                {"answer": word, "answer_confidence": "yes", "answer_id": k} for k in range(1, people + 1)
            ],
            "image_id": 42,
            "answer_type": kind,
            "question_id": number,
        }
        for number, word, kind in ((42001, "no", "yes/no"), (42000, "pizza", "other"))
    ]
    if annotated:
        (folder / f"v2_mscoco_{subset}_annotations.json").write_text(
            json.dumps(head | {"annotations": answers})
        )
    return file


def test_questions_have_the_answers_of_ten_people(tmp_path):
    vqa(tmp_path)
    first, second = load("vqav2", tmp_path, "val")
    assert (first.question_id, first.text, first.image_id) == (42000, "What is on the table?", "42")
    assert first.answers == ("pizza",) * 10
    assert (first.question_type, first.answer_type) == ("what is on the", "other")
    assert second.answers == ("no",) * 10
    assert first.open().size == (32, 24)


def test_questions_of_test_dev_have_no_answers(tmp_path):
    vqa(tmp_path, "test-dev2015", annotated=False)
    found = load("vqav2", tmp_path, "test-dev")
    assert [question.answers for question in found] == [(), ()]
    assert found[0].image.name == "COCO_test2015_000000000042.jpg"
    with pytest.raises(
        DataError, match=r"split 'minival': is not one of the set's\. Choose one of train, val"
    ):
        load("vqav2", tmp_path, "minival")


def change(file: Path, edit) -> None:
    data = json.loads(file.read_text())
    edit(data)
    file.write_text(json.dumps(data))


@pytest.mark.parametrize(
    ("name", "edit", "match"),
    [
        (
            "questions",
            lambda d: d["questions"][1].update(question=" "),
            r"question 42001: the caption is empty",
        ),
        (
            "questions",
            lambda d: d["questions"][1].pop("image_id"),
            r"question number 1: the field 'image_id'",
        ),
        ("questions", lambda d: d.update(questions=[]), r"the list `questions`: is empty"),
        ("questions", lambda d: d["questions"].pop(0), r"annotations\.json: question 42000: is not in"),
        (
            "questions",
            lambda d: d["questions"][0].update(image_id=7),
            r"42000: is about image 42 here, about 7",
        ),
        ("annotations", lambda d: d["annotations"].pop(), r"question 42000: has no annotation"),
        (
            "annotations",
            lambda d: d["annotations"][1]["answers"].pop(),
            r"question 42000: has 9 answers, not 10",
        ),
        ("annotations", lambda d: d["annotations"].append(d["annotations"][0]), r"42001: is annotated twice"),
        (
            "annotations",
            lambda d: d["annotations"][0].pop("answer_type"),
            r"number 0: the field 'answer_type'",
        ),
    ],
)
def test_broken_questions_are_named(tmp_path, name, edit, match):
    questions = vqa(tmp_path)
    annotations = questions.with_name("v2_mscoco_val2014_annotations.json")
    change({"questions": questions, "annotations": annotations}[name], edit)
    with pytest.raises(DataError, match=match):
        load_vqa(questions, tmp_path / "coco/val2014", "val", image_name=NAME, annotations=annotations)


def test_a_question_about_a_missing_image(tmp_path):
    questions = vqa(tmp_path)
    (tmp_path / "coco/val2014/COCO_val2014_000000000042.jpg").unlink()
    with pytest.raises(DataError, match=r"1 of 1 picture files are missing"):
        load("vqav2", tmp_path, "val")
    assert len(load_vqa(questions, tmp_path, "val", image_name=NAME, check_images=False)) == 2


def nlvr2(root: Path, lines: list[dict], file: str = "dev") -> Path:
    root.mkdir(parents=True, exist_ok=True)
    path = root / f"{file}.json"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


LINE = {"identifier": "dev-850-1-0", "sentence": "Both show a dog.", "label": "True", "synset": "dog"}


def test_image_pairs(tmp_path):
    other = LINE | {"identifier": "dev-850-2-0", "label": "False"}
    nlvr2(tmp_path / "nlvr2", [LINE, other])
    for pair in (1, 2):
        for side in (0, 1):
            picture(tmp_path / f"nlvr2/images/dev/dev-850-{pair}-img{side}.png", (8 + side, 8))
    first, second = load("nlvr2", tmp_path, "val")
    assert (first.label, second.label) == (True, False)
    assert [image.size for image in first.open()] == [(8, 8), (9, 8)]  # left, right
    assert second.images[1].name == "dev-850-2-img1.png"
    train = nlvr2(tmp_path, [LINE | {"identifier": "train-3-0-1", "directory": 63}], "train")
    assert load_nlvr2(train, "images", "train", check_images=False)[0].images[0] == Path(
        "images/63/train-3-0-img0.png"
    )
    hidden = nlvr2(tmp_path, [{k: v for k, v in LINE.items() if k != "label"}], "test2")
    assert load_nlvr2(hidden, ".", "test", check_images=False)[0].label is None


@pytest.mark.parametrize(
    ("line", "match"),
    [
        (LINE | {"label": "yes"}, r"example dev-850-1-0: the label 'yes' is neither True nor False"),
        (LINE | {"identifier": "850"}, r"line 2: the identifier '850' is not"),
        (LINE | {"sentence": ""}, r"example dev-850-1-0: the caption is empty"),
        ({"sentence": "A dog."}, r"line 2: the field 'identifier' is missing"),
        (LINE | {"identifier": "dev-0-0-0"}, r"example dev-0-0-0: is listed more than once"),
        (LINE | {"directory": "../.."}, r"leads out of the image folder"),
    ],
)
def test_broken_lines_are_named(tmp_path, line, match):
    path = nlvr2(tmp_path, [LINE | {"identifier": "dev-0-0-0"}, line])
    with pytest.raises(DataError, match=match):
        load_nlvr2(path, tmp_path, "val", check_images=False)


def test_lines_that_are_no_json(tmp_path):
    path = nlvr2(tmp_path, [LINE])
    path.write_text(path.read_text() + '{"identifier": ')
    with pytest.raises(DataError, match=r"line 2: malformed JSON.*cut off"):
        load_nlvr2(path, tmp_path, "val", check_images=False)
    path.write_text("\n")
    with pytest.raises(DataError, match="has no lines"):
        load_nlvr2(path, tmp_path, "val", check_images=False)


# --- videos ------------------------------------------------------------------------------------------------------


def encode(path: Path, frames: int, *, size: int = 32) -> Path:
    """A real video: frame k is grey of 20 + 10 k."""
    av = pytest.importorskip("av")
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.width = stream.height = size
        stream.pix_fmt, stream.bit_rate = "yuv420p", 2_000_000
        for k in range(frames):
            grey = np.full((size, size, 3), (20 + 10 * k) % 256, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(grey, format="rgb24")))
        container.mux(stream.encode())
    return path


def greys(frames: list[Image.Image]) -> list[int]:
    return [round((np.asarray(frame).mean() - 20) / 10) for frame in frames]


def clip(path: Path, name: str = "video1") -> Clip:
    return Clip(name, "test", ("a caption",), path)


@pytest.mark.parametrize("separator", [",", ";"])
def test_the_list_of_msrvtt(tmp_path, separator):
    rows = [
        "key,vid_key,video_id,sentence".replace(",", separator),
        f"ret0{separator}msr1{separator}video1{separator}a dog runs",
        f"ret1{separator}msr2{separator}video2{separator}\"a cat, asleep; 'still'\"",
        f"ret2{separator}msr1{separator}video1{separator}an animal outdoors",
    ]
    (tmp_path / "msrvtt/videos").mkdir(parents=True)
    (tmp_path / "msrvtt/MSRVTT_JSFUSION_test.csv").write_text("\r\n".join(rows) + "\r\n")
    (tmp_path / "msrvtt/videos/video2.webm").write_bytes(b"")
    first, second = load("msrvtt", tmp_path, "test")
    assert (first.video_id, first.captions) == ("video1", ("a dog runs", "an animal outdoors"))
    assert (second.captions, second.video.name) == (("a cat, asleep; 'still'",), "video2.webm")
    assert first.video.name == "video1.mp4"
    with pytest.raises(DataError, match=r"split 'train': is not one of the set's\. Choose one of test"):
        load("msrvtt", tmp_path, "train")


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("video_id,caption\nvideo1,x\n", r"line 1: the columns \['sentence'\] are missing"),
        ("video_id,sentence\nvideo1, \n", r"line 2: the caption is empty"),
        ("video_id,sentence\n", r"has no rows"),
        ("video_id,sentence\n../x,a dog\n", r"line 2: the name '\.\./x' leads out"),
    ],
)
def test_broken_lists_are_named(tmp_path, text, match):
    (tmp_path / "list.csv").write_text(text)
    with pytest.raises(DataError, match=match):
        load_msrvtt(tmp_path / "list.csv", tmp_path)
    (tmp_path / "list.csv").write_text("video_id,sentence\nvideo1,x\n")
    with pytest.raises(DataError, match="the folder does not exist"):
        load_msrvtt(tmp_path / "list.csv", tmp_path / "none")


def test_which_frames():
    assert frame_numbers(16, 8) == [0, 2, 4, 6, 8, 10, 12, 14]
    assert frame_numbers(10, 4) == [0, 2, 5, 7]
    assert frame_numbers(3, 6) == [0, 0, 1, 1, 2, 2]  # a shorter video: its frames again
    drawn = frame_numbers(100, 8, how="random", seed=1, name="video1")
    assert drawn == sorted(set(drawn)) == frame_numbers(100, 8, how="random", seed=1, name="video1")
    assert drawn != frame_numbers(100, 8, how="random", seed=2, name="video1")
    assert drawn != frame_numbers(100, 8, how="random", seed=1, name="video2")
    assert frame_numbers(3, 6, how="random") == frame_numbers(3, 6)
    with pytest.raises(ValueError, match="'uniform' or 'random'"):
        frame_numbers(100, 8, how="first")
    with pytest.raises(ValueError, match="8 of 0 frames"):
        frame_numbers(0, 8)


@pytest.mark.parametrize("ending", [".mp4", ".avi", ".mkv"])
def test_frames_of_a_video_file(tmp_path, ending):
    one = clip(encode(tmp_path / f"video1{ending}", 20))
    assert greys(read_frames(one, 4)) == [0, 5, 10, 15]
    assert greys(read_frames(one, 20)) == list(range(20))
    numbers = frame_numbers(20, 5, how="random", seed=3, name="video1")
    assert greys(read_frames(one, 5, how="random", seed=3)) == numbers
    short = clip(encode(tmp_path / f"video2{ending}", 2))
    assert greys(read_frames(short, 4)) == [0, 0, 1, 1]


def test_frames_of_a_folder(tmp_path):
    for k in range(6):
        picture(tmp_path / "video1" / f"{k:02d}.png", (8 + k, 8))
    assert [frame.width for frame in read_frames(clip(tmp_path / "video1"), 3)] == [8, 10, 12]
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="the folder has no frames"):
        read_frames(clip(tmp_path / "empty"))


def test_missing_and_broken_videos_are_named_counted_and_skipped(tmp_path, caplog):
    whole = encode(tmp_path / "good.mp4", 12)
    data = whole.read_bytes()
    (tmp_path / "cut.mp4").write_bytes(data[: len(data) // 2])  # its index is lost
    (tmp_path / "page.mp4").write_text("<html>moved</html>")
    avi = encode(tmp_path / "whole.avi", 40, size=64)
    (tmp_path / "short.avi").write_bytes(avi.read_bytes()[: avi.stat().st_size // 2])
    paths = ["good.mp4", "none.mp4", "cut.mp4", "page.mp4", "short.avi", "whole.avi"]
    clips = [clip(tmp_path / path, path) for path in paths]
    with caplog.at_level(logging.WARNING):
        kept, frames, skipped = read_clips(clips, 4, keep=np.asarray)
    assert [one.video_id for one in kept] == ["good.mp4", "whole.avi"]
    assert skipped == ["none.mp4", "cut.mp4", "page.mp4", "short.avi"]
    assert len(frames) == 2
    assert frames[0][0].shape == (32, 32, 3)
    assert "skipped 4 of 6 videos (none.mp4, cut.mp4, page.mp4, short.avi)" in caplog.text
    with pytest.raises(DataError, match=r"none\.mp4: .*the video is missing, and so it is of all 1 videos"):
        read_clips(clips[1:2])


def test_without_pyav_the_message_names_the_extra(tmp_path, monkeypatch):
    (tmp_path / "video1.mp4").write_bytes(b"x")
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(ImportError, match=r"pip install av \(the extra `video`\)"):
        read_clips([clip(tmp_path / "video1.mp4")])


def test_questions_are_no_captions(tmp_path):
    vqa(tmp_path, "train2014")
    with pytest.raises(DataError, match=r"dataset 'vqav2': has questions, pairs or videos, not images"):
        open_records("vqav2", tmp_path)


def test_digests_of_what_a_task_is_made_of(tmp_path):
    vqa(tmp_path)
    before = task_digests(load("vqav2", tmp_path, "val"))
    assert set(before) == {"files", "texts"}
    picture(tmp_path / "coco/val2014/COCO_val2014_000000000042.jpg", (16, 16))
    after = task_digests(load("vqav2", tmp_path, "val"))
    assert (before["files"] != after["files"], before["texts"]) == (True, after["texts"])
    change(
        tmp_path / "vqav2/v2_mscoco_val2014_annotations.json",
        lambda d: d["annotations"][0]["answers"][3].update(answer="yes"),
    )
    assert task_digests(load("vqav2", tmp_path, "val"))["texts"] != after["texts"]
    picture(tmp_path / "frames/0.png")
    clips = [clip(tmp_path / "frames"), clip(tmp_path / "none.mp4", "video2")]
    assert task_digests(clips) != task_digests(clips[:1])
    with pytest.raises(DataError, match="id 'video1': is that of two records"):
        task_digests([clips[0], clips[0]])


# --- what a task's page reads --------------------------------------------------------------------------------------
class Seen:
    """A source that keeps the files of its records."""

    def __init__(self, records):
        self.files = [record.image for record in records]

    def __len__(self):
        return len(self.files)

    def batch(self, index):
        return {"file": torch.tensor(list(index))}


def seen_files(records):
    return {split: Seen(part) for split, part in records.items()}


def test_each_image_of_questions_and_pairs_is_read_once(tmp_path):
    a, b, c = (tmp_path / f"{name}.png" for name in "abc")
    questions = [Question(k, "train", "what?", str(k), image) for k, image in enumerate((b, a, b))]
    images, rows = task_images({"train": questions}, seen_files)
    assert (images["train"].files, rows["train"]) == ([b, a], [(0,), (1,), (0,)])
    pairs = [ImagePair(f"dev-{k}-0-0", "val", "x", two) for k, two in enumerate(((a, b), (b, c), (c, c)))]
    images, rows = task_images({"val": pairs}, seen_files)
    assert (images["val"].files, rows["val"]) == ([a, b, c], [(0, 1), (1, 2), (2, 2)])


def test_frames_of_folders_lie_where_they_are(tmp_path):
    for k in range(6):
        picture(tmp_path / "v0" / f"{k}.png")
    kept, images, skipped = task_frames(
        {"test": [clip(tmp_path / "v0", "v0")]}, seen_files, tmp_path / "cache", count=3
    )
    assert [file.name for file in images["test"].files] == ["0.png", "2.png", "4.png"]
    assert len(kept["test"]) == 1
    assert skipped == {"test": []}
    assert not (tmp_path / "cache").exists()


def test_frames_of_video_files_are_decoded_once_and_broken_videos_are_named(tmp_path):
    clips = [clip(encode(tmp_path / f"{name}.mp4", 8), name) for name in ("v0", "v1")]
    (tmp_path / "broken.mp4").write_bytes(b"no video")
    clips[1:1] = [clip(tmp_path / "broken.mp4", "broken"), clip(tmp_path / "gone.mp4", "gone")]
    (tmp_path / "empty").mkdir()
    clips.append(clip(tmp_path / "empty", "empty"))
    kept, images, skipped = task_frames({"test": clips}, seen_files, tmp_path / "cache", count=4)
    assert [one.video_id for one in kept["test"]] == ["v0", "v1"]
    assert skipped == {"test": ["broken", "gone", "empty"]}
    assert greys([Image.open(file) for file in images["test"].files]) == [0, 2, 4, 6] * 2
    stamp = images["test"].files[0].stat().st_mtime_ns
    again = task_frames({"test": clips}, seen_files, tmp_path / "cache", count=4)
    assert again[1]["test"].files == images["test"].files
    assert again[1]["test"].files[0].stat().st_mtime_ns == stamp
    encode(tmp_path / "v1.mp4", 6)  # another video of that name
    other = task_frames({"test": clips}, seen_files, tmp_path / "cache", count=4)
    assert greys([Image.open(file) for file in other[1]["test"].files]) == [0, 2, 4, 6, 0, 1, 3, 4]


def test_the_tasks_of_a_run(tmp_path):
    known = word_level(TOKENIZER.with_name("tokenizer.json"))
    grown = task_tokenizer("scenes", known)
    assert len(grown) > len(known)
    assert grown("what colour")["input_ids"] != known("what colour")["input_ids"]
    assert task_tokenizer("coco_karpathy", known) is known
    with pytest.raises(DataError, match="the folder does not exist"):
        task_entries("vqa", "coco_karpathy", tmp_path, ["val"])
