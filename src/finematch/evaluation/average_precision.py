"""Mean average precision of FELGA's two tasks: ranking whole pictures, or whole texts, by their best fragment.

The paper names the tasks and says "mAP"; no code defines it. The exact definition used here:

* Object discovery: a query is a class name, the gallery all pictures, those without objects included; a
  picture's score is the maximum over its fragments, a picture is relevant if it has an object of the class.
* Description assignment: a query is one true box, the gallery one text a picture (its captions joined); a
  text's score is the maximum over its keywords. Relevant texts, always printed beside the number:
  `category`, those of pictures with an object of the box's class; `lexical`, those that name the class;
  `instance`, the box's own text alone. The paper's words ("sentences containing the associated semantic
  concepts, which are the labels of the objects") fit `lexical`; the default is `category`, which asks for no
  table of synonyms.
* AP = (1 / R) sum over the R relevant items of the precision at their ranks, over the whole ranking: no
  cut-off, no interpolation. Queries without relevant items are skipped and counted. `map` is the mean over
  queries (micro: as the paper averages), `map_macro` the mean over classes of their queries' mean.
* A tie counts against the model: of equal scores the irrelevant items come first; queries whose AP a tie
  lowered are counted. A score that is not finite is refused. Ties are part of this task, for one keyword stands in
  many texts, and `random` has none; `map_expected` is the number to hold against it: the mean of AP over all orders
  of the tied items, exact. Of t tied items, r of them relevant, that follow n items with b relevant ones, each
  relevant item counts (1/t) sum over j = 1..t of (b + 1 + (j - 1) (r - 1) / (t - 1)) / (n + j).
* Beside each number stands what a random ranking gives: `random`, the exact expectation of AP over all
  orders, and `prevalence`, the mean share of relevant items, which is its limit for a large gallery. Of R
  among N items E[AP] = (H + (N - H) (R - 1) / (N - 1)) / N with H = 1 + 1/2 + ... + 1/N.

How it is done. A block of queries is scored against the whole gallery, in tiles, fragment by fragment: one
matrix product each, and an element-wise maximum. Nothing of the size queries x fragments ever exists. Queries of
a class share their relevant items, so the scores of these and of all others are sorted apart, by numpy on a CPU
(11 times as fast as torch there); a binary search of the first among the second gives every precision.

Ties must be exact though the same keyword stands in many texts. A matrix product adds up in another order for
another shape or alignment, so every product of a call goes through one buffer of one shape.

Axes: `q` queries, `i` queries of a block, `k` classes, `g` gallery items, `m` fragments of an item, `d` width.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from finematch.data.coco import SYNONYMS
from finematch.data.record import Record, is_entity
from finematch.evaluation.retrieval import full_precision

READINGS = [
    # (register, argument, values with the default first, what the paper says)
    ("F22", "relevance", "category | lexical | instance", "'relevant sentences containing the ... labels'"),
    ("4.3", "crowd", "True | False", "does not say whether COCO's crowd boxes make a picture relevant"),
]
RELEVANCE = {
    "category": "a text is relevant if its picture has an object of the box's class",
    "lexical": "a text is relevant if it names the box's class",
    "instance": "only the text of the box's own picture is relevant",
}
BLOCK = 1024  # queries a block, fewer where the gallery is large:
SCORES = 2**24  # scores of a block, 64 MiB; some ten times that is in use while they are ranked
TILE = 1024  # gallery items a product

IRREGULAR = {"person": "people", "child": "children", "mouse": "mice", "knife": "knives"}
NO_PLURAL = ("sheep", "skis", "scissors", "cattle", "luggage", "aircraft")


# ------------------------------------------------------------------------------------------------- the tasks
class Items(NamedTuple):
    """Relevant items of groups of queries: those of query q are `items[row_of[q]]`, ascending."""

    items: list[Int[Tensor, " _"]]
    row_of: Int[Tensor, " q"]


Relevant = Bool[Tensor, "k g"] | Int[Tensor, " q"] | Items


class QueryBox(NamedTuple):
    """A box that is a query of description assignment, as positions in records, objects and categories."""

    picture: int
    object: int
    category: int


def query_boxes(records: Sequence[Record], categories: Sequence[str]) -> list[QueryBox]:
    """The queries of description assignment, in order: boxes that are no crowd, with sides of a pixel or more.

    Raises:
        ValueError: as `category_relevance`.
    """
    index = _index(categories)
    return [
        QueryBox(i, j, _category(index, thing.category, record))
        for i, record in enumerate(records)
        for j, thing in enumerate(record.objects)
        if is_entity(thing)
    ]


def category_relevance(
    records: Sequence[Record], categories: Sequence[str], *, crowd: bool = True
) -> Bool[Tensor, "k g"]:
    """Which pictures have an object of which class. `crowd`: whether a box of a crowd is one.

    Raises:
        ValueError: a category listed twice, or an object of a category that is not listed.
    """
    index = _index(categories)
    relevant = torch.zeros(len(categories), len(records), dtype=torch.bool)
    for i, record in enumerate(records):
        for thing in record.objects:
            k = _category(index, thing.category, record)
            if crowd or not thing.crowd:
                relevant[k, i] = True
    return relevant


def lexical_relevance(
    texts: Sequence[str],
    categories: Sequence[str],
    *,
    synonyms: Mapping[str, Sequence[str]] = SYNONYMS,
) -> Bool[Tensor, "k g"]:
    """Which texts name which class: its name, a synonym, or a plural of these, as whole words, in any case.

    Of names inside one another the longest counts alone: "hot dog" is no dog, "teddy bear" no bear. A hyphen
    and a space between the words of a name are the same.

    Raises:
        ValueError: a category listed twice.
    """
    classes_of: dict[str, set[int]] = {}
    for name, k in _index(categories).items():
        for singular in (name, *synonyms.get(name, ())):
            spaced = " ".join(re.split(r"[\s-]+", singular.lower()))
            for term in (spaced, plural(spaced)):
                classes_of.setdefault(term, set()).add(k)
    # an alternation takes the first that fits, so the longest come first
    terms = (re.escape(term).replace(r"\ ", r"[\s-]+") for term in sorted(classes_of, key=len, reverse=True))
    named = re.compile(rf"\b(?:{'|'.join(terms)})\b")
    relevant = torch.zeros(len(categories), len(texts), dtype=torch.bool)
    for i, text in enumerate(texts):
        for match in named.finditer(text.lower()):
            for k in classes_of[" ".join(re.split(r"[\s-]+", match[0]))]:
                relevant[k, i] = True
    return relevant


def plural(name: str) -> str:
    """The plural of an English noun of one or more words, as far as names of things need it."""
    before, space, noun = name.rpartition(" ")
    if noun in NO_PLURAL:
        many = noun
    elif noun in IRREGULAR:
        many = IRREGULAR[noun]
    elif noun.endswith("man"):
        many = noun[:-3] + "men"
    elif noun.endswith(("s", "x", "z", "ch", "sh")):
        many = noun + "es"
    elif re.search(r"[^aeiou]y$", noun):
        many = noun[:-1] + "ies"
    else:
        many = noun + "s"
    return before + space + many


def object_discovery(
    classes: Float[Tensor, "k d"],
    fragments: Float[Tensor, "g m d"],
    mask: Bool[Tensor, "g m"] | None,
    records: Sequence[Record],
    categories: Sequence[str],
    *,
    crowd: bool = True,
) -> dict:
    """Task 1: find the pictures that show a class. Row k of `classes` is category k, row g a record.

    Args and returns as `average_precision`, with `map/<name>` of each class; `crowd` as `category_relevance`.
    """
    _same("classes", len(classes), "categories", len(categories))
    _same("fragments", len(fragments), "records", len(records))
    result = average_precision(
        classes,
        fragments,
        mask,
        category_relevance(records, categories, crowd=crowd),
        torch.arange(len(categories)),
        names=categories,
    )
    return result | {"protocol": discovery_protocol(result, crowd=crowd)}


def description_assignment(
    boxes: Float[Tensor, "q d"],
    keywords: Float[Tensor, "g m d"],
    mask: Bool[Tensor, "g m"] | None,
    records: Sequence[Record],
    categories: Sequence[str],
    *,
    relevance: str = "category",
    crowd: bool = True,
    synonyms: Mapping[str, Sequence[str]] = SYNONYMS,
) -> dict:
    """Task 2: find the texts that belong to a box. Row q of `boxes` is query q of `query_boxes`, row g a record.

    Args and returns as `average_precision`, with `map/<name>` of each class; `relevance` one of RELEVANCE, `lexical`
    looking at a record's captions joined; `crowd` as `category_relevance`.

    Raises:
        ValueError: also for another number of boxes than queries.
    """
    queries = query_boxes(records, categories)
    _same("boxes", len(boxes), "queries (see query_boxes)", len(queries))
    _same("keywords", len(keywords), "records", len(records))
    result = average_precision(
        boxes,
        keywords,
        mask,
        relevant_texts(relevance, records, categories, queries, crowd=crowd, synonyms=synonyms),
        torch.tensor([query.category for query in queries]),
        names=categories,
    )
    return result | {"protocol": assignment_protocol(result, relevance)}


def relevant_texts(
    relevance: str,
    records: Sequence[Record],
    categories: Sequence[str],
    queries: Sequence[QueryBox],
    *,
    texts: Sequence[Record] | None = None,
    crowd: bool = True,
    synonyms: Mapping[str, Sequence[str]] = SYNONYMS,
) -> Relevant:
    """Which texts (a record's captions joined) are relevant to which class, or, for `instance`, to which query.

    Args:
        texts: a record a text where a picture has several (register F20); by default the records themselves.

    Raises:
        ValueError: A relevance that is not in RELEVANCE.
    """
    if relevance not in RELEVANCE:
        raise ValueError(f"unknown relevance {relevance!r}: choose one of {', '.join(RELEVANCE)}")
    read = records if texts is None else texts
    if relevance == "category":
        return category_relevance(read, categories, crowd=crowd)
    if relevance == "lexical":
        said = [" ".join(record.captions) for record in read]
        return lexical_relevance(said, categories, synonyms=synonyms)
    pictures = torch.tensor([query.picture for query in queries])
    if texts is None:
        return pictures
    of: dict[str, list[int]] = {record.image_id: [] for record in records}
    for g, text in enumerate(texts):
        of[text.image_id].append(g)
    return Items([torch.tensor(own, dtype=torch.long) for own in of.values()], pictures)


def discovery_protocol(result: dict, *, crowd: bool = True, split: str = "", scores: str = "") -> str:
    """How the numbers of object discovery came about; `scores` says more about the scores."""
    return (
        f"{split + ': ' if split else ''}object discovery, {result['queries']} class names x "
        f"{result['gallery']} pictures, boxes of crowds {'count' if crowd else 'do not count'}, {scores}"
        + _ending(result)
    )


def assignment_protocol(result: dict, relevance: str, *, split: str = "", scores: str = "") -> str:
    """How the numbers of description assignment came about; `scores` says more about the scores."""
    return (
        f"{split + ': ' if split else ''}description assignment, {result['queries']} boxes of at least "
        f"1 pixel(s) x {result['gallery']} texts, {RELEVANCE[relevance]}, {scores}" + _ending(result)
    )


# ------------------------------------------------------------------------------------------------ the metric
def average_precision(
    queries: Float[Tensor, "q d"],
    fragments: Float[Tensor, "g m d"],
    mask: Bool[Tensor, "g m"] | None,
    relevant: Bool[Tensor, "k g"] | Int[Tensor, " q"],
    class_of: Int[Tensor, " q"],
    *,
    names: Sequence[str] | None = None,
    block: int | None = None,
) -> dict:
    """mAP of queries over items made of fragments; the score is the largest dot product of an item's fragments.

    Normalise both sides for a cosine. Computed in float32, whatever the inputs are (half precision is widened
    tile by tile; autocast and TF32 are off).

    Args:
        queries: one row a query.
        fragments: the gallery; several vectors an item.
        mask: the real ones among them; None: all. What is not real is never read. An item without fragments
            ranks last, in a tie with its like.
        relevant: the items relevant to a class, or the one item relevant to each query.
        class_of: each query's class, for the rows of `relevant` and for the macro average.
        names: of the classes: their own AP is added as `map/<name>`, and that of a random order as `random/<name>`.
        block: queries a block; memory grows with `block` times the gallery. Another block is another shape of
            products, whose scores may differ in the last bit; ties stay exact.

    Returns:
        Percentages `map, map_macro`, `map_expected` (ties in random order), and of a random order `random,
        random_macro, prevalence` (see the top); counts `queries` (with relevant items), `skipped` (without),
        `classes`, `gallery`, `ties`, `without_fragments`; `protocol`.

    Raises:
        ValueError: embeddings that are not finite, classes or items that are not there, no query with a
            relevant item.
    """
    g, m, d = fragments.shape
    block = min(_block(block, g), max(len(queries), 1))
    mask = torch.ones(g, m, dtype=torch.bool) if mask is None else mask
    mask = mask.to(fragments.device)
    rows = fragments.detach().flatten(0, 1)
    _check_rows(queries.sum(1, dtype=torch.float32), "query", queries)
    sums = rows.sum(1, dtype=torch.float32).where(mask.flatten(), 0)
    _check_rows(sums, f"fragment ({m} an item, counted through)", rows)

    # Item's fragments in order, its first again where it has fewer than others: that leaves a maximum as it is.
    count = mask.sum(1)
    order = torch.argsort(mask.int(), dim=1, descending=True, stable=True)
    slots = int(count.max())
    order = torch.where(torch.arange(m, device=mask.device) < count[:, None], order, order[:, :1])
    row_of = (order + m * torch.arange(g, device=mask.device)[:, None]).T.contiguous()

    tile = min(TILE, -(-g // 16) * 16)
    device = queries.device
    left = torch.zeros(max(block, 16), d, device=device)  # thinner products are made in another way
    right = torch.zeros(tile, d, dtype=rows.dtype, device=rows.device)
    product = torch.empty(len(left), tile, device=device)

    def score(index: Int[Tensor, " i"]) -> Float[Tensor, "i g"]:
        scores = torch.empty(len(index), g, device=device)
        left[: len(index)] = queries[index]
        for start in range(0, g, tile):
            items = slice(start, min(start + tile, g))
            best = scores[:, items]
            for j in range(slots):
                torch.index_select(rows, 0, row_of[j, items], out=right[: items.stop - start])
                torch.mm(left, right.to(left).T, out=product)
                part = product[: len(index), : items.stop - start]
                best.copy_(part) if j == 0 else torch.maximum(best, part, out=best)
        return scores

    with torch.no_grad(), full_precision(device):
        result = _evaluate(score, g, {"": relevant}, class_of, names, block, empty=count == 0)[""]
    return result | {"without_fragments": int((count == 0).sum())}


def average_precision_blocks(
    score_block: Callable[[Tensor], Tensor],
    g: int,
    relevant: Relevant | Mapping[str, Relevant],
    class_of: Int[Tensor, " q"],
    *,
    names: Sequence[str] | None = None,
    block: int | None = None,
) -> dict:
    """As `average_precision`, for other scores: BLIP-2's maximum over 32 query vectors, or a given matrix.

    Args:
        score_block: takes indices of queries `i` and returns their scores of all items, `i g`, on any device, where
            they are ranked; every query is asked for once at most.
        g: number of items.
        relevant: as of `average_precision`, or `Items`; or several of them by name, which share the scores: the result
            then has a result for each name.
    """
    several = relevant if isinstance(relevant, Mapping) else {"": relevant}
    with torch.no_grad():
        found = _evaluate(
            lambda index: score_block(index).float(), g, several, class_of, names, _block(block, g)
        )
    return found if isinstance(relevant, Mapping) else found[""]


def expected_random(relevant: Int[Tensor, " k"], g: int) -> Float[Tensor, " k"]:
    """Mean AP over all orders of g items of which so many are relevant; exact, in float64.

    A relevant item at rank j has (j - 1) (R - 1) / (g - 1) others before it on average.
    """
    harmonic = float((1 / torch.arange(1, g + 1, dtype=torch.float64)).sum())
    return (harmonic + (g - harmonic) * (relevant.double() - 1) / max(g - 1, 1)) / g


def _evaluate(
    score: Callable[[Tensor], Tensor],
    g: int,
    relevant: Mapping[str, Relevant],
    class_of: Tensor,
    names: Sequence[str] | None,
    block: int,
    empty: Tensor | None = None,
) -> dict[str, dict]:
    class_of = class_of.cpu()
    q = len(class_of)
    known = {name: _items(one, class_of, g) for name, one in relevant.items()}
    k = max(
        (len(one) for one in relevant.values() if isinstance(one, Tensor) and one.dtype == torch.bool),
        default=None,
    )
    if k is None:
        k = len(names) if names is not None else int(class_of.max()) + 1 if q else 0
    if q and not 0 <= class_of.min() <= class_of.max() < k:
        raise ValueError(
            f"a query's class is {int(class_of.max())} or {int(class_of.min())}, classes are 0 to {k - 1}"
        )
    if names is not None and len(names) != k:
        raise ValueError(f"{len(names)} names for {k} classes")
    each = {name: _counts(one) for name, one in known.items()}
    # queries of a class follow one another: they share their relevant items
    order = torch.argsort(class_of, stable=True)
    order = order[torch.stack([count[order] > 0 for count in each.values()]).any(0)]
    for count in each.values():
        if not (count > 0).any():
            raise ValueError(f"none of {q} queries has a relevant item among {g}")

    values = {name: _Values.of(q) for name in known}
    harmonic = torch.cat([torch.zeros(1), (1 / torch.arange(1, g + 1, dtype=torch.float64)).cumsum(0)])
    for index in order.split(block):
        scores = score(index)
        if tuple(scores.shape) != (len(index), g):
            raise ValueError(f"scores of shape {tuple(scores.shape)} for {len(index)} queries and {g} items")
        if empty is not None and empty.any():
            scores[:, empty] = 0.0
        _check_rows(scores.sum(1), "score row of query", scores, index)
        if empty is not None and empty.any():
            scores[:, empty] = -torch.inf
        for name, one in known.items():
            _rank(scores, index, one, each[name], values[name], harmonic)
    return {
        name: _means(values[name], order[each[name][order] > 0], class_of, each[name], names, (k, g))
        for name in known
    }


class _Values(NamedTuple):
    """By query: AP with ties against it, with ties in random order, and whether a tie lowered it."""

    ap: Float[Tensor, " q"]
    fair: Float[Tensor, " q"]
    tied: Bool[Tensor, " q"]

    @classmethod
    def of(cls, q: int) -> _Values:
        return cls(*(torch.empty(q, dtype=torch.float64) for _ in range(2)), torch.zeros(q, dtype=torch.bool))


def _items(relevant: Relevant, class_of: Tensor, g: int) -> Items | Int[Tensor, " q"]:
    """Relevant items by group of queries; a bool matrix is one by class."""
    if isinstance(relevant, Items):
        return relevant
    relevant, q = relevant.cpu(), len(class_of)
    if relevant.dtype == torch.bool:
        return Items([row.nonzero().flatten() for row in relevant], class_of)
    if len(relevant) != q or (q and not 0 <= relevant.min() <= relevant.max() < g):
        raise ValueError(
            f"each of {q} queries has one relevant item, 0 to {g - 1}; got {relevant.tolist()[:9]}"
        )
    return relevant


def _counts(relevant: Items | Int[Tensor, " q"]) -> Int[Tensor, " q"]:
    """Relevant items of each query."""
    if isinstance(relevant, Items):
        return torch.tensor([len(items) for items in relevant.items], dtype=torch.long)[relevant.row_of]
    return torch.ones(len(relevant), dtype=torch.long)


def _rank(
    scores: Float[Tensor, "i g"],
    index: Int[Tensor, " i"],
    relevant: Items | Int[Tensor, " q"],
    each: Int[Tensor, " q"],
    values: _Values,
    harmonic: Float[Tensor, " n"],
) -> None:
    """Fill in the values of the queries `index`, of those that have relevant items."""
    if not isinstance(relevant, Items):
        found = _of_one(scores, relevant[index].to(scores.device), harmonic)
        for kept, one in zip(values, found, strict=True):
            kept[index] = one
        return
    rows = relevant.row_of[index]
    for row in rows[each[index] > 0].unique():
        here, hits = rows == row, relevant.items[row]
        misses = torch.ones(scores.shape[1], dtype=torch.bool).index_fill_(0, hits, False).nonzero().flatten()
        own = scores[here.to(scores.device)] if not here.all() else scores
        for kept, one in zip(values, _of_many(own, hits, misses, harmonic), strict=True):
            kept[index[here]] = one


def _means(
    values: _Values,
    order: Int[Tensor, " n"],
    class_of: Int[Tensor, " q"],
    each: Int[Tensor, " q"],
    names: Sequence[str] | None,
    sizes: tuple[int, int],
) -> dict:
    """Means over the queries `order`, which have relevant items, and over their classes; `sizes`: classes, items."""
    (k, g), scored, chance = sizes, class_of[order], expected_random(each, sizes[1])
    mean = {"map": values.ap, "map_expected": values.fair, "random": chance, "prevalence": each.double() / g}
    result = {}
    for name, one in mean.items():
        result[name] = 100 * float(one[order].mean())
        if name in ("map", "random"):
            total = torch.zeros(k, dtype=torch.float64).index_add(0, scored, one[order])
            per_class = total / torch.bincount(scored, minlength=k)  # NaN for a class without queries
            result[f"{name}_macro"] = 100 * float(per_class.nanmean())
            if names is not None:
                result |= {f"{name}/{names[c]}": 100 * float(per_class[c]) for c in scored.unique().tolist()}
    result |= {
        "queries": len(order),
        "skipped": len(class_of) - len(order),
        "classes": len(scored.unique()),
        "gallery": g,
        "ties": int(values.tied[order].sum()),
    }
    return result | {"protocol": f"{len(order)} queries x {g} items, " + _ending(result)}


def _of_many(
    scores: Tensor, hits: Tensor, misses: Tensor, harmonic: Float[Tensor, " n"]
) -> tuple[Tensor, Tensor, Tensor]:
    """AP of queries `i` that share their relevant items (columns `hits`), with ties against them and in random order,
    and whether a tie lowered it. `harmonic`: 0, 1, 1 + 1/2, ..."""
    good, bad = (_ascending(scores.index_select(1, part.to(scores.device))) for part in (hits, misses))
    if not len(misses):
        one = torch.ones(len(scores), dtype=torch.float64)
        return one, one, torch.zeros(len(scores), dtype=torch.bool)
    below = torch.searchsorted(bad, good)  # misses that score less than the hit
    # The last hit of an ascending row is the first of the ranking. Hits of one score take consecutive places.
    place = torch.arange(len(hits), 0, -1, dtype=torch.float64, device=scores.device)
    ap = (place / (place + len(misses) - below)).mean(1)
    tied = (bad.gather(1, below.clamp(max=len(misses) - 1)) == good).any(1)
    fair = ap.clone()
    if tied.any():
        good, bad = good[tied], bad[tied]
        above, better = (
            len(misses) - torch.searchsorted(bad, good, right=True),
            len(hits) - torch.searchsorted(good, good, right=True),
        )
        r = len(hits) - better - torch.searchsorted(good, good)
        fair[tied] = _in_any_order(
            better, r, above + better, r + len(misses) - above - below[tied], harmonic.to(scores.device)
        ).mean(1)
    return ap.cpu(), fair.cpu(), tied.cpu()


def _of_one(scores: Tensor, own: Tensor, harmonic: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The same of queries with one relevant item: one over its rank, which needs no order."""
    best = scores.gather(1, own[:, None])
    at_least, above = ((compare(scores, best)).sum(1) for compare in (torch.ge, torch.gt))
    one, none = torch.ones_like(above), torch.zeros_like(above)
    fair = _in_any_order(none, one, above, at_least - above, harmonic.to(scores.device))
    return (1 / at_least.double()).cpu(), fair.cpu(), (at_least > above + 1).cpu()


def _in_any_order(better: Tensor, r: Tensor, n: Tensor, t: Tensor, harmonic: Tensor) -> Tensor:
    """Mean precision at a relevant item over all orders of its tie: t items, r relevant, after n with `better`
    relevant ones. With S = sum of 1 / (n + j), the sum of (j - 1) / (n + j) is t - (n + 1) S."""
    s = harmonic[n + t] - harmonic[n]
    return ((better + 1) * s + (r - 1) / (t - 1).clamp(min=1) * (t - (n + 1) * s)) / t


def _ascending(scores: Float[Tensor, "i n"]) -> Float[Tensor, "i n"]:
    if scores.is_cuda:
        return scores.sort(dim=1).values
    return torch.from_numpy(np.sort(scores.numpy(), axis=1))


def _block(block: int | None, g: int) -> int:
    if g < 1:
        raise ValueError("there are no items to rank")
    if block is not None and block < 1:
        raise ValueError(f"block is at least 1, got {block}")
    return block or max(1, min(BLOCK, SCORES // g))


def _ending(result: dict) -> str:
    return (
        "average precision without cut-off or interpolation, ties against the model, "
        f"{result['skipped']} queries without relevant items skipped; random ranking {result['random']:.2f} "
        f"(prevalence {result['prevalence']:.2f})"
    )


def _check_rows(total: Tensor, name: str, rows: Tensor, number: Tensor | None = None) -> None:
    """A NaN or an infinity survives the sum of its row; a finite row may overflow it, so it is looked at again."""
    for row in (~torch.isfinite(total)).nonzero().flatten().tolist():
        if not torch.isfinite(rows[row]).all():
            raise ValueError(
                f"{name} {row if number is None else int(number[row])} is not finite: the model diverged, or "
                "an input was empty"
            )


def _same(one: str, a: int, other: str, b: int) -> None:
    if a != b:
        raise ValueError(f"{a} {one} for {b} {other}: row by row they belong together")


def _index(categories: Sequence[str]) -> dict[str, int]:
    if len(set(categories)) < len(categories):
        raise ValueError(f"a category is listed twice: {', '.join(categories)}")
    return {name: k for k, name in enumerate(categories)}


def _category(index: dict[str, int], name: str, record: Record) -> int:
    if name not in index:
        raise ValueError(f"{record.source or record.image_id}: an object is a {name!r}, which is not listed")
    return index[name]
