"""PVSE, SCAN and SAF: the public code's numbers on a fixed input, the papers' formulas, masks, learning."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from finematch.arena import Contrast, ContrastThenHinge
from finematch.encoders import GRUTower, Tokens, TokenTransformer
from finematch.losses import contrastive
from finematch.models import rivals
from finematch.models.configs import HSLMConfig
from finematch.models.hslm import RegionEncoder, hinge
from finematch.models.rivals import (
    PVSE,
    SAF,
    SCAN,
    Fragments,
    Instances,
    LinearTower,
    PolysemousEmbedding,
    word_attention,
)

RIVALS = {"pvse": PVSE, "scan": SCAN, "saf": SAF}
each_rival = pytest.mark.parametrize("name", RIVALS)


class Given(nn.Module):
    """A tower that hands on the states it is given."""

    def __init__(self, width):
        super().__init__()
        self.width = width

    def forward(self, states, mask):
        return Tokens(states, mask, torch.zeros_like(mask), states[:, 0])


def made(name, objective=None):
    """A rival of width 6 in double precision, on given states."""
    torch.manual_seed(1)
    more = {"pvse": {"dim": 4}, "saf": {"sim": 4}}.get(name, {})
    model = RIVALS[name](Given(6), Given(6), objective or Contrast(), **more).double().eval()
    if name == "saf":
        model.norm.running_mean.fill_(0.3)
        model.norm.running_var.fill_(0.4)
    return model


def states(*lengths, width=6, seed=0):
    """States of items of these lengths, padded with large numbers, and their mask."""
    g = torch.Generator().manual_seed(seed)
    mask = torch.arange(max(lengths))[None] < torch.tensor(lengths)[:, None]
    found = torch.randn(len(lengths), max(lengths), width, generator=g, dtype=torch.float64)
    return {"states": torch.where(mask[..., None], found, 1e3), "mask": mask}


IMAGES, CAPTIONS = states(5, 3, 4), states(2, 6, 4, 1, seed=1)


# ------------------------------------------------------------------------- the public code's numbers on a fixed input
def wave(*shape, phase=0.0):
    """A fixed tensor that anybody can make again."""
    return torch.sin(phase + 0.7 * torch.arange(torch.Size(shape).numel(), dtype=torch.float64)).reshape(
        shape
    )


def put(layer, phase):
    with torch.no_grad():
        layer.weight.copy_(wave(*layer.weight.shape, phase=phase))
        if layer.bias is not None:
            layer.bias.copy_(wave(*layer.bias.shape, phase=phase + 0.5))


REGIONS = {"states": wave(2, 36, 6), "mask": torch.ones(2, 36, dtype=torch.bool)}
WORDS = {"states": F.normalize(wave(3, 5, 6, phase=2.0), dim=-1),
         "mask": torch.arange(5)[None] < torch.tensor([2, 5, 4])[:, None]}  # fmt: skip


def test_scan_gives_the_numbers_of_the_public_code():
    """kuanghuei/SCAN 8063557, xattn_score_t2i: clipped_l2norm, LogSumExp, lambda_softmax 9, lambda_lse 6."""
    model = made("scan")
    image, text = model.encode_image(**REGIONS), model.encode_text(**WORDS)
    theirs = torch.tensor([[1.0688317426994234, 1.2471414188883172, 1.2173294028315476],
                           [0.9887319021357751, 1.1157394089997903, 1.0778740087246348]],
                          dtype=torch.float64)  # fmt: skip
    torch.testing.assert_close(model.scores(image, text), theirs, rtol=0, atol=1e-6)


def test_saf_gives_the_numbers_of_the_public_code():
    """Paranioar/SGRAF 50d0c6f, EncoderSimilarity(6, 4, "SAF") in eval mode; the batch norm of VisualSA is the identity
    and the biases of sim_tran*_w are zero, as they are at its start."""
    model = made("saf")
    for k, side in enumerate((model.image_vector, model.text_vector)):
        put(side.local, 1.0 + k), put(side.query, 3.0 + k), put(side.vote, 5.0 + k)
    put(model.compare_local, 7.0), put(model.compare_global, 8.0)
    put(model.gate, 9.0), put(model.score, 10.0)
    with torch.no_grad():
        for value, part in zip(
            (0.1, 0.5, 1.5, -0.2), ("running_mean", "running_var", "weight", "bias"), strict=True
        ):
            getattr(model.norm, part).fill_(value)
    image, text = model.encode_image(**REGIONS), model.encode_text(**WORDS)
    theirs = torch.tensor([[0.28544024011031643, 0.28530775709134876, 0.28551788937833644],
                           [0.2857075392759422, 0.2850837033490422, 0.28556023264642527]],
                          dtype=torch.float64)  # fmt: skip
    found = model.bounded(model.scores(image, text))
    torch.testing.assert_close(found, theirs, rtol=0, atol=2e-7)  # they add 1e-8 to norms
    assert (found - theirs).abs().max() < 0.01 * theirs.std()


def test_pvse_gives_the_numbers_of_the_public_code():
    """yalesong/pvse 874aa16, PIENet(2, 6, 4, 3) on words, and PVSELoss's diversity, discrepancy and pooled cosines."""
    side = PolysemousEmbedding(6, 4, 2, pooled=True).double()
    for layer, phase in zip(
        (side.whole, side.hidden, side.codes, side.part, side.norm), range(1, 6), strict=True
    ):
        put(layer, float(phase))
    found = side(Given(6)(**WORDS))
    theirs = torch.tensor([[[-0.8164947803243182, 0.2989495281923524, 0.23736069954875444, 0.43315742127595963],
                            [-0.7901831025775286, 0.3303004638046075, 0.2560479004039243, 0.4482764110570108]],
                           [[-0.14090192469202792, -0.7693898075688078, 0.6223114975830425, 0.03023857806289923],
                            [-0.21349902375513308, -0.7362699392258956, 0.641770539202858, -0.02133819250016433]],
                           [[-0.8330321258905872, -0.23892502745958902, 0.19909142216702685, 0.4575313258205982],
                            [-0.8344866158577471, -0.13145938583500447, 0.18335460322129649, 0.5027241861177254]]],
                          dtype=torch.float64)  # fmt: skip
    torch.testing.assert_close(found.vectors, theirs, rtol=0, atol=1e-12)
    other = Instances(F.normalize(wave(3, 2, 4, phase=6.0), dim=-1), None, wave(3, 2, 4, phase=8.0))
    more = {name: float(value.detach()) for name, (_, value) in made("pvse").more(found, other).items()}
    assert more == {"diversity": pytest.approx(0.6235058627650822, abs=1e-12),
                    "discrepancy": pytest.approx(0.24804568188366005, abs=1e-12)}  # fmt: skip
    theirs = torch.tensor([[0.7225737826542442, 0.8219021545071614, 0.5076919460609357],
                           [0.22515324904198278, 0.4693811388759571, 0.46634188171942803],
                           [0.5899632826944733, 0.9494587752484281, 0.8510106007042334]],
                          dtype=torch.float64)  # fmt: skip
    torch.testing.assert_close(made("pvse").scores(found, other), theirs, rtol=0, atol=1e-12)


# ------------------------------------------------------------------------- the papers' formulas, one pair at a time
def attention(regions, words):
    """Lines of words, of one image and one caption, number by number."""
    c = [[float(r @ w) for r in regions] for w in words]
    c = [[x if x > 0 else 0.1 * x for x in row] for row in c]
    norms = [math.sqrt(sum(row[n] ** 2 for row in c)) for n in range(len(regions))]
    found = []
    for row in c:
        e = [math.exp(9 * x / norm) for x, norm in zip(row, norms, strict=True)]
        found.append([x / sum(e) for x in e])
    return torch.tensor(found, dtype=torch.float64)


def unit(x):
    return x / x.norm()


def plain_scan(_, regions, words):
    total = 0.0
    for word, weights in zip(words, attention(regions, words), strict=True):
        context = sum(w * r for w, r in zip(weights, regions, strict=True))
        total += math.exp(6 * float(unit(word) @ unit(context)))
    return math.log(total) / 6


def plain_vector(side, parts):
    mean = sum(parts) / len(parts)
    answers = [float(side.vote(torch.tanh(side.local(x)) * torch.tanh(side.query(mean)))) for x in parts]
    weights = torch.tensor(answers, dtype=torch.float64).softmax(0)
    return unit(sum(w * x for w, x in zip(weights, parts, strict=True)))


def plain_saf(model, regions, words):
    whole = (plain_vector(model.image_vector, regions) - plain_vector(model.text_vector, words)) ** 2
    nodes = [unit(model.compare_global.weight @ whole)]
    for word, weights in zip(words, attention(regions, words), strict=True):
        context = unit(sum(w * r for w, r in zip(weights, regions, strict=True)))
        nodes.append(unit(model.compare_local.weight @ (context - word) ** 2))
    gates = []
    for node in nodes:
        x = (float(model.gate(node)) - 0.3) / math.sqrt(0.4 + model.norm.eps)
        gates.append(1 / (1 + math.exp(-x)))
    joined = unit(sum(g / sum(gates) * node for g, node in zip(gates, nodes, strict=True)))
    return float(model.score(joined))


@pytest.mark.parametrize(("name", "plain"), [("scan", plain_scan), ("saf", plain_saf)])
@torch.no_grad()
def test_scores_are_the_papers_formula_for_images_and_captions_of_any_length(name, plain):
    model = made(name)
    image, text = model.encode_image(**IMAGES), model.encode_text(**CAPTIONS)
    found = model.scores(image, text)
    for i, (regions, there) in enumerate(zip(image.states, image.mask, strict=True)):
        for j, (words, real) in enumerate(zip(text.states, text.mask, strict=True)):
            expected = plain(model, list(regions[there]), list(words[real]))
            assert float(found[i, j]) == pytest.approx(expected, abs=1e-9), (i, j)


@torch.no_grad()
def test_pvse_is_the_papers_formula():
    model = made("pvse")
    image, text = model.encode_image(**IMAGES), model.encode_text(**CAPTIONS)
    for given, found, side in ((IMAGES, image, model.image_side), (CAPTIONS, text, model.text_side)):
        for item, (rows, real) in enumerate(zip(given["states"], given["mask"], strict=True)):
            parts = list(rows[real])
            whole = side.whole(rows[0] if side.pooled else sum(parts) / len(parts))
            for k in range(2):
                answers = [float(side.codes(torch.tanh(side.hidden(x)))[k]) for x in parts]
                weights = torch.tensor(answers, dtype=torch.float64).softmax(0)
                local = torch.sigmoid(side.part(sum(w * x for w, x in zip(weights, parts, strict=True))))
                torch.testing.assert_close(found.vectors[item, k], unit(side.norm(whole + local)))
                torch.testing.assert_close(found.attention[item, k, : len(parts)], weights)
    for i, one in enumerate(image.vectors):
        for j, other in enumerate(text.vectors):
            best = max(float(a @ b) for a in one for b in other)
            assert float(model.scores(image, text)[i, j]) == pytest.approx(best, abs=1e-12)


# ------------------------------------------------------------------------- invariants
@each_rival
@torch.no_grad()
def test_padding_and_the_order_of_a_batch_change_nothing(name):
    model = made(name)

    def scores(images, captions):
        return model.scores(model.encode_image(**images), model.encode_text(**captions))

    whole = scores(IMAGES, CAPTIONS)
    other = [{"states": torch.where(one["mask"][..., None], one["states"], -7.0), "mask": one["mask"]}
             for one in (IMAGES, CAPTIONS)]  # fmt: skip
    torch.testing.assert_close(scores(*other), whole, rtol=0, atol=1e-12)
    longer = [{"states": F.pad(one["states"], (0, 0, 0, 3), value=5.0), "mask": F.pad(one["mask"], (0, 3))}
              for one in (IMAGES, CAPTIONS)]  # fmt: skip
    torch.testing.assert_close(scores(*longer), whole, rtol=0, atol=1e-12)
    rows, columns = torch.tensor([2, 0, 1]), torch.tensor([3, 1, 0, 2])
    turned = [{key: value[order] for key, value in one.items()}
              for one, order in ((IMAGES, rows), (CAPTIONS, columns))]  # fmt: skip
    torch.testing.assert_close(scores(*turned), whole[rows][:, columns], rtol=0, atol=1e-12)
    alone = {key: value[1:2] for key, value in CAPTIONS.items()}
    torch.testing.assert_close(scores(IMAGES, alone), whole[:, 1:2], rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", ["scan", "saf"])
@torch.no_grad()
def test_pairs_tiles_and_training_give_the_same_scores(name, monkeypatch):
    model = made(name)
    image, text = model.encode_image(**IMAGES), model.encode_text(**CAPTIONS)
    whole = model.scores(image, text)
    i, j = torch.tensor([0, 2, 1, 2]), torch.tensor([1, 3, 0, 2])
    torch.testing.assert_close(model.pairs(image[i], text[j]), whole[i, j], rtol=0, atol=1e-9)
    ready = model.prepare(image)  # as a gallery is, once for all queries
    assert (ready.gram is None) == (name == "saf")
    torch.testing.assert_close(model.scores(ready, text), whole, rtol=0, atol=1e-12)
    torch.testing.assert_close(model.scores(ready[[2, 0]], text), whole[[2, 0]], rtol=0, atol=1e-12)
    monkeypatch.setattr(rivals, "TILE", 1)
    torch.testing.assert_close(model.scores(image, text), whole, rtol=0, atol=1e-12)
    if name == "saf":  # all pairs at once, with the batch norm of eval mode
        model.train()
        model.norm.eval()
        torch.testing.assert_close(model.scores(image, text), whole, rtol=0, atol=1e-12)


@torch.no_grad()
def test_the_batch_norm_of_saf_has_the_statistics_of_the_real_nodes_alone():
    model = made("saf").train()
    image, text = model.encode_image(**IMAGES), model.encode_text(**CAPTIONS)
    model.norm.momentum = 1.0
    model.scores(image, text)
    gates = []
    for regions, there, vector in zip(image.states, image.mask, image.vector, strict=True):
        for words, real, caption in zip(text.states, text.mask, text.vector, strict=True):
            weights = attention(regions[there], words[real])
            near = F.normalize(weights @ regions[there], dim=-1)
            nodes = [
                model.compare_global((vector - caption) ** 2),
                *model.compare_local((near - words[real]) ** 2),
            ]
            gates += [float(model.gate(unit(node))) for node in nodes]
    assert float(model.norm.running_mean) == pytest.approx(
        torch.tensor(gates).double().mean().item(), abs=1e-6
    )
    assert float(model.norm.running_var) == pytest.approx(torch.tensor(gates).double().var().item(), rel=1e-5)


@torch.no_grad()
def test_words_attend_to_real_regions_alone_and_padding_to_nothing():
    regions, words = F.normalize(IMAGES["states"], dim=-1), F.normalize(CAPTIONS["states"], dim=-1)
    found = word_attention(regions, IMAGES["mask"], words[None], CAPTIONS["mask"][None])
    assert not found[~IMAGES["mask"][:, None, None].expand_as(found)].any()
    torch.testing.assert_close(found.sum(-1), torch.ones_like(found[..., 0]))
    by_pair = word_attention(
        regions, IMAGES["mask"], words.expand(3, *words.shape), CAPTIONS["mask"].expand(3, 4, -1)
    )
    torch.testing.assert_close(by_pair[:, CAPTIONS["mask"]], found[:, CAPTIONS["mask"]], rtol=0, atol=1e-12)


# ------------------------------------------------------------------------- learning
def trained(name, objective):
    torch.manual_seed(0)
    vision = TokenTransformer(10, width=16, depth=0) if name == "pvse" else LinearTower(10, width=16)
    text = GRUTower(30, embed=16, width=16, dropout=0.0)
    more = {"pvse": {"dim": 16}, "saf": {"sim": 8}}.get(name, {})
    return RIVALS[name](vision, text, objective, **more)


def batch(pairs=8):
    g = torch.Generator().manual_seed(3)
    lengths = torch.randint(2, 7, (pairs,), generator=g)
    mask = torch.arange(6)[None] < lengths[:, None]
    ids = torch.randint(5, 30, (pairs, 6), generator=g)
    image = {
        "features": torch.randn(pairs, 4, 10, generator=g),
        "mask": torch.ones(pairs, 4, dtype=torch.bool),
    }
    text = {"input_ids": ids * mask, "mask": mask, "special": torch.zeros_like(mask)}
    return {"image": image, "text": text, "image_id": torch.arange(pairs)}


def test_the_contrast_of_a_rival_is_that_of_mvam():
    model, ids = made("pvse"), torch.tensor([4, 4, 7])  # two captions of one image
    image, text = model.encode_image(**IMAGES), model.encode_text(**states(2, 6, 4, seed=1))
    table = model.scores(image, text)
    found = model.objective(model, image, text, ids[:, None] == ids[None, :])["loss"]
    by_hand = 0
    for lines in (table, table.T):
        logits = lines * model.objective.scale()
        by_hand += sum(logits[i].logsumexp(0) - logits[i, i] for i in range(3)) / 3
    torch.testing.assert_close(found, by_hand / 2)
    model.float()
    one = Instances(F.normalize(torch.randn(3, 1, 5), dim=-1), None, None)
    two = Instances(F.normalize(torch.randn(3, 1, 5), dim=-1), None, None)
    mvam = contrastive(one.vectors[:, 0], two.vectors[:, 0], model.objective.scale())
    torch.testing.assert_close(model.objective(model, one, two, torch.eye(3) > 0)["loss"], mvam)


def test_regions_of_scan_and_saf_are_hslms_before_its_graph():
    config = HSLMConfig(width=16, mgcn=False, input_dropout=0.5)
    hslm, tower = RegionEncoder(10, config), LinearTower(10, width=16, input_dropout=0.5)
    tower.project.load_state_dict(hslm.embed.state_dict())
    features, mask, places = torch.rand(3, 4, 10), torch.ones(3, 4, dtype=torch.bool), torch.rand(3, 4, 5)
    for mode in (True, False):  # with channels dropped, and without
        hslm.train(mode), tower.train(mode)
        torch.manual_seed(5)
        theirs = hslm(features, mask)
        torch.manual_seed(5)
        torch.testing.assert_close(F.normalize(tower(features, mask, places).states, dim=-1), theirs)


@each_rival
@pytest.mark.parametrize("kind", ["contrast", "hinge"])
def test_eight_pairs_are_learnt_by_heart_and_every_parameter_has_a_gradient(name, kind):
    objective = Contrast() if kind == "contrast" else ContrastThenHinge(start_steps=30)
    model, pairs = trained(name, objective), batch()
    model(pairs)["loss"].backward()
    still = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    unused = (
        {"vision.token"} if name == "pvse" else set()
    )  # an [IMG] that no state attends to and none asks for
    assert set(still) - unused <= {"score.bias"}, still  # which a contrast takes no notice of
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for _ in range(150):
        optimizer.zero_grad()
        model(pairs)["loss"].backward()
        optimizer.step()
    model.eval()
    with torch.no_grad():
        scores = model.scores(*model.encoded(pairs["image"], pairs["text"]))
    assert scores.argmax(0).tolist() == scores.argmax(1).tolist() == list(range(8))


@each_rival
@torch.no_grad()
def test_attention_of_pairs_has_a_line_a_token_and_a_column_a_region(name):
    model, pairs = trained(name, Contrast()).eval(), batch()
    found = model.attend(pairs["image"], pairs["text"])
    assert found.shape == (8, 6, 4)
    assert (found >= 0).all()
    assert not found[~pairs["text"]["mask"]].any()
    assert (found[pairs["text"]["mask"]].sum(-1) > 0).all()


class Table(rivals.Rival):
    """A rival whose image i and caption j have the score of a table: `together` or pair by pair."""

    def __init__(self, table, together):
        super().__init__(Given(1), Given(1), Contrast())
        self.table, self.together = table, together

    def scores(self, image, text):
        return self.table[image][:, text]

    def pairs(self, image, text):
        return self.table[image, text]


def loss_of(objective, table, same, together=True):
    index = torch.arange(len(same))
    return objective(Table(table, together), index, index, same)["loss"]


def test_captions_of_one_image_are_no_negatives_of_hslms_objective():
    for objective in (ContrastThenHinge(start_steps=0), ContrastThenHinge(start_steps=9)):
        same = torch.eye(4, dtype=torch.bool)
        same[0, 1] = same[1, 0] = True
        scores = torch.randn(4, 4, generator=torch.Generator().manual_seed(0))
        other = scores.clone()
        other[0, 1] = other[1, 0] = 50.0
        assert float(loss_of(objective, scores, same).detach()) == pytest.approx(
            float(loss_of(objective, other, same).detach())
        )


def test_the_hinge_is_hslms():
    """The hardest of the batch, by hand; and of fewer drawn rivals never more than that."""
    scores, same = (
        torch.tensor([[0.9, 0.5, 0.8], [0.3, 0.4, 0.1], [0.2, 0.6, 0.7]]),
        torch.eye(3, dtype=torch.bool),
    )
    whole = ContrastThenHinge(start_steps=0)
    # rows: 0.2-0.9+0.8, 0.2-0.4+0.3, 0.2-0.7+0.6; columns: 0 (0.2-0.9+0.3 < 0), 0.2-0.4+0.6, 0.2-0.7+0.8
    expected = 0.1 + 0.1 + 0.1 + 0.0 + 0.4 + 0.3
    assert float(loss_of(whole, scores, same)) == pytest.approx(expected)
    few = ContrastThenHinge(start_steps=0, rivals=1)
    for _ in range(5):
        assert float(loss_of(few, scores, same)) <= expected + 1e-6


@pytest.mark.parametrize("rivals", [0, 3])
def test_the_hardest_pairs_alone_have_the_gradient_of_all(rivals):
    """`together` differentiates the whole table, the other way 3 B pairs: the same loss and the same gradient."""
    same = torch.eye(7, dtype=torch.bool)
    same[1, 4] = same[4, 1] = True
    found = []
    for together in (True, False):
        table = torch.randn(7, 7, generator=torch.Generator().manual_seed(5)).requires_grad_()
        loss = loss_of(ContrastThenHinge(start_steps=0, rivals=rivals), table, same, together)
        loss.backward()
        found.append((loss.detach(), table.grad))
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=0)
    assert 0 < (found[0][1] != 0).sum() <= 3 * 7


def test_scan_differentiates_three_pairs_an_image_and_saf_all():
    pairs, same = batch(), torch.eye(8, dtype=torch.bool)
    for name, expected in (("scan", [24]), ("saf", [])):
        model, asked = trained(name, ContrastThenHinge(start_steps=0)), []
        own = model.pairs
        model.pairs = lambda i, t, own=own, asked=asked: (asked.append(len(i.states)), own(i, t))[1]
        table = model.scores(*model.encoded(pairs["image"], pairs["text"]))
        loss = model(pairs)["loss"]
        assert asked == expected
        by_table = hinge(model.bounded(table), same, 0.2)
        assert float(loss.detach()) == pytest.approx(float(by_table.detach()), abs=1e-5)


def test_saf_refuses_towers_of_two_widths():
    with pytest.raises(ValueError, match="regions have 6 columns, words 8"):
        SAF(Given(6), Given(8), Contrast())


def test_fragments_are_indexed_together():
    some = Fragments(torch.randn(3, 2, 4), torch.ones(3, 2, dtype=torch.bool))[torch.tensor([2, 0])]
    assert (some.states.shape, some.mask.shape, some.vector) == ((2, 2, 4), (2, 2), None)
