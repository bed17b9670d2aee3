# %% [markdown]
# # SLAN: detection and phrase grounding
#
# **Paper** *SLAN: Self-Locator Aided Network for Vision-Language Understanding* (ICCV 2023; version 1, with an appendix, on arXiv in 2022), section 4.3, Table 4,
# and Figures 1a, 1c and 1d; the appendix's Figure 9 (arXiv) shows two models on one sentence.
#
# | on | cost, one core |
# |---|---|
# | a smoke run | half a minute, from any finished run of `2_train` |
# | `tiny`, scenes | up to five minutes, from the weights of a finished run of `2_train` |
# | `tiny`, flickr8k | COCO's boxes (`task=detection`) or Flickr8k's annotated phrases (`task=grounding`); minutes |
# | `paper` | GPUs; the paper says neither how long nor at which rate it is fine-tuned |
#
# **Expected** Zero-shot, nobody has told the model where anything is, unless the pretrained run reads a detector's proposals (scenes' rows do): its boxes are poor, and so is its AP. The paper's 47 to 50 AP without a single labelled box cannot
# be checked. Fine-tuned on boxes, the head must beat itself with the images shuffled and the baselines that look at no text, or at no image. All of it is printed as measured.

# %% tags=["parameters"]
task: str = "detection"  # boxes of named classes, or of the phrases of captions: detection | grounding
dataset: str = "scenes"  # that of the pretrained run: scenes, flickr8k, flickr30k or coco_karpathy
data_root: str = "data"  # folder that holds the datasets' folders
scale: str = "tiny"  # that of the pretrained run: tiny or paper
reading: str = None  # readings of the paper; literal at scale paper: default | literal
seed: int = 0  # random seed of sampling order and of weights from scratch
out: str = ""  # folder of the run; empty: papermill_runs/<method>/<dataset>.<scale>.<digest of the run>
resume: str = ""  # empty: continue this run, refuse another; fresh: start over; replace: only if it differs
smoke: bool = False  # run everything in seconds; the numbers mean nothing
report: str = "test"  # reported split, where the data have it: test | val
cache: str = "data/cache"  # folder of the backbones and maps that runs share
figures: str = "figures"  # folder of the figures; those that show photos go to the run's folder instead
pretrained: str = "latest"  # folder of a finished run of 2_train, or latest
start: str = "pretrained"  # first weights: that run's, or random ones of its shape: pretrained | scratch
label_score: str = None  # a class's score of a region, from those of its words: mean | max; default mean (S35)
phrase_score: str = None  # a phrase's score of a region, from those of its words: max | mean; default max (S36)
align: str = None  # words that a region is compared with: steering | fused; default steering (S35)
top: int = None  # regions that the filter keeps for detection, T; 0 keeps all; default 100; literal 10 (S35)
threshold: float = None  # lowest score that the filter keeps for detection, h; default 0; literal 0.5 (S35)
grounding_top: int = 0  # regions kept for grounding, T; 0: as the pretrained run (S36)
suppress: float = None  # IoU of non-maximum suppression of a class's boxes; 0: none; default 0.5 (S35)
engine: str = "pycocotools"  # what computes COCO's AP: pycocotools | faster-coco-eval
align_weight: float = None  # weight of the alignment loss of fine-tuning; default 1
box_weight: float = None  # weight of the box loss of fine-tuning; default 1
proposal_weight: float = None  # weight of the proposals' own loss of fine-tuning; default 1
epochs: int = None  # passes over the training texts; 0 is zero-shot alone; tiny 3, photos 12, paper 12
batch_size: int = None  # images with a text per step; tiny 32, photos 16, paper 64
lr: float = None  # learning rate; tiny 0.001, photos 0.0005, paper 1e-05
weight_decay: float = None  # weight decay of AdamW; tiny 0.02, photos 0.02, paper 0.05
schedule: str = None  # lr over time: cosine | linear | constant; default cosine
warmup: float = None  # share of the steps with a rising learning rate; tiny 0.1, photos 0.1, paper 0
clip_norm: float = None  # largest norm of the gradient; 0 is none; default 1
precision: str = None  # mixed precision; auto: bf16 if a GPU has it: auto | no | bf16 | fp16; default auto
workers: int = None  # processes that read images; tiny 0, photos 0, paper 4
checkpoint_steps: int = None  # steps between checkpoints; 0: one per epoch; tiny 0, photos 0, paper 500
threads: int = 0  # threads of torch on a CPU; 0 leaves torch's own number

# %% jupyter={"source_hidden": true}
from finematch.config import root, settings

s = settings(globals(), "slan_localization")
s

# %%
import time

import numpy as np
import pandas as pd
import torch
from IPython.display import Markdown, display
from matplotlib import pyplot as plt

from finematch import figures as draw
from finematch.boxes import grid_boxes, iou
from finematch.data import digests
from finematch.data.names import in_common
from finematch.evaluation.detection import (
    coco_truth, detection, frequency_rows, result_rows, uniform_class_rows, write_results,
)  # fmt: skip
from finematch.evaluation.grounding import grounding
from finematch.evaluation.phrases import annotated_phrases, located_phrases
from finematch.files import digest
from finematch.features.inputs import labelled_images, origin
from finematch.models.slan.detection import (
    LabelledBoxes, class_items, collate, phrase_items, phrase_texts, prompts,
)  # fmt: skip
from finematch.rebuild import pretrained_run, seen_as, slan_localizer, with_run
from finematch.runs import begin
from finematch.tables import published, to_markdown
from finematch.training import Plan, accelerator, fit, seed_everything, to_device

draw.style()
device = accelerator()
if s.threads:
    torch.set_num_threads(s.threads)


def show(frame: pd.DataFrame, digits: int = 1) -> None:
    """A table; its index becomes the first column."""
    display(Markdown(to_markdown(frame.reset_index(), digits=digits)))


# %% [markdown]
# ## The pretrained run
#
# A finished run of `2_train` brings its data, tokenizer, encoders and locator. `start=scratch` keeps their shapes and draws random weights: what fine-tuning alone gives.

# %%
pretrained = pretrained_run(s)
data, of_run, tokenizer = pretrained.data, pretrained.settings, pretrained.data.tokenizer
seed_everything(s.seed)
localizer = slan_localizer(s, pretrained)
limit = localizer.towers.text_encoder.net.config.max_position_embeddings
print(f"{pretrained.folder.name}: {of_run.levels} levels, T = {localizer.locator.filter.top}, "
      f"h = {localizer.locator.filter.threshold}, weights: {s.start}")  # fmt: skip

# %% [markdown]
# ## The data
#
# Detection reads COCO's annotations: class names, and boxes in pixels. On scenes the shapes are the classes. Grounding reads Flickr30k Entities' format: phrases of the captions, and
# their boxes. A phrase without boxes is dropped, as in MDETR's evaluation, and counted. The test split is reported where there is one, else val; the last epoch is kept.

# %%
if s.task == "detection":
    parts, ids = labelled_images(s.dataset, data.data_root, data.splits, seen_as(s, pretrained))
    if s.smoke:
        parts = {name: (source, records[:40], rows[:40]) for name, (source, records, rows) in parts.items()}
    reported = s.report if s.report in parts else "val"
    labelled = {name: parts[name][1] for name in ("train", reported)}
    names = list(ids)
    texts = prompts(names, tokenizer, max_length=limit)
    images, records, rows = parts["train"]
    items = class_items(records, rows, texts, names)
    truth = coco_truth(labelled[reported], ids)
    boxes = sum(len(record.objects) for record in records)
    print(f"{len(names)} classes in {len(texts)} prompts; train: {len(records)} images, {boxes} boxes; {reported}: {len(labelled[reported])} images")
    seen = in_common(labelled[reported], data.splits["train"].records) if "train" in data.splits else 0
    print(f"{seen} of the {len(labelled[reported])} images of {reported} are among those that the pretrained run learned from, with their captions")
else:
    reported = s.report if s.report in data.splits else "val"
    split = data.splits[reported]
    labelled = {name: annotated_phrases(s.dataset, data.data_root, name)[: 40 if s.smoke else None] for name in ("train", reported)}
    row_of = {record.image_id: row for row, record in enumerate(data.splits["train"].records)}
    records = [record for record in labelled["train"] if record.image_id in row_of]
    images = data.splits["train"].images
    items = phrase_items(records, [row_of[record.image_id] for record in records], tokenizer)
    print(f"train: {len(records)} images, {len(items)} captions with annotated phrases")

# %% [markdown]
# ## The run

# %%
made_of = dict(pretrained.identity.get("data", {}))
made_of |= {f"labels {name}": digests(part) for name, part in labelled.items()}
if s.task == "detection" and not s.dataset.startswith("scenes"):  # COCO's own images, not the pretrained run's
    made_of["label maps"] = {name: digest(key) for name, key in origin({name: part[0] for name, part in parts.items()}).items()}
run = begin("slan_localization", with_run(s, pretrained), data=made_of, features=pretrained.identity.get("features", ""), out=s.out, resume=s.resume)
run.folder

# %% [markdown]
# ## What the head adds: one example by hand
#
# > "For the text input on the object detection task, we use a prompt composed of concatenated labels of COCO (e.g. detect: person, bicycle, car, ... , toothbrush)."
#
# A *label* is a class name of the prompt or a phrase of a caption. The locator's last level gives each region's cosine with each word; a label's score is the mean over the words of a class
# name (S35), or the largest over those of a phrase (S36). That is all: score = scale (cosine - offset), with two numbers that fine-tuning learns. Below are the words of one text, the three regions that like a
# label best, and their scores, which the assert computes again.

# %%
example = items[0]
batch = to_device(LabelledBoxes(images, [example]).__getitems__([0]), device)
localizer.eval()
with torch.no_grad():
    at = localizer.regions(batch["image"], batch["text"])
    scores = localizer.logits(at.cosine, batch["text"]["spans"])[0]
tokens = tokenizer.convert_ids_to_tokens(example.text.ids.tolist())
first, (span, *_) = scores[:, 0], example.text.spans
best = first.masked_fill(~at.valid[0], -torch.inf).argsort(descending=True)[:3]
cosines = at.cosine[0, best]
for region, cosine in zip(best, cosines, strict=True):
    of_words = cosine[span.to(device)]
    label = of_words.mean() if localizer.reduce == "mean" else of_words.max()
    assert torch.isclose(first[region], localizer.scale * (label - localizer.offset), atol=1e-4)
print(" ".join(tokens))
named = [f"{n} {token}" for n, token in enumerate(tokens) if example.text.spans[:, n].any()]
shown = example.text.spans.any(0).nonzero().flatten().to(device)
show(pd.DataFrame(cosines[:, shown].cpu().numpy(), columns=named,
                  index=pd.Index([f"region {int(k)}" for k in best], name="cosine with")), 2)  # fmt: skip

# %% [markdown]
# ## Evaluation
#
# * Detection: the 100 best (region, class) pairs of an image, COCO's AP by pycocotools, and class-agnostic recall: how many true boxes one of the 10 (100) best boxes finds, whatever its class.
# * Grounding: R@1, 5, 10 at an IoU of 0.5 by two protocols. Any box of the phrase counts (AnyBox), or the box around all of them (MergedBox).
#
# Beside them stand the same with the images *shuffled* (the text meets another image's regions), and what needs no alignment. For detection: the proposals with a class drawn uniformly (*uniform*), and the mean box of each
# class with its frequency as the score, which looks at no image (*frequency*). For grounding: the most salient proposal whatever the phrase (*salient*), a random region (*chance*), and the box in the middle (*centre*).


# %%
def detected(shift: int = 0) -> list:
    """The boxes of every image of the reported split; with a `shift`, those of the image so many places further."""
    localizer.eval()
    source, _, rows = parts[reported]
    order, found = list(np.roll(rows, -shift)), []
    for i in range(0, len(order), 64):
        found += localizer.detect(to_device(source.batch(order[i : i + 64]), device), texts)
    return found


def scored(found: list) -> dict:
    """COCO's numbers of boxes, and the boxes in COCO's results format."""
    rows = [row for record, one in zip(labelled[reported], found, strict=True)
            for row in result_rows(record, *one, list(ids.values()))]  # fmt: skip
    return detection(truth, rows, engine=s.engine, split=f"{s.dataset} {reported}") | {"rows": rows}


def grounded(*, shuffled: bool = False, salient: bool = False) -> list:
    """Every annotated phrase with the regions of the last level and their scores."""
    localizer.eval()

    def locate(pictures: dict, words: dict):
        if shuffled:
            pictures = {name: value.roll(len(value) // 2, 0) for name, value in pictures.items()}
        at = localizer.regions(to_device(pictures, device), to_device(words, device))
        fits = at.saliency[..., None].expand_as(at.cosine) if salient else at.cosine
        return at.boxes[-1:], fits[None], at.valid

    (found,) = located_phrases(split, labelled[reported], tokenizer, locate, reduce=s.phrase_score, complete=not s.smoke)
    return found


KEPT = ("ap", "ap50", "ap75", "recall_10", "recall_100", "r1", "r5", "r10", "merged_r1", "merged_r5", "merged_r10", "pointing",
        "upper_bound", "chance_r1", "centre_r1")  # fmt: skip


def evaluated() -> tuple[dict, dict]:
    """Own numbers, and those with the images shuffled."""
    if s.task == "detection":
        return scored(detected()), scored(detected(shift=max(1, len(labelled[reported]) // 2)))
    name = f"{s.dataset} {reported}"
    return grounding(grounded(), split=name), grounding(grounded(shuffled=True), split=name)


def look(i: int):
    """What the model finds in image i of the reported split, to be drawn."""
    if s.task == "detection":
        source, _, rows = parts[reported]
        return localizer.eval().detect(to_device(source.batch([rows[i]]), device), texts)[0]
    record, row = chosen[i]
    number, text = next(iter(phrase_texts(record, tokenizer).items()))
    given = to_device({"image": split.images.batch([row]), "text": collate([text])}, device)
    with torch.no_grad():
        at = localizer.eval().regions(given["image"], given["text"])
        scores = localizer.logits(at.cosine, given["text"]["spans"])[0].masked_fill(~at.valid[0, :, None], -torch.inf)
    return number, text, at.boxes[-1, 0].cpu(), scores.cpu()


PICTURES = 3  # the first of the split: none is chosen by what the model does on it
if s.task == "grounding":
    rows_of = {record.image_id: row for row, record in enumerate(split.records)}
    chosen = [(record, rows_of[record.image_id]) for record in labelled[reported]
              if record.image_id in rows_of and any(one.boxes for one in record.phrases)][:PICTURES]  # fmt: skip
else:
    chosen = labelled[reported][:PICTURES]

# %% [markdown]
# ## Zero-shot

# %%
results = {}
if s.task == "detection":
    source, _, rows = parts[reported]
    regions = [one for i in range(0, len(rows), 64) for one in localizer.proposals(to_device(source.batch(rows[i : i + 64]), device))]
    uniform = uniform_class_rows(labelled[reported], regions, ids, seed=s.seed)
    for name, given in (("uniform", uniform), ("frequency", frequency_rows(records, labelled[reported], ids))):
        results[name] = detection(truth, given, engine=s.engine)
else:
    results["salient"] = grounding(grounded(salient=True))
results["zero_shot"], results["zero_shot_shuffled"] = evaluated()
before = [look(i) for i in range(len(chosen))]
show(pd.DataFrame({name: {key: one[key] for key in KEPT if key in one} for name, one in results.items()}).rename_axis("%"))

# %% [markdown]
# ## Fine-tuning
#
# The paper has no loss for it. Ours is the simplest that works: a region says the labels of the boxes that it overlaps (sigmoid focal loss, IoU of at least 0.5), it moves onto its box (L1 and GIoU), and the proposals learn
# from the boxes as those of the detector of Table 6 do.

# %%
schedule = {name: getattr(s, name) for name in ("batch_size", "lr", "weight_decay", "schedule", "warmup", "clip_norm", "workers",
                                                "checkpoint_steps", "seed")}  # fmt: skip
seed_everything(s.seed)
summary = {"seconds": 0.0, "history": []}
if s.epochs:
    summary = fit(localizer.train(), LabelledBoxes(images, items), Plan(epochs=s.epochs, precision=run.precision, **schedule),
                  run.folder, identity=run.digest)  # fmt: skip
started = time.monotonic()
results["fine_tuned"], results["fine_tuned_shuffled"] = evaluated()
print(f"evaluated in {time.monotonic() - started:.0f} s; scale {localizer.scale.item():.1f}, offset {localizer.offset.item():.2f}")
table = pd.DataFrame({name: {key: one[key] for key in KEPT if key in one} for name, one in results.items()})
show(table.rename_axis("%"))

# %%
if s.task == "detection":
    write_results(run.folder / "results.json", results["fine_tuned"].pop("rows"))
    print(f"{len(truth['images'])} images in COCO's results format: {run.folder.name}/results.json")
beside = {"detection": ("ap50", ("fine_tuned_shuffled", "uniform", "frequency")), "grounding": ("r1", ("fine_tuned_shuffled", "salient"))}
key, others = beside[s.task]
for other in others:
    gain = results["fine_tuned"][key] - results[other][key]
    print(f"{key}, fine-tuned: {gain:+.1f} points beside {other}{'' if gain > 0 else ' (FAILS: it must be above)'}")

# %% [markdown]
# ## Table 4, and ours beside it
#
# The paper's numbers are of COCO val and Flickr30k Entities test after pretraining on 14 million images; ours of this dataset and scale. MDETR's row is labelled ResNet101 in the paper, but it is EfficientNet-B5 in MDETR's own table,
# by AnyBox (S38). Whether the paper reports AnyBox or MergedBox it does not say; its rivals' rows are AnyBox.

# %%
paper = published("SLAN", 4)
if "column" in paper.columns:
    paper = paper.pivot(index="row", columns="column", values="value")
columns = {"Object Detection (COCO) Zero-shot": ("zero_shot", "ap"), "Object Detection (COCO) Fine-tune": ("fine_tuned", "ap")}
if s.task == "grounding":
    columns = {f"Phrase Grounding (Flickr30k) R@{k}": ("fine_tuned", f"r{k}") for k in (1, 5, 10)}
paper = paper[[name for name in columns if name in paper.columns]].dropna(how="all")
here = f"here: {s.dataset} {reported}, {s.scale}, {of_run.levels} levels, {s.start}"
paper.loc[here] = [results[of][metric] for of, metric in (columns[name] for name in paper.columns)]
show(paper.astype(float).rename_axis("model"))

# %% [markdown]
# ## Pictures: one sentence, two models (Figures 1c and 1d; arXiv, Figure 9)
#
# Left zero-shot, right fine-tuned, on the first images of the split. Detection: the best boxes with class and confidence. Grounding: each phrase of the caption has a colour, and the region with its highest score.


# %%
def keep(figure: plt.Figure, number: int) -> None:
    """Save a figure; one that shows photos stays in the run's folder."""
    folder = root() / s.figures if s.dataset.startswith("scenes") else run.folder
    row = [] if s.start == "pretrained" else ["scratch"]
    name = ".".join([f"slan_{s.task}", s.dataset, f"levels-{of_run.levels}", *row, *(["smoke"] if s.smoke else [])])
    for kind in ("svg", "png"):
        draw.save(figure, folder / f"{name}.{number}.{kind}")


after = [look(i) for i in range(len(chosen))]
figure, axes = plt.subplots(len(chosen), 2, figsize=(6.4, 3.3 * len(chosen)), squeeze=False, layout="constrained")
for i, line in enumerate(axes):
    record = chosen[i] if s.task == "detection" else chosen[i][0]
    picture = record.open()
    frame = torch.tensor([*picture.size, *picture.size])
    for ax, name, one in zip(line, ("zero-shot", "fine-tuned"), (before[i], after[i]), strict=True):
        if s.task == "detection":
            count = min(4, len(one.scores))
            draw.show_boxes(ax, picture, (one.boxes[:count] * frame).numpy(),
                            labels=[f"{names[int(k)]} {float(v):.2f}" for k, v in zip(one.labels[:count], one.scores[:count], strict=True)])  # fmt: skip
            ax.set_title(name, fontsize=8)
            continue
        number, text, boxes, scores = one
        phrases = [record.phrases[k] for k in text.labels]
        place = scores.argmax(0)
        caption = record.captions[number]
        said = {}  # of phrases that choose one region, all at its box
        for k, p in zip(place.tolist(), phrases, strict=True):
            said.setdefault(k, []).append(caption[p.start : p.end])
        draw.show_boxes(ax, picture, (boxes[list(said)] * frame).numpy(), labels=[", ".join(some) for some in said.values()])
        hits = sum(float(iou(boxes[k][None] * frame, torch.tensor(p.boxes)).max()) >= 0.5 for k, p in zip(place, phrases, strict=True))
        ax.set_title(f"{name}: {hits} of {len(phrases)} phrases found", fontsize=8)
keep(figure, 1)
plt.show()

# %% [markdown]
# ## Activation map of a text query (Figure 1a)
#
# Each of 16 x 16 cells of an image is embedded as the last level embeds a region; bright is where it fits the query. The query is the first class that the image has, or its first annotated phrase.

# %%
figure, axes = plt.subplots(1, len(chosen), figsize=(3.0 * len(chosen), 3.3), squeeze=False, layout="constrained")
for i, ax in enumerate(axes[0]):
    if s.task == "detection":
        record, (source, _, rows) = chosen[i], parts[reported]
        query = record.objects[0].category if record.objects else names[0]
        text = next(one for one in texts if names.index(query) in one.labels)
        place, given = text.labels.index(names.index(query)), source.batch([rows[i]])
    else:
        (record, row), place = chosen[i], 0
        number, text = next(iter(phrase_texts(record, tokenizer).items()))
        phrase = record.phrases[text.labels[0]]
        query, given = record.captions[number][phrase.start : phrase.end], split.images.batch([row])
    heat = localizer.activation(to_device(given, device), to_device(collate([text]), device))[0, place].cpu()
    picture = record.open()
    heat = heat - heat.min()
    draw.show_attention(ax, picture, grid_boxes(*picture.size, 16, 16).numpy(), (heat / heat.sum().clamp(min=1e-6)).flatten().numpy())
    ax.set_title(f"“{query}”", fontsize=8)
keep(figure, 2)
plt.show()

# %%
metrics = {f"{name}_{key}": value for name, one in results.items() for key, value in one.items() if key in KEPT}
for count in ("phrases", "dropped", "without_candidates", "images", "true_boxes"):
    metrics |= {count: results["fine_tuned"][count]} if count in results["fine_tuned"] else {}
run.finish(metrics, seconds=summary["seconds"], protocol=results["fine_tuned"]["protocol"],
           facts={"reported_split": reported, "pretrained_run": pretrained.folder.name, "levels": of_run.levels})  # fmt: skip
pd.Series(metrics)

# %% [markdown]
# Previous: [slan/5_captioning](5_captioning.ipynb) · Next: [slan/7_vqa](7_vqa.ipynb)
