"""The workbook: every notebook, each after those whose files it opens, and one small grid.

    snakemake --snakefile workbook.smk --cores all --config jobs=2        (make workbook)

A page is done when its stamp papermill_runs/workbook/<page>.done is there: an executed notebook on disk proves
nothing. A page runs again when its notebook or the library changed; not when a page before it ran again. Pages
that wait for nothing run side by side.
"""

import shlex
import sys
from pathlib import Path

BOOK = "papermill_runs/workbook"
PAPERMILL = f"{shlex.quote(sys.executable)} -m papermill --no-progress-bar --log-output"
JOBS = int(config.get("jobs", 2))  # pages at a time
FIRST = "0_start_here"  # draws the embedded set
AFTER = {
    "1_data": [FIRST],
    "felga/0_vlp": [FIRST],
    "felga/1_lesson": ["felga/0_vlp"],
    "felga/2_train": ["felga/1_lesson", "1_data"],
    "mvam/1_lesson": ["1_data"],
    "hslm/1_lesson": ["1_data"],
    "slan/1_lesson": [FIRST],
    "slan/5_captioning": ["slan/2_train"],
    "slan/6_localization": ["slan/2_train"],
    "slan/7_vqa": ["slan/2_train"],
    "slan/8_nlvr2": ["slan/2_train"],
    "slan/9_video": ["slan/2_train"],
    "mvam/3_ablations": ["mvam/2_train", "tiny_grid"],
    "tiny_grid": ["mvam/2_train"],
    "6_explore": ["mvam/2_train"],
    "arena/2_train": ["mvam/1_lesson", "hslm/1_lesson"],
    "7_compare": ["arena/2_train"],
    "8_readings": [FIRST],
    "9_scorecard": ["7_compare", "mvam/4_attention", "hslm/4_attention", "felga/4_retrieval", "slan/4_regions"],
}
# tasks that a run of slan/2_train is fine-tuned for; minutes each in full
SMOKE = ("slan/5_captioning", "slan/6_localization", "slan/7_vqa", "slan/8_nlvr2", "slan/9_video")
LONGEST_FIRST = ("slan", "felga", "hslm", "mvam")
PAGES = sorted(str(path.relative_to("notebooks").with_suffix("")) for path in Path("notebooks").rglob("[0-9]_*.ipynb")
               if not any(part.startswith(".") for part in path.parts))  # fmt: skip


def before(page):
    """The pages that `page` waits for: those of AFTER, else the one before it in its folder."""
    if page in AFTER:
        return AFTER[page]
    siblings = [one for one in PAGES if Path(one).parent == Path(page).parent and one < page]
    return siblings[-1:] if "/" in page else []


def priority_of(page):
    method = page.split("/")[0]
    return 10 - LONGEST_FIRST.index(method) if method in LONGEST_FIRST else 20 if page in (FIRST, "1_data") else 0


rule all:
    input:
        expand(f"{BOOK}/{{page}}.done", page=PAGES),
        f"{BOOK}/tiny_grid.done",


for one in PAGES:

    rule:
        name:
            f"page_{one.replace('/', '_')}"
        input:
            ancient([f"{BOOK}/{page}.done" for page in before(one)]),
            f"notebooks/{one}.ipynb",
            [str(path) for path in Path("src/finematch").rglob("*.py")],
        output:
            touch(f"{BOOK}/{one}.done"),
        params:
            page=one,
            smoke="-p smoke True" if one in SMOKE else "",
        threads: max(1, workflow.cores // JOBS)
        priority: priority_of(one)
        shell:
            "mkdir -p $(dirname {BOOK}/{params.page}) && TIMEFORMAT='{params.page} took %0lR' && "
            "time {PAPERMILL} notebooks/{params.page}.ipynb {BOOK}/{params.page}.ipynb {params.smoke}"


rule tiny_grid:
    input:
        ancient([f"{BOOK}/{page}.done" for page in before("tiny_grid")]),
        [str(path) for path in Path("src/finematch").rglob("*.py")],
    output:
        touch(f"{BOOK}/tiny_grid.done"),
    threads: max(1, workflow.cores // JOBS)
    shell:
        "TIMEFORMAT='the tiny grid took %0lR' && "
        "time {sys.executable} -m snakemake --workflow-profile profiles/default --cores {threads}"
        " --config grid=mvam_views seeds=0 smoke=1"
