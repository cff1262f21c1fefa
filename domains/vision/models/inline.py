"""InLine-PVT and InLine-DeiT: injective linear attention (Han et al., NeurIPS 2024) in the layouts of PVT and
DeiT."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, Literal

from torch import nn

from domains.vision.models.deit import DeiT
from domains.vision.models.pvt import PVT
from domains.vision.weights.deit import InLineDeiTOfficial
from domains.vision.weights.pvt import InLinePVTOfficial
from zoo.attention.layers import AttentionLayer
from zoo.attention.layers.injective import InjectiveLinear
from zoo.registry import register_model


class InLinePVT(PVT):
    """PVT with linear attention whose weights differ for different queries, and a local residual.

    Args:
        features: what is applied to queries and keys.
        options: of `domains.vision.models.pvt.PVT`; in `attn_types` the letter I is injective attention.
    """

    letter = "I"

    def __init__(
        self,
        *,
        features: Literal["identity", "relu", "leaky_relu", "exp"] = "identity",
        num_heads: Sequence[int] = (2, 4, 10, 16),
        **options: Any,
    ) -> None:
        self._features: Literal["identity", "relu", "leaky_relu", "exp"] = features
        super().__init__(num_heads=num_heads, **options)

    def make_attention(self, i: int, dim: int, num_heads: int, shape: tuple[int, ...]) -> nn.Module:
        return InjectiveLinear(dim, num_heads, shape=shape, features=self._features, qkv_bias=self.qkv_bias)


class InLineDeiT(DeiT):
    """DeiT with linear attention whose weights differ for different queries; the local residual leaves the
    class token out."""

    def __init__(self, *, num_heads: int = 6, **options: Any) -> None:
        super().__init__(num_heads=num_heads, **options)

    def make_attention(self, dim: int, num_heads: int, shape: tuple[int, int]) -> AttentionLayer:
        return InjectiveLinear(dim, num_heads, shape=shape, class_token=True, qkv_bias=self.qkv_bias)


_family = partial(
    register_model,
    paper=(
        "Han et al., Bridging the Divide: Reconsidering Softmax and Linear Attention, NeurIPS 2024, "
        "arXiv 2412.06590"
    ),
    licence="none stated",
    source="https://github.com/LeapLabTHU/InLine",
    preprocessing={"resize": "256, bicubic", "crop": "224, centre", "normalise": "ImageNet mean and std"},
)
_register = partial(_family, model=InLinePVT, status="official parity", official=InLinePVTOfficial)
_LARGE = "The authors count 50.2 M parameters; this has 51.2 M, so that something differs in their program."


@_register(
    summary="Injective linear attention in the layout of PVT, 12 M: 78.2 % on ImageNet-1k (authors)",
    weights=("inline_pvt_tiny_in1k",),
)
def inline_pvt_tiny(**kwargs: Any) -> InLinePVT:
    return InLinePVT(**kwargs)


@_register(
    summary="Injective linear attention in the layout of PVT, 22 M: 82.0 % on ImageNet-1k (authors)",
    weights=("inline_pvt_small_in1k",),
)
def inline_pvt_small(*, depths: Sequence[int] = (3, 4, 6, 3), **kwargs: Any) -> InLinePVT:
    return InLinePVT(depths=depths, **kwargs)


@_register(
    summary="Injective linear attention in the layout of PVT, 38 M: 83.2 % on ImageNet-1k (authors)",
    weights=("inline_pvt_medium_in1k",),
)
def inline_pvt_medium(*, depths: Sequence[int] = (3, 4, 18, 3), **kwargs: Any) -> InLinePVT:
    return InLinePVT(depths=depths, **kwargs)


@_register(
    summary="Injective linear attention in the layout of PVT, 51 M: 83.6 % on ImageNet-1k (authors)",
    weights=("inline_pvt_large_in1k",),
    notes=_LARGE,
)
def inline_pvt_large(*, depths: Sequence[int] = (3, 8, 27, 3), **kwargs: Any) -> InLinePVT:
    return InLinePVT(depths=depths, **kwargs)


_deit = partial(
    _family,
    model=InLineDeiT,
    status="re-implementation",
    official=InLineDeiTOfficial,
    notes=(
        "From a description of the form with a class token; not held to the official program. Width and "
        "heads follow from the authors' number of parameters, with heads of 32 channels."
    ),
)


@_deit(
    summary="Injective linear attention in the layout of DeiT, 6.5 M: 74.5 % on ImageNet-1k (authors)",
    weights=("inline_deit_tiny_in1k",),
)
def inline_deit_tiny(**kwargs: Any) -> InLineDeiT:
    return InLineDeiT(**kwargs)


@_deit(
    summary="Injective linear attention in the layout of DeiT, 17 M, for 288 x 288: 80.2 % (authors)",
    weights=("inline_deit_small_in1k",),
)
def inline_deit_small(
    *, embed_dim: int = 320, num_heads: int = 10, img_size: int | Sequence[int] = 288, **kwargs: Any
) -> InLineDeiT:
    return InLineDeiT(embed_dim=embed_dim, num_heads=num_heads, img_size=img_size, **kwargs)


@_deit(
    summary="Injective linear attention in the layout of DeiT, 24 M, for 448 x 448: 82.3 % (authors)",
    weights=("inline_deit_base_in1k",),
)
def inline_deit_base(
    *, embed_dim: int = 384, num_heads: int = 12, img_size: int | Sequence[int] = 448, **kwargs: Any
) -> InLineDeiT:
    return InLineDeiT(embed_dim=embed_dim, num_heads=num_heads, img_size=img_size, **kwargs)
