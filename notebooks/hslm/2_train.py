# %% [markdown]
# # HSLM: one training run
#
# **Paper** *Learning Hierarchical Semantic Correspondences for Cross-Modal Image-Text Retrieval* (ICMR 2022). Every row of Tables 1 to 4 and
# every depth is this notebook with other parameters; `grids/hslm_*.csv` lists them.
#
# | scale | data | cost of one run |
# |---|---|---|
# | `smoke` | 160 pictures | seconds; the numbers mean nothing |
# | `tiny`, scenes | 4,000 images of 64 px, 20 regions | training 228 to 288 s on one thread (row 12 of `hslm_modules`), after 3 minutes for the backbone and regions that all runs share |
# | `tiny`, flickr8k | 6,000 photos, 36 regions of a frozen MobileNetV2 | training 255 to 296 s (row 1, global) or 737 to 862 s (row 12, the whole model) on one thread, after an hour of selective search |
# | `paper` | Flickr30k or COCO, 36 published regions, batch 128, 40 epochs | a GPU of 11 GB (the paper: one RTX 2080 Ti) |
#
# **Expected** on scenes, test: the numbers of [RESULTS.md](../../RESULTS.md), section "HSLM: Modules", row 12.
# The run writes `metrics.json` last: that file, not this page, is the
# proof that it succeeded.
#
# A number in brackets behind a parameter, such as (H1), is the number of a reading, listed in `1_lesson`: a place where the paper can be read in several ways.

# %% tags=["parameters"]
dataset: str = "scenes"  # scenes, flickr8k, flickr30k or coco_karpathy
data_root: str = "data"  # folder that holds the datasets' folders
scale: str = "tiny"  # tiny or paper; on photo data sets tiny uses the preset `photos`
reading: str = None  # readings of the paper; literal at scale paper: default | literal
seed: int = 0  # random seed of initialisation, sampling order and dropout
out: str = ""  # folder of the run; empty: papermill_runs/<method>/<dataset>.<scale>.<digest of the run>
resume: str = ""  # empty: continue this run, refuse another; fresh: start over; replace: only if it differs
smoke: bool = False  # run everything in seconds; the numbers mean nothing
report: str = "test"  # reported split; choose settings on val (scenes) or dev, held out of train: test | val | dev
cache: str = "data/cache"  # folder of the backbones and features that runs share
mgcn: bool = None  # graph convolution of regions and of words; default True
self_attn: bool = None  # self-attention of the words; default True
cross_attn: bool = None  # words guide the regions; default True
glob: bool = None  # global alignment; default True
loc: bool = None  # local alignment; default True
depth: int = None  # layers of the graph convolution; 0 is the identity; default 4
self_attention: str = None  # how Eq. 6 relates the words: word | channel | softmax; default word (H1)
self_residual: bool = None  # residual connection in Eq. 6; default True; literal False (H2)
relation: str = None  # normalisation of A (Eq. 7-8): nodes | raw | softmax; default nodes (H4)
graph_norm: str = None  # norm after W_r: none | layer | batch; tiny layer, photos layer, paper none (H5)
normalise_graph: bool = None  # scale regions to unit length after the graph; default False (H9)
cross: str = None  # how words and regions meet in Eq. 15: attend | gate; default attend (H10)
gate_pool: str = None  # how a region's gate pools the words' scores, for gate: mean | max; default mean (H10)
cross_scale: float = None  # factor inside the sigmoid of Eq. 16; tiny 10, photos 10, paper 1 (H10)
context_norm: bool = None  # scale the contexts of Eq. 15 to unit length; default True; literal False (H11)
node_gate: str = None  # shape of the gates of Eq. 21: scalar | element; default scalar (H16)
node_weights: str = None  # normalisation of the gates of Eq. 21: raw | l1; default raw (H16)
loss_score: str = None  # score in the loss (Eq. 23): sigmoid | logit; default sigmoid; literal logit (H17)
include_special: bool = None  # [CLS] and [SEP] count as words; default True (H24)
margin: float = None  # margin of the loss, beta of Eq. 23; default 0.2
negatives: str = None  # negatives of Eq. 23: contrastive | hardest | mean | random; default hardest
start: str = None  # negatives of `warmup_epochs`: contrastive | random; default contrastive; literal random (H26)
start_scale: float = None  # factor on the scores of the contrastive loss; default 10
rivals: int = None  # hardest of so many random negatives; 0: of the batch; tiny 0, photos 4, paper 0 (H26)
warmup_epochs: float = None  # first epochs, trained by `start`; tiny 2, photos 1, paper 0 (H26)
dropout: float = None  # dropout of the word embeddings; tiny 0, photos 0.2, paper 0 (H27)
input_dropout: float = None  # share of the region features' channels that an image loses in a step; default 0 (H27)
vision: str = ""  # a timm name in place of the scale's backbone
vision_weights: str = ""  # safetensors file of the network `vision`, or hub
text_weights: str = ""  # folder or hub name whose WordPiece vocabulary is used
proposals: str = "auto"  # auto, selective_search, grid, or a file or folder of boxes (COCO results)
regions: int = None  # proposals per image; tiny 20, photos 36, paper 36
width: int = None  # d_1, width of the joint space; tiny 64, photos 128, paper 1024
embed: int = None  # d_2, width of the word embeddings; tiny 64, photos 128, paper 300
sim: int = None  # width of a similarity vector; tiny 32, photos 32, paper 256
epochs: int = None  # passes over the training pairs; tiny 4, photos 5, paper 40
batch_size: int = None  # pairs per step; tiny 64, photos 64, paper 128
lr: float = None  # learning rate; tiny 0.001, photos 0.001, paper 0.0002
decay_every: int = None  # epochs between steps to a tenth of lr; tiny 3, photos 4, paper 20
clip_norm: float = None  # largest norm of the gradient; 0 is none; default 2
precision: str = None  # mixed precision; auto: bf16 if a GPU has it: auto | no | bf16 | fp16; default auto
val_pictures: int = None  # val images that rank an epoch; 0 is all; tiny 200, photos 200, paper 0
score_precision: str = "fp32"  # precision of the matrix products of the final ranking: fp32 | bf16
threads: int = 0  # threads of torch on a CPU; 0 leaves torch's own number
tracker: str = ""  # shows losses and metrics: tensorboard, wandb, mlflow, trackio, comet_ml or aim; empty: none

# %% jupyter={"source_hidden": true}
from finematch.config import root, settings

s = settings(globals(), "hslm")
s

# %%
import time

import pandas as pd
import torch

from finematch.data import digests
from finematch.data.pairs import RegionSource
from finematch.data.splits import data_folder, open_records, open_splits, reported_split, selection
from finematch.evaluation.grounding import grounding
from finematch.evaluation.phrases import annotated_phrases, attended_phrases
from finematch.evaluation.retrieval import karpathy_protocol, retrieval_blocks
from finematch.features import inputs
from finematch.models.configs import HSLMConfig
from finematch.models.hslm import HSLM, tile_scores
from finematch.runs import begin
from finematch.training import Plan, fit, join_processes, leave_to_first, seed_everything

join_processes()
if s.threads:
    torch.set_num_threads(s.threads)

# %% [markdown]
# ## The data and the features
#
# The default run, scale `tiny` on scenes:
#
# | data | features | image tower | text tower | model |
# |---|---|---|---|---|
# | 4,000 / 500 / 500 images of 64 px, 5 captions each | 20 regions of selective search, frozen ResNet-18 | linear layer, graph of 4 layers, width 64 | word embeddings of width 64, self-attention, graph of 4 layers, bidirectional GRU of width 64 | cross attention, local and global alignment; similarity vectors of width 32 |
#
# Regions are extracted once and shared by all runs: the published detector's arrays at scale `paper`; elsewhere proposals, with the pooled
# features of a frozen network. On scenes this network was trained on the ground-truth boxes of the train split and their attributes: shape, colour, size and
# texture (`told="attributes"`). It stands in for bottom-up attention, a detector that was trained on labelled boxes; the matcher itself sees only captions.
# Captions are token ids. With `proposals=<file>` the regions are boxes of a detector, in COCO's results format, at either scale.

# %%
cache = root() / s.cache
data_root = data_folder(s.dataset, root() / s.data_root, cache, smoke=s.smoke)
if inputs.reads(s) == "arrays":
    arrays = inputs.published_regions(s.dataset, data_root, report=s.report, smoke=s.smoke)
    records = {name: a.records() for name, a in arrays.items()}
    images = {name: RegionSource(a) for name, a in arrays.items()}
else:
    records = open_records(s.dataset, data_root, report=s.report, smoke=s.smoke)
    network = inputs.frozen_network(
        s.dataset,
        data_root,
        cache,
        told="attributes",
        scale=s.scale,
        vision=s.vision,
        weights=s.vision_weights,
        smoke=s.smoke,
    )
    images = inputs.region_images(records, network, cache, regions=s.regions, proposals=s.proposals)
tokenizer = inputs.open_tokenizer(s.dataset, data_root, scale=s.scale, weights=s.text_weights)
splits = open_splits(records, images, inputs.caption_tokens(records, tokenizer))
reported = reported_split(records)
train, val, test = splits["train"], splits["val"], splits[reported]
pd.DataFrame(
    {name: {"images": len(part.records), "captions": len(part.captions)} for name, part in splits.items()}
)

# %% [markdown]
# ## The model

# %%
steps_per_epoch = len(train.captions) // s.batch_size
seed_everything(s.seed)
model = HSLM(
    train.images.width,
    len(tokenizer),
    HSLMConfig.of(s),
    warmup_steps=round(s.warmup_epochs * steps_per_epoch),
)
print(
    f"{sum(q.numel() for q in model.parameters()) / 1e6:.2f} M parameters, {steps_per_epoch} steps an epoch"
)

# %% [markdown]
# ## The run
#
# A run is its settings, its data and its features together: their digest is its identity, and its folder carries a part of it. A folder that
# holds a run with other settings, data or features is refused. The annotated phrases belong to the data: the alignment is measured on them.

# %%
annotated = annotated_phrases(s.dataset, data_root, reported, records[reported])
run = begin(
    "hslm", s, data={name: digests(part) for name, part in (records | {"annotated": annotated}).items()},
    features=inputs.origin(images), out=s.out, resume=s.resume,
)  # fmt: skip
run.folder


# %% [markdown]
# ## Before training
#
# Where does a word look before anything is learned? Phrases with annotated boxes tell: the region that a phrase attends to most
# is compared with its boxes (the pointing game, and IoU of at least 0.5). The matcher never sees these links in training.


# %%
def alignment() -> dict[str, float]:
    """Grounding of the cross attention, `{}` where there is none or where no phrase has boxes."""
    if not model.pairs.cross_attn:
        return {}
    phrases = attended_phrases(test, annotated, tokenizer, model.attend, complete=not s.smoke)
    if not any(len(phrase.boxes) for phrase in phrases):
        return {}
    return grounding(phrases, split=f"{s.dataset} {reported}")


model.eval()
untrained = alignment()
untrained

# %% [markdown]
# ## Training
#
# > "the operator [z]+ = max(0,z) compares the tolerance value with zero [...] we only use the hard negatives in each mini-batch"
#
# With the hardest negatives a model from scratch can sit on a plateau: every score equal, the loss at exactly 2 B margin. The log names it
# (`plateau`: share of an epoch's steps that sat there). `warmup_epochs` with a contrastive loss (`start`, H26) lead out of it.
# The epoch with the best rsum on *val* is kept; where val itself is reported, the last one.


# %%
def ranked(which, *, pictures: int = 0, **options) -> dict:
    b = min(pictures or len(which.records), len(which.records))
    image_of = which.image_of[which.image_of < b]
    scorer = tile_scores(
        model,
        which.images.batch,
        which.texts.batch,
        dtype=torch.bfloat16 if s.score_precision == "bf16" else None,
    )
    return retrieval_blocks(scorer, b, len(image_of), image_of, block=1000, **options)


def val_metrics(_) -> dict[str, float]:
    found = ranked(val, pictures=s.val_pictures)
    return {k: found[k] for k in ("i2t_r1", "t2i_r1", "rsum")}


plan = Plan(epochs=s.epochs, batch_size=s.batch_size, lr=s.lr, optimizer="adam", weight_decay=0.0, schedule="step",
            milestones=tuple(range(s.decay_every, s.epochs, s.decay_every)), clip_norm=s.clip_norm,
            precision=run.precision, seed=s.seed)  # fmt: skip
summary = fit(model, train.pairs(), plan, run.folder, identity=run.digest, evaluate=val_metrics,
              select=selection(records), tracker=s.tracker)  # fmt: skip
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
metrics = ranked(test, split=f"{s.dataset} {reported}")
pairs, seconds = len(test.records) * len(test.captions), time.monotonic() - started
print(f"{pairs:,} pairs in {seconds:.1f} s: {pairs / seconds:,.0f} pairs a second")
if s.dataset == "coco_karpathy" and len(test.records) == 5000:  # 1K: five folds of the 5,000, averaged
    folds = ranked(test, **karpathy_protocol("coco1k", 5000))
    metrics |= {f"coco1k_{k}": v for k, v in folds.items() if k.startswith(("i2t", "t2i", "rsum"))}
for when, found in (("before", untrained), ("after", alignment())):
    metrics |= {f"grounding_{k}_{when}": v for k, v in found.items() if "/" not in k}
metrics

# %%
metrics |= {"best_epoch": summary["best_epoch"], "plateau_epochs": len(stuck)}
run.finish(metrics, seconds=summary["seconds"], facts={"reported_split": reported})

# %% [markdown]
# Previous: [hslm/1_lesson](1_lesson.ipynb) · Next: [hslm/3_ablations](3_ablations.ipynb)
