"""LWGANet (AAAI 2026, arXiv 2501.10040) in the plain layout: the peer of `zoo bench suite=vision`.

The same function as `domains.vision.models.lwganet`, laid out as it is described: four strip convolutions on
the medium range, two of them between a skew of the map and its inverse; pooling that keeps an index per cell;
attention by explicit weights; every batch norm a layer of its own. Parameters carry the official names, so an
official state dict loads as it is. Square inputs whose sides are multiples of 32, from 96 on.

Shapes: B batch, D channels of a stage, S = D / 4 of a group.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Stem(nn.Module):
    def __init__(self, in_chans: int, width: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_chans, width, 4, 4, bias=False)
        self.norm = nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.proj(x))


class PointAttention(nn.Module):
    """`x * sigmoid(W2 act(BN(W1 x)))`."""

    def __init__(self, width: int, act: type[nn.Module]) -> None:
        super().__init__()
        self.p_conv = nn.Sequential(
            nn.Conv2d(width, 4 * width, 1, bias=False),
            nn.BatchNorm2d(4 * width),
            act(),
            nn.Conv2d(4 * width, width, 1, bias=False),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x * self.p_conv(x).sigmoid()


class LocalAttention(nn.Module):
    def __init__(self, width: int, act: type[nn.Module]) -> None:
        super().__init__()
        self.conv = nn.Sequential(
            nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), act()
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


class BlurPool(nn.Module):
    """Fixed 4 x 4 filter at stride 3 on a reflected border."""

    filt: Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        taps = torch.tensor([1.0, 3.0, 3.0, 1.0])
        self.register_buffer("filt", (torch.outer(taps, taps) / 64).expand(width, 1, 4, 4).clone())

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(F.pad(x, (1, 2, 1, 2), mode="reflect"), self.filt, stride=3, groups=x.shape[1])


def skewed(x: Tensor) -> Tensor:
    """`(B, S, N, N)` to `(B, S, N, 2N - 1)`: row r moves right by r."""
    batch, width, n, _ = x.shape
    flat = F.pad(x, (0, n)).flatten(2)[..., : n * (2 * n - 1)]
    return flat.view(batch, width, n, 2 * n - 1)


def unskewed(x: Tensor) -> Tensor:
    """The inverse of `skewed`."""
    batch, width, n, _ = x.shape
    return F.pad(x.flatten(2), (0, n)).view(batch, width, n, 2 * n)[..., :n]


class MediumAttention(nn.Module):
    """A gate from strips along rows, columns and both diagonals of a map three times smaller."""

    def __init__(self, width: int, kernel: int) -> None:
        super().__init__()
        tall = {"kernel_size": (kernel, 3), "padding": (kernel // 2, 1), "groups": width, "bias": False}
        wide = {"kernel_size": (3, kernel), "padding": (1, kernel // 2), "groups": width, "bias": False}
        self.max_m1 = nn.MaxPool2d(3, 1, 1)
        self.max_m2 = BlurPool(width)
        self.H_att1, self.V_att1 = nn.Conv2d(width, width, **tall), nn.Conv2d(width, width, **wide)
        self.H_att2, self.V_att2 = nn.Conv2d(width, width, **tall), nn.Conv2d(width, width, **wide)
        self.norm = nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        small = self.max_m2(self.max_m1(x))
        diagonal = unskewed(self.H_att2(skewed(small)))
        other = unskewed(self.V_att2(skewed(small.mT).mT).mT).mT
        gate = self.norm(self.H_att1(small) + self.V_att1(small) + diagonal + other).sigmoid()
        return x * F.interpolate(gate, x.shape[2:])


class LargeKernelAttention(nn.Module):
    """Global attention of the first two stages, on the maxima of 2 x 2 cells."""

    def __init__(self, width: int, act: type[nn.Module]) -> None:
        super().__init__()
        self.proj_1 = nn.Conv2d(width, width, 1)
        self.act = act()
        self.conv0 = nn.Conv2d(width, width, 5, padding=2, groups=width)
        self.conv_spatial = nn.Conv2d(width, width, 7, padding=9, dilation=3, groups=width)
        self.conv1, self.conv2 = nn.Conv2d(width, width // 2, 1), nn.Conv2d(width, width // 2, 1)
        self.conv_squeeze = nn.Conv2d(2, 2, 7, padding=3)
        self.conv = nn.Conv2d(width // 2, width, 1)
        self.proj_2 = nn.Conv2d(width, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        pooled, index = F.max_pool2d(x, 2, 2, return_indices=True)
        a = self.act(self.proj_1(pooled))
        near = self.conv0(a)
        far = self.conv2(self.conv_spatial(near))
        near = self.conv1(near)
        both = torch.cat([near, far], dim=1)
        stats = torch.cat([both.mean(1, keepdim=True), both.amax(1, keepdim=True)], dim=1)
        gate = self.conv_squeeze(stats).sigmoid()
        mixed = self.conv(near * gate[:, :1] + far * gate[:, 1:])
        return F.max_unpool2d(self.proj_2(a * mixed), index, [2, 2])


class Attention(nn.Module):
    """Full attention with heads of width 4."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.heads = max(1, width // 4)
        self.qkv = nn.Linear(width, 12 * self.heads, bias=False)
        self.proj = nn.Linear(4 * self.heads, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        batch, width, height, breadth = x.shape
        tokens = x.flatten(2).transpose(1, 2)
        q, k, v = self.qkv(tokens).view(batch, -1, 3, self.heads, 4).permute(2, 0, 3, 1, 4)
        weights = (q @ k.transpose(-1, -2) * 0.5).softmax(-1)
        out = self.proj((weights @ v).transpose(1, 2).flatten(2))
        return out.transpose(1, 2).reshape(batch, width, height, breadth)


class PooledAttention(nn.Module):
    """Global attention of the third stage, on the maxima of 2 x 2 cells."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.attn = Attention(width)
        self.norm = nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        pooled, index = F.max_pool2d(x, 2, 2, return_indices=True)
        return F.max_unpool2d(self.norm(self.attn(pooled)), index, [2, 2])


class Block(nn.Module):
    def __init__(
        self, stage: int, width: int, kernel: int, mlp_ratio: float, act: type[nn.Module], drop_path: float
    ) -> None:
        super().__init__()
        group, hidden = width // 4, int(width * mlp_ratio)
        self.stage, self.drop_path = stage, drop_path
        self.mlp = nn.Sequential(
            nn.Conv2d(width, hidden, 1, bias=False),
            nn.BatchNorm2d(hidden),
            act(),
            nn.Conv2d(hidden, width, 1, bias=False),
        )
        self.PA, self.LA = PointAttention(group, act), LocalAttention(group, act)
        self.MRA = MediumAttention(group, kernel)
        if stage < 2:
            self.GA12 = LargeKernelAttention(group, act)
        elif stage == 2:
            self.GA3 = PooledAttention(group)
        else:
            self.GA4 = Attention(group)
        if stage != 2:
            self.norm = nn.BatchNorm2d(group)
        self.norm1 = nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        point, local, medium, far = x.chunk(4, dim=1)
        point = point + self.PA(point)
        if self.stage < 2:
            far = self.norm(far + self.GA12(far))
        elif self.stage == 2:
            far = far + self.GA3(far)
        else:
            far = self.norm(far + self.GA4(far))
        mixed = self.mlp(torch.cat([point, self.LA(local), self.MRA(medium), far], dim=1))
        if self.training and self.drop_path:
            kept = torch.rand(len(x), 1, 1, 1, device=x.device) >= self.drop_path
            mixed = mixed * kept / (1 - self.drop_path)
        return x + self.norm1(mixed)


class Stage(nn.Module):
    def __init__(self, blocks: list[Block]) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*blocks)

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks(x)


class Downsampler(nn.Module):
    """`(B, D, H, W)` to `(B, 2D, H/2, W/2)`: a strided convolution and a max pooling, fused."""

    def __init__(self, width: int, act: type[nn.Module]) -> None:
        super().__init__()
        wide = 2 * width
        self.conv = nn.Conv2d(width, wide, 3, padding=1, groups=width)
        self.conv_c = nn.Conv2d(wide, wide, 3, 2, 1, groups=wide)
        self.act = act()
        self.norm_c, self.norm_m = nn.BatchNorm2d(wide), nn.BatchNorm2d(wide)
        self.max_m = nn.MaxPool2d(3, 2, 1)
        self.fusion = nn.Conv2d(2 * wide, wide, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        convolved = self.norm_c(self.act(self.conv_c(y)))
        return self.fusion(torch.cat([convolved, self.norm_m(self.max_m(y))], dim=1))


class PlainLWGANet(nn.Module):
    """The whole network: logits, or in its dense form a list of four maps."""

    def __init__(
        self,
        *,
        in_chans: int = 3,
        num_classes: int = 1000,
        stem_dim: int = 32,
        depths: Sequence[int] = (1, 2, 4, 2),
        att_kernel: Sequence[int] = (11, 11, 11, 11),
        mlp_ratio: float = 2.0,
        feature_dim: int = 1280,
        drop_path_rate: float = 0.0,
        act: type[nn.Module] = nn.GELU,
        dense: bool = False,
    ) -> None:
        super().__init__()
        self.dense = dense
        self.Stem = Stem(in_chans, stem_dim)
        rates = iter(torch.linspace(0, drop_path_rate, sum(depths)).tolist())
        stages: list[nn.Module] = []
        for i, depth in enumerate(depths):
            width = stem_dim * 2**i
            stages.append(
                Stage([Block(i, width, att_kernel[i], mlp_ratio, act, next(rates)) for _ in range(depth)])
            )
            if i < 3:
                stages.append(Downsampler(width, act))
        self.stages = nn.Sequential(*stages)
        if dense:
            for i in range(4):
                self.add_module(f"norm{2 * i}", nn.BatchNorm2d(stem_dim * 2**i))
        else:
            self.avgpool_pre_head = nn.Sequential(
                nn.AdaptiveAvgPool2d(1), nn.Conv2d(8 * stem_dim, feature_dim, 1, bias=False), act()
            )
            self.head = nn.Linear(feature_dim, num_classes)

    def forward(self, x: Tensor) -> Tensor | list[Tensor]:
        """Image `(B, C, H, W)` to logits, or to four maps of strides 4, 8, 16, 32."""
        x = self.Stem(x)
        maps = []
        for i, stage in enumerate(self.stages):
            x = stage(x)
            if self.dense and i % 2 == 0:
                maps.append(self.get_submodule(f"norm{i}")(x))
        return maps if self.dense else self.head(self.avgpool_pre_head(x).flatten(1))
