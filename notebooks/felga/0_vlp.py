# %% [markdown]
# # FELGA: a small vision-language model
#
# **Paper** *FELGA: Unsupervised Fragment Embedding for Fine-Grained Cross-Modal Association* (WACV 2024), section 4.2. FELGA learns on top of
# a frozen model that has one space for pictures and texts:
#
# > "To verify our method is not limited to any specific VLP models, three VLP models are selected: CLIP [39], BLIP [26] and BLIPv2 [25]. For a
# > fair comparison, all these pre-trained models are not fine-tuned on the Microsoft COCO dataset."
#
# Where none of the three can be had, this page trains a small CLIP on the *training captions* alone, saves it as published ones are saved, and looks
# at what it knows. `2_train` opens the same folder; if it is not there, it is made then, so this page may be skipped. We depart from the paper
# because our model has seen the pictures that FENet trains on (never a box, a class name as a label, or a test picture): a published one has
# seen other pictures, and far more of them.
#
# **Serves** no table; every row of `grids/felga_*.csv` at scale `tiny` stands on this model.
#
# | on | cost |
# |---|---|
# | `smoke` | 160 pictures, seconds; the numbers mean nothing |
# | scenes | the cells of a small network that has read the training captions; about 5 minutes on two cores, once |
# | flickr8k | the cells of a frozen MobileNetV2; some 20 minutes on two cores, most of it the cells |
#
# **Expected** retrieval on val far above chance; named crops well above chance and far from perfect: what is left is FENet's to gain.

# %% tags=["parameters"]
dataset: str = "scenes"  # scenes, flickr8k
data_root: str = "data"  # folder above the dataset's own
scale: str = "tiny"  # tiny alone: at scale paper a published model is opened
seed: int = -1  # of the training; -1 is the settings' own, the model that 2_train opens by itself
out: str = "papermill_runs/felga_vlp"  # folder of metrics.json
smoke: bool = False  # run everything in seconds
cache: str = "data/cache"  # where the model is kept, and backbones that runs share
figures: str = "figures"  # folder of the figure; photos are shown here and saved nowhere
epochs: int = 0  # 0 is the settings' own; another number is another model
examples: int = 8  # pictures to look at
threads: int = 0  # of torch on a CPU; 0 leaves them as they are

# %% jupyter={"source_hidden": true}
from finematch.config import parameters, root

p = parameters(globals(), dataset={"scenes", "flickr8k"}, scale={"tiny"}, seed=(-1, 2**31), epochs=(0, 1000), examples=(1, 40),
           threads=(0, 256))  # fmt: skip

# %%
import json
from itertools import groupby

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from IPython.display import Markdown, display
from transformers import AutoModel, AutoTokenizer

from finematch import figures as draw
from finematch.data.fragment_sets import open_fragment_sets
from finematch.data.record import pairs
from finematch.evaluation.average_precision import query_boxes
from finematch.evaluation.retrieval import retrieval
from finematch.features.fragments import open_vlp
from finematch.features.small_clip import open_small_clip, small_clip_config
from finematch.tables import to_markdown, write_metrics
from finematch.training import check_writable
from finematch.workbench import accelerator

if p.threads:
    torch.set_num_threads(p.threads)
check_writable(root() / p.out, room=100_000)
report = "val" if p.dataset == "scenes" else "test"
sets = open_fragment_sets(p.dataset, root() / p.data_root, root() / p.cache, report=report, smoke=p.smoke)
cache = root() / p.cache / (p.dataset + ("-smoke" if p.smoke else ""))
changes = {
    name: value for name, value, unset in (("seed", p.seed, -1), ("epochs", p.epochs, 0)) if value != unset
}
small_clip_config(p.dataset, smoke=p.smoke, **changes)

# %% [markdown]
# ## Training, or the cache
#
# The in-batch contrastive loss of CLIP, over the cells of a frozen network. For photos that is a MobileNetV2 trained on ImageNet. For scenes it
# is a network that was asked first which words the captions of a picture hold: a contrastive loss on a few thousand pictures learns colours from pixels, and
# no shapes. Neither was shown a box or a label of these pictures. While it trains, a picture is a random window of itself and a text one of its captions or all of them joined:
# crops and long texts are then nothing new to it. The folder is found by the settings, the images, the captions and that network's weights.
# A smoke run takes one epoch and smaller batches.

# %%
folder = open_small_clip(sets, p.dataset, cache, smoke=p.smoke, **changes)
display(Markdown(f"`{folder.name}`: " + ", ".join(f"`{path.name}`" for path in sorted(folder.iterdir()))))
lines = (folder / "log.jsonl").read_text(encoding="utf-8").splitlines()
history = pd.DataFrame([json.loads(line) for line in lines]).set_index("epoch")
best = history["rsum"].idxmax()
history.map(lambda value: f"{value:.4g}")

# %% [markdown]
# The curve. Left the loss, right recall on val: how often the picture's own caption (or the caption's own picture) is among the first 1 or 10. The
# epoch with the best rsum is the one that was saved.

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
    right.set(xlabel="epoch", ylabel="val pictures and captions (%)", ylim=(0, 100))
    right.legend(loc="best")
    for ax in (left, right):
        ax.grid(axis="y")
        ax.xaxis.get_major_locator().set_params(integer=True)
    plt.show()

# %% [markdown]
# ## It opens as a published model does
#
# `from_pretrained` on the folder: model and tokenizer. What it says of a text must be what our own wrapper says, through which FELGA reads every
# model.

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
# The saved model embeds val's pictures and captions once more. The numbers must come back, but for roundings: training read cells that were kept in half
# precision, here the pictures go through the frozen network again.


# %%
def seen(records: list, boxes: list[np.ndarray], block: int = 64) -> torch.Tensor:
    """Unit vectors of the boxes of each picture, picture by picture."""
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
# Every true box is cropped and the class names are ranked for it, as they stand, without a prompt. No training has seen a box. Chance is one over
# the number of classes; whoever always names the commonest class does better than that, which is why the mean over classes stands beside the mean
# over boxes. On scenes the boxes are val's. Photos have no val with boxes: there they are those of the COCO pictures that are reported, and
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
    index=["this model", "chance", "always the commonest"],
)  # fmt: skip
print(f"{sets.name}: {len(queries)} boxes in {len(grouped)} pictures, {len(names)} classes")
display(Markdown(to_markdown(known.reset_index(names="who names the crop"), digits=1)))

# %% [markdown]
# Class by class: how often its own name comes first, and what its crops are called most often.

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
# A few of them to look at: each true box with the name that the model gives it. ✓ right, ✗ wrong.

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
protocol = f"{found['protocol']}; {sets.name}: {len(queries)} true boxes x {len(names)} class names, ties against the model"
write_metrics(root() / p.out, {**p.as_dict(), "folder": folder.name}, metrics,
              seconds=float(history["seconds"].iloc[-1]), protocol=protocol)  # fmt: skip
pd.Series(metrics).round(2)
