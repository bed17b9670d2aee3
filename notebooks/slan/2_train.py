# %% [markdown]
# # SLAN: one training run
#
# **Paper** *SLAN: Self-Locator Aided Network for Vision-Language Understanding* (ICCV 2023; arXiv 2211.16208, version 1, with the appendix). Every
# row of Tables 6 and 7 and of the appendix's Tables 9 and 10 is this notebook with other parameters; `grids/slan_*.csv` lists them.
#
# | scale | data | cost of one run |
# |---|---|---|
# | `smoke` | 160 pictures | seconds; the numbers mean nothing |
# | `tiny`, scenes | 4,000 images of 64 px, maps of a frozen network trained on the captions | training 5 to 11 minutes on one thread (3 adaptors, from scratch or over a detector), after 5 minutes for what all runs share |
# | `tiny`, flickr8k | 6,000 photos, maps of a frozen MobileNetV2 | training 1,868 s on one thread (3 adaptors of `slan_photos`, one seed), after the encoders |
# | `paper` | COCO or Flickr30k, or shards of several caption sets for pretraining; ResNet-50 or a ViT, BERT, batch 640 to 1,280 | GPUs (the paper does not say how many) |
#
# **Expected** on scenes, test: the R@1 of [RESULTS.md](../../RESULTS.md), section "SLAN: Proposals and number of adaptors", row "trainable, 3". That
# row sets `score_norm=minmax`; the page's default, `max`, had the same sum of recalls in one run on val, over a frozen detector (`benchmarks/recipes.csv`). Both directions are far above chance, and neither beats a bag of words that is given the true labels (`0_start_here` measures that baseline). Proposals from scratch
# do not converge to the objects that the caption mentions, also with the region-word contrast (S41), which is on by default; over a detector's proposals words find their boxes with it. This is measured level by level below. The run writes `metrics.json` last: that file, not this page, is the
# proof that it succeeded.
#
# A number in brackets behind a parameter, such as (S17), is the number of a reading, listed in `1_lesson`: a place where the paper can be read in several
# ways. (4.1) and (A.3) are sections of the paper, and (-) is a reading without a number.

# %% tags=["parameters"]
dataset: str = "scenes"  # scenes, flickr8k, flickr30k or coco_karpathy
data_root: str = "data"  # folder that holds the datasets' folders
scale: str = "tiny"  # tiny or paper; on photo data sets tiny uses the preset `photos`
reading: str = None  # readings of the paper; literal at scale paper: default | literal
seed: int = 0  # random seed of initialisation, sampling order, dropout and masks
out: str = ""  # folder of the run; empty: papermill_runs/<method>/<dataset>.<scale>.<digest of the run>
resume: str = ""  # empty: continue this run, refuse another; fresh: start over; replace: only if it differs
smoke: bool = False  # run everything in seconds; the numbers mean nothing
report: str = "test"  # reported split; choose settings on val (scenes) or dev, held out of train: test | val | dev
cache: str = "data/cache"  # folder of the backbones and maps that runs share
version: str = "iccv"  # version of the paper; where unset, it sets proposals, scaling, token: iccv | arxiv
levels: int = None  # number of region adaptors, L; default 3
scales: str = None  # scales of a plain ViT's pyramid, coarse to fine; empty: 1/2, 1, 2 ...; default none
decoder_levels: int = None  # maps of the vision decoder, which the proposals read; default 3
pyramid: int = None  # channels of the decoder's maps; tiny 32, photos 48, paper 256
top: int = None  # regions that the filter keeps, T; 0 keeps all; default 10
threshold: float = None  # lowest score that the filter keeps, h; default 0.5
source: str = None  # source of the feature maps of all levels: decoder | encoder; default decoder (A.3)
frozen: bool = None  # the proposals are not trained (Table 6, row 1); default False
detector: str = ""  # a detector's weights; boxes: train one on ground truth; a .json: its boxes
pretrained: str = ""  # best.safetensors of the run to begin with
zero_shot: bool = False  # evaluate `pretrained` as it is; nothing is trained
unseen: str = ""  # scenes' held-out combinations; empty: all; pretrain: none; test: in every test image
shards: str = ""  # pretraining data, as name:folder pairs with commas, in place of the train split
proposals: str = None  # source of the region proposals: rpn | queries; default rpn (S28)
anchor_offset: float = None  # place of an anchor in its cell; 0: as in torchvision; default 0.5
query_heads: int = None  # attention heads of the query Transformer; tiny 4, photos 4, paper 8
query_depth: int = None  # layers of the query Transformer; tiny 1, photos 1, paper 6
anchor: float = None  # side of an anchor, in cells of its map (paper: at 224 px); tiny 4, photos 4, paper 8
count: int = None  # proposals per image; tiny 32, photos 100, paper 100
attn: str = None  # attention of Eq. 1: transformer | literal; default transformer; literal literal (S1)
dropout: float = None  # dropout of the adaptors' attention; tiny 0, photos 0.1, paper 0
heads: int = None  # attention heads of the adaptors; tiny 4, photos 4, paper 12
region_update: str = None  # Alg. 1: residual | overwrite | reweight; default residual; literal overwrite (S2)
axes: str = None  # order of the axes in Eq. 2: image | paper; default image; literal paper (S3)
unit: str = None  # unit of the shifts of Eq. 2: N/K | N; default N/K; literal N (S5)
extent: str = None  # what gives a neighbourhood its H and W: region | map; default region; literal map (S6)
steer: str = None  # words that M of Eq. 2 compares with: unimodal | fused; default unimodal; literal fused (S41)
k: int = None  # cells of a neighbourhood per side; odd; default 3 (S7)
ratios: str = None  # ratio r of each level, with commas; empty: 1, 1/2, 1/4 ...; default none
cell_weights: str = None  # normalises M of Eq. 2: softmax | raw | relu; default softmax; literal raw (S8)
cell_tau: float = None  # temperature of the softmax of M; default 0.07
outside: str = None  # treatment of cells outside the image: mean | keep; default mean (S8)
include_special: bool = None  # [CLS] and [SEP] count as words; default False (S9)
first: str = None  # source of the first level's E^G_1: encoder | decoder; default encoder (S10)
scaling: str = None  # what factors p_w, p_h belong to: rank | query | level | predicted; default rank (S11)
smallest: float = None  # smallest side of a box, as a share of the image's; default 0.03125
box_grad: bool = None  # gradients reach the boxes; default True (S12)
detach_target: bool = None  # the target of Eq. 3 is held fixed; default True (S13)
reg_reduction: str = None  # reduction of Eq. 3 over regions: sum | mean; default sum (S14)
reg_part: str = None  # what Eq. 3 compares: box | centre; default box (S41)
giou_weight: float = None  # weight of the GIoU term of Eq. 3; default 1 (S14)
l1_weight: float = None  # weight of the L1 term of Eq. 3; default 1 (S14)
nms: float = None  # IoU of non-maximum suppression; 0: none; default 0 (S16)
score_norm: str = None  # normalisation of the filter's scores: max | minmax | sigmoid; default max (S17)
filter_text: bool = None  # the filter reads the text; default False (S19)
weighting: bool = None  # the filter's scores weight the region embeddings; default True
token: str = None  # image token T_v of the contrast: map | regions; default map (S20)
fused: str = None  # image token T_v of the matching head: regions | map; default regions (S20)
target: str = None  # regression target of Eq. 3: mean | weighted; default mean (S28)
embed_norm: str = None  # normalisation of region embeddings: layer | none; default layer; literal none (-)
roi: str = None  # implementation of RoI pooling: align | table; default align (-)
samples: int = None  # sampling points of RoIAlign per side; tiny 4, photos 6, paper 14
queue: int = None  # pairs in the contrast's queues; 0: the batch alone; tiny 0, photos 0, paper 65536 (S21)
contrast: str = None  # tokens of the contrast: unimodal | fused; default unimodal (S20)
embed: int = None  # width of the contrast's vectors; 0: the tokens'; tiny 64, photos 128, paper 256 (S37)
momentum: float = None  # decay of the momentum encoders; 0: none; default 0.995 (S21)
same_picture: bool = None  # captions of one image are all positives; default True; literal False (S21)
learnable_tau: bool = None  # the temperature is trained; default True
tau: float = None  # initial temperature of the contrast; default 0.07 (S21)
reduction: str = None  # how Eq. 6 joins its two directions: sum | mean; default sum (S22)
distil: float = None  # share of momentum distillation; default 0 (S22)
mlm: str = None  # what predicts masked words: positions | pooled; default positions; literal pooled (S25)
mlm_picture: bool = None  # T_v joins the masked word's state; default True (S25)
mask_share: float = None  # share of the words that are masked; default 0.15
random_negatives: float = None  # share of steps with random negatives; tiny 0.4, photos 0.6, paper 0 (S24)
match_score: str = None  # how the matching head scores a pair: odds | logit; default odds (4.1)
itc_weight: float = None  # weight of the contrast; default 1 (S37)
itm_weight: float = None  # weight of matching; default 1 (S37)
mlm_weight: float = None  # weight of masked words; tiny 0, photos 0, paper 1 (S37)
region_word: float = None  # weight of the region-word contrast; default 1; literal 0 (S41)
reg_weight: float = None  # weight of Eq. 3; tiny 0, photos 0, paper 1 (S37)
rerank: int = None  # candidates that are re-ranked; tiny 16, photos 16, paper 128
rank_score: str = "itm"  # score of a re-ranked pair: itm | itm+itc
vision: str = ""  # timm name of another backbone than the default; on scenes mini_vit_base, _large, _huge
vision_weights: str = ""  # safetensors file of the network `vision`, or hub; empty: random at scale paper
text_weights: str = ""  # folder or hub name of the BERT, or of its vocabulary
size: int = None  # side of the images in pixels, at scale paper; tiny 64, photos 224, paper 224
maps: int = None  # maps kept of a frozen network; tiny 2, photos 3, paper 3
stages: str = None  # stages of a network that is trained; tiny none, photos none, paper 2, 3, 4
width: int = None  # width D of all tokens; tiny 64, photos 128, paper 768
text_depth: int = None  # layers of the BERT from scratch; tiny 2, photos 2, paper 12
text_heads: int = None  # attention heads of the BERT from scratch; tiny 4, photos 4, paper 12
encoder_epochs: int = None  # first epochs, trained by the contrast alone; tiny 8, photos 8, paper 0
epochs: int = None  # passes over the training pairs; tiny 2, photos 2, paper 20
batch_size: int = None  # pairs per step; tiny 64, photos 64, paper 1280
lr: float = None  # learning rate; tiny 0.001, photos 0.0005, paper 0.0003
clip_norm: float = None  # largest norm of the gradient; 0 is none; default 0
warmup: float = None  # share of the steps with a rising learning rate; tiny 0.1, photos 0.1, paper 0
schedule: str = None  # lr over time: cosine | linear | constant; tiny cosine, photos cosine, paper linear
weight_decay: float = None  # weight decay of AdamW; default 0.02
precision: str = None  # mixed precision; auto: bf16 if a GPU has it: auto | no | bf16 | fp16; default auto
workers: int = None  # processes that read images; tiny 0, photos 0, paper 4
checkpoint_steps: int = None  # steps between checkpoints; 0: one per epoch; tiny 0, photos 0, paper 500
activation_checkpointing: bool = False  # recompute activations of ViT and BERT: less memory, more time
threads: int = 0  # threads of torch on a CPU; 0 leaves torch's own number
tracker: str = ""  # shows losses and metrics: tensorboard, wandb, mlflow, trackio, comet_ml or aim; empty: none

# %% jupyter={"source_hidden": true}
from finematch.config import root, settings

s = settings(globals(), "slan")
s

# %%
import json
import time
from pathlib import Path
from functools import partial

import pandas as pd
import torch

from finematch.data import digests
from finematch.data.pairs import BoxedSource, to_pixels
from finematch.data.shards import ShardPairs, refuse_overlap
from finematch.data.splits import data_folder, open_records, open_splits, reported_split, selection
from finematch.encoders import BertTower, small_bert
from finematch.evaluation.embedding import embed as embedded, validation
from finematch.evaluation.grounding import grounding
from finematch.evaluation.phrases import annotated_phrases, located_phrases
from finematch.evaluation.reranking import reranked_retrieval
from finematch.evaluation.retrieval import retrieval
from finematch.features import inputs
from finematch.files import digest, file_digest
from finematch.models.configs import SLANConfig
from finematch.models.slan.detector import train_detector
from finematch.models.slan.locator import SelfLocator, locator_config
from finematch.models.slan.proposals import load_proposals
from finematch.models.slan.towers import CachedStages, Towers, pixel_stages
from finematch.losses import world
from finematch.models.slan.matching import Words
from finematch.models.slan.objective import SLAN, pair_scorer
from finematch.models.slan.start import train_encoders
from finematch.runs import begin
from finematch.training import (
    Plan,
    accelerator,
    fit,
    join_processes,
    leave_to_first,
    seed_everything,
    to_device,
)

join_processes()
if s.zero_shot and not s.pretrained:
    raise ValueError(
        "zero_shot evaluates what another run has trained: give its best.safetensors as `pretrained`"
    )
if "size" in s.given and s.scale == "tiny":
    raise ValueError(
        f"size = {s.size}: at scale tiny the maps are those of images of one size; leave it unset"
    )
if s.shards and s.scale == "tiny":
    raise ValueError("shards hold images, and this scale reads cached maps: use scale='paper'")
if s.threads:
    torch.set_num_threads(s.threads)

# %% [markdown]
# ## The data and the features
#
# The default run, scale `tiny` on scenes:
#
# | data | features | image tower | text tower | model |
# |---|---|---|---|---|
# | 4,000 / 500 / 500 images of 64 px, 5 captions each | 2 maps of a frozen ResNet-18 | projection of the maps, width 64 | BERT from scratch, 2 layers, width 64 | region proposal network, 32 proposals, the top 10; 3 region adaptors; contrast and matching |
#
# At scale `tiny` the image encoder is frozen and its maps are made once: on scenes it is a network that was trained to predict the words of the train captions
# (`told="captions"`), on photos a MobileNetV2 trained on ImageNet. Neither was trained on boxes. At scale `paper` pixels come in and the encoder is trained.

# %%
cache = root() / s.cache
data_root = data_folder(s.dataset, root() / s.data_root, cache, smoke=s.smoke)
records = open_records(s.dataset, data_root, report=s.report, smoke=s.smoke, unseen=s.unseen)
if s.scale == "paper":
    see = partial(inputs.pixel_images, size=s.size)
else:
    network = inputs.frozen_network(s.dataset, data_root, cache, told="captions", vision=s.vision, weights=s.vision_weights,
                                    smoke=s.smoke, unseen=s.unseen)  # fmt: skip
    see = partial(inputs.map_images, network=network, cache=cache, stages=s.maps)
# where `detector` is a file of boxes
images = inputs.given_images(records, see(records), s.detector, count=s.count)
boxed = isinstance(images["train"], BoxedSource)
tokenizer = inputs.open_tokenizer(s.dataset, data_root, scale=s.scale, weights=s.text_weights)
splits, reported = (
    open_splits(records, images, inputs.caption_tokens(records, tokenizer)),
    reported_split(records),
)
train, val, test = splits["train"], splits["val"], splits[reported]
pd.DataFrame(
    {name: {"images": len(part.records), "captions": len(part.captions)} for name, part in splits.items()}
)

# %% [markdown]
# Pretraining reads shards of several caption sets in place of the dataset's train split; an epoch has every image of every set once. Shards
# that hold an image of val or of the reported split are refused: Visual Genome contains COCO's.

# %%
data, steps_per_epoch = train.pairs(), len(train.captions) // s.batch_size
shards = {
    name: root() / Path(where).expanduser()
    for name, where in (part.split(":", 1) for part in s.shards.split(",") if part)
}
if shards:  # `data.shards.write_shards` makes them; held-out images must not be in them
    for split in dict.fromkeys(("val", reported)):
        refuse_overlap(shards, records[split], split)
    data = ShardPairs(shards, to_pixels(s.size, (0.0,) * 3, (1.0,) * 3), tokenizer)
    steps_per_epoch = data.steps(s.batch_size, world())
    print(*data.mixture(), sep="\n")

# %% [markdown]
# ## A detector
#
# Table 6 begins with proposals that were "loaded from COCO detection" and the appendix's Table 9 goes on from them. No published detector fits small images
# or a ViT, so `detector=boxes` trains one: the same proposal module (RPN or queries), on the ground-truth boxes of the train split. On scenes these are the
# boxes that were drawn; COCO needs `instances_train2014.json` and `instances_val2014.json` (or 2017's) for the images of its own train split; any other photo
# set needs COCO's train2017 and val2017 themselves. At scale `paper` it is trained on pixels, with the image encoder, for as long as the run. A file of weights
# may be torchvision's `fasterrcnn_resnet50_fpn`, with its image network, for `vision=resnet50` and `anchor_offset=0`. All other runs never see a box.
# A file of boxes in COCO's results format (`detector=<file>.json`, any detector's output) takes the place of the proposals: level 0 is fixed, and
# the filter reads the file's scores.

# %%
schedule = {name: getattr(s, name) for name in ("batch_size", "lr", "weight_decay", "schedule", "warmup", "clip_norm", "precision",
                                                "workers", "checkpoint_steps", "seed")}  # fmt: skip
weights = root() / s.detector if s.detector and not boxed else None
if s.detector == "boxes":
    taught, boxes = inputs.boxed_images(s.dataset, data_root, images, see)
    if s.scale == "paper":
        seed_everything(s.seed)
        encoder = pixel_stages(s.vision, weights=s.vision_weights, stages=s.stages)
        weights = train_detector(cache, taught, boxes, locator_config(s, encoder.channels), encoder=encoder,
                                 plan=Plan(epochs=s.epochs, **schedule))  # fmt: skip
    else:
        weights = train_detector(cache, taught, boxes, locator_config(s, images["train"].channels))
    print(json.loads((weights.parent / "recall.json").read_text()))

# %% [markdown]
# ## The towers and the model
#
# Two encoders (3.1), the self-locator (3.2) and the objective (3.3), with the random weights of the seed. The lesson takes them apart.

# %%
seed_everything(s.seed)
if s.scale == "paper":
    image = pixel_stages(s.vision, weights=s.vision_weights, stages=s.stages)
    text = BertTower(s.text_weights or "bert-base-uncased")
else:
    image = CachedStages(images["train"].channels)
    text = BertTower(small_bert(len(tokenizer), width=s.width, depth=s.text_depth, heads=s.text_heads))
towers = Towers(image, text, s.width)
if s.activation_checkpointing:
    towers.recompute_activations()
locator = SelfLocator(towers.channels, locator_config(s, towers.channels), encoder=image)
if boxed:
    if shards:
        raise ValueError("images of shards bring no boxes: use detector=<file of boxes> without shards")
    locator.take_given()
model = SLAN(
    towers, locator, SLANConfig.of(s, reg_weight=s.reg_weight if s.levels else 0.0), words=Words.of(tokenizer),
    random_steps=round(s.random_negatives * s.epochs * steps_per_epoch),
).to(accelerator())  # fmt: skip
if weights:
    print(load_proposals(locator.proposals, weights, decoder=locator.decoder, encoder=image))
    locator.keep(image)  # frozen proposals read a copy of all that lies below them
if s.pretrained:
    print(
        f"Begins with {s.pretrained}; heads of only one of the two: {model.load_pretrained(root() / s.pretrained)}"
    )
parameters = sum(q.numel() for q in model.parameters() if q.requires_grad)
print(f"{parameters / 1e6:.2f} M parameters to train, {steps_per_epoch} steps an epoch")

# %% [markdown]
# ## The run
#
# A run is its settings, its data, its features and what a detector has learned for it: their digest is its identity, and its folder carries a part of it. A folder that
# holds a run with other settings, data or features is refused. The annotated phrases belong to the data: the boxes are measured on them.

# %%
annotated = annotated_phrases(s.dataset, data_root, reported, records[reported])
made_of = {name: digests(part) for name, part in (records | {"annotated": annotated}).items()}
made_of["shards"] = {name: file_digest(where / "index.json") for name, where in shards.items()}
made = {"detector": weights} if s.detector == "boxes" else {}
run = begin("slan", s, data=made_of, features=inputs.origin(images), made=made, out=s.out, resume=s.resume)
run.folder

# %% [markdown]
# ## The encoders
#
# The paper's BERT comes trained, its vision encoder begins with random weights ("all random initialized") and meets 14 million images twenty times. A
# small run has no such time: where `encoder_epochs` is above 0, the contrast trains the text tower and the projection of the frozen maps first,
# without a locator. Runs of one seed share this: it stands in the cache.

# %%
schedule["precision"] = run.precision
if s.encoder_epochs and not s.pretrained:
    key = {"words": digest(tokenizer.get_vocab()), "maps": inputs.origin(images),
           "data": {name: digests(part) for name, part in records.items()}}  # fmt: skip
    if shards:  # these are trained on
        key["shards"] = made_of["shards"]
    train_encoders(model, data, Plan(epochs=s.encoder_epochs, **schedule), cache, key,
                   evaluate=lambda m: validation(m, val), select=selection(records))  # fmt: skip


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
    of_level = located_phrases(test, annotated, tokenizer, locate, complete=not s.smoke)
    for level, phrases in enumerate(of_level):
        one = grounding(phrases, split=f"{s.dataset} {reported}")
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
# itself is reported, or where the contrast is of fused tokens, the last one. With `zero_shot` there is nothing to train, and the "after" of the boxes is their "before".

# %%
summary = {"best_epoch": 0, "seconds": 0.0} if s.zero_shot else fit(
    model, data, Plan(epochs=s.epochs, **schedule), run.folder, identity=run.digest, evaluate=lambda m: validation(m, val),
    select="epoch" if s.contrast == "fused" else selection(records), tracker=s.tracker,
)  # fmt: skip
leave_to_first()  # of several processes (torchrun); else nothing

# %% [markdown]
# ## Evaluation
#
# Every picture and every caption is ranked by the contrast; the best of each list are ranked again by the matching head, which has seen picture and
# sentence together.

# %%
started = time.monotonic()
image, text = embedded(model, test)
contrast = retrieval(image, text, test.image_of, split=f"{s.dataset} {reported}")
fused = s.contrast == "fused"  # then the vectors above are untrained, and every pair passes the locator
metrics = {} if fused else {f"itc_{name}": contrast[name] for name in ("i2t_r1", "t2i_r1", "rsum")}
if s.itm_weight:
    scorer = pair_scorer(model, test.images.batch, test.texts.batch, block=256)
    k = max(len(image), len(text)) if fused else s.rerank
    metrics |= reranked_retrieval(image, text, test.image_of, scorer, k=k, score=s.rank_score,
                                  split=f"{s.dataset} {reported}", progress=s.scale == "paper")  # fmt: skip
    seconds = time.monotonic() - started
    print(f"{metrics['pairs']:,} pairs in {seconds:.1f} s: {metrics['pairs'] / seconds:,.0f} a second")
else:
    metrics |= contrast
trained = untrained if s.zero_shot else grounded()
metrics |= {f"grounding_{name}_before": value for name, value in untrained.items()}
metrics |= {f"grounding_{name}_after": value for name, value in trained.items()}
metrics

# %%
metrics |= {"best_epoch": summary["best_epoch"]}
run.finish(metrics, seconds=summary["seconds"], facts={"reported_split": reported})

# %% [markdown]
# Previous: [slan/1_lesson](1_lesson.ipynb) · Next: [slan/3_ablations](3_ablations.ipynb)
