"""EfficientViT (Liu et al. 2023, Microsoft): few attention layers, heads in a cascade, many convolutions.

Maps are `(B, C, H, W)` and lie channels-last in memory, so that a 1x1 convolution is one matrix product and a
window of tokens is read without a permutation.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers.drop import DropPath
from timm.layers.weight_init import trunc_normal_
from torch import Tensor, nn

from domains.vision.backbone import Backbone
from domains.vision.weights.efficientvit import EfficientViTOfficial
from zoo.attention import attend
from zoo.attention.capture import recorder
from zoo.attention.layers.cascaded import cascade
from zoo.errors import ConfigError
from zoo.layers.conv import ConvNorm, scale_and_shift
from zoo.registry import register_model

# ---- convolutions ------------------------------------------------------------------------------------------


def channels_last(module: Any) -> Any:
    """The module, its kernels laid out like the maps."""
    return module.to(memory_format=torch.channels_last)


class Stem(nn.Sequential):
    """Four strided convolutions: a token for each 16 x 16 pixels."""

    def __init__(self, in_chans: int, dim: int) -> None:
        widths = [in_chans, dim // 8, dim // 4, dim // 2, dim]
        super().__init__(*(ConvNorm(a, b, 3, stride=2) for a, b in pairwise(widths)))

    def forward(self, x: Tensor) -> Tensor:
        x = x.contiguous(memory_format=torch.channels_last)
        *first, last = self
        for conv in first:
            x = conv(x).relu_()
        return last(x)

    def fuse_(self) -> None:
        channels_last(self)


class Pointwise(nn.Module):
    """A 1x1 convolution for inference: one matrix product on a map that lies channels-last."""

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        assert conv.bias is not None
        self.weight = nn.Parameter(conv.weight.detach().flatten(1).t().contiguous(), requires_grad=False)
        self.bias = conv.bias

    def forward(self, x: Tensor) -> Tensor:
        return self.rows(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)

    def rows(self, x: Tensor) -> Tensor:
        """`(..., in)` to `(..., out)`."""
        return torch.addmm(self.bias, x.reshape(-1, x.shape[-1]), self.weight).view(*x.shape[:-1], -1)


class PointNorm(ConvNorm):
    """1x1 convolution and batch norm."""

    def fuse_(self) -> None:
        super().fuse_()
        if isinstance(self.conv, nn.Conv2d):
            self.conv = Pointwise(self.conv)


class Depthwise(nn.Module):
    """`x + norm(conv(x))`, a 3x3 convolution of each channel on its own."""

    def __init__(self, dim: int, *, gain: float = 0.0, drop_path: float = 0.0) -> None:
        super().__init__()
        self.conv = ConvNorm(dim, dim, 3, groups=dim, gain=gain)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.drop_path(self.conv(x))

    def fused(self) -> nn.Conv2d:
        """One convolution: the shortcut is a 1 in the centre of each kernel."""
        conv = self.conv.conv
        conv.weight[:, :, 1, 1] += 1
        return channels_last(conv)


class FFN(nn.Module):
    """`x + W_2 ReLU(W_1 x)`, twice as wide inside."""

    def __init__(self, dim: int, *, drop_path: float = 0.0) -> None:
        super().__init__()
        self.expand = PointNorm(dim, 2 * dim)
        self.reduce = PointNorm(2 * dim, dim, gain=0.0)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.drop_path(self.reduce(self.expand(x).relu_()))

    def fused(self) -> FusedFFN:
        return FusedFFN(self.expand.conv, self.reduce.conv)  # pyright: ignore[reportArgumentType]


class FusedFFN(nn.Module):
    """`FFN` for inference."""

    def __init__(self, expand: Pointwise, reduce: Pointwise) -> None:
        super().__init__()
        self.expand, self.reduce = expand, reduce

    def forward(self, x: Tensor) -> Tensor:
        rows = x.permute(0, 2, 3, 1)
        return self.reduce.rows(self.expand.rows(rows).relu_()).add_(rows).permute(0, 3, 1, 2)


class Parts(nn.Sequential):
    """Parts that follow one another; those with a fused form are replaced by it."""

    def fuse_(self) -> None:
        for name, part in self.named_children():
            if hasattr(part, "fused"):
                setattr(self, name, part.fused())  # pyright: ignore[reportCallIssue]


class ConvBlock(Parts):
    """The half block before and after merging."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.depthwise = Depthwise(dim, gain=1.0)
        self.ffn = FFN(dim)


class SqueezeExcite(nn.Module):
    """Each channel times a gate in (0, 1), computed from the means of all (Hu et al. 2018)."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.reduce = nn.Linear(dim, hidden)
        self.expand = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        gate = self.expand(self.reduce(x.mean((2, 3))).relu_()).sigmoid()
        return x * gate[:, :, None, None]


class PatchMerging(nn.Module):
    """Half the height and width, by an inverted bottleneck with squeeze-and-excitation."""

    def __init__(self, dim: int, out_dim: int) -> None:
        super().__init__()
        self.expand = PointNorm(dim, 4 * dim)
        self.stride = ConvNorm(4 * dim, 4 * dim, 3, stride=2, groups=4 * dim)
        self.gate = SqueezeExcite(4 * dim, max(8, (dim + 4) // 8 * 8))
        self.reduce = PointNorm(4 * dim, out_dim)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stride(self.expand(x).relu_()).relu_()
        return self.reduce(self.gate(x))

    def fuse_(self) -> None:
        channels_last(self)


# ---- attention ---------------------------------------------------------------------------------------------


class Head(nn.Module):
    """Attention inside windows `(B, r^2, share)`; a convolution first mixes queries that are neighbours."""

    def __init__(self, share: int, key_dim: int, value_dim: int, kernel: int) -> None:
        super().__init__()
        self.widths = [key_dim, key_dim, value_dim]
        self.qkv = PointNorm(share, sum(self.widths))
        self.query = ConvNorm(key_dim, key_dim, kernel, groups=key_dim)

    def forward(self, x: Tensor, bias: Tensor, window: int) -> Tensor:
        q, k, v = tokens(self.qkv(as_map(x, window))).split(self.widths, -1)
        q = tokens(self.query(as_map(q, window)))
        return attend(q[:, None], k[:, None], v[:, None], bias=bias)[:, 0]


class CascadedAttention(nn.Module):
    """Cascaded group attention inside windows, `(B, r^2, C)` to the same (sections 3.2 and 3.3).

    The bias of a query and a key depends on |dy| and |dx|: `table` is `(H, r^2)`.
    """

    offsets: Tensor

    def __init__(
        self,
        dim: int,
        num_heads: int,
        key_dim: int,
        kernels: Sequence[int],
        window: int,
        *,
        value_dim: int | None = None,
    ) -> None:
        super().__init__()
        share = dim // num_heads
        value_dim = share if value_dim is None else value_dim
        self.heads = nn.ModuleList(Head(share, key_dim, value_dim, kernels[i]) for i in range(num_heads))
        self.proj = PointNorm(num_heads * value_dim, dim, gain=0.0)
        self.table = nn.Parameter(torch.zeros(num_heads, window**2))
        self.set_window(window)

    def set_window(self, window: int) -> None:
        """Windows of another size; the table is interpolated."""
        self.window = window
        if self.table.shape[1] != window**2:
            self.table = nn.Parameter(resized_table(self.table.detach(), window))
        self.register_buffer("offsets", distances(window).to(self.table.device), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        biases = self.table[:, self.offsets]
        heads = [
            partial(head, bias=bias, window=self.window)
            for head, bias in zip(self.heads, biases, strict=True)
        ]
        y = torch.cat(cascade(heads, x.chunk(len(heads), -1)), -1).relu_()
        return tokens(self.proj(as_map(y, self.window)))


class FusedCascade(nn.Module):
    """`CascadedAttention` for inference: norms folded, biases laid out, and all that heads do with their own
    shares done at once.

    The products stand here, because on 49 tokens the checks of `attend` take longer than they; while maps are
    captured, it is called. In windows of at most 16 tokens, the convolution of the queries is a matrix for
    each channel.
    """

    positions: Tensor
    query_bias: Tensor
    matrices: Tensor | None

    @torch.no_grad()
    def __init__(self, attention: CascadedAttention) -> None:
        super().__init__()
        heads: list[Any] = list(attention.heads)
        self.widths, self.window, self.num_heads = heads[0].widths, attention.window, len(heads)
        self.weight = _frozen(torch.stack([head.qkv.conv.weight for head in heads]))
        self.bias = _frozen(torch.stack([head.qkv.conv.bias for head in heads])[:, None])
        self.queries = nn.ModuleList(channels_last(head.query.conv) for head in heads)
        for parameter in self.queries.parameters():
            parameter *= self.widths[0] ** -0.5
        matrices = query_bias = None
        if self.window <= 4:
            matrices = torch.stack([convolution_matrices(head.query.conv, self.window) for head in heads])
            query_bias = torch.stack([head.query.conv.bias for head in heads])[:, :, None, None]
        self.register_buffer("matrices", matrices)
        self.register_buffer("query_bias", query_bias)
        self.register_buffer("positions", attention.table[:, attention.offsets])
        self.proj: Any = attention.proj.conv

    def forward(self, x: Tensor) -> Tensor:
        batch, length, dim = x.shape
        shares = x.reshape(-1, self.num_heads, dim // self.num_heads).transpose(0, 1)
        own = torch.baddbmm(self.bias, shares, self.weight).unbind(0)
        heads = zip(own, self.weight.unbind(0), self._queries(), self.positions.unbind(0), strict=True)
        outputs: list[Tensor] = []
        for qkv, weight, query, position in heads:
            if outputs:
                qkv = torch.addmm(qkv, outputs[-1].view(batch * length, -1), weight)
            q, k, v = qkv.view(batch, length, -1).split(self.widths, -1)
            outputs.append(_attended(query(q), k, v, position))
        return self.proj.rows(torch.cat(outputs, -1).relu_())

    def _queries(self) -> list[Callable[[Tensor], Tensor]]:
        """What each head does to its queries `(B, r^2, D)`."""
        if self.matrices is None:
            return [partial(_convolved, conv=conv, window=self.window) for conv in self.queries]
        pairs = zip(self.matrices.unbind(0), self.query_bias.unbind(0), strict=True)
        return [partial(_multiplied, matrices=matrices, bias=bias) for matrices, bias in pairs]


def _convolved(q: Tensor, conv: nn.Module, window: int) -> Tensor:
    return tokens(conv(as_map(q, window)))


def _multiplied(q: Tensor, matrices: Tensor, bias: Tensor) -> Tensor:
    return torch.baddbmm(bias, matrices, q.permute(2, 1, 0)).permute(2, 1, 0)


def _attended(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    if recorder() is not None:
        return attend(q[:, None], k[:, None], v[:, None], bias=bias, scale=1.0)[:, 0]
    return torch.bmm(torch.baddbmm(bias, q, k.transpose(1, 2)).softmax(-1), v)


class WindowAttention(nn.Module):
    """`x + attention(x)` inside windows of r x r tokens. A map that they do not fill is padded by zeros below
    and to the right, which are attended to."""

    def __init__(
        self,
        dim: int,
        num_heads: int,
        key_dim: int,
        kernels: Sequence[int],
        window: int,
        *,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__()
        self.cascade: Any = CascadedAttention(dim, num_heads, key_dim, kernels, window)
        self.window = window
        self.drop_path: nn.Module = DropPath(drop_path)

    def set_window(self, window: int) -> None:
        if window != self.window:
            if isinstance(self.cascade, FusedCascade):
                raise ConfigError("A fused copy keeps its windows: set the input size first, then fuse().")
            self.window = window
            self.cascade.set_window(window)

    def forward(self, x: Tensor) -> Tensor:
        y = self.cascade(to_windows(x, self.window))
        return x + self.drop_path(from_windows(y, x.shape, self.window))

    def fuse_(self) -> None:
        if isinstance(self.cascade, CascadedAttention):
            self.cascade = FusedCascade(self.cascade)
        self.drop_path = nn.Identity()


def tokens(x: Tensor) -> Tensor:
    """`(B, C, r, r)` to `(B, r^2, C)`."""
    return x.flatten(2).mT


def as_map(x: Tensor, window: int) -> Tensor:
    """`(B, r^2, C)` to `(B, C, r, r)`."""
    return x.reshape(x.shape[0], window, window, x.shape[2]).permute(0, 3, 1, 2)


def to_windows(x: Tensor, window: int) -> Tensor:
    """`(B, C, H, W)` to `(B n, r^2, C)`."""
    batch, dim, height, width = x.shape
    if height % window or width % window:
        x = F.pad(x, (0, -width % window, 0, -height % window))
    x = x.permute(0, 2, 3, 1).reshape(batch, -(-height // window), window, -(-width // window), window, dim)
    return x.transpose(2, 3).reshape(-1, window**2, dim)


def from_windows(x: Tensor, shape: Sequence[int], window: int) -> Tensor:
    """Undoes `to_windows` of a map of this shape."""
    batch, dim, height, width = shape
    rows, columns = -(-height // window), -(-width // window)
    x = x.view(batch, rows, columns, window, window, dim).transpose(2, 3)
    x = x.reshape(batch, rows * window, columns * window, dim)
    if height % window or width % window:
        x = x[:, :height, :width]
    return x.permute(0, 3, 1, 2)


def _frozen(x: Tensor) -> nn.Parameter:
    return nn.Parameter(x, requires_grad=False)


@torch.no_grad()
def convolution_matrices(conv: nn.Conv2d, window: int) -> Tensor:
    """`(C, r^2, r^2)`: what a convolution of each channel does to a window, by what it does to each token."""
    unit = torch.eye(window**2, device=conv.weight.device, dtype=conv.weight.dtype)
    unit = unit.view(-1, 1, window, window).expand(-1, conv.in_channels, -1, -1)
    return F.conv2d(unit, conv.weight, padding=conv.padding, groups=conv.groups).flatten(2).permute(1, 2, 0)


def distances(window: int) -> Tensor:
    """`(r^2, r^2)`: |dy| r + |dx| of each pair of tokens."""
    place = torch.arange(window)
    gap = (place[:, None] - place).abs()
    pairs = window * gap[:, None, :, None] + gap[None, :, None, :]  # (y, x, y', x')
    return pairs.flatten(2).flatten(0, 1)


def resized_table(table: Tensor, window: int) -> Tensor:
    """A table `(H, r^2)` of distances for windows of another size, bicubic."""
    side = round(table.shape[1] ** 0.5)
    grid = table.unflatten(1, (side, side))[None].float()
    grid = F.interpolate(grid, size=(window, window), mode="bicubic", align_corners=False)
    return grid[0].flatten(1).to(table.dtype)


# ---- network -----------------------------------------------------------------------------------------------


class Block(Parts):
    """The sandwich: attention between two halves of depthwise convolution and feed-forward (section 3.1)."""

    def __init__(
        self,
        dim: int,
        num_heads: int,
        key_dim: int,
        kernels: Sequence[int],
        window: int,
        drop_path: float,
    ) -> None:
        super().__init__()
        self.depthwise_1 = Depthwise(dim, drop_path=drop_path)
        self.ffn_1 = FFN(dim, drop_path=drop_path)
        self.attention = WindowAttention(dim, num_heads, key_dim, kernels, window, drop_path=drop_path)
        self.depthwise_2 = Depthwise(dim, drop_path=drop_path)
        self.ffn_2 = FFN(dim, drop_path=drop_path)


class NormLinear(nn.Module):
    """Batch norm and a linear layer."""

    norm: nn.Module

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(in_features)
        self.linear = nn.Linear(in_features, out_features)
        trunc_normal_(self.linear.weight, std=0.02)
        nn.init.zeros_(self.linear.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.norm(x))

    @torch.no_grad()
    def fuse_(self) -> None:
        if isinstance(self.norm, nn.BatchNorm1d):
            scale, shift = scale_and_shift(self.norm)
            self.linear.bias.add_(self.linear.weight @ shift)
            self.linear.weight.mul_(scale)
            self.norm = nn.Identity()


class DistilledHead(nn.Module):
    """Two heads: in training both logits, for the labels and for a teacher's; then their mean."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.label = NormLinear(in_features, out_features)
        self.teacher = NormLinear(in_features, out_features)

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        label, teacher = self.label(x), self.teacher(x)
        return (label, teacher) if self.training else (label + teacher) / 2


class EfficientViT(Backbone):
    """EfficientViT of Microsoft Research (not the one of MIT Han Lab): maps of strides 16, 32, 64.

    Any size of image is taken: where windows do not fill a map, and where a map is smaller than one window,
    zeros pad it. The backbones of the official detectors are `features_only=True, shrink_windows=False`, M0
    with `kernels=[7, 5, 3, 3]`.

    Args:
        dims: channels of each stage, divisible by its heads; the first by 8.
        depths: blocks of each stage.
        num_heads: heads of each stage.
        kernels: of the convolution of the queries, head i the i-th in every stage.
        key_dim: width of queries and keys; one, or one for each stage.
        window_size: r of each stage, or one for all.
        shrink_windows: no window is larger than its map at `img_size`, as in the official classifiers;
            `False`, as in the official detectors.
        distillation: a second head that learns from a teacher; training gives both logits.
    """

    first_conv = "stem.0.conv"
    classifier = "head.linear"
    cfg = {"license": "mit"}  # noqa: RUF012

    def __init__(
        self,
        dims: Sequence[int] = (64, 128, 192),
        depths: Sequence[int] = (1, 2, 3),
        num_heads: Sequence[int] = (4, 4, 4),
        kernels: Sequence[int] = (5, 5, 5, 5),
        *,
        key_dim: int | Sequence[int] = 16,
        window_size: int | Sequence[int] = 7,
        shrink_windows: bool = True,
        distillation: bool = False,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        count = len(dims)
        key_dims, sizes = _per_stage("key_dim", key_dim, count), _per_stage("window_size", window_size, count)
        _check(dims, depths, num_heads, kernels)
        self.window_sizes, self.shrink_windows, self.distillation = sizes, shrink_windows, distillation
        if distillation:
            self.pretrained_cfg["classifier"] = ("head.label.linear", "head.teacher.linear")
        rates = self.drop_path_rates(depths)
        windows = self._windows()
        self.stem = Stem(self.in_chans, dims[0])
        self.stages = nn.Sequential()
        for s, dim in enumerate(dims):
            merging = [ConvBlock(dims[s - 1]), PatchMerging(dims[s - 1], dim), ConvBlock(dim)] if s else []
            blocks = [Block(dim, num_heads[s], key_dims[s], kernels, windows[s], rate) for rate in rates[s]]
            self.stages.append(nn.Sequential(*merging, *blocks))
        self.min_size = 16
        self.finish(dims, [16 * 2**s for s in range(count)])

    def make_head(self, in_features: int, num_classes: int) -> nn.Module:
        return (DistilledHead if self.distillation else NormLinear)(in_features, num_classes)

    def get_classifier(self) -> nn.Module | tuple[nn.Module, nn.Module]:
        if isinstance(self.head, DistilledHead):
            return self.head.label.linear, self.head.teacher.linear
        return self.head.linear if isinstance(self.head, NormLinear) else self.head

    def set_input_size(self, img_size: int | Sequence[int]) -> None:
        """Images will have this size from now on; tables of windows that change with it are interpolated."""
        super().set_input_size(img_size)
        for stage, window in zip(self.stages, self._windows(), strict=False):
            for block in stage.children():
                if isinstance(block, Block):
                    block.attention.set_window(window)

    def _windows(self) -> list[int]:
        """The side of the windows of each stage, from the size that the model is meant for."""
        side = min(self.pretrained_cfg["input_size"][1:]) // 16
        windows = []
        for size in self.window_sizes:
            windows.append(max(1, min(size, side)) if self.shrink_windows else size)
            side = (side - 1) // 2 + 1
        return windows

    def no_weight_decay(self) -> set[str]:
        return {name for name, _ in self.named_parameters() if name.endswith(".table")}


def _per_stage(name: str, value: int | Sequence[int], count: int) -> list[int]:
    values = [value] * count if isinstance(value, int) else list(value)
    if len(values) != count or min(values) < 1:
        raise ConfigError(f"{name} is a positive number, or one for each of the {count} stages, not {value}.")
    return values


def _check(
    dims: Sequence[int], depths: Sequence[int], num_heads: Sequence[int], kernels: Sequence[int]
) -> None:
    if not len(dims) == len(depths) == len(num_heads) > 0:
        raise ConfigError(
            f"dims, depths and num_heads have one entry per stage, not {len(dims)}, {len(depths)} and "
            f"{len(num_heads)}."
        )
    for dim, heads in zip(dims, num_heads, strict=True):
        if heads < 1 or dim % heads:
            raise ConfigError(f"{dim} channels cannot be shared out evenly to {heads} heads.")
    if dims[0] % 8:
        raise ConfigError(f"The stem needs dims[0] divisible by 8, not {dims[0]}.")
    if len(kernels) < max(num_heads) or any(kernel % 2 == 0 for kernel in kernels):
        raise ConfigError(
            f"kernels are odd, and at least as many as heads ({max(num_heads)}), not {list(kernels)}."
        )


# ---- published variants ------------------------------------------------------------------------------------

PAPER = (
    "Liu et al., EfficientViT: Memory Efficient Vision Transformer with Cascaded Group Attention, CVPR 2023"
)
"""Of all variants."""

_register = partial(
    register_model,
    model=EfficientViT,
    paper=PAPER,
    licence="MIT",
    source="https://github.com/microsoft/Cream/tree/main/EfficientViT",
    status="official parity",
    official=EfficientViTOfficial,
    preprocessing={"size": 224, "crop_pct": 0.875, "resize": "bicubic", "scaling": "ImageNet mean and std"},
)


@_register(
    summary="EfficientViT-M0: 2.3 M parameters, 63.2 % top-1 on ImageNet-1k",
    weights=("efficientvit_m0_in1k", "efficientvit_m0_timm"),
)
def efficientvit_m0(
    *,
    dims: Sequence[int] = (64, 128, 192),
    depths: Sequence[int] = (1, 2, 3),
    num_heads: Sequence[int] = (4, 4, 4),
    kernels: Sequence[int] = (5, 5, 5, 5),
    **kwargs: Any,
) -> EfficientViT:
    return EfficientViT(dims, depths, num_heads, kernels, **kwargs)


@_register(
    summary="EfficientViT-M1: 3.0 M parameters, 68.4 % top-1 on ImageNet-1k",
    weights=("efficientvit_m1_in1k", "efficientvit_m1_timm"),
)
def efficientvit_m1(
    *,
    dims: Sequence[int] = (128, 144, 192),
    depths: Sequence[int] = (1, 2, 3),
    num_heads: Sequence[int] = (2, 3, 3),
    kernels: Sequence[int] = (7, 5, 3, 3),
    **kwargs: Any,
) -> EfficientViT:
    return EfficientViT(dims, depths, num_heads, kernels, **kwargs)


@_register(
    summary="EfficientViT-M2: 4.2 M parameters, 70.8 % top-1 on ImageNet-1k",
    weights=("efficientvit_m2_in1k", "efficientvit_m2_timm"),
)
def efficientvit_m2(
    *,
    dims: Sequence[int] = (128, 192, 224),
    depths: Sequence[int] = (1, 2, 3),
    num_heads: Sequence[int] = (4, 3, 2),
    kernels: Sequence[int] = (7, 5, 3, 3),
    **kwargs: Any,
) -> EfficientViT:
    return EfficientViT(dims, depths, num_heads, kernels, **kwargs)


@_register(
    summary="EfficientViT-M3: 6.9 M parameters, 73.4 % top-1 on ImageNet-1k",
    weights=("efficientvit_m3_in1k", "efficientvit_m3_timm"),
)
def efficientvit_m3(
    *,
    dims: Sequence[int] = (128, 240, 320),
    depths: Sequence[int] = (1, 2, 3),
    num_heads: Sequence[int] = (4, 3, 4),
    kernels: Sequence[int] = (5, 5, 5, 5),
    **kwargs: Any,
) -> EfficientViT:
    return EfficientViT(dims, depths, num_heads, kernels, **kwargs)


@_register(
    summary="EfficientViT-M4: 8.8 M parameters, 74.3 % top-1 on ImageNet-1k",
    weights=("efficientvit_m4_in1k", "efficientvit_m4_timm"),
)
def efficientvit_m4(
    *,
    dims: Sequence[int] = (128, 256, 384),
    depths: Sequence[int] = (1, 2, 3),
    num_heads: Sequence[int] = (4, 4, 4),
    kernels: Sequence[int] = (7, 5, 3, 3),
    **kwargs: Any,
) -> EfficientViT:
    return EfficientViT(dims, depths, num_heads, kernels, **kwargs)


@_register(
    summary="EfficientViT-M5: 12.4 M parameters, 77.1 % top-1 on ImageNet-1k",
    weights=("efficientvit_m5_in1k", "efficientvit_m5_timm"),
)
def efficientvit_m5(
    *,
    dims: Sequence[int] = (192, 288, 384),
    depths: Sequence[int] = (1, 3, 4),
    num_heads: Sequence[int] = (3, 3, 4),
    kernels: Sequence[int] = (7, 5, 3, 3),
    **kwargs: Any,
) -> EfficientViT:
    return EfficientViT(dims, depths, num_heads, kernels, **kwargs)
