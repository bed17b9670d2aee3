# %% [markdown]
# # FELGA: a table of the paper, published beside measured
#
# **Paper** *FELGA: Unsupervised Fragment Embedding for Fine-Grained Cross-Modal Association* (WACV 2024), Tables 1 to 5. This page takes a grid,
# gathers the metrics of its finished runs, and shows the paper's numbers beside ours: mean ± standard deviation over seeds, a plot with the mAP of
# a random order, and a verdict on each claim.
#
# | grid | table | what it varies |
# |---|---|---|
# | `felga_variants` | 1 | whole images and texts, their fragments, FENet with dense, sparse and dynamic labels, and with global alignment; on CLIP |
# | `felga_blip` | 2 | the same rows on BLIP |
# | `felga_blip2` | 3 | the same rows on BLIP-2 |
# | `felga_alignment` | 4 | local alignment, global alignment, both |
# | `felga_global` | 5 | each kind of labels, without and with global alignment |
# | `felga_readings` | none | other readings, one at a time; [8_readings](../8_readings.ipynb) draws them |
#
# Rows without training do not depend on the seed: their standard deviation is zero, and several seeds of them are one number. The paper says "mAP"
# and prints no random order; ours is the last line of the table.
#
# > "The objective is to retrieve the relevant sentences containing the associated semantic concepts, which are the labels of the objects."
#
# The paper does not define "relevant". By category, which is the table's column, a text is relevant if its image has an object of the box's class;
# by named class it must name the class; or only the box's own text is relevant. The second table has all three.
#
# **Cost** seconds. `make grid GRID=felga_variants` makes the runs and ends with this page. Rows that have not been run stay empty. `docs/adding_a_table.md`
# explains grids; this page works for any grid of the method.
#
# Our numbers come from other data than the paper's (`scenes`, or Flickr8k photos), so the columns are not to be subtracted from each other. What can be
# compared is the order of the rows.

# %% tags=["parameters"]
grid: str = "felga_variants"  # a file of grids/ without its ending
dataset: str = "scenes"  # the runs' dataset
data_root: str = "data"  # not read here; every notebook has it
scale: str = "tiny"  # the runs' scale
seed: int = 0  # not used here: all seeds that have run are shown
out: str = "papermill_runs/felga"  # folder of the runs
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
# For annotated phrases (no training sees the annotation): how often the proposal that is most similar to the phrase has its centre in a ground-truth
# box (pointing), and how often it overlaps one by half (R@1). Beside it stand the frozen features (before), a random proposal (chance), the
# image's centre, and the upper bound that the proposals allow.

# %%
found = {reading: T.grounding(of, table.names) for reading, of in runs.items()}
Markdown(T.by_reading(found, digits=1, otherwise="no run here has annotated phrases."))

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
# Previous: [felga/2_train](2_train.ipynb) · Next: [felga/4_retrieval](4_retrieval.ipynb)
