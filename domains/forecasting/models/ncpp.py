"""NCPP: benchmark scores of a computer from groups of features that describe it (Li et al. 2024,
arXiv 2407.03385).

Numbers pass one convolutional net over all of them, texts one over their characters; the features of a group
then attend to each other, and the mean over all groups gives the scores. The order of the numbers matters, as
convolutions see neighbours together. Texts and numbers meet in that mean alone, so that a score is a sum of
what each says; what depends on both, as a workload on the kind of computer, belongs into several targets.

Letters in shapes: B rows, F features of a group, N numbers in all, L characters in all, G groups, C the
width, D = 2 C channels of a feature.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from domains.forecasting.hardware.weights import NCPPOfficial
from zoo.attention import attend
from zoo.errors import ConfigError, DataError
from zoo.registry import register_model

EPS = 1e-3
NUMERIC = {"memory": 3, "processor": 27, "system": 2}
TEXT = {"system_text": [10, 1, 1, 8, 35], "workload_text": [32]}


class SameConv(nn.Module):
    """Convolution over 1 or 2 axes that keeps their lengths; even kernels are padded by one less on the left.

    Over 2 axes channels lie last in memory, which takes a third less time on a CPU.

    Args:
        axes: 1 or 2.
        in_channels, out_channels: of the convolution.
        kernel_size: along every axis.
    """

    def __init__(self, axes: int, in_channels: int, out_channels: int, kernel_size: int) -> None:
        super().__init__()
        kind = nn.Conv1d if axes == 1 else nn.Conv2d
        self.conv = kind(in_channels, out_channels, kernel_size, padding=(kernel_size - 1) // 2)
        self.more = [] if kernel_size % 2 else [0, 1] * axes
        self.layout = torch.contiguous_format if axes == 1 else torch.channels_last

    def forward(self, x: Tensor) -> Tensor:
        """`(B, in, ...) -> (B, out, ...)`"""
        padded = F.pad(x, self.more) if self.more else x
        return self.conv(padded.contiguous(memory_format=self.layout))


class ConvBlock(nn.Module):
    """Three convolutions with kernels 8, 5 and 3, each with batch norm, beside a shortcut.

    Args:
        axes: 1 or 2.
        in_channels, out_channels: of the block.
        shortcut_channels: of what the shortcut starts from; without convolution where it has `out_channels`
            and `project` is False.
        project: a 1 x 1 convolution on the shortcut.
        momentum: weight of the newest batch in the running statistics.
    """

    def __init__(
        self, axes: int, in_channels: int, out_channels: int, *, project: bool, momentum: float
    ) -> None:
        super().__init__()
        norm = nn.BatchNorm1d if axes == 1 else nn.BatchNorm2d
        channels = (in_channels, out_channels, out_channels)
        self.convs = nn.ModuleList(
            [SameConv(axes, c, out_channels, kernel) for c, kernel in zip(channels, (8, 5, 3), strict=True)]
        )
        self.norms = nn.ModuleList([norm(out_channels, EPS, momentum) for _ in range(3)])
        self.shortcut = SameConv(axes, in_channels, out_channels, 1) if project else nn.Identity()
        self.shortcut_norm = norm(out_channels, EPS, momentum)

    def forward(self, x: Tensor, shortcut: Tensor | None = None) -> Tensor:
        """`(B, in, ...) -> (B, out, ...)`; the shortcut starts from x, or from another tensor."""
        y = x
        for i, (conv, norm) in enumerate(zip(self.convs, self.norms, strict=True)):
            y = norm(conv(y if i == 0 else y.relu()))
        return (y + self.shortcut_norm(self.shortcut(x if shortcut is None else shortcut))).relu()


class ResidualNet(nn.Module):
    """Three blocks; the last reads the output of the first, and has that of the second as its shortcut.

    `(B, 1, ...) -> (B, 2 width, ...)`
    """

    def __init__(self, axes: int, width: int, momentum: float) -> None:
        super().__init__()
        self.block1 = ConvBlock(axes, 1, width, project=True, momentum=momentum)
        self.block2 = ConvBlock(axes, width, 2 * width, project=True, momentum=momentum)
        self.block3 = ConvBlock(axes, width, 2 * width, project=False, momentum=momentum)

    def forward(self, x: Tensor) -> Tensor:
        x = self.block1(x)
        return self.block3(x, self.block2(x))


class TextTrunk(nn.Module):
    """The features of one group of texts: characters as an image of their embeddings, averaged per feature.

    Padding is a character like any other.

    Args:
        lengths: characters of each feature.
        vocabulary: number of codes, with padding.
        embed_dims: of a character.
        width, momentum: of the net.
    """

    def __init__(
        self, lengths: Sequence[int], vocabulary: int, embed_dims: int, width: int, momentum: float
    ) -> None:
        super().__init__()
        self.lengths = list(lengths)
        self.embed = nn.Embedding(vocabulary, embed_dims)
        self.net = ResidualNet(2, width, momentum)

    def forward(self, codes: Tensor) -> Tensor:
        """`(B, sum of lengths)` integers to `(B, features, 2 width)`."""
        maps = self.net(self.embed(codes)[:, None])
        features = maps.mean(-1).split(self.lengths, dim=-1)
        return torch.stack([part.mean(-1) for part in features], dim=1)


class FeatureAttention(nn.Module):
    """Attention among the features of a group, or among groups, and a linear layer; both residual.

    Every head has the full width. Scores are divided by `dim**2 * num_heads`, as published, so that the
    weights are close to uniform.

    Args:
        dim: D.
        num_heads: of the attention.
    """

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.scale = 1 / (dim * dim * num_heads)
        self.norm = nn.LayerNorm(dim, EPS)
        self.qkv = nn.Linear(dim, 3 * num_heads * dim, bias=False)
        self.out = nn.Linear(num_heads * dim, dim, bias=False)
        self.linear = nn.Linear(dim, dim)

    def attention(self, x: Tensor) -> Tensor:
        """Normed features `(B, F, D)` -> `(B, F, D)`."""
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        heads = attend(q, k, v, scale=self.scale)
        return self.out(heads.transpose(1, 2).flatten(2))

    def forward(self, x: Tensor) -> Tensor:
        """`(B, F, D) -> (B, F, D)`"""
        y = x + self.attention(self.norm(x))
        return y + self.linear(y)


class NCPP(nn.Module):
    """Scores from groups of numbers and groups of texts.

    Args:
        numeric: features of each group of numbers, by its name; in this order they are neighbours.
        text: characters of each feature of each group of texts; all texts attend to each other as one group.
        num_targets: scores.
        width: channels C of the first block of the nets; features have 2 C.
        num_heads: of the attention.
        vocabulary: character codes, 0 for padding among them.
        embed_dims: of a character.
        cross_group: let the groups attend to each other before their mean. The published program builds this
            and does not use it.
        norm_momentum: weight of the newest batch in the running statistics of batch norm.

    Raises:
        ConfigError: no group at all, or a group or a text without anything in it.
    """

    def __init__(
        self,
        *,
        numeric: Mapping[str, int] = NUMERIC,
        text: Mapping[str, Sequence[int]] = TEXT,
        num_targets: int = 1,
        width: int = 64,
        num_heads: int = 2,
        vocabulary: int = 100,
        embed_dims: int = 4,
        cross_group: bool = False,
        norm_momentum: float = 0.01,
    ) -> None:
        super().__init__()
        _check(numeric, text)
        self.numeric = dict(numeric)
        self.text = {name: list(lengths) for name, lengths in text.items()}
        self.vocabulary = vocabulary
        dim = 2 * width
        self.text_sizes = [sum(lengths) for lengths in self.text.values()]
        self.numeric_trunk = ResidualNet(1, width, norm_momentum) if numeric else None
        self.text_trunks = nn.ModuleList(
            [TextTrunk(lengths, vocabulary, embed_dims, width, norm_momentum) for lengths in text.values()]
        )
        self.numeric_attention = nn.ModuleList([FeatureAttention(dim, num_heads) for _ in numeric])
        self.text_attention = FeatureAttention(dim, num_heads) if text else None
        self.cross_attention = FeatureAttention(dim, num_heads) if cross_group else None
        self.head = nn.Linear(dim, num_targets)

    def groups(self, numbers: Tensor, codes: Tensor) -> Tensor:
        """The mean feature of each group, texts first: `(B, G, D)`."""
        pooled = []
        if self.text_attention is not None:
            parts = codes.split(self.text_sizes, dim=1)
            texts = [trunk(part) for trunk, part in zip(self.text_trunks, parts, strict=True)]
            pooled.append(self.text_attention(torch.cat(texts, dim=1)).mean(1))
        if self.numeric_trunk is not None:
            features = self.numeric_trunk(numbers[:, None]).transpose(1, 2)
            parts = features.split(list(self.numeric.values()), dim=1)
            pooled += [block(part).mean(1) for block, part in zip(self.numeric_attention, parts, strict=True)]
        return torch.stack(pooled, dim=1)

    def forward(self, numbers: Tensor, codes: Tensor) -> Tensor:
        """Scores `(B, targets)`.

        Args:
            numbers: `(B, N)`, the scaled features of all groups, in their order.
            codes: integers `(B, L)` below `vocabulary`, the characters of all texts, 0 where padded.

        Raises:
            DataError: another number of features or characters than the model was made for.
        """
        self._check_inputs(numbers, codes)
        groups = self.groups(numbers, codes)
        if self.cross_attention is not None:
            groups = self.cross_attention(groups)
        return self.head(groups.mean(1))

    def _check_inputs(self, numbers: Tensor, codes: Tensor) -> None:
        shapes = (sum(self.numeric.values()), sum(self.text_sizes))
        if numbers.ndim != 2 or codes.ndim != 2 or (numbers.shape[1], codes.shape[1]) != shapes:
            raise DataError(
                f"NCPP was made for numbers (B, {shapes[0]}) and codes (B, {shapes[1]}), not for "
                f"{tuple(numbers.shape)} and {tuple(codes.shape)}."
            )


def _check(numeric: Mapping[str, int], text: Mapping[str, Sequence[int]]) -> None:
    if not numeric and not text:
        raise ConfigError("NCPP needs at least one group of features: numeric={name: count}.")
    for name, count in numeric.items():
        if count < 1:
            raise ConfigError(f"numeric.{name}={count}: a group has at least one feature.")
    for name, lengths in text.items():
        if not lengths or min(lengths) < 1:
            raise ConfigError(f"text.{name}={list(lengths)}: a text has at least one character.")


@register_model(
    model=NCPP,
    summary="Benchmark scores of computers from groups of features; 5.7M parameters at the published width",
    paper="Li et al. 2024, NCPP, arXiv 2407.03385",
    licence="Apache-2.0",
    source="https://github.com/xiaoman-liu/NCPP",
    status="official parity",
    official=NCPPOfficial,
    problem="hardware",
    notes="Outputs and gradients equal those of the published Keras program; no weights are published, and "
    "its parameter names here are this project's.",
)
def ncpp(**kwargs) -> NCPP:
    return NCPP(**kwargs)
