"""ResNet (He et al. 2015, with the stride in the 3 x 3 convolution) as detectors use it.

Tensor names are torchvision's. Norms that no longer follow the batch are folded into the convolution before
them at every call: nothing but the folded result is kept for a backward pass. Maps are channels-last in
memory. A fused copy has them folded once and its weights prepared (`FoldedConv`).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models import resnet as torchvision_resnet
from torchvision.ops import FrozenBatchNorm2d

from domains.detection.models.common import by_onednn
from zoo.errors import ConfigError
from zoo.layers.conv import folded, scale_and_shift
from zoo.layers.winograd import TILE, winograd_conv, winograd_weight


def conv_norm(
    x: Tensor, conv: nn.Conv2d, norm: Any, *, relu: bool = False, plus: Tensor | None = None
) -> Tensor:
    """`norm(conv(x))`, then `+ plus`, then relu; one convolution unless the norm follows the batch."""
    if isinstance(norm, nn.BatchNorm2d) and norm.training:
        return _finished(norm(_convolved(x, conv, conv.weight, None)), relu, plus)
    if isinstance(norm, nn.Identity):  # folded once and for all
        return _convolved(x, conv, conv.weight, conv.bias, relu, plus)
    scale, shift = scale_and_shift(norm)
    return _convolved(x, conv, conv.weight * scale[:, None, None, None], shift, relu, plus)


def _convolved(
    x: Tensor,
    conv: nn.Conv2d,
    weight: Tensor,
    shift: Tensor | None,
    relu: bool = False,
    plus: Tensor | None = None,
) -> Tensor:
    """As `conv` with another weight and shift, then `+ plus`, then relu."""
    where = Geometry.of(conv)
    if by_onednn(x):
        if torch.is_grad_enabled():
            return TrainedConv.apply(x, weight, shift, plus, relu, where)  # pyright: ignore
        if isinstance(conv, FoldedConv):
            return conv.run(x, relu, plus)
        if not _sums_many(weight, where):
            return _in_one(x, weight, shift, where, relu, plus)
    return _finished(_plain(x, weight, shift, where), relu, plus)


class Geometry(NamedTuple):
    """How a convolution moves over its map."""

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]

    @classmethod
    def of(cls, conv: nn.Conv2d) -> Geometry:
        assert not isinstance(conv.padding, str)
        return cls(conv.stride, conv.padding, conv.dilation)


def _plain(x: Tensor, weight: Tensor, shift: Tensor | None, where: Geometry) -> Tensor:
    if _pixelwise(weight) and where.stride == (1, 1):  # a matrix product: over many channels more exact
        return _maps(F.linear(_pixels(x), weight.flatten(1), shift))
    return F.conv2d(x, weight, shift, *where)


def _finished(y: Tensor, relu: bool, plus: Tensor | None) -> Tensor:
    if plus is not None:
        y = y.add_(plus)
    return y.relu_() if relu else y


def _pixelwise(weight: Tensor) -> bool:
    return weight.shape[2:] == (1, 1)


def _sums_many(weight: Tensor, where: Geometry) -> bool:
    """Whether a matrix product is more exact than oneDNN's convolution."""
    return _pixelwise(weight) and where.stride == (1, 1) and weight.shape[1] > 128


def _pixels(x: Tensor) -> Tensor:
    """`(B, C, H, W) -> (B, H, W, C)`"""
    return x.permute(0, 2, 3, 1)


def _maps(x: Tensor) -> Tensor:
    """`(B, H, W, C) -> (B, C, H, W)`"""
    return x.permute(0, 3, 1, 2)


def _in_one(
    x: Tensor, weight: Tensor, shift: Tensor | None, where: Geometry, relu: bool, plus: Tensor | None
) -> Tensor:
    """The sum replaces `plus`."""
    shape = (where.padding, where.stride, where.dilation, 1)
    if plus is None:
        done = "relu" if relu else "none"
        return torch.ops.mkldnn._convolution_pointwise(x, weight, shift, *shape, done, [], "")
    binary = torch.ops.mkldnn._convolution_pointwise_.binary
    return binary(plus, x, weight, shift, *shape, "add", 1.0, "relu" if relu else None, [], None)


class TrainedConv(torch.autograd.Function):
    """Convolution of channels-last maps, sum and relu, with each gradient in the layout that suits it.

    On a CPU oneDNN has the gradient of maps fastest where channels are last, but that of a 3 x 3 weight over
    64 channels or more up to four times as fast from maps that are contiguous: they are copied for it.
    """

    @staticmethod
    def forward(
        x: Tensor,
        weight: Tensor,
        shift: Tensor | None,
        plus: Tensor | None,
        relu: bool,
        where: Geometry,
    ) -> Tensor:
        if plus is None and not _sums_many(weight, where):
            return _in_one(x, weight, shift, where, relu, None)
        return _finished(_plain(x, weight, shift, where), relu, plus)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, weight, _, _, ctx.relu, ctx.where = inputs
        ctx.save_for_backward(x, weight, output if ctx.relu else None)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore
        x, weight, y = ctx.saved_tensors
        if ctx.relu:
            grad = torch.ops.aten.threshold_backward(grad, y, 0)
        grad = grad.contiguous(memory_format=torch.channels_last)
        for_x, for_weight, for_shift, for_plus, *_ = ctx.needs_input_grad
        return (
            _grad_of_map(grad, x, weight, ctx.where) if for_x else None,
            _grad_of_weight(grad, x, weight, ctx.where) if for_weight else None,
            grad.sum((0, 2, 3)) if for_shift else None,
            grad if for_plus else None,
            None,
            None,
        )


def _grad_of_map(grad: Tensor, x: Tensor, weight: Tensor, where: Geometry) -> Tensor:
    if _pixelwise(weight) and where.stride == (1, 1):
        return _maps(F.linear(_pixels(grad), weight.flatten(1).t()))
    wanted = [True, False, False]
    return torch.ops.aten.convolution_backward(grad, x, weight, None, *where, False, [0, 0], 1, wanted)[0]


def _grad_of_weight(grad: Tensor, x: Tensor, weight: Tensor, where: Geometry) -> Tensor:
    if _pixelwise(weight):
        down, across = where.stride
        rows = _pixels(x)[:, ::down, ::across].flatten(0, 2)
        return (_pixels(grad).flatten(0, 2).t() @ rows)[:, :, None, None]
    if x.shape[1] >= 64:
        grad, x, weight = (part.contiguous() for part in (grad, x, weight))
    wanted = [False, True, False]
    return torch.ops.aten.convolution_backward(grad, x, weight, None, *where, False, [0, 0], 1, wanted)[1]


class FoldedConv(nn.Conv2d):
    """A convolution with its norm folded in, for inference on channels-last maps.

    The weight is kept as well in the order in which oneDNN reads it, or, for 3 x 3 over many channels,
    transformed for Winograd's algorithm: from the first call on, and made anew where the weight has changed.
    """

    def __init__(self, conv: nn.Conv2d) -> None:
        nn.Module.__init__(self)
        self.__dict__.update(conv.__dict__)
        self._ready: dict[bool, tuple[Any, Tensor]] = {}

    def run(self, x: Tensor, relu: bool, plus: Tensor | None) -> Tensor:
        """The convolution, then `+ plus`, which it replaces, then relu; in float32 on a CPU."""
        assert self.bias is not None
        if self._multiplies_less(x):
            return _finished(winograd_conv(x, self._prepared(x, True), self.bias), relu, plus)
        return _in_one(x, self._prepared(x, False), self.bias, Geometry.of(self), relu, plus)

    def _multiplies_less(self, x: Tensor) -> bool:
        """Whether Winograd's algorithm is worth its transforms and its larger weights."""
        tiles = len(x) * (x.shape[2] // TILE) * (x.shape[3] // TILE)
        ones = self.stride == self.padding == self.dilation == (1, 1)
        return self.kernel_size == (3, 3) and ones and x.shape[1] >= 256 and tiles >= 12

    @property
    def prepared_for_winograd(self) -> bool:
        """Whether a call has used Winograd's algorithm."""
        return True in self._ready

    def _prepared(self, x: Tensor, winograd: bool) -> Tensor:
        weight = self.weight.detach()
        state = (weight.data_ptr(), None if weight.is_inference() else weight._version)
        if winograd not in self._ready or self._ready[winograd][0] != state:
            with torch.no_grad():
                made = winograd_weight(weight) if winograd else self._packed(x)
            self._ready[winograd] = state, made
        return self._ready[winograd][1]

    def _packed(self, x: Tensor) -> Tensor:
        reorder: Any = torch.ops.aten.mkldnn_reorder_conv2d_weight
        shape = (self.padding, self.stride, self.dilation, self.groups, list(x.shape))
        return reorder(self.weight.detach().to_mkldnn(), *shape)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_ready": {}}


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
                    setattr(module, conv, FoldedConv(folded(found, follower)))  # pyright: ignore
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
