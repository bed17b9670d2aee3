"""Strict parameters: what is refused, what is accepted, and that papermill's exit status shows it."""

import copy
import pickle
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import numpy as np
import pytest

from finematch.config import ParameterError, Params, parameters, root
from finematch.models.configs import MVAMConfig

RULES = {"views": (1, 256), "pooling": {"cls", "mean", "attention", "mvam"}, "lr": (0.0, 1.0)}


def notebook(injected: str = "", declaration: str = "") -> dict:
    """The namespace of a notebook after its parameters cell and papermill's injected one."""
    namespace: dict = {"__name__": "__main__", "In": ["", "..."], "Out": {}, "_ih": [], "_": ""}
    declaration = declaration or (
        "views: int = 16\npooling: str = 'mvam'\nlr: float = 1e-4\nsmoke: bool = False\nout: str = 'run'"
    )
    exec(declaration, namespace)
    exec(injected, namespace)
    return namespace


def test_defaults_and_injected_values_are_read_in_order():
    p = parameters(notebook("views = 8"), **RULES)
    assert p.as_dict() == {"views": 8, "pooling": "mvam", "lr": 1e-4, "smoke": False, "out": "run"}
    assert list(p.as_dict()) == ["views", "pooling", "lr", "smoke", "out"]
    assert (p.views, p.lr) == (8, 1e-4)


@pytest.mark.parametrize("value", ["8", "2.5", "True", "None", "'x'", "[1]", "{}"])
def test_unknown_name_is_refused_with_the_declared_and_the_closest(value):
    with pytest.raises(ParameterError) as refused:
        parameters(notebook(f"veiws = {value}"), **RULES)
    message = str(refused.value)
    assert "unknown parameter 'veiws': did you mean 'views'?" in message
    for name in ("views: int", "pooling: str", "lr: float", "smoke: bool", "out: str"):
        assert name in message


def test_unknown_name_like_nothing_else_gets_no_suggestion():
    with pytest.raises(ParameterError, match=r"unknown parameter 'zzzz'\n"):
        parameters(notebook("zzzz = 1"), **RULES)


@pytest.mark.parametrize(
    ("injected", "message"),
    [
        ("views = True", "'views' must be int, not bool True"),
        ("views = 8.0", "'views' must be int, not float 8.0"),
        ("views = '8'", "'views' must be int, not str '8'"),
        ("views = None", "'views' must be int, not NoneType None"),
        ("smoke = 1", "'smoke' must be bool, not int 1"),
        ("smoke = 'true'", "'smoke' must be bool, not str 'true'"),
        ("lr = True", "'lr' must be float, not bool True"),
        ("lr = '1e-4x'", "'lr' must be float, not str '1e-4x'"),
        ("lr = 'nan'", "'lr' must be float, not str 'nan'"),
        ("lr = '1_0'", "'lr' must be float, not str '1_0'"),
        ("lr = [0.1]", r"'lr' must be float, not list \[0.1\]"),
        ("out = 7", "-r out VALUE"),
        ("lr = float('nan')", "'lr' must be finite, not nan"),
        ("lr = -float('inf')", "'lr' must be finite, not -inf"),
        ("lr = '1e999'", "'lr' must be finite, not inf"),
        ("lr = 10**400", "'lr' must be finite, not inf"),
        ("views = 0", r"views = 0: must lie in \[1, 256\]"),
        ("views = 257", r"views = 257: must lie in \[1, 256\]"),
        ("lr = 1.5", r"lr = 1.5: must lie in \[0.0, 1.0\]"),
        (
            "pooling = 'mvan'",
            "pooling is 'mvan'; use 'attention', 'cls', 'mean' or 'mvam': did you mean 'mvam'",
        ),
    ],
)
def test_wrong_values_are_refused(injected, message):
    with pytest.raises(ParameterError, match=message):
        parameters(notebook(injected), **RULES)


@pytest.mark.parametrize(
    ("injected", "expected"),
    [("lr = 1", 1.0), ("lr = '1e-4'", 1e-4), ("lr = '.5'", 0.5), ("lr = 0", 0.0), ("lr = ' 1E-3 '", 1e-3)],
)
def test_float_parameters_take_ints_and_spelt_numbers(injected, expected):
    lr = parameters(notebook(injected), **RULES).lr
    assert type(lr) is float
    assert lr == expected


def test_all_that_is_wrong_is_said_at_once():
    with pytest.raises(ParameterError) as refused:
        parameters(notebook("veiws = 8\nviews = 'many'\nlr = 7"), **RULES)
    message = str(refused.value)
    assert all(part in message for part in ("'veiws'", "'views' must be int", "lr = 7.0: must lie in"))


def test_the_cell_can_run_again_among_the_users_own_variables():
    namespace = notebook("views = 8")
    parameters(namespace, **RULES)
    exec("best = 0.5\nnames = []\nstep: int = 3\nmatrix: 'Tensor' = None\nviews = 4", namespace)
    p = parameters(namespace, **RULES)
    assert p.views == 4
    assert "step" not in p.as_dict()
    namespace["views"] = 0  # ... but its own parameters stay held to their rules
    with pytest.raises(ParameterError, match="views"):
        parameters(namespace, **RULES)


def test_a_page_may_bind_a_parameters_name_to_something_else():
    namespace = notebook("views = 8")
    parameters(namespace, **RULES)
    exec("from pathlib import Path as views", namespace)
    assert parameters(namespace, **RULES).views == 8
    namespace["views"] = 4
    assert parameters(namespace, **RULES).views == 4


def test_a_refused_run_is_refused_again():
    namespace = notebook("veiws = 8")
    for _ in range(2):
        with pytest.raises(ParameterError, match="veiws"):
            parameters(namespace, **RULES)


def test_annotations_may_be_strings():
    namespace = notebook(
        declaration="from __future__ import annotations\nviews: int = 8\nfrom pathlib import Path"
    )
    assert parameters(namespace).views == 8


@pytest.mark.parametrize(
    ("declaration", "rules", "message"),
    [
        ("views: list = []", {}, "'views' is annotated list: a parameter is int, float, str or bool"),
        ("views: 'int | None' = 1", {}, r"annotated int \| None"),
        ("views: int", {}, "'views' is declared but has no value"),
        ("views = 1", {}, "no parameters are declared"),
        ("replace: int = 1", {}, "'replace' cannot name a parameter"),
        (
            "views: int = 1",
            {"veiws": (1, 2)},
            "a rule for an unknown parameter 'veiws': did you mean 'views'",
        ),
        ("views: int = 1", {"views": (2, 1)}, "the rule views="),
        ("views: int = 1", {"views": set()}, "the rule views="),
        ("out: str = ''", {"out": (1, 2)}, "the rule out="),
        ("views: int = 0", {"views": (1, 2)}, "views = 0: must lie in"),
    ],
)
def test_wrong_declarations_and_rules_are_refused(declaration, rules, message):
    with pytest.raises(ParameterError, match=message):
        parameters(notebook(declaration=declaration), **rules)


def test_params_are_frozen_and_replace_is_strict():
    p = parameters(notebook(), **RULES)
    with pytest.raises(AttributeError, match="frozen"):
        p.views = 8
    with pytest.raises(AttributeError, match="frozen"):
        del p.views
    with pytest.raises(AttributeError, match="did you mean 'views'"):
        p.veiws  # noqa: B018
    p.as_dict()["views"] = 0
    assert p.views == 16
    q = p.replace(views=8, lr=1)
    assert (p.views, q.views, q.lr) == (16, 8, 1.0)
    for wrong in ({"views": 0}, {"views": 8.0}, {"veiws": 8}):
        with pytest.raises(ParameterError, match="views"):
            p.replace(**wrong)
    with pytest.raises(ParameterError, match="views"):
        q.replace(views=0)


def test_params_are_values():
    p = parameters(notebook(), **RULES)
    assert p == p.replace() == copy.deepcopy(p) == pickle.loads(pickle.dumps(p))
    assert p != p.replace(views=8)
    assert hash(p) == hash(p.replace())
    assert {"views", "replace"} <= set(dir(p))
    assert repr(p).startswith("Params(views=16, pooling='mvam'")
    assert isinstance(p, Params)


def test_root_is_the_nearest_workbook(tmp_path):
    book = tmp_path / "book"
    (book / "notebooks" / "mvam").mkdir(parents=True)
    with pytest.raises(FileNotFoundError, match="outside the workbook"):
        root(book)
    (book / "pyproject.toml").touch()
    assert root(book / "notebooks" / "mvam") == root(book) == book
    assert root(book) / "/elsewhere" == Path("/elsewhere")


def test_importing_config_imports_nothing_heavy():
    code = (
        "import sys; import finematch.config;"
        "heavy = {'torch', 'numpy', 'pandas', 'transformers', 'timm', 'PIL'} & set(sys.modules);"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_papermill_refuses_a_misspelt_parameter(tmp_path):
    cells = [
        nbformat.v4.new_markdown_cell("# A tiny notebook"),
        nbformat.v4.new_code_cell(
            "views: int = 16  # number of view codes", metadata={"tags": ["parameters"]}
        ),
        nbformat.v4.new_code_cell(
            "from finematch.config import parameters\n"
            "p = parameters(globals(), views=(1, 256))\n"
            "print('took', p.views)"
        ),
        nbformat.v4.new_code_cell("open('later', 'w')"),
    ]
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    nbformat.write(
        nbformat.v4.new_notebook(cells=cells, metadata={"kernelspec": kernel}), tmp_path / "nb.ipynb"
    )
    command = [sys.executable, "-m", "papermill", "nb.ipynb", "run.ipynb", "--no-progress-bar"]

    def papermill(*parameters):
        return subprocess.run(
            [*command, *parameters], cwd=tmp_path, capture_output=True, text=True, timeout=900
        )

    start = time.monotonic()
    refused = papermill("-p", "veiws", "8")
    assert time.monotonic() - start < 30  # 3 s on an idle machine
    assert refused.returncode == 1
    assert "unknown parameter 'veiws': did you mean 'views'?" in refused.stderr
    assert not (tmp_path / "later").exists()
    assert "veiws" in (tmp_path / "run.ipynb").read_text()  # the traceback is kept
    accepted = papermill("-p", "views", "8", "--log-output")
    assert accepted.returncode == 0, accepted.stderr
    assert "took 8" in accepted.stdout + accepted.stderr
    assert (tmp_path / "later").exists()


def test_a_config_takes_numpys_float():
    """A lesson sweeps a setting over `np.linspace`."""
    tau = MVAMConfig(tau=np.linspace(0.1, 0.3, 3)[1]).tau
    assert (type(tau), tau) == (float, 0.2)
