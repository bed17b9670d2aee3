"""Datasets by name: `load("flickr8k", data_root, "train")` gives records, whatever the format on disk."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finematch.data import packed
from finematch.data.coco import categories, load_coco
from finematch.data.entities import load_entities
from finematch.data.images import open_rgb
from finematch.data.karpathy import load_karpathy
from finematch.data.nlvr2 import FILES, load_nlvr2
from finematch.data.precomp import Regions, load_regions
from finematch.data.record import (
    Box,
    Clip,
    DataError,
    Entry,
    ImagePair,
    Object,
    Phrase,
    Question,
    Record,
    digests,
    task_digests,
)
from finematch.data.video import load_msrvtt, read_clips
from finematch.data.visual_genome import load_visual_genome
from finematch.data.vqa import SUBSETS, load_vqa

__all__ = [
    "Box",
    "Clip",
    "DataError",
    "Entry",
    "ImagePair",
    "Object",
    "Phrase",
    "Question",
    "Record",
    "Regions",
    "categories",
    "dataset_help",
    "dataset_names",
    "digests",
    "load",
    "load_coco",
    "load_entities",
    "load_karpathy",
    "load_msrvtt",
    "load_nlvr2",
    "load_regions",
    "load_visual_genome",
    "load_vqa",
    "open_rgb",
    "read_clips",
    "task_digests",
]


@dataclass(frozen=True)
class _Dataset:
    """What a name stands for: what is read, from which paths below the data root (`{s}` is the split)."""

    what: str
    paths: tuple[str, ...]
    read: Callable[..., list]
    part: str = ""  # of the embedded set, drawn when it is first asked for


def _karpathy(json_path: str, image_dir: str) -> tuple[tuple[str, ...], Callable[..., list[Record]]]:
    def read(root: Path, split: str, **options) -> list[Record]:
        file = root / json_path
        if not file.exists() and packed.tables(file.parent):
            packed.unpack(file.parent, file, root / image_dir, file.parent.name)
        return load_karpathy(file, root / image_dir, split, **options)

    return (json_path, image_dir), read


def _coco(images: str, captions: str, instances: str) -> tuple[tuple[str, ...], Callable[..., list[Record]]]:
    def read(root: Path, split: str, **options) -> list[Record]:
        folder, texts, boxes = (root / path.format(s=split) for path in (images, captions, instances))
        return load_coco(folder, **{"captions": texts, "instances": boxes, "split": split, **options})

    return (captions, instances, images), read


def _entities(folder: str, images: str) -> tuple[tuple[str, ...], Callable[..., list[Record]]]:
    def read(root: Path, split: str, **options) -> list[Record]:
        return load_entities(root / folder, split, **{"image_dir": root / images, **options})

    return (f"{folder}/{{s}}.txt", f"{folder}/Sentences", f"{folder}/Annotations", images), read


def _visual_genome(
    regions: str, images: str, folder: str, held_out: tuple[str, ...]
) -> tuple[tuple[str, ...], Callable[..., list[Record]]]:
    def read(root: Path, split: str, **options) -> list[Record]:
        coco, others = root / held_out[0], [root / path for path in held_out[1:]]
        if "held_out" not in options and not coco.exists():
            raise DataError(
                coco,
                "COCO's val and test",
                "are missing, and half of Visual Genome's pictures are COCO's",
                "Put Karpathy's file there, or give held_out=() and do not report on COCO",
            )
        options = {"held_out": [coco, *(path for path in others if path.exists())], **options}
        return load_visual_genome(root / regions, root / images, root / folder, split=split, **options)

    return (regions, images, f"{folder}/VG_100K", f"{folder}/VG_100K_2", held_out[0]), read


def _subset(split: str, names: dict, file: Path) -> Any:
    """What a release calls a split; DataError where it has none of that name."""
    if split not in names:
        raise DataError(
            file, f"split {split!r}", "is not one of the set's", f"Choose one of {', '.join(names)}"
        )
    return names[split]


def _vqav2(folder: str) -> tuple[tuple[str, ...], Callable[..., list[Question]]]:
    questions, answers = "v2_OpenEnded_mscoco_{s}_questions.json", "v2_mscoco_{s}_annotations.json"

    def read(root: Path, split: str, **options) -> list[Question]:
        subset, images = _subset(split, SUBSETS, root / folder)
        if not split.startswith("test"):
            options = {"annotations": root / folder / answers.format(s=subset), **options}
        name = f"COCO_{images}_{{:012d}}.jpg".format
        file = root / folder / questions.format(s=subset)
        return load_vqa(file, root / "coco" / images, split, **{"image_name": name, **options})

    return tuple(f"{folder}/{file.replace('{s}', '{s}2014')}" for file in (questions, answers)), read


def _scenes_vqa(folder: str) -> tuple[tuple[str, ...], Callable[..., list[Question]]]:
    paths = f"{folder}/v2_OpenEnded_scenes_{{s}}_questions.json", f"{folder}/v2_scenes_{{s}}_annotations.json"

    def read(root: Path, split: str, **options) -> list[Question]:
        questions, answers = (root / path.format(s=split) for path in paths)
        options = {"annotations": answers, **options}
        options["image_name"] = lambda number: f"scenes_{split}_{number % 100_000:05d}.png"
        return load_vqa(questions, root / "scenes/images", split, **options)

    return paths, read


def _nlvr2(folder: str, images: str) -> tuple[tuple[str, ...], Callable[..., list[ImagePair]]]:
    def read(root: Path, split: str, **options) -> list[ImagePair]:
        name = _subset(split, FILES, root / folder)
        return load_nlvr2(root / folder / f"{name}.json", root / images / name, split, **options)

    return (f"{folder}/{{s}}.json", f"{images}/{{s}}"), read


def _msrvtt(table: str, videos: str, splits: tuple[str, ...]) -> tuple[tuple[str, ...], Callable]:
    def read(root: Path, split: str, **options) -> list[Clip]:
        file = root / table.format(s=_subset(split, {name: name for name in splits}, root / table))
        return load_msrvtt(file, root / videos, split, **options)

    return (table, videos), read


_DATASETS = {
    "scenes": _Dataset(
        "the embedded set, drawn on first use", *_karpathy("scenes/dataset_scenes.json", "scenes/images")
    ),
    "scenes_coco": _Dataset(
        "its captions and boxes",
        *_coco(
            "scenes/images",
            "scenes/annotations/captions_{s}.json",
            "scenes/annotations/instances_{s}.json",
        ),
    ),
    "scenes_entities": _Dataset("its phrases and boxes", *_entities("scenes/entities", "scenes/images")),
    "scenes_vqa": _Dataset(
        "questions about its images, in VQAv2's format", *_scenes_vqa("scenes/vqa"), "vqa"
    ),
    "scenes_nlvr2": _Dataset(
        "sentences about two of its images, in NLVR2's format",
        *_nlvr2("scenes/nlvr2", "scenes/nlvr2/images"),
        "nlvr2",
    ),
    "scenes_clips": _Dataset(
        "moving shapes as folders of frames, in MSR-VTT's format",
        *_msrvtt("scenes/clips/{s}.csv", "scenes/clips/frames", ("train", "val", "test")),
        "clips",
    ),
    "scenes_videos": _Dataset(
        "the same clips as encoded files (needs PyAV)",
        *_msrvtt("scenes/clips/{s}.csv", "scenes/videos", ("train", "val", "test")),
        "videos",
    ),
    "flickr8k": _Dataset(
        "Karpathy's splits (train, val, test)",
        *_karpathy("flickr8k/dataset_flickr8k.json", "flickr8k/images"),
    ),
    "flickr30k": _Dataset(
        "Karpathy's splits (train, val, test)",
        *_karpathy("flickr30k/dataset_flickr30k.json", "flickr30k/images"),
    ),
    "coco_karpathy": _Dataset(
        "Karpathy's splits and restval, trainrestval; pictures in coco/{train2014,val2014}",
        *_karpathy("coco/dataset_coco.json", "coco"),
    ),
    "coco": _Dataset(
        "captions and instances of 2017 (train, val)",
        *_coco(
            "coco/{s}2017",
            "coco/annotations/captions_{s}2017.json",
            "coco/annotations/instances_{s}2017.json",
        ),
    ),
    "flickr8k_entities": _Dataset(
        "Flickr30k Entities' format on Flickr8k", *_entities("flickr8k_entities", "flickr8k_entities/images")
    ),
    "flickr30k_entities": _Dataset(
        "Flickr30k Entities (train, val, test)", *_entities("flickr30k_entities", "flickr30k_entities/images")
    ),
    "visual_genome": _Dataset(
        "described regions, for pretraining (train alone), without COCO's and Flickr30k's val and test",
        *_visual_genome(
            "visual_genome/region_descriptions.json",
            "visual_genome/image_data.json",
            "visual_genome",
            (
                "coco/dataset_coco.json",
                "coco/annotations/captions_val2017.json",
                "flickr30k/dataset_flickr30k.json",
            ),
        ),
    ),
    "vqav2": _Dataset("VQAv2 (train, val, test-dev, test); images in coco/", *_vqav2("vqav2")),
    "nlvr2": _Dataset("NLVR2 (train; val is dev, test is test1, test-P)", *_nlvr2("nlvr2", "nlvr2/images")),
    "msrvtt": _Dataset(
        "MSR-VTT's 1k-A (test alone)",
        *_msrvtt("msrvtt/MSRVTT_JSFUSION_test.csv", "msrvtt/videos", ("test",)),
    ),
}


def dataset_names() -> tuple[str, ...]:
    """The names that `load` knows."""
    return tuple(_DATASETS)


def dataset_help(dataset: str | None = None) -> str:
    """The files that a dataset (or every dataset) is expected to have under the data root, one a line."""
    lines = []
    for name in _DATASETS if dataset is None else (dataset,):
        lines.append(f"{name}: {_DATASETS[name].what}")
        lines += [f"    <data_root>/{path.format(s='<split>')}" for path in _DATASETS[name].paths]
    return "\n".join(lines)


def load(dataset: str, data_root: str | Path, split: str, **options) -> list[Entry]:
    """The records of one split of a dataset; those of tasks are `Question`, `ImagePair` and `Clip`.

    Args:
        dataset: a name that `dataset_help()` lists.
        data_root: folder above the dataset's own. `scenes` is drawn there if it is absent, and again if an older
            version of the generator drew it.
        split: as the format has them: `train`, `val`, `test`, for COCO also `restval` and `trainrestval`.
        options: passed to the format's loader (`load_karpathy`, `load_coco`, `load_entities`,
            `load_visual_genome`, `load_vqa`, `load_nlvr2`, `load_msrvtt`).

    Raises:
        DataError: an unknown name, a dataset that is not under `data_root`, a `scenes` of one's own seed or sizes that
            another version of the generator drew, or what the loader raises.
    """
    if dataset not in _DATASETS:
        close = difflib.get_close_matches(dataset, _DATASETS, n=1)
        problem = "is not known" + (f"; near to {close[0]!r}" if close else "")
        raise DataError("(no file)", f"dataset {dataset!r}", problem, f"Choose one of {', '.join(_DATASETS)}")
    root = Path(data_root)
    if dataset.startswith("scenes"):
        from finematch.scenes import generator  # here, because drawing imports more than reading needs

        if not (root / "scenes").exists():
            generator.generate(root / "scenes")
        generator.current(root / "scenes", redraw=True)
        if part := _DATASETS[dataset].part:
            from finematch.scenes import tasks

            tasks.draw(root / "scenes", part)
    first = root / Path(_DATASETS[dataset].paths[0]).parts[0]
    if not first.is_dir():
        raise DataError(
            first,
            f"dataset {dataset!r}",
            "the folder does not exist",
            "Set data_root to the folder that has "
            + ", ".join(_DATASETS[dataset].paths).replace("{s}", split),
        )
    return _DATASETS[dataset].read(root, split, **options)
