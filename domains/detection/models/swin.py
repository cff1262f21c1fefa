"""Swin Transformer (Liu et al. 2021, arXiv 2103.14030) as detectors use it: images of any size.

Maps are padded with zeros to whole windows in every block, after the norm, so that padded places are keys
like others; every other block is shifted, also where one window covers the map; each map that is given has a
norm of its own, which the next stage does not see. (timm's Swin differs in all three.) Tensor names are the
official ones.

Shapes: B images, H x W places of a map, C channels, w places along a side of a window, n = w^2.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import StochasticDepth

from domains.detection.models.conditional import FFN, join_heads, split_heads
from zoo.attention import attend
from zoo.attention.maps import from_windows, padded, windows
from zoo.errors import ConfigError

SWINS: dict[str, dict[str, Any]] = {
    "swin_t": {"embed_dim": 96, "depths": (2, 2, 6, 2), "num_heads": (3, 6, 12, 24), "window_size": 7},
    "swin_l": {"embed_dim": 192, "depths": (2, 2, 18, 2), "num_heads": (6, 12, 24, 48), "window_size": 12},
}
APART = -100.0
"""Added to the scores of two places of a window that come from opposite ends of a shifted map."""


class WindowAttention(nn.Module):
    """Attention within windows, with a learned bias for each relative place.

    Args:
        dim: C.
        num_heads: divides C.
        window_size: w.
        shift: places by which the windows are moved down and to the right.
    """

    relative_position_index: Tensor

    def __init__(self, dim: int, num_heads: int, window_size: int, shift: int) -> None:
        super().__init__()
        self.num_heads, self.window_size, self.shift = num_heads, window_size, shift
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)
        self.relative_position_bias_table = nn.Parameter(torch.empty((2 * window_size - 1) ** 2, num_heads))
        nn.init.trunc_normal_(self.relative_position_bias_table, std=0.02)
        self.register_buffer("relative_position_index", relative_places(window_size))

    def forward(self, x: Tensor) -> Tensor:
        """`(B, H, W, C)`"""
        height, width = x.shape[1:3]
        size, shift = (self.window_size, self.window_size), self.shift
        x = padded(x, size)
        shape = (x.shape[1], x.shape[2])
        if shift:
            x = x.roll((-shift, -shift), (1, 2))
        q, k, v = (split_heads(y, self.num_heads) for y in self.qkv(windows(x, size)).chunk(3, -1))
        bias = self._bias(shape, len(x), x.device)
        x = from_windows(self.proj(join_heads(attend(q, k, v, bias=bias))), size, shape)
        if shift:
            x = x.roll((shift, shift), (1, 2))
        return x[:, :height, :width]

    def _bias(self, shape: tuple[int, int], batch: int, device: torch.device) -> Tensor:
        """`(1 or B windows, heads, n, n)`"""
        index = self.relative_position_index
        bias = (
            self.relative_position_bias_table[index.flatten()].view(*index.shape, -1).permute(2, 0, 1)[None]
        )
        if not self.shift:
            return bias
        apart = ends_apart(shape, self.window_size, self.shift, device)
        return (bias + APART * apart[:, None]).repeat(batch, 1, 1, 1)


def relative_places(window_size: int) -> Tensor:
    """Row of the table for each pair of places of a window, int64 `(n, n)`."""
    side = torch.arange(window_size)
    places = torch.cartesian_prod(side, side)
    offsets = places[:, None] - places[None] + window_size - 1
    return offsets[..., 0] * (2 * window_size - 1) + offsets[..., 1]


def ends_apart(shape: tuple[int, int], window_size: int, shift: int, device: torch.device) -> Tensor:
    """Which pairs of places of a window of a rolled map come from opposite ends, float `(windows, n, n)`."""
    rows, columns = ((torch.arange(n, device=device) >= n - shift).float() for n in shape)
    ends = (2 * rows[:, None] + columns)[None, ..., None]
    part = windows(ends, (window_size, window_size))[..., 0]
    return (part[:, :, None] != part[:, None]).float()


class Block(nn.Module):
    """Windows and MLP, each on the norm of the stream."""

    def __init__(self, dim: int, num_heads: int, window_size: int, shift: int, drop_path: float) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.attn = WindowAttention(dim, num_heads, window_size, shift)
        self.mlp = FFN(dim, 4 * dim, 0.0, nn.GELU())
        self.drop_path = StochasticDepth(drop_path, "row")

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop_path(self.attn(self.norm1(x)))
        return x + self.drop_path(self.mlp(self.norm2(x)))


class PatchMerging(nn.Module):
    """Four neighbours become one place of twice the channels; odd sides are padded with zeros."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(4 * dim)
        self.reduction = nn.Linear(4 * dim, 2 * dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = padded(x, (2, 2))
        parts = [x[:, row::2, column::2] for column in (0, 1) for row in (0, 1)]
        return self.reduction(self.norm(torch.cat(parts, -1)))


class Stage(nn.Module):
    """Blocks of one resolution, and the step to the next."""

    def __init__(
        self, dim: int, num_heads: int, window_size: int, drop_paths: Sequence[float], last: bool
    ) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            Block(dim, num_heads, window_size, i % 2 * (window_size // 2), rate)
            for i, rate in enumerate(drop_paths)
        )
        self.downsample = None if last else PatchMerging(dim)


class PatchEmbed(nn.Module):
    """Patches of 4 x 4 pixels, `(B, 3, H, W)` to `(B, H', W', C)`."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, dim, 4, stride=4)
        self.norm = nn.LayerNorm(dim)

    def forward(self, x: Tensor) -> Tensor:
        x = F.pad(x, (0, -x.shape[3] % 4, 0, -x.shape[2] % 4))
        return self.norm(self.proj(x).permute(0, 2, 3, 1))


class Swin(nn.Module):
    """Images `(B, 3, H, W)` to the maps `(B, C, H', W')` of the last stages, fine to coarse.

    Args:
        levels: how many maps.
        embed_dim: channels of the first stage; each further one has twice as many.
        depths, num_heads: of the stages.
        window_size: places along a side of a window.
        drop_path_rate: of the last block in training; it grows linearly from 0.

    Raises:
        ConfigError: sizes that do not fit together.
    """

    def __init__(
        self,
        levels: int = 3,
        *,
        embed_dim: int = 96,
        depths: Sequence[int] = (2, 2, 6, 2),
        num_heads: Sequence[int] = (3, 6, 12, 24),
        window_size: int = 7,
        drop_path_rate: float = 0.2,
    ) -> None:
        super().__init__()
        if len(depths) != len(num_heads) or not 1 <= levels <= len(depths):
            raise ConfigError(
                f"A Swin of {len(depths)} stages has as many numbers of heads, not {len(num_heads)}, and 1 "
                f"to {len(depths)} levels, not {levels}."
            )
        widths = [embed_dim * 2**i for i in range(len(depths))]
        for width, heads in zip(widths, num_heads, strict=True):
            if width % heads:
                raise ConfigError(f"{width} channels cannot be shared out evenly to {heads} heads.")
        self.patch_embed = PatchEmbed(embed_dim)
        rates = [drop_path_rate * i / max(1, sum(depths) - 1) for i in range(sum(depths))]
        starts = [sum(depths[:i]) for i in range(len(depths))]
        self.layers = nn.ModuleList(
            Stage(
                widths[i], num_heads[i], window_size, rates[start : start + depths[i]], i == len(depths) - 1
            )
            for i, start in enumerate(starts)
        )
        self.given = range(len(depths) - levels, len(depths))
        for i in self.given:
            self.add_module(f"norm{i}", nn.LayerNorm(widths[i]))
        self.channels = tuple(widths[i] for i in self.given)
        self.strides = tuple(4 * 2**i for i in self.given)
        for part in self.modules():
            if isinstance(part, nn.Linear):
                nn.init.trunc_normal_(part.weight, std=0.02)
                if part.bias is not None:
                    nn.init.zeros_(part.bias)

    def forward(self, x: Tensor) -> list[Tensor]:
        x = self.patch_embed(x)
        maps = []
        for i, stage in enumerate(self.layers):
            assert isinstance(stage, Stage)
            for block in stage.blocks:
                x = block(x)
            if i in self.given:
                maps.append(self.get_submodule(f"norm{i}")(x).permute(0, 3, 1, 2))
            if stage.downsample is not None:
                x = stage.downsample(x)
        return maps
