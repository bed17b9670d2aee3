# %% [markdown]
# # SLAN: captions, and the region behind each word
#
# **Paper** *SLAN: Self-Locator Aided Network for Vision-Language Understanding* (ICCV 2023; version 1, with an
# appendix, on arXiv in 2022), section 4.2.2, the caption columns of Table 3, and Figure 1b.
#
# > "Given an input image, this task generates a sentence description to describe the image in detail. We use COCO
# > Karpathy split to fine-tune and evaluate our method."
#
# | on | cost |
# |---|---|
# | a smoke run | seconds, after `2_train` in smoke |
# | `tiny`, scenes | minutes on two cores, from the weights of a finished run of `2_train` |
# | `paper` | GPUs; the paper says neither how long nor at which rate it is fine-tuned. The settings are BLIP's |
#
# **Expected** The captions must score above those of the same model with the images shuffled, above the caption of
# the most similar train image, and above the most frequent caption, which sees no image. All of it is printed as
# measured.

# %% tags=["parameters"]
dataset: str = "scenes"  # that of the pretrained run: scenes, flickr8k, flickr30k or coco_karpathy
data_root: str = "data"  # folder that holds the datasets' folders
scale: str = "tiny"  # that of the pretrained run: tiny or paper
reading: str = None  # readings of the paper; literal at scale paper: default | literal
seed: int = 0  # random seed of the decoder, sampling order, dropout, weights from scratch
out: str = ""  # folder of the run; empty: papermill_runs/<method>/<dataset>.<scale>.<digest of the run>
resume: str = ""  # empty: continue this run, refuse another; fresh: start over; replace: only if it differs
smoke: bool = False  # run everything in seconds; the numbers mean nothing
cache: str = "data/cache"  # folder of the backbones and maps that runs share
figures: str = "figures"  # folder of the figures; those that show photos go to the run's folder instead
pretrained: str = "latest"  # folder of a finished run of 2_train, or latest
start: str = "pretrained"  # first weights: that run's, or random ones of its shape: pretrained | scratch
metrics: str = "auto"  # pycocoevalcap's metrics; auto: where Java is found; own: none: auto | official | own
locator_text: str = None  # text of the locator when captions are written: prompt | none; default prompt (S31)
smoothing: float = None  # label smoothing of the loss (BLIP); default 0.1
beams: int = None  # beams of the search for a caption (BLIP); default 3
max_length: int = None  # most tokens of a caption and its prompt (BLIP); tiny 40, photos 20, paper 20
min_length: int = None  # fewest tokens of a caption and its prompt (BLIP); default 5
epochs: int = None  # passes over the training captions; tiny 4, photos 4, paper 5
batch_size: int = None  # captions per step; tiny 64, photos 64, paper 256
lr: float = None  # learning rate; tiny 0.0005, photos 0.0005, paper 1e-05
weight_decay: float = None  # weight decay of AdamW; default 0.05
schedule: str = None  # lr over time: cosine | linear | constant; default cosine
warmup: float = None  # share of the steps with a rising learning rate; tiny 0.05, photos 0.05, paper 0
clip_norm: float = None  # largest norm of the gradient; 0 is none; tiny 1, photos 1, paper 0
precision: str = None  # mixed precision; auto: bf16 if a GPU has it: auto | no | bf16 | fp16; default auto
workers: int = None  # processes that read images; tiny 0, photos 0, paper 4
checkpoint_steps: int = None  # steps between checkpoints; 0: one per epoch; tiny 0, photos 0, paper 500
threads: int = 0  # threads of torch on a CPU; 0 leaves torch's own number

# %% jupyter={"source_hidden": true}
from finematch.config import root, settings

s = settings(globals(), "slan_captioning")
s

# %%
import textwrap
import time

import numpy as np
import pandas as pd
import torch
from IPython.display import Markdown, display
from matplotlib import pyplot as plt

from finematch import figures as draw
from finematch.evaluation.captions import caption_scores, most_frequent, read_results, write_results
from finematch.rebuild import pretrained_run, slan_captioner, with_run
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
# ## The pretrained run and its data
#
# A finished run of `2_train` brings its data, tokenizer, encoders and locator. `start=scratch` keeps their shapes and
# draws random weights: what fine-tuning alone gives.

# %%
base = pretrained_run(s)
data, of_run, tokenizer = base.data, base.settings, base.data.tokenizer
train, val, test = data.splits["train"], data.splits["val"], data.splits[data.reported]
references = {record.image_id: list(record.captions) for record in test.records}
run = begin("slan_captioning", with_run(s, base), data=base.identity.get("data", {}), features=base.identity.get("features", ""),
            out=s.out, resume=s.resume)  # fmt: skip
print(f"{base.folder.name}: {of_run.levels} levels, weights: {s.start}; {len(train.captions)} captions of {len(train.records)} images to learn from, "
      f"{len(test.records)} images of {data.reported} to describe")  # fmt: skip

# %% [markdown]
# A baseline needs no decoder: the first caption of the most similar train image, by the vectors that the pretrained
# run's contrast compares. It is looked up before fine-tuning changes that model.


# %%
@torch.no_grad()
def vectors(split) -> torch.Tensor:
    """The unit vectors of a split's images."""
    parts = torch.arange(len(split.records)).split(256)
    return torch.cat([base.model.encode_image(**to_device(split.images.batch(part.tolist()), device)).vector for part in parts])


nearest = (vectors(test) @ vectors(train).T).argmax(1).tolist()

# %% [markdown]
# ## What the head adds
#
# A causal Transformer decoder writes a caption word by word: it looks back at its own words, and by cross attention
# at {T_v, E^G_{L+1}}, the image token and the regions of the locator's last level. It begins with the weights of the
# text tower. The locator needs a text before there is a caption (S31): the prompt "a picture of" by default, or no
# word. It never gets the caption, so no word sees a later one through the regions.
#
# The loss is -log p of each word given those before it, a mean over all words. Here it is by hand for one caption,
# with the model as it begins: all words of the vocabulary are about equally likely, and the loss is near the
# logarithm of their number.

# %%
seed_everything(s.seed)
captioner = slan_captioner(s, base)
parameters = sum(q.numel() for q in captioner.parameters() if q.requires_grad)
print(f"{parameters / 1e6:.2f} M parameters to train, {sum(q.numel() for q in captioner.decoder.parameters()) / 1e6:.2f} M of them the decoder's")
one = to_device(train.pairs().__getitems__([0]), device)
captioner.eval()
with torch.no_grad():
    ids, mask = captioner.with_prompt(one["text"])
    likely = captioner.read(captioner.locate(one["image"]), ids, mask).logits.float().log_softmax(-1)[0]
    loss = captioner(one)["loss"].item()
first = len(captioner.prompt)
steps = pd.DataFrame({"after": tokenizer.convert_ids_to_tokens(ids[0, first - 1 : -1].tolist()),
                      "word": tokenizer.convert_ids_to_tokens(ids[0, first:].tolist()),
                      "-log p": [-likely[n - 1, ids[0, n]].item() for n in range(first, ids.shape[1])]})  # fmt: skip
assert abs(steps["-log p"].mean() - loss) < 1e-4
show(steps.rename_axis("step"), 2)
print(f"mean {loss:.2f}; log of {len(tokenizer)} words: {np.log(len(tokenizer)):.2f}")

# %% [markdown]
# ## Fine-tuning
#
# After each epoch the likelihood of val's captions is measured; the epoch with the largest is kept. Where val itself
# is reported, the last one is.

# %%
shared = ("batch_size", "lr", "weight_decay", "schedule", "warmup", "clip_norm", "workers", "checkpoint_steps", "seed")


def likelihood(model) -> dict[str, float]:
    """Mean log-likelihood of a word of val's captions (mean over batches), without label smoothing."""
    pairs, found = val.pairs(), []
    for i in range(0, len(pairs), 256):
        batch = to_device(pairs.__getitems__([*range(i, min(i + 256, len(pairs)))]), device)
        found.append(-model(batch)["loss"].item())
    return {"likelihood": float(np.mean(found))}


plan = Plan(epochs=s.epochs, precision=run.precision, **{name: getattr(s, name) for name in shared})
summary = fit(captioner.train(), train.pairs(), plan, run.folder, identity=run.digest, evaluate=likelihood,
              select="epoch" if data.select == "epoch" else "likelihood")  # fmt: skip

# %% [markdown]
# ## Captions
#
# Beam search with the settings of BLIP. Beside the model's captions stand those for *shuffled* images, the caption of
# the *nearest* train image (by the image vectors of the pretrained run's contrast), and the *most frequent* caption
# of train for every image.

# %%


def described(rows: list[int]) -> list[str]:
    """Captions of images of the reported split."""
    found = []
    for i in range(0, len(rows), 64):
        found += captioner.generate(to_device(test.images.batch(rows[i : i + 64]), device))[0]
    return found

started = time.monotonic()
captioner.eval()
rows = list(range(len(test.records)))
written = {"ours": described(rows), "shuffled": described(list(np.roll(rows, 1 + len(rows) // 2)))}
print(f"{2 * len(rows)} captions in {time.monotonic() - started:.0f} s")
written |= {"nearest": [train.records[i].captions[0] for i in nearest], "frequent": [most_frequent(train.captions)] * len(rows)}
written = {name: dict(zip(references, captions, strict=True)) for name, captions in written.items()}

# %% [markdown]
# The captions go into a file in COCO's results format, which is read again and scored.

# %%
write_results(run.folder / "captions.json", written["ours"])
assert read_results(run.folder / "captions.json", references) == written["ours"]
how = "own" if s.smoke and s.metrics == "auto" else s.metrics
scores = {name: caption_scores(captions, references, metrics=how, split=f"{s.dataset} {data.reported}") for name, captions in written.items()}
table = pd.DataFrame({name: {key: value for key, value in one.items() if key != "protocol"} for name, one in scores.items()})
show(table.rename_axis("% (CIDEr: times 100)"))
print(scores["ours"]["protocol"])
for other in ("shuffled", "nearest", "frequent"):
    gain = scores["ours"]["cider_own_tokens"] - scores[other]["cider_own_tokens"]
    print(f"CIDEr on own tokens: {gain:+.1f} beside {other}{'' if gain > 0 else ' (FAILS: it must be above)'}")

# %% [markdown]
# ## Table 3, and ours beside it
#
# The paper's numbers are of COCO's Karpathy test split, after pretraining on 14 million image-text pairs and with a
# ViT-H; ours of this dataset and scale. Where Java or pycocoevalcap is missing, our line is blank: numbers on other
# tokens do not stand beside these.

# %%
paper = published("SLAN", 3)
paper = paper[paper["column"].isin(["B@4", "M", "C", "S"])].pivot(index="row", columns="column", values="value")
paper = paper[["B@4", "M", "C", "S"]].astype(float)
here = f"here: {s.dataset} {data.reported}, {s.scale}, {of_run.levels} levels, {s.start}"
paper.loc[here] = [scores["ours"].get(key, np.nan) for key in ("bleu4", "meteor", "cider", "spice")]
show(paper.rename_axis("model"))

# %% [markdown]
# ## The region behind each word (Figure 1b)
#
# The region of the last level at which the decoder looks most when it writes a word: cross attention of its last
# layer, mean over heads. Of each caption, the words that are no articles or prepositions have their box. The images
# are the first of the split; none is chosen by what the model does on it.

# %%
STOP = {"a", "an", "the", "of", "with", "and", "as", "well", "in", "on", "at", "to", "is", "are", "there", "picture", "shows"}
PICTURES = 4
images = to_device(test.images.batch(rows[:PICTURES]), device)
said, ids, at = captioner.generate(images)
attention = captioner.attention(at, ids, ids != tokenizer.pad_token_id)
figure, axes = plt.subplots(1, PICTURES, figsize=(3.2 * PICTURES, 3.6), squeeze=False, layout="constrained")
for i, ax in enumerate(axes[0]):
    picture = test.records[i].open()
    tokens = tokenizer.convert_ids_to_tokens(ids[i].tolist())
    looked = {}  # region to its words
    for n in range(first, len(tokens)):
        if tokens[n] not in STOP and tokens[n] not in tokenizer.all_special_tokens:
            looked.setdefault(int(attention[i, n - 1].argmax()), []).append(tokens[n])
    boxes = at.boxes[-1, i, list(looked)].cpu() * torch.tensor([*picture.size, *picture.size])
    draw.show_boxes(ax, picture, boxes.numpy(), labels=[" ".join(words[:3]) for words in looked.values()])
    ax.set_title(draw.plain(textwrap.fill(said[i], 44)), fontsize=7)
folder = root() / s.figures if s.dataset.startswith("scenes") else run.folder
row = ["scratch"] if s.start == "scratch" else []
name = ".".join(["slan_captioning", s.dataset, f"levels-{of_run.levels}", *row, *(["smoke"] if s.smoke else []), "1"])
for kind in ("svg", "png"):
    draw.save(figure, folder / f"{name}.{kind}")
plt.show()

# %%
found = {("" if name == "ours" else f"{name}_") + key: value for name, one in scores.items() for key, value in one.items() if key != "protocol"}
found |= {"likelihood": likelihood(captioner)["likelihood"] if s.epochs else 0.0, "best_epoch": summary["best_epoch"]}
run.finish(found, seconds=summary["seconds"], protocol=scores["ours"]["protocol"],
           facts={"reported_split": data.reported, "pretrained_run": base.folder.name, "levels": of_run.levels})  # fmt: skip
pd.Series(found)

# %% [markdown]
# Previous: [slan/4_regions](4_regions.ipynb) · Next: [slan/6_localization](6_localization.ipynb)
