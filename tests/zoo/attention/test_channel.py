"""Channel groups: channels of a head attend to each other."""

from __future__ import annotations

import pytest
import torch

from zoo.attention import AttentionError, capture
from zoo.attention.layers.channel import ChannelGroups

B, N, C, H = 2, 9, 12, 3


def parts(layer: ChannelGroups, x: torch.Tensor) -> list[torch.Tensor]:
    """Queries, keys and values `(B, H, N, D)`."""
    return [t.unflatten(-1, (H, -1)).transpose(1, 2) for t in layer.qkv(x).chunk(3, -1)]


@pytest.mark.parametrize("affinity", ["kv", "qk"])
def test_equals_its_formula(affinity: str) -> None:
    torch.manual_seed(0)
    layer, x = ChannelGroups(C, H, affinity=affinity), torch.randn(B, N, C)  # type: ignore[arg-type]
    q, k, v = parts(layer, x)
    if affinity == "kv":
        out = q @ (k.mT @ v / 4**0.5).softmax(-1).mT
    else:
        out = v @ (q.mT @ k / N**0.5).softmax(-1).mT
    expected = layer.proj(out.transpose(1, 2).flatten(2))
    torch.testing.assert_close(layer(x), expected, atol=1e-5, rtol=1e-4)


def test_affinity_of_queries_and_keys_takes_padding() -> None:
    layer, x = ChannelGroups(C, H, affinity="qk"), torch.randn(B, N, C)
    mask = (torch.arange(N) < 5).expand(B, N)
    torch.testing.assert_close(layer(x, mask=mask)[:, :5], layer(x[:, :5]), atol=1e-5, rtol=1e-4)


def test_maps_are_channels_by_channels() -> None:
    layer = ChannelGroups(C, H)
    with capture(layer) as maps:
        layer(torch.randn(B, N, C))
    (found,) = maps.values()
    assert found.weights.shape == (B, H, C // H, C // H)


def test_unknown_affinity_is_told() -> None:
    with pytest.raises(AttentionError, match="'kv' or 'qk', not 'qv'"):
        ChannelGroups(C, H, affinity="qv")  # type: ignore[arg-type]
