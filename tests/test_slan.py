"""SLAN's model against the paper: every equation against loops, what gradients reach, what padding cannot change."""

import math
from dataclasses import replace

import pytest
import slan_naive as naive
import timm
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn
from torchvision.models.detection import fasterrcnn_resnet50_fpn
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.rpn import RegionProposalNetwork

from finematch.boxes import convert, iou, multi_scale_grid
from finematch.checkpoints import load_best, save_weights
from finematch.config import Settings
from finematch.encoders import BertTower, Cells, small_bert
from finematch.models.configs import LocatorConfig, SLANConfig
from finematch.models.slan.adaptor import (
    CrossAttention,
    RegionAdaptor,
    RegionEmbedding,
    RegionFilter,
    best_word,
    cell_weights,
    offset,
    regression_loss,
    regression_target,
    similarity,
    stop,
)
from finematch.models.slan.locator import SelfLocator, ends, locator_config
from finematch.models.slan.objective import SLAN
from finematch.models.slan.proposals import RPN, SMALLEST, QueryProposals, cut, decode, load_proposals
from finematch.models.slan.towers import (
    CachedStages,
    SmallStages,
    Stages,
    Towers,
    VisionDecoder,
    pixel_stages,
)

CHANNELS, SIZES = (4, 5, 6), ((6, 8), (3, 4), (2, 2))
BASE = {"width": 8, "pyramid": 6, "heads": 2, "count": 12, "anchor": 1.5, "top": 4, "samples": 2, "query_depth": 1,
        "query_heads": 2, "cell_tau": 0.2}  # fmt: skip
VERSIONS = {
    version: {
        name: getattr(Settings("slan", {"version": version}), name)
        for name in ("proposals", "scaling", "token")
    }
    for version in ("iccv", "arxiv")
}


def tiny(seed=3, **options):
    """A locator in double precision, moved from its start: there, half of it is zero or the same for all regions."""
    torch.manual_seed(seed)
    model = SelfLocator(CHANNELS, LocatorConfig(**BASE | options)).double().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "theta" in name or "predict" in name:
                parameter.normal_(std=0.3)
            elif "head.conv" in name or "cls_logits.weight" in name:
                parameter.normal_(std=0.2 if "conv" in name else 0.7)
            elif "bbox_pred.weight" in name:
                parameter.normal_(std=0.03)
            elif "cls_logits.bias" in name:  # the best of many anchors are far from a saturated sigmoid
                parameter.fill_(-6.0)
            elif name.startswith(("proposals.box.4", "proposals.saliency")):
                parameter.normal_(std=0.7)
    return model


def inputs(b=3, lengths=(5, 7, 4), pad=0, seed=1, sizes=SIZES):
    g = torch.Generator().manual_seed(seed)
    maps = [torch.randn(b, c, *s, generator=g).double() for c, s in zip(CHANNELS, sizes, strict=True)]
    mask = torch.arange(max(lengths) + pad)[None] < torch.tensor(lengths)[:, None]
    words = torch.randn(b, max(lengths), BASE["width"], generator=g).double()
    # padding is not zero: a tower's states at padding are anything
    return maps, F.pad(words, (0, 0, 0, pad), value=9.0), mask


def field(located, name, i):
    """A field of picture i, without padding of regions and words."""
    value = getattr(located, name)
    valid, real = located.valid[i], located.words[i].any(-1)
    if name == "boxes":
        return value[:, i, valid]
    if name == "cosine":
        return value[:, i, valid][..., real]
    value = value[i]
    return {
        "scores": lambda: value[valid],
        "regions": lambda: value[valid],
        "words": lambda: value[real],
    }.get(name, lambda: value)()


FIELDS = ("boxes", "scores", "regions", "words", "picture", "text", "reg_loss", "cosine")


def assert_same(one, other, rows=None, **tolerance):
    for name in FIELDS:
        for i in range(len(one.valid)) if rows is None else rows:
            torch.testing.assert_close(
                field(one, name, i), field(other, name, i), **tolerance, msg=lambda m, n=name: f"{n}: {m}"
            )


# ------------------------------------------------------------------------------------------- switches
def test_the_literal_reading_is_the_papers_text():
    """What Eq. 1 to 3 and Algorithm 1 print; the readings that no text decides keep their defaults."""
    printed = {
        "attn": "literal", "region_update": "overwrite", "axes": "paper", "unit": "N", "extent": "map",
        "steer": "fused", "reg_part": "box", "k": 3, "cell_weights": "raw", "embed_norm": "none",
        "filter_text": False, "detach_target": True, "reg_reduction": "sum",
        "target": "mean", "first": "encoder", "fused": "regions", "source": "decoder", "nms": 0.0,
    }  # fmt: skip
    assert LocatorConfig.literal().items() >= printed.items()
    default = LocatorConfig()
    differs = {name for name, value in LocatorConfig.literal().items() if value != getattr(default, name)}
    assert differs == {
        "attn",
        "region_update",
        "axes",
        "unit",
        "extent",
        "steer",
        "cell_weights",
        "embed_norm",
    }
    for scale, asked in (("tiny", "literal"), ("paper", None)):
        resolved = Settings("slan", {"scale": scale, "reading": asked}).as_dict()
        assert resolved.items() >= printed.items()
    assert Settings("slan", {"scale": "paper", "reading": "default"}).attn == "transformer"
    assert Settings("slan", {"scale": "paper", "attn": "transformer"}).attn == "transformer"


CHOICES = [
    {name: value}
    for _, name, values, standard, *_ in LocatorConfig.readings()
    for value in values
    if value != standard and name not in ("k", "nms", "proposals", "token", "scaling", "roi", "embed_norm")
]
CONFIGURATIONS = [
    {}, *CHOICES, {"levels": 0}, {"levels": 1}, {"levels": 2, "ratios": (0.8, 0.3)}, {"k": 1}, {"k": 5},
    {"nms": 0.2}, {"anchor_offset": 0.0}, {"top": 0}, {"threshold": 0.0}, {"top": 0, "threshold": 0.0},
    {"threshold": 0.9}, {"weighting": False}, {"embed_norm": "none"}, {"scaling": "level"}, {"scaling": "predicted"},
    {"proposals": "queries"}, {"proposals": "queries", "scaling": "query"}, VERSIONS["iccv"], VERSIONS["arxiv"],
    {"axes": "paper", "unit": "N", "cell_weights": "raw", "attn": "literal", "region_update": "overwrite",
     "outside": "keep"}, {"l1_weight": 5.0, "giou_weight": 2.0},
]  # fmt: skip


@torch.no_grad()
@pytest.mark.parametrize("options", CONFIGURATIONS, ids=str)
def test_algorithm_1_picture_by_picture_in_loops(options):
    model = tiny(**options)
    maps, words, mask = inputs(pad=2)
    located = model(maps, words, mask)
    assert located.boxes.dtype == torch.float64
    kept = 0
    for i in range(3):
        planes = [m[0] for m in model.decoder([m[i : i + 1] for m in maps])]
        if isinstance(model.proposals, RPN):
            found = naive.proposals(model.proposals, planes)
        else:
            boxes, logits, _ = model.proposals([p[None] for p in planes])
            found = list(zip(boxes[0].tolist(), logits[0].tolist(), strict=True))
        n = int(mask[i].sum())
        counted = range(n) if model.config.include_special else range(1, n - 1)
        expected = naive.locate(model, planes, maps[-1][i], found, words[i, :n], list(counted))
        kept += len(expected["scores"])
        for name in FIELDS:
            torch.testing.assert_close(
                field(located, name, i),
                expected[name],
                rtol=1e-8,
                atol=1e-9,
                msg=lambda m, n=name: f"{n}: {m}",
            )
    if options == {}:
        assert 3 < kept < 12  # the threshold cuts some, or valid is not tested


def test_every_choice_changes_the_result():
    maps, words, mask = inputs()
    same_value = ("box_grad", "detach_target")  # these two change gradients alone
    for options in CONFIGURATIONS[1:]:
        if options == VERSIONS["iccv"] or set(options) & {*same_value, "threshold"}:
            continue
        # the neighbourhood of a region of this size does not leave the picture
        beside = {"extent": "map"} if "outside" in options else {}
        base, other = (tiny(**beside, **each)(maps, words, mask) for each in ({}, options))
        differs = [
            getattr(base, n).shape != getattr(other, n).shape
            or not torch.allclose(getattr(base, n), getattr(other, n))
            for n in FIELDS
        ]
        assert any(differs), options


@pytest.mark.parametrize(
    ("options", "says"),
    [
        *(({name: "other"}, f"{name} is 'other'; use ") for _, name, values, *_ in LocatorConfig.readings()
          if isinstance(values[0], str)),
        ({"k": 2}, "odd"), ({"k": 0}, "k = 0"), ({"levels": 4}, "number of maps"), ({"levels": -1}, "levels"),
        ({"ratios": (1.0,)}, "1 ratios"), ({"ratios": (1.0, 0.5, 0.0)}, "positive"), ({"cell_tau": 0.0}, "cell_tau"),
        ({"threshold": 1.0}, "threshold"), ({"top": -1}, "top"), ({"count": 0}, "count"), ({"nms": 1.0}, "nms"),
        ({"filter_text": True, "token": "regions"}, "without a text"), ({"scaling": "query"}, "no identity"),
        ({"scales": (0.5, 1.0, 2.0)}, "single map"), ({"proposals": "queries", "count": 0}, "count"),
    ],
    ids=str,
)  # fmt: skip
def test_impossible_options_are_refused(options, says):
    with pytest.raises(ValueError, match=says):
        tiny(**options)


# ------------------------------------------------------------------------------------------- invariance
@pytest.mark.parametrize("options", [{}, {"nms": 0.2}, {"filter_text": True}, VERSIONS["arxiv"], {"attn": "literal"},
                                     {"include_special": True}, {"roi": "table"}], ids=str)  # fmt: skip
def test_padding_and_company_change_nothing(options):
    model = tiny(**options)
    maps, words, mask = inputs()
    whole = model(maps, words, mask)
    assert_same(whole, model(*inputs(pad=4)))
    for i in range(3):
        alone = model([m[i : i + 1] for m in maps], words[i : i + 1], mask[i : i + 1])
        for name in FIELDS:
            torch.testing.assert_close(field(alone, name, 0), field(whole, name, i))
    order = torch.tensor([2, 0, 1])
    turned = model([m[order] for m in maps], words[order], mask[order])
    for place, i in enumerate(order.tolist()):
        for name in FIELDS:
            torch.testing.assert_close(field(turned, name, place), field(whole, name, i))


@pytest.mark.parametrize("options", [{}, {"roi": "table"}, {"filter_text": True}, {"fused": "map"}], ids=str)
def test_pictures_are_prepared_once_for_many_texts(options):
    model = tiny(**options)
    maps, words, mask = inputs()
    pictures = model.prepare(maps)
    which = torch.tensor([0, 0, 2, 1, 2])
    texts = torch.tensor([1, 0, 2, 2, 0])
    pairs = model.locate(pictures[which], words[texts], mask[texts])
    direct = model([m[which] for m in maps], words[texts], mask[texts])
    assert_same(pairs, direct)


def test_what_padding_holds_is_returned_as_zero():
    maps, words, mask = inputs(pad=2)
    located = tiny(threshold=0.9)(maps, words, mask)
    assert not located.valid.all()
    assert not located.words[~mask].any()
    assert not located.regions[~located.valid].any()
    assert not located.scores[~located.valid].any()
    assert not located.cosine.transpose(0, 1)[~located.valid.unsqueeze(1).expand(-1, 4, -1)].any()
    assert not located.cosine.permute(1, 3, 0, 2)[~mask].any()


def test_a_text_without_words_moves_nothing():
    model = tiny()
    with torch.no_grad():
        for adaptor in model.adaptors:
            adaptor.theta.zero_()
    maps, words, _ = inputs(lengths=(2, 2, 1))
    mask = torch.arange(2)[None] < torch.tensor([2, 2, 1])[:, None]
    located = model(maps, words, mask)
    torch.testing.assert_close(located.boxes, located.boxes[:1].expand_as(located.boxes))
    assert torch.isfinite(located.regions).all()
    torch.testing.assert_close(located.reg_loss, torch.zeros(3).double())


def test_special_tokens_are_the_ends_unless_told():
    mask = torch.tensor([[True, True, True, True], [True, True, False, False], [True, False, False, False]])
    assert ends(mask).int().tolist() == [[1, 0, 0, 1], [1, 1, 0, 0], [1, 0, 0, 0]]
    model = tiny()
    maps, words, mask = inputs(pad=1)
    assert_same(model(maps, words, mask, ends(mask)), model(maps, words, mask))
    none = model(maps, words, mask, torch.zeros_like(mask))
    assert_same(none, tiny(include_special=True)(maps, words, mask))
    assert none.cosine[:, :, :, 0].any()


# ------------------------------------------------------------------------------------------- boxes
def assert_valid(boxes):
    assert torch.isfinite(boxes).all()
    assert ((boxes >= 0) & (boxes <= 1)).all()
    assert (boxes[..., 2:] - boxes[..., :2] >= 0.999 * SMALLEST).all()


@pytest.mark.parametrize(
    "options",
    [{}, {"cell_weights": "raw", "unit": "N"}, {"proposals": "queries"}, {"extent": "region"}],
    ids=str,
)
def test_boxes_stay_valid_whatever_the_weights(options):
    maps, words, mask = inputs()
    for scale in (0.3, 3.0, 30.0):
        model = tiny(**options)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if any(part in name for part in ("theta", "bbox_pred", "proposals.box.4")):
                    parameter.copy_(torch.randn(parameter.shape) * scale)
        located = model.float()([m.float() for m in maps], words.float(), mask)
        assert_valid(located.boxes)
        assert torch.isfinite(located.reg_loss).all()


def test_cut_and_stop_by_hand():
    boxes = torch.tensor([[0.1, 0.5, 0.4, 0.2], [1.9, 0.5, 0.4, 0.0], [0.5, 0.9, 3.0, 0.4]])
    s = SMALLEST
    expected = [[0, 0.4, 0.3, 0.6], [1 - s, 0.5, 1, 0.5 + s], [0, 0.7, 1, 1]]
    torch.testing.assert_close(cut(boxes), torch.tensor(expected))
    expected = [[0, 0.4, 0.4, 0.6], [0.6, 0.5 - s / 2, 1, 0.5 + s / 2], [0, 0.6, 1, 1]]
    torch.testing.assert_close(stop(boxes), torch.tensor(expected))
    inner = torch.tensor([[0.5, 0.4, 0.3, 0.2]])
    torch.testing.assert_close(convert(cut(inner), "xyxy", "cxcywh"), inner)
    torch.testing.assert_close(convert(stop(inner), "xyxy", "cxcywh"), inner)


# ------------------------------------------------------------------------------------------- 3.1
def test_stages_are_timms_features_and_say_their_channels():
    torch.manual_seed(0)
    cells = Cells("resnet10t")
    stages = Stages(cells, (1, 2, 3)).eval()
    features = timm.create_model("resnet10t", features_only=True, out_indices=(1, 2, 3)).eval()
    features.load_state_dict(cells.net.state_dict(), strict=False)
    pixels = torch.rand(2, 3, 64, 64)
    maps = stages(pixels)
    assert tuple(m.shape[1] for m in maps) == stages.channels == (64, 128, 256)
    assert [m.shape[-1] for m in maps] == [16, 8, 4]
    for ours, theirs in zip(maps, features((pixels - cells.mean) / cells.sd), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_a_plain_vit_gives_its_normed_patches():
    torch.manual_seed(0)
    cells = Cells("vit_tiny_patch16_224", options={"img_size": 64}).eval()
    stages, pixels = Stages(cells, (-1,)).eval(), torch.rand(2, 3, 64, 64)
    (only,) = stages(pixels)
    assert stages.channels == (192,)
    torch.testing.assert_close(only, cells(pixels))


def test_frozen_stages_have_no_gradient_and_keep_their_statistics():
    stages = Stages(Cells("resnet10t"), (2, 3), frozen=True)
    before = {k: v.clone() for k, v in stages.state_dict().items()}
    maps = stages.train()(torch.rand(2, 3, 64, 64))
    assert not any(m.requires_grad for m in maps)
    assert not any(p.requires_grad for p in stages.parameters())
    assert all(torch.equal(v, before[k]) for k, v in stages.state_dict().items())
    learning = Stages(Cells("resnet10t"), (2, 3)).train()
    assert all(m.requires_grad for m in learning(torch.rand(2, 3, 64, 64)))


def test_small_stages_of_a_picture_do_not_depend_on_its_batch():
    torch.manual_seed(0)
    net, pixels = SmallStages((16, 24, 32)).train(), torch.rand(4, 3, 64, 64)
    maps = net(pixels)
    assert [tuple(m.shape) for m in maps] == [(4, 16, 16, 16), (4, 24, 8, 8), (4, 32, 4, 4)]
    for one, many in zip(net(pixels[2:3]), maps, strict=True):
        torch.testing.assert_close(one, many[2:3])
    assert [m.shape[-1] for m in net(torch.rand(1, 3, 50, 50))] == [13, 7, 4]


def test_cached_stages_are_checked():
    maps = [torch.rand(2, 4, 4, 4).half(), torch.rand(2, 6, 2, 2).half()]
    cached = CachedStages((4, 6))
    assert all(torch.equal(a, b.float()) for a, b in zip(cached(maps), maps, strict=True))
    with pytest.raises(ValueError, match=r"\(6, 4\) channels"):
        cached(maps[::-1])


@pytest.mark.parametrize("width", [16, 20])
def test_towers(width):
    torch.manual_seed(0)
    bert = BertTower(small_bert(30, width=16, depth=1, heads=2)).eval()
    towers = Towers(SmallStages((8, 8, 12)), bert, width).eval()
    assert towers.channels == (8, 8, 12)
    maps = towers.vision(torch.rand(2, 3, 64, 64))
    mean = maps[-1].flatten(2).mean(-1)
    torch.testing.assert_close(towers.pooled(maps), towers.project_image(mean))
    ids, mask = torch.tensor([[1, 5, 2, 0], [1, 6, 7, 2]]), torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1]]).bool()
    words = towers.text(ids, mask)
    states = bert(input_ids=ids, mask=mask, special=mask).states
    torch.testing.assert_close(words, states if width == 16 else towers.project_text(states))
    torch.testing.assert_close(towers.text(ids[:1, :3], mask[:1, :3])[0], words[0, :3])
    located = SelfLocator(towers.channels, LocatorConfig(**BASE | {"width": width}))(maps, words, mask)
    assert located.picture.shape == located.text.shape == (2, width)


# ------------------------------------------------------------------------------------------- 3.2.1
def test_the_decoder_is_a_feature_pyramid_coarse_to_fine():
    torch.manual_seed(0)
    decoder = VisionDecoder((3, 4, 5, 6), 7, 3)  # the finest stage is not used
    maps = [torch.randn(2, c, s, s) for c, s in zip((3, 4, 5, 6), (32, 16, 8, 4), strict=True)]
    coarse, middle, fine = decoder(maps)
    lateral = [block[0](m) for block, m in zip(decoder.fpn.inner_blocks, maps[1:], strict=True)]
    top = lateral[2]
    between = lateral[1] + top.repeat_interleave(2, 2).repeat_interleave(2, 3)
    bottom = lateral[0] + between.repeat_interleave(2, 2).repeat_interleave(2, 3)
    for made, level, block in zip(
        (fine, middle, coarse), (bottom, between, top), decoder.fpn.layer_blocks, strict=True
    ):
        torch.testing.assert_close(made, block[0](level))


@pytest.mark.parametrize("source", ["decoder", "encoder"])
def test_coarse_maps_that_the_encoder_lacks_are_pooled(source):
    torch.manual_seed(0)
    short, full = VisionDecoder((3, 4), 7, 4, source=source), VisionDecoder((3, 4, 4, 4), 7, 4, source=source)
    full.load_state_dict(short.state_dict())
    maps = [torch.randn(2, c, s, s) for c, s in ((3, 10), (4, 5))]
    pooled = [F.max_pool2d(maps[1], 2, ceil_mode=True)]  # 3 x 3, whose last row and column stood alone
    pooled.append(F.max_pool2d(pooled[0], 2, ceil_mode=True))
    made = short(maps)
    assert [m.shape[-1] for m in made] == [2, 3, 5, 10]
    for mine, theirs in zip(made, full([*maps, *pooled]), strict=True):
        torch.testing.assert_close(mine, theirs)


def test_the_encoders_own_maps_meet_only_a_change_of_width():
    torch.manual_seed(0)
    decoder = VisionDecoder((3, 4, 5), 7, 2, source="encoder")
    maps = [torch.randn(2, c, s, s) for c, s in zip((3, 4, 5), (16, 8, 4), strict=True)]
    coarse, fine = decoder(maps)
    for made, level, layer in zip((coarse, fine), (maps[2], maps[1]), decoder.lateral, strict=True):
        torch.testing.assert_close(made, torch.einsum("oc,bchw->bohw", layer.weight[:, :, 0, 0], level)
                                   + layer.bias[:, None, None])  # fmt: skip


@pytest.mark.parametrize("source", ["decoder", "encoder"])
def test_a_single_map_makes_a_simple_pyramid(source):
    torch.manual_seed(0)
    v = torch.randn(2, 6, 7, 7)
    made = VisionDecoder((6,), 4, 3, source=source)([v])
    assert [tuple(m.shape[1:]) for m in made] == [(4, 4, 4), (4, 7, 7), (4, 14, 14)]
    made = VisionDecoder((6,), 4, 2, source=source, scales=(1.0, 4.0))([v])
    assert [m.shape[-1] for m in made] == [7, 28]
    with pytest.raises(ValueError, match="2 scales"):
        VisionDecoder((6,), 4, 3, source=source, scales=(1.0, 2.0))
    if source == "decoder":
        with pytest.raises(ValueError, match="scale 3"):
            VisionDecoder((6,), 4, 1, scales=(3.0,))
    else:  # without layers: a constant stays one
        flat = VisionDecoder((6,), 4, 3, source=source)([torch.ones(1, 6, 7, 7)])
        assert all((m - m.mean((2, 3), keepdim=True)).abs().max() < 1e-6 for m in flat)


# ------------------------------------------------------------------------------------------- proposals
@pytest.mark.parametrize("threshold", [0.0, 0.5])
def test_the_rpn_proposes_what_torchvisions_does(threshold):
    torch.manual_seed(0)
    ours = RPN(6, count=20, anchor=2.0, ratios=(1.0,), anchor_offset=0.0, nms=threshold, smallest=1e-6)
    maps = [torch.randn(2, 6, s, s) for s in (4, 8, 16)]  # coarse to fine: of strides 32, 16, 8 at 128 px
    anchors = AnchorGenerator(((64,), (32,), (16,)), ((1.0,),) * 3)
    with torch.no_grad():
        for layer, spread in ((ours.head.cls_logits, 0.3), (ours.head.bbox_pred, 0.1)):
            layer.weight.normal_(std=spread)
        # maps side by side in one ranking, as ours: torchvision suppresses within a map, so it gets one map at a time
        for m, size in zip(maps, (64, 32, 16), strict=True):
            single = AnchorGenerator(((size,),), ((1.0,),))
            theirs = RegionProposalNetwork(
                single, ours.head, 0.7, 0.3, 256, 0.5, {"training": 200, "testing": 200},
                {"training": 20, "testing": 20}, threshold or 1.0,
            ).eval()  # fmt: skip
            wanted, _ = theirs(ImageList(torch.zeros(2, 3, 128, 128), [(128, 128)] * 2), {"0": m})
            boxes, _, valid = ours([m])
            for i in range(2):
                n = min(int(valid[i].sum()), len(wanted[i]))
                assert n >= 5
                torch.testing.assert_close(boxes[i, :n] * 128, wanted[i][:n], atol=1e-3, rtol=1e-4)
    (grid, _) = anchors(ImageList(torch.zeros(2, 3, 128, 128), [(128, 128)] * 2), maps)
    torch.testing.assert_close(convert(ours.anchors(maps), "cxcywh", "xyxy") * 128, grid)


def test_anchors_stand_in_their_cells_with_their_ratios():
    rpn = RPN(2, anchor=2.0, ratios=(0.25, 1.0))
    anchors = rpn.anchors([torch.zeros(1, 2, 2, 4)])
    assert anchors.shape == (16, 4)
    torch.testing.assert_close(anchors[:2], torch.tensor([[0.125, 0.25, 1.0, 0.5], [0.125, 0.25, 0.5, 1.0]]))
    torch.testing.assert_close(anchors[2, :2], torch.tensor([0.375, 0.25]))  # columns before rows
    torch.testing.assert_close(anchors[-1, :2], torch.tensor([0.875, 0.75]))


def test_deltas_by_hand():
    anchor, delta = torch.tensor([[0.5, 0.4, 0.2, 0.1]]), torch.tensor([[1.0, -0.5, math.log(2), 99.0]])
    torch.testing.assert_close(decode(anchor, delta), torch.tensor([[0.7, 0.35, 0.4, 6.25]]))


def test_suppressed_proposals_do_not_overlap_and_may_be_few():
    torch.manual_seed(0)
    rpn, maps = RPN(6, count=30, anchor=3.0, nms=0.3), [torch.randn(3, 6, s, s) for s in (2, 4)]
    with torch.no_grad():
        rpn.head.cls_logits.weight.normal_()
    boxes, logits, valid = rpn(maps)
    assert boxes.shape == (3, 30, 4)
    assert not valid.all()
    assert valid[:, 0].all()
    for i in range(3):
        some = boxes[i, valid[i]]
        assert (iou(some, some) - torch.eye(len(some))).max() <= 0.3
        assert (logits[i, valid[i]].diff() <= 0).all()


def test_queries_start_as_the_grid_and_part():
    torch.manual_seed(0)
    module, maps = (
        QueryProposals(8, count=10, depth=1, heads=2),
        [torch.randn(2, 8, 3, 4), torch.randn(2, 8, 6, 8)],
    )
    boxes, logits, valid = module(maps)
    assert valid.all()
    torch.testing.assert_close(boxes, multi_scale_grid(1, 1, 10).expand(2, -1, -1), atol=0.03, rtol=0)
    assert logits.std() > 0
    boxes.square().sum().backward()
    assert module.reference.grad.abs().sum() > 0
    nn.init.normal_(module.box[-1].weight)
    moved = module(maps).boxes
    assert not torch.allclose(moved[0], moved[1])  # what a picture holds now moves its boxes
    shifted = module([maps[0].flip(3)]).boxes
    assert not torch.allclose(shifted, moved)  # and where it holds it: positions count


@pytest.mark.parametrize("old", [False, True])
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_weights_of_torchvisions_detector_are_loaded(tmp_path, old, suffix):
    torch.manual_seed(0)
    theirs = fasterrcnn_resnet50_fpn(weights=None, weights_backbone=None).eval()
    state = {
        k: v.contiguous()
        for k, v in theirs.state_dict().items()
        if not k.startswith(("roi", "backbone.body"))
    }
    state["roi_heads.box_head.fc6.bias"] = torch.zeros(3)  # of other parts a file may hold anything
    if old:  # the names of the first published checkpoints
        state = {k.replace("conv.0.0.", "conv.").replace(".0.weight", ".weight").replace(".0.bias", ".bias"): v
                 for k, v in state.items()}  # fmt: skip
        assert "rpn.head.conv.weight" in state
        assert "backbone.fpn.inner_blocks.3.weight" in state
    path = tmp_path / f"detector{suffix}"
    save_file(state, path) if suffix == ".safetensors" else torch.save(state, path)
    config = LocatorConfig(width=16, heads=2, pyramid=256, anchor=3.0)
    model = SelfLocator((512, 1024, 2048), config)
    with pytest.raises(ValueError, match=r"anchors of 8 cells at 0.*set anchor=8 and anchor_offset=0"):
        load_proposals(model.proposals, path, decoder=model.decoder)
    model = SelfLocator((512, 1024, 2048), replace(config, anchor=8.0, anchor_offset=0.0))
    said = load_proposals(model.proposals, path, decoder=model.decoder)
    assert said == f"{path.name}: decoder, proposals, anchors of 8 cells at 0"
    maps = {str(i): torch.randn(1, c, s, s) for i, (c, s) in enumerate(zip((256, 512, 1024, 2048), (16, 8, 4, 2),
                                                                          strict=True))}  # fmt: skip
    with torch.no_grad():
        pyramid = list(theirs.backbone.fpn(maps).values())[1:4]
        ours = model.decoder(list(maps.values())[1:])
        for a, b in zip(ours[::-1], pyramid, strict=True):
            torch.testing.assert_close(a, b)
        for a, b in zip(model.proposals.head(ours), theirs.rpn.head(ours), strict=True):
            assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
    images = ImageList(torch.zeros(1, 3, 64, 64), [(64, 64)])
    generator = AnchorGenerator(((64,), (128,), (256,)), ((0.5, 1.0, 2.0),) * 3)
    (grid,) = generator(images, ours[::-1])
    anchors = convert(model.proposals.anchors(ours[::-1]), "cxcywh", "xyxy") * 64
    torch.testing.assert_close(anchors, grid, atol=0.51, rtol=0)  # torchvision rounds anchors to pixels


def test_a_whole_detector_of_torchvisions_gives_its_maps_and_proposals(tmp_path):
    """With its ResNet-50, its pyramid and its anchors the locator proposes what the detector's own RPN does."""
    torch.manual_seed(0)
    theirs = fasterrcnn_resnet50_fpn(weights=None, weights_backbone=None).eval()
    theirs.rpn.head.bbox_pred.weight.data.normal_(std=0.01)
    torch.save(theirs.state_dict(), tmp_path / "detector.pth")
    image = pixel_stages("resnet50")
    model = SelfLocator(
        image.channels, LocatorConfig(width=16, heads=2, pyramid=256, count=30, anchor_offset=0.0)
    ).eval()
    said = load_proposals(model.proposals, tmp_path / "detector.pth", decoder=model.decoder, encoder=image)
    assert said == "detector.pth: image network, decoder, proposals, anchors of 8 cells at 0"
    pixels = torch.rand(1, 3, 128, 128)
    mean, sd = (
        torch.tensor(v).reshape(3, 1, 1) for v in (theirs.transform.image_mean, theirs.transform.image_std)
    )
    with torch.no_grad():
        found = model.decoder(image.eval()(pixels))[::-1]
        wanted = theirs.backbone((pixels - mean) / sd)
        for a, b in zip(found, (wanted[name] for name in "123"), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4 * float(b.abs().max()))
        boxes, logits, _ = model.proposals(found[::-1])
        scores, deltas = theirs.rpn.head([wanted[name] for name in "123"])
        images = ImageList(torch.zeros(1, 3, 128, 128), [(128, 128)])
        (grid,) = AnchorGenerator(((64,), (128,), (256,)), ((0.5, 1.0, 2.0),) * 3)(images, found)
        scores, deltas = (torch.cat([x.unflatten(1, (3, -1)).permute(0, 3, 4, 1, 2).reshape(-1, n) for x in part])
                          for part, n in ((scores, 1), (deltas, 4)))  # fmt: skip
        (boxes_of,) = theirs.rpn.box_coder.decode(deltas, [grid]).unbind(1)
    best = scores[:, 0].topk(30)
    torch.testing.assert_close(logits[0], best.values, rtol=1e-3, atol=1e-4)
    clipped = boxes_of[best.indices].clamp(0, 128)
    large = (clipped[:, 2:] - clipped[:, :2]).amin(1) > 8  # those below 4 px have that side here
    assert large.sum() >= 10
    # torchvision rounds anchors to pixels
    assert iou(boxes[0] * 128, clipped).diagonal()[large].min() > 0.9


def test_anchors_keep_their_share_of_an_image_of_any_size():
    """A locator pretrained at 224 px proposes the same shares of the image at 384 px."""
    image = pixel_stages("test_resnet", stages=(1, 2, 3)).eval()
    shares = []
    for size in (224, 384):
        config = locator_config(
            Settings("slan", {"scale": "paper", "dataset": "flickr30k", "size": size}), image.channels
        )
        rpn = RPN(4, anchor=config.anchor)
        assert config.anchor == pytest.approx(8 * size / 224)
        maps = [torch.zeros(1, 4, size // stride, size // stride) for stride in (32, 16, 8)]
        shares.append(rpn.anchors(maps)[:, 2:].unique(dim=0))
    torch.testing.assert_close(*shares)
    assert shares[0].max() == pytest.approx(256 / 224 * 2**0.5)  # 8 cells of stride 32, twice as wide as high
    tiny = Settings("slan", {})
    assert locator_config(tiny, (8, 8)).anchor == tiny.anchor == 4
    assert locator_config(tiny.replace(scale="paper", scales="0.5, 1, 4"), (8,)).scales == (0.5, 1, 4)
    assert locator_config(tiny.replace(scale="paper", scales="0.5, 1, 4"), (8, 8)).scales == ()


def test_recomputed_activations_give_the_same_gradients():
    """Of a ViT and of BERT; a network with batch norm is left as it is, or its running means would count twice."""
    torch.manual_seed(0)
    text = small_bert(20, width=16, depth=2, heads=2)
    pixels, ids = torch.rand(2, 3, 32, 32), torch.randint(0, 20, (2, 5))
    towers = Towers(pixel_stages("vit_tiny_patch16_224"), BertTower(text), 16).train()

    def step() -> tuple[int, dict[str, torch.Tensor]]:
        """How many numbers wait for the backward pass, and the gradients."""
        saved: list[int] = []
        towers.zero_grad()
        torch.manual_seed(1)  # of BERT's dropout
        with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x.numel()) or x, lambda x: x):
            words = towers.text(ids, torch.ones_like(ids).bool())
            loss = towers.pooled(towers.vision(pixels)).sum() + words.square().sum()
        loss.backward()
        return sum(saved), {n: p.grad.clone() for n, p in towers.named_parameters() if p.grad is not None}

    kept, gradients = step()
    towers.recompute_activations()
    fewer, same = step()
    assert fewer < kept / 3
    assert same.keys() == gradients.keys()
    for name, gradient in same.items():
        torch.testing.assert_close(gradient, gradients[name], msg=name)
    net = pixel_stages("test_resnet", stages=(1, 2, 3))
    Towers(net, BertTower(text), 16).recompute_activations()
    assert not net.cells.net.grad_checkpointing


@pytest.mark.parametrize("kind", ["rpn", "queries"])
def test_own_weights_are_loaded_and_wrong_ones_refused(tmp_path, kind):
    source, other = (tiny(seed, proposals=kind) for seed in (0, 1))
    path = tmp_path / "own.safetensors"
    state = {k: v.contiguous() for k, v in source.proposals.state_dict().items()}
    save_file(state, path)
    load_proposals(other.proposals, path)
    assert all(torch.allclose(v, state[k].float().double()) for k, v in other.proposals.state_dict().items())
    with pytest.raises(ValueError, match=r"pyramid\..*missing"):
        load_proposals(other.proposals, path, decoder=other.decoder)
    save_file(state | {f"pyramid.{k}": v.contiguous() for k, v in source.decoder.state_dict().items()}, path)
    load_proposals(other.proposals, path, decoder=other.decoder)
    assert torch.allclose(
        other.decoder.fpn.inner_blocks[0][0].weight, source.decoder.fpn.inner_blocks[0][0].weight
    )
    name = next(iter(state))
    save_file({k: v for k, v in state.items() if k != name}, path)
    with pytest.raises(ValueError, match=f"missing .*{name}"):
        load_proposals(other.proposals, path)
    save_file({**state, name: torch.zeros(2, 3)}, path)
    with pytest.raises(ValueError, match="another shape"):
        load_proposals(other.proposals, path)
    path.write_bytes(b"no weights")
    with pytest.raises(ValueError, match="no weights that can be read"):
        load_proposals(other.proposals, path)
    with pytest.raises(FileNotFoundError, match=r"gone\.pth"):
        load_proposals(other.proposals, tmp_path / "gone.pth")


def test_frozen_proposals_take_no_gradient():
    model = tiny(frozen=True)
    maps, words, mask = inputs()
    located = model(maps, words, mask)
    assert not model.prepare(maps).boxes.requires_grad
    (located.picture.square().sum() + located.reg_loss.sum()).backward()
    assert all(p.grad is None for p in model.proposals.parameters())
    assert any(p.grad is not None and p.grad.any() for p in model.decoder.parameters())
    assert_same(located, tiny()(maps, words, mask))


def trained_on_pixels(frozen=True, **changes):
    """A SLAN whose encoder is trained on pixels, with batch norms, queues and momentum encoders; and a batch."""
    s = Settings("slan", {"width": 16, "pyramid": 8, "count": 12, "top": 5, "heads": 2, "query_depth": 1, "samples": 2,
                          "query_heads": 2, "embed": 8, "queue": 12, "frozen": frozen, **changes})  # fmt: skip
    torch.manual_seed(0)
    stages = Stages(Cells("resnet10t", options={"num_classes": 0}), (1, 2, 3))
    towers = Towers(stages, BertTower(small_bert(30, width=16, depth=1, heads=2)), 16)
    locator = SelfLocator(towers.channels, LocatorConfig.of(s), encoder=stages)
    model = SLAN(towers, locator, SLANConfig.of(s, mlm_weight=0.0, reg_weight=1.0), random_steps=9)
    g = torch.Generator().manual_seed(1)
    mask = torch.ones(4, 6, dtype=torch.bool)
    ids = torch.randint(5, 30, (4, 6), generator=g)
    special = torch.zeros_like(mask)
    special[:, [0, -1]] = True
    batch = {"image": {"pixels": torch.rand(4, 3, 64, 64, generator=g)}, "image_id": torch.arange(4),
             "text": {"input_ids": ids, "mask": mask, "special": special}}  # fmt: skip
    return model, batch


def proposed(model, batch):
    """Proposals of a batch, in evaluation mode, then in training mode (which moves the statistics of batch norms)."""
    found = []
    for mode in (False, True):
        prepared = model.train(mode).encode_image(**batch["image"]).prepared
        found += [part.detach().clone() for part in (prepared.boxes, prepared.scores, prepared.valid)]
    return found


def steps(model, batch, count=3):
    optimiser = torch.optim.AdamW(model.train().parameters(), lr=1e-2)
    for _ in range(count):
        optimiser.zero_grad()
        model(batch)["loss"].backward()
        optimiser.step()


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("source", ["decoder", "encoder"])
def test_frozen_proposals_hold_bit_for_bit_while_all_below_them_is_trained(version, source):
    model, batch = trained_on_pixels(version=version, source=source)
    before, was = proposed(model, batch), {k: v.clone() for k, v in model.state_dict().items()}
    assert all(torch.equal(a, b) for a, b in zip(before[:3], before[3:], strict=True))  # whatever the mode
    steps(model, batch)
    assert all(torch.equal(a, b) for a, b in zip(proposed(model, batch), before, strict=True))
    assert torch.equal(model.encode_image(**batch["image"]).prepared.boxes, before[0])
    changed = {k for k, v in model.state_dict().items() if not torch.equal(v, was[k])}
    trained = {k for k, p in model.named_parameters() if p.requires_grad and "temperature" not in k}
    assert any(k.startswith("locator.decoder.") for k in trained & changed)
    assert any("image_encoder" in k for k in trained & changed)
    assert not any(k.startswith(("locator.kept.", "locator.proposals.")) for k in trained | changed)
    if version == "arxiv":  # the contrast reads regions, so the momentum encoders have proposals of their own
        slow = model.momentum.copies["locator"]
        assert slow.kept is model.locator.kept
        given = batch["image"]["pixels"]
        maps = model.momentum.copies["encoders"].towers.vision(given)
        assert torch.equal(slow.prepare(maps, given).boxes, before[0])

    moving, batch = trained_on_pixels(version=version, source=source, frozen=False)
    before = proposed(moving, batch)
    steps(moving, batch)
    assert not torch.equal(proposed(moving, batch)[0], before[0])


def test_bf16_does_not_move_frozen_proposals():
    model, batch = trained_on_pixels()
    wanted = model.encode_image(**batch["image"]).prepared.boxes
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(model.encode_image(**batch["image"]).prepared.boxes, wanted)


def test_the_frozen_copy_is_kept_with_the_weights(tmp_path):
    """A run that goes on, is opened again or is trained further has the proposals of its start."""
    model, batch = trained_on_pixels(version="arxiv")
    wanted = proposed(model, batch)
    steps(model, batch)
    save_weights(model, tmp_path / "best.safetensors")
    for load in (load_best, SLAN.load_pretrained):
        other, _ = trained_on_pixels(version="arxiv")
        steps(other, batch, 1)
        load(other, tmp_path / "best.safetensors")
        assert all(torch.equal(a, b) for a, b in zip(proposed(other, batch), wanted, strict=True))

    moving, _ = trained_on_pixels(frozen=False, version="arxiv")
    steps(moving, batch)
    save_weights(moving, tmp_path / "moving.safetensors")
    other.load_pretrained(tmp_path / "moving.safetensors")  # its proposals are frozen as they are there
    wanted = proposed(other, batch)
    torch.testing.assert_close(wanted[0], proposed(moving, batch)[0])
    steps(other, batch, 1)
    assert all(torch.equal(a, b) for a, b in zip(proposed(other, batch), wanted, strict=True))
    with pytest.raises(ValueError, match=r"of another model.*unknown .*locator\.kept"):
        moving.load_pretrained(tmp_path / "best.safetensors")


def test_a_detector_is_kept_as_it_was_loaded(tmp_path):
    model, batch = trained_on_pixels()
    other, _ = trained_on_pixels(frozen=False)
    steps(other, batch)
    state = other.locator.proposals.state_dict()
    state |= {f"pyramid.{k}": v for k, v in other.locator.decoder.state_dict().items()}
    save_file(state, tmp_path / "detector.safetensors")
    load_proposals(model.locator.proposals, tmp_path / "detector.safetensors", decoder=model.locator.decoder)
    model.locator.keep(model.encoders.towers.image_encoder)
    maps = model.eval().encoders.towers.vision(batch["image"]["pixels"])
    with torch.no_grad():
        boxes, _, _ = model.locator.proposals(model.locator.decoder(maps))
    assert torch.equal(model.locator.propose(maps, maps, batch["image"]["pixels"]).boxes, boxes)
    wanted = proposed(model, batch)
    steps(model, batch)
    assert all(torch.equal(a, b) for a, b in zip(proposed(model, batch), wanted, strict=True))


def test_frozen_proposals_of_a_trained_encoder_need_its_pixels():
    model, batch = trained_on_pixels()
    maps = model.encoders.towers.vision(batch["image"]["pixels"])
    with pytest.raises(ValueError, match="give prepare the pixels"):
        model.locator.prepare(maps)


def test_without_levels_a_decoder_that_nothing_reads_is_not_trained():
    """Data-parallel training waits for the gradient of every trained weight."""
    model, batch = trained_on_pixels(levels=0)
    model.train()(batch)["loss"].backward()
    assert not [k for k, p in model.locator.named_parameters() if p.requires_grad and p.grad is None]
    assert not any(p.requires_grad for p in model.locator.decoder.parameters())
    assert all(
        p.requires_grad for p in trained_on_pixels(levels=0, first="decoder")[0].locator.decoder.parameters()
    )


# ------------------------------------------------------------------------------------------- 3.2.2
def logits_of(*scores):
    return torch.logit(torch.tensor([scores]))


def test_the_filter_by_hand():
    logits, all_valid = logits_of(0.2, 0.8, 0.4, 0.6), torch.ones(1, 4).bool()
    index, scores, valid = RegionFilter(8, top=3, threshold=0.5)(logits, all_valid)
    assert index.tolist() == [[1, 3, 2]]
    assert valid.tolist() == [[True, True, False]]  # 0.4 / 0.8 is not above 0.5
    torch.testing.assert_close(scores, torch.tensor([[1.0, 0.75, 0.0]]))
    index, scores, valid = RegionFilter(8, top=0, threshold=0.0)(logits, all_valid)
    assert index.tolist() == [[1, 3, 2, 0]]
    assert valid.all()
    torch.testing.assert_close(scores, torch.tensor([[1.0, 0.75, 0.5, 0.25]]))
    _, scores, valid = RegionFilter(8, top=3, threshold=0.5, score_norm="sigmoid")(logits, all_valid)
    torch.testing.assert_close(scores, torch.tensor([[0.8, 0.6, 0.0]]))
    low, high = math.log(0.2 / 0.8), math.log(0.8 / 0.2)
    _, scores, _ = RegionFilter(8, top=2, threshold=0.1, score_norm="minmax")(logits, all_valid)
    torch.testing.assert_close(scores, torch.tensor([[1.0, (math.log(1.5) - low) / (high - low)]]))


@pytest.mark.parametrize("score_norm", ["max", "minmax", "sigmoid"])
def test_one_region_survives_in_any_case(score_norm):
    part = RegionFilter(8, top=3, threshold=0.9, score_norm=score_norm)
    logits = torch.tensor([[-200.0, -150.0, -300.0], [0.0, 0.0, 0.0], [200.0, 300.0, 100.0]]).requires_grad_()
    index, scores, valid = part(logits, torch.tensor([[1, 1, 1], [1, 1, 0], [1, 1, 1]]).bool())
    assert valid[:, 0].all()
    assert index[:, 0].tolist() == [1, 0, 1]
    assert torch.isfinite(scores).all()
    assert ((scores >= 0) & (scores <= 1)).all()
    if score_norm != "sigmoid":
        assert (scores[:, 0] == 1).all()
        assert valid[1].tolist() == [True, True, False]
    scores.sum().backward()
    assert torch.isfinite(logits.grad).all()


def test_proposals_that_do_not_exist_are_never_chosen():
    part = RegionFilter(8, top=4, threshold=0.0)
    logits, valid = logits_of(0.9, 0.3, 0.9, 0.2), torch.tensor([[False, True, False, True]])
    index, scores, kept = part(logits, valid)
    assert index[0, :2].tolist() == [1, 3]
    assert kept.tolist() == [[True, True, False, False]]
    torch.testing.assert_close(scores, torch.tensor([[1.0, 2 / 3, 0.0, 0.0]]))


def test_a_filter_that_reads_texts_selects_by_text():
    part = RegionFilter(4, top=1, threshold=0.0, text=True)
    with torch.no_grad():
        part.ask.weight.copy_(torch.eye(4) * 10)
    regions, logits, valid = torch.eye(4)[None], torch.zeros(1, 4), torch.ones(1, 4).bool()
    for i in range(4):
        assert part(logits, valid, regions, torch.eye(4)[i : i + 1])[0].item() == i
    with pytest.raises(ValueError, match="give regions and text"):
        part(logits, valid)


def test_saliency_is_trained_by_what_comes_after():
    maps, words, mask = inputs()
    for options, reached in (
        ({}, True),
        ({"region_update": "overwrite"}, False),
        ({"weighting": False}, False),
    ):
        model = tiny(**options)
        model(maps, words, mask).picture.square().sum().backward()
        gradient = model.proposals.head.cls_logits.weight.grad
        # overwritten regions forget S, but the words that attended to weighted regions do not
        assert (gradient is not None and bool(gradient.any())) == reached or options == {
            "region_update": "overwrite"
        }


# ------------------------------------------------------------------------------------------- 3.2.3
def test_literal_attention_holds_no_word_and_no_region():
    """As printed, new words are mixtures of regions and new regions mixtures of words (S1)."""
    torch.manual_seed(0)
    regions, words = torch.randn(1, 1, 4), torch.randn(1, 5, 4)
    valid, mask = torch.ones(1, 1).bool(), torch.ones(1, 5).bool()
    layer = CrossAttention(4, attn="literal")
    _, new = layer(regions, words, valid, mask)
    torch.testing.assert_close(new, regions.expand(-1, 5, -1))  # of one region: all words alike
    one, _ = layer(torch.randn(1, 3, 4), words[:, :1], valid.expand(1, 3), mask[:, :1])
    torch.testing.assert_close(one, words[:, :1].expand(-1, 3, -1))
    kept = CrossAttention(4, 2)(regions, words, valid, mask)[1]
    assert kept.std(1).min() > 0.1


def test_matches_are_cosines_and_the_best_real_words():
    regions = torch.tensor([[[2.0, 0], [1, 1]]])
    words = torch.tensor([[[0.0, 3], [5, 0], [9, 9]]])
    mask = torch.tensor([[True, True, False]])
    cosine = similarity(regions, words, mask)
    half = math.sqrt(0.5)
    torch.testing.assert_close(cosine, torch.tensor([[[0, 1.0, 0], [half, half, 0]]]))
    torch.testing.assert_close(best_word(cosine, mask), torch.tensor([[1.0, half]]))
    torch.testing.assert_close(
        best_word(-cosine, mask), torch.tensor([[0.0, -half]])
    )  # padding's 0 is no match
    assert best_word(cosine, torch.zeros_like(mask)).tolist() == [[0, 0]]


def test_weights_of_the_cells_by_hand():
    match = torch.tensor([[[0.1, 0.3, -0.2]]])
    torch.testing.assert_close(cell_weights(match, tau=0.1), torch.tensor([[[1.0, 3.0, -2.0]]]).softmax(-1))
    torch.testing.assert_close(cell_weights(match, form="raw"), match)
    torch.testing.assert_close(cell_weights(match, form="relu"), torch.tensor([[[0.25, 0.75, 0.0]]]))
    assert not cell_weights(-match.abs(), form="relu").any()


@pytest.mark.parametrize("weights", ["softmax", "raw", "relu"])
def test_a_region_stays_where_no_cell_stands_out(weights):
    """Of a flat map near every border, with cells outside; with `keep` those zeros are an opinion."""
    g = torch.Generator().manual_seed(0)
    centre = torch.rand(1, 50, 2, generator=g).double()
    boxes, words = torch.cat([centre - 0.02, centre + 0.02], -1), torch.randn(1, 3, 8, generator=g).double()
    flat, mask = torch.ones(1, 3, 8, 8).double(), torch.ones(1, 3).bool()
    moves = {}
    for outside in ("mean", "keep"):
        torch.manual_seed(0)
        part = RegionAdaptor(
            RegionEmbedding(3, 8),
            LocatorConfig(width=8, heads=2, cell_weights=weights, outside=outside, extent="map"),
            ratio=1.0,
            slots=50,
        )
        match, moves[outside] = part.double().search(flat, boxes, words, mask)
        middle = match[..., 4:5]
        assert outside == "keep" or torch.allclose(match, middle.expand_as(match), atol=0.1)
    # cells half outside the picture average with zeros beyond it, so matches inside are nearly, not quite, alike
    assert moves["mean"].abs().mean() < 0.3 * moves["keep"].abs().mean()


@pytest.mark.parametrize("unit", ["N/K", "N"])
def test_eq_2_moves_by_the_cell_that_matches(unit):
    """All weight on one cell of nine; width 0.6, height 0.3 of the neighbourhood."""
    extent = torch.tensor([[[0.6, 0.3]]])
    part = 3 if unit == "N/K" else 1
    for j in range(9):
        row, column = j // 3 - 1, j % 3 - 1
        weights = F.one_hot(torch.tensor([[j]]), 9).float()
        image = offset(weights, extent, axes="image", unit=unit)
        torch.testing.assert_close(image, torch.tensor([[[column * 0.6, row * 0.3]]]) / part)
        paper = offset(
            weights, extent, axes="paper", unit=unit
        )  # x by the row and N^h, y by the column and N^w
        torch.testing.assert_close(paper, torch.tensor([[[row * 0.3, column * 0.6]]]) / part)


def test_raw_weights_leave_the_neighbourhood_and_softmax_never_does():
    """Only differences of M between opposite cells count; with the unit N the worst case is three cells a side."""
    right = torch.tensor([[[0.1, 0.5, 0.9] * 3]])
    extent = torch.ones(1, 1, 2)
    raw = offset(cell_weights(right, form="raw"), extent, unit="N")
    torch.testing.assert_close(raw, torch.tensor([[[2.4, 0.0]]]))  # 3 (0.9 - 0.1) picture widths
    torch.testing.assert_close(offset(cell_weights(right - 7, form="raw"), extent, unit="N"), raw)
    soft = offset(cell_weights(right, tau=0.01), extent)
    torch.testing.assert_close(soft, torch.tensor([[[1 / 3, 0.0]]]), atol=1e-6, rtol=0)


def adaptor(scaling="rank", slots=4):
    torch.manual_seed(0)
    return RegionAdaptor(
        RegionEmbedding(3, 8, samples=2),
        LocatorConfig(width=8, heads=2, scaling=scaling),
        ratio=0.5,
        slots=slots,
    ).double()


@pytest.mark.parametrize("scaling", ["rank", "query", "level", "predicted"])
def test_whose_scale_a_region_has(scaling):
    part, slots = adaptor(scaling, 6), torch.tensor([[5, 0, 2], [1, 1, 3]])
    regions = torch.randn(2, 3, 8).double()
    torch.testing.assert_close(part.scales(regions, slots), torch.ones(2, 3, 2).double())  # none at first
    if scaling == "predicted":
        nn.init.normal_(part.predict.weight)
        torch.testing.assert_close(part.scales(regions, slots), (regions @ part.predict.weight.T).exp())
        return
    nn.init.normal_(part.theta)
    p, e = part.scales(regions, slots), part.theta.exp()
    assert len(part.theta) == (1 if scaling == "level" else 6)
    for b in range(2):
        for t in range(3):
            slot = {"rank": t, "query": int(slots[b, t]), "level": 0}[scaling]
            torch.testing.assert_close(p[b, t], e[slot])


def test_the_table_is_a_finer_roi_align():
    maps, words, mask = inputs(sizes=((24, 24), (12, 12), (6, 6)))
    exact = tiny(roi="table")(maps, words, mask)
    coarse, fine = (tiny(samples=n)(maps, words, mask) for n in (2, 48))
    assert (fine.boxes - exact.boxes).abs().max() < 0.01
    assert (fine.picture - exact.picture).abs().max() < 0.1 * (coarse.picture - exact.picture).abs().max()


# ------------------------------------------------------------------------------------------- Eq. 3
def random_boxes(*shape, seed=0):
    g = torch.Generator().manual_seed(seed)
    low = torch.rand(*shape, 2, generator=g).double() * 0.6
    return torch.cat([low, low + 0.05 + 0.3 * torch.rand(*shape, 2, generator=g).double()], -1)


@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_eq_3_in_loops(reduction):
    boxes, valid = random_boxes(4, 2, 5), torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0]]).bool()
    target = regression_target(boxes[1:])
    torch.testing.assert_close(target, (boxes[1] + boxes[2] + boxes[3]) / 3)
    loss = regression_loss(boxes[0], target, valid, l1_weight=5.0, giou_weight=2.0, reduction=reduction)
    for b, t in ((0, 5), (1, 2)):
        wanted = naive.regression(
            boxes[0, b, :t].tolist(), [level[b, :t].tolist() for level in boxes[1:]], None, None, l1=5.0, giou=2.0,
            reduction=reduction, target="mean", tau=0.0,
        )  # fmt: skip
        assert loss[b].item() == pytest.approx(wanted, rel=1e-6)


def test_eq_3_by_hand():
    g, target = torch.tensor([[[0.0, 0.0, 0.5, 0.5]]]), torch.tensor([[[0.5, 0.5, 1.0, 1.0]]])
    # centres half a picture apart each way, sizes equal; no overlap, two quarters of the hull
    assert regression_loss(g, target, torch.tensor([[True]])).item() == pytest.approx(1.0 + 1.5)
    assert regression_loss(g, g, torch.tensor([[True]])).item() == pytest.approx(0.0, abs=1e-6)


def test_a_weighted_target_leans_to_the_level_that_matches():
    boxes, matches = random_boxes(3, 1, 2), torch.tensor([[[9.0, 0.0]], [[0.0, 0.0]], [[0.0, 9.0]]]).double()
    target = regression_target(boxes, matches, tau=0.1)
    torch.testing.assert_close(target[0, 0], boxes[0, 0, 0])
    torch.testing.assert_close(target[0, 1], boxes[2, 0, 1])
    torch.testing.assert_close(regression_target(boxes, torch.zeros(3, 1, 2)), boxes.mean(0))


# ------------------------------------------------------------------------------------------- gradients
def gradients(loss, model):
    model.zero_grad()
    loss.sum().backward()
    return {
        n: p.grad for n, p in model.named_parameters() if p.grad is not None and p.grad.abs().max() > 1e-12
    }


def downstream(located):
    """Something of the fused tokens alone."""
    g = torch.Generator().manual_seed(3)
    weight = torch.randn(2, located.picture.shape[-1], generator=g).to(located.picture)
    return located.picture @ weight[0] + located.text @ weight[1]


def test_downstream_losses_reach_boxes_scales_and_proposals():
    model = tiny(seed=0, anchor=4.0)  # of several cells, without a side at its limit
    maps, words, mask = inputs(sizes=((14, 14), (12, 12), (10, 10)))
    maps, words = [m.requires_grad_() for m in maps], words.requires_grad_()
    located = model(maps, words, mask)
    found = gradients(downstream(located), model)
    for name in ("proposals.head.bbox_pred.weight", "proposals.head.cls_logits.weight", "embed.project.weight",
                 "decoder.fpn.inner_blocks.0.0.weight"):  # fmt: skip
        assert name in found
    for i in range(3):  # p_w and p_h of every region that was there
        theta = found[f"adaptors.{i}.theta"]
        assert (theta[: located.valid.sum(1).max()].abs() > 1e-9).all()
    assert all(m.grad.any() for m in maps)
    assert words.grad.any()
    torch.autograd.gradcheck(  # and it is the gradient: through every level, pooling and move
        lambda m, w: downstream(model([maps[0], m, maps[2]], w, mask)), (maps[1], words), fast_mode=True,
        atol=1e-4, eps=1e-7,
    )  # fmt: skip


@pytest.mark.parametrize("options", [{}, {"levels": 0}, {"filter_text": True}, {"fused": "map"}, VERSIONS["arxiv"],
                                     {"scaling": "predicted"}, {"source": "encoder"}], ids=str)  # fmt: skip
def test_every_parameter_is_part_of_the_loss(options):
    """Processes that train together would wait for the gradient of one that is not."""
    model = tiny(**options)
    located = model(*inputs())
    (downstream(located) + located.regions.sum((1, 2)) + located.reg_loss).sum().backward()
    unused = [name for name, parameter in model.named_parameters() if parameter.grad is None]
    assert unused == []


def test_without_gradients_of_boxes_scales_learn_nothing():
    """The usual RoIAlign and the target held fixed: no loss trains p_w and p_h, and none but Eq. 3 the boxes (S12)."""
    maps, words, mask = inputs()
    located = tiny(box_grad=False)(maps, words, mask)
    model = tiny(box_grad=False)
    located = model(maps, words, mask)
    both = gradients(downstream(located) + located.reg_loss, model)
    assert not any("theta" in name for name in both)
    located = model(maps, words, mask)
    assert "proposals.head.bbox_pred.weight" not in gradients(downstream(located), model)
    located = model(maps, words, mask)
    assert "proposals.head.bbox_pred.weight" in gradients(located.reg_loss, model)


def test_eq_3_trains_proposals_alone_while_its_target_is_fixed():
    maps, words, mask = inputs()
    model = tiny()
    found = gradients(model(maps, words, mask).reg_loss, model)
    assert "proposals.head.bbox_pred.weight" in found
    assert not any(name.startswith("adaptors") for name in found)
    assert "proposals.head.cls_logits.weight" not in found
    loose = tiny(detach_target=False)
    assert {f"adaptors.{i}.theta" for i in range(3)} <= gradients(
        loose(maps, words, mask).reg_loss, loose
    ).keys()


def test_with_a_loose_target_the_optimum_is_not_to_move_on_average():
    """Eq. 3 alone, its target not held fixed: the mean over levels comes to rest on the proposal; no level has to."""
    maps, words, mask = inputs()

    def rest(located):
        mean = located.boxes[1:].mean(0)
        return (mean - located.boxes[0])[located.valid].abs().max().item()

    def trained(**options):
        model = tiny(**options)
        for adaptor in model.adaptors:  # p alone learns, moves are taken out: what is left is the size
            nn.init.zeros_(adaptor.theta)
            adaptor.ratio = 1e-6
        with torch.no_grad():
            model.adaptors[0].theta.fill_(0.3)
            start = model(maps, words, mask)
        optimizer = torch.optim.Adam([a.theta for a in model.adaptors], lr=0.02)
        for _ in range(60):
            optimizer.zero_grad()
            loss = model(maps, words, mask).reg_loss.sum()
            if loss.requires_grad and options:
                loss.backward()
                optimizer.step()
        return start, model(maps, words, mask)

    start, end = trained(detach_target=False)
    assert rest(start) > 0.02
    assert rest(end) < 0.2 * rest(start)
    assert end.reg_loss.sum() < 0.1 * start.reg_loss.sum()
    # three levels can cancel: here the loss is at its minimum, and two of them moved
    g, d = random_boxes(1, 2), torch.tensor([0.05, 0.0, 0.05, 0.0]).double()
    levels = torch.stack([g + d, g - d, g])
    valid = torch.ones(1, 2).bool()
    assert regression_loss(g, regression_target(levels), valid).abs().max() < 1e-6


def test_a_loose_target_shrinks_proposals_whether_p_is_below_1_or_above():
    """The gradient of a side is |1 - mean of p| where the target is loose; held fixed it has the sign of 1 - p."""
    for p in (0.9, 1.1):
        mean_p, slopes = (p + p**2 + p**3) / 3, {}
        for fixed in (True, False):
            box = torch.tensor([0.5, 0.5, 0.3, 0.3]).double().requires_grad_()
            levels = [stop(box * torch.tensor([1, 1, p**i, p**i]))[None, None] for i in range(4)]
            target = regression_target(torch.stack(levels[1:]))
            loss = regression_loss(levels[0], target.detach() if fixed else target, torch.ones(1, 1).bool())
            (slopes[fixed],) = torch.autograd.grad(loss.sum(), box)
        place, side = slopes[False].split(2)
        assert place.abs().max() < 1e-6
        assert (side - abs(1 - mean_p)).abs().max() < 1e-6
        assert (slopes[True][2:].sign() == math.copysign(1, 1 - p)).all()


def test_boxes_inside_one_cell_get_no_gradient_of_their_size():
    """Why boxes have a least side: between centres of cells the map is bilinear, and its mean knows no size."""
    embed = RegionEmbedding(3, 8).double()
    torch.manual_seed(0)
    features = torch.randn(1, 3, 8, 8).double()
    sizes = {}
    for side in (0.02, 0.3):
        box = torch.tensor([[[0.5 - side / 2, 0.5 - side / 2, 0.5 + side / 2, 0.5 + side / 2]]]).double()
        box = convert(box, "xyxy", "cxcywh").requires_grad_()
        (gradient,) = torch.autograd.grad(embed(features, convert(box, "cxcywh", "xyxy"))[..., 0].sum(), box)
        sizes[side] = gradient[0, 0].abs()
    assert sizes[0.02][:2].min() > 1e-3
    assert sizes[0.02][2:].max() < 1e-3 * sizes[0.02][:2].min()
    assert sizes[0.3][2:].min() > 1e-3


# ------------------------------------------------------------------------------------------- the whole
def test_depth_0_returns_weighted_proposals_and_the_words_as_they_were():
    model = tiny(levels=0)
    maps, words, mask = inputs()
    located = model(maps, words, mask)
    assert located.boxes.shape[0] == 1
    torch.testing.assert_close(located.words, words * mask[..., None])
    torch.testing.assert_close(located.text, words[:, 0])
    torch.testing.assert_close(located.regions, model.weighted(model.prepare(maps)))
    assert not located.reg_loss.any()
    deep = tiny()
    assert all(
        n.startswith("adaptors.") for n in deep.load_state_dict(model.state_dict(), strict=False).missing_keys
    )
    torch.testing.assert_close(located.boxes[0], deep(maps, words, mask).boxes[0])


@pytest.mark.parametrize("version", VERSIONS)
def test_versions_differ_where_the_papers_do(version):
    model = tiny(**VERSIONS[version])
    maps, words, mask = inputs()
    pictures, pooled = model.prepare(maps), torch.randn(3, 8).double()
    token = model.visual_token(pictures, pooled)
    assert isinstance(model.proposals, RPN if version == "iccv" else QueryProposals)
    assert len(model.adaptors[0].theta) == (4 if version == "iccv" else 12)
    if version == "iccv":
        assert torch.equal(token, pooled)
    else:
        for i in range(3):
            valid = pictures.valid[i]
            weighted = pictures.scores[i, valid, None] * pictures.regions[i, valid]
            torch.testing.assert_close(token[i], weighted.mean(0))
    located = model(maps, words, mask)
    assert_valid(located.boxes)
    assert set(VERSIONS["iccv"]) == set(VERSIONS["arxiv"]) <= set(vars(LocatorConfig()))


def test_in_half_precision_boxes_and_cosines_stay_single():
    model = tiny().float()
    maps, words, mask = inputs()
    maps, words = [m.float() for m in maps], words.float()
    with torch.autocast("cpu", torch.bfloat16):
        located = model(maps, words, mask)
        loss = (located.picture.float().sum() + located.reg_loss.sum()) / 10
    assert located.boxes.dtype == located.cosine.dtype == located.reg_loss.dtype == torch.float32
    assert_valid(located.boxes)
    loss.backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


# ------------------------------------------------------------------------------------------- does it move?
COLOURS = 5  # four, and the background's


def blobs(n=8, size=32, seed=0):
    """Pictures of two blobs of different colours: one-hot colour maps, the blobs' boxes and their colours."""
    g = torch.Generator().manual_seed(seed)
    pictures, boxes = torch.zeros(n, COLOURS, size, size), torch.zeros(n, 2, 4)
    colours = torch.zeros(n, 2).long()
    for i in range(n):
        colours[i] = torch.randperm(COLOURS - 1, generator=g)[:2]
        for k in range(2):  # one in the left half, one in the right
            x = int(torch.randint(0, 7, (), generator=g)) + 16 * k
            y = int(torch.randint(0, 23, (), generator=g))
            boxes[i, k] = torch.tensor([x, y, x + 9, y + 9]) / size
            pictures[i, colours[i, k], y : y + 9, x : x + 9] = 1
    pictures[:, -1] = 1 - pictures.sum(1)
    return pictures, boxes, colours


class Toy(nn.Module):
    """A locator whose features are colours and whose words name them: only boxes are left to learn."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.locator = SelfLocator((COLOURS,) * 3, LocatorConfig(
            width=COLOURS, heads=1, pyramid=COLOURS, source="encoder", embed_norm="none", count=12, top=6,
            threshold=0.0, anchor=4.0, region_update="reweight", cell_tau=0.1, samples=8, extent="map", steer="fused",
        ))  # fmt: skip
        with torch.no_grad():
            for name, parameter in self.locator.named_parameters():
                if "lateral" in name or "project" in name:
                    one = torch.eye(COLOURS).view_as(parameter) if "weight" in name else torch.zeros(COLOURS)
                    parameter.copy_(one)
                elif "out_proj" in name or "feed.2" in name:  # attention adds nothing: words stay words
                    parameter.zero_()

    def forward(self, pictures, named):
        maps = [F.avg_pool2d(pictures, k) for k in (2, 4, 8)]
        words = torch.eye(COLOURS)[named][:, None].expand(-1, 3, -1)  # [CLS] colour [SEP]
        return self.locator(maps, words, torch.ones(len(named), 3).bool())


def both_texts(seed=0):
    """Every picture twice, once for either blob: pictures, the named colours, and the named and the other box."""
    pictures, boxes, colours = blobs(seed=seed)
    named, other = boxes.transpose(0, 1).flatten(0, 1), boxes.flip(1).transpose(0, 1).flatten(0, 1)
    return pictures.repeat(2, 1, 1, 1), colours.T.flatten(), named, other


def chosen(located):
    """The region that matches the word best in the end, at all levels."""
    best = located.cosine[-1, :, :, 1].argmax(1)
    return located.boxes[:, torch.arange(len(best)), best]


def test_regions_move_to_what_the_text_names_level_by_level():
    """The same pictures and proposals, two texts: all regions near the blob that is named and leave the other."""
    pictures, colours, named, other = both_texts()
    with torch.no_grad():
        located = Toy()(pictures, colours)
    torch.testing.assert_close(located.boxes[0, :8], located.boxes[0, 8:])  # proposals know no text
    at = (located.boxes[..., :2] + located.boxes[..., 2:]) / 2  # l b t 2
    far = [(at - (b[:, :2] + b[:, 2:])[:, None] / 2).norm(dim=-1).mean((1, 2)) for b in (named, other)]
    assert (far[0].diff() < 0).all()
    assert far[0][-1] < 0.6 * far[0][0]
    assert far[1][-1] > far[1][0]
    overlap = [iou(b, named).diagonal().mean() for b in chosen(located)]
    assert overlap[0] < 0.1 < 0.4 < overlap[-1]


def test_a_downstream_loss_alone_trains_proposals_and_scales():
    """Eight pictures, and a loss that raises the cosine of region and named colour: no one has told it of any box.

    More of the chosen region then lies on the named blob. A cosine rewards the purest region, not the tightest, so
    that it also shrinks.
    """
    pictures, colours, named, _ = both_texts()
    model = Toy()

    def inside(box):
        """The part of a box that lies on the named blob."""
        low, high = torch.maximum(box[:, :2], named[:, :2]), torch.minimum(box[:, 2:], named[:, 2:])
        return ((high - low).clamp(min=0).prod(-1) / (box[:, 2:] - box[:, :2]).prod(-1)).mean().item()

    def side(box):
        return (box[:, 2:] - box[:, :2]).mean().item()

    start = chosen(model(pictures, colours))
    before = [inside(box) for box in start]
    learnt = [p for n, p in model.named_parameters() if "theta" in n or "proposals" in n]
    optimizer = torch.optim.Adam(learnt, lr=0.01)
    for _ in range(40):
        optimizer.zero_grad()
        (-10 * model(pictures, colours).cosine[-1, :, :, 1]).exp().log1p().mean().backward()
        optimizer.step()
    end = chosen(model(pictures, colours))
    after = [inside(box) for box in end]
    assert side(end[-1]) < 0.8 * side(start[-1])
    assert after[-1] > before[-1] + 0.1
    assert after[0] > before[0]  # the proposals themselves, by gradients through three levels
