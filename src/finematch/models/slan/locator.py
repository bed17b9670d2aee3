"""SLAN: Self-Locator Aided Network for Vision-Language Understanding (ICCV 2023; arXiv 2022, version 1): the model.

In the paper's order: 3.1 unimodal encoding, 3.2.1 vision decoder, 3.2 region proposals, 3.2.2 region filter, 3.2.3
region adaptor (Algorithm 1, Eq. 1-2) and regression loss (Eq. 3), and the self-locator that puts them together.
The objective that trains it is in a file of its own. Every reading of the paper that could go either way is an
setting, declared in `LocatorConfig`; `version` of `presets/slan.toml` sets those in which the two versions of the paper
differ.

A box is (x1, y1, x2, y2) in fractions of the picture and stays inside of it, with x1 < x2 and y1 < y2. What a
picture needs before any text is known is computed once (`SelfLocator.prepare`), what belongs to a pair of picture
and text each time (`SelfLocator.locate`): a picture's true text and its negatives share the former.

Axes: `b` pictures with a text each, `q` proposals, `t` regions that passed the filter (N^G, at most T), `k2` cells of a
neighbourhood (K x K), `n` tokens of a text (N^T), `l` levels with the proposals' own as the first (L + 1), `c`
channels, `h` `w` cells of a map, `d` width of a token (D). Masks are True where there is something.
"""

from __future__ import annotations

import copy
import math
from collections import OrderedDict
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torchvision.models.convnext import LayerNorm2d
from torchvision.models.detection.rpn import RPNHead
from torchvision.ops import FeaturePyramidNetwork, generalized_box_iou_loss, nms

from finematch.boxes import (
    AreaTable,
    box_mean,
    convert,
    multi_scale_grid,
    neighbourhood,
    neighbourhood_mean,
    roi_align_mean,
    summed_area,
)
from finematch.config import located
from finematch.encoders import Cells
from finematch.files import read_tensors
from finematch.losses import wide
from finematch.models.configs import LocatorConfig

# The least side of a box: a smaller one is inside a cell of every map, where its size gets no gradient.
SMALLEST = LocatorConfig.smallest
PRETRAINED = 224  # px, the side of the images of pretraining (4.1)


def one_of(name: str, value: str, known: tuple[str, ...]) -> str:
    """The value; ValueError if it is none of `known`."""
    if value not in known:
        raise ValueError(f"{name} is {value!r}; use one of {known}")
    return value


def take(x: Tensor, index: Int[Tensor, "b t"]) -> Tensor:
    """`x[b, index[b, t]]` of "b q ...", for every picture its own."""
    return x[torch.arange(len(x), device=x.device)[:, None], index]


def cut(boxes: Float[Tensor, "*r 4"], smallest: float = SMALLEST) -> Float[Tensor, "*r 4"]:
    """Proposals (x, y, w, h) about the centre to (x1, y1, x2, y2): what leaves the picture is cut off, as in detectors.

    What then is shorter than `smallest`, or lies outside altogether, is given that side at its place or at the border.
    Differentiable; what was cut or given has no gradient.
    """
    centre, half = wide(boxes)[..., :2], wide(boxes)[..., 2:] / 2
    low = (centre - half).clamp(0, 1 - smallest)
    return torch.cat([low, torch.maximum((centre + half).clamp(0, 1), low + smallest)], dim=-1)


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


# ------------------------------------------------------------------------------ 3.1 unimodal encoding
class Stages(nn.Module):
    """Stages of a timm network as maps, fine to coarse; the last of them is V.

    Args:
        cells: the network, with its normalisation.
        stages: numbers of timm's `feature_info`: (2, 3, 4) of a ResNet or MobileNetV2 have strides 8, 16, 32, and
            (1, 2, 3) suit pictures of 64 px. Of a plain ViT, whose maps are all alike, give (-1,).
        frozen: no gradient, and evaluation mode for ever (statistics of batch norms).

    Attributes:
        channels: of each map.
    """

    def __init__(self, cells: Cells, stages: tuple[int, ...] = (2, 3, 4), *, frozen: bool = False):
        super().__init__()
        info = list(cells.net.feature_info)
        self.stages = [range(len(info))[s] for s in stages]
        self.channels = tuple(info[s]["num_chs"] for s in self.stages)
        self.cells, self.frozen = cells.requires_grad_(not frozen), frozen
        self.train(self.training)

    def train(self, mode: bool = True) -> Stages:
        return super().train(mode and not self.frozen)

    def forward(self, pixels: Float[Tensor, "b 3 height width"]) -> list[Float[Tensor, "b _ _ _"]]:
        """RGB pixels in [0, 1] to maps."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen):
            return self.cells.net.forward_intermediates(
                (pixels - self.cells.mean) / self.cells.sd, indices=self.stages, intermediates_only=True,
                norm=bool(self.cells.prefix), stop_early=True,
            )  # fmt: skip


def pixel_stages(name: str, *, weights: str | Path = "", stages: tuple[int, ...] = (2, 3, 4)) -> Stages:
    """The image encoder of scale `paper`: a timm network that is trained, without the classifier.

    A plain ViT takes images of any size; its blocks are no stages (their maps are all of one size), and only the last
    is V, whatever `stages` says.

    Args:
        name: a timm name; empty: `resnet50`.
        weights: as of `Cells`; empty: random ("all random initialized").
    """
    name = name or "resnet50"
    options = {"num_classes": 0} | ({"dynamic_img_size": True} if name.startswith("vit_") else {})
    cells = Cells(name, weights=located(weights), options=options)
    plain = len({stage["reduction"] for stage in cells.net.feature_info}) == 1
    return Stages(cells, (-1,) if plain else stages)


class CachedStages(nn.Module):
    """Maps that a frozen network has already made take the place of pixels: a list of them, fine to coarse."""

    def __init__(self, channels: tuple[int, ...]):
        super().__init__()
        self.channels = tuple(channels)

    def forward(self, maps: list[Float[Tensor, "b _ _ _"]]) -> list[Float[Tensor, "b _ _ _"]]:
        """The maps as floats. ValueError if their channels are not those announced."""
        found = tuple(m.shape[1] for m in maps)
        if found != self.channels:
            raise ValueError(f"cached maps have {found} channels, expected {self.channels}")
        return [wide(m) for m in maps]


class SmallStages(nn.Module):
    """A residual network for pictures of 64 px that learns in minutes on a CPU: strides 4, 8, 16, fine to coarse.

    Two convolutions to stride 4, then one residual block a stage. Group norm: a picture's maps do not depend on its
    batch.
    """

    def __init__(self, channels: tuple[int, ...] = (32, 64, 128), *, mean: float = 0.5, sd: float = 0.25):
        super().__init__()
        self.channels, self.mean, self.sd = tuple(channels), mean, sd
        first = channels[0]
        self.stem = nn.Sequential(nn.Conv2d(3, first, 3, 2, 1, bias=False), nn.GroupNorm(_groups(first), first),
                                  nn.ReLU())  # fmt: skip
        self.blocks = nn.ModuleList(
            ResidualBlock(before, after) for before, after in zip((first, *channels), channels, strict=False)
        )

    def forward(self, pixels: Float[Tensor, "b 3 height width"]) -> list[Float[Tensor, "b _ _ _"]]:
        """RGB pixels in [0, 1] to maps."""
        x, maps = self.stem((pixels - self.mean) / self.sd), []
        for block in self.blocks:
            maps.append(x := block(x))
        return maps


class ResidualBlock(nn.Module):
    """Two convolutions and a shortcut; halves the sides."""

    def __init__(self, before: int, after: int):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(before, after, 3, 2, 1, bias=False), nn.GroupNorm(_groups(after), after), nn.ReLU(),
            nn.Conv2d(after, after, 3, 1, 1, bias=False), nn.GroupNorm(_groups(after), after),
        )  # fmt: skip
        self.short = nn.Sequential(nn.AvgPool2d(2, ceil_mode=True), nn.Conv2d(before, after, 1, bias=False))

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b _ _ _"]:
        return F.relu(self.body(x) + self.short(x))


def _groups(channels: int) -> int:
    return math.gcd(8, channels)


class Towers(nn.Module):
    """3.1: the two unimodal encoders and their pooled tokens, which the contrastive loss compares.

    Args:
        image: pixels to maps, fine to coarse, with `channels` of each; the last map is V.
        text: a text tower of `encoders` (`BertTower`), whose position 0 is [CLS].
        width: D. The encoders' own widths are mapped to it by a linear layer, the text's only if it differs.
    """

    def __init__(self, image: nn.Module, text: nn.Module, width: int):
        super().__init__()
        self.image_encoder, self.text_encoder, self.width = image, text, width
        self.project_image = nn.Linear(image.channels[-1], width)
        self.project_text = nn.Identity() if text.width == width else nn.Linear(text.width, width)

    @property
    def channels(self) -> tuple[int, ...]:
        """Channels of the maps that `vision` gives."""
        return self.image_encoder.channels

    def vision(
        self, pixels: Float[Tensor, "b 3 height width"] | list[Float[Tensor, "b _ _ _"]]
    ) -> list[Float[Tensor, "b _ _ _"]]:
        """Maps, fine to coarse, V last."""
        return self.image_encoder(pixels)

    def pooled(self, maps: list[Float[Tensor, "b _ _ _"]]) -> Float[Tensor, "b d"]:
        """T_v before any text (ICCV 3.2): global average pooling of V, and a linear layer."""
        return self.project_image(maps[-1].mean((2, 3)))

    def recompute_activations(self) -> None:
        """Activation checkpointing of ViT and BERT: less memory for one more forward pass, and the same gradients.

        A network with batch norm keeps its activations: its running means would count each batch twice.
        """
        net = self.image_encoder.cells.net if isinstance(self.image_encoder, Stages) else None
        if net is not None and not any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in net.modules()):
            net.set_grad_checkpointing()
        self.text_encoder.net.gradient_checkpointing_enable({"use_reentrant": False})

    def text(self, input_ids: Int[Tensor, "b n"], mask: Bool[Tensor, "b n"]) -> Float[Tensor, "b n d"]:
        """E^T: word embeddings of BERT; position 0 is T_t before any picture."""
        states = self.text_encoder(input_ids=input_ids, mask=mask, special=torch.zeros_like(mask)).states
        return self.project_text(states)


# ------------------------------------------------------------------------------ 3.2.1 vision decoder
class VisionDecoder(nn.Module):
    """3.2.1: the maps F_i of all levels, coarse to fine, of one width: a feature pyramid network.

    Of a network with stages the last `levels` are taken and coarse maps are added to finer ones (torchvision's FPN).
    Of a plain ViT there is one map, from which a simple pyramid is made (ViTDet: the map resized by each of `scales`
    with learnt layers, then 1 x 1 and 3 x 3 convolutions). The regression is coarse to fine, so F_1 is the coarsest.

    Where the encoder has fewer stages than levels, coarser ones are made of its last by max pooling with stride 2.

    The paper's F_i has D channels. We keep `pyramid` of them and map pooled regions to D: pooling is linear, so
    that is the same as mapping every cell, for less work, and published detectors' 256 channels fit.

    Args:
        channels: of the encoder's maps, fine to coarse.
        pyramid: channels of the maps made.
        levels: how many.
        source: `decoder`, or `encoder`: the encoder's own maps, only their width changed (arXiv, Table 10).
        scales: of a single map, coarse to fine; by default 1/2, 1, 2, 4 ...

    Raises:
        ValueError: scales for an encoder with stages, or not as many as levels.
    """

    def __init__(
        self,
        channels: tuple[int, ...],
        pyramid: int = 256,
        levels: int = 3,
        *,
        source: str = "decoder",
        scales: tuple[float, ...] = (),
    ):
        super().__init__()
        one_of("source", source, ("decoder", "encoder"))
        self.levels, self.scales = levels, ()
        if len(channels) == 1:
            self.scales = tuple(scales) or tuple(2.0 ** (i - 1) for i in range(levels))
            if len(self.scales) != levels:
                raise ValueError(f"{len(self.scales)} scales {self.scales} for {levels} levels")
            channels = channels * levels
        elif scales:
            raise ValueError(f"scales {scales} resize a single map; this encoder has {len(channels)} stages")
        self.pooled = max(levels - len(channels), 0)
        taken = (*channels, *[channels[-1]] * self.pooled)[-levels:]
        self.fpn = self.simple = self.lateral = None
        if source == "encoder":
            self.lateral = nn.ModuleList(nn.Conv2d(c, pyramid, 1) for c in reversed(taken))
        elif self.scales:
            self.simple = nn.ModuleList(simple_level(taken[0], pyramid, s) for s in self.scales)
        else:
            self.fpn = FeaturePyramidNetwork(list(taken), pyramid)

    def forward(self, maps: list[Float[Tensor, "b _ _ _"]]) -> list[Float[Tensor, "b _ _ _"]]:
        """The encoder's maps, fine to coarse, to F_1 ... F_levels, coarse to fine."""
        if self.simple is not None:
            return [level(maps[-1]) for level in self.simple]
        for _ in range(self.pooled):
            maps = [*maps, F.max_pool2d(maps[-1], 2, ceil_mode=True)]
        if self.lateral is not None:
            given = [resized(maps[-1], s) for s in self.scales] or maps[: -self.levels - 1 : -1]
            return [layer(m) for layer, m in zip(self.lateral, given, strict=True)]
        named = OrderedDict((str(i), m) for i, m in enumerate(maps[-self.levels :]))
        return list(self.fpn(named).values())[::-1]


def simple_level(channels: int, pyramid: int, scale: float) -> nn.Sequential:
    """A level of ViTDet's simple pyramid. ValueError unless the scale is a power of two from 1/2 on."""
    doublings = math.log2(scale)
    if doublings not in range(-1, 8):
        raise ValueError(f"scale {scale} is not 1/2, 1, 2, 4 ...")
    steps: list[nn.Module] = [nn.MaxPool2d(2, ceil_mode=True)] if doublings < 0 else []
    for i in range(int(max(doublings, 0))):
        half = max(channels // 2, 1)
        steps += [LayerNorm2d(channels), nn.GELU()] if i else []
        steps += [nn.ConvTranspose2d(channels, half, 2, 2)]
        channels = half
    return nn.Sequential(
        *steps, nn.Conv2d(channels, pyramid, 1, bias=False), LayerNorm2d(pyramid),
        nn.Conv2d(pyramid, pyramid, 3, 1, 1, bias=False), LayerNorm2d(pyramid),
    )  # fmt: skip


def resized(x: Float[Tensor, "b c h w"], scale: float) -> Float[Tensor, "b c _ _"]:
    """A map of another size without learnt layers: means of its cells, or bilinear between them."""
    if scale == 1:
        return x
    size = [math.ceil(n * scale) for n in x.shape[2:]]
    if scale < 1:
        return F.adaptive_avg_pool2d(x, size)
    return F.interpolate(x, size, mode="bilinear", align_corners=False)


# ------------------------------------------------------------------------------ 3.2 region proposals
class Proposals(NamedTuple):
    """Regions before any text: boxes, their saliency as a logit, and which of them exist."""

    boxes: Float[Tensor, "b q 4"]
    logits: Float[Tensor, "b q"]
    valid: Bool[Tensor, "b q"]


class RPN(nn.Module):
    """Region proposal network without labels: anchors on every map, the `count` most salient boxes (S16).

    torchvision's head (3 x 3 convolution, one logit and four deltas an anchor) on its anchors. There are no labels,
    so its logit is the saliency S of the filter, and both are trained by what comes after: the boxes by the
    regression loss (Eq. 3) and, as our RoI pooling differentiates with respect to boxes, by the downstream losses;
    the logit by the downstream losses alone. Until then proposals are anchors in arbitrary order.

    Args:
        channels: of the maps.
        count: proposals a picture, if there are as many anchors.
        anchor: side of an anchor of ratio 1, in cells of its map; 8 is torchvision's (32 px at stride 4).
        ratios: height by width.
        anchor_offset: where in its cell an anchor stands: 1/2 is its centre, 0 torchvision's upper left corner.
        nms: IoU above which the less salient box goes; 0 is off. Fewer than `count` may then be left.
        smallest: least side of a box, see `cut`.
    """

    def __init__(
        self,
        channels: int,
        *,
        count: int = 100,
        anchor: float = 8.0,
        ratios: tuple[float, ...] = (0.5, 1.0, 2.0),
        anchor_offset: float = 0.5,
        nms: float = 0.0,
        smallest: float = SMALLEST,
    ):
        super().__init__()
        if count < 1 or not 0 <= nms < 1:
            raise ValueError(f"count = {count} must be at least 1 and nms = {nms} an IoU in [0, 1)")
        self.head = RPNHead(channels, len(ratios))
        self.count, self.anchor, self.ratios, self.anchor_offset = count, anchor, tuple(ratios), anchor_offset
        self.nms, self.smallest = nms, smallest

    def anchors(self, maps: list[Float[Tensor, "b c _ _"]]) -> Float[Tensor, "m 4"]:
        """(x, y, w, h) of all anchors, in fractions of the picture: by map, row, column and ratio."""
        found = []
        for m in maps:
            like = {"device": m.device, "dtype": wide(m).dtype}
            h, w = m.shape[2:]
            y, x = ((torch.arange(n, **like) + self.anchor_offset) / n for n in (h, w))
            root = torch.tensor(self.ratios, **like).sqrt()
            size = torch.stack([self.anchor / root / w, self.anchor * root / h], dim=-1)  # a 2
            centre = torch.stack([x.expand(h, w), y[:, None].expand(h, w)], dim=-1)[:, :, None]
            size, centre = torch.broadcast_tensors(size, centre)
            found.append(torch.cat([centre, size], dim=-1).reshape(-1, 4))
        return torch.cat(found)

    def predict(
        self, maps: list[Float[Tensor, "b c _ _"]]
    ) -> tuple[Float[Tensor, "b m"], Float[Tensor, "b m 4"]]:
        """Logits and deltas of all anchors, in their order: what labels train."""
        logits, deltas = self.head(maps)
        b, a = len(maps[0]), len(self.ratios)
        flat = [[x.unflatten(1, (a, -1)).permute(0, 3, 4, 1, 2).reshape(b, -1, n) for x in part]
                for part, n in ((logits, 1), (deltas, 4))]  # fmt: skip
        logits, deltas = (wide(torch.cat(part, dim=1)) for part in flat)
        return logits.squeeze(-1), deltas

    def forward(self, maps: list[Float[Tensor, "b c _ _"]]) -> Proposals:
        logits, deltas = self.predict(maps)
        count = min(self.count, logits.shape[1])
        # suppression leaves the most salient of ten times as many
        top, index = logits.topk(min(10 * count, logits.shape[1]) if self.nms else count)
        boxes = cut(decode(self.anchors(maps)[index], take(deltas, index)), self.smallest)
        valid = torch.ones_like(top, dtype=torch.bool)
        if self.nms:
            kept, valid = self.suppress(boxes.detach(), top.detach(), count)
            boxes, top = take(boxes, kept), take(top, kept)
        return Proposals(boxes, top, valid)

    def suppress(
        self, boxes: Float[Tensor, "b m 4"], logits: Float[Tensor, "b m"], count: int
    ) -> tuple[Int[Tensor, "b q"], Bool[Tensor, "b q"]]:
        """Indices of what suppression leaves, and which of them are real; picture by picture, or a batch would
        share rounding."""
        kept = torch.zeros(len(boxes), count, dtype=torch.long, device=boxes.device)
        real = torch.zeros_like(kept, dtype=torch.bool)
        for i, (one, score) in enumerate(zip(boxes, logits, strict=True)):
            rest = nms(one, score, self.nms)[:count]
            kept[i, : len(rest)], real[i, : len(rest)] = rest, True
        return kept, real


def decode(anchors: Float[Tensor, "*r 4"], deltas: Float[Tensor, "*r 4"]) -> Float[Tensor, "*r 4"]:
    """Faster R-CNN's deltas on anchors, (x, y, w, h) both: centre moved in units of the anchor, sides times exp.

    The exponent is cut at log(1000 / 16), as in torchvision.
    """
    centre = anchors[..., :2] + deltas[..., :2] * anchors[..., 2:]
    size = anchors[..., 2:] * deltas[..., 2:].clamp(max=math.log(1000 / 16)).exp()
    return torch.cat([centre, size], dim=-1)


class QueryProposals(nn.Module):
    """DETR's queries (arXiv 3.2): every query attends to the coarsest map and gives a box and its saliency.

    The paper builds on DETR, whose queries learn from labels which part of the picture is theirs. We have no labels
    and give every query a box of its own to start from (learnable; the multi-scale grid at first), which the head
    corrects: from DETR's start all queries would propose the same box and nothing would part them.

    Args:
        channels: of the maps, and the width of the transformer.
        count: queries.
        depth: layers of encoder and decoder each (DETR: 6).
        heads, dropout: of both.
    """

    def __init__(
        self,
        channels: int,
        *,
        count: int = 100,
        depth: int = 6,
        heads: int = 8,
        dropout: float = 0.0,
        smallest: float = SMALLEST,
    ):
        super().__init__()
        if count < 1:
            raise ValueError(f"count = {count} must be at least 1")
        self.count, self.smallest = count, smallest
        self.queries = nn.Parameter(torch.randn(count, channels))
        grid = convert(multi_scale_grid(1, 1, count), "xyxy", "cxcywh")
        self.reference = nn.Parameter(torch.logit(grid, eps=0.02))

        def layer(kind):
            return kind(channels, heads, 4 * channels, dropout, batch_first=True, norm_first=True)

        self.encoder = nn.ModuleList(layer(nn.TransformerEncoderLayer) for _ in range(depth))
        self.decoder = nn.ModuleList(layer(nn.TransformerDecoderLayer) for _ in range(depth))
        self.norm = nn.LayerNorm(channels)
        self.saliency = nn.Linear(channels, 1)
        self.box = nn.Sequential(nn.Linear(channels, channels), nn.ReLU(), nn.Linear(channels, channels), nn.ReLU(),
                                 nn.Linear(channels, 4))  # fmt: skip
        for parameter in self.box[-1].parameters():
            nn.init.zeros_(parameter)

    def forward(self, maps: list[Float[Tensor, "b c _ _"]]) -> Proposals:
        m = maps[0]
        memory = m.flatten(2).mT + positions(*m.shape[1:], like=m).to(m.dtype)
        for layer in self.encoder:
            memory = layer(memory)
        x = self.queries.expand(len(m), -1, -1)
        for layer in self.decoder:
            x = layer(x, memory)
        x = self.norm(x)
        boxes = cut(torch.sigmoid(self.reference + wide(self.box(x))), self.smallest)
        logits = wide(self.saliency(x)).squeeze(-1)
        return Proposals(boxes, logits, torch.ones_like(logits, dtype=torch.bool))


def positions(channels: int, h: int, w: int, *, like: Tensor) -> Float[Tensor, "hw channels"]:
    """DETR's sine encoding of the cells' centres, row by row: one half of the channels for y, the other for x."""
    half = (channels + 1) // 2
    rate = 10_000 ** (torch.arange((half + 1) // 2, device=like.device) * 2 / half)
    parts = []
    for n in (h, w):
        angle = 2 * math.pi * (torch.arange(n, device=like.device) + 0.5)[:, None] / n / rate
        parts.append(torch.stack([angle.sin(), angle.cos()], dim=-1).flatten(1)[:, :half])
    y, x = parts
    whole = torch.cat([y[:, None].expand(h, w, half), x[None].expand(h, w, half)], dim=-1)
    return whole.reshape(h * w, -1)[:, :channels]


def load_proposals(
    proposals: RPN | QueryProposals,
    path: str | Path,
    *,
    decoder: VisionDecoder | None = None,
    encoder: nn.Module | None = None,
) -> str:
    """Load weights of a detector (Table 6, row 1; arXiv, Table 9) into a proposal module, as fp32, in place.

    Two layouts, in a safetensors file or one that `torch.load(weights_only=True)` opens:

    * torchvision's Faster R-CNN (`fasterrcnn_resnet50_fpn`, 256 channels), for an `RPN`: `rpn.head.conv.0.0.*`
      (`rpn.head.conv.*` in older files), `rpn.head.cls_logits.*`, `rpn.head.bbox_pred.*`; for `decoder`,
      `backbone.fpn.inner_blocks.<i>.0.*` and `layer_blocks.<i>.0.*` (older: without `.0`), of which the coarsest are
      taken, as many as it has levels; for `encoder`, `backbone.body.*`. All other weights of the file are left alone.
    * our own names: what `proposals.state_dict()` gives, of an `RPN` or of `QueryProposals`; of a decoder, too, under
      `pyramid.`, and of an image network under `image_encoder.`.

    An RPN's deltas are steps from its anchors, so a file with other anchors than those that were set is refused: the
    settings are what a reopened run builds its anchors from. torchvision's are 8 cells wide and stand in the upper left
    corners of their cells; a file of our own says which (`anchors`: side and offset), or else has those that were set.

    Args:
        encoder: what gives the maps. A file's image network is loaded into `Stages`; maps of another network than the
            detector's are refused, because its proposals would mean nothing on them. Without it the file's image
            network is left alone.

    Returns:
        A line that says what was loaded.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file cannot be read, its anchors are others, or a weight is missing or has another shape; the
            message lists them.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such weights file; give a .safetensors or .pth file")
    state = {str(k): v.float() for k, v in read_tensors(path).items()}
    if any(k.startswith("rpn.") for k in state):
        state = from_torchvision(state, decoder)
    if isinstance(proposals, QueryProposals) and any(k.startswith("head.") for k in state):
        raise ValueError(f"{path} holds an RPN, but these proposals are queries: use proposals='rpn'")
    anchors, parts = state.pop("anchors", None), {"image_encoder": {}, "pyramid": {}, "": {}}
    for key, value in state.items():
        part, _, name = key.partition(".")
        parts[part if part in parts else ""][name if part in parts else key] = value
    loaded = ["proposals"]
    if anchors is not None and isinstance(proposals, RPN):
        theirs, mine = anchors.tolist(), [proposals.anchor, proposals.anchor_offset]
        if not all(map(math.isclose, theirs, mine)):
            raise ValueError(
                f"{path} has anchors of {theirs[0]:g} cells at {theirs[1]:g}, these proposals have {mine[0]:g} at "
                f"{mine[1]:g}: set anchor={theirs[0]:g} and anchor_offset={theirs[1]:g}"
            )
        loaded.append(f"anchors of {theirs[0]:g} cells at {theirs[1]:g}")
    if encoder is not None and (parts["image_encoder"] or isinstance(encoder, Stages)):
        _load_encoder(encoder, parts["image_encoder"], path)
        loaded.insert(0, "image network")
    if decoder is not None:
        _load_all(decoder, parts["pyramid"], path, "pyramid.")
        loaded.insert(loaded.index("proposals"), "decoder")
    _load_all(proposals, parts[""], path, "")
    return f"{path.name}: {', '.join(loaded)}"


def _load_encoder(encoder: nn.Module, state: dict[str, Tensor], path: Path) -> None:
    """A detector's image network into `Stages`; ValueError where the two have not looked at the same maps."""
    remedy = "detector='boxes' trains one for this image encoder"
    if not isinstance(encoder, Stages):
        raise ValueError(
            f"{path} is a detector with an image network of its own, but this run reads the maps of another: "
            f"use scale='paper'; or {remedy}"
        )
    if not state:
        raise ValueError(f"{path} has no image network, and its proposals mean nothing on the maps of another: "
                         f"give the file of a whole detector; or {remedy}")  # fmt: skip
    net = encoder.cells.net
    # torchvision's frozen batch norms do not count their batches
    counts = {k: v for k, v in net.state_dict().items() if k.endswith("num_batches_tracked")}
    try:
        _load_all(net, counts | state, path, "image_encoder.")
    except ValueError as error:
        raise ValueError(
            f"{error}. A fasterrcnn_resnet50_fpn needs vision='resnet50', stages='2, 3, 4'; {remedy}"
        ) from error


def from_torchvision(state: dict[str, Tensor], decoder: VisionDecoder | None) -> dict[str, Tensor]:
    """torchvision's names of an RPN's head, an FPN and a ResNet to ours, and its anchors."""
    found = {"anchors": torch.tensor([8.0, 0.0])}
    stages = {int(k.split(".")[3]) for k in state if k.startswith("backbone.fpn.inner_blocks.")}
    skipped = len(stages) - (decoder.levels if decoder else 0)
    for key, value in state.items():
        parts = key.split(".")
        if key.startswith("rpn."):
            name = key.removeprefix("rpn.")
            found[name.replace("conv.", "conv.0.0.") if len(parts) == 4 and parts[2] == "conv" else name] = (
                value
            )
        elif key.startswith("backbone.fpn.") and len(parts) in (5, 6) and int(parts[3]) >= skipped:
            found[f"pyramid.fpn.{parts[2]}.{int(parts[3]) - skipped}.0.{parts[-1]}"] = value
        elif key.startswith("backbone.body."):
            found["image_encoder." + key.removeprefix("backbone.body.")] = value
    return found


def _load_all(module: nn.Module, state: dict[str, Tensor], path: Path, prefix: str) -> None:
    wanted = module.state_dict()
    missing, extra = sorted(wanted.keys() - state.keys()), sorted(state.keys() - wanted.keys())
    wrong = [f"{k}: file {tuple(v.shape)}, module {tuple(wanted[k].shape)}"
             for k, v in state.items() if k in wanted and v.shape != wanted[k].shape]  # fmt: skip
    if missing or extra or wrong:
        raise ValueError(
            f"{path} does not fit {type(module).__name__} ({prefix or 'no prefix'}): missing {missing[:5]}, unknown "
            f"{extra[:5]}, of another shape {wrong[:5]} (first five each)"
        )
    module.load_state_dict(state)


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


# ------------------------------------------------------------------------------ Algorithm 1, the whole
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
            region's embedding from F_i with the words of its level; 0 for what is no word.
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
