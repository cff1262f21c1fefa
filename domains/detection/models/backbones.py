"""Backbones of detectors by name: our ResNets and Swins, any of the zoo's vision models, any of timm's."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from domains.detection.models.resnet import LAYOUTS, ResNet
from domains.detection.models.swin import SWINS, Swin
from zoo.create import create_model
from zoo.errors import ConfigError, did_you_mean
from zoo.registry import list_models


class Features(nn.Module):
    """A `features_only` model of the zoo or of timm: images to its last maps `(B, C, H, W)`."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body
        info: Any = body.feature_info
        self.channels = tuple(info.channels())
        self.strides = tuple(info.reduction())
        self.channels_last = getattr(body, "output_fmt", "NCHW") == "NHWC"

    def forward(self, x: Tensor) -> list[Tensor]:
        maps = self.body(x)
        return [m.permute(0, 3, 1, 2) for m in maps] if self.channels_last else list(maps)


def create_backbone(name: str, levels: int = 1, **options: Any) -> nn.Module:
    """Images `(B, 3, H, W)` to a list of maps, fine to coarse; `channels` and `strides` tell of each.

    Args:
        name: a ResNet, a Swin, a model of `zoo.list_models("vision/*")`, or one of timm (`timm/NAME` where
            both have it).
        levels: how many maps, the last ones.
        options: arguments of the model, such as `dilation`; of the zoo's and timm's, `out_indices` chooses
            other maps.

    Raises:
        ConfigError: no such backbone, or it has fewer levels.
    """
    if name in LAYOUTS:
        return ResNet(name, levels, **options)
    if name in SWINS:
        return Swin(levels, **(SWINS[name] | options))
    import timm

    options = {"out_indices": tuple(range(-levels, 0))} | options | {"features_only": True}
    own = list_models("vision/*")
    bare = name.removeprefix("timm/")
    try:
        if bare == name and name in own:
            return Features(create_model(f"vision/{name}", **options))
        if timm.is_model(bare):
            return Features(timm.create_model(bare, **options))
    except (AssertionError, IndexError) as error:
        raise ConfigError(f"Backbone {name!r} does not give {levels} maps: {error}.") from None
    known = [*LAYOUTS, *SWINS, *own, *timm.list_models()]
    raise ConfigError(f"There is no backbone {name!r}.{did_you_mean(name, known)}")
