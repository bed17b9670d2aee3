"""The grids: a row of grids/<grid>.csv and a seed make one papermill run, all rows make one table.

    make grid GRID=mvam_views DATASET=scenes SCALE=tiny SEEDS=0,1,2

* A run is papermill_runs/<method>/<dataset>.<scale>.<row>.s<seed>/ and is done when its metrics.json is there.
  Under the reading that is not the scale's own (reading=literal at tiny) the scale reads `tiny-literal`, so that no run
  is taken for one of the other reading; a row that has the same settings under both is run once.
  Rows of one name in two grids of a method are one run: a table never pays again for what another has run.
  The executed notebook and the checkpoint are not declared as outputs, so they survive a failure: the one
  shows its traceback, from the other the next attempt resumes.
* A cell of the CSV is a parameter of notebooks/<method>/2_train, or of the `page` that the toml names. An empty one
  leaves the notebook's default, or what the toml's [scale.<scale>] says for all rows.
  `{run:clip-cls}/encoder` is a path in that row's run folder with the same seed, and waits for that run. The row may
  also be one of the grid that the toml `builds_on`.
  `{PROPOSALS}` is the file of boxes that the command line names; without one such rows are left out.
* A finished run is repeated when the parameters of its row change, or of a row it builds on; not when a
  notebook or the library is edited: metrics.json says which commit made it, FORCE=1 repeats the grid.
* `python -m finematch stale` lists the finished runs whose parameters are not their row's (a row edited in a fresh
  clone, where Snakemake remembers nothing); `make grid` runs them again. Force repeats every row from the start.
* With smoke the scale reads `smoke` in every name, so that such a run is never taken for a real one.
"""

import re
import shlex
import sys
from pathlib import Path

from finematch.files import DataError
from finematch.grids import BOXES, LINK, grid, label, run_name

if "grid" not in config:
    raise WorkflowError("Which grid? Give --config grid=NAME, NAME one of the files in grids/.")
GRID = config["grid"]
METHOD = GRID.split("_")[0]
DATASET = config.get("dataset", "scenes")
SCALE = config.get("scale", "tiny")
READING = config.get("reading", "")
if READING not in ("", "default", "literal"):
    raise WorkflowError(f"The reading is {READING!r}: it is default, literal, or the scale's own where none is given.")
DATA_ROOT = config.get("data_root", "data")
PROPOSALS = config.get("proposals", "")  # a file or folder of boxes, or FELGA's DETReg checkpoint
SMOKE = "-p smoke True" if config.get("smoke") else ""
TABLE = f"figures/{GRID}.{DATASET}.{label(SCALE, smoke=bool(SMOKE))}"  # of both readings
RUN = f"papermill_runs/{METHOD}/{{name}}.s{{seed}}"
# the page that draws the table
DRAWN_BY = "7_compare" if METHOD == "arena" else f"{METHOD}/3_ablations"
PAPERMILL = f"{shlex.quote(sys.executable)} -m papermill --no-progress-bar --log-output"

RESUME = f"-p resume {'fresh' if config.get('force') else 'replace'}"

try:
    TABLE_OF = grid(GRID, DATASET, folder="grids")
except DataError as error:
    raise WorkflowError(str(error))
ROWS = {row: TABLE_OF.of(row).cells(row, SCALE) for row in (*TABLE_OF.rows, *TABLE_OF.linked)}
if TABLE_OF.boxes and not PROPOSALS:
    left = ", ".join(TABLE_OF.boxes)
    print(f"Left out, for they read a detector's boxes (PROPOSALS=<file in COCO's results format>): {left}", file=sys.stderr)
    ROWS = {row: cells for row, cells in ROWS.items() if row not in TABLE_OF.boxes}
NAMES = {row: run_name(TABLE_OF.of(row), row, DATASET, SCALE, READING, smoke=bool(SMOKE)) for row in ROWS}
ROW = {name: row for row, name in NAMES.items()}
SEEDS = str(config["seeds"]).split(",") if config.get("seeds") not in (None, "") else range(TABLE_OF.seeds)
if not all(str(seed).isdecimal() for seed in SEEDS) or len(set(SEEDS)) < len(SEEDS):
    raise WorkflowError(f"The seeds are {config['seeds']!r}: give different integers with commas, as in SEEDS=0,1,2.")


def links(row):
    """The rows whose runs this row builds on."""
    return [name for cell in ROWS[row].values() for name in LINK.findall(cell)]


def prerequisites(wildcards):
    return [f"{RUN}/metrics.json".format(name=NAMES[row], seed=wildcards.seed) for row in links(ROW[wildcards.name])]


def cells(wildcards):
    """The row as papermill's arguments: -p column cell ..."""
    path = lambda link: RUN.format(name=NAMES[link[1]], seed=wildcards.seed)
    own = wildcards.name == run_name(TABLE_OF.of(ROW[wildcards.name]), ROW[wildcards.name], DATASET, SCALE, smoke=bool(SMOKE))
    given = ({} if own else {"reading": READING}) | ROWS[ROW[wildcards.name]]
    given = {key: PROPOSALS if cell == BOXES else LINK.sub(path, cell) for key, cell in given.items()}
    return [word for key, cell in given.items() for word in ("-p", key, cell)]


wildcard_constraints:
    name="|".join(map(re.escape, ROW)),
    seed="[0-9]+",


localrules:
    table,


rule table:
    input:
        expand(f"{RUN}/metrics.json", name=[name for name, row in ROW.items() if row in TABLE_OF.rows], seed=SEEDS),
    output:
        multiext(TABLE, ".csv", ".md", ".svg"),
    log:
        notebook=f"papermill_runs/{METHOD}/{DATASET}.{label(SCALE, smoke=bool(SMOKE))}.{GRID}.ipynb",
    shell:
        "mkdir -p papermill_runs/{METHOD} figures && "
        "{PAPERMILL} notebooks/{DRAWN_BY}.ipynb {log.notebook}"
        " -p grid {GRID} -p dataset {DATASET} -p scale {SCALE} -p data_root {DATA_ROOT:q} {SMOKE}"


rule run:
    input:
        ancient(prerequisites),  # a fresh clone's modification times say nothing: `upstream` tells of changes
    output:
        f"{RUN}/metrics.json",
    log:
        notebook=f"{RUN}/run.ipynb",
    params:
        cells=cells,
        page=lambda wildcards: f"notebooks/{METHOD}/{TABLE_OF.of(ROW[wildcards.name]).page}.ipynb",
        proposals=["-p", "proposals", PROPOSALS] if PROPOSALS and not TABLE_OF.boxes else [],
        upstream=lambda wildcards: [ROWS[row] for row in links(ROW[wildcards.name])],
        out=RUN,
    threads: 1
    retries: 1
    shell:
        "mkdir -p {params.out} && "
        "{PAPERMILL} {params.page} {log.notebook} -p out {params.out}"
        " -p dataset {DATASET} -p scale {SCALE} -p data_root {DATA_ROOT:q} -p seed {wildcards.seed}"
        " {params.proposals:q} {params.cells:q} {SMOKE} {RESUME}"
