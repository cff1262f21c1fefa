"""Group position encoding (arXiv 2505.16983): streams of two kinds of tokens, a source, and the target made
from it while it arrives.

Each kind counts its own tokens, and the source does not see the target: what was computed of the source stays
as it is, in whatever order the two arrive. Rotary or other positions follow from the numbers.
"""

from __future__ import annotations

import torch
from torch import Tensor

from zoo.attention.errors import AttentionError
from zoo.attention.patterns import Pattern, Rule, same_device


def stream_positions(target: Tensor, offset: int = 0) -> Tensor:
    """Source tokens count from 0, target tokens from `offset` (phi; 0 works as well as the paper's others).

    Args:
        target: bool `(N,)` or `(B, N)` in the order of arrival, True = of the target.

    Returns:
        Integers of the same shape, for `positions` of a layer.

    Example:
        >>> stream_positions(torch.tensor([False, False, True, False, True]), offset=10)
        tensor([ 0,  1, 10,  2, 11])
    """
    _check(target)
    return torch.where(target, target.cumsum(-1) - 1 + offset, (~target).cumsum(-1) - 1)


class SourceAndTarget(Pattern):
    """Target tokens see all, source tokens the source only; with `Causal() &` before it, of what has arrived.

    Args:
        target: bool `(N,)` or `(B, N)` of the keys, True = of the target; the last query stands at the last.
    """

    def __init__(self, target: Tensor) -> None:
        _check(target)
        self.target = target

    def check(self, batch: int, nq: int, nk: int, device: torch.device) -> None:
        if tuple(self.target.shape) not in ((nk,), (batch, nk), (1, nk)) or nq > nk:
            raise AttentionError(
                f"{tuple(self.target.shape)} kinds of tokens do not fit B = {batch}, Nq = {nq}, Nk = {nk}"
            )
        same_device("kinds of tokens", self.target, device)

    def rule(self, nq: int, nk: int) -> Rule:
        target, ahead = self.target, nk - nq
        if target.ndim == 1 or len(target) == 1:
            kinds = target.flatten()
            return lambda b, h, i, j: kinds[i + ahead] | ~kinds[j]
        return lambda b, h, i, j: target[b, i + ahead] | ~target[b, j]

    def to(self, device: torch.device | str) -> SourceAndTarget:
        return SourceAndTarget(self.target.to(device))

    def __repr__(self) -> str:
        return f"SourceAndTarget({tuple(self.target.shape)})"


def _check(target: Tensor) -> None:
    if target.dtype != torch.bool or target.ndim not in (1, 2):
        raise AttentionError(
            "kinds of tokens are bool (N,) or (B, N), True = target, "
            f"not {target.dtype} {tuple(target.shape)}"
        )
