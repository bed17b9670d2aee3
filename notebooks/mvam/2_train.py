# %% [markdown]
# # MVAM: one training run
#
# **Paper** *MVAM: Multi-View Attention Method for Fine-grained Image-Text Matching* (arXiv 2402.17237). Every row of Tables 1 to 5 is this notebook
# with other parameters; `grids/mvam_*.csv` lists them.
#
# | scale | data | cost of one run |
# |---|---|---|
# | `smoke` | 160 pictures | seconds; the numbers mean nothing |
# | `tiny`, scenes | 4,000 pictures of 64 px | 1 to 2 minutes on one core, after 3 minutes for the backbone that all runs share |
# | `tiny`, flickr8k | 6,000 photos, frozen MobileNetV2 | about 7 minutes on one core, after 4 minutes of extraction |
# | `paper` | COCO or Flickr30k, batch 1024, 20 epochs | 8 GPUs |
#
# **Expected** on scenes, test: t2i R@1 well above a bag of words with the true labels at hand; the exact numbers stand in the
# README's generated table. The run writes `metrics.json` last: that file, not this page, is the proof that it succeeded.

# %% tags=["parameters"]
dataset: str = "scenes"  # scenes, flickr8k, flickr30k, coco_karpathy
data_root: str = "data"  # folder above the dataset's own
scale: str = "tiny"  # tiny or paper
seed: int = 0  # of the start, the order and the dropout
out: str = "papermill_runs/mvam_train"  # the run's folder
smoke: bool = False  # run everything in seconds
cache: str = "data/cache"  # backbones, features and text states that runs share
backbone: str = ""  # grid, regions or clip; empty is the scale's (regions; on photos at scale tiny, grid)
text: str = "bert"  # bert, gru, minilm or clip
pooling: str = "mvam"  # cls, mean, attention or mvam
views: int = 16  # number of view codes
total_dim: int = 0  # width of the representation; 0 is the scale's
projection: str = "split"  # split, shared or full (reading M1)
view_dim: int = 64  # width of a view when the projection is shared
scoring: str = "dot"  # dot, scaled or tanh (M2)
include_special: bool = True  # attend to [IMG], [CLS], [SEP] (M3)
diversity: str = "base"  # base (Eq. 10), sqrt (Eq. 11) or none
diversity_weight: float = -1.0  # lambda of Eq. 13; -1 is the scale's (10 in the paper)
diversity_power: int = 2  # the Frobenius norm, squared or not (M4)
diversity_reduce: str = "mean"  # over the batch: mean or sum (M4)
normalise: str = "after"  # after the concatenation, or per_view (M6)
reduction: str = "mean"  # of the two directions in Eq. 6: mean or sum (M5)
same_picture_positives: bool = False  # captions of one picture are positives (M11)
tau: float = 0.07  # initial temperature, learnable (M7)
ensemble: int = 1  # 1 is one model; 16 is Table 3's control of independent models
vision: str = ""  # a timm name in place of the scale's picture backbone
vision_weights: str = ""  # safetensors file for it, or hub
text_weights: str = ""  # folder or hub name of the text model
clip_weights: str = ""  # folder or hub name of a CLIP; empty trains a small one from scratch
proposals: str = "auto"  # regions by auto, selective_search or grid
regions: int = 0  # proposals a picture; 0 is the scale's
width: int = 0  # of the randomly initialised Transformers; 0 is the scale's
depth: int = 0  # their layers; 0 is the scale's
input_dropout: float = -1.0  # of whole channels of frozen features; -1 is the scale's
epochs: int = 0  # 0 is the scale's
batch_size: int = 0  # 0 is the scale's
lr: float = 0.0  # 0 is the scale's
precision: str = ""  # no, bf16 or fp16; empty is the scale's
workers: int = 0  # processes that read the data beside the one that trains; a CLIP's pictures want some
threads: int = 0  # of torch on a CPU; 0 leaves them as they are

# %% jupyter={"source_hidden": true}
from finematch.config import root, strict

p = strict(
    globals(), scale={"tiny", "paper"}, seed=(0, 2**31), backbone={"", "grid", "regions", "clip"},
    text={"bert", "gru", "minilm", "clip"}, pooling={"cls", "mean", "attention", "mvam"}, views=(1, 256),
    total_dim=(0, 65536), projection={"split", "shared", "full"}, view_dim=(1, 4096),
    scoring={"dot", "scaled", "tanh"}, diversity={"base", "sqrt", "none"}, diversity_weight=(-1, 1e6),
    diversity_power={1, 2}, diversity_reduce={"mean", "sum"}, normalise={"after", "per_view"},
    reduction={"mean", "sum"}, tau=(0.01, 10), ensemble=(1, 64), proposals={"auto", "selective_search", "grid"},
    regions=(0, 1000), width=(0, 8192), depth=(0, 48), input_dropout=(-1, 0.95), epochs=(0, 1000), batch_size=(0, 65536), lr=(0, 1),
    precision={"", "no", "bf16", "fp16"}, workers=(0, 256), threads=(0, 256),
)  # fmt: skip

# %%
import time

import torch

from finematch.evaluation.retrieval import karpathy_protocol, retrieval
from finematch.models.mvam import MVAM, SWITCHES, ensemble as concatenated, settings, view_statistics
from finematch.tables import write_metrics
from finematch.training import (
    Plan,
    check_writable,
    fit,
    join_processes,
    leave_to_first,
    seed_everything,
    to_device,
)
from finematch.workbench import embed, open_bench

join_processes()
if p.threads:
    torch.set_num_threads(p.threads)
s = settings(p.scale, p.dataset, p.as_dict())
folder = root() / p.out
check_writable(folder, room=10_000_000)
started = time.monotonic()
s

# %% [markdown]
# ## The data and the towers
#
# Frozen features are extracted once and shared by all runs; the towers on top of them are trained here.

# %%
bench = open_bench(
    dataset=p.dataset, data_root=root() / p.data_root, cache=root() / p.cache, scale=p.scale,
    backbone=s["backbone"], text=p.text, width=s["width"], depth=s["depth"], input_dropout=s["input_dropout"], vision=p.vision,
    vision_weights=p.vision_weights, text_weights=p.text_weights, clip_weights=p.clip_weights,
    proposals=p.proposals, regions=s["regions"], smoke=p.smoke,
)  # fmt: skip
{name: f"{len(side.records)} pictures, {len(side.captions)} captions" for name, side in bench.splits.items()}


# %% [markdown]
# ## The model
#
# An ensemble of N (Table 3) is N independent models with N seeds, each with 1/N of the width and one view. Everything else is one model.


# %%
def build(member: int) -> MVAM:
    seed_everything(p.seed * 1000 + member)
    options = {name: getattr(p, name) for name in SWITCHES} | {
        "total_dim": s["total_dim"] // p.ensemble, "diversity_weight": s["diversity_weight"]}  # fmt: skip
    return MVAM(*bench.towers(), **options)


if s["total_dim"] % p.ensemble:
    raise ValueError(f"an ensemble of {p.ensemble} does not divide total_dim = {s['total_dim']}")
model = build(0)
print(f"{sum(q.numel() for q in model.parameters()) / 1e6:.2f} M parameters, "
      f"representation {p.ensemble} x {s['total_dim'] // p.ensemble}")  # fmt: skip


# %% [markdown]
# ## Training
#
# The epoch with the best rsum on *val* is kept. Where val itself is reported (a dataset without a test split here), the last epoch is kept
# instead: a number that chose its own epoch would flatter.
#
# > "For MVAM-CLIP, we train it in 2 stages: firstly training view codes with the fixed CLIP model [...], and secondly fine-tuning all parameters"
#
# With a given CLIP, stage 1 trains the codes and, necessarily, the projection before them (reading M8).


# %%
def val_metrics(m: MVAM) -> dict[str, float]:
    side = bench.splits["val"]
    found = retrieval(*embed(m, side), side.image_of)
    return {k: found[k] for k in ("i2t_r1", "t2i_r1", "rsum")}


def plan(lr: float, epochs: int, member: int) -> Plan:
    return Plan(epochs=epochs, batch_size=s["batch_size"], lr=lr, weight_decay=s["weight_decay"], warmup=s["warmup"],
                clip_norm=1.0, precision=s["precision"], workers=p.workers, seed=p.seed * 1000 + member)  # fmt: skip


def train(m: MVAM, where, member: int) -> dict:
    data, rest = bench.splits["train"].pairs(), {"evaluate": val_metrics, "select": bench.select}
    if not p.clip_weights:
        lr = p.lr or (s["clip_lr"] if s["backbone"] == "clip" else s["lr"])
        return fit(m, data, plan(lr, s["epochs"], member), where, **rest)
    if p.pooling in ("cls", "mean"):
        return fit(m, data, plan(p.lr or s["stage2_lr"], s["epochs"], member), where, **rest)
    first = max(1, s["epochs"] // 2)
    fit(m, data, plan(s["stage1_lr"], first, member), where / "stage1",
        trainable=lambda name: not name.startswith(("vision.", "text.")), **rest)  # fmt: skip
    return fit(
        m, data, plan(p.lr or s["stage2_lr"], max(1, s["epochs"] - first), member), where / "stage2", **rest
    )


side = bench.splits[bench.reported]
vectors, seconds = [], 0.0
for member in range(p.ensemble):
    model = build(member) if member else model
    summary = train(model, folder / f"member{member}" if p.ensemble > 1 else folder, member)
    seconds += summary["seconds"]
    vectors.append(embed(model, side))
leave_to_first()  # of several processes (torchrun); else nothing

# %% [markdown]
# ## Evaluation
#
# Retrieval over the whole split in both directions, and what the views do: the entropy of each (1 is uniform) and the mean overlap of two.

# %%
image, words = (concatenated(list(part)) for part in zip(*vectors, strict=True))
metrics = retrieval(image, words, side.image_of, split=f"{p.dataset} {bench.reported}")
if p.dataset == "coco_karpathy" and len(side.records) == 5000:  # 1K: five folds of the 5,000, averaged
    folds = retrieval(image, words, side.image_of, **karpathy_protocol("coco1k", 5000))
    metrics |= {f"coco1k_{k}": v for k, v in folds.items() if k.startswith(("i2t", "t2i", "rsum"))}

with torch.no_grad():
    for kind, encode, source in (
        ("image", model.encode_image, side.pictures),
        ("text", model.encode_text, side.texts),
    ):
        batch = to_device(source.batch(range(min(500, len(source)))), next(model.parameters()).device)
        attention = encode(**batch).attention
        if attention is not None:
            entropy, overlap = view_statistics(attention, attention[:, 0] > 0)
            metrics[f"{kind}_entropy"] = float(entropy.mean())
            if len(overlap) > 1:
                off = overlap[~torch.eye(len(overlap), dtype=torch.bool, device=overlap.device)]
                metrics[f"{kind}_overlap"] = float(off.mean())
metrics

# %%
if s["backbone"] == "clip":
    bench.save_clip(folder / "encoder")
metrics["best_epoch"] = summary["best_epoch"]
resolved = {
    **p.as_dict(),
    **{k: v for k, v in s.items() if k in p.as_dict()},
    "smoke": p.smoke,
    **bench.facts,
}
write_metrics(folder, resolved, metrics, seconds=seconds)
