"""How hard `scenes` is: chance, a bag-of-words oracle and a full oracle, from the files on disk.

* `chance`: every score equal.
* `bag of words`: a caption's words, paraphrases resolved, counted against the labels of the picture (shapes,
  colours, sizes, textures, background), each weighted by its inverse picture frequency. It knows what is
  there, not what belongs to what: it cannot bind a colour to a shape, nor use relations and positions.
* `full`: whether the caption, fully understood, is true of the picture. Captions are partial, so several
  pictures satisfy one: this is the ceiling of any method.

Every score is read twice: with all ties counted against the model, and as the expectation over random orders
of tied items ("expected"). The full oracle's expected t2i R@1 is mean(1 / pictures the caption is true of).
Axis legend: b pictures, c captions.
"""

from __future__ import annotations

from collections import Counter
from math import comb, log
from pathlib import Path

import numpy as np

from finematch.data.checks import read_json, reading
from finematch.data.record import DataError
from finematch.scenes.generator import attributes, choose
from finematch.scenes.language import TABLES, labels, solutions

RANKS = (1, 5, 10)


def recalls(scores: np.ndarray, image_of: np.ndarray) -> dict[str, float]:
    """Recall in percent of a score matrix, both ways, with ties against the model and in expectation.

    Args:
        scores: (b, c), larger is better.
        image_of: (c,), the true picture of each caption. i2t hits when any own caption is in the top K.

    Returns:
        "t2i R@1", "t2i R@1 expected", "i2t R@1", "i2t R@1 expected", and the same for 5 and 10.
    """
    captions = np.arange(scores.shape[1])
    true = scores[image_of, captions]
    greater = (scores > true).sum(0)
    equal = (scores == true).sum(0) - 1
    found = {}
    for k in RANKS:
        found[f"t2i R@{k}"] = 100 * np.mean(greater + equal < k)
        found[f"t2i R@{k} expected"] = 100 * np.mean(np.clip((k - greater) / (equal + 1), 0, 1))
    best = []  # per picture: captions above its best own one, foreign captions tied with it, own ones tied
    for image, row in enumerate(scores):
        own = image_of == image
        top = row[own].max()
        best.append(((row > top).sum(), ((row == top) & ~own).sum(), ((row == top) & own).sum()))
    for k in RANKS:
        found[f"i2t R@{k}"] = 100 * np.mean([above + foreign < k for above, foreign, _ in best])
        chances = []
        for above, foreign, own in ((int(a), int(f), int(o)) for a, f, o in best):
            places = min(max(k - above, 0), foreign + own)
            chances.append(1 - comb(foreign, places) / comb(foreign + own, places))
        found[f"i2t R@{k} expected"] = 100 * np.mean(chances)
    return found


def bag_of_words(pictures: list[dict], texts: list[str], penalty: float = 10.0) -> np.ndarray:
    """Scores (b, c): matched weight minus `penalty` times unmatched weight of a caption's labels.

    The n-th occurrence of a label is a feature of its own ("red" twice in the caption asks for two red
    objects), weighted by log(b / pictures that have it). Within a caption the order of pictures doesn't
    depend on `penalty`; it makes captions comparable for one picture.
    """
    meaning = labels()
    have = []
    for picture in pictures:
        counts = Counter(thing[key] for thing in picture["objects"] for key in TABLES)
        counts[picture["background"]] += 1
        have.append({(label, n) for label, count in counts.items() for n in range(count)})
    frequency = Counter(feature for features in have for feature in features)
    weight = {feature: log(len(pictures) / count) for feature, count in frequency.items()}
    unseen = log(len(pictures) + 1)
    columns: dict[tuple[str, int], int] = {}
    wanted = []
    for text in texts:
        counts = Counter()
        for label, number in (meaning[word] for word in text.lower().split() if word in meaning):
            counts[label] += number
        wanted.append([(label, n) for label, count in counts.items() for n in range(count)])
        for feature in wanted[-1]:
            columns.setdefault(feature, len(columns))
    present = np.array([[feature in features for feature in columns] for features in have], float)
    weights = np.array([weight.get(feature, unseen) for feature in columns])
    asked = np.zeros((len(columns), len(texts)))
    for c, features in enumerate(wanted):
        for feature in features:
            asked[columns[feature], c] = weights[columns[feature]]
    # rounded, so that equal bags are exactly tied whatever the order of summation
    return np.round(present @ asked - penalty * (1 - present) @ asked, 6)


def full_oracle(pictures: list[dict], meanings: list[dict]) -> np.ndarray:
    """Scores (b, c): -1 where the caption is untrue of the picture (`language.solutions`), else
    log(b / pictures it is true of), so that one picture's true captions are ranked by how much they say."""
    true = np.array([[bool(solutions(picture, meaning)) for meaning in meanings] for picture in pictures])
    return np.where(true, np.log(len(pictures) / np.maximum(true.sum(0), 1)), -1.0)


def difficulty(root: str | Path, split: str = "test", *, which: str = "") -> dict[str, dict[str, float]]:
    """Recalls of chance, bag of words and full oracle on a split of a scenes set.

    Captions come from dataset_scenes.json, truths and meanings from attributes.json. `which` takes a part of the split,
    see `generator.choose`.

    Raises:
        DataError: a file is missing or the two disagree.
    """
    pictures = attributes(root, split)
    path = Path(root) / "dataset_scenes.json"
    data = read_json(path)
    with reading(path, "the list `images`"):
        images = [image for image in data["images"] if image["split"] == split]
    if which:
        pictures = choose(pictures, which)
        names = {picture["filename"] for picture in pictures}
        images = [image for image in images if image["filename"] in names]
    texts = [sentence["raw"] for image in images for sentence in image["sentences"]]
    meanings = [caption for picture in pictures for caption in picture["captions"]]
    if texts != [caption["text"] for caption in meanings]:
        raise DataError(
            path, f"split {split}", "captions differ from attributes.json", "Generate the set again"
        )
    image_of = np.repeat(np.arange(len(pictures)), [len(picture["captions"]) for picture in pictures])
    return {
        "chance": recalls(np.zeros((len(pictures), len(texts))), image_of),
        "bag of words": recalls(bag_of_words(pictures, texts), image_of),
        "full": recalls(full_oracle(pictures, meanings), image_of),
    }


def table(results: dict[str, dict[str, float]]) -> str:
    """The difficulty as a Markdown table: ties against the model, and (expected over random ties)."""
    columns = [f"{way} R@{k}" for way in ("t2i", "i2t") for k in RANKS]
    lines = ["| scores | " + " | ".join(columns) + " |", "|---|" + "---|" * len(columns)]
    for name, found in results.items():
        cells = [f"{found[column]:.1f} ({found[column + ' expected']:.1f})" for column in columns]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)
