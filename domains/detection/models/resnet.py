"""ResNet (He et al. 2015, with the stride in the 3 x 3 convolution) as detectors use it.

Tensor names are torchvision's. Norms that no longer follow the batch are folded into the convolution before
them at every call: nothing but the folded result is kept for a backward pass. Maps are channels-last in
memory.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models import resnet as torchvision_resnet
from torchvision.ops import FrozenBatchNorm2d

from zoo.errors import ConfigError
from zoo.layers.conv import folded, scale_and_shift


def conv_norm(
    x: Tensor, conv: nn.Conv2d, norm: Any, *, relu: bool = False, plus: Tensor | None = None
) -> Tensor:
    """`norm(conv(x))`, then `+ plus`, then relu; one convolution unless the norm follows the batch."""
    if isinstance(norm, nn.BatchNorm2d) and norm.training:
        return _finished(norm(conv(x)), relu, plus)
    if isinstance(norm, nn.Identity):  # folded once and for all
        weight, shift = conv.weight, conv.bias
    else:
        scale, shift = scale_and_shift(norm)
        weight = conv.weight * scale[:, None, None, None]
    pixelwise = conv.kernel_size == conv.stride == (1, 1)
    if _runs_in_one(x) and not (pixelwise and conv.in_channels > 128):
        return _in_one(x, conv, weight, shift, relu, plus)
    if pixelwise:  # a matrix product: on a CPU faster, and over many channels more exact
        y = F.linear(x.permute(0, 2, 3, 1), weight.flatten(1), shift).permute(0, 3, 1, 2)
    else:
        y = F.conv2d(x, weight, shift, conv.stride, conv.padding, conv.dilation)  # pyright: ignore
    return _finished(y, relu, plus)


def _finished(y: Tensor, relu: bool, plus: Tensor | None) -> Tensor:
    if plus is not None:
        y = y.add_(plus)
    return y.relu_() if relu else y


def _runs_in_one(x: Tensor) -> bool:
    """Whether oneDNN does convolution, sum and relu in one pass over the map: on a CPU, without gradients."""
    return (
        not torch.compiler.is_compiling()
        and not torch.is_grad_enabled()
        and x.device.type == "cpu"
        and x.dtype == torch.float32
        and not torch.is_autocast_enabled("cpu")
        and torch.backends.mkldnn.is_available()
    )


def _in_one(
    x: Tensor, conv: nn.Conv2d, weight: Tensor, shift: Tensor | None, relu: bool, plus: Tensor | None
) -> Tensor:
    shape = (conv.padding, conv.stride, conv.dilation, conv.groups)
    if plus is None:
        done = "relu" if relu else "none"
        return torch.ops.mkldnn._convolution_pointwise(x, weight, shift, *shape, done, [], "")
    binary = torch.ops.mkldnn._convolution_pointwise_.binary
    return binary(plus, x, weight, shift, *shape, "add", 1.0, "relu" if relu else None, [], None)


def _shortcut(x: Tensor, downsample: nn.Module | None) -> Tensor:
    if downsample is None:
        return x
    conv, norm = downsample.children()
    assert isinstance(conv, nn.Conv2d)
    return conv_norm(x, conv, norm)


class BasicBlock(torchvision_resnet.BasicBlock):
    """Two 3 x 3 convolutions."""

    def forward(self, x: Tensor) -> Tensor:
        y = conv_norm(x, self.conv1, self.bn1, relu=True)
        return conv_norm(y, self.conv2, self.bn2, relu=True, plus=_shortcut(x, self.downsample))


class Bottleneck(torchvision_resnet.Bottleneck):
    """A 3 x 3 convolution between two 1 x 1 ones."""

    def forward(self, x: Tensor) -> Tensor:
        y = conv_norm(x, self.conv1, self.bn1, relu=True)
        y = conv_norm(y, self.conv2, self.bn2, relu=True)
        return conv_norm(y, self.conv3, self.bn3, relu=True, plus=_shortcut(x, self.downsample))


class Layout(NamedTuple):
    """Blocks of a ResNet."""

    block: type[BasicBlock] | type[Bottleneck]
    depths: tuple[int, ...]
    width: int = 64


LAYOUTS = {
    "resnet18": Layout(BasicBlock, (2, 2, 2, 2)),
    "resnet34": Layout(BasicBlock, (3, 4, 6, 3)),
    "resnet50": Layout(Bottleneck, (3, 4, 6, 3)),
    "resnet101": Layout(Bottleneck, (3, 4, 23, 3)),
    "resnet152": Layout(Bottleneck, (3, 8, 36, 3)),
    "resnet_mini": Layout(BasicBlock, (1, 1, 1), 32),
}
"""`resnet_mini` is for training from scratch on a CPU: three stages, strides 4, 8 and 16."""


class ResNet(nn.Module):
    """Images `(B, 3, H, W)` to the maps of the last stages, fine to coarse.

    Args:
        name: one of `LAYOUTS`.
        levels: how many maps.
        dilation: the last stage keeps the resolution of the one before and dilates its convolutions (DC5).
        norm: `frozen` (four buffers, as detectors have it) or `batch`.
        frozen_stages: so many parts do not train: the stem is the first, stage 1 the second.

    Raises:
        ConfigError: an unknown name or norm, more levels than stages, dilation of basic blocks.
    """

    def __init__(
        self,
        name: str = "resnet50",
        levels: int = 1,
        *,
        dilation: bool = False,
        norm: str = "frozen",
        frozen_stages: int = 2,
    ) -> None:
        super().__init__()
        block, depths, width = _layout(name, levels, dilation)
        if norm not in ("frozen", "batch"):
            raise ConfigError(f"The norm of a ResNet is frozen or batch, not {norm!r}.")
        norm_layer = FrozenBatchNorm2d if norm == "frozen" else nn.BatchNorm2d
        self.conv1 = nn.Conv2d(3, width, 7, stride=2, padding=3, bias=False)
        self.bn1 = norm_layer(width)
        self.stages, self.levels, channels = len(depths), levels, width
        strides: list[int] = []
        for i, depth in enumerate(depths):
            dilated = dilation and i == len(depths) - 1
            stride = 1 if i == 0 or dilated else 2
            stage = _stage(block, channels, width * 2**i, depth, stride, 2 if dilated else 1, norm_layer)
            self.add_module(f"layer{i + 1}", stage)
            channels = width * 2**i * block.expansion
            strides.append(stride * (strides[-1] if strides else 4))
        self.channels = tuple(width * 2**i * block.expansion for i in range(len(depths)))[-levels:]
        """Of each map."""
        self.strides = tuple(strides[-levels:])
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        self.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
        parts = [nn.ModuleList([self.conv1, self.bn1]), *self._stages()]
        for part in parts[:frozen_stages]:
            part.requires_grad_(False)

    def _stages(self) -> list[nn.Module]:
        return [self.get_submodule(f"layer{i + 1}") for i in range(self.stages)]

    def forward(self, x: Tensor) -> list[Tensor]:
        x = x.contiguous(memory_format=torch.channels_last)
        x = F.max_pool2d(conv_norm(x, self.conv1, self.bn1, relu=True), 3, stride=2, padding=1)
        maps = []
        for stage in self._stages():
            x = stage(x)
            maps.append(x)
        return maps[-self.levels :]

    def fuse_(self) -> None:
        """Folds every norm into its convolution, for inference."""
        for module in list(self.modules()):
            names = [(f"conv{i}", f"bn{i}") for i in (1, 2, 3)] + [("0", "1")]
            for conv, norm in names:
                found, follower = getattr(module, conv, None), getattr(module, norm, None)
                if isinstance(found, nn.Conv2d) and isinstance(follower, (FrozenBatchNorm2d, nn.BatchNorm2d)):
                    setattr(module, conv, folded(found, follower))  # pyright: ignore[reportArgumentType]
                    setattr(module, norm, nn.Identity())


def _layout(name: str, levels: int, dilation: bool) -> Layout:
    if name not in LAYOUTS:
        raise ConfigError(f"There is no {name!r}. ResNets: {', '.join(LAYOUTS)}.")
    layout = LAYOUTS[name]
    if not 1 <= levels <= len(layout.depths):
        raise ConfigError(f"{name} has 1 to {len(layout.depths)} levels, not {levels}.")
    if dilation and layout.block is BasicBlock:
        raise ConfigError(f"{name} has basic blocks, which cannot be dilated: DC5 needs resnet50 or deeper.")
    return layout


def _stage(
    block: Any,
    channels: int,
    width: int,
    depth: int,
    stride: int,
    dilation: int,
    norm_layer: Any,
) -> nn.Sequential:
    """The first block keeps the dilation of the stage before, which is 1."""
    out = width * block.expansion
    downsample = None
    if stride != 1 or channels != out:
        downsample = nn.Sequential(
            nn.Conv2d(channels, out, 1, stride=stride, bias=False),
            norm_layer(out),
        )
    first = block(channels, width, stride, downsample, norm_layer=norm_layer)
    rest = [block(out, width, dilation=dilation, norm_layer=norm_layer) for _ in range(depth - 1)]
    return nn.Sequential(first, *rest)
