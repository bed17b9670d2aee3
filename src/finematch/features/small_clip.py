"""A small CLIP for computers without a published one: trained on training captions only, frozen afterwards.

It stands in for the CLIP, BLIP or BLIP-2 of FELGA 4.2. No box, no class name and no image of the gallery takes
part in its training. The model reads the feature map of a frozen backbone and is saved as published models are,
beside that backbone: `features.fragments.open_vlp` opens the folder.

Axes: `b` images of a batch or texts of a batch, `c` channels, `s` cells along a side, `n` tokens, `d` width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase

from finematch.boxes import roi_align
from finematch.data.fragment_sets import FragmentSets
from finematch.data.record import DataError, Record, pairs
from finematch.encoders import open_clip_model, small_clip
from finematch.evaluation.retrieval import retrieval
from finematch.features.backbones import Backbone, save_backbone
from finematch.features.fragments import document
from finematch.features.inputs import frozen_network, open_tokenizer
from finematch.features.regions import extract
from finematch.files import cached, digest, file_digests
from finematch.losses import contrastive
from finematch.text import Ragged, tokenise
from finematch.training import Plan, by_one_process, fit, seed_everything

POSITIONS = 64  # tokens of the longest text: five captions joined
RECALLS = ("i2t_r1", "i2t_r10", "t2i_r1", "t2i_r10", "rsum")


@dataclass(frozen=True)
class SmallCLIPConfig:
    """Settings of the small CLIP and of its training."""

    width: int = 96
    depth: int = 2  # layers of each tower
    epochs: int = 8
    batch_size: int = 64  # images
    lr: float = 1e-3
    warmup: float = 0.1  # share of the steps
    weight_decay: float = 0.05
    smallest: float = 0.5  # side of the smallest random crop, as a share of the image's side
    each: int = 2  # captions of an image in a batch
    whole: float = 0.2  # share of the batches whose texts are all captions of an image, joined
    seed: int = 0


PHOTOS = {"width": 128}  # what differs for photos
SMOKE = {"epochs": 1, "batch_size": 40}  # and in a smoke run


def small_clip_config(dataset: str, *, smoke: bool = False, **changes) -> SmallCLIPConfig:
    """The default settings for a dataset, with `changes`.

    Raises:
        TypeError: For a setting that `SmallCLIPConfig` does not have.
    """
    return SmallCLIPConfig(**({} if dataset == "scenes" else PHOTOS) | (SMOKE if smoke else {}) | changes)


class ContrastiveCLIP(nn.Module):
    """A CLIPModel in training: the in-batch contrastive loss of images and texts.

    An image is its feature map, read through RoI-align as `CellVLP` reads it. In training it is a random square crop of
    the map, so that the model knows crops; its caption still describes the whole image, so no crop is smaller than
    `smallest` of the side.
    """

    def __init__(self, clip: nn.Module, *, smallest: float = 0.5):
        super().__init__()
        self.clip, self.smallest = clip, smallest

    def window(self, pixels: Float[Tensor, "b c s s"]) -> Float[Tensor, "b c s s"]:
        """A random crop of each image in training, else the whole."""
        b, side = len(pixels), pixels.shape[-1]
        size, corner = pixels.new_full((b, 1), side), pixels.new_zeros(b, 2)
        if self.training:
            size = side * (self.smallest + (1 - self.smallest) * torch.rand(b, 1, device=pixels.device))
            corner = torch.rand(b, 2, device=pixels.device) * (side - size)
        number = torch.arange(b, device=pixels.device, dtype=pixels.dtype)[:, None]
        boxes = torch.cat([number, corner, corner + size], 1)
        return roi_align(pixels, boxes, side)

    def images(self, pixels: Float[Tensor, "b c s s"]) -> Float[Tensor, "b d"]:
        """Unit vectors of images."""
        found = self.clip.get_image_features(pixel_values=self.window(pixels)).pooler_output
        return F.normalize(found.float(), dim=-1)

    def texts(self, input_ids: Int[Tensor, "b n"], mask: Bool[Tensor, "b n"]) -> Float[Tensor, "b d"]:
        """Unit vectors of texts."""
        found = self.clip.get_text_features(input_ids=input_ids, attention_mask=mask.long()).pooler_output
        return F.normalize(found.float(), dim=-1)

    def forward(self, batch: dict) -> dict[str, Tensor]:
        scale = self.clip.logit_scale.exp().clamp(max=100)
        images = self.images(batch["pixels"])[batch["row_of"]]
        texts = self.texts(batch["input_ids"], batch["mask"])
        return {"loss": contrastive(images, texts, scale, image_id=batch["image_id"])}


class Captioned(Dataset):
    """Images, each with `each` of its captions at random, or, in a share `whole` of the batches, with all joined.

    Published models have read texts of every length; a model that has only seen single captions could not place the
    words of a joined text.
    """

    def __init__(
        self,
        images: Callable[[np.ndarray], Tensor],
        captions: Ragged,
        documents: Ragged,
        image_of: np.ndarray,
        *,
        each: int,
        whole: float,
    ):
        self.images, self.captions, self.documents = images, captions, documents
        self.each, self.whole = each, whole
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
            "pixels": self.images(rows),
            "row_of": torch.from_numpy(place),
            "image_id": torch.from_numpy(rows[place]),
            "input_ids": text["input_ids"],
            "mask": text["mask"],
        }


@dataclass(frozen=True)
class _Split:
    """One split: feature maps of images, tokens of their captions, and each caption's image."""

    maps: Callable[[np.ndarray], Float[Tensor, "b c s s"]]
    captions: Ragged
    image_of: np.ndarray
    size: int  # images

    @classmethod
    def of(
        cls, records: list[Record], backbone: Backbone, tokenizer, folder: Path, name: str, echo
    ) -> _Split:
        cells = extract(records, backbone, folder, name, kind="cells", echo=echo).features
        captions = tokenise([c for _, c in pairs(records)], tokenizer, max_length=POSITIONS)
        image_of = np.array([i for i, _ in pairs(records)])
        return cls(lambda rows: _as_map(cells[rows]), captions, image_of, len(records))


def train_small_clip(
    train: list[Record],
    val: list[Record],
    backbone: Backbone,
    tokenizer: PreTrainedTokenizerBase,
    cache: str | Path,
    config: SmallCLIPConfig,
    *,
    echo: Callable[[str], None] | None = print,
) -> Path:
    """The folder of a small CLIP that was trained on the captions of `train`, from the cache or made now.

    It holds the model, its tokenizer, its backbone and the log of its training. The epoch with the best rsum of `val`
    is kept. Training that was interrupted is resumed.

    Args:
        val: not empty.
        backbone: its feature maps are what the model reads.
        cache: folder above; the model's own is found by its settings, images, captions and backbone (`files.cached`).

    Raises:
        TrainingError: If it must be trained and there are several processes.
    """
    cache, splits = Path(cache), {"train": train, "val": val}
    documents = [document(record) for record in train]
    images = file_digests([record.image for records in splits.values() for record in records])
    key = {
        "settings": asdict(config),
        "captions": digest([[record.captions for record in records] for records in splits.values()]),
        "images": digest(images),
        "tokenizer": digest(tokenizer.backend_tokenizer.to_str()),
        "backbone": backbone.key,
    }

    def make(folder: Path) -> None:
        if echo:
            echo(f"A small CLIP is trained on {len(train)} images and their captions: {folder.name}")
        by_one_process(f"the small CLIP of {folder}")
        cells = cache / f"cells-{backbone.key['backbone']}-{str(backbone.key['weights'])[:8]}"
        read = {
            name: _Split.of(records, backbone, tokenizer, cells, name, echo)
            for name, records in splits.items()
        }
        clip = _train(
            read, tokenise(documents, tokenizer, max_length=POSITIONS), tokenizer, config, folder, echo
        )
        for thing in (clip, tokenizer):
            thing.save_pretrained(folder)
        save_backbone(backbone, folder)
        for path in (folder / "checkpoint.pt", folder / "best.safetensors", *folder.glob(".*")):
            path.unlink(missing_ok=True)

    return cached(cache, "small_clip", key, make)


def open_small_clip(
    sets: FragmentSets,
    dataset: str,
    cache: str | Path,
    *,
    networks: str | Path | None = None,
    smoke: bool = False,
    echo: Callable[[str], None] | None = print,
    **changes,
) -> Path:
    """`train_small_clip` on a dataset with its default backbone, tokenizer and settings, the settings with `changes`.

    Args:
        networks: cache of the backbone, which takes longer to train than the CLIP: that of other methods' runs, so that
            all share one. `cache` unless given.

    Raises:
        DataError: If the dataset has no val, or a file is not where it is looked for.
        TypeError: For a setting that `SmallCLIPConfig` does not have.
    """
    if not sets.val:
        raise DataError(sets.data_root, dataset, "has no val to choose the epoch of a small CLIP by",
                        "Name a published model (vlp=...)")  # fmt: skip
    config = small_clip_config(dataset, smoke=smoke, **changes)
    backbone = frozen_network(dataset, sets.data_root, networks or cache, told="captions", smoke=smoke)
    tokenizer = open_tokenizer(dataset, sets.data_root)
    return train_small_clip(sets.train, sets.val, backbone, tokenizer, cache, config, echo=echo)


def _train(
    splits: dict[str, _Split],
    documents: Ragged,
    tokenizer: PreTrainedTokenizerBase,
    s: SmallCLIPConfig,
    out: Path,
    echo: Callable[[str], None] | None,
) -> nn.Module:
    """The CLIPModel after its best epoch on val."""
    train, val = splits["train"], splits["val"]
    channels, size = val.maps(np.arange(1)).shape[1:3]
    seed_everything(s.seed)
    config = small_clip(len(tokenizer), eos=tokenizer.sep_token_id, bos=tokenizer.cls_token_id, size=size, patch=1,
                        width=s.width, depth=s.depth, positions=POSITIONS)  # fmt: skip
    config.vision_config.num_channels = channels
    model = ContrastiveCLIP(open_clip_model(config), smallest=s.smallest)
    data = Captioned(train.maps, train.captions, documents, train.image_of, each=s.each, whole=s.whole)
    plan = Plan(epochs=s.epochs, batch_size=s.batch_size, lr=s.lr, warmup=s.warmup, weight_decay=s.weight_decay,
                clip_norm=1.0, seed=s.seed)  # fmt: skip
    fit(model, data, plan, out, evaluate=lambda model: _recalls(model, val), echo=echo)
    return model.clip


def _recalls(model: ContrastiveCLIP, val: _Split) -> dict[str, float]:
    """Recall of val's images and captions; captions go in by length, so that batches have little padding."""
    device = next(model.parameters()).device
    seen = [model.images(val.maps(rows).to(device)) for rows in _blocks(val.size, 200)]
    order = np.argsort(val.captions.lengths, kind="stable")
    said = []
    for rows in _blocks(len(order), 500):
        batch = val.captions.batch(order[rows])
        said.append(model.texts(batch["input_ids"].to(device), batch["mask"].to(device)))
    back = torch.from_numpy(np.argsort(order, kind="stable")).to(device)
    found = retrieval(torch.cat(seen), torch.cat(said)[back], val.image_of)
    return {name: found[name] for name in RECALLS}


def _as_map(cells: Float[np.ndarray, "b n c"]) -> Float[Tensor, "b c s s"]:
    """Cells, row by row, as a square map."""
    side = round(cells.shape[1] ** 0.5)
    return torch.from_numpy(np.asarray(cells, np.float32)).transpose(1, 2).unflatten(2, (side, side))


def _blocks(n: int, size: int) -> list[np.ndarray]:
    return [np.arange(i, min(i + size, n)) for i in range(0, n, size)]
