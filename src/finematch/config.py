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
import os
import re
import tomllib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path
from typing import Any

Rule = tuple | set

PRESETS = Path(__file__).parent / "presets"

# Settings that cannot change the numbers of a run, with the reason. All others are part of its identity.
OUTSIDE_IDENTITY = {
    "data_root": "where the data lie; what they are is in the digest of the data",
    "cache": "where features are kept; what they are is in the digest of the features",
    "out": "where the run is written",
    "figures": "where its figures are written",
    "resume": "what happens to an earlier run of the same folder",
    "threads": "speed alone",
    "tracker": "where losses and metrics are shown while it trains",
    "activation_checkpointing": "memory and speed alone",
    "workers": "processes that read the data in the same order",
    "checkpoint_steps": "how often a run is saved, which resumes with the same numbers",
}

READINGS = ("default", "literal")  # of the papers: what works where the text does not, and the text

_TYPES = {"int": int, "float": float, "str": str, "bool": bool}
_PLAIN = (int, float, str, list, dict, type(None))  # what papermill can inject (a bool is an int)
_IPYTHON = {"In", "Out"}
_DECLARED = "_finematch_declared"  # kept in the notebook's namespace, so a restarted kernel starts afresh
_ACCEPTED = "_finematch_accepted"
_NUMBER = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?")


class ParameterError(ValueError):
    """A parameter that was refused. The message names it, what was declared and the closest match."""


@dataclass(frozen=True)
class Declared:
    """One parameter: of a page, of the file of a method's presets, or a field of its model's config.

    Attributes:
        presets: by preset, what fills it in. literal: what fills it in where the reading is literal.
        range: closed, of a number. choices: in the order of their declaration.
        register: number of the reading in the table of the method's lesson. says: what the paper says about it.
        path: it may name a file or a folder.
        unset: None is accepted, and is the page's default.
    """

    name: str
    kind: type
    default: Any = None
    presets: Mapping[str, Any] = field(default_factory=dict)
    range: tuple = ()
    choices: tuple = ()
    help: str = ""
    register: str = ""
    says: str = ""
    literal: Any = None
    path: bool = False
    unset: bool = False

    @property
    def page_default(self) -> Any:
        """What stands in the parameters cell: None for everything that a preset or a config fills in."""
        return None if self.unset else self.default

    @property
    def line(self) -> str:
        """The line of the parameters cell, with its generated comment."""
        kind = "str" if self.kind is tuple else self.kind.__name__
        default = self.page_default
        written = f'"{default}"' if isinstance(default, str) else repr(default)
        return f"{self.name}: {kind} = {written}  # {self.comment}"

    @property
    def comment(self) -> str:
        """Help, choices unless it names them all, what the presets give, the reading's number in its register."""
        listed = [] if self.kind is bool else [_said(choice) for choice in self.choices]
        named = all(re.search(rf"(?<!\w){re.escape(choice)}(?!\w)", self.help) for choice in listed)
        choices = "" if named else " | ".join(listed)
        parts = [self.help + (f": {choices}" if choices else "")]
        of_preset = list(dict.fromkeys(map(_said, self.presets.values())))
        if len(of_preset) > 1:
            parts.append(", ".join(f"{name} {_said(value)}" for name, value in self.presets.items()))
        elif self.unset and (of_preset or self.default is not None):
            parts.append(f"default {of_preset[0] if of_preset else _said(self.default)}")
        if self.literal is not None and self.literal != self.presets.get("paper", self.default):
            parts.append(f"literal {_said(self.literal)}")
        return "; ".join(parts) + (f" ({self.register})" if self.register else "")

    def accept(self, value: Any) -> Any:
        """The value, of its type, within its range and one of its choices.

        Of all conversions only three are made, all to a float: an int, NumPy's float, and a string that spells a
        number.

        Raises:
            ParameterError: It is none of this.
        """
        name, kind = self.name, self.kind
        if value is None and self.unset:
            return None
        if kind is tuple:
            return _numbers(name, value)
        if kind is float:
            if isinstance(value, str) and _NUMBER.fullmatch(value.strip()):
                value = float(value)
            elif type(value) is int:
                value = float(value) if abs(value) <= 2**1023 else math.inf
            elif isinstance(value, float):
                value = float(value)
        if kind is str and isinstance(value, str):
            value = _spelt_out(name, value)
        if self.choices and value not in self.choices:
            listed = _words(map(repr, self.choices))
            raise ParameterError(f"{name} is {value!r}; use {listed}{_closest(value, self.choices)}")
        if type(value) is not kind:
            hint = ""
            if kind is str and isinstance(value, (int, float)):
                hint = f" (papermill's -r {name} VALUE passes it as it is written)"
            raise ParameterError(
                f"{name!r} must be {kind.__name__}, not {type(value).__name__} {value!r}{hint}"
            )
        if kind is float and not math.isfinite(value):
            raise ParameterError(f"{name!r} must be finite, not {value}")
        if self.range and not self.range[0] <= value <= self.range[1]:
            raise ParameterError(f"{name} = {value}: must lie in [{self.range[0]}, {self.range[1]}]")
        return value


def _spelt_out(name: str, value: str) -> str:
    """A text with the user's folder for `~`, which a notebook has no shell to expand.

    Raises:
        ParameterError: What would name a folder `$HOME`, `~nobody` or ` data` in place of the one that is meant.
    """
    value = os.path.expanduser(value)
    if value != value.strip() or value.startswith(("~", "$")):
        raise ParameterError(
            f"{name} is {value!r}, taken as it stands: write it without blanks around, ~ or $"
        )
    return value


def _said(value: Any) -> str:
    if isinstance(value, (tuple, list)):
        return ", ".join(map(str, value)) or "none"
    return f"{value:g}" if isinstance(value, float) else str(value) or "empty"


class Params:
    """The accepted parameters: frozen, read as attributes.

    `p.views` reads one, `p.as_dict()` all of them in the order of their declaration, and
    `p.replace(views=8)` gives a changed copy held to the same types and rules.
    """

    __slots__ = ("_known", "_values")

    def __init__(self, values: Mapping[str, Any], known: Mapping[str, Declared]):
        """Checks `values` against `known`; raises ParameterError listing everything wrong."""
        missing = [f"{name!r} is declared but has no value" for name in known if name not in values]
        self._set(_known=known, _values=_accepted(values, known, missing))

    def _set(self, **slots: Any) -> None:
        for slot, content in slots.items():
            object.__setattr__(self, slot, content)

    def as_dict(self) -> dict[str, Any]:
        """All of them by name, as plain values (ready for JSON)."""
        return dict(self._values)

    def replace(self, **changes: Any) -> Params:
        """A copy with `changes`; raises ParameterError as `parameters` does."""
        return Params({**self._values, **changes}, self._known)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):  # an unset slot while copying or unpickling, or a protocol IPython looks for
            raise AttributeError(name)
        if name not in self._values:
            raise AttributeError(_unknown(name, self._values))
        return self._values[name]

    def __setattr__(self, name: str, value: Any) -> None:
        raise AttributeError(f"parameters are frozen: use .replace({name}=...) for a changed copy")

    def __delattr__(self, name: str) -> None:
        self.__setattr__(name, None)

    def __dir__(self) -> Iterable[str]:
        return [*object.__dir__(self), *self._values]

    def __eq__(self, other: object) -> bool:
        return type(other) is type(self) and self._values == other._values

    def __hash__(self) -> int:
        return hash(tuple(self._values.items()))

    def __reduce__(self):
        return Params, (self._values, self._known)

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

    Raises:
        ParameterError: unknown names, wrong types, values that are out of range, not finite or no choice.
    """
    kinds = _declaration(namespace)
    for name in rules:
        if name not in kinds:
            raise ParameterError(
                f"a rule for an {_unknown(name, kinds)}\nDeclared parameters: {_listing(kinds)} "
                "(after declaring another one, restart the kernel)"
            )
    known = {name: _ruled(name, kind, rules.get(name)) for name, kind in kinds.items()}
    return _take(namespace, kinds, lambda values: Params(values, known))


def _take(namespace: dict[str, Any], kinds: Mapping[str, type], check: Callable[[dict], Params]) -> Params:
    """What `check` makes of the page's values; the page's declaration and values are remembered in its namespace."""
    values = {name: namespace[name] for name in kinds if name in namespace}
    if _DECLARED not in namespace:
        values |= {
            name: value
            for name, value in namespace.items()
            if not name.startswith("_") and name not in _IPYTHON and isinstance(value, _PLAIN)
        }
    else:  # what the page has bound to a parameter's name since, an import say, is no parameter
        values |= {n: was for n, was in namespace[_ACCEPTED].items() if not isinstance(values.get(n), _PLAIN)}
    accepted = check(values)
    namespace[_DECLARED], namespace[_ACCEPTED] = kinds, values
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


def located(named: str | Path) -> str:
    """A file or folder by its place in the workbook, wherever the kernel was started; a hub's name as it is."""
    try:
        path = root() / named
    except FileNotFoundError:  # outside of the workbook
        return str(named)
    return str(path) if str(named) and path.exists() else str(named)


def _declaration(namespace: Mapping[str, Any]) -> dict[str, type]:
    """Declared names and types from the namespace's annotations, those of the first call where there was one."""
    if _DECLARED in namespace:
        return namespace[_DECLARED]
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


def _ruled(name: str, kind: type, rule: Rule | None) -> Declared:
    """A parameter with the rule that a page gives; refuses a rule that could never be applied."""
    bare, unset = [one for one in rule or () if one is not None], None in (rule or ())
    if rule is None or (unset and not bare):
        return Declared(name, kind, unset=unset)
    if isinstance(rule, set) and bare:
        return Declared(name, kind, choices=_sorted(bare), unset=unset)
    if isinstance(rule, tuple) and len(bare) == 2 and kind in (int, float) and bare[0] <= bare[1]:
        return Declared(name, kind, range=tuple(bare), unset=unset)
    raise ParameterError(f"the rule {name}={rule!r} is neither (low, high) for a number nor a set of choices")


def _accepted(values: Mapping[str, Any], known: Mapping[str, Declared], problems: Iterable[str] = ()) -> dict:
    """The values, accepted, in the order of `known`; ParameterError with all that is wrong, `problems` among it."""
    problems, accepted = [*(_unknown(name, known) for name in values if name not in known), *problems], {}
    for name in (name for name in known if name in values):
        try:
            accepted[name] = known[name].accept(values[name])
        except ParameterError as error:
            problems.append(str(error))
    if problems:
        kinds = {name: str if one.kind is tuple else one.kind for name, one in known.items()}
        raise ParameterError("\n".join([*problems, f"Declared parameters: {_listing(kinds)}"]))
    return accepted


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


def _sorted(choices: Iterable[Any]) -> tuple:
    return tuple(sorted(choices, key=lambda choice: (type(choice).__name__, choice)))


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
    choices = {"choices": _sorted(rule)} if isinstance(rule, set) else {"range": rule or ()}
    about = {"help": help, "register": register, "says": says, "literal": literal}
    return field(default=default, metadata={"declared": choices | about})


def switch(register: str, *choices: Any, literal: Any = None, says: str = "", help: str = "") -> Any:
    """A field of a `Config` that is a reading of the paper. The first choice is the default.

    Args:
        register: the number of the reading in the table of the method's lesson.
        literal: the reading that is the paper's text; None where that is the default.
        says: what the paper says.
    """
    literal = choices[0] if literal is None else literal
    about = {"choices": choices, "help": help, "register": register, "says": says, "literal": literal}
    return field(default=choices[0], metadata={"declared": about})


@dataclass(frozen=True)
class Config:
    """Settings of a model, checked when it is made.

    Raises:
        ParameterError: a wrong type, a value out of range or no choice; the message names all three.
    """

    def __post_init__(self):
        for name, one in self.declared().items():
            object.__setattr__(self, name, one.accept(getattr(self, name)))

    @classmethod
    def of(cls, values: Mapping[str, Any] | Settings, **changes: Any) -> Any:
        """The config whose fields are those of `values` (of a run, or of its metrics file) that bear its names."""
        known = values.as_dict() if isinstance(values, Settings) else values
        return cls(**({one.name: known[one.name] for one in fields(cls) if one.name in known} | changes))

    @classmethod
    def declared(cls) -> dict[str, Declared]:
        """Its fields by name."""
        kinds = {**_TYPES, "tuple": tuple}
        return {
            one.name: Declared(one.name, kinds[one.type], one.default, **one.metadata["declared"])
            for one in fields(cls)
        }

    @classmethod
    def literal(cls) -> dict[str, Any]:
        """The value of each reading that is the paper's text."""
        return {name: one.literal for name, one in cls.declared().items() if one.literal is not None}

    @classmethod
    def readings(cls) -> list[tuple[str, str, tuple, Any, Any, str]]:
        """All readings: register, argument, choices (or the range), default, literal value, what the paper says."""
        rows = []
        for one in cls.declared().values():
            if one.register:
                choices = one.choices or tuple(map(one.kind, one.range))
                literal = one.default if one.literal is None else one.literal
                rows.append((one.register, one.name, choices, one.default, literal, one.says))
        return rows


# ------------------------------------------------------------------------------ settings of a run
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
    file = _file(method)
    found = {name: _from_toml(name, one) for name, one in file["settings"].items()}
    for where in file.get("configs", ()):
        module, _, config = where.partition(":")
        for name, one in getattr(importlib.import_module(module), config).declared().items():
            presets = found[name].presets if name in found else {}
            found[name] = replace(one, presets=presets, unset=True)
    return found


def preset(method: str, column: str) -> dict[str, Any]:
    """What a preset of the method gives: `tiny`, `photos` or `paper`."""
    return {name: one.presets[column] for name, one in declared(method).items() if one.presets}


def _from_toml(name: str, one: Mapping[str, Any]) -> Declared:
    one = {key: tuple(value) if isinstance(value, list) else value for key, value in one.items()}
    presets = {scale: one.pop(scale) for scale in ("tiny", "photos", "paper") if scale in one}
    default = one.get("default")
    sample = default if default is not None else next(iter(presets.values()), "")
    return Declared(name, type(sample), presets=presets, unset=bool(presets) or default is None, **one)


class Settings(Params):
    """All settings of a run, resolved: frozen, read as attributes.

    Attributes:
        method, numerics: whose they are, and the version of its arithmetic.
        preset, reading: the column that filled in what was unset, and `default` or `literal`.
        given: what was set explicitly.
        changed: what differs from the preset, with the preset's value.
    """

    __slots__ = ("given", "method", "numerics", "preset")

    def __init__(self, method: str, given: Mapping[str, Any]):
        """Checks and resolves `given`; raises ParameterError listing everything wrong."""
        known = declared(method)
        accepted = _accepted(given, known)
        given = {name: accepted[name] for name in given if accepted[name] != known[name].page_default
                 or type(accepted[name]) is not type(known[name].page_default)}  # fmt: skip
        values, preset = _resolved(method, given)
        self._set(_known=known, _values=values, method=method, given=given, preset=preset,
                  numerics=numerics(method, values))  # fmt: skip

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
        return {name: value for name, value in self._values.items() if self._known[name].path and value}

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
        changed = self.changed
        rows = "".join(
            f"<tr><td>{'*' if name in changed else ''}</td><td>{name}</td><td>{html.escape(repr(value))}</td>"
            f"<td>{html.escape(repr(changed[name])) if name in changed else ''}</td>"
            f"<td style='text-align:left'>{html.escape(self._known[name].help)}</td></tr>"
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
    facts["reading"] = facts["reading"] or own_reading(facts["scale"])
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


def own_reading(scale: str) -> str:
    """The reading of a run at a scale that is given none."""
    return "literal" if scale == "paper" else "default"


def literal_switches(method: str) -> list[dict[str, str]]:
    """What `reading=literal` sets at the small scales, one line per setting: `setting`, `register`, its default at
    `tiny` and on `photos`, the `literal` value, `meaning`. Where default and literal agree, nothing is listed."""
    lines = []
    default, photos, literal = (
        Settings(method, {"dataset": dataset, "scale": "tiny", "reading": reading}).as_dict()
        for dataset, reading in (("scenes", "default"), ("flickr8k", "default"), ("flickr8k", "literal"))
    )
    literals = Settings(method, {"dataset": "scenes", "scale": "tiny", "reading": "literal"}).as_dict()
    for name, one in declared(method).items():
        if name != "reading" and (default[name], photos[name]) != (literals[name], literal[name]):
            values = {"tiny": default, "photos": photos, "literal": literal}
            said = {column: _said(of[name]) for column, of in values.items()}
            lines.append({"setting": name, "register": one.register, **said, "meaning": one.help})
    return lines


def numerics(method: str, values: Mapping[str, Any]) -> int:
    """The version of the arithmetic of a run with these values: the method's, higher by one for each entry of
    `renumbered` in its presets that they match. So a change that reaches some runs alone leaves all others theirs."""
    steps = _file(method).get("renumbered", ())
    return _file(method)["numerics"] + sum(
        all(_matches(values.get(name), wanted) for name, wanted in step.items()) for step in steps
    )


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
    known, page = declared(method), _declaration(namespace)
    if page.keys() != known.keys():
        missing, extra = sorted(known.keys() - page.keys()), sorted(page.keys() - known.keys())
        raise ParameterError(
            f"the page and presets/{method}.toml disagree: the page lacks {missing}, has besides {extra}"
        )
    return _take(namespace, page, lambda values: Settings(method, values))
