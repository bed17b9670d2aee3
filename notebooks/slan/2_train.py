# %% [markdown]
# # SLAN: one training run
#
# **Paper** *SLAN: Self-Locator Aided Network for Vision-Language Understanding* (ICCV 2023; arXiv 2211.16208, version 1, with the appendix). Every
# row of Tables 6 and 7 and of the appendix's Tables 9 and 10 is this notebook with other parameters; `grids/slan_*.csv` lists them.
#
# | scale | data | cost of one run |
# |---|---|---|
# | `smoke` | 160 pictures | seconds; the numbers mean nothing |
# | `tiny`, scenes | 4,000 pictures of 64 px, maps of a frozen network that has read the captions | 4 minutes on two cores, after 5 for what all runs share |
# | `tiny`, flickr8k | 6,000 photos, maps of a frozen MobileNetV2 | 45 minutes on one core |
# | `paper` | COCO or Flickr30k, or shards of several caption sets for pretraining; ResNet-50 or a ViT, BERT, batch 640 to 1,280 | GPUs (the paper does not say how many) |
#
# **Expected** on scenes: retrieval far above chance, and boxes that move. Whether they move to what is named is measured level by level below; the
# numbers of the reference runs stand in the README's generated table. The run writes `metrics.json` last: that file, not this page, is the proof
# that it succeeded.

# %% tags=["parameters"]
dataset: str = "scenes"  # scenes, flickr8k, flickr30k, coco_karpathy
data_root: str = "data"  # folder above the dataset's own
scale: str = "tiny"  # tiny or paper
seed: int = 0  # of the start, the order, the dropout and the masks
out: str = "papermill_runs/slan_train"  # the run's folder
smoke: bool = False  # run everything in seconds
cache: str = "data/cache"  # backbones and maps that runs share
version: str = "iccv"  # iccv or arxiv: sets proposals, scaling and token where they are left empty
levels: int = -1  # adaptors L, 0 to 3; -1 is the scale's (3)
top: int = -1  # T of the filter, 0 keeps all; -1 is the scale's (10)
threshold: float = -1.0  # h of the filter; -1 is the scale's (0.5)
source: str = "decoder"  # decoder or encoder: where the maps of all levels come from (arXiv, Table 10)
frozen: bool = False  # the proposals are not trained (Table 6, row 1)
detector: str = ""  # weights of the proposals: a file, or boxes: trained on the boxes of the train split
pretrained: str = ""  # best.safetensors of a run to begin with: fine-tuning, or see zero_shot
zero_shot: bool = False  # evaluate `pretrained` as it is; nothing is trained
shards: str = ""  # pretraining data, as name:folder pairs with commas; in place of the dataset's train split
proposals: str = ""  # rpn or queries (reading S28); empty is the version's
attn: str = "transformer"  # transformer or literal (S1)
region_update: str = "residual"  # residual, overwrite or reweight (S2)
axes: str = "image"  # image or paper (S3)
unit: str = "N/K"  # N/K or N (S5)
extent: str = "map"  # map or region (S6)
k: int = 3  # cells of a neighbourhood, a side; odd (S7)
cell_weights: str = "softmax"  # softmax, raw or relu: weights M of Eq. 2 (S8)
outside: str = "mean"  # mean or keep: cells outside the picture (S8)
include_special: bool = False  # CLS and SEP count as words (S9)
first: str = "encoder"  # encoder or decoder: where E^G_1 comes from (S10)
scaling: str = ""  # rank, query, level or predicted (S11); empty is the version's
box_grad: bool = True  # gradients reach the boxes through RoI pooling (S12)
detach_target: bool = True  # the target of Eq. 3 is held fixed (S13)
reg_reduction: str = "sum"  # sum or mean over regions (S14)
nms: float = 0.0  # IoU of suppression, 0 is none (S16)
score_norm: str = "max"  # max, minmax or sigmoid (S17)
filter_text: bool = False  # the filter reads the text (S19)
token: str = ""  # map or regions: T_v of the contrast (S20); empty is the version's
fused: str = "regions"  # regions or map: T_v of matching (S20)
target: str = "mean"  # mean or weighted: the target of Eq. 3 (S28)
embed_norm: str = "layer"  # layer or none
roi: str = "align"  # align or table: RoI pooling
queue: int = -1  # pairs of the contrast's queues, 0 is the batch alone (S21); -1 is the scale's
momentum: float = 0.995  # of the momentum encoders; 0 is none
same_picture: bool = True  # captions of one picture are all positives
reduction: str = "sum"  # sum or mean of the two directions (S22)
distil: float = 0.0  # share of momentum distillation
mlm: str = "positions"  # positions or pooled (S25)
mlm_picture: bool = True  # T_v joins the masked word's state
random_negatives: float = -1.0  # share of the steps whose wrong pairs are random (S24); -1 is the scale's
match_score: str = "odds"  # odds or logit: what ranks a pair
itc_weight: float = 1.0  # weights of the four losses of Eq. 8-9 (S37)
itm_weight: float = 1.0  # image-text matching
mlm_weight: float = -1.0  # masked words; -1 is the scale's (1 in the paper; 0 where a run is retrieval alone)
reg_weight: float = -1.0  # Eq. 3; -1 is the scale's (1 in the paper)
rerank: int = 0  # candidates that the matching head ranks again; 0 is the scale's
rank_score: str = "itm"  # itm or itm+itc
vision: str = ""  # a timm name in place of the scale's picture backbone (resnet50 in the paper)
vision_weights: str = ""  # safetensors file for it, or hub; empty is random at the paper's scale
text_weights: str = ""  # folder or hub name of the BERT, or of its vocabulary at scale tiny
size: int = 0  # side of the pictures in pixels, at scale paper; 0 is the scale's (224, fine-tuning 384)
width: int = 0  # D; 0 is the scale's
encoder_epochs: int = -1  # epochs of the contrast alone before; -1 is the scale's (0 in the paper)
epochs: int = 0  # 0 is the scale's
batch_size: int = 0  # 0 is the scale's
lr: float = 0.0  # 0 is the scale's
precision: str = ""  # no, bf16 or fp16; empty is the scale's
workers: int = -1  # processes that read pictures, beside each that trains; -1 is the scale's (4 in the paper)
checkpoint_steps: int = -1  # a checkpoint at least every so many steps, 0 is one an epoch; -1 is the scale's
threads: int = 0  # of torch on a CPU; 0 leaves them as they are

# %% jupyter={"source_hidden": true}
from finematch.config import parameters, root

p = parameters(
    globals(), scale={"tiny", "paper"}, seed=(0, 2**31), version={"iccv", "arxiv"}, levels=(-1, 12), top=(-1, 1000), threshold=(-1, 1),
    source={"decoder", "encoder"}, proposals={"", "rpn", "queries"}, attn={"transformer", "literal"},
    region_update={"residual", "overwrite", "reweight"}, axes={"image", "paper"}, unit={"N/K", "N"}, extent={"map", "region"}, k=(1, 15),
    cell_weights={"softmax", "raw", "relu"}, outside={"mean", "keep"}, first={"encoder", "decoder"},
    scaling={"", "rank", "query", "level", "predicted"}, reg_reduction={"sum", "mean"}, nms=(0, 0.99),
    score_norm={"max", "minmax", "sigmoid"}, token={"", "map", "regions"}, fused={"regions", "map"}, target={"mean", "weighted"},
    embed_norm={"layer", "none"}, roi={"align", "table"}, queue=(-1, 2**20), momentum=(0, 0.99999), reduction={"sum", "mean"},
    distil=(0, 0.99), mlm={"positions", "pooled"}, random_negatives=(-1, 1), match_score={"odds", "logit"}, itc_weight=(0, 100), itm_weight=(0, 100),
    mlm_weight=(-1, 100), reg_weight=(-1, 100), rerank=(0, 10000), rank_score={"itm", "itm+itc"}, size=(0, 4096), width=(0, 4096), encoder_epochs=(-1, 1000), epochs=(0, 1000),
    batch_size=(0, 65536), lr=(0, 1), precision={"", "no", "bf16", "fp16"}, workers=(-1, 256), checkpoint_steps=(-1, 10**6), threads=(0, 256),
)  # fmt: skip

# %%
import json
import time

import torch

from finematch.data.pairs import to_pixels
from finematch.data.shards import ShardPairs
from finematch.evaluation.grounding import grounding
from finematch.evaluation.reranking import reranked_retrieval
from finematch.evaluation.retrieval import retrieval
from finematch.tables import write_metrics
from finematch.models.slan.locator import load_proposals
from finematch.models.slan.objective import pair_scorer, world
from finematch.models.slan.run import (
    build,
    by_contrast,
    detector_file,
    plan,
    settings,
    switches,
    train_encoders,
)
from finematch.training import check_writable, fit, join_processes, leave_to_first, to_device
from finematch.workbench import accelerator, embed, located_phrases, open_bench

join_processes()
if p.zero_shot and not p.pretrained:
    raise ValueError(
        "zero_shot evaluates what another run has trained: give its best.safetensors as `pretrained`"
    )
if p.size and p.scale == "tiny":
    raise ValueError(
        f"size = {p.size}: at scale tiny the maps are those of pictures of one size; leave it at 0"
    )
if p.threads:
    torch.set_num_threads(p.threads)
s = settings(p.scale, p.dataset, p.as_dict())
folder = root() / p.out
check_writable(folder, room=10_000_000)
s

# %% [markdown]
# ## The data
#
# At scale `tiny` the picture encoder is frozen and its maps are made once: on scenes it is a network that has read which words the train captions
# hold, on photos a MobileNetV2 trained on ImageNet. Neither was told where anything is. At scale `paper` pixels come in and the encoder is trained.

# %%
bench = open_bench(
    dataset=p.dataset, data_root=root() / p.data_root, cache=root() / p.cache, scale=p.scale, backbone="maps", text="bert",
    width=s["width"], depth=s["text_depth"], heads=s["text_heads"], size=s["size"], stages=s["maps"], vision=p.vision,
    vision_weights=p.vision_weights, text_weights=p.text_weights, smoke=p.smoke,
)  # fmt: skip
train, val, side = (bench.splits[name] for name in ("train", "val", bench.reported))
data = train.pairs()
if p.shards:  # `data.shards.write_shards` makes them; an epoch has every picture of every set once
    if bench.maps:
        raise ValueError("shards hold pictures, and this scale reads cached maps: use scale='paper'")
    sets = dict(part.split(":", 1) for part in p.shards.split(","))
    data = ShardPairs(
        {name: root() / where for name, where in sets.items()},
        to_pixels(s["size"], (0.0,) * 3, (1.0,) * 3),
        bench.tokenizer,
    )
    print(*data.mixture(), sep="\n")
steps_per_epoch = data.steps(s["batch_size"], world()) if p.shards else len(data) // s["batch_size"]
{name: f"{len(part.records)} pictures, {len(part.captions)} captions" for name, part in bench.splits.items()}

# %% [markdown]
# ## A detector
#
# Table 6 begins with proposals that were "loaded from COCO detection" and the appendix's Table 9 goes on from them. On scenes a detector is trained for it:
# the same proposal network, on the true boxes of the train split. All other runs never see a box.

# %%
weights = root() / p.detector if p.detector else None
if p.detector == "boxes":
    weights = detector_file(bench, s, p.as_dict(), root() / p.cache)
    print(json.loads((weights.parent / "recall.json").read_text()))

# %% [markdown]
# ## The model
#
# The lesson takes it apart; here `slan.run.build` puts it together with the random weights of the seed.

# %%
model = build(bench, s, p.as_dict(), steps_per_epoch=steps_per_epoch).to(accelerator())
if weights:
    load_proposals(model.locator.proposals, weights, decoder=model.locator.decoder)
if p.pretrained:
    print(
        f"Begins with {p.pretrained}; heads of only one of the two: {model.load_pretrained(root() / p.pretrained)}"
    )
parameters = sum(q.numel() for q in model.parameters() if q.requires_grad)
print(f"{parameters / 1e6:.2f} M parameters to train, {steps_per_epoch} steps an epoch")

# %% [markdown]
# ## The encoders
#
# The paper's BERT comes trained, its vision encoder begins with random weights ("all random initialized") and meets 14 million pictures twenty times. A
# small run has no such time: where `encoder_epochs` is above 0, the contrast trains the text tower and the projection of the frozen maps first,
# without a locator. Runs of one seed share this: it stands in the cache.

# %%
if not p.pretrained:
    train_encoders(model, bench, data, s, p.as_dict(), root() / p.cache)


# %% [markdown]
# ## Before training
#
# Does the locator *locate*? For every phrase that people have linked to boxes, each level's boxes are scored by their cosine with the phrase's words
# (the best word counts), and the best box is compared with the true ones: its centre inside (pointing), IoU of at least 0.5 (R@1). Nothing in training
# ever sees these links. Level 0 are the proposals. Beside a level stand a random one of its boxes (chance), the best of them (upper bound), and the box
# in the middle of the picture (centre).


# %%
def grounded() -> dict[str, float]:
    """Grounding of each level's boxes, `{}` where no phrase has boxes."""
    device, found = next(model.parameters()).device, {}

    def locate(pictures: dict, texts: dict) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        at = model.locate(
            model.encode_image(**to_device(pictures, device)), model.encode_text(**to_device(texts, device))
        )
        return at.boxes, at.cosine, at.valid

    model.eval()
    for level, phrases in enumerate(located_phrases(bench, side, locate)):
        one = grounding(phrases, split=f"{p.dataset} {bench.reported}")
        found |= {f"level{level}_{name}": value for name, value in one.items() if "/" not in name}
    return found


untrained = grounded()
LOOK = ("pointing", "chance_pointing", "r1", "chance_r1", "upper_bound", "centre_r1", "centre_pointing")
{name: round(value, 1) for name, value in untrained.items() if name.partition("_")[2] in LOOK}

# %% [markdown]
# ## Training
#
# > "L_all = L_ds + L_reg"
#
# Three passes through the locator a step: the true pair, two wrong ones for each (matching), and the masked sentence. The log has each term. The
# epoch with the best rsum on *val* is kept (the contrast alone, of all of val: re-ranking it each epoch would take as long as training); where val
# itself is reported, the last one. With `zero_shot` there is nothing to train, and the "after" of the boxes is their "before".

# %%
summary = {"best_epoch": 0, "seconds": 0.0} if p.zero_shot else fit(
    model, data, plan(s, epochs=s["epochs"], seed=p.seed), folder, evaluate=lambda m: by_contrast(m, bench), select=bench.select,
)  # fmt: skip
leave_to_first()  # of several processes (torchrun); else nothing

# %% [markdown]
# ## Evaluation
#
# Every picture and every caption is ranked by the contrast; the best of each list are ranked again by the matching head, which has seen picture and
# sentence together.

# %%
started = time.monotonic()
image, text = embed(model, side)
contrast = retrieval(image, text, side.image_of, split=f"{p.dataset} {bench.reported}")
metrics = {f"itc_{name}": contrast[name] for name in ("i2t_r1", "t2i_r1", "rsum")}
if p.itm_weight:
    scorer = pair_scorer(model, side.pictures.batch, side.texts.batch, block=256)
    metrics |= reranked_retrieval(image, text, side.image_of, scorer, k=s["rerank"], score=p.rank_score,
                                  split=f"{p.dataset} {bench.reported}", progress=p.scale == "paper")  # fmt: skip
    seconds = time.monotonic() - started
    print(f"{metrics['pairs']:,} pairs in {seconds:.1f} s: {metrics['pairs'] / seconds:,.0f} a second")
else:
    metrics |= contrast
trained = untrained if p.zero_shot else grounded()
metrics |= {f"grounding_{name}_before": value for name, value in untrained.items()}
metrics |= {f"grounding_{name}_after": value for name, value in trained.items()}
metrics

# %%
metrics |= {"best_epoch": summary["best_epoch"]}
resolved = {
    **p.as_dict(),
    **{k: v for k, v in s.items() if k in p.as_dict()},
    **{k: v for k, v in switches(s, p.as_dict()).items() if k in ("proposals", "scaling", "token")},
    "smoke": p.smoke,
    **bench.facts,
}
write_metrics(folder, resolved, metrics, seconds=summary["seconds"])
