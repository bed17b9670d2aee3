"""Fragments and what a frozen vision-language model makes of them: crops, keywords, whole pictures, whole texts.

FELGA 3.2.1-3.2.2 (Eq. 2). Features are made once, block by block, into memory-mapped rows that are keyed by what
made them: the model's weights, its preprocessing, the boxes or the texts. A model is anything that embeds crops and
texts (`VisionLanguageModel`): the published CLIP, BLIP and BLIP-2, a small CLIP that a notebook trained, or a CLIP
that reads the feature map of a frozen backbone.

Axes: `n` pictures or texts, `m` fragments of the fullest of them, `u` distinct fragments, `r` crops, `k` texts,
`q` queries of BLIP-2, `d` width, `s` cells along a side.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from PIL import Image
from torch import Tensor

from finematch.boxes import roi_align
from finematch.data.record import DataError, Record, digests
from finematch.encoders import open_vision_language
from finematch.features.backbones import Backbone, fingerprint, open_backbone
from finematch.features.blockwise import write_rows
from finematch.features.proposals import Proposals
from finematch.files import cached, digest, write_text
from finematch.scenes.language import GrammarNouns
from finematch.text import KeywordMethod, Keywords, Nouns, TaggedNouns

# What FELGA's three models are on the hub: its CLIP is ViT-B/32 (512-d), and none was fine-tuned on COCO. BLIP's
# retrieval model without any fine-tuning is not there; this one was fine-tuned on Flickr30k.
PUBLISHED = {
    "clip": "openai/clip-vit-base-patch32",
    "blip": "Salesforce/blip-itm-base-flickr",
    "blip2": "Salesforce/blip2-itm-vit-g",
}

ARITHMETIC = {"no": None, "bf16": torch.bfloat16, "fp16": torch.float16}
PROMPTS = {"name": "{}", "photo": "a photo of a {}"}  # around a class name (register F21)
BLOCK = {"crops": 32, "texts": 256}  # pictures, or texts, whose rows are made and written at once

Echo = Callable[[str], None] | None


# ------------------------------------------------------------------------------------------- models
@runtime_checkable
class VisionLanguageModel(Protocol):
    """A frozen model with one space for pictures and texts; `key` is all that makes its features."""

    key: dict

    def embed_crops(
        self, pictures: list[Image.Image], boxes: list[Float[np.ndarray, "_ 4"]]
    ) -> Float[Tensor, "r d"]:
        """Unit vectors of the boxes (xyxy pixels) of each picture, picture by picture."""
        ...

    def embed_texts(self, texts: list[str]) -> Float[Tensor, "k d"]:
        """Unit vectors of texts."""
        ...


class VLP:
    """CLIP, BLIP or BLIP-2 by hub name or folder; crops go through the model's own image processor.

    A crop is the box, clamped and rounded outwards to whole pixels, without a margin. What becomes of its shape is
    the processor's business: CLIP resizes the shorter side and cuts the centre, BLIP squashes (register F17).

    Args:
        model: as `PUBLISHED` has them, or a folder with the model, its tokenizer and its image processor.
        precision: `"no"` (fp32), `"bf16"` or `"fp16"`, the arithmetic of the forward pass; weights stay fp32.
        batch: crops or texts a forward pass.

    Raises:
        ValueError: For another kind of model, one that lacks weights, or an unknown precision.
    """

    def __init__(self, model: str | Path, *, precision: str = "no", batch: int = 128):
        from transformers import AutoTokenizer

        if precision not in ARITHMETIC:
            raise ValueError(f"precision is {precision!r}; use one of {', '.join(map(repr, ARITHMETIC))}")
        self.net, self.precision, self.batch = open_vision_language(model), precision, batch
        self.tokenizer = AutoTokenizer.from_pretrained(str(model))
        self.key = {
            "model": self.net.net.config.model_type,
            "weights": fingerprint(self.net),
            "tokenizer": digest(self.tokenizer.backend_tokenizer.to_str()),
            "precision": precision,
            **self._open_pictures(model),
        }

    def _open_pictures(self, model: str | Path) -> dict:
        """Open what makes crops, and say what it is."""
        from transformers import AutoImageProcessor

        channels = getattr(self.net.net.config.vision_config, "num_channels", 3)  # BLIP does not say
        if channels != 3:
            raise ValueError(
                f"{model} reads feature maps of {channels} channels, no pixels: open it as CellVLP, with its backbone"
            )
        self.processor = AutoImageProcessor.from_pretrained(str(model))
        # the class is named by the library and its release, what it does by the rest
        stated = {k: v for k, v in self.processor.to_dict().items() if "processor" not in k}
        return {"processor": digest(json.loads(json.dumps(stated, default=str)))}

    @property
    def queries(self) -> int:
        """Vectors that the model has of a crop: 1, or as many as BLIP-2 has queries."""
        return getattr(self.net.net.config, "num_query_tokens", 1)

    @property
    def device(self) -> torch.device:
        return next(self.net.parameters()).device

    def to(self, device: torch.device | str) -> VLP:
        """The same model on another device."""
        self.net.to(device)
        return self

    def pixels(
        self, pictures: list[Image.Image], boxes: list[Float[np.ndarray, "_ 4"]]
    ) -> Iterator[Float[Tensor, "_ c height width"]]:
        """What the image tower sees of the crops, a batch at a time."""
        flat = [(p, box) for p, mine in zip(pictures, boxes, strict=True) for box in mine]
        for i in range(0, len(flat), self.batch):
            crops = [cut(p, box) for p, box in flat[i : i + self.batch]]
            yield self.processor(images=crops, return_tensors="pt")["pixel_values"]

    @torch.no_grad()
    def embed_queries(
        self, pictures: list[Image.Image], boxes: list[Float[np.ndarray, "_ 4"]]
    ) -> Float[Tensor, "r q d"]:
        """All the unit vectors that the model has of each crop: one, or as many as BLIP-2 has queries."""
        found = []
        for pixels in self.pixels(pictures, boxes):
            with self._arithmetic():
                found.append(self.net.image(pixels.to(self.device)))
        if not found:
            raise ValueError("there are no boxes to embed")
        return torch.cat(found)

    def embed_crops(
        self, pictures: list[Image.Image], boxes: list[Float[np.ndarray, "_ 4"]]
    ) -> Float[Tensor, "r d"]:
        """One unit vector a crop; of BLIP-2 the mean of its queries' unit vectors, made unit again (register F16)."""
        return F.normalize(self.embed_queries(pictures, boxes).mean(1), dim=-1)

    @torch.no_grad()
    def embed_texts(self, texts: list[str]) -> Float[Tensor, "k d"]:
        """One unit vector a text; a text that is longer than the model has positions is cut.

        Raises:
            ValueError: For a text of which the tokenizer knows no word, or no texts.
        """
        found = []
        for i in range(0, len(texts), self.batch):
            part = texts[i : i + self.batch]
            tokens = self.tokenizer(
                part, padding=True, truncation=True, max_length=self.net.positions, return_tensors="pt",
                return_special_tokens_mask=True,
            ).to(self.device)  # fmt: skip
            known = (tokens["input_ids"] != self.tokenizer.unk_token_id) & ~tokens[
                "special_tokens_mask"
            ].bool()
            if not known.any(1).all():
                raise ValueError(
                    f"{part[int(known.any(1).int().argmin())]!r} has no word that the model's tokenizer knows: "
                    "take a model that was trained on such texts"
                )
            with self._arithmetic():
                found.append(self.net.text(tokens["input_ids"], tokens["attention_mask"]))
        if not found:
            raise ValueError("there are no texts to embed")
        return torch.cat(found)

    def _arithmetic(self) -> torch.autocast:
        kind = ARITHMETIC[self.precision]
        return torch.autocast(self.device.type, kind or torch.bfloat16, enabled=kind is not None)


class CellVLP(VLP):
    """A CLIP whose "pixels" are cells of a frozen backbone's feature map, RoI-aligned to the crop.

    The backbone sees a picture once, however many boxes it has. The CLIP is an ordinary CLIPModel with
    `vision_config.num_channels` the backbone's width, `patch_size` 1 and `image_size` the cells along a side.
    """

    def __init__(self, model: str | Path, backbone: Backbone, *, precision: str = "no", batch: int = 128):
        self.backbone = backbone
        super().__init__(model, precision=precision, batch=batch)

    def _open_pictures(self, model: str | Path) -> dict:
        config = self.net.net.config.vision_config
        self.side, probe = config.image_size, Image.new("RGB", (self.backbone.size,) * 2)
        width = self.backbone([probe]).shape[1]
        if (config.num_channels, config.patch_size) != (width, 1):
            raise ValueError(
                f"{model} reads patches of {config.patch_size} with {config.num_channels} channels, the backbone gives "
                f"cells of {width}: train it on maps of this backbone, with patch_size 1"
            )
        return {"backbone": self.backbone.key}

    def to(self, device: torch.device | str) -> CellVLP:
        """The same model and its backbone on another device."""
        self.backbone.net.to(device)
        return super().to(device)

    def pixels(
        self, pictures: list[Image.Image], boxes: list[Float[np.ndarray, "_ 4"]]
    ) -> Iterator[Float[Tensor, "_ c height width"]]:
        """The cells of the crops, a batch at a time; the pictures go through the backbone all at once."""
        if sum(map(len, boxes)):
            yield from crop_maps(self.backbone, pictures, boxes, self.side).split(self.batch)


def open_vlp(name: str | Path, *, precision: str = "no") -> VLP:
    """A frozen vision-language model: `clip`, `blip` or `blip2` (the published ones), a hub name, or a folder.

    The folder of `small_clip.train_small_clip` is opened with the backbone beside it. `precision` as of `VLP`.
    """
    if (Path(name) / "cells.json").is_file():
        return CellVLP(name, open_backbone(name), precision=precision)
    return VLP(PUBLISHED.get(str(name), name), precision=precision)


def crop_maps(
    backbone: Backbone, pictures: list[Image.Image], boxes: list[Float[np.ndarray, "_ 4"]], side: int
) -> Float[Tensor, "r d s s"]:
    """The part of each picture's feature map under each of its boxes (xyxy pixels), as `side` x `side` cells.

    RoI-align, aligned, 2 samples a cell and axis: what a `CellVLP` reads, and is trained on.
    """
    maps = backbone(pictures)
    h, w = maps.shape[2:]
    scaled = []
    for picture, mine in zip(pictures, boxes, strict=True):
        scale = torch.tensor([w / picture.width, h / picture.height] * 2, dtype=torch.float32)
        scaled.append((torch.from_numpy(np.asarray(mine, np.float32)) * scale).to(maps))
    return roi_align(maps, scaled, side)


def cut(picture: Image.Image, box: Float[np.ndarray, "4"]) -> Image.Image:
    """The part of a picture under a box in xyxy pixels: clamped, its edges rounded outwards.

    Raises:
        ValueError: For a box that has no area on the picture.
    """
    x1, y1 = (max(0, int(np.floor(v))) for v in box[:2])
    x2, y2 = (
        min(side, int(np.ceil(v))) for v, side in zip(box[2:], (picture.width, picture.height), strict=True)
    )
    if x2 <= x1 or y2 <= y1:
        raise ValueError(f"box {box.tolist()} has no area on a {picture.width} x {picture.height} picture")
    return picture.crop((x1, y1, x2, y2))


# ------------------------------------------------------------------------------------------- what is made
@dataclass(frozen=True, eq=False)
class Fragments:
    """Fragments of every picture or text: fragment j of item i is row `index[i, j]` of `features`, where `mask[i, j]`.

    A keyword that many texts have is one row, so `index` also says which keywords are equal. An item may have no
    fragment at all. A fragment is one vector, or all `q` of BLIP-2's.
    """

    features: Float[np.ndarray, "u d"] | Float[np.ndarray, "u q d"]  # unit vectors, memory-mapped
    index: Int[np.ndarray, "n m"]  # 0 where there is no fragment
    mask: Bool[np.ndarray, "n m"]
    texts: list[str] | None = None  # what the rows of texts say
    meta: dict = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.index)

    def dense(self, items: Sequence[int] | slice = slice(None)) -> tuple[Tensor, Tensor]:
        """Features "n m d" or "n m q d", in the precision they are kept in, zeros where there is none; their mask."""
        index, mask = self.index[items], self.mask[items]
        features = np.asarray(self.features[index])
        features[~mask] = 0
        return torch.from_numpy(features), torch.from_numpy(np.ascontiguousarray(mask))


def provenance(vlp: VLP, proposals: Proposals, keywords: KeywordMethod) -> dict[str, str]:
    """What made a run's features: the kind and the weights of each network; "" for a method without weights."""
    return {
        "vlp_kind": vlp.key["model"],
        "vlp_weights": vlp.key["weights"][:8],
        "vlp_arithmetic": vlp.precision,
        "vlp_cells": str(vlp.key.get("backbone", {}).get("weights", ""))[:8],
        "proposals_by": proposals.meta["proposals"],
        "proposals_weights": str(proposals.meta.get("weights", ""))[:8],
        "keywords_by": keywords.key["keywords"],
        "keywords_weights": str(keywords.key.get("weights", ""))[:8],
    }


def document(record: Record) -> str:
    """A picture's text: its captions, joined by a space (FELGA 4.3)."""
    return " ".join(record.captions)


def text_records(records: list[Record], text: str = "joined") -> tuple[list[Record], list[int] | None]:
    """A record for each text, and the image of each: by position, None where text n is that of image n (register F20).

    Args:
        text: `joined`, the captions of an image are one text; or `captions`, each is a text.
    """
    if text == "joined":
        return records, None
    if text != "captions":
        raise ValueError(f"text is {text!r}; use 'joined' or 'captions'")
    each = [(i, replace(r, captions=(caption,))) for i, r in enumerate(records) for caption in r.captions]
    return [record for _, record in each], [i for i, _ in each]


def noun_finder(dataset: str) -> Nouns:
    """Who finds the nouns of a dataset's captions: the grammar that made them, or a tagger (F25)."""
    return GrammarNouns() if dataset.startswith("scenes") else TaggedNouns()


def extract_keywords(
    texts: list[str],
    method: KeywordMethod,
    cache: str | Path,
    split: str,
    *,
    block: int = 500,
    echo: Echo = print,
) -> list[Keywords]:
    """The keywords of every text by `method` (see `text.keyword_method`), read back where they were found before.

    They are found in the cache by the method's `key` and the texts, and written every `block` texts: work that was
    broken off goes on from there. `split` is what messages call the texts.
    """

    def make(folder: Path) -> None:
        path = folder / "keywords.json"
        found = json.loads(path.read_text(encoding="utf-8")) if path.exists() else []
        while len(found) < len(texts) or not path.exists():
            found += [method(text) for text in texts[len(found) : len(found) + block]]
            write_text(path, json.dumps(found, ensure_ascii=False))
            if echo:
                echo(f"{split}: keywords of {len(found)} of {len(texts)} texts ({method.key['keywords']})")

    folder = cached(cache, "keywords", {**method.key, "texts": digest(texts)}, make)
    found = json.loads((folder / "keywords.json").read_text(encoding="utf-8"))
    return [[(word, float(score)) for word, score in words] for words in found]


def picture_fragments(
    records: list[Record],
    proposals: Proposals,
    model: VisionLanguageModel,
    cache: str | Path,
    split: str,
    *,
    queries: bool = False,
    dtype: str = "float16",
    echo: Echo = print,
) -> Fragments:
    """Features of every picture's proposals (Eq. 2).

    Args:
        queries: keep all the vectors that the model has of a crop, "u q d", in files of their own: the best of them is
            BLIP-2's own score, for its baseline rows (register F16). Otherwise a crop is one vector, see `embed_crops`.

    Raises:
        DataError: For pictures that are not those of the proposals, one that cannot be read, or a feature that is not
            finite.
        ValueError: For `queries` of a model that has none.
    """
    if proposals.ids != [r.image_id for r in records]:
        raise DataError(
            cache,
            f"split {split}",
            f"{len(proposals)} pictures have proposals, {len(records)} records are given, and they are not the same",
            "Make the proposals of these records, in this order",
        )
    if queries and not hasattr(model, "embed_queries"):
        raise ValueError(f"{type(model).__name__} has no queries: leave queries=False")
    embed = model.embed_queries if queries else model.embed_crops

    def make(items: range) -> Tensor:
        chosen = [i for i in items if proposals.mask[i].any()]  # a picture without proposals is not opened
        return embed([records[i].open() for i in chosen], [proposals.of(i) for i in chosen])

    start = np.concatenate([[0], proposals.mask.sum(1).cumsum()])
    found = digests([replace(r, captions=(), objects=(), phrases=()) for r in records])
    key = {
        **model.key,
        "images": found.get("images", ""),
        "boxes": proposals.key,
        **({"queries": True} if queries else {}),
    }
    say = _progress(echo, split, len(records), "pictures")
    rows = cached_rows(cache, "crops", key, start, make, names=proposals.ids, dtype=dtype, echo=say)
    index = np.where(proposals.mask, start[:-1, None] + np.cumsum(proposals.mask, 1) - 1, 0)
    return Fragments(rows, index, proposals.mask, meta={**key, "proposals": proposals.meta})


def whole_pictures(
    records: list[Record], model: VisionLanguageModel, cache: str | Path, split: str, **options
) -> Fragments:
    """Every picture as its only fragment: the "entire image" rows of the paper's tables.

    `options` are those of `picture_fragments`.
    """
    sizes = [r.size or r.open().size for r in records]
    boxes = np.array([[[0, 0, w, h]] for w, h in sizes], np.float32)
    one = np.ones((len(records), 1), bool)
    whole = Proposals(boxes, one.astype(np.float32), one, np.array(sizes, np.int32),
                      [r.image_id for r in records], {"proposals": "whole"})  # fmt: skip
    return picture_fragments(records, whole, model, cache, split, **options)


def text_fragments(
    keywords: Sequence[Sequence[str | tuple[str, float]]],
    model: VisionLanguageModel,
    cache: str | Path,
    split: str,
    *,
    dtype: str = "float16",
    echo: Echo = print,
) -> Fragments:
    """Features of every text's keywords (Eq. 2), or of other words, with or without scores; each word is embedded once.

    Words go in as they are; a prompt around class names is the caller's (`PROMPTS`, register F21).

    Raises:
        DataError: If there is no word at all, or a feature that is not finite.
    """
    words = [[w if isinstance(w, str) else w[0] for w in mine] for mine in keywords]
    distinct = sorted({w for mine in words for w in mine})
    number = {w: i for i, w in enumerate(distinct)}
    m = max(map(len, words), default=0)
    index, mask = np.zeros((len(words), m), np.int64), np.zeros((len(words), m), bool)
    for i, mine in enumerate(words):
        index[i, : len(mine)], mask[i, : len(mine)] = [number[w] for w in mine], True
    key = {**model.key, "texts": digest(distinct)}
    rows = cached_rows(cache, "texts", key, np.arange(len(distinct) + 1),
                       lambda items: model.embed_texts([distinct[i] for i in items]), names=distinct, dtype=dtype,
                       echo=_progress(echo, split, len(distinct), "texts"))  # fmt: skip
    return Fragments(rows, index, mask, distinct, key | {"lists": digest(words)})


def whole_texts(
    texts: list[str], model: VisionLanguageModel, cache: str | Path, split: str, **options
) -> Fragments:
    """Every text as its only fragment: the "entire sentence" rows. `options` are those of `text_fragments`."""
    return text_fragments([[text] for text in texts], model, cache, split, **options)


# ------------------------------------------------------------------------------------------- rows on disk
def cached_rows(
    cache: str | Path,
    name: str,
    key: dict,
    start: Int[np.ndarray, "_"],
    make: Callable[[range], Tensor],
    *,
    names: Sequence[str],
    dtype: str,
    echo: Callable[[int], None] | None,
) -> np.ndarray:
    """Rows of many items, memory-mapped; item i has the rows `start[i]` to `start[i + 1]`.

    They are found in the cache, among entries called `name`, by `key`, by `start` and by the type; see `write_rows`.

    Args:
        make: the rows of a range of items; it is not asked for items that have none.
        names: of the items, for errors.
        echo: told how many items are done.

    Raises:
        DataError: If there is no row, if the cache cannot be written or lacks space, for rows that were damaged since,
            or for a value that is not finite in `dtype`; the item is named.
    """
    kind = np.dtype(dtype)
    if not start[-1]:
        raise DataError(cache, name, "there is nothing to embed", "Check the proposals or the keywords")

    def values_of(items: range) -> dict[str, np.ndarray]:
        return {"rows": make(items).float().cpu().numpy().astype(kind)}

    def fill(folder: Path) -> None:
        write_rows(folder, start, values_of, names, block=BLOCK[name], echo=echo)

    folder = cached(cache, name, {**key, "start": digest(start.tolist()), "dtype": kind.name}, fill)
    return np.load(folder / "rows.npy", mmap_mode="r")


def _progress(echo: Echo, split: str, n: int, what: str) -> Callable[[int], None] | None:
    return (lambda done: echo(f"{split}: {done} of {n} {what} embedded")) if echo else None
