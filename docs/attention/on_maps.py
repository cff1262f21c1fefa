"""Panels of the layers that look over a map: which cells one query sees."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from weights import DIM, HEADS, N, Panel, build, on_map, panel, seen, tokens

from zoo.attention import Causal, capture, rotary, rotary_tables
from zoo.attention.layers.deformable import DeformableAttention
from zoo.attention.rotary import axial_rotary_tables, plane_rotary
from zoo.attention.streaming import SourceAndTarget, stream_positions

SHAPE = (12, 12)
MIDDLE, CORNER = (5, 6), (1, 0)


def cells(scale: float = 1.0) -> Tensor:
    """`(1, 144, DIM)`: noise that is smooth over the map."""
    noise = torch.randn(1, DIM, *SHAPE, generator=torch.Generator().manual_seed(1))
    smooth = torch.nn.functional.avg_pool2d(noise, 3, 1, 1, count_include_pad=False)
    return scale * 3 * smooth.flatten(2).mT


def at(place: tuple[int, int]) -> int:
    return place[0] * SHAPE[1] + place[1]


def grid(title: str, weights: Tensor, query: tuple[int, int]) -> Panel:
    """One row of the weights `(N, N)` of a head."""
    return on_map(title, weights[at(query)], SHAPE, query)


def neighbourhood() -> list[Panel]:
    x = cells()

    def looked(name: str, **options: int) -> Tensor:
        return seen(build(name, shape=SHAPE, **options), x)[0]

    near = looked("neighbourhood", kernel=5)
    windows = looked("shifted_window", window=4)
    shifted = looked("shifted_window", window=4, shift=2)
    halo = looked("halo", block=4, halo=2)
    return [
        grid("neighbourhood, kernel=5", near, MIDDLE),
        grid("the same in a corner", near, CORNER),
        grid("dilation=2", looked("neighbourhood", kernel=5, dilation=2), MIDDLE),
        grid("stride=3", looked("neighbourhood", kernel=5, stride=3), MIDDLE),
        grid("shifted_window, window=4", windows, MIDDLE),
        grid("shift=2", shifted, MIDDLE),
        grid("halo, block=4, halo=2", halo, MIDDLE),
        grid("the same in a corner", halo, CORNER),
    ]


def regions() -> list[Panel]:
    x = cells()
    bilevel = seen(build("bilevel", shape=SHAPE, regions=4, topk=3), x)[0]
    hilo = build("hilo", shape=SHAPE, window=3)
    high = torch.zeros(len(x[0]))
    high.view(SHAPE)[3:6, 6:9] = seen(hilo, x, 0).unflatten(0, (-1, 2)).flatten(0, 1)[0][6].view(3, 3)
    means = seen(hilo, x, 1)[0][at(MIDDLE)].view(4, 4).repeat_interleave(3, 0).repeat_interleave(3, 1)
    agent = build("agent", shape=SHAPE, agents=9)
    rows, columns = seen(build("kronecker", shape=SHAPE), 5 * x)[0][at(MIDDLE)].split(SHAPE)
    gathered, read = seen(agent, x, 0)[0], seen(agent, x, 1)[0]
    return [
        grid("bilevel: 3 of 16 regions", bilevel, MIDDLE),
        on_map("hilo: a window", high, SHAPE, MIDDLE),
        on_map("hilo: means of windows", means.flatten(), SHAPE, MIDDLE),
        grid("agent: by way of 9 agents", read @ gathered, MIDDLE),
        on_map("kronecker: rows, columns", (rows[:, None] + columns).flatten(), SHAPE, MIDDLE),
    ]


def mixture_of_heads() -> list[Panel]:
    x, row = cells(), tokens()
    moh = build("moh", num_heads=8, shared_heads=2, routed_heads=3)
    llama = build("moh_llama", num_heads=8)
    lengths = llama.gates(llama.q_proj(row).unflatten(-1, (8, -1)).transpose(1, 2))
    near = build("moh_aggregated", shape=SHAPE, shared_heads=1, routed_heads=2, window=3, sr_ratio=4)
    cosine = build("moh_cosine", shape=SHAPE, shared_heads=1, routed_heads=2)
    pools = seen(near, x, 0)[0][at(MIDDLE)].view(3, 3).repeat_interleave(4, 0).repeat_interleave(4, 1)
    axes = {"across": "head", "down": "token", "by_row": False}
    return [
        panel("moh: 2 + 3 of 6", moh.gates(row)[0], **axes),
        panel("moh_llama: 4 + 2", lengths[0].T, **axes),
        grid("moh_aggregated: near", seen(near, x, 1)[0], MIDDLE),
        on_map("moh_aggregated: pools", pools.flatten(), SHAPE, MIDDLE),
        grid("moh_cosine: all", seen(cosine, x)[0], MIDDLE),
    ]


def positions() -> list[Panel]:
    """Scores of tokens that are all alike but for their places."""
    torch.manual_seed(0)
    one, far = torch.ones(1, 1, N, DIM), torch.arange(N)
    turned = rotary(one, *rotary_tables(far, DIM, theta=10.0))
    a, b = torch.randn(2, DIM) * DIM**-0.5
    plane = plane_rotary(a.expand(1, 1, N, DIM), far, a, b, frequency=0.4)
    ones = torch.ones(1, 1, SHAPE[0] * SHAPE[1], DIM)
    place = torch.arange(ones.shape[2])
    on_grid = rotary(ones, *axial_rotary_tables([place // SHAPE[1], place % SHAPE[1]], DIM, theta=10.0))
    target = torch.tensor([0, 0, 0, 1, 0, 0, 1, 1, 0, 0, 1, 0, 1, 1, 1, 1], dtype=torch.bool)
    pattern = Causal() & SourceAndTarget(target)
    mask = pattern.mask(1, N, N, target.device)
    streamed = rotary(one, *rotary_tables(stream_positions(target), DIM, theta=10.0))
    assert mask is not None
    return [
        panel("rotary", turned[0, 0] @ turned[0, 0].T, by_row=False),
        grid("rotary on two axes", on_grid[0, 0] @ on_grid[0, 0].T, MIDDLE),
        panel("plane_rotary", (plane @ plane.mT)[0, 0], by_row=False),
        panel("source and target", mask[0, 0].float()),
        panel("with places of their own", (streamed @ streamed.mT * mask)[0, 0], by_row=False),
    ]


def deformable() -> list[Panel]:
    torch.manual_seed(0)
    layer = DeformableAttention(DIM, HEADS, num_levels=2, num_points=4)
    torch.nn.init.normal_(layer.attention_weights.weight, std=0.1)
    shapes = [SHAPE, (6, 6)]
    memory = torch.randn(1, 180, DIM)
    references = torch.tensor([0.54, 0.46]).expand(1, 1, 2, 2)
    with torch.no_grad(), capture(layer) as maps:
        layer(tokens(1), references, layer.values(memory), shapes)
    weights = next(iter(maps.values())).weights[0, :, 0]
    fine = weights[:, :144].unflatten(1, SHAPE)
    coarse = weights[:, 144:].unflatten(1, (6, 6))
    options = {"across": "", "down": "", "by_row": False}
    return [
        panel("head 0, fine map", fine[0], mark=MIDDLE, **options),
        panel("head 0, coarse map", coarse[0], mark=(2, 3), **options),
        panel("all heads, fine map", fine.sum(0), mark=MIDDLE, **options),
        panel("all heads, coarse map", coarse.sum(0), mark=(2, 3), **options),
    ]


PICTURES: dict[str, Callable[[], list[Panel]]] = {
    "neighbourhood": neighbourhood,
    "regions": regions,
    "mixture_of_heads": mixture_of_heads,
    "deformable": deformable,
    "positions": positions,
}
