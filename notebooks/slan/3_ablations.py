# %% [markdown]
# # SLAN: a table of the paper, published beside measured
#
# **Paper** *SLAN: Self-Locator Aided Network for Vision-Language Understanding* (ICCV 2023; arXiv 2211.16208, version 1, with the appendix). This
# page takes a grid, gathers the metrics of its finished runs, and shows the paper's numbers beside ours: mean ± standard deviation over seeds, a
# plot, how well the boxes of each level match annotated phrases, and a verdict on each claim.
#
# | grid | table | what it varies |
# |---|---|---|
# | `slan_adaptors` | 6 (arXiv 5) | frozen proposals without a self-locator; trained ones with 0 to 3 region adaptors |
# | `slan_filter` | 7 (arXiv 6) | the region filter: all proposals, the top 10, those above a threshold |
# | `slan_features` | arXiv 10 | where the maps of the levels come from: encoder or decoder |
# | `slan_detector` | arXiv 9 | proposals from scratch, or trained on boxes first |
# | `slan_boxes` | none | what moves the boxes: the gradient of pooling, the regression loss and its weight, random negatives; a frozen detector, how far a level looks (reading S6) and how far it steps (S5) |
# | `slan_tokens` | 6, rows 1 and 2 | frozen and trained proposals where the contrast compares regions (the arXiv version's token, reading S20) |
# | `slan_epochs` | 6, rows 2 to 5 | three times as many epochs |
# | `slan_retrieval` | 2 (arXiv 1), on COCO 3 | zero-shot and fine-tuned, with 3 adaptors and without. On scenes the pretraining has no image with one of eight combinations of shape and colour, and each test image has one in a caption |
# | `slan_backbones` | 4, on COCO 3 | the image encoder: ResNet, ViT-Base, -Large, -Huge; on scenes small members of the same families |
# | `slan_photos` | none | photos (Flickr8k): no self-locator, and three adaptors; the same over the boxes of a detector |
# | `slan_detr`, `slan_detr_features` | arXiv 9, 10 | the same questions with DETR's queries as proposals |
# | `slan_captioning`, `slan_vqa`, `slan_nlvr2` | 3 | a task after fine-tuning, from random weights, and pretrained without and with a locator |
# | `slan_detection`, `slan_grounding` | 4 | the same for boxes |
# | `slan_video` | 5 | the same for videos, zero-shot |
# | `slan_readings` | none | other readings, one at a time; [8_readings](../8_readings.ipynb) draws them |
#
# Table 6 is trained on the downstream set alone, with a ViT-B; Table 8 has 85.1 / 68.9 on COCO where Table 6 has 72.1 / 58.3, with a ResNet-50 after
# pretraining on 14M images. Ours are not pretrained either, so Table 6 is the one to compare with. Table 8 stands at the end of this page: its
# parameters and FLOPs are counted, nothing is trained.
#
# **Cost** seconds. `make grid GRID=slan_adaptors` makes the runs and ends with this page. Rows that have not been run stay empty. `docs/adding_a_table.md`
# explains grids; this page works for any grid of the method.
#
# Our numbers come from other data than the paper's (`scenes`, or Flickr8k photos), so the columns are not to be subtracted from each other. What can be
# compared is the order of the rows.

# %% tags=["parameters"]
grid: str = "slan_adaptors"  # a file of grids/ without its ending
dataset: str = "scenes"  # the runs' dataset
data_root: str = "data"  # not read here; every notebook has it
scale: str = "tiny"  # the runs' scale
seed: int = 0  # not used here: all seeds that have run are shown
out: str = "papermill_runs/slan"  # folder of the runs
figures: str = "figures"  # where tables and plots go
smoke: bool = False  # the runs were smoke runs: their numbers mean nothing

# %% jupyter={"source_hidden": true}
from finematch.config import parameters, root

p = parameters(globals(), scale={"tiny", "paper"}, seed=(0, 2**31))

# %%
from IPython.display import Markdown, display

from finematch import figures as F
from finematch import grids, tables as T

table = grids.grid(p.grid, p.dataset)
runs = T.runs_of(table, p.dataset, p.scale, root() / p.out, smoke=p.smoke)  # by reading
name = f"{p.grid}.{p.dataset}"
stem = root() / p.figures / f"{name}.{grids.label(p.scale, smoke=p.smoke)}"
stems = {reading: root() / p.figures / f"{name}.{grids.label(p.scale, reading, smoke=p.smoke)}" for reading in runs}
print(f"{table.title}.\n{T.about(table, runs)}")

# %% [markdown]
# ## Published beside measured

# %%
T.write(table, p.dataset, p.scale, runs, stem)
beside = T.to_markdown(T.beside_readings(table, runs))
Markdown("\n\n".join([beside, *(f"* {line}" for line in (*table.remarks, *T.oddities(table)))]))

# %%
also = {reading: T.also(table, of) for reading, of in runs.items()}
Markdown(T.by_reading(also, otherwise="nothing else is measured."))

# %% [markdown]
# Published and measured numbers have panels and scales of their own, for they come from other data: compare the order of the rows and the shape, which
# all panels have in common, not the level. Small dots are single seeds.

# %%
for reading, of in runs.items():
    if len(of) or stems[reading] == stem:
        beside = T.beside(table, of)
        with F.style():
            figure = F.beside(beside[beside["row"] != "a random order"], table.plot, **T.drawn(table, of, p.dataset, reading))
            F.save(figure, f"{stems[reading]}.svg")
        display(Markdown(f"Reading {reading}:"), figure)

# %% [markdown]
# ## Are annotated phrases found?
#
# For annotated phrases (no training sees the annotation): how often the box that fits the phrase best has its centre in a ground-truth box
# (pointing), and how often it overlaps one by half (R@1). Level 0 are the proposals that passed the filter; each adaptor adds a level and scores its
# boxes anew. Beside a level stand the same before training, a random one of its boxes (chance), the box in the middle of the image (centre), and the
# best of its boxes (upper bound). A level may rise by better boxes or by a better choice among them: chance and upper bound rise with better boxes alone.

# %%
found = {reading: T.grounding(of, table.names) for reading, of in runs.items()}
Markdown(T.by_reading(found, digits=1, otherwise="no run here has annotated phrases."))

# %% [markdown]
# The row whose levels the grid judges, level by level. Two levels of one run share its seed, so the claims below compare them within each run.

# %%
for reading, of in found.items():
    of_row = of[of["row"] == table.names[table.levels]] if table.levels and len(of) else of[:0]
    if len(of_row):
        with F.style():
            own = runs[reading][runs[reading]["row"] == table.levels]
            figure = F.levels(of_row, data=T.seeds_of(table.measured_on or p.dataset, own, reading))
            F.save(figure, f"{stems[reading]}.grounding.svg")
        display(figure)

# %% [markdown]
# ## The claims, judged
#
# Each claim is judged under both readings of the paper, side by side: `default` is ours, `literal` the paper's text (`reading` of `2_train`;
# where no row of a grid differs between them, one run stands for both). The line below the table runs what is missing.
#
# Each claim compares two rows over seeds by Student's t interval on the difference (two-sided, 95 %): paired where both rows share seeds, data and the
# order of the training pairs, Welch's otherwise; the column `test` says which. The claim *holds* where the interval lies above zero, it is
# *contradicted* where the interval lies below, *undecided* where it contains zero, and *not run* where a row has no run or only
# one seed: one seed has no spread, so there is no interval. Three seeds make a weak test, so *undecided* is no evidence against a claim. `printed difference` is the same difference in the paper's own table.

# %%
verdicts = T.verdicts(table, runs)
missing = T.not_run(table, p.dataset, p.scale, verdicts)
Markdown("\n\n".join([T.verdict_table(verdicts), *missing]))

# %%
for reading, of in verdicts.groupby("reading", sort=False):
    if of["lower"].notna().any():
        with F.style():
            figure = F.intervals(of, data=T.seeds_of(table.measured_on or p.dataset, runs[reading], reading))
            F.save(figure, f"{stems[reading]}.claims.svg")
        display(Markdown(f"Reading {reading}:"), figure)

# %% [markdown]
# ## Table 8: parameters and operations
#
# Nothing is trained for this table: it counts one image of 384 px and one caption through everything that ranks a pair, for both versions of the model.
# The paper does not say whether a multiply-add is one FLOP or two, so both stand here (FLOPs: two). The published parameters of the ViT rows are those
# of arXiv's Table 4, a column that the ICCV paper dropped. BLIP is counted in the same way, as a check.

# %%
import json

import pandas as pd
from matplotlib.ticker import FixedLocator, NullFormatter

counted = json.loads((root() / "benchmarks" / "slan_cost.json").read_text(encoding="utf-8"))["table8"]
columns = {"Params(M)": "parameters_m", "FLOPS(G)": "gflops"}
table8, sizes = T.published("SLAN", "8"), T.published("SLAN-v1", "4")
printed = [table8[table8["row"] != "Ours"]]
for version, cells in (("ICCV", table8), ("arXiv", T.published("SLAN-v1", "7"))):
    own = pd.concat([cells.replace("Ours", "Ours ResNet50"), sizes]).drop_duplicates(["row", "column"])
    own = own[own["row"].str.startswith("Ours")]
    printed.append(own.assign(row=own["row"] + f", {version}"))
printed = pd.concat(printed, ignore_index=True)
lines = [{**line, "row": f"{line['name']} {line['version']}".strip()} for line in counted["rows"]]
lines += [{**line, "row": name} for name, line in counted["published_over_ours"]["blip"].items()]
ours = pd.DataFrame(lines, columns=["row", *columns.values(), "gmultiply_adds"]).assign(n=1)
ours[[f"{metric} sd" for metric in columns.values()]] = float("nan")
names = {f"SLAN {b} {v}": f"Ours {b}, {version}" for v, version in (("iccv", "ICCV"), ("arxiv", "arXiv"))
         for b in ("ResNet50", "Vit-Base", "Vit-Large", "Vit-Huge")}  # fmt: skip
cost = T.table(printed[printed["column"].isin(columns)], ours, row="row", columns=columns, rows=names)
cost = cost.drop(columns=["n", *(f"{column} measured sd" for column in columns)])
cost.columns = [name.replace("measured", "counted") for name in cost.columns]
cost["multiply-adds(G) counted"] = (
    cost["row"].map(dict(zip(ours["row"].replace(names), ours["gmultiply_adds"], strict=True))).astype(float)
)
fits = counted["published_over_ours"]
ways = "; ".join(f"{what}: {', '.join(fits[key]) or 'none of ours'}"
                 for what, key in (("parameters", "parameters_fit"), ("FLOPs", "flops_fit")))  # fmt: skip
text = f"{T.to_markdown(cost)}\n\nWays to count whose numbers are within 5 % of every printed one: {ways}."
T.write_text(root() / p.figures / "slan_cost.csv", cost.to_csv(index=False))
T.write_text(root() / p.figures / "slan_cost.md", f"{text}\n")
Markdown(text)

# %%
with F.style():
    figure = F.beside(cost.rename(columns=lambda name: name.replace("counted", "measured")).assign(
        **{f"{column} measured sd": float("nan") for column in columns}), list(columns),
        data=("384 px, published", "384 px, counted here"), label="log scale")  # fmt: skip
    for ax in figure.axes:
        ax.set_xscale("log")
        ax.xaxis.set_major_locator(FixedLocator([20, 50, 100, 200, 500, 1000, 2000, 5000]))
        ax.xaxis.set_major_formatter("{x:g}")
        ax.xaxis.set_minor_formatter(NullFormatter())
    figure.legends[0].get_texts()[1].set_text("counted")
    F.save(figure, root() / p.figures / "slan_cost.svg")
figure

# %% [markdown]
# Previous: [slan/2_train](2_train.ipynb) · Next: [slan/4_regions](4_regions.ipynb)
