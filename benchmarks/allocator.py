"""What `training.keep_freed_memory` saves: CPU seconds (user and system) and the peak of memory, with and without.

Three workloads on one thread, each in a fresh process, the two ways in turn:

* features: a MobileNetV2 looks at 32 photos of 224 px, as frozen features are made;
* mvam: a training step on cells of photos; slan: a training step of the objective at the tiny size.

CPU seconds do not count other work on the machine.

    python benchmarks/allocator.py          writes benchmarks/allocator.json (2 minutes of one core)
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
from datetime import date
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

WORKLOADS = ("features", "mvam", "slan")
STEPS = 4


def workload(name: str):
    """One step of it, to call."""
    import torch

    torch.set_num_threads(1)
    if name == "features":
        import timm

        net, photos = (
            timm.create_model("mobilenetv2_100", features_only=True).eval(),
            torch.rand(32, 3, 224, 224),
        )
        return torch.no_grad()(lambda: net(photos))
    if name == "mvam":
        from mvam_step import Step

        return Step("flickr8k", "mvam")
    from slan_cost import Step

    return Step("tiny", "iccv").objective


def used() -> tuple[float, float]:
    now = resource.getrusage(resource.RUSAGE_SELF)
    return now.ru_utime, now.ru_stime


def measure(name: str, keep: bool) -> dict[str, float]:
    """In this process: seconds a step after one to warm up, and the peak of memory."""
    from finematch.training import keep_freed_memory

    if keep and not keep_freed_memory():
        raise SystemExit("The C library is not glibc: there is nothing to measure")
    step = workload(name)
    step()
    before = used()
    for _ in range(STEPS):
        step()
    user, system = ((after - b) / STEPS for b, after in zip(before, used(), strict=True))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {"user_s": user, "system_s": system, "cpu_s": user + system, "peak_bytes": peak}


def main(repeats: int, out: Path) -> None:
    from finematch.files import write_json
    from finematch.runs import git_commit, versions
    from finematch.training import device_name

    found: dict = {}
    for name in WORKLOADS:
        rounds: dict[str, list] = {"given back": [], "kept": []}
        for _ in range(repeats):
            for way in rounds:
                line = [sys.executable, __file__, "--one", name, *(["--keep"] if way == "kept" else [])]
                rounds[way].append(
                    json.loads(subprocess.run(line, check=True, capture_output=True, text=True).stdout)
                )
        found[name] = {
            way: {key: statistics.median(one[key] for one in of) for key in of[0]}
            for way, of in rounds.items()
        }
        found[name]["cpu_ratio"] = found[name]["kept"]["cpu_s"] / found[name]["given back"]["cpu_s"]
        found[name]["peak_ratio"] = (
            found[name]["kept"]["peak_bytes"] / found[name]["given back"]["peak_bytes"]
        )
        print(f"{name}: CPU {found[name]['cpu_ratio']:.2f}, peak {found[name]['peak_ratio']:.2f}")
    write_json(out, {"workloads": found, "steps": STEPS, "repeats": repeats, "device": device_name(), "threads": 1,
                     "date": f"{date.today()}", "commit": git_commit(), "versions": versions()})  # fmt: skip


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--one", choices=WORKLOADS)
    parser.add_argument("--keep", action="store_true")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".json"))
    options = parser.parse_args()
    if options.one:
        print(json.dumps(measure(options.one, options.keep)))
    else:
        main(options.repeats, options.out)
