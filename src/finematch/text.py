"""Tokenisers, and captions as ragged token ids.

Real runs use BERT's WordPiece vocabulary, the embedded set a small word vocabulary that is committed, CLIP
its own byte-pair encoding. A caption that is cut to `max_length` keeps its closing token.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer
from transformers import AutoTokenizer, BertTokenizerFast, PreTrainedTokenizerBase, PreTrainedTokenizerFast


def wordpiece(vocabulary: str | Path) -> PreTrainedTokenizerBase:
    """BERT's uncased WordPiece tokeniser from a `vocab.txt`, a folder, or a hub name.

    Raises:
        ValueError: If the vocabulary lacks BERT's special tokens (a wrong file would otherwise turn every
            caption into [UNK] without a word).
    """
    path = Path(vocabulary)
    if path.is_file():
        words = path.read_text(encoding="utf-8").splitlines()
        missing = [t for t in ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]") if t not in words]
        if missing:
            raise ValueError(f"{path}: {missing} not among its {len(words)} lines; give BERT's vocab.txt")
        return BertTokenizerFast(vocab={w: i for i, w in enumerate(words)}, do_lower_case=True)
    return AutoTokenizer.from_pretrained(str(vocabulary))


def word_level(tokenizer: str | Path) -> PreTrainedTokenizerFast:
    """A tokeniser from a `tokenizers` JSON file with BERT's special tokens (the embedded set's)."""
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_file(str(tokenizer)), pad_token="[PAD]", unk_token="[UNK]",
        cls_token="[CLS]", sep_token="[SEP]", mask_token="[MASK]",
    )  # fmt: skip


@dataclass
class Ragged:
    """Token ids of many captions without padding: caption i is `ids[start[i]:start[i + 1]]`."""

    ids: np.ndarray  # int32, all tokens of all captions
    special: np.ndarray  # bool, the same length: [CLS], [SEP], <start>, <end>
    start: np.ndarray  # int64, captions + 1
    pad: int = 0

    def __len__(self) -> int:
        return len(self.start) - 1

    @property
    def lengths(self) -> np.ndarray:
        return np.diff(self.start)

    def batch(self, index) -> dict[str, torch.Tensor]:
        """`input_ids`, `mask`, `special`, each "b n", padded to the longest of the batch."""
        where, mask = padded(self.start, np.asarray(index))
        ids = np.where(mask, self.ids[where], self.pad).astype(np.int64)
        return {
            "input_ids": torch.from_numpy(ids),
            "mask": torch.from_numpy(mask),
            "special": torch.from_numpy(self.special[where] & mask),
        }


def padded(start: np.ndarray, index: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Positions "b n" into a flat ragged array, and the mask "b n" of those that are real (others point at 0)."""
    lengths = start[index + 1] - start[index]
    column = np.arange(int(lengths.max()))
    mask = column[None] < lengths[:, None]
    return np.where(mask, start[index][:, None] + column[None], 0), mask


def tokenise(captions: list[str], tokenizer: PreTrainedTokenizerBase, *, max_length: int = 32) -> Ragged:
    """Captions as `Ragged` ids with the tokenizer's special tokens, cut to `max_length`.

    Raises:
        ValueError: For a caption of which nothing but special or unknown tokens is left; the message names
            it. (One such caption is a typo; all of them are a wrong vocabulary.)
    """
    if not captions:
        raise ValueError("no captions to tokenise")
    encoded = tokenizer(captions, truncation=True, max_length=max_length, return_special_tokens_mask=True)
    ids, special, start = [], [], [0]
    for i, (row, mask) in enumerate(zip(encoded["input_ids"], encoded["special_tokens_mask"], strict=True)):
        words = [t for t, m in zip(row, mask, strict=True) if not m and t != tokenizer.unk_token_id]
        if not words:
            raise ValueError(
                f"caption {i} ({captions[i]!r}) has no known word in this vocabulary: "
                "check that the tokenizer belongs to the data"
            )
        ids.extend(row)
        special.extend(mask)
        start.append(len(ids))
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
    return Ragged(np.asarray(ids, np.int32), np.asarray(special, bool), np.asarray(start, np.int64), pad)
