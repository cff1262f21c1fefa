"""Local region self-attention (LRSA) of CATANet: attention inside of overlapping patches.

Shapes: B images, H x W map, C channels, patches of p x p tokens that overlap by two, P of them on a map.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from domains.superres.models.catanet_layers import ConvFFN, from_heads, head_width, to_heads
from domains.superres.models.place import Place
from zoo.attention import attend
from zoo.attention.layers import create_map_attention
from zoo.layers.linear import matrix

OVERLAP = 2
CHUNK = 2**14
"""Tokens of patches that are worked on at once."""


class Axis(NamedTuple):
    """The patches along one axis."""

    starts: list[int]
    weights: list[float]
    """Of each place: 1, halved for every patch that has begun there before the one in front of it ends."""
    coverage: list[float]
    """Sum of the weights of the patches that hold a place. It is 1, save where three patches overlap: 3/4."""


def axis(length: int, patch: int) -> Axis:
    """Patches of `patch` places on an axis of at least as many; one that would leave it is moved back."""
    step = patch - OVERLAP
    starts = [min(start, length - patch) for start in range(0, length - OVERLAP, step)]
    weights, count = [1.0] * length, [0] * length
    for j, start in enumerate(starts):
        for place in range(start, start + patch):
            count[place] += 1
            if j and place < starts[j - 1] + patch:
                weights[place] /= 2
    return Axis(starts, weights, [w * n for w, n in zip(weights, count, strict=True)])


class Patches:
    """The overlapping patches of a map: cut out, changed one by one, and put back.

    Where patches overlap, each strip between two neighbours is halved, as the official program does. Where
    three overlap (possible before the last one, which is moved back), that gives 3/4 of their mean.

    Args:
        before: rows and columns by which the first patches begin before the map, which is mirrored there.
    """

    def __init__(
        self, height: int, width: int, patch: int, device: torch.device, before: tuple[int, int] = (0, 0)
    ) -> None:
        self.shape, self.patch, self.before = (height + before[0], width + before[1]), patch, before
        self.rows, self.columns = (axis(length, patch) for length in self.shape)
        row, column = (
            (torch.tensor(a.starts, device=device)[:, None] + torch.arange(patch, device=device) - n).abs()
            for a, n in zip((self.rows, self.columns), before, strict=True)
        )
        self.index = (row[:, None, :, None] * width + column[None, :, None]).view(-1, patch * patch)
        """Token numbers `(P, p p)`."""

    def apply(self, x: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
        """The weighted sum `(B, H, W, D)` of `function((T, p p, C))` over all patches, T at a time."""
        batch, tokens = len(x), x.flatten(1, 2)
        outs = []
        for index in self.index.split(max(1, CHUNK // (batch * self.patch**2))):
            chosen = tokens.index_select(1, index.flatten()).view(-1, self.patch**2, x.shape[-1])
            outs.append(function(chosen).unflatten(0, (batch, -1)))
        grid = (len(self.rows.starts), len(self.columns.starts), self.patch, self.patch)
        patches = torch.cat(outs, 1).view(batch, *grid, -1)
        lines = overlap_add(patches.flatten(0, 1), self.shape[1])  # (B rows, p, W, D)
        lines = lines.view(batch, grid[0], 1, self.patch, -1)
        summed = overlap_add(lines, self.shape[0]).view(batch, *self.shape, -1)
        return summed[:, self.before[0] :, self.before[1] :] * self.weights(x)

    def weights(self, like: Tensor) -> Tensor:
        """`(H, W, 1)`"""
        rows, columns = (like.new_tensor(a.weights) for a in (self.rows, self.columns))
        return (rows[self.before[0] :, None] * columns[self.before[1] :])[..., None]

    def coverage(self, x: Tensor) -> Tensor:
        """`x` `(B, H, W, C)` cut in patches and put back unchanged."""
        if all(c == 1 for a in (self.rows, self.columns) for c in a.coverage):
            return x
        rows, columns = (x.new_tensor(a.coverage) for a in (self.rows, self.columns))
        return x * (rows[self.before[0] :, None] * columns[self.before[1] :])[..., None]


def overlap_add(patches: Tensor, length: int) -> Tensor:
    """Sums patches `(A, n, R, p, D)` along one axis of `length` to `(A, R, length, D)`."""
    patch = patches.shape[3]
    step, last = patch - OVERLAP, patches.shape[1] - 1
    body, final = patches[:, :-1].transpose(1, 2), patches[:, -1]
    if not last:
        return final
    end = last * step
    whole = body[..., :step, :].flatten(2, 3)
    ends = F.pad(body[..., step:, :], (0, 0, 0, step - OVERLAP)).flatten(2, 3)
    out = F.pad(whole, (0, 0, 0, length - end))
    fits = min(length - step, end)
    out[..., step : step + fits, :] += ends[..., :fits, :]
    out[..., length - patch :, :] += final
    return out


class LocalAttention(nn.Module):
    """Attention in overlapping patches, and a ConvFFN, each with its residual (LRSA).

    Queries, keys and values are made once for the map, not for each patch, and the projection follows the
    sum over patches: it is linear.

    Args:
        patch_size: side p of a patch.
        attention: a layer of the zoo in the patches instead, by name or by mapping.
    """

    def __init__(
        self,
        dim: int,
        qk_dim: int,
        mlp_dim: int,
        num_heads: int,
        patch_size: int,
        attention: str | Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.patch_size, self.num_heads, self.parts = patch_size, num_heads, (qk_dim, qk_dim, dim)
        self.width, self.scale = head_width(qk_dim, dim, num_heads), (qk_dim // num_heads) ** -0.5
        self.norm = nn.LayerNorm(dim)
        self.layer = None
        if attention is None:
            self.qkv = nn.Linear(dim, sum(self.parts), bias=False)
            self.proj = nn.Linear(dim, dim, bias=False)
        else:
            self.layer = create_map_attention(attention, dim, (patch_size,) * 2, num_heads=num_heads)
        self.mlp = ConvFFN(dim, mlp_dim)

    def forward(self, x: Tensor, place: Place | None = None) -> Tensor:
        """`(B, H, W, C) -> (B, H, W, C)`; of a tile, with the patches of the picture."""
        step = self.patch_size - OVERLAP
        before = (place.top % step, place.left % step) if place else (0, 0)
        patches = Patches(x.shape[1], x.shape[2], self.patch_size, x.device, before)
        if self.layer is not None:
            x = patches.coverage(x) + patches.apply(self.norm(x), self.layer)
            return x + self.mlp(x)
        maps = F.linear(self.norm(x), to_heads(self.qkv, self.parts, self.num_heads, self.width))
        out = patches.apply(maps, self.attended)
        x = patches.coverage(x) + F.linear(out, from_heads(matrix(self.proj), self.num_heads, self.width))
        return x + self.mlp(x)

    def attended(self, qkv: Tensor) -> Tensor:
        """`(T, p p, 3 heads width) -> (T, p p, heads width)`"""
        q, k, v = qkv.unflatten(-1, (3, self.num_heads, self.width)).permute(2, 0, 3, 1, 4)
        return attend(q, k, v, scale=self.scale).transpose(1, 2).flatten(2)
