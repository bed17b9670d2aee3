"""Visual question answering (4.2.3, Table 3): a decoder that writes the answer, conditioned on question and regions.

> "We follow [23] and treat VQA as an open-ended question-generation task. We fuse the image embedding with the question
> embedding and send them to the question decoder to get the result."

The question is the text of the self-locator, so that it steers the regions. A causal Transformer decoder reads what the
locator gives, {E^T_{L+1}, E^G_{L+1}}, and writes the answer. The paper leaves open how an answer is chosen (S32): by
default every answer of a list is scored by its log-likelihood (BLIP: the first `candidates` by their first word, then
whole); `generate` writes freely, the likeliest word at each step. The decoder is that of captioning
(`encoders.causal_decoder`). In the loss each answer of a question counts with the share of people who gave it, as in
BLIP. Here answers of one normalised form count as one, and the loss has no label smoothing.

Axes: `b` questions, `a` answers, `n` tokens, `s` states that the decoder reads, `v` words, `d` width.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase

from finematch.data.pairs import Source
from finematch.data.record import Question
from finematch.encoders import causal_decoder
from finematch.evaluation.vqa import normalise
from finematch.losses import wide
from finematch.models.configs import AnsweringConfig
from finematch.models.slan.locator import Located
from finematch.models.slan.objective import SLAN, locate_pairs
from finematch.text import Ragged, tokenise


def spellings(questions: Iterable[Question]) -> dict[str, str]:
    """By normalised form the spelling on which the people of most questions agree ("t shirt": "t-shirt"; the first of
    equals). There the evaluator compares letters, so that the normalised form could not win; everywhere else it
    normalises both sides."""
    found: dict[str, Counter[str]] = defaultdict(Counter)
    for question in questions:
        if len(set(question.answers)) == 1:
            found[normalise(question.answers[0])][question.answers[0]] += 1
    return {form: spelt.most_common(1)[0][0] for form, spelt in found.items() if form}


def answer_shares(question: Question, spelling: Mapping[str, str] = MappingProxyType({})) -> dict[str, float]:
    """The answers of a question with the share of people who gave each. Answers of one normalised form are one answer,
    in its `spelling`, or else in that form; empty ones are left out."""
    found = Counter(filter(None, map(normalise, question.answers)))
    return {spelling.get(form, form): count / len(question.answers) for form, count in found.items()}


def answer_list(questions: Sequence[Question], most: int = 3128) -> list[str]:
    """The answers to rank, in their `spellings`: the most frequent of the questions' most frequent answers (BLIP:
    3,128)."""
    first = [max(shares, key=shares.get) for shares in map(answer_shares, questions) if shares]
    spelling = spellings(questions)
    return [spelling.get(form, form) for form, _ in Counter(first).most_common(most)]


class AskedImages(Dataset):
    """Questions with their images and answers, as batches of `Answerer`.

    Args:
        images: a source whose row `row_of[i]` is the image of question i.
        spelling: of the answers of train, see `spellings`. Of questions without answers, batches have none either.
    """

    def __init__(
        self,
        images: Source,
        questions: Sequence[Question],
        row_of: Sequence[int],
        tokenizer: PreTrainedTokenizerBase,
        *,
        spelling: Mapping[str, str] = MappingProxyType({}),
        max_length: int = 32,
    ):
        self.images, self.row_of = images, np.asarray(row_of)
        self.texts = tokenise([question.text for question in questions], tokenizer, max_length=max_length)
        shares = [answer_shares(question, spelling) for question in questions]
        self.start = np.cumsum([0, *map(len, shares)])
        self.share = torch.tensor([share for one in shares for share in one.values()])
        words = [answer for one in shares for answer in one]
        self.answers = tokenise(words, tokenizer, max_length=max_length) if words else None

    def __len__(self) -> int:
        return len(self.row_of)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.__getitems__([index])

    def __getitems__(self, index: Sequence[int]) -> dict[str, Any]:
        """`image`, `text`, and where there are answers `answers` (ids and mask "a n"), `owner`, `share` "a"."""
        index = np.asarray(index)
        found = {"image": self.images.batch(self.row_of[index]), "text": self.texts.batch(index)}
        rows = [np.arange(self.start[i], self.start[i + 1]) for i in index]
        if flat := np.concatenate(rows).tolist():
            found["answers"] = self.answers.batch(flat)
            found["owner"] = torch.tensor([k for k, some in enumerate(rows) for _ in some])
            found["share"] = self.share[flat]
        return found


class Answerer(nn.Module):
    """A pretrained SLAN that answers questions; `forward` is the loss of fine-tuning.

    Args:
        model: its towers and locator are used and trained; its heads are left alone. Its text tower must know all words
            of the tokenizer (`BertTower.grow`).
        config: the readings.
    """

    def __init__(self, model: SLAN, config: AnsweringConfig | None = None):
        super().__init__()
        self.config = config or AnsweringConfig()
        self.towers, self.locator = model.encoders.towers, model.locator
        self.decoder = causal_decoder(self.towers.text_encoder.net)

    def states(
        self, image: dict[str, Tensor], text: dict[str, Tensor]
    ) -> tuple[Float[Tensor, "b s d"], Bool[Tensor, "b s"]]:
        """{E^T_{L+1}, E^G_{L+1}} of questions and their images, and which are real."""
        return self._states(locate_pairs(self.towers, self.locator, image, text), text["mask"])

    def _states(
        self, at: Located, mask: Bool[Tensor, "b n"]
    ) -> tuple[Float[Tensor, "b s d"], Bool[Tensor, "b s"]]:
        return torch.cat([at.words, at.regions], 1), torch.cat([mask, at.valid], 1)

    @torch.no_grad()
    def attention(
        self, image: dict[str, Tensor], text: dict[str, Tensor]
    ) -> tuple[Located, Float[Tensor, "b t"]]:
        """What the locator found for questions, and how much the decoder's last layer looks at each region when it
        writes the first word of the answer, mean over heads. The rows sum to 1 less the share of the words."""
        at = locate_pairs(self.towers, self.locator, image, text)
        states, valid = self._states(at, text["mask"])
        looked = self.decoder(
            input_ids=text["input_ids"][:, :1], encoder_hidden_states=states, encoder_attention_mask=valid.long(),
            use_cache=False, output_attentions=True,
        ).cross_attentions[-1]  # fmt: skip
        return at, looked.mean(1)[:, 0, text["mask"].shape[1] :]

    def logits(
        self, ids: Int[Tensor, "a n"], states: Float[Tensor, "a s d"], valid: Bool[Tensor, "a s"]
    ) -> Float[Tensor, "a n v"]:
        """Of the word after each, fp32. Padding comes last, so that no word before it sees it."""
        return wide(self.decoder(input_ids=ids, encoder_hidden_states=states, encoder_attention_mask=valid.long(),
                                 use_cache=False).logits)  # fmt: skip

    def forward(self, batch: dict) -> dict[str, Tensor]:
        """`loss`: -log p(answer) times the share of people who gave it, summed over answers, mean over questions.

        Raises:
            ValueError: For questions without answers.
        """
        if "answers" not in batch:
            raise ValueError("these questions have no answers: nothing can be learned from them")
        states, valid = self.states(batch["image"], batch["text"])
        owner, answers = batch["owner"], batch["answers"]
        scores = self.likelihood(states[owner], valid[owner], answers["input_ids"], answers["mask"])
        return {"loss": -(batch["share"] * scores).sum() / len(states)}

    def likelihood(
        self,
        states: Float[Tensor, "a s d"],
        valid: Bool[Tensor, "a s"],
        ids: Int[Tensor, "a n"],
        mask: Bool[Tensor, "a n"],
    ) -> Float[Tensor, " a"]:
        """log p of whole answers, fp32: of every token after the first, [SEP] included."""
        logits = self.logits(ids[:, :-1], states, valid)
        each = F.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none")
        return -(each * mask[:, 1:]).sum(1)

    def answer(
        self, image: dict, text: dict, answers: Sequence[str], tokenizer: PreTrainedTokenizerBase
    ) -> list[str]:
        """An answer for each question, chosen as the settings say; `answers` is the list to rank."""
        if self.config.choose == "generate":
            return self.generate(image, text, tokenizer)
        best = self.rank(image, text, tokenise(list(answers), tokenizer), candidates=self.config.candidates)
        return [answers[i] for i in best.tolist()]

    @torch.no_grad()
    def rank(self, image: dict, text: dict, answers: Ragged, *, candidates: int = 128) -> Int[Tensor, " b"]:
        """The likeliest answer of a list for each question.

        Args:
            answers: the list, tokenised.
            candidates: how many are scored whole, those whose first word is likeliest; of equals the earlier ones.
        """
        states, valid = self.states(image, text)
        device, count = states.device, min(candidates, len(answers))
        every = {name: value.to(device) for name, value in answers.batch(range(len(answers))).items()}
        start = every["input_ids"][:1, :1].expand(len(states), 1)
        first = self.logits(start, states, valid)[:, 0][:, every["input_ids"][:, 1]]
        order = first.argsort(dim=1, descending=True, stable=True)[:, :count]
        best = []
        for row, chosen in enumerate(order):
            shape = count, *states.shape[1:]
            scores = self.likelihood(
                states[row].expand(shape),
                valid[row].expand(shape[:2]),
                every["input_ids"][chosen],
                every["mask"][chosen],
            )
            best.append(chosen[scores.argmax()])
        return torch.stack(best)

    @torch.no_grad()
    def generate(
        self, image: dict, text: dict, tokenizer: PreTrainedTokenizerBase, *, max_words: int = 8
    ) -> list[str]:
        """An answer for each question, the likeliest word at each step until [SEP]."""
        states, valid = self.states(image, text)
        start = torch.full((len(states), 1), tokenizer.cls_token_id, device=states.device)
        ids = self.decoder.generate(
            start, attention_mask=torch.ones_like(start), encoder_hidden_states=states,
            encoder_attention_mask=valid.long(), do_sample=False, use_cache=False, max_new_tokens=max_words,
            eos_token_id=tokenizer.sep_token_id, pad_token_id=tokenizer.pad_token_id,
        )  # fmt: skip
        return [text.strip() for text in tokenizer.batch_decode(ids, skip_special_tokens=True)]
