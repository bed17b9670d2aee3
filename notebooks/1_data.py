# %% [markdown]
# # The data: sets, records, features
#
# **A tour** of what every method of this workbook is fed with: the sets and how hard the embedded one is,
# one record out of four published formats, what bad input does, tokenisers, region proposals, and the frozen
# features that training reads. It ends by *making* those features.
#
# **Serves** every table of every paper: `2_train` finds in the cache what is made here, and makes it itself
# where this page was not run.
#
# | run | cost on one core |
# |---|---|
# | `smoke` | seconds after the imports; a few dozen pictures |
# | scenes | 3 to 7 minutes the first time, most of it for the backbone and the proposals; under a minute after that |
# | flickr8k | 2 minutes for cells, 3 for regions on the grid; selective search takes an hour |
#
# **Expected** on scenes: a bag of words finds the right picture for one caption in five, the full truth for
# about three in four; selective search covers nearly nine objects in ten with 20 boxes, a regular grid
# little more than a third. The numbers below are measured when the page runs.
#
# Real photos are shown here and never saved: only pictures that this project drew itself go into `figures/`.

# %% tags=["parameters"]
dataset: str = "scenes"  # scenes, flickr8k, flickr30k, coco_karpathy
data_root: str = "data"  # folder above the dataset's own
scale: str = "tiny"  # whose backbone makes the features: tiny or paper
seed: int = 0  # of the pictures that are picked out
out: str = "papermill_runs/data"  # nothing is written there: features go to the cache, figures to figures/
smoke: bool = False  # run everything in seconds
cache: str = "data/cache"  # backbones and features that runs share
proposals: str = "auto"  # auto, selective_search or grid; auto takes the grid for many photos
kinds: str = "grid,regions"  # which features are made: grid, regions or both
regions: int = None  # proposals a picture; unset: what MVAM's runs take at this scale

# %% jupyter={"source_hidden": true}
from finematch.config import Settings, parameters, root

p = parameters(
    globals(),
    scale={"tiny", "paper"},
    seed=(0, 2**31),
    proposals={"auto", "selective_search", "grid"},
    kinds={"grid", "regions", "grid,regions"},
    regions=(1, 1000, None),
)

# %%
import json
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
from IPython.display import Markdown, display

from finematch import figures
from finematch.boxes import iou
from finematch.data import DataError, Record, dataset_help, load, load_karpathy, load_regions
from finematch.data.record import check_box
from finematch.scenes.generator import TOKENIZER, attributes, generate
from finematch.scenes.baselines import difficulty, table
from finematch.features.proposals import propose
from finematch.tables import to_markdown
from finematch.text import tokenise, word_level, wordpiece
from finematch.data.pairs import RegionSource
from finematch.data.splits import SMOKE, open_records
from finematch.features import inputs

figures.style()
rng = np.random.default_rng(p.seed)
embedded = p.dataset.startswith("scenes")  # drawn by this project: its whole truth is known
data_root, cache = root() / p.data_root, root() / p.cache
if embedded and p.smoke:
    data_root = cache / "smoke"
    generate(data_root / "scenes", **SMOKE)


def show(frame: pd.DataFrame, digits: int = 2) -> None:
    display(Markdown(to_markdown(frame.reset_index(), digits=digits)))


def keep(figure: plt.Figure, name: str) -> None:
    """Save a figure of drawn pictures; photos are only shown."""
    if embedded:
        figures.save(figure, root() / "figures" / f"{name}{'.smoke' if p.smoke else ''}.svg")


# %% [markdown]
# ## 1. What there is
#
# A *record* is one picture with its captions, and where the source has them, its boxes and phrases. A split
# is a list of records. Retrieval papers report on the splits of Karpathy and Fei-Fei. A set without a test
# split here is reported on val, and says so.

# %%
records = open_records(p.dataset, data_root, smoke=p.smoke)
words = {name: [len(c.split()) for r in split for c in r.captions] for name, split in records.items()}
show(
    pd.DataFrame(
        {
            "pictures": {name: len(split) for name, split in records.items()},
            "captions": {name: len(lengths) for name, lengths in words.items()},
            "words a caption": {name: float(np.mean(lengths)) for name, lengths in words.items()},
            "longest": {name: max(lengths) for name, lengths in words.items()},
        }
    ).rename_axis("split")
)
print("This set is read from:\n" + dataset_help(p.dataset))

# %% [markdown]
# ## 2. Look at it
#
# Before anything is trained on a set, look at it. Boxes carry numbers; the phrases of the captions that name
# a box carry the same number and colour. A phrase that names the scene has no box and stands in grey.


# %%
def boxed_records() -> list[Record]:
    """Val with boxes and phrases, from wherever this set has them; without any, val as it is."""
    if not embedded:
        try:
            return load(f"{p.dataset}_entities", data_root, "val")
        except DataError as error:
            print(f"No boxes for these pictures: {error.problem}.")
            return records["val"]
    objects = load("scenes_coco", data_root, "val")
    phrases = load("scenes_entities", data_root, "val")
    return [replace(a, objects=b.objects) for a, b in zip(phrases, objects, strict=True)]


def boxes_of(record: Record) -> list[tuple]:
    """All boxes of a record once: its objects', or else its phrases'."""
    found = [o.box for o in record.objects] or [box for phrase in record.phrases for box in phrase.boxes]
    return list(dict.fromkeys(found))


def draw_captions(ax: plt.Axes, record: Record, longest: int = 98, size: float = 6.5) -> None:
    """Captions in a fixed-width font, phrases coloured and numbered like the boxes that they name."""
    ax.set_axis_off()
    boxes, advance = boxes_of(record), 0.602 * size  # of one letter, in points
    for line, caption in enumerate(record.captions[:5]):
        shown = caption if len(caption) <= longest else caption[: longest - 1] + "…"
        pieces, done = [], 0  # text, colour, number
        for phrase in sorted((q for q in record.phrases if q.caption == line), key=lambda q: q.start):
            named = [boxes.index(box) for box in phrase.boxes]
            hue = figures.PALETTE[named[0] % len(figures.PALETTE)] if named else figures.FAINT
            pieces.append((shown[done : phrase.start], figures.INK, ""))
            pieces.append((shown[phrase.start : phrase.end], hue, ",".join(str(k + 1) for k in named)))
            done = phrase.end
        x, y = 0.0, -2.1 * size * line
        for text, hue, number in [*pieces, (shown[done:], figures.INK, "")]:
            common = {"textcoords": "offset points", "xycoords": "axes fraction", "color": hue, "va": "top"}
            common |= {"fontfamily": "DejaVu Sans Mono", "annotation_clip": False}
            weight = "bold" if number else "normal"
            ax.annotate(text, (0, 1), xytext=(x, y), fontsize=size, weight=weight, **common)
            x += advance * len(text)
            if number and text:
                ax.annotate(number, (0, 1), xytext=(x, y + 1.5), fontsize=0.7 * size, **common)
                x += 0.75 * advance * len(number)


boxed = boxed_records()
candidates = [i for i, r in enumerate(boxed) if boxes_of(r)] or range(len(boxed))
chosen = sorted(rng.choice(candidates, 4, replace=False).tolist())
fig = plt.figure(figsize=(7, 4 * 1.22))
for row, i in enumerate(chosen):
    ax = fig.add_axes([0, 1 - (row + 0.94) / 4, 1.05 / 7, 0.84 / 4])
    boxes = boxes_of(boxed[i])
    if boxes:
        figures.show_boxes(ax, boxed[i].open(), boxes, labels=[str(k + 1) for k in range(len(boxes))])
    else:
        figures.show_picture(ax, boxed[i].open())
    draw_captions(fig.add_axes([1.25 / 7, 1 - (row + 0.94) / 4, 5.7 / 7, 0.84 / 4]), boxed[i])
keep(fig, "data_contact_sheet")
plt.show()

# %% [markdown]
# ## 3. How hard it is
#
# A set that everything solves teaches nothing, and so does one that nothing solves. For the embedded set we
# know the whole truth, so we can ask how far *perfect perception* would go, with three ways to use it:
#
# * **chance**: every score equal;
# * **bag of words**: every label of the picture is known and every paraphrase resolved, but words are only
#   counted. Nothing says what belongs to what, or what is left of what;
# * **full**: a caption is understood completely and checked against the picture. Captions mention only a
#   part, so several pictures satisfy one caption. This is the ceiling of any method.
#
# Percent; ties count against the score, and in brackets the expectation if ties are broken at random.

# %%
if embedded:
    found = difficulty(data_root / "scenes", "test")
    display(Markdown(table(found)))
    for column in ("t2i R@1 expected", "i2t R@1 expected"):
        assert found["chance"][column] < found["bag of words"][column] <= found["full"][column]
else:
    print("Only the embedded set has a truth to ask. A set of photos is judged by what others reach on it.")

# %% [markdown]
# Between the bag of words and the ceiling lies what this workbook is about: binding, relations, details. A
# matcher that is trained must *see* first, so it may well end below the bag of words with its perfect sight.
#
# ## 4. One record out of every format
#
# Every format below is read as it is published; the embedded set is written in all of them, so a mistake in
# a loader shows as a difference.
#
# | format | used by | captions | boxes | phrases |
# |---|---|---|---|---|
# | Karpathy JSON | Flickr8k, Flickr30k, COCO retrieval | yes | – | – |
# | COCO JSON | COCO | yes | with categories | – |
# | Entities XML | Flickr30k Entities | yes | by entity | linked to boxes |
# | SCAN `_precomp` | region features of Flickr30k and COCO | yes | ours only | – |

# %%
names = {"Karpathy JSON": p.dataset, "COCO JSON": f"{p.dataset}_coco" if embedded else "coco",
         "Entities XML": f"{p.dataset}_entities"}  # fmt: skip
formats = {}
for label, name in names.items():
    try:
        formats[label] = load(name, data_root, "val")
    except DataError as error:
        print(f"{label}: not here ({error.problem})")


def outline(record: Record) -> dict[str, str]:
    """What a record holds, shortly."""
    first = record.phrases[0] if record.phrases else None
    named = f", first “{record.captions[first.caption][first.start : first.end]}”" if first else ""
    return {
        "id": record.image_id,
        "first caption": record.captions[0],
        "size": "–" if record.size is None else f"{record.size[0]} x {record.size[1]}",
        "objects": ", ".join(o.category for o in record.objects) or "–",
        "phrases": f"{len(record.phrases)}{named}" if first else "–",
    }


show(pd.DataFrame({label: outline(split[0]) for label, split in formats.items()}).T.rename_axis("format"))

if embedded:
    reference, *others = formats.values()
    assert len(others) == 2
    for other in others:
        assert [r.captions for r in other] == [r.captions for r in reference]
        assert [r.image for r in other] == [r.image for r in reference]
    for with_boxes, with_phrases in zip(formats["COCO JSON"], formats["Entities XML"], strict=True):
        assert {b for phrase in with_phrases.phrases for b in phrase.boxes} <= {
            o.box for o in with_boxes.objects
        }
    print(f"{len(reference)} pictures: the three formats agree on every caption, every file and every box.")

# %% [markdown]
# ## 5. What bad input does
#
# A wrong pair is worse than a crash: it trains, and nobody sees it. So a loader never guesses. What it
# cannot read raises a `DataError` that names the file, the record in it, and the remedy. Four real ones:


# %%
def refused(action) -> str:
    """The message of the DataError that `action` raises; it must raise one."""
    try:
        action()
    except DataError as error:
        return str(error).replace(f"{scratch}/", "").replace(f"{root()}/", "")
    raise AssertionError("this input was accepted")


with tempfile.TemporaryDirectory() as scratch:
    sick, whole = Path(scratch), records["val"][0]

    half = sick / f"half{whole.image.suffix}"
    half.write_bytes(whole.image.read_bytes()[: whole.image.stat().st_size // 2])
    print("A picture cut off in the download\n   ", refused(replace(whole, image=half).open))

    entry = {
        "filename": "7.png",
        "imgid": 7,
        "split": "val",
        "sentids": [35],
        "sentences": [{"sentid": 35, "raw": "  "}],
    }
    (sick / "dataset.json").write_text(json.dumps({"images": [entry]}))
    print("A caption of spaces\n   ", refused(lambda: load_karpathy(sick / "dataset.json", sick, "val")))

    stale = (40, 12, 310, 250), (64, 64), "instances_val.json", "annotation 12"
    print("A box for the picture before it was resized\n   ", refused(lambda: check_box(*stale)))

    np.save(sick / "dev_ims.npy", np.ones((1, 36, 8), np.float32))
    (sick / "dev_caps.txt").write_text("b'A red ball .'\n" * 5)
    print("Captions that were printed as bytes\n   ", refused(lambda: load_regions(sick, "dev")))

# %% [markdown]
# The last one is a trap that has cost people weeks: files written by Python 2 and read by Python 3 carry
# captions as `b'A red ball .'`, so that every caption begins with the unknown word `b'A` and ends with
# another, and nothing complains. Here it does.
#
# ## 6. From captions to token ids
#
# The embedded set has a small vocabulary of its own, one id a word. Photos are read with BERT's WordPiece:
# rare words fall into pieces (`##`), nothing is unknown. Both add [CLS] and [SEP].

# %%
vocabulary = data_root / "vocab" / "bert-base-uncased-vocab.txt"
tokenizers = {"word-level (scenes)": word_level(TOKENIZER)} if embedded else {}
if vocabulary.is_file():
    tokenizers["WordPiece (BERT)"] = wordpiece(vocabulary)
else:
    print(f"No {vocabulary.name} under data_root/vocab: WordPiece is left out.")

texts = [c for r in records["val"] for c in r.captions]
example = max(texts[:50], key=len)
for name, tokenizer in tokenizers.items():
    ragged = tokenise(texts, tokenizer, max_length=32)
    lengths = ragged.lengths
    print(
        f"{name}: {len(tokenizer):,} entries, {lengths.mean():.1f} tokens a caption, at most {lengths.max()}"
    )
    print("   ", " ".join(tokenizer.convert_ids_to_tokens(tokenizer(example)["input_ids"])), "\n")
    ends = ragged.ids[ragged.start[1:] - 1]
    assert (ends == tokenizer.sep_token_id).all()  # a caption that is cut keeps its closing token
    if name.startswith("word"):
        assert tokenizer.unk_token_id not in ragged.ids  # every word of the embedded set is known

# %% [markdown]
# ## 7. Proposals: where to look
#
# Region methods describe a picture by a few dozen boxes. The papers take boxes from a Faster R-CNN that was
# trained on Visual Genome. Where no such features are published we propose boxes without training:
# *selective search* merges similar neighbouring patches, and a *grid* of windows in several sizes needs no
# picture at all. How many true boxes does the best of n proposals cover, at an overlap (IoU) of at least one
# half?

# %%
count = Settings(
    "mvam", {"scale": p.scale, "dataset": p.dataset, "regions": p.regions}
).regions  # boxes a picture that runs take
methods = dict(propose(name) for name in ("selective_search", "grid"))
with_boxes = [r for r in boxed if boxes_of(r)]
sample = with_boxes[: 12 if p.smoke else 200 if embedded else 40]


def best_overlaps(method: str, record: Record, top: int) -> torch.Tensor:
    """For every true box the running best IoU over the first 1 ... `top` proposals, "boxes top"."""
    proposed = torch.from_numpy(methods[method](record.open(), top)).float()
    return iou(torch.tensor(boxes_of(record)), proposed).cummax(1).values


recall, top = {}, max(100, count)
for method in methods if sample else ():
    covered = torch.cat([best_overlaps(method, r, top) for r in sample]) >= 0.5
    recall[method] = 100 * covered.float().mean(0).numpy()
if recall:
    columns = sorted({1, 10, count, 36, 100})
    show(
        pd.DataFrame({f"{n} boxes": {m: recall[m][n - 1] for m in recall} for n in columns}).rename_axis(
            "recall at 0.5, %"
        ),
        1,
    )
    if embedded:
        assert recall["selective_search"][count - 1] > recall["grid"][count - 1]

# %%
view = max((boxed[i] for i in chosen), key=lambda r: len(boxes_of(r)))
fig, axes = plt.subplots(1, 3 if recall else 2, figsize=(7.2 if recall else 5, 2.5), layout="constrained",
                         width_ratios=[1, 1, 1.35][: 3 if recall else 2])  # fmt: skip
for ax, method in zip(axes, methods, strict=False):
    proposed = methods[method](view.open(), count)
    if not boxes_of(view):
        figures.show_boxes(ax, view.open(), proposed[:12])
        ax.set_title(f"{method.replace('_', ' ')}: first 12")
        continue
    overlap = iou(torch.tensor(boxes_of(view)), torch.from_numpy(proposed).float())
    figures.show_boxes(
        ax, view.open(), proposed[overlap.argmax(1)], labels=[f"{v:.2f}" for v in overlap.max(1).values]
    )
    ax.set_title(f"{method.replace('_', ' ')}: best of {count}, IoU", fontsize=8, pad=12)
if recall:
    for k, (method, values) in enumerate(recall.items()):
        axes[2].plot(np.arange(1, top + 1), values, ("-", "--")[k], marker="", label=method.replace("_", " "))
    axes[2].axvline(count, color=figures.FAINT, linestyle=":", marker="")
    axes[2].set(
        xscale="log", ylim=(0, 100), xlabel="proposals a picture (log scale)", ylabel="recall at IoU 0.5 (%)"
    )
    axes[2].xaxis.set_major_formatter("{x:g}")
    axes[2].legend(loc="upper left")
keep(fig, "data_proposals")
plt.show()

# %% [markdown]
# Selective search costs time. It is measured on a few pictures; with `proposals=auto`, photos that would
# take more than ten minutes get the grid instead. The features' note says which it was, and training
# compares it with what it asks for.

# %%
pictures = [r.open() for r in records["train"][:6]]
begun = time.monotonic()
for picture in pictures:
    methods["selective_search"](picture, count)
each, number = (time.monotonic() - begun) / len(pictures), sum(map(len, records.values()))
method = p.proposals
if method == "auto":
    method = "selective_search" if embedded or each * number < (20 if p.smoke else 600) else "grid"
print(
    f"Selective search: {1000 * each:.0f} ms a picture, {each * number / 60:.1f} minutes for all {number:,}."
)
print(f"Taken here: {method}.")

# %% [markdown]
# ## 8. The backbone, and the features it makes
#
# A frozen network turns a picture into vectors once; matchers are trained on those. Two kinds, one layout:
#
# * **grid**: the cells of the network's last feature map, a vector and a box a cell;
# * **regions**: for every proposal the mean of a 3 × 3 RoI-align of that map.
#
# For photos the network is MobileNetV2, trained on ImageNet's labels. For the embedded set there is no
# pretrained network, so we train a small ResNet-18 to name shape, colour, size and texture of labelled
# boxes. **Be clear what that means: it sees the boxes and labels of the train split** (val chooses the
# epoch), never a caption. The papers do the same on a larger scale: bottom-up attention, whose regions FRCNN
# models are built on, was trained on the object and attribute labels of Visual Genome. Results on `scenes`
# are results *given* such a backbone.
#
# `2_train` makes the same calls, so what they leave in the cache is what training finds.

# %%
network = inputs.frozen_network(p.dataset, data_root, cache, scale=p.scale, smoke=p.smoke)
images = {}
for kind in p.kinds.split(","):
    if kind == "regions" and p.scale == "paper":
        published = inputs.published_regions(p.dataset, data_root, smoke=p.smoke)
        images[kind] = {name: RegionSource(array) for name, array in published.items()}
    else:
        of = "cells" if kind == "grid" else kind
        images[kind] = inputs.region_images(records, network, cache, kind=of, regions=count, proposals=method)

# %%
if network.folder is not None:
    log = network.folder / "log.jsonl"
    epochs = pd.DataFrame(json.loads(line) for line in log.read_text().splitlines()).set_index("epoch")
    seen = epochs[[c for c in epochs if c.startswith("val_")]].rename(
        columns=lambda c: c.removeprefix("val_")
    )
    show(100 * seen.assign(mean=seen.mean(axis=1)).rename_axis("epoch; val accuracy, %"), 1)
else:
    print("The backbone came trained; nothing was trained here.")

# %% [markdown]
# ### On disk
#
# Features are stored in SCAN's layout, with boxes, picture sizes and a note of what made them. Arrays are
# *memory-mapped*: opening one reads nothing, and a batch reads its own rows. COCO's published train array
# has 31 GB; code that loads it whole needs 31 GB of memory before the first step.

# %%
arrays = {(kind, split): source.regions for kind, of in images.items() for split, source in of.items()}
rows = {}
for (kind, split), array in arrays.items():
    n, r, d = array.features.shape
    rows[f"{kind}, {split}"] = {"pictures": n, "r": r, "d": d, "type": str(array.features.dtype),
                                "MB on disk": Path(array.features.filename).stat().st_size / 1e6}  # fmt: skip
show(pd.DataFrame(rows).T.rename_axis("features"), 1)

kind = p.kinds.split(",")[-1]
array = arrays[kind, "train"]
assert isinstance(array.features, np.memmap)
some = np.sort(rng.choice(len(array), min(128, len(array)), replace=False))
begun = time.monotonic()
batch = images[kind]["train"].batch(some)
elapsed = time.monotonic() - begun
read, whole = array.features[some].nbytes / 1e6, array.features.nbytes / 1e6
print(f"A batch of {len(some)} pictures: {1000 * elapsed:.1f} ms, {read:.1f} of {whole:.0f} MB")
print("Tensors:", ", ".join(f"{name} {tuple(value.shape)}" for name, value in batch.items()))
print("Files:", ", ".join(sorted(f.name for f in Path(array.features.filename).parent.glob("train_*"))))
{key: value for key, value in array.meta.items() if key not in ("key", "captions_per_image")}

# %% [markdown]
# The fourth format closes the circle: records read back from SCAN's layout have the captions of the Karpathy
# file, in its order.

# %%
if p.scale == "tiny":  # at paper scale regions are published arrays with captions of their own
    for (_, split), array in arrays.items():
        assert [r.captions for r in array.records()] == [r.captions for r in records[split]]
        assert array.ids == [r.image_id for r in records[split]]
    print(f"{len(arrays)} feature files agree with the records they were made from.")

# %% [markdown]
# ### What the features know
#
# Take a region, find the most similar regions of *other* pictures (cosine), and look. What makes two regions
# neighbours is all that a matcher gets to see of them.

# %%
features = torch.from_numpy(np.array(arrays[kind, "val"].features, np.float32))
places = torch.from_numpy(np.array(arrays[kind, "val"].boxes, np.float32))
n, r, _ = features.shape
features = torch.nn.functional.normalize(features - features.mean((0, 1)), dim=-1)


def neighbours(picture: int, region: int, k: int) -> list[tuple[int, int]]:
    """The best region of each of the `k` other pictures that have the most similar ones."""
    value, which = (features @ features[picture, region]).max(1)
    value[picture] = -2
    return [(int(i), int(which[i])) for i in value.topk(k).indices]


fig, axes = plt.subplots(3, 7, figsize=(7.2, 3.3), layout="constrained")
for line, i in zip(axes, chosen, strict=False):
    i = i % n
    width, height = records["val"][i].open().size
    middle = torch.tensor([[width, height, 3 * width, 3 * height]]) / 4
    truth = torch.tensor(boxes_of(boxed[i])) if embedded else middle
    start = int(iou(truth, places[i]).max(0).values.argmax())
    for ax, (a, b) in zip(line, [(i, start), *neighbours(i, start, 6)], strict=True):
        figures.show_boxes(ax, records["val"][a].open(), places[a, b][None])
axes[0, 0].set_title("asked")
found = f"nearest {'regions' if kind == 'regions' else 'cells'} of other pictures"
axes[0, 1].text(0, 1.08, found, transform=axes[0, 1].transAxes, fontsize=9).set_in_layout(False)
plt.show()

# %% [markdown]
# On the embedded set this can be counted. Every region that covers a labelled object (IoU at least one half)
# has a true shape, colour, size and texture. How often does its nearest neighbour in another picture share
# them? Chance is the share of equal pairs.

# %%
if embedded:
    things = [t["objects"] for t in attributes(data_root / "scenes", "val")][:n]
    covers = [
        iou(places[i], torch.tensor([o["box"] for o in objects], dtype=torch.float32))
        for i, objects in enumerate(things)
    ]
    where = [
        (i, int(j), int(covers[i][j].argmax()))
        for i in range(n)
        for j in (covers[i].max(1).values >= 0.5).nonzero()[:, 0]
    ]
    vectors = torch.stack([features[i, j] for i, j, _ in where])
    owner = torch.tensor([i for i, _, _ in where])
    similar = (vectors @ vectors.T).masked_fill(owner[:, None] == owner[None], -2)
    nearest = similar.argmax(1)
    agree = {}
    for attribute in ("shape", "colour", "size", "texture"):
        value = np.array([things[i][o][attribute] for i, _, o in where])
        shares = np.unique(value, return_counts=True)[1] / len(value)
        agree[attribute] = {
            "nearest agrees": 100 * np.mean(value == value[nearest.numpy()]),
            "chance": 100 * (shares**2).sum(),
        }
    show(pd.DataFrame(agree).T.rename_axis(f"{len(where):,} regions on objects, %"), 1)
    assert agree["colour"]["nearest agrees"] > agree["colour"]["chance"]

# %% [markdown]
# ## Next
#
# The features lie in the cache. `mvam/1_lesson` explains the first method, `mvam/2_train` trains it on them.
# For other photos put them under `data_root` in one of the formats of section 4 and give the notebook their
# name; if `auto` chose the grid above, pass `-p proposals grid` to `2_train` as well, or it will search.

# %% [markdown]
# Previous: [0_start_here](0_start_here.ipynb) · Next: [mvam/1_lesson](mvam/1_lesson.ipynb)
