#!/usr/bin/env bash
# Does everything that trains work on one GPU? At most ten minutes; prints what it finds and writes benchmarks/gpu_check.json.
#
#   benchmarks/gpu_check.sh                 on the GPU of this machine
#   benchmarks/gpu_check.sh --device cpu    the same steps without one, in fp32, to check this script; writes nothing into benchmarks/
#   PYTHON=... names the interpreter (.venv/bin/python); --minutes, --out and --only PART change what they say.
#
# Parts: `equal` loss terms and gradients of a small model of each method beside those of the CPU in fp32; `smoke` each 2_train
# in bf16; `resume` a run that is killed and goes on, beside one that is not; `together` two papermill runs at once; `shapes` training
# steps at the paper's shapes with their peak memory, as `make rehearse` measures them. A part that fails does not stop the others.
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python3)}
export MPLBACKEND=agg HF_HUB_OFFLINE=1
case " $* " in *" --device cpu "*) export CUDA_VISIBLE_DEVICES="" ;; esac
exec "$PYTHON" - "$@" <<'PY'
import argparse, json, math, os, signal, subprocess, sys, time
from pathlib import Path
from tempfile import TemporaryDirectory

sys.path.insert(0, "tests")
from finematch.files import write_json

METHODS = ("mvam", "hslm", "felga", "slan")
SHAPES = {"mvam": ("mvam_views", "flickr30k"), "hslm": ("hslm_modules", "flickr30k"), "slan": ("slan_adaptors", "flickr30k"),
          "felga": ("felga_variants", "coco2014")}
ROWS = {"mvam": "regions-mvam", "hslm": "row-12", "slan": "levels-3", "felga": "felga"}
TOLERANCE = {"no": 1e-3, "bf16": 1e-1}  # of a loss term, and of the norm of the gradient, relative to the CPU's in fp32

parser = argparse.ArgumentParser()
parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
parser.add_argument("--minutes", type=float, default=10)
parser.add_argument("--out", type=Path, help="benchmarks/gpu_check.json, or on a CPU nowhere")
parser.add_argument("--only", nargs="+", choices=("equal", "smoke", "resume", "together", "shapes"))
options = parser.parse_args()
import torch

if options.device == "cuda" and not torch.cuda.is_available():
    sys.exit("there is no GPU here: --device cpu checks this script without one")
ends, half = time.monotonic() + 60 * options.minutes, "bf16" if options.device == "cuda" else "no"


def left():
    return max(1.0, ends - time.monotonic())


def started(method, out, **given):
    """papermill on a method's page in smoke, in a session of its own, which can be killed with its kernel."""
    given = {"smoke": True, "precision": half, "cache": work / "cache", "out": out} | given
    command = [sys.executable, "-m", "papermill", "--no-progress-bar", f"notebooks/{method}/2_train.ipynb", f"{out}.ipynb"]
    for name, value in given.items():
        command += ["-p", name, str(value)]
    out.parent.mkdir(parents=True, exist_ok=True)
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=open(f"{out}.log", "w"), start_new_session=True)


def finished(process, out):
    """The run's metrics file, after it has ended."""
    try:
        process.wait(left())
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        raise RuntimeError("the time is over") from None
    if process.returncode:
        raise RuntimeError(Path(f"{out}.log").read_text().strip().splitlines()[-1])
    return json.loads((out / "metrics.json").read_text())


def equal(method):
    """Relative differences of the loss terms and of the gradient's norm from the CPU's, in fp32 and in bf16."""
    from test_numerics import SMALL, made

    from finematch.config import Settings
    from finematch.training import to_device

    def terms(device, precision):
        torch.manual_seed(0)
        model, batch = made(method, Settings(method, SMALL[method]), torch.Generator().manual_seed(1))
        model.to(device).eval()  # without dropout, whose masks differ from device to device
        with torch.autocast(device, torch.bfloat16, enabled=precision == "bf16"):
            found = model(to_device(batch, torch.device(device)))
        found["loss"].backward()
        grad = torch.stack([p.grad.float().norm() for p in model.parameters() if p.grad is not None]).norm()
        return {name: float(value) for name, value in found.items()} | {"gradient": float(grad)}

    expected, found = terms("cpu", "no"), {}
    for precision in dict.fromkeys(("no", half)):
        here = terms(options.device, precision)
        worst = max(abs(here[k] - v) / max(abs(v), 1e-3) for k, v in expected.items())
        found[precision] = {"difference": worst, "tolerance": TOLERANCE[precision]}
        if not worst <= TOLERANCE[precision]:
            raise RuntimeError(f"{precision}: differs by {worst:.2g} of the CPU's value, more than {TOLERANCE[precision]}")
    return found


def smoke(method):
    out, begun = work / "smoke" / method, time.monotonic()
    content = finished(started(method, out), out)
    log = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return {"seconds": time.monotonic() - begun, "precision": content["parameters"]["precision"], "loss": log[-1]["loss"],
            "device": content["device"], "peak_memory_bytes": content["peak_memory_bytes"]}


def resume(method):
    """Killed as soon as the first epoch stands in the log, and started again with the same command."""
    given, out, whole = {"epochs": 3, "precision": "no"}, work / "resume" / "killed", work / "resume" / "whole"
    expected = finished(started(method, whole, **given), whole)["metrics"]
    process = started(method, out, **given)
    while process.poll() is None and not ((out / "log.jsonl").is_file() and (out / "log.jsonl").stat().st_size):
        time.sleep(0.05)
        if left() <= 1:
            break
    killed = process.poll() is None
    if killed:
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    epochs = len((out / "log.jsonl").read_text().splitlines())
    metrics = finished(started(method, out, **given), out)["metrics"]
    lines = [json.loads((of / "log.jsonl").read_text().splitlines()[-1]) for of in (whole, out)]
    difference = abs(lines[0]["loss"] - lines[1]["loss"]) / abs(lines[0]["loss"])
    if difference > TOLERANCE["no"]:
        raise RuntimeError(f"the resumed run's last loss differs by {difference:.2g}")
    return {"killed": killed, "epochs_before": epochs, "loss_difference": difference,
            "rsum": [expected["rsum"], metrics["rsum"]]}


def together(method):
    outs = [work / "together" / str(seed) for seed in range(2)]
    both = [started(method, out, seed=seed) for seed, out in enumerate(outs)]
    return {out.name: finished(process, out)["seconds"] for process, out in zip(both, outs)}


def shapes(method):
    """Measured in a process of its own: its memory, and its time, are bounded."""
    grid, dataset = SHAPES[method]
    out = work / f"{method}.json"
    command = [sys.executable, "-m", "finematch", "rehearse", grid, "--scale", "paper", "--dataset", dataset, "--row",
               ROWS[method], "--out", str(out), "--data-root", str(work / "none")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=left())
    if done.returncode:
        raise RuntimeError(done.stderr.strip().splitlines()[-1])
    keys = ("batch", "measured_batch", "step", "memory", "fits", "training", "evaluation", "features")
    return {key: json.loads(out.read_text())["rows"][0][key] for key in keys}


PARTS = {"equal": (equal, METHODS), "smoke": (smoke, METHODS), "resume": (resume, ("mvam",)), "together": (together, ("hslm",)),
         "shapes": (shapes, METHODS)}
from finematch.runs import git_commit, versions
from finematch.training import device_name

found, begun = {}, time.monotonic()
with TemporaryDirectory(dir="papermill_runs") as folder:
    work = Path(folder).resolve()
    for part, (check, methods) in PARTS.items():
        for method in methods if not options.only or part in options.only else ():
            try:
                if left() <= 1:
                    raise RuntimeError("the time is over")
                result = {"passed": True} | check(method)
            except Exception as error:
                result = {"passed": False, "error": f"{type(error).__name__}: {error}"[:500]}
            found.setdefault(part, {})[method] = result
            print(f"{part} {method}: {json.dumps(result)}", flush=True)
passed = all(one["passed"] for part in found.values() for one in part.values())
content = {"device": device_name(), "passed": passed, "seconds": time.monotonic() - begun, "parts": found,
           "versions": versions(), "commit": git_commit()}
out = options.out or (Path("benchmarks/gpu_check.json") if options.device == "cuda" and not options.only else None)
if out:
    write_json(out, content)
print("passed" if passed else "FAILED", f"in {content['seconds']:.0f} s on {content['device']}")
sys.exit(not passed)
PY
