"""SLAN's region proposals (3.2): an RPN over anchors (ICCV) or DETR's queries (arXiv), and weights from elsewhere.

A box is (x1, y1, x2, y2) in fractions of the image and stays inside of it, with x1 < x2 and y1 < y2.

Axes: `b` images, `q` proposals, `c` channels, `h` `w` cells of a map.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torchvision.models.detection.rpn import RPNHead
from torchvision.ops import nms

from finematch.boxes import convert, multi_scale_grid
from finematch.files import read_tensors
from finematch.losses import wide
from finematch.models.configs import LocatorConfig
from finematch.models.slan.towers import Stages, VisionDecoder

# The least side of a box: a smaller one is inside a cell of every map, where its size gets no gradient.
SMALLEST = LocatorConfig.smallest


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
