"""MVAM's equations against naive loops and tensors worked by hand, every reading, and its invariances."""

import math

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

from finematch import rebuild
from finematch.config import Settings
from finematch.encoders import GRUTower, Tokens, TokenTransformer
from finematch.losses import contrastive
from finematch.models.configs import MVAMConfig
from finematch.models.mvam import (
    MVAM,
    TokenPooling,
    ViewAttention,
    diversity,
    ensemble,
    view_statistics,
)
from finematch.training import Plan


def tokens(b=3, n=7, d=12, seed=0, pads=(0, 2, 4)):
    g = torch.Generator().manual_seed(seed)
    states = torch.randn(b, n, d, generator=g)
    mask = torch.arange(n)[None] < n - torch.tensor(pads)[:b, None]
    special = torch.zeros(b, n, dtype=torch.bool)
    special[:, 0] = True
    return Tokens(states, mask, special, states[:, 0])


# -------------------------------------------------------------------------------- 3.1
def test_cls_pooling_is_eq_2():
    t, head = tokens(), TokenPooling(12, 8)
    expected = torch.stack([torch.tanh(head.project.weight @ h + head.project.bias) for h in t.states[:, 0]])
    torch.testing.assert_close(head(t).vector, expected)


def test_mean_pooling_skips_padding_and_special_tokens():
    t, head = tokens(), TokenPooling(12, 8, source="mean")
    expected = torch.stack(
        [head.project(t.states[i, 1 : int(t.mask[i].sum())].mean(0)).tanh() for i in range(3)]
    )
    torch.testing.assert_close(head(t).vector, expected)


# -------------------------------------------------------------------------------- 3.3
@pytest.mark.parametrize("projection", ["split", "shared", "full"])
@pytest.mark.parametrize("scoring", ["dot", "scaled", "tanh"])
@pytest.mark.parametrize("include_special", [True, False])
def test_view_attention_is_eq_7_to_9_in_loops(projection, scoring, include_special):
    t = tokens()
    head = ViewAttention(12, views=4, total_dim=8, projection=projection, view_dim=3, scoring=scoring,
                         include_special=include_special)  # fmt: skip
    vector, attention = head(t)
    k = {"split": 2, "shared": 3, "full": 8}[projection]
    assert vector.shape == (3, 4 * k) == (3, head.out_dim)
    for b in range(3):
        parts = []
        for v in range(4):
            keys, logits = [], []
            for n in range(7):
                h = head.project.weight @ t.states[b, n] + head.project.bias
                key = h[v * k : (v + 1) * k] if projection == "split" else h
                keys.append(key)
                asked = key.tanh() if scoring == "tanh" else key
                logit = float((head.codes[v] * asked).sum()) / (math.sqrt(k) if scoring == "scaled" else 1)
                allowed = bool(t.mask[b, n]) and (include_special or not bool(t.special[b, n]))
                logits.append(math.exp(logit) if allowed else 0.0)
            a = [x / sum(logits) for x in logits]
            torch.testing.assert_close(attention[b, v], torch.tensor(a), rtol=1e-4, atol=1e-6)
            parts.append(sum(w * key for w, key in zip(a, keys, strict=True)))
        torch.testing.assert_close(vector[b], torch.cat(parts), rtol=1e-4, atol=1e-5)


def test_by_hand():
    """One view of width 1, identity projection, code ln 2: tokens 0 and 1 weigh 1 : 2."""
    head = ViewAttention(1, views=1, total_dim=1)
    with torch.no_grad():
        head.project.weight.fill_(1.0)
        head.project.bias.fill_(0.0)
        head.codes.fill_(math.log(2))
    states = torch.tensor([[[0.0], [1.0], [5.0]]])
    mask = torch.tensor([[True, True, False]])
    vector, attention = head(Tokens(states, mask, torch.zeros_like(mask), states[:, 0]))
    torch.testing.assert_close(attention, torch.tensor([[[1 / 3, 2 / 3, 0.0]]]))
    torch.testing.assert_close(vector, torch.tensor([[2 / 3]]))


def test_one_view_is_the_same_model_in_split_and_full():
    """Table 4's row "1" is Table 1's "+Attn": one view has one meaning, whatever the projection."""
    t, split = tokens(), ViewAttention(12, views=1, total_dim=8)
    full = ViewAttention(12, views=1, total_dim=8, projection="full")
    full.load_state_dict(split.state_dict())
    torch.testing.assert_close(split(t).vector, full(t).vector)
    torch.testing.assert_close(split(t).attention, full(t).attention)


@pytest.mark.parametrize("projection", ["split", "shared"])
def test_padding_never_changes_a_result(projection):
    t = tokens()
    head = ViewAttention(12, views=4, total_dim=8, projection=projection, view_dim=3)
    loud = torch.where(t.mask[..., None], t.states, torch.full_like(t.states, 1e4))
    torch.testing.assert_close(head(t).vector, head(t._replace(states=loud)).vector)
    assert (head(t).attention[~t.mask[:, None].expand(-1, 4, -1)] == 0).all()
    alone = Tokens(t.states[2:, :3], t.mask[2:, :3], t.special[2:, :3], t.pooled[2:])
    torch.testing.assert_close(head(alone).vector, head(t).vector[2:])


def test_order_of_tokens_never_changes_the_vector():
    t, order = tokens(pads=(0, 0, 0)), torch.randperm(7)
    head = ViewAttention(12, views=4, total_dim=8)
    moved = Tokens(t.states[:, order], t.mask[:, order], t.special[:, order], t.pooled)
    torch.testing.assert_close(head(moved).vector, head(t).vector, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    "bad",
    [{"views": 0}, {"views": 5, "total_dim": 8}, {"projection": "own"}, {"scoring": "cosine"}],
)
def test_view_attention_refuses(bad):
    with pytest.raises(ValueError, match=r"views|projection|scoring"):
        ViewAttention(12, **bad)
    with pytest.raises(ValueError, match="source"):
        TokenPooling(12, source="max")


# -------------------------------------------------------------------------------- 3.4
def loop_diversity(attention, variant, power, reduce):
    total = 0.0
    for a in attention.double():
        a = a.sqrt() if variant == "sqrt" else a
        excess = a @ a.T - torch.eye(len(a), dtype=torch.float64)
        squared = sum(float(x) ** 2 for x in excess.flatten())
        total += squared if power == 2 else math.sqrt(squared)
    return total / (len(attention) if reduce == "mean" else 1)


@pytest.mark.parametrize("variant", ["base", "sqrt"])
@pytest.mark.parametrize("power", [1, 2])
@pytest.mark.parametrize("reduce", ["mean", "sum"])
def test_diversity_is_eq_10_and_11_in_loops(variant, power, reduce):
    attention = torch.randn(3, 4, 9, generator=torch.Generator().manual_seed(0)).softmax(-1)
    assert diversity(attention, variant=variant, power=power, reduce=reduce).item() == pytest.approx(
        loop_diversity(attention, variant, power, reduce), rel=1e-5
    )


def test_diversity_by_hand():
    """Two views on (1/2, 1/2): A A^T is 1/2 everywhere, so base = 4 * 1/4 = 1; sqrt: all ones, so 2 * 1 = 2."""
    half = torch.full((1, 2, 2), 0.5)
    assert diversity(half).item() == pytest.approx(1.0)
    assert diversity(half, variant="sqrt").item() == pytest.approx(2.0, rel=1e-5)
    one_hot = torch.eye(2)[None]
    assert diversity(one_hot).item() == 0
    assert diversity(one_hot, variant="sqrt").item() == pytest.approx(0, abs=1e-9)


def test_only_the_root_leaves_the_size_of_a_view_free():
    """16 views, each uniform over 12 tokens of its own: disjoint, but not sharp."""
    attention = torch.zeros(1, 16, 197)
    for v in range(16):
        attention[0, v, 12 * v : 12 * v + 12] = 1 / 12
    assert diversity(attention).item() == pytest.approx(16 * (1 - 1 / 12) ** 2, rel=1e-5)  # 13.44
    assert diversity(attention, variant="sqrt").item() == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("variant", ["base", "sqrt"])
@pytest.mark.parametrize("power", [1, 2])
def test_diversity_gradient_is_the_finite_difference(variant, power):
    logits = torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(1)).requires_grad_()

    def loss(x):
        return diversity(x.softmax(-1), variant=variant, power=power)

    loss(logits).backward()
    step = 1e-2
    for place in ((0, 0, 0), (1, 2, 4), (0, 1, 3)):
        shift = torch.zeros_like(logits)
        shift[place] = step
        slope = (loss(logits.detach() + shift) - loss(logits.detach() - shift)) / (2 * step)
        assert logits.grad[place].item() == pytest.approx(slope.item(), abs=5e-3)


def test_diversity_with_masked_tokens_has_finite_gradients():
    logits = torch.randn(2, 3, 5).requires_grad_()
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 0, 0, 0]]).bool()
    attention = logits.masked_fill(~mask[:, None], float("-inf")).softmax(-1)
    diversity(attention, variant="sqrt").backward()
    assert torch.isfinite(logits.grad).all()
    assert (logits.grad[~mask[:, None].expand(-1, 3, -1)] == 0).all()


@pytest.mark.parametrize("bad", [{"variant": "cosine"}, {"power": 3}, {"reduce": "max"}])
def test_diversity_refuses(bad):
    with pytest.raises(ValueError, match=r"variant|power"):
        diversity(torch.ones(1, 1, 1), **bad)


def test_view_statistics():
    attention = torch.tensor([[[0.5, 0.5, 0.0], [1.0, 0.0, 0.0]]])
    entropy, overlap = view_statistics(attention, torch.tensor([[True, True, False]]))
    torch.testing.assert_close(entropy, torch.tensor([1.0, 0.0]))
    torch.testing.assert_close(overlap, torch.tensor([[1, math.sqrt(0.5)], [math.sqrt(0.5), 1]]))


# -------------------------------------------------------------------------------- the whole model
def model(**options):
    torch.manual_seed(0)
    vision = TokenTransformer(6, width=16, depth=1, heads=2, boxes=True, dropout=0.0)
    text = GRUTower(30, embed=8, width=16, dropout=0.0)
    return MVAM(vision, text, MVAMConfig(**{"views": 4, "total_dim": 16, "view_dim": 4, **options})).eval()


def batch(b=5, seed=0):
    g = torch.Generator().manual_seed(seed)
    ids = torch.randint(5, 30, (b, 6), generator=g)
    length = torch.tensor([6, 3, 5, 4, 6, 2, 3, 6])[:b]
    mask = torch.arange(6)[None] < length[:, None]
    special = torch.zeros_like(mask)
    special[:, 0] = True
    return {
        "image": {"features": torch.randn(b, 9, 6, generator=g), "mask": torch.ones(b, 9, dtype=torch.bool),
                  "places": torch.rand(b, 9, 5, generator=g)},
        "text": {"input_ids": ids * mask, "mask": mask, "special": special},
        "image_id": torch.arange(b) // 2,
    }  # fmt: skip


@pytest.mark.parametrize("pooling", ["cls", "mean", "attention", "mvam"])
def test_every_parameter_learns(pooling):
    """Eq. 13 reaches everything that it should: no tower, head, code or temperature is left out."""
    m = model(pooling=pooling)
    m(batch())["loss"].backward()
    unused = [n for n, p in m.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    # the attention's key bias shifts all logits of a softmax alike; a mean never looks at [IMG]
    allowed = {"vision.token"} if pooling == "mean" else set()
    assert not [n for n in unused if n not in allowed and not n.endswith("in_proj_bias")]


@pytest.mark.parametrize("form", ["base", "sqrt"])
def test_loss_is_eq_12_and_13(form):
    m, x = model(diversity=form, diversity_weight=3.0), batch()
    terms = m(x)
    for kind, attention in (
        ("image", m.encode_image(**x["image"]).attention),
        ("text", m.encode_text(**x["text"]).attention),
    ):
        torch.testing.assert_close(terms[f"diversity_{kind}"], diversity(attention, variant=form))
    torch.testing.assert_close(
        terms["loss"], terms["contrastive"] + 3 * (terms["diversity_image"] + terms["diversity_text"])
    )
    assert set(model(diversity="none")(x)) == {"contrastive", "loss"}
    assert set(model(pooling="attention")(x)) == {"contrastive", "loss"}


def test_score_of_concatenated_views_is_a_weighted_sum_of_their_products():
    """M15: view k of the picture meets view k of the text; no pairing is searched."""
    m, x = model(), batch()
    image, text = m.encode_image(**x["image"]).vector, m.encode_text(**x["text"]).vector
    by_view = torch.einsum("bvk,cvk->bcv", image.unflatten(1, (4, 4)), text.unflatten(1, (4, 4)))
    torch.testing.assert_close(by_view.sum(-1), image @ text.T)


def test_normalise_per_view_is_the_mean_of_cosines():
    m, x = model(normalise="per_view"), batch()
    plain = model()
    raw_image = plain.image_pooling(plain.vision(**x["image"])).vector.unflatten(1, (4, 4))
    raw_text = plain.text_pooling(plain.text(**x["text"])).vector.unflatten(1, (4, 4))
    cosines = torch.einsum("bvk,cvk->bcv", F.normalize(raw_image, dim=-1), F.normalize(raw_text, dim=-1))
    score = m.encode_image(**x["image"]).vector @ m.encode_text(**x["text"]).vector.T
    torch.testing.assert_close(score, cosines.mean(-1))


def test_batch_size_and_order_never_change_a_vector():
    m, x = model(), batch()
    whole = m.encode_text(**x["text"]).vector
    for i in range(5):
        n = int(x["text"]["mask"][i].sum())
        alone = {k: v[i : i + 1, :n] for k, v in x["text"].items()}
        torch.testing.assert_close(m.encode_text(**alone).vector[0], whole[i], rtol=1e-4, atol=1e-6)
    pictures = m.encode_image(**x["image"]).vector
    flipped = m.encode_image(**{k: v.flip(0) for k, v in x["image"].items()}).vector
    torch.testing.assert_close(flipped.flip(0), pictures, rtol=1e-4, atol=1e-6)


def test_the_contrast_is_computed_in_single_precision_under_autocast():
    image, text = (F.normalize(noise, dim=-1) for noise in torch.randn(2, 6, 8))
    plain = contrastive(image, text, 50.0)
    with torch.autocast("cpu", torch.bfloat16):
        assert contrastive(image, text, 50.0) == plain


def two_processes(rank, folder):
    """Half of the items in each of two gloo processes: the mean of their losses and gradients."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    found = []
    for reduce in ("mean", "sum"):
        views = drawn_views()
        loss = diversity(views.softmax(-1)[4 * rank : 4 * rank + 4], reduce=reduce)
        loss.backward()
        both = torch.cat([loss.detach()[None], views.grad.flatten()])
        dist.all_reduce(both)
        found.append(both / 2)
    torch.save(found, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def drawn_views():
    return torch.randn(8, 3, 5, generator=torch.Generator().manual_seed(0)).requires_grad_()


def test_two_processes_have_the_diversity_of_one(tmp_path):
    torch.multiprocessing.spawn(two_processes, args=(str(tmp_path),), nprocs=2)
    for k, reduce in enumerate(("mean", "sum")):
        views = drawn_views()
        loss = diversity(views.softmax(-1), reduce=reduce)
        loss.backward()
        expected = torch.cat([loss.detach()[None], views.grad.flatten()])
        for rank in (0, 1):
            torch.testing.assert_close(torch.load(tmp_path / f"{rank}.pt")[k], expected)


def test_same_picture_positives_switch():
    x = batch()
    on, off = model(same_picture_positives=True), model()
    assert on(x)["contrastive"].item() != pytest.approx(off(x)["contrastive"].item())
    x["image_id"] = torch.arange(5)
    assert on(x)["contrastive"].item() == pytest.approx(off(x)["contrastive"].item(), rel=1e-5)


@pytest.mark.parametrize("bad", [{"pooling": "max"}, {"diversity": "cosine"}, {"normalise": "before"}])
def test_model_refuses(bad):
    with pytest.raises(ValueError, match="use"):
        model(**bad)


def test_ensemble_scores_are_the_mean_of_the_members():
    a = [F.normalize(torch.randn(4, 6), dim=-1) for _ in range(3)]
    b = [F.normalize(torch.randn(5, 6), dim=-1) for _ in range(3)]
    mean = sum(x @ y.T for x, y in zip(a, b, strict=True)) / 3
    torch.testing.assert_close(ensemble(a) @ ensemble(b).T, mean)


@pytest.mark.parametrize(
    ("argument", "value"), [(row[1], value) for row in MVAMConfig.readings() for value in row[2]]
)
def test_every_reading_trains(argument, value):
    m = model(**{argument: value})
    loss = m(batch())["loss"]
    loss.backward()
    assert torch.isfinite(loss)
    assert getattr(m.config, argument) == value


def test_the_literal_reading_is_the_text_where_it_says_anything():
    """The formulas are lost: no reading of them that can be executed differs from the defaults. Lambda is printed."""
    assert MVAMConfig.literal() == {
        "projection": "split", "scoring": "dot", "include_special": True, "diversity_power": 2,
        "diversity_reduce": "mean", "reduction": "mean", "normalise": "after", "tau": 0.07,
        "same_picture_positives": False, "diversity_weight": 10.0,
    }  # fmt: skip
    for dataset, own in (("scenes", 0.0), ("flickr8k", 0.3)):
        default, literal = (
            Settings("mvam", {"dataset": dataset, "reading": reading}) for reading in ("default", "literal")
        )
        assert (default.diversity_weight, default.input_dropout) == (0.01, own)
        assert (literal.diversity_weight, literal.input_dropout) == (10.0, 0.0)
    without = [Settings("mvam", {"diversity": "none", "reading": one}) for one in ("default", "literal")]
    assert {one.diversity_weight for one in without} == {0.01}  # of no loss: one run stands for both readings


def test_settings_take_zero_as_zero():
    s = Settings("mvam", {"depth": 0, "lr": 0, "workers": 0, "input_dropout": 0, "diversity_weight": 0})
    assert (s.depth, s.lr, s.workers, s.input_dropout, s.diversity_weight) == (0, 0.0, 0, 0.0, 0.0)
    with pytest.raises(ValueError, match=r"lr = 0\.0: must be positive"):
        Plan(epochs=1, batch_size=2, lr=s.lr)


def test_settings_of_the_presets():
    paper = Settings("mvam", {"scale": "paper"})
    assert (paper.batch_size, paper.epochs, paper.total_dim, paper.diversity_weight) == (1024, 20, 1024, 10.0)
    assert Settings("mvam", {"dataset": "flickr8k"}).preset == "photos"
    assert Settings("mvam", {"smoke": True}).batch_size == 32
    assert Settings("mvam", {"smoke": True, "batch_size": 8}).batch_size == 8
    clip = {"backbone": "clip", "text": "clip"}
    assert (Settings("mvam", clip).lr, paper.replace(**clip).lr) == (1e-3, 5e-6)
    given = clip | {"clip_weights": "a/folder"}
    assert (Settings("mvam", given).lr, paper.replace(**given).lr) == (2e-4, 5e-6)
    assert (Settings("mvam", given).stage1_lr, paper.replace(**given, lr=0.5).lr) == (1e-3, 0.5)


# ------------------------------------------------------------------------------------------- where regions lie (M18)
@pytest.mark.parametrize("places", [True, False])
def test_places_decide_whether_the_tower_is_told_where_regions_lie(places):
    torch.manual_seed(0)
    shape = rebuild.Shape(features=6, words=9, boxes=True)
    vision, _ = rebuild.towers(Settings("mvam", {"places": places, "text": "gru"}), shape)
    vision = vision.eval()
    features, mask = torch.randn(2, 3, 6), torch.ones(2, 3, dtype=torch.bool)
    here, there = (vision(features, mask, torch.rand(2, 3, 5)).states for _ in range(2))
    assert (vision.place is not None) is places
    assert torch.equal(here, there) is not places
