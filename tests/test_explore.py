"""The package's own names, what importing costs, and a trained run's answer for a new image."""

import json
import subprocess
import sys

import pytest

import finematch


def loaded_by(code: str) -> set[str]:
    """Top-level modules that a fresh process has after `code`."""
    ask = f"import sys, json\n{code}\nprint(json.dumps(sorted(n for n in sys.modules if '.' not in n)))"
    done = subprocess.run([sys.executable, "-c", ask], capture_output=True, text=True, check=True)
    return set(json.loads(done.stdout.splitlines()[-1]))


def test_importing_is_cheap():
    assert not loaded_by("import finematch") & {"torch", "timm", "transformers", "numpy", "pandas"}
    assert not loaded_by("import finematch.files, finematch.config, finematch.hold") & {"torch", "pandas"}
    methods = "from finematch import MVAM, HSLM, FELGA, SLAN\nimport finematch.encoders, finematch.training"
    assert not loaded_by(methods) & {"timm", "transformers", "pandas"}


def test_the_package_gives_its_names_when_they_are_asked_for():
    from finematch.evaluation.retrieval import retrieval
    from finematch.models.slan.objective import SLAN

    assert finematch.SLAN is SLAN
    assert finematch.retrieval is retrieval
    assert set(finematch.__all__) <= set(dir(finematch))
    assert callable(finematch.load)
    assert callable(finematch.open_run)
    with pytest.raises(AttributeError, match="no attribute 'VSE'"):
        finematch.VSE  # noqa: B018
