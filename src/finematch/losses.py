"""Losses that more than one method uses.

Axes: `b` pairs of this process, `B` pairs of all processes, `d` width.
"""

from __future__ import annotations

import math

import torch
import torch.distributed as dist
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn


def wide(x: Tensor) -> Tensor:
    """Half precision to single, in which losses and cosines are taken; single and double stay."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def world() -> int:
    """How many processes train together."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """The number of this one, from 0."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def gather(x: Tensor) -> Tensor:
    """Concatenate `x` of all processes along the first axis, gradients included; identity in one process.

    Every process must hold the same number of rows. Each process is meant to compute the *whole* global
    loss from the gathered rows: the backward pass then sums the N equal losses' gradients into the local
    rows, the data-parallel mean divides by N, and the result is the gradient of one process at N times the
    batch, exactly.
    """
    if world() == 1:
        return x
    return GatherRows.apply(x)


class GatherRows(torch.autograd.Function):
    """Rows of all processes; backward, the gradients that all of them have for this one's rows are summed.

    (torch's own, `torch.distributed.nn.functional.all_gather`, is deprecated. Its graph holds the process group, whose
    threads then outlive `destroy_process_group`, and now and then abort the process as it ends.)
    """

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        parts = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(world())]
        dist.all_gather(parts, x.contiguous())
        first = rank() * len(x)
        ctx.mine = slice(first, first + len(x))
        return torch.cat(parts)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        # a copy, for it is summed in place; contiguous, for gloo reads a transposed one as if it were laid out by rows
        total = gradient.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total)
        return total[ctx.mine]


@torch.no_grad()
def over_processes(x: Tensor) -> Tensor:
    """The mean over all processes of something that needs no gradient."""
    if world() == 1:
        return x
    x = x.detach().clone()
    dist.all_reduce(x)
    return x / world()


def shared(loss: Float[Tensor, ""]) -> Float[Tensor, ""]:
    """The value of all processes' mean with this process's gradient: data-parallel training averages the latter."""
    return loss if world() == 1 else loss + (over_processes(loss) - loss.detach())


def longest(length: int) -> int:
    """The largest `length` of all processes: ragged rows are padded to it before `gather`."""
    if world() == 1:
        return length
    lengths: list = [None] * dist.get_world_size()
    dist.all_gather_object(lengths, length)
    return max(lengths)


class LogitScale(nn.Module):
    """1/tau, learnable, kept in (0, `maximum`]: CLIP's logit scale (initial tau 0.07, at most 100)."""

    def __init__(self, tau: float = 0.07, maximum: float = 100.0, learnable: bool = True):
        super().__init__()
        if tau <= 0 or 1 / tau > maximum:
            raise ValueError(f"tau = {tau}: 1/tau must lie in (0, {maximum}]")
        self.limit = math.log(maximum)
        self.log_scale = nn.Parameter(torch.tensor(-math.log(tau)), requires_grad=learnable)

    def forward(self) -> Float[Tensor, ""]:
        with torch.no_grad():  # the parameter itself is clamped, so that a gradient can bring it back
            self.log_scale.clamp_(max=self.limit)
        return self.log_scale.exp()


def contrastive(
    image: Float[Tensor, "b d"],
    text: Float[Tensor, "b d"],
    scale: Float[Tensor, ""] | float,
    *,
    image_id: Int[Tensor, " b"] | None = None,
    reduction: str = "mean",
) -> Float[Tensor, ""]:
    """The in-batch contrastive loss of a two-stream model (MVAM Eq. 5-6; CLIP), over all processes' pairs.

    Row i of `image` and of `text` are a pair; both are L2-normalised by the caller, so that the logits are
    cosine times `scale` (1/tau).

    Args:
        image_id: If given, every pair of a picture and a caption of the *same picture* is a positive, in
            equal shares of the target (MVAM reading M11); else only the diagonal is, as printed.
        reduction: `"mean"` is (L_i2t + L_t2i) / 2, CLIP's form; `"sum"` leaves the half out (reading M5).

    Raises:
        ValueError: For another `reduction`.
    """
    if reduction not in ("mean", "sum"):
        raise ValueError(f"reduction is {reduction!r}; use 'mean' or 'sum'")
    with torch.autocast(
        image.device.type, enabled=False
    ):  # which would make products of single precision half again
        logits = scale * wide(gather(image)) @ wide(gather(text)).T  # B B
    if image_id is None:
        target: Tensor = torch.arange(len(logits), device=logits.device)
    else:
        ids = gather(image_id)
        same = (ids[:, None] == ids[None, :]).float()
        target = same / same.sum(1, keepdim=True)  # symmetric, so it serves both directions
    total = F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)
    return total / 2 if reduction == "mean" else total
