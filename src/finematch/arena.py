"""The arena: methods and their rivals on the same images, captions and minutes (`arena/2_train`, `7_compare`).

An entrant is a method's own model with the method's own presets, or a rival with those of the method that its paper is
compared with: PVSE and the plain two-stream model have MVAM's, SCAN and SAF have HSLM's, each with a GRU that reads the
captions. So what differs within such a group is how images and captions meet. The budget is the same number of minutes
on one core, as a number of steps (`steps`).

Axes: `b` images, `c` captions, `p` pairs, `n` regions, `l` words.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from finematch import rebuild
from finematch.config import Settings
from finematch.data.record import Record
from finematch.data.splits import Split
from finematch.encoders import GRUTower
from finematch.entrants import own_settings
from finematch.evaluation.embedding import embed
from finematch.evaluation.grounding import GroundedPhrase
from finematch.evaluation.phrases import attended_phrases, located_phrases
from finematch.evaluation.reranking import reranked_retrieval
from finematch.evaluation.retrieval import retrieval, retrieval_blocks
from finematch.losses import LogitScale, wide
from finematch.models.configs import HSLMConfig, MVAMConfig
from finematch.models.hslm import HSLM, hardest, hinge_of_hardest, score, softmax_loss, tile_scores
from finematch.models.mvam import MVAM
from finematch.models.rivals import PVSE, SAF, SCAN, LinearTower, Rival
from finematch.models.slan.objective import SLAN, Unimodal, pair_scorer
from finematch.rehearsal import clocked
from finematch.training import Plan, Rounds, accelerator, fit, seed_everything, to_device

SIZES = (1000, 5000)  # images of the galleries that a query is timed on
Cost = dict[str, float]


# ------------------------------------------------------------------------------------------- objectives of the rivals
class Contrast(nn.Module):
    """MVAM's (Eq. 5-6), of any score: the contrast in the batch with a learnable temperature. As there, a pair of the
    batch has one positive, and another caption of the same image is a negative (M11)."""

    def __init__(self, tau: float = 0.07):
        super().__init__()
        self.scale = LogitScale(tau)

    def forward(self, model: Rival, image, text, same: Bool[Tensor, "b b"]) -> dict[str, Tensor]:
        only_itself = torch.eye(len(same), dtype=torch.bool, device=same.device)
        return {"loss": softmax_loss(self.scale() * wide(model.scores(image, text)), only_itself)}


class ContrastThenHinge(nn.Module):
    """HSLM's: a contrast for the first steps, then the hinge on the hardest negatives, of the batch or of so many
    `rivals` that are drawn for each image and caption (see `models.hslm.HSLM`; its switches are the arguments)."""

    def __init__(self, start_steps: int, *, start_scale: float = 10.0, margin: float = 0.2, rivals: int = 0):
        super().__init__()
        self.start_steps, self.start_scale, self.margin, self.rivals = (
            start_steps,
            start_scale,
            margin,
            rivals,
        )
        self.register_buffer("steps", torch.zeros((), dtype=torch.long))

    def forward(self, model: Rival, image, text, same: Bool[Tensor, "b b"]) -> dict[str, Tensor]:
        self.steps += self.training
        if self.training and self.steps <= self.start_steps:
            return {"loss": softmax_loss(self.start_scale * wide(model.scores(image, text)), same)}
        table = model.scores(image, text) if model.together else None
        pairs = (lambda i, j: table[i, j]) if model.together else lambda i, j: model.pairs(image[i], text[j])
        with torch.no_grad():
            hard = hardest(same, self.rivals, int(self.steps), pairs=pairs,
                           table=lambda: model.scores(image, text) if table is None else table)  # fmt: skip
        bounded = lambda i, j: model.bounded(wide(pairs(i, j)))  # noqa: E731
        return {"loss": hinge_of_hardest(bounded, same, hard, self.margin)}


# ------------------------------------------------------------------------------------------- an entrant
@dataclass
class Entrant:
    """What is trained and measured.

    Attributes:
        s: settings of the arena's page. own: of the method that its recipe is of.
        inputs: splits, tokenizer and frozen network.
    """

    s: Settings
    own: Settings
    inputs: rebuild.Inputs
    model: nn.Module

    @property
    def test(self) -> Split:
        return self.inputs.splits[self.inputs.reported]

    def made(self, base: Path) -> dict[str, Path]:
        """What the detector of `detector=boxes` has learned, whose weights belong to the run's identity."""
        if self.s.detector != "boxes":
            return {}
        return {"detector": rebuild.slan_detector(self.own, self.inputs, base / self.s.cache)}

    @property
    def pairwise(self) -> bool:
        """Whether image and caption meet before the last step, so that a shortlist pays."""
        return isinstance(self.model, (SCAN, HSLM))


def steps(s: Settings) -> int:
    """Steps of a round: the budget in steps, in equal rounds of at least one."""
    return max(1, round(60 * s.budget_minutes / s.seconds_a_step / s.rounds))


def open_entrant(s: Settings, base: Path) -> Entrant:
    """The data, features and model of an entrant before its first step.

    Args:
        base: folder of the workbook, or another one that paths are relative to.
    """
    own = own_settings(s)
    # HSLM's entrants read what MVAM's do, cells too
    of = own if own.method == "slan" else own_settings(s.replace(entrant="mvam", backbone=s.backbone))
    inputs = rebuild.open_inputs(of, base)
    total = s.rounds * steps(s)
    seed_everything(s.seed)
    if own.method == "slan":
        model = rebuild.slan_begun(own.replace(encoder_epochs=0), inputs, base)
        model.random_steps = round(own.random_negatives * (s.rounds - first_rounds(s, own)) * steps(s))
        return Entrant(s, own, inputs, model.to(accelerator()))
    width, words = inputs.splits["train"].images.width, len(inputs.tokenizer)
    if own.method == "mvam":
        vision, text = rebuild.towers(own, inputs)
        if s.entrant == "pvse":
            model = PVSE(vision, text, Contrast(own.tau), dim=own.total_dim)
        else:
            model = MVAM(vision, text, MVAMConfig.of(own))
    else:
        start = round(total * min(1.0, own.warmup_epochs / own.epochs))
        if s.entrant.startswith("hslm"):
            model = HSLM(width, words, HSLMConfig.of(own), warmup_steps=start)
        else:
            vision = LinearTower(width, width=own.width, input_dropout=own.input_dropout)
            text = GRUTower(words, embed=own.embed, width=own.width, dropout=own.dropout)
            objective = ContrastThenHinge(
                start, start_scale=own.start_scale, margin=own.margin, rivals=own.rivals
            )
            model = (
                SCAN(vision, text, objective)
                if s.entrant == "scan"
                else SAF(vision, text, objective, sim=own.sim)
            )
    return Entrant(s, own, inputs, model.to(accelerator()))


def of_run(run) -> Entrant:
    """The entrant of a finished run (`runs.open_run`), with the weights of its best round."""
    return Entrant(run.settings, own_settings(run.settings), run.data, run.model)


def first_rounds(s: Settings, own: Settings) -> int:
    """Of SLAN's rounds, those in which the contrast alone trains the encoders; none where its presets have no such
    epochs."""
    return min(s.rounds - 1, round(s.contrast_share * s.rounds)) if own.encoder_epochs else 0


# ------------------------------------------------------------------------------------------- training
def plan(entrant: Entrant, precision: str) -> Plan:
    """How the method of the entrant's recipe trains, over the rounds of the arena."""
    s, own = entrant.s, entrant.own
    shared = {
        "epochs": s.rounds,
        "batch_size": s.batch_size,
        "lr": own.lr,
        "precision": precision,
        "seed": s.seed,
    }
    if own.method == "slan":
        return rebuild.slan_plan(own.replace(precision=precision), epochs=s.rounds)
    if own.method == "mvam":
        return Plan(**shared, weight_decay=own.weight_decay, warmup=own.warmup, clip_norm=1.0)
    milestones = tuple(
        s.rounds * epoch / own.epochs for epoch in range(own.decay_every, own.epochs, own.decay_every)
    )
    return Plan(**shared, optimizer="adam", weight_decay=0.0, schedule="step", milestones=milestones,
                clip_norm=own.clip_norm)  # fmt: skip


def train(entrant: Entrant, folder: Path, *, identity: str, precision: str) -> dict:
    """Train within the budget (`training.fit`); its summary, with `steps` and `seconds` of all stages."""
    s, model, val = entrant.s, entrant.model, entrant.inputs.splits["val"]
    data = Rounds(entrant.inputs.splits["train"].pairs(), steps(s))
    how, select = plan(entrant, precision), entrant.inputs.select
    if not isinstance(model, SLAN):
        return fit(model, data, how, folder, identity=identity, select=select,
                   evaluate=lambda m: ranked_rounds(entrant))  # fmt: skip
    spent, first = dict.fromkeys(("seconds", "cpu_seconds", "steps"), 0), first_rounds(s, entrant.own)
    check = lambda m: by_vectors(m, val, pictures=s.val_pictures)  # noqa: E731
    if first:
        spent = fit(Unimodal(model), data, _of_rounds(how, first), folder / "encoders", identity=identity,
                    select=select, evaluate=check)  # fmt: skip
    summary = fit(model, data, _of_rounds(how, s.rounds - first), folder, identity=identity, select=select,
                  evaluate=check)  # fmt: skip
    return summary | {name: spent[name] + summary[name] for name in ("seconds", "cpu_seconds", "steps")}


def _of_rounds(how: Plan, rounds: int) -> Plan:
    return Plan(**{**how.__dict__, "epochs": rounds})


def ranked_rounds(entrant: Entrant) -> dict[str, float]:
    """The validation of a round: the first `val_pictures` images of val, for every entrant."""
    found = ranked(entrant, entrant.inputs.splits["val"], pictures=entrant.s.val_pictures)
    return {name: found[name] for name in ("i2t_r1", "t2i_r1", "rsum")}


# ------------------------------------------------------------------------------------------- accuracy
def ranked(entrant: Entrant, which: Split, *, pictures: int = 0, **options) -> dict:
    """Retrieval both ways as the entrant ranks: by vectors, pair by pair, or (SLAN) by vectors and the best again.

    Args:
        pictures: only so many first images; 0 is all.
        options: of `evaluation.retrieval`.

    Returns:
        The metrics; SLAN's also have the ranking by vectors alone, `itc_*`.
    """
    model = entrant.model
    if isinstance(model, MVAM):
        return by_vectors(model, which, pictures=pictures, **options)
    if isinstance(model, SLAN):
        image, text = embed(model, which)
        contrast = retrieval(image, text, which.image_of, **options)
        scorer = pair_scorer(model, which.images.batch, which.texts.batch, block=256)
        again = reranked_retrieval(image, text, which.image_of, scorer, k=entrant.own.rerank,
                                   score=entrant.own.rank_score, **options)  # fmt: skip
        return {f"itc_{name}": contrast[name] for name in ("i2t_r1", "t2i_r1", "rsum")} | again
    images, image_of = _first(which, pictures)
    scorer = block_scores(model, which)
    return retrieval_blocks(scorer, images, len(image_of), image_of, block=1000, **options)


def by_vectors(model: nn.Module, which: Split, *, pictures: int = 0, **options) -> dict:
    """Retrieval by one vector an image and one a caption, of the first `pictures` images; 0 is all."""
    image, text = embed(model, which)
    images, image_of = _first(which, pictures)
    return retrieval(image[:images], text[: len(image_of)], image_of, **options)


def _first(which: Split, pictures: int) -> tuple[int, np.ndarray]:
    """So many first images of a split, or all, and the image of each of their captions."""
    images = min(pictures or len(which.records), len(which.records))
    return images, which.image_of[which.image_of < images]


def block_scores(model: HSLM | Rival, split: Split) -> Callable[[Tensor, Tensor], Tensor]:
    """The `score_block` of `retrieval_blocks`; what was encoded last is kept, for the next tile shares one side."""
    if isinstance(model, HSLM):
        return tile_scores(model, split.images.batch, split.texts.batch)
    device, kept = next(model.parameters()).device, {}

    def encoded(encode: Callable, source, index: Tensor):
        listed = index.tolist()
        if kept.get(encode.__name__, (None,))[0] != listed:
            kept[encode.__name__] = (listed, encode(**to_device(source.batch(listed), device)))
        return kept[encode.__name__][1]

    @torch.no_grad()
    def score_block(i: Tensor, j: Tensor) -> Tensor:
        image, text = encoded(model.encode_image, split.images, i), encoded(model.encode_text, split.texts, j)
        return model.scores(image, text).float()

    return score_block


def reranked(entrant: Entrant, shortlist: nn.Module, **options) -> dict:
    """Retrieval of a pairwise entrant that scores again what a two-stream model finds; the others stay below.

    Args:
        shortlist: the two-stream model, which reads the same images and captions.
    """
    model, split = entrant.model, entrant.test
    device = next(model.parameters()).device

    @torch.no_grad()
    def score_pairs(i: Tensor, j: Tensor) -> Tensor:
        (images, rows), (captions, columns) = (part.unique(return_inverse=True) for part in (i, j))
        image = prepared(model, model.encode_image(**to_device(split.images.batch(images.tolist()), device)))
        text = model.encode_text(**to_device(split.texts.batch(captions.tolist()), device))
        return of_pairs(model, image, text, rows.to(device), columns.to(device)).float().cpu()

    vectors = embed(shortlist, split)
    return reranked_retrieval(*vectors, split.image_of, score_pairs, k=entrant.s.rerank, **options)


def prepared(model: nn.Module, image):
    """Encoded images with all that an entrant computes of them once, before it meets a caption."""
    if isinstance(model, HSLM):
        return model.pairs.prepare(image)
    return model.prepare(image) if isinstance(model, Rival) else image


def of_pairs(model: HSLM | SCAN, image, text, rows: Tensor, columns: Tensor) -> Float[Tensor, " p"]:
    """Scores of given rows of `prepared` images with given rows of encoded captions."""
    if isinstance(model, HSLM):
        return model.score_pairs(image, text, rows, columns)
    return model.pairs(image[rows], text[columns])


# ------------------------------------------------------------------------------------------- alignment
def phrases(entrant: Entrant, annotated: list[Record]) -> list[GroundedPhrase]:
    """The annotated phrases with the entrant's weights on regions; of SLAN with its last boxes. None where it has no
    such weights: the plain two-stream model, and HSLM's global alignment.

    MVAM's views attend to words and to regions without regard to one another; what joins a word and a region is how
    much of both the same views have, sum_v A_text[v, l] A_image[v, n]. PVSE's is the same of its best pair.
    """
    model, tokenizer, complete = entrant.model.eval(), entrant.inputs.tokenizer, not entrant.s.smoke
    device = next(model.parameters()).device

    def locate(images: dict, texts: dict) -> tuple[Tensor, Tensor, Tensor]:
        at = model.locate(
            model.encode_image(**to_device(images, device)), model.encode_text(**to_device(texts, device))
        )
        return at.boxes[-1:], at.cosine[-1:], at.valid

    def views(images: dict, texts: dict) -> Float[Tensor, "p l n"]:
        image = model.encode_image(**to_device(images, device)).attention
        text = model.encode_text(**to_device(texts, device)).attention
        regions = images["features"].shape[1]
        return torch.einsum("pvl,pvn->pln", text, image[..., -regions:])  # without [IMG]

    if isinstance(model, SLAN):
        levels = located_phrases(entrant.test, annotated, tokenizer, locate, complete=complete)
        return levels[0] if levels else []
    if isinstance(model, MVAM):
        attend = views if model.config.pooling in ("mvam", "attention") else None
    else:
        attend = None if isinstance(model, HSLM) and not model.pairs.cross_attn else model.attend
    if attend is None:
        return []
    return attended_phrases(entrant.test, annotated, tokenizer, attend, complete=complete)


# ------------------------------------------------------------------------------------------- what a query costs
@torch.no_grad()
def query_costs(entrant: Entrant, shortlist: nn.Module | None = None, *, queries: int = 5) -> Cost:
    """Milliseconds of a query over galleries of `SIZES` images that are encoded already, and microseconds of a pair.

    `ms_query_<n>` is from the tokens of a caption to its ten best images, ranked as the entrant ranks; a gallery
    larger than the split repeats its images, for time does not depend on what they show. With a `shortlist`,
    `short_ms_query_<n>` is the same where only its best are scored; of SLAN, `itc_ms_query_<n>` is without the pairs.
    `us_pair` is microseconds of one image and one caption, both encoded.
    """
    model, split, k = entrant.model.eval(), entrant.test, entrant.s.rerank
    device = next(model.parameters()).device
    few = min(100, len(split.records))
    pictures = model.encode_image(**to_device(split.images.batch(range(few)), device))
    texts = [to_device(split.texts.batch([c]), device) for c in range(queries)]
    captions = model.encode_text(**to_device(split.texts.batch(range(few)), device))
    whole = prepared(model, pictures)
    found: Cost = {}

    def scores(gallery, caption) -> Tensor:
        if isinstance(model, (MVAM, SLAN)):
            return gallery @ caption.vector.T
        if isinstance(model, HSLM):
            return score(model.pairs, gallery, caption, ranking=True)
        return model.scores(gallery, caption)

    def again(caption, rows: Tensor) -> Tensor:
        zero = torch.zeros_like(rows)
        if isinstance(model, SLAN):
            return model.match(pictures[rows], caption[zero])
        return of_pairs(model, whole, caption, rows, zero)

    def query(gallery, *, first=None, best: int = 0) -> None:
        """All queries; `first` is the shortlist's vectors, `best` how many are scored again."""
        for text in texts:
            caption = model.encode_text(**text)
            if first is not None:
                listed = (first @ shortlist.encode_text(**text).vector.T)[:, 0].topk(best).indices
            else:
                listed = scores(gallery, caption)[:, 0].topk(best or 10).indices
            if best:
                again(caption, listed % few).topk(min(10, best))

    def ms(work: Callable[[], None], calls: int) -> float:
        return 1000 * clocked(work) / calls

    for n in SIZES:
        rows = torch.arange(n, device=device) % few
        gallery = pictures.vector[rows] if isinstance(model, (MVAM, SLAN)) else whole[rows]
        best = entrant.own.rerank if isinstance(model, SLAN) else 0
        found[f"ms_query_{n}"] = ms(lambda g=gallery, b=best: query(g, best=b), queries)
        if isinstance(model, SLAN):
            found[f"itc_ms_query_{n}"] = ms(lambda g=gallery: query(g), queries)
        if shortlist is not None:
            vectors = shortlist.encode_image(**to_device(split.images.batch(range(few)), device)).vector[rows]
            found[f"short_ms_query_{n}"] = ms(lambda v=vectors: query(None, first=v, best=k), queries)
    if isinstance(model, SLAN):
        index = torch.arange(few, device=device)
        found["us_pair"] = 1000 * ms(lambda: model.match(pictures[index], captions[index]), few)
    else:
        table = pictures.vector if isinstance(model, MVAM) else whole
        found["us_pair"] = 1000 * ms(lambda: scores(table, captions), few * few)
    return found
