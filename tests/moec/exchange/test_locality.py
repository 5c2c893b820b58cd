"""LocMoE's locality loss: its value by hand, its gradient, and what it does to a router."""

import math

import pytest
import torch

from moec.errors import OptionError
from moec.exchange.locality import local_distribution, locality_loss
from moec.exchange.placement import Placement

PLACED = Placement((0, 0, 1, 1), 2)


def test_the_value_by_hand():
    probabilities = torch.tensor([[0.4, 0.2, 0.3, 0.1], [0.2, 0.2, 0.3, 0.3]])
    current, local = (0.3, 0.2, 0.3, 0.2), (0.45, 0.45, 0.05, 0.05)
    want = sum(c * math.log(c / d) for c, d in zip(current, local, strict=True))
    got = locality_loss(probabilities, PLACED, 0, mu=0.5, smoothing=0.1)
    assert got.item() == pytest.approx(0.5 * want, rel=1e-5)


def test_zero_where_the_batch_is_as_local_as_it_can_be():
    local = local_distribution(PLACED, 1, 0.2)
    assert local.tolist() == pytest.approx([0.1, 0.1, 0.4, 0.4])
    assert locality_loss(local.expand(3, 5, 4), PLACED, 1, mu=1, smoothing=0.2).item() == pytest.approx(0, abs=1e-6)
    assert locality_loss(torch.full((3, 2), 0.5), Placement((0, 0), 1), 0, mu=1).item() == pytest.approx(0, abs=1e-6)


def test_gradient_and_zeros():
    torch.manual_seed(0)
    logits = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: locality_loss(x.softmax(-1), PLACED, 0, mu=0.3), (logits,))
    zeros = torch.tensor([[1.0, 0, 0, 0]], requires_grad=True)
    locality_loss(zeros, PLACED, 1, mu=1).backward()
    assert zeros.grad is not None
    assert torch.isfinite(zeros.grad).all()


def test_no_tokens():
    empty = torch.zeros(0, 4, requires_grad=True)
    loss = locality_loss(empty, PLACED, 0, mu=1)
    loss.backward()
    assert loss.item() == 0


def test_descending_it_sends_tokens_to_experts_of_their_rank():
    torch.manual_seed(0)
    x, gate = torch.randn(64, 8), torch.randn(4, 8, requires_grad=True)
    near = []
    for _ in range(60):
        probabilities = (x @ gate.t()).softmax(-1)
        near.append((probabilities.argmax(-1) < 2).float().mean().item())
        (step,) = torch.autograd.grad(locality_loss(probabilities, PLACED, 0, mu=1), gate)
        gate = (gate - 0.5 * step).detach().requires_grad_()
    assert near[-1] > near[0] + 0.2


def trained(mu, steps=240):
    """A toy layer (8 experts, k = 2) on two ranks with data of their own: its task's loss, and choices that cross."""
    torch.manual_seed(0)
    placed = Placement.blocks(8, 2)
    owners = torch.tensor(placed.owners)
    xs = [torch.randn(128, 16) + center for center in torch.randn(2, 16)]
    teacher, gate = torch.nn.Linear(16, 16), torch.nn.Linear(16, 8, bias=False)
    targets = [teacher(x).tanh().detach() for x in xs]
    experts = torch.nn.Linear(16, 8 * 16, bias=False)
    optimizer = torch.optim.Adam([*gate.parameters(), *experts.parameters()], lr=2e-2)
    for _ in range(steps):
        task, near, crossed = torch.zeros(()), torch.zeros(()), 0.0
        for rank, (x, target) in enumerate(zip(xs, targets, strict=True)):
            probabilities = gate(x).softmax(-1)
            weights, chosen = probabilities.topk(2, -1)
            rows = experts(x).view(-1, 8, 16).gather(1, chosen[:, :, None].expand(-1, -1, 16))
            y = (rows * (weights / weights.sum(-1, keepdim=True))[:, :, None]).sum(1)
            task, near = task + (y - target).square().mean(), near + locality_loss(probabilities, placed, rank, mu=mu)
            crossed += (owners[chosen] != rank).float().mean().item() / 2
        optimizer.zero_grad()
        (task + near).backward()
        optimizer.step()
    return task.item(), crossed


def test_a_third_fewer_rows_cross_at_the_same_loss():
    """Where ranks have data of their own: one router serves all, and tells ranks apart by their tokens."""
    (plain, crossed), (local, less) = trained(0.0), trained(0.01)
    assert local <= 1.02 * plain
    assert less <= 0.7 * crossed


@pytest.mark.parametrize(
    ("experts", "rank", "smoothing", "part"),
    [(4, 0, 0.0, "smoothing=0.0"), (4, 0, 1.0, "smoothing=1.0"), (4, 2, 0.1, "has no experts"), (5, 0, 0.1, "of 5")],
)
def test_what_makes_no_sense(experts, rank, smoothing, part):
    with pytest.raises(OptionError, match=part):
        locality_loss(torch.full((2, experts), 0.2), PLACED, rank, mu=1, smoothing=smoothing)
