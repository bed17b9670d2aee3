"""VQA accuracy, as VQAv2's official evaluator defines it.

Ten people answered each question. An answer scores min(1, matches / 3) against nine of them, averaged over the ten
ways to leave one out: 0.3, 0.6, 0.9 and 1 for one, two, three and more people. Where the ten disagree, all answers are
normalised first (punctuation, lower case, number words, articles, apostrophes); where they agree nothing is, so that
"Yes" scores 0 against ten times "yes".
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np

from finematch.data.record import Question
from finematch.files import write_text

PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
ARTICLES = ("a", "an", "the")
# What the evaluator restores: each form where one of its apostrophes is missing.
APOSTROPHES = """
    ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd he'd've
    he's how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't must've needn't not've
    o'clock oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd've somebody'll somebody's
    someone'd someone'd've someone'll someone's something'd something'd've something'll that's there'd there'd've
    there're there's they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're what's
    what've when's where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't would've
    wouldn't wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll you're you've
"""
RESTORED = {
    word[: match.start()] + word[match.end() :]: word
    for word in APOSTROPHES.split()
    for match in re.finditer("'", word)
} | {"somebody'd": "somebodyd"}  # the evaluator's own slip, kept for equal numbers


def normalise(answer: str) -> str:
    """An answer as the evaluator compares it where people disagree: "The two-piece, dont" -> "2 piece don't"."""
    grouped = re.search(r"\d,\d", answer) is not None  # then no mark of punctuation becomes a space
    text = answer
    for mark in PUNCTUATION:
        at_edge = f"{mark} " in answer or f" {mark}" in answer
        text = text.replace(mark, "" if at_edge or grouped else " ")
    text = re.sub(r"\.(?!\d)", "", text)
    digits = {"none": "0"} | {word: str(number) for number, word in enumerate(NUMBERS)}
    words = [digits.get(word, word) for word in text.lower().split()]
    return " ".join(RESTORED.get(word, word) for word in words if word not in ARTICLES)


def accuracy(answer: str, answers: Sequence[str]) -> float:
    """The score in [0, 1] of one answer against those of several people (ten in VQAv2).

    Raises:
        ValueError: No answers to compare with.
    """
    if not answers:
        raise ValueError("there are no answers to score against")
    given, *people = (re.sub(r"[\n\t]", " ", text).strip() for text in (answer, *answers))
    if len(set(people)) > 1:
        given, *people = map(normalise, (given, *people))
    same, total = people.count(given), len(people)
    # leaving out one who agrees leaves same - 1 matches, leaving out another leaves all
    return (same * min(1, (same - 1) / 3) + (total - same) * min(1, same / 3)) / total


def vqa_results(questions: Sequence[Question], answers: Mapping[int, str], *, split: str = "") -> dict:
    """VQA accuracy in percent, over all questions and by type.

    Args:
        answers: by question id, one for every question.

    Returns:
        `vqa`; `vqa_yes/no`, `vqa_number`, `vqa_other` (by type of the answer); `vqa_type_how many` and so on (by the
        first words of the question); `questions`, `unscored` (questions whose answers are withheld: they are answered
        and not scored; where all are, no accuracy is in the result) and `protocol`.

    Raises:
        ValueError: Answers for other questions than these.
    """
    _check(questions, answers)
    scores = defaultdict(list)
    for question in questions:
        if question.answers:
            score = accuracy(answers[question.question_id], question.answers)
            for name in ("vqa", f"vqa_{question.answer_type}", f"vqa_type_{question.question_type}"):
                scores[name].append(score)
    scored = len(scores["vqa"]) if scores else 0
    unscored = len(questions) - scored
    note = f", {unscored} without published answers are not scored" if unscored else ""
    return {name: 100 * float(np.mean(values)) for name, values in scores.items()} | {
        "questions": len(questions),
        "unscored": unscored,
        "protocol": f"{split + ': ' if split else ''}VQA accuracy of {scored} questions{note}; mean over the ten ways "
        "to leave one person out of min(1, matches / 3), normalised where people disagree",
    }


def write_vqa(path: str | Path, questions: Sequence[Question], answers: Mapping[int, str]) -> None:
    """The official upload format: a list of `question_id` and `answer`, in the order of the questions.

    Raises:
        ValueError: Answers for other questions than these: the server refuses such a file.
        DataError: The file cannot be written.
    """
    _check(questions, answers)
    rows = [{"question_id": q.question_id, "answer": answers[q.question_id]} for q in questions]
    write_text(path, json.dumps(rows))


def _check(questions: Iterable[Question], answers: Mapping[int, str]) -> None:
    wanted = {question.question_id for question in questions}
    if missing := sorted(wanted - answers.keys()):
        raise ValueError(f"{len(missing)} questions have no answer, the first is {missing[0]}")
    if more := sorted(answers.keys() - wanted):
        raise ValueError(f"{len(more)} answers are to other questions, the first to {more[0]}")
