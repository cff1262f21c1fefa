"""Panels of the layers that choose, or are told, which few keys a query reads."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from weights import N, Panel, build, mixed, panel, seen, tokens

from zoo.attention import capture


def sparse() -> list[Panel]:
    x = tokens()
    blocks = {"block_size": 4, "num_selected": 2}
    nsa = build("nsa", num_heads=4, num_kv_heads=2, window=3, **{**blocks, "num_selected": 3})
    return [
        panel("nsa: block means", seen(nsa, x, 1)[0], across="block"),
        panel("nsa: selected blocks", seen(nsa, x, 0)[0]),
        panel("nsa: window", seen(nsa, x, 2)[0]),
        panel("nsa: gated sum", mixed(nsa, x)),
        panel("moba, 2 blocks of 4", seen(build("moba", **blocks), x)[0]),
        panel("dsa, 4 tokens", seen(build("dsa", num_selected=4), x)[0]),
        panel("landmark, blocks of 4", seen(build("landmark", block_size=4), x)[0]),
    ]


def routing() -> list[Panel]:
    x = tokens()
    layer = build("routing", num_clusters=4, window_size=4)
    shared = build("routing", num_clusters=4, window_size=4, shared_qk=True)
    return [
        panel("routing, head 0", mixed(layer, x)),
        panel("routing, head 1", mixed(layer, x, 1)),
        panel("shared_qk", mixed(shared, x)),
    ]


def hcam() -> list[Panel]:
    x = tokens()
    layers = {k: build("hcam", chunk_size=4, k=k) for k in (1, 2, 4)}
    for layer in layers.values():
        nn.init.eye_(layer.within_mem_attn.linear.weight)
    name = "within_mem_attn.value"
    return [
        panel(f"k={k} chunks of 4", mixed(layer, x, values=name, out=None)) for k, layer in layers.items()
    ]


def fixed() -> list[Panel]:
    x = tokens(24)
    torch.manual_seed(0)
    return [
        panel("power, blocks of 1", seen(build("power", block_size=1, window=2), x)[0]),
        panel("power, blocks of 2", seen(build("power", block_size=2, window=1), x)[0]),
        panel("ssa, training", seen(build("ssa", share=0.25).train(), x)[0]),
        panel("ssa, causal, training", seen(build("ssa", share=0.25, causal=True).train(), x)[0]),
    ]


def core_context() -> list[Panel]:
    x = tokens(24)
    layer = build("core_context", group_size=4, window=5)
    return [
        panel("core tokens", seen(layer, x, 1)[0], across="group"),
        panel("core_context", mixed(layer, x)),
        panel("superlinear, 2 spans", mixed(build("superlinear"), x)),
        panel("superlinear, 1 short span", mixed(build("superlinear", num_spans=1, span_factor=1.0), x)),
    ]


def steps(layer: nn.Module, x: Tensor, cache: object) -> Tensor:
    """`(n, N)`: weights of head 0 while tokens are decoded one by one."""
    rows = []
    for i in range(x.shape[1]):
        with torch.no_grad(), capture(layer) as maps:
            layer(x[:, i : i + 1], cache=cache)
        row = next(iter(maps.values())).weights[0, 0, 0]
        rows.append(F.pad(row, (0, N - len(row))))
    return torch.stack(rows)


def clustered() -> list[Panel]:
    x = tokens()
    squeezed = build("squeezed", clusters=0.34, threshold=0.08)
    cache = squeezed.init_cache(1)
    first = squeezed(x[:, :12], cache=cache)
    squeezed.squeeze(cache)
    assert first.shape[1] == 12
    chunks = {"num_selected": 6, "num_global": 1, "num_local": 2, "chunk_size": 4}
    return [
        panel("squeezed, 4 queries", steps(squeezed, x[:, 12:], cache)),
        panel("dhsa, 6 keys", seen(build("dhsa", num_instruction=0, **chunks), x)[0]),
        panel("dhsa, 3 queries in full", mixed(build("dhsa", num_instruction=3, **chunks), x)),
    ]


def reused() -> list[Panel]:
    x = tokens()
    frozen = build("sparsed", block_size=2, share=0.3)
    full = seen(frozen, x)[0]
    frozen.freeze(x)
    recycled = build("recycled", num_kept=3, stride=4)
    return [
        panel("sparsed: full, then frozen", full),
        panel("sparsed: later steps", seen(frozen, tokens(seed=4))[0]),
        panel("recycled, every 4th in full", steps(recycled, x, recycled.init_cache(1))),
    ]


PICTURES: dict[str, Callable[[], list[Panel]]] = {
    "sparse": sparse,
    "routing": routing,
    "hcam": hcam,
    "fixed": fixed,
    "core_context": core_context,
    "clustered": clustered,
    "reused": reused,
}
