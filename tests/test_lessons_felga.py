"""What FELGA's lesson makes beside its page: the truth, features by hand, a diagram whose shapes are recorded."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from matplotlib import pyplot as plt

from finematch.lessons import felga as lesson
from finematch.models.felga import FENet

THINGS = [
    {"shape": "heart", "colour": "blue", "texture": "dotted", "box": (0, 0, 10, 10)},
    {"shape": "cross", "colour": "black", "texture": "striped", "box": (20, 20, 40, 40)},
]


def test_a_box_goes_with_what_is_true_of_its_object():
    boxes = torch.tensor([[0, 0, 10, 12], [20, 20, 40, 40], [0, 0, 40, 40]]).float()
    found = lesson.goes_with(boxes, ["hearts", "cobalt", "stripes", "left"], THINGS)
    assert found.int().tolist() == [[1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 0]]
    assert [lesson.kind_of(word) for word in ("hearts", "cobalt", "stripes", "dusk", "left")] == list(
        lesson.KINDS
    )


def test_features_by_hand_bring_a_box_to_its_words():
    made = lesson.HandMade(seed=0, noise=0.0)
    words = F.normalize(made.words(["heart", "blue", "cobalt", "cross", "left"]), dim=-1)
    truth = {"objects": THINGS, "background": "sky"}
    box = F.normalize(made.regions(torch.tensor([[0.0, 0, 10, 10]]), truth), dim=-1)
    assert words[1] @ words[2] > 0.8  # synonyms
    heart, blue, cobalt, cross, left = (box @ words.T)[0].tolist()
    assert min(heart, blue, cobalt) > max(cross, left) + 0.1
    assert torch.equal(made.words(["left"]), made.words(["left"]))


def test_chosen_weights_leave_positive_vectors_as_they_are():
    net = FENet(2, hidden_dim=2, out_dim=2, dropout=0.0)
    lesson.set_weights(net)
    assert torch.allclose(net(torch.tensor([[3.0, 4.0]])), torch.tensor([[0.6, 0.8]]))


def test_the_diagram_has_the_recorded_shapes():
    names = (
        "f_v",
        "f_t",
        "regions",
        "words",
        "similarity",
        "labels",
        "largest",
        "pairs",
        "fragment",
        "global",
    )
    lesson.draw_model({name: f"<{name}>" for name in names})
    drawn = "\n".join(text.get_text() for text in plt.gcf().axes[0].texts)
    plt.close("all")
    assert all(f"<{name}>" in drawn for name in names)
    with pytest.raises(KeyError, match="f_v"):
        lesson.draw_model({})


def test_a_text_says_a_meaning_by_a_keyword_or_otherwise():
    keywords = ["heart", "cobalt", "left"]
    text = "A heart with DOTS lies at the left"
    words = ("cobalt", "blue", "dotted", "striped")
    assert tuple(lesson.said_by(word, keywords, text) for word in words) == lesson.SAID_BY
    assert lesson.said_by("hearts", keywords, text) == lesson.SAID_BY[1]


def test_small_matrices_with_a_sign_are_white_at_0():
    lesson.draw_matrices(
        {"slopes": torch.tensor([[-0.5, 0.0], [0.25, 0.1]])}, ["i", "j"], ["k", "l"], signed=0.5
    )
    ax = plt.gcf().axes[0]
    drawn = ax.images[0]
    at_0, at_ends = drawn.cmap(drawn.norm(0.0)), [drawn.cmap(drawn.norm(end)) for end in (-0.5, 0.5)]
    plt.close("all")
    assert min(at_0[:3]) > 0.95
    assert all(min(end[:3]) < 0.5 for end in at_ends)
