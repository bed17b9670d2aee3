# %% [markdown]
# # What the readings of the papers change
#
# **Papers** MVAM, HSLM, FELGA and SLAN. Where a paper is silent, or where a formula can be read in two ways, this workbook has a switch
# ([What the papers do not say](../docs/readings.md) lists all of them). This page shows what the choice costs or gains: the default against one other value, everything else equal.
#
# **Cost** seconds; it reads the metrics of finished runs. `make grid GRID=mvam_readings` (and `hslm_`, `felga_`, `slan_readings`) makes the runs: the table below says how many minutes they took.
# **Expected** the effects of those readings that have run with at least two seeds; the first line below says how many.

# %% tags=["parameters"]
dataset: str = "scenes"  # the runs' dataset
data_root: str = "data"  # not read here; every notebook has it
scale: str = "tiny"  # the runs' scale
seed: int = 0  # not used here: all seeds that have run are shown
out: str = "papermill_runs"  # folder of the runs
figures: str = "figures"  # where the table and the plot go
smoke: bool = False  # not used here: smoke runs have no readings

# %% jupyter={"source_hidden": true}
from finematch.config import parameters, root

p = parameters(globals(), scale={"tiny", "paper"}, seed=(0, 2**31))

# %%
from IPython.display import Markdown, display

from finematch import figures as F
from finematch import readings, tables as T
from finematch.files import write_text
from finematch.figures.forest import forest

effects = readings.effects(p.dataset, p.scale, runs=root() / p.out)
main = readings.by_size(effects)
stem = root() / p.figures / f"readings.{p.dataset}.{p.scale}"
print(f"{len(main)} of {readings.planned()} readings have run with at least two seeds.")

# %% [markdown]
# ## The effects, by size
#
# An effect is the metric of the other value less that of the default, in percent of the default's mean (which is taken as exact); the line is the 95 % interval over seeds (Student's t, paired where both rows share seeds and data).
# A point to the right says that the other value is better. It is filled where the interval does not contain zero. The axis is linear from -5 to +5 % and logarithmic beyond. The metric is rsum (MVAM, HSLM, SLAN), or mAP of object discovery (FELGA).

# %%
if len(main):
    shown = main.assign(label=main["id"] + " " + main["switch"] + " = " + main["other"].astype(str), group=main["method"].str.upper(),
                        effect=main["percent"], lower=main["percent lower"], upper=main["percent upper"])  # fmt: skip
    with F.style():
        figure = forest(shown, linear=5.0, xlabel="effect of the other value, % of the default's metric")
        F.save(figure, stem.with_name(f"{stem.name}.svg"))
    display(figure)

# %% [markdown]
# The same as a table, with the second metric of a method where it has one, and the minutes of training of the alternative's runs in all.

# %%
table = T.to_markdown(readings.printed(effects), digits=1) if len(effects) else "No reading has run."
if len(effects):
    write_text(stem.with_name(f"{stem.name}.csv"), effects.round(4).to_csv(index=False))
    write_text(stem.with_name(f"{stem.name}.md"), table + "\n")
Markdown(table)

# %% [markdown]
# ## What to choose where a paper is silent
#
# These sentences are made from the table.

# %%
advice = readings.advice(main, effects)
Markdown(advice)

# %% [markdown]
# Previous: [7_compare](7_compare.ipynb) · Next: [9_scorecard](9_scorecard.ipynb)
