"""SLAN's heads for questions, image pairs and videos: loops, padding, order, and that each learns eight examples."""

from __future__ import annotations

import copy
import itertools
from pathlib import Path

import numpy as np
import pytest
import torch

from finematch.data.record import Clip, ImagePair, Question
from finematch.data.video import frame_numbers
from finematch.encoders import BertTower, small_bert
from finematch.evaluation.vqa import accuracy, normalise
from finematch.models.configs import AnsweringConfig, LocatorConfig, SLANConfig, VideoConfig
from finematch.models.slan.locator import SelfLocator
from finematch.models.slan.nlvr2 import ImagePairs, PairClassifier
from finematch.models.slan.objective import SLAN
from finematch.models.slan.towers import CachedStages, Towers
from finematch.models.slan.video import (
    ClipPairs,
    VideoSLAN,
    encode_video,
    match_video,
    rows_of,
    video_pair_scorer,
)
from finematch.models.slan.vqa import Answerer, AskedImages, answer_list, answer_shares, spellings
from finematch.scenes.tasks import TOKENIZER
from finematch.text import tokenise, word_level
from finematch.training import Plan, fit

WORDS = word_level(TOKENIZER)
KNOWN = len(word_level(TOKENIZER.with_name("tokenizer.json")))
COLOURS = ("red", "green", "blue", "yellow")
M = 3


class Painted:
    """Eight images, each with a colour: channel k of the maps is that of colour k."""

    def __init__(self, count=8, seed=0):
        g = torch.Generator().manual_seed(seed)
        self.colour = torch.arange(count) % 4
        self.maps = [0.1 * torch.randn(count, 6, side, side, generator=g) for side in (8, 4)]
        for m in self.maps:
            m[torch.arange(count), self.colour] += 1.5

    def __len__(self):
        return len(self.colour)

    def batch(self, rows):
        return {f"map{i}": m[list(rows)] for i, m in enumerate(self.maps)}


def slan(seed=0, **options):
    torch.manual_seed(seed)
    settings = {"width": 16, "heads": 2, "levels": 1, "decoder_levels": 2, "pyramid": 8, "count": 24, "anchor": 3.0,
                "top": 5, "samples": 2, **options}  # fmt: skip
    text = BertTower(small_bert(KNOWN, width=16, depth=1, heads=2))
    text.grow(len(WORDS))
    towers, locator = Towers(CachedStages((6, 6)), text, 16), SelfLocator((6, 6), LocatorConfig(**settings))
    config = SLANConfig(width=16, embed=0, queue=0, mlm_weight=0.0, region_word=0.0, reg_weight=0.0)
    return SLAN(towers, locator, config)


def answered(text="what colour is the star?", answers=("red",) * 10, number=0):
    return Question(number, "train", text, str(number), Path("x"), tuple(answers), "what colour is", "other")


def asked(source):
    """Of each image its colour, and whether it is red."""
    questions = []
    for row, colour in enumerate(source.colour.tolist()):
        if row % 2:
            text, answer = "is there a red star in the picture?", "yes" if colour == 0 else "no"
        else:
            text, answer = "what colour is the star?", COLOURS[colour]
        questions.append(answered(text, [answer] * 8 + ["white"] * 2, row))
    return questions


def eval_(module):
    return module.eval()


def minimise(module, batch, steps=150, lr=0.01):
    """The loss after training on one batch. Its negatives are drawn: the rate falls to zero, and the median of several
    draws is taken, so that no single draw decides."""
    torch.manual_seed(0)
    optimiser = torch.optim.AdamW(
        [p for p in module.parameters() if p.requires_grad], lr=lr, weight_decay=0.0
    )
    rate = torch.optim.lr_scheduler.LinearLR(optimiser, 1.0, 0.0, steps)
    for _ in range(steps):
        optimiser.zero_grad()
        loss = module(batch)["loss"]
        loss.backward()
        optimiser.step()
        rate.step()
    with torch.no_grad():
        return torch.stack([module(batch)["loss"] for _ in range(5)]).median().item()


# --- words ----------------------------------------------------------------------------------------------------------
def test_new_words_come_after_those_that_the_tower_knows():
    torch.manual_seed(0)
    tower = BertTower(small_bert(KNOWN, width=16, depth=1, heads=2)).eval()
    before = copy.deepcopy(tower)
    tower.grow(len(WORDS))
    known = WORDS("a red star", return_tensors="pt")["input_ids"]
    mask = torch.ones_like(known).bool()
    assert torch.equal(tower(known, mask, ~mask).states, before(known, mask, ~mask).states)
    new = WORDS("what colour", return_tensors="pt")["input_ids"]
    assert int(new.max()) >= KNOWN
    assert tower(new, torch.ones_like(new).bool(), torch.zeros_like(new).bool()).states.isfinite().all()
    with pytest.raises(ValueError, match=r"knows \d+ words, more than the 7"):
        tower.grow(7)


# --- questions ------------------------------------------------------------------------------------------------------
def test_answers_count_by_the_people_who_gave_them():
    shares = answer_shares(answered(answers=["the red"] * 2 + ["red"] * 5 + ["blue", "a", "two"]))
    assert shares == {"red": 0.7, "blue": 0.1, "2": 0.1}  # "a" is nothing
    questions = [
        answered(),
        answered(answers=["blue"] * 10),
        answered(answers=["Blue"] * 10),
        answered(answers=()),
    ]
    assert answer_list(questions) == ["blue", "red"]
    assert answer_list(questions, 1) == ["blue"]


def test_an_answer_on_which_all_agree_can_be_won():
    """Where all people agree the evaluator compares letter by letter; where they do not, both sides are normalised."""
    agreed = [
        answered(answers=[one] * 10)
        for one in ("t-shirt", "none", "the end", "coca-cola", "t-shirt", "t shirt")
    ]
    listed, spelling = answer_list(agreed), spellings(agreed)
    assert listed == ["t-shirt", "none", "the end", "coca-cola"]
    for question in agreed[:4]:
        assert max(accuracy(answer, question.answers) for answer in listed) == 1
        assert accuracy(normalise(question.answers[0]), question.answers) == 0
        assert answer_shares(question, spelling) == {question.answers[0]: 1.0}
    assert answer_shares(agreed[5], spelling) == {"t-shirt": 1.0}
    assert accuracy("t-shirt", ["t shirt"] * 9 + ["shirt"]) == 1
    source = Painted()
    data = AskedImages(source, asked(source), range(8), WORDS, spelling={"red": "no"})
    assert WORDS.batch_decode(data[0]["answers"]["input_ids"], skip_special_tokens=True) == ["no", "white"]


def test_batches_of_questions():
    source = Painted()
    data = AskedImages(source, asked(source), range(8), WORDS)
    batch = data.__getitems__([4, 0])
    assert batch["owner"].tolist() == [0, 0, 1, 1]
    assert batch["share"].tolist() == pytest.approx([0.8, 0.2] * 2)
    assert WORDS.batch_decode(batch["answers"]["input_ids"], skip_special_tokens=True) == ["red", "white"] * 2
    assert torch.equal(batch["image"]["map0"], source.maps[0][[4, 0]])
    hidden = AskedImages(source, [answered(answers=())], [0], WORDS)[0]
    assert set(hidden) == {"image", "text"}
    with pytest.raises(ValueError, match="no answers"):
        Answerer(slan())(hidden)


@torch.no_grad()
def test_the_likelihood_is_that_of_a_loop():
    model, source = eval_(Answerer(slan())), Painted()
    batch = AskedImages(source, asked(source), range(8), WORDS).__getitems__([0])
    states, valid = model.states(batch["image"], batch["text"])
    answers = tokenise(["red", "no", "two stars"], WORDS).batch([0, 1, 2])
    both = (states.expand(3, -1, -1), valid.expand(3, -1))
    found = model.likelihood(*both, answers["input_ids"], answers["mask"])
    for row in range(3):
        ids, total = answers["input_ids"][row][answers["mask"][row]].tolist(), 0.0
        for k in range(1, len(ids)):
            logits = model.logits(torch.tensor([ids[:k]]), states, valid)[0, -1]
            total += float(logits.log_softmax(0)[ids[k]])
        assert float(found[row]) == pytest.approx(total, abs=1e-4)


def test_questions_are_learned_then_ranked_and_generated():
    source = Painted()
    questions = asked(source)
    data = AskedImages(source, questions, range(8), WORDS)
    model, batch = Answerer(slan()), data.__getitems__(range(8))
    least = 0.5004  # entropy of 0.8 and 0.2: what disagreement leaves of the loss
    assert minimise(model, batch) < least + 0.05
    model.eval()
    wanted = [max(answer_shares(q), key=answer_shares(q).get) for q in questions]
    answers = [*COLOURS, "yes", "no", "white", "two stars"]
    listed = tokenise(answers, WORDS)
    ranked = [answers[i] for i in model.rank(batch["image"], batch["text"], listed).tolist()]
    assert ranked == wanted
    assert model.generate(batch["image"], batch["text"], WORDS) == wanted
    for choose in ("rank", "generate"):
        model.config = AnsweringConfig(choose=choose)
        assert model.answer(batch["image"], batch["text"], answers, WORDS) == wanted
    few = [answers[i] for i in model.rank(batch["image"], batch["text"], listed, candidates=2).tolist()]
    assert few == wanted
    # neither the order of the questions nor padding by a longer one changes an answer
    order = [5, 2, 0]
    part = data.__getitems__(order)
    assert [answers[i] for i in model.rank(part["image"], part["text"], listed).tolist()] == [
        wanted[i] for i in order
    ]
    alone, whole = (
        model.states(*(data[2][k] for k in ("image", "text"))),
        model.states(batch["image"], batch["text"]),
    )
    assert torch.allclose(alone[0][0, 0], whole[0][2, 0], atol=1e-5)
    # with the images shuffled the answers are others
    shuffled = {name: value.roll(1, 0) for name, value in batch["image"].items()}
    again = [answers[i] for i in model.rank(shuffled, batch["text"], listed).tolist()]
    assert sum(a == b for a, b in zip(again, wanted, strict=True)) <= 5


# --- image pairs ----------------------------------------------------------------------------------------------------
def paired(source):
    """Whether exactly one of two images is red."""
    rows = list(itertools.product((0, 1, 4, 5), (0, 2)))
    red, text = (source.colour == 0).tolist(), "exactly one picture shows a red star ."
    pairs = [
        ImagePair(
            f"dev-0-{k}-0",
            "val",
            text,
            (Path("x"), Path("y")),
            red[a] != red[b],
        )
        for k, (a, b) in enumerate(rows)
    ]
    return ImagePairs(source, pairs, rows, WORDS), rows


def test_image_pairs_are_learned():
    source = Painted()
    data, rows = paired(source)
    model, batch = PairClassifier(slan(), 16, heads=2), data.__getitems__(range(8))
    assert torch.equal(batch["left"]["map0"], source.maps[0][[a for a, _ in rows]])
    assert batch["label"].sum() == 4
    assert minimise(model, batch) < 0.05
    model.eval()
    logits = model.logits(batch["left"], batch["right"], batch["text"])
    assert torch.equal(logits > 0, batch["label"].bool())
    part = data.__getitems__([6, 1])
    assert torch.allclose(model.logits(part["left"], part["right"], part["text"]), logits[[6, 1]], atol=1e-4)
    text = {name: torch.nn.functional.pad(value, (0, 3)) for name, value in part["text"].items()}
    assert torch.allclose(model.logits(part["left"], part["right"], text), logits[[6, 1]], atol=1e-4)


def test_a_pair_without_a_label_is_judged_and_not_learned_from():
    data = ImagePairs(
        Painted(), [ImagePair("t-0-0-0", "test", "a star", (Path("x"), Path("y")))], [(0, 1)], WORDS
    )
    model, batch = PairClassifier(slan(), 16), data[0]
    assert model.logits(batch["left"], batch["right"], batch["text"]).shape == (1,)
    with pytest.raises(ValueError, match="no label"):
        model(batch)


def test_the_sides_are_told_apart():
    data, _ = paired(Painted())
    model, batch = PairClassifier(slan(), 16).eval(), data.__getitems__(range(8))
    there = model.logits(batch["left"], batch["right"], batch["text"])
    back = model.logits(batch["right"], batch["left"], batch["text"])
    assert not torch.allclose(there, back)


# --- videos ---------------------------------------------------------------------------------------------------------
def filmed():
    source = Painted(4 * M)
    frames = source.batch([row for v in range(4) for row in [v] * M])
    texts = tokenise([f"a {colour} star" for colour in COLOURS], WORDS)
    return frames, texts


def test_a_video_is_the_mean_of_its_frames_and_all_their_regions():
    model, (frames, texts) = slan().eval(), filmed()
    picture, vector = encode_video(model, frames, M)
    for v in range(4):
        mean = picture.vector[v * M : v * M + M].mean(0)
        assert torch.allclose(vector[v], mean / mean.norm(), atol=1e-5)
    caption = model.encode_text(**texts.batch([0, 1, 2, 3]))
    scores = match_video(model, picture, caption, M)
    for v in range(4):
        at = [model.locate(picture[[row]], caption[[v]]) for row in range(v * M, v * M + M)]
        regions = torch.cat([one.regions[0][one.valid[0]] for one in at])
        logits = model.head(regions.mean(0)[None], torch.cat([one.text for one in at]).mean(0)[None])[0]
        assert scores[v].item() == pytest.approx((logits[1] - logits[0]).item(), abs=1e-4)


@pytest.mark.parametrize("fused", ["regions", "map"])
def test_one_frame_is_an_image(fused):
    model, (frames, texts) = slan(fused=fused).eval(), filmed()
    first = {name: value[::M] for name, value in frames.items()}
    caption = model.encode_text(**texts.batch([0, 1, 2, 3]))
    picture, vector = encode_video(model, first, 1)
    assert torch.allclose(vector, picture.vector)
    assert torch.allclose(match_video(model, picture, caption, 1), model.match(picture, caption), atol=1e-5)


def test_the_order_of_frames_and_the_size_of_blocks_change_nothing():
    model, (frames, texts) = slan().eval(), filmed()
    caption = model.encode_text(**texts.batch([0, 1, 2, 3]))
    turned = {name: value.unflatten(0, (4, M)).flip(1).flatten(0, 1) for name, value in frames.items()}
    scores = [match_video(model, encode_video(model, these, M)[0], caption, M) for these in (frames, turned)]
    assert torch.allclose(*scores, atol=1e-5)

    def some(rows):
        where = rows_of(torch.tensor(rows), M)
        return {name: value[where] for name, value in frames.items()}

    i, j = (part.flatten() for part in torch.meshgrid(torch.arange(4), torch.arange(4), indexing="ij"))
    tables = [
        video_pair_scorer(model, some, texts.batch, M, block=block)(i, j).view(4, 4) for block in (2, 16)
    ]
    assert torch.allclose(*tables, atol=1e-5)
    assert torch.allclose(tables[0].diag(), scores[0], atol=1e-5)


def test_videos_are_learned():
    model, (frames, texts) = VideoSLAN(slan(), M), filmed()
    batch = {"image": frames, "text": texts.batch([0, 1, 2, 3]), "image_id": torch.arange(4)}
    assert minimise(model, batch) < 0.1
    bare = slan()
    bare.head = None
    assert set(VideoSLAN(bare, M)(batch)) == {"loss", "itc"}  # of a run without matching: the contrast alone
    picture, _ = encode_video(bare, frames, M)
    with pytest.raises(ValueError, match="no matching head"):
        match_video(bare, picture, bare.encode_text(**batch["text"]), M)


def test_pairs_of_clips_and_captions():
    source = Painted(4 * M)
    clips = [Clip(f"v{k}", "train", ("a red star", "a star")[: 1 + k % 2], Path("x")) for k in range(4)]
    data = ClipPairs(source, clips, WORDS, M)
    assert data.clip_of.tolist() == [0, 1, 1, 2, 3, 3]
    batch = data.__getitems__([2, 3])
    assert batch["image_id"].tolist() == [1, 2]
    assert torch.equal(batch["image"]["map0"], source.maps[0][M : 3 * M])
    assert WORDS.batch_decode(batch["text"]["input_ids"], skip_special_tokens=True) == [
        "a star",
        "a red star",
    ]


# --- where the heads look -------------------------------------------------------------------------------------------
def test_attention_is_that_of_the_layers_weights():
    source = Painted()
    answerer, batch = (
        Answerer(slan()).eval(),
        AskedImages(source, asked(source), range(8), WORDS).__getitems__([0, 3]),
    )
    seen = []
    layer = answerer.decoder.bert.encoder.layer[-1].crossattention.self
    layer.register_forward_hook(lambda _, __, output: seen.append(output[1]))
    at, looked = answerer.attention(batch["image"], batch["text"])
    words = batch["text"]["mask"].shape[1]
    assert torch.equal(looked, seen[0].mean(1)[:, 0, words:])
    shares = seen[0].mean(1)[:, 0]
    assert torch.allclose(shares.sum(1), torch.ones(2), atol=1e-5)
    assert (looked[~at.valid] == 0).all()
    assert ((looked.sum(1) > 0) & (looked.sum(1) < 1)).all()
    data, _ = paired(source)
    classifier, some = PairClassifier(slan(), 16).eval(), data.__getitems__([1, 4])
    looked, both = classifier.attention(some["left"], some["right"], some["text"])
    assert looked.shape == (2, 2 * both[0].valid.shape[1])
    assert torch.allclose(looked.sum(1), torch.ones(2), atol=1e-5)
    assert (looked[~torch.cat([one.valid for one in both], 1)] == 0).all()
    with torch.no_grad():
        words = classifier.towers.text(some["text"]["input_ids"], some["text"]["mask"])[:, :1]
        regions = torch.cat([one.regions + side for one, side in zip(both, classifier.sides, strict=True)], 1)
        valid = torch.cat([one.valid for one in both], 1)
        whole = classifier.norm(
            words + classifier.attend(words, regions, regions, key_padding_mask=~valid)[0]
        )[:, 0]
        tokens = [both[0].picture, both[0].text, both[1].picture, both[1].text]
        by_hand = classifier.classify(torch.cat([whole, *tokens], 1))[:, 0]
    assert torch.allclose(by_hand, classifier.logits(some["left"], some["right"], some["text"]), atol=1e-5)


def test_frames_by_the_settings():
    for config, wanted in (
        (VideoConfig(frames=4), [0, 10, 20, 30]),
        (VideoConfig(frames=40), list(range(40))),
    ):
        assert frame_numbers(40, config.frames, how=config.sample) == wanted
    drawn = frame_numbers(40, 4, how=VideoConfig(sample="random").sample, name="video1")
    assert drawn != [0, 10, 20, 30]


# --- training -------------------------------------------------------------------------------------------------------
class Stop(Exception):
    pass


@pytest.mark.parametrize("task", ["vqa", "nlvr2"])
def test_a_run_that_was_stopped_goes_on_as_if_it_had_not(tmp_path, task):
    source = Painted()

    def begin():
        if task == "vqa":
            return Answerer(slan()), AskedImages(source, asked(source), range(8), WORDS)
        return PairClassifier(slan(), 16), paired(source)[0]

    plan = Plan(epochs=3, batch_size=4, lr=1e-3)
    whole, data = begin()
    fit(whole, data, plan, tmp_path / "whole", select="epoch", echo=None)
    stopped, data = begin()
    epochs = itertools.count()

    def stop(model):
        if next(epochs) == 1:
            raise Stop
        return {}

    with pytest.raises(Stop):
        fit(stopped, data, plan, tmp_path / "cut", select="epoch", evaluate=stop, echo=None)
    again, data = begin()
    fit(again, data, plan, tmp_path / "cut", select="epoch", echo=None)
    for one, two in zip(whole.state_dict().values(), again.state_dict().values(), strict=True):
        assert np.array_equal(one.numpy(), two.numpy())
