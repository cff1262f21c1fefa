"""The encoder of Chronos-2 with its weights combined for forecasting: the same numbers, fewer products.

Norm weights are part of the projections after them, queries, keys and values one product, what a row alone
adds (softmax over one key is 1) one matrix `W_o W_v`; channels of queries and keys stand in pairs, so that
rotation is one complex product. Tokens that are the same in all rows are projected once. On a CPU the
products are oneDNN's, of weights in its own layout, with the activation and the residual in the same pass:
1.15 times as fast as those of `torch.mm` for a thousand tokens.

Shapes: as in `encoder.py`; weights are `(out, in)`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import NamedTuple

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
    OtherTimeAttention,
    ResidualBlock,
    TimeAttention,
    TimeLayer,
)
from domains.forecasting.models.groups import RowGroups, attend_rows, values_alone
from zoo.attention import Padding, attend

# Equal tokens are projected once where they are at least one in so many: joining the parts costs a copy.
SHARE_ALIKE = 8
SAMPLED_EVERY = 509
TOKENS = 1024  # of the products that packed weights are laid out for


class FoldedEncoder:
    """Combined weights of an encoder in eval mode, as they are when this is made."""

    def __init__(self, encoder: Encoder) -> None:
        self.blocks = [FoldedBlock(block) for block in encoder.block]  # pyright: ignore[reportArgumentType]
        self.norm = encoder.final_layer_norm
        self.state = State.of(encoder)

    @classmethod
    def of(cls, encoder: Encoder) -> FoldedEncoder | None:
        """None for other layers over time, and linear layers that are not plain and float32, as of a LoRA."""
        if any(isinstance(module, OtherTimeAttention) for module in encoder.modules()):
            return None
        layers = [m for attention in encoder.modules() for m in _projections(attention)]
        return cls(encoder) if all(map(_is_plain, layers)) else None

    def is_outdated(self, encoder: Encoder) -> bool:
        """Whether a weight has changed since."""
        return not self.state.is_same(State.of(encoder))

    def __call__(
        self,
        x: Tensor,
        keep: int,
        tables: tuple[Tensor, Tensor],
        groups: RowGroups,
        seen: Tensor | None,
        unseen: str,
        *,
        alike: int = 0,
    ) -> Tensor:
        """As `Encoder`, without gradients; the last `alike` tokens are the same in all rows."""
        turns = torch.complex(*tables)[:, None].repeat(1, 1, 2 * self.blocks[0].num_heads)
        padding = None if seen is None else Padding(seen.T)
        last = len(self.blocks) - 1
        for i, block in enumerate(self.blocks):
            kept = keep if i == last else len(x)
            x = block.over_time(x, kept, turns, padding, alike=0 if i else alike)
            x = block.over_rows(x, groups, None if seen is None else seen[-len(x) :], unseen)
            x = block.mlp(x)
        return self.norm(x)


class FoldedBlock:
    """Combined weights of a block, each made when first needed."""

    def __init__(self, block: Block) -> None:
        time, group, mlp = block.layer
        assert isinstance(time, TimeLayer)
        assert isinstance(group, GroupLayer)
        assert isinstance(mlp, FeedForward)
        assert isinstance(time.self_attention, TimeAttention)
        self.time, self.group, self.feed_forward = time, group, mlp
        self.time_attention = time.self_attention
        self.num_heads = self.time_attention.num_heads

    @cached_property
    def time_qkv(self) -> Tensor:
        """`(3 H d, D)`, channels of queries and keys in pairs."""
        return packed(torch.cat(self._time_weights()))

    @cached_property
    def time_q(self) -> Tensor:
        """`(H d, D)`, channels in pairs."""
        return packed(self._time_weights()[0])

    @cached_property
    def time_kv(self) -> Tensor:
        """`(2 H d, D)`, channels of keys in pairs."""
        return packed(torch.cat(self._time_weights()[1:]))

    @cached_property
    def time_out(self) -> Tensor:
        """`(D, H d)`"""
        return packed(self.time_attention.o.weight)

    def _time_weights(self) -> tuple[Tensor, Tensor, Tensor]:
        attention = self.time_attention
        q, k = (_in_pairs(p.weight, self.num_heads) for p in (attention.q, attention.k))
        q, k, v = (_after_norm(weight, self.time) for weight in (q, k, attention.v.weight))
        return q, k, v

    @cached_property
    def group_qkv(self) -> Tensor:
        """`(3 H d, D)`"""
        attention = self.group.self_attention
        weight = torch.cat([p.weight for p in (attention.q, attention.k, attention.v)])
        return packed(_after_norm(weight, self.group))

    @cached_property
    def group_out(self) -> Tensor:
        """`(D, H d)`"""
        return packed(self.group.self_attention.o.weight)

    @cached_property
    def alone(self) -> Tensor:
        """`(D, D)`: what a row adds that sees only itself."""
        attention = self.group.self_attention
        return packed(_after_norm(attention.o.weight @ attention.v.weight, self.group))

    @cached_property
    def hidden(self) -> Tensor:
        """`(hidden, D)`"""
        return packed(_after_norm(self.feed_forward.mlp.wi.weight, self.feed_forward))

    @cached_property
    def hidden_out(self) -> Tensor:
        """`(D, hidden)`"""
        return packed(self.feed_forward.mlp.wo.weight)

    def over_time(
        self, x: Tensor, keep: int, turns: Tensor, padding: Padding | None, *, alike: int = 0
    ) -> Tensor:
        """Attention over time; the last `keep` tokens. The last `alike` of x are the same in all rows."""
        q, k, v = (
            part.unflatten(-1, (self.num_heads, -1)).permute(1, 2, 0, 3)
            for part in self._over_time_inputs(x, keep, turns, alike)
        )
        out = attend(q, k, v, pattern=padding, scale=1.0)
        out = out.permute(2, 0, 1, 3).flatten(2)
        return product(out, self.time_out, plus=x[-keep:])

    def _over_time_inputs(
        self, x: Tensor, keep: int, turns: Tensor, alike: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Queries `(keep, B, H d)`, keys and values `(S, B, H d)`, the first two turned."""
        normed = _scaled(x, self.time.layer_norm.eps)
        if keep < len(x):
            q = product(normed[-keep:], self.time_q)
            k, v = product(normed, self.time_kv).chunk(2, -1)
            _turn(q, turns[-keep:, :, : q.shape[-1] // 2])
            _turn(k, turns[..., : k.shape[-1] // 2])
            return q, k, v
        if alike * SHARE_ALIKE < len(x):
            qkv = product(normed, self.time_qkv)
        else:
            same = product(normed[-alike:, :1].contiguous(), self.time_qkv)
            qkv = torch.cat([product(normed[:-alike], self.time_qkv), same.expand(-1, x.shape[1], -1)])
        _turn(qkv[..., : qkv.shape[-1] // 3 * 2], turns)
        q, k, v = qkv.chunk(3, -1)
        return q, k, v

    def over_rows(self, x: Tensor, groups: RowGroups, seen: Tensor | None, unseen: str) -> Tensor:
        """Attention over the rows of each group."""
        normed = _scaled(x, self.group.layer_norm.eps)
        if groups.pattern is None and seen is None:
            return product(normed, self.alone, plus=x)
        if groups.pattern is None:
            return x + values_alone(product(normed, self.alone), seen, unseen=unseen)
        qkv = product(normed, self.group_qkv).unflatten(-1, (3, self.num_heads, -1))
        q, k, v = (part.transpose(1, 2) for part in qkv.unbind(2))
        out = attend_rows(q, k, v, groups, seen, dropout=0.0, unseen=unseen).transpose(1, 2).flatten(2)
        return product(out, self.group_out, plus=x)

    def mlp(self, x: Tensor) -> Tensor:
        mlp = self.feed_forward.mlp
        hidden = activated(_scaled(x, self.feed_forward.layer_norm.eps), self.hidden, mlp.activation)
        return product(hidden, self.hidden_out, plus=x)


def residual(block: ResidualBlock, x: Tensor) -> Tensor:
    """`block(x)` in eval mode, without gradients, `(N, B, in) -> (N, B, out)`."""
    hidden, out, beside = block.hidden_layer, block.output_layer, block.residual_layer
    if not all(map(_is_plain, (hidden, out, beside))):
        return block(x)
    inner = activated(x, hidden.weight, block.activation, bias=hidden.bias)
    return product(inner, out.weight, bias=out.bias, plus=product(x, beside.weight, bias=beside.bias))


def activated(
    x: Tensor, weight: Tensor, activation: Callable[[Tensor], Tensor], *, bias: Tensor | None = None
) -> Tensor:
    """`activation(x @ weight.T + bias)`."""
    if activation is F.relu:
        return product(x, weight, bias=bias, relu=True)
    return activation(product(x, weight, bias=bias))


def product(
    x: Tensor,
    weight: Tensor,
    *,
    bias: Tensor | None = None,
    relu: bool = False,
    plus: Tensor | None = None,
) -> Tensor:
    """`x @ weight.T + bias`, then relu, then `+ plus`, in float32.

    Args:
        x: `(S, B, in)`.
        weight: `(out, in)`, on a CPU also `packed`.
    """
    if _on_onednn(x):
        pointwise = torch.ops.mkldnn._linear_pointwise
        if plus is None:
            return pointwise(x, weight, bias, "relu" if relu else "none", [], "")
        return pointwise.binary(x, plus, weight, bias, "add")
    if plus is not None:
        plus = plus if bias is None else plus + bias
        out = torch.addmm(plus.flatten(0, 1), x.flatten(0, 1), weight.T)
        return out.view(plus.shape)
    out = F.linear(x, weight, bias)
    return out.relu_() if relu else out


def packed(weight: Tensor) -> Tensor:
    """`(out, in)` as `product` takes it many times: in oneDNN's layout, where that multiplies."""
    if not _on_onednn(weight):
        return weight
    return torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), TOKENS)


def _on_onednn(x: Tensor) -> bool:
    return x.device.type == "cpu" and torch.backends.mkldnn.is_available()


def _is_plain(layer: nn.Module) -> bool:
    return type(layer) is nn.Linear and layer.weight.dtype == torch.float32


def _projections(module: nn.Module) -> list[nn.Module]:
    if isinstance(module, Attention):
        return [module.q, module.k, module.v, module.o]
    return [module.wi, module.wo] if isinstance(module, MLP) else []


class State(NamedTuple):
    """What tells whether weights have changed: version counters, and for what these miss (a change of many
    elements through `.data`) a sample; reading all of them takes a fiftieth of a forecast of 32 series.
    """

    versions: list[int]
    sample: Tensor

    @classmethod
    @torch.no_grad()
    def of(cls, encoder: Encoder) -> State:
        weights = list(encoder.parameters())
        versions = [0 if p.is_inference() else p._version for p in weights]
        return cls(versions, torch.cat([p.flatten()[::SAMPLED_EVERY].float() for p in weights]))

    def is_same(self, other: State) -> bool:
        one, two = self.sample, other.sample
        alike = self.versions == other.versions and one.device == two.device
        return alike and torch.equal(one, two)


def _in_pairs(weight: Tensor, num_heads: int) -> Tensor:
    """Rows `(H d, D)` of each head in the order 0, d/2, 1, d/2 + 1, ...: products of heads do not change."""
    return weight.unflatten(0, (num_heads, 2, -1)).transpose(1, 2).flatten(0, 2)


def _after_norm(weight: Tensor, layer: TimeLayer | GroupLayer | FeedForward) -> Tensor:
    """`(out, in)` behind a norm, for what stands behind the mere scaling."""
    return weight * layer.layer_norm.weight


def _scaled(x: Tensor, eps: float) -> Tensor:
    """`x / sqrt(mean(x^2) + eps)` over the channels."""
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return x * norm.square_().div_(x.shape[-1]).add_(eps).rsqrt_()


def _turn(x: Tensor, turns: Tensor) -> None:
    """Rotates pairs of channels of x `(S, B, C)` by `turns` `(S, 1, C / 2)`, in place."""
    torch.view_as_complex(x.unflatten(-1, (-1, 2))).mul_(turns)
