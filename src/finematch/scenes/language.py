"""The language of `scenes`: words, captions, and what a caption claims.

A caption is one template filled with noun phrases. Beside its text it keeps its *meaning*, a dictionary that
can be checked against any picture:

    mentions    list of {"objects": indices in its own picture, and the claimed attributes: any of "shape",
                "colour", "size", "texture", "position" (list), "count"}
    relations   list of [subject mention, name, object mention]
    background  the scene, or absent

`solutions(picture, meaning)` lists every way to read the mentions in a picture; a caption is true of a
picture if there is at least one, and the generator keeps only captions with exactly one in their own picture,
so that every noun phrase has one referent. A mention with "count" means *all* objects of that description.
"""

from __future__ import annotations

import re
from itertools import product

import numpy as np

# The first word of each entry is the label; the others are paraphrases.
SHAPES = {
    "circle": ("circle", "ball", "disc"),
    "square": ("square", "box", "block"),
    "triangle": ("triangle", "wedge"),
    "star": ("star",),
    "heart": ("heart",),
    "cross": ("cross", "plus sign"),
    "ring": ("ring", "hoop", "donut"),
    "diamond": ("diamond", "rhombus"),
}
COLOURS = {
    "red": ("red", "crimson", "scarlet"),
    "orange": ("orange", "tangerine"),
    "yellow": ("yellow", "golden"),
    "green": ("green", "emerald"),
    "blue": ("blue", "cobalt"),
    "purple": ("purple", "violet"),
    "white": ("white", "ivory"),
    "black": ("black", "ebony"),
}
SIZES = {"small": ("small", "tiny", "little"), "large": ("large", "big", "huge")}
TEXTURES = {
    "plain": ("plain", "solid"),
    "striped": ("striped", "stripy"),
    "dotted": ("dotted", "spotted"),
}
AFTER_NOUN = {"striped": ("with stripes",), "dotted": ("with dots", "with spots")}
# Of a background: (words before the noun phrase, noun phrase).
BACKGROUNDS = {
    "sky": (("in", "the sky"), ("among", "the clouds"), ("in", "a cloudy sky")),
    "meadow": (("on", "the grass"), ("in", "a meadow"), ("on", "a grassy field")),
    "desert": (("on", "the sand"), ("in", "the desert"), ("in", "a sandy desert")),
    "night": (("at", "night"), ("in", "the dark"), ("on", "a clear night")),
    "sea": (("in", "the sea"), ("on", "the water"), ("above", "the waves")),
    "sunset": (("at", "sunset"), ("at", "dusk"), ("in", "the evening light")),
}
RELATIONS = {
    "left of": ("left of", "to the left of", "on the left of"),
    "right of": ("right of", "to the right of", "on the right of"),
    "above": ("above", "over", "higher up than"),
    "below": ("below", "under", "beneath"),
    "next to": ("next to", "beside", "close to"),
    "in front of": ("in front of", "partly covering"),
    "behind": ("behind", "partly hidden by"),
}
POSITIONS = {
    ("left",): ("on the left", "on the left side"),
    ("right",): ("on the right", "on the right side"),
    ("top",): ("at the top", "near the top"),
    ("bottom",): ("at the bottom", "near the bottom"),
    ("top", "left"): ("in the top left corner", "at the upper left"),
    ("top", "right"): ("in the top right corner", "at the upper right"),
    ("bottom", "left"): ("in the bottom left corner", "at the lower left"),
    ("bottom", "right"): ("in the bottom right corner", "at the lower right"),
    ("centre",): ("in the middle", "in the centre"),
}
NUMBERS = {2: "two", 3: "three", 4: "four", 5: "five"}
GENERIC = ("shape", "object", "thing")
VERBS = ("is", "is", "sits", "rests", "lies", "appears")

# {0} {1} {2}: noun phrases; {r} {s}: relations; {R}: a relation that opens a sentence; {p0}: position;
# {v}: verb; {b}: background; {the0}: a second mention; {a0}: an attribute said of it.
TEMPLATES = {
    "relation": (
        "{0} {v} {r} {1}",
        "{0} {r} {1}",
        "{0} {v} {r} {1} {b}",
        "there is {0} {r} {1}",
        "{b} {0} {v} {r} {1}",
        "{R} {1} is {0}",
        "{R} {1} there is {0}",
        "the picture shows {0} {r} {1} {b}",
        "{0} {p0} is {r} {1}",
        "{0} {r} {1} and {the0} is {a0}",
        "{0} {v} {r} {1} and {the1} is {a1}",
    ),
    "chain": (
        "{0} {v} {r} {1} which is {s} {2}",
        "{0} {r} {1} that {v} {s} {2}",
        "there is {0} {r} {1} which is {s} {2}",
    ),
    "fork": (
        "{0} and {1} are {r} {2}",
        "both {0} and {1} are {r} {2}",
        "{R} {2} there are {0} and {1}",
        "{0} is {r} {2} and so is {1}",
    ),
    "place": (
        "{0} {v} {p0} {b}",
        "there is {0} {p0} of the picture {b}",
        "{b} we see {0} {p0}",
    ),
    "places": (
        "{0} {p0} and {1} {p1}",
        "{0} is {p0} while {1} is {p1}",
        "{b} there is {0} {p0} and {1} {p1}",
    ),
    "pair": (
        "{0} and {1} {b}",
        "{0} with {1}",
        "there is {0} as well as {1} {b}",
        "the picture shows {0} and {1}",
        "you can see {0} and {1} {p1}",
        "{0} and {1} and {the0} is {a0}",
    ),
    "triple": (
        "{0} with {1} and {2}",
        "{0} and {1} together with {2} {b}",
        "we see {0} and {1} as well as {2}",
        "{0} {p0} and {1} with {2}",
    ),
    "group": (
        "{0} and {1} {b}",
        "there are {0} as well as {1}",
        "{b} there are {0} and {1} {p1}",
        "{0} with {1}",
    ),
    "group relation": (
        "{0} are {r} {1}",
        "there are {0} {r} {1} {b}",
        "{R} {1} there are {0}",
    ),
    "total": (
        "{0} {b} and one of them is {1}",
        "{1} is one of {0} {b}",
        "there are {0} and {1} is {p1}",
    ),
}
WEIGHTS = {
    "relation": 26, "chain": 6, "fork": 5, "place": 5, "places": 8, "pair": 22, "triple": 16, "group": 5,
    "group relation": 4, "total": 5,
}  # fmt: skip
# How often a mention names an attribute.
DETAIL = {"shape": 0.9, "colour": 0.67, "size": 0.32, "texture": 0.36}
TABLES = {"shape": SHAPES, "colour": COLOURS, "size": SIZES, "texture": TEXTURES}
# Held out in zero-shot runs: shape and colour, each of them in one pair, so that either alone is seen as often as any.
UNSEEN = {
    "circle": "blue", "square": "yellow", "triangle": "red", "star": "green", "heart": "black", "cross": "orange",
    "ring": "purple", "diamond": "white",
}  # fmt: skip


def unseen(claim: dict) -> bool:
    """Whether an object, or what a caption claims of one, has a shape and a colour that are held out together."""
    return "shape" in claim and claim.get("colour") == UNSEEN[claim["shape"]]


class GrammarNouns:
    """The nouns of a sentence of this grammar, as `text.Nouns`: things, backgrounds, and what textures are made of."""

    key = "nouns of the grammar of scenes"

    def __init__(self):
        things = [word.split()[-1] for words in SHAPES.values() for word in words] + list(GENERIC)
        places = [phrase.split()[-1] for pairs in BACKGROUNDS.values() for _, phrase in pairs]
        textures = [phrase.split()[-1] for phrases in AFTER_NOUN.values() for phrase in phrases]
        self.nouns = {*things, *map(plural, things), *places, *textures}

    def __call__(self, text: str) -> list[str]:
        return [word for word in re.findall(r"\w+", text.lower()) if word in self.nouns]


def plural(noun: str) -> str:
    """The plural of one of our nouns."""
    return noun + ("es" if noun.endswith(("s", "x")) else "s")


def vocabulary() -> list[str]:
    """Every word that a caption can hold, lower case and sorted."""
    texts = ["a", "an", "the", *GENERIC, *map(plural, GENERIC), *VERBS, *NUMBERS.values()]
    for table in (*TABLES.values(), AFTER_NOUN, RELATIONS, POSITIONS):
        texts += [text for entry in table.values() for text in entry]
    texts += [plural(noun) for entry in SHAPES.values() for noun in entry]
    texts += [text for entry in BACKGROUNDS.values() for pair in entry for text in pair]
    for templates in TEMPLATES.values():
        texts += [word for text in templates for word in text.split() if not word.startswith("{")]
    return sorted({word for text in texts for word in text.split()})


def labels() -> dict[str, tuple[str, int]]:
    """Word -> (label, how many of it the word promises): "crimson" -> ("red", 1), "balls" -> ("circle", 2).

    Labels are those of shapes, colours, sizes, textures and backgrounds; one word of "plus sign" and of
    "a cloudy sky" stands for the whole.
    """
    found = {}
    for table in (*TABLES.values(), AFTER_NOUN):
        for label, entry in table.items():
            for text in entry:
                found[text.removeprefix("with ").split()[0]] = (label, 1)
    for label, entry in SHAPES.items():
        for noun in entry:
            if " " not in noun:
                found[plural(noun)] = (label, 2)
    for label, entry in BACKGROUNDS.items():
        for _, phrase in entry:
            found[phrase.split()[-1]] = (label, 1)
    return found


def matches(thing: dict, mention: dict) -> bool:
    """Whether an object of a picture has every attribute that a mention claims."""
    return all(thing[key] == mention[key] for key in TABLES if key in mention) and set(
        mention.get("position", ())
    ) <= set(thing["position"])


def solutions(picture: dict, meaning: dict) -> list[tuple[tuple[int, ...], ...]]:
    """Every reading of a caption's mentions in a picture: per mention the objects it names; [] if untrue.

    Two mentions never share an object, but for a mention of everything ("four shapes ... one of them is").
    A relation of a counted mention holds for each of its objects.
    """
    if meaning.get("background", picture["background"]) != picture["background"]:
        return []
    options, whole = [], []
    for mention in meaning["mentions"]:
        found = [i for i, thing in enumerate(picture["objects"]) if matches(thing, mention)]
        counted = "count" in mention
        if not found or (counted and len(found) != mention["count"]):
            return []
        options.append([tuple(found)] if counted else [(i,) for i in found])
        whole.append(counted and not TABLES.keys() & mention.keys())
    true = {tuple(relation) for relation in picture["relations"]}
    readings = []
    for reading in product(*options):
        named = [
            i for objects, everything in zip(reading, whole, strict=True) if not everything for i in objects
        ]
        if len(set(named)) == len(named) and all(
            (i, name, j) in true
            for subject, name, other in meaning["relations"]
            for i in reading[subject]
            for j in reading[other]
        ):
            readings.append(reading)
    return readings


def pick(rng: np.random.Generator, options):
    """One of a sequence, uniformly (much faster than `rng.choice`)."""
    return options[int(rng.random() * len(options))]


def word(rng: np.random.Generator, options: tuple[str, ...]) -> str:
    """The label more often than a paraphrase of it."""
    return options[0] if rng.random() < 0.45 else pick(rng, options)


def noun_phrase(rng: np.random.Generator, mention: dict) -> tuple[str, str]:
    """(noun phrase, its noun) for a mention: "an orange box with dots", "box"."""
    noun = word(rng, SHAPES[mention["shape"]]) if "shape" in mention else pick(rng, GENERIC)
    count = mention.get("count", 1)
    if count > 1:
        noun = plural(noun)
    before = [word(rng, SIZES[mention["size"]])] if "size" in mention else []
    middle = [word(rng, COLOURS[mention["colour"]])] if "colour" in mention else []
    after = ""
    if texture := mention.get("texture"):
        if texture in AFTER_NOUN and rng.random() < 0.25:
            after = " " + pick(rng, AFTER_NOUN[texture])
        else:
            middle.insert(int(rng.random() * (len(middle) + 1)), word(rng, TEXTURES[texture]))
    phrase = " ".join([*before, *middle, noun]) + after
    article = NUMBERS[count] if count > 1 else "an" if phrase[0] in "aeiou" else "a"
    return f"{article} {phrase}", noun


def _describe(rng: np.random.Generator, thing: dict) -> dict:
    """A random part of an object's attributes, at least two unless it would be a bare noun."""
    while True:
        chosen = {key: thing[key] for key, p in DETAIL.items() if rng.random() < p}
        if len(chosen) >= 2 or (chosen.keys() == {"shape"} and rng.random() < 0.3):
            return chosen


def _choose(rng: np.random.Generator, picture: dict, kind: str):
    """Objects, descriptions and relations for one kind of template, or None if the picture has none."""
    things, relations = picture["objects"], picture["relations"]
    order = list(rng.permutation(len(things)).tolist())
    named = {"relation": 2, "chain": 3, "fork": 3, "place": 1, "places": 2, "pair": 2, "triple": 3}.get(
        kind, 2
    )
    if len(things) < named:
        return None
    if kind in ("place", "places", "pair", "triple"):
        return [{"objects": [i]} | _describe(rng, things[i]) for i in order[:named]], []
    if kind in ("relation", "chain", "fork") and not relations:
        return None
    if kind == "relation":
        i, name, j = pick(rng, relations)
        return [{"objects": [k]} | _describe(rng, things[k]) for k in (i, j)], [[0, name, 1]]
    if kind in ("chain", "fork"):
        i, first, j = pick(rng, relations)
        if kind == "chain":
            seconds = [(b, name) for a, name, b in relations if a == j and b != i]
        else:
            seconds = [(a, name) for a, name, b in relations if b == j and a != i and name == first]
        if not seconds:
            return None
        k, second = pick(rng, seconds)
        objects = (i, j, k) if kind == "chain" else (i, k, j)
        links = [[0, first, 1], [1, second, 2]] if kind == "chain" else [[0, first, 2], [1, first, 2]]
        return [{"objects": [m]} | _describe(rng, things[m]) for m in objects], links
    if kind == "total":
        whole = {"objects": list(range(len(things))), "count": len(things)}
        return [whole, {"objects": [order[0]]} | _describe(rng, things[order[0]])], []
    keys = list(TABLES)
    shared = {
        key: things[order[0]][key]
        for key in (keys[int(m)] for m in rng.permutation(4)[: pick(rng, (1, 1, 2))])
    }
    members = [i for i, thing in enumerate(things) if matches(thing, shared)]
    others = [i for i in order if i not in members]
    if len(members) < 2 or not others:
        return None
    group = {"objects": members, "count": len(members)} | shared
    if kind == "group":
        return [group, {"objects": [others[0]]} | _describe(rng, things[others[0]])], []
    for j in others:
        names = [name for name in RELATIONS if all([i, name, j] in relations for i in members)]
        if names:
            return [group, {"objects": [j]} | _describe(rng, things[j])], [[0, pick(rng, names), 1]]
    return None


def _realise(
    rng: np.random.Generator, picture: dict, kind: str, mentions: list[dict], relations: list
) -> dict | None:
    """Fill one template; None where the template asks for what the objects don't offer."""
    meaning = {"mentions": mentions, "relations": relations}
    nouns, said = {}, {}
    for i, mention in enumerate(mentions):
        said[i], nouns[i] = noun_phrase(rng, mention)
    pieces: list[tuple[str, int | None]] = []  # text, and the mention it names (-1: the background)
    for slot in pick(rng, TEMPLATES[kind]).split():
        if not slot.startswith("{"):
            pieces.append((slot, None))
            continue
        slot = slot[1:-1]
        if slot.isdigit():
            pieces.append((said[int(slot)], int(slot)))
        elif slot in "rRs":
            pieces.append((pick(rng, RELATIONS[relations[slot == "s"][1]]), None))
        elif slot == "v":
            pieces.append((pick(rng, VERBS), None))
        elif slot == "b":
            if pieces and rng.random() < 0.35:  # a closing background is often left out
                continue
            meaning["background"] = picture["background"]
            before, phrase = pick(rng, BACKGROUNDS[picture["background"]])
            pieces += [(before, None), (phrase, -1)]
        else:
            i = int(slot[-1])
            thing = picture["objects"][mentions[i]["objects"][0]]
            if slot.startswith("the"):
                if list(nouns.values()).count(nouns[i]) > 1:
                    return None
                pieces.append((f"the {nouns[i]}", i))
            elif slot[0] == "p":
                places = [p for p in POSITIONS if set(p) <= set(thing["position"])]
                if not places:
                    return None
                place = places[-1] if rng.random() < 0.6 else pick(rng, places)
                mentions[i]["position"] = list(place)
                pieces.append((pick(rng, POSITIONS[place]), None))
            else:
                unsaid = [key for key in ("colour", "texture", "size") if key not in mentions[i]]
                if not unsaid:
                    return None
                key = pick(rng, unsaid)
                mentions[i][key] = thing[key]
                pieces.append((word(rng, TABLES[key][thing[key]]), None))
    text, phrases = "", []
    for piece, mention in pieces:
        start = len(text) + bool(text)
        text = f"{text} {piece}".lstrip()
        if mention is not None:
            phrases.append([start, len(text), mention])
    return {"text": text[0].upper() + text[1:], "phrases": phrases} | meaning


def captions(rng: np.random.Generator, picture: dict, number: int = 5) -> list[dict]:
    """`number` different captions of a picture, each true, partial, and with one referent a phrase.

    Returns:
        Meanings (module docstring) with "text" and "phrases" = [start, end, mention], -1 for the background.
    """
    kinds, edges = list(WEIGHTS), np.cumsum(list(WEIGHTS.values()))
    made: list[dict] = []
    while len(made) < number:
        kind = kinds[int(np.searchsorted(edges, rng.random() * edges[-1], side="right"))]
        chosen = _choose(rng, picture, kind)
        caption = chosen and _realise(rng, picture, kind, *chosen)
        if caption is None or caption["text"] in [other["text"] for other in made]:
            continue
        claims = [{key: value for key, value in m.items() if key != "objects"} for m in caption["mentions"]]
        repeated = any(claim in claims[:i] for i, claim in enumerate(claims))
        if not repeated and len(solutions(picture, caption)) == 1:
            made.append(caption)
    return made
