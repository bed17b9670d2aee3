"""Search by a trained run: the images of a set, or of any folder, for a sentence; the captions of a set for an image.

run = open_run("latest", method="mvam")
for hit in search(run, "a dog on the grass", over="~/photos"):
    print(hit.score, hit.image)

What the run reads of a folder's images is made once and kept in the cache, by the files' content. A method that scores
pairs (SLAN) proposes with its two-stream score and ranks the best again, as a search engine does.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from finematch.config import root
from finematch.data.record import DataError, Record
from finematch.explore import new_images, new_texts
from finematch.features.inputs import origin
from finematch.files import cached
from finematch.runs import weights_digests
from finematch.training import to_device

IMAGES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")


@dataclass(frozen=True)
class Hit:
    """One answer.

    Attributes:
        score: what the method ranks by; higher is better, comparable within one search.
        image: the file. caption: of the set, where captions were searched.
    """

    score: float
    image: Path
    caption: str = ""


def search(
    run, text: str = "", *, image: str | Path = "", over: str | Path = "", k: int = 10, shortlist: int = 64
) -> list[Hit]:
    """The `k` images that fit a sentence best, or the `k` captions of the run's set that fit an image best.

    Args:
        run: from `open_run`, or its folder.
        text, image: what is searched for; one of the two.
        over: folder of images; the reported split of the run's set by default.
        shortlist: images (captions) that SLAN's matching head ranks again; 0: the two-stream score alone.

    Raises:
        ValueError: Both a sentence and an image, neither, or captions of a folder.
        DataError: A folder without images, an image that cannot be read, or a run without features of new images.
    """
    if isinstance(run, (str, Path)):
        from finematch.runs import open_run

        run = open_run(run)
    if bool(text.strip()) == bool(image):
        raise ValueError("give a sentence, or an image, and not both")
    if image and over:
        raise ValueError("a folder of images has no captions: search it with a sentence")
    if k < 1 or shortlist < 0:
        raise ValueError(f"k is {k}: give at least 1; shortlist is {shortlist}: give at least 0")
    records, scores, again = _asked(run, text, Path(image).expanduser() if image else None, over)
    best = np.argsort(-scores, kind="stable")
    if again is not None and shortlist:
        first = best[:shortlist]
        scores = scores.copy()
        scores[first] = again(first)
        best = np.concatenate([first[np.argsort(-scores[first], kind="stable")], best[shortlist:]])
    return [Hit(float(scores[i]), *records(i)) for i in best[:k].tolist()]


def scores_of_set(run, text: str) -> tuple[list[Record], np.ndarray]:
    """The images of the run's reported split, and the score of each for a sentence: as `Match.ranked` has it."""
    with torch.no_grad(), tempfile.TemporaryDirectory() as folder:
        records, images, *_ = _set(run)
        scores, _ = SCORES[run.method](run, images, new_texts(run, [text], folder))
    return records, scores[:, 0]


def place(
    records: Sequence[Record], scores: np.ndarray, score: float, file: str | Path = ""
) -> tuple[int, int]:
    """The rank of an image with this score among the images of a set and itself, and of how many.

    Ties count against it. `file` is its own file, which may be one of the set: it is counted once.
    """
    own = Path(file).resolve() if file else None
    others = [i for i, record in enumerate(records) if own is None or Path(record.image).resolve() != own]
    return 1 + int((scores[others] >= score).sum()), len(others) + 1


def _asked(run, text: str, image: Path | None, over: str | Path) -> tuple:
    """What a number of an answer stands for, the score of each answer, and what ranks some of them again."""
    folder = root() / run.parameters.get("cache", "data/cache") / "new"
    with torch.no_grad():
        if image is not None:
            one = Record(image.stem, "new", (image.name,), image, source=str(image))
            records, _, texts, captions, image_of = _set(run)
            scores, again = SCORES[run.method](run, new_images(run, [one], folder), texts)
            return (lambda i: (records[image_of[i]].image, captions[i])), scores[0], _pairs(again, None)
        if over:
            records = folder_records(over)
            images = new_images(run, records, folder)
        else:
            records, images, *_ = _set(run)
        scores, again = SCORES[run.method](run, images, new_texts(run, [text], folder))
        return (lambda i: (records[i].image,)), scores[:, 0], _pairs(again, 0)


def _set(run) -> tuple:
    """Of the run's reported split: the records, what the model reads of images and of captions, the captions, and the
    row of each caption's image."""
    if run.method == "felga":
        from finematch.features.fragments import document

        gallery = run.data.gallery
        texts = [document(record) for record in (gallery.texts or gallery.records)]
        rows = {record.image: row for row, record in enumerate(gallery.records)}
        image_of = [rows[record.image] for record in (gallery.texts or gallery.records)]
        return gallery.records, gallery.regions, gallery.keywords, texts, image_of
    split = run.data.splits[run.data.reported]
    return split.records, split.images, split.texts, split.captions, split.image_of


def folder_records(folder: str | Path) -> list[Record]:
    """A record for each image file below a folder, in the order of their names.

    Raises:
        DataError: There is none.
    """
    folder = Path(folder).expanduser().resolve()
    files = sorted(file for file in folder.rglob("*") if file.suffix.lower() in IMAGES and file.is_file())
    if not files:
        raise DataError(folder, "the folder", "has no image", f"Name one with files {', '.join(IMAGES)}")
    names = [file.relative_to(folder).as_posix() for file in files]
    return [
        Record(name, "folder", (name,), file, source=str(file))
        for name, file in zip(names, files, strict=True)
    ]


# ------------------------------------------------------------------------------------------- scores of the methods
Again = Callable[[Sequence[int], Sequence[int]], np.ndarray]


def _pairs(again: Again | None, text: int | None) -> Callable[[np.ndarray], np.ndarray] | None:
    """Ranks images against caption `text`, or captions against the one image."""
    if again is None:
        return None
    if text is None:
        return lambda found: again([0] * len(found), found.tolist())
    return lambda found: again(found.tolist(), [text] * len(found))


def _vectors(encode, source, device, block: int = 256) -> Tensor:
    parts = [encode(**to_device(source.batch(range(i, min(i + block, len(source)))), device)).vector
             for i in range(0, len(source), block)]  # fmt: skip
    return torch.cat(parts).float().cpu()


def _image_vectors(run, images) -> np.ndarray:
    """The vectors "i d" of the images, memory-mapped: made once by each run's weights for each set of features."""
    made_of = origin({"images": images})["images"]
    if not made_of:  # pixels: nothing says which
        return _vectors(run.model.encode_image, images, _device(run)).numpy()

    def make(folder: Path) -> None:
        np.save(folder / "vectors.npy", _vectors(run.model.encode_image, images, _device(run)).numpy())

    key = {"run": run.digest, "weights": weights_digests(run.folder), "images": made_of}
    kept = cached(root() / run.parameters.get("cache", "data/cache"), "vectors", key, make)
    return np.load(kept / "vectors.npy", mmap_mode="r")


def _device(run) -> torch.device:
    return next(run.model.parameters()).device


def _two_stream(run, images, texts) -> tuple[np.ndarray, Again | None]:
    """Cosines "i c" of the two towers."""
    texts = _vectors(run.model.encode_text, texts, _device(run)).numpy()
    return _image_vectors(run, images) @ texts.T, None


def _slan(run, images, texts) -> tuple[np.ndarray, Again | None]:
    """The contrast, and the matching head for pairs."""
    model, device = run.model, _device(run)
    scores, _ = _two_stream(run, images, texts)

    def match(rows: Sequence[int], captions: Sequence[int]) -> np.ndarray:
        found = []
        with torch.no_grad():
            for i in range(0, len(rows), 32):
                picture = model.encode_image(**to_device(images.batch(rows[i : i + 32]), device))
                words = model.encode_text(**to_device(texts.batch(captions[i : i + 32]), device))
                found.append(model.match(picture, words).float().cpu().numpy())
        return np.concatenate(found)

    return scores, match if model.head is not None else None


def _hslm(run, images, texts) -> tuple[np.ndarray, Again | None]:
    """The logit of every pair (Eq. 22): HSLM has no score of two towers, and its own is fast enough for thousands."""
    from finematch.models.hslm import tile_scores

    scorer = tile_scores(run.model, images.batch, texts.batch)
    return scorer(torch.arange(len(images)), torch.arange(len(texts))).float().cpu().numpy(), None


def _felga(run, images, texts) -> tuple[np.ndarray, Again | None]:
    """The similarity of the closest fragments (Eq. 11)."""
    from finematch.models.felga import affinity, global_affinity

    device = _device(run)
    (regions, real), (words, there) = images.dense(), texts.dense()
    words, found = run.model.encode_words(words.float().to(device)), []
    for i in range(0, len(regions), 64):
        cosines = affinity(run.model.encode_regions(regions[i : i + 64].float().to(device)), words).cpu()
        found.append(global_affinity(cosines, real[i : i + 64, :, None, None] & there[None, None])[0])
    return torch.cat(found).numpy(), None


SCORES = {"mvam": _two_stream, "slan": _slan, "hslm": _hslm, "felga": _felga}
