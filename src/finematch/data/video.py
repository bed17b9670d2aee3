"""Videos with captions: MSR-VTT's lists, and the frames of a video file or of a folder.

Xu et al., CVPR 2016; the 1,000 test videos and sentences of "1k-A" are Yu et al.'s (JSFusion, ECCV 2018). Many videos
are gone from the net, so one that is missing or broken is no error here: `read_clips` names it and leaves it out.
PyAV (the extra `video`) decodes; a folder of frames needs nothing.
"""

from __future__ import annotations

import csv
import hashlib
import io
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from finematch.data.checks import check_name, clean_caption, read_text, reading
from finematch.data.images import open_rgb
from finematch.data.record import Clip, DataError

logger = logging.getLogger(__name__)
ENDINGS = (".mp4", ".avi", ".mkv", ".webm")
COLUMNS = ("video_id", "sentence")
WHOLE = 0.9  # of the frames that a file states; of fewer it was cut off


def load_msrvtt(table: str | Path, videos: str | Path, split: str = "test") -> list[Clip]:
    """Read a list of videos and sentences; rows of one video become one clip with several captions.

    Args:
        table: csv with the columns `video_id` and `sentence`, parted by commas or semicolons; others are passed over.
        videos: folder with `<video_id>.mp4` (or .avi, .mkv, .webm), or with folders `<video_id>/` of frames.

    Returns:
        Clips in the order of the file, those without a video file too: see `read_clips`.

    Raises:
        DataError: A file without these columns or rows, an empty sentence, a video folder that does not exist.
    """
    text = read_text(table)
    header = text.split("\n", 1)[0]
    rows = csv.DictReader(io.StringIO(text, newline=""), delimiter=";" if ";" in header else ",", restval="")
    if missing := [name for name in COLUMNS if name not in (rows.fieldnames or ())]:
        raise DataError(table, "line 1", f"the columns {missing} are missing", "Download the file again")
    folder = Path(videos)
    if not folder.is_dir():
        raise DataError(folder, f"videos of {table}", "the folder does not exist", "Put the videos there")
    present = {path.name for path in folder.iterdir()}
    captions: dict[str, list[str]] = {}
    try:
        for row in rows:
            name = f"line {rows.line_num}"
            with reading(table, name):
                video = check_name(clean_caption(row["video_id"], table, name), table, name)
                captions.setdefault(video, []).append(clean_caption(row["sentence"], table, name))
    except csv.Error as error:
        raise DataError(
            table, f"line {rows.line_num}", f"is no csv ({error})", "Download it again"
        ) from error
    if not captions:
        raise DataError(table, "the file", "has no rows", "Download it again")
    clips = []
    for video, texts in captions.items():
        files = [name for name in (video, *(video + end for end in ENDINGS)) if name in present]
        path = folder / (files[0] if files else video + ENDINGS[0])
        clips.append(Clip(video, split, tuple(texts), path, source=f"{table}: video {video}"))
    return clips


def frame_numbers(
    total: int, count: int, *, how: str = "uniform", seed: int = 0, name: str = ""
) -> list[int]:
    """Which `count` of `total` frames are looked at, in order.

    `uniform`: the first frame of each of `count` equal parts, as BLIP. `random`: drawn without repetition, as the paper
    ("randomly select m frames"); the draw depends on the seed and the video's `name` alone. Frames of a shorter video
    are repeated.
    """
    if total < 1 or count < 1:
        raise ValueError(f"{count} of {total} frames")
    if how == "uniform" or total <= count:
        return [i * total // count for i in range(count)]
    if how != "random":
        raise ValueError(f"how is 'uniform' or 'random', not {how!r}")
    key = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8])
    return sorted(np.random.default_rng([seed, key]).choice(total, count, replace=False).tolist())


def read_frames(clip: Clip, count: int = 8, *, how: str = "uniform", seed: int = 0) -> list[Image.Image]:
    """`count` frames of a clip as RGB, see `frame_numbers`.

    Raises:
        DataError: A video that is missing, cannot be decoded or was cut off. Its `record` names the clip.
        ImportError: PyAV is not installed, and the clip is a video file.
    """

    def choose(total: int) -> list[int]:
        return frame_numbers(total, count, how=how, seed=seed, name=clip.video_id)

    if clip.video.is_dir():
        files = sorted(clip.video.iterdir())
        if not files:
            raise DataError(clip.video, clip.source, "the folder has no frames", "Restore or remove it")
        return [open_rgb(files[number], clip.source) for number in choose(len(files))]
    if not clip.video.is_file():
        raise DataError(clip.video, clip.source, "the video is missing", "Restore it, or report without it")
    total = _count(clip)
    wanted = choose(total)
    pictures = {}
    for number, frame in enumerate(_decode(clip)):
        if number in wanted:
            pictures[number] = frame.to_image()
        if number == wanted[-1]:
            break
    return [pictures[number] for number in wanted]


def read_clips(
    clips: Sequence[Clip],
    count: int = 8,
    *,
    how: str = "uniform",
    seed: int = 0,
    keep: Callable[[Image.Image], Any] = lambda frame: frame,
) -> tuple[list[Clip], list[list], list[str]]:
    """The frames of all clips that can be read.

    Args:
        keep: what becomes of each frame at once (a resized array), so that whole frames need not stay in memory.

    Returns:
        The clips that were read, their frames ("v m"), and the names of those that were skipped, which one warning
        lists with the first reason. Their number belongs into the protocol (`evaluation.retrieval.video_retrieval`).

    Raises:
        DataError: If no clip can be read.
    """
    kept, frames, skipped, first = [], [], [], None
    for clip in clips:
        try:
            frames.append([keep(frame) for frame in read_frames(clip, count, how=how, seed=seed)])
            kept.append(clip)
        except DataError as error:
            skipped.append(clip.video_id)
            first = first or error
    if first is not None and not kept:
        raise DataError(first.file, first.record, f"{first.problem}, and so it is of all {len(clips)} videos",
                        "Put the videos into their folder")  # fmt: skip
    if first is not None:
        listed = ", ".join(skipped)
        logger.warning("skipped %d of %d videos (%s); the first: %s", len(skipped), len(clips), listed, first)
    return kept, frames, skipped


def pyav():
    """The module `av`; ImportError that names the extra where it is missing."""
    try:
        import av
    except ImportError as error:
        raise ImportError(
            "video files are decoded by PyAV, which is not installed: pip install av (the extra `video`)"
        ) from error
    return av


def _decode(clip: Clip):
    """The frames of a video file, one after another; DataError where the decoder fails."""
    av = pyav()
    try:
        with av.open(str(clip.video)) as container:
            stream = container.streams.video[0]
            stream.thread_type = "AUTO"
            yield from container.decode(stream)
    except (av.error.FFmpegError, IndexError, OSError) as error:
        why = str(error) if not isinstance(error, IndexError) else "it has no video stream"
        raise DataError(clip.video, clip.source, f"the video cannot be decoded ({why})",
                        "Download it again, or report without it") from error  # fmt: skip


def _count(clip: Clip) -> int:
    """How many frames decode. What a container states is often 0, and more than there is where it was cut off."""
    av = pyav()
    total = sum(1 for _ in _decode(clip))
    with av.open(str(clip.video)) as container:
        stated = container.streams.video[0].frames
    if total == 0 or total < WHOLE * stated:
        raise DataError(clip.video, clip.source, f"{total} of {stated} frames can be decoded: it was cut off",
                        "Download it again, or report without it")  # fmt: skip
    return total
