"""docs/readings.md and docs/findings.md have what is declared and what came out."""

from __future__ import annotations

import html
import re
import shutil
import subprocess

import pytest
from notebook_text import ROOT

from finematch import grids
from finematch.config import PRESETS, Config, declared
from finematch.files import DataError
from finematch.models import configs
from finematch.pages import came_out, rewrite

DOCS = ROOT / "docs"
CONFIGS = [
    one
    for one in vars(configs).values()
    if isinstance(one, type) and issubclass(one, Config) and one.readings()
]


@pytest.fixture
def kept(tmp_path):
    """A copy of docs/, of the claims and of the measured readings that git keeps."""
    listed = subprocess.run(["git", "ls-files", "-z", "figures"], cwd=ROOT, capture_output=True, text=True)
    names = [
        name
        for name in listed.stdout.split("\0")
        if name.endswith((".claims.csv", "readings.scenes.tiny.csv"))
    ]
    if listed.returncode or not names:
        pytest.skip("not a git checkout")
    shutil.copytree(DOCS, tmp_path / "docs")
    (tmp_path / "figures").mkdir()
    for name in names:
        shutil.copy(ROOT / name, tmp_path / "figures")
    return tmp_path


def test_the_generated_parts_are_those_of_today(kept):
    assert rewrite(kept / "docs", kept / "figures") == [], "python -m finematch pages"


@pytest.mark.parametrize("config", CONFIGS, ids=[one.__name__ for one in CONFIGS])
def test_every_switch_is_listed_with_what_the_paper_says(config):
    page = (DOCS / "readings.md").read_text(encoding="utf-8")
    for register, argument, *_, says in config.readings():
        end = re.escape(html.escape(says, quote=False))
        effect = r"( [^|]+ \|)?"  # where measured
        line = rf"^\| {register.replace('-', '–')} +\| `{argument}` .*\| {end} +\|{effect}$"
        assert re.search(line, page, re.M), (register, argument)


def test_every_page_with_readings_and_every_grid_has_its_part():
    pages = {name: (DOCS / f"{name}.md").read_text(encoding="utf-8") for name in ("readings", "findings")}
    named = set(re.findall(r"<!-- readings (\w+) -->", pages["readings"]))
    assert named == {
        file.stem for file in PRESETS.glob("*.toml") if any(d.register for d in declared(file.stem).values())
    }
    assert set(re.findall(r"<!-- claims (\w+)", pages["findings"])) == {
        name for name in grids.names() if grids.grid(name).claims
    }


def test_what_came_out_is_read_from_the_claims(kept):
    claims = kept / "figures" / "mvam_views.scenes.tiny.claims.csv"
    lines = claims.read_text(encoding="utf-8").splitlines()
    number = next(n for n, line in enumerate(lines) if line.startswith("default,8 views beat 1,rsum,"))
    fields = lines[number].split(",")
    fields[3:7] = ["contradicted", "-2.0", "-3.0", "-1.0"]
    claims.write_text(
        "\n".join([*lines[:number], ",".join(fields), *lines[number + 1 :]]) + "\n", encoding="utf-8"
    )
    assert rewrite(kept / "docs", kept / "figures") == [kept / "docs" / "findings.md"]
    page = (kept / "docs" / "findings.md").read_text(encoding="utf-8")
    assert "**contradicted**: -2.0 (-3.0 to -1.0), 3 seeds" in page
    claims.unlink()
    rewrite(kept / "docs", kept / "figures")
    page = (kept / "docs" / "findings.md").read_text(encoding="utf-8")
    assert "*Not run here*: 8 views beat 1; 16 views beat 1;" in page
    assert (
        "The command is `make grid GRID=mvam_views SCALE=paper DATASET=coco_karpathy DATA_ROOT=<folder>`."
        in page
    )


def test_the_command_of_a_grid_of_ours_is_at_our_scale_and_names_the_boxes(tmp_path):
    line = "`make grid GRID=arena_detected DATASET=flickr8k DATA_ROOT=<folder> PROPOSALS=<file>`"
    assert f"The command is {line}." in came_out("arena_detected", None, tmp_path)


@pytest.mark.parametrize(
    ("part", "problem"),
    [
        ("<!-- claims mvam_views: 9 views beat 1 -->\n<!-- end -->", "9 views beat 1.* is no claim there"),
        ("<!-- claims mvam_nothing -->\n<!-- end -->", "mvam_nothing"),
        ("<!-- readings nothing -->\n<!-- end -->", "no presets for 'nothing'"),
    ],
)
def test_a_part_of_nothing_is_refused(tmp_path, part, problem):
    (tmp_path / "page.md").write_text(part, encoding="utf-8")
    with pytest.raises(DataError, match=f"page.md.*{problem}"):
        rewrite(tmp_path)
