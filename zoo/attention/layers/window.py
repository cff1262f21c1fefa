"""Windows over one axis, and the shifted groups of S2 attention."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from zoo.attention.attend import attend
from zoo.attention.errors import AttentionError
from zoo.attention.layers.base import Supports, masked
from zoo.attention.layers.multihead import MultiHead
from zoo.attention.merge import merge
from zoo.attention.packed import ShiftedGroups
from zoo.attention.patterns import EqualGroups, Padding, Pattern, Rule, Window


class Reach(Window):
    """A window that may be longer than the axis: a layer meets sequences of any length."""

    def check(self, batch: int, nq: int, nk: int, device: torch.device) -> None:
        if nq > nk:
            raise AttentionError(f"a window needs a key for each query, but Nq = {nq} > Nk = {nk}")


class LocalAttention(MultiHead, name="local"):
    """Softmax over the `window` keys around a query, or up to it (Luong et al. 2015, section 3.2; the local
    attention of CAB, Zhang et al. 2023).

    Args:
        window: number of keys, the query's own place included; odd unless causal.
        options: of `MultiHead`.
    """

    supports = Supports(bidirectional=True, causal=True, padding=True, packed=True, cache=True)
    paper = "https://arxiv.org/abs/2210.07661"

    def __init__(
        self, dim: int, num_heads: int, *, window: int = 129, causal: bool = False, **options: Any
    ) -> None:
        super().__init__(dim, num_heads, causal=causal, **options)
        self.window = Reach(window, causal=causal).size

    def pattern(self, num_keys: int, mask: Tensor | None) -> Pattern:
        assert self.window is not None
        longest = num_keys if self.causal else 2 * num_keys - 1
        return masked(Reach(min(self.window, longest), causal=self.causal), mask)


class BeforeGroup(Pattern):
    """Keys, the first ones of a row, before the group of `size` of a query; groups begin at `shift`."""

    def __init__(self, size: int, shift: int = 0) -> None:
        self.size, self.shift = size, shift

    def rule(self, nq: int, nk: int) -> Rule:
        size, shift = self.size, self.shift
        return lambda b, h, i, j: j < (i - shift) // size * size + shift

    def __repr__(self) -> str:
        return f"BeforeGroup({self.size}, shift={self.shift})"


class ShiftedSparse(MultiHead, name="s2"):
    """S2 attention (Chen et al. 2024, LongLoRA, section 3.2): a cheap stand-in for full causal attention.

    In training, the tokens form groups of `N / num_groups`, causal inside; for the second half of the heads
    the groups are shifted by half a group. In evaluation, and when decoding, attention is full.

    Args:
        num_groups: N must be divisible by it in training.
        wrap: the authors' program without flash attention: the shifted heads are rolled, so that the first
            half group follows the last one and sees it, which lets the future in. Otherwise the two stay
            apart. (Their roll moves the outputs of groups of odd size by one place.)
        sinks: first tokens that all groups see, as SinkLoRA has it (Zhang 2024, arXiv 2406.05678).
        options: of `MultiHead`, which is causal here.
    """

    supports = Supports(causal=True, padding=True, packed=True, cache=True, any_length=False)
    paper = "https://arxiv.org/abs/2309.12307"

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        num_groups: int = 4,
        wrap: bool = False,
        sinks: int = 0,
        causal: bool = True,
        **options: Any,
    ) -> None:
        super().__init__(dim, num_heads, causal=causal, **options)
        if num_groups < 1 or num_heads < 2:
            raise AttentionError(
                f"S2 attention has at least one group and two heads, not {num_groups} and {num_heads}"
            )
        if not causal or self.window is not None:
            raise AttentionError("S2 attention stands for full causal attention: causal=True, window=None")
        if sinks < 0 or (sinks and wrap):
            raise AttentionError(f"sinks, not negative, go with wrap=False: not {sinks} and wrap={wrap}")
        self.num_groups, self.wrap, self.sinks = num_groups, wrap, sinks

    def read(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        if not self.training:
            return super().read(q, k, v, mask)
        if self.wrap and mask is not None:
            raise AttentionError("wrap=True rolls the tokens past the mask: it takes full rows only")
        size, seen = self._group_size(q.shape[2], k.shape[2]), self.pattern(k.shape[2], mask)
        if k.shape[1] % 2:
            k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
        still, moving = zip(*(x.tensor_split([x.shape[1] // 2], dim=1) for x in (q, k, v)), strict=True)
        if self.wrap:
            first = attend(*still, pattern=EqualGroups(size) & seen, dropout=self.dropout)
            rolled = (x.roll(-size // 2, dims=2) for x in moving)
            second = attend(*rolled, pattern=EqualGroups(size) & seen, dropout=self.dropout)
            return torch.cat([first, second.roll(size // 2, dims=2)], dim=1)
        shifted = ShiftedGroups(q.shape[2], size, size // 2, q.device)
        first = self._groups(still, EqualGroups(size) & seen, BeforeGroup(size), mask)
        second = self._groups(moving, shifted & seen, BeforeGroup(size, size // 2), mask)
        return torch.cat([first, second], dim=1)

    def _groups(
        self, heads: tuple[Tensor, ...], seen: Pattern, before: Pattern, mask: Tensor | None
    ) -> Tensor:
        """Attention of queries to keys and values under a pattern of groups, and to the sinks before them."""
        q, k, v = heads
        if not self.sinks:
            return attend(q, k, v, pattern=seen, dropout=self.dropout)
        if mask is not None and mask.dtype != torch.bool:
            raise AttentionError("sinks are the first tokens of a row: packed documents need sinks=0")
        k_sinks, v_sinks = (x[:, :, : self.sinks] for x in (k, v))
        before = before if mask is None else before & Padding(mask[:, : self.sinks])
        group = attend(q, k, v, pattern=seen, dropout=self.dropout, return_lse=True)
        sinks = attend(q, k_sinks, v_sinks, pattern=before, dropout=self.dropout, return_lse=True)
        return merge(group, sinks)[0]

    def _group_size(self, queries: int, keys: int) -> int:
        if queries != keys:
            raise AttentionError("S2 attention decodes in evaluation mode only: call eval()")
        if queries % self.num_groups:
            raise AttentionError(f"{queries} tokens are not divisible into {self.num_groups} groups")
        return queries // self.num_groups
