"""Batch norm folded into the layer before it, against torch's own."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn

from zoo.layers.norm import BatchNorm, NormLinear, covariance


def torch_layers(ours: NormLinear, eps: float, momentum: float) -> nn.Sequential:
    """The same function as a linear layer and `nn.BatchNorm1d`."""
    outs, ins = ours.weight.shape
    linear, norm = nn.Linear(ins, outs), nn.BatchNorm1d(outs, eps=eps, momentum=momentum)
    linear.load_state_dict({"weight": ours.weight, "bias": ours.bias})
    norm.load_state_dict(ours.norm.state_dict(), strict=False)
    return nn.Sequential(linear, norm, nn.ReLU()).double()


def layer() -> NormLinear:
    ours = NormLinear(5, 7, norm=lambda n: BatchNorm(n, eps=1e-3, momentum=0.25))
    for parameter in ours.parameters():
        nn.init.normal_(parameter)
    return ours.double()


@pytest.mark.parametrize("training", [True, False])
def test_output_gradients_and_running_statistics_are_those_of_torch(training: bool) -> None:
    ours = layer()
    theirs = torch_layers(ours, 1e-3, 0.25)
    ours.train(training), theirs.train(training)
    x = (3 * torch.randn(4, 6, 5) + 2).double().requires_grad_()
    y = x.detach().clone().requires_grad_()
    weights = torch.randn(4, 6, 7).double()
    (ours(x) * weights).sum().backward()
    (theirs(y.flatten(0, 1)).view(4, 6, 7) * weights).sum().backward()
    torch.testing.assert_close(x.grad, y.grad)
    torch.testing.assert_close(ours.weight.grad, theirs[0].weight.grad)
    torch.testing.assert_close(ours.norm.weight.grad, theirs[1].weight.grad)
    torch.testing.assert_close(ours.norm.running_var, theirs[1].running_var)
    torch.testing.assert_close(ours.norm.running_mean, theirs[1].running_mean)


def test_bias_before_batch_statistics_has_no_gradient_at_all() -> None:
    ours = layer().float()
    ours(torch.randn(64, 5)).square().sum().backward()
    assert ours.bias.grad.count_nonzero() == 0
    assert ours.weight.grad.count_nonzero() > 0


def test_covariance_gradient() -> None:
    x = torch.randn(6, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: covariance(x)[:2], x)


def _share(rank: int, world: int, port: int, state: dict[str, Tensor], x: Tensor, results) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=world)
    ours = layer()
    ours.load_state_dict(state)
    part = x.tensor_split([5])[rank].clone().requires_grad_()  # 5 and 7 rows: shares of different size
    ours(part).square().sum().backward()
    gradient = ours.weight.grad
    dist.all_reduce(gradient)
    results[rank] = (part.grad, gradient, ours.norm.running_var)
    dist.destroy_process_group()


def test_two_processes_equal_one(unused_tcp_port: int) -> None:
    ours = layer()
    state = copy.deepcopy(ours.state_dict())
    x = torch.randn(12, 5, dtype=torch.float64)
    results = mp.Manager().dict()
    mp.spawn(_share, (2, unused_tcp_port, state, x, results), nprocs=2)
    whole = x.clone().requires_grad_()
    ours(whole).square().sum().backward()
    torch.testing.assert_close(torch.cat([results[0][0], results[1][0]]), whole.grad)
    for _, gradient, running_var in results.values():
        torch.testing.assert_close(gradient, ours.weight.grad)
        torch.testing.assert_close(running_var, ours.norm.running_var)


@pytest.fixture
def unused_tcp_port() -> int:
    import socket

    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]
