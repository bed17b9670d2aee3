"""The command line: `python -m finematch <command>`; `--help` lists the commands.

A command imports what it needs when it runs, so that none waits for torch without need.
"""

from __future__ import annotations

import argparse
import sys


def main(arguments: list[str] | None = None) -> int:
    """Returns the exit status; what a user did wrong is one line on stderr, not a traceback."""
    parser = argparse.ArgumentParser(prog="python -m finematch", description="Helpers around grids and runs.")
    commands = parser.add_subparsers(dest="command", required=True)

    stale = commands.add_parser(
        "stale", help="list finished runs whose parameters are not those of their grid's row"
    )
    stale.add_argument("grid", nargs="+", help="name of a grid")
    stale.add_argument("--dataset", default="scenes")
    stale.add_argument("--scale", default="tiny", help="tiny, paper or smoke")
    stale.set_defaults(run=_stale)

    options = parser.parse_args(arguments)
    from finematch.files import DataError

    try:
        return options.run(options)
    except DataError as error:
        print(error, file=sys.stderr)
        return 1


def _stale(options: argparse.Namespace) -> int:
    """Prints one metrics file per line, relative to the workbook's folder, as Snakemake names it."""
    from finematch.config import root
    from finematch.grids import grid, stale

    for name in options.grid:
        for file in stale(grid(name, options.dataset), options.dataset, options.scale):
            print(file.relative_to(root()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
