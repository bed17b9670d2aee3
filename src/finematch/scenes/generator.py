"""The embedded set `scenes`: compositional pictures drawn by the project, written in the field's own formats.

A picture holds two to five objects (shape, colour, size, texture) before one of six backgrounds; objects may
hide one another in part. Five captions each mention a part of it (`language`). `generate` writes

    dataset_scenes.json                                   Karpathy JSON
    images/*.png
    annotations/{captions,instances}_{split}.json         COCO
    entities/{Annotations,Sentences}/, entities/{split}.txt   Flickr30k Entities
    attributes.json                                       the whole truth: see `picture_of`
    meta.json                                             seed and sizes
    version.json                                          version and a digest for each part; last

Every picture has its own random stream (seed, split, index): it doesn't change with the size of a split, the
number of workers or the order of drawing. Boxes are integer pixels (x1, y1, x2, y2) around the visible pixels
of an object. `python -m finematch.scenes.generator OUT` generates the set and prints how hard it is.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from itertools import pairwise
from multiprocessing import get_context
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

from finematch.data.checks import read_json, reading
from finematch.files import DataError, digest, file_digests
from finematch.scenes.language import SHAPES, TABLES, captions, pick, unseen, vocabulary

VERSION = 2  # raise it when anything that is drawn or written changes, or a part comes
FORMAT = 1  # as meta.json and COCO's `info` have had it; version.json says which generator drew a set
PARTS = {  # what stands in which files; a part that is added leaves the digests of the others
    "images": ("images/*.png",),
    "captions": ("dataset_scenes.json", "annotations/captions_*.json"),
    "boxes": ("annotations/instances_*.json",),
    "phrases": ("entities/*.txt", "entities/Sentences/*.txt", "entities/Annotations/*.xml"),
}
DEFAULTS = {"seed": 0, "size": 64, "train": 4000, "val": 500, "test": 500}
SPLITS = ("train", "val", "test")
CATEGORIES = tuple(SHAPES)  # COCO id = position + 1
TOKENIZER = Path(__file__).with_name("tokenizer.json")
SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
MIN_SIZE = 32
MIN_VISIBLE = 0.55  # of an object's own pixels
SUPERSAMPLE = 4
OBJECTS = (2, 2, 3, 3, 3, 4, 4, 5)  # how many a picture holds, equally likely
RADIUS = {"small": (0.098, 0.118), "large": (0.168, 0.2)}  # of the picture's side
RGB = {
    "red": (222, 44, 52),
    "orange": (247, 134, 24),
    "yellow": (255, 221, 51),
    "green": (34, 158, 70),
    "blue": (38, 92, 224),
    "purple": (140, 60, 178),
    "white": (250, 249, 243),
    "black": (34, 35, 42),
}


# --- what is in a picture -------------------------------------------------------------------------


def _outline(shape: str) -> np.ndarray:
    """The corners of a shape of radius about one around (0, 0), y down."""
    if shape in ("circle", "ring"):
        t = np.linspace(0, 2 * np.pi, 48, endpoint=False)
        return np.stack([np.cos(t), np.sin(t)], 1)
    if shape == "square":
        return 0.86 * np.array([(-1, -1), (1, -1), (1, 1), (-1, 1)])
    if shape == "triangle":
        return np.array([(0, -1.05), (1.02, 0.78), (-1.02, 0.78)])
    if shape == "diamond":
        return np.array([(0, -1.18), (0.76, 0), (0, 1.18), (-0.76, 0)])
    if shape == "star":
        t = np.arange(10) * np.pi / 5 - np.pi / 2
        return np.where(np.arange(10) % 2, 0.5, 1.15)[:, None] * np.stack([np.cos(t), np.sin(t)], 1)
    if shape == "heart":
        t = np.linspace(0, 2 * np.pi, 48, endpoint=False)
        y = 13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t)
        return np.stack([16 * np.sin(t) ** 3, -y - 2.5], 1) / 15.5
    a = 0.38  # the cross
    corners = [
        (-a, -1),
        (a, -1),
        (a, -a),
        (1, -a),
        (1, a),
        (a, a),
        (a, 1),
        (-a, 1),
        (-a, a),
        (-1, a),
        (-1, -a),
        (-a, -a),
    ]
    return 1.05 * np.array(corners)


OUTLINES = {shape: _outline(shape) for shape in SHAPES}
HOLE = 0.52  # of a ring's radius


def _corners(thing: dict, side: int, scale: float = 1.0) -> list[tuple[float, float]]:
    """A placed object's outline in pixels of a picture of `side` pixels."""
    turn = math.radians(thing["angle"])
    rotate = np.array([[math.cos(turn), math.sin(turn)], [-math.sin(turn), math.cos(turn)]])
    points = (scale * thing["radius"] * OUTLINES[thing["shape"]] @ rotate + (thing["x"], thing["y"])) * side
    return [tuple(point) for point in points.tolist()]


def _mask(thing: dict, side: int) -> Image.Image:
    """All pixels of an object as if nothing hid it: an "L" picture of 0 and 255."""
    mask = Image.new("L", (side, side))
    draw = ImageDraw.Draw(mask)
    draw.polygon(_corners(thing, side), fill=255)
    if thing["shape"] == "ring":
        draw.polygon(_corners(thing, side, HOLE), fill=0)
    return mask


def owners(things: list[dict], size: int) -> tuple[np.ndarray, np.ndarray]:
    """Which object each pixel shows; later objects lie in front.

    Returns:
        owner (size, size): the object's index or -1; full (objects, size, size): each object's own pixels.
    """
    middle = SUPERSAMPLE // 2
    full = np.stack(
        [
            np.asarray(_mask(t, size * SUPERSAMPLE))[middle::SUPERSAMPLE, middle::SUPERSAMPLE] > 0
            for t in things
        ]
    )
    owner = np.full((size, size), -1)
    for i, own in enumerate(full):
        owner[own] = i
    return owner, full


def _arrange(rng: np.random.Generator, things: list[dict]) -> bool:
    """Place objects inside the picture, back to front; False if they don't fit."""
    placed: list[dict] = []
    close = rng.random() < 0.5  # a second object near the first, so that one hides part of the other
    for thing in things:
        thing["radius"] = round(rng.uniform(*RADIUS[thing["size"]]), 4)
        thing["angle"] = round(rng.uniform(-12, 12), 2)
        margin = 1.2 * thing["radius"]
        for _ in range(40):
            if close and len(placed) == 1:
                turn = rng.uniform(0, 2 * np.pi)
                reach = rng.uniform(0.62, 0.85) * (thing["radius"] + placed[0]["radius"])
                x, y = placed[0]["x"] + reach * math.cos(turn), placed[0]["y"] + reach * math.sin(turn)
            else:
                x, y = rng.uniform(margin, 1 - margin), rng.uniform(margin, 1 - margin)
            near = [math.hypot(x - o["x"], y - o["y"]) / (thing["radius"] + o["radius"]) for o in placed]
            if close and len(placed) == 1:
                near = []
            if margin < x < 1 - margin and margin < y < 1 - margin and all(ratio > 1.02 for ratio in near):
                thing["x"], thing["y"] = round(x, 4), round(y, 4)
                placed.append(thing)
                break
        else:
            return False
    return True


def _position(x: float, y: float) -> list[str]:
    """Names of where a point (fractions of the side) lies: outer 36 % each way, or the centre."""
    names = ["top"] * (y < 0.36) + ["bottom"] * (y > 0.64) + ["left"] * (x < 0.36) + ["right"] * (x > 0.64)
    return names or ["centre"]


def _relations(things: list[dict], owner: np.ndarray, full: np.ndarray) -> list[list]:
    """All true [subject, name, object].

    A direction is that of the larger offset between the centres, beyond 15 % of the side; "in front of" hides
    at least 6 % of the other; "next to" is a gap of at most 9 % of the side between the boxes.
    """
    size, found = len(owner), []
    for i, a in enumerate(things):
        for j, b in enumerate(things):
            if i == j:
                continue
            dx, dy = b["x"] - a["x"], b["y"] - a["y"]
            if max(abs(dx), abs(dy)) > 0.15:
                if abs(dx) > abs(dy):
                    found.append([i, "left of" if dx > 0 else "right of", j])
                else:
                    found.append([i, "above" if dy > 0 else "below", j])
            hidden = (full[j] & full[i] & (owner == max(i, j))).sum() / full[min(i, j)].sum()
            if hidden > 0.06:
                found.append([i, "in front of" if i > j else "behind", j])
            else:
                (ax1, ay1, ax2, ay2), (bx1, by1, bx2, by2) = a["box"], b["box"]
                gap = math.hypot(max(ax1 - bx2, bx1 - ax2, 0), max(ay1 - by2, by1 - ay2, 0))
                if gap <= 0.09 * size:
                    found.append([i, "next to", j])
    return found


def picture_of(seed: int, split: str, index: int, size: int) -> dict:
    """One picture's truth, as attributes.json holds it (all but its pixels).

    Returns:
        filename, split, index, background;
        objects, back to front: shape, colour, size, texture; x, y, radius (fractions of the side) and angle
        (degrees) as drawn; box (x1, y1, x2, y2), area (visible pixels), visible (fraction of its own pixels),
        position (names);
        relations: all true [subject, name, object];
        captions: see `language.captions`.
    """
    rng = np.random.default_rng([seed, SPLITS.index(split), index, 0])
    while True:
        background = pick(rng, tuple(BACKDROPS))
        wanted = pick(rng, OBJECTS)
        things: list[dict] = []
        while len(things) < wanted:
            thing = {key: pick(rng, tuple(table)) for key, table in TABLES.items()}
            if thing not in things:
                things.append(thing)
        if not _arrange(rng, things):
            continue
        owner, full = owners(things, size)
        for i, thing in enumerate(things):
            ys, xs = np.nonzero(owner == i)
            thing["area"] = len(ys)
            thing["visible"] = round(len(ys) / max(int(full[i].sum()), 1), 4)
            if thing["visible"] >= MIN_VISIBLE:
                thing["box"] = [int(v) for v in (xs.min(), ys.min(), xs.max() + 1, ys.max() + 1)]
                thing["position"] = _position(thing["x"], thing["y"])
        if min(thing["visible"] for thing in things) >= MIN_VISIBLE:
            break
    picture = {
        "filename": f"scenes_{split}_{index:05d}.png",
        "split": split,
        "index": index,
        "background": background,
        "objects": things,
        "relations": _relations(things, owner, full),
    }
    words = np.random.default_rng([seed, SPLITS.index(split), index, 1])
    return picture | {"captions": captions(words, picture)}


# --- how it looks ---------------------------------------------------------------------------------


def _mix(a, b, share: float) -> tuple[int, int, int]:
    return tuple(round(u + (v - u) * share) for u, v in zip(a, b, strict=True))


def _gradient(side: int, *stops: tuple[int, int, int]) -> Image.Image:
    """A vertical gradient through colours, top to bottom."""
    strip = Image.fromarray(np.array(stops, np.uint8)[:, None])
    return strip.resize((1, 64), Image.Resampling.BICUBIC).resize((side, side), Image.Resampling.BILINEAR)


def _haze(
    rng: np.random.Generator, canvas: Image.Image, colour, strength: float, cells: tuple[int, int]
) -> None:
    """Soft random patches of a colour: smooth noise on a grid of (columns, rows) cells."""
    noise = Image.fromarray((rng.random((cells[1], cells[0])) ** 2 * 255 * strength).astype(np.uint8))
    canvas.paste(colour, mask=noise.resize(canvas.size, Image.Resampling.BICUBIC))


def _sky(rng: np.random.Generator, side: int) -> Image.Image:
    canvas = _gradient(side, (120, 180, 226), (166, 210, 238), (214, 234, 244))
    clouds = Image.new("L", (side // 4, side // 4))
    draw = ImageDraw.Draw(clouds)
    for _ in range(pick(rng, (4, 5, 6))):
        x, y, r = rng.uniform(0, side / 4), rng.uniform(0, side / 4), rng.uniform(0.03, 0.06) * side / 4
        for k in (-1.3, -0.4, 0.5, 1.4):
            s = r * rng.uniform(0.7, 1.3)
            draw.ellipse((x + k * r - s, y - s, x + k * r + s, y + 0.8 * s), fill=int(rng.uniform(150, 230)))
    clouds = clouds.filter(ImageFilter.BoxBlur(1)).resize((side, side), Image.Resampling.BICUBIC)
    canvas.paste((255, 255, 255), mask=clouds)
    return canvas


def _meadow(rng: np.random.Generator, side: int) -> Image.Image:
    canvas = _gradient(side, (176, 206, 140), (150, 190, 112), (122, 168, 90))
    _haze(rng, canvas, (196, 216, 150), 0.8, (7, 7))
    draw = ImageDraw.Draw(canvas)
    for x, y, tall, lean, shade in rng.random((70, 5)).tolist():
        foot, tip = (x * side, y * side), (x * side + (lean - 0.5) * 14, y * side - 6 - 14 * tall)
        draw.line((foot, tip), fill=_mix((96, 144, 70), (190, 214, 136), shade), width=3)
    for x, y, kind in rng.random((14, 3)).tolist():
        x, y = x * side, y * side
        petal = pick(rng, ((246, 240, 214), (232, 190, 206), (244, 226, 150)))
        r = 2.5 + 2 * kind
        draw.ellipse((x - r, y - r, x + r, y + r), fill=petal)
    return canvas


def _desert(rng: np.random.Generator, side: int) -> Image.Image:
    canvas = _gradient(side, (240, 222, 184), (231, 205, 160), (216, 184, 136))
    _haze(rng, canvas, (250, 236, 206), 0.8, (3, 9))
    draw = ImageDraw.Draw(canvas)
    xs = np.linspace(0, side, 24)
    for y, wave, shift in rng.random((7, 3)).tolist():
        ys = y * side + (6 + 6 * wave) * np.sin(xs / side * (6 + 8 * wave) + 6 * shift)
        draw.line(list(zip(xs.tolist(), ys.tolist(), strict=True)), fill=(206, 174, 128), width=2)
    for x, y, r, shade in rng.random((30, 4)).tolist():
        x, y, r = x * side, y * side, 1.5 + 3 * r
        draw.ellipse(
            (x - r, y - 0.7 * r, x + r, y + 0.7 * r), fill=_mix((150, 122, 92), (236, 216, 184), shade)
        )
    return canvas


def _night(rng: np.random.Generator, side: int) -> Image.Image:
    canvas = _gradient(side, (22, 26, 58), (40, 44, 88), (66, 62, 112))
    _haze(rng, canvas, (92, 84, 146), 0.7, (5, 5))
    draw = ImageDraw.Draw(canvas)
    for x, y, r, shade in rng.random((46, 4)).tolist():
        x, y, r = x * side, y * side, 1 + 2.2 * r**3
        draw.ellipse((x - r, y - r, x + r, y + r), fill=_mix((120, 120, 176), (255, 250, 226), shade))
    return canvas


def _sea(rng: np.random.Generator, side: int) -> Image.Image:
    canvas = _gradient(side, (150, 212, 212), (92, 178, 188), (50, 134, 156))
    _haze(rng, canvas, (176, 226, 220), 0.7, (4, 10))
    draw = ImageDraw.Draw(canvas)
    for x, y, w, shade in rng.random((34, 4)).tolist():
        x, y, w = x * side, y * side, 8 + 12 * w
        foam = _mix((120, 196, 202), (236, 248, 244), shade)
        draw.arc((x - w, y - w / 3, x, y + w / 3), 10, 170, fill=foam, width=2)
        draw.arc((x, y - w / 3, x + w, y + w / 3), 10, 170, fill=foam, width=2)
    return canvas


def _sunset(rng: np.random.Generator, side: int) -> Image.Image:
    canvas = _gradient(side, (112, 92, 148), (214, 138, 152), (246, 190, 150), (252, 220, 170))
    _haze(rng, canvas, (255, 226, 204), 0.75, (2, 12))
    draw = ImageDraw.Draw(canvas)
    for x, y, w, shade in rng.random((16, 4)).tolist():
        x, y, w = x * side, y * side, 10 + 26 * w
        draw.rounded_rectangle(
            (x - w, y - 2, x + w, y + 2), 2, fill=_mix((150, 108, 150), (255, 222, 196), shade)
        )
    return canvas


BACKDROPS = {
    "sky": _sky,
    "meadow": _meadow,
    "desert": _desert,
    "night": _night,
    "sea": _sea,
    "sunset": _sunset,
}


def _fabric(thing: dict, box: tuple[int, int, int, int], unit: float) -> Image.Image:
    """An object's coloured, textured, lit surface over `box`; `unit` is one pixel of the final picture."""
    colour = RGB[thing["colour"]]
    dark = thing["colour"] in ("yellow", "white", "orange")
    share = {"black": 0.42, "white": 0.4}.get(thing["colour"], 0.5 if dark else 0.62)
    second = _mix(colour, (70, 52, 40) if dark else (255, 255, 255), share)
    width, height = box[2] - box[0], box[3] - box[1]
    patch = Image.new("RGB", (width, height), colour)
    draw = ImageDraw.Draw(patch)
    step = unit * (2.6 if thing["size"] == "small" else 3.3)
    if thing["texture"] == "striped":
        for k in np.arange(-height, width + height, 2 * step).tolist():
            draw.polygon(
                [(k, 0), (k + step, 0), (k + step + 0.6 * height, height), (k + 0.6 * height, height)],
                fill=second,
            )
    elif thing["texture"] == "dotted":
        r, step = 0.42 * step, 1.35 * step
        for row in range(-1, int(height / step) + 2):
            for column in range(-1, int(width / step) + 2):
                x = width / 2 % step + (column + 0.5 * (row % 2)) * step
                y = height / 2 % step + row * step
                draw.ellipse((x - r, y - r, x + r, y + r), fill=second)
    patch.paste((255, 255, 255), mask=LIGHT.resize((width, height)))
    patch.paste((0, 0, 20), mask=SHADE.resize((width, height)))
    return patch


def _falloff(strength: float, x: float, y: float, start: float) -> Image.Image:
    """Light (or shade) that grows with the distance from (x, y) beyond `start`, in fractions of the patch."""
    v, u = np.mgrid[0:1:32j, 0:1:32j]
    return Image.fromarray((255 * strength * np.clip(np.hypot(u - x, v - y) - start, 0, 1)).astype(np.uint8))


LIGHT = _falloff(0.42, 1.0, 1.0, 0.62)
SHADE = _falloff(0.36, 0.1, 0.0, 0.68)


def draw_picture(seed: int, picture: dict, size: int) -> Image.Image:
    """The picture itself, (size, size) RGB: drawn four times larger, then shrunk."""
    rng = np.random.default_rng([seed, SPLITS.index(picture["split"]), picture["index"], 2])
    side, unit = size * SUPERSAMPLE, size * SUPERSAMPLE / 64
    canvas = BACKDROPS[picture["background"]](rng, 256).resize((side, side), Image.Resampling.BILINEAR)
    for thing in picture["objects"]:
        mask = _mask(thing, side)
        left, top, right, bottom = mask.getbbox()
        pad = math.ceil(2.5 * unit)
        shadow = Image.new("L", (right - left + 2 * pad, bottom - top + 2 * pad))
        cut = mask.crop((left, top, right, bottom))
        shadow.paste(cut.point(lambda v: v * 0.38), (pad, pad))
        canvas.paste(
            (10, 12, 36),
            (left - pad + round(0.7 * unit), top - pad + round(1.2 * unit)),
            shadow.filter(ImageFilter.BoxBlur(unit)),
        )
        patch = _fabric(thing, (left, top, right, bottom), unit)
        rim = _mix(RGB[thing["colour"]], (18, 14, 34), 0.5)
        if thing["colour"] == "black":
            rim = (150, 150, 162)
        draw = ImageDraw.Draw(patch)
        for scale in (1.0, HOLE) if thing["shape"] == "ring" else (1.0,):
            corners = [(x - left, y - top) for x, y in _corners(thing, side, scale)]
            draw.line(
                [*corners, corners[0], corners[1]], fill=rim, width=max(2, round(1.5 * unit)), joint="curve"
            )
        canvas.paste(patch, (left, top), cut)
    return canvas.reduce(SUPERSAMPLE)


# --- the field's formats --------------------------------------------------------------------------


def number(picture: dict) -> int:
    """A picture's number, unique in the whole set: COCO's image id."""
    return (SPLITS.index(picture["split"]) + 1) * 100_000 + picture["index"]


def entity(picture: dict, objects) -> str:
    """The Entities id of a set of objects (empty: the background), unique in the whole set.

    Split, index, and a bit for each object: "10000705" is objects 0 and 2 of training picture 7.
    """
    return str(number(picture) * 100 + sum(1 << i for i in objects))


def entities_sentences(picture: dict) -> str:
    """A picture's `Sentences/<id>.txt`: a caption a line, its phrases in brackets."""
    lines = []
    for caption in picture["captions"]:
        line, text = "", caption["text"]
        ends = [0, *(end for _, end, _ in caption["phrases"])]
        for previous, (start, end, mention) in zip(ends, caption["phrases"], strict=False):
            objects = caption["mentions"][mention]["objects"] if mention >= 0 else []
            kind = "shapes" if mention >= 0 else "scene"
            line += f"{text[previous:start]}[/EN#{entity(picture, objects)}/{kind} {text[start:end]}]"
        lines.append(line + text[ends[-1] :])
    return "\n".join(lines) + "\n"


def entities_annotation(picture: dict, width: int, height: int) -> str:
    """XML as published: an object's box with the ids of all phrases that name it; backgrounds have no box."""
    named = [
        (set(m["objects"]), entity(picture, m["objects"])) for c in picture["captions"] for m in c["mentions"]
    ]
    lines = ["<annotation>", f"  <filename>{picture['filename']}</filename>", "  <size>"]
    lines += [
        f"    <{key}>{value}</{key}>" for key, value in (("width", width), ("height", height), ("depth", 3))
    ]
    lines += ["  </size>"]
    for i, thing in enumerate(picture["objects"]):
        names = sorted({name for objects, name in named if i in objects})
        if names:
            lines += ["  <object>", *(f"    <name>{name}</name>" for name in names), "    <bndbox>"]
            lines += [
                f"      <{key}>{value}</{key}>"
                for key, value in zip(("xmin", "ymin", "xmax", "ymax"), thing["box"], strict=True)
            ]
            lines += ["    </bndbox>", "  </object>"]
    if any("background" in caption for caption in picture["captions"]):
        lines += ["  <object>", f"    <name>{entity(picture, [])}</name>"]
        lines += ["    <scene>1</scene>", "    <nobndbox>0</nobndbox>", "  </object>"]
    return "\n".join([*lines, "</annotation>"]) + "\n"


def _make(job: tuple[Path, int, int, str, int, int]) -> list[dict]:
    """Draw and write pictures `start` to `stop` of a split; returns their truths."""
    folder, seed, size, split, start, stop = job
    made = []
    for index in range(start, stop):
        picture = picture_of(seed, split, index, size)
        stem = Path(picture["filename"]).stem
        draw_picture(seed, picture, size).save(folder / "images" / picture["filename"])
        (folder / "entities/Sentences" / f"{stem}.txt").write_text(
            entities_sentences(picture), encoding="utf-8"
        )
        xml = entities_annotation(picture, size, size)
        (folder / "entities/Annotations" / f"{stem}.xml").write_text(xml, encoding="utf-8")
        made.append(picture)
    return made


def _json(path: Path, content) -> None:
    path.write_text(json.dumps(content, separators=(",", ":")), encoding="utf-8")


def karpathy_entries(pictures: list[dict]) -> list[dict]:
    """Karpathy's `images` of pictures: ids of pictures and of sentences count from 0."""
    entries, sentid = [], 0
    for imgid, picture in enumerate(pictures):
        sentences = []
        for caption in picture["captions"]:
            raw = caption["text"]
            sentences.append({"tokens": raw.lower().split(), "raw": raw, "imgid": imgid, "sentid": sentid})
            sentid += 1
        sentids = [sentence["sentid"] for sentence in sentences]
        entry = {"sentids": sentids, "imgid": imgid, "sentences": sentences, "split": picture["split"]}
        entries.append(entry | {"filename": picture["filename"]})
    return entries


def coco_lists(pictures: list[dict], width: int, height: int) -> tuple[dict, dict]:
    """COCO's captions and instances of pictures that are all of one size in pixels."""
    categories = [{"supercategory": "shape", "id": i, "name": name} for i, name in enumerate(CATEGORIES, 1)]
    images, texts, boxes = [], [], []
    for picture in pictures:
        image_id = number(picture)
        images.append({"id": image_id, "file_name": picture["filename"], "width": width, "height": height})
        for caption in picture["captions"]:
            texts.append({"id": len(texts) + 1, "image_id": image_id, "caption": caption["text"]})
        for thing in picture["objects"]:
            x1, y1, x2, y2 = thing["box"]
            box = {"id": len(boxes) + 1, "image_id": image_id, "iscrowd": 0, "segmentation": []}
            box |= {"category_id": CATEGORIES.index(thing["shape"]) + 1, "area": thing["area"]}
            boxes.append(box | {"bbox": [x1, y1, x2 - x1, y2 - y1]})
    header = {
        "info": {"description": f"finematch scenes, version {FORMAT}"},
        "licenses": [],
        "images": images,
    }
    return header | {"annotations": texts}, header | {"annotations": boxes, "categories": categories}


def _write_lists(folder: Path, pictures: list[dict], size: int) -> None:
    """Karpathy JSON, COCO captions and instances, and the split lists of Entities."""
    _json(folder / "dataset_scenes.json", {"images": karpathy_entries(pictures), "dataset": "scenes"})
    for split in SPLITS:
        captions, instances = coco_lists([p for p in pictures if p["split"] == split], size, size)
        _json(folder / f"annotations/captions_{split}.json", captions)
        _json(folder / f"annotations/instances_{split}.json", instances)
        stems = [Path(image["file_name"]).stem for image in captions["images"]]
        (folder / f"entities/{split}.txt").write_text(
            "".join(f"{stem}\n" for stem in stems), encoding="utf-8"
        )


def part_digests(folder: str | Path) -> dict[str, str]:
    """SHA-256 of each of a set's `PARTS`: of its files' names and bytes."""
    found = {}
    for part, patterns in PARTS.items():
        files = sorted(path for pattern in patterns for path in Path(folder).glob(pattern))
        names = [path.relative_to(folder).as_posix() for path in files]
        found[part] = digest(list(zip(names, file_digests(files, remember=False), strict=True)))
    return found


def version_of(folder: str | Path) -> int:
    """The version of the generator that drew a set; 1 for sets from before it was written down."""
    path = Path(folder) / "version.json"
    if not path.exists():
        return 1
    with reading(path, "the version"):
        return int(read_json(path)["version"])


def current(folder: str | Path, *, redraw: bool = False) -> None:
    """Refuse a set that another version of the generator drew: its pictures, captions or phrases are not today's.

    Args:
        redraw: where it is an older one of default seed and sizes, draw it again in its place.

    Raises:
        DataError: naming both versions and the remedy.
    """
    folder = Path(folder)
    if (found := version_of(folder)) == VERSION:
        return
    path = folder / "meta.json"
    if not path.exists():
        raise DataError(path, "whole file", "is missing", f"Remove {folder}: the set is then drawn again")
    with reading(path, "seed and sizes"):
        meta = read_json(path)
        drawn = {
            "seed": meta["seed"],
            "size": meta["size"],
            **{split: meta["splits"][split] for split in SPLITS},
        }
    if redraw and found < VERSION and drawn == DEFAULTS:
        generate(folder)
        return
    options = "".join(f" --{name} {value}" for name, value in drawn.items())
    remedy = (
        f"Draw it again in its place: python -m finematch.scenes.generator {folder}{options}"
        if found < VERSION
        else "Update finematch, or choose another data_root"
    )
    raise DataError(
        folder / "version.json",
        "the version",
        f"the set was drawn by version {found}, this is {VERSION}",
        remedy,
    )


def _existing(out: Path, meta: dict) -> bool:
    """True if `out` already holds this very set, False if it is free or has the set of an older generator; DataError if
    it holds another."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return False
    remedy = "Remove the folder or choose another"
    if not (out / "meta.json").is_file():
        raise DataError(out, "meta.json", "the folder is not empty and is not a scenes set", remedy)
    found = read_json(out / "meta.json")
    if found != meta:
        problem = f"the folder holds another set ({json.dumps(found)}, wanted {json.dumps(meta)})"
        raise DataError(out / "meta.json", "whole file", problem, remedy)
    if version_of(out) > VERSION:
        current(out)  # which says so
    return version_of(out) == VERSION


def generate(
    out: str | Path,
    *,
    seed: int = DEFAULTS["seed"],
    size: int = DEFAULTS["size"],
    train: int = DEFAULTS["train"],
    val: int = DEFAULTS["val"],
    test: int = DEFAULTS["test"],
    workers: int = 0,
) -> Path:
    """Write the set to `out` (about 25 s on one core), or reuse it if `out` holds exactly this set.

    The folder appears whole or not at all: it is written beside `out` and renamed. The same set as an older version of
    the generator drew it is replaced.

    Args:
        size: side of the pictures in pixels.
        workers: processes that draw; 0 draws in this one. The bytes don't depend on it.

    Raises:
        DataError: a number out of range; `out` holds something else, or cannot be written.
    """
    out = Path(out)
    counts = dict(zip(SPLITS, (train, val, test), strict=True))
    if (
        not all(1 <= count <= 100_000 for count in counts.values())
        or seed < 0
        or workers < 0
        or size < MIN_SIZE
    ):
        asked = f"seed {seed}, size {size}, {counts}"
        remedy = f"Use seed >= 0, size >= {MIN_SIZE}, and 1 to 100000 pictures a split"
        raise DataError(out, asked, "out of range", remedy)
    meta = {"generator": "scenes", "version": FORMAT, "seed": seed, "size": size, "splits": counts}
    if _existing(out, meta):
        return out
    folder, older = (out.parent / f".{out.name}.{os.getpid()}.{end}" for end in ("partial", "older"))
    try:
        shutil.rmtree(folder, ignore_errors=True)
        for name in ("images", "annotations", "entities/Annotations", "entities/Sentences"):
            (folder / name).mkdir(parents=True)
        jobs = []
        for split, count in counts.items():
            edges = [*range(0, count, 250), count]
            jobs += [(folder, seed, size, split, start, stop) for start, stop in pairwise(edges)]
        if workers:
            with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
                pictures = [picture for part in pool.map(_make, jobs) for picture in part]
        else:
            pictures = [picture for job in jobs for picture in _make(job)]
        _write_lists(folder, pictures, size)
        _json(folder / "attributes.json", {"size": size, "images": pictures})
        _json(folder / "meta.json", meta)
        _json(folder / "version.json", {"version": VERSION, "parts": part_digests(folder)})
        try:
            if out.exists() and not _existing(out, meta) and any(out.iterdir()):
                out.rename(older)
            folder.rename(out)
        except OSError:
            if not _existing(out, meta):  # another process may have finished the same set meanwhile
                raise
    except OSError as error:
        raise DataError(
            out, "whole folder", f"cannot be written ({error})", "Choose a writable folder"
        ) from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        shutil.rmtree(older, ignore_errors=True)
    return out


def attributes(root: str | Path, split: str) -> list[dict]:
    """A split's truths from attributes.json, in the order of the split (see `picture_of`).

    Raises:
        DataError: the file is missing or malformed, or has no such split.
    """
    path = Path(root) / "attributes.json"
    data = read_json(path)
    with reading(path, "the list `images`"):
        pictures = list(data["images"])
    found = [picture for picture in pictures if picture["split"] == split]
    if not found:
        raise DataError(path, f"split {split}", "no pictures", f"Use one of {', '.join(SPLITS)}")
    return found


def choose(pictures: list[dict], which: str) -> list[dict]:
    """The pictures without a combination of `language.UNSEEN` (`which="seen"`), whose captions then mention none, or
    those with one in a caption (`which="unseen"`)."""

    def has(picture: dict) -> bool:
        claims = [m for caption in picture["captions"] for m in caption["mentions"]]
        return any(map(unseen, picture["objects"] if which == "seen" else claims))

    return [picture for picture in pictures if has(picture) == (which == "unseen")]


def build_tokenizer(more: Sequence[str] = ()) -> Tokenizer:
    """The word-level tokeniser of `scenes`: [PAD] [UNK] [CLS] [SEP] [MASK], the captions' words, sorted, then `more`.

    tokenizer.json beside this file is this tokeniser, saved.
    """
    words = {token: i for i, token in enumerate([*SPECIAL_TOKENS, *vocabulary(), *more])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Punctuation()]
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", words["[CLS]"]), ("[SEP]", words["[SEP]"])],
    )
    tokenizer.add_special_tokens(list(SPECIAL_TOKENS))
    return tokenizer


def main(arguments: list[str] | None = None) -> None:
    """Generate the set and print its difficulty."""
    from finematch.scenes.baselines import difficulty, table

    parser = argparse.ArgumentParser(
        prog="python -m finematch.scenes.generator", description=generate.__doc__.split("\n")[0]
    )
    parser.add_argument("out", type=Path)
    for name, default in {**DEFAULTS, "workers": 0}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    options = vars(parser.parse_args(arguments))
    try:
        out = generate(options.pop("out"), **options)
    except DataError as error:
        parser.error(str(error))
    print("Recall on test, in %, ties counted against the scores (in brackets: expected over random ties)\n")
    print(table(difficulty(out, "test")))


if __name__ == "__main__":
    main()
