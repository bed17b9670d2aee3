"""Builds each notebook's .ipynb from its percent-format .py, the text that people edit.

    python notebooks/build.py           write the .ipynb files that differ
    python notebooks/build.py --check   write nothing; list the stale pairs, exit 1 if there are any

The .ipynb holds what the .py says and nothing that depends on the machine, the day or jupytext's version:
numbered cell ids, no outputs, the kernel `python3`, of the cells' metadata only `tags` and `jupyter`.

The parameters of a page that calls `settings(globals(), NAME)` are declared in `presets/NAME.toml` and in the configs
that it names. Their lines in the .py, type, default and comment, are written from there as well; their order is the page's.

A link whose text is a name in backquotes and whose target is a .py file gets the line where the name stands:
[`MVAM`](../../src/finematch/models/mvam.py) becomes ...mvam.py#L52. The pages of docs/ get theirs, too.
"""

import argparse
import ast
import re
import sys
from functools import cache
from pathlib import Path

import jupytext
import nbformat

from finematch.config import PRESETS, declared

KERNEL = {
    "kernelspec": {"display_name": "Python 3 (ipykernel)", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}
KEPT = ("tags", "jupyter")  # `jupyter` folds a cell's source: {"source_hidden": true}


def sources(folder: Path) -> list[Path]:
    """Every notebook's .py under `folder`, in order; this file is none."""
    return sorted(path for path in folder.rglob("*.py") if path.name != "build.py" and _visible(path, folder))


def build(source: Path) -> str:
    """The text of the .ipynb that belongs to `source`."""
    parsed = jupytext.reads(source.read_text(encoding="utf-8"), fmt="py:percent")
    cells = []
    for number, cell in enumerate(parsed.cells, start=1):
        new = {"code": nbformat.v4.new_code_cell, "markdown": nbformat.v4.new_markdown_cell}.get(
            cell.cell_type
        )
        if new is None:
            raise ValueError(f"{source}: cell {number} is a {cell.cell_type} cell: make it code or markdown")
        kept = {key: cell.metadata[key] for key in KEPT if key in cell.metadata}
        cells.append(new(cell.source, id=f"cell-{number:03d}", metadata=kept))
    notebook = nbformat.v4.new_notebook(cells=cells, metadata=KERNEL, nbformat_minor=5)
    nbformat.validate(notebook)
    return nbformat.writes(notebook, version=nbformat.NO_CONVERT) + "\n"


def generated(source: Path) -> str:
    """The text of `source`, the lines of its parameters as they are declared, its links at the lines of today."""
    text = linked(source.read_text(encoding="utf-8"), source)
    named = re.search(r'^s = settings\(globals\(\), "(\w+)"\)', text, re.MULTILINE)
    if named is None or not (PRESETS / f"{named[1]}.toml").is_file():
        return text
    known = declared(named[1])
    head, tag, rest = text.partition('# %% tags=["parameters"]\n')
    cell, mark, rest = rest.partition("\n# %%")
    names = re.findall(r"^(\w+): ", cell, re.MULTILINE)
    lines = [known[name].line if name in known else f"{name}: str  # is not declared" for name in names]
    return head + tag + "".join(f"{line}\n" for line in lines) + mark + rest


def linked(text: str, page: Path) -> str:
    """Give each link to a name in a .py file the line where the name is defined.

    Raises:
        ValueError: the file is not there, or has no such name.
    """

    def line(found: re.Match) -> str:
        name, target = found[1], found[2]
        file = (page.parent / target).resolve()
        if not file.is_file():
            raise ValueError(f"{page}: the link [`{name}`]({target}) leads to no file: mend its path")
        lines = definitions(file)
        if (short := name.removesuffix("()")) not in lines:
            raise ValueError(f"{page}: {target} defines no {short}: mend the link's text or its file")
        return f"[`{name}`]({target}#L{lines[short]})"

    return re.sub(r"\[`([\w.]+(?:\(\))?)`\]\(((?:\.\./)+[\w/]+\.py)(?:#L\d+)?\)", line, text)


@cache
def definitions(file: Path) -> dict[str, int]:
    """The line of each function, class, method ("Class.method") and constant of a .py file."""
    lines = {}
    for node in ast.parse(file.read_text(encoding="utf-8")).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            lines[node.name] = node.lineno
            inside = node.body if isinstance(node, ast.ClassDef) else ()
            lines |= {f"{node.name}.{one.name}": one.lineno for one in inside if isinstance(one, ast.FunctionDef)}
        elif isinstance(node, (ast.Assign, ast.AnnAssign)):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            lines |= {one.id: node.lineno for one in targets if isinstance(one, ast.Name)}
    return lines


def edited(source: Path) -> bool:
    """Whether the .ipynb has other text than its .py and is the newer of the two: it was edited where jupytext was not
    at work, and building it would lose that."""
    target = source.with_suffix(".ipynb")
    if not target.exists() or target.stat().st_mtime_ns <= source.stat().st_mtime_ns:
        return False
    theirs, ours = ([cell.source for cell in nbformat.reads(text, as_version=4).cells]
                    for text in (target.read_text(encoding="utf-8"), build(source)))  # fmt: skip
    return theirs != ours


def main(arguments: list[str] | None = None) -> int:
    """Returns the exit status: 1 for an .ipynb that was edited by itself, and with `--check` for a stale pair or an
    .ipynb that has no .py."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="only compare")
    parser.add_argument("--force", action="store_true", help="also over an .ipynb that was edited by itself")
    parser.add_argument("--folder", type=Path, default=Path(__file__).parent, help="where the notebooks are")
    options = parser.parse_args(arguments)

    stale, kept = [], []
    for source in sources(options.folder):
        if not (options.check or options.force) and edited(source):
            kept.append(source)
            print(f"{source.with_suffix('.ipynb')}: was edited, its .py was not, and it is left as it is. Take it over with "
                  f"`jupytext --update --to py:percent {source.with_suffix('.ipynb')}`, or drop its changes with --force")  # fmt: skip
            continue
        if (written := generated(source)) != source.read_text(encoding="utf-8"):
            stale.append(source)
            print(
                f"{source}: {'its parameters are not as declared: run make notebooks' if options.check else 'written'}"
            )
            if not options.check:
                source.write_text(written, encoding="utf-8", newline="\n")
        target, text = source.with_suffix(".ipynb"), build(source)
        if not target.exists() or target.read_text(encoding="utf-8") != text:
            stale.append(target)
            print(
                f"{target}: {'is not what its .py says: run make notebooks' if options.check else 'written'}"
            )
            if not options.check:
                target.write_text(text, encoding="utf-8", newline="\n")
    for page in sorted((options.folder.parent / "docs").glob("*.md")):
        text = page.read_text(encoding="utf-8")
        if (written := linked(text, page)) != text:
            stale.append(page)
            print(f"{page}: {'its links have old lines: run make notebooks' if options.check else 'written'}")
            if not options.check:
                page.write_text(written, encoding="utf-8", newline="\n")
    orphans = [
        path
        for path in sorted(options.folder.rglob("*.ipynb"))
        if _visible(path, options.folder) and not path.with_suffix(".py").exists()
    ]
    for path in orphans:
        print(f"{path}: has no .py: make one (jupytext --to py:percent) or delete it")
    return int(bool(kept) or (options.check and bool(stale or orphans)))


def _visible(path: Path, folder: Path) -> bool:
    """False inside .ipynb_checkpoints and the like."""
    return not any(part.startswith((".", "__")) for part in path.relative_to(folder).parts)


if __name__ == "__main__":
    sys.exit(main())
