"""Sentences about two images of `scenes`, in NLVR2's format: JSON lines, and a left and a right image for each pair.

Every sentence comes with four pairs of images, true of two and false of two, so that the words alone say nothing. Of
`one` and `same` a single image says nothing either; of the other kinds it decides half of the pairs, which is as
low as it can be where "both" and "more" have their meaning.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import islice

import numpy as np

from finematch.scenes.language import TABLES, matches, noun_phrase, pick
from finematch.scenes.questions import phrase, tempting

TRIES = 600  # pictures that are looked at for one side of a pair; at most four times as many as there are
ATTEMPTS = 20  # sentences of a kind, before another is taken
PAIRS = 4  # of a sentence
# what the left and the right image are, twice where the sentence is true and twice where it is false
STATES = {
    "one": (((1, 0), (0, 1)), ((1, 1), (0, 0))),
    "both": (((1, 1), (1, 1)), ((1, 0), (0, 1))),
    "some": (((1, 0), (0, 1)), ((0, 0), (0, 0))),
    "each": (((1, 1), (1, 1)), ((1, 0), (0, 1))),
    "same": (((0, 0), (1, 1)), ((0, 1), (1, 0))),  # two different numbers
    "more": (((2, 1), (1, 0)), ((1, 2), (0, 1))),  # three numbers in order
}
SHARES = {"one": 0.22, "both": 0.16, "some": 0.12, "each": 0.16, "same": 0.2, "more": 0.14}
TEXTS = {
    "one": ("exactly one picture shows {0}", "only one of the pictures shows {0}"),
    "both": ("both pictures show {0}", "there is {0} in each picture"),
    "some": ("at least one picture shows {0}", "there is {0} in at least one of the pictures"),
    "each": ("the left picture shows {0} and the right picture shows {1}",),
    "same": ("both pictures show the same number of {0}", "the pictures show as many {0} as each other"),
    "more": (
        "there are more {0} in the left picture than in the right",
        "the left picture shows more {0} than the right picture",
    ),
}


def count(picture: dict, mention: dict) -> int:
    """How many objects of a picture a mention describes."""
    return sum(matches(thing, mention) for thing in picture["objects"])


def truth(kind: str, mentions: list[dict], left: dict, right: dict) -> bool:
    """Whether a sentence is true of two pictures."""
    a, b = count(left, mentions[0]), count(right, mentions[-1])
    return {
        "one": bool(a) != bool(b),
        "both": bool(a and b),
        "some": bool(a or b),
        "each": bool(a and b),
        "same": a == b,
        "more": a > b,
    }[kind]


def _find(
    rng: np.random.Generator, pictures: list[dict], good: Callable[[dict], bool], best=lambda picture: True
) -> dict | None:
    """A picture that is `good`, among the first tries one that is `best`, too."""
    found, tries = None, min(TRIES, 4 * len(pictures))
    for number in range(tries):
        picture = pick(rng, pictures)
        if good(picture):
            if best(picture) or number > tries // 4:
                return picture
            found = found or picture
    return found


def _sentence(rng: np.random.Generator, pictures: list[dict], kind: str) -> dict | None:
    """A sentence with its four pairs, or None where the pictures do not offer them."""
    keys = tuple(TABLES) if kind in ("same", "more") else ("shape", "colour", "texture")
    mentions = []
    for _ in range(2 if kind == "each" else 1):
        thing = pick(rng, pick(rng, pictures)["objects"])
        chosen = [keys[int(k)] for k in rng.permutation(len(keys))[: 1 if len(keys) == 4 else 2]]
        mentions.append({key: thing[key] for key in TABLES if key in chosen})
    levels = sorted(rng.permutation(4)[: 2 if kind == "same" else 3].tolist())

    def image(side: int, state: int) -> dict | None:
        mention = mentions[side if kind == "each" else 0]
        if kind in ("same", "more"):
            return _find(rng, pictures, lambda one: count(one, mention) == levels[state])
        if state:
            return _find(rng, pictures, lambda one: count(one, mention) > 0)
        return _find(rng, pictures, lambda one: not count(one, mention), lambda one: tempting(one, mention))

    pairs = []
    for label, states in zip((True, False), STATES[kind], strict=True):
        for left, right in states:
            for _ in range(20):
                two = image(0, left), image(1, right)
                if None in two:
                    return None
                if two[0] is not two[1]:
                    break
            else:
                return None
            pairs.append({"left": two[0], "right": two[1], "states": [left, right], "label": label})
    if kind in ("same", "more"):
        said = [phrase(rng, mentions[0] | {"count": 2}, "")]
    else:
        said = [noun_phrase(rng, mention)[0] for mention in mentions]
    text = pick(rng, TEXTS[kind]).format(*said)
    return {
        "kind": kind,
        "mentions": mentions,
        "sentence": f"{text[0].upper()}{text[1:]}.",
        "pairs": [pairs[int(k)] for k in rng.permutation(PAIRS)],
    }


def sentences_of(rng: np.random.Generator, pictures: list[dict], number: int) -> list[dict]:
    """`number` sentences: kind, mentions, sentence, and four pairs of left, right, states, label."""
    kinds, edges, made = list(SHARES), np.cumsum(list(SHARES.values())), []
    while len(made) < number:
        kind = kinds[min(int(np.searchsorted(edges, rng.random(), side="right")), len(kinds) - 1)]
        tries = (_sentence(rng, pictures, kind) for _ in range(ATTEMPTS))
        made += islice((one for one in tries if one is not None), 1)  # none, where the pictures are too few
    return made


def nlvr2_lines(made: list[dict], name: str) -> list[dict]:
    """NLVR2's lines, in the order of the sentences; `synset` says which kind a sentence is, `left_url` and `right_url`
    which image of `scenes`."""
    return [
        {
            "identifier": f"{name}-{number}-{k}-0",
            "sentence": one["sentence"],
            "label": str(pair["label"]),
            "synset": one["kind"],
            "left_url": pair["left"]["filename"],
            "right_url": pair["right"]["filename"],
            "writer": "0",
        }
        for number, one in enumerate(made)
        for k, pair in enumerate(one["pairs"])
    ]
