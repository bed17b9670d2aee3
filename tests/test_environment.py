"""environment.yml (conda) asks for the packages and ranges that pyproject.toml (pip) asks for."""

import re
import tomllib
from pathlib import Path

import yaml

ROOT = Path(__file__).parents[1]
PYPI_NAME = {"pytorch": "torch"}  # by conda-forge's name, where the two differ
EXTRAS = ("dev", "minilm", "book")  # what `make install` installs


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


def locked() -> dict[str, list[str]]:
    """The exact versions of requirements.lock by package; more than one where they depend on the system or Python."""
    found: dict[str, list[str]] = {}
    for line in (ROOT / "requirements.lock").read_text().splitlines():
        if not line.startswith("#"):
            name, version = re.fullmatch(r"([a-z0-9.-]+)==([^\s;]+)( ; .*)?", line).groups()[:2]
            found.setdefault(name, []).append(version)
    return found


def test_the_locked_versions_are_all_that_is_asked_for_and_within_its_ranges():
    from packaging.specifiers import SpecifierSet
    from packaging.utils import canonicalize_name

    found = locked()
    for name, spec in wanted().items():
        if name != "python":
            versions = found[canonicalize_name(name)]
            assert all(version in SpecifierSet(spec) for version in versions), f"{name}{spec}: {versions}"


def test_the_lock_names_no_package_index():
    text = (ROOT / "requirements.lock").read_text()
    assert not re.search(r"://|--(index|extra-index|find-links|trusted-host)", text)


def test_every_make_command_stands_as_a_plain_one_in_the_docs():
    commands = re.findall(r"^([a-z-]+):.*##", (ROOT / "Makefile").read_text(), re.M)
    page = (ROOT / "docs" / "machines.md").read_text()
    assert [name for name in commands if name != "help" and f"| `make {name}" not in page] == []


def test_the_hosted_workflow_runs_the_readmes_commands_and_says_that_it_is_untried():
    text = (ROOT / ".github" / "workflows" / "tests.yml").read_text()
    assert text.startswith("# Untried")
    jobs = yaml.safe_load(text)["jobs"]
    runs = {name: "\n".join(step.get("run", "") for step in job["steps"]) for name, job in jobs.items()}
    assert "\nmake test" in runs["linux"]
    assert "make test" in (ROOT / "README.md").read_text()
    for path in re.findall(r"(?:tests|notebooks)/[\w/.]+", runs["macos"]):
        assert (ROOT / path).is_file(), path
