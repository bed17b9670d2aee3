# %% [markdown]
# # The methods and their rivals at equal minutes
#
# **Papers** MVAM, HSLM and SLAN, with a plain two-stream model, PVSE, SCAN and SAF (of SGRAF) beside them; FELGA where its task allows. Each paper compares its
# method with numbers that other papers print: other features, other text encoders, other training. Here all of them see the same images and captions,
# and train for as many steps as fit into the same minutes on one core. The features are those of one frozen network for all but SLAN; the text encoder is a GRU of each recipe's widths (HSLM has layers of its own before it), of SLAN a small BERT. The page asks three questions: who ranks best, who finds phrases in images, and what a query costs.
#
# **Cost** under two minutes; it reads the metrics of finished runs. `make grid GRID=arena_main` makes the runs (10 entrants, three seeds, 5 minutes of training each
# on scenes) and ends with this page; `make grid GRID=arena_detected DATASET=flickr8k PROPOSALS=<file>` runs the same entrants over a detector's boxes, but for SLAN over its own proposals. Rows that have not been run stay empty.
#
# **Expected** the tables of [RESULTS.md](../RESULTS.md) with "ARENA" in their titles, once the grid has run. All entrants are small and trained from
# scratch: their order is what can be compared with a paper, not their level. Models that come with published weights (BLIP, MDETR, GLIP) are not among them,
# for weights that millions of images have trained are no equal means.

# %% tags=["parameters"]
grid: str = "arena_main"  # arena_main, or arena_detected
dataset: str = "scenes"  # the runs' dataset
data_root: str = "data"  # folder that holds the datasets' folders; read for the last picture alone
scale: str = "tiny"  # the runs' scale
seed: int = 0  # of the runs whose weights the last picture shows
out: str = "papermill_runs/arena"  # folder of the runs
felga: str = "papermill_runs/felga"  # folder of FELGA's runs
figures: str = "figures"  # where tables and pictures go
example: int = 0  # number of the annotated image that the last picture shows
phrase: int = 0  # number of its phrase, of those with one box
smoke: bool = False  # the runs were smoke runs: their numbers mean nothing

# %% jupyter={"source_hidden": true}
from finematch.config import parameters, root

p = parameters(globals(), scale={"tiny", "paper"}, seed=(0, 2**31), example=(0, 10**7), phrase=(0, 1000))

# %%
import pandas as pd
from IPython.display import Image, Markdown, display
from matplotlib import pyplot as plt
from matplotlib.ticker import LogLocator, NullFormatter

from finematch import figures as draw
from finematch import grids, tables as T

draw.style()
table = grids.grid(p.grid, p.dataset)
label = grids.label(p.scale, smoke=p.smoke)
runs = T.runs_of(table, p.dataset, p.scale, root() / p.out, smoke=p.smoke)  # by reading
stems = {reading: root() / p.figures / f"{p.grid}.{p.dataset}.{grids.label(p.scale, reading, smoke=p.smoke)}"
         for reading in runs}  # fmt: skip
stem = stems["default"]
print(f"{table.title}.\n{T.about(table, runs)}")

# %% [markdown]
# ## The four methods side by side
#
# | | MVAM | HSLM | FELGA | SLAN |
# |:--|:--|:--|:--|:--|
# | what meets | a vector of the image, a vector of the caption | every word, every region | an image fragment, a keyword | a sentence, the boxes that it has moved |
# | image | regions, or patches | regions | proposals | maps of an image encoder |
# | text | words and [CLS] | words | keywords | words and [CLS] |
# | learns from | images with captions | images with captions | images with texts, and what a frozen vision-language model says of their parts | images with captions; boxes for some tasks |
# | loss | contrast, views that differ | hinge on the hardest negatives | contrast of fragments with pseudo-labels, and of whole images | contrast, matching, and more by version |
# | encoded once for all queries | image and caption | neither score, but regions and words | fragments and keywords | image; the best are matched again with the sentence |
# | judged by | retrieval | retrieval | object discovery, description assignment | retrieval and six other tasks |
#
# FELGA is no entrant of what follows: its task has no captions to rank. Its row stands where phrases are found.

# %% [markdown]
# ## What the papers print
#
# The differences that the papers' own tables have between a method and a rival, on their data and with the rivals' published training. Beside them our claims can be read.

# %%
PRINTED = [("MVAM", 1, "FRCNN +MVAM", "PVSE", "MSCOCO-5K t2i@1"), ("MVAM", 1, "FRCNN +MVAM", "SCAN", "MSCOCO-5K t2i@1"),
           ("MVAM", 1, "FRCNN +MVAM", "FRCNN +Attn", "MSCOCO-5K t2i@1"), ("HSLM", 1, "ours(HSLM)", "SCAN", "Rsum"),
           ("HSLM", 1, "ours(HSLM)", "SGRAF", "Rsum")]  # fmt: skip


def printed() -> pd.DataFrame:
    """A line for each comparison: the two cells of the paper's table, and their difference."""
    lines = []
    for paper, number, better, worse, column in PRINTED:
        cells = T.published(paper, number).set_index(["row", "column"])["value"]
        a, b = float(cells[better, column]), float(cells[worse, column])
        lines.append({"paper": f"{paper}, table {number}", "column": column, "better": better, "worse": worse,
                      "of better": a, "of worse": b, "difference": a - b})  # fmt: skip
    return pd.DataFrame(lines)


Markdown(T.to_markdown(printed()))

# %% [markdown]
# ## Who ranks best
#
# R@1, R@5 and R@10 in both directions and their sum, mean ± standard deviation over seeds. Below it stands what the same minutes have paid for: parameters, steps
# of training and pairs seen, memory, and what a pair and a query cost.

# %%
T.write(table, p.dataset, p.scale, runs, stem)
beside = T.beside_readings(table, runs)
measured = beside[[column for column in beside if not column.endswith(" published")]]
Markdown("\n\n".join([T.to_markdown(measured), *(f"* {line}" for line in table.remarks)]))


# %%
def paid(of: pd.DataFrame) -> pd.DataFrame:
    """What the entrants cost, a column each, means over seeds; empty where there is no cheaper way."""
    columns = {"parameters_m": "parameters (M)", "steps": "steps", "pairs_seen": "pairs seen",
               "training_cpu_seconds": "steps of training (CPU s)", "training_seconds": "training with val (s)",
               "training_mib": "peak memory, data and training (MiB)", "us_pair": "a pair (µs)",
               "ms_query_1000": "query, 1,000 images (ms)", "ms_query_5000": "query, 5,000 images (ms)"}  # fmt: skip
    for way, ends in (("short_", "re-ranked"), ("itc_", "contrast alone")):
        columns |= {f"{way}ms_query_1000": f"1,000, {ends} (ms)", f"{way}ms_query_5000": f"5,000, {ends} (ms)",
                    f"{way}rsum": f"rsum, {ends}"}  # fmt: skip
    known = {metric: title for metric, title in columns.items() if metric in of}
    means = of.groupby("row", sort=False)[list(known)].mean().rename(columns=known)
    shown = means.map(
        lambda value: "" if pd.isna(value) else f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
    )
    return shown.rename(index=table.names).T.rename_axis("measured").reset_index()


Markdown(T.by_reading({reading: paid(of) for reading, of in runs.items() if len(of)}, otherwise=""))

# %% [markdown]
# ## The claims, judged
#
# These comparisons are ours; most follow what a paper asserts of its method. A claim compares two entrants over seeds (paired where they share seeds, data and the order of the training
# pairs): it *holds* where the 95 % interval of the difference lies above zero, is *contradicted* where it lies below, and *undecided* where it contains zero.
# Three seeds make a weak test.

# %%
verdicts = T.verdicts(table, runs)
missing = T.not_run(table, p.dataset, p.scale, verdicts)
Markdown("\n\n".join([T.verdict_table(verdicts), *missing]))

# %%
for reading, of in verdicts.groupby("reading", sort=False):
    if of["lower"].notna().any():
        figure = draw.intervals(of, data=T.seeds_of(p.dataset, runs[reading], reading))
        draw.save(figure, f"{stems[reading]}.claims.svg")
        display(Markdown(f"Reading {reading}:"), figure)

# %% [markdown]
# ## Who finds phrases
#
# For phrases with annotated boxes, which no matcher sees in training: how often the region with most weight has its centre in a true box (pointing), and how
# often it overlaps one by half (R@1 at IoU 0.5). Beside it stand a random region (chance), the image's centre, and the upper bound that the regions allow.
# The plain two-stream model and HSLM's global alignment have no weights on regions. In MVAM and PVSE the attention on the image does not see the caption: their number
# counts how often the views that look at a word also look at its region. FELGA's row comes from its own runs, over boxes of its own: its vision-language model has learned before, so its minutes are not equal.


# %%
def grounded(reading: str) -> pd.DataFrame:
    """Alignment of the entrants, and of FELGA's main row, under a reading."""
    lines = [T.grounding(runs[reading], table.names)]
    own = grids.grid("felga_alignment", p.dataset)
    of_felga = T.runs_of(own, p.dataset, p.scale, root() / p.felga, smoke=p.smoke)
    for name, of in of_felga.items():
        if name in (reading, "both"):
            lines.append(
                T.grounding(of[of["row"] == "felga"], {"felga": "FELGA, own runs"}) if len(of) else of
            )
    return pd.concat([part for part in lines if len(part)]) if any(map(len, lines)) else pd.DataFrame()


Markdown(
    T.by_reading(
        {reading: grounded(reading) for reading in runs},
        digits=1,
        otherwise="no run here has annotated phrases.",
    )
)

# %% [markdown]
# ## Accuracy against the cost of a query
#
# A query is one caption against 1,000 images that are encoded already, on one core; the recalls are of the test split (500 images of scenes). A shortlist is a tenth of those 500 and a twentieth of the 1,000. A filled mark is the entrant as it ranks; a hollow one is the cheaper way: of an entrant that scores pairs, only
# the best of the plain two-stream model are scored again; of SLAN, the contrast alone, without the matching head. The dashed line joins
# the points that no other point beats in both; where bars of one standard deviation overlap, that is no finding.

# %%
CHEAPER = {"short_rsum": "short_ms_query_1000", "itc_rsum": "itc_ms_query_1000"}


def points(of: pd.DataFrame) -> pd.DataFrame:
    """Rows `row`, `way` (own or cheaper), `ms`, `ms_sd`, `rsum`, `sd`: means and standard deviations over seeds."""
    found = []
    for row, own in of.groupby("row", sort=False):
        for rsum, ms in {"rsum": "ms_query_1000", **CHEAPER}.items():
            if {rsum, ms} <= set(own) and own[[rsum, ms]].notna().all(axis=None):
                found.append({"row": row, "way": "own" if rsum == "rsum" else "cheaper", "ms": own[ms].mean(),
                              "ms_sd": own[ms].std(), "rsum": own[rsum].mean(), "sd": own[rsum].std()})  # fmt: skip
    return pd.DataFrame(found)


def pareto(frame: pd.DataFrame, data: str) -> plt.Figure:
    """Sum of recalls against milliseconds of a query; `data` is the title."""
    figure, ax = plt.subplots(figsize=(7.2, 4.4), layout="constrained")
    rows = [row for row in table.names if row in set(frame["row"])]
    colors = [*draw.PALETTE, draw.WRONG, "#A6761D", "#E7298A", "#666666"]
    for number, row in enumerate(rows):
        look = {"color": colors[number % 10], "marker": "oDs^vPX*<>"[number % 10]}
        of = frame[frame["row"] == row]
        if len(of) > 1:
            ax.plot(of["ms"], of["rsum"], color=look["color"], linewidth=0.8, marker="")
        for point in of.itertuples():
            face = look["color"] if point.way == "own" else "white"
            spread = {"xerr": point.ms_sd, "yerr": point.sd} if point.sd == point.sd else {}  # none of a single seed
            ax.errorbar(point.ms, point.rsum, **spread, capsize=2, elinewidth=0.8, markersize=7,
                        markerfacecolor=face, linestyle="", **look)  # fmt: skip
        ax.plot([], [], linestyle="", markersize=7, label=table.names[row], **look)
    best, front = -1.0, []
    for point in frame.sort_values(["ms", "rsum"], ascending=[True, False]).itertuples():
        if point.rsum > best:
            best = point.rsum
            front.append((point.ms, point.rsum))
    ax.plot(*zip(*front, strict=True), color=draw.FAINT, linestyle="--", linewidth=1, marker="", zorder=0)
    ax.plot([], [], color=draw.FAINT, linestyle="--", linewidth=1, marker="", label="beaten by none")
    ax.plot([], [], linestyle="", marker="o", color=draw.INK, markerfacecolor="white", label="cheaper way")
    ax.set(xscale="log", xlabel="a query over 1,000 images (ms, one core)", ylabel="sum of R@1, 5, 10 both ways (%)",
           title=data)  # fmt: skip
    ax.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    ax.xaxis.set_major_formatter(lambda ms, _: f"{ms:g}")
    ax.xaxis.set_minor_formatter(NullFormatter())
    ax.grid(axis="y")
    figure.legend(loc="outside right upper")
    return figure


for reading, runs_shown in runs.items():
    if len(runs_shown):
        figure = pareto(points(runs_shown), T.seeds_of(p.dataset, runs_shown, reading))
        draw.save(figure, f"{stems[reading]}.svg")
        display(Markdown(f"Reading {reading}:"), figure)
if not len(runs["default"]):  # `make grid` waits for the picture
    figure, ax = plt.subplots(figsize=(7.2, 1.2))
    ax.set_axis_off()
    ax.text(0, 0.5, f"No run of {p.grid} on {p.dataset}, scale {label}: make grid GRID={p.grid}")
    draw.save(figure, f"{stem}.svg")

# %% [markdown]
# ## One image: where does each of them look?
#
# The same phrase of the same caption, one that a single box belongs to, by each entrant with weights on regions: bright is where the weight lies, the box is the
# region with most of it, and the true box stands in the first panel. Weights are made to sum to one over the regions (SLAN: the softmax of its cosines at temperature 0.07). This needs the weights of the runs, which git does
# not keep; without them the picture is the one that was kept, if there is one.

# %%
from finematch import arena
from finematch.boxes import iou
from finematch.evaluation.phrases import annotated_phrases
from finematch.runs import open_run

import torch

looked, shown = {}, None
for row in table.rows:
    folder = root() / p.out / f"{grids.run_name(table, row, p.dataset, p.scale, smoke=p.smoke)}.s{p.seed}"
    if not (folder / "best.safetensors").is_file():
        continue
    run = open_run(folder)
    run.parameters["data_root"] = p.data_root
    entrant = arena.of_run(run)
    test = entrant.test
    here = {record.image_id for record in test.records}
    annotated = annotated_phrases(
        p.dataset, entrant.inputs.data_root, entrant.inputs.reported, test.records, echo=None
    )
    annotated = [
        record for record in annotated if record.image_id in here and any(len(one.boxes) == 1 for one in record.phrases)
    ]
    if not annotated:
        break
    shown = annotated[p.example % len(annotated)]
    found = arena.phrases(entrant, [shown])
    boxed = [number for number, one in enumerate(found) if len(one.boxes) == 1]
    if boxed:
        looked[row] = found[boxed[p.phrase % len(boxed)]]
print(f"{len(looked)} entrants have weights here")


# %%
def where(looked: dict) -> plt.Figure:
    """The image with the phrase's true box, then a panel an entrant."""
    one = next(iter(looked.values()))
    picture = shown.open()
    asked = [a for a in sorted(shown.phrases, key=lambda a: a.caption) if len(a.boxes) == 1]
    said = asked[p.phrase % len(asked)]
    columns = min(4, 1 + len(looked))
    rows = -(-(1 + len(looked)) // columns)
    figure, axes = plt.subplots(
        rows, columns, figsize=(2.2 * columns, 2.5 * rows + 0.4), layout="constrained", squeeze=False
    )
    for ax in axes.flat:
        ax.set_axis_off()
    draw.show_boxes(axes.flat[0], picture, one.boxes)
    axes.flat[0].set_title("true box")
    for ax, (row, look) in zip(axes.flat[1:], looked.items(), strict=False):
        weights = look.scores.double()
        slan = table.rows[row]["entrant"] == "slan"
        weights = (weights / 0.07).softmax(0) if slan else weights / weights.sum()
        best = look.regions[int(look.scores.argmax())]
        overlap = float(iou(best[None].double(), torch.tensor(look.boxes, dtype=torch.float64)).max())
        draw.show_attention(ax, picture, look.regions.numpy(), weights.numpy())
        x1, y1, x2, y2 = best.tolist()
        ax.add_patch(plt.Rectangle((x1, y1), x2 - x1, y2 - y1, fill=False, edgecolor="white", linewidth=1.6))
        ax.add_patch(plt.Rectangle((x1, y1), x2 - x1, y2 - y1, fill=False, edgecolor=draw.INK, linewidth=0.8))
        ax.set_title(f"{table.names[row]}, IoU {overlap:.2f}")
    text = shown.captions[said.caption]
    figure.suptitle(draw.plain(f"“{text[said.start : said.end]}” in “{text}”"), fontsize=9)
    return figure


kept = root() / p.figures / f"compare_looks.{p.grid}.{p.dataset}.{label}.png"
if looked:
    figure = where(looked)
    # photos belong to those who took them: they stay with the runs
    drawn = p.dataset.startswith("scenes")
    draw.save(figure, kept if drawn else root() / p.out / kept.name)
    display(figure)
elif kept.is_file():
    display(Image(filename=str(kept)))
else:
    print(f"No weights in {p.out} and no picture in {p.figures}: make grid GRID={p.grid} DATASET={p.dataset}")

# %% [markdown]
# Previous: [arena/2_train](arena/2_train.ipynb) · Next: [8_readings](8_readings.ipynb)
