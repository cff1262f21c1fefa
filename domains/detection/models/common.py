"""Parts that the detectors share: padded batches, position encodings, heads.

Shapes: B images, H x W cells of a map, N queries, d model width.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.errors import DataError

PIXEL_MEAN, PIXEL_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""Of RGB images in [0, 1], as official weights expect them."""


class ImageBatch(NamedTuple):
    """Images of several sizes in one tensor, zeros below and to the right of the smaller ones."""

    images: Tensor
    """`(B, 3, H, W)`, normalised."""
    mask: Tensor | None
    """Bool `(B, H, W)`, True = padding; None where no image has any."""
    sizes: Tensor
    """Int `(B, 2)`: height and width of each image."""

    @classmethod
    def pad(cls, images: Sequence[Tensor], *, divisor: int = 1) -> ImageBatch:
        """From images `(3, h, w)`; sides of the batch are multiples of `divisor`.

        Raises:
            DataError: no image, or one that is not `(3, h, w)`.
        """
        if not images:
            raise DataError("A batch has at least one image.")
        for i, image in enumerate(images):
            if image.ndim != 3 or image.shape[0] != 3 or not image.numel():
                raise DataError(f"Image {i} of the batch is {tuple(image.shape)}, not (3, h, w).")
        sizes = torch.tensor([image.shape[1:] for image in images])
        height, width = (-(-int(side) // divisor) * divisor for side in sizes.amax(0))
        out = images[0].new_zeros(len(images), 3, height, width)
        mask = torch.ones(len(images), height, width, dtype=torch.bool, device=out.device)
        for i, image in enumerate(images):
            _, h, w = image.shape
            out[i, :, :h, :w] = image
            mask[i, :h, :w] = False
        padded = bool((sizes != torch.tensor([height, width])).any())
        return cls(out, mask if padded else None, sizes.to(out.device))


def check_images(images: Tensor, mask: Tensor | None) -> None:
    """Raises `DataError` where a batch is not `(B, 3, H, W)` with a bool mask `(B, H, W)` or without."""
    if images.ndim != 4 or images.shape[1] != 3:
        raise DataError(f"Images are (B, 3, H, W), not {tuple(images.shape)}.")
    if mask is not None and (mask.dtype != torch.bool or mask.shape != images[:, 0].shape):
        raise DataError(
            f"The mask of images {tuple(images.shape)} is bool {tuple(images[:, 0].shape)}, True = padding, "
            f"not {mask.dtype} {tuple(mask.shape)}."
        )


def by_onednn(x: Tensor) -> bool:
    """Whether oneDNN's operators take x: those that add, or leave out what is negative, in the same pass."""
    return (
        not torch.compiler.is_compiling()
        and x.device.type == "cpu"
        and x.dtype == torch.float32
        and not torch.is_autocast_enabled("cpu")
        and torch.backends.mkldnn.is_available()
    )


def full(x: Tensor) -> Tensor:
    """In float32 or wider: coordinates and predictions, whatever the precision of the network."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def resized_mask(mask: Tensor, size: Sequence[int]) -> Tensor:
    """Bool `(B, H, W)` to `(B, *size)`, by the nearest cell."""
    return F.interpolate(mask[:, None].float(), list(size), mode="nearest")[:, 0].bool()


def frequencies(channels: int, temperature: float, device: torch.device) -> Tensor:
    """What a coordinate is divided by, `(channels,)`: equal for a sine and the cosine after it."""
    pair = torch.arange(channels, device=device) // 2
    return temperature ** (2 * pair / channels)


def _waves(x: Tensor, channels: int, temperature: float) -> Tensor:
    """Angles `(...)` to `(..., channels)`: sine, cosine, sine, ..."""
    angles = x[..., None] / frequencies(channels, temperature, x.device)
    return torch.stack([angles[..., 0::2].sin(), angles[..., 1::2].cos()], -1).flatten(-2)


def sine_position(
    size: Sequence[int],
    mask: Tensor | None,
    dim: int,
    *,
    temperature: float = 10000.0,
    device: torch.device | None = None,
) -> Tensor:
    """Position encoding of a map (Carion et al. 2020): `(B, H, W, d)`, rows first, then columns.

    Counted over the cells that are not padding and divided by the last count.

    Args:
        size: H and W.
        mask: bool `(B, H, W)`, True = padding; None gives `(1, H, W, d)`.
    """
    if mask is None:
        mask = torch.zeros(1, *size, dtype=torch.bool, device=device)
    real = (~mask).float()
    y, x = real.cumsum(1), real.cumsum(2)
    y = y / (y[:, -1:] + 1e-6) * (2 * torch.pi)
    x = x / (x[:, :, -1:] + 1e-6) * (2 * torch.pi)
    return torch.cat([_waves(y, dim // 2, temperature), _waves(x, dim // 2, temperature)], -1)


class LearnedPosition(nn.Module):
    """A vector for each row and each column of a map, half of the width each, the column's first.

    Args:
        dim: d.
        size: the most rows and columns.
    """

    def __init__(self, dim: int, size: int = 50) -> None:
        super().__init__()
        self.row_embed, self.col_embed = nn.Embedding(size, dim // 2), nn.Embedding(size, dim // 2)
        nn.init.uniform_(self.row_embed.weight)
        nn.init.uniform_(self.col_embed.weight)

    def forward(self, size: Sequence[int]) -> Tensor:
        """`(1, H, W, d)`

        Raises:
            DataError: a map with more rows or columns than there are vectors.
        """
        height, width = size
        most = self.row_embed.num_embeddings
        if max(height, width) > most:
            raise DataError(
                f"Learned positions are for maps of up to {most} x {most} cells, not {height} x {width}: "
                "use smaller images or position='sine'."
            )
        rows, columns = self.row_embed.weight[:height, None], self.col_embed.weight[None, :width]
        shape = (height, width, rows.shape[-1])
        return torch.cat([columns.expand(shape), rows.expand(shape)], -1)[None]


def sine_embedding(points: Tensor, channels: int = 128, temperature: float = 10000.0) -> Tensor:
    """Points `(..., 2)` of x, y or boxes `(..., 4)` of x, y, w, h in [0, 1], `channels` for each coordinate.

    The order is y, x, w, h. In float32 or wider.
    """
    points = full(points)
    order = [1, 0, *range(2, points.shape[-1])]
    return _waves(points[..., order] * (2 * torch.pi), channels, temperature).flatten(-2)


def inverse_sigmoid(x: Tensor, eps: float = 1e-5) -> Tensor:
    """`log(x / (1 - x))` with both clamped to at least `eps`, in float32 or wider."""
    x = full(x).clamp(0, 1)
    return torch.log(x.clamp(min=eps) / (1 - x).clamp(min=eps))


class MLP(nn.Module):
    """Linear layers with ReLU between them."""

    def __init__(self, in_features: int, hidden: int, out_features: int, num_layers: int) -> None:
        super().__init__()
        widths = [in_features, *[hidden] * (num_layers - 1), out_features]
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise(widths))

    def forward(self, x: Tensor) -> Tensor:
        *inner, last = self.layers
        for layer in inner:
            x = layer(x).relu_()
        return last(x)


class Best(NamedTuple):
    """The best pairs of query and class of each image, `(B, k)` each."""

    scores: Tensor
    queries: Tensor
    labels: Tensor


def best_pairs(logits: Tensor, k: int) -> Best:
    """The k largest of sigmoid(logits) `(B, N, C)` over all queries and classes; at most N C."""
    classes = logits.shape[-1]
    scores, at = full(logits).sigmoid().flatten(1).topk(min(k, logits[0].numel()), dim=1)
    return Best(scores, at // classes, at % classes)
