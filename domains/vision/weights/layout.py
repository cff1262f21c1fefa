"""What official layouts of image backbones have in common."""

from __future__ import annotations

from typing import ClassVar

import torch
from timm.models._manipulate import adapt_input_conv
from torch import Tensor, nn

from zoo.errors import CheckpointError
from zoo.weights.checkpoint import matches
from zoo.weights.official import OfficialLayout


class VisionLayout(OfficialLayout):
    """An official layout whose weights also start models with other channels, other classes or no head."""

    ignored = ("*.num_batches_tracked",)
    own_modules = ("pool", "head_norm")

    first_conv: ClassVar[str]
    """Official name of the weight of the convolution that sees the image."""
    head: ClassVar[tuple[str, ...]] = ("head.*",)
    """Globs of official names of the head: one for other classes starts anew."""
    added: ClassVar[tuple[str, ...]] = ()
    """Globs of official names that no classifier has: the norms of the form for dense prediction."""

    @staticmethod
    def canonical(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
        """Detectors and segmenters hold a `backbone` beside their other parts."""
        inside = {n.removeprefix("backbone."): t for n, t in state_dict.items() if n.startswith("backbone.")}
        return inside or state_dict

    @classmethod
    def fitted(
        cls, state_dict: dict[str, Tensor], expected: dict[str, Tensor], model: nn.Module
    ) -> dict[str, Tensor]:
        """The first convolution adapted to the channels, the head where it fits; else what the model has.

        One channel gets the sum over the published ones, more get them in turn, scaled by 3 / in_chans.
        """
        dispensable = ("*",) if model.features_only else cls.head
        state = {
            n: tensor for n, tensor in state_dict.items() if n in expected or not matches(n, dispensable)
        }
        weight = state.get(cls.first_conv)
        if weight is not None and weight.shape[1] == 3 != model.in_chans:
            state[cls.first_conv] = adapt_input_conv(model.in_chans, weight)  # pyright: ignore
        for name, own in expected.items():
            other = matches(name, cls.head) and (name not in state or state[name].shape != own.shape)
            if other or (matches(name, cls.added) and name not in state):
                state[name] = own
        return state


def counters(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """The batch counters that official batch norms keep, beside the running means in `state_dict`."""
    return {
        name.replace("running_mean", "num_batches_tracked"): torch.tensor(0)
        for name in state_dict
        if name.endswith("running_mean")
    }


def check_published_attention(model: nn.Module) -> None:
    """Raises `CheckpointError` where `attention=...` put another attention into a model than is published."""
    chosen = getattr(model, "attention", None)
    if chosen is not None:
        raise CheckpointError(
            f"No official program of {type(model).__name__} has attention={chosen!r}: its weights are read "
            "and written in our own layout (zoo.save_model, zoo.load_model) only."
        )
