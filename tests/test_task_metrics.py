"""VQA accuracy, NLVR2's accuracy and consistency, video retrieval: cases worked by hand, and naive loops."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from finematch.data.record import ImagePair, Question
from finematch.evaluation.nlvr2 import nlvr2_results, write_nlvr2
from finematch.evaluation.retrieval import retrieval_from_scores, video_retrieval
from finematch.evaluation.vqa import accuracy, normalise, vqa_results, write_vqa


@pytest.mark.parametrize(
    ("answer", "normal"),
    [
        ("Two", "2"),
        ("none", "0"),
        ("the red ball", "red ball"),
        ("a", ""),
        ("dont", "don't"),
        ("couldntve", "couldntve"),  # the evaluator restores one apostrophe, not two
        ("couldn'tve", "couldn't've"),
        ("red-blue", "red blue"),
        ("red -blue", "red blue"),  # a mark beside a space is dropped
        ("what?", "what"),
        ("1,000", "1000"),
        ("1,000-2", "10002"),  # with a grouped number nothing becomes a space
        ("1.5", "1.5"),
        ("5.", "5"),
        ("a.m.", "am"),
        ("somebody'd", "somebodyd"),
    ],
)
def test_normalised_answers(answer, normal):
    assert normalise(answer) == normal


@pytest.mark.parametrize(("same", "score"), [(0, 0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1), (10, 1)])
def test_accuracy_by_the_number_of_people_who_agree(same, score):
    """Two who agree: left out is one of them in 2 of 10 subsets (1/3), another in 8 (2/3): 0.2/3 + 1.6/3 = 0.6."""
    others = [f"other{k}" for k in range(10 - same)]
    assert accuracy("red", ["red"] * same + others) == pytest.approx(score)


def test_answers_are_normalised_only_where_people_disagree():
    assert accuracy("Yes", ["yes"] * 10) == 0
    assert accuracy("Yes", ["yes"] * 9 + ["no"]) == 1
    assert accuracy(" yes\n", ["yes"] * 10) == 1  # white space is dropped always
    assert accuracy("2", ["two"] * 10) == 0
    assert accuracy("2", ["two"] * 5 + ["2"] * 5) == 1
    with pytest.raises(ValueError, match="no answers"):
        accuracy("yes", [])


def test_accuracy_is_the_mean_over_ten_ways_to_leave_one_out():
    rng = np.random.default_rng(0)
    for _ in range(50):
        people = rng.choice(["x", "y", "z"], 10).tolist()
        naive = [min(1, sum(p == "x" for p in people[:i] + people[i + 1 :]) / 3) for i in range(10)]
        assert accuracy("x", people) == pytest.approx(np.mean(naive))


def question(number: int, answers=(), kind="other", first="what color"):
    return Question(number, "val", f"{first} ...?", "7", Path("7.jpg"), tuple(answers), first, kind)


def test_vqa_by_type():
    questions = [
        question(1, ["red"] * 10),
        question(2, ["red"] * 2 + ["blue"] * 8),
        question(3, ["2"] * 10, "number", "how many"),
        question(4),
    ]
    found = vqa_results(questions, {1: "red", 2: "red", 3: "3", 4: "yes"}, split="val")
    assert found["vqa"] == pytest.approx(100 * 1.6 / 3)
    assert found["vqa_other"] == found["vqa_type_what color"] == pytest.approx(80)
    assert found["vqa_number"] == found["vqa_type_how many"] == 0
    assert (found["questions"], found["unscored"]) == (4, 1)
    assert found["protocol"].startswith(
        "val: VQA accuracy of 3 questions, 1 without published answers are not"
    )


def test_questions_without_answers_are_answered_and_not_scored(tmp_path):
    questions = [question(9), question(4)]
    found = vqa_results(questions, {4: "yes", 9: "2"})
    assert "vqa" not in found
    assert (found["questions"], found["unscored"]) == (2, 2)
    write_vqa(tmp_path / "results.json", questions, {4: "yes", 9: "2"})
    assert json.loads((tmp_path / "results.json").read_text()) == [
        {"question_id": 9, "answer": "2"},
        {"question_id": 4, "answer": "yes"},
    ]
    for wrong, match in (
        ({4: "yes"}, "1 questions have no answer, the first is 9"),
        ({4: "", 9: "", 5: ""}, "to 5"),
    ):
        with pytest.raises(ValueError, match=match):
            vqa_results(questions, wrong)
        with pytest.raises(ValueError, match=match):
            write_vqa(tmp_path / "never.json", questions, wrong)
    assert not (tmp_path / "never.json").exists()


def pair(identifier: str, label: bool | None = True) -> ImagePair:
    return ImagePair(identifier, "val", "Both show a dog.", (Path("0.png"), Path("1.png")), label)


def test_nlvr2_by_hand(tmp_path):
    """Sentence 0 of set 850 is right on both its pairs, sentence 1 on one of two: 3 of 4 examples, 1 of 2 sentences."""
    pairs = [pair("dev-850-0-0"), pair("dev-850-1-0", False), pair("dev-850-0-1"), pair("dev-850-1-1", False)]
    judged = dict(zip([p.identifier for p in pairs], (True, False, True, True), strict=True))
    found = nlvr2_results(pairs, judged, split="dev")
    assert (found["nlvr2_accuracy"], found["nlvr2_consistency"]) == (75, 50)
    assert (found["examples"], found["sentences"], found["unscored"]) == (4, 2, 0)
    assert found["protocol"].startswith("dev: 4 examples; consistency over 2 sentences")
    hidden = nlvr2_results([*pairs, pair("test2-1-0-0", None)], judged | {"test2-1-0-0": True})
    assert (hidden["nlvr2_accuracy"], hidden["unscored"]) == (75, 1)
    assert "nlvr2_accuracy" not in nlvr2_results([pair("test2-1-0-0", None)], {"test2-1-0-0": True})
    write_nlvr2(tmp_path / "dev.csv", pairs, judged)
    assert (tmp_path / "dev.csv").read_text().splitlines()[1] == "dev-850-1-0,False"
    with pytest.raises(ValueError, match="1 examples are not judged, the first is dev-850-1-0"):
        nlvr2_results(pairs[:2], {"dev-850-0-0": True})
    with pytest.raises(ValueError, match="other examples, the first of dev-9"):
        nlvr2_results(pairs, judged | {"dev-9-0-0": True})


def test_nlvr2_of_any_order_is_the_same():
    rng = np.random.default_rng(0)
    pairs = [
        pair(f"dev-{s}-{p}-{t}", bool(rng.integers(2))) for s in range(5) for p in range(3) for t in range(2)
    ]
    judged = {p.identifier: bool(rng.integers(2)) for p in pairs}
    naive = {}
    for p in pairs:
        s, t = p.identifier.split("-")[1], p.identifier.split("-")[3]
        naive[s, t] = naive.get((s, t), True) and judged[p.identifier] == p.label
    found = nlvr2_results(pairs, judged)
    assert found["nlvr2_consistency"] == pytest.approx(100 * np.mean(list(naive.values())))
    assert nlvr2_results(pairs[::-1], judged) == found


def test_the_median_rank_may_be_a_half():
    """Own videos are ranked 1, 1, 2, 4: MdR is 1.5, of which `medr` makes 1."""
    scores = torch.tensor([[9.0, 0, 5, 1], [0, 9, 9, 2], [0, 0, 7, 3], [0, 0, 0, 0]])
    found = video_retrieval(scores, range(4), split="1k-A", frames="8 uniform frames", skipped=3)
    assert (found["t2v_mdr"], found["t2v_r1"], found["t2v_r5"]) == (1.5, 50, 100)
    assert (found["videos"], found["captions"], found["skipped"]) == (4, 4, 3)
    assert found["protocol"] == (
        "1k-A: 4 videos x 4 captions, 8 uniform frames, 3 missing or broken videos left out, ties against the model"
    )
    plain = retrieval_from_scores(scores, range(4))
    assert plain["t2i_medr"] == 1
    assert all(
        found[f"{a}_r{k}"] == plain[f"{b}_r{k}"] for a, b in (("t2v", "t2i"), ("v2t", "i2t")) for k in (1, 5)
    )
    odd = video_retrieval(scores[:3, :3], range(3))
    assert odd["t2v_mdr"] == 1
    assert "no video left out" in odd["protocol"]


def test_ties_count_against_the_model_and_captions_may_come_in_any_order():
    same = video_retrieval(torch.zeros(4, 4), range(4))
    assert (same["t2v_r1"], same["t2v_mdr"], same["ties_t2v"]) == (0, 4, 4)
    scores = torch.randn(6, 12, generator=torch.Generator().manual_seed(0))
    video_of = np.arange(12) % 6
    found = video_retrieval(scores, video_of)
    own = scores[torch.as_tensor(video_of), torch.arange(12)]
    ranks = (scores > own).sum(0) + 1
    assert found["t2v_mdr"] == np.median(ranks.numpy())
    order = np.random.default_rng(0).permutation(12)
    assert video_retrieval(scores[:, order], video_of[order]) == found
    with pytest.raises(ValueError, match="must be finite"):
        video_retrieval(torch.full((2, 2), torch.nan), range(2))
