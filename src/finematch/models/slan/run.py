"""One run of SLAN, from its parameters to the model before its first step: 4.1, implementation details.

`build` puts towers, locator and objective together. Two
things may stand before the first step: a detector's proposals (`detector_file`; Table 6 takes them from others), and
encoders that the contrast has trained (`train_encoders`), for small runs that cannot train them as long as the paper.
Whoever trains a run (`2_train`) and whoever opens a finished one come this way, so that the second gets the first
one's model: `s` are the settings of `2_train`, its own or those of a `metrics.json`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

from filelock import FileLock

from finematch.config import Settings
from finematch.data import load
from finematch.data.pairs import Pairs
from finematch.evaluation.retrieval import retrieval
from finematch.models.configs import LocatorConfig, SLANConfig
from finematch.models.slan.detector import detector
from finematch.models.slan.locator import CachedStages, SelfLocator, Stages, Towers
from finematch.models.slan.objective import SLAN, Unimodal, Words, world
from finematch.training import Plan, by_one_process, fit, load_best, seed_everything
from finematch.workbench import Bench, embed


def plan(s: Settings, *, epochs: int, seed: int) -> Plan:
    """How a run with the settings `s` trains: the encoders before, and the whole model."""
    shared = ("batch_size", "lr", "weight_decay", "schedule", "warmup", "clip_norm", "precision", "workers",
              "checkpoint_steps")  # fmt: skip
    return Plan(epochs=epochs, seed=seed, **{name: getattr(s, name) for name in shared})


def build(bench: Bench, s: Settings, *, steps_per_epoch: int) -> SLAN:
    """The model with the random weights of its seed: towers (3.1), self-locator (3.2) and objective (3.3).

    Args:
        bench: opened with `backbone="maps"`.
        s: the run's settings.
        steps_per_epoch: by which `random_negatives`, a share of the run, becomes a number of steps.
    """
    seed_everything(s.seed)
    cells, text = bench.towers()
    if cells is None:
        image = CachedStages(bench.maps)
    else:  # a plain ViT's blocks are no stages: their maps are all of one size, and only the last is V
        plain = len({stage["reduction"] for stage in cells.net.feature_info}) == 1
        image = Stages(cells, (-1,) if plain else s.stages)
    towers = Towers(image, text, s.width)
    locator = SelfLocator(
        towers.channels, LocatorConfig.of(s, scales=s.scales if len(towers.channels) == 1 else ())
    )
    config = SLANConfig.of(s, reg_weight=s.reg_weight if s.levels else 0.0)
    random_steps = round(s.random_negatives * s.epochs * steps_per_epoch)
    return SLAN(towers, locator, config, words=Words.of(bench.tokenizer), random_steps=random_steps)


def detector_file(bench: Bench, s: Settings, cache: Path) -> Path:
    """Weights of proposals that were trained on the true boxes of the train split, for `load_proposals` (Table 6:
    "loaded from COCO detection"). Nothing else ever sees a box.

    It is made once, in `cache`. Call it before `build`: training it seeds all random states.

    Raises:
        DataError: If the dataset has no boxes in COCO's format (`<dataset>_coco`), or they are of other pictures.
    """
    both = ("train", "val")
    return detector(
        cache / "slan_detector", {name: bench.splits[name].pictures for name in both},
        {name: load(f"{s.dataset}_coco", bench.data_root, name) for name in both},
        LocatorConfig.of(s),
    )  # fmt: skip


def train_encoders(
    model: SLAN,
    bench: Bench,
    data: Pairs,
    s: Settings,
    cache: Path,
    *,
    echo: Callable[[str], None] | None = print,
) -> None:
    """Where the settings give `encoder_epochs`, train the encoders of `model` by the contrast alone, in place.

    Runs that differ in the locator alone share them: they stand in `cache`, and are made again if that was emptied.

    Raises:
        TrainingError: In several processes, if they are not there (`training.by_one_process`).
    """
    if not s.encoder_epochs:
        return
    first = plan(s, epochs=s.encoder_epochs, seed=s.seed)
    shape = [getattr(s, name) for name in ("width", "text_depth", "text_heads", "embed")]
    made_of = [asdict(replace(first, workers=0, checkpoint_steps=0)), *shape, model.form, bench.facts]
    key = hashlib.sha256(json.dumps(made_of).encode()).hexdigest()[:8]
    folder = cache / f"slan_encoders-{s.dataset}-{key}"
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
