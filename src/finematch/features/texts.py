"""Token states of a frozen text model, extracted once."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from finematch.data.pairs import StateSource
from finematch.encoders import BertTower
from finematch.files import cached, digest, new_array
from finematch.text import tokenise


def text_states(
    captions: list[str],
    tower: BertTower,
    tokenizer: PreTrainedTokenizerBase,
    cache: str | Path,
    split: str,
    *,
    key: str,
    max_length: int = 32,
    block: int = 256,
) -> StateSource:
    """Token states of a frozen text model for every caption, cached in fp16 and memory-mapped.

    They are found in the cache by the model's `key` (see `fingerprint`), the tokenizer and the captions.

    Args:
        split: what messages call the captions.

    Raises:
        ValueError: For a caption whose states are not finite in fp16, or without a known word.
        DataError: For states that were damaged since, or a disk without room for them.
    """

    @torch.no_grad()
    def make(folder: Path) -> None:
        ragged = tokenise(captions, tokenizer, max_length=max_length)
        device = next(tower.parameters()).device
        order = np.argsort(ragged.lengths, kind="stable")  # captions of one length need no padding
        states = new_array(folder / "states.npy", np.float16, (len(ragged.ids), tower.width))
        for i in range(0, len(order), block):
            index = order[i : i + block]
            tokens = tower.eval()(**{k: v.to(device) for k, v in ragged.batch(index).items()})
            found = tokens.states.half()
            if not torch.isfinite(found[tokens.mask]).all():
                bad = (~torch.isfinite(found).all(-1) & tokens.mask).any(1).int().argmax()
                raise ValueError(
                    f"{split}: caption {index[bad]} ({captions[index[bad]]!r}): a state is not finite in fp16; "
                    "check the model's weights"
                )
            for row, c in enumerate(index):
                states[ragged.start[c] : ragged.start[c + 1]] = found[row, : ragged.lengths[c]].cpu().numpy()
        states.flush()
        np.savez(folder / "index.npz", special=ragged.special, start=ragged.start)

    whole = {
        "model": key,
        "tokenizer": words_of(tokenizer),
        "max_length": max_length,
        "captions": digest(captions),
    }
    folder = cached(cache, "text_states", whole, make)
    index = np.load(folder / "index.npz")
    return StateSource(np.load(folder / "states.npy", mmap_mode="r"), index["special"], index["start"])


def words_of(tokenizer: PreTrainedTokenizerBase) -> str:
    """SHA-256 of what a tokenizer does with a text; of the vocabulary alone where it has no fast form."""
    fast = getattr(tokenizer, "backend_tokenizer", None)
    if fast is None:
        return digest(tokenizer.get_vocab())
    said = json.loads(fast.to_str())
    return digest(
        {name: part for name, part in said.items() if name not in ("padding", "truncation")}
    )  # a call's own
