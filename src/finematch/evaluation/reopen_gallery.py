"""The gallery of a finished FELGA run, made again from its parameters: what `notebooks/felga/2_train` says in sight.

All of it lies in the cache that the run used; what is missing there is made again.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import NamedTuple

from finematch.data.fragment_sets import FragmentSets, open_fragment_sets
from finematch.data.record import DataError
from finematch.evaluation.fragments import AnnotatedPhrases, Gallery
from finematch.features.detreg import DETReg, open_proposals
from finematch.features.fragments import (
    VLP,
    document,
    extract_keywords,
    open_vlp,
    picture_fragments,
    provenance,
    text_fragments,
    whole_pictures,
    whole_texts,
)
from finematch.features.inputs import minilm_folder
from finematch.features.proposals import Proposals, extract_proposals, given
from finematch.features.small_clip import open_small_clip
from finematch.text import KeywordMethod, keyword_method
from finematch.training import accelerator


class RunData(NamedTuple):
    """What a run was measured on."""

    sets: FragmentSets
    proposals: Proposals  # of the gallery's images
    gallery: Gallery
    annotated: AnnotatedPhrases | None

    @property
    def width(self) -> int:
        """Of the frozen features."""
        return self.gallery.classes.features.shape[-1]


class Networks(NamedTuple):
    """The frozen networks of a run, its records, and the folder of its cache."""

    sets: FragmentSets
    vlp: VLP
    detector: DETReg | str
    keywords_of: KeywordMethod
    cache: Path


def reopen_networks(was: dict, root: str | Path) -> Networks:
    """The records and frozen networks that a run was made with; the arguments are those of `reopen_gallery`."""
    root = Path(root)
    files = {name: str(root / was[name]) if was[name] and (root / was[name]).exists() else was[name]
             for name in ("vlp", "proposals", "keyword_model")}  # fmt: skip
    sets = open_fragment_sets(was["dataset"], root / was["data_root"], root / was["cache"], report=was["report"],
                              smoke=was["smoke"])  # fmt: skip
    cache = root / was["cache"] / (was["dataset"] + ("-smoke" if was["smoke"] else ""))
    name = files["vlp"] or "clip"
    if not files["vlp"] and was["scale"] == "tiny":
        name = open_small_clip(sets, was["dataset"], cache, smoke=was["smoke"], echo=None)
    detector = open_proposals(files["proposals"], scale=was["scale"], device=accelerator())
    minilm = (files["keyword_model"] or minilm_folder()) if was["keywords"] == "keybert" else ""
    texts = [document(record) for record in sets.train]
    keywords_of = keyword_method(was["keywords"], model=minilm, train=texts, top=was["words"])
    return Networks(sets, open_vlp(name).to(accelerator()), detector, keywords_of, cache)


def reopen_gallery(was: dict, root: str | Path) -> RunData:
    """The gallery that a run was measured on.

    Args:
        was: the run's parameters, resolved, as its metrics.json has them.
        root: folder that relative paths among them start from.

    Raises:
        DataError: If networks or methods are not those that the run used: its weights do not fit their features.
    """
    sets, vlp, detector, keywords_of, cache = reopen_networks(was, root)
    split, texts = was["report"], [document(record) for record in sets.gallery]
    rows = cache / "fragments"
    several = was["features"] != "fenet" and was["crop_score"] == "max" and vlp.queries > 1
    propose = partial(extract_proposals, method=detector, cache=cache / "proposals", top=was["regions"],
                      min_side=5 if was["dataset"] == "scenes" else 8)  # fmt: skip
    crops = partial(picture_fragments, model=vlp, cache=rows, queries=several)
    words = partial(text_fragments, model=vlp, cache=rows)

    proposals = boxes = propose(sets.gallery, split=split)
    now = provenance(vlp, proposals, keywords_of)
    if changed := {name: (was[name], value) for name, value in now.items() if was.get(name, value) != value}:
        raise DataError(rows, "the fragments", f"are not those of the run (was, is): {changed}",
                        "Run 2_train again, or give the cache that it was trained with")  # fmt: skip
    if was["features"] == "whole":
        regions = whole_pictures(sets.gallery, vlp, rows, f"{split}_whole", queries=several)
        keywords = whole_texts(texts, vlp, rows, f"{split}_whole")
    else:
        regions = crops(sets.gallery, boxes, split=split)
        keywords = words(
            extract_keywords(texts, keywords_of, cache / "keywords", split), split=f"{split}_keywords"
        )
    gallery = Gallery(
        sets.gallery, sets.categories, regions=regions, keywords=keywords,
        boxes=crops(sets.gallery, given(sets.gallery), split=f"{split}_objects"),
        classes=words([[name] for name in sets.categories], split="classes"),
        synonyms=sets.synonyms, name=sets.name,
    )  # fmt: skip
    if not sets.annotated or was["features"] == "whole":
        return RunData(sets, proposals, gallery, None)
    if [r.image for r in sets.annotated] != [r.image for r in sets.gallery]:
        boxes = propose(sets.annotated, split="annotated")
        regions = crops(sets.annotated, boxes, split="annotated")
    phrases = [[r.captions[a.caption][a.start : a.end] for a in r.phrases] for r in sets.annotated]
    annotated = AnnotatedPhrases(
        sets.annotated, boxes, regions, words(phrases, split="phrases"), sets.annotated_name
    )
    return RunData(sets, proposals, gallery, annotated)
