"""Which rows of a batch of series see each other."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from zoo.attention import EqualGroups, Groups, Padding, Pattern, attend
from zoo.attention.capture import recorder
from zoo.errors import DataError


class RowGroups(NamedTuple):
    """Groups of the B rows of a batch, planned once for all layers and tokens.

    Equal groups are a reshape of rows that stand group after group, others a packed call: neither has a mask
    of B x B. Make it with `RowGroups.of(ids)` outside of a compiled function.
    """

    member: Tensor
    """`(B,)` number of the group of each row."""
    count: int
    """How many groups there are."""
    order: Tensor | None
    """`(B,)` the rows group after group, where they do not stand so and all groups are of one size."""
    pattern: Pattern | None
    """Over the rows, after `order`; None where every row is alone."""

    @classmethod
    def of(cls, ids: Tensor) -> RowGroups:
        """Rows with equal ids `(B,)`, any integers, see each other.

        Raises:
            DataError: ids that are no vector of integers.
        """
        if ids.ndim != 1 or ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
            raise DataError(f"Group ids are integers (rows,), not {ids.dtype} {list(ids.shape)}.")
        _, member, sizes = ids.unique(return_inverse=True, return_counts=True)
        size = int(sizes[0])
        if size == 1 and len(sizes) == len(ids):
            return cls(member, len(sizes), None, None)
        if not bool((sizes == size).all()):
            return cls(member, len(sizes), None, Groups(member))
        order = member.argsort(stable=True)
        standing = bool((member.view(-1, size) == member.view(-1, size)[:, :1]).all())
        return cls(member, len(sizes), None if standing else order, EqualGroups(size))

    @classmethod
    def alone(cls, rows: int, device: torch.device) -> RowGroups:
        """Every row by itself."""
        return cls(torch.arange(rows, device=device), rows, None, None)

    def sorted(self) -> RowGroups:
        """The groups of the rows in `order`."""
        return self if self.order is None else self._replace(member=self.member[self.order], order=None)

    def any(self, seen: Tensor) -> Tensor:
        """Bool `(S, B)`: whether some row of the group of each row is true in `seen` `(S, B)`."""
        if self.pattern is None:
            return seen
        found = seen.new_zeros((len(seen), self.count), dtype=torch.int32)
        return found.index_add(1, self.member, seen.int())[:, self.member] > 0


def attend_rows(
    q: Tensor, k: Tensor, v: Tensor, groups: RowGroups, seen: Tensor | None, *, dropout: float, unseen: str
) -> Tensor:
    """Attention among the rows of each group, for every token by itself, without a scale.

    Args:
        q, k, v: `(S, H, B, D)`.
        seen: bool `(S, B)`, rows that may be seen at each token; None = all.
        dropout: probability of dropping a weight.
        unseen: what a row gets at a token that no row of its group may show: `uniform`, the mean of the
            values of all rows of the batch; `zero`.

    Returns:
        `(S, H, B, D)`.
    """
    pattern = EqualGroups(1) if groups.pattern is None else groups.pattern
    if seen is not None:
        pattern = pattern & Padding(seen)
    out = attend(q, k, v, pattern=pattern, scale=1.0, dropout=dropout)
    if seen is None or unseen == "zero":
        return out
    return torch.where(groups.any(seen)[:, None, :, None], out, v.mean(2, keepdim=True))


def values_alone(v: Tensor, seen: Tensor | None, *, unseen: str) -> Tensor:
    """`attend_rows` where every row is alone, from values `(S, B, C)` only: one key has the weight 1."""
    if seen is None:
        return v
    other = v.mean(1, keepdim=True) if unseen == "uniform" else torch.zeros_like(v[:, :1])
    return torch.where(seen[..., None], v, other)


def can_skip_weights(groups: RowGroups) -> bool:
    """Whether rows are alone, and neither gradients of queries and keys nor maps are asked for."""
    return groups.pattern is None and not torch.is_grad_enabled() and recorder() is None
