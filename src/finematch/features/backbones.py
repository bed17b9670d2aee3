"""Frozen picture networks: a timm network with its key, or one that was trained here.

Axes: `b` images, `d` width, `h` `w` cells of a map.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from finematch.data.checks import read_json
from finematch.encoders import Cells
from finematch.files import cached, digest_within, file_digest, read_tensors, write_atomically
from finematch.training import by_one_process


class Backbone:
    """A frozen `Cells` network, the side (pixels) that pictures are squashed to, and the key of its weights.

    Args:
        net: the network, or what opens it: features that were made before are found without it.
        folder: where it and the log of its training lie, if it was trained here.
        digest: `fingerprint` of the network, where it is known before it is opened.
    """

    def __init__(
        self,
        net: Cells | Callable[[], Cells],
        size: int,
        key: dict | None = None,
        folder: Path | None = None,
        *,
        digest: str = "",
    ):
        self._net, self.size, self.key, self.folder = net, size, {} if key is None else key, folder
        self._digest, self._device = digest, None

    @property
    def net(self) -> Cells:
        if not isinstance(self._net, torch.nn.Module):
            self._net = self._net().to(self._device)
        return self._net

    @property
    def digest(self) -> str:
        """`fingerprint` of the network."""
        return self._digest or fingerprint(self.net)

    def to(self, device: torch.device) -> Backbone:
        """The same, with its network on a device, now or when it is opened."""
        self._device = device
        if isinstance(self._net, torch.nn.Module):
            self._net.to(device)
        return self

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
        digest = file_digest(weights)
    size = size or net.size
    return Backbone(net, size, {"backbone": name, "weights": digest, "size": size, "stage": net.stage,
                                **json.loads(json.dumps(options, default=str))})  # fmt: skip


def mobilenet(weights: str | Path) -> Backbone:
    """MobileNetV2 1.0 with weights that were converted from TensorFlow: its padding and normalisation."""
    return timm_backbone("mobilenetv2_100", weights=weights, mean=0.5, sd=0.5, options={"pad_type": "same"})


def taught_backbone(
    cache: str | Path,
    kind: str,
    key: dict,
    teach: Callable[[Path], Cells],
    *,
    size: int,
    trained_on: str,
) -> Backbone:
    """A network that was trained here, frozen, for pictures with values about 0.5; made by `teach` if not cached.

    Args:
        kind, key: of the cache's entry, see `files.cached`. `backbone`, `stage` and, where timm is given any, `options`
            in the key make the network.
        teach: trains in the folder that it is given, and goes on there if it was broken off.

    Raises:
        TrainingError: If it must be made and there are several processes (`training.by_one_process`).
        DataError: If its file was damaged since.
    """

    def make(folder: Path) -> None:
        by_one_process(f"a network trained on {trained_on} ({folder.name.removesuffix('.part')})")
        state = teach(folder).state_dict()
        write_atomically(folder / "cells.safetensors", lambda part: save_file(state, part))
        for name in ("checkpoint.pt", "best.safetensors"):  # the log stays
            (folder / name).unlink(missing_ok=True)

    kept, name, stage = cached(cache, kind, key, make) / "cells.safetensors", key["backbone"], key["stage"]
    options = {"options": key["options"]} if "options" in key else {}

    def build() -> Cells:
        net = Cells(name, stage=stage, mean=0.5, sd=0.25, **options)
        net.load_state_dict(read_tensors(kept))
        return net.eval().requires_grad_(False)

    digest = digest_within(kept, "fingerprint", lambda: fingerprint(build()))
    key = {
        "backbone": name,
        "weights": digest,
        "size": size,
        "stage": stage,
        "trained_on": trained_on,
        **options,
    }
    return Backbone(build, size, key, kept.parent, digest=digest)


def whole_batches(data, device: torch.device, size: int = 100) -> Iterator[dict[str, Tensor]]:
    """All of a data set in its order, `size` items a batch, on a device."""
    for i in range(0, len(data), size):
        batch = data.__getitems__(list(range(i, min(i + size, len(data)))))
        yield {k: v.to(device) for k, v in batch.items()}


def fingerprint(net: torch.nn.Module) -> str:
    """SHA-256 of a network's weights: features cached under it are never another network's."""
    digest = hashlib.sha256()
    for value in net.state_dict().values():
        digest.update(value.cpu().contiguous().numpy())
    return digest.hexdigest()


def save_backbone(backbone: Backbone, folder: str | Path) -> None:
    """Write a backbone into a folder, from which `open_backbone` opens it without the data it was trained on."""
    net = backbone.net
    form = {
        "name": net.name,
        "stage": net.stage,
        "mean": net.mean.flatten().tolist(),
        "sd": net.sd.flatten().tolist(),
        "options": backbone.key.get("options"),
    }
    save_file(
        {k: v.cpu().contiguous() for k, v in net.state_dict().items()}, Path(folder) / "cells.safetensors"
    )
    content = json.dumps({"cells": form, "size": backbone.size, "key": backbone.key}, indent=1)
    (Path(folder) / "cells.json").write_text(content, encoding="utf-8")


def open_backbone(folder: str | Path) -> Backbone:
    """The backbone that `save_backbone` wrote, frozen.

    Raises:
        DataError: If one of its two files is cut off or something else.
    """
    content = read_json(Path(folder) / "cells.json")
    form = content["cells"]
    net = Cells(
        form["name"],
        mean=tuple(form["mean"]),
        sd=tuple(form["sd"]),
        stage=form["stage"],
        options=form["options"],
    )
    net.load_state_dict(read_tensors(Path(folder) / "cells.safetensors"))
    return Backbone(net.eval().requires_grad_(False), content["size"], content["key"])
