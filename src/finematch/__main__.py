"""The command line: `python -m finematch <command>`; `--help` lists the commands.

A command imports what it needs when it runs, so that none waits for torch without need.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

READINGS = ("", "default", "literal")


def main(arguments: list[str] | None = None) -> int:
    """Returns the exit status; what a user did wrong is one line on stderr, not a traceback."""
    parser = argparse.ArgumentParser(
        prog="python -m finematch", description="Helpers around grids, runs and the cache."
    )
    commands = parser.add_subparsers(dest="command", required=True)

    stale = commands.add_parser(
        "stale", help="list finished runs whose parameters are not those of their grid's row"
    )
    stale.add_argument("grid", nargs="+", help="name of a grid")
    stale.add_argument("--dataset", default="scenes")
    stale.add_argument("--scale", default="tiny", help="tiny or paper")
    stale.add_argument("--reading", default="", choices=READINGS, help="default or literal; the scale's own")
    stale.add_argument("--smoke", action="store_true", help="of smoke runs")
    stale.set_defaults(run=_stale)

    data = commands.add_parser(
        "data", help="say what a data folder has: counts beside the published ones, tables that it allows"
    )
    data.add_argument("grid", nargs="?", help="name of a grid: what its rows read, alone")
    data.add_argument("--dataset", default="", help="this set alone; of a grid, scenes if not given")
    data.add_argument("--data-root", default="data", type=os.path.expanduser)
    data.add_argument("--scale", default="tiny", help="tiny or paper")
    data.add_argument("--proposals", default="", help="boxes of a detector, as of make grid")
    data.set_defaults(run=_data)

    _add_walk(commands.add_parser("walk", help="start every row of every grid at scale paper, on stand-ins"))
    _add_rehearse(
        commands.add_parser("rehearse", help="predict what a grid costs here: hours, memory, disk, batch")
    )
    handout = commands.add_parser("handout", help="write the lessons without solutions")
    handout.add_argument(
        "out", help="folder of the student pages; ending in .zip: with library, data and environment"
    )
    handout.add_argument("--data-root", default="data", type=os.path.expanduser)
    handout.set_defaults(run=_handout)
    slides = commands.add_parser("slides", help="write the lessons as slides that need no network")
    slides.add_argument("out", help="folder of the slides")
    slides.add_argument("--data-root", default="data", type=os.path.expanduser)
    slides.set_defaults(run=_slides)
    commands.add_parser("pages", help="rewrite the generated parts of docs/").set_defaults(run=_pages)
    _add_runs(commands.add_parser("runs", help="list the finished runs"))
    _add_look(
        commands.add_parser("look", help="score a sentence against an image, and draw where a run looked")
    )
    _add_search(
        commands.add_parser(
            "search", help="the images that fit a sentence, or the captions that fit an image"
        )
    )
    _add_cache(commands.add_parser("cache", help="list or clear what runs have cached"))
    release = commands.add_parser("release", help="pack trained runs into one archive, or open one")
    release.add_argument(
        "archive", nargs="?", default="finematch-release.zip", help="file; to open, also an address"
    )
    release.add_argument(
        "runs", nargs="*", help="folders of runs; none: of each method the one nearest to its preset"
    )
    release.add_argument(
        "--open", action="store_true", help="unpack the archive into papermill_runs/ and data/cache/"
    )
    release.add_argument(
        "--into", default="", type=os.path.expanduser, help="another folder of runs, with --open"
    )
    release.add_argument(
        "--no-networks", action="store_true", help="without the networks that look at the images"
    )
    release.set_defaults(run=_release)

    options = parser.parse_args(arguments)
    from finematch.config import ParameterError
    from finematch.files import DataError

    try:
        return options.run(options)
    except (DataError, ParameterError) as error:
        print(error, file=sys.stderr)
        return 1


def _handout(options: argparse.Namespace) -> int:
    from finematch.config import root
    from finematch.handout import write_handout, write_student

    if options.out.endswith(".zip"):
        print(write_handout(options.out, root() / options.data_root))
    else:
        print(*write_student(options.out), sep="\n")
    return 0


def _slides(options: argparse.Namespace) -> int:
    from finematch.slides import write_slides

    print(*write_slides(options.out, options.data_root), sep="\n")
    return 0


def _pages(options: argparse.Namespace) -> int:
    """Prints the pages that changed."""
    from finematch.pages import rewrite

    for page in rewrite():
        print(f"{page} rewritten")
    return 0


def _stale(options: argparse.Namespace) -> int:
    """Prints one metrics file per line, relative to the workbook's folder, as Snakemake names it."""
    from finematch.config import root
    from finematch.grids import grid, metrics_files, stale

    for name in options.grid:
        one = grid(name, options.dataset)
        which = one, options.dataset, options.scale, options.reading
        found = stale(*which, smoke=options.smoke)
        for file in found:
            print(file.relative_to(root()))
        of = len(metrics_files(*which, smoke=options.smoke))
        print(f"{name}: {len(found)} of {of} runs are of other parameters than their rows", file=sys.stderr)
    return 0


def _data(options: argparse.Namespace) -> int:
    """Prints how many images each part has; draws the embedded set where it is absent and asked for."""
    if options.grid is None:
        from finematch.survey import survey

        there = False
        for line in survey(options.data_root, options.dataset):
            print(line, flush=True)
            there |= " images, " in line
        return int(bool(options.dataset) and not there)
    options.dataset = options.dataset or "scenes"
    from finematch.config import root
    from finematch.features.inputs import check_data, reads
    from finematch.grids import BOXES, grid, settings

    one = grid(options.grid, options.dataset)
    of = {"dataset": options.dataset, "data_root": options.data_root, "scale": options.scale}
    rows = []
    for row in one.rows if one.base is None else one.linked:  # boxes need the images, at either scale
        cells = one.of(row).rows[row]
        filled = [key for key, cell in cells.items() if cell == BOXES] if options.proposals else []
        everywhere = ["proposals"] if options.proposals and not one.boxes else []
        rows.append(
            settings(one.of(row), row, **of, **dict.fromkeys(filled or everywhere, options.proposals))
        )
    for kind, s in {reads(s): s for s in rows}.items():
        counts = ", ".join(f"{name} {count:,}" for name, count in check_data(s, root()).items())
        print(f"{one.name} reads {kind} of {options.dataset}: {counts}")
    return 0


def _add_rehearse(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("grid", help="name of a grid")
    parser.add_argument("--dataset", default="", help="the paper's at scale paper, else scenes")
    parser.add_argument("--data-root", default="data", type=os.path.expanduser)
    parser.add_argument("--scale", default="tiny", help="tiny or paper")
    parser.add_argument("--reading", default="", choices=READINGS, help="default or literal; the scale's own")
    parser.add_argument("--row", default="", help="this row alone")
    parser.add_argument(
        "--out", type=_path, help="write the table here, as data (papermill_runs/rehearsal/...)"
    )
    parser.set_defaults(run=_rehearse)


def _rehearse(options: argparse.Namespace) -> int:
    """Prints a line a row, and the grid's total over its seeds."""
    from finematch.config import root
    from finematch.grids import grid, label
    from finematch.rehearsal import main as rehearse
    from finematch.tables import to_markdown

    dataset = options.dataset or (options.scale == "paper" and grid(options.grid).dataset) or "scenes"
    scale = label(options.scale, options.reading)
    name = f"{options.grid}.{dataset}.{scale}{options.row and '.' + options.row}.json"
    out = options.out or root() / "papermill_runs" / "rehearsal" / name
    frame = rehearse(options.grid, dataset, options.scale, data_root=options.data_root,
                     reading=options.reading, row=options.row, out=out)  # fmt: skip
    print(f"{to_markdown(frame, digits=3)}\n\nWritten to {out}")
    return 0


def _add_walk(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--grid", nargs="+", default=[], help="these grids alone")
    parser.add_argument("--row", default="", help="this row alone, and what it builds on")
    parser.add_argument("--out", type=_path, default="", help="folder of the runs (papermill_runs/walk)")
    parser.add_argument("--again", action="store_true", help="also rows that were walked")
    parser.add_argument("--keep", action="store_true", help="not again rows that other code has walked")
    parser.add_argument("--limit", type=float, default=0, help="begin no row after so many seconds")
    parser.add_argument("--table", type=_path, help="write the table here, as data")
    parser.add_argument("--page", type=_path, help="and its summary into this page")
    parser.set_defaults(run=_walk)


def _walk(options: argparse.Namespace) -> int:
    """Prints a line a row, then a line a grid; 1 if a row failed."""
    from finematch.tables import replace_block, to_markdown
    from finematch.walk import summary, walk, write

    results = walk(options.grid, options.row, out=options.out, again=options.again, keep=options.keep,
                   limit=options.limit)  # fmt: skip
    page = to_markdown(summary(results, options.grid), digits=1)
    print(page)
    if options.table:
        write(results, options.table)
    if options.page:
        replace_block(options.page, "walk", page)
    return int(any(result["did"] == "failed" for result in results))


def _add_runs(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--method", default="", help="mvam, hslm, felga or slan alone")
    parser.add_argument(
        "--weights", action="store_true", help="those alone that can be opened: their weights are here"
    )
    parser.set_defaults(run=_runs)


def _runs(options: argparse.Namespace) -> int:
    """Prints a line a run, tab-separated: folder, method, data set, seed, weights, status."""
    from finematch.config import root
    from finematch.runs import measured

    frame = measured(root() / "papermill_runs")
    print("folder\tmethod\tdataset\tseed\tweights\tstatus")
    for row in frame.to_dict("records"):
        folder = Path(row["run_file"]).parent
        weights = next(folder.glob("**/best.safetensors"), None) is not None
        method = folder.parent.name
        if options.method in ("", method) and (weights or not options.weights):
            shown = folder.relative_to(root())
            state = "yes" if weights else "no"
            print(shown, method, row["dataset"], row["seed"], state, row["run_status"], sep="\t")
    return 0


def _add_look(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", metavar="RUN", help="folder of a finished run, or a method: its newest run")
    parser.add_argument("--image", required=True, type=_path, help="the image's file")
    parser.add_argument(
        "--text", required=True, action="append", help="a sentence; several times: several sentences"
    )
    parser.add_argument("--out", type=_path, help="picture of where the model looked for the first sentence")
    parser.set_defaults(run=_look)


def _look(options: argparse.Namespace) -> int:
    """Prints a line a sentence, tab-separated: score, sentence."""
    from finematch.explore import match

    found = match(_opened(options.folder), options.image, options.text)
    for one in found:
        print(f"{one.score:.4f}\t{one.sentence}")
    if options.out:
        from finematch import figures

        figures.style()
        print(figures.save(figures.looks(options.image, found[0]), options.out), file=sys.stderr)
    return 0


def _add_search(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", metavar="RUN", help="folder of a finished run, or a method: its newest run")
    parser.add_argument("--text", default="", help="sentence to find images for")
    parser.add_argument(
        "--image", default="", type=os.path.expanduser, help="image to find captions of the set for"
    )
    parser.add_argument(
        "--over", default="", type=os.path.expanduser, help="folder of images (the run's own set)"
    )
    parser.add_argument("-k", type=int, default=10, help="answers")
    parser.add_argument(
        "--shortlist", type=int, default=64, help="answers that SLAN's matching head ranks again"
    )
    parser.set_defaults(run=_search)


def _search(options: argparse.Namespace) -> int:
    """Prints a line an answer, tab-separated: rank, score, image, and of a caption its text."""
    from finematch.search import search

    found = search(_opened(options.folder), options.text, image=options.image, over=options.over, k=options.k,
                   shortlist=options.shortlist)  # fmt: skip
    for rank, hit in enumerate(found, start=1):
        print(rank, f"{hit.score:.4f}", hit.image, *([hit.caption] if hit.caption else []), sep="\t")
    return 0


def _opened(folder: str):
    """A run by its folder, or the newest of a method."""
    from finematch.runs import open_run

    return (
        open_run("latest", method=folder) if folder in ("mvam", "hslm", "felga", "slan") else open_run(folder)
    )


def _add_cache(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("action", choices=("list", "clear"))
    parser.add_argument(
        "names", nargs="*", metavar="NAME", help="these entries alone, by the names of their folders"
    )
    parser.add_argument("--cache", type=_path, help="its folder (the workbook's data/cache)")
    parser.add_argument("--kind", help="entries of one kind alone, as `list` prints it: regions, crops, ...")
    parser.set_defaults(run=_cache)


def _cache(options: argparse.Namespace) -> int:
    """Prints one line per entry: size, kind, folder; the last line says how many there are, and their size."""
    from finematch.files import clear, entries

    if options.cache is None:
        from finematch.config import root

        options.cache = root() / "data" / "cache"
    if options.action == "clear":
        found, done = clear(options.cache, kind=options.kind, only=options.names), "removed, "
    else:
        found, done = [e for e in entries(options.cache) if options.kind in (None, e.kind)], ""
        found = [e for e in found if not options.names or e.folder.name in options.names]
    for entry in found:
        state = "" if entry.whole else "  (not finished)"
        print(f"{size(entry.size):>9}  {entry.kind:<14} {entry.folder.relative_to(options.cache)}{state}")
    print(f"{options.cache}: {len(found)} entries, {done}{size(sum(entry.size for entry in found))}")
    return 0


def _release(options: argparse.Namespace) -> int:
    """Prints the archive's name, size and digest, or a line a run: its folder, and whether it was there."""
    from finematch.files import file_digest
    from finematch.release import pack, unpack

    if options.open:
        for folder, new in unpack(options.archive, runs=options.into).items():
            print(f"{folder}{'' if new else '  (is here already)'}")
        return 0
    archive = pack(options.archive, options.runs, networks=not options.no_networks)
    print(f"{archive}: {size(archive.stat().st_size)}, sha256 {file_digest(archive)}")
    return 0


def _path(given: str) -> Path:
    """A path as it is typed: of `--out=~/runs` no shell expands the `~`."""
    return Path(given).expanduser()


def size(count: int) -> str:
    """A number of bytes for people to read: `1.5 GB`."""
    number, unit = float(count), "B"
    for larger in ("kB", "MB", "GB", "TB"):
        if number < 1000:
            break
        number, unit = number / 1000, larger
    return f"{number:.0f} {unit}" if unit == "B" else f"{number:.1f} {unit}"


if __name__ == "__main__":
    sys.exit(main())
