# %% [markdown]
# # Start here
#
# **finematch** is a workbook on *fine-grained image-text matching*: given a caption, find its image among many,
# and the reverse, where the images differ in details. It reproduces and teaches four methods, each from its
# paper: MVAM, HSLM, FELGA and SLAN.
#
# This page is the map of the workbook, and shows the idea on one small example: it shows the embedded set of
# images, says what is hard about it, trains a very small MVAM and draws where it attends.
#
# **Cost** a minute on one core; it needs nothing but the embedded set, which the project draws itself.
# **Expected** the small model finds the right one of 500 images for about 25 % of the captions; chance is 0.2 %.
# Full models and their numbers come later; this is the idea, not a result.

# %% tags=["parameters"]
dataset: str = "scenes"  # the embedded set is the only one here
data_root: str = "data"  # folder above the dataset's own; the set is drawn there if absent
scale: str = "tiny"  # there is no other here
seed: int = 0  # of the small model's start and the order of its pairs
out: str = "papermill_runs/start_here"  # the small model's folder
smoke: bool = False  # run everything in seconds
cache: str = "data/cache"  # a smoke run draws its few pictures here
pictures: int = 2000  # training pictures of the small model
epochs: int = 3  # and how often it sees them
views: int = 4  # of the small model

# %% jupyter={"source_hidden": true}
from finematch.config import parameters, root

p = parameters(
    globals(), dataset={"scenes"}, scale={"tiny"}, seed=(0, 2**31), pictures=(100, 4000), epochs=(1, 50),
    views=(1, 64),
)  # fmt: skip

# %% [markdown]
# ## The map
#
# A page runs by itself. Where it needs what another page makes, it makes that first, or says which page to run.
# *Run* is the time that the page takes on two cores: measured while `make workbook` ran the pages, two at a time
# (`benchmarks/workbook.json`); with `*`, where it runs as a smoke run there: what its first cell says. Reading takes
# longer: a lesson with its exercises fills an afternoon.
#
# | page | aim | read or run before | run |
# |:--|:--|:--|:--|
# | [0_start_here](0_start_here.ipynb) | the idea on one example, and this map | nothing | 1 min |
# | [1_data](1_data.ipynb) | the data sets, the record, where region features come from | this page | 6 min |
# | [mvam/1_lesson](mvam/1_lesson.ipynb) | several views instead of one vector | this page | 1 min |
# | [mvam/2_train](mvam/2_train.ipynb) | train MVAM: one row of the paper's tables | its lesson | 2 min |
# | [mvam/3_ablations](mvam/3_ablations.ipynb) | the paper's tables beside ours, each claim judged | its lesson | 1 min |
# | [mvam/4_attention](mvam/4_attention.ipynb) | where the views of a trained run attend | a run of `mvam/2_train` | 1 min |
# | [hslm/1_lesson](hslm/1_lesson.ipynb) | graph, self-attention, cross attention, two alignments | this page | 1 min |
# | [hslm/2_train](hslm/2_train.ipynb) | train HSLM | its lesson | 5 min |
# | [hslm/3_ablations](hslm/3_ablations.ipynb) | HSLM's tables beside ours | its lesson | 1 min |
# | [hslm/4_attention](hslm/4_attention.ipynb) | which regions the words of a trained run find | a run of `hslm/2_train` | 1 min |
# | [felga/0_vlp](felga/0_vlp.ipynb) | a small CLIP, the frozen model that FELGA starts from | this page | 3 min |
# | [felga/1_lesson](felga/1_lesson.ipynb) | pseudo-labels for regions and keywords | this page | 1 min |
# | [felga/2_train](felga/2_train.ipynb) | train FELGA | its lesson | 7 min |
# | [felga/3_ablations](felga/3_ablations.ipynb) | FELGA's tables beside ours | its lesson | 1 min |
# | [felga/4_retrieval](felga/4_retrieval.ipynb) | what a word finds, and what a box is told | a run of `felga/2_train` | 1 min |
# | [slan/1_lesson](slan/1_lesson.ipynb) | boxes that move to what the words name | this page | 1 min |
# | [slan/2_train](slan/2_train.ipynb) | train SLAN, for retrieval | its lesson | 12 min |
# | [slan/3_ablations](slan/3_ablations.ipynb) | SLAN's tables beside ours | its lesson | 1 min |
# | [slan/4_regions](slan/4_regions.ipynb) | the boxes of a trained run, level by level | a run of `slan/2_train` | 5 min |
# | [slan/5_captioning](slan/5_captioning.ipynb) | write captions, with the region behind each word | a run of `slan/2_train` | minutes * |
# | [slan/6_localization](slan/6_localization.ipynb) | find objects and phrases | a run of `slan/2_train` | 5 min * |
# | [slan/7_vqa](slan/7_vqa.ipynb) | answer questions about an image | a run of `slan/2_train` | 5 to 17 min * |
# | [slan/8_nlvr2](slan/8_nlvr2.ipynb) | judge a sentence about two images | a run of `slan/2_train` | 8 to 11 min * |
# | [slan/9_video](slan/9_video.ipynb) | find the video of a sentence | a run of `slan/2_train` | 1 min * |
# | [6_explore](6_explore.ipynb) | your own image and sentence, live | a lesson | 1 min |
# | [arena/2_train](arena/2_train.ipynb) | train a method or a rival for the same minutes as all others | the lessons of MVAM and HSLM | 6 min |
# | [7_compare](7_compare.ipynb) | the methods and their rivals at equal minutes | `arena/2_train` | 1 min |
# | [8_readings](8_readings.ipynb) | what each reading of a paper changes | nothing | 1 min |
# | [9_scorecard](9_scorecard.ipynb) | every table and every claim of all methods | nothing | 1 min |
#
# Pages to read: [the glossary](../docs/glossary.md), [what the papers do not say](../docs/readings.md),
# [what came out](../docs/findings.md), [how to add your own data, method or table](../docs/adding.md), and the tables
# in [RESULTS](../RESULTS.md).

# %% [markdown]
# ## Three ways through
#
# These are plans, not yet tried with a class.
#
# **One lecture of 90 minutes.** `make slides` turns the lessons into slides that need no network.
#
# 1. This page, up to the small MVAM: what is hard about details (20 minutes).
# 2. [mvam/1_lesson](mvam/1_lesson.ipynb): from one vector to views, and the diversity loss (40 minutes).
# 3. [mvam/4_attention](mvam/4_attention.ipynb): what the views of a trained model look at (15 minutes; train before the lecture).
# 4. [What came out](../docs/findings.md#mvam): which claims hold here, and how a claim is judged (15 minutes).
#
# **A lab course of four afternoons.** `make handout` packs the lessons without solutions, `make teacher` runs those with
# solutions. Start the training in the break: the page that looks at the trained run comes after it.
#
# 1. MVAM: this page, [1_data](1_data.ipynb), [the lesson](mvam/1_lesson.ipynb) with its exercises,
#    [training](mvam/2_train.ipynb), [attention](mvam/4_attention.ipynb).
# 2. HSLM: [the lesson](hslm/1_lesson.ipynb), [training](hslm/2_train.ipynb), [attention](hslm/4_attention.ipynb).
# 3. FELGA: [the small CLIP](felga/0_vlp.ipynb), [the lesson](felga/1_lesson.ipynb), [training](felga/2_train.ipynb),
#    [retrieval](felga/4_retrieval.ipynb).
# 4. SLAN: [the lesson](slan/1_lesson.ipynb), [training](slan/2_train.ipynb), [regions](slan/4_regions.ipynb). To end with:
#    each group [adds a small table](../docs/adding_a_table.md) with a question of its own and judges it.
#
# **A research start.**
#
# 1. [What came out](../docs/findings.md) and [what the papers do not say](../docs/readings.md): which questions are open.
# 2. The lesson of the method that you build on, then its `3_ablations`: `make grid GRID=mvam_views` runs a table again,
#    with `READING=literal` as the paper's text has it. `make rehearse` says beforehand what a grid costs.
# 3. [1_data](1_data.ipynb) and [the data page](../docs/data.md), or [your own data set](../docs/adding_a_dataset.md).
# 4. [Your own table](../docs/adding_a_table.md), then [your own method](../docs/adding_a_method.md).
# 5. [The paper's scale](../docs/paper_scale.md): several GPUs, clusters, what it costs.

# %% [markdown]
# ## Images that differ in details
#
# `scenes` has 4,000 training, 500 validation and 500 test images. Each shows two to five shapes with a
# colour, a size and a texture, on one of six backgrounds, and has five captions. A caption tells a part of
# the image, in words of its own: "crimson" for red, "hoop" for ring.

# %%
import textwrap
import time

started = time.monotonic()
import numpy as np
import torch
from IPython.display import Markdown, display
from matplotlib import pyplot as plt

from finematch import figures as draw
from finematch.data import Regions, load
from finematch.data.pairs import RegionSource
from finematch.data.record import Record, pairs
from finematch.scenes.generator import TOKENIZER, attributes, generate
from finematch.scenes.baselines import bag_of_words, difficulty, table
from finematch.scenes.language import solutions
from finematch.encoders import GRUTower, TokenTransformer
from finematch.evaluation.correspondence import pieces
from finematch.evaluation.retrieval import retrieval
from finematch.models.configs import MVAMConfig
from finematch.models.mvam import MVAM
from finematch.runs import write_metrics
from finematch.text import tokenise, word_level
from finematch.training import Plan, fit, seed_everything
from finematch.data.splits import SMOKE, Split
from finematch.evaluation.embedding import embed

draw.style()
data_root = root() / p.data_root
if p.smoke:
    data_root = root() / p.cache / "smoke"
    generate(data_root / "scenes", **SMOKE)
test = load("scenes_entities", data_root, "test")

figure, axes = plt.subplots(1, 4, figsize=(9.6, 3.7))
for record, ax in zip(test, axes, strict=False):
    draw.show_picture(ax, record.open())
    lines = [textwrap.fill(caption, 34) for caption in record.captions[:3]]
    ax.text(0, -0.05, "\n\n".join(lines), va="top", fontsize=7.5, transform=ax.transAxes)
figure.subplots_adjust(wspace=0.08, left=0.01, right=0.99, top=0.99, bottom=0.36)

# %% [markdown]
# ## One image is one record
#
# Every dataset, embedded or real, is read from the files that the field publishes into the same record: the
# image, its captions, and where they are known, boxes and the phrases that name them. A matcher is trained on
# images and captions; boxes and phrases are for looking, and for testing. (On scenes the frozen network that makes the
# regions of MVAM and HSLM, and SLAN's detector, have learned from boxes.)

# %%
record = test[0]
named = {phrase.boxes[0]: record.captions[phrase.caption][phrase.start : phrase.end]
         for phrase in reversed(record.phrases) if len(phrase.boxes) == 1}  # fmt: skip
figure, ax = plt.subplots(figsize=(3.2, 3.2))
draw.show_boxes(ax, record.open(), list(named), labels=list(named.values()))
for number, caption in enumerate(record.captions):
    print(number, caption)
    for phrase in (one for one in record.phrases if one.caption == number):
        assert 0 <= phrase.start < phrase.end <= len(caption)
        print(f"    {caption[phrase.start : phrase.end]!r:34} {len(phrase.boxes)} box(es)")

# %% [markdown]
# ## What "fine-grained" means, in numbers
#
# A matcher scores every caption with every image. *R@K* is the share of queries whose right answer is among
# the K best; ties count against the model (in brackets: on average over random orders of what is tied). Three
# scorers that learn nothing tell how hard the set is:
#
# * **chance** gives everything the same score;
# * **bag of words** is told the true labels of every image and counts which of them the caption names. It
#   knows that there is something red and a star. It does not know whether the star is red;
# * **full** understands every word. Even it is not perfect: a caption that tells a part can be true of
#   several images. No method can do better.

# %%
hard = difficulty(data_root / "scenes", "test")
display(Markdown(table(hard)))
chance, counting, full = (hard[one]["t2i R@1 expected"] for one in ("chance", "bag of words", "full"))
assert chance < counting < full < 100

# %% [markdown]
# What the bag of words misses is *binding*: which colour belongs to which shape, which one is left of which.
# Below is a caption whose every word fits a few other images too, of which it is not true: the first in the
# test split with one to four of them. A solid frame with a tick is the caption's own image, a dashed one
# with a cross is another.

# %%
truths = attributes(data_root / "scenes", "test")
meanings = [meaning for truth in truths for meaning in truth["captions"]]
captions = [meaning["text"] for meaning in meanings]
image_of = np.repeat(np.arange(len(truths)), [len(truth["captions"]) for truth in truths])
counted = bag_of_words(truths, captions)
for c, own in enumerate(image_of.tolist()):
    rivals = [i for i in np.flatnonzero(counted[:, c] >= counted[own, c]) if i != own]
    if 1 <= len(rivals) <= 4 and not any(solutions(truths[i], meanings[c]) for i in rivals):
        break
assert 1 <= len(rivals) <= 4

figure, axes = plt.subplots(1, 7, figsize=(10.4, 1.8), width_ratios=[1.8] + [1] * 6)
draw.retrieval_strip(axes, captions[c], lambda i: test[i].open(), counted[:, c], int(image_of[c]))
axes[0].set_title(f"caption {c}, scored by counting words", fontsize=7.5)
figure.subplots_adjust(wspace=0.12, left=0.01, right=0.99, top=0.9, bottom=0.12)

# %% [markdown]
# ## A very small MVAM
#
# Most matchers squeeze an image into *one* vector and a caption into another, and compare the two. MVAM uses
# several *views*: each is a learnt code, a query that gives every part of the image, or every word, a
# weight. The weighted sums of all views, concatenated, are the vector.
#
# The real thing (`mvam/2_train`) works on regions that it proposes itself, with features of a trained
# network. This one must be ready within a minute. So it gets a gift that no other notebook gives: the *true
# boxes* of the shapes, besides the whole image, each shrunk to 8 x 8 pixels. The captions go through a
# small recurrent network. Boxes carry no names; what "star" looks like it has to learn from the pairs.


# %%
def crops(records: list[Record], split: str, size: int = 8, regions: int = 6) -> Regions:
    """The true boxes of each picture, filled up with the whole picture, each shrunk to `size` x `size`."""
    boxes = np.zeros((len(records), regions, 4), np.float32)
    features = np.zeros((len(records), regions, size * size * 3), np.float32)
    for i, record in enumerate(records):
        picture = record.open()
        found = [thing.box for thing in record.objects][: regions - 1]
        boxes[i] = found + [(0, 0, *picture.size)] * (regions - len(found))
        for j, box in enumerate(boxes[i]):
            features[i, j] = (
                np.asarray(picture.resize((size, size), box=tuple(box)), np.float32).ravel() / 255
            )
    texts = pairs(records)
    sizes = np.array([record.size for record in records])
    ids = [record.image_id for record in records]
    number = np.array([i for i, _ in texts])
    return Regions(split, features, [text for _, text in texts], number, ids, boxes, sizes, {})


tokenizer = word_level(TOKENIZER)
splits = {}
for part in ("train", "test"):
    records = load("scenes_coco", data_root, part)[: p.pictures]
    made = crops(records, part)
    splits[part] = Split(records, RegionSource(made), tokenise(made.captions, tokenizer))
split = splits["test"]
assert split.captions == captions

seed_everything(p.seed)
eye = TokenTransformer(splits["train"].images.width, width=64, depth=1, boxes=True)
model = MVAM(eye, GRUTower(len(tokenizer), embed=64, width=64),
             MVAMConfig(views=p.views, total_dim=64 * p.views, diversity_weight=0.01))  # fmt: skip
folder = f"{len(splits['train'].records)}pictures.{p.epochs}epochs.{p.views}views.s{p.seed}"
plan = Plan(epochs=1 if p.smoke else p.epochs, batch_size=32 if p.smoke else 128, lr=2e-3, weight_decay=0.02,
            warmup=0.1, clip_norm=1.0, seed=p.seed)  # fmt: skip
print(
    f"{sum(q.numel() for q in model.parameters()) / 1e3:.0f} thousand parameters, {p.views} views of width 64"
)
summary = fit(model, splits["train"].pairs(), plan, root() / p.out / folder)

# %%
found = retrieval(*embed(model, split), split.image_of, split="scenes test")
chance = 100 / len(split.records)
print(f"the right picture first: {found['t2i_r1']:.1f} % of the captions (chance {chance:.1f} %)")
print(f"the right picture among the first five: {found['t2i_r5']:.1f} % (chance {5 * chance:.1f} %)")
if not p.smoke:
    assert found["t2i_r1"] > 10 * chance

# %% [markdown]
# ## One image, five captions, four views
#
# Above, what each view attends to in the first test image. Bright: high weight; grey: zero. Below, what the
# *same* view attends to in each of its five captions. Dark: high weight. On the left, the rank that the
# image has among all test images for that caption. [CLS] and [SEP] open and close every caption, [IMG] is
# a token for the image as a whole; a view may rest on them too.
#
# The maps do not depend on the caption. That is what a *two-stream* model is: images and captions meet only
# in the last step, a dot product, so that a million images can be stored as vectors before a query arrives.

# %%
with torch.no_grad():
    on_image = model.encode_image(**split.images.batch([0])).attention[0]
    own = np.flatnonzero(split.image_of == 0)
    batch = split.texts.batch(own)
    on_text = model.encode_text(**batch).attention
    image, text = embed(model, split)
assert torch.allclose(on_image.sum(1), torch.ones(p.views), atol=1e-5)  # a view's weights sum to one
assert not (on_text * ~batch["mask"][:, None]).any()  # nothing is spent on padding
scores = (text @ image.T).numpy()
rank = (scores[own] >= scores[own, 0][:, None]).sum(1)

shown = min(p.views, 4)
picture = split.records[0].open()
figure = plt.figure(figsize=(1.2 + 2.2 * shown, 5.7))
grid = figure.add_gridspec(
    1 + len(own), 1 + shown, width_ratios=[0.55] + [1] * shown, height_ratios=[3.4] + [1] * len(own),
    wspace=0.08, hspace=0.12, left=0.01, right=0.99, top=0.96, bottom=0.01,
)  # fmt: skip
draw.show_picture(figure.add_subplot(grid[0, 0]), picture)
for k in range(shown):
    ax = figure.add_subplot(grid[0, k + 1])
    draw.show_attention(ax, picture, split.images.regions.boxes[0], on_image[k, 1:].numpy())
    ax.set_title(f"view {k + 1}" + (f", {on_image[k, 0]:.0%} on [IMG]" if on_image[k, 0] >= 0.005 else ""))
for row, c in enumerate(own):
    cut = pieces(split.captions[c], tokenizer)
    ax = figure.add_subplot(grid[row + 1, 0])
    ax.set_axis_off()
    ax.text(0, 1, f"caption {row}\nrank {rank[row]} of {len(split.records)}", va="top", fontsize=8)
    for k in range(shown):
        weights = on_text[row, k, : len(cut.words)].numpy()
        draw.show_words(figure.add_subplot(grid[row + 1, k + 1]), cut.words, weights, size=7.5)

# %% [markdown]
# Do the views of the image and those of the captions look at the same things? Follow one view down its
# column and judge for yourself: does it look for a colour, a shape, a size? The paper says that they match.
# One image cannot tell; `mvam/4_attention` counts.

# %%
metrics = {"t2i_r1": found["t2i_r1"], "t2i_r5": found["t2i_r5"], "i2t_r1": found["i2t_r1"],
           "protocol": found["protocol"] + "; a toy that is given the true boxes"}  # fmt: skip
write_metrics(root() / p.out, p.as_dict(), metrics, seconds=time.monotonic() - started)
print(f"This page took {time.monotonic() - started:.0f} seconds.")

# %% [markdown]
# Next: [1_data](1_data.ipynb)
