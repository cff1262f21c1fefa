"""AllScAIP: outputs, losses, the graph and what happens inside."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import zoo
from domains.atoms.graph.biknn import find_edges
from domains.atoms.graph.features import directions, lengths, log_envelope
from domains.atoms.graph.harmonics import spherical_harmonics
from domains.atoms.graph.tables import Neighbours, TwoSided, two_sided_table
from domains.atoms.models.allscaip import AllScAIP
from domains.atoms.models.allscaip_parts import Block, Graph
from domains.atoms.structures import Structures
from parity.adapters.atoms.common import frequency_vectors, in_place_of, losses, matched_slots, structures
from parity.fixture import Fixture


def allscaip(fixture: Fixture) -> tuple[dict[str, Tensor], dict[str, Any]]:
    model = zoo.from_official("allscaip_md", fixture.state_dict(), **fixture.spec["config"]["backbone"])
    assert isinstance(model, AllScAIP)
    batch = structures(fixture)
    found = model(batch)
    out: dict[str, Tensor] = {}
    if "loss/total" in fixture.tensors:
        reduction = fixture.spec["loss"].get("fred", "per_structure")
        out |= losses(fixture, model, found, batch, reduction)
    if "stress" in found:
        found["stress"] = found["stress"].flatten(1)
    data_set = "omol_" if "output/omol_energy" in fixture.tensors else ""
    out |= {f"output/{data_set}{name}": value for name, value in found.items()}
    with torch.no_grad():
        graph = model.graph(batch)
        table = two_sided_table(find_edges(batch, model.knn), batch.num_atoms, model.max_neighbours)
        table, slots = _as_recorded(fixture, table)
        rows = _graph(fixture, table) | _features(model, batch, graph, table)
        rows |= _stages(model, graph, table.source.mask[0], slots)
    stated = {
        f"output/{name}": values for name, values in rows.items() if f"output/{name}" in fixture.tensors
    }
    out |= {name: in_place_of(fixture, name, *values) for name, values in stated.items()}
    return out, {"parameters": sum(p.numel() for p in model.parameters())}


ADAPTERS = {"AllScAIP": allscaip}

Rows = dict[str, tuple[Tensor, Tensor | None]]
"""Values by the name of what they stand for, and which of them are stated."""


def _as_recorded(fixture: Fixture, table: TwoSided) -> tuple[TwoSided, Tensor]:
    """The table with slots of equal envelope in the recorded order; and where the slots of atom 0 stood."""
    given = {name.removeprefix("output/graph_"): value for name, value in fixture.tensors.items()}
    source, used = table.source, given["src_log_envelope"] > -torch.inf
    official = given["neighbor_index"][1], given["edge_direction"], used
    order = matched_slots(official, source.index, directions(source.vectors), source.mask)
    atoms, slots = source.index.shape
    each = torch.arange(atoms)[:, None]
    # Of each atom and slot in destination layout: the atom, and the recorded slot, that it comes from.
    first, slot = table.dst_index
    slot = order.argsort(1)[first, slot]
    arrived = table.dst_envelope < 1
    theirs = given["dst_index"][:, :atoms, :slots]
    same = (theirs[0, :, :, None] == first[:, None]) & (theirs[1, :, :, None] == slot[:, None])
    same &= arrived[:, None] & (given["dst_log_envelope"][:atoms, :slots, None] > -torch.inf)
    assert torch.equal(same.sum(1), arrived.long()), "other neighbours in destination layout"
    flipped = torch.where(same.any(2), same.long().argmax(2), torch.arange(slots))
    second, arrival = table.src_index[:, each, order]
    return TwoSided(
        Neighbours(*(values[each, order] for values in source)),
        table.dst_envelope[each, flipped],
        torch.stack([first, slot])[:, each, flipped],
        torch.stack([second, flipped.argsort(1)[second, arrival]]),
        table.dropped,
    ), order[0]


def _graph(fixture: Fixture, table: TwoSided) -> Rows:
    """Tables of neighbours, which the model itself does not need."""
    source, arrived = table.source, table.dst_envelope < 1
    own = torch.arange(len(source.index))[:, None].expand_as(source.index)
    masks = (log_envelope(source.envelope), None), (log_envelope(table.dst_envelope), None)
    width = source.index.shape[1]
    for name in ("src", "dst"):
        beyond = fixture.tensors[f"output/graph_{name}_log_envelope"][: len(own), width:]
        assert bool((beyond == -torch.inf).all()), "neighbours behind the end of our table"
    return {
        "graph_neighbor_index": (torch.stack([own, source.index]), source.mask.expand(2, -1, -1)),
        "graph_src_log_envelope": masks[0],
        "graph_dst_log_envelope": masks[1],
        "graph_src_index": (table.src_index, source.mask.expand(2, -1, -1)),
        "graph_dst_index": (table.dst_index, arrived.expand(2, -1, -1)),
        "graph_edge_direction": (directions(source.vectors), source.mask),
    }


def _features(model: AllScAIP, batch: Structures, graph: Graph, table: TwoSided) -> Rows:
    network, sizes = model.network, model.sizes
    vectors, mask = table.source.vectors[0], table.source.mask[0]
    unit = directions(vectors)
    harmonics = spherical_harmonics(graph.unit, sizes.node_direction_expansion_size - 1)
    rows: Rows = {
        "edge_direction_expansion_atom0": (
            spherical_harmonics(unit, sizes.edge_direction_expansion_size - 1),
            mask,
        ),
        "edge_distance_expansion_atom0": (network.embedding.expansion(lengths(vectors)), mask),
        "node_direction_expansion": (network.embedding.bond_orders(graph, harmonics), None),
    }
    if sizes.frequency_list is not None:
        rows["frequency_vectors_atom0"] = (frequency_vectors(unit, list(sizes.frequency_list)), mask)
    if sizes.num_frequencies is not None:
        waves = network.geometry(graph).waves
        bucket, place = next(
            (i, int(found[0]))
            for i, bucket in enumerate(graph.by_structure.plan)
            if len(found := (bucket.queries[:, 0] == 0).nonzero())
        )
        rows["sincx_row0"] = (waves[bucket][place, 0, : int(batch.natoms[0])], None)
    return rows


def _stages(model: AllScAIP, graph: Graph, mask: Tensor, slots: Tensor) -> Rows:
    """Atoms, and the edges of atom 0, as each stage leaves them; the last block too computes its edges."""
    network, rows = model.network, {}
    geometry, x = network.geometry(graph), network.embedding(graph)
    number = len(graph.numbers)
    edges = (graph.centre == 0).nonzero()[:, 0]
    edges = edges[graph.envelope[edges].argsort()]
    used = mask[slots.argsort()].nonzero()[1:, 0]

    def keep(name: str, x: Tensor) -> None:
        edge = x.new_zeros(len(mask), x.shape[1])
        edge[0], edge[used] = x[0], x[number + edges]
        edge = edge[slots]
        rows[f"stage_{name}_node"], rows[f"stage_{name}_edge_atom0"] = (x[:number], None), (edge, mask)

    keep("input_block", x)
    for i, block in enumerate(network.blocks):
        assert isinstance(block, Block)
        block.last = False
        x = block(x, geometry)
        keep(f"block{i}", x)
    return rows
