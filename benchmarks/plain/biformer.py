"""BiFormer (CVPR 2023, arXiv 2303.08810) in the plain layout: the peer of `zoo bench suite=vision`.

The same function as `domains.vision.models.biformer`, laid out as it is described: the map is cut into
regions, `torch.gather` copies the keys and values of the k chosen regions for every region, attention keeps
its explicit weights, and maps change between `(B, C, H, W)` and `(B, H, W, C)` around every convolution.
Parameters carry the official names, so an official state dict loads as it is. Maps are divisible by the
number of regions.

Shapes: B batch, C channels, S x S regions of h x w tokens, K heads of width d.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from torch import Tensor, nn


def maps_first(module: nn.Module, x: Tensor) -> Tensor:
    """A convolution on `(B, H, W, C)`."""
    return module(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


class Projection(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.qkv = nn.Linear(dim, 3 * dim)


class RoutedAttention(nn.Module):
    def __init__(self, dim: int, num_heads: int, n_win: int, topk: int) -> None:
        super().__init__()
        self.num_heads, self.n_win, self.topk, self.scale = num_heads, n_win, topk, dim**-0.5
        self.qkv = Projection(dim)
        self.lepe = nn.Conv2d(dim, dim, 5, padding=2, groups=dim)
        self.wo = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """`(B, H, W, C) -> (B, H, W, C)`"""
        batch, height, width, dim = x.shape
        s = self.n_win
        regions = (
            x.view(batch, s, height // s, s, width // s, dim).transpose(2, 3).reshape(batch, s * s, -1, dim)
        )
        q, k, v = self.qkv.qkv(regions).chunk(3, -1)
        scores = (q.mean(2).detach() * self.scale) @ k.mean(2).detach().transpose(1, 2)
        index = scores.topk(self.topk, -1).indices
        keys, values = (self.heads(self.gathered(t, index)) for t in (k, v))
        weights = ((self.heads(q) * self.scale) @ keys.transpose(-1, -2)).softmax(-1)
        out = (weights @ values).transpose(2, 3).flatten(3)
        lepe = maps_first(self.lepe, self.back(v, height, width))
        return self.wo(self.back(out, height, width) + lepe)

    def gathered(self, x: Tensor, index: Tensor) -> Tensor:
        """`(B, R, h w, C)` to `(B, R, k h w, C)`."""
        number = x.shape[1]
        wide = index[..., None, None].expand(-1, -1, -1, *x.shape[2:])
        return x[:, None].expand(-1, number, -1, -1, -1).gather(2, wide).flatten(2, 3)

    def heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.num_heads, -1)).transpose(2, 3)

    def back(self, x: Tensor, height: int, width: int) -> Tensor:
        s = self.n_win
        x = x.view(len(x), s, s, height // s, width // s, -1)
        return x.transpose(2, 3).reshape(len(x), height, width, -1)


class FullAttention(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.proj = nn.Linear(dim, dim)
        self.lepe = nn.Conv2d(dim, dim, 5, padding=2, groups=dim)

    def forward(self, x: Tensor) -> Tensor:
        """`(B, H, W, C) -> (B, H, W, C)`"""
        qkv = self.qkv(x).flatten(1, 2).unflatten(-1, (3, 8, -1)).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind()
        weights = (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).softmax(-1)
        out = (weights @ v).transpose(1, 2).reshape(x.shape)
        return self.proj(out + maps_first(self.lepe, x))


class Block(nn.Module):
    def __init__(self, dim: int, num_heads: int, n_win: int, topk: int, mlp_ratio: int) -> None:
        super().__init__()
        self.pos_embed = nn.Conv2d(dim, dim, 3, padding=1, groups=dim)
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = RoutedAttention(dim, num_heads, n_win, topk) if topk > 0 else FullAttention(dim)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        hidden = mlp_ratio * dim
        self.mlp = nn.Sequential(nn.Linear(dim, hidden), nn.Identity(), nn.GELU(), nn.Linear(hidden, dim))

    def forward(self, x: Tensor) -> Tensor:
        """`(B, C, H, W) -> (B, C, H, W)`"""
        x = (x + self.pos_embed(x)).permute(0, 2, 3, 1)
        x = x + self.attn(self.norm1(x))
        x = x + self.mlp(self.norm2(x))
        return x.permute(0, 3, 1, 2)


class PlainBiFormer(nn.Module):
    """Image `(B, 3, H, W)` to logits; arguments as in `domains.vision.models.biformer.BiFormer`."""

    def __init__(
        self,
        depths: Sequence[int] = (2, 2, 8, 2),
        embed_dims: Sequence[int] = (64, 128, 256, 512),
        topks: Sequence[int] = (1, 4, 16, -2),
        *,
        head_dim: int = 32,
        n_win: int = 7,
        mlp_ratios: Sequence[int] = (3, 3, 3, 3),
        num_classes: int = 1000,
        in_chans: int = 3,
    ) -> None:
        super().__init__()
        first = embed_dims[0]
        stem = nn.Sequential(
            nn.Conv2d(in_chans, first // 2, 3, 2, 1),
            nn.BatchNorm2d(first // 2),
            nn.GELU(),
            nn.Conv2d(first // 2, first, 3, 2, 1),
            nn.BatchNorm2d(first),
        )
        down = [nn.Sequential(nn.Conv2d(a, b, 3, 2, 1), nn.BatchNorm2d(b)) for a, b in pairwise(embed_dims)]
        self.downsample_layers = nn.ModuleList([stem, *down])
        kinds = zip(depths, embed_dims, topks, mlp_ratios, strict=True)
        self.stages = nn.ModuleList(
            nn.Sequential(*(Block(dim, dim // head_dim, n_win, topk, ratio) for _ in range(depth)))
            for depth, dim, topk, ratio in kinds
        )
        self.norm = nn.BatchNorm2d(embed_dims[-1])
        self.head = nn.Linear(embed_dims[-1], num_classes)

    def forward(self, x: Tensor) -> Tensor:
        for down, stage in zip(self.downsample_layers, self.stages, strict=True):
            x = stage(down(x))
        return self.head(self.norm(x).mean((2, 3)))
