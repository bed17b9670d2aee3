# %% [markdown]
# # HSLM: one training run
#
# **Paper** *Learning Hierarchical Semantic Correspondences for Cross-Modal Image-Text Retrieval* (ICMR 2022). Every row of Tables 1 to 4 and
# every depth is this notebook with other parameters; `grids/hslm_*.csv` lists them.
#
# | scale | data | cost of one run |
# |---|---|---|
# | `smoke` | 160 pictures | seconds; the numbers mean nothing |
# | `tiny`, scenes | 4,000 pictures of 64 px, 20 regions | 2 to 4 minutes on one core, after 3 minutes for the backbone and regions that all runs share |
# | `tiny`, flickr8k | 6,000 photos, 36 regions of a frozen MobileNetV2 | 10 (global rows) to 20 minutes (whole model) on one core, after half an hour of selective search |
# | `paper` | Flickr30k or COCO, 36 published regions, batch 128, 40 epochs | a GPU of 11 GB (the paper: one RTX 2080 Ti) |
#
# **Expected** on scenes, test: the rows with local alignment far above those without, as in the paper; the numbers stand in the README's
# generated table. The run writes `metrics.json` last: that file, not this page, is the proof that it succeeded.

# %% tags=["parameters"]
dataset: str = "scenes"  # scenes, flickr8k, flickr30k, coco_karpathy
data_root: str = "data"  # folder above the dataset's own
scale: str = "tiny"  # tiny or paper
seed: int = 0  # of the start, the order and the dropout
out: str = "papermill_runs/hslm_train"  # the run's folder
smoke: bool = False  # run everything in seconds
cache: str = "data/cache"  # backbones and features that runs share
mgcn: bool = True  # graph convolution of regions and of words
self_attn: bool = True  # self-attention of the words
cross_attn: bool = True  # words guide the regions
glob: bool = True  # global alignment
loc: bool = True  # local alignment
depth: int = -1  # layers of the graph convolution; -1 is the scale's (4)
self_attention: str = "word"  # word, channel or softmax (reading H1)
self_residual: bool = False  # add E to Eq. 6 (H2)
relation: str = "nodes"  # nodes, raw or softmax (H4)
graph_norm: str = ""  # none, layer or batch (H5); empty is the scale's
normalise_graph: bool = False  # unit regions after the graph (H9)
cross: str = "attend"  # attend or gate (H10)
gate_pool: str = "mean"  # mean or max, of the gate reading
cross_scale: float = 0.0  # factor inside the sigmoid of Eq. 16; 0 is the scale's (1 in the paper)
context_norm: bool = True  # unit contexts (H11)
node_gate: str = "scalar"  # scalar or element (H16)
node_weights: str = "raw"  # raw or l1 (H16)
loss_score: str = "sigmoid"  # sigmoid or logit (H17)
include_special: bool = True  # [CLS] and [SEP] count as words (H24)
margin: float = 0.2  # beta of Eq. 23
negatives: str = "hardest"  # hardest, mean or random
rivals: int = -1  # hardest of so many random negatives, 0 is the whole batch (the paper); -1 is the scale's
warmup_epochs: float = -1.0  # epochs of random negatives first; -1 is the scale's (0 in the paper)
dropout: float = -1.0  # of the word embeddings; -1 is the scale's
vision: str = ""  # a timm name in place of the scale's picture backbone
vision_weights: str = ""  # safetensors file for it, or hub
text_weights: str = ""  # folder or hub name whose WordPiece vocabulary is used
proposals: str = "auto"  # regions by auto, selective_search or grid
regions: int = 0  # proposals a picture; 0 is the scale's
width: int = 0  # d_1, the joint space; 0 is the scale's (1024)
embed: int = 0  # d_2, the words; 0 is the scale's (300)
sim: int = 0  # width of a similarity vector; 0 is the scale's (256)
epochs: int = 0  # 0 is the scale's
batch_size: int = 0  # 0 is the scale's
lr: float = 0.0  # 0 is the scale's
precision: str = ""  # no, bf16 or fp16; empty is the scale's
score_precision: str = "fp32"  # fp32, or bf16 for the heavy products of the final ranking
threads: int = 0  # of torch on a CPU; 0 leaves them as they are

# %% jupyter={"source_hidden": true}
from finematch.config import parameters, root

p = parameters(
    globals(), scale={"tiny", "paper"}, seed=(0, 2**31), depth=(-1, 48), self_attention={"word", "channel", "softmax"},
    relation={"nodes", "raw", "softmax"}, graph_norm={"", "none", "layer", "batch"}, cross={"attend", "gate"},
    gate_pool={"mean", "max"}, cross_scale=(0, 1000), node_gate={"scalar", "element"}, node_weights={"raw", "l1"},
    loss_score={"sigmoid", "logit"}, margin=(1e-6, 100), negatives={"hardest", "mean", "random"}, rivals=(-1, 65536), warmup_epochs=(-1, 1000),
    dropout=(-1, 0.95), proposals={"auto", "selective_search", "grid"}, regions=(0, 1000), width=(0, 8192), embed=(0, 8192),
    sim=(0, 8192), epochs=(0, 1000), batch_size=(0, 65536), lr=(0, 1), precision={"", "no", "bf16", "fp16"},
    score_precision={"fp32", "bf16"}, threads=(0, 256),
)  # fmt: skip

# %%
import time

import torch

from finematch.evaluation.grounding import grounding
from finematch.evaluation.retrieval import karpathy_protocol, retrieval_blocks
from finematch.models.hslm import HSLM, SWITCHES, settings, tile_scores
from finematch.tables import write_metrics
from finematch.training import Plan, check_writable, fit, join_processes, leave_to_first, seed_everything
from finematch.workbench import attended_phrases, open_bench

join_processes()
if p.threads:
    torch.set_num_threads(p.threads)
s = settings(p.scale, p.dataset, p.as_dict())
folder = root() / p.out
check_writable(folder, room=10_000_000)
s

# %% [markdown]
# ## The data
#
# Regions are extracted once and shared by all runs: the published detector's arrays at scale `paper`; elsewhere proposals, with the pooled
# features of a frozen network.

# %%
bench = open_bench(
    dataset=p.dataset, data_root=root() / p.data_root, cache=root() / p.cache, scale=p.scale, backbone="regions", text="gru",
    vision=p.vision, vision_weights=p.vision_weights, text_weights=p.text_weights, proposals=p.proposals, regions=s["regions"],
    smoke=p.smoke,
)  # fmt: skip
{name: f"{len(side.records)} pictures, {len(side.captions)} captions" for name, side in bench.splits.items()}

# %% [markdown]
# ## The model

# %%
train, val, side = (bench.splits[name] for name in ("train", "val", bench.reported))
steps_per_epoch = len(train.captions) // s["batch_size"]
seed_everything(p.seed)
model = HSLM(
    train.regions.features.shape[-1], len(bench.tokenizer),
    **{name: getattr(p, name) for name in SWITCHES if name not in s},
    **{name: s[name] for name in ("width", "embed", "sim", "depth", "graph_norm", "cross_scale", "dropout", "rivals")},
    warmup_steps=round(s["warmup_epochs"] * steps_per_epoch),
)  # fmt: skip
print(
    f"{sum(q.numel() for q in model.parameters()) / 1e6:.2f} M parameters, {steps_per_epoch} steps an epoch"
)


# %% [markdown]
# ## Before training
#
# Where does a word look before anything is learned? Phrases that people have linked to boxes tell: the region that a phrase attends to most
# is compared with its boxes (the pointing game, and IoU of at least 0.5). Nothing in training ever sees these links.


# %%
def alignment() -> dict[str, float]:
    """Grounding of the cross attention, `{}` where there is none or where no phrase has boxes."""
    phrases = attended_phrases(bench, side, model.attend) if model.pairs.cross_attn else []
    if not any(len(phrase.boxes) for phrase in phrases):
        return {}
    return grounding(phrases, split=f"{p.dataset} {bench.reported}")


model.eval()
untrained = alignment()
untrained

# %% [markdown]
# ## Training
#
# > "the operator [z]+ = max(0,z) compares the tolerance value with zero [...] we only use the hard negatives in each mini-batch"
#
# With the hardest negatives a model from scratch can sit on a plateau: every score equal, the loss at exactly 2 B margin. The log names it
# (`plateau`: share of an epoch's steps that sat there). `warmup_epochs` of random negatives lead out of it.
# The epoch with the best rsum on *val* is kept; where val itself is reported, the last one.


# %%
def ranked(which, *, pictures: int = 0, **options) -> dict:
    b = min(pictures or len(which.records), len(which.records))
    image_of = which.image_of[which.image_of < b]
    scorer = tile_scores(
        model,
        which.pictures.batch,
        which.texts.batch,
        dtype=torch.bfloat16 if p.score_precision == "bf16" else None,
    )
    return retrieval_blocks(scorer, b, len(image_of), image_of, block=1000, **options)


def val_metrics(_) -> dict[str, float]:
    found = ranked(val, pictures=s["val_pictures"])
    return {k: found[k] for k in ("i2t_r1", "t2i_r1", "rsum")}


plan = Plan(epochs=s["epochs"], batch_size=s["batch_size"], lr=s["lr"], optimizer="adam", weight_decay=0.0, schedule="step",
            milestones=tuple(range(s["decay_every"], s["epochs"], s["decay_every"])), clip_norm=s["clip_norm"],
            precision=s["precision"], seed=p.seed)  # fmt: skip
summary = fit(model, train.pairs(), plan, folder, evaluate=val_metrics, select=bench.select)
leave_to_first()  # of several processes (torchrun); else nothing
stuck = [line["epoch"] for line in summary["history"] if line["plateau"] > 0.5]
if stuck:
    print(
        f"On the plateau (every score alike) in epochs {stuck}: if that includes the last, raise warmup_epochs or lower lr."
    )

# %% [markdown]
# ## Evaluation
#
# Every picture against every caption, ranked by the logit (a sigmoid near 1 would make ties), and the alignment again.

# %%
started = time.monotonic()
metrics = ranked(side, split=f"{p.dataset} {bench.reported}")
pairs, seconds = len(side.records) * len(side.captions), time.monotonic() - started
print(f"{pairs:,} pairs in {seconds:.1f} s: {pairs / seconds:,.0f} pairs a second")
if p.dataset == "coco_karpathy" and len(side.records) == 5000:  # 1K: five folds of the 5,000, averaged
    folds = ranked(side, **karpathy_protocol("coco1k", 5000))
    metrics |= {f"coco1k_{k}": v for k, v in folds.items() if k.startswith(("i2t", "t2i", "rsum"))}
for when, found in (("before", untrained), ("after", alignment())):
    metrics |= {f"grounding_{k}_{when}": v for k, v in found.items() if "/" not in k}
metrics

# %%
metrics |= {"best_epoch": summary["best_epoch"], "plateau_epochs": len(stuck)}
resolved = {
    **p.as_dict(),
    **{k: v for k, v in s.items() if k in p.as_dict()},
    "smoke": p.smoke,
    **bench.facts,
}
write_metrics(folder, resolved, metrics, seconds=summary["seconds"])
