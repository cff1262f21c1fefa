"""SReT: Sliced Recursive Transformer (Shen, Liu, Xing; ECCV 2022).

The weights of a block are applied more than once, with a light MLP of its own after each pass; tokens attend
within groups of consecutive tokens, which are shuffled in every second pass.

Shapes: B images, H x W map, N = H W tokens, C channels, g groups. Maps between modules are `(B, C, H, W)` in
channels-last memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from itertools import pairwise
from typing import Any, Literal

import torch
import torch.nn.functional as F
from timm.layers.drop import DropPath
from timm.layers.mlp import Mlp
from torch import Tensor, nn

from domains.vision.backbone import Backbone
from domains.vision.resizing import resized_table
from domains.vision.vit import SelfAttention, initialise
from domains.vision.weights.sret import SReTOfficial
from zoo.attention import EqualGroups, OrderedGroups, Padding, Pattern
from zoo.errors import ConfigError, DataError
from zoo.layers.conv import ConvNorm
from zoo.registry import register_model


class Stem(nn.Module):
    """Three 3 x 3 convolutions of stride 2, and learned positions, resized to other grids (bicubic).

    Args:
        grid: height and width of the map for images of img_size.
    """

    def __init__(self, in_chans: int, dim: int, grid: tuple[int, int]) -> None:
        super().__init__()
        widths = (in_chans, dim // 2, dim, dim)
        self.convs = nn.ModuleList(
            ConvNorm(before, after, 3, 2, bias=True) for before, after in pairwise(widths)
        )
        self.pos_embed = nn.Parameter(nn.init.trunc_normal_(torch.empty(1, dim, *grid), std=0.02))

    def forward(self, x: Tensor) -> Tensor:
        """`(B, in_chans, H, W) -> (B, C, ceil(H / 8), ceil(W / 8))`"""
        x = x.contiguous(memory_format=torch.channels_last)
        for conv in self.convs:
            x = F.relu(conv(x))
        return x + resized_table(self.pos_embed, x.shape[2:])


class SlicedBlock(nn.Module):
    """Attention within groups and MLP, each weighed against what it is given: `c_1 x + c_2 f(norm(x))`."""

    def __init__(self, dim: int, num_heads: int, mlp_ratio: float, drop_path: float) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim, eps=1e-6), nn.LayerNorm(dim, eps=1e-6)
        self.attn = SelfAttention(dim, num_heads)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))
        self.drop_path = DropPath(drop_path)
        self.coefficient1, self.coefficient2, self.coefficient3, self.coefficient4 = scalars(4)

    def forward(self, x: Tensor, groups: int, order: Tensor | None) -> Tensor:
        """`(B, N, C) -> (B, N, C)`"""
        y = in_groups(self.attn, self.norm1(x), groups, order)
        x = self.coefficient1 * x + self.coefficient2 * self.drop_path(y)
        return self.coefficient3 * x + self.coefficient4 * self.drop_path(self.mlp(self.norm2(x)))


class Step(nn.Module):
    """The light MLP after a pass through a block (the non-linear projection of section 3.2)."""

    def __init__(self, dim: int, mlp_ratio: float, drop_path: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))
        self.drop_path = DropPath(drop_path)
        self.coefficient1, self.coefficient2 = scalars(2)

    def forward(self, x: Tensor) -> Tensor:
        return self.coefficient1 * x + self.coefficient2 * self.drop_path(self.mlp(self.norm1(x)))


def scalars(count: int) -> list[nn.Parameter]:
    """Learned factors that start at 1."""
    return [nn.Parameter(torch.ones(1)) for _ in range(count)]


def in_groups(attn: SelfAttention, x: Tensor, groups: int, order: Tensor | None = None) -> Tensor:
    """Attention of tokens `(B, N, C)` within groups of `ceil(N / g)`; the last may be smaller.

    Groups are of tokens that follow each other, in their own order or in this one `(N,)`.
    """
    tokens = x.shape[1]
    if groups == 1:
        return attn(x)
    size = -(-tokens // groups)
    if order is not None:
        return attn(x, OrderedGroups(order, size))
    pattern: Pattern = EqualGroups(size)
    missing = -tokens % size
    if missing:
        x = F.pad(x, (0, 0, 0, missing))
        pattern = pattern & Padding((torch.arange(x.shape[1], device=x.device) < tokens)[None])
    return attn(x, pattern)[:, :tokens]


def fixed_order(tokens: int, seed: int, device: torch.device) -> Tensor:
    """A permutation `(N,)` that is the same on any machine: numbers in the order of their hashes."""
    x = torch.arange(tokens, device=device) + 1_000_003 * (seed + 1)
    for _ in range(2):
        x = ((x >> 16) ^ x) * 0x45D9F3B & 0xFFFFFFFF
    return x.argsort(stable=True)


class Recursion(nn.Module):
    """A block that is passed several times, each time followed by a step of its own.

    Args:
        first: number of the first pass among those of the stage. Odd passes have `groups[1]` groups, of
            shuffled tokens if there is more than one, even ones `groups[0]`.
        passes: how often the block is applied.
        shuffle: as of `SReT`.
        seed: of the fixed orders.
    """

    def __init__(
        self,
        block: SlicedBlock,
        steps: Sequence[Step],
        *,
        first: int,
        groups: tuple[int, int],
        shuffle: Literal["random", "fixed"],
        seed: int,
    ) -> None:
        super().__init__()
        self.block, self.steps = block, nn.ModuleList(steps)
        self.first, self.groups, self.shuffle, self.seed = first, groups, shuffle, seed
        self.orders: dict[int, Tensor] = {}

    def shuffled(self) -> list[int]:
        """The passes that shuffle, counted from 0."""
        return [i for i in range(len(self.steps)) if (self.first + i) % 2 and self.groups[1] > 1]

    @property
    def token_order(self) -> str:
        """What maps of its attention are: those of shuffled tokens cannot be drawn over an image."""
        return "none" if self.shuffled() else "windows"

    def forward(self, x: Tensor) -> Tensor:
        """`(B, C, H, W) -> (B, C, H, W)`"""
        shape = x.shape[2:]
        x = x.flatten(2).mT
        for i, step in enumerate(self.steps):
            order = self._order(i, x) if i in self.shuffled() else None
            x = step(self.block(x, self.groups[(self.first + i) % 2], order))
        return x.mT.unflatten(2, shape)

    def _order(self, i: int, x: Tensor) -> Tensor:
        tokens = x.shape[1]
        if i in self.orders:
            order = self.orders[i].to(x.device)
            if len(order) != tokens:
                raise DataError(f"A permutation of {len(order)} tokens was set, the map has {tokens}.")
            return order
        if self.training and self.shuffle == "random":
            return torch.randperm(tokens, device=x.device)
        return fixed_order(tokens, self.seed + i, x.device)


class SReT(Backbone):
    """SReT. Any image size works (the official program takes one): positions are resized (bicubic), and the
    last group of a map may be shorter than the others.

    Args:
        embed_dims: channels of each stage.
        depths: passes of each stage.
        num_blocks: blocks of each stage, each passed `depth / num_blocks` times.
        num_heads: of each stage.
        groups: of consecutive tokens, in the even passes of each stage.
        recursive_groups: in the odd passes, of shuffled tokens.
        mlp_ratio: hidden width of the MLP of a block over its width.
        step_ratio: hidden width of the MLP after a pass.
        shuffle: `random`: in training, the order of tokens is drawn anew in every pass, as in the official
            program; in evaluation it is always the same (the official program draws it there too). `fixed`:
            always the same. `set_permutations` gives others.
    """

    first_conv = "stem.convs.0.conv"
    cfg = {"license": "mit", "crop_pct": 0.9, "paper_ids": "arXiv:2111.05297"}  # noqa: RUF012

    def __init__(
        self,
        *,
        embed_dims: Sequence[int] = (64, 128, 256),
        depths: Sequence[int] = (4, 10, 6),
        num_blocks: Sequence[int] = (2, 5, 3),
        num_heads: Sequence[int] = (2, 4, 8),
        groups: Sequence[int] = (8, 4, 1),
        recursive_groups: Sequence[int] = (2, 1, 1),
        mlp_ratio: float = 3.6,
        step_ratio: float = 1.0,
        shuffle: Literal["random", "fixed"] = "random",
        **options: Any,
    ) -> None:
        super().__init__(**options)
        given = (embed_dims, depths, num_blocks, num_heads, groups, recursive_groups)
        if len({len(values) for values in given}) > 1:
            raise ConfigError(
                "embed_dims, depths, num_blocks, num_heads, groups and recursive_groups have one number for "
                "each stage."
            )
        if any(count < 1 or depth % count for depth, count in zip(depths, num_blocks, strict=True)):
            raise ConfigError(f"depths={depths} are multiples of num_blocks={num_blocks}.")
        if min(*groups, *recursive_groups) < 1:
            raise ConfigError("groups and recursive_groups are at least 1.")
        if shuffle not in ("random", "fixed"):
            raise ConfigError(f"shuffle is 'random' or 'fixed', not {shuffle!r}.")
        height, width = self.pretrained_cfg["input_size"][1:]
        self.stem = Stem(self.in_chans, embed_dims[0], (-(-height // 8), -(-width // 8)))
        self.stages = nn.Sequential()
        for i, rates in enumerate(self.drop_path_rates(depths)):
            dim, loops = embed_dims[i], depths[i] // num_blocks[i]
            layers: list[nn.Module] = [_pool(embed_dims[i - 1], dim)] if i else []
            for first in range(0, depths[i], loops):
                recursion = Recursion(
                    SlicedBlock(dim, num_heads[i], mlp_ratio, rates[first]),
                    [Step(dim, step_ratio, rate) for rate in rates[first : first + loops]],
                    first=first,
                    groups=(groups[i], recursive_groups[i]),
                    shuffle=shuffle,
                    seed=sum(depths[:i]) + first,
                )
                layers.append(recursion)
            self.stages.append(nn.Sequential(*layers))
        self.apply(initialise)
        self.finish(embed_dims, [8 * 2**i for i in range(len(depths))])

    def make_pre_head(self) -> nn.Module:
        return nn.LayerNorm(self.num_features, eps=1e-6)

    def set_permutations(self, orders: Sequence[Tensor] | None) -> None:
        """The orders of tokens `(N,)` of all passes that shuffle, from the first to the last; None = those
        that `shuffle` names.

        Raises:
            DataError: another number of orders than passes that shuffle.
        """
        passes = [(m, i) for m in self.modules() if isinstance(m, Recursion) for i in m.shuffled()]
        if orders is not None and len(orders) != len(passes):
            raise DataError(
                f"{len(passes)} passes shuffle their tokens, but {len(orders)} orders were given."
            )
        for recursion, _ in passes:
            recursion.orders = {}
        for (recursion, i), order in zip(passes, orders or (), strict=False):
            recursion.orders[i] = order.long()

    def no_weight_decay(self) -> set[str]:
        return {"stem.pos_embed"}


def _pool(dim: int, out_dim: int) -> nn.Conv2d:
    """Halves the sides; each channel feeds those that it is multiplied to."""
    if out_dim % dim:
        raise ConfigError(f"A stage is a multiple of the one before in width: {out_dim} after {dim}.")
    return nn.Conv2d(dim, out_dim, 3, 2, 1, groups=dim)


# ---- variants ----------------------------------------------------------------------------------------------

_register = partial(
    register_model,
    model=SReT,
    paper="Shen et al., Sliced Recursive Transformer, ECCV 2022, arXiv 2111.05297",
    licence="MIT",
    source="https://github.com/szq0214/SReT",
    status="official parity",
    official=SReTOfficial,
    preprocessing={"resize": "248, bicubic", "crop": "224, centre", "normalise": "ImageNet mean and std"},
)


_GROUPS = "Groups are not in a checkpoint: give those that it was trained with (groups, recursive_groups)."


@_register(summary="Recursive transformer, 4.8 M: 76.1 % on ImageNet-1k (paper)", notes=_GROUPS)
def sret_t(**kwargs: Any) -> nn.Module:
    return SReT(**kwargs)


@_register(summary="Recursive transformer with wider MLPs, 5.0 M", notes=_GROUPS)
def sret_lt(*, mlp_ratio: float = 4.0, **kwargs: Any) -> nn.Module:
    return SReT(mlp_ratio=mlp_ratio, **kwargs)


@_register(
    summary="Recursive transformer, 21 M: 81.9 % on ImageNet-1k (paper)",
    notes=f"{_GROUPS} The ratios of the MLPs follow from the published 20.9 M parameters.",
)
def sret_s(
    *,
    embed_dims: Sequence[int] = (126, 252, 504),
    num_heads: Sequence[int] = (3, 6, 12),
    mlp_ratio: float = 3.0,
    step_ratio: float = 2.0,
    **kwargs: Any,
) -> nn.Module:
    return SReT(
        embed_dims=embed_dims, num_heads=num_heads, mlp_ratio=mlp_ratio, step_ratio=step_ratio, **kwargs
    )
