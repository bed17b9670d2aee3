"""A backbone for the embedded set: a small network trained to name the attributes of labelled boxes.

It stands in for bottom-up attention, which was trained on Visual Genome's object and attribute labels before
anyone trained a matcher on its regions. It sees boxes and labels of the train split, never a caption.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from finematch.data.record import Record, digests
from finematch.encoders import Cells
from finematch.features.backbones import Backbone, taught_backbone, whole_batches
from finematch.features.regions import pool_regions
from finematch.files import digest
from finematch.training import Plan, fit, seed_everything


class AttributeNet(nn.Module):
    """A `Cells` network, RoI pooling, and a linear classifier for each attribute."""

    def __init__(self, cells: Cells, classes: dict[str, int]):
        super().__init__()
        self.cells = cells
        width = cells(torch.zeros(1, 3, 64, 64)).shape[1]
        self.heads = nn.ModuleDict({name: nn.Linear(width, n) for name, n in classes.items()})

    def logits(self, batch: dict) -> dict[str, Tensor]:
        pooled = pool_regions(self.cells(batch["pixels"]), batch["boxes"], batch["sizes"])[batch["real"]]
        return {name: head(pooled) for name, head in self.heads.items()}

    def forward(self, batch: dict) -> dict[str, Tensor]:
        terms = {
            f"{k}_loss": F.cross_entropy(v, batch[k][batch["real"]]) for k, v in self.logits(batch).items()
        }
        return {**terms, "loss": sum(terms.values())}


class BoxLabels:
    """Pictures with boxes and attribute labels as training batches; boxes are padded, `real` says which exist.

    Training boxes are jittered by up to an eighth of their side, for proposals will not be as tight as labels. The
    jitter is one draw for the whole set, the same in every epoch and every run on the same records.
    """

    def __init__(
        self, records: list[Record], labels: list[list[dict]], classes: dict[str, list[str]], *, jitter: bool
    ):
        most = max(len(row) for row in labels)
        self.pixels = torch.stack(
            [torch.from_numpy(np.asarray(r.open()).copy()).permute(2, 0, 1) for r in records]
        )
        height, width = self.pixels.shape[2:]
        self.sizes = torch.tensor([[width, height]]).expand(len(records), 2)
        self.boxes = torch.tensor([0.0, 0.0, 1.0, 1.0]).repeat(len(records), most, 1)
        self.real = torch.zeros(len(records), most, dtype=torch.bool)
        self.labels = {name: torch.zeros(len(records), most, dtype=torch.long) for name in classes}
        for i, row in enumerate(labels):
            for j, thing in enumerate(row):
                self.boxes[i, j] = torch.tensor([float(v) for v in thing["box"]])
                self.real[i, j] = True
                for name, values in classes.items():
                    self.labels[name][i, j] = values.index(thing[name])
        if jitter:
            side = (self.boxes[..., 2:] - self.boxes[..., :2]).repeat(1, 1, 2)
            noise = torch.rand(self.boxes.shape, generator=torch.Generator().manual_seed(0)) * 2 - 1
            self.boxes = (self.boxes + noise * side / 8).clamp(min=0)
            self.boxes[..., 2:] = torch.minimum(self.boxes[..., 2:], torch.tensor([width, height]))

    def __len__(self) -> int:
        return len(self.pixels)

    def __getitems__(self, index: list[int]) -> dict:
        picked = {name: values[index] for name, values in self.labels.items()}
        return {"pixels": self.pixels[index].float() / 255, "boxes": self.boxes[index], "sizes": self.sizes[index],
                "real": self.real[index], **picked}  # fmt: skip


def attribute_backbone(
    cache: str | Path,
    train: tuple[list[Record], Callable[[], list[list[dict]]]],
    val: tuple[list[Record], Callable[[], list[list[dict]]]],
    classes: dict[str, list[str]],
    plan: Plan,
    *,
    name: str = "resnet18",
    stage: int = 2,
    known: Sequence[str] = (),
    echo: Callable[[str], None] | None = print,
) -> Backbone:
    """Train `AttributeNet` on labelled boxes of the *train* split and return its network, frozen.

    Args:
        train, val: records, and what reads for each picture its labelled boxes: dicts with `box` (xyxy pixels) and
            a value for every name in `classes`; they are read to train. Val chooses the epoch, by the mean accuracy of
            the attributes.
        cache: a finished network is found there by the pictures, labels and settings, a broken off one resumed.
        known: digests of the labels of train and of val; without them they are read.
    """

    def teach(folder: Path) -> Cells:
        seed_everything(plan.seed)
        cells = Cells(name, stage=stage, mean=0.5, sd=0.25)
        model = AttributeNet(cells, {k: len(v) for k, v in classes.items()})
        data, held = (
            BoxLabels(records, labels(), classes, jitter=jitter)
            for (records, labels), jitter in ((train, True), (val, False))
        )

        def evaluate(m: nn.Module) -> dict[str, float]:
            right: dict[str, int] = dict.fromkeys(classes, 0)
            for batch in whole_batches(held, next(m.parameters()).device):
                for attribute, logits in m.logits(batch).items():
                    right[attribute] += int((logits.argmax(-1) == batch[attribute][batch["real"]]).sum())
            accuracy = {f"val_{k}": v / int(held.real.sum()) for k, v in right.items()}
            return {**accuracy, "accuracy": sum(accuracy.values()) / len(accuracy)}

        fit(model, data, plan, folder, evaluate=evaluate, select="accuracy", echo=echo)
        return cells

    known = known or [digest(labels()) for _, labels in (train, val)]
    data = [[digests(records)["images"], of] for (records, _), of in zip((train, val), known, strict=True)]
    key = {"plan": asdict(plan), "data": data, "classes": classes, "backbone": name, "stage": stage}
    said = "attributes of the train split"
    return taught_backbone(cache, "attribute_net", key, teach, size=64, trained_on=said)
