"""The lessons' form, and what their pages share."""

from __future__ import annotations

import dataclasses
import re

import jupytext
import pandas as pd
import pytest
import torch
from matplotlib import pyplot as plt
from torch import nn

from finematch.config import root
from finematch.figures.diagram import diagram
from finematch.files import DataError
from finematch.lessons import beside, came_out, close, mvam, shapes
from finematch.losses import contrastive

LESSONS = ["mvam", "hslm", "felga", "slan"]
NOTEBOOKS = root() / "notebooks"


def cells(method: str) -> list:
    return jupytext.read(NOTEBOOKS / method / "1_lesson.py").cells


@pytest.mark.parametrize("method", LESSONS)
def test_cells_are_short(method):
    """At most twelve lines of code a cell; the parameters, which have one line each, aside."""
    for cell in cells(method):
        if cell.cell_type == "code" and "parameters" not in cell.metadata.get("tags", ()):
            lines = [
                line for line in cell.source.splitlines() if line.strip() and not line.strip().startswith("#")
            ]
            assert len(lines) <= 12, cell.source


@pytest.mark.parametrize("method", LESSONS)
def test_nothing_is_drawn_by_hand(method):
    for cell in cells(method):
        if cell.cell_type == "code":
            assert not re.search(r"matplotlib|\bplt\.|\bax\.|\baxes\[|subplots|set_title", cell.source), (
                cell.source
            )


@pytest.mark.parametrize("method", LESSONS)
def test_every_lesson_has_its_parts(method):
    page = cells(method)
    code = "\n".join(cell.source for cell in page if cell.cell_type == "code")
    text = [cell.source for cell in page if cell.cell_type == "markdown"]
    for call in ("draw_model(", "shapes(", "beside(", "look("):
        assert call in code, f"{method}/1_lesson calls no {call}...)"
    assert len([cell for cell in page if "exercise" in cell.metadata.get("tags", ())]) >= 6
    assert re.search(r"arxiv\.org/abs/|doi\.org/|openaccess\.thecvf\.com/", text[0])
    assert "Next: [" in text[-1]
    assert "What came out" in "\n".join(text)


def test_what_came_out_is_what_the_tables_say():
    said = came_out("mvam").data
    (line,) = [
        line for line in said.splitlines() if line.startswith("| regions (FRCNN): +MVAM beats +[CLS] ")
    ]
    claims = pd.read_csv(root() / "figures" / "mvam_backbones.scenes.tiny.claims.csv")
    of = claims[
        (claims["claim"] == "regions (FRCNN): +MVAM beats +[CLS]") & (claims["metric"] == "rsum")
    ].iloc[0]
    assert f"**{of['verdict']}**: {of['difference']:+.1f} ({of['lower']:+.1f} to {of['upper']:+.1f})" in line
    assert (root() / "notebooks" / "mvam" / re.search(r"\((\.\./[^)]+)\)", line)[1]).is_file()
    assert "RESULTS.md" in came_out("mvam", "no such set").data


def test_without_the_folder_figures_the_pages_say_so_and_draw_nothing(tmp_path, monkeypatch):
    (tmp_path / "notebooks").mkdir()
    (tmp_path / "pyproject.toml").touch()
    monkeypatch.chdir(tmp_path)
    for method in LESSONS:
        assert "folder `figures` with the tables is not here" in came_out(method).data
    plt.close("all")
    judged = mvam.verdicts("mvam_views", "mvam_diversity")
    assert judged.empty
    mvam.draw_verdicts(judged[judged["claim"].str.contains("views")])
    assert not plt.get_fignums()
    (tmp_path / "figures").mkdir()
    with pytest.raises(DataError, match="no verdicts"):
        mvam.verdicts("mvam_views")


def test_close_compares_shapes_too():
    assert close(0.1 + 0.2, 0.3)
    assert close([1, 2], torch.tensor([1.0, 2.00001]))
    assert not close([1.0, 1.0], 1.0)
    assert not close(1000.0, 1000.1)


@dataclasses.dataclass
class Pair:
    first: torch.Tensor
    second: torch.Tensor | None


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.wide, self.narrow = nn.Linear(3, 5), nn.GRU(5, 4, batch_first=True)

    def forward(self, x):
        return {"pair": Pair(self.narrow(self.wide(x))[0], None)}


def test_shapes_are_recorded_with_letters():
    model = Twice()
    found = shapes(model, lambda: model(torch.zeros(2, 7, 3)), {2: "b", 7: "n", 5: "d", 4: "k"})
    assert found["wide"] == "b n d"
    assert found["narrow.0"] == "b n k"
    assert found["narrow.1"] == "1 b k"
    assert found["pair.first"] == "b n k"
    assert "pair.second" not in found
    assert not any(part._forward_hooks for part in model.modules())


def test_a_line_of_an_algorithm_stands_beside_its_statement():
    table = beside([("Eq. 5", contrastive, "logits =", "M5")]).data
    (line,) = re.findall(r"losses\.py#L(\d+)", table)
    source = (root() / "src" / "finematch" / "losses.py").read_text().splitlines()
    assert source[int(line) - 1].strip().startswith("logits =")
    assert "logits = " in table
    assert "M5" in table
    with pytest.raises(ValueError, match="has 0 statements"):
        beside([("Eq. 5", contrastive, "no such text", "")])


def test_a_diagram_refuses_what_it_cannot_draw():
    parts = {"a": (0, 0, "data"), "b": (1, 0, "step")}
    figure = diagram(parts, [("a", "b", "n d")])
    assert {"a", "b", "n d"} <= {text.get_text() for text in figure.axes[0].texts}
    with pytest.raises(ValueError, match="no part"):
        diagram(parts, [("a", "c", "")])
    with pytest.raises(ValueError, match="one place"):
        diagram(parts | {"c": (0, 0, "data")}, [])
    with pytest.raises(ValueError, match="kinds are"):
        diagram({"a": (0, 0, "magic")}, [])
