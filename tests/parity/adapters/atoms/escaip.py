"""EScAIP: outputs, losses, the graph and what happens inside."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import zoo
from domains.atoms.graph.features import directions
from domains.atoms.models.escaip import EScAIP, Graph
from parity.adapters.atoms.common import frequency_vectors, in_place_of, losses, slot_order, structures
from parity.fixture import Fixture

Stage = tuple[Tensor, list[Tensor]]
"""Atoms `(N, H)`, and edges `(n, k, H)` of each tile."""
FREQUENCIES = [20, 10, 4, 10, 20]
"""The published list, for configurations that do not say."""


def escaip(fixture: Fixture) -> tuple[dict[str, Tensor], dict[str, Any]]:
    backbone = fixture.spec["config"]["backbone"]
    model = zoo.from_official("escaip_h512l10", fixture.state_dict(), **backbone)
    assert isinstance(model, EScAIP)
    batch = structures(fixture)
    graph = model.graph(batch)
    order = slot_order(fixture, graph.index, directions(graph.vectors), graph.mask)
    out = _graph(fixture, model, graph, order)
    stages = _watched(model)
    found = model(batch)
    if "loss/total" in fixture.tensors:
        out |= losses(fixture, model, found, batch, "per_structure")
    energy = found["energy"]
    # With a global readout the official energies have one axis more.
    out["output/energy"] = energy[:, None] if backbone.get("use_global_readout") else energy
    out["output/forces"] = found["forces"]
    if "stress" in found:
        out["output/stress"] = found["stress"].flatten(1)
    out |= _stages(fixture, model, graph, order[0], stages)
    return out, {"parameters": sum(p.numel() for p in model.parameters())}


ADAPTERS = {"EScAIP": escaip}


def _graph(fixture: Fixture, model: EScAIP, graph: Graph, order: Tensor) -> dict[str, Tensor]:
    geometry = model.network.geometry(graph)

    def slots(values: Tensor) -> Tensor:
        return torch.stack([rows[row] for rows, row in zip(values, order, strict=True)])

    unit, used = directions(graph.vectors), graph.mask
    bias = _rows(graph, [tile.key_bias[:, 0, 0] for tile in geometry.tiles])
    orders = geometry.orders if graph.tiling is None else geometry.orders[graph.tiling.place]
    out = {
        "graph_neighbor_list": (slots(graph.index), used),
        "graph_neighbor_mask": (used.to(torch.int32), None),
        "graph_edge_direction": (slots(unit), used),
        "graph_log_envelope": (slots(bias), used),
        "node_direction_expansion": (orders, None),
        "edge_distance_expansion_atom0": (geometry.expansion[graph.pair[0]][order[0]], used[0]),
    }
    if "output/frequency_vectors_atom0" in fixture.tensors:
        groups = list(model.network.sizes.frequency_list or FREQUENCIES)
        out["frequency_vectors_atom0"] = (frequency_vectors(unit[0][order[0]], groups), used[0])
    return {
        f"output/{name}": in_place_of(fixture, f"output/{name}", rows, stated)
        for name, (rows, stated) in out.items()
    }


def _rows(graph: Graph, tiles: list[Tensor]) -> Tensor:
    """Slots `(n, k, ...)` of each tile -> `(N, K, ...)` of the atoms in order, 0 in slots of no tile."""
    shape = (*graph.index.shape, *tiles[0].shape[2:])
    out, start = tiles[0].new_zeros(shape), 0
    for tile in tiles:
        out[start : start + len(tile), : tile.shape[1]] = tile
        start += len(tile)
    return out if graph.tiling is None else out[graph.tiling.place]


def _watched(model: EScAIP) -> dict[str, Stage]:
    """Atoms and edges as each stage leaves them, the last block made to compute its edges too."""
    stages: dict[str, Stage] = {}

    def keep(name: str) -> Any:
        def hook(_module: torch.nn.Module, _args: tuple, result: Stage) -> None:
            stages[name] = result

        return hook

    model.network.embedding.register_forward_hook(keep("input_block"))
    blocks: Any = model.network.blocks
    for i, block in enumerate(blocks):
        block.only_node = False
        block.register_forward_hook(keep(f"block{i}"))
    return stages


def _stages(
    fixture: Fixture, model: EScAIP, graph: Graph, order: Tensor, stages: dict[str, Stage]
) -> dict[str, Tensor]:
    out = {}
    blocks: Any = model.network.blocks
    for name, (node, edges) in stages.items():
        if f"output/stage_{name}_node" not in fixture.tensors:
            continue
        edge = _rows(graph, edges)[0]
        if name != "input_block" and blocks[int(name.removeprefix("block"))].edge_ffn is None:
            edge = 2 * edge  # the official residual around no MLP
        node = node if graph.tiling is None else node[graph.tiling.place]
        out[f"output/stage_{name}_node"] = in_place_of(fixture, f"output/stage_{name}_node", node)
        place = f"output/stage_{name}_edge_atom0"
        out[place] = in_place_of(fixture, place, edge[order], graph.mask[0])
    return out
