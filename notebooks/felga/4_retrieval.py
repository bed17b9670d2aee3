# %% [markdown]
# # FELGA: what a word finds, and what a box is told
#
# **Paper** *FELGA: Unsupervised Fragment Embedding for Fine-Grained Cross-Modal Association* (WACV 2024). This notebook
# serves Figure 2: the pictures that are ranked first for a query word, by the frozen features above and by FELGA's embeddings
# below, with the proposal that won. The other direction, for which the paper has no picture, is drawn as well: a box, and the
# texts that it is assigned.
#
# > "the green bounding box stands for the correct image that contains the corresponding visual entities, while the red
# > bounding box stands for the incorrect images [...] The maximum similarity visual proposals are highlighted in purple
# > rectangles (it is worth noting these regions are not ground truth bounding boxes)"
#
# It needs a finished run of `felga/2_train` and trains nothing itself. Only where the standard run is not there with its weights
# (git keeps the metrics of runs, not their weights), `2_train` is run first, into `papermill_runs/felga_train`.
#
# | on | cost, one core |
# |---|---|
# | a smoke run | under a minute |
# | scenes, 500 test pictures | a minute, 1.5 GB; with the run to be made, and the fragments that all runs share, ten to fifteen |
# | COCO pictures | as long as the run's own evaluation, and a minute |
#
# **Expected** The numbers of the run come back from its weights, and asserts hold them together. The paper shows one query
# ("boat") and gives no numbers for it; here queries are chosen by a rule, so that a success and a failure are shown alike.

# %% tags=["parameters"]
run: str = "latest"  # folder of the run to look into; latest: the newest with FENet
example: int = 0  # number of the box, and of the linked phrase, that the figures begin with
top: int = 5  # pictures or texts a query
dataset: str = ""  # empty, or the run's own dataset; another one is refused
data_root: str = ""  # folder above the dataset's own; empty is the run's
scale: str = ""  # empty, or the run's own scale; another one is refused
seed: int = 0  # of the run, where this notebook has to make it
out: str = "papermill_runs/felga_retrieval"  # folder of metrics.json
figures: str = "figures"  # folder of the figures; those that show photos go to `out` instead
smoke: bool = False  # a smoke run in place of the standard one, and `.smoke.` in the figures' names

# %% jupyter={"source_hidden": true}
from finematch.config import parameters, root

p = parameters(globals(), example=(0, 10**7), top=(2, 10), seed=(0, 2**31))

# %%
import re
import subprocess
import sys
import time

import numpy as np
import pandas as pd
import torch
from IPython.display import Markdown, display
from matplotlib import patheffects
from matplotlib import pyplot as plt
from matplotlib.patches import Rectangle
from torch import Tensor

from finematch import figures as draw
from finematch.boxes import iou
from finematch.data.record import DataError
from finematch.evaluation.average_precision import (
    average_precision_blocks, category_relevance, description_assignment, expected_random, object_discovery, query_boxes,
)  # fmt: skip
from finematch.evaluation.fragments import embed, embed_rows, frozen, phrase_grounding, tasks
from finematch.runs import Run, open_run, write_metrics
from finematch.tables import to_markdown

draw.style()
started = time.monotonic()


def show(frame: pd.DataFrame, digits: int = 1) -> None:
    """A table; its index becomes the first column."""
    display(Markdown(to_markdown(frame.reset_index(), digits=digits)))


# %% [markdown]
# ## A run comes back
#
# `metrics.json` holds the parameters that a run was made with, `best.safetensors` the weights of its last epoch. With
# both, the model is the same again. Without FENet, there are the frozen features that it took: that is "before".


# %%
def latest_run() -> Run:
    """The newest run of FELGA with FENet; where there is none, `2_train` makes one first."""
    wanted = {"method": "felga", "features": "fenet", "smoke": p.smoke}
    try:
        return open_run("latest", **wanted)
    except DataError:
        given = {"seed": p.seed, "smoke": p.smoke} | ({"data_root": p.data_root} if p.data_root else {})
        page = root() / p.out / "2_train.ipynb"
        page.parent.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "papermill", "--no-progress-bar", "--cwd", str(root()),
                   str(root() / "notebooks/felga/2_train.ipynb"), str(page)]  # fmt: skip
        command += [part for name, value in given.items() for part in ("-p", name, str(value))]
        print("There is no run with weights: 2_train makes one first.", flush=True)
        ran = subprocess.run(command, capture_output=True, text=True)
        if ran.returncode:
            raise RuntimeError(f"2_train failed, see {page}:\n{ran.stderr[-2000:]}") from None
        return open_run("latest", **wanted)


run = latest_run() if p.run == "latest" else open_run(p.run)
of_run = run.parameters
for key in ("dataset", "scale"):
    if getattr(p, key) not in ("", of_run[key]):
        raise ValueError(f"{key} = {getattr(p, key)!r}, but {p.run} was trained with {of_run[key]!r}")
if of_run["features"] != "fenet":
    raise ValueError(
        f"{p.run} is a baseline without FENet (features={of_run['features']}): give a trained run"
    )
if of_run["text"] == "captions":
    raise ValueError(f"{p.run} has a text for each caption (text=captions); this page shows runs with one for each image")
if p.data_root:
    of_run["data_root"] = p.data_root
model, data = run.model, run.data
BEFORE, AFTER = "frozen features", "FELGA"
# what embeds regions and what embeds words
EMBEDDERS = {BEFORE: (frozen, frozen), AFTER: (model.encode_regions, model.encode_words)}

scenes = of_run["dataset"].startswith("scenes")
sets, proposals, gallery, annotated = data.sets, data.proposals, data.gallery, data.annotated
records, categories, keywords = gallery.records, gallery.categories, gallery.keywords
name = f"felga_retrieval.{of_run['dataset']}" + (".smoke" if p.smoke or of_run["smoke"] else "")
print(f"{sets.name}: {len(records)} pictures, {len(categories)} classes; labels {of_run['labels']}, "
      f"alignment {of_run['alignment']}, {of_run['epochs']} epochs; frozen model: {of_run['vlp_kind']}")  # fmt: skip


def keep(figure: plt.Figure, number: int) -> None:
    """Save a figure as PNG; one that shows photos stays in the notebook's own folder.

    `figures` is published with the project. Photos belong to those who took them, drawn scenes to nobody.
    """
    folder = p.figures if scenes else p.out
    draw.save(figure, root() / folder / f"{name}.{number}.png")


# %% [markdown]
# Are these the weights that the numbers came from? Both tasks are scored again, before and after, and must give the numbers
# of the run. Beside each mAP stands what a random order gives.

# %%
again = {when: tasks(gallery, *by) for when, by in EMBEDDERS.items()}
KINDS = {"object discovery": "discovery", "description assignment, category": "assignment",
         "description assignment, lexical": "assignment_lexical",
         "description assignment, instance": "assignment_instance"}  # fmt: skip
for kind in KINDS.values():
    assert abs(again[AFTER][f"{kind}_map"] - run.metrics[f"{kind}_map"]) < 0.5, kind
    assert abs(again[BEFORE][f"{kind}_map"] - run.metrics[f"frozen_{kind}_map"]) < 0.5, kind
columns = {when: [found[f"{kind}_map"] for kind in KINDS.values()] for when, found in again.items()}
columns["random order"] = [again[AFTER][f"{kind}_random"] for kind in KINDS.values()]
show(pd.DataFrame(columns, index=list(KINDS)).rename_axis("mAP"))
gained = again[AFTER]["discovery_map"] - again[AFTER]["discovery_random"]
if gained < 5:
    print(
        "NOTE: this run finds hardly more than a random order; read what follows as the work of such a model."
    )

# %% [markdown]
# ## Class by class
#
# For object discovery a query is a class name, so each class has an AP of its own; for description assignment it is the mean over the boxes
# of the class (relevance `category`). A random order has the same expectation in both, for the relevant pictures and the relevant
# texts of a class are the same: those with an object of it.

# %%
sides = {}  # embeddings of everything that is asked with or ranked, before and after
for when, (of_regions, of_words) in EMBEDDERS.items():
    of_box = torch.from_numpy(
        gallery.boxes.index[gallery.boxes.mask]
    )  # one row a box, no padding to the fullest image
    sides[when] = {"pictures": embed(gallery.regions, of_regions), "texts": embed(keywords, of_words),
                   "classes": embed(gallery.classes, of_words)[0][:, 0],
                   "boxes": embed_rows(gallery.boxes, of_regions)[of_box]}  # fmt: skip

shows = category_relevance(records, categories)
chance = 100 * expected_random(shows.sum(1).clamp(min=1), len(records))
rows = {"pictures": shows.sum(1).tolist(), "random order": chance.tolist()}
for when, side in sides.items():
    discovered = object_discovery(side["classes"], *side["pictures"], records, categories)
    assigned = description_assignment(side["boxes"], *side["texts"], records, categories)
    for task, found in (("discovery", discovered), ("assignment", assigned)):
        assert abs(found["map"] - again[when][f"{task}_map"]) < 0.1
        rows[f"{task}, {when}"] = [found.get(f"map/{c}", np.nan) for c in categories]
by_class = pd.DataFrame(rows, index=categories).query("pictures > 0")
by_class["gain"] = by_class[f"discovery, {AFTER}"] - by_class[f"discovery, {BEFORE}"]
by_class = by_class.sort_values("gain", ascending=False, kind="stable")
# of many classes the ends alone
listed = by_class if len(by_class) <= 12 else pd.concat([by_class[:6], by_class[-6:]])
show(listed.rename_axis("AP by class, by gain in object discovery"))
print(f"Object discovery: {int((by_class['gain'] > 0).sum())} of {len(by_class)} classes gain. Above a random order: "
      + ", ".join(f"{int((by_class[f'discovery, {when}'] > by_class['random order']).sum())} with {when}" for when in sides))  # fmt: skip
assert abs(by_class[f"discovery, {AFTER}"].mean() - again[AFTER]["discovery_map"]) < 0.1

# %%
figure, axes = plt.subplots(
    2, 1, figsize=(max(5.6, 0.85 * len(listed)), 4.6), layout="constrained", sharex=True
)
for ax, task in zip(axes, ("discovery", "assignment"), strict=True):
    groups = {"random order": listed["random order"]} | {when: listed[f"{task}, {when}"] for when in sides}
    draw.bars(ax, list(listed.index), {k: v.fillna(0).to_numpy() for k, v in groups.items()}, ylabel="AP (%)")
    ax.get_legend().remove()
    ax.set_title({"discovery": "object discovery", "assignment": "description assignment (category)"}[task])
axes[1].tick_params(axis="x", rotation=30 if len(listed) > 8 else 0)
figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
keep(figure, 1)
plt.show()

# %% [markdown]
# ## Figure 2: pictures of a word
#
# Three queries, chosen by a rule: the class that gains most from FENet, the one in the middle, and the one that gains least or loses most. For
# each the pictures ranked first, before and after. A solid frame with a tick is a picture that shows the class, a dashed one with a cross
# does not. The **purple** rectangle is the proposal that won, the one most similar to the word; the number is its
# cosine. Cosines of the two rows are not comparable: each row has a space of its own.


# %%
def rank(queries: Tensor, fragments: Tensor, mask: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Scores "q g" of items by their best fragment, and which fragment that is."""
    each = torch.einsum("qe,gme->qgm", queries, fragments).masked_fill(~mask, -torch.inf)
    best = each.max(-1)
    return best.values.numpy(), best.indices.numpy()


def order(scores: np.ndarray, right: np.ndarray) -> np.ndarray:
    """The ranking of one query; what is wrong comes before what is right with the same score, as the AP has it."""
    return np.lexsort((right, -scores))


def outlined(ax: plt.Axes, box, colour: str, *, width: float = 1.8, style="-") -> None:
    """A box on a picture, with a white edge around its line."""
    x1, y1, x2, y2 = (float(x) for x in box)
    ax.add_patch(Rectangle((x1, y1), x2 - x1, y2 - y1, fill=False, edgecolor=colour, linewidth=width, linestyle=style,
                           path_effects=[patheffects.withStroke(linewidth=width + 1.2, foreground="white")]))  # fmt: skip


def framed(ax: plt.Axes, i: int, right: bool, box, under: str) -> None:
    """Picture i in the frame of right or wrong, with the winning box."""
    wide, high = draw.show_picture(ax, records[i].open())
    outlined(ax, box, PURPLE)
    colour, mark = (draw.RIGHT, "✓") if right else (draw.WRONG, "✗")
    ax.add_patch(Rectangle((0, 0), wide, high, fill=False, edgecolor=colour, linewidth=3 if right else 1.4,
                           linestyle="-" if right else (0, (3, 2)), clip_on=False))  # fmt: skip
    ax.text(0.97, 0.97, mark, transform=ax.transAxes, ha="right", va="top", fontsize=8, color="white", weight="bold",
            bbox={"boxstyle": "round,pad=0.15", "facecolor": colour, "edgecolor": "white", "linewidth": 0.6})  # fmt: skip
    ax.text(0, -0.03, under, transform=ax.transAxes, va="top", ha="left", fontsize=7)


PURPLE = draw.PALETTE[4]
scores = {when: rank(side["classes"], *side["pictures"]) for when, side in sides.items()}
for when, (values, _) in scores.items():  # what is drawn is what was measured
    check = average_precision_blocks(lambda index, values=values: torch.from_numpy(values[index]).nan_to_num(neginf=-9.0),
                                     len(records), shows, torch.arange(len(categories)))  # fmt: skip
    assert abs(check["map"] - again[when]["discovery_map"]) < 0.2

spots = {"gains most": 0, "in the middle": len(by_class) // 2, "gains least": len(by_class) - 1}
asked = {how: by_class.index[at] for how, at in spots.items()}
figure, axes = plt.subplots(2 * len(asked), 1 + p.top, figsize=(1.55 * (p.top + 1), 3.5 * len(asked)),
                            width_ratios=[0.85] + [1] * p.top, squeeze=False)  # fmt: skip
hits = {}
for n, (how, query) in enumerate(asked.items()):
    c = categories.index(query)
    for line, when in zip(axes[2 * n : 2 * n + 2], sides, strict=True):
        line[0].set_axis_off()
        ap = by_class.loc[query, f"discovery, {when}"]
        head = f"“{query}”\n{how}\n\n" if when == BEFORE else "\n\n\n"
        line[0].text(0, 0.5, f"{head}{when}\nAP {ap:.0f}\nrandom {by_class.loc[query, 'random order']:.0f}",
                     transform=line[0].transAxes, va="center", fontsize=8)  # fmt: skip
        values, winners = (x[c] for x in scores[when])
        first = order(values, shows[c].numpy())[: p.top]
        for place, (ax, i) in enumerate(zip(line[1:], first, strict=False), start=1):
            framed(ax, i, bool(shows[c, i]), proposals.boxes[i, winners[i]], f"{place}.  {values[i]:.2f}")
        hits[query, when] = int(shows[c][torch.from_numpy(first.copy())].sum())
figure.subplots_adjust(wspace=0.08, hspace=0.22, left=0.01, right=0.99, top=0.99, bottom=0.03)
keep(figure, 2)
plt.show()
for query in asked.values():
    print(f"“{query}”: {hits[query, BEFORE]} of {p.top} right before, {hits[query, AFTER]} after")

# %% [markdown]
# Does the purple box sit on the thing? The paper lets one picture answer ("paying more attention to the related visual
# entity proposals"). Counted: of all pictures that show a class, in how many does the winning proposal of its name cover an
# object of that class (IoU of at least one half)? Beside it the share where a proposal drawn at random would, and where any of them does.

# %%
counts = {when: [] for when in sides}
by_luck, possible = [], []
for k, category in enumerate(categories):
    for i in shows[k].nonzero().flatten().tolist():
        objects = torch.tensor(
            [thing.box for thing in records[i].objects if thing.category == category and not thing.crowd]
        )
        if not len(objects) or not proposals.mask[i].any():
            continue
        on_it = (
            (iou(torch.from_numpy(proposals.boxes[i].copy()).float(), objects.float()) >= 0.5).any(1).numpy()
        )
        on_it &= proposals.mask[i]
        for when in sides:
            counts[when].append(bool(on_it[scores[when][1][k, i]]))
        by_luck.append(on_it.sum() / proposals.mask[i].sum())
        possible.append(on_it.any())
located = {"random proposal": np.mean(by_luck)} | {when: np.mean(hit) for when, hit in counts.items()}
located["any proposal"] = np.mean(possible)
show(pd.DataFrame({f"winning proposal on an object of the class (%), {len(by_luck)} pairs":
                   {k: 100 * float(v) for k, v in located.items()}}).T.rename_axis(""))  # fmt: skip
assert located["any proposal"] >= max(located.values())

# %% [markdown]
# ## The other direction: texts of a box
#
# Four true boxes, evenly spaced through the queries of the split and so chosen by no eye, begin with `example`. For each the texts that are
# ranked first, before and after. A text is five captions joined; what is printed is the caption in which the **keyword that won**
# stands, shaded. A tick: the text's picture has an object of the box's class (relevance `category`); "its own" is the text
# of the box's own picture.


# %%
def sentence(i: int, word: str) -> tuple[list[str], list[float]]:
    """The first caption of text i that has the keyword, as words, and which of them it is."""
    whole = re.compile(rf"\b{re.escape(word)}\b", re.IGNORECASE)
    caption = next((c for c in records[i].captions if whole.search(c)), records[i].captions[0])
    parts = caption.split()
    return parts, [float(bool(whole.search(part))) for part in parts]


def text_line(ax: plt.Axes, i: int, word: str, place: int, score: float, right: bool, own: bool) -> None:
    """One text of a ranking."""
    ax.set_axis_off()
    colour, mark = (draw.RIGHT, "✓") if right else (draw.WRONG, "✗")
    ax.text(0, 0.62, mark, color=colour, weight="bold", fontsize=9, va="center", transform=ax.transAxes)
    ax.text(0.035, 0.62, f"{place}. {score:.2f}" + ("\nits own" if own else ""), fontsize=6.5, va="center",
            transform=ax.transAxes)  # fmt: skip
    parts, shaded = sentence(i, word)
    draw.show_words(
        ax.inset_axes([0.15, 0, 0.85, 1]),
        parts,
        shaded,
        top=1.6,
        size=7.5,
    )


queries = query_boxes(records, categories)
chosen = [queries[(p.example + n * len(queries) // 4) % len(queries)] for n in range(min(4, len(queries)))]
figure = plt.figure(figsize=(11, 2.35 * len(chosen)))
grid = figure.add_gridspec(len(chosen) * (p.top + 1), 3, width_ratios=[0.42 * p.top / 5, 1, 1], left=0.01, right=0.99,
                           top=0.96, bottom=0.01, wspace=0.05, hspace=0.08)  # fmt: skip
for n, query in enumerate(chosen):
    lines = slice(n * (p.top + 1), n * (p.top + 1) + p.top)
    ax, record = figure.add_subplot(grid[lines, 0]), records[query.picture]
    draw.show_picture(ax, record.open())
    outlined(ax, record.objects[query.object].box, PURPLE)
    box_class = categories[query.category]
    ax.set_title(f"a {box_class}", fontsize=8)
    at = queries.index(query)
    for column, (when, side) in enumerate(sides.items(), start=1):
        values, winners = (x[0] for x in rank(side["boxes"][at][None], *side["texts"]))
        relevant = shows[query.category].numpy()
        first = order(values, relevant)[: p.top]
        for place, i in enumerate(first, start=1):
            ax = figure.add_subplot(grid[lines.start + place - 1, column])
            word = keywords.texts[keywords.index[i, winners[i]]]
            text_line(ax, i, word, place, values[i], bool(relevant[i]), i == query.picture)
            if n == 0 and place == 1:
                ax.set_title(when, fontsize=9)
keep(figure, 3)
plt.show()

# %% [markdown]
# **One word, many texts.** A text is as good as its best keyword, and the same keyword is the same vector in every text. So all texts that
# have the winning word tie for the first place, whatever else they say, and a tie counts against the model. Counted over
# (at most 500) boxes, evenly spaced:

# %%
sample = list(range(0, len(queries), max(1, len(queries) // 500)))
shared = {}
for when, side in sides.items():
    values, winners = rank(side["boxes"][sample], *side["texts"])
    first = values.argmax(1)
    won = {int(keywords.index[i, winners[q, i]]) for q, i in enumerate(first)}
    shared[when] = {
        "boxes whose AP a tie lowers (%)": 100 * again[when]["assignment_ties"] / again[when]["boxes"],
        "texts that share the first place": float(
            (values >= values.max(1, keepdims=True) - 1e-6).sum(1).mean()
        ),
        "different keywords that win": len(won),
    }
show(pd.DataFrame(shared).T.rename_axis(f"{len(sample)} boxes, {len(keywords.features)} keywords"))

# %% [markdown]
# ## Phrases
#
# Phrases that people linked to boxes ask for a place and not for a picture: of the proposals of the phrase's own picture, which is the most similar to
# it? Three phrases, evenly spaced and beginning with `example`. Dashed white: where it is; orange dashes: the frozen
# features' choice; indigo: FELGA's. Below, all phrases: the pointing game (the centre of the choice lies in the box) and R@1 (IoU of at
# least one half), beside a random choice (chance), the middle of the picture (centre) and what the proposals allow.

# %%
grounded = {}
if annotated is None:
    print("Skipped: no phrases are linked to boxes here.")
else:
    phrases = [(i, j) for i, record in enumerate(annotated.records) for j, phrase in enumerate(record.phrases)
               if phrase.boxes and annotated.proposals.mask[i].any()]  # fmt: skip
    of_linked = {
        when: (*embed(annotated.regions, by[0]), embed(annotated.phrases, by[1])[0])
        for when, by in EMBEDDERS.items()
    }
    figure, axes = plt.subplots(1, 3, figsize=(8.4, 3.2), layout="constrained")
    for n, ax in enumerate(axes):
        i, j = phrases[(p.example + n * len(phrases) // 3) % len(phrases)]
        record, boxes = annotated.records[i], annotated.proposals.boxes[i]
        phrase = record.phrases[j]
        draw.show_picture(ax, record.open())
        for box in phrase.boxes:
            outlined(ax, box, draw.INK, width=2.2)
            outlined(ax, box, "white", width=1.2, style=(0, (2.5, 2.5)))
        verdicts, look = [], {BEFORE: (draw.PALETTE[1], "--"), AFTER: (draw.PALETTE[2], "-")}
        for when in (AFTER, BEFORE):  # the dashes on top, so that both are seen where they agree
            regions, mask, said = of_linked[when]
            similarity = (regions[i] @ said[i, j]).masked_fill(~mask[i], -torch.inf)
            box = boxes[int(similarity.argmax())]
            overlap = float(iou(torch.tensor(box)[None].float(), torch.tensor(phrase.boxes).float()).max())
            outlined(ax, box, look[when][0], style=look[when][1])
            verdicts.insert(0, f"{when} {'✓' if overlap >= 0.5 else '✗'} IoU {overlap:.2f}")
        ax.set_title(
            draw.plain(f"“{record.captions[phrase.caption][phrase.start : phrase.end]}”\n") + "\n".join(verdicts),
            fontsize=8,
        )
    keep(figure, 4)
    plt.show()
    grounded = {when: phrase_grounding(annotated, *by) for when, by in EMBEDDERS.items()}
    for when, at in ((BEFORE, "before"), (AFTER, "after")):
        assert abs(grounded[when]["pointing"] - run.metrics[f"grounding_pointing_{at}"]) < 0.5
    table = pd.DataFrame(
        {title: {"chance": grounded[AFTER][f"chance_{key}"], "centre": grounded[AFTER][f"centre_{key}"],
                 **{when: found[key] for when, found in grounded.items()},
                 "upper bound": grounded[AFTER]["upper_bound" + "_pointing" * (key == "pointing")]}
         for title, key in (("pointing game (%)", "pointing"), ("R@1, IoU ≥ 0.5 (%)", "r1"))}
    )  # fmt: skip
    show(table.rename_axis(f"{grounded[AFTER]['phrases']} phrases"))

# %%
metrics = {}
for when, label in ((BEFORE, "before"), (AFTER, "after")):
    metrics |= {f"{kind}_map_{label}": again[when][f"{kind}_map"] for kind in KINDS.values()}
    metrics |= {f"winner_on_object_{label}": 100 * float(located[when])}
    if grounded:
        metrics |= {f"grounding_{key}_{label}": grounded[when][key] for key in ("pointing", "r1")}
metrics |= {f"{kind}_random": again[AFTER][f"{kind}_random"] for kind in KINDS.values()}
metrics |= {"winner_on_object_random": 100 * float(located["random proposal"]), "classes": len(by_class),
            "classes_gaining": int((by_class["gain"] > 0).sum())}  # fmt: skip
protocol = again[AFTER]["protocol"] + (f"; {grounded[AFTER]['protocol']}" if grounded else "")
write_metrics(
    root() / p.out,
    p.as_dict() | {"run": str(p.run)},
    metrics,
    seconds=time.monotonic() - started,
    protocol=protocol,
)
pd.Series(metrics)

# %% [markdown]
# Previous: [felga/3_ablations](3_ablations.ipynb) · Next: [slan/1_lesson](../slan/1_lesson.ipynb)
