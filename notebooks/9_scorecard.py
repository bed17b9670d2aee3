# %% [markdown]
# # The scorecard: every table of the papers, published beside measured
#
# **Papers** MVAM, HSLM, FELGA and SLAN. This page reads the metrics files of all finished runs and the tables that
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
from finematch.config import parameters, root

p = parameters(globals(), scale={"tiny", "paper"}, seed=(0, 2**31))

# %%
import json

import pandas as pd
from IPython.display import Markdown, display

from finematch.tables import measured, published, replace_block, summary, to_markdown

label = "smoke" if p.smoke else p.scale
METRICS = ["i2t_r1", "i2t_r5", "i2t_r10", "t2i_r1", "t2i_r5", "t2i_r10", "rsum"]
blocks = {}

# %% [markdown]
# ## Every run, by dataset
#
# Mean ± standard deviation over seeds; `n` is their number. `best of seeds` is what the paper's own tables report (the best of three restarts).


# %%
def runs_of(name: str) -> pd.DataFrame:
    """All runs of a dataset, with the method and the row of each."""
    files = sorted((root() / p.out).glob(f"*/{name}.{label}.*/metrics.json"))
    runs = measured(files)
    if len(runs):
        runs["method"] = [f.parent.parent.name for f in files]
        runs["run"] = [f.parent.name.split(".")[2] for f in files]
    return runs


def note_on(runs: pd.DataFrame) -> str:
    """Protocol, commits and cost of runs."""
    return (f"{'; '.join(runs['run_protocol'].unique())}. Commits {', '.join(sorted(c[:9] for c in runs['run_commit'].unique()))}; "
            f"{runs['run_seconds'].sum() / 60:.0f} minutes of training on {'; '.join(runs['run_device'].unique())}.")  # fmt: skip


every = {name: runs_of(name) for name in p.dataset.split(",")}
for name, found in every.items():
    runs = found[found["rsum"].notna()] if "rsum" in found else pd.DataFrame()
    if not len(runs):
        display(Markdown(f"### {name}\n\nNot run."))
        continue
    frame = summary(runs, by=["method", "run"], metrics=METRICS)
    best = runs.groupby(["method", "run"])["rsum"].max()
    frame["best rsum of seeds"] = [best[m, r] for m, r in zip(frame["method"], frame["run"], strict=True)]
    frame = frame.sort_values(["method", "rsum"], ignore_index=True)
    text = to_markdown(frame)
    blocks[f"results-{name}"] = f"{text}\n\n{note_on(runs)}"
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
# ## Fragments: object discovery and description assignment
#
# FELGA's two tasks, mAP in per cent. Ties count against the model; `ties at random` is the mean over their orders, which is what a random order is
# to be held against, for texts share keywords. Texts are relevant to a box by `category`: their picture has an object of its class.

# %%
TASKS = {
    "discovery_map": "object discovery", "discovery_expected": "ties at random", "discovery_random": "random order",
    "assignment_map": "description assignment", "assignment_expected": "ties at random ", "assignment_random": "random order ",
}  # fmt: skip
for name, found in every.items():
    runs = found[found["discovery_map"].notna()] if "discovery_map" in found else pd.DataFrame()
    if not len(runs):
        continue
    frame = summary(runs, by=["method", "run"], metrics=list(TASKS)).sort_values(
        "discovery_map", ignore_index=True
    )
    frame = frame.drop(columns=[f"{k} sd" for k in TASKS if k.endswith("_random")], errors="ignore")
    frame = frame.rename(columns=TASKS | {f"{k} sd": f"{v} sd" for k, v in TASKS.items()})
    blocks[f"fragments-{name}"] = f"{to_markdown(frame)}\n\n{note_on(runs)}"
    display(Markdown(f"### {name}\n\n{blocks[f'fragments-{name}']}"))

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
# box (pointing), and overlaps one by half (R@1). `before` is the untrained model, or, for FELGA, the frozen features it starts from. SLAN makes boxes of
# its own, level by level: here stand its proposals (level 0) and the last level; its own page has all of them. A run of several grids stands once.

# %%
looked = [
    pd.read_csv(path).assign(grid=path.name.split(".")[0], dataset=path.name.split(".")[1])
    for path in sorted((root() / p.figures).glob(f"*.{label}.grounding.csv"))
    if path.stat().st_size > 1
]
looked = [  # of SLAN's levels the first and the last
    part[~part.duplicated("row") | ~part.duplicated("row", keep="last")] if "level" in part else part
    for part in looked
]
if looked:
    before = {
        f"{m}, {state}": f"{m}, before" for m in ("pointing", "R@1") for state in ("untrained", "frozen")
    }
    before |= {f"{old} sd": f"{new} sd" for old, new in before.items()}
    frame = pd.concat(
        [part.rename(columns=before).astype({"row": str}) for part in looked], ignore_index=True
    )
    begin = [name for name in ("grid", "dataset", "row", "level", "boxes") if name in frame]
    frame = frame[[*begin, *(c for c in frame if c not in begin)]]
    frame = frame[~frame.drop(columns=["grid", "row"]).duplicated()]
    blocks["grounding"] = to_markdown(frame, digits=1)
    display(Markdown(blocks["grounding"]))

# %% [markdown]
# ## Every claim
#
# Welch's one-sided t interval at 95 % over seeds, on rsum, for fragments on the mAP of both tasks, for SLAN's boxes on pointing and R@1; the single metrics stand in the tables' own
# pages.

# %%
lines = []
for path in sorted((root() / p.figures).glob(f"*.{label}.claims.csv")):
    grid, name = path.name.split(".")[:2]
    verdicts = pd.read_csv(path)
    verdicts = verdicts[
        verdicts["metric"].isin(
            [
                "rsum",
                "discovery_map",
                "assignment_map",
                "assignment_expected",
                "grounding_pointing",
                "grounding_r1",
            ]
        )
    ]
    lines += [{"grid": grid, "dataset": name, **row} for row in verdicts.to_dict("records")]
if lines:
    frame = pd.DataFrame(lines)[["grid", "dataset", "claim", "metric", "verdict", "difference", "n_a", "n_b"]]
    frame = frame[frame["verdict"] != "not run"].reset_index(drop=True)
    blocks["claims"] = to_markdown(frame)
    display(Markdown(blocks["claims"]))
    if len(frame):
        methods = frame["grid"].str.split("_").str[0].rename("method")
        counts = pd.crosstab([methods, frame["dataset"]], frame["verdict"])
        verdicts = ["holds", "not separated", "does not hold", "one seed only"]
        blocks["verdicts"] = to_markdown(counts.reindex(columns=verdicts, fill_value=0).reset_index())
        display(Markdown(blocks["verdicts"]))

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
with open(root() / "benchmarks" / "hslm_scoring.json") as file:
    b = json.load(file)
of, ours, bf16 = b["parameters"], b["attend"], b["bf16_on_a_run"]
speed.append(
    f"* **Pair scores** of HSLM, {of['pictures']} pictures x {of['captions']:,} captions, {of['regions']} regions, {of['width']:,}-d, {of['threads']} "
    f"threads: {ours['microseconds_a_pair']['fast']:.0f} microseconds a pair, {ours['times_faster']:.1f} times faster than the loop over captions; "
    f"{ours['times_the_floor']:.1f} times its own matrix products. With bfloat16 products {ours['microseconds_a_pair']['bf16']:.0f}, "
    f"{ours['times_faster_bf16']:.1f} times faster than the loop; on a trained run that moves rsum from {bf16['fp32']['rsum']:.1f} to "
    f"{bf16['bf16']['rsum']:.1f}. {max(m['growth'] for m in b['memory'].values()) / 1e6:.0f} MB, for 250 captions as for 1,000."
)
with open(root() / "benchmarks" / "felga_step.json") as file:
    b = json.load(file)
step = b["setups"]["paper"]
speed.append(
    f"* **A training step** of FELGA at the paper's size ({step['parameters'] / 1e6:.0f} M parameters, 8 pairs of 10 + 10 fragments), "
    f"{b['parameters']['threads']} thread: {step['steps']['fit']['steps_per_second']:.1f} steps a second, "
    f"{100 * step['steps']['fit']['share_of_floor']:.0f} % of the rate of its matrix products alone."
)
with open(root() / "benchmarks" / "average_precision.json") as file:
    b = json.load(file)
of, ours = b["parameters"], b["threads"]["2"]
speed.append(
    f"* **Description assignment**, {of['boxes']:,} boxes x {of['texts']:,} texts of {of['keywords']} keywords at {of['width']}-d, ranked whole, 2 "
    f"threads: {ours['seconds']['wall']:.0f} s, {ours['peak_bytes'] / 2**30:.1f} GiB."
)
with open(root() / "benchmarks" / "roi_pooling.json") as file:
    b = json.load(file)
of, ours = b["parameters"], b["1_threads"]["times_faster_than_torchvision"]
speed.append(
    f"* **RoI pooling with gradients to the boxes**, {of['pictures']} pictures x {of['regions']} regions x {of['k'] ** 2} neighbours, {of['channels']} "
    f"channels, {of['side']} x {of['side']}, forward and backward, 1 thread: {ours['roi_align_mean']:.0f} times faster than torchvision's op and a mean "
    f"(which has none), {ours['neighbourhood_mean']:.0f} times where the neighbours' edges are shared, the summed-area table {ours['box_mean']:.0f} times."
)
with open(root() / "benchmarks" / "slan_cost.json") as file:
    b = json.load(file)
for name, what in (("paper", "ResNet-50 and BERT base"), ("tiny", "small towers on cached maps")):
    of = b["steps"][name]
    took = {part: step["seconds"]["median"] for part, step in of["steps"].items()}
    ratios = {part: took[part] / took["towers"] for part in took}
    speed.append(
        f"* **SLAN's locator**, {what}, {of['batch']} pairs of {of['size']} px and {of['tokens']} tokens, forward and backward, {b['parameters']['threads']} "
        f"thread: one pass takes the step to {ratios['locator iccv']:.1f} (ICCV) and {ratios['locator arxiv']:.1f} times (arXiv) that of the bare towers, the "
        f"whole objective to {ratios['objective iccv']:.1f} and {ratios['objective arxiv']:.1f}."
    )
blocks["speed"] = "\n".join(speed)
Markdown(blocks["speed"])

# %%
if p.readme:
    changed = [name for name, text in blocks.items() if replace_block(root() / p.readme, name, text)]
    print(f"{p.readme}: {', '.join(changed) or 'nothing'} rewritten")
