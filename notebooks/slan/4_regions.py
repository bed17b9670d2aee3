# %% [markdown]
# # SLAN: the regions that words choose
#
# **Paper** *SLAN: Self-Locator Aided Network for Vision-Language Understanding* (ICCV 2023; version 1, with an appendix, on arXiv in 2022).
# This notebook serves Figures 3, 5 and 6 of the ICCV paper (regions after each step; three coloured words and the region of each; coarse to
# fine) and Figures 5, 7 and 8 of arXiv's (regions during training; before and after the filter; retrieved pictures). The paper's figures come with
# sentences and without numbers:
#
# > "our region adaptor produces text-specific results with relatively high confidence"
#
# > "our self-locator hierarchically refines the related regions of provided words"
#
# > "as training progresses, the regions of interest outputed by our model gradually become accurate"
#
# Each is measured here beside its figure, over the whole split. The pictures are the first of the split, or those that `example` asks
# for; none is chosen by what the model does on it. A question that is asked of a run is answered from two standard errors on, and "undecided" below.
#
# | on | cost, one core |
# |---|---|
# | a smoke run | half a minute, 1 GB |
# | scenes, 500 test pictures | four to five minutes, of which three repeat the first steps of the run (`replay`) |
# | photos, 1,000 pictures | a minute, and the steps that are repeated |
#
# It needs a finished run of `slan/2_train` with its weights.
#
# **Expected** The numbers of the run come back from its weights, and asserts hold them together. Whether boxes land on what is named is printed
# as measured. Nobody ever told the model where anything is.

# %% tags=["parameters"]
run: str = "latest"  # folder of the run, or latest; a grid's row joins the figures' names
example: int = 0  # number of the picture (of the reported split) that the figures begin with
pictures: int = 3  # pictures a figure
top: int = 5  # retrieved pictures a sentence
replay: int = 312  # first steps of the run that are trained again, to see regions change; 0 is none
dataset: str = ""  # empty, or the run's own dataset; another one is refused
data_root: str = ""  # folder above the dataset's own; empty is the run's
scale: str = ""  # empty, or the run's own scale; another one is refused
seed: int = -1  # -1, or the run's own seed; another one is refused
out: str = "papermill_runs/slan_regions"  # folder of metrics.json
figures: str = "figures"  # folder of the figures; those that show photos go to `out` instead
smoke: bool = False  # few steps again, and `.smoke.` in the figures' names

# %% jupyter={"source_hidden": true}
from finematch.config import parameters, root

p = parameters(
    globals(), example=(0, 10**7), pictures=(1, 6), top=(2, 10), replay=(0, 10**6), seed=(-1, 2**31)
)

# %%
import itertools
import json
import math
import time

import numpy as np
import pandas as pd
import torch
from IPython.display import Markdown, display
from matplotlib import patheffects
from matplotlib import pyplot as plt
from matplotlib.patches import Rectangle
from torch import Tensor

from finematch import figures as draw
from finematch.boxes import convert, iou
from finematch.data import load
from finematch.scenes.generator import attributes
from finematch.scenes.language import solutions
from finematch.evaluation.correspondence import inside, on_span, pieces
from finematch.evaluation.grounding import GroundedPhrase
from finematch.evaluation.retrieval import retrieval
from finematch.runs import open_run, write_metrics
from finematch.tables import to_markdown
from finematch.models.slan.objective import SLAN, pair_scorer, seen_and_given
from finematch.rebuild import slan_begun, slan_plan
from finematch.text import tokenise
from finematch.training import (
    EpochBatches, accelerator, device_name, make_optimizer, make_schedule, to_device,
)  # fmt: skip
from finematch.evaluation.embedding import embed
from finematch.evaluation.phrases import annotated_phrases, located_phrases

draw.style()
started = time.monotonic()
device = accelerator()


def show(frame: pd.DataFrame, digits: int = 1) -> None:
    """A table; its index becomes the first column."""
    display(Markdown(to_markdown(frame.reset_index(), digits=digits)))


# %% [markdown]
# ## A run comes back
#
# `metrics.json` holds the parameters that a run was made with, `best.safetensors` the weights of its best epoch. With both, the model
# is the same again, built as `2_train` builds it. The model before its first step with the locator ("untrained" below) comes back too, for the seed is known and
# what was trained before (encoders, a detector) stands in the cache.

# %%
run = open_run(p.run, method="slan", smoke=p.smoke) if p.run == "latest" else open_run(p.run)
of_run = run.parameters
for key in ("dataset", "scale", "seed"):
    if getattr(p, key) not in ("", -1, of_run[key]):
        raise ValueError(f"{key} = {getattr(p, key)!r}, but {p.run} was trained with {of_run[key]!r}")
if p.data_root:
    of_run["data_root"] = p.data_root
data, s = run.data, run.settings
split, tokenizer = data.splits[data.reported], data.tokenizer


def begun() -> SLAN:
    """The run's model before its first step with the locator: a detector's proposals, a pretrained run, trained encoders."""
    return slan_begun(s, data, root()).to(device).eval()


train, annotated = (
    data.splits["train"].pairs(),
    annotated_phrases(s.dataset, data.data_root, data.reported, split.records, echo=None),
)
fresh, model = begun(), run.model.to(device)
known_start = (
    s.scale == "tiny" or not s.vision or bool(s.vision_weights)
)  # else its network was drawn before the seed was set
if not known_start:
    print(
        f"NOTE: the run began with a random {s.vision}: what is called untrained below began with another one."
    )

L, scenes = s.levels, s.dataset.startswith("scenes")
row = run.folder.name.split(".")[2:-1]  # of a grid's run: dataset.scale.row.s0
name = ".".join(["slan_regions", s.dataset, *row, *(["smoke"] if p.smoke or s.smoke else [])])
label = f"{s.dataset} {data.reported}"
print(f"{label}: {len(split.records)} pictures, {len(split.captions)} captions; {s.count} proposals a picture, at most "
      f"{s.top or 'all'} pass the filter, {L} levels; epoch {run.metrics['best_epoch']} of {s.epochs}")  # fmt: skip


def keep(figure: plt.Figure, number: int, *, pictures: bool = True) -> None:
    """Save a figure of this notebook as SVG and PNG; one that shows photos stays in the run's folder.

    `figures` is published with the project. Photos belong to those who took them, drawn scenes to nobody.
    """
    folder = p.out if pictures and not scenes else p.figures
    for kind in ("svg", "png"):
        draw.save(figure, root() / folder / f"{name}.{number}.{kind}")


# %% [markdown]
# Are these the weights that the numbers came from? The contrast ranks the split again, and must give the numbers of the run.

# %%
image, text = embed(model, split)
again = retrieval(image, text, split.image_of)
for key in ("i2t_r1", "t2i_r1", "rsum") if "itc_rsum" in run.metrics else ():  # contrast=fused trains no vectors
    assert abs(again[key] - run.metrics[f"itc_{key}"]) < 1.0, (key, again[key], run.metrics[f"itc_{key}"])
chance = 100 / len(split.records)
print(
    f"text to image R@1 {again['t2i_r1']:.1f} % by the contrast, {run.metrics['t2i_r1']:.1f} % re-ranked (chance {chance:.1f} %)"
)
if again["t2i_r5"] < 10 * chance:
    print("NOTE: this run has hardly learned anything; read what follows as the work of a random model.")


# %% [markdown]
# ## What is measured
#
# People have linked phrases of captions to boxes (on `scenes` the generator has); nothing in training has seen these links. A phrase's *score* of a region is the
# largest cosine of the region with any of its words, at each level (level 0 are the proposals that passed the filter). Of the region with the largest
# score: is its centre inside a box of the phrase (*pointing*), and how much does it overlap with it (*IoU*, 1 is the same box)? Of all regions: their mean
# *side*, as a part of the picture's, and how many are *nearly the whole picture* (both sides at least 0.9 of it). Beside a measure: a region drawn at random from the same ones (chance), the middle of the picture (centre; for IoU a box of half its sides), and the best
# of the regions (upper bound), for no model can choose better than its regions allow.


# %%
@torch.no_grad()
def located(of: SLAN, pictures: dict, texts: dict):
    """Algorithm 1 on pairs, in evaluation mode."""
    training = of.training
    of.eval()
    at = of.locate(of.encode_image(**to_device(pictures, device)), of.encode_text(**to_device(texts, device)))
    of.train(training)
    return at


def grounded(of: SLAN) -> list[list[GroundedPhrase]]:
    """Of each level, every linked phrase with its regions and their scores; none where the dataset has no links."""

    def locate(pictures: dict, texts: dict) -> tuple[Tensor, Tensor, Tensor]:
        at = located(of, pictures, texts)
        return at.boxes, at.cosine, at.valid

    return [
        [one for one in level if len(one.boxes)]
        for level in located_phrases(split, annotated, tokenizer, locate, complete=not s.smoke)
    ]


def outcome(one: GroundedPhrase) -> dict[str, float]:
    """Of one phrase at one level: how its best region lies, beside what it stands besplit."""
    true, size = torch.tensor(one.boxes), torch.tensor([*one.size] * 2)
    middle = torch.tensor([0.25, 0.25, 0.75, 0.75]) * size
    boxes, best = torch.cat([one.regions, middle[None]]), int(one.scores.argmax())  # the last is the centre
    at = convert(boxes, "xyxy", "cxcywh")[:, None, :2]
    sides = (one.regions[:, 2:] - one.regions[:, :2]) / size[:2]
    on = 100.0 * ((at >= true[:, :2]) & (at <= true[:, 2:])).all(-1).any(1)
    found = {"score": float(one.scores[best]), "score, all regions": float(one.scores.mean()),
             "side": float(sides.mean()), "nearly the whole picture": 100 * float((sides >= 0.9).all(1).double().mean())}  # fmt: skip
    for key, values in (("pointing", on), ("IoU", iou(boxes, true).amax(1))):
        few = values[:-1]
        found |= {
            key: few[best],
            f"{key}, chance": few.mean(),
            f"{key}, centre": values[-1],
            f"{key}, upper bound": few.max(),
        }
    return {key: float(value) for key, value in found.items()}


def outcomes(levels: list[list[GroundedPhrase]]) -> list[pd.DataFrame]:
    """The outcome of every phrase, a table a level."""
    return [pd.DataFrame([outcome(one) for one in phrases]) for phrases in levels]


trained, untrained = grounded(model), grounded(fresh)
here, before = outcomes(trained), outcomes(untrained)
for when, tables in (("after", here), ("before", before if known_start else [])):
    for level, one in enumerate(tables):
        was = run.metrics[f"grounding_level{level}_pointing_{when}"]
        assert abs(one["pointing"].mean() - was) < 1.0, (when, level, one["pointing"].mean(), was)


def verdict(shown: list[float]) -> str:
    """The line below a figure: the overlaps that it shows, and those of the whole split."""
    if not shown:
        return "No phrase of these pictures is linked to boxes: no IoU."
    one = here[-1].mean()
    beside = {key: ", ".join(f"{of} {one[f'{key}, {of}']:.{digits}f}" for of in ("chance", "centre", "upper bound"))
              for key, digits in (("IoU", 2), ("pointing", 1))}  # fmt: skip
    return (f"Shown: {len(shown)} regions of level {L} whose words are linked to boxes, mean IoU {np.mean(shown):.2f}, "
            f"{sum(x >= 0.5 for x in shown)} of at least 0.5. The split: mean IoU {one['IoU']:.2f} ({beside['IoU']}), "
            f"centre inside {one['pointing']:.1f} % ({beside['pointing']}). Sides of regions: {one['side']:.2f} of the picture's on average; "
            f"{one['nearly the whole picture']:.0f} % of the regions are nearly all of it.")  # fmt: skip


def claim(question: str, gain, rows, unit: str = "") -> float:
    """Answers a question by the mean of what was gained, from two standard errors on. Gains of one picture are averaged
    first, for phrases of a picture are no independent witnesses. Returns the mean; nan if there is nothing to go by."""
    if not len(gain):
        print(f"{question} There is no such picture here.")
        return math.nan
    of_picture = pd.Series(np.asarray(gain, float)).groupby(np.asarray(rows)).mean()
    mean, error = of_picture.mean(), of_picture.std() / len(of_picture) ** 0.5
    says = "yes" if mean > 2 * error else "no, the contrary" if mean < -2 * error else "undecided"
    print(f"{question} {says}: {mean:+.3f}{unit} (standard error {error:.3f}, {len(of_picture)} pictures)")
    return float(mean)


linked, asked, metrics = {}, [], {}
if here:
    row_of = {record.image_id: row for row, record in enumerate(split.records)}
    linked = {row_of[one.image_id]: one for one in load(f"{s.dataset}_entities", data.data_root, data.reported)
              if one.image_id in row_of}  # fmt: skip
    asked = [(i, one) for i, record in linked.items() for c in sorted({one.caption for one in record.phrases})
             for one in record.phrases if one.caption == c and one.boxes]  # fmt: skip
    assert [one.boxes for _, one in asked] == [one.boxes for one in trained[0]]  # the same, in the same order
    rows, last = [i for i, _ in asked], here[-1]
    show(last.mean().to_frame(f"level {L}, {len(last)} phrases").rename_axis("trained"), digits=2)
    for key, unit in (("pointing", " points"), ("IoU", "")):
        for beside in ("chance", "centre"):
            claim(f"{key}: better than {beside}?", last[key] - last[f"{key}, {beside}"], rows, unit)
else:
    print("No phrase of this dataset is linked to boxes: the figures are drawn, and nothing is measured.")

# %% [markdown]
# ## ICCV, Figure 5 (arXiv, Figure 4): three words, and the region of each
#
# > "We colorize three words per sentence and use the corresponding colors to mark the regions with the highest matching scores."
#
# > "When we change the detailed description of the sentence, e.g., 'a man in a red coat' to 'a man in black pants', the
# > interesting phenomenon is that the attention regions of our self-locator are also shifted accordingly with relatively high confidence."
#
# The pictures are the first of those whose phrases are linked to boxes. Of each: its first caption with three words in linked phrases, and the
# first later one that names something else. Of the words in linked phrases, articles and the like left out, the first, the middle and the last are coloured.
# The small number is the word's score. A solid box is the region of the last level with the highest score, a dashed one of the same colour is
# where the word's phrase really is; where two regions are one, the thinner line lies on the thicker.

# %%
STOP = {"", "a", "an", "the", "of", "with", "and", "in", "on", "at", "to", "is", "are", "there", "his", "her", "its", "their"}  # fmt: skip


def spoken(i: int) -> tuple[str, ...]:
    """The captions of picture i."""
    return linked[i].captions if i in linked else split.records[i].captions


def phrases_of(i: int, c: int) -> list:
    """The phrases of a caption that are linked to boxes."""
    return [one for one in linked[i].phrases if one.caption == c and one.boxes] if i in linked else []


def truth_of(i: int, phrase) -> Tensor:
    """The boxes of a phrase, "g 4" in fractions of the picture."""
    return torch.tensor(phrase.boxes) / torch.tensor([*linked[i].size] * 2)


def words_of(i: int, c: int) -> list[int]:
    """Numbers of three words of a caption: those in linked phrases if it has any; fewer if there are no three."""
    cut, phrases = pieces(spoken(i)[c], tokenizer), phrases_of(i, c)
    named = [
        cut.word_of[k] for k, (low, high) in enumerate(cut.offsets)
        if high and cut.words[cut.word_of[k]].strip(".,").lower() not in STOP
        and (not phrases or any(one.start <= low < one.end for one in phrases))
    ]  # fmt: skip
    named = list(dict.fromkeys(named))
    return [named[0], named[len(named) // 2], named[-1]] if len(named) >= 3 else named


def two_captions(i: int) -> list[int]:
    """The first caption with three words (linked ones first), and the first later one that names something else."""
    full = sorted(
        (c for c in range(len(spoken(i))) if len(words_of(i, c)) == 3), key=lambda c: not phrases_of(i, c)
    )
    named = [{one.entity for one in phrases_of(i, c)} for c in full]
    others = [c for c, its in zip(full, named, strict=True) if its - named[0]] or full[1:]
    return full[:1] + others[:1]


pool = [i for i in range(len(split.records)) if len(two_captions(i)) == 2 and (i in linked or not linked)]
chosen = [i for i in pool if i >= p.example][: p.pictures]
if not chosen:
    raise ValueError(
        f"example = {p.example}: the last picture of {label} with two captions to show is {max(pool, default=None)}"
    )
split.records[chosen[0]].open()  # published maps may come without pictures: DataError says so
print(f"pictures {', '.join(map(str, chosen))} of {label}")


# %%
def look(of: SLAN, i: int, caption: str) -> tuple[Tensor, Tensor, Tensor]:
    """Of picture i and a sentence: regions "l t 4" in fractions of the picture, their cosine with each token "l t n",
    and the saliency " t" with which they passed the filter."""
    at = located(of, split.images.batch([i]), tokenise([caption], tokenizer, max_length=32).batch([0]))
    real = at.valid[0]
    return at.boxes[:, 0, real].cpu(), at.cosine[:, 0, real].cpu(), at.scores[0, real].cpu()


def answer(seen: tuple, tokens: Tensor) -> tuple[int, Tensor]:
    """The region that fits some tokens best after the last level, and the scores "l t" of all."""
    scores = seen[1][..., tokens].amax(-1)
    return int(scores[-1].argmax()), scores


def outlined(ax: plt.Axes, boxes, colour: str, *, width: float = 1.6, style="-", edge: float = 1.0) -> None:
    """Boxes in fractions of a picture, with a white edge around their lines."""
    for x1, y1, x2, y2 in np.asarray(boxes, float).reshape(-1, 4):
        ax.add_patch(Rectangle((x1, 1 - y2), x2 - x1, y2 - y1, transform=ax.transAxes, fill=False, clip_on=False, edgecolor=colour,
                               linewidth=width, linestyle=style,
                               path_effects=[patheffects.withStroke(linewidth=width + edge, foreground="white")]))  # fmt: skip


def true_box(ax: plt.Axes, boxes, colour: str = draw.INK) -> None:
    """Where a phrase really is: dashed."""
    outlined(ax, boxes, colour, width=1.1, style=(0, (3, 2)), edge=0.8)


shown = []
figure = plt.figure(figsize=(3.3 * len(chosen), 7.6))
grid = figure.add_gridspec(4, len(chosen), height_ratios=[0.24, 1, 0.24, 1], hspace=0.12, wspace=0.08, left=0.01, right=0.99,
                           top=0.99, bottom=0.03)  # fmt: skip
for column, i in enumerate(chosen):
    for row, c in enumerate(two_captions(i)):
        caption = spoken(i)[c]
        cut, seen = pieces(caption, tokenizer), look(model, i, caption)
        ax = figure.add_subplot(grid[2 * row + 1, column])
        draw.show_picture(ax, split.records[i].open())
        said, said_of = [word.replace("$", r"\$") for word in cut.words], []
        for k, word in enumerate(words_of(i, c)):
            tokens = torch.tensor(cut.word_of) == word
            best, scores = answer(seen, tokens)
            said[word] += f"$_{{{scores[-1, best]:.2f}}}$"
            outlined(ax, seen[0][-1, best], draw.PALETTE[k], width=(6.4, 3.8, 1.3)[k], edge=0.5)
            low = cut.offsets[int(tokens.int().argmax())][0]
            for phrase in phrases_of(i, c):
                if phrase.start <= low < phrase.end:
                    true_box(ax, truth_of(i, phrase), draw.PALETTE[k])
                    said_of.append(
                        (cut.words[word], float(iou(seen[0][-1, best][None], truth_of(i, phrase)).max()))
                    )
        shown += [value for _, value in said_of]
        ax.set_title(
            "IoU " + ", ".join(f"{word} {value:.2f}" for word, value in said_of) if said_of else "",
            fontsize=8,
            y=-0.09,
        )
        head = figure.add_subplot(grid[2 * row, column])
        real = [
            k for k in range(len(said)) if cut.offsets[cut.word_of.index(k)][1]
        ]  # neither [CLS] nor [SEP]
        texts = draw.show_words(head, [said[k] for k in real], np.zeros(len(real)), size=9)
        for k, word in enumerate(words_of(i, c)):
            texts[real.index(word)].set(color="white")
            texts[real.index(word)].get_bbox_patch().set(facecolor=draw.PALETTE[k], alpha=1)
keep(figure, 1)
plt.show()
print(verdict(shown))

# %% [markdown]
# **Are the results "text-specific"?** Take two captions of a picture whose first linked phrases, A and B, name things that do not overlap, and the region that the model
# gives for each. *Follows*: the two regions lie nearer to their own things than they would if they were exchanged (sum of the distances of centres). If regions
# were drawn without regard to the words, that would be a coin's toss, 50 %; where both get the same region, nothing follows (counted as one half). And how much does the
# *sentence* move a region? The same region under the two captions: the distance of its two centres, as a share of the picture's side, beside how far it has moved from its proposal.


# %%
def centres(boxes, size: tuple) -> Tensor:
    """Centres "r 2" of boxes in pixels, in fractions of the picture."""
    return convert(torch.as_tensor(boxes, dtype=torch.float32), "xyxy", "cxcywh")[:, :2] / torch.tensor(size)


def text_pairs() -> list[tuple[int, int]]:
    """Of each picture the first two captions whose first linked phrases do not overlap: numbers of both phrases."""
    firsts: dict[int, dict[int, int]] = {}
    for n, (i, phrase) in enumerate(asked):
        firsts.setdefault(i, {}).setdefault(phrase.caption, n)
    found = []
    for i, of_caption in firsts.items():
        apart = ((a, b) for a, b in itertools.combinations(of_caption.values(), 2)
                 if not iou(truth_of(i, asked[a][1]), truth_of(i, asked[b][1])).any())  # fmt: skip
        found += itertools.islice(apart, 1)
    return found


def following(levels: list[list[GroundedPhrase]]) -> tuple[pd.DataFrame, np.ndarray]:
    """By level: how often regions follow the sentence (%), how often they are one, how far they move; the last level's votes."""
    table = []
    for phrases in levels:
        votes, same, apart, moved = [], [], [], []
        for a, b in pairs:
            one, two = phrases[a], phrases[b]
            now, other, began = (centres(x.regions, x.size) for x in (one, two, levels[0][a]))
            at_a, at_b = now[one.scores.argmax()], other[two.scores.argmax()]
            to_a, to_b = (
                lambda at, x=x: (at - centres(x.boxes, x.size)).norm(dim=1).min() for x in (one, two)
            )
            gain = float(to_a(at_b) + to_b(at_a) - to_a(at_a) - to_b(at_b))
            votes.append(0.5 if abs(gain) < 1e-6 else float(gain > 0))
            same.append(bool((at_a - at_b).norm() < 1e-6))
            moved.append((now - began).norm(dim=1).mean())
            if len(now) == len(other):  # a filter that reads the text may keep others
                apart.append((now - other).norm(dim=1).mean())
        table.append({"follows (%)": 100 * np.mean(votes), "the same place (%)": 100 * np.mean(same),
                      "moved by another sentence": np.mean(apart) if apart else np.nan, "moved from the proposal": np.mean(moved)})  # fmt: skip
    return pd.DataFrame(table, index=[f"level {k}" for k in range(len(levels))]), 100 * np.array(votes)


pairs = text_pairs() if here else []
if pairs:
    (follows, votes), (of_fresh, fresh_votes) = following(trained), following(untrained)
    show(follows.rename_axis(f"trained, {len(pairs)} pairs of captions"), digits=2)
    show(of_fresh.rename_axis("untrained"), digits=2)
    once = range(len(pairs))  # a pair a picture
    metrics["follows"] = 50 + claim(
        f"Text-specific at level {L}, more than a coin's 50 %?", votes - 50, once, " points"
    )
    claim("More than untrained?", votes - fresh_votes, once, " points")
    metrics |= {
        "follows_level0": follows["follows (%)"].iloc[0],
        "follows_untrained": fresh_votes.mean(),
        "text_pairs": len(pairs),
    }
    metrics |= {"moved_by_sentence": follows["moved by another sentence"].iloc[-1],
                "moved_from_proposal": follows["moved from the proposal"].iloc[-1]}  # fmt: skip
else:
    print("No picture has two captions whose first linked phrases lie apart: not asked.")

# %% [markdown]
# ## ICCV, Figure 6: coarse to fine
#
# > "Coarse-to-fine process of the region adaptation. We also list the matching score between the regions and counterpart words."
#
# One phrase a picture: the first linked one of the caption above. The thick box is the region that fits the phrase best after the last level, followed back to the proposal
# that it came from; the thin ones are all others, the dashed one is where the phrase really is. Above a picture: the region's score at that level, and its IoU.


# %%
def phrase_of(i: int) -> tuple[str, str, Tensor, Tensor | None]:
    """The caption, the words of its first linked phrase (or its first word of three), their tokens, and the true boxes."""
    c = two_captions(i)[0]
    caption, cut = spoken(i)[c], pieces(spoken(i)[c], tokenizer)
    for one in phrases_of(i, c):
        if (tokens := on_span(cut.offsets, one.start, one.end)).any():  # a long caption is cut off
            return caption, caption[one.start : one.end], tokens, truth_of(i, one)
    word = words_of(i, c)[0]
    return caption, cut.words[word], torch.tensor(cut.word_of) == word, None


def regions(
    ax: plt.Axes, i: int, boxes: Tensor, best: int | None = None, truth: Tensor | None = None
) -> None:
    """Regions "t 4" on picture i, thin; one of them thick, and what is true dashed."""
    draw.show_picture(ax, split.records[i].open())
    others = [k for k in range(len(boxes)) if k != best]
    outlined(ax, boxes[others], draw.INK, width=0.6, edge=0.5)
    if truth is not None:
        true_box(ax, truth, draw.PALETTE[1])
    if best is not None:
        outlined(ax, boxes[best], draw.PALETTE[0], width=2.4)


def aside(ax: plt.Axes, text: str) -> None:
    """What a row is about, to its left."""
    ax.text(-0.05, 0.5, text, rotation=90, va="center", ha="right", transform=ax.transAxes, fontsize=8)


shown = []
figure, axes = plt.subplots(
    len(chosen), L + 1, figsize=(2.1 * (L + 1), 2.3 * len(chosen)), squeeze=False, layout="constrained"
)
for line, i in zip(axes, chosen, strict=True):
    caption, phrase, tokens, truth = phrase_of(i)
    seen = look(model, i, caption)
    best, scores = answer(seen, tokens)
    for level, ax in enumerate(line):
        box = seen[0][level, best]
        regions(ax, i, seen[0][level], best, truth)
        lies = "" if truth is None else f", IoU {float(iou(box[None], truth).max()):.2f}"
        ax.set_title(f"level {level}: score {scores[level, best]:.2f}{lies}", fontsize=8)
    shown += [] if truth is None else [float(iou(box[None], truth).max())]
    aside(line[0], f"“{phrase}”")
keep(figure, 2)
plt.show()
print(verdict(shown))

# %% [markdown]
# **Do levels refine?** Left and middle: of each level's own best region, whether it points and how it overlaps, trained and untrained, beside the chance of that level's regions and the middle of the picture.
# Right: the scores. "Higher similarity scores after three levels" is to be read with care: level 0 compares regions of the encoder's map, later levels regions of
# the decoder's (and where `steer=fused`, with words that have met them, Eq. 1), so the scores of levels are of different spaces; and whoever picks the best of ten after the last level
# picks what is high *there*. So the mean over all regions stands beside the best.

# %%
if here:
    by_level = {
        row: pd.DataFrame([one.mean() for one in of])
        for row, of in (("trained", here), ("untrained", before))
    }
    figure, axes = plt.subplots(1, 3, figsize=(9.6, 3.2), layout="constrained")
    curves = {
        "trained": ("trained", ""),
        "chance": ("trained", ", chance"),
        "centre": ("trained", ", centre"),
        "untrained": ("untrained", ""),
    }
    for ax, key, ylabel in (
        (axes[0], "pointing", "centre inside (%)"),
        (axes[1], "IoU", "IoU of the best region"),
    ):
        for k, (row, (of, which)) in enumerate(curves.items()):
            ax.plot(
                by_level[of][key + which],
                draw.DASHES[k],
                color=draw.PALETTE[k],
                marker=draw.MARKERS[k],
                label=row,
            )
        ax.set(xlabel="level", ylabel=ylabel, ylim=(0, None))
    for (of, k), (row, key) in itertools.product(
        (("trained", 0), ("untrained", 3)), (("best region", "score"), ("all regions", "score, all regions"))
    ):
        axes[2].plot(
            by_level[of][key],
            "-" if key == "score" else "--",
            color=draw.PALETTE[k],
            marker=draw.MARKERS[k],
            label=f"{of}, {row}",
        )
    axes[2].set(xlabel="level", ylabel="cosine with the phrase")
    for ax in axes:
        ax.set_xticks(range(L + 1))
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower left", ncols=4)
    figure.legend(*axes[2].get_legend_handles_labels(), loc="outside lower right", ncols=2)
    keep(figure, 3, pictures=False)
    plt.show()
    for row, table in by_level.items():
        show(
            table.T.set_axis([f"level {k}" for k in table.index], axis=1).rename_axis(
                f"{row}, {len(asked)} phrases"
            ),
            digits=2,
        )
        metrics |= {f"level{k}_{key.replace(',', '').replace(' ', '_').lower()}{'_untrained' * (row == 'untrained')}": value
                    for k in table.index for key, value in table.loc[k].items()}  # fmt: skip
    for key, unit in (("pointing", " points"), ("IoU", ""), ("score, all regions", "")) if L else ():
        claim(f"{key}: higher at level {L} than at level 0?", here[-1][key] - here[0][key], rows, unit)

# %% [markdown]
# ## arXiv, Figure 5: regions during training
#
# > "The numbers under images denote the relative training duration, where 1 represents the whole pre-training procedure."
#
# A run keeps the weights of its best epoch alone. But its first steps can be taken again: the same start, batches, schedule, dice and loss. That is what happens here,
# for `replay` steps; the last column is the run's own end. 0 is where the locator begins: encoders that were trained before it have been. The rows have the phrases of the figure above. Thick is the region that fits the phrase best after the last level *at that time*: it need not be the same one.

# %%
an_epoch = len(train) // s.batch_size
total = an_epoch * s.epochs
steps = min(p.replay, total)
why = (
    "at scale=paper its steps are many and need a GPU"
    if s.scale == "paper"
    else "its data are shards"
    if s.shards
    else ""
)
if why and steps:
    print(f"No step of this run is taken again: {why}.")
    steps = 0
marks = {steps // 8, steps // 4, steps // 2, steps}
history, losses = {}, []


def snapshot(of: SLAN, at: float) -> None:
    """What the model does at a time of its training, by relative duration."""
    ends = outcomes(grounded(of)[:: max(L, 1)]) if here else []  # the first level and the last
    history[at] = {
        "seen": [look(of, i, phrase_of(i)[0]) for i in chosen],
        "first": ends[:1],
        "last": ends[-1:],
    }


snapshot(fresh, 0.0)
if steps:
    again_from = begun().train()  # made anew: the dice, too, stand as they stood before the first step
    schedule = slan_plan(s)
    trainable = [w for w in again_from.parameters() if w.requires_grad]
    optimizer = make_optimizer(trainable, schedule)
    scheduler = make_schedule(optimizer, schedule, total)
    batches = (index for epoch in range(s.epochs)
               for index in EpochBatches(len(train), s.batch_size, seed=s.seed, epoch=epoch))  # fmt: skip
    for step, index in enumerate(itertools.islice(batches, steps), start=1):
        terms = again_from(to_device(train.__getitems__(index), device))
        terms["loss"].backward()
        if s.clip_norm:
            torch.nn.utils.clip_grad_norm_(trainable, s.clip_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        scheduler.step()
        losses.append(float(terms["loss"].detach()))
        if step in marks:
            snapshot(again_from, step / total)
snapshot(model, run.metrics["best_epoch"] / s.epochs)

log = run.folder / "log.jsonl"
if len(losses) >= an_epoch and log.is_file():
    logged = json.loads(log.read_text(encoding="utf-8").splitlines()[0])["loss"]
    print(
        f"mean loss of the first epoch: {np.mean(losses[:an_epoch]):.4f} here, {logged:.4f} in the run's log"
    )
    if device_name() == run.content["device"]:  # between numbers of threads rounding differs, and it grows
        assert abs(np.mean(losses[:an_epoch]) / logged - 1) < 0.05

# %%
shown = []
figure, axes = plt.subplots(len(chosen), len(history), figsize=(2.1 * len(history), 2.3 * len(chosen)), squeeze=False,
                            layout="constrained")  # fmt: skip
for n, (line, i) in enumerate(zip(axes, chosen, strict=True)):
    _, phrase, tokens, truth = phrase_of(i)
    for ax, (at, one) in zip(line, history.items(), strict=True):
        best, scores = answer(one["seen"][n], tokens)
        box = one["seen"][n][0][-1, best]
        regions(ax, i, one["seen"][n][0][-1], best, truth)
        lies = "" if truth is None else f", IoU {float(iou(box[None], truth).max()):.2f}"
        ax.set_title(f"{at:.3g}: score {scores[-1, best]:.2f}{lies}", fontsize=8)
    shown += [] if truth is None else [float(iou(box[None], truth).max())]
    aside(line[0], f"“{phrase}”")
keep(figure, 4)
plt.show()
print(verdict(shown))
if here:
    over = {f"{at:.3g}": {f"{key}, {where}": one[part][0][key].mean() for key in ("pointing", "IoU", "IoU, upper bound", "side", "nearly the whole picture")
                          for part, where in (("first", "level 0"), ("last", f"level {L}"))} for at, one in history.items()}  # fmt: skip
    show(pd.DataFrame(over).rename_axis("relative duration"), digits=2)
    start, end = (history[at]["last"][0] for at in (min(history), max(history)))
    for key, unit in (("pointing", " points"), ("IoU", "")) if len(history) > 1 else ():
        claim(
            f"{key}: higher at {max(history):.3g} than at {min(history):.3g}?",
            end[key] - start[key],
            rows,
            unit,
        )
    metrics |= {"replayed_steps": steps}
    metrics |= {f"side_at_{n}": one["last"][0]["side"].mean() for n, one in enumerate(history.values())}

# %% [markdown]
# ## arXiv, Figure 7: before and after the filter; ICCV, Figure 3: what comes of them
#
# > "our region filter selects salient regions for further adaptation with words. It effectively focuses on informative regions."
#
# Left all proposals of a picture, then those that passed; the thicker a line, the higher the saliency S. To the right what the levels make of them under the first caption of the figures above. Dashed is
# everything in the picture that any of its captions names.


# %%
@torch.no_grad()
def proposed(rows: list[int]) -> tuple[Tensor, Tensor]:
    """All proposals "b q 4" of pictures, in fractions, and which are real."""
    pixels, given = seen_and_given(to_device(split.images.batch(rows), device))
    features = model.encoders.towers.vision(pixels)
    found = model.locator.propose(features, model.locator.decoder(features), pixels, given)
    return found.boxes.cpu(), found.valid.cpu()


def things(i: int) -> Tensor | None:
    """Boxes of all that the captions of picture i name, "g 4" in fractions; None without links."""
    boxes = {box for one in linked[i].phrases for box in one.boxes} if i in linked else set()
    return torch.tensor(sorted(boxes)) / torch.tensor([*linked[i].size] * 2) if boxes else None


figure, axes = plt.subplots(
    len(chosen), L + 2, figsize=(1.95 * (L + 2), 2.2 * len(chosen)), squeeze=False, layout="constrained"
)
for line, i in zip(axes, chosen, strict=True):
    boxes, valid = (x[0] for x in proposed([i]))
    caption = phrase_of(i)[0]
    kept_boxes, _, strength = look(model, i, caption)
    titles = [
        f"{int(valid.sum())} proposals",
        f"{len(strength)} passed",
        *(f"level {k}" for k in range(1, L + 1)),
    ]
    for ax, these, title in zip(line, [boxes[valid], *kept_boxes], titles, strict=True):
        draw.show_picture(ax, split.records[i].open())
        widths = 0.3 + 1.2 * strength if title != titles[0] else torch.full((len(these),), 0.6)
        for k in torch.argsort(widths).tolist():
            outlined(ax, these[k], draw.PALETTE[0], width=float(widths[k]), edge=0.3)
        if things(i) is not None:
            true_box(ax, things(i), draw.PALETTE[1])
        ax.set_title(title, fontsize=8)
    aside(line[0], f"picture {i}")
keep(figure, 5)
plt.show()

# %% [markdown]
# **Does the filter focus on what matters?** Over the split: how much of a region's area lies inside anything that is named (an even spread over the picture has the share that the things
# cover), and how many of the things are found, that is, have a region with an IoU of at least 0.5. Beside those that passed stand as many proposals drawn at random.

# %%
if linked:
    rows_of = []
    with_things = [i for i in linked if things(i) is not None]
    for i in with_things:
        boxes, valid = (x[0] for x in proposed([i]))
        every, kept = boxes[valid], look(model, i, spoken(i)[0])[0][0]
        true = things(i)
        hits = (iou(every, true) >= 0.5).sum(0)  # of each thing
        missed = [
            1 - math.comb(len(every) - int(h), len(kept)) / math.comb(len(every), len(kept)) for h in hits
        ]
        whole = torch.tensor([[0.0, 0, 1, 1]])
        rows_of.append({
            "all proposals": (float(inside(every, true).mean()), float((hits > 0).float().mean()), len(every)),
            "as many at random": (float(inside(every, true).mean()), float(np.mean(missed)), len(kept)),
            "those that passed": (float(inside(kept, true).mean()), float((iou(kept, true) >= 0.5).any(0).float().mean()), len(kept)),
            "an even spread": (float(inside(whole, true)), np.nan, np.nan),
        })  # fmt: skip
    columns = ["area on things (%)", "things found (%)", "regions"]
    table = pd.DataFrame(
        {key: np.mean([row[key] for row in rows_of], 0) * [100, 100, 1] for key in rows_of[0]}, index=columns
    ).T
    show(table.rename_axis(f"{len(rows_of)} pictures"))
    gain = [100 * (row["those that passed"][0] - row["as many at random"][0]) for row in rows_of]
    claim("More of their area on things than proposals at random?", gain, with_things, " points")
    gain = [100 * (row["those that passed"][1] - row["as many at random"][1]) for row in rows_of]
    claim("More things found than by as many at random?", gain, with_things, " points")
    keys = {"all proposals": "proposals", "as many at random": "random", "those that passed": "passed"}
    metrics |= {f"filter_{what}_{keys[row]}": float(table.loc[row, column]) for row in keys
                for what, column in (("area", columns[0]), ("found", columns[1]))}  # fmt: skip

# %% [markdown]
# ## arXiv, Figure 8: retrieved pictures
#
# > "We list top-5 retrieved images given query text for two methods, and highlight the ground truth with red box."
#
# The paper compares SLAN with BLIP. Here it is compared with itself: the contrast alone, which has no locator in it, and the best of that ranking put in order again by the matching head, which reads the regions. The sentences are
# the first captions of the pictures above. A solid frame with a tick is the sentence's own picture, a dashed one with a cross is another; on `scenes` it is known whether the sentence is true of that one as well ("also true"). Below a picture stands its cosine, in the second row its matching score.

# %%
meanings, truths = [], []
if scenes:
    truths = attributes(split.records[0].image.parents[1], data.reported)[: len(split.records)]
    meanings = [meaning for truth in truths for meaning in truth["captions"]]
    assert [meaning["text"] for meaning in meanings] == split.captions
first = {i: int(np.flatnonzero(split.image_of == i)[0]) for i in chosen}
methods = ["contrast", "all re-ranked" if s.contrast == "fused" else f"best {s.rerank} re-ranked"] if s.itm_weight else ["contrast"]
figure, axes = plt.subplots(len(methods) * len(chosen), p.top + 2, figsize=(1.2 * (p.top + 3), 1.6 * len(methods) * len(chosen)),
                            width_ratios=[1.9] + [1] * (p.top + 1), squeeze=False)  # fmt: skip
ranks = {method: [] for method in methods}
rerank = len(split.records) if s.contrast == "fused" else min(s.rerank, len(split.records))  # contrast=fused trains no vectors
for n, i in enumerate(chosen):
    k = first[i]
    cosine = image @ text[k]
    scores = {"contrast": cosine.numpy()}
    if s.itm_weight:
        best = cosine.topk(rerank).indices.sort().values
        odds = pair_scorer(model, split.images.batch, split.texts.batch)(best, torch.full_like(best, k))
        odds = odds + cosine[best] if s.rank_score == "itm+itc" else odds
        below = (
            cosine - cosine.max() + odds.min() - 1
        )  # what is not re-ranked stays below, in the order of the contrast
        scores[methods[1]] = below.index_copy(0, best, odds).numpy()
    for line, method in zip(axes[len(methods) * n :], methods, strict=False):
        found_at = draw.retrieval_strip(
            line, split.captions[k], lambda j: split.records[j].open(), scores[method], i,
            note=lambda j, i=i, k=k: "also true" if meanings and j != i and solutions(truths[j], meanings[k]) else "",
        )  # fmt: skip
        line[0].set_title(method, fontsize=8, color="#57606a")
        ranks[method].append(found_at)
        if method != "contrast" and i not in best.tolist() and found_at > p.top:
            line[-1].texts[-1].set_text(f"{found_at}.  not re-ranked")
figure.subplots_adjust(wspace=0.1, hspace=0.38, left=0.01, right=0.99, top=0.97, bottom=0.04)
keep(figure, 6)
plt.show()
of_split = {"contrast": "itc_t2i_r1", methods[-1]: "t2i_r1"}
for method in methods:
    print(f"{method}: own picture at {', '.join(map(str, ranks[method]))} of {len(split.records)}; over the split R@1 "
          f"{run.metrics[of_split[method] if s.itm_weight else 'itc_t2i_r1']:.1f} % (chance {chance:.1f} %)")  # fmt: skip

# %%
metrics |= {key: run.metrics[key] for key in ("itc_t2i_r1", "t2i_r1")}
protocol = f"{label}: {len(split.records)} pictures, {len(asked)} phrases linked to boxes, from {p.run}"
write_metrics(
    root() / p.out,
    p.as_dict(),
    metrics,
    seconds=time.monotonic() - started,
    protocol=protocol,
)
pd.Series(metrics)

# %% [markdown]
# Previous: [slan/3_ablations](3_ablations.ipynb) · Next: [slan/5_captioning](5_captioning.ipynb)
