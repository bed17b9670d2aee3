"""The arena: one budget for all, rounds that go on through the epochs, own recipes, costs of one scale."""

import importlib.util
import json
import math

import pytest
import torch
import training_target as target
from notebook_text import ROOT

from finematch import arena, config, entrants, grids, tables
from finematch.config import PRESETS, Settings, declared
from finematch.evaluation.retrieval import retrieval_from_scores
from finematch.models.hslm import HSLM
from finematch.models.mvam import MVAM
from finematch.models.rivals import PVSE, SAF, SCAN
from finematch.models.slan.objective import SLAN
from finematch.runs import identity_of, status_of, versions_of
from finematch.training import EpochBatches, Plan, Rounds, fit

KINDS = {"two-stream": MVAM, "pvse": PVSE, "mvam-1": MVAM, "mvam": MVAM, "scan": SCAN, "saf": SAF,
         "hslm-global": HSLM, "hslm": HSLM, "slan": SLAN}  # fmt: skip
each_entrant = pytest.mark.parametrize("name", KINDS)


def settings(**given):
    return Settings("arena", given)


# ------------------------------------------------------------------------------------------- the budget
def test_the_budget_is_minutes_over_seconds_a_step_in_equal_rounds():
    s = settings(budget_minutes=5.0, seconds_a_step=0.2, rounds=5)
    assert arena.steps(s) == 300
    assert arena.steps(s.replace(seconds_a_step=0.4)) == 150
    assert arena.steps(s.replace(budget_minutes=0.001)) == 1


@each_entrant
@pytest.mark.parametrize("dataset", ["scenes", "flickr8k"])
def test_every_entrant_has_the_same_minutes_and_seconds_that_were_measured(name, dataset):
    s = settings(entrant=name, dataset=dataset)
    base = settings(entrant="two-stream", dataset=dataset)
    assert (s.budget_minutes, s.rounds) == (base.budget_minutes, base.rounds)
    measured = json.loads((ROOT / "benchmarks" / "arena_step.json").read_text(encoding="utf-8"))[
        "seconds_a_step"
    ]
    assert s.seconds_a_step == measured[dataset][name]
    spent = s.rounds * arena.steps(s) * s.seconds_a_step / 60
    assert spent == pytest.approx(s.budget_minutes, rel=0.02)


def test_the_presets_hold_what_the_benchmark_measured():
    spec = importlib.util.spec_from_file_location("arena_step", ROOT / "benchmarks" / "arena_step.py")
    benchmark = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(benchmark)
    text = (PRESETS / "arena.toml").read_text(encoding="utf-8")
    content = json.loads((ROOT / "benchmarks" / "arena_step.json").read_text(encoding="utf-8"))
    assert benchmark.in_presets(text, content["seconds_a_step"]) == text
    assert benchmark.in_presets(text, {"scenes": {"saf": 9.0}}).count("[[when]]") < text.count("[[when]]")


def test_rows_of_the_grids_have_measured_seconds_too():
    measured = json.loads((ROOT / "benchmarks" / "arena_step.json").read_text(encoding="utf-8"))[
        "seconds_a_step"
    ]
    main, detected = grids.grid("arena_main"), grids.grid("arena_detected")
    s = grids.settings(main, "slan-detector", scale="tiny", dataset="scenes")
    assert s.seconds_a_step == measured["scenes"]["slan, detector"]
    for row in detected.rows:
        s = grids.settings(detected, row, scale="tiny", dataset="flickr8k")
        assert s.seconds_a_step == measured["flickr8k"][f"{s.entrant}, detected"], row


# ------------------------------------------------------------------------------------------- rounds
class Numbered:
    """Items that are their numbers."""

    def __len__(self):
        return 10

    def __getitems__(self, index):
        return {"x": torch.tensor(index)}


def rows(rounds, epoch, first=0):
    place = {
        "seed": 4,
        "epoch": epoch,
        "first": first,
        "rank": 0,
        "world": 1,
        "workers": 0,
        "pin_memory": False,
    }
    return [batch["x"].tolist() for batch in rounds.batches(3, **place)]


def test_rounds_go_on_through_the_orders_of_the_epochs():
    rounds = Rounds(Numbered(), 4)
    assert rounds.steps(3, 1) == 4
    orders = [batch for epoch in range(3) for batch in EpochBatches(10, 3, seed=4, epoch=epoch)]
    assert rows(rounds, 0) + rows(rounds, 1) == orders[:8]
    assert rows(rounds, 1, first=3) == orders[7:8]
    assert rows(rounds, 1, first=1) == orders[5:8]


def test_a_run_in_rounds_that_was_killed_ends_as_an_unbroken_one(tmp_path):
    plan = Plan(epochs=3, batch_size=8, lr=0.01, checkpoint_steps=2)

    class Dies(target.Toy):
        left = 8

        def forward(self, batch):
            type(self).left -= 1
            if type(self).left == 0:
                raise KeyboardInterrupt
            return super().forward(batch)

    def run(model, folder):
        torch.manual_seed(0)
        return fit(model, Rounds(target.Data(), 5), plan, folder, echo=None)

    torch.manual_seed(1)
    whole = target.Toy()
    start = {name: value.clone() for name, value in whole.state_dict().items()}
    assert run(whole, tmp_path / "whole")["steps"] == 15
    killed, again = Dies(), target.Toy()
    killed.load_state_dict(start)
    again.load_state_dict(start)
    with pytest.raises(KeyboardInterrupt):
        run(killed, tmp_path / "killed")
    run(again, tmp_path / "killed")
    for name, value in whole.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name


# ------------------------------------------------------------------------------------------- entrants
@each_entrant
def test_an_entrant_has_the_recipe_of_its_method(name):
    s = settings(entrant=name)
    own = entrants.own_settings(s)
    assert own.method == entrants.BESIDE[name]
    assert own.reading == "default"
    assert entrants.own_settings(settings(entrant=name, reading="literal")).reading == "literal"
    for reading in ("default", "literal"):
        assert (
            entrants.own_settings(settings(entrant=name, scale="paper", reading=reading)).reading == reading
        )
    plain = Settings(own.method, {})
    changed = {key: value for key, value in own.as_dict().items() if plain.as_dict()[key] != value}
    of_mvam = {"places"} if own.method == "mvam" else set()  # HSLM's regions have none
    assert set(changed) <= {"text", "precision"} | of_mvam | set(entrants.OWN.get(name, ()))
    assert s.batch_size == own.batch_size == plain.batch_size


@each_entrant
def test_a_run_holds_the_presets_of_its_method(name, monkeypatch):
    """What the arena's page does not name belongs to the run all the same: a preset that is edited makes other runs."""
    s = settings(entrant=name)
    method = entrants.BESIDE[name]

    def identity(**made):
        return identity_of("arena", s, data={}, recipe=entrants.own_settings(s), **made)

    was = identity()
    assert (was["recipe"]["method"], was["recipe"]["numerics"]) == (method, Settings(method, {}).numerics)
    assert not was["recipe"]["settings"].keys() & was["settings"].keys()
    content = {"parameters": s.as_dict(), "identity": was, "commit": "unknown"}
    assert grids._recipe_changed(content) == []
    assert versions_of(content) == [(s.numerics, s.numerics), (was["recipe"]["numerics"],) * 2]
    moved = content | {
        "identity": was | {"recipe": was["recipe"] | {"numerics": 99}}
    }  # seeds of a row share it
    assert tables._conditions(moved) != tables._conditions(content)
    without = {key: value for key, value in was.items() if key != "recipe"}
    assert "does not say the presets" in status_of(content | {"identity": without})
    preset = config._file(method)
    tiny = {**preset["settings"]["lr"], "tiny": 0.123}
    edited = {**preset, "numerics": preset["numerics"] + 3, "settings": {**preset["settings"], "lr": tiny}}
    monkeypatch.setattr(
        config, "_file", lambda asked, real=config._file: edited if asked == method else real(asked)
    )
    config.declared.cache_clear()
    assert grids._recipe_changed(content) == [
        f"{method}'s lr was {was['recipe']['settings']['lr']!r}, is 0.123"
    ]
    assert "its arithmetic is version" in status_of(content)
    assert identity() != was
    monkeypatch.undo()
    config.declared.cache_clear()
    assert identity() == was


def test_what_a_detector_has_learned_belongs_to_the_run(tmp_path):
    s, found = settings(entrant="slan", detector="boxes"), []
    for text in ("one", "one", "two"):
        (tmp_path / "weights").write_text(text)
        found.append(identity_of("arena", s, data={}, made={"detector": tmp_path / "weights"}))
    assert found[0] == found[1] != found[2]


def test_a_row_that_no_reading_changes_is_one_run_for_both():
    """Of MVAM's recipe lambda alone has another literal value on scenes: who has no views, or one, is the same run
    under both readings. On photos the text has no dropout of features either, so that nobody is."""
    grid = grids.grid("arena_main")
    same = {row for row in grid.rows if grids.shared(grid, row, "scenes", "tiny")}
    assert same == {"two-stream", "pvse", "mvam-1"}
    assert not any(grids.shared(grid, row, "flickr8k", "tiny") for row in grid.rows)


@each_entrant
def test_a_factor_of_the_learning_rate_reaches_the_plan(name):
    once, twice = (entrants.own_settings(settings(entrant=name, lr_times=times)) for times in (1.0, 2.0))
    assert twice.lr == pytest.approx(2 * once.lr)
    assert {key for key, value in twice.as_dict().items() if once.as_dict()[key] != value} == {"lr"}


def test_slans_rounds_of_contrast_are_a_share_of_all():
    for share, expected in ((0.8, 4), (0.4, 2), (0.0, 0), (1.0, 4)):
        s = settings(entrant="slan", contrast_share=share, rounds=5)
        assert arena.first_rounds(s, entrants.own_settings(s)) == expected
    s = settings(entrant="slan", scale="paper", rounds=20)
    assert arena.first_rounds(s, entrants.own_settings(s)) == 0  # the paper's recipe has no such start


def test_slan_over_a_detector_has_the_settings_of_its_reference_rows():
    """`detector-frozen` and `detected-3`, but for the scores' form: the claim speaks of a frozen detector."""
    main, photos = grids.grid("slan_boxes"), grids.grid("slan_photos", "flickr8k")
    for detector, table, row, dataset in (
        ("boxes", main, "detector-frozen", "scenes"),
        ("boxes.json", photos, "detected-3", "flickr8k"),
    ):
        wanted = grids.settings(table, row, scale="tiny", dataset=dataset).as_dict()
        own = entrants.own_settings(settings(entrant="slan", detector=detector, dataset=dataset)).as_dict()
        assert {name for name in own if own[name] != wanted[name]} <= {
            "precision",
            "detector",
            "score_norm",
        }, row


def test_every_entrant_is_a_choice_and_stands_in_a_grid():
    assert set(declared("arena")["entrant"].choices) == set(entrants.BESIDE) == set(KINDS)
    for name in ("arena_main", "arena_detected"):
        assert {cells["entrant"] for cells in grids.grid(name).rows.values()} == set(KINDS)


@pytest.fixture(scope="module")
def opened(tmp_path_factory):
    """Entrants on smoke scenes, each opened once."""
    cache, found = tmp_path_factory.mktemp("cache"), {}

    def one(name):
        if name not in found:
            found[name] = arena.open_entrant(settings(entrant=name, smoke=True, cache=str(cache)), ROOT)
        return found[name]

    return one


@each_entrant
def test_an_entrant_trains_ranks_and_looks(opened, name, tmp_path):
    entrant = opened(name)
    assert type(entrant.model) is KINDS[name]
    summary = arena.train(entrant, tmp_path, identity="x", precision="no")
    assert summary["steps"] == 6
    assert summary["cpu_seconds"] > 0
    found = arena.ranked(entrant, entrant.test, split="scenes test")
    assert (found["images"], found["captions"]) == (40, 200)
    assert found["protocol"].startswith("scenes test: 40 images x 200 captions")
    from finematch.evaluation.phrases import annotated_phrases

    records = annotated_phrases("scenes", entrant.inputs.data_root, "test", entrant.test.records)
    phrases = arena.phrases(entrant, records[:10])
    assert bool(phrases) == (name not in ("two-stream", "hslm-global"))
    assert all(torch.isfinite(phrase.scores).all() for phrase in phrases)
    if phrases and name != "slan":
        assert {len(phrase.scores) for phrase in phrases} == {20}


@pytest.mark.parametrize("name", ["mvam", "pvse", "hslm"])
def test_a_round_ranks_the_first_images_of_val_alone_for_every_entrant(opened, name):
    entrant = opened(name)
    val = entrant.inputs.splits["val"]
    entrant.model.eval()
    found = arena.ranked(entrant, val, pictures=7)
    assert (found["images"], found["captions"]) == (7, 35)
    s = arena.Entrant(entrant.s.replace(val_pictures=7), entrant.own, entrant.inputs, entrant.model)
    assert arena.ranked_rounds(s)["rsum"] == pytest.approx(found["rsum"])


def test_no_entrant_is_told_where_regions_lie(opened):
    for name in ("two-stream", "pvse", "mvam-1", "mvam"):
        assert opened(name).model.vision.place is None
    batch = opened("mvam").test.images.batch([0, 1])
    for name in ("mvam", "hslm", "saf"):
        model = opened(name).model.eval()
        moved = batch | {"places": 1 - batch["places"]}
        here, there = (model.encode_image(**images) for images in (batch, moved))
        assert all(torch.equal(a, b) for a, b in zip(here, there, strict=True) if a is not None), name


@pytest.mark.parametrize("name", ["pvse", "scan", "saf", "hslm"])
def test_ranking_in_blocks_is_ranking_the_whole_matrix(opened, name):
    entrant = opened(name)
    entrant.model.eval()
    scorer = arena.block_scores(entrant.model, entrant.test)
    every = scorer(torch.arange(40), torch.arange(200))
    part = scorer(torch.arange(5, 9), torch.arange(20, 50))
    torch.testing.assert_close(part, every[5:9, 20:50], rtol=0, atol=1e-5)
    found = arena.ranked(entrant, entrant.test)
    whole = retrieval_from_scores(every, entrant.test.image_of)
    assert found["rsum"] == pytest.approx(whole["rsum"], abs=2.0)  # near ties


@pytest.mark.parametrize("name", ["scan", "saf", "hslm", "hslm-global"])
def test_a_shortlist_of_everything_ranks_as_the_entrant_itself(opened, name):
    entrant = opened(name)
    whole = arena.Entrant(entrant.s.replace(rerank=200), entrant.own, entrant.inputs, entrant.model.eval())
    found = arena.reranked(whole, opened("two-stream").model.eval())
    assert found["rsum"] == pytest.approx(arena.ranked(entrant, entrant.test)["rsum"], abs=2.0)
    few = arena.Entrant(entrant.s.replace(rerank=1), entrant.own, entrant.inputs, entrant.model)
    first = arena.reranked(few, opened("two-stream").model)
    own = arena.ranked(opened("two-stream"), entrant.test)
    assert first["t2i_r1"] == pytest.approx(own["t2i_r1"])  # one candidate: the shortlist's own order


@each_entrant
def test_costs_are_positive_and_a_larger_gallery_costs_no_less(opened, name, monkeypatch):
    monkeypatch.setattr(arena, "SIZES", (20, 4000))
    entrant = opened(name)
    short = opened("two-stream").model.eval() if entrant.pairwise else None
    found = arena.query_costs(entrant, short, queries=2)
    assert all(math.isfinite(value) and value > 0 for value in found.values())
    assert {"us_pair", "ms_query_20", "ms_query_4000"} <= set(found)
    assert (
        ("short_ms_query_20" in found) == entrant.pairwise == (name in ("scan", "saf", "hslm", "hslm-global"))
    )
    assert ("itc_ms_query_20" in found) == (name == "slan")
    if entrant.pairwise:
        assert found["ms_query_4000"] > found["ms_query_20"]


def test_the_views_of_mvam_join_words_and_regions(opened):
    """sum_v A_text[v, l] A_image[v, n] of a phrase's words, by hand."""
    from finematch.evaluation.phrases import annotated_phrases

    entrant = opened("mvam")
    (record, *_) = annotated_phrases("scenes", entrant.inputs.data_root, "test", entrant.test.records)
    row = next(i for i, one in enumerate(entrant.test.records) if one.image_id == record.image_id)
    (first, *_) = sorted(record.phrases, key=lambda phrase: phrase.caption)
    found = arena.phrases(entrant, [record])[0]
    model, tokenizer = entrant.model.eval(), entrant.inputs.tokenizer
    caption = record.captions[first.caption]
    with torch.no_grad():
        image = model.encode_image(**entrant.test.images.batch([row])).attention[0][:, 1:]
        coded = tokenizer(caption, return_offsets_mapping=True, return_tensors="pt")
        ids = coded["input_ids"]
        special = torch.zeros_like(ids, dtype=torch.bool)
        special[:, [0, -1]] = True
        text = model.encode_text(input_ids=ids, mask=torch.ones_like(special), special=special).attention[0]
    words = [n for n, (low, high) in enumerate(coded["offset_mapping"][0].tolist())
             if low < first.end and first.start < high and low < high]  # fmt: skip
    expected = torch.stack([sum(text[v, w] * image[v] for v in range(16)) for w in words]).amax(0)
    torch.testing.assert_close(found.scores, expected, rtol=1e-4, atol=1e-7)
