"""Fine-grained image-text matching: MVAM, HSLM, FELGA and SLAN.

The names below are imported when they are first asked for, so that `import finematch` costs nothing.
"""

from importlib import import_module

_WHERE = {
    "MVAM": "finematch.models.mvam",
    "HSLM": "finematch.models.hslm",
    "FELGA": "finematch.models.felga",
    "SLAN": "finematch.models.slan.objective",
    "load": "finematch.data",
    "retrieval": "finematch.evaluation.retrieval",
    "open_run": "finematch.runs",
    "match": "finematch.explore",
}
__all__ = list(_WHERE)


def __getattr__(name: str):
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_WHERE[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_WHERE])
