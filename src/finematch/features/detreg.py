"""DETReg (Bar et al., CVPR 2022): class-agnostic boxes from an unsupervised Deformable DETR.

Its checkpoints name parameters as fundamentalvision/Deformable-DETR does. Here they are renamed for transformers'
Deformable DETR, which needs no compiled operator; what has no name there is refused, not skipped.

Axes: `q` queries.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from finematch.boxes import clip, convert
from finematch.encoders import deformable_detr
from finematch.features.detections import Detections, is_detections
from finematch.files import file_digest, why_unreadable

ENCODER = {
    "self_attn": "self_attn",
    "norm1": "self_attn_layer_norm",
    "linear1": "fc1",
    "linear2": "fc2",
    "norm2": "final_layer_norm",
}
DECODER = {  # its norms are numbered in the order of the file, not in that of the computation
    "self_attn": "self_attn",
    "norm2": "self_attn_layer_norm",
    "cross_attn": "encoder_attn",
    "norm1": "encoder_attn_layer_norm",
    "linear1": "fc1",
    "linear2": "fc2",
    "norm3": "final_layer_norm",
}
OTHERS = {
    "backbone.0.body": "model.backbone.conv_encoder.model",
    "input_proj": "model.input_proj",
    "query_embed": "model.query_position_embeddings",
    "transformer.level_embed": "model.level_embed",
    "transformer.reference_points": "model.reference_points",
    "transformer.decoder.bbox_embed": "model.decoder.bbox_embed",  # there with iterative refinement only
    "class_embed": "class_embed",
    "bbox_embed": "bbox_embed",
}
# DETReg's object embeddings teach while it trains; the counters are of batch norm and of a profiler
UNUSED = re.compile(r"feature_embed\..*|.*\.num_batches_tracked|(.*\.)?total_(ops|params)")
LAYER = re.compile(r"transformer\.(encoder|decoder)\.layers\.(\d+)\.(\w+)\.(.+)")

MEAN, SD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's, as DETReg trains


class DETReg:
    """A DETReg checkpoint as a detector: `detector(picture)` gives all its boxes, the best first.

    The score is the sigmoid of the foreground logit and there is no suppression of overlaps, as in DETReg's
    evaluation of proposals (register F18). A picture is resized to `shortest` pixels, or less if its longer side
    would exceed `longest`.

    Args:
        weights: the published `.pth` (its `model` entry, or the parameters alone), or safetensors.
        backbone: timm's name of the network below.
        heads: attention heads; all other sizes are read off the parameters.
        foreground: which column of the class logits is the object. DETReg's evaluation takes column 1 whatever the
            number of columns is.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file cannot be read, or a parameter is missing, of another shape, or unknown by name.
    """

    def __init__(
        self,
        weights: str | Path,
        *,
        backbone: str = "resnet50",
        heads: int = 8,
        foreground: int = 1,
        shortest: int = 800,
        longest: int = 1333,
    ):
        state = read_checkpoint(weights)
        shape = shape_of(state, weights, heads)
        if not 0 <= foreground < shape["num_labels"]:
            raise ValueError(f"foreground is column {foreground} of {shape['num_labels']} class logits")
        self.net = deformable_detr(
            published_names(state, weights), backbone=backbone, source=weights, **shape
        )
        self.foreground, self.shortest, self.longest = foreground, shortest, longest
        self.key = {
            "proposals": "detreg",
            "weights": file_digest(weights),
            "backbone": backbone,
            "heads": heads,
            "foreground": foreground,
            "shortest": shortest,
            "longest": longest,
        }

    def to(self, device: torch.device | str) -> DETReg:
        """The same detector with its network on another device."""
        self.net.to(device)
        return self

    @torch.no_grad()
    def __call__(self, picture: Image.Image) -> tuple[Float[np.ndarray, "q 4"], Float[np.ndarray, "q"]]:
        """Boxes of one RGB picture in its own xyxy pixels, clamped to it, and their scores in [0, 1], falling."""
        device = next(self.net.parameters()).device
        found = self.net(pixel_values=self.pixels(picture)[None].to(device))
        logits, order = found.logits[0, :, self.foreground].float().sort(descending=True, stable=True)
        size = torch.tensor([*picture.size, *picture.size], device=device)
        boxes = convert(found.pred_boxes[0, order].float(), "cxcywh", "xyxy") * size
        return clip(boxes, *picture.size).cpu().numpy(), logits.sigmoid().cpu().numpy()

    def pixels(self, picture: Image.Image) -> Float[Tensor, "3 height width"]:
        """The picture as the network sees it."""
        low, high = min(picture.size), max(picture.size)
        shortest = min(self.shortest, round(self.longest * low / high))
        size = tuple(shortest if side == low else int(shortest * side / low) for side in picture.size)
        array = np.asarray(picture.resize(size, Image.Resampling.BILINEAR), np.float32) / 255
        return torch.from_numpy((array - np.float32(MEAN)) / np.float32(SD)).permute(2, 0, 1)


def open_proposals(
    name: str,
    *,
    scale: str = "tiny",
    weights: str | Path = "",
    device: torch.device | str = "cpu",
    echo: Callable[[str], None] | None = print,
) -> DETReg | Detections | str:
    """What `features.proposals.extract_proposals` takes, by the parameter `proposals` of FELGA's pages.

    A checkpoint is opened as DETReg's, a `.json` file or a folder as boxes in COCO's results format, any other name is
    that of a method. At scale `paper` `auto` is the paper's DETReg, whose checkpoint is looked for in `weights` as
    detreg.pth or detreg.safetensors; without one it is selective search, the fallback of register F18, which is said,
    and recorded by the run.

    Raises:
        DataError: For a file of boxes that is none.
        ValueError: For a checkpoint that is none, or `given` without a file: ground truth is never a proposal.
    """
    if name == "auto" and scale == "paper":
        files = [Path(weights) / f"detreg{ending}" for ending in (".pth", ".safetensors")]
        name = str(next((file for file in files if file.is_file()), ""))
        if not name and echo:
            echo(
                f"proposals=auto: there is no DETReg checkpoint {files[0]}; selective search stands in for it (F18)"
            )
        name = name or "selective_search"
    if name == "given":
        raise ValueError("proposals=given: name the file (or folder) of the boxes, in COCO's results format")
    if is_detections(name):
        return Detections(name)
    return DETReg(name).to(device) if Path(name).is_file() else name


def read_checkpoint(path: str | Path) -> dict[str, Tensor]:
    """The parameters of a checkpoint; nothing in the file is executed.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it cannot be read as tensors.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such checkpoint; give DETReg's .pth or a .safetensors file")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        # the published files carry the command line beside the weights
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(path, map_location="cpu", weights_only=True)
        state = content.get("model", content)
        if not all(isinstance(value, Tensor) for value in state.values()):
            raise TypeError("not all of its entries are tensors")
        return state
    except Exception as error:
        raise ValueError(
            f"{path} cannot be read as a checkpoint of tensors ({why_unreadable(path, error)}); save its model part "
            "as safetensors"
        ) from error


def shape_of(state: dict[str, Tensor], source: str | Path, heads: int) -> dict:
    """The sizes of a Deformable DETR, read off the parameters of a checkpoint.

    Raises:
        ValueError: If a parameter that tells a size is missing.
    """

    def layers(part: str) -> int:
        found = (LAYER.match(name) for name in state)
        return len({match[2] for match in found if match and match[1] == part})

    try:
        queries, twice = state["query_embed.weight"].shape
        levels = len(state["transformer.level_embed"])
        shape = {
            "num_queries": queries,
            "d_model": twice // 2,
            "num_feature_levels": levels,
            "num_labels": len(state["class_embed.0.weight"]),
            "with_box_refine": "transformer.decoder.bbox_embed.0.layers.0.weight" in state,
        }
        for part, attention in (("encoder", "self_attn"), ("decoder", "cross_attn")):
            first = f"transformer.{part}.layers.0"
            points = len(state[f"{first}.{attention}.attention_weights.weight"])
            shape |= {
                f"{part}_layers": layers(part),
                f"{part}_attention_heads": heads,
                f"{part}_n_points": points // (heads * levels),
                f"{part}_ffn_dim": len(state[f"{first}.linear1.weight"]),
            }
    except KeyError as error:
        raise ValueError(f"{source} is no DETReg checkpoint: it lacks {error}") from error
    return shape


def published_names(state: dict[str, Tensor], source: str | Path) -> dict[str, Tensor]:
    """The parameters in the names of transformers' published Deformable DETR checkpoints.

    Raises:
        ValueError: For names that have no counterpart; the first five are listed.
    """
    renamed, unknown = {}, []
    for name, value in state.items():
        if UNUSED.fullmatch(name):
            continue
        if match := LAYER.fullmatch(name):
            part, layer, module, rest = match.groups()
            known = {"encoder": ENCODER, "decoder": DECODER}[part]
            if module not in known:
                unknown.append(name)
                continue
            target = f"model.{part}.layers.{layer}.{known[module]}"
            if rest in ("in_proj_weight", "in_proj_bias"):  # torch's attention stacks the three
                for one, rows in zip("qkv", value.chunk(3), strict=True):
                    renamed[f"{target}.{one}_proj.{rest.removeprefix('in_proj_')}"] = rows
            else:
                renamed[f"{target}.{rest}"] = value
            continue
        prefix = next((p for p in OTHERS if name == p or name.startswith(f"{p}.")), None)
        if prefix is None:
            unknown.append(name)
        else:
            renamed[OTHERS[prefix] + name.removeprefix(prefix)] = value
    if unknown:
        raise ValueError(f"{source} is no DETReg checkpoint: unknown parameters {unknown[:5]} (first five)")
    return renamed
