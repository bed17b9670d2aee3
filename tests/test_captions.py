"""Caption metrics on cases worked by hand and against pycocoevalcap's own; COCO's file of captions."""

from __future__ import annotations

import json
import math

import pytest

from finematch.evaluation import captions as C
from finematch.files import DataError

REFERENCES = {
    "1": ["A man rides a brown horse.", "The man's horse is brown, and runs!", "a person on a horse"],
    "2": ["two dogs play with a red ball", "Two dogs are playing outside."],
    "3": [
        "a red car is parked on the street",
        "the car, red, stands at the side of the street",
        "A parked car",
    ],
    "4": ["people walk in the rain with umbrellas", "several people holding umbrellas"],
}
WRITTEN = {"1": "a man rides a horse", "2": "two dogs play with a ball outside", "3": "a red car parked on the street.",
           "4": "a man in the rain"}  # fmt: skip
OURS = {i: C.words(text) for i, text in WRITTEN.items()}
THEIRS = {i: [C.words(text) for text in some] for i, some in REFERENCES.items()}

official = pytest.mark.skipif(bool(C.lacking()), reason=C.lacking() or "-")


def test_own_tokens():
    assert C.words("The man's horse is brown, and runs!") == [
        "the",
        "man's",
        "horse",
        "is",
        "brown",
        "and",
        "runs",
    ]


def test_bleu_by_hand():
    """ "the cat sat on the mat" against "the cat sat on a mat": 1- to 4-grams found 5, 3, 2, 1 of 6, 5, 4, 3."""
    mine, true = (
        {"x": ["the", "cat", "sat", "on", "the", "mat"]},
        {"x": [["the", "cat", "sat", "on", "a", "mat"]]},
    )
    assert C.bleu4(mine, true) == pytest.approx(100 * (5 / 6 * 3 / 5 * 2 / 4 * 1 / 3) ** 0.25)
    short = {"x": ["the", "cat", "sat", "on"]}  # all found; 4 words for 6: exp(1 - 6 / 4)
    assert C.bleu4(short, true) == pytest.approx(100 * math.exp(-0.5))
    two = {
        "x": [["the", "cat", "sat", "on", "a", "mat"], ["cat", "on"]]
    }  # 6 and 2 are equally near to 4: the shorter counts
    assert C.bleu4(short, two) == pytest.approx(100)
    assert C.bleu4({"x": ["dog"]}, true) == 0


def test_a_word_counts_no_more_often_than_in_one_reference():
    mine, true = (
        {"x": ["the", "the", "the", "the", "the"]},
        {"x": [["the", "cat", "the"], ["the", "the", "a"]]},
    )
    assert C.bleu4(mine, true) == 0  # two of five words, one of four pairs, no triple


def test_cider_by_hand():
    """Two images, one reference each. The words of image 1 are in no other: idf ln 2; equal captions score 10 of 10."""
    true = {"1": [["a", "b", "c", "d"]], "2": [["e", "f", "g", "h"]]}
    assert C.cider({"1": ["a", "b", "c", "d"], "2": ["e", "f", "g", "h"]}, true) == pytest.approx(1000)
    # "a b": two of four words, cosine 2 / (sqrt 2 sqrt 4); one of three pairs, 1 / sqrt 3; lengths 2 and 4
    half = (2 / (2**0.5 * 2) + 1 / 3**0.5) / 4 * math.exp(-(2**2) / 72)
    assert C.cider({"1": ["a", "b"], "2": ["e", "f", "g", "h"]}, true) == pytest.approx(1000 * (half + 1) / 2)
    assert C.cider({"1": ["a", "b", "c", "d"]}, {"1": true["1"]}) == 0  # of one image every idf is 0


def test_order_of_images_changes_nothing_and_names_say_which_tokens():
    found = C.caption_scores(WRITTEN, REFERENCES, metrics="own", split="mine")
    turned = C.caption_scores(dict(reversed(WRITTEN.items())), REFERENCES, metrics="own", split="mine")
    protocol = found.pop("protocol")
    assert turned.pop("protocol") == protocol
    assert found == pytest.approx(turned)
    assert set(found) == {
        "bleu4_own_tokens",
        "cider_own_tokens",
        "words",
        "different",
        "described",
    }
    assert protocol.startswith("mine: 4 images, 10 reference captions; ")
    assert "not by pycocoevalcap" in protocol


def test_other_images_are_refused():
    with pytest.raises(ValueError, match=r"different images: .*'4'"):
        C.caption_scores({k: v for k, v in WRITTEN.items() if k != "4"}, REFERENCES)
    with pytest.raises(ValueError, match="image 4 has no reference"):
        C.caption_scores(WRITTEN, REFERENCES | {"4": []})
    with pytest.raises(ValueError, match="metrics is 'all'"):
        C.caption_scores(WRITTEN, REFERENCES, metrics="all")


def test_without_java_or_the_package_it_says_so(monkeypatch):
    monkeypatch.setattr(C.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(C.shutil, "which", lambda name: None)
    assert "`java`" in C.lacking()
    with pytest.raises(RuntimeError, match="java"):
        C.caption_scores(WRITTEN, REFERENCES, metrics="official")
    assert "cider" not in C.caption_scores(WRITTEN, REFERENCES)
    monkeypatch.setattr(C.importlib.util, "find_spec", lambda name: None)
    assert "pip install" in C.lacking()


def test_the_most_frequent_caption():
    assert C.most_frequent(["a dog", "A cat.", "a cat", "a bird"]) == "A cat."


def test_own_numbers_are_pycocoevalcaps_on_the_same_tokens():
    pytest.importorskip("pycocoevalcap")
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider

    true = {i: [" ".join(one) for one in some] for i, some in THEIRS.items()}
    mine = {i: [" ".join(one)] for i, one in OURS.items()}
    assert C.bleu4(OURS, THEIRS) == pytest.approx(100 * Bleu(4).compute_score(true, mine, verbose=0)[0][-1])
    assert C.cider(OURS, THEIRS) == pytest.approx(100 * Cider().compute_score(true, mine)[0])


@official
def test_official_numbers_are_pycocoevalcaps_own_pipeline(tmp_path):
    """Its COCOEvalCap on COCO's two files, the captions read back from ours."""
    from pycocoevalcap.eval import COCOEvalCap
    from pycocotools.coco import COCO

    truth = {"info": {}, "licenses": [], "images": [{"id": int(i)} for i in REFERENCES], "annotations": [
        {"id": 10 * int(i) + k, "image_id": int(i), "caption": one}
        for i, some in REFERENCES.items() for k, one in enumerate(some)]}  # fmt: skip
    (tmp_path / "truth.json").write_text(json.dumps(truth))
    C.write_results(tmp_path / "mine.json", WRITTEN)
    coco = COCO(str(tmp_path / "truth.json"))
    theirs = COCOEvalCap(coco, coco.loadRes(str(tmp_path / "mine.json")))
    if not C.spice_files():
        theirs.evaluate = evaluate_without_spice.__get__(theirs)
    theirs.evaluate()
    found = C.caption_scores(
        C.read_results(tmp_path / "mine.json", REFERENCES), REFERENCES, metrics="official"
    )
    for ours, name in (("bleu4", "Bleu_4"), ("meteor", "METEOR"), ("rouge_l", "ROUGE_L"), ("cider", "CIDEr")):
        assert found[ours] == pytest.approx(100 * theirs.eval[name], abs=1e-9), ours


def evaluate_without_spice(self):
    """`COCOEvalCap.evaluate` with `Spice`, which would download its models, taken out."""
    import pycocoevalcap.eval as module

    class Nothing:
        def compute_score(self, true, mine):
            return 0.0, [{"All": {"f": 0.0}} for _ in true]

        def method(self):
            return "SPICE"

    was, module.Spice = module.Spice, Nothing
    try:
        type(self).evaluate(self)
    finally:
        module.Spice = was


def test_the_file_comes_back_in_the_order_of_the_split(tmp_path):
    C.write_results(tmp_path / "a.json", dict(reversed(WRITTEN.items())) | {})
    assert json.loads((tmp_path / "a.json").read_text())[0] == {"image_id": 4, "caption": "a man in the rain"}
    assert list(C.read_results(tmp_path / "a.json", WRITTEN).items()) == list(WRITTEN.items())


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "the file: cannot be read"),
        ("{}", "the file: is a JSON dict"),
        ('[{"image_id": 1}]', "entry 0: is"),
        ('[{"image_id": 1, "caption": null}]', "entry 0: is"),
        ('["a"]', "entry 0: is"),
        ('[{"image_id": 9, "caption": "a"}]', "entry 0: is of image 9"),
        (
            '[{"image_id": 1, "caption": "a"}, {"image_id": "1", "caption": "a"}]',
            "entry 1: is a second caption",
        ),
        ('[{"image_id": 1, "caption": "a"}]', "the file: has no caption of 3 images, the first is 2"),
    ],
)
def test_a_file_that_cannot_be_scored_is_refused(tmp_path, content, message):
    (tmp_path / "bad.json").write_text(content)
    with pytest.raises(DataError, match=message):
        C.read_results(tmp_path / "bad.json", WRITTEN)
