"""A small model family with an official layout, for the tests of registry, weights and command line."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from zoo import registry
from zoo.weights.official import OfficialLayout


class ToyNet(nn.Module):
    """A stack of linear layers.

    Args:
        width: channels,
            of every layer.
        depth, heads: number of layers; unused.
        scale: stored only.

    Raises:
        ValueError: never.
    """

    def __init__(
        self, width: int, *, depth: int = 2, heads: int = 1, scale: float | list[float] = 1.0
    ) -> None:
        super().__init__()
        self.scale = scale
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(depth))
        self.register_buffer("graph", torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


class ToyOfficial(OfficialLayout):
    """Official names: `kernel_i` is the transposed weight, `bias_i` the bias; the graph is not stored."""

    ignored = ("*/Adam",)
    optional = ("bias_*",)
    unofficial = ("graph",)

    @staticmethod
    def config(state_dict: dict[str, Tensor], *, scale: float = 1.0) -> dict:
        depth = sum(name.startswith("kernel_") for name in state_dict)
        return {"width": state_dict["kernel_0"].shape[0], "depth": depth, "scale": scale}

    @staticmethod
    def to_zoo(state_dict: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
        kind = {"kernel": "weight", "bias": "bias"}
        split = {name: name.split("_") for name in state_dict}
        zeros = {name: torch.zeros_like(t) for name, t in model.state_dict().items() if name.endswith("bias")}
        return zeros | {f"layers.{i}.{kind[k]}": state_dict[name].t() for name, (k, i) in split.items()}

    @staticmethod
    def to_official(state_dict: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
        kind = {"weight": "kernel", "bias": "bias"}
        split = {name: name.split(".") for name in state_dict if name != "graph"}
        return {f"{kind[k]}_{i}": state_dict[name].t() for name, (_, i, k) in split.items()}


def toy_net(width: int, **kwargs) -> nn.Module:
    return ToyNet(width, **kwargs)


def toy_deep(width: int = 4, *, depth: int = 5, **kwargs) -> nn.Module:
    return ToyNet(width, depth=depth, **kwargs)


@pytest.fixture
def toys(monkeypatch: pytest.MonkeyPatch) -> None:
    """Registers `toys/toy_net` (official layout) and `toys/toy_deep` (variant, none) for one test."""
    registry.list_models()  # a domain imported later would register into the copy, and be lost with it
    monkeypatch.setattr(registry, "_MODELS", dict(registry._MODELS))
    for builder, official in ((toy_net, ToyOfficial), (toy_deep, None)):
        monkeypatch.setattr(builder, "__module__", "toys.nets")
        registry.register_model(
            model=ToyNet,
            summary=f"summary of {builder.__name__}",
            paper="Toy et al. 2026",
            licence="CC-BY-NC 4.0",
            source="none",
            status="re-implementation",
            official=official,
            preprocessing={"scaling": "none"},
        )(builder)
