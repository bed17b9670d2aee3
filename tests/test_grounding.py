"""Phrase grounding on phrases worked by hand and against a brute-force ranking."""

from __future__ import annotations

import itertools

import pytest
import torch

from finematch.boxes import iou, multi_scale_grid
from finematch.data.entities import load_entities
from finematch.evaluation.correspondence import on_span, pieces
from finematch.evaluation.grounding import GroundedPhrase, grounding, phrase_scores
from finematch.runs import write_metrics
from finematch.scenes.generator import TOKENIZER
from finematch.text import word_level

SIZE = (100, 80)


def phrase(regions, scores, boxes=((0, 0, 10, 10),), *, size=SIZE, kind=""):
    return GroundedPhrase(
        torch.tensor(regions, dtype=torch.float32),
        torch.tensor(scores, dtype=torch.float32),
        boxes,
        size,
        kind,
    )


def boxes_at_random(n, generator, size=SIZE):
    """n boxes with integer corners inside the picture, at least 5 wide and high."""
    width, height = size
    x = torch.randint(0, width - 5, (n,), generator=generator)
    y = torch.randint(0, height - 5, (n,), generator=generator)
    x2 = torch.stack([x + 5, torch.full_like(x, width)]).float()
    y2 = torch.stack([y + 5, torch.full_like(y, height)]).float()
    at = torch.rand(2, n, generator=generator)
    corner = torch.stack([x2[0] + at[0] * (x2[1] - x2[0]), y2[0] + at[1] * (y2[1] - y2[0])], 1).round()
    return torch.cat([torch.stack([x, y], 1).float(), corner], 1)


def some_phrases(n=60, r=12, seed=0):
    """Phrases whose candidates hit now and then, with distinct scores."""
    g = torch.Generator().manual_seed(seed)
    found = []
    for _ in range(n):
        regions = boxes_at_random(r, g)
        near = torch.randint(0, r, (2,), generator=g)
        true = (regions[near] + torch.randint(-2, 3, (2, 4), generator=g)).clamp(min=0)
        true = torch.minimum(true, torch.tensor([*SIZE, *SIZE]))
        found.append(GroundedPhrase(regions, torch.randperm(r, generator=g).float(), true, SIZE))
    return found


def brute_force(phrases, merged=False):
    """By sorting, box by box; scores are distinct."""
    rows = []
    for one in phrases:
        order = sorted(range(len(one.scores)), key=lambda i: -float(one.scores[i]))
        true = [[float(v) for v in box] for box in one.boxes]
        goal = true
        if merged:
            x1, y1, x2, y2 = zip(*true, strict=True)
            goal = [[min(x1), min(y1), max(x2), max(y2)]]

        def overlap(a, b):
            w, h = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
            both = max(w, 0) * max(h, 0)
            return both / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - both)

        def within(x, y, boxes):
            return any(b[0] <= x <= b[2] and b[1] <= y <= b[3] for b in boxes)

        listed = [[float(v) for v in one.regions[i]] for i in order]
        hits = [any(overlap(a, b) >= 0.5 for b in goal) for a in listed]
        points = [within((a[0] + a[2]) / 2, (a[1] + a[3]) / 2, true) for a in listed]
        w, h = one.size
        centre = [w / 4, h / 4, 3 * w / 4, 3 * h / 4]
        rows.append(
            {f"r{k}": any(hits[:k]) for k in (1, 5, 10)}
            | {"upper_bound": any(hits), "chance_r1": sum(hits) / len(hits), "pointing": points[0]}
            | {"upper_bound_pointing": any(points), "chance_pointing": sum(points) / len(points)}
            | {"centre_r1": any(overlap(centre, b) >= 0.5 for b in goal)}
            | {"centre_pointing": within(w / 2, h / 2, true)}
        )
    return {name: 100 * sum(float(row[name]) for row in rows) / len(rows) for name in rows[0]}


# ------------------------------------------------------------------------------------------ worked by hand
def test_phrases_worked_by_hand():
    # true box 10 x 10. IoU: the same box 1; 10 x 5 inside it exactly 0.5; 5 x 5 inside it 0.25; far away 0
    same, half, quarter, far = [0, 0, 10, 10], [0, 0, 10, 5], [0, 0, 5, 5], [50, 50, 60, 60]
    phrases = [
        phrase([half, far], [2, 1]),  # rank 0, also by its centre
        phrase([far, quarter, same], [3, 2, 1]),  # rank 2 by IoU; the best points outside, the second inside
        phrase([quarter, far], [2, 1]),  # never hits by IoU, points inside
        phrase([far], [1], boxes=()),  # nothing to find: dropped
    ]
    result = grounding(phrases, split="test")
    thirds = {"r1": 1, "r5": 2, "r10": 2, "upper_bound": 2, "pointing": 2, "upper_bound_pointing": 3}
    for name, hits in thirds.items():
        assert result[name] == pytest.approx(100 * hits / 3), name
    assert result["chance_r1"] == pytest.approx(100 * (1 / 2 + 1 / 3 + 0) / 3)
    assert result["chance_pointing"] == pytest.approx(100 * (1 / 2 + 2 / 3 + 1 / 2) / 3)
    assert result["centre_r1"] == result["centre_pointing"] == 0  # the true box is in a corner
    assert (result["phrases"], result["dropped"], result["without_candidates"]) == (3, 1, 0)
    assert result["ties_r"] == result["ties_pointing"] == 0
    assert result["protocol"] == (
        "test: 3 phrases (1 without boxes dropped), R@k at IoU >= 0.5 with any box of the phrase (AnyBox; "
        "merged_*: the box around all of its boxes, MergedBox), "
        "pointing game without tolerance, 2 to 3 candidate boxes a phrase, ties against the model"
    )
    assert not any("/" in name for name in result)


def test_any_and_merged_boxes_differ_both_ways():
    left, right, both = (0, 0, 10, 10), (30, 0, 40, 10), (0, 0, 40, 10)
    one_of_them, around = [phrase([list(box)], [1], boxes=(left, right)) for box in (left, both)]
    assert [grounding([p])["r1"] for p in (one_of_them, around)] == [100, 0]
    assert [grounding([p])["merged_r1"] for p in (one_of_them, around)] == [0, 100]
    # the pointing game accepts any box: (20, 5), the centre of the box around both, lies between the two
    assert [grounding([p])["pointing"] for p in (one_of_them, around)] == [100, 0]
    found = grounding([one_of_them, around])
    assert found["r1"] == found["merged_r1"] == found["upper_bound"] == found["merged_upper_bound"] == 50
    assert "AnyBox; merged_*" in found["protocol"]
    assert "MergedBox" in found["protocol"]


def test_merged_boxes_have_their_own_chance_centre_and_ties():
    # the centre box of a 100 x 80 picture is (25, 20, 75, 60), and so is what lies around the two true boxes
    true, whole, part = ((25, 20, 35, 60), (65, 20, 75, 60)), [25, 20, 75, 60], [25, 20, 35, 60]
    found = grounding([phrase([part, whole, [0, 0, 5, 5]], [2, 2, 1], boxes=true)])
    assert (found["centre_r1"], found["merged_centre_r1"]) == (0, 100)
    assert found["chance_r1"] == found["merged_chance_r1"] == pytest.approx(100 / 3)
    assert (found["r1"], found["merged_r1"]) == (0, 0)  # each hit ties with what the other protocol misses
    assert (found["ties_r"], found["merged_ties_r"]) == (1, 1)
    single = grounding([phrase([part, whole], [2, 1], boxes=true[:1])])  # around one box lies the box itself
    assert all(single[name] == single["merged_" + name] for name in ("r1", "r5", "chance_r1", "centre_r1"))


def test_centre_box_has_a_quarter_of_the_picture():
    # the centre box of a 100 x 80 picture is (25, 20, 75, 60)
    for true, expected in [
        ((25, 20, 75, 60), (100, 100)),
        ((0, 0, 100, 40), (0, 100)),  # touches the picture's centre with its edge
        ((25, 20, 50, 60), (100, 100)),  # exactly half of it
        ((25, 20, 49, 60), (0, 0)),
        ((26, 41, 75, 60), (0, 0)),
    ]:
        result = grounding([phrase([[0, 0, 5, 5]], [1], boxes=(true,))])
        assert (result["centre_r1"], result["centre_pointing"]) == expected, true


def test_points_play_the_pointing_game_alone():
    phrases = [
        phrase([[5, 5], [50, 50]], [2, 1]),
        phrase([[50, 50], [10, 10]], [2, 1]),
        phrase([[11, 5]], [1]),
    ]
    result = grounding(phrases)
    assert result["pointing"] == pytest.approx(100 / 3)
    assert result["upper_bound_pointing"] == pytest.approx(200 / 3)  # (10, 10) is on the edge
    assert result["chance_pointing"] == pytest.approx(100 / 3)
    assert "r1" not in result
    assert "1 to 2 candidate points" in result["protocol"]
    assert "IoU" not in result["protocol"]
    with pytest.raises(ValueError, match="phrase 1: boxes and points"):
        grounding([phrases[0], phrase([[0, 0, 1, 1]], [1])])


def test_points_and_boxes_around_them_agree():
    phrases = some_phrases()
    points = [p._replace(regions=(p.regions[:, :2] + p.regions[:, 2:]) / 2) for p in phrases]
    boxes, alone = grounding(phrases), grounding(points)
    shared = [name for name in alone if name.endswith("pointing")]
    assert len(shared) == 5
    assert [boxes[name] for name in shared] == [alone[name] for name in shared]


# -------------------------------------------------------------------------------------- against brute force
@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize("seed", range(3))
def test_equals_a_brute_force_ranking(seed, merged):
    phrases = some_phrases(seed=seed)
    result, expected = grounding(phrases), brute_force(phrases, merged)
    for name, value in expected.items():
        own = f"merged_{name}" if merged and "pointing" not in name else name
        assert result[own] == pytest.approx(value), own
    assert 0 < result["r1"] < result["r5"] < result["upper_bound"]


def test_blocks_and_phrases_of_different_sizes_change_nothing(monkeypatch):
    g = torch.Generator().manual_seed(2)
    sizes = torch.randint(0, 13, (60,), generator=g).tolist()
    phrases = [one._replace(regions=one.regions[:n], scores=one.scores[:n], boxes=one.boxes[: 1 + n % 2])
               for one, n in zip(some_phrases(), sizes, strict=True)]  # fmt: skip
    phrases.insert(7, phrases[0]._replace(boxes=()))
    whole = grounding(phrases)
    rows = brute_force([p for p in phrases if len(p.boxes) and len(p.scores)])
    count = sum(len(p.scores) > 0 for p in phrases if len(p.boxes))
    assert whole["r1"] == pytest.approx(rows["r1"] * count / 60)  # a phrase without candidates is a miss
    assert (whole["dropped"], whole["without_candidates"]) == (1, 60 - count)
    for size in (1, 7, 61):
        monkeypatch.setattr("finematch.evaluation.grounding.BLOCK", size)
        assert grounding(iter(phrases)) == whole
    with pytest.raises(ValueError, match="phrase 61: score 0 is not finite"):
        grounding([*phrases, phrase([[0, 0, 9, 9]], [float("nan")])])


def test_chance_is_the_mean_over_all_orders():
    generator = torch.Generator().manual_seed(3)
    regions = boxes_at_random(7, generator)
    one = GroundedPhrase(regions, torch.arange(7.0), regions[[0, 3]], SIZE)
    found = grounding([one])
    orders = list(itertools.permutations(range(7)))
    hit = (iou(regions, regions[[0, 3]]) >= 0.5).any(1).tolist()
    for k in (1, 5, 10):
        mean = sum(any(hit[i] for i in order[:k]) for order in orders) / len(orders)
        assert found[f"chance_r{k}"] == pytest.approx(100 * mean)
    assert 0 < found["chance_r1"] < found["chance_r5"] < found["chance_r10"] == found["upper_bound"] == 100


def test_order_of_candidates_boxes_and_phrases_is_irrelevant():
    phrases = some_phrases()
    g = torch.Generator().manual_seed(1)
    moved = []
    for i in torch.randperm(len(phrases), generator=g).tolist():
        p, order = phrases[i], torch.randperm(12, generator=g)
        moved.append(p._replace(regions=p.regions[order], scores=p.scores[order], boxes=p.boxes.flip(0)))
    assert grounding(iter(moved)) == pytest.approx(grounding(phrases))


def test_unit_of_the_scores_is_irrelevant_and_precision_is_widened():
    phrases = some_phrases()
    other = [p._replace(scores=(p.scores * 3 - 100).double()) for p in phrases]
    half = [p._replace(scores=p.scores.bfloat16(), regions=p.regions.half()) for p in phrases]  # exact here
    assert grounding(phrases) == grounding(other) == grounding(half)


def test_tensors_that_carry_gradients_are_scored():
    p = some_phrases(1)[0]
    grad = p._replace(scores=p.scores.requires_grad_(), regions=p.regions.clone().requires_grad_())
    assert grounding([grad]) == grounding([p])


# ------------------------------------------------------------------------------------------------------ ties
def test_constant_scores_are_worth_nothing():
    hits, misses = [[0, 0, 10, 10]], [[50, 50, 60, 60]] * 10
    result = grounding([phrase(hits + misses, [1] * 11)])
    assert [result[name] for name in ("r1", "r5", "r10", "pointing")] == [0, 0, 0, 0]
    assert (result["ties_r"], result["ties_pointing"]) == (1, 1)
    assert grounding([phrase(hits + misses[:9], [1] * 10)])["r10"] == 100  # nine misses first, then the hit


def test_a_tie_among_hits_or_below_them_is_no_tie():
    near, far = [0, 0, 10, 9], [50, 50, 60, 60]
    result = grounding([phrase([near, [0, 0, 10, 10], far, far], [2, 2, 1, 1])])
    assert (result["r1"], result["ties_r"], result["ties_pointing"]) == (100, 0, 0)


def test_a_tie_counts_in_the_metric_that_it_moves():
    # of two best candidates both point inside, one has too small an IoU
    result = grounding([phrase([[0, 0, 10, 10], [4, 4, 6, 6]], [1, 1])])
    assert (result["r1"], result["r5"], result["ties_r"]) == (0, 100, 1)
    assert (result["pointing"], result["ties_pointing"]) == (100, 0)


# ------------------------------------------------------------------------------------------------------ types
def test_types_are_counted_apart_and_a_phrase_of_two_types_in_both(tmp_path):
    hit, miss = [[0, 0, 10, 10]], [[50, 50, 60, 60]]
    phrases = [
        phrase(hit, [1], kind="people"),
        phrase(miss, [1], kind="people/clothing"),
        phrase(hit, [1]),
    ]
    result = grounding(phrases)
    assert result["r1"] == pytest.approx(200 / 3)
    assert (result["r1/people"], result["phrases/people"]) == (50, 2)
    assert (result["r1/clothing"], result["pointing/clothing"], result["phrases/clothing"]) == (0, 0, 1)
    assert not any(name.endswith("/") for name in result)
    # flat and finite: a metrics file takes it as it is
    assert write_metrics(tmp_path, {"seed": 0}, result, seconds=1).exists()


def test_one_type_is_no_breakdown():
    assert not any("/" in name for name in grounding([phrase([[0, 0, 10, 10]], [1], kind="other")]))


# ------------------------------------------------------------------------------------- the public evaluator
SENTENCES = {
    "11": "[/EN#1/people A man] and [/EN#2/people two women] walk in [/EN#3/scene the park] .\n"
    "[/EN#2/people Women] carry [/EN#4/other/clothing red bags] near [/EN#5/other a kiosk] .\n",
    "12": "[/EN#6/animals A dog] chases [/EN#7/animals birds] .\n[/EN#0/notvisual It] is a sunny day .\n",
}
TRUE = {
    "11": {1: [(10, 20, 60, 120)], 2: [(70, 25, 100, 118), (110, 30, 150, 121)],
           4: [(88, 80, 101, 99), (120, 85, 131, 98)], 3: "<scene>1</scene><nobndbox>0</nobndbox>",
           5: "<scene>0</scene><nobndbox>1</nobndbox>"},
    "12": {6: [(30, 60, 90, 110)], 7: [(5, 5, 25, 20), (40, 8, 60, 22), (100, 4, 119, 18)]},
}  # fmt: skip
# of each phrase with boxes, the boxes that a model would propose, the best first
PREDICTED = {
    ("11", 0): [[(8, 18, 61, 118), (0, 0, 160, 130)], [(72, 28, 148, 119), (70, 25, 99, 110), (0, 0, 20, 20)]],
    ("11", 1): [[*((0, 0, x, 30) for x in range(30, 35)), (112, 28, 149, 120)],
                [(87, 79, 102, 100), (87, 79, 132, 100)]],
    ("12", 0): [[(60, 60, 120, 110), (45, 60, 105, 110), (30, 60, 60, 110)],  # IoU 1/3, 3/5, exactly 1/2
                [(0, 0, 128, 128), (100, 20, 119, 34), (6, 4, 116, 23), (44, 8, 64, 22)]],
}  # fmt: skip
# What MDETR's Flickr30kEntitiesRecallEvaluator (datasets/flickr_eval.py) gives for these two files.
MDETR = {
    "": {"all": (1 / 3, 5 / 6, 1, 1), "people": (1 / 3, 2 / 3, 1, 1), "clothing": (1, 1, 1, 1),
         "animals": (0, 1, 1, 1)},
    "merged_": {"all": (1 / 3, 5 / 6, 5 / 6, 5 / 6), "people": (2 / 3, 2 / 3, 2 / 3, 2 / 3), "clothing": (0, 1, 1, 1),
                "animals": (0, 1, 1, 1)},
}  # fmt: skip


def entities_folder(folder):
    """`SENTENCES` and `TRUE` in the files of Flickr30k Entities."""
    for name in ("Sentences", "Annotations"):
        (folder / name).mkdir(parents=True)
    (folder / "val.txt").write_text("11\n12\n")
    corners = ("xmin", "ymin", "xmax", "ymax")
    for name, text in SENTENCES.items():
        (folder / "Sentences" / f"{name}.txt").write_text(text)
        objects = ""
        for entity, things in TRUE[name].items():
            boxes = [things] if isinstance(things, str) else []
            for box in things if not boxes else ():
                sides = "".join(f"<{c}>{v}</{c}>" for c, v in zip(corners, box, strict=True))
                boxes.append(f"<bndbox>{sides}</bndbox>")
            objects += "".join(f"<object><name>{entity}</name>{box}</object>" for box in boxes)
        size = "<size><width>160</width><height>130</height><depth>3</depth></size>"
        (folder / "Annotations" / f"{name}.xml").write_text(
            f"<annotation><filename>{name}.jpg</filename>{size}{objects}</annotation>"
        )
    return folder


def test_recall_equals_that_of_mdetrs_evaluator(tmp_path):
    records = load_entities(entities_folder(tmp_path), "val", image_dir=tmp_path, check_images=False)
    phrases = []
    for record in records:
        given = {c: iter(PREDICTED.get((record.image_id, c), ())) for c in range(len(record.captions))}
        for one in record.phrases:
            boxes = next(given[one.caption]) if one.boxes else [(0, 0, 5, 5)]
            scores = torch.arange(len(boxes), 0, -1).float()
            phrases.append(
                GroundedPhrase(torch.tensor(boxes).float(), scores, one.boxes, record.size, one.kind)
            )
    found = grounding(phrases)
    assert (found["phrases"], found["dropped"]) == (6, 3)  # the scene, the kiosk and "It" have no box
    for protocol, kinds in MDETR.items():
        for kind, wanted in kinds.items():
            for key, value in zip(("r1", "r5", "r10", "upper_bound"), wanted, strict=True):
                name = f"{protocol}{key}{'' if kind == 'all' else '/' + kind}"
                assert found[name] == pytest.approx(100 * value), name
    assert "AnyBox" in found["protocol"]
    assert "MergedBox" in found["protocol"]


# -------------------------------------------------------------------------------------------------- bad input
@pytest.mark.parametrize(
    ("regions", "scores", "boxes", "message"),
    [
        ([[0, 0, 9, 9]], [float("nan")], ((0, 0, 9, 9),), "phrase 1: score 0 is not finite"),
        ([[0, 0, 9, 9], [1, 1, 5, 5]], [1, float("-inf")], ((0, 0, 9, 9),), "score 1 is not finite"),
        ([[0, 0, float("nan"), 9]], [1], ((0, 0, 9, 9),), "candidate 0 is not finite"),
        ([[0, 0, 9, 9], [5, 5, 4, 9]], [1, 2], ((0, 0, 9, 9),), "candidate 1 is no x1 <= x2"),
        ([[0, 0, 9, 9]], [1, 2], ((0, 0, 9, 9),), "r boxes of 4 or r points of 2"),
        ([[0, 0, 9]], [1], ((0, 0, 9, 9),), "r boxes of 4 or r points of 2"),
        ([[0, 0, 9, 9]], [1], ((3, 3, 3, 9),), "no area"),
        ([[0, 0, 9, 9]], [1], ((0, 0, 9, 90),), "outside the picture"),
        ([[0, 0, 9, 9]], [1], ((-9, 0, 9, 9),), "outside the picture"),
    ],
)
def test_bad_phrases_are_refused_by_number(regions, scores, boxes, message):
    good = phrase([[0, 0, 10, 10]], [1])
    with pytest.raises(ValueError, match="phrase 1: .*" + message.removeprefix("phrase 1: ")):
        grounding([good, phrase(regions, scores, boxes)])


def test_candidates_in_shares_of_the_picture_are_refused():
    with pytest.raises(ValueError, match="scale them by the size"):
        grounding([phrase([[0, 0, 0.1, 0.1]], [1]), phrase([[0, 0, 1, 1]], [1])])


def test_nothing_to_ground_is_refused():
    with pytest.raises(ValueError, match="no phrase with boxes among 1"):
        grounding([phrase([[0, 0, 1, 1]], [1], boxes=())])
    with pytest.raises(ValueError, match="no phrase"):
        grounding([])


def test_a_phrase_without_candidates_is_a_miss():
    none = GroundedPhrase(torch.zeros(0, 4), torch.zeros(0), ((0, 0, 10, 10),), SIZE)
    result = grounding([none, phrase([[0, 0, 10, 10]], [1])])
    assert (result["r1"], result["upper_bound"], result["chance_r10"], result["pointing"]) == (50,) * 4
    assert result["without_candidates"] == 1
    assert grounding([none])["r1"] == 0


# ------------------------------------------------------------------------------------------ scores of a phrase
def test_scores_of_a_phrase():
    words = torch.tensor([[9.0, 9, 9], [1, 5, 0], [3, 2, 1], [8, 8, 8]])
    mask = torch.tensor([False, True, True, False])
    assert phrase_scores(words, mask).tolist() == [3, 5, 1]
    assert phrase_scores(words, mask, reduce="max").tolist() == [3, 5, 1]
    assert phrase_scores(words, mask, reduce="mean").tolist() == [2, 3.5, 0.5]
    assert phrase_scores(words, [2, 1], reduce="mean").tolist() == [2, 3.5, 0.5]
    with pytest.raises(ValueError, match="'max' or 'mean'"):
        phrase_scores(words, mask, reduce="sum")
    with pytest.raises(ValueError, match="cut off"):
        phrase_scores(words, torch.zeros(4, dtype=torch.bool))
    with pytest.raises(ValueError, match="cut off"):
        phrase_scores(words, [])
    with pytest.raises(ValueError, match="of a caption of 4"):
        phrase_scores(words, [4])
    with pytest.raises(ValueError, match="of a caption of 4"):
        phrase_scores(words, [-1])


# ------------------------------------------------------------------------------ records of the embedded set
def test_an_oracle_and_a_random_scorer_on_the_embedded_set(scenes):
    """From records to numbers, as a method does it: spans to words to regions."""
    tokenizer, g = word_level(TOKENIZER), torch.Generator().manual_seed(0)
    oracle, random = [], []
    for record in load_entities(scenes / "entities", "test", image_dir=scenes / "images"):
        regions = multi_scale_grid(*record.size, 84)
        for p in record.phrases:
            offsets = pieces(record.captions[p.caption], tokenizer).offsets
            words = on_span(offsets, p.start, p.end)
            known = torch.zeros(len(offsets), len(regions))
            if p.boxes:
                known[words] = iou(regions, torch.tensor(p.boxes)).amax(1)
            for made, scores in ((oracle, known), (random, torch.randn(known.shape, generator=g))):
                made.append(
                    GroundedPhrase(regions, phrase_scores(scores, words), p.boxes, record.size, p.kind)
                )
    best, guessed = grounding(oracle, split="scenes test"), grounding(random)
    assert best["r1"] == best["upper_bound"] == guessed["upper_bound"] > 0
    assert best["phrases"] > 50
    assert abs(guessed["r1"] - guessed["chance_r1"]) < 10
    assert guessed["r1"] < best["r1"]
