"""Backbones with a class token beside the map."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from domains.vision.backbone import Backbone


class Tokens(NamedTuple):
    """What stages hand on: a map `(B, C, H, W)` and a class token `(B, C)`."""

    map: Tensor
    token: Tensor

    def together(self) -> Tensor:
        """`(B, 1 + H W, C)`, the class token first."""
        return torch.cat([self.token[:, None], self.map.flatten(2).mT], 1)


def apart(x: Tensor, shape: Sequence[int]) -> Tokens:
    """Tokens `(B, 1 + H W, C)`, the class token first, of a map of this height and width."""
    return Tokens(x[:, 1:].mT.unflatten(2, tuple(shape)), x[:, 0])


class TokenNorm(nn.LayerNorm):
    """Layer norm of the class token and of the tokens of the map."""

    def forward(self, x: Tokens) -> Tokens:  # pyright: ignore[reportIncompatibleMethodOverride]
        return Tokens(super().forward(x.map.movedim(1, -1)).movedim(-1, 1), super().forward(x.token))


class ClassTokenBackbone(Backbone):
    """A backbone whose class token is classified, as timm's vision transformers.

    `forward_features` gives tokens `(B, 1 + H W, C)`, the class token first; intermediate maps are those of
    the other tokens. Stages take and give `Tokens`; the stem makes them.

    Args:
        global_pool: `token` (the class token); `avg` and `max` pool the other tokens.
        options: of `Backbone`.
    """

    simple_pools = ("token", "avg", "max", "")
    num_prefix_tokens = 1

    def __init__(self, *, global_pool: str | Mapping[str, Any] = "token", **options: Any) -> None:
        super().__init__(global_pool=global_pool, **options)

    def forward_features(self, x: Tensor) -> Tensor:
        """The normalised tokens of the last stage, `(B, 1 + H W, num_features)`."""
        tokens: Any = super().forward_features(x)
        return tokens.together()

    def pooled(self, x: Tensor) -> Tensor:
        """The tokens of `forward_features` to one vector for each image."""
        if self.global_pool == "token":
            return x[:, 0]
        if self.global_pool in self.simple_pools:
            return x[:, 1:].mean(1) if self.global_pool == "avg" else x[:, 1:].amax(1)
        return self.pool(x[:, 1:])

    def forward_intermediates(self, x: Tensor, *args: Any, **options: Any) -> Any:
        """As of `Backbone`: maps `(B, C, H, W)`, and before them tokens `(B, 1 + H W, C)`."""
        found = super().forward_intermediates(x, *args, **options)
        return (found[0].together(), found[1]) if isinstance(found, tuple) else found

    def _out(self, i: int, x: Any, norm: bool) -> Tensor:
        return super()._out(i, x, norm).map  # pyright: ignore[reportAttributeAccessIssue]
