"""Linear attention whose weights differ for different queries."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.attention.errors import AttentionError
from zoo.attention.layers.base import AttentionLayer, Inputs, Supports, head_width
from zoo.attention.layers.multihead import split_heads
from zoo.attention.maps import axes_of, rows_and_columns

FEATURES: dict[str, Callable[[Tensor], Tensor]] = {
    "identity": lambda x: x,
    "relu": F.relu,
    "leaky_relu": F.leaky_relu,
    "exp": torch.exp,
}


def injective(q: Tensor, k: Tensor, v: Tensor, real: Tensor | None = None) -> Tensor:
    """`sum_j w_ij v_j`, `w_ij = s q_i . k_j / N - s q_i . mean(k) / N + 1 / N` (Han et al. 2024, InLine,
    equation 5), with `s = D^-0.5`, which is `mean(v) + s q_i cov(k, v)`.

    Weights sum to one by subtraction, not by division: no two queries that differ have equal weights.

    Args:
        q: `(B, H, N, D)`.
        k, v: `(B, H, M, D)`.
        real: 1 for keys that count and 0 for others, `(B, 1, M, 1)`.

    Returns:
        `(B, H, N, D)`.
    """
    if real is None:
        share = k.shape[2] ** -0.5  # of both factors: sums over many keys stay in the range of half precision
        mean = v.mean(2, keepdim=True)
        covariance = (k * share).mT @ ((v - mean) * share)
    else:
        count = real.sum(2, keepdim=True).clamp(min=1)
        mean = ((v * real).sum(2, keepdim=True) / count).to(v.dtype)
        share = real * count.rsqrt()
        covariance = (k * share).to(k.dtype).mT @ ((v - mean) * share).to(v.dtype)
    return mean + q @ (covariance * q.shape[-1] ** -0.5)


class InjectiveLinear(AttentionLayer, name="injective"):
    """Injective linear attention with a local residual (Han et al. 2024, InLine, equations 5 and 8).

    The residual is a depthwise convolution of the values over the 3 nearest tokens along each axis. Its
    kernel is predicted for each image from the mean token, head by head. Weights by their official names, but
    for one matrix of queries, keys and values. Padded tokens are zeros to the convolution, as the border is.

    Args:
        dim: C.
        num_heads: H.
        shape: tokens along each of the 1 or 2 axes; by default one axis of any length.
        features: what is applied to queries and keys.
        class_token: the first token lies outside of the map; the convolution leaves it out.
        qkv_bias, out_bias: biases of the projections.
    """

    supports = Supports(bidirectional=True, padding=True, maps=False)
    paper = "https://arxiv.org/abs/2412.06590"

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        shape: Sequence[int] | None = None,
        features: Literal["identity", "relu", "leaky_relu", "exp"] = "identity",
        class_token: bool = False,
        qkv_bias: bool = True,
        out_bias: bool = True,
    ) -> None:
        super().__init__()
        head_width(dim, num_heads)
        if features not in FEATURES:
            raise AttentionError(f"features are one of {', '.join(FEATURES)}, not {features!r}")
        self.shape = None if shape is None else tuple(shape)
        self.dim, self.num_heads, self.class_token = dim, num_heads, class_token
        self.features = features
        self.kernel = (1, 3) if axes_of(shape) == 1 else (3, 3)
        taps = self.kernel[0] * self.kernel[1]
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim, bias=out_bias)
        self.residual = nn.Sequential(
            nn.Conv1d(dim, dim, 1, groups=num_heads),
            nn.GELU(),
            nn.Conv1d(dim, taps * dim, 1, groups=num_heads),
        )

    def mix(self, given: Inputs) -> Tensor:
        x, mask = given.x, given.mask
        first = int(self.class_token)
        shape = rows_and_columns(self.shape, x.shape[1] - first)
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        feature = FEATURES[self.features]
        heads = [split_heads(rows, self.num_heads) for rows in (feature(q), feature(k), v)]
        if mask is None:
            out, mean = injective(*heads), x.mean(1)
        else:
            real = mask[:, :, None].to(torch.promote_types(v.dtype, torch.float32))
            out = injective(*heads, real=real[:, None])
            mean = ((x * real).sum(1) / real.sum(1).clamp(min=1)).to(x.dtype)
            v = v * real.to(v.dtype)
        local = self._convolved(v[:, first:].unflatten(1, shape), mean)
        return self.proj(out.transpose(1, 2).flatten(2) + F.pad(local, (0, 0, first, 0)))

    def _convolved(self, v: Tensor, mean: Tensor) -> Tensor:
        """Values `(B, H, W, C)` convolved by the kernels that mean tokens `(B, C)` predict, `(B, H W, C)`."""
        batch, height, width, dim = v.shape
        taps = self.residual(mean[:, :, None]).view(batch, dim, *self.kernel)
        if torch.compiler.is_exporting():  # the number of groups would be the batch's, which stays open
            return _convolved_by_shifts(v, taps).flatten(1, 2)
        maps = v.permute(0, 3, 1, 2).reshape(1, batch * dim, height, width)
        padding = (self.kernel[0] // 2, 1)
        out = F.conv2d(maps, taps.flatten(0, 1)[:, None], padding=padding, groups=batch * dim)
        return out.view(batch, dim, height * width).mT


def _convolved_by_shifts(v: Tensor, taps: Tensor) -> Tensor:
    """Depthwise convolution of `(B, H, W, C)` by `(B, C, kh, kw)`, zeros around, tap by tap."""
    height, width = v.shape[1:3]
    rows, columns = taps.shape[2:]
    v = F.pad(v, (0, 0, columns // 2, columns // 2, rows // 2, rows // 2))
    parts = (
        v[:, i : i + height, j : j + width] * taps[:, None, None, :, i, j]
        for i in range(rows)
        for j in range(columns)
    )
    return torch.stack(list(parts)).sum(0)
