"""What the papers' text says against the papers' own cells: the recipes, the comparisons, every statement's verdict."""

import pytest

from finematch import stated
from finematch.files import DataError
from finematch.stated import AGREES, CUT, DIFFERS, OPEN, chosen, compare, evaluate

HEAD = ",".join(stated.COLUMNS)


def lines():
    return stated.read().to_dict("records")


def found(paper, words):
    """The one statement of a paper whose text has the words."""
    (line,) = [line for line in lines() if line["paper"] == paper and words in line["says"]]
    return line["stated"], line["recomputed"], line["verdict"]


@pytest.mark.parametrize(
    ("recipe", "value"),
    [
        ("value: 4 | 16 | i2t@1", 54.08),
        ("sum: 4 | 16 | t2i@*", 39.08 + 69.94 + 80.92),
        ("gain: 4 | 16 | 1 | i2t@1; t2i@1", ((54.08 - 47.46) + (39.08 - 35.25)) / 2),
        ("gain: 4 | 16 | * | t2i@1", 39.08 - 38.52),  # the best of the others
        ("percent: 4 | 16 | 1 | i2t@1", 100 * (54.08 / 47.46 - 1)),
        ("least: 4 | 16 | 8 | i2t@1; i2t@10", 90.06 - 89.66),
        ("wins: 5 | base diversity loss | square root* | *", (4, 6)),
        ("wins: 3; 4 | MVAM-FRCNN; 16 | *; !8 | i2t@1", (2, 2)),
        ("lowest: 4 | 1 | * | *", (6, 6)),
        ("ties: 5 | base* | w/o* | *", (0, 6)),
        ("224", 224),
    ],
)
def test_recipes_on_cells_of_mvam(recipe, value):
    assert evaluate("MVAM", recipe) == pytest.approx(value)


@pytest.mark.parametrize(("recall", "median"), [(46.8, 2), (50, 1.5), (50.1, 1)])
def test_the_least_median_rank(monkeypatch, recall, median):
    """Of 1,000 ranks the 500th and the 501st: both are 1 above half at rank 1, one of them at half, none below."""
    monkeypatch.setattr(stated, "published", lambda paper, table: stated_table(recall))
    assert evaluate("P", "median: 1 | a | R@1") == median


def stated_table(recall):
    import pandas as pd

    return pd.DataFrame({"row": ["a"], "column": ["R@1"], "value": [recall]})


def test_names_are_taken_and_taken_away():
    names = ["CLIP +[CLS]", "CLIP +Attn", "DIME", "DSRAN(GRU)"]
    assert chosen("CLIP +[CLS]", names) == ["CLIP +[CLS]"], "a bracket is a bracket"
    assert chosen("*; !DSRAN*; !DIME", names) == names[:2]
    assert chosen("", names) == []


@pytest.mark.parametrize(
    ("said", "value", "verdict"),
    [
        ("2.17", 2.165, AGREES), ("2.17", 2.1649, DIFFERS), ("2.6", 2.699, CUT), ("2.6", 2.7, DIFFERS),
        ("2", 1.9, AGREES), ("14e3", 14_073.0, AGREES), ("14e3", 15_196.0, DIFFERS), ("-1.2", -1.2, AGREES),
        ("> 3", 3.45, AGREES), ("> 3", 3.0, DIFFERS), (">= 1.1", 1.1, AGREES), ("< 0", -2.0, AGREES),
        ("> value: 4 | 8 | i2t@1", 53.52, DIFFERS), ("value: 4 | 8 | i2t@1", 53.52, AGREES),
        ("all", (6, 6), AGREES), ("all", (5, 6), DIFFERS), ("most", (4, 6), AGREES), ("most", (3, 6), DIFFERS),
        ("not all", (4, 4), DIFFERS), ("not all", (3, 4), AGREES), ("", 50.1, OPEN),
    ],
)  # fmt: skip
def test_comparisons(said, value, verdict):
    assert compare("MVAM", said, value)[1] == verdict


def test_gains_of_mvam_are_those_of_its_cells():
    gains = [line for line in lines() if line["paper"] == "MVAM" and "attention pooling" in line["says"]]
    assert len(gains) == 9
    assert {line["verdict"] for line in gains} == {AGREES}
    assert found("MVAM", "FRCNN on MSCOCO-5K") == ("4.06", "4.055", AGREES)


def test_what_the_text_of_hslm_says():
    assert found("HSLM", "gain over GRAN, image to text, R@1") == ("3.3", "3.3", AGREES)
    over = [line for line in lines() if line["paper"] == "HSLM" and "SGRAF" in line["says"]]
    assert len(over) == 10
    assert {line["verdict"] for line in over} == {AGREES, CUT}
    assert found("HSLM", "about 2.0 in R@1")[1:] == ("1.45", DIFFERS)
    assert found("HSLM", "lines 3 and 7")[1:] == ("46.3", DIFFERS)


def test_what_the_text_of_felga_and_slan_says():
    assert found("FELGA", "in most cases") == ("most", "10 of 12", AGREES)
    assert found("SLAN", "average R@1 above BLIP") == ("3.3", "3.7", DIFFERS)
    assert found("SLAN", "more than 3 on average") == ("> 3", "3.45", AGREES)
    assert found("SLAN-v1", "brings 0.8") == ("0.8", "-1.2", DIFFERS)


def test_every_contradiction_is_listed_with_two_numbers():
    table = stated.contradictions(stated.read())
    assert set(table["id"]) == {"S38", "S38b", "H20", "H20b", "F23", "F23b", "M17"}
    assert AGREES not in set(table["they"])
    pairs = {tuple(pair) for pair in table[["one number", "the other"]].itertuples(index=False)}
    assert {
        ("508.6", "497.8"), ("437.5", "439.2"), ("506.8", "508.6"), ("416.7", "412.8"), ("527.3", "527.4"),
        ("1.5", "2"), ("3.3", "3.7"), ("83.4", "84.3"), ("0.8", "-1.2"), ("14,000", "15,196"), ("384", "224"),
        ("< 1.2", "2.5"), (">= 54.14", "54.08"), (">= 90.32", "90.06"), ("not all", "2 of 2"),
    } <= pairs  # fmt: skip


def test_statements_of_text_name_their_section():
    table = stated.in_text(stated.read())
    assert set(table["paper"]) == {"MVAM", "HSLM", "FELGA", "SLAN", "SLAN-v1"}
    assert table["section"].str.fullmatch(r"abstract|[4A](\.\d)+").all()


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        (",MVAM,4.5,x,1,gain: 4 | 17 | 1 | *", "finds no cell"),
        (",MVAM,4.5,x,1,gain: 4 | 16 | 17 | *", "finds no cell"),
        (",MVAM,4.5,x,1,value: 9 | 16 | *", "table 9"),
        (",MVAM,4.5,x,1,most: 4 | 16 | 1 | *", "no known word"),
        (",MVAM,4.5,x,some,wins: 4 | 16 | 1 | *", "says nothing about 6 of 6"),
    ],
)
def test_a_statement_that_cannot_be_recomputed_is_refused(tmp_path, line, problem):
    (tmp_path / "text.csv").write_text(f"{HEAD}\n{line}\n", encoding="utf-8")
    with pytest.raises(DataError, match=f"text.csv: line 2: cannot be recomputed.*{problem}"):
        stated.read(tmp_path / "text.csv")
    (tmp_path / "text.csv").write_text("paper,stated\n", encoding="utf-8")
    with pytest.raises(DataError, match="the header"):
        stated.read(tmp_path / "text.csv")


def test_symbols_of_slan_and_words_of_hslm():
    symbols = stated.symbols()
    assert len(symbols) == 12
    assert symbols.set_index("symbol").loc["A_i", ["dimensions", "meaning"]].tolist() == [
        "N^G × N^T", "cross attention map",
    ]  # fmt: skip
    words = stated.word_weights()
    assert len(words) == 5
    assert words.iloc[0, 1].startswith("A 0.012 → 0.002, man 0.142 → 0.283, is 0.121 → 0.001")
