"""NLVR2: accuracy, and consistency: the share of sentences that are judged rightly with every image pair of theirs."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path

from finematch.data.record import ImagePair
from finematch.files import write_text


def nlvr2_results(pairs: Sequence[ImagePair], judged: Mapping[str, bool], *, split: str = "") -> dict:
    """Accuracy and consistency in percent.

    A sentence is told by its identifier without the third field (the pair), as in the official evaluator: equal words
    of two identifiers are two sentences.

    Args:
        judged: by identifier, whether the sentence was taken to be true; one for every example.

    Returns:
        `nlvr2_accuracy`, `nlvr2_consistency` (neither where all labels are withheld), `examples`, `sentences`,
        `unscored` (examples without a label), `protocol`.

    Raises:
        ValueError: Judgements of other examples than these.
    """
    _check(pairs, judged)
    right = defaultdict(list)
    for pair in pairs:
        if pair.label is not None:
            first, second, _, last = pair.identifier.split("-")
            right[first, second, last].append(bool(judged[pair.identifier]) == pair.label)
    hits = [hit for group in right.values() for hit in group]
    unscored = len(pairs) - len(hits)
    found = {}
    if hits:
        found = {
            "nlvr2_accuracy": 100 * sum(hits) / len(hits),
            "nlvr2_consistency": 100 * sum(map(all, right.values())) / len(right),
        }
    note = f", {unscored} without a label are not scored" if unscored else ""
    return found | {
        "examples": len(pairs),
        "sentences": len(right),
        "unscored": unscored,
        "protocol": f"{split + ': ' if split else ''}{len(hits)} examples{note}; consistency over {len(right)} "
        "sentences, each right where all its pairs are",
    }


def write_nlvr2(path: str | Path, pairs: Sequence[ImagePair], judged: Mapping[str, bool]) -> None:
    """The official format: a line `identifier,True` or `identifier,False` for each example.

    Raises:
        ValueError: Judgements of other examples than these.
        DataError: The file cannot be written.
    """
    _check(pairs, judged)
    write_text(path, "".join(f"{p.identifier},{bool(judged[p.identifier])}\n" for p in pairs))


def _check(pairs: Sequence[ImagePair], judged: Mapping[str, bool]) -> None:
    wanted = {pair.identifier for pair in pairs}
    if missing := sorted(wanted - judged.keys()):
        raise ValueError(f"{len(missing)} examples are not judged, the first is {missing[0]}")
    if more := sorted(judged.keys() - wanted):
        raise ValueError(f"{len(more)} judgements are of other examples, the first of {more[0]}")
