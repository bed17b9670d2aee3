# %% [markdown]
# # The scorecard: every table of the papers, published beside measured
#
# **Papers** MVAM, HSLM, FELGA and SLAN. This page reads the metrics files of all finished runs and the tables that the pages `3_ablations` wrote,
# shows them, counts the verdicts, and writes `RESULTS.md` and the generated lines of the README. No number in a table of measured runs was typed
# by hand (a verdict under "What was tried" was); the papers' numbers and statements are those of `src/finematch/published*.csv`.
#
# **Cost** under two minutes. **Expected** one line per claim and metric: *holds*, *contradicted*, *undecided* or *not run* under each reading, with its dataset, its
# interval and its test.

# %% tags=["parameters"]
dataset: str = "scenes,flickr8k"  # datasets to show, in order
data_root: str = "data"  # not read here; every notebook has it
scale: str = "tiny"  # the runs' scale
seed: int = 0  # not used here: all seeds that have run are shown
out: str = "papermill_runs"  # folder of the runs
figures: str = "figures"  # folder of the tables
results: str = ""  # file for all tables and claims; empty writes none
readme: str = ""  # README whose generated lines to rewrite; empty leaves it alone
smoke: bool = False  # show smoke runs, whose numbers mean nothing

# %% jupyter={"source_hidden": true}
from finematch.config import literal_switches, own_reading, parameters, root

p = parameters(globals(), scale={"tiny", "paper"}, seed=(0, 2**31))

# %%
import json
import re

import pandas as pd
from IPython.display import SVG, Markdown, display

from finematch import figures as F
from finematch import grids, scorecard as S, stated, tables as T
from finematch.runs import measured

label = "smoke" if p.smoke else p.scale
METRICS = ["i2t_r1", "i2t_r5", "i2t_r10", "t2i_r1", "t2i_r5", "t2i_r10", "rsum"]
TASKS = {
    "discovery_map": "object discovery", "discovery_expected": "object discovery, ties at random",
    "assignment_map": "description assignment", "assignment_expected": "description assignment, ties at random",
}  # fmt: skip
datasets, sections = p.dataset.split(","), {}


def shown(text: str) -> Markdown:
    """Text whose links are relative to the repository, on this page."""
    return Markdown(re.sub(r"\]\((?=(?:papermill_runs|figures|notebooks|src|docs)/)", "](../", text))


# %% [markdown]
# ## Every table at a glance
#
# A line per table of a paper and per grid that measures it; the grids below a table ask more of it. A mark per claim and metric that the paper prints,
# in the order of the claims below: ✓ *holds*, ✗ *contradicted*, ? *undecided*, · *not run*; = one run stands for both readings. *by chance*:
# if no difference were real, so many of the judged verdicts would be ✓ by luck, and as many ✗. Tables 1 to 7 of SLAN's arXiv version repeat those of the ICCV
# version under other numbers, but for cells whose notes say so.

# %%
lines, costs = S.read(datasets, p.scale, root() / p.out, smoke=p.smoke)
pages = {}  # of each grid, the first of its whole tables
for path in [f"{name}.{of}.{label}.md" for name in lines["grid"].unique() for of in datasets]:
    if (root() / p.figures / path).is_file():
        pages.setdefault(path.partition(".")[0], f"figures/{path}")
at_a_glance = f"{S.glance(lines, costs, pages)}\n\n{S.total(lines)}"
if not any(title.endswith("literal") and "paper scale" in title for title in S.columns_of(lines)):
    at_a_glance += " Nobody has run a row at the paper's scale here."
shown(at_a_glance)

# %% [markdown]
# ## The claims, published beside measured
#
# A claim is a difference of two rows. A cell has the difference, of measured numbers its 95 % interval, and both sides: mean ± standard deviation over
# seeds. The small digits are the seeds; each leads to its metrics file, with protocol, minutes, machine and commit. Published and measured numbers come
# from other data: compare signs and order, not levels. Without a table of the paper the metric is the grid's own. Plots have the claims on printed
# metrics, published and measured in panels of their own.

# %%
claims_of = {}
for paper in S.PAPERS:
    claims_of[paper] = S.claims_table(paper, lines)
    drawn = S.drawn(paper, lines)
    display(shown(f"### {paper}\n\n{claims_of[paper]}"))
    if len(drawn):
        with F.style():
            figure = F.intervals(drawn, xlabel="difference, own scale")
            F.save(figure, root() / p.figures / f"scorecard.{paper.lower()}.svg")
        display(figure)
        claims_of[paper] += f"\n\n![Claims of {paper}: published and measured differences](figures/scorecard.{paper.lower()}.svg)"

# %% [markdown]
# ## What the papers' text says, recomputed
#
# Statements of the papers' running text, recomputed from the cells of their own tables (`src/finematch/published_text.csv` has each recipe). *agrees*
# is within half a unit of the last digit stated; *agrees if cut off* is above by less than a unit. "all" and "most" count columns.

# %%
statements = stated.read()
in_text = T.to_markdown(stated.in_text(statements))
Markdown(in_text)

# %% [markdown]
# ## Where the papers contradict themselves
#
# By their ids in [the readings](../docs/readings.md): both numbers are of the paper's own cells or text, where the line names no other source.

# %%
contradictions = T.to_markdown(stated.contradictions(statements))
Markdown(contradictions)

# %% [markdown]
# ## What the papers print besides numbers of runs
#
# HSLM's Figure 3, and the symbols of SLAN's Table 1.

# %%
symbols = stated.symbols().drop(columns=["paper", "table"])
besides = f"HSLM, Figure 3:\n\n{T.to_markdown(stated.word_weights())}\n\nSLAN, Table 1:\n\n{T.to_markdown(symbols)}"
Markdown(besides)

# %% [markdown]
# ## Every table

# %%
found = [path for name in datasets for path in sorted((root() / p.figures).glob(f"*.{name}.{label}.md"))]
tables = [path for path in found if path.name.split(".")[0] in grids.names()]
for path in tables:
    grid, name = path.name.split(".")[:2]
    title = f"{grids.grid(grid, name).method.upper()}: {grids.grid(grid, name).title} ({name}, grid `{grid}`)"
    sections[title] = path.read_text(encoding="utf-8").strip()
    display(Markdown(f"### {title}\n\n{sections[title]}"))
if not tables:
    print(f"No table yet: make grid GRID=mvam_views writes {p.figures}/mvam_views.<dataset>.{label}.md")
for path in [path for path in found if path.name.startswith("readings.")]:  # of 8_readings
    title = f"READINGS: what another value changes ({path.name.split('.')[1]})"
    sections[title] = path.read_text(encoding="utf-8").strip()
    display(Markdown(f"### {title}\n\n{sections[title]}"))
for path in sorted((root() / p.figures).glob("*_cost.md")):
    title = f"{path.stem.split('_')[0].upper()}: parameters and operations, counted"
    sections[title] = path.read_text(encoding="utf-8").strip()
    display(Markdown(f"### {title}\n\n{sections[title]}"))

# %% [markdown]
# ## The verdicts, counted
#
# Every claim of every grid, on all of the metrics that the grid judges, is counted under both readings of the papers: `default` is ours, chosen on val, `literal` the paper's text. A cell is "default / literal". Where no row
# of a grid differs between them, one run stands for both. Each comparison counts once, also where several grids ask for it. A two-sided 95 % interval on
# the difference decides; with three seeds the test is weak, so that *undecided* is no evidence against a claim. *not run* counts rows without a run and
# rows with a single seed, which has no spread.

# %%
every = []
for path in (path.with_suffix(".claims.csv") for path in tables):
    if path.exists():
        grid, name = path.name.split(".")[:2]
        every.append(pd.read_csv(path, keep_default_na=True).assign(grid=grid, dataset=name, method=grids.grid(grid).method))
columns = ["grid", "method", "dataset", "reading", "claim", "metric", "better", "worse", "verdict", "lower"]
claims = pd.concat(every, ignore_index=True) if every else pd.DataFrame(columns=columns)
claims = claims.drop_duplicates(["method", "dataset", "reading", "better", "worse", "metric"], ignore_index=True)
verdicts = f"{T.to_markdown(T.verdict_counts(claims))}\n\n{T.chance_note(T.judged(claims))}"
Markdown(verdicts)

# %% [markdown]
# What was decided on each grid's main metric, with the interval of the difference.

# %%
headline = {(grid, name): grids.grid(grid, name).headline[:1] for grid, name in claims[["grid", "dataset"]].drop_duplicates().itertuples(index=False)}
first = [metric in headline[grid, name] for grid, name, metric in zip(claims["grid"], claims["dataset"], claims["metric"], strict=True)]
main = claims[pd.Series(first, index=claims.index, dtype=bool)]
decided = "\n".join(T.headlines(main))
Markdown(decided)

# %% [markdown]
# ## What is not run, and the line that runs it
#
# One line per grid and reading; a table of a paper of which nothing has run here is started at the paper's scale.

# %%
left = []
for grid in map(grids.grid, grids.names()):
    on = [name for name in datasets if f"{grid.name}.{name}.{label}.md" in {path.name for path in tables}]
    for name, at in [(name, p.scale) for name in on] or [(grid.dataset, grids.unrun_scale(grid))]:
        for reading in grids.readings(grid, name, at):
            of = claims[(claims["grid"] == grid.name) & (claims["dataset"] == name) & (claims["reading"] == reading)] if on else []
            missing = int((of["verdict"] == T.NOT_RUN).sum()) if on else len(grid.claims)
            if missing:
                left.append([grid.name, name, reading, missing, f"`{grids.command(grid, name, at, reading)}`"])
not_run = T.to_markdown(pd.DataFrame(left, columns=["grid", "data", "reading", "comparisons", "line"]))
Markdown(not_run)

# %% [markdown]
# ## What the literal reading sets
#
# The settings that `reading=literal` changes at the small scales, generated from where they are declared. A row of a grid may set some of them itself.

# %%
METHODS = ("felga", "hslm", "mvam", "slan")
parts = []
for method in METHODS:
    of = pd.DataFrame(literal_switches(method))
    parts.append(f"**{method.upper()}**: " + (f"\n\n{T.to_markdown(of)}" if len(of) else "nothing; both readings are one."))
sections["What the literal reading sets"] = "\n\n".join(parts)
Markdown(sections["What the literal reading sets"])

# %% [markdown]
# ## What was tried before a default was chosen
#
# From `benchmarks/recipes.csv`: one line per run, also of those that failed. Settings are what differs from the preset; no run listed here read the split that tables report. SLAN's small recipe (contrast first, random negatives, no masked words, the matching score alone) was first chosen with test numbers of seed 0 in view; the last six lines of SLAN try each part on val. None raises the sum of recalls but both scores added (by 2.3 at one seed); without the contrast first words find boxes better and the ranking is far worse.

# %%
recipes = T.read_recipes(root() / "benchmarks" / "recipes.csv")
for method, of in recipes.groupby("method"):
    shown = of.drop(columns=["method", "commit"]).assign(commit=of["commit"].str[:9])
    sections[f"What was tried: {method.upper()}"] = T.to_markdown(shown)
    display(Markdown(f"### {method.upper()}\n\n{sections[f'What was tried: {method.upper()}']}"))
if not len(recipes):
    print("Nothing is written down yet.")

# %% [markdown]
# ## Every run, by dataset
#
# Mean ± standard deviation over seeds; `n` is their number. `best of seeds` is what MVAM's own tables report (the best of three restarts).


# %%
def runs_of(name: str) -> pd.DataFrame:
    """All runs of a dataset, with the method, the row and the reading of each."""
    files = sorted((root() / p.out).glob(f"*/{name}.{label}*.*.s[0-9]*/metrics.json"))
    runs = measured(files)
    if len(runs):
        runs["method"] = [f.parent.parent.name for f in files]
        runs["run"] = [f.parent.name.rsplit(".", 2)[1] for f in files]
        runs["reading"] = [f.parent.name.split(".")[1].partition("-")[2] or own_reading(p.scale) for f in files]
    return runs


def note_on(runs: pd.DataFrame) -> str:
    """Protocols, commits and cost of runs."""
    protocols = "".join(f"\n* {protocol}" for protocol in runs["run_protocol"].unique())
    old = runs.loc[runs["run_status"].str.startswith("legacy"), "run_status"].str.removeprefix("legacy: ").value_counts()
    legacy = "".join(f"\n* {count} of them legacy: {why}" for why, count in old.items())
    return (f"{len(runs)} runs. Commits "
            f"{', '.join(sorted(c[:9] for c in runs['run_commit'].unique()))}; {runs['run_seconds'].sum() / 60:.0f} minutes of training on "
            f"{'; '.join(runs['run_device'].unique())}.\n{legacy}\n\nProtocols:\n{protocols}")  # fmt: skip


for name in datasets:
    found = runs_of(name)
    for title, metrics, best in (
        ("retrieval", METRICS, "rsum"),
        ("fragments, mAP (%)", list(TASKS), "discovery_map"),
    ):
        runs = found[found[best].notna()] if best in found else pd.DataFrame()
        if not len(runs):
            continue
        by = ["method", "run", "reading"]
        frame = T.summary(runs, by=by, metrics=metrics)
        frame = frame.merge(runs.groupby(by)[best].max().rename("best of seeds").reset_index(), on=by)
        frame = frame.sort_values(["method", best], ignore_index=True)
        frame = frame.rename(columns=TASKS | {f"{key} sd": f"{value} sd" for key, value in TASKS.items()})
        text = f"{T.to_markdown(frame)}\n\n{note_on(runs)}"
        if (
            name == "flickr8k" and best == "rsum"
        ):  # frozen features of a network of this class; on test, not on val
            beside = T.published("Yardstick", "Flickr8k")
            wide = beside.pivot(index=["row", "note"], columns="column", values="value")[
                list(dict.fromkeys(beside["column"]))
            ]
            text += "\n\nFrom the literature, on Flickr8k's test split:\n\n" + T.to_markdown(
                wide.reset_index()
            )
        sections[f"Every run: {title}, {name}"] = text
        display(Markdown(f"### {title}, {name}\n\n{text}"))

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
    f"threads: {ours['microseconds_a_pair']['rank']:.0f} microseconds a pair, {ours['rank_over_tile']:.2f} times faster than the scorer of training and {ours['times_faster']:.1f} times faster than the loop over captions; "
    f"{ours['times_the_floor']:.1f} times its own matrix products. With bfloat16 products {ours['microseconds_a_pair']['bf16']:.0f}, "
    f"{ours['times_faster_bf16']:.1f} times faster than the loop; on a trained run that moves rsum from {bf16['fp32']['rsum']:.1f} to "
    f"{bf16['bf16']['rsum']:.1f}. {max(m['growth'] for m in b['memory'].values()) / 1e6:.0f} MB, for {' captions as for '.join(b['memory'])}."
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
rehearsed = root() / "benchmarks" / "rehearsal.json"
if rehearsed.exists():
    of = json.loads(rehearsed.read_text())["methods"]
    ratios = ", ".join(f"{name.upper()} {one['predicted_to_real']:.2f}" for name, one in of.items())
    speed.append(
        f"* **What `make rehearse` predicts** of a tiny run on scenes (training, evaluation), relative to a real one: {ratios}."
    )
checked = root() / "benchmarks" / "gpu_check.json"
if checked.exists():
    of = json.loads(checked.read_text())
    said = (
        "passed"
        if of["passed"]
        else "FAILED: "
        + ", ".join(
            f"{part} {name}"
            for part, methods in of["parts"].items()
            for name, one in methods.items()
            if not one["passed"]
        )
    )
    speed.append(
        f"* **On a GPU** (`benchmarks/gpu_check.sh`, {of['device']}, {of['seconds'] / 60:.0f} minutes): {said}."
    )
else:
    speed.append("* **On a GPU** (`benchmarks/gpu_check.sh`): not run.")
sections["Speed"] = "\n".join(speed)
Markdown(sections["Speed"])

# %% [markdown]
# ## Beside public code, and growth
#
# Ours and the other alternately in one process, at the same numbers but for SGRAF, which is another method. *not run*: the benchmark found no copy of
# that code (its folder is a parameter) or was not run yet. Above one ours is faster; of the steps, less is better.

# %%
FASTER, COSTS = "times faster", "times as long"
RATIOS = [
    ("SCAN's text-to-image score", "SCAN", "peers", "scan", "times_faster", FASTER),
    ("HSLM's pair scores", "SGRAF, SAF", "peers", "sgraf_saf", "times_faster", FASTER),
    ("HSLM's pair scores", "SGRAF, SGR", "peers", "sgraf_sgr", "times_faster", FASTER),
    ("HSLM's pair scores", "a loop over captions", "hslm_scoring", "attend", "times_faster", FASTER),
    (
        "HSLM's pair scores, ranking",
        "the scorer of training",
        "hslm_scoring",
        "attend",
        "rank_over_tile",
        FASTER,
    ),
    ("retrieval", "VSE++", "peers", "vsepp", "times_faster", FASTER),
    ("retrieval", "CLIP_benchmark", "peers", "clip_benchmark", "times_faster", FASTER),
    ("contrastive loss", "open_clip", "peers", "open_clip", "times_faster", FASTER),
    ("phrase grounding, any box", "MDETR", "grounding", "times_faster_than_mdetr", "any", FASTER),
    ("phrase grounding, merged boxes", "MDETR", "grounding", "times_faster_than_mdetr", "merged", FASTER),
    ("IoU of boxes", "pycocotools", "peers", "pycocotools", "times_faster", FASTER),
    (
        "Karpathy's JSON to records",
        "json.load",
        "karpathy",
        "coco_size",
        "speed_relative_to_json_load",
        FASTER,
    ),
    (
        "RoI pooling with gradients",
        "torchvision",
        "roi_pooling",
        "1_threads",
        "times_faster_than_torchvision",
        FASTER,
    ),
    ("batches of shards", "webdataset's own pipeline", "shards", "0_workers", "ratio", FASTER),
    ("MVAM's step, CLIP ViT-B/32", "its bare towers", "mvam_step", "paper", "method_over_towers", COSTS),
    ("MVAM's step, scenes", "its bare towers", "mvam_step", "scenes", "method_over_towers", COSTS),
    ("SLAN's step, ResNet-50 and BERT", "no levels", "slan_cost", "steps", "paper", COSTS),
    ("SLAN's step, scenes", "no levels", "slan_cost", "steps", "tiny", COSTS),
]


def ratio_row(work: str, beside: str, name: str, part: str, key: str, unit: str) -> list:
    """A line of the table: the ratio with machine and date, or "not run"."""
    path = root() / "benchmarks" / f"{name}.json"
    content = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    found = content.get(part, {})
    value = found.get(key) if isinstance(found, dict) else None
    if name == "slan_cost" and value:
        value = value.get("levels_over_none", {}).get("iccv", {}).get("median")
    if name == "roi_pooling" and value:
        value = value["roi_align_mean"]
    made = found if isinstance(found, dict) and "device" in found else content
    if value is None:
        return [work, beside, "not run", "", "", ""]
    return [work, beside, f"{value:.2f}", unit, made.get("device", ""), made.get("date", "")]


columns = ["work", "beside", "ratio", "which is", "machine", "date"]
ratios = pd.DataFrame([ratio_row(*line) for line in RATIOS], columns=columns)
text = T.to_markdown(ratios)
display(Markdown(text))
path = root() / "benchmarks" / "growth.json"
if path.exists():
    b = json.loads(path.read_text(encoding="utf-8"))
    told = f"Evaluation against the size of the gallery: {b['device']}, {b['date']}; data in `benchmarks/growth.json`."
    display(SVG(filename=str(root() / "figures" / "growth.svg")), Markdown(told))
    text += f"\n\n![Time and memory against the number of images](figures/growth.svg)\n\n{told}"
sections["Speed beside public code, and growth"] = text


# %%
def anchor(title: str) -> str:
    """The link that GitHub gives a heading."""
    return "".join(c for c in title.lower().replace(" ", "-") if c.isalnum() or c in "-_")


if p.results:
    card = {
        "Scorecard": "A mark per claim and metric that the paper prints: ✓ *holds*, ✗ *contradicted*, ? *undecided*, · *not run*; = one run stands for "
        "both readings. *by chance*: how many of the judged verdicts would be ✓, and as many ✗, if no difference were real. Tables 1 to 7 of SLAN's "
        "arXiv version repeat those of the ICCV version under other numbers.\n\n" + at_a_glance,
        **{f"Scorecard: the claims of {paper}": text for paper, text in claims_of.items()},
        "What the papers' text says, recomputed": "From the cells of their own tables; `src/finematch/published_text.csv` has each recipe.\n\n" + in_text,
        "Where the papers contradict themselves": contradictions,
        "What the papers print besides numbers of runs": besides,
    }  # fmt: skip
    contents = "\n".join(f"* [{title}](#{anchor(title)})" for title in [*card, "Verdicts", *sections])
    parts = [
        "# Results",
        "Generated by `notebooks/9_scorecard` from the metrics files of finished runs (`make results`); nothing here is typed by hand. Numbers on "
        "`scenes` and `flickr8k` stand beside the papers' own data: compare the order of rows, not their absolute values.",
        contents, *(part for title, text in card.items() for part in (f"## {title}", text)), "## Verdicts", "Every claim is judged under both readings of the papers, *default* (what works) and *literal* (the text); a cell "
        "is \"default / literal\".", verdicts, "Decided on the main metric of each grid:", decided,
        "## Not run, and the line that runs it", not_run,
        *(part for title, text in sections.items() for part in (f"## {title}", text)),
    ]  # fmt: skip
    T.write_text(root() / p.results, "\n\n".join(parts) + "\n")
    print(f"{p.results} written")
if p.readme:
    said = f"A cell is \"default / literal\".\n\n{verdicts}\n\n{decided}"
    changed = T.replace_block(root() / p.readme, "results", said)
    print(f"{p.readme}: {'rewritten' if changed else 'as it was'}")

# %% [markdown]
# Previous: [8_readings](8_readings.ipynb)
