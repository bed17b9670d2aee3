"""FELGA's equations against naive loops and matrices worked by hand, every reading, and its invariances."""

import math

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.utils.data import DataLoader

from finematch.config import Settings, declared, preset
from finematch.models.configs import FELGAConfig
from finematch.models.felga import (
    FELGA,
    FENet,
    FragmentPairs,
    affinity,
    batch_labels,
    cosine,
    dense,
    dynamic,
    global_affinity,
    global_labels,
    lifted,
    real_pairs,
    share_keyword,
    sparse,
)
from finematch.training import EpochBatches, Plan, fit, whole


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def mask(lengths, n):
    return torch.arange(n)[None] < torch.tensor(lengths)[:, None]


REGIONS, WORDS = mask([4, 2, 3], 4), mask([3, 5, 1], 5)  # three pairs, ragged on both sides
REAL = real_pairs(REGIONS, WORDS)


def table(*rows):
    return torch.tensor([rows])


# -------------------------------------------------------------------------------- 3.2.2 pseudo-labels
def loop_labels(similarity, real, kind):
    """Eq. 3, 4 and 6 for one pair at a time, in words."""
    out = torch.zeros_like(real)
    for n in range(len(real)):
        places = [(i, j) for i in range(real.shape[1]) for j in range(real.shape[2]) if real[n, i, j]]
        d = {(i, j): float(similarity[n, i, j]) for i, j in places}
        for i, j in places:
            column = [d[a, b] for a, b in places if b == j]
            out[n, i, j] = {
                "dense": True,
                "sparse": d[i, j] == max(column),
                "dynamic": d[i, j] >= sum(d.values()) / len(d),
            }[kind]
    return out


@pytest.mark.parametrize(("kind", "make"), [("sparse", sparse), ("dynamic", dynamic)])
@pytest.mark.parametrize("seed", range(5))
def test_labels_are_eq_4_and_6_in_loops(kind, make, seed):
    similarity = cosine(noise(3, 4, 8, seed=seed), noise(3, 5, 8, seed=seed + 50))
    assert torch.equal(make(similarity, REAL), loop_labels(similarity, REAL, kind))


def test_dense_labels_are_eq_3():
    assert torch.equal(dense(REAL), loop_labels(torch.zeros(3, 4, 5), REAL, "dense"))
    assert dense(REAL).sum() == 4 * 3 + 2 * 5 + 3 * 1


def test_labels_by_hand():
    similarity = table([0.9, 0.1, 0.3], [0.2, 0.4, 0.5])  # mean 0.4
    real = torch.ones(1, 2, 3, dtype=torch.bool)
    assert torch.equal(sparse(similarity, real).int(), table([1, 0, 0], [0, 1, 1]))
    assert torch.equal(dynamic(similarity, real).int(), table([1, 0, 0], [0, 1, 1]))
    real = table([True, True, False], [True, True, False])  # without the last keyword the mean is 0.4 as well
    assert torch.equal(dynamic(similarity, real).int(), table([1, 0, 0], [0, 1, 0]))
    real = table([True, True, True], [False, False, False])  # one region: it gets every keyword
    assert torch.equal(sparse(similarity, real).int(), table([1, 1, 1], [0, 0, 0]))
    assert torch.equal(dynamic(similarity, real).int(), table([1, 0, 0], [0, 0, 0]))  # mean 0.433


def test_of_equal_regions_the_first_is_labelled():
    similarity = table([0.1, 0.7], [0.5, 0.7], [0.5, 0.7])
    real = torch.ones(1, 3, 2, dtype=torch.bool)
    assert torch.equal(sparse(similarity, real).int(), table([0, 1], [1, 0], [0, 0]))
    real[:, 0] = False
    assert torch.equal(sparse(similarity, real).int(), table([0, 0], [1, 1], [0, 0]))


@pytest.mark.parametrize("value", [0.1, 0.7, -0.3, 1 / 3])
def test_equal_similarities_are_all_at_the_mean(value):
    """In floating point a sum of n equal numbers, divided by n, can come out above them."""
    for n in range(1, 12):
        real = torch.ones(1, n, 10, dtype=torch.bool)
        assert dynamic(torch.full((1, n, 10), value), real).all()


@pytest.mark.parametrize("lengths", [([0], [3]), ([3], [0]), ([0], [0])])
def test_a_pair_without_fragments_has_no_labels(lengths):
    real = real_pairs(mask(lengths[0], 3), mask(lengths[1], 3))
    for labels in (dense(real), sparse(noise(1, 3, 3), real), dynamic(noise(1, 3, 3), real)):
        assert not labels.any()


def test_padding_changes_no_label():
    similarity = noise(3, 4, 5)
    loud = torch.where(REAL, similarity, torch.full_like(similarity, 99.0))
    quiet = torch.where(REAL, similarity, torch.full_like(similarity, -99.0))
    for make in (sparse, dynamic):
        assert torch.equal(make(loud, REAL), make(quiet, REAL))


def test_cosine_ignores_lengths():
    a, b = noise(2, 3, 6), noise(2, 4, 6, seed=1)
    expected = torch.stack([F.cosine_similarity(a[n][:, None], b[n][None], dim=-1) for n in range(2)])
    torch.testing.assert_close(cosine(3 * a, 0.2 * b), expected)


def test_between_pairs_labels_are_zero():
    labels = dynamic(noise(3, 4, 5), REAL)
    matrix = batch_labels(labels)
    for b in range(3):
        for c in range(3):
            assert torch.equal(matrix[b, :, c], labels[b] if b == c else torch.zeros(4, 5, dtype=torch.bool))


def test_equal_keywords_are_positive_in_every_text():
    """Text 0: dog, ball; text 1: cat, dog. A region of picture 0 that goes with its dog goes with that of text 1."""
    labels = torch.tensor([[[1, 0], [0, 1]], [[0, 1], [0, 0]]]).bool()
    dog, ball, cat = 7, 3, 5
    matrix = batch_labels(labels, torch.tensor([[dog, ball], [cat, dog]])).int()
    assert matrix.flatten(2).flatten(0, 1).tolist() == [
        [1, 0, 0, 1],  # region 0 of picture 0: dog, here and there
        [0, 1, 0, 0],  # region 1: ball
        [1, 0, 0, 1],  # region 0 of picture 1: dog
        [0, 0, 0, 0],
    ]
    distinct = torch.arange(4).view(2, 2)
    assert torch.equal(batch_labels(labels, distinct), batch_labels(labels))


def test_global_labels_are_eq_7():
    assert global_labels(3).int().tolist() == [[1, 0, 0], [0, 1, 0], [0, 0, 1]]


# -------------------------------------------------------------------------------- 3.2.4 FENet, affinities
def test_fenet_is_the_paper_s():
    net = FENet(512)
    shapes = [tuple(layer.weight.shape) for layer in net if isinstance(layer, torch.nn.Linear)]
    assert shapes == [(4096, 512), (4096, 4096), (512, 4096)]
    assert [type(layer).__name__ for layer in net][1:3] == ["ReLU", "Dropout"]
    assert net[2].p == net[5].p == 0.2
    assert round(sum(p.numel() for p in net.parameters()) / 1e6, 1) == 21.0


def test_fenet_is_eq_8_in_steps():
    net, x = FENet(6, hidden_dim=9, out_dim=4).eval(), noise(5, 6)
    h = x
    for layer in (net[0], net[3]):
        h = (h @ layer.weight.T + layer.bias).clamp(min=0)
    out = h @ net[6].weight.T + net[6].bias
    torch.testing.assert_close(net(x), out / out.square().sum(-1, keepdim=True).sqrt())
    assert not torch.equal(net.train()(x), net(x))  # dropout draws


def test_a_relu_behind_the_last_layer_gives_eq_9_its_range():
    """F13, F7: with `every` the same weights give cosines in [0, 1]; without, some are negative."""
    x = noise(40, 6)
    between, every = (FENet(6, hidden_dim=9, out_dim=4, activation=a).eval() for a in ("between", "every"))
    every.load_state_dict(between.state_dict())
    out = between(x)
    torch.testing.assert_close(every(x), F.normalize(out.relu(), dim=-1))
    assert out.min() < 0 <= (every(x) @ every(x).T).min()
    assert [type(layer).__name__ for layer in every][-3:] == ["Linear", "ReLU", "Dropout"]
    assert model(activation="every").region_net.eval()(noise(9, 8)).min() >= 0


def test_affinity_is_eq_9_and_11_in_loops():
    a, b = F.normalize(noise(3, 4, 8), dim=-1), F.normalize(noise(3, 5, 8, seed=1), dim=-1)
    similarity = affinity(a, b)
    pairs, known = global_affinity(similarity, REGIONS[:, :, None, None] & WORDS[None, None])
    assert known.all()
    for n in range(3):
        for m in range(3):
            d = [[float(a[n, i] @ b[m, j]) for j in range(5)] for i in range(4)]
            torch.testing.assert_close(similarity[n, :, m], torch.tensor(d))
            largest = max(d[i][j] for i in range(4) for j in range(5) if REGIONS[n, i] and WORDS[m, j])
            assert pairs[n, m].item() == pytest.approx(largest, abs=1e-6)


def test_a_picture_without_regions_has_no_global_similarity():
    regions = mask([2, 0], 2)
    real = regions[:, :, None, None] & mask([1, 2], 2)[None, None]
    similarity = noise(2, 2, 2, 2).requires_grad_()
    pairs, known = global_affinity(similarity, real)
    assert known.tolist() == [[True, True], [False, False]]
    assert pairs[1].tolist() == [0, 0]
    pairs.sum().backward()
    assert torch.isfinite(similarity.grad).all()
    assert similarity.grad.count_nonzero() == 2  # one pair of fragments for each maximum


# -------------------------------------------------------------------------------- the losses
def log_sum(values):
    return math.log(sum(math.exp(v) for v in values))


def loop_lifted(d, positive, valid, *, margin, loss, hinge, tau, empty, literal_scale=False):
    """The three readings of Eq. 10, one number at a time."""
    rows, columns = range(d.shape[0]), range(d.shape[1])

    def bracket(places):
        places = [p for p in places if valid[p]]
        near = [(margin - float(d[p])) / tau for p in places if positive[p]]
        far = [float(d[p]) / tau for p in places if not positive[p]]
        if not (near and far) and (empty == "skip" or not (near or far)):
            return None
        total = (log_sum(near) if near else 0) + (log_sum(far) if far else 0)
        return max(total, 0) if hinge else total

    def mean(values):
        values = [v for v in values if v is not None]
        return sum(values) / len(values) if values else 0.0

    if loss == "anchor":
        by_row = mean([bracket([(i, j) for j in columns]) for i in rows])
        return (by_row + mean([bracket([(i, j) for i in rows]) for j in columns])) / 2
    if loss == "batch":
        total = mean([bracket([(i, j) for i in rows for j in columns])])
        n_rows, n_columns = int(valid.any(1).sum()), int(valid.any(0).sum())
        return total * n_rows * n_columns if literal_scale else total
    found = []
    for i in rows:
        for j in columns:
            if not (valid[i, j] and positive[i, j]):
                continue
            far = [float(d[i, k]) / tau for k in columns if valid[i, k] and not positive[i, k]]
            far += [float(d[k, j]) / tau for k in rows if valid[k, j] and not positive[k, j]]
            if far:
                each = log_sum(far) + (margin - float(d[i, j])) / tau
                found.append(max(each, 0) ** 2 / 2 if hinge else each)
    return mean(found)


def case(kind):
    """Similarities, labels and validity, 12 x 15; some rows and columns are padding, some lack either sort."""
    d = noise(12, 15, seed=3).clamp(-2, 2) / 2
    valid = REGIONS.flatten()[:, None] & WORDS.flatten()[None]
    positive = noise(12, 15, seed=4) > 0.8
    if kind == "ragged":
        positive[1], positive[4] = True, False
        positive[:, 6], positive[:, 2] = True, False
    elif kind == "no positives":
        positive[:] = False
    elif kind == "no negatives":
        positive[:] = True
    elif kind == "nothing":
        valid[:] = False
    return d, positive, valid


KINDS = ["ragged", "no positives", "no negatives", "nothing"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("loss", ["anchor", "batch", "pair"])
@pytest.mark.parametrize("hinge", [False, True])
@pytest.mark.parametrize("empty", ["skip", "keep"])
@pytest.mark.parametrize(("tau", "margin"), [(1.0, 0.5), (0.1, -0.4)])
def test_losses_are_eq_10_in_loops(kind, loss, hinge, empty, tau, margin):
    d, positive, valid = case(kind)
    form = {"margin": margin, "loss": loss, "hinge": hinge, "tau": tau, "empty": empty}
    d = (d - 1.5 if hinge else d).requires_grad_()  # so that some hinges are closed
    found = lifted(d, positive, valid, **form)
    assert found.item() == pytest.approx(loop_lifted(d.detach(), positive, valid, **form), rel=1e-4, abs=1e-5)
    found.backward()  # the graph is there even if nothing counts
    assert torch.isfinite(d.grad).all()
    assert (d.grad[~valid] == 0).all()


def test_literal_scale_multiplies_by_the_outer_sums():
    d, positive, valid = case("ragged")
    form = {"margin": 0.5, "loss": "batch", "hinge": False, "tau": 1.0, "empty": "skip"}
    found = lifted(d, positive, valid, **form, literal_scale=True)
    assert found.item() == pytest.approx(lifted(d, positive, valid, **form).item() * 9 * 9, rel=1e-6)
    assert found.item() == pytest.approx(
        loop_lifted(d, positive, valid, **form, literal_scale=True), rel=1e-5
    )


def test_loss_by_hand():
    """Two pairs, right ones at 1, wrong ones at 0: each row and column is (1/2 - 1) + 0."""
    eye = torch.eye(2)
    right, valid = eye.bool(), torch.ones(2, 2, dtype=torch.bool)
    assert lifted(eye, right, valid).item() == pytest.approx(-0.5)
    assert lifted(eye, right, valid, hinge=True).item() == 0
    # batch: log 2 e^-0.5 + log 2; pair: -0.5 + log(1 + 1)
    assert lifted(eye, right, valid, loss="batch").item() == pytest.approx(2 * math.log(2) - 0.5)
    assert lifted(eye, right, valid, loss="pair").item() == pytest.approx(math.log(2) - 0.5)
    assert lifted(eye, right, valid, loss="pair", hinge=True).item() == pytest.approx(
        (math.log(2) - 0.5) ** 2 / 2
    )


def test_the_global_loss_in_anchor_form_by_formula():
    """Eq. 12 read by anchors: lambda2 - d_kk + log sum over the others, the row's and the column's mean."""
    d = noise(4, 4)
    other = ~torch.eye(4, dtype=torch.bool)
    total = 0.0
    for k in range(4):
        total += 0.3 - float(d[k, k]) + log_sum(d[k][other[k]].tolist())
        total += 0.3 - float(d[k, k]) + log_sum(d[:, k][other[k]].tolist())
    found = lifted(d, ~other, torch.ones(4, 4, dtype=torch.bool), margin=0.3)
    assert found.item() == pytest.approx(total / 8, rel=1e-5)


@pytest.mark.parametrize("loss", ["anchor", "batch", "pair"])
def test_gradient_pulls_positives_and_pushes_negatives(loss):
    d, positive, valid = case("ragged")
    d.requires_grad_()
    lifted(d, positive, valid, loss=loss).backward()
    assert d.grad[positive & valid].max() <= 0 <= d.grad[~positive & valid].min()
    assert d.grad[positive & valid].min() < 0 < d.grad[~positive & valid].max()


@pytest.mark.parametrize("loss", ["anchor", "batch", "pair"])
@pytest.mark.parametrize("hinge", [False, True])
@pytest.mark.parametrize("tau", [1.0, 0.2])
def test_gradient_is_the_finite_difference(loss, hinge, tau):
    d, positive, valid = case("ragged")
    d = d.double().requires_grad_()

    def value(x):
        return lifted(x, positive, valid, loss=loss, hinge=hinge, tau=tau)

    value(d).backward()
    for place in ((0, 0), (1, 1), (4, 5), (8, 10), (2, 7), (3, 3)):
        shift = torch.zeros_like(d)
        shift[place] = 1e-5
        slope = (value(d.detach() + shift) - value(d.detach() - shift)) / 2e-5
        assert d.grad[place].item() == pytest.approx(slope.item(), abs=1e-6)


@pytest.mark.parametrize("loss", ["anchor", "batch", "pair"])
def test_extreme_exponents_stay_finite(loss):
    d, positive, valid = case("ragged")
    d.requires_grad_()
    value = lifted(d, positive, valid, loss=loss, tau=1e-3)  # e^1000 is not a float
    value.backward()
    assert torch.isfinite(value)
    assert torch.isfinite(d.grad).all()


@pytest.mark.parametrize(
    "bad", [{"loss": "row"}, {"empty": "zero"}, {"tau": 0.0}, {"literal_scale": True, "loss": "anchor"}]
)
def test_lifted_refuses(bad):
    with pytest.raises(ValueError, match=r"use 'anchor', 'batch', 'pair'|use 'skip', 'keep'|positive|batch"):
        lifted(torch.eye(2), torch.eye(2).bool(), torch.ones(2, 2, dtype=torch.bool), **bad)


# -------------------------------------------------------------------------------- the whole model, Eq. 13
def model(**options):
    torch.manual_seed(0)
    width = {"text_width": options.pop("text_width", None)}
    form = {"hidden_dim": 24, "out_dim": 6, "dropout": 0.0, "global_negatives": "all"}  # Eq. 12 as printed
    return FELGA(8, FELGAConfig(**{**form, **options}), **width)


def batch(seed=0):
    """Three ragged pairs; one keyword of the first text is one of the second's."""
    ids = torch.tensor([[1, 2, 3, 0, 0], [4, 1, 5, 6, 7], [8, 0, 0, 0, 0]])
    return {
        "image": {"features": noise(3, 4, 8, seed=seed), "mask": REGIONS.clone()},
        "text": {"features": noise(3, 5, 8, seed=seed + 1), "mask": WORDS.clone(), "keyword_id": ids},
    }


def gradients(m, x):
    m.zero_grad()
    m(x)["loss"].backward()
    return torch.cat([p.grad.flatten() for p in m.parameters()])


def loop_terms(m, x, *, loss="anchor", lambda1=0.5, lambda2=0.5):
    """Eq. 8-12 of dynamic labels from frozen features, pair by pair."""
    a, b = x["image"]["features"], x["text"]["features"]
    e, f = m.encode_regions(a).detach(), m.encode_words(b).detach()
    n, r, k = 3, 4, 5
    d, labels = torch.zeros(n * r, n * k), torch.zeros(n * r, n * k, dtype=torch.bool)
    own = loop_labels(F.cosine_similarity(a[:, :, None], b[:, None], dim=-1), REAL, "dynamic")
    whole_pairs = torch.full((n, n), -2.0)
    valid = torch.zeros_like(labels)
    for p in range(n):
        for q in range(n):
            for i in range(r):
                for j in range(k):
                    s = float(e[p, i] @ f[q, j])
                    d[p * r + i, q * k + j] = s
                    labels[p * r + i, q * k + j] = p == q and bool(own[p, i, j])
                    valid[p * r + i, q * k + j] = real = bool(REGIONS[p, i] and WORDS[q, j])
                    if real:
                        whole_pairs[p, q] = max(float(whole_pairs[p, q]), s)
    form = {"loss": loss, "hinge": False, "tau": 1.0, "empty": "skip"}
    every = torch.ones(n, n, dtype=torch.bool)
    return {
        "fragment": loop_lifted(d, labels, valid, margin=lambda1, **form),
        "global": loop_lifted(whole_pairs, torch.eye(n).bool(), every, margin=lambda2, **form),
    }


@pytest.mark.parametrize("loss", ["anchor", "batch", "pair"])
def test_loss_is_eq_13_in_loops(loss):
    m, x = model(loss=loss, lambda1=0.3, lambda2=0.7, lambda3=2.0), batch()
    terms, expected = m(x), loop_terms(m, x, loss=loss, lambda1=0.3, lambda2=0.7)
    assert terms["fragment"].item() == pytest.approx(expected["fragment"], rel=1e-4)
    assert terms["global"].item() == pytest.approx(expected["global"], rel=1e-4)
    assert terms["loss"].item() == pytest.approx(expected["fragment"] + 2 * expected["global"], rel=1e-4)


def test_alignment_is_table_4():
    x = batch()
    both, local, everything = model()(x), model(alignment="local")(x), model(alignment="global")(x)
    assert set(both) == {"fragment", "global", "loss"}
    assert set(local) == {"fragment", "loss"}
    assert set(everything) == {"global", "loss"}
    assert local["loss"].item() == both["fragment"].item() == local["fragment"].item()
    assert everything["loss"].item() == pytest.approx(0.2 * both["global"].item())
    torch.testing.assert_close(gradients(model(lambda3=0.0), x), gradients(model(alignment="local"), x))


@pytest.mark.parametrize("alignment", ["both", "local", "global"])
@pytest.mark.parametrize("fenet", ["shared", "separate"])
def test_every_parameter_learns(alignment, fenet):
    m = model(alignment=alignment, fenet=fenet)
    m(batch())["loss"].backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in m.parameters())


@pytest.mark.parametrize("loss", ["anchor", "batch", "pair"])
def test_without_hinge_lambda_1_and_2_move_no_gradient(loss):
    """log sum e^(lambda - d) = lambda + log sum e^-d: a constant, whatever its value (register F3)."""
    x = batch()
    plain, other = model(loss=loss), model(loss=loss, lambda1=-3.0, lambda2=4.0)
    torch.testing.assert_close(gradients(plain, x), gradients(other, x), rtol=1e-4, atol=1e-7)
    assert plain(x)["fragment"].item() - other(x)["fragment"].item() == pytest.approx(3.5, abs=1e-4)
    assert plain(x)["global"].item() - other(x)["global"].item() == pytest.approx(-3.5, abs=1e-4)


@pytest.mark.parametrize("loss", ["anchor", "batch", "pair"])
@pytest.mark.parametrize("margin", ["lambda1", "lambda2"])
def test_with_hinge_they_do(loss, margin):
    x = batch()
    plain = gradients(model(loss=loss, hinge=True), x)
    closed = gradients(model(loss=loss, hinge=True, **{margin: -20.0}), x)
    assert not torch.allclose(plain, closed, rtol=1e-2)
    assert gradients(model(loss=loss, hinge=True, lambda1=-20.0, lambda2=-20.0), x).abs().max() == 0


@pytest.mark.parametrize("labels", ["dense", "sparse", "dynamic"])
def test_labels_switch(labels):
    m, x = model(labels=labels), batch()
    found = m.pseudo_labels(x["image"]["features"], x["text"]["features"], REGIONS, WORDS)
    similarity = cosine(x["image"]["features"], x["text"]["features"])
    assert torch.equal(found, loop_labels(similarity, REAL, labels))


def test_online_labels_come_from_the_embeddings():
    x = batch()
    frozen, online = model(labels="sparse"), model(labels="sparse", label_features="online")
    assert frozen(x)["fragment"].item() != pytest.approx(online(x)["fragment"].item(), rel=1e-5)
    # features that FENet maps onto themselves, but for their length, give the same labels either way
    for m in (frozen, online):
        m.region_net = m.word_net = torch.nn.Identity()
        m.region_net.forward = lambda v: F.normalize(v, dim=-1)
    assert frozen(x)["fragment"].item() == pytest.approx(online(x)["fragment"].item(), rel=1e-5)


def test_texts_that_share_a_keyword_are_no_negatives_of_each_other():
    """F26: Eq. 12 with a pair left out by hand; padding shares nothing."""
    g = torch.Generator().manual_seed(0)
    batch = {
        "image": {"features": torch.randn(3, 2, 8, generator=g), "mask": torch.ones(3, 2, dtype=torch.bool)},
        "text": {"features": torch.randn(3, 2, 8, generator=g), "mask": torch.tensor([[1, 1], [1, 0], [1, 1]]).bool(),
                 "keyword_id": torch.tensor([[4, 5], [6, 4], [5, 7]])},  # texts 0 and 2 share 5; 4 of text 1 is padding
    }  # fmt: skip
    m = model(alignment="global", global_negatives="distinct", hidden_dim=16, out_dim=8, dropout=0.0).eval()
    shared = share_keyword(batch["text"]["keyword_id"], batch["text"]["mask"])
    assert shared.tolist() == [[True, False, True], [False, True, False], [True, False, True]]
    regions, words = m.encode(batch["image"]["features"], batch["text"]["features"])
    real = batch["image"]["mask"][:, :, None, None] & batch["text"]["mask"][None, None]
    table, known = global_affinity(affinity(regions, words), real)
    known[0, 2] = known[2, 0] = False
    wanted = lifted(table, torch.eye(3, dtype=torch.bool), known, margin=m.config.lambda2, **m.form)
    torch.testing.assert_close(m(batch)["global"], wanted)
    every = model(alignment="global", hidden_dim=16, out_dim=8, dropout=0.0).eval()
    every.load_state_dict(m.state_dict())
    assert abs(every(batch)["global"] - wanted) > 1e-4


def test_same_keyword_switch():
    x = batch()
    off, on = model(labels="dense"), model(labels="dense", same_keyword_positives=True)
    assert off(x)["fragment"].item() != pytest.approx(on(x)["fragment"].item(), rel=1e-5)
    assert off(x)["global"].item() == on(x)["global"].item()
    x["text"]["keyword_id"] = torch.arange(15).view(3, 5)
    assert off(x)["fragment"].item() == pytest.approx(on(x)["fragment"].item(), rel=1e-6)


def test_separate_nets_take_different_widths():
    torch.manual_seed(0)
    m = FELGA(8, FELGAConfig(fenet="separate", labels="dense", hidden_dim=12, out_dim=4), text_width=5)
    x = batch()
    x["text"]["features"] = noise(3, 5, 5)
    assert torch.isfinite(m(x)["loss"])
    assert m.encode_words(noise(2, 5)).shape == m.encode_regions(noise(2, 8)).shape == (2, 4)
    shared, apart = model(), model(fenet="separate")
    assert shared.word_net is shared.region_net
    assert 2 * sum(p.numel() for p in shared.parameters()) == sum(p.numel() for p in apart.parameters())


@pytest.mark.parametrize("input_scale", ["rms", "unit"])
def test_input_scale(input_scale):
    m, x = model(input_scale=input_scale).eval(), 3 * noise(5, 8)
    unit = x / x.square().sum(-1, keepdim=True).sqrt()
    expected = {"rms": unit * math.sqrt(8), "unit": unit}[input_scale]
    torch.testing.assert_close(m.encode_regions(x), m.region_net(expected))
    torch.testing.assert_close(m.encode_words(x), m.word_net(expected))
    torch.testing.assert_close(m.encode_regions(x), m.encode_regions(2 * x), atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    "options",
    [{}, {"labels": "sparse"}, {"loss": "pair"}, {"loss": "batch"}, {"same_keyword_positives": True}],
)
def test_padding_changes_neither_loss_nor_gradient(options):
    m, x = model(**options), batch()
    quiet, expected = gradients(m, x), m(x)["loss"].item()
    for value in (1e4, float("nan"), float("inf")):
        loud = batch()
        loud["image"]["features"][~REGIONS] = value
        loud["text"]["features"][~WORDS] = value
        assert m(loud)["loss"].item() == pytest.approx(expected, rel=1e-6)
        torch.testing.assert_close(gradients(m, loud), quiet)
    wide = {
        "image": {"features": F.pad(x["image"]["features"], (0, 0, 0, 3)), "mask": F.pad(REGIONS, (0, 3))},
        "text": {"features": F.pad(x["text"]["features"], (0, 0, 0, 2)), "mask": F.pad(WORDS, (0, 2)),
                 "keyword_id": F.pad(x["text"]["keyword_id"], (0, 2))},
    }  # fmt: skip
    assert m(wide)["loss"].item() == pytest.approx(expected, rel=1e-5)
    torch.testing.assert_close(gradients(m, wide), quiet, rtol=1e-4, atol=1e-6)


def test_order_changes_nothing():
    """Of pairs, of regions, of keywords: sums and maxima do not know it."""
    m, x = model(), batch()
    pairs, regions, words = torch.tensor([2, 0, 1]), torch.tensor([3, 1, 0, 2]), torch.tensor([4, 2, 0, 3, 1])
    moved = {
        "image": {k: v[pairs][:, regions] for k, v in x["image"].items()},
        "text": {k: v[pairs][:, words] for k, v in x["text"].items()},
    }
    for name, value in m(x).items():
        assert m(moved)[name].item() == pytest.approx(value.item(), rel=1e-5)
    torch.testing.assert_close(gradients(m, moved), gradients(m, x), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    "options", [{}, {"empty": "keep"}, {"loss": "batch"}, {"loss": "pair"}, {"labels": "sparse"}]
)
@pytest.mark.parametrize("kind", ["one pair bare", "all bare", "a batch of one"])
def test_missing_fragments_leave_finite_gradients(options, kind):
    m, x = model(**options), batch()
    if kind == "a batch of one":
        x = {side: {k: v[:1] for k, v in parts.items()} for side, parts in x.items()}
    else:
        x["image"]["mask"][slice(None) if kind == "all bare" else 1] = False
    assert torch.isfinite(gradients(m, x)).all()
    if kind == "all bare":
        assert m(x)["loss"].item() == 0
    if kind == "one pair bare" and options != {"empty": "keep"}:
        # a text without a picture only adds its keywords to the others' negatives
        x["text"]["mask"][1] = False
        rest = {side: {k: v[[0, 2]] for k, v in parts.items()} for side, parts in x.items()}
        assert m(x)["fragment"].item() == pytest.approx(m(rest)["fragment"].item(), rel=1e-5)


@pytest.mark.parametrize("loss", ["anchor", "batch", "pair"])
def test_under_bf16_the_losses_are_fp32(loss):
    """FENet's products may be rounded; of what follows, nothing is: the loss is that of the rounded embeddings."""
    m, x = model(loss=loss, tau=0.05).train(), batch()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        terms = m(x)
        regions, words = m.encode(x["image"]["features"], x["text"]["features"])
    assert {v.dtype for v in terms.values()} == {regions.dtype} == {torch.float32}
    real = REGIONS[:, :, None, None] & WORDS[None, None]
    labels = batch_labels(m.pseudo_labels(x["image"]["features"], x["text"]["features"], REGIONS, WORDS))
    flat = (v.flatten(2, 3).flatten(0, 1) for v in (affinity(regions, words), labels, real))
    assert terms["fragment"].item() == pytest.approx(lifted(*flat, loss=loss, tau=0.05).item(), rel=1e-6)
    assert terms["loss"].item() == pytest.approx(m(x)["loss"].item(), rel=0.05)
    terms["loss"].backward()
    assert all(torch.isfinite(p.grad).all() for p in m.parameters())


def test_encoding_is_that_of_training_and_of_each_alone():
    m, x = model().eval(), batch()
    regions, words = m.encode(x["image"]["features"], x["text"]["features"])
    torch.testing.assert_close(m.encode_regions(x["image"]["features"]), regions)
    torch.testing.assert_close(m.encode_words(x["text"]["features"][1, 2]), words[1, 2])
    torch.testing.assert_close(words.norm(dim=-1), torch.ones(3, 5))


@pytest.mark.parametrize(
    "bad",
    [{"labels": "soft"}, {"alignment": "none"}, {"label_features": "fresh"}, {"fenet": "one"}, {"loss": "row"},
     {"empty": "zero"}, {"tau": -1.0}, {"input_scale": "log"}, {"text_width": 5}, {"literal_scale": True},
     {"text_width": 5, "fenet": "separate"}],
)  # fmt: skip
def test_model_refuses(bad):
    with pytest.raises(ValueError, match=r"use |must lie in|batch"):
        model(**bad)


# -------------------------------------------------------------------------------- two processes
def two_processes(rank, folder):
    """Half of the pairs in each of two gloo processes: the loss of all, and the mean of the gradients."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    m, mine = model(same_keyword_positives=True), slice(2 * rank, 2 * rank + 2)
    x = {side: {k: v[mine] for k, v in parts.items()} for side, parts in four().items()}
    g = gradients(m, x)
    dist.all_reduce(g)
    torch.save([m(x)["loss"].detach(), g / 2], f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def four():
    x = batch()
    return {side: {k: torch.cat([v, v[:1] if k != "features" else v[:1].flip(1)]) for k, v in parts.items()}
            for side, parts in x.items()}  # fmt: skip


def test_two_processes_give_the_loss_and_gradients_of_one(tmp_path):
    torch.multiprocessing.spawn(two_processes, args=(str(tmp_path),), nprocs=2)
    m = model(same_keyword_positives=True)
    expected, loss = gradients(m, four()), m(four())["loss"]
    for rank in (0, 1):
        theirs, gradient = torch.load(tmp_path / f"{rank}.pt")
        torch.testing.assert_close(theirs, loss.detach())
        torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-6)


# -------------------------------------------------------------------------------- pairs as batches
def pairs(n=20, d=8, dtype=torch.float32, seed=0):
    """Three of ten concepts a pair: the keywords name what the regions show, in another place of the space."""
    seen = noise(10, d, seed=99)
    named = seen + noise(10, d, seed=98)
    which = torch.randint(10, (n, 3), generator=torch.Generator().manual_seed(seed))
    regions = seen[which] + 0.6 * noise(n, 3, d, seed=seed + 1)
    words = named[which.flip(1)]
    real = torch.ones(n, 3, dtype=torch.bool)
    return FragmentPairs(regions.to(dtype), words.to(dtype), real, real.clone(), which.flip(1))


def test_a_batch_is_the_rows_asked_for():
    data = pairs(dtype=torch.float16)
    got = data.__getitems__([5, 0, 5])
    for side, features, real in (
        ("image", data.regions, data.region_mask),
        ("text", data.keywords, data.keyword_mask),
    ):
        assert got[side]["features"].dtype == torch.float32
        assert torch.equal(got[side]["features"], features[[5, 0, 5]].float())
        assert torch.equal(got[side]["mask"], real[[5, 0, 5]])
    assert torch.equal(got["text"]["keyword_id"], data.keyword_id[[5, 0, 5]])
    assert torch.equal(data[3]["image"]["features"], data.regions[3:4].float())
    assert len(data) == 20
    without = FragmentPairs(data.regions, data.keywords, data.region_mask, data.keyword_mask)
    assert "keyword_id" not in without[0]["text"]


def test_several_texts_of_a_picture_share_its_regions():
    """F20, a caption is a text: a picture's regions are kept once and stand in a pair for each of its texts."""
    data = pairs(6)
    arrays = (data.regions[:2], data.keywords, data.region_mask[:2], data.keyword_mask, data.keyword_id)
    several = FragmentPairs(*arrays, picture_of=torch.tensor([0, 0, 0, 1, 1, 1]))
    assert len(several) == 6
    got = several.to("cpu").__getitems__([4, 1])
    assert torch.equal(got["image"]["features"], data.regions[[1, 0]])
    assert torch.equal(got["text"]["features"], data.keywords[[4, 1]])


def test_moved_pairs_are_the_same():
    data = pairs()
    moved = data.to("cpu")
    assert moved.device == torch.device("cpu")
    assert torch.equal(moved[2]["text"]["features"], data[2]["text"]["features"])
    assert data.to("meta").device == torch.device("meta")


def test_a_loader_gives_every_pair_once():
    data = pairs(20)
    data.keyword_id[:, 0] = torch.arange(20)
    loader = DataLoader(data, batch_sampler=EpochBatches(20, 8, seed=0, epoch=0), collate_fn=whole)
    seen = [x["text"]["keyword_id"][:, 0].tolist() for x in loader]
    assert [len(x) for x in seen] == [8, 8]
    assert len({i for x in seen for i in x}) == 16


def test_pairs_refuse():
    data = pairs(4)
    arrays = [data.regions, data.keywords, data.region_mask, data.keyword_mask]
    with pytest.raises(ValueError, match="4 pictures' regions, but keywords of 3 texts"):
        FragmentPairs(arrays[0], arrays[1][:3], arrays[2], arrays[3][:3])
    arrays[1][2, 1, 0] = float("nan")
    with pytest.raises(ValueError, match="keywords of pair 2 are not finite"):
        FragmentPairs(*arrays)
    arrays[3][2, 1] = False
    FragmentPairs(*arrays)  # padding may hold anything


def test_fit_teaches_fragments_to_find_each_other(tmp_path):
    """On new pairs a region's nearest keyword is that of its own concept more often than before training."""
    data, new = pairs(160), pairs(40, seed=7)
    m = model(hidden_dim=64, out_dim=16, dropout=0.2)
    plan = Plan(
        epochs=4, batch_size=8, lr=0.1, optimizer="sgd", weight_decay=5e-4, schedule="step", milestones=(3.0,)
    )

    def hits():
        with torch.no_grad():
            s = m.encode_regions(new.regions).flatten(0, 1) @ m.encode_words(new.keywords).flatten(0, 1).T
        nearest = new.keyword_id.flatten()[s.argmax(1)]
        return (nearest == new.keyword_id.flip(1).flatten()).float().mean().item()

    before = m.eval() and hits()
    history = fit(m, data, plan, tmp_path, echo=None)["history"]
    assert history[-1]["fragment"] < history[0]["fragment"]
    assert history[-1]["global"] < history[0]["global"]
    assert hits() > before + 0.1


# -------------------------------------------------------------------------------- settings
def test_the_paper_s_settings():
    s = Settings("felga", {"scale": "paper", "dataset": "coco"})
    assert (s.lr, s.momentum, s.weight_decay) == (0.1, 0.9, 5e-4)
    assert (s.epochs, s.milestone, s.batch_size) == (50, 40.0, 8)
    assert (s.regions, s.words, s.hidden_dim, s.out_dim, s.dropout) == (10, 10, 4096, 512, 0.2)


def test_settings_take_what_is_set():
    tiny, photos = Settings("felga", {}), Settings("felga", {"dataset": "flickr8k"})
    for name, one in declared("felga").items():
        if one.presets:
            assert (getattr(tiny, name), getattr(photos, name)) == (
                one.presets["tiny"],
                one.presets["photos"],
            )
    given = {
        "epochs": 3,
        "lr": 0.0,
        "dropout": 0.0,
        "momentum": None,
        "weight_decay": 0.0,
        "precision": None,
        "seed": 4,
    }
    changed = {"epochs": 3, "lr": 0.0, "dropout": 0.0, "weight_decay": 0.0, "seed": 4}
    assert Settings("felga", given).as_dict() == tiny.as_dict() | changed
    smoke = Settings("felga", {"smoke": True})
    assert (smoke.epochs, smoke.batch_size) == (1, preset("felga", "tiny")["batch_size"])


def test_the_literal_reading_is_the_papers_text():
    """The constant of the outer sums (`literal_scale`) is left out: with it training diverges (F6)."""
    text = {
        "label_features": "frozen", "fenet": "shared", "input_scale": "rms", "loss": "batch", "literal_scale": False,
        "hinge": False, "tau": 1.0, "empty": "skip", "same_keyword_positives": False, "activation": "between",
        "global_negatives": "all",
    }  # fmt: skip
    assert FELGAConfig.literal() == text
    assert Settings("felga", {"scale": "paper"}).as_dict().items() >= text.items()
    assert Settings("felga", {"reading": "literal"}).loss == "batch"
    for scale, reading in (("tiny", "literal"), ("paper", "literal"), ("paper", None)):
        assert Settings("felga", {"scale": scale, "reading": reading}).train_keywords == "all"
    ours = Settings("felga", {"scale": "paper", "reading": "default"})
    assert (ours.train_keywords, ours.global_negatives) == ("nouns", "distinct")
    assert Settings("felga", {"scale": "paper", "reading": "default"}).loss == "anchor"


@pytest.mark.parametrize(("argument", "value"), [(r[1], v) for r in FELGAConfig.readings() for v in r[2]])
def test_every_reading_trains(argument, value):
    options = {argument: value} | ({"loss": "batch"} if argument == "literal_scale" else {})
    if argument == "tau":
        options["tau"] = max(value, 0.01)  # the least that is allowed overflows
    loss = model(**options)(batch())["loss"]
    loss.backward()
    assert torch.isfinite(loss)
