"""Expensive frozen features, extracted once into SCAN's layout plus boxes: grid cells, regions, text states.

Cells and regions have one layout, features "n r d" with boxes "n r 4" in pixels, so that one tower reads both
and any attention over them can be drawn on the picture. What made them (backbone and its weights, proposals,
size) is their key: features with another key are never mistaken for these.

Axes: `n` pictures, `r` cells or regions, `d` width.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor
from torchvision.ops import roi_align
from transformers import PreTrainedTokenizerBase

from finematch.boxes import grid_boxes, iou, multi_scale_grid
from finematch.data.pairs import StateSource
from finematch.data.precomp import Regions, RegionsWriter, finished, load_regions
from finematch.data.record import DataError, Record
from finematch.encoders import BertTower, Cells
from finematch.text import tokenise
from finematch.training import by_one_process, write_atomically


@dataclass
class Backbone:
    """A frozen `Cells` network, the side (pixels) that pictures are squashed to, and the key of its weights."""

    net: Cells
    size: int
    key: dict = field(default_factory=dict)

    @torch.no_grad()
    def __call__(self, pictures: list[Image.Image]) -> Float[Tensor, "b d h w"]:
        """Feature maps of RGB pictures, each squashed to size x size: a cell stays a fixed fraction of it."""
        arrays = [
            np.asarray(p.resize((self.size, self.size), Image.Resampling.BICUBIC), np.float32)
            for p in pictures
        ]
        device = next(self.net.parameters()).device
        return self.net(torch.from_numpy(np.stack(arrays) / 255).permute(0, 3, 1, 2).to(device))


def timm_backbone(name: str, *, weights: str | Path = "", size: int = 0, **options) -> Backbone:
    """A timm network ready to extract: `weights` as in `Cells` (`""` random, `"hub"`, or a file).

    The key holds the file's SHA-256, or "random": features of a random network say so. A random network is
    always the same one, whatever was drawn before: splits extracted in two processes belong together.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = Cells(name, weights=weights, **options).eval().requires_grad_(False)
    if weights in ("", "hub"):
        digest = weights or "random"
    else:
        digest = hashlib.sha256(Path(weights).read_bytes()).hexdigest()
    size = size or net.size
    return Backbone(net, size, {"backbone": name, "weights": digest, "size": size, "stage": net.stage,
                                **json.loads(json.dumps(options, default=str))})  # fmt: skip


def mobilenet(weights: str | Path) -> Backbone:
    """MobileNetV2 1.0 with weights that were converted from TensorFlow: its padding and normalisation."""
    return timm_backbone("mobilenetv2_100", weights=weights, mean=0.5, sd=0.5, options={"pad_type": "same"})


def taught_backbone(
    kept: Path, teach: Callable[[], Cells], name: str, *, stage: int, size: int, trained_on: str
) -> Backbone:
    """The network of the file `kept`, frozen, for pictures with values about 0.5; made by `teach` if there is no file.

    Raises:
        TrainingError: If it must be made and there are several processes (`training.by_one_process`).
    """
    if not kept.is_file():
        by_one_process(f"{kept}, a network trained on {trained_on},")
        state = teach().state_dict()
        write_atomically(kept, lambda part: save_file(state, part))
    net = Cells(name, stage=stage, mean=0.5, sd=0.25)
    net.load_state_dict(load_file(kept))
    net.eval().requires_grad_(False)
    key = {
        "backbone": name,
        "weights": fingerprint(net),
        "size": size,
        "stage": stage,
        "trained_on": trained_on,
    }
    return Backbone(net, size, key)


def fingerprint(net: torch.nn.Module) -> str:
    """SHA-256 of a network's weights: features cached under it are never another network's."""
    digest = hashlib.sha256()
    for value in net.state_dict().values():
        digest.update(value.cpu().contiguous().numpy())
    return digest.hexdigest()


# ------------------------------------------------------------------------------------------- proposals
def selective_search(picture: Image.Image, top: int) -> Float[np.ndarray, "r 4"]:
    """The first `top` distinct boxes of OpenCV contrib's fast selective search, xyxy pixels.

    Boxes under 4 % of the picture's shorter side are dropped; a picture with fewer proposals than `top` is
    filled up from the multi-scale grid, so that every picture has as many. OpenCV ranks its proposals with
    the C library's `rand`; it is seeded here, or a picture's boxes would depend on the pictures before it.
    """
    import cv2

    ctypes.CDLL(None).srand(1)
    search = cv2.ximgproc.segmentation.createSelectiveSearchSegmentation()
    search.setBaseImage(np.asarray(picture)[:, :, ::-1].copy())
    search.switchToSelectiveSearchFast()
    found = search.process().astype(np.float32)
    found[:, 2:] += found[:, :2]
    sides = found[:, 2:] - found[:, :2]
    found = distinct(found[(sides >= 0.04 * min(picture.size)).all(1)])
    spare = multi_scale_grid(*picture.size, top).numpy()
    return np.concatenate([found, spare])[:top]


def distinct(boxes: Float[np.ndarray, "m 4"], threshold: float = 0.9) -> Float[np.ndarray, "k 4"]:
    """Boxes in order, without those that overlap an earlier one by more than `threshold` IoU."""
    if not len(boxes):
        return boxes
    overlap, keep = iou(torch.from_numpy(boxes), torch.from_numpy(boxes)).numpy(), []
    for i in range(len(boxes)):
        if not keep or overlap[i, keep].max() <= threshold:
            keep.append(i)
    return boxes[keep]


def propose(method: str) -> tuple[str, Callable[[Image.Image, int], np.ndarray]]:
    """A proposal method by name, and the name of what it really is.

    `"auto"` takes selective search where OpenCV has its contrib modules and the grid where it has not; the
    returned name goes into the features' key, so the file says which.

    Raises:
        ValueError: For an unknown method, or selective search without OpenCV contrib.
    """
    if method not in ("auto", "selective_search", "grid"):
        raise ValueError(f"proposals is {method!r}; use 'auto', 'selective_search' or 'grid'")
    if method != "grid":
        try:
            import cv2

            cv2.ximgproc.segmentation.createSelectiveSearchSegmentation()
            return "selective_search", selective_search
        except (ImportError, AttributeError) as error:
            if method == "selective_search":
                raise ValueError("selective search needs opencv-contrib-python-headless; "
                                 "install it, or use proposals='grid'") from error  # fmt: skip
    return "grid", lambda picture, top: multi_scale_grid(*picture.size, top).numpy()


# ------------------------------------------------------------------------------------------- extraction
def extract(
    records: list[Record],
    backbone: Backbone,
    folder: str | Path,
    split: str,
    *,
    kind: str = "cells",
    regions: int = 36,
    proposals: str = "auto",
    block: int = 32,
    dtype: str = "float16",
    echo: Callable[[str], None] | None = print,
) -> Regions:
    """Features of every picture, read back memory-mapped; finished work is reused, broken off work resumed.

    `cells`: the backbone's feature map, a box a cell. `regions`: `regions` proposals a picture, each the
    mean of a 3 x 3 RoI-align of the map (aligned, 2 samples a bin and axis).

    Raises:
        ValueError: For an unknown `kind`.
        DataError: For a picture that cannot be read: it is named, nothing is skipped, because the files
            would no longer pair up.
    """
    if kind not in ("cells", "regions"):
        raise ValueError(f"kind is {kind!r}; use 'cells' or 'regions'")
    method, search = ("cells", None) if kind == "cells" else propose(proposals)
    meta = {**backbone.key, "kind": kind, "proposals": method, "regions": 0 if kind == "cells" else regions}
    ids = [r.image_id for r in records]
    if finished(folder, split, meta, ids):
        made = load_regions(folder, split)
        if made.features.dtype == dtype:
            return made
    writer, start = None, 0
    while start < len(records):
        if writer is None:  # the first picture tells the shape
            maps = backbone([records[0].open()])
            r = maps.shape[2] * maps.shape[3] if kind == "cells" else regions
            writer = RegionsWriter(folder, split, len(records), r, maps.shape[1], meta, dtype, ids=ids)
            start = writer.done
            continue
        pictures = [record.open() for record in records[start : start + block]]
        maps, sizes = backbone(pictures), np.array([p.size for p in pictures], np.int32)
        if kind == "cells":
            features = maps.flatten(2).transpose(1, 2)
            boxes = np.stack([grid_boxes(*p.size, maps.shape[2], maps.shape[3]).numpy() for p in pictures])
        else:
            boxes = np.stack([search(p, regions) for p in pictures])
            features = pool_regions(maps, torch.from_numpy(boxes), torch.from_numpy(sizes))
        writer.write(features.cpu().numpy(), boxes, sizes)
        start += len(pictures)
        if echo and (start == len(records) or (start // block) % 32 == 0):
            echo(f"{split}: {start} of {len(records)} pictures ({method})")
    if writer is None:
        raise DataError(
            folder, f"split {split}", "there are no pictures to extract", "Check the dataset's split"
        )
    writer.finish(records)
    return load_regions(folder, split)


def pool_regions(
    maps: Float[Tensor, "b d h w"], boxes: Float[Tensor, "b r 4"], sizes: Tensor
) -> Float[Tensor, "b r d"]:
    """Mean of a 3 x 3 RoI-align for boxes in xyxy pixels of pictures of `sizes` "b 2" (width, height)."""
    h, w = maps.shape[2:]
    scale = sizes.new_tensor([w, h, w, h]) / sizes.repeat(1, 2)[:, None]  # b 1 4, pixels to cells
    scaled = (boxes * scale).to(maps)
    pooled = roi_align(maps, list(scaled), output_size=3, sampling_ratio=2, aligned=True)
    return pooled.mean((2, 3)).unflatten(0, boxes.shape[:2])


@torch.no_grad()
def text_states(
    captions: list[str],
    tower: BertTower,
    tokenizer: PreTrainedTokenizerBase,
    folder: str | Path,
    split: str,
    *,
    key: str,
    max_length: int = 32,
    block: int = 256,
) -> StateSource:
    """Token states of a frozen text model for every caption, cached in fp16 under `key` and memory-mapped.

    The hash of `key` (the model's, see `fingerprint`) and of the captions names the file: other captions or
    another model make another file.

    Raises:
        ValueError: For a caption whose states are not finite in fp16, or without a known word.
    """
    digest = hashlib.sha256(json.dumps([key, max_length, captions]).encode()).hexdigest()[:16]
    path = Path(folder) / f"{split}_text_{digest}.npz"
    states_path = path.with_suffix(".npy")
    if not (path.exists() and states_path.exists()):
        path.parent.mkdir(parents=True, exist_ok=True)
        ragged = tokenise(captions, tokenizer, max_length=max_length)
        device = next(tower.parameters()).device
        order = np.argsort(ragged.lengths, kind="stable")  # captions of one length need no padding
        part = states_path.with_name(f"{states_path.name}.part")
        states = np.lib.format.open_memmap(part, "w+", np.float16, (len(ragged.ids), tower.width))
        for i in range(0, len(order), block):
            index = order[i : i + block]
            tokens = tower.eval()(**{k: v.to(device) for k, v in ragged.batch(index).items()})
            found = tokens.states.half()
            if not torch.isfinite(found[tokens.mask]).all():
                bad = (~torch.isfinite(found).all(-1) & tokens.mask).any(1).int().argmax()
                raise ValueError(
                    f"caption {index[bad]} ({captions[index[bad]]!r}): a state is not finite in fp16; "
                    "check the model's weights"
                )
            for row, c in enumerate(index):
                states[ragged.start[c] : ragged.start[c + 1]] = found[row, : ragged.lengths[c]].cpu().numpy()
        states.flush()
        del states
        part.replace(states_path)

        def save(temporary: Path) -> None:
            with open(temporary, "wb") as file:
                np.savez(file, special=ragged.special, start=ragged.start)

        write_atomically(path, save)
    index = np.load(path)
    return StateSource(np.load(states_path, mmap_mode="r"), index["special"], index["start"])
