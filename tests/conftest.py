"""Shared fixtures: tests run on the CPU, without a network, and find real data where it lies."""

from __future__ import annotations

import os

# before torch is imported anywhere
os.environ["CUDA_VISIBLE_DEVICES"] = ""
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_OFFLINE"] = "1"
os.environ["MPLBACKEND"] = "Agg"
WORKERS = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
THREADS = max(1, (os.cpu_count() or 1) // WORKERS)
os.environ.setdefault("OMP_NUM_THREADS", str(THREADS))  # also for processes that tests start

from pathlib import Path  # noqa: E402

import pytest  # noqa: E402

REPOSITORY = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session", autouse=True)
def _threads() -> None:
    """Workers that each take all cores slow each other down many times."""
    import torch

    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The real photos: `FINEMATCH_DATA`, else `../shared/data` beside the checkout; skips without."""
    if stated := os.environ.get("FINEMATCH_DATA"):
        if not Path(stated).is_dir():
            pytest.fail(f"FINEMATCH_DATA is {stated}, which is no folder")
        return Path(stated)
    beside = REPOSITORY.parent / "shared" / "data"
    if not beside.is_dir():
        pytest.skip("no real data: set FINEMATCH_DATA")
    return beside


@pytest.fixture(scope="session")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small `scenes` set, `<data_root>/scenes`, in every format it is written in. Read only."""
    from finematch.scenes.generator import generate

    folder = tmp_path_factory.mktemp("data_root") / "scenes"
    generate(folder, seed=0, size=64, train=40, val=12, test=12)
    return folder
