"""A detector where no published one fits: proposals that were told where things are.

The first row of Table 6 loads "the pre-trained weight from COCO Detection" into a frozen region proposal module, and
Table 9 of arXiv's appendix begins with it. Published detectors do not fit small pictures or a ViT, so SLAN's own
decoder and proposals are trained on the boxes of a train split: the region proposal network of Ren et al., NeurIPS
2015 (Faster R-CNN), or the queries of Carion et al., ECCV 2020 (DETR), without classes. They read what the runs read:
the maps of a frozen network, or pixels, and then the image encoder is trained with them.

Axes: `b` pictures, `n` those of a split, `k` true boxes of one (padded, `real` says which exist), `q` proposals, `c`
channels, `h` `w` cells of a map. Boxes are (x1, y1, x2, y2) in fractions of the picture.
"""

from __future__ import annotations

import copy
import hashlib
import json
import re
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from safetensors.torch import save_file
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn
from torch.utils.data import Dataset
from torchvision.models.detection.rpn import RegionProposalNetwork
from torchvision.ops import generalized_box_iou, generalized_box_iou_loss

from finematch.boxes import convert, iou, multi_scale_grid
from finematch.data.images import check_shown
from finematch.data.pairs import MapSource, PixelSource
from finematch.data.record import DataError, Record, digests
from finematch.files import cached, write_atomically, write_text
from finematch.models.configs import LocatorConfig
from finematch.models.slan.proposals import RPN, Proposals, QueryProposals, cut, take
from finematch.models.slan.towers import CachedStages, VisionDecoder
from finematch.training import Plan, accelerator, by_one_process, fit, seed_everything, to_device

TOPS = (10, 50)  # proposals that recall counts: T of the filter, and all that a run on scenes reads
THRESHOLD = 0.5  # IoU at which a proposal finds a box
COCO_2014 = re.compile(r"^COCO_[a-z]+2014_")  # before a picture's number in the names of 2014
NMS = 0.7  # IoU above which Ren et al. suppress a proposal
PLAN = Plan(epochs=4, batch_size=32, lr=4e-3, warmup=0.1)


class BoxedImages(Dataset):
    """Pictures and their true boxes as training batches: `picture` (maps or pixels), `boxes` "b k 4", `real` "b k".

    Args:
        images: maps or pixels of the pictures; their ids name them.
        records: with objects, in any order; each picture's is found by its id, or by the name of its file without
            extension (COCO numbers its pictures, Karpathy's files name them), and COCO's of 2014 by the number in it,
            which is the name of 2017. Crowds (COCO) are left out.

    Raises:
        DataError: a picture without a record, a record without the picture's size or of a picture of another size or
            side, no boxes at all.
    """

    def __init__(self, images: MapSource | PixelSource, records: list[Record]):
        stems = Counter(
            r.image.stem for r in records if r.image
        )  # a name of two pictures says which of neither
        known = {r.image.stem: r for r in records if r.image and stems[r.image.stem] == 1}
        known |= {r.image_id: r for r in records}
        self.images, found = images, []
        stage = images.stages[0] if isinstance(images, MapSource) else None
        self.ids = list(stage.ids) if stage else [r.image_id for r in images.records]
        # Karpathy's files state no sizes
        sizeless = {} if stage else {r.image_id: r.image for r in images.records if r.image and not r.size}
        split = stage.split if stage else next((r.split for r in images.records), "")
        for name in self.ids:
            record = known.get(name) or known.get(COCO_2014.sub("", name))
            if record is None or record.size is None:
                problem = "has no record with boxes" if record is None else "has boxes but no size"
                raise DataError(
                    (record and record.source) or f"{split}_ids.txt", f"picture {name}", problem,
                    "Give the records of the same split, from a file that states boxes and sizes (COCO's instances)",
                )  # fmt: skip
            if name in sizeless:
                check_shown(sizeless[name], f"picture {name}", record.size)
            frame = torch.tensor([*record.size, *record.size], dtype=torch.float32)
            boxes = [o.box for o in record.objects if not o.crowd]
            found.append(torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4) / frame)
        most = max((len(boxes) for boxes in found), default=0)
        if not most:
            raise DataError(f"{split}_ids.txt", f"split {split}", "no picture has a box",
                            "Give records with objects (COCO's instances)")  # fmt: skip
        self.boxes = torch.tensor([0.0, 0.0, 1.0, 1.0]).repeat(len(found), most, 1)
        self.real = torch.zeros(len(found), most, dtype=torch.bool)
        for i, boxes in enumerate(found):
            self.boxes[i, : len(boxes)], self.real[i, : len(boxes)] = boxes, True

    @property
    def made_of(self) -> list:
        """What another detector would be trained on: what made the maps or the size of the pixels, and the boxes."""
        if isinstance(self.images, MapSource):
            seen: list = [stage.meta for stage in self.images.stages]
        else:  # the bytes of the files, and how many pixels are made of them
            seen = [digests(self.images.records)["images"], *self.images.batch([0])["pixels"].shape[1:]]
        return [self.ids, seen, array_digest(self.boxes, self.real)]

    def __len__(self) -> int:
        return len(self.boxes)

    def __getitems__(self, index: list[int]) -> dict:
        return {"picture": self.images.batch(index), "boxes": self.boxes[index], "real": self.real[index]}


class Detector(nn.Module):
    """SLAN's decoder and proposals, and the losses that train them on boxes. An RPN's are those of Ren et al.:

        loss = (sum of BCE over the sampled anchors + sum of smooth L1 over the positive ones of them) / their number

    An anchor is positive that overlaps a box with IoU >= 0.7, or that overlaps a box best; negative below 0.3. Of each
    picture 256 are sampled, at most half of them positive. All of this is torchvision's, which divides both terms by
    the number of sampled anchors and has the knee of its smooth L1 at 1/9. Ren et al. leave out anchors that cross the
    border; we keep them, as torchvision does, because most anchors of the coarsest map cross it. Those of queries are
    DETR's, see `set_loss`.

    Args:
        encoder: gives maps, fine to coarse, with `channels` of each: `CachedStages`, or `Stages`, which is trained.
        config: of the locator that will load the weights.
    """

    def __init__(self, encoder: nn.Module, config: LocatorConfig):
        super().__init__()
        c = config
        self.encoder = encoder
        self.decoder = VisionDecoder(
            encoder.channels, c.pyramid, c.decoder_levels, source=c.source, scales=c.scales
        )
        self.proposals: RPN | QueryProposals
        if c.proposals == "queries":
            self.proposals = QueryProposals(c.pyramid, count=c.count, depth=c.query_depth, heads=c.query_heads,
                                            smallest=c.smallest)  # fmt: skip
        else:
            self.proposals = RPN(c.pyramid, count=max(TOPS), anchor=c.anchor, anchor_offset=c.anchor_offset)
        self.rules = rpn_rules()

    def read(self, picture: dict[str, Tensor]) -> list[Float[Tensor, "b _ _ _"]]:
        """The decoder's maps, coarse to fine, from a batch of a `MapSource` or a `PixelSource`."""
        return self.decoder(
            self.encoder(picture["pixels"] if "pixels" in picture else list(picture.values()))
        )

    def forward(self, batch: dict) -> dict[str, Tensor]:
        """`loss`, and its two terms `objectness_loss` and `box_loss`."""
        maps = self.read(batch["picture"])
        objectness, box = proposal_loss(self.proposals, self.rules, maps, batch["boxes"], batch["real"])
        return {"loss": objectness + box, "objectness_loss": objectness, "box_loss": box}

    @torch.no_grad()
    def propose(self, data: BoxedImages, nms: float = NMS, *, block: int = 100) -> Proposals:
        """The proposals of all pictures of a split, most salient first, on the CPU; `nms` as in `RPN`, 0 is off.
        Queries are not suppressed."""
        device, module, found = next(self.parameters()).device, copy.copy(self.proposals), []
        module.nms = nms
        for i in range(0, len(data), block):
            picture = to_device(data.images.batch(range(i, min(i + block, len(data)))), device)
            some = module(self.read(picture))
            if isinstance(module, QueryProposals):
                order = some.logits.argsort(dim=1, descending=True)
                some = Proposals(*(take(part, order) for part in some))
            found.append([part.cpu() for part in some])
        return Proposals(*(torch.cat(parts) for parts in zip(*found, strict=True)))

    def weights(self) -> dict[str, Tensor]:
        """In the layout "our own names" of `locator.load_proposals`."""
        state = self.proposals.state_dict()
        state |= {f"pyramid.{name}": value for name, value in self.decoder.state_dict().items()}
        if isinstance(self.proposals, RPN):
            state["anchors"] = torch.tensor([self.proposals.anchor, self.proposals.anchor_offset])
        if not isinstance(self.encoder, CachedStages):
            state |= {
                f"image_encoder.{name}": value for name, value in self.encoder.cells.net.state_dict().items()
            }
        return {name: value.detach().cpu().contiguous() for name, value in state.items()}


def rpn_rules() -> RegionProposalNetwork:
    """Ren et al.'s rules of what an anchor is, and their loss; without a head and anchors, so it holds no weights."""
    return RegionProposalNetwork(nn.Identity(), nn.Identity(), 0.7, 0.3, 256, 0.5, {}, {}, NMS)


def rpn_targets(
    rules: RegionProposalNetwork,
    anchors: Float[Tensor, "m 4"],
    boxes: Float[Tensor, "b k 4"],
    real: Bool[Tensor, "b k"],
) -> tuple[list[Tensor], list[Tensor]]:
    """What each anchor (x, y, w, h) should say, picture by picture.

    Returns:
        Labels "m" (1 positive, 0 negative, -1 neither), and the deltas "m 4" that `locator.decode` takes from the
        anchor to its box; those of anchors that are not positive mean nothing.
    """
    corners = [convert(anchors, "cxcywh", "xyxy")] * len(boxes)
    given = [{"boxes": some[there]} for some, there in zip(boxes, real, strict=True)]
    labels, matched = rules.assign_targets_to_anchors(corners, given)
    return labels, list(rules.box_coder.encode(matched, corners))


def proposal_loss(
    proposals: RPN | QueryProposals,
    rules: RegionProposalNetwork,
    maps: list[Float[Tensor, "b _ _ _"]],
    boxes: Float[Tensor, "b k 4"],
    real: Bool[Tensor, "b k"],
) -> tuple[Tensor, Tensor]:
    """The objectness and the box loss of proposals from the decoder's `maps`; see `Detector` and `set_loss`."""
    if isinstance(proposals, QueryProposals):
        return set_loss(proposals(maps), boxes, real)
    logits, deltas = proposals.predict(maps)
    labels, wanted = rpn_targets(rules, proposals.anchors(maps), boxes, real)
    return rules.compute_loss(logits, deltas.flatten(0, 1), labels, wanted)


def set_loss(
    found: Proposals, boxes: Float[Tensor, "b k 4"], real: Bool[Tensor, "b k"]
) -> tuple[Tensor, Tensor]:
    """DETR's loss without classes: each true box gets the query that suits it best, one to one (Hungarian).

        cost = -sigmoid(logit) + 5 L1 - 2 GIoU,    L1 of (x, y, w, h)

    Returns:
        The objectness term, BCE over all queries, where those without a box count a tenth, divided by the sum of these
        weights; and 5 L1 + 2 (1 - GIoU) over the boxes of the batch, divided by their number. DETR adds both after
        each layer of its decoder; we take the last layer alone.
    """
    wanted, where = torch.zeros_like(found.logits), []
    for i, (some, exist) in enumerate(zip(found.boxes, real, strict=True)):
        true = boxes[i, exist]
        near = torch.cdist(convert(some, "xyxy", "cxcywh"), convert(true, "xyxy", "cxcywh"), p=1)
        cost = 5 * near - 2 * generalized_box_iou(some, true) - found.logits[i].sigmoid()[:, None]
        query, box = linear_sum_assignment(cost.detach().cpu().numpy())
        wanted[i, query] = 1.0
        where.append((some[query], true[box]))
    weight = 0.1 + 0.9 * wanted
    objectness = (
        F.binary_cross_entropy_with_logits(found.logits, wanted, weight, reduction="sum") / weight.sum()
    )
    ours, theirs = (torch.cat(part) for part in zip(*where, strict=True))
    near = (convert(ours, "xyxy", "cxcywh") - convert(theirs, "xyxy", "cxcywh")).abs().sum()
    apart = generalized_box_iou_loss(ours, theirs, reduction="sum")
    return objectness, (5 * near + 2 * apart) / max(len(ours), 1)


def recall(
    boxes: Float[Tensor, "n q 4"],
    valid: Bool[Tensor, "n q"],
    truth: Float[Tensor, "n k 4"],
    real: Bool[Tensor, "n k"],
) -> dict[str, float]:
    """`recall_10`, `recall_50`: share of the true boxes of all pictures that one of their picture's first 10 (50)
    proposals overlaps with IoU >= 0.5; NaN without true boxes."""
    hits = dict.fromkeys(TOPS, 0)
    for some, there, true, exist in zip(boxes, valid, truth, real, strict=True):
        overlap = iou(true[exist], some) * there
        for top in TOPS:
            hits[top] += int((overlap[:, :top] >= THRESHOLD).any(1).sum())
    count = int(real.sum())
    return {f"recall_{top}": n / count if count else float("nan") for top, n in hits.items()}


def untaught(model: Detector, data: BoxedImages) -> dict[str, dict[str, float]]:
    """`recall` of proposals that have learnt nothing: an RPN's anchors drawn at random, and a regular grid
    (`multi_scale_grid`: the whole picture, then windows from the centre outwards)."""
    grid = multi_scale_grid(1, 1, max(TOPS)).expand(len(data), -1, -1)
    boxes = {"grid": grid}
    if isinstance(model.proposals, RPN):
        maps = model.read(to_device(data.images.batch([0]), next(model.parameters()).device))
        anchors = cut(model.proposals.anchors(maps)).cpu()
        order = torch.rand(len(data), len(anchors), generator=torch.Generator().manual_seed(0))
        boxes = {"random anchors": anchors[order.topk(min(max(TOPS), len(anchors))).indices], **boxes}
    return {name: recall(some, torch.ones(some.shape[:2], dtype=torch.bool), data.boxes, data.real)
            for name, some in boxes.items()}  # fmt: skip


def train_detector(
    out: str | Path,
    images: Mapping[str, MapSource | PixelSource],
    records: Mapping[str, list[Record]],
    config: LocatorConfig,
    *,
    encoder: nn.Module | None = None,
    plan: Plan = PLAN,
    echo: Callable[[str], None] | None = print,
) -> Path:
    """Train a `Detector` on the boxes of the *train* split and give the file of its weights, for `load_proposals`.

    Beside it lies `recall.json`: `recall` on val of the detector with and without suppression, of the same network
    before training, and of what is `untaught`; and the best epoch and the seconds.

    Args:
        out: a cache. Each detector has its own folder in it, found by what made it (settings, true boxes, what made the
            maps or pixels, the encoder's first weights); a finished one is opened, a broken off one resumed. Training
            seeds all random states: seed a run afterwards.
        images, records: of `train` and `val`, see `BoxedImages`. Val chooses the epoch, by `recall_10` after
            suppression.
        config: see `Detector`.
        encoder: of pixels, `locator.Stages`: it is trained too, and the file holds it. Maps need none.
        plan: how it is trained.

    Raises:
        DataError: as `BoxedImages`.
        TrainingError: as `training.fit`.
    """
    train, val = (BoxedImages(images[split], records[split]) for split in ("train", "val"))
    c = config
    shape = {"pyramid": c.pyramid, "levels": c.decoder_levels, "source": c.source, "anchor": c.anchor,
             "anchor_offset": c.anchor_offset, "scales": c.scales}  # fmt: skip
    if c.proposals == "queries":
        shape |= {"queries": [c.count, c.query_depth, c.query_heads], "smallest": c.smallest}
    if encoder is not None:
        shape |= {"encoder": array_digest(*encoder.state_dict().values())}
    first = encoder or CachedStages(images["train"].channels)
    key = json.loads(json.dumps({"shape": shape, "plan": asdict(plan), "data": [train.made_of, val.made_of]},
                                default=str))  # fmt: skip

    def make(folder: Path) -> None:
        by_one_process(f"the detector {folder.name.removesuffix('.part')}")
        seed_everything(plan.seed)
        model = Detector(first, config).to(accelerator()).eval()

        def found(m: Detector, nms: float = NMS) -> dict[str, float]:
            boxes, _, valid = m.propose(val, nms)
            return recall(boxes, valid, val.boxes, val.real)

        table = {"untrained": found(model), **untaught(model, val)}
        summary = fit(model, train, plan, folder, evaluate=found, select="recall_10", echo=echo)
        model.eval()
        table = {"detector": found(model), "detector, nothing suppressed": found(model, 0.0), **table}
        told = {"recall": table, "best_epoch": summary["best_epoch"], "seconds": summary["seconds"]}
        write_text(folder / "recall.json", json.dumps(told, indent=2))
        write_atomically(folder / "detector.safetensors", lambda part: save_file(model.weights(), part))
        (folder / "checkpoint.pt").unlink(missing_ok=True)

    return cached(out, "detector", key, make) / "detector.safetensors"


def array_digest(*arrays: Tensor) -> str:
    """SHA-256 of tensors' values."""
    found = hashlib.sha256()
    for array in arrays:
        found.update(array.numpy().tobytes())
    return found.hexdigest()
