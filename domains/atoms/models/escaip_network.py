"""The network of EScAIP: from neighbours to energies and direct forces.

Letters in shapes: N atoms of the batch, n of a tile, G structures, K slots of neighbours (slot 0 is the atom
itself), H hidden width.
"""

from __future__ import annotations

from math import ceil
from typing import NamedTuple

import torch
from torch import Tensor, nn

from domains.atoms.graph.features import DistanceExpansion, bond_order, directions, log_envelope
from domains.atoms.graph.harmonics import legendre
from domains.atoms.models.escaip_parts import Block, EdgeAttributes, Geometry, Sizes, Tile
from domains.atoms.models.layers import ACTIVATIONS

Sums = tuple[Tensor | None, list[Tensor | None], Tensor | None]
"""Readouts of atoms, of the edges of each tile, and of structures."""


class Tiling(NamedTuple):
    """Atoms with about as many neighbours side by side, in tiles.

    Attributes:
        order: `(N,)`, atoms by falling number of neighbours.
        place: `(N,)`, the inverse.
        tiles: of each the first atom, the one after the last, and how many slots they need.
    """

    order: Tensor
    place: Tensor
    tiles: tuple[tuple[int, int, int], ...]


class Graph(NamedTuple):
    """What the network reads.

    Attributes:
        numbers: `(N,)` atomic numbers.
        batch: `(N,)`, the structure of an atom.
        natoms: `(G,)`.
        index: `(N, K)` neighbours, see `graph.tables.Neighbours`.
        mask: `(N, K)` bool.
        vectors: `(N, K, 3)` in Å.
        envelope: `(N, K)`.
        pair: `(N, K)`, rows of `lengths`.
        lengths: `(P + 1,)` in Å, of all pairs, the last one 0.
        tiling: how edges are cut where they are many; None: all are computed at once.
    """

    numbers: Tensor
    batch: Tensor
    natoms: Tensor
    index: Tensor
    mask: Tensor
    vectors: Tensor
    envelope: Tensor
    pair: Tensor
    lengths: Tensor
    tiling: Tiling | None


def tiling(mask: Tensor, slots: int) -> Tiling | None:
    """Tiles of up to `slots` edges; None where all edges are fewer.

    Args:
        mask: `(N, K)` bool, which slots are used.
    """
    if mask.numel() <= slots:
        return None
    counts, order = mask.sum(1).sort(descending=True, stable=True)
    place = torch.empty_like(order).index_copy(0, order, torch.arange(len(order), device=order.device))
    known, tiles, start = counts.tolist(), [], 0
    number = ceil(sum(known) / slots)
    while start < len(known):
        size = max(1, min(slots, ceil(sum(known) / number)) // known[start])
        tiles.append((start, min(start + size, len(known)), known[start]))
        start += size
    return Tiling(order, place, tuple(tiles))


class EScAIPNetwork(nn.Module):
    """From neighbours to energies and direct forces, in the units the model was trained in."""

    def __init__(
        self,
        sizes: Sizes,
        *,
        num_layers: int,
        cutoff: float,
        forces: str | None,
        distance_function: str,
        use_envelope: bool,
        smooth_orders: bool,
        use_global_readout: bool,
        energy_reduce: str,
        output_dropouts: tuple[float, float],
    ) -> None:
        super().__init__()
        self.sizes, self.use_envelope, self.energy_reduce = sizes, use_envelope, energy_reduce
        self.smooth_orders = smooth_orders
        direct, conservative = forces == "direct", forces == "conservative"
        self.expansion = DistanceExpansion(distance_function, sizes.edge_distance_expansion_size, cutoff)
        self.embedding = InputBlock(sizes)
        last = num_layers - 1
        self.blocks = nn.ModuleList(
            Block(sizes, edge_ffn=not conservative or i < last, only_node=not direct and i == last)
            for i in range(num_layers)
        )
        count = num_layers + 1
        self.node_readout = Readout(sizes, count)
        self.edge_readout = Readout(sizes, count) if direct else None
        self.global_readout = Readout(sizes, count) if use_global_readout else None
        self.energy_norm = sizes.norm()
        self.energy_head = OutputHead(sizes, 1, output_dropouts[0])
        self.force_head = ForceHead(sizes, output_dropouts) if direct else None
        # The official conservative head has a norm that it does not apply.
        self.normed_energy = not conservative
        if conservative:
            self.energy_norm.requires_grad_(False)
        for module in self.modules():
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)

    def forward(self, graph: Graph, recompute: bool = False) -> dict[str, Tensor]:
        """`energy (G,)`; with direct forces also `forces (N, 3)`.

        Args:
            recompute: for a gradient with less memory, see `Block`.
        """
        geometry = self.geometry(graph)
        node, edges = self.embedding(geometry)
        sums: Sums = (None, [None] * len(edges), None)
        sums = self._read(0, node, edges, geometry, sums)
        for i, block in enumerate(self.blocks):
            node, edges = block(node, edges, geometry, recompute)
            sums = self._read(i + 1, node, edges, geometry, sums)
        node_sum, edge_sums, global_sum = sums
        found = {}
        if node_sum is not None:
            node_sum = self.node_readout.finish(node_sum)
        if self.global_readout is not None and global_sum is not None:
            whole = self.global_readout.finish(global_sum)
            found["energy"] = self.energy_head(self._normed(whole))[:, 0].to(graph.envelope)
        else:
            assert node_sum is not None
            found["energy"] = self._reduced(self.energy_head(self._normed(node_sum)), geometry)[:, 0]
        if self.force_head is not None and self.edge_readout is not None:
            assert node_sum is not None
            read = [self.edge_readout.finish(part) for part in edge_sums if part is not None]
            forces = self.force_head(node_sum, read, geometry)
            found["forces"] = forces if graph.tiling is None else forces[graph.tiling.place]
        return found

    def geometry(self, graph: Graph) -> Geometry:
        """What all layers read, in full precision also under autocast."""
        with torch.autocast(graph.vectors.device.type, enabled=False):
            tiling, (number, width) = graph.tiling, graph.index.shape
            if tiling is None:
                numbers, batch, tiles = graph.numbers, graph.batch, ((0, number, width),)
            else:
                numbers, batch, tiles = graph.numbers[tiling.order], graph.batch[tiling.order], tiling.tiles
            unit = directions(graph.vectors)
            weights = log_envelope(graph.envelope).exp() if self.smooth_orders else graph.mask
            orders = bond_order(unit, weights, self.sizes.node_direction_expansion_size)
            return Geometry(
                numbers,
                orders if tiling is None else orders[tiling.order],
                self.expansion(graph.lengths),
                batch,
                graph.natoms,
                [self._tile(graph, unit, *tile) for tile in tiles],
            )

    def _tile(self, graph: Graph, unit: Tensor, start: int, stop: int, width: int) -> Tile:
        sizes, atoms = self.sizes, slice(start, stop)
        index, pair, mask, envelope = graph.index, graph.pair, graph.mask, graph.envelope
        if graph.tiling is not None:
            rows = graph.tiling.order[atoms]
            index, pair, mask, envelope, unit = (x[rows, :width] for x in (index, pair, mask, envelope, unit))
            index = graph.tiling.place[index]
        cosine = unit @ unit.mT
        planes, angles = [], None
        if sizes.frequency_list is not None:
            present = (unit.detach() != 0).any(-1).to(unit)
            weight = present[:, :, None] * present[:, None]
            degree = len(sizes.frequency_list) - 1
            planes = [plane[:, None] for plane in legendre(cosine, degree, weight)[1:]]
        if sizes.angle_embedding == "scalar":
            angles = cosine.clamp(-1, 1)
        elif sizes.angle_embedding == "bias":
            angles = torch.stack(legendre(cosine.clamp(-1, 1), sizes.node_direction_expansion_size), -1)
        smooth = self.use_envelope and sizes.angle_embedding == "none"
        key_bias = log_envelope(envelope, smooth)[:, None, None]
        return Tile(atoms, index, pair, key_bias, planes, angles, mask, unit)

    def _read(self, i: int, node: Tensor, edges: list[Tensor], geometry: Geometry, sums: Sums) -> Sums:
        """The readouts after block i - 1 added to those before: of atoms, edges, and whole structures."""
        of_node, of_edges, of_global = sums
        if self.global_readout is None or self.force_head is not None:
            of_node = self.node_readout(i, node, of_node)
        if self.edge_readout is not None:
            of_edges = [self.edge_readout(i, edge, part) for edge, part in zip(edges, of_edges, strict=True)]
        if self.global_readout is not None:
            of_global = self.global_readout(i, self._reduced(node, geometry), of_global)
        return of_node, of_edges, of_global

    def _normed(self, features: Tensor) -> Tensor:
        return self.energy_norm(features) if self.normed_energy else features

    def _reduced(self, values: Tensor, geometry: Geometry) -> Tensor:
        """`(N, C)` -> `(G, C)`, the sum or mean over the atoms of each structure."""
        values = values.to(torch.promote_types(values.dtype, torch.float32))
        total = values.new_zeros(len(geometry.natoms), values.shape[1])
        total = total.index_add(0, geometry.batch, values)
        return total / geometry.natoms[:, None] if self.energy_reduce == "mean" else total


class InputBlock(nn.Module):
    """Features to begin with: edges from their attributes, atoms from the edge to themselves."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.attributes = EdgeAttributes(sizes)
        self.ffn = sizes.ffn(1)
        self.norm_node, self.norm_edge = sizes.norm(), sizes.norm()

    def forward(self, geometry: Geometry) -> tuple[Tensor, list[Tensor]]:
        """Atoms `(N, H)` and edges `(n, K, H)` of each tile."""
        parts = self.attributes.parts(geometry)
        attributes = [self.attributes(parts, tile) for tile in geometry.tiles]
        edges = [self.ffn(edge).add_(edge) for edge in attributes]
        own = torch.cat([edge[:, 0] for edge in edges])
        return self.norm_node(own), [self.norm_edge(edge) for edge in edges]


class Readout(nn.Module):
    """What is read after the input and after each block, projected and added up.

    The projection of all readouts side by side is the sum of the projections of each: they are never stored.
    """

    def __init__(self, sizes: Sizes, count: int) -> None:
        super().__init__()
        width = sizes.hidden_size
        self.norms = nn.ModuleList(sizes.norm() for _ in range(count))
        self.ffns = nn.ModuleList(sizes.ffn(sizes.readout_multiplier) for _ in range(count))
        self.projection = nn.Linear(count * width, width)
        self.norm = sizes.norm()
        self.activation = ACTIVATIONS[sizes.activation]

    def forward(self, i: int, features: Tensor, total: Tensor | None) -> Tensor:
        """`(..., H)`: the projection of readout i, added to `total`."""
        width = features.shape[-1]
        read = features + self.ffns[i](self.norms[i](features))
        part = self.projection.weight[:, i * width : (i + 1) * width]
        if total is None:
            return nn.functional.linear(read, part, self.projection.bias)
        return total + nn.functional.linear(read, part)

    def finish(self, total: Tensor) -> Tensor:
        """What follows the projection of all."""
        return self.norm(self.activation(total))


class OutputHead(nn.Module):
    """An MLP and a map to `count` numbers."""

    def __init__(self, sizes: Sizes, count: int, dropout: float) -> None:
        super().__init__()
        self.ffn = sizes.ffn(sizes.output_multiplier, dropout)
        self.final = nn.Linear(sizes.hidden_size, count, bias=False)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)

    def forward(self, features: Tensor) -> Tensor:
        """`(..., H)` -> `(..., count)`."""
        return self.final(self.ffn(features))


class ForceHead(nn.Module):
    """Forces `(N, 3)`: sum over neighbours of a predicted vector times the direction, component by component,
    times a magnitude. A product of components does not turn with the structure."""

    def __init__(self, sizes: Sizes, dropouts: tuple[float, float]) -> None:
        super().__init__()
        self.node_norm, self.edge_norm = sizes.norm(), sizes.norm()
        self.direction = OutputHead(sizes, 3, dropouts[1])
        self.magnitude = OutputHead(sizes, 1, dropouts[0])

    def forward(self, node: Tensor, edges: list[Tensor], geometry: Geometry) -> Tensor:
        # Unused slots have no direction: their unit vectors are zero.
        vectors = [
            (self.direction(self.edge_norm(edge)) * tile.unit).sum(1)
            for edge, tile in zip(edges, geometry.tiles, strict=True)
        ]
        return torch.cat(vectors) * self.magnitude(self.node_norm(node))
