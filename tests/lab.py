"""JupyterLab in a headless Chromium, as a person uses it; and the screenshots that it makes.

    python tests/lab.py figures        the explorer on the newest runs, as README shows it: figures/explore.<method>.png
                                       (make screenshots)

Needs playwright (the extra `browser`) and a Chromium that is installed on the system.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
PICTURE = ".widget-image"  # those of ipywidgets
SETTINGS = {  # cells out of sight stay in the page, and nothing asks a first visitor about news
    "notebook-extension/tracker": {"windowingMode": "none"},
    "apputils-extension/notification": {"fetchNews": "false", "checkForUpdates": False},
}


def chromium() -> str | None:
    """The system's Chromium or Chrome."""
    return next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@contextmanager
def server(folder: Path) -> Iterator[str]:
    """The address of a JupyterLab on `folder`, with settings of its own."""
    with socket.socket() as free, tempfile.TemporaryDirectory() as own:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
        free.close()
        for name, value in SETTINGS.items():
            file = Path(own, "lab", "@jupyterlab", f"{name}.jupyterlab-settings")
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(json.dumps(value))
        where = {
            name: str(Path(own, name.lower())) for name in ("JUPYTER_CONFIG_DIR", "JUPYTERLAB_WORKSPACES_DIR")
        }
        where |= {"JUPYTERLAB_SETTINGS_DIR": str(Path(own, "lab")), "IPYTHONDIR": str(Path(own, "ipython"))}
        options = {"ip": "127.0.0.1", "port": port, "ServerApp.port_retries": 0, "IdentityProvider.token": "look",
                   "ServerApp.root_dir": folder, "LabApp.expose_app_in_browser": True}  # fmt: skip
        command = [sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root"]
        command += [f"--{name}={value}" for name, value in options.items()]
        with Path(own, "log").open("w") as log:
            running = subprocess.Popen(
                command, env={**os.environ, **where}, cwd=folder, stdout=log, stderr=log
            )
        try:
            address = f"http://127.0.0.1:{port}"
            for _ in range(240):
                try:
                    urllib.request.urlopen(f"{address}/api/status?token=look", timeout=5).close()
                    break
                except OSError:
                    if running.poll() is not None:
                        raise RuntimeError(Path(own, "log").read_text()[-2000:]) from None
                    time.sleep(0.5)
            yield address
        finally:
            running.terminate()
            try:
                running.wait(30)
            except subprocess.TimeoutExpired:
                running.kill()


@contextmanager
def browser(width: int = 1500, height: int = 2200):
    """A page of a headless Chromium, and what its console says of errors."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=chromium(), args=["--no-sandbox"])
        page, errors = opened.new_page(viewport={"width": width, "height": height}), []
        page.on("console", lambda said: errors.append(said.text) if said.type == "error" else None)
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.set_default_timeout(120_000)
        try:
            yield page, errors
        finally:
            opened.close()


def run_all(page, address: str, notebook: str, *, wait_s: float = 600) -> None:
    """Open a notebook, run all its cells, and wait until its first picture is there."""
    page.goto(f"{address}/lab/tree/{notebook}?token=look&reset")
    page.get_by_text("Python 3 (ipykernel) | Idle").wait_for()
    page.evaluate("window.jupyterapp.commands.execute('filebrowser:toggle-main')")
    page.evaluate("window.jupyterapp.commands.execute('notebook:run-all-cells')")
    page.locator(f"{PICTURE}[src]").first.wait_for(timeout=1000 * wait_s)
    page.get_by_text("Python 3 (ipykernel) | Idle").wait_for(timeout=1000 * wait_s)


def pixels(locator) -> np.ndarray:
    """What a part of the page looks like."""
    return np.asarray(Image.open(io.BytesIO(locator.screenshot())).convert("RGB"), np.int16)


def changed(page, locator, act, *, wait_s: float = 120) -> bool:
    """Whether a part of the page looks different after `act`, at the latest when `wait_s` have passed."""
    before, end = pixels(locator), time.monotonic() + wait_s
    act()
    while time.monotonic() < end:
        page.wait_for_timeout(200)
        now = pixels(locator)
        if now.shape != before.shape or np.abs(now - before).max() > 8:
            return True
    return False


def copy_of_the_book(folder: Path, **given) -> None:
    """The notebooks in a workbook of their own, with other defaults of the explorer's parameters."""
    sys.path.insert(0, str(ROOT / "notebooks"))
    import build

    shutil.copytree(
        ROOT / "notebooks", folder / "notebooks", ignore=shutil.ignore_patterns("__pycache__", ".*")
    )
    (folder / "pyproject.toml").touch()
    source = folder / "notebooks" / "6_explore.py"
    lines = source.read_text(encoding="utf-8").splitlines(keepends=True)
    for n, line in enumerate(lines):
        name = line.partition(":")[0]
        if name in given and " = " in line:
            lines[n] = f"{line.partition(' = ')[0]} = {given.pop(name)!r}  # {line.partition('# ')[2]}"
    assert not given, given
    source.write_text("".join(lines), encoding="utf-8")
    source.with_suffix(".ipynb").write_text(build.build(source), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("out", type=Path, help="folder of the screenshots")
    parser.add_argument("--method", nargs="+", default=["mvam", "slan"])
    parser.add_argument("--image", type=int, default=27)
    parser.add_argument("--trained", default="", help="folder of the run; the newest of the method")
    parser.add_argument("--sentence", default="A small black star is to the right of a tiny red circle")
    options = parser.parse_args()
    given = {"image": options.image, "sentence": options.sentence, "trained": options.trained}
    for method in options.method:
        with tempfile.TemporaryDirectory() as folder:
            book = Path(folder)
            copy_of_the_book(book, method=method, **given)
            for name in ("data", "papermill_runs"):
                (book / name).symlink_to(ROOT / name)
            with server(book) as address, browser(width=960) as (page, _):
                run_all(page, address, "notebooks/6_explore.ipynb")
                page.wait_for_timeout(2000)
                widget = page.locator(".jp-OutputArea-output .widget-vbox").first
                widget.screenshot(path=options.out / f"explore.{method}.png")
                print(options.out / f"explore.{method}.png", flush=True)


if __name__ == "__main__":
    main()
