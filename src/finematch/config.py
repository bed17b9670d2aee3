"""Strict notebook parameters: refuse what is unknown, mistyped or out of range before anything heavy starts.

The second cell of a notebook, tagged `parameters`, declares flat annotated scalars, each with a comment:

    views: int = 16  # number of view codes
    pooling: str = "mvam"  # cls | mean | attention | mvam

papermill puts a cell of assignments after it, and a misspelt name there changes nothing but earns a mere
warning. The third cell therefore calls

    p = strict(globals(), views=(1, 256), pooling={"cls", "mean", "attention", "mvam"})

A tuple is a closed range, a set holds the choices; a parameter without a rule is held to its type alone.
Standard library only: a wrong parameter is refused before torch is imported.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

Rule = tuple | set | frozenset

_TYPES = {"int": int, "float": float, "str": str, "bool": bool}
_PLAIN = (int, float, str, list, dict, type(None))  # what papermill can inject (a bool is an int)
_IPYTHON = {"In", "Out"}
_DECLARED = "_finematch_declared"  # kept in the notebook's namespace, so a restarted kernel starts afresh
_NUMBER = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?")


class ParameterError(ValueError):
    """A parameter that was refused. The message names it, what was declared and the closest match."""


class Params:
    """The accepted parameters: frozen, read as attributes.

    `p.views` reads one, `p.as_dict()` all of them in the order of their declaration, and
    `p.replace(views=8)` gives a changed copy held to the same types and rules.
    """

    __slots__ = ("_rules", "_types", "_values")

    def __init__(self, values: Mapping[str, Any], types: Mapping[str, type], rules: Mapping[str, Rule]):
        """Checks `values` against `types` and `rules`; raises ParameterError listing everything wrong."""
        problems = [_unknown(name, types) for name in values if name not in types]
        problems += [f"{name!r} is declared but has no value" for name in types if name not in values]
        accepted = {}
        for name in types:
            if name in values:
                try:
                    accepted[name] = _accept(name, values[name], types[name], rules.get(name))
                except ParameterError as error:
                    problems.append(str(error))
        if problems:
            raise ParameterError("\n".join([*problems, f"Declared parameters: {_listing(types)}"]))
        for slot, content in zip(self.__slots__, (dict(rules), dict(types), accepted), strict=True):
            object.__setattr__(self, slot, content)

    def as_dict(self) -> dict[str, Any]:
        """All parameters by name, as plain scalars (ready for JSON)."""
        return dict(self._values)

    def replace(self, **changes: Any) -> Params:
        """A copy with `changes`; raises ParameterError as `strict` does."""
        return Params({**self._values, **changes}, self._types, self._rules)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):  # an unset slot while copying or unpickling, or a protocol IPython looks for
            raise AttributeError(name)
        if name not in self._values:
            raise AttributeError(
                f"{_unknown(name, self._types)}\nDeclared parameters: {_listing(self._types)}"
            )
        return self._values[name]

    def __setattr__(self, name: str, value: Any) -> None:
        raise AttributeError(f"parameters are frozen: use p.replace({name}=...) for a changed copy")

    def __delattr__(self, name: str) -> None:
        self.__setattr__(name, None)

    def __dir__(self) -> Iterable[str]:
        return ["as_dict", "replace", *self._values]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Params) and self._values == other._values

    def __hash__(self) -> int:
        return hash(tuple(self._values.items()))

    def __reduce__(self):
        return Params, (self._values, self._types, self._rules)

    def __repr__(self) -> str:
        return "Params(" + ", ".join(f"{name}={value!r}" for name, value in self._values.items()) + ")"


def strict(namespace: dict[str, Any], /, **rules: Rule) -> Params:
    """Collects and checks the parameters of a notebook; call it in the third cell.

    Args:
        namespace: the notebook's `globals()`; its `__annotations__` are the declaration.
        **rules: by parameter, `(low, high)` for a closed numeric range or a set of choices.

    Names that are bound to plain values without being declared are refused the first time the cell runs in a
    kernel: at that moment they can only be misspelt parameters. When the cell is run again, variables that
    the reader has made meanwhile, annotated or not, are left alone.

    Of all conversions only two are made, both to a float parameter: an int, and a string that spells a number
    (YAML 1.1 reads `1e-4` as a string).

    Raises:
        ParameterError: unknown names, wrong types, values that are out of range, not finite or no choice.
    """
    declared = namespace.get(_DECLARED) or _declaration(namespace)
    for name, rule in rules.items():
        _check_rule(name, rule, declared)
    values = {name: namespace[name] for name in declared if name in namespace}
    if _DECLARED not in namespace:
        values |= {
            name: value
            for name, value in namespace.items()
            if not name.startswith("_") and name not in _IPYTHON and isinstance(value, _PLAIN)
        }
    accepted = Params(values, declared, rules)
    namespace[_DECLARED] = declared
    return accepted


def root(start: str | Path = ".") -> Path:
    """The workbook's folder: the nearest of `start` and its parents with `pyproject.toml` and `notebooks/`.

    Paths in parameters are relative to it. papermill started there runs kernels there; JupyterLab starts a
    kernel in its notebook's folder. `root() / p.out` serves both (and an absolute `out` stays absolute).

    Raises:
        FileNotFoundError: `start` lies outside the workbook.
    """
    start = Path(start).resolve()
    for folder in (start, *start.parents):
        if (folder / "pyproject.toml").is_file() and (folder / "notebooks").is_dir():
            return folder
    raise FileNotFoundError(
        f"{start} lies outside the workbook: no parent has pyproject.toml and notebooks/. "
        "Start papermill in the workbook's folder, or give it --cwd."
    )


def _declaration(namespace: Mapping[str, Any]) -> dict[str, type]:
    """Declared names and types from the namespace's annotations."""
    declared = {}
    for name, kind in namespace.get("__annotations__", {}).items():
        if name.startswith("_"):
            continue
        kind_name = kind if isinstance(kind, str) else getattr(kind, "__name__", str(kind))
        if kind_name not in _TYPES:
            raise ParameterError(f"{name!r} is annotated {kind_name}: a parameter is {_words(_TYPES)}")
        if hasattr(Params, name):
            raise ParameterError(f"{name!r} cannot name a parameter: p.{name} is a method")
        declared[name] = _TYPES[kind_name]
    if not declared:
        raise ParameterError("no parameters are declared: write them as `views: int = 16  # view codes`")
    return declared


def _check_rule(name: str, rule: Rule, declared: Mapping[str, type]) -> None:
    """Refuses a rule that could never be applied."""
    if name not in declared:
        raise ParameterError(
            f"a rule for an {_unknown(name, declared)}\nDeclared parameters: {_listing(declared)} "
            "(after declaring another one, restart the kernel)"
        )
    if isinstance(rule, (set, frozenset)) and rule:
        return
    if isinstance(rule, tuple) and len(rule) == 2 and declared[name] in (int, float) and rule[0] <= rule[1]:
        return
    raise ParameterError(f"the rule {name}={rule!r} is neither (low, high) for a number nor a set of choices")


def _accept(name: str, value: Any, kind: type, rule: Rule | None) -> Any:
    """The value as `kind`, within `rule`; raises ParameterError naming `name`."""
    if kind is float:
        if isinstance(value, str) and _NUMBER.fullmatch(value.strip()):
            value = float(value)
        elif type(value) is int:
            value = float(value) if abs(value) <= 2**1023 else math.inf
    if type(value) is not kind:
        hint = ""
        if kind is str and isinstance(value, (int, float)):
            hint = f" (papermill's -r {name} VALUE passes it as it is written)"
        raise ParameterError(f"{name!r} must be {kind.__name__}, not {type(value).__name__} {value!r}{hint}")
    if kind is float and not math.isfinite(value):
        raise ParameterError(f"{name!r} must be finite, not {value}")
    if isinstance(rule, tuple) and not rule[0] <= value <= rule[1]:
        raise ParameterError(f"{name!r} must lie in [{rule[0]}, {rule[1]}], not {value}")
    if isinstance(rule, (set, frozenset)) and value not in rule:
        choices = sorted(rule, key=lambda choice: (type(choice).__name__, choice))
        listed, near = _words(map(repr, choices)), _closest(value, choices)
        raise ParameterError(f"{name!r} must be {listed}, not {value!r}{near}")
    return value


def _unknown(name: str, declared: Iterable[str]) -> str:
    return f"unknown parameter {name!r}{_closest(name, declared)}"


def _closest(word: Any, known: Iterable[Any]) -> str:
    """Names the nearest of `known`, if any is near."""
    near = difflib.get_close_matches(str(word), [str(one) for one in known], n=1, cutoff=0.5)
    return f": did you mean {near[0]!r}?" if near else ""


def _listing(types: Mapping[str, type]) -> str:
    return ", ".join(f"{name}: {kind.__name__}" for name, kind in types.items())


def _words(items: Iterable[str]) -> str:
    *most, last = items
    return f"{', '.join(most)} or {last}" if most else last
