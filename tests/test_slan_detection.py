"""SLAN's detection and grounding head: prompts, targets and scores against loops; that it learns eight images."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch

from finematch.boxes import iou
from finematch.data.record import Object, Phrase, Record
from finematch.encoders import BertTower, small_bert
from finematch.evaluation.detection import coco_truth, detection, result_rows
from finematch.evaluation.grounding import phrase_scores
from finematch.models.configs import LocalizationConfig, LocatorConfig, SLANConfig
from finematch.models.slan.detection import (
    NOBODY,
    LabelledBoxes,
    Localizer,
    assign,
    best_boxes,
    class_items,
    collate,
    label_scores,
    label_text,
    open_filter,
    phrase_items,
    prompts,
    repeated,
)
from finematch.models.slan.locator import SelfLocator
from finematch.models.slan.objective import SLAN
from finematch.models.slan.towers import CachedStages, Towers
from finematch.scenes.generator import TOKENIZER
from finematch.text import word_level, wordpiece
from finematch.training import Plan, fit

NAMES = ("circle", "star", "ring")
IDS = {"circle": 1, "star": 4, "ring": 9}
CHANNELS = (6, 6)
SIDES = (16, 8)
WORDS = word_level(TOKENIZER)


class Painted:
    """Maps on which every thing paints its class on its cells, a little noise beside: the images of `records`."""

    def __init__(self, records, seed=0):
        g = torch.Generator().manual_seed(seed)
        self.maps = []
        for side in SIDES:
            found = 0.1 * torch.randn(len(records), 6, side, side, generator=g)
            for i, one in enumerate(records):
                for thing in one.objects:
                    x1, y1, x2, y2 = (round(v * side / 64) for v in thing.box)
                    found[i, NAMES.index(thing.category), y1:y2, x1:x2] += 2
            self.maps.append(found)

    def __len__(self):
        return len(self.maps[0])

    def batch(self, rows):
        return {f"map{i}": m[list(rows)] for i, m in enumerate(self.maps)}


def records(n=8, seed=0):
    """Images of 64 px with one or two things on a grid of four places; the caption names them."""
    g = torch.Generator().manual_seed(seed)
    found = []
    for i in range(n):
        places = torch.randperm(4, generator=g)[: 1 + i % 2].tolist()
        things, phrases, text = [], [], ""
        kinds = torch.randperm(3, generator=g)[: len(places)].tolist()
        for place, kind in zip(places, kinds, strict=True):
            x, y = 32.0 * (place % 2) + 4, 32.0 * (place // 2) + 4
            name = NAMES[kind]
            box = (x, y, x + 24, y + (24 if name != "ring" else 16))
            text += f"{' and ' if text else ''}a {name}"
            things.append(Object(box, name))
            phrases.append(Phrase(0, len(text) - len(name), len(text), (box,)))
        found.append(Record(str(i), "train", (text,), None, (64, 64), tuple(things), tuple(phrases)))
    return found


def slan(seed=0, **options):
    torch.manual_seed(seed)
    settings = {"width": 16, "heads": 2, "levels": 1, "decoder_levels": 2, "pyramid": 8, "count": 24, "anchor": 3.0,
                "top": 5, "samples": 2, **options}  # fmt: skip
    towers = Towers(CachedStages(CHANNELS), BertTower(small_bert(len(WORDS), width=16, depth=1, heads=2)), 16)
    locator = SelfLocator(CHANNELS, LocatorConfig(**settings))
    config = SLANConfig(width=16, embed=0, queue=0, mlm_weight=0.0, reg_weight=0.0, region_word=1.0)
    return SLAN(towers, locator, config)


def batch_of(items, index, source):
    return LabelledBoxes(source, items).__getitems__(index)


# ------------------------------------------------------------------------------------------------------- texts
def test_a_prompt_names_the_classes_and_its_other_words_do_not_count():
    (one,) = prompts(["circle", "small star", "ring"], WORDS)
    tokens = WORDS.convert_ids_to_tokens(one.ids.tolist())
    of = [[tokens[i] for i in span.nonzero().flatten()] for span in one.spans]
    assert of == [["circle"], ["small", "star"], ["ring"]]
    assert one.labels == (0, 1, 2)
    assert (one.special == ~one.spans.any(0)).all()
    assert tokens[0] == "[CLS]"
    assert tokens[-1] == "[SEP]"


def test_long_lists_become_several_prompts_with_every_class_once():
    names = [f"{size} {shape}" for size in ("small", "large") for shape in NAMES]
    whole = prompts(names, WORDS)
    assert len(whole) == 1
    few = prompts(names, WORDS, max_length=12)
    assert len(few) > 1
    assert max(len(one.ids) for one in few) <= 12
    assert [label for one in few for label in one.labels] == list(range(6))
    for one in few:
        for label, span in zip(one.labels, one.spans, strict=True):
            assert WORDS.decode(one.ids[span]) == names[label]


def test_bad_class_names_are_refused():
    with pytest.raises(ValueError, match="class 'xyzzy' has no known word"):
        prompts(["circle", "xyzzy"], WORDS)
    with pytest.raises(ValueError, match="does not fit into 4 tokens"):
        prompts(["small star"], WORDS, max_length=4)


def test_cocos_classes_in_berts_vocabulary(real_data):
    from finematch.data import categories

    names = categories(real_data / "coco" / "annotations" / "instances_val2017.json")
    tokenizer = wordpiece(real_data / "vocab" / "bert-base-uncased-vocab.txt")
    (whole,) = prompts(names, tokenizer)
    parts = prompts(names, tokenizer, max_length=64)
    assert len(names) == 80
    assert len(parts) > 1
    for one in (whole, *parts):
        spelt = [tokenizer.decode(one.ids[span]) for span in one.spans]
        assert spelt == [names[label] for label in one.labels]


def test_items_know_the_boxes_that_their_text_does_not_name():
    data = records()
    two = prompts(NAMES, WORDS, max_length=7)  # two prompts: circle and star; ring
    assert [one.labels for one in two] == [(0, 1), (2,)]
    items = class_items(data, range(8), two, NAMES)
    assert len(items) == 16
    for (row, text, boxes), record in zip(items, [r for r in data for _ in two], strict=True):
        assert row == int(record.image_id)
        for (label, box), thing in zip(boxes, record.objects, strict=True):
            number = NAMES.index(thing.category)
            assert (number in text.labels) == (label != NOBODY)
            assert label == NOBODY or text.labels[label] == number
            assert torch.allclose(torch.tensor(box) * 64, torch.tensor(thing.box))
    crowd = replace(data[0], objects=(replace(data[0].objects[0], crowd=True),))
    assert class_items([crowd], [0], two[:1], NAMES)[0][2] == []


def test_phrases_are_labels_of_their_caption():
    caption = "a star and a ring . two circles"
    boxes = [((0.0, 0.0, 8.0, 8.0),), ((8.0, 8.0, 16.0, 24.0), (0.0, 32.0, 8.0, 64.0)), ()]
    spans = [(0, 6), (11, 17), (20, 31)]
    phrases = tuple(Phrase(0, a, b, box) for (a, b), box in zip(spans, boxes, strict=True))
    other = Phrase(1, 0, 6, ((32.0, 32.0, 64.0, 64.0),))
    record = Record("x", "train", (caption, "a ring"), None, (64, 64), (), (*phrases, other))
    first, second = phrase_items([record], [5], WORDS)
    assert first[0] == second[0] == 5
    assert [label for label, _ in first[2]] == [0, 1, 1, NOBODY]  # a phrase without boxes is no label
    assert [label for label, _ in second[2]] == [NOBODY, NOBODY, NOBODY, 0]
    assert [WORDS.decode(first[1].ids[span]) for span in first[1].spans] == ["a star", "a ring"]
    assert first[1].special.tolist() == [True, *[False] * (len(first[1].ids) - 2), True]


# ---------------------------------------------------------------------------------------------- scores, targets
@pytest.mark.parametrize("reduce", ["mean", "max"])
def test_label_scores_are_those_of_loops(reduce):
    torch.manual_seed(0)
    cosine, spans = torch.randn(2, 5, 7), torch.rand(2, 3, 7) < 0.4
    spans[1, 2] = False
    found = label_scores(cosine, spans, reduce)
    for b in range(2):
        for c in range(3):
            if spans[b, c].any():
                torch.testing.assert_close(
                    found[b, :, c], phrase_scores(cosine[b].T, spans[b, c], reduce=reduce)
                )
            else:
                assert not found[b, :, c].any()


def test_targets_worked_by_hand():
    boxes = torch.tensor(
        [[[0.0, 0, 0.5, 0.5], [0, 0, 0.5, 0.4], [0.6, 0.6, 1, 1], [0, 0.9, 0.1, 1], [0, 0, 0.5, 0.5]]]
    )
    valid = torch.tensor([[True, True, True, True, False]])
    true = torch.tensor([[[0.0, 0, 0.5, 0.5], [0.5, 0.5, 1, 1], [0.5, 0.5, 0.7, 0.7], [0, 0.9, 0.1, 1]]])
    owner, real = torch.tensor([[1, 0, 2, NOBODY]]), torch.tensor([[True, True, True, True]])
    wanted, nearest, matched = assign(boxes, valid, true, owner, real, 3)
    # 0 and 1 overlap box 0 by 1 and 0.8; 2 overlaps box 1 by 0.64, and box 2 by 0.01 / 0.19, the best that box has;
    # 3 lies on a box that this text does not name; 4 is no region
    assert wanted[0].int().tolist() == [[0, 1, 0], [0, 1, 0], [1, 0, 1], [0, 0, 0], [0, 0, 0]]
    assert matched[0].tolist() == [True, True, True, False, False]
    torch.testing.assert_close(nearest[0, :3], true[0, [0, 0, 1]])
    none, _, nothing = assign(boxes, valid, true, torch.full_like(owner, NOBODY), real, 3)
    assert not none.any()
    assert not nothing.any()


def test_overlapping_boxes_of_a_class_are_suppressed_and_prompts_are_joined():
    boxes = torch.tensor([[0.0, 0, 0.5, 0.5], [0, 0, 0.5, 0.4], [0.6, 0.6, 1, 1]])
    one = (boxes, torch.tensor([[0.9, 0.1], [0.8, 0.2], [-1.0, -1.0]]), torch.tensor([0, 1]))
    two = (boxes, torch.tensor([[0.3], [0.2], [0.7]]), torch.tensor([2]))
    found = best_boxes([one, two])
    pairs = [
        (int(label), round(float(score), 1)) for label, score in zip(found.labels, found.scores, strict=True)
    ]
    assert pairs == [(0, 0.9), (2, 0.7), (2, 0.3), (1, 0.2)]  # each class keeps the better of the first two
    assert (
        len(best_boxes([one, two], suppress=0.0).scores) == 7
    )  # two regions of two classes and three of one
    assert len(best_boxes([one, two], most=2).scores) == 2
    assert (iou(found.boxes[1:3], found.boxes[1:3]) - torch.eye(2)).max() < 0.5


# ---------------------------------------------------------------------------------------------------- the model
def test_the_filter_opens_and_keeps_the_scales_that_were_learned():
    locator = slan().locator
    with torch.no_grad():
        locator.adaptors[0].theta.fill_(0.3)
    open_filter(locator, 100, 0.0)
    theta = locator.adaptors[0].theta
    assert theta.shape == (24, 2)  # as many as there are proposals
    assert (theta[:5] == 0.3).all()
    assert (theta[5:] == 0).all()  # p = exp(0) = 1
    few = slan(scaling="level").locator
    open_filter(few, 0, 0.0)
    assert few.adaptors[0].theta.shape == (1, 2)


def test_detection_opens_the_filter_and_grounding_leaves_it():
    config = LocalizationConfig()
    at = {task: Localizer(slan(), config, task=task) for task in ("detection", "grounding")}
    assert (at["detection"].locator.filter.top, at["grounding"].locator.filter.top) == (100, 5)
    assert (at["detection"].reduce, at["grounding"].reduce) == ("mean", "max")
    found = at["detection"].eval().detect(Painted(records()).batch([0]), prompts(NAMES, WORDS))
    assert found[0].scores.tolist() == sorted(found[0].scores.tolist(), reverse=True)
    with pytest.raises(ValueError, match="task is 'captions'"):
        Localizer(slan(), config, task="captions")


@pytest.mark.parametrize(
    "options", [{}, {"align": "fused"}, {"label_score": "max"}, {"levels": 0}, {"levels": 2}]
)
def test_batch_padding_and_order_change_nothing(options):
    options = dict(options)
    levels = options.pop("levels", 1)
    data = records()
    source, model = Painted(data), Localizer(slan(levels=levels), LocalizationConfig(**options)).eval()
    items = phrase_items(data, range(8), WORDS)  # captions of different lengths, one or two labels
    batch = batch_of(items, [3, 0, 1], source)
    together = model.regions(batch["image"], batch["text"])
    logits = model.logits(together.cosine, batch["text"]["spans"])
    for place, i in enumerate([3, 0, 1]):
        alone = batch_of(items, [i], source)
        at = model.regions(alone["image"], alone["text"])
        n, c = alone["text"]["mask"].shape[1], alone["text"]["spans"].shape[1]
        torch.testing.assert_close(at.boxes[:, 0], together.boxes[:, place], atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(at.cosine[0], together.cosine[place, :, :n], atol=1e-5, rtol=1e-4)
        own = model.logits(at.cosine, alone["text"]["spans"])[0]
        torch.testing.assert_close(own, logits[place, :, :c], atol=1e-4, rtol=1e-4)


def test_readings_differ():
    data, names = records(), ["small star", "large ring"]
    texts, source = prompts(names, WORDS), Painted(data)
    batch = batch_of(class_items(data, range(8), texts, [*names, *NAMES]), [1, 3], source)
    scores = []
    for options in ({}, {"label_score": "max"}, {"align": "fused"}):
        model = Localizer(slan(), LocalizationConfig(**options)).eval()
        at = model.regions(batch["image"], batch["text"])
        scores.append(model.logits(at.cosine, batch["text"]["spans"]))
    assert not torch.allclose(scores[0], scores[1])
    assert not torch.allclose(scores[0], scores[2])
    phrase = Localizer(slan(), LocalizationConfig(phrase_score="mean"), task="grounding")
    assert phrase.reduce == "mean"


def test_the_loss_reaches_everything_that_detection_uses_and_frozen_proposals_stay():
    data = records()
    batch = batch_of(class_items(data, range(8), prompts(NAMES, WORDS), NAMES), range(8), Painted(data))
    model = Localizer(slan(), LocalizationConfig())
    terms = model(batch)
    assert terms["loss"] == terms["align_loss"] + terms["box_loss"] + terms["proposal_loss"]
    terms["loss"].backward()
    for name in ("scale", "offset", "locator.adaptors.0.theta", "locator.proposals.head.bbox_pred.weight",
                 "towers.text_encoder.net.embeddings.word_embeddings.weight"):  # fmt: skip
        assert model.get_parameter(name).grad.abs().sum() > 0, name
    frozen = Localizer(slan(frozen=True), LocalizationConfig())
    terms = frozen(batch)
    terms["loss"].backward()
    assert terms["proposal_loss"] == 0
    assert all(p.grad is None for p in frozen.locator.proposals.parameters())


def test_images_without_boxes_are_negatives():
    data = [replace(one, objects=()) for one in records()]
    batch = batch_of(class_items(data, range(8), prompts(NAMES, WORDS), NAMES), [0, 1], Painted(data))
    terms = Localizer(slan(), LocalizationConfig())(batch)
    assert torch.isfinite(terms["loss"])
    assert terms["box_loss"] == 0
    assert terms["align_loss"] > 0


def learned(tmp_path, task, epochs=4, lr=1e-2, **options):
    """Fine-tuned on eight images, each 30 times an epoch; the terms at the end, the model, the items and the images."""
    data = records()
    source, model = Painted(data), Localizer(slan(**options), LocalizationConfig(), task=task)
    items = (class_items(data, range(8), prompts(NAMES, WORDS), NAMES) if task == "detection"
             else phrase_items(data, range(8), WORDS))  # fmt: skip
    plan = Plan(epochs=epochs, batch_size=8, lr=lr, warmup=0.05, seed=0)
    fit(model, LabelledBoxes(source, 30 * items), plan, tmp_path, echo=None)
    return model.eval(), data, source, items


def test_eight_images_are_learned_by_heart(tmp_path):
    model, data, source, items = learned(tmp_path, "detection")
    terms = model(batch_of(items, range(8), source))
    assert terms["align_loss"] < 0.1
    texts, ids = prompts(NAMES, WORDS), list(IDS.values())

    def score(order):
        found = model.detect(source.batch(order), texts)
        return detection(coco_truth(data, IDS), [row for one, at in zip(data, found, strict=True)
                                                for row in result_rows(one, *at, ids)])  # fmt: skip

    own, others = score(range(8)), score([3, 4, 5, 6, 7, 0, 1, 2])
    assert own["ap50"] > 90
    assert own["recall_10"] > 95
    assert others["ap50"] < own["ap50"] / 2


def test_eight_captions_are_learned_by_heart(tmp_path):
    model, _, source, items = learned(tmp_path, "grounding", top=24, threshold=0.0)
    batch = batch_of(items, range(8), source)
    assert model(batch)["align_loss"] < 0.15
    with torch.no_grad():
        at, spans = model.regions(batch["image"], batch["text"]), batch["text"]["spans"]
        scores = model.logits(at.cosine, spans).masked_fill(~at.valid[..., None], float("-inf"))
    best, hits = scores.argmax(1), []
    for i in range(8):
        for j in range(len(items[i][1].labels)):
            true = batch["boxes"][i][batch["owner"][i] == j]
            hits.append(float(iou(at.boxes[-1][i, best[i, j]][None], true).max()) >= 0.5)
    assert sum(hits) >= len(hits) - 1  # of 12 phrases


def test_a_killed_run_goes_on_as_if_nothing_had_happened(tmp_path):
    data = records()
    items, source = class_items(data, range(8), prompts(NAMES, WORDS), NAMES), Painted(data)
    plan, start = Plan(epochs=3, batch_size=4, lr=1e-3), slan()

    class Killed(Exception):
        pass

    def train(out, stop=None):
        torch.manual_seed(7)
        model = Localizer(copy.deepcopy(start), LocalizationConfig())
        lines = []

        def echo(line):
            lines.append(line)
            if stop and len(lines) == stop:
                raise Killed

        fit(model, LabelledBoxes(source, items), plan, out, echo=echo)
        return model.state_dict()

    whole = train(tmp_path / "whole")
    with pytest.raises(Killed):
        train(tmp_path / "broken", stop=1)
    again = train(tmp_path / "broken")
    assert all(torch.equal(again[name], value) for name, value in whole.items())


def test_a_box_that_several_phrases_name_is_one_object():
    a, b = [0.1, 0.1, 0.5, 0.5], [0.2, 0.2, 0.6, 0.6]
    boxes, real = torch.tensor([[a, b, a, a, b], [a, a, b, b, b]]), torch.ones(2, 5, dtype=torch.bool)
    real[1, 0] = False  # padding has no copies
    assert repeated(boxes, real).tolist() == [
        [False, False, True, True, True],
        [False, False, False, True, True],
    ]


def test_collate_pads_texts_and_labels():
    one = label_text("a star", [(2, 6)], [0], WORDS)
    two = label_text("a star and a ring", [(0, 6), (11, 17)], [0, 1], WORDS)
    found = collate([one, two])
    assert found["mask"].sum(1).tolist() == [len(one.ids), len(two.ids)]
    assert found["spans"].shape[:2] == (2, 2)
    assert not found["spans"][0, 1].any()
    assert not (found["spans"] & ~found["mask"][:, None]).any()
