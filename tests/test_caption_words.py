"""The backbone that has read captions: its loss by hand, its targets, and that it learns words from pictures."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from finematch.data import Record
from finematch.encoders import Cells
from finematch.features.word_net import (
    MINI_VITS,
    PictureWords,
    WordNet,
    caption_backbone,
    log_mean_exp,
    picture_words,
)
from finematch.scenes.generator import TOKENIZER
from finematch.text import tokenise, word_level
from finematch.training import Plan


def test_a_picture_holds_a_word_where_a_cell_does():
    logits = torch.tensor([[[[0.0, 0.0], [0.0, 6.0]], [[1.0, 1.0], [1.0, 1.0]]]])
    soft = log_mean_exp(logits, 3.0)
    assert soft[0, 0] == pytest.approx(math.log((3 + math.exp(18)) / 4) / 3, rel=1e-6)
    assert soft[0, 1] == pytest.approx(1.0, abs=1e-6)  # of equal cells it is their value
    assert log_mean_exp(logits, 1e-3)[0, 0] == pytest.approx(1.5, abs=0.02)  # their mean
    assert log_mean_exp(logits, 300.0)[0, 0] == pytest.approx(6.0, abs=0.02)  # their maximum


def test_the_loss_is_the_naive_one_and_starts_at_the_words_frequencies():
    torch.manual_seed(0)
    frequency = torch.tensor([0.9, 0.25, 0.0])
    model = WordNet(Cells("resnet18", stage=2, mean=0.5, sd=0.25), frequency).eval()
    assert torch.sigmoid(model.head.bias).tolist() == pytest.approx([0.9, 0.25, 0.001], abs=1e-6)
    batch = {
        "pixels": torch.rand(2, 3, 64, 64),
        "words": torch.tensor([[True, False, True], [False, True, False]]),
    }
    cells = model.head(model.cells(batch["pixels"]))
    total = 0.0
    for i in range(2):
        for v in range(3):
            flat = [3 * float(x) for x in cells[i, v].flatten()]
            logit = (math.log(sum(math.exp(x) for x in flat)) - math.log(len(flat))) / 3
            p = 1 / (1 + math.exp(-logit))
            total -= math.log(p if batch["words"][i, v] else 1 - p)
    assert float(model(batch)["loss"]) == pytest.approx(total / 2, rel=1e-5)


def test_the_words_of_a_picture_are_those_of_all_its_captions():
    tokenizer = word_level(TOKENIZER)
    captions = (("a red ball", "a star"), ("a blue ball",))
    records = [_record(i, texts) for i, texts in enumerate(captions)]
    ragged = tokenise([c for texts in captions for c in texts], tokenizer)
    found = picture_words(records, ragged, len(tokenizer))
    for row, texts in zip(found, captions, strict=True):
        words = {tokenizer.convert_ids_to_tokens(int(k)) for k in row.nonzero()[:, 0]}
        assert words - set(tokenizer.all_special_tokens) == {w for c in texts for w in c.split()}
    data = PictureWords(torch.full((2, 3, 4, 4), 255, dtype=torch.uint8), found)
    batch = data.__getitems__([1])
    assert torch.equal(batch["words"], found[1:])
    assert batch["pixels"].unique().tolist() == [1.0]


def _record(i: int, captions: tuple[str, ...]) -> Record:
    return Record(str(i), "train", captions)


@pytest.mark.parametrize("name", ["resnet18", *MINI_VITS])
def test_it_learns_which_pictures_are_red_from_captions_alone(tmp_path, name):
    """Two kinds of pictures and of captions; after a few epochs its cells tell the kinds apart."""
    rng = np.random.default_rng(0)
    tokenizer = word_level(TOKENIZER)
    hues, names = ((220, 30, 30), (30, 30, 220)), ("red", "blue")

    def side(count: int, split: str):
        records = []
        for i in range(count):
            pixels = rng.integers(90, 160, (64, 64, 3)).astype(np.uint8)
            y, x = rng.integers(4, 44, 2)
            pixels[y : y + 16, x : x + 16] = hues[i % 2]
            file = tmp_path / f"{split}{i}.png"
            Image.fromarray(pixels).save(file)
            records.append(replace(_record(i, (f"a {names[i % 2]} square",)), image=file, split=split))
        return records, lambda: tokenise([r.captions[0] for r in records], tokenizer)

    train, val = side(48, "train"), side(16, "val")
    plan = Plan(epochs=6, batch_size=8, lr=2e-3, weight_decay=0.02, warmup=0.1)
    net = caption_backbone(tmp_path / "run", train, val, len(tokenizer), plan, name=name, echo=None)
    assert net.key["trained_on"] == "words of the train captions"
    assert not any(p.requires_grad for p in net.net.parameters())
    maps = net([r.open() for r in val[0]]).flatten(2).amax(2)
    kind = torch.arange(16) % 2
    centre = torch.stack([maps[kind == k].mean(0) for k in (0, 1)])
    assert ((torch.cdist(maps, centre).argmin(1)) == kind).all()
    assert net.net.stage == (2 if name == "resnet18" else -1)
    again = caption_backbone(tmp_path / "run", train, val, len(tokenizer), plan, name=name, echo=None)
    assert again.key == net.key, "a finished run is opened, not repeated"
