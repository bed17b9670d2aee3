"""Every notebook runs headless with smoke=True, in the order of the workbook, and leaves what it promises."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import nbformat
import papermill
import pytest
import torch
from filelock import FileLock
from notebook_text import NOTEBOOKS, ROOT, declaration
from safetensors.torch import load_file
from transformers import BertModel, CLIPImageProcessor, CLIPModel

from finematch.data import load
from finematch.data.shards import write_shards
from finematch.encoders import small_bert, small_clip
from finematch.runs import open_run
from finematch.scenes.generator import TOKENIZER, generate
from finematch.text import word_level, wordpiece

ORDER = [
    "0_start_here",
    "1_data",
    "mvam/1_lesson",
    "mvam/2_train",
    "mvam/3_ablations",
    "mvam/4_attention",
    "hslm/1_lesson",
    "hslm/2_train",
    "hslm/3_ablations",
    "hslm/4_attention",
    "felga/0_vlp",
    "felga/1_lesson",
    "felga/2_train",
    "felga/3_ablations",
    "felga/4_retrieval",
    "slan/1_lesson",
    "slan/2_train",
    "slan/3_ablations",
    "slan/4_regions",
    "slan/5_captioning",
    "slan/6_localization",
    "slan/7_vqa",
    "slan/8_nlvr2",
    "slan/9_video",
    "6_explore",
    "arena/2_train",
    "7_compare",
    "8_readings",
    "9_scorecard",
]
SOURCES = {str(path.relative_to(NOTEBOOKS).with_suffix("")) for path in NOTEBOOKS.rglob("*.py")} - {"build"}


def test_the_order_names_every_notebook():
    assert set(ORDER) == SOURCES


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """One folder for all tests of this file, also where they are spread over processes."""
    base = tmp_path_factory.getbasetemp()
    shared = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "workbook"
    shared.mkdir(exist_ok=True)
    return shared


def run_notebook(name, page, given, processes=1, cwd=ROOT, refused=False):
    """By papermill, as a person would; the executed page is `page`.ipynb, of several processes `page`.0.ipynb ...

    One process: the function that papermill's command calls, for starting the command takes seconds a page. Several:
    the command, by torchrun. `refused`: the page is expected to fail. Returns what papermill says of a failure.
    """
    if processes == 1:
        given = {key: str(value) if isinstance(value, Path) else value for key, value in given.items()}
        said = executed_here(NOTEBOOKS / f"{name}.ipynb", f"{page}.ipynb", given, str(cwd))
        assert bool(said) == refused, said[-4000:]
        return said
    command = [sys.executable, "-m", "papermill", "--no-progress-bar", "--cwd", str(cwd),
               str(NOTEBOOKS / f"{name}.ipynb"), f"{page}.$RANK.ipynb"]  # fmt: skip
    for key, value in given.items():
        command += ["-p", key, str(value)]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes),
               "--no-python", "bash", "-c", " ".join(command)]  # fmt: skip
    environment = {**os.environ, "MPLBACKEND": "agg", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    for _ in range(3):
        ran = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)
        if "Address already in use" not in ran.stderr:  # two kernels that start at once may be given one port
            break
    assert (ran.returncode != 0) == refused, ran.stderr[-4000:]
    return ran.stderr


def executed_here(notebook, page, given, cwd) -> str:
    """Executes a page in a kernel of its own; the error of its cell, or nothing."""
    for left_to_try in (2, 1, 0):
        try:
            papermill.execute_notebook(
                notebook, page, given, cwd=cwd, progress_bar=False, start_timeout=300, execution_timeout=900
            )
        except papermill.PapermillExecutionError as error:
            return str(error)
        except RuntimeError as error:  # two kernels that start at once may be given one port
            if not left_to_try or "before replying to kernel_info" not in str(error):
                raise
        else:
            return ""


def executed(name, folder):
    """Runs a notebook once, whoever asks first; where another process is at it, waits.
    What a notebook opens (`run`) is made before it."""
    with FileLock(folder / f"{name.replace('/', '-')}.lock"):
        done = folder / f"{name.replace('/', '-')}.done"
        if done.exists():
            return
        declared = declaration(NOTEBOOKS / f"{name}.py")
        given = {"smoke": True, "out": folder / name.replace("/", "-")}
        given |= {key: folder / key for key in ("figures", "cache") if key in declared}
        opened = next((key for key in ("run", "pretrained") if key in declared), None)
        if opened and not name.endswith("/2_train"):
            trained = f"{name.split('/')[0]}/2_train"
            executed(trained, folder)
            given[opened] = folder / trained.replace("/", "-")
        run_notebook(name, folder / name.replace("/", "-"), given)
        done.touch()


TASKS = {  # metrics of a task's page, and the file of results that it writes
    "slan/7_vqa": (
        {"vqa", "shuffled_vqa", "question_alone_vqa", "majority_vqa", "people_vqa"},
        "answers.json",
    ),
    "slan/8_nlvr2": (
        {"nlvr2_accuracy", "nlvr2_consistency", "shuffled_nlvr2_accuracy", "sentence_alone_nlvr2_accuracy"},
        "judgements.csv",
    ),
    "slan/9_video": (
        {
            f"{when}_{one}t2v_r5"
            for when in ("zero_shot", "fine_tuned")
            for one in ("", "contrast_", "shuffled_", "one_frame_")
        }
        | {"zero_shot_t2v_mdr", "fine_tuned_v2t_mdr"},
        None,
    ),
}


@pytest.mark.parametrize("name", ORDER)
def test_it_runs(name, folder):
    executed(name, folder)
    if name == "slan/5_captioning":
        found = json.loads((folder / "slan-5_captioning" / "metrics.json").read_text())["metrics"]
        beside = ("", "shuffled_", "nearest_", "frequent_")
        assert {f"{one}{key}_own_tokens" for one in beside for key in ("cider", "bleu4")} <= set(found)
        assert (folder / "figures" / "slan_captioning.scenes.levels-3.smoke.1.png").is_file()
    if name == "slan/6_localization":
        found = json.loads((folder / "slan-6_localization" / "metrics.json").read_text())["metrics"]
        assert {
            f"{one}_ap50"
            for one in ("zero_shot", "fine_tuned", "fine_tuned_shuffled", "uniform", "frequency")
        } <= set(found)
        assert len(list((folder / "figures").glob("slan_detection.scenes.levels-3.smoke.*.png"))) == 2
    if name in (
        "mvam/1_lesson",
        "hslm/1_lesson",
        "felga/1_lesson",
        "slan/1_lesson",
    ):  # an empty cell does not pass, a solution does
        page = nbformat.read(folder / f"{name.replace('/', '-')}.ipynb", as_version=4)
        for tag, sign in (("exercise", "✗"), ("solution", "✓")):
            cells = [c for c in page.cells if c.cell_type == "code" and tag in c.metadata.get("tags", [])]
            said = [cell.outputs[-1]["data"]["text/plain"] for cell in cells]
            assert len(said) >= 6
            assert all(one.startswith(sign) for one in said), said
    if name in TASKS:
        out = folder / name.replace("/", "-")
        wanted, file = TASKS[name]
        assert wanted <= set(json.loads((out / "metrics.json").read_text())["metrics"])
        assert file is None or (out / file).is_file()
        picture = name.split("_")[1]
        assert (folder / "figures" / f"slan_{picture}.scenes.levels-3.smoke.1.png").is_file()
        run = open_run(out)
        assert run.status == "current"
        assert not run.model.training
    if name.endswith("/2_train"):
        metrics = json.loads((folder / name.replace("/", "-") / "metrics.json").read_text())
        assert metrics["parameters"]["smoke"] is True
        if name.startswith("felga"):
            assert metrics["metrics"]["pictures"] == 40
            assert metrics["protocol"].startswith(
                "scenes test: object discovery, 8 class names x 40 pictures"
            )
            run = open_run(folder / name.replace("/", "-"))
            assert run.data.sets.gallery
            assert run.status == "current"  # the same data and features when it is opened again
            run.identity["data"]["gallery"] = {}
            assert run._changed(run.data).startswith("the data are others")
        else:
            assert metrics["metrics"]["images"] == 40
            assert metrics["protocol"].startswith("scenes test: 40 images x 200 captions")
    if "/4_" in name:
        pictures = name.replace("/4", "")  # mvam_attention, felga_retrieval
        assert len(list((folder / "figures").glob(f"{pictures}.*.png"))) >= 4


@pytest.mark.parametrize("method", ["mvam", "hslm", "felga", "slan"])
def test_a_lesson_runs_at_another_seed(method, folder):
    """What it asserts is no luck of seed 0; `make lesson-seeds` runs ten."""
    given = {"smoke": True, "seed": 1, "out": folder / f"{method}-seed", "cache": folder / "cache"}
    run_notebook(f"{method}/1_lesson", folder / f"{method}-lesson-seed-1", given)


def test_a_folder_never_mixes_two_runs(folder, tmp_path):
    """Other parameters in the `out` of a finished run: refused, or trained anew, never the old numbers renamed."""
    executed("mvam/2_train", folder)  # fills the cache
    (tmp_path / "notebooks").mkdir()
    (tmp_path / "pyproject.toml").touch()

    def train(page, refused=False, **given):
        given |= {"smoke": True, "cache": folder / "cache"}
        return run_notebook("mvam/2_train", tmp_path / page, given, cwd=tmp_path, refused=refused)

    train("one")
    (one,) = (tmp_path / "papermill_runs" / "mvam").glob("scenes.smoke.*/metrics.json")
    train("other", tau=0.5)
    (other,) = set(one.parents[1].glob("scenes.smoke.*/metrics.json")) - {one}
    first, second = one.read_text(), json.loads(other.read_text())
    assert second["parameters"]["tau"] == 0.5
    assert second["metrics"] != json.loads(first)["metrics"]

    message = train("refused", refused=True, tau=0.5, out=one.parent)
    assert f"tau was {json.loads(first)['parameters']['tau']}, is 0.5" in message
    assert "give another `out`" in message
    assert "resume='fresh'" in message
    assert one.read_text() == first

    train("fresh", tau=0.5, out=one.parent, resume="fresh")
    again = json.loads(one.read_text())
    assert (again["metrics"], again["identity"]) == (second["metrics"], second["identity"])


def test_the_arena_compares_the_runs_that_are_there(folder, tmp_path):
    """Two entrants under the names of the grid, one of which ranks again what the other finds: tables and pictures."""
    runs, shared = tmp_path / "arena", {"smoke": True, "cache": folder / "cache"}
    runs.mkdir()
    for row, given in (("two-stream", {}), ("scan", {"shortlist": runs / "scenes.smoke.two-stream.s0"})):
        ran("arena/2_train", runs / f"scenes.smoke.{row}.s0", **shared, entrant=row, **given)
    found = json.loads((runs / "scenes.smoke.scan.s0" / "metrics.json").read_text())["metrics"]
    assert {"short_rsum", "short_ms_query_1000", "ms_query_5000", "grounding_pointing_after"} <= set(found)
    given = {"smoke": True, "out": runs, "felga": tmp_path / "none", "figures": tmp_path / "figures"}
    run_notebook("7_compare", tmp_path / "compare", given)
    made = {path.name for path in (tmp_path / "figures").iterdir()}
    assert {f"arena_main.scenes.smoke.{kind}" for kind in ("csv", "md", "svg")} <= made
    assert "compare_looks.arena_main.scenes.smoke.png" in made
    page = nbformat.read(tmp_path / "compare.ipynb", as_version=4)
    said = " ".join(str(o.get("data", "")) for cell in page.cells for o in cell.get("outputs", []))
    assert "rsum, re-ranked" in said
    run = open_run(runs / "scenes.smoke.scan.s0")
    assert run.status == "current"
    assert not run.model.training


@pytest.fixture
def pretraining(tmp_path):
    """Small parts for `scale=paper`: two sets of shards and a BERT; the parameters of `2_train`, and `shards`."""
    generate(tmp_path / "drawn" / "scenes", train=40, val=8, test=8)
    records = load("scenes", tmp_path / "drawn", "train")
    for name, part in (("one", records[:24]), ("two", records[24:])):
        write_shards(part, tmp_path / name, samples_per_shard=4, echo=None)
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *sorted(word_level(TOKENIZER).get_vocab())]
    (tmp_path / "words.txt").write_text("\n".join(dict.fromkeys(words)))
    bert = tmp_path / "bert"
    wordpiece(tmp_path / "words.txt").save_pretrained(bert)
    BertModel(small_bert(len(dict.fromkeys(words)), width=24, depth=1, heads=2)).save_pretrained(bert)
    given = {
        "scale": "paper", "smoke": True, "cache": tmp_path / "cache", "vision": "resnet18", "text_weights": bert,
        "width": 24, "size": 64, "batch_size": 8, "queue": 16, "levels": 1, "rerank": 2, "query_depth": 1,
        "precision": "no",
    }  # fmt: skip
    return given, f"one:{tmp_path / 'one'},two:{tmp_path / 'two'}"


def test_slan_pretrains_at_the_papers_scale_on_shards_and_goes_on_from_there(tmp_path, pretraining):
    """Pixels, a network to train, BERT's files, two sets of shards, queues, momentum, masks; then fine-tuning."""
    given, shards = pretraining
    first = ran("slan/2_train", tmp_path / "pretrained", **given, shards=shards)
    assert first["parameters"]["mlm_weight"] == first["parameters"]["reg_weight"] == 1
    log = json.loads((tmp_path / "pretrained" / "log.jsonl").read_text().splitlines()[-1])
    assert log["steps"] == 5
    assert {"itc", "itm", "mlm", "reg"} <= set(log)
    weights = tmp_path / "pretrained" / "best.safetensors"
    tuned = ran("slan/2_train", tmp_path / "tuned", **given, pretrained=weights, mlm_weight=0.0, lr=1e-9)
    assert tuned["parameters"]["mlm_weight"] == 0
    as_it_is = ran(
        "slan/2_train", tmp_path / "zero", **given, pretrained=weights, mlm_weight=0.0, zero_shot=True
    )
    assert not (tmp_path / "zero" / "best.safetensors").exists()
    # The same weights on the same split; a step of tuning would have moved the means of the batch norms.
    measured = [name for name in first["metrics"] if name.endswith(("rsum", "_after"))]
    assert {"rsum", "itc_rsum", "grounding_level0_r1_after", "grounding_level1_r1_after"} <= set(measured)
    for name in measured:
        assert as_it_is["metrics"][name] == pytest.approx(first["metrics"][name]), name
        assert as_it_is["metrics"][name] == as_it_is["metrics"].get(name.replace("_after", "_before")), name
    assert as_it_is["metrics"]["best_epoch"] == 0
    before, after = (load_file(tmp_path / run / "best.safetensors") for run in ("pretrained", "tuned"))
    assert {name.partition(".")[0] for name in set(before) - set(after)} == {"masked"}
    moved = {
        name for name in set(before) & set(after) if not torch.allclose(before[name], after[name], atol=1e-6)
    }
    same = {name for name in moved if not name.startswith(("momentum.", "queue.", "steps"))}
    assert not {
        name for name in same if "running_" not in name and "num_batches" not in name
    }  # at a rate of 1e-9


def test_slan_refuses_to_pretrain_on_what_it_reports(tmp_path, pretraining):
    given, _ = pretraining
    generate(tmp_path / "drawn" / "again" / "scenes", train=8, val=4, test=4)
    held = load("scenes", tmp_path / "drawn" / "again", "test")
    write_shards(held, tmp_path / "leak", samples_per_shard=2, echo=None)
    given |= {
        "data_root": tmp_path / "drawn" / "again",
        "smoke": False,
        "shards": f"leak:{tmp_path / 'leak'}",
    }
    message = run_notebook(
        "slan/2_train", tmp_path / "page", {**given, "out": tmp_path / "out"}, refused=True
    )
    assert "4 of the 4 images of test are in these shards" in message
    assert not (tmp_path / "out").exists()


def test_slan_pretrains_in_two_processes(tmp_path, pretraining):
    """By torchrun, each with a kernel and a page of its own: both train, the first evaluates and writes."""
    given, shards = pretraining
    given |= {
        "vision": "vit_tiny_patch16_224",
        "version": "arxiv",  # whose queries leave parts of the pyramid unused
        "workers": 2,
        "checkpoint_steps": 2,
    }
    metrics = ran("slan/2_train", tmp_path / "both", processes=2, **given, shards=shards)
    assert metrics["metrics"]["images"] == 40
    log = json.loads((tmp_path / "both" / "log.jsonl").read_text().splitlines()[-1])
    assert {"itc", "itm", "mlm", "reg"} <= set(log)
    assert log["steps"] == 5  # 40 pictures by a whole batch of 8, as in one process
    pages = [json.loads((tmp_path / f"both.{rank}.ipynb").read_text()) for rank in (0, 1)]
    assert [left(page) for page in pages] == [False, True]
    state = load_file(tmp_path / "both" / "best.safetensors")
    assert int(state["steps"]) == 5
    assert any(name.startswith("locator.decoder.simple.") for name in state)  # of a plain ViT's last map
    assert not any(".cells.net.head." in name for name in state)  # no classifier


@pytest.mark.parametrize("method", ["mvam", "hslm", "felga", "slan"])
def test_any_method_trains_in_two_processes(tmp_path, folder, method):
    """As many steps, and of the whole batch: only the first process evaluates and writes."""
    name = f"{method}/2_train"
    executed(name, folder)  # by one process, and what both need is in the cache then
    ran(name, tmp_path / "both", processes=2, smoke=True, cache=folder / "cache", threads=1)
    logs = [
        [json.loads(line) for line in (where / "log.jsonl").read_text().splitlines()]
        for where in (tmp_path / "both", folder / name.replace("/", "-"))
    ]
    assert [line["steps"] for line in logs[0]] == [line["steps"] for line in logs[1]]
    assert all(math.isfinite(line["loss"]) for line in logs[0])
    pages = [json.loads((tmp_path / f"both.{rank}.ipynb").read_text()) for rank in (0, 1)]
    assert [left(page) for page in pages] == [False, True]


def left(page: dict) -> bool:
    """Whether a page ended after training, as those of all processes but the first do."""
    return any(
        output.get("ename") == "SystemExit" for cell in page["cells"] for output in cell.get("outputs", ())
    )


def ran(name, out, processes=1, **given) -> dict:
    """The metrics file of a notebook's run."""
    run_notebook(name, out, given | {"out": out}, processes)
    return json.loads((out / "metrics.json").read_text())


def test_mvam_alone_trains_a_given_clip_in_two_stages(tmp_path):
    """4.4: "For MVAM-CLIP, we train it in 2 stages". +Attn is the paper's Base-CLIP, which has one rate."""
    tokenizer = word_level(TOKENIZER)
    sizes = {
        "eos": tokenizer.sep_token_id,
        "bos": tokenizer.cls_token_id,
        "size": 64,
        "width": 16,
        "depth": 1,
    }
    CLIPModel(small_clip(len(tokenizer), **sizes)).save_pretrained(tmp_path / "clip")
    tokenizer.save_pretrained(tmp_path / "clip")
    CLIPImageProcessor(size={"shortest_edge": 64}, crop_size=64).save_pretrained(tmp_path / "clip")
    given = {"smoke": True, "backbone": "clip", "text": "clip", "clip_weights": str(tmp_path / "clip")}
    for pooling, stages in (("attention", []), ("mvam", ["stage1", "stage2"])):
        ran("mvam/2_train", tmp_path / pooling, **given, pooling=pooling, views=1 if not stages else 4)
        assert sorted(path.name for path in (tmp_path / pooling).glob("stage*")) == stages


def test_phrases_are_grounded_from_the_same_run_and_the_run_opens_again(folder):
    executed("slan/2_train", folder)
    given = {
        "smoke": True,
        "task": "grounding",
        "out": folder / "grounding",
        "pretrained": folder / "slan-2_train",
    }
    given |= {key: folder / key for key in ("figures", "cache")}
    run_notebook("slan/6_localization", folder / "slan-grounding", given)
    run = open_run(folder / "grounding")
    for name in ("zero_shot", "fine_tuned", "fine_tuned_shuffled", "salient"):
        assert {f"{name}_r1", f"{name}_merged_r1"} <= set(run.metrics)
    assert "AnyBox" in run.content["protocol"]
    assert run.metrics["phrases"] > 0
    assert run.model.reduce == "max"
    assert run.status == "current"
