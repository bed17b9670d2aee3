"""Detection and phrase grounding (4.3, Table 4): the labels of a text on the regions of the self-locator.

> "For the text input on the object detection task, we use a prompt composed of concatenated labels of COCO (e.g.
> detect: person, bicycle, car, ... , toothbrush). We adopt the output from the last layer of the"

There the sentence ends. GLIP (Li et al., CVPR 2022), with which the paper compares itself, scores a region and a label
by the product of the region with the label's words. So do we: score = scale (cosine - offset), where the cosine is the
mean over the words of a class name (S35) and the largest over those of a phrase (S36). Both tasks are one: a class name
of the prompt or a phrase of a caption is a *label* of the text, and every region of the locator's last level is scored
on it. Without fine-tuning nothing is new, because scale and offset do not change an order.

The paper has no loss for fine-tuning. Ours is the simplest that works, of torchvision's operators. A region should say
the labels of all boxes that it overlaps with an IoU of at least 0.5, and each box's best region says its label as well
(sigmoid focal loss, as in GLIP). Such a region should lie on its box (5 L1 + 2 (1 - GIoU), DETR's weights). The
proposals learn from the boxes as the detector of Table 6, row 1 does.

Axes: `b` images with a text each, `t` regions of the last level, `n` tokens, `c` labels of a text, `k` true boxes
(padded), `l` levels. Boxes are (x1, y1, x2, y2) in fractions of the image.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.utils.data import Dataset
from torchvision.ops import batched_nms, generalized_box_iou_loss, sigmoid_focal_loss
from transformers import PreTrainedTokenizerBase

from finematch.boxes import convert, grid_boxes, iou
from finematch.data.pairs import Source
from finematch.data.record import Record
from finematch.evaluation.correspondence import on_span, pieces
from finematch.losses import wide
from finematch.models.configs import LocalizationConfig
from finematch.models.slan.adaptor import similarity
from finematch.models.slan.detector import proposal_loss, rpn_rules
from finematch.models.slan.locator import SelfLocator
from finematch.models.slan.objective import SLAN, prepare_images

THRESHOLD = 0.5  # IoU from which on a region says a box's label
MOST = 100  # boxes an image, as COCO counts them
NOBODY = -1  # label of a box that this text does not name
OFFSET = 0.8  # cosine at which a region says a label with probability 1/2, at first: few do


# ------------------------------------------------------------------------------ texts and their labels
class LabelText(NamedTuple):
    """A text and the tokens of its labels: a prompt of class names, or a caption with phrases."""

    ids: Int[Tensor, " n"]
    special: Bool[Tensor, " n"]  # tokens that are no words; of a prompt all but those of the labels
    spans: Bool[Tensor, "c n"]  # tokens of each label
    labels: tuple[int, ...]  # number of each label: of the class, or of the phrase in its record


def label_text(
    text: str,
    spans: Sequence[tuple[int, int]],
    labels: Sequence[int],
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int = 32,
    words: bool = True,
) -> LabelText:
    """A text with labels at the characters [start, end); a label that is cut off has no token.

    Args:
        words: whether all words count, or the labels' alone.
    """
    ids = tokenizer(text, truncation=True, max_length=max_length, return_special_tokens_mask=True)
    offsets = pieces(text, tokenizer, max_length=max_length).offsets
    of = torch.stack([on_span(offsets, start, end) for start, end in spans])
    special = torch.tensor(ids["special_tokens_mask"]).bool() if words else ~of.any(0)
    return LabelText(torch.tensor(ids["input_ids"]), special, of, tuple(labels))


def prompts(
    names: Sequence[str], tokenizer: PreTrainedTokenizerBase, *, max_length: int = 512
) -> list[LabelText]:
    """ "detect: person, bicycle, ..." of the class names: one prompt, or several where one would exceed `max_length`
    tokens (as GLIP divides long lists). The words "detect:" and the commas steer no region.

    Raises:
        ValueError: a name that no prompt of this length can hold, or of which the tokenizer knows no word.
    """
    unknown = tokenizer.unk_token_id
    for name in names:
        ids = tokenizer(name, add_special_tokens=False)["input_ids"]
        if all(one == unknown for one in ids):
            raise ValueError(f"class {name!r} has no known word in this vocabulary: check the tokenizer")
        if len(tokenizer(f"detect: {name}")["input_ids"]) > max_length:
            raise ValueError(f"class {name!r} does not fit into {max_length} tokens: raise max_length")
    groups: list[list[int]] = [[]]
    for number in range(len(names)):
        text = ", ".join(names[i] for i in (*groups[-1], number))
        if len(tokenizer(f"detect: {text}")["input_ids"]) > max_length:
            groups.append([])
        groups[-1].append(number)
    found = []
    for group in groups:
        text, spans = "detect: ", []
        for number in group:
            text += ", " * bool(spans)
            spans.append((len(text), len(text) + len(names[number])))
            text += names[number]
        found.append(label_text(text, spans, group, tokenizer, max_length=max_length, words=False))
    return found


def phrase_texts(
    record: Record, tokenizer: PreTrainedTokenizerBase, *, max_length: int = 32
) -> dict[int, LabelText]:
    """By number of the caption, each caption of an annotated record that has phrases with boxes, and these phrases."""
    found = {}
    for c in sorted({one.caption for one in record.phrases if one.boxes}):
        here = [(i, one) for i, one in enumerate(record.phrases) if one.caption == c and one.boxes]
        spans = [(one.start, one.end) for _, one in here]
        found[c] = label_text(
            record.captions[c], spans, [i for i, _ in here], tokenizer, max_length=max_length
        )
    return found


def collate(texts: Sequence[LabelText]) -> dict[str, Tensor]:
    """`input_ids`, `mask`, `special` "b n" and `spans` "b c n", padded; a label that is padding has no token."""
    b, n, c = len(texts), max(len(one.ids) for one in texts), max(len(one.spans) for one in texts)
    found = {
        "input_ids": torch.zeros(b, n, dtype=torch.long),
        "mask": torch.zeros(b, n, dtype=torch.bool),
        "special": torch.zeros(b, n, dtype=torch.bool),
        "spans": torch.zeros(b, c, n, dtype=torch.bool),
    }
    for i, one in enumerate(texts):
        long = len(one.ids)
        found["input_ids"][i, :long], found["mask"][i, :long] = one.ids, True
        found["special"][i, :long], found["spans"][i, : len(one.spans), :long] = one.special, one.spans
    return found


class Item(NamedTuple):
    """An image, a text, and the boxes (in fractions) with the place of their label in the text; `NOBODY` for a box
    that the text does not name, from which the proposals alone learn."""

    row: int  # of the image in its source
    text: LabelText
    boxes: list[tuple[int, list[float]]]


class LabelledBoxes(Dataset):
    """Items as batches of `Localizer`."""

    def __init__(self, images: Source, items: Sequence[Item]):
        self.images, self.items = images, items

    def __len__(self) -> int:
        return len(self.items)

    def __getitems__(self, index: Sequence[int]) -> dict[str, Any]:
        """`image`, `text` (see `collate`), `boxes` "b k 4", `owner` "b k", `real` "b k"."""
        rows, texts, given = zip(*(self.items[i] for i in index), strict=True)
        most = max([1, *map(len, given)])
        boxes = torch.tensor([0.0, 0.0, 1.0, 1.0]).repeat(len(rows), most, 1)
        owner = torch.full((len(rows), most), NOBODY)
        for i, some in enumerate(given):
            for j, (label, box) in enumerate(some):
                boxes[i, j], owner[i, j] = torch.tensor(box), label
        real = torch.arange(most) < torch.tensor([len(some) for some in given])[:, None]
        image, text = self.images.batch(list(rows)), collate(texts)
        return {"image": image, "text": text, "boxes": boxes, "owner": owner, "real": real}


def class_items(
    records: Sequence[Record], rows: Sequence[int], texts: Sequence[LabelText], names: Sequence[str]
) -> list[Item]:
    """Of detection: every image with every prompt. Crowds are left out.

    Args:
        rows: of the records' images in their source. texts: see `prompts`. names: the classes.
    """
    number, found = {name: i for i, name in enumerate(names)}, []
    for record, row in zip(records, rows, strict=True):
        things = [(number[one.category], _share(one.box, record)) for one in record.objects if not one.crowd]
        for text in texts:
            place = {label: i for i, label in enumerate(text.labels)}
            found.append(Item(row, text, [(place.get(label, NOBODY), box) for label, box in things]))
    return found


def phrase_items(
    records: Sequence[Record], rows: Sequence[int], tokenizer: PreTrainedTokenizerBase
) -> list[Item]:
    """Of grounding: every caption that has phrases with boxes, and all boxes of its image."""
    found = []
    for record, row in zip(records, rows, strict=True):
        for text in phrase_texts(record, tokenizer).values():
            place = {label: i for i, label in enumerate(text.labels)}
            boxes = [(place.get(i, NOBODY), _share(box, record))
                     for i, one in enumerate(record.phrases) for box in one.boxes]  # fmt: skip
            found.append(Item(row, text, boxes))
    return found


def _share(box: Sequence[float], record: Record) -> list[float]:
    """A box in pixels as fractions of its image."""
    return [v / side for v, side in zip(box, (*record.size, *record.size), strict=True)]


# ------------------------------------------------------------------------------ the head
class Regions(NamedTuple):
    """What the locator found for images and their texts: boxes, and how well each region fits each token."""

    boxes: Float[Tensor, "l b t 4"]
    cosine: Float[Tensor, "b t n"]
    valid: Bool[Tensor, "b t"]
    saliency: Float[Tensor, "b t"]


class Found(NamedTuple):
    """Boxes of one image with label and score, the best first, on the CPU."""

    boxes: Float[Tensor, "r 4"]
    labels: Int[Tensor, " r"]
    scores: Float[Tensor, " r"]


class Localizer(nn.Module):
    """A pretrained SLAN whose regions are scored on the labels of a text; `forward` is the loss of fine-tuning.

    Args:
        model: its towers and locator are used (and trained); its heads are left alone.
        config: the readings.
        task: `detection` raises T and lowers h to `config.top` and `config.threshold` (S35); `grounding` keeps the
            pretrained run's, so that R@10 with T = 10 asks for any region (S36).
    """

    def __init__(self, model: SLAN, config: LocalizationConfig, *, task: str = "detection"):
        super().__init__()
        if task not in ("detection", "grounding"):
            raise ValueError(f"task is {task!r}; use 'detection' or 'grounding'")
        self.towers, self.locator, self.config = model.encoders.towers, model.locator, config
        self.reduce = config.label_score if task == "detection" else config.phrase_score
        if task == "detection":
            open_filter(self.locator, config.top, config.threshold)
        tau = 0.07 if model.word_temperature is None else float(model.word_temperature.tau.detach())
        self.scale, self.offset = nn.Parameter(torch.tensor(1 / tau)), nn.Parameter(torch.tensor(OFFSET))
        self.rules = rpn_rules()

    def regions(self, image: dict[str, Tensor], text: dict[str, Tensor]) -> Regions:
        """Algorithm 1 on images and their texts, row by row."""
        return self._locate(prepare_images(self.towers, self.locator, image)[0], text)

    def _locate(self, pictures, text: dict[str, Tensor]) -> Regions:
        mask, special = text["mask"], text["special"]
        words = self.towers.text(text["input_ids"], mask)
        at = self.locator.locate(pictures, words, mask, special)
        cosine = at.cosine[-1]
        if self.config.align == "fused":
            cosine = (
                similarity(at.regions, at.words, self.locator.counted(mask, special)) * at.valid[..., None]
            )
        return Regions(at.boxes, cosine, at.valid, at.scores)

    def logits(self, cosine: Float[Tensor, "b t n"], spans: Bool[Tensor, "b c n"]) -> Float[Tensor, "b t c"]:
        """How surely each region says each label; of a label without tokens it means nothing."""
        return self.scale * (label_scores(cosine, spans, self.reduce) - self.offset)

    @torch.no_grad()
    def proposals(self, image: dict[str, Tensor]) -> list[tuple[Float[Tensor, "_ 4"], Float[Tensor, " _"]]]:
        """Boxes and saliency of each image's regions before any text, on the CPU."""
        pictures, _ = prepare_images(self.towers, self.locator, image)
        return [(boxes[real].cpu(), scores[real].cpu()) for boxes, scores, real
                in zip(pictures.boxes, pictures.scores, pictures.valid, strict=True)]  # fmt: skip

    @torch.no_grad()
    def activation(
        self, image: dict[str, Tensor], text: dict[str, Tensor], side: int = 16
    ) -> Float[Tensor, "b c h w"]:
        """The score of each label at `side` x `side` cells of the image (Fig. 1a), which the last level embeds as it
        embeds regions; they are compared with the words that no region has met yet."""
        pictures, _ = prepare_images(self.towers, self.locator, image)
        cells = grid_boxes(1, 1, side, side).to(pictures.boxes).expand(len(pictures.boxes), -1, -1)
        if len(self.locator.adaptors):
            regions = self.locator.adaptors[-1].embed(pictures.maps[-1], cells)
        else:
            regions = self.locator.embed(pictures.first, cells)
        words = self.towers.text(text["input_ids"], text["mask"])
        cosine = similarity(regions, words, self.locator.counted(text["mask"], text["special"]))
        return label_scores(cosine, text["spans"], self.reduce).mT.unflatten(-1, (side, side))

    def forward(self, batch: dict) -> dict[str, Tensor]:
        """`loss` and its terms `align_loss`, `box_loss`, `proposal_loss` (0 of proposals that are frozen or given)."""
        pictures, features = prepare_images(self.towers, self.locator, batch["image"])
        at, spans = self._locate(pictures, batch["text"]), batch["text"]["spans"]
        boxes, owner, real = batch["boxes"], batch["owner"], batch["real"]
        wanted, nearest, matched = assign(at.boxes[-1], at.valid, boxes, owner, real, spans.shape[1])
        counted = at.valid[..., None] & spans.any(-1)[:, None]
        loss = sigmoid_focal_loss(wide(self.logits(at.cosine, spans)), wanted.float())
        align = (loss * counted).sum() / (wanted & counted).sum().clamp(min=1)
        ours, true = at.boxes[-1][matched], nearest[matched]
        apart = (convert(ours, "xyxy", "cxcywh") - convert(true, "xyxy", "cxcywh")).abs().sum()
        box = (5 * apart + 2 * generalized_box_iou_loss(ours, true, reduction="sum")) / max(len(ours), 1)
        proposal = torch.zeros_like(box)
        if any(p.requires_grad for p in self.locator.proposals.parameters()):
            maps = self.locator.decoder(features)
            once = real & ~repeated(boxes, real)  # a box that several phrases name is one object
            proposal = sum(proposal_loss(self.locator.proposals, self.rules, maps, boxes, once))
        c = self.config
        total = c.align_weight * align + c.box_weight * box + c.proposal_weight * proposal
        return {"loss": total, "align_loss": align, "box_loss": box, "proposal_loss": proposal}

    @torch.no_grad()
    def detect(self, image: dict[str, Tensor], texts: Sequence[LabelText]) -> list[Found]:
        """The best boxes of each image, at most 100, with class and score in [0, 1]; a class's boxes that overlap are
        suppressed (`suppress`). A region may have several classes.

        Args:
            texts: the prompts, which every image meets.
        """
        pictures, _ = prepare_images(self.towers, self.locator, image)
        device, parts = pictures.boxes.device, []
        for text in texts:
            given = {name: value.to(device).expand(len(pictures.boxes), *value.shape[1:])
                     for name, value in collate([text]).items()}  # fmt: skip
            at = self._locate(pictures, given)
            scores = self.logits(at.cosine, given["spans"]).sigmoid().masked_fill(~at.valid[..., None], -1)
            parts.append((at.boxes[-1], scores, torch.tensor(text.labels, device=device)))
        return [best_boxes([(boxes[i], scores[i], labels) for boxes, scores, labels in parts],
                           suppress=self.config.suppress) for i in range(len(pictures.boxes))]  # fmt: skip


def repeated(boxes: Float[Tensor, "b k 4"], real: Bool[Tensor, "b k"]) -> Bool[Tensor, "b k"]:
    """Which boxes are copies of an earlier one of their image."""
    same = (boxes[:, :, None] == boxes[:, None]).all(-1) & real[:, None]
    return same.tril(-1).any(-1)


def label_scores(
    cosine: Float[Tensor, "b t n"], spans: Bool[Tensor, "b c n"], reduce: str = "mean"
) -> Float[Tensor, "b t c"]:
    """The mean, or the largest, of the tokens of each label; 0 of a label without tokens."""
    some = spans.any(-1)[:, None]
    if reduce == "mean":
        total = torch.einsum("btn,bcn->btc", cosine, spans.to(cosine.dtype))
        return total / spans.sum(-1).clamp(min=1)[:, None]
    best = cosine[:, :, None].masked_fill(~spans[:, None], float("-inf")).amax(-1)
    return best.where(some, 0.0)


def assign(
    boxes: Float[Tensor, "b t 4"],
    valid: Bool[Tensor, "b t"],
    true: Float[Tensor, "b k 4"],
    owner: Int[Tensor, "b k"],
    real: Bool[Tensor, "b k"],
    labels: int,
) -> tuple[Bool[Tensor, "b t c"], Float[Tensor, "b t 4"], Bool[Tensor, "b t"]]:
    """What each region should say and where it should lie.

    A region says the label of every box that it overlaps with an IoU of at least 0.5, and of every box that no other
    region overlaps more; boxes without a label here (`NOBODY`) are left out.

    Returns:
        The labels, the box that the region overlaps most among these, and whether there is one.
    """
    wanted = torch.zeros(*boxes.shape[:2], labels, dtype=torch.bool, device=boxes.device)
    nearest, matched = boxes.detach().clone(), torch.zeros_like(valid)
    for i in range(len(boxes)):
        named = real[i] & (owner[i] != NOBODY)
        if not named.any():
            continue
        overlap = iou(boxes[i].detach().to(true.dtype), true[i, named]) * valid[i, :, None]
        says = (overlap >= THRESHOLD) | ((overlap == overlap.amax(0)) & (overlap > 0))
        region, box = says.nonzero(as_tuple=True)
        wanted[i, region, owner[i, named][box]] = True
        matched[i] = says.any(1)
        nearest[i] = true[i, named][overlap.where(says, -1.0).argmax(1)].to(boxes.dtype)
    return wanted, nearest, matched


def best_boxes(
    parts: Sequence[tuple[Float[Tensor, "_ 4"], Float[Tensor, "_ _"], Int[Tensor, " _"]]],
    *,
    suppress: float = 0.5,
    most: int = MOST,
) -> Found:
    """One image's (region, label) pairs, the best first.

    Args:
        parts: of each prompt: boxes, scores (below 0: no such region) and the numbers of its labels.
        suppress: IoU above which the lower of two boxes of a label goes; 0: none.
    """
    columns = []
    for boxes, scores, labels in parts:
        t, c = scores.shape
        columns.append(
            (boxes[:, None].expand(t, c, 4).flatten(0, 1), labels.expand(t, c).flatten(), scores.flatten())
        )
    boxes, labels, scores = (torch.cat(part) for part in zip(*columns, strict=True))
    order = scores.argsort(descending=True, stable=True)[: 20 * most]
    order = order[scores[order] >= 0]
    if suppress:
        order = order[batched_nms(boxes[order].float(), scores[order].float(), labels[order], suppress)]
    order = order[:most]
    return Found(boxes[order].cpu(), labels[order].cpu(), scores[order].cpu())


def open_filter(locator: SelfLocator, top: int, threshold: float) -> None:
    """Let the region filter keep up to `top` regions above `threshold`, in place (S35).

    Scales p that belong to a region's place (`scaling="rank"`) exist for as many places as pretraining had; of the
    others they begin at 1.
    """
    locator.filter.top, locator.filter.threshold = top, threshold
    count = locator.config.count
    slots = min(top, count) if top else count
    for adaptor in locator.adaptors:
        if locator.config.scaling == "rank" and len(adaptor.theta) < slots:
            more = adaptor.theta.new_zeros(slots - len(adaptor.theta), 2)
            adaptor.theta = nn.Parameter(torch.cat([adaptor.theta.detach(), more]))
