"""What tests read off a notebook without running it: its cells, declared parameters and the call that checks them."""

from __future__ import annotations

import ast
import importlib.util
import re
from pathlib import Path
from typing import Any

import nbformat

from finematch.config import Params, Settings

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = ROOT / "notebooks"

_spec = importlib.util.spec_from_file_location("build", NOTEBOOKS / "build.py")
build = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(build)


def cells(source: Path) -> list[nbformat.NotebookNode]:
    """The cells of the .ipynb that `source` (a percent-format .py) builds."""
    return nbformat.reads(build.build(source), as_version=4).cells


def declaration(source: Path) -> dict[str, tuple[str, Any, str]]:
    """`{name: (annotation, default, comment)}` of the parameters cell, the second one."""
    text = cells(source)[1].source
    lines = text.splitlines()
    declared = {}
    for node in ast.parse(text).body:
        assert isinstance(node, ast.AnnAssign), f"{source}: {ast.unparse(node)!r} declares no parameter"
        comment = re.search(r"#\s*(.*)$", lines[node.end_lineno - 1][node.end_col_offset :])
        default = ast.literal_eval(node.value)
        declared[node.target.id] = (ast.unparse(node.annotation), default, comment[1] if comment else "")
    return declared


def until_checked(source: Path) -> list[ast.stmt]:
    """The statements of the third cell up to the one that checks the parameters, that one included."""
    statements = ast.parse(cells(source)[2].source).body
    for number, statement in enumerate(statements, start=1):
        calls = [node for node in ast.walk(statement) if isinstance(node, ast.Call)]
        if any(getattr(call.func, "id", "") in ("parameters", "settings") for call in calls):
            return statements[:number]
    raise AssertionError(f"{source}: the third cell does not call parameters(globals(), ...)")


def accepted(source: Path, injected: dict[str, Any] | None = None) -> Params | Settings:
    """Runs the parameters cell, papermill's assignments and the third cell as far as the check."""
    namespace: dict[str, Any] = {"__name__": "__main__"}
    exec(cells(source)[1].source, namespace)
    namespace |= injected or {}
    exec(compile(ast.Module(until_checked(source), type_ignores=[]), str(source), "exec"), namespace)
    (params,) = (value for value in namespace.values() if isinstance(value, (Params, Settings)))
    return params
