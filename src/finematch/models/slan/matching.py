"""SLAN's image-text matching (3.3, Eq. 4) and language modelling (Eq. 7), which read the fused tokens.

Axes: `b` pairs, `p` pairs to be scored, `n` tokens of a text, `m` masked words, `d` width of the tokens, `v` words of
the vocabulary.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from finematch.losses import over_processes, wide, world


# ------------------------------------------------------------------------------ image-text matching, Eq. 4
def hard_negatives(
    similarity: Float[Tensor, "b b"], image_id: Int[Tensor, " b"], *, generator: torch.Generator | None = None
) -> tuple[Int[Tensor, " b"], Int[Tensor, " b"]]:
    """For each picture a text, and for each text a picture, that do not belong together but look as if they did.

    Drawn from softmax(similarity) over the others, as ALBEF does; a pair of the same picture is never a negative.

    Args:
        similarity: of each picture (row) and each text (column) of this process's batch, divided by tau.

    Returns:
        The text drawn for each picture, the picture drawn for each text.

    Raises:
        ValueError: If a row has no negative at all: every pair of the batch shows its picture.
    """
    same = image_id[:, None] == image_id[None]
    alone = same.all(1)
    if bool(alone.any()):
        row = int(alone.nonzero()[0])
        raise ValueError(
            f"pair {row} (picture {int(image_id[row])}) has no negative: all {len(image_id)} pairs of this process's "
            "batch show its picture. Raise batch_size, shuffle the pairs, or train without ITM (weight 0)"
        )
    drawn = [
        torch.multinomial(
            wide(table.detach()).masked_fill(same, float("-inf")).softmax(1), 1, generator=generator
        )
        for table in (similarity, similarity.T)
    ]
    return drawn[0].squeeze(1), drawn[1].squeeze(1)


class MatchingHead(nn.Linear):
    """f_c of Eq. 4: the concatenated tokens to two logits, "not matched" and "matched"."""

    def __init__(self, width: int):
        super().__init__(2 * width, 2)

    def forward(self, picture: Float[Tensor, "p d"], text: Float[Tensor, "p d"]) -> Float[Tensor, "p 2"]:
        return super().forward(torch.cat([picture, text], dim=-1))


def itm(logits: Float[Tensor, "p 2"], matched: Bool[Tensor, " p"]) -> Float[Tensor, ""]:
    """Eq. 4: cross-entropy of the matching head, the mean over the pairs."""
    return F.cross_entropy(wide(logits), matched.long())


# ------------------------------------------------------------------------------ language modelling, Eq. 7
class Words(NamedTuple):
    """What masking must know of a tokenizer: `Words.of(tokenizer)`."""

    size: int
    mask: int
    special: tuple[int, ...]

    @classmethod
    def of(cls, tokenizer) -> Words:
        """Of a transformers tokenizer.

        Raises:
            ValueError: If it has no mask token.
        """
        if tokenizer.mask_token_id is None:
            raise ValueError("this tokenizer has no [MASK] token: language modelling needs one, or weight 0")
        return cls(len(tokenizer), tokenizer.mask_token_id, tuple(sorted(tokenizer.all_special_ids)))


def mask_words(
    input_ids: Int[Tensor, "b n"],
    mask: Bool[Tensor, "b n"],
    special: Bool[Tensor, "b n"],
    words: Words,
    *,
    share: float = 0.15,
    generator: torch.Generator | None = None,
) -> tuple[Int[Tensor, "b n"], Bool[Tensor, "b n"]]:
    """Hide words: "we randomly mask 15 % text tokens"; BERT's 80/10/10, as in ALBEF.

    Each word is chosen by itself with probability `share`. Of the chosen, 80 % become [MASK], 10 % a random word (we
    leave the special tokens out, BERT does not), 10 % stay. Special tokens and padding are never chosen.

    Returns:
        The ids with words hidden, and which were chosen. A caption may have none.
    """
    device = input_ids.device
    lots = torch.rand(2, *input_ids.shape, device=device, generator=generator)
    known = torch.zeros(words.size, dtype=torch.bool, device=device)
    known[list(words.special)] = True
    chosen = (lots[0] < share) & mask & ~special & ~known[input_ids]
    ordinary = (~known).nonzero().squeeze(1)
    others = ordinary[torch.randint(len(ordinary), input_ids.shape, device=device, generator=generator)]
    hidden = torch.where(chosen & (lots[1] < 0.8), words.mask, input_ids)
    return torch.where(chosen & (lots[1] >= 0.9), others, hidden), chosen


class MaskedWordHead(nn.Module):
    """p_mask of Eq. 7: which word stood at each masked position.

    The paper predicts from T_v and T_t, two vectors, which cannot tell one position from another. We predict from the
    fused state of the position, to which T_v is added (`picture`), so that a locator without levels sees the picture
    too. `pooled` is the literal reading: one distribution over the vocabulary a caption, from cat(T_v, T_t), which
    every masked word of the caption is taken from, a bag of words.

    Args:
        width: D.
        vocabulary: number of words.
        form: `positions` or `pooled`.
        tied: a word embedding whose weights the last layer shares, as BERT's does.

    Raises:
        ValueError: For another form, or a `tied` embedding of another shape.
    """

    def __init__(
        self,
        width: int,
        vocabulary: int,
        *,
        form: str = "positions",
        picture: bool = True,
        tied: nn.Embedding | None = None,
    ):
        super().__init__()
        if form not in ("positions", "pooled"):
            raise ValueError(f"mlm is {form!r}; use 'positions' or 'pooled'")
        self.form, self.picture = form, picture
        self.mix = nn.Sequential(
            nn.Linear(2 * width if form == "pooled" else width, width), nn.GELU(), nn.LayerNorm(width)
        )
        self.predict = nn.Linear(width, vocabulary)
        if tied is not None:
            if tied.weight.shape != self.predict.weight.shape:
                raise ValueError(
                    f"the tied embedding is {tuple(tied.weight.shape)}, but {vocabulary} words of width "
                    f"{width} are asked for"
                )
            self.predict.weight = tied.weight

    def forward(
        self,
        words: Float[Tensor, "b n d"],
        picture: Float[Tensor, "b d"],
        text: Float[Tensor, "b d"],
        chosen: Bool[Tensor, "b n"],
    ) -> Float[Tensor, "m v"]:
        """Logits of the chosen positions, row by row of the batch."""
        row = chosen.nonzero()[:, 0]
        if self.form == "pooled":
            return self.predict(self.mix(torch.cat([picture, text], dim=-1)))[row]
        states = words[chosen]
        return self.predict(self.mix(states + picture[row] if self.picture else states))


def mlm(logits: Float[Tensor, "m v"], true: Int[Tensor, " m"]) -> Float[Tensor, ""]:
    """Eq. 7: cross-entropy, the mean over the masked words *of all processes*; 0 if there are none.

    Processes mask different numbers of words. Each divides by the mean number, so that the data-parallel mean of the
    gradients is that of the mean over all words.
    """
    count = over_processes(torch.tensor(float(len(true)), device=logits.device))
    return F.cross_entropy(wide(logits), true, reduction="sum") / count.clamp(min=1 / world()).to(
        wide(logits).dtype
    )
