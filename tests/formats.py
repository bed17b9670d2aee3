"""Writers of tiny datasets in the published formats, for the tests of the loaders."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from PIL import Image


def picture(path: Path, size: tuple[int, int] = (32, 24), mode: str = "RGB") -> Path:
    """A picture with a gradient, so that its JPEG has something to cut off."""
    path.parent.mkdir(parents=True, exist_ok=True)
    ramp = np.add.outer(np.arange(size[1]) * 5, np.arange(size[0]) * 3).astype(np.uint8)
    Image.fromarray(ramp).convert(mode).save(path)
    return path


def karpathy_entry(number: int, split: str, captions: list[str], **more) -> dict:
    """One entry of Karpathy's `images`; sentence ids are ten times the picture's number and up."""
    ids = [10 * number + k for k in range(len(captions))]
    sentences = [
        {"tokens": raw.split(), "raw": raw, "imgid": number, "sentid": sentid}
        for sentid, raw in zip(ids, captions, strict=True)
    ]
    entry = {"filename": f"p{number}.jpg", "imgid": number, "split": split, "sentids": ids}
    return {**entry, "sentences": sentences, **more}


def karpathy(root: Path, entries: list[dict], pictures: bool = True) -> Path:
    """`root/dataset_tiny.json`, and the pictures under `root/images`."""
    if pictures:
        for entry in entries:
            picture(root / "images" / entry.get("filepath", "") / entry["filename"])
    path = root / "dataset_tiny.json"
    path.write_text(json.dumps({"images": entries, "dataset": "tiny"}))
    return path


def five(number: int) -> list[str]:
    return [f"caption {k} of picture {number}" for k in range(5)]


def coco(root: Path, *, captions: list[tuple] = (), boxes: list[tuple] = (), n: int = 2) -> tuple[Path, Path]:
    """`captions.json` from (image id, text) and `instances.json` from (image id, category, xywh, crowd)."""
    images = [
        {"id": 7 * k, "file_name": f"{7 * k:012d}.jpg", "width": 32, "height": 24} for k in range(1, n + 1)
    ]
    for image in images:
        picture(root / image["file_name"])
    texts = [{"id": k, "image_id": i, "caption": text} for k, (i, text) in enumerate(captions, 100)]
    objects = [
        {"id": k, "image_id": i, "category_id": c, "bbox": box, "area": box[2] * box[3], "iscrowd": crowd}
        for k, (i, c, box, crowd) in enumerate(boxes, 500)
    ]
    kinds = [{"id": 90, "name": "toothbrush"}, {"id": 1, "name": "person"}]
    captions_path, instances_path = root / "captions.json", root / "instances.json"
    captions_path.write_text(json.dumps({"images": images, "annotations": texts}))
    instances_path.write_text(json.dumps({"images": images, "annotations": objects, "categories": kinds}))
    return captions_path, instances_path


def entity_object(names: list[str], box: tuple | None = None, **flags: int) -> str:
    """One `<object>` of an Entities XML."""
    inner = "".join(f"<name>{name}</name>" for name in names)
    if box is not None:
        tags = zip(("xmin", "ymin", "xmax", "ymax"), box, strict=True)
        inner += "<bndbox>" + "".join(f"<{tag}>{value}</{tag}>" for tag, value in tags) + "</bndbox>"
    return f"<object>{inner}" + "".join(f"<{k}>{v}</{k}>" for k, v in flags.items()) + "</object>"


def entities(root: Path, sentences: str, objects: list[str], *, size: tuple[int, int] = (32, 24)) -> Path:
    """One picture, `55`, in the split `val`."""
    for folder in ("Annotations", "Sentences"):
        (root / folder).mkdir(parents=True, exist_ok=True)
    picture(root / "images" / "55.jpg")
    (root / "val.txt").write_text("55\n")
    (root / "Sentences" / "55.txt").write_text(sentences, encoding="utf-8")
    (root / "Annotations" / "55.xml").write_text(
        "<annotation>\n<filename>55.jpg</filename>\n"
        f"<size><width>{size[0]}</width><height>{size[1]}</height><depth>3</depth></size>\n"
        + "\n".join(objects)
        + "\n</annotation>\n"
    )
    return root


def precomp(
    folder: Path, split: str, features: np.ndarray, captions: list[str], ids: list[str] | None = None
) -> Path:
    """SCAN's three files."""
    folder.mkdir(parents=True, exist_ok=True)
    np.save(folder / f"{split}_ims.npy", features)
    (folder / f"{split}_caps.txt").write_text("".join(f"{c}\n" for c in captions), encoding="utf-8")
    if ids is not None:
        (folder / f"{split}_ids.txt").write_text("".join(f"{i}\n" for i in ids))
    return folder


def coco_year(root: Path, year: str, counts: dict[str, int]) -> None:
    """COCO's files of a year under `root`, so many images of each split; each has five captions and one box."""
    kinds = [{"id": 90, "name": "toothbrush"}, {"id": 1, "name": "person"}]
    (root / "coco" / "annotations").mkdir(parents=True)
    for number, (split, n) in enumerate(counts.items()):
        images = [
            {"id": 100 * number + k, "file_name": f"{k:012d}.jpg", "width": 40, "height": 30}
            for k in range(1, n + 1)
        ]
        for image in images:
            picture(root / "coco" / f"{split}{year}" / image["file_name"], (40, 30))
        texts = [
            {"id": 5 * k + j, "image_id": image["id"], "caption": f"a person with toothbrush {k} and {j}"}
            for k, image in enumerate(images) for j in range(5)
        ]  # fmt: skip
        boxes = [
            {"id": k, "image_id": image["id"], "category_id": (1, 90)[k % 2], "bbox": [2, 3, 20, 15], "area": 300,
             "iscrowd": 0}
            for k, image in enumerate(images, 1)
        ]  # fmt: skip
        for kind, listed in (("captions", texts), ("instances", boxes)):
            content = {"images": images, "annotations": listed}
            if kind == "instances":
                content["categories"] = kinds
            (root / "coco" / "annotations" / f"{kind}_{split}{year}.json").write_text(json.dumps(content))
