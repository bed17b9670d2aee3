"""What SLAN costs: Table 8 counted for every backbone, and a training step timed against its bare towers.

Table 8 is counted, not timed (`finematch.evaluation.cost`): one picture of 384 px and one caption of 30 tokens (the
paper gives no length; ALBEF, which it follows, retrieves with 30) through towers, decoder, proposals, three adaptors
and the matching head. The image encoder is counted on the `meta` device and gives the shapes of its maps to the rest,
which is run once with random weights. The paper prints FLOPs of the ResNet-50 model alone, parameters of all four
(arXiv, Table 4), and no convention. So both conventions are held against what is printed, and two wider readings:
FLOPs of a training step for a pair (three passes, backward, momentum encoders), and parameters with a decoder for
the captions of 4.2 (BERT base with cross attention, as BLIP's). BLIP's quoted rows are counted in the same way.

The training step is forward and backward at the same batch, without the optimiser:

* towers: both encoders and their pooled tokens, random gradients from above.
* locator: the same, and one pass of the self-locator on the true pairs (prepare, locate, Eq. 3).
* objective, no levels: as the next, of a locator whose proposals are its regions (Table 6, row 2).
* objective: Eq. 9 as `SLAN` computes it: three kinds of pairs, two texts; at the paper's size with momentum encoders
  and full queues of 65,536, at the tiny one within the batch.

All are run in turn, so that a busy moment of the machine meets all of them; a ratio is that of one round, and
median and quartiles over the rounds are given. `tiny` is 64 pairs with pictures of 64 px and `SmallStages`, trained
(a tiny run of `slan/2_train` keeps its encoder frozen and its maps on disk: what is left of the towers is BERT);
`paper` is 8 pairs with ResNet-50 at 224 px and BERT base. With one thread the clock is the process's own (CPU
seconds): other work on the machine does not count; with more it is the wall's, and the machine should be quiet. Where
there is a GPU the paper's size is timed there too, in bf16 with 64 pairs, with the peak of memory over what was held
before the step.

`table8.rows` is one row a model, for a table: name, version, parameters_m, published_parameters_m, gmultiply_adds,
gflops, published_gflops (null where nothing is printed).

    python benchmarks/slan_cost.py          writes benchmarks/slan_cost.json (7 minutes of one core)
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable
from datetime import date
from itertools import pairwise
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
import torch.nn.functional as F
from tabulate import tabulate
from torch import Tensor
from transformers import BertConfig, BertLMHeadModel, BlipConfig, BlipForImageTextRetrieval

from finematch.config import Settings
from finematch.encoders import BertTower, Cells, small_bert
from finematch.evaluation.cost import cost, parameters
from finematch.files import write_json
from finematch.models.configs import LocatorConfig, SLANConfig
from finematch.models.slan.locator import SelfLocator
from finematch.models.slan.matching import Words
from finematch.models.slan.objective import SLAN
from finematch.models.slan.towers import CachedStages, SmallStages, Stages, Towers
from finematch.runs import git_commit, versions
from finematch.tables import published
from finematch.training import device_name

SIZE, TOKENS, GOAL, CLOSE = 384, 30, 1.5, 0.05
BACKBONES = {  # of the paper's names: timm's, and the stages that are read
    "ResNet50": ("resnet50", (2, 3, 4)),
    "Vit-Base": ("vit_base_patch16_224", (-1,)),
    "Vit-Large": ("vit_large_patch16_224", (-1,)),
    "Vit-Huge": ("vit_huge_patch14_224", (-1,)),  # 384 is no multiple of 14: 27 x 27 patches
}
BLIP = {"BLIP Vit-Base": (768, 12, 12), "BLIP Vit-Large": (1024, 24, 16)}  # width, depth, heads
KEYS = ("parameters", "flops")
VERSIONS = ("iccv", "arxiv")
COLUMNS = (
    "name", "version", "parameters_m", "published_parameters_m", "gmultiply_adds", "gflops", "published_gflops",
)  # fmt: skip
PARTS = ("towers", "prepare", "locate", "forward", "backward")


# ------------------------------------------------------------------------------ Table 8, counted
def image_encoder(backbone: str, size: int) -> Stages:
    """A timm network without its classifier, for pictures of `size`."""
    name, stages = BACKBONES[backbone]
    options = {"num_classes": 0} | ({"img_size": size} if name.startswith("vit") else {})
    return Stages(Cells(name, options=options), stages)


def self_locator(
    scale: str, version: str, channels: tuple[int, ...], levels: int | None = None
) -> SelfLocator:
    """With as many adaptors as a run has, or `levels`."""
    s = run_settings(scale, version)
    return SelfLocator(channels, LocatorConfig.of(s, levels=s.levels if levels is None else levels))


def run_settings(scale: str, version: str) -> Settings:
    """The settings of a run, with the default readings."""
    return Settings("slan", {"scale": scale, "version": version, "reading": "default"})


def retrieval_model(image: torch.nn.Module, version: str) -> SLAN:
    """What ranks pairs: contrast and matching, no queue, no momentum encoder, no word head."""
    s = run_settings("paper", version)
    towers = Towers(image, BertTower(BertConfig()), s.width)
    config = SLANConfig.of(s, mlm_weight=0.0, queue=0, momentum=0.0)
    return SLAN(towers, self_locator("paper", version, image.channels), config).eval()


def table8() -> list[dict]:
    """Rows of the towers alone and of the whole model beside the published numbers."""
    words = torch.zeros(1, TOKENS, dtype=torch.long), torch.ones(1, TOKENS, dtype=torch.bool)
    one = published("SLAN", 8).query("row == 'Ours'").set_index("column")["value"]
    four = published("SLAN-v1", 4).query("column == 'Params(M)'").set_index("row")["value"]
    rows = []
    for backbone in BACKBONES:
        with torch.device("meta"):
            image, pixels = image_encoder(backbone, SIZE), torch.zeros(1, 3, SIZE, SIZE)
            seen, shapes = cost(image, pixels), [m.shape for m in image(pixels)]
        maps = [torch.randn(shape) for shape in shapes]
        for version in VERSIONS:
            model = retrieval_model(CachedStages(image.channels), version)
            towers, locator = model.encoders.towers, model.locator

            def match(model: SLAN = model, maps: list[Tensor] = maps) -> None:
                model.match(model.encoders.image(maps, model.locator), model.encode_text(*words))

            with torch.no_grad():
                prepared, states = locator.prepare(maps), towers.text(*words)
            parts = {
                "image": seen,
                "text": cost(towers.text, *words, modules=[towers.text_encoder, towers.project_text]),
                "prepare": cost(
                    locator.prepare, maps, modules=[locator.decoder, locator.proposals, locator.embed]
                ),
                "locate": cost(locator.locate, prepared, states, words[1], modules=[locator.adaptors]),
            }
            bare = {key: seen[key] + parts["text"][key] for key in KEYS}
            whole = cost(match, modules=[model])
            whole = {key: whole[key] + seen[key] for key in KEYS}
            parts["heads"] = {key: whole[key] - sum(part[key] for part in parts.values()) for key in KEYS}
            if version == next(iter(VERSIONS)):
                rows.append({"name": f"towers {backbone}", "version": "", **scaled(bare)})
            rows.append({
                "name": f"SLAN {backbone}", "version": version, **scaled(whole),
                "published_parameters_m": float(four[f"Ours {backbone}"]),
                "published_gflops": float(one["FLOPS(G)"]) if backbone == "ResNet50" else None,
                "flops_over_towers": whole["flops"] / bare["flops"],
                "published_parameters_m_without_image": float(four[f"Ours {backbone}"]) - seen["parameters"] / 1e6,
                "parameters_m_without_image": (whole["parameters"] - seen["parameters"]) / 1e6,
                "parts": {part: scaled(count) for part, count in parts.items()},
            })  # fmt: skip
    return rows


def scaled(count: dict) -> dict[str, float]:
    """Millions of parameters, billions of operations in both conventions."""
    return {"parameters_m": count["parameters"] / 1e6, "gmultiply_adds": count["flops"] / 2e9,
            "gflops": count["flops"] / 1e9}  # fmt: skip


def readings(rows: list[dict]) -> dict:
    """The published numbers over ours, for each way to count; and the ways that come within 5 %."""
    with torch.device("meta"):
        decoder = parameters(BertLMHeadModel(BertConfig(is_decoder=True, add_cross_attention=True))) / 1e6
    found: dict = {"caption_decoder_parameters_m": decoder, "parameters": {}, "flops": {}, "blip": {}}
    for row in rows:
        if not row["version"]:
            continue
        name = f"{row['name']} {row['version']}"
        printed = row["published_parameters_m"]
        found["parameters"][name] = {
            "as built": printed / row["parameters_m"],
            "with a caption decoder": printed / (row["parameters_m"] + decoder),
        }
        if row["published_gflops"]:
            step = Step("paper", row["version"], size=SIZE, batch=2)
            training = cost(step.objective, modules=())["flops"] / 2e9  # two pairs
            ways = {
                "multiply-adds": row["gmultiply_adds"],
                "FLOPs": row["gflops"],
                "FLOPs of a training step": training,
            }
            found["flops"][name] = {way: row["published_gflops"] / ours for way, ours in ways.items()}
    for name, (width, depth, heads) in BLIP.items():
        count = blip(width, depth, heads)
        printed = published("SLAN", 8).query(f"row == '{name}'").set_index("column")["value"]
        found["blip"][name] = {
            **scaled(count),
            "published_parameters_m": float(printed["Params(M)"]),
            "published_gflops": float(printed["FLOPS(G)"]),
            "published_over_multiply_adds": float(printed["FLOPS(G)"]) / (count["flops"] / 2e9),
        }
    for column in ("parameters", "flops"):
        ways = next(iter(found[column].values()))
        found[f"{column}_fit"] = [
            way for way in ways if all(abs(one[way] - 1) <= CLOSE for one in found[column].values())
        ]
    return found


def blip(width: int, depth: int, heads: int) -> dict:
    """BLIP's matching of a picture and a caption: ViT, and BERT base with cross attention to its patches."""
    shape = {"hidden_size": width, "intermediate_size": 4 * width, "num_hidden_layers": depth,
             "num_attention_heads": heads, "image_size": SIZE, "patch_size": 16}  # fmt: skip
    model = BlipForImageTextRetrieval(
        BlipConfig(vision_config=shape, text_config={"encoder_hidden_size": width})
    ).eval()
    return cost(
        model, torch.zeros(1, TOKENS, dtype=torch.long), torch.zeros(1, 3, SIZE, SIZE), use_itm_head=True
    )


# ------------------------------------------------------------------------------ a training step, timed
def clock(device: torch.device) -> float:
    """CPU seconds of this process where it has one thread, else the wall's."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        return time.perf_counter()
    return time.process_time() if torch.get_num_threads() == 1 else time.perf_counter()


class Step:
    """A locator and the objective over towers, with a batch; each method is one step and gives seconds of its parts.

    Args:
        size, batch: other than the scale's.
        towers: those of another step, to share them.
    """

    def __init__(
        self,
        scale: str,
        version: str,
        *,
        size: int = 0,
        batch: int = 0,
        levels: int | None = None,
        towers: Towers | None = None,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ):
        s = run_settings(scale, version)
        torch.manual_seed(0)
        self.device, self.dtype = torch.device(device), dtype
        tiny = scale == "tiny"
        vocabulary, n = (164, 15) if tiny else (30522, TOKENS)
        b, size = batch or (s.batch_size if tiny else 8), size or s.size
        if towers is None:
            image = SmallStages() if tiny else image_encoder("ResNet50", size)
            bert = small_bert(vocabulary, width=s.width, depth=s.text_depth, heads=s.text_heads)
            towers = Towers(image, BertTower(bert if tiny else BertConfig()), s.width)
        self.towers = towers.train().to(self.device)
        self.locator = self_locator(scale, version, towers.channels, levels).train().to(self.device)
        # all four losses, also at the small scale, whose runs leave two of them out
        config = SLANConfig.of(s, mlm_weight=1.0, reg_weight=1.0)
        words = Words(vocabulary, 4, (0, 1, 2, 3, 4))
        self.model = SLAN(self.towers, self.locator, config, words=words).train().to(self.device)
        if self.model.queue is not None:
            fill(self.model.queue)
        lengths = torch.randint(n // 2, n + 1, (b, 1))
        lengths[0] = n
        place = torch.arange(n)[None]
        text = {"input_ids": torch.randint(5, vocabulary, (b, n)), "mask": place < lengths,
                "special": (place == 0) | (place == lengths - 1)}  # fmt: skip
        self.text = {name: value.to(self.device) for name, value in text.items()}
        self.pixels = torch.rand(b, 3, size, size, device=self.device)
        self.image_id = torch.arange(b, device=self.device)
        self.above = torch.randn(4, b, s.width, device=self.device) / b

    def timed(self, **parts: Callable) -> dict[str, float]:
        """Seconds of each part, which is given the one before, and of the backward pass of the last one's result."""
        times, value = [clock(self.device)], None
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
            for part in parts.values():
                value = part(value)
                times.append(clock(self.device))
        value.backward()
        times.append(clock(self.device))
        self.model.zero_grad(set_to_none=True)
        seconds = [after - before for before, after in pairwise(times)]
        return {"step": sum(seconds), **dict(zip((*parts, "backward"), seconds, strict=True))}

    def _towers(self, _) -> tuple:
        maps = self.towers.vision(self.pixels)
        words = self.towers.text(self.text["input_ids"], self.text["mask"])
        loss = (self.towers.pooled(maps) * self.above[0]).sum() + (words[:, 0] * self.above[1]).sum()
        return maps, words, loss

    def _locate(self, given: tuple) -> Tensor:
        prepared, words, loss = given
        found = self.locator.locate(prepared, words, self.text["mask"], self.text["special"])
        above = (found.picture * self.above[2]).sum() + (found.text * self.above[3]).sum()
        return loss + above + found.reg_loss.mean()

    def bare(self) -> dict[str, float]:
        return self.timed(towers=lambda _: self._towers(_)[2])

    def one_pass(self) -> dict[str, float]:
        return self.timed(
            towers=self._towers, prepare=lambda x: (self.locator.prepare(x[0]), *x[1:]), locate=self._locate
        )

    def objective(self) -> dict[str, float]:
        batch = {"image": {"pixels": self.pixels}, "text": self.text, "image_id": self.image_id}
        return self.timed(forward=lambda _: self.model(batch)["loss"])


@torch.no_grad()
def fill(queue) -> None:
    """Random unit vectors of as many other pictures."""
    for part in (queue.image, queue.text):
        part.copy_(F.normalize(torch.randn_like(part), dim=-1))
    queue.image_id.copy_(torch.arange(queue.size) + 10**6)
    queue.total.fill_(queue.size)


def in_turn(jobs: dict[str, Callable], repeats: int, device: torch.device) -> tuple[dict, dict]:
    """Every job once a round; the seconds of each, and on a GPU the largest memory over what was held before."""
    found: dict[str, list] = {name: [] for name in jobs}
    peak: dict[str, int] = {}
    for name, job in jobs.items():
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
            held = torch.cuda.memory_allocated()
            job()
            peak[name] = torch.cuda.max_memory_allocated() - held
        else:
            job()
    for _ in range(repeats):
        for name, job in jobs.items():
            found[name].append(job())
    return found, peak


def spread(values: list[float]) -> dict[str, float]:
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return {
        "median": statistics.median(values),
        "quartiles": [low, high],
        "min": min(values),
        "max": max(values),
    }


def measure(scale: str, repeats: int, *, batch: int = 0, device: torch.device | str = "cpu",
            dtype: torch.dtype = torch.float32, count: bool = True) -> dict:  # fmt: skip
    """Seconds of every kind of step, and their ratios to the bare towers of the same round; `count`: operations too."""
    device, shared, jobs = torch.device(device), None, {}
    for version in VERSIONS:
        step = Step(scale, version, batch=batch, towers=shared, device=device, dtype=dtype)
        if shared is None:
            shared, jobs["towers"] = step.towers, step.bare
        flat = Step(scale, version, batch=batch, levels=0, towers=shared, device=device, dtype=dtype)
        jobs |= {f"locator {version}": step.one_pass, f"objective {version}, no levels": flat.objective,
                 f"objective {version}": step.objective}  # fmt: skip
    runs, peak = in_turn(jobs, repeats, device)
    torch.manual_seed(0)  # of which words are hidden
    operations = {name: cost(job, modules=())["flops"] for name, job in jobs.items()} if count else {}
    bare = [run["step"] for run in runs["towers"]]
    lines = {}
    for name, times in runs.items():
        best = min(times, key=lambda run: run["step"])
        line = {
            "seconds": spread([run["step"] for run in times]),
            "parts_of_the_least": {k: v for k, v in best.items() if k != "step"},
            "over_towers": spread([run["step"] / base for run, base in zip(times, bare, strict=True)]),
        }
        if operations:
            line["operations"] = operations[name]
            line["operations_over_towers"] = operations[name] / operations["towers"]
        if peak:
            line["peak_growth_bytes"] = peak[name]
        lines[name] = line
    objective = {
        v: [[run["step"] for run in runs[f"objective {v}{n}"]] for n in ("", ", no levels")] for v in VERSIONS
    }
    return {
        "levels_over_none": {v: spread([a / b for a, b in zip(*both, strict=True)]) for v, both in objective.items()},
        "batch": len(step.pixels), "size": step.pixels.shape[-1], "tokens": step.text["mask"].shape[1],
        "dtype": str(dtype).removeprefix("torch."), "steps": lines,
        "reached": {v: lines[f"locator {v}"]["over_towers"]["median"] <= GOAL for v in VERSIONS},
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=7, help="rounds; three times as many tiny ones")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".json"))
    options = parser.parse_args()
    torch.set_num_threads(options.threads)

    rows = table8()
    fits = readings(rows)
    setups = {"tiny": measure("tiny", 3 * options.repeats), "paper": measure("paper", options.repeats)}
    gpu: dict | str = "not run: no GPU here"
    if torch.cuda.is_available():
        gpu = measure(
            "paper", 3 * options.repeats, batch=64, device="cuda", dtype=torch.bfloat16, count=False
        )
    content = {
        "date": str(date.today()),
        "parameters": {"threads": options.threads, "repeats": options.repeats, "goal": GOAL,
                       "clock": "CPU seconds" if options.threads == 1 else "wall seconds"},
        "table8": {"size": SIZE, "tokens": TOKENS, "rows": rows, "published_over_ours": fits},
        "steps": setups, "gpu": gpu,
        "device": device_name(), "versions": versions(), "commit": git_commit(),
    }  # fmt: skip
    write_json(options.out, content)

    print(tabulate([[row.get(name) for name in COLUMNS] for row in rows], COLUMNS, floatfmt=".1f"))
    print(*fits.items(), f"gpu: {gpu}" if isinstance(gpu, str) else "", sep="\n")
    lines = []
    for setup, found in (setups if isinstance(gpu, str) else {**setups, "gpu": gpu}).items():
        for name, line in found["steps"].items():
            ratio, parts = line["over_towers"], line["parts_of_the_least"]
            lines.append([
                setup, name, 1e3 * line["seconds"]["median"], *(1e3 * parts[p] if p in parts else None for p in PARTS),
                ratio["median"], *ratio["quartiles"], line.get("operations_over_towers"), line.get("peak_growth_bytes"),
            ])  # fmt: skip
    columns = ["setup", "step", "median ms", *PARTS, "x towers", "q1", "q3", "x operations", "peak bytes"]
    print(tabulate(lines, columns, floatfmt=".4g"))


if __name__ == "__main__":
    main()
