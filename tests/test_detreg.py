"""DETReg: a checkpoint in its own names against a plain Deformable DETR that is written here in those names."""

from __future__ import annotations

import argparse
import copy
import itertools
import re

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn

from finematch.boxes import iou
from finematch.data.record import DataError, Record
from finematch.encoders import deformable_detr
from finematch.features import detreg as D
from finematch.features.proposals import Detector, extract_proposals

WIDTH, HEADS, POINTS, LEVELS, QUERIES = 32, 4, 3, 4, 25
OPEN = {"backbone": "test_resnet", "heads": HEADS, "shortest": 64, "longest": 160}


# ------------------------------------------------------------------- a Deformable DETR in the names of its authors
class Attention(nn.Module):
    """Deformable attention, head by head, level by level and point by point."""

    def __init__(self):
        super().__init__()
        self.sampling_offsets = nn.Linear(WIDTH, HEADS * LEVELS * POINTS * 2)
        self.attention_weights = nn.Linear(WIDTH, HEADS * LEVELS * POINTS)
        self.value_proj = nn.Linear(WIDTH, WIDTH)
        self.output_proj = nn.Linear(WIDTH, WIDTH)

    def forward(self, query, places, memory, shapes):
        """query "n d", places "n 2" (x, y) or "n 4" (x, y, w, h), memory "s d"."""
        offsets = self.sampling_offsets(query).reshape(-1, HEADS, LEVELS, POINTS, 2)
        weights = self.attention_weights(query).reshape(-1, HEADS, LEVELS * POINTS)
        weights = weights.softmax(-1).reshape(-1, HEADS, LEVELS, POINTS)
        values = self.value_proj(memory).split([h * w for h, w in shapes])
        out = torch.zeros(len(query), HEADS, WIDTH // HEADS)
        for level, (h, w) in enumerate(shapes):
            grid = values[level].T.reshape(HEADS, -1, h, w)
            for head in range(HEADS):
                for point in range(POINTS):
                    step = offsets[:, head, level, point]
                    if places.shape[1] == 2:
                        at = places + step / torch.tensor([w, h])
                    else:
                        at = places[:, :2] + step / POINTS * places[:, 2:] / 2
                    seen = F.grid_sample(grid[head][None], (2 * at - 1)[None, None], align_corners=False)
                    out[:, head] += weights[:, head, level, point, None] * seen[0, :, 0].T
        return self.output_proj(out.flatten(1))


class EncoderLayer(nn.Module):
    def __init__(self):
        super().__init__()
        self.self_attn = Attention()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.linear1, self.linear2 = nn.Linear(WIDTH, 48), nn.Linear(48, WIDTH)

    def forward(self, x, position, places, shapes):
        x = self.norm1(x + self.self_attn(x + position, places, x, shapes))
        return self.norm2(x + self.linear2(self.linear1(x).relu()))


class DecoderLayer(nn.Module):
    def __init__(self):
        super().__init__()
        self.cross_attn = Attention()
        self.self_attn = nn.MultiheadAttention(WIDTH, HEADS)
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(WIDTH) for _ in range(3))
        self.linear1, self.linear2 = nn.Linear(WIDTH, 40), nn.Linear(40, WIDTH)

    def forward(self, x, position, places, memory, shapes):
        keys = x + position
        x = self.norm2(x + self.self_attn(keys, keys, x, need_weights=False)[0])
        x = self.norm1(x + self.cross_attn(x + position, places, memory, shapes))
        return self.norm3(x + self.linear2(self.linear1(x).relu()))


class MLP(nn.Module):
    def __init__(self, *widths):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in itertools.pairwise(widths))

    def forward(self, x):
        for layer in self.layers[:-1]:
            x = layer(x).relu()
        return self.layers[-1](x)


def sine(h, w):
    """The sine embedding of the cells of a map "h w": y first, then x; "s d"."""
    half = WIDTH // 2
    rate = 10000 ** (2 * (torch.arange(half) // 2) / half)

    def wave(n):
        angle = ((torch.arange(n) + 0.5) / n * 2 * torch.pi)[:, None] / rate
        return torch.where(torch.arange(half) % 2 == 0, angle.sin(), angle.cos())

    y, x = wave(h)[:, None].expand(h, w, half), wave(w)[None].expand(h, w, half)
    return torch.cat([y, x], -1).reshape(h * w, WIDTH)


def bag(**modules) -> nn.Module:
    out = nn.Module()
    for name, module in modules.items():
        setattr(out, name, module)
    return out


class ResNet(nn.Module):
    """torchvision's ResNet-18 to its last three stages: the body whose names DETReg's checkpoints have."""

    channels = 128, 256, 512

    def __init__(self):
        super().__init__()
        for name, part in torchvision.models.resnet18(weights=None).named_children():
            if name not in ("avgpool", "fc"):
                setattr(self, name, part)

    def forward(self, x):
        x = self.layer1(self.maxpool(self.relu(self.bn1(self.conv1(x)))))
        maps = []
        for stage in (self.layer2, self.layer3, self.layer4):
            x = stage(x)
            maps.append(x)
        return maps


def small_net() -> nn.Module:
    """A network of 0.4 M parameters, for all that does not depend on which it is."""
    net = timm.create_model("test_resnet", features_only=True, out_indices=(2, 3, 4))
    net.channels = net.feature_info.channels()
    return net


class Original(nn.Module):
    def __init__(self, net: nn.Module, *, refine: bool):
        super().__init__()
        self.backbone = nn.ModuleList([bag(body=net)])
        layers = 2, 3  # encoder, decoder
        self.transformer = bag(
            level_embed=nn.Parameter(torch.randn(LEVELS, WIDTH)),
            reference_points=nn.Linear(WIDTH, 2),
            encoder=bag(layers=nn.ModuleList(EncoderLayer() for _ in range(layers[0]))),
            decoder=bag(layers=nn.ModuleList(DecoderLayer() for _ in range(layers[1]))),
        )
        self.query_embed = nn.Embedding(QUERIES, 2 * WIDTH)
        self.input_proj = nn.ModuleList(
            nn.Sequential(nn.Conv2d(c, WIDTH, 1), nn.GroupNorm(32, WIDTH)) for c in net.channels
        )
        last = nn.Conv2d(net.channels[-1], WIDTH, 3, 2, 1)
        self.input_proj.append(nn.Sequential(last, nn.GroupNorm(32, WIDTH)))
        heads = [(nn.Linear(WIDTH, 3), MLP(WIDTH, WIDTH, WIDTH, 4)) for _ in range(layers[1])]
        if not refine:
            heads = heads[:1] * layers[1]
        self.class_embed = nn.ModuleList(a for a, _ in heads)
        self.bbox_embed = nn.ModuleList(b for _, b in heads)
        if refine:
            self.transformer.decoder.bbox_embed = self.bbox_embed
        self.refine = refine
        self.feature_embed = MLP(WIDTH, WIDTH, 2 * WIDTH)  # DETReg's own, not used for boxes
        for p in self.parameters():  # nothing is left at zero or one: what is swapped shows
            p.data += 0.1 * torch.randn_like(p)
        for m in net.modules():
            if isinstance(m, nn.BatchNorm2d):
                m.running_mean.normal_(0, 0.1)
                m.running_var.uniform_(0.5, 2)

    def forward(self, pixels):
        """pixels "3 h w" to class logits "q c" and boxes "q 4", centre and size in [0, 1]."""
        maps = self.backbone[0].body(pixels[None])
        maps = [p(m)[0] for p, m in zip(self.input_proj, [*maps, maps[-1]], strict=True)]
        shapes = [tuple(m.shape[1:]) for m in maps]
        t = self.transformer
        position = torch.cat([sine(*s) + e for s, e in zip(shapes, t.level_embed, strict=True)])
        memory = torch.cat([m.flatten(1).T for m in maps])
        places = torch.cat([torch.stack([((torch.arange(w) + 0.5) / w).repeat(h),
                                         ((torch.arange(h) + 0.5) / h).repeat_interleave(w)], -1)
                            for h, w in shapes])  # fmt: skip
        for layer in t.encoder.layers:
            memory = layer(memory, position, places, shapes)
        query, x = self.query_embed.weight.split(WIDTH, 1)
        reference = t.reference_points(query).sigmoid()
        for i, layer in enumerate(t.decoder.layers):
            x = layer(x, query, reference, memory, shapes)
            boxes = self.bbox_embed[i](x)
            inverse = torch.logit(reference)
            boxes = (boxes + F.pad(inverse, (0, 4 - inverse.shape[1]))).sigmoid()
            if self.refine:
                reference = boxes
        return self.class_embed[-1](x), boxes


def original(*, net=small_net, refine: bool = False, seed: int = 0) -> Original:
    torch.manual_seed(seed)
    return Original(net(), refine=refine).eval()


def write(model: nn.Module, path, **state):
    """As DETReg saves: the command line and the optimizer's state beside the weights."""
    torch.save({"model": model.state_dict() | state, "epoch": 3, "args": argparse.Namespace(lr=1e-4),
                "optimizer": {"state": {}, "param_groups": [{"lr": 1e-4}]}}, path)  # fmt: skip
    return path


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return write(original(), tmp_path_factory.mktemp("detreg") / "checkpoint.pth")


@pytest.fixture(scope="module")
def detector(checkpoint) -> D.DETReg:
    return D.DETReg(checkpoint, **OPEN)


def picture(size=(90, 60), seed=0) -> Image.Image:
    rng = np.random.default_rng(seed)
    return Image.fromarray(rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))


# ------------------------------------------------------------------------------------------ the same function
@pytest.mark.parametrize(
    ("net", "refine", "size"),
    [(small_net, False, (96, 64)), (small_net, True, (64, 120)), (ResNet, False, (64, 96))],
)
def test_a_checkpoint_computes_what_its_authors_model_computes(tmp_path, net, refine, size):
    model = original(net=net, refine=refine)
    name = "resnet18" if net is ResNet else "test_resnet"
    net = D.DETReg(write(model, tmp_path / "c.pth"), **{**OPEN, "backbone": name}).net
    assert net.config.with_box_refine == refine
    pixels = torch.randn(3, size[1], size[0])
    with torch.no_grad():
        logits, boxes = model(pixels)
        got = net(pixel_values=pixels[None])
    torch.testing.assert_close(got.logits[0], logits, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(got.pred_boxes[0], boxes, rtol=1e-3, atol=1e-4)
    assert boxes.std(0).min() > 0.01  # queries differ, so that the comparison says something


def test_a_transformers_model_written_in_the_authors_names_comes_back(detector, tmp_path):
    """The other way round, with a table of this test's own: every name of one is the one of the other."""
    net = copy.deepcopy(detector.net)
    torch.manual_seed(1)
    with torch.no_grad():
        for p in net.parameters():
            p.normal_(0, 0.1)
    net.save_pretrained(tmp_path / "hf")  # in the names of published checkpoints
    table = [
        (r"^model\.backbone\.conv_encoder\.model\.", "backbone.0.body."),
        (r"^model\.query_position_embeddings\.", "query_embed."),
        (r"^model\.(level_embed|reference_points)", r"transformer.\1"),
        (r"^model\.(encoder|decoder)\.", r"transformer.\1."),
        (r"^model\.input_proj", "input_proj"),
        (r"(encoder\.layers\.\d+\.)self_attn_layer_norm", r"\1norm1"),
        (r"(encoder\.layers\.\d+\.)final_layer_norm", r"\1norm2"),
        (r"(decoder\.layers\.\d+\.)encoder_attn_layer_norm", r"\1norm1"),
        (r"(decoder\.layers\.\d+\.)self_attn_layer_norm", r"\1norm2"),
        (r"(decoder\.layers\.\d+\.)final_layer_norm", r"\1norm3"),
        (r"\.fc([12])\.", r".linear\1."),
        (r"\.encoder_attn\.", ".cross_attn."),
    ]
    state, stacked = {}, {}
    saved = load_file(tmp_path / "hf" / "model.safetensors")
    for i in "12":  # the heads are one: saved once, but written for every layer by DETReg
        saved |= {k.replace("_embed.0.", f"_embed.{i}."): v for k, v in saved.items() if "_embed.0." in k}
    for name, value in saved.items():
        for pattern, replacement in table:
            name = re.sub(pattern, replacement, name)
        if match := re.fullmatch(r"(.*self_attn\.)([qkv])_proj\.(weight|bias)", name):
            stacked.setdefault((match[1], match[3]), {})[match[2]] = value
        else:
            state[name] = value
    for (prefix, kind), parts in stacked.items():
        state[f"{prefix}in_proj_{kind}"] = torch.cat([parts[k] for k in "qkv"])
    assert {"transformer.decoder.layers.1.self_attn.in_proj_weight", "backbone.0.body.layer4.0.bn2.running_var",
            "class_embed.2.bias", "input_proj.3.1.weight"} <= set(state)  # fmt: skip
    save_file({k: v.clone() for k, v in state.items()}, tmp_path / "c.safetensors")
    got = D.DETReg(tmp_path / "c.safetensors", **OPEN).net
    pixels = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        a, b = net(pixel_values=pixels), got(pixel_values=pixels)
    loaded = (
        got.state_dict()
    )  # every weight to the bit; the outputs to rounding, which memory's alignment changes
    assert all(torch.equal(value, loaded[name]) for name, value in net.state_dict().items())
    torch.testing.assert_close(a.logits, b.logits, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(a.pred_boxes, b.pred_boxes, rtol=1e-5, atol=1e-6)


# ------------------------------------------------------------------------------------------ what does not fit
def edited(state: dict, change: str) -> dict:
    state = dict(state)
    if change == "gone":
        del state["transformer.decoder.layers.1.norm2.bias"]
    elif change == "alien":
        state["transformer.decoder.layers.1.norm9.bias"] = torch.zeros(3)
    elif change == "elsewhere":
        state["mask_head.lay1.weight"] = torch.zeros(3)
    elif change == "two_stage":
        state["transformer.enc_output.weight"] = torch.zeros(32, 32)
    elif change == "shape":
        state["input_proj.1.0.weight"] = torch.zeros(32, 100, 1, 1)
    elif change == "deeper":
        state["class_embed.3.weight"] = torch.zeros(3, 32)
    elif change == "no_queries":
        del state["query_embed.weight"]
    return state


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("gone", r"does not fit .* missing \['model\.decoder\.layers\.1\.self_attn_layer_norm\.bias'\]"),
        ("alien", r"unknown parameters \['transformer\.decoder\.layers\.1\.norm9\.bias'\]"),
        ("elsewhere", r"unknown parameters \['mask_head\.lay1\.weight'\]"),
        ("two_stage", r"unknown parameters \['transformer\.enc_output\.weight'\]"),
        ("shape", r"does not fit .* of another shape .*input_proj\.1\.0\.weight"),
        ("deeper", r"does not fit .* unknown \['class_embed\.3\.weight'\]"),
        ("no_queries", r"no DETReg checkpoint: it lacks 'query_embed\.weight'"),
    ],
)
def test_what_does_not_fit_by_name_is_refused(tmp_path, checkpoint, change, message):
    state = edited(torch.load(checkpoint, weights_only=False)["model"], change)
    save_file({k: v.clone() for k, v in state.items()}, tmp_path / "c.safetensors")
    with pytest.raises(ValueError, match=message) as error:
        D.DETReg(tmp_path / "c.safetensors", **OPEN)
    assert "c.safetensors" in str(error.value)


def test_another_backbone_is_refused(checkpoint):
    with pytest.raises(ValueError, match="does not fit a Deformable DETR on resnet18"):
        D.DETReg(checkpoint, **{**OPEN, "backbone": "resnet18"})


def test_what_serves_training_only_is_left_out(checkpoint):
    state = {
        **torch.load(checkpoint, weights_only=False)["model"],
        "transformer.total_ops": torch.zeros(1),
        "total_params": torch.zeros(1),
    }
    assert any(k.startswith("feature_embed") for k in state)
    assert any(k.endswith("num_batches_tracked") for k in state)
    renamed = D.published_names(state, "x")
    assert not any(re.search("feature_embed|num_batches|total_", k) for k in renamed)


class Evil:
    def __reduce__(self):
        return (print, ("executed",))


def test_files_that_cannot_be_read(tmp_path, capsys, checkpoint):
    with pytest.raises(FileNotFoundError, match=r"none\.pth"):
        D.DETReg(tmp_path / "none.pth")
    (tmp_path / "text.pth").write_text("hello")
    with pytest.raises(ValueError, match=r"text\.pth cannot be read"):
        D.read_checkpoint(tmp_path / "text.pth")
    torch.save({"model": {"a": torch.zeros(1)}, "args": Evil()}, tmp_path / "evil.pth")
    with pytest.raises(ValueError, match=r"evil\.pth cannot be read"):
        D.read_checkpoint(tmp_path / "evil.pth")
    assert "executed" not in capsys.readouterr().out
    torch.save({"state": {"a": torch.zeros(1)}}, tmp_path / "nested.pth")
    with pytest.raises(ValueError, match="not all of its entries are tensors"):
        D.read_checkpoint(tmp_path / "nested.pth")
    bare = torch.load(checkpoint, weights_only=False)["model"]
    torch.save(bare, tmp_path / "bare.pth")
    assert set(D.read_checkpoint(tmp_path / "bare.pth")) == set(bare)


# ------------------------------------------------------------------------------------------ boxes and scores
def test_sizes_are_read_off_the_parameters(checkpoint):
    shape = D.shape_of(D.read_checkpoint(checkpoint), checkpoint, HEADS)
    assert shape == {
        "num_queries": QUERIES, "d_model": WIDTH, "num_feature_levels": LEVELS, "num_labels": 3,
        "with_box_refine": False, "encoder_layers": 2, "decoder_layers": 3, "encoder_attention_heads": HEADS,
        "decoder_attention_heads": HEADS, "encoder_n_points": POINTS, "decoder_n_points": POINTS,
        "encoder_ffn_dim": 48, "decoder_ffn_dim": 40,
    }  # fmt: skip


@pytest.mark.parametrize("foreground", [1, 2])
def test_boxes_are_sorted_by_the_foreground_logit(checkpoint, foreground):
    detector = D.DETReg(checkpoint, foreground=foreground, **OPEN)
    assert isinstance(detector, Detector)
    image = picture()
    boxes, scores = detector(image)
    with torch.no_grad():
        logits, centre = original()(detector.pixels(image))
    expected = []
    for logit, (cx, cy, w, h) in zip(logits[:, foreground].tolist(), centre.tolist(), strict=True):
        x1, x2 = (min(max((cx + k * w / 2) * 90, 0), 90) for k in (-1, 1))
        y1, y2 = (min(max((cy + k * h / 2) * 60, 0), 60) for k in (-1, 1))
        expected.append((1 / (1 + np.exp(-logit)), x1, y1, x2, y2))
    expected = np.array(sorted(expected, reverse=True))
    np.testing.assert_allclose(scores, expected[:, 0], rtol=1e-3)
    np.testing.assert_allclose(boxes, expected[:, 1:], atol=0.05)
    assert (np.diff(scores) <= 0).all()
    assert (boxes >= 0).all()
    assert len(boxes) == QUERIES  # no suppression of overlaps
    close = iou(torch.from_numpy(boxes), torch.from_numpy(boxes)).fill_diagonal_(0)
    assert close.max() > 0.5


def test_a_foreground_that_is_not_there_is_refused(checkpoint):
    with pytest.raises(ValueError, match="column 3 of 3 class logits"):
        D.DETReg(checkpoint, foreground=3, **OPEN)


@pytest.mark.parametrize(
    ("size", "seen"),
    [((640, 480), (1066, 800)), ((480, 640), (800, 1066)), ((500, 500), (800, 800)), ((1000, 300), (1333, 400)),
     ((300, 1000), (400, 1333)), ((64, 64), (800, 800))],
)  # fmt: skip
def test_pictures_are_resized_as_detr_does(detector, size, seen):
    """The shorter side to 800; where that makes the longer one exceed 1333, the longer one to that."""
    detector.shortest, detector.longest = 800, 1333
    pixels = detector.pixels(Image.new("RGB", size, (255, 0, 51)))
    detector.shortest, detector.longest = OPEN["shortest"], OPEN["longest"]
    assert (pixels.shape[2], pixels.shape[1]) == pytest.approx(seen, abs=1)
    expected = [(1 - 0.485) / 0.229, (0 - 0.456) / 0.224, (0.2 - 0.406) / 0.225]
    np.testing.assert_allclose(pixels.mean((1, 2)), expected, rtol=1e-4)


def test_the_key_tells_what_changes_boxes(checkpoint, tmp_path):
    other = write(original(seed=5), tmp_path / "other.pth")
    keys = [D.DETReg(checkpoint, **OPEN).key, D.DETReg(other, **OPEN).key]
    keys += [D.DETReg(checkpoint, **{**OPEN, k: v}).key for k, v in
             (("shortest", 96), ("longest", 100), ("foreground", 0))]  # fmt: skip
    assert all(a != b for i, a in enumerate(keys) for b in keys[:i])
    assert D.DETReg(checkpoint, **OPEN).key == keys[0]


# ------------------------------------------------------------------------------------------ as proposals
def test_proposals_of_a_detector(detector, tmp_path):
    records = []
    for i, size in enumerate([(90, 60), (60, 90), (120, 70)]):
        picture(size, i).save(tmp_path / f"{i}.png")
        records.append(Record(str(i), "train", ("x",), image=tmp_path / f"{i}.png"))
    made = extract_proposals(records, detector, tmp_path / "p", "train", top=6, min_side=4, echo=None)
    assert made.meta["proposals"] == "detreg"
    for i, record in enumerate(records):
        boxes, scores = detector(record.open())
        large = ((boxes[:, 2:] - boxes[:, :2]) >= 4).all(1)
        np.testing.assert_array_equal(made.of(i), boxes[large][:6])
        np.testing.assert_array_equal(made.scores[i][made.mask[i]], scores[large][:6])


def test_a_detector_that_gives_nonsense_is_named(checkpoint, tmp_path):
    detector = D.DETReg(checkpoint, **OPEN)
    detector.net.class_embed[-1].bias.fill_(float("nan"))
    picture().save(tmp_path / "a.png")
    with pytest.raises(DataError, match=r"a\.png: image a: detreg gives a box or a score that is not finite"):
        extract_proposals(
            [Record("a", "train", ("x",), image=tmp_path / "a.png")], detector, tmp_path, "train"
        )


def test_the_opener_is_strict_about_published_names(checkpoint):
    state = D.published_names(D.read_checkpoint(checkpoint), "x")
    shape = D.shape_of(D.read_checkpoint(checkpoint), "x", HEADS)
    with pytest.raises(ValueError, match=r"here does not fit .* unknown \['alien'\]"):
        deformable_detr({**state, "alien": torch.zeros(1)}, backbone="test_resnet", source="here", **shape)
