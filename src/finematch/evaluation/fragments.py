"""FELGA's two tasks, and phrase grounding, over the fragments of a gallery.

Object discovery ranks images for a class name, description assignment ranks texts for a ground-truth box; the score of
an image or a text is that of its best fragment. `average_precision` defines the metric. Every distinct fragment is
embedded once, and every distinct keyword is scored once, so texts that share their best keyword tie exactly.

Axes: `n` images or texts, `m` fragments of one, `r` crops, `q` vectors of a crop, `u` distinct texts, `i` rows of
scores, `d` width of the frozen features, `e` width of the embeddings.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from finematch.data.record import Record
from finematch.evaluation.average_precision import (
    RELEVANCE,
    assignment_protocol,
    average_precision_blocks,
    category_relevance,
    discovery_protocol,
    query_boxes,
    relevant_texts,
)
from finematch.evaluation.grounding import GroundedPhrase, grounding
from finematch.evaluation.retrieval import full_precision
from finematch.features.fragments import Fragments
from finematch.features.proposals import Proposals
from finematch.training import accelerator

Embed = Callable[[Float[Tensor, "n d"]], Float[Tensor, "n e"]]
NAMED = 60  # training texts that name a class, for the mean over classes that they do name
PRODUCT = 2**24  # numbers that `crop_scores` reads, and makes, at once: 64 MiB each


@dataclass(frozen=True, eq=False)
class Gallery:
    """What both tasks are measured on: frozen features, and the ground truth. Crops have one vector each or several."""

    records: list[Record]
    categories: list[str]
    classes: Fragments  # the class names, one a category
    boxes: Fragments  # the ground-truth boxes of each image
    regions: Fragments  # the proposals of each image
    keywords: Fragments  # the keywords of each text
    synonyms: Mapping[str, tuple[str, ...]]  # other words for a category
    name: str = ""  # for protocols
    texts: list[Record] | None = (
        None  # a record a text, where an image has several (F20); else the images' own
    )
    said: Sequence[int] | None = None  # how many training texts name each category, where it is known (F29)


@dataclass(frozen=True, eq=False)
class AnnotatedPhrases:
    """Phrases with ground-truth boxes, and the proposals of their images, among which a phrase is looked for."""

    records: list[Record]
    proposals: Proposals
    regions: Fragments  # of the proposals
    phrases: Fragments  # of each record, in order
    name: str = ""


def frozen(features: Float[Tensor, "n d"]) -> Float[Tensor, "n d"]:
    """The embedding of a model that is used as it is."""
    return F.normalize(features, dim=-1)


def tasks(gallery: Gallery, embed_regions: Embed, embed_words: Embed) -> dict:
    """Object discovery and description assignment, by embeddings of the frozen features.

    Where crops have several vectors the best one counts: of all proposals of an image in object discovery, of the box
    that is asked with in description assignment (register F16).

    Args:
        embed_regions, embed_words: embed features of crops and of words; `frozen` leaves them as they are.

    Returns:
        `discovery_map`, and `assignment_map` for each kind of relevance (`assignment_lexical_map`, `..._instance_map`;
        `category` has no name); with each `_expected` (the same with ties in random order), `_random` (the expectation
        of a random order), `_macro`, `_ties`. Counts `pictures`, `boxes`, `classes`. `protocol`. Where it is known how
        often training texts name the classes, also `_named` and `_named_random`, the mean over those that `NAMED` texts
        or more name, and their number `classes_named`; without these where there are none.

    Raises:
        ValueError: If there are more or fewer boxes than `query_boxes` of the records.
    """
    records, names, n = gallery.records, gallery.categories, len(gallery.records)
    q = vectors(gallery.boxes)
    scores = f"the best of a crop's {q} vectors counts, " if q > 1 else ""
    classes = embed_rows(gallery.classes, embed_words)[torch.from_numpy(gallery.classes.index[:, 0])]
    of_class = best_fragments(
        crop_scores(gallery.regions.features, classes, embed_regions).T, gallery.regions
    )
    result = average_precision_blocks(
        lambda rows: of_class[rows], n, category_relevance(records, names), torch.arange(len(names)),
        names=names,
    )  # fmt: skip
    found = {
        "discovery": result | {"protocol": discovery_protocol(result, split=gallery.name, scores=scores)}
    }

    queries, boxes = query_boxes(records, names), gallery.boxes.index[gallery.boxes.mask]
    if len(queries) != len(boxes):
        raise ValueError(
            f"{len(boxes)} boxes for {len(queries)} queries (see query_boxes): row by row they belong together"
        )
    words = embed_rows(gallery.keywords, embed_words)

    def score(rows: Int[Tensor, " i"]) -> Float[Tensor, "i n"]:
        crops = gallery.boxes.features[boxes[rows.numpy()]]
        return best_fragments(crop_scores(crops, words, embed_regions), gallery.keywords)

    relevant = {
        one: relevant_texts(one, records, names, queries, texts=gallery.texts, synonyms=gallery.synonyms)
        for one in RELEVANCE
    }
    category_of = torch.tensor([query.category for query in queries])
    assigned = average_precision_blocks(score, len(gallery.keywords), relevant, category_of, names=names)
    for relevance, result in assigned.items():
        protocol = assignment_protocol(result, relevance, split=gallery.name, scores=scores)
        task = "assignment" + ("" if relevance == "category" else f"_{relevance}")
        found[task] = result | {"protocol": protocol}
    kept = {
        "map": "map",
        "expected": "map_expected",
        "random": "random",
        "macro": "map_macro",
        "ties": "ties",
    }
    metrics = {f"{task}_{k}": result[v] for task, result in found.items() for k, v in kept.items()}
    metrics |= {"pictures": n, "boxes": len(boxes), "classes": len(names)}
    if gallery.said is not None:
        often = [name for name, count in zip(names, gallery.said, strict=True) if count >= NAMED]
        metrics["classes_named"] = len(often)
        for task, result in found.items():
            metrics |= {f"{task}_named{ending}": value
                        for ending, value in over_classes(result, often).items()}  # fmt: skip
    return metrics | {"protocol": "; ".join(found[task]["protocol"] for task in ("discovery", "assignment"))}


def over_classes(result: dict, classes: Sequence[str]) -> dict[str, float]:
    """The mean AP over some classes (`""`), and of a random order (`_random`); `{}` if none of them has a query.

    FELGA's queries are all 80 classes of COCO; texts of another data set hardly name most of them, and of a word that
    no text held nothing could be learned (F29).
    """
    asked = [name for name in classes if f"map/{name}" in result]
    if not asked:
        return {}
    return {ending: float(np.mean([result[f"{kind}/{name}"] for name in asked]))
            for ending, kind in (("", "map"), ("_random", "random"))}  # fmt: skip


def phrase_grounding(annotated: AnnotatedPhrases | None, embed_regions: Embed, embed_words: Embed) -> dict:
    """Pointing game and R@k of annotated phrases over the proposals, by the same embeddings; `{}` without phrases.

    A phrase is embedded as a keyword is: its words as they stand. Of several vectors of a proposal the best counts.
    """
    if annotated is None:
        return {}
    regions, (said, _) = annotated.regions, embed(annotated.phrases, embed_words)
    found = []
    for i, record in enumerate(annotated.records):
        crops = regions.features[regions.index[i, regions.mask[i]]]
        scores = crop_scores(crops, said[i, : len(record.phrases)], embed_regions).T.cpu()
        places = torch.from_numpy(annotated.proposals.of(i))
        for phrase, score in zip(record.phrases, scores, strict=True):
            found.append(GroundedPhrase(places, score, phrase.boxes, record.size, phrase.kind))
    result, q = grounding(found, split=annotated.name), vectors(regions)
    if q > 1:
        result["protocol"] += f", the best of a crop's {q} vectors counts"
    return result


def vectors(fragments: Fragments) -> int:
    """Vectors of each fragment."""
    return fragments.features.shape[1] if fragments.features.ndim == 3 else 1


def embed_rows(fragments: Fragments, by: Embed, *, block: int = 8192) -> Float[Tensor, "u e"]:
    """Embeddings of all distinct fragments.

    Raises:
        ValueError: For fragments of several vectors.
    """
    if vectors(fragments) > 1:
        raise ValueError(f"a fragment has {vectors(fragments)} vectors here: score them by crop_scores")
    device = accelerator()
    with torch.no_grad():
        return torch.cat([
            by(torch.from_numpy(np.asarray(fragments.features[i : i + block], np.float32)).to(device)).float().cpu()
            for i in range(0, len(fragments.features), block)
        ])  # fmt: skip


def embed(
    fragments: Fragments, by: Embed, *, block: int = 8192
) -> tuple[Float[Tensor, "n m e"], Bool[Tensor, "n m"]]:
    """Embeddings of all fragments and their mask; every distinct fragment is embedded once.

    Raises:
        ValueError: For fragments of several vectors.
    """
    found = embed_rows(fragments, by, block=block)
    index, mask = torch.from_numpy(fragments.index.copy()), torch.from_numpy(fragments.mask.copy())
    return found[index] * mask[..., None], mask


def crop_scores(
    crops: Float[np.ndarray, "r d"] | Float[np.ndarray, "r q d"], texts: Float[Tensor, "u e"], by: Embed
) -> Float[Tensor, "r u"]:
    """How well texts fit crops: the dot product, of crops of several vectors the largest (register F16).

    Crops are read and embedded in blocks. All products of a call have one shape, so that equal crops tie exactly.
    The scores stay on a GPU, where they are ranked; those of any other accelerator come to the CPU.
    """
    crops = crops[:, None] if crops.ndim == 2 else crops
    (r, q, d), u, device = crops.shape, len(texts), accelerator()
    block = max(1, min(r, PRODUCT // (q * max(u, d))))
    height = -(-block * q // 16) * 16  # thinner products are made in another way
    found = torch.empty(r, u, device=device if device.type == "cuda" else "cpu")
    right = F.pad(texts.to(device), (0, 0, 0, -u % 16)).T
    with torch.no_grad(), full_precision(device):
        for i in range(0, r, block):
            part = np.asarray(crops[i : i + block], np.float32).reshape(-1, d)
            left = by(torch.from_numpy(part).to(device)).float()
            product = F.pad(left, (0, 0, 0, height - len(left))) @ right
            found[i : i + block] = product[: len(left), :u].unflatten(0, (-1, q)).amax(1)
    return found


def best_fragments(scores: Float[Tensor, "i u"], fragments: Fragments) -> Float[Tensor, "i n"]:
    """The largest score among each item's fragments, of scores of all distinct ones; the least number there is for an
    item without any, which ranks it last."""
    least = torch.finfo(scores.dtype).min
    best = scores.new_full((len(scores), len(fragments)), least)
    for index, mask in zip(fragments.index.T, fragments.mask.T, strict=True):
        found = scores[:, torch.from_numpy(index.copy()).to(scores.device)]
        torch.maximum(best, found.masked_fill_(torch.from_numpy(~mask).to(scores.device), least), out=best)
    return best
