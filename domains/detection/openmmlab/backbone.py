"""Backbones of the zoo and of timm for any detector of mmdet."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib import import_module
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from domains.detection.models.backbones import Features, create_backbone
from domains.detection.models.resnet import LAYOUTS
from domains.detection.models.swin import SWINS
from domains.detection.openmmlab.reading import read_weights
from zoo.errors import ConfigError
from zoo.weights.checkpoint import LoadReport, load_state
from zoo.weights.exchange import load_weights

BaseModule: Any = import_module("mmengine.model").BaseModule

MATCHERS = {"ResNet": (r"^conv1|^bn1", r"^layer(\d+)"), "Swin": (r"^patch_embed", r"^(?:layers\.|norm)(\d+)")}
"""Names of the parameters of stem and stages, of the backbones that are not timm's."""


class ZooBackbone(BaseModule):
    """Images `(B, 3, H, W)`, normalised by the data preprocessor, to a tuple of maps, fine to coarse.

    `channels` and `strides` tell of each map; the `in_channels` of a neck are `channels`.

    Args:
        name: a ResNet or Swin of this domain, a model of `zoo list "vision/*"`, or one of timm (`timm/NAME`
            where both have it).
        out_indices: stages that give a map, in ascending order, counted from 0 (of timm's models as timm
            does, where the stem of a ResNet is 0).
        frozen_stages: -1: all train; 0: the stem does not; 1: nor does the first stage, and so on.
        norm_eval: batch norms keep the statistics of the weights in training, as detectors with few images
            a step need it.
        init_cfg: `dict(type="Pretrained", checkpoint=FILE)` reads a file of the zoo, of the model's official
            program, or of mmdet with `prefix="backbone."`; its head is left out.
        options: of the model, such as `drop_path_rate`, or `pretrained=True` for published weights.

    Raises:
        ConfigError: no such backbone, stage or option.
    """

    def __init__(
        self,
        name: str,
        out_indices: Sequence[int] = (0, 1, 2, 3),
        *,
        frozen_stages: int = -1,
        norm_eval: bool = False,
        init_cfg: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> None:
        super().__init__(init_cfg=init_cfg)
        self.norm_eval = norm_eval
        self.body, self.places = _body(name, tuple(out_indices), options)
        self.channels: tuple[int, ...] = tuple(self.body.channels[i] for i in self.places)
        self.strides: tuple[int, ...] = tuple(self.body.strides[i] for i in self.places)
        self.frozen = _freeze(self.body, name, frozen_stages)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        maps = self.body(x)
        return tuple(maps[i] for i in self.places)

    def train(self, mode: bool = True) -> ZooBackbone:
        """Frozen parts, and with norm_eval all batch norms, stay in evaluation."""
        super().train(mode)
        still = {*self.frozen}
        for name, module in self.body.named_modules():
            if name in still or (self.norm_eval and isinstance(module, nn.modules.batchnorm._BatchNorm)):
                module.eval()
        return self

    def init_weights(self) -> None:
        """Fill from `init_cfg`, where there is one. The model has drawn its weights when it was built."""
        if self.init_cfg and not self.is_init:
            fill(self.body, read_weights(self.init_cfg), self.init_cfg["checkpoint"])
            self.is_init = True


def fill(body: nn.Module, state: Mapping[str, Tensor], source: str) -> LoadReport:
    """Weights of a backbone, under its names or in the official layout of its model; a head is left out.

    Raises:
        CheckpointError: tensors missing or of another shape.
    """
    model = body.body if isinstance(body, Features) else body
    own = model.state_dict()
    for prefix in ("body.body.", "body."):
        if all(name.startswith(prefix) for name in state):
            state = {name.removeprefix(prefix): value for name, value in state.items()}
    if "zoo_config" in model.__dict__ and not own.keys() <= state.keys():
        return load_weights(model, state)
    return load_state(model, state, skip=[name for name in state if name not in own], source=source)


def _body(name: str, indices: tuple[int, ...], options: dict[str, Any]) -> tuple[Any, list[int]]:
    """A backbone, and which of its maps are asked for."""
    if not indices or min(indices) < 0 or any(a >= b for a, b in pairwise(indices)):
        raise ConfigError(f"out_indices are ascending stages counted from 0, not {list(indices)}.")
    if name not in LAYOUTS and name not in SWINS:
        return create_backbone(name, out_indices=indices, **options), list(range(len(indices)))
    stages = len(LAYOUTS[name].depths if name in LAYOUTS else SWINS[name]["depths"])
    if indices[-1] >= stages:
        raise ConfigError(f"{name} has stages 0 to {stages - 1}; out_indices are {list(indices)}.")
    if name in LAYOUTS:
        options = {"frozen_stages": 0, **options}
    return create_backbone(name, stages - indices[0], **options), [i - indices[0] for i in indices]


def _freeze(body: nn.Module, name: str, last: int) -> list[str]:
    """Takes the gradients of the stem and `last` stages; the names of the modules that are frozen whole."""
    if last < 0:
        return []
    depth = _depths(body, name)
    if last > max(depth.values()):
        raise ConfigError(f"{name} has {max(depth.values())} stages; frozen_stages is {last}.")
    for key, parameter in body.named_parameters():
        if depth.get(_plain(key), last + 1) <= last:
            parameter.requires_grad_(False)
    return [
        key
        for key, module in body.named_modules()
        if (found := list(module.parameters())) and not any(p.requires_grad for p in found)
    ]


def _depths(body: nn.Module, name: str) -> dict[str, int]:
    """Of each parameter: 0 in the stem, i in stage i."""
    from timm.models import create_model, group_parameters

    kind = type(body).__name__
    if kind in MATCHERS:
        stem, blocks = MATCHERS[kind]
        model: Any = body
        matcher, prefix = {"stem": stem, "blocks": blocks}, ""
    else:
        # Where timm takes a model apart, its parameters keep their names, but for points.
        inner: Any = body.body
        prefix = "body.model." if hasattr(inner, "model") else "body."
        model = inner.model if hasattr(inner, "model") else inner
        if not hasattr(model, "group_matcher"):
            with torch.device("meta"):
                model = create_model(name.removeprefix("timm/"))
        matcher = model.group_matcher(coarse=True)
    depth: Any = group_parameters(model, matcher, reverse=True)
    return {_plain(prefix + key): found for key, found in depth.items()}


def _plain(name: str) -> str:
    return name.replace(".", "_")


def register() -> None:
    """Enter `ZooBackbone` into the registry of mmdet."""
    models: Any = import_module("mmdet.registry").MODELS
    models.register_module(module=ZooBackbone, force=True)
