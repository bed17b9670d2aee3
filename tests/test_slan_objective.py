"""SLAN's objectives against the paper: equations in loops, queues and momentum, draws, gradients, two processes.

Towers and locator are small real ones; `torchrun test_slan_objective.py OUT` trains them in two processes.
"""

import copy
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn

from finematch.checkpoints import unique_state
from finematch.config import Settings
from finematch.files import DataError
from finematch.losses import contrastive
from finematch.models.configs import LocatorConfig, SLANConfig
from finematch.models.slan.contrast import (
    NOBODY,
    Keys,
    Momentum,
    Queue,
    Temperature,
    itc,
    region_word,
    region_word_scores,
)
from finematch.models.slan.matching import (
    MaskedWordHead,
    MatchingHead,
    Words,
    hard_negatives,
    itm,
    mask_words,
    mlm,
)
from finematch.models.slan.objective import SLAN, Unimodal, pair_scorer
from finematch.training import Plan, fit, seed_everything

WORDS = Words(size=20, mask=3, special=(0, 1, 2, 3, 4))  # pad, cls, sep, mask, unk


class TinyTowers(nn.Module):
    """Two strided convolutions as two levels of maps; an embedding and one Transformer layer."""

    def __init__(self, width=8, norm=False, dropout=0.0):
        super().__init__()
        self.one, self.two = nn.Conv2d(3, width, 4, 4), nn.Conv2d(width, width, 2, 2)
        self.norm = nn.BatchNorm2d(width) if norm else nn.Identity()
        self.embed, self.place = nn.Embedding(WORDS.size, width), nn.Embedding(16, width)
        self.layer = nn.TransformerEncoderLayer(width, 2, 16, dropout, batch_first=True)

    def vision(self, pixels):
        one = torch.tanh(self.norm(self.one(pixels)))
        return [one, torch.tanh(self.two(one))]

    def pooled(self, maps):
        return maps[-1].mean((2, 3))

    def text(self, input_ids, mask):
        x = self.embed(input_ids) + self.place.weight[: input_ids.shape[1]]
        return self.layer(x, src_key_padding_mask=~mask)


class TinyLocated(NamedTuple):
    boxes: torch.Tensor
    scores: torch.Tensor
    valid: torch.Tensor
    regions: torch.Tensor
    words: torch.Tensor
    picture: torch.Tensor
    text: torch.Tensor
    reg_loss: torch.Tensor


class Cells(NamedTuple):
    states: torch.Tensor
    centre: torch.Tensor

    def __getitem__(self, index):
        return Cells(*(part[index] for part in self))


class TinyLocator(nn.Module):
    """Every cell of the last map is a region; words and regions attend to each other; words move the boxes."""

    def __init__(self, width=8, token="map"):
        super().__init__()
        self.token = token
        self.score, self.size = nn.Linear(width, 1), nn.Linear(width, 2)
        self.to_words, self.to_regions = nn.Linear(width, width), nn.Linear(width, width)

    def prepare(self, features, pixels, given=None):
        h, w = features[-1].shape[-2:]
        y, x = torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij")
        centre = (torch.stack([x, y], -1).flatten(0, 1) + 0.5) / torch.tensor([w, h])
        states = features[-1].flatten(2).mT
        return Cells(states, centre.to(states).expand(len(states), -1, -1))

    def visual_token(self, pictures, pooled):
        return (
            pooled
            if self.token == "map"
            else (pictures.states * self.score(pictures.states).sigmoid()).mean(1)
        )

    def fixed_regions(self, pictures):
        return [pictures.states], torch.ones(pictures.states.shape[:2], dtype=torch.bool)

    def counted(self, mask, special):
        return mask & ~special

    def locate(self, pictures, words, mask, special):
        cells, centre = pictures.states, pictures.centre
        attention = cells @ words.mT / math.sqrt(cells.shape[-1])
        seen = attention.masked_fill(~(mask & ~special)[:, None], float("-inf")).softmax(-1) @ words
        read = attention.softmax(1).mT @ cells
        regions, texts = cells + torch.tanh(self.to_regions(seen)), words + torch.tanh(self.to_words(read))
        texts = texts * mask[..., None]
        first = torch.cat([centre, self.size(cells).sigmoid()], -1)
        last = torch.cat([centre + 0.1 * torch.tanh(regions[..., :2]), first[..., 2:]], -1)
        loss = (first - last.detach()).abs().sum((1, 2))
        scores = self.score(cells).squeeze(-1).sigmoid()
        picture = (regions * scores[..., None]).mean(1)
        return TinyLocated(torch.stack([first, last]), scores, torch.ones_like(scores, dtype=torch.bool),
                           regions, texts, picture, texts[:, 0], loss)  # fmt: skip


def configured(options: dict) -> dict:
    """Arguments of SLAN from settings by name; `weights` holds those of the terms."""
    options = {"width": 8, "words": WORDS, "embed": 6, "queue": 12, "region_word": 0.0, **options}
    beside = {name: options.pop(name) for name in ("words", "tied", "random_steps") if name in options}
    weights = {f"{name}_weight": float(value) for name, value in options.pop("weights", {}).items()}
    return {"config": SLANConfig(**options, **weights), **beside}


def tiny(seed=0, norm=False, dropout=0.0, token="map", **options):
    torch.manual_seed(seed)
    return SLAN(TinyTowers(norm=norm, dropout=dropout), TinyLocator(token=token), **configured(options))


def pairs(b=4, n=7, seed=1, ids=None):
    g = torch.Generator().manual_seed(seed)
    length = torch.randint(4, n + 1, (b,), generator=g)
    length[0] = n
    mask = torch.arange(n)[None] < length[:, None]
    special = torch.zeros_like(mask)
    special[:, 0] = special[torch.arange(b), length - 1] = True
    input_ids = torch.randint(5, WORDS.size, (b, n), generator=g)
    input_ids[:, 0], input_ids[torch.arange(b), length - 1] = 1, 2
    return {
        "image": {"pixels": torch.randn(b, 3, 16, 16, generator=g)},
        "text": {"input_ids": input_ids * mask, "mask": mask, "special": special},
        "image_id": torch.arange(b) if ids is None else torch.tensor(ids),
    }


def taken(batch, index):
    return {k: taken(v, index) if isinstance(v, dict) else v[index] for k, v in batch.items()}


def vectors(*shape, seed=0):
    return F.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).double(), dim=-1)


def key_set(b=3, q=4, ids=(7, 8, 7), old=(8, 5, 9, 7), seed=0):
    """Three pairs and a queue of four: online vectors, and keys that are others' (momentum encoders')."""
    image, text = vectors(b, 5, seed=seed), vectors(b, 5, seed=seed + 1)
    keys = Keys(
        vectors(b + q, 5, seed=seed + 2), vectors(b + q, 5, seed=seed + 3), torch.tensor([*ids, *old[:q]])
    )
    return image, text, torch.tensor(ids), keys


# ------------------------------------------------------------------------------------------- Eq. 5-6
@pytest.mark.parametrize("same_picture", [True, False])
@pytest.mark.parametrize("distil", [0.0, 0.4])
@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_itc_is_eq_5_and_6_in_loops(same_picture, distil, reduction):
    image, text, ids, keys = key_set()
    tau, rows = 0.3, 3
    total = 0.0
    for query, teacher, other in ((image, keys.image, keys.text), (text, keys.text, keys.image)):
        for i in range(rows):
            weights = [math.exp(float(query[i] @ other[j]) / tau) for j in range(7)]
            soft = [math.exp(float(teacher[i] @ other[j]) / tau) for j in range(7)]
            right = [float(keys.image_id[j] == ids[i]) if same_picture else float(j == i) for j in range(7)]
            for j in range(7):
                goal = distil * soft[j] / sum(soft) + (1 - distil) * right[j] / sum(right)
                total -= goal * math.log(weights[j] / sum(weights)) / rows
    found = itc(
        image, text, ids, keys, 1 / tau, same_picture=same_picture, distil=distil, reduction=reduction
    )
    assert float(found) == pytest.approx(total if reduction == "sum" else total / 2, rel=1e-9)


def test_itc_by_hand():
    """Own pair at cosine 1, one key of the queue at 0: -log(e^s / (e^s + 1)) each way."""
    eye = torch.eye(2)
    keys = Keys(eye, eye, torch.tensor([4, 5]))
    found = itc(eye[:1], eye[:1], torch.tensor([4]), keys, 3.0)
    assert float(found) == pytest.approx(2 * math.log1p(math.exp(-3)), rel=1e-6)


@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_itc_without_a_queue_is_the_loss_in_the_batch(reduction):
    image, text, ids = vectors(5, 4).float(), vectors(5, 4, seed=1).float(), torch.tensor([1, 2, 1, 3, 4])
    keys = Keys(image, text, ids)
    expected = contrastive(image, text, 5.0, image_id=ids, reduction=reduction)
    torch.testing.assert_close(itc(image, text, ids, keys, 5.0, reduction=reduction), expected)


def test_itc_gradients_are_finite_differences():
    image, text, ids, keys = key_set()
    scale = torch.tensor(3.0).double().requires_grad_()
    both = (image.requires_grad_(), text.requires_grad_())
    for options in ({}, {"same_picture": False}, {"reduction": "mean"}):
        assert torch.autograd.gradcheck(
            lambda i, t, s, o=options: itc(i, t, ids, keys, s, **o), (*both, scale)
        )
    # the teacher's target is a constant, although tau is in it
    assert torch.autograd.gradcheck(lambda i, t: itc(i, t, ids, keys, 3.0, distil=0.4), both)


def test_gradients_reach_the_keys_of_a_batch_without_momentum():
    image, text, ids, _ = key_set()
    inputs = (image.requires_grad_(), text.requires_grad_())
    assert torch.autograd.gradcheck(lambda i, t: itc(i, t, ids, Keys(i, t, ids), 3.0), inputs)


def test_itc_refuses():
    image, text, ids, keys = key_set()
    with pytest.raises(ValueError, match="reduction"):
        itc(image, text, ids, keys, 1.0, reduction="half")
    with pytest.raises(ValueError, match="distil"):
        itc(image, text, ids, keys, 1.0, distil=1.0)
    with pytest.raises(ValueError, match="own pairs"):
        itc(image, text, ids, keys, 1.0, first=1)  # shifted by a row
    with pytest.raises(ValueError, match="own pairs"):
        itc(image, text, ids, keys, 1.0, first=5)


def test_itc_is_computed_in_single_precision_under_autocast():
    image, text, ids, keys = key_set()
    image, text, keys = (
        image.float(),
        text.float(),
        Keys(keys.image.float(), keys.text.float(), keys.image_id),
    )
    plain = itc(image, text, ids, keys, 30.0)
    with torch.autocast("cpu", torch.bfloat16):
        assert itc(image, text, ids, keys, 30.0) == plain


def test_temperature():
    tau = Temperature(0.07)
    assert tau().item() == pytest.approx(1 / 0.07, rel=1e-6)
    for wild, kept in ((9.0, 0.5), (-1.0, 0.001)):
        tau.tau.data.fill_(wild)
        assert tau().item() == pytest.approx(1 / kept, rel=1e-6)
    tau().backward()
    assert tau.tau.grad.item() < 0  # clamped, and still free to move
    assert not Temperature(learnable=False).tau.requires_grad
    with pytest.raises(ValueError, match="tau"):
        Temperature(0.6)


# ------------------------------------------------------------------------------------------- queues
def test_a_queue_is_a_ring_that_starts_empty():
    queue = Queue(6, 5)
    assert len(queue.keys().image) == 0
    batches = [(vectors(2, 5, seed=s).float(), vectors(2, 5, seed=s + 9).float(), torch.tensor([2 * s, 2 * s + 1]))
               for s in range(5)]  # fmt: skip
    for batch in batches[:2]:
        queue.enqueue(*batch)
    keys = queue.keys()
    assert keys.image_id.tolist() == [0, 1, 2, 3]
    torch.testing.assert_close(keys.image, torch.cat([batches[0][0], batches[1][0]]))
    torch.testing.assert_close(keys.text, torch.cat([batches[0][1], batches[1][1]]))
    for batch in batches[2:]:
        queue.enqueue(*batch)
    assert queue.keys().image_id.tolist() == [6, 7, 8, 9, 4, 5]  # 0 to 3 are the oldest: overwritten
    torch.testing.assert_close(queue.keys().text[:2], batches[3][1])
    other = Queue(6, 5)
    other.load_state_dict(queue.state_dict())
    other.enqueue(*batches[0])
    assert other.keys().image_id.tolist() == [6, 7, 8, 9, 0, 1]
    queue.clear()
    assert len(queue.keys().image_id) == 0
    assert (queue.image_id == NOBODY).all()


def test_a_batch_may_go_round_the_end_of_a_queue():
    """Five places, batches of two, three and five: always the latest five pairs, in a ring as in a list."""
    queue, seen = Queue(5, 3), []
    for step, size in enumerate((2, 2, 3, 5, 2, 1, 3, 3)):
        image, text = (vectors(size, 3, seed=2 * step + i).float() for i in range(2))
        image_id = 10 * step + torch.arange(size)
        queue.enqueue(image, text, image_id)
        seen += zip(image_id.tolist(), image, text, strict=True)
        latest = {name: both for name, *both in seen[-5:]}
        keys = queue.keys()
        assert set(keys.image_id.tolist()) == set(latest)
        for row, name in enumerate(keys.image_id.tolist()):
            assert torch.equal(torch.stack([keys.image[row], keys.text[row]]), torch.stack(latest[name]))


def test_a_queue_refuses():
    with pytest.raises(ValueError, match="queue = 0"):
        Queue(0, 4)
    queue = Queue(10, 4)
    with pytest.raises(ValueError, match=r"queue = 10 has no room for the whole batch of 12 .* use queue=12"):
        queue.enqueue(torch.zeros(12, 4), torch.zeros(12, 4), torch.arange(12))
    with pytest.raises(ValueError, match="image_id -1 is negative"):
        queue.enqueue(torch.zeros(2, 4), torch.zeros(2, 4), torch.tensor([3, -1]))
    model = tiny(queue=3).train()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match="no room"):
        model(pairs(4))
    for name, value in model.state_dict().items():  # refused before anything moved
        assert torch.equal(value, before[name]), name


# ------------------------------------------------------------------------------------------- momentum
def test_momentum_encoders_follow_slowly_and_without_gradient():
    model = tiny(norm=True, dropout=0.5, momentum=0.9).train()
    momentum, encoders = model.momentum, model.encoders
    modules = {"encoders": encoders}
    assert not any(p.requires_grad for p in momentum.parameters())
    assert not any(m.training for m in momentum.copies["encoders"].modules())
    assert momentum.training
    start = copy.deepcopy(dict(momentum.copies["encoders"].named_parameters()))
    with torch.no_grad():
        for p in encoders.parameters():
            p.add_(1.0)
        encoders.towers.norm.running_mean.fill_(0.25)
    momentum.update(modules)
    for name, p in momentum.copies["encoders"].named_parameters():
        torch.testing.assert_close(p, start[name] + 0.1)
    assert (momentum.copies["encoders"].towers.norm.running_mean == 0.25).all()
    momentum.reset(modules)
    for mine, theirs in zip(momentum.copies["encoders"].parameters(), encoders.parameters(), strict=True):
        assert torch.equal(mine, theirs)
    for wrong in (0.0, 1.0):
        with pytest.raises(ValueError, match="momentum"):
            Momentum(modules, wrong)


def test_what_is_made_and_what_is_not():
    bare, batch = tiny(embed=0).eval(), pairs(4)
    picture = bare.encode_image(**batch["image"])
    last = bare.encoders.towers.vision(batch["image"]["pixels"])[-1]
    torch.testing.assert_close(picture.vector, F.normalize(last.mean((2, 3)), dim=-1))
    caption = bare.encode_text(**batch["text"])
    torch.testing.assert_close(caption.vector, F.normalize(caption.words[:, 0], dim=-1))
    assert tiny(queue=0).momentum is None
    assert tiny(queue=0).queue is None
    assert tiny(queue=0, distil=0.4).momentum is not None
    assert tiny(queue=12, momentum=0.0).momentum is None
    assert tiny(weights={"itc": 0}).queue is None
    with pytest.raises(ValueError, match="distil needs momentum"):
        tiny(distil=0.4, momentum=0.0)


# ------------------------------------------------------------------------------------------- Eq. 4
def test_hard_negatives_are_never_of_the_same_picture_and_drawn_by_similarity():
    ids = torch.tensor([1, 2, 1, 3])
    similarity = torch.tensor([[9.0, 0, 9, 1], [2, 9, 0, 1], [9, 1, 9, 1], [0, 0, 0, 9]])
    g = torch.Generator().manual_seed(0)
    draws = [hard_negatives(similarity, ids, generator=g) for _ in range(4000)]
    for axis, table in enumerate((similarity, similarity.T)):
        drawn = torch.stack([d[axis] for d in draws])
        for row in range(4):
            share = torch.bincount(drawn[:, row], minlength=4) / 4000
            weight = table[row].exp() * (ids != ids[row])
            assert not share[ids == ids[row]].any()
            torch.testing.assert_close(share, weight / weight.sum(), atol=0.03, rtol=0)


def test_a_batch_without_negatives_is_named():
    with pytest.raises(ValueError, match=r"pair 0 \(picture 5\) has no negative.*all 3 pairs.*batch_size"):
        hard_negatives(torch.zeros(3, 3), torch.tensor([5, 5, 5]))
    model = tiny().train()
    with pytest.raises(ValueError, match="has no negative"):
        model(pairs(4, ids=[7, 7, 7, 7]))


def test_itm_is_eq_4_in_loops():
    torch.manual_seed(0)
    head = MatchingHead(3).double()
    picture, text, matched = torch.randn(4, 3).double(), torch.randn(4, 3).double(), [1, 0, 0, 1]
    total = 0.0
    for i in range(4):
        z = (head.weight @ torch.cat([picture[i], text[i]]) + head.bias).tolist()
        total -= math.log(math.exp(z[matched[i]]) / (math.exp(z[0]) + math.exp(z[1]))) / 4
    found = itm(head(picture, text), torch.tensor(matched).bool()).item()
    assert found == pytest.approx(total, rel=1e-9)
    inputs = (picture.requires_grad_(), text.requires_grad_())
    assert torch.autograd.gradcheck(lambda p, t: itm(head(p, t), torch.tensor(matched).bool()), inputs)


# ------------------------------------------------------------------------------------------- Eq. 7
def test_words_are_hidden_15_percent_80_10_10_and_never_specials_or_padding():
    g = torch.Generator().manual_seed(0)
    batch = pairs(2000, n=12, seed=3)["text"]
    ids, mask, special = batch["input_ids"].clone(), batch["mask"], batch["special"]
    ids[::7, 2] = 4  # unknown words are no words to predict, though no tokenizer calls them special in place
    hidden, chosen = mask_words(ids, mask, special, WORDS, generator=g)
    ordinary = mask & ~special & (ids != 4)
    assert not chosen[~ordinary].any()
    assert torch.equal(hidden[~chosen], ids[~chosen])
    assert float(chosen.sum() / ordinary.sum()) == pytest.approx(0.15, abs=0.01)
    became, was = hidden[chosen], ids[chosen]
    assert float((became == WORDS.mask).float().mean()) == pytest.approx(0.8, abs=0.03)
    assert float((became == was).float().mean()) == pytest.approx(0.1 + 0.1 / 15, abs=0.03)
    others = became[(became != WORDS.mask) & (became != was)]
    assert set(others.tolist()) == set(range(5, 20))  # any ordinary word, no special one
    assert 0 < len(mask_words(ids, mask, special, WORDS, share=0.9)[1].nonzero()) <= ordinary.sum()


def test_words_of_a_tokenizer():
    from finematch.scenes.generator import TOKENIZER
    from finematch.text import word_level

    tokenizer = word_level(TOKENIZER)
    words = Words.of(tokenizer)
    assert (words.size, words.mask) == (len(tokenizer), tokenizer.mask_token_id)
    assert {tokenizer.pad_token_id, tokenizer.cls_token_id, tokenizer.unk_token_id} <= set(words.special)
    tokenizer.mask_token = None
    with pytest.raises(ValueError, match="no \\[MASK\\]"):
        Words.of(tokenizer)


@pytest.mark.parametrize("picture", [True, False])
def test_masked_words_are_predicted_at_their_positions(picture):
    torch.manual_seed(0)
    head = MaskedWordHead(4, 9, picture=picture).double()
    words, seen = torch.randn(2, 5, 4).double(), torch.randn(2, 4).double()
    chosen = torch.tensor([[0, 1, 0, 0, 1], [0, 0, 1, 0, 0]]).bool()
    true = torch.tensor([3, 8, 0])
    total = 0.0
    for (b, n), word in zip([(0, 1), (0, 4), (1, 2)], true.tolist(), strict=True):
        state = words[b, n] + seen[b] if picture else words[b, n]
        z = head.predict(head.mix(state))
        total -= (z[word] - z.exp().sum().log()).item() / 3
    found = mlm(head(words, seen, torch.zeros(2, 4).double(), chosen), true)
    assert found.item() == pytest.approx(total, rel=1e-9)
    inputs = (words.requires_grad_(), seen.requires_grad_(), torch.randn(2, 4).double().requires_grad_())
    assert torch.autograd.gradcheck(lambda w, s, t: mlm(head(w, s, t, chosen), true), inputs)
    mlm(head(words, seen, seen, chosen), true).backward()
    assert words.grad[chosen].all()
    assert not words.grad[~chosen].any()  # nothing else is looked at


def test_the_pooled_reading_is_one_distribution_a_caption():
    torch.manual_seed(0)
    head = MaskedWordHead(4, 9, form="pooled").double()
    seen, text = torch.randn(2, 4).double(), torch.randn(2, 4).double()
    chosen = torch.tensor([[0, 1, 0, 0, 1], [0, 0, 1, 0, 0]]).bool()
    true = torch.tensor([3, 8, 0])
    z = [head.predict(head.mix(torch.cat([seen[b], text[b]]))).log_softmax(-1) for b in (0, 1)]
    expected = -(z[0][3] + z[0][8] + z[1][0]) / 3
    words = torch.randn(2, 5, 4).double()
    torch.testing.assert_close(mlm(head(words, seen, text, chosen), true), expected)
    torch.testing.assert_close(mlm(head(-words, seen, text, chosen), true), expected)
    inputs = (seen.requires_grad_(), text.requires_grad_())
    assert torch.autograd.gradcheck(lambda s, t: mlm(head(words, s, t, chosen), true), inputs)


def test_no_masked_word_at_all_costs_nothing_and_breaks_nothing():
    head = MaskedWordHead(4, 9)
    chosen = torch.zeros(2, 5).bool()
    loss = mlm(
        head(torch.randn(2, 5, 4), torch.randn(2, 4), torch.randn(2, 4), chosen), torch.zeros(0).long()
    )
    loss.backward()
    assert loss == 0
    assert all(p.grad is not None and not p.grad.any() for p in head.parameters())


def test_the_last_layer_can_share_the_word_embedding():
    embedding = nn.Embedding(9, 4)
    assert MaskedWordHead(4, 9, tied=embedding).predict.weight is embedding.weight
    with pytest.raises(ValueError, match=r"tied embedding is \(9, 4\), but 10 words"):
        MaskedWordHead(4, 10, tied=embedding)
    with pytest.raises(ValueError, match="mlm is 'x'"):
        MaskedWordHead(4, 9, form="x")


@pytest.mark.parametrize(("same_picture", "reduction"), [(True, "sum"), (False, "mean")])
def test_the_contrast_of_fused_tokens_in_loops(same_picture, reduction):
    """S20: image i with caption j is located for itself, and Eq. 5 compares the pair's own two tokens."""
    options = {"same_picture": same_picture, "reduction": reduction}
    model, batch = tiny(contrast="fused", queue=0, **options).double().eval(), pairs(4, ids=[0, 1, 0, 2])
    batch["image"]["pixels"] = batch["image"]["pixels"].double()
    picture, caption = model.encode_image(**batch["image"]), model.encode_text(**batch["text"])
    table = torch.zeros(4, 4).double()
    for i in range(4):
        for j in range(4):
            at = model.locate(picture[[i]], caption[[j]])
            image, text = model.encoders.project_image(at.picture), model.encoders.project_text(at.text)
            table[i, j] = F.cosine_similarity(image, text)[0] / 0.07
    total = 0.0
    for s in (table, table.T):
        for i in range(4):
            own = [
                j
                for j in range(4)
                if (batch["image_id"][j] == batch["image_id"][i] if same_picture else j == i)
            ]
            total += sum(torch.logsumexp(s[i], 0) - s[i, j] for j in own) / len(own) / 4
    torch.testing.assert_close(model(batch)["itc"], total / (2 if reduction == "mean" else 1))


def test_negatives_are_drawn_by_what_the_contrast_compares(monkeypatch):
    """S24: with fused tokens no loss trains the unimodal vectors, so that they can draw no hard negatives."""
    seen = []

    def drawn(similarity, image_id):
        seen.append(similarity)
        return hard_negatives(similarity, image_id)

    monkeypatch.setattr("finematch.models.slan.objective.hard_negatives", drawn)
    for contrast in ("fused", "unimodal"):
        model, batch = tiny(contrast=contrast, queue=0).eval(), pairs(4, ids=[0, 1, 0, 2])
        model(batch)
        picture, caption = model.encode_image(**batch["image"]), model.encode_text(**batch["text"])
        table = picture.vector @ caption.vector.T / 0.07
        if contrast == "fused":
            for i in range(4):
                for j in range(4):
                    at = model.locate(picture[[i]], caption[[j]])
                    image, text = (
                        model.encoders.project_image(at.picture),
                        model.encoders.project_text(at.text),
                    )
                    table[i, j] = F.cosine_similarity(image, text)[0] / 0.07
        torch.testing.assert_close(seen.pop(), table.detach(), rtol=1e-4, atol=1e-4)
    assert not seen


def test_the_contrast_of_fused_tokens_knows_no_queue():
    for wrong in ({"queue": 12}, {"queue": 0, "distil": 0.4}, {"queue": 0, "weights": {"itm": 0}}):
        with pytest.raises(ValueError, match="contrast='fused' compares"):
            tiny(contrast="fused", **wrong)


# ------------------------------------------------------------------------------------------- region-word contrast
def test_the_region_word_contrast_in_loops():
    g = torch.Generator().manual_seed(0)
    levels = [torch.randn(3, 4, 5, generator=g).double() for _ in range(2)]
    words, image_id, scale = torch.randn(3, 6, 5, generator=g).double(), torch.tensor([7, 8, 7]), 3.0
    valid = torch.tensor([[1, 1, 1, 1], [1, 0, 1, 0], [1, 1, 0, 0]]).bool()
    counted = torch.tensor([[0, 1, 1, 1, 1, 0], [0, 1, 0, 0, 0, 0], [0, 1, 1, 0, 0, 0]]).bool()
    total = 0.0
    for regions in levels:
        table = torch.zeros(3, 3).double()
        for i in range(3):
            for j in range(3):
                best = [
                    max(F.cosine_similarity(regions[i, t], words[j, n], 0) for t in range(4) if valid[i, t])
                    for n in range(6) if counted[j, n]
                ]  # fmt: skip
                table[i, j] = sum(best) / len(best)
        torch.testing.assert_close(region_word_scores(regions, valid, words, counted), table)
        for s in (scale * table, scale * table.T):
            for i in range(3):
                own = [j for j in range(3) if image_id[j] == image_id[i]]
                total += sum(torch.logsumexp(s[i], 0) - s[i, j] for j in own) / len(own) / 3 / 2 / len(levels)
    torch.testing.assert_close(region_word(levels, valid, words, counted, image_id, scale), total)


def test_the_region_word_contrast_trains_what_embeds_regions_and_words_and_moves_no_box():
    model = real("iccv", weights={"itc": 0, "itm": 0, "mlm": 0, "reg": 0}, region_word=1.0).train()
    model(real_pairs())["loss"].backward()
    reached = {n for n, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    for part in ("locator.embed", "locator.adaptors.0.embed", "locator.adaptors.2.embed", "towers.text"):
        assert any(part in name for name in reached), part
    assert not any("proposals" in name or "theta" in name or "attention.words" in name for name in reached)


@pytest.mark.parametrize("frozen", [True, False])
def test_the_region_word_contrast_compares_boxes_that_are_given(frozen):
    """Of a file of boxes, its padding left out; whether the locator's own proposals are frozen does not matter."""
    options = {"weights": {"itc": 0, "itm": 0, "mlm": 0, "reg": 0}, "region_word": 1.0}
    model, batch = real("iccv", locator={"frozen": frozen, "threshold": 0.0}, **options).eval(), real_pairs()
    model.locator.take_given()
    g = torch.Generator().manual_seed(3)
    corner = 0.5 * torch.rand(4, 6, 2, generator=g)
    scores = torch.tensor([0.9, 0.8, 0.7, 0.6, 0.0, 0.0])[:, None].expand(4, 6, 1)
    given = torch.cat([corner, corner + 0.3, scores], -1)
    other = torch.where(given[..., 4:] > 0, given, 0.1 * given)  # other padding
    picture = model.encode_image(**batch["image"], given=given)
    levels, valid = model.locator.fixed_regions(picture.prepared)
    assert valid.sum(1).tolist() == [4] * 4
    torch.testing.assert_close(levels[0], picture.prepared.regions)
    assert len(levels) == 4
    losses = [model(batch | {"image": batch["image"] | {"given": each}})["word"] for each in (given, other)]
    torch.testing.assert_close(*losses)
    losses[0].backward()
    assert model.locator.adaptors[2].embed.project.weight.grad.any()
    assert model.locator.decoder.fpn.layer_blocks[0][0].weight.grad.any()  # maps learn, boxes do not


@pytest.mark.parametrize("steer", ["fused", "unimodal"])
def test_the_words_that_steer_are_those_that_the_contrast_trains(steer):
    """With `unimodal`, M of Eq. 2 reads the words before any cross attention, which then leaves boxes alone."""
    model, batch = real("iccv", locator={"steer": steer}).eval(), real_pairs()
    caption = model.encode_text(**batch["text"])
    found = model.locate(model.encode_image(**batch["image"]), caption)
    way = found.boxes[1:].sum()
    got = torch.autograd.grad(
        way, list(model.locator.adaptors[0].attention.words.parameters()), allow_unused=True
    )
    assert any(x is not None and x.any() for x in got) == (steer == "fused")


def test_captions_of_an_image_are_positives_in_the_region_word_contrast():
    """Their images' rows are alike, so that equal shares and one positive each give one number (`same_picture`)."""
    g = torch.Generator().manual_seed(0)
    regions, words = torch.randn(3, 4, 5, generator=g)[[0, 1, 0]], torch.randn(3, 6, 5, generator=g)
    there, counted = torch.ones(3, 4, dtype=torch.bool), torch.ones(3, 6, dtype=torch.bool)
    found = [
        region_word([regions], there, words, counted, torch.tensor(ids), 3.0)
        for ids in ([7, 8, 7], [7, 8, 9])
    ]
    torch.testing.assert_close(*found)


# ------------------------------------------------------------------------------------------- Eq. 8-9
def test_the_loss_is_the_sum_of_its_terms():
    model, batch = tiny().train(), pairs(4)
    terms = model(batch)
    assert list(terms) == ["loss", "itc", "itm", "mlm", "reg"]
    torch.testing.assert_close(terms["loss"], terms["itc"] + terms["itm"] + terms["mlm"] + terms["reg"])
    weights = {"itc": 2.0, "itm": 0.5, "mlm": 0.25, "reg": 3.0}
    terms = tiny(weights=weights)(batch)
    torch.testing.assert_close(terms["loss"], sum(weights[k] * terms[k] for k in weights))


def test_in_half_precision_the_terms_are_single_and_close():
    batch, found = pairs(4), []
    for enabled in (False, True):
        torch.manual_seed(0)
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            model = tiny().train()
            model(batch)
            found.append(model(batch))
    assert all(v.dtype == torch.float32 for v in found[1].values())
    for name, value in found[0].items():
        torch.testing.assert_close(found[1][name], value, rtol=0.05, atol=0.05)
    assert found[0]["loss"] != found[1]["loss"]


def test_the_terms_are_those_of_the_parts():
    """Recomputed from the model's parts: the contrast with keys of the momentum encoders, L_reg of the true pairs."""
    model, first, second = tiny().train(), pairs(4), pairs(4, seed=5)
    model(first)
    with torch.no_grad():
        for p in model.encoders.parameters():
            p.mul_(1.1)
    twin = copy.deepcopy(model)
    terms = model(second)
    twin.momentum.update({"encoders": twin.encoders})
    follower = twin.momentum.copies["encoders"]
    slow = [follower.image(second["image"]["pixels"]).vector, follower.text(**second["text"]).vector]
    old = twin.queue.keys()
    assert old.image_id.tolist() == [0, 1, 2, 3]
    keys = Keys(
        torch.cat([slow[0], old.image]), torch.cat([slow[1], old.text]), torch.tensor([0, 1, 2, 3] * 2)
    )
    picture = twin.encode_image(**second["image"])
    caption = twin.encode_text(**second["text"])
    expected = itc(picture.vector, caption.vector, second["image_id"], keys, 1 / 0.07)
    torch.testing.assert_close(terms["itc"], expected)
    assert not torch.allclose(slow[0], picture.vector)
    torch.testing.assert_close(model.queue.keys().image[4:], slow[0])
    torch.testing.assert_close(model.queue.keys().text[4:], slow[1])
    torch.testing.assert_close(terms["reg"], twin.locate(picture, caption).reg_loss.mean())


def test_matching_sees_one_true_pair_to_two_hard_ones():
    model, batch = tiny(weights={"itc": 0, "mlm": 0, "reg": 0}), pairs(5, ids=[0, 1, 0, 2, 3])
    torch.manual_seed(3)
    found = model(batch)["itm"]
    torch.manual_seed(3)
    picture, caption = model.encode_image(**batch["image"]), model.encode_text(**batch["text"])
    texts, pictures = hard_negatives(picture.vector @ caption.vector.T / 0.07, batch["image_id"])
    total = 0.0
    for i, j, right in [
        *((i, i, 1) for i in range(5)),
        *((i, int(texts[i]), 0) for i in range(5)),
        *((int(pictures[j]), j, 0) for j in range(5)),
    ]:
        assert right or batch["image_id"][i] != batch["image_id"][j]
        located = model.locate(picture[i : i + 1], caption[j : j + 1])
        total -= model.head(located.picture, located.text).log_softmax(1)[0, right] / 15
    torch.testing.assert_close(found, total)


def test_matching_begins_with_random_negatives(monkeypatch):
    """For two steps of training, and not in evaluation; then drawn by similarity, as without."""
    seen = []

    def drawn(similarity, image_id):
        seen.append(float(similarity.abs().max()))
        return hard_negatives(similarity, image_id)

    monkeypatch.setattr("finematch.models.slan.objective.hard_negatives", drawn)
    model, batch = tiny(random_steps=2).eval(), pairs(4)
    model(batch)
    for _ in range(3):
        model.train()(batch)
    assert [value > 0 for value in seen] == [True, False, False, True]
    with pytest.raises(ValueError, match="random_steps = -1"):
        tiny(random_steps=-1)


def test_masked_words_pass_the_towers_and_the_locator_masked():
    model, batch = tiny(weights={"itc": 0, "itm": 0, "reg": 0}, mask_share=0.5), pairs(4)
    torch.manual_seed(3)
    found = model(batch)["mlm"]
    torch.manual_seed(3)
    text = batch["text"]
    hidden, chosen = mask_words(text["input_ids"], text["mask"], text["special"], WORDS, share=0.5)
    assert (hidden != text["input_ids"]).any()
    located = model.locate(
        model.encode_image(**batch["image"]), model.encode_text(hidden, text["mask"], text["special"])
    )
    logits = model.masked(located.words, located.picture, located.text, chosen)
    torch.testing.assert_close(found, F.cross_entropy(logits, text["input_ids"][chosen]))


READ = [{}, {"queue": 0}, {"momentum": 0.0}, {"queue": 0, "distil": 0.4}, {"distil": 0.4}, {"same_picture": False},
        {"reduction": "mean"}, {"mlm": "pooled"}, {"mlm_picture": False}, {"embed": 0},
        {"match_score": "logit"}, {"random_steps": 10}, {"contrast": "fused", "queue": 0}]  # fmt: skip


@pytest.mark.parametrize("options", READ, ids=str)
def test_each_reading_takes_training_steps_that_reach_every_weight(options):
    model, batch = tiny(**options).train(), pairs(4)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.01)
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        terms = model(batch)
        terms["loss"].backward()
        dead = [
            n
            for n, p in model.named_parameters()
            if p.requires_grad and (p.grad is None or not p.grad.isfinite().all())
        ]
        assert not dead
        optimizer.step()
        losses.append(float(terms["loss"].detach()))
    assert sum(losses[-5:]) < sum(losses[3:8])  # a queue that fills raises the loss first


@pytest.mark.parametrize("options", READ[1:7] + READ[8:9], ids=str)
def test_each_reading_changes_the_loss(options):
    """Same weights, other numbers; `pooled`, `embed` and `match_score` have other weights, or tests of their own."""
    batch = pairs(4, ids=[0, 1, 0, 2])
    found = []
    for changes in ({}, options):
        model = tiny(**changes).train()
        model.load_state_dict(tiny().state_dict(), strict=False)
        with torch.no_grad():  # momentum encoders that differ from the encoders
            for p in model.encoders.parameters():
                p.add_(0.05)
        total = 0.0
        for step in range(2):  # the queue counts from the second step on
            torch.manual_seed(step)
            total += float(model(batch)["loss"])
        found.append(total)
    assert abs(found[0] - found[1]) > 1e-4


@pytest.mark.parametrize(
    ("lone", "idle"),
    [
        ("itc", set()),  # the locator is frozen: data-parallel training would wait for it
        ("itm", {"locator.size"}),  # the sizes of the boxes enter nothing but L_reg here
        ("mlm", {"locator.size"}),
        ("reg", None),
    ],
)
def test_a_term_alone_trains_what_it_reaches(lone, idle):
    model = tiny(weights={name: float(name == lone) for name in ("itc", "itm", "mlm", "reg")}).train()
    terms = model(pairs(4))
    assert set(terms) == {"loss", lone}
    terms["loss"].backward()
    waiting = {
        n.rpartition(".")[0] for n, p in model.named_parameters() if p.requires_grad and p.grad is None
    }
    assert idle is None or waiting == idle
    assert (model.head is None) == (lone != "itm")
    assert (model.masked is None) == (lone != "mlm")


@pytest.mark.parametrize("token", ["map", "regions"])
def test_the_encoders_alone_train_as_the_contrast_in_the_batch_does(token):
    """Whatever token the model itself contrasts, the pooled map is taken; nothing else has a gradient."""
    model = tiny(token=token, queue=16, momentum=0.9)
    contrast = tiny(queue=0, momentum=0.0, weights={"itm": 0, "mlm": 0, "reg": 0})
    contrast.encoders.load_state_dict(model.encoders.state_dict())
    alone, batch = Unimodal(model), pairs()
    terms = alone(batch)
    torch.testing.assert_close(terms["loss"], contrast(batch)["itc"])
    terms["loss"].backward()
    reached = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.abs().sum()}
    assert {name.partition(".")[0] for name in reached} == {"encoders", "temperature"}
    assert int(model.queue.total) == 0
    for mine, theirs in (
        (alone.encode_image(**batch["image"]), model.encode_image(**batch["image"])),
        (alone.encode_text(**batch["text"]), model.encode_text(**batch["text"])),
    ):
        assert mine.vector.shape == theirs.vector.shape
        if token == "map":
            torch.testing.assert_close(mine.vector, theirs.vector)


def test_evaluation_mode_moves_nothing():
    model = tiny().train()
    model(pairs(4))
    model.eval()
    before = copy.deepcopy(model.state_dict())
    model(pairs(4, seed=9))
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_switches_are_refused_by_name():
    for wrong, said in [
        ({"weights": {"itc": -1.0}}, "itc_weight"),
        ({"reduction": "x"}, "reduction"),
        ({"weights": dict.fromkeys(("itc", "itm", "mlm", "reg"), 0.0)}, "weights"), ({"queue": -1}, "queue"),
        ({"match_score": "x"}, "match_score"), ({"mlm": "x"}, "mlm"), ({"distil": 1.5}, "distil"),
        ({"mask_share": 0.0}, "mask_share"), ({"momentum": 1.0}, "momentum"), ({"words": None}, "mlm needs words"),
        ({"tau": 0.9}, "tau"),
    ]:  # fmt: skip
        with pytest.raises(ValueError, match=said):
            tiny(**wrong)
    with pytest.raises(ValueError, match=r"towers \(Linear\) lacks"):
        SLAN(nn.Linear(2, 2), TinyLocator(), **configured({}))
    with pytest.raises(ValueError, match=r"locator \(Linear\) lacks"):
        SLAN(TinyTowers(), nn.Linear(2, 2), **configured({}))


# ------------------------------------------------------------------------------------------- pairs for retrieval
def test_padding_order_and_company_do_not_change_a_match():
    model, batch = tiny().eval(), pairs(4)
    picture, caption = model.encode_image(**batch["image"]), model.encode_text(**batch["text"])
    scores = model.match(picture, caption)
    longer = {k: F.pad(v, (0, 3)) for k, v in batch["text"].items()}
    again = model.encode_text(**longer)
    torch.testing.assert_close(again.vector, caption.vector)
    torch.testing.assert_close(model.match(picture, again), scores)
    order = torch.tensor([2, 0, 3, 1])
    torch.testing.assert_close(model.match(picture[order], caption[order]), scores[order])
    torch.testing.assert_close(model.match(picture[2:3], caption[2:3]), scores[2:3])
    assert scores.std() > 1e-4


def test_a_match_is_the_odds_or_the_logit():
    model, batch = tiny().eval(), pairs(4)
    picture, caption = model.encode_image(**batch["image"]), model.encode_text(**batch["text"])
    located = model.locate(picture, caption)
    logits = model.head(located.picture, located.text)
    torch.testing.assert_close(
        model.match(picture, caption), logits.softmax(1).logit()[:, 1]
    )  # log p / (1 - p)
    model.match_score = "logit"
    torch.testing.assert_close(model.match(picture, caption), logits[:, 1])
    with pytest.raises(ValueError, match="no matching head"):
        tiny(weights={"itm": 0}).match(picture, caption)


@pytest.mark.parametrize("memory", [0, 300, 2**20])
@pytest.mark.parametrize("block", [1, 3, 64])
def test_the_pair_scorer_scores_any_pairs(block, memory):
    model, batch = tiny(dropout=0.5).train(), pairs(6)
    asked = []

    def captions(rows):
        asked.extend(rows)
        return {k: v[list(rows)] for k, v in batch["text"].items()}

    score_pairs = pair_scorer(model, lambda rows: {"pixels": batch["image"]["pixels"][list(rows)]}, captions,
                              block=block, memory=memory)  # fmt: skip
    i, j = torch.tensor([0, 0, 1, 2, 2, 2, 5]), torch.tensor([3, 0, 0, 5, 2, 3, 1])
    found = score_pairs(i, j)
    assert model.training
    if memory == 2**20:
        assert sorted(asked) == [0, 1, 2, 3, 5]  # each caption once
    model.eval()
    picture, caption = model.encode_image(**batch["image"]), model.encode_text(**batch["text"])
    torch.testing.assert_close(found, model.match(picture[i], caption[j]))


# ------------------------------------------------------------------------------------------- with SLAN's own parts
def real(version, seed=0, literal=False, locator=None, **options):
    from finematch.encoders import BertTower, small_bert
    from finematch.models.slan.locator import SelfLocator
    from finematch.models.slan.towers import SmallStages
    from finematch.models.slan.towers import Towers as SLANTowers

    torch.manual_seed(seed)
    text = BertTower(small_bert(WORDS.size, width=16, depth=1, heads=2, positions=16))
    towers = SLANTowers(SmallStages((8, 16, 24)), text, 16)
    s = Settings("slan", {"version": version})
    readings = (LocatorConfig.literal() if literal else {}) | (locator or {})
    readings |= {name: getattr(s, name) for name in ("proposals", "scaling", "token")}
    options |= SLANConfig.literal() if literal else {}
    shape = {"width": 16, "pyramid": 8, "count": 12, "top": 5, "heads": 2, "anchor": 4.0, "samples": 4}
    locator = SelfLocator(towers.channels, LocatorConfig(query_depth=1, query_heads=2, **shape, **readings))
    options = {"width": 16, "embed": 8, "queue": 8, "mask_share": 0.4, **options}
    return SLAN(towers, locator, **configured(options))


def test_the_literal_reading_trains():
    """The printed equations, with the losses of Eq. 4 to 9 unweighted."""
    text = {"mlm": "pooled", "same_picture": False, "reduction": "sum", "distil": 0.0, "itc_weight": 1.0,
            "itm_weight": 1.0, "mlm_weight": 1.0, "reg_weight": 1.0}  # fmt: skip
    assert SLANConfig.literal().items() >= text.items()
    resolved = Settings("slan", {"reading": "literal"})
    assert resolved.as_dict().items() >= (text | {"random_negatives": 0.0}).items()
    for version in ("iccv", "arxiv"):
        model = real(version, literal=True).train()
        terms = model(real_pairs())
        terms["loss"].backward()
        assert set(terms) == {"loss", "itc", "itm", "mlm", "reg"}
        assert all(torch.isfinite(value) for value in terms.values())
        assert all(torch.isfinite(q.grad).all() for q in model.parameters() if q.grad is not None)


def real_pairs(seed=1):
    batch = pairs(4, seed=seed)
    g = torch.Generator().manual_seed(seed)
    return batch | {"image": {"pixels": torch.rand(4, 3, 64, 64, generator=g)}}


@pytest.mark.parametrize("version", ["iccv", "arxiv"])
def test_slan_learns_with_every_weight_reached(version):
    model, batch = real(version, queue=0, distil=0.1).train(), real_pairs()
    assert set(model.momentum.copies) == {"encoders"} | ({"locator"} if version == "arxiv" else set())
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(8):
        optimizer.zero_grad()
        terms = model(batch)
        assert all(v.isfinite() for v in terms.values())
        terms["loss"].backward()
        assert not [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None]
        optimizer.step()
        losses.append(float(terms["itc"].detach() + terms["mlm"].detach()))
    assert sum(losses[-3:]) < sum(losses[:3])


@pytest.mark.parametrize("version", ["iccv", "arxiv"])
def test_a_contrast_alone_trains_what_makes_its_tokens(version):
    model = real(version, weights={"itm": 0, "mlm": 0, "reg": 0}).train()
    terms = model(real_pairs())
    terms["loss"].backward()
    reached = {n for n, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    assert any(n.startswith("locator.proposals") for n in reached) == (version == "arxiv")
    assert any(p.requires_grad for p in model.locator.parameters()) == (version == "arxiv")


@pytest.mark.parametrize("version", ["iccv", "arxiv"])
def test_slan_matches_alike_whatever_the_company(version):
    model, batch = real(version).eval(), real_pairs()
    picture, caption = model.encode_image(**batch["image"]), model.encode_text(**batch["text"])
    scores = model.match(picture, caption)
    longer = model.encode_text(**{k: F.pad(v, (0, 3)) for k, v in batch["text"].items()})
    torch.testing.assert_close(model.match(picture, longer), scores, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(model.match(picture[2:3], caption[2:3]), scores[2:3], rtol=1e-4, atol=1e-5)
    score_pairs = pair_scorer(model, lambda rows: taken(batch["image"], rows), lambda rows: taken(batch["text"], rows),
                              block=3)  # fmt: skip
    i, j = torch.arange(4).repeat_interleave(4), torch.arange(4).repeat(4)
    table = score_pairs(i, j).view(4, 4)
    torch.testing.assert_close(table.diagonal(), scores, rtol=1e-4, atol=1e-5)
    assert table.std() > 1e-5


def test_cached_maps_take_the_place_of_pixels():
    from finematch.models.slan.towers import CachedStages

    model, batch = real("iccv").eval(), real_pairs()
    expected = model.encode_image(**batch["image"]).vector
    maps = model.encoders.towers.vision(batch["image"]["pixels"])
    model.encoders.towers.image_encoder = CachedStages((8, 16, 24))
    named = {f"map{i}": m.detach() for i, m in enumerate(maps)}
    torch.testing.assert_close(model.encode_image(**named).vector, expected)
    model.momentum = None
    assert model(batch | {"image": named})["loss"].isfinite()


# ------------------------------------------------------------------------------------------- runs
class Data:
    """32 fixed pairs of 24 pictures."""

    def __init__(self, stop_at=None):
        self.batch = pairs(32, ids=[i * 3 // 4 for i in range(32)])
        self.calls, self.stop_at = 0, stop_at

    def __len__(self):
        return 32

    def __getitems__(self, index):
        if self.calls == self.stop_at:
            raise KeyboardInterrupt
        self.calls += 1
        return taken(self.batch, index)


def plan(**changes):
    return Plan(**{"epochs": 2, "batch_size": 8, "lr": 1e-2, "checkpoint_steps": 1, **changes})


def test_a_broken_run_goes_on_with_its_queues_and_momentum(tmp_path):
    seed_everything(0)
    whole = tiny(queue=24, dropout=0.3)
    fit(whole, Data(), plan(), tmp_path / "whole", echo=None)
    assert int(whole.queue.total) == 64
    for stop in (3, 6):
        seed_everything(0)
        model = tiny(queue=24, dropout=0.3)
        with pytest.raises(KeyboardInterrupt):
            fit(model, Data(stop_at=stop), plan(), tmp_path / f"{stop}", echo=None)
        seed_everything(9)
        model = tiny(seed=9, queue=24, dropout=0.3)
        fit(model, Data(), plan(), tmp_path / f"{stop}", echo=None)
        for name, value in model.state_dict().items():
            assert torch.equal(value, whole.state_dict()[name]), name


def test_fine_tuning_begins_with_pretrained_weights(tmp_path):
    old = tiny(queue=12).train()
    old(pairs(4))
    save_file(unique_state(old), tmp_path / "best.safetensors")
    new = tiny(seed=5, queue=4, weights={"mlm": 0})
    assert new.load_pretrained(tmp_path / "best.safetensors") == ["masked"]
    for name, value in new.state_dict().items():
        if not name.startswith(("queue.", "momentum.", "steps")):
            assert torch.equal(value, old.state_dict()[name]), name
    assert (int(new.steps), int(old.steps)) == (0, 1)  # of this training
    for mine, theirs in zip(
        new.momentum.copies["encoders"].parameters(), new.encoders.parameters(), strict=True
    ):
        assert torch.equal(mine, theirs)
    assert len(new.queue.keys().image_id) == 0
    (tmp_path / "cut.safetensors").write_bytes((tmp_path / "best.safetensors").read_bytes()[:100])
    for name in ("cut", "absent"):
        with pytest.raises(DataError, match=rf"{name}\.safetensors: the file: holds no weights"):
            new.load_pretrained(tmp_path / f"{name}.safetensors")
    towers = TinyTowers()
    tied = SLAN(towers, TinyLocator(), **configured({"queue": 4, "tied": towers.embed}))
    save_file(unique_state(tied), tmp_path / "tied.safetensors")
    assert tied.load_pretrained(tmp_path / "tied.safetensors") == []
    warm = tiny(queue=4, region_word=1.0)  # a warm start: the region-word contrast comes, or goes
    assert warm.load_pretrained(tmp_path / "best.safetensors") == ["word_temperature"]
    save_file(unique_state(warm), tmp_path / "warm.safetensors")
    assert tiny(queue=4).load_pretrained(tmp_path / "warm.safetensors") == ["word_temperature"]
    with pytest.raises(ValueError, match=r"another model.*project_image"):
        tiny(embed=5).load_pretrained(tmp_path / "best.safetensors")
    with pytest.raises(ValueError, match=r"missing or unknown \['encoders.towers.norm"):
        tiny(norm=True).load_pretrained(tmp_path / "best.safetensors")


# ------------------------------------------------------------------------------------------- two processes
def steps_of_contrast(rank, world, momentum):
    """Steps of both contrasts on this process's share: losses, gradients, and what the queue holds."""
    only = {"itm": 0, "mlm": 0, "reg": 0}
    model = tiny(queue=24, momentum=momentum, weights=only, region_word=1.0).train()
    out, share = [], 8 // world
    for step in range(4):
        batch = pairs(8, seed=step, ids=[step, 9, 9, 10 + step, 3, 4, 5, step])
        take = slice(rank * share, (rank + 1) * share)
        model.zero_grad()
        mine = taken(batch, take)
        tokens = int(
            mine["text"]["mask"].sum(1).max()
        )  # as batches come: padded to their own longest caption
        mine["text"] = {name: value[:, :tokens] for name, value in mine["text"].items()}
        loss = model(mine)["loss"]
        loss.backward()
        with torch.no_grad():
            for p in model.parameters():
                if p.grad is not None:
                    if world > 1:  # what data-parallel training does
                        dist.all_reduce(p.grad)
                        p.grad /= world
                    p.sub_(0.1 * p.grad)
        grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        out.append((loss.detach(), grads, {n: b.clone() for n, b in model.queue.named_buffers()}))
    return out


def contrast_of_two(rank, folder, momentum):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    torch.save(steps_of_contrast(rank, 2, momentum), f"{folder}/{rank}.pt")
    # unequal numbers of masked words: the shared mean is that over all words
    logits, true = torch.arange(12.0).view(4, 3) / 7, torch.tensor([0, 2, 1, 1])
    mine = slice(0, 3) if rank == 0 else slice(3, 4)
    weight = torch.ones(3, requires_grad=True)
    loss = mlm(logits[mine] * weight, true[mine])
    loss.backward()
    values = torch.stack([loss.detach(), *weight.grad])
    dist.all_reduce(values)
    torch.save(values / 2, f"{folder}/mlm{rank}.pt")
    dist.barrier()  # who leaves early cuts the other off
    os._exit(0)  # gloo's threads can abort a process that ends in the ordinary way, its work done


@pytest.mark.parametrize("momentum", [0.9, 0.0])
def test_two_processes_contrast_as_one(tmp_path, momentum):
    torch.multiprocessing.spawn(contrast_of_two, args=(str(tmp_path), momentum), nprocs=2)
    whole = steps_of_contrast(0, 1, momentum)
    assert int(whole[-1][2]["total"]) == 32
    for rank in (0, 1):
        theirs = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        for step, (ours, other) in enumerate(zip(whole, theirs, strict=True)):
            torch.testing.assert_close(
                other, ours, rtol=1e-4, atol=1e-5, msg=lambda m, s=step: f"step {s}: {m}"
            )
    logits, true = torch.arange(12.0).view(4, 3) / 7, torch.tensor([0, 2, 1, 1])
    weight = torch.ones(3, requires_grad=True)
    loss = F.cross_entropy(logits * weight, true)
    loss.backward()
    for rank in (0, 1):
        found = torch.load(tmp_path / f"mlm{rank}.pt", weights_only=True)
        torch.testing.assert_close(found, torch.stack([loss.detach(), *weight.grad]))


ALONE = {"itm": 0, "mlm": 0, "reg": 0}  # without draws, so that one process and two do the same


def trained(out, **weights):
    seed_everything(0)
    model = tiny(queue=24, weights=weights)
    summary = fit(model, Data(), plan(lr=0.05, optimizer="sgd"), out, echo=None)
    return model.state_dict(), [line["loss"] for line in summary["history"]]


def test_two_processes_train_as_one(tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, __file__, str(tmp_path)], env=environment, capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 0, done.stderr
    ranks = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1)]
    state, losses = trained(tmp_path / "one", **ALONE)
    for found, logged in (r["alone"] for r in ranks):
        torch.testing.assert_close(found, state, rtol=1e-4, atol=1e-5)
        assert logged == pytest.approx(losses, rel=1e-4)
    (one, logged), (two, _) = (r["whole"] for r in ranks)  # all terms, each process its own draws
    for name, value in one.items():
        torch.testing.assert_close(two[name], value)
    assert int(one["queue.total"]) == 64
    assert all(map(math.isfinite, logged))


if __name__ == "__main__":
    from accelerate import PartialState

    found = {"alone": trained(f"{sys.argv[1]}/alone", **ALONE), "whole": trained(f"{sys.argv[1]}/whole")}
    torch.save(found, Path(sys.argv[1]) / f"{PartialState().process_index}.pt")
