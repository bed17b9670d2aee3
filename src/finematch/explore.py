"""Try a trained run on an image of your own: the score of each sentence, and where the model looked.

run = open_run("latest", method="mvam")
match(run, "dog.jpg", ["a dog on grass", "two cats"])[0].score

`see` reads the image once; then it is asked sentence after sentence. What a method has to show beyond its looks stands
in the fields of its own kind of match. All of it is numbers, boxes and words; `figures.explorer` draws them.

Axes: `r` regions, `n` tokens of a sentence, `v` views, `k` keywords, `t` regions of SLAN that passed its filter, `k2`
cells of a neighbourhood.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from finematch.boxes import grid_boxes, neighbourhood
from finematch.data.images import open_rgb
from finematch.data.record import DataError, Record
from finematch.features import inputs
from finematch.text import tokenise
from finematch.training import to_device


@dataclass(frozen=True, eq=False)
class Look:
    """Weights of one kind on the regions of an image.

    Attributes:
        label: whose: a view (MVAM), a word (HSLM), a keyword (FELGA), a level (SLAN).
        boxes: "r 4", xyxy pixels of the image.
        weights: "r", of each region; higher is more.
        words: "n", of each token of the sentence, where this kind looks at both; else None.
    """

    label: str
    boxes: np.ndarray
    weights: np.ndarray
    words: np.ndarray | None = None


@dataclass(frozen=True, eq=False)
class Match:
    """How well one sentence fits an image.

    Attributes:
        score: what the method ranks by; higher is better, comparable within one run.
        tokens: of the sentence, as the model reads them (FELGA: its keywords).
        looks: where the model looked; empty for a model that looks at no region of its own.
    """

    sentence: str
    score: float
    tokens: list[str]
    looks: list[Look]

    @property
    def ranked(self) -> float:
        """The score that ranks the images of a set: `score`, of SLAN its two-stream score."""
        return self.score


@dataclass(frozen=True, eq=False)
class Views(Match):
    """MVAM.

    Attributes:
        pairs: "v v", the cosine of each view of the image with each view of the sentence.
        parts: "v", what each pair of views of one number adds to the score, which is their sum.
    """

    pairs: np.ndarray
    parts: np.ndarray


@dataclass(frozen=True, eq=False)
class Words(Match):
    """HSLM.

    Attributes:
        words: the tokens that count as words, a node of the score each.
        before, after: "n n", cosines of the words before self-attention (E) and after it (E_f, Eq. 6).
        share_before, share_after: "n", how much each word relates to all (Figure 3); each sums to one.
        nodes: names of what the score is made of: the words (local alignment) and the whole (global), if switched on.
        parts: what each node adds to the score. gates: how far each node's gate is open, in [0, 1].
        bias: the rest of the score, the same for all pairs.
    """

    words: list[str]
    before: np.ndarray
    after: np.ndarray
    share_before: np.ndarray
    share_after: np.ndarray
    nodes: list[str]
    parts: np.ndarray
    gates: np.ndarray
    bias: float


@dataclass(frozen=True, eq=False)
class Fragments(Match):
    """FELGA.

    Attributes:
        boxes: "r 4", the proposals in pixels.
        similarity: "r k", the cosine of each proposal with each keyword (Eq. 9); its largest is the score.
    """

    boxes: np.ndarray
    similarity: np.ndarray

    def won(self, keyword: int) -> np.ndarray:
        """Proposals that fit this keyword better than any other of the sentence, the best first."""
        mine = np.flatnonzero(self.similarity.argmax(1) == keyword)
        return mine[np.argsort(-self.similarity[mine, keyword], kind="stable")]


@dataclass(frozen=True, eq=False)
class Level:
    """SLAN's regions at one level of Algorithm 1, those alone that passed the filter.

    Attributes:
        boxes: "t 4" in pixels. scores: "t", the best cosine with a word. words: "t", which token that is.
        cells: "t k2 4" in pixels, the neighbourhood that the next level searches; None after the last level.
        weights: "t k2", how strongly each cell draws the box towards itself (Eq. 2).
    """

    boxes: np.ndarray
    scores: np.ndarray
    words: np.ndarray
    cells: np.ndarray | None = None
    weights: np.ndarray | None = None


@dataclass(frozen=True, eq=False)
class Levels(Match):
    """SLAN.

    Attributes:
        levels: the proposals, then what each region adaptor made of them.
        saliency: "t", S of each region, by which the filter chose and ordered them.
        contrast: the two-stream score, by which a set is ranked first.
        top, threshold: of the filter that was applied (T and h).
    """

    levels: list[Level]
    saliency: np.ndarray
    contrast: float
    top: int
    threshold: float

    @property
    def ranked(self) -> float:
        return self.contrast


# ------------------------------------------------------------------------------------------- an image, read once
@dataclass(frozen=True, eq=False)
class Seen:
    """An image as the model of a run reads it, made once.

    Attributes:
        image: its pixels. file: where they came from; "" for an image of Pillow.
        boxes: "r 4" in pixels, of the regions that the model is given; None where it finds its own (SLAN).
        batch: what the image tower takes (FELGA: the frozen features of the proposals).
        encoded: what the image tower makes of it.
    """

    run: Any
    image: Image.Image
    file: str
    boxes: np.ndarray | None
    batch: dict
    encoded: Any

    def match(self, sentence: str | Sequence[str], **options) -> Match | list[Match]:
        """Score one sentence, or several. `options` of SLAN: `top` and `threshold` in place of its filter's own.

        Raises:
            ValueError: Without a sentence, with an empty one, or for a filter that the run cannot have.
        """
        sentences = [sentence] if isinstance(sentence, str) else list(sentence)
        if not sentences or not all(s.strip() for s in sentences):
            raise ValueError("give at least one sentence, and none without words")
        with torch.no_grad():
            found = MATCHES[self.run.method](self, sentences, **options)
        return found[0] if isinstance(sentence, str) else found

    def texts(self, sentences: list[str]) -> dict:
        """The batch of sentences for the text tower."""
        with tempfile.TemporaryDirectory() as folder:
            batch = new_texts(self.run, sentences, folder).batch(np.arange(len(sentences)))
        return to_device(batch, _device(self.run))


def see(run, image: str | Path | Image.Image) -> Seen:
    """Read an image by the frozen network and the image tower of a run.

    Args:
        run: from `open_run`, or its folder.
        image: a file, or an image of Pillow.

    Raises:
        DataError: For an image that cannot be read, or a run whose features cannot be made here.
    """
    run = _opened(run)
    if run.method not in MATCHES:
        raise ValueError(
            f"{run.folder} is a run of {run.method}: only runs of {', '.join(MATCHES)} match sentences"
        )
    with tempfile.TemporaryDirectory() as folder:
        if isinstance(image, Image.Image):
            file, name = Path(folder) / "image.bmp", ""  # lossless, and fast for large photos
            image.convert("RGB").save(file)
        else:
            file = Path(image).expanduser().resolve()
            name = str(file)
        pixels = open_rgb(file, str(file))
        record = Record(file.stem, "new", ("an image",), file, pixels.size, source=str(file))
        with torch.no_grad():
            if run.method == "felga":
                from finematch.features.fragments import picture_fragments

                networks = run.data.networks
                proposals = networks.propose([record], cache=folder, split="new", echo=None)
                if not len(proposals.of(0)):
                    raise DataError(
                        file,
                        name or "the image",
                        "no region is proposed in it",
                        "Give a larger one, with more in it",
                    )
                made = picture_fragments([record], proposals, networks.vlp, folder, "new", echo=None)
                features, mask = made.dense()
                batch, boxes = {"features": features[:, mask[0]].float()}, np.array(proposals.of(0))
                batch = to_device(batch, _device(run))
                encoded = run.model.encode_regions(batch["features"])
            else:
                source = new_images(run, [record], folder)
                batch = to_device(_kept(source.batch([0])), _device(run))
                encoded = run.model.encode_image(**batch)
                boxes = None if run.method == "slan" else _boxes(source, record, encoded)
    return Seen(run, pixels, name, boxes, batch, encoded)


def match(run, image: str | Path | Image.Image, sentence: str | Sequence[str]) -> Match | list[Match]:
    """Score sentences against one image by a trained run, whose frozen network reads the image anew.

    Args:
        run: from `open_run`, or its folder.
        image: a file, or an image of Pillow.
        sentence: one, or several; several give a list.

    Raises:
        DataError: For an image that cannot be read, or a run whose features cannot be made here.
        ValueError: Without a sentence, or with an empty one.
    """
    if not sentence or not all(s.strip() for s in ([sentence] if isinstance(sentence, str) else sentence)):
        raise ValueError("give at least one sentence, and none without words")  # before the image is read
    return see(run, image).match(sentence)


# ------------------------------------------------------------------------------------------- the methods
def _mvam(seen: Seen, sentences: list[str]) -> list[Match]:
    """Cosine (3.2); a look a view: its attention on regions, and on the tokens of the sentence."""
    model, image = seen.run.model, seen.encoded
    text = model.encode_text(**seen.texts(sentences))
    scores, found = text.vector @ image.vector[0], []
    of_image = image.vector[0].unflatten(0, (model.views, -1))
    for k, sentence in enumerate(sentences):
        tokens, looks = _tokens(seen.run.data.tokenizer, sentence), []
        if image.attention is not None:
            for v, weights in enumerate(image.attention[0].cpu().numpy()):
                words = text.attention[k, v, : len(tokens)].cpu().numpy()
                looks.append(
                    Look(f"view {v + 1}", seen.boxes, weights[len(weights) - len(seen.boxes) :], words)
                )
        of_text = text.vector[k].unflatten(0, (model.views, -1))
        found.append(
            Views(sentence, float(scores[k]), tokens, looks,
                  pairs=(F.normalize(of_image, dim=-1) @ F.normalize(of_text, dim=-1).T).cpu().numpy(),
                  parts=(of_image * of_text).sum(-1).cpu().numpy())
        )  # fmt: skip
    return found


def _hslm(seen: Seen, sentences: list[str]) -> list[Match]:
    """The logit of Eq. 22; a look a word: its cross attention on the regions (Eq. 16)."""
    from finematch.models.hslm import word_correlation

    model, scorer, found = seen.run.model, seen.run.model.pairs, []
    view = scorer.prepare(seen.encoded)
    for sentence in sentences:  # one at a time: no padding
        text = seen.texts([sentence])
        tokens = _tokens(seen.run.data.tokenizer, sentence)
        counted = text["mask"][0] if model.text.include_special else text["mask"][0] & ~text["special"][0]
        at = counted.nonzero().flatten().tolist()
        caption = model.encode_text(**text)
        vector = None if caption.vector is None else caption.vector[:, None]
        added, gates = (
            part[0, 0].cpu().numpy() for part in scorer.parts(view, caption.words[:, None], vector)
        )
        before, after, mask = model.text.stages(text["input_ids"], text["mask"], text["special"])
        pairs = [
            (F.normalize(one[0], dim=-1) @ F.normalize(one[0], dim=-1).T).cpu().numpy()
            for one in (before, after)
        ]
        shares = [word_correlation(one, mask)[0].cpu().numpy() for one in (before, after)]
        looks = []
        if scorer.cross_attn:
            attention = model.attend(seen.batch, text)[0].float().cpu().numpy()
            looks = [Look(tokens[n], seen.boxes, attention[n]) for n in at]
        words, bias = [tokens[n] for n in at], float(scorer.score.bias)
        nodes = (words if scorer.loc else []) + (["(whole)"] if scorer.glob else [])
        found.append(
            Words(sentence, float(added.sum()) + bias, tokens, looks, words=words, before=pairs[0], after=pairs[1],
                  share_before=shares[0], share_after=shares[1], nodes=nodes, parts=added, gates=gates, bias=bias)
        )  # fmt: skip
    return found


def _felga(seen: Seen, sentences: list[str]) -> list[Match]:
    """The similarity of the closest fragments (Eq. 11); a look a keyword: its cosine with each proposal (Eq. 9).

    A sentence in which no keyword is found is its own keyword.
    """
    run, found = seen.run, []
    for sentence in sentences:
        words = [word for word, _ in run.data.networks.keywords_of(sentence)] or [sentence]
        features = run.data.networks.vlp.embed_texts(words)
        # as the dataset's keywords are kept: in 16 bits
        features = features.half().float().to(_device(run))
        cosines = (seen.encoded[0] @ run.model.encode_words(features).T).cpu().numpy()
        looks = [Look(word, seen.boxes, cosines[:, n]) for n, word in enumerate(words)]
        score = float(cosines.max()) if cosines.size else 0.0
        found.append(Fragments(sentence, score, words, looks, boxes=seen.boxes, similarity=cosines))
    return found


def _slan(
    seen: Seen, sentences: list[str], *, top: int | None = None, threshold: float | None = None
) -> list[Match]:
    """The matching head, or the contrast where there is none; a look a level: the best cosine of each box and word."""
    model = seen.run.model
    own = model.locator.filter
    top, threshold = own.top if top is None else top, own.threshold if threshold is None else threshold
    with _filtered(model.locator, top, threshold) as changed, _cells(model.locator) as cells:
        picture = model.encode_image(**seen.batch) if changed else seen.encoded
        caption = model.encode_text(**seen.texts(sentences))
        pairs = picture[torch.zeros(len(sentences), dtype=torch.long, device=caption.vector.device)]
        located = model.locate(pairs, caption)
        contrast = caption.vector @ picture.vector[0]
        scores = contrast if model.head is None else model.judge(located)
    size = np.tile(seen.image.size, 2).astype(np.float32)
    counted = model.locator.counted(caption.mask, caption.special).cpu().numpy()
    found = []
    for k, sentence in enumerate(sentences):
        tokens, levels, looks = _tokens(seen.run.data.tokenizer, sentence), [], []
        real, words = located.valid[k].cpu().numpy(), counted[k, : len(tokens)]
        for i, (boxes, cosine) in enumerate(zip(located.boxes[:, k], located.cosine[:, k], strict=True)):
            boxes, fit = (
                boxes.float().cpu().numpy()[real] * size,
                cosine.float().cpu().numpy()[real, : len(tokens)],
            )
            around = [part[k].cpu().numpy()[real] for part in cells[i]] if i < len(cells) else None
            # the cosine of what is no word is set to 0, which can be above those of all words
            best = np.where(words, fit, -np.inf) if words.any() else fit
            levels.append(
                Level(boxes, best.max(1), best.argmax(1), None if around is None else around[0] * size,
                      None if around is None else around[1])
            )  # fmt: skip
            looks.append(Look(f"level {i}", boxes, best.max(1), fit.max(0)))
        found.append(
            Levels(sentence, float(scores[k]), tokens, looks, levels=levels, top=top, threshold=threshold,
                   saliency=located.scores[k].cpu().numpy()[real], contrast=float(contrast[k]))
        )  # fmt: skip
    return found


@contextmanager
def _filtered(locator, top: int, threshold: float) -> Iterator[bool]:
    """The filter of SLAN with another T and h; whether they are others than its own.

    Raises:
        ValueError: T is more than the run has scales for (one for each place), or h is not in [0, 1).
    """
    own, places = locator.filter, largest_top(locator)
    if not 1 <= (top or places) <= places or not 0 <= threshold < 1:
        raise ValueError(f"T = {top} must be 1 to {places}, and the threshold {threshold} in [0, 1)")
    was = own.top, own.threshold
    own.top, own.threshold = top, threshold
    try:
        yield (top, threshold) != was
    finally:
        own.top, own.threshold = was


def largest_top(locator) -> int:
    """The largest T that a self-locator can be asked for: its scales belong to so many places (`scaling="rank"`)."""
    c = locator.config
    if c.levels and c.scaling == "rank" and c.top:
        return min(c.top, c.count)
    return c.count


@contextmanager
def _cells(locator) -> Iterator[list]:
    """While pairs are located: the cells "b t k2 4" about the boxes that each adaptor is given, and their weights."""
    from finematch.models.slan.adaptor import cell_weights

    found: list = []

    def keep(adaptor, given: tuple, made: tuple) -> None:
        boxes = given[1]
        size = boxes[..., 2:] - boxes[..., :2]
        extent = adaptor.ratio * (size if adaptor.extent == "region" else torch.ones_like(size))
        weights = cell_weights(made[4], form=adaptor.weights, tau=adaptor.tau)
        found.append((neighbourhood(boxes, adaptor.k, extent).float(), weights.float()))

    hooks = [adaptor.register_forward_hook(keep) for adaptor in locator.adaptors]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


MATCHES = {"mvam": _mvam, "hslm": _hslm, "felga": _felga, "slan": _slan}


def box_texts(seen: Seen, region: int, *, k: int = 5) -> list[tuple[float, str, str]]:
    """FELGA: the texts of the run's set that fit a proposal best: similarity, the keyword that won, and the text.

    All texts with a keyword of the same name tie, so each keyword stands once, with the first of its texts.
    """
    from finematch.evaluation.fragments import embed_rows
    from finematch.features.fragments import document

    gallery = seen.run.data.gallery
    with torch.no_grad():
        scores = embed_rows(gallery.keywords, seen.run.model.encode_words) @ seen.encoded[0, region].cpu()
    index = np.where(gallery.keywords.mask, gallery.keywords.index, -1)
    texts, found = gallery.texts or gallery.records, []
    for row in scores.argsort(descending=True, stable=True).tolist():
        has = np.flatnonzero((index == row).any(1))
        if len(has):
            found.append((float(scores[row]), gallery.keywords.texts[row], document(texts[has[0]])))
        if len(found) == k:
            break
    return found


# ------------------------------------------------------------------------------------------- what models read
def _opened(run):
    if isinstance(run, (str, Path)):
        from finematch.runs import open_run

        return open_run(run)
    return run


def _device(run) -> torch.device:
    return next(run.model.parameters()).device


def _kept(batch: dict) -> dict:
    """A batch that outlives the files that it was read from."""
    return {name: value.clone() for name, value in batch.items()}


def new_images(run, records: list[Record], folder: str | Path):
    """What the model reads of new images, made as the run's own images were; `folder` keeps the files. Of FELGA: the
    fragments of their proposals.

    Raises:
        DataError: For published features, whose network is not at hand.
    """
    data, p, one = run.data, run.parameters, {"new": records}
    if run.method == "felga":
        from finematch.features.fragments import picture_fragments

        proposals = data.networks.propose(records, cache=folder, split="new", echo=None)
        return picture_fragments(records, proposals, data.networks.vlp, folder, "new", echo=None)
    if data.clip is not None:
        return inputs.clip_images(one, data.clip, data.processor)["new"]
    if run.method == "slan":
        if data.network is None:
            return inputs.pixel_images(one, p["size"])["new"]
        return inputs.map_images(one, data.network, folder, stages=p["maps"], echo=None)["new"]
    if data.network is None:
        problem = "has no published features, and their network is not at hand"
        raise DataError(
            records[0].image or "", "a new image", problem, "Open a run of scale tiny, or of a CLIP"
        )
    kind = "cells" if p.get("backbone") == "grid" else "regions"
    return inputs.region_images(one, data.network, folder, kind=kind, regions=p["regions"],
                                proposals=p["proposals"], echo=None)["new"]  # fmt: skip


def new_texts(run, sentences: list[str], folder: str | Path):
    """What the model reads of sentences. Of FELGA: the fragments of their keywords; a sentence in which no keyword is
    found is its own keyword."""
    if run.method == "felga":
        from finematch.features.fragments import text_fragments

        networks = run.data.networks
        words = [[word for word, _ in networks.keywords_of(s)] or [s] for s in sentences]
        return text_fragments(words, networks.vlp, folder, "new", echo=None)
    if run.parameters.get("text") != "minilm":
        return tokenise(sentences, run.data.tokenizer, max_length=32)
    model = run.parameters["text_weights"] or inputs.minilm_folder()
    one = {"new": [Record("new", "new", tuple(sentences))]}
    return inputs.caption_states(one, model, folder)[0]["new"]


def _tokens(tokenizer, sentence: str) -> list[str]:
    """The tokens of a sentence as `text.tokenise` cuts it."""
    return tokenizer.convert_ids_to_tokens(tokenizer(sentence, truncation=True, max_length=32)["input_ids"])


def unread(run, sentence: str) -> tuple[list[str], str]:
    """Words of a sentence that a run's vocabulary does not have, and what of a long one it does not read.

    FELGA embeds keywords alone, and refuses unknown ones.
    """
    if run.method == "felga":
        return [], ""
    tokenizer = run.data.tokenizer
    made = tokenizer(sentence, truncation=True, max_length=32, return_offsets_mapping=True)
    places = list(zip(made["input_ids"], made["offset_mapping"], strict=True))
    unknown = [sentence[a:b] for token, (a, b) in places if token == tokenizer.unk_token_id and a < b]
    return unknown, sentence[max(b for _, (_, b) in places) :].strip()


def _boxes(source, record: Record, encoded) -> np.ndarray:
    """Boxes of the regions in pixels: those of the features, or the square grid of a network's patches, where the image
    may have an [IMG] token more; none of a network that tells nothing of its patches."""
    places, attention = getattr(source, "places", None), getattr(encoded, "attention", None)
    if places is not None:
        return places[0, :, :4] * np.tile(record.size, 2).astype(np.float32)
    if attention is None:
        return np.zeros((0, 4), np.float32)
    side = int(attention.shape[-1] ** 0.5)
    return grid_boxes(*record.size, side, side).numpy()
