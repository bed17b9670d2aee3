"""What the papers' running text says, recomputed from the papers' own tables; where a paper contradicts itself.

`published_text.csv` has a line per statement: `register` (the id of a contradiction, else empty), `paper`, `where`
(section, or the table whose cells contradict each other), `says` (in our words), `stated`, `recomputed`. A recipe reads
cells of `published.csv`:

    value: table | row | columns          mean of the cells
    sum: table | row | columns            their sum
    gain: table | row | over | columns    row minus the best of the rows `over`, mean over the columns
    percent: ...                          the same relative to it, in per cent
    least: ...                            the same, the smallest over the columns
    wins: ...                             in how many columns the row is above all of `over`
    lowest: ...                           in how many it is below all of them
    ties: ...                             in how many it equals one of them
    median: table | row | columns         the least median rank that a recall at 1 (per cent) allows

Tables, rows and columns are lists with `;`, where `*` stands for anything and `!` takes names away. `stated` is a
number as it is printed, a comparison (`> 3`), `all`, `most` or `not all` of the columns, or a recipe for a second
number of the tables; it is empty where a number cannot be checked.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from decimal import Decimal
from pathlib import Path

import pandas as pd

from finematch.files import DataError
from finematch.tables import PUBLISHED, published

STATED = PUBLISHED.with_name("published_text.csv")
SYMBOLS = PUBLISHED.with_name("published_symbols.csv")
COLUMNS = ("register", "paper", "where", "says", "stated", "recomputed")
AGREES, CUT, DIFFERS, OPEN = VERDICTS = ("agrees", "agrees if cut off", "differs", "cannot be checked")
NUMBER = re.compile(r"-?\d+(\.\d+)?(e\d+)?")
COMPARED = re.compile(r"(>=|<=|>|<) *(.+)")


def read(path: str | Path = STATED) -> pd.DataFrame:
    """The statements, recomputed: `COLUMNS` with both numbers as text, and `verdict`, one of `VERDICTS`.

    Raises:
        DataError: another header; a recipe that cannot be read or finds no cell.
    """
    frame = pd.read_csv(path, dtype=str, keep_default_na=False)
    if tuple(frame.columns) != COLUMNS:
        raise DataError(path, "the header", f"is {','.join(frame.columns)}", f"Write {','.join(COLUMNS)}")
    lines = []
    for number, line in enumerate(frame.to_dict("records"), start=2):
        try:
            found = evaluate(line["paper"], line["recomputed"])
            stated, verdict = compare(line["paper"], line["stated"], found)
        except (ValueError, DataError) as error:
            raise DataError(path, f"line {number}", f"cannot be recomputed: {error}", "Correct it") from error
        lines.append(line | {"stated": stated, "recomputed": said(found), "verdict": verdict})
    return pd.DataFrame(lines)


def symbols(path: str | Path = SYMBOLS) -> pd.DataFrame:
    """SLAN's Table 1: `paper, table, symbol, dimensions, meaning`."""
    return pd.read_csv(path, dtype=str, keep_default_na=False)


def word_weights() -> pd.DataFrame:
    """HSLM's Figure 3, a line per caption: each word with its weight before and after self-attention."""
    frame = published("HSLM", "Figure 3")
    parts = frame["row"].str.rsplit(" ", n=1, expand=True)
    lines = []
    for caption, of in frame.assign(caption=parts[0], when=parts[1]).groupby("caption", sort=False):
        wide = of.pivot(index="column", columns="when", values="value").loc[list(dict.fromkeys(of["column"]))]
        said = [
            f"{word.partition(' ')[2]} {line['before']:g} → {line['after']:g}"
            for word, line in wide.iterrows()
        ]
        lines.append(
            {"caption": caption, "weight of each word, before → after self-attention": ", ".join(said)}
        )
    return pd.DataFrame(lines)


def evaluate(paper: str, recipe: str) -> float | tuple[int, int]:
    """The number that a recipe gives, or how many of how many columns.

    Raises:
        ValueError: the recipe cannot be read, or finds no cell.
    """
    if NUMBER.fullmatch(recipe):
        return float(recipe)
    how, _, rest = recipe.partition(": ")
    tables, row, *parts = (part.strip() for part in rest.split(" | "))
    over, columns = parts if len(parts) == 2 else ("", *parts)
    pairs, cells = [], []  # a cell and its rivals in the same column
    for table in (part.strip() for part in tables.split(";")):
        frame = published(paper, table)
        own = set(chosen(row, frame["row"]))
        rivals = set(chosen(over, frame["row"])) - own
        for column in chosen(columns, frame["column"]):
            of = frame[frame["column"] == column]
            mine = of[of["row"].isin(own)]["value"].tolist()
            others = of[of["row"].isin(rivals)]["value"].tolist()
            cells += mine
            pairs += [(mine[0], others)] if len(mine) == 1 and others else []
    if not cells or (over and not pairs):
        raise ValueError(f"{recipe!r} finds no cell of {paper}")
    best = [(mine, max(others)) for mine, others in pairs]
    match how:
        case "value":
            return sum(cells) / len(cells)
        case "sum":
            return sum(cells)
        case "median":
            (recall,) = cells
            return 1.0 if recall > 50 else 1.5 if recall == 50 else 2.0
        case "gain":
            return sum(mine - other for mine, other in best) / len(best)
        case "percent":
            return sum(100 * (mine / other - 1) for mine, other in best) / len(best)
        case "least":
            return min(mine - other for mine, other in best)
        case "wins":
            return sum(mine > other for mine, other in best), len(best)
        case "lowest":
            return sum(mine < min(others) for mine, others in pairs), len(pairs)
        case "ties":
            return sum(mine in others for mine, others in pairs), len(pairs)
    raise ValueError(f"{recipe!r} begins with no known word")


def chosen(patterns: str, names: Iterable[str]) -> list[str]:
    """The names that a list of patterns means, in the order of the names."""
    names, found = list(dict.fromkeys(names)), set()
    for pattern in filter(None, (part.strip() for part in patterns.split(";"))):
        expression = re.escape(pattern.removeprefix("!")).replace(r"\*", ".*")
        hit = {name for name in names if re.fullmatch(expression, name)}
        found = found - hit if pattern.startswith("!") else found | hit
    return [name for name in names if name in found]


def compare(paper: str, stated: str, found: float | tuple[int, int]) -> tuple[str, str]:
    """The stated value as text, and whether the recomputed one agrees with it: within half a unit of its last digit."""
    if not stated:
        return "", OPEN
    if isinstance(found, tuple):
        wins, of = found
        agrees = {"all": wins == of, "most": 2 * wins > of, "not all": wins < of}
        if stated not in agrees:
            raise ValueError(f"{stated!r} says nothing about {said(found)}: write {', '.join(agrees)}")
        return stated, AGREES if agrees[stated] else DIFFERS
    if compared := COMPARED.fullmatch(stated):
        sign, other = compared[1], evaluate(paper, compared[2])
        slack = 1e-9 if "=" in sign else -1e-9  # differences of printed decimals are not exact
        agrees = found > other - slack if sign[0] == ">" else found < other + slack
        return f"{sign} {said(other)}", AGREES if agrees else DIFFERS
    if not NUMBER.fullmatch(stated):
        other = evaluate(paper, stated)
        return said(other), AGREES if abs(found - other) < 1e-9 else DIFFERS
    unit = 10.0 ** Decimal(stated).as_tuple().exponent
    shown = stated if "e" not in stated else f"{float(stated):,.0f}"
    off = found - float(stated)
    if abs(off) <= unit / 2 + 1e-9:
        return shown, AGREES
    return shown, CUT if 0 < off < unit else DIFFERS


def said(found: float | tuple[int, int]) -> str:
    """A recomputed value as it is shown: two decimals, none of large numbers, "4 of 6"."""
    if isinstance(found, tuple):
        return f"{found[0]} of {found[1]}"
    return f"{found:,.0f}" if abs(found) >= 1000 else f"{round(found, 6):.3f}".rstrip("0").rstrip(".")


def in_text(frame: pd.DataFrame) -> pd.DataFrame:
    """The statements of running text, for a table: where, what, stated, recomputed, whether they agree."""
    of = frame[~frame["where"].str.startswith("Table")]
    return of[["paper", "where", "says", "stated", "recomputed", "verdict"]].rename(
        columns={"where": "section", "verdict": "agrees"}
    )


def contradictions(frame: pd.DataFrame) -> pd.DataFrame:
    """The lines with a register id, ordered by it, the two numbers side by side."""
    of = frame[frame["register"] != ""].sort_values("register", kind="stable")
    return of[["register", "paper", "where", "says", "stated", "recomputed", "verdict"]].rename(
        columns={"register": "id", "stated": "one number", "recomputed": "the other", "verdict": "they"}
    )
