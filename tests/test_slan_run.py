"""A run of SLAN from its parameters: settings, the model, and what stands before the first step."""

import json

import pytest
import torch
from notebook_text import NOTEBOOKS, accepted

from finematch.config import Settings, declared, preset
from finematch.models.configs import LocatorConfig
from finematch.models.slan.locator import SelfLocator, load_proposals
from finematch.models.slan.objective import Queue
from finematch.models.slan.run import (
    build,
    by_contrast,
    detector_file,
    plan,
    train_encoders,
)
from finematch.workbench import open_bench

SOURCE = NOTEBOOKS / "slan" / "2_train.py"
SMALL = {"smoke": True, "threads": 1}


VERSIONS = {
    "iccv": {"proposals": "rpn", "scaling": "rank", "token": "map"},
    "arxiv": {"proposals": "queries", "scaling": "query", "token": "regions"},
}
BATCHES = {"resnet50": 1280, "vit_base": 960, "vit_large": 640, "vit_huge": 640}


def given(**changes) -> Settings:
    """The notebook's settings."""
    return accepted(SOURCE, SMALL | changes)


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("slan_run")


@pytest.fixture(scope="module")
def bench(cache):
    s = given()
    shape = {"width": s.width, "depth": s.text_depth, "heads": s.text_heads, "stages": s.maps}
    return open_bench(
        dataset="scenes", data_root=cache, cache=cache, backbone="maps", **shape, smoke=True, echo=None
    )


@pytest.fixture(scope="module")
def data(bench):
    return bench.splits["train"].pairs()


@pytest.mark.parametrize("vision", BATCHES)
def test_the_papers_batches_go_round_its_queue(vision):
    """None of its batch sizes divides the queue's 65,536 places."""
    s = given(scale="paper", dataset="flickr30k", vision=vision, smoke=False)
    assert s.batch_size == BATCHES[vision]
    b, queue = s.batch_size, Queue(s.queue, 1)
    assert s.queue % b
    steps = s.queue // b + 2
    for step in range(steps):
        queue.enqueue(torch.zeros(b, 1), torch.zeros(b, 1), step * b + torch.arange(b))
    ids = queue.keys().image_id.sort().values
    assert torch.equal(ids, torch.arange(steps * b - s.queue, steps * b))


def made(bench, **changes):
    return build(bench, given(**changes), steps_per_epoch=10)


def same(one, other) -> bool:
    here, there = one.state_dict(), other.state_dict()
    return here.keys() == there.keys() and all(torch.equal(v, there[k]) for k, v in here.items())


def test_settings_follow_scale_and_arguments():
    tiny, coco = Settings("slan", {}), {"scale": "paper", "dataset": "coco_karpathy"}
    assert tiny.width == preset("slan", "tiny")["width"]
    assert tiny.replace(dataset="flickr8k").size == 224
    paper = Settings("slan", {**coco, "vision": "vit_base_patch16_224", "levels": None, "top": None})
    assert (paper.batch_size, paper.levels, paper.top, paper.threshold) == (960, 3, 10, 0.5)
    assert Settings("slan", coco).batch_size == BATCHES["resnet50"] == 1280
    zero = tiny.replace(levels=0, top=0, threshold=0.0, workers=0, queue=0)
    assert (zero.levels, zero.top, zero.threshold, zero.workers, zero.queue) == (0, 0, 0.0, 0, 0)
    assert Settings("slan", {**coco, "workers": 0, "checkpoint_steps": 0}).workers == 0
    smoke = tiny.replace(smoke=True)
    assert (smoke.epochs, smoke.batch_size, smoke.encoder_epochs, smoke.workers) == (1, 32, 1, 0)
    assert Settings("slan", {**coco, "smoke": True}).workers == 1
    for scale in ("tiny", "photos"):
        model = SelfLocator((8, 8, 8), LocatorConfig.of(preset("slan", scale)))
        assert len(model.adaptors) == 3


def test_fine_tuning_at_the_papers_scale_has_settings_of_its_own():
    """ALBEF's configs/Retrieval_flickr.yaml and Retrieval_coco.yaml, at 32 pairs on each of 8 GPUs."""
    asked = {"pretrained": "best.safetensors", "vision": "vit_base_patch16_224"}
    names = ("size", "epochs", "batch_size", "lr", "schedule", "rerank", "mlm_weight")
    for dataset, epochs, rerank in (("flickr30k", 10, 128), ("coco_karpathy", 5, 256)):
        s = Settings("slan", {"scale": "paper", "dataset": dataset, **asked})
        assert [getattr(s, name) for name in names] == [384, epochs, 256, 1e-5, "cosine", rerank, 0.0]
        assert s.replace(mlm_weight=1.0, size=224).mlm_weight == 1.0
        as_it_is = s.replace(zero_shot=True)
        fresh = Settings("slan", {"scale": "paper", "dataset": dataset, "vision": asked["vision"]})
        assert as_it_is.as_dict() == fresh.as_dict() | {"zero_shot": True, "pretrained": asked["pretrained"]}
    tiny = Settings("slan", {})
    assert tiny.replace(**asked).as_dict() == tiny.as_dict() | asked


def test_the_plan_has_the_settings():
    s = Settings("slan", {"scale": "paper", "dataset": "coco_karpathy"})
    made = plan(s, epochs=3, seed=5)
    assert (made.epochs, made.seed, made.batch_size, made.precision) == (3, 5, 1280, "bf16")
    assert (made.lr, made.schedule, made.warmup) == (3e-4, "linear", 0.0)


@pytest.mark.parametrize("version", VERSIONS)
def test_a_version_sets_what_is_left_unset(version):
    for reading in ("default", "literal"):
        s = given(version=version, reading=reading)
        assert VERSIONS[version].items() <= s.as_dict().items()
        other = s.replace(token="map", scaling="level")
        assert other.as_dict() == s.as_dict() | {"token": "map", "scaling": "level"}


def test_the_model_depends_on_the_seed_alone(bench):
    torch.manual_seed(99)
    first = made(bench)
    assert same(first, made(bench))
    assert not same(first, made(bench, seed=1))


@pytest.mark.parametrize(
    "changes", [{}, {"version": "arxiv", "levels": 1}, {"reg_weight": 0.5, "queue": 64, "mlm_weight": 1.0}]
)
def test_a_finished_run_gives_its_model_again(bench, changes):
    """Parameters as `metrics.json` keeps them, all resolved, and through JSON."""
    s = given(**changes)
    resolved = json.loads(json.dumps(s.as_dict() | bench.facts))
    again = Settings("slan", {name: value for name, value in resolved.items() if name in declared("slan")})
    assert again == s
    model = build(bench, s, steps_per_epoch=10)
    other = build(bench, again, steps_per_epoch=10)
    assert same(model, other)
    assert (model.weights, model.form, model.random_steps) == (other.weights, other.form, other.random_steps)


def test_parameters_reach_the_model(bench):
    asked = {
        "levels": 2, "top": 5, "threshold": 0.25, "reg_weight": 0.5, "queue": 64, "itc_weight": 2.0, "mlm_weight": 0.25,
        "itm_weight": 3.0, "reduction": "mean", "same_picture": False, "distil": 0.1, "match_score": "logit",
        "random_negatives": 0.5, "epochs": 3, "cell_weights": "raw", "nms": 0.5, "frozen": True,
    }  # fmt: skip
    model = made(bench, **asked)
    assert (len(model.locator.adaptors), model.locator.filter.top, model.locator.filter.threshold) == (
        2,
        5,
        0.25,
    )
    assert model.weights == {"itc": 2.0, "itm": 3.0, "mlm": 0.25, "reg": 0.5}
    assert model.form == {"same_picture": False, "distil": 0.1, "reduction": "mean"}
    assert (model.match_score, model.random_steps, len(model.queue.image)) == ("logit", 15, 64)
    assert not any(p.requires_grad for p in model.locator.proposals.parameters())
    assert made(bench, levels=0, reg_weight=0.5).weights["reg"] == 0  # there is nothing to regress to


def test_encoders_are_trained_once_for_all_runs_of_a_seed(bench, data, cache, capsys):
    s, folder = given(encoder_epochs=1), cache / "shared"
    before, model = (build(bench, s, steps_per_epoch=10) for _ in range(2))
    train_encoders(model, bench, data, s, folder)
    assert "epoch 1/1" in capsys.readouterr().out
    assert not same(model, before)
    alike = {
        name: same(getattr(model, name), getattr(before, name)) for name in ("encoders", "locator", "head")
    }
    assert alike == {"encoders": False, "locator": True, "head": True}  # and none of what comes later

    s = s.replace(levels=1, threshold=0.1)  # another locator, the same encoders
    other = build(bench, s, steps_per_epoch=10)
    train_encoders(other, bench, data, s, folder)
    assert "epoch" not in capsys.readouterr().out
    assert same(other.encoders, model.encoders)
    assert by_contrast(other, bench) == by_contrast(model, bench)
    assert len(list(folder.glob("slan_encoders-scenes-*[0-9a-f]"))) == 1

    s = s.replace(seed=1)  # another seed, its own
    train_encoders(build(bench, s, steps_per_epoch=10), bench, data, s, folder, echo=None)
    assert len(list(folder.glob("slan_encoders-scenes-*[0-9a-f]"))) == 2


def test_without_epochs_the_encoders_stay_as_they_are(bench, data, cache):
    s = given(encoder_epochs=0)
    model = build(bench, s, steps_per_epoch=10)
    train_encoders(model, bench, data, s, cache / "none")
    assert same(model, build(bench, s, steps_per_epoch=10))
    assert not (cache / "none").exists()


def test_a_detector_fits_the_runs_proposals(bench, cache):
    s = given(detector="boxes")
    weights = detector_file(bench, s, cache)
    assert weights == detector_file(bench, s, cache)  # made once
    model, before = (build(bench, s, steps_per_epoch=10) for _ in range(2))
    load_proposals(model.locator.proposals, weights, decoder=model.locator.decoder)
    assert not same(model.locator.proposals, before.locator.proposals)
    assert same(model.encoders, before.encoders)


def test_val_is_ranked_by_the_contrast(bench):
    found = by_contrast(made(bench), bench)
    assert set(found) == {"i2t_r1", "t2i_r1", "rsum"}
    assert 0 <= found["t2i_r1"] <= 100
    assert 0 < found["rsum"] <= 600
