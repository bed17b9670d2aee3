"""Unit vectors of a whole split, by a two-stream model.

Axes: `n` images, `c` captions, `D` width of the representation.
"""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from finematch.data.splits import Split
from finematch.evaluation.retrieval import retrieval
from finematch.training import to_device


@torch.no_grad()
def embed(
    model: nn.Module, split: Split, *, block: int = 256
) -> tuple[Float[Tensor, "n D"], Float[Tensor, "c D"]]:
    """Unit vectors of every image and every caption of a split.

    Captions of like length share a batch, so that little padding is computed; rows come back in order. The
    model is put into eval mode for it, and left as it was.

    Args:
        model: has `encode_image` and `encode_text`, which give something with a `vector`.
    """
    training = model.training
    model.eval()
    device = next(model.parameters()).device
    images = [
        model.encode_image(
            **to_device(split.images.batch(range(i, min(i + block, len(split.images)))), device)
        ).vector
        for i in range(0, len(split.images), block)
    ]
    order = np.argsort(split.texts.lengths, kind="stable")
    texts = [
        model.encode_text(**to_device(split.texts.batch(order[i : i + block]), device)).vector
        for i in range(0, len(order), block)
    ]
    model.train(training)
    back = torch.from_numpy(np.argsort(order, kind="stable"))
    return torch.cat(images).cpu(), torch.cat(texts).cpu()[back]


def validation(model: nn.Module, split: Split) -> dict[str, float]:
    """R@1 both ways and rsum of a split, every image against every caption: by these an epoch is chosen."""
    found = retrieval(*embed(model, split), split.image_of)
    return {name: found[name] for name in ("i2t_r1", "t2i_r1", "rsum")}
