"""Do a picture's views and its caption's views attend to the same things? Measured on phrases with boxes.

"View 4 of the text corresponds to view 4 of the image" can be tested where somebody has said which words name
which part of the picture: Flickr30k Entities, or the embedded set in its format. A matcher that is trained on
pairs alone never sees these links.

Axes: `p` phrases, `v` views, `r` regions (or cells, or patches), `m` boxes of one phrase.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


def inside(regions: Float[Tensor, "r 4"], boxes: Float[Tensor, "m 4"]) -> Float[Tensor, " r"]:
    """Share of each region's area that lies inside the union of `boxes`; xyxy in one unit.

    A view's weights times these shares is the weight inside, if a region's weight is spread evenly over it.

    Raises:
        ValueError: For no boxes, or a box or region without area.
    """
    regions, boxes = regions.double(), boxes.double()
    for name, these in (("regions", regions), ("boxes", boxes)):
        if not len(these) or not (these[:, 2:] > these[:, :2]).all():
            raise ValueError(
                f"{name}: at least one is needed, and each needs an area; got {these.tolist()[:3]}"
            )
    # the union as disjoint cells of the grid that all edges make
    x, y = boxes[:, 0::2].unique(), boxes[:, 1::2].unique()
    top, left = torch.meshgrid(torch.arange(len(y) - 1), torch.arange(len(x) - 1), indexing="ij")
    cells = torch.stack([x[left], y[top], x[left + 1], y[top + 1]], -1).reshape(-1, 4)
    centre = (cells[:, None, :2] + cells[:, None, 2:]) / 2
    cells = cells[((centre > boxes[:, :2]) & (centre < boxes[:, 2:])).all(-1).any(1)]
    low, high = (
        torch.maximum(regions[:, None, :2], cells[:, :2]),
        torch.minimum(regions[:, None, 2:], cells[:, 2:]),
    )
    covered = (high - low).clamp(min=0).prod(-1).sum(1)
    return (covered / (regions[:, 2:] - regions[:, :2]).prod(-1)).float()


class Pieces(NamedTuple):
    """A caption as its tokenizer sees it."""

    words: list[str]  # what stands between spaces, and the special tokens
    word_of: list[int]  # the word that each token is a piece of
    offsets: list[tuple[int, int]]  # the token's characters in the caption; (0, 0) for special tokens


def pieces(caption: str, tokenizer, *, max_length: int = 32) -> Pieces:
    """Tokens of a caption and the words that they are pieces of; words that were cut off are left out.

    Args:
        tokenizer: a fast tokenizer of transformers, called as `text.tokenise` calls it.
    """
    coded = tokenizer(
        caption, truncation=True, max_length=max_length, return_offsets_mapping=True,
        return_special_tokens_mask=True,
    )  # fmt: skip
    spans = [match.span() for match in re.finditer(r"\S+", caption)]
    words, word_of, offsets, last = [], [], [], None
    for token, (low, high), special in zip(
        coded["input_ids"], coded["offset_mapping"], coded["special_tokens_mask"], strict=True
    ):
        # a token may begin with the space before its word, never in the middle of two words
        key = -len(words) - 1 if special else next(k for k, (start, end) in enumerate(spans) if low < end)
        if key != last:
            words.append(tokenizer.convert_ids_to_tokens(token) if special else caption[slice(*spans[key])])
        word_of.append(len(words) - 1)
        offsets.append((0, 0) if special else (low, high))
        last = key
    return Pieces(words, word_of, offsets)


def on_span(offsets: Sequence[tuple[int, int]], start: int, end: int) -> Bool[Tensor, " n"]:
    """Which tokens share a character with [start, end); special tokens have the empty offset (0, 0)."""
    return torch.tensor([low < end and start < high for low, high in offsets], dtype=torch.bool)


def correspondence(
    image: Float[Tensor, "p v"],
    text: Float[Tensor, "p v"],
    caption: Int[Tensor, " p"],
    *,
    shuffles: int = 2000,
    seed: int = 0,
) -> dict:
    """Whether image view k and text view k attend to corresponding things more than views k and j.

    `image[p, k]` is the weight of picture view k inside phrase p's boxes, `text[p, k]` the weight of caption
    view k on its words. Two questions:

    * *one phrase, which view?* For each phrase the image view and the text view with the most weight on it:
      how often are they the same? Against `1 / v`, and against phrases paired at random, which keeps how
      often each view wins: a view that always wins on both sides agrees without corresponding to anything.
    * *one view, which phrase?* In captions of several phrases, each view's weights over the phrases (made to
      sum to one): how much of text view k's share falls where image view j's does, sum_p min(I_j, T_k)? The
      mean of that over captions is `matrix[j, k]`; is its diagonal above the rest? Against the diagonals of
      the same matrix with its columns in random order.

    Returns:
        `agreement`, `agreement_chance` (1 / v), `agreement_shuffled` and `agreement_shuffled_high` (mean and
        97.5th percentile), `agreement_p`; `diagonal`, `off_diagonal`, `diagonal_p`; `phrases`, `captions`
        (those of several phrases); `matrix` "v v" and `winners` "2 v" (share of phrases that each image view,
        each text view wins). p is (1 + shuffles at least as large) / (1 + shuffles), one-sided.

    Raises:
        ValueError: For fewer than two views or two phrases, no caption of several phrases, or weights that
            are negative or not finite.
    """
    p, v = image.shape
    if v < 2 or p < 2:
        raise ValueError(f"{v} views and {p} phrases: a correspondence needs at least two of each")
    for name, weights in (("image", image), ("text", text)):
        if not (torch.isfinite(weights).all() and (weights >= 0).all()):
            raise ValueError(f"{name}: weights are finite and not negative")
    rng = np.random.default_rng(seed)

    best_image, best_text = (w.argmax(1).numpy() for w in (image, text))
    agreement = float((best_image == best_text).mean())
    random = np.array([(best_image == rng.permutation(best_text)).mean() for _ in range(shuffles)])

    several = [torch.nonzero(caption == c).flatten() for c in caption.unique()]
    several = [rows for rows in several if len(rows) > 1]
    if not several:
        raise ValueError("no caption has several phrases: there is nothing for a view to choose between")
    found = torch.zeros(v, v)
    for rows in several:
        i, t = (
            w[rows] / w[rows].sum(0).clamp(min=1e-12) for w in (image, text)
        )  # p v, over the caption's phrases
        found += torch.minimum(i[:, :, None], t[:, None, :]).sum(0)
    found = (found / len(several)).numpy()
    diagonal = float(np.diag(found).mean())
    permuted = np.array([found[np.arange(v), rng.permutation(v)].mean() for _ in range(shuffles)])

    return {
        "agreement": agreement,
        "agreement_chance": 1 / v,
        "agreement_shuffled": float(random.mean()),
        "agreement_shuffled_high": float(np.quantile(random, 0.975)),
        "agreement_p": float((1 + (random >= agreement).sum()) / (1 + shuffles)),
        "diagonal": diagonal,
        "off_diagonal": float(found[~np.eye(v, dtype=bool)].mean()),
        "diagonal_p": float((1 + (permuted >= diagonal).sum()) / (1 + shuffles)),
        "phrases": p,
        "captions": len(several),
        "matrix": found,
        "winners": np.stack([np.bincount(best, minlength=v) / p for best in (best_image, best_text)]),
    }
