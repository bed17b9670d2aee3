"""SLAN's region filter (3.2.2) and region adaptor (3.2.3, Eq. 1-2), with the regression loss (Eq. 3).

Axes: `b` pictures with a text each, `q` proposals, `t` regions that passed the filter (N^G, at most T), `k2` cells of a
neighbourhood (K x K), `n` tokens of a text (N^T), `l` levels with the proposals' own as the first (L + 1), `c`
channels, `h` `w` cells of a map, `d` width of a token (D). Masks are True where there is something.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torchvision.ops import generalized_box_iou_loss

from finematch.boxes import (
    AreaTable,
    box_mean,
    convert,
    neighbourhood,
    neighbourhood_mean,
    roi_align_mean,
    summed_area,
)
from finematch.losses import wide
from finematch.models.configs import LocatorConfig
from finematch.models.slan.proposals import SMALLEST, take
from finematch.models.slan.towers import one_of


def stop(boxes: Float[Tensor, "*r 4"], smallest: float = SMALLEST) -> Float[Tensor, "*r 4"]:
    """Updated regions (x, y, w, h) about the centre to (x1, y1, x2, y2): what would leave the picture stops at it.

    Sides are kept in [`smallest`, 1] and do not change otherwise. The paper says nothing; we do not cut them, because a
    region that comes near the border would lose that part for good, so that the mean of Eq. 3 would be smaller
    than the proposal, which then learns to shrink, further and further. Differentiable; a side that was limited and
    a centre that was stopped have no gradient.
    """
    size = wide(boxes)[..., 2:].clamp(smallest, 1)
    centre = torch.minimum(torch.maximum(wide(boxes)[..., :2], size / 2), 1 - size / 2)
    return torch.cat([centre - size / 2, centre + size / 2], dim=-1).clamp(0, 1)


# ------------------------------------------------------------------------------ 3.2.2 region filter
class RegionFilter(nn.Module):
    """3.2.2: no more than `top` regions, in descending order of their normalised saliency, those above a threshold.

    (a) Normalise. `max` (default): sigmoid, then divided by the picture's largest, arXiv's "with the maximum value 1",
    which also lies in ICCV's [0, 1]; `minmax`: the logits' range to [0, 1]; `sigmoid`: no more than that, with which
    no region may reach the threshold. (b) Sort. (c) Keep the first `top` with S > `threshold`. The best region is
    always kept: a picture without regions would have nothing to match.

    Args:
        width: D, of the text-conditioned filter.
        top: T; 0 keeps all proposals (Table 7, row 1).
        threshold: h, in [0, 1); 0 is none (Table 7, rows 1 and 2).
        text: adds what the region has to say to the text to its saliency, a bilinear product of E^G_1 and T_t.
    """

    def __init__(
        self,
        width: int,
        *,
        top: int = 10,
        threshold: float = 0.5,
        score_norm: str = "max",
        text: bool = False,
    ):
        super().__init__()
        one_of("score_norm", score_norm, ("max", "minmax", "sigmoid"))
        if top < 0 or not 0 <= threshold < 1:
            raise ValueError(f"top = {top} must not be negative and threshold = {threshold} lie in [0, 1)")
        self.top, self.threshold, self.score_norm = top, threshold, score_norm
        self.ask = nn.Linear(width, width, bias=False) if text else None

    def normalise(self, logits: Float[Tensor, "b q"], valid: Bool[Tensor, "b q"]) -> Float[Tensor, "b q"]:
        """S in [0, 1] of what is valid, 0 elsewhere."""
        if self.score_norm == "minmax":
            low = logits.masked_fill(~valid, float("inf")).amin(1, keepdim=True)
            span = logits.masked_fill(~valid, float("-inf")).amax(1, keepdim=True) - low
            # all alike: all count in full
            scores = torch.where(span > 0, (logits - low) / span.where(span > 0, 1.0), 1.0)
        elif self.score_norm == "max":
            # sigmoid(x) / sigmoid(m) without underflow
            best = F.logsigmoid(logits).masked_fill(~valid, float("-inf")).amax(1, keepdim=True)
            scores = (F.logsigmoid(logits) - best).clamp(max=0).exp()  # of what is valid never above 0
        else:
            scores = torch.sigmoid(logits)
        return scores * valid

    def forward(
        self,
        logits: Float[Tensor, "b q"],
        valid: Bool[Tensor, "b q"],
        regions: Float[Tensor, "b q d"] | None = None,
        text: Float[Tensor, "b d"] | None = None,
    ) -> tuple[Int[Tensor, "b t"], Float[Tensor, "b t"], Bool[Tensor, "b t"]]:
        """Which proposals stay: their numbers, best first, their S (0 where there is none), and which are real.

        Raises:
            ValueError: the filter reads texts and is given none.
        """
        if self.ask is not None:
            if regions is None or text is None:
                raise ValueError("this filter was built with text=True: give regions and text")
            said = torch.einsum("bqd,bd->bq", wide(regions), wide(self.ask(text)))
            logits = logits + said / math.sqrt(regions.shape[-1])
        scores = self.normalise(logits, valid)
        # by the logit among equal scores: a saturated sigmoid knows no order
        order = logits.masked_fill(~valid, float("-inf")).argsort(dim=1, descending=True, stable=True)
        index = order[:, : self.top or None]
        scores, kept = take(scores, index), take(valid, index)
        if self.threshold:
            kept = kept & (scores > self.threshold)
        kept[:, 0] = True
        return index, scores * kept, kept


# ------------------------------------------------------------------------------ 3.2.3 region adaptor
class RegionEmbedding(nn.Module):
    """Embedding(G, F): RoIAlign of boxes, average pooling, and a linear layer to D.

    The paper has no normalisation; we add a layer norm, because the cosine and the attention that follow would
    otherwise compare maps of one scale with words of another (`norm="none"` leaves it out).

    Args:
        box_grad: whether what was pooled has a gradient with respect to the boxes.
        roi: `align` (RoIAlign of `samples` a side, its mean) or `table` (the exact mean; see `boxes.box_mean`).
    """

    def __init__(
        self,
        channels: int,
        width: int,
        *,
        norm: str = "layer",
        roi: str = "align",
        samples: int = 14,
        box_grad: bool = True,
    ):
        super().__init__()
        one_of("embed_norm", norm, ("layer", "none"))
        one_of("roi", roi, ("align", "table"))
        self.project = nn.Linear(channels, width)
        self.norm = nn.LayerNorm(width) if norm == "layer" else nn.Identity()
        self.roi, self.samples, self.box_grad = roi, samples, box_grad

    def read(self, features: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"] | AreaTable:
        """What `forward` pools from; made once a map."""
        return summed_area(features) if self.roi == "table" else features

    def forward(
        self, features: Float[Tensor, "b c h w"] | AreaTable, boxes: Float[Tensor, "b *r 4"]
    ) -> Float[Tensor, "b *r d"]:
        boxes = boxes if self.box_grad else boxes.detach()
        if self.roi == "table":
            pooled = box_mean(features, boxes)
        else:
            pooled = roi_align_mean(features, boxes, self.samples)
        return self.norm(self.project(pooled))

    def around(
        self, features: Float[Tensor, "b c h w"] | AreaTable, cells: Float[Tensor, "b t k2 4"]
    ) -> Float[Tensor, "b t k2 d"]:
        """`forward` of the cells of neighbourhoods, which share their edges."""
        if self.roi == "table":
            return self(features, cells)
        cells = cells if self.box_grad else cells.detach()
        return self.norm(self.project(neighbourhood_mean(features, cells, self.samples)))


class CrossAttention(nn.Module):
    """Eq. 1, line 5 of Algorithm 1: regions attend to words and words to regions, both to what the other was before.

        A_i = E^G_i E^T_i' / sqrt(D),   E^G_{i+1} = softmax(A_i) E^T_i,   E^T_{i+1} = softmax(A_i') E^G_i

    The paper calls this multi-head attention, but prints one head without projections or residual. `literal` is
    as printed: then new words hold no word, only regions, and no masked word can be told from them. The default
    `transformer` is a layer of a Transformer each way: attention of several heads, residual, layer norm, and a
    feed-forward part with the same.
    """

    def __init__(self, width: int, heads: int = 8, *, attn: str = "transformer", dropout: float = 0.0):
        super().__init__()
        one_of("attn", attn, ("transformer", "literal"))
        self.attn = attn
        if attn == "transformer":
            self.regions, self.words = (AttendTo(width, heads, dropout) for _ in range(2))

    def forward(
        self,
        regions: Float[Tensor, "b t d"],
        words: Float[Tensor, "b n d"],
        valid: Bool[Tensor, "b t"],
        mask: Bool[Tensor, "b n"],
    ) -> tuple[Float[Tensor, "b t d"], Float[Tensor, "b n d"]]:
        if self.attn == "transformer":
            return self.regions(regions, words, mask), self.words(words, regions, valid)
        a = torch.einsum("btd,bnd->btn", wide(regions), wide(words)) / math.sqrt(regions.shape[-1])
        to_words = a.masked_fill(~mask[:, None], float("-inf")).softmax(-1)
        to_regions = a.mT.masked_fill(~valid[:, None], float("-inf")).softmax(-1)
        return to_words.to(words.dtype) @ words, to_regions.to(regions.dtype) @ regions


class AttendTo(nn.Module):
    """A Transformer layer in which `x` asks and `memory` answers; norms last, as in BERT."""

    def __init__(self, width: int, heads: int, dropout: float):
        super().__init__()
        self.attention = nn.MultiheadAttention(width, heads, dropout, batch_first=True)
        self.feed = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
        self.norm_attention, self.norm_feed = nn.LayerNorm(width), nn.LayerNorm(width)
        self.drop = nn.Dropout(dropout)

    def forward(
        self, x: Float[Tensor, "b x d"], memory: Float[Tensor, "b m d"], mask: Bool[Tensor, "b m"]
    ) -> Float[Tensor, "b x d"]:
        answer, _ = self.attention(x, memory, memory, key_padding_mask=~mask, need_weights=False)
        x = self.norm_attention(x + self.drop(answer))
        return self.norm_feed(x + self.drop(self.feed(x)))


def similarity(
    regions: Float[Tensor, "b *r d"], words: Float[Tensor, "b n d"], mask: Bool[Tensor, "b n"]
) -> Float[Tensor, "b *r n"]:
    """Cosine of every region with every word; 0 for words that the mask leaves out."""
    flat, unit = wide(regions).flatten(1, -2), F.normalize(wide(words), dim=-1) * mask[..., None]
    # many regions meet few words: the product is divided, not its operand
    length = flat.square().sum(-1, keepdim=True).clamp(min=1e-24).sqrt()
    with torch.autocast(flat.device.type, enabled=False):  # a softmax at tau = 0.07 would show the rounding
        cosine = flat @ unit.mT / length
    return cosine.unflatten(1, regions.shape[1:-1])


def best_word(cosine: Float[Tensor, "b *r n"], mask: Bool[Tensor, "b n"]) -> Float[Tensor, "b *r"]:
    """M of Eq. 2: each region's largest cosine with any word; 0 of a text without words, which moves nothing."""
    keep = mask.view(len(mask), *(1,) * (cosine.dim() - 2), -1)
    best = cosine.masked_fill(~keep, float("-inf")).amax(-1)
    return best.where(keep.any(-1), 0.0)


def cell_weights(
    match: Float[Tensor, "b t k2"], *, form: str = "softmax", tau: float = 0.07
) -> Float[Tensor, "b t k2"]:
    """M_j of Eq. 2 as weights of the cells of a neighbourhood.

    `softmax` of M / tau (default): they sum to one, and the region moves to a point between the cells. `raw`: M as it
    is, as printed; only differences between cells on opposite sides count. `relu`: positive parts by their sum (no
    move where none is positive).
    """
    if form == "softmax":
        return (match / tau).softmax(-1)
    if form == "raw":
        return match
    positive = match.clamp(min=0)
    return positive / positive.sum(-1, keepdim=True).clamp(min=1e-6)


def offset(
    weights: Float[Tensor, "b t k2"],
    extent: Float[Tensor, "b t 2"],
    *,
    axes: str = "image",
    unit: str = "N/K",
) -> Float[Tensor, "b t 2"]:
    """(dx, dy) of Eq. 2, in fractions of the picture.

        dx = sum_j M_j N^h (floor(j / K) - floor(K / 2)),    dy = sum_j M_j N^w (j mod K - floor(K / 2))

    As printed (`axes="paper"`, `unit="N"`), the row of a cell moves x, and by whole neighbourhoods. We let the column
    move x and the row y, because a cell's match should draw the box towards it, and take N/K, the distance
    between cells, as the unit, because the box would leave its neighbourhood otherwise.

    Args:
        weights: of the K x K cells, row by row.
        extent: (N^w, N^h), width and height of the neighbourhood. Row and column swap with their extents; for maps
            that are not square the printed form would also mix their units.
    """
    k = math.isqrt(weights.shape[-1])
    steps = torch.arange(k, device=weights.device, dtype=weights.dtype) - k // 2
    grid = weights.unflatten(-1, (k, k))
    row, column = (grid.sum(-1) * steps).sum(-1), (grid.sum(-2) * steps).sum(-1)
    width, height = extent.unbind(-1)
    moved = (column * width, row * height) if axes == "image" else (row * height, column * width)
    return torch.stack(moved, dim=-1) / (k if unit == "N/K" else 1)


class Shared(NamedTuple):
    """What all levels of a pair read alike.

    Attributes:
        strength: S, the weight of each region's embedding.
        valid: which regions there are.
        slots: which proposal each region was.
        mask: which tokens are real.
        counted: which of them are words.
        unmet: E^T_1, the words before they met a region; where `steer="unimodal"`, else None.
    """

    strength: Float[Tensor, "b t"]
    valid: Bool[Tensor, "b t"]
    slots: Int[Tensor, "b t"]
    mask: Bool[Tensor, "b n"]
    counted: Bool[Tensor, "b n"]
    unmet: Float[Tensor, "b n d"] | None = None


class RegionAdaptor(nn.Module):
    """One level of Algorithm 1 (lines 5 to 9): attention, then every region moves towards what its text matches.

        E^G, E^T  <- CrossAttention(E^G_i, E^T_i)                    Eq. 1
        E^N       <- RoIAlign of K x K cells about each region        from F_i
        M_j       <- max over words of cos(E^N_j, E^T_{i+1})
        x', y'    <- x + dx, y + dy                                   Eq. 2
        w', h'    <- p_w w, p_h h
        E^G_{i+1} <- Embedding(G_{i+1}, F_i)

    Algorithm 1 overwrites the attended regions of its line 5 in line 9, and uses the saliency S before the first level
    only. By default (`region_update="residual"`) both live on: E^G_{i+1} = S * Embedding(G_{i+1}, F_i) + attended;
    `overwrite` is as printed, `reweight` multiplies by S alone.

    In the paper M compares cells with the words that have met the regions, E^T_{i+1} (`steer="fused"`). We compare with
    E^T_1 (`unimodal`), because that is what the region-word contrast trains (S41).

    p = exp(theta) with theta = 0 at first: sides stay positive. The scales belong to the place of a region among those
    that passed the filter (`rank`), to its query (`query`), to the level (`level`), or are predicted from the region's
    embedding (`predicted`).

    Args:
        ratio: r_i, the neighbourhood's sides (1, 1/2, 1/4) as a part of the region's own sides, or, as in Table 1, of
            the map's (`extent="map"`), with which regions leave the things that they lie on (S6).
        slots: how many places or queries there are.
        outside: what a cell counts whose centre lies outside the picture, where there is nothing to match. `mean`: as
            much as those inside on average, so that a region stays where no cell stands out, near the border, too.
            `keep`: its cosine, of the zeros that RoIAlign finds there.
    """

    def __init__(self, embed: RegionEmbedding, config: LocatorConfig, *, ratio: float, slots: int):
        super().__init__()
        c = config
        if c.k % 2 == 0:
            raise ValueError(f"k = {c.k}: K is odd, or floor(K / 2) of Eq. 2 is not the middle cell")
        if ratio <= 0:
            raise ValueError(f"ratio = {ratio} must be positive")
        self.embed = embed
        self.attention = CrossAttention(c.width, c.heads, attn=c.attn, dropout=c.dropout)
        self.ratio, self.k, self.tau, self.smallest = ratio, c.k, c.cell_tau, c.smallest
        self.region_update, self.axes, self.unit, self.extent = c.region_update, c.axes, c.unit, c.extent
        self.weights, self.outside, self.scaling = c.cell_weights, c.outside, c.scaling
        if c.scaling == "predicted":
            self.predict = nn.Linear(c.width, 2)
            for parameter in self.predict.parameters():
                nn.init.zeros_(parameter)
        else:
            self.theta = nn.Parameter(torch.zeros(1 if c.scaling == "level" else slots, 2))

    def scales(self, regions: Float[Tensor, "b t d"], slots: Int[Tensor, "b t"]) -> Float[Tensor, "b t 2"]:
        """(p_w, p_h) of every region."""
        if self.scaling == "predicted":
            return wide(self.predict(regions)).exp()
        if self.scaling == "rank":
            slots = torch.arange(slots.shape[1], device=slots.device).expand_as(slots)
        elif self.scaling == "level":
            slots = torch.zeros_like(slots)
        return self.theta[slots].exp()

    def search(
        self,
        features: Float[Tensor, "b c h w"] | AreaTable,
        boxes: Float[Tensor, "b t 4"],
        words: Float[Tensor, "b n d"],
        counted: Bool[Tensor, "b n"],
    ) -> tuple[Float[Tensor, "b t k2"], Float[Tensor, "b t 2"]]:
        """Lines 6 and 7: M of the cells about each region, and how far the region moves (dx, dy)."""
        size = boxes[..., 2:] - boxes[..., :2]
        extent = self.ratio * (size if self.extent == "region" else torch.ones_like(size))
        cells = neighbourhood(boxes, self.k, extent)
        match = best_word(similarity(self.embed.around(features, cells), words, counted), counted)
        if self.outside == "mean":
            middle = (cells[..., :2] + cells[..., 2:]) / 2
            inside = ((middle >= 0) & (middle <= 1)).all(-1)
            inside[..., self.k**2 // 2] = True  # the region's own cell, whatever rounding says
            mean = (match * inside).sum(-1, keepdim=True) / inside.sum(-1, keepdim=True)
            match = match.where(inside, mean)
        weights = cell_weights(match, form=self.weights, tau=self.tau)
        return match, offset(weights, extent, axes=self.axes, unit=self.unit)

    def forward(
        self,
        features: Float[Tensor, "b c h w"] | AreaTable,
        boxes: Float[Tensor, "b t 4"],
        regions: Float[Tensor, "b t d"],
        words: Float[Tensor, "b n d"],
        pair: Shared,
    ) -> tuple[
        Float[Tensor, "b t 4"], Float[Tensor, "b t d"], Float[Tensor, "b n d"], Float[Tensor, "b t n"], Tensor
    ]:
        """G_{i+1}, E^G_{i+1}, E^T_{i+1}; each region's cosine with each word, and its cells' matches M "b t k2"."""
        strength, valid, slots, mask, counted, unmet = pair
        attended, words = self.attention(regions, words, valid, mask)
        asking = words if unmet is None else unmet
        match, moved = self.search(features, boxes, asking, counted)
        x, y, w, h = convert(boxes, "xyxy", "cxcywh").unbind(-1)
        dx, dy = moved.unbind(-1)
        p_w, p_h = self.scales(attended, slots).unbind(-1)
        boxes = stop(torch.stack([x + dx, y + dy, p_w * w, p_h * h], dim=-1), self.smallest)
        found = self.embed(features, boxes)
        cosine = similarity(found, asking, counted)
        if self.region_update != "overwrite":
            found = strength[..., None].to(found.dtype) * found
        if self.region_update == "residual":
            found = found + attended
        return boxes, found * valid[..., None], words * mask[..., None], cosine, match


# ------------------------------------------------------------------------------ 3.2.3 regression loss
def regression_target(
    boxes: Float[Tensor, "l b t 4"], matches: Float[Tensor, "l b t"] | None = None, tau: float = 0.07
) -> Float[Tensor, "b t 4"]:
    """g-bar of Eq. 3: the mean of the updated regions g_2 ... g_{L+1}, the first axis.

    With `matches` they are weighted by softmax(match / tau) over levels: arXiv's text has "a weighted summation of
    updated regions", whose weights it does not give.
    """
    if matches is None:
        return boxes.mean(0)
    return ((matches / tau).softmax(0)[..., None] * boxes).sum(0)


def regression_loss(
    boxes: Float[Tensor, "b t 4"],
    target: Float[Tensor, "b t 4"],
    valid: Bool[Tensor, "b t"],
    *,
    l1_weight: float = 1.0,
    giou_weight: float = 1.0,
    reduction: str = "sum",
    part: str = "box",
) -> Float[Tensor, "b"]:
    """Eq. 3: L1 distance of (x, y, w, h), summed, and 1 - GIoU, of every region, summed over a picture's regions.

    The target follows its proposal: it has no optimum while regions move, or scales differ from 1, on average.
    Proposals then drift along with it, and with p below 1 they shrink to their least side (seen on toy pictures after
    150 steps, with a weight of 1/10 as well). A target that is not held fixed keeps nothing either: of a place the
    proposal drops out, but of a side |w - mean| = |1 - mean of p| w, so that proposals shrink whether p is below 1 or
    above.

    Args:
        reduction: `sum` ("the summation of the regression loss for all regions"), or `mean` over them.
        part: `box`, or `centre`: a proposal follows the centre of its target and keeps its own size, because sides
            that follow p have no optimum (S41).
    """
    if part == "centre":
        here, there = (convert(x, "xyxy", "cxcywh") for x in (boxes, target))
        boxes, target = (
            convert(torch.cat([centre, here[..., 2:].detach()], -1), "cxcywh", "xyxy")
            for centre in (here[..., :2], there[..., :2])
        )
    distance = (convert(boxes, "xyxy", "cxcywh") - convert(target, "xyxy", "cxcywh")).abs().sum(-1)
    loss = l1_weight * distance + giou_weight * generalized_box_iou_loss(boxes, target, eps=0.0)
    total = (loss * valid).sum(1)
    return total / valid.sum(1) if reduction == "mean" else total
