"""The encoder of Chronos-2 with its weights combined for forecasting: the same numbers, fewer products.

Norm weights are part of the projections after them, queries, keys and values one product, what a row alone
adds (softmax over one key is 1) one matrix `W_o W_v`; channels of queries and keys stand in pairs, so that
rotation is one complex product; residuals are added in place.

Shapes: as in `encoder.py`; weights are `(in, out)`.
"""

from __future__ import annotations

from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from domains.forecasting.models.encoder import (
    MLP,
    Attention,
    Block,
    Encoder,
    FeedForward,
    GroupLayer,
    TimeLayer,
)
from domains.forecasting.models.groups import RowGroups, attend_rows, values_alone
from zoo.attention import Padding, attend


class FoldedEncoder:
    """Combined weights of an encoder in eval mode, as they are when this is made."""

    def __init__(self, encoder: Encoder) -> None:
        self.blocks = [FoldedBlock(block) for block in encoder.block]  # pyright: ignore[reportArgumentType]
        self.norm = encoder.final_layer_norm
        self.state = _state(encoder)

    @classmethod
    def of(cls, encoder: Encoder) -> FoldedEncoder | None:
        """None for layers that are no plain float32 linear layers, such as those of a LoRA in training."""
        layers = [m for attention in encoder.modules() for m in _projections(attention)]
        plain = all(type(layer) is nn.Linear and layer.weight.dtype == torch.float32 for layer in layers)
        return cls(encoder) if plain else None

    def is_outdated(self, encoder: Encoder) -> bool:
        """Whether a weight has changed since."""
        now = _state(encoder)
        return (
            now.shape != self.state.shape
            or now.device != self.state.device
            or not torch.equal(now, self.state)
        )

    def __call__(
        self,
        x: Tensor,
        keep: int,
        tables: tuple[Tensor, Tensor],
        groups: RowGroups,
        seen: Tensor | None,
        unseen: str,
    ) -> Tensor:
        """As `Encoder`, without gradients; the tokens `(S, B, D)` are changed in place."""
        turns = torch.complex(*tables)[:, None, None, None]
        padding = None if seen is None else Padding(seen.T)
        last = len(self.blocks) - 1
        for i, block in enumerate(self.blocks):
            kept = keep if i == last else len(x)
            x = block.over_time(x, kept, turns, padding)
            block.over_rows(x, groups, None if seen is None else seen[-len(x) :], unseen)
            block.mlp(x)
        return self.norm(x)


class FoldedBlock:
    """Combined weights of a block, each made when first needed."""

    def __init__(self, block: Block) -> None:
        time, group, mlp = block.layer
        assert isinstance(time, TimeLayer)
        assert isinstance(group, GroupLayer)
        assert isinstance(mlp, FeedForward)
        self.time, self.group, self.feed_forward = time, group, mlp
        self.num_heads = time.self_attention.num_heads

    @cached_property
    def time_qkv(self) -> Tensor:
        """`(D, 3 H d)`, channels of queries and keys in pairs."""
        attention = self.time.self_attention
        q, k = (_in_pairs(p.weight, self.num_heads) for p in (attention.q, attention.k))
        return _after_norm(torch.cat([q, k, attention.v.weight]), self.time)

    @cached_property
    def group_qkv(self) -> Tensor:
        """`(D, 3 H d)`"""
        attention = self.group.self_attention
        return _after_norm(torch.cat([p.weight for p in (attention.q, attention.k, attention.v)]), self.group)

    @cached_property
    def alone(self) -> Tensor:
        """`(D, D)`: what a row adds that sees only itself."""
        attention = self.group.self_attention
        return _after_norm(attention.o.weight @ attention.v.weight, self.group)

    @cached_property
    def hidden(self) -> Tensor:
        """`(D, hidden)`"""
        return _after_norm(self.feed_forward.mlp.wi.weight, self.feed_forward)

    def over_time(self, x: Tensor, keep: int, turns: Tensor, padding: Padding | None) -> Tensor:
        """Attention over time; the last `keep` tokens."""
        normed = _scaled(x, self.time.layer_norm.eps)
        width = self.time_qkv.shape[1] // 3
        kv = (normed @ self.time_qkv[:, width:]).unflatten(-1, (2, self.num_heads, -1))
        q = (normed[-keep:] @ self.time_qkv[:, :width]).unflatten(-1, (1, self.num_heads, -1))
        _turn(q, turns[-keep:])
        _turn(kv[:, :, :1], turns)
        q, k, v = (part.permute(1, 2, 0, 3) for part in (q[:, :, 0], kv[:, :, 0], kv[:, :, 1]))
        out = attend(q, k, v, pattern=padding, scale=1.0)
        kept = x[-keep:]
        _add(kept, out.permute(2, 0, 1, 3).flatten(2), self.time.self_attention.o.weight.T)
        return kept

    def over_rows(self, x: Tensor, groups: RowGroups, seen: Tensor | None, unseen: str) -> None:
        """Attention over the rows of each group, in place."""
        normed = _scaled(x, self.group.layer_norm.eps)
        if groups.pattern is None and seen is None:
            _add(x, normed, self.alone)
        elif groups.pattern is None:
            x += values_alone(normed @ self.alone, seen, unseen=unseen)
        else:
            qkv = (normed @ self.group_qkv).unflatten(-1, (3, self.num_heads, -1))
            q, k, v = (part.transpose(1, 2) for part in qkv.unbind(2))
            out = attend_rows(q, k, v, groups, seen, dropout=0.0, unseen=unseen)
            _add(x, out.transpose(1, 2).flatten(2), self.group.self_attention.o.weight.T)

    def mlp(self, x: Tensor) -> None:
        """The MLP, in place."""
        mlp = self.feed_forward.mlp
        hidden = _scaled(x, self.feed_forward.layer_norm.eps) @ self.hidden
        hidden = hidden.relu_() if mlp.activation is F.relu else mlp.activation(hidden)
        _add(x, hidden, mlp.wo.weight.T)


def _projections(module: nn.Module) -> list[nn.Module]:
    if isinstance(module, Attention):
        return [module.q, module.k, module.v, module.o]
    return [module.wi, module.wo] if isinstance(module, MLP) else []


@torch.no_grad()
def _state(encoder: Encoder) -> Tensor:
    """The sum of every weight: a fifth of the work of combining, and sure where version counters are not."""
    return torch.stack([p.sum(dtype=torch.float32) for p in encoder.parameters()])


def _in_pairs(weight: Tensor, num_heads: int) -> Tensor:
    """Rows `(H d, D)` of each head in the order 0, d/2, 1, d/2 + 1, ...: products of heads do not change."""
    return weight.unflatten(0, (num_heads, 2, -1)).transpose(1, 2).flatten(0, 2)


def _after_norm(weight: Tensor, layer: TimeLayer | GroupLayer | FeedForward) -> Tensor:
    """`(out, in)` behind a norm as `(in, out)` behind the mere scaling."""
    return (weight * layer.layer_norm.weight).T.contiguous()


def _scaled(x: Tensor, eps: float) -> Tensor:
    """`x / sqrt(mean(x^2) + eps)` over the channels."""
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return x * norm.square_().div_(x.shape[-1]).add_(eps).rsqrt_()


def _turn(x: Tensor, turns: Tensor) -> None:
    """Rotates pairs of channels of x `(S, B, ., H, d)` by `turns` `(S, 1, 1, 1, d / 2)`, in place."""
    torch.view_as_complex(x.unflatten(-1, (-1, 2))).mul_(turns)


def _add(x: Tensor, y: Tensor, weight: Tensor) -> None:
    """`x += y @ weight` for tokens `(S, B, .)` in one piece."""
    x.view(-1, x.shape[-1]).addmm_(y.flatten(0, 1), weight)
