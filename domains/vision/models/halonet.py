"""HaloNet: a bottleneck ResNet in which some 3 x 3 convolutions are blocked local attention.

Vaswani et al., Scaling Local Self-Attention for Parameter Efficient Visual Backbones, CVPR 2021, arXiv
2103.12731; networks and weights of timm. Maps are `(B, C, H, W)` with channels last in memory. timm takes
sides that are multiples of 256 (of 8 in the attention alone); here blocks that an image does not fill are
filled with the zeros that surround it anyway.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from timm.layers.drop import DropPath
from timm.layers.eca import EcaModule
from timm.layers.helpers import make_divisible
from timm.layers.squeeze_excite import SEModule
from torch import Tensor, nn

from domains.vision.attention import Choice, map_attention, on_map
from domains.vision.backbone import Backbone
from domains.vision.weights.halonet import HaloNetOfficial
from zoo.attention import attend
from zoo.attention.halo import Halo, with_offsets
from zoo.attention.layers.base import head_width
from zoo.errors import ConfigError
from zoo.layers.conv import ConvNorm, scale_and_shift
from zoo.registry import register_model

ACTIVATIONS: dict[str, type[nn.Module]] = {"relu": nn.ReLU, "silu": nn.SiLU}
GATES: dict[str, type[nn.Module]] = {"se": SEModule, "eca": EcaModule}


# ---- layers ------------------------------------------------------------------------------------------------


class HaloAttention(nn.Module):
    """Attention of blocks to themselves and their halo, `(B, C, H, W)` to `(B, dim_out, H', W')`.

    `softmax(q . k / sqrt(D) + q . r_height + q . r_width)`. What lies outside of the map takes part as a key
    and a value of zeros. At stride 2 queries are every second pixel, or, where blocks are odd or `avg_down`
    asks for it, outputs are means of 2 x 2 pixels, fewer at an odd border (timm drops that).

    Args:
        dim, dim_out: channels in and out; by default the same.
        stride: 1 or 2.
        num_heads: of dim_out / num_heads channels of values each.
        dim_head: channels of queries and keys of a head; by default `qk_ratio` of those of the values.
        block_size, halo_size: pixels along a side of a block, and beyond it.
        qkv_bias: of the projections.
        avg_down: means instead of fewer queries.
        scale_pos_embed: the distances are scaled as the products are.
    """

    shift: Tensor | None

    def __init__(
        self,
        dim: int,
        dim_out: int | None = None,
        *,
        stride: int = 1,
        num_heads: int = 8,
        dim_head: int | None = None,
        block_size: int = 8,
        halo_size: int = 3,
        qk_ratio: float = 1.0,
        qkv_bias: bool = False,
        avg_down: bool = False,
        scale_pos_embed: bool = False,
    ) -> None:
        super().__init__()
        dim_out = dim_out or dim
        head_width(dim_out, num_heads)
        width = dim_head or make_divisible(dim_out * qk_ratio, 8) // num_heads
        self.num_heads, self.widths = num_heads, [width, dim_out // num_heads]
        self.block_size, self.halo_size = block_size, halo_size
        self.scale, self.scale_offsets = width**-0.5, scale_pos_embed
        self.pools = stride > 1 and (avg_down or block_size % stride != 0)
        self.stride = 1 if self.pools else stride
        self.q = nn.Linear(dim, num_heads * width, bias=qkv_bias)
        self.kv = nn.Linear(dim, num_heads * width + dim_out, bias=qkv_bias)
        distances = 2 * (block_size + 2 * halo_size) - 1
        self.height_rel = nn.Parameter(torch.empty(distances, width))
        self.width_rel = nn.Parameter(torch.empty(distances, width))
        self.register_buffer("shift", None)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        for layer in (self.q, self.kv):
            nn.init.trunc_normal_(layer.weight, std=layer.in_features**-0.5)
        for table in (self.height_rel, self.width_rel):
            nn.init.trunc_normal_(table, std=self.scale)

    def forward(self, x: Tensor) -> Tensor:
        x = x.permute(0, 2, 3, 1)
        pattern = Halo(x.shape[1:3], self.block_size, self.halo_size, stride=self.stride, bordered=True)
        q = self._heads(self.q(x[:, :: self.stride, :: self.stride]))
        k, v = (pattern.border(part) for part in self._heads(self.kv(x)).split(self.widths, -1))
        scaled = q * self.scale
        tables = [self.height_rel, self.width_rel]
        q, k = with_offsets(scaled, k, tables, pattern, like=scaled if self.scale_offsets else q)
        out = attend(q, k, v, pattern=pattern, scale=1.0).transpose(1, 2).flatten(2)
        if self.shift is not None:
            out = out + self.shift
        out = out.unflatten(1, pattern.queries).permute(0, 3, 1, 2)
        return halved(out) if self.pools else out

    def _heads(self, x: Tensor) -> Tensor:
        """`(B, H, W, heads D)` to `(B, heads, H W, D)`."""
        return x.flatten(1, 2).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)

    def scale_outputs_(self, scale: Tensor, shift: Tensor) -> None:
        """Continues with `y * scale + shift`."""
        values = slice(self.widths[0], None)
        scale = scale.view(self.num_heads, -1)
        self.kv.weight.unflatten(0, (self.num_heads, -1))[:, values].mul_(scale[..., None])
        if self.kv.bias is not None:
            self.kv.bias.unflatten(0, (self.num_heads, -1))[:, values].mul_(scale)
        self.shift = shift


def halved(x: Tensor) -> Tensor:
    """Means of 2 x 2 pixels, fewer at an odd border."""
    return F.avg_pool2d(x, 2, ceil_mode=True, count_include_pad=False)


class OtherAttention(nn.Module):
    """An attention layer of the zoo on the map, and at stride 2 means of 2 x 2 pixels after it."""

    def __init__(
        self, attention: Choice, dim: int, num_heads: int, shape: Sequence[int], stride: int
    ) -> None:
        super().__init__()
        self.layer = map_attention(attention, dim, num_heads, shape)
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        x = on_map(self.layer, x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        if self.stride == 1:
            return x
        return halved(x)


class Block(nn.Module):
    """`act(shortcut(x) + reduce(middle(act(expand(x)))))`.

    Args:
        dim, dim_out, width: channels of x, of the result, and of what the middle sees.
        stride: of the shortcut, and of the middle.
        middle: a convolution with a gate, or attention.
        act: of the block.
        rate: of stochastic depth.
    """

    def __init__(
        self,
        dim: int,
        dim_out: int,
        width: int,
        stride: int,
        middle: nn.Module,
        act: type[nn.Module],
        rate: float,
    ) -> None:
        super().__init__()
        same = dim == dim_out and stride == 1
        self.shortcut = nn.Identity() if same else ConvNorm(dim, dim_out, 1, stride)
        self.expand = ConvNorm(dim, width)
        self.middle = middle
        self.reduce = ConvNorm(width, dim_out, gain=0.0)
        self.drop_path = DropPath(rate)
        self.act = act()

    def forward(self, x: Tensor) -> Tensor:
        y = self.reduce(self.middle(self.act(self.expand(x))))
        return self.act(self.shortcut(x) + self.drop_path(y))


class Convolution(nn.Module):
    """A 3 x 3 convolution, and a gate on its channels."""

    def __init__(self, dim: int, stride: int, groups: int, gate: str | None, act: type[nn.Module]) -> None:
        super().__init__()
        self.conv = ConvNorm(dim, dim, 3, stride, groups=groups)
        self.act = act()
        self.gate = nn.Identity() if gate is None else GATES[gate](dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.gate(self.act(self.conv(x)))


class Attention(nn.Module):
    """Attention and its norm."""

    norm: nn.Module

    def __init__(self, attn: nn.Module, dim: int, act: type[nn.Module]) -> None:
        super().__init__()
        self.attn = attn
        self.norm = nn.BatchNorm2d(dim)
        self.act = act()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.norm(self.attn(x)))

    def fuse_(self) -> None:
        """Folds the norm into the values."""
        if isinstance(self.attn, HaloAttention):
            assert isinstance(self.norm, nn.BatchNorm2d)
            self.attn.scale_outputs_(*scale_and_shift(self.norm))
            self.norm = nn.Identity()


class Stem(nn.Sequential):
    """Three convolutions of 3 x 3 to a quarter of the resolution, the last step by pooling if `pool`."""

    def __init__(self, in_chans: int, dim: int, pool: bool, act: type[nn.Module]) -> None:
        dims = [in_chans, 3 * dim // 8, dim // 2, dim]
        layers: list[nn.Module] = []
        for i, stride in enumerate((2, 1, 1 if pool else 2)):
            layers += [ConvNorm(dims[i], dims[i + 1], 3, stride), act()]
        super().__init__(*layers, *([nn.MaxPool2d(3, 2, 1)] if pool else []))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.contiguous(memory_format=torch.channels_last))


# ---- the network -------------------------------------------------------------------------------------------


class HaloNet(Backbone):
    """HaloNet.

    Args:
        dims, depths: channels and blocks of the four stages.
        bottle_ratios: width inside the blocks of a stage by its channels.
        attention_blocks: numbers of the blocks of each stage that attend, counted from 0.
        num_heads: of each stage.
        dim_head: channels of queries and keys of a head; by default those of the values.
        block_size, halo_size: pixels along a side of a block, and beyond it.
        group_width: channels of a group of the 3 x 3 convolutions; None = one group.
        gate: of the convolutions: `se`, `eca` or None.
        act: `relu` or `silu`.
        stem_dim: channels of the stem.
        stem_pool: the stem ends with pooling instead of a stride.
        last_dim: channels of a further 1 x 1 convolution at the end of the last stage; None = there is none.
        attention: a layer of the zoo in place of halo attention: a name, or a mapping with its name and
            arguments (`zoo list attention`).
    """

    first_conv = "stem.0.conv"
    cfg: ClassVar[dict[str, Any]] = {
        "license": "apache-2.0",
        "input_size": (3, 256, 256),
        "min_input_size": (3, 256, 256),
        "crop_pct": 0.94,
    }

    def __init__(
        self,
        *,
        dims: Sequence[int] = (256, 512, 1024, 2048),
        depths: Sequence[int] = (2, 2, 2, 2),
        bottle_ratios: Sequence[float] = (0.25, 0.25, 0.25, 0.25),
        attention_blocks: Sequence[Sequence[int]] = ((), (), (1,), (0, 1)),
        num_heads: Sequence[int] = (8, 8, 8, 8),
        dim_head: int | None = None,
        block_size: int = 8,
        halo_size: int = 2,
        group_width: int | None = None,
        gate: str | None = None,
        act: str = "silu",
        stem_dim: int = 64,
        stem_pool: bool = True,
        last_dim: int | None = None,
        attention: Choice | None = None,
        img_size: int | Sequence[int] = 256,
        **options: Any,
    ) -> None:
        super().__init__(img_size=img_size, **options)
        if not len(dims) == len(depths) == len(bottle_ratios) == len(attention_blocks) == len(num_heads) == 4:
            raise ConfigError(
                "dims, depths, bottle_ratios, attention_blocks and num_heads have four entries, one a stage."
            )
        if act not in ACTIVATIONS or (gate is not None and gate not in GATES):
            raise ConfigError(
                f"act is one of {', '.join(ACTIVATIONS)}, not {act!r}; gate is null or one of "
                f"{', '.join(GATES)}, not {gate!r}."
            )
        self.attention = attention
        activation = ACTIVATIONS[act]
        sides = self.pretrained_cfg["input_size"][1:]

        def middle(stage: int, width: int, stride: int, attends: bool) -> nn.Module:
            if not attends:
                groups = 1 if group_width is None else width // group_width
                return Convolution(width, stride, groups, gate, activation)
            if attention is None:
                attn: nn.Module = HaloAttention(
                    width,
                    stride=stride,
                    num_heads=num_heads[stage],
                    dim_head=dim_head,
                    block_size=block_size,
                    halo_size=halo_size,
                )
            else:
                shape = [-(-side // (2 ** (stage + 2) // stride)) for side in sides]
                attn = OtherAttention(attention, width, num_heads[stage], shape, stride)
            return Attention(attn, width, activation)

        self.stem = Stem(self.in_chans, stem_dim, stem_pool, activation)
        stages: list[nn.Sequential] = []
        before = stem_dim
        for i, rates in enumerate(self.drop_path_rates(depths)):
            width = make_divisible(dims[i] * bottle_ratios[i])
            blocks: list[nn.Module] = []
            for b, rate in enumerate(rates):
                stride = 2 if i and not b else 1
                layer = middle(i, width, stride, b in attention_blocks[i])
                blocks.append(Block(before, dims[i], width, stride, layer, activation, rate))
                before = dims[i]
            stages.append(nn.Sequential(*blocks))
        if last_dim is not None:
            stages[-1].append(nn.Sequential(ConvNorm(before, last_dim), activation()))
        self.stages = nn.Sequential(*stages)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out")
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        self.finish([*dims[:3], last_dim or dims[3]], strides=(4, 8, 16, 32))


class HaloNet26(HaloNet):
    """HaloNet, whose published weights look at more of an image."""

    cfg: ClassVar[dict[str, Any]] = HaloNet.cfg | {"crop_pct": 0.95}


# ---- variants ----------------------------------------------------------------------------------------------

_register = partial(
    register_model,
    model=HaloNet,
    paper=(
        "Vaswani et al., Scaling Local Self-Attention for Parameter Efficient Visual Backbones, CVPR 2021, "
        "arXiv 2103.12731"
    ),
    licence="Apache-2.0",
    source="https://github.com/huggingface/pytorch-image-models",
    status="official parity",
    official=HaloNetOfficial,
    preprocessing={"resize": "272, bicubic", "crop": "256, centre", "normalise": "ImageNet mean and std"},
)


@_register(
    model=HaloNet26,
    summary="ResNet-26 with blocked local attention in the last stages, 12.5 M parameters",
    weights=("halonet26t_a1h_in1k",),
    preprocessing={"resize": "269, bicubic", "crop": "256, centre", "normalise": "ImageNet mean and std"},
)
def halonet26t(*, act: str = "relu", **kwargs: Any) -> HaloNet:
    return HaloNet26(act=act, **kwargs)


@_register(
    summary="ResNet-50 with blocked local attention in every second block, 22.7 M parameters",
    weights=("halonet50ts_a1h_in1k",),
)
def halonet50ts(
    *,
    depths: Sequence[int] = (3, 4, 6, 3),
    attention_blocks: Sequence[Sequence[int]] = ((), (3,), (1, 3, 5), (1,)),
    num_heads: Sequence[int] = (8, 4, 8, 8),
    halo_size: int = 3,
    **kwargs: Any,
) -> HaloNet:
    return HaloNet(
        depths=depths, attention_blocks=attention_blocks, num_heads=num_heads, halo_size=halo_size, **kwargs
    )


@_register(
    summary="ResNet-33 with squeeze-and-excitation and blocked local attention, 13.7 M parameters",
    weights=("sehalonet33ts_ra2_in1k",),
)
def sehalonet33ts(
    *,
    dims: Sequence[int] = (256, 512, 1024, 1536),
    depths: Sequence[int] = (2, 3, 3, 2),
    bottle_ratios: Sequence[float] = (0.25, 0.25, 0.25, 0.333),
    attention_blocks: Sequence[Sequence[int]] = ((), (2,), (2,), (0, 1)),
    halo_size: int = 3,
    gate: str | None = "se",
    stem_pool: bool = False,
    last_dim: int | None = 1280,
    **kwargs: Any,
) -> HaloNet:
    return HaloNet(
        dims=dims,
        depths=depths,
        bottle_ratios=bottle_ratios,
        attention_blocks=attention_blocks,
        halo_size=halo_size,
        gate=gate,
        stem_pool=stem_pool,
        last_dim=last_dim,
        **kwargs,
    )


@_register(
    summary="ResNeXt-26 with channel gates and blocked local attention, 10.8 M parameters",
    weights=("eca_halonext26ts_c1_in1k",),
)
def eca_halonext26ts(
    *, dim_head: int | None = 16, group_width: int | None = 16, gate: str | None = "eca", **kwargs: Any
) -> HaloNet:
    return HaloNet(dim_head=dim_head, group_width=group_width, gate=gate, **kwargs)
