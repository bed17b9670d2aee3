"""Checked notebook parameters, and the settings of a training run.

The second cell of a notebook, tagged `parameters`, declares flat annotated scalars, each with a comment:

    views: int = 16  # number of view codes
    pooling: str = "mvam"  # cls | mean | attention | mvam

papermill puts a cell of assignments after it, and a misspelt name there changes nothing but earns a mere
warning. The third cell therefore calls

    p = parameters(globals(), views=(1, 256), pooling={"cls", "mean", "attention", "mvam"})

A tuple is a closed range, a set holds the choices; a parameter without a rule is held to its type alone. A rule that
also holds None, as (0, 1000, None) does, allows the parameter to be unset.

A training page calls `s = settings(globals(), "mvam")` instead. Its parameters are declared in two places: the settings
of the model in a `Config` (a frozen dataclass, see `switch` and `setting`), all others and what each preset gives in
`presets/mvam.toml`. Unset is None, so 0 always means zero. What is unset is resolved in this order: the overlays
`[[when]]` of the file that match the run, the literal value where `reading` is `literal`, the column of the preset, the
default of the config.

Standard library only: a wrong parameter is refused before torch is imported.
"""

from __future__ import annotations

import difflib
import html
import importlib
import math
import re
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path
from typing import Any

Rule = tuple | set | frozenset

PRESETS = Path(__file__).parent / "presets"

# Settings that cannot change the numbers of a run, with the reason. All others are part of its identity.
OUTSIDE_IDENTITY = {
    "data_root": "where the data lie; what they are is in the digest of the data",
    "cache": "where features are kept; what they are is in the digest of the features",
    "out": "where the run is written",
    "resume": "what happens to an earlier run of the same folder",
    "threads": "speed alone",
    "workers": "processes that read the data in the same order",
    "checkpoint_steps": "how often a run is saved, which resumes with the same numbers",
}

_TYPES = {"int": int, "float": float, "str": str, "bool": bool}
_PLAIN = (int, float, str, list, dict, type(None))  # what papermill can inject (a bool is an int)
_IPYTHON = {"In", "Out"}
_DECLARED = "_finematch_declared"  # kept in the notebook's namespace, so a restarted kernel starts afresh
_ACCEPTED = "_finematch_accepted"
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
        """A copy with `changes`; raises ParameterError as `parameters` does."""
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


def parameters(namespace: dict[str, Any], /, **rules: Rule) -> Params:
    """Collects and checks the parameters of a notebook; call it in the third cell.

    Args:
        namespace: the notebook's `globals()`; its `__annotations__` are the declaration.
        **rules: by parameter, `(low, high)` for a closed numeric range or a set of choices; with None in either, the
            parameter may be unset.

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
    else:  # what the page has bound to a parameter's name since, an import say, is no parameter
        values |= {n: was for n, was in namespace[_ACCEPTED].items() if not isinstance(values.get(n), _PLAIN)}
    accepted = Params(values, declared, rules)
    namespace[_DECLARED], namespace[_ACCEPTED] = declared, accepted.as_dict()
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
    bare = _without_none(rule)
    if isinstance(bare, (set, frozenset)) and (bare or rule):
        return
    if isinstance(bare, tuple) and len(bare) == 2 and declared[name] in (int, float) and bare[0] <= bare[1]:
        return
    raise ParameterError(f"the rule {name}={rule!r} is neither (low, high) for a number nor a set of choices")


def _accept(name: str, value: Any, kind: type, rule: Rule | None) -> Any:
    """The value as `kind`, within `rule`; raises ParameterError naming `name`."""
    if rule and None in rule:
        if value is None:
            return None
        rule = _without_none(rule) or None
    if kind is tuple:
        return _numbers(name, value)
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


def _without_none(rule: Rule) -> Rule:
    return type(rule)(one for one in rule if one is not None)


def _numbers(name: str, value: Any) -> tuple:
    """A tuple of numbers; in a notebook they are written with commas, "1.0, 0.5, 0.25"."""
    parts = (
        [part.strip() for part in value.split(",") if part.strip()] if isinstance(value, str) else value or ()
    )
    if isinstance(value, str) and not all(map(_NUMBER.fullmatch, parts)):
        raise ParameterError(f"{name!r} must be numbers with commas between them, not {value!r}")
    found = [
        (int(part) if part.isdigit() else float(part)) if isinstance(value, str) else part for part in parts
    ]
    if any(type(one) not in (int, float) or not math.isfinite(one) for one in found):
        raise ParameterError(f"{name!r} must be finite numbers, not {value!r}")
    return tuple(found)


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


# ------------------------------------------------------------------------------ settings of a model
def setting(
    default: Any,
    rule: Rule | None = None,
    help: str = "",
    *,
    register: str = "",
    literal: Any = None,
    says: str = "",
) -> Any:
    """A field of a `Config`: its default, its closed range (or its choices), and what it is.

    Args:
        register, literal, says: of a setting that is a reading of the paper as well, see `switch`.
    """
    rule = frozenset(rule) if isinstance(rule, set) else rule
    about = {"rule": rule, "help": help, "register": register, "literal": literal, "says": says}
    return field(default=default, metadata=about)


def switch(register: str, *choices: Any, literal: Any = None, says: str = "", help: str = "") -> Any:
    """A field of a `Config` that is a reading of the paper. The first choice is the default.

    Args:
        register: the number of the reading in the table of the method's lesson.
        literal: the reading that is the paper's text; None where that is the default.
        says: what the paper says.
    """
    rule = None if set(choices) == {True, False} else frozenset(choices)
    about = {"rule": rule, "help": help, "register": register, "says": says, "choices": choices}
    return field(default=choices[0], metadata=about | {"literal": choices[0] if literal is None else literal})


@dataclass(frozen=True)
class Config:
    """Settings of a model, checked when it is made.

    Raises:
        ValueError: a wrong type, a value out of range or no choice; the message names all three.
    """

    def __post_init__(self):
        for one in fields(self):
            value = _field_value(one, getattr(self, one.name))
            object.__setattr__(self, one.name, value)

    @classmethod
    def of(cls, values: Mapping[str, Any] | Settings, **changes: Any) -> Any:
        """The config whose fields are those of `values` (of a run, or of its metrics file) that bear its names."""
        known = values.as_dict() if isinstance(values, Settings) else values
        return cls(**({one.name: known[one.name] for one in fields(cls) if one.name in known} | changes))

    @classmethod
    def literal(cls) -> dict[str, Any]:
        """The value of each reading that is the paper's text."""
        return {
            one.name: one.metadata["literal"]
            for one in fields(cls)
            if one.metadata.get("literal") is not None
        }

    @classmethod
    def readings(cls) -> list[tuple[str, str, tuple, Any, Any, str]]:
        """All readings: register, argument, choices (or the range), default, literal value, what the paper says."""
        rows = []
        for one in fields(cls):
            about = one.metadata
            if about.get("register"):
                choices = about.get("choices") or tuple(map(_kind(one), about["rule"] or ()))
                literal = one.default if about["literal"] is None else about["literal"]
                rows.append((about["register"], one.name, choices, one.default, literal, about["says"]))
        return rows


def _field_value(one: Any, value: Any) -> Any:
    """The value of a dataclass field, of its type and within its rule."""
    name, kind, rule = one.name, _kind(one), one.metadata.get("rule")
    if isinstance(rule, (set, frozenset)) and value not in rule:
        raise ValueError(
            f"{name} is {value!r}; use {_words(map(repr, one.metadata.get('choices') or _sorted(rule)))}"
        )
    if kind is float and isinstance(value, (int, float)) and type(value) is not bool:
        value = float(value)
    if kind is tuple:
        return _numbers(name, value)
    if type(value) is not kind:
        raise ValueError(f"{name} is {value!r}; use {'a' if kind is not int else 'an'} {kind.__name__}")
    if isinstance(rule, tuple) and not rule[0] <= value <= rule[1]:
        raise ValueError(f"{name} = {value}: must lie in [{rule[0]}, {rule[1]}]")
    return value


def _kind(one: Any) -> type:
    kinds = {**_TYPES, "tuple": tuple}
    return kinds[one.type if isinstance(one.type, str) else one.type.__name__]


def _sorted(rule: Iterable[Any]) -> list[Any]:
    return sorted(rule, key=lambda choice: (type(choice).__name__, choice))


# ------------------------------------------------------------------------------ settings of a run
@dataclass(frozen=True)
class Declared:
    """One parameter of a training page, from the file of its presets or from a field of its model's config."""

    name: str
    kind: type
    default: Any = None
    presets: Mapping[str, Any] = field(default_factory=dict)
    rule: Rule | None = None
    help: str = ""
    register: str = ""
    literal: Any = None
    choices: tuple = ()
    path: bool = False
    of_config: bool = False

    @property
    def page_default(self) -> Any:
        """What stands in the parameters cell: None for everything that a preset or a config fills in."""
        return None if self.presets or self.of_config else self.default

    @property
    def line(self) -> str:
        """The line of the parameters cell, with its generated comment."""
        kind = "str" if self.kind is tuple else self.kind.__name__
        default = self.page_default
        written = f'"{default}"' if isinstance(default, str) else repr(default)
        return f"{self.name}: {kind} = {written}  # {self.comment}"

    @property
    def comment(self) -> str:
        """Help, choices or range, what the presets give, the reading's number in its register."""
        choices = "" if self.kind is bool else " | ".join(map(_said, self.choices))
        parts = [self.help + (f": {choices}" if choices else "")]
        of_preset = list(dict.fromkeys(map(_said, self.presets.values())))
        if len(of_preset) > 1:
            parts.append(", ".join(f"{name} {_said(value)}" for name, value in self.presets.items()))
        elif of_preset or self.of_config:
            parts.append(f"default {of_preset[0] if of_preset else _said(self.default)}")
        if self.literal is not None and self.literal != self.presets.get("paper", self.default):
            parts.append(f"literal {_said(self.literal)}")
        return "; ".join(parts) + (f" ({self.register})" if self.register else "")

    def accept(self, value: Any) -> Any:
        """The value, of its type and within its rule; ParameterError if it is neither."""
        if value is None and self.page_default is None:
            return None
        return _accept(self.name, value, self.kind, self.rule)


def _said(value: Any) -> str:
    if isinstance(value, (tuple, list)):
        return ", ".join(map(str, value)) or "none"
    return f"{value:g}" if isinstance(value, float) else str(value) or "empty"


@cache
def _file(method: str) -> dict[str, Any]:
    path = PRESETS / f"{method}.toml"
    if not path.is_file():
        known = [one.stem for one in sorted(PRESETS.glob("*.toml"))]
        raise ParameterError(f"no presets for {method!r}; there are {_words(known)}")
    return tomllib.loads(path.read_text(encoding="utf-8"))


@cache
def declared(method: str) -> dict[str, Declared]:
    """Every parameter of the method's training page by name."""
    file, found = _file(method), {}
    for name, one in file["settings"].items():
        found[name] = _from_toml(name, one)
    for where in file.get("configs", ()):
        module, _, name = where.partition(":")
        for one in fields(getattr(importlib.import_module(module), name)):
            about, presets = one.metadata, found[one.name].presets if one.name in found else {}
            found[one.name] = Declared(
                one.name, _kind(one), one.default, presets, about.get("rule"), about.get("help", ""),
                about.get("register", ""), about.get("literal"), _choices(about), of_config=True,
            )  # fmt: skip
    return found


def _choices(about: Mapping[str, Any]) -> tuple:
    """The choices of a field in the order of their declaration (those of a set sorted)."""
    return about.get("choices") or tuple(
        _sorted(about["rule"]) if isinstance(about.get("rule"), frozenset) else ()
    )


def preset(method: str, column: str) -> dict[str, Any]:
    """What a preset of the method gives: `tiny`, `photos` or `paper`."""
    return {name: one.presets[column] for name, one in declared(method).items() if one.presets}


def _from_toml(name: str, one: Mapping[str, Any]) -> Declared:
    presets = {scale: one[scale] for scale in ("tiny", "photos", "paper") if scale in one}
    presets = {scale: tuple(value) if isinstance(value, list) else value for scale, value in presets.items()}
    default = one.get("default")
    sample = default if default is not None else next(iter(presets.values()), "")
    rule = tuple(one["range"]) if "range" in one else frozenset(one["choices"]) if "choices" in one else None
    return Declared(
        name, type(sample), default, presets, rule, one.get("help", ""), one.get("register", ""), one.get("literal"),
        tuple(one.get("choices", ())), one.get("path", False),
    )  # fmt: skip


class Settings:
    """All settings of a run, resolved: frozen, read as attributes.

    Attributes:
        method, numerics: whose they are, and the version of its arithmetic.
        preset, reading: the column that filled in what was unset, and `default` or `literal`.
        given: what was set explicitly.
        changed: what differs from the preset, with the preset's value.
    """

    __slots__ = ("_values", "given", "method", "numerics", "preset")

    def __init__(self, method: str, given: Mapping[str, Any]):
        """Checks and resolves `given`; raises ParameterError listing everything wrong."""
        known, problems, accepted = declared(method), [], {}
        for name, value in given.items():
            try:
                if name not in known:
                    raise ParameterError(_unknown(name, known))
                accepted[name] = known[name].accept(value)
            except ParameterError as error:
                problems.append(str(error))
        if problems:
            raise ParameterError("\n".join([*problems, f"Declared parameters: {_listing_of(known)}"]))
        given = {name: value for name, value in accepted.items() if value != known[name].page_default
                 or type(value) is not type(known[name].page_default)}  # fmt: skip
        values, preset = _resolved(method, given)
        content = {"method": method, "given": given, "preset": preset, "numerics": _file(method)["numerics"]}
        for slot, one in (content | {"_values": values}).items():
            object.__setattr__(self, slot, one)

    def as_dict(self) -> dict[str, Any]:
        """All settings by name, ready for JSON."""
        return dict(self._values)

    def replace(self, **changes: Any) -> Settings:
        """The settings of the same parameters with `changes`; None makes one unset again."""
        return Settings(self.method, {**self.given, **changes})

    @property
    def changed(self) -> dict[str, Any]:
        base = Settings(self.method, {k: v for k, v in self.given.items() if k in ("dataset", "scale")})
        return {
            name: base._values[name] for name, value in self._values.items() if value != base._values[name]
        }

    def identity(self) -> dict[str, Any]:
        """The settings that can change the numbers of the run: all but `OUTSIDE_IDENTITY`."""
        return {name: value for name, value in self._values.items() if name not in OUTSIDE_IDENTITY}

    def paths(self) -> dict[str, str]:
        """The parameters that may name a file or a folder (or a model of a hub), without those that are empty."""
        known = declared(self.method)
        return {name: value for name, value in self._values.items() if known[name].path and value}

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        if name not in self._values:
            raise AttributeError(_unknown(name, self._values))
        return self._values[name]

    def __setattr__(self, name: str, value: Any) -> None:
        raise AttributeError(f"settings are frozen: use s.replace({name}=...) for a changed copy")

    def __dir__(self) -> Iterable[str]:
        return [*object.__dir__(self), *self._values]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Settings) and (self.method, self._values) == (other.method, other._values)

    def __hash__(self) -> int:
        return hash((self.method, *map(str, self._values.items())))

    def __reduce__(self):
        return Settings, (self.method, self.given)

    def _head(self) -> str:
        changed = self.changed
        differs = ", ".join(f"{n} = {self._values[n]!r} ({was!r})" for n, was in changed.items()) or "nothing"
        reading = self._values["reading"]
        return f"{self.method}, preset {self.preset}, reading {reading}; other than the preset: {differs}"

    def __repr__(self) -> str:
        changed = self.changed
        lines = (f"{'*' if n in changed else ' '} {n} = {value!r}" for n, value in self._values.items())
        return "\n".join([self._head(), *lines])

    def _repr_html_(self) -> str:
        changed, known = self.changed, declared(self.method)
        rows = "".join(
            f"<tr><td>{'*' if name in changed else ''}</td><td>{name}</td><td>{html.escape(repr(value))}</td>"
            f"<td>{html.escape(repr(changed[name])) if name in changed else ''}</td>"
            f"<td style='text-align:left'>{html.escape(known[name].help)}</td></tr>"
            for name, value in self._values.items()
        )
        head = "<tr><th></th><th>setting</th><th>value</th><th>preset's</th><th>meaning</th></tr>"
        table = f"<details><summary>all settings</summary><table>{head}{rows}</table></details>"
        return f"<p>{html.escape(self._head())}</p>{table}"


def _resolved(method: str, given: Mapping[str, Any]) -> tuple[dict[str, Any], str]:
    """All values by name, and the column that filled in what is unset."""
    known, file = declared(method), _file(method)
    facts = {name: one.page_default for name, one in known.items()} | dict(given)
    preset = (
        "photos" if facts["scale"] == "tiny" and not facts["dataset"].startswith("scenes") else facts["scale"]
    )
    facts["reading"] = facts["reading"] or ("literal" if facts["scale"] == "paper" else "default")
    overlay: dict[str, Any] = {}
    for when in file.get("when", ()):
        if all(_matches(facts[name], wanted) for name, wanted in when.items() if name != "set"):
            overlay |= when["set"]
    values = {}
    for name, one in known.items():
        if facts[name] is not None:
            values[name] = facts[name]
        elif name in overlay:
            values[name] = one.accept(overlay[name])
        elif facts["reading"] == "literal" and one.literal is not None:
            values[name] = one.literal
        else:
            values[name] = one.presets.get(preset, one.default)
    return values, preset


def _matches(value: Any, wanted: Any) -> bool:
    return fnmatchcase(str(value), wanted) if isinstance(wanted, str) else value == wanted


def settings(namespace: dict[str, Any], method: str) -> Settings:
    """Checks the parameters of a training page and resolves them; call it in the third cell.

    Args:
        namespace: the notebook's `globals()`.
        method: whose presets: the name of a file in `presets`.

    Raises:
        ParameterError: as `parameters`; or the page declares other parameters than the file and the configs do.
    """
    known, page = declared(method), namespace.get(_DECLARED) or _declaration(namespace)
    if page.keys() != known.keys():
        missing, extra = sorted(known.keys() - page.keys()), sorted(page.keys() - known.keys())
        raise ParameterError(
            f"the page and presets/{method}.toml disagree: the page lacks {missing}, has besides {extra}"
        )
    rules = {name: _page_rule(one) for name, one in known.items()}
    p = parameters(namespace, **{name: rule for name, rule in rules.items() if rule})
    return Settings(method, p.as_dict())


def _page_rule(one: Declared) -> Rule | None:
    if one.page_default is not None:
        return one.rule
    return type(one.rule)([*one.rule, None]) if one.rule else {None}


def _listing_of(known: Mapping[str, Declared]) -> str:
    return _listing({name: str if one.kind is tuple else one.kind for name, one in known.items()})
