"""Stand-ins for what a run at the paper's scale needs: small sets in published formats, networks of random weights.

`write_data` writes a few pictures of a named dataset in its own files and folders, which the loaders read;
`write_network` writes a network of the published architecture and of random weights, which `from_pretrained`, timm or a
detector's loader opens. Numbers of such runs mean nothing: they show that a run starts, and what it costs.

The pictures are those of `scenes`, drawn larger and set into a wider picture: captions are English sentences, boxes and
phrases are true. Region features are random.
"""

from __future__ import annotations

import json
import os
import shutil
import string
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from finematch.data.checks import read_json
from finematch.data.images import open_rgb
from finematch.features import detreg
from finematch.files import DataError
from finematch.scenes import generator
from finematch.scenes.language import vocabulary

SIZE = (640, 480)  # width and height of most pictures of COCO
REGIONS = (36, 2048)  # a picture, and the width of each: bottom-up attention's
DATASETS = ("flickr8k", "flickr30k", "coco_karpathy", "coco", "coco2014", "visual_genome")


# ------------------------------------------------------------------------------------------- data
def write_data(
    dataset: str,
    root: str | Path,
    *,
    images: int,
    seed: int = 0,
    size: tuple[int, int] = SIZE,
    captions: int = 5,
) -> Path:
    """Write a small set in the format and under the names that `finematch.data.load` reads.

    Beside the set itself: Entities' phrases and boxes (`flickr8k`, `flickr30k`), region features in SCAN's layout
    (these and `coco_karpathy`; without boxes, as published), COCO's instances (all of COCO), BERT's vocabulary, and
    what SLAN's tasks read: VQAv2 (`coco_karpathy`), NLVR2 and MSR-VTT.

    Args:
        dataset: one of `DATASETS`.
        root: the data root: folder above the set's own.
        images: pictures of each split; Karpathy's COCO has as many in restval, too.
        size: width and height of the pictures in pixels.
        captions: of each training picture, for a shorter epoch; region features have five whatever it is.

    Returns:
        `root`. A set that was written with the same arguments is left as it is.

    Raises:
        DataError: an unknown dataset, or a folder that holds anything else.
    """
    root = Path(root)
    if dataset not in DATASETS:
        raise DataError("(no file)", f"dataset {dataset!r}", "has no stand-in", f"Choose one of {DATASETS}")
    note = root / f"standin_{dataset}.json"
    wanted = {"images": images, "seed": seed, "size": list(size), "captions": captions, "tasks": 1}
    if note.exists() and read_json(note) == wanted:
        return root
    year = {"coco": "2017", "coco2014": "2014", "coco_karpathy": "2014"}.get(dataset, "")
    new = [root / "coco" / f"train{year}" if year else root / dataset]
    if taken := [path for path in (*new, note) if path.exists()]:
        raise DataError(taken[0], "the folder", "is there already", "Write stand-ins into an empty folder")
    pictures = {split: _drawn(seed, split, images, size) for split in generator.SPLITS}
    if dataset in ("flickr8k", "flickr30k", "coco_karpathy"):
        folder = {"flickr30k": "f30k", "coco_karpathy": "coco"}.get(dataset, dataset)
        _precomp(root / f"{folder}_precomp", pictures, seed, whole_test=dataset == "coco_karpathy")
    rest = _drawn(seed, "val", images, size, first=images) if dataset == "coco_karpathy" else []
    for picture in pictures["train"] + rest:
        picture["captions"] = picture["captions"][:captions]
    if dataset == "visual_genome":
        _visual_genome(root / dataset, pictures["train"], size)
    elif year:
        _coco(root / "coco", year, pictures, rest, size, karpathy=dataset == "coco_karpathy")
    else:
        _flickr(root, dataset, pictures, size)
    if dataset == "coco_karpathy":
        for split, part in (("train", pictures["train"]), ("val", pictures["val"])):
            _vqav2(root / "vqav2", f"{split}2014", part)
    _nlvr2(root / "nlvr2", pictures)
    _msrvtt(root / "msrvtt", pictures["test"])
    (root / "vocab").mkdir(exist_ok=True)
    (root / "vocab" / "bert-base-uncased-vocab.txt").write_text("\n".join(bert_vocabulary()) + "\n")
    note.write_text(json.dumps(wanted))
    return root


def write_boxes(root: str | Path, *, count: int = 40, seed: int = 0) -> Path:
    """A detector's boxes, `count` random ones for each image below `root`, in COCO's results format."""
    rng, found = np.random.default_rng(seed), []
    for file in sorted({path.stem: path for path in Path(root).rglob("*.jpg")}.values()):
        size = np.array(open_rgb(file).size)
        for corner, side, score in zip(
            rng.uniform(0, 0.5, (count, 2)),
            rng.uniform(0.1, 0.5, (count, 2)),
            rng.uniform(size=count),
            strict=True,
        ):
            box = [round(float(v), 2) for v in (*corner * size, *side * size)]
            found.append(
                {"image_id": file.stem, "category_id": 1, "bbox": box, "score": round(float(score), 3)}
            )
    (out := Path(root) / "boxes.json").write_text(json.dumps(found))
    return out


def _drawn(seed: int, split: str, count: int, size: tuple[int, int], first: int = 0) -> list[dict]:
    """Truths of pictures (`generator.picture_of`) with their pixels under `pixels`, boxes in the whole picture."""
    side = min(size)
    left, top = ((length - side) // 2 for length in size)
    found = []
    for index in range(first, first + count):
        picture = generator.picture_of(seed, split, index, side)
        canvas = Image.new("RGB", size, (128, 128, 128))
        canvas.paste(generator.draw_picture(seed, picture, side), (left, top))
        for thing in picture["objects"]:
            thing["box"] = [v + shift for v, shift in zip(thing["box"], (left, top, left, top), strict=True)]
        found.append(picture | {"pixels": canvas, "filename": f"{generator.number(picture)}.jpg"})
    return found


def _save(pictures: list[dict], folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for picture in pictures:
        picture["pixels"].save(folder / picture["filename"])


def _flickr(root: Path, dataset: str, pictures: dict[str, list[dict]], size: tuple[int, int]) -> None:
    """Karpathy's file, and Entities' lists, sentences and boxes with pictures of their own."""
    everything = [picture for split in pictures.values() for picture in split]
    entities = root / f"{dataset}_entities"
    for folder in (root / dataset / "images", entities / "images"):
        _save(everything, folder)
    entries = {"images": generator.karpathy_entries(everything), "dataset": dataset}
    (root / dataset / f"dataset_{dataset}.json").write_text(json.dumps(entries))
    for folder in ("Sentences", "Annotations"):
        (entities / folder).mkdir()
    for split, part in pictures.items():
        stems = [Path(picture["filename"]).stem for picture in part]
        (entities / f"{split}.txt").write_text("".join(f"{stem}\n" for stem in stems))
        for stem, picture in zip(stems, part, strict=True):
            (entities / "Sentences" / f"{stem}.txt").write_text(generator.entities_sentences(picture))
            xml = generator.entities_annotation(picture, *size)
            (entities / "Annotations" / f"{stem}.xml").write_text(xml)


def _coco(folder: Path, year: str, pictures: dict[str, list[dict]], rest: list[dict], size: tuple[int, int], *,
          karpathy: bool) -> None:  # fmt: skip
    """Captions and instances of a year, train and val; with `karpathy` his file, whose val, test and restval lie in
    COCO's val."""
    parts = {
        "train": pictures["train"],
        "val": pictures["val"] + (rest + pictures["test"] if karpathy else []),
    }
    (folder / "annotations").mkdir(parents=True, exist_ok=True)
    for split, part in parts.items():
        for picture in part:
            stem = f"{generator.number(picture):012d}"
            picture["filename"] = f"COCO_{split}2014_{stem}.jpg" if year == "2014" else f"{stem}.jpg"
        _save(part, folder / f"{split}{year}")
        for kind, content in zip(("captions", "instances"), generator.coco_lists(part, *size), strict=True):
            (folder / "annotations" / f"{kind}_{split}{year}.json").write_text(json.dumps(content))
    if not karpathy:
        return
    ordered = [*parts["train"], *parts["val"]]
    entries = generator.karpathy_entries(ordered)
    for entry, picture in zip(entries, ordered, strict=True):
        entry["filepath"] = "train2014" if picture["split"] == "train" else "val2014"
        entry["cocoid"] = generator.number(picture)
        if picture in rest:
            entry["split"] = "restval"
    (folder / "dataset_coco.json").write_text(json.dumps({"images": entries, "dataset": "coco"}))


def _precomp(folder: Path, pictures: dict[str, list[dict]], seed: int, *, whole_test: bool) -> None:
    """SCAN's files as published: train has a row a picture, dev and test one a caption."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(seed)
    files = {"train": ["train"], "val": ["dev"], "test": ["test", "testall"] if whole_test else ["test"]}
    for split, names in files.items():
        part, rows = pictures[split], 1 if split == "train" else 5
        features = np.abs(rng.standard_normal((len(part), *REGIONS), np.float32)).repeat(rows, 0)
        captions = [caption["text"] for picture in part for caption in picture["captions"]]
        ids = [str(generator.number(picture)) for picture in part for _ in range(rows)]
        for name in names:
            np.save(folder / f"{name}_ims.npy", features)
            for ending, lines in (("caps", captions), ("ids", ids)):
                (folder / f"{name}_{ending}.txt").write_text("".join(f"{line}\n" for line in lines))


def _visual_genome(folder: Path, pictures: list[dict], size: tuple[int, int]) -> None:
    """Each object is a described region; every second picture says which one of COCO's it is."""
    data, regions = [], []
    for index, picture in enumerate(pictures):
        image_id, part = generator.number(picture), ("VG_100K", "VG_100K_2")[index % 2]
        picture["filename"] = f"{image_id}.jpg"
        _save([picture], folder / part)
        data.append({
            "image_id": image_id, "width": size[0], "height": size[1], "flickr_id": None,
            "coco_id": image_id if index % 2 else None,
            "url": f"https://example.org/rak248/{part}/{image_id}.jpg",
        })  # fmt: skip
        described = []
        for thing in picture["objects"]:
            x1, y1, x2, y2 = thing["box"]
            described.append({
                "region_id": 100 * image_id + len(described), "image_id": image_id, "x": x1, "y": y1,
                "width": x2 - x1, "height": y2 - y1,
                "phrase": " ".join(thing[key] for key in ("size", "colour", "texture", "shape")),
            })  # fmt: skip
        regions.append({"id": image_id, "regions": described})
    (folder / "image_data.json").write_text(json.dumps(data))
    (folder / "region_descriptions.json").write_text(json.dumps(regions))


def _vqav2(folder: Path, part: str, pictures: list[dict]) -> None:
    """How many things each picture shows; nine of ten people have counted right."""
    folder.mkdir(exist_ok=True)
    questions, answers = [], []
    for picture in pictures:
        image_id, count = generator.number(picture), len(picture["objects"])
        both = {"question_id": 10 * image_id, "image_id": image_id}
        questions.append(both | {"question": "how many things are there?"})
        people = [{"answer": str(count + (k == 9)), "answer_id": k + 1} for k in range(10)]
        answers.append(both | {"answers": people, "question_type": "how many", "answer_type": "number"})
    for name, key, content in (
        (f"v2_OpenEnded_mscoco_{part}_questions.json", "questions", questions),
        (f"v2_mscoco_{part}_annotations.json", "annotations", answers),
    ):
        (folder / name).write_text(json.dumps({key: content}))


def _nlvr2(folder: Path, pictures: dict[str, list[dict]]) -> None:
    """Each picture beside itself (true) and beside the next one (false)."""
    for split, name in (("train", "train"), ("val", "dev"), ("test", "test1")):
        images, lines, part = folder / "images" / name, [], pictures[split]
        images.mkdir(parents=True, exist_ok=True)
        for k, picture in enumerate(part):
            for pair, right in enumerate((picture, part[(k + 1) % len(part)])):
                for side, one in enumerate((picture, right)):
                    one["pixels"].save(images / f"{name}-{k}-{pair}-img{side}.png")
                lines.append({"identifier": f"{name}-{k}-{pair}-0", "label": str(pair == 0),
                              "sentence": "both pictures show the same things"})  # fmt: skip
        (folder / f"{name}.json").write_text("".join(f"{json.dumps(line)}\n" for line in lines))


def _msrvtt(folder: Path, pictures: list[dict]) -> None:
    """Ten frames of each picture that moves to the left, as a folder."""
    (folder / "videos").mkdir(parents=True, exist_ok=True)
    rows = ["key,vid_key,video_id,sentence"]
    for k, picture in enumerate(pictures):
        (frames := folder / "videos" / f"video{k}").mkdir(exist_ok=True)
        for n in range(10):
            Image.fromarray(np.roll(np.asarray(picture["pixels"]), -8 * n, 1)).save(frames / f"{n}.jpg")
        rows.append(f'ret{k},msr{k},video{k},"{picture["captions"][0]["text"]}"')
    (folder / "MSRVTT_JSFUSION_test.csv").write_text("\n".join(rows) + "\n")


def bert_vocabulary(size: int = 30522) -> list[str]:
    """As many entries as BERT's uncased vocabulary, special tokens at its ids: characters, words of `scenes`, fillers.

    Every text of ASCII characters has tokens. A `size` below 100 + the words of `scenes` is what these take.
    """
    first = ["[PAD]", *(f"[unused{i}]" for i in range(99)), "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    characters = string.ascii_lowercase + string.digits
    words = [*characters, *string.punctuation, *(f"##{c}" for c in characters)]
    known = list(dict.fromkeys([*first, *words, *map(str.lower, vocabulary())]))
    return known + [f"[filler{i}]" for i in range(size - len(known))]


# ------------------------------------------------------------------------------------------- networks
def write_network(kind: str, folder: str | Path, seed: int = 0, *, tiny: bool = False) -> Path:
    """Write a network with random weights, where it is not there yet, and say what a setting names to open it.

    Args:
        kind: `bert-base`, `clip-vit-b-16`, `clip-vit-b-32`, `clip-vit-l-14`, `blip-itm-base`, `blip2-itm-vit-g` (1.2
            billion parameters, written in bf16: 2.4 GB): folders with tokenizer and image processor; `detreg-r50`,
            `faster-rcnn-r50`: detectors' checkpoints; `timm/<name>`: a network of timm.
        folder: of the network alone.
        tiny: the same classes, two layers of width 32 (not for timm and the detectors).

    Returns:
        The folder, or for checkpoints and timm the file in it.

    Raises:
        ValueError: an unknown kind, or a tiny one that there is not.
    """
    folder = Path(folder)
    is_file = kind.startswith("timm/") or kind in _CHECKPOINTS
    if not is_file and kind not in _FOLDERS:
        raise ValueError(f"{kind!r} has no stand-in; use one of {(*_FOLDERS, *_CHECKPOINTS, 'timm/<name>')}")
    if is_file and tiny:
        raise ValueError(f"{kind!r} has no tiny stand-in")
    name = "checkpoint.pth" if kind in _CHECKPOINTS else "model.safetensors"
    target = folder / name if is_file else folder
    if target.exists():
        return target
    part = folder.with_name(f".{folder.name}.{os.getpid()}.part")
    part.mkdir(parents=True)
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            if kind.startswith("timm/"):
                save_file(_timm(kind.removeprefix("timm/")), part / name)
            elif is_file:
                torch.save(_CHECKPOINTS[kind](), part / name)
            else:
                for piece in _FOLDERS[kind](tiny):
                    piece.save_pretrained(part)
        if not target.exists():
            part.rename(folder)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return target


def write_hub(folder: str | Path, *, tiny: bool = False, only: tuple[str, ...] = ()) -> Path:
    """A cache of the hub with stand-ins for the networks that runs name (`HUB`): `HF_HUB_CACHE` names it.

    With it and `HF_HUB_OFFLINE=1` a hub's name opens the stand-in, so that a run needs no setting changed.
    What `only` does not name is not written, and cannot be opened.
    """
    folder = Path(folder)
    for name in only or HUB:
        where = folder / f"models--{name.replace('/', '--')}"
        write_network(HUB[name], where / "snapshots" / "standin", tiny=tiny and not name.startswith("timm/"))
        (where / "refs").mkdir(exist_ok=True)
        (where / "refs" / "main").write_text("standin")
    return folder


_TINY = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}


def _words():
    from transformers import BertTokenizerFast

    return BertTokenizerFast(vocab={word: i for i, word in enumerate(bert_vocabulary())}, do_lower_case=True)


def _bert(tiny: bool) -> list:
    from transformers import BertConfig, BertModel

    return [BertModel(BertConfig(**_TINY if tiny else {})), _words()]


def _clip(patch: int, tiny: bool, large: bool = False) -> list:
    """OpenAI's CLIP: ViT-B beside a text tower of width 512, or ViT-L beside one of 768."""
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPTokenizer

    characters = [chr(c) for c in range(33, 127)]
    merged = [*characters, *(f"{c}</w>" for c in characters)]
    words = [
        *merged,
        *(f"<|filler{i}|>" for i in range(49406 - len(merged))),
        "<|startoftext|>",
        "<|endoftext|>",
    ]
    tokenizer = CLIPTokenizer(vocab={word: i for i, word in enumerate(words)}, merges=[])
    tokenizer.model_max_length = 77
    text = {"bos_token_id": 49406, "eos_token_id": 49407, "projection_dim": 512}
    vision = {"patch_size": patch, "projection_dim": 512}
    if large:
        text |= {
            "hidden_size": 768,
            "intermediate_size": 3072,
            "num_attention_heads": 12,
            "projection_dim": 768,
        }
        vision |= {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24,
                   "num_attention_heads": 16, "projection_dim": 768}  # fmt: skip
    if tiny:
        text, vision = text | _TINY, vision | _TINY | {"patch_size": 32}
    config = CLIPConfig(text_config=text, vision_config=vision, projection_dim=text["projection_dim"])
    return [CLIPModel(config), tokenizer, CLIPImageProcessor()]


def _blip(tiny: bool) -> list:
    from transformers import BlipConfig, BlipForImageTextRetrieval, BlipImageProcessor

    text = {"num_attention_heads": 12, "encoder_hidden_size": 768}
    vision = {"image_size": 384}
    if tiny:
        text, vision = _TINY | {"encoder_hidden_size": 32}, _TINY | {"image_size": 64}
    model = BlipForImageTextRetrieval(BlipConfig(text_config=text, vision_config=vision))
    side = vision["image_size"]
    return [model, _words(), BlipImageProcessor(size={"height": side, "width": side})]


def _blip2(tiny: bool) -> list:
    from transformers import (
        Blip2Config,
        Blip2ForImageTextRetrieval,
        Blip2QFormerConfig,
        Blip2VisionConfig,
        BlipImageProcessor,
    )

    reads = {"vocab_size": 30523, "use_qformer_text_input": True}
    sees = {"initializer_range": 0.02}  # transformers' own 1e-10 would make every picture the same
    if tiny:
        reads, sees = reads | _TINY | {"encoder_hidden_size": 32}, sees | _TINY | {"image_size": 56}
    vision = Blip2VisionConfig(**sees)
    config = Blip2Config(vision_config=vision, qformer_config=Blip2QFormerConfig(**reads), num_query_tokens=32,
                         image_text_hidden_size=256)  # fmt: skip
    model = Blip2ForImageTextRetrieval(config)
    side = vision.image_size
    return [model.bfloat16(), _words(), BlipImageProcessor(size={"height": side, "width": side})]


def _timm(name: str) -> dict[str, torch.Tensor]:
    import timm

    return {key: value.contiguous() for key, value in timm.create_model(name).state_dict().items()}


def _faster_rcnn() -> dict[str, torch.Tensor]:
    from torchvision.models.detection import fasterrcnn_resnet50_fpn

    return fasterrcnn_resnet50_fpn(weights=None, weights_backbone=None).state_dict()


def _detreg(layers: int = 6) -> dict:
    """DETReg's parameters in its own names: those of transformers' published files, renamed and stacked backwards."""
    from transformers import DeformableDetrConfig, DeformableDetrForObjectDetection, TimmBackboneConfig

    below = TimmBackboneConfig(
        backbone="resnet50", out_indices=[2, 3, 4], features_only=True, use_pretrained_backbone=False
    )
    config = DeformableDetrConfig(backbone_config=below, num_queries=300, num_labels=2)
    with TemporaryDirectory() as folder:
        DeformableDetrForObjectDetection(config).save_pretrained(folder)
        published = load_file(Path(folder) / "model.safetensors")
    others = sorted(detreg.OTHERS.items(), key=lambda pair: -len(pair[1]))
    state, stacked = {}, {}
    for name, value in published.items():
        part, _, inner = name.removeprefix("model.").partition(".layers.")
        if part in ("encoder", "decoder"):
            known = detreg.ENCODER if part == "encoder" else detreg.DECODER
            layer, module, rest = inner.split(".", 2)
            module = {new: old for old, new in known.items()}[module]
            prefix = f"transformer.{part}.layers.{layer}.{module}"
            if module == "self_attn" and rest[:7] in ("q_proj.", "k_proj.", "v_proj."):
                stacked.setdefault(f"{prefix}.in_proj_{rest[7:]}", {})[rest[0]] = value
                continue
            state[f"{prefix}.{rest}"] = value
            continue
        old, new = next(pair for pair in others if name.startswith(pair[1]))
        state[old + name.removeprefix(new)] = value
    for name, parts in stacked.items():
        state[name] = torch.cat([parts[one] for one in "qkv"])
    for i in range(1, layers):  # the heads of all layers are one, which DETReg writes for each
        state |= {k.replace("_embed.0.", f"_embed.{i}."): v for k, v in state.items() if "_embed.0." in k}
    return {"model": state}


_FOLDERS = {
    "bert-base": _bert,
    "clip-vit-b-16": lambda tiny: _clip(16, tiny),
    "clip-vit-b-32": lambda tiny: _clip(32, tiny),
    "clip-vit-l-14": lambda tiny: _clip(14, tiny, large=True),
    "blip-itm-base": _blip,
    "blip2-itm-vit-g": _blip2,
}
HUB = {
    "bert-base-uncased": "bert-base",
    "openai/clip-vit-base-patch16": "clip-vit-b-16",
    "openai/clip-vit-base-patch32": "clip-vit-b-32",
    "Salesforce/blip-itm-base-flickr": "blip-itm-base",
    "Salesforce/blip2-itm-vit-g": "blip2-itm-vit-g",
    "timm/vit_base_patch16_224.augreg2_in21k_ft_in1k": "timm/vit_base_patch16_224",
}
_CHECKPOINTS = {"faster-rcnn-r50": _faster_rcnn, "detreg-r50": _detreg}
