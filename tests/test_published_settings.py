"""What the papers print of their settings, as data, against the presets `paper` and the pages that train with them."""

import ast
import csv
from pathlib import Path
from types import SimpleNamespace

import pytest
from notebook_text import NOTEBOOKS, cells
from test_settings import CONFIGS, other_value

import finematch
from finematch import grids
from finematch.config import PRESETS, Settings, declared, preset
from finematch.models.configs import LocatorConfig
from finematch.models.slan.locator import SelfLocator
from finematch.training import Plan

FILE = PRESETS.with_name("published_settings.csv")
with FILE.open(encoding="utf-8", newline="") as file:
    PRINTED = list(csv.DictReader(file))

# what the presets `paper` have besides: their papers print nothing of it, so that a change is ours and must be meant
OURS = {
    "mvam": {"regions": 36, "width": 768, "depth": 12, "input_dropout": 0.0, "lr": 1e-4, "stage1_lr": 1e-3,
             "weight_decay": 0.01, "warmup": 0.1, "precision": "auto"},
    "hslm": {"sim": 256, "graph_norm": "none", "cross_scale": 1.0, "dropout": 0.0, "rivals": 0, "warmup_epochs": 0.0,
             "clip_norm": 2.0, "precision": "auto", "val_pictures": 0},
    "felga": {"vlp_precision": "auto", "precision": "auto", "train_keywords": "nouns"},
    "slan": {"maps": 3, "stages": (2, 3, 4), "width": 768, "text_depth": 12, "text_heads": 12, "pyramid": 256,
             "heads": 12, "anchor": 8.0, "query_depth": 6, "query_heads": 8, "samples": 14, "dropout": 0.0,
             "embed": 256, "queue": 65536, "mlm_weight": 1.0, "reg_weight": 1.0, "rerank": 128, "random_negatives": 0.0,
             "encoder_epochs": 0, "weight_decay": 0.02, "warmup": 0.0, "clip_norm": 0.0, "precision": "auto",
             "workers": 4, "checkpoint_steps": 500},
}  # fmt: skip


def settings_of(line):
    """The settings at scale paper under the line's condition: a row of a grid, or values of other settings."""
    method, (kind, _, value) = line["paper"].lower(), line["where"].partition("=")
    if kind == "row":
        name, row = value.split("/")
        return grids.settings(grids.grid(name), row, scale="paper")
    return Settings(method, {"scale": "paper"} | ({kind: value} if kind else {}))


def plans(method, s):
    """Every `Plan(...)` of the method's training page, as the page makes it of the settings."""
    source = NOTEBOOKS / method / "2_train.py"
    code = "\n".join(cell.source for cell in cells(source) if cell.cell_type == "code")
    statements = [*ast.walk(ast.parse(code))]
    if s.as_dict().get("encoder_epochs") == 0:  # the page makes no plan of them then
        s = s.replace(encoder_epochs=1)
    run = SimpleNamespace(precision=s.precision)
    given = {"s": s, "run": run, "member": 0, "lr": s.lr, "epochs": s.epochs}
    for node in statements:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "schedule":
            exec(ast.unparse(node), given)
    calls = [node for node in statements if isinstance(node, ast.Call) and ast.unparse(node.func) == "Plan"]
    return [eval(ast.unparse(call), given | {"Plan": Plan}) for call in calls]


def test_every_line_has_its_place_and_words():
    assert len(PRINTED) > 50
    for line in PRINTED:
        assert None not in line
        assert all(line[key] for key in ("paper", "setting", "value", "place", "printed")), line
    keys = [(line["paper"], line["setting"], line["where"]) for line in PRINTED]
    assert len(set(keys)) == len(keys)
    assert {line["paper"].lower() for line in PRINTED} == OURS.keys()


@pytest.mark.parametrize("line", PRINTED, ids=lambda line: " ".join([*line.values()][:4]).strip())
def test_the_preset_paper_has_what_the_paper_prints(line):
    s, name, value = settings_of(line), line["setting"], line["value"]
    if name == "ratios":  # empty: as printed
        small = {"width": 8, "pyramid": 4, "heads": 2, "query_depth": 1, "query_heads": 2, "samples": 1}
        model = SelfLocator((4, 4, 4), LocatorConfig.of(s, **small))
        assert [one.ratio for one in model.adaptors] == [float(part) for part in value.split(",")]
        return
    of = plans(s.method, s) if name in ("optimizer", "schedule") else [s]
    (found,) = {getattr(one, name) for one in of}
    wanted = value if isinstance(found, str) else type(found)(value)
    assert found == wanted, f"{name} is {found!r}: {line['printed']}"


@pytest.mark.parametrize("method", OURS)
def test_a_value_of_the_preset_paper_is_printed_or_ours(method):
    printed = {line["setting"] for line in PRINTED if line["paper"].lower() == method}
    found = preset(method, "paper")
    assert {name: value for name, value in found.items() if name not in printed} == OURS[method]


@pytest.mark.parametrize("method", OURS)
def test_a_pages_plan_has_the_pages_settings(method):
    """Each setting that a plan has reaches every plan of the page, whatever its value."""
    s = Settings(method, {"scale": "paper", "precision": "no"})
    names = [name for name in declared(method) if name in Plan.__dataclass_fields__ and name != "precision"]
    assert {"epochs", "batch_size", "lr", "seed"} <= set(names)
    if method == "slan":  # its `momentum` is that of the momentum encoders
        names.remove("momentum")
    for name in names:
        value = other_value(declared(method)[name], getattr(s, name))
        for was, now in zip(plans(method, s), plans(method, s.replace(**{name: value})), strict=True):
            if name == "seed" or (
                name == "epochs" and was.epochs != s.epochs
            ):  # members, the encoders' epochs
                continue
            assert getattr(now, name) == value != getattr(was, name), name


def test_steps_of_the_schedules_are_where_the_papers_say():
    (plan,) = plans(
        "hslm", Settings("hslm", {"scale": "paper", "dataset": "coco_karpathy", "precision": "no"})
    )
    assert plan.milestones == (15, 30)
    (plan,) = plans("felga", Settings("felga", {"scale": "paper", "dataset": "coco", "precision": "no"}))
    assert plan.milestones == (40.0,)


@pytest.mark.parametrize("method", CONFIGS)
def test_a_page_reads_every_setting_that_it_declares(method):
    """What is no field of a model's config stands in the page's code, or resolves other settings."""
    code = "\n".join(
        cell.source for cell in cells(NOTEBOOKS / method / "2_train.py")[2:] if cell.cell_type == "code"
    )
    nodes = [*ast.walk(ast.parse(code))]
    for module in ("arena", "entrants") if method == "arena" else ():  # its page hands the settings over
        text = Path(finematch.__path__[0], f"{module}.py").read_text(encoding="utf-8")
        nodes += ast.walk(ast.parse(text))
    attributes = [node for node in nodes if isinstance(node, ast.Attribute)]
    read = {node.attr for node in attributes if ast.unparse(node.value) in ("s", "entrant.s")}
    read |= {node.value for node in nodes if isinstance(node, ast.Constant)}
    fields = {name for config in CONFIGS[method] for name in config.declared()}
    resolves = {"reading", "version", "precision"}  # the last one: `run.precision`
    assert declared(method).keys() - fields - read <= resolves


def test_the_file_is_part_of_the_package():
    assert FILE.parent.samefile(finematch.__path__[0])
    assert 'package-data]\nfinematch = ["presets/*.toml", "published*.csv"' in (
        FILE.parents[2] / "pyproject.toml"
    ).read_text(encoding="utf-8")
