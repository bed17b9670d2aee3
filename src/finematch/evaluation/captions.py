"""BLEU-4, METEOR, ROUGE-L, CIDEr and SPICE of captions, and the file in which captions are handed in.

The field's numbers come from pycocoevalcap, an optional package (`pip install finematch[captions]`), which needs Java
for its tokeniser (Stanford's PTB) and for METEOR. Where either is missing, BLEU-4 and CIDEr are computed here, on words
of our own tokeniser: names and protocol say so, for such numbers do not stand beside published ones. They are computed
in any case, so that runs of different machines have a number in common.

All numbers are times 100, as papers print them. CIDEr is CIDEr-D (n-grams up to 4, sigma 6), times 10 by definition:
the caption of a person among five scores about 90 on COCO.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import math
import re
import shutil
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np

from finematch.data.names import result_id
from finematch.files import DataError, write_text

N = 4  # the longest n-grams
SIGMA = 6.0  # of CIDEr-D's penalty on length
Tokens = Mapping[str, Sequence[Sequence[str]]]  # by image: its captions as words
REMEDY = "A list of {'image_id': <id>, 'caption': <text>}, each image once (COCO's caption results)"


# ------------------------------------------------------------------------------------------- own tokens
def words(caption: str) -> list[str]:
    """Our own tokens: lower case, an apostrophe within a word kept, punctuation left out."""
    return re.findall(r"\w+(?:['’]\w+)*", caption.lower())


def ngrams(tokens: Sequence[str], n: int) -> Counter:
    """How often each n-gram stands in a caption."""
    return Counter(zip(*(tokens[k:] for k in range(n)), strict=False))


def bleu4(written: Mapping[str, Sequence[str]], references: Tokens) -> float:
    """BLEU-4 of a whole split (Papineni et al. 2002): geometric mean of the clipped precisions of 1- to 4-grams, times
    exp(1 - r / c) where the captions are shorter in total (c) than the nearest references (r; of two, the shorter)."""
    found, total, length, nearest = np.zeros(N), np.zeros(N), 0, 0
    for image, tokens in written.items():
        for n in range(1, N + 1):
            most = Counter()
            for reference in references[image]:
                most |= ngrams(reference, n)
            mine = ngrams(tokens, n)
            found[n - 1] += sum((mine & most).values())
            total[n - 1] += sum(mine.values())
        length += len(tokens)
        nearest += min((abs(len(one) - len(tokens)), len(one)) for one in references[image])[1]
    if not found.all():
        return 0.0
    return 100 * math.exp(np.log(found / total).mean() + min(0.0, 1 - nearest / length))


def cider(written: Mapping[str, Sequence[str]], references: Tokens) -> float:
    """CIDEr-D (Vedantam et al. 2015): cosine of tf-idf vectors of n-grams, each count cut to the reference's, times a
    Gaussian of the difference in length; mean over n, references and images. An n-gram's idf is the log of the number
    of images over the number of those whose references have it: of one image alone all are 0."""
    known = Counter()
    for captions in references.values():
        known.update({gram for one in captions for n in range(1, N + 1) for gram in ngrams(one, n)})

    def weighed(tokens: Sequence[str], n: int) -> tuple[dict, float]:
        weights = {
            g: tf * math.log(len(references) / max(1, known[g])) for g, tf in ngrams(tokens, n).items()
        }
        return weights, math.sqrt(sum(w * w for w in weights.values()))

    scores = []
    for image, tokens in written.items():
        mine = [weighed(tokens, n) for n in range(1, N + 1)]
        for reference in references[image]:
            near = math.exp(-((max(0, len(tokens) - 1) - max(0, len(reference) - 1)) ** 2) / (2 * SIGMA**2))
            for n, (weights, norm) in enumerate(mine, 1):
                theirs, other = weighed(reference, n)
                product = sum(
                    min(w, theirs.get(gram, 0.0)) * theirs.get(gram, 0.0) for gram, w in weights.items()
                )
                scores.append(
                    (near * product / (norm * other) if norm * other else 0.0) / len(references[image])
                )
    return 1000 * sum(scores) / (N * len(written))


# ------------------------------------------------------------------------------------------- the field's
def lacking() -> str:
    """What the field's metrics lack here, as a sentence; empty where they can be computed."""
    if importlib.util.find_spec("pycocoevalcap") is None:
        return "pycocoevalcap is not installed (pip install 'finematch[captions]')"
    if shutil.which("java") is None:
        return "no `java` is found (a Java runtime of version 8 or later; pycocoevalcap's tokeniser and METEOR need it)"
    return ""


def spice_files() -> bool:
    """Whether SPICE's language models lie in pycocoevalcap's folder, which otherwise downloads them."""
    found = importlib.util.find_spec("pycocoevalcap")
    folders = found.submodule_search_locations or () if found else ()
    return any(next(Path(one, "spice", "lib").glob("stanford-corenlp-*-models.jar"), None) for one in folders)


def official(written: Mapping[str, str], references: Mapping[str, Sequence[str]]) -> dict[str, float]:
    """`bleu4`, `meteor`, `rouge_l`, `cider`, and `spice` where its files are present, by pycocoevalcap.

    Raises:
        RuntimeError: the package or Java is missing; the message says which.
    """
    if problem := lacking():
        raise RuntimeError(problem)
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.meteor.meteor import Meteor
    from pycocoevalcap.rouge.rouge import Rouge
    from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

    def tokenised(captions: Mapping[str, Iterable[str]]) -> dict[str, list[str]]:
        lines = {i: [{"caption": " ".join(one.split())} for one in some] for i, some in captions.items()}
        return PTBTokenizer().tokenize(lines)

    true, mine = tokenised(references), tokenised({image: [one] for image, one in written.items()})
    scorers = {"meteor": Meteor, "rouge_l": Rouge, "cider": Cider}
    if spice_files():
        from pycocoevalcap.spice.spice import Spice

        scorers["spice"] = Spice
    with contextlib.redirect_stdout(None):
        bleu = Bleu(N).compute_score(true, mine, verbose=0)[0][-1]
        found = {name: scorer().compute_score(true, mine)[0] for name, scorer in scorers.items()}
    return {name: 100 * float(value) for name, value in ({"bleu4": bleu} | found).items()}


def caption_scores(
    written: Mapping[str, str],
    references: Mapping[str, Sequence[str]],
    *,
    metrics: str = "auto",
    split: str = "",
) -> dict:
    """Captions against those that people wrote, by image.

    Args:
        metrics: `auto` computes the field's metrics where they can be; `official` refuses to go on without them;
            `own` leaves them out.
        split: what was described, for the protocol.

    Returns:
        `bleu4_own_tokens`, `cider_own_tokens`; what `official` gives; `words` (of a caption, mean), `different` (of
        the captions, the share of different ones in percent), `described` (images), `protocol`.

    Raises:
        ValueError: other images than the references', an image without references, other `metrics`.
        RuntimeError: as `official`.
    """
    if metrics not in ("auto", "official", "own"):
        raise ValueError(f"metrics is {metrics!r}; use auto, official or own")
    if written.keys() != references.keys() or not written:
        odd = sorted(map(str, written.keys() ^ references.keys()))
        raise ValueError(f"captions and references are of different images: {odd[:3] or 'there are none'}")
    if empty := [image for image, some in references.items() if not some]:
        raise ValueError(f"image {empty[0]} has no reference caption")
    mine = {image: words(caption) for image, caption in written.items()}
    true = {image: [words(caption) for caption in references[image]] for image in written}
    found = {"bleu4_own_tokens": bleu4(mine, true), "cider_own_tokens": cider(mine, true)}
    problem = "they were not asked for" if metrics == "own" else lacking()
    if metrics == "official" or not problem:
        found |= official(written, {image: references[image] for image in written})
    by = f"not by pycocoevalcap: {problem}" if problem else "by pycocoevalcap on PTB tokens"
    spice = "" if problem or "spice" in found else "; SPICE left out, its files are not present"
    protocol = (
        f"{split + ': ' if split else ''}{len(written)} images, {sum(map(len, true.values()))} reference captions; "
        f"BLEU-4, METEOR, ROUGE-L, CIDEr {by}{spice}; *_own_tokens on lower-case words without "
        "punctuation; all times 100"
    )
    return found | {
        "words": float(np.mean([len(one) for one in mine.values()])),
        "different": 100 * len(set(written.values())) / len(written),
        "described": len(written),
        "protocol": protocol,
    }


def most_frequent(captions: Iterable[str]) -> str:
    """The caption that says most often the same words (of equals the first): the baseline that sees no image."""
    captions = list(captions)
    count = Counter(" ".join(words(caption)) for caption in captions)
    return max(captions, key=lambda caption: count[" ".join(words(caption))])


# ------------------------------------------------------------------------------------------- COCO's file
def write_results(path: str | Path, written: Mapping[str, str]) -> None:
    """Captions in COCO's results format; an image id that is a number in text is written as one.

    Raises:
        DataError: The file cannot be written.
    """
    write_text(path, json.dumps([{"image_id": result_id(i), "caption": text} for i, text in written.items()]))


def read_results(path: str | Path, images: Iterable[str]) -> dict[str, str]:
    """Captions of a file in COCO's results format by image id (as text), in the order of `images`.

    Raises:
        DataError: a file that is no such list; an entry of an unknown image, or of one that had its caption; an image
            without one.
    """
    wanted, found = [str(image) for image in images], {}
    try:
        entries = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(path, "the file", f"cannot be read ({error})", REMEDY) from error
    if not isinstance(entries, list):
        raise DataError(path, "the file", f"is a JSON {type(entries).__name__}, not a list", REMEDY)
    known = set(wanted)
    for number, entry in enumerate(entries):
        text = entry.get("caption") if isinstance(entry, dict) else None
        if not isinstance(text, str) or "image_id" not in entry:
            raise DataError(path, f"entry {number}", f"is {str(entry)[:80]}", REMEDY)
        image = str(entry["image_id"])
        if image not in known:
            raise DataError(
                path, f"entry {number}", f"is of image {image}, which is not in the split", REMEDY
            )
        if image in found:
            raise DataError(path, f"entry {number}", f"is a second caption of image {image}", REMEDY)
        found[image] = text
    if missing := [image for image in wanted if image not in found]:
        problem = f"has no caption of {len(missing)} images, the first is {missing[0]}"
        raise DataError(path, "the file", problem, REMEDY)
    return {image: found[image] for image in wanted}
