"""What the pages of the lessons share: comparisons, tables, recorded shapes, an algorithm beside the code.

The modules beside this one belong to one lesson each: what its page draws, and set-ups that teach nothing.
"""

from __future__ import annotations

import ast
import inspect
import re
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from IPython.display import Markdown, display
from matplotlib import pyplot as plt
from torch import Tensor, nn

from finematch import figures
from finematch.config import root
from finematch.files import DataError
from finematch.grids import grid
from finematch.tables import READINGS, main_metrics, said, title_of, to_markdown


def close(a: Any, b: Any, tolerance: float = 1e-4) -> bool:
    """Equal in shape, and in value within a tolerance; numbers and lists are taken as tensors."""
    a, b = (torch.as_tensor(x, dtype=torch.float64) for x in (a, b))
    return a.shape == b.shape and bool(torch.allclose(a, b, rtol=0, atol=tolerance))


def full(parts: Tensor) -> Tensor:
    """The mask "b n" of parts "b n ..." without padding: all are real."""
    return torch.ones(parts.shape[:2], dtype=torch.bool)


def show(frame: pd.DataFrame, digits: int = 2) -> None:
    """A table on the page; its index becomes the first column."""
    display(Markdown(to_markdown(frame.reset_index(), digits=digits)))


# ------------------------------------------------------------------------------------------- shapes
def shapes(model: nn.Module, run: Callable[[], Any], letters: Mapping[int, str]) -> dict[str, str]:
    """The shape of what each part of a model returns, with letters for sizes: {"decoder": "b c h w"}.

    A part that returns several tensors gives one entry each: "locator.boxes", "tower.0". What `run` itself returns
    stands under "", or under the names of its parts ("image.vector" for a dictionary with `image`).

    Args:
        run: calls the model on a small batch.
        letters: size → letter, {2: "b", 7: "n"}; sizes that are all different tell the axes apart. Others stay numbers.
    """
    found: dict[str, str] = {}

    def record(name: str, value: Any) -> None:
        for key, one in _tensors(name, value):
            found[key] = " ".join(letters.get(size, str(size)) for size in one.shape) or "1"

    hooks = [part.register_forward_hook(lambda _, __, out, name=name: record(name, out))
             for name, part in model.named_modules() if name]  # fmt: skip
    try:
        with torch.no_grad():
            record("", run())
    finally:
        for hook in hooks:
            hook.remove()
    return found


def _tensors(name: str, value: Any) -> Iterator[tuple[str, Tensor]]:
    """The tensors in a value of a model, each with its dotted name."""
    if isinstance(value, Tensor):
        yield name, value
        return
    if is_dataclass(value):
        parts = {field.name: getattr(value, field.name) for field in fields(value)}
    elif isinstance(value, Mapping):
        parts = dict(value)
    elif isinstance(value, (tuple, list)):
        parts = getattr(value, "_asdict", lambda: dict(enumerate(value)))()
    else:
        return
    for key, part in parts.items():
        yield from _tensors(f"{name}.{key}" if name else str(key), part)


# ------------------------------------------------------------------------------------------- algorithms
def beside(lines: Sequence[tuple[str, Callable | type, str, str]]) -> Markdown:
    """A table for the page: lines of a paper's algorithm beside the library's statements that do them.

    Args:
        lines: (the paper's line, a function or class of the library, text that stands in exactly one of its statements,
            readings and departures at this line, or "").

    Raises:
        ValueError: no statement of the function, or more than one, has the text.
    """
    rows = [(paper, *_statement(where, text), note) for paper, where, text, note in lines]
    frame = pd.DataFrame(rows, columns=["the paper", "the library", "where", "readings"])
    return Markdown(to_markdown(frame))


def _statement(where: Callable | type, text: str) -> tuple[str, str]:
    """The innermost statement of a function that holds `text`, as Markdown, and a link to its line."""
    source, first = inspect.getsourcelines(inspect.unwrap(where))
    source = textwrap.dedent("".join(source))
    flat = {}
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.stmt) and not isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            written = ast.get_source_segment(source, node)
            if isinstance(node, (ast.If, ast.For, ast.With, ast.While)):
                # its head alone: what is inside are statements of their own
                written = re.split(r":[ \t]*(?:#.*)?\n", written, maxsplit=1)[0]
            flat[node.lineno] = " ".join(written.split())
    found = {line: code for line, code in flat.items() if text in code}
    if len(found) != 1:
        raise ValueError(
            f"{where.__qualname__} has {len(found)} statements with {text!r}: name one that it has once"
        )
    ((line, code),) = found.items()
    file = Path(inspect.getsourcefile(inspect.unwrap(where)))
    link = f"../../src/{Path(*file.parts[file.parts.index('finematch') :]).as_posix()}#L{first + line - 1}"
    return f"`{code}`", f"[`{where.__qualname__}`]({link})"


# ------------------------------------------------------------------------------------------- what came out
def came_out(method: str, dataset: str = "scenes") -> Markdown:
    """The claims of a method's papers, as the published tables judge them: a line a claim, both readings side by side.

    A line has the metric (the grid's first, or where the claim is not about it the claim's own), the difference of the
    two rows, its interval, and the seeds of the two rows.
    """
    lines = []
    for file in sorted((root() / "figures").glob(f"{method}_*.{dataset}.*.claims.csv")):
        one = grid(file.name.split(".")[0])
        link = f"[{one.title}](../../figures/{file.name.replace('.claims.csv', '.md')})"
        claims = pd.read_csv(file, keep_default_na=False, na_values={"lower": [""]})
        for claim, of in claims.groupby("claim", sort=False):
            measured = list(dict.fromkeys(of["metric"]))
            metric = one.headline[0] if one.headline[0] in measured else main_metrics(one, measured)[0]
            of = of[of["metric"] == metric]
            found = {name: said(c) for c in of.to_dict("records")
                    for name in (READINGS if c["reading"] == "both" else (c["reading"],))}  # fmt: skip
            lines.append(
                {"claim": claim, "metric": title_of(one, metric)}
                | {name: found.get(name, "not run") for name in READINGS}
                | {"table": link}
            )
    if not lines:
        return Markdown(
            "The folder `figures` with the tables is not here: RESULTS.md of the repository has them."
        )
    return Markdown(to_markdown(pd.DataFrame(lines)))


# ------------------------------------------------------------------------------------------- an image of your own
def look(method: str, image: Any, sentence: str) -> None:
    """Score a sentence against an image by the newest trained run of a method, and draw where the model looked.

    Without a finished run the page says how one is made.

    Args:
        image: a file, or an image of Pillow.
    """
    from finematch.explore import match
    from finematch.runs import open_run

    try:
        run = open_run("latest", method=method)
    except DataError as error:
        print(f"{error}\nTo make one: open {method}/2_train and run it, or `make grid`.")
        return
    print(f"{run.method}, the run {run.folder.name}")
    figures.looks(image, match(run, image, sentence))
    plt.show()
