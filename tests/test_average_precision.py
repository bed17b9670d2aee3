"""Mean average precision against rankings worked by hand, a naive loop and all orders of a small gallery."""

from __future__ import annotations

import inspect
import itertools

import pytest
import torch
from torch.nn import functional as F

from finematch.data.coco import categories as read_categories
from finematch.data.coco import load_coco
from finematch.data.record import Object, Record
from finematch.evaluation import average_precision as module
from finematch.evaluation.average_precision import (
    READINGS,
    RELEVANCE,
    SYNONYMS,
    assignment_protocol,
    average_precision,
    average_precision_blocks,
    category_relevance,
    description_assignment,
    discovery_protocol,
    expected_random,
    lexical_relevance,
    object_discovery,
    plural,
    query_boxes,
)
from finematch.runs import write_metrics
from finematch.scenes.language import SHAPES


def naive(scores, relevant):
    """AP of one query by sorting, misses first among equals; without ties sklearn's definition."""
    order = sorted(range(len(scores)), key=lambda i: (-scores[i], relevant[i]))
    found, precisions = 0, []
    for rank, i in enumerate(order, start=1):
        if relevant[i]:
            found += 1
            precisions.append(found / rank)
    return sum(precisions) / len(precisions)


def naive_means(scores, relevant, class_of):
    """Micro and macro mean over the queries that have relevant items."""
    per_class = {}
    for row, c in zip(scores.tolist(), class_of.tolist(), strict=True):
        if relevant[c].any():
            per_class.setdefault(c, []).append(naive(row, relevant[c].tolist()))
    every = [ap for few in per_class.values() for ap in few]
    macro = [sum(few) / len(few) for few in per_class.values()]
    return 100 * sum(every) / len(every), 100 * sum(macro) / len(macro)


def some(q=70, g=45, k=6, m=4, d=12, seed=0):
    """Embeddings, a ragged mask, relevance of some prevalence, and uneven classes, the last without items."""
    generator = torch.Generator().manual_seed(seed)
    queries = F.normalize(torch.randn(q, d, generator=generator), dim=1)
    fragments = F.normalize(torch.randn(g, m, d, generator=generator), dim=2)
    mask = torch.rand(g, m, generator=generator) < 0.6
    mask[mask.sum(1) == 0, m - 1] = True  # at least one, and not always the first
    relevant = torch.rand(k, g, generator=generator) < 0.3
    relevant[-1] = False
    class_of = (k * torch.rand(q, generator=generator) ** 2).long()
    return queries, fragments, mask, relevant, class_of


def all_scores(queries, fragments, mask):
    scores = torch.full((len(queries), len(fragments)), -torch.inf, dtype=torch.float64)
    for i, query in enumerate(queries):
        for j, item in enumerate(fragments):
            for fragment, real in zip(item, mask[j], strict=True):
                if real:
                    scores[i, j] = max(float(scores[i, j]), float(query.double() @ fragment.double()))
    return scores


def from_scores(scores, relevant, class_of, **options):
    return average_precision_blocks(lambda i: scores[i], scores.shape[1], relevant, class_of, **options)


# ------------------------------------------------------------------------------------------ worked by hand
def test_a_ranking_worked_by_hand():
    # ranks of the relevant items: 1 and 3 of 4; AP = (1/1 + 2/3) / 2
    scores, relevant = torch.tensor([[0.9, 0.1, 0.5, 0.2]]), torch.tensor([[True, False, False, True]])
    result = from_scores(scores, relevant, torch.tensor([0]))
    assert result["map"] == pytest.approx(100 * (1 + 2 / 3) / 2)
    assert result["prevalence"] == 50
    assert (result["queries"], result["skipped"], result["gallery"], result["ties"]) == (1, 0, 4, 0)
    assert result["protocol"].startswith("1 queries x 4 items, average precision without cut-off")


def test_the_best_fragment_decides_and_what_is_masked_is_never_read():
    queries = torch.tensor([[1.0, 0.0]])
    fragments = torch.tensor([[[0.1, 9], [0.9, 9]], [[0.5, 9], [0.4, 9]], [[0.2, 9], [99, 9]]])
    relevant, class_of = torch.tensor([[True, False, False]]), torch.tensor([0])
    mask = torch.tensor([[True, True], [True, True], [True, False]])
    assert average_precision(queries, fragments, mask, relevant, class_of)["map"] == 100  # 0.9 > 0.5 > 0.2
    assert average_precision(queries, fragments, None, relevant, class_of)["map"] == 50  # 99 > 0.9
    fragments[2, 1] = torch.nan
    assert average_precision(queries, fragments, mask, relevant, class_of)["map"] == 100
    mask[0, 1] = False  # 0.1 is now the least: the relevant item is third
    assert average_precision(queries, fragments, mask, relevant, class_of)["map"] == pytest.approx(100 / 3)


def test_micro_and_macro():
    # class 0: APs 1 and 1/2; class 1: AP 1/3; class 2 has no relevant item: skipped
    scores = torch.tensor([[3.0, 2, 1], [2, 3, 1], [3, 2, 1], [3, 2, 1]])
    relevant = torch.tensor([[True, False, False], [False, False, True], [False, False, False]])
    result = from_scores(scores, relevant, torch.tensor([0, 0, 1, 2]), names=["a", "b", "c"])
    assert result["map"] == pytest.approx(100 * (1 + 1 / 2 + 1 / 3) / 3)
    assert result["map_macro"] == pytest.approx(100 * (3 / 4 + 1 / 3) / 2)
    assert (result["map/a"], result["map/b"]) == pytest.approx((75, 100 / 3))
    assert "map/c" not in result
    assert (result["queries"], result["skipped"], result["classes"]) == (3, 1, 2)
    assert result["prevalence"] == pytest.approx(100 / 3)
    # of one relevant item among three the mean over orders is (1 + 1/2 + 1/3) / 3
    assert result["random"] == result["random_macro"] == pytest.approx(100 * 11 / 18)


# -------------------------------------------------------------------------------------- against naive loops
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("block", [None, 1, 7, 64])
def test_equals_the_naive_loop(seed, block):
    queries, fragments, mask, relevant, class_of = some(seed=seed)
    scores = all_scores(queries, fragments, mask)
    micro, macro = naive_means(scores, relevant, class_of)
    assert abs(micro - macro) > 0.01
    result = average_precision(queries, fragments, mask, relevant, class_of, block=block)
    assert (result["map"], result["map_macro"]) == pytest.approx((micro, macro), rel=1e-6)
    assert result["skipped"] == int((class_of == 5).sum()) > 0
    given = from_scores(scores.float(), relevant, class_of, block=block)
    assert (given["map"], given["map_macro"]) == pytest.approx((micro, macro), rel=1e-6)


def test_equals_the_naive_loop_over_several_tiles():
    queries, fragments, mask, relevant, class_of = some(q=12, g=2 * module.TILE + 76, m=2, d=5)
    scores = torch.where(mask, torch.einsum("qd,gmd->qgm", queries, fragments), -torch.inf).amax(2)
    micro, macro = naive_means(scores, relevant, class_of)
    result = average_precision(queries, fragments, mask, relevant, class_of, block=5)
    assert (result["map"], result["map_macro"]) == pytest.approx((micro, macro), rel=1e-4)


def test_one_relevant_item_a_query_is_the_same_as_its_row_of_a_matrix():
    queries, fragments, mask, _, class_of = some()
    own = torch.randint(0, 45, (70,), generator=torch.Generator().manual_seed(1))
    alone = average_precision(queries, fragments, mask, own, class_of)
    matrix = torch.zeros(70, 45, dtype=torch.bool)
    matrix[torch.arange(70), own] = True
    as_rows = average_precision(queries, fragments, mask, matrix, torch.arange(70))
    for name in ("map", "random", "prevalence", "queries", "ties"):
        assert alone[name] == pytest.approx(as_rows[name]), name
    scores = all_scores(queries, fragments, mask)
    of_class = {}
    for i, c in enumerate(class_of.tolist()):
        of_class.setdefault(c, []).append(naive(scores[i].tolist(), matrix[i].tolist()))
    expected = 100 * sum(sum(few) / len(few) for few in of_class.values()) / len(of_class)
    assert alone["map_macro"] == pytest.approx(expected)


def test_order_of_queries_items_and_fragments_is_irrelevant():
    queries, fragments, mask, relevant, class_of = some()
    expected = average_precision(queries, fragments, mask, relevant, class_of)
    g = torch.Generator().manual_seed(1)
    i, j, slot = (torch.randperm(n, generator=g) for n in (70, 45, 4))
    moved = average_precision(
        queries[i], fragments[j][:, slot], mask[j][:, slot], relevant[:, j], class_of[i], block=16
    )
    assert moved == pytest.approx(expected)


def test_padding_changes_nothing():
    queries, fragments, mask, relevant, class_of = some()
    expected = average_precision(queries, fragments, mask, relevant, class_of)
    wider = F.pad(fragments, (0, 0, 0, 3), value=5.0)
    assert average_precision(queries, wider, F.pad(mask, (0, 3)), relevant, class_of) == expected


def test_half_precision_is_widened():
    queries, fragments, mask, relevant, class_of = some()
    q, f = queries.bfloat16(), fragments.half()
    expected = average_precision(q.float(), f.float(), mask, relevant, class_of)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert average_precision(q, f, mask, relevant, class_of) == expected


def test_each_query_is_asked_for_once_and_only_if_it_has_relevant_items():
    queries, fragments, mask, relevant, class_of = some()
    scores, seen = all_scores(queries, fragments, mask).float(), torch.zeros(70, dtype=torch.long)

    def score_block(index):
        assert len(index) <= 16
        seen[index] += 1
        return scores[index]

    average_precision_blocks(score_block, 45, relevant, class_of, block=16)
    assert torch.equal(seen, relevant.any(1)[class_of].long())


# ------------------------------------------------------------------------------------------------- baselines
@pytest.mark.parametrize("r", [1, 2, 4, 6])
def test_random_is_the_mean_over_all_orders(r):
    relevant = [i < r for i in range(6)]
    orders = list(itertools.permutations(range(6)))
    mean = sum(naive(order, relevant) for order in orders) / len(orders)
    assert float(expected_random(torch.tensor([r]), 6)) == pytest.approx(mean)


def test_random_of_a_gallery_of_one():
    assert expected_random(torch.tensor([1]), 1).item() == 1


def test_random_scores_reach_the_random_baseline_and_the_prevalence_is_its_limit():
    g = torch.Generator().manual_seed(0)
    relevant = torch.rand(3, 2000, generator=g) < torch.tensor([[0.02], [0.3], [0.6]])
    result = from_scores(torch.randn(600, 2000, generator=g), relevant, torch.arange(600) % 3)
    assert result["map"] == pytest.approx(result["random"], abs=0.3)
    assert 0 < result["random"] - result["prevalence"] < 0.5
    assert result["random"] == pytest.approx(result["random_macro"])


# ------------------------------------------------------------------------------------------------------ ties
def test_constant_scores_put_every_hit_behind_every_miss():
    relevant = torch.tensor([[True, False, True, False, False]])
    result = from_scores(torch.ones(3, 5), relevant, torch.zeros(3, dtype=torch.long))
    assert result["map"] == pytest.approx(100 * (1 / 4 + 2 / 5) / 2)
    assert result["ties"] == 3
    own = from_scores(torch.ones(3, 5), torch.tensor([0, 2, 4]), torch.zeros(3, dtype=torch.long))
    assert (own["map"], own["ties"]) == (pytest.approx(20), 3)


@pytest.mark.parametrize("seed", range(5))
def test_rankings_with_many_ties_equal_the_naive_loop(seed):
    g = torch.Generator().manual_seed(seed)
    scores = torch.randint(-2, 3, (40, 30), generator=g).float()
    scores[scores == 0] *= torch.where(
        torch.rand((scores == 0).sum(), generator=g) < 0.5, -1.0, 1.0
    )  # -0 is 0
    relevant, class_of = torch.rand(4, 30, generator=g) < 0.3, torch.arange(40) % 4
    assert from_scores(scores, relevant, class_of)["map"] == pytest.approx(
        naive_means(scores, relevant, class_of)[0]
    )


@pytest.mark.parametrize("seed", range(6))
def test_ties_in_random_order_are_the_mean_over_all_orders(seed):
    """Seven items with three values of a score: the mean of AP over the 5,040 ways to list them before sorting."""
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randint(0, 3, (1, 7), generator=generator).float()
    relevant = torch.zeros(1, 7, dtype=torch.bool)
    relevant[0, torch.randperm(7, generator=generator)[: 1 + seed % 4]] = True
    total, orders = 0.0, list(itertools.permutations(range(7)))
    for listed in orders:
        ranking = sorted(listed, key=lambda i: -float(scores[0, i]))
        places = [rank for rank, i in enumerate(ranking, 1) if relevant[0, i]]
        total += sum((k + 1) / rank for k, rank in enumerate(places)) / len(places)
    found = average_precision_blocks(lambda i: scores[i], 7, relevant, torch.zeros(1).long())
    assert found["map_expected"] == pytest.approx(100 * total / len(orders), rel=1e-9)
    assert found["map"] <= found["map_expected"] + 1e-9
    if relevant.sum() == 1:
        own = average_precision_blocks(
            lambda i: scores[i], 7, relevant[0].nonzero()[0], torch.zeros(1).long()
        )
        assert own["map_expected"] == pytest.approx(found["map_expected"], rel=1e-9)


def test_constant_scores_in_random_order_are_a_random_ranking():
    relevant = torch.arange(9)[None] % 3 == 0
    found = average_precision_blocks(lambda i: torch.zeros(len(i), 9), 9, relevant, torch.zeros(4).long())
    assert found["map_expected"] == pytest.approx(found["random"], rel=1e-9)
    assert found["map"] < found["random"]
    without = average_precision_blocks(lambda i: torch.arange(9.0)[None].expand(len(i), -1), 9, relevant,
                                       torch.zeros(4).long())  # fmt: skip
    assert without["map_expected"] == without["map"]


def test_only_ties_that_cost_something_are_counted():
    relevant = torch.tensor([[True, True, False, False]])
    for scores, ties in [
        ([2, 2, 1, 1], 0),
        ([2, 1, 1, 0], 1),
        ([2, 1, 2, 0], 1),
        ([3, 2, 2, 1], 1),
        ([1, 1, 3, 3], 0),
    ]:
        assert from_scores(torch.tensor([scores]).float(), relevant, torch.tensor([0]))["ties"] == ties, (
            scores
        )
    for scores, ties in [([2, 1, 1, 0], 0), ([1, 1, 0, 0], 1), ([1, 2, 0, 1], 1)]:
        found = from_scores(torch.tensor([scores]).float(), torch.tensor([0]), torch.tensor([0]))
        assert found["ties"] == ties, scores


@pytest.mark.parametrize(("d", "g"), [(7, 37), (64, 700), (100, module.TILE + 1), (384, module.TILE + 5)])
def test_the_same_keyword_in_many_texts_is_an_exact_tie(d, g):
    """Whatever tile, slot or row a fragment stands in, its score has the same bits."""
    generator = torch.Generator().manual_seed(d)
    words = torch.randn(5, d, generator=generator)  # few keywords, in every text one, at any place
    which, slot = (torch.randint(0, n, (g,), generator=generator) for n in (5, 3))
    fragments = words[which][:, None].repeat(1, 3, 1)
    mask = torch.zeros(g, 3, dtype=torch.bool)
    mask[torch.arange(g), slot] = True
    queries = torch.randn(40, d, generator=generator)
    relevant = torch.rand(4, g, generator=generator) < 0.3
    class_of = torch.arange(40) % 4
    # of exact scores per word, each text has that of its word
    exact = (queries.double() @ words.double().T)[:, which]
    for block in (None, 3, 17):
        result = average_precision(queries, fragments, mask, relevant, class_of, block=block)
        assert result["map"] == pytest.approx(naive_means(exact, relevant, class_of)[0])
        assert result["ties"] == 40


# ------------------------------------------------------------------------------------------------ odd galleries
def test_items_without_fragments_rank_last_and_are_counted():
    queries = torch.tensor([[1.0]])
    fragments = torch.tensor([[[-5.0]], [[3.0]], [[7.0]], [[8.0]]])
    mask = torch.tensor([[True], [True], [False], [False]])
    first = torch.tensor([[True, False, False, False]])
    result = average_precision(queries, fragments, mask, first, torch.tensor([0]))
    assert (result["map"], result["without_fragments"], result["ties"]) == (50, 2, 0)
    last = torch.tensor([[False, False, True, False]])
    result = average_precision(queries, fragments, mask, last, torch.tensor([0]))
    assert (result["map"], result["ties"]) == (25, 1)  # behind the other without fragments
    none = average_precision(queries, fragments, torch.zeros_like(mask), first, torch.tensor([0]))
    assert none["map"] == 25


def test_everything_relevant_is_perfect():
    result = from_scores(
        torch.zeros(2, 4), torch.ones(1, 4, dtype=torch.bool), torch.zeros(2, dtype=torch.long)
    )
    assert (result["map"], result["random"], result["prevalence"], result["ties"]) == (100, 100, 100, 0)


# -------------------------------------------------------------------------------------------------- bad input
def test_numbers_that_are_not_finite_are_refused():
    queries, fragments, mask, relevant, class_of = some()
    for value in (torch.nan, torch.inf, -torch.inf):
        bad = queries.clone()
        bad[3, 0] = value
        with pytest.raises(ValueError, match="query 3 is not finite"):
            average_precision(bad, fragments, mask, relevant, class_of)
        bad = fragments.clone()
        bad[5, 2] = value
        with pytest.raises(ValueError, match=r"fragment .* 22 is not finite"):
            average_precision(queries, bad, None, relevant, class_of)
        scores = torch.randn(70, 45)
        scores[int((class_of == 1).nonzero()[0]), 4] = value
        with pytest.raises(ValueError, match=rf"query {int((class_of == 1).nonzero()[0])} is not finite"):
            from_scores(scores, relevant, class_of)
    large = torch.full((1, 4), 3e38)  # finite, though their sum is not
    assert from_scores(large, torch.tensor([1]), torch.tensor([0]))["map"] == 25


def test_bad_arguments_are_refused():
    scores, relevant, class_of = torch.randn(4, 6), torch.rand(3, 6) < 2, torch.tensor([0, 1, 2, 0])
    for message, call in [
        ("classes are 0 to 2", lambda: from_scores(scores, relevant, torch.tensor([0, 1, 2, 3]))),
        ("classes are 0 to 2", lambda: from_scores(scores, relevant, torch.tensor([0, 1, 2, -1]))),
        ("2 names for 3", lambda: from_scores(scores, relevant, class_of, names=["a", "b"])),
        ("one relevant item, 0 to 5", lambda: from_scores(scores, torch.tensor([0, 1, 2, 6]), class_of)),
        (
            "one relevant item, 0 to 5",
            lambda: module._evaluate(lambda i: scores[i], 6, {"": torch.tensor([0, 1])}, class_of, None, 4),
        ),
        ("none of 4 queries", lambda: from_scores(scores, ~relevant, class_of)),
        ("none of 0 queries", lambda: from_scores(scores[:0], relevant, class_of[:0])),
        ("block is at least 1", lambda: from_scores(scores, relevant, class_of, block=0)),
        ("no items", lambda: from_scores(scores[:, :0], relevant[:, :0], class_of)),
        (
            "scores of shape",
            lambda: average_precision_blocks(lambda i: scores[i, :5], 6, relevant, class_of),
        ),
    ]:
        with pytest.raises(ValueError, match=message):
            call()


# ------------------------------------------------------------------------------------------------ words, plurals
@pytest.mark.parametrize(
    ("one", "many"),
    [
        *[("dog", "dogs"), ("bus", "buses"), ("couch", "couches"), ("toothbrush", "toothbrushes")],
        *[("lorry", "lorries"), ("toy", "toys"), ("person", "people"), ("man", "men"), ("woman", "women")],
        *[("mouse", "mice"), ("knife", "knives"), ("sheep", "sheep"), ("wine glass", "wine glasses")],
        *[("hot dog", "hot dogs"), ("box", "boxes"), ("child", "children"), ("skis", "skis")],
    ],
)
def test_plurals(one, many):
    assert plural(one) == many


def test_a_hyphen_in_a_name_is_a_space():
    texts = ["a t-shirt", "two t shirts", "an x-ray bed", "the x ray beds", "a shirt"]
    found = lexical_relevance(texts, ["t-shirt", "bed"], synonyms={"bed": ("x-ray bed",)})
    assert found.tolist() == [[True, True, False, False, False], [False, False, True, True, False]]


def test_lexical_relevance():
    names = ["person", "dog", "hot dog", "bear", "teddy bear", "cat", "tv", "cow"]
    expected = {
        "A Man and two PUPPIES.": {"person", "dog"},
        "a hot dog on a plate": {"hot dog"},
        "a dog eats a hot-dog": {"dog", "hot dog"},
        "teddy  bears next to a cat": {"teddy bear", "cat"},
        "a bear": {"bear"},
        "the category of dogma, a tvset and a cowboy": set(),
        "people watch television": {"person", "tv"},
        "cats,dogs": {"cat", "dog"},
    }
    found = lexical_relevance(list(expected), names)
    for i, (text, classes) in enumerate(expected.items()):
        assert {names[k] for k in found[:, i].nonzero().flatten().tolist()} == classes, text
    plain = lexical_relevance(list(expected), names, synonyms={})
    assert not plain[0, 0]  # "man" is a synonym
    assert plain[0, 6]  # "people" is a plural
    assert torch.equal(plain[1:3], found[1:3] & torch.tensor([False, *[True] * 7]))  # "puppies"


def test_a_term_of_two_classes_counts_for_both():
    shared = {"a": ("thing",), "b": ("thing",)}
    assert lexical_relevance(["two things"], ["a", "b", "c"], synonyms=shared)[:, 0].tolist() == [
        True,
        True,
        False,
    ]


def test_synonyms_name_one_class_each_and_are_lower_case():
    terms = [term for entry in SYNONYMS.values() for term in entry]
    assert len(terms) == len(set(terms))
    assert not set(terms) & set(SYNONYMS)
    assert all(term == term.lower() for term in terms)


# --------------------------------------------------------------------------------------------------- the tasks
def record(objects, captions=("a cat", "a dog"), name="1"):
    return Record(name, "val", captions, size=(50, 50), objects=tuple(objects), source=f"file: image {name}")


BIG, THIN = (0.0, 0.0, 9.0, 9.0), (0.0, 0.0, 0.5, 9.0)
RECORDS = [
    record([Object(BIG, "cat"), Object(THIN, "dog"), Object(BIG, "dog", crowd=True)], name="0"),
    record([], ("nothing here",), name="1"),
    record([Object(BIG, "dog"), Object(BIG, "cat")], ("two cats",), name="2"),
]


def test_queries_and_relevance_of_records():
    assert query_boxes(RECORDS, ["cat", "dog"]) == [(0, 0, 0), (2, 0, 1), (2, 1, 0)]
    assert category_relevance(RECORDS, ["dog", "cat"]).tolist() == [[True, False, True], [True, False, True]]
    thin = [record([Object(BIG, "dog", crowd=True)])]
    assert category_relevance(thin, ["dog"]).tolist() == [[True]]
    assert category_relevance(thin, ["dog"], crowd=False).tolist() == [[False]]
    for function in (query_boxes, category_relevance):
        with pytest.raises(ValueError, match=r"file: image [02]: an object is a 'dog'"):
            function(RECORDS, ["cat"])
        with pytest.raises(ValueError, match="twice"):
            function(RECORDS, ["cat", "dog", "cat"])


def test_object_discovery_of_records():
    classes = torch.eye(2)
    crowded = [*RECORDS, record([Object(BIG, "dog", crowd=True)], name="3")]
    # best scores for cat: 0.9, 0.8, 0.1, 0.0; for dog: 0.2, 0.1, 0.9, 0.3
    fragments = torch.tensor([[[0.9, 0.2]], [[0.8, 0.1]], [[0.1, 0.9]], [[0.0, 0.3]]])
    result = object_discovery(classes, fragments, None, crowded, ["cat", "dog"])
    assert result["map/cat"] == pytest.approx(100 * (1 + 2 / 3) / 2)
    assert result["map/dog"] == pytest.approx(100)  # pictures 2, 3, 0 of 4
    assert result["map"] == result["map_macro"] == pytest.approx((100 * 5 / 6 + 100) / 2)
    assert result["prevalence"] == pytest.approx(100 * (2 / 4 + 3 / 4) / 2)
    assert discovery_protocol(result, split="x val").startswith(
        "x val: object discovery, 2 class names x 4 pictures, boxes of crowds count, average precision without"
    )
    fewer = object_discovery(classes, fragments, None, crowded, ["cat", "dog"], crowd=False)
    assert fewer["prevalence"] == pytest.approx(50)
    assert "do not count" in fewer["protocol"]
    with pytest.raises(ValueError, match="3 classes for 2 categories"):
        object_discovery(torch.eye(3, 2), fragments, None, crowded, ["cat", "dog"])
    with pytest.raises(ValueError, match="4 fragments for 3 records"):
        object_discovery(classes, fragments, None, RECORDS, ["cat", "dog"])


def test_description_assignment_of_records():
    names = ["cat", "dog"]
    boxes = torch.tensor([[1.0, 0, 0], [0, 1, 0], [0, 0, 1]])  # cat of 0, dog of 2, cat of 2
    # scores of texts 0, 1, 2 per box: (3, 2, 1), (1, 3, 2), (2, 1, 3)
    keywords = torch.tensor([[[3.0, 1, 2]], [[2, 3, 1]], [[1, 2, 3]]])

    def of(**options):
        return description_assignment(boxes, keywords, None, RECORDS, names, **options)

    # category: texts 0 and 2 for either class
    result = of()
    aps = [(1 + 2 / 3) / 2, (1 / 2 + 2 / 3) / 2, 1]
    assert result["map"] == pytest.approx(100 * sum(aps) / 3)
    assert result["map_macro"] == pytest.approx(100 * ((aps[0] + aps[2]) / 2 + aps[1]) / 2)
    assert assignment_protocol(result, "category", split="x val").startswith(
        "x val: description assignment, 3 boxes of at least 1 pixel(s) x 3 texts, a text is relevant if its "
        "picture has an object of the box's class, average precision without"
    )
    # lexical: "cat" in texts 0 and 2, "dog" in text 0 alone, which the dog of picture 2 ranks last
    result = of(relevance="lexical")
    assert (result["map/cat"], result["map/dog"]) == pytest.approx((100 * (5 / 6 + 1) / 2, 100 / 3))
    assert of(relevance="lexical", synonyms={"dog": ("nothing",)})["map"] != result["map"]
    # instance: texts 0, 2, 2
    result = of(relevance="instance")
    assert result["map"] == pytest.approx(100 * (1 + 1 / 2 + 1) / 3)
    assert result["map_macro"] == pytest.approx(100 * (1 + 1 / 2) / 2)
    assert result["random"] == pytest.approx(100 * 11 / 18)

    with pytest.raises(ValueError, match="category, lexical, instance"):
        of(relevance="class")
    with pytest.raises(ValueError, match="2 boxes for 3 queries"):
        description_assignment(boxes[:2], keywords, None, RECORDS, names)
    with pytest.raises(ValueError, match="2 keywords for 3 records"):
        description_assignment(boxes, keywords[:2], None, RECORDS, names)


def test_readings_are_arguments_whose_values_are_known():
    for _, argument, values, _ in READINGS:
        default = inspect.signature(description_assignment).parameters[argument].default
        assert str(default) == values.split(" | ")[0]
    assert READINGS[0][2].split(" | ") == list(RELEVANCE)


def test_an_oracle_and_a_random_scorer_on_the_embedded_set(scenes, tmp_path):
    """A vector with a place for each class: what a picture holds, or what a text names, scores 1."""
    instances = scenes / "annotations" / "instances_test.json"
    captions = scenes / "annotations" / "captions_test.json"
    records = load_coco(scenes / "images", captions=captions, instances=instances)
    names = read_categories(instances)
    holds = category_relevance(records, names)
    classes = torch.eye(len(names))
    perfect = object_discovery(classes, holds.T[:, None].float(), None, records, names)
    assert perfect["map"] == 100
    guessed = object_discovery(torch.randn(len(names), 4), torch.randn(12, 3, 4), None, records, names)
    assert guessed["map"] < 100
    boxes = classes[[query.category for query in query_boxes(records, names)]]
    perfect = description_assignment(boxes, holds.T[:, None].float(), None, records, names)
    assert perfect["map"] == 100
    named = lexical_relevance([" ".join(r.captions) for r in records], names, synonyms=SHAPES)
    assert 0 < named.sum() < named.numel()
    assert (named & ~holds).sum() <= 2  # a caption of the set names what is there
    result = description_assignment(
        boxes, named.T[:, None].float(), None, records, names, relevance="lexical", synonyms=SHAPES
    )
    assert result["map"] == 100
    assert write_metrics(tmp_path, {"seed": 0}, result, seconds=1).exists()


# ------------------------------------------------------------------------------------------ several relevances at once
def test_several_relevances_share_their_scores_and_change_no_number():
    """One scoring for all of them gives what a scoring for each gives; each query is asked for once."""
    queries, fragments, mask, relevant, class_of = some(q=90)
    scores = all_scores(queries, fragments, mask).float().round(decimals=2)  # with ties
    lexical = relevant.roll(1, 0)
    lexical[2] = False  # its queries count in the others alone
    own = torch.arange(90) % 45
    kinds = {"category": relevant, "lexical": lexical, "instance": own}
    asked = []

    def score(rows):
        asked.extend(rows.tolist())
        return scores[rows]

    found = average_precision_blocks(score, 45, kinds, class_of, block=16)
    assert sorted(asked) == sorted(set(asked)), "nothing is scored twice"
    for name, one in kinds.items():
        assert found[name] == average_precision_blocks(lambda i: scores[i], 45, one, class_of, block=16)
    assert len({result["queries"] for result in found.values()}) == 3
    none = {"category": relevant, "lexical": torch.zeros_like(relevant)}
    with pytest.raises(ValueError, match="none of 90 queries"):
        average_precision_blocks(score, 45, none, class_of)


def test_relevant_items_by_group_are_those_of_a_matrix():
    """`Items` by class are the bool matrix; by query they may be several, which the naive loop counts as well."""
    queries, fragments, mask, relevant, class_of = some()
    scores = all_scores(queries, fragments, mask)
    by_class = module.Items([row.nonzero().flatten() for row in relevant], class_of)
    same = [average_precision_blocks(lambda i: scores[i], 45, one, class_of) for one in (relevant, by_class)]
    same[1]["map_macro"] = pytest.approx(same[0]["map_macro"])
    assert same[0] == same[1]
    group = torch.arange(70) % 7  # seven pictures with several texts each
    of = [torch.arange(p, 45, 7) for p in range(7)]
    found = average_precision_blocks(lambda i: scores[i], 45, module.Items(of, group), class_of)
    expected = [
        naive(row, [g % 7 == p for g in range(45)])
        for row, p in zip(scores.tolist(), group.tolist(), strict=True)
    ]
    assert found["map"] == pytest.approx(100 * sum(expected) / 70, abs=1e-4)


def test_a_box_of_exactly_one_pixel_is_a_query():
    """x + 1 - x is less than 1 for many x; such a box is a query and a crop, or the two would not pair up."""
    from finematch.features.proposals import given

    boxes = [(x, 0.1, x + 1.0, 9.1) for x in (0.3, 7.3, 127.7, 250.7)] + [(3.0, 4.0, 3.9, 9.0)]
    record = Record(
        "1", "val", ("a cat",), size=(300, 20), objects=tuple(Object(box, "cat") for box in boxes)
    )
    assert any(x2 - x1 < 1 for x1, _, x2, _ in boxes[:4])
    assert [query.object for query in query_boxes([record], ["cat"])] == [0, 1, 2, 3]
    assert given([record]).mask.tolist() == [[True] * 4]
