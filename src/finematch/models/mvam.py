"""MVAM: Multi-View Attention Method for Fine-grained Image-Text Matching (arXiv 2402.17237, version 2).

In the paper's order: 3.1 two-stream model and its pooling, 3.2 objective, 3.3 multi-view attention,
3.4 diversity loss, 4.6.1 the ensemble control. The conversion of the paper that circulates lost its
formulas; the equations below are reconstructed from the text around them and from the works it cites
(Poly-encoders for the codes, DRSA for the square root). Every reading that could go either way is an
argument, declared in `MVAMConfig`.

Axes: `b` images or texts, `n` tokens (patches, regions or words), `v` views, `k` width of one view,
`d` width of the encoder's states, `D` width of the final representation.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from finematch.encoders import Tokens
from finematch.hub import Pretrained
from finematch.losses import LogitScale, contrastive, world
from finematch.models.configs import MVAMConfig


class Pooled(NamedTuple):
    """A representation, and the attention it came from (None for poolings without one)."""

    vector: Float[Tensor, "b D"]
    attention: Float[Tensor, "b v n"] | None = None


# ------------------------------------------------------------------------- 3.1 two-stream model, pooling
class TokenPooling(nn.Module):
    """Eq. 2 and 4: `R = tanh(W h + b)`, of one token (`cls`) or of the mean of the real tokens (`mean`).

    "+[CLS]" of the paper (4.3) with `source="cls"`. `source="mean"` is not in the paper: it is the baseline
    for encoders that were never trained to gather anything in their first token.
    """

    def __init__(self, width: int, total_dim: int = 1024, *, source: str = "cls"):
        super().__init__()
        if source not in ("cls", "mean"):
            raise ValueError(f"source is {source!r}; use 'cls' or 'mean'")
        self.source = source
        self.project = nn.Linear(width, total_dim)

    def forward(self, tokens: Tokens) -> Pooled:
        if self.source == "cls":
            h = tokens.pooled
        else:
            real = (tokens.mask & ~tokens.special).unsqueeze(-1)
            h = (tokens.states * real).sum(1) / real.sum(1).clamp(min=1)
        return Pooled(torch.tanh(self.project(h)))


# ------------------------------------------------------------------------- 3.3 multi-view attention
class ViewAttention(nn.Module):
    """Eq. 7-9: `v` learnable view codes are queries on the projected states; the weighted sums are concatenated.

        A = softmax_n(C K^T)        Eq. 7     "v k, b n v k -> b v n"
        r_v = sum_n A[v, n] K[n]    Eq. 8     "b v n, b n v k -> b v k"
        R = [r_1; ...; r_v]         Eq. 9     "b (v k)"

    K are the encoder's states after one linear layer: the paper projects before it attends (4.3, "+Attn").
    With one view this *is* "+Attn" (Table 4's first row equals Table 1's FRCNN +Attn to every digit).

    Args:
        width: d, of the encoder's states.
        views: number of view codes.
        total_dim: the D of `split`; the width of every view of `full`.
        projection: `split`: one d -> D layer, each view owns D / views of its columns (default: it alone
            agrees with one view = +Attn and with the ensemble of 16 x 64). `shared`: one d -> view_dim layer
            for all views, D = views * view_dim. `full`: one d -> total_dim layer for all views,
            D = views * total_dim.
        view_dim: k of `shared`.
        scoring: `dot`, `scaled` (divided by sqrt k) or `tanh` (tanh of the keys, as SAN).
        include_special: whether [IMG], [CLS], [SEP] can be attended.

    Raises:
        ValueError: If the views do not divide `total_dim` (`split`), or a switch is unknown.
    """

    def __init__(
        self,
        width: int,
        *,
        views: int = 16,
        total_dim: int = 1024,
        projection: str = "split",
        view_dim: int = 64,
        scoring: str = "dot",
        include_special: bool = True,
    ):
        super().__init__()
        if views < 1:
            raise ValueError(f"views = {views}: at least one is needed")
        if projection not in ("split", "shared", "full"):
            raise ValueError(f"projection is {projection!r}; use 'split', 'shared' or 'full'")
        if scoring not in ("dot", "scaled", "tanh"):
            raise ValueError(f"scoring is {scoring!r}; use 'dot', 'scaled' or 'tanh'")
        if projection == "split":
            if total_dim % views:
                raise ValueError(f"split: {views} views do not divide total_dim = {total_dim}")
            view_dim = total_dim // views
        elif projection == "full":
            view_dim = total_dim
        self.views, self.view_dim, self.projection = views, view_dim, projection
        self.scoring, self.include_special = scoring, include_special
        self.out_dim = views * view_dim
        self.project = nn.Linear(width, total_dim if projection == "split" else view_dim)
        self.codes = nn.Parameter(torch.randn(views, view_dim) / math.sqrt(view_dim))

    def forward(self, tokens: Tokens) -> Pooled:
        keys = self.project(tokens.states)
        attended = tokens.mask if self.include_special else tokens.mask & ~tokens.special
        if self.projection == "split":
            keys = keys.unflatten(-1, (self.views, self.view_dim))
            attention = self.attend("v k, b n v k -> b v n", keys, attended)
            answers = torch.einsum("bvn,bnvk->bvk", attention, keys)
        else:
            attention = self.attend("v k, b n k -> b v n", keys, attended)
            answers = torch.einsum("bvn,bnk->bvk", attention, keys)
        return Pooled(answers.flatten(1), attention)

    def attend(self, axes: str, keys: Tensor, attended: Bool[Tensor, "b n"]) -> Float[Tensor, "b v n"]:
        """Eq. 7, padding masked out."""
        asked = torch.tanh(keys) if self.scoring == "tanh" else keys
        logits = torch.einsum(axes.replace(" ", ""), self.codes, asked)
        if self.scoring == "scaled":
            logits = logits / math.sqrt(self.view_dim)
        return logits.masked_fill(~attended[:, None, :], float("-inf")).softmax(-1)


# ------------------------------------------------------------------------- 3.4 multi-view diversity loss
def diversity(
    attention: Float[Tensor, "b v n"],
    *,
    variant: str = "base",
    power: int = 2,
    reduce: str = "mean",
) -> Float[Tensor, ""]:
    """Eq. 10 (`base`): `|| A A^T - I ||_F`; Eq. 11 (`sqrt`): the same of the elementwise root of A.

    `base` is zero only for one-hot, disjoint views: it asks for sharpness as well. The diagonal of `sqrt`
    is one for any distribution, so it asks for disjoint views alone and leaves their size free.

    Args:
        power: 2 squares the norm (SAN's paper; default), 1 does not (DRSA's code).
        reduce: `mean` or `sum` over the batch.

    Raises:
        ValueError: For an unknown switch.
    """
    if variant not in ("base", "sqrt"):
        raise ValueError(f"variant is {variant!r}; use 'base' or 'sqrt'")
    if power not in (1, 2) or reduce not in ("mean", "sum"):
        raise ValueError(f"power is {power!r} (1 or 2), reduce is {reduce!r} ('mean' or 'sum')")
    attention = attention.float()
    if variant == "sqrt":
        # a root has no finite slope at zero; masked tokens are exactly zero
        attention = attention.clamp(min=torch.finfo(attention.dtype).tiny).sqrt()
    identity = torch.eye(attention.shape[1], device=attention.device)
    excess = torch.einsum("bvn,bwn->bvw", attention, attention) - identity
    squared = excess.square().sum((1, 2))
    per_item = squared if power == 2 else squared.clamp(min=1e-12).sqrt()
    # training in several processes averages their losses: the sum is over all items of the step
    return per_item.mean() if reduce == "mean" else per_item.sum() * world()


def view_statistics(
    attention: Float[Tensor, "b v n"], mask: Bool[Tensor, "b n"]
) -> tuple[Float[Tensor, " v"], Float[Tensor, "v v"]]:
    """What the diversity loss is meant to change: each view's entropy, and the overlap of every two views.

    Returns:
        entropy: mean over the items of H(A_v) / ln(number of real tokens), in [0, 1]; 1 is uniform. Items
            with a single token have no entropy to measure and are left out.
        overlap: mean over the items of sum_n sqrt(A_v[n] A_w[n]), the Bhattacharyya coefficient in [0, 1];
            1 on the diagonal. It is the matrix that Eq. 11 drives to the identity.
    """
    attention = attention.float()
    count = mask.sum(1).float()
    several = count > 1
    h = -(attention * attention.clamp(min=1e-30).log()).sum(-1)  # b v
    entropy = (h[several] / count[several].log()[:, None]).mean(0)
    root = attention.sqrt()
    return entropy, torch.einsum("bvn,bwn->bvw", root, root).mean(0)


# ------------------------------------------------------------------------- the whole model, 3.1 to 3.4
class MVAM(Pretrained, nn.Module):
    """A two-stream matcher: two towers, a pooling on each, cosine, and the loss of Eq. 12-13.

        L = L_c + weight * (L_div^image + L_div^text)

    The poolings `attention` and `mvam` are a `ViewAttention`. `attention`, the paper's +Attn, has one view and no
    diversity loss, though Eq. 10 of one view is not 0: the paper names none for it. The score of
    `normalise="per_view"` is the mean of the views' cosines.

    Args:
        vision, text: towers of `finematch.encoders` (anything that maps its keywords to `Tokens`).
    """

    def __init__(self, vision: nn.Module, text: nn.Module, config: MVAMConfig):
        super().__init__()
        c = self.config = config
        self.vision, self.text = vision, text
        self.views = c.views if c.pooling == "mvam" else 1

        def head(width: int) -> nn.Module:
            if c.pooling in ("cls", "mean"):
                return TokenPooling(width, c.total_dim, source=c.pooling)
            return ViewAttention(
                width, views=self.views, total_dim=c.total_dim, projection=c.projection, view_dim=c.view_dim,
                scoring=c.scoring, include_special=c.include_special,
            )  # fmt: skip

        self.image_pooling, self.text_pooling = head(vision.width), head(text.width)
        self.scale = LogitScale(c.tau)
        self.diversity = c.diversity if c.pooling == "mvam" else "none"

    def unit(self, vector: Float[Tensor, "b D"]) -> Float[Tensor, "b D"]:
        """Length one, so that a dot product is the matching score of 3.2."""
        if self.config.normalise == "per_view":
            vector = F.normalize(vector.unflatten(1, (self.views, -1)), dim=-1).flatten(1)
        return F.normalize(vector, dim=-1)

    def encode_image(self, **image) -> Pooled:
        """Unit vectors "b D" and attention "b v n" of a batch of pictures."""
        pooled = self.image_pooling(self.vision(**image))
        return Pooled(self.unit(pooled.vector), pooled.attention)

    def encode_text(self, **text) -> Pooled:
        """Unit vectors "b D" and attention "b v n" of a batch of captions."""
        pooled = self.text_pooling(self.text(**text))
        return Pooled(self.unit(pooled.vector), pooled.attention)

    def forward(self, batch: dict) -> dict[str, Tensor]:
        """Named terms of Eq. 13 for a batch of pairs: `image` and `text` (keywords of the towers), `image_id`."""
        image, text = self.encode_image(**batch["image"]), self.encode_text(**batch["text"])
        c = self.config
        ids = batch["image_id"] if c.same_picture_positives else None
        terms = {
            "contrastive": contrastive(
                image.vector, text.vector, self.scale(), image_id=ids, reduction=c.reduction
            )
        }
        terms["loss"] = terms["contrastive"]
        if self.diversity != "none":
            for name, attention in (("image", image.attention), ("text", text.attention)):
                terms[f"diversity_{name}"] = diversity(
                    attention, variant=self.diversity, power=c.diversity_power, reduce=c.diversity_reduce
                )
            total = terms["diversity_image"] + terms["diversity_text"]  # Eq. 12
            terms["loss"] = terms["contrastive"] + c.diversity_weight * total  # Eq. 13
        return terms


# ------------------------------------------------------------------------- 4.6.1 the ensemble control
def ensemble(members: list[Float[Tensor, "b k"]]) -> Float[Tensor, "b D"]:
    """Table 3's control: the unit vectors of independent models, concatenated and made unit again.

    Its cosine is the mean of the members' cosines.
    """
    return F.normalize(torch.cat(members, dim=-1), dim=-1)
