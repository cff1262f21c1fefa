"""Panels of the layers that look along a sequence."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from weights import (
    DIM,
    HEADS,
    N,
    Panel,
    build,
    gradients,
    mixed,
    panel,
    seen,
    tokens,
)

from zoo.attention import capture
from zoo.attention.heads import key_norms, map_of, shared_map
from zoo.attention.layers.depth import AttentionResiduals, attention_residual


def multihead() -> list[Panel]:
    x, sinks, affine = tokens(), build("sinks", causal=True), build("affine_scaled", causal=True)
    sinks.sinks.data.fill_(2.0)
    affine.alpha_ma.fill_(0.9)
    kept = mixed(sinks, x)
    lost = torch.cat([1 - kept.sum(1, keepdim=True), torch.zeros(len(kept), 1), kept], 1)
    return [
        panel("multihead, causal", seen(build("multihead", causal=True), x)[0]),
        panel("multihead, window=5", seen(build("multihead", causal=True, window=5), x)[0]),
        panel(
            "gated: a factor for each row",
            mixed(build("gated", causal=True, gate="headwise"), x),
            by_row=False,
        ),
        panel("sinks: left, what is lost", lost, by_row=False),
        panel("affine_scaled", mixed(affine, x)),
    ]


def key_driven() -> list[Panel]:
    def served(counts: Tensor) -> Tensor:
        return F.one_hot(map_of(counts, 8), 4)

    def dealt(name: str, x: Tensor) -> Tensor:
        layer = build(name, num_heads=8, num_kv_heads=4)
        return served(layer.allocation(key_norms(layer.split(layer.k(x)))))

    heads = {"across": "key/value head", "down": "query head"}
    one, other = tokens(), tokens(seed=8)
    dha = build("dha", num_heads=8, key_heads=4, value_heads=2)
    return [
        panel("grouped queries, pgqa", F.one_hot(shared_map(8, 4), 4), **heads),
        panel("kdgqa, one batch", dealt("kdgqa", one), **heads),
        panel("kdgqa, another batch", dealt("kdgqa", other), **heads),
        panel("dha: key heads", F.one_hot(dha.key_map), across="key head", down="query head"),
        panel("dha: value heads", F.one_hot(dha.value_map), across="value head", down="query head"),
    ]


def latent() -> list[Panel]:
    x, widths = tokens(), {"kv_rank": 8, "nope_dim": 8, "rope_dim": 4, "value_dim": 8}
    mla, tpla = build("mla", **widths), build("tpla", shards=2, **widths)
    dense = build("multihead", causal=True)
    caches = [layer.init_cache(1) for layer in (mla, dense)]
    for layer, cache in zip((mla, dense), caches, strict=True):
        layer.step(x, cache)
    small = caches[0].tensors[0][0, 0]
    large = torch.cat([rows[0].transpose(0, 1).flatten(1) for rows in caches[1].tensors[:2]], 1)
    numbers = {"across": "numbers kept", "down": "token", "by_row": False}
    return [
        panel("mla, head 0", seen(mla, x)[0]),
        panel("tpla: shard 0", seen(tpla, x)[0]),
        panel("tpla: shard 1, same head", seen(tpla, x)[HEADS]),
        panel("cache of mla: r + dr", small, **numbers),
        panel("multihead: 2 H D", large, **numbers),
    ]


def compressed() -> list[Panel]:
    x = tokens().requires_grad_()
    layer = build("cca", num_kv_heads=2, head_dim=8)
    q, _, v = layer.qkv_proj(x, None)

    return [
        panel("cca", seen(layer, x)[0]),
        panel("which tokens make a query", gradients(q[0, 0].sum(-1), x), across="token"),
        panel("value head 0", gradients(v[0, 0].sum(-1), x), across="token", down="value"),
        panel("value head 1, delayed", gradients(v[0, 1].sum(-1), x), across="token", down="value"),
    ]


def window() -> list[Panel]:
    x = tokens()
    layer = build("s2", num_groups=2).train()
    return [
        panel("local, window=5", seen(build("local", window=5), x)[0]),
        panel("local, window=5, causal", seen(build("local", window=5, causal=True), x)[0]),
        panel("s2, first heads", seen(layer, x, 0)[0]),
        panel("s2, other heads", seen(layer, x, 1)[0]),
        panel("s2, sinks=2", mixed(build("s2", num_groups=2, sinks=2).train(), x, 3)),
    ]


def fit() -> list[Panel]:
    layer, x = build("fit", group_size=4, latents=2), tokens()

    def looked(name: str, layer: Any) -> Tensor:
        """Weights of head 0, those of the groups one after the other on the diagonal."""
        with torch.no_grad(), capture(layer) as maps:
            layer(x)
        return torch.block_diag(*maps[name].weights[:, 0])

    causal = build("fit", group_size=4, latents=2, causal=True)
    return [
        panel("inside the groups", looked("local", layer)),
        panel("2 latents read each group", looked("read", layer), across="token", down="latent"),
        panel("all latents", looked("across", layer), across="latent", down="latent"),
        panel("tokens read latents", looked("write", layer), across="latent"),
        panel("all latents, causal", looked("across", causal), across="latent", down="latent"),
    ]


def forgetting() -> list[Panel]:
    x = tokens()
    layers = [build("forgetting") for _ in range(2)]
    for layer, bias in zip(layers, (3.0, 0.0), strict=True):
        layer.f_proj.bias.data.fill_(bias)
    return [
        panel("forgetting, gates near 0.95", seen(layers[0], x)[0]),
        panel("forgetting, gates near 0.5", seen(layers[1], x)[0]),
        panel("stick_breaking", seen(build("stick_breaking"), x)[0]),
        panel("with attend_current", seen(build("stick_breaking", attend_current=True), x)[0]),
    ]


def convolved_relative() -> list[Panel]:
    x, near = tokens(), build("rcmha")
    distance = torch.arange(2 * near.max_length) - near.max_length
    near.key_pos_bias.data.copy_((0.8 * distance.clamp(max=0))[:, None].expand(-1, HEADS))
    memory = torch.cat([tokens(4, seed=5), x], 1)
    with torch.no_grad(), capture(near) as maps:
        near(x, memory)
    inputs = x.clone().requires_grad_()
    queries = near._convolved("q", inputs, None, None)[0, 0].sum(-1)
    return [
        panel("rcmha as it starts", seen(build("rcmha"), x)[0]),
        panel("with a bias for near keys", seen(near, x)[0]),
        panel("and 4 tokens of memory", maps["ConvolvedRelative"].weights[0, 0]),
        panel("which tokens make a query", gradients(queries, inputs), across="token"),
    ]


def simplicial() -> list[Panel]:
    def pairs(place: int, **options: Any) -> Tensor:
        """`(N, N)`: weights of pairs of a first and a second token, for one query."""
        layer, x = build("simplicial", causal=True, **options), 1.4 * tokens()
        with torch.no_grad(), capture(layer, scores=True) as maps:
            layer(x)
        found = next(iter(maps.values()))
        firsts, scores = (
            part[0].unflatten(0, (HEADS, -1))[0, :, place] for part in (found.weights, found.scores)
        )
        if options:  # the second tokens of a window end at the query
            size = options["windows"][1]
            begin = place - size + 1
            room = (0, 0, begin, N - place - 1)
            return F.pad(scores.logsumexp(-1).softmax(0)[:, None] * firsts, room).T
        return (scores[: place + 1].logsumexp(-1).softmax(0)[:, None] * firsts[: place + 1]).T

    axes = {"across": "second token", "down": "first token", "by_row": False}
    return [
        panel("query 6", F.pad(pairs(6), (0, N - 7)), **axes),
        panel("query 13", F.pad(pairs(13), (0, N - 14)), **axes),
        panel("query 13, windows (8, 4)", pairs(13, windows=(8, 4)), **axes),
    ]


def depth() -> list[Panel]:
    def read(block_size: int) -> Tensor:
        """`(readers, sources)`: mean weights over the tokens."""
        torch.manual_seed(0)
        stack = AttentionResiduals(DIM, [nn.Linear(DIM, DIM) for _ in range(9)], block_size=block_size)
        found = []
        for reader in [*stack.readers, stack.last]:
            nn.init.normal_(reader.query, std=0.3)
            reader.register_forward_hook(
                lambda module, inputs, _: found.append(
                    attention_residual(inputs[0], module.query, module.norm_weight)[1].mean((1, 2))
                )
            )
        stack(tokens())
        return torch.stack([F.pad(row, (0, len(found[-1]) - len(row))) for row in found])

    axes = {"across": "source", "down": "sub-layer, then the end"}
    return [panel("block_size=1", read(1), **axes), panel("block_size=3", read(3), **axes)]


def channel() -> list[Panel]:
    x = tokens()
    groups, cascaded, heads = build("channel_groups"), build("cascaded", key_dim=8), build("head_tokens")
    return [
        panel("channel_groups, head 0", seen(groups, x)[0], across="channel", down="channel"),
        panel("cascaded, head 0", seen(cascaded, x, 0)[0]),
        panel("cascaded, head 3", seen(cascaded, x, HEADS - 1)[0]),
        panel("head_tokens: 16 + 4", seen(heads, x)[0]),
    ]


PICTURES: dict[str, Callable[[], list[Panel]]] = {
    "multihead": multihead,
    "key_driven": key_driven,
    "latent": latent,
    "compressed": compressed,
    "window": window,
    "fit": fit,
    "forgetting": forgetting,
    "depth": depth,
    "channel": channel,
    "convolved_relative": convolved_relative,
    "simplicial": simplicial,
}
