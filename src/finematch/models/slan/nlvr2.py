"""NLVR2 (4.2.4, Table 3): whether a sentence is true of a left and a right image.

> "We extract the image and text embeddings from the image-text input, which are fused by a cross-attention layer. We
> use a binary classification module to predict their relations."

The sentence passes the self-locator with either image. How two images become one input the paper leaves open (S33).
We follow BLIP: the regions of both are concatenated, with a learned vector that says which side they are on, and the
sentence's [CLS] attends to all of them. The classification module is a two-layer perceptron on what it found and on
T_v and T_t of either side, the tokens that the matching head compares.

Axes: `b` examples, `t` regions of an image, `n` tokens, `d` width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase

from finematch.data.pairs import Source
from finematch.data.record import ImagePair
from finematch.losses import wide
from finematch.models.slan.locator import Located
from finematch.models.slan.objective import SLAN, locate_pairs
from finematch.text import tokenise

HIDDEN = -1.0  # label of an example whose label is withheld


class ImagePairs(Dataset):
    """Examples as batches of `PairClassifier`: `left`, `right`, `text`, `label` "b" (1 true, 0 false).

    Args:
        images: a source whose rows `rows[i]` are the left and the right image of example i.
    """

    def __init__(
        self,
        images: Source,
        pairs: Sequence[ImagePair],
        rows: Sequence[tuple[int, int]],
        tokenizer: PreTrainedTokenizerBase,
        *,
        max_length: int = 48,
    ):
        self.images, self.rows = images, np.asarray(rows)
        self.texts = tokenise([pair.sentence for pair in pairs], tokenizer, max_length=max_length)
        self.labels = torch.tensor([HIDDEN if pair.label is None else float(pair.label) for pair in pairs])

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.__getitems__([index])

    def __getitems__(self, index: Sequence[int]) -> dict[str, Any]:
        index = np.asarray(index)
        left, right = (self.images.batch(self.rows[index, side]) for side in (0, 1))
        return {"left": left, "right": right, "text": self.texts.batch(index), "label": self.labels[index]}


class PairClassifier(nn.Module):
    """A pretrained SLAN with a head for two images; `forward` is the loss of fine-tuning.

    Args:
        model: its towers and locator are used and trained; its heads are left alone.
        width: D, of the model's tokens.
    """

    def __init__(self, model: SLAN, width: int, *, heads: int = 4):
        super().__init__()
        self.towers, self.locator = model.encoders.towers, model.locator
        self.sides = nn.Parameter(0.02 * torch.randn(2, width))
        self.attend = nn.MultiheadAttention(width, heads, batch_first=True)
        self.norm = nn.LayerNorm(width)
        self.classify = nn.Sequential(nn.Linear(5 * width, width), nn.GELU(), nn.Linear(width, 1))

    def _read(
        self,
        left: dict[str, Tensor],
        right: dict[str, Tensor],
        text: dict[str, Tensor],
        *,
        weights: bool = False,
    ) -> tuple[Float[Tensor, "b d"], Float[Tensor, "b 1 t2"] | None, list[Located]]:
        """What [CLS] found among the regions of both images, how much it looks at each, and the two sides."""
        both = [locate_pairs(self.towers, self.locator, image, text) for image in (left, right)]
        regions = torch.cat([at.regions + side for at, side in zip(both, self.sides, strict=True)], 1)
        valid = torch.cat([at.valid for at in both], 1)
        words = self.towers.text(text["input_ids"], text["mask"])[:, :1]  # [CLS], which alone is read
        seen, looked = self.attend(words, regions, regions, key_padding_mask=~valid, need_weights=weights)
        return self.norm(words + seen)[:, 0], looked, both

    def logits(
        self, left: dict[str, Tensor], right: dict[str, Tensor], text: dict[str, Tensor]
    ) -> Float[Tensor, " b"]:
        """Above 0: the sentence is true, fp32."""
        whole, _, both = self._read(left, right, text)
        tokens = [token for at in both for token in (at.picture, at.text)]
        return wide(self.classify(torch.cat([whole, *tokens], 1)))[:, 0]

    @torch.no_grad()
    def attention(
        self, left: dict[str, Tensor], right: dict[str, Tensor], text: dict[str, Tensor]
    ) -> tuple[Float[Tensor, "b t2"], list[Located]]:
        """How much the sentence's [CLS] looks at each region, those of the left image first (rows sum to 1, mean over
        heads), and what the locator found in the left and the right image."""
        _, looked, both = self._read(left, right, text, weights=True)
        return looked[:, 0], both

    def forward(self, batch: dict) -> dict[str, Tensor]:
        """`loss`: binary cross-entropy, the mean over the examples.

        Raises:
            ValueError: For examples whose label is withheld.
        """
        if bool((batch["label"] == HIDDEN).any()):
            raise ValueError("an example has no label: nothing can be learned from it")
        logits = self.logits(batch["left"], batch["right"], batch["text"])
        return {"loss": F.binary_cross_entropy_with_logits(logits, batch["label"])}
