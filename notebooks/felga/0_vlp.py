# %% [markdown]
# # FELGA: a small vision-language model
#
# **Paper** *FELGA: Unsupervised Fragment Embedding for Fine-Grained Cross-Modal Association* (WACV 2024), section 4.2. FELGA learns on top of
# a frozen model that embeds images and texts into one space:
#
# > "To verify our method is not limited to any specific VLP models, three VLP models are selected: CLIP [39], BLIP [26] and BLIPv2 [25]. For a
# > fair comparison, all these pre-trained models are not fine-tuned on the Microsoft COCO dataset."
#
# Where none of the three is available, this page trains a small CLIP on the *training captions* only, saves it as published models are saved, and
# measures what it knows. `2_train` opens the same folder and makes it if it is absent, so this page may be skipped. We depart from the paper
# because our model has seen the images that FENet trains on (never a box, a class label or a test image), while a published model has seen
# other images, and far more of them.
#
# **Serves** no table; every row of `grids/felga_*.csv` at scale `tiny` uses this model.
#
# | on | cost |
# |---|---|
# | `smoke` | 160 images, seconds; the numbers mean nothing |
# | scenes | feature maps of a small network trained on the training captions; about 5 minutes on two cores, once |
# | flickr8k | feature maps of a frozen MobileNetV2; about 20 minutes on two cores, most of it for the maps |
#
# **Expected** retrieval on val far above chance; crops are named well above chance and far from perfectly, which leaves room for FENet.

# %% tags=["parameters"]
dataset: str = "scenes"  # scenes, flickr8k
data_root: str = "data"  # folder above the dataset's own
scale: str = "tiny"  # tiny alone: at scale paper a published model is opened
seed: int = None  # random seed of the training; None: 0. With a changed setting this is not the model that 2_train opens
out: str = "papermill_runs/felga_vlp"  # folder of metrics.json
smoke: bool = False  # run everything in seconds
cache: str = "data/cache"  # where the model is kept, and backbones that runs share
figures: str = "figures"  # folder of the figure; photos are shown here and saved nowhere
width: int = None  # of both towers; None: 96 on scenes, 128 on photos
depth: int = None  # layers of each tower; None: 2
epochs: int = None  # passes over the training images; None: 8 (smoke: 1)
batch_size: int = None  # images per step; None: 64 (smoke: 40)
lr: float = None  # learning rate; None: 1e-3
warmup: float = None  # share of the steps before the full learning rate; None: 0.1
weight_decay: float = None  # of AdamW; None: 0.05
smallest: float = None  # side of the smallest random crop, as a share of the image's side; None: 0.5
each: int = None  # captions of an image in a batch; None: 2
whole: float = None  # share of batches whose texts are all captions of an image, joined; None: 0.2
examples: int = 8  # images to look at
threads: int = 0  # of torch on a CPU; 0 leaves them as they are

# %% jupyter={"source_hidden": true}
from finematch.config import parameters, root

p = parameters(
    globals(), dataset={"scenes", "flickr8k"}, scale={"tiny"}, seed=(0, 2**31, None), width=(16, 4096, None), depth=(1, 48, None),
    epochs=(1, 1000, None), batch_size=(2, 65536, None), lr=(0, 10, None), warmup=(0, 1, None), weight_decay=(0, 1, None),
    smallest=(0.05, 1, None), each=(1, 5, None), whole=(0, 1, None), examples=(1, 40), threads=(0, 256),
)  # fmt: skip

# %%
import json
from dataclasses import asdict, fields
from itertools import groupby

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from IPython.display import Markdown, display
from transformers import AutoModel, AutoTokenizer

from finematch import figures as draw
from finematch.checkpoints import check_writable
from finematch.data.fragment_sets import open_fragment_sets
from finematch.data.record import pairs
from finematch.evaluation.average_precision import query_boxes
from finematch.evaluation.retrieval import retrieval
from finematch.features.fragments import open_vlp
from finematch.features.small_clip import SmallCLIPConfig, open_small_clip, small_clip_config
from finematch.runs import write_metrics
from finematch.tables import to_markdown
from finematch.training import accelerator

if p.threads:
    torch.set_num_threads(p.threads)
check_writable(root() / p.out, room=100_000)
report = "val" if p.dataset == "scenes" else "test"
sets = open_fragment_sets(p.dataset, root() / p.data_root, root() / p.cache, report=report, smoke=p.smoke)
cache = root() / p.cache / (p.dataset + ("-smoke" if p.smoke else ""))
changes = {f.name: getattr(p, f.name) for f in fields(SmallCLIPConfig) if getattr(p, f.name) is not None}
config = small_clip_config(p.dataset, smoke=p.smoke, **changes)
config

# %% [markdown]
# ## Training, or the cache
#
# The model reads the feature map of a frozen network and is trained with CLIP's in-batch contrastive loss. On photos the network is a MobileNetV2
# trained on ImageNet. On scenes it is a small network that was first trained to predict the words of an image's captions, because a contrastive loss on a few
# thousand images of pixels learns colours but no shapes. Neither network has seen a box or a label of these images. In training, an image is a random crop
# of itself, and a text is one of its captions or all of them joined, so that the model knows crops and long texts. The cache finds the model by its
# settings, the images, the captions and the network's weights.

# %%
folder = open_small_clip(sets, p.dataset, cache, networks=root() / p.cache, smoke=p.smoke, **changes)
display(Markdown(f"`{folder.name}`: " + ", ".join(f"`{path.name}`" for path in sorted(folder.iterdir()))))
lines = (folder / "log.jsonl").read_text(encoding="utf-8").splitlines()
history = pd.DataFrame([json.loads(line) for line in lines]).set_index("epoch")
best = history["rsum"].idxmax()
history.map(lambda value: f"{value:.4g}")

# %% [markdown]
# Left: the training loss. Right: recall on val, that is how often an image's own caption (or a caption's own image) is among the first 1 or 10.
# The epoch with the best rsum was saved.

# %%
recalls = [name for name in history if name.startswith(("i2t_r", "t2i_r"))]
with draw.style():
    figure, (left, right) = plt.subplots(1, 2, figsize=(9.5, 3.2), layout="constrained")
    left.plot(history.index, history["loss"])
    left.set(xlabel="epoch", ylabel="contrastive loss of training batches")
    for k, name in enumerate(recalls):
        right.plot(
            history.index,
            history[name],
            linestyle=draw.DASHES[k % len(draw.DASHES)],
            label=name.replace("_r", " R@"),
        )
    right.axvline(best, color=draw.FAINT, linewidth=0.8)
    right.set(xlabel="epoch", ylabel="recall on val (%)", ylim=(0, 100))
    right.legend(loc="best")
    for ax in (left, right):
        ax.grid(axis="y")
        ax.xaxis.get_major_locator().set_params(integer=True)
    plt.show()

# %% [markdown]
# ## It opens as a published model does
#
# `from_pretrained` opens model and tokenizer from the folder. Its embeddings of the class names must be those of our wrapper, through which FELGA
# reads every model.

# %%
model = open_vlp(folder).to(accelerator())
names = sets.categories
opened, tokenizer = AutoModel.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
with torch.no_grad():
    said = opened.get_text_features(**tokenizer(names, padding=True, return_tensors="pt")).pooler_output
classes = model.embed_texts(names).float().cpu()
torch.testing.assert_close(F.normalize(said, dim=-1), classes, atol=1e-4, rtol=0)
size = sum(q.numel() for q in opened.parameters())
print(
    f"{type(opened).__name__}, {size / 1e6:.2f} M parameters, {classes.shape[1]}-d; {len(tokenizer)} tokens"
)

# %% [markdown]
# ## Retrieval on val
#
# The saved model embeds the images and captions of val once more. The numbers of the training log must come back up to rounding: training read feature
# maps that were stored in half precision, and here the images go through the frozen network again.


# %%
def seen(records: list, boxes: list[np.ndarray], block: int = 64) -> torch.Tensor:
    """Unit vectors of the boxes of each image, image by image."""
    return torch.cat([
        model.embed_crops([r.open() for r in records[i : i + block]], boxes[i : i + block]).float().cpu()
        for i in range(0, len(records), block)
    ])  # fmt: skip


image_of, captions = zip(*pairs(sets.val), strict=True)
whole = [np.array([[0, 0, *r.open().size]], np.float32) for r in sets.val]
found = retrieval(seen(sets.val, whole), model.embed_texts(list(captions)).float().cpu(), np.array(image_of),
                  split=f"{p.dataset} val")  # fmt: skip
n = len(sets.val)
print(f"{found['protocol']}\nBy chance R@1 would be {100 / n:.2f} either way")
pd.DataFrame({"in training": history.loc[best, recalls], "saved, opened": [found[k] for k in recalls]}).round(
    2
)

# %% [markdown]
# ## What it knows of fragments
#
# Every ground-truth box is cropped, and the class names are ranked for the crop, without a prompt around them. No training has seen a box. Chance is
# one over the number of classes. A model that always names the most frequent class scores higher than chance, so the mean over classes stands
# beside the mean over boxes. On scenes the boxes are those of val. Photos have no val split with boxes, so the boxes are those of the reported COCO images;
# nothing is chosen by them.

# %%
records = sets.gallery
queries = query_boxes(records, names)
grouped = [(i, list(of_picture)) for i, of_picture in groupby(queries, key=lambda q: q.picture)]
boxes = [np.array([records[i].objects[q.object].box for q in mine], np.float32) for i, mine in grouped]
scores = seen([records[i] for i, _ in grouped], boxes) @ classes.T
true = torch.tensor([q.category for q in queries])
rank = (scores >= scores.gather(1, true[:, None])).sum(1)  # a tie counts against the model
share = torch.bincount(true, minlength=len(names)) / len(true)
there = share > 0
per_class = torch.stack([(rank[true == k] == 1).float().mean() for k in there.nonzero()[:, 0]])
known = pd.DataFrame(
    {
        "top 1": [100 * float((rank == 1).float().mean()), 100 / len(names), 100 * float(share.max())],
        "top 3": [100 * float((rank <= 3).float().mean()), 100 * min(3, len(names)) / len(names),
                  100 * float(share.topk(min(3, len(names))).values.sum())],
        "top 1, mean over classes": [100 * float(per_class.mean()), 100 / len(names), 100 / int(there.sum())],
    },
    index=["this model", "chance", "always the most frequent class"],
)  # fmt: skip
print(f"{sets.name}: {len(queries)} boxes in {len(grouped)} images, {len(names)} classes")
display(Markdown(to_markdown(known.reset_index(names="who names the crop"), digits=1)))

# %% [markdown]
# For each class: how often its name comes first for its crops, and which name comes first most often.

# %%
first = scores.argmax(1)
called = [names[int(first[true == k].mode().values)] for k in there.nonzero()[:, 0]]
pd.DataFrame(
    {
        "class": [name for name, here in zip(names, there, strict=True) if here],
        "boxes": torch.bincount(true, minlength=len(names))[there],
        "named right (%)": (100 * per_class.double()).numpy().round(1),
        "called most often": called,
    }
).sort_values("named right (%)", ascending=False, ignore_index=True)

# %% [markdown]
# Examples: each ground-truth box with the name that the model ranks first. ✓ correct, ✗ wrong.

# %%
chosen = np.linspace(0, len(grouped) - 1, min(p.examples, len(grouped))).astype(int)
start = np.concatenate([[0], np.cumsum([len(b) for b in boxes])])
with draw.style():
    across = min(4, len(chosen))
    down = -(-len(chosen) // across)
    figure, axes = plt.subplots(
        down, across, figsize=(2.6 * across, 2.7 * down), squeeze=False, layout="constrained"
    )
    for ax in axes.flat[len(chosen) :]:
        ax.set_axis_off()
    for ax, k in zip(axes.flat, chosen, strict=False):
        labels = [
            f"{names[f]} {'✓' if f == t else '✗'}"
            for f, t in zip(first[start[k] : start[k + 1]], true[start[k] : start[k + 1]], strict=True)
        ]
        draw.show_boxes(ax, records[grouped[k][0]].open(), boxes[k], labels=labels)
    if p.dataset == "scenes":  # drawn pictures belong to nobody; photos are not ours to publish
        draw.save(figure, root() / p.figures / f"felga_vlp{'.smoke' if p.smoke else ''}.svg")
    plt.show()

# %%
metrics = {k: found[k] for k in (*recalls, "rsum")} | {"best_epoch": int(best), "parameters_m": size / 1e6}
metrics |= {
    "crop_top1": known.iloc[0, 0], "crop_top3": known.iloc[0, 1], "crop_top1_macro": known.iloc[0, 2],
    "crop_top1_chance": known.iloc[1, 0], "crop_top1_commonest": known.iloc[2, 0],
}  # fmt: skip
protocol = f"{found['protocol']}; {sets.name}: {len(queries)} ground-truth boxes x {len(names)} class names, ties against the model"
write_metrics(root() / p.out, {**p.as_dict(), **asdict(config), "folder": folder.name}, metrics,
              seconds=float(history["seconds"].iloc[-1]), protocol=protocol)  # fmt: skip
pd.Series(metrics).round(2)

# %% [markdown]
# Previous: [hslm/4_attention](../hslm/4_attention.ipynb) · Next: [felga/1_lesson](1_lesson.ipynb)
