"""Do views correspond: areas worked by hand, and pairs made so that the answer is known."""

from __future__ import annotations

import pytest
import torch

from finematch.evaluation.correspondence import correspondence, inside, on_span, pieces
from finematch.scenes.generator import TOKENIZER
from finematch.text import tokenise, word_level, wordpiece


def test_inside_counts_overlapping_boxes_once():
    regions = torch.tensor([[0.0, 0, 4, 4], [0, 0, 2, 2], [3, 3, 4, 4], [1, 0, 5, 1]])
    boxes = torch.tensor([[0.0, 0, 2, 2], [1, 0, 3, 2]])  # their union is 3 x 2
    assert inside(regions, boxes).tolist() == pytest.approx([6 / 16, 1, 0, 2 / 4])


def test_inside_a_union_with_a_hole_between_boxes():
    boxes = torch.tensor([[0.0, 0, 1, 3], [2, 0, 3, 1]])
    assert inside(torch.tensor([[0.0, 0, 3, 3]]), boxes).tolist() == pytest.approx([4 / 9])


def test_inside_equals_counting_pixels():
    g = torch.Generator().manual_seed(0)

    def some(n):
        low = torch.randint(0, 20, (n, 2), generator=g)
        return torch.cat([low, low + torch.randint(1, 12, (n, 2), generator=g)], 1).float()

    regions, boxes = some(30), some(4)
    y, x = torch.meshgrid(torch.arange(32) + 0.5, torch.arange(32) + 0.5, indexing="ij")
    at = torch.stack([x, y], -1)[:, :, None]

    def within(b):  # h w n
        return ((at > b[:, :2]) & (at < b[:, 2:])).all(-1)

    union, own = within(boxes).any(-1), within(regions)
    counted = (own & union[..., None]).sum((0, 1)) / own.sum((0, 1))
    assert torch.allclose(inside(regions, boxes), counted.float())


@pytest.mark.parametrize("wrong", [torch.zeros(0, 4), torch.tensor([[0.0, 0, 0, 1]])])
def test_inside_refuses(wrong):
    right = torch.tensor([[0.0, 0, 1, 1]])
    with pytest.raises(ValueError, match="regions"):
        inside(wrong, right)
    with pytest.raises(ValueError, match="boxes"):
        inside(right, wrong)


def test_tokens_of_a_span():
    offsets = [(0, 0), (0, 1), (2, 5), (5, 7), (8, 12), (0, 0)]  # [CLS] a cri ##ms star [SEP]
    assert on_span(offsets, 2, 7).tolist() == [False, False, True, True, False, False]
    assert on_span(offsets, 0, 12).tolist() == [False, True, True, True, True, False]


def test_pieces_of_the_embedded_set():
    found = pieces("A red star", word_level(TOKENIZER))
    assert found.words == ["[CLS]", "A", "red", "star", "[SEP]"]
    assert found.word_of == [0, 1, 2, 3, 4]
    assert found.offsets == [(0, 0), (0, 1), (2, 5), (6, 10), (0, 0)]


def test_pieces_of_wordpieces_and_of_a_caption_that_is_cut(tmp_path):
    vocabulary = tmp_path / "vocab.txt"
    words = "[PAD] [UNK] [CLS] [SEP] [MASK] a cri ##ms ##on , dog"
    vocabulary.write_text(words.replace(" ", "\n"))
    tokenizer, caption = wordpiece(vocabulary), "A  crimson, dog a dog"
    found = pieces(caption, tokenizer)
    assert found.words == ["[CLS]", "A", "crimson,", "dog", "a", "dog", "[SEP]"]
    assert found.word_of == [0, 1, 2, 2, 2, 2, 3, 4, 5, 6]
    assert [caption[low:high] for low, high in found.offsets[1:6]] == ["A", "cri", "ms", "on", ","]
    cut = pieces(caption, tokenizer, max_length=5)
    assert cut.words == ["[CLS]", "A", "crimson,", "[SEP]"]
    assert tokenise([caption], tokenizer, max_length=5).lengths.tolist() == [len(cut.offsets)]


def made(p: int, v: int, *, one_to_one: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Phrases of which each is one view's, on both sides alike or independently; two phrases a caption."""
    g = torch.Generator().manual_seed(3)
    image = torch.rand(p, v, generator=g) * 0.1
    text = torch.rand(p, v, generator=g) * 0.1
    mine = torch.randint(v, (p,), generator=g)
    theirs = mine if one_to_one else torch.randint(v, (p,), generator=g)
    image[torch.arange(p), mine] += 1
    text[torch.arange(p), theirs] += 1
    return image, text, torch.arange(p) // 2


def test_views_that_correspond_are_found():
    found = correspondence(*made(400, 8, one_to_one=True))
    assert found["agreement"] == 1
    assert found["agreement_shuffled"] == pytest.approx(1 / 8, abs=0.03)
    assert found["agreement_p"] < 0.001
    assert found["diagonal"] > found["off_diagonal"] + 0.1
    assert found["diagonal_p"] < 0.001
    assert (found["phrases"], found["captions"]) == (400, 200)


def test_views_that_do_not_correspond_are_not():
    found = correspondence(*made(400, 8, one_to_one=False))
    assert found["agreement_chance"] == 1 / 8
    assert found["agreement"] < found["agreement_shuffled_high"]
    assert found["agreement_p"] > 0.05
    assert found["diagonal_p"] > 0.05


def test_a_view_that_always_wins_is_no_correspondence():
    image, text, caption = made(400, 8, one_to_one=False)
    image[:, 2] += 9
    text[:, 2] += 9
    found = correspondence(image, text, caption)
    assert found["agreement"] == 1
    assert found["agreement_shuffled"] == 1
    assert found["agreement_p"] == 1
    assert found["winners"][:, 2].tolist() == [1, 1]


def test_the_matrix_by_hand():
    image = torch.tensor([[0.2, 0.1], [0.2, 0.3]])  # shares of view 0: 1/2 1/2, of view 1: 1/4 3/4
    text = torch.tensor([[0.6, 0.0], [0.2, 0.5]])  # 3/4 1/4, and 0 1
    found = correspondence(image, text, torch.tensor([7, 7]), shuffles=10)
    assert found["matrix"].flatten().tolist() == pytest.approx([0.75, 0.5, 0.5, 0.75])
    assert found["diagonal"] == pytest.approx(0.75)
    assert found["off_diagonal"] == pytest.approx(0.5)


def test_the_same_seed_gives_the_same_answer():
    data = made(60, 4, one_to_one=False)
    first, second = correspondence(*data, shuffles=50), correspondence(*data, shuffles=50)
    assert first["agreement_p"] == second["agreement_p"]
    assert first["diagonal_p"] == second["diagonal_p"]


def test_correspondence_refuses():
    image, text, caption = made(20, 4, one_to_one=True)
    with pytest.raises(ValueError, match="two of each"):
        correspondence(image[:, :1], text[:, :1], caption)
    with pytest.raises(ValueError, match="no caption has several"):
        correspondence(image, text, torch.arange(20))
    with pytest.raises(ValueError, match="text: weights"):
        correspondence(image, -text, caption)
