"""EfficientViT (Liu et al., CVPR 2023) in the plain layout: the peer of `zoo bench suite=vision`.

The same function as `domains.vision.models.efficientvit`, laid out as the paper reads: contiguous NCHW maps,
every 1x1 convolution a convolution, one call for each head's projection, convolution, scores and output, and
explicit softmax. Parameters have the official names, so that official weights load as they are.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class ConvBN(nn.Module):
    """Convolution without bias, and batch norm."""

    def __init__(self, inputs: int, outputs: int, kernel: int = 1, stride: int = 1, groups: int = 1) -> None:
        super().__init__()
        self.c = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False)
        self.bn = nn.BatchNorm2d(outputs)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.c(x))


class Residual(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.m = inner

    def forward(self, x: Tensor) -> Tensor:
        return x + self.m(x)


class FFN(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.pw1, self.pw2 = ConvBN(dim, 2 * dim), ConvBN(2 * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.pw2(F.relu(self.pw1(x)))


def depthwise(dim: int) -> Residual:
    return Residual(ConvBN(dim, dim, 3, groups=dim))


class SqueezeExcite(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        hidden = max(8, (dim // 4 + 4) // 8 * 8)
        self.fc1, self.fc2 = nn.Conv2d(dim, hidden, 1), nn.Conv2d(hidden, dim, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.fc2(F.relu(self.fc1(x.mean((2, 3), keepdim=True)))).sigmoid()


class PatchMerging(nn.Module):
    def __init__(self, dim: int, outputs: int) -> None:
        super().__init__()
        self.conv1, self.conv2 = ConvBN(dim, 4 * dim), ConvBN(4 * dim, 4 * dim, 3, 2, 4 * dim)
        self.se = SqueezeExcite(4 * dim)
        self.conv3 = ConvBN(4 * dim, outputs)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv3(self.se(F.relu(self.conv2(F.relu(self.conv1(x))))))


class CascadedAttention(nn.Module):
    """Of one window `(B, C, r, r)`."""

    attention_bias_idxs: Tensor

    def __init__(self, dim: int, heads: int, key_dim: int, kernels: Sequence[int], side: int) -> None:
        super().__init__()
        share = dim // heads
        self.key_dim = key_dim
        self.qkvs = nn.ModuleList(ConvBN(share, 2 * key_dim + share) for _ in range(heads))
        self.dws = nn.ModuleList(ConvBN(key_dim, key_dim, k, groups=key_dim) for k in kernels[:heads])
        self.proj = nn.Sequential(nn.ReLU(), ConvBN(dim, dim))
        self.attention_biases = nn.Parameter(torch.zeros(heads, side**2))
        y, x = torch.arange(side**2).div(side, rounding_mode="floor"), torch.arange(side**2) % side
        offsets = (y[:, None] - y).abs() * side + (x[:, None] - x).abs()
        self.register_buffer("attention_bias_idxs", offsets)

    def forward(self, x: Tensor) -> Tensor:
        outputs: list[Tensor] = []
        for i, share in enumerate(x.chunk(len(self.qkvs), 1)):
            share = share + outputs[-1] if outputs else share
            q, k, v = self.qkvs[i](share).split([self.key_dim, self.key_dim, share.shape[1]], 1)
            q = self.dws[i](q)
            scores = q.flatten(2).mT @ k.flatten(2) * self.key_dim**-0.5
            weights = (scores + self.attention_biases[i][self.attention_bias_idxs]).softmax(-1)
            outputs.append((v.flatten(2) @ weights.mT).view_as(share))
        return self.proj(torch.cat(outputs, 1))


class Windows(nn.Module):
    def __init__(self, dim: int, heads: int, key_dim: int, kernels: Sequence[int], side: int) -> None:
        super().__init__()
        self.attn, self.side = CascadedAttention(dim, heads, key_dim, kernels, side), side

    def forward(self, x: Tensor) -> Tensor:
        batch, dim, height, width = x.shape
        r = self.side
        if (height, width) == (r, r):
            return self.attn(x)
        x = F.pad(x, (0, -width % r, 0, -height % r))
        rows, columns = x.shape[2] // r, x.shape[3] // r
        x = x.view(batch, dim, rows, r, columns, r).permute(0, 2, 4, 1, 3, 5).reshape(-1, dim, r, r)
        x = self.attn(x).view(batch, rows, columns, dim, r, r).permute(0, 3, 1, 4, 2, 5)
        return x.reshape(batch, dim, rows * r, columns * r)[:, :, :height, :width]


class Block(nn.Module):
    def __init__(self, dim: int, heads: int, key_dim: int, kernels: Sequence[int], side: int) -> None:
        super().__init__()
        self.dw0, self.ffn0 = depthwise(dim), Residual(FFN(dim))
        self.mixer = Residual(Windows(dim, heads, key_dim, kernels, side))
        self.dw1, self.ffn1 = depthwise(dim), Residual(FFN(dim))

    def forward(self, x: Tensor) -> Tensor:
        return self.ffn1(self.dw1(self.mixer(self.ffn0(self.dw0(x)))))


class Head(nn.Module):
    def __init__(self, dim: int, classes: int) -> None:
        super().__init__()
        self.bn, self.l = nn.BatchNorm1d(dim), nn.Linear(dim, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.l(self.bn(x))


class PlainEfficientViT(nn.Module):
    """The whole classifier, M0 by default; `windows` are their sides, which follow the size of the images."""

    def __init__(
        self,
        dims: Sequence[int] = (64, 128, 192),
        depths: Sequence[int] = (1, 2, 3),
        num_heads: Sequence[int] = (4, 4, 4),
        kernels: Sequence[int] = (5, 5, 5, 5),
        *,
        windows: Sequence[int] = (7, 7, 4),
        key_dim: int = 16,
        num_classes: int = 1000,
    ) -> None:
        super().__init__()
        widths = [3, dims[0] // 8, dims[0] // 4, dims[0] // 2, dims[0]]
        stem: list[nn.Module] = []
        for i in range(4):
            stem += [ConvBN(widths[i], widths[i + 1], 3, 2), nn.ReLU()]
        self.patch_embed = nn.Sequential(*stem[:-1])
        for s, dim in enumerate(dims):
            parts: list[nn.Module] = []
            if s:
                before = dims[s - 1]
                parts.append(nn.Sequential(depthwise(before), Residual(FFN(before))))
                parts.append(PatchMerging(before, dim))
                parts.append(nn.Sequential(depthwise(dim), Residual(FFN(dim))))
            parts += [Block(dim, num_heads[s], key_dim, kernels, windows[s]) for _ in range(depths[s])]
            self.add_module(f"blocks{s + 1}", nn.Sequential(*parts))
        self.head = Head(dims[-1], num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Images `(B, 3, H, W)` to logits."""
        *stages, head = self.children()
        for stage in stages:
            x = stage(x)
        return head(x.mean((2, 3)))

    def load_official(self, state: dict[str, Tensor]) -> None:
        """Copy weights under the official names."""
        self.load_state_dict(state)
