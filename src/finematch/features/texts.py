"""Token states of a frozen text model, extracted once."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from finematch.data.pairs import StateSource
from finematch.encoders import BertTower
from finematch.text import tokenise
from finematch.training import write_atomically


@torch.no_grad()
def text_states(
    captions: list[str],
    tower: BertTower,
    tokenizer: PreTrainedTokenizerBase,
    folder: str | Path,
    split: str,
    *,
    key: str,
    max_length: int = 32,
    block: int = 256,
) -> StateSource:
    """Token states of a frozen text model for every caption, cached in fp16 under `key` and memory-mapped.

    The hash of `key` (the model's, see `fingerprint`) and of the captions names the file: other captions or
    another model make another file.

    Raises:
        ValueError: For a caption whose states are not finite in fp16, or without a known word.
    """
    digest = hashlib.sha256(json.dumps([key, max_length, captions]).encode()).hexdigest()[:16]
    path = Path(folder) / f"{split}_text_{digest}.npz"
    states_path = path.with_suffix(".npy")
    if not (path.exists() and states_path.exists()):
        path.parent.mkdir(parents=True, exist_ok=True)
        ragged = tokenise(captions, tokenizer, max_length=max_length)
        device = next(tower.parameters()).device
        order = np.argsort(ragged.lengths, kind="stable")  # captions of one length need no padding
        part = states_path.with_name(f"{states_path.name}.part")
        states = np.lib.format.open_memmap(part, "w+", np.float16, (len(ragged.ids), tower.width))
        for i in range(0, len(order), block):
            index = order[i : i + block]
            tokens = tower.eval()(**{k: v.to(device) for k, v in ragged.batch(index).items()})
            found = tokens.states.half()
            if not torch.isfinite(found[tokens.mask]).all():
                bad = (~torch.isfinite(found).all(-1) & tokens.mask).any(1).int().argmax()
                raise ValueError(
                    f"caption {index[bad]} ({captions[index[bad]]!r}): a state is not finite in fp16; "
                    "check the model's weights"
                )
            for row, c in enumerate(index):
                states[ragged.start[c] : ragged.start[c + 1]] = found[row, : ragged.lengths[c]].cpu().numpy()
        states.flush()
        del states
        part.replace(states_path)

        def save(temporary: Path) -> None:
            with open(temporary, "wb") as file:
                np.savez(file, special=ragged.special, start=ragged.start)

        write_atomically(path, save)
    index = np.load(path)
    return StateSource(np.load(states_path, mmap_mode="r"), index["special"], index["start"])
