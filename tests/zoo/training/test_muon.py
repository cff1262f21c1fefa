"""Muon: orthogonal steps for the matrices of blocks, AdamW for all else."""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch
from torch import nn

from zoo.training.muon import Muon, orthogonal
from zoo.training.optim import build_optimizer


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(4, 8)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8)) for _ in range(2))
        self.head = nn.Linear(8, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = x + block(x)
        return self.head(x)


def stepped(net: Net, optimizer: torch.optim.Optimizer, steps: int = 3) -> None:
    draw = torch.Generator().manual_seed(0)
    for _ in range(steps):
        x = torch.randn(16, 4, generator=draw)
        optimizer.zero_grad()
        (net(x) - x[:, :2]).square().mean().backward()
        optimizer.step()


@pytest.mark.parametrize("shape", [(3, 8, 8), (2, 8, 20), (2, 20, 8)])
def test_orthogonal_keeps_the_singular_vectors_and_levels_the_values(shape: tuple[int, ...]) -> None:
    draw = torch.Generator().manual_seed(0)
    u, _, vh = torch.linalg.svd(torch.randn(shape, generator=draw, dtype=torch.float64), full_matrices=False)
    values = torch.logspace(-1, 2, u.shape[-1], dtype=torch.float64)
    found = u.mT @ orthogonal(u * values @ vh) @ vh.mT
    kept = found.diagonal(dim1=1, dim2=2)
    large = kept[:, 3:]  # the least, a thousandth of the largest, rise more slowly
    assert ((large > 0.5) & (large < 1.3)).all()
    torch.testing.assert_close(found, torch.diag_embed(kept), atol=1e-9, rtol=0)


def test_the_matrices_of_blocks_are_orthogonalised_and_nothing_else() -> None:
    net = Net()
    optimizer = build_optimizer(net, name="muon", lr=0.02, weight_decay=0.1)
    names = {id(p): name for name, p in net.named_parameters()}
    rates = {}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            rates[names[id(parameter)]] = (group["lr"], group["matrices"])
    assert {name for name, (_, matrices) in rates.items() if matrices} == {
        "blocks.0.0.weight",
        "blocks.1.0.weight",
    }
    assert rates["blocks.0.0.weight"][0] == 0.02
    assert {lr for lr, matrices in rates.values() if not matrices} == {0.005}


def test_a_step_of_a_matrix_has_the_size_of_one_of_adam() -> None:
    matrix = nn.Parameter(torch.zeros(64, 64))
    matrix.grad = torch.randn(64, 64, generator=torch.Generator().manual_seed(0))
    Muon([{"params": [matrix], "matrices": True}], lr=0.1).step()
    assert float(matrix.detach().square().mean().sqrt()) == pytest.approx(0.1 * 0.2, rel=0.2)


def test_all_else_goes_as_by_adamw() -> None:
    nets = [Net(), Net()]
    nets[1].load_state_dict(nets[0].state_dict())
    options = {"betas": (0.8, 0.9), "weight_decay": 0.1}
    stepped(nets[0], Muon(nets[0].parameters(), lr=0.04, **options))
    stepped(nets[1], torch.optim.AdamW(nets[1].parameters(), lr=0.01, **options))
    for own, theirs in zip(nets[0].parameters(), nets[1].parameters(), strict=True):
        torch.testing.assert_close(own, theirs)


@pytest.mark.parametrize("rounding", [0.0, 1e-8])
def test_a_matrix_whose_gradient_is_zero_but_for_rounding_stays(rounding: float) -> None:
    matrix, other = nn.Parameter(torch.eye(3)), nn.Parameter(torch.eye(3))
    optimizer = Muon([{"params": [matrix, other], "matrices": True}], lr=0.1)
    matrix.grad, other.grad = torch.randn(3, 3), torch.randn(3, 3)
    optimizer.step()
    before = matrix.detach().clone(), other.detach().clone()
    matrix.grad = rounding * torch.randn(3, 3)
    optimizer.step()
    assert torch.equal(matrix, before[0])
    assert not torch.equal(other, before[1])


def test_it_goes_on_from_its_state() -> None:
    net, other = Net(), Net()
    optimizer = build_optimizer(net, name="muon", lr=0.02)
    stepped(net, optimizer)
    other.load_state_dict(net.state_dict())
    resumed = build_optimizer(other, name="muon", lr=0.02)
    resumed.load_state_dict(deepcopy(optimizer.state_dict()))
    stepped(net, optimizer)
    stepped(other, resumed)
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), other.parameters(), strict=True))
