"""One run of SLAN, from its parameters to the model before its first step: 4.1, implementation details.

`settings` says what the scale sets where a run is silent. `build` puts towers, locator and objective together. Two
things may stand before the first step: a detector's proposals (`detector_file`; Table 6 takes them from others), and
encoders that the contrast has trained (`train_encoders`), for small runs that cannot train them as long as the paper.
Whoever trains a run (`2_train`) and whoever opens a finished one come this way, so that the second gets the first
one's model: `given` are the parameters of `2_train` by name, its own or those of a `metrics.json`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from pathlib import Path

from filelock import FileLock

from finematch.data import load
from finematch.data.pairs import Pairs
from finematch.evaluation.retrieval import retrieval
from finematch.models.slan.detector import detector
from finematch.models.slan.locator import SWITCHES, VERSIONS, CachedStages, SelfLocator, Stages, Towers
from finematch.models.slan.objective import SLAN, Unimodal, Words, world
from finematch.training import Plan, by_one_process, fit, load_best, seed_everything
from finematch.workbench import Bench, embed

# What a scale sets where a run does not. `paper`: 4.1 and Tables 6, 7; widths are those of BERT base and of
# torchvision's detectors. `tiny`: pictures of 64 px with `SmallStages`; `photos`: a frozen MobileNetV2's stages 2 to 4.
SETTINGS = {
    "tiny": {
        "size": 64, "maps": 2, "stages": (), "scales": (), "width": 64, "text_depth": 2, "text_heads": 4, "levels": 3,
        "pyramid": 32, "heads": 4, "count": 32, "anchor": 4.0, "query_depth": 1, "query_heads": 4, "top": 10,
        "threshold": 0.5, "samples": 4, "dropout": 0.0, "embed": 64, "queue": 0, "mlm_weight": 0.0, "reg_weight": 0.0,
        "rerank": 16,
        "random_negatives": 0.4, "encoder_epochs": 8, "epochs": 2, "batch_size": 64, "lr": 1e-3, "weight_decay": 0.02,
        "schedule": "cosine", "warmup": 0.1, "clip_norm": 0.0, "precision": "no", "workers": 0, "checkpoint_steps": 0,
    },
    "photos": {
        "size": 224, "maps": 3, "stages": (), "scales": (), "width": 128, "text_depth": 2, "text_heads": 4, "levels": 3,
        "pyramid": 48, "heads": 4, "count": 100, "anchor": 4.0, "query_depth": 1, "query_heads": 4, "top": 10,
        "threshold": 0.5, "samples": 6, "dropout": 0.1, "embed": 128, "queue": 0, "mlm_weight": 0.0, "reg_weight": 0.0,
        "rerank": 16,
        "random_negatives": 0.6, "encoder_epochs": 8, "epochs": 2, "batch_size": 64, "lr": 5e-4, "weight_decay": 0.02,
        "schedule": "cosine", "warmup": 0.1, "clip_norm": 0.0, "precision": "no", "workers": 0, "checkpoint_steps": 0,
    },
    "paper": {
        "size": 224, "maps": 3, "stages": (2, 3, 4), "scales": (), "width": 768, "text_depth": 12, "text_heads": 12,
        "levels": 3, "pyramid": 256, "heads": 12, "count": 100, "anchor": 8.0, "query_depth": 6, "query_heads": 8,
        "top": 10, "threshold": 0.5, "samples": 14, "dropout": 0.0, "embed": 256, "queue": 65536, "mlm_weight": 1.0,
        "reg_weight": 1.0,
        "rerank": 128, "random_negatives": 0.0, "encoder_epochs": 0, "epochs": 20, "batch_size": 1280, "lr": 3e-4,
        "weight_decay": 0.02, "schedule": "linear", "warmup": 0.0, "clip_norm": 0.0, "precision": "bf16",
        "workers": 4, "checkpoint_steps": 500,
    },
}  # fmt: skip
LOCATOR = (
    "width", "levels", "pyramid", "heads", "count", "anchor", "query_depth", "query_heads", "top", "threshold",
    "samples", "dropout",
)  # fmt: skip

# What fine-tuning (`pretrained`) sets at scale `paper`, which says nothing of it but the 384 px at which Table 8 counts
# operations: ALBEF's values for retrieval. On COCO: half the epochs and twice the list.
FINETUNE = {
    "size": 384, "epochs": 10, "batch_size": 256, "lr": 1e-5, "schedule": "cosine", "mlm_weight": 0.0, "rerank": 128,
}  # fmt: skip
FINETUNE_COCO = {"epochs": 5, "rerank": 256}

# Batch sizes of 4.1, by how a timm network is called.
BATCHES = {"resnet50": 1280, "vit_base": 960, "vit_large": 640, "vit_huge": 640}

# The value that leaves a setting to the scale; 0 for all others.
UNSET = {
    "levels": -1, "top": -1, "threshold": -1, "dropout": -1, "queue": -1, "reg_weight": -1,
    "mlm_weight": -1, "precision": "",
    "encoder_epochs": -1,
    "random_negatives": -1,
    "workers": -1, "checkpoint_steps": -1,
}  # fmt: skip


def settings(scale: str, dataset: str, given: dict) -> dict:
    """The settings of a run: the scale's, with those of `given` that are set (see `UNSET`). `tiny` on photos is
    `photos`; at `paper`, `given["vision"]` (a timm name) sets the batch size of 4.1, and `given["pretrained"]` what
    `FINETUNE` has, unless the run is zero-shot.

    `SelfLocator(channels, **{name: s[name] for name in LOCATOR})` takes those of the model. A smoke run
    (`given["smoke"]`) takes one epoch of small batches of small pictures.
    """
    preset = dict(SETTINGS["photos" if scale == "tiny" and not dataset.startswith("scenes") else scale])
    if scale == "paper":
        preset["batch_size"] = next(
            (n for name, n in BATCHES.items() if given.get("vision", "").startswith(name)),
            preset["batch_size"],
        )
        if given.get("pretrained") and not given.get("zero_shot"):
            preset |= FINETUNE | (FINETUNE_COCO if dataset.startswith("coco") else {})
    if given.get("smoke"):
        preset |= {
            "epochs": 1,
            "batch_size": 32,
            "size": 64,
            "encoder_epochs": min(preset["encoder_epochs"], 1),
            "workers": min(preset["workers"], 1),
        }
    return preset | {k: v for k, v in given.items() if k in preset and v != UNSET.get(k, 0)}


def plan(s: Mapping, *, epochs: int, seed: int) -> Plan:
    """How a run with the settings `s` trains: the encoders before, and the whole model."""
    shared = ("batch_size", "lr", "weight_decay", "schedule", "warmup", "clip_norm", "precision", "workers",
              "checkpoint_steps")  # fmt: skip
    return Plan(epochs=epochs, seed=seed, **{name: s[name] for name in shared})


def switches(s: Mapping, given: Mapping) -> dict:
    """The readings of the locator by argument: those of `given`, and its version's where they are empty."""
    called = {"weights": "cell_weights"}  # in a run, where losses have weights too
    chosen = {name: given[called.get(name, name)] for name in SWITCHES if name not in s}
    return chosen | {name: value for name, value in VERSIONS[given["version"]].items() if not chosen[name]}


def build(bench: Bench, s: Mapping, given: Mapping, *, steps_per_epoch: int) -> SLAN:
    """The model with the random weights of its seed: towers (3.1), self-locator (3.2) and objective (3.3).

    Args:
        bench: opened with `backbone="maps"`.
        s, given: the run's `settings`, and its parameters.
        steps_per_epoch: by which `random_negatives`, a share of the run, becomes a number of steps.
    """
    seed_everything(given["seed"])
    cells, text = bench.towers()
    if cells is None:
        image = CachedStages(bench.maps)
    else:  # a plain ViT's blocks are no stages: their maps are all of one size, and only the last is V
        plain = len({stage["reduction"] for stage in cells.net.feature_info}) == 1
        image = Stages(cells, (-1,) if plain else s["stages"])
    towers = Towers(image, text, s["width"])
    locator = SelfLocator(
        towers.channels, **{name: s[name] for name in LOCATOR}, frozen=given["frozen"],
        scales=s["scales"] if len(towers.channels) == 1 else (), **switches(s, given),
    )  # fmt: skip
    weights = {"itc": given["itc_weight"], "itm": given["itm_weight"], "mlm": s["mlm_weight"],
               "reg": s["reg_weight"] if s["levels"] else 0.0}  # fmt: skip
    named = ("momentum", "same_picture", "reduction", "distil", "mlm", "mlm_picture", "match_score")
    return SLAN(
        towers, locator, width=s["width"], words=Words.of(bench.tokenizer), weights=weights, embed=s["embed"],
        queue=s["queue"], random_steps=round(s["random_negatives"] * s["epochs"] * steps_per_epoch),
        **{name: given[name] for name in named},
    )  # fmt: skip


def detector_file(bench: Bench, s: Mapping, given: Mapping, cache: Path) -> Path:
    """Weights of proposals that were trained on the true boxes of the train split, for `load_proposals` (Table 6:
    "loaded from COCO detection"). Nothing else ever sees a box.

    It is made once, in `cache`. Call it before `build`: training it seeds all random states.

    Raises:
        DataError: If the dataset has no boxes in COCO's format (`<dataset>_coco`), or they are of other pictures.
    """
    both = ("train", "val")
    return detector(
        cache / "slan_detector", {name: bench.splits[name].pictures for name in both},
        {name: load(f"{given['dataset']}_coco", bench.data_root, name) for name in both},
        pyramid=s["pyramid"], source=given["source"], anchor=s["anchor"],
    )  # fmt: skip


def train_encoders(
    model: SLAN,
    bench: Bench,
    data: Pairs,
    s: Mapping,
    given: Mapping,
    cache: Path,
    *,
    echo: Callable[[str], None] | None = print,
) -> None:
    """Where the settings give `encoder_epochs`, train the encoders of `model` by the contrast alone, in place.

    Runs that differ in the locator alone share them: they stand in `cache`, and are made again if that was emptied.

    Raises:
        TrainingError: In several processes, if they are not there (`training.by_one_process`).
    """
    if not s["encoder_epochs"]:
        return
    first = plan(s, epochs=s["encoder_epochs"], seed=given["seed"])
    shape = [s[name] for name in ("width", "text_depth", "text_heads", "embed")]
    made_of = [asdict(replace(first, workers=0, checkpoint_steps=0)), *shape, model.form, bench.facts]
    key = hashlib.sha256(json.dumps(made_of).encode()).hexdigest()[:8]
    folder = cache / f"slan_encoders-{given['dataset']}-{key}"
    log = folder / "log.jsonl"
    with FileLock(f"{folder}.lock"):  # runs of a grid start together; one makes what all need
        if world() == 1:  # a finished one is opened, with the random states that it ended with
            fit(Unimodal(model), data, first, folder, evaluate=lambda m: by_contrast(m, bench), select=bench.select,
                echo=echo)  # fmt: skip
        elif not log.is_file() or len(log.read_text().splitlines()) < first.epochs:
            by_one_process(f"what {folder} holds, encoders that the contrast has trained,")
        else:
            load_best(Unimodal(model), folder / "best.safetensors")


def by_contrast(model: SLAN | Unimodal, bench: Bench, split: str = "val") -> dict[str, float]:
    """R@1 and rsum of a split by the contrast alone, every picture against every caption: how an epoch is chosen."""
    side = bench.splits[split]
    found = retrieval(*embed(model, side), side.image_of)
    return {name: found[name] for name in ("i2t_r1", "t2i_r1", "rsum")}
