"""What will a grid cost on this machine? `make rehearse GRID=mvam_views SCALE=paper`.

Each row's model is built at its true shapes, on a few images of its set (stand-ins where the set is not there), and
measured on the device at hand: training steps as `training.fit` makes them, evaluation, extraction of features. Times
the number of images of the whole set this gives hours, memory, disk and the largest batch that fits.

Where the row's batch is too large for the device or for patience, smaller ones are measured, each twice the last. Time
is extrapolated by the power of the batch that the last doubling shows (1 to 2), memory by a straight line. Not
predicted are downloads, and networks that runs on the embedded set train once.
"""

from __future__ import annotations

import gc
import math
import os
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pandas as pd
import torch

from finematch import grids, rebuild
from finematch.checkpoints import room_for
from finematch.config import Settings, own_reading, root
from finematch.data.fragment_sets import open_fragment_sets
from finematch.data.splits import SMOKE, open_records
from finematch.evaluation.embedding import embed
from finematch.evaluation.fragments import frozen, phrase_grounding, tasks
from finematch.evaluation.grounding import grounding
from finematch.evaluation.phrases import annotated_phrases, attended_phrases, located_phrases
from finematch.evaluation.reranking import reranked_retrieval
from finematch.evaluation.retrieval import retrieval_blocks
from finematch.features.fragments import document, extract_keywords, picture_fragments, text_fragments
from finematch.features.inputs import map_images, region_images
from finematch.files import DataError, write_json
from finematch.models.configs import FELGAConfig, HSLMConfig, MVAMConfig
from finematch.models.felga import FELGA, FragmentPairs
from finematch.models.hslm import HSLM, tile_scores
from finematch.models.mvam import MVAM
from finematch.models.slan.objective import Unimodal, pair_scorer
from finematch.runs import git_commit, versions
from finematch.standins import write_data, write_network
from finematch.training import Loop, Plan, accelerator, device_name, open_accelerator, peak_memory, to_device

CAPTIONS = 5  # of an image, in every set
IMAGES = {  # of train, val and the reported split, as published
    "scenes": (4000, 500, 500), "flickr8k": (6000, 1000, 1000), "flickr30k": (29_000, 1014, 1000),
    "coco_karpathy": (113_287, 5000, 5000), "coco": (118_287, 0, 5000), "coco2014": (82_783, 0, 40_504),
}  # fmt: skip
# settings that change no cost: rows that differ in them alone are measured once
FREE = {
    "seed",
    "lr",
    "stage1_lr",
    "tau",
    "margin",
    "weight_decay",
    "diversity_weight",
    "warmup",
    "schedule",
    "labels",
}
PATIENCE = 20.0  # seconds: no batch is measured whose step would take longer
FEW = 24  # images whose features are extracted
Cost = dict[str, float]


# ------------------------------------------------------------------------------------------- measuring
def clock() -> float:
    """CPU seconds of this process where it computes with one thread, so that other work does not count; else wall."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return (
        time.process_time()
        if accelerator().type == "cpu" and torch.get_num_threads() == 1
        else time.perf_counter()
    )


def clocked(work: Callable[[], Any], *, least: float = 0.5) -> float:
    """Seconds of a call, the mean over `least` seconds of calls after a first one."""
    work()
    started, calls = clock(), 0
    while calls == 0 or clock() - started < least:
        work()
        calls += 1
    return (clock() - started) / calls


def forget_peak() -> None:
    """Let `training.peak_memory` count from now on: on GPUs and on Linux; elsewhere it counts from the beginning."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def capacity() -> int:
    """Bytes of the GPU, or of the machine."""
    if torch.cuda.is_available():
        return torch.cuda.mem_get_info()[1]
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def step_cost(model: torch.nn.Module, data, s: Settings, patience: float = PATIENCE) -> Cost:
    """A training step of `s.batch_size` items: its seconds with and without reading the items, peak bytes (of the
    process, on a CPU), the largest batch that fits (0: memory did not grow) and the largest that was measured."""
    given, size, room = s.as_dict(), s.batch_size, 0.9 * capacity()
    optimizer = {"hslm": "adam", "felga": "sgd"}.get(s.method, "adamw")
    plan = Plan(epochs=1, batch_size=1, lr=1e-6, optimizer=optimizer, clip_norm=given.get("clip_norm", 1.0),
                precision=s.precision, workers=given.get("workers", 0))  # fmt: skip
    loop = Loop(model, data, plan, open_accelerator(plan), None)
    loop.model.train()
    measured: list[tuple[int, float, float, int]] = []
    for b in [*(2**k for k in range(2, 16) if 2**k < size and (2**k >= size / 8 or size > 256)), size]:
        forget_peak()
        index = [i * len(data) // b for i in range(b)]  # of as many images as there are
        read = clocked(lambda index=index: data.__getitems__(index), least=0.1)
        batch = data.__getitems__(index)
        step = clocked(lambda batch=batch: loop.step(batch, True, "rehearsal"), least=1.0)
        growth = peak_memory() - measured[-1][3] if measured else 0
        measured.append((b, step, read, peak_memory()))
        if 2.5 * step > patience or peak_memory() + 2.5 * growth > room:
            break
    loop.optimizer.zero_grad(set_to_none=True)
    (b, step, read, peak), (half, before, _, less) = measured[-1], measured[max(0, len(measured) - 2)]
    power = min(2.0, max(1.0, math.log(step / before) / math.log(b / half))) if b > half else 1.0
    slope = max(0.0, (peak - less) / (b - half)) if b > half else 0.0
    step, read = step * (size / b) ** power, read * size / b
    return {
        "step": max(step, read / plan.workers) if plan.workers else step + read, "step_without_reading": step,
        "memory": peak + slope * (size - b), "fits": int(b + (room - peak) / slope) if slope else 0,
        "measured_batch": b, "checkpoints": room_for(model, Path("none")) / 2,
    }  # fmt: skip


def extracted(count: int, work: Callable[[str], Any], folder: Path) -> Cost:
    """Seconds and bytes of an image's frozen features; `work` makes those of `count` images in an empty cache."""
    with TemporaryDirectory(dir=folder) as cache:
        started = clock()
        work(cache)
        seconds, files = clock() - started, Path(cache).rglob("*")
        size = sum(file.stat().st_size for file in files if file.is_file())
    return {"feature_seconds": seconds / count, "feature_bytes": size / count}


# ------------------------------------------------------------------------------------------- the small run
def small_settings(s: Settings, folder: Path, data_root: str | Path) -> Settings:
    """The settings with every value as it is, on the first few images, with stand-ins for networks that need files."""
    given = {**s.as_dict(), "smoke": True, "cache": str(folder / "cache"), "data_root": str(data_root)}
    given |= {name: "" for name in ("pretrained", "detector", "shards", "shortlist") if name in given}
    if s.scale != "paper":
        return Settings(s.method, given)
    kinds = {} if s.method == "arena" else {"text_weights": "bert-base"}
    if s.method == "felga":
        vlp = {"blip": "blip-itm-base", "blip2": "blip2-itm-vit-g"}.get(s.vlp, "clip-vit-b-32")
        kinds = {"vlp": vlp} | ({"proposals": "detreg-r50"} if s.proposals == "auto" else {})
    elif s.method == "mvam" and s.backbone == "clip":
        kinds["clip_weights"] = "clip-vit-b-16"
    elif s.method == "mvam" and s.backbone == "grid":
        kinds["vision_weights"] = f"timm/{s.vision or 'vit_base_patch16_224'}"
    for name, kind in kinds.items():
        given[name] = str(write_network(kind, folder / kind.replace("/", "-")))
    return Settings(s.method, given)


def images_of(s: Settings) -> tuple[str | Path, tuple[int, ...]]:
    """The data root, "" where the set is not there, and how many images train, val and the reported split have."""
    where = root() / s.data_root
    if s.dataset == "scenes":
        return where, IMAGES["scenes"]
    try:
        if s.method == "felga":
            sets = open_fragment_sets(s.dataset, where, root() / s.cache)
            return where, (len(sets.train), len(sets.val), len(sets.gallery))
        records = open_records(s.dataset, where)
        return where, tuple(len(records.get(split, records["val"])) for split in ("train", "val", "test"))
    except DataError:
        return "", IMAGES[s.dataset]


def _opened(s: Settings, small: Settings, folder: Path) -> tuple[rebuild.Inputs, Cost]:
    """What a small run of MVAM, HSLM or SLAN reads, and an image's features."""
    inputs = rebuild.open_inputs(small, folder)
    if inputs.network is None:  # published arrays, or pixels
        return inputs, {"feature_seconds": 0.0, "feature_bytes": 0.0}
    records, options = (
        {"train": inputs.splits["train"].records[:FEW]},
        {"regions": s.as_dict().get("regions"), "echo": None},
    )
    if s.method == "slan":
        return inputs, extracted(
            FEW, lambda at: map_images(records, inputs.network, at, stages=s.maps, echo=None), folder
        )
    options |= {
        "kind": "cells" if s.as_dict().get("backbone") == "grid" else "regions",
        "proposals": s.proposals,
    }
    return inputs, extracted(FEW, lambda at: region_images(records, inputs.network, at, **options), folder)


# ------------------------------------------------------------------------------------------- the methods
def mvam_cost(s: Settings, small: Settings, counts: tuple, folder: Path, patience: float) -> Cost:
    """Every epoch embeds val, the end embeds the reported split; an ensemble does all of it for each member."""
    inputs, cost = _opened(s, small, folder)
    model = MVAM(*rebuild.towers(small, inputs), MVAMConfig.of(s, total_dim=s.total_dim // s.ensemble)).to(
        accelerator()
    )
    cost |= step_cost(model, inputs.splits["train"].pairs(), s, patience)
    image = clocked(lambda: embed(model, inputs.splits["val"])) / len(inputs.splits["val"].records)
    steps = counts[0] * CAPTIONS // s.batch_size
    training = s.ensemble * s.epochs * (steps * cost["step"] + counts[1] * image)
    return cost | {"training": training, "evaluation": s.ensemble * counts[2] * image,
                   "checkpoints": s.ensemble * cost["checkpoints"]}  # fmt: skip


def hslm_cost(s: Settings, small: Settings, counts: tuple, folder: Path, patience: float) -> Cost:
    """Every pair of an image and a caption is scored, of val in each epoch, of the reported split at the end."""
    inputs, cost = _opened(s, small, folder)
    made, data = (
        (inputs.splits["train"].images.width, len(inputs.tokenizer), HSLMConfig.of(s)),
        inputs.splits["train"].pairs(),
    )
    start = HSLM(*made, warmup_steps=10**9).to(accelerator())
    first = step_cost(start, data, s, patience)["step"] if s.warmup_epochs else 0.0
    model = HSLM(*made).to(accelerator())
    cost |= step_cost(model, data, s, patience)
    model.eval()
    seen, split = inputs.splits["val"], inputs.splits[inputs.reported]
    scorer = tile_scores(model, seen.images.batch, seen.texts.batch,
                         dtype=torch.bfloat16 if s.score_precision == "bf16" else None)  # fmt: skip
    n, c, looked = len(seen.records), len(seen.captions), 0.0
    pair = clocked(lambda: retrieval_blocks(scorer, n, c, seen.image_of, block=1000)) / (n * c)
    phrases = annotated_phrases(small.dataset, inputs.data_root, inputs.reported, split.records, echo=None)
    if s.cross_attn and phrases and split.images.places is not None:
        asked = split, phrases, inputs.tokenizer, model.attend
        looked = clocked(lambda: grounding(attended_phrases(*asked, complete=False), split=""))
        looked /= len(split.records)
    share, steps = min(1.0, s.warmup_epochs / s.epochs), counts[0] * CAPTIONS // s.batch_size
    ranked = min(s.val_pictures or counts[1], counts[1])
    step = share * first + (1 - share) * cost["step"]
    return cost | {"training": s.epochs * (steps * step + CAPTIONS * ranked**2 * pair),
                   "evaluation": CAPTIONS * counts[2] ** 2 * pair + 2 * looked * counts[2]}  # fmt: skip


def slan_cost(s: Settings, small: Settings, counts: tuple, folder: Path, patience: float) -> Cost:
    """The contrast may train encoders first; every epoch embeds val, the end re-ranks and looks at phrases."""
    inputs, cost = _opened(s, small, folder)
    model, data = rebuild.slan_model(small, inputs).to(accelerator()), inputs.splits["train"].pairs()
    first = step_cost(Unimodal(model), data, s, patience)["step"] if s.encoder_epochs else 0.0
    cost |= step_cost(model, data, s, patience)
    model.eval()
    split, device = inputs.splits[inputs.reported], accelerator()
    image = clocked(lambda: embed(model, split)) / len(split.records)
    vectors, k = embed(model, split), min(s.rerank, 8, len(split.records))
    scorer = pair_scorer(model, split.images.batch, split.texts.batch, block=256)
    rerank = looked = 0.0
    if s.itm_weight:
        pairs = reranked_retrieval(*vectors, split.image_of, scorer, k=k)["pairs"]
        pair = clocked(lambda: reranked_retrieval(*vectors, split.image_of, scorer, k=k)) / pairs
        rerank = pair * min(s.rerank, counts[2]) * (1 + CAPTIONS)

    def locate(pictures: dict, texts: dict) -> tuple:
        seen, said = (
            model.encode_image(**to_device(pictures, device)),
            model.encode_text(**to_device(texts, device)),
        )
        at = model.locate(seen, said)
        return at.boxes, at.cosine, at.valid

    if phrases := annotated_phrases(
        small.dataset, inputs.data_root, inputs.reported, split.records, echo=None
    ):
        looked = clocked(lambda: [grounding(level, split="") for level in located_phrases(
            split, phrases, inputs.tokenizer, locate, complete=False)]) / len(split.records)  # fmt: skip
    steps, epochs = counts[0] * CAPTIONS // s.batch_size, 0 if s.zero_shot else s.epochs
    return cost | {
        "training": epochs * (steps * cost["step"] + counts[1] * image),
        "encoders": s.encoder_epochs * (steps * first + counts[1] * image),
        "evaluation": counts[2] * (image + rerank + (1 if s.zero_shot else 2) * looked),
    }  # fmt: skip


def felga_cost(s: Settings, small: Settings, counts: tuple, folder: Path, patience: float) -> Cost:
    """Proposals, keywords and features of train and gallery; both tasks and grounding, before and after training."""
    found = rebuild.open_gallery(small, folder, {})
    records, networks, made = found.sets.train[:FEW], found.networks, []

    def work(at: str) -> None:
        boxes = networks.propose(records, split="train", cache=Path(at) / "proposals", echo=None)
        made.append(picture_fragments(records, boxes, networks.vlp, at, "train", echo=None))
        said = extract_keywords([document(r) for r in records], networks.keywords_of, at, "train", echo=None)
        made.append(text_fragments(said, networks.vlp, at, "train", echo=None))
        made.append(FragmentPairs.of(*made).to(accelerator()))

    cost = extracted(len(records), work, folder)
    cost |= dict.fromkeys(("step", "training", "memory", "fits", "measured_batch", "checkpoints"), 0.0)
    model = FELGA(found.features, FELGAConfig.of(s)).to(accelerator())
    if trained := s.features == "fenet":
        cost |= step_cost(model, made[-1], s, patience)
        cost["training"] = s.epochs * (counts[0] // s.batch_size) * cost["step"]
    model.eval()
    by, n, looked = (
        (model.encode_regions, model.encode_words) if trained else (frozen, frozen),
        len(found.gallery.records),
        0.0,
    )
    if found.annotated is not None:
        looked = (
            clocked(lambda: phrase_grounding(found.annotated, *by)) / len(found.annotated.records) * counts[2]
        )
    large = tiled(found.gallery, max(2, min(12, counts[2] // n)))
    seconds = clocked(lambda: tasks(large, *by)) * (counts[2] / len(large.records)) ** 2
    return cost | {"evaluation": (1 + trained) * (seconds + looked)}


def tiled(gallery, times: int):
    """A gallery `times` over: both tasks cost its images times its queries."""

    def more(fragments):
        return replace(
            fragments, index=np.tile(fragments.index, (times, 1)), mask=np.tile(fragments.mask, (times, 1))
        )

    parts = {name: more(getattr(gallery, name)) for name in ("boxes", "regions", "keywords")}
    return replace(gallery, records=gallery.records * times, **parts)


def arena_cost(s: Settings, small: Settings, counts: tuple, folder: Path, patience: float) -> Cost:
    """The steps of the budget at what a step costs here; val is ranked in each round, the reported split at the end, by
    pairs but for models of vectors. SLAN's steps without its locator count as those with it."""
    from finematch import arena  # which measures with this module

    entrant = arena.open_entrant(small, folder)
    cost = step_cost(entrant.model, entrant.inputs.splits["train"].pairs(), s, patience)
    seen, steps = len(entrant.test.records), s.rounds * arena.steps(s)
    work = clocked(lambda: arena.ranked(entrant, entrant.test))
    # a matching head ranks so many candidates of each query, as vectors are ranked image by image
    pairs = not isinstance(entrant.model, (MVAM, arena.SLAN))
    val = min(s.val_pictures or counts[1], counts[1]) if pairs else counts[1]
    ranking = [work * (count / seen) ** (2 if pairs else 1) for count in (val, counts[2])]
    return cost | {"feature_seconds": 0.0, "feature_bytes": 0.0, "evaluation": ranking[1],
                   "training": steps * cost["step"] + s.rounds * ranking[0]}  # fmt: skip


COST = {"mvam": mvam_cost, "hslm": hslm_cost, "slan": slan_cost, "felga": felga_cost, "arena": arena_cost}


# ------------------------------------------------------------------------------------------- a grid
def rehearse_run(
    s: Settings, folder: Path, *, counts: tuple[int, ...] = (), patience: float = PATIENCE
) -> Cost:
    """Predicted seconds (`training`, `evaluation`, `encoders`, `features`), bytes and the largest batch of a run.

    Args:
        folder: for stand-ins and the small run's cache; what is there is used again.
        counts: images of train, val and the reported split, in place of the set's.

    Raises:
        DataError: A set that is not there and has no stand-in.
    """
    data_root, known = images_of(s)
    if not data_root:
        data_root = write_data(s.dataset, folder / f"data-{s.dataset}", images=SMOKE["val"])
    counts = counts or known
    cost = {"encoders": 0.0} | COST[s.method](
        s, small_settings(s, folder, data_root), counts, folder, patience
    )
    return cost | {
        "features": cost["feature_seconds"] * sum(counts),
        "feature_disk": cost["feature_bytes"] * sum(counts),
    }


def rehearse(grid: grids.Grid, dataset: str, scale: str, folder: Path, *, data_root: str = "data", reading: str = "",
             row: str = "", patience: float = PATIENCE, echo=print) -> list[dict]:  # fmt: skip
    """A line a row of the grid (or of one row): `row` and its `Cost`; rows of one shape are measured once."""
    if grid.page != "2_train":
        raise DataError(
            f"grids/{grid.name}.toml", f"page {grid.page!r}", "is not rehearsed: only training pages are",
            f"Rehearse the grid it builds on (GRID={grid.builds_on}); the page's first cell says its own cost",
        )  # fmt: skip
    known, lines = {}, []
    given = {"dataset": dataset, "scale": scale, "data_root": data_root, "reading": reading}
    for name in [row] if row else grid.rows:
        cells = grid.cells(name, scale).items()
        links = {key: "" for key, cell in cells if grids.LINK.search(cell)}
        links |= {key: declared(grid.method)[key].default for key, cell in cells if cell == grids.BOXES}
        s = grids.settings(grid, name, **given, **links)
        shape = repr({key: value for key, value in s.identity().items() if key not in FREE})
        if shape not in known:
            echo(f"{grid.name} {name}", flush=True)
            known[shape] = rehearse_run(s, folder, patience=patience)
        rounds = s.as_dict().get("epochs", s.as_dict().get("rounds"))
        lines.append({"row": name, "batch": s.batch_size, "epochs": rounds, **known[shape]})
    return lines


def table(lines: list[Mapping], seeds: int) -> pd.DataFrame:
    """Hours, memory, disk and the largest batch, a line a row; last the grid's total over all seeds.

    Rows share features, and encoders of one seed: the total has the largest of each, not the sum.
    """
    summed = {
        key: seeds * sum(one[key] for one in lines) for key in ("training", "evaluation", "checkpoints")
    }
    largest = {
        key: max(one[key] for one in lines) for key in ("encoders", "features", "memory", "feature_disk")
    }
    total = {"row": f"all, {seeds} seeds", "batch": "", "measured_batch": "", "fits": "", **largest, **summed}
    total["encoders"] *= seeds
    frame = pd.DataFrame([*lines, total])
    columns = {"row": "row"}
    for key in ("training", "evaluation", "encoders", "features"):
        columns[key], frame[key] = f"{key} (h)", frame[key] / 3600
    for key, title in (
        ("memory", "peak memory"),
        ("feature_disk", "features"),
        ("checkpoints", "checkpoints"),
    ):
        columns[key], frame[key] = f"{title} (GB)", frame[key] / 1e9
    columns |= {"batch": "batch", "measured_batch": "measured at", "fits": "largest batch"}
    return frame[list(columns)].rename(columns=columns)


def main(
    name: str, dataset: str, scale: str, *, data_root: str, reading: str = "", row: str, out: Path
) -> pd.DataFrame:
    """Rehearse a grid (or one row), write its table with what it was measured on, and return it.

    Raises:
        DataError: No such grid or row; a set that has no stand-in.
    """
    grid = grids.grid(name, dataset)
    if row and row not in grid.rows:
        raise DataError(f"grids/{name}.csv", f"row {row}", "is not there", f"Rows: {', '.join(grid.rows)}")
    with TemporaryDirectory() as folder:
        lines = rehearse(grid, dataset, scale, Path(folder), data_root=data_root, reading=reading, row=row)
    about = {"device": device_name(), "capacity": capacity(), "versions": versions(), "commit": git_commit()}
    write_json(
        out,
        {"grid": name, "dataset": dataset, "scale": scale, "reading": reading or own_reading(scale),
         "seeds": grid.seeds, **about, "rows": lines},
    )  # fmt: skip
    return table(lines, grid.seeds)
