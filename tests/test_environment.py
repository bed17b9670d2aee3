"""environment.yml (conda) asks for the packages and ranges that pyproject.toml (pip) asks for."""

import re
import tomllib
from pathlib import Path

import yaml

ROOT = Path(__file__).parents[1]
PYPI_NAME = {"pytorch": "torch"}  # by conda-forge's name, where the two differ
EXTRAS = ("dev", "minilm")  # what `make install` installs


def ranges(requirements: list[str]) -> dict[str, str]:
    """`{name: range}` of requirements such as `torch>=2.11`; a name twice is an error."""
    pairs = [re.fullmatch(r"([A-Za-z0-9_.-]+)\s*(.*)", line).groups() for line in requirements]
    assert len({name for name, _ in pairs}) == len(pairs), f"a package is asked for twice: {requirements}"
    return dict(pairs)


def wanted() -> dict[str, str]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = [line for extra in EXTRAS for line in project["optional-dependencies"][extra]]
    return ranges(project["dependencies"] + extras) | {"python": project["requires-python"]}


def conda() -> tuple[dict[str, str], list[str]]:
    """The packages and ranges in PyPI's names, and the lines of the pip section."""
    entries = yaml.safe_load((ROOT / "environment.yml").read_text())["dependencies"]
    (pip,) = (entry["pip"] for entry in entries if isinstance(entry, dict))
    names = ranges([entry for entry in entries if isinstance(entry, str)])
    assert names.pop("pip") == "", "conda wants pip listed when there is a pip section"
    named = [PYPI_NAME.get(name, name) + spec for name, spec in names.items()]
    return ranges(named + [line for line in pip if not line.startswith("-")]), pip


def test_packages_and_ranges_are_the_same():
    assert conda()[0] == wanted()


def test_the_package_itself_is_installed_from_the_checkout():
    assert "-e ." in conda()[1]


def test_make_installs_the_same_extras():
    assert f"-e '.[{','.join(EXTRAS)}]'" in (ROOT / "Makefile").read_text()
