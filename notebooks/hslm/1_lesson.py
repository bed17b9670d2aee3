# %% [markdown]
# # HSLM: the lesson
#
# **Paper** *Learning Hierarchical Semantic Correspondences for Cross-Modal Image-Text Retrieval* (ICMR 2022).
# This page explains sections 3.1 to 3.6 and the rows of Table 4, equation by equation, on tensors small enough
# to work by hand. It trains nothing.
#
# **Serves** no table. It explains what the rows of Tables 1 to 4 are made of; `2_train` runs them.
#
# **Cost** under a minute on one core (half a minute more where the embedded set has not been drawn yet),
# about 1 GB of memory.
#
# **Expected** every cell passes. A claim in the text is followed by an `assert`: if the page runs to its
# end, what it says is true of this code. Times are printed and never asserted.
#
# How to read it: short quotations from the paper stand in block quotes. Letters keep their meaning
# throughout: $N$ regions of a picture, $M$ words of a caption, $d$ the joint width ($d_1$ in the paper), $e$ the
# width of a word before the GRU ($d_2$), $s$ the width of a similarity vector, $B$ pairs of a batch. Vectors are
# *rows* here, as in the code; the paper writes the words as columns and the regions as rows.

# %% tags=["parameters"]
dataset: str = "scenes"  # the embedded set alone: which region belongs to which word is known
data_root: str = "data"  # folder above the dataset's own
scale: str = "paper"  # whose sizes are counted in sections 8 and 10: tiny, photos or paper
seed: int = 0  # of every random tensor below
out: str = "papermill_runs/hslm_lesson"  # not written to: the lesson leaves two figures in figures/
smoke: bool = False  # a small embedded set of its own; the rest is small anyway
cache: str = "data/cache"  # where the small set of a smoke run goes
regions: int = 20  # proposals drawn on the picture of section 1
layers: int = 4  # graph layers of section 3
sharp: float = 16.0  # the sharper cross_scale of section 5
batch: int = 128  # pairs of the batch in section 7

# %% jupyter={"source_hidden": true}
from finematch.config import parameters, preset, root

p = parameters(globals(), dataset={"scenes"}, scale={"tiny", "photos", "paper"}, seed=(0, 2**31), regions=(8, 40),
           layers=(2, 6), sharp=(6, 64), batch=(32, 256))  # fmt: skip

# %%
import itertools
import math
import time

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from IPython.display import Markdown, display
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from finematch import figures
from finematch.boxes import iou
from finematch.data import load
from finematch.scenes.generator import TOKENIZER, attributes, generate
from finematch.exercises import check
from finematch.features.proposals import propose
from finematch.models.configs import HSLMConfig
from finematch.models.hslm import (
    HSLM, MGCN, MODULES, Caption, GraphLayer, PairScorer, Picture, SelfAttentionPooling,
    WordEncoder, WordSelfAttention, hinge, score, softmax_loss, word_correlation,
)  # fmt: skip
from finematch.tables import published, to_markdown
from finematch.text import tokenise, word_level
from finematch.data.splits import SMOKE

figures.style()
torch.manual_seed(p.seed)
EYE, SWAP = [[1.0, 0], [0, 1]], [[0.0, 1], [1, 0]]


def close(a, b, tolerance: float = 1e-4) -> bool:
    """Equal within a tolerance; lists are taken as tensors."""
    a, b = (torch.as_tensor(x, dtype=torch.float64) for x in (a, b))
    return a.shape == b.shape and bool(torch.allclose(a, b, atol=tolerance))


def show(frame: pd.DataFrame, digits: int = 2) -> None:
    """A table; its index becomes the first column."""
    display(Markdown(to_markdown(frame.reset_index(), digits=digits)))


@torch.no_grad()
def fill(layer: nn.Linear, weight, bias: float = 0.0) -> None:
    """Weights that we choose: a matrix, or a number for so many times the identity."""
    if isinstance(weight, (int, float)):
        weight = weight * torch.eye(layer.in_features)
    layer.weight.copy_(torch.as_tensor(weight))
    if layer.bias is not None:
        layer.bias.fill_(bias)


def all_real(parts: Tensor) -> Tensor:
    """The mask of "b n d" without padding."""
    return torch.ones(parts.shape[:2], dtype=torch.bool)


def rate(one: PairScorer, regions: Tensor, words: Tensor, vector: Tensor | None = None) -> Tensor:
    """Logits of pictures "b n d" with captions "c l d" (and their global vectors), nothing padded."""
    picture, caption = Picture(regions, all_real(regions)), Caption(words, all_real(words), vector)
    return score(one, one.prepare(picture), caption)


def refused(product) -> bool:
    """Whether the shapes of a product do not conform."""
    try:
        product()
    except RuntimeError:
        return True
    return False


# %% [markdown]
# ## 1. Why match on several levels
#
# MVAM reads a picture once and a caption once; their score is one dot product. HSLM belongs to the other family:
# every picture is read *against every caption*, region by region and word by word. That costs a thousand times
# more and is more exact. The paper's first figure names three levels:
#
# > "it is essential to understand both higher-level semantics and lower-level relationship"
#
# 1. **object**: a word and a region ("heart", and where it is),
# 2. **object relation**: two words and two regions (the heart is *next to* the diamond),
# 3. **higher level**: relations of relations, up to the whole sentence.
#
# And it names two troubles of the first level. Most regions are in no word, and most words are in no region.
# Below is a picture of the embedded set with the boxes that a proposal method finds, a caption, and the truth.

# %%
data_root = root() / (f"{p.cache}/smoke" if p.smoke else p.data_root)
if p.smoke:
    generate(data_root / "scenes", **SMOKE)
records = load("scenes", data_root, "val")[:200]  # drawn now if it is not there
truth = attributes(data_root / "scenes", "val")[:200]


def fits(one: dict, caption: dict) -> bool:
    """Two single things, one relation between them, and at least two more things that are left out."""
    single = [len(mention["objects"]) for mention in caption["mentions"]] == [1, 1]
    return single and len(caption["relations"]) == 1 and len(one["objects"]) >= 4


picked, caption = next((i, c) for i, one in enumerate(truth) for c in one["captions"] if fits(one, c))
picture, things = records[picked].open(), truth[picked]["objects"]
phrases = {mention: caption["text"][a:b] for a, b, mention in caption["phrases"] if mention >= 0}
boxes = [things[mention["objects"][0]]["box"] for mention in caption["mentions"]]
subject, relation, other = caption["relations"][0]
method, search = propose("auto")
proposals = search(picture, p.regions)

fig, axes = plt.subplots(1, 3, figsize=(6.8, 3.0), layout="constrained")
figures.show_boxes(axes[0], picture, proposals, np.linspace(1, 0.05, len(proposals)))
axes[0].set_title(f"{len(proposals)} proposals, the first thickest", pad=12)
figures.show_boxes(axes[1], picture, boxes, labels=[phrases[0], phrases[1]])
axes[1].set_title("level 1: things that are named", pad=12)
figures.show_boxes(axes[2], picture, boxes)
ends = np.array([[(a + c) / 2, (b + d) / 2] for a, b, c, d in (boxes[subject], boxes[other])])
axes[2].plot(*ends.T, color=figures.INK, linewidth=2, marker="o", markerfacecolor="white")
axes[2].text(*ends.mean(0), relation, fontsize=8, ha="center", va="center",
             bbox={"facecolor": "white", "edgecolor": figures.INK, "boxstyle": "round,pad=0.25"})  # fmt: skip
axes[2].set_title("level 2: a relation of two", pad=12)
fig.supxlabel(f"level 3, the sentence: “{caption['text']}”", fontsize=9)
plt.show()

overlap = iou(torch.as_tensor(proposals), torch.tensor(boxes).float()).max(1).values
redundant, all_words = int((overlap < 0.5).sum()), caption["text"].split()
wordless = len(all_words) - sum(len(phrase.split()) for phrase in phrases.values())
print(f"{redundant} of {len(proposals)} proposals ({method}) show nothing that the caption names (IoU < 0.5)")
print(f"{wordless} of {len(all_words)} words are in no region, {len(things) - 2} of {len(things)} things in no word")  # fmt: skip
assert redundant > len(proposals) / 2
assert wordless > 0
assert len(things) >= 4

# %% [markdown]
# The model in one table. Self-attention (3.2) is to weaken words, cross attention (3.4) is to weaken regions, the
# graph (3.3) is to put relations into each vector, and two alignments (3.5) compare the result: word by word
# ("local") and as a whole ("global"). The cell sends the picture above through it. Our regions are thumbnails of
# 4 × 4 pixels, a stand-in for the detector's 2,048 features: nothing here depends on how good they are.

# %%
tokenizer = word_level(TOKENIZER)
thumbnails = torch.stack([
    torch.from_numpy(np.asarray(picture.crop(tuple(box)).resize((4, 4)), np.float32) / 255 - 0.5).flatten()
    for box in proposals.round().astype(int)
])  # fmt: skip
image = {"features": thumbnails[None], "mask": all_real(thumbnails[None])}
text = tokenise([caption["text"]], tokenizer).batch([0])
torch.manual_seed(p.seed)
model = HSLM(thumbnails.shape[1], len(tokenizer), HSLMConfig(width=64, embed=32, sim=16, depth=4)).eval()

with torch.no_grad():
    seen, told = model.encode_image(**image), model.encode_text(**text)
    e, e_f, _ = model.text.stages(**text)
    f = model.attend(image, text)
    logit = score(model.pairs, model.pairs.prepare(seen), told)
path = {
    "regions R*": ("1, 7-10", "N × d", seen.regions),
    "words E": ("2", "M × e", e),
    "words after self-attention, E_f": ("3-6", "M × e", e_f),
    "words E*, after graph and GRU": ("11-14", "M × d", told.words),
    "the caption as a whole": ("3.5", "d", told.vector),
    "f, every word with every region": ("16", "M × N", f),
    "the score, a logit": ("17-22", "1", logit),
}
columns = ["equations", "axes", "here (first axis: one picture or caption)"]
made = {name: (eq, axes_, " × ".join(map(str, one.shape))) for name, (eq, axes_, one) in path.items()}
show(pd.DataFrame(made, index=columns).T.rename_axis("tensor"))
words_in = len(tokenizer.tokenize(caption["text"])) + 2  # [CLS] and [SEP] count as words (reading H24)
assert f.shape == (1, words_in, p.regions)

# %% [markdown]
# ## 2. Self-attention of the words (Eq. 3 to 6)
#
# > "In order to strengthen the words with real meaning and weaken the words without real meaning"
#
# $$E_K = W_K E, \quad E_Q = W_Q E, \quad E_V = W_V E, \qquad E_f = \left(\frac{E_K E_Q}{M}\right) E_V$$
#
# With words as columns, $E$ is $e \times M$, and so are $E_K$, $E_Q$ and $E_V$. Their product as printed does not
# exist: $e\times M$ times $e \times M$. One of the factors must be transposed; which one is reading H1. In rows,
# as the library computes:
#
# | `self_attention` | formula | the bracket relates |
# |---|---|---|
# | `word` (default) | $(E_K E_Q^{\top} / M)\, E_V$ | words with words, $M \times M$ |
# | `channel` | $E_V\,(E_Q^{\top} E_K / M)$ | channels with channels, $e \times e$: the printed order of columns |
# | `softmax` | $\mathrm{softmax}(E_K E_Q^{\top}/\sqrt e)\,E_V$ | words with words, and each row sums to 1 |
#
# By hand: the caption "a red circle", $e = 2$. "a" points one way, "red" and "circle" the other:
# $a = (0, 1)$, $red = (1, 0)$, $circle = (2, 0)$. All three matrices are the identity.
#
# | | a | red | circle | `word`: row / 3, times $E$ | `softmax` of row / √2, times $E$ |
# |---|---|---|---|---|---|
# | **a** relates to | 1 | 0 | 0 | (0, 1/3) | 0.50, 0.25, 0.25: (0.745, 0.504) |
# | **red** | 0 | 1 | 2 | (1/3 + 2·2/3, 0) = (5/3, 0) | 0.14, 0.28, 0.58: (1.436, 0.140) |
# | **circle** | 0 | 2 | 4 | (2/3 + 2·4/3, 0) = (10/3, 0) | 0.05, 0.19, 0.77: (1.723, 0.045) |
#
# This is the paper's idea in small: "a", to which nothing relates, shrinks to a third. The two that relate to each
# other grow by 5/3. The softmax can do no such thing. Its rows sum to one, so each word becomes a *mean* of words,
# and "a" is filled with red circle.

# %%
E = torch.tensor([[[0.0, 1], [1, 0], [2, 0]]])
names = ["a", "red", "circle"]


def attention(form: str, value=EYE, **options) -> WordSelfAttention:
    """The library's layer with matrices that we choose."""
    layer = WordSelfAttention(2, form=form, **options).requires_grad_(False)
    fill(layer.key, EYE), fill(layer.query, EYE), fill(layer.value, value)
    return layer


after = {form: attention(form)(E, all_real(E)) for form in ("word", "channel", "softmax")}
assert close(after["word"], [[[0, 1 / 3], [5 / 3, 0], [10 / 3, 0]]])
assert close(after["softmax"], [[[0.745, 0.504], [1.436, 0.140], [1.723, 0.045]]], 1e-3)
assert refused(lambda: E[0].T @ E[0].T @ E[0].T)  # Eq. 6 as printed

fig, (left, right) = plt.subplots(1, 2, figsize=(6.6, 2.3), layout="constrained", width_ratios=[1, 1.7])
figures.matrix(left, E[0] @ E[0].T / 3, names, high=4 / 3, label="relation / M")
lengths = {"E, before": E, "word (Eq. 6)": after["word"], "softmax": after["softmax"]}
figures.bars(right, names, {k: v[0].norm(dim=-1) for k, v in lengths.items()}, ylabel="length of the word")
plt.show()

# %% [markdown]
# And `channel`? Here it gives the same as `word`, and that is no accident. Matrix products are associative:
#
# $$\text{word: } (E_K E_Q^{\top})\,E_V \qquad\qquad \text{channel: } E_V\,(E_Q^{\top}E_K) = (E_V E_Q^{\top})\,E_K$$
#
# `channel` *is* `word` with the names of $W_K$ and $W_V$ exchanged. Both are learnt, so the two readings are one
# model; only the cost differs, $4M^2e$ against $4Me^2$ operations. To tell them apart by hand, let $W_V$ alone swap
# the two numbers of a vector. Under `word` nothing changes but the place of the answer: (1/3, 0), (0, 5/3), (0, 10/3).
# Under `channel` the swapped words are what is compared: (5/3, 0), (0, 1/3), (0, 2/3).

# %%
assert close(after["channel"], after["word"])
assert close(attention("word", SWAP)(E, all_real(E)), [[[1 / 3, 0], [0, 5 / 3], [0, 10 / 3]]])
assert close(attention("channel", SWAP)(E, all_real(E)), [[[5 / 3, 0], [0, 1 / 3], [0, 2 / 3]]])

torch.manual_seed(p.seed)
by_word, by_channel = WordSelfAttention(6, form="word"), WordSelfAttention(6, form="channel")
with torch.no_grad():
    by_channel.query.weight.copy_(by_word.query.weight)
    by_channel.key.weight.copy_(by_word.value.weight)  # the names exchanged ...
    by_channel.value.weight.copy_(by_word.key.weight)
some = torch.randn(2, 5, 6)
assert close(by_channel(some, all_real(some)), by_word(some, all_real(some)))  # ... and they are one model

# %% [markdown]
# **What M does.** Dividing by $M$ turns a sum over words into a mean. Say everything twice, "a red circle a red
# circle", and each word comes out as before; without $M$ it would be twice as long. $M$ counts real words, so that
# padding changes nothing.
#
# **What bounds it? Nothing.** $E$ enters three times, so Eq. 6 is *cubic*: words of half the length come out with an
# eighth of it. A softmax would bound the weights.
#
# **What is left of a word? Without $E$, little** (reading H2). $E_f$ is a sum over the caption, so a word becomes a
# mixture of its neighbours, and another one in every caption. `self_residual=True` (default) adds $E$, the usual
# remedy, which the paper does not print (`False` is the literal reading): a becomes (0, 4/3), red (8/3, 0). The cell
# sends 200 captions through untrained layers and asks two things of every word: how alike are its vectors in two
# captions, and is its own embedding, of all the vocabulary's, the nearest?

# %%
twice = torch.cat([E, E], 1)
out = attention("word")(twice, all_real(twice))
assert close(out[:, :3], after["word"])
assert close((twice[0] @ twice[0].T @ twice[0])[:3], 2 * (E[0] @ E[0].T @ E[0]))  # a sum: twice as long
padded = F.pad(E, (0, 0, 0, 2), value=9.0)
real = torch.tensor([[True, True, True, False, False]])
assert close(attention("word")(padded, real)[:, :3], after["word"])

assert close(attention("word")(E / 2, all_real(E)), after["word"] / 8)  # cubic
assert close(attention("word", residual=True)(E, all_real(E)), after["word"] + E)
assert close(attention("word", residual=True)(E, all_real(E))[0, :2], [[0, 4 / 3], [8 / 3, 0]])

spoken = tokenise([record.captions[0] for record in records], tokenizer).batch(range(min(200, len(records))))
ids = spoken["input_ids"][spoken["mask"]]
table_2 = {}
for residual in (False, True):
    torch.manual_seed(p.seed)
    shape = {"width": 64, "embed": 128, "sim": 16, "depth": 0, "self_residual": residual}
    encoder_2 = WordEncoder(len(tokenizer), HSLMConfig(**shape)).eval()
    with torch.no_grad():
        became = F.normalize(encoder_2.stages(**spoken)[1][spoken["mask"]], dim=-1)
        own_word = F.normalize(encoder_2.embed.weight, dim=-1)
    again = (ids[:, None] == ids[None]) & ~torch.eye(len(ids), dtype=torch.bool)
    table_2[f"self_residual={residual}"] = {
        "cosine of a word in two captions": float((became @ became.T)[again].mean()),
        "own embedding is the nearest, %": 100 * float(((became @ own_word.T).argmax(1) == ids).float().mean()),
    }
show(pd.DataFrame(table_2).T.rename_axis("Eq. 6"))
lost, kept = (list(row.values()) for row in table_2.values())
assert lost[0] < 0.5 < 0.7 < kept[0]
assert lost[1] < 30 < 90 < kept[1]

# %% [markdown]
# The paper's Figure 3 shows how much each word relates to the others before and after. `word_correlation` takes the
# cosine for that ("normalized" is all that is said of it). By hand: columns of cosines 1, 2, 2, so shares 0.2, 0.4,
# 0.4, before *and* after, for a cosine does not see lengths, and with the identity only lengths have changed. With
# plain products in place of cosines the shares are 0.1, 0.3, 0.6 before and 0.004, 0.33, 0.66 after. The paper's
# table looks like this ("a" drops to 0.002), so it may well have been made without dividing by lengths.

# %%
assert close(word_correlation(E, all_real(E)), [[0.2, 0.4, 0.4]])
assert close(word_correlation(after["word"], all_real(E)), [[0.2, 0.4, 0.4]])
for words, expected in ((E[0], [0.1, 0.3, 0.6]), (after["word"][0], [1 / 226, 75 / 226, 150 / 226])):
    column = (words @ words.T).sum(0)
    assert close(column / column.sum(), expected)

# %% [markdown]
# **Exercise 1 (compute).** Public loaders start word vectors evenly between −0.1 and 0.1; `nn.Embedding` starts them with standard
# deviation 1. By what factor is $E_f$ shorter *relative to E* with the first? Answer for all three readings.

# %% tags=["exercise"]
shorter = ...  # {"word": ..., "channel": ..., "softmax": ...}
check("hslm.short", shorter)

# %% [markdown] tags=["solution"] jupyter={"source_hidden": true}
# Even numbers on (−0.1, 0.1) have standard deviation $0.1/\sqrt3 = 0.0577$. $E_f / E$ goes with the square of it for the cubic
# readings: a factor of 300. For the softmax nothing is lost (a factor of 1): it becomes the plain mean of the words. So with small word vectors the caption all
# but vanishes before the GRU sees it. `self_residual=True` keeps $E$ in, `softmax` keeps the length, and so do larger vectors to begin with (what the
# library does).

# %% tags=["solution"] jupyter={"source_hidden": true}
torch.manual_seed(p.seed)
drawn = torch.randn(20, 13, 300)
gain = {}
for form in ("word", "channel", "softmax"):
    layer = WordSelfAttention(300, form=form).requires_grad_(False)
    gain[form] = [float(layer(x, all_real(x)).std() / x.std()) for x in (drawn, 0.1 / math.sqrt(3) * drawn)]
gains = pd.DataFrame(gain, index=["deviation 1", "deviation 0.058"]).T
show(gains.rename_axis("length of E_f relative to E"), digits=5)
for form in ("word", "channel"):
    assert abs(gain[form][0] / gain[form][1] / 300 - 1) < 0.01
assert abs(gain["softmax"][0] / gain["softmax"][1] - 1) < 0.2
check("hslm.short", {"word": 300, "channel": 300, "softmax": 1})

# %% [markdown]
# ## 3. Relations: a graph in which all are neighbours (Eq. 7 to 9)
#
# $$A_{ij} = \mu(r_i)^{\top}\nu(r_j) \quad (7) \qquad R_g = W_r\,(A R W_g) + R \quad (8) \qquad
# R_g^{l} = W_h^{l}(A^l R_g^{l-1} W_m^l) + R_g^{l-1} \quad (9)$$
#
# Every region is a node. Eq. 7 says how much node $i$ takes from node $j$ (the paper prints $\nu(r_i)$, which would
# relate a node to itself alone). Eq. 8 gathers what the neighbours say and *adds* it to the node. Again the order
# does not conform: with nodes as rows, $A R W_g$ is $N \times d$ and $W_r$ must stand on its right (reading H5). The
# paper does not normalise $A$; we divide by $N$, as the code of the cited VSRN does (reading H4).
#
# By hand: three nodes $(1,0), (0,1), (1,1)$, all matrices the identity.
#
# | | $A$, times 3 | takes up $A R$ | $R_g$ |
# |---|---|---|---|
# | node 1 (1, 0) | 1 0 1 | (2, 1)/3 | (5/3, 1/3) |
# | node 2 (0, 1) | 0 1 1 | (1, 2)/3 | (1/3, 5/3) |
# | node 3 (1, 1) | 1 1 2 | (3, 3)/3 | (2, 2) |

# %%
nodes = torch.tensor([[[1.0, 0], [0, 1], [1, 1]]])


def graph_layer(strength: float = 1.0, width: int = 2, **options) -> GraphLayer:
    """The library's layer with all four matrices the identity times `strength`."""
    layer = GraphLayer(width, **options).requires_grad_(False)
    for part in (layer.mu, layer.nu, layer.gather, layer.update):
        fill(part, strength)
    return layer


moved = graph_layer()(nodes, all_real(nodes))
assert close(moved, [[[5 / 3, 1 / 3], [1 / 3, 5 / 3], [2, 2]]])
taken = nodes[0] @ nodes[0].T @ nodes[0]  # A R W_g
assert refused(lambda: torch.eye(2) @ taken)  # W_r on the left, as printed

fig, (left, right) = plt.subplots(1, 2, figsize=(6.2, 2.4), layout="constrained")
at = np.array([[0, 0], [1, 0], [0.5, 0.85]])
for i, j in ((0, 1), (0, 2), (1, 2)):
    strength = float(nodes[0, i] @ nodes[0, j]) / 3
    left.plot(*at[[i, j]].T, color=figures.PALETTE[0], linewidth=0.8 + 8 * strength, marker="", zorder=1,
                linestyle="-" if strength else ":")  # fmt: skip
    left.text(*at[[i, j]].mean(0), f"{strength:.2f}", fontsize=7, ha="center", va="center",
                bbox={"facecolor": "white", "edgecolor": "none", "pad": 1})  # fmt: skip
for i, place in enumerate(at):
    left.plot(*place, "o", markersize=18, color=figures.INK, zorder=2)
    left.text(*place, str(i + 1), color="white", ha="center", va="center", fontsize=9, zorder=3)
left.set(xlim=(-0.2, 1.2), ylim=(-0.2, 1.05), aspect="equal", title="$A_{ij}$ between the nodes")
left.set_axis_off()
for i in range(3):
    right.annotate("", moved[0, i].tolist(), nodes[0, i].tolist(),
                   arrowprops={"arrowstyle": "-|>", "color": figures.PALETTE[1], "linewidth": 1.6, "shrinkA": 4, "shrinkB": 4})  # fmt: skip
    right.plot(*nodes[0, i], "o", color=figures.INK)
    right.plot(*moved[0, i], "D", color=figures.PALETTE[0])
    right.annotate(str(i + 1), nodes[0, i].tolist(), xytext=(-9, -9), textcoords="offset points", fontsize=8)
right.set(xlim=(-0.3, 2.3), ylim=(-0.3, 2.3), aspect="equal", xlabel="first number", ylabel="second number",
          title="● before   ◆ after")  # fmt: skip
plt.show()

# %% [markdown]
# **At the start a layer does nothing.** $W_r$ begins as zero (VSRN's code does the same), so that $R_g = R$ and a new
# layer is the identity. Four untrained layers score exactly as none, and training decides how much graph there is to
# be. In the first step only $W_r$ moves: the gradient of all that stands before it passes through a zero.

# %%
torch.manual_seed(p.seed)
deep, fresh = MGCN(2, 4), GraphLayer(2)
assert close(deep(nodes, all_real(nodes)), nodes)
assert close(MGCN(2, 0)(nodes, all_real(nodes)), nodes)

fresh(nodes, all_real(nodes)).square().sum().backward()
moves = {name: bool(q.grad.abs().sum() > 0) for name, q in fresh.named_parameters()}
assert {name for name, does in moves.items() if does} == {"update.weight", "update.bias"}

torch.manual_seed(p.seed)
flat = HSLM(thumbnails.shape[1], len(tokenizer), HSLMConfig(width=64, embed=32, sim=16, depth=0)).eval()
missing = model.load_state_dict(flat.state_dict(), strict=False).missing_keys
assert all(".graph." in name for name in missing)
with torch.no_grad():
    views = [(one, one.pairs.prepare(one.encode_image(**image))) for one in (flat, model)]
    scores = [score(one.pairs, view, one.encode_text(**text)) for one, view in views]
assert close(*scores, 1e-6)  # depth 0 and an untrained depth 4
moves

# %% [markdown]
# **Then it can explode.** Like Eq. 6, a layer is cubic in its nodes. Take $N$ equal unit nodes, and all four matrices
# half the identity. A layer turns length $x$ into
#
# $$x + \tfrac{N}{16}\,x^3 \ (\texttt{raw}), \qquad x + \tfrac{1}{16}\,x^3 \ (\texttt{nodes}), \qquad
# x + \tfrac14\,x \ (\texttt{softmax})$$
#
# With $N = 36$, raw relations go 1, 3.25, 80.5, 1.2 million, 3·10¹⁸. Divided by $N$ they go 1, 1.06, 1.14, 1.23, 1.35,
# whatever $N$ is. Dividing does not change the cube, it takes the number of nodes out of it; a softmax takes the cube
# away too. The left panel draws it for nodes that differ, the right panel after four layers against $N$.

# %%
growth = {"raw": lambda x: x + 36 / 16 * x**3, "nodes": lambda x: x + x**3 / 16, "softmax": lambda x: 1.25 * x}  # fmt: skip


def sizes(relation: str, nodes: Tensor, depth: int = 4) -> list[float]:
    """Mean length of a node before the first layer and after each."""
    layer = graph_layer(0.5, nodes.shape[-1], relation=relation).double()
    found = [nodes.norm(dim=-1).mean().item()]
    for _ in range(depth):
        nodes = layer(nodes, all_real(nodes))
        found.append(nodes.norm(dim=-1).mean().item())
    return found


torch.manual_seed(p.seed)
alike = F.normalize(torch.ones(1, 100, 32).double(), dim=-1)
unlike = torch.randn(1, 100, 32).double() + 0.7  # regions of one picture have much in common
unlike = F.normalize(unlike, dim=-1)
fig, (left, right) = plt.subplots(1, 2, figsize=(6.6, 2.6), layout="constrained")
counts = [1, 2, 4, 9, 18, 36, 100]
for k, (relation, step) in enumerate(growth.items()):
    found = sizes(relation, alike[:, :36])  # equal nodes: what was worked by hand
    assert all(abs(after / step(before) - 1) < 1e-6 for before, after in itertools.pairwise(found))
    look = {"color": figures.PALETTE[k], "marker": figures.MARKERS[k], "label": relation}
    left.plot(sizes(relation, unlike[:, :36], p.layers), **look)
    right.plot(counts, [sizes(relation, unlike[:, :n])[-1] for n in counts], **look)
left.set(yscale="log", xlabel="layers", ylabel="mean length of a node", title="36 nodes")
left.set_xticks(range(p.layers + 1))
right.set(xscale="log", yscale="log", xlabel="nodes N", title="after 4 layers")
right.set_xticks(counts, [str(n) for n in counts], minor=False)
right.minorticks_off()
left.legend()
plt.show()

raw, divided = sizes("raw", alike[:, :36]), sizes("nodes", alike[:, :36])
assert close(raw[:3], [1.0, 3.25, 80.49], 0.01)
assert 3e18 < raw[-1] < 4e18
assert close(divided, [1, 1.0625, 1.1375, 1.2295, 1.3456], 1e-3)
assert close(sizes("nodes", alike), divided, 1e-6)  # 100 nodes or 36: their number is gone
assert sizes("raw", unlike[:, :36])[-1] > 1e6 * sizes("nodes", unlike[:, :36])[-1]

# %% [markdown]
# Words have a graph of their own, of width $e$ (reading H7), with $M$ nodes and its own weights. Since a caption of
# six words and one of twenty go through the same layers, dividing by the number of nodes matters there even more.
#
# **Exercise 2 (build).** Write Eq. 6 with a residual, $E_f + E$, for one caption: words "l e" and the matrices of keys, queries and values
# "e e" (a linear layer with matrix $W$ maps $e$ to $e\,W^{\top}$). Is it a graph layer, Eq. 8?


# %% tags=["exercise"]
def attended(words: Tensor, key: Tensor, query: Tensor, value: Tensor) -> Tensor: ...


check("hslm.words", attended)

# %% [markdown] tags=["solution"] jupyter={"source_hidden": true}
# $E_f = (E_K E_Q^{\top}/M)\,E_V + E$ is a graph layer with $\mu = W_K$, $\nu = W_Q$ (without biases), $W_g = W_V$ and $W_r = I$: the cell
# builds both and compares. The literal reading of Eq. 6 is a graph layer *without the skip*. That alone could take a word away: with the residual, as in a
# graph layer, the word always stays.

# %% tags=["solution"] jupyter={"source_hidden": true}
torch.manual_seed(p.seed)
words_layer, nodes_layer = WordSelfAttention(6, residual=True), GraphLayer(6)
for name, twin in (("mu", "key"), ("nu", "query"), ("gather", "value")):
    fill(getattr(nodes_layer, name), getattr(words_layer, twin).weight)
fill(nodes_layer.update, 1.0)
with torch.no_grad():
    assert close(nodes_layer(some, all_real(some)), words_layer(some, all_real(some)), 1e-5)
print("Eq. 6 with a residual is Eq. 8 with W_r = I")


def attended(words: Tensor, key: Tensor, query: Tensor, value: Tensor) -> Tensor:
    relations = (words @ key.T) @ (words @ query.T).T / len(words)
    return relations @ (words @ value.T) + words


check("hslm.words", attended)

# %% [markdown]
# ## 4. Order: a GRU in both directions (Eq. 12 to 14)
#
# Up to here a caption is a *set* of words. Shuffle it and each word keeps its vector. That is why the two "a man" of
# the fifth caption in the paper's Figure 3 have the same values to the last digit.
#
# $$\overrightarrow h_j = \overrightarrow{GRU}(e_j^r, \overrightarrow h_{j-1}), \qquad
# \overleftarrow h_j = \overleftarrow{GRU}(e_j^r, \overleftarrow h_{j+1}), \qquad
# t_j = \frac{\overrightarrow h_j + \overleftarrow h_j}{2} \in \mathbb{R}^{d}$$
#
# The average keeps the width at $d$; the usual concatenation would make it $2d$. Each $t_j$ is then made unit, as the
# regions are at their start.
#
# By hand, a GRU of width 1 whose weights are all 0 but one: the candidate is $\tanh(x_j)$ and both gates stand at
# $\sigma(0) = ½$. So $h_j = ½\tanh(x_j) + ½\,h_{j-1}$: an echo that halves at every word. Three words with
# $\tanh(x) = 0.8, 0, 0.4$:
#
# | | word 1 | word 2 | word 3 |
# |---|---|---|---|
# | forward | 0.4 | 0.2 | 0.1 + 0.2 = 0.3 |
# | backward | 0.05 + 0.4 = 0.45 | 0.1 | 0.2 |
# | average $t$ | 0.425 | 0.15 | 0.25 |


# %%
def echo(values: list[float]) -> Tensor:
    """Forward and backward states "2 M" of the GRU of the example, for words with these tanh(x)."""
    encoder = WordEncoder(len(values), HSLMConfig(embed=1, width=1, depth=0, self_attn=False)).requires_grad_(
        False
    )
    for weight in encoder.gru.parameters():
        weight.zero_()
    encoder.gru.weight_ih_l0[2] = encoder.gru.weight_ih_l0_reverse[2] = 1  # rows: reset, update, candidate
    encoder.embed.weight.copy_(torch.tensor(values).atanh()[:, None])
    return encoder.gru(encoder.embed(torch.arange(len(values)))[None])[0][0].T


states = echo([0.8, 0.0, 0.4])
assert close(states, [[0.4, 0.2, 0.3], [0.45, 0.1, 0.2]])
assert close(states.mean(0), [0.425, 0.15, 0.25])

# The library: the average of both, made unit; and before the GRU the order of the words says nothing.
torch.manual_seed(p.seed)
encoder = WordEncoder(30, HSLMConfig(embed=8, width=6, depth=2)).requires_grad_(False)
for layer in encoder.graph:
    nn.init.normal_(layer.update.weight)  # an untrained graph is the identity: move it
ids, order = torch.tensor([[3, 14, 15, 9, 26]]), torch.tensor([4, 1, 0, 2, 3])
parts = {"mask": torch.ones(1, 5, dtype=torch.bool), "special": torch.zeros(1, 5, dtype=torch.bool)}


def before_gru(ids: Tensor) -> Tensor:
    _, words, mask = encoder.stages(ids, **parts)
    return encoder.graph(words, mask)


shuffled, in_order = encoder(ids[:, order], **parts)[0], encoder(ids, **parts)[0]
both_ways = encoder.gru(before_gru(ids))[0].unflatten(-1, (2, 6))
assert close(in_order, F.normalize(both_ways.mean(2), dim=-1), 1e-5)
assert close(before_gru(ids[:, order]), before_gru(ids)[:, order])  # a set ...
assert not close(shuffled, in_order[:, order], 1e-2)  # ... is one no more

# %% [markdown]
# ## 5. Cross attention: words look at regions (Eq. 15 and 16)
#
# $$f(E^*, R^*) = \mathrm{sigmoid}(E^* \odot R^*) \quad (16) \qquad\qquad
# R_a^* = f(E^*, R^*)\odot R^* \quad (15)$$
#
# > "the attention function to calculate the scores for each pair"
#
# The ⊙ is called a dot product, and $E^*$ is $M \times d$ while $R^*$ is $N \times d$. Two readings conform (H10):
#
# | `cross` | weights | $R_a^*$ | what it is | Eq. 18 compares |
# |---|---|---|---|---|
# | `attend` (default) | $f = \sigma(E^* R^{*\top})$, $M\times N$ | $f R^*$, $M\times d$ | each word's *context*: what it sees of the picture | $M$ words with $M$ contexts |
# | `gate` | $g_n$ = mean or max of column $n$ of $f$ | $g \odot R^*$, $N \times d$ | the regions, weakened where no word asks for them | $M$ words with $N$ regions: needs a context as well |
#
# By hand: two words that are exactly two orthogonal regions, $E^* = R^* = I$. A word scores
# $\sigma(1) = 0.731$ with its own region and $\sigma(0) = 0.5$ with the other one.
#
# | | region 1 | region 2 | context $f R^*$ | made unit |
# |---|---|---|---|---|
# | word 1 | 0.731 | 0.5 | (0.731, 0.5) | (0.825, 0.565) |
# | word 2 | 0.5 | 0.731 | (0.5, 0.731) | (0.565, 0.825) |
# | `gate`, mean | 0.616 | 0.616 | | |
#
# Look at the last column. The words are at right angles; the cosine of their contexts is
# $2 \cdot 0.825 \cdot 0.565 = 0.932$.

# %%
sigmoid_1 = 1 / (1 + math.exp(-1))
regions_2, words_2 = torch.eye(2)[None], torch.eye(2)[None]
scorer = PairScorer(HSLMConfig(width=2, sim=2, glob=False)).requires_grad_(False)
f_2 = scorer.relate(scorer.prepare(Picture(regions_2, all_real(regions_2))), words_2)
assert close(f_2, [[[sigmoid_1, 0.5], [0.5, sigmoid_1]]])
contexts = F.normalize(f_2 @ regions_2, dim=-1)
assert close(contexts, [[[0.825, 0.565], [0.565, 0.825]]], 1e-3)
assert close(contexts[0, 0] @ contexts[0, 1], 0.932, 1e-3)

for pooled, gate in (("mean", (sigmoid_1 + 0.5) / 2), ("max", sigmoid_1)):
    gated = PairScorer(HSLMConfig(width=2, sim=2, cross="gate", gate_pool=pooled)).region_gate(
        f_2[:, None], None
    )
    assert close(gated, [[[gate, gate]]])
assert refused(lambda: told.words[0] - seen.regions[0])  # M words minus N regions

# %% [markdown]
# **The weights hardly differ.** Words and regions are unit vectors (regions until the graph has learnt to change
# that; `normalise_graph=True` keeps them so), so a dot product lies between −1 and 1, and *every* weight of Eq. 16
# between $\sigma(-1) = 0.269$ and $\sigma(1) = 0.731$. Nothing can be ignored: the best region weighs at most
# $e = 2.72$ times the worst one. With 36 regions a context is nearly the sum of the picture, for whatever word.
#
# A factor inside the sigmoid, `cross_scale`, sharpens. It is ours, 1 in the paper. Yet a sigmoid decides about each
# region alone: what has a slightly negative product goes off, what has a slightly positive one goes *on*. A softmax
# lets regions compete instead. Left and middle: a toy with 12 words, each close to one of 36 regions (the diagonal).
# Right: how alike its contexts are. Sharpening helps, up to a point.

# %%
assert 1 - sigmoid_1 <= f.min() <= f.max() <= sigmoid_1  # the model of section 1, on its picture
assert abs(sigmoid_1 / (1 - sigmoid_1) - math.e) < 1e-9

torch.manual_seed(p.seed)
toy_regions = F.normalize(torch.randn(36, 64), dim=-1)
toy_words = F.normalize(toy_regions[:12] + 0.08 * torch.randn(12, 64), dim=-1)


def likeness(weights: Tensor) -> float:
    """Mean cosine between the contexts of different words."""
    unit = F.normalize(weights @ toy_regions, dim=-1)
    return float((unit @ unit.T)[~torch.eye(len(unit), dtype=torch.bool)].mean())


def looks(scale: float) -> Tensor:
    """Eq. 16 by the library, for the toy."""
    one = PairScorer(HSLMConfig(width=64, sim=2, glob=False, cross_scale=scale)).requires_grad_(False)
    pictures = Picture(toy_regions[None], all_real(toy_regions[None]))
    return one.relate(one.prepare(pictures), toy_words[None])[0]


axis = np.geomspace(0.5, 64, 25)
products = toy_words @ toy_regions.T
fig, axes = plt.subplots(1, 3, figsize=(6.9, 2.5), layout="constrained", width_ratios=[1.15, 1.15, 1])
for ax, scale in zip(axes, (1.0, p.sharp), strict=False):
    figures.matrix(ax, looks(scale), [""] * 12, [""] * 36, label="$f$")
    ax.set(xlabel="36 regions", ylabel="12 words", title=f"cross_scale = {scale:g}", aspect="auto")
axes[2].plot(axis, [likeness(looks(s)) for s in axis], marker="")
axes[2].plot(axis, [likeness((s * products).softmax(-1)) for s in axis], "--", marker="")
between_words = float((toy_words @ toy_words.T)[~torch.eye(12, dtype=torch.bool)].mean())
axes[2].axhline(between_words, color=figures.FAINT, linestyle=":", marker="")
axes[2].set(xscale="log", ylim=(-0.05, 1.05), xlabel="cross_scale", ylabel="cosine of two contexts")
axes[2].set_xticks([1, 4, 16, 64], ["1", "4", "16", "64"])
axes[2].minorticks_off()
for x, y, name in ((11, 0.7, "sigmoid"), (4.6, 0.15, "softmax"), (0.45, 0.02, "the words")):
    axes[2].text(x, y, name, fontsize=8)
figures.save(fig, root() / "figures" / f"hslm_lesson_contexts{'.smoke' * p.smoke}.svg")
plt.show()

plain, sharper = likeness(looks(1.0)), likeness(looks(p.sharp))
print(f"mean cosine of two contexts: {plain:.3f} at 1, {sharper:.3f} at {p.sharp:g}")
assert plain > 0.95
assert sharper < plain - 0.1
assert likeness(looks(1e4)) > 0.3  # a sigmoid never lets go: half of the unrelated regions stay on
assert likeness((16 * products).softmax(-1)) < 0.2  # a softmax does

# %% [markdown]
# **Why the context is made unit** (reading H11). The weights of a word sum to about $N/2$, so $fR^*$ is many times
# longer than the word that it is compared with, and $|E^* - R_a^*|^2$ would measure *how many* regions there are. By
# hand: take each of the two regions twice. The raw context of word 1 doubles from (0.731, 0.5) to (1.462, 1) and its
# squared distance from the word jumps from 0.322 to 1.214. The unit context does not move: 0.349 both times.

# %%
doubled = torch.cat([regions_2, regions_2], 1)
for r, from_raw in ((regions_2, 0.322), (doubled, 1.214)):
    raw = (torch.sigmoid(words_2 @ r.mT) @ r)[0, 0]
    assert close((words_2[0, 0] - raw).square().sum(), from_raw, 1e-3)
    assert close((words_2[0, 0] - F.normalize(raw, dim=0)).square().sum(), 0.349, 1e-3)

torch.manual_seed(p.seed)
for context_norm in (True, False):
    one = PairScorer(HSLMConfig(width=2, sim=3, glob=False, context_norm=context_norm)).requires_grad_(False)
    few, many = (rate(one, r, words_2) for r in (regions_2, doubled))
    assert close(few, many, 1e-6) == context_norm  # unit contexts do not notice; raw ones do

# %% [markdown]
# **Exercise 3 (build).** Write Eq. 15 and 16 for words "l d", regions "n d" and a `scale` inside the sigmoid: the unit context of each word, "l d".


# %% tags=["exercise"]
def gathered(words: Tensor, regions: Tensor, scale: float) -> Tensor: ...


check("hslm.contexts", gathered)


# %% tags=["solution"] jupyter={"source_hidden": true}
def gathered(words: Tensor, regions: Tensor, scale: float) -> Tensor:
    return F.normalize((scale * words @ regions.T).sigmoid() @ regions, dim=1)


check("hslm.contexts", gathered)

# %% [markdown]
# ## 6. From two sets of vectors to one number (Eq. 17 to 22)
#
# $$S(m_1, m_2) = \frac{W|m_1 - m_2|^2}{\|W|m_1 - m_2|^2\|_2} \quad (17), \qquad
# S_L = S(E^*, R_a^*), \quad S_G = S(\hat E^*, \hat R_a^*) \quad (18, 19)$$
# $$S^* = S_L \,\|\, S_G \quad (20), \qquad S_A = \mathrm{Sigmoid}(W_S S^*)\odot S^* \quad (21), \qquad
# S_F = FC(S_A) \quad (22)$$
#
# The square is elementwise, so Eq. 17 is a *vector* of width $s$: in which channels do the two differ? $S_L$ has one
# row per word, $S_G$ is one more: $M + 1$ nodes of width $s$ (reading H15). Eq. 21 gives each node a gate and adds the
# nodes up, $S_A = \sum_k \sigma(w\cdot s_k)\,s_k$ (reading H16), so that captions of any length end in one vector.
#
# By hand, the two words and the two contexts of section 5, $W = I$, $w = (1, -1)$, $FC = (2, 1)$ with bias ½:
#
# | | word 1 | word 2 |
# |---|---|---|
# | context (unit) | (0.8255, 0.5645) | (0.5645, 0.8255) |
# | difference squared | (0.0305, 0.3186) | (0.3186, 0.0305) |
# | Eq. 17, $s_k$ | (0.0952, 0.9955) | (0.9955, 0.0952) |
# | gate $\sigma(w \cdot s_k)$ | σ(−0.9003) = 0.2890 | σ(0.9003) = 0.7110 |
# | gate times $s_k$ | (0.0275, 0.2877) | (0.7078, 0.0677) |
#
# $S_A = (0.7353, 0.3554)$ and $S_F = 2\cdot 0.7353 + 0.3554 + 0.5 = 2.326$.

# %%
fill(scorer.compare_local, EYE)
fill(scorer.gate, [[1.0, -1.0]])
fill(scorer.score, [[2.0, 1.0]], 0.5)
s_1 = scorer.similarity(scorer.compare_local, words_2 - contexts)
assert close(s_1, [[[0.0952, 0.9955], [0.9955, 0.0952]]], 2e-4)
gate = torch.sigmoid(scorer.gate(s_1))
assert close(gate, [[[0.2890], [0.7110]]], 2e-4)
assert close((gate * s_1).sum(1), [[0.7353, 0.3554]], 2e-4)
assert close(rate(scorer, regions_2, words_2), [[2.3260]], 2e-4)

# %% [markdown]
# **The global vectors.** Each side pools its vectors into one. The mean asks, the parts answer, a softmax weighs:
#
# $$w = \mathrm{softmax}_i\; v\cdot\big(\tanh(W_l x_i) * \tanh(W_g \bar x)\big), \qquad \hat x = \sum_i w_i x_i\,/\,|\cdot|$$
#
# By hand with $x = (1,0), (0,1)$, both matrices the identity, $v = (1, 0)$: the mean is (½, ½); word 1 answers
# $\tanh 1\cdot\tanh ½ = 0.3519$, word 2 answers 0. The weights are 0.587 and 0.413, and $\hat x = (0.818, 0.575)$.
# The picture's vector is pooled from $R_a^*$, the contexts, so a picture has *another* global vector for every caption.

# %%
pool = SelfAttentionPooling(2).requires_grad_(False)
fill(pool.local, EYE), fill(pool.query, EYE), fill(pool.vote, [[1.0, 0.0]])
assert close(pool(words_2, all_real(words_2)), [[0.818, 0.575]], 1e-3)

# %% [markdown]
# **What Eq. 17 cannot see.** It divides by the length of the similarity vector. How *far* apart two vectors are is
# thus forgotten; only in which channels they differ most is left. A difference ten times as large gives the same
# vector, and a perfect match, a difference of nothing, gives a vector of nothing. This is SGRAF's form; it works
# because $W$ learns which channels differ for pairs that belong together and which for pairs that do not.

# %%
torch.manual_seed(p.seed)
compare, difference = nn.Linear(8, 4, bias=False).requires_grad_(False), torch.randn(8)
assert close(scorer.similarity(compare, 10 * difference), scorer.similarity(compare, difference), 1e-5)
assert close(scorer.similarity(compare, torch.zeros(8)), torch.zeros(4))

# %% [markdown]
# **Exercise 4 (change).** With gates that are added and not averaged (`node_weights="raw"`, the default), what does a longer caption do to the logit? Predict
# what saying the caption of the example twice does with "raw" and with "l1": "higher", "lower" or "the same". Then measure it: `rate` of a `PairScorer` with the
# weights of `scorer`, for `torch.cat([words_2, words_2], 1)`.

# %% tags=["exercise"]
raw, averaged, logits = ..., ..., ...  # two predictions; {"raw": ..., "l1": ...}
check("hslm.longer", raw, averaged, logits)

# %% [markdown] tags=["solution"] jupyter={"source_hidden": true}
# Every word adds a node and each gate is positive, so $S_A$ grows with $M$: twice the words give twice the $S_A$, and the logit goes from
# 2.326 to $2\cdot(2.326 - 0.5) + 0.5 = 4.152$, farther from the bias. Of two captions that match an image equally well word by word, the longer one
# has the more extreme logit. `l1` divides by the sum of the gates and does not notice.

# %% tags=["solution"] jupyter={"source_hidden": true}
logits, said_twice = {}, torch.cat([words_2, words_2], 1)
for weights, expected in (("raw", 2 * (2.3260 - 0.5) + 0.5), ("l1", None)):
    one = PairScorer(HSLMConfig(width=2, sim=2, glob=False, node_weights=weights)).requires_grad_(False)
    one.load_state_dict(scorer.state_dict())
    once, again = (rate(one, regions_2, w).item() for w in (words_2, said_twice))
    print(f"{weights}: once {once:.3f}, twice {again:.3f}")
    assert close(again, once if expected is None else expected, 1e-3)
    logits[weights] = again
check("hslm.longer", "higher", "the same", logits)

# %% [markdown]
# ## 7. The objective: the hardest negatives, and their plateau (Eq. 23)
#
# $$L = \big[\beta - S(I, C) + S(I, \hat C)\big]_+ + \big[\beta - S(I, C) + S(\hat I, C)\big]_+, \qquad \beta = 0.2$$
#
# $\hat C$ is the caption of the batch that scores highest for $I$ without belonging to it, $\hat I$ likewise. (The
# paper prints $S(\hat I, \hat C)$ in the first bracket, which cannot be meant: reading H18.) The sum runs over the $B$
# pairs of the batch. By hand, three pairs, true ones on the diagonal:
#
# | | caption 1 | caption 2 | caption 3 | hardest caption | term |
# |---|---|---|---|---|---|
# | picture 1 | **0.9** | 0.8 | 0.1 | 0.8 | 0.2 − 0.9 + 0.8 = 0.1 |
# | picture 2 | 0.2 | **0.5** | 0.6 | 0.6 | 0.2 − 0.5 + 0.6 = 0.3 |
# | picture 3 | 0.3 | 0.4 | **0.7** | 0.4 | −0.1: 0 |
# | hardest picture | 0.3 | 0.8 | 0.6 | | |
# | term | −0.4: 0 | 0.2 − 0.5 + 0.8 = 0.5 | 0.2 − 0.7 + 0.6 = 0.1 | | **1.0 in all** |
#
# A picture has five captions, so a batch can hold two of one picture. Each would be called the hardest negative of
# the other's picture, and the loss would punish the right answer. They are no negatives. If pictures 1 and 2 are one,
# the terms 0.1 and 0.5 go.

# %%
table = torch.tensor([[0.9, 0.8, 0.1], [0.2, 0.5, 0.6], [0.3, 0.4, 0.7]])
own = torch.eye(3, dtype=torch.bool)
assert close(hinge(table, own), 0.1 + 0.3 + 0 + 0 + 0.5 + 0.1)
one_picture = own.clone()
one_picture[0, 1] = one_picture[1, 0] = True
assert close(hinge(table, one_picture), 0.3 + 0.1 + 0.1)
over_all = 0.05 + 0.15 + 0 + 0 + 0.3 + 0.05  # the same, averaged over both negatives of a row or column
assert close(hinge(table, own, negatives="mean"), over_all)

# %% [markdown]
# **Exercise 5 (build).** Write Eq. 23 for scores "b b" with the true pairs on the diagonal, the hardest negatives and a margin of 0.2, summed over the batch.


# %% tags=["exercise"]
def ranking(scores: Tensor) -> Tensor: ...


check("hslm.hinge", ranking)


# %% tags=["solution"] jupyter={"source_hidden": true}
def ranking(scores: Tensor) -> Tensor:
    total, itself = 0.0, torch.eye(len(scores), dtype=torch.bool)
    for asked in (scores, scores.T):
        excess = (0.2 - asked.diagonal()[:, None] + asked).clamp(min=0)
        total = total + excess.masked_fill(itself, 0.0).amax(1).sum()
    return total


check("hslm.hinge", ranking)

# %% [markdown]
# **The plateau.** A model that gives every pair the same score has a loss of exactly $2B\beta$: 51.2 for a batch of
# 128. Suppose it begins to spread its scores, $S = \text{spread}\cdot z$, where $z$ is noise of deviation 1 and the true
# pairs have a little more, a *signal*. As long as every bracket is open, the loss is a straight line:
#
# $$L = 2B\beta + \text{spread}\cdot\sum_i \big[\max_{j\ne i} z_{ij} - z_{ii}\big] + \big[\max_{k \ne i} z_{ki} - z_{ii}\big]$$
#
# The maximum of 127 draws of noise is about 2.6. Unless the signal is larger than that, **spreading the scores raises
# the loss**, and the cheapest thing to do is to fall back on the plateau. With the mean over negatives the noise
# averages out, and any signal at all leads downhill. So it does with a contrastive loss, the mean of
# $-\log\mathrm{softmax}$ of the true pair among the batch, whose plateau is $\ln B$. `terms["plateau"]` marks the
# steps of a run that sit there.

# %%
B, signals = p.batch, (1.0, 5.0)
torch.manual_seed(p.seed)
noise, diagonal = torch.randn(B, B), torch.eye(B, dtype=torch.bool)
flat_loss = 2 * B * 0.2
assert close(hinge(torch.full((B, B), 0.37), diagonal) / flat_loss, 1.0)

spread = np.linspace(0, 0.12, 25)
fig, ax = plt.subplots(figsize=(5.8, 2.7), layout="constrained")
for kind, line in (("hardest", "-"), ("mean", "--")):
    for k, signal in enumerate(signals):
        z = noise + signal * torch.eye(B)
        values = [float(hinge(s * z, diagonal, negatives=kind)) / flat_loss for s in spread.tolist()]
        ax.plot(spread, values, line, color=figures.PALETTE[k], marker=figures.MARKERS[k], markevery=4,
                label=f"{kind}, signal {signal:g}")  # fmt: skip
for k, signal in enumerate(signals):
    z = noise + signal * torch.eye(B)
    values = [float(softmax_loss(10 * s * z, diagonal)) / math.log(B) for s in spread.tolist()]
    ax.plot(spread, values, ":", color=figures.PALETTE[k], marker=figures.MARKERS[k], markevery=4,
            label=f"contrastive, signal {signal:g}")  # fmt: skip
ax.axhline(1, color=figures.FAINT, linestyle=":", marker="")
ax.text(0.12, 1.03, "plateau", fontsize=7, ha="right")
ax.set(xlabel="spread of the scores (deviation of the noise)", ylabel="loss / its plateau", ylim=(0, 2.1),
       title=f"{B} pairs: does it pay to tell pairs apart?")  # fmt: skip
ax.legend(loc="upper left", ncols=3)
figures.save(fig, root() / "figures" / f"hslm_lesson_plateau{'.smoke' * p.smoke}.svg")
plt.show()

weak, strong = (noise + signal * torch.eye(B) for signal in signals)
rival = weak.masked_fill(diagonal, -math.inf)
slope = (rival.amax(0) + rival.amax(1) - 2 * weak.diagonal()).sum()
assert close(hinge(1e-2 * weak, diagonal), flat_loss + 1e-2 * slope, 1e-2)  # the straight line
assert slope > 0 > (strong.masked_fill(diagonal, -math.inf).amax(1) - strong.diagonal()).sum()
assert hinge(1e-2 * weak, diagonal) > flat_loss > hinge(1e-2 * weak, diagonal, negatives="mean")
assert close(softmax_loss(torch.full((B, B), 0.37), diagonal), math.log(B))
assert softmax_loss(0.1 * weak, diagonal) < math.log(B)

# %% [markdown]
# **What the gradient does there.** It pushes each true pair up by 2 (it stands in two brackets) and pushes two
# negatives down by 1. Which ones? At *exactly* equal scores all tie, and the maximum shares its gradient among them:
# the same as the mean's. A hair off, chance has picked one for each picture and each caption. All entries sum to
# zero. So if pictures and captions look alike to the model, the pushes cancel inside it, and the gradient of every
# parameter is zero: the plateau is not only flat, it holds.

# %%
torch.manual_seed(p.seed)
small = torch.eye(6, dtype=torch.bool)
starts = {"hardest, all equal": (torch.zeros(6, 6), "hardest"),
          "hardest, a hair apart": (1e-4 * torch.randn(6, 6), "hardest"),
          "mean": (torch.zeros(6, 6), "mean"),
          "contrastive, a hair apart": (1e-4 * torch.randn(6, 6), "contrastive")}  # fmt: skip
slopes = {}
for name, (start, kind) in starts.items():
    start.requires_grad_()
    loss = softmax_loss(start, small) if kind == "contrastive" else hinge(start, small, negatives=kind)
    loss.backward()
    slopes[name] = start.grad / start.grad.diagonal().mean() * -2  # of one length, to be compared
fig, axes = plt.subplots(1, 4, figsize=(9.2, 2.3), layout="constrained")
for ax, (name, slope_table) in zip(axes, slopes.items(), strict=True):
    figures.matrix(ax, slope_table, [str(k + 1) for k in range(6)], low=-2, high=2, label="dL / dS")
    ax.set(title=name, xlabel="caption", ylabel="picture")
plt.show()
for slope_table in slopes.values():
    assert close(slope_table.diagonal(), [-2.0] * 6, 1e-3)
    assert abs(slope_table.sum()) < 1e-5
assert close(slopes["hardest, all equal"], slopes["mean"], 1e-6)
assert close(slopes["contrastive, a hair apart"], slopes["mean"], 1e-3)
assert not close(slopes["hardest, a hair apart"], slopes["mean"], 0.3)


def batch_of(n: int, *, equal: bool = False, seed: int = 1) -> dict:
    """Random pairs for a tiny model; `equal`: all pictures and all captions are one, under different names."""
    g = torch.Generator().manual_seed(seed)
    features, ids = torch.randn(n, 5, 7, generator=g), torch.randint(1, 30, (n, 4), generator=g)
    if equal:
        features, ids = features[:1].expand(n, -1, -1), ids[:1].expand(n, -1)
    pictures = {"features": features, "mask": all_real(features)}
    real = torch.ones(n, 4, dtype=torch.bool)
    captions = {"input_ids": ids, "mask": real, "special": ~real}
    return {"image": pictures, "text": captions, "image_id": torch.arange(n)}


def tiny(**options) -> HSLM:
    """A tiny HSLM, always from the same start."""
    torch.manual_seed(p.seed)
    warmup = {"warmup_steps": options.pop("warmup_steps", 0)}
    config = HSLMConfig(**{"width": 12, "embed": 10, "sim": 6, "depth": 2, **options})
    return HSLM(7, 30, config, **warmup).eval()


stuck = tiny()
terms = stuck(batch_of(6, equal=True))
terms["loss"].backward()
assert terms["plateau"] == 1
assert close(terms["loss"].detach(), 2 * 6 * 0.2)
assert max(float(q.grad.abs().max()) for q in stuck.parameters()) < 1e-5  # nothing moves

# %% [markdown]
# **The way out** is to begin with easier negatives (reading H26; the paper says nothing of a start). With
# `start="random"` the first `warmup_steps` take, for each picture and each caption, *one random* negative in place of
# the hardest. What it costs on average is exactly the mean over negatives, and so is its
# gradient, but only $3B$ pairs have to be scored. The cell enumerates every choice for three pairs: two captions for
# each picture, two pictures for each caption, $2^6 = 64$ losses.

# %%
others = [[j for j in range(3) if j != i] for i in range(3)]
choices = list(itertools.product(*others))  # one caption for each picture, or one picture for each caption
losses = []
for for_pictures, for_captions in itertools.product(choices, choices):
    excess = [table[i, j] - table[i, i] for i, j in enumerate(for_pictures)]
    excess += [table[k, i] - table[i, i] for i, k in enumerate(for_captions)]
    losses.append(float(F.relu(0.2 + torch.stack(excess)).sum()))
assert len(losses) == 64
assert close(np.mean(losses), hinge(table, own, negatives="mean"))
assert max(losses) <= float(hinge(table, own)) + 1e-6  # none costs more than the hardest

# The model itself: random in the first two training steps, the hardest from then on.
data = batch_of(6)
warm, drawn_anew = tiny(start="random", warmup_steps=2).train(), tiny(negatives="random").train()
with torch.no_grad():
    first, second, third = (float(warm(data)["loss"]) for _ in range(3))
    hard = float(tiny()(data)["loss"])
    random = [float(drawn_anew(data)["loss"]) for _ in range(200)]
    mean = float(tiny(negatives="mean")(data)["loss"])
assert close(third, hard, 1e-5)
assert max(first, second) <= hard + 1e-5
assert abs(np.mean(random) - mean) < 4 * np.std(random) / math.sqrt(len(random)) + 1e-4
print(f"warm-up {first:.4f}, {second:.4f}, then {third:.4f}; mean of 200 random draws {np.mean(random):.4f}, "
      f"over all negatives {mean:.4f}")  # fmt: skip

# %% [markdown]
# **The default start is contrastive** (`start="contrastive"`). It shares the mean's direction on the plateau, and does
# not keep it: a negative counts by its softmax, so that the more the model knows, the more the hard ones count. The
# cell shows what share of a row's push goes to the hardest of its negatives, while noise and signal grow together
# (signal 3). For the mean it is 1 / 127, for the hinge it is all of it, from the first step.

# %%
grown = noise + 3 * torch.eye(B)
shares = {}
for height in (0.0, 0.1, 0.2, 0.4):
    at_height = (height * grown).requires_grad_()
    softmax_loss(10 * at_height, diagonal).backward()
    push = at_height.grad.masked_fill(diagonal, 0)
    shares[height] = float((push.amax(1) / push.sum(1)).mean())
print(", ".join(f"spread {k:g}: {100 * v:.1f} %" for k, v in shares.items()))
assert close(shares[0.0], 1 / (B - 1), 1e-4)
assert list(shares.values()) == sorted(shares.values())
assert shares[0.4] > 10 * shares[0.0]

# %% [markdown]
# **Exercise 6 (compute).** All negatives score alike and every true pair scores $g$ more. The contrastive loss multiplies scores by 10 (`start_scale`). At which
# $g$ has it fallen from $\ln B$ to half of it, for $B = 128$? (And is the hinge, with its margin of 0.2, then still at work?)

# %% tags=["exercise"]
lead = ...  # a number
check("hslm.half", lead)

# %% [markdown] tags=["solution"] jupyter={"source_hidden": true}
# $\ln(1 + (B - 1)e^{-10g}) = \tfrac12\ln B$ gives $g = \ln\frac{B-1}{\sqrt B - 1} / 10 = 0.251$. The hinge has stopped: every bracket is
# $0.2 - 0.251 < 0$. The contrastive loss pulls on, which is why it can be trained with to the end.

# %% tags=["solution"] jupyter={"source_hidden": true}
gap = math.log((B - 1) / (math.sqrt(B) - 1)) / 10
apart = gap * torch.eye(B)
print(f"B = {B}: g = {gap:.3f}, loss {softmax_loss(10 * apart, diagonal):.3f} of {math.log(B):.3f}, "
      f"hinge {hinge(apart, diagonal):.3f}")  # fmt: skip
assert close(softmax_loss(10 * apart, diagonal), math.log(B) / 2, 1e-3)
assert hinge(apart, diagonal) == 0 or B < 128
check("hslm.half", math.log(127 / (math.sqrt(128) - 1)) / 10)

# %% [markdown]
# **Search without a gradient.** Eq. 23 needs all $B^2$ scores to *find* the hardest negatives, but only $3B$ of them
# appear in it: $B$ true pairs and $2B$ hardest. All the others have gradient zero. So the library scores the whole
# batch without a gradient, picks, and scores the $3B$ pairs once more with one. The gradient is the same (away from
# exact ties, where the maximum would share). Counting a backward pass as two forward ones: $3B^2$ against
# $B^2 + 3\cdot 3B$, at $B = 128$ a third of the work, and the memory for 384 pairs in place of 16,384.

# %%
one = tiny().double()
data["image"]["features"] = data["image"]["features"].double()
seen_6, told_6 = one.encode_image(**data["image"]), one.encode_text(**data["text"])
whole = hinge(one.squash(score(one.pairs, one.pairs.prepare(seen_6), told_6)), small)
picked_only = one(data)["loss"]
assert close(whole.detach(), picked_only.detach(), 1e-6)
weights = list(one.parameters())
full, mined = (torch.autograd.grad(loss, weights, allow_unused=True) for loss in (whole, picked_only))
assert all(close(a, b, 1e-9) for a, b in zip(full, mined, strict=True) if a is not None)
assert (128**2 + 3 * 3 * 128) / (3 * 128**2) < 0.36

# %% [markdown]
# **Exercise 7 (compute).** How strong must the signal be, in deviations of the noise, before telling pairs apart pays with the hardest of $B = 32$, 128 and 1,024? Give
# the three numbers by drawing noise. (And with the mean?)

# %% tags=["exercise"]
strength = ...  # {32: ..., 128: ..., 1024: ...}
check("hslm.signal", strength)

# %% [markdown] tags=["solution"] jupyter={"source_hidden": true}
# The slope is negative once the signal exceeds the expected maximum of $B - 1$ draws: about 2.1, 2.6 and 3.2. It grows like $\sqrt{2\ln B}$, so larger batches
# have a stickier plateau. With the mean the expected slope is minus the signal itself: any positive one will do.

# %% tags=["solution"] jupyter={"source_hidden": true}
torch.manual_seed(p.seed)
needed = {B_: float(torch.randn(400, B_ - 1).amax(1).mean()) for B_ in (32, 128, 1024)}
print(", ".join(f"B = {B_}: {value:.2f}" for B_, value in needed.items()))
for (_, value), expected in zip(needed.items(), (2.06, 2.60, 3.24), strict=True):
    assert abs(value - expected) < 0.12
check("hslm.signal", needed)

# %% [markdown]
# ## 8. Every picture against every caption, fast
#
# Ranking Flickr30k's test set takes $1{,}000 \times 5{,}000$ pairs. As the paper writes it, each pair has its own
# contexts, and they go through layers of width 1,024. Below is one pair by the book: a dozen lines, each an equation.
# The library must give the same number, to rounding, and does three things differently.


# %%
def by_the_book(one: PairScorer, regions: Tensor, words: Tensor, vector: Tensor) -> Tensor:
    """The logit of one picture "N d" with one caption "M d", every context made, every layer applied to it."""
    f = torch.sigmoid(one.cross_scale * words @ regions.T)  # Eq. 16
    contexts = F.normalize(f @ regions, dim=-1)  # Eq. 15
    local = one.compare_local((words - contexts).square())  # Eq. 17, 18
    pooled = one.pool_image(contexts[None], all_real(contexts[None]))[0]
    whole = one.compare_global((vector - pooled).square())  # Eq. 19
    nodes = F.normalize(torch.cat([local, whole[None]]), dim=-1)  # Eq. 20
    return one.score((torch.sigmoid(one.gate(nodes)) * nodes).sum(0))[0]  # Eq. 21, 22


@torch.no_grad()
def material(width: int, sim: int, pictures: int, lengths: list[int]) -> tuple[PairScorer, Picture, Caption]:
    """A scorer with random pictures of 36 regions and captions of these lengths, padded."""
    torch.manual_seed(p.seed)
    one, longest = PairScorer(HSLMConfig(width=width, sim=sim)).requires_grad_(False), max(lengths)
    r, w = torch.randn(pictures, 36, width), torch.randn(len(lengths), longest, width)
    real = torch.arange(longest)[None] < torch.tensor(lengths)[:, None]
    w = F.normalize(w, dim=-1) * real[..., None]
    picture = Picture(F.normalize(r, dim=-1), all_real(r))
    return one, picture, Caption(w, real, F.normalize(w.sum(1), dim=-1))


def each_by_the_book(one: PairScorer, picture: Picture, caption: Caption) -> Tensor:
    each = [[by_the_book(one, r, w[m], v) for w, m, v in zip(*caption, strict=True)] for r in picture.regions]
    return torch.stack([torch.stack(row) for row in each])


scorer_8, seen_8, told_8 = material(64, 32, 5, [3, 5, 5, 2, 6])
fast, book = score(scorer_8, scorer_8.prepare(seen_8), told_8), each_by_the_book(scorer_8, seen_8, told_8)
assert close(fast, book, 1e-5)
assert book.std() > 1e-4

# %% [markdown]
# **First: Gram.** The length of a context $c = \sum_n p_n r_n$ needs no context. $\|c\|^2 = p^{\top}(R R^{\top})\,p$,
# and $RR^{\top}$ is $N \times N$, made once per picture. The weights are divided by that length, and the difference
# $E^* - fR^*$ is one product that subtracts.
#
# **Second: linearity.** The pooling of the contexts applies a $d \times d$ layer to every context of every pair. But
# $W\sum_n p_n r_n = \sum_n p_n\,(W r_n)$: apply it to the 36 regions once per picture, and mix the results.
# The same with Eq. 22: $FC(\sum_k g_k s_k) = \sum_k g_k FC(s_k)$, so that nodes are never stacked.
#
# **Third: captions of one length share a product.** No padding is computed, and no loop runs over captions.

# %%
r, weights = seen_8.regions[0], torch.sigmoid(told_8.words[1, :5] @ seen_8.regions[0].T)
contexts = weights @ r
assert close(contexts.norm(dim=-1).square(), ((weights @ (r @ r.T)) * weights).sum(-1))  # Gram
layer = scorer_8.pool_image.local
assert close(layer(contexts), weights @ (r @ layer.weight.T) + layer.bias)  # linearity
nodes_8, gates_8 = torch.randn(6, 32), torch.rand(6, 1)
fc = scorer_8.score
assert close(fc((gates_8 * nodes_8).sum(0)), (gates_8 * F.linear(nodes_8, fc.weight)).sum(0) + fc.bias)

for c, length in enumerate([3, 5, 5, 2, 6]):  # a caption scores the same padded, in company, and alone
    alone = rate(scorer_8, seen_8.regions, told_8.words[c : c + 1, :length], told_8.vector[c : c + 1])
    assert close(alone[:, 0], fast[:, c], 1e-5)

lengths = tokenise([c for record in records for c in record.captions], tokenizer).lengths
shuffled = np.random.default_rng(p.seed).permutation(lengths)
padded = sum(len(chunk) * chunk.max() for chunk in np.array_split(shuffled, max(1, len(lengths) // 100)))
print(f"captions of {lengths.min()} to {lengths.max()} tokens, {lengths.mean():.1f} on average: "
      f"in batches of 100, {100 * (1 - lengths.sum() / padded):.0f} % of all positions would be padding")  # fmt: skip
assert padded > lengths.sum()

# %% [markdown]
# How much is it? Counted in operations (a multiplication and an addition are two), by formula and by torch's own
# counter, for one pair: $N = 36$, $M = 13$, and the widths of the preset.

# %%
N, M, setting = 36, 13, preset("hslm", p.scale)
d, s = setting["width"], setting["sim"]
steps = pd.DataFrame(
    {
        "f, Eq. 16": (2 * M * N * d, 2 * M * N * d),
        "contexts, Eq. 15": (2 * M * N * d, 2 * M * N * d + 2 * M * N * N),  # the length by Gram
        "pooling, 3.5": (2 * M * d * (d + 2) + 2 * d * d, 2 * d * (M * N + 2 * N + M) + 2 * M * N),
        "W|a − b|², Eq. 17": (2 * (M + 1) * d * s, 2 * (M + 1) * d * s),
        "gates, FC": (2 * (M + 2) * s, 4 * (M + 1) * s),
    },
    index=["by the book", "library"],
).T
scorer_p, seen_p, told_p = material(d, s, 2, [M] * 4)
works = {
    "by the book": (lambda: by_the_book(scorer_p, seen_p.regions[0], told_p.words[0], told_p.vector[0]), 1),
    "library": (lambda: score(scorer_p, view_p, told_p), 2 * 4),  # pairs
    "once per picture": (lambda: scorer_p.prepare(seen_p), 2),  # pictures
}
view_p, counted = scorer_p.prepare(seen_p), {}
for name, (work, parts_) in works.items():
    with FlopCounterMode(display=False) as counter:
        work()
    counted[name] = counter.get_total_flops() / parts_
show((steps / 1e6).rename_axis(f"million operations a pair, {p.scale}"))
assert all(steps[name].sum() == counted[name] for name in steps)  # the formulas are what torch counts
ratio, once = counted["by the book"] / counted["library"], counted["once per picture"] / 1e6
print("million operations a pair: {:.1f} and {:.1f}, {:.1f} times fewer".format(*steps.sum() / 1e6, ratio))
print(f"once per picture: {once:.0f} million, which is {once / 5000:.2f} million a pair with 5,000 captions")
if p.scale == "paper":
    assert ratio > 3.5
    assert steps.loc["W|a − b|², Eq. 17", "library"] > 0.6 * counted["library"]

fig, ax = plt.subplots(figsize=(6.4, 2.2), layout="constrained")
figures.bars(ax, steps.index, {name: steps[name] / 1e6 for name in steps}, ylabel="million operations a pair")
plt.show()

# %% [markdown]
# What is left is mostly Eq. 17: the square of a difference cannot be taken apart, so its layer sees every word of
# every pair. Operations are not seconds. Small products, copies and Python's loop cost time that no formula counts,
# and it is there that sharing products gains most. A tiny measurement, on this machine, now:

# %%
width, sim = (preset("hslm", "photos")[name] for name in ("width", "sim"))
material_t = material(width, sim, 8, shuffled[:32].tolist())


def library(one: PairScorer, picture: Picture, caption: Caption) -> Tensor:
    return score(one, one.prepare(picture), caption)


took, found = {}, {}
for work in (each_by_the_book, library):
    work(*material_t)  # warm
    started = time.perf_counter()
    found[work.__name__] = work(*material_t)
    took[work.__name__] = 1e6 * (time.perf_counter() - started) / found[work.__name__].numel()
print(f"width {width}, microseconds a pair: " + ", ".join(f"{k} {v:.0f}" for k, v in took.items())
      + f": {took['each_by_the_book'] / took['library']:.1f} times")  # fmt: skip
assert close(*found.values(), 1e-4)

# %% [markdown]
# ## 9. Every reading, in one table
#
# Where the paper leaves a choice, the choice is an argument. The first value is the default. `hslm/2_train`
# takes them all as parameters.

# %%
columns = ["reading", "argument", "values", "default", "literal", "the paper"]
show(pd.DataFrame(HSLMConfig.readings(), columns=columns).set_index("reading"))
# each value is accepted, and the default is the model of the sections above
with torch.no_grad():
    default = tiny()(batch_of(6))["loss"]
    for _, argument, values, standard, *_ in HSLMConfig.readings():
        losses = [tiny(**{argument: value})(batch_of(6))["loss"] for value in values]
        assert torch.stack(losses).isfinite().all()
        assert tiny(**{argument: standard})(batch_of(6))["loss"] == default

# %% [markdown]
# Besides: `negatives` and `warmup_steps` of section 7, and `depth`, 4 in the paper, which counts Eq. 8 as the first
# layer (H6). Whatever the loss compares (H17), pictures are ranked by the logit: a sigmoid near 1 makes ties.
#
# ## 10. Table 4: twelve rows, five switches
#
# The ablation takes modules away. Each row is a call with five booleans. The cell builds all twelve at the preset's
# size (a vocabulary of 8,481 words and 2,048 features at scale `paper`, as for Flickr30k), without allocating them.

# %%
ROWS = [a + b for b in (".g.", "c.l", "cgl") for a in ("..", ".s", "m.", "ms")]
vocabulary, features = (8481, 2048) if p.scale == "paper" else (len(tokenizer), 512)
rows = []
for number, marks in enumerate(ROWS, start=1):
    on = {name: mark != "." for name, mark in zip(MODULES, marks, strict=True)}
    with torch.device("meta"):
        shape = {name: setting[name] for name in ("width", "embed", "sim", "depth")}
        built = HSLM(features, vocabulary, HSLMConfig(**shape, **on))
    rows.append({"row": str(number), **on, "parameters": sum(q.numel() for q in built.parameters())})
rows = pd.DataFrame(rows).set_index("row")
printed = published("HSLM", 4).pivot(index="row", columns="column", values="value").loc[rows.index]
rows["Rsum, published"] = printed["Rsum"]
shown = rows.assign(parameters=(rows["parameters"] / 1e6).map("{:.2f} M".format))
show(shown.replace({True: "✓", False: "·"}).rename_axis("Table 4"))

# %% [markdown]
# The parameters add up: self-attention is three matrices of $e \times e$ without biases, whichever row it is added
# to; the graph is four layers of four matrices a side. The local alignment adds one matrix, and the cross attention
# **nothing**: Eq. 15 and 16 have no weights. And note what the table cannot say: cross attention never stands without
# local alignment, nor the reverse.

# %%
count, e, depth = rows["parameters"], setting["embed"], setting["depth"]
graph = sum(depth * (4 * n**2 + 3 * n) for n in (d, e))  # mu, nu, W_r with biases, W_g without
for k in range(1, 13, 4):
    one, with_self, with_graph, with_both = (count[str(k + j)] for j in range(4))
    assert with_self - one == with_both - with_graph == 3 * e**2
    assert with_graph - one == with_both - with_self == graph
assert count["9"] - count["1"] == d * s  # cross and local: the matrix of Eq. 17 alone
assert (rows["cross_attn"] == rows["loc"]).all()

# %% [markdown]
# **Exercise 8 (compute).** From the twelve published Rsums of Table 4 (`published("HSLM", 4)`): what does each module gain, a mean over the pairs of rows that differ in it
# alone? Where do the numbers contradict each other?

# %% tags=["exercise"]
means = ...  # {"mgcn": ..., "self_attn": ..., "glob": ..., "cross_attn and loc": ...}
check("hslm.modules", means)

# %% [markdown] tags=["solution"] jupyter={"source_hidden": true}
# Cross attention with local alignment (only to be had together, and only where `glob` is on in both: rows 1 to 4 against 9 to 12) gains about 53; the
# graph about 7; self-attention about 4; global on top of local about 6. Two contradictions: the six recalls of row 2 sum to 439.2, Rsum is printed as
# 437.5; and the full model has 497.8 here but 508.6 in Table 1 on the same test set. The second is likely an ensemble of two models, as in VSRN and SGRAF; the paper
# does not say. A single model's target is 497.8.

# %% tags=["solution"] jupyter={"source_hidden": true}
R = rows["Rsum, published"]
pairs_of = {
    "cross_attn and loc": [("1", "9"), ("2", "10"), ("3", "11"), ("4", "12")],
    "mgcn": [("1", "3"), ("2", "4"), ("5", "7"), ("6", "8"), ("9", "11"), ("10", "12")],
    "glob": [("5", "9"), ("6", "10"), ("7", "11"), ("8", "12")],
    "self_attn": [("1", "2"), ("3", "4"), ("5", "6"), ("7", "8"), ("9", "10"), ("11", "12")],
}
each = {name: np.array([R[b] - R[a] for a, b in found]) for name, found in pairs_of.items()}
gains = pd.DataFrame(
    {k: {"mean": v.mean(), "smallest": v.min(), "largest": v.max()} for k, v in each.items()}
).T
show(gains.rename_axis("gain in Rsum"))
assert gains["mean"].is_monotonic_decreasing
recalls = printed.drop(columns="Rsum").sum(axis=1)
assert [k for k in recalls.index if abs(recalls[k] - R[k]) > 0.2] == ["2"]
main = published("HSLM", 1).query("column == 'Rsum'").set_index("row")["value"]
ours = main[next(name for name in main.index if "HSLM" in name)]
print(f"row 2 sums to {recalls['2']:.1f}, printed {R['2']:.1f}")
print(f"the full model: {ours:.1f} in Table 1, {R['12']:.1f} in Table 4")
assert ours - R["12"] > 10
check("hslm.modules", gains["mean"].to_dict())

# %% [markdown]
# ## What to take along
#
# * Eq. 6 and Eq. 8 are one operation, a cubic one: relations times vectors. Only the skip tells them apart, and only
#   dividing by the number of nodes keeps it in bounds.
# * A sigmoid does not choose. At scale 1 every word sees nearly the sum of all regions; what differs between words is
#   small, and it is what the local alignment lives on.
# * Eq. 17 compares directions, not distances.
# * The hardest negative of a batch makes a plateau; a contrastive loss or random negatives lead out of it.
# * Pairwise scoring is slow by the book and need not be: what depends on the picture alone is computed once a picture.
#
# Next: `2_train` trains one model, `3_ablations` draws the paper's tables beside ours, `4_attention` shows what words
# look at.
