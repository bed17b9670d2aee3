"""Clips: the shapes of `scenes` in motion, eight frames each, and sentences that say how one of them moves.

Four clips are one scene: same objects, same background. Among them are always two that show the same frames in opposite
order ("rolls left" and "rolls right"), so that neither one frame nor all frames without their order tell the
four apart.
"""

from __future__ import annotations

import math
from functools import partial

import numpy as np
from PIL import Image

from finematch.scenes.generator import BACKDROPS, SPLITS, draw_picture
from finematch.scenes.language import BACKGROUNDS, TABLES, matches, noun_phrase, pick

FRAMES = 8
GROUP = 4  # clips of a scene
TWINS = (("left", "right"), ("up", "down"), ("grow", "shrink"))  # the same frames, in opposite order
VERBS = {
    "left": ("rolls left", "rolls to the left"),
    "right": ("rolls right", "rolls to the right"),
    "up": ("rises", "moves up"),
    "down": ("falls", "moves down"),
    "grow": ("grows", "gets bigger"),
    "shrink": ("shrinks", "gets smaller"),
    "swap": ("swaps places with", "trades places with"),
}
TEXTS = ("{0} {v}", "{0} {v} {b}", "{b} {0} {v}", "there is {0} that {v}")
WAY, TURN, GROWTH = 0.44, 70.0, 2.2  # of the side; degrees; from the first to the last frame
FIRST = (
    1_000_000  # indices of scenes; those of the images are smaller, so that no background is one of theirs
)


def moved(objects: list[dict], moves: dict[str, str], frame: int) -> list[dict]:
    """The objects as a frame shows them. `moves` is by the object's number, as text (as json has it)."""
    t = frame / (FRAMES - 1) - 0.5  # from -0.5 to 0.5
    shown = [dict(thing) for thing in objects]
    for number, move in moves.items():
        thing = shown[int(number)]
        sign = -1 if move in ("left", "up", "shrink") else 1
        if move in ("left", "right"):
            thing["x"] += sign * WAY * t
            thing["angle"] -= sign * TURN * t
        elif move in ("up", "down"):
            thing["y"] += sign * WAY * t
        elif move in ("grow", "shrink"):
            thing["radius"] *= GROWTH ** (sign * t)
        else:  # both on a bow, so that they pass each other
            other = objects[1 - int(number)]
            dx, dy = other["x"] - thing["x"], other["y"] - thing["y"]
            bow = 0.6 * math.sin(math.pi * (t + 0.5))
            thing["x"] += (t + 0.5) * dx - bow * dy / 2
            thing["y"] += (t + 0.5) * dy + bow * dx / 2
    return shown


def _inside(objects: list[dict], moves: dict[str, str]) -> bool:
    return all(
        1.15 * thing["radius"] < min(thing["x"], thing["y"], 1 - thing["x"], 1 - thing["y"])
        for frame in range(FRAMES)
        for thing in moved(objects, moves, frame)
    )


def _objects(rng: np.random.Generator) -> list[dict]:
    """Two or three different objects, the second in front of the first; a third lies behind."""
    things: list[dict] = []
    for _ in range(pick(rng, (2, 3))):
        thing = {key: pick(rng, tuple(TABLES[key])) for key in ("shape", "colour", "texture")}
        thing |= {"size": "small", "position": []}  # neither is ever named; the size is that of the pattern
        thing |= {"radius": round(rng.uniform(0.115, 0.145), 4), "angle": round(rng.uniform(-12, 12), 2)}
        thing |= {axis: round(rng.uniform(0.2, 0.8), 4) for axis in "xy"}
        things.append(thing)
    return things


def _apart(things: list[dict]) -> bool:
    return all(
        math.hypot(a["x"] - b["x"], a["y"] - b["y"]) > 1.3 * (a["radius"] + b["radius"])
        and any(a[key] != b[key] for key in ("shape", "colour", "texture"))
        for i, a in enumerate(things)
        for b in things[:i]
    )


def _motions(rng: np.random.Generator) -> list[dict[str, str]]:
    """Of four clips: a pair of twins of the front object, then another pair, or a swap and a move of the other."""
    order = rng.permutation(len(TWINS)).tolist()
    found = [{"1": move} for move in TWINS[order[0]]]
    if rng.random() < 0.5:
        return found + [{"1": move} for move in TWINS[order[1]]]
    return [*found, {"0": "swap", "1": "swap"}, {"0": pick(rng, TWINS[order[1]])}]


def group_of(seed: int, split: str, group: int) -> list[dict]:
    """The four clips of a scene.

    Returns:
        video_id, split, group, background, objects, moves, and what a caption says: text, mentions (see `language`),
        motion and, where the text names it, said_background.
    """
    rng = np.random.default_rng([seed, SPLITS.index(split), FIRST + group, 0])
    while True:
        background, things, motions = pick(rng, tuple(BACKDROPS)), _objects(rng), _motions(rng)
        if _apart(things) and all(_inside(things, moves) for moves in motions):
            break
    clips = []
    for number, moves in enumerate(motions):
        clip = {"video_id": f"scenes_{split}_{GROUP * group + number:05d}", "split": split, "group": group}
        clip |= {"background": background, "objects": things, "moves": moves}
        clips.append(clip | _caption(rng, clip))
    return clips


def _mention(rng: np.random.Generator, things: list[dict], number: int) -> dict:
    """Attributes that one object alone has."""
    while True:
        keys = ["shape", "colour", "texture"]
        chosen = [keys[int(k)] for k in rng.permutation(3)[: pick(rng, (2, 2, 3))]]
        mention = {key: things[number][key] for key in keys if key in chosen}
        if sum(matches(thing, mention) for thing in things) == 1:
            return mention


def _caption(rng: np.random.Generator, clip: dict) -> dict:
    numbers = [int(number) for number in clip["moves"]]
    motion = next(iter(clip["moves"].values()))
    mentions = [_mention(rng, clip["objects"], number) for number in numbers]
    said = [noun_phrase(rng, mention)[0] for mention in mentions]
    verb = pick(rng, VERBS[motion]) + (f" {said[1]}" if motion == "swap" else "")
    template = pick(rng, TEXTS)
    text = template.format(*said[:1], v=verb, b=" ".join(pick(rng, BACKGROUNDS[clip["background"]])))
    meaning = {"text": text[0].upper() + text[1:], "mentions": mentions, "motion": motion}
    return meaning | ({"said_background": clip["background"]} if "{b}" in template else {})


def frames_of(seed: int, clip: dict, size: int) -> list[Image.Image]:
    """A clip's frames, (size, size) RGB; the background is the same in all clips of a scene."""
    picture = {key: clip[key] for key in ("split", "background")} | {"index": FIRST + clip["group"]}
    show = partial(moved, clip["objects"], clip["moves"])
    return [draw_picture(seed, picture | {"objects": show(k)}, size) for k in range(FRAMES)]


def true_of(clip: dict, meaning: dict, *, frame: int | None = None, order: bool = True) -> bool:
    """Whether a caption is true of a clip.

    Args:
        frame: what one frame alone can tell: the objects are there, whatever they do.
        order: False for what all frames tell in no order: "rolls left" is then as true as "rolls right".
    """
    if meaning.get("said_background", clip["background"]) != clip["background"]:
        return False
    objects, mentions = clip["objects"], meaning["mentions"]
    if frame is not None:
        return all(any(matches(thing, mention) for thing in objects) for mention in mentions)
    same = {meaning["motion"]}
    if not order:
        same |= {move for twins in TWINS if meaning["motion"] in twins for move in twins}
    return all(
        any(matches(objects[int(number)], mention) and move in same for number, move in clip["moves"].items())
        for mention in mentions
    )
