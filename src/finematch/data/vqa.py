"""VQAv2: questions about images, and the answers of ten people to each.

Goyal et al., CVPR 2017. Questions and annotations are two files; those of test-dev and test come without annotations.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from finematch.data.checks import (
    check_name,
    clean_caption,
    read_json,
    reading,
    require_distinct,
    require_pictures,
)
from finematch.data.record import DataError, Question

PEOPLE = 10  # answers a question
SUBSETS = {  # the release's names of a split: of its files, of its image folder
    "train": ("train2014", "train2014"),
    "val": ("val2014", "val2014"),
    "test-dev": ("test-dev2015", "test2015"),
    "test": ("test2015", "test2015"),
}


def load_vqa(
    questions: str | Path,
    image_dir: str | Path,
    split: str,
    *,
    image_name: Callable[[int], str],
    annotations: str | Path | None = None,
    check_images: bool = True,
) -> list[Question]:
    """Read the questions that a file lists, with the answers of another.

    Args:
        questions: `v2_OpenEnded_*_questions.json`.
        image_name: the file of an image id below `image_dir`.
        annotations: `v2_*_annotations.json` of the same questions; None where the answers are withheld.

    Returns:
        Questions in the order of the file.

    Raises:
        DataError: Malformed JSON, an empty question, two with one id, a question without annotation or with other than
            ten answers, an annotation of another image or of no question, a missing image file.
    """
    table = {} if annotations is None else _annotations(annotations)
    data, found = read_json(questions), []
    with reading(questions, "the list `questions`"):
        entries = list(data["questions"])
    if not entries:
        raise DataError(questions, "the list `questions`", "is empty", "Download the file again")
    for number, entry in enumerate(entries):
        with reading(questions, f"question number {number}"):
            question_id, image_id = int(entry["question_id"]), int(entry["image_id"])
            name = f"question {question_id}"
            text = clean_caption(entry["question"], questions, name)
            file = check_name(image_name(image_id), questions, name)
        known = {}
        if annotations is not None:
            if (known := table.pop(question_id, None)) is None:
                raise DataError(annotations, name, "has no annotation", "Use the two files of one split")
            if (other := known.pop("image_id")) != image_id:
                problem = f"is about image {other} here, about {image_id} in {questions}"
                raise DataError(annotations, name, problem, "Use the two files of one release")
        source = f"{questions}: {name}"
        found.append(
            Question(question_id, split, text, str(image_id), Path(image_dir) / file, **known, source=source)
        )
    if table:
        raise DataError(
            annotations, f"question {next(iter(table))}", f"is not in {questions}", "Use the two of one split"
        )
    require_distinct((question.question_id for question in found), questions, "question")
    if check_images:
        require_pictures(dict.fromkeys(question.image for question in found), questions)
    return found


def _annotations(path: str | Path) -> dict[int, dict]:
    """By question id: image_id, and a `Question`'s answers and types."""
    data, found = read_json(path), {}
    with reading(path, "the list `annotations`"):
        entries = list(data["annotations"])
    for number, entry in enumerate(entries):
        with reading(path, f"annotation number {number}"):
            question_id = int(entry["question_id"])
            answers = tuple(str(one["answer"]) for one in entry["answers"])
            types = {key: str(entry[key]) for key in ("question_type", "answer_type")}
            image_id = int(entry["image_id"])
        if len(answers) != PEOPLE:
            problem = f"has {len(answers)} answers, not {PEOPLE}"
            raise DataError(path, f"question {question_id}", problem, "Download the file again")
        if question_id in found:
            raise DataError(path, f"question {question_id}", "is annotated twice", "Remove one of the two")
        found[question_id] = {"image_id": image_id, "answers": answers, **types}
    return found
