"""NCPP (Li et al. 2024) in the plain layout: the peer of `zoo bench domain=forecasting`.

The same function as `domains.forecasting.models.ncpp`, laid out as it was published: channels on the last
axis between the layers, every convolution padded to "same", characters as an image of their embeddings, a
product for queries, keys and values each, explicit scores in heads of the full width that are interleaved
before the last product. Modules carry the official names, so that official weights load as they are.

Shapes: B rows, N numbers in all, L characters in all, F features of a group, D = 2 width channels, h heads.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

EPS = 1e-3
NUMERIC = {"mem_num": 3, "cpu_num": 27, "system_num": 2}
TEXT = {"System_info": [10, 1, 1, 8, 35], "Workload_info": [32]}
CONVS = (
    ("fix_convx1", "fix_conv2", "fix4", "fix6"),
    ("fix9", "fix10", "fix11", "fix12"),
    ("fix13", "fix14", "fix15"),
)
"""Of the three blocks: kernels 8, 5 and 3, then that of the shortcut, where it has one."""


class Net(nn.Module):
    """Residual net over 1 or 2 axes; its last block starts from the first."""

    def __init__(self, axes: int, width: int) -> None:
        super().__init__()
        conv, norm = (nn.Conv1d, nn.BatchNorm1d) if axes == 1 else (nn.Conv2d, nn.BatchNorm2d)
        self.right = (0, 1) * axes
        self.channels_first = (0, axes + 1, *range(1, axes + 1))
        self.channels_last = (0, *range(2, axes + 2), 1)
        for names, inputs, outputs in zip(
            CONVS, (1, width, width), (width, 2 * width, 2 * width), strict=True
        ):
            sizes = ((inputs, 8), (outputs, 5), (outputs, 3), (inputs, 1))
            for name, (channels, kernel) in zip(names, sizes, strict=False):
                self.add_module(name, conv(channels, outputs, kernel, padding=(kernel - 1) // 2))
        for i in range(12):
            self.add_module(f"bn{i}", norm(width if i < 4 else 2 * width, EPS, 0.01))

    def forward(self, x: Tensor) -> Tensor:
        """`(B, ..., 1) -> (B, ..., D)`"""
        first = F.relu(self._body(x, 0) + self._normed(self._conv(x, "fix6"), 3))
        second = F.relu(self._body(first, 1) + self._normed(self._conv(first, "fix12"), 7))
        return F.relu(self._body(first, 2) + self._normed(second, 11))

    def _body(self, x: Tensor, block: int) -> Tensor:
        for i, name in enumerate(CONVS[block][:3]):
            x = self._normed(self._conv(F.relu(x) if i else x, name), 4 * block + i)
        return x

    def _conv(self, x: Tensor, name: str) -> Tensor:
        conv: Any = self.get_submodule(name)
        x = x.permute(self.channels_first)
        padded = x if conv.kernel_size[0] % 2 else F.pad(x, self.right)
        return conv(padded).permute(self.channels_last)

    def _normed(self, x: Tensor, index: int) -> Tensor:
        return self.get_submodule(f"bn{index}")(x.permute(self.channels_first)).permute(self.channels_last)


class Attention(nn.Module):
    """Attention among the features of a group and a linear layer, both residual."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.norm = nn.LayerNorm(dim, EPS)
        self.q, self.k, self.v = (nn.Linear(dim, num_heads * dim, bias=False) for _ in range(3))
        self.out = nn.Linear(num_heads * dim, dim, bias=False)
        self.ffn = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """`(B, F, D) -> (B, F, D)`"""
        normed, dim = self.norm(x), x.shape[-1]
        q, k, v = (self._heads(layer(normed)) for layer in (self.q, self.k, self.v))
        weights = torch.softmax(q @ k.transpose(-2, -1) / (dim * dim * self.num_heads), dim=-1)
        heads = (weights @ v).permute(0, 2, 3, 1)
        y = x + self.out(heads.flatten(2))
        return y + self.ffn(y)

    def _heads(self, x: Tensor) -> Tensor:
        """`(B, F, h D) -> (B, h, F, D)`"""
        return x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)


class PlainNCPP(nn.Module):
    """The published groups of features unless given."""

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
    ) -> None:
        super().__init__()
        self.numeric = dict(numeric)
        self.text = {name: list(lengths) for name, lengths in text.items()}
        self.embed = nn.ModuleDict({name: nn.Embedding(vocabulary, embed_dims) for name in text})
        self.resnet = nn.ModuleDict({"num": Net(1, width)} | {name: Net(2, width) for name in text})
        self.attn = nn.ModuleDict({name: Attention(2 * width, num_heads) for name in ("char", *numeric)})
        self.head = nn.Linear(2 * width, num_targets)

    def load_official(self, state_dict: Mapping[str, Tensor]) -> None:
        """Batch norms count no batches in the published program."""
        own = self.state_dict()
        counts = {key: own[key] for key in own if key.endswith("num_batches_tracked")}
        self.load_state_dict({**state_dict, **counts})

    def forward(self, numbers: Tensor, codes: Tensor) -> Tensor:
        """Scores `(B, targets)` of numbers `(B, N)` and characters `(B, L)`."""
        texts = []
        parts = codes.split([sum(lengths) for lengths in self.text.values()], dim=1)
        for (name, lengths), part in zip(self.text.items(), parts, strict=True):
            characters = self.resnet[name](self.embed[name](part)[..., None]).mean(2)
            texts += [feature.mean(1) for feature in characters.split(lengths, dim=1)]
        pooled = [self.attn["char"](torch.stack(texts, dim=1)).mean(1)]
        groups = self.resnet["num"](numbers[..., None]).split(list(self.numeric.values()), dim=1)
        pooled += [self.attn[name](group).mean(1) for name, group in zip(self.numeric, groups, strict=True)]
        return self.head(torch.stack(pooled).mean(0))
