"""Try a trained run on an image of your own: the score of each sentence, and where the model looked.

run = open_run("latest", method="mvam")
match(run, "dog.jpg", ["a dog on grass", "two cats"])[0].score
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

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
    if isinstance(run, (str, Path)):
        from finematch.runs import open_run

        run = open_run(run)
    sentences = [sentence] if isinstance(sentence, str) else list(sentence)
    if not sentences or not all(s.strip() for s in sentences):
        raise ValueError("give at least one sentence, and none without words")
    with tempfile.TemporaryDirectory() as folder:
        if isinstance(image, Image.Image):
            file = Path(folder) / "image.png"
            image.convert("RGB").save(file)
        else:
            file = Path(image).expanduser().resolve()
        size = open_rgb(file, str(file)).size
        record = Record(file.stem, "new", tuple(sentences), file, size, source=str(file))
        with torch.no_grad():
            found = LOOKS[run.method](run, record, sentences, folder)
    return found[0] if isinstance(sentence, str) else found


# ------------------------------------------------------------------------------------------- the methods
def _mvam(run, record: Record, sentences: list[str], folder: str) -> list[Match]:
    """Cosine (3.2); a look a view: its attention on regions, and on the tokens of the sentence."""
    model, source, picture, texts = _batches(run, record, sentences, folder)
    image, text = model.encode_image(**picture), model.encode_text(**texts)
    scores = text.vector @ image.vector[0]
    found = []
    for k, sentence in enumerate(sentences):
        tokens, looks = _tokens(run.data.tokenizer, sentence), []
        if image.attention is not None:
            boxes = _boxes(source, record, image.attention.shape[-1])
            for v, weights in enumerate(image.attention[0].cpu().numpy()):
                words = text.attention[k, v, : len(tokens)].cpu().numpy()
                looks.append(Look(f"view {v + 1}", boxes, weights[len(weights) - len(boxes) :], words))
        found.append(Match(sentence, float(scores[k]), tokens, looks))
    return found


def _hslm(run, record: Record, sentences: list[str], folder: str) -> list[Match]:
    """The logit of Eq. 22; a look a word: its cross attention on the regions (Eq. 16)."""
    from finematch.models.hslm import tile_scores

    model, source, picture, texts = _batches(run, record, sentences, folder)
    scorer = tile_scores(model, source.batch, tokenise(sentences, run.data.tokenizer, max_length=32).batch)
    scores = scorer(torch.arange(1), torch.arange(len(sentences)))[0]
    attention = None
    if model.pairs.cross_attn:
        pictures = {name: value.expand(len(sentences), *value.shape[1:]) for name, value in picture.items()}
        attention = model.attend(pictures, texts).float().cpu().numpy()
    found = []
    for k, sentence in enumerate(sentences):
        tokens, looks = _tokens(run.data.tokenizer, sentence), []
        if attention is not None:
            boxes = _boxes(source, record, attention.shape[-1])
            looks = [
                Look(token, boxes, attention[k, n]) for n, token in enumerate(tokens) if attention[k, n].any()
            ]
        found.append(Match(sentence, float(scores[k]), tokens, looks))
    return found


def _felga(run, record: Record, sentences: list[str], folder: str) -> list[Match]:
    """The similarity of the closest fragments (Eq. 11); a look a keyword: its cosine with each proposal (Eq. 9).

    A sentence in which no keyword is found is its own keyword.
    """
    from finematch.features.fragments import picture_fragments, text_fragments
    from finematch.models.felga import affinity, global_affinity

    model, networks = run.model, run.data.networks
    proposals = networks.propose([record], cache=folder, split="new", echo=None)
    words = [[word for word, _ in networks.keywords_of(s)] or [s] for s in sentences]
    regions, region_mask = picture_fragments(
        [record], proposals, networks.vlp, folder, "new", echo=None
    ).dense()
    features, word_mask = text_fragments(words, networks.vlp, folder, "new", echo=None).dense()
    device = next(model.parameters()).device
    cosines = affinity(
        model.encode_regions(regions.float().to(device)), model.encode_words(features.float().to(device))
    ).cpu()
    scores = global_affinity(cosines, region_mask[:, :, None, None] & word_mask[None, None])[0][0]
    boxes = proposals.of(0)
    found = []
    for k, sentence in enumerate(sentences):
        weights = cosines[0, : len(boxes), k].numpy()
        looks = [Look(word, boxes, weights[:, n]) for n, word in enumerate(words[k])]
        found.append(Match(sentence, float(scores[k]), words[k], looks))
    return found


def _slan(run, record: Record, sentences: list[str], folder: str) -> list[Match]:
    """The matching head, or the contrast where there is none; a look a level: the best cosine of each box and word."""
    model, _, picture, texts = _batches(run, record, sentences, folder)
    pictures, captions = model.encode_image(**picture), model.encode_text(**texts)
    rows = torch.zeros(len(sentences), dtype=torch.long, device=captions.vector.device)
    pairs = pictures[rows]
    contrast = captions.vector @ pictures.vector[0]
    scores = model.match(pairs, captions) if model.head is not None else contrast
    located = model.locate(pairs, captions)
    size = torch.tensor([*record.size, *record.size], dtype=torch.float32)
    found = []
    for k, sentence in enumerate(sentences):
        tokens, looks, valid = _tokens(run.data.tokenizer, sentence), [], located.valid[k].cpu()
        for level, (boxes, cosine) in enumerate(zip(located.boxes[:, k], located.cosine[:, k], strict=True)):
            fit = cosine.float().cpu()[valid][:, : len(tokens)]
            if len(fit):
                looks.append(Look(f"level {level}", (boxes.float().cpu()[valid] * size).numpy(),
                                  fit.amax(1).numpy(), fit.amax(0).numpy()))  # fmt: skip
        found.append(Match(sentence, float(scores[k]), tokens, looks))
    return found


LOOKS = {"mvam": _mvam, "hslm": _hslm, "felga": _felga, "slan": _slan}


def _batches(run, record: Record, sentences: list[str], folder: str) -> tuple:
    """The model, the image's source, its batch of one, and the batch of the sentences."""
    model, source, texts = run.model, new_images(run, [record], folder), new_texts(run, sentences, folder)
    device = next(model.parameters()).device
    picture = to_device(source.batch([0]), device)
    return model, source, picture, to_device(texts.batch(np.arange(len(sentences))), device)


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
        raise DataError(records[0].image or "", "a new image", problem, "Open a run of scale tiny, or of a CLIP")
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


def _boxes(source, record: Record, tokens: int) -> np.ndarray:
    """Boxes of the regions in pixels: those of the features, or the square grid of a network's patches.

    Args:
        tokens: of the image, an [IMG] token among them or not.
    """
    from finematch.boxes import grid_boxes

    size = np.array([*record.size, *record.size], np.float32)
    places = getattr(source, "places", None)
    if places is not None:
        return places[0, :, :4] * size
    side = int(tokens**0.5)
    return grid_boxes(*record.size, side, side).numpy()
