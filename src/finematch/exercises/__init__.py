"""Exercises of the lessons, and checks that say what is wrong with an answer and never the answer.

    check("mvam.floor", floor)      # a line: right, or what is wrong

Three kinds. *compute*: a number, a list or a tensor that was worked out by hand. *change*: a prediction and what came
out when a switch was turned. *build*: a function, run beside the library's on random tensors. An answer of `...` is
none yet. A check never raises, whatever it is given, so that a page with open exercises runs to its end.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

METHODS = ("mvam", "hslm", "felga", "slan")
KINDS = ("compute", "change", "build")
OPEN = "no answer yet"
NOTHING = "your function returns nothing"


@dataclass(frozen=True)
class Exercise:
    """One exercise: its key ("mvam.floor"), its kind, and what says what is wrong ("" where nothing is)."""

    key: str
    kind: str
    wrong: Callable[..., str]


@dataclass(frozen=True)
class Verdict:
    """What a check says; it prints as a line."""

    key: str
    passed: bool
    message: str

    def __repr__(self) -> str:
        return f"✓ {self.key}: right" if self.passed else f"✗ {self.key}: {self.message}"


_EXERCISES: dict[str, Exercise] = {}


def exercise(key: str, kind: str) -> Callable[[Callable[..., str]], Callable[..., str]]:
    """Declare a check: a function of the answer that returns what is wrong with it, or ""."""
    if kind not in KINDS or key.partition(".")[0] not in METHODS or key in _EXERCISES:
        raise ValueError(f"{key!r}, {kind!r}: a key is <method>.<name> and free, a kind one of {KINDS}")

    def declare(wrong: Callable[..., str]) -> Callable[..., str]:
        _EXERCISES[key] = Exercise(key, kind, wrong)
        return wrong

    return declare


def exercises(method: str) -> dict[str, Exercise]:
    """The exercises of a lesson by key, in the order in which they are declared."""
    importlib.import_module(f"finematch.exercises.{method}")
    return {key: one for key, one in _EXERCISES.items() if key.startswith(f"{method}.")}


def check(key: str, *answer: Any) -> Verdict:
    """Whether an answer is right; it shows as a line, "✓ ..." or "✗ ..." and what is wrong.

    Raises:
        KeyError: There is no such exercise.
    """
    known = exercises(key.partition(".")[0]) if key.partition(".")[0] in METHODS else {}
    if key not in known:
        raise KeyError(f"{key!r} is no exercise; known: {', '.join(known) or 'none of that name'}")
    if not answer or any(one is ... or one is None for one in answer):
        return Verdict(key, False, OPEN)
    try:
        message = known[key].wrong(*answer)
    except Exception as error:
        message = f"checking your answer ended in {type(error).__name__}: {error}"
    return Verdict(key, not message, message)


# ------------------------------------------------------------------------------------------- what is compared
def random(*shape: int, seed: int = 0) -> Tensor:
    """Normal numbers, the same for a seed."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def number(answer: Any, right: float | int, *, within: float = 0.01, hints: Mapping | None = None) -> str:
    """What is wrong with a number: its type, or its size; of a known slip what was forgotten.

    Args:
        within: how far it may be away, as a share of the right one (of 1 where that is smaller).
        hints: by a wrong number what leads to it.
    """
    if answer is None:
        return NOTHING
    try:
        value = float(answer)
    except (TypeError, ValueError):
        return f"give a number, not {type(answer).__name__}"
    if not math.isfinite(value):
        return "the number is not finite"

    def near(other: float | int) -> bool:
        return abs(value - other) <= within * max(1.0, abs(other))

    if near(right):
        return ""
    for slip, hint in (hints or {}).items():
        if near(slip):
            return hint
    return "the number is too large" if value > right else "the number is too small"


def named_numbers(answer: Any, right: Mapping[str, float | int], **how: Any) -> str:
    """What is wrong with numbers by name, see `number`."""
    if not isinstance(answer, Mapping):
        return f"give a dict with the keys {', '.join(right)}, not {type(answer).__name__}"
    if lacking := [name for name in right if name not in answer]:
        return f"{lacking[0]!r} is missing"
    for name, value in right.items():
        if message := number(answer[name], value, **how):
            return f"{name}: {message}"
    return ""


def prediction(answer: Any, choices: Sequence[str]) -> str:
    """What is wrong with the form of a prediction, one of `choices`."""
    return "" if answer in choices else f"predict one of {', '.join(map(repr, choices))}"


def tensor(answer: Any, right: Tensor, *, slips: Mapping[str, Tensor] | None = None) -> str:
    """What is wrong with a tensor: its type, shape, values; of a known slip what was forgotten.

    Args:
        slips: by what to say, the tensor that the slip gives.
    """
    if isinstance(answer, (list, tuple, int, float)):
        answer = torch.as_tensor(answer)
    if answer is None:
        return NOTHING
    if not isinstance(answer, Tensor):
        return f"give a tensor, not {type(answer).__name__}"
    if answer.shape != right.shape:
        return f"the shape is {tuple(answer.shape)}, not {tuple(right.shape)}"
    value = answer.detach().to(right.dtype)
    if not torch.isfinite(value).all():
        return "not all values are finite"

    def near(other: Tensor) -> bool:
        return other.shape == value.shape and torch.allclose(value, other, rtol=1e-3, atol=1e-4)

    if near(right):
        return ""
    for hint, slip in (slips or {}).items():
        if near(slip):
            return hint
    wrong = int((~torch.isclose(value, right, rtol=1e-3, atol=1e-4)).sum())
    return f"the shape is right, {wrong} of {value.numel()} values are not"


def function(
    answer: Any, reference: Callable[..., Tensor], cases: Sequence[tuple], *,
    slips: Mapping[str, Callable[..., Tensor]] | None = None,
) -> str:  # fmt: skip
    """What is wrong with a function, beside the library's on the same arguments.

    Args:
        cases: arguments of each call; they are copied, so that an answer may change them.
        slips: by what to say, a function with that slip.
    """
    if not callable(answer):
        return f"give a function, not {type(answer).__name__}"
    for arguments in cases:
        given = [one.clone() if isinstance(one, Tensor) else one for one in arguments]
        wrong = {hint: slip(*arguments) for hint, slip in (slips or {}).items()}
        if message := tensor(answer(*given), reference(*arguments), slips=wrong):
            return message
    return ""
