"""Softmax to linear attention: the projections stay, feature maps learn what softmax did (LoLCATs)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from zoo.attention.convert.registry import conversion
from zoo.attention.convert.transfer import match, outputs
from zoo.attention.layers.base import AttentionLayer, Inputs, create_attention
from zoo.attention.layers.multihead import MultiHead

LEARNED = ("feature_map_q.", "feature_map_k.", "window_factors")
"""Where the names of what is trained begin."""


def _sees_all(layer: AttentionLayer) -> bool:
    return type(layer) is MultiHead and layer.window is None and layer.yarn is None


def _sees_all_before(layer: AttentionLayer) -> bool:
    return _sees_all(layer) and layer.causal and layer.context_dim in (None, layer.dim)


@conversion("linear", "multihead without window and YaRN", _sees_all, calibrated=True)
def to_linear(
    layer: MultiHead,
    calls: Sequence[Inputs],
    *,
    features: int | None = None,
    steps: int = 300,
    lr: float = 1e-2,
) -> AttentionLayer:
    """Linear attention with the same queries, keys, values and output projection (`hedgehog`).

    Feature maps are trained for the outputs of the softmax layer: the attention transfer of LoLCATs (Zhang et
    al. 2024, arXiv 2410.10254, section 3.1), which needs no causal mask.
    """
    asked = {"name": "hedgehog"} | layer.options()
    del asked["dropout"]
    if features is not None:
        asked["features"] = features
    return _transferred(layer, asked, calls, steps, lr)


@conversion("lolcats", "causal multihead without window and YaRN", _sees_all_before, calibrated=True)
def to_lolcats(
    layer: MultiHead,
    calls: Sequence[Inputs],
    *,
    window: int = 64,
    features: int | None = None,
    affine: bool = False,
    steps: int = 300,
    lr: float = 1e-2,
) -> AttentionLayer:
    """Softmax for the keys of a window, linear attention for those before it (`lolcats`).

    Feature maps and the weights of the two parts are trained as in `to_linear`.
    """
    asked = {"name": "lolcats"} | layer.options() | {"window": window, "affine": affine}
    if features is not None:
        asked["feature_dim"] = features
    return _transferred(layer, asked, calls, steps, lr)


def _transferred(
    layer: MultiHead, asked: Mapping[str, Any], calls: Sequence[Inputs], steps: int, lr: float
) -> AttentionLayer:
    """A layer with the projections of `layer` and what it has beside them trained for the same outputs."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        made = create_attention(asked, layer.dim).to(layer.q_proj.weight)
    made.load_state_dict(layer.state_dict(), strict=False)
    learned = [p for name, p in made.named_parameters() if name.startswith(LEARNED)]
    match(made, calls, outputs(layer, calls), learned, steps=steps, lr=lr)
    return made
