"""Attention layers of the zoo on the maps of backbones, by name: `model.attention=NAME`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from zoo.attention.layers import AttentionLayer, create_map_attention, on_tokens

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
            size of their position tables. Maps of other sizes go through `on_map` as well.
        defaults: further arguments, which the layer must have.

    Raises:
        UnknownName: no layer of that name.
        AttentionError: an argument that the layer does not have, or a layer that is causal only.
    """
    return create_map_attention(attention, dim, shape, num_heads=num_heads, **defaults)


def on_map(attention: nn.Module, x: Tensor) -> Tensor:
    """A layer of the zoo, or the own attention of a block, on a map `(B, H, W, C)` of any size."""
    if not isinstance(attention, AttentionLayer):
        return attention(x)
    return on_tokens(attention, x.flatten(1, 2), x.shape[1:3]).view(x.shape)
