"""SCAN's text-to-image score, the field's baseline of every method that lets words attend to regions.

Lee et al., Stacked Cross Attention for Image-Text Matching (ECCV 2018), section 3.1, the variant "t-i". Three exact
identities make it a matter of one matrix product: the context of a word is a weighted sum of regions, so its dot
product with the word is the same sum of dot products, and its norm needs the regions' Gram matrix alone; captions of
one length go together, so that no padding is computed.

Axes: `b` images, `n` regions, `c` captions, `l` words of a caption, `d` width.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional as F

SLOPE = 0.1  # of the leaky ReLU with which the paper's code thresholds the similarities
TILE = 4096  # pairs of a word and an image that are scored at a time: the caches of a CPU hold them


def text_to_image(
    regions: Float[Tensor, "b n d"],
    words: Float[Tensor, "c l d"],
    mask: Bool[Tensor, "c l"],
    *,
    temperature: float = 9.0,
    pooling: str = "lse",
    sharpness: float = 6.0,
    tile: int = TILE,
    there: Bool[Tensor, "b n"] | None = None,
    gram: Float[Tensor, "b n n"] | None = None,
) -> Float[Tensor, "b c"]:
    """The score of every image with every caption: how well each word is explained by the regions it attends to.

        s_ij = cosine of region i and word j, cut at zero, then divided by its norm over the words j
        a_j  = sum_i softmax_i(temperature s_ij) v_i
        R_j  = cosine of word j and a_j
        S    = log(sum_j exp(sharpness R_j)) / sharpness (`lse`), or the mean of R_j (`mean`)

    Regions and words are made unit here. The paper cuts s at zero; its published code keeps a tenth of what is
    negative, and so do we.

    Args:
        mask: the real words of each caption, which come first.
        tile: pairs of a word and an image in memory at a time.
        there: the real regions of each image; all of them, if it is not given.
        gram: dot products of each image's regions, which are unit vectors then: a gallery is prepared once.

    Raises:
        ValueError: For another pooling, or a caption without words.
    """
    if pooling not in ("lse", "mean"):
        raise ValueError(f"pooling is {pooling!r}; use 'lse' or 'mean'")
    lengths = mask.sum(1)
    if len(lengths) and not lengths.min():
        raise ValueError(f"caption {int(lengths.argmin())} has no words")
    words = F.normalize(words, dim=-1)
    if gram is None:
        regions = F.normalize(regions, dim=-1)
        gram = regions @ regions.mT
    scores = regions.new_empty(len(regions), len(words))
    absent = None if there is None or there.all() else ~there
    for length in lengths.unique().tolist():
        for chunk in (lengths == length).nonzero().squeeze(1).split(max(1, tile // (8 * length))):
            part = words[chunk, :length].flatten(0, 1)
            size = max(1, tile // len(part))
            for k in range(0, len(regions), size):
                rows = slice(k, k + size)
                near = _cosines(regions[rows], gram[rows], part, length, temperature,
                                None if absent is None else absent[rows])  # fmt: skip
                pooled = near.mean(2) if pooling == "mean" else (sharpness * near).logsumexp(2) / sharpness
                scores[rows, chunk] = pooled
    return scores


def _cosines(regions, gram, words, length: int, temperature: float, absent=None) -> Float[Tensor, "b c l"]:
    """Of every word (`words`: "(c l) d") with its context in each image."""
    b, n, _ = regions.shape
    dots = (words @ regions.flatten(0, 1).T).view(-1, length, b, n)  # c l b n
    cut = F.leaky_relu(dots, SLOPE)
    cut = cut / torch.linalg.vector_norm(cut, dim=1, keepdim=True).clamp(min=1e-8)
    logits = temperature * cut
    weights = (logits if absent is None else logits.masked_fill(absent, float("-inf"))).softmax(-1)
    square = torch.einsum("clbn,bnm,clbm->clb", weights, gram, weights)
    near = (weights * dots).sum(-1) / square.clamp(min=1e-12).sqrt()
    return near.permute(2, 0, 1)
