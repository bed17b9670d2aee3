"""SCAN's text-to-image score: the paper's formula pair by pair, padding, tiles, and a case worked by hand."""

import math

import pytest
import torch
import torch.nn.functional as F

from finematch.evaluation.cross_attention import text_to_image


def plain(regions, words, temperature=9.0, sharpness=6.0):
    """The formula for one image and one caption, every context made."""
    regions, words = F.normalize(regions, dim=-1), F.normalize(words, dim=-1)
    s = F.leaky_relu(regions @ words.T, 0.1)  # n l
    s = s / s.norm(dim=1, keepdim=True)
    context = (temperature * s).softmax(0).T @ regions  # l d
    near = F.cosine_similarity(words, context, dim=1)
    return torch.log(torch.exp(sharpness * near).sum()) / sharpness, near.mean()


def data(lengths, b=4, n=5, d=12):
    torch.manual_seed(0)
    regions, words = torch.randn(b, n, d).double(), torch.randn(len(lengths), max(lengths), d).double()
    return regions, words, torch.arange(max(lengths))[None] < torch.tensor(lengths)[:, None]


@pytest.mark.parametrize("tile", [1, 7, 4096])
def test_it_is_the_papers_formula_for_captions_of_any_length(tile):
    lengths = [3, 7, 3, 1, 6]
    regions, words, mask = data(lengths)
    for pooling, which in (("lse", 0), ("mean", 1)):
        found = text_to_image(regions, words, mask, pooling=pooling, tile=tile)
        for i, image in enumerate(regions):
            for j, length in enumerate(lengths):
                assert found[i, j] == pytest.approx(float(plain(image, words[j, :length])[which]), abs=1e-12)


def test_what_stands_in_the_padding_does_not_matter():
    regions, words, mask = data([2, 6])
    other = torch.where(mask[..., None], words, torch.full_like(words, 1e6))
    assert torch.equal(text_to_image(regions, words, mask), text_to_image(regions, other, mask))


def test_a_caption_whose_only_word_is_a_region_attends_to_it():
    regions = torch.eye(3)[None, :2]
    words, mask = torch.eye(3)[None, :1], torch.ones(1, 1, dtype=torch.bool)
    # similarities 1 and 0: the context is (e, 1) with e = exp(9), and the caption's only word decides
    near = math.exp(9) / math.hypot(math.exp(9), 1)
    assert float(text_to_image(regions, words, mask)) == pytest.approx(near, abs=1e-6)


def test_what_it_refuses():
    regions, words, mask = data([2, 6])
    with pytest.raises(ValueError, match="pooling is 'max'"):
        text_to_image(regions, words, mask, pooling="max")
    mask[1] = False
    with pytest.raises(ValueError, match="caption 1 has no words"):
        text_to_image(regions, words, mask)
