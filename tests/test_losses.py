"""The contrastive loss, worked by hand, and its gather across processes."""

import math
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

from finematch.losses import LogitScale, contrastive, gather


def unit(*shape, seed=0):
    return F.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)), dim=-1)


def test_equals_the_printed_sums():
    image, text, tau = unit(4, 6), unit(4, 6, seed=1), 0.2
    s = [[float(image[i] @ text[j]) / tau for j in range(4)] for i in range(4)]
    i2t = -sum(math.log(math.exp(s[i][i]) / sum(math.exp(v) for v in s[i])) for i in range(4)) / 4
    t2i = -sum(math.log(math.exp(s[i][i]) / sum(math.exp(s[j][i]) for j in range(4))) for i in range(4)) / 4
    assert contrastive(image, text, 1 / tau).item() == pytest.approx((i2t + t2i) / 2, rel=1e-5)
    assert contrastive(image, text, 1 / tau, reduction="sum").item() == pytest.approx(i2t + t2i, rel=1e-5)


def test_by_hand_two_orthogonal_pairs():
    eye = torch.eye(2)
    # each row is (s, 0): -log(e^s / (e^s + 1)) = log(1 + e^-s)
    assert contrastive(eye, eye, 3.0).item() == pytest.approx(math.log1p(math.exp(-3)), rel=1e-6)


def test_same_picture_positives():
    image, text = unit(3, 5), unit(3, 5, seed=1)
    image[1] = image[0]
    ids = torch.tensor([7, 7, 9])
    logits = 4 * image @ text.T
    target = torch.tensor([[0.5, 0.5, 0], [0.5, 0.5, 0], [0, 0, 1]])
    by_hand = (
        -(target * logits.log_softmax(1)).sum(1).mean() - (target * logits.T.log_softmax(1)).sum(1).mean()
    )
    assert contrastive(image, text, 4.0, image_id=ids).item() == pytest.approx(by_hand.item() / 2, rel=1e-6)
    distinct = torch.arange(3)
    same = contrastive(image, text, 4.0, image_id=distinct)
    assert same.item() == pytest.approx(contrastive(image, text, 4.0).item(), rel=1e-6)


def test_order_of_pairs_does_not_matter():
    image, text, order = unit(6, 4), unit(6, 4, seed=1), torch.tensor([3, 1, 5, 0, 2, 4])
    assert contrastive(image[order], text[order], 5.0).item() == pytest.approx(
        contrastive(image, text, 5.0).item(), rel=1e-6
    )


def test_gradient_is_the_finite_difference():
    image = unit(3, 4).double().requires_grad_()
    text = unit(3, 4, seed=1).double()

    def loss(x):  # `contrastive` computes in fp32; a wide step keeps the quotient exact enough
        return contrastive(x, text, 2.0)

    loss(image).backward()
    step = 1e-2
    for i, j in ((0, 0), (1, 3), (2, 2)):
        up, down = image.detach().clone(), image.detach().clone()
        up[i, j] += step
        down[i, j] -= step
        assert image.grad[i, j].item() == pytest.approx(
            ((loss(up) - loss(down)) / (2 * step)).item(), abs=2e-3
        )


def test_unknown_reduction_is_refused():
    with pytest.raises(ValueError, match="reduction"):
        contrastive(unit(2, 3), unit(2, 3), 1.0, reduction="half")


def test_logit_scale():
    scale = LogitScale(0.07)
    assert scale().item() == pytest.approx(1 / 0.07, rel=1e-6)
    scale.log_scale.data.fill_(50.0)
    assert scale().item() == pytest.approx(100, rel=1e-5)
    scale().backward()
    assert scale.log_scale.grad.item() > 0  # clamped, and still free to come down
    assert not LogitScale(learnable=False).log_scale.requires_grad
    with pytest.raises(ValueError, match="tau"):
        LogitScale(0.0)


def test_gather_is_the_identity_in_one_process():
    x = unit(3, 2)
    assert gather(x) is x


def two_processes(rank, folder):
    """In each of two gloo processes: half of the pairs, the loss of all, the gradient of a shared weight."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    weight = torch.nn.Parameter(torch.eye(4))
    scale = LogitScale(0.2)
    mine = slice(4 * rank, 4 * rank + 4)
    image, text = unit(8, 4)[mine] @ weight, unit(8, 4, seed=1)[mine]
    loss = contrastive(image, text, scale(), image_id=(torch.arange(8) // 2)[mine])
    loss.backward()
    for p in (weight, scale.log_scale):  # what data-parallel training does
        dist.all_reduce(p.grad)
        p.grad /= 2
    torch.save([loss.detach(), weight.grad, scale.log_scale.grad], f"{folder}/{rank}.pt")
    dist.destroy_process_group()
    # a graph that held on to the group would keep its threads, and a process that ends among them may abort
    threads = [path.read_text() for path in Path("/proc/self/task").glob("*/comm")]
    assert not [name for name in threads if "gloo" in name], threads


def test_two_processes_give_the_loss_and_gradients_of_one(tmp_path):
    torch.multiprocessing.spawn(two_processes, args=(str(tmp_path),), nprocs=2)
    weight, scale = torch.nn.Parameter(torch.eye(4)), LogitScale(0.2)
    loss = contrastive(unit(8, 4) @ weight, unit(8, 4, seed=1), scale(), image_id=torch.arange(8) // 2)
    loss.backward()
    for rank in (0, 1):
        theirs = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        for ours, other in zip([loss.detach(), weight.grad, scale.log_scale.grad], theirs, strict=True):
            torch.testing.assert_close(other, ours, rtol=1e-5, atol=1e-6)


def transposed_gradients(rank, folder):
    """In each of two gloo processes: a loss whose gradient with respect to the gathered rows is not contiguous."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    mine = unit(8, 3)[4 * rank : 4 * rank + 4].requires_grad_()
    whole = gather(mine)
    (whole.T.contiguous() * torch.arange(24.0).view(3, 8)).T.sum().backward()
    torch.save(mine.grad, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_gradients_of_any_layout_come_back_right(tmp_path):
    torch.multiprocessing.spawn(transposed_gradients, args=(str(tmp_path),), nprocs=2)
    found = torch.cat([torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1)])
    torch.testing.assert_close(found, 2 * torch.arange(24.0).view(3, 8).T)  # the sum over two equal losses
