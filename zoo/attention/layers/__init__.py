"""Attention layers, one file per family; each a few lines on the primitives of `zoo.attention`."""

from __future__ import annotations

import importlib
import pkgutil

from zoo.attention.layers.base import (
    LAYERS,
    AttentionLayer,
    Supports,
    auxiliary_loss,
    check_supports,
    create_attention,
    create_map_attention,
    find_layer,
    layer_options,
    on_tokens,
)

for _module in pkgutil.iter_modules(__path__):  # each lists its layers in LAYERS
    importlib.import_module(f"{__name__}.{_module.name}")

__all__ = [
    "LAYERS",
    "AttentionLayer",
    "Supports",
    "auxiliary_loss",
    "check_supports",
    "create_attention",
    "create_map_attention",
    "find_layer",
    "layer_options",
    "on_tokens",
]
