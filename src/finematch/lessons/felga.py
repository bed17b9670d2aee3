"""FELGA's lesson: the images that its page works on, features made by hand, and its pictures.

Axes as in `models.felga`: `b` images, `c` texts, `r` regions, `k` keywords, `d` width.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import permutations, product

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle
from PIL import Image
from torch import Tensor, nn

from finematch import figures
from finematch.boxes import iou
from finematch.config import Params, root
from finematch.data import load
from finematch.data.record import Object, Record
from finematch.data.splits import data_folder
from finematch.encoders import open_clip_model, small_clip
from finematch.evaluation import average_precision as metric
from finematch.features.fragments import VLP, cut, document
from finematch.features.proposals import Proposals, extract_proposals
from finematch.figures.diagram import diagram
from finematch.models.configs import FELGAConfig
from finematch.models.felga import FELGA, FENet, FragmentPairs, affinity, share_keyword
from finematch.scenes.generator import TOKENIZER, attributes
from finematch.scenes.language import (
    AFTER_NOUN,
    BACKGROUNDS,
    COLOURS,
    SHAPES,
    TEXTURES,
    GrammarNouns,
    plural,
)
from finematch.tables import published
from finematch.text import KeywordMethod, keyword_method, word_level

WIDTH = 32  # of the features made by hand
IMAGES = 200  # of the val split
# What a word says of an object; a caption says "stripy" for striped, and "spots" for dotted.
MEANS = {
    word: (kind, label)
    for kind, table in (("shape", SHAPES), ("colour", COLOURS), ("texture", TEXTURES))
    for label, said in table.items()
    for name in (*said, *(AFTER_NOUN.get(label, ()) if kind == "texture" else ()))
    for word in name.removeprefix("with ").split()
}
MEANS |= {plural(word): MEANS[word] for words in SHAPES.values() for word in words if " " not in word}
PLACES = {phrase.split()[-1] for both in BACKGROUNDS.values() for _, phrase in both}
KINDS = ("noun of a class", "colour", "texture", "background", "other")


# ------------------------------------------------------------------------------------------- images and words
def kind_of(word: str) -> str:
    """What a word of scenes means, one of `KINDS`."""
    kinds = {"shape": "noun of a class", "colour": "colour", "texture": "texture"}
    return "background" if word in PLACES else kinds.get(MEANS.get(word, ("", ""))[0], "other")


def fits(word: str, thing: dict) -> bool:
    """Whether a word says a true shape, colour or texture of an object."""
    kind, label = MEANS.get(word, ("shape", None))
    return thing[kind] == label


def overlaps(boxes, things: list[dict]) -> Float[Tensor, "r t"]:
    """IoU of boxes with the objects of an image."""
    return iou(torch.as_tensor(boxes), torch.tensor([thing["box"] for thing in things]).float())


def goes_with(boxes, keywords: list[str], things: list[dict]) -> Bool[Tensor, "r k"]:
    """Eq. 1, which training never sees: the box shows (IoU of at least one half) an object that the keyword fits."""
    says = torch.tensor([[fits(word, thing) for thing in things] for word in keywords])
    return ((overlaps(boxes, things) >= 0.5).float() @ says.float().T) > 0


@dataclass(frozen=True, eq=False)
class Bench:
    """Images of scenes' val split with what is true of them, their proposals and keywords.

    Attributes:
        batch: the images of the page's batch; the first is the one that it draws.
    """

    folder: str
    records: list[Record]
    truths: list[dict]
    texts: list[str]
    method: KeywordMethod
    found: Proposals
    batch: list[int]

    @property
    def image(self) -> Image.Image:
        """The image that the page draws; its number is `batch[0]`."""
        return self.records[self.batch[0]].open()

    def boxes(self, n: int) -> Float[np.ndarray, "r 4"]:
        return self.found.of(n)

    def keywords(self, n: int) -> list[str]:
        return [word for word, _ in self.method(self.texts[n])]

    def truth(self, n: int, m: int) -> Bool[Tensor, "r k"]:
        """Eq. 1 of the boxes of image n and the keywords of text m."""
        return goes_with(self.boxes(n), self.keywords(m), self.truths[n]["objects"])

    def truth_of_batch(self) -> Bool[Tensor, "b r c k"]:
        """Eq. 1 for every place of the batch."""
        across = [[self.truth(n, m) for m in self.batch] for n in self.batch]
        r, k = (max(one.shape[side] for line in across for one in line) for side in (0, 1))
        padded = [[F.pad(one, (0, k - one.shape[1], 0, r - one.shape[0])) for one in line] for line in across]
        return torch.stack([torch.stack(line, 1) for line in padded])


def bench(p: Params) -> Bench:
    """The images of the page: boxes by selective search, keywords by tf-idf; both are instant.

    The batch begins with the image whose keywords say most of its objects, if all of these are proposed.
    """
    folder = str(data_folder("scenes", root() / p.data_root, root() / p.cache, smoke=p.smoke))
    records, truths = load("scenes", folder, "val")[:IMAGES], attributes(f"{folder}/scenes", "val")[:IMAGES]
    texts = [document(record) for record in records]
    method = keyword_method("words", train=texts, top=p.words)
    with tempfile.TemporaryDirectory() as cache:
        searched = records[: 4 * max(p.pairs, 8)]
        found = extract_proposals(searched, "auto", cache, "val", top=p.regions, min_side=5, echo=None)

    def telling(n: int) -> tuple[bool, int]:
        things = truths[n]["objects"]
        proposed = bool(overlaps(found.of(n), things).amax(0).min() >= 0.5)
        return proposed, sum(any(fits(word, thing) for thing in things) for word, _ in method(texts[n]))

    first = max(range(len(found)), key=telling)
    batch = [(first + n) % len(found) for n in range(min(p.pairs, len(found)))]
    return Bench(folder, records, truths, texts, method, found, batch)


def random_vlp(seed: int) -> VLP:
    """A small CLIP in the published format, opened as any; its weights are random."""
    from transformers import CLIPImageProcessor
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    tokenizer = word_level(TOKENIZER)
    torch.manual_seed(seed)
    ends = {"eos": tokenizer.sep_token_id, "bos": tokenizer.cls_token_id}
    clip = open_clip_model(small_clip(len(tokenizer), **ends, size=64, patch=8, width=WIDTH, depth=1))
    processor = CLIPImageProcessor(size={"shortest_edge": 64}, crop_size={"height": 64, "width": 64})
    with tempfile.TemporaryDirectory() as folder:
        for part in (clip, tokenizer, processor):
            part.save_pretrained(folder)
        return VLP(folder)


class HandMade:
    """Features as a tidy frozen model would give them: each meaning is a random direction.

    A word is its meaning and something of its own, so that synonyms are close; a word without a meaning of shape,
    colour or texture is only its own. A box is what is true of the objects under it, each by its IoU, its background
    and noise.
    """

    def __init__(self, seed: int, noise: float):
        self.randoms, self.noise, self.own = torch.Generator().manual_seed(seed), noise, {}
        self.meaning = {what: self._direction() for what in dict.fromkeys(MEANS.values())}
        self.ground = {name: self._direction() for name in BACKGROUNDS}

    def _direction(self) -> Tensor:
        return F.normalize(torch.randn(WIDTH, generator=self.randoms), dim=0)

    def words(self, keywords: Sequence[str]) -> Float[Tensor, "k d"]:
        """In place of the text tower."""
        for word in keywords:
            if word not in self.own:
                self.own[word] = self._direction()
        own = torch.stack([self.own[word] for word in keywords])
        means = [self.meaning[MEANS[word]] if word in MEANS else torch.zeros(WIDTH) for word in keywords]
        known = torch.tensor([word in MEANS for word in keywords])[:, None]
        return torch.stack(means) + torch.where(known, 0.3, 1.0) * own

    def regions(self, boxes, truth: dict) -> Float[Tensor, "r d"]:
        """In place of the image tower."""
        things = torch.stack([sum(self.meaning[kind, thing[kind]] for kind in ("shape", "colour", "texture"))
                              for thing in truth["objects"]])  # fmt: skip
        noise = torch.stack([self._direction() for _ in boxes])
        around = 0.5 * self.ground[truth["background"]]
        return overlaps(boxes, truth["objects"]) @ things + around + self.noise * noise

    def batch(self, of: Bench) -> dict[str, dict[str, Tensor]]:
        """The batch of a bench as `FELGA` takes it."""
        said = [of.keywords(n) for n in of.batch]
        number = {word: n for n, word in enumerate(sorted({word for one in said for word in one}), start=1)}
        regions = [self.regions(of.boxes(n), of.truths[n]) for n in of.batch]
        ids = [torch.tensor([number[word] for word in one]) for one in said]
        image = {"features": _padded(regions), "mask": _padded([torch.ones(len(x)) for x in regions]).bool()}
        text = {"features": _padded([self.words(one) for one in said]), "keyword_id": _padded(ids)}
        return {"image": image, "text": text | {"mask": text["keyword_id"] > 0}}


def _padded(parts: list[Tensor]) -> Tensor:
    return nn.utils.rnn.pad_sequence(parts, batch_first=True)


@torch.no_grad()
def set_weights(net: FENet, first: Sequence[Sequence[float]] = ((1.0, 0.0), (0.0, 1.0))) -> None:
    """Weights that we choose, for a FENet of width 2: the identity in all layers but the first, no bias."""
    for n, layer in enumerate(part for part in net if isinstance(part, nn.Linear)):
        layer.weight.copy_(torch.tensor(first) if n == 0 else torch.eye(2))
        layer.bias.zero_()


# ------------------------------------------------------------------------------------------- the metric's example
CLASSES = ["cat", "dog", "person", "boat"]
SHOWN = {"A": ["cat"], "B": ["person"], "C": ["cat", "dog"], "D": [], "E": ["cat", "person"]}
SAID = {
    "A": "a kitten on a sofa",
    "B": "a man at sea",
    "C": "a cat and a dog",
    "D": "an empty room",
    "E": "the cat of a friend",
}


def gallery() -> list[Record]:
    """Five images with their objects and captions, without pixels."""
    box = (8, 8, 40, 40)
    return [Record(name, "val", (SAID[name],), size=(64, 64), objects=tuple(Object(box, c) for c in shown))
            for name, shown in SHOWN.items()]  # fmt: skip


def random_rankings(of: Bench) -> pd.DataFrame:
    """mAP of a random ranking on scenes, in per cent, for each task and kind of relevance."""
    records = load("scenes_coco", of.folder, "val")[:IMAGES]
    names = sorted({thing.category for record in records for thing in record.objects})
    class_of = torch.tensor([query.category for query in metric.query_boxes(records, names)])
    synonyms = {label: others for label, (_, *others) in SHAPES.items()}
    shows = metric.category_relevance(records, names).sum(1)
    says = metric.lexical_relevance([document(r) for r in records], names, synonyms=synonyms).sum(1)
    counts = {"object discovery": shows, "description assignment, category": shows[class_of],
              "description assignment, lexical": says[class_of],
              "description assignment, instance": torch.ones_like(class_of)}  # fmt: skip
    chance = {
        name: 100 * float(metric.expected_random(n[n > 0], len(records)).mean()) for name, n in counts.items()
    }
    return pd.DataFrame({"random ranking": chance})


def printed(table: int) -> pd.DataFrame:
    """A table of the paper as it is printed: "discovery 2017" and the like in columns, in per cent."""
    task = {"Object Discovery": "discovery", "Description Assignment": "assignment"}
    numbers = published("FELGA", table)
    short = numbers.column.str.extract(r"COCO (?P<year>\d+) (?P<task>.+)")
    numbers = numbers.assign(column=short.task.map(task) + " " + short.year)
    wide = numbers.pivot(index="row", columns="column", values="value")
    return wide.loc[numbers.row.unique(), list(numbers.column.unique())]


# ------------------------------------------------------------------------------------------- what a keyword wins
@dataclass(frozen=True)
class Judged:
    """Both tasks in per cent; by kind of word how many boxes it wins (%) and the assignment mAP of these (%)."""

    discovery: float
    assignment: float
    random: float
    share: dict[str, float]
    map_of: dict[str, float]


class Study:
    """FENet on features made by hand, learnt with all keywords or with nouns; judged with all of them.

    The boxes are those of the objects. Three images of five are learnt from, the others are searched.
    """

    def __init__(self, of: Bench, made: HandMade):
        nouns = keyword_method("words", train=of.texts, top=of.method.top, nouns=GrammarNouns())
        self.keywords = {name: [[word for word, _ in method(text)] for text in of.texts]
                         for name, method in (("all", of.method), ("nouns", nouns))}  # fmt: skip
        spoken = {word for words in self.keywords.values() for one in words for word in one}
        self.vocabulary = sorted(spoken | set(SHAPES))  # the names of the classes are queries
        self.words = F.normalize(made.words(self.vocabulary), dim=-1)
        boxes = [torch.tensor([thing["box"] for thing in one["objects"]]).float() for one in of.truths]
        self.regions = [made.regions(box, one) for box, one in zip(boxes, of.truths, strict=True)]
        self.cut = 3 * len(of.truths) // 5
        self.searched = load("scenes_coco", of.folder, "val")[:IMAGES][self.cut :]

    def pairs(self, keywords: str, rows: range) -> FragmentPairs:
        """Images and texts as training pairs, or as a gallery."""
        number = {word: n for n, word in enumerate(self.vocabulary)}
        ids = [torch.tensor([number[w] for w in self.keywords[keywords][n]], dtype=torch.long) for n in rows]
        regions = [self.regions[n] for n in rows]
        masks = [_padded([torch.ones(len(x), dtype=torch.bool) for x in part]) for part in (regions, ids)]
        ids = _padded(ids)
        return FragmentPairs(_padded(regions), self.words[ids], *masks, ids)

    def learn(self, keywords: str, seed: int, epochs: int) -> FELGA:
        """FENet after some epochs of Eq. 10, dynamic labels, by the paper's optimiser."""
        torch.manual_seed(seed)
        config = FELGAConfig(hidden_dim=64, out_dim=32, alignment="local")
        model, pairs = FELGA(WIDTH, config).train(), self.pairs(keywords, range(self.cut))
        optimiser = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)
        for _ in range(epochs):
            for index in torch.randperm(len(pairs)).split(8):
                optimiser.zero_grad()
                model(pairs.__getitems__(index.tolist()))["loss"].backward()
                optimiser.step()
        return model.eval()

    @torch.no_grad()
    def judge(self, region: Callable[[Tensor], Tensor], word: Callable[[Tensor], Tensor]) -> Judged:
        """Both tasks with the embeddings that two functions make of frozen features."""
        classes = sorted({thing.category for record in self.searched for thing in record.objects})
        class_of = torch.tensor([query.category for query in metric.query_boxes(self.searched, classes)])
        relevant = metric.category_relevance(self.searched, classes)
        gallery = self.pairs("all", range(self.cut, len(self.regions)))
        queries = region(torch.cat(self.regions[self.cut :]))
        written = gallery.keyword_id[gallery.keyword_mask].unique().tolist()
        best = (queries @ word(self.words[written]).T).argmax(1).tolist()
        winner = np.array([kind_of(self.vocabulary[written[n]]) for n in best])

        def assign(chosen: np.ndarray) -> dict:
            texts = word(gallery.keywords), gallery.keyword_mask
            return metric.average_precision(queries[chosen], *texts, relevant, class_of[chosen])

        number = {name: n for n, name in enumerate(self.vocabulary)}
        names = word(self.words[[number[name] for name in classes]])
        images = region(gallery.regions), gallery.region_mask
        found = metric.average_precision(names, *images, relevant, torch.arange(len(classes)))
        whole = assign(np.full(len(winner), True))
        won = {kind: winner == kind for kind in KINDS}
        return Judged(
            found["map"], whole["map_expected"], whole["random"],
            {kind: 100 * float(of.mean()) for kind, of in won.items()},
            {kind: assign(of)["map_expected"] if of.any() else float("nan") for kind, of in won.items()},
        )  # fmt: skip


def share_of_kinds(words: Sequence[str]) -> dict[str, float]:
    """Share of each kind among words, in per cent."""
    kinds = [kind_of(word) for word in words]
    return {kind: 100 * kinds.count(kind) / len(kinds) for kind in KINDS}


# ------------------------------------------------------------------------------------------- false negatives
SAID_BY = ("the same keyword", "another keyword that means it", "a word that is no keyword", "no word")


def said_by(word: str, keywords: Sequence[str], text: str) -> str:
    """By what a text says the meaning of a word, one of `SAID_BY`."""
    if word in keywords:
        return SAID_BY[0]
    if any(other in MEANS and MEANS[other] == MEANS[word] for other in keywords):
        return SAID_BY[1]
    return SAID_BY[2 if any(MEANS.get(other.lower()) == MEANS[word] for other in text.split()) else 3]


def winners(of: Bench, made: HandMade) -> pd.DataFrame:
    """Each image with the text of each other image: a line for the fragments that win Eq. 11, with frozen features.

    `shared`: the text has a keyword in common with the image's own; `right`: Eq. 1 of the winners; `by`: for these, by
    what the image's own text says what the winning keyword means. All images with proposals are taken.
    """
    of = replace(of, batch=list(range(len(of.found))))
    batch, truth = made.batch(of), of.truth_of_batch()
    (image, text), rows = (batch["image"], batch["text"]), []
    near = affinity(F.normalize(image["features"], dim=-1), F.normalize(text["features"], dim=-1))
    near = near.masked_fill(~(image["mask"][:, :, None, None] & text["mask"]), -2)
    shared = share_keyword(text["keyword_id"], text["mask"])
    keywords = [of.keywords(n) for n in of.batch]
    for k, m in permutations(range(len(of.batch)), 2):
        i, j = divmod(int(near[k, :, m].argmax()), near.shape[-1])
        right = bool(truth[k, i, m, j])
        by = said_by(keywords[m][j], keywords[k], of.texts[of.batch[k]]) if right else ""
        rows.append({"shared": bool(shared[k, m]), "right": right, "by": by})
    return pd.DataFrame(rows)


# ------------------------------------------------------------------------------------------- pictures
def draw_problem(of: Bench) -> None:
    """The image with its proposals and the text with its keywords are given; which belong together is not (Eq. 1)."""
    n = of.batch[0]
    boxes, keywords = of.boxes(n), of.keywords(n)
    figure = plt.figure(figsize=(8.6, 4.6))
    places = figure.add_gridspec(
        2, 3, height_ratios=(2.3, 1), hspace=0.52, wspace=0.3, left=0.02, right=0.99, top=0.92, bottom=0.02
    )
    half = -(-len(boxes) // 2)
    for column, start in enumerate((0, half)):
        ax, some = figure.add_subplot(places[0, column]), range(start, min(start + half, len(boxes)))
        lines = figures.show_boxes(ax, of.image, boxes[some.start : some.stop])
        _label_boxes(ax, boxes[some.start : some.stop], [str(k + 1) for k in some], lines)
        ax.set_title(f"proposals {some.start + 1} to {some.stop}", pad=10)
    right = figure.add_subplot(places[0, 2])
    _cells(right, 0.7 * of.truth(n, n), keywords)
    right.set_title("which belongs to which (Eq. 1)?", pad=10)
    under = figure.add_subplot(places[1, :])
    words = [word for caption in of.records[n].captions for word in f"{caption.rstrip('.')}.".split()]
    shades = [float(word.rstrip(".").lower() in keywords) for word in words]
    figures.show_words(under, words, shades, top=2.0, size=9)
    under.set_title(f"the text, {len(of.records[n].captions)} captions, and its {len(keywords)} keywords")


# corners first, then places on the edges, as shares of a box's sides
_ON_EDGES = ((0, 0), (1, 0), (0, 1), (1, 1), (0.5, 0), (0.5, 1), (0, 0.5), (1, 0.5), (0.25, 0), (0.75, 1))


def _label_boxes(
    ax: Axes, boxes: Float[np.ndarray, "r 4"], names: Sequence[str], lines: Sequence[Rectangle]
) -> None:
    """A name on the edge of each box, in its colour, where no other name stands."""
    taken: list[np.ndarray] = []
    size = np.array([ax.get_xlim()[1], ax.get_ylim()[0]]) / 12  # of a name

    def free(at: np.ndarray) -> bool:
        return all((np.abs(at - other) > size).any() for other in taken)

    for (x1, y1, x2, y2), name, line in zip(boxes, names, lines, strict=True):
        places = [np.array([x1 + u * (x2 - x1), y1 + v * (y2 - y1)]) for u, v in _ON_EDGES]
        taken.append(max(places, key=free))  # the first free one
        frame = {"facecolor": "white", "edgecolor": line.get_edgecolor(), "pad": 1.4, "linewidth": 1.2}
        ax.text(*taken[-1], name, fontsize=8, ha="center", va="center", clip_on=False, bbox=frame)


def draw_model(recorded: Mapping[str, str]) -> None:
    """The model: two frozen towers, one FENet for both, pseudo-labels beside it, two losses and their sum.

    Args:
        recorded: shapes by name, see `lessons.shapes`.
    """
    s = recorded
    parts = {
        "region\nproposals": (0, 0, "data"),
        "keywords": (0, 2, "data"),
        "image tower\n(Eq. 2)": (1, 0, "frozen"),
        "text tower\n(Eq. 2)": (1, 2, "frozen"),
        "FENet\n(Eq. 8)": (2, 0.5, "trained"),
        "pseudo-labels\n(Eq. 3 to 6)": (2, 1.5, "step"),
        "all cosines\n(Eq. 9)": (3, 0.5, "step"),
        "fragment loss\n(Eq. 10)": (3, 1.5, "step"),
        "best fragments\n(Eq. 11)": (4, 0.5, "step"),
        "pair loss\n(Eq. 12)": (4, 1.5, "step"),
        "labels of pairs\n(Eq. 7)": (4, 2.5, "step"),
        "sum (Eq. 13)": (3, 2.5, "step"),
    }
    arrows = [
        ("region\nproposals", "image tower\n(Eq. 2)", ""),
        ("keywords", "text tower\n(Eq. 2)", ""),
        ("image tower\n(Eq. 2)", "FENet\n(Eq. 8)", s["f_v"]),
        ("text tower\n(Eq. 2)", "FENet\n(Eq. 8)", s["f_t"]),
        ("image tower\n(Eq. 2)", "pseudo-labels\n(Eq. 3 to 6)", s["f_v"]),
        ("text tower\n(Eq. 2)", "pseudo-labels\n(Eq. 3 to 6)", s["f_t"]),
        ("FENet\n(Eq. 8)", "all cosines\n(Eq. 9)", f"{s['regions']}\n{s['words']}"),
        ("all cosines\n(Eq. 9)", "fragment loss\n(Eq. 10)", s["similarity"]),
        ("pseudo-labels\n(Eq. 3 to 6)", "fragment loss\n(Eq. 10)", s["labels"]),
        ("all cosines\n(Eq. 9)", "best fragments\n(Eq. 11)", s["similarity"]),
        ("best fragments\n(Eq. 11)", "pair loss\n(Eq. 12)", s["largest"]),
        ("labels of pairs\n(Eq. 7)", "pair loss\n(Eq. 12)", s["pairs"]),
        ("fragment loss\n(Eq. 10)", "sum (Eq. 13)", s["fragment"]),
        ("pair loss\n(Eq. 12)", "sum (Eq. 13)", s["global"]),
    ]
    diagram(parts, arrows, cell=(1.85, 0.86), box=(1.12, 0.44))


def draw_crops(image: Image.Image, boxes: Float[np.ndarray, "r 4"]) -> None:
    """Each proposal as the image tower gets it: cut out, without what is around it."""
    columns = min(len(boxes), 10)
    rows = -(-len(boxes) // columns)
    _, axes = plt.subplots(
        rows, columns, figsize=(7.2, 0.95 * rows + 0.1), layout="constrained", squeeze=False
    )
    for ax in axes.flat:
        ax.set_axis_off()
    for n, (ax, box) in enumerate(zip(axes.flat, boxes, strict=False)):
        ax.imshow(cut(image, box))
        ax.set_title(str(n + 1), fontsize=8, loc="center", pad=2)


def draw_labels(
    similarity: Float[Tensor, "r k"],
    labels: Mapping[str, Bool[Tensor, "r k"]],
    truth: Bool[Tensor, "r k"],
    keywords: Sequence[str],
) -> None:
    """The cosines of one image and its text, and each kind of label; a dark cell is a positive, a dot is right."""
    _, axes = plt.subplots(
        1, 1 + len(labels), figsize=(8.6, 1.4 + 0.18 * len(truth)), layout="constrained", sharey=True
    )
    _cells(axes[0], similarity.clamp(min=0), keywords, high=0.8, cmap=figures.COOL)
    axes[0].set_title(f"cosines, mean {float(similarity.mean()):.2f}")
    for ax, (kind, chosen) in zip(axes[1:], labels.items(), strict=True):
        _cells(ax, 0.7 * chosen, keywords)
        ax.set_title(f"{kind}: {int(chosen.sum())}, right {int((chosen & truth).sum())}")
    for ax in axes:
        ax.plot(*truth.nonzero().T.flip(0), "o", color=figures.PALETTE[1], markersize=3.6, markeredgecolor="white",
                markeredgewidth=0.5)  # fmt: skip


def _cells(
    ax: Axes, values: Tensor, across: Sequence[str], *, high: float = 1.0, cmap: str = "Greys"
) -> None:
    """A matrix "r k" as shades, a row for each proposal and a column for each keyword."""
    ax.imshow(np.asarray(values, float), cmap=cmap, vmin=0, vmax=high, aspect="auto")
    step = max(1, -(-len(values) // 20))
    ax.set_yticks(range(0, len(values), step), [str(n + 1) for n in range(0, len(values), step)], fontsize=7)
    ax.set_xticks(range(len(across)), across, fontsize=7, rotation=90)
    ax.set_ylabel("proposal")
    ax.tick_params(length=0)
    ax.spines[:].set_visible(False)


def draw_matrices(
    panels: Mapping[str, Tensor], rows: Sequence[str], columns: Sequence[str], *, signed: float = 0.0,
    label: str = "", pairs: Tensor | None = None,
) -> None:  # fmt: skip
    """Small matrices side by side, dark is much; a thick frame is around each place of `pairs`, those of one pair.

    Args:
        signed: 0: values lie between 0 and 1. Otherwise between -signed and signed, and 0 is white.
    """
    size = (0.6 + 0.5 * max(3, len(columns)), 0.5 + 0.36 * max(3, len(rows)))
    _, axes = plt.subplots(
        1, len(panels), figsize=(size[0] * len(panels) + 0.6, size[1]), layout="constrained", squeeze=False
    )
    for ax, (title, values) in zip(axes.flat, panels.items(), strict=True):
        scale = {"low": -signed, "high": signed or 1.0, "signed": bool(signed)}
        figures.matrix(ax, values.detach(), rows, columns, label=label, **scale)
        ax.set_title(title)
        for i, j in [] if pairs is None else pairs.nonzero().tolist():
            ax.add_patch(
                Rectangle((j - 0.44, i - 0.44), 0.88, 0.88, fill=False, edgecolor=figures.WRONG, linewidth=2)
            )


def draw_cosines(samples: Mapping[str, Tensor]) -> None:
    """Cosines of unrelated fragments, as histograms: at the left fragments differ, at the right all are one vector."""
    _, ax = plt.subplots(figsize=(5.6, 2.2), layout="constrained")
    for n, (name, values) in enumerate(samples.items()):
        look = {"color": figures.PALETTE[n], "linestyle": figures.DASHES[n], "linewidth": 1.6, "label": name}
        ax.hist(values.numpy(), np.linspace(-0.2, 1, 61), density=True, histtype="step", **look)
    ax.set(xlabel="cosine of two fragments", ylabel="density", xlim=(-0.2, 1))
    ax.legend(loc="upper center")


def draw_lambda(
    axis: Sequence[float], losses: Mapping[str, list[float]], lengths: Mapping[str, list[float]]
) -> None:
    """The loss moves with lambda, the gradient of the weights does not, unless a hinge is closed or squared."""
    _, axes = plt.subplots(1, 2, figsize=(7.2, 2.7), layout="constrained")
    for k, name in enumerate(losses):
        look = {"color": figures.PALETTE[k], "marker": figures.MARKERS[k], "linestyle": figures.DASHES[k]}
        axes[0].plot(axis, losses[name], label=name, markevery=2, **look)
        axes[1].plot(axis, lengths[name], markevery=2, **look)
    high = max(losses["anchor"]) + 2
    axes[0].set(ylabel="loss", title="λ moves the loss", ylim=(min(losses["anchor"]) - 1, 2 * high))
    axes[0].legend()
    axes[1].set_yscale("symlog", linthresh=0.5, linscale=0.4)
    axes[1].set(ylabel="length of the gradient", title="without a hinge λ changes no gradient")
    ticks = [tick for tick in (0, 0.5, 1, 2, 5, 10, 20, 50) if tick < 2 * max(map(max, lengths.values()))]
    axes[1].set_yticks(ticks, [str(tick) for tick in ticks])
    axes[1].minorticks_off()
    axes[1].set_ylim(-0.03, ticks[-1])
    for ax in axes:
        ax.axvline(0.5, color=figures.FAINT, linestyle=":", linewidth=1, marker="")
        ax.set_xlabel(r"$\lambda_1 = \lambda_2$")
    axes[1].text(0.7, 0.05, "the paper's", fontsize=7, rotation=90, ha="left", va="bottom")


def draw_temperature(taus: Sequence[float], shares: Sequence[float], equal: float, at_one: float) -> None:
    """The share of the push that the one hard negative takes: all at a low temperature, hardly more than equal at 1."""
    _, ax = plt.subplots(figsize=(4.4, 2.3), layout="constrained")
    ax.plot(taus, shares, marker="")
    ax.axhline(equal, color=figures.FAINT, linestyle=":", marker="")
    ax.text(0.05, equal + 0.02, " an equal share", fontsize=7)
    ax.plot(1, at_one, "o", color=figures.INK)
    ax.annotate("the paper's τ", (1, at_one), (0.62, at_one + 0.2), fontsize=7,
                arrowprops={"arrowstyle": "-", "color": figures.FAINT})  # fmt: skip
    ax.set(xscale="log", xlabel="temperature τ", ylabel="share of the push")
    ax.set_xticks([0.05, 0.1, 0.2, 0.5, 1, 2], ["0.05", "0.1", "0.2", "0.5", "1", "2"])
    ax.minorticks_off()


Path = tuple[Tensor, Tensor]  # angles in degrees of regions "s b r" and words "s b k", after each step


def draw_circles(start: Path, runs: Mapping[str, Path]) -> None:
    """Regions on the outer circle, keywords on the inner one, each with the way that it has come; four per row."""
    panels = {"the start": start, **runs}
    rows = -(-len(panels) // 4)
    _, axes = plt.subplots(rows, 4, figsize=(7.8, 0.3 + 2 * rows), layout="constrained", squeeze=False)
    for n, (ax, (title, run)) in enumerate(zip(axes.flat, panels.items(), strict=True)):
        _circle(ax, run, title, names=n == 0)
    marks = (
        ("o", figures.INK, "region"),
        ("^", "white", "the head, a second region"),
        ("s", figures.INK, "keyword"),
    )
    handles = [plt.Line2D([], [], color=figures.INK, marker=mark, linestyle="", markerfacecolor=face, label=text)
               for mark, face, text in marks]  # fmt: skip
    axes[0, 0].figure.legend(handles=handles, loc="outside lower center", ncols=3)


def _circle(ax: Axes, run: Path, title: str, *, names: bool) -> None:
    called = ((("dog", "head", "ball"), ("cat", "head", "tree")), (("“dog”", "“ball”"), ("“cat”", "“tree”")))
    for radius, track, mark, far, says in (
        (1.0, run[0], "o", 1.32, called[0]),
        (0.72, run[1], "s", 0.38, called[1]),
    ):
        ax.add_patch(plt.Circle((0, 0), radius, fill=False, edgecolor="#d8dee4", linewidth=0.8))
        for b, k in product(range(2), range(track.shape[2])):
            angle = np.deg2rad(track[:, b, k].numpy())
            x, y = np.cos(angle), np.sin(angle)
            colour, head = figures.PALETTE[b], mark == "o" and k == 1
            ax.plot(radius * x, radius * y, "-", color=colour, marker="", linewidth=2.4, alpha=0.4)
            ax.plot(radius * x[-1], radius * y[-1], "^" if head else mark, color=colour, markersize=6,
                    markerfacecolor="white" if head else colour, markeredgewidth=1.2, zorder=3)  # fmt: skip
            if names:
                ax.text(far * x[-1], far * y[-1], says[b][k], fontsize=7, ha="center", va="center")
    ax.set(xlim=(-1.55, 1.55), ylim=(-1.45, 1.45), aspect="equal")
    ax.set_title(title, fontsize=8)
    ax.set_axis_off()


def draw_rankings(rankings: Mapping[str, Sequence[tuple[str, bool]]]) -> None:
    """A row a query: the items from the first rank to the last; a relevant one is dark and has its precision."""
    _, ax = plt.subplots(figsize=(5.4, 0.5 + 0.5 * len(rankings)), layout="constrained")
    for y, items in enumerate(rankings.values()):
        found = 0
        for x, (name, relevant) in enumerate(items):
            found += relevant
            face = figures.PALETTE[0] if relevant else "white"
            ax.add_patch(Rectangle((x + 0.54, y - 0.4), 0.92, 0.8, facecolor=face, edgecolor=figures.FAINT))
            text = f"{name}: {found}/{x + 1}" if relevant else name
            ax.text(
                x + 1,
                y,
                text,
                ha="center",
                va="center",
                fontsize=8,
                color="white" if relevant else figures.INK,
            )
    places = max(map(len, rankings.values()))
    ax.set(xlim=(0.5, places + 0.5), ylim=(len(rankings) - 0.5, -0.5), xlabel="rank")
    ax.set_xticks(range(1, places + 1))
    ax.set_yticks(range(len(rankings)), list(rankings))
    ax.tick_params(length=0)
    ax.spines[:].set_visible(False)


def draw_winners(trials: Mapping[str, Judged]) -> None:
    """Left: which kind of word is a box's best keyword; right: how well the boxes are assigned that it wins."""
    _, axes = plt.subplots(1, 2, figsize=(8.6, 2.7), layout="constrained")
    for ax, part, title in (
        (axes[0], "share", "boxes that a word of this kind wins (%)"),
        (axes[1], "map_of", "description assignment of these boxes, mAP (%)"),
    ):
        figures.bars(ax, [kind.replace(" of a class", "") for kind in KINDS],
                     {name: list(getattr(one, part).values()) for name, one in trials.items()})  # fmt: skip
        ax.set_title(title)
    random = next(iter(trials.values())).random
    line = axes[1].axhline(random, color=figures.INK, linestyle="--", linewidth=1, marker="")
    axes[1].legend([line], ["a random ranking"], loc="upper right")
