# %% [markdown]
# # FELGA: a table of the paper, published beside measured
#
# **Paper** *FELGA: Unsupervised Fragment Embedding for Fine-Grained Cross-Modal Association* (WACV 2024), Tables 1 to 5. This page takes a grid,
# gathers the metrics of its finished runs, and puts the paper's numbers beside ours: mean ± standard deviation over seeds, a plot with the random
# order drawn in, and a verdict on each claim.
#
# | grid | table | what it varies |
# |---|---|---|
# | `felga_variants` | 1 | whole pictures and texts, their fragments, FENet with dense, sparse, dynamic labels, and with global alignment; on CLIP |
# | `felga_blip` | 2 | the same rows on BLIP |
# | `felga_blip2` | 3 | the same rows on BLIP-2 |
# | `felga_alignment` | 4 | local alignment, global alignment, both |
# | `felga_global` | 5 | each kind of labels, without and with global alignment |
#
# **Cost** seconds. `make grid GRID=felga_variants` makes the runs and ends with this page. Rows that have not been run stay empty; nothing is guessed.
#
# Our numbers come from other data and another frozen model than the paper's, so the columns are not to be subtracted: what can be compared is the
# *order* of the rows. The paper says "mAP" and prints no random order; ours stands in the last line.

# %% tags=["parameters"]
grid: str = "felga_variants"  # a file of grids/ without its .csv
dataset: str = "scenes"  # the runs' dataset
data_root: str = "data"  # not read here; every notebook has it
scale: str = "tiny"  # the runs' scale
seed: int = 0  # not used here: all seeds that have run are shown
out: str = "papermill_runs/felga"  # folder of the runs
figures: str = "figures"  # where table and plot go
smoke: bool = False  # the runs were smoke runs: their numbers mean nothing

# %% jupyter={"source_hidden": true}
from finematch.config import parameters, root

p = parameters(
    globals(), grid={"felga_variants", "felga_alignment", "felga_global", "felga_blip", "felga_blip2"},
    scale={"tiny", "paper"}, seed=(0, 2**31),
)  # fmt: skip

# %%
import csv

import matplotlib.pyplot as plt
import pandas as pd
from IPython.display import Markdown

from finematch import figures as F
from finematch.files import write_text
from finematch.tables import Claim, claims, measured, published, summary, table, to_markdown


def variants(model: str, proposals: str, prefix: str = "") -> dict[str, str]:
    """The six rows of Tables 1 to 3: ours to the paper's."""
    ours = ("whole", "proposals", "dense", "sparse", "dynamic", "felga")
    theirs = (f"{model} based on entire image/sentence", proposals, "Dense", "Sparse", "Dynamic", "FELGA")
    return {prefix + a: b for a, b in zip(ours, theirs, strict=True)}


GRIDS = {
    # grid: (paper's table, label of the rows axis, {row of ours: row of the paper})
    "felga_variants": ("1", "frozen CLIP, then FENet by its labels", variants("CLIP", "CLIP model based on proposals")),
    "felga_blip": ("2", "frozen BLIP, then FENet by its labels", variants("BLIP", "BLIP based on proposals", "blip-")),
    "felga_blip2": ("3", "frozen BLIP-2, then FENet by its labels", variants("BLIPv2", "BLIPv2 based on proposals", "blip2-")),
    "felga_alignment": ("4", "alignment", {
        "dynamic": "Local-level Alignment", "global": "Global-level Alignment",
        "felga": "Local-level Alignment + Global-level Alignment"}),
    "felga_global": ("5", "labels, without and with global alignment", {
        "dense": "Dense", "dense-global": "Dense + Global Alignment", "sparse": "Sparse", "sparse-global": "Sparse + Global Alignment",
        "dynamic": "Dynamic", "felga": "Dynamic + Global Alignment (FELGA)"}),
}  # fmt: skip
number, axis, names = GRIDS[p.grid]
pre = {"felga_blip": "blip-", "felga_blip2": "blip2-"}.get(p.grid, "")  # of our rows' names
with open(root() / "grids" / f"{p.grid}.csv", newline="") as file:
    order = [row["name"] for row in csv.DictReader(file)]
assert order == list(names), "the grid and the map of its rows to the paper's disagree"
label = f"{p.dataset}.{'smoke' if p.smoke else p.scale}"

# %% [markdown]
# ## The runs
#
# Rows without training do not depend on the seed: their standard deviation is zero, and several seeds of them are one number. On BLIP-2 they are
# scored by the best of a crop's 32 vectors (`crop_score` in `2_train`), while FENet takes the mean of these.

# %%
files = [f for row in order for f in sorted((root() / p.out).glob(f"{label}.{row}.s*/metrics.json"))]
runs = measured(files)
if len(runs):
    runs["row"] = [f.parent.name.split(".")[-2] for f in files]
    print(f"{len(runs)} runs; protocol: {'; '.join(runs['run_protocol'].unique())}")
    print(
        f"commits {', '.join(sorted(runs['run_commit'].unique()))}; {runs['run_seconds'].sum() / 60:.0f} minutes of training in all"
    )
    made = runs[["vlp_kind", "vlp_weights", "proposals_by", "keywords_by"]].drop_duplicates()
    print(f"Fragments by {made.to_dict('records')}")
    assert len(made) == 1, "these runs stand on different models, proposals or keywords: run the grid again"
else:
    runs = pd.DataFrame(columns=["row", "seed"])
    print(
        f"No finished run of {p.grid} on {label}: make grid GRID={p.grid} DATASET={p.dataset} SCALE={p.scale}"
    )
KINDS = {
    "object discovery": "discovery", "description assignment": "assignment",
    "assignment, lexical": "assignment_lexical", "assignment, instance": "assignment_instance",
}  # fmt: skip
METRICS = [
    f"{kind}_{what}" for kind in KINDS.values() for what in ("map", "expected", "macro", "random", "ties")
]
mean = summary(runs, by=["row"], metrics=METRICS)
mean[["row", "discovery_map", "assignment_map", "n"]]

# %% [markdown]
# ## Published beside measured
#
# mAP in per cent. The paper's columns are those of COCO 2017 (of 2014 where the runs are on `coco2014`). Description assignment is measured with the
# relevance `category`; the paper does not define its own. A tie counts against the model, and texts that share a keyword tie whenever it is their best.
# `ties at random` is the mean over all orders of the tied items: that is the number to hold against the random order, which has no ties.

# %%
year = "2014" if p.dataset == "coco2014" else "2017"
whole_table = published("FELGA", number)
paper = whole_table[whole_table["column"].str.contains(year)].copy()
SHORT = {
    f"Microsoft COCO {year} Object Discovery": "object discovery",
    f"Microsoft COCO {year} Description Assignment": "description assignment",
}
paper["column"] = paper["column"].map(SHORT)
assert list(dict.fromkeys(paper["row"])) == list(names.values()), "the paper's rows are not those of the grid"
columns = {kind: f"{KINDS[kind]}_map" for kind in SHORT.values()}
beside = table(paper, mean, row="row", columns=columns, rows=names)
for kind, key in columns.items():
    beside[f"{kind}, ties at random"] = beside["row"].map(
        {
            names[row]: value
            for row, value in zip(mean["row"], mean[key.replace("map", "expected")], strict=True)
        }
    )
beside["n"] = beside.pop("n").astype(object)  # last
by_chance = {}
if len(runs):
    for kind, key in KINDS.items():
        (by_chance[kind],) = (
            runs[f"{key}_random"].round(9).unique()
        )  # more than one: the runs report on different data
    order_by_chance = {"row": "a random order"} | {f"{kind} measured": by_chance[kind] for kind in columns}
    beside = pd.concat([beside, pd.DataFrame([order_by_chance])], ignore_index=True)
stem = root() / p.figures / f"{p.grid}.{label}"
stem.parent.mkdir(parents=True, exist_ok=True)
write_text(f"{stem}.csv", beside.to_csv(index=False))

# %% [markdown]
# Below the table stand the oddities of the printed one: a number that it has in four cells or more, and what was noted where it was copied.


# %%
def cells_of(cells: pd.DataFrame) -> str:
    """Rows and columns of printed cells, in words."""
    said = []
    for row, own in cells.groupby("row", sort=False):
        every = len(own) == whole_table["column"].nunique()
        columns_of = " and ".join(own["column"].str.removeprefix("Microsoft "))
        said.append(f"{row}, {'all columns' if every else columns_of}")
    return "; ".join(said)


remarks = []
for value, cells in whole_table.groupby("value", sort=False):
    if len(cells) > 3:
        remarks.append(f"The paper prints {value:g} in {len(cells)} cells of this table: {cells_of(cells)}.")
for note, cells in whole_table.groupby("note", sort=False):
    own = [x for x in note.split("; ") if x != "mAP" and " features" not in x and "the same" not in x]
    if own:
        remarks.append(f"{cells_of(cells)}: {'; '.join(own)}.")
text = "\n".join([to_markdown(beside), *(f"\n{remark}" for remark in remarks)])
write_text(f"{stem}.md", f"{text}\n")
Markdown(text)

# %% [markdown]
# ## The picture
#
# Left object discovery, right description assignment. Open diamonds are the paper's, on its own data: compare the shape, not the height. The dashed
# line is what a random order of our pictures and texts gives, to be held against the bars (ties at random); the paper's own is not printed and must be
# another.

# %%
with F.style():
    figure, axes = plt.subplots(1, 2, figsize=(9.5, 3.8), layout="constrained")
    rows = beside.set_index("row").loc[list(names.values())]
    for ax, kind in zip(axes, columns, strict=True):
        if by_chance:
            style = {"color": F.INK, "linestyle": "--", "linewidth": 1, "marker": ""}
            ax.axhline(by_chance[kind], label="a random order of ours", **style)
        F.compare_points(
            ax, list(names), rows[f"{kind} published"], rows[f"{kind} measured"], rows[f"{kind} measured sd"],
            ylabel=f"{kind}, mAP (%)",
        )  # fmt: skip
        ax.plot(
            ax.get_xticks() + 0.3, rows[f"{kind}, ties at random"].astype(float), "_", color=F.PALETTE[0], markersize=9,
            label="measured, ties at random",
        )  # fmt: skip
        ax.set_xticks(ax.get_xticks(), [row.removeprefix(pre) for row in names], rotation=25, ha="right")
        ax.set_xlabel(axis)
        low, high = ax.get_ylim()
        ax.set_ylim(low, high + 0.45 * (high - low))  # room for the legend
        ax.legend(loc="upper left")
    F.save(figure, f"{stem}.svg")
    plt.show()

# %% [markdown]
# ## Three readings of "relevant"
#
# > "The objective is to retrieve the relevant sentences containing the associated semantic concepts, which are the labels of the objects."
#
# By `category` (the column above) a text is relevant if its picture has an object of the box's class; by `lexical` if it names the class; by
# `instance` only the box's own text is. `macro` is the mean over classes of their queries' mean, `tied` the number of queries whose
# precision a tie lowered.

# %%
readings = pd.DataFrame()
if len(runs):
    WHAT = {
        "map": "mAP",
        "expected": "ties at random",
        "macro": "macro",
        "random": "random order",
        "ties": "tied",
    }
    lines = []
    for kind, key in KINDS.items():
        for line in mean.to_dict("records"):
            values = {title: line[f"{key}_{what}"] for what, title in WHAT.items()}
            spread = {
                f"{title} sd": line[f"{key}_{what} sd"] for what, title in WHAT.items() if what != "random"
            }
            lines.append({"task": kind, "row": names[line["row"]]} | values | spread | {"n": line["n"]})
    readings = pd.DataFrame(lines)
    readings["task"] = readings["task"].replace("description assignment", "assignment, category")
    write_text(f"{stem}.relevance.csv", readings.to_csv(index=False))
    first = runs.iloc[0]
    print(f"{first['pictures']:g} pictures, {first['boxes']:g} boxes, {first['classes']:g} classes")
Markdown(to_markdown(readings) if len(readings) else "No runs.")

# %% [markdown]
# ## Do the embeddings find what a phrase names?
#
# Of phrases that people linked to boxes: how often the proposal most similar to the phrase has its centre in a true box (pointing), and overlaps one
# by half (R@1). Frozen features, a random proposal and the picture's centre stand beside it; the upper bound is what the proposals allow.

# %%
GROUNDING = {
    f"grounding_{name}_{when}": f"{title}{'' if when == 'after' else ', frozen'}"
    for name, title in (("pointing", "pointing"), ("r1", "R@1"))
    for when in ("before", "after")
} | {
    "grounding_chance_pointing_after": "pointing, chance", "grounding_centre_pointing_after": "pointing, centre",
    "grounding_chance_r1_after": "R@1, chance", "grounding_centre_r1_after": "R@1, centre", "grounding_upper_bound_after": "upper bound",
}  # fmt: skip
found = pd.DataFrame()
if len(runs) and "grounding_r1_after" in runs:
    looked = runs[runs["grounding_r1_after"].notna()]
    found = summary(looked, by=["row"], metrics=list(GROUNDING)).rename(
        columns=GROUNDING | {f"{k} sd": f"{v} sd" for k, v in GROUNDING.items()}
    )
    found["row"] = found["row"].map(names)
    write_text(f"{stem}.grounding.csv", found.to_csv(index=False))
Markdown(to_markdown(found) if len(found) else "No trained run here has linked phrases.")

# %% [markdown]
# ## The claims, judged
#
# Each claim compares two rows over seeds with Welch's one-sided t interval (95 %). *Holds*: the interval lies above zero. *Not separated*: the
# difference has the right sign but is within the noise. *Does not hold*: the wrong sign. With three seeds the test is weak. Two rows without training
# differ by no noise that seeds could show: of them one seed is taken, and *one seed only* is all that is said.
#
# Description assignment is judged twice by `category`: with ties against the model (`_map`) and at random (`_expected`). The frozen whole texts are all
# different and have no ties, so a row of keywords is held against them fairly by the second alone.
#
# `printed` is the same difference in the paper's own table, COCO 2017 and 2014: its words are not always borne out by its cells. "Fragments
# beat wholes" is not among its words; it is asked all the same, for FELGA stands on it.

# %%
FROZEN = {row for row in order if row.endswith(("whole", "proposals"))}
VARIANTS = [
    ("dynamic labels beat sparse ones", "dynamic", "sparse"),
    ("dynamic labels beat dense ones", "dynamic", "dense"),
    ("FELGA (with global alignment) beats dynamic labels alone", "felga", "dynamic"),
    ("FELGA beats the frozen fragments", "felga", "proposals"),
    ("FELGA beats the frozen whole pictures and texts", "felga", "whole"),
    ("FENet without global alignment (dynamic) beats the frozen fragments", "dynamic", "proposals"),
    ("fragments beat wholes, both frozen", "proposals", "whole"),
]
CLAIMS = {
    "felga_alignment": [
        ("both alignments beat local alone", "felga", "dynamic"),
        ("both alignments beat global alone", "felga", "global"),
    ],
    "felga_global": [
        ("global alignment helps dense labels", "dense-global", "dense"),
        ("global alignment helps sparse labels", "sparse-global", "sparse"),
        ("global alignment helps dynamic labels", "felga", "dynamic"),
        ("with global alignment dynamic labels beat sparse ones", "felga", "sparse-global"),
        ("with global alignment dynamic labels beat dense ones", "felga", "dense-global"),
    ],
}.get(p.grid, [(claim, pre + a, pre + b) for claim, a, b in VARIANTS])
JUDGED = (
    "discovery_map",
    "assignment_map",
    "assignment_expected",
    "assignment_lexical_expected",
    "assignment_instance_expected",
)
printed = whole_table.set_index(["row", "column"])["value"]


def in_print(better: str, worse: str, metric: str) -> dict[str, float]:
    """The difference that the paper's own table has, by year; it has one kind of description assignment."""
    task = "Object Discovery" if metric.startswith("discovery") else "Description Assignment"
    cells = {y: f"Microsoft COCO {y} {task}" for y in ("2017", "2014")}
    return {
        f"printed {y}": float(printed[names[better], c] - printed[names[worse], c]) for y, c in cells.items()
    }


lines = []
for claim, a, b in CLAIMS:
    for metric in JUDGED:
        frame = runs
        if {a, b} <= FROZEN and len(runs):
            frame = runs[~runs["row"].isin(FROZEN) | ~runs["row"].duplicated()]
        verdict = claims(frame, [Claim(claim, metric, {"row": a}, {"row": b}, {})]).iloc[0].to_dict()
        lines.append(verdict | in_print(a, b, metric))
verdicts = pd.DataFrame(lines)
write_text(f"{stem}.claims.csv", verdicts.to_csv(index=False))
shown = ["claim", "metric", "verdict", "difference", "lower", "n_a", "n_b", "printed 2017", "printed 2014"]
Markdown(to_markdown(verdicts[shown]))
