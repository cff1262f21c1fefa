"""Panels of the layers that read a state, slots, or a memory that learns."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from weights import HEADS, N, Panel, build, gradients, kinds, matched, mixed, panel, seen, tokens, unit_values

from zoo.attention.layers.injective import injective as inline_weights
from zoo.attention.layers.multihead import split_heads


def linear() -> list[Panel]:
    x, heads = kinds(), {"feature_dim": 8}
    layers = {
        "linear": matched(build("linear")),
        "lightning": build("lightning"),
        "retention": matched(build("retention")),
        "simple_gla": matched(build("simple_gla", expand_k=1, temperature=4)),
        "gla": matched(build("gla", expand_k=1, temperature=4)),
        "mlstm": matched(build("mlstm", expand_k=1)),
        "based": build("based", **heads),
        "rebased": matched(build("rebased", **heads)),
        "gsa": matched(build("gsa", slots=8)),
        "cosformer": matched(build("cosformer")),
        "hedgehog": matched(build("hedgehog", causal=True)),
    }
    with torch.no_grad():
        layers["mlstm"].f_proj.bias.fill_(1.5)
        layers["based"].proj_k.weight.copy_(layers["based"].proj_q.weight)
        layers["lightning"].qkv_proj.weight[8:16] = layers["lightning"].qkv_proj.weight[:8]
    scale = {"lightning": 4.0, "based": 3.0, "gsa": 4.0, "linear": 4.0, "hedgehog": 10.0}
    return [panel(name, unit_values(layer, scale.get(name, 1.0) * x)[0]) for name, layer in layers.items()]


def delta() -> list[Panel]:
    x = kinds()
    plain = matched(build("simple_gla", expand_k=1))
    layers = {name: matched(build(name, kernel=None)) for name in ("deltanet", "gated_deltanet", "kda")}
    with torch.no_grad():
        plain.gk_proj.bias.fill_(20.0)
        for layer in layers.values():
            layer.b_proj.weight.zero_()[:, 0] = 1.0
        for name in ("gated_deltanet", "kda"):
            layers[name].A_log.zero_()
            layers[name].dt_bias.fill_(-2.0)
    return [
        panel("sum, without delta rule", unit_values(plain, x)[0]),
        *(panel(name, unit_values(layer, x)[0]) for name, layer in layers.items()),
    ]


def injective() -> list[Panel]:
    x, ones = tokens(), torch.eye(N).expand(1, HEADS, -1, -1)
    inline, mala, found = build("injective"), build("magnitude"), []
    q, k, _ = (split_heads(rows, HEADS) for rows in inline.qkv(x).chunk(3, -1))
    heads = mala.heads

    def spy(q: Tensor, k: Tensor, v: Tensor, tables: tuple[Tensor, Tensor], mask: Tensor | None) -> Tensor:
        found.append(heads(q, k, ones, tables, mask))
        return heads(q, k, v, tables, mask)

    mala.heads = spy
    mala(x)
    return [
        panel("injective", inline_weights(q, k, ones)[0, 0]),
        panel("magnitude", found[0][0, 0]),
        panel("linear, for comparison", unit_values(build("linear", causal=False), x)[0]),
    ]


def slots() -> list[Panel]:
    x = tokens(scale=8.0)
    abc, nystrom = build("abc", slots=6), build("nystrom", landmarks=4)
    held, read = seen(abc, x, 1)[0], seen(abc, x, 2)[0]
    return [
        panel("abc: what 6 slots hold", held, across="token", down="slot"),
        panel("abc: by way of the slots", read @ held),
        panel("nystrom, 4 landmarks", mixed(nystrom, x / 2)),
        panel("gam: trained slots", seen(build("gam", slots=N), x / 5)[0], across="slot"),
    ]


def hybrid() -> list[Panel]:
    x = tokens()
    layer, affine = build("lolcats", window=4), build("lolcats", window=4, affine=True)
    affine.window_factors.data.fill_(2.0)
    still = build("still", window=4, num_salient=4)
    return [
        panel("lolcats: the window", seen(layer, x)[0]),
        panel("lolcats, window=4", mixed(layer, x)),
        panel("affine, more for the window", mixed(affine, x)),
        panel("still, 4 salient tokens", mixed(still, x)),
    ]


def titans() -> list[Panel]:
    x = tokens(scale=1.0).requires_grad_()
    memory = {"chunk_size": 4, "depth": 1, "norm_residual": False}
    linear = build("titans", num_heads=1, **memory)

    def touched(name: str, **options: int) -> Tensor:
        """`(N, N)`: the gradients of the outputs by the tokens."""
        layer = build(name, persistent=2, memory={"chunk_size": 4}, **options)
        return gradients(layer(x)[0].square().sum(-1), x)

    rows = {"across": "token", "down": "output"}
    return [
        panel("titans: weights of values", mixed(linear, x.detach(), values="to_values", out=None)),
        panel("titans_mac, segments of 4", touched("titans_mac", segment=4), **rows),
        panel("titans_mag, window=3", touched("titans_mag", window=3), **rows),
        panel("titans_mal, window=3", touched("titans_mal", window=3), **rows),
    ]


PICTURES: dict[str, Callable[[], list[Panel]]] = {
    "linear": linear,
    "delta": delta,
    "injective": injective,
    "slots": slots,
    "hybrid": hybrid,
    "titans": titans,
}
