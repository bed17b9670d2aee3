# %% [markdown]
# # HSLM: what words do to words, and words to regions
#
# **Paper** *Learning Hierarchical Semantic Correspondences for Cross-Modal Image-Text Retrieval* (ICMR 2022).
# This notebook serves Figure 3 (words before and after self-attention), Figures 4 and 5 (retrieved captions
# and pictures), and measures two sentences of the paper that come with examples and without numbers:
#
# > "we analyze the effectiveness of self-attention on weakening insignificant words in the text"
#
# > "we apply the cross-modal attention mechanism to filter out redundant image regions in the image"
#
# It needs a finished run of `hslm/2_train` and trains nothing.
#
# | on | cost, one core |
# |---|---|
# | a smoke run | under a minute |
# | scenes, 500 test pictures | two minutes, 1.3 GB |
# | photos | as long as the run's own evaluation, and a minute |
#
# **Expected** The numbers of the run come back from its weights, retrieval and grounding, and asserts hold them
# together. What the two sentences are worth is printed as measured, beside models of the same settings that have
# learned nothing.

# %% tags=["parameters"]
run: str = "latest"  # folder of the run to look into
example: int = 0  # number of the caption (of the reported split) that the figures begin with
dataset: str = ""  # empty, or the run's own dataset; another one is refused
data_root: str = ""  # folder above the dataset's own; empty is the run's
scale: str = ""  # empty, or the run's own scale; another one is refused
seed: int = 0  # of the untrained models that the run is compared with
out: str = "papermill_runs/hslm_attention"  # folder of metrics.json
figures: str = "figures"  # folder of the figures; those that show photos go to `out` instead
smoke: bool = False  # one untrained model in place of three, and `.smoke.` in the figures' names

# %% jupyter={"source_hidden": true}
from finematch.config import parameters, root

p = parameters(globals(), example=(0, 10**7), seed=(0, 2**31 - 3))

# %%
import textwrap
import time
from collections import defaultdict

import numpy as np
import pandas as pd
import torch
from IPython.display import display
from matplotlib import pyplot as plt
from matplotlib.patches import Rectangle

from finematch import figures as draw
from finematch.data import load
from finematch.data.record import DataError
from finematch.scenes.generator import attributes
from finematch.scenes.language import AFTER_NOUN, BACKGROUNDS, GENERIC, TABLES, plural, solutions
from finematch.evaluation.correspondence import pieces
from finematch.evaluation.grounding import GroundedPhrase, grounding
from finematch.evaluation.retrieval import retrieval_blocks
from finematch.models.configs import HSLMConfig
from finematch.models.hslm import HSLM, tile_scores, word_correlation
from finematch.runs import open_run, write_metrics
from finematch.training import accelerator, seed_everything
from finematch.evaluation.phrases import attended_phrases

draw.style()
started = time.monotonic()

# %% [markdown]
# ## A run comes back
#
# `metrics.json` holds the parameters that a run was made with, `best.safetensors` the weights of its best
# epoch. With both, the model is the same again. Without the weights, it is a model of the same settings that has
# learned nothing: what such a one does is the shape of the network, and not what training put into it.


# %%
run = open_run(p.run, method="hslm", smoke=p.smoke) if p.run == "latest" else open_run(p.run)
of_run = run.parameters
for key in ("dataset", "scale"):
    if getattr(p, key) not in ("", of_run[key]):
        raise ValueError(f"{key} = {getattr(p, key)!r}, but {p.run} was trained with {of_run[key]!r}")
if p.data_root:
    of_run["data_root"] = p.data_root
data = run.data
split, tokenizer = data.splits[data.reported], data.tokenizer


def untrained(seed: int) -> HSLM:
    """A model of the run's settings, as it is before training."""
    seed_everything(seed)
    return HSLM(split.images.width, len(tokenizer), HSLMConfig.of(of_run)).eval()


model = run.model.cpu()
others = [untrained(p.seed + k) for k in range(1 if p.smoke else 3)]

scenes = of_run["dataset"].startswith("scenes")
with_pictures = split.records[0].image is not None  # published features come without pictures
places = split.images.places  # and without boxes
name = f"hslm_attention.{of_run['dataset']}" + (".smoke" if p.smoke or of_run["smoke"] else "")
label = f"{of_run['dataset']} {data.reported}"
on = [module for module in ("mgcn", "self_attn", "cross_attn", "glob", "loc") if of_run[module]]
print(f"{label}: {len(split.records)} pictures, {len(split.captions)} captions; {', '.join(on)}, "
      f"best epoch {run.metrics['best_epoch']}")  # fmt: skip


def keep(figure: plt.Figure, number: int, *, pictures: bool = False) -> None:
    """Save a figure of this notebook as SVG and PNG; one that shows photos stays in the run's folder.

    `figures` is published with the project. Photos belong to those who took them, drawn scenes to nobody.
    """
    folder = p.out if pictures and not scenes else p.figures
    for kind in ("svg", "png"):
        draw.save(figure, root() / folder / f"{name}.{number}.{kind}")


# %% [markdown]
# Are these the weights that the numbers came from? The retrieval is scored again and must give the numbers of
# the run. Every score is kept, for the figures below.

# %%
b, c = len(split.records), len(split.captions)
scores = np.empty((b, c), np.float32)
scorer = tile_scores(model.to(accelerator()), split.images.batch, split.texts.batch)


def kept(i: torch.Tensor, j: torch.Tensor) -> torch.Tensor:
    """Scores of a tile, written down in `scores` too."""
    tile = scorer(i, j)
    scores[np.ix_(i.cpu().numpy(), j.cpu().numpy())] = tile.cpu().numpy()
    return tile


again = retrieval_blocks(kept, b, c, split.image_of, block=1000, split=label)
model.cpu()
for key in ("i2t_r1", "t2i_r1", "rsum"):
    assert abs(again[key] - run.metrics[key]) < 1.0, (key, again[key], run.metrics[key])
print(f"image to text R@1 {again['i2t_r1']:.1f} %, text to image R@1 {again['t2i_r1']:.1f} % "
      f"(chance {100 / b:.1f} %), rsum {again['rsum']:.1f}")  # fmt: skip
if again["t2i_r5"] < 10 * 100 / b:
    print("NOTE: this run has hardly learned anything; read what follows as the work of a random model.")

# %% [markdown]
# ## Figure 3: words before and after self-attention
#
# > "The similarity matrix between textual words is firstly computed on the word embedding vector of the text, then
# > the sum along each column is taken as the word correlation. All values in a sentence are normalized. The smaller
# > the value, the less relevant it is to other words, which indicates less significance."
#
# That is `word_correlation`, of the embeddings E (Eq. 2) and of what self-attention makes of them, E_f (Eq. 6).
# The values of a caption sum to one. Five captions, evenly spaced through the split and so chosen by no eye, begin
# with `example`. The numbers are percent; both sides of a row have the same scale. Where a tokenizer cuts a word
# into pieces, the pieces are added up.
#
# > "after self-attention the bigger values mainly focus on the entity objects and action verbs, and the correlation
# > values of some of unimportant words are decreased"


# %%
@torch.no_grad()
def correlations(of: HSLM, block: int = 256) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Correlation of each word of each caption, before and after self-attention."""
    found = [], []
    for start in range(0, c, block):
        which = range(start, min(start + block, c))
        before, after, mask = of.text.stages(**split.texts.batch(which))
        for stage, vectors in zip(found, (before, after), strict=True):
            for k, tokens, real in zip(which, word_correlation(vectors, mask), mask, strict=True):
                stage.append(np.bincount(cut[k].word_of, tokens[real].numpy(), len(cut[k].words)))
    return found


cut = [pieces(caption, tokenizer) for caption in split.captions]
if not model.text.include_special:  # the encoder's words begin and end with the caption's own
    cut = [one._replace(words=one.words[1:-1], word_of=[k - 1 for k in one.word_of[1:-1]],
                        offsets=one.offsets[1:-1]) for one in cut]  # fmt: skip
examples = [(p.example + k * c // 5) % c for k in range(5)]
if not model.text.attention:
    print(f"Skipped: {p.run} has no self-attention (self_attn=False).")
else:
    before, after = correlations(model)
    assert all(np.allclose(one.sum(), 1, atol=1e-4) for one in (*before, *after))


# %%
def numbered(words: list[str], shares: np.ndarray) -> list[str]:
    """Each word with its percents, small."""
    plain = (word.replace("$", r"\$") for word in words)
    return [f"{word}$_{{{100 * share:.0f}}}$" for word, share in zip(plain, shares, strict=True)]


if model.text.attention:
    wide = [0.8] * with_pictures + [4.2, 4.2]
    figure, axes = plt.subplots(5, len(wide), figsize=(11, 4), width_ratios=wide, squeeze=False)
    figure.subplots_adjust(wspace=0.06, hspace=0.2, left=0.01, right=0.99, top=0.93, bottom=0.01)
    for line, k in zip(axes, examples, strict=True):
        if with_pictures:
            draw.show_picture(line[0], split.records[split.image_of[k]].open())
        top = max(before[k].max(), after[k].max(), 3 / len(cut[k].words))  # an even spread stays pale
        for ax, shares in zip(line[-2:], (before[k], after[k]), strict=True):
            draw.show_words(ax, numbered(cut[k].words, shares), shares, top=top, size=9)
    axes[0, -2].set_title("before self-attention (%)")
    axes[0, -1].set_title("after self-attention (%)")
    keep(figure, 1, pictures=True)

# %% [markdown]
# ## Does self-attention weaken insignificant words?
#
# Five captions are five captions. Over the split, what share of the correlation falls on words of content, and what
# share on words that could stand in any caption? On `scenes` the words of content are those of its attribute tables
# (shapes, colours, sizes, textures, backgrounds, and their plurals); function words are a short list; what is neither
# (left, above, corner, two, rests) is counted apart. On other datasets every word that is not on the list is content.
#
# Two things must be told from learning. A kind of words has a share for being frequent: the first bar, which is
# what an even spread gives; and a word that stands in a caption twice, as "a" does, correlates fully with its twin,
# before and after. And the network may move shares before it has learned anything: the last two bars.

# %%
FUNCTION = {
    "a", "an", "the", "this", "that", "these", "those", "there", "it", "its", "is", "are", "was", "were", "be", "been",
    "being", "am", "has", "have", "had", "do", "does", "and", "or", "but", "so", "as", "if", "of", "to", "in", "on",
    "at", "by", "for", "from", "with", "than", "then", "both", "also", "his", "her", "their", "him", "them", "he", "she",
    "they", "i", "we", "you", "your", "our", "one", "who", "which", "while", "can",
}  # fmt: skip
texts = [text for table in (*TABLES.values(), AFTER_NOUN) for entry in table.values() for text in entry]
texts += [phrase for entry in BACKGROUNDS.values() for _, phrase in entry] + list(GENERIC)
content = {word for text in texts for word in text.split()} - FUNCTION
content |= {plural(word) for word in content}


def kind_of(word: str) -> str:
    """`content`, `function`, `other`, or `special` for [CLS] and [SEP]."""
    if word in tokenizer.all_special_tokens:
        return "special"
    bare = word.lower().strip(".,;:!?'\"()-")
    if not bare or bare in FUNCTION:
        return "function"
    return "content" if not scenes or bare in content else "other"


kinds = [[kind_of(word) for word in one.words] for one in cut]
KINDS = [kind for kind in ("content", "other", "function", "special") if any(kind in of for of in kinds)]


def by_kind(weights: list[np.ndarray]) -> np.ndarray:
    """Share of the weight on words of each kind, "c k"."""
    return np.array([[one[np.array(of) == kind].sum() for kind in KINDS]
                     for one, of in zip(weights, kinds, strict=True)])  # fmt: skip


metrics = {}
if model.text.attention:
    even = by_kind([np.bincount(one.word_of) / len(one.word_of) for one in cut])
    learned = [by_kind(stage) for stage in (before, after)]
    fresh = [
        np.mean(two, 0)
        for two in zip(*([by_kind(stage) for stage in correlations(of)] for of in others), strict=True)
    ]
    rows = {"an even spread": even, "before": learned[0], "after": learned[1],
            "untrained, before": fresh[0], "untrained, after": fresh[1]}  # fmt: skip
    table = pd.DataFrame({row: 100 * found.mean(0) for row, found in rows.items()}, index=KINDS)
    for row in list(rows)[1:]:
        assert abs(table[row].sum() - 100) < 0.1
        metrics |= {f"{kind}_share_{row.replace(', ', '_')}": float(table[row][kind]) for kind in KINDS}

    parts = []
    for kind, sign, claim in (("function", -1, "weakened"), ("content", 1, "strengthened")):
        change = 100 * (learned[1] - learned[0])[:, KINDS.index(kind)]
        by_itself = 100 * float((fresh[1] - fresh[0])[:, KINDS.index(kind)].mean())
        mean, error = float(change.mean()), float(change.std() / len(change) ** 0.5)
        parts.append(sign * mean > 2 * error)
        metrics |= {f"{kind}_change": mean, f"{kind}_change_se": error, f"{kind}_change_untrained": by_itself}
        print(f"{kind} words {claim}: {'yes' if parts[-1] else 'no'}. {mean:+.1f} points (standard error {error:.1f}), "
              f"{claim} in {(sign * change > 0).mean():.0%} of captions; an untrained model: {by_itself:+.1f}")  # fmt: skip
    print(f"What the paper reads off its five captions, in this run: {sum(parts)} of 2.")
    display(table.round(1))

# %% [markdown]
# Left: the shares. Right: single words, each with how its share changed: after divided by before, averaged over the
# captions that have it. The eight that grew most and the eight that shrank most, of the words in at least 1 % of
# the captions.

# %%
if model.text.attention:
    ratio = defaultdict(list)
    for k, one in enumerate(cut):
        for word, was, now in zip(one.words, before[k], after[k], strict=True):
            ratio[word.lower() if kind_of(word) != "special" else word].append((was, now))
    mean = {word: np.mean(found, 0) for word, found in ratio.items() if len(found) >= max(5, c / 100)}
    growth = {word: float(now / was) for word, (was, now) in mean.items() if was > 0}
    ranked = sorted(growth, key=growth.get, reverse=True)
    ends = ranked if len(ranked) <= 16 else ranked[:8] + ranked[-8:]

    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 3.8), width_ratios=[1.2, 1], layout="constrained")
    draw.bars(
        left, KINDS, {row: table[row].to_numpy() for row in table}, ylabel="share of word correlation (%)"
    )
    left.set_title(f"{label}: kinds of words, mean of {c} captions")
    left.legend(loc="upper center", bbox_to_anchor=(0.5, -0.1), ncols=3)
    fills = {
        "content": (draw.INK, ""),
        "other": (draw.FAINT, "..."),
        "function": ("white", "///"),
        "special": ("white", ""),
    }
    for kind in KINDS:
        at = [n for n, word in enumerate(ends) if kind_of(word) == kind]
        if at:
            right.bar(at, [growth[ends[n]] - 1 for n in at], 0.8, bottom=1, color=fills[kind][0], hatch=fills[kind][1],
                      edgecolor=draw.INK, linewidth=0.8, label=kind)  # fmt: skip
    right.axhline(1, color=draw.INK, linewidth=0.8)
    right.set_yscale("log", base=2)
    low, high = min(growth[word] for word in ends), max(growth[word] for word in ends)
    ticks = np.array([0.1, 0.2, 0.33, 0.5, 0.67, 0.8, 1, 1.25, 1.5, 2, 3, 5, 10])
    ticks = ticks[(ticks > low / 1.2) & (ticks < 1.2 * high)]
    right.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
    right.set_ylim(low / 1.2, high * 1.2)
    right.set_xticks(range(len(ends)), ends, rotation=60, ha="right", rotation_mode="anchor")
    right.set(ylabel="share after / share before", title="words that grew, words that shrank")
    right.legend(loc="upper right")
    keep(figure, 2)

# %% [markdown]
# ## Figure 4: captions of a picture
#
# > "For each image query, we display the first five texts, in which the mismatched texts are in red and the matched
# > texts are in green."
#
# Three pictures, chosen by a rule: the first of the split whose best own caption is ranked first, the first where it
# is at rank 2 to 5, and the first where it is not among the top 5; there it stands below, with its rank. A picture has
# five captions of its own, in bold blue with a tick; the others are orange with a cross. On `scenes` it is known of
# which other captions are true of the picture as well; they are marked "also true". The number is the logit of Eq. 22.

# %%
meanings, truths = [], []
if scenes:
    truths = attributes(split.records[0].image.parents[1], data.reported)[:b]
    meanings = [meaning for truth in truths for meaning in truth["captions"]]
    assert [meaning["text"] for meaning in meanings] == split.captions


def also(i: int, k: int) -> str:
    """The note beside picture i and caption k of another: whether the caption is true of it too."""
    return "also true" if meanings and i != split.image_of[k] and solutions(truths[i], meanings[k]) else ""


def classes(rank: np.ndarray) -> dict[str, int]:
    """The first query of each outcome, by its rank."""
    outcomes = {"rank 1": rank == 1, "rank 2 to 5": (rank > 1) & (rank <= 5), "beyond the top 5": rank > 5}
    for missing in (outcome for outcome, hit in outcomes.items() if not hit.any()):
        print(f"No query at {missing}.")
    return {outcome: int(np.flatnonzero(hit)[0]) for outcome, hit in outcomes.items() if hit.any()}


own = split.image_of[None] == np.arange(b)[:, None]
best = np.where(own, scores, -np.inf).max(1)
rank = 1 + (~own & (scores >= best[:, None])).sum(1)  # ties count against the model
assert abs(100 * (rank == 1).mean() - again["i2t_r1"]) < 0.5


def caption_list(ax: plt.Axes, i: int, top: int = 5) -> None:
    """The captions that are ranked first for picture i, one below the other, and its own first one if missed."""
    ax.set_axis_off()
    ax.set(xlim=(0, 1), ylim=(top + 1.6, 0))
    order = np.lexsort((own[i], -scores[i]))  # its own after those that tie with it
    shown = list(enumerate(order[:top], start=1))
    if rank[i] > top:
        shown.append((int(rank[i]), next(k for k in order if own[i, k])))
    for line, (place, k) in enumerate(shown):
        right, y = own[i, k], line + 0.6 + 0.4 * (line == top)
        colour, mark, weight = (draw.RIGHT, "✓", "bold") if right else (draw.WRONG, "✗", "normal")
        ax.text(0, y, mark, color=colour, weight="bold", va="center", fontsize=10)
        ax.text(0.025, y, f"{place}.", va="center", fontsize=8)
        ax.text(0.06, y, f"{scores[i, k]:.2f}", va="center", fontsize=8)
        text = textwrap.fill(split.captions[k] + (f"   ({note})" if (note := also(i, k)) else ""), 118)
        ax.text(0.115, y, text, color=colour, weight=weight, va="center", fontsize=8, linespacing=1.0)


if not with_pictures:
    print("Skipped, as the next figures: this dataset publishes features without pictures.")
else:
    chosen = classes(rank)
    figure, axes = plt.subplots(
        len(chosen), 2, figsize=(10.4, 1.85 * len(chosen)), width_ratios=[1, 5.2], squeeze=False
    )
    figure.subplots_adjust(wspace=0.03, hspace=0.25, left=0.01, right=0.99, top=0.94, bottom=0.01)
    for (left, right), (outcome, i) in zip(axes, chosen.items(), strict=True):
        draw.show_picture(left, split.records[i].open())
        left.set_title(f"picture {i}: {outcome}", fontsize=7.5, color="#57606a")
        caption_list(right, i)
    keep(figure, 3, pictures=True)

# %% [markdown]
# ## Figure 5: pictures of a caption
#
# The same rule, for captions. A solid frame with a tick is the caption's own picture, a dashed one with a cross is
# another; a missed picture stands apart with its rank.

# %%
if with_pictures:
    mine = scores[split.image_of, np.arange(c)]
    rank_of = (scores >= mine).sum(0)  # from 1; ties count against the model
    assert abs(100 * (rank_of == 1).mean() - again["t2i_r1"]) < 0.5
    chosen = classes(rank_of)
    figure, axes = plt.subplots(len(chosen), 7, figsize=(10.4, 1.75 * len(chosen)), width_ratios=[1.8] + [1] * 6,
                                squeeze=False)  # fmt: skip
    for line, (outcome, k) in zip(axes, chosen.items(), strict=True):
        found = draw.retrieval_strip(line, split.captions[k], lambda i: split.records[i].open(), scores[:, k],
                                     int(split.image_of[k]), note=lambda i, k=k: also(i, k))  # fmt: skip
        assert found == rank_of[k]
        line[0].set_title(f"caption {k}: {outcome}", fontsize=7.5, color="#57606a")
    figure.subplots_adjust(wspace=0.12, hspace=0.35, left=0.01, right=0.99, top=0.93, bottom=0.07)
    keep(figure, 4, pictures=True)

# %% [markdown]
# ## Where a word looks
#
# Cross attention (Eq. 16) gives every word a number in [0, 1] for every region; they need not sum to one. For three
# captions (of those whose phrases are linked to boxes, if there are any): up to four of their words of content, evenly
# spaced, and last their first function word, for contrast.
# Each panel draws the word's three strongest regions (blue, orange, dark; the stronger the thicker), and in its title
# what they have of the word's whole weight, for only proportions count where the context is made unit. The dashed
# white line is where the phrase of the word really is.
#
# A word is not alone: a graph over the caption and a GRU have come before, so that "a" may know of the star that
# follows it.

# %%
phrases_of = defaultdict(list)  # caption -> (phrase, picture size)
linked = []
if model.pairs.cross_attn and places is not None:
    try:
        linked = load(f"{of_run['dataset']}_entities", data.data_root, data.reported)
    except DataError as error:
        print(f"No phrases with boxes here, so no dashed lines ({error.problem}).")
row_of = {record.image_id: row for row, record in enumerate(split.records)}
linked = [record for record in linked if record.image_id in row_of]
first = np.searchsorted(split.image_of, np.arange(b))
assert (np.diff(split.image_of) >= 0).all()
for record in linked:
    row = row_of[record.image_id]
    for phrase in record.phrases:
        if record.captions == split.records[row].captions:
            phrases_of[int(first[row]) + phrase.caption].append((phrase, record.size))


def spaced(found: list[int], most: int) -> list[int]:
    """At most `most` of a list, evenly spaced, its ends among them."""
    at = np.linspace(0, len(found) - 1, min(most, len(found))).round().astype(int)
    return [found[k] for k in at]


@torch.no_grad()
def looks(ax: plt.Axes, k: int, word: int) -> None:
    """The three regions that a word of caption k attends to most, on the caption's picture."""
    i, tokens = int(split.image_of[k]), torch.tensor(cut[k].word_of) == word
    picture = split.records[i].open()
    size = np.array([*picture.size, *picture.size])
    weights = model.attend(split.images.batch([i]), split.texts.batch([k]))[0]
    real = split.texts.batch([k])["mask"][0]
    if not model.text.include_special:
        real = real & ~split.texts.batch([k])["special"][0]
    weights = weights[real][tokens].amax(0).numpy()
    strongest = np.argsort(-weights, kind="stable")[:3]
    drawn = draw.show_boxes(ax, picture, places[i][strongest, :4] * size, weights[strongest])
    for order, box in enumerate(drawn):
        box.set(linestyle="-", zorder=3 - 0.1 * order)  # the strongest on top
    at = next(span for span, is_it in zip(cut[k].offsets, tokens, strict=True) if is_it)
    for phrase, frame in phrases_of[k]:
        if phrase.start <= at[0] < phrase.end:
            for x1, y1, x2, y2 in np.array(phrase.boxes).reshape(-1, 4) * size / [*frame, *frame]:
                for colour, style in ((draw.INK, "-"), ("white", (0, (2.5, 2.5)))):
                    ax.add_patch(Rectangle((x1, y1), x2 - x1, y2 - y1, fill=False, edgecolor=colour, linewidth=1.1,
                                           linestyle=style))  # fmt: skip
    three = ", ".join(f"{100 * weight:.0f}" for weight in weights[strongest] / weights.sum())
    ax.set_title(draw.plain(f"{cut[k].words[word]}: {three} %"), fontsize=8, pad=4)


if not model.pairs.cross_attn:
    print(f"Skipped: {p.run} has no cross attention (cross_attn=False).")
elif places is None or not with_pictures:
    print("Skipped: these features come without boxes or without pictures.")
else:
    figure = plt.figure(figsize=(10.4, 7.6))
    grid = figure.add_gridspec(6, 5, height_ratios=[0.18, 1] * 3, hspace=0.18, wspace=0.08, left=0.01, right=0.99,
                               top=0.99, bottom=0.02)  # fmt: skip
    pool = sorted(k for k, found in phrases_of.items() if any(phrase.boxes for phrase, _ in found)) or list(
        range(c)
    )
    at = int(np.searchsorted(pool, p.example))
    for row, k in enumerate(pool[(at + n * len(pool) // 5) % len(pool)] for n in range(3)):
        head = figure.add_subplot(grid[2 * row, :])
        head.set_axis_off()
        head.text(0, 0.9, draw.plain(split.captions[k]), fontsize=9.5, va="top")
        if row == 0:
            head.text(
                1, 0.9, f"even weights: {100 / len(places[0]):.1f} % each", fontsize=8, va="top", ha="right"
            )
        of_kind = {
            kind: [n for n, its in enumerate(kinds[k]) if its == kind] for kind in ("content", "function")
        }
        for column, word in enumerate(spaced(of_kind["content"], 4) + of_kind["function"][:1]):
            looks(figure.add_subplot(grid[2 * row + 1, column]), k, word)
    keep(figure, 5, pictures=True)

# %% [markdown]
# ## Do words look where they should?
#
# Phrases that people have linked to boxes answer that, and nothing in training has seen these links. A phrase's score
# of a region is the largest of its words' weights. *Pointing game*: the centre of the best region lies inside a box of
# the phrase. *R@1*: the best region covers a box with an IoU of at least 0.5. Beside them: regions in random order
# (chance), a guess at the middle of the picture (centre), models that have learned nothing (mean ± standard
# deviation of three), and what the proposals allow (upper bound), for where no region fits no model can point.
#
# A phrase of more words says more exactly what it means, and has more words to agree upon. Does that help? The phrases
# are counted by their length, too.


# %%
def by_length(of: HSLM) -> list[GroundedPhrase]:
    """The linked phrases with what a model's words attend to; their kind is how many words they have."""
    asked = [(record.captions[k], phrase) for record in linked
             for k in sorted({phrase.caption for phrase in record.phrases})
             for phrase in record.phrases if phrase.caption == k]  # fmt: skip
    found = attended_phrases(split, linked, tokenizer, of.attend)
    assert [phrase.boxes for _, phrase in asked] == [
        one.boxes for one in found
    ]  # the same, in the same order
    words = [len(caption[phrase.start : phrase.end].split()) for caption, phrase in asked]
    return [one._replace(kind="1, 2" if n < 3 else "5 or more" if n > 4 else str(n))
            for one, n in zip(found, words, strict=True)]  # fmt: skip


def evenness(phrases: list[GroundedPhrase]) -> float:
    """Entropy of a phrase's weights over the regions, over that of equal ones: 1 filters nothing."""
    weights = torch.stack([phrase.scores / phrase.scores.sum() for phrase in phrases if phrase.scores.any()])
    return float(torch.special.entr(weights).sum(1).mean() / np.log(weights.shape[1]))


def beside(key: str, kind: str = "") -> dict[str, float]:
    """A measure of the trained model between what needs no model and what no model can exceed."""
    bound = "upper_bound" + "_pointing" * (key == "pointing")
    return {
        "chance": here[f"chance_{key}{kind}"], "centre": here[f"centre_{key}{kind}"],
        "untrained": float(np.mean([one[key + kind] for one in nothing])), "trained": here[key + kind],
        "upper bound": here[bound + kind],
    }  # fmt: skip


here, measures = {}, {"pointing game": "pointing", "R@1, IoU ≥ 0.5": "r1"}
if not any(phrase.boxes for record in linked for phrase in record.phrases):
    print("Skipped: no attention, no boxes of regions, or no phrases with boxes.")
else:
    phrases = [by_length(one) for one in (model, *others)]
    here, *nothing = (grounding(one, split=label) for one in phrases)
    for key in measures.values():
        assert abs(here[key] - run.metrics[f"grounding_{key}_after"]) < 1.0, (key, here[key])
    table = pd.DataFrame({title: beside(key) for title, key in measures.items()})
    for key in measures.values():
        metrics |= {f"grounding_{key}_{row.replace(' ', '_')}": value for row, value in beside(key).items()}
    metrics |= {f"grounding_{key}": here[key] for key in ("phrases", "ties_r", "ties_pointing")}
    metrics["region_evenness"] = evenness(phrases[0])
    metrics["region_evenness_untrained"] = float(np.mean([evenness(one) for one in phrases[1:]]))
    print(f"{here['phrases']} phrases. Weights over the regions, 1 is even: {metrics['region_evenness']:.3f} trained, "
          f"{metrics['region_evenness_untrained']:.3f} untrained.")  # fmt: skip
    display(table.round(1))

# %%
if here:
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 3.8), width_ratios=[1, 1.5], layout="constrained")
    spread = {row: [np.nan] * len(measures) for row in table.index}
    if len(nothing) > 1:
        spread["untrained"] = [np.std([one[key] for one in nothing], ddof=1) for key in measures.values()]
    draw.bars(left, list(measures), table.T.to_dict("list"), errors=spread, ylabel="phrases (%)")
    left.set_title(f"{label}: {here['phrases']} phrases, {places.shape[1]} regions")
    many = {
        kind: n for kind in ("1, 2", "3", "4", "5 or more") if (n := here.get(f"phrases/{kind}", 0)) >= 20
    }
    of_length = pd.DataFrame({f"{kind}\n({n})": beside("r1", f"/{kind}") for kind, n in many.items()})
    draw.bars(right, list(of_length), of_length.T.to_dict("list"), ylabel="phrases (%)")
    right.set_title("R@1, IoU ≥ 0.5, by the length of the phrase")
    right.set_xlabel("words in the phrase (how many phrases)")
    for ax in (left, right):
        ax.set(ylim=(0, 100))
        ax.get_legend().remove()
    figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=5)
    keep(figure, 6)

# %%
metrics |= {key: again[key] for key in ("i2t_r1", "t2i_r1", "rsum")}
protocol = again["protocol"] + (f"; {here['protocol']}" if here else "")
write_metrics(root() / p.out, p.as_dict(), metrics, seconds=time.monotonic() - started, protocol=protocol)
pd.Series(metrics)

# %% [markdown]
# Previous: [hslm/3_ablations](3_ablations.ipynb) · Next: [felga/0_vlp](../felga/0_vlp.ipynb)
