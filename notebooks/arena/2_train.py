# %% [markdown]
# # The arena: one training run of one entrant
#
# **Papers** MVAM, HSLM and SLAN, and the rivals that they name: a plain two-stream model, *Polysemous Visual-Semantic Embedding* (PVSE, CVPR 2019),
# *Stacked Cross Attention* (SCAN, ECCV 2018), and SAF of *Similarity Reasoning and Filtration* (SGRAF, AAAI 2021). All entrants see the same images and
# captions and train for the same number of minutes on one core. `grids/arena_*.csv` lists the runs; [7_compare](../7_compare.ipynb) draws what came out.
#
# | scale | data | cost of one run |
# |---|---|---|
# | `smoke` | 160 images | seconds; the numbers mean nothing |
# | `tiny`, scenes | 4,000 images of 64 px | 5 minutes of training on one core, and about 3 for ranking and timing; what runs share (frozen networks, regions, maps) comes before |
# | `tiny`, flickr8k | 6,000 photos | 10 minutes of training on one core, and about 5 for ranking and timing |
# | `paper` | Flickr30k or COCO | not calibrated: equal steps for all entrants, see `seconds_a_step` |
#
# **Expected** on scenes, test: retrieval far above chance (R@1 0.2 %) for every entrant. The run writes `metrics.json` last: that file, not this
# page, is the proof that it succeeded.

# %% tags=["parameters"]
dataset: str = "scenes"  # scenes, flickr8k, flickr30k or coco_karpathy
data_root: str = "data"  # folder that holds the datasets' folders
scale: str = "tiny"  # tiny or paper; on photo data sets tiny uses the preset `photos`
reading: str = None  # readings of the papers; literal at scale paper: default | literal
seed: int = 0  # random seed of initialisation, sampling order and dropout
out: str = ""  # folder of the run; empty: papermill_runs/<method>/<dataset>.<scale>.<digest of the run>
resume: str = ""  # empty: continue this run, refuse another; fresh: start over; replace: only if it differs
smoke: bool = False  # run everything in seconds; the numbers mean nothing
report: str = "test"  # reported split; choose settings on val (scenes) or dev, held out of train: test | val | dev
cache: str = "data/cache"  # folder of the backbones and features that runs share
entrant: str = "two-stream"  # what trains: two-stream | pvse | mvam-1 | mvam | scan | saf | hslm-global | hslm | slan
recipe: str = None  # the methods' reading: default | literal; default default; literal literal
backbone: str = None  # image features; SLAN: maps: regions | grid | maps; tiny regions, photos grid, paper regions
regions: int = None  # proposals per image; tiny 20, photos 36, paper 36
proposals: str = "auto"  # auto, selective_search, grid, or a file or folder of boxes (COCO results)
detector: str = ""  # SLAN's proposals; boxes: of a detector trained on ground truth; a .json: its boxes
shortlist: str = ""  # run of a two-stream entrant, whose best are ranked again; empty: none
budget_minutes: float = None  # training on one core; tiny 5, photos 10, paper 600
seconds_a_step: float = None  # measured once, for the budget; default 1
lr_times: float = 1.0  # learning rate over that of the recipe
contrast_share: float = None  # SLAN: share of the rounds that train the encoders by the contrast alone; default 0.8
rounds: int = None  # times that val is ranked in the budget; tiny 5, photos 5, paper 20
batch_size: int = None  # pairs per step; tiny 64, photos 64, paper 128
rerank: int = None  # candidates of the shortlist; tiny 50, photos 50, paper 128
val_pictures: int = None  # val images that rank a round; 0 is all; tiny 200, photos 200, paper 1000
precision: str = None  # mixed precision: auto | no | bf16 | fp16; tiny no, photos no, paper auto
threads: int = 1  # threads of torch on a CPU; 0 leaves torch's own number

# %% jupyter={"source_hidden": true}
from finematch.config import root, settings

s = settings(globals(), "arena")
s

# %%
import pandas as pd
import torch

from finematch import arena
from finematch.data import digests
from finematch.evaluation.cost import parameters
from finematch.evaluation.grounding import grounding
from finematch.evaluation.phrases import annotated_phrases
from finematch.features.inputs import origin
from finematch.runs import begin, open_run

if s.threads:
    torch.set_num_threads(s.threads)

# %% [markdown]
# ## Who competes
#
# | entrant | what it is | recipe | image and caption meet |
# |---|---|---|---|
# | `two-stream` | MVAM's towers (on scenes with its Transformer layer over the regions); the mean of the regions, the mean of the words, a linear layer and tanh on each | MVAM's | in a dot product |
# | `pvse` | [`PVSE`](../../src/finematch/models/rivals.py#L123) with two embeddings an item, of which the best pair counts | MVAM's | in four dot products |
# | `mvam-1` | MVAM with one view (the paper's +Attn) | MVAM's | in a dot product |
# | `mvam` | MVAM with 16 views | MVAM's | in a dot product |
# | `scan` | [`SCAN`](../../src/finematch/models/rivals.py#L253): words attend to regions | HSLM's | word by word |
# | `saf` | [`SAF`](../../src/finematch/models/rivals.py#L315): the same attention, and similarity vectors that are weighted and summed | HSLM's | word by word |
# | `hslm-global` | row 1 of HSLM's Table 4: one vector each, no graph and no attention | HSLM's | in a similarity vector |
# | `hslm` | row 12: the whole model | HSLM's | word by word |
# | `slan` | SLAN with 3 adaptors, which makes its own regions; with `detector` the boxes of a detector, which stays as it is | SLAN's | in a dot product, the best again by a matching head |
#
# A *recipe* is everything that the presets of a method say: widths, loss, optimiser, learning rate, batch. A rival has the recipe of the method whose paper
# names it, and its loss, too, is that method's: MVAM's contrast, or HSLM's contrast and then the hinge on hard negatives. What a method is made of stays its
# own: HSLM has a graph and word self-attention beside its cross attention, PVSE has two more terms of its loss, MVAM its diversity loss. Between the two groups
# much differs at once (batch, widths, layers, loss), so a claim across them compares recipes, not ideas.
#
# * *Nobody is told where a region lies.* HSLM, SCAN and SAF read features alone; MVAM's Transformer could be told (`places`, M18), and is not here.
# * *Learning rates* are the recipe's. No entrant has one of its own: `lr_times` would set it, and a search on val has not been made.
#
# * *Captions* are read by a bidirectional GRU from scratch (SLAN: a small BERT from scratch).
# * *Images* are the region features, or the cells, of one frozen network (SLAN: maps of a network; on photos the same one, on scenes one that has learned from captions, as its
#   locator is to find boxes by itself, while the regions' network has learned from boxes and attributes).
# * *FELGA is not trained here.* It starts from a frozen vision-language model, which has learned to match images and captions already, and learns which keyword
#   of a text belongs to which region; images are ranked by a class name, not by a caption. What it shares with the others, phrases found in images, stands beside
#   them in [7_compare](../7_compare.ipynb), from its own runs.
# * *Models with published weights are not here.* BLIP, MDETR and GLIP were trained on millions of images; their weights cannot be had at equal means.

# %%
entrant = arena.open_entrant(s, root())
model, splits, reported = entrant.model, entrant.inputs.splits, entrant.inputs.reported
label = f"{s.dataset} {reported}"
print(entrant.own._head())
pd.DataFrame(
    {name: {"images": len(part.records), "captions": len(part.captions)} for name, part in splits.items()}
)

# %% [markdown]
# ## The budget
#
# A run that a clock stops cannot be made again bit for bit, and a busy machine would give it fewer steps. So the minutes are counted in steps:
# `seconds_a_step` was measured once, for every entrant alternately on one quiet core of one machine (`benchmarks/arena_step.py`), and the number of steps is
# `budget_minutes` over it. Ranking val between the rounds is not part of the budget; all entrants are ranked on the same images of val. What the steps took in the end is in
# the metrics (`training_cpu_seconds`): a busy machine has slower cores.

# %%
per_round = arena.steps(s)
print(f"{parameters(model) / 1e6:.2f} M parameters; {s.budget_minutes:g} minutes at {s.seconds_a_step:g} s a step: "
      f"{s.rounds} rounds of {per_round:,} steps of {s.batch_size} pairs")  # fmt: skip

# %% [markdown]
# ## The run
#
# A run is its settings, the presets of its method, its data and its features together. A folder that holds another run is refused.

# %%
annotated = annotated_phrases(s.dataset, entrant.inputs.data_root, reported, entrant.test.records)
records = {name: part.records for name, part in splits.items()} | {"annotated": annotated}
run = begin(
    "arena", s, data={name: digests(part) for name, part in records.items()},
    features=origin({name: part.images for name, part in splits.items()}), recipe=entrant.own, made=entrant.made(root()),
    out=s.out, resume=s.resume,
)  # fmt: skip
run.folder


# %% [markdown]
# ## Before training
#
# Where does a word look before anything is learned? Phrases with annotated boxes tell. An entrant without weights on regions (the plain two-stream model,
# and HSLM's global alignment) has no answer.


# %%
def alignment() -> dict[str, float]:
    """Grounding of the entrant's weights on regions, `{}` where it has none."""
    found = arena.phrases(entrant, annotated)
    return grounding(found, split=label) if any(len(phrase.boxes) for phrase in found) else {}


model.eval()
untrained = alignment()
untrained

# %% [markdown]
# ## Training

# %%
summary = arena.train(entrant, run.folder, identity=run.digest, precision=run.precision)

# %% [markdown]
# ## Evaluation
#
# Every image against every caption, as the entrant ranks. An entrant that scores pairs also scores again what the plain two-stream model (`shortlist`) finds
# first: accuracy and cost of both go into the picture of [7_compare](../7_compare.ipynb).

# %%
metrics = arena.ranked(entrant, entrant.test, split=label)
shortlist = open_run(s.shortlist).model if s.shortlist and entrant.pairwise else None
if shortlist is not None:
    again = arena.reranked(entrant, shortlist, split=label)
    metrics |= {f"short_{name}": again[name] for name in ("i2t_r1", "t2i_r1", "rsum")}
for when, found in (("before", untrained), ("after", alignment())):
    metrics |= {f"grounding_{k}_{when}": v for k, v in found.items() if "/" not in k}
metrics

# %% [markdown]
# What a query costs, by the process's own clock where there is one thread: other work on the machine does not count.

# %%
costs = arena.query_costs(entrant, shortlist)
costs

# %%
metrics |= costs | {
    "parameters_m": parameters(model) / 1e6, "steps": summary["steps"], "pairs_seen": summary["steps"] * s.batch_size,
    "best_round": summary["best_epoch"], "training_seconds": summary["seconds"],
    "training_cpu_seconds": summary["cpu_seconds"],
    "training_mib": summary["peak_memory_bytes"] / 2**20,
}  # fmt: skip
run.finish(metrics, seconds=summary["seconds"], facts={"reported_split": reported})

# %% [markdown]
# Previous: [6_explore](../6_explore.ipynb) · Next: [7_compare](../7_compare.ipynb)
