"""Attention layers of the zoo on the maps of backbones, by name: `model.attention=NAME`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from zoo.attention.layers import AttentionLayer, create_attention, find_layer, layer_options

Choice = str | Mapping[str, Any]
"""The name of a layer (`zoo list attention`), or a mapping with its name and arguments."""


def map_attention(
    attention: Choice, dim: int, num_heads: int, shape: Sequence[int], **defaults: Any
) -> AttentionLayer:
    """The layer that a block of a backbone holds, looking both ways.

    Args:
        attention: what stands in the block; its arguments win over those below.
        dim: channels of the map.
        shape: height and width of the map for images of img_size; layers that know of grids get it, as the
            size of their position tables. Maps of other sizes go through `on_map` and `on_tokens` as well.
        defaults: further arguments, which the layer must have.

    Raises:
        UnknownName: no layer of that name.
        AttentionError: an argument that the layer does not have, or a layer that is causal only.
    """
    name = attention if isinstance(attention, str) else str(attention.get("name"))
    grid = {"shape": tuple(shape)} if takes_grid(name) else {}
    return create_attention(attention, dim, causal=False, num_heads=num_heads, **grid, **defaults)


def takes_grid(name: str) -> bool:
    """Whether a layer knows that its tokens lie on a grid."""
    return "shape" in layer_options(find_layer(name))


def on_map(attention: nn.Module, x: Tensor) -> Tensor:
    """A layer of the zoo, or the own attention of a block, on a map `(B, H, W, C)` of any size."""
    if not isinstance(attention, AttentionLayer):
        return attention(x)
    return on_tokens(attention, x.flatten(1, 2), x.shape[1:3]).view(x.shape)


def on_tokens(layer: AttentionLayer, x: Tensor, shape: Sequence[int]) -> Tensor:
    """A layer on tokens `(B, N, C)` that fill a map of this height and width row by row.

    Class tokens stand before those of the map, for layers that take them.
    """
    if hasattr(layer, "shape"):
        layer.shape = tuple(shape)  # pyright: ignore[reportAttributeAccessIssue, reportArgumentType]
    return layer(x)
