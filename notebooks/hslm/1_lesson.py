# %% [markdown]
# # HSLM: the lesson
#
# **Paper** *Learning Hierarchical Semantic Correspondences for Cross-Modal Image-Text Retrieval* (ICMR 2022,
# [doi.org/10.1145/3512527.3531358](https://doi.org/10.1145/3512527.3531358)). This page explains its sections 3.1 to
# 3.6 and its Table 4, one equation after the other, on tensors that are small enough to work by hand.
#
# **Tables** This page makes none. It explains what the rows of Tables 1 to 4 are made of;
# [`2_train`](2_train.ipynb) trains them.
#
# **Cost** under a minute on one core, about 1 GB of memory. It takes half a minute more if the embedded set has not
# been drawn yet. The page trains nothing and writes no file but that set.
#
# **Expected** every cell passes. An `assert` follows each claim in the text. If the page runs to its end, its claims
# are true of this code.
#
# **How to read it.** Block quotes are short quotations from the paper. Vectors are *rows* on this page, as in the code;
# the paper writes words as columns. A number such as H10 is a [reading](../../docs/glossary.md): a place where the
# paper can be read in several ways. An exercise has an empty cell, `...`, and a check that says what is wrong with your
# answer. In the build with solutions, the folded cells below an exercise hold a solution: try first. The students' build
# has none. These helpers come back in many cells:
#
# | helper | what it does |
# |:--|:--|
# | `close(a, b)`, `refused(product)` | whether two results agree; whether the shapes of a product do not fit |
# | `full(x)`, `fill(layer, weight)` | a mask without padding; writes weights that we choose into a layer |
# | `tiny(seed)`, `batch_of(n)` | an untrained [`HSLM`](../../src/finematch/models/hslm.py#L545) of very small widths; random images and captions for it |
# | `rate(scorer, regions, words)` | the logits of images with captions |
# | `one` | the example of section 1; `one.spoken` holds the captions of 200 images as word ids |
# | `encoder.stages(...)` | $E$, then $E_f$, then the mask of real words: `[1]` is $E_f$ |
#
# | symbol | shape | meaning | name in the code | section |
# |:--|:--|:--|:--|:--|
# | $b$, $c$ | | number of images, of captions | axes `b`, `c` | [2](#model) |
# | $N$, $M$ | | [regions](../../docs/glossary.md) of an image, words of a caption | axes `n`, `l` | [2](#model) |
# | $d$, $e$, $s$ | | width of the joint space ($d_1$ in the paper), of a word embedding ($d_2$), of a similarity vector | `width`, `embed`, `sim` | [2](#model) |
# | $E$ | $M \times e$ | word embeddings | [`WordEncoder.stages`](../../src/finematch/models/hslm.py#L228) | [3](#words) |
# | $E_K$, $E_Q$, $E_V$ | $M \times e$ | keys, queries, values of the words | [`WordSelfAttention`](../../src/finematch/models/hslm.py#L63) | [3](#words) |
# | $E_f$ | $M \times e$ | words after self-attention | [`WordSelfAttention`](../../src/finematch/models/hslm.py#L63) | [3](#words) |
# | $R$, $R_g^l$, $R^*$ | $N \times d$ | regions before the graph, after layer $l$, after the last layer | [`RegionEncoder`](../../src/finematch/models/hslm.py#L179), `Picture.regions` | [4](#graph) |
# | $A$ | $N \times N$ | relations between regions; $M \times M$ between words | [`GraphLayer`](../../src/finematch/models/hslm.py#L122) | [4](#graph) |
# | $E^*$, its rows $t_j$ | $M \times d$ | words after the graph and the GRU | [`WordEncoder`](../../src/finematch/models/hslm.py#L200), `Caption.words` | [5](#order) |
# | $f$ | $M \times N$ | how strongly each word looks at each region | [`PairScorer.relate`](../../src/finematch/models/hslm.py#L461) | [6](#cross) |
# | $R_a^*$ | $M \times d$ | contexts: what each word sees of the image | [`PairScorer.nodes`](../../src/finematch/models/hslm.py#L363) | [6](#cross) |
# | $S_L$ | $M \times s$ | local similarity vectors, one for each word | [`PairScorer.similarity`](../../src/finematch/models/hslm.py#L511) | [7](#score) |
# | $\hat E^*$, $\hat R_a^*$ | $d$ | global vectors of the caption and of the image | [`SelfAttentionPooling`](../../src/finematch/models/hslm.py#L246) | [7](#score) |
# | $S_G$ | $s$ | global similarity vector | [`PairScorer.similarity`](../../src/finematch/models/hslm.py#L511) | [7](#score) |
# | $S_A$, $S_F$ | $s$, $1$ | the gathered similarity vector, and the score, a logit | [`PairScorer.fuse`](../../src/finematch/models/hslm.py#L516) | [7](#score) |
# | $S(I, C)$ | $1$ | score of image $I$ and caption $C$ in the loss: $\sigma(S_F)$ by default | [`HSLM.squash`](../../src/finematch/models/hslm.py#L624) | [8](#loss) |
# | $B$, $\beta$ | | pairs of a batch, margin of the loss | axis `b`, `margin` of [`hinge`](../../src/finematch/models/hslm.py#L697) | [8](#loss) |

# %% tags=["parameters"]
dataset: str = "scenes"  # the embedded set alone: which region belongs to which word is known
data_root: str = "data"  # folder above the dataset's own
scale: str = "paper"  # whose sizes are counted in sections 9 and 11: tiny, photos or paper
seed: int = 0  # of every random tensor below
out: str = "papermill_runs/hslm_lesson"  # not written to
smoke: bool = False  # a small embedded set of its own; the rest is small anyway
cache: str = "data/cache"  # where the small set of a smoke run goes
regions: int = 20  # proposals drawn on the image of section 1
layers: int = 4  # graph layers that section 4 draws
sharp: float = 16.0  # the sharper cross_scale of section 6
batch: int = 128  # pairs of the batch in section 8

# %% jupyter={"source_hidden": true}
from finematch.config import parameters, preset

p = parameters(globals(), dataset={"scenes"}, scale={"tiny", "photos", "paper"}, seed=(0, 2**31), regions=(8, 40),
           layers=(2, 6), sharp=(6, 64), batch=(32, 256))  # fmt: skip

# %%
import math
from itertools import pairwise, product

import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from finematch.exercises import check
from finematch.lessons import beside, came_out, close, full, hslm as lesson, look, shapes, show
from finematch.lessons.hslm import batch_of, fill, rate, refused, tiny
from finematch.models.hslm import HSLM, MGCN, MODULES, GraphLayer, HSLMConfig, PairScorer, WordEncoder
from finematch.models.hslm import WordSelfAttention, hinge, score, softmax_loss, word_correlation
from finematch.tables import published

# %% [markdown]
# <a id="problem"></a>
#
# ## 1. The problem in one figure (section 1, Figure 1)
#
# MVAM, the method of the [previous lesson](../mvam/1_lesson.ipynb), computes one vector for an image and one for a caption; their score is a dot product. HSLM compares every image
# with *every caption*, region by region and word by word. For one pair this takes more than a thousand times as many
# operations ([section 9](#fast) counts them). The paper wants to match on three levels:
#
# > "it is essential to understand both higher-level semantics and lower-level relationship"
#
# 1. **Object level**: a word and a region ("heart", and the region where the heart is).
# 2. **Object-relation level**: two words and two regions (the heart is *next to* the diamond).
# 3. **Higher level**: relations of relations, up to the whole sentence.
#
# The paper names two troubles of the first level. Most regions belong to no word, and many words belong to no region.
# The cell shows an image of the embedded set [`scenes`](../../docs/glossary.md): the boxes that a
# [proposal](../../docs/glossary.md) method finds, the two objects that a caption names, and their relation. Colours and
# dashes only tell the boxes apart.

# %%
one = lesson.example(p)
lesson.draw_levels(one)

# %% [markdown]
# A proposal *shows* a named object if the two boxes have an intersection over union (IoU) of at least one half. The
# next cell counts the proposals, the words and the objects that have no partner.

# %%
unnamed = int((one.overlap < 0.5).sum())
tokens = one.text.split()
wordless = len(tokens) - sum(len(phrase.split()) for phrase in one.phrases)
print(f"{unnamed} of {len(one.proposals)} proposals show nothing that the caption names")
print(f"{wordless} of {len(tokens)} words are in no region, {one.objects - 2} of {one.objects} objects in no word")
assert unnamed > len(one.proposals) / 2
assert wordless > 0
assert one.objects > 2

# %% [markdown]
# <a id="model"></a>
#
# ## 2. The model in one diagram (3.1 to 3.5, Figure 2)
#
# The diagram is read from top to bottom. **Self-attention** (3.2) should weaken words without meaning. The **graphs**
# (3.3) should put relations into each region and each word. **Cross attention** (3.4) should weaken regions that no word
# asks for. Two **alignments** (3.5) compare the result: word by word ("local") and as a whole ("global").
#
# The shapes on the arrows are recorded while a tiny [`HSLM`](../../src/finematch/models/hslm.py#L545) scores 2 images with 3
# captions. All its sizes differ, so a size tells its axis. The letter $v$ is the width of a region's feature (2,048 in
# the paper). The axis $c{\cdot}M$ holds the words of all captions, one after the other.
#
# "Pool the contexts" returns $N$ weights for each pair, one for each region, and the global similarity applies them to
# the regions. They are enough, because every context is a weighted sum of regions. If $a_m$ is the weight of context $m$, and $f_{mn}$ that of region $n$ in it, then
#
# $$\sum_m a_m \sum_n f_{mn}\, r_n = \sum_n \Big(\sum_m a_m f_{mn}\Big)\, r_n.$$
#
# The two boxes at the top are simple. Eq. 1 makes $R$: a linear layer of the features of a region, scaled to unit
# length. Eq. 2 makes $E$: each word looks up its row in a learnt table of word vectors, $e_j = W_e w_j$.

# %%
letters = {2: "b", 3: "c", 4: "N", 7: "M", 21: "c·M", 11: "v", 8: "d", 5: "e", 6: "s"}
model, few = tiny(p.seed), batch_of(2, captions=3)
found = shapes(model, lambda: lesson.stages(model, few), letters)
lesson.draw_model(found)

# %% [markdown]
# Three facts in the diagram are worth remembering. An image is encoded once and a caption is encoded once. Everything
# after the cross attention has both axes $b$ and $c$: it is computed for **every pair**. And each pair ends in one
# number.

# %%
assert (found["image"], found["text.0"]) == ("b N d", "c M d")
assert all(found[name].startswith("b c") for name in ("f", "local difference", "local", "pooled", "global", "logit"))
assert found["logit"] == "b c"
with torch.no_grad():  # an untrained graph returns its input, see section 4
    assert close(model.encode_image(**few["image"]).regions, F.normalize(model.image.embed(few["image"]["features"]), dim=-1))
    assert close(model.text.stages(**few["text"])[0], model.text.embed.weight[few["text"]["input_ids"]])
some_f, some_a, some_r = torch.rand(7, 4), torch.rand(7), torch.randn(4, 8)
assert close(some_a @ (some_f @ some_r), (some_a @ some_f) @ some_r)

# %% [markdown]
# <a id="words"></a>
#
# ## 3. Self-attention of the words (3.2, Eq. 2 to 6)
#
# > "In order to strengthen the words with real meaning and weaken the words without real meaning"
#
# $$E = \{e_1, \dots, e_M\} \quad (2) \qquad E_K = W_K E \quad (3) \qquad E_Q = W_Q E \quad (4) \qquad E_V = W_V E \quad (5)$$
# $$E_f = \left(\frac{E_K E_Q}{M}\right) E_V \quad (6)$$
#
# * $E$ (`words`, $M \times e$): one embedding $e_j$ for each of the $M$ words of a caption.
# * $W_K$, $W_Q$, $W_V$ (`key`, `query`, `value`, $e \times e$): learnt matrices of
#   [`WordSelfAttention`](../../src/finematch/models/hslm.py#L63).
# * $E_f$ (what the layer returns, $M \times e$): the words after self-attention.
#
# The product of Eq. 6 does not exist as it is printed. With words as columns all three factors are $e \times M$. One
# factor must be transposed, and the paper does not say which one (reading H1). From here on words are rows, and the
# three products above read $E_K = E W_K^{\top}$, $E_Q = E W_Q^{\top}$, $E_V = E W_V^{\top}$. The library has three forms:
#
# | `self_attention` | formula | the bracket relates |
# |---|---|---|
# | `word` (default) | $(E_K E_Q^{\top} / M)\, E_V$ | words with words, $M \times M$ |
# | `channel` | $E_V\,(E_Q^{\top} E_K / M)$ | channels with channels, $e \times e$: the printed order, for columns |
# | `softmax` | $\mathrm{softmax}(E_K E_Q^{\top}/\sqrt e)\,E_V$ | words with words, and each row sums to 1 |
#
# **By hand.** The caption is "a red circle" and $e = 2$. "a" points one way, "red" and "circle" point another way:
# $a = (0, 1)$, $red = (1, 0)$, $circle = (2, 0)$. All three matrices are the identity.
#
# | | a | red | circle | `word`: the row / 3, times $E$ | `softmax` of the row / √2, times $E$ |
# |---|---|---|---|---|---|
# | **a** relates to | 1 | 0 | 0 | (0, 1/3) | 0.50, 0.25, 0.25: (0.745, 0.503) |
# | **red** | 0 | 1 | 2 | (1/3 + 2·2/3, 0) = (5/3, 0) | 0.14, 0.28, 0.58: (1.436, 0.140) |
# | **circle** | 0 | 2 | 4 | (2/3 + 2·4/3, 0) = (10/3, 0) | 0.05, 0.19, 0.77: (1.723, 0.045) |
#
# This is the paper's idea in small. No other word relates to "a", so it shrinks to a third. "red" and "circle" relate to
# each other, so they grow by 5/3. With the softmax each row sums to one, so each word becomes a *mean* of words. It can
# make no word longer than the longest: "circle" shrinks from 2 to 1.72.

# %%
E = torch.tensor([[[0.0, 1], [1, 0], [2, 0]]])  # one caption: a, red, circle
relations = E[0] @ E[0].T / 3
by_hand = relations @ E[0]
after = {form: lesson.attention(form)(E, full(E)) for form in ("word", "channel", "softmax")}
assert close(by_hand, [[0, 1 / 3], [5 / 3, 0], [10 / 3, 0]])
assert close(after["word"][0], by_hand)
assert close(after["softmax"], [[[0.745, 0.503], [1.436, 0.140], [1.723, 0.045]]], 1e-3)
assert close(after["softmax"][0, 2].norm(), 1.72, 0.01)
assert refused(lambda: E[0].T @ E[0].T @ E[0].T)  # Eq. 6 as printed
lesson.draw_words(E[0], ["a", "red", "circle"], {"word (Eq. 6)": by_hand, "softmax": after["softmax"][0]})

# %% [markdown]
# **And `channel`?** It gives the same as `word` here. This is no accident, for a product of matrices may be
# bracketed in another way:
#
# $$\text{word: } (E_K E_Q^{\top})\,E_V \qquad\qquad \text{channel: } E_V\,(E_Q^{\top}E_K) = (E_V E_Q^{\top})\,E_K$$
#
# `channel` *is* `word` with the names of $W_K$ and $W_V$ exchanged. Both matrices are learnt, so the two readings are
# one family of models. The cell draws random weights and exchanges the two names.

# %%
assert close(after["channel"], after["word"])
torch.manual_seed(p.seed)
by_word, by_channel = (WordSelfAttention(6, form=form).requires_grad_(False) for form in ("word", "channel"))
fill(by_channel.query, by_word.query.weight)
fill(by_channel.key, by_word.value.weight)
fill(by_channel.value, by_word.key.weight)
some = torch.randn(2, 5, 6)
assert close(by_channel(some, full(some)), by_word(some, full(some)))

# %% [markdown]
# **What does $M$ do?** Division by $M$ turns a sum over words into a mean. If a caption says everything twice, each
# word comes out as before; without the division it would be twice as long. $M$ counts real words, so
# padding changes nothing.
#
# **What bounds $E_f$?** Nothing. $E$ enters three times, so Eq. 6 is *cubic*: words of half the length come out with an
# eighth of it. A softmax would bound the weights.

# %%
twice = torch.cat([E, E], 1)
assert close(lesson.attention("word")(twice, full(twice))[:, :3], after["word"])
assert close((twice[0] @ twice[0].T @ twice[0])[:3], 2 * (E[0] @ E[0].T @ E[0]))  # a sum: twice as long
padded, real = F.pad(E, (0, 0, 0, 2), value=9.0), torch.tensor([[True, True, True, False, False]])
assert close(lesson.attention("word")(padded, real)[:, :3], after["word"])
assert close(lesson.attention("word")(E / 2, full(E)), after["word"] / 8)  # cubic

# %% [markdown]
# **What is left of a word?** Without a residual connection, little (reading H2). $E_f$ is a sum over the caption. So a
# word becomes a mixture of its neighbours, and it becomes another mixture in every caption. The default
# `self_residual=True` adds $E$, which the paper does not print: "a" becomes (0, 4/3) and "red" becomes (8/3, 0).
# `False` is the literal reading.
#
# The next cell sends real captions through [`WordEncoder.stages`](../../src/finematch/models/hslm.py#L228) with random
# weights. It measures two things. How similar are the vectors of one word in two captions (their cosine)? And for how
# many words is the word's own embedding the nearest in the whole vocabulary?

# %%
assert close(lesson.attention("word", residual=True)(E, full(E))[0, :2], [[0, 4 / 3], [8 / 3, 0]])
ids = one.spoken["input_ids"][one.spoken["mask"]]
same_word = (ids[:, None] == ids[None]) & ~torch.eye(len(ids), dtype=torch.bool)


def left(residual: bool) -> tuple[float, float]:
    torch.manual_seed(p.seed)
    config = HSLMConfig(width=64, embed=128, sim=16, depth=0, self_residual=residual)
    encoder = WordEncoder(one.vocabulary, config).eval().requires_grad_(False)
    became = F.normalize(encoder.stages(**one.spoken)[1][one.spoken["mask"]], dim=-1)
    nearest = (became @ F.normalize(encoder.embed.weight, dim=-1).T).argmax(1)
    return float((became @ became.T)[same_word].mean()), 100 * float((nearest == ids).float().mean())


# %%
measured = {f"self_residual={residual}": left(residual) for residual in (False, True)}
columns = ["cosine of a word in two captions", "own embedding is the nearest, %"]
show(pd.DataFrame(measured, index=columns).T.rename_axis("Eq. 6"))
literal, default = measured.values()
assert default[0] > literal[0] + 0.2
assert literal[1] < 30 < 90 < default[1]

# %% [markdown]
# **The paper's Figure 3** shows how much each word relates to the others, before and after.
# [`word_correlation`](../../src/finematch/models/hslm.py#L101) takes the cosine for that; the paper only says "normalized".
# The share of word $j$ is the sum of column $j$ of this matrix, divided by the sum of all its entries. By hand:
#
# | cosine | a | red | circle |
# |---|---|---|---|
# | **a** | 1 | 0 | 0 |
# | **red** | 0 | 1 | 1 |
# | **circle** | 0 | 1 | 1 |
# | sum of the column | 1 | 2 | 2 |
# | its share of 5 | 0.2 | 0.4 | 0.4 |
#
# The shares are the same before *and* after self-attention, because a cosine does not see lengths, and with identity
# matrices only lengths have changed. With plain products in place of cosines
# the shares are 0.1, 0.3, 0.6 before and 0.004, 0.33, 0.66 after. The paper's figure looks like these ("a" drops to
# 0.002). So it may have been made without dividing by lengths.

# %%
assert close(word_correlation(E, full(E)), [[0.2, 0.4, 0.4]])
assert close(word_correlation(after["word"], full(E)), [[0.2, 0.4, 0.4]])
assert close(word_correlation(E, full(E), similarity="product"), [[0.1, 0.3, 0.6]])
expected = [[1 / 226, 75 / 226, 150 / 226]]
assert close(word_correlation(after["word"], full(E), similarity="product"), expected)

# %% [markdown]
# **Exercise 1 (compute).** Public loaders draw word vectors evenly between −0.1 and 0.1. `nn.Embedding` draws them with
# standard deviation 1. Measure the ratio $\|E_f\| / \|E\|$ with both. By what factor is the ratio smaller with the
# first? Answer for all three forms, for freshly drawn $W$, where the softmax is nearly flat.

# %% tags=["exercise"]
shorter = ...  # {"word": ..., "channel": ..., "softmax": ...}
check("hslm.short", shorter)

# %% [markdown] tags=["solution"] jupyter={"source_hidden": true}
# Even numbers on (−0.1, 0.1) have standard deviation $0.1/\sqrt3 = 0.0577$. For the cubic forms, $E_f / E$ goes with
# the square of it: a factor of 300. For the softmax nothing is lost (a factor of 1): $E_f$ becomes the plain mean of
# the words. So with small word vectors the caption almost vanishes before the GRU sees it. Three things help:
# `self_residual=True` keeps $E$, `softmax` keeps the length, and larger vectors at the start (what the library has).

# %% tags=["solution"] jupyter={"source_hidden": true}
torch.manual_seed(p.seed)
drawn, gain = torch.randn(20, 13, 300), {}
for form in ("word", "channel", "softmax"):
    layer = WordSelfAttention(300, form=form).requires_grad_(False)
    gain[form] = [float(layer(x, full(x)).std() / x.std()) for x in (drawn, 0.1 / math.sqrt(3) * drawn)]
show(pd.DataFrame(gain, index=["deviation 1", "deviation 0.058"]).T.rename_axis("E_f / E"), digits=5)
assert all(abs(gain[form][0] / gain[form][1] / 300 - 1) < 0.01 for form in ("word", "channel"))
assert abs(gain["softmax"][0] / gain["softmax"][1] - 1) < 0.2
check("hslm.short", {"word": 300, "channel": 300, "softmax": 1})

# %% [markdown]
# <a id="graph"></a>
#
# ## 4. Relations: a graph in which all are neighbours (3.3, Eq. 7 to 11)
#
# $$A_{ij} = \mu(r_i)^{\top}\nu(r_j) \quad (7) \qquad R_g = W_r\,(A R W_g) + R \quad (8)$$
# $$R_g^{l} = W_h^{l}(A^l R_g^{l-1} W_m^l) + R_g^{l-1} \quad (9)$$
#
# * $R$ (`nodes`, $N \times d$) with rows $r_i$: the regions. Every region is a node of the graph.
# * $\mu$, $\nu$ (`mu`, `nu`, $d \to d$): two linear layers of [`GraphLayer`](../../src/finematch/models/hslm.py#L122).
# * $A$ (`relations`, $N \times N$): $A_{ij}$ says how much node $i$ takes from node $j$.
# * $W_g$, $W_r$ (`gather`, `update`, $d \to d$): learnt. Layer $l$ has its own, called $W_m^l$ and $W_h^l$.
# * $R_g$, $R_g^l$ ($N \times d$): the nodes after the first layer, and after layer $l$ of the
#   [`MGCN`](../../src/finematch/models/hslm.py#L167). After the last layer they are $R^*$ (Eq. 10).
#
# Eq. 8 gathers what the neighbours say and *adds* it to the node. Three details are readings. The paper prints
# $\nu(r_i)$ in Eq. 7, which would relate a node to itself alone (H3). With nodes as rows, $A R W_g$ is $N \times d$,
# so $W_r$ must stand on its right (H5; `graph_norm` in section 10, a norm after $W_r$, has the same number). The paper does
# not normalise $A$; we divide by $N$, as the code of VSRN does, an earlier method that the paper cites (H4). In rows, the
# library computes
#
# $$A = \mu(R)\,\nu(R)^{\top} / N, \qquad R_g = A R W_g W_r + R.$$
#
# **By hand.** There are three nodes $(1,0), (0,1), (1,1)$, and all matrices are the identity.
#
# | | $A$, times 3 | takes up $A R$ | $R_g$ |
# |---|---|---|---|
# | node 1 (1, 0) | 1 0 1 | (2, 1)/3 | (5/3, 1/3) |
# | node 2 (0, 1) | 0 1 1 | (1, 2)/3 | (1/3, 5/3) |
# | node 3 (1, 1) | 1 1 2 | (3, 3)/3 | (2, 2) |

# %%
nodes = torch.tensor([[[1.0, 0], [0, 1], [1, 1]]])
A = nodes[0] @ nodes[0].T / 3
moved = A @ nodes[0] + nodes[0]
assert close(moved, [[5 / 3, 1 / 3], [1 / 3, 5 / 3], [2, 2]])
assert close(lesson.graph_layer()(nodes, full(nodes))[0], moved)
assert refused(lambda: torch.eye(2) @ (A @ nodes[0]))  # W_r on the left, as printed
lesson.draw_graph(nodes[0], moved, A)

# %% [markdown]
# **At the start a layer does nothing.** $W_r$ begins as zero, as in VSRN's code. So $R_g = R$, and a new layer is the
# identity: four untrained layers score exactly like none. Training then starts from the plain regions, and the cube below
# cannot explode at once. Training decides how much the graph does. In the first step
# only $W_r$ moves, because the gradient of everything before it passes through a zero.

# %%
torch.manual_seed(p.seed)
assert close(MGCN(2, 4)(nodes, full(nodes)), nodes)
fresh = GraphLayer(2)
fresh(nodes, full(nodes)).square().sum().backward()
moves = {name for name, weight in fresh.named_parameters() if weight.grad.abs().sum() > 0}
assert moves == {"update.weight", "update.bias"}
flat = tiny(p.seed, depth=0)
absent = model.load_state_dict(flat.state_dict(), strict=False).missing_keys  # the four layers of both graphs
assert all(".graph." in name for name in absent)
with torch.no_grad():
    assert close(lesson.stages(flat, few)["logit"], lesson.stages(model, few)["logit"], 1e-6)

# %% [markdown]
# **Then it can explode.** Like Eq. 6, a layer is cubic in its nodes. Take $N$ equal nodes of length 1, and let all four
# matrices be half the identity. A layer turns the length $x$ into
#
# $$x + \tfrac{N}{16}\,x^3 \ (\texttt{raw}), \qquad x + \tfrac{1}{16}\,x^3 \ (\texttt{nodes}), \qquad
# x + \tfrac14\,x \ (\texttt{softmax})$$
#
# Why? $\mu$ and $\nu$ halve their nodes, so $A_{ij} = x^2/4$. $R W_g$ has the length $x/2$, and a sum over $N$ equal
# nodes gives $N x^3/8$. $W_r$ halves once more.
#
# The names are values of `relation` (H4): no division, division by $N$ (default), a softmax over $j$. With $N = 36$ the
# raw lengths go 1, 3.25, 80.5, 1.2 million, 3.6·10¹⁸. With division they go 1, 1.06, 1.14, 1.23, 1.35, whatever $N$ is.
# The division keeps the cube, but it removes the number of nodes. A softmax removes the cube as well.


# %%
def lengths(relation: str, nodes: Tensor, depth: int = 4) -> list[float]:
    """Mean length of a node before the first layer and after each."""
    layer = lesson.graph_layer(0.5, nodes.shape[-1], relation=relation).double()
    found = [nodes.norm(dim=-1).mean().item()]
    for _ in range(depth):
        nodes = layer(nodes, full(nodes))
        found.append(nodes.norm(dim=-1).mean().item())
    return found


# %%
growth = {"raw": lambda x: x + 36 / 16 * x**3, "nodes": lambda x: x + x**3 / 16, "softmax": lambda x: 1.25 * x}
alike = F.normalize(torch.ones(1, 100, 32).double(), dim=-1)
for relation, step in growth.items():
    found = lengths(relation, alike[:, :36])
    assert all(abs(longer / step(length) - 1) < 1e-6 for length, longer in pairwise(found))
raw, divided = lengths("raw", alike[:, :36]), lengths("nodes", alike[:, :36])
assert close(raw[:3], [1.0, 3.25, 80.49], 0.01)
assert 3.55e18 < raw[-1] < 3.65e18
assert close(divided, [1, 1.0625, 1.1375, 1.2295, 1.3456], 1e-3)
assert close(lengths("nodes", alike), divided, 1e-6)  # 100 nodes or 36

# %% [markdown]
# Regions of one image are not equal, but they have much in common. The next cell takes random nodes with a common part.
# The raw relations explode with the layers (left) and with the number of nodes (right). The other two do not.

# %%
torch.manual_seed(p.seed)
unlike = F.normalize(torch.randn(1, 100, 32).double() + 0.7, dim=-1)
counts = [1, 2, 4, 9, 18, 36, 100]
by_layer = {relation: lengths(relation, unlike[:, :36], p.layers) for relation in growth}
by_nodes = {relation: [lengths(relation, unlike[:, :n])[-1] for n in counts] for relation in growth}
lesson.draw_growth(by_layer, by_nodes, counts)
assert by_nodes["raw"][5] > 1e6 * by_nodes["nodes"][5]
assert max(by_nodes["nodes"] + by_nodes["softmax"]) < 3

# %% [markdown]
# The words have a graph of their own (Eq. 11, reading H7), with $M$ nodes of width $e$ and weights of its own. A caption
# of six words and a caption of twenty go through the same layers. So division by the number of nodes matters there too.
#
# **Exercise 2 (build).** Write Eq. 6 with a residual, $E_f + E$, for one caption: words "l e", and the matrices of keys,
# queries and values "e e" (a linear layer with matrix $W$ maps $e$ to $e\,W^{\top}$). Is it a graph layer, Eq. 8?


# %% tags=["exercise"]
def attended(words: Tensor, key: Tensor, query: Tensor, value: Tensor) -> Tensor: ...


check("hslm.words", attended)

# %% [markdown] tags=["solution"] jupyter={"source_hidden": true}
# Yes. $E_f = (E_K E_Q^{\top}/M)\,E_V + E$ is a graph layer with $\mu = W_K$, $\nu = W_Q$ (without biases), $W_g = W_V$
# and $W_r = I$: the cell builds both and compares. The literal reading of Eq. 6 is a graph layer *without the
# residual*. Only that one can take a word away; with the residual the word always stays.

# %% tags=["solution"] jupyter={"source_hidden": true}
torch.manual_seed(p.seed)
words_layer, nodes_layer = WordSelfAttention(6, residual=True).requires_grad_(False), GraphLayer(6)
for name, twin in (("mu", "key"), ("nu", "query"), ("gather", "value")):
    fill(getattr(nodes_layer, name), getattr(words_layer, twin).weight)
fill(nodes_layer.update, 1.0)
assert close(nodes_layer(some, full(some)).detach(), words_layer(some, full(some)), 1e-5)


def attended(words: Tensor, key: Tensor, query: Tensor, value: Tensor) -> Tensor:
    return (words @ key.T) @ (words @ query.T).T / len(words) @ (words @ value.T) + words


check("hslm.words", attended)

# %% [markdown]
# <a id="order"></a>
#
# ## 5. Order: a GRU in two directions (3.3, Eq. 12 to 14)
#
# Up to here a caption is a *set* of words: if we shuffle it, each word keeps its vector. This is why the two "a man" of
# the fifth caption in the paper's Figure 3 have the same values to the last digit. The GRU reads the words in order:
#
# $$\overrightarrow h_j = \overrightarrow{GRU}(e_j^r, \overrightarrow h_{j-1}), \qquad
# \overleftarrow h_j = \overleftarrow{GRU}(e_j^r, \overleftarrow h_{j+1}) \quad (12)$$
# $$t_j = \frac{\overrightarrow h_j + \overleftarrow h_j}{2} \quad (13) \qquad E^* = \{t_1, \dots, t_M\} \quad (14)$$
#
# * $e_j^r$ (a row of `words`, $e$): word $j$ after the graph.
# * $\overrightarrow h_j$, $\overleftarrow h_j$ (`states`, $d$): the states of the two directions of `gru` in
#   [`WordEncoder`](../../src/finematch/models/hslm.py#L200).
# * $t_j$ (a row of `Caption.words`, $d$): their average. The usual concatenation would be $2d$ wide. The library then
#   scales each $t_j$ to unit length, as it does with the regions at their start (H9).
#
# **By hand.** A GRU of width 1 has all weights 0 but one. Its candidate is $\tanh(x_j)$, and both gates stand at
# $\sigma(0) = \tfrac12$. So $h_j = \tfrac12\tanh(x_j) + \tfrac12\,h_{j-1}$: an echo that halves at every word. Take three words with
# $\tanh(x) = 0.8, 0, 0.4$:
#
# | | word 1 | word 2 | word 3 |
# |---|---|---|---|
# | forward | 0.4 | 0.2 | 0.1 + 0.2 = 0.3 |
# | backward | 0.05 + 0.4 = 0.45 | 0.1 | 0.2 |
# | average $t$ | 0.425 | 0.15 | 0.25 |


# %%
def echo(values: list[float]) -> list[float]:
    states = [0.0]
    for value in values:
        states.append(value / 2 + states[-1] / 2)
    return states[1:]


said = [0.8, 0.0, 0.4]
forward, backward = echo(said), echo(said[::-1])[::-1]
assert close([forward, backward], [[0.4, 0.2, 0.3], [0.45, 0.1, 0.2]])
assert close(lesson.echo(said), [forward, backward])
assert close(lesson.echo(said).mean(0), [0.425, 0.15, 0.25])
lesson.draw_echo(forward, backward)

# %% [markdown]
# The next cell shuffles a caption. Before the GRU the words keep their vectors and only change places. After the GRU
# they do not. It also checks that the library takes the average of both directions, made unit.

# %%
encoder, text = model.text, few["text"]
for layer in encoder.graph:
    nn.init.normal_(layer.update.weight, std=0.1)  # an untrained graph is the identity: move it
order = torch.tensor([4, 1, 0, 6, 2, 3, 5])
mixed = {name: part[:, order] for name, part in text.items()}
with torch.no_grad():
    (set_1, set_2) = (encoder.graph(*encoder.stages(**given)[1:]) for given in (text, mixed))
    (row_1, row_2) = (encoder(**given)[0] for given in (text, mixed))
    average = encoder.gru(set_1)[0].unflatten(-1, (2, -1)).mean(2)
assert close(set_2, set_1[:, order])  # a set ...
assert not close(row_2, row_1[:, order], 1e-2)  # ... is one no more
assert close(row_1, F.normalize(average, dim=-1), 1e-5)

# %% [markdown]
# <a id="cross"></a>
#
# ## 6. Cross attention: words look at regions (3.4, Eq. 15 and 16)
#
# $$f(E^*, R^*) = \mathrm{sigmoid}(E^* \odot R^*) \quad (16) \qquad\qquad
# R_a^* = f(E^*, R^*)\odot R^* \quad (15)$$
#
# * $E^*$ (`words`, $M \times d$) and $R^*$ (`view.regions`, $N \times d$): the words and the regions.
# * $f$ (what [`PairScorer.relate`](../../src/finematch/models/hslm.py#L461) returns, $M \times N$): "the attention function to
#   calculate the scores for each pair".
# * $R_a^*$ (made in [`PairScorer.nodes`](../../src/finematch/models/hslm.py#L363)): the regions, weighted by $f$.
#
# The paper calls ⊙ a dot product, but $E^*$ is $M \times d$ and $R^*$ is $N \times d$. Two readings fit the shapes
# (H10):
#
# | `cross` | weights | $R_a^*$ | what it is | Eq. 18 (section 7) compares |
# |---|---|---|---|---|
# | `attend` (default) | $f = \sigma(E^* R^{*\top})$, $M\times N$ | $f R^*$, $M\times d$ | each word's *context*: what it sees of the image | $M$ words with $M$ contexts |
# | `gate` | $g_n$ = mean or maximum of column $n$ of $f$ | $g \odot R^*$, $N \times d$ | the regions, each times one weight: weak where no word asks for it | $M$ words with $M$ contexts of the gated regions, $f\,(g \odot R^*)$ |
#
# **By hand.** Two words are exactly two orthogonal regions, $E^* = R^* = I$. A word scores $\sigma(1) = 0.731$ with its
# own region and $\sigma(0) = 0.5$ with the other one.
#
# | | region 1 | region 2 | context $f R^*$ | made unit |
# |---|---|---|---|---|
# | word 1 | 0.731 | 0.5 | (0.731, 0.5) | (0.825, 0.565) |
# | word 2 | 0.5 | 0.731 | (0.5, 0.731) | (0.565, 0.825) |
# | `gate`, mean | 0.616 | 0.616 | | |
#
# Look at the last column. The words are at right angles, but the cosine of their contexts is
# $2 \cdot 0.825 \cdot 0.565 = 0.932$.

# %%
regions_2, words_2 = torch.eye(2)[None], torch.eye(2)[None]
high = 1 / (1 + math.exp(-1))
f = torch.tensor([[high, 0.5], [0.5, high]])
assert close(lesson.relate(words_2[0], regions_2[0]), f)
contexts = F.normalize(f @ regions_2[0], dim=-1)
assert close(contexts, [[0.825, 0.565], [0.565, 0.825]], 1e-3)
assert close(contexts[0] @ contexts[1], 0.932, 1e-3)
for pool, gate in (("mean", (high + 0.5) / 2), ("max", high)):
    scorer = lesson.pair_scorer(cross="gate", gate_pool=pool)
    assert close(scorer.region_gate(f[None, None], None), [[[gate, gate]]])
assert refused(lambda: torch.zeros(5, 8) - torch.zeros(4, 8))  # M words minus N regions: so `gate` has contexts, too

# %% [markdown]
# **The weights hardly differ.** Words and regions are unit vectors. (Regions can leave unit length as the graph learns;
# `normalise_graph=True` keeps it, H9.) So a dot product lies between −1 and 1, and *every* weight of Eq. 16 lies between
# $\sigma(-1) = 0.269$ and $\sigma(1) = 0.731$. No region can be ignored: the best one weighs at most 2.72 times
# as much as the worst one. With 36 regions a context is nearly the sum of the image, whatever the word is.

# %%
with torch.no_grad():
    weights = lesson.stages(tiny(p.seed), few)["f"]
assert 1 - high <= weights.min() <= weights.max() <= high
assert close(high / (1 - high), math.e)

# %% [markdown]
# **A sharper sigmoid.** The factor `cross_scale` inside the sigmoid is ours; it is 1 in the paper. A larger factor
# sharpens, but a sigmoid decides about each region alone. A region with a slightly negative product goes off, and a
# region with a slightly positive product goes *on*. A softmax would let the regions compete.
#
# The toy below has 36 random regions and 12 words. Each word is close to one region (the diagonal). `likeness` measures
# how similar the contexts of different words are.

# %%
torch.manual_seed(p.seed)
toy_regions = F.normalize(torch.randn(36, 64), dim=-1)
toy_words = F.normalize(toy_regions[:12] + 0.08 * torch.randn(12, 64), dim=-1)
products = toy_words @ toy_regions.T


def likeness(weights: Tensor) -> float:
    unit = F.normalize(weights @ toy_regions, dim=-1)
    return float((unit @ unit.T)[~torch.eye(12, dtype=torch.bool)].mean())


# %%
looks = {f"cross_scale = {scale:g}": lesson.relate(toy_words, toy_regions, scale) for scale in (1.0, p.sharp)}
scales = torch.logspace(-1, 6, 25, base=2).tolist()  # 0.5 to 64
curves = {
    "sigmoid": [likeness((scale * products).sigmoid()) for scale in scales],
    "softmax": [likeness((scale * products).softmax(-1)) for scale in scales],
}
between_words = float((toy_words @ toy_words.T)[~torch.eye(12, dtype=torch.bool)].mean())
lesson.draw_contexts(looks, scales, curves, between_words)

# %% [markdown]
# Left and middle: $f$ for two factors. Right: the cosine of two contexts. Sharpening helps, up to a point. However
# large the factor is, the sigmoid keeps about half of the unrelated regions on, and the contexts stay similar.

# %%
plain, sharper = (likeness(f) for f in looks.values())
print(f"mean cosine of two contexts: {plain:.3f} at 1, {sharper:.3f} at {p.sharp:g}")
assert plain > 0.95
assert sharper < plain - 0.05
assert likeness((1e4 * products).sigmoid()) > 0.3
assert likeness((16 * products).softmax(-1)) < 0.2

# %% [markdown]
# **Why is the context made unit?** (reading H11) All weights lie around ½, so a word's weights sum to about $N/2$: the
# more regions there are, the longer $fR^*$ is. $|E^* - R_a^*|^2$ would then measure *how many* regions there are.
# By hand: take each of the two regions twice. The raw context of word 1 doubles from (0.731, 0.5) to (1.462, 1), and
# its squared distance from the word jumps from 0.322 to 1.214. The unit context does not move: 0.349 both times.
# In general the raw length grows like $N$ if the regions have a common part, and like $\sqrt N$ if they are unrelated.

# %%
doubled = torch.cat([regions_2, regions_2], 1)
for regions, distance in ((regions_2, 0.322), (doubled, 1.214)):
    raw = (torch.sigmoid(words_2 @ regions.mT) @ regions)[0, 0]
    assert close((words_2[0, 0] - raw).square().sum(), distance, 1e-3)
    assert close((words_2[0, 0] - F.normalize(raw, dim=0)).square().sum(), 0.349, 1e-3)
for unit in (True, False):
    scorer = lesson.pair_scorer(context_norm=unit)
    assert close(rate(scorer, regions_2, words_2), rate(scorer, doubled, words_2), 1e-5) == unit

# %%
torch.manual_seed(p.seed)
for common, power in ((1.0, 1.0), (0.0, 0.5)):  # 16 times the regions: 16 times, or 4 times as long
    many = F.normalize(torch.randn(1600, 512) + common, dim=-1)
    longer = lesson.relate(toy := F.normalize(torch.randn(20, 512), dim=-1), many) @ many
    grows = longer.norm(dim=-1).mean() / (lesson.relate(toy, many[:100]) @ many[:100]).norm(dim=-1).mean()
    assert abs(grows / 16**power - 1) < 0.2

# %% [markdown]
# **Exercise 3 (build).** Write Eq. 15 and 16 for words "l d", regions "n d" and a `scale` inside the sigmoid: the unit
# context of each word, "l d".


# %% tags=["exercise"]
def gathered(words: Tensor, regions: Tensor, scale: float) -> Tensor: ...


check("hslm.contexts", gathered)


# %% tags=["solution"] jupyter={"source_hidden": true}
def gathered(words: Tensor, regions: Tensor, scale: float) -> Tensor:
    return F.normalize((scale * words @ regions.T).sigmoid() @ regions, dim=1)


check("hslm.contexts", gathered)

# %% [markdown]
# <a id="score"></a>
#
# ## 7. From two sets of vectors to one number (3.5, Eq. 17 to 22)
#
# $$S(m_1, m_2) = \frac{W|m_1 - m_2|^2}{\|W|m_1 - m_2|^2\|_2} \quad (17), \qquad
# S_L = S(E^*, R_a^*), \quad S_G = S(\hat E^*, \hat R_a^*) \quad (18, 19)$$
# $$S^* = S_L \,\|\, S_G \quad (20), \qquad S_A = \mathrm{Sigmoid}(W_S S^*)\odot S^* \quad (21), \qquad
# S_F = FC(S_A) \quad (22)$$
#
# * $m_1$, $m_2$ ($d$): two vectors, one of the caption and one of the image. The paper's letter $S$ is here a vector; in
#   section 8 it is a score.
# * $|m_1 - m_2|^2$ ($d$): the square is elementwise. In which channels do two vectors differ?
# * $W$ (`compare_local`, `compare_global`, $d \to s$): learnt, one for each alignment (H14). So Eq. 17 gives a *vector*
#   of width $s$ and of length 1 ([`PairScorer.similarity`](../../src/finematch/models/hslm.py#L511)).
# * $S_L$ (`local`, $M \times s$) has one row for each word. $S_G$ (`globe`, $s$) is one more row.
# * $S^*$ ($(M + 1) \times s$): the rows, one below the other; they are called nodes again (H15).
# * $W_S$ (`gate`, $s \to 1$): each node $s_k$ gets one gate, and $w$ is the only row of $W_S$. We read Eq. 21 as $S_A = \sum_k \sigma(w\cdot s_k)\,s_k$
#   (`node_gate`, H16), so that captions of any length end in one vector $S_A$ ($s$).
# * $FC$ (`score`, $s \to 1$): the logit $S_F$ ([`PairScorer.fuse`](../../src/finematch/models/hslm.py#L516)).
#
# **By hand.** Take the two words and two contexts of section 6, $W = I$, $w = (1, -2)$, and $FC = (2, 1)$ with bias ½,
# without global alignment:
#
# | | word 1 | word 2 |
# |---|---|---|
# | context (unit) | (0.8255, 0.5645) | (0.5645, 0.8255) |
# | difference squared | (0.0305, 0.3186) | (0.3186, 0.0305) |
# | Eq. 17, $s_k$ | (0.0952, 0.9955) | (0.9955, 0.0952) |
# | gate $\sigma(w \cdot s_k)$ | σ(−1.8957) = 0.1306 | σ(0.8050) = 0.6911 |
# | gate times $s_k$ | (0.0124, 0.1300) | (0.6879, 0.0658) |
#
# $S_A = (0.7003, 0.1958)$ and $S_F = 2\cdot 0.7003 + 0.1958 + 0.5 = 2.096$.

# %%
squared = (words_2[0] - contexts).square()
s_k = F.normalize(squared, dim=-1)  # W is the identity
gates = torch.sigmoid(s_k @ torch.tensor([[1.0], [-2.0]]))
S_A = (gates * s_k).sum(0)
S_F = S_A @ torch.tensor([2.0, 1.0]) + 0.5

# %%
assert close(s_k, [[0.0952, 0.9955], [0.9955, 0.0952]], 2e-4)
assert close(gates, [[0.1306], [0.6911]], 2e-4)
assert close(gates * s_k, [[0.0124, 0.1300], [0.6879, 0.0658]], 2e-4)
assert close([*S_A, S_F], [0.7003, 0.1958, 2.0965], 2e-4)
scorer = lesson.pair_scorer()
assert close(scorer.similarity(scorer.compare_local, words_2[0] - contexts), s_k)
assert close(rate(scorer, regions_2, words_2), [[S_F]])
lesson.draw_nodes({"$|E^* - R_a^*|^2$": squared, "$s_k$, Eq. 17": s_k, "gate times $s_k$, Eq. 21": gates * s_k})

# %% [markdown]
# **The global vectors** $\hat E^*$ and $\hat R_a^*$. Each side pools its vectors into one: the mean asks, the parts
# answer, and a softmax weighs ([`SelfAttentionPooling`](../../src/finematch/models/hslm.py#L246)).
#
# $$a = \mathrm{softmax}_i\; u\cdot\big(\tanh(W_1 x_i) * \tanh(W_2 \bar x)\big), \qquad
# z = \sum_i a_i x_i, \qquad \hat x = z\,/\,\|z\|$$
#
# Here $x_i$ (`parts`, $d$) are the words or the contexts and $\bar x$ is their mean; $W_1$, $W_2$ (`local`, `query`,
# $d \to d$) and $u$ (`vote`, $d$) are learnt; $*$ is elementwise.
#
# **By hand.** Let $x = (1,0), (0,1)$, let both matrices be the identity, and let $u = (1, 0)$. The mean is (½, ½).
# Word 1 answers $\tanh 1\cdot\tanh \tfrac12 = 0.3519$, and word 2 answers 0. The weights are 0.587 and 0.413, and
# $\hat x = (0.818, 0.575)$.
#
# The image's vector is pooled from the contexts $R_a^*$. So an image has *another* global vector for every caption
# (H12).

# %%
answers = torch.tensor([math.tanh(1) * math.tanh(0.5), 0.0])
by_hand = F.normalize(answers.softmax(0), dim=0)  # the parts are the identity
assert close(answers, [0.3519, 0])
assert close(answers.softmax(0), [0.587, 0.413], 1e-3)
assert close(by_hand, [0.818, 0.575], 1e-3)
assert close(lesson.pooling()(words_2, full(words_2))[0], by_hand)

# %% [markdown]
# **What Eq. 17 cannot see.** It divides by the length of the similarity vector, so it forgets how *far* apart two
# vectors are. Only the channels in which they differ most are left. A difference that is ten times as large gives the
# same vector. A perfect match, a difference of zero, gives a vector of zeros. This form comes from SGRAF, an earlier
# method. It works because $W$ learns which channels differ for true pairs and which channels differ for false pairs.
#
# Does Eq. 17 not make the unit context of section 6 (H11) needless? No. A raw context 20 times as long as the word
# drowns the word: the direction of the difference is then that of the context alone. So H11 matters although Eq. 17
# divides by a length.

# %%
torch.manual_seed(p.seed)
compare, difference = nn.Linear(8, 4, bias=False).requires_grad_(False), torch.randn(8)
once = scorer.similarity(compare, difference.clone())
assert close(scorer.similarity(compare, 10 * difference), once, 1e-5)
assert close(scorer.similarity(compare, torch.zeros(8)), torch.zeros(4))
word, context = F.normalize(torch.randn(2, 8), dim=-1)
assert F.cosine_similarity(word - 20 * context, -context, dim=0) > 0.99

# %% [markdown]
# **The score, line by line.** The left column has the paper's steps, from the first product to the number that the loss
# compares. Beside each step stands the statement of the library that does it. The last column names the reading.

# %%
nodes, similarity, fuse = PairScorer.nodes, PairScorer.similarity, PairScorer.fuse
beside([
    ("Eq. 16: a score for each word and region", PairScorer.relate, "torch.sigmoid(", "H10: ⊙ is a matrix product"),
    ("Eq. 15: the context of each word", nodes, "f = f * square", "H11: made unit, by dividing its weights"),
    ("Eq. 18: word minus context", nodes, "difference =", "H10: M words, M contexts"),
    ("Eq. 17: W, then unit length", similarity, "vector = F.linear", "H14: W of its own for each alignment"),
    ("3.5: one context for the whole image", nodes, "weights =", "H12: another one for each caption"),
    ("Eq. 19: the global similarity vector", nodes, "globe = self", ""),
    ("Eq. 20: local and global together", fuse, "for node, mask", "H15: M + 1 nodes"),
    ("Eq. 21: a gate for each node", fuse, "gate = torch.sigmoid", "H16: one number per node"),
    ("Eq. 21, 22: the sum of the gated nodes, FC", fuse, "(gate * F.linear", "FC of a sum is the sum of FC"),
    ("3.6: the score in the loss", HSLM.squash, "torch.sigmoid(", "H17: sigmoid or logit")])  # fmt: skip

# %% [markdown]
# **Exercise 4 (change).** The gates are used as they are (`node_weights="raw"`, the default); "l1" divides them by their
# sum. What does a longer caption do to the logit? Predict what saying the caption of the example twice does with "raw"
# and with "l1": "higher", "lower" or "the same". Then measure both logits:
# `rate(lesson.pair_scorer(node_weights=...), regions_2, ...)` for the words `torch.cat([words_2, words_2], 1)`.

# %% tags=["exercise"]
raw, averaged, logits = ..., ..., ...  # two predictions; {"raw": ..., "l1": ...}
check("hslm.longer", raw, averaged, logits)

# %% [markdown] tags=["solution"] jupyter={"source_hidden": true}
# Every word adds a node, and each gate is positive. So $S_A$ grows with $M$: twice the words give twice the $S_A$. The
# logit goes from 2.096 to $2\cdot(2.096 - 0.5) + 0.5 = 3.693$, farther from the bias. If two captions match an image
# equally well word by word, the longer one has the more extreme logit. `l1` divides by the sum of the gates: 2.443
# both times.

# %% tags=["solution"] jupyter={"source_hidden": true}
said_twice = torch.cat([words_2, words_2], 1)
scorers = {weights: lesson.pair_scorer(node_weights=weights) for weights in ("raw", "l1")}
logits = {weights: rate(scorer, regions_2, said_twice).item() for weights, scorer in scorers.items()}
assert close(logits["raw"], 2 * (float(S_F) - 0.5) + 0.5)
assert close(logits["l1"], 2.443, 1e-3)
assert close(logits["l1"], rate(scorers["l1"], regions_2, words_2).item())
check("hslm.longer", "higher", "the same", logits)

# %% [markdown]
# <a id="loss"></a>
#
# ## 8. The objective: hardest negatives, and their plateau (3.6, Eq. 23)
#
# $$L = \big[\beta - S(I, C) + S(I, \hat C)\big]_+ + \big[\beta - S(I, C) + S(\hat I, C)\big]_+ \quad (23)$$
#
# * $S(I, C)$ (`scores`, $B \times B$ for a batch of $B$ pairs): the score of image $I$ and caption $C$. By default it is
#   $\sigma(S_F)$, the sigmoid of the logit (`loss_score`, H17). True pairs stand on the diagonal.
# * $\hat C$: the caption of the batch that scores highest for $I$ without belonging to it. $\hat I$: the image that
#   scores highest for $C$ without belonging to it. They are the **hardest negatives**.
# * $\beta = 0.2$ (`margin`), and $[z]_+ = \max(0, z)$. The sum runs over the $B$ pairs of the batch
#   ([`hinge`](../../src/finematch/models/hslm.py#L697)).
#
# The paper prints $S(\hat I, \hat C)$ in the first bracket, which cannot be meant (reading H18).
#
# **By hand**, three pairs:
#
# | | caption 1 | caption 2 | caption 3 | hardest caption | term |
# |---|---|---|---|---|---|
# | image 1 | **0.9** | 0.8 | 0.1 | 0.8 | 0.2 − 0.9 + 0.8 = 0.1 |
# | image 2 | 0.2 | **0.5** | 0.6 | 0.6 | 0.2 − 0.5 + 0.6 = 0.3 |
# | image 3 | 0.3 | 0.4 | **0.7** | 0.4 | 0.2 − 0.7 + 0.4 = −0.1: 0 |
# | hardest image | 0.3 | 0.8 | 0.6 | | |
# | term | −0.4: 0 | 0.2 − 0.5 + 0.8 = 0.5 | 0.2 − 0.7 + 0.6 = 0.1 | | **1.0 in all** |
#
# An image has five captions, so a batch can hold two captions of one image. Each would be called the hardest negative
# of the other's image, and the loss would punish a right answer. Such captions are no negatives (`same`). Let images 1
# and 2 be one image. Then the term 0.1 of image 1 goes, and the term 0.5 of caption 2 becomes 0.2 − 0.5 + 0.4 = 0.1.

# %%
table = torch.tensor([[0.9, 0.8, 0.1], [0.2, 0.5, 0.6], [0.3, 0.4, 0.7]])
own = torch.eye(3, dtype=torch.bool)
assert close(hinge(table, own), 0.1 + 0.3 + 0 + 0 + 0.5 + 0.1)
one_image = own.clone()
one_image[0, 1] = one_image[1, 0] = True
assert close(hinge(table, one_image), 0.3 + 0.1 + 0.1)
assert close(hinge(table, own, negatives="mean"), 0.05 + 0.15 + 0 + 0 + 0.3 + 0.05)  # both negatives, averaged

# %% [markdown]
# **Exercise 5 (build).** Write Eq. 23 for scores "b b" with the true pairs on the diagonal, the hardest negatives and a
# margin of 0.2, summed over the batch.


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
# **The plateau.** A model that gives every pair the same score has a loss of exactly $2B\beta$: 51.2 for a batch of 128.
# Suppose that it begins to spread its scores, $S_{ij} = \text{spread}\cdot z_{ij}$. Here $z$ ($B \times B$) is noise of
# standard deviation 1, and the true pairs have a little more, a *signal*. As long as every bracket is positive, the loss
# is a straight line:
#
# $$L = 2B\beta + \text{spread}\cdot\sum_i \Big(\big[\max_{j\ne i} z_{ij} - z_{ii}\big] + \big[\max_{k \ne i} z_{ki} - z_{ii}\big]\Big)$$
#
# The maximum of 127 draws of noise is about 2.6. Unless the signal is larger than that, **spreading the scores raises
# the loss**, and the cheapest thing to do is to fall back on the plateau. With the *mean* over all negatives the noise
# averages out, and any signal leads downhill. A contrastive loss does the same: it is the mean of
# $-\log\mathrm{softmax}$ of the true pair among the batch ([`softmax_loss`](../../src/finematch/models/hslm.py#L768)), and
# its plateau is $\ln B$. All losses of the cell take the same numbers $S_{ij}$.

# %%
B = p.batch
torch.manual_seed(p.seed)
noise, diagonal, plateau = torch.randn(B, B), torch.eye(B, dtype=torch.bool), 2 * B * 0.2
kinds = {"hardest": lambda scores: hinge(scores, diagonal) / plateau,
         "mean": lambda scores: hinge(scores, diagonal, negatives="mean") / plateau,
         "contrastive": lambda scores: softmax_loss(10 * scores, diagonal) / math.log(B)}  # fmt: skip
assert all(close(loss(torch.full((B, B), 0.37)), 1.0) for loss in kinds.values())
spread = torch.linspace(0, 0.12, 25).tolist()
signals = {signal: noise + signal * torch.eye(B) for signal in (1.0, 5.0)}
curves = {(kind, signal): [float(loss(x * z)) for x in spread]
          for kind, loss in kinds.items() for signal, z in signals.items()}  # fmt: skip
lesson.draw_plateau(spread, curves, B)

# %% [markdown]
# The vertical axis is the loss as a share of its plateau. One curve rises: the hardest negatives with a weak signal. In
# training, `plateau` of [`HSLM.forward`](../../src/finematch/models/hslm.py#L584) is 1 for a step that sits on the
# plateau, and the log of a run counts these steps. The next cell checks the straight line and the directions.

# %%
weak, strong = signals.values()


def slope(z: Tensor) -> Tensor:
    rival = z.masked_fill(diagonal, -math.inf)
    return (rival.amax(0) + rival.amax(1) - 2 * z.diagonal()).sum()


assert close(hinge(1e-2 * weak, diagonal), plateau + 1e-2 * slope(weak), 1e-2)
assert slope(weak) > 0 > slope(strong)
assert kinds["hardest"](1e-2 * weak) > 1 > kinds["mean"](1e-2 * weak)
assert kinds["contrastive"](1e-2 * weak) < 1

# %% [markdown]
# **What does the gradient do there?** It pushes each true pair up by 2, since a true pair stands in two brackets. It
# pushes two negatives of each pair down by 1. Which ones? At *exactly* equal scores all negatives tie, and the maximum
# shares its gradient among them (left). With a tiny difference, chance picks one negative for each image and one for
# each caption (right); the hardest negative of both its image and its caption gets 2. The mean over negatives and the
# contrastive loss look like the left panel. (The cell scales each gradient so that the true pairs have −2.)

# %%
torch.manual_seed(p.seed)
small, nearly = torch.eye(6, dtype=torch.bool), 1e-4 * torch.randn(6, 6)
starts = {"hardest, scores equal": (torch.zeros(6, 6), lambda x: hinge(x, small)),
          "hardest, nearly equal": (nearly.clone(), lambda x: hinge(x, small)),
          "mean, scores equal": (torch.zeros(6, 6), lambda x: hinge(x, small, negatives="mean")),
          "contrastive, nearly equal": (nearly.clone(), lambda x: softmax_loss(x, small))}  # fmt: skip
slopes = {}
for name, (start, loss) in starts.items():
    (gradient,) = torch.autograd.grad(loss(start.requires_grad_()), start)
    slopes[name] = gradient / gradient.diagonal().mean() * -2
lesson.draw_slopes(dict(list(slopes.items())[:2]))

# %% [markdown]
# All entries of a gradient sum to zero. If the model tells *neither* images nor captions apart, all $S_{ij}$ change
# alike with every parameter. The change is multiplied by the sum of the gradient, which is zero. So the gradient
# cannot push the model off the plateau. The cell checks this for a batch of six equal images and six equal captions. If
# the images alone are alike, the captions are still pushed: the columns of the gradient need not sum to zero.

# %%
equal, nearly, mean, contrastive = slopes.values()
assert all(close(gradient.diagonal(), [-2.0] * 6, 1e-3) for gradient in slopes.values())
assert all(abs(gradient.sum()) < 1e-4 for gradient in slopes.values())
assert close(equal, mean, 1e-5)
assert close(contrastive, mean, 1e-3)
assert not close(nearly, mean, 0.3)
stuck = tiny(p.seed)
terms = stuck(batch_of(6, equal=True))
terms["loss"].backward()
assert terms["plateau"] == 1
assert close(terms["loss"].detach(), 2 * 6 * 0.2)
assert max(float(weight.grad.abs().max()) for weight in stuck.parameters()) < 1e-5

# %%
by_caption = torch.tensor([0.6, 0.5, 0.4, 0.3, 0.2, 0.1], requires_grad=True)  # equal images, unlike captions
hinge(by_caption.expand(6, 6), small).backward()
assert by_caption.grad.abs().max() > 0.5

# %% [markdown]
# **The way out** is to begin with another loss (reading H26; the paper says nothing about a start). By default
# (`start="contrastive"`) the first `warmup_epochs` epochs of [`2_train`](2_train.ipynb) (two at scale `tiny`, none at
# `paper`) use no hinge. They use the mean
# of $-\log\mathrm{softmax}(10\, S_F)$ of the true pair, over the rows and over the columns of the $B \times B$ logits
# $S_F$; the 10 is `start_scale`. Then the hinge takes over, until the end of training.
#
# On the plateau the contrastive loss has the direction of the mean. Later it leaves this direction: the softmax gives hard negatives more weight as the model learns. The cell shows which share
# of a row's push goes to its hardest negative while noise and signal grow together (signal 3). For the mean this share
# is $1 / (B - 1)$; for the hinge it is 1 from the first step.

# %%
shares = {}
for height in (0.0, 0.1, 0.2, 0.4):
    grown = (height * (noise + 3 * torch.eye(B))).requires_grad_()
    (push,) = torch.autograd.grad(softmax_loss(10 * grown, diagonal), grown)
    push = push.masked_fill(diagonal, 0)
    shares[height] = float((push.amax(1) / push.sum(1)).mean())
print(", ".join(f"spread {height:g}: {100 * share:.1f} %" for height, share in shares.items()))
assert close(shares[0.0], 1 / (B - 1))
assert list(shares.values()) == sorted(shares.values())
assert shares[0.4] > 5 * shares[0.0]

# %% [markdown]
# **The other start** has easier negatives. With `start="random"`, the first `warmup_steps` steps of training take *one
# random* negative for each image and for each caption. (`warmup_epochs` is turned into steps.) On average this costs exactly the mean over negatives, but only $3B$ pairs have to be scored. The cell
# enumerates every choice for the three pairs of the table: two captions for each image and two images for each caption
# make $2^6 = 64$ losses.

# %%
others = [[j for j in range(3) if j != i] for i in range(3)]
choices = list(product(*others))  # a caption for each image, or an image for each caption
losses = []
for for_images, for_captions in product(choices, choices):
    excess = [table[i, j] - table[i, i] for i, j in enumerate(for_images)]
    excess += [table[k, i] - table[i, i] for i, k in enumerate(for_captions)]
    losses.append(float(F.relu(0.2 + torch.stack(excess)).sum()))
assert len(losses) == 64
assert close(sum(losses) / 64, hinge(table, own, negatives="mean"))
assert max(losses) <= float(hinge(table, own)) + 1e-6  # none costs more than the hardest

# %% [markdown]
# The model itself: the negatives are random in the first two training steps and the hardest from then on. And the mean
# of many random draws comes close to the loss over all negatives.

# %%
data = batch_of(6)
warm, anew = tiny(p.seed, start="random", warmup_steps=2).train(), tiny(p.seed, negatives="random").train()
with torch.no_grad():
    first, second, third = (float(warm(data)["loss"]) for _ in range(3))
    drawn = torch.stack([anew(data)["loss"] for _ in range(200)])
    hard, mean = (float(tiny(p.seed, negatives=kind)(data)["loss"]) for kind in ("hardest", "mean"))
print(f"start {first:.4f}, {second:.4f}, then {third:.4f}; 200 draws {drawn.mean():.4f}, mean {mean:.4f}")
assert close(third, hard, 1e-5)
assert max(first, second) <= hard + 1e-5
assert abs(drawn.mean() - mean) < 5 * drawn.std() / math.sqrt(200) + 1e-4

# %% [markdown]
# **Exercise 6 (compute).** All negatives have the logit 0, and every true pair has the logit $g$. The contrastive loss
# multiplies logits by 10 (`start_scale`). At which $g$ (`"lead"`) has it fallen from $\ln B$ to half of it, for
# $B = 128$? Which share of its plateau does the hinge still have at this $g$ with `loss_score="logit"`, and which with
# `loss_score="sigmoid"`, the default?

# %% tags=["exercise"]
lead = ...  # {"lead": ..., "logit": ..., "sigmoid": ...}
check("hslm.half", lead)

# %% [markdown] tags=["solution"] jupyter={"source_hidden": true}
# $\ln(1 + (B - 1)e^{-10g}) = \tfrac12\ln B$ gives $g = \ln\frac{B-1}{\sqrt B - 1} / 10 = 0.251$. The hinge of logits
# has stopped: every bracket is $0.2 - 0.251 < 0$. The hinge of sigmoids has not: a bracket is
# $0.2 - \sigma(0.251) + \sigma(0) = 0.138$, which is 69 % of the plateau. It stops at $g = \ln(0.7/0.3) = 0.847$. The
# contrastive loss never stops, so it can be used for the whole training.

# %% tags=["solution"] jupyter={"source_hidden": true}
lead = math.log(127 / (math.sqrt(128) - 1)) / 10
apart, pairs = lead * torch.eye(128), torch.eye(128, dtype=torch.bool)
assert close(softmax_loss(10 * apart, pairs), math.log(128) / 2)
scores = {"logit": apart, "sigmoid": apart.sigmoid()}
remains = {name: float(hinge(table, pairs)) / (2 * 128 * 0.2) for name, table in scores.items()}
assert close(list(remains.values()), [0, 0.688], 1e-3)
assert hinge((0.84 * pairs).sigmoid(), pairs) > 0 == hinge((0.85 * pairs).sigmoid(), pairs)
check("hslm.half", {"lead": lead, **remains})

# %% [markdown]
# **Search without a gradient.** Eq. 23 needs all $B^2$ scores to *find* the hardest negatives, but only $3B$ scores
# appear in it: $B$ true pairs and $2B$ hardest negatives. The gradient of all others is zero. So
# [`HSLM.forward`](../../src/finematch/models/hslm.py#L584) scores the whole batch without a gradient, picks, and scores the
# $3B$ pairs once more with a gradient. The gradient is the same (except at exact ties, where the maximum would share
# it). If a backward pass costs two forward passes, this is $B^2 + 3\cdot 3B$ in place of $3B^2$: about a third of the
# work at $B = 128$. The gradient needs memory for 384 pairs in place of 16,384.

# %%
double = tiny(p.seed).double()
data["image"]["features"] = data["image"]["features"].double()
view = double.pairs.prepare(double.encode_image(**data["image"]))
whole = hinge(double.squash(score(double.pairs, view, double.encode_text(**data["text"]))), small)
mined = double(data)["loss"]
assert close(whole.detach(), mined.detach(), 1e-6)
weights = list(double.parameters())
both = (torch.autograd.grad(loss, weights, allow_unused=True) for loss in (whole, mined))
assert all(close(a, b, 1e-9) for a, b in zip(*both, strict=True) if a is not None)
assert (128**2 + 3 * 3 * 128) / (3 * 128**2) < 0.36

# %% [markdown]
# **Exercise 7 (compute).** How strong must the signal be, in deviations of the noise, before telling pairs apart pays
# with the hardest of $B = 32$, 128 and 1,024? Give the three numbers by drawing noise: average the maximum of $B - 1$
# draws over at least 1,000 repetitions. And with the *mean* over all negatives (`"mean"`, one number for every $B$)?

# %% tags=["exercise"]
strength = ...  # {32: ..., 128: ..., 1024: ..., "mean": ...}
check("hslm.signal", strength)

# %% [markdown] tags=["solution"] jupyter={"source_hidden": true}
# The slope is negative once the signal exceeds the expected maximum of $B - 1$ draws: about 2.1, 2.6 and 3.2. It grows
# like $\sqrt{2\ln B}$, so larger batches are harder to get off the plateau. With the mean the expected slope is minus
# the signal itself: any signal above 0 will do.

# %% tags=["solution"] jupyter={"source_hidden": true}
torch.manual_seed(p.seed)
needed = {size: float(torch.randn(2000, size - 1).amax(1).mean()) for size in (32, 128, 1024)}
print(", ".join(f"B = {size}: {value:.2f}" for size, value in needed.items()))
assert close(list(needed.values()), [2.06, 2.60, 3.24], 0.05)
check("hslm.signal", {**needed, "mean": 0})

# %% [markdown]
# <a id="fast"></a>
#
# ## 9. Every image against every caption, fast (4.1)
#
# Ranking Flickr30k's test set takes $1{,}000 \times 5{,}000$ pairs. As the paper writes it, each pair has its own
# contexts, and they go through layers of width 1,024. The function below scores one pair by the book: each line is an
# equation. The library must give the same number, up to rounding.


# %%
def by_the_book(scorer: PairScorer, regions: Tensor, words: Tensor, vector: Tensor) -> Tensor:
    """The logit of an image "N d" with a caption "M d" and its global vector "d"."""
    f = torch.sigmoid(scorer.cross_scale * words @ regions.T)  # Eq. 16
    contexts = F.normalize(f @ regions, dim=-1)  # Eq. 15
    local = scorer.compare_local((words - contexts).square())  # Eq. 17, 18
    pooled = scorer.pool_image(contexts[None], full(contexts[None]))[0]
    whole = scorer.compare_global((vector - pooled).square())  # Eq. 19
    nodes = F.normalize(torch.cat([local, whole[None]]), dim=-1)  # Eq. 20
    return scorer.score((torch.sigmoid(scorer.gate(nodes)) * nodes).sum(0))[0]  # Eq. 21, 22


# %%
told = [3, 5, 5, 2, 6]  # words of five captions
scorer, seen, captions = lesson.material(64, 32, 5, told, p.seed)
fast = score(scorer, scorer.prepare(seen), captions)
book = [[by_the_book(scorer, r, w[m], v) for w, m, v in zip(*captions, strict=True)] for r in seen.regions]
assert close(fast, book, 1e-5)
assert fast.std() > 1e-4  # the scores differ at all

# %% [markdown]
# The library does three things differently.
#
# **First: the Gram matrix.** The length of a context $\sum_n f_n r_n$ ($f$ is now the row of one word) needs no context:
# $\|f R\|^2 = f\,(R R^{\top})f^{\top}$. The Gram matrix $RR^{\top}$ ($N \times N$) is made once for each image, by
# [`PairScorer.prepare`](../../src/finematch/models/hslm.py#L337).
#
# **Second: linearity.** The pooling of the contexts applies a $d \times d$ layer to every context of every pair. But
# $W\sum_n f_n r_n = \sum_n f_n\,(W r_n)$: the library applies the layer to the regions once for each image, and mixes
# the results. Eq. 22 is linear as well: $FC(\sum_k g_k s_k) = \sum_k g_k FC(s_k)$, so nodes are never stacked.
#
# **Third: captions of one length share a product.** No padding is computed, and no loop runs over captions. The score
# of a caption stays the same, whether it is alone or in company.

# %%
r, f = seen.regions[0], torch.sigmoid(captions.words[1, :5] @ seen.regions[0].T)
assert close((f @ r).norm(dim=-1).square(), ((f @ (r @ r.T)) * f).sum(-1))  # Gram
layer = scorer.pool_image.local
assert close(layer(f @ r), f @ (r @ layer.weight.T) + layer.bias)  # linearity
for c, length in enumerate(told):
    alone = rate(scorer, seen.regions, captions.words[c : c + 1, :length], captions.vector[c : c + 1])
    assert close(alone[:, 0], fast[:, c], 1e-5)
shuffled, needed = one.lengths[torch.randperm(len(one.lengths))], int(one.lengths.sum())
padded = sum(len(chunk) * int(chunk.max()) for chunk in shuffled.split(100))
print(f"in batches of 100 captions, {100 * (1 - needed / padded):.0f} % of all positions would be padding")
assert padded > needed

# %% [markdown]
# How much work is saved? The cell counts operations of one pair (a multiplication and an addition are two operations)
# for $N = 36$, $M = 13$ and the widths of a [preset](../../docs/glossary.md).

# %%
N, M, setting = 36, 13, preset("hslm", p.scale)
d, s = setting["width"], setting["sim"]
steps = pd.DataFrame({
    "f, Eq. 16": (2 * M * N * d, 2 * M * N * d),
    "contexts, Eq. 15": (2 * M * N * d, 2 * M * N * d + 2 * M * N * N),  # the length by Gram
    "pooling, 3.5": (2 * M * d * (d + 2) + 2 * d * d, 2 * d * (M * N + 2 * N + M) + 2 * M * N),
    "similarity, Eq. 17": (2 * (M + 1) * d * s, 2 * (M + 1) * d * s),
    "gates, FC": (2 * (M + 2) * s, 4 * (M + 1) * s),
}, index=["by the book", "library"]).T / 1e6  # fmt: skip
lesson.draw_operations(steps)
show(steps.rename_axis(f"million operations per pair, {p.scale}"))

# %% [markdown]
# The formulas must agree with what torch counts. At the paper's widths the library needs between a third and a
# quarter of the operations. Most of what is left is Eq. 17. To take its square apart, $(a-b)^2 = a^2 - 2ab + b^2$, saves
# nothing: the context $b$, and with it two of the three terms, belongs to a word *and* an image. So its layer sees every
# word of every pair.

# %%
scorer, seen, captions = lesson.material(d, s, 2, [M] * 4, p.seed)
view = scorer.prepare(seen)
book = lesson.operations(lambda: by_the_book(scorer, seen.regions[0], captions.words[0], captions.vector[0])) / 1e6
fast = lesson.operations(lambda: score(scorer, view, captions)) / 8e6  # 2 images with 4 captions
once = lesson.operations(lambda: scorer.prepare(seen)) / 2e6
assert close(steps.sum().tolist(), [book, fast], 1e-6)
assert 1e6 * fast > 1000 * 2 * d  # a dot product of two vectors takes 2 d operations
print(f"million operations per pair: {book:.2f} and {fast:.2f}, {book / fast:.1f} times fewer")
print(f"once for each image: {once:.2f} million, or {once / 5000:.4f} million per pair with 5,000 captions")
assert p.scale != "paper" or 3 < book / fast < 4
assert p.scale != "paper" or steps["library"].filter(like="17").item() > 0.6 * fast

# %% [markdown]
# Operations are not seconds: small products, copies and loops cost time that no formula counts. [RESULTS.md](../../RESULTS.md)
# has the measured times of HSLM's pair scores, beside a loop over captions.

# %% [markdown]
# <a id="readings"></a>
#
# ## 10. Every reading, in one table
#
# Where the paper leaves a choice, the choice is an argument of
# [`HSLMConfig`](../../src/finematch/models/configs.py#L85). The first value is the default. [`2_train`](2_train.ipynb) takes
# all of them as parameters.

# %%
columns = ["reading", "argument", "values", "default", "literal", "the paper"]
readings = pd.DataFrame(HSLMConfig.readings(), columns=columns).set_index("reading")
ranges = [type(values[0]) in (int, float) for values in readings["values"]]  # two ends, and no choices
told = ["{:g} to {:g}".format(*v) if is_range else v for v, is_range in zip(readings["values"], ranges, strict=True)]
show(readings.assign(values=told))
with torch.no_grad():
    default = tiny(p.seed)(batch_of(6))["loss"]
    for _, argument, values, standard, *_ in HSLMConfig.readings():
        losses = [tiny(p.seed, **{argument: value})(batch_of(6))["loss"] for value in values]
        assert torch.stack(losses).isfinite().all()  # each value is accepted ...
        assert tiny(p.seed, **{argument: standard})(batch_of(6))["loss"] == default  # ... and the default is the default

# %% [markdown]
# Readings without an argument, such as H3, are explained where they stand. Two more arguments are not in the table:
# `negatives` of section 8, and `depth`, 4 in the paper, which counts Eq. 8 as the first layer (H6). `rivals` says among how
# many random negatives of an image or a caption the hardest is looked for; 0 takes the whole batch. Images are always
# ranked by the logit, whatever the loss compares (H17), because a sigmoid near 1 makes ties.

# %% [markdown]
# <a id="ablation"></a>
#
# ## 11. Table 4: twelve rows, five switches (4.4)
#
# The ablation of the paper takes modules away. Each row is an [`HSLM`](../../src/finematch/models/hslm.py#L545) with five
# booleans. The cell counts the parameters of all twelve at the preset's size, without allocating them. At scale `paper`
# it takes a vocabulary of 8,481 words and features of width 2,048, as for Flickr30k. `2_train` reads WordPieces there,
# 30,522 of them, and so its models have 6.6 M parameters more. Rsum is the sum of six
# [recalls](../../docs/glossary.md): the percentage of images, and of captions, whose right answer is among the first 1, 5
# and 10.

# %%
marks = [a + b for b in (".g.", "c.l", "cgl") for a in ("..", ".s", "m.", "ms")]
on = pd.DataFrame([[mark != "." for mark in row] for row in marks], columns=MODULES, index=map(str, range(1, 13)))
features, vocabulary = (2048, 8481) if p.scale == "paper" else (512, one.vocabulary)
sizes = {name: setting[name] for name in ("width", "embed", "sim", "depth")}
with torch.device("meta"):
    models = {row: HSLM(features, vocabulary, HSLMConfig(**sizes, **on.loc[row].to_dict())) for row in on.index}
count = {row: sum(weight.numel() for weight in model.parameters()) for row, model in models.items()}
printed = published("HSLM", 4).pivot(index="row", columns="column", values="value").loc[on.index]
shown = on.assign(parameters=[f"{n / 1e6:.2f} M" for n in count.values()], published=printed["Rsum"])
show(shown.replace({True: "✓", False: "·"}).rename(columns={"published": "Rsum, published"}).rename_axis("Table 4"))

# %% [markdown]
# The parameters add up. Self-attention is three matrices of $e \times e$ without biases, in whichever row. The graph is
# `depth` layers of four matrices on each side. The local alignment adds one matrix. The cross attention adds
# **nothing**: Eq. 15 and 16 have no weights. The table leaves one question open: cross attention never stands without
# local alignment, nor the reverse.

# %%
e, depth = setting["embed"], setting["depth"]
graph = sum(depth * (4 * n**2 + 3 * n) for n in (d, e))  # mu, nu, W_r with biases, W_g without
for k in (1, 5, 9):
    base, with_self, with_graph, with_both = (count[str(k + j)] for j in range(4))
    assert with_self - base == with_both - with_graph == 3 * e**2
    assert with_graph - base == with_both - with_self == graph
assert count["9"] - count["1"] == d * s  # cross and local: the matrix of Eq. 17 alone
assert (on["cross_attn"] == on["loc"]).all()

# %% [markdown]
# **Exercise 8 (compute).** Take the twelve published Rsums of Table 4 (`published("HSLM", 4)`). What does each module
# gain, as a mean over the pairs of rows that differ in it alone? One Rsum differs from
# the sum of its six recalls by more than 0.1: in which row (`"row"`)?

# %% tags=["exercise"]
means = ...  # {"mgcn": ..., "self_attn": ..., "glob": ..., "cross_attn and loc": ..., "row": ...}
check("hslm.modules", means)

# %% [markdown] tags=["solution"] jupyter={"source_hidden": true}
# Cross attention with local alignment gains about 53. They can only be had together, and only where `glob` is on in both
# rows: rows 1 to 4 against 9 to 12. The graph gains about 7.5, global on top of local about 6.4, self-attention about 4.
# There are two contradictions. The six recalls of row 2 sum to 439.2, but Rsum is printed as 437.5. And the full model
# has 497.8 here but 508.6 in Table 1, on the same test set. The second is probably an ensemble of two models, as in VSRN
# and SGRAF; the paper does not say. The number to compare a single model with is 497.8.

# %% tags=["solution"] jupyter={"source_hidden": true}
R, has = printed["Rsum"], {row: {name for name in MODULES if on.loc[row, name]} for row in on.index}


def gain(*names: str) -> float:
    return pd.Series([R[b] - R[a] for a in has for b in has if has[a] < has[b] and has[b] - has[a] == set(names)]).mean()


means = {"cross_attn and loc": gain("cross_attn", "loc"), **{name: gain(name) for name in ("mgcn", "glob", "self_attn")}}
recalls, best = printed.drop(columns="Rsum").sum(axis=1), published("HSLM", 1).query("column == 'Rsum'").set_index("row")
assert [row for row in recalls.index if abs(recalls[row] - R[row]) > 0.2] == ["2"]
assert best["value"].filter(like="HSLM").item() - R["12"] > 10
show(pd.Series(means, name="mean gain in Rsum").to_frame().rename_axis("module"))
check("hslm.modules", {**means, "row": 2})

# %% [markdown]
# <a id="results"></a>
#
# ## 12. What came out
#
# The paper claims that each module helps, that four graph layers are the best number, and that the whole model is far
# better than the global baseline. The table holds our runs against these claims, on the embedded set. Each line
# compares two rows by their Rsum. *default* has all readings of section 10 as the library sets them, *literal* as the
# paper's words say, wherever that can be run. The bracket is the 95 % interval of the
# difference. A claim **holds** if the whole interval lies above zero. It is **contradicted** if the whole interval lies
# below zero, and **undecided** if the interval contains zero. A claim is **not run** if a row has fewer than two
# [seeds](../../docs/glossary.md).

# %%
came_out("hslm")

# %% [markdown]
# The same for the photos of Flickr8k, with frozen features and few epochs:

# %%
came_out("hslm", "flickr8k")

# %% [markdown]
# Two cautions. Our images, features and models are far smaller than the paper's, so compare the *order* of rows and not
# their numbers. And settings decide: the residual of section 3 (H2) and the contrastive start of section 8 (H26) change
# these results. [findings.md](../../docs/findings.md) says how, and what the tables suggest. If a run is older than
# today's defaults, its table says so.
#
# <a id="own"></a>
#
# ## 13. Your own image and sentence
#
# If you have trained a model with [`2_train`](2_train.ipynb), the cell scores a sentence against an image and draws
# where each word looks. Replace `one.image` by the name of a file, and change one word of the sentence, such as a
# colour. Does the score fall, and do the boxes of that word move? In [6_explore](../6_explore.ipynb) you click on words
# instead.

# %%
look("hslm", one.image, one.text)

# %% [markdown] tags=["solution"] jupyter={"source_hidden": true}
# ## Ten questions
#
# 1. *What are the shapes of $E^*$, $R^*$ and $f$ for one pair?* $M \times d$, $N \times d$ and $M \times N$.
# 2. *Why can Eq. 6 not be computed as it is printed?* All three factors are $e \times M$. One must be transposed.
# 3. *All word vectors become half as long. What happens to $E_f$ of `word`?* It has an eighth of its length: Eq. 6 is
#    cubic. With the residual the word itself stays, at half its length.
# 4. *What does a graph layer do before training, and why?* Nothing. $W_r$ is zero, so the layer returns its input.
# 5. *What would break with `relation="raw"`?* The nodes grow with their cube and with their number. They overflow after
#    a few layers.
# 6. *Which step tells the caption "a red circle on a blue square" from "a blue circle on a red square"?* The GRU.
#    Before it, a caption is a set of words.
# 7. *Why are the contexts of two words so similar at `cross_scale=1`?* All weights lie between 0.27 and 0.73, so each
#    context is nearly the sum of all regions.
# 8. *`context_norm=False` and 100 regions in place of 36: what happens to $|E^* - R_a^*|^2$?* The contexts get longer.
#    So the difference measures how many regions there are.
# 9. *Why can the hinge with the hardest negatives stay at $2B\beta$?* A weak model that spreads its scores raises
#    the loss, since the hardest of $B - 1$ negatives is far above the mean. At equal scores the gradient cancels.
# 10. *What can be computed once for each image, and what cannot?* The regions, their Gram matrix and the pooling layer of
#     the regions can. $f$, the contexts and Eq. 17 cannot: they need both the image and the caption.

# %% [markdown]
# ## What to take along
#
# * Eq. 6 and Eq. 8 are one operation, relations times vectors, and it is cubic. In the paper's formulas only the
#   residual tells them apart. Division by the number of nodes keeps it from growing with that number.
# * A sigmoid does not choose. At scale 1 every word sees nearly the sum of all regions. The words' contexts differ
#   little, and the local alignment lives on this difference.
# * Eq. 17 keeps the direction of a difference and forgets its size.
# * The hardest negative of a batch makes a plateau. A contrastive loss or random negatives lead out of it.
# * Scoring every pair is slow by the book, but what depends on the image alone is computed once for each image.
#
# Previous: [MVAM: what the views look at](../mvam/4_attention.ipynb) · Next: [HSLM: one training run](2_train.ipynb)
