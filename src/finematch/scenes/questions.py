"""Questions about the images of `scenes`, in VQAv2's format: two JSON files a split.

Every question is asked of two images that answer it differently, as in VQAv2: who reads the question alone must guess.
"No" is hard: the image shows both attributes on two objects, or the two objects the other way round. Ten people answer,
and some of them say the same in other words ("crimson", "Two", "a star"), or something wrong.

`answer_of(picture, meaning)` answers any question of any picture: None where it cannot be asked.
"""

from __future__ import annotations

from collections import Counter

import numpy as np

from finematch.scenes.language import RELATIONS, TABLES, matches, noun_phrase, pick

PEOPLE = 10
TRIES = 400  # pictures that are looked at for a second answer; at most four times as many as there are
SHARES = {"exists": 0.2, "relation": 0.2, "count": 0.2, "colour": 0.16, "shape": 0.12, "neighbour": 0.12}
ANSWER_TYPES = {"exists": "yes/no", "relation": "yes/no", "count": "number"}  # all others: other
DIRECTIONS = ("left of", "right of", "above", "below")
# {a}: an object; {the}, {that}: known objects; {many}: objects of one description; {r}: a relation
TEXTS = {
    "exists": ("is there {a}?", "is there {a} in the picture?", "does the picture show {a}?"),
    "relation": ("is {the} {r} {that}?",),
    "count": ("how many {many} are there?", "how many {many} does the picture show?"),
    "colour": ("what colour is {the}?",),
    "shape": ("what shape is {the}?",),
    "neighbour": ("what shape is {r} {the}?",),
}
QUESTION_TYPES = ("is there", "does the", "is the", "how many", "what colour is", "what shape is")
DOUBT = (0.0, 0.0, 0.0, 0.1, 0.1, 0.2, 0.3, 0.45)  # how often a person leaves the answer, by question
WORDS = ("yes", "no", "?", *map(str, range(6)))


def _only(picture: dict, mention: dict) -> int | None:
    """The one object that a mention names, or None."""
    found = [i for i, thing in enumerate(picture["objects"]) if matches(thing, mention)]
    return found[0] if len(found) == 1 else None


def answer_of(picture: dict, meaning: dict) -> str | None:
    """The answer to a question about a picture; None where it presupposes what the picture does not show.

    Args:
        meaning: `kind`, `mentions` (see `language`), and for relations `relation`.
    """
    kind, mentions = meaning["kind"], meaning["mentions"]
    count = sum(matches(thing, mentions[0]) for thing in picture["objects"])
    if kind == "exists":
        return "yes" if count else "no"
    if kind == "count":
        return str(count)
    named = [_only(picture, mention) for mention in mentions]
    if None in named or len(set(named)) < len(named):
        return None
    if kind == "relation":
        i, j = named
        if [i, meaning["relation"], j] in picture["relations"]:
            return "yes"
        return "no" if [j, meaning["relation"], i] in picture["relations"] else None
    if kind == "neighbour":
        near = [i for i, name, j in picture["relations"] if name == meaning["relation"] and j == named[0]]
        return picture["objects"][near[0]]["shape"] if len(near) == 1 else None
    return picture["objects"][named[0]][kind]


def _meaning(rng: np.random.Generator, picture: dict, kind: str) -> dict:
    """A question of a kind that a picture suggests; it may turn out that it cannot be asked."""
    things = picture["objects"]

    def mention(thing: dict, keys: tuple[str, ...], number: int) -> dict:
        chosen = [keys[int(k)] for k in rng.permutation(len(keys))[:number]]
        return {key: thing[key] for key in TABLES if key in chosen}

    order = rng.permutation(len(things)).tolist()
    thing, other = things[order[0]], things[order[1]]
    if kind == "exists":
        mentions = [mention(thing, ("shape", "colour", "texture"), 2)]
    elif kind == "count":
        mentions = [mention(thing, tuple(TABLES), 1)]
    elif kind == "relation":
        mentions = [mention(one, ("shape", "colour"), pick(rng, (1, 1, 2))) for one in (thing, other)]
    else:
        asked = "colour" if kind == "colour" else "shape"
        keys = tuple(key for key in TABLES if key != asked or kind == "neighbour")
        mentions = [mention(thing, keys, pick(rng, (1, 2)))]
    found = {"kind": kind, "mentions": mentions}
    return found | {"relation": pick(rng, DIRECTIONS)} if kind in ("relation", "neighbour") else found


def tempting(picture: dict, mention: dict) -> bool:
    """Whether a picture shows each attribute of a mention, and no object that has all."""
    things = picture["objects"]
    apart = all(any(thing[key] == value for thing in things) for key, value in mention.items())
    return apart and not any(matches(thing, mention) for thing in things)


def _counterpart(rng: np.random.Generator, pictures: list[dict], meaning: dict, answer: str) -> dict | None:
    """Another picture, with another answer; every other answer is equally welcome."""
    wanted = None
    if meaning["kind"] == "count":
        wanted = pick(rng, [str(n) for n in range(5) if str(n) != answer])
    elif meaning["kind"] not in ANSWER_TYPES:
        table = TABLES["colour" if meaning["kind"] == "colour" else "shape"]
        wanted = pick(rng, [value for value in table if value != answer])
    fallback = None
    for _ in range(min(TRIES, 4 * len(pictures))):
        picture = pick(rng, pictures)
        found = answer_of(picture, meaning)
        if found is None or found == answer:
            continue
        easy = (
            meaning["kind"] == "exists" and answer == "yes" and not tempting(picture, meaning["mentions"][0])
        )
        if not easy and wanted in (None, found):
            return picture
        fallback = fallback or picture
    return fallback


def phrase(rng: np.random.Generator, mention: dict, first: str) -> str:
    """A noun phrase with another first word: "the red star"; "" and a count of two: "red stars"."""
    return f"{first} {noun_phrase(rng, mention)[0].split(' ', 1)[1]}".strip()


def _text(rng: np.random.Generator, meaning: dict) -> str:
    mentions, slots = meaning["mentions"], {}
    if meaning["kind"] == "exists":
        slots["a"] = noun_phrase(rng, mentions[0])[0]
    elif meaning["kind"] == "count":
        slots["many"] = phrase(rng, mentions[0] | {"count": 2}, "")
    else:
        slots["the"] = phrase(rng, mentions[0], "the")
        slots["that"] = phrase(rng, mentions[-1], "the")
    if "relation" in meaning:
        slots["r"] = pick(rng, RELATIONS[meaning["relation"]])
    text = pick(rng, TEXTS[meaning["kind"]]).format(**slots)
    return text[0].upper() + text[1:]


def people(rng: np.random.Generator, answer: str, kind: str) -> list[str]:
    """Ten people's answers; the right one is the most frequent.

    Who leaves it says it in other words (3 of 5), which normalisation or nobody joins with it, or is wrong.
    """
    table = TABLES.get("colour" if kind == "colour" else "shape", {})
    if kind == "count":
        words = ("none", "one", "two", "three", "four", "five")
        other = (words[int(answer)], words[int(answer)].capitalize(), f"{answer}.")
        wrong = [str(n) for n in (int(answer) - 1, int(answer) + 1) if n >= 0]
    elif kind in ANSWER_TYPES:
        other, wrong = (
            (answer.capitalize(), f"{answer}.", f"{answer}, it is"),
            ["no" if answer == "yes" else "yes"],
        )
    else:
        other = (*table[answer][1:], answer.capitalize(), f"the {answer}")
        wrong = [value for value in table if value != answer]
    doubt = pick(rng, DOUBT)
    while True:
        said = [answer] * PEOPLE
        for person in range(PEOPLE):
            if rng.random() < doubt:
                said[person] = pick(rng, other if rng.random() < 0.6 else wrong)
        (first, most), *others = Counter(said).most_common()
        if first == answer and all(count < most for _, count in others):
            return said


def questions_of(rng: np.random.Generator, pictures: list[dict], count: int) -> list[dict]:
    """`count` questions (an even number: each text comes twice), not yet with ids.

    Returns:
        picture, question, answer, answers, kind.
    """
    kinds, edges, made = list(SHARES), np.cumsum(list(SHARES.values())), []
    while len(made) < count:
        kind = kinds[min(int(np.searchsorted(edges, rng.random(), side="right")), len(kinds) - 1)]
        for _ in range(min(TRIES, 4 * len(pictures))):
            picture = pick(rng, pictures)
            meaning = _meaning(rng, picture, kind)
            answer = answer_of(picture, meaning)
            other = None if answer is None else _counterpart(rng, pictures, meaning, answer)
            if other is not None:
                break
        else:  # too few pictures for this kind
            continue
        text = _text(rng, meaning)
        for one, right in ((picture, answer), (other, answer_of(other, meaning))):
            made.append({"picture": one, "question": text, "answer": right, "kind": kind})
            made[-1]["answers"] = people(rng, right, kind)
    return made


def vqa_files(made: list[dict], numbers: list[int], split: str) -> tuple[dict, dict]:
    """VQAv2's questions and annotations; `numbers` are COCO's image ids of the questions' pictures.

    A question's id is its image's id times a thousand, and a count.
    """
    questions, annotations, asked = [], [], Counter()
    for one, image_id in zip(made, numbers, strict=True):
        number = image_id * 1000 + asked[image_id]
        asked[image_id] += 1
        questions.append({"image_id": image_id, "question": one["question"], "question_id": number})
        answers = [
            {"answer": said, "answer_confidence": "yes", "answer_id": k}
            for k, said in enumerate(one["answers"], 1)
        ]
        kind = next(kind for kind in QUESTION_TYPES if one["question"].lower().startswith(kind))
        annotations.append(
            {
                "question_type": kind,
                "multiple_choice_answer": one["answer"],
                "answers": answers,
                "image_id": image_id,
                "answer_type": ANSWER_TYPES.get(one["kind"], "other"),
                "question_id": number,
            }
        )
    head = {
        "info": {"description": "finematch scenes"},
        "license": {},
        "data_type": "scenes",
        "data_subtype": split,
    }
    return head | {"task_type": "Open-Ended", "questions": questions}, head | {"annotations": annotations}
