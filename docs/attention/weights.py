"""The weights that tiny layers give, recovered from the layers as they are, for the pictures.

Three ways: `seen` reads the maps that `capture` records; `mixed` differentiates what a head gives by the
values, which also covers gates and joined branches; `unit_values` gives a recurrence one value channel per
token, so that its output is the matrix of its weights.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from zoo.attention import capture
from zoo.attention.layers import create_attention
from zoo.attention.layers.linear import RecurrentLayer

N, DIM, HEADS = 16, 32, 4


@dataclass(frozen=True)
class Panel:
    """Weights `(rows, columns)`, NaN where nothing is seen.

    Attributes:
        by_row: colours are relative to the largest weight of a row, else of the panel.
        mark: row and column of the query, where the panel is the map on which its keys lie.
    """

    title: str
    weights: np.ndarray
    across: str = "key"
    down: str = "query"
    by_row: bool = True
    mark: tuple[int, int] | None = None


def tokens(number: int = N, scale: float = 1.6, seed: int = 3) -> Tensor:
    """`(1, number, DIM)`: tokens of four kinds in turns of random length, and noise."""
    generator = torch.Generator().manual_seed(seed)
    kinds = torch.randn(4, DIM, generator=generator)
    turns = torch.randint(4, (number,), generator=generator)
    return scale * (kinds[turns] + 0.4 * torch.randn(number, DIM, generator=generator))[None]


def kinds() -> Tensor:
    """`(1, N, DIM)`: each token is one of four kinds, channels 1 to 4; channel 0 is one in all."""
    x = torch.zeros(1, N, DIM)
    x[..., 0] = 1.0
    x[0, torch.arange(N), torch.tensor([1, 2, 3, 1, 4, 2, 1, 1, 3, 2, 4, 4, 1, 3, 2, 1])] = 1.0
    return x


def build(name: str, **options: Any) -> Any:
    """A layer with the same weights at each call."""
    torch.manual_seed(0)
    return create_attention(name, DIM, **{"num_heads": HEADS, **options}).eval()


def matched(layer: Any) -> Any:
    """The layer with queries and keys of head 0 that are what `kinds` are: those of one kind meet."""
    which = torch.zeros(layer.q_proj.out_features, DIM)
    which[range(4), range(1, 5)] = 1.0
    for proj in (layer.q_proj, layer.k_proj):
        proj.weight.data.copy_(which)
    return layer


def panel(title: str, weights: Tensor, **options: Any) -> Panel:
    """Zero weights are not seen."""
    rows = weights.detach().double().numpy()
    return Panel(title, np.where(rows == 0, np.nan, rows), **options)


def on_map(title: str, row: Tensor, shape: tuple[int, int], query: tuple[int, int]) -> Panel:
    """The weights `(N,)` of one query, laid out as the map on which its keys lie."""
    return panel(title, row.unflatten(0, shape), across="", down="", by_row=False, mark=query)


def seen(layer: nn.Module, x: Tensor, call: int = 0) -> Tensor:
    """Weights `(H, Nq, Nk)` of one call of `attend`."""
    with torch.no_grad(), capture(layer) as maps:
        layer(x)
    return list(maps.values())[call].weights[0]


def gradients(outputs: Tensor, x: Tensor) -> Tensor:
    """`(N, N)`: the size of the gradients of outputs `(N,)` by the tokens x `(1, N, DIM)`."""
    rows = [torch.autograd.grad(y, x, retain_graph=True)[0][0].norm(dim=-1) for y in outputs]
    return torch.stack(rows)


def mixed(
    layer: nn.Module, x: Tensor, head: int = 0, *, values: str = "v_proj", out: str | None = "o_proj"
) -> Tensor:
    """`(N, N)`: what the value of each token (second axis) counts in what a head gives for each query.

    Args:
        values: the projection that makes the values.
        out: the projection that takes what the heads give; None = the output of the layer.
    """
    kept: dict[str, Tensor] = {}

    def keep_values(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        kept["values"] = output.detach().requires_grad_()
        return kept["values"]

    def keep_heads(module: nn.Module, inputs: tuple[Tensor]) -> None:
        kept["heads"] = inputs[0]

    hooks = [layer.get_submodule(values).register_forward_hook(keep_values)]
    if out is not None:
        hooks.append(layer.get_submodule(out).register_forward_pre_hook(keep_heads))
    result: Tensor = layer(x)
    for hook in hooks:
        hook.remove()
    channel = head * (DIM // HEADS)
    given = kept.get("heads", result)[0, :, channel]
    rows = [torch.autograd.grad(y, kept["values"], retain_graph=True)[0][0, :, channel] for y in given]
    return torch.stack(rows)


def unit_values(layer: RecurrentLayer, x: Tensor) -> Tensor:
    """`(H, N, N)`: what the recurrence makes of values that are one for one token each."""
    run, found = layer._run, []

    def spy(
        form: Callable[..., Any], q: Tensor, k: Tensor, v: Tensor, *where: Any, **rates: Tensor
    ) -> Tensor:
        ones = torch.eye(x.shape[1]).expand(*v.shape[:2], -1, -1)
        found.append(run(form, q, k, ones, *where, **rates))
        return run(form, q, k, v, *where, **rates)

    layer._run = spy  # pyright: ignore[reportAttributeAccessIssue]
    with torch.no_grad():
        layer(x)
    return found[0][0]
