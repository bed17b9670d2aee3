"""Rivals that the papers name beside their own methods, each from its paper's formulas: PVSE, SCAN and SGRAF's SAF.

MVAM compares itself with PVSE, HSLM with SCAN and SGRAF (SAF is the half of SGRAF without a graph). They are here to be
compared with at equal means (`finematch.arena`): towers, objective, optimiser and batch are given by the recipe of the
method that a rival stands beside. What else is a rival's own (PVSE's two further losses, for one) stays its own; HSLM's
graph and word self-attention stay HSLM's. Published models, which are larger and trained for longer, are not what this
is.

* PVSE: Song and Soleymani, Polysemous Visual-Semantic Embedding for Cross-Modal Retrieval (CVPR 2019).
* SCAN: Lee et al., Stacked Cross Attention for Image-Text Matching (ECCV 2018), text to image.
* SAF: Diao et al., Similarity Reasoning and Filtration for Image-Text Matching (AAAI 2021), section 3.3.

Axes: `b` images, `c` captions, `p` pairs, `n` regions, `l` words, `k` embeddings, `d` width, `s` width of a similarity
vector; `g` images of a tile. An axis `#g` is `g`, or 1 where all images of the tile share it.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from finematch.encoders import Tokens
from finematch.evaluation.cross_attention import SLOPE, text_to_image
from finematch.losses import wide
from finematch.training import to_device

TILE = 4096  # pairs of a word and an image that SAF scores at a time where no gradient is needed


class Rival(nn.Module):
    """Two towers, a score of every image with every caption, and the objective of the method that it stands beside.

    Args:
        vision, text: towers of `finematch.encoders`.
        objective: takes the model, the encoded images and captions of a batch of pairs, and which of them are of one
            image; gives the named terms of the loss.

    Attributes:
        together: the scores of a batch are only to be had all at once, so a hinge differentiates all of them. Without
            it `pairs` gives the score of any pairs, and only the hardest ones carry a gradient.
    """

    together = True

    def __init__(self, vision: nn.Module, text: nn.Module, objective: nn.Module):
        super().__init__()
        self.vision, self.text, self.objective = vision, text, objective

    def bounded(self, scores: Tensor) -> Tensor:
        """The score as a hinge with a margin compares it: itself, where it is made of cosines."""
        return scores

    def prepare(self, image):
        """Encoded images with all that is computed of them once, before they meet a caption."""
        return image

    def more(self, image, text) -> dict[str, tuple[float, Tensor]]:
        """Further terms of the rival's own loss by name: weight and value."""
        return {}

    def forward(self, batch: dict) -> dict[str, Tensor]:
        """Named terms of the loss of a batch of pairs: `image` and `text` (keywords of the towers), `image_id`."""
        image, text = self.encode_image(**batch["image"]), self.encode_text(**batch["text"])
        ids = batch["image_id"]
        terms = self.objective(self, image, text, ids[:, None] == ids[None, :])
        for name, (weight, value) in self.more(image, text).items():
            terms |= {name: value, "loss": terms["loss"] + weight * value}
        return terms

    def encoded(self, image: dict, text: dict) -> tuple:
        """Pairs of images and captions (keywords of the towers), encoded where the model is."""
        device = next(self.parameters()).device
        return self.encode_image(**to_device(image, device)), self.encode_text(**to_device(text, device))


# ------------------------------------------------------------------------------------------- PVSE
class Instances(NamedTuple):
    """The `k` embeddings of each item, as unit vectors; what each attended to; and what it added to the global one."""

    vectors: Float[Tensor, "b k d"]
    attention: Float[Tensor, "b k n"]
    residual: Float[Tensor, "b k d"]

    def __getitem__(self, index) -> Instances:
        return Instances(*(part[index] for part in self))


class PolysemousEmbedding(nn.Module):
    """One side of PVSE (3.1): `k` embeddings of an item, each its global vector and what one attention adds to it.

        A   = softmax_n(W_2 tanh(W_1 X))       "b k n"
        u_k = sigmoid(W_3 A_k X + b_3)         the residual
        z_k = LayerNorm(phi + u_k), made unit

    phi is a linear layer of the mean of the real tokens (`pooled=False`, images) or of the tower's pooled token (texts:
    the last state of the GRU). The paper's text attends to word embeddings; here it attends to the states of the GRU,
    as MVAM's views do. As in the public code, W_1 halves the width.
    """

    def __init__(self, width: int, dim: int, embeddings: int, *, pooled: bool):
        super().__init__()
        self.pooled = pooled
        self.whole = nn.Linear(width, dim)
        self.hidden = nn.Linear(width, width // 2, bias=False)
        self.codes = nn.Linear(width // 2, embeddings, bias=False)
        self.part = nn.Linear(width, dim)
        self.norm = nn.LayerNorm(dim)

    def forward(self, tokens: Tokens) -> Instances:
        real = tokens.mask & ~tokens.special
        logits = self.codes(torch.tanh(self.hidden(tokens.states))).mT  # b k n
        attention = logits.masked_fill(~real[:, None], float("-inf")).softmax(-1)
        residual = torch.sigmoid(self.part(attention @ tokens.states))
        mean = (tokens.states * real[..., None]).sum(1) / real.sum(1, keepdim=True)
        whole = self.whole(tokens.pooled if self.pooled else mean)
        return Instances(F.normalize(self.norm(whole[:, None] + residual), dim=-1), attention, residual)


class PVSE(Rival):
    """Several embeddings of each image and of each caption; the best pair of them is the score (3.2).

        S = max_{j, k} cosine of z_j of the image and z_k of the caption
        L = objective(S) + diversity_weight (L_div of images + of captions) + mmd_weight L_mmd

    L_div keeps an item's residuals apart, L_mmd the two modalities together; weights of the public code's recipe. The
    paper's objective is a hinge; ours is the one that is given, for MVAM's own is a contrast.
    """

    def __init__(
        self,
        vision: nn.Module,
        text: nn.Module,
        objective: nn.Module,
        *,
        dim: int = 512,
        embeddings: int = 2,
        diversity_weight: float = 0.1,
        mmd_weight: float = 0.01,
    ):
        super().__init__(vision, text, objective)
        self.image_side = PolysemousEmbedding(vision.width, dim, embeddings, pooled=False)
        self.text_side = PolysemousEmbedding(text.width, dim, embeddings, pooled=True)
        self.diversity_weight, self.mmd_weight = diversity_weight, mmd_weight

    def encode_image(self, **image) -> Instances:
        return self.image_side(self.vision(**image))

    def encode_text(self, **text) -> Instances:
        return self.text_side(self.text(**text))

    def scores(self, image: Instances, text: Instances) -> Float[Tensor, "b c"]:
        rows, columns = image.vectors.flatten(0, 1), text.vectors.flatten(0, 1)  # one product for all
        with torch.autocast(rows.device.type, enabled=False):
            products = wide(rows) @ wide(columns).T
        each = products.unflatten(0, (len(image.vectors), -1)).unflatten(2, (len(text.vectors), -1))
        return each.amax((1, 3))

    def more(self, image: Instances, text: Instances) -> dict[str, tuple[float, Tensor]]:
        apart = spread(image.residual) + spread(text.residual)
        together = discrepancy(image.vectors.flatten(0, 1), text.vectors.flatten(0, 1))
        return {"diversity": (self.diversity_weight, apart), "discrepancy": (self.mmd_weight, together)}

    def attend(self, image: dict, text: dict) -> Float[Tensor, "p l n"]:
        """Attention of the best pair of embeddings, word by region. Every word of a caption has the same regions: an
        embedding attends without regard to the other side."""
        i, t = self.encoded(image, text)
        best = torch.einsum("pjd,pkd->pjk", i.vectors, t.vectors).flatten(1).argmax(1)
        rows, k = torch.arange(len(best), device=best.device), t.vectors.shape[1]
        on_image = i.attention[rows, best // k][:, -image["features"].shape[1] :]  # without [IMG]
        return torch.einsum("pl,pn->pln", t.attention[rows, best % k], on_image)


def spread(residual: Float[Tensor, "b k d"]) -> Float[Tensor, ""]:
    """L_div of PVSE (3.3): the norm of the cosines of an item's residuals with one another, over k^2."""
    unit = F.normalize(residual, dim=-1)
    cosines = unit @ unit.mT
    others = ~torch.eye(cosines.shape[1], dtype=torch.bool, device=cosines.device)
    # a root has no finite slope at zero, which is where one embedding has no others
    return (cosines * others).square().sum((1, 2)).clamp(min=1e-12).sqrt().mean() / cosines.shape[1] ** 2


def discrepancy(x: Float[Tensor, "m d"], y: Float[Tensor, "m d"]) -> Float[Tensor, ""]:
    """L_mmd of PVSE (3.3): maximum mean discrepancy. The kernel is the public code's exp(-|x - y| / 2), whose distance
    is not squared."""
    near = lambda a, b: torch.exp(-0.5 * torch.cdist(a, b)).mean()  # noqa: E731
    return near(x, x) - 2 * near(x, y) + near(y, y)


# ------------------------------------------------------------------------------------------- SCAN and SAF
class LinearTower(nn.Module):
    """The image side of SCAN and SAF, and of HSLM before its graph (`hslm.RegionEncoder`): one linear layer. The model
    makes its vectors unit. In training an image loses a share of the channels, as there (H27)."""

    def __init__(self, input_dim: int, *, width: int, input_dropout: float = 0.0):
        super().__init__()
        self.width, self.input_dropout = width, input_dropout
        self.project = nn.Linear(input_dim, width)

    def forward(
        self, features: Float[Tensor, "b n e"], mask: Bool[Tensor, "b n"], places: Tensor | None = None
    ) -> Tokens:
        """Where regions lie (`places`, which batches of boxes have) is not read, as in HSLM."""
        if self.training and self.input_dropout > 0:
            features = features * F.dropout(torch.ones_like(features[:, :1]), self.input_dropout)
        states = self.project(features)
        return Tokens(states, mask, torch.zeros_like(mask), states[:, 0])  # whose pooled state nothing reads


class Fragments(NamedTuple):
    """Regions or words as unit vectors, which are real, and (SAF) one vector of all; real words come first. `prepare`
    adds the dot products of an image's regions."""

    states: Float[Tensor, "b n d"]
    mask: Bool[Tensor, "b n"]
    vector: Float[Tensor, "b d"] | None = None
    gram: Float[Tensor, "b n n"] | None = None

    def __getitem__(self, index) -> Fragments:
        return Fragments(*(None if part is None else part[index] for part in self))


def word_attention(
    regions: Float[Tensor, "g n d"],
    there: Bool[Tensor, "g n"],
    words: Float[Tensor, "#g c l d"],
    real: Bool[Tensor, "#g c l"],
    temperature: float = 9.0,
) -> Float[Tensor, "g c l n"]:
    """SCAN's attention of words on regions (its Eq. 1 to 3 from the words' side), which SAF takes over.

    c_nl = cosine of region n and word l, cut at zero (the public code keeps a tenth of what is negative)
    w_ln = softmax_n(temperature c_nl / |c_n|), |.| over the words of the caption
    """
    if len(words) == 1:  # one product for all images
        dots = (words[0].flatten(0, 1) @ regions.flatten(0, 1).T).unflatten(1, regions.shape[:2])
        dots = dots.unflatten(0, words.shape[1:3]).permute(2, 0, 1, 3)
    else:
        dots = torch.einsum("gcld,gnd->gcln", words, regions)
    cut = F.leaky_relu(dots, SLOPE) * real[..., None]
    cut = cut / torch.linalg.vector_norm(cut, dim=2, keepdim=True).clamp(min=1e-8)
    return (temperature * cut).masked_fill(~there[:, None, None], float("-inf")).softmax(-1)


def unit_tokens(tokens: Tokens, *, special: bool) -> tuple[Tensor, Tensor]:
    """States as unit vectors, and which of them count: `special` says whether [CLS] and [SEP] do."""
    return F.normalize(tokens.states, dim=-1), tokens.mask if special else tokens.mask & ~tokens.special


class SCAN(Rival):
    """Stacked cross attention, text to image: each word attends to the regions and is compared with what it finds.

        a_l = sum_n w_ln v_n                        `word_attention`
        S   = log(sum_l exp(6 cosine of word l and a_l)) / 6        (LSE, Eq. 5)

    [CLS] and [SEP] count as words, as the start and end of the public loader do.
    """

    together = False

    def encode_image(self, **image) -> Fragments:
        return Fragments(*unit_tokens(self.vision(**image), special=False))

    def encode_text(self, **text) -> Fragments:
        return Fragments(*unit_tokens(self.text(**text), special=True))

    def scores(self, image: Fragments, text: Fragments) -> Float[Tensor, "b c"]:
        tile = 16 * TILE if torch.is_grad_enabled() else TILE  # a few large tiles make a short graph
        return text_to_image(
            image.states, text.states, text.mask, there=image.mask, tile=tile, gram=image.gram
        )

    def prepare(self, image: Fragments) -> Fragments:
        return image._replace(gram=image.states @ image.states.mT)

    def pairs(self, image: Fragments, text: Fragments) -> Float[Tensor, " p"]:
        """Scores pair by pair."""
        near = F.cosine_similarity(text.states, self.weights(image, text) @ image.states, dim=-1)
        return (6.0 * near).masked_fill(~text.mask, float("-inf")).logsumexp(1) / 6.0

    def weights(self, image: Fragments, text: Fragments) -> Float[Tensor, "p l n"]:
        """`word_attention` of each image with its caption."""
        return word_attention(image.states, image.mask, text.states[:, None], text.mask[:, None])[:, 0]

    def attend(self, image: dict, text: dict) -> Float[Tensor, "p l n"]:
        """The attention of every word of a caption on the regions of its image."""
        i, t = self.encoded(image, text)
        return (self.weights(i, t) * t.mask[..., None])[..., -image["features"].shape[1] :]  # without [IMG]


class GlobalVector(nn.Module):
    """SGRAF's global representation (3.1), which HSLM's 3.5 takes over: the mean asks, the parts answer, their weighted
    sum is made unit.

        w = softmax_n(v . (tanh(W_l x_n) * tanh(W_g mean x)))

    Without the public code's dropout, and without its batch norm over a fixed number of regions.
    """

    def __init__(self, width: int):
        super().__init__()
        self.local, self.query = nn.Linear(width, width), nn.Linear(width, width)
        self.vote = nn.Linear(width, 1, bias=False)  # a softmax takes no notice of a bias

    def forward(self, parts: Float[Tensor, "b n d"], mask: Bool[Tensor, "b n"]) -> Float[Tensor, "b d"]:
        mean = (parts * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
        answer = self.vote(torch.tanh(self.local(parts)) * torch.tanh(self.query(mean))[:, None])[..., 0]
        weights = answer.masked_fill(~mask, float("-inf")).softmax(-1)
        return F.normalize(torch.einsum("bn,bnd->bd", weights, parts), dim=-1)


class SAF(SCAN):
    """Similarity attention filtration: a similarity vector for each word and one for the whole, weighted and summed.

        a_l = sum_n w_ln v_n, made unit                                   as SCAN
        s_l = W_l |a_l - t_l|^2 / |.|,  s_0 = W_g |v^ - t^|^2 / |.|       Eq. 2 to 5; v^, t^ of `GlobalVector`
        b_m = sigmoid(BN(w . s_m)) / sum of the same                      Eq. 10
        S   = FC(sum_m b_m s_m, made unit)                                Eq. 11; the logit

    The hinge compares sigmoid(S), as the paper's does; images are ranked by the logit, whose order is the same. The
    batch norm has the statistics of all real nodes of a batch of pairs (the public code's: of one caption's). So the
    scores of a batch belong together, and the hinge differentiates all of them.
    """

    together = True

    def __init__(self, vision: nn.Module, text: nn.Module, objective: nn.Module, *, sim: int = 256):
        super().__init__(vision, text, objective)
        width = vision.width
        if text.width != width:
            raise ValueError(
                f"regions have {width} columns, words {text.width}: SAF compares them one by one"
            )
        self.image_vector, self.text_vector = GlobalVector(width), GlobalVector(width)
        self.compare_local = nn.Linear(width, sim, bias=False)
        self.compare_global = nn.Linear(width, sim, bias=False)
        self.gate, self.norm = nn.Linear(sim, 1), nn.BatchNorm1d(1)
        self.score = nn.Linear(sim, 1)

    def encode_image(self, **image) -> Fragments:
        regions, mask, *_ = super().encode_image(**image)
        return Fragments(regions, mask, self.image_vector(regions, mask))

    def encode_text(self, **text) -> Fragments:
        words, mask, *_ = super().encode_text(**text)
        return Fragments(words, mask, self.text_vector(words, mask))

    def prepare(self, image: Fragments) -> Fragments:
        return image  # its attention needs no dot products of regions

    def bounded(self, scores: Tensor) -> Tensor:
        return torch.sigmoid(scores)

    def nodes(
        self,
        image: Fragments,
        words: Float[Tensor, "#g c l d"],
        real: Bool[Tensor, "#g c l"],
        vector: Float[Tensor, "#g c d"],
    ) -> Float[Tensor, "g c 1+l s"]:
        """Similarity vectors of `g` images with `c` captions each: of the whole, then of each word."""
        weights = word_attention(image.states, image.mask, words, real)
        found = F.normalize((weights.flatten(1, 2) @ image.states).view(*weights.shape[:3], -1), dim=-1)
        local = F.normalize(self.compare_local((found - words).square()), dim=-1)
        whole = F.normalize(self.compare_global((image.vector[:, None] - vector).square()), dim=-1)
        return torch.cat([whole[:, :, None], local], 2)

    def filtered(
        self,
        nodes: Float[Tensor, "g c m s"],
        gate: Float[Tensor, "g c m"],
        counted: Bool[Tensor, "g c m"] | None,
    ) -> Float[Tensor, "g c"]:
        """Logits, of nodes and their gates after the batch norm; without `counted` all nodes are real."""
        share = torch.sigmoid(gate) if counted is None else torch.sigmoid(gate) * counted
        share = share / share.sum(2, keepdim=True)
        return self.score(F.normalize(torch.einsum("gcm,gcms->gcs", share, nodes), dim=-1))[..., 0]

    def scores(self, image: Fragments, text: Fragments) -> Float[Tensor, "b c"]:
        """In groups of captions of one length: no padding is computed. In training the batch norm sees all groups at
        once, else they are cut into tiles."""
        lengths, groups = text.mask.sum(1), []
        for length in lengths.unique().tolist():
            of = (lengths == length).nonzero().squeeze(1)
            groups += [of] if self.training else of.split(max(1, TILE // (4 * length)))
        columns = torch.cat(groups).argsort()

        def parts(of: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            some, length = text[of], int(lengths[of[0]])
            return some.states[None, :, :length], some.mask[None, :, :length], some.vector[None]

        if self.training:
            nodes = [self.nodes(image, *parts(of)) for of in groups]
            gates = [self.gate(each)[..., 0] for each in nodes]
            normed = self.normed(torch.cat([gate.flatten() for gate in gates]))
            normed = normed.split([gate.numel() for gate in gates])
            found = [self.filtered(each, new.view_as(old), None)
                     for each, new, old in zip(nodes, normed, gates, strict=True)]  # fmt: skip
            return torch.cat(found, 1)[:, columns]
        found = []
        for of in groups:
            size = max(1, TILE // (int(lengths[of[0]]) * len(of)))
            tiles = (self.nodes(image[k : k + size], *parts(of)) for k in range(0, len(image.states), size))
            rows = [self.filtered(each, self.normed(self.gate(each)[..., 0]), None) for each in tiles]
            found.append(torch.cat(rows))
        return torch.cat(found, 1)[:, columns]

    def normed(self, gate: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        """Gates after the batch norm."""
        return self.norm(gate.reshape(-1, 1)).view_as(gate)

    def pairs(self, image: Fragments, text: Fragments) -> Float[Tensor, " p"]:
        real = text.mask[:, None]
        nodes = self.nodes(image, text.states[:, None], real, text.vector[:, None])
        gate, counted = self.normed(self.gate(nodes)[..., 0]), F.pad(real, (1, 0), value=True)
        return self.filtered(nodes, gate, counted)[:, 0]
