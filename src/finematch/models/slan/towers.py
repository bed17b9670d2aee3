"""SLAN's maps (3.1, 3.2.1): the unimodal encoders, and the vision decoder that makes F_i of the image encoder's maps.

Axes: `b` images, `n` tokens of a text (N^T), `c` channels, `h` `w` cells of a map, `d` width of a token (D). Masks are
True where there is something.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from pathlib import Path

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torchvision.models.convnext import LayerNorm2d
from torchvision.ops import FeaturePyramidNetwork

from finematch.config import located
from finematch.encoders import Cells
from finematch.losses import wide


def one_of(name: str, value: str, known: tuple[str, ...]) -> str:
    """The value; ValueError if it is none of `known`."""
    if value not in known:
        raise ValueError(f"{name} is {value!r}; use one of {known}")
    return value


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
