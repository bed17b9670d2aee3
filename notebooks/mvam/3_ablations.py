# %% [markdown]
# # MVAM: a table of the paper, published beside measured
#
# **Paper** *MVAM* (arXiv 2402.17237), Tables 1 to 5. This page takes a grid, gathers the metrics of its finished runs, and puts the paper's
# numbers beside ours: mean ± standard deviation over seeds, a plot, and a verdict on each claim.
#
# | grid | table | what it varies |
# |---|---|---|
# | `mvam_backbones` | 1 and 2 | backbone × pooling |
# | `mvam_ensemble` | 3 | one model of 16 views, or 16 models of one |
# | `mvam_views` | 4 | number of views |
# | `mvam_diversity` | 5 | diversity loss: none, square root, base |
# | `mvam_photos` | none | real photos, frozen MobileNetV2 cells: pooling × text tower (a frozen MiniLM, or a GRU from scratch) |
# | `mvam_lambda` | none | our question: how much diversity loss do towers bear that are trained from scratch? |
#
# **Cost** seconds. `make grid GRID=mvam_views` makes the runs and ends with this page. Rows that have not been run stay empty; nothing is guessed.
#
# Our numbers come from other data than the paper's (`scenes`, or Flickr8k photos), so the columns are not to be subtracted: what can be
# compared is the *order* of the rows.

# %% tags=["parameters"]
grid: str = "mvam_views"  # a file of grids/ without its .csv
dataset: str = "scenes"  # the runs' dataset
data_root: str = "data"  # not read here; every notebook has it
scale: str = "tiny"  # the runs' scale
seed: int = 0  # not used here: all seeds that have run are shown
out: str = "papermill_runs/mvam"  # folder of the runs
figures: str = "figures"  # where table and plot go
smoke: bool = False  # the runs were smoke runs: their numbers mean nothing

# %% jupyter={"source_hidden": true}
from finematch.config import parameters, root

p = parameters(
    globals(), grid={"mvam_backbones", "mvam_ensemble", "mvam_views", "mvam_diversity", "mvam_lambda",
                     "mvam_photos"}, scale={"tiny", "paper"},
    seed=(0, 2**31),
)  # fmt: skip

# %%
import csv

import matplotlib.pyplot as plt
import pandas as pd

from finematch import figures as F
from finematch.files import write_text
from finematch.tables import Claim, claims, measured, published, summary, table, to_markdown

GRIDS = {
    # grid: (paper's table to show, label of the rows axis, {row of ours: row of the paper})
    "mvam_backbones": ("1", "backbone and pooling", {
        "grid-cls": "ViT +[CLS]", "grid-attention": "ViT +Attn", "grid-mvam": "ViT +MVAM",
        "regions-cls": "FRCNN +[CLS]", "regions-attention": "FRCNN +Attn", "regions-mvam": "FRCNN +MVAM",
        "clip-cls": "CLIP +[CLS]", "clip-attention": "CLIP +Attn", "clip-mvam": "CLIP +MVAM"}),
    "mvam_ensemble": ("3", "model", {"ensemble": "Base-FRCNN-ensemble", "regions-mvam": "MVAM-FRCNN"}),
    "mvam_views": ("4", "number of views", {"regions-attention": "1", "views-8": "8", "regions-mvam": "16", "views-32": "32"}),
    "mvam_diversity": ("5", "diversity loss", {
        "diversity-none": "w/o diversity loss", "diversity-sqrt": "square root diversity loss",
        "regions-mvam": "base diversity loss"}),
    "mvam_photos": ("", "text tower and pooling", {
        "minilm-mean": "MiniLM +mean", "minilm-attention": "MiniLM +Attn", "minilm-mvam": "MiniLM +MVAM",
        "minilm-mvam-none": "MiniLM +MVAM, no diversity", "minilm-mvam-1e1": "MiniLM +MVAM, lambda 10",
        "gru-mean": "GRU +mean", "gru-attention": "GRU +Attn", "gru-mvam": "GRU +MVAM"}),
    "mvam_lambda": ("", "weight of the diversity loss", {
        "diversity-none": "0", "lambda-1e-2": "0.01", "lambda-1e-1": "0.1", "lambda-1e0": "1", "lambda-1e1": "10"}),
}  # fmt: skip
number, axis, names = GRIDS[p.grid]
with open(root() / "grids" / f"{p.grid}.csv", newline="") as file:
    order = [row["name"] for row in csv.DictReader(file)]
assert order == list(names), "the grid and the map of its rows to the paper's disagree"
label = f"{p.dataset}.{'smoke' if p.smoke else p.scale}"

# %% [markdown]
# ## The runs

# %%
files = [f for row in order for f in sorted((root() / p.out).glob(f"{label}.{row}.s*/metrics.json"))]
runs = measured(files)
if len(runs):
    runs["row"] = [f.parent.name.split(".")[-2] for f in files]
    print(f"{len(runs)} runs; protocol: {'; '.join(runs['run_protocol'].unique())}")
    print(
        f"commits {', '.join(sorted(runs['run_commit'].unique()))}; {runs['run_seconds'].sum() / 60:.0f} minutes of training in all"
    )
else:
    runs = pd.DataFrame(columns=["row", "seed"])
    print(
        f"No finished run of {p.grid} on {label}: make grid GRID={p.grid} DATASET={p.dataset} SCALE={p.scale}"
    )
METRICS = ["i2t_r1", "i2t_r5", "i2t_r10", "t2i_r1", "t2i_r5", "t2i_r10", "rsum"]
COLUMNS = {f"{way}@{k}": f"{way}_r{k}" for way in ("i2t", "t2i") for k in (1, 5, 10)}
mean = summary(runs, by=["row"], metrics=METRICS)
mean

# %% [markdown]
# ## Published beside measured

# %%
if number:
    paper = published("MVAM", number)
else:  # no such table in the paper: every cell of its column stays empty
    paper = pd.DataFrame(
        [{"row": r, "column": c, "value": float("nan")} for r in names.values() for c in COLUMNS]
    )
if (
    p.grid == "mvam_backbones"
):  # Table 1 holds two tasks; the 5K one ranks against the whole test set, as we do
    paper = paper[paper["column"].str.startswith("MSCOCO-5K ") & paper["row"].isin(names.values())].copy()
    paper["column"] = paper["column"].str.removeprefix("MSCOCO-5K ")
beside = table(paper, mean, row="row", columns=COLUMNS, rows=names)
stem = root() / p.figures / f"{p.grid}.{label}"
stem.parent.mkdir(parents=True, exist_ok=True)
write_text(f"{stem}.csv", beside.to_csv(index=False))
text = to_markdown(beside)
write_text(f"{stem}.md", f"{text}\n")
from IPython.display import Markdown

Markdown(text)

# %% [markdown]
# ## The picture
#
# Left image-to-text, right text-to-image. Open diamonds are the paper's, on its own data: compare the shape, not the height.

# %%
with F.style():
    figure, axes = plt.subplots(1, 2, figsize=(9.5, 3.4))
    for ax, column in zip(axes, ("i2t@1", "t2i@1"), strict=True):
        F.compare_points(
            ax, list(beside["row"]), beside[f"{column} published"], beside[f"{column} measured"],
            beside[f"{column} measured sd"], ylabel=f"{column.split('@')[0]} R@1 (%)"
        )  # fmt: skip
        if max(map(len, beside["row"])) > 6:
            ax.set_xticks(ax.get_xticks(), list(beside["row"]), rotation=35, ha="right")
        ax.set_xlabel(axis)
    figure.tight_layout()
    F.save(figure, f"{stem}.svg")
    plt.show()

# %% [markdown]
# ## The paper's claims, judged
#
# Each claim compares two rows over seeds with Welch's one-sided t interval (95 %). *Holds*: the interval lies above zero. *Not separated*: the
# difference has the right sign but is within the noise. *Does not hold*: the wrong sign. With three seeds the test is weak.

# %%
CLAIMS = {
    "mvam_backbones": [(f"{name}: {a} beats {b}", f"{key}-{x}", f"{key}-{y}")
                       for key, name in (("grid", "grid cells (ViT)"), ("regions", "regions (FRCNN)"), ("clip", "CLIP"))
                       for a, x, b, y in (("+MVAM", "mvam", "+Attn", "attention"), ("+MVAM", "mvam", "+[CLS]", "cls"))],
    "mvam_ensemble": [("16 views beat an ensemble of 16 models", "regions-mvam", "ensemble")],
    "mvam_views": [("8 views beat 1", "views-8", "regions-attention"), ("16 views beat 1", "regions-mvam", "regions-attention"),
                   ("16 views beat 8", "regions-mvam", "views-8"), ("16 views beat 32", "regions-mvam", "views-32")],
    "mvam_diversity": [("base diversity beats none", "regions-mvam", "diversity-none"),
                       ("square root diversity beats none", "diversity-sqrt", "diversity-none"),
                       ("base beats square root", "regions-mvam", "diversity-sqrt")],
    "mvam_photos": [(f"{names[f'{t}-{a}']} beats {names[f'{t}-{b}']}", f"{t}-{a}", f"{t}-{b}")
                    for t, a, b in (("minilm", "mvam", "attention"), ("minilm", "mvam", "mean"), ("gru", "mvam", "attention"),
                                    ("gru", "mvam", "mean"), ("minilm", "mvam", "mvam-none"))] if p.grid == "mvam_photos" else [],
    "mvam_lambda": [(f"{w} beats none", w, "diversity-none") for w in ("lambda-1e-2", "lambda-1e-1", "lambda-1e0", "lambda-1e1")],
}  # fmt: skip
verdicts = claims(
    runs,
    [
        Claim(t, m, {"row": a}, {"row": b}, {})
        for t, a, b in CLAIMS[p.grid]
        for m in ("t2i_r1", "i2t_r1", "rsum")
    ],
)
write_text(f"{stem}.claims.csv", verdicts.to_csv(index=False))
Markdown(to_markdown(verdicts[["claim", "metric", "verdict", "difference", "lower", "n_a", "n_b"]]))
