"""SLAN's objective (3.3) and its retrieval: what turns the towers and the self-locator into a trained model.

The terms are image-text matching (Eq. 4) and language modelling (Eq. 7) of `matching`, and the image-text contrast
with its two queues (Eq. 5-6) of `contrast`. Here are their sum with the locator's own loss (Eq. 8-9) and the scorer of
pairs that re-ranks. The paper says "following ALBEF" and leaves the rest open: what it does not say is ALBEF's. Every
reading that could go either way is a setting, declared in `SLANConfig`.

Two kinds of tokens (S20): the contrast compares the *unimodal* ones, the pooled feature map and BERT's [CLS], for
there a picture and a text never meet, so that vectors can wait in a queue and a gallery can be ranked by a product;
matching and language modelling read the *fused* ones, after the locator. (With fused tokens everywhere each picture
would pass the locator with every text of the queue.)

Towers and locator are given, not imported: `Towers` and `Locator` say what they must do. What a picture needs before
any text is known is prepared once and shared by all the pairs it is in.

Axes: `b` pairs, `p` pairs to be scored, `k` keys, `n` tokens of a text, `m` masked words, `t` regions, `l` levels,
`d` width of the tokens, `e` width of the vectors that are contrasted, `v` words of the vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from finematch.files import read_tensors
from finematch.hub import Pretrained
from finematch.losses import gather, rank, shared, wide, world
from finematch.models.configs import SLANConfig
from finematch.models.slan.contrast import (
    Keys,
    Momentum,
    Queue,
    Temperature,
    itc,
    region_word,
    softmax_both_ways,
    unit,
)
from finematch.models.slan.matching import (
    MaskedWordHead,
    MatchingHead,
    Words,
    hard_negatives,
    itm,
    mask_words,
    mlm,
)

TERMS = ("itc", "itm", "mlm", "reg", "word")


# ------------------------------------------------------------------------------ what is given (3.1, 3.2)
@runtime_checkable
class Towers(Protocol):
    """The unimodal encoders of 3.1; an `nn.Module`."""

    def vision(self, pixels: Tensor | list[Tensor]) -> list[Tensor]:
        """Feature maps "b c h w" of pixels (or of maps that were made before), as the locator takes them."""

    def pooled(self, maps: list[Tensor]) -> Float[Tensor, "b d"]:
        """T_v before any text: global average pooling."""

    def text(self, input_ids: Int[Tensor, "b n"], mask: Bool[Tensor, "b n"]) -> Float[Tensor, "b n d"]:
        """Token states; position 0 is [CLS], T_t before any picture."""


@runtime_checkable
class Located(Protocol):
    """What the self-locator found for pairs; `reg_loss` is Eq. 3 of each picture."""

    boxes: Float[Tensor, "l b t 4"]
    scores: Float[Tensor, "b t"]
    valid: Bool[Tensor, "b t"]
    regions: Float[Tensor, "b t d"]
    words: Float[Tensor, "b n d"]
    picture: Float[Tensor, "b d"]
    text: Float[Tensor, "b d"]
    reg_loss: Float[Tensor, " b"]


@runtime_checkable
class Locator(Protocol):
    """The self-locator of 3.2; an `nn.Module`. Its `token` says what `visual_token` is made of: `map` or `regions`."""

    token: str

    def prepare(
        self, features: list[Tensor], pixels: Tensor | list[Tensor], given: Float[Tensor, "b q 5"] | None
    ) -> Any:
        """What a picture gives before any text is known; can be indexed by picture. `pixels` are what the maps
        `features` were made of, `given` its proposals where they were found elsewhere."""

    def visual_token(self, pictures: Any, pooled: Float[Tensor, "b d"]) -> Float[Tensor, "b d"]:
        """T_v before any text: `pooled` as it is, or the mean of the regions (S20)."""

    def fixed_regions(self, pictures: Any) -> tuple[list[Float[Tensor, "b t d"]], Bool[Tensor, "b t"]]:
        """The proposals as every level embeds them, without a gradient to their boxes, and which are real."""

    def counted(self, mask: Bool[Tensor, "b n"], special: Bool[Tensor, "b n"] | None) -> Bool[Tensor, "b n"]:
        """Which tokens are words."""

    def locate(
        self,
        pictures: Any,
        words: Float[Tensor, "b n d"],
        mask: Bool[Tensor, "b n"],
        special: Bool[Tensor, "b n"] | None,
    ) -> Located:
        """Algorithm 1 on pairs, row by row."""


class Picture(NamedTuple):
    """Pictures before any text: what the locator prepared, and the unit vector that is contrasted."""

    prepared: Any
    vector: Float[Tensor, "b e"]

    def __getitem__(self, index) -> Picture:
        return Picture(self.prepared[index], self.vector[index])


class Caption(NamedTuple):
    """Texts before any picture: token states, which are real, which are special, and the unit vector."""

    words: Float[Tensor, "b n d"]
    mask: Bool[Tensor, "b n"]
    special: Bool[Tensor, "b n"] | None
    vector: Float[Tensor, "b e"]

    def __getitem__(self, index) -> Caption:
        return Caption(*(None if part is None else part[index] for part in self))


class Boxed(NamedTuple):
    """What towers take, and the images' proposals, see `data.pairs.BoxedSource`."""

    seen: Tensor | list[Tensor]
    given: Float[Tensor, "b q 5"]


class Encoders(nn.Module):
    """Both towers, and the projections into the space of the contrast.

    Args:
        width: D, of the towers' tokens.
        embed: width of the vectors; 0 leaves the tokens as they are.
    """

    def __init__(self, towers: nn.Module, width: int, embed: int = 256):
        super().__init__()
        self.towers = towers
        self.project_image = nn.Linear(width, embed) if embed else nn.Identity()
        self.project_text = nn.Linear(width, embed) if embed else nn.Identity()

    def draw_projections(self) -> None:
        """Draw both projections again."""
        for layer in (self.project_image, self.project_text):
            if isinstance(layer, nn.Linear):
                layer.reset_parameters()

    def image(self, pixels: Tensor | list[Tensor] | Boxed, locator: nn.Module | None = None) -> Picture:
        """Pictures; what only a locator can prepare is None without one."""
        pixels, given = pixels if isinstance(pixels, Boxed) else (pixels, None)
        maps = self.towers.vision(pixels)
        prepared, pooled = None, self.towers.pooled(maps)
        token = pooled
        if locator is not None:
            prepared = locator.prepare(maps, pixels, given)
            token = locator.visual_token(prepared, pooled)
            if (
                locator.token != "map"
            ):  # what nothing reads must still be reached: data-parallel training waits for it
                token = token + 0 * pooled
        return Picture(prepared, unit(self.project_image(token)))

    def text(
        self, input_ids: Int[Tensor, "b n"], mask: Bool[Tensor, "b n"], special: Bool[Tensor, "b n"] | None
    ) -> Caption:
        words = self.towers.text(input_ids, mask)
        return Caption(words, mask, special, unit(self.project_text(words[:, 0])))


def pixels_or_maps(
    pixels: Tensor | None = None, given: Tensor | None = None, **maps: Tensor
) -> Tensor | list[Tensor] | Boxed:
    """What towers take: pixels, or maps that were made before, in the order in which they are given."""
    seen = list(maps.values()) if pixels is None else pixels
    return seen if given is None else Boxed(seen, given)


def seen_and_given(image: dict[str, Tensor]) -> tuple[Tensor | list[Tensor], Tensor | None]:
    """What towers take of images as batches have them, and the proposals that were found elsewhere; None without."""
    seen = pixels_or_maps(**image)
    return seen if isinstance(seen, Boxed) else (seen, None)


def prepare_images(
    towers: nn.Module, locator: nn.Module, image: dict[str, Tensor]
) -> tuple[Any, list[Tensor]]:
    """What the locator prepares of images as batches have them, and the towers' maps."""
    pixels, given = seen_and_given(image)
    maps = towers.vision(pixels)
    return locator.prepare(maps, pixels, given), maps


def locate_pairs(
    towers: nn.Module, locator: nn.Module, image: dict[str, Tensor], text: dict[str, Tensor]
) -> Located:
    """Algorithm 1 on images and texts as batches have them, row by row; no pooled vector is made."""
    pictures, _ = prepare_images(towers, locator, image)
    words = towers.text(text["input_ids"], text["mask"])
    return locator.locate(pictures, words, text["mask"], text.get("special"))


# ------------------------------------------------------------------------------ the whole model, Eq. 8-9
class SLAN(Pretrained, nn.Module):
    """Towers, self-locator and the objective of Eq. 9.

        L_ds = L_itm + L_itc + L_lm        Eq. 8
        L    = L_ds + L_reg                Eq. 9

    The locator sees three kinds of pairs a step: the true ones (whose boxes alone make L_reg, for a text that does not
    match moves boxes to nowhere), two negatives to each, and the true ones with words masked (masking them in the
    first place would tell the matching head which pairs are true). What pictures prepare is shared by all three.

    Args:
        towers, locator: modules that do what `Towers` and `Locator` say. With a locator whose `token` is `regions`
            (arXiv) the contrast needs it too, and the momentum encoders copy it.
        words: what masking needs, `Words.of(tokenizer)`; None only with a weight of 0 for `mlm`.
        tied: see `MaskedWordHead`.
        random_steps: for so many steps of training the negatives of matching are drawn at random. Against hard ones of
            trained towers a matching head from scratch learns next to nothing in the first hundreds of steps.

    The queues hold no fewer pairs than the whole batch; `queue=0` contrasts within the batch. The momentum encoders
    give the keys and exist where keys must last or teach, with a queue or `distil`; `momentum=0` is none, and the
    queue then keeps the encoders' own vectors. A pair ranks by the `odds`, the difference of its two logits, or by the
    `logit` of "matched" alone, as in ALBEF: but what both logits share no loss ever trains (`match_score`).

    Raises:
        ValueError: For settings that do not go together.
    """

    def __init__(
        self,
        towers: nn.Module,
        locator: nn.Module,
        config: SLANConfig,
        *,
        words: Words | None = None,
        tied: nn.Embedding | None = None,
        random_steps: int = 0,
    ):
        super().__init__()
        c = config
        if random_steps < 0:
            raise ValueError(f"random_steps = {random_steps}: must not be negative")
        self.random_steps = random_steps
        self.register_buffer("steps", torch.zeros((), dtype=torch.long))  # of training, so far
        self.weights = c.weights
        if not any(self.weights.values()):
            raise ValueError(f"the weights of {TERMS} are all 0: give one at least")
        if c.distil and not c.momentum:
            raise ValueError("distil needs momentum encoders: give momentum=0.995")
        if c.contrast == "fused" and (c.queue or c.distil or not c.itm_weight):
            raise ValueError(
                "contrast='fused' compares tokens that every pair has for itself: give queue=0, distil=0 and a weight "
                "of itm, whose head ranks the pairs"
            )
        self.fused_contrast = c.contrast == "fused"
        self.match_score, self.mask_share, self.words = c.match_score, c.mask_share, words
        self.form = {"same_picture": c.same_picture, "distil": c.distil, "reduction": c.reduction}
        contrast = self.weights["itc"] > 0
        for name, given, wanted in (("towers", towers, Towers), ("locator", locator, Locator)):
            if not isinstance(given, wanted):
                raise ValueError(
                    f"{name} ({type(given).__name__}) lacks something of {wanted.__name__}: see there"
                )
        self.encoders, self.locator = Encoders(towers, c.width, c.embed), locator
        self.by_regions = locator.token == "regions"
        # what no term reaches is not trained: data-parallel training would wait for its gradient
        if not contrast:
            self.encoders.project_image.requires_grad_(False)
            self.encoders.project_text.requires_grad_(False)
        if not self.by_regions and not any(self.weights[name] for name in ("itm", "mlm", "reg", "word")):
            self.locator.requires_grad_(False)
        self.temperature = Temperature(c.tau, c.learnable_tau and contrast)
        self.word_temperature = Temperature(c.tau, c.learnable_tau) if self.weights["word"] else None
        self.queue = Queue(c.queue, c.embed or c.width) if c.queue and contrast else None
        self.momentum = (
            Momentum(self._followed(), c.momentum)
            if contrast and c.momentum and (c.queue or c.distil)
            else None
        )
        self.head = MatchingHead(c.width) if self.weights["itm"] else None
        self.masked = None
        if self.weights["mlm"]:
            if words is None:
                raise ValueError("mlm needs words=Words.of(tokenizer); without it give mlm_weight=0")
            self.masked = MaskedWordHead(c.width, words.size, form=c.mlm, picture=c.mlm_picture, tied=tied)
        # the queues are alike in all processes by construction: sending them round at each step would cost more than
        # the step (torch has no public way to say so)
        self._ddp_params_and_buffers_to_ignore = [
            n for n, _ in self.named_buffers() if n.startswith("queue.")
        ]

    # -------------------------------------------------------------------------- parts
    def _followed(self) -> dict[str, nn.Module]:
        """What the momentum encoders copy: all that makes the contrasted vectors."""
        return {"encoders": self.encoders} | ({"locator": self.locator} if self.by_regions else {})

    def encode_image(self, pixels: Tensor | None = None, **maps: Tensor) -> Picture:
        """What pictures give before any text: what the locator prepares, and unit vectors "b e".

        Args:
            pixels: "b 3 h w"; or instead the maps that towers without a network of their own take, by any names.
        """
        return self.encoders.image(pixels_or_maps(pixels=pixels, **maps), self.locator)

    def encode_text(
        self,
        input_ids: Int[Tensor, "b n"],
        mask: Bool[Tensor, "b n"],
        special: Bool[Tensor, "b n"] | None = None,
    ) -> Caption:
        """Token states and unit vectors "b e" of texts; without `special` it is the first and the last token."""
        return self.encoders.text(input_ids, mask, special)

    def locate(self, picture: Picture, caption: Caption) -> Located:
        """The self-locator on pairs: row i of both."""
        return self.locator.locate(picture.prepared, caption.words, caption.mask, caption.special)

    def match(self, picture: Picture, caption: Caption) -> Float[Tensor, " p"]:
        """How well each pair matches, from the fused tokens; higher is better, fp32.

        Raises:
            ValueError: For a model without a matching head.
        """
        if self.head is None:
            raise ValueError("this model has no matching head: its weight of `itm` is 0")
        return self.judge(self.locate(picture, caption))

    def judge(self, located: Located) -> Float[Tensor, " p"]:
        """`match` of pairs that were located."""
        logits = wide(self.head(located.picture, located.text))
        return logits[:, 1] - logits[:, 0] if self.match_score == "odds" else logits[:, 1]

    # -------------------------------------------------------------------------- one step
    def forward(self, batch: dict) -> dict[str, Tensor]:
        """The terms of Eq. 8-9 that have a weight, and `loss`, for a batch of pairs.

        Args:
            batch: `image` (keywords of `encode_image`), `text` (`input_ids`, `mask`, `special`) and `image_id`, as
                `data.pairs.Pairs` makes them. Each process holds as many pairs.

        In training mode the momentum encoders take a step and the batch enters the queues.

        Raises:
            ValueError: If the queue has fewer places than the whole batch has pairs, or ITM finds no negative.
        """
        text, image_id = batch["text"], batch["image_id"]
        if self.queue is not None:
            self.queue.check(len(image_id) * world())
        if self.momentum is not None and self.training:
            self.momentum.update(self._followed())
        asked = self.by_regions or any(self.weights[name] for name in ("itm", "mlm", "reg", "word"))
        picture = self.encoders.image(pixels_or_maps(**batch["image"]), self.locator if asked else None)
        caption = self.encode_text(**text)
        located = self.locate(picture, caption) if self.weights["itm"] or self.weights["reg"] else None
        if self.training:
            self.steps += 1
        terms = {}
        fused = self._fused_table(picture, caption) if self.fused_contrast and self.weights["itc"] else None
        if self.weights["itc"]:
            terms["itc"] = self._contrast(batch, picture, caption, fused)
        if self.weights["itm"]:
            terms["itm"] = shared(self._matching(picture, caption, located, image_id, fused))
        if self.weights["mlm"]:
            terms["mlm"] = shared(self._masked(picture, text))
        if self.weights["reg"]:  # Eq. 9: summed over regions, mean over pictures
            terms["reg"] = shared(wide(located.reg_loss).mean())
        if self.weights["word"]:
            terms["word"] = self._region_word(picture, caption, image_id)
        return {"loss": sum(self.weights[name] * value for name, value in terms.items()), **terms}

    def _contrast(self, batch: dict, picture: Picture, caption: Caption, fused: Tensor | None) -> Tensor:
        image_id = batch["image_id"]
        if fused is not None:
            return shared(
                softmax_both_ways(fused, image_id, self.form["same_picture"], self.form["reduction"])
            )
        if self.momentum is None:
            image, text = picture.vector, caption.vector
        else:
            with torch.no_grad():
                slow, given = self.momentum.copies, pixels_or_maps(**batch["image"])
                image = slow["encoders"].image(given, slow["locator"] if self.by_regions else None).vector
                text = slow["encoders"].text(**batch["text"]).vector
        keys = Keys(gather(image), gather(text), gather(image_id))
        if self.queue is not None:
            keys = Keys(*(torch.cat(both) for both in zip(keys, self.queue.keys(), strict=True)))
        loss = itc(picture.vector, caption.vector, image_id, keys, self.temperature(),
                   first=rank() * len(image_id), **self.form)  # fmt: skip
        if self.queue is not None and self.training:
            self.queue.enqueue(image, text, image_id)
        return shared(loss)

    def _fused_table(self, picture: Picture, caption: Caption) -> Float[Tensor, "b b"]:
        """What Eq. 5-6 compare where the contrast reads the tokens after the locator (S20): sim(T_v, T_t) of a pair is
        known to that pair alone, so that b x b pairs pass the locator, of this process's own batch; nothing could wait
        in a queue."""
        b = len(picture.vector)
        rows = torch.arange(b, device=picture.vector.device)
        i, j = rows.repeat_interleave(b), rows.repeat(b)
        at = self.locate(picture[i], caption[j])
        image = unit(self.encoders.project_image(at.picture))
        text = unit(self.encoders.project_text(at.text))
        return self.temperature() * (image * text).sum(1).view(b, b)

    def _matching(
        self, picture: Picture, caption: Caption, located: Located, image_id: Tensor, fused: Tensor | None
    ) -> Tensor:
        """One true pair to two hard ones, from this process's own batch (as ALBEF): drawn by the contrast's own
        similarities, `fused` where it compares fused tokens."""
        with torch.no_grad(), torch.autocast(image_id.device.type, enabled=False):
            if fused is None:
                similarity = self.temperature() * picture.vector @ caption.vector.T
            else:
                similarity = fused.detach().float()
            if self.training and self.steps <= self.random_steps:
                similarity = torch.zeros_like(similarity)
            texts, pictures = hard_negatives(similarity, image_id)
        rows = torch.arange(len(image_id), device=image_id.device)
        wrong = self.locate(picture[torch.cat([rows, pictures])], caption[torch.cat([texts, rows])])
        logits = self.head(torch.cat([located.picture, wrong.picture]), torch.cat([located.text, wrong.text]))
        return itm(logits, torch.arange(len(logits), device=rows.device) < len(rows))

    def _masked(self, picture: Picture, text: dict) -> Tensor:
        hidden, chosen = mask_words(
            text["input_ids"], text["mask"], text["special"], self.words, share=self.mask_share
        )
        located = self.locate(picture, self.encode_text(hidden, text["mask"], text["special"]))
        return mlm(
            self.masked(located.words, located.picture, located.text, chosen), text["input_ids"][chosen]
        )

    def _region_word(self, picture: Picture, caption: Caption, image_id: Tensor) -> Tensor:
        levels, valid = self.locator.fixed_regions(picture.prepared)
        counted = self.locator.counted(caption.mask, caption.special)
        return region_word(levels, valid, caption.words, counted, image_id, self.word_temperature())

    # -------------------------------------------------------------------------- fine-tuning
    def restart_momentum(self) -> None:
        """After other weights were loaded: the momentum encoders become the encoders, the queues are empty."""
        if self.momentum is not None:
            self.momentum.reset(self._followed())
        if self.queue is not None:
            self.queue.clear()

    def load_pretrained(self, path: str | Path) -> list[str]:
        """Begin with the weights of a pretrained run (its `best.safetensors`), other data and another objective.

        The momentum encoders become the encoders, the queues begin empty: their vectors are of other pictures.

        Returns:
            The heads that only one of the two has: those left out, or those that begin at random.

        Raises:
            ValueError: If towers, locator or projections differ; the message names the weights. A file that cannot be
                read is a DataError.
        """
        content, kept = read_tensors(path), "locator.kept."
        own = ("momentum.", "queue.", "steps")
        if taken := not any(k.startswith(kept) for k in content):  # a detector that is frozen from now on
            own += (kept,)
        state = {k: v for k, v in content.items() if not k.startswith(own)}
        mine = {k: v for k, v in self.state_dict().items() if not k.startswith(own)}
        wrong = [k for k in state if k in mine and state[k].shape != mine[k].shape]
        here = {
            mine[k].data_ptr() for k in mine if k in state
        }  # a shared tensor is saved under its first name
        missing = [k for k in mine if k not in state and mine[k].data_ptr() not in here]
        extra = [k for k in state if k not in mine]
        heads = ("head.", "masked.", "word_temperature.")
        lost = [k for k in (*missing, *extra) if not k.startswith(heads)]
        if wrong or lost:
            raise ValueError(
                f"{path} is of another model: of another shape {wrong[:5]}, missing or unknown {lost[:5]} (first five)"
            )
        self.load_state_dict(state, strict=False)
        if taken and any(k.startswith(kept) for k in self.state_dict()):
            self.locator.keep(self.encoders.towers.image_encoder)
        self.restart_momentum()
        return sorted({k.partition(".")[0] for k in (*missing, *extra)})


class Unimodal(nn.Module):
    """The encoders of a SLAN and the contrast in the batch (Eq. 5-6) alone, without a locator.

    The paper has nothing of the kind: its BERT comes trained, and 14 million pictures train its vision encoder (4.1).
    For runs with neither: `fit` it, and the model that it was made of has trained encoders, for the parts are shared.
    T_v is the pooled map, whatever the model's token.
    """

    def __init__(self, model: SLAN):
        super().__init__()
        self.encoders, self.temperature, self.form = model.encoders, model.temperature, model.form

    def encode_image(self, pixels: Tensor | None = None, **maps: Tensor) -> Picture:
        """As SLAN's; nothing is prepared."""
        return self.encoders.image(pixels_or_maps(pixels=pixels, **maps))

    def encode_text(
        self,
        input_ids: Int[Tensor, "b n"],
        mask: Bool[Tensor, "b n"],
        special: Bool[Tensor, "b n"] | None = None,
    ) -> Caption:
        """As SLAN's."""
        return self.encoders.text(input_ids, mask, special)

    def forward(self, batch: dict) -> dict[str, Tensor]:
        """`loss`: Eq. 6 of a batch, all processes together."""
        image_id = batch["image_id"]
        image, text = self.encode_image(**batch["image"]).vector, self.encode_text(**batch["text"]).vector
        keys = Keys(gather(image), gather(text), gather(image_id))
        form = {name: value for name, value in self.form.items() if name != "distil"}
        loss = itc(image, text, image_id, keys, self.temperature(), first=rank() * len(image_id), **form)
        return {"loss": shared(loss)}


# ------------------------------------------------------------------------------ 4.2, retrieval
def pair_scorer(
    model: SLAN,
    pictures: Callable[[Collection[int]], dict[str, Tensor]],
    captions: Callable[[Collection[int]], dict[str, Tensor]],
    *,
    block: int = 64,
    memory: int = 2**31,
) -> Callable[[Tensor, Tensor], Tensor]:
    """The `score_pairs` of `evaluation.reranking`: rows of pictures and of captions to matching scores.

    Args:
        pictures, captions: rows to keywords of the encoders (a source's `batch`).
        block: pairs that pass the locator at a time; as many pictures are prepared at a time.
        memory: bytes of token states of captions to keep, for each caption comes with many pictures.
    """
    device = next(model.parameters()).device
    states: dict[int, Caption] = {}
    room = memory

    def encode_captions(rows: list[int]) -> Caption:
        nonlocal room
        found = {row: states[row] for row in rows if row in states}
        if new := sorted(set(rows) - set(found)):
            whole = model.encode_text(**{name: value.to(device) for name, value in captions(new).items()})
            for i, row in enumerate(new):
                long = int(whole.mask[i].nonzero().max()) + 1
                tokens = (whole.words, whole.mask, whole.special)
                kept = (None if part is None else part[i, :long].clone() for part in tokens)
                found[row] = Caption(*kept, whole.vector[i].clone())
                size = found[row].words.numel() * found[row].words.element_size()
                if size <= room:
                    states[row], room = found[row], room - size
        columns = list(zip(*(found[row] for row in rows), strict=True))
        tokens = (None if part[0] is None else pad_sequence(part, batch_first=True) for part in columns[:3])
        return Caption(*tokens, torch.stack(columns[3]))

    @torch.no_grad()
    def score_pairs(i: Int[Tensor, " p"], j: Int[Tensor, " p"]) -> Float[Tensor, " p"]:
        training, scores = model.training, torch.empty(len(i))
        model.eval()
        for rows in i.unique().split(block):
            given = {name: value.to(device) for name, value in pictures(rows.tolist()).items()}
            whole = model.encode_image(**given)
            for part in torch.isin(i, rows).nonzero().squeeze(1).split(block):
                which = torch.searchsorted(rows, i[part]).to(device)
                scores[part] = model.match(whole[which], encode_captions(j[part].tolist())).float().cpu()
        model.train(training)
        return scores

    return score_pairs
