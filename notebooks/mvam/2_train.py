# %% [markdown]
# # MVAM: one training run
#
# **Paper** *MVAM: Multi-View Attention Method for Fine-grained Image-Text Matching* (arXiv 2402.17237). Every row of Tables 1 to 5 is this notebook
# with other parameters; `grids/mvam_*.csv` lists them.
#
# | scale | data | cost of one run |
# |---|---|---|
# | `smoke` | 160 pictures | seconds; the numbers mean nothing |
# | `tiny`, scenes | 4,000 images of 64 px | training 132 to 237 s on one thread (row 16 of `mvam_views`), after 3 minutes for the backbone that all runs share |
# | `tiny`, flickr8k | 6,000 photos, frozen MobileNetV2 | training 447 to 525 s on one thread in bf16, which a CPU takes only when asked now (MiniLM +MVAM of `mvam_photos`), after 4 minutes of extraction |
# | `paper` | COCO or Flickr30k, batch 1024, 20 epochs | 8 GPUs |
#
# **Expected** on scenes, test: the R@1 of [RESULTS.md](../../RESULTS.md), section "MVAM: Number of views", row 16. In text-to-image R@1 the model beats a bag
# of words that is given the true labels; in image-to-text R@1 it does not (`0_start_here` measures that baseline). The run writes `metrics.json` last: that
# file, not this page, is the proof that it succeeded.
#
# A number in brackets behind a parameter, such as (M1), is the number of a reading, listed in `1_lesson`: a place where the paper can be read in several ways.

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
cache: str = "data/cache"  # folder of the backbones, features and text states that runs share
backbone: str = None  # image features: grid | regions | clip; tiny regions, photos grid, paper regions
text: str = "bert"  # text tower: bert | gru | minilm | clip
pooling: str = None  # how token states are pooled to one vector: attention | cls | mean | mvam; default mvam
views: int = None  # number of view codes; default 16
total_dim: int = None  # width of the image vector and of the caption vector; tiny 512, photos 512, paper 1024
projection: str = None  # linear layer before the views: split | shared | full; default split (M1)
view_dim: int = None  # width of a view where projection is shared; default 64
scoring: str = None  # score of a code and a token (Eq. 7): dot | scaled | tanh; default dot (M2)
include_special: bool = None  # views may attend to [IMG], [CLS] and [SEP]; default True (M3)
diversity: str = None  # diversity loss (Eq. 10, Eq. 11): base | none | sqrt; default base
diversity_weight: float = None  # weight lambda of the diversity loss; tiny 0.01, photos 0.01, paper 10 (-)
diversity_power: int = None  # power of the norm of Eq. 10-11: 2 | 1; default 2 (M4)
diversity_reduce: str = None  # reduction of the diversity loss over the batch: mean | sum; default mean (M4)
normalise: str = None  # where vectors are scaled to unit length: after | per_view; default after (M6)
reduction: str = None  # how Eq. 6 joins its two directions: mean | sum; default mean (M5)
same_picture_positives: bool = None  # other captions of the same image are positives; default False (M11)
tau: float = None  # initial temperature, learnable; default 0.07 (M7)
ensemble: int = 1  # number of independent models; 16 is the control of Table 3
vision: str = ""  # timm name of another backbone; on scenes mini_vit_base, _large, _huge
vision_weights: str = ""  # safetensors file of the network `vision`, or hub
text_weights: str = ""  # folder or hub name of the text model
clip_weights: str = ""  # folder or hub name of a CLIP; empty: the published one at scale paper, else from scratch
proposals: str = "auto"  # auto, selective_search, grid, or a file or folder of boxes (COCO results)
regions: int = None  # proposals per image; tiny 20, photos 36, paper 36
width: int = None  # width of the Transformers trained from scratch; tiny 128, photos 256, paper 768
depth: int = None  # layers of the Transformers trained from scratch; tiny 1, photos 0, paper 12
places: bool = True  # the image Transformer is told where regions lie (M18)
input_dropout: float = None  # dropout of channels of frozen features; tiny 0, photos 0.3, paper 0 (-)
epochs: int = None  # passes over the training pairs; tiny 4, photos 5, paper 20
batch_size: int = None  # pairs per step; tiny 128, photos 128, paper 1024
lr: float = None  # learning rate (stage 2); tiny 0.001, photos 0.001, paper 0.0001
stage1_lr: float = None  # learning rate of stage 1, with clip_weights; default 0.001
weight_decay: float = None  # weight decay of AdamW; tiny 0.05, photos 0.05, paper 0.01
warmup: float = None  # share of the steps with a rising learning rate; default 0.1
precision: str = None  # mixed precision; auto: bf16 if a GPU has it: auto | no | bf16 | fp16; default auto
workers: int = 0  # processes that read the data beside the training process
threads: int = 0  # threads of torch on a CPU; 0 leaves torch's own number
tracker: str = ""  # shows losses and metrics: tensorboard, wandb, mlflow, trackio, comet_ml or aim; empty: none

# %% jupyter={"source_hidden": true}
from finematch.config import root, settings

s = settings(globals(), "mvam")
s

# %%
import time

import pandas as pd
import torch

from finematch.data import digests
from finematch.data.pairs import RegionSource
from finematch.data.splits import data_folder, open_records, open_splits, reported_split, selection
from finematch.encoders import CLIPText, CLIPVision, TokenTransformer, open_clip_model, text_tower
from finematch.evaluation.embedding import embed, validation
from finematch.evaluation.retrieval import karpathy_protocol, retrieval
from finematch.features import inputs
from finematch.models.configs import MVAMConfig
from finematch.models.mvam import MVAM, ensemble as concatenated, view_statistics
from finematch.runs import begin
from finematch.training import Plan, fit, join_processes, leave_to_first, seed_everything, to_device

join_processes()
if s.threads:
    torch.set_num_threads(s.threads)
started = time.monotonic()

# %% [markdown]
# ## The data and the features
#
# The default run, scale `tiny` on scenes:
#
# | data | features | image tower | text tower | model |
# |---|---|---|---|---|
# | 4,000 / 500 / 500 images of 64 px, 5 captions each | 20 regions of selective search, frozen ResNet-18 | Transformer, 1 layer, width 128 | BERT from scratch, 1 layer, width 128 | MVAM, 16 views, vectors of width 512 |
#
# At scale `tiny` a frozen network looks at every image once, at 20 proposals or at its grid cells; the features stay in the cache, where all runs find
# them. On scenes this network was trained on the ground-truth boxes of the train split and their attributes: shape, colour, size and texture
# (`told="attributes"`). It stands in for bottom-up attention, a detector that was trained on labelled boxes; the matcher itself sees only captions.
# With `vision=mini_vit_base` a small ViT takes its place, whose 64 patches are the cells. It learned which words the captions of an image hold,
# and no box: it stands in for the paper's ViT, which ImageNet taught. At scale `paper`
# the regions are the published arrays of a detector, which carry captions of their own. A CLIP reads pixels.
# With `proposals=<file>` the regions are boxes of a detector, in COCO's results format, at either scale.

# %%
cache = root() / s.cache
data_root = data_folder(s.dataset, root() / s.data_root, cache, smoke=s.smoke)
inputs.check_together(s.backbone, s.text)
if s.backbone == "clip":
    records = open_records(s.dataset, data_root, report=s.report, smoke=s.smoke)
    source, tokenizer, processor = inputs.open_clip(
        s.dataset, data_root, weights=s.clip_weights, scale=s.scale
    )
    images = inputs.clip_images(records, source, processor)
elif inputs.reads(s) == "arrays":
    arrays = inputs.published_regions(s.dataset, data_root, report=s.report, smoke=s.smoke)
    records = {name: a.records() for name, a in arrays.items()}
    images = {name: RegionSource(a) for name, a in arrays.items()}
else:
    records = open_records(s.dataset, data_root, report=s.report, smoke=s.smoke)
    network = inputs.frozen_network(
        s.dataset, data_root, cache, told="attributes", scale=s.scale, vision=s.vision, weights=s.vision_weights,
        smoke=s.smoke,
    )  # fmt: skip
    kind = "cells" if s.backbone == "grid" else "regions"
    images = inputs.region_images(
        records, network, cache, kind=kind, regions=s.regions, proposals=s.proposals
    )

# %% [markdown]
# Captions are token ids, or, with `text=minilm`, the cached token states of a frozen MiniLM.

# %%
if s.text == "minilm":
    texts, tokenizer = inputs.caption_states(records, s.text_weights or inputs.minilm_folder(), cache)
else:
    if s.text != "clip":
        tokenizer = inputs.open_tokenizer(s.dataset, data_root, scale=s.scale, weights=s.text_weights)
    texts = inputs.caption_tokens(records, tokenizer)
splits, reported = open_splits(records, images, texts), reported_split(records)
pd.DataFrame(
    {name: {"images": len(part.records), "captions": len(part.captions)} for name, part in splits.items()}
)

# %% [markdown]
# ## The towers and the model
#
# Two towers give token states; MVAM pools their token states (Eq. 7 to 9, for images and for captions). An ensemble of N (Table 3) is N independent models with N
# seeds, each with 1/N of the width and one view. Everything else is one model.


# %%
def build(member: int) -> tuple[MVAM, torch.nn.Module | None]:
    """A model with the weights of its seed, and the CLIP whose towers it has, if any."""
    seed_everything(s.seed * 1000 + member)
    clip = open_clip_model(source) if s.backbone == "clip" else None
    if clip:
        vision, text = CLIPVision(clip), CLIPText(clip)
    else:
        regions, words = images["train"], texts["train"]
        vision = TokenTransformer(regions.width, width=s.width, depth=s.depth, input_dropout=s.input_dropout,
                                  boxes=s.places and regions.places is not None)  # fmt: skip
        text = text_tower(
            s.text, words.width if s.text == "minilm" else len(tokenizer), width=s.width, depth=s.depth,
            weights=(s.text_weights or "bert-base-uncased") if s.scale == "paper" else "", input_dropout=s.input_dropout,
        )  # fmt: skip
    return MVAM(vision, text, MVAMConfig.of(s, total_dim=s.total_dim // s.ensemble)), clip


if s.total_dim % s.ensemble:
    raise ValueError(f"an ensemble of {s.ensemble} does not divide total_dim = {s.total_dim}")
if s.ensemble > 1 and s.pooling == "mvam":
    raise ValueError("the members of an ensemble have one view each (Table 3): give pooling=attention")
model, clip = build(0)
print(f"{sum(q.numel() for q in model.parameters()) / 1e6:.2f} M parameters, "
      f"representation {s.ensemble} x {s.total_dim // s.ensemble}")  # fmt: skip

# %% [markdown]
# ## The run
#
# A run is its settings, its data and its features together: their digest is its identity, and its folder carries a part of it. A folder that
# holds a run with other settings, data or features is refused.

# %%
run = begin(
    "mvam", s, data={name: digests(part) for name, part in records.items()}, features=inputs.origin(images), out=s.out,
    resume=s.resume,
)  # fmt: skip
run.folder


# %% [markdown]
# ## Training
#
# The epoch with the best rsum on *val* is kept. Where val itself is reported (a dataset without a test split here), the last epoch is kept
# instead: selecting the epoch on the reported split would be optimistic.
#
# > "For MVAM-CLIP, we train it in 2 stages: firstly training view codes with the fixed CLIP model [...], and secondly fine-tuning all parameters"
#
# With a pretrained CLIP (given, or at scale paper the published one), stage 1 of MVAM trains the codes and, necessarily, the projection before them and the temperature (reading M8).
# +Attn and [CLS] are the paper's Base-CLIP, which has one rate: they are trained in one stage. The paper does not print the optimiser and its
# rates (M9): ours is AdamW, and a gradient longer than 1 is cut to that length.


# %%
def plan(lr: float, epochs: int, member: int) -> Plan:
    return Plan(epochs=epochs, batch_size=s.batch_size, lr=lr, weight_decay=s.weight_decay, warmup=s.warmup,
                clip_norm=1.0, precision=run.precision, workers=s.workers, seed=s.seed * 1000 + member)  # fmt: skip


def train(m: MVAM, where, member: int) -> dict:
    data = splits["train"].pairs()
    rest = {"identity": run.digest, "select": selection(records), "tracker": s.tracker,
            "evaluate": lambda of: validation(of, splits["val"])}  # fmt: skip
    pretrained = s.backbone == "clip" and isinstance(source, str)  # a name, not the shape of one from scratch
    if not pretrained or s.pooling != "mvam":
        return fit(m, data, plan(s.lr, s.epochs, member), where, **rest)
    first = max(1, s.epochs // 2)
    codes = fit(m, data, plan(s.stage1_lr, first, member), where / "stage1",
                trainable=lambda name: not name.startswith(("vision.", "text.")), **rest)  # fmt: skip
    whole = fit(m, data, plan(s.lr, max(1, s.epochs - first), member), where / "stage2", **rest)
    return whole | {"seconds": codes["seconds"] + whole["seconds"]}


test = splits[reported]
vectors, seconds = [], 0.0
for member in range(s.ensemble):
    if member:
        model, clip = build(member)
    summary = train(model, run.folder / f"member{member}" if s.ensemble > 1 else run.folder, member)
    seconds += summary["seconds"]
    vectors.append(embed(model, test))
leave_to_first()  # of several processes (torchrun); else nothing

# %% [markdown]
# ## Evaluation
#
# Retrieval over the whole split in both directions, and what the views do: the entropy of each (1 is uniform) and the mean overlap of two.

# %%
image, words = (concatenated(list(part)) for part in zip(*vectors, strict=True))
metrics = retrieval(image, words, test.image_of, split=f"{s.dataset} {reported}")
if s.dataset == "coco_karpathy" and len(test.records) == 5000:  # 1K: five folds of the 5,000, averaged
    folds = retrieval(image, words, test.image_of, **karpathy_protocol("coco1k", 5000))
    metrics |= {f"coco1k_{k}": v for k, v in folds.items() if k.startswith(("i2t", "t2i", "rsum"))}

with torch.no_grad():
    for kind, encode, source in (
        ("image", model.encode_image, test.images),
        ("text", model.encode_text, test.texts),
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
if clip:  # the folder opens as a published CLIP does
    for part in (clip, tokenizer, processor):
        part.save_pretrained(run.folder / "encoder")
metrics["best_epoch"] = summary["best_epoch"]
run.finish(metrics, seconds=seconds, facts={"reported_split": reported})

# %% [markdown]
# Previous: [mvam/1_lesson](1_lesson.ipynb) · Next: [mvam/3_ablations](3_ablations.ipynb)
