"""MIGA and NCPP beside their plain layouts: the further cases of `zoo bench domain=forecasting`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from domains.forecasting.models.miga import MIGA
from domains.forecasting.models.ncpp import NCPP
from domains.forecasting.ranking.task import BALANCE_WEIGHT
from zoo.bench.compare import Job, gradient_norm
from zoo.bench.peer import load_peer
from zoo.bench.suite import Case
from zoo.create import create_model
from zoo.weights.exchange import to_official

WINDOW, FEATURES = 10, 34
"""Days and features of a stock, as `zoo train domain=forecasting model=miga` has them."""


def rankers(hidden: int, device: torch.device) -> tuple[MIGA, nn.Module]:
    """MIGA with the paper's experts and its peer with the same weights, in evaluation."""
    torch.manual_seed(0)
    model = create_model("forecasting/miga", num_features=FEATURES, hidden=hidden).eval()
    assert isinstance(model, MIGA)
    peer = load_peer("miga").PlainMIGA(FEATURES, hidden=hidden).eval()
    peer.load_zoo(model.state_dict())
    return model.to(device), peer.to(device)


def scorers(width: int, device: torch.device) -> tuple[NCPP, nn.Module]:
    """NCPP on the published features and its peer with the same weights, in evaluation.

    Norms and biases are off their initial values.
    """
    torch.manual_seed(0)
    model = create_model("forecasting/ncpp", width=width).eval()
    assert isinstance(model, NCPP)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
    peer = load_peer("ncpp").PlainNCPP(width=width).eval()
    peer.load_official(to_official(model))
    return model.to(device), peer.to(device)


def ranking(hidden: int, days: int, stocks: int, *, train: bool = False) -> Case:
    """Scores of days with so many stocks each, or training steps on them."""

    def build(device: torch.device) -> Job:
        draw = torch.Generator().manual_seed(0)
        x = torch.randn(days, stocks, WINDOW, FEATURES, generator=draw).to(device)
        label = torch.randn(days, stocks, generator=draw).to(device)

        def loss(network: nn.Module) -> Tensor:
            scores, balance, *_ = network(x)
            return BALANCE_WEIGHT * balance - (scores * label).mean()

        return _job("miga", rankers(hidden, device), lambda network: network(x)[0], loss, train=train)

    step = "training step, " if train else ""
    return Case(
        f"miga, hidden {hidden}, {step}{days} days of {stocks} stocks, plain layout",
        build,
        items=days * stocks,
    )


def scoring(width: int, rows: int, *, train: bool = False) -> Case:
    """Scores of so many rows, or a training step on them."""

    def build(device: torch.device) -> Job:
        model, peer = scorers(width, device)
        draw = torch.Generator().manual_seed(0)
        numbers = torch.randn(rows, sum(model.numeric.values()), generator=draw).to(device)
        codes = torch.randint(model.vocabulary, (rows, sum(model.text_sizes)), generator=draw).to(device)
        label = torch.randn(rows, 1, generator=draw).to(device)

        def loss(network: nn.Module) -> Tensor:
            return nn.functional.huber_loss(network(numbers, codes), label)

        return _job("ncpp", (model, peer), lambda network: network(numbers, codes), loss, train=train)

    step = "training step, " if train else ""
    return Case(f"ncpp, width {width}, {step}{rows} rows, plain layout", build, items=rows)


def _job(
    name: str,
    contestants: tuple[nn.Module, nn.Module],
    scores: Callable[[Any], Tensor],
    loss: Callable[[Any], Tensor],
    *,
    train: bool,
) -> Job:
    """Forward in evaluation; or forward, loss and backward in training, compared by the norm of gradients."""

    def run(network: nn.Module) -> Callable[[], Tensor]:
        if not train:
            return torch.inference_mode()(lambda: scores(network))
        network.train()
        return lambda: gradient_norm(network, loss(network))

    ours, peer = map(run, contestants)
    return Job(name, ours, peer, ours, peer)


CASES = (
    ranking(32, 4, 150),
    ranking(32, 4, 150, train=True),
    ranking(64, 1, 1000),
    scoring(8, 64),
    scoring(8, 64, train=True),
    scoring(64, 8),
    scoring(64, 8, train=True),
)
