"""A model leaves its run as a folder and comes back without the data: the same scores, bit for bit."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hub_target import answers
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, BertModel, CLIPImageProcessor, CLIPModel

import finematch
from finematch import FELGA, HSLM, MVAM, SLAN, rebuild
from finematch.checkpoints import save_weights
from finematch.config import Settings
from finematch.data import digests, splits
from finematch.encoders import small_bert, small_clip
from finematch.features import inputs as features_inputs
from finematch.files import DataError
from finematch.runs import begin
from finematch.scenes.generator import TOKENIZER
from finematch.text import tokenise, word_level
from finematch.training import seed_everything

CLASSES = {"mvam": MVAM, "hslm": HSLM, "felga": FELGA, "slan": SLAN}
SCRIPT = Path(__file__).with_name("hub_target.py")


@pytest.fixture(scope="module")
def book(tmp_path_factory):
    """A workbook's folder with a small set, whose cache all methods share; published towers lie beside it."""
    base = tmp_path_factory.mktemp("hub")
    (base / "book/notebooks").mkdir(parents=True)
    (base / "book/pyproject.toml").touch()
    words = word_level(TOKENIZER)
    torch.manual_seed(0)
    BertModel(small_bert(len(words), width=24, depth=1, heads=2)).save_pretrained(base / "bert")
    config = small_clip(
        len(words), eos=words.sep_token_id, bos=words.cls_token_id, size=32, width=24, depth=1
    )
    CLIPModel(config).save_pretrained(base / "clip")
    side = {"shortest_edge": 32}, {"height": 32, "width": 32}
    CLIPImageProcessor(size=side[0], crop_size=side[1]).save_pretrained(base / "clip")
    for name in ("bert", "clip"):
        words.save_pretrained(base / name)
    with pytest.MonkeyPatch.context() as patch:
        for module in (splits, features_inputs):
            patch.setattr(module, "SMOKE", {"train": 80, "val": 40, "test": 20})
        patch.chdir(base / "book")
        yield base / "book"


PAPER = {"scale": "paper"}
CASES = {
    "mvam": {},
    "mvam-minilm": {"backbone": "grid", "text": "minilm"},
    "mvam-clip": {"backbone": "clip", "text": "clip"},
    "mvam-paper-clip": PAPER | {"backbone": "clip", "text": "clip", "clip_weights": "../clip"},
    "mvam-paper-bert": PAPER | {"backbone": "grid", "vision": "test_vit", "text_weights": "../bert"},
    "hslm": {},
    "felga": {},
    "slan": {},
    "slan-frozen": {"frozen": True, "levels": 0, "itm_weight": 0.0},
    "slan-paper": PAPER
    | {"vision": "resnet10t", "size": 64, "text_weights": "../bert", "queue": 64, "width": 32},
}


def run_of(case: str):
    """A smoke run as its page leaves it, but untrained: what is asked is whether it comes back the same."""
    method = case.split("-")[0]
    s = Settings(method, {"smoke": True, **CASES[case]})
    seed_everything(1)
    data = rebuild.open_gallery(s, Path(), {}) if method == "felga" else rebuild.open_inputs(s, Path())
    model = rebuild.build(s, data)
    records = {"gallery": data.sets.gallery} if method == "felga" else _of(data, "records")
    made = "" if method == "felga" else features_inputs.origin(_of(data, "images"))
    run = begin(method, s, data={name: digests(part) for name, part in records.items()}, features=made,
                out=f"papermill_runs/{method}/{case}", resume="fresh")  # fmt: skip
    save_weights(model, run.folder / "best.safetensors")
    run.finish({"rsum": 123.456}, seconds=1.0, protocol="a toy | of the test")
    return finematch.open_run(run.folder)


def _of(data, part: str) -> dict:
    return {name: getattr(split, part) for name, split in data.splits.items()}


def batch_of(run) -> dict:
    if run.method == "felga":
        parts = {"image": run.data.gallery.regions, "text": run.data.gallery.keywords}
        return {name: {"features": part.dense()[0][:3].float()} for name, part in parts.items()}
    side = run.data.splits["test"]
    return {"image": side.images.batch([0, 1, 2]), "text": side.texts.batch([0, 7, 14])}


@pytest.fixture(scope="module")
def saved(book):
    """`saved(case)`: a run, and the folder of its model."""
    found = {}

    def make(case: str):
        if case not in found:
            run = run_of(case)
            found[case] = run, run.save_pretrained(book.parent / "models" / case)
        return found[case]

    return make


@pytest.mark.parametrize("case", CASES)
def test_a_model_comes_back_without_its_data_and_scores_the_same(saved, tmp_path, case):
    """In another process and another folder, where there is neither a workbook nor a network."""
    run, folder = saved(case)
    folder = shutil.copytree(folder, tmp_path / "elsewhere")
    batch = batch_of(run)
    torch.save(batch, tmp_path / "batch.pt")
    command = [sys.executable, str(SCRIPT), run.method, str(folder), str(tmp_path / "batch.pt")]
    ran = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=os.environ | {
        "HF_HUB_CACHE": str(tmp_path / "none"), "HF_HUB_OFFLINE": "1"})  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    for one, other in zip(answers(run.model, batch), torch.load(tmp_path / "answers.pt"), strict=True):
        assert torch.isfinite(one).all()
        assert one.std() > 0
        assert torch.equal(one, other)


def test_config_and_card_say_what_the_run_was_and_nothing_of_the_machine(saved, book):
    run, folder = saved("mvam-paper-clip")
    text = {name: (folder / name).read_text() for name in ("config.json", "README.md")}
    for content in text.values():
        assert run.digest in content
        assert str(book) not in content
        assert "../clip" not in content
    content = json.loads(text["config.json"])
    assert content["settings"]["clip_weights"].startswith("sha256:")
    assert content["run"]["metrics"] == {"rsum": 123.456}
    card = text["README.md"]
    assert card.startswith("---\n")
    for said in ("license: mit", "library_name: finematch", "| rsum | 123.5 |", "arXiv 2402.17237", "MIT licence",
                 run.content["commit"], "a toy | of the test", run.identity["data"]["train"]["captions"]):  # fmt: skip
        assert said in card
    from huggingface_hub import ModelCard

    assert ModelCard.load(folder / "README.md").data.tags == ["image-text-matching", "mvam"]
    assert AutoTokenizer.from_pretrained(folder).get_vocab() == run.data.tokenizer.get_vocab()


def test_a_loaded_model_has_its_run_reads_captions_and_images_and_is_saved_again(saved, tmp_path):
    for case in ("mvam", "hslm", "slan", "mvam-paper-clip", "slan-paper"):
        run, folder = saved(case)
        state = torch.get_rng_state()
        model = CLASSES[run.method].from_pretrained(folder)
        assert torch.equal(state, torch.get_rng_state()), "opening a model draws from nobody's random numbers"
        assert (model.run.digest, model.run.metrics) == (run.digest, run.metrics)
        side = run.data.splits["test"]
        texts = tokenise(side.captions[:3], model.tokenizer).batch([0, 1, 2])
        assert all(torch.equal(value, side.texts.batch([0, 1, 2])[name]) for name, value in texts.items())
        scores = [finematch.match(of, side.records[0].image, side.captions[:2]) for of in (run, model.run)]
        assert [m.score for m in scores[0]] == [m.score for m in scores[1]]
        again = CLASSES[run.method].from_pretrained(model.run.save_pretrained(tmp_path / case))
        weights = [load_file(one / "model.safetensors") for one in (folder, tmp_path / case)]
        assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())
        assert json.loads((tmp_path / case / "config.json").read_text())["shape"] == json.loads(
            (folder / "config.json").read_text())["shape"]  # fmt: skip
        assert again.run.digest == run.digest


def test_what_is_no_model_is_refused_with_file_record_and_remedy(saved, tmp_path):
    _, good = saved("mvam")
    with pytest.raises(
        DataError, match=r"nowhere: the model: is no folder here, and the hub did not give it"
    ):
        MVAM.from_pretrained(tmp_path / "nowhere")
    with pytest.raises(DataError, match=r"somebody/mvam: the model: .*HF_HUB_OFFLINE"):
        MVAM.from_pretrained("somebody/mvam", cache_dir=tmp_path / "cache")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"config\.json: the file: cannot be read .*save_pretrained wrote"):
        MVAM.from_pretrained(tmp_path / "empty")
    with pytest.raises(DataError, match=r"config\.json: method: is 'mvam', not 'hslm'"):
        HSLM.from_pretrained(good)

    def broken(change) -> Path:
        folder = tmp_path / "broken"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(good, folder)
        change(folder)
        return folder

    def config(**changes):
        def change(folder):
            content = json.loads((folder / "config.json").read_text())
            for name, value in changes.items():
                content[name] = content[name] | value if isinstance(value, dict) else value
            (folder / "config.json").write_text(json.dumps(content))

        return change

    def cut(name):
        return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:-100])

    def other_weights(folder):
        state = load_file(folder / "model.safetensors")
        save_file(
            {name: value[:1].clone() for name, value in state.items() if value.ndim},
            folder / "model.safetensors",
        )

    def flipped(folder):
        content = bytearray((folder / "model.safetensors").read_bytes())
        content[-1] ^= 1
        (folder / "model.safetensors").write_bytes(content)

    weights = r"model\.safetensors: the weights: are"
    for change, message in (
        (config(method="vse"), r"config\.json: method: is 'vse', not 'mvam'.*MVAM, HSLM, FELGA, SLAN"),
        (config(shape={"depth": 3}), r"config\.json: shape: is of another version"),
        (config(shape={"features": 7}), weights + r" not those of config\.json"),
        (config(shape={"words": 7}), r"tokenizer\.json: the tokenizer: has \d+ words, config\.json says 7"),
        (config(settings={"pooling": "max"}), r"config\.json: settings: make no model \(pooling is 'max'"),
        (config(settings={"views": 7}), r"config\.json: settings: make no model \(split: 7 views do not divide"),
        (config(settings=None), r"config\.json: settings: is missing, or no dict"),
        (cut("config.json"), r"config\.json: the file: is not JSON"),
        (lambda folder: (folder / "config.json").write_text("[]"), r"config\.json: method: is missing"),
        (lambda folder: (folder / "model.safetensors").unlink(), weights + " missing"),
        (cut("model.safetensors"), weights + " not those"),
        (flipped, weights + " not those of .*damaged"),
        (other_weights, weights + " not those of .*another model"),
        (lambda folder: (folder / "tokenizer.json").unlink(), r"tokenizer\.json: the tokenizer: is missing"),
        (cut("tokenizer.json"), r"tokenizer\.json: the tokenizer: cannot be read"),
        (lambda folder: (folder / "network/cells.json").unlink(), r"cells\.json"),
    ):  # fmt: skip
        with pytest.raises(DataError, match=message):
            MVAM.from_pretrained(broken(change))


def test_an_ensemble_is_no_model(book):
    s = Settings("mvam", {"smoke": True, "ensemble": 2})
    run = begin("mvam", s, data={}, out="papermill_runs/mvam/ensemble", resume="fresh")
    save_weights(torch.nn.Linear(1, 1), run.folder / "member0/best.safetensors")
    run.finish({"rsum": 1.0}, seconds=1.0, protocol="toy")
    with pytest.raises(ValueError, match="an ensemble of 2 models"):
        finematch.open_run(run.folder).save_pretrained(book / "ensemble")
    assert not (book / "ensemble").exists()


def test_pushing_needs_a_network_and_leaves_nothing_behind(saved, tmp_path, monkeypatch):
    """As far as it goes here: the folder is made, and the hub's own client refuses while HF_HUB_OFFLINE is set."""
    from huggingface_hub.errors import OfflineModeIsEnabled

    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with pytest.raises(OfflineModeIsEnabled):
        saved("mvam")[0].push_to_hub("somebody/mvam", private=True, token="hf_none")
    assert list(tmp_path.iterdir()) == []
