# %% [markdown]
# # MVAM: the lesson
#
# **Paper** *MVAM: Multi-View Attention Method for Fine-grained Image-Text Matching*
# ([arXiv 2402.17237](https://arxiv.org/abs/2402.17237), version 2). This page explains its sections 3.1 to 3.4 and
# 4.6, equation by equation, on tensors that are small enough to work by hand.
#
# **Tables** This page makes none. It explains what the rows of Tables 1 to 5 are made of;
# [`2_train`](2_train.ipynb) runs them.
#
# **Cost** half a minute on one core (half a minute more where the embedded set has not been drawn yet), and 2 GB of
# memory. Only two toys are trained, for a second each.
#
# **Expected** every cell passes. An `assert` follows each claim that can be computed. If the page runs to its end,
# then what it claims is true of this code.
#
# **How to read it** Each section states a formula, works it by hand on a tiny tensor, and calls the library on the
# same tensor. Short quotations from the paper stand in block quotes. An exercise has a cell with `...` in it, and a
# check that says what is wrong with your answer. The teacher's edition of this page also has solutions, in folded
# cells below the exercises; the students' edition has none. The [glossary](../../docs/glossary.md) explains the terms
# of the field, and M1 to M11 and M18 are numbers of *readings*: places where the paper can be implemented in more than one
# way ([section 14](#readings) lists them).

# %% tags=["parameters"]
dataset: str = "scenes"  # the embedded set alone: its truth is known, so claims can be checked
data_root: str = "data"  # folder above the dataset's own
scale: str = "paper"  # whose batch size and lambda are set beside the loss: tiny or paper
seed: int = 0  # of every random tensor below
out: str = "papermill_runs/mvam_lesson"  # not written to: the lesson leaves no file
smoke: bool = False  # a small embedded set of its own; the rest is small anyway
cache: str = "data/cache"  # where the small set of a smoke run goes
views: int = 16  # views of the toy in section 9: 4, 9, 16 or 25 (they start on a square)
side: int = 12  # cells along a side of the toy's image
steps: int = 400  # of the toy's optimiser
pull: float = 5.0  # how much the toy gains from wide views

# %% jupyter={"source_hidden": true}
from finematch.config import Settings, declared, parameters, root

p = parameters(globals(), dataset={"scenes"}, scale={"tiny", "paper"}, seed=(0, 2**31), views={4, 9, 16, 25},
               side=(5, 32), steps=(100, 2000), pull=(0, 100))  # fmt: skip

# %%
import math

import pandas as pd
import torch
from torch import Tensor

from finematch import figures, tables, training
from finematch.encoders import CLIPText, CLIPVision
from finematch.exercises import check
from finematch.lessons import beside, came_out, close, look, mvam as lesson, shapes, show
from finematch.losses import LogitScale, contrastive
from finematch.models.mvam import MVAM, MVAMConfig, TokenPooling, ViewAttention, diversity, ensemble

_ = figures.style()

# %% [markdown]
# ## Symbols
#
# Shapes are written with one letter per axis: "b n d" is a tensor of `b` items with `n` tokens of `d` numbers. The
# library writes `v` for the axis of the views, where the paper and this page write `m`.
#
# | symbol | shape | meaning | name in the code | section |
# |---|---|---|---|---|
# | $b$ | | pairs of an image and a caption in a batch | `b` | [4](#contrast) |
# | $n$, $l$ | | tokens of an image (patches or regions), and of a caption | `n` | [3](#towers) |
# | $d$, $D$ | | numbers of a token's state, and of a final vector | `total_dim` of [`MVAMConfig`](../../src/finematch/models/configs.py#L15) is $D$; for views only with `split` | [3](#towers), [7](#width) |
# | $m$, $k$ | | number of views, and numbers of one view | `views`, `view_dim` of [`ViewAttention`](../../src/finematch/models/mvam.py#L61) | [5](#views) |
# | $H_v$, $H_t$ | n d, l d | states of an image's tokens, and of a caption's | [`Tokens`](../../src/finematch/encoders.py#L28) | [3](#towers) |
# | $R_v$, $R_t$ | D | final vectors of an image and of a caption | [`Pooled`](../../src/finematch/models/mvam.py#L29) | [3](#towers) |
# | $s_{ij}$ | b b | cosine of image $i$ and caption $j$ | [`contrastive`](../../src/finematch/losses.py#L108) | [4](#contrast) |
# | $\tau$ | a number | temperature; the code keeps $1/\tau$ | [`LogitScale`](../../src/finematch/losses.py#L92) | [4](#contrast) |
# | $L_c$ | a number | contrastive loss | [`contrastive`](../../src/finematch/losses.py#L108) | [4](#contrast) |
# | $C$ | m k | view codes | `codes` of [`ViewAttention`](../../src/finematch/models/mvam.py#L61) | [5](#views) |
# | $K$ | n k | keys: projected states | `project` of [`ViewAttention`](../../src/finematch/models/mvam.py#L61) | [5](#views) |
# | $A$ | m n | attention of the views on the tokens | [`ViewAttention.attend`](../../src/finematch/models/mvam.py#L129) | [5](#views) |
# | $r^u$ | k | answer of view $u$ | [`ViewAttention`](../../src/finematch/models/mvam.py#L61) | [5](#views) |
# | $w_u$ | a number | how much view $u$ counts in the score | [`MVAM.unit`](../../src/finematch/models/mvam.py#L226) | [8](#score) |
# | $L_{div}$ | a number | diversity loss | [`diversity`](../../src/finematch/models/mvam.py#L139) | [9](#diversity) |
# | $\lambda$ | a number | weight of the diversity loss | `diversity_weight` of [`MVAMConfig`](../../src/finematch/models/configs.py#L15) | [10](#lambda) |

# %% [markdown]
# Some helpers of the page teach nothing, and their code is in
# [`lessons/mvam.py`](../../src/finematch/lessons/mvam.py) and
# [`lessons/__init__.py`](../../src/finematch/lessons/__init__.py). `lesson.tokens` takes given states for what a tower
# returns. `lesson.with_codes` makes views with given codes, and `lesson.unchanged` a layer whose projection is the
# identity without a bias. `lesson.tiny` is a small model with random weights, `lesson.pairs` a random batch for it, and
# `lesson.once` one call of the model. `shapes` records what each part returns, `close` compares with a tolerance, and
# `show` prints a table.

# %% [markdown]
# <a id="why"></a>
#
# ## 1. Why one vector loses details (1)
#
# A two-stream model reads an image once and a caption once. Each becomes one vector, and the matching score is one
# dot product. So the vectors of a million images can be stored, and a search is fast. But the model must write down
# the vector of an image before it knows the question.
#
# The paper's first figure has an example. The query asks for a kitchen with two windows *and* two metal sinks. CLIP
# overlooks the two windows, and returns a kitchen that does not match. Nothing forced its single vector to keep them.
#
# > "the single representation often struggles to capture complex content fully"
#
# The embedded set was made to have this trouble. Below is a caption with its image. Every other image in the row also
# has *every word of the caption* somewhere in it, so a matcher that only counts words gives all of them the same
# score. What differs is which property belongs to which thing, and where the things are.

# %%
rivals = lesson.find_rivals(root() / p.data_root, root() / p.cache, smoke=p.smoke)
lesson.draw_rivals(rivals)
assert len(rivals.images) > 1
assert len(set(rivals.word_scores)) == 1  # a matcher that counts words cannot tell the images apart
assert rivals.true[0]  # the caption is true of the first image ...
assert not any(rivals.true[1:])  # ... and of no other

# %% [markdown]
# Now a smaller example, which we can work by hand. Four numbers describe a region: (red, blue, circle, square).
#
# | image | region 1 | region 2 | mean of the regions |
# |---|---|---|---|
# | X: a red circle and a blue square | (1, 0, 1, 0) | (0, 1, 0, 1) | (½, ½, ½, ½) |
# | Y: a red square and a blue circle | (1, 0, 0, 1) | (0, 1, 1, 0) | (½, ½, ½, ½) |
#
# Both images have the same mean. Whatever is trained on top of the mean can never tell X from Y.
#
# A [*view*](../../docs/glossary.md) asks first and averages afterwards. Suppose that one view asks for "red". Its
# average gives nearly all weight to the red region. So its answer is (1, 0, 1, 0) for X and (1, 0, 0, 1) for Y. The
# answer says which shape is red. The cell does this with the library's
# [`ViewAttention`](../../src/finematch/models/mvam.py#L61), whose code we set to "red" by hand. The 20 is large, so
# that nearly all weight goes to the red region. [Section 5](#views) explains how it works.

# %%
X = torch.tensor([[1.0, 0, 1, 0], [0, 1, 0, 1]])
Y = torch.tensor([[1.0, 0, 0, 1], [0, 1, 1, 0]])
regions = torch.stack([X, Y])  # "b n d": two images of two regions
red = lesson.with_codes([[20.0, 0, 0, 0]])
mean, answer = regions.mean(1), red(lesson.tokens(regions)).vector
assert close(mean[0], mean[1])  # the mean: no difference
assert close(answer, [[1.0, 0, 1, 0], [1, 0, 0, 1]])  # the view: the shape of the red thing
lesson.draw_answers(mean, answer)

# %% [markdown]
# One view is not enough. The view "red" does not see what the blue things are. So the model needs several views, and
# it concatenates their answers. This is the whole idea of the paper:
#
# > "diverse attention heads with unique view codes"
#
# Three things remain: to write it down, to train it, and to keep the views from all asking the same question.
#
# Two limits should be clear from the start. First, a deep encoder mixes its tokens, so the state of one token *can*
# say which shape is red. The paper's claim is that a pool with one vector keeps fewer of these details. Second, a
# view code is fixed after training. It is the same question for every image, and it is not made from the caption.
# This keeps the two streams apart, and the search fast.

# %% [markdown]
# <a id="model"></a>
#
# ## 2. The model in one diagram (3.1 to 3.4)
#
# We send a tiny batch through a tiny [`MVAM`](../../src/finematch/models/mvam.py#L195) and write down the shape of
# what each part returns. All sizes differ, so a size tells its axis: 2 pairs (`b`), 5 regions (`r`) of 9 numbers
# (`e`), 6 tokens of an image (`n`), 7 tokens of a caption (`l`), states of 8 numbers (`d`), 4 views (`m`), vectors of
# 40 numbers (`D`).

# %%
model, batch = lesson.tiny(p.seed, views=4, total_dim=40), lesson.pairs(p.seed)
letters = {2: "b", 5: "r", 9: "e", 6: "n", 7: "l", 8: "d", 4: "m", 40: "D"}
found = shapes(model, lambda: lesson.once(model, batch), letters)
lesson.draw_model(found)
assert found["vision.states"] == "b n d"  # the tower has put a token [IMG] before the regions: n = r + 1
assert found["text.states"] == "b l d"
assert found["image_pooling.vector"] == found["text_pooling.vector"] == "b D"  # so a dot product is possible

# %% [markdown]
# Read it from the left. The images and the captions go through two *[towers](../../docs/glossary.md)* that share
# nothing. A tower gives one state for each token. The views turn the states into one vector of `D` numbers. The views
# also give their attention to the diversity loss. The two streams meet only in the cosine, at the end.
#
# The regions come from a frozen detector, which reads each image once, before the training. The paper also has models
# over patches of a ViT, and over CLIP. They differ in the tower alone.

# %% [markdown]
# <a id="towers"></a>
#
# ## 3. Two towers, one pooled vector (3.1, Eq. 1 to 4)
#
# $$H_v = \mathrm{ViT}([\mathrm{IMG}]; x_1; \dots; x_{n-1}) \quad (1) \qquad\qquad
# R_v = \tanh(W\,h_{[\mathrm{IMG}]} + c) \quad (2)$$
# $$H_t = \mathrm{BERT}([\mathrm{CLS}], y_1, \dots, y_{l-2}, [\mathrm{SEP}]) \quad (3) \qquad\qquad
# R_t = \tanh(W'\,h_{[\mathrm{CLS}]} + c') \quad (4)$$
#
# * $x_1, x_2, \dots$ are the patches or regions of an image, and $y_1, y_2, \dots$ are the words of a caption.
# * [IMG], [CLS] and [SEP] are *special tokens*. They stand for no patch and no word. [IMG] and [CLS] come first.
# * $H_v$, "n d", and $H_t$, "l d", hold one state of $d$ numbers for each token. $n$ and $l$ count the special
#   tokens, too.
# * $h_{[\mathrm{IMG}]}$ and $h_{[\mathrm{CLS}]}$, both "d", are the first rows of $H_v$ and $H_t$.
# * $W$ and $W'$, both "D d", and $c$ and $c'$, both "D", are learnt. In the code they are the layer `project`.
# * $R_v$ and $R_t$, both "D", are the final vectors. The paper prints the tanh and $D = 1024$ in section 4.3.
#
# This is the baseline "+[CLS]" of Tables 1 and 2. In the library it is
# [`TokenPooling`](../../src/finematch/models/mvam.py#L37). The formulas of this paper were lost when it was converted
# to text. We have rebuilt them from the words around them; [section 14](#readings) lists what we filled in.
#
# By hand: let $W$ be the identity and $c = 0$. The state of [IMG] is $(0.5, -1)$, so
# $R = (\tanh 0.5, \tanh(-1)) = (0.4621, -0.7616)$. The cell then sets the states of all other tokens to 0, and $R$
# stays. They count only through what the tower has mixed into the first state.

# %%
states = torch.tensor([[[0.5, -1.0], [3.0, 3.0], [-2.0, 4.0]]])
cls = lesson.unchanged(TokenPooling(2, 2))
R = cls(lesson.tokens(states)).vector
assert close(R, [[0.4621, -0.7616]])
other = states.clone()
other[:, 1:] = 0
assert close(cls(lesson.tokens(other)).vector, R)
lesson.draw_first_token(states[0], R[0])

# %% [markdown]
# <a id="contrast"></a>
#
# ## 4. The contrastive loss (3.2, Eq. 5 and 6)
#
# A batch has $b$ pairs. Caption $i$ should match image $i$ and none of the other $b-1$ images.
#
# $$s_{ij} = \cos(R_v^i, R_t^j), \qquad
# L_{i2t} = -\frac1b\sum_{i=1}^{b}\log\frac{\exp(s_{ii}/\tau)}{\sum_{j=1}^{b}\exp(s_{ij}/\tau)} \quad (5)$$
# $$L_c = \tfrac12\,(L_{i2t} + L_{t2i}) \quad (6)$$
#
# * $s_{ij}$ is the matching score of image $i$ and caption $j$; all scores together are "b b".
# * $\tau$, a number, is the temperature. The code learns $1/\tau$
#   ([`LogitScale`](../../src/finematch/losses.py#L92)).
# * $L_{i2t}$, a number, asks each image for its caption. $L_{t2i}$ asks each caption for its image: the same formula,
#   with the sum over the images.
# * $L_c$, a number, is the contrastive loss ([`contrastive`](../../src/finematch/losses.py#L108)).
#
# The paper says "cosine" and "in-batch". The temperature and the ½ are CLIP's, which the paper follows.
#
# By hand: the images are $(1,0)$ and $(0,1)$, the captions $(0.8, 0.6)$ and $(0,1)$, and $1/\tau = 5$. A logit is a
# cosine divided by $\tau$.
#
# | logits | caption 1 | caption 2 | loss of the row |
# |---|---|---|---|
# | image 1 | 5 · 0.8 = **4** | 5 · 0 = 0 | ln(1 + e⁻⁴) = 0.0181 |
# | image 2 | 5 · 0.6 = 3 | 5 · 1 = **5** | ln(1 + e⁻²) = 0.1269 |
# | loss of the column | ln(1 + e⁻¹) = 0.3133 | ln(1 + e⁻⁵) = 0.0067 | |
#
# $L_{i2t} = 0.0725$ is the mean over the rows, and $L_{t2i} = 0.1600$ the mean over the columns. So $L_c = 0.1163$.

# %%
image = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
text = torch.tensor([[0.8, 0.6], [0.0, 1.0]])
assert close(5 * image @ text.T, [[4.0, 0], [3, 5]])
assert close(contrastive(image, text, 5.0), 0.1163)
assert close(contrastive(image, text, 5.0, reduction="sum"), 2 * 0.1163, 2e-4)  # reading M5: without the ½
lesson.draw_contrast(image, text, 5.0)

# %% [markdown]
# The curve shows why the loss needs a temperature. In our example every image ranks its own caption first, and every
# caption its own image. But a cosine lies between −1 and 1, so with $1/\tau = 1$ the loss stays large. With a larger
# $1/\tau$ the same ranking costs less. $1/\tau$ starts at $1/0.07 \approx 14$, is learnt, and stays below 100
# (reading M7).
#
# A model that gives all pairs the same score has a loss of $\ln b$ at any temperature. The converse
# does not follow: a loss of $\ln b$ says that the model does no better than equal scores. Our example, which ranks
# everything correctly, also costs about $\ln 2$ if $1/\tau$ is close to 0.

# %%
cosines = image @ text.T
assert cosines.argmax(0).tolist() == cosines.argmax(1).tolist() == [0, 1]
losses = [contrastive(image, text, scale) for scale in (1.0, 5.0, 1 / 0.07)]
assert losses[0] > 0.3 > losses[1] > losses[2]
assert close(LogitScale(0.07)(), 1 / 0.07)
alike = torch.ones(7, 1)
assert all(close(contrastive(alike, alike, scale), math.log(7)) for scale in (1.0, 5.0, 100.0))
assert close(contrastive(image, text, 1e-4), math.log(2))  # the right ranking, at the loss of equal scores

# %% [markdown]
# **Exercise 1 (compute).** COCO has five captions per image. In a random batch of $b$ captions, two may describe the
# same image, and the loss then punishes a correct answer. How many such pairs do you expect in a batch of 1,024 that
# is drawn without replacement, as in an epoch, with 113,287 training images? (This is reading M11;
# `same_picture_positives=True` makes both captions positives.)

# %% tags=["exercise"]
pairs_of_one_image = ...  # a number
check("mvam.collisions", pairs_of_one_image)

# %% [markdown] tags=["solution"] jupyter={"source_hidden": true}
# There are $\binom b2$ pairs of captions. Given one caption, 4 of the other $5N-1$ belong to the same image, where
# $N$ is the number of images. Expected: $\binom b2 \cdot 4/(5N-1)$, that is 3.7 for COCO. At $b=128$ on 6,000 images
# it is 1.1, which the cell also simulates.


# %% tags=["solution"] jupyter={"source_hidden": true}
def collisions(size: int, images: int) -> float:
    return math.comb(size, 2) * 4 / (5 * images - 1)


torch.manual_seed(p.seed)
drawn = [(torch.randperm(30_000)[:128] // 5).unique(return_counts=True)[1] for _ in range(2000)]
simulated = sum((n * (n - 1) / 2).sum() for n in drawn) / len(drawn)  # n captions make n (n - 1) / 2 pairs
print(f"6,000 images, 128: {collisions(128, 6_000):.2f}, simulated {simulated:.2f}")
assert abs(simulated - collisions(128, 6_000)) < 0.15
check("mvam.collisions", collisions(1024, 113_287))

# %% [markdown]
# **Exercise 2 (build).** Write Eq. 5 and 6 yourself, for unit vectors "b d" of images and captions and the number
# $1/\tau$. `torch.nn.functional.cross_entropy` may help.


# %% tags=["exercise"]
def contrast(image: Tensor, text: Tensor, scale: float) -> Tensor: ...


check("mvam.contrast", contrast)


# %% tags=["solution"] jupyter={"source_hidden": true}
def contrast(image: Tensor, text: Tensor, scale: float) -> Tensor:
    logits, own = scale * image @ text.T, torch.arange(len(image))
    cross_entropy = torch.nn.functional.cross_entropy
    return (cross_entropy(logits, own) + cross_entropy(logits.T, own)) / 2


check("mvam.contrast", contrast)

# %% [markdown]
# <a id="views"></a>
#
# ## 5. View codes (3.3, Eq. 7 to 9)
#
# $$A = \mathrm{softmax}_n\!\left(C K^{\top}\right) \quad (7) \qquad r^{u} = \sum_{j=1}^{n} A_{uj} K_j \quad (8) \qquad
# R = [\,r^1; \dots; r^m\,] \quad (9)$$
#
# * $C$, "m k", are the *view codes*: free parameters that are learnt, one row for each view (`codes`).
# * $K$, "n k", are the *keys*: the tower's states after a linear layer with a bias (`project`). $K_j$ is the key of
#   token $j$.
# * $A$, "m n", is the attention. The softmax runs over the tokens, so each row is a set of weights that sum to 1.
# * $r^u$, "k", is the *answer* of view $u$: the mean of the keys, weighted by row $u$ of $A$.
# * $R$, "D" with $D = mk$, is the list of all answers. It takes the place of $R_v$, or of $R_t$, in Eq. 2 and 4.
#
# Here, and in exercise 3, all views share one $K$. The library's default is another, `split`: the linear layer gives
# $D$ numbers per token, so $K$ is "n m k", and view $u$ reads only its own $k = D/m$ columns $K^u$, "n k". Then
# $A_u = \mathrm{softmax}(K^u C_u)$ and $r^u = \sum_j A_{uj} K^u_j$. [Section 7](#width) compares the two.
#
# Each code is a query, and the tokens are keys and values at once. In the library all this is
# [`ViewAttention`](../../src/finematch/models/mvam.py#L61), whose einsums have these letters as subscripts
# (and `v` for $m$).
#
# By hand: three tokens with the keys $(2,0)$, $(0,2)$, $(1,1)$ and two codes $(\ln 2, 0)$, $(0, \ln 2)$. The
# exponentials of the logits of view 1 are 4, 1 and 2. Their sum is 7.
#
# | | token 1 | token 2 | token 3 | answer |
# |---|---|---|---|---|
# | logits of view 1 | 2 ln 2 | 0 | ln 2 | |
# | weights of view 1 | 4/7 | 1/7 | 2/7 | 4/7 (2,0) + 1/7 (0,2) + 2/7 (1,1) = (10/7, 4/7) |
# | weights of view 2 | 1/7 | 4/7 | 2/7 | (4/7, 10/7) |
#
# So $R = (10, 4, 4, 10)/7$.

# %%
keys = torch.tensor([[[2.0, 0], [0, 2], [1, 1]]])
two_views = lesson.with_codes([[math.log(2), 0], [0, math.log(2)]])
pooled = two_views(lesson.tokens(keys))
assert close(7 * pooled.attention, [[[4.0, 1, 2], [1, 4, 2]]])
assert close(7 * pooled.vector, [[10.0, 4, 4, 10]])
lesson.draw_views(two_views.codes, keys[0], pooled.attention[0])

# %% [markdown]
# An answer is a weighted mean, so it lies between the keys. A code pulls it towards the keys that point its way.
# That is why the softmax runs over the tokens. If it ran over the views, the weights of one view would not sum to 1.
# Its answer would be no mean, and would grow with the number of tokens.
#
# Two more facts. Padding is masked before the softmax: if token 3 is padding, the other two share all the weight, 4
# to 1 and 1 to 4. Without the mask padding gets weight too, and the vector of a caption depends on how far its batch
# was padded. And tokens are a set: their order does not matter.
#
# The cell also shows `split` with the same two codes. Each token now has four numbers, two for each view, so the two
# views read different keys.

# %%
padded = two_views(lesson.tokens(keys, real=2))
assert close(5 * padded.attention, [[[4.0, 1, 0], [1, 4, 0]]])
assert close(two_views(lesson.tokens(keys[:, [2, 0, 1]])).vector, pooled.vector)

over_views = (two_views.codes @ keys[0].T).softmax(0)  # the wrong axis
assert not close(over_views.sum(1), [1.0, 1.0], 0.1)  # the weights of one view do not sum to 1

split = lesson.unchanged(ViewAttention(4, views=2, total_dim=4, projection="split"))
split.codes.copy_(two_views.codes)
wide_keys = torch.cat([keys, keys[:, [1, 2, 0]]], dim=2)  # K^1 as before; K^2 has the tokens in another order
assert close(7 * split(lesson.tokens(wide_keys)).attention, [[[4.0, 1, 2], [4, 2, 1]]])

# %% [markdown]
# **Exercise 3 (build).** Write Eq. 7 to 9: codes "m k", keys "b n k", and a mask "b n" of the tokens that exist. The
# result is "b (m k)".


# %% tags=["exercise"]
def attended(codes: Tensor, keys: Tensor, mask: Tensor) -> Tensor: ...


check("mvam.views", attended)


# %% tags=["solution"] jupyter={"source_hidden": true}
def attended(codes: Tensor, keys: Tensor, mask: Tensor) -> Tensor:
    logits = torch.einsum("vk,bnk->bvn", codes, keys).masked_fill(~mask[:, None], -math.inf)
    return torch.einsum("bvn,bnk->bvk", logits.softmax(-1), keys).flatten(1)


check("mvam.views", attended)

# %% [markdown]
# **Exercise 4 (change).** The paper prints no $1/\sqrt{k}$ and no temperature inside this softmax (reading M2). Does
# the model miss one? Predict what happens to the weights $A$ of the two views above if their codes are multiplied by
# 10: "sharper", "flatter" or "the same". Then measure: `lesson.with_codes(...)(lesson.tokens(keys)).attention`.

# %% tags=["exercise"]
predicted, measured = ..., ...
check("mvam.sharp", predicted, measured)

# %% [markdown] tags=["solution"] jupyter={"source_hidden": true}
# No temperature is missing: the length of a code *is* its temperature. Ten times the code is ten times the logit, so
# the weights become nearly one-hot. The codes are learnt, so each view learns its own sharpness. The `scaled` switch
# only changes where the learning starts.

# %% tags=["solution"] jupyter={"source_hidden": true}
sharp = lesson.with_codes([[10 * math.log(2), 0], [0, 10 * math.log(2)]])(lesson.tokens(keys)).attention
print(sharp.numpy().round(4))
assert sharp.max(-1).values.min() > 0.99
check("mvam.sharp", "sharper", sharp)

# %% [markdown]
# <a id="attn"></a>
#
# ## 6. One view is "+Attn" (4.3)
#
# The second baseline of the paper is attention pooling:
#
# > "first transforms the hidden states into 1024-dimensional vectors using a linear projection layer, and
# > then aggregates these vectors using an attention head with only one view code"
#
# So its vectors are those of MVAM with $m = 1$, in the paper and in the library. The *loss* is another matter. The
# diversity loss of [section 9](#diversity) is not 0 for one view, and the paper does not say whether +Attn has it. The
# library leaves it out with `pooling="attention"` and keeps it with `pooling="mvam", views=1`.
#
# The paper's tables agree: the row "1" of Table 4 and the row FRCNN +Attn of Table 1 (MSCOCO-5K) print the same numbers.
# These are [recalls](../../docs/glossary.md) in percent: `i2t@1` is the share of images whose caption is ranked first,
# `t2i@5` the share of captions whose image is among the first five. FRCNN (Faster R-CNN) is the frozen detector of
# section 2, and stands for the models over its regions.

# %%
one, attn = lesson.printed(4).loc["1"], lesson.printed(1).loc["FRCNN +Attn"]
show(pd.DataFrame({"Table 4, 1 view": one, "Table 1, FRCNN +Attn": attn}).T.rename_axis("printed"))
assert (one == attn).all()

baseline, mvam = lesson.tiny(p.seed, pooling="attention"), lesson.tiny(p.seed, pooling="mvam", views=1)
vectors = [model.encode_image(**batch["image"]).vector for model in (baseline, mvam)]
assert close(*vectors)  # the library: the same vectors from the same start ...
assert mvam(batch)["loss"] > baseline(batch)["loss"] + 1  # ... and another loss

# %% [markdown]
# <a id="width"></a>
#
# ## 7. How wide is a view? (reading M1)
#
# The sentence that gives the width $k$ of a view code has lost its symbols. Four facts in the paper limit the choice:
#
# * **F1** "+Attn" projects to 1,024 numbers *before* it attends (4.3).
# * **F2** One view *is* "+Attn" (Tables 1 and 4), so one view is 1,024 wide.
# * **F3** Table 3 compares 16 models of 64 numbers with 16 views, so 16 views should have 1,024 numbers in all
#   (4.6.1).
# * **F4** More views "lead to longer representation vectors" (4.6.2).
#
# No reading agrees with all four. The library offers three, as the argument
# `projection` of [`ViewAttention`](../../src/finematch/models/mvam.py#L61):
#
# * `split`: one linear layer to 1,024 numbers, cut into $m$ pieces. Each view attends in its own piece.
# * `shared`: one linear layer to 64 numbers, which all views share. So $D = 64\,m$.
# * `full`: one linear layer to 1,024 numbers, which all views share. So $D = 1024\,m$.


# %%
def layer(kind: str, m: int) -> ViewAttention:
    return ViewAttention(768, views=m, total_dim=1024, projection=kind, view_dim=64)


def facts(kind: str) -> dict[str, bool]:
    one, many, more = layer(kind, 1), layer(kind, 16), layer(kind, 32)
    return {"F1": one.project.out_features == 1024, "F2": one.view_dim == 1024,
            "F3": (many.view_dim, many.out_dim) == (64, 1024), "F4": more.out_dim > many.out_dim}  # fmt: skip


held = pd.DataFrame({kind: facts(kind) for kind in ("split", "shared", "full")}).T.rename_axis("projection")
show(held.replace({True: "✓", False: "·"}).astype(str))

# %%
assert held.loc["split"].tolist() == [True, True, True, False]
assert held.loc["shared"].tolist() == [False, False, True, True]
assert held.loc["full"].tolist() == [True, True, False, True]
lesson.draw_split(16, 1024)

# %% [markdown]
# `split` is the default. It alone makes both of the paper's comparisons fair: one view against sixteen, and sixteen
# models against sixteen views, always with vectors of 1,024 numbers. With 16 views, `split` and `shared` give vectors
# of the same shape. They differ in whether each view has a projection of its own.

# %% [markdown]
# <a id="score"></a>
#
# ## 8. The score is a sum over views (3.2 and Eq. 9)
#
# The cosine of two concatenated vectors is a sum:
#
# $$\cos(R_v, R_t) = \sum_{u=1}^{m} w_u\,\cos(r_v^u, r_t^u), \qquad
# w_u = \frac{\|r_v^u\|\,\|r_t^u\|}{\|R_v\|\,\|R_t\|}, \qquad \sum_u w_u \le 1$$
#
# * $r_v^u$ and $r_t^u$, both "k", are the answers of view $u$ for the image and for the caption.
# * $w_u$, a number, is the weight of view $u$. A view with long answers counts more. The sum of the weights is the
#   cosine of two lists, the lengths of all answers of each side. So it is at most 1.
# * $\|\cdot\|$ is the length of a vector. The code scales vectors to length 1 in
#   [`MVAM.unit`](../../src/finematch/models/mvam.py#L226).
#
# By hand, two views of width 2: the image has the answers $(3,0)$ and $(0,1)$, the caption $(1,0)$ and $(0,-2)$. The
# first answers agree (cosine 1), the second ones disagree (cosine −1). The lengths of $R_v$ and $R_t$ are $\sqrt{10}$
# and $\sqrt 5$, so $w = (3, 2)/\sqrt{50}$. The score is $(3 - 2)/\sqrt{50} = 0.141$: the longer view wins.
#
# With `normalise="per_view"` (reading M6) each answer is made a unit vector first. Then every weight is $1/m$, and
# the score is the plain mean of the cosines, here 0.

# %%
of_image, of_caption = torch.tensor([[3.0, 0, 0, 1]]), torch.tensor([[1.0, 0, 0, -2]])


def score(**options) -> Tensor:
    model = lesson.tiny(p.seed, views=2, total_dim=4, **options)
    return (model.unit(of_image) * model.unit(of_caption)).sum()


assert close(score(normalise="after"), 1 / math.sqrt(50))
assert close(score(normalise="per_view"), 0.0)

# %% [markdown]
# Now eight views with random answers: `a` of an image and `t` of a caption that resembles it, both "m k". The matrix
# shows every view of the image with every view of the caption.

# %%
torch.manual_seed(p.seed + 3)
a, noise = (torch.randn(8, 6) * torch.rand(8, 1) for _ in range(2))
t = 1.2 * a + noise
products = (a @ t.T) / (a.norm() * t.norm())  # "m m"
weights = a.norm(dim=1) * t.norm(dim=1) / (a.norm() * t.norm())
total = torch.cosine_similarity(a.flatten(), t.flatten(), dim=0)
assert close(products.diagonal().sum(), total)
assert close((weights * torch.cosine_similarity(a, t)).sum(), total)
assert weights.sum() < 1 + 1e-6  # the bound, and a margin for rounding
lesson.draw_score(products)

# %% [markdown]
# Only the diagonal enters the score. View 4 of an image meets view 4 of a caption and no other view. An earlier
# method, PVSE, takes the best of all combinations instead. The paper argues that this overlooks mismatches and costs
# more.
#
# **Exercise 5 (change).** In section 4.6.4 the paper finds that view 4 of the text looks at "holding onto" where view
# 4 of the image looks at the rope. Is this correspondence a discovery? Predict what happens to the score if you
# permute the views of both sides alike, and of one side alone: "higher", "lower" or "the same". Then measure it on
# `a` and `t` above: the score as it is, with both permuted, with one permuted, each without rounding.

# %% tags=["exercise"]
both, one_side, scores = ..., ..., ...  # two predictions; three numbers
check("mvam.permuted", both, one_side, scores, (a, t))

# %% [markdown] tags=["solution"] jupyter={"source_hidden": true}
# It follows from the concatenation. The loss rewards only products of views with the same number, so numbers are
# all that ties the two sides together. Permuting both sides alike changes nothing; permuting one breaks the score.
# *What* view 4 has specialised in is an empirical finding; *that* it is the same on both sides was built in.

# %% tags=["solution"] jupyter={"source_hidden": true}
mixed = torch.tensor([1, 2, 3, 4, 5, 6, 7, 0])
sides = ((a, t), (a[mixed], t[mixed]), (a, t[mixed]))
scores = [float(torch.cosine_similarity(x.flatten(), y.flatten(), dim=0)) for x, y in sides]
assert close(scores[0], total)
check("mvam.permuted", "the same", "lower", scores, (a, t))

# %% [markdown]
# <a id="diversity"></a>
#
# ## 9. Keeping the views apart (3.4, Eq. 10 and 11)
#
# Nothing so far keeps sixteen codes from becoming one and the same code. The diversity loss works against it. It
# looks at the attention alone:
#
# $$L_{div} = \left\|A A^{\top} - I\right\|_F^2 \quad (10) \qquad\qquad
# L'_{div} = \left\|\sqrt A \sqrt A^{\top} - I\right\|_F^2 \quad (11)$$
#
# * $A$, "m n", is the attention of one image, or of one caption, from Eq. 7.
# * $AA^{\top}$, "m m", compares every two views: entry $(u, u')$ is $\sum_j A_{uj} A_{u'j}$, how much they overlap.
# * $I$, "m m", is the identity: 1 on the diagonal, 0 elsewhere.
# * $\|\cdot\|_F^2$ is the sum of the squares of all entries. $\sqrt A$ is the root of each entry.
#
# In the library both are [`diversity`](../../src/finematch/models/mvam.py#L139), `variant="base"` and
# `variant="sqrt"`.
#
# By hand, two views on three tokens: $A = (½, ½, 0), (0, ½, ½)$.
#
# | | matrix | minus $I$ | sum of squares |
# |---|---|---|---|
# | Eq. 10 | ½ ¼ / ¼ ½ | −½ ¼ / ¼ −½ | ¼ + 1/16 + 1/16 + ¼ = **0.625** |
# | Eq. 11 | 1 ½ / ½ 1 | 0 ½ / ½ 0 | ¼ + ¼ = **0.5** |

# %%
A = torch.tensor([[[0.5, 0.5, 0], [0, 0.5, 0.5]]])
assert close(diversity(A, variant="base"), 0.625)
assert close(diversity(A, variant="sqrt"), 0.5)
assert close(diversity(A, variant="base", power=1), math.sqrt(0.625))  # reading M4: not squared
lesson.draw_overlaps(A[0])

# %% [markdown]
# Compare the two diagonals. In Eq. 10 entry $(u, u)$ is $\sum_j A_{uj}^2$. It is 1 only if view $u$ puts *all* its
# weight on one token. So Eq. 10 asks for two things at once: views that are apart, and views that are sharp. In Eq.
# 11 entry $(u, u)$ is $\sum_j A_{uj}$, which is 1 for any weights. So Eq. 11 asks only for views that are apart. This
# agrees with two remarks of the paper:
#
# > Eq. 10: "encourage the model to focus on isolated regions" (4.6.3)
#
# > Eq. 11: "allows more large salient regions" (3.4)
#
# An example: 16 views on 197 tokens, each spread evenly over 12 tokens of its own. No two views overlap. Eq. 10 still
# charges $16\,(1 - 1/12)^2 = 13.44$, and Eq. 11 charges nothing. Views that are apart *and* sharp satisfy both.

# %%
wide = torch.eye(16).repeat_interleave(12, dim=1) / 12  # "m n", without the last 5 tokens
wide = torch.nn.functional.pad(wide, (0, 5))[None]
assert close(diversity(wide, variant="base"), 16 * (1 - 1 / 12) ** 2, 1e-3)
assert close(diversity(wide, variant="sqrt"), 0.0)

one_hot = torch.eye(16, 197)[None]
assert close(diversity(one_hot, variant="base"), 0.0)
assert close(diversity(one_hot, variant="sqrt"), 0.0)

# %% [markdown]
# The printed Eq. 11 was lost. The root of each entry is what the code of DRSA has, the work on attention to video frames
# that the paper cites for its diversity loss. Both quotations are true under it.
#
# ### A toy: the optimiser moves the attention itself
#
# The toy has no image and no caption. The logits of 16 views on 12 × 12 cells are free parameters. They start as
# broad blobs that overlap. First we minimise the diversity loss alone. Then we also reward wide views: we subtract
# `pull` times their mean entropy. This stands for a matcher that gains from looking at whole objects.


# %%
def settle(variant: str, gain: float) -> Tensor:
    """Attention "1 m n" after `p.steps` steps of Adam."""
    logits = lesson.blobs(p.views, p.side, p.seed).requires_grad_()
    optimiser = torch.optim.Adam([logits], lr=0.05)
    for _ in range(p.steps):
        attention = logits.softmax(-1)
        loss = diversity(attention, variant=variant) - gain * lesson.spread(attention).mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    return logits.detach().softmax(-1)


# %%
started = lesson.blobs(p.views, p.side, p.seed).softmax(-1)
trials = [(variant, pulled) for pulled in (False, True) for variant in ("base", "sqrt")]
ended = {(variant, pulled): settle(variant, p.pull * pulled) for variant, pulled in trials}
lesson.draw_toy(started, ended)

# %% [markdown]
# Each small square is one view, and bright cells have much weight. *Cells* of a view is the exponential of its
# entropy: a view that is spread evenly over 9 cells has 9. *Overlap* is the mean of $\sum_j\sqrt{A_{uj}A_{u'j}}$ over
# pairs of different views: 0 is apart, 1 is the same. An equal share is 144 cells / 16 views = 9 cells. With the
# default parameters:
#
# * **Top row, alone**: both losses move the views apart. Eq. 10 leaves each view on a single cell. Eq. 11 does not
#   make the views wide, it only allows it.
# * **Bottom row, with the pull**: under Eq. 11 a view spreads over 6 cells or more on average, where an equal share
#   would be 9, and the views stay apart. Under Eq. 10 most views stay on their cells; with `seed=0` all do. A view
#   that leaves its cell spreads over the whole image: between one cell and all cells there is no place to rest.
#   `seed=7` alone shows one such view of 16, `views=9` alone shows seven of 9.

# %%
used = {trial: lesson.cells_used(attention) for trial, attention in ended.items()}
assert lesson.overlap(started) > 0.4
assert lesson.overlap(ended["base", False]) < 0.15  # alone, both end apart, whatever the parameters
assert lesson.overlap(ended["sqrt", False]) < 0.15
if (p.views, p.side, p.steps, p.pull) == (16, 12, 400, 5.0):  # what follows depends on these four, at any seed
    assert used["base", False].max() < 1.5
    assert len(set(ended["base", False][0].argmax(-1).tolist())) == p.views  # one cell each, all different
    assert lesson.overlap(ended["sqrt", True]) < 0.15
    assert used["base", True].median() < 2 < 6 < used["sqrt", True].mean() < p.side**2 / p.views
    assert ((used["base", True] < 3) | (used["base", True] > 100)).all()
    assert p.seed or used["base", True].max() < 3  # with seed 0 no view leaves its cell
    assert used["sqrt", False].mean() < used["sqrt", True].mean() / 2

# %% [markdown]
# **Exercise 6 (build).** Write Eq. 10 for attention "b m n": the squared norm, a mean over the batch.


# %% tags=["exercise"]
def kept_apart(attention: Tensor) -> Tensor: ...


check("mvam.diversity", kept_apart)


# %% tags=["solution"] jupyter={"source_hidden": true}
def kept_apart(attention: Tensor) -> Tensor:
    excess = attention @ attention.mT - torch.eye(attention.shape[1])
    return excess.square().sum((1, 2)).mean()


check("mvam.diversity", kept_apart)

# %% [markdown]
# **Exercise 7 (compute).** A caption often has fewer tokens than there are views. Eq. 10 of $m$ views over $l$ tokens
# then cannot reach 0, however long one trains. Give the lower bound that the rank of $AA^{\top}$ alone implies, as a
# function of $m$ and $l$. (Attention cannot quite reach it: its rows are not negative and sum to 1.) What does it
# mean for 16 views and a caption of ten words? [CLS] and [SEP] count as tokens.


# %% tags=["exercise"]
def least(views: int, tokens: int) -> float: ...


check("mvam.floor", least)

# %% [markdown] tags=["solution"] jupyter={"source_hidden": true}
# $AA^{\top}$ is $m \times m$ but has rank at most $l$, so at least $m - l$ of its eigenvalues are 0. $AA^{\top} - I$
# has $-1$ there, and the squared Frobenius norm is the sum of squared eigenvalues: at least $m - l$, and never below
# 0. With 10 words, [CLS] and [SEP], $l = 12$ and the floor is 4, times λ = 40: a constant that training cannot
# remove, larger than $\ln 1024 \approx 7$. It has no gradient of its own, but comparing losses across captions or
# settings is misleading. The same holds for Eq. 11. Attention stays above the floor: with a single token all views are
# equal, and Eq. 10 is $m(m-1)$, not $m-1$.

# %% tags=["solution"] jupyter={"source_hidden": true}
torch.manual_seed(p.seed)
few = torch.randn(1, 16, 12).requires_grad_()
optimiser = torch.optim.Adam([few], lr=0.1)
for _ in range(500):
    optimiser.zero_grad()
    diversity(few.softmax(-1)).backward()
    optimiser.step()
reached = float(diversity(few.detach().softmax(-1)))
print(f"16 views, 12 tokens, after 500 steps: {reached:.2f} (floor 4)")
assert reached > 4 - 1e-4
assert close(diversity(torch.ones(1, 5, 1)), 5.0 * 4)  # five views of one token; the floor is 4
check("mvam.floor", lambda views, tokens: max(views - tokens, 0))

# %% [markdown]
# <a id="lambda"></a>
#
# ## 10. How much is λ = 10? (3.4, Eq. 12 and 13)
#
# $$L_{div} = L_{div}^{v} + L_{div}^{t} \quad (12) \qquad\qquad L = L_c + \lambda\,L_{div}, \quad \lambda = 10 \quad (13)$$
#
# * $L_{div}^{v}$ and $L_{div}^{t}$, numbers, are Eq. 10 (or 11) for the images and for the captions of a batch.
# * $\lambda$, a number, is the weight of the diversity loss (`diversity_weight`).
# * $L$, a number, is what the training minimises. [`MVAM.forward`](../../src/finematch/models/mvam.py#L242) returns
#   it with its terms.

# %%
terms = model(batch)
apart = terms["diversity_image"] + terms["diversity_text"]
assert close(terms["loss"], terms["contrastive"] + 10 * apart, 1e-3)
assert "diversity_image" not in baseline(batch)  # +Attn: the library leaves Eq. 12 out ...
one_view = mvam.encode_image(**batch["image"]).attention.square().sum(2)  # ... though one view is charged, too
assert close(mvam(batch)["diversity_image"], (one_view - 1).square().mean())
show(pd.DataFrame({"value": {name: value.item() for name, value in terms.items()}}).rename_axis("term"), digits=4)

# %% [markdown]
# How large are the terms when the training starts? Then codes are random, and attention is nearly uniform, close to
# $1/n$. By hand for $m = 16$ views and $n = 197$ tokens, exactly uniform:
#
# * Eq. 10: all entries of $AA^{\top}$ are $1/197$, nearly 0. Each entry of the diagonal costs about 1:
#   15.84 per side.
# * Eq. 11: all entries of $\sqrt A\sqrt A^{\top}$ are 1. The diagonal costs nothing, the other $m(m-1) = 240$ entries
#   1 each: 240 per side.
# * $L_c$ starts near $\ln b$.

# %%
uniform = torch.full((1, 16, 197), 1 / 197)
assert close(diversity(uniform, variant="base"), 15.84, 0.01)
assert close(diversity(uniform, variant="sqrt"), 240.0, 0.1)

torch.manual_seed(p.seed)
fresh = ViewAttention(768, views=16).requires_grad_(False)(lesson.tokens(torch.randn(4, 197, 768))).attention
cost = {(v, n): float(diversity(fresh, variant=v, power=n)) for v in ("base", "sqrt") for n in (1, 2)}
assert 15 < cost["base", 2] < 15.84
assert 150 < cost["sqrt", 2] < 240

# %% [markdown]
# The picture sets $\ln b$ beside $\lambda L_{div}$, both sides together: with Eq. 10 and with Eq. 11, each with the
# squared norm and with the norm itself (reading M4). Its codes are random, so its attention is not exactly uniform. Its
# bars therefore stay below the values by hand, which are $20 \cdot 15.84 = 317$ and $20 \cdot 240 = 4800$ for $\lambda = 10$.

# %%
preset = Settings("mvam", {"scale": p.scale, "dataset": p.dataset}).as_dict()
sides = 2 * preset["diversity_weight"]  # λ times both sides
bars = {f"ln b, b = {preset['batch_size']}": math.log(preset["batch_size"])}
names = {"base": "Eq. 10", "sqrt": "Eq. 11", 1: "norm", 2: "squared norm"}
bars |= {f"λ × {names[v]}, {names[n]}": sides * value for (v, n), value in cost.items()}
lesson.draw_weight(bars)
assert 20 * cost["base", 2] > 40 * math.log(1024)  # at the paper's λ and batch
assert 11 < 20 * cost["base", 1] / math.log(1024) < 12

# %% [markdown]
# With the paper's λ, the squared norm of Eq. 10 costs more than 40 times as much as the matching loss at the start,
# and the norm itself 11 times as much. What "λ = 10" means also depends on reading M4: is the norm squared, and is it
# summed or averaged over the batch?
#
# The size of a loss says little, though, because only its gradient trains. If all views are *exactly* uniform, the
# gradient is zero: all logits of a view are pushed alike, and a softmax ignores a push that all its logits share.
# Views that are *exactly* equal are all pushed alike, so they stay equal. Random codes are neither, so the training
# can start.

# %%
for variant in ("base", "sqrt"):
    uniform = torch.zeros(1, 16, 49, requires_grad=True)
    diversity(uniform.softmax(-1), variant=variant).backward()
    assert uniform.grad.abs().max() < 1e-5  # uniform: no gradient

    equal = torch.randn(1, 1, 49).expand(1, 16, 49).clone().requires_grad_()
    diversity(equal.softmax(-1), variant=variant).backward()
    assert close(equal.grad, equal.grad[:, :1].expand(1, 16, 49))  # equal: the same gradient for each view

# %% [markdown]
# For towers that are trained from scratch on small data λ = 10 is too much: the grid
# [`mvam_lambda`](../../figures/mvam_lambda.scenes.tiny.md) ends at chance with it. All vectors become one vector before
# the contrastive loss can tell them apart. The small presets use 0.01, which was chosen on val; `reading=literal` and
# `scale=paper` take 10.

# %% [markdown]
# <a id="step"></a>
#
# ## 11. One training step, beside the code (3.1 to 3.4, 4.4)
#
# The paper has no algorithm. The left column tells its training step in our words. The middle column is the statement
# of the library that does it, and its link leads to the line. The last column has the readings at this line: places
# where the paper leaves a choice. Three names in it need a word: `asked` is what the codes are compared with (the keys,
# or their tanh), `axes` are the letters of the einsum, and `attended` marks the tokens that a view may attend to.

# %%
beside([
    ("tokens of the images (Eq. 1)", MVAM.encode_image, "self.vision(", ""),
    ("tokens of the captions (Eq. 3)", MVAM.encode_text, "self.text(", ""),
    ("project the states (4.3)", ViewAttention.forward, "keys = self.project(", "M1"),
    ("the codes are queries (Eq. 7)", ViewAttention.attend, "self.codes", "M2"),
    ("softmax over the tokens (Eq. 7)", ViewAttention.attend, "softmax(-1)", "M3"),
    ("one answer per view (Eq. 8)", ViewAttention.forward, "bvn,bnvk->bvk", "M1"),
    ("concatenate the answers (Eq. 9)", ViewAttention.forward, "answers.flatten(1)", ""),
    ("unit length, for a cosine (3.2)", MVAM.unit, "return F.normalize", "M6"),
])  # fmt: skip

# %% [markdown]
# Then come the losses, and the step of the optimiser. `gather` collects the vectors of all processes, and does nothing
# in a run with one. `plan.accumulate` is the number of batches whose gradients are added up before one step.

# %%
beside([
    ("cosines, divided by τ (3.2)", contrastive, "logits =", "M7"),
    ("a caption's own image is right, all others are wrong", contrastive, "target: Tensor =", "M11"),
    ("both directions (Eq. 5, 6)", contrastive, "total = F.cross_entropy", ""),
    ("their mean (Eq. 6)", contrastive, "total / 2", "M5"),
    ("overlaps, minus the identity (Eq. 10)", diversity, "excess =", ""),
    ("Frobenius norm (Eq. 10)", diversity, "per_item = squared", "M4"),
    ("images and captions (Eq. 12)", MVAM.forward, "total = terms", ""),
    ("the whole loss (Eq. 13)", MVAM.forward, 'terms["contrastive"] + c.', ""),
    ("gradients of all weights", training.Loop.step, "accelerator.backward", ""),
    ("one step with these gradients", training.Loop.step, "self.optimizer.step()", "M9"),
])  # fmt: skip

# %% [markdown]
# An epoch takes every pair of the training split once, but for those of an incomplete last batch. MVAM on a pretrained
# CLIP trains in two stages: first the view codes, the projection and the temperature alone, with a fixed CLIP (reading
# M8), then all weights. [`2_train`](2_train.ipynb) shows both.

# %% [markdown]
# <a id="clip"></a>
#
# ## 12. Two traps of CLIP (4.3)
#
# MVAM on CLIP attends to all tokens of a model that was trained to use only one token per side. Two details go wrong
# easily. We show both on a tiny CLIP with random weights.
#
# **First trap: the last layer norm.** CLIP applies it to the [IMG] token only. Without it the patches have another
# scale than [IMG]. The library's [`CLIPVision`](../../src/finematch/encoders.py#L320) applies it to all tokens. In
# our tiny CLIP the gain of this norm is 4, which stands for what training does to it.

# %%
clip, pixels = lesson.random_clip(p.seed), torch.randn(1, 3, 32, 32)
raw, tower = clip.vision_model(pixel_values=pixels), CLIPVision(clip)(pixels=pixels)
assert close(tower.states[:, 0], raw.pooler_output)  # for [IMG] the tower does what CLIP does
spread = {
    "[IMG], as CLIP pools it": raw.pooler_output.std(correction=0),
    "raw patches, the largest": raw.last_hidden_state[0, 1:].std(-1, correction=0).max(),
    "patches of the library's tower, the smallest": tower.states[0, 1:].std(-1, correction=0).min(),
}
show(pd.DataFrame({"standard deviation": {name: s.item() for name, s in spread.items()}}).rename_axis("state"))
own, patches, ours = spread.values()
assert own > 2 * patches
assert close(ours, own, 0.1)

# %% [markdown]
# **Second trap: what comes after the end.** A caption is padded to a fixed length. CLIP itself needs no mask for
# that: a token of its text tower sees only itself and the tokens before it, and CLIP reads only the end-of-text
# token. The positions after it have states all the same, and they are not zero. A view that attends to them hears
# noise, which depends on the length of the padding. Some tokenizers even pad *with* the end-of-text id, so that no
# padding id can be searched for. [`CLIPText`](../../src/finematch/encoders.py#L341) cuts the mask after the first
# end-of-text.

# %%
short, long = (CLIPText(clip)(**lesson.caption_ids(length)) for length in (9, 14))  # 5 tokens and padding
naive = [lesson.tokens(one.states) for one in (short, long)]  # takes every position for a word
assert short.mask.tolist() == [[True] * 5 + [False] * 4]  # end-of-text itself is kept
assert (short.states[0, 5:].abs().sum(-1) > 1).all()  # the states after it are not zero

torch.manual_seed(p.seed)
head = ViewAttention(32, views=4, total_dim=32).requires_grad_(False)
assert close(head(short).vector, head(long).vector)  # with the mask the padding changes nothing
assert not close(head(naive[0]).vector, head(naive[1]).vector, 1e-2)  # without it the vector changes
lesson.draw_padding(*(head(one).attention[0].mean(0) for one in (naive[0], short)), real=5)

# %% [markdown]
# <a id="ensemble"></a>
#
# ## 13. Is it just an ensemble? (4.6.1, Table 3)
#
# Take sixteen small models with one view of 64 numbers each, and concatenate their vectors. This also gives 1,024
# numbers. If this *ensemble* did as well, then the views would have taught us nothing. The paper prints:

# %%
control = lesson.printed(3)
show(control.rename_axis("COCO 5K"))
assert (control.loc["MVAM-FRCNN"] > control.loc["Base-FRCNN-ensemble"]).all()  # MVAM is ahead in every column

# %% [markdown]
# Each member of the ensemble gives a unit vector of its own, so the cosine of the whole
# ([`ensemble`](../../src/finematch/models/mvam.py#L264)) is the mean of the members' cosines. No member knows the
# others while it trains. Only their seeds make them differ. In MVAM one loss sees the sum, so a view can leave to
# another view what that one does better. And an ensemble needs one pair of towers for *each* member: here sixteen
# tiny members have more than four times as many weights as one tiny model with sixteen views.

# %%
torch.manual_seed(p.seed)
ours, theirs = torch.nn.functional.normalize(torch.randn(2, 16, 5, 64), dim=-1)  # 16 members, 5 pairs
joint = (ensemble(list(ours)) * ensemble(list(theirs))).sum(-1)
assert close(joint, (ours * theirs).sum(-1).mean(0))


def size(model: MVAM) -> int:
    return sum(weights.numel() for weights in model.parameters())


member, whole = lesson.tiny(p.seed, pooling="attention", total_dim=4), lesson.tiny(p.seed, views=16, total_dim=64)
assert 16 * size(member) > 4 * size(whole)

# %% [markdown]
# <a id="readings"></a>
#
# ## 14. Where the paper leaves a choice
#
# Each choice is an argument of [`MVAMConfig`](../../src/finematch/models/configs.py#L15), and a parameter of
# [`2_train`](2_train.ipynb). The column *literal* is what the paper's words say. Three numbers of the list are no
# argument of the model: **M8** is what the first stage on CLIP trains (the codes and the projection), **M9** the
# optimiser and its learning rates, and **M10** the depth of the image Transformer.
# [The list of all readings](../../docs/readings.md) has the other methods, too. The last column names three works that the
# paper cites: *Poly-encoders* (Humeau et al. 2019) score sentences with learnt codes; *SAN*, the structured
# self-attentive sentence embedding (Lin et al. 2017), and *DRSA* (Li et al. 2018) have the diversity loss.

# %%
columns = ["reading", "argument", "values", "default", "literal", "the paper"]
readings = pd.DataFrame(MVAMConfig.readings(), columns=columns).set_index("reading")
readings.loc["M7", "values"] = "{:g} to {:g}".format(*readings.loc["M7", "values"])  # a range, not a choice
show(readings)
for _, argument, values, *_ in MVAMConfig.readings():
    for value in values:
        lesson.tiny(p.seed, **{argument: value})  # the library accepts each value

# %% [markdown]
# The text of the paper that circulates has lost all thirteen formulas and every symbol in a line of text. The words
# around them remain.
#
# | equation | what the words say | what we filled in | from |
# |---|---|---|---|
# | 1, 2 | patches, [IMG] in front, ViT, pool of [IMG] | the pool's tanh and 1,024 | ViT; section 4.3 |
# | 3, 4 | [CLS] ... [SEP], BERT, pool of [CLS] | the same pool | BERT; section 4.3 |
# | 5, 6 | cosine, in-batch contrastive, "following CLIP" | τ, learnt from 0.07; the ½ | CLIP |
# | 7, 8 | learnable codes are queries of an attention | dot product, softmax over tokens | Poly-encoders |
# | 9 | concatenation, then cosine | unit length *after* concatenating | the words; a switch |
# | 10 | $A$ times its transpose, minus $I$, Frobenius norm | the square, the batch mean | SAN; a switch |
# | 11 | "square root diversity loss" | the root of each entry of $A$ | DRSA's code; section 9 above |
# | 12, 13 | image and text summed, λ = 10 | – | the words |
#
# What cannot be recovered: every learning rate, the depth of the image Transformer, and the number of views in the
# sentence of 4.4 (Table 4 shows that it is 16). In the preset `paper` below, the batch size, the epochs, the width
# `total_dim` and λ (`diversity_weight`) are the paper's. The rest is ours (M9 and M10).

# %%
presets = {name: one.presets for name, one in declared("mvam").items() if one.presets}
frame = pd.DataFrame(presets).rename_axis("preset").T.rename_axis("setting")
show(frame.map(lambda value: value if isinstance(value, str) else f"{value:g}"))
paper = frame["paper"]
assert (paper["batch_size"], paper["epochs"], paper["total_dim"]) == (1024, 20, 1024)
assert paper["diversity_weight"] == 10

# %% [markdown]
# **Exercise 8 (compute).** Section 4.5 says that MVAM gains "1.62%, 2.17%, and 0.71%" on MSCOCO-1K for ViT, FRCNN and
# CLIP. Here "%" means points of recall. Relative to which baseline, and averaged over what? Find out from Table 1,
# `tables.published("MVAM", 1)`: its `row` is, for example, "ViT +MVAM", and its `column` "MSCOCO-1K i2t@1". Then give
# the same three means for MSCOCO-5K.

# %% tags=["exercise"]
gains = ...  # {"ViT": ..., "FRCNN": ..., "CLIP": ...}
check("mvam.gains", gains)

# %% [markdown] tags=["solution"] jupyter={"source_hidden": true}
# Over +Attn, averaged over the six recall columns. On MSCOCO-1K this gives the paper's three numbers to 0.01. So
# "average score" hides that the gain at rank 1 is far larger than at rank 10. On MSCOCO-5K, where there are five times
# as many images to confuse, all three gains are larger.

# %% tags=["solution"] jupyter={"source_hidden": true}
first = tables.published("MVAM", 1).pivot(index="row", columns="column", values="value")
gain = {name: first.loc[f"{name} +MVAM"] - first.loc[f"{name} +Attn"] for name in ("ViT", "FRCNN", "CLIP")}
table = pd.DataFrame(gain)
means = pd.DataFrame({size: table[table.index.str.startswith(size)].mean() for size in ("MSCOCO-1K", "MSCOCO-5K")})
show(means.rename_axis("+MVAM over +Attn"))
assert close(means["MSCOCO-1K"].to_numpy(), [1.62, 2.17, 0.71], 0.01)
assert all(of["MSCOCO-1K i2t@1"] > of["MSCOCO-1K i2t@10"] for of in gain.values())
assert (means["MSCOCO-5K"] > means["MSCOCO-1K"]).all()
check("mvam.gains", means["MSCOCO-5K"].to_dict())

# %% [markdown]
# <a id="results"></a>
#
# ## 15. What came out
#
# The paper makes four claims about its tables:
#
# 1. MVAM beats attention pooling and [CLS] pooling (Tables 1 and 2).
# 2. It is better than an ensemble (Table 3).
# 3. More views are better, up to 16; with 32 the accuracy declines (Table 4).
# 4. The diversity loss helps, and the base variant is the best (Table 5).
#
# Here the models are small and the data are the embedded set, not COCO. So compare the sign of a difference and the
# order of the rows, not the size. The metric is [rsum](../../docs/glossary.md), the sum of six recalls. *holds*: the
# whole 95 % interval of the difference lies above zero. *contradicted*: it lies below zero. *undecided*: zero lies
# inside it. *not run*: the rows have no runs, so the list says nothing about this claim. The two
# [readings](../../docs/glossary.md) of MVAM differ in one number of these rows, the weight of the diversity loss: the
# paper's 10 is *literal*, our 0.01 is *default*. Rows without that loss are the same runs in both columns.

# %%
came_out("mvam")

# %%
came = lesson.verdicts("mvam_views", "mvam_backbones", "mvam_diversity")
came = came[came["reading"] != "literal"]  # the default, and what is one under both
lesson.draw_verdicts(came[came["claim"].str.contains("views")])

# %% [markdown]
# How to read the list:
#
# * "+MVAM beats +Attn" and "+MVAM beats +[CLS]" are the heart of the paper, once for each encoder. A verdict about
#   regions says nothing about grid cells (ViT) or about CLIP: each needs runs of its own.
# * The row "1 view" trains +Attn, so without the diversity loss ([section 6](#attn)). So "regions (FRCNN): +MVAM beats
#   +Attn" and "16 views beat 1" are the same runs. They are one piece of evidence, not two.
# * "More views are better, up to 16" needs three verdicts: 8 over 1, 16 over 8, and 16 over 32. Where one of them is
#   undecided, the runs do not say where the best number of views lies.
# * For the base diversity loss the paper's own differences are small, too: its best variant depends on the column of
#   Table 5.
# * The square root variant has the same λ as the base variant here, and its cost at the start is far larger
#   ([section 10](#lambda)). So if it does worse than no diversity loss, the reason may be λ and not Eq. 11.
# * Table 3 is not in the list: [RESULTS.md](../../RESULTS.md) has the line that runs it.

# %%
of = came.set_index("claim")
if len(of):  # the folder `figures` is here
    for column in ("difference", "lower", "upper"):  # the same runs
        assert of.loc["regions (FRCNN): +MVAM beats +Attn", column] == of.loc["16 views beat 1", column]
    assert {"8 views beat 1", "16 views beat 8", "16 views beat 32"} <= set(of.index)
assert cost["sqrt", 2] > 5 * cost["base", 2]  # of section 10: the same λ weighs more on Eq. 11
best = set(lesson.printed(5).idxmax())  # of each column of the paper's Table 5
assert best == {"base diversity loss", "square root diversity loss"}

# %% [markdown]
# [RESULTS.md](../../RESULTS.md) has all tables and metrics. [The findings](../../docs/findings.md) say what we think
# of them. [`3_ablations`](3_ablations.ipynb) draws each table beside the paper's.

# %% [markdown]
# <a id="own"></a>
#
# ## 16. Your own image and sentence
#
# Give a file or an image, and a sentence. The newest trained run gives its score, and shows where the views look. Try
# another colour in the sentence: does the score fall? [`2_train`](2_train.ipynb) makes a run. [6_explore](../6_explore.ipynb)
# has sliders for all of it.

# %%
look("mvam", rivals.images[0].image, rivals.caption)

# %% [markdown] tags=["solution"] jupyter={"source_hidden": true}
# ## Ten questions
#
# 1. *What is the shape of the attention of a batch of images, and over which axis does it sum to 1?* "b m n"; over
#    the tokens `n`.
# 2. *A model has 16 views and `total_dim=1024`, with `projection="split"`. How wide is a view code? And with 32
#    views?* 64 numbers; 32 numbers. The final vector has 1,024 numbers in both cases.
# 3. *What does "+Attn" lack, compared with MVAM?* More than one view, and in the library the diversity
#    loss. MVAM with one view gives the same vectors.
# 4. *What would break if the softmax of Eq. 7 ran over the views?* The weights of one view would not sum to 1. Its
#    answer would be no mean of tokens, and its length would depend on the number of tokens.
# 5. *What would break without the mask?* Views would attend to padding. The vector of a caption would depend on how
#    far it was padded, that is, on the other captions of its batch.
# 6. *Why does the score change if only the views of the image are permuted?* The score reads only products of views
#    with the same number.
# 7. *What does `normalise="per_view"` change?* Every view has the same weight $1/m$ in the score. Without it a view
#    with long answers counts more.
# 8. *Which views satisfy Eq. 11 but not Eq. 10?* Views that do not overlap, but are spread over more than one token.
# 9. *A batch has 1,024 pairs and the contrastive loss is 6.93. What has the model learnt?* Nothing that lowers
#    this loss: it is no better than equal scores, $\ln 1024 = 6.93$. This does not say that the ranking is wrong: with
#    $1/\tau$ close to 0 every ranking costs as much.
# 10. *Can Eq. 10 be 0 for 16 views of a caption of ten tokens?* No. The rank of $AA^{\top}$ is at most 10, so Eq. 10 is
#     at least 6. Attention cannot even reach 6.

# %% [markdown]
# ## What to take along
#
# * A view is a learnt question. Its answer is a weighted mean of tokens, and a representation is the list of answers.
# * The length of a code is its temperature, so Eq. 7 lacks none: each view learns how sharp it is.
# * One view is attention pooling. What is new is *many* views and *different* views.
# * The score is a sum over views. So view $u$ of an image is compared only with view $u$ of a caption. That the two
#   look for the same thing is built in. *What* they look for is a finding.
# * Eq. 10 wants views sharp and apart. Eq. 11 wants them apart.
# * λ says nothing until you know whether the norm is squared.
#
# Previous: [The data](../1_data.ipynb) · Next: [One training run](2_train.ipynb)
