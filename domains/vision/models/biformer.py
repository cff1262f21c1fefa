"""BiFormer: Vision Transformer with Bi-Level Routing Attention (Zhu, Wang, Ke, Zhang, Lau; CVPR 2023).

Shapes: B images, H x W map, C channels, S x S regions, R = S^2. Maps between modules are `(B, C, H, W)` in
channels-last memory, so that attention and MLP read them as `(B, H, W, C)` without a copy.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from timm.layers.drop import DropPath
from torch import Tensor, nn

from domains.vision.attention import Choice, map_attention, on_map
from domains.vision.backbone import Backbone
from domains.vision.vit import initialise
from domains.vision.weights.biformer import BiFormerOfficial, BiFormerSTLOfficial
from zoo.attention import attend
from zoo.attention.routed import attend_regions, route
from zoo.errors import ConfigError
from zoo.layers.conv import ChannelNorm, ChannelsLast, ConvNorm, add_identity_, scale_and_shift, scaled
from zoo.registry import register_model


class BiLevelRoutingAttention(nn.Module):
    """Attention from each region of a map to its k most related ones (section 3.2).

    Regions are related by the products of their mean queries and keys. The depthwise convolution of the
    values (LePE) is added to the result.

    Args:
        num_heads: contiguous slices of the channels.
        n_win: S.
        topk: regions k that a region sees.
        qk_dim: width of queries and keys; C by default.
        side_dwconv: kernel of the LePE; 0 = none.
        regions: `padded`: the input is padded with zeros to S x S equal regions. `floor`: regions are
            floor(H / S) x floor(W / S), as many as it takes, and queries, keys and values are padded. Padding
            is attended to. (The program of `floor` fails on maps smaller than S x S. Here regions are single
            tokens then, and k is limited to their number.)
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        n_win: int,
        topk: int,
        *,
        qk_dim: int | None = None,
        side_dwconv: int = 5,
        regions: Literal["padded", "floor"] = "padded",
    ) -> None:
        super().__init__()
        self.qk_dim = dim if qk_dim is None else qk_dim
        if num_heads < 1 or dim % num_heads or self.qk_dim % num_heads:
            raise ConfigError(f"Widths {dim} and {self.qk_dim} are not divisible by {num_heads} heads.")
        if topk > n_win**2:
            raise ConfigError(f"topk={topk} regions of {n_win} x {n_win}.")
        self.num_heads, self.n_win, self.topk, self.regions = num_heads, n_win, topk, regions
        self.qkv = nn.Linear(dim, 2 * self.qk_dim + dim)
        self.lepe = depthwise(dim, side_dwconv)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """`(B, H, W, C) -> (B, H, W, C)`"""
        height, width = x.shape[1:3]
        size, shape = self.grid(height, width)
        x = x if self.regions == "floor" else padded(x, shape)
        if type(self.qkv) is nn.Linear:
            qk_weight, v_weight = self.qkv.weight.tensor_split([2 * self.qk_dim])
            qk_bias, v_bias = self.qkv.bias.tensor_split([2 * self.qk_dim])
            v = F.linear(x, v_weight, v_bias)
            qk = F.linear(x, qk_weight, qk_bias)
        else:  # with low-rank updates
            qk, v = self.qkv(x).tensor_split([2 * self.qk_dim], -1)
        index = self.route(qk, size)[1]
        q, k = padded(qk, shape).chunk(2, -1)
        q, k, values = (self._heads(t) for t in (q, k, padded(v, shape)))
        out = attend_regions(q, k, values, index, shape, size, scale=self.qk_dim**-0.5)
        out = out.transpose(1, 2).reshape(x.shape[0], *shape, -1)
        if self.regions == "floor":
            out = out[:, :height, :width]
        out = self.proj(out if self.lepe is None else out + channels_last(self.lepe, v))
        return out[:, :height, :width]

    def grid(self, height: int, width: int) -> tuple[tuple[int, int], tuple[int, int]]:
        """Rows and columns of a region, and of the map once it is padded."""
        n = self.n_win
        if self.regions == "padded":
            size = (-(-height // n), -(-width // n))
            return size, (n * size[0], n * size[1])
        size = (max(1, height // n), max(1, width // n))
        return size, (height + -height % size[0], width + -width % size[1])

    @torch.no_grad()
    def route(self, qk: Tensor, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """Scaled products and numbers `(B, R, k)` of the regions that each region sees, best first.

        Args:
            qk: queries and keys side by side, `(B, H, W, 2 qk_dim)`, before the padding of `floor`.
        """
        with torch.autocast(qk.device.type, enabled=False):
            means = F.avg_pool2d(wide(qk).permute(0, 3, 1, 2), size, ceil_mode=True)
            q, k = means.permute(0, 2, 3, 1).flatten(1, 2).chunk(2, -1)
            return route(q * self.qk_dim**-0.5, k, min(self.topk, k.shape[1]))

    def _heads(self, x: Tensor) -> Tensor:
        """`(B, H, W, C)` to `(B, heads, H W, C / heads)`; a view."""
        return x.flatten(1, 2).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)


class FullAttention(nn.Module):
    """Attention over the whole map, for the last stage; always 8 heads in the published models.

    Args:
        lepe_of: what the depthwise convolution that is added sees: the input `x` (as published), the values
            `v` (in the NCHW program), or nothing.
    """

    def __init__(
        self, dim: int, *, num_heads: int = 8, side_dwconv: int = 5, lepe_of: Literal["x", "v", ""] = "x"
    ) -> None:
        super().__init__()
        if dim % num_heads:
            raise ConfigError(f"Width {dim} is not divisible by the {num_heads} heads of full attention.")
        self.num_heads, self.lepe_of = num_heads, lepe_of
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.lepe = depthwise(dim, side_dwconv) if lepe_of else None
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """`(B, H, W, C) -> (B, H, W, C)`"""
        qkv = self.qkv(x)
        q, k, v = qkv.flatten(1, 2).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        out = attend(q, k, v).transpose(1, 2).reshape(x.shape)
        if self.lepe is not None:
            seen = x if self.lepe_of == "x" else qkv[..., 2 * x.shape[-1] :]
            out = out + channels_last(self.lepe, seen)
        return self.proj(out)


class ConvolutionInstead(nn.Module):
    """Three convolutions in the place of attention (`topk=0`)."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.v, self.proj = nn.Linear(dim, dim), nn.Linear(dim, dim)
        self.lepe = nn.Conv2d(dim, dim, 5, padding=2, groups=dim)

    def forward(self, x: Tensor) -> Tensor:
        """`(B, H, W, C) -> (B, H, W, C)`"""
        return self.proj(channels_last(self.lepe, self.v(x)))


def depthwise(dim: int, kernel_size: int) -> nn.Conv2d | None:
    """A depthwise convolution that keeps the size; none for kernel 0."""
    if not kernel_size:
        return None
    return nn.Conv2d(dim, dim, kernel_size, padding=kernel_size // 2, groups=dim)


def channels_last(module: nn.Module, x: Tensor) -> Tensor:
    """A module of maps `(B, C, H, W)` on `(B, H, W, C)`."""
    return module(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


def wide(x: Tensor) -> Tensor:
    """Half precision as float32, in which means of regions and their products are told apart."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def padded(x: Tensor, shape: tuple[int, int]) -> Tensor:
    """`(B, H, W, C)` with zeros on the right and at the bottom, up to `shape`."""
    rows, columns = shape[0] - x.shape[1], shape[1] - x.shape[2]
    return F.pad(x, (0, 0, 0, columns, 0, rows)) if rows or columns else x


class Block(nn.Module):
    """Depthwise position encoding, attention and MLP, each with a residual."""

    def __init__(
        self,
        dim: int,
        attn: nn.Module,
        mlp_ratio: float,
        *,
        pos_dwconv: int,
        layer_scale: float | None,
        drop_path: float,
    ) -> None:
        super().__init__()
        hidden = int(mlp_ratio * dim)
        self.pos = depthwise(dim, pos_dwconv)
        self.pos_residual = True
        self.norm1, self.norm2 = nn.LayerNorm(dim, eps=1e-6), nn.LayerNorm(dim, eps=1e-6)
        self.attn = attn
        self.mlp = nn.Sequential(nn.Linear(dim, hidden), nn.GELU(), nn.Linear(hidden, dim))
        self.drop_path = DropPath(drop_path)
        self.gamma1 = self.gamma2 = None
        if layer_scale is not None:
            self.gamma1, self.gamma2 = (nn.Parameter(torch.full((dim,), layer_scale)) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        """`(B, C, H, W) -> (B, C, H, W)`"""
        if self.pos is not None:
            x = x + self.pos(x) if self.pos_residual else self.pos(x)
        x = x.permute(0, 2, 3, 1)
        x = x + self.drop_path(scaled(on_map(self.attn, self.norm1(x)), self.gamma1))
        x = x + self.drop_path(scaled(self.mlp(self.norm2(x)), self.gamma2))
        return x.permute(0, 3, 1, 2)

    def fuse_(self) -> None:
        """Moves the residual of the position encoding into its kernel."""
        if self.pos is not None and self.pos_residual:
            add_identity_(self.pos)
            self.pos_residual = False


class PatchMerging(nn.Module):
    """A norm, then 2 x 2 patches, as in Swin; what is left of an odd side is cut off."""

    def __init__(self, dim: int, out_dim: int, norm: nn.Module) -> None:
        super().__init__()
        self.norm = norm
        self.conv = nn.Conv2d(dim, out_dim, 2, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        """`(B, C, H, W) -> (B, out, H // 2, W // 2)`"""
        return self.conv(self.norm(x))

    @torch.no_grad()
    def fuse_(self) -> None:
        if isinstance(self.norm, nn.BatchNorm2d):
            scale, shift = scale_and_shift(self.norm)
            assert self.conv.bias is not None
            self.conv.bias.add_(self.conv.weight.sum((2, 3)) @ shift)
            self.conv.weight.mul_(scale[:, None, None])
            self.norm = nn.Identity()


class BiFormer(Backbone):
    """BiFormer, in the layout of the paper (convolutions before each stage) or in that of Swin (patches).

    Any image size works: where the map of a stage is not divisible into regions, it is padded.

    Args:
        depths: blocks of each stage.
        embed_dims: channels of each stage.
        topks: regions that a region sees, for each stage; -2 = full attention with the depthwise convolution
            of its input, -1 = full attention (with the convolution of the values where regions=floor), 0 = a
            convolution instead.
        head_dim: channels per head of routed attention; full attention has 8 heads.
        n_win: regions along each side, one number or one for each stage.
        mlp_ratios: hidden width of the MLP over the width of the stage.
        qk_dims: widths of queries and keys, by default those of the stages.
        side_dwconv: kernel of the depthwise convolution beside attention; 0 = none.
        pos_dwconv: kernel of the depthwise convolution before attention; 0 = none.
        layer_scale: where the factors of the branches start; None = no factors.
        patches: stem and down-samplers of Swin: patches of 4 and 2 pixels.
        channel_norm: layer norm over the channels in stem, down-samplers and at the end, not batch norm; with
            patches only.
        regions: `padded` or `floor`, how a map is cut into regions.
        out_norms: a layer norm on each map that is given out, for dense prediction.
        attention: a layer of the zoo in the place of routed attention: a name, or a mapping with its name and
            arguments (`zoo list attention`).
    """

    first_conv = "stem.1.conv"
    cfg = {"license": "mit", "paper_ids": "arXiv:2303.08810"}  # noqa: RUF012

    def __init__(
        self,
        depths: Sequence[int] = (2, 2, 8, 2),
        embed_dims: Sequence[int] = (64, 128, 256, 512),
        topks: Sequence[int] = (1, 4, 16, -2),
        *,
        head_dim: int = 32,
        n_win: int | Sequence[int] = 7,
        mlp_ratios: Sequence[float] = (3, 3, 3, 3),
        qk_dims: Sequence[int] | None = None,
        side_dwconv: int = 5,
        pos_dwconv: int = 3,
        layer_scale: float | None = None,
        patches: bool = False,
        channel_norm: bool = False,
        regions: Literal["padded", "floor"] = "padded",
        out_norms: bool = False,
        attention: Choice | None = None,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        levels = len(depths)
        wins = [n_win] * levels if isinstance(n_win, int) else list(n_win)
        qk = list(qk_dims or embed_dims)
        if not levels == len(embed_dims) == len(topks) == len(mlp_ratios) == len(wins) == len(qk):
            raise ConfigError(
                "depths, embed_dims, topks, mlp_ratios, qk_dims and n_win have one number for each stage."
            )
        if regions not in ("padded", "floor"):
            raise ConfigError(f"regions is 'padded' or 'floor', not {regions!r}.")
        if channel_norm and not patches:
            raise ConfigError("channel_norm goes with patches=True.")
        self.patches, self.regions, self.attention = patches, regions, attention
        sides = self.pretrained_cfg["input_size"][1:]

        def norm(dim: int) -> nn.Module:
            return ChannelNorm(dim, eps=1e-6) if channel_norm else nn.BatchNorm2d(dim)

        def attn(i: int) -> nn.Module:
            dim, topk = embed_dims[i], topks[i]
            if topk == 0:
                return ConvolutionInstead(dim)
            if topk < 0:
                values = regions == "floor" and topk == -1
                lepe_of = "v" if values else "x" if topk == -2 else ""
                return FullAttention(dim, side_dwconv=side_dwconv, lepe_of=lepe_of)
            if attention is not None:
                shape = [max(1, side // (4 * 2**i)) for side in sides]
                return map_attention(attention, dim, dim // head_dim, shape)
            return BiLevelRoutingAttention(
                dim,
                dim // head_dim,
                wins[i],
                topk,
                qk_dim=qk[i],
                side_dwconv=side_dwconv,
                regions=regions,
            )

        def down(i: int) -> nn.Module:
            before, after = embed_dims[i - 1], embed_dims[i]
            if patches:
                return PatchMerging(before, after, norm(before))
            return ConvNorm(before, after, 3, 2, bias=True)

        first = embed_dims[0]
        if patches:
            embedding = [ConvNorm(self.in_chans, first, 4, 4, 0, bias=True, norm=norm(first))]
        else:
            half = first // 2
            embedding = [
                ConvNorm(self.in_chans, half, 3, 2, bias=True),
                nn.GELU(),
                ConvNorm(half, first, 3, 2, bias=True),
            ]
        self.stem = nn.Sequential(ChannelsLast(), *embedding)
        self.stages = nn.Sequential()
        for i, rates in enumerate(self.drop_path_rates(depths)):
            blocks = [
                Block(
                    embed_dims[i],
                    attn(i),
                    mlp_ratios[i],
                    pos_dwconv=pos_dwconv,
                    layer_scale=layer_scale,
                    drop_path=rate,
                )
                for rate in rates
            ]
            self.stages.append(nn.Sequential(*([down(i)] if i else []), *blocks))
        self.norm = norm(embed_dims[-1])
        if out_norms:
            self.out_norms = nn.ModuleList(ChannelNorm(dim, eps=1e-6) for dim in embed_dims)
        self.apply(initialise)
        self.finish(embed_dims, [4 * 2**i for i in range(levels)])

    def fuse_(self) -> None:
        """Lays kernels out as the maps are, which convolutions would do at every call.

        Only here: safetensors refuses to store weights that are not contiguous.
        """
        self.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]


_PUBLISHED: dict[str, Any] = {
    "model": BiFormer,
    "paper": "Zhu et al., BiFormer: Vision Transformer with Bi-Level Routing Attention, CVPR 2023",
    "licence": "MIT",
    "source": "https://github.com/rayleizhu/BiFormer",
    "status": "official parity",
    "preprocessing": {"resize": "256, bicubic", "crop": "224, centre", "normalise": "ImageNet mean and std"},
}


@register_model(
    official=BiFormerOfficial,
    summary="Routed regions, 13 M: 81.4 % on ImageNet-1k (paper)",
    weights=("biformer_tiny_in1k",),
    **_PUBLISHED,
)
def biformer_tiny(*, drop_path_rate: float = 0.1, **kwargs: Any) -> nn.Module:
    return BiFormer(drop_path_rate=drop_path_rate, **kwargs)


@register_model(
    official=BiFormerOfficial,
    summary="Routed regions, 26 M: 83.8 % on ImageNet-1k (paper)",
    weights=("biformer_small_in1k",),
    **_PUBLISHED,
)
def biformer_small(
    *, depths: Sequence[int] = (4, 4, 18, 4), drop_path_rate: float = 0.15, **kwargs: Any
) -> nn.Module:
    return BiFormer(depths=depths, drop_path_rate=drop_path_rate, **kwargs)


@register_model(
    official=BiFormerOfficial,
    summary="Routed regions, 57 M: 84.3 % on ImageNet-1k (paper)",
    weights=("biformer_base_in1k",),
    **_PUBLISHED,
)
def biformer_base(
    *,
    depths: Sequence[int] = (4, 4, 18, 4),
    embed_dims: Sequence[int] = (96, 192, 384, 768),
    drop_path_rate: float = 0.4,
    **kwargs: Any,
) -> nn.Module:
    return BiFormer(depths=depths, embed_dims=embed_dims, drop_path_rate=drop_path_rate, **kwargs)


@register_model(
    official=BiFormerSTLOfficial,
    summary="Routed regions in the layout of Swin-T, 28 M: 82.7 % on ImageNet-1k (paper)",
    weights=("biformer_stl_in1k",),
    **_PUBLISHED,
)
def biformer_stl(
    *,
    depths: Sequence[int] = (2, 2, 6, 2),
    embed_dims: Sequence[int] = (96, 192, 384, 768),
    mlp_ratios: Sequence[float] = (4, 4, 4, 4),
    pos_dwconv: int = 0,
    patches: bool = True,
    **kwargs: Any,
) -> nn.Module:
    return BiFormer(
        depths=depths,
        embed_dims=embed_dims,
        mlp_ratios=mlp_ratios,
        pos_dwconv=pos_dwconv,
        patches=patches,
        **kwargs,
    )


@register_model(
    official=BiFormerSTLOfficial,
    summary="Routed regions in the layout of Swin-T, refactored program (regions by floor), 28 M: 82.7 %",
    weights=("biformer_stl_nchw_in1k",),
    **_PUBLISHED,
)
def biformer_stl_nchw(
    *,
    topks: Sequence[int] = (1, 4, 16, -1),
    regions: Literal["padded", "floor"] = "floor",
    **kwargs: Any,
) -> nn.Module:
    return biformer_stl(topks=topks, regions=regions, **kwargs)


@register_model(
    official=BiFormerOfficial,
    summary="Routed regions in two stages, 0.2 M, for images of 32 pixels: the zoo's own size, not published",
    **(_PUBLISHED | {"status": "re-implementation", "preprocessing": {"resize": "32, bicubic"}}),
)
def biformer_digits(
    *,
    depths: Sequence[int] = (2, 2),
    embed_dims: Sequence[int] = (32, 64),
    topks: Sequence[int] = (2, -2),
    mlp_ratios: Sequence[float] = (3, 3),
    **kwargs: Any,
) -> nn.Module:
    sizes: dict[str, Any] = {"head_dim": 16, "n_win": 4, "img_size": 32} | kwargs
    return BiFormer(depths, embed_dims, topks, mlp_ratios=mlp_ratios, **sizes)
