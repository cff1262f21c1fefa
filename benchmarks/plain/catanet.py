"""CATANet (CVPR 2025) in the plain layout: the peer of `zoo bench suite=superres`.

The same function as `domains.superres.models.catanet`, laid out as it is described: maps are
`(B, C, H, W)` between modules, every patch is normalised and projected for itself, queries, keys and values
have linears of their own and 9 or 10 channels per head, keys of groups are unfolded, tokens go back to their
places by scatter, and all patches of a map are attended to at once. Parameters carry the official names, so
an official state dict loads as it is. Sides are not shorter than the largest patch; evaluation, and training
from centres that are set.

Shapes: B batch, C channels, N tokens, h heads, M token centres, p x p patches.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def tokens(x: Tensor) -> Tensor:
    """`(B, C, H, W)` to `(B, N, C)`."""
    return x.flatten(2).transpose(1, 2)


def heads(x: Tensor, num_heads: int) -> Tensor:
    """`(..., N, C)` to `(..., h, N, C / h)`."""
    return x.unflatten(-1, (num_heads, -1)).transpose(-2, -3)


def merged(x: Tensor) -> Tensor:
    """The inverse of `heads`."""
    return x.transpose(-2, -3).flatten(-2)


class DepthwiseConv(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        conv = nn.Conv2d(dim, dim, 5, padding=2, groups=dim)
        self.depthwise_conv = nn.Sequential(conv, nn.GELU())

    def forward(self, x: Tensor, height: int, width: int) -> Tensor:
        maps = x.transpose(1, 2).contiguous().view(len(x), -1, height, width)
        return tokens(self.depthwise_conv(maps)).contiguous()


class ConvFFN(nn.Module):
    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1, self.act = nn.Linear(dim, hidden), nn.GELU()
        self.dwconv = DepthwiseConv(hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor, height: int, width: int) -> Tensor:
        x = self.act(self.fc1(x))
        return self.fc2(x + self.dwconv(x, height, width))


class PreNorm(nn.Module):
    def __init__(self, dim: int, fn: nn.Module) -> None:
        super().__init__()
        self.norm, self.fn = nn.LayerNorm(dim), fn

    def forward(self, x: Tensor, *args: int) -> Tensor:
        return self.fn(self.norm(x), *args)


class Attention(nn.Module):
    def __init__(self, dim: int, num_heads: int, qk_dim: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.to_q = nn.Linear(dim, qk_dim, bias=False)
        self.to_k = nn.Linear(dim, qk_dim, bias=False)
        self.to_v = nn.Linear(dim, dim, bias=False)
        self.proj = nn.Linear(dim, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (heads(linear(x), self.num_heads) for linear in (self.to_q, self.to_k, self.to_v))
        return self.proj(merged(F.scaled_dot_product_attention(q, k, v)))


class LocalBlock(nn.Module):
    """Overlapping patches with attention, then the ConvFFN on the map."""

    def __init__(self, dim: int, num_heads: int, qk_dim: int, mlp_dim: int, patch: int) -> None:
        super().__init__()
        self.patch = patch
        attention = PreNorm(dim, Attention(dim, num_heads, qk_dim))
        self.layer = nn.ModuleList([attention, PreNorm(dim, ConvFFN(dim, mlp_dim))])

    def forward(self, x: Tensor) -> Tensor:
        batch, dim, height, width = x.shape
        p, attention, mlp = self.patch, self.layer[0], self.layer[1]
        rows, columns = self.starts(height), self.starts(width)
        crops = torch.stack([x[:, :, i : i + p, j : j + p] for i in rows for j in columns], 1)
        crops = crops.flatten(0, 1).flatten(2).transpose(1, 2)
        crops = attention(crops) + crops
        crops = crops.transpose(1, 2).reshape(batch, len(rows), len(columns), dim, p, p)
        out = torch.zeros_like(x)
        for r, i in enumerate(rows):
            for c, j in enumerate(columns):
                out[:, :, i : i + p, j : j + p] += crops[:, r, c]
        for before, i in pairwise(rows):
            out[:, :, i : before + p] /= 2
        for before, j in pairwise(columns):
            out[:, :, :, j : before + p] /= 2
        out = tokens(out)
        out = mlp(out, height, width) + out
        return out.transpose(1, 2).reshape(x.shape)

    def starts(self, length: int) -> list[int]:
        p = self.patch
        return [min(i, length - p) for i in range(0, length - 2, p - 2)]


class CentreKeys(nn.Module):
    def __init__(self, dim: int, num_heads: int, qk_dim: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.to_k, self.to_v = nn.Linear(dim, qk_dim, bias=False), nn.Linear(dim, dim, bias=False)

    def forward(self, centres: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values `(h, M, d)` of centres `(M, C)`."""
        return heads(self.to_k(centres), self.num_heads), heads(self.to_v(centres), self.num_heads)

    def assigned(self, x: Tensor, centres: Tensor, n_iter: int) -> tuple[Tensor, Tensor]:
        """Centres, in training refined, and the nearest one `(B, N)` to each token of `(B, N, C)`."""
        if self.training:
            with torch.no_grad():
                for _ in range(n_iter - 1):
                    centres = self.refined(x, centres)
            centres = self.refined(x, centres)
        with torch.no_grad():
            return centres, self.scores(x, centres).argmax(-1)

    def scores(self, x: Tensor, centres: Tensor) -> Tensor:
        return torch.einsum("bnc,mc->bnm", F.normalize(x, dim=-1), F.normalize(centres, dim=-1))

    def refined(self, x: Tensor, centres: Tensor) -> Tensor:
        unit, old = F.normalize(x, dim=-1), F.normalize(centres, dim=-1)
        nearest = self.scores(x, centres).argmax(-1)
        index = nearest[..., None].expand_as(unit).flatten(0, 1)
        sums = torch.zeros_like(old).scatter_add_(0, index, unit.flatten(0, 1))
        empty = nearest.flatten().bincount(minlength=len(old)) == 0
        return torch.where(empty[:, None], old.detach(), F.normalize(sums, dim=-1))


class GroupAttention(nn.Module):
    def __init__(self, dim: int, num_heads: int, qk_dim: int, group: int) -> None:
        super().__init__()
        self.num_heads, self.group = num_heads, group
        self.to_q = nn.Linear(dim, qk_dim, bias=False)
        self.to_k = nn.Linear(dim, qk_dim, bias=False)
        self.to_v = nn.Linear(dim, dim, bias=False)
        self.proj = nn.Linear(dim, dim, bias=False)

    def forward(self, x: Tensor, order: Tensor, k_global: Tensor, v_global: Tensor) -> Tensor:
        q, k, v = self.to_q(x), self.to_k(x), self.to_v(x)
        q, k, v = (torch.gather(t, 1, order[..., None].expand(-1, -1, t.shape[-1])) for t in (q, k, v))
        number = x.shape[1]
        size = min(number, self.group)
        count = -(-number // size)
        pad = count * size - number
        if pad:
            q = torch.cat([q, q[:, number - pad :].flip(1)], 1)
        k, v = (torch.cat([t, t[:, number - pad - size :].flip(1)], 1) for t in (k, v))
        q = heads(q.unflatten(1, (count, size)), self.num_heads)  # (B, count, h, size, d)
        k, v = (
            heads(t.unfold(1, 2 * size, size).transpose(2, 3).contiguous(), self.num_heads) for t in (k, v)
        )
        k_global, v_global = (t.expand(*q.shape[:2], *t.shape) for t in (k_global, v_global))
        near = F.scaled_dot_product_attention(q, k, v)
        far = F.scaled_dot_product_attention(q, k_global, v_global)
        out = merged(near + far).flatten(1, 2)[:, :number]
        index = order[..., None].expand_as(out)
        return self.proj(torch.zeros_like(out).scatter(1, index, out))


class TokenBlock(nn.Module):
    """Attention in groups of similar tokens and to the token centres, then the ConvFFN."""

    means: Tensor
    initted: Tensor

    def __init__(
        self, dim: int, num_heads: int, qk_dim: int, mlp_dim: int, centres: int, group: int, n_iter: int
    ) -> None:
        super().__init__()
        self.n_iter = n_iter
        self.register_buffer("means", torch.randn(centres, dim))
        self.register_buffer("initted", torch.tensor(True))
        self.norm = nn.LayerNorm(dim)
        self.mlp = PreNorm(dim, ConvFFN(dim, mlp_dim))
        self.irca_attn = CentreKeys(dim, num_heads, qk_dim)
        self.iasa_attn = GroupAttention(dim, num_heads, qk_dim, group)
        self.conv1x1 = nn.Conv2d(dim, dim, 1, bias=False)

    def forward(self, x: Tensor, groups: Tensor | None = None) -> Tensor:
        height, width = x.shape[2:]
        seen = self.norm(tokens(x))
        centres, nearest = self.irca_attn.assigned(seen, self.means, self.n_iter)
        k_global, v_global = self.irca_attn(centres)
        nearest = nearest if groups is None else groups.flatten(1)
        order = nearest.sort(dim=-1, stable=True).indices
        if self.training:
            with torch.no_grad():
                self.means.mul_(0.999).add_(centres, alpha=0.001)
        out = self.iasa_attn(seen, order, k_global, v_global)
        x = x + self.conv1x1(out.transpose(1, 2).reshape(x.shape))
        return x + self.mlp(tokens(x), height, width).transpose(1, 2).reshape(x.shape)


class PlainCATANet(nn.Module):
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
    ) -> None:
        super().__init__()
        self.scale = scale
        self.first_conv = nn.Conv2d(3, dim, 3, padding=1)
        self.blocks = nn.ModuleList(
            nn.ModuleList(
                [
                    TokenBlock(dim, num_heads, qk_dim, mlp_dim, centres, group, rounds),
                    LocalBlock(dim, num_heads, qk_dim, mlp_dim, patch),
                ]
            )
            for patch, centres, group, rounds in zip(
                patch_sizes, num_tokens, group_sizes, n_iters, strict=True
            )
        )
        self.mid_convs = nn.ModuleList(nn.Conv2d(dim, dim, 3, padding=1) for _ in patch_sizes)
        if scale == 4:
            self.upconv1 = nn.Conv2d(dim, 4 * dim, 3, padding=1)
            self.upconv2 = nn.Conv2d(dim, 4 * dim, 3, padding=1)
        elif scale > 1:
            self.upconv = nn.Conv2d(dim, scale**2 * dim, 3, padding=1)
        self.last_conv = nn.Conv2d(dim, 3, 3, padding=1)

    def forward(self, x: Tensor, groups: Sequence[Tensor] | None = None) -> Tensor:
        """`(B, 3, H, W) -> (B, 3, s H, s W)`

        Args:
            groups: the centre `(B, H, W)` of each token, for each block, instead of the nearest. Among many
                tokens a few lie so near to the border of two centres that rounding decides, and one that goes
                elsewhere moves the groups of all that follow: results are compared with the same groups.
        """
        base = F.interpolate(x, scale_factor=self.scale, mode="bilinear", align_corners=False)
        features = first = self.first_conv(x)
        for i, (block, conv) in enumerate(zip(self.blocks, self.mid_convs, strict=True)):
            gathered, local = block  # pyright: ignore[reportGeneralTypeIssues]
            out = local(gathered(features, None if groups is None else groups[i]))
            features = features + conv(out)
        features = features + first
        if self.scale == 4:
            features = F.leaky_relu(F.pixel_shuffle(self.upconv1(features), 2), 0.1)
            features = F.leaky_relu(F.pixel_shuffle(self.upconv2(features), 2), 0.1)
        elif self.scale > 1:
            features = F.leaky_relu(F.pixel_shuffle(self.upconv(features), self.scale), 0.1)
        return self.last_conv(features) + base


def plain_peer(state_dict: dict[str, Tensor], scale: int = 4, **sizes: Any) -> PlainCATANet:
    """The model with the weights of an official state dict, in evaluation mode; `sizes` as of the class."""
    peer = PlainCATANet(scale, **sizes)
    peer.load_state_dict(state_dict)
    return peer.eval()
