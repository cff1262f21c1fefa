"""What EfficientViT is made of: convolutions, and cascaded attention in windows, each with its fused form.

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
from torch import Tensor, nn

from zoo.attention import attend
from zoo.attention.capture import recorder
from zoo.attention.layers.cascaded import cascade
from zoo.errors import ConfigError
from zoo.layers.conv import ConvNorm

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
