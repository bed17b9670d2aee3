"""SLAN's captioner: the future is not seen, padding and order change nothing, it learns eight captions."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from finematch.data.pairs import Pairs
from finematch.encoders import BertTower, causal_decoder, small_bert
from finematch.models.configs import CaptioningConfig, LocatorConfig, SLANConfig
from finematch.models.slan.captioning import Captioner
from finematch.models.slan.locator import SelfLocator
from finematch.models.slan.objective import SLAN
from finematch.models.slan.towers import CachedStages, Towers
from finematch.scenes.generator import TOKENIZER
from finematch.text import tokenise, word_level
from finematch.training import Plan, fit

WORDS = word_level(TOKENIZER)
COLOURS = ("red", "green", "blue", "yellow")
CAPTIONS = [f"a {COLOURS[i % 4]} star" + (" above a circle" if i % 2 else "") for i in range(8)]


class Painted:
    """Eight images, each with a colour: channel k of the maps is that of colour k."""

    def __init__(self, count=8):
        g = torch.Generator().manual_seed(0)
        self.maps = [0.1 * torch.randn(count, 6, side, side, generator=g) for side in (8, 4)]
        for m in self.maps:
            m[torch.arange(count), torch.arange(count) % 4] += 1.5

    def __len__(self):
        return len(self.maps[0])

    def batch(self, rows):
        return {f"map{i}": m[list(rows)] for i, m in enumerate(self.maps)}


PAIRS = Pairs(Painted(), tokenise(CAPTIONS, WORDS), np.arange(8))


def captioner(seed=0, levels=1, **options):
    torch.manual_seed(seed)
    config = LocatorConfig(
        width=16, heads=2, levels=levels, decoder_levels=2, pyramid=8, count=24, anchor=3.0, top=5, samples=2
    )
    text = BertTower(small_bert(len(WORDS), width=16, depth=2, heads=2))
    slan = SLAN(Towers(CachedStages((6, 6)), text, 16), SelfLocator((6, 6), config),
                SLANConfig(width=16, embed=0, queue=0, mlm_weight=0.0, region_word=0.0, reg_weight=0.0))  # fmt: skip
    model = Captioner(slan, WORDS, CaptioningConfig(**options))
    with torch.no_grad():  # enough for captions to differ between images before any training
        for weight in model.decoder.parameters():
            weight.mul_(3)
    return model.eval()


@pytest.fixture(scope="module")
def model():
    return captioner(beams=1, max_length=12)


def test_the_decoder_begins_with_the_text_towers_weights():
    torch.manual_seed(0)
    text = BertTower(small_bert(len(WORDS), width=16, depth=2, heads=2)).net
    mine, theirs = causal_decoder(text).bert.state_dict(), text.state_dict()
    assert all(torch.equal(mine[name], value) for name, value in theirs.items())
    assert {name.split(".")[3] for name in mine.keys() - theirs.keys()} == {"crossattention"}


@pytest.mark.parametrize("place", [5, 6, 7])
def test_no_token_sees_a_later_one(model, place):
    """Another token t + 1: the logits up to t are the same, those after it are not."""
    batch = PAIRS.__getitems__([1, 3])
    ids, mask = model.with_prompt(batch["text"])
    at = model.locate(batch["image"])
    other = ids.clone()
    other[:, place] = WORDS.convert_tokens_to_ids("triangle")
    with torch.no_grad():
        one, two = model.read(at, ids, mask).logits, model.read(at, other, mask).logits
    assert torch.equal(one[:, :place], two[:, :place])
    assert not torch.allclose(one[:, place:], two[:, place:], atol=1e-4)


def test_the_regions_do_not_know_the_caption(model):
    """The loss of a caption's first word does not depend on the rest."""
    image = Painted().batch([0, 0])
    rest = tokenise(["a red star", "a blue circle"], WORDS).batch([0, 1])
    ids, mask = model.with_prompt(rest)
    with torch.no_grad():
        logits = model.read(model.locate(image), ids, mask).logits
    p = len(model.prompt)
    torch.testing.assert_close(logits[0, : p + 1], logits[1, : p + 1])


def test_padding_and_the_order_of_a_batch_change_nothing(model):
    order = [5, 0, 3, 2]
    with torch.no_grad():
        together = [model(PAIRS.__getitems__([i]))["loss"] for i in order]
        ids, mask = model.with_prompt(PAIRS.__getitems__(order)["text"])
        logits = model.read(model.locate(Painted().batch(order)), ids, mask).logits
    p = len(model.prompt)
    for row, alone in enumerate(together):
        target = ids[row, p:][mask[row, p:]]
        loss = torch.nn.functional.cross_entropy(logits[row, p - 1 : p - 1 + len(target)], target)
        torch.testing.assert_close(loss, alone, atol=1e-5, rtol=1e-5)
    written = model.generate(Painted().batch(range(8)))[0]
    assert [model.generate(Painted().batch([i]))[0][0] for i in order] == [written[i] for i in order]


def test_the_loss_by_hand(model):
    """Mean over the words after the prompt, and [SEP], of -log p; the prompt's own words do not count."""
    batch = PAIRS.__getitems__([0, 1])
    with torch.no_grad():
        loss = model(batch)["loss"]
        ids, mask = model.with_prompt(batch["text"])
        logits = model.read(model.locate(batch["image"]), ids, mask).logits.log_softmax(-1)
    each = [
        -logits[b, n - 1, ids[b, n]]
        for b in range(2)
        for n in range(len(model.prompt), ids.shape[1])
        if mask[b, n]
    ]
    assert WORDS.decode(model.prompt) == "[CLS] a picture of"
    torch.testing.assert_close(loss, torch.stack(each).mean())


def test_one_beam_is_the_greedy_search(model):
    """The likeliest token at each step; [SEP] not before `min_length`, nothing after `max_length`."""
    image = Painted().batch(range(8))
    _, written, at = model.generate(image)
    ids = model.prompt.expand(8, -1)
    with torch.no_grad():
        while ids.shape[1] < written.shape[1]:
            logits = model.read(at, ids, torch.ones_like(ids, dtype=torch.bool)).logits[:, -1]
            if ids.shape[1] < model.config.min_length:
                logits[:, WORDS.sep_token_id] = -torch.inf
            ids = torch.cat([ids, logits.argmax(1)[:, None]], 1)
    assert written.shape[1] <= 12
    for mine, theirs in zip(ids.tolist(), written.tolist(), strict=True):
        end = mine.index(WORDS.sep_token_id) if WORDS.sep_token_id in mine else len(mine)
        assert mine[:end] == theirs[:end]


def test_more_beams_find_what_is_at_least_as_likely():
    """Log-likelihood a token, by which beam search chooses (length penalty 1)."""
    model = captioner(beams=1, max_length=10)
    image = Painted().batch(range(8))
    found = []
    for beams in (1, 5):
        object.__setattr__(model.config, "beams", beams)
        _, ids, at = model.generate(image)
        real = ids != WORDS.pad_token_id
        with torch.no_grad():
            each = (
                model.read(at, ids, real)
                .logits.log_softmax(-1)[:, :-1]
                .gather(2, ids[:, 1:, None])
                .squeeze(2)
            )
        p = len(model.prompt)
        counted = real[:, p:]
        found.append(((each[:, p - 1 :] * counted).sum(1) / counted.sum(1)).mean())
    assert found[1] >= found[0] - 1e-6


def test_the_gradient_reaches_the_regions_and_every_part():
    model = captioner().train()
    at = model.locate(Painted().batch([0, 1]))
    at.regions.retain_grad()
    ids, mask = model.with_prompt(PAIRS.__getitems__([0, 1])["text"])
    model.read(at, ids, mask).logits[:, -1].square().sum().backward()
    assert (at.regions.grad.abs().sum(-1)[at.valid] > 0).all()
    for part in (
        model.towers.image_encoder,
        model.locator.embed,
        model.decoder.bert.encoder.layer[0].crossattention,
    ):
        grads = [p.grad for p in part.parameters() if p.grad is not None]
        assert not list(part.parameters()) or any(g.abs().sum() > 0 for g in grads)


def test_the_text_of_the_locator_is_a_switch():
    """Both values: the prompt's words, or none, steer the regions."""
    image = Painted().batch([0, 1])
    one, two = captioner(locator_text="prompt"), captioner(locator_text="none")
    assert [len(m.asked) for m in (one, two)] == [5, 2]
    with torch.no_grad():
        assert not torch.allclose(one.locate(image).regions, two.locate(image).regions, atol=1e-4)
        assert torch.isfinite(two.locate(image).regions).all()


def test_eight_captions_are_learned_and_said_again():
    model = captioner(smoothing=0.0)
    torch.manual_seed(0)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    batch = PAIRS.__getitems__([*range(8)])
    model.train()
    for _ in range(150):
        optimizer.zero_grad()
        loss = model(batch)["loss"]
        loss.backward()
        optimizer.step()
        if loss < 0.03:
            break
    assert loss < 0.05
    said = model.eval().generate(batch["image"])[0]
    assert said == CAPTIONS
    weights = model.attention(model.locate(batch["image"]), *model.with_prompt(batch["text"]))
    assert weights.shape[::2] == (8, 5)
    assert (weights >= 0).all()
    assert (weights.sum(-1) <= 1 + 1e-5).all()


def test_training_goes_on_exactly_where_it_was_stopped(tmp_path):
    plan = Plan(epochs=2, batch_size=4, lr=1e-3, precision="no")
    whole = captioner()
    fit(whole, PAIRS, plan, tmp_path / "whole", echo=None)
    calls = 0

    def stop(model):
        nonlocal calls
        calls += 1
        if calls == 2:
            raise KeyboardInterrupt
        return {"x": 0.0}

    with pytest.raises(KeyboardInterrupt):
        fit(captioner(), PAIRS, plan, tmp_path / "cut", evaluate=stop, select="x", echo=None)
    cut = captioner()
    fit(cut, PAIRS, plan, tmp_path / "cut", evaluate=lambda m: {"x": float(len(list((tmp_path / "cut").iterdir())))},
        select="epoch", echo=None)  # fmt: skip
    for (name, one), other in zip(whole.state_dict().items(), cut.state_dict().values(), strict=True):
        assert torch.equal(one, other), name
