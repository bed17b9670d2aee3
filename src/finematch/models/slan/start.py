"""What stands before the first step of a small run: encoders that the contrast (Eq. 5-6) alone has trained.

The paper's BERT comes trained, and its vision encoder meets 14 million images twenty times. A small run has no such
time.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from pathlib import Path

import torch

from finematch.checkpoints import load_best, random_states, restore_random_states, state_digest
from finematch.data.pairs import Pairs
from finematch.files import cached, write_atomically
from finematch.losses import world
from finematch.models.slan.objective import SLAN, Unimodal
from finematch.training import Plan, by_one_process, fit, seed_everything


def train_encoders(
    model: SLAN,
    pairs: Pairs,
    plan: Plan,
    cache: str | Path,
    key: Mapping,
    *,
    evaluate: Callable[[Unimodal], dict[str, float]],
    select: str = "rsum",
    echo: Callable[[str], None] | None = print,
) -> None:
    """Train the encoders of `model` by the contrast alone, in place.

    Runs that differ in the locator alone share them: they stand in `cache`, with the random states after them, so that
    a run goes on as if it had trained them itself. For that, nothing here may depend on what the locator drew: the
    projections and the order of the pairs are drawn anew from the plan's seed. The key has the digest of all weights
    that they begin with.

    Args:
        key: what the encoders depend on beside their weights at the start, which of these are trained, the plan and the
            form of the contrast: words, data, features.
        evaluate, select: as of `training.fit`.

    Raises:
        TrainingError: In several processes, if they are not there (`training.by_one_process`).
    """
    encoders = Unimodal(model)
    seed_everything(plan.seed)
    model.encoders.draw_projections()
    trained = sorted(name for name, p in encoders.named_parameters() if p.requires_grad)
    made_of = {"plan": asdict(replace(plan, workers=0, checkpoint_steps=0)), "form": model.form,
               "begins": state_digest(encoders.state_dict()), "trained": trained, **key}  # fmt: skip

    def make(folder: Path) -> None:
        by_one_process("what the cache lacks, encoders that the contrast has trained,")
        fit(encoders, pairs, plan, folder, evaluate=evaluate, select=select, echo=echo)
        write_atomically(folder / "random.pt", lambda path: torch.save(random_states(), path))
        (folder / "checkpoint.pt").unlink(missing_ok=True)

    folder = cached(cache, "slan_encoders", made_of, make)
    load_best(encoders, folder / "best.safetensors")
    model.restart_momentum()
    if world() == 1:  # several processes have states of their own
        restore_random_states(torch.load(folder / "random.pt", weights_only=True))
