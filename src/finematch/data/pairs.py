"""Picture-caption pairs as training batches, whatever the pictures and the texts are made of.

A source has `batch(index) -> dict of tensors`, the keywords of a tower; `Pairs` joins one of each. Batches are
index gathers from arrays that are in memory or memory-mapped: no worker process is needed, and none is copied.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from finematch.data.precomp import Regions
from finematch.data.record import DataError, Record
from finematch.text import padded

Index = Sequence[int] | np.ndarray


@runtime_checkable
class Source(Protocol):
    """What `Pairs` needs of either side."""

    def __len__(self) -> int: ...
    def batch(self, index: Index) -> dict[str, Tensor]: ...


class RegionSource:
    """Precomputed region or cell features: `features` "b r d", `mask` "b r", and `places` "b r 5" with boxes.

    Places are (x1, y1, x2, y2, area) as fractions of the picture.

    Raises:
        DataError: If there are boxes (in pixels) but not the pictures' sizes.
    """

    def __init__(self, regions: Regions, *, places: bool = True):
        self.regions = regions
        self.places = None
        if places and regions.boxes is not None:
            if regions.sizes is None:
                raise DataError(
                    f"{regions.split}_boxes.npy",
                    f"split {regions.split}",
                    "has boxes but no picture sizes",
                    "Add the sizes file, or give places=False",
                )
            boxes = np.asarray(regions.boxes, np.float32) / np.tile(regions.sizes, 2)[:, None].astype(
                np.float32
            )
            area = (boxes[..., 2] - boxes[..., 0]) * (boxes[..., 3] - boxes[..., 1])
            self.places = np.concatenate([boxes, area[..., None]], -1).astype(np.float32)

    def _name_broken(self, index: np.ndarray, features: Tensor) -> None:
        """DataError for the first image with a value that is not finite: training would only say that its loss is."""
        whole = torch.isfinite(features).flatten(1).all(1)
        if not whole.all():
            row = int(index[int(whole.int().argmin())])
            file = getattr(self.regions.features, "filename", None) or f"{self.regions.split}_ims.npy"
            raise DataError(file, f"image {self.regions.ids[row]} (row {row} of the images)",
                            "has a value that is not finite", "Make the array again, or download it again")  # fmt: skip

    def __len__(self) -> int:
        return len(self.regions.features)

    @property
    def width(self) -> int:
        """d, of a region's features."""
        return self.regions.features.shape[-1]

    def batch(self, index: Index) -> dict[str, Tensor]:
        features = torch.from_numpy(np.asarray(self.regions.features[np.asarray(index)], np.float32))
        if not math.isfinite(features.sum()):
            self._name_broken(np.asarray(index), features)
        out = {"features": features, "mask": torch.ones(features.shape[:2], dtype=torch.bool)}
        if self.places is not None:
            out["places"] = torch.from_numpy(self.places[np.asarray(index)])
        return out


class MapSource:
    """Feature maps that a frozen network made: `map0`, `map1` ... "b c h w", fine to coarse, in the type of the files.

    Args:
        stages: cells of each stage, row by row, of the same pictures; squares, as pictures are squashed to one.

    Raises:
        DataError: stages of other pictures than the first, or cells that make no square.
    """

    def __init__(self, stages: Sequence[Regions]):
        self.stages = list(stages)
        for i, stage in enumerate(self.stages):
            cells = stage.features.shape[1]
            if list(stage.ids) != list(self.stages[0].ids) or math.isqrt(cells) ** 2 != cells:
                raise DataError(
                    f"{stage.split}_ims.npy",
                    f"stage {i}",
                    f"is of other pictures than stage 0, or its {cells} cells make no square",
                    "Extract all stages from the same pictures, squashed to a square",
                )

    def __len__(self) -> int:
        return len(self.stages[0].features)

    @property
    def channels(self) -> tuple[int, ...]:
        """c of every map, fine to coarse."""
        return tuple(stage.features.shape[-1] for stage in self.stages)

    def batch(self, index: Index) -> dict[str, Tensor]:
        out = {}
        for i, stage in enumerate(self.stages):
            cells = torch.from_numpy(np.asarray(stage.features[np.asarray(index)]))
            side = math.isqrt(cells.shape[1])
            out[f"map{i}"] = cells.transpose(1, 2).unflatten(2, (side, side)).contiguous()
        return out


class PixelSource:
    """Pictures from disk: `pixels` "b 3 h w". `keep=True` holds the decoded tensors (small sets)."""

    def __init__(
        self, records: list[Record], transform: Callable[[Image.Image], Tensor], *, keep: bool = False
    ):
        self.records, self.transform = records, transform
        self.cache = torch.stack([transform(r.open()) for r in records]) if keep else None

    def __len__(self) -> int:
        return len(self.records)

    def batch(self, index: Index) -> dict[str, Tensor]:
        if self.cache is not None:
            return {"pixels": self.cache[torch.as_tensor(np.asarray(index))]}
        return {"pixels": torch.stack([self.transform(self.records[i].open()) for i in index])}


class BoxedSource:
    """Another source, and beside it the proposals of each image: `given` "b q 5", boxes (x1, y1, x2, y2) as fractions
    of the image and their scores in [0, 1], the best first; where the score is 0 there is none.

    Args:
        meta: what made the boxes.
    """

    def __init__(self, images: Source, given: Tensor, meta: dict):
        self.images, self.given, self.meta = images, given, meta

    def __len__(self) -> int:
        return len(self.images)

    @property
    def channels(self) -> tuple[int, ...]:
        """Of the other source's maps."""
        return self.images.channels

    def batch(self, index: Index) -> dict[str, Tensor]:
        return self.images.batch(index) | {"given": self.given[torch.as_tensor(np.asarray(index))]}


@dataclass
class StateSource:
    """Cached token states of a frozen text model, ragged: `features` "b n d", `mask`, `special`."""

    states: np.ndarray  # tokens d, fp16, may be memory-mapped
    special: np.ndarray
    start: np.ndarray

    def __len__(self) -> int:
        return len(self.start) - 1

    @property
    def lengths(self) -> np.ndarray:
        return np.diff(self.start)

    @property
    def width(self) -> int:
        """d, of a token's state."""
        return self.states.shape[1]

    def batch(self, index: Index) -> dict[str, Tensor]:
        where, mask = padded(self.start, np.asarray(index))
        states = torch.from_numpy(self.states[where].astype(np.float32))
        keep = torch.from_numpy(mask)
        return {"features": states.masked_fill_(~keep[..., None], 0.0), "mask": keep,
                "special": torch.from_numpy(self.special[where] & mask)}  # fmt: skip


class Pairs(Dataset):
    """All (picture, caption) pairs: item c is caption c with the picture it describes.

    Raises:
        ValueError: If captions and `image_of` differ in length, or a caption points at no picture: a shifted
            pair is never made.
    """

    def __init__(self, images: Source, texts: Source, image_of: np.ndarray):
        image_of = np.asarray(image_of)
        if len(texts) != len(image_of):
            raise ValueError(f"{len(texts)} captions, but {len(image_of)} picture numbers for them")
        if len(image_of) and not (image_of.min() >= 0 and image_of.max() < len(images)):
            raise ValueError(
                f"captions point at pictures {image_of.min()} to {image_of.max()}, "
                f"but there are {len(images)}"
            )
        self.images, self.texts, self.image_of = images, texts, image_of

    def __len__(self) -> int:
        return len(self.image_of)

    def __getitem__(self, index: int) -> dict:
        return self.__getitems__([index])

    def __getitems__(self, index: list[int]) -> dict:
        picture = self.image_of[np.asarray(index)]
        return {
            "image": self.images.batch(picture),
            "text": self.texts.batch(index),
            "image_id": torch.from_numpy(picture.astype(np.int64)),
        }


def to_pixels(size: int, mean: Sequence[float], sd: Sequence[float]) -> Callable[[Image.Image], Tensor]:
    """RGB picture to a normalised "3 size size" tensor: bicubic resize of both sides, no crop, so that boxes
    stay fractions of the picture."""
    mean_, sd_ = (torch.tensor(v, dtype=torch.float32).reshape(3, 1, 1) for v in (mean, sd))

    def transform(picture: Image.Image) -> Tensor:
        array = np.array(picture.resize((size, size), Image.Resampling.BICUBIC), np.float32) / 255
        return (torch.from_numpy(array).permute(2, 0, 1) - mean_) / sd_

    return transform
