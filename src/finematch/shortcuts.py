"""How far shortcuts get on the tasks of `scenes`, from the files on disk: what a model has to beat.

* Questions: the majority answer of train, the majority answer of each question's text (or, of a text that train does
  not have, of its type), and the most frequent answer itself (what people's disagreement leaves of it).
* Image pairs: a constant answer, the majority label of each sentence (half of its pairs, by design), what a left image
  alone tells an oracle on attributes, and what both tell.
* Clips: chance, one frame, all frames without their order, and all frames in order, each an oracle on attributes.

`python -m finematch.shortcuts DATA_ROOT` draws what is missing and prints the table.
"""

from __future__ import annotations

import sys
from collections import Counter, defaultdict
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from finematch.data import load
from finematch.data.record import ImagePair, Question
from finematch.evaluation.nlvr2 import nlvr2_results
from finematch.evaluation.vqa import vqa_results
from finematch.scenes.baselines import recalls
from finematch.scenes.clips import FRAMES, true_of
from finematch.scenes.tasks import clip_truths, sentence_truths


def _most(values: Iterable) -> object:
    return Counter(values).most_common(1)[0][0]


def frequent(question: Question) -> str:
    """The answer that most people gave."""
    return _most(question.answers)


def vqa_shortcuts(train: list[Question], test: list[Question]) -> dict[str, dict[str, float]]:
    """VQA accuracy on `test` of the majority answer, of the question alone, and of the most frequent answer."""
    majority = _most(map(frequent, train))
    by_text, by_type = defaultdict(list), defaultdict(list)
    for question in train:
        by_text[question.text].append(frequent(question))
        by_type[question.question_type].append(frequent(question))

    def guess(question: Question) -> str:
        return _most(by_text.get(question.text) or by_type.get(question.question_type) or [majority])

    ways = {"majority answer": lambda q: majority, "question alone": guess, "full": frequent}
    return {name: vqa_results(test, {q.question_id: way(q) for q in test}) for name, way in ways.items()}


def sentence_alone(train: list[ImagePair], test: list[ImagePair]) -> list[bool]:
    """For each example the label that its sentence has most often in train; of a new sentence the most frequent."""
    labels, by_sentence = [pair.label for pair in train], defaultdict(list)
    for pair in train:
        by_sentence[pair.sentence].append(pair.label)
    return [_most(by_sentence.get(pair.sentence, labels)) for pair in test]


def nlvr2_shortcuts(
    test: list[ImagePair], train_truths: list[dict], truths: list[dict], train: list[ImagePair]
) -> dict[str, dict[str, float]]:
    """Accuracy and consistency on `test`: a constant, the sentence alone, a left or right image alone, both.

    An oracle that sees one image knows whether it shows what the sentence names, or how many of it; it says what is
    most often true of such images in train.
    """

    def cells(truths: list[dict], side: int) -> list[tuple]:
        return [(one["kind"], pair["states"][side]) for one in truths for pair in one["pairs"]]

    labels, answers = [pair.label for pair in train], {}
    answers["constant"] = [_most(labels)] * len(test)
    answers["sentence alone"] = sentence_alone(train, test)
    for side, name in enumerate(("left image alone", "right image alone")):
        seen = defaultdict(list)
        for cell, label in zip(cells(train_truths, side), labels, strict=True):
            seen[cell].append(label)
        answers[name] = [_most(seen.get(cell, labels)) for cell in cells(truths, side)]
    answers["full"] = [pair["label"] for one in truths for pair in one["pairs"]]
    return {
        name: nlvr2_results(test, dict(zip([p.identifier for p in test], said, strict=True)))
        for name, said in answers.items()
    }


def clip_shortcuts(clips: list[dict]) -> dict[str, dict[str, float]]:
    """Recalls (`scenes.baselines.recalls`) on a list of clips with one caption each.

    An oracle that finds a caption true of several clips cannot choose: its expected R@1 is 1 over their number.
    """
    of = np.arange(len(clips))
    ways = {
        "chance": lambda clip, meaning: False,
        "one frame": lambda clip, meaning: true_of(clip, meaning, frame=FRAMES // 2),
        "frames without order": lambda clip, meaning: true_of(clip, meaning, order=False),
        "full": true_of,
    }
    return {
        name: recalls(np.array([[float(way(clip, meaning)) for meaning in clips] for clip in clips]), of)
        for name, way in ways.items()
    }


def shortcuts(data_root: str | Path, split: str = "test") -> dict[str, dict[str, dict[str, float]]]:
    """All of them for the set below `data_root`, by dataset; parts that are missing are drawn."""
    root = Path(data_root)
    train, test = (load("scenes_vqa", root, name) for name in ("train", split))
    found = {"scenes_vqa": vqa_shortcuts(train, test)}
    train, test = (load("scenes_nlvr2", root, name) for name in ("train", split))
    truths = (sentence_truths(root / "scenes", name) for name in ("train", split))
    found["scenes_nlvr2"] = nlvr2_shortcuts(test, *truths, train)
    load("scenes_clips", root, split)
    return found | {"scenes_clips": clip_shortcuts(clip_truths(root / "scenes", split))}


COLUMNS = {
    "scenes_vqa": ("vqa", "vqa_yes/no", "vqa_number", "vqa_other"),
    "scenes_nlvr2": ("nlvr2_accuracy", "nlvr2_consistency"),
    "scenes_clips": ("t2i R@1 expected", "t2i R@5 expected", "i2t R@1 expected"),
}


def table(found: dict[str, dict[str, dict[str, float]]]) -> str:
    """The shortcuts as Markdown tables, in percent."""
    lines = []
    for dataset, columns in COLUMNS.items():
        lines += ["", f"| {dataset} | " + " | ".join(columns) + " |", "|---|" + "---|" * len(columns)]
        for name, numbers in found[dataset].items():
            lines.append(f"| {name} | " + " | ".join(f"{numbers.get(c, 0):.1f}" for c in columns) + " |")
    return "\n".join(lines[1:])


if __name__ == "__main__":
    print(table(shortcuts(sys.argv[1])))
