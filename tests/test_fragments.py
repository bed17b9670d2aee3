"""Fragments: proposals, crops and keywords through frozen vision-language models, kept on disk."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    AutoImageProcessor,
    AutoTokenizer,
    BertModel,
    Blip2Config,
    Blip2ForImageTextRetrieval,
    Blip2QFormerConfig,
    Blip2VisionConfig,
    BlipConfig,
    BlipForConditionalGeneration,
    BlipForImageTextRetrieval,
    BlipImageProcessor,
    CLIPImageProcessor,
    CLIPModel,
)

from finematch.boxes import multi_scale_grid
from finematch.data import load
from finematch.data.record import DataError, Object, Record
from finematch.encoders import open_clip_model, open_vision_language, small_bert, small_clip
from finematch.features import fragments as G
from finematch.features import proposals as P
from finematch.features.backbones import Backbone, timm_backbone
from finematch.features.proposals import selective_search
from finematch.files import entries
from finematch.scenes.generator import TOKENIZER
from finematch.text import keyword_method, word_level, wordpiece

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "dog", "ball", "red", "man", "on", "horse", "the"]
TEXTS = ["a red dog", "the man on a horse", "ball", "red", "a man and the red ball"]
KINDS = ("clip", "blip", "blip2")
Q = 4  # queries of the small BLIP-2


# ------------------------------------------------------------------------------------------ what the tests write
def tokenizer(folder: Path, kind: str) -> None:
    if kind == "clip":
        made = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="[UNK]"))
        made.pre_tokenizer = pre_tokenizers.Whitespace()
        made.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
        made.save(str(folder / "words.json"))
        word_level(folder / "words.json").save_pretrained(folder)
    else:
        (folder / "words.txt").write_text("\n".join(WORDS))
        wordpiece(folder / "words.txt").save_pretrained(folder)


def stirred(net: torch.nn.Module) -> torch.nn.Module:
    """Weights far enough from nothing that different crops and texts are different."""
    with torch.no_grad():
        for p in net.parameters():
            p.add_(0.2 * torch.randn_like(p))
    return net.eval()


def blip_config() -> BlipConfig:
    common = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    return BlipConfig(
        text_config={**common, "vocab_size": len(WORDS), "encoder_hidden_size": 16, "max_position_embeddings": 20},
        vision_config={**common, "image_size": 16, "patch_size": 8},
        image_text_hidden_size=12,
    )  # fmt: skip


def network(kind: str) -> torch.nn.Module:
    common = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    if kind == "clip":
        return open_clip_model(
            small_clip(len(WORDS), eos=3, bos=2, size=16, patch=8, width=16, depth=2, positions=12)
        )
    if kind == "blip":
        return BlipForImageTextRetrieval(blip_config())
    config = Blip2Config(
        vision_config=Blip2VisionConfig(**common, image_size=16, patch_size=8),
        qformer_config=Blip2QFormerConfig(**common, vocab_size=len(WORDS), encoder_hidden_size=16,
                                          use_qformer_text_input=True, max_position_embeddings=20),
        num_query_tokens=Q, image_text_hidden_size=12,
    )  # fmt: skip
    return Blip2ForImageTextRetrieval(config)


def write(folder: Path, kind: str, *, seed: int = 0) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(seed)
    stirred(network(kind)).save_pretrained(folder)
    tokenizer(folder, kind)
    if kind == "clip":
        side = {"height": 16, "width": 16}
        CLIPImageProcessor(size={"shortest_edge": 16}, crop_size=side).save_pretrained(folder)
    else:
        BlipImageProcessor(size={"height": 16, "width": 16}).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    return {kind: write(root / kind, kind) for kind in KINDS}


@pytest.fixture(scope="module")
def vlp(folders) -> dict[str, G.VLP]:
    return {kind: G.VLP(folder) for kind, folder in folders.items()}


def picture(size=(60, 40), seed=0) -> Image.Image:
    rng = np.random.default_rng(seed)
    array = np.full((size[1], size[0], 3), rng.integers(0, 256, 3), np.uint8)
    for _ in range(8):
        x, y = rng.integers(0, size[0] - 4), rng.integers(0, size[1] - 4)
        array[y : y + rng.integers(4, 25), x : x + rng.integers(4, 25)] = rng.integers(0, 256, 3)
    return Image.fromarray(array)


SIZES = [(60, 40), (33, 50), (6, 6), (80, 24), (40, 40)]


@pytest.fixture(scope="module")
def records(tmp_path_factory) -> list[Record]:
    """Five pictures; the third is too small to have a proposal of 8 pixels."""
    folder = tmp_path_factory.mktemp("pictures")
    found = []
    for i, size in enumerate(SIZES):
        picture(size, i).save(folder / f"p{i}.png")
        found.append(
            Record(f"p{i}", "train", (f"a dog {i}", "the ball"), image=folder / f"p{i}.png", size=size)
        )
    return found


def boxes_of(size, n=3, seed=0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    corner = rng.uniform(0, 0.5, (n, 2)) * size
    return np.concatenate([corner, corner + rng.uniform(0.3, 0.5, (n, 2)) * size], 1).astype(np.float32)


def close(a, b, tolerance=1e-5):
    a, b = (x if isinstance(x, torch.Tensor) else torch.from_numpy(np.array(x)) for x in (a, b))
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


# ------------------------------------------------------------------------------------------ proposals
def expected_boxes(boxes: np.ndarray, size, min_side: float, top: int) -> list[list[float]]:
    kept = []
    for x1, y1, x2, y2 in boxes.tolist():
        x1, x2 = (min(max(v, 0), size[0]) for v in (x1, x2))
        y1, y2 = (min(max(v, 0), size[1]) for v in (y1, y2))
        if x2 - x1 >= min_side and y2 - y1 >= min_side:
            kept.append([x1, y1, x2, y2])
    return kept[:top]


@pytest.mark.parametrize("method", ["grid", "selective_search"])
def test_proposals_are_the_first_large_ones(records, tmp_path, method, monkeypatch):
    monkeypatch.setattr(P, "BLOCK", 2)
    made = P.extract_proposals(records, method, tmp_path, "train", top=4, min_side=12, echo=None)
    assert made.boxes.shape == (5, 4, 4)
    assert made.boxes.dtype == made.scores.dtype == np.float32
    assert made.sizes.tolist() == [list(s) for s in SIZES]
    for i, record in enumerate(records):
        image = record.open()
        found = multi_scale_grid(*image.size, 16).numpy() if method == "grid" else selective_search(image, 16)
        expected = expected_boxes(found, image.size, 12, 4)
        assert made.of(i).tolist() == expected
        assert made.mask[i].tolist() == [j < len(expected) for j in range(4)]
        assert not made.boxes[i][~made.mask[i]].any()
        scores = made.scores[i][made.mask[i]]
        assert (np.diff(scores) < 0).all()
        assert ((scores > 0) & (scores <= 1)).all()
    assert made.mask.sum(1)[2] == 0  # 6 x 6 pixels: a picture may have none
    assert made.mask.sum(1)[0] == 4


def test_a_small_box_takes_no_place(tmp_path, records):
    """A detector's boxes leave the picture, or are thin: the tenth may be the first that can be used."""

    class Found:
        key = {"proposals": "table"}  # noqa: RUF012

        def __call__(self, image):
            w, h = image.size
            boxes = [
                [-9, -9, 0, h],
                [0, 0, 7.9, h],
                [-20, -5, 20, h + 5],
                [0, 0, w, 7],
                [2, 2, 10, 10],
                [1, 1, w, h],
            ]
            return np.array(boxes, np.float32), np.array([0.9, 0.8, 0.7, 0.6, 0.5, 0.4], np.float32)

    assert isinstance(Found(), P.Detector)
    made = P.extract_proposals(records[:1], Found(), tmp_path, "train", top=2, echo=None)
    assert made.of(0).tolist() == [[0, 0, 20, 40], [2, 2, 10, 10]]
    assert made.scores[0].tolist() == pytest.approx([0.7, 0.5])
    whole = P.extract_proposals(records[:1], Found(), tmp_path, "train", top=9, min_side=0, echo=None)
    assert whole.mask.sum() == 5  # a box without area is none whatever `min_side` is
    assert (whole.boxes[0, 0] == [0, 0, 7.9, 40]).mean() >= 0.75


def test_proposals_are_made_once_and_resumed(records, tmp_path, monkeypatch):
    monkeypatch.setattr(P, "BLOCK", 2)

    class Stopping:
        key = {"proposals": "stopping"}  # noqa: RUF012

        def __init__(self, stop):
            self.asked, self.stop = 0, stop

        def __call__(self, image):
            if self.asked == self.stop:
                raise KeyboardInterrupt
            self.asked += 1
            return np.array([[0, 0, *image.size]], np.float32), np.ones(1, np.float32)

    with pytest.raises(KeyboardInterrupt):
        P.extract_proposals(records, Stopping(4), tmp_path / "a", "train", echo=None)
    rest, said = Stopping(9), []
    made = P.extract_proposals(records, rest, tmp_path / "a", "train", echo=said.append)
    assert rest.asked == 1
    assert said == ["train: 5 of 5 pictures (stopping)"]
    again = Stopping(0)
    same = P.extract_proposals(records, again, tmp_path / "a", "train", echo=None)
    assert same.key == made.key
    whole = P.extract_proposals(records, Stopping(9), tmp_path / "b", "train", echo=None)
    assert whole.key == made.key
    same_bytes(tmp_path / "a", tmp_path / "b")


def same_bytes(one: Path, other: Path) -> None:
    """Two caches hold the same entries of the same bytes."""
    names = [sorted(p.relative_to(root) for p in root.rglob("*") if p.is_file()) for root in (one, other)]
    assert names[0] == names[1]
    assert len(names[0]) > 2
    for name in names[0]:
        assert (one / name).read_bytes() == (other / name).read_bytes()


def test_other_pictures_of_the_same_names_have_proposals_of_their_own(tmp_path):
    rng, made = np.random.default_rng(0), []
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        path = tmp_path / folder / "p0.png"
        Image.fromarray((rng.random((64, 64, 3)) * 255).astype(np.uint8)).save(path)
        mine = [Record("p0", "train", ("x",), image=path)]
        made.append(P.extract_proposals(mine, "selective_search", tmp_path / "cache", "train", echo=None))
    assert made[0].key != made[1].key
    assert len(entries(tmp_path / "cache")) == 2


def test_other_settings_have_files_of_their_own(records, tmp_path):
    keys = []
    for options in (
        {},
        {"top": 3},
        {"min_side": 4},
        {"method": "selective_search"},
        {"records": records[:3]},
    ):
        given = {"records": records, "method": "grid", **options}
        made = P.extract_proposals(**given, cache=tmp_path, split="train", echo=None)
        assert made.key not in keys
        keys.append(made.key)
        again = P.extract_proposals(**given, cache=tmp_path, split="train", echo=None)
        assert again.key == made.key
    assert len(entries(tmp_path)) == 5
    whole = P.extract_proposals(records, "grid", tmp_path, "train", min_side=8.0, echo=None)
    assert whole.key == keys[0]  # 8 and 8.0 are one


def test_given_boxes(records):
    table = {"dog": (5, 5, 20, 20), "crowd": (0, 0, 50, 30), "cat": (50, 30, 60.5, 40.5), "pole": (1, 1, 4, 30),
             "man": (0, 0, 30, 30)}  # fmt: skip
    objects = tuple(Object(tuple(map(float, box)), c, crowd=c == "crowd") for c, box in table.items())
    named = [
        Record("a", "val", ("x",), size=(60, 40), objects=objects),
        Record("b", "val", ("x",), size=(9, 9)),
    ]
    made = P.given(named, min_side=8)
    assert made.of(0).tolist() == [[5, 5, 20, 20], [50, 30, 60, 40], [0, 0, 30, 30]]
    assert [o.category for o in P.usable_objects(named[0], min_side=8)] == ["dog", "cat", "man"]
    assert [o.category for o in P.usable_objects(named[0])] == ["dog", "cat", "pole", "man"]
    assert P.usable_objects(named[1]) == []
    assert made.mask.tolist() == [[True] * 3, [False] * 3]
    assert made.scores[0].tolist() == [1, 1, 1]
    two = P.extract_proposals(named, "given", "nowhere", "val", top=2)
    assert two.of(0).tolist() == made.of(0).tolist()[:2]
    assert not Path("nowhere").exists()
    unknown = Record("c", "val", ("x",), image=records[0].image, objects=objects[:1])  # its size is on disk
    assert P.given([unknown]).sizes.tolist() == [[60, 40]]


def test_proposals_refuse(records, tmp_path):
    with pytest.raises(ValueError, match=r"'edge_boxes'; use .* or 'given', or a detector"):
        P.extract_proposals(records, "edge_boxes", tmp_path, "train")
    with pytest.raises(DataError, match="no pictures to search"):
        P.extract_proposals([], "grid", tmp_path, "train")
    gone = Record("q", "train", ("x",), image=tmp_path / "q.png")
    with pytest.raises(DataError, match=r"q\.png"):
        P.extract_proposals([records[0], gone], "grid", tmp_path, "train", echo=None)


def test_the_key_of_proposals_is_their_boxes(records, tmp_path):
    made = P.extract_proposals(records, "grid", tmp_path, "train", echo=None)
    moved = P.Proposals(made.boxes + np.float32(1e-3), made.scores, made.mask, made.sizes, made.ids)
    renamed = P.Proposals(made.boxes, made.scores, made.mask, made.sizes, ["x", *made.ids[1:]])
    assert len({made.key, moved.key, renamed.key}) == 3


# ------------------------------------------------------------------------------------------ models
def processed(folder: Path, image: Image.Image, boxes: np.ndarray) -> torch.Tensor:
    crops = [image.crop((int(np.floor(x1)), int(np.floor(y1)), int(np.ceil(x2)), int(np.ceil(y2))))
             for x1, y1, x2, y2 in boxes.tolist()]  # fmt: skip
    return AutoImageProcessor.from_pretrained(folder)(images=crops, return_tensors="pt")["pixel_values"]


def tokens(folder: Path, texts: list[str]) -> dict:
    return dict(AutoTokenizer.from_pretrained(folder)(texts, padding=True, return_tensors="pt"))


def own_scores(kind: str, folder: Path, pixels: torch.Tensor, words: dict) -> torch.Tensor:
    """What transformers' class itself says of pictures and texts."""
    given = {
        "pixel_values": pixels,
        "input_ids": words["input_ids"],
        "attention_mask": words["attention_mask"],
    }
    with torch.no_grad():
        if kind == "clip":
            net = CLIPModel.from_pretrained(folder).eval()
            return net(**given).logits_per_image / net.logit_scale.exp()
        if kind == "blip":
            net = BlipForImageTextRetrieval.from_pretrained(folder).eval()
            return net(**given, use_itm_head=False).itm_score
        net = Blip2ForImageTextRetrieval.from_pretrained(folder).eval()
        return net(**given, use_image_text_matching_head=False).logits_per_image


@pytest.mark.parametrize("kind", KINDS)
def test_a_models_features_give_its_own_scores(vlp, folders, kind):
    image = picture()
    boxes = boxes_of(image.size)
    model = vlp[kind]
    assert isinstance(model, G.VisionLanguageModel)
    queries, texts = model.embed_queries([image], [boxes]), model.embed_texts(TEXTS)
    assert model.queries == (Q if kind == "blip2" else 1)
    assert queries.shape == (3, model.queries, 16 if kind == "clip" else 12)
    scores = torch.einsum("rqd,kd->rqk", queries, texts).amax(1)
    words = tokens(folders[kind], TEXTS)
    close(scores, own_scores(kind, folders[kind], processed(folders[kind], image, boxes), words))
    assert scores.std() > 0.01
    close(texts.norm(dim=1), torch.ones(len(TEXTS)))
    crops = model.embed_crops([image], [boxes])
    for crop, mine in zip(crops, queries, strict=True):
        mean = sum(mine[i] for i in range(len(mine)))
        close(crop, mean / mean.norm())


@pytest.mark.parametrize("kind", KINDS)
def test_batches_padding_and_order_change_nothing(vlp, folders, kind):
    small = G.VLP(folders[kind], batch=2)
    images = [picture((60, 40), 1), picture((20, 50), 2)]
    boxes = [boxes_of(i.size, n, n) for i, n in zip(images, (4, 1), strict=True)]
    all_crops = vlp[kind].embed_crops(images, boxes)
    close(small.embed_crops(images, boxes), all_crops)
    close(vlp[kind].embed_crops(images[::-1], boxes[::-1]), torch.cat([all_crops[4:], all_crops[:4]]))
    alone = torch.cat([vlp[kind].embed_crops([images[0]], [box[None]]) for box in boxes[0]])
    close(alone, all_crops[:4])
    none = np.zeros((0, 4), np.float32)
    close(vlp[kind].embed_crops([images[1], images[0]], [none, boxes[0]]), all_crops[:4])
    texts = vlp[kind].embed_texts(TEXTS)
    close(small.embed_texts(TEXTS), texts)
    close(torch.cat([small.embed_texts([t]) for t in TEXTS]), texts)
    assert (torch.cdist(texts, texts) + torch.eye(len(TEXTS))).min() > 1e-3
    assert (torch.cdist(all_crops, all_crops) + torch.eye(5)).min() > 1e-3


def test_later_words_count(vlp):
    """A text encoder that was run as a decoder would not let the first position see them."""
    for kind in KINDS:
        a, b = vlp[kind].embed_texts(["a red dog", "a red horse"])
        assert (a - b).norm() > 1e-3


@pytest.mark.parametrize("kind", KINDS)
def test_a_long_text_is_cut_to_what_the_model_can_place(vlp, folders, kind):
    limit = 12 if kind == "clip" else 20
    assert vlp[kind].net.positions == limit
    text = " ".join(["dog", "red"] * 30)
    cut = " ".join(["dog", "red"] * 30).split()[: limit - 2]  # its two special tokens stay
    close(vlp[kind].embed_texts([text]), vlp[kind].embed_texts([" ".join(cut)]))


def test_a_text_of_unknown_words_is_named(vlp):
    for kind in KINDS:
        with pytest.raises(ValueError, match="'xyzzy' has no word that the model's tokenizer knows"):
            vlp[kind].embed_texts(["dog", "xyzzy"])
        assert len(vlp[kind].embed_texts(["xyzzy dog"])) == 1


def test_nothing_to_embed_is_said(vlp):
    with pytest.raises(ValueError, match="no texts"):
        vlp["clip"].embed_texts([])
    with pytest.raises(ValueError, match="no boxes"):
        vlp["clip"].embed_crops([], [])


def test_bf16_is_near(folders, vlp):
    image = picture()
    for kind in KINDS:
        model = G.VLP(folders[kind], precision="bf16")
        for a, b in ((model.embed_crops([image], [boxes_of(image.size)]),
                      vlp[kind].embed_crops([image], [boxes_of(image.size)])),
                     (model.embed_texts(TEXTS), vlp[kind].embed_texts(TEXTS))):  # fmt: skip
            assert a.dtype == torch.float32
            assert not torch.equal(a, b)
            assert (a * b).sum(1).min() > 0.98
    with pytest.raises(ValueError, match="'fp8'; use one of 'no', 'bf16', 'fp16'"):
        G.VLP(folders["clip"], precision="fp8")


def test_the_key_tells_what_changes_features(folders, vlp, tmp_path):
    first = vlp["clip"].key
    assert G.VLP(folders["clip"], batch=3).key == first
    keys = [first, vlp["blip"].key, vlp["blip2"].key, G.VLP(folders["clip"], precision="bf16").key,
            G.VLP(write(tmp_path / "seed", "clip", seed=1)).key]  # fmt: skip
    other = write(tmp_path / "processor", "clip")
    CLIPImageProcessor(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16},
                       image_mean=[0.1] * 3).save_pretrained(other)  # fmt: skip
    keys.append(G.VLP(other).key)
    other = write(tmp_path / "tokenizer", "clip")
    text = (other / "tokenizer.json").read_text()
    (other / "tokenizer.json").write_text(
        text.replace('"dog"', '"cat!"').replace('"ball"', '"dog"').replace('"cat!"', '"ball"')
    )
    keys.append(G.VLP(other).key)
    assert all(a != b for i, a in enumerate(keys) for b in keys[:i])


def test_models_that_are_none_of_the_three_are_refused(tmp_path):
    BertModel(small_bert(20, width=8, depth=1, heads=2)).save_pretrained(tmp_path / "bert")
    with pytest.raises(ValueError, match=r"'bert' model; use one of \('clip', 'blip', 'blip-2'\)"):
        open_vision_language(tmp_path / "bert")
    BlipForConditionalGeneration(blip_config()).save_pretrained(tmp_path / "captions")
    with pytest.raises(ValueError, match=r"is no BlipForImageTextRetrieval: it lacks \['itm_head"):
        open_vision_language(tmp_path / "captions")


def test_weights_are_frozen(vlp):
    for model in vlp.values():
        assert not model.net.training
        assert not any(p.requires_grad for p in model.net.parameters())
        assert not model.embed_texts(["dog"]).requires_grad


# ------------------------------------------------------------------------------------------ crops
@pytest.mark.parametrize(
    ("box", "expected"),
    [
        ((10, 5, 20, 15), (10, 5, 20, 15)),
        ((10.9, 5.1, 20.1, 15.9), (10, 5, 21, 16)),
        ((-3.5, -1, 62, 41), (0, 0, 60, 40)),
        ((59.2, 39.2, 59.4, 39.9), (59, 39, 60, 40)),
    ],
)
def test_a_cut_is_rounded_outwards_and_clamped(box, expected):
    image = picture()
    got = G.cut(image, np.array(box, np.float32))
    x1, y1, x2, y2 = expected
    np.testing.assert_array_equal(np.asarray(got), np.asarray(image)[y1:y2, x1:x2])


@pytest.mark.parametrize("box", [(70, 0, 80, 10), (0, 50, 10, 60), (-9, 0, -1, 10)])
def test_a_box_off_the_picture_is_refused(box):
    with pytest.raises(ValueError, match="has no area on a 60 x 40 picture"):
        G.cut(picture(), np.array(box, np.float32))


@pytest.mark.parametrize("size", [(1, 1), (3, 7), (1, 3), (3, 3), (2, 30)])
def test_tiny_crops_keep_their_colours(vlp, size):
    """Three rows or columns must not be taken for the colours."""
    w, h = size
    image = Image.new("RGB", (40, 40), (200, 100, 50))
    for model in vlp.values():
        pixels = torch.cat(list(model.pixels([image], [np.array([[5, 5, 5 + w, 5 + h]], np.float32)])))
        mean, sd = (torch.tensor(v) for v in (model.processor.image_mean, model.processor.image_std))
        colour = (torch.tensor([200, 100, 50]) / 255 - mean) / sd
        close(pixels[0], colour[:, None, None].expand(3, 16, 16), 1e-4)


# ------------------------------------------------------------------------------------------ cells of a backbone
@pytest.fixture(scope="module")
def backbone() -> Backbone:
    return timm_backbone("test_resnet", size=96)


@pytest.fixture(scope="module")
def cell_folder(tmp_path_factory) -> Path:
    """A CLIP that reads 3 x 3 cells of 96 channels: the small configuration with three numbers changed."""
    folder = tmp_path_factory.mktemp("cells")
    config = small_clip(len(WORDS), eos=3, bos=2, size=3, patch=1, width=16, depth=1, positions=12)
    config.vision_config.num_channels = 96
    torch.manual_seed(0)
    stirred(open_clip_model(config)).save_pretrained(folder)
    tokenizer(folder, "clip")
    return folder


def test_crop_maps_average_the_cells_under_a_box(backbone):
    """On maps linear along each axis, a cell of a RoI-align is the mean of what is under it."""

    class Ramp(Backbone):
        def __call__(self, pictures):
            y, x = torch.meshgrid(torch.arange(8).float(), torch.arange(12).float(), indexing="ij")
            return torch.stack([x, y])[None].repeat(len(pictures), 1, 1, 1)

    images = [Image.new("RGB", (120, 40)), Image.new("RGB", (24, 80))]  # a cell is 10 x 5 and 2 x 10 pixels
    boxes = [
        np.array([[10, 5, 100, 35], [20, 10, 80, 30]], np.float32),
        np.array([[4, 20, 16, 60]], np.float32),
    ]
    got = G.crop_maps(Ramp(backbone.net, 96), images, boxes, 2)
    assert got.shape == (3, 2, 2, 2)
    cells = [(1, 1, 10, 7), (2, 2, 8, 6), (2, 2, 8, 6)]
    for maps, (x1, y1, x2, y2) in zip(got, cells, strict=True):
        for row in range(2):
            for col in range(2):
                x, y = x1 + (col + 0.5) * (x2 - x1) / 2, y1 + (row + 0.5) * (y2 - y1) / 2
                # cell i of the map has its centre at i + 1/2
                close(maps[:, row, col], torch.tensor([x - 0.5, y - 0.5]), 1e-4)


def test_a_clip_on_cells_is_a_clip(cell_folder, backbone):
    model = G.CellVLP(cell_folder, backbone, batch=2)
    assert isinstance(model, G.VisionLanguageModel)
    images = [picture((60, 40), 1), picture((20, 50), 2)]
    boxes = [boxes_of(i.size, n, n) for i, n in zip(images, (4, 1), strict=True)]
    crops, texts = model.embed_crops(images, boxes), model.embed_texts(TEXTS)
    net = CLIPModel.from_pretrained(cell_folder).eval()
    words = tokens(cell_folder, TEXTS)
    with torch.no_grad():
        own = net(pixel_values=G.crop_maps(backbone, images, boxes, 3), input_ids=words["input_ids"],
                  attention_mask=words["attention_mask"]).logits_per_image / net.logit_scale.exp()  # fmt: skip
    close(crops @ texts.T, own)
    close(model.embed_crops(images[1:], boxes[1:]), crops[4:], 1e-4)
    assert model.key["backbone"] == backbone.key
    with pytest.raises(ValueError, match="no boxes"):
        model.embed_crops(images[:1], [np.zeros((0, 4), np.float32)])


def test_cells_and_pixels_are_not_mixed_up(cell_folder, folders, backbone):
    with pytest.raises(ValueError, match="feature maps of 96 channels, no pixels: open it as CellVLP"):
        G.VLP(cell_folder)
    with pytest.raises(ValueError, match="patches of 8 with 3 channels, the backbone gives cells of 96"):
        G.CellVLP(folders["clip"], backbone)
    other = Backbone(backbone.net, backbone.size, {**backbone.key, "weights": "others"})
    assert G.CellVLP(cell_folder, other).key != G.CellVLP(cell_folder, backbone).key


# ------------------------------------------------------------------------------------------ pictures' fragments
class Toy:
    """A model of one's own: three methods' worth of protocol, and a count of what it was asked."""

    def __init__(self, name="toy", stop=10**9):
        self.key, self.stop, self.crops, self.texts = {"model": name}, stop, 0, []

    def embed_crops(self, pictures, boxes):
        self.crops += sum(map(len, boxes))
        if self.crops > self.stop:
            raise KeyboardInterrupt
        rows = [[*G.cut(p, box).resize((1, 1)).getpixel((0, 0)), *box] for p, mine in zip(pictures, boxes, strict=True)
                for box in mine]  # fmt: skip
        return F.normalize(torch.tensor(np.array(rows, np.float32)), dim=1)

    def embed_texts(self, texts):
        self.texts += texts
        return F.normalize(
            torch.tensor([[len(t), t.count("a") + 1.0, sum(map(ord, t)) % 7] for t in texts]), dim=1
        )


@pytest.fixture(scope="module")
def grid(records, tmp_path_factory) -> P.Proposals:
    return P.extract_proposals(
        records, "grid", tmp_path_factory.mktemp("grid"), "train", top=6, min_side=12, echo=None
    )


def test_a_toy_is_a_model():
    assert isinstance(Toy(), G.VisionLanguageModel)


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_picture_fragments_are_their_boxes_embedded(records, grid, vlp, tmp_path, dtype, monkeypatch):
    monkeypatch.setitem(G.BLOCK, "crops", 2)
    made = G.picture_fragments(records, grid, vlp["clip"], tmp_path, "train", dtype=dtype, echo=None)
    assert len(made) == 5
    assert made.features.shape == (grid.mask.sum(), 16)
    assert made.features.dtype == dtype
    assert isinstance(made.features, np.memmap)
    np.testing.assert_array_equal(made.mask, grid.mask)
    assert not made.index[~made.mask].any()
    for i, record in enumerate(records):
        if grid.mask[i].any():
            own = vlp["clip"].embed_crops([record.open()], [grid.of(i)])
            got = made.features[made.index[i, made.mask[i]]].astype(np.float32)
            close(got, own, 1e-3 if dtype == "float16" else 1e-5)
    assert sorted(made.index[made.mask].tolist()) == list(range(grid.mask.sum()))


def test_dense_fragments_are_padded_with_zeros(records, grid, tmp_path):
    made = G.picture_fragments(records, grid, Toy(), tmp_path, "train", dtype="float32", echo=None)
    features, mask = made.dense()
    assert features.shape == (5, 6, 7)
    np.testing.assert_array_equal(mask, grid.mask)
    assert not features[~mask].any()
    for i in range(5):
        np.testing.assert_array_equal(features[i, mask[i]], made.features[made.index[i, made.mask[i]]])
    some, kept = made.dense([3, 0])
    assert torch.equal(some, features[[3, 0]])
    assert torch.equal(kept, mask[[3, 0]])
    some += 1  # a copy: what is on disk stays
    assert torch.equal(made.dense()[0], features)


def test_fragments_are_made_once(records, grid, tmp_path):
    first, again = Toy(), Toy()
    a = G.picture_fragments(records, grid, first, tmp_path, "train", echo=None)
    b = G.picture_fragments(records, grid, again, tmp_path, "train", echo=None)
    assert (first.crops, again.crops) == (grid.mask.sum(), 0)
    np.testing.assert_array_equal(a.features, b.features)
    assert a.meta == b.meta
    (entry,) = entries(tmp_path)
    assert entry.key["model"] == "toy"


def test_other_models_boxes_and_types_have_files_of_their_own(records, grid, tmp_path):
    shifted = P.Proposals(np.where(grid.mask[..., None], grid.boxes * np.float32(0.9), 0), grid.scores, grid.mask,
                          grid.sizes, grid.ids)  # fmt: skip
    for i, (model, boxes, options) in enumerate(
        [
            (Toy(), grid, {}),
            (Toy("other"), grid, {}),
            (Toy(), shifted, {}),
            (Toy(), grid, {"dtype": "float32"}),
        ]
    ):
        made = G.picture_fragments(records, boxes, model, tmp_path, "train", echo=None, **options)
        assert model.crops == grid.mask.sum()
        assert len(entries(tmp_path)) == i + 1
        own = model.embed_crops([records[0].open()], [boxes.of(0)])
        close(made.features[made.index[0, made.mask[0]]].astype(np.float32), own, 1e-3)


def test_broken_off_features_are_resumed_to_the_same_bytes(records, grid, tmp_path, monkeypatch):
    monkeypatch.setitem(G.BLOCK, "crops", 1)
    counts = grid.mask.sum(1)
    with pytest.raises(KeyboardInterrupt):
        G.picture_fragments(records, grid, Toy(stop=counts[:3].sum()), tmp_path / "a", "train", echo=None)
    assert not any(entry.whole for entry in entries(tmp_path / "a"))  # nothing half is taken for whole
    rest, said = Toy(), []
    G.picture_fragments(records, grid, rest, tmp_path / "a", "train", echo=said.append)
    assert rest.crops == counts[3:].sum()
    assert said == ["train: 5 of 5 pictures embedded"]
    monkeypatch.setitem(G.BLOCK, "crops", 3)
    G.picture_fragments(records, grid, Toy(), tmp_path / "b", "train", echo=None)
    same_bytes(tmp_path / "a", tmp_path / "b")


def test_other_pictures_of_the_same_names_and_boxes_have_features_of_their_own(records, grid, tmp_path):
    changed = []
    for record in records:
        path = tmp_path / record.image.name
        Image.eval(record.open(), lambda v: 255 - v).save(path)
        changed.append(replace(record, image=path))
    first, other = Toy(), Toy()
    G.picture_fragments(records, grid, first, tmp_path / "cache", "train", echo=None)
    G.picture_fragments(changed, grid, other, tmp_path / "cache", "train", echo=None)
    assert other.crops == first.crops > 0


def test_damaged_features_are_named(records, grid, tmp_path):
    G.picture_fragments(records, grid, Toy(), tmp_path, "train", echo=None)
    (path,) = tmp_path.glob("crops-*/rows.npy")
    data = bytearray(path.read_bytes())
    data[200] ^= 1
    path.write_bytes(data)
    with pytest.raises(DataError, match=r"rows\.npy: crops: is damaged.*Remove"):
        G.picture_fragments(records, grid, Toy(), tmp_path, "train", echo=None)


def test_a_broken_off_start_is_no_start(records, grid, tmp_path, monkeypatch):
    """Stopped before the first block was done, or with its note gone: it begins again."""
    monkeypatch.setitem(G.BLOCK, "crops", 1)
    with pytest.raises(KeyboardInterrupt):
        G.picture_fragments(records, grid, Toy(stop=0), tmp_path, "train", echo=None)
    with pytest.raises(KeyboardInterrupt):
        G.picture_fragments(records, grid, Toy(stop=10), tmp_path, "train", echo=None)
    (note,) = tmp_path.glob("*.part/progress.json")
    note.unlink()
    model = Toy()
    G.picture_fragments(records, grid, model, tmp_path, "train", echo=None)
    assert model.crops == grid.mask.sum()


def test_all_queries_of_a_crop_are_kept_where_asked(records, grid, vlp, tmp_path):
    """The best of them is BLIP-2's own score."""
    model, options = vlp["blip2"], {"dtype": "float32", "echo": None}
    made = G.picture_fragments(records, grid, model, tmp_path, "train", queries=True, **options)
    mean = G.picture_fragments(records, grid, model, tmp_path, "train", **options)
    assert isinstance(made.features, np.memmap)
    assert made.features.shape == (grid.mask.sum(), Q, 12)
    np.testing.assert_array_equal(made.index, mean.index)
    np.testing.assert_array_equal(made.mask, mean.mask)
    assert len(entries(tmp_path)) == 2, "entries of their own"
    features, mask = made.dense()
    assert features.shape == (5, 6, Q, 12)
    assert not features[~mask].any()
    words = tokens(Path(model.net.net.config.name_or_path), TEXTS)
    for i, record in enumerate(records):
        if grid.mask[i].any():
            own = model.embed_queries([record.open()], [grid.of(i)])
            close(features[i, mask[i]], own)
            close(mean.dense([i])[0][0, : len(own)], F.normalize(own.mean(1), dim=-1))
            folder = Path(model.net.net.config.name_or_path)
            scores = torch.einsum("rqd,kd->rqk", features[i, mask[i]], model.embed_texts(TEXTS)).amax(1)
            close(scores, own_scores("blip2", folder, processed(folder, record.open(), grid.of(i)), words))
    whole = G.whole_pictures(records, model, tmp_path, "whole", queries=True, **options)
    assert whole.features.shape == (5, Q, 12)
    with pytest.raises(ValueError, match="Toy has no queries"):
        G.picture_fragments(records, grid, Toy(), tmp_path, "train", queries=True)


def test_broken_off_queries_are_resumed_to_the_same_bytes(records, grid, vlp, tmp_path, monkeypatch):
    monkeypatch.setitem(G.BLOCK, "crops", 1)

    class Stopping:
        key = vlp["blip2"].key
        embed_crops, embed_texts = vlp["blip2"].embed_crops, vlp["blip2"].embed_texts

        def __init__(self, stop):
            self.asked, self.stop = 0, stop

        def embed_queries(self, pictures, boxes):
            if self.asked == self.stop:
                raise KeyboardInterrupt
            self.asked += 1
            return vlp["blip2"].embed_queries(pictures, boxes)

    for folder, stops in (("a", (2, 9)), ("b", (9,))):
        for stop in stops:
            model = Stopping(stop)
            options = {"queries": True, "echo": None}
            try:
                G.picture_fragments(records, grid, model, tmp_path / folder, "train", **options)
            except KeyboardInterrupt:
                assert not any(entry.whole for entry in entries(tmp_path / folder))
    assert model.asked == 4, "one of five pictures has no proposal"
    same_bytes(tmp_path / "a", tmp_path / "b")
    done = Stopping(0)
    again = G.picture_fragments(records, grid, done, tmp_path / "a", "train", queries=True, echo=None)
    assert again.features.shape[1] == Q


def test_whole_pictures(records, vlp, tmp_path):
    made = G.whole_pictures(records, vlp["blip"], tmp_path, "train", dtype="float32", echo=None)
    assert made.mask.all()
    assert made.mask.shape == (5, 1)
    processor = AutoImageProcessor.from_pretrained(str(vlp["blip"].net.net.config.name_or_path))
    for i, record in enumerate(records):
        pixels = processor(images=record.open(), return_tensors="pt")["pixel_values"]
        with torch.no_grad():
            close(made.features[made.index[i, 0]], vlp["blip"].net.image(pixels)[0, 0])


def test_pictures_of_other_proposals_are_refused(records, grid, tmp_path):
    for wrong in (records[::-1], records[:4]):
        with pytest.raises(DataError, match="Make the proposals of these records"):
            G.picture_fragments(wrong, grid, Toy(), tmp_path, "train")


def test_pictures_without_any_proposal_are_refused(records, tmp_path):
    with pytest.raises(DataError, match="nothing to embed"):
        G.picture_fragments(records, P.given(records), Toy(), tmp_path, "train")


@pytest.mark.parametrize(
    ("bad", "dtype"), [(float("nan"), "float32"), (1e6, "float16"), (float("inf"), "float16")]
)
def test_a_feature_that_is_not_finite_is_named(records, grid, tmp_path, bad, dtype, monkeypatch):
    class Broken(Toy):
        def embed_crops(self, pictures, boxes):
            rows = super().embed_crops(pictures, boxes)
            if any(p.size == SIZES[3] for p in pictures):
                rows[-1 if pictures[-1].size == SIZES[3] else -len(boxes[-1]) - 1, 2] = bad
            return rows

    for block in (1, 3, 9):
        monkeypatch.setitem(G.BLOCK, "crops", block)
        folder, options = tmp_path / str(block), {"dtype": dtype, "echo": None}
        with pytest.raises(DataError, match=rf"item 'p3': a value is not finite in {dtype}"):
            G.picture_fragments(records, grid, Broken(), folder, "train", **options)


def test_a_picture_that_cannot_be_read_is_named(records, grid, tmp_path):
    (tmp_path / "bad.png").write_bytes(b"no picture")
    broken = [*records[:4], Record("p4", "train", ("x",), image=tmp_path / "bad.png", size=(40, 40))]
    with pytest.raises(DataError, match=r"bad\.png"):
        G.picture_fragments(broken, grid, Toy(), tmp_path / "out", "train", echo=None)


def test_a_disk_that_is_full_or_closed_is_said_at_once(records, grid, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="cannot be written"):
        G.picture_fragments(records, grid, Toy(), tmp_path / "file" / "sub", "train", echo=None)
    usage = type(shutil.disk_usage(tmp_path))(100, 90, 10)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    needed = grid.mask.sum() * 7 * 2
    with pytest.raises(DataError, match=f"needs {needed:,} bytes, 10 are free"):
        G.picture_fragments(records, grid, Toy(), tmp_path / "out", "train", echo=None)


# ------------------------------------------------------------------------------------------ texts' fragments
KEYWORDS = [[("dog", 0.9), ("red", 0.5)], [], [("ball", 0.7), ("dog", 0.2), ("man", 0.1)], [("red", 0.3)]]


def test_which_keywords_a_text_has_is_part_of_its_features(tmp_path):
    """The same words dealt out otherwise are other data, though each word's features are the same."""
    one, same, other = (
        G.text_fragments(lists, Toy(), tmp_path, "train", dtype="float32", echo=None).meta
        for lists in ([["dog", "red"], ["cat"]], [["dog", "red"], ["cat"]], [["cat"], ["dog", "red"]])
    )
    assert one == same != other


def test_text_fragments_are_their_keywords_embedded_once(tmp_path, vlp, monkeypatch):
    monkeypatch.setitem(G.BLOCK, "texts", 2)
    model = Toy()
    made = G.text_fragments(KEYWORDS, model, tmp_path, "train", dtype="float32", echo=None)
    assert model.texts == made.texts == ["ball", "dog", "man", "red"]
    assert made.mask.tolist() == [[True, True, False], [False] * 3, [True] * 3, [True, False, False]]
    assert [[made.texts[i] for i in row[kept]] for row, kept in zip(made.index, made.mask, strict=True)] == [
        [w for w, _ in words] for words in KEYWORDS
    ]
    features, mask = made.dense()
    for i, words in enumerate(KEYWORDS):
        for j, (word, _) in enumerate(words):
            assert torch.equal(features[i, j], Toy().embed_texts([word])[0])
    assert not features[~mask].any()
    again = Toy()
    G.text_fragments(
        [[w for w, _ in words] for words in KEYWORDS], again, tmp_path, "train", dtype="float32", echo=None
    )
    assert again.texts == []  # with scores or without, these are the same words
    G.text_fragments(KEYWORDS[:1], again, tmp_path, "train", dtype="float32", echo=None)
    assert again.texts == ["dog", "red"]
    own = G.text_fragments(KEYWORDS, vlp["blip2"], tmp_path, "train", dtype="float32", echo=None)
    close(own.features[1], vlp["blip2"].embed_texts(["dog"])[0])


def test_whole_texts(tmp_path, records):
    texts = [G.document(r) for r in records]
    assert texts[1] == "a dog 1 the ball"
    model = Toy()
    made = G.whole_texts([*texts, texts[0]], model, tmp_path, "train", dtype="float32", echo=None)
    assert len(model.texts) == 5
    features, mask = made.dense()
    assert mask.shape == (6, 1)
    assert mask.all()
    for i, text in enumerate([*texts, texts[0]]):
        assert torch.equal(features[i, 0], Toy().embed_texts([text])[0])


def test_texts_without_any_keyword_are_refused(tmp_path):
    with pytest.raises(DataError, match="nothing to embed"):
        G.text_fragments([[], []], Toy(), tmp_path, "train")


# ------------------------------------------------------------------------------------------ from end to end
def test_the_pipeline_on_the_embedded_set(scenes, tmp_path):
    records = {s: load("scenes", scenes.parent, s)[:8] for s in ("train", "test")}
    texts = {s: [G.document(r) for r in mine] for s, mine in records.items()}
    method = keyword_method("words", train=texts["train"])
    words = word_level(TOKENIZER)
    torch.manual_seed(0)
    config = small_clip(
        len(words), eos=words.sep_token_id, bos=words.cls_token_id, width=16, depth=1, positions=128
    )
    open_clip_model(config).save_pretrained(tmp_path / "clip")
    words.save_pretrained(tmp_path / "clip")
    CLIPImageProcessor(size={"shortest_edge": 64}, crop_size={"height": 64, "width": 64}).save_pretrained(
        tmp_path / "clip"
    )
    model = G.VLP(tmp_path / "clip")
    for split, mine in records.items():
        boxes = P.extract_proposals(mine, "selective_search", tmp_path, split, min_side=4, echo=None)
        keywords = G.extract_keywords(texts[split], method, tmp_path, split, echo=None)
        regions, mask = G.picture_fragments(mine, boxes, model, tmp_path, split, echo=None).dense()
        tags, known = G.text_fragments(keywords, model, tmp_path, split, echo=None).dense()
        assert regions.shape == tags.shape == (len(mine), 10, 16)
        assert mask.sum() > 9 * len(mine)
        assert known.any(1).all()
        close(regions[mask].float().norm(dim=-1), torch.ones(int(mask.sum())), 2e-3)
    boxed = load("scenes_coco", scenes.parent, "test")[:8]  # the same pictures, with their objects
    queries = P.given(boxed)
    crops = G.picture_fragments(boxed, queries, model, tmp_path, "test", echo=None)
    labels = [o.category for r in boxed for o in P.usable_objects(r)]
    assert len(crops.features) == len(labels) == queries.mask.sum() > 12
