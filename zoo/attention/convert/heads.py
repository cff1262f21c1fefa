"""Heads to a mixture of heads: a router that lets the heads act that matter to a token."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from zoo.attention.convert.calls import all_tokens, real_tokens
from zoo.attention.convert.registry import conversion, plain
from zoo.attention.convert.transfer import outputs
from zoo.attention.errors import AttentionError
from zoo.attention.layers.base import AttentionLayer, Inputs, create_attention
from zoo.attention.layers.mixture_of_heads import MixtureOfHeads
from zoo.attention.layers.multihead import MultiHead, split_heads

_SPREAD = 0.1  # of the first logits: weights near 1, but their order is clear
_DAMPING = 1.0  # of the least squares, relative to the mean square of a channel


def _fits(layer: AttentionLayer) -> bool:
    if not (plain(layer, whole_rotary=True) and isinstance(layer, MultiHead)):
        return False
    return layer.num_heads * layer.head_dim == layer.dim


@conversion(
    "moh",
    "multihead without norms, window and YaRN, its heads together as wide as the tokens, rotary on whole "
    "heads or not at all",
    _fits,
    calibrated=True,
)
def to_moh(
    layer: MultiHead,
    calls: Sequence[Inputs],
    *,
    shared_heads: int,
    routed_heads: int,
    balance_weight: float = 0.01,
) -> MixtureOfHeads:
    """Mixture of heads (`moh`) with the same projections; heads that share keys and values get copies.

    The heads that give the most become the shared ones. The router ranks the others by how much each gives to
    a token, as far as that is linear in the token, and weighs those that act nearly alike: training goes on
    from there. The bias of the output makes up for the mean of what is left out. With all heads acting,
    nothing is lost.
    """
    asked = {
        "name": "moh",
        "num_heads": layer.num_heads,
        "shared_heads": shared_heads,
        "routed_heads": routed_heads,
        "qkv_bias": layer.q_proj.bias is not None,
        "causal": layer.causal,
        "balance_weight": balance_weight,
        **({} if layer.rope_theta is None else {"rope_theta": layer.rope_theta}),
    }
    made = create_attention(asked, layer.dim).to(layer.q_proj.weight)
    assert isinstance(made, MixtureOfHeads)
    if any(call.context is not None for call in calls):
        raise AttentionError("moh attends to its own tokens only: it takes no context")
    norms = contributions(layer, calls)
    order = norms.mean(0).argsort(descending=True)
    _take_over(made, layer, order)
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if name.startswith("wg"):
                parameter.zero_()
    if shared_heads + routed_heads == layer.num_heads:
        return made
    _rank(made, all_tokens(calls), norms[:, order[shared_heads:]])
    lost = torch.cat(outputs(layer, calls)) - torch.cat(outputs(made, calls))
    with torch.no_grad():
        made.proj.bias.add_(lost.mean(0))
    return made


@torch.no_grad()
def contributions(layer: MultiHead, calls: Sequence[Inputs]) -> Tensor:
    """What each head adds to each real token, less its mean over tokens, as a length: `(T, H)`."""
    training, found = layer.training, []
    layer.eval()
    weight = layer.o_proj.weight.unflatten(1, (layer.num_heads, -1))  # (C, H, D)
    inner = torch.einsum("chd,che->hde", weight, weight)
    for call in calls:
        x, context, mask, positions, _ = call
        q = split_heads(layer.q_proj(x), layer.num_heads)
        q, (k, v), seen = layer.heads(q, x, context, mask, positions, None)
        out = layer.read(q, k, v, seen)
        found.append(real_tokens(call, out.transpose(1, 2)))
    layer.train(training)
    out = torch.cat(found)
    out = out - out.mean(0)
    return torch.einsum("thd,hde,the->th", out, inner, out).clamp(min=0).sqrt()


@torch.no_grad()
def _take_over(made: MixtureOfHeads, layer: MultiHead, order: Tensor) -> None:
    """The projections of `layer`, its heads in this order."""
    group = layer.num_heads // layer.num_kv_heads
    rows = []
    for proj, copies in ((layer.q_proj, 1), (layer.k_proj, group), (layer.v_proj, group)):
        bias = proj.weight.new_zeros(len(proj.weight)) if proj.bias is None else proj.bias
        both = torch.cat([proj.weight, bias[:, None]], dim=1).unflatten(0, (-1, layer.head_dim))
        rows.append(both.repeat_interleave(copies, dim=0)[order].flatten(0, 1))
    weight, bias = torch.cat(rows).tensor_split([layer.dim], dim=1)
    made.qkv.weight.copy_(weight)
    if made.qkv.bias is not None:
        made.qkv.bias.copy_(bias[:, 0])
    made.proj.weight.copy_(layer.o_proj.weight.unflatten(1, (layer.num_heads, -1))[:, order].flatten(1))
    made.proj.bias.zero_()
    if layer.o_proj.bias is not None:
        made.proj.bias.copy_(layer.o_proj.bias)


@torch.no_grad()
def _rank(made: MixtureOfHeads, tokens: Tensor, norms: Tensor) -> None:
    """Logits of the routed heads by least squares from what they give `(T, E)` to the tokens `(T, C)`."""
    x, wanted = tokens.double(), norms.double()
    wanted = wanted - wanted.mean(1, keepdim=True)
    second = x.mT @ x
    damping = _DAMPING * second.diagonal().mean().clamp(min=1e-12) * torch.eye(len(second)).to(second)
    weight = torch.linalg.solve(second + damping, x.mT @ wanted).mT
    weight *= _SPREAD / (x @ weight.mT).std().clamp(min=1e-12)
    made.wg.weight.copy_(weight)
