"""The layers of DLGSANet: local attention by predicted filters, attention between channels, gated MLP.

Shapes: B images, H x W low-resolution pixels, C channels, G groups of channels. Maps are `(B, H, W, C)`;
convolutions see them as `(B, C, H, W)` in channels-last memory, without a copy.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.attention import attend
from zoo.attention.kernels import Kernel, softmax
from zoo.errors import ConfigError
from zoo.layers.dynamic_conv import predicted_conv

BAND = 16384
"""Pixels that pass through the wide part of a branch at once in inference on a CPU, to stay in its cache."""


def convolved(conv: nn.Conv2d, x: Tensor) -> Tensor:
    """A convolution of a map `(B, H, W, C)`."""
    return conv(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


def times(x: Tensor, factor: Tensor) -> Tensor:
    """`x * factor` in the dtype of `x`, in its place where no gradient is asked for."""
    return (x * factor).to(x.dtype) if torch.is_grad_enabled() else x.mul_(factor)


def in_bands(branch: Callable[[Tensor], Tensor], x: Tensor, halo: int) -> Tensor:
    """`branch(x)`, of bands of rows one after the other where no gradient is asked for.

    Args:
        branch: `(B, H, W, C) -> (B, H, W, D)`; a pixel depends on rows at most `halo` away.
    """
    height, width = x.shape[1:3]
    rows = max(1, BAND // width)
    whole = torch.is_grad_enabled() or torch.compiler.is_compiling() or x.device.type != "cpu"
    if whole or rows >= height:
        return branch(x)
    rows = -(-height // -(-height // rows))
    out = x.new_empty(0)
    for top in range(0, height, rows):
        first, stop = max(0, top - halo), min(height, top + rows)
        part = branch(x[:, first : stop + halo])[:, top - first : stop - first]
        if top == 0:
            out = part.new_empty(len(x), height, *part.shape[2:])
        out[:, top:stop] = part
    return out


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
        value = self.value(x)
        return self.proj(self._dynamic(x, value) if self.dynamic else convolved(self.conv, value))

    def _dynamic(self, x: Tensor, value: Tensor) -> Tensor:
        """Filters come from the values; both projections together are one matrix."""
        weight = self.squeeze.weight @ self.value.weight
        features = F.linear(x, weight, self.squeeze.bias).permute(0, 3, 1, 2)
        made = self.filters
        out = predicted_conv(
            value.permute(0, 3, 1, 2), self.spread(features), made.weight, made.bias, self.groups
        )
        return out.permute(0, 2, 3, 1)


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


class ChannelAttention(nn.Module):
    """SparseGSA (section 3.3): channels attend to the channels of their head, over all pixels.

    In evaluation with `tlc_kernel`, over the pixels of overlapping windows of about the size of training
    crops, whose results are averaged; in training always over the whole crop.

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

    def forward(self, x: Tensor, norm: nn.Module) -> Tensor:
        """`(B, H, W, C) -> (B, H, W, C)` of `norm(x)`."""
        qkv = in_bands(lambda part: convolved(self.qkv_conv, self.qkv(norm(part))), x, 1)
        qkv = qkv.unflatten(3, (3, self.num_heads, -1)).permute(3, 0, 4, 5, 1, 2)  # (3, B, heads, c, H, W)
        out = self._mixed(qkv) if self.training or self.tlc_kernel is None else self._in_windows(qkv)
        return self.proj(out.flatten(1, 2).permute(0, 2, 3, 1))

    def _in_windows(self, qkv: Tensor) -> Tensor:
        """The mean over the windows that cover a pixel."""
        assert self.tlc_kernel is not None
        height, width = qkv.shape[-2:]
        tall, wide = min(self.tlc_kernel, height), min(self.tlc_kernel, width)
        tops, lefts = tlc_windows(height, tall), tlc_windows(width, wide)
        if len(tops) == len(lefts) == 1:
            return self._mixed(qkv)
        total = qkv.new_zeros(qkv.shape[1:])
        for top in tops:
            for left in lefts:
                rows, columns = slice(top, top + tall), slice(left, left + wide)
                total[..., rows, columns] += self._mixed(qkv[..., rows, columns])
        return total / (_coverage(tops, tall, total, -2)[:, None] * _coverage(lefts, wide, total, -1))

    def _mixed(self, qkv: Tensor) -> Tensor:
        """`(3, B, heads, c, H, W) -> (B, heads, c, H, W)`"""
        q, k, v = qkv.contiguous().flatten(4)
        q, k = times(q, self.temperature / _length(q)), times(k, 1 / _length(k))
        out = attend(q, k, v, scale=1.0, kernel=self.kernel)
        return out.unflatten(3, qkv.shape[-2:])


def _length(rows: Tensor) -> Tensor:
    """At least 1e-12; that of half precision is added up in float32."""
    dtype = torch.promote_types(rows.dtype, torch.float32)
    return torch.linalg.vector_norm(rows, dim=-1, keepdim=True, dtype=dtype).clamp_min(1e-12)


def _coverage(starts: list[int], kernel: int, like: Tensor, axis: int) -> Tensor:
    """How many windows cover each place of an axis."""
    places = torch.arange(like.shape[axis], device=like.device)
    return sum(((places >= start) & (places < start + kernel)).to(like.dtype) for start in starts)  # pyright: ignore


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
        a, b = convolved(self.conv, self.fc1(x)).chunk(2, -1)
        return self.fc2(times(F.gelu(a), b))


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

    def forward(self, x: Tensor) -> Tensor:
        """`(B, H, W, C) -> (B, H, W, C)`"""
        if isinstance(self.mixer, ChannelAttention):
            x = x + self.mixer(x, self.norm1)
        else:
            x = x + self.mixer(self.norm1(x))
        return in_bands(lambda part: part + self.mlp(self.norm2(part)), x, self.mlp.halo)


def softmax_or(activation: str | None) -> Kernel:
    """The kernel of attention between channels: softmax without an activation."""
    if activation is None:
        return softmax
    if activation not in ACTIVATIONS:
        raise ConfigError(f"There is no activation {activation!r}. Activations: {', '.join(ACTIVATIONS)}.")
    return Activated(activation)
