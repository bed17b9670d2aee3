"""The small CLIP: its loss, its random crops, its captions, what is saved, and that it is trained once a setting."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from formats import coco_year, karpathy_entry, picture
from torchvision.ops import roi_align
from transformers import AutoTokenizer, CLIPModel

from finematch.data import fragment_sets
from finematch.data.fragment_sets import open_fragment_sets
from finematch.encoders import Cells, small_clip
from finematch.features.backbones import fingerprint
from finematch.features.fragments import CellVLP, crop_maps, open_vlp
from finematch.features.small_clip import Captioned, ContrastiveCLIP, open_small_clip, small_clip_config
from finematch.text import tokenise

SMALL = {"width": 16, "depth": 1, "epochs": 1, "batch_size": 8}


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def vlp(scenes, cache) -> Path:
    sets = open_fragment_sets("scenes", scenes.parent, cache)
    return open_small_clip(sets, "scenes", cache, echo=None, **SMALL)


def model_of(*, channels: int = 3, size: int = 16, patch: int = 8, **options) -> ContrastiveCLIP:
    torch.manual_seed(0)
    config = small_clip(30, eos=3, bos=2, size=size, patch=patch, width=16, depth=1, positions=12)
    config.vision_config.num_channels = channels
    return ContrastiveCLIP(CLIPModel(config), **options)


def test_the_loss_of_a_batch_is_the_naive_one():
    model = model_of().eval()
    torch.manual_seed(1)
    pixels, ids = torch.randn(3, 3, 16, 16), torch.randint(4, 30, (5, 6))
    ids[:, -1] = 3
    rows = torch.tensor([0, 0, 1, 2, 2])
    batch = {
        "pixels": pixels,
        "row_of": rows,
        "image_id": rows + 7,
        "input_ids": ids,
        "mask": torch.ones(5, 6).bool(),
    }
    loss = model(batch)["loss"]
    with torch.no_grad():
        seen, said = model.images(pixels), model.texts(ids, batch["mask"])
        logits = [
            [float(model.clip.logit_scale.exp() * seen[rows[i]] @ said[j]) for j in range(5)]
            for i in range(5)
        ]
    total = 0.0
    for table in (logits, [list(column) for column in zip(*logits, strict=True)]):
        for i, row in enumerate(table):
            mine = [j for j in range(5) if rows[j] == rows[i]]
            norm = np.log(np.exp(row).sum())
            total += sum(norm - row[j] for j in mine) / len(mine) / 5
    assert loss.item() == pytest.approx(total / 2, rel=1e-4)
    loss.backward()
    assert all(p.grad is not None for name, p in model.named_parameters() if "post_layernorm" in name)


def test_pictures_are_whole_when_it_does_not_train():
    maps = torch.rand(2, 5, 6, 6)
    whole = torch.tensor([[0.0, 0, 0, 6, 6], [1.0, 0, 0, 6, 6]])
    read = model_of(channels=5, size=6, patch=1).eval().window(maps)
    assert torch.equal(read, roi_align(maps, whole, output_size=6, sampling_ratio=2, aligned=True))


@pytest.mark.parametrize("smallest", [0.5, 1.0])
def test_windows_lie_in_the_picture_and_are_no_smaller_than_said(smallest):
    model = model_of(size=64, smallest=smallest).train()
    torch.manual_seed(0)
    x = torch.linspace(0, 1, 64).expand(200, 3, 64, 64)  # a pixel says where it is
    for ramp in (x, x.transpose(2, 3)):
        seen = model.window(ramp)
        first, last = (seen[:, 0].flatten(1).amin(1), seen[:, 0].flatten(1).amax(1))
        width = (last - first) * 63 / 64
        assert (first >= 0).all()
        assert (last <= 1).all()
        assert (width >= smallest - 0.03).all()
        if smallest == 0.5:
            assert width.std() > 0.1, "windows of every size"
            assert first.std() > 0.05, "and everywhere"
    assert torch.allclose(seen, x.transpose(2, 3), atol=0.01) == (smallest == 1.0)


def test_pictures_come_with_their_own_captions(vlp):
    tokenizer = AutoTokenizer.from_pretrained(vlp)
    said = ["a red star", "a blue star", "a ring", "the sea", "the sky"]
    image_of = np.array([0, 0, 1, 2, 2])
    captions, documents = (tokenise(t, tokenizer) for t in (said, ["red blue star", "ring", "sea sky"]))

    def read(batch):
        texts = tokenizer.batch_decode(batch["input_ids"], skip_special_tokens=True)
        return [(int(batch["pixels"][row]), text) for row, text in zip(batch["row_of"], texts, strict=True)]

    pictures = lambda rows: torch.from_numpy(rows * 10)  # noqa: E731
    data = Captioned(pictures, captions, documents, image_of, each=2, whole=0.0)
    torch.manual_seed(0)
    seen = [pair for _ in range(30) for pair in read(data.__getitems__([2, 0]))]
    assert set(seen) == {(20, "the sea"), (20, "the sky"), (0, "a red star"), (0, "a blue star")}
    batch = data.__getitems__([2, 0])
    assert batch["row_of"].tolist() == [0, 0, 1, 1]
    assert batch["image_id"].tolist() == [2, 2, 0, 0]
    joined = Captioned(pictures, captions, documents, image_of, each=2, whole=1.0)
    assert read(joined.__getitems__([2, 0])) == [(20, "sea sky"), (0, "red blue star")]
    assert len(joined) == 3


def test_a_small_clip_opens_as_a_published_one(scenes, cache, vlp):
    model = open_vlp(vlp)
    assert isinstance(model, CellVLP)
    assert model.backbone.key["trained_on"] == "words of the train captions"
    records = open_fragment_sets("scenes", scenes.parent, cache).val[:3]
    pictures = [r.open() for r in records]
    seen = model.embed_crops(pictures, [np.array([[0, 0, 64, 64]], np.float32)] * 3)
    with torch.no_grad():
        own = ContrastiveCLIP(CLIPModel.from_pretrained(vlp)).eval().images(model.backbone(pictures))
    assert torch.allclose(seen, own, atol=1e-5)
    assert not (vlp / "checkpoint.pt").exists()
    (line,) = (vlp / "log.jsonl").read_text().splitlines()
    assert {"loss", "rsum", "i2t_r1"} <= json.loads(line).keys()


def test_a_small_clip_is_trained_once_for_each_setting(scenes, cache, vlp):
    said, sets = [], open_fragment_sets("scenes", scenes.parent, cache)
    weights = (vlp / "model.safetensors").read_bytes()
    assert open_small_clip(sets, "scenes", cache, echo=said.append, **SMALL) == vlp
    assert said == []
    other = open_small_clip(sets, "scenes", cache, echo=said.append, **SMALL, seed=1)
    assert other != vlp
    assert said
    assert (other / "model.safetensors").read_bytes() != weights
    with pytest.raises(TypeError, match="'epoch'"):
        open_small_clip(sets, "scenes", cache, epoch=1)


def test_a_small_clip_shares_its_backbone_with_other_methods(scenes, cache, vlp, tmp_path):
    sets = open_fragment_sets("scenes", scenes.parent, cache)
    made = open_small_clip(sets, "scenes", tmp_path, networks=cache, echo=None, **SMALL)
    assert made.name == vlp.name
    assert not list(tmp_path.glob("word_net-*")), "the network was trained a second time"


def test_a_small_clip_carries_its_backbone(vlp):
    """Opened without data, the backbone is the one that the model was trained on."""
    backbone = open_vlp(vlp).backbone
    assert fingerprint(backbone.net) == backbone.key["weights"]
    assert not any(p.requires_grad for p in backbone.net.parameters())
    assert not backbone.net.training


def test_settings_of_photos_and_of_smoke_runs():
    assert small_clip_config("scenes").width == 96
    assert small_clip_config("flickr8k").width == 128
    smoke = small_clip_config("scenes", smoke=True, seed=3)
    assert (smoke.epochs, smoke.batch_size, smoke.seed) == (1, 40, 3)


# ------------------------------------------------------------------------------------------ photos
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "person", "with", "toothbrush", "and", "red", "dog",
         *map(str, range(50))]  # fmt: skip


def test_photos_train_a_clip_of_cells_and_are_reported_on_coco(tmp_path, monkeypatch):
    from safetensors.torch import save_file

    monkeypatch.setattr(fragment_sets, "SMOKE", {"train": 40, "val": 4, "test": 3})
    coco_year(tmp_path, "2017", {"train": 2, "val": 2})
    entries = [
        karpathy_entry(i, split, [f"a red dog {i} {k}" for k in range(5)])
        for i, split in enumerate(["train"] * 42 + ["val"] * 5)
    ]
    for entry in entries:
        picture(tmp_path / "flickr8k" / "images" / entry["filename"], (40, 30))
    (tmp_path / "flickr8k" / "dataset_flickr8k.json").write_text(
        json.dumps({"images": entries, "dataset": "flickr8k"})
    )
    for folder in ("weights", "vocab"):
        (tmp_path / folder).mkdir()
    (tmp_path / "vocab" / "bert-base-uncased-vocab.txt").write_text("\n".join(WORDS))
    torch.manual_seed(0)
    net = Cells("mobilenetv2_100", options={"pad_type": "same"}).net
    save_file({k: v.contiguous() for k, v in net.state_dict().items()},
              tmp_path / "weights" / "mobilenetv2_100_tf_imagenet.safetensors")  # fmt: skip
    sets = open_fragment_sets("flickr8k", tmp_path, tmp_path / "cache", smoke=True)
    assert (sets.annotated, sets.annotated_name) == ([], ""), (
        "there are no phrases, so grounding is not measured"
    )
    assert (len(sets.train), len(sets.val), len(sets.gallery)) == (40, 4, 3)
    assert sets.categories == ["toothbrush", "person"]
    assert sets.name == "COCO 2017 (the pictures at hand)"
    vlp = open_vlp(
        open_small_clip(sets, "flickr8k", tmp_path / "cache", smoke=True, width=16, depth=1, echo=None)
    )
    assert isinstance(vlp, CellVLP)
    assert vlp.backbone.key["backbone"] == "mobilenetv2_100"
    # what training reads through its windows is what crops are read through
    model = ContrastiveCLIP(vlp.net.net).eval()
    record = sets.gallery[0]
    frame = np.array([[0, 0, *record.size]], np.float32)
    crop = crop_maps(vlp.backbone, [record.open()], [frame], 7)
    maps = vlp.backbone([record.open()])
    assert torch.allclose(model.window(maps), crop, atol=1e-5)
