"""What SLAN's lesson makes beside its page: the toy's data and measures, the example, a walk under Eq. 2."""

from __future__ import annotations

import pytest
import torch

from finematch.lessons import slan as lesson
from finematch.lessons import slan_toy as toy


def test_each_image_of_the_toy_comes_once_with_either_sentence():
    found = toy.pairs(8, torch.Generator().manual_seed(1))
    assert torch.equal(found.images[:4], found.images[4:])
    assert torch.equal(found.boxes[:4], found.boxes[4:].flip(1))
    assert torch.equal(found.colours[:4], found.colours[4:].flip(1))
    assert (found.colours[:, 0] != found.colours[:, 1]).all()
    paint = torch.tensor(list(toy.COLOURS.values()))
    for image, boxes, colours in zip(found.images, found.boxes, found.colours, strict=True):
        for (x1, y1, x2, y2), colour in zip((64 * boxes).long().tolist(), colours, strict=True):
            assert (image[:, y1:y2, x1:x2].mean((1, 2)) - paint[colour]).abs().max() < 0.1


def test_the_absent_colour_is_not_in_the_image():
    model = toy.build(0)
    made = toy.batch(model, torch.Generator().manual_seed(2), n=8)
    found = toy.pairs(8, torch.Generator().manual_seed(2))
    named = model.encode_text(**toy.sentence(found.colours[:, 0]))
    torch.testing.assert_close(made.named.words, named.words)
    for colour in found.colours.T:
        other = model.encode_text(**toy.sentence(colour))
        assert (made.absent.words != other.words).flatten(1).any(1).all()


def test_every_two_words_of_the_toy_meet_in_a_held_out_image():
    colours = {tuple(pair) for pair in toy.held_out().colours.tolist()}
    assert len(colours) == len(toy.COLOURS) * (len(toy.COLOURS) - 1)


def test_a_region_goes_to_the_thing_and_with_the_printed_axes_it_does_not():
    start = torch.tensor([[0.42, 0.42, 0.58, 0.58]])
    off = [(lesson.walk(start, axes=axes)[-1] - lesson.THING).norm() for axes in ("image", "paper")]
    assert off[0] < 0.06
    assert off[1] > 0.3


def test_an_example_without_two_different_captions_is_refused():
    truth = {"objects": [{}] * 3, "captions": [{"mentions": [{"objects": [0]}]}] * 5}
    with pytest.raises(ValueError, match="none of 1 images"):
        lesson.example(lesson.Scenes([None], [truth], None))
