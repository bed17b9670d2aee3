# %% [markdown]
# # FELGA: one training run
#
# **Paper** *FELGA: Unsupervised Fragment Embedding for Fine-Grained Cross-Modal Association* (WACV 2024). Every row of Tables 1 to 5 is this notebook
# with other parameters; `grids/felga_*.csv` lists them. Rows with `features` of `whole` or `proposals` are the paper's baselines: the frozen model
# without training.
#
# | scale | data | cost of one run |
# |---|---|---|
# | `smoke` | 160 images | seconds (once half a minute more, for the small CLIP and the keywords); the numbers mean nothing |
# | `tiny`, scenes | 4,000 images of 64 px, 10 proposals and 10 keywords each | training 74 to 117 s on one thread (FELGA of `felga_variants`); fragments are made once for all runs |
# | `tiny`, flickr8k | 6,000 photos to train on, COCO images to report on | training 507 to 946 s on one thread (FELGA of `felga_variants`); before the first run more than an hour for selective search, keywords and features |
# | `paper` | COCO 2017 or 2014 (`dataset` coco, coco2014), DETReg's proposals, CLIP, BLIP or BLIP-2; FENet of 21 M parameters, 50 epochs | a GPU; the paper: one V100 |
#
# **Expected** on scenes, test: the numbers of [RESULTS.md](../../RESULTS.md), section "FELGA: Labels of FENet, on CLIP", row FELGA: above the frozen
# fragments in both tasks; with `train_keywords=all`, the text's, above them in object discovery alone. The run writes `metrics.json` last: that file, not this page, is the proof that it succeeded.
#
# A number in brackets behind a parameter, such as (F1), is the number of a reading, listed in `1_lesson`: a place where the paper can be read in several ways.

# %% tags=["parameters"]
dataset: str = "scenes"  # flickr8k reports on COCO: scenes | flickr8k | coco | coco2014
data_root: str = "data"  # folder that holds the datasets' folders
scale: str = "tiny"  # tiny or paper; on photo data sets tiny uses the preset `photos`
reading: str = None  # readings of the paper; literal at scale paper: default | literal
seed: int = 0  # random seed; rows without training do not depend on it
out: str = ""  # folder of the run; empty: papermill_runs/<method>/<dataset>.<scale>.<digest of the run>
resume: str = ""  # empty: continue this run, refuse another; fresh: start over; replace: only if it differs
smoke: bool = False  # run everything in seconds; the numbers mean nothing
cache: str = "data/cache"  # folder of the models, proposals, keywords and features that runs share
report: str = "test"  # reported split; val is for choosing settings on scenes: test | val
features: str = "fenet"  # features of fragments: whole and proposals are frozen, fenet is trained
labels: str = None  # pseudo-labels (Eq. 3, 4, 6): dense | dynamic | sparse; default dynamic
alignment: str = None  # losses: local (Eq. 10), global (Eq. 12) or both (Eq. 13); default both
label_features: str = None  # features that Eq. 4-6 compare: frozen | online; default frozen (F9)
fenet: str = None  # one FENet for both modalities, or one each: shared | separate; default shared (F12)
input_scale: str = None  # length of the vectors that FENet takes: rms | unit; default rms (F13)
activation: str = None  # place of ReLU and dropout in FENet: between | every; default between (F13)
loss: str = None  # over what Eq. 10 and 12 sum: anchor | batch | pair; default anchor; literal batch (F1)
literal_scale: bool = None  # keep the outer sums of Eq. 10 and 12, for batch alone; default False (F1)
hinge: bool = None  # use the hinge of the lifted structured loss; default False (F2)
tau: float = None  # temperature of the losses; default 1 (F4)
empty: str = None  # fragments without positives or negatives: skip | keep; default skip (F5)
lambda1: float = None  # margin of Eq. 10; no gradient without hinge; default 0.5
lambda2: float = None  # margin of Eq. 12; no gradient without hinge; default 0.5
lambda3: float = None  # weight of the global loss in Eq. 13; default 0.2
global_negatives: str = None  # negatives of Eq. 12: distinct | all; default distinct; literal all (F26)
same_keyword_positives: bool = None  # the same keyword in other texts is a positive; default False (F10)
vlp: str = ""  # frozen model: clip, blip, blip2, hub name or folder; empty: small CLIP at tiny, else clip
vlp_precision: str = None  # of the frozen model: auto | no | bf16 | fp16; tiny no, photos no, paper auto
text: str = "joined"  # a text: the captions of an image, joined, or each of its captions (F20)
prompt: str = "name"  # class names as queries: the bare name, or a photo of a ... (F21)
proposals: str = "auto"  # auto, selective_search, grid, a DETReg checkpoint, or boxes (COCO results)
keywords: str = "keybert"  # how keywords are found: keybert | words
train_keywords: str = None  # keywords that FENet learns from: nouns | all; default nouns; literal all (F25)
keyword_model: str = ""  # model of KeyBERT: hub name or folder; empty: the packaged MiniLM
regions: int = None  # proposals per image; default 10
words: int = None  # keywords per text; default 10
crop_score: str = "max"  # BLIP-2's vectors of a crop: the best of them scores, or their mean: max | mean (F16)
hidden_dim: int = None  # hidden width of FENet; tiny 256, photos 1024, paper 4096
out_dim: int = None  # width of the embeddings; tiny 128, photos 256, paper 512
dropout: float = None  # dropout in FENet; default 0.2
epochs: int = None  # passes over the training pairs; tiny 12, photos 8, paper 50
milestone: float = None  # epoch of the step to a tenth of lr; tiny 10, photos 6, paper 40
batch_size: int = None  # pairs per step; default 8
lr: float = None  # learning rate; default 0.1
momentum: float = None  # momentum of SGD; default 0.9
weight_decay: float = None  # weight decay of SGD; default 0.0005
precision: str = None  # mixed precision; auto: bf16 if a GPU has it: auto | no | bf16 | fp16; default auto
threads: int = 0  # threads of torch on a CPU; 0 leaves torch's own number
tracker: str = ""  # shows losses and metrics: tensorboard, wandb, mlflow, trackio, comet_ml or aim; empty: none

# %% jupyter={"source_hidden": true}
from finematch.config import located, root, settings

s = settings(globals(), "felga")
s

# %%
import time
from functools import partial

import pandas as pd
import torch
from IPython.display import display

from finematch.data import digests
from finematch.data.fragment_sets import open_fragment_sets
from finematch.evaluation.average_precision import lexical_relevance
from finematch.evaluation.fragments import (
    NAMED,
    AnnotatedPhrases,
    Gallery,
    frozen,
    phrase_grounding,
    tasks,
    vectors,
)
from finematch.features.detreg import open_proposals
from finematch.features.fragments import (
    PROMPTS, document, extract_keywords, noun_finder, open_vlp, picture_fragments, provenance, text_fragments, text_records,
    whole_pictures, whole_texts,
)  # fmt: skip
from finematch.features.inputs import minilm_folder
from finematch.features.proposals import extract_proposals, given
from finematch.features.small_clip import open_small_clip
from finematch.models.configs import FELGAConfig
from finematch.models.felga import FELGA, FragmentPairs
from finematch.runs import begin
from finematch.text import keyword_method
from finematch.training import (
    Plan,
    accelerator,
    fit,
    join_processes,
    leave_to_first,
    precision_on,
    seed_everything,
)

join_processes()
if s.threads:
    torch.set_num_threads(s.threads)
trained = s.features == "fenet"

# %% [markdown]
# ## The fragments
#
# > "The top-10 proposals are treated as the visual entities proposals [...] The top-10 keywords are treated as the semantic concept proposals"
#
# Region proposals of every image, keywords of every text (the captions of an image, joined), and features of both from the frozen model (Eq. 2). They are
# made once and kept in the cache. The training records carry no ground-truth boxes and no class names, so that training cannot use them.

# %%
# a name of a file or folder is a path below the workbook's folder; any other name stays as it is
files = {name: located(getattr(s, name)) for name in ("vlp", "proposals", "keyword_model")}
sets = open_fragment_sets(s.dataset, root() / s.data_root, root() / s.cache, report=s.report, smoke=s.smoke)
cache = root() / s.cache / (s.dataset + ("-smoke" if s.smoke else ""))
cache.mkdir(parents=True, exist_ok=True)
print(f"{len(sets.train)} image-text pairs to train on; gallery: {sets.name}, {len(sets.gallery)} images, "
      f"{len(sets.categories)} classes; annotated phrases: {sets.annotated_name or 'none, grounding is not measured'}")  # fmt: skip

# %% [markdown]
# **The frozen networks**: a vision-language model that embeds images and texts into one space, the source of region proposals, and the
# source of keywords.

# %%
small = not files["vlp"] and s.scale == "tiny"
name = (open_small_clip(sets, s.dataset, cache, networks=root() / s.cache, smoke=s.smoke) if small
        else files["vlp"] or "clip")  # fmt: skip
vlp = open_vlp(name, precision=precision_on(accelerator(), s.vlp_precision)).to(accelerator())
detector = open_proposals(
    files["proposals"], scale=s.scale, weights=root() / s.data_root / "weights", device=accelerator()
)
train_texts, picture_of = text_records(sets.train, s.text)
texts = [document(record) for record in train_texts]
minilm = (files["keyword_model"] or minilm_folder()) if s.keywords == "keybert" else ""
keywords_of = keyword_method(s.keywords, model=minilm, train=texts, top=s.words)
learned_of = keywords_of  # of the training texts; the gallery's are all words in any case
if s.train_keywords == "nouns":
    learned_of = keyword_method(s.keywords, model=minilm, train=texts, top=s.words, nouns=noun_finder(s.dataset))

propose = partial(extract_proposals, method=detector, cache=cache / "proposals", top=s.regions,
                  min_side=5 if s.dataset == "scenes" else 8)  # fmt: skip
find_keywords = partial(extract_keywords, cache=cache / "keywords")
crops = partial(picture_fragments, model=vlp, cache=cache / "fragments")  # features of boxes
words = partial(text_fragments, model=vlp, cache=cache / "fragments")  # and of words

# %% [markdown]
# **What FENet learns from**: regions and keywords of the training pairs, one vector each. The paper takes all of KeyBERT's keywords, of which most
# name no object; we take its nouns, because description assignment asks which object a box shows (`train_keywords`, F25). The gallery keeps all
# keywords in either case.

# %%
train_boxes = propose(sets.train, split="train")
train_regions = crops(sets.train, train_boxes, split="train")
train_keywords = words(find_keywords(texts, learned_of, split="train"), split="train_keywords")
width = train_regions.features.shape[-1]

# %% [markdown]
# **What FENet is measured on**: the fragments of the gallery, or whole images and texts in rows with `features="whole"`; the queries of both tasks, which
# are class names and ground-truth boxes; and annotated phrases with the proposals of their images. In rows without training
# all vectors that BLIP-2 has of a crop are kept (`several`).
#
# On photos the class names are COCO's 80. Where the training texts come from another data set they hardly occur in them: 47 of the 80 names
# stand in at most 10 of Flickr8k's 6,000 texts (40, where synonyms count too), and what no text names cannot be learned. So each mean over
# classes has a second one beside it, over the classes that at least 60 training texts name, by name, synonym or plural (F29).

# %%
several = not trained and s.crop_score == "max" and vlp.queries > 1
crops = partial(crops, queries=several)
gallery_records, several_texts = text_records(sets.gallery, s.text)
gallery_texts = [document(record) for record in gallery_records]
if s.features == "whole":
    regions = whole_pictures(sets.gallery, vlp, cache / "fragments", f"{s.report}_whole", queries=several)
    keywords = whole_texts(gallery_texts, vlp, cache / "fragments", f"{s.report}_whole")
else:
    boxes = propose(sets.gallery, split=s.report)
    regions = crops(sets.gallery, boxes, split=s.report)
    keywords = words(find_keywords(gallery_texts, keywords_of, split=s.report), split=f"{s.report}_keywords")
gallery = Gallery(
    sets.gallery, sets.categories, regions=regions, keywords=keywords,
    boxes=crops(sets.gallery, given(sets.gallery), split=f"{s.report}_objects"),
    classes=words([[PROMPTS[s.prompt].format(name)] for name in sets.categories], split="classes"),
    synonyms=sets.synonyms, name=sets.name, texts=gallery_records if several_texts else None,
    said=lexical_relevance(texts, sets.categories, synonyms=sets.synonyms).sum(1).tolist(),
)  # fmt: skip
few = sum(count <= 10 for count in gallery.said)
print(f"{few} of the {len(gallery.said)} classes are named in at most 10 of the {len(texts)} training texts; the means called "
      f"`named` are over the {sum(count >= NAMED for count in gallery.said)} classes that {NAMED} or more name")  # fmt: skip
annotated = None
if sets.annotated and s.features != "whole":
    if [r.image for r in sets.annotated] != [r.image for r in sets.gallery]:
        boxes = propose(sets.annotated, split="annotated")
        regions = crops(sets.annotated, boxes, split="annotated")
    phrases = [[r.captions[a.caption][a.start : a.end] for a in r.phrases] for r in sets.annotated]
    annotated = AnnotatedPhrases(
        sets.annotated, boxes, regions, words(phrases, split="phrases"), sets.annotated_name
    )

facts = {
    "reported": sets.name, "linked": sets.annotated_name, "vectors_a_crop": vectors(gallery.boxes),
    **provenance(vlp, train_boxes, keywords_of), "regions_a_picture": float(train_boxes.mask.sum(1).mean()),
    "keywords_a_text": float(train_keywords.mask.sum(1).mean()), "distinct_keywords": len(train_keywords.features),
}  # fmt: skip
facts

# %% [markdown]
# ## The run
#
# A run is its settings, its data and its features together: their digest is its identity, and its folder carries a part of it. A folder that
# holds a run with other settings, data or features is refused.

# %%
made = {"train_regions": train_regions, "train_keywords": train_keywords, "regions": gallery.regions, "keywords": gallery.keywords,
        "boxes": gallery.boxes, "classes": gallery.classes}  # fmt: skip
if annotated is not None:
    made |= {"annotated_regions": annotated.regions, "annotated_phrases": annotated.phrases}
parts = {"train": sets.train, "gallery": sets.gallery, "annotated": sets.annotated}
run = begin(
    "felga", s, data={name: digests(records) for name, records in parts.items()},
    features={name: fragments.meta for name, fragments in made.items()}, out=s.out, resume=s.resume,
)  # fmt: skip
run.folder

# %% [markdown]
# ## Before training
#
# Both tasks with the frozen features of the fragments. Each mAP stands beside the mAP of a random order. Object discovery ranks images for a class
# name, and description assignment ranks texts for a ground-truth box. The paper does not say which texts are relevant to a box, so all three readings
# are reported: texts of images with an object of the box's class (`category`, which claims are judged by), texts that name the class (`lexical`), and
# the text of the box's own image only (`instance`). A tie counts against the model, and texts tie whenever they share their best keyword. A
# random order has no ties, so the column to compare with it is `ties at random`, the mean over all orders of the tied items.
#
# Phrase grounding is measured too: does the proposal most similar to an annotated phrase lie on the phrase's box?

# %%
KINDS = {
    "object discovery": "discovery", "description assignment, category": "assignment",
    "description assignment, lexical": "assignment_lexical", "description assignment, instance": "assignment_instance",
}  # fmt: skip


def beside(**columns: dict) -> pd.DataFrame:
    """The mAP of each task in several states, with ties at random, and of a random order; queries with ties."""
    shown = {}
    for name, found in columns.items():
        shown[name] = [found[f"{k}_map"] for k in KINDS.values()]
        shown[f"{name}, ties at random"] = [found[f"{k}_expected"] for k in KINDS.values()]
    shown["random order"] = [found[f"{k}_random"] for k in KINDS.values()]
    shown["queries with ties"] = [found[f"{k}_ties"] for k in KINDS.values()]
    return pd.DataFrame(shown, index=list(KINDS))


def grounded(found: dict, when: str) -> dict:
    """Metrics of annotated phrases, without those of single kinds of phrases; {} where there are none."""
    return {f"grounding_{k}_{when}": v for k, v in found.items() if "/" not in k and k != "protocol"}


started = time.monotonic()
before = tasks(gallery, frozen, frozen)
located = phrase_grounding(annotated, frozen, frozen)
print(
    f"{before['protocol']}\n{located.get('protocol', 'Grounding is not measured.')}\n{time.monotonic() - started:.1f} s"
)
beside(frozen=before).round(2)

# %% [markdown]
# ## FENet
#
# FENet has three layers over frozen features and is one network for both modalities. The baselines have no FENet and keep the frozen features.
# BLIP-2 gives 32 vectors of a crop. FENet takes their mean, and so do the numbers before training. In the rows `whole` and
# `proposals` the best of the 32 counts, as in BLIP-2's own score (`crop_score`, F16). CLIP and BLIP give one vector.
#
# With local alignment the page prints two shares of the pseudo-labels: the pairs of a region and a keyword that are positive, and the regions without
# any positive keyword. Dense labels make every pair positive, sparse labels one region of each keyword, and dynamic labels the pairs above the mean.

# %%
model = None
if trained:
    data = FragmentPairs.of(train_regions, train_keywords, picture_of).to(accelerator())
    seed_everything(s.seed)
    model = FELGA(width, FELGAConfig.of(s))
    size = sum(q.numel() for q in model.parameters()) / 1e6
    print(f"{size:.2f} M parameters, {len(data) // s.batch_size} steps an epoch")
share = {}
if trained and s.alignment != "global" and s.label_features == "frozen":
    positive = alone = 0
    for start in range(0, len(data), 1000):
        batch = data.__getitems__(list(range(start, min(start + 1000, len(data)))))
        image, text = batch["image"], batch["text"]
        of_pair = model.pseudo_labels(image["features"], text["features"], image["mask"], text["mask"])
        positive += int(of_pair.sum())
        alone += int((image["mask"] & ~of_pair.any(2)).sum())
    seen = train_regions.mask if picture_of is None else train_regions.mask[picture_of]
    real = (seen.sum(1) * train_keywords.mask.sum(1)).sum()
    share = {"labels_positive": 100 * positive / real, "labels_empty_regions": 100 * alone / seen.sum()}
    print(f"{s.labels} labels: {share['labels_positive']:.1f} % of the pairs of fragments are positive, "
          f"{share['labels_empty_regions']:.1f} % of the regions have no keyword")  # fmt: skip

# %% [markdown]
# ## Training
#
# > "The SGD optimizer is employed with 0.9 momentum and 0.0005 weight decay. The training batch size $N$ is 8. [...] The total training epoch is 50.
# > All the methods are trained with an initial learning rate of 0.1 and it will be decreased by a factor of 0.1 at the 40-th epoch."
#
# The paper names no val set, and its test set is COCO's val. No epoch is selected: the last one is kept, here as in the paper. We do not decay
# biases; the paper does not say. In the log `fragment` is Eq. 10, `global` Eq. 12 and `loss` Eq. 13. The minimum of none of them is zero.

# %%
summary = {"seconds": 0.0, "best_epoch": 0}
if trained:
    plan = Plan(epochs=s.epochs, batch_size=s.batch_size, lr=s.lr, optimizer="sgd", momentum=s.momentum,
                weight_decay=s.weight_decay, schedule="step", milestones=(s.milestone,), precision=run.precision,
                seed=s.seed)  # fmt: skip
    summary = fit(model, data, plan, run.folder, identity=run.digest, tracker=s.tracker)
else:
    print(f"features={s.features!r}: nothing is trained")
leave_to_first()  # of several processes (torchrun); else nothing

# %% [markdown]
# ## After training
#
# The same tasks with the embeddings. Every distinct fragment is embedded once.

# %%
started = time.monotonic()
metrics, moved = before, {}
if trained:
    metrics = tasks(gallery, model.encode_regions, model.encode_words)
    moved = phrase_grounding(annotated, model.encode_regions, model.encode_words)
seconds = time.monotonic() - started
(beside(frozen=before, FENet=metrics) if trained else beside(frozen=before)).round(2)

# %%
if moved:
    keys = ["pointing", "r1", "r5", "r10"]
    pair = {"frozen": located, "FENet": moved}
    table = pd.DataFrame({name: [found[k] for k in keys] for name, found in pair.items()}, index=keys)
    table["chance"] = [located[f"chance_{k}"] for k in keys]
    table["centre"] = [located.get(f"centre_{k}") for k in keys]
    print(
        f"Best proposal: {located['upper_bound_pointing']:.1f} (pointing), {located['upper_bound']:.1f} (R@k)"
    )
    display(table.round(2))

# %% [markdown]
# ## Metrics
#
# A phrase is located among proposals, so the row `whole` has no grounding. A trained row also records the numbers before training
# (`frozen_discovery_map`, ...), so that one file shows the gain.

# %%
for name, found in (("before", located), ("after", moved)):
    metrics = metrics | grounded(found, name)
if trained:
    metrics |= (
        {f"frozen_{k}_{what}": before[f"{k}_{what}"] for k in KINDS.values() for what in ("map", "expected")}
        | {"best_epoch": summary["best_epoch"]}
        | share
    )
    metrics |= {"evaluation_seconds": seconds}
run.finish(metrics, seconds=summary["seconds"], facts=facts)

# %% [markdown]
# Previous: [felga/1_lesson](1_lesson.ipynb) · Next: [felga/3_ablations](3_ablations.ipynb)
