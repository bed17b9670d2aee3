"""Annotated phrases (Flickr30k Entities' format) against what a model attends to, or where it puts its boxes.

The annotations are read by the name `<dataset>_entities` and belong to the images of the same ids; their own captions
are scored, so it does not matter which of them a split has. No training ever sees them.

Axes: `p` pairs of an image and a caption, `l` tokens or levels, `r` regions, `t` boxes, `n` tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from finematch.data import load
from finematch.data.record import DataError, Phrase, Record
from finematch.data.splits import Split
from finematch.evaluation.correspondence import on_span, pieces
from finematch.evaluation.grounding import GroundedPhrase, phrase_scores
from finematch.text import tokenise

Echo = Callable[[str], None] | None


def annotated_phrases(
    dataset: str, data_root: str | Path, split: str, records: Iterable[Record] = (), *, echo: Echo = print
) -> list[Record]:
    """The records of `<dataset>_entities`, whose phrases have boxes; none, and a printed line, where there are none.

    Args:
        records: of the split; read for `dev` alone, whose annotations are those of its images in train.
    """
    try:
        if split != "dev":
            return load(f"{dataset}_entities", data_root, split)
        held = {record.image_id for record in records}
        return [one for one in load(f"{dataset}_entities", data_root, "train") if one.image_id in held]
    except (DataError, ValueError) as error:
        if echo:
            echo(f"Grounding is not measured: {error}")
        return []


@torch.no_grad()
def attended_phrases(
    split: Split,
    annotated: list[Record],
    tokenizer: PreTrainedTokenizerBase,
    attend: Callable[[dict, dict], Tensor],
    *,
    reduce: str = "max",
    block: int = 128,
    complete: bool = True,
    echo: Echo = print,
) -> list[GroundedPhrase]:
    """The annotated phrases, and how much the words of each attend to every region: for `grounding`.

    Args:
        annotated: see `annotated_phrases`.
        attend: keywords of images and of captions, pair by pair, to attention "p l r": tokens by regions.
        reduce: how the words of a phrase become one score, see `phrase_scores`.
        complete: whether every annotated image must be in the split; a smoke run has only the first few.

    Raises:
        DataError: If the split lacks annotated images but has others: their sentences would be left out of the mean.

    Returns:
        One item a phrase, regions and boxes in pixels of the annotated image; none (and one printed line) where the
        regions have no boxes. A phrase that was cut off with its caption's end scores all regions alike, which counts
        as a miss.
    """
    places = getattr(split.images, "places", None)
    if places is None:
        if echo:
            echo("Grounding is not measured: the features have no boxes; use features that come with boxes")
        return []
    found = []
    for rows, captions, texts in _blocks(split, annotated, tokenizer, block, complete):
        attention = attend(split.images.batch(rows), texts).cpu()
        for row, (record, c), weights in zip(rows, captions, attention, strict=True):
            frame = torch.tensor([*record.size, *record.size], dtype=torch.float32)
            regions = torch.from_numpy(places[row][:, :4]) * frame
            for phrase, words in _phrases(record, c, tokenizer):
                scores = (phrase_scores(weights[: len(words)], words, reduce=reduce) if words.any()
                          else torch.zeros(len(regions)))  # fmt: skip
                found.append(GroundedPhrase(regions, scores, phrase.boxes, record.size, phrase.kind))
    return found


@torch.no_grad()
def located_phrases(
    split: Split,
    annotated: list[Record],
    tokenizer: PreTrainedTokenizerBase,
    locate: Callable[[dict, dict], tuple[Tensor, Tensor, Tensor]],
    *,
    reduce: str = "max",
    block: int = 128,
    complete: bool = True,
) -> list[list[GroundedPhrase]]:
    """As `attended_phrases`, of a model that makes boxes of its own, level by level.

    Args:
        locate: keywords of images and of captions, pair by pair, to boxes "l p t 4" in fractions of the image,
            to how well each fits each token "l p t n", and which there are "p t".
        complete: as of `attended_phrases`.

    Returns:
        A list a level, of one item a phrase; none where there are no annotated phrases.
    """
    levels: list[list[GroundedPhrase]] = []
    for rows, captions, texts in _blocks(split, annotated, tokenizer, block, complete):
        boxes, fit, valid = (part.cpu() for part in locate(split.images.batch(rows), texts))
        levels = levels or [[] for _ in boxes]
        for p, (record, c) in enumerate(captions):
            frame = torch.tensor([*record.size, *record.size], dtype=torch.float32)
            real = valid[p]
            for phrase, words in _phrases(record, c, tokenizer):
                for of_level, places, weights in zip(levels, boxes[:, p], fit[:, p], strict=True):
                    scores = (phrase_scores(weights[real].T[: len(words)], words, reduce=reduce) if words.any()
                              else torch.zeros(int(real.sum())))  # fmt: skip
                    of_level.append(
                        GroundedPhrase(places[real] * frame, scores, phrase.boxes, record.size, phrase.kind)
                    )
    return levels


def _blocks(
    split: Split, annotated: list[Record], tokenizer: PreTrainedTokenizerBase, block: int, complete: bool
) -> Iterator[tuple[list[int], list[tuple[Record, int]], dict]]:
    """Captions with annotated phrases: rows of their images, (record, number of its caption), tokens."""
    row_of = {record.image_id: row for row, record in enumerate(split.records)}
    asked = [(row_of[record.image_id], record, c) for record in annotated if record.image_id in row_of
             for c in sorted({phrase.caption for phrase in record.phrases})]  # fmt: skip
    if not asked:
        return
    missing = [record for record in annotated if record.image_id not in row_of]
    if complete and missing:
        raise DataError(missing[0].source or "(records)", f"image {missing[0].image_id}",
                        f"and {len(missing) - 1} more annotated images of {len(annotated)} are not in the split",
                        "Score all sentences, or annotate these images alone")  # fmt: skip
    texts = tokenise([record.captions[c] for _, record, c in asked], tokenizer, max_length=32)
    for start in range(0, len(asked), block):
        part = asked[start : start + block]
        yield (
            [row for row, _, _ in part],
            [(record, c) for _, record, c in part],
            texts.batch(range(start, start + len(part))),
        )


def _phrases(
    record: Record, caption: int, tokenizer: PreTrainedTokenizerBase
) -> Iterator[tuple[Phrase, Tensor]]:
    """The phrases of a record's caption, each with which of the caption's tokens it is."""
    offsets = pieces(record.captions[caption], tokenizer).offsets
    for phrase in record.phrases:
        if phrase.caption == caption:
            yield phrase, on_span(offsets, phrase.start, phrase.end)
