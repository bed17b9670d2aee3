"""A backbone for the embedded set that has read captions and nothing else.

It stands in for the picture tower of a published vision-language model. Those saw hundreds of millions of captions;
from four thousand pictures a contrastive loss learns colours and backgrounds, and no shapes. Here a small network is
asked, for every word, whether the captions of a picture hold it: each cell answers, and a picture holds a word where
one of its cells does (multiple-instance learning). No box and no label is seen.

Axes: `b` pictures, `v` words, `h w` cells, `d` width.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, UInt8
from torch import Tensor, nn

from finematch.data.record import Record, digests, pairs
from finematch.encoders import Cells
from finematch.features.backbones import Backbone, taught_backbone, whole_batches
from finematch.files import digest
from finematch.text import Ragged
from finematch.training import Plan, fit, seed_everything

# ViT-Base, -Large and -Huge with a quarter of their layers and an eighth of their width, for images of 64 px
MINI_VITS = {
    f"mini_vit_{name}": {"img_size": 64, "patch_size": 8, "depth": depth, "embed_dim": width, "num_heads": heads,
                         "num_classes": 0}
    for name, depth, width, heads in (("base", 3, 96, 3), ("large", 6, 128, 4), ("huge", 8, 160, 4))
}  # fmt: skip


def log_mean_exp(logits: Float[Tensor, "b v h w"], sharpness: float = 3.0) -> Float[Tensor, "b v"]:
    """A picture's logit of a word from its cells': between their mean (0) and their maximum (infinity)."""
    flat = sharpness * logits.flatten(2)
    return (flat.logsumexp(2) - math.log(flat.shape[2])) / sharpness


class WordNet(nn.Module):
    """A `Cells` network and, in every cell, a linear classifier for each word.

    Args:
        frequency: "v", the share of training pictures whose captions hold a word: where the classifier starts.
    """

    def __init__(self, cells: Cells, frequency: Float[Tensor, " v"]):
        super().__init__()
        self.cells = cells
        self.head = nn.Conv2d(cells(torch.zeros(1, 3, 64, 64)).shape[1], len(frequency), 1)
        with torch.no_grad():
            self.head.bias.copy_(torch.logit(frequency, eps=1e-3))

    def forward(self, batch: dict) -> dict[str, Tensor]:
        """`loss`: binary cross-entropy, summed over words, of whether the captions hold them."""
        logits = log_mean_exp(self.head(self.cells(batch["pixels"])))
        loss = F.binary_cross_entropy_with_logits(logits, batch["words"].float(), reduction="none")
        return {"loss": loss.sum(1).mean()}


class PictureWords:
    """Pictures and the words of their captions as training batches: `pixels` in [0, 1] and `words` "b v"."""

    def __init__(self, pixels: UInt8[Tensor, "n 3 s s"], words: Bool[Tensor, "n v"]):
        self.pixels, self.words = pixels, words

    def __len__(self) -> int:
        return len(self.pixels)

    def __getitems__(self, index: list[int]) -> dict:
        return {"pixels": self.pixels[index].float() / 255, "words": self.words[index]}


def picture_words(records: list[Record], captions: Ragged, size: int) -> Bool[Tensor, "n v"]:
    """Which word ids the captions of each picture hold. `captions`: of all records, in their order.

    Args:
        size: of the vocabulary.
    """
    found = torch.zeros(len(records), size, dtype=torch.bool)
    owner = np.repeat([i for i, _ in pairs(records)], captions.lengths)
    found[torch.from_numpy(owner), torch.from_numpy(captions.ids.astype(np.int64))] = True
    return found


def token_digest(captions: Ragged) -> str:
    return digest([captions.ids.tolist(), captions.start.tolist()])


def caption_backbone(
    cache: str | Path,
    train: tuple[list[Record], Callable[[], Ragged]],
    val: tuple[list[Record], Callable[[], Ragged]],
    vocabulary: int,
    plan: Plan,
    *,
    name: str = "resnet18",
    known: Sequence[str] = (),
    echo: Callable[[str], None] | None = print,
) -> Backbone:
    """Train `WordNet` on the captions of the *train* split and return its network, frozen.

    Args:
        name: of the network: a ResNet, of which stages 0 to 2 are trained, or one of `MINI_VITS`.
        cache: a finished network is found there by pictures, captions and settings, a broken off one resumed.
        train, val: records, and what tokenises their captions, called to train. Val chooses the epoch, by its loss.
        vocabulary: number of word ids.
        known: `token_digest` of the captions of train and of val; without them they are tokenised.
    """

    vit = {"options": MINI_VITS[name]} if name in MINI_VITS else {}
    shape = {"backbone": "vit_tiny_patch16_224" if vit else name, "stage": -1 if vit else 2, **vit}

    def words_of(records: list[Record], captions: Callable[[], Ragged]) -> PictureWords:
        arrays = [np.asarray(r.open()) for r in records]
        pixels = torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2).contiguous()
        return PictureWords(pixels, picture_words(records, captions(), vocabulary))

    def teach(folder: Path) -> Cells:
        seed_everything(plan.seed)
        data, held = words_of(*train), words_of(*val)
        cells = Cells(
            shape["backbone"], stage=shape["stage"], mean=0.5, sd=0.25, options=shape.get("options")
        )

        def evaluate(m: nn.Module) -> dict[str, float]:
            total = 0.0
            for batch in whole_batches(held, next(m.parameters()).device):
                total += float(m(batch)["loss"]) * len(batch["pixels"])
            return {"val_loss": total / len(held), "val_gain": -total / len(held)}

        model = WordNet(cells, data.words.float().mean(0))
        fit(model, data, plan, folder, evaluate=evaluate, select="val_gain", echo=echo)
        return cells

    known = known or [token_digest(captions()) for _, captions in (train, val)]
    data = [[digests(records)["images"], of] for (records, _), of in zip((train, val), known, strict=True)]
    key = {"plan": asdict(plan), "data": data, "vocabulary": vocabulary, **shape}
    size, said = train[0][0].open().width, "words of the train captions"
    return taught_backbone(cache, "word_net", key, teach, size=size, trained_on=said)
