"""Ours beside public code that does the same, alternately in one process: seconds, ratios, and that numbers agree.

The code is fetched by whoever runs this and its folder given; none of it is here. Without its folder a peer is "not
run", and what an earlier run found of it is kept with that run's machine, versions, commit and date.

* `--scan` (kuanghuei/SCAN, `model.py`): `xattn_score_t2i` against `evaluation.cross_attention.text_to_image`.
* `--sgraf` (Paranioar/SGRAF, branch python3.6, `model.py`): `EncoderSimilarity`, SAF and SGR, against HSLM's pair
  scores. They are other methods, so that only time is compared: all send the squared difference of each word and its
  context through a 1024 x 256 matrix.
* `--vsepp` (fartashf/vsepp, `evaluation.py`): `i2t` and `t2i` against `evaluation.retrieval.retrieval`.
* `--clip-benchmark` (LAION-AI/CLIP_benchmark, `metrics/zeroshot_retrieval.py`): `recall_at_k` both ways, 1, 5 and 10,
  against the same function of ours.
* `--open-clip` (mlfoundations/open_clip, `src/open_clip/loss.py`): `ClipLoss` against `losses.contrastive`, with the
  backward pass.
* pycocotools, which is installed: `maskUtils.iou` of boxes against `boxes.iou`. (Its average precision interpolates
  at 101 recalls; ours, which ranks all fragments of a gallery, does not: they are two measures.)

With one thread the clock is the process's own (CPU seconds): other work on the machine does not count.

    python benchmarks/peers.py --scan ../SCAN --sgraf ../SGRAF ...          writes benchmarks/peers.json
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from datetime import date
from pathlib import Path
from types import ModuleType, SimpleNamespace

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch
from tabulate import tabulate
from torch.nn import functional as F

from finematch.boxes import iou
from finematch.evaluation.cross_attention import text_to_image
from finematch.evaluation.retrieval import retrieval
from finematch.files import write_json
from finematch.losses import contrastive
from finematch.models.configs import HSLMConfig
from finematch.models.hslm import HSLM, Caption, Picture, score
from finematch.runs import git_commit, versions
from finematch.training import device_name

REGIONS, WIDTH, SIM, WORDS, CAPTIONS_EACH = 36, 1024, 256, 13, 5
RECALLS = (1, 5, 10)


def load(folder: Path, file: str, **stubs: ModuleType) -> ModuleType:
    """A module of somebody's code by its path; `stubs` stand for modules that it imports and that are not needed."""
    path = folder / file
    if not path.is_file():
        raise SystemExit(f"{path}: no such file; is {folder} a checkout of the peer?")
    torch.nn.utils.clip_grad.clip_grad_norm = torch.nn.utils.clip_grad_norm_  # its name before torch 2
    before = {name: sys.modules.get(name) for name in stubs}
    sys.modules.update(stubs)
    spec = importlib.util.spec_from_file_location(f"peer_{folder.name}_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    for name, old in before.items():
        sys.modules.pop(name) if old is None else sys.modules.update({name: old})
    return module


def stub(name: str, *names: str) -> ModuleType:
    module = ModuleType(name)
    for attribute in names:
        setattr(module, attribute, None)
    return module


def in_turn(ours: Callable, theirs: Callable, repeats: int) -> dict:
    """Seconds of both, alternately after one call to warm up; `times_faster` is the median of the rounds' ratios."""
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    found: dict[str, list[float]] = {"ours": [], "theirs": []}
    ours()
    for _ in range(repeats):
        for name, job in (("ours", ours), ("theirs", theirs)):
            start = clock()
            job()
            found[name].append(clock() - start)
    ratios = [theirs / ours for ours, theirs in zip(found["ours"], found["theirs"], strict=True)]
    return {
        "seconds": found,
        "times_faster": statistics.median(ratios),
        "least": min(ratios),
        "most": max(ratios),
    }


def unit(*shape: int) -> torch.Tensor:
    return F.normalize(torch.randn(*shape), dim=-1)


def region_word_inputs(images: int, captions: int):
    """Unit regions and words of the paper's sizes, and how many words each caption has."""
    torch.manual_seed(0)
    lengths = torch.randint(WORDS - 5, WORDS + 6, (captions,))
    mask = torch.arange(WORDS + 5)[None] < lengths[:, None]
    return unit(images, REGIONS, WIDTH), unit(captions, WORDS + 5, WIDTH), mask, lengths.tolist()


@torch.no_grad()
def scan(folder: Path, repeats: int) -> dict:
    module = load(folder, "model.py")
    regions, words, mask, lengths = region_word_inputs(images := 100, captions := 100)
    options = SimpleNamespace(
        raw_feature_norm="clipped_l2norm", agg_func="LogSumExp", lambda_lse=6.0, lambda_softmax=9.0
    )

    def theirs():
        return module.xattn_score_t2i(regions, words, lengths, options)

    difference = float((text_to_image(regions, words, mask) - theirs()).abs().max())
    assert difference < 1e-5, difference
    return {
        "peer": "SCAN, xattn_score_t2i", "ours": "evaluation.cross_attention.text_to_image",
        "size": f"{images} images x {captions} captions, {REGIONS} regions, {WORDS} words on average, {WIDTH}-d",
        "largest_difference": difference,
        **in_turn(lambda: text_to_image(regions, words, mask), theirs, repeats),
    }  # fmt: skip


@torch.no_grad()
def sgraf(folder: Path, form: str, repeats: int) -> dict:
    module = load(folder, "model.py")
    regions, words, mask, lengths = region_word_inputs(images := 50, captions := 50)
    torch.manual_seed(0)
    theirs = module.EncoderSimilarity(WIDTH, SIM, form, 3).eval()
    pairs = HSLM(8, 8, HSLMConfig(width=WIDTH, embed=8, sim=SIM, depth=0)).eval().pairs
    caption = Caption(words, mask, unit(captions, WIDTH))
    picture = Picture(regions, torch.ones(regions.shape[:2], dtype=torch.bool))
    return {
        "peer": f"SGRAF, EncoderSimilarity ({form})", "ours": "models.hslm.score (another method)",
        "size": f"{images} images x {captions} captions, {REGIONS} regions, {WORDS} words on average, {WIDTH}-d",
        "largest_difference": None,
        **in_turn(lambda: score(pairs, pairs.prepare(picture), caption, ranking=True),
                  lambda: theirs(regions, words, lengths), repeats),
    }  # fmt: skip


def embeddings(images: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Captions that scatter about their image, so that recall is neither 0 nor 100 %."""
    torch.manual_seed(0)
    image, owner = unit(images, WIDTH), torch.arange(images).repeat_interleave(CAPTIONS_EACH)
    return image, F.normalize(0.1 * image[owner] + unit(len(owner), WIDTH), dim=1), owner


def vsepp(folder: Path, repeats: int) -> dict:
    stubs = {"data": stub("data", "get_test_loader"), "vocab": stub("vocab", "Vocabulary"),
             "model": stub("model", "VSE", "order_sim")}  # fmt: skip
    module = load(folder, "evaluation.py", **stubs)
    image, text, owner = embeddings(images := 1000)
    x, y = image[owner].numpy(), text.numpy()  # its layout: images repeated for each caption

    def theirs():
        return module.i2t(x, y, npts=images), module.t2i(x, y, npts=images)

    ours = retrieval(image, text, owner)
    names = ("r1", "r5", "r10", "medr", "meanr")
    differences = [abs(ours[f"{way}_{name}"] - value)
                   for way, values in zip(("i2t", "t2i"), theirs(), strict=True)
                   for name, value in zip(names, values, strict=True)]  # fmt: skip
    assert max(differences) <= 0.02, differences
    return {
        "peer": "VSE++, i2t and t2i", "ours": "evaluation.retrieval.retrieval",
        "size": f"{images:,} images x {len(text):,} captions, {WIDTH}-d",
        "largest_difference": float(max(differences)),
        **in_turn(lambda: retrieval(image, text, owner), theirs, repeats),
    }  # fmt: skip


def clip_benchmark(folder: Path, repeats: int) -> dict:
    module = load(folder, "clip_benchmark/metrics/zeroshot_retrieval.py")
    image, text, owner = embeddings(images := 1000)

    def theirs():
        scores = text @ image.T
        positive = torch.zeros_like(scores, dtype=torch.bool)
        positive[torch.arange(len(text)), owner] = True
        return {
            f"{way}_r{k}": 100 * float((module.batchify(module.recall_at_k, s, p, 64, "cpu", k=k) > 0).float().mean())
            for way, s, p in (("t2i", scores, positive), ("i2t", scores.T, positive.T))
            for k in RECALLS
        }  # fmt: skip

    ours = retrieval(image, text, owner)
    difference = max(abs(ours[name] - value) for name, value in theirs().items())
    assert difference <= 0.02, difference
    return {
        "peer": "CLIP_benchmark, recall_at_k", "ours": "evaluation.retrieval.retrieval",
        "size": f"{images:,} images x {len(text):,} captions, {WIDTH}-d", "largest_difference": difference,
        **in_turn(lambda: retrieval(image, text, owner), theirs, repeats),
    }  # fmt: skip


def open_clip(folder: Path, repeats: int) -> dict:
    module = load(folder, "src/open_clip/loss.py")
    torch.manual_seed(0)
    leaves = [torch.randn(1024, 512).requires_grad_() for _ in range(2)]
    scale, loss = torch.tensor(14.3, requires_grad=True), module.ClipLoss()

    def step(function: Callable) -> list[torch.Tensor]:
        value = function(*(F.normalize(leaf, dim=-1) for leaf in leaves), scale)
        return [value, *torch.autograd.grad(value, (*leaves, scale))]

    pairs = zip(step(contrastive), step(loss), strict=True)
    difference = max(float((a - b).abs().max()) for a, b in pairs)
    assert difference < 1e-5, difference
    return {
        "peer": "open_clip, ClipLoss", "ours": "losses.contrastive",
        "size": "1,024 pairs, 512-d, forward and backward", "largest_difference": difference,
        **in_turn(lambda: step(contrastive), lambda: step(loss), 5 * repeats),
    }  # fmt: skip


def pycocotools(repeats: int) -> dict:
    from pycocotools import mask

    torch.manual_seed(0)
    low = torch.rand(2000, 2) * 400
    boxes = torch.cat([low, low + 1 + torch.rand(2000, 2) * 200], dim=1).double()
    theirs = torch.cat([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], dim=1).numpy()
    crowd = np.zeros(len(theirs), dtype=np.uint8)
    difference = float(np.abs(iou(boxes, boxes).numpy() - mask.iou(theirs, theirs, crowd)).max())
    assert difference < 1e-9, difference
    return {
        "peer": "pycocotools, mask.iou", "ours": "boxes.iou", "size": "2,000 x 2,000 boxes, float64",
        "largest_difference": difference,
        **in_turn(lambda: iou(boxes, boxes), lambda: mask.iou(theirs, theirs, crowd), 5 * repeats),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for peer in ("scan", "sgraf", "vsepp", "clip-benchmark", "open-clip"):
        parser.add_argument(f"--{peer}", type=Path, metavar="PATH", help="its checkout; without it: not run")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".json"))
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    warnings.filterwarnings("ignore")  # of code written for torch 0.4 to 1.x
    content = json.loads(options.out.read_text()) if options.out.exists() else {}
    o, n = options, options.repeats
    jobs: dict[str, tuple] = {
        "scan": (o.scan, lambda: scan(o.scan, n)),
        "sgraf_saf": (o.sgraf, lambda: sgraf(o.sgraf, "SAF", n)),
        "sgraf_sgr": (o.sgraf, lambda: sgraf(o.sgraf, "SGR", n)),
        "vsepp": (o.vsepp, lambda: vsepp(o.vsepp, n)),
        "clip_benchmark": (o.clip_benchmark, lambda: clip_benchmark(o.clip_benchmark, n)),
        "open_clip": (o.open_clip, lambda: open_clip(o.open_clip, n)),
        "pycocotools": (True, lambda: pycocotools(n)),
    }
    made = {
        "device": device_name(),
        "versions": versions(),
        "commit": git_commit(),
        "date": str(date.today()),
    }
    for name, (given, job) in jobs.items():
        if given:
            content[name] = job() | made
            write_json(options.out, content)
        else:
            content.setdefault(name, "not run")
            print(f"{name}: not run now, its folder is not given")
    write_json(options.out, content)
    rows = [[name, c["size"], statistics.median(c["seconds"]["ours"]), statistics.median(c["seconds"]["theirs"]),
             c["times_faster"], c["largest_difference"], c["date"]]
            for name, c in content.items() if c != "not run"]  # fmt: skip
    print(
        tabulate(rows, ["peer", "size", "our s", "their s", "x faster", "difference", "date"], floatfmt=".3g")
    )


if __name__ == "__main__":
    main()
