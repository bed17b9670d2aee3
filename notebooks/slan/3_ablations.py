# %% [markdown]
# # SLAN: a table of the paper, published beside measured
#
# **Paper** *SLAN: Self-Locator Aided Network for Vision-Language Understanding* (ICCV 2023; arXiv 2211.16208, version 1, with the appendix). This
# page takes a grid, gathers the metrics of its finished runs, and puts the paper's numbers beside ours: mean ± standard deviation over seeds, a
# plot, how well the boxes of each level find what is named, and a verdict on each claim.
#
# | grid | table | what it varies |
# |---|---|---|
# | `slan_adaptors` | 6 (arXiv 5) | frozen proposals without a self-locator; trained ones with 0 to 3 region adaptors |
# | `slan_filter` | 7 (arXiv 6) | the region filter: all proposals, the top 10, those above a threshold |
# | `slan_features` | arXiv 10 | where the maps of the levels come from: encoder or decoder |
# | `slan_detector` | arXiv 9 | proposals from scratch, or trained on boxes first |
# | `slan_boxes` | none | what moves the boxes: the gradient of pooling, the regression loss and its weight, random negatives to the end, nothing; a detector that stays as it is, and there how far a level looks (reading S6) and steps (S5) |
# | `slan_tokens` | 6, rows 1 and 2 | frozen and trained proposals where the contrast compares regions (arXiv's token, reading S20): the ICCV version's reads none, so that these rows are one model there |
# | `slan_epochs` | 6, rows 2 to 5 | three times as many epochs of training, without a self-locator, with 1 to 3 adaptors, and over a detector's proposals that do not leave things |
# | `slan_photos` | none | photos (Flickr8k): no self-locator, and three adaptors |
# | `slan_cost` | 8 (arXiv 4 and 7) | nothing is run: parameters and operations of the paper's sizes, counted in `benchmarks/slan_cost.json` |
#
# The row `levels-3` is the whole model and one run in all grids.
#
# **Cost** seconds. `make grid GRID=slan_adaptors` makes the runs and ends with this page. `slan_cost` has none: the page is called by itself,
# `papermill notebooks/slan/3_ablations.ipynb page.ipynb -p grid slan_cost`. Rows that have not been run stay empty; nothing is guessed.
#
# **Expected** on Flickr30k the paper prints 85.0 / 74.1 (image-to-text / text-to-image R@1) for frozen proposals and 90.3 / 78.9 for three adaptors. Our
# numbers come from other data (`scenes`, or Flickr8k photos), so columns are not to be subtracted: what can be compared is the *order* of the rows.
# Table 6 is trained on the downstream set alone, with a ViT-B; Table 8 has 85.1 / 68.9 on COCO in place of Table 6's 72.1 / 58.3, with a ResNet-50 after
# pretraining on 14M pictures. Ours are not pretrained either: Table 6 is the one to hold them against.

# %% tags=["parameters"]
grid: str = "slan_adaptors"  # a file of grids/ without its .csv, or slan_cost
dataset: str = "scenes"  # the runs' dataset
data_root: str = "data"  # not read here; every notebook has it
scale: str = "tiny"  # the runs' scale
seed: int = 0  # not used here: all seeds that have run are shown
out: str = "papermill_runs/slan"  # folder of the runs
figures: str = "figures"  # where table and plot go
smoke: bool = False  # the runs were smoke runs: their numbers mean nothing

# %% jupyter={"source_hidden": true}
from finematch.config import parameters, root

p = parameters(
    globals(), grid={"slan_adaptors", "slan_filter", "slan_features", "slan_detector", "slan_boxes", "slan_tokens", "slan_epochs",
          "slan_photos", "slan_cost"},
    scale={"tiny", "paper"}, seed=(0, 2**31),
)  # fmt: skip

# %%
import csv
import json

import matplotlib.pyplot as plt
import pandas as pd
from IPython.display import Markdown
from matplotlib.ticker import LogLocator

from finematch import figures as F
from finematch.files import write_text
from finematch.tables import (
    Claim,
    measured,
    published,
    summary,
    table,
    to_markdown,
)

GRIDS = {
    # grid: (paper, table, label of the rows axis, {row of ours: row of the paper})
    "slan_adaptors": ("SLAN", "6", "proposals, number of adaptors", {
        "frozen-0": "frozen, 0", **{f"levels-{k}": f"trainable, {k}" for k in range(4)}}),
    "slan_filter": ("SLAN", "7", "region filter", {
        "filter-none": "Top K -, Threshold -", "filter-10": "Top K 10, Threshold -", "filter-10-03": "Top K 10, Threshold 0.3",
        "levels-3": "Top K 10, Threshold 0.5"}),
    "slan_features": ("SLAN-v1", "10", "source of the levels' maps", {"encoder": "Encoder", "levels-3": "Decoder"}),
    "slan_detector": ("SLAN-v1", "9", "proposals", {"levels-3": "from scratch", "detector": "pre-trained"}),
    "slan_boxes": ("", "", "what moves the proposals", {
        "levels-3": "pooling", "regression-005": "pooling, 0.05 L_reg", "regression-1": "pooling, L_reg", "no-gradient": "nothing",
        "random": "pooling, random negatives", "detector-frozen": "a detector, frozen",
        "detector-region": "detector, N of the region", "detector-n": "detector, steps of N"}),
    "slan_tokens": ("", "", "proposals, a contrast that reads regions", {
        "frozen-0-regions": "frozen", "levels-0-regions": "trainable"}),
    "slan_epochs": ("", "", "number of adaptors, epochs", {
        "levels-0": "0, 2 epochs", "levels-3": "3, 2 epochs", "detector-region": "3, detector, 2 epochs",
        **{f"levels-{k}-6": f"{k}, 6 epochs" for k in range(4)}, "detector-region-6": "3, detector, 6 epochs"}),
    "slan_photos": ("", "", "number of adaptors", {"levels-0": "0", "levels-3": "3"}),
    "slan_cost": ("SLAN", "8", "model", {}),
}  # fmt: skip
version, number, axis, names = GRIDS[p.grid]
is_cost = p.grid == "slan_cost"
order = []
if not is_cost:
    with open(root() / "grids" / f"{p.grid}.csv", newline="") as file:
        order = [row["name"] for row in csv.DictReader(file)]
assert order == list(names), "the grid and the map of its rows to the paper's disagree"
site = "COCO" if p.dataset.startswith("coco") else "Flickr30k"
if version:
    whole_table = published(version, number)
else:  # no such table in the paper: every cell of its columns stays empty
    empty = [{"row": row, "column": f"{place} {way}@1"} for row in names.values() for place in ("COCO", "Flickr30k")
             for way in ("i2t", "t2i")]  # fmt: skip
    whole_table = pd.DataFrame(empty).assign(value=float("nan"), note="")
for newer, older in (("6", "5"), ("7", "6")):  # the two versions of the paper print the same cells here
    assert published("SLAN", newer)["value"].tolist() == published("SLAN-v1", older)["value"].tolist()
label = f"{p.dataset}.{'smoke' if p.smoke else p.scale}"
stem = root() / p.figures / f"{p.grid}.{label}"
stem.parent.mkdir(parents=True, exist_ok=True)

# %% [markdown]
# ## The runs
#
# A run's list is ranked by the contrast, and the best of it again by the matching head; how many, the protocol says. The proposals that are
# trained on boxes first (`detector` in `2_train`) stand for the paper's weights from COCO detection: those boxes are the only ones that
# any row has seen.

# %%
files = [f for row in order for f in sorted((root() / p.out).glob(f"{label}.{row}.s*/metrics.json"))]
runs = measured(files)
if len(runs):
    runs["row"] = [f.parent.name.split(".")[-2] for f in files]
    print(
        f"{len(runs)} runs of version {', '.join(runs['version'].unique())}; protocol: {'; '.join(runs['run_protocol'].unique())}"
    )
    print(
        f"commits {', '.join(sorted(runs['run_commit'].unique()))}; {runs['run_seconds'].sum() / 60:.0f} minutes of training in all"
    )
else:
    runs = pd.DataFrame(columns=["row", "seed"])
    print(
        "slan_cost has no runs: it is counted."
        if is_cost
        else f"No finished run of {p.grid} on {label}: make grid GRID={p.grid} DATASET={p.dataset} SCALE={p.scale}"
    )
METRICS = ["i2t_r1", "t2i_r1", "rsum"]
mean = summary(runs, by=["row"], metrics=[*METRICS, *(f"itc_{metric}" for metric in METRICS)])
mean[["row", *METRICS, "n"]]

# %% [markdown]
# ## Published beside measured
#
# R@1 in per cent. The paper's columns are COCO's where the runs are on COCO, Flickr30k's beside everything else.
#
# `slan_cost`: one picture of 384 px and one caption, through all that ranks a pair, for both versions of the model. The paper does not say whether
# a multiply-add is one FLOP or two, so both stand here (FLOPs: two). The published parameters of the ViT rows are those of arXiv's Table 4, a column
# that the ICCV paper dropped. BLIP is counted in the same way, as a check on the way.

# %%
if is_cost:
    counted = {"rows": [], "published_over_ours": {"blip": {}}}
    if (file := root() / "benchmarks" / "slan_cost.json").exists():
        counted = json.loads(file.read_text(encoding="utf-8"))["table8"]
    else:
        print(
            "benchmarks/slan_cost.json is not there, so nothing is counted: benchmarks/slan_cost.py writes it"
        )
    columns = {"Params(M)": "parameters_m", "FLOPS(G)": "gflops"}
    printed = [whole_table[whole_table["row"] != "Ours"]]
    sizes = published("SLAN-v1", "4")
    for name, cells in (("ICCV", whole_table), ("arXiv", published("SLAN-v1", "7"))):
        own = pd.concat([cells.replace("Ours", "Ours ResNet50"), sizes]).drop_duplicates(["row", "column"])
        own = own[own["row"].str.startswith("Ours")]
        printed.append(own.assign(row=own["row"] + f", {name}"))
    paper = pd.concat(printed, ignore_index=True)
    paper = paper[paper["column"].isin(columns)]
    names = {f"SLAN {b} {v}": f"Ours {b}, {name}" for v, name in (("iccv", "ICCV"), ("arxiv", "arXiv"))
             for b in ("ResNet50", "Vit-Base", "Vit-Large", "Vit-Huge")}  # fmt: skip
    lines = [{**line, "row": f"{line['name']} {line['version']}".strip()} for line in counted["rows"]]
    lines += [{**line, "row": name} for name, line in counted["published_over_ours"]["blip"].items()]
    mean = pd.DataFrame(lines, columns=["row", *columns.values(), "gmultiply_adds"]).assign(n=1)
    mean[[f"{key} sd" for key in columns.values()]] = float("nan")
else:
    columns = {"i2t@1": "i2t_r1", "t2i@1": "t2i_r1"}
    paper = whole_table[whole_table["column"].str.startswith(site)].copy()
    paper["column"] = paper["column"].str.removeprefix(f"{site} ")
    assert list(dict.fromkeys(paper["row"])) == list(names.values()), (
        "the paper's rows are not those of the grid"
    )
beside = table(paper, mean, row="row", columns=columns, rows=names)
if is_cost:
    beside = beside.drop(columns=["n", *(f"{column} measured sd" for column in columns)])
    beside.columns = [name.replace("measured", "counted") for name in beside.columns]
    products = dict(zip(mean["row"].replace(names), mean["gmultiply_adds"], strict=True))
    beside["multiply-adds(G) counted"] = beside["row"].map(products).astype(float)
write_text(f"{stem}.csv", beside.to_csv(index=False))
Markdown(to_markdown(beside))

# %% [markdown]
# ## The contrast alone, and what re-ranking adds
#
# *Contrast* is the ranking that the matching head was given. In the ICCV version no region enters it: it compares the pooled map with BERT's [CLS]. What
# the locator is good for in retrieval shows in the step from here to *re-ranked*, and in what its losses taught the two towers.
#
# Below the table stand the oddities of the printed one, as they were noted where it was copied.


# %%
def cells_of(cells: pd.DataFrame) -> str:
    """Rows and columns of printed cells, in words."""
    said = []
    for row, own in cells.groupby("row", sort=False):
        every = len(own) == (whole_table["row"] == row).sum()
        said.append(row if every else f"{row}, {' and '.join(own['column'])}")
    return "; ".join(said)


parts = [to_markdown(beside)]
if not is_cost:
    where = f"{site}, {'ICCV' if version == 'SLAN' else 'arXiv'} Table {number}" if version else "nothing"
    parts[0] += f"\n\nPublished: {where}. Measured: {p.dataset}, after re-ranking."
    WAYS = {"i2t@1": "i2t_r1", "t2i@1": "t2i_r1", "rsum": "rsum"}
    titles = {f"{pre}{key}": f"{title}, {stage}" for title, key in WAYS.items()
              for pre, stage in (("itc_", "contrast"), ("", "re-ranked"))}  # fmt: skip
    spreads = {f"{key} sd": f"{title} sd" for key, title in titles.items()}
    contrast = mean.rename(columns=titles | spreads).assign(row=mean["row"].map(names))
    contrast = contrast[["row", *titles.values(), *spreads.values(), "n"]]
    if len(contrast):
        parts.append(f"The contrast alone, and after re-ranking:\n\n{to_markdown(contrast)}")
elif counted["rows"]:
    fits = counted["published_over_ours"]
    parts.append("Ways to count whose numbers are within 5 % of every printed one:\n\n" + "\n".join(
        f"* {what}: {', '.join(fits[f'{key}_fit']) or 'none of ours'}."
        for what, key in (("parameters", "parameters"), ("FLOPs", "flops"))
    ))  # fmt: skip
remarks = []
for note, cells in whole_table.groupby("note", sort=False):
    said = note.split("; ")
    odd = [k for k, x in enumerate(said) if any(w in x for w in ("Table", "text", "elsewhere", "says"))]
    if odd:  # what stands before the first of them describes the row
        remarks.append(f"* {cells_of(cells)}: {'; '.join(said[odd[0] :])}.")
parts += ["\n".join(remarks)] if remarks else []
text = "\n\n".join(parts)
write_text(f"{stem}.md", f"{text}\n")
Markdown(text)

# %% [markdown]
# ## The picture
#
# Left image-to-text, right text-to-image (`slan_cost`: parameters and FLOPs). Open diamonds are the paper's, on its own data: compare the shape, not the
# height. The dashes are the contrast alone.

# %%
with F.style():
    figure, axes = plt.subplots(1, 2, figsize=(9.5, 4.2 if is_cost else 3.8), layout="constrained")
    ours, units = ("counted", "") if is_cost else ("measured", " R@1 (%)")
    for ax, column in zip(axes, columns, strict=True):
        F.compare_points(
            ax, list(beside["row"]), beside[f"{column} published"], beside[f"{column} {ours}"], beside.get(f"{column} measured sd"),
            ylabel=f"{column.split('@')[0]}{units}",
        )  # fmt: skip
        if is_cost:
            ax.set_yscale("log")
            ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            ax.yaxis.set_major_formatter("{x:g}")
            ax.yaxis.set_minor_formatter("")
            ax.legend(["published", "counted"])
        elif len(contrast):
            alone = beside["row"].map(contrast.set_index("row")[f"{column}, contrast"]).astype(float)
            ax.plot(ax.get_xticks() + 0.1, alone, "_", color=F.INK, markersize=11, label="contrast alone")
            ax.legend(loc="best")
        if max(map(len, beside["row"])) > 12:
            ax.set_xticks(ax.get_xticks(), list(beside["row"]), rotation=40 if is_cost else 20, ha="right")
        ax.set_xlabel(axis)
    F.save(figure, f"{stem}.svg")
    plt.show()

# %% [markdown]
# ## Does the locator locate?
#
# Of phrases that people linked to boxes (no training sees the links): how often the box that fits the phrase best has its centre in a true box
# (pointing), and overlaps one by half (R@1). Level 0 are the proposals that passed the filter; each adaptor makes a level, and scores it anew. Beside
# a level stand a random one of its boxes (chance), the box in the middle of the picture (centre), the best of its boxes (upper bound: an oracle
# that knows the truth), and the same before training. A level may rise by better boxes or by a better choice among them: chance and upper bound rise
# with the former alone. `boxes` is how many a picture has after training: the filter lets through what stands out.

# %%
NAMES = {
    "pointing_before": "pointing, untrained", "pointing_after": "pointing", "r1_before": "R@1, untrained", "r1_after": "R@1",
    "chance_pointing_after": "pointing, chance", "centre_pointing_after": "pointing, centre", "chance_r1_after": "R@1, chance",
    "centre_r1_after": "R@1, centre", "upper_bound_after": "upper bound", "upper_bound_before": "upper bound, untrained",
    "upper_bound_pointing_after": "pointing, upper bound",
}  # fmt: skip
levels = pd.DataFrame(
    [
        {"row": run["row"], "seed": run["seed"], "level": level}
        | {name: run[f"grounding_level{level}_{name}"] for name in NAMES}
        | {"protocol": run[f"grounding_level{level}_protocol_after"]}
        for run in runs.to_dict("records")
        for level in range(13)
        if pd.notna(run.get(f"grounding_level{level}_r1_after"))
    ]
)
found = pd.DataFrame()
if len(levels):
    found = summary(levels, by=["row", "level"], metrics=list(NAMES)).rename(
        columns=NAMES | {f"{k} sd": f"{v} sd" for k, v in NAMES.items()}
    )
    boxes = levels["protocol"].str.extract(r"(\d+)(?: to (\d+))? candidate boxes").ffill(axis=1).astype(int)
    boxes = boxes.groupby([levels["row"], levels["level"]], sort=False).agg({0: "min", 1: "max"})
    found.insert(
        2, "boxes", [f"{low}" if low == high else f"{low} to {high}" for low, high in boxes.to_numpy()]
    )
    found["row"] = found["row"].map(names)
    found["level"] = found["level"].map(lambda level: f"{level}, proposals" if level == 0 else str(level))
    write_text(f"{stem}.grounding.csv", found.to_csv(index=False))
Markdown(to_markdown(found) if len(found) else "No run here has linked phrases.")

# %% [markdown]
# The whole model (`levels-3`), level by level: left pointing, right R@1. In `slan_boxes` it is `detector-frozen`, the row whose proposals lie on things; in
# `slan_epochs`, `detector-region-6`.

# %%
looked_at = {"slan_boxes": "detector-frozen", "slan_epochs": "detector-region-6"}.get(p.grid, "levels-3")
shown = levels[levels["row"] == looked_at] if len(levels) else levels
if len(shown):
    whole = summary(shown, by=["level"], metrics=list(NAMES)).set_index("level")
    LINES = {  # metric of pointing, of R@1: how it is drawn
        ("upper_bound_pointing_after", "upper_bound_after"): ("upper bound (oracle)", F.PALETTE[2], "-", "^"),
        ("pointing_after", "r1_after"): ("trained, mean ± sd", F.PALETTE[0], "-", "o"),
        ("pointing_before", "r1_before"): ("untrained, mean ± sd", F.PALETTE[1], "--", "D"),
        ("chance_pointing_after", "chance_r1_after"): ("chance", F.INK, ":", ""),
        ("centre_pointing_after", "centre_r1_after"): ("centre", F.FAINT, "-.", ""),
    }
    with F.style():
        figure, axes = plt.subplots(1, 2, figsize=(9.5, 3.4), layout="constrained")
        for which, (ax, title) in enumerate(zip(axes, ("pointing (%)", "R@1 (%)"), strict=True)):
            for keys, (name, colour, dash, marker) in LINES.items():
                values, spread = whole[keys[which]], whole[f"{keys[which]} sd"].fillna(0)
                aside = 0.04 * ((marker == "D") - (marker == "o"))  # so that bars stand side by side
                ax.errorbar(whole.index + aside, values, spread if "sd" in name else None, color=colour, linestyle=dash,
                            marker=marker, capsize=3, label=name)  # fmt: skip
            ax.set_xticks(
                whole.index, [f"{level}, proposals" if level == 0 else level for level in whole.index]
            )
            ax.set_xlabel("level")
            ax.set_ylabel(title)
            ax.set_ylim(bottom=0)
            ax.grid(axis="y")
        figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=len(LINES))
        F.save(figure, f"{stem}.grounding.svg")
        plt.show()
else:
    print(f"{looked_at} has not run, or has no linked phrases.")

# %% [markdown]
# ## The paper's claims, judged
#
# Each claim compares two rows over seeds with Welch's one-sided t interval (95 %). *Holds*: the interval lies above zero. *Not separated*: the
# difference has the right sign but is within the noise. *Does not hold*: the wrong sign. With three seeds the test is weak. `itc_rsum` is the contrast
# alone.
#
# `printed` is the same difference in the paper's own table: its words are not always borne out by its cells. It prints no rsum here.

# %%
STEPS = [
    (f"{k + 1} adaptors beat {k}" if k else "1 adaptor beats none", f"levels-{k + 1}", f"levels-{k}")
    for k in range(3)
]
CLAIMS = {
    "slan_adaptors": [
        ("trained proposals beat frozen ones", "levels-0", "frozen-0"), *STEPS, ("3 adaptors beat none", "levels-3", "levels-0")],
    "slan_filter": [
        ("the top 10 beat all proposals", "filter-10", "filter-none"),
        ("a threshold of 0.3 beats none", "filter-10-03", "filter-10"),
        ("a threshold of 0.5 beats 0.3", "levels-3", "filter-10-03"),
    ],
    "slan_features": [("maps of the decoder beat those of the encoder", "levels-3", "encoder")],
    "slan_detector": [("proposals trained on boxes first beat those from scratch", "detector", "levels-3")],
    "slan_boxes": [
        ("the regression loss as printed beats none", "regression-1", "levels-3"),
        ("proposals of a frozen detector beat those from scratch", "detector-frozen", "levels-3"),
        ("random negatives to the end beat hard ones", "random", "levels-3"),
        ("neighbourhoods of the region beat those of the map", "detector-region", "detector-frozen"),
        ("steps of N/K beat those of N, as printed", "detector-frozen", "detector-n"),
    ],
    "slan_tokens": [("trained proposals beat frozen ones", "levels-0-regions", "frozen-0-regions")],
    "slan_epochs": [
        *((f"after 6 epochs {claim}", f"{a}-6", f"{b}-6") for claim, a, b in STEPS),
        ("after 6 epochs 3 adaptors beat none", "levels-3-6", "levels-0-6"),
        ("3 adaptors: 6 epochs beat 2", "levels-3-6", "levels-3"),
        ("no adaptor: 6 epochs beat 2", "levels-0-6", "levels-0"),
        ("3 adaptors over a detector: 6 epochs beat 2", "detector-region-6", "detector-region"),
    ],
    "slan_photos": [("3 adaptors beat none", "levels-3", "levels-0")],
    "slan_cost": [],
}[p.grid]  # fmt: skip
cells = whole_table.set_index(["row", "column"])["value"]
lines, contradicted = [], []
for claim, a, b in CLAIMS:
    for metric in ("t2i_r1", "i2t_r1", "rsum", "itc_rsum"):
        lines.append(Claim(claim, metric, {"row": a}, {"row": b}, {}).judge(runs))
        for place in ("COCO", "Flickr30k") if metric.endswith("r1") else ():
            column = f"{place} {metric.replace('_r', '@')}"
            lines[-1][f"printed {place}"] = gain = round(
                float(cells[names[a], column] - cells[names[b], column]), 2
            )
            if gain <= 0:
                contradicted.append(f'"{claim}": the paper\'s own cells say {gain:+.1f} ({column}).')
if contradicted:
    print(*contradicted, sep="\n")
rows_judged = pd.DataFrame(lines)
Markdown(to_markdown(rows_judged.drop(columns="where")) if lines else "No claim here is judged by runs.")

# %% [markdown]
# ### Do levels improve boxes?
#
# Two levels of one run share its seed, so they are compared in pairs: the difference within each run, $d_s$ of seed $s$, is held against zero. (Welch's
# interval against a side that is zero without spread is that of the paired test, $\bar d - t_{0.95,\,n-1}\, s_d / \sqrt n$.) The same is asked of the last
# level against a random one of its boxes, the box in the middle, and itself before training; and of its boxes as such, without the choice among them,
# against the proposals. The row `levels-3` is the same in all grids and is judged in `slan_adaptors` alone; `slan_boxes` judges `detector-frozen`, `slan_epochs` the longer run.


# %%
def paired(claim: str, metric: str, better: pd.Series, worse: pd.Series) -> dict:
    """The verdict on a difference within runs; both sides are indexed by seed."""
    side = {"seed": better.index, "side": "gain", metric: (better - worse).to_numpy(dtype=float)}
    frame = pd.concat([pd.DataFrame(side), pd.DataFrame(side | {"side": "zero", metric: 0.0})])
    return Claim(claim, metric, {"side": "gain"}, {"side": "zero"}, {}).judge(frame)


# by hand: differences of 1, 2 and 3 have the mean 2 and s = 1; t of 2 degrees of freedom is 2.920 in any table
example = paired("", "r1", pd.Series([5.0, 7.0, 9.0]), pd.Series([4.0, 5.0, 6.0]))
assert example["difference"] == 2
assert round(example["lower"], 3) == round(2 - 2.920 / 3**0.5, 3)

lines = []
if p.grid in ("slan_adaptors", "slan_boxes", "slan_epochs", "slan_photos") and len(shown):
    last = int(shown["level"].max())
    for metric in ("pointing", "r1"):
        at = shown.pivot(index="seed", columns="level", values=f"{metric}_after")
        end = shown[shown["level"] == last].set_index("seed")
        baselines = {
            "a random one of its boxes": end[f"chance_{metric}_after"],
            "the box in the middle of the picture": end[f"centre_{metric}_after"],
            "itself before training": end[f"{metric}_before"],
        }
        asked = [(f"level {last} beats the proposals", at[last], at[0])]
        asked += [(f"level {k} beats level {k - 1}", at[k], at[k - 1]) for k in range(1, last + 1)]
        asked += [(f"level {last} beats {name}", at[last], base) for name, base in baselines.items()]
        start = shown[shown["level"] == 0].set_index("seed")
        sides = (one[f"chance_{metric}_after"] for one in (end, start))
        asked.append((f"a random box of level {last} beats a random proposal", *sides))
        lines += [paired(f"{looked_at}: {claim}", f"grounding_{metric}", *sides) for claim, *sides in asked]
levels_judged = pd.DataFrame(lines)
verdicts = pd.concat([rows_judged, levels_judged], ignore_index=True)
if len(verdicts):
    write_text(f"{stem}.claims.csv", verdicts.to_csv(index=False))
Markdown(to_markdown(levels_judged.drop(columns="where")) if lines else "Not judged here.")
