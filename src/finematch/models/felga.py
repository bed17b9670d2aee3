"""FELGA: Unsupervised Fragment Embedding for Fine-Grained Cross-Modal Association (Zhuo and Li, WACV 2024).

In the paper's order: 3.2.2 fragment pseudo-labels, 3.2.3 global pseudo-labels, 3.2.4 FENet and the losses, then
pairs of fragment features as training batches. Proposals (3.2.1) and their features from a frozen vision-language
model (Eq. 2) are made elsewhere and arrive here as arrays. Every reading that could go either way is a setting,
declared in `FELGAConfig`.

Axes: `p` all pairs, `b` pictures of a batch, `c` texts of a batch (pair n is picture n and text n), `r` region
proposals of a picture, `k` keywords of a text, `i` = (b r) regions of a batch, `j` = (c k) keywords of a batch,
`d` width.
"""

from __future__ import annotations

from copy import copy

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.utils.data import Dataset

from finematch.hub import Pretrained
from finematch.losses import gather
from finematch.models.configs import FELGAConfig

LABELS = ("dense", "sparse", "dynamic")


# ------------------------------------------------------------------------- 3.2.2 fragment pseudo-labels
def cosine(regions: Float[Tensor, "b r d"], words: Float[Tensor, "b k d"]) -> Float[Tensor, "b r k"]:
    """d of Eq. 4-6 inside each pair, in fp32: "b r d, b k d -> b r k"."""
    return torch.einsum(
        "brd,bkd->brk", F.normalize(regions.float(), dim=-1), F.normalize(words.float(), dim=-1)
    )


def real_pairs(region_mask: Bool[Tensor, "b r"], word_mask: Bool[Tensor, "b k"]) -> Bool[Tensor, "b r k"]:
    """Region-keyword pairs of the same picture and text that are no padding."""
    return region_mask[:, :, None] & word_mask[:, None, :]


def dense(real: Bool[Tensor, "b r k"]) -> Bool[Tensor, "b r k"]:
    """Eq. 3: every fragment of a picture goes with every fragment of its text."""
    return real


def sparse(similarity: Float[Tensor, "b r k"], real: Bool[Tensor, "b r k"]) -> Bool[Tensor, "b r k"]:
    """Eq. 4: each keyword goes with the one region most similar to it, the first of equals.

    The paper's Eq. 4 would label all of several equal maxima; we take the first, because two equal maxima are two
    copies of one proposal (F8).
    """
    best = similarity.masked_fill(~real, float("-inf")).argmax(1)  # b k
    return F.one_hot(best, similarity.shape[1]).transpose(1, 2).bool() & real


def dynamic(similarity: Float[Tensor, "b r k"], real: Bool[Tensor, "b r k"]) -> Bool[Tensor, "b r k"]:
    """Eq. 5-6: the pairs at least as similar as the mean of all of their picture and text."""
    count = real.sum((1, 2), keepdim=True).clamp(min=1)
    mean = similarity.masked_fill(~real, 0).sum((1, 2), keepdim=True) / count  # Eq. 5
    # a rounded mean can exceed the maximum where all are equal; the true one cannot
    largest = similarity.masked_fill(~real, float("-inf")).amax((1, 2), keepdim=True)
    return (similarity >= torch.minimum(mean, largest)) & real


def batch_labels(
    labels: Bool[Tensor, "b r k"], keyword_id: Int[Tensor, "b k"] | None = None
) -> Bool[Tensor, "b r b k"]:
    """The matrix of Eq. 3-6 for a whole batch: the pairs' own labels, and 0 between pairs.

    Args:
        keyword_id: If given, equal numbers are equal keywords: a region that goes with a keyword of its own text
            also goes with the same keyword of any other text (F10). Padding may have any number.
    """
    if keyword_id is not None:
        same = keyword_id[:, :, None, None] == keyword_id[None, None]  # own keyword l against c k
        return torch.einsum("brl,blck->brck", labels.float(), same.float()) > 0
    own = torch.eye(len(labels), dtype=torch.bool, device=labels.device)
    return labels[:, :, None, :] & own[:, None, :, None]


# ------------------------------------------------------------------------- 3.2.3 global pseudo-labels
def global_labels(n: int, device: torch.device | None = None) -> Bool[Tensor, "b b"]:
    """Eq. 7: picture k goes with text k alone."""
    return torch.eye(n, dtype=torch.bool, device=device)


# ------------------------------------------------------------------------- 3.2.4 FENet, affinities, losses
class FENet(nn.Sequential):
    """Eq. 8: d -> 4096 -> 4096 -> 512, ReLU and dropout between, then length one (4.5).

    With d = 512 these are 21.0 M parameters. With `activation="every"` ReLU and dropout follow the last layer too: then
    Eq. 9's cosine lies in [0, 1], as printed (F7).
    """

    def __init__(
        self,
        width: int,
        *,
        hidden_dim: int = 4096,
        out_dim: int = 512,
        dropout: float = 0.2,
        activation: str = "between",
    ):
        last = [nn.ReLU(inplace=True), nn.Dropout(dropout)] if activation == "every" else []
        super().__init__(
            nn.Linear(width, hidden_dim), nn.ReLU(inplace=True), nn.Dropout(dropout),
            nn.Linear(hidden_dim, hidden_dim), nn.ReLU(inplace=True), nn.Dropout(dropout),
            nn.Linear(hidden_dim, out_dim), *last,
        )  # fmt: skip

    def forward(self, features: Float[Tensor, "*n d"]) -> Float[Tensor, "*n e"]:
        """Unit vectors in fp32, whatever the precision of the products."""
        return F.normalize(super().forward(features).float(), dim=-1)


def affinity(regions: Float[Tensor, "b r d"], words: Float[Tensor, "c k d"]) -> Float[Tensor, "b r c k"]:
    """Eq. 9 of unit vectors: "b r d, c k d -> b r c k".

    The paper gives the range [0, 1]; a cosine has [-1, 1], and nothing in FENet's output forbids the rest (F7).
    """
    (b, r), (c, k) = regions.shape[:2], words.shape[:2]
    return (regions.flatten(0, 1) @ words.flatten(0, 1).T).view(b, r, c, k)


def global_affinity(
    similarity: Float[Tensor, "b r c k"], real: Bool[Tensor, "b r c k"]
) -> tuple[Float[Tensor, "b c"], Bool[Tensor, "b c"]]:
    """Eq. 11: a picture and a text are as similar as their most similar fragments.

    Returns:
        The maxima, and which of them there are: a picture without regions, or a text without keywords, has none
        (and 0 in its place). The gradient of a maximum goes to one pair of fragments.
    """
    similarity, real = similarity.transpose(1, 2).flatten(2), real.transpose(1, 2).flatten(2)
    known = real.any(-1)
    largest = similarity.masked_fill(~real, float("-inf")).max(-1).values
    return largest.masked_fill(~known, 0.0), known


def share_keyword(keyword_id: Int[Tensor, "b k"], mask: Bool[Tensor, "b k"]) -> Bool[Tensor, "b b"]:
    """Which texts have a keyword in common, themselves included (F26). Padding has none."""
    same = keyword_id[:, :, None, None] == keyword_id[None, None]
    return (same & mask[:, :, None, None] & mask[None, None]).any(3).any(1)


def lifted(
    similarity: Float[Tensor, "i j"],
    positive: Bool[Tensor, "i j"],
    valid: Bool[Tensor, "i j"],
    *,
    margin: float = 0.5,
    loss: str = "anchor",
    hinge: bool = False,
    tau: float = 1.0,
    empty: str = "skip",
    literal_scale: bool = False,
) -> Float[Tensor, ""]:
    """Eq. 10 (of fragments) and Eq. 12 (of pictures and texts), after the lifted structured losses.

    P are the positives among the `valid` places, N the others. As printed nothing inside the outer sums depends
    on their indices, so the paper's formula is a constant times one number (`batch`); we read a sum over anchors
    (`anchor`), because that is the form of the generalised lifted structured loss.

        anchor  mean over the rows i of  log sum_{j in P(i)} e^(margin - d_ij) + log sum_{j in N(i)} e^d_ij,
                the same over the columns, and the mean of both
        batch   log sum_P e^(margin - d) + log sum_N e^d, over all places at once
        pair    mean over P of  J_ij = margin - d_ij + log(sum_{l in N(i)} e^d_il + sum_{l in N(j)} e^d_lj),
                Song et al.'s original

    `margin` (lambda_1, lambda_2) leaves each log-sum as a summand: without `hinge` it moves no gradient.

    Args:
        hinge: [.]_+ of each anchor (or of the batch); in `pair`, as in the original, the mean of [J]_+^2 / 2.
        tau: temperature: d and `margin` are divided by it. 1 is the paper's.
        empty: an anchor without positives or without negatives is left out (`skip`), or counts with the summand
            that it has (`keep`). The mean is over the anchors that count; without any the loss is 0. `skip`
            is the default because with sparse labels half of the rows and more are empty: kept, they push every region
            away from every keyword. `pair` leaves out positives without any negative.
        literal_scale: `batch` times the number of rows and of columns, as the outer sums have it.

    Raises:
        ValueError: For an unknown switch, or a temperature that is not positive.
    """
    _known(loss=(loss, ("anchor", "batch", "pair")), empty=(empty, ("skip", "keep")))
    if tau <= 0:
        raise ValueError(f"tau = {tau}: must be positive")
    if literal_scale and loss != "batch":
        raise ValueError(f"literal_scale is the scale of loss='batch'; loss is {loss!r}")
    positive, negative = positive & valid, valid & ~positive
    # the smallest finite number, not minus infinity: the gradient of an empty log-sum would be NaN
    lowest = torch.finfo(similarity.dtype).min
    pull = (margin - similarity) / tau
    near, far = pull.masked_fill(~positive, lowest), (similarity / tau).masked_fill(~negative, lowest)
    if loss == "pair":
        counts = positive & (negative.any(1)[:, None] | negative.any(0)[None, :])
        each = pull + torch.logaddexp(far.logsumexp(1)[:, None], far.logsumexp(0)[None, :])
        each = each.relu().square() / 2 if hinge else each
        return torch.where(counts, each, 0).sum() / counts.sum().clamp(min=1)

    def over(dim: int, near: Tensor, far: Tensor, positive: Tensor, negative: Tensor) -> Tensor:
        has_near, has_far = positive.any(dim), negative.any(dim)
        each = torch.where(has_near, near.logsumexp(dim), 0) + torch.where(has_far, far.logsumexp(dim), 0)
        each = each.relu() if hinge else each
        counts = has_near & has_far if empty == "skip" else has_near | has_far
        return torch.where(counts, each, 0).sum() / counts.sum().clamp(min=1)

    places = (near, far, positive, negative)
    if loss == "anchor":
        return (over(1, *places) + over(0, *places)) / 2
    total = over(1, *(x.reshape(1, -1) for x in places))
    return total * valid.any(1).sum() * valid.any(0).sum() if literal_scale else total


class FELGA(Pretrained, nn.Module):
    """FENet and its training by Eq. 13: `L = L_con_l + lambda3 * L_con_g`.

    The pseudo-labels are `dynamic` (FELGA), `sparse` or `dense`: Tables 1-3 and 5. The alignment is `both`, `local`
    (Eq. 13 without its second term, as lambda3 = 0) or `global` (without its first): Table 4. The similarities of Eq.
    4-6 (`label_features`) are those of the `frozen` features, which never change, or those of the current embeddings
    (`online`). FENet takes the frozen features at length one (`input_scale` `unit`), at length sqrt(d), so that the
    mean square of an entry is one (`rms`). The form of the loss holds for both levels, see
    `lifted`; without `hinge` the margins lambda1 and lambda2 change the loss by a constant and no gradient at all. With
    `same_keyword_positives` or a global loss with `global_negatives="distinct"` batches need `keyword_id`, see
    `batch_labels`. The paper takes all other texts as negatives of Eq. 12; we leave out those that share a keyword with
    the picture's own, because the best fragments of such a pair often belong together.

    Args:
        width: of the frozen features (CLIP 512, BLIP and BLIP-2 256).
        text_width: of the keywords' features where it differs: `separate` with `dense` or `online` labels only.

    Raises:
        ValueError: For settings or widths that do not go together.
    """

    def __init__(self, width: int, config: FELGAConfig, *, text_width: int | None = None):
        super().__init__()
        c = self.config = config
        text_width = text_width or width
        if text_width != width and c.fenet == "shared":
            raise ValueError(
                f"regions are {width} wide, keywords {text_width}: one FENet cannot take both; use fenet='separate'"
            )
        compared = c.labels != "dense" and c.label_features == "frozen" and c.alignment != "global"
        if text_width != width and compared:
            raise ValueError(
                f"regions are {width} wide, keywords {text_width}: frozen features have no cosine; "
                "use label_features='online'"
            )
        form = {name: getattr(c, name) for name in ("hidden_dim", "out_dim", "dropout", "activation")}
        self.region_net = FENet(width, **form)
        self.word_net = FENet(text_width, **form) if c.fenet == "separate" else self.region_net
        self.form = {
            "loss": c.loss,
            "hinge": c.hinge,
            "tau": c.tau,
            "empty": c.empty,
            "literal_scale": c.literal_scale,
        }
        lifted(
            torch.zeros(1, 1), *torch.ones(2, 1, 1, dtype=torch.bool), **self.form
        )  # refuses what does not go together

    def encode_regions(self, features: Float[Tensor, "*n d"]) -> Float[Tensor, "*n e"]:
        """f-hat of Eq. 8, unit vectors, of regions given by their frozen features."""
        return self.region_net(self._input(features))

    def encode_words(self, features: Float[Tensor, "*n d"]) -> Float[Tensor, "*n e"]:
        """f-hat of Eq. 8, unit vectors, of keywords (or class names) given by their frozen features."""
        return self.word_net(self._input(features))

    def _input(self, features: Tensor) -> Tensor:
        unit = F.normalize(features.float(), dim=-1)
        return unit * features.shape[-1] ** 0.5 if self.config.input_scale == "rms" else unit

    def encode(
        self, regions: Float[Tensor, "b r d"], words: Float[Tensor, "b k w"]
    ) -> tuple[Float[Tensor, "b r e"], Float[Tensor, "b k e"]]:
        """Both modalities; a shared FENet sees them as one batch, so that its weights are read once."""
        if self.word_net is not self.region_net:
            return self.encode_regions(regions), self.encode_words(words)
        b, r, k = len(regions), regions.shape[1], words.shape[1]
        both = self.encode_regions(torch.cat([regions.flatten(0, 1), words.flatten(0, 1)]))
        return both[: b * r].unflatten(0, (b, r)), both[b * r :].unflatten(0, (b, k))

    def pseudo_labels(
        self,
        regions: Float[Tensor, "b r d"],
        words: Float[Tensor, "b k w"],
        region_mask: Bool[Tensor, "b r"],
        word_mask: Bool[Tensor, "b k"],
    ) -> Bool[Tensor, "b r k"]:
        """Eq. 3, 4 or 6 inside each pair, from whichever features are given."""
        real = real_pairs(region_mask, word_mask)
        if self.config.labels == "dense":
            return dense(real)
        return {"sparse": sparse, "dynamic": dynamic}[self.config.labels](cosine(regions, words), real)

    def forward(self, batch: dict) -> dict[str, Tensor]:
        """The terms of Eq. 13 that are switched on, `fragment` (Eq. 10) and `global` (Eq. 12), and `loss`.

        Args:
            batch: `image` and `text`, each with `features` "b r d" or "b k d" and `mask`; `text` also with
                `keyword_id` "b k" for the settings that compare keywords. What padding holds does not matter.
        """
        image, text = batch["image"], batch["text"]
        region_mask, word_mask = image["mask"], text["mask"]
        # padding may hold anything, NaN too, and zero times NaN would reach the weights' gradients
        frozen_regions = image["features"].masked_fill(~region_mask[..., None], 0.0)
        frozen_words = text["features"].masked_fill(~word_mask[..., None], 0.0)
        regions, words = self.encode(frozen_regions, frozen_words)
        # cosines, exponents and their sums in fp32, whatever FENet's products were computed in
        with torch.autocast(regions.device.type, enabled=False), torch.no_grad():
            if self.config.alignment != "global":
                source = (
                    (regions, words)
                    if self.config.label_features == "online"
                    else (frozen_regions, frozen_words)
                )
                own = gather(self.pseudo_labels(*source, region_mask, word_mask))
                ids = gather(text["keyword_id"]) if self.config.same_keyword_positives else None
                labels = batch_labels(own, ids)
            region_mask, word_mask = gather(region_mask), gather(word_mask)
            real = region_mask[:, :, None, None] & word_mask[None, None]
        terms = {}
        with torch.autocast(regions.device.type, enabled=False):
            similarity = affinity(gather(regions), gather(words))  # Eq. 9
            if self.config.alignment != "global":
                matrices = (x.flatten(2, 3).flatten(0, 1) for x in (similarity, labels, real))
                terms["fragment"] = lifted(*matrices, margin=self.config.lambda1, **self.form)  # Eq. 10
            if self.config.alignment != "local":
                pairs, known = global_affinity(similarity, real)  # Eq. 11
                positive = global_labels(len(pairs), pairs.device)
                if self.config.global_negatives == "distinct":
                    ids = gather(text["keyword_id"])
                    known = known & (positive | ~share_keyword(ids, word_mask))
                terms["global"] = lifted(
                    pairs, positive, known, margin=self.config.lambda2, **self.form
                )  # Eq. 12
        terms["loss"] = terms.get("fragment", 0) + self.config.lambda3 * terms.get("global", 0)  # Eq. 13
        return terms


def _known(**switches: tuple[str, tuple[str, ...]]) -> None:
    for name, (value, values) in switches.items():
        if value not in values:
            raise ValueError(f"{name} is {value!r}; use {', '.join(map(repr, values))}")


# ------------------------------------------------------------------------- 4.3 pairs of fragments, as batches
class FragmentPairs(Dataset):
    """Frozen fragment features of all pairs on one device; a batch is an index gather, made where they lie.

    Pair n is text n with its picture, picture n unless `picture_of` says another: the paper's text is the five captions
    of a picture, joined; where each caption is a text (F20) a picture is in as many pairs. They may be kept
    in fp16: a batch is fp32. 118,287 pairs of 10 + 10 fragments of 512 are 2.4 GB in fp16.

    Args:
        regions, keywords: features; shorter lists are padded, with anything.
        region_mask, keyword_mask: which are real. A pair may lack all of either: it then has no loss of its own.
        keyword_id: equal numbers for equal keyword strings, for `same_keyword_positives`.
        picture_of: the picture of each text.

    Raises:
        ValueError: For arrays of different lengths, or a real fragment that is not finite (the pair is named).
    """

    def __init__(
        self,
        regions: Float[Tensor, "p r d"],
        keywords: Float[Tensor, "q k w"],
        region_mask: Bool[Tensor, "p r"],
        keyword_mask: Bool[Tensor, "q k"],
        keyword_id: Int[Tensor, "q k"] | None = None,
        picture_of: Int[Tensor, " q"] | None = None,
    ):
        if len(regions) != len(keywords) and picture_of is None:
            raise ValueError(f"{len(regions)} pictures' regions, but keywords of {len(keywords)} texts")
        for name, features, mask in (("regions", regions, region_mask), ("keywords", keywords, keyword_mask)):
            # a sum is finite if its summands are; it needs no second array of their size
            finite = features.sum(-1, dtype=torch.float32).isfinite() | ~mask
            if not finite.all():
                pair = int(finite.all(1).int().argmin())
                raise ValueError(f"{name} of pair {pair} are not finite: extract its features again")
        self.regions, self.keywords = regions, keywords
        self.region_mask, self.keyword_mask, self.keyword_id = region_mask, keyword_mask, keyword_id
        self.picture_of = picture_of

    @classmethod
    def of(cls, regions, keywords, picture_of=None) -> FragmentPairs:
        """The pairs of two `features.fragments.Fragments`, of images and of their texts; `picture_of` as in `Texts`."""
        masks = (torch.from_numpy(a.copy()) for a in (regions.mask, keywords.mask, keywords.index))
        picture_of = None if picture_of is None else torch.tensor(picture_of)
        return cls(regions.dense()[0], keywords.dense()[0], *masks, picture_of=picture_of)

    @property
    def device(self) -> torch.device:
        """Where the features lie and batches are made."""
        return self.regions.device

    def to(self, device: torch.device | str) -> FragmentPairs:
        """The same pairs on another device (at once, before training)."""
        moved = copy(self)
        for name, value in vars(self).items():
            setattr(moved, name, None if value is None else value.to(device))
        return moved

    def __len__(self) -> int:
        return len(self.keywords)

    def __getitem__(self, index: int) -> dict:
        return self.__getitems__([index])

    def __getitems__(self, index: list[int]) -> dict:
        where = torch.tensor(index, device=self.device)
        text = {"features": self.keywords[where].float(), "mask": self.keyword_mask[where]}
        if self.keyword_id is not None:
            text["keyword_id"] = self.keyword_id[where]
        where = where if self.picture_of is None else self.picture_of[where]
        return {
            "image": {"features": self.regions[where].float(), "mask": self.region_mask[where]},
            "text": text,
        }
