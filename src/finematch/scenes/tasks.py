"""Parts of `scenes` for three tasks, drawn when they are first asked for: questions, image pairs, clips.

    vqa/      VQAv2's JSON: `v2_OpenEnded_scenes_<split>_questions.json`, `v2_scenes_<split>_annotations.json`
    nlvr2/    NLVR2's JSON lines `<train, dev, test1>.json`, and `images/<name>/<pair>-img<0, 1>.png`, which are
              links to those of `scenes` (copies where a disk has none)
    clips/    MSR-VTT's csv `<split>.csv`, and `frames/<video>/<k>.png`
    videos/   the same clips, encoded by PyAV: `<video>.mp4`

Each part has, written last, `version.json` (version, a digest of names and bytes); sentences and clips have
`attributes.json`, which says what they mean.
The set itself is not touched. `python -m finematch.scenes.tasks OUT` draws all parts of a set.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import io
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np

from finematch.data.checks import read_json, reading
from finematch.data.images import open_rgb
from finematch.data.video import pyav
from finematch.files import DataError, digest, file_digests
from finematch.scenes import clips as clips_module
from finematch.scenes import questions as questions_module
from finematch.scenes import sentences as sentences_module
from finematch.scenes.clips import frames_of, group_of
from finematch.scenes.generator import SPLITS, attributes, build_tokenizer, number
from finematch.scenes.language import vocabulary

VERSIONS = {"vqa": 1, "nlvr2": 1, "clips": 1, "videos": 1}  # raise one when anything in it changes
NEEDS = {"videos": "clips"}
TOKENIZER = Path(__file__).with_name("tokenizer_tasks.json")
NLVR2_NAMES = {"train": "train", "val": "dev", "test": "test1"}
# images of `scenes` for each question, sentence or scene of clips
A_QUESTION = {"train": 0.5, "val": 0.5, "test": 0.25}
A_SENTENCE = {"train": 4, "val": 4, "test": 2}
A_SCENE = {"train": 20, "val": 20, "test": 10}


def draw(root: str | Path, part: str) -> Path:
    """Draw a part of a set, or reuse it where its version is this one; returns its folder.

    The folder appears whole or not at all. Its bytes depend on the set's seed, size and number of images alone (those
    of videos on PyAV's encoder, too).

    Raises:
        DataError: No set is there, or the part cannot be written.
        ImportError: `videos` without PyAV.
    """
    root, out = Path(root), Path(root) / part
    path = out / "version.json"
    if path.exists():
        with reading(path, "the version"):
            if read_json(path)["version"] == VERSIONS[part]:
                return out
    if part in NEEDS:
        draw(root, NEEDS[part])
    meta = read_json(root / "meta.json")
    folder = root / f".{part}.{os.getpid()}.partial"
    try:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        WRITERS[part](root, folder, meta)
        said = {"version": VERSIONS[part], "digest": part_digest(folder)}
        (folder / "version.json").write_text(json.dumps(said), encoding="utf-8")
        shutil.rmtree(out, ignore_errors=True)
        with contextlib.suppress(FileExistsError):  # another process has drawn it meanwhile
            folder.rename(out)
    except OSError as error:
        raise DataError(
            out, "whole folder", f"cannot be written ({error})", "Choose a writable data_root"
        ) from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return out


def part_digest(folder: str | Path) -> str:
    """SHA-256 of a part: of its files' names and bytes, but for `version.json`."""
    files = sorted(path for path in Path(folder).rglob("*") if path.is_file() and path.name != "version.json")
    names = [path.relative_to(folder).as_posix() for path in files]
    return digest(list(zip(names, file_digests(files, remember=False), strict=True)))


def _random(meta: dict, split: str, part: str) -> np.random.Generator:
    return np.random.default_rng([meta["seed"], SPLITS.index(split), list(VERSIONS).index(part), 3])


def _json(path: Path, content) -> None:
    path.write_text(json.dumps(content, separators=(",", ":")), encoding="utf-8")


def _draw_vqa(root: Path, folder: Path, meta: dict) -> None:
    for split in SPLITS:
        pictures = attributes(root, split)
        wanted = 2 * max(1, round(len(pictures) / A_QUESTION[split] / 2))
        made = questions_module.questions_of(_random(meta, split, "vqa"), pictures, wanted)
        numbers = [number(one["picture"]) for one in made]
        asked, answered = questions_module.vqa_files(made, numbers, split)
        _json(folder / f"v2_OpenEnded_scenes_{split}_questions.json", asked)
        _json(folder / f"v2_scenes_{split}_annotations.json", answered)


def _draw_nlvr2(root: Path, folder: Path, meta: dict) -> None:
    truths = []
    for split, name in NLVR2_NAMES.items():
        pictures = attributes(root, split)
        wanted = max(1, len(pictures) // A_SENTENCE[split])
        made = sentences_module.sentences_of(_random(meta, split, "nlvr2"), pictures, wanted)
        lines = sentences_module.nlvr2_lines(made, name)
        (folder / f"{name}.json").write_text(
            "".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8"
        )
        (folder / "images" / name).mkdir(parents=True)
        for line in lines:
            stem = line["identifier"].rsplit("-", 1)[0]
            for side, url in enumerate(("left_url", "right_url")):
                _link(root / "images" / line[url], folder / "images" / name / f"{stem}-img{side}.png")
        for index, one in enumerate(made):
            pairs = [{"states": pair["states"], "label": pair["label"]} for pair in one["pairs"]]
            truths.append(
                {"split": split, "sentence": index, "kind": one["kind"], "mentions": one["mentions"]}
            )
            truths[-1]["pairs"] = pairs
    _json(folder / "attributes.json", {"sentences": truths})


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def _draw_clips(root: Path, folder: Path, meta: dict) -> None:
    every = []
    for split in SPLITS:
        groups = max(1, meta["splits"][split] // A_SCENE[split])
        made = [clip for group in range(groups) for clip in group_of(meta["seed"], split, group)]
        rows = io.StringIO()
        table = csv.writer(rows, lineterminator="\n")
        table.writerow(("key", "vid_key", "video_id", "sentence"))
        for index, clip in enumerate(made):
            table.writerow((f"ret{index}", f"scn{index}", clip["video_id"], clip["text"]))
            frames = folder / "frames" / clip["video_id"]
            frames.mkdir(parents=True)
            for k, frame in enumerate(frames_of(meta["seed"], clip, meta["size"])):
                frame.save(frames / f"{k:02d}.png")
        (folder / f"{split}.csv").write_text(rows.getvalue(), encoding="utf-8")
        every += made
    _json(folder / "attributes.json", {"clips": every})


def _draw_videos(root: Path, folder: Path, meta: dict) -> None:
    for frames in sorted((root / "clips/frames").iterdir()):
        encode([open_rgb(path) for path in sorted(frames.iterdir())], folder / f"{frames.name}.mp4")


def encode(frames: list, path: Path, *, rate: int = 8) -> None:
    """A video of MPEG-4 from RGB images of one size, whose bytes depend on the images and the encoder alone.

    Sides are made even, as the colour planes of half the size need it.
    """
    av = pyav()
    width, height = (side + side % 2 for side in frames[0].size)
    with av.open(str(path), "w", options={"fflags": "+bitexact"}) as container:
        stream = container.add_stream("mpeg4", rate=rate)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        stream.codec_context.thread_count = 1
        stream.codec_context.bit_rate = 4_000_000
        stream.codec_context.options = {"flags": "+bitexact", "qmin": "1", "qmax": "3"}
        for frame in frames:
            image = av.VideoFrame.from_image(frame.convert("RGB").resize((width, height)))
            container.mux(stream.encode(image))
        container.mux(stream.encode())


WRITERS: dict[str, Callable[[Path, Path, dict], None]] = {
    "vqa": _draw_vqa,
    "nlvr2": _draw_nlvr2,
    "clips": _draw_clips,
    "videos": _draw_videos,
}


def clip_truths(root: str | Path, split: str) -> list[dict]:
    """What is in the clips of a split, see `clips.group_of`; DataError where they are not drawn."""
    path = Path(root) / "clips/attributes.json"
    data = read_json(path)
    with reading(path, "the list `clips`"):
        return [clip for clip in data["clips"] if clip["split"] == split]


def sentence_truths(root: str | Path, split: str) -> list[dict]:
    """What the sentences of a split mean, see `sentences.sentences_of`; DataError where they are not drawn."""
    path = Path(root) / "nlvr2/attributes.json"
    data = read_json(path)
    with reading(path, "the list `sentences`"):
        return [one for one in data["sentences"] if one["split"] == split]


def task_words() -> list[str]:
    """The words of questions, answers, sentences and clips that no caption of `scenes` has, sorted."""
    texts = [*questions_module.WORDS]
    for table in (questions_module.TEXTS, sentences_module.TEXTS, clips_module.VERBS):
        texts += [text for entry in table.values() for text in entry]
    texts += clips_module.TEXTS
    words = {word for text in texts for word in text.replace("?", " ?").split() if not word.startswith("{")}
    return sorted({*words, "."} - set(vocabulary()))


def build_task_tokenizer():
    """The tokeniser of `scenes` with the words of its tasks after all others: the ids of the captions stay.

    tokenizer_tasks.json beside this file is this tokeniser, saved. A tower that knows captions alone has to get rows
    for the new words before it reads a question.
    """
    return build_tokenizer(task_words())


def main(arguments: list[str] | None = None) -> None:
    """Draw the parts of a set that lies in OUT."""
    parser = argparse.ArgumentParser(prog="python -m finematch.scenes.tasks", description=main.__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--part", choices=list(VERSIONS), action="append", help="all of them unless given")
    options = parser.parse_args(arguments)
    for part in options.part or VERSIONS:
        try:
            print(draw(options.out, part))
        except DataError as error:
            parser.error(str(error))


if __name__ == "__main__":
    main()
