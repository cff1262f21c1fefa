"""Official layouts that differ from ours by names, and by the axes of 1 x 1 convolutions."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import ClassVar

from torch import Tensor, nn

from domains.vision.weights.layout import VisionLayout, check_published_attention, counters
from zoo.weights.checkpoint import matches

Rename = tuple[str, str | Callable[[re.Match[str]], str]]
"""A pattern in our names and what stands in its place in the official ones."""


class RenamedLayout(VisionLayout):
    """State dicts whose names follow from ours by rules, applied one after the other."""

    renames: ClassVar[tuple[Rename, ...]]
    maps: ClassVar[tuple[str, ...]] = ()
    """Globs of official names of 1 x 1 convolutions, which are matrices here."""
    vectors: ClassVar[tuple[str, ...]] = ()
    """Globs of official names of vectors `(1, C, 1, 1)`, which have one axis here."""

    @classmethod
    def official_name(cls, name: str) -> str:
        for pattern, official in cls.renames:
            name = re.sub(pattern, official, name)
        return name

    @classmethod
    def constants(cls, model: nn.Module) -> dict[str, Tensor]:
        """Official tensors that follow from the configuration."""
        return {}

    @classmethod
    def to_zoo(cls, state_dict: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
        check_published_attention(model)
        tensors = {
            name: state_dict[cls.official_name(name)].reshape(own.shape)
            for name, own in model.state_dict().items()
            if not name.endswith("num_batches_tracked")
        }
        return tensors | counters(tensors)

    @classmethod
    def to_official(cls, state_dict: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
        check_published_attention(model)
        out = {}
        for name, tensor in state_dict.items():
            if not name.endswith("num_batches_tracked"):
                official = cls.official_name(name)
                out[official] = cls._shaped(official, tensor)
        return out | counters(out) | cls.constants(model)

    @classmethod
    def _shaped(cls, official: str, tensor: Tensor) -> Tensor:
        if matches(official, cls.maps) and tensor.ndim == 2:
            return tensor[:, :, None, None]
        if matches(official, cls.vectors) and tensor.ndim == 1:
            return tensor[None, :, None, None]
        return tensor
