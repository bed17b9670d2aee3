# %% [markdown]
# # SLAN: questions about an image
#
# **Paper** *SLAN: Self-Locator Aided Network for Vision-Language Understanding* (ICCV 2023; version 1, with an
# appendix, on arXiv in 2022), section 4.2.3 and the VQAv2 columns of Table 3.
#
# > "Visual Question Answering (VQA) requires the model to predict an answer from an image and a question. We
# > follow [23] and treat VQA as an open-ended question-generation task."
#
# | on | cost |
# |---|---|
# | a smoke run | seconds, after `2_train` in smoke |
# | `tiny`, scenes | 5 to 17 minutes on one core, from the weights of a finished run of `2_train` |
# | `paper` | GPUs; the paper says neither how long nor at which rate it is fine-tuned. The settings are BLIP's |
#
# **Expected** The answers must score above those of the same model with the images shuffled, and above the best that
# the question alone tells. Who answers without the image scores about a third of the points on scenes: every question
# is asked of two images that answer it differently.

# %% tags=["parameters"]
dataset: str = "scenes"  # that of the pretrained run: scenes, flickr8k, flickr30k or coco_karpathy
data_root: str = "data"  # folder that holds the datasets' folders
scale: str = "tiny"  # that of the pretrained run: tiny or paper
reading: str = None  # readings of the paper; literal at scale paper: default | literal
seed: int = 0  # random seed of the decoder, new words, sampling order, weights from scratch
out: str = ""  # folder of the run; empty: papermill_runs/<method>/<dataset>.<scale>.<digest of the run>
resume: str = ""  # empty: continue this run, refuse another; fresh: start over; replace: only if it differs
smoke: bool = False  # run everything in seconds; the numbers mean nothing
report: str = ""  # reported split; empty: test on scenes, else val: empty | test | val | test-dev
cache: str = "data/cache"  # folder of the backbones and maps that runs share
figures: str = "figures"  # folder of the figures; those that show photos go to the run's folder instead
pretrained: str = "latest"  # folder of a finished run of 2_train, or latest
start: str = "pretrained"  # first weights: that run's, or random ones of its shape: pretrained | scratch
choose: str = None  # the answer: likeliest of a list, or written word by word: rank | generate; default rank (S32)
answers: int = None  # answers in the list, the most frequent of train; default 3128
candidates: int = None  # answers scored whole, those whose first word is likeliest; default 128
epochs: int = None  # passes over the training questions; default 10
batch_size: int = None  # questions per step; tiny 64, photos 64, paper 256
lr: float = None  # learning rate; tiny 0.0005, photos 0.0005, paper 2e-05
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

s = settings(globals(), "slan_vqa")
s

# %%
import numpy as np
import pandas as pd
import torch
from IPython.display import Markdown, display
from matplotlib import pyplot as plt

from finematch import figures as draw
from finematch.data import task_digests
from finematch.evaluation.vqa import accuracy, normalise, vqa_results, write_vqa
from finematch.features.tasks import task_entries, task_images, task_tokenizer
from finematch.models.slan.vqa import AskedImages, answer_list, answer_shares, spellings
from finematch.rebuild import pretrained_run, seen_as, slan_answerer, with_run
from finematch.runs import begin
from finematch.shortcuts import vqa_shortcuts
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
# ## The pretrained run and its questions
#
# A finished run of `2_train` brings its encoders, locator and tokenizer. `start=scratch` keeps their shapes and draws
# random weights. The questions are VQAv2's, or on scenes those that are drawn in its format. They have words that no
# caption has; the text tower gets an untrained vector for each.
#
# On `test-dev` nobody knows the answers but the server: the questions are answered, the file for the upload is written,
# and nothing is scored.

# %%
base = pretrained_run(s)
of_run, tokenizer = base.settings, task_tokenizer(s.dataset, base.data.tokenizer)
reported = s.report or ("test" if s.dataset.startswith("scenes") else "val")
splits = list(dict.fromkeys(("train", "val", reported)))
questions = task_entries("vqa", s.dataset, base.data.data_root, splits, smoke=s.smoke)

images, rows = task_images(questions, seen_as(s, base))
listed, spelling = answer_list(questions["train"], s.answers), spellings(questions["train"])
asked = {name: AskedImages(images[name], part, [row for (row,) in rows[name]], tokenizer, spelling=spelling)
         for name, part in questions.items()}  # fmt: skip
test = questions[reported]
made_of = base.identity.get("data", {}) | {f"questions {name}": task_digests(part) for name, part in questions.items()}
run = begin("slan_vqa", with_run(s, base), data=made_of, features=base.identity.get("features", ""),
            out=s.out, resume=s.resume)  # fmt: skip
print(f"{base.folder.name}: {of_run.levels} levels, weights: {s.start}; {len(listed)} answers in the list")
pd.DataFrame({name: {"questions": len(part), "images": len(images[name])} for name, part in questions.items()})

# %% [markdown]
# ## How an answer is scored, by hand
#
# Ten people answered each question, and they disagree. An answer scores min(1, matches / 3), a mean over the ten ways
# to leave one person out: 0.3 where one person gave it, 0.6 for two, 0.9 for three, 1 for four and more.

# %%
split_up = next(q for q in questions["val"] if 1 < len(set(map(normalise, q.answers))) < 5)
counts = pd.Series([normalise(answer) for answer in split_up.answers]).value_counts()
by_hand = {answer: min(1.0, 0.3 * n) for answer, n in counts.items()}
assert all(abs(accuracy(answer, split_up.answers) - value) < 1e-9 for answer, value in by_hand.items())
print(split_up.text)
show(pd.DataFrame({"people": counts, "score": by_hand}).rename_axis("answer"))

# %% [markdown]
# ## What the head adds
#
# The question is the text of the self-locator, so it steers the regions. A causal decoder reads what the locator gives,
# {E^T_{L+1}, E^G_{L+1}} (words and regions of the last level), and writes the answer. It begins with the weights of the text
# tower. The loss is -log p of each answer, times the share of people who gave it, as in BLIP.
#
# The paper does not say how an answer is chosen (S32). By default all answers of a list are ranked by their likelihood
# (`choose=rank`); `generate` writes freely.

# %%
seed_everything(s.seed)
answerer = slan_answerer(s, base)
parameters = sum(q.numel() for q in answerer.parameters() if q.requires_grad)
print(f"{parameters / 1e6:.2f} M parameters to train, {sum(q.numel() for q in answerer.decoder.parameters()) / 1e6:.2f} M of them the decoder's")
one = to_device(asked["train"].__getitems__([0]), device)
answerer.eval()
with torch.no_grad():
    states, valid = answerer.states(one["image"], one["text"])
    owner, ids, mask = one["owner"], one["answers"]["input_ids"], one["answers"]["mask"]
    likely = answerer.likelihood(states[owner], valid[owner], ids, mask)
    loss = answerer(one)["loss"]
example = questions["train"][0]
table = pd.Series(answer_shares(example, spelling)).to_frame("share of people").assign(**{"-log p": (-likely).tolist()}).rename_axis("answer")
assert torch.isclose(loss, torch.tensor((table["share of people"] * table["-log p"]).sum(), dtype=loss.dtype, device=device), atol=1e-4)
print(f"{example.text} Loss {loss:.2f}")
show(table, 2)

# %% [markdown]
# ## Fine-tuning
#
# After each epoch the likelihood of val's answers is measured; the epoch with the largest is kept. Where val itself is
# reported, the last one is.

# %%
schedule = {name: getattr(s, name) for name in ("batch_size", "lr", "weight_decay", "schedule", "warmup", "clip_norm", "workers",
                                                "checkpoint_steps", "seed")}  # fmt: skip


def blocks(count: int) -> list[list[int]]:
    return [list(range(i, min(i + 64, count))) for i in range(0, count, 64)]


def likelihood(model) -> dict[str, float]:
    """Mean log-likelihood of val's answers, each with the share of people who gave it."""
    data = asked["val"]
    found = [(-model(to_device(data.__getitems__(block), device))["loss"].item(), len(block)) for block in blocks(len(data))]
    return {"likelihood": sum(value * count for value, count in found) / len(data)}


summary = fit(answerer.train(), asked["train"], Plan(epochs=s.epochs, precision=run.precision, **schedule), run.folder, identity=run.digest,
              evaluate=likelihood, select="epoch" if reported == "val" else "likelihood")  # fmt: skip

# %% [markdown]
# ## Answers
#
# Beside the model's answers stand those with the images *shuffled* (each question meets the image of another), the
# *majority* answer of train, and the most frequent answer to the *question alone*.


# %%
@torch.no_grad()
def answered(shift: int = 0) -> dict[int, str]:
    """An answer by question id; with a `shift`, of the image of the question so many places further."""
    data, found = asked[reported], {}
    moved = np.roll(data.row_of, -shift)
    for block in blocks(len(test)):
        text, image = data.texts.batch(block), images[reported].batch(moved[block])
        chosen = answerer.answer(to_device(image, device), to_device(text, device), listed, tokenizer)
        found |= {test[i].question_id: answer for i, answer in zip(block, chosen, strict=True)}
    return found


answerer.eval()
ours = answered()
scores = {"ours": vqa_results(test, ours, split=f"{s.dataset} {reported}")}
scores["shuffled"] = vqa_results(test, answered(shift=1 + len(test) // 2))
if scores["ours"]["unscored"] < len(test):
    alone = vqa_shortcuts(questions["train"], test)
    scores |= {"majority": alone["majority answer"], "question_alone": alone["question alone"], "people": alone["full"]}
write_vqa(run.folder / "answers.json", test, ours)
KINDS = ("vqa", "vqa_yes/no", "vqa_number", "vqa_other")
table = pd.DataFrame({name: {key: one[key] for key in KINDS if key in one} for name, one in scores.items()})
show(table.rename_axis("%"))
print(scores["ours"]["protocol"])
for other in ("shuffled", "majority", "question_alone"):
    if "vqa" in scores["ours"] and other in scores:
        gain = scores["ours"]["vqa"] - scores[other]["vqa"]
        print(f"accuracy: {gain:+.1f} points beside {other}{'' if gain > 0 else ' (FAILS: it must be above)'}")

# %% [markdown]
# *people* is the answer that most people gave: what their disagreement leaves to be reached. Below, each kind of
# question.

# %%
kinds = sorted(key for key in scores["ours"] if key.startswith("vqa_type_"))
show(pd.DataFrame({name: {key.removeprefix("vqa_type_"): one[key] for key in kinds if key in one}
                   for name, one in scores.items()}).rename_axis("question begins with"))  # fmt: skip

# %% [markdown]
# ## Table 3, and ours beside it
#
# The paper's numbers are of VQAv2's test-dev and test-std after pretraining on 14 million image-text pairs; ours of this
# dataset and scale, where the answers are known.

# %%
paper = published("SLAN", 3)
paper = paper[paper["column"].str.startswith("VQAv2")].pivot(index="row", columns="column", values="value").astype(float)
here = f"here: {s.dataset} {reported}, {s.scale}, {of_run.levels} levels, {s.start}"
paper.loc[here, "accuracy here"] = scores["ours"].get("vqa", np.nan)
show(paper.rename_axis("model"))

# %% [markdown]
# ## The regions that answered
#
# The first questions of the split; none is chosen by what the model says. The two boxes are the regions of the last
# level at which the decoder looks most when it writes the answer's first word.

# %%
PICTURES = 8
first = list(range(min(PICTURES, len(test))))
batch = to_device(asked[reported].__getitems__(first), device)
at, looked = answerer.attention(batch["image"], batch["text"])
figure, axes = plt.subplots(2, 4, figsize=(12.0, 7.2), layout="constrained")
for ax in axes.flat[len(first) :]:
    ax.set_axis_off()
for i, ax in zip(first, axes.flat, strict=False):
    picture, question = test[i].open(), test[i]
    best = looked[i].masked_fill(~at.valid[i], -1).argsort(descending=True)[:2].cpu()
    boxes = at.boxes[-1, i].cpu()[best] * torch.tensor([*picture.size, *picture.size])
    draw.show_boxes(ax, picture, boxes.numpy(), weights=looked[i].cpu()[best].numpy())
    said = ours[question.question_id]
    score = f"{accuracy(said, question.answers):.1f}" if question.answers else "not scored"
    ax.set_title(draw.plain(f"{question.text}\n{said} ({score})"), fontsize=8)
folder = root() / s.figures if s.dataset.startswith("scenes") else run.folder
name = ".".join(["slan_vqa", s.dataset, f"levels-{of_run.levels}", *(["scratch"] if s.start == "scratch" else []),
                 *(["smoke"] if s.smoke else []), "1"])  # fmt: skip
for kind in ("svg", "png"):
    draw.save(figure, folder / f"{name}.{kind}")
plt.show()

# %%
found = {("" if name == "ours" else f"{name}_") + key: value for name, one in scores.items() for key, value in one.items()
         if key != "protocol" and not (name != "ours" and key in ("questions", "unscored"))}  # fmt: skip
found |= {"likelihood": likelihood(answerer)["likelihood"], "best_epoch": summary["best_epoch"]}
run.finish(found, seconds=summary["seconds"], protocol=scores["ours"]["protocol"],
           facts={"reported_split": reported, "pretrained_run": base.folder.name, "levels": of_run.levels})  # fmt: skip
pd.Series(found)

# %% [markdown]
# Previous: [slan/6_localization](6_localization.ipynb) · Next: [slan/8_nlvr2](8_nlvr2.ipynb)
