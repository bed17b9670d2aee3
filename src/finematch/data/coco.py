"""COCO: captions and instance boxes, read through pycocotools.

Lin et al., ECCV 2014. The files give boxes as `[x, y, width, height]` in pixels of the picture; records give
`(x1, y1, x2, y2)`. Category ids run from 1 to 90 with holes, so records carry names.
"""

from __future__ import annotations

import contextlib
import io
from pathlib import Path

from pycocotools.coco import COCO

from finematch.data.checks import (
    BoxPolicy,
    check_max_captions,
    check_name,
    check_sizes,
    clean_caption,
    flag,
    read_json,
    reading,
    require_distinct,
    require_pictures,
    require_unique,
    stated_size,
)
from finematch.data.names import known_names
from finematch.data.record import DataError, Object, Record

# Other words that captions use for COCO's categories, in the singular.
SYNONYMS: dict[str, tuple[str, ...]] = {
    "person": (
        *("man", "woman", "boy", "girl", "child", "kid", "baby", "toddler", "guy", "lady", "gentleman"),
        *("player", "skier", "snowboarder", "skateboarder", "surfer", "rider", "pedestrian", "crowd"),
    ),
    "bicycle": ("bike",),
    "car": ("automobile", "sedan", "taxi"),
    "motorcycle": ("motorbike", "motor bike", "dirt bike", "moped"),
    "airplane": ("plane", "aeroplane", "aircraft", "airliner", "jet"),
    "train": ("locomotive",),
    "truck": ("pickup", "lorry"),
    "boat": ("ship", "sailboat", "canoe", "kayak", "ferry"),
    "traffic light": ("stoplight", "stop light", "traffic signal"),
    "fire hydrant": ("hydrant",),
    "bird": ("seagull", "duck", "pigeon", "parrot", "owl"),
    "cat": ("kitten",),
    "dog": ("puppy",),
    "horse": ("pony",),
    "sheep": ("lamb",),
    "cow": ("bull", "cattle"),
    "backpack": ("rucksack",),
    "umbrella": ("parasol",),
    "handbag": ("purse",),
    "tie": ("necktie",),
    "suitcase": ("luggage",),
    "skis": ("ski",),
    "sports ball": ("ball", "basketball", "volleyball"),
    "baseball bat": ("bat",),
    "baseball glove": ("mitt",),
    "tennis racket": ("racket", "racquet"),
    "wine glass": ("wineglass",),
    "cup": ("mug",),
    "hot dog": ("hotdog",),
    "donut": ("doughnut",),
    "couch": ("sofa", "loveseat"),
    "potted plant": ("houseplant", "plant"),
    "dining table": ("table",),
    "tv": ("television",),
    "cell phone": ("cellphone", "mobile phone", "phone", "smartphone"),
    "oven": ("stove",),
    "refrigerator": ("fridge",),
    "teddy bear": ("teddy", "stuffed bear"),
    "hair drier": ("hair dryer", "hairdryer", "blow dryer"),
}


def load_coco(
    image_dir: str | Path,
    *,
    captions: str | Path | None = None,
    instances: str | Path | None = None,
    split: str = "",
    max_captions: int | None = 5,
    invalid_boxes: str = "skip",
    check_images: bool = True,
) -> list[Record]:
    """Read the pictures that the files list, with their captions, their objects, or both.

    Args:
        image_dir: folder of the pictures.
        captions: `captions_*.json`. Without it records have no captions.
        instances: `instances_*.json`. Without it records have no objects. A picture without objects is kept.
        split: copied into the records.
        max_captions: keep the first so many captions in the order of the file: some pictures have six or seven, and the
            published numbers use five. None keeps all.
        invalid_boxes: `"skip"` leaves out boxes of no area or outside the picture, with one counted warning
            (boxes are clipped to the picture where they stand out by at most a pixel); `"raise"` stops.
        check_images: look for every picture now, not when it is first opened.

    Returns:
        Records in the order of the file, `image_id` being COCO's id as text.

    Raises:
        DataError: malformed JSON, an annotation of an unknown picture or category, an empty caption, a
            picture without captions (where captions are asked for), the two files disagreeing about a
            picture, a missing picture file.
    """
    files = [path for path in (captions, instances) if path is not None]
    if not files:
        raise ValueError("give captions=, instances= or both")
    check_max_captions(max_captions)
    policy = BoxPolicy(invalid_boxes)
    tables = {path: _index(path) for path in files}
    images: dict = {}
    known: dict = {}
    for path, table in tables.items():
        for image_id, image in table.imgs.items():
            with reading(path, f"image {image_id}"):
                name = check_name(image["file_name"], path, f"image {image_id}")
                entry = name, stated_size(image["width"], image["height"])
                known.setdefault(image_id, known_names(image))
            if images.setdefault(image_id, entry) != entry:
                raise DataError(
                    path,
                    f"image {image_id}",
                    f"is {entry} here but {images[image_id]} in {files[0]}",
                    "Use captions and instances of the same release",
                )
    if not images:
        raise DataError(files[0], "the list `images`", "is empty", "Download the file again")
    records = []
    for image_id, (name, size) in images.items():
        texts = () if captions is None else _captions(tables[captions], image_id, captions)[:max_captions]
        objects = () if instances is None else _objects(tables[instances], image_id, size, instances, policy)
        source = f"{files[0]}: image {image_id}"
        records.append(Record(str(image_id), split, texts, Path(image_dir) / name, size, objects,
                              source=source, known_as=known[image_id]))  # fmt: skip
    policy.report(files[-1])
    require_unique(records, files[0])
    if check_images:
        require_pictures((record.image for record in records), files[0])
        check_sizes(records, lambda _: files[0])
    return records


def categories(instances: str | Path) -> list[str]:
    """Category names in file order."""
    return [category["name"] for category in _index(instances).dataset.get("categories", [])]


def category_ids(instances: str | Path) -> dict[str, int]:
    """Id of each category by name, in file order; COCO's have holes."""
    return {one["name"]: one["id"] for one in _index(instances).dataset.get("categories", [])}


def _index(path: str | Path) -> COCO:
    """A pycocotools index (its prints silenced) over a file whose references all resolve."""
    table = COCO()
    table.dataset = read_json(path)
    with reading(path, "the lists `images` and `annotations`"), contextlib.redirect_stdout(io.StringIO()):
        images, annotations = table.dataset["images"], table.dataset["annotations"]
        table.createIndex()
    with reading(path, "the list `categories`"):
        kinds = [(kind["id"], kind["name"]) for kind in table.dataset.get("categories", [])]
    require_distinct((image["id"] for image in images), path, "image")
    require_distinct((number for number, _ in kinds), path, "category")
    require_distinct((name for _, name in kinds), path, "category")
    for number, annotation in enumerate(annotations):
        with reading(path, f"annotation number {number}"):
            name, image_id = f"annotation {annotation['id']}", annotation["image_id"]
        if image_id not in table.imgs:
            raise DataError(
                path,
                name,
                f"refers to image {image_id}, which the file does not list",
                "Add the image or remove the annotation",
            )
    require_distinct((annotation["id"] for annotation in annotations), path, "annotation")
    return table


def _captions(table: COCO, image_id: int | str, path: str | Path) -> tuple[str, ...]:
    found = []
    for annotation in table.imgToAnns.get(image_id, ()):
        name = f"image {image_id}, caption {annotation['id']}"
        with reading(path, name):
            found.append(clean_caption(annotation["caption"], path, name))
    if not found:
        raise DataError(
            path, f"image {image_id}", "has no captions", "Remove the image, or load without captions"
        )
    return tuple(found)


def _objects(
    table: COCO, image_id: int | str, size: tuple[int, int], path, policy: BoxPolicy
) -> tuple[Object, ...]:
    found = []
    for annotation in table.imgToAnns.get(image_id, ()):
        name = f"image {image_id}, annotation {annotation['id']}"
        with reading(path, name):
            category = table.cats.get(annotation["category_id"])
            if category is None:
                raise DataError(
                    path,
                    name,
                    f"refers to category {annotation['category_id']}, which is not listed",
                    "Add the category or remove the annotation",
                )
            crowd = flag(annotation.get("iscrowd", 0))
            if (box := policy.check(annotation["bbox"], size, path, name)) is not None:
                found.append(Object(box, category["name"], crowd))
    return tuple(found)
