"""CATANet: content-aware token aggregation for lightweight super-resolution (Liu, Liu, Tang, Wu; CVPR 2025).

Shapes: B images, H x W low-resolution pixels, C channels, scale s. Inside of the blocks maps are
`(B, H, W, C)`; convolutions see them as `(B, C, H, W)` in channels-last memory, without a copy.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from domains.superres.models.catanet_patches import OVERLAP, LocalAttention
from domains.superres.models.catanet_tokens import TokenAggregation
from domains.superres.models.place import Place
from domains.superres.weights.catanet import CATANetOfficial
from zoo.errors import ConfigError
from zoo.registry import register_model

SCALES = (1, 2, 3, 4)


class Block(nn.Module):
    """Token aggregation, local attention and a convolution, with one residual around all."""

    def __init__(self, dim: int, tokens: TokenAggregation, local: LocalAttention) -> None:
        super().__init__()
        self.tokens = tokens
        self.local = local
        self.conv = nn.Conv2d(dim, dim, 3, padding=1)

    def forward(self, x: Tensor, place: Place | None = None) -> Tensor:
        """`(B, H, W, C) -> (B, H, W, C)`"""
        return x + self.conv(self.local(self.tokens(x), place).permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


class Upsampler(nn.ModuleList):
    """Convolution, pixel shuffle and LeakyReLU: once for s = 2 and 3, twice for 4, nothing for 1."""

    def __init__(self, dim: int, scale: int) -> None:
        self.factors = {1: [], 2: [2], 3: [3], 4: [2, 2]}[scale]
        super().__init__(nn.Conv2d(dim, dim * r * r, 3, padding=1) for r in self.factors)

    def forward(self, x: Tensor) -> Tensor:
        """`(B, C, H, W) -> (B, C, s H, s W)`"""
        for conv, factor in zip(self, self.factors, strict=True):
            x = F.leaky_relu_(F.pixel_shuffle(conv(x), factor), 0.1)
        return x


class CATANet(nn.Module):
    """Blocks of attention in groups of similar tokens and in local patches, then a pixel shuffle.

    Any size of image and batch. A side shorter than `min_size` (where the official program zeroes features,
    or fails) is padded on the right and at the bottom, by reflection, or by repetition where it is too short
    for that, and the result is cut. In evaluation the images of a batch do not depend on each other once the
    token centres are trained; before, in a fresh model, they do (`ready` tells).

    Args:
        scale: s, 1 to 4.
        dim: C.
        qk_dim: width of queries and keys.
        mlp_dim: hidden width of the ConvFFNs.
        num_heads: of every attention; divides dim and qk_dim.
        patch_sizes: side of the patches of local attention, one for each block.
        num_tokens: token centres of each block.
        group_sizes: tokens in a group, for each block.
        n_iters: rounds in which training refines the centres, for each block.
        in_chans: channels of images.
        attention: a layer of the zoo in the place of the local attention: a name, or a mapping with its name
            and arguments (`zoo list attention`).

    Raises:
        ConfigError: sizes that do not fit together.
        UnknownName, AttentionError: an attention that does not exist, or cannot do what is asked of it.
    """

    placed = True

    def __init__(
        self,
        scale: int = 4,
        *,
        dim: int = 40,
        qk_dim: int = 36,
        mlp_dim: int = 96,
        num_heads: int = 4,
        patch_sizes: Sequence[int] = (16, 20, 24, 28, 16, 20, 24, 28),
        num_tokens: Sequence[int] = (16, 32, 64, 128, 16, 32, 64, 128),
        group_sizes: Sequence[int] = (256, 128, 64, 32, 256, 128, 64, 32),
        n_iters: Sequence[int] = (5, 5, 5, 5, 5, 5, 5, 5),
        in_chans: int = 3,
        attention: str | Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        per_block = {
            "patch_sizes": patch_sizes,
            "num_tokens": num_tokens,
            "group_sizes": group_sizes,
            "n_iters": n_iters,
        }
        _check(scale, dim, qk_dim, num_heads, per_block)
        self.scale, self.min_size = scale, max(patch_sizes)
        self.first_conv = nn.Conv2d(in_chans, dim, 3, padding=1)
        sizes = (dim, qk_dim, mlp_dim, num_heads)
        self.blocks = nn.ModuleList(
            Block(
                dim,
                TokenAggregation(*sizes, num_tokens=centres, group_size=group, n_iter=rounds),
                LocalAttention(*sizes, patch, attention),
            )
            for patch, centres, group, rounds in zip(*per_block.values(), strict=True)
        )
        self.upsampler = Upsampler(dim, scale)
        self.last_conv = nn.Conv2d(dim, in_chans, 3, padding=1)
        self._initialise()

    def _initialise(self) -> None:
        layers = [block.local.layer for block in self._blocks()]
        others = {id(m) for layer in layers if layer is not None for m in layer.modules()}
        for module in self.modules():
            if isinstance(module, nn.Linear) and id(module) not in others:
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        for block in self._blocks():
            block.tokens.merge.reset_parameters()  # a 1 x 1 convolution in the official program

    def forward(self, x: Tensor, place: Place | None = None) -> Tensor:
        """`(B, C, H, W)` in [0, 1] -> `(B, C, s H, s W)`, not clamped.

        Args:
            place: of a tile in its picture, so that local patches lie where they do in the whole.
        """
        height, width = (self.scale * side for side in x.shape[-2:])
        x = enlarged(x, self.min_size)
        base = F.interpolate(x, scale_factor=self.scale, mode="bilinear", align_corners=False)
        features = first = self._features(x)
        for block in self.blocks:
            features = block(features, place)
        features = (features + first).permute(0, 3, 1, 2)
        return (self.last_conv(self.upsampler(features)) + base)[..., :height, :width]

    @torch.no_grad()
    def token_groups(self, x: Tensor) -> list[Tensor]:
        """The token centre `(B, H, W)` that each pixel goes to, for each block."""
        height, width = x.shape[-2:]
        features, groups = self._features(enlarged(x, self.min_size)), []
        for block in self._blocks():
            groups.append(block.tokens.groups(features)[:, :height, :width])
            features = block(features)
        return groups

    @property
    def ready(self) -> bool:
        """Whether training or a checkpoint has set the token centres of every block."""
        return all(bool(block.tokens.initted) for block in self._blocks())

    def _features(self, x: Tensor) -> Tensor:
        return self.first_conv(x.contiguous(memory_format=torch.channels_last)).permute(0, 2, 3, 1)

    def _blocks(self) -> list[Block]:
        return list(self.blocks)  # pyright: ignore[reportReturnType, reportArgumentType]


def enlarged(x: Tensor, size: int) -> Tensor:
    """Images `(B, C, H, W)`, continued on the right and at the bottom, no side shorter than `size`."""
    for axis in (-1, -2):
        have = x.shape[axis]
        if have < size:
            pad = (0, size - have, 0, 0) if axis == -1 else (0, 0, 0, size - have)
            x = F.pad(x, pad, mode="reflect" if 2 * have > size else "replicate")
    return x


def _check(scale: int, dim: int, qk_dim: int, num_heads: int, per_block: Mapping[str, Sequence[int]]) -> None:
    if scale not in SCALES:
        raise ConfigError(f"CATANet has a scale of {', '.join(map(str, SCALES))}, not {scale}.")
    if num_heads < 1 or dim % num_heads or qk_dim % num_heads:
        raise ConfigError(f"dim={dim} and qk_dim={qk_dim} are not divisible by num_heads={num_heads}.")
    if len({len(values) for values in per_block.values()}) > 1:
        lengths = ", ".join(f"{len(values)} {name}" for name, values in per_block.items())
        raise ConfigError(f"Each block has one number of each, but there are {lengths}.")
    for name, values in per_block.items():
        least = 2 * OVERLAP if name == "patch_sizes" else 1
        if not values or min(values) < least:
            raise ConfigError(f"{name} are numbers of at least {least}, not {list(values)}.")


# ---- variants ----------------------------------------------------------------------------------------------

ABOUT: dict[str, Any] = {
    "model": CATANet,
    "paper": "CATANet: Efficient Content-Aware Token Aggregation for Lightweight Image Super-Resolution "
    "(Liu, Liu, Tang, Wu; CVPR 2025, arXiv 2503.06896)",
    "licence": "Apache-2.0",
    "source": "https://github.com/EquationWalker/CATANet",
    "preprocessing": {"range": [0.0, 1.0], "channels": "RGB"},
    "official": CATANetOfficial,
}


def _published(name: str, scale: int, given: int, options: dict[str, Any]) -> CATANet:
    if given != scale and given in SCALES:
        raise ConfigError(f"{name} enlarges {scale} times. For {given} times, use catanet_x{given}.")
    return CATANet(given, **options)


@register_model(
    summary="CATANet that keeps the size, which its official class allows: 8 blocks of 40 channels",
    status="official parity",
    **ABOUT,
)
def catanet_x1(*, scale: int = 1, **options: Any) -> CATANet:
    return _published("catanet_x1", 1, scale, options)


@register_model(
    summary="CATANet for twice the size: 8 blocks of 40 channels",
    status="official parity",
    **ABOUT,
)
def catanet_x2(*, scale: int = 2, **options: Any) -> CATANet:
    return _published("catanet_x2", 2, scale, options)


@register_model(
    summary="CATANet for three times the size: 8 blocks of 40 channels",
    status="official parity",
    **ABOUT,
)
def catanet_x3(*, scale: int = 3, **options: Any) -> CATANet:
    return _published("catanet_x3", 3, scale, options)


@register_model(
    summary="CATANet for four times the size: 8 blocks of 40 channels",
    status="official parity",
    **ABOUT,
)
def catanet_x4(*, scale: int = 4, **options: Any) -> CATANet:
    return _published("catanet_x4", 4, scale, options)


@register_model(
    summary="A small CATANet, two blocks of 24 channels, to train from scratch on a CPU",
    status="re-implementation",
    **ABOUT,
)
def catanet_mini(
    *,
    scale: int = 2,
    dim: int = 24,
    qk_dim: int = 24,
    mlp_dim: int = 48,
    num_heads: int = 2,
    patch_sizes: Sequence[int] = (8, 12),
    num_tokens: Sequence[int] = (16, 16),
    group_sizes: Sequence[int] = (32, 32),
    n_iters: Sequence[int] = (1, 1),
    **options: Any,
) -> CATANet:
    return CATANet(
        scale,
        dim=dim,
        qk_dim=qk_dim,
        mlp_dim=mlp_dim,
        num_heads=num_heads,
        patch_sizes=patch_sizes,
        num_tokens=num_tokens,
        group_sizes=group_sizes,
        n_iters=n_iters,
        **options,
    )
