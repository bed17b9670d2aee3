"""SLAN: Self-Locator Aided Network for Vision-Language Understanding (ICCV 2023; arXiv 2022, version 1): the locator.

Algorithm 1 puts together the maps of `towers` (3.1, 3.2.1), the regions of `proposals` (3.2), and the filter and the
adaptors of `adaptor` (3.2.2, 3.2.3). The objective that trains it is in `objective`. Every reading of the paper that
could go either way is a setting, declared in `LocatorConfig`; `version` of `presets/slan.toml` sets those in which the
two versions of the paper differ.

A box is (x1, y1, x2, y2) in fractions of the picture and stays inside of it, with x1 < x2 and y1 < y2. What a
picture needs before any text is known is computed once (`SelfLocator.prepare`), what belongs to a pair of picture
and text each time (`SelfLocator.locate`): a picture's true text and its negatives share the former.

Axes: `b` pictures with a text each, `q` proposals, `t` regions that passed the filter (N^G, at most T), `k2` cells of a
neighbourhood (K x K), `n` tokens of a text (N^T), `l` levels with the proposals' own as the first (L + 1), `c`
channels, `h` `w` cells of a map, `d` width of a token (D). Masks are True where there is something.
"""

from __future__ import annotations

import copy
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from finematch.boxes import AreaTable, convert
from finematch.losses import wide
from finematch.models.configs import LocatorConfig
from finematch.models.slan.adaptor import (
    RegionAdaptor,
    RegionEmbedding,
    RegionFilter,
    Shared,
    best_word,
    regression_loss,
    regression_target,
    similarity,
)
from finematch.models.slan.proposals import RPN, Proposals, QueryProposals, cut, take
from finematch.models.slan.towers import VisionDecoder

PRETRAINED = 224  # px, the side of the images of pretraining (4.1)


class Kept(nn.Module):
    """All that frozen proposals read, as it was: copies of the decoder and, where pixels are trained on, the encoder.

    Without it the maps under a frozen module change with the decoder, and its proposals with them. It is never trained,
    stays in evaluation mode and computes in fp32, whatever the precision of training. A deep copy of it is itself: the
    momentum encoders have the same proposals, and no third copy lies in memory.

    Args:
        decoder: the vision decoder.
        encoder: the image encoder; None where its maps cannot change.
    """

    def __init__(self, decoder: VisionDecoder, encoder: nn.Module | None = None):
        super().__init__()
        self.decoder, self.encoder = copy.deepcopy(decoder), copy.deepcopy(encoder)
        self.requires_grad_(False).train(False)

    def train(self, mode: bool = True) -> Kept:
        return super().train(False)

    def __deepcopy__(self, memo: dict) -> Kept:
        return self

    def forward(
        self, features: list[Float[Tensor, "b _ _ _"]], pixels: Tensor | list[Tensor] | None
    ) -> list[Float[Tensor, "b _ _ _"]]:
        """The decoder's maps, from the encoder's (`features`) or, with an encoder of its own, from `pixels`.

        Raises:
            ValueError: it has an encoder and is given no pixels.
        """
        if self.encoder is not None and pixels is None:
            raise ValueError(
                "frozen proposals read pixels with an encoder of their own: give prepare the pixels"
            )
        return self.decoder(features if self.encoder is None else self.encoder(pixels))


class Pictures(NamedTuple):
    """What pictures give before any text: maps to pool from, and regions. Without a text-conditioned filter they have
    passed it, and `t` is T at most; with one they are all proposals, and `scores` are still logits.

    Attributes:
        maps: F_i, coarse to fine (tables of them with `roi="table"`).
        regions: their embeddings, not weighted.
        slots: which proposal each was.
        whole: GAP(V), D wide, where `fused="map"` asks for it.
        first: what E^G_1 was pooled from; of the whole batch only, None of a choice of its pictures.
    """

    maps: list[Tensor | AreaTable]
    boxes: Float[Tensor, "b t 4"]
    scores: Float[Tensor, "b t"]
    valid: Bool[Tensor, "b t"]
    regions: Float[Tensor, "b t d"]
    slots: Int[Tensor, "b t"]
    whole: Float[Tensor, "b d"] | None
    first: Tensor | AreaTable | None = None

    def __getitem__(self, index) -> Pictures:
        maps = [
            AreaTable(*(p[index] for p in m)) if isinstance(m, AreaTable) else m[index] for m in self.maps
        ]
        return Pictures(maps, *(None if part is None else part[index] for part in tuple(self)[1:-1]))


class Located(NamedTuple):
    """What the self-locator found for pairs of pictures and texts.

    Attributes:
        boxes: of all levels, the proposals' own first.
        scores: S of each region, in [0, 1]; 0 where there is none.
        valid: which regions there are.
        regions: E^G_{L+1}.
        words: E^T_{L+1}; 0 for padding.
        picture: T_v, fused: the mean of `regions` over those that there are (`fused`, S20).
        text: T_t, fused: `words` at position 0.
        reg_loss: Eq. 3 of each picture; 0 without levels.
        cosine: of each region with each word (Figures 5 and 6), for all levels: of E^G_1 before the first, then of the
            region's embedding from F_i; with E^T_1, or with its level's words where `steer` is `fused`; 0 for what is
            no word.
    """

    boxes: Float[Tensor, "l b t 4"]
    scores: Float[Tensor, "b t"]
    valid: Bool[Tensor, "b t"]
    regions: Float[Tensor, "b t d"]
    words: Float[Tensor, "b n d"]
    picture: Float[Tensor, "b d"]
    text: Float[Tensor, "b d"]
    reg_loss: Float[Tensor, "b"]
    cosine: Float[Tensor, "l b t n"]


def locator_config(s, channels: tuple[int, ...]) -> LocatorConfig:
    """The settings of the locator of a run.

    `scales` are of a single map; an encoder with stages has none. At scale `paper` `anchor` counts the cells of an
    image of 224 px (4.1), and a larger image has larger anchors: they keep their share of it, as all of SLAN's regions
    are shares (r_i), so a locator that was pretrained at 224 px proposes the same regions of the image at 384 px.

    Args:
        s: settings of the training page.
        channels: of the encoder's maps.
    """
    scales = s.scales if len(channels) == 1 else ()
    anchor = s.anchor * s.size / PRETRAINED if s.scale == "paper" else s.anchor
    return LocatorConfig.of(s, scales=scales, anchor=anchor)


class SelfLocator(nn.Module):
    """Algorithm 1: proposals, filter, `levels` region adaptors.

    With 0 `levels` the regions are the proposals, and words and regions never meet (Table 6, rows 1 and 2). `frozen`
    proposals never change and no gradient enters them (Table 6, row 1): they read a copy of the decoder and of the
    encoder (`Kept`). Load their weights with `load_proposals`, and call `keep` afterwards.

    Args:
        channels: of the encoder's maps, fine to coarse (`Towers.channels`).
        encoder: the image encoder, for frozen proposals whose encoder is trained.

    Raises:
        ValueError: settings that exclude each other.
    """

    def __init__(self, channels: tuple[int, ...], config: LocatorConfig, *, encoder: nn.Module | None = None):
        super().__init__()
        c = self.config = config
        ratios = c.ratios or tuple(0.5**i for i in range(c.levels))
        self._check(len(ratios))
        self.decoder = VisionDecoder(channels, c.pyramid, c.decoder_levels, source=c.source, scales=c.scales)
        if c.proposals == "rpn":
            self.proposals = RPN(c.pyramid, count=c.count, anchor=c.anchor, anchor_offset=c.anchor_offset, nms=c.nms,
                                 smallest=c.smallest)  # fmt: skip
        else:
            self.proposals = QueryProposals(c.pyramid, count=c.count, depth=c.query_depth, heads=c.query_heads,
                                            smallest=c.smallest)  # fmt: skip
        self.token, self.kept = c.token, None
        if c.frozen:
            self.proposals.requires_grad_(False).train(False)
            self.kept = Kept(self.decoder, encoder if _trained(encoder) else None)
            # without levels nothing else reads it: data-parallel training would wait for its gradient
            self.decoder.requires_grad_(bool(c.levels) or c.first == "decoder")
        self.filter = RegionFilter(
            c.width, top=c.top, threshold=c.threshold, score_norm=c.score_norm, text=c.filter_text
        )
        pooling = {"norm": c.embed_norm, "roi": c.roi, "samples": c.samples, "box_grad": c.box_grad}
        self.embed = RegionEmbedding(channels[-1] if c.first == "encoder" else c.pyramid, c.width, **pooling)
        slots = c.count if c.scaling == "query" or not c.top else min(c.top, c.count)
        self.adaptors = nn.ModuleList(
            RegionAdaptor(RegionEmbedding(c.pyramid, c.width, **pooling), c, ratio=ratio, slots=slots)
            for ratio in ratios
        )
        self.whole = nn.Linear(channels[-1], c.width) if c.fused == "map" else None

    def _check(self, ratios: int) -> None:
        """Refuses settings that do not go together."""
        c = self.config
        if c.levels > c.decoder_levels:
            raise ValueError(f"levels = {c.levels}: must be 0 to {c.decoder_levels}, the number of maps")
        if ratios != c.levels:
            raise ValueError(f"{ratios} ratios {c.ratios} for {c.levels} levels")
        if c.filter_text and c.token == "regions":
            raise ValueError(
                "token='regions' is a token without a text, which filter_text=True does not have"
            )
        if c.scaling == "query" and c.proposals == "rpn":
            raise ValueError("scaling='query' needs proposals='queries': an RPN's proposals have no identity")
        if c.nms and c.proposals == "queries":
            raise ValueError("nms is of the RPN: queries are not suppressed")

    def train(self, mode: bool = True) -> SelfLocator:
        super().train(mode)
        if self.kept is not None:
            self.proposals.train(False)
        return self

    def take_given(self) -> None:
        """Do without proposals of its own: every image brings its boxes (`prepare`)."""
        self.proposals, self.kept = nn.Identity(), None

    def keep(self, encoder: nn.Module) -> None:
        """Frozen proposals read the decoder and the encoder as they are now: call it when other weights were loaded."""
        if self.kept is not None:
            self.kept.decoder.load_state_dict(self.decoder.state_dict())
            if self.kept.encoder is not None:
                self.kept.encoder.load_state_dict(encoder.state_dict())

    # ---- once per picture
    def propose(
        self,
        features: list[Float[Tensor, "b _ _ _"]],
        maps: list[Float[Tensor, "b _ _ _"]],
        pixels: Tensor | list[Tensor] | None,
        given: Float[Tensor, "b q 5"] | None = None,
    ) -> Proposals:
        """The proposals of the decoder's `maps`; frozen ones are those of the maps that were kept.

        What is `given` takes their place: boxes that nothing trains, and the scores as the saliency that the filter
        reads (S17: divided by the largest); Table 6's "loaded from COCO detection", with any detector.
        """
        if given is not None:
            boxes = cut(convert(given[..., :4], "xyxy", "cxcywh"), self.config.smallest)
            return Proposals(boxes, torch.logit(wide(given[..., 4]), 1e-6), given[..., 4] > 0)
        if isinstance(self.proposals, nn.Identity):
            raise ValueError("this locator takes its proposals from a file, which has none of these images")
        if self.kept is None:
            return self.proposals(maps)
        with torch.no_grad(), torch.autocast(maps[0].device.type, enabled=False):
            return self.proposals(self.kept(features, pixels))

    def prepare(
        self,
        features: list[Float[Tensor, "b _ _ _"]],
        pixels: Tensor | list[Tensor] | None = None,
        given: Float[Tensor, "b q 5"] | None = None,
    ) -> Pictures:
        """Lines 2 and 3: what no text changes, from the encoder's maps (fine to coarse).

        Args:
            pixels: what the maps were made of, for frozen proposals whose encoder is trained.
            given: proposals that were found elsewhere, see `data.pairs.BoxedSource`.

        Raises:
            ValueError: such proposals, and no pixels.
        """
        maps = self.decoder(features)
        boxes, scores, valid = self.propose(features, maps, pixels, given)
        slots = torch.arange(boxes.shape[1], device=boxes.device).expand(boxes.shape[:2])
        if self.filter.ask is None:
            slots, scores, valid = self.filter(scores, valid)
            boxes = take(boxes, slots)
        first = self.embed.read(features[-1] if self.config.first == "encoder" else maps[0])
        regions = self.embed(first, boxes)
        whole = self.whole(features[-1].mean((2, 3))) if self.whole is not None else None
        read = [a.embed.read(m) for a, m in zip(self.adaptors, maps, strict=False)]
        return Pictures(read, boxes, scores, valid, regions, slots, whole, first)

    def fixed_regions(self, pictures: Pictures) -> tuple[list[Float[Tensor, "b t d"]], Bool[Tensor, "b t"]]:
        """The proposals as every level embeds them, E^G_1 and then from each F_i, without a gradient to their boxes,
        and which of them are real: what the region-word contrast compares with words (S41)."""
        boxes = pictures.boxes.detach()
        levels = zip(self.adaptors, pictures.maps, strict=True)
        return [self.embed(pictures.first, boxes), *(a.embed(m, boxes) for a, m in levels)], pictures.valid

    def visual_token(self, pictures: Pictures, pooled: Float[Tensor, "b d"]) -> Float[Tensor, "b d"]:
        """T_v before any text, which the contrastive loss compares (S20): `Towers.pooled` as it is (`map`), or the mean
        of the weighted region embeddings E^G_1 (`regions`, arXiv)."""
        return pooled if self.token == "map" else mean_region(self.weighted(pictures), pictures.valid)

    def weighted(self, pictures: Pictures) -> Float[Tensor, "b t d"]:
        """E^G_1: "finally, we weight region embeddings by the scores"."""
        regions = pictures.regions * pictures.valid[..., None]
        return regions * pictures.scores[..., None].to(regions.dtype) if self.config.weighting else regions

    def choose(self, pictures: Pictures, text: Float[Tensor, "b d"]) -> Pictures:
        """The filter that reads the text (S19), on all proposals."""
        index, scores, valid = self.filter(pictures.scores, pictures.valid, pictures.regions, text)
        return pictures._replace(
            boxes=take(pictures.boxes, index), scores=scores, valid=valid, regions=take(pictures.regions, index),
            slots=take(pictures.slots, index),
        )  # fmt: skip

    # ---- for every pair
    def locate(
        self,
        pictures: Pictures,
        words: Float[Tensor, "b n d"],
        mask: Bool[Tensor, "b n"],
        special: Bool[Tensor, "b n"] | None = None,
    ) -> Located:
        """Lines 4 to 13 for pictures and their texts, row by row.

        Args:
            words: E^T; position 0 is [CLS].
            mask: which tokens are real; every text has at least one.
            special: which of them are [CLS] or [SEP]. By default the first and the last real one, as BERT's tokenisers
                lay out one sentence.
        """
        words = words * mask[..., None]
        if self.filter.ask is not None:
            pictures = self.choose(pictures, words[:, 0])
        scores, valid = pictures.scores, pictures.valid
        strength = scores if self.config.weighting else valid.to(scores.dtype)
        counted = self.counted(mask, special)
        unmet = words if self.config.steer == "unimodal" else None
        pair = Shared(strength, valid, pictures.slots, mask, counted, unmet)
        regions, boxes = self.weighted(pictures), [pictures.boxes]
        cosine, matches = [similarity(pictures.regions, words, counted)], []
        for adaptor, features in zip(self.adaptors, pictures.maps, strict=True):
            moved, regions, words, level, _ = adaptor(features, boxes[-1], regions, words, pair)
            boxes.append(moved)
            cosine.append(level)
            matches.append(best_word(level, counted))
        reg_loss = boxes[0].new_zeros(len(mask))
        if self.adaptors:
            reg_loss = self.regress(torch.stack(boxes), torch.stack(matches), valid)
        picture = mean_region(regions, valid) if self.config.fused == "regions" else pictures.whole
        return Located(torch.stack(boxes), scores, valid, regions, words, picture, words[:, 0], reg_loss,
                       torch.stack(cosine) * valid[..., None])  # fmt: skip

    def counted(self, mask: Bool[Tensor, "b n"], special: Bool[Tensor, "b n"] | None) -> Bool[Tensor, "b n"]:
        """Which tokens are words (S9)."""
        return mask if self.config.include_special else mask & ~(ends(mask) if special is None else special)

    def regress(
        self, boxes: Float[Tensor, "l b t 4"], matches: Float[Tensor, "m b t"], valid: Bool[Tensor, "b t"]
    ) -> Float[Tensor, "b"]:
        """Eq. 3 of the proposals against the mean of what they became, which is held fixed (`detach_target`)."""
        target = regression_target(
            boxes[1:], matches if self.config.target == "weighted" else None, self.config.cell_tau
        )
        c = self.config
        return regression_loss(
            boxes[0], target.detach() if c.detach_target else target, valid, l1_weight=c.l1_weight,
            giou_weight=c.giou_weight, reduction=c.reg_reduction, part=c.reg_part,
        )  # fmt: skip

    def forward(
        self,
        features: list[Float[Tensor, "b _ _ _"]],
        words: Float[Tensor, "b n d"],
        mask: Bool[Tensor, "b n"],
        special: Bool[Tensor, "b n"] | None = None,
    ) -> Located:
        """`locate` of `prepare`: the encoder's maps, fine to coarse, and the texts, row by row."""
        return self.locate(self.prepare(features), words, mask, special)


def _trained(module: nn.Module | None) -> bool:
    return module is not None and any(p.requires_grad for p in module.parameters())


def mean_region(regions: Float[Tensor, "b t d"], valid: Bool[Tensor, "b t"]) -> Float[Tensor, "b d"]:
    """Global average pooling of the regions that there are."""
    real = valid[..., None].to(regions.dtype)
    return (regions * real).sum(1) / real.sum(1)


def ends(mask: Bool[Tensor, "b n"]) -> Bool[Tensor, "b n"]:
    """The first and the last real token of every text."""
    place = torch.arange(mask.shape[1], device=mask.device)
    return (place == 0) | (place == mask.sum(1, keepdim=True) - 1)
