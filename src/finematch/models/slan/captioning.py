"""Captioning (4.2.2, Table 3, Figure 1b): a causal Transformer decoder that reads what the self-locator found.

> "Given an input image, this task generates a sentence description to describe the image in detail. We use COCO
> Karpathy split to fine-tune and evaluate our method."

The paper says no more. The decoder reads {T_v, E^G_{L+1}} by cross attention; it begins with the weights of the text
tower, its cross attention is new. What the locator's text is while there is no caption yet is open (S31): BLIP's
prompt "a picture of" (`prompt`) or no word at all (`none`). It is never the caption, so that no word sees a later one
through the regions. The prompt, the loss (mean over words, label smoothing 0.1) and beam search (3 beams, 5 to 20
tokens, the prompt among them) are BLIP's.

Axes: `b` images, `n` tokens, `s` states that the decoder reads (T_v, then the regions), `p` tokens of the prompt.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from finematch.encoders import causal_decoder
from finematch.losses import wide
from finematch.models.configs import CaptioningConfig
from finematch.models.slan.locator import Located
from finematch.models.slan.objective import SLAN, locate_pairs

PROMPT = "a picture of"


class Captioner(nn.Module):
    """A pretrained SLAN that writes captions; `forward` is the loss of fine-tuning.

    Args:
        model: its towers and locator are used and trained; its heads are left alone.
        tokenizer: the text tower's.
    """

    def __init__(self, model: SLAN, tokenizer: PreTrainedTokenizerBase, config: CaptioningConfig):
        super().__init__()
        self.towers, self.locator, self.config = model.encoders.towers, model.locator, config
        self.tokenizer = tokenizer
        self.decoder = causal_decoder(self.towers.text_encoder.net)
        start, end = tokenizer.cls_token_id, tokenizer.sep_token_id
        words = tokenizer(PROMPT, add_special_tokens=False)["input_ids"]
        self.register_buffer("prompt", torch.tensor([start, *words]), persistent=False)
        asked = words if config.locator_text == "prompt" else []
        self.register_buffer("asked", torch.tensor([start, *asked, end]), persistent=False)

    def locate(self, image: dict[str, Tensor]) -> Located:
        """Algorithm 1 on images and the text that the locator has before there is a caption (S31)."""
        ids = self.asked.expand(len(next(iter(image.values()))), -1)
        text = {"input_ids": ids, "mask": torch.ones_like(ids, dtype=torch.bool)}
        return locate_pairs(self.towers, self.locator, image, text)

    def states(self, at: Located) -> tuple[Float[Tensor, "b s d"], Bool[Tensor, "b s"]]:
        """{T_v, E^G_{L+1}}, and which are real."""
        real = torch.ones_like(at.valid[:, :1])
        return torch.cat([at.picture[:, None], at.regions], 1), torch.cat([real, at.valid], 1)

    def with_prompt(self, text: dict[str, Tensor]) -> tuple[Int[Tensor, "b n"], Bool[Tensor, "b n"]]:
        """Captions, `[CLS] words [SEP]`, after the prompt, and which tokens are real."""
        ids, mask = text["input_ids"], text["mask"]
        before = self.prompt.expand(len(ids), -1)
        real = torch.ones_like(before, dtype=torch.bool)
        return torch.cat([before, ids[:, 1:]], 1), torch.cat([real, mask[:, 1:]], 1)

    def read(self, at: Located, ids: Int[Tensor, "b n"], mask: Bool[Tensor, "b n"], **asked: bool) -> Any:
        """The decoder's output for tokens: `logits` "b n v" of the token after each, and what else is asked for."""
        return self.decoder(**self._given(at, ids, mask), **asked)

    def _given(self, at: Located, ids: Int[Tensor, "b n"], mask: Bool[Tensor, "b n"]) -> dict[str, Any]:
        states, valid = self.states(at)
        return {
            "input_ids": ids, "attention_mask": mask.long(), "encoder_hidden_states": states,
            "encoder_attention_mask": valid.long(), "use_cache": False,
        }  # fmt: skip

    def forward(self, batch: dict) -> dict[str, Tensor]:
        """`loss`: the mean over all words of the batch's captions (and [SEP]) of -log p(word | words before, image).

        Only states before a word reach the vocabulary: with 30,000 words it is most of a small decoder's work.
        """
        ids, mask = self.with_prompt(batch["text"])
        read = self.decoder.bert(**self._given(self.locate(batch["image"]), ids, mask)).last_hidden_state
        p = len(self.prompt)
        real = mask[:, p:]
        logits = wide(self.decoder.cls(read[:, p - 1 : -1][real]))
        smoothing = self.config.smoothing if self.training else 0.0
        loss = F.cross_entropy(logits, ids[:, p:][real], label_smoothing=smoothing)
        return {"loss": loss}

    @torch.no_grad()
    def attention(
        self, at: Located, ids: Int[Tensor, "b n"], mask: Bool[Tensor, "b n"]
    ) -> Float[Tensor, "b n t"]:
        """How much the decoder's last layer looks at each region when it writes the token after each, mean over heads.

        The rows sum to 1 less the share of T_v.
        """
        return self.read(at, ids, mask, output_attentions=True).cross_attentions[-1].mean(1)[..., 1:]

    @torch.no_grad()
    def generate(self, image: dict[str, Tensor]) -> tuple[list[str], Int[Tensor, "b n"], Located]:
        """Captions of images by beam search; their tokens, the prompt among them; what the locator found."""
        at = self.locate(image)
        states, valid = self.states(at)
        ids = self.prompt.expand(len(states), -1)
        written = self.decoder.generate(
            ids, attention_mask=torch.ones_like(ids), encoder_hidden_states=states,
            encoder_attention_mask=valid.long(), num_beams=self.config.beams, do_sample=False, use_cache=False,
            max_length=self.config.max_length, min_length=self.config.min_length,
            eos_token_id=self.tokenizer.sep_token_id, pad_token_id=self.tokenizer.pad_token_id,
        )  # fmt: skip
        words = self.tokenizer.batch_decode(written[:, ids.shape[1] :], skip_special_tokens=True)
        return [text.strip() for text in words], written, at
