"""SLAN's contrasts (3.3): of images and texts, with two queues (Eq. 5-6), and of regions and words (S41).

The paper says "following ALBEF" and leaves the rest open: what it does not say is ALBEF's.

Axes: `b` pairs, `k` keys, `q` proposals, `n` tokens of a text, `e` width of the vectors that are contrasted.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from finematch.losses import gather, longest, wide

NOBODY = -1  # the picture id of an empty place in a queue


def unit(x: Float[Tensor, "*b d"]) -> Float[Tensor, "*b d"]:
    return F.normalize(wide(x), dim=-1)


# ------------------------------------------------------------------------------ the temperature, the queues
class Temperature(nn.Module):
    """tau of Eq. 5, learnable, kept in [0.001, 0.5] (ALBEF). Returns 1 / tau.

    The parameter itself is clamped, so that a gradient can bring it back.
    """

    def __init__(self, tau: float = 0.07, learnable: bool = True):
        super().__init__()
        if not 0.001 <= tau <= 0.5:
            raise ValueError(f"tau = {tau}: must lie in [0.001, 0.5]")
        self.tau = nn.Parameter(torch.tensor(tau), requires_grad=learnable)

    def forward(self) -> Float[Tensor, ""]:
        with torch.no_grad():
            self.tau.clamp_(0.001, 0.5)
        return 1 / self.tau


class Momentum(nn.Module):
    """Copies of modules that follow them slowly: copy = decay copy + (1 - decay) module, once a step.

    They never see a gradient. ALBEF's copies run in training mode; ours stay in evaluation mode, because dropout would
    only blur the keys, and take over the running statistics of a batch norm as they are.

    Args:
        modules: by name; `copies` has the same names.
    """

    def __init__(self, modules: dict[str, nn.Module], decay: float = 0.995):
        super().__init__()
        if not 0 < decay < 1:
            raise ValueError(f"momentum = {decay}: must lie in (0, 1)")
        self.decay = decay
        self.copies = nn.ModuleDict(copy.deepcopy(modules)).requires_grad_(False).eval()

    def train(self, mode: bool = True) -> Momentum:
        self.training = mode
        return self  # the copies stay in evaluation mode

    @torch.no_grad()
    def update(self, modules: dict[str, nn.Module]) -> None:
        """One step towards the modules."""
        for name, module in modules.items():
            for mine, theirs in zip(self.copies[name].parameters(), module.parameters(), strict=True):
                mine.lerp_(theirs.to(mine.dtype), 1 - self.decay)
            take_over(self.copies[name].buffers(), module.buffers())

    @torch.no_grad()
    def reset(self, modules: dict[str, nn.Module]) -> None:
        """Become the modules again (after their weights were loaded)."""
        for name, module in modules.items():
            take_over(self.copies[name].parameters(), module.parameters())
            take_over(self.copies[name].buffers(), module.buffers())


def take_over(mine: Iterable[Tensor], theirs: Iterable[Tensor]) -> None:
    for a, b in zip(mine, theirs, strict=True):
        a.copy_(b)


class Keys(NamedTuple):
    """What Eq. 5 compares with: vectors of pictures and of texts, and the picture that each row is of."""

    image: Float[Tensor, "k e"]
    text: Float[Tensor, "k e"]
    image_id: Int[Tensor, " k"]


class Queue(nn.Module):
    """I_q and T_q of 3.3: the vectors of the latest `size` pairs, with the ids of their pictures.

    A ring, of any size (ALBEF's is a multiple of the batch, but no power of two is one of the paper's 1,280). It
    starts empty, and what is empty takes no part (ALBEF's starts with random vectors, which then are negatives). All
    processes enqueue the pairs of all processes, in the order of their ranks, so that their queues stay alike; the
    buffers are part of a checkpoint.

    Args:
        size: number of pairs.
        width: of a vector.
    """

    def __init__(self, size: int, width: int):
        super().__init__()
        if size < 1:
            raise ValueError(
                f"queue = {size}: must be at least 1 (0 is no queue at all: SLANConfig(queue=0))"
            )
        self.size = size
        self.register_buffer("image", torch.zeros(size, width))
        self.register_buffer("text", torch.zeros(size, width))
        self.register_buffer("image_id", torch.full((size,), NOBODY))
        self.register_buffer("total", torch.zeros((), dtype=torch.long))  # pairs that ever came in

    def keys(self) -> Keys:
        """What is in it; a ring knows no beginning, so the order means nothing."""
        n = min(int(self.total), self.size)
        return Keys(self.image[:n], self.text[:n], self.image_id[:n])

    def check(self, batch: int) -> None:
        """Refuse a whole batch, of all processes, that has more pairs than the ring has places.

        Raises:
            ValueError: With both numbers.
        """
        if batch > self.size:
            raise ValueError(
                f"queue = {self.size} has no room for the whole batch of {batch} pairs (all processes together): use "
                f"queue={batch} or more, or queue=0, which contrasts within the batch"
            )

    @torch.no_grad()
    def enqueue(
        self, image: Float[Tensor, "b e"], text: Float[Tensor, "b e"], image_id: Int[Tensor, " b"]
    ) -> None:
        """Put this process's pairs, and those of all others, where the oldest are.

        Raises:
            ValueError: As `check`; for a negative picture id, which is the mark of an empty place.
        """
        image, text, image_id = gather(image.detach()), gather(text.detach()), gather(image_id)
        self.check(len(image))
        if bool((image_id < 0).any()):
            raise ValueError(f"image_id {int(image_id.min())} is negative: number the pictures from 0")
        rows = (self.total + torch.arange(len(image), device=image.device)) % self.size  # round the end
        self.image[rows], self.text[rows] = image.to(self.image), text.to(self.text)
        self.image_id[rows] = image_id
        self.total += len(image)

    @torch.no_grad()
    def clear(self) -> None:
        self.total.zero_()
        self.image_id.fill_(NOBODY)


# ------------------------------------------------------------------------------ image-text contrast, Eq. 5-6
def itc(
    image: Float[Tensor, "b e"],
    text: Float[Tensor, "b e"],
    image_id: Int[Tensor, " b"],
    keys: Keys,
    scale: Float[Tensor, ""] | float,
    *,
    first: int = 0,
    same_picture: bool = True,
    distil: float = 0.0,
    reduction: str = "sum",
) -> Float[Tensor, ""]:
    """Eq. 5-6: -log p_i2t - log p_t2i, the mean over the rows.

        p_i2t(I, T) = exp(sim(T_v, T_t) / tau) / sum over T' in T_q of exp(sim(T_v, T') / tau)

    The second line of Eq. 5 sums over "T' in I_q"; we read I' (S23). The own pair is among the keys, so that Eq. 5 is
    a probability: the batch stands before the queue.

    Args:
        image, text: unit vectors; row i of both is a pair.
        keys: unit vectors of the whole batch (all processes), then of the queue.
        scale: 1 / tau.
        first: row of `keys` that is pair 0 of this process: its rank times b.
        same_picture: every key of the same picture is a positive, in equal shares of the target; else only the own
            pair is.
        distil: alpha of ALBEF's momentum distillation: this share of the target is what the momentum encoders say,
            softmax(key of the own pair . keys / tau). The keys must be theirs.
        reduction: `sum` of the two directions (Eq. 6) or their `mean` (ALBEF).

    Raises:
        ValueError: For another `reduction`, a `distil` outside [0, 1), or keys that do not hold the own pairs.
    """
    if reduction not in ("sum", "mean"):
        raise ValueError(f"reduction is {reduction!r}; use 'sum' or 'mean'")
    if not 0 <= distil < 1:
        raise ValueError(f"distil = {distil}: must lie in [0, 1)")
    b = len(image)
    own = torch.arange(first, first + b, device=image.device)
    if first < 0 or first + b > len(keys.image_id) or not torch.equal(keys.image_id[own], image_id):
        raise ValueError(
            f"keys {first} to {first + b - 1} of {len(keys.image_id)} must be the batch's own pairs: give the whole "
            "batch first, then the queue, and first=rank * batch"
        )
    with torch.autocast(image.device.type, enabled=False):
        image, text = wide(image), wide(text)
        if same_picture:
            positive = (image_id[:, None] == keys.image_id[None]).to(image.dtype)
            target = positive / positive.sum(1, keepdim=True)
        else:
            target = F.one_hot(own, len(keys.image_id)).to(image.dtype)
        total = image.new_zeros(())
        for query, teacher, key in ((image, keys.image, keys.text), (text, keys.text, keys.image)):
            key = key.to(query.dtype)
            goal = target
            if distil:
                with torch.no_grad():
                    soft = (scale * teacher[own].to(query.dtype) @ key.T).softmax(1)
                    goal = distil * soft + (1 - distil) * target
            total = total + F.cross_entropy(scale * query @ key.T, goal)
    return total if reduction == "sum" else total / 2


def softmax_both_ways(
    table: Float[Tensor, "b b"], image_id: Int[Tensor, " b"], same_picture: bool, reduction: str
) -> Float[Tensor, ""]:
    """Eq. 5-6 of a table of sim / tau, images in rows, captions in columns: targets and reduction as in `itc`."""
    same = image_id[:, None] == image_id[None]
    positive = (same if same_picture else torch.eye(len(table), device=table.device)).to(table.dtype)
    target = positive / positive.sum(1, keepdim=True)  # symmetric: it serves both directions
    total = F.cross_entropy(table, target) + F.cross_entropy(table.T, target)
    return total if reduction == "sum" else total / 2


# ------------------------------------------------------------------------------ region-word contrast (S41)
def region_word_scores(
    regions: Float[Tensor, "b t d"],
    valid: Bool[Tensor, "b t"],
    words: Float[Tensor, "c n d"],
    counted: Bool[Tensor, "c n"],
) -> Float[Tensor, "b c"]:
    """How well the regions of each image explain the words of each caption, before the two have met.

        s(I, T) = mean over the words of T of max over the regions of I of cos(region, word)

    0 for a caption without words.
    """
    b, t, c, n = *regions.shape[:2], *words.shape[:2]
    cosine = (unit(regions).flatten(0, 1) @ unit(words).flatten(0, 1).T).view(b, t, c, n)
    best = cosine.masked_fill(~valid[:, :, None, None], float("-inf")).max(1).values  # b c n
    return (best * counted).sum(2) / counted.sum(1).clamp(min=1)


def region_word(
    levels: list[Float[Tensor, "b t d"]],
    valid: Bool[Tensor, "b t"],
    words: Float[Tensor, "b n d"],
    counted: Bool[Tensor, "b n"],
    image_id: Int[Tensor, " b"],
    scale: Float[Tensor, ""] | float,
) -> Float[Tensor, ""]:
    """The region-word contrast: softmax over the batch of `region_word_scores` both ways, the mean over the levels.

    The paper has no such loss, and nothing in it trains the cosine of a region with a word that Eq. 2 moves regions
    by: the contrast reads pooled vectors, matching the attention's projections, L_reg boxes alone (S41). All captions
    of an image are its positives, in equal shares: in a batch that is the same number as one positive a caption, for
    their rows are alike. Of several processes each computes the whole loss of all their pairs.

    Args:
        levels: embeddings of the proposals, boxes held fixed (`SelfLocator.fixed_regions`).
        words: token states before any cross attention.
        counted: which of them are words.
        scale: 1 / tau.
    """
    total, short = torch.zeros((), device=image_id.device), longest(words.shape[1]) - words.shape[1]
    with torch.autocast(image_id.device.type, enabled=False):
        words, counted = gather(F.pad(wide(words), (0, 0, 0, short))), gather(F.pad(counted, (0, short)))
        valid, image_id = gather(valid), gather(image_id)
        for regions in levels:
            scores = scale * region_word_scores(gather(wide(regions)), valid, words, counted)
            total = total + softmax_both_ways(scores, image_id, True, "mean")
    return total / len(levels)
