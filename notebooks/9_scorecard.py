# %% [markdown]
# # The scorecard: every table of the papers, published beside measured
#
# **Papers** MVAM and HSLM so far; the other two join with their methods. This page reads the metrics files of all finished runs and the tables that
# `3_ablations` wrote, shows them side by side, counts the verdicts, and writes the generated blocks of the README. No number on it, or in
# the README, was typed by hand.
#
# **Cost** seconds. **Expected** one line per claim: *holds*, *does not hold*, *not separated*, *one seed only* or *not run*, with the dataset named.

# %% tags=["parameters"]
dataset: str = "scenes,flickr8k"  # datasets to show, in order
data_root: str = "data"  # not read here; every notebook has it
scale: str = "tiny"  # the runs' scale
seed: int = 0  # not used here: all seeds that have run are shown
out: str = "papermill_runs"  # folder of the runs
figures: str = "figures"  # folder of the tables
readme: str = ""  # README whose generated blocks to rewrite; empty leaves it alone
smoke: bool = False  # show smoke runs, whose numbers mean nothing

# %% jupyter={"source_hidden": true}
from finematch.config import root, strict

p = strict(globals(), scale={"tiny", "paper"}, seed=(0, 2**31))

# %%
import json

import pandas as pd
from IPython.display import Markdown, display

from finematch.report import measured, published, replace_block, summary, to_markdown

label = "smoke" if p.smoke else p.scale
METRICS = ["i2t_r1", "i2t_r5", "i2t_r10", "t2i_r1", "t2i_r5", "t2i_r10", "rsum"]
blocks = {}

# %% [markdown]
# ## Every run, by dataset
#
# Mean ± standard deviation over seeds; `n` is their number. `best of seeds` is what the paper's own tables report (the best of three restarts).

# %%
for name in p.dataset.split(","):
    files = sorted((root() / p.out).glob(f"*/{name}.{label}.*/metrics.json"))
    runs = measured(files)
    if not len(runs):
        display(Markdown(f"### {name}\n\nNot run."))
        continue
    runs["method"] = [f.parent.parent.name for f in files]
    runs["run"] = [f.parent.name.split(".")[2] for f in files]
    frame = summary(runs, by=["method", "run"], metrics=METRICS)
    best = runs.groupby(["method", "run"])["rsum"].max()
    frame["best rsum of seeds"] = [best[m, r] for m, r in zip(frame["method"], frame["run"], strict=True)]
    frame = frame.sort_values(["method", "rsum"], ignore_index=True)
    text = to_markdown(frame)
    note = (f"{'; '.join(runs['run_protocol'].unique())}. Commits {', '.join(sorted(c[:9] for c in runs['run_commit'].unique()))}; "
            f"{runs['run_seconds'].sum() / 60:.0f} minutes of training on {'; '.join(runs['run_device'].unique())}.")  # fmt: skip
    blocks[f"results-{name}"] = f"{text}\n\n{note}"
    if (
        name == "flickr8k"
    ):  # frozen features of a network of this class, from the literature; on test, not on val
        beside = published("Yardstick", "Flickr8k")
        wide = beside.pivot(index=["row", "note"], columns="column", values="value")[
            list(dict.fromkeys(beside["column"]))
        ]
        blocks[f"results-{name}"] += "\n\nFrom the literature, on Flickr8k's test split:\n\n" + to_markdown(
            wide.reset_index()
        )
    display(Markdown(f"### {name}\n\n{blocks[f'results-{name}']}"))

# %% [markdown]
# ## Every table, published beside measured

# %%
tables = sorted((root() / p.figures).glob(f"*.{label}.md"))
for path in tables:
    grid, name = path.name.split(".")[:2]
    display(Markdown(f"### {grid}, {name}\n\n{path.read_text(encoding='utf-8')}"))
if not tables:
    print(f"No table yet: make grid GRID=mvam_views writes {p.figures}/mvam_views.<dataset>.{label}.md")

# %% [markdown]
# ## What is looked at
#
# Of phrases that people linked to boxes (no training sees the links): how often the region that a phrase attends to most has its centre in a true
# box (pointing), and overlaps one by half (R@1).

# %%
looked = [
    pd.read_csv(path).assign(grid=path.name.split(".")[0], dataset=path.name.split(".")[1])
    for path in sorted((root() / p.figures).glob(f"*.{label}.grounding.csv"))
    if path.stat().st_size > 1
]
if looked:
    frame = pd.concat(looked, ignore_index=True)
    frame = frame[["grid", "dataset", *(c for c in frame if c not in ("grid", "dataset"))]]
    blocks["grounding"] = to_markdown(frame, digits=1)
    display(Markdown(blocks["grounding"]))

# %% [markdown]
# ## Every claim
#
# Welch's one-sided t interval at 95 % over seeds, on rsum; the single metrics stand in the tables' own pages.

# %%
lines = []
for path in sorted((root() / p.figures).glob(f"*.{label}.claims.csv")):
    grid, name = path.name.split(".")[:2]
    verdicts = pd.read_csv(path)
    verdicts = verdicts[verdicts["metric"] == "rsum"]
    lines += [{"grid": grid, "dataset": name, **row} for row in verdicts.to_dict("records")]
if lines:
    frame = pd.DataFrame(lines)[["grid", "dataset", "claim", "verdict", "difference", "n_a", "n_b"]]
    frame = frame[frame["verdict"] != "not run"].reset_index(drop=True)
    print(frame["verdict"].value_counts().to_string())
    blocks["claims"] = to_markdown(frame)
    display(Markdown(blocks["claims"]))

# %% [markdown]
# ## Speed
#
# From `benchmarks/*.json`, which `make bench` writes. The floor is the matrix products' operations at the rate that the machine reached in the same
# run.

# %%
with open(root() / "benchmarks" / "retrieval.json") as file:
    b = json.load(file)
ours, of = b["embeddings_to_recall"], b["parameters"]
speed = [
    f"* **Retrieval**, {of['images']:,} x {of['captions']:,} at {of['width']:,}-d, embeddings to recall in both directions: "
    f"{ours['ours_seconds']['median']:.1f} s against {ours['argsort_loop_seconds']:.0f} s for a loop with one argsort per query, "
    f"{ours['times_faster']:.0f} times faster at the same numbers; at best {ours['times_the_floor']:.1f} times the bare matrix product; "
    f"{b['memory']['peak_growth_bytes']['500'] / 1e6:.0f} MB beside a score matrix of {b['memory']['score_matrix_bytes'] / 1e6:.0f} MB. "
    f"From a given score matrix: {b['given_matrix_to_recall']['times_faster']:.1f} times faster than the loop."
]
with open(root() / "benchmarks" / "mvam_step.json") as file:
    b = json.load(file)
for name in ("scenes", "flickr8k"):
    step = b[name]["mvam"]
    speed.append(
        f"* **A training step** of MVAM at batch {b['parameters']['batch']}, {name}'s setup, {b['parameters']['threads']} thread: "
        f"{step['seconds']['min']:.2f} s, {step['times_the_floor']:.1f} times its own matrix products, "
        f"{step['peak_growth_bytes'] / 1e6:.0f} MB."
    )
blocks["speed"] = "\n".join(speed)
Markdown(blocks["speed"])

# %%
if p.readme:
    changed = [name for name, text in blocks.items() if replace_block(root() / p.readme, name, text)]
    print(f"{p.readme}: {', '.join(changed) or 'nothing'} rewritten")
