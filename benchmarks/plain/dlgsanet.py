"""DLGSANet (arXiv 2301.02031) in the plain layout: the peer of `zoo bench domain=superres`.

The same function as `domains.superres.models.dlgsanet`, laid out as its official program is described: maps
`(B, C, H, W)`, norms between two permutations, 1 x 1 convolutions by `Conv2d`, and the dynamic convolution,
which is a CUDA kernel there, by `unfold`. Evaluation is for one picture at a time. Parameters carry the
official names, so an official state dict loads as it is.

Shapes: B batch, C channels of the map, H x W pixels.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

RGB_MEAN = (0.4488, 0.4371, 0.4040)


class NormBody(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(dim)), nn.Parameter(torch.zeros(dim))

    def forward(self, x: Tensor) -> Tensor:
        mean, var = x.mean(-1, keepdim=True), x.var(-1, keepdim=True, unbiased=False)
        return (x - mean) / torch.sqrt(var + 1e-5) * self.weight + self.bias


class Norm(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.body = NormBody(dim)

    def forward(self, x: Tensor) -> Tensor:
        batch, channels, height, width = x.shape
        tokens = self.body(x.flatten(2).transpose(1, 2))
        return tokens.transpose(1, 2).view(batch, channels, height, width)


class Filters(nn.Module):
    """Predicts a filter for each pixel and group of channels, and applies it to unfolded windows."""

    def __init__(self, dim: int, size: int, group_channels: int) -> None:
        super().__init__()
        self.size, self.groups = size, dim // group_channels
        reduced = dim // 4
        self.conv1 = nn.Sequential(
            nn.Conv2d(dim, reduced, 1),
            nn.Conv2d(reduced, reduced, size, padding=size // 2, groups=reduced),
        )
        self.conv2 = nn.Sequential(nn.Conv2d(reduced, size**2 * self.groups, 1))

    def forward(self, x: Tensor) -> Tensor:
        batch, channels, height, width = x.shape
        weight = self.conv2(self.conv1(x)).view(batch, self.groups, 1, self.size**2, height, width)
        windows = F.unfold(x, self.size, padding=self.size // 2)
        windows = windows.view(batch, self.groups, channels // self.groups, self.size**2, height, width)
        return (windows * weight).sum(3).view(batch, channels, height, width)


class DynamicBlock(nn.Module):
    def __init__(self, dim: int, size: int, group_channels: int, dynamic: bool) -> None:
        super().__init__()
        self.conv0 = nn.Conv2d(dim, dim, 1, bias=False)
        self.conv1 = nn.Conv2d(dim, dim, 1, bias=False)
        static = nn.Conv2d(dim, dim, size, padding=size // 2, groups=dim)
        self.conv = Filters(dim, size, group_channels) if dynamic else static

    def forward(self, x: Tensor) -> Tensor:
        return self.conv1(self.conv(self.conv0(x)))


class Attention(nn.Module):
    """Between channels; softmax where no activation is given."""

    def __init__(self, dim: int, num_heads: int, tlc: bool, tlc_kernel: int, activation: str | None) -> None:
        super().__init__()
        self.num_heads, self.tlc, self.tlc_kernel = num_heads, tlc, tlc_kernel
        self.temperature = nn.Parameter(torch.ones(num_heads, 1, 1))
        self.qkv = nn.Conv2d(dim, dim * 3, 1, bias=False)
        self.qkv_dwconv = nn.Conv2d(dim * 3, dim * 3, 3, padding=1, groups=dim * 3, bias=False)
        self.project_out = nn.Conv2d(dim, dim, 1, bias=False)
        known = {None: nn.Softmax(-1), "relu": nn.ReLU(), "gelu": nn.GELU(), "sigmoid": nn.Sigmoid()}
        self.act = known.get(activation, nn.Identity())

    def attend(self, qkv: Tensor) -> Tensor:
        batch, channels, height, width = qkv.shape
        heads = (batch, self.num_heads, channels // 3 // self.num_heads, height * width)
        q, k, v = (part.reshape(heads) for part in qkv.chunk(3, 1))
        q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
        weights = self.act((q @ k.transpose(-2, -1)) * self.temperature)
        return (weights @ v).view(batch, channels // 3, height, width)

    def forward(self, x: Tensor) -> Tensor:
        qkv = self.qkv_dwconv(self.qkv(x))
        if self.training or not self.tlc:
            return self.project_out(self.attend(qkv))
        height, width = x.shape[2:]
        tall, wide = min(self.tlc_kernel, height), min(self.tlc_kernel, width)
        places = [(i, j) for i in origins(height, tall) for j in origins(width, wide)]
        windows = torch.cat([qkv[:, :, i : i + tall, j : j + wide] for i, j in places])
        out = self.attend(windows)
        total, count = torch.zeros_like(x), torch.zeros_like(x[:, :1])
        for (i, j), part in zip(places, out, strict=True):
            total[0, :, i : i + tall, j : j + wide] += part
            count[0, :, i : i + tall, j : j + wide] += 1
        return self.project_out(total / count)


def origins(size: int, kernel: int) -> list[int]:
    count = (size - 1) // kernel + 1
    step = kernel if count == 1 else math.ceil((size - kernel) / (count - 1) - 1e-8)
    found = [0]
    while found[-1] + kernel < size:
        found.append(min(found[-1] + step, size - kernel))
    return found


class GatedFFN(nn.Module):
    def __init__(self, dim: int, ratio: float) -> None:
        super().__init__()
        hidden = int(dim * ratio)
        self.project_in = nn.Conv2d(dim, hidden * 2, 1, bias=False)
        self.dwconv = nn.Conv2d(hidden * 2, hidden * 2, 3, padding=1, groups=hidden * 2, bias=False)
        self.project_out = nn.Conv2d(hidden, dim, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, value = self.dwconv(self.project_in(x)).chunk(2, 1)
        return self.project_out(F.gelu(gate) * value)


class BaseFFN(nn.Module):
    def __init__(self, dim: int, ratio: float) -> None:
        super().__init__()
        hidden = int(dim * ratio)
        self.body = nn.Sequential(nn.Conv2d(dim, hidden, 1), nn.GELU(), nn.Conv2d(hidden, dim, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)


FFNS = {"GDFN": GatedFFN, "BaseFFN": BaseFFN}


class LocalLayer(nn.Module):
    def __init__(self, dim: int, mixer: DynamicBlock, ffn: nn.Module) -> None:
        super().__init__()
        self.norm1, self.norm2 = Norm(dim), Norm(dim)
        self.IDynamicDWConv, self.IDynamic_ffn = mixer, ffn

    def forward(self, x: Tensor) -> Tensor:
        x = self.IDynamicDWConv(self.norm1(x)) + x
        return self.IDynamic_ffn(self.norm2(x)) + x


class GlobalLayer(nn.Module):
    def __init__(self, dim: int, mixer: Attention, ffn: nn.Module) -> None:
        super().__init__()
        self.norm3, self.norm4 = Norm(dim), Norm(dim)
        self.restormer_attn, self.restormer_ffn = mixer, ffn

    def forward(self, x: Tensor) -> Tensor:
        x = self.restormer_attn(self.norm3(x)) + x
        return self.restormer_ffn(self.norm4(x)) + x


class Group(nn.Module):
    def __init__(self, layers: list[nn.Module], dim: int) -> None:
        super().__init__()
        self.body = nn.Sequential(*layers, nn.Conv2d(dim, dim, 3, padding=1))

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x) + x


def upsample(scale: int, dim: int) -> nn.Sequential:
    """Shuffles by 2, or one by 3, at the same width."""
    factors = [3] if scale == 3 else [2] * int(math.log2(scale))
    pairs = [(nn.Conv2d(dim, dim * r * r, 3, padding=1), nn.PixelShuffle(r)) for r in factors]
    return nn.Sequential(*(module for pair in pairs for module in pair))


class PlainDLGSANet(nn.Module):
    """Arguments as in the official program."""

    mean: Tensor

    def __init__(
        self,
        *,
        in_chans: int = 3,
        dim: int = 48,
        groups: int = 3,
        blocks: int = 3,
        buildblock_type: str = "sparseedge",
        window_size: int = 7,
        idynamic_num_heads: int = 6,
        idynamic_ffn_type: str = "GDFN",
        idynamic_ffn_expansion_factor: float = 2.0,
        idynamic: bool = True,
        restormer_num_heads: int = 6,
        restormer_ffn_type: str = "GDFN",
        restormer_ffn_expansion_factor: float = 2.0,
        tlc_flag: bool = True,
        tlc_kernel: int = 48,
        activation: str = "relu",
        upscale: int = 4,
        img_range: float = 1.0,
        upsampler: str = "pixelshuffledirect",
        body_norm: bool = False,
    ) -> None:
        super().__init__()
        self.img_range, self.upsampler = img_range, upsampler
        mean = torch.tensor(RGB_MEAN) if in_chans == 3 else torch.zeros(1)
        self.register_buffer("mean", mean.view(1, -1, 1, 1), persistent=False)

        def layers() -> list[nn.Module]:
            found: list[nn.Module] = []
            for _ in range(blocks):
                if buildblock_type != "restormer":
                    mixer = DynamicBlock(dim, window_size, idynamic_num_heads, idynamic)
                    ffn = FFNS[idynamic_ffn_type](dim, idynamic_ffn_expansion_factor)
                    found.append(LocalLayer(dim, mixer, ffn))
                if buildblock_type != "idynamic":
                    sparse = buildblock_type == "sparseedge"
                    kernel, act = (tlc_kernel, activation) if sparse else (48, None)
                    mixer = Attention(dim, restormer_num_heads, tlc_flag, kernel, act)
                    ffn = FFNS[restormer_ffn_type](dim, restormer_ffn_expansion_factor)
                    found.append(GlobalLayer(dim, mixer, ffn))
            return found

        embed = nn.Module()
        embed.proj = nn.Conv2d(in_chans, dim, 3, padding=1, bias=False)
        self.overlap_embed = nn.ModuleList([embed])
        norms = [Norm(dim), Norm(dim)] if body_norm else []
        self.deep_feature_extraction = nn.Sequential(
            *norms[:1],
            *(Group(layers(), dim) for _ in range(groups)),
            *norms[1:],
            nn.Conv2d(dim, dim, 3, padding=1),
        )
        if upsampler == "pixelshuffledirect":
            conv = nn.Conv2d(dim, upscale**2 * in_chans, 3, padding=1)
            self.upsample = nn.Sequential(conv, nn.PixelShuffle(upscale))
        elif upsampler == "pixelshuffle":
            self.conv_before_upsample = nn.Sequential(nn.Conv2d(dim, 64, 3, padding=1), nn.LeakyReLU())
            self.upsample = upsample(upscale, 64)
            self.conv_last = nn.Conv2d(64, in_chans, 3, padding=1)
        else:
            self.conv_last = nn.Conv2d(dim, in_chans, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        first = self.overlap_embed[0].proj((x - self.mean) * self.img_range)  # pyright: ignore
        x = self.deep_feature_extraction(first) + first
        if self.upsampler == "pixelshuffle":
            x = self.conv_before_upsample(x)
        if self.upsampler in ("pixelshuffledirect", "pixelshuffle"):
            x = self.upsample(x)
        if self.upsampler != "pixelshuffledirect":
            x = self.conv_last(x)
        return x / self.img_range + self.mean
