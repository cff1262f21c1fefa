"""LWGANet: four quarters of the channels, each with another reach of attention.

Lu et al., LWGANet, AAAI 2026, arXiv 2501.10040. A backbone for aerial and satellite images.

Every block splits its map into point, local, medium-range and far quarters, and mixes them in one MLP. Maps
are `(B, C, H, W)` with channels last in memory: 1 x 1 convolutions are matrix products without copies. Beyond
the official program, which takes squares whose sides are multiples of 32 from 96 on, any image of at least
32 x 32 pixels works: cells of 2 x 2 at an odd border hold fewer tokens, the diagonals of the medium range run
through maps of any shape, and a map of less than 3 rows is reflected repeatedly where it is blurred.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from timm.layers.drop import DropPath
from torch import Tensor, nn

from domains.vision.backbone import Backbone
from domains.vision.weights.lwganet import LWGANetOfficial, blur_filter
from zoo.attention import attend
from zoo.errors import ConfigError
from zoo.layers.conv import ConvNorm, scale_and_shift
from zoo.registry import register_model

ACTIVATIONS: dict[str, type[nn.Module]] = {"gelu": nn.GELU, "relu": nn.ReLU}


# ---- layers ------------------------------------------------------------------------------------------------


class Pointwise(nn.Linear):
    """A 1 x 1 convolution: a matrix product over the channels of a map `(B, C, H, W)`."""

    def forward(self, x: Tensor) -> Tensor:
        batch, _, height, width = x.shape
        rows = F.linear(x.permute(0, 2, 3, 1).flatten(0, 2), self.weight, self.bias)
        return rows.view(batch, height, width, -1).permute(0, 3, 1, 2)

    def scale_outputs_(self, scale: Tensor, shift: Tensor) -> None:
        """Continues with `y * scale + shift`."""
        shift = shift if self.bias is None else self.bias * scale + shift
        self.weight.mul_(scale[:, None])
        self.bias = nn.Parameter(shift, requires_grad=False)

    def scale_inputs_(self, scale: Tensor, shift: Tensor, columns: slice = slice(None)) -> None:
        """Begins with `x * scale + shift` on some of the channels."""
        bias = self.weight[:, columns] @ shift
        self.bias = nn.Parameter(bias if self.bias is None else self.bias + bias, requires_grad=False)
        self.weight[:, columns] *= scale


def removed(module: nn.Module, name: str) -> tuple[Tensor, Tensor]:
    """Scale and shift of the batch norm of that name, in whose place there is none from now on."""
    norm = getattr(module, name)
    setattr(module, name, nn.Identity())
    return scale_and_shift(norm)


class Stem(ConvNorm):
    """Patches of 4 x 4 pixels; what is left over at the right and the bottom is not seen."""

    def __init__(self, in_chans: int, dim: int) -> None:
        super().__init__(in_chans, dim, 4, 4, 0)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.contiguous(memory_format=torch.channels_last))


class Downsample(nn.Module):
    """`(B, C, H, W)` to `(B, 2C, H/2, W/2)`: a strided convolution beside a max pooling, fused.

    Two filters see each channel; the first ones of all channels come before the second ones.
    """

    norm_conv: nn.Module
    norm_pool: nn.Module

    def __init__(self, dim: int, act: type[nn.Module]) -> None:
        super().__init__()
        wide = 2 * dim
        self.conv = nn.Conv2d(wide, wide, 3, padding=1, groups=wide)
        self.reduce = nn.Conv2d(wide, wide, 3, 2, 1, groups=wide)
        self.act = act()
        self.norm_conv, self.norm_pool = nn.BatchNorm2d(wide), nn.BatchNorm2d(wide)
        self.fusion = Pointwise(2 * wide, wide)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(torch.cat([x, x], 1))
        convolved = self.norm_conv(self.act(self.reduce(y)))
        return self.fusion(torch.cat([convolved, self.norm_pool(F.max_pool2d(y, 3, 2, 1))], 1))

    def fuse_(self) -> None:
        """Folds both norms into the fusion."""
        wide = self.conv.out_channels
        for name, columns in (("norm_conv", slice(wide)), ("norm_pool", slice(wide, None))):
            self.fusion.scale_inputs_(*removed(self, name), columns)


# ---- the four quarters -------------------------------------------------------------------------------------


class PointAttention(nn.Module):
    """`x + x * sigmoid(W2 act(BN(W1 x)))`: every pixel by itself."""

    norm: nn.Module

    def __init__(self, dim: int, act: type[nn.Module]) -> None:
        super().__init__()
        self.expand = Pointwise(dim, 4 * dim, bias=False)
        self.norm = nn.BatchNorm2d(4 * dim)
        self.act = act()
        self.reduce = Pointwise(4 * dim, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate = self.reduce(self.act(self.norm(self.expand(x)))).sigmoid()
        return torch.addcmul(x, x, gate)

    def fuse_(self) -> None:
        self.expand.scale_outputs_(*removed(self, "norm"))


class MediumAttention(nn.Module):
    """A gate from a map three times smaller, along rows, columns and both diagonals.

    Four strips of K x 3 taps per channel, the second and fourth lying on their side. Those of the diagonals
    are sheared: tap (a, b), counted from the middle, sees the pixel at (a, b - a). All four add up to one
    depthwise kernel of (K + 2) x (K + 2).
    """

    places: Tensor
    blur: Tensor
    kernel: Tensor | None
    shift: Tensor | None
    norm: nn.Module

    def __init__(self, dim: int, kernel_size: int) -> None:
        super().__init__()
        if kernel_size < 3 or kernel_size % 2 == 0:
            raise ConfigError(f"The kernel of the medium range is odd and at least 3, not {kernel_size}.")
        self.dim, self.size = dim, kernel_size + 2
        self.strips = nn.Parameter(torch.empty(dim, 4, kernel_size, 3))
        self.norm = nn.BatchNorm2d(dim)
        row, column = torch.arange(kernel_size)[:, None], torch.arange(3)
        straight = (row + 1) * self.size + column + kernel_size // 2
        sheared = (row + 1) * self.size + column - row + kernel_size - 1
        flip = torch.arange(self.size**2).view(self.size, self.size).T.flatten()
        places = torch.stack([straight, flip[straight], sheared, flip[sheared]]).flatten()
        self.register_buffer("places", places, persistent=False)
        self.register_buffer("blur", blur_filter(dim), persistent=False)
        self.register_buffer("kernel", None)
        self.register_buffer("shift", None)

    def forward(self, x: Tensor) -> Tensor:
        small = F.max_pool2d(x, 3, 1, 1)
        small = F.conv2d(reflected(small, 1, 2), self.blur, stride=3, groups=self.dim)
        kernel = self.merged() if self.kernel is None else self.kernel
        # Taps that only see the border of zeros are left out.
        half = [min(self.size // 2, max(side - 1, 1)) for side in small.shape[2:]]
        top, left = (self.size // 2 - h for h in half)
        kernel = kernel[:, :, top : self.size - top, left : self.size - left]
        gate = self.norm(F.conv2d(small, kernel, self.shift, padding=half, groups=self.dim)).sigmoid()
        return x * F.interpolate(gate, x.shape[2:])

    def merged(self) -> Tensor:
        """The sum of the four strips as one kernel `(C, 1, K + 2, K + 2)`."""
        empty = self.strips.new_zeros(self.dim, self.size**2)
        kernel = empty.index_add(1, self.places, self.strips.flatten(1))
        return kernel.view(self.dim, 1, self.size, self.size)

    def fuse_(self) -> None:
        """Keeps the merged kernel, with the norm folded into it."""
        scale, self.shift = removed(self, "norm")
        self.kernel = self.merged() * scale[:, None, None, None]
        del self.strips


def reflected(x: Tensor, before: int, after: int) -> Tensor:
    """`x` with rows and columns reflected at its border, over and over where it is smaller than they are."""
    if min(x.shape[2:]) > max(before, after):
        return F.pad(x, (before, after, before, after), mode="reflect")
    for axis in (2, 3):
        last = x.shape[axis] - 1
        steps = torch.arange(-before, last + 1 + after, device=x.device).abs() % max(1, 2 * last)
        x = x.index_select(axis, torch.minimum(steps, 2 * last - steps))
    return x


class LargeKernelAttention(nn.Module):
    """The far quarter of the first two stages: two reaches of convolution on the maxima of 2 x 2 cells."""

    def __init__(self, dim: int, act: type[nn.Module]) -> None:
        super().__init__()
        self.inner = Pointwise(dim, dim)
        self.act = act()
        self.conv_near = nn.Conv2d(dim, dim, 5, padding=2, groups=dim)
        self.conv_wide = nn.Conv2d(dim, dim, 7, padding=9, dilation=3, groups=dim)
        self.near, self.wide = Pointwise(dim, dim // 2), Pointwise(dim, dim // 2)
        self.gates = nn.Conv2d(2, 2, 7, padding=3)
        self.mix = Pointwise(dim // 2, dim)
        self.outer = Pointwise(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        pooled, index = cell_maxima(x)
        a = self.act(self.inner(pooled))
        near = self.conv_near(a)
        both = torch.cat([self.near(near), self.wide(self._dilated(near))], 1)
        stats = torch.cat([both.mean(1, keepdim=True), both.amax(1, keepdim=True)], 1)
        gates = self.gates(stats).sigmoid()
        near, wide = both.chunk(2, 1)
        mixed = self.mix(near * gates[:, :1] + wide * gates[:, 1:])
        return at_maxima(self.outer(a * mixed), index, x)

    def _dilated(self, x: Tensor) -> Tensor:
        """The dilated convolution, on the CPU as a dense one of each of the 3 x 3 phases of the map.

        24 channels of 256 x 256 pixels take 1/27 of the time (one thread, float32).
        """
        conv = self.conv_wide
        if x.device.type != "cpu":
            return conv(x)
        batch, dim, height, width = x.shape
        rows, columns = -(-height // 3), -(-width // 3)
        x = F.pad(x, (0, 3 * columns - width, 0, 3 * rows - height)).permute(0, 2, 3, 1)
        phases = x.reshape(batch, rows, 3, columns, 3, dim).permute(0, 2, 4, 1, 3, 5)
        phases = phases.reshape(-1, rows, columns, dim).permute(0, 3, 1, 2)
        phases = F.conv2d(phases, conv.weight, conv.bias, padding=3, groups=dim).permute(0, 2, 3, 1)
        phases = phases.reshape(batch, 3, 3, rows, columns, dim).permute(0, 3, 1, 4, 2, 5)
        x = phases.reshape(batch, 3 * rows, 3 * columns, dim)[:, :height, :width]
        return x.permute(0, 3, 1, 2)


def cell_maxima(x: Tensor) -> tuple[Tensor, Tensor]:
    """The maxima of cells of 2 x 2, `(B, C, ceil(H / 2), ceil(W / 2))`, and where they are."""
    return F.max_pool2d(x, 2, ceil_mode=True, return_indices=True)


def at_maxima(values: Tensor, index: Tensor, like: Tensor) -> Tensor:
    """The value of each cell where its maximum is, zeros elsewhere; the shape of `like`."""
    return F.max_unpool2d(values, index, [2, 2], output_size=like.shape[2:])


class Attention(nn.Module):
    """The far quarter of the last stage: full attention with heads of width 4."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.num_heads = max(1, dim // 4)
        self.qkv = nn.Linear(dim, 12 * self.num_heads, bias=False)
        self.proj = Pointwise(4 * self.num_heads, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        batch, _, height, width = x.shape
        qkv = self.qkv(x.flatten(2).mT).view(batch, height * width, 3, self.num_heads, 4)
        out = attend(*qkv.permute(2, 0, 3, 1, 4)).transpose(1, 2).reshape(batch, height, width, -1)
        return self.proj(out.permute(0, 3, 1, 2))


class PooledAttention(nn.Module):
    """The far quarter of the third stage: full attention among the maxima of 2 x 2 cells."""

    norm: nn.Module

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.attention = Attention(dim)
        self.norm = nn.BatchNorm2d(dim)

    def forward(self, x: Tensor) -> Tensor:
        pooled, index = cell_maxima(x)
        return at_maxima(self.norm(self.attention(pooled)), index, x)

    def fuse_(self) -> None:
        self.attention.proj.scale_outputs_(*removed(self, "norm"))


# ---- the network -------------------------------------------------------------------------------------------


class Block(nn.Module):
    """The four quarters, joined by an MLP; drop path acts before the last norm, as officially."""

    far_norm: nn.Module
    mlp_norm: nn.Module
    norm: nn.Module

    def __init__(
        self,
        stage: int,
        dim: int,
        kernel_size: int,
        mlp_ratio: float,
        act: type[nn.Module],
        drop_path: float,
    ) -> None:
        super().__init__()
        quarter, hidden = dim // 4, int(dim * mlp_ratio)
        self.point = PointAttention(quarter, act)
        self.local = nn.Sequential(ConvNorm(quarter, quarter, 3), act())
        self.medium = MediumAttention(quarter, kernel_size)
        if stage < 2:
            self.far = LargeKernelAttention(quarter, act)
        else:
            self.far = PooledAttention(quarter) if stage == 2 else Attention(quarter)
        self.far_norm = nn.Identity() if stage == 2 else nn.BatchNorm2d(quarter)
        self.expand = Pointwise(dim, hidden, bias=False)
        self.mlp_norm = nn.BatchNorm2d(hidden)
        self.act = act()
        self.reduce = Pointwise(hidden, dim, bias=False)
        self.drop_path = DropPath(drop_path)
        self.norm = nn.BatchNorm2d(dim)

    def forward(self, x: Tensor) -> Tensor:
        point, local, medium, far = x.chunk(4, 1)
        far = self.far_norm(far + self.far(far))
        mixed = torch.cat([self.point(point), self.local(local), self.medium(medium), far], 1)
        mixed = self.reduce(self.act(self.mlp_norm(self.expand(mixed))))
        return x + self.norm(self.drop_path(mixed))

    def fuse_(self) -> None:
        """Folds the norms into the MLP: after its layers, and before its last quarter of inputs."""
        self.expand.scale_outputs_(*removed(self, "mlp_norm"))
        self.reduce.scale_outputs_(*removed(self, "norm"))
        if isinstance(self.far_norm, nn.BatchNorm2d):
            far = slice(-self.far_norm.num_features, None)
            self.expand.scale_inputs_(*removed(self, "far_norm"), far)


class PreHead(nn.Module):
    """Pooled features to the wider ones that the classifier sees."""

    def __init__(self, dim: int, out_features: int, act: type[nn.Module]) -> None:
        super().__init__()
        self.out_features = out_features
        self.proj = nn.Linear(dim, out_features, bias=False)
        self.act = act()
        nn.init.trunc_normal_(self.proj.weight, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.proj(x))


class LWGANet(Backbone):
    """LWGANet.

    Args:
        dim: channels of the first stage, doubled by each further one; a multiple of 8.
        depths: blocks of the four stages.
        kernel_sizes: length of the strips of the medium range in each stage, odd.
        mlp_ratio: width of the hidden layer of a block by its channels.
        head_width: channels between the pooled map and the classifier.
        act: `gelu`, or `relu` as in L2.
        out_norms: a batch norm on each map that is given out; with features_only=True, the official
            dense-prediction form.
    """

    first_conv = "stem.conv"
    cfg: ClassVar[dict[str, Any]] = {"license": "cc-by-nc-4.0"}

    def __init__(
        self,
        *,
        dim: int = 32,
        depths: Sequence[int] = (1, 2, 4, 2),
        kernel_sizes: Sequence[int] = (11, 11, 11, 11),
        mlp_ratio: float = 2.0,
        head_width: int = 1280,
        act: str = "gelu",
        out_norms: bool = False,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        if act not in ACTIVATIONS:
            raise ConfigError(f"act is one of {', '.join(ACTIVATIONS)}, not {act!r}.")
        if dim < 8 or dim % 8:
            raise ConfigError(f"dim is a multiple of 8, not {dim}: its quarters are halved once.")
        if len(depths) != 4 or len(kernel_sizes) != 4:
            raise ConfigError(f"There are four stages: depths={depths}, kernel_sizes={kernel_sizes}.")
        self.act, self.head_width = ACTIVATIONS[act], head_width
        dims = [dim * 2**i for i in range(4)]
        self.stem = Stem(self.in_chans, dim)
        stages = []
        for i, rates in enumerate(self.drop_path_rates(depths)):
            blocks = [Block(i, dims[i], kernel_sizes[i], mlp_ratio, self.act, rate) for rate in rates]
            stages.append(nn.Sequential(*([Downsample(dims[i - 1], self.act)] if i else []), *blocks))
        self.stages = nn.Sequential(*stages)
        if out_norms:
            self.out_norms = nn.ModuleList(nn.BatchNorm2d(width) for width in dims)
        self.apply(_initialise)
        self.finish(dims, strides=(4, 8, 16, 32))

    def make_pre_head(self) -> nn.Module:
        return PreHead(self.num_features, self.head_width, self.act)


def _initialise(module: nn.Module) -> None:
    if isinstance(module, nn.Linear | nn.Conv2d):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, MediumAttention):
        nn.init.trunc_normal_(module.strips, std=0.02)


# ---- variants ----------------------------------------------------------------------------------------------

_register = partial(
    register_model,
    model=LWGANet,
    paper=(
        "Lu et al., LWGANet: Addressing Spatial and Channel Redundancy in Remote Sensing Visual Tasks with "
        "Light-Weight Grouped Attention, AAAI 2026, arXiv 2501.10040"
    ),
    licence="CC BY-NC 4.0 (non-commercial)",
    source="https://github.com/AeroVILab-AHU/LWGANet",
    status="official parity",
    official=LWGANetOfficial,
    preprocessing={"size": 224, "resize": 256, "mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)},
)


@_register(
    summary="Remote sensing backbone of 1.7 M parameters (45 classes), 0.19 GFLOPs",
    weights=("lwganet_l0_in1k",),
)
def lwganet_l0(**kwargs) -> LWGANet:
    return LWGANet(**kwargs)


@_register(
    summary="Remote sensing backbone of 5.9 M parameters (45 classes), 0.71 GFLOPs",
    weights=("lwganet_l1_in1k",),
)
def lwganet_l1(*, dim: int = 64, drop_path_rate: float = 0.1, **kwargs) -> LWGANet:
    return LWGANet(dim=dim, drop_path_rate=drop_path_rate, **kwargs)


@_register(
    summary="Remote sensing backbone of 13 M parameters (45 classes), 1.87 GFLOPs",
    weights=("lwganet_l2_in1k",),
)
def lwganet_l2(
    *,
    dim: int = 96,
    depths: Sequence[int] = (1, 4, 4, 2),
    act: str = "relu",
    drop_path_rate: float = 0.1,
    **kwargs,
) -> LWGANet:
    return LWGANet(dim=dim, depths=depths, act=act, drop_path_rate=drop_path_rate, **kwargs)
