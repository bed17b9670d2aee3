"""The package's own names, what importing costs, and a trained run's answer for a new image."""

import copy
import json
import subprocess
import sys
import warnings
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import finematch
from finematch import MVAM, rebuild
from finematch.__main__ import main
from finematch.checkpoints import save_weights
from finematch.config import Settings
from finematch.explore import box_texts, largest_top, see, unread
from finematch.files import DataError
from finematch.models.configs import MVAMConfig
from finematch.runs import write_metrics
from finematch.search import place, scores_of_set, search
from finematch.training import seed_everything, to_device


def loaded_by(code: str) -> set[str]:
    """Top-level modules that a fresh process has after `code`."""
    ask = f"import sys, json\n{code}\nprint(json.dumps(sorted(n for n in sys.modules if '.' not in n)))"
    done = subprocess.run([sys.executable, "-c", ask], capture_output=True, text=True, check=True)
    return set(json.loads(done.stdout.splitlines()[-1]))


def test_importing_is_cheap():
    assert not loaded_by("import finematch") & {"torch", "timm", "transformers", "numpy", "pandas"}
    assert not loaded_by("import finematch.files, finematch.config, finematch.hold") & {"torch", "pandas"}
    # what opens a run: torchvision costs as much as torch, image processors bring it and scipy along
    opener = loaded_by("from finematch import match\nimport finematch.rebuild")
    assert not opener & {"timm", "torchvision", "scipy", "matplotlib", "sklearn"}
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


# ------------------------------------------------------------------------------------------- an image of one's own
@pytest.fixture(scope="module")
def book(tmp_path_factory):
    """A workbook's folder whose cache all methods share."""
    folder = tmp_path_factory.mktemp("book")
    (folder / "notebooks").mkdir()
    (folder / "pyproject.toml").touch()
    return folder


@pytest.fixture
def run_of(book, monkeypatch):
    """`run_of(method, **changes)`: a smoke run as its page leaves it, but untrained: what is asked is whether it comes
    back the same."""
    monkeypatch.chdir(book)

    def make(method: str, **changes):
        s = Settings(method, {"smoke": True, **changes})
        folder = book / "papermill_runs" / method / "-".join(["run", *map(str, changes.values())])
        seed_everything(1)
        with monkeypatch.context() as patched:
            patched.setattr(rebuild, "load_best", lambda model, path: None)
            run = SimpleNamespace(method=method, settings=s, folder=folder, parameters=s.as_dict())
            _, model = rebuild.rebuild(run)
        folder.mkdir(parents=True, exist_ok=True)
        save_weights(model, folder / "best.safetensors")
        write_metrics(folder, s.as_dict(), {"rsum": 1.0}, seconds=1, protocol="smoke")
        with warnings.catch_warnings():  # without an identity it is a run of before there were any
            warnings.simplefilter("ignore")
            return finematch.open_run(folder), model

    return make


def check(found, sentence: str, size: tuple[int, int]) -> None:
    assert found.sentence == sentence
    assert np.isfinite(found.score)
    assert found.tokens
    assert found.looks
    for look in found.looks:
        assert look.boxes.shape == (len(look.weights), 4)
        assert np.isfinite(look.weights).all()
        assert (look.boxes >= -1e-3).all()
        assert (look.boxes <= np.array([*size, *size]) + 1e-3).all()
        assert look.words is None or len(look.words) == len(found.tokens)


CASES = [("mvam", {}), ("mvam", {"backbone": "grid", "text": "minilm"}), ("mvam", {"backbone": "clip", "text": "clip"}),
         ("hslm", {}), ("slan", {})]  # fmt: skip


@pytest.mark.parametrize(
    ("method", "changes"),
    CASES,
    ids=lambda part: str(part) if isinstance(part, str) else "-".join(part.values()),
)
def test_an_image_scores_as_it_does_in_its_dataset(run_of, method, changes):
    """The frozen network reads the file anew, and gives what the features of the dataset's images give."""
    run, model = run_of(method, **changes)
    side = run.data.splits[run.data.reported]
    record, sentences = side.records[2], [side.captions[10], side.captions[0]]
    found = finematch.match(run, record.image, sentences)
    for one, sentence in zip(found, sentences, strict=True):
        check(one, sentence, record.size or record.open().size)
    with torch.no_grad():
        image = model.encode_image(**to_device(side.images.batch([2, 2]), torch.device("cpu")))
        text = model.encode_text(**to_device(side.texts.batch([10, 0]), torch.device("cpu")))
        if method == "mvam":
            expected = (image.vector * text.vector).sum(1)
        elif method == "slan":
            expected = model.match(image, text)
        else:
            from finematch.models.hslm import tile_scores

            expected = tile_scores(model, side.images.batch, side.texts.batch)(
                torch.tensor([2]), torch.tensor([10, 0])
            )[0]
    assert [one.score for one in found] == pytest.approx(expected.tolist(), abs=2e-3)
    again = finematch.match(run, Image.open(record.image), sentences[1])
    assert again.score == pytest.approx(found[1].score, abs=1e-5)


def test_felga_looks_at_proposals_by_keyword(run_of):
    run, _ = run_of("felga")
    record = run.data.sets.gallery[0]
    sentence = record.captions[0]
    found, other = finematch.match(run, record.image, [sentence, "there"])
    check(found, sentence, record.open().size)
    assert found.score == pytest.approx(max(look.weights.max() for look in found.looks), abs=1e-6)
    assert [look.label for look in found.looks] == found.tokens
    assert other.looks


def test_what_cannot_be_scored_is_refused(run_of):
    run, _ = run_of("mvam")
    with pytest.raises(ValueError, match="at least one sentence"):
        finematch.match(run, "x.png", [])
    with pytest.raises(DataError, match=r"x\.png.*missing"):
        finematch.match(run, "x.png", "a red circle")


def test_a_run_says_that_its_data_are_others_now(book, monkeypatch):
    """Identity as the page states it; then the run says that it read other captions."""
    from finematch import data, runs
    from finematch.features import inputs

    monkeypatch.chdir(book)
    s = Settings("mvam", {"smoke": True, "views": 2})
    opened = rebuild.open_inputs(s, book)
    run = runs.begin(
        "mvam", s, data={name: data.digests(split.records) for name, split in opened.splits.items()},
        features=inputs.origin({name: split.images for name, split in opened.splits.items()}),
    )  # fmt: skip
    model = MVAM(*rebuild.towers(s, opened), MVAMConfig.of(s))
    save_weights(model, run.folder / "best.safetensors")
    run.finish({"rsum": 1.0}, seconds=1.0, protocol="smoke")
    again = finematch.open_run(run.folder)
    assert again.data.splits["test"].captions == opened.splits["test"].captions
    assert again.status == "current"
    file = run.folder / "metrics.json"
    content = json.loads(file.read_text())
    content["identity"]["data"]["test"]["captions"] = "0" * 64
    file.write_text(json.dumps(content))
    with pytest.warns(UserWarning, match=r"the data are others: test\.captions was 000000000000000"):
        assert finematch.open_run(run.folder).data


# ------------------------------------------------------------------------------------------- what the explorer shows
def two(run) -> tuple:
    """An image of the run's set as it is seen, a sentence, and what it found."""
    records = (
        run.data.gallery.records if run.method == "felga" else run.data.splits[run.data.reported].records
    )
    seen = see(run, records[1].image)
    return seen, records[1].captions[0], seen.match(records[1].captions[0])


def test_an_image_is_read_once(run_of, monkeypatch):
    run, _ = run_of("mvam")
    seen, sentence, found = two(run)
    monkeypatch.setattr(run.model, "encode_image", None)  # nothing is encoded again
    again, other = seen.match([sentence, "a red star"])
    assert again.score == pytest.approx(found.score, abs=1e-6)
    assert other.score != found.score


@pytest.mark.parametrize("changes", [{}, {"views": 4, "projection": "full"}, {"normalise": "per_view"}])
def test_what_the_views_add_is_the_score(run_of, changes):
    run, model = run_of("mvam", **changes)
    seen, sentence, found = two(run)
    v = model.views
    assert found.pairs.shape == (v, v)
    assert len(found.looks) == len(found.parts) == v
    assert found.parts.sum() == pytest.approx(found.score, abs=1e-5)
    with torch.no_grad():
        text = model.encode_text(**seen.texts([sentence])).vector[0].unflatten(0, (v, -1))
        image = seen.encoded.vector[0].unflatten(0, (v, -1))
    expected = torch.cosine_similarity(image[1], text[v - 1], dim=0)
    assert found.pairs[1, v - 1] == pytest.approx(float(expected), abs=1e-5)
    for look in found.looks:
        assert look.weights.sum() <= 1 + 1e-5
        assert look.words.sum() == pytest.approx(1, abs=1e-5)


FORMS = [{}, {"loc": False}, {"glob": False}, {"node_gate": "element"}, {"node_weights": "l1"}, {"cross": "gate"},
         {"include_special": False}, {"loc": False, "cross_attn": False}]  # fmt: skip


@pytest.mark.parametrize("changes", FORMS, ids=lambda form: "-".join(form) or "default")
def test_hslms_score_is_the_sum_of_its_parts(run_of, changes):
    from finematch.models.hslm import tile_scores, word_correlation

    run, model = run_of("hslm", **changes)
    seen, sentence, found = two(run)
    side = run.data.splits[run.data.reported]
    place = side.captions.index(sentence)
    with torch.no_grad():
        (score,) = tile_scores(model, side.images.batch, side.texts.batch)(
            torch.tensor([1]), torch.tensor([place])
        )[0]
        text = seen.texts([sentence])
        before, after, mask = model.text.stages(text["input_ids"], text["mask"], text["special"])
    assert found.parts.sum() + found.bias == pytest.approx(found.score, abs=1e-6)
    assert found.score == pytest.approx(float(score), abs=2e-3)
    assert len(found.nodes) == len(found.parts) == len(found.gates)
    assert found.nodes == found.words * changes.get("loc", True) + ["(whole)"] * changes.get("glob", True)
    assert ((found.gates > 0) & (found.gates < 1)).all()
    assert ("[CLS]" in found.words) == changes.get("include_special", True)
    n = len(found.words)
    for values, share, states in (
        (found.before, found.share_before, before),
        (found.after, found.share_after, after),
    ):
        assert values.shape == (n, n)
        np.testing.assert_allclose(values.diagonal(), 1, atol=1e-5)
        np.testing.assert_allclose(share, word_correlation(states, mask)[0].numpy(), atol=1e-6)
        assert share.sum() == pytest.approx(1, abs=1e-5)
    assert [look.label for look in found.looks] == found.words * changes.get("cross_attn", True)


@pytest.mark.parametrize("changes", [{}, {"backbone": "clip", "text": "clip"}])
def test_words_that_a_run_cannot_read(run_of, changes):
    run, _ = run_of("mvam", **changes)
    assert unread(run, "a red circle") == ([], "")
    unknown, rest = unread(run, "a zeppelin and a red circle " * 20 + "end")
    assert rest.endswith("circle end")
    assert set(unknown) == {"zeppelin"}


def test_every_proposal_is_won_by_one_keyword(run_of):
    run, model = run_of("felga")
    seen, _, found = two(run)
    won = [found.won(k) for k in range(len(found.tokens))]
    assert sorted(np.concatenate(won).tolist()) == list(range(len(found.boxes)))
    for k, mine in enumerate(won):
        values = found.similarity[mine]
        assert (values.argmax(1) == k).all()
        assert (np.diff(values[:, k]) <= 0).all()
    texts = box_texts(seen, 0, k=3)
    assert len({word for _, word, _ in texts}) == 3
    gallery = run.data.gallery
    with torch.no_grad():
        every = model.encode_words(torch.from_numpy(np.array(gallery.keywords.features, np.float32)))
        best = float((every @ seen.encoded[0, 0]).max())
    assert texts[0][0] == pytest.approx(best, abs=1e-5)
    assert [score for score, *_ in texts] == sorted((score for score, *_ in texts), reverse=True)
    for _, word, text in texts:
        assert word in text.lower()


def test_levels_hold_what_the_locator_found_and_what_moved_it(run_of):
    from finematch.models.slan.adaptor import offset

    run, model = run_of("slan")
    seen, sentence, found = two(run)
    with torch.no_grad():
        caption = model.encode_text(**seen.texts([sentence]))
        located = model.locate(seen.encoded, caption)
    real, size = located.valid[0], torch.tensor([*seen.image.size] * 2)
    words = model.locator.counted(caption.mask, caption.special)[0]
    assert words.sum() == words.numel() - 2  # [CLS] and [SEP], whose cosine is set to 0, are not found
    assert len(found.levels) == len(located.boxes) == len(model.locator.adaptors) + 1
    assert found.saliency == pytest.approx(located.scores[0][real].numpy())
    for i, level in enumerate(found.levels):
        np.testing.assert_allclose(level.boxes, (located.boxes[i, 0][real] * size).numpy(), atol=1e-4)
        fit = located.cosine[i, 0][real].masked_fill(~words, -torch.inf)
        np.testing.assert_allclose(level.scores, fit.amax(1).numpy(), atol=1e-6)
        assert (level.words == fit.argmax(1).numpy()).all()
    assert found.levels[-1].cells is None
    for adaptor, level, then in zip(model.locator.adaptors, found.levels, found.levels[1:], strict=False):
        extent = level.cells[:, -1, 2:] - level.cells[:, 0, :2]  # of the whole neighbourhood, in pixels
        given = torch.tensor(level.weights)[None], torch.tensor(extent)[None]
        moved = offset(*given, axes=adaptor.axes, unit=adaptor.unit)
        centre, after = ((one.boxes[:, :2] + one.boxes[:, 2:]) / 2 for one in (level, then))
        sides = then.boxes[:, 2:] - then.boxes[:, :2]
        free = np.clip(
            centre + moved[0].numpy(), sides / 2, np.array(seen.image.size) - sides / 2
        )  # it stops there
        np.testing.assert_allclose(after, free, atol=1e-2)


def test_the_filter_is_another_for_one_question_only(run_of):
    run, model = run_of("slan")
    seen, sentence, found = two(run)
    own = model.locator.filter
    was = own.top, own.threshold
    assert (found.top, found.threshold) == was
    few = seen.match(sentence, top=2, threshold=0.0)
    assert len(few.saliency) == 2
    all_of_them = seen.match(sentence, top=largest_top(model.locator), threshold=0.0)
    assert few.saliency == pytest.approx(all_of_them.saliency[:2])
    assert (seen.match(sentence, threshold=0.9).saliency[1:] > 0.9).all()
    assert (own.top, own.threshold) == was
    assert seen.match(sentence).score == found.score
    with pytest.raises(ValueError, match="T = 1000 must be 1 to"):
        seen.match(sentence, top=1000)
    with pytest.raises(ValueError, match="threshold 1"):
        seen.match(sentence, threshold=1.0)
    assert (own.top, own.threshold) == was


@pytest.mark.parametrize("method", ["mvam", "hslm", "felga", "slan"])
def test_an_image_has_its_place_among_those_of_the_set(run_of, method):
    run, _ = run_of(method)
    seen, sentence, found = two(run)
    records, scores = scores_of_set(run, sentence)
    assert scores[1] == pytest.approx(found.ranked, abs=2e-3)
    rank, of = place(records, scores, found.ranked, seen.file)
    assert of == len(records)
    assert rank == 1 + (np.delete(scores, 1) >= found.ranked).sum()
    assert place(records, scores, float(scores.max()) + 1) == (1, len(records) + 1)
    assert place(records, scores, float(scores.max())) == (2, len(records) + 1)  # a tie counts against it


# ------------------------------------------------------------------------------------------- search
@pytest.mark.parametrize("method", ["mvam", "hslm", "slan"])
def test_search_ranks_as_the_scores_do(run_of, method, tmp_path):
    """Over the set and over a folder with the same files: `match` gives each pair's score."""
    run, _ = run_of(method)
    side = run.data.splits[run.data.reported]
    sentence = side.captions[0]
    found = search(run, sentence, k=5)
    assert len(found) == 5
    scores = [hit.score for hit in found]
    assert scores == sorted(scores, reverse=True)
    each = {record.image: finematch.match(run, record.image, sentence).score for record in side.records[:8]}
    for hit in search(run, sentence, k=len(side.records), shortlist=len(side.records)):
        if hit.image in each:
            assert hit.score == pytest.approx(each[hit.image], abs=2e-3)
    for n, record in enumerate(side.records[:8]):
        (tmp_path / f"{n}.png").write_bytes(record.image.read_bytes())
    for hit in search(run, sentence, over=tmp_path):
        assert hit.score == pytest.approx(each[side.records[int(hit.image.stem)].image], abs=2e-3)
    (first, *_) = search(run, image=side.records[0].image, k=3)
    assert first.score == pytest.approx(
        finematch.match(run, side.records[0].image, first.caption).score, abs=2e-3
    )


def test_images_are_embedded_once_for_each_state_of_the_weights(run_of, monkeypatch):
    run, _ = run_of("mvam")
    first = [hit.score for hit in search(run, "a circle")]
    monkeypatch.setattr(run.model, "encode_image", None)  # nothing is encoded again
    assert [hit.score for hit in search(run, "a circle")] == first
    weights = run.folder / "best.safetensors"
    was = weights.read_bytes()
    try:
        other = copy.deepcopy(run.model)
        next(other.parameters()).data += 1
        save_weights(other, weights)
        with pytest.raises(TypeError, match="not callable"):  # other weights: made anew
            search(run, "a circle")
    finally:
        weights.write_bytes(was)


def test_search_by_fragments(run_of, tmp_path):
    run, _ = run_of("felga")
    records = run.data.gallery.records
    sentence = records[0].captions[0]
    each = {record.image: finematch.match(run, record.image, sentence).score for record in records[:4]}
    for hit in search(run, sentence, k=len(records)):
        if hit.image in each:
            assert hit.score == pytest.approx(each[hit.image], abs=2e-3)
    assert search(run, image=records[0].image, k=2)[0].caption


def test_what_cannot_be_searched_is_refused(run_of, tmp_path):
    run, _ = run_of("mvam")
    with pytest.raises(ValueError, match="a sentence, or an image"):
        search(run)
    with pytest.raises(ValueError, match="no captions"):
        search(run, image="x.png", over=tmp_path)
    with pytest.raises(DataError, match="has no image"):
        search(run, "a circle", over=tmp_path)
    (tmp_path / "broken.jpg").write_bytes(b"no image")
    with pytest.raises(DataError, match=r"broken\.jpg"):
        search(run, "a circle", over=tmp_path)


def test_the_command_line_gives_the_functions_numbers(run_of, capsys, tmp_path):
    run, _ = run_of("mvam")
    record = run.data.splits[run.data.reported].records[0]
    assert main(["look", str(run.folder), "--image", str(record.image), "--text", record.captions[0],
                 "--out", str(tmp_path / "look.png")]) == 0  # fmt: skip
    score, sentence = capsys.readouterr().out.strip().split("\t")
    assert sentence == record.captions[0]
    assert float(score) == pytest.approx(finematch.match(run, record.image, sentence).score, abs=1e-4)
    assert Image.open(tmp_path / "look.png").width > 300
    assert main(["search", str(run.folder), "--text", sentence, "-k", "3"]) == 0
    lines = [line.split("\t") for line in capsys.readouterr().out.splitlines()]
    assert [line[0] for line in lines] == ["1", "2", "3"]
    assert [float(line[1]) for line in lines] == [
        pytest.approx(hit.score, abs=1e-4) for hit in search(run, sentence, k=3)
    ]
    assert main(["look", str(run.folder), "--image", str(tmp_path / "none.png"), "--text", "a"]) == 1
    assert "none.png" in capsys.readouterr().err
    assert main(["runs", "--weights"]) == 0
    assert "run\tmvam\tscenes\t" in capsys.readouterr().out
