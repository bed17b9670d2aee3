"""Tokenisers and ragged batches, on vocabularies that the tests write."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import BertConfig

from finematch.scenes.generator import TOKENIZER
from finematch.text import Ragged, padded, tokenise, word_level, wordpiece

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
WORDS = [*SPECIAL, "a", "two", "dog", "##s", "run", "##ning", "on", "the", "beach", "man", "."]


@pytest.fixture
def vocabulary(tmp_path):
    path = tmp_path / "vocab.txt"
    path.write_text("\n".join(WORDS) + "\n", encoding="utf-8")
    return path


def words(tokenizer, ids) -> list[str]:
    return tokenizer.convert_ids_to_tokens([int(i) for i in ids])


def caption(tokenizer, ragged: Ragged, i: int) -> list[str]:
    return words(tokenizer, ragged.ids[ragged.start[i] : ragged.start[i + 1]])


# ------------------------------------------------------------------------------------------ vocabularies
def test_wordpiece_from_a_file_keeps_the_files_numbering(vocabulary):
    tokenizer = wordpiece(vocabulary)
    assert len(tokenizer) == len(WORDS)
    ids = tokenizer("Two dogs running.")["input_ids"]
    assert ids == [WORDS.index(w) for w in ("[CLS]", "two", "dog", "##s", "run", "##ning", ".", "[SEP]")]


@pytest.mark.parametrize("saved", [True, False])
def test_wordpiece_from_a_folder(vocabulary, tmp_path, saved):
    """As `save_pretrained` leaves it, and as BERT was first published: vocab.txt and a configuration."""
    folder = tmp_path / "bert"
    BertConfig(vocab_size=len(WORDS)).save_pretrained(folder)
    if saved:
        wordpiece(vocabulary).save_pretrained(folder)
    else:
        (folder / "vocab.txt").write_text(vocabulary.read_text())
    tokenizer = wordpiece(folder)
    assert words(tokenizer, tokenizer("A man.")["input_ids"]) == ["[CLS]", "a", "man", ".", "[SEP]"]


@pytest.mark.parametrize("lost", SPECIAL)
def test_a_vocabulary_without_berts_special_tokens_is_refused(vocabulary, lost):
    vocabulary.write_text("\n".join(w for w in WORDS if w != lost))
    with pytest.raises(
        ValueError, match=rf"vocab\.txt: \['\{lost[:-1]}\]'\] not among its {len(WORDS) - 1} lines"
    ):
        wordpiece(vocabulary)


def test_a_vocabulary_of_another_language_is_refused(vocabulary):
    """It has the special tokens, so only the captions can tell."""
    vocabulary.write_text("\n".join([*SPECIAL, "ein", "hund", "mann"]))
    with pytest.raises(ValueError, match=r"caption 0 \('Two dogs on the beach'\) has no known word"):
        tokenise(["Two dogs on the beach", "A man"], wordpiece(vocabulary))


def test_a_caption_of_unknown_words_is_named(vocabulary):
    with pytest.raises(ValueError, match=r"caption 1 \('xyzzy plugh'\)"):
        tokenise(["a dog", "xyzzy plugh"], wordpiece(vocabulary))
    assert len(tokenise(["a dog", "xyzzy dog"], wordpiece(vocabulary))) == 2
    with pytest.raises(ValueError, match="no captions"):
        tokenise([], wordpiece(vocabulary))


def test_word_level_is_the_embedded_sets():
    tokenizer = word_level(TOKENIZER)
    ids = tokenizer("A small red circle")["input_ids"]
    assert words(tokenizer, ids) == ["[CLS]", "a", "small", "red", "circle", "[SEP]"]
    assert tokenizer.pad_token_id == 0


def test_word_level_from_a_json_file(tmp_path):
    made = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    made.save(str(tmp_path / "t.json"))
    tokenizer = word_level(tmp_path / "t.json")
    got = tokenise(["a dog"], tokenizer)
    assert caption(tokenizer, got, 0) == ["[CLS]", "a", "dog", "[SEP]"]
    assert got.special.tolist() == [True, False, False, True]


def test_berts_own_vocabulary(real_data):
    tokenizer = wordpiece(real_data / "vocab" / "bert-base-uncased-vocab.txt")
    assert len(tokenizer) == 30522
    assert tokenizer("a")["input_ids"] == [101, 1037, 102]


# ------------------------------------------------------------------------------------------ captions
def test_tokens_are_those_of_the_tokenizers_own_call(vocabulary):
    """Also of a caption that is cut, and where a special token stands in the text: that one is a word."""
    texts = ["a man on the beach .", "dog", "two dogs [SEP] on the beach a man two dogs", "xyzzy dog"]
    tokenizer = wordpiece(vocabulary)
    tokenizer(["a", "two dogs"], padding=True)  # whatever was asked of it before
    got = tokenise(texts, tokenizer, max_length=9)
    wanted = tokenizer(texts, truncation=True, max_length=9, return_special_tokens_mask=True)
    assert got.ids.tolist() == [one for row in wanted["input_ids"] for one in row]
    assert got.special.tolist() == [bool(one) for row in wanted["special_tokens_mask"] for one in row]
    assert got.lengths.tolist() == [len(row) for row in wanted["input_ids"]] == [8, 3, 9, 4]


@pytest.mark.parametrize("text", ["a man on the beach .", "Two dogs", "dog"])
def test_first_and_last_word_stay_in_the_vocabulary(vocabulary, text):
    """Captions written as `b'...'` by Python 2 code made the first and the last word of each unknown."""
    tokenizer = wordpiece(vocabulary)
    got = caption(tokenizer, tokenise([text], tokenizer), 0)
    assert got[0] == "[CLS]"
    assert got[-1] == "[SEP]"
    assert "[UNK]" not in got
    assert got[1] == text.lower().split()[0]
    assert "".join(w.removeprefix("##") for w in got[1:-1]) == text.lower().replace(" ", "")


@pytest.mark.parametrize("length", [3, 4, 7, 8, 9])
def test_truncation_keeps_the_closing_token(vocabulary, length):
    tokenizer = wordpiece(vocabulary)
    whole = ["[CLS]", "two", "dog", "##s", "on", "the", "beach", "[SEP]"]
    got = tokenise(["two dogs on the beach"], tokenizer, max_length=length)
    expected = whole if length >= len(whole) else [*whole[: length - 1], "[SEP]"]
    assert caption(tokenizer, got, 0) == expected
    assert got.special.tolist() == [True] + [False] * (len(expected) - 2) + [True]


def test_batch_equals_a_naive_loop(vocabulary):
    tokenizer = wordpiece(vocabulary)
    captions = ["a dog", "two dogs running on the beach", "the man", "a man running"]
    ragged = tokenise(captions, tokenizer)
    assert len(ragged) == 4
    assert ragged.lengths.tolist() == [4, 10, 4, 6]
    for index in ([0, 1, 2, 3], [3, 0], [2], [1, 1, 0]):
        rows = [tokenizer(captions[i])["input_ids"] for i in index]
        longest = max(map(len, rows))
        ids, mask, special = (
            torch.zeros(len(index), longest, dtype=t) for t in (torch.long, torch.bool, torch.bool)
        )
        for i, row in enumerate(rows):
            for j, token in enumerate(row):
                ids[i, j], mask[i, j] = token, True
                special[i, j] = j in (0, len(row) - 1)
        got = ragged.batch(index)
        assert set(got) == {"input_ids", "mask", "special"}
        for name, value in (("input_ids", ids), ("mask", mask), ("special", special)):
            assert got[name].dtype == value.dtype
            assert torch.equal(got[name], value), (index, name)


def test_padding_is_the_tokenizers_own_and_never_special():
    ragged = Ragged(np.array([7, 8, 9], np.int32), np.array([True, True, True]), np.array([0, 1, 3]), pad=5)
    got = ragged.batch([0, 1])
    assert got["input_ids"].tolist() == [[7, 5], [8, 9]]
    assert got["mask"].tolist() == got["special"].tolist() == [[True, False], [True, True]]


def test_padded_positions():
    where, mask = padded(np.array([0, 2, 3, 6]), np.array([2, 1]))
    assert where.tolist() == [[3, 4, 5], [2, 0, 0]]
    assert mask.tolist() == [[True, True, True], [True, False, False]]


@pytest.mark.parametrize("word", ["\u2028", "\u2029", "\x85", "\x0b", "\x0c", "\x1c"])
def test_only_a_line_feed_ends_a_line_of_a_vocabulary(tmp_path, word):
    path = tmp_path / "vocab.txt"
    path.write_text("\n".join([*SPECIAL, "a", word, "dog", "cat"]) + "\n", encoding="utf-8", newline="\n")
    tokenizer = wordpiece(path)
    assert tokenise(["dog cat"], tokenizer).ids.tolist() == [2, 7, 8, 3]
    assert len(tokenizer) == 9


def test_a_repeated_line_shifts_no_id(tmp_path):
    path = tmp_path / "vocab.txt"
    path.write_text("\n".join([*SPECIAL, "dog", "cat", "dog", "bird", "dog"]), encoding="utf-8")
    tokenizer = wordpiece(path)
    assert tokenise(["dog cat bird"], tokenizer).ids.tolist() == [
        2,
        9,
        6,
        8,
        3,
    ]  # the last line, as BERT has it
    assert len(tokenizer) == 10  # what towers are built with


@pytest.mark.parametrize("mark", ["", "\ufeff"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_a_vocabulary_from_another_system(tmp_path, mark, end):
    path = tmp_path / "vocab.txt"
    path.write_bytes((mark + end.join([*SPECIAL, "dog", "cat"]) + end).encode())
    assert tokenise(["dog cat"], wordpiece(path)).ids.tolist() == [2, 5, 6, 3]


def test_a_vocabulary_in_another_encoding_is_refused(tmp_path):
    path = tmp_path / "vocab.txt"
    path.write_bytes("\n".join([*SPECIAL, "caf\u00e9"]).encode("latin-1"))
    with pytest.raises(ValueError, match=r"vocab\.txt is no UTF-8 text"):
        wordpiece(path)
