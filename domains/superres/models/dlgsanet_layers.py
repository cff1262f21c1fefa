"""The layers of DLGSANet: local attention by predicted filters, attention between channels, gated MLP.

Shapes: B images, H x W low-resolution pixels, C channels, G groups of channels. Maps are `(B, H, W, C)`;
convolutions see them as `(B, C, H, W)` in channels-last memory, without a copy.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from domains.superres.models.place import Place
from zoo.attention import attend
from zoo.attention.kernels import Kernel, softmax, wide
from zoo.errors import ConfigError
from zoo.layers.dynamic_conv import predicted_conv
from zoo.layers.linear import matrix

TILE = (64, 64)
"""Rows and columns that pass through the wide part of a branch at once in inference on a CPU, to stay in its
cache."""


def convolved(conv: nn.Conv2d, x: Tensor) -> Tensor:
    """A convolution of a map `(B, H, W, C)`."""
    return conv(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


def times(x: Tensor, factor: Tensor) -> Tensor:
    """`x * factor` in the dtype of `x`, in its place where no gradient is asked for."""
    return (x * factor).to(x.dtype) if torch.is_grad_enabled() else x.mul_(factor)


def in_tiles(branch: Callable[[Tensor], Tensor], x: Tensor, halo: int) -> Tensor:
    """`branch(x)`, of tiles one after the other where no gradient is asked for.

    Args:
        branch: `(B, H, W, C) -> (B, H, W, D)`; a pixel depends on rows and columns at most `halo` away.
    """
    height, width = x.shape[1:3]
    whole = torch.is_grad_enabled() or torch.compiler.is_compiling() or x.device.type != "cpu"
    if whole or (height <= TILE[0] and width <= TILE[1]):
        return branch(x)
    out = x.new_empty(0)
    for top, bottom in _parts(height, TILE[0]):
        for left, right in _parts(width, TILE[1]):
            above, before = max(0, top - halo), max(0, left - halo)
            part = branch(x[:, above : bottom + halo, before : right + halo])
            if top == left == 0:
                out = part.new_empty(*x.shape[:3], part.shape[3])
            inner = part[:, top - above :, left - before :]
            out[:, top:bottom, left:right] = inner[:, : bottom - top, : right - left]
    return out


def _parts(size: int, most: int) -> list[tuple[int, int]]:
    """Starts and stops of parts of about the same size, at most `most`."""
    count = -(-size // most)
    return list(pairwise(round(i * size / count) for i in range(count + 1)))


# ---- local attention ---------------------------------------------------------------------------------------


class LocalAttention(nn.Module):
    """MHDLSA (section 3.2): each pixel weighs its window by filters that are predicted from its features.

    Args:
        dim: C.
        kernel_size: side of the window, odd.
        group_channels: channels that share a filter; there are `C // group_channels` groups.
        dynamic: without it, a depth-wise convolution (an ablation of the paper).
    """

    def __init__(self, dim: int, kernel_size: int, group_channels: int, dynamic: bool) -> None:
        super().__init__()
        self.groups = max(1, dim // group_channels)
        if kernel_size < 1 or kernel_size % 2 == 0:
            raise ConfigError(f"Windows have an odd side, not {kernel_size}.")
        if dynamic and (dim < 4 or dim < group_channels or dim % self.groups):
            raise ConfigError(
                f"dim={dim} cannot be shared out evenly to groups of about {group_channels} channels."
            )
        self.value = nn.Linear(dim, dim, bias=False)
        if dynamic:
            reduced = dim // 4
            self.squeeze = nn.Linear(dim, reduced)
            self.spread = nn.Conv2d(reduced, reduced, kernel_size, padding=kernel_size // 2, groups=reduced)
            self.filters = nn.Linear(reduced, self.groups * kernel_size**2)
        else:
            self.conv = nn.Conv2d(dim, dim, kernel_size, padding=kernel_size // 2, groups=dim)
        self.dynamic = dynamic
        self.proj = nn.Linear(dim, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        if not self.dynamic:
            return self.proj(convolved(self.conv, self.value(x)))
        return self.proj(self._dynamic(x).permute(0, 2, 3, 1))

    def _dynamic(self, x: Tensor) -> Tensor:
        """`(B, H, W, C) -> (B, C, H, W)`; filters come from the values: both projections are one matrix."""
        weight, bias = matrix(self.value), self.squeeze.bias
        both = torch.cat([weight, matrix(self.squeeze) @ weight])
        made = torch.matmul(both.expand(len(x), -1, -1), x.flatten(1, 2).mT).unflatten(2, x.shape[1:3])
        value, features = made.split([len(weight), len(bias)], 1)
        features = self.spread(features + bias[:, None, None].to(features.dtype))
        return predicted_conv(value, features, matrix(self.filters), self.filters.bias, self.groups)


# ---- attention between channels ----------------------------------------------------------------------------


class Activated:
    """An activation of the scores in the place of softmax (section 3.3); ReLU leaves a sparse matrix."""

    def __init__(self, name: str) -> None:
        self.name, self.function = name, ACTIVATIONS[name]

    def __call__(self, scores: Tensor) -> tuple[Tensor, Tensor]:
        return self.function(scores), scores.logsumexp(-1)

    def __repr__(self) -> str:
        return f"Activated({self.name!r})"


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": torch.relu,
    "gelu": F.gelu,
    "sigmoid": torch.sigmoid,
    "identity": lambda scores: scores,
}


def tlc_windows(size: int, kernel: int) -> list[int]:
    """Where windows of `min(kernel, size)` pixels start along an axis (TLC, Chu et al. 2022)."""
    kernel = min(kernel, size)
    count = (size - 1) // kernel + 1
    step = kernel if count == 1 else math.ceil((size - kernel) / (count - 1) - 1e-8)
    starts = list(range(0, size - kernel, step))
    return [*starts, size - kernel]


class Axis(NamedTuple):
    """An axis of the map, cut into cells by the borders of its windows."""

    cells: list[slice]
    seen: Tensor
    """`(windows, cells)`, 1 where the window takes its weights from the cell, else 0."""
    inside: Tensor
    """`(windows, cells)`, 1 where these weights hold for the cell: where it is seen, in a whole picture."""


def tlc_axis(size: int, kernel: int, like: Tensor, origin: int = 0, whole: int | None = None) -> Axis:
    """The cells of the windows of `min(kernel, size)` pixels.

    Of a part of `size` pixels of a longer axis, those of the windows that reach into it; one that leaves it
    holds for what lies inside, and takes its weights from as many pixels of the part as there are.

    Args:
        origin: first pixel of the part.
        whole: length of the axis; None: `size`.
    """
    whole = whole or size
    kernel = min(kernel, whole)
    starts = [start - origin for start in tlc_windows(whole, kernel)]
    starts = [start for start in starts if -kernel < start < size]
    inside = [(max(start, 0), min(start + kernel, size)) for start in starts]
    moved = [max(min(start, size - kernel), 0) for start in starts]
    seen = [(start, min(start + kernel, size)) for start in moved]
    borders = sorted({border for pair in (*inside, *seen) for border in pair})
    cells = [slice(*pair) for pair in pairwise(borders)]
    return Axis(cells, _covered(cells, seen, like), _covered(cells, inside, like))


def _covered(cells: list[slice], windows: list[tuple[int, int]], like: Tensor) -> Tensor:
    """`(windows, cells)`, 1 where a cell lies in a window."""
    return like.new_tensor([[start <= c.start and c.stop <= stop for c in cells] for start, stop in windows])


class ChannelAttention(nn.Module):
    """SparseGSA (section 3.3): channels attend to the channels of their head, over all pixels.

    In evaluation with `tlc_kernel`, over the pixels of overlapping windows of about the size of training
    crops, whose results are averaged; in training always over the whole crop.

    Queries and keys are needed only for their products over all pixels of a window. These are made once for
    each cell between the borders of windows, and added up to windows; and weights averaged over the windows
    of a cell are one matrix together with the last projection.

    Args:
        dim: C.
        num_heads: heads, each with a temperature of its own.
        kernel: how scores become weights.
        tlc_kernel: side of the windows; None = none.
    """

    def __init__(self, dim: int, num_heads: int, kernel: Kernel, tlc_kernel: int | None) -> None:
        super().__init__()
        if num_heads < 1 or dim % num_heads:
            raise ConfigError(f"dim={dim} is not divisible by num_heads={num_heads}.")
        if tlc_kernel is not None and tlc_kernel < 1:
            raise ConfigError(f"tlc_kernel is the side of a window in pixels, not {tlc_kernel}.")
        self.num_heads, self.kernel, self.tlc_kernel = num_heads, kernel, tlc_kernel
        self.temperature = nn.Parameter(torch.ones(num_heads, 1, 1))
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.qkv_conv = nn.Conv2d(3 * dim, 3 * dim, 3, padding=1, groups=3 * dim, bias=False)
        self.proj = nn.Linear(dim, dim, bias=False)

    def forward(self, x: Tensor, norm: nn.Module, place: Place | None = None) -> Tensor:
        """`(B, H, W, C) -> (B, H, W, C)` of `norm(x)`; of a tile, with the windows of the picture."""
        qkv = in_tiles(lambda part: convolved(self.qkv_conv, self.qkv(norm(part))), x, 1)
        kernel = None if self.training else self.tlc_kernel
        place = place or Place(0, 0, *x.shape[1:3])
        spans = zip(x.shape[1:3], place[:2], place[2:], strict=True)
        rows, columns = (tlc_axis(n, kernel or n, wide(qkv[:0]), *span) for n, *span in spans)
        with torch.autocast(x.device.type, enabled=False):
            products = _products(qkv, rows.cells, columns.cells)
            matrices = self._matrices(products, rows, columns)
        return _applied(matrices.to(qkv.dtype), qkv, rows.cells, columns.cells)

    def _matrices(self, products: Tensor, rows: Axis, columns: Axis) -> Tensor:
        """Attention and last projection of each cell: `(R, S, B, C, C + 2) -> (R, S, B, C in, C out)`.

        Args:
            products: of queries and keys, as from `_products`.
            rows, columns: which windows see which cells, and hold for which.
        """
        products = _over(products, rows.seen, columns.seen)
        weights = self._weights(products.flatten(0, 2)).unflatten(0, products.shape[:3])
        weights = _over(weights, *((axis.inside / axis.inside.sum(0)).T for axis in (rows, columns)))
        proj = matrix(self.proj).to(weights.dtype).unflatten(1, (self.num_heads, -1))
        return torch.einsum("ohi,rsbhij->rsbhjo", proj, weights).flatten(3, 4)

    def _weights(self, products: Tensor) -> Tensor:
        """`(n, C, C + 2)` of windows to weights `(n, heads, c, c)`.

        What is attended to are unit vectors, so that the result is the weights themselves.
        """
        by_head = products.unflatten(1, (self.num_heads, -1))  # (n, heads, c, C + 2)
        own = by_head[..., :-2].unflatten(3, (self.num_heads, -1)).diagonal(dim1=1, dim2=3)
        lengths = by_head[..., -2:].clamp_min(1e-24).sqrt()
        scores = own.permute(0, 3, 1, 2) * (self.temperature / lengths[..., :1]) / lengths[..., 1:].mT
        unit = torch.eye(scores.shape[-1], dtype=scores.dtype, device=scores.device).expand(scores.shape)
        return attend(scores, unit, unit, scale=1.0, kernel=self.kernel)


def _products(qkv: Tensor, rows: list[slice], columns: list[slice]) -> Tensor:
    """Sums over the pixels of each of R x S cells, half precision in float32: `(R, S, B, C, C + 2)`.

    They are products of queries with keys, and the squares of each query and of each key channel.
    """
    dim = qkv.shape[3] // 3
    sums = []
    for row in rows:
        for column in columns:
            cell = wide(qkv[:, row, column, : 2 * dim].flatten(1, 2))
            squares = cell.square().sum(1).unflatten(1, (2, dim)).mT
            sums.append(torch.cat([cell[..., :dim].mT @ cell[..., dim:], squares], 2))
    return torch.stack(sums).unflatten(0, (len(rows), len(columns)))


def _over(x: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """`(R, S, ...) -> (T, U, ...)`: sums by `rows` `(T, R)` and `columns` `(U, S)`."""
    over_rows = (rows @ x.flatten(1)).view(len(rows), x.shape[1], -1)
    return (columns @ over_rows).view(len(rows), len(columns), *x.shape[2:])


def _applied(matrices: Tensor, qkv: Tensor, rows: list[slice], columns: list[slice]) -> Tensor:
    """The values `(B, H, W, C)` of each cell times its matrix."""
    v = qkv[..., 2 * matrices.shape[3] :]
    out = torch.empty_like(v, memory_format=torch.contiguous_format)
    for row, line in zip(rows, matrices, strict=True):
        for column, combined in zip(columns, line, strict=True):
            cell = v[:, row, column]
            out[:, row, column] = (cell.flatten(1, 2) @ combined).unflatten(1, cell.shape[1:3])
    return out


# ---- feed-forward ------------------------------------------------------------------------------------------


class GatedMLP(nn.Module):
    """GDFN (Zamir et al. 2022): `W2 (GELU(a) * b)`, (a, b) a depth-wise convolution of `W1 x`."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, 2 * hidden, bias=False)
        self.conv = nn.Conv2d(2 * hidden, 2 * hidden, 3, padding=1, groups=2 * hidden, bias=False)
        self.fc2 = nn.Linear(hidden, dim, bias=False)

    halo = 1

    def forward(self, x: Tensor) -> Tensor:
        halves = zip(matrix(self.fc1).chunk(2), self.conv.weight.chunk(2), strict=True)
        a, b = (_depthwise(F.linear(x, linear), conv) for linear, conv in halves)
        return self.fc2(times(F.gelu(a), b))


def _depthwise(x: Tensor, weight: Tensor) -> Tensor:
    """3 x 3, of a map `(B, H, W, C)`."""
    return F.conv2d(x.permute(0, 3, 1, 2), weight, padding=1, groups=len(weight)).permute(0, 2, 3, 1)


class MLP(nn.Module):
    """`W2 GELU(W1 x + b1) + b2`."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)

    halo = 0

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


MLPS: dict[str, type[GatedMLP] | type[MLP]] = {"gated": GatedMLP, "plain": MLP}


def create_mlp(name: str, dim: int, ratio: float) -> GatedMLP | MLP:
    """`gated` or `plain`, `int(dim * ratio)` wide."""
    if name not in MLPS:
        raise ConfigError(f"There is no MLP {name!r}. MLPs: {', '.join(MLPS)}.")
    hidden = int(dim * ratio)
    if hidden < 1:
        raise ConfigError(f"An MLP of ratio {ratio} on {dim} channels has no hidden channel.")
    return MLPS[name](dim, hidden)


# ---- layers ------------------------------------------------------------------------------------------------


class Layer(nn.Module):
    """`x + mixer(norm(x))`, then `x + mlp(norm(x))`."""

    def __init__(self, dim: int, mixer: LocalAttention | ChannelAttention, mlp: GatedMLP | MLP) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.mixer, self.mlp = mixer, mlp

    @property
    def is_local(self) -> bool:
        return isinstance(self.mixer, LocalAttention)

    def forward(self, x: Tensor, place: Place | None = None) -> Tensor:
        """`(B, H, W, C) -> (B, H, W, C)`"""
        if isinstance(self.mixer, ChannelAttention):
            x = x + self.mixer(x, self.norm1, place)
        else:
            x = x + self.mixer(self.norm1(x))
        return in_tiles(lambda part: part + self.mlp(self.norm2(part)), x, self.mlp.halo)


def softmax_or(activation: str | None) -> Kernel:
    """The kernel of attention between channels: softmax without an activation."""
    if activation is None:
        return softmax
    if activation not in ACTIVATIONS:
        raise ConfigError(f"There is no activation {activation!r}. Activations: {', '.join(ACTIVATIONS)}.")
    return Activated(activation)
