"""A run of SLAN from its parameters: settings, the model, and what stands before the first step."""

import json

import pytest
import torch
from notebook_text import NOTEBOOKS, accepted

from finematch.config import Settings, declared, preset
from finematch.evaluation.embedding import validation
from finematch.models.configs import LocatorConfig
from finematch.models.slan.contrast import Queue
from finematch.models.slan.locator import SelfLocator
from finematch.rebuild import open_inputs, slan_begun, slan_key, slan_model, slan_plan

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
def inputs(cache):
    return open_inputs(given(cache=str(cache)), cache)


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


def made(inputs, **changes):
    return slan_model(given(**changes), inputs, steps_per_epoch=10)


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
    made = slan_plan(s.replace(seed=5, precision="fp16"), epochs=3)
    assert (made.epochs, made.seed, made.batch_size, made.precision) == (3, 5, 1280, "fp16")
    assert slan_plan(s).precision == "no"  # auto, on a CPU
    assert (made.lr, made.schedule, made.warmup) == (3e-4, "linear", 0.0)


@pytest.mark.parametrize("version", VERSIONS)
def test_a_version_sets_what_is_left_unset(version):
    for reading in ("default", "literal"):
        s = given(version=version, reading=reading)
        assert VERSIONS[version].items() <= s.as_dict().items()
        other = s.replace(token="map", scaling="level")
        assert other.as_dict() == s.as_dict() | {"token": "map", "scaling": "level"}


def test_the_model_depends_on_the_seed_alone(inputs):
    torch.manual_seed(99)
    first = made(inputs)
    assert same(first, made(inputs))
    assert not same(first, made(inputs, seed=1))


@pytest.mark.parametrize(
    "changes", [{}, {"version": "arxiv", "levels": 1}, {"reg_weight": 0.5, "queue": 64, "mlm_weight": 1.0}]
)
def test_a_finished_run_gives_its_model_again(inputs, changes):
    """Parameters as `metrics.json` keeps them, all resolved, and through JSON."""
    s = given(**changes)
    resolved = json.loads(json.dumps(s.as_dict()))
    again = Settings("slan", {name: value for name, value in resolved.items() if name in declared("slan")})
    assert again == s
    model = slan_model(s, inputs, steps_per_epoch=10)
    other = slan_model(again, inputs, steps_per_epoch=10)
    assert same(model, other)
    assert (model.weights, model.form, model.random_steps) == (other.weights, other.form, other.random_steps)


def test_parameters_reach_the_model(inputs):
    asked = {
        "levels": 2, "top": 5, "threshold": 0.25, "reg_weight": 0.5, "queue": 64, "itc_weight": 2.0, "mlm_weight": 0.25,
        "itm_weight": 3.0, "reduction": "mean", "same_picture": False, "distil": 0.1, "match_score": "logit",
        "random_negatives": 0.5, "epochs": 3, "cell_weights": "raw", "nms": 0.5, "frozen": True, "region_word": 0.75,
    }  # fmt: skip
    model = made(inputs, **asked)
    assert (len(model.locator.adaptors), model.locator.filter.top, model.locator.filter.threshold) == (
        2,
        5,
        0.25,
    )
    assert model.weights == {"itc": 2.0, "itm": 3.0, "mlm": 0.25, "reg": 0.5, "word": 0.75}
    assert model.form == {"same_picture": False, "distil": 0.1, "reduction": "mean"}
    assert (model.match_score, model.random_steps, len(model.queue.image)) == ("logit", 15, 64)
    assert not any(p.requires_grad for p in model.locator.proposals.parameters())
    assert made(inputs, levels=0, reg_weight=0.5).weights["reg"] == 0  # there is nothing to regress to


def test_encoders_are_trained_once_for_all_runs_of_a_seed(inputs, cache, capsys):
    folder = cache / "shared"
    s = given(encoder_epochs=1, cache=str(folder))
    before, model = slan_model(s, inputs), slan_begun(s, inputs, cache, echo=print)
    after = torch.rand(3)  # what a run draws next
    assert "epoch 1/1" in capsys.readouterr().out
    assert not same(model, before)
    alike = {
        name: same(getattr(model, name), getattr(before, name)) for name in ("encoders", "locator", "head")
    }
    assert alike == {"encoders": False, "locator": True, "head": True}  # and none of what comes later

    s = s.replace(levels=1, threshold=0.1)  # another locator, the same encoders
    other = slan_begun(s, inputs, cache, echo=print)
    assert torch.equal(torch.rand(3), after), "it goes on as the run that has trained them"
    assert "epoch" not in capsys.readouterr().out
    assert same(other.encoders, model.encoders)
    assert validation(other, inputs.splits["val"]) == validation(model, inputs.splits["val"])
    assert len(list(folder.glob("slan_encoders-*[0-9a-f]"))) == 1

    alone = slan_begun(s.replace(cache=str(cache / "alone")), inputs, cache, echo=print)
    assert "epoch 1/1" in capsys.readouterr().out
    assert same(alone.encoders, model.encoders), "whichever run fills the cache, the encoders are the same"
    assert torch.equal(torch.rand(3), after)

    slan_begun(s.replace(seed=1), inputs, cache)  # another seed, its own
    assert len(list(folder.glob("slan_encoders-*[0-9a-f]"))) == 2


@pytest.mark.parametrize(
    "changes", [{"tau": 0.3}, {"learnable_tau": False}, {"itc_weight": 0.0}, {"embed": 16}]
)
def test_encoders_that_begin_otherwise_are_not_shared(inputs, cache, changes):
    folder = cache / "otherwise"
    s = given(encoder_epochs=1, cache=str(folder))
    slan_begun(s, inputs, cache)
    before = len(list(folder.glob("slan_encoders-*[0-9a-f]")))
    found = slan_begun(s.replace(**changes), inputs, cache)
    assert len(list(folder.glob("slan_encoders-*[0-9a-f]"))) == before + 1
    if "learnable_tau" in changes:
        assert float(found.temperature.tau) == pytest.approx(s.tau)


def test_momentum_encoders_follow_from_the_trained_ones(inputs, cache):
    model = slan_begun(given(encoder_epochs=1, queue=64, cache=str(cache / "momentum")), inputs, cache)
    assert same(model.momentum.copies["encoders"], model.encoders)


def test_encoders_belong_to_their_captions_and_maps(inputs):
    key = slan_key(inputs)
    assert set(key["data"]) == set(key["maps"]) == {"train", "val", "test"}
    assert key["words"]


def test_without_epochs_the_encoders_stay_as_they_are(inputs, cache):
    s = given(encoder_epochs=0, cache=str(cache / "none"))
    assert same(slan_begun(s, inputs, cache), slan_model(s, inputs))
    assert not (cache / "none").exists()


def test_a_detector_fits_the_runs_proposals(inputs, cache):
    s = given(detector="boxes", encoder_epochs=0, cache=str(cache / "detectors"))
    model, before = slan_begun(s, inputs, cache), slan_model(s, inputs)
    assert same(model, slan_begun(s, inputs, cache))
    assert len(list((cache / "detectors").glob("detector-*[0-9a-f]"))) == 1  # made once
    assert not same(model.locator.proposals, before.locator.proposals)
    assert same(model.encoders, before.encoders)


def test_val_is_ranked_by_the_contrast(inputs):
    found = validation(made(inputs), inputs.splits["val"])
    assert set(found) == {"i2t_r1", "t2i_r1", "rsum"}
    assert 0 <= found["t2i_r1"] <= 100
    assert 0 < found["rsum"] <= 600
