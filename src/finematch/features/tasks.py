"""What SLAN's tasks read beside a pretrained run: questions, image pairs and videos, and their images as it sees them.

A run on `scenes` is tested on the tasks of `scenes`, any other on the published sets (`TASK_SETS`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from PIL import Image
from transformers import PreTrainedTokenizerBase

from finematch.data import load
from finematch.data.pairs import Source
from finematch.data.record import Clip, Entry, ImagePair, Question, Record, task_digests
from finematch.data.video import frame_numbers, read_clips
from finematch.files import cached

TASK_SETS = {  # on scenes, on photos
    "vqa": ("scenes_vqa", "vqav2"),
    "nlvr2": ("scenes_nlvr2", "nlvr2"),
    "video": ("scenes_clips", "msrvtt"),
}
SMOKE = {"train": 96, "val": 32, "test": 32}
Sources = Mapping[str, Sequence[Record]]


def task_entries(
    task: str, dataset: str, data_root: str | Path, splits: Sequence[str], *, smoke: bool = False
) -> dict[str, list[Entry]]:
    """Questions, image pairs or clips of each split; on scenes they are drawn when they are first asked for.

    Args:
        dataset: of the pretrained run.
        smoke: the first few of each split.
    """
    name = TASK_SETS[task][0 if dataset.startswith("scenes") else 1]
    found = {split: load(name, data_root, split) for split in splits}
    return {split: part[: SMOKE.get(split, 32)] for split, part in found.items()} if smoke else found


def task_tokenizer(dataset: str, tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """The tokenizer of a task's texts. Captions of scenes lack words that questions have: theirs come after all others,
    and the text tower has to `grow`; any other vocabulary stays."""
    if not dataset.startswith("scenes"):
        return tokenizer
    from finematch.scenes.tasks import TOKENIZER
    from finematch.text import word_level

    return word_level(TOKENIZER)


def task_images(
    entries: Mapping[str, Sequence[Question] | Sequence[ImagePair]],
    see: Callable[[Sources], Mapping[str, Source]],
) -> tuple[Mapping[str, Source], dict[str, list[tuple[int, ...]]]]:
    """The images of questions or pairs, each file once, and their rows for each entry (of a pair: left, right).

    Args:
        see: makes images of records as the pretrained run sees its own.
    """
    records, rows = {}, {}
    for split, part in entries.items():
        files = [(one.image,) if isinstance(one, Question) else one.images for one in part]
        row_of = {
            file: row for row, file in enumerate(dict.fromkeys(file for some in files for file in some))
        }
        # kept maps lie beside a line of text for each image: its name
        records[split] = [Record(file.name, split, (file.name,), file) for file in row_of]
        rows[split] = [tuple(row_of[file] for file in some) for some in files]
    return see(records), rows


def task_frames(
    clips: Mapping[str, Sequence[Clip]],
    see: Callable[[Sources], Mapping[str, Source]],
    cache: str | Path,
    *,
    count: int,
    how: str = "uniform",
    seed: int = 0,
) -> tuple[dict[str, list[Clip]], Mapping[str, Source], dict[str, list[str]]]:
    """The clips that can be read, `count` frames of each ("v m" rows), and the names of those that were skipped.

    Frames of video files are decoded once, into PNG files in the cache. Frames of a folder are read where they lie.
    """
    kept, records, skipped = {}, {}, {}
    for split, part in clips.items():
        part = list(part)
        lying = [sorted(clip.video.iterdir()) if clip.video.is_dir() else [] for clip in part]
        if all(lying):
            kept[split], skipped[split] = part, []
            files = [some[k] for clip, some in zip(part, lying, strict=True)
                     for k in frame_numbers(len(some), count, how=how, seed=seed, name=clip.video_id)]  # fmt: skip
        else:
            kept[split], files, skipped[split] = _decoded(part, cache, count, how, seed)
        names = [f"{clip.video_id}/{k}" for clip in kept[split] for k in range(count)]
        records[split] = [Record(name, split, (name,), file) for name, file in zip(names, files, strict=True)]
    return kept, see(records), skipped


def _decoded(
    clips: list[Clip], cache: str | Path, count: int, how: str, seed: int
) -> tuple[list[Clip], list[Path], list[str]]:
    """Frames of video files as files of the cache, of the clips that can be read."""
    key = {"videos": task_digests(clips)["files"], "names": [clip.video_id for clip in clips], "count": count,
           "how": how, "seed": seed if how == "random" else 0}  # fmt: skip

    def write(folder: Path) -> None:
        number = 0

        def keep(frame: Image.Image) -> int:
            nonlocal number
            frame.save(folder / f"{number:07d}.png")
            number += 1
            return number

        skipped = read_clips(clips, count, how=how, seed=seed, keep=keep)[2]
        (folder / "skipped.txt").write_text("\n".join(skipped), encoding="utf-8")

    folder = cached(cache, "frames", key, write)
    skipped = (folder / "skipped.txt").read_text(encoding="utf-8").splitlines()
    kept = [clip for clip in clips if clip.video_id not in skipped]
    return kept, sorted(folder.glob("*.png")), skipped
