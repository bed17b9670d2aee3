"""Towers: shapes, masks, loading from folders and files that the tests write themselves, CLIP's traps."""

import pytest
import timm
import torch
from safetensors.torch import save_file
from transformers import BertConfig, BertModel, CLIPModel

from finematch import encoders as E


def close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


# -------------------------------------------------------------------------------- cells
@pytest.mark.parametrize(
    ("name", "stage", "side", "shape"),
    [
        ("resnet18", -1, 64, (512, 2, 2)),
        ("resnet18", 1, 64, (64, 16, 16)),
        ("mobilenetv2_100", -1, 64, (1280, 2, 2)),
        ("vit_tiny_patch16_224", -1, 224, (192, 14, 14)),
    ],
)
def test_cells_are_channels_first_maps(name, stage, side, shape):
    net = E.Cells(name, stage=stage).eval()
    with torch.no_grad():
        assert net(torch.rand(2, 3, side, side)).shape == (2, *shape)


def test_cells_of_a_channels_last_network():
    net = E.Cells("swin_tiny_patch4_window7_224").eval()
    with torch.no_grad():
        assert net(torch.rand(1, 3, 224, 224)).shape == (1, 768, 7, 7)


def test_normalisation_is_the_models_own_or_given():
    own = timm.data.resolve_model_data_config(timm.create_model("resnet18"))
    close(E.Cells("resnet18").mean.flatten(), torch.tensor(own["mean"]))
    cells = E.Cells("resnet18", mean=0.5, sd=(0.5, 0.25, 0.5))
    close(cells.mean.flatten(), torch.full((3,), 0.5))
    close(cells.sd.flatten(), torch.tensor([0.5, 0.25, 0.5]))
    x, plain = torch.rand(1, 3, 64, 64), cells.net.eval()
    with torch.no_grad():
        close(cells.eval()(x), plain.forward_features((x - 0.5) / cells.sd))


def test_backbone_weights_from_a_file(tmp_path):
    torch.manual_seed(0)
    source = timm.create_model("mobilenetv2_100", pad_type="same").eval()
    state = {k: v.half() if v.is_floating_point() else v for k, v in source.state_dict().items()}
    save_file({k: v for k, v in state.items() if not k.startswith("classifier")}, tmp_path / "w.safetensors")
    cells = E.Cells("mobilenetv2_100", weights=tmp_path / "w.safetensors", mean=0.0, sd=1.0,
                    options={"pad_type": "same"}).eval()  # fmt: skip
    x = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(cells(x), source.forward_features(x), rtol=2e-2, atol=2e-2)
    assert all(p.dtype == torch.float32 for p in cells.parameters())


def test_weights_that_do_not_fit_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none\.safetensors"):
        E.Cells("resnet18", weights=tmp_path / "none.safetensors")
    (tmp_path / "text.safetensors").write_text("hello")
    with pytest.raises(ValueError, match="not a safetensors file"):
        E.Cells("resnet18", weights=tmp_path / "text.safetensors")
    save_file({"conv1.weight": torch.zeros(2, 2), "alien": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match=r"does not fit .*bn1.*alien.*conv1"):
        E.Cells("resnet18", weights=tmp_path / "other.safetensors")


def test_real_mobilenet(real_data):
    """The converted weights: fp16 on disk, fp32 here, and sensible features of a real photo."""
    from PIL import Image

    from finematch.features.backbones import mobilenet

    backbone = mobilenet(real_data / "weights" / "mobilenetv2_100_tf_imagenet.safetensors")
    photos = sorted((real_data / "flickr8k" / "images").iterdir())[:2]
    maps = backbone([Image.open(p).convert("RGB") for p in photos])
    assert maps.shape == (2, 1280, 7, 7)
    assert 0.2 < maps.mean() < 2  # after a ReLU6
    assert maps.max() <= 6


# -------------------------------------------------------------------------------- vectors
def test_token_transformer():
    torch.manual_seed(0)
    tower = E.TokenTransformer(6, width=16, depth=2, heads=2, boxes=True).eval()
    features, mask = torch.randn(2, 5, 6), torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]]).bool()
    places = torch.rand(2, 5, 5)
    tokens = tower(features, mask, places)
    assert tokens.states.shape == (2, 6, 16)
    assert tokens.mask.tolist() == [[True] * 6, [True] * 4 + [False] * 2]
    assert tokens.special.tolist() == [[True] + [False] * 5] * 2
    close(tokens.pooled, tokens.states[:, 0])
    alone = tower(features[1:, :3], mask[1:, :3], places[1:, :3])
    close(alone.states[0], tokens.states[1, :4])  # padding is never seen
    with pytest.raises(ValueError, match="boxes=True"):
        tower(features, mask)


def test_token_transformer_without_token_or_depth():
    tower = E.TokenTransformer(6, width=16, depth=0, token=False).eval()
    features, mask = torch.randn(2, 5, 6), torch.ones(2, 5, dtype=torch.bool)
    special = torch.zeros_like(mask)
    special[:, 0] = True
    tokens = tower(features, mask, special=special)
    close(tokens.states, tower.norm(tower.project(tower.norm_input(features))))
    assert torch.equal(tokens.special, special)


# -------------------------------------------------------------------------------- text
def text_batch(vocabulary=40):
    ids = torch.randint(5, vocabulary, (2, 6), generator=torch.Generator().manual_seed(0))
    mask = torch.tensor([[1] * 6, [1] * 4 + [0] * 2]).bool()
    special = torch.zeros_like(mask)
    special[:, 0] = True
    return {"input_ids": ids * mask, "mask": mask, "special": special}


@pytest.mark.parametrize("kind", ["bert", "gru"])
def test_text_towers_never_see_padding(kind):
    torch.manual_seed(0)
    tower = (
        E.BertTower(E.small_bert(40, width=16, heads=2))
        if kind == "bert"
        else E.GRUTower(40, embed=8, width=16)
    )
    batch = text_batch()
    tokens = tower.eval()(**batch)
    assert tokens.states.shape == (2, 6, 16)
    alone = tower(**{k: v[1:, :4] for k, v in batch.items()})
    close(alone.states[0], tokens.states[1, :4])
    close(alone.pooled[0], tokens.pooled[1])
    noise = {**batch, "input_ids": torch.where(batch["mask"], batch["input_ids"], torch.tensor(7))}
    close(tower(**noise).states[batch["mask"]], tokens.states[batch["mask"]])


def test_gru_averages_directions():
    torch.manual_seed(0)
    tower = E.GRUTower(40, embed=8, width=16).eval()
    batch = {k: v[:1] for k, v in text_batch().items()}
    states, last = tower.gru(tower.embed(batch["input_ids"]))
    close(tower(**batch).states, (states[..., :16] + states[..., 16:]) / 2)
    close(tower(**batch).pooled, (last[0] + last[1]) / 2)


def test_bert_from_pretrained_folder(tmp_path):
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=40, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32
    )
    source = BertModel(config).eval()
    source.save_pretrained(tmp_path)
    batch = text_batch()
    tokens = E.BertTower(tmp_path).eval()(**batch)
    expected = source(input_ids=batch["input_ids"], attention_mask=batch["mask"].long()).last_hidden_state
    close(tokens.states[batch["mask"]], expected[batch["mask"]])


# -------------------------------------------------------------------------------- CLIP
EOS, BOS = 3, 1


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory):
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("clip")
    model = E.open_clip_model(E.small_clip(50, eos=EOS, bos=BOS, size=16, patch=8, width=16, depth=1))
    with torch.no_grad():  # norms that do something, so that skipping one shows
        model.vision_model.post_layernorm.weight.uniform_(0.5, 2.0)
    model.save_pretrained(folder)
    return folder


def test_clip_normalises_every_patch(clip_folder):
    clip = E.open_clip_model(clip_folder).eval()
    pixels = torch.randn(2, 3, 16, 16)
    tokens = E.CLIPVision(clip)(pixels=pixels)
    out = clip.vision_model(pixel_values=pixels)
    assert tokens.states.shape == (2, 5, 16)
    close(tokens.pooled, out.pooler_output)  # CLIP's own, on [CLS]
    close(tokens.states[:, 1:], clip.vision_model.post_layernorm(out.last_hidden_state[:, 1:]))
    raw = out.last_hidden_state[:, 1:]
    assert (tokens.states[:, 1:] - raw).abs().max() > 0.1
    assert tokens.special.tolist() == [[True, False, False, False, False]] * 2


def test_clip_masks_after_the_end_of_text(clip_folder):
    clip = E.open_clip_model(clip_folder).eval()
    # CLIP pads with the end token itself: only the first one is the end
    ids = torch.tensor([[BOS, 9, 8, EOS, EOS, EOS], [BOS, 9, 8, 7, 6, EOS]])
    mask, special = torch.ones_like(ids).bool(), torch.zeros_like(ids).bool()
    tokens = E.CLIPText(clip)(input_ids=ids, mask=mask, special=special)
    assert tokens.mask.tolist() == [[True] * 4 + [False] * 2, [True] * 6]
    close(tokens.pooled[0], tokens.states[0, 3])
    close(tokens.pooled, clip.text_model(input_ids=ids).pooler_output)
    alone = E.CLIPText(clip)(input_ids=ids[:1, :4], mask=mask[:1, :4], special=special[:1, :4])
    close(alone.states[0], tokens.states[0, :4])
    with pytest.raises(ValueError, match="row 1 has no end-of-text"):
        E.CLIPText(clip)(
            input_ids=torch.tensor([[BOS, EOS], [BOS, 9]]), mask=mask[:, :2], special=special[:, :2]
        )


def test_openai_configurations_name_the_wrong_end(tmp_path):
    """The published CLIP configs say eos_token_id = 2; the end of text is the highest id of the vocabulary."""
    config = E.small_clip(49408, eos=2, bos=49406, size=16, patch=8, width=8, depth=1)
    clip = CLIPModel(config).eval()
    ids = torch.tensor([[49406, 2, 8, 49407, 0, 0]])
    mask = torch.ones_like(ids).bool()
    tokens = E.CLIPText(clip)(input_ids=ids, mask=mask, special=~mask)
    assert tokens.mask.tolist() == [[True] * 4 + [False] * 2]
    close(tokens.pooled, clip.text_model(input_ids=ids).pooler_output)


def test_config_of_reads_no_weights(clip_folder):
    assert E.config_of(clip_folder).vision_config.patch_size == 8
