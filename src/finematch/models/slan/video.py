"""Video-text retrieval (4.2.5, Table 5): m frames of a video as one image of the retrieval model.

> "We randomly select m frames of the video input and concatenate them to get an image-text sequence, then we feed them
> directly into our image-text retrieval model."

How frames are concatenated the paper leaves open (S34). The contrast compares the mean of the frames' vectors, as a
unit vector. For matching every frame passes the locator with the text, and the regions of all frames are one sequence:
T_v is the mean of all of them, T_t the mean over the frames. Neither knows the order of the frames. Nothing is new in
the model, so it works without training; `VideoSLAN` fine-tunes it.

Axes: `v` videos, `m` frames of each, `p` pairs of a video and a text, `t` regions, `d` width of tokens, `e` of vectors.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase

from finematch.data.pairs import Source
from finematch.data.record import Clip
from finematch.losses import shared, wide
from finematch.models.slan.contrast import softmax_both_ways, unit
from finematch.models.slan.locator import mean_region
from finematch.models.slan.matching import hard_negatives, itm
from finematch.models.slan.objective import SLAN, Caption, Picture
from finematch.text import tokenise


class ClipPairs(Dataset):
    """Clips and their captions, one pair a caption, as batches of `VideoSLAN`.

    Args:
        frames: a source whose rows `k * m` to `k * m + m - 1` are the frames of clip k.
    """

    def __init__(self, frames: Source, clips: Sequence[Clip], tokenizer: PreTrainedTokenizerBase, m: int):
        self.frames, self.m = frames, m
        self.clip_of = np.repeat(np.arange(len(clips)), [len(clip.captions) for clip in clips])
        self.texts = tokenise([text for clip in clips for text in clip.captions], tokenizer, max_length=32)

    def __len__(self) -> int:
        return len(self.clip_of)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.__getitems__([index])

    def __getitems__(self, index: Sequence[int]) -> dict[str, Any]:
        """`image` (frames "v m"), `text`, `image_id` "v"."""
        clips = self.clip_of[np.asarray(index)]
        return {
            "image": self.clips(clips),
            "text": self.texts.batch(index),
            "image_id": torch.from_numpy(clips),
        }

    def clips(self, rows: Sequence[int] | np.ndarray) -> dict[str, Tensor]:
        """The frames of clips, "v m" rows."""
        return self.frames.batch((np.asarray(rows)[:, None] * self.m + np.arange(self.m)).flatten())


def encode_video(model: SLAN, frames: dict[str, Tensor], m: int) -> tuple[Picture, Float[Tensor, "v e"]]:
    """Frames, m of each video one after another ("v m" rows), and the videos' vectors."""
    picture = model.encode_image(**frames)
    return picture, unit(picture.vector.unflatten(0, (-1, m)).mean(1))


def match_video(model: SLAN, picture: Picture, caption: Caption, m: int) -> Float[Tensor, " p"]:
    """How well each text matches its video; higher is better, fp32.

    Args:
        picture: of the frames, "p m" rows; caption: "p" rows.

    Raises:
        ValueError: For a model without a matching head.
    """
    logits = video_logits(model, picture, caption, m)
    return logits[:, 1] - logits[:, 0] if model.match_score == "odds" else logits[:, 1]


def video_logits(model: SLAN, picture: Picture, caption: Caption, m: int) -> Float[Tensor, "p 2"]:
    """Eq. 4's two logits of the concatenated frames."""
    if model.head is None:
        raise ValueError("this model has no matching head: its weight of `itm` is 0")
    p = len(caption.mask)
    at = model.locate(picture, caption[torch.arange(p, device=caption.mask.device).repeat_interleave(m)])
    if model.locator.config.fused == "regions":
        token = mean_region(
            at.regions.unflatten(0, (p, m)).flatten(1, 2), at.valid.unflatten(0, (p, m)).flatten(1)
        )
    else:
        token = at.picture.unflatten(0, (p, m)).mean(1)
    return wide(model.head(token, at.text.unflatten(0, (p, m)).mean(1)))


def rows_of(videos: Int[Tensor, " p"], m: int) -> Int[Tensor, " _"]:
    """Rows of the frames of videos, "p m"."""
    return (videos[:, None] * m + torch.arange(m, device=videos.device)).flatten()


def video_pair_scorer(
    model: SLAN,
    frames: Callable[[Collection[int]], dict[str, Tensor]],
    captions: Callable[[Collection[int]], dict[str, Tensor]],
    m: int,
    *,
    block: int = 16,
) -> Callable[[Tensor, Tensor], Tensor]:
    """The `score_pairs` of `evaluation.reranking` for videos; see `objective.pair_scorer`.

    Args:
        frames: rows of videos to keywords of the encoder, "v m" frames. captions: rows of captions to theirs.
        block: videos, and pairs, that pass at a time.
    """
    device = next(model.parameters()).device

    @torch.no_grad()
    def score_pairs(i: Int[Tensor, " p"], j: Int[Tensor, " p"]) -> Float[Tensor, " p"]:
        training, scores = model.training, torch.empty(len(i))
        model.eval()
        for rows in i.unique().split(block):
            given = {name: value.to(device) for name, value in frames(rows.tolist()).items()}
            picture, _ = encode_video(model, given, m)
            for part in torch.isin(i, rows).nonzero().squeeze(1).split(block):
                text = {name: value.to(device) for name, value in captions(j[part].tolist()).items()}
                which = rows_of(torch.searchsorted(rows, i[part]).to(device), m)
                scores[part] = match_video(model, picture[which], model.encode_text(**text), m).float().cpu()
        model.train(training)
        return scores

    return score_pairs


class VideoSLAN(nn.Module):
    """A pretrained SLAN on videos; `forward` is the loss of fine-tuning: contrast and matching, Eq. 4-6, in the batch.

    The paper's model sees no video before it is tested. On `scenes` words that say how things move are new to it.
    """

    def __init__(self, model: SLAN, m: int):
        super().__init__()
        self.model, self.m = model, m

    def forward(self, batch: dict) -> dict[str, Tensor]:
        """`loss`, `itc` and, of a model with a matching head, `itm` of videos and texts, row by row.

        Args:
            batch: `image` (keywords of "v m" frames), `text` ("v" rows), `image_id` "v".
        """
        model, image_id = self.model, batch["image_id"]
        picture, vector = encode_video(model, batch["image"], self.m)
        caption = model.encode_text(**batch["text"])
        table = model.temperature() * vector @ caption.vector.T
        contrast = softmax_both_ways(
            wide(table), image_id, model.form["same_picture"], model.form["reduction"]
        )
        terms = {"itc": shared(contrast)}
        if model.head is not None:
            texts, videos = hard_negatives(table, image_id)
            own = torch.arange(len(image_id), device=image_id.device)
            which = rows_of(torch.cat([own, own, videos]), self.m)
            logits = video_logits(model, picture[which], caption[torch.cat([own, texts, own])], self.m)
            terms["itm"] = shared(itm(logits, torch.arange(len(logits), device=own.device) < len(own)))
        return {"loss": sum(terms.values()), **terms}
