"""DHVT: Bridging the Gap Between Vision Transformers and Convolutional Neural Networks on Small Datasets (Lu,
Xie, Liu, Zhang; NeurIPS 2022).

Shapes: B images, H x W tokens, N = H W, C channels, h heads of width d. Stages hand on `Tokens`: a map and a
class token. There are no position embeddings but those of the head tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers.drop import DropPath
from torch import Tensor, nn

from domains.vision.attention import Choice
from domains.vision.class_token import ClassTokenBackbone, TokenNorm, Tokens, apart
from domains.vision.vit import initialise
from domains.vision.weights.dhvt import DHVTOfficial
from zoo.attention.layers import create_attention
from zoo.attention.layers.head_tokens import HeadTokens
from zoo.errors import ConfigError
from zoo.layers.conv import ConvNorm
from zoo.registry import register_model


class Affine(nn.Module):
    """`alpha x + beta` for each channel of a map."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.alpha, self.beta = (
            nn.Parameter(torch.ones(1, dim, 1, 1)),
            nn.Parameter(torch.zeros(1, dim, 1, 1)),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.alpha * x + self.beta


class OverlappingPatches(nn.Module):
    """Sequential overlapping patch embedding (section 3.2): convolutions of stride 2 between two affine maps.

    Args:
        patch: product of the strides, a power of 2.
    """

    def __init__(self, in_chans: int, dim: int, patch: int) -> None:
        super().__init__()
        steps = patch.bit_length() - 1
        if patch < 2 or patch != 1 << steps:
            raise ConfigError(f"patch_size is a power of 2, such as 2, 4 or 16, not {patch}.")
        widths = [in_chans, *(dim >> (steps - 1 - i) for i in range(steps))]
        layers: list[nn.Module] = []
        for before, after in pairwise(widths):
            layers += [ConvNorm(before, after, 3, 2), nn.GELU()]
        self.pre_affine, self.post_affine = Affine(in_chans), Affine(dim)
        self.convs = nn.Sequential(*(layers if steps == 1 else layers[:-1]))
        self.cls_token = nn.Parameter(nn.init.trunc_normal_(torch.empty(1, 1, dim), std=0.02))

    def forward(self, x: Tensor) -> Tokens:
        """Images `(B, in_chans, H, W)` to a map of sides `ceil(H / patch)` and `ceil(W / patch)`."""
        x = self.post_affine(self.convs(self.pre_affine(x).contiguous(memory_format=torch.channels_last)))
        return Tokens(x, self.cls_token[:, 0].to(x.dtype).expand(x.shape[0], -1))


class FeedForward(nn.Module):
    """Dynamic aggregation feed forward (section 3.3): a convolutional MLP on the map, whose mean weighs the
    channels of the class token."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.conv_1 = ConvNorm(dim, hidden, bias=True)
        self.conv_2 = ConvNorm(hidden, hidden, 3, groups=hidden, bias=True)
        self.conv_3 = ConvNorm(hidden, dim, bias=True)
        self.compress, self.excitation = nn.Linear(dim, dim // 4), nn.Linear(dim // 4, dim)

    def forward(self, x: Tokens) -> Tokens:
        y = F.gelu(self.conv_1(x.map))
        y = self.conv_3(y + F.gelu(self.conv_2(y)))
        return Tokens(y, x.token * self.excitation(F.gelu(self.compress(y.mean((2, 3))))))


class Block(nn.Module):
    """Attention and feed forward, each behind a norm and with a residual."""

    def __init__(self, dim: int, attn: nn.Module, hidden: int, drop_path: float) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim, eps=1e-6), TokenNorm(dim, eps=1e-6)
        self.attn = attn
        self.mlp = FeedForward(dim, hidden)
        self.drop_path = DropPath(drop_path)

    def forward(self, tokens: Tokens) -> Tokens:
        x = tokens.together()
        x = apart(x + self.drop_path(self.attn(self.norm1(x))), tokens.map.shape[2:])
        y = self.mlp(self.norm2(x))
        return Tokens(x.map + self.drop_path(y.map), x.token + self.drop_path(y.token))


class DHVT(ClassTokenBackbone):
    """DHVT; each block is a feature level. Any image size works: nothing depends on the number of tokens.

    Args:
        patch_size: pixels along the side of a token, a power of 2.
        embed_dim: C.
        depth: blocks.
        num_heads: h.
        mlp_ratio: hidden width of the feed forward over C.
        attention: another layer in place of the head-interacted attention, by its name in `zoo list
            attention`, or a mapping with the name and arguments. Class token and map are one sequence to it.
    """

    first_conv = "stem.convs.0.conv"
    cfg = {"license": "apache-2.0", "crop_pct": 0.9, "paper_ids": "arXiv:2210.05958"}  # noqa: RUF012

    def __init__(
        self,
        *,
        patch_size: int = 16,
        embed_dim: int = 192,
        depth: int = 12,
        num_heads: int = 4,
        mlp_ratio: float = 4.0,
        attention: Choice | None = None,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        self.attention = attention
        hidden = int(embed_dim * mlp_ratio)

        def attn() -> nn.Module:
            if attention is None:
                return HeadTokens(embed_dim, num_heads, class_tokens=1)
            return create_attention(attention, embed_dim, causal=False, num_heads=num_heads)

        self.stem = OverlappingPatches(self.in_chans, embed_dim, patch_size)
        (rates,) = self.drop_path_rates([depth])
        self.stages = nn.Sequential(
            *(nn.Sequential(Block(embed_dim, attn(), hidden, rate)) for rate in rates)
        )
        self.norm = TokenNorm(embed_dim, eps=1e-6)
        self.apply(initialise)
        self.finish([embed_dim] * depth, [patch_size] * depth)

    def no_weight_decay(self) -> set[str]:
        return {"stem.cls_token"} | {n for n, _ in self.named_parameters() if n.endswith("attn.pos_embed")}


class SmallImageDHVT(DHVT):
    """DHVT for CIFAR: images of 32 x 32, seen whole."""

    cfg = DHVT.cfg | {"num_classes": 100, "input_size": (3, 32, 32), "crop_pct": 1.0}

    def __init__(
        self,
        *,
        patch_size: int = 4,
        num_classes: int = 100,
        img_size: int | Sequence[int] = 32,
        **options: Any,
    ) -> None:
        super().__init__(patch_size=patch_size, num_classes=num_classes, img_size=img_size, **options)


# ---- variants ----------------------------------------------------------------------------------------------

_register = partial(
    register_model,
    paper=(
        "Lu et al., Bridging the Gap Between Vision Transformers and Convolutional Neural Networks on Small "
        "Datasets, NeurIPS 2022, arXiv 2210.05958"
    ),
    licence="Apache-2.0",
    source="https://github.com/ArieSeirack/DHVT",
    status="official parity",
    official=DHVTOfficial,
)
_cifar = partial(
    _register,
    model=SmallImageDHVT,
    preprocessing={"size": 32, "normalise": "ImageNet mean and std"},
)
_imagenet = partial(
    _register,
    model=DHVT,
    preprocessing={"resize": "248, bicubic", "crop": "224, centre", "normalise": "ImageNet mean and std"},
)
_HEADS = "Heads of 64 channels, as of DeiT; the number was not checked against published weights."


@_cifar(summary="Head tokens, 6.0 M, for images of 32 x 32")
def dhvt_tiny_cifar_patch4(**kwargs: Any) -> nn.Module:
    return SmallImageDHVT(**kwargs)


@_cifar(summary="Head tokens, 5.8 M, for images of 32 x 32")
def dhvt_tiny_cifar_patch2(*, patch_size: int = 2, **kwargs: Any) -> nn.Module:
    return SmallImageDHVT(patch_size=patch_size, **kwargs)


@_cifar(summary="Head tokens, 23 M, for images of 32 x 32")
def dhvt_small_cifar_patch4(*, embed_dim: int = 384, num_heads: int = 8, **kwargs: Any) -> nn.Module:
    return SmallImageDHVT(embed_dim=embed_dim, num_heads=num_heads, **kwargs)


@_cifar(summary="Head tokens, 23 M, for images of 32 x 32: 85.7 % on CIFAR-100 from scratch (paper)")
def dhvt_small_cifar_patch2(
    *, embed_dim: int = 384, num_heads: int = 8, patch_size: int = 2, **kwargs: Any
) -> nn.Module:
    return SmallImageDHVT(embed_dim=embed_dim, num_heads=num_heads, patch_size=patch_size, **kwargs)


@_imagenet(summary="Head tokens, 6.3 M", notes=_HEADS)
def dhvt_tiny_imagenet_patch16(*, num_heads: int = 3, **kwargs: Any) -> nn.Module:
    return DHVT(num_heads=num_heads, **kwargs)


@_imagenet(summary="Head tokens, 24 M", notes=_HEADS)
def dhvt_small_imagenet_patch16(*, embed_dim: int = 384, num_heads: int = 6, **kwargs: Any) -> nn.Module:
    return DHVT(embed_dim=embed_dim, num_heads=num_heads, **kwargs)
