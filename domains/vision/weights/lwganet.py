"""Official checkpoints of LWGANet: classifiers, and dense-prediction backbones (`norm0` ... `norm6`)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from domains.vision.weights.layout import VisionLayout
from zoo.errors import CheckpointError

_MODULES = {
    "PA.p_conv.0": "point.expand",
    "PA.p_conv.1": "point.norm",
    "PA.p_conv.3": "point.reduce",
    "LA.conv.0": "local.0.conv",
    "LA.conv.1": "local.0.norm",
    "MRA.norm": "medium.norm",
    "GA12.proj_1": "far.inner",
    "GA12.conv0": "far.conv_near",
    "GA12.conv_spatial": "far.conv_wide",
    "GA12.conv1": "far.near",
    "GA12.conv2": "far.wide",
    "GA12.conv_squeeze": "far.gates",
    "GA12.conv": "far.mix",
    "GA12.proj_2": "far.outer",
    "GA3.attn.qkv": "far.attention.qkv",
    "GA3.attn.proj": "far.attention.proj",
    "GA3.norm": "far.norm",
    "GA4.qkv": "far.qkv",
    "GA4.proj": "far.proj",
    "norm": "far_norm",
    "norm1": "norm",
    "mlp.0": "expand",
    "mlp.1": "mlp_norm",
    "mlp.3": "reduce",
}
"""Modules of a block, official names to ours."""

_STRIPS = ("MRA.H_att1", "MRA.V_att1", "MRA.H_att2", "MRA.V_att2")
"""In our order; the second and fourth lie on their side, ours stand."""

_DOWNSAMPLE = {
    "conv": "conv",
    "conv_c": "reduce",
    "norm_c": "norm_conv",
    "norm_m": "norm_pool",
    "fusion": "fusion",
}
_LINEAR = ("GA3.attn.qkv", "GA3.attn.proj", "GA4.qkv", "GA4.proj", "head")
"""Official linear layers; every other matrix of ours is a 1 x 1 convolution there."""

_BLUR = "MRA.max_m2.filt"
"""A fixed filter, in official files once per block and channel."""

_KINDS = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")

Change = Callable[[Tensor], Tensor]


class _Link(NamedTuple):
    official: str
    ours: str
    export: Change
    load: Change
    part: int | None = None
    """Which of the four strips."""


class LWGANetOfficial(VisionLayout):
    """State dicts of the official LWGANet.

    Its down-samplers keep the two filters of a channel side by side; here the first ones of all channels come
    before the second ones.
    """

    ignored = ()
    optional = ("*.num_batches_tracked", f"*.{_BLUR}")
    first_conv = "Stem.proj.weight"
    head = ("head.*", "avgpool_pre_head.*")
    added = ("norm[0246].*",)

    @staticmethod
    def canonical(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
        """Detectors and segmenters hold the backbone beside other parts, as `backbone.` or deeper."""
        first = LWGANetOfficial.first_conv
        prefix = next((name.removesuffix(first) for name in state_dict if name.endswith(first)), "")
        return {
            name.removeprefix(prefix): tensor
            for name, tensor in state_dict.items()
            if name.startswith(prefix)
        }

    @staticmethod
    def config(
        state_dict: dict[str, Tensor],
        *,
        in_chans: int | None = None,
        num_classes: int | None = None,
        act_layer: str | None = None,
        stem_dim: int | None = None,
        depths: Sequence[int] | None = None,
        att_kernel: Sequence[int] | None = None,
        mlp_ratio: float | None = None,
        feature_dim: int | None = None,
        drop_path_rate: float | None = None,
        fork_feat: bool | None = None,
    ) -> dict[str, Any]:
        """What a checkpoint does not tell: `act_layer`, otherwise of the named variant, but ReLU where the
        stem has 96 channels, which dense prediction insists on; and `drop_path_rate`."""
        dim, channels = state_dict["Stem.proj.weight"].shape[:2]
        stages = [f"stages.{2 * i}.blocks." for i in range(4)]
        blocks = [{n.split(".")[3] for n in state_dict if n.startswith(stage)} for stage in stages]
        strips = [state_dict[f"{stage}0.MRA.H_att1.weight"] for stage in stages]
        classifies, normalises = "head.weight" in state_dict, "norm0.weight" in state_dict
        dense = normalises and not classifies if fork_feat is None else fork_feat
        if dim == 96 and (dense or act_layer is None):
            act_layer = "ReLU"
        config: dict[str, Any] = {
            "dim": stem_dim or dim,
            "in_chans": in_chans or channels,
            "depths": depths or [len(found) for found in blocks],
            "kernel_sizes": att_kernel or [strip.shape[2] for strip in strips],
            "mlp_ratio": mlp_ratio or len(state_dict["stages.0.blocks.0.mlp.0.weight"]) / dim,
        }
        if act_layer is not None:
            config["act"] = act_layer.lower()
        if drop_path_rate is not None:
            config["drop_path_rate"] = drop_path_rate
        if dense:
            return config | {"features_only": True, "out_norms": True}
        if normalises:
            config["out_norms"] = True
        if not classifies:
            return config | {"num_classes": 0}
        classes, width = state_dict["head.weight"].shape
        return config | {"num_classes": num_classes or classes, "head_width": feature_dim or width}

    @staticmethod
    def to_zoo(state_dict: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
        own = model.state_dict()
        for name, tensor in state_dict.items():
            if name.endswith(_BLUR) and not torch.allclose(tensor, blur_filter(len(tensor)).to(tensor)):
                raise CheckpointError(
                    f"{name} is not the blur filter of LWGANet, (1, 3, 3, 1) x (1, 3, 3, 1) / 64."
                )
        out = {name: torch.tensor(0) for name in own if name.endswith("num_batches_tracked")}
        strips: dict[str, list[Tensor]] = {}
        for link in _links(model):
            if link.ours not in own or link.official not in state_dict:
                continue
            tensor = state_dict[link.official]
            tensor = link.load(tensor.flatten(1) if own[link.ours].ndim == 2 else tensor)
            if link.part is None:
                out[link.ours] = tensor
            else:
                strips.setdefault(link.ours, []).append(tensor)
        return out | {name: torch.cat(parts, 1) for name, parts in strips.items()}

    @staticmethod
    def to_official(state_dict: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
        out = {}
        for link in _links(model):
            if link.ours not in state_dict:
                continue
            tensor = state_dict[link.ours]
            tensor = link.export(tensor if link.part is None else tensor[:, link.part : link.part + 1])
            linear = link.official.rpartition(".")[0].endswith(_LINEAR)
            out[link.official] = tensor if tensor.ndim != 2 or linear else tensor[:, :, None, None]
        # Running means are in whole state dicts, not among gradients.
        means = [name for name in out if name.endswith("MRA.norm.running_mean")]
        blurs = {
            name.replace("MRA.norm.running_mean", _BLUR): blur_filter(len(out[name])).to(out[name])
            for name in means
        }
        return {name: tensor.contiguous() for name, tensor in (out | blurs).items()}


def blur_filter(width: int) -> Tensor:
    """The fixed filter of the medium range, one copy per channel, `(C, 1, 4, 4)`."""
    taps = torch.tensor([1.0, 3.0, 3.0, 1.0]) / 8
    return torch.outer(taps, taps).repeat(width, 1, 1, 1)


def _links(model: nn.Module) -> Iterator[_Link]:
    """Every tensor that a model of any form and size may have."""
    yield from _module("Stem.proj", "stem.conv")
    yield from _module("Stem.norm", "stem.norm")
    for i, stage in enumerate(model.stages):  # type: ignore[arg-type]
        if i:
            for official, ours in _DOWNSAMPLE.items():
                yield from _downsample(f"stages.{2 * i - 1}.{official}", f"stages.{i}.0.{ours}")
        for there, here in enumerate(range(min(i, 1), len(stage))):
            yield from _block(f"stages.{2 * i}.blocks.{there}", f"stages.{i}.{here}")
        yield from _module(f"norm{2 * i}", f"out_norms.{i}")
    yield from _module("avgpool_pre_head.1", "pre_head.proj")
    yield from _module("head", "head")


def _block(official: str, ours: str) -> Iterator[_Link]:
    for there, here in _MODULES.items():
        yield from _module(f"{official}.{there}", f"{ours}.{here}")
    for part, there in enumerate(_STRIPS):
        change = _upright if part % 2 else _same
        yield _Link(f"{official}.{there}.weight", f"{ours}.medium.strips", change, change, part)


def _downsample(official: str, ours: str) -> Iterator[_Link]:
    if official.endswith("fusion"):
        yield _Link(f"{official}.weight", f"{ours}.weight", _columns_paired, _columns_split)
        yield _Link(f"{official}.bias", f"{ours}.bias", _same, _same)
        return
    for link in _module(official, ours):
        counter = link.ours.endswith("num_batches_tracked")
        yield link if counter else link._replace(export=_paired, load=_split)


def _module(official: str, ours: str) -> Iterator[_Link]:
    for kind in _KINDS:
        yield _Link(f"{official}.{kind}", f"{ours}.{kind}", _same, _same)


def _same(tensor: Tensor) -> Tensor:
    return tensor


def _upright(tensor: Tensor) -> Tensor:
    return tensor.mT


def _paired(tensor: Tensor) -> Tensor:
    """First and second filters of all channels to the two filters of each channel."""
    return tensor.unflatten(0, (2, -1)).transpose(0, 1).flatten(0, 1)


def _split(tensor: Tensor) -> Tensor:
    return tensor.unflatten(0, (-1, 2)).transpose(0, 1).flatten(0, 1)


def _columns_paired(matrix: Tensor) -> Tensor:
    """`_paired` on the inputs of the fusion, in both of its halves."""
    return torch.cat([_paired(half.T).T for half in matrix.chunk(2, 1)], 1)


def _columns_split(matrix: Tensor) -> Tensor:
    return torch.cat([_split(half.T).T for half in matrix.chunk(2, 1)], 1)
