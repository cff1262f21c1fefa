"""The modules of EScAIP, in the order in which data meets them.

Letters in shapes: N atoms of the batch, n of a tile, K slots of neighbours (slot 0 is the atom itself), H
hidden width, c head width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from domains.atoms.models.layers import (
    ACTIVATIONS,
    NORMS,
    Dense,
    FeedForward,
    check_choice,
    check_heads,
    turned_logits,
)
from zoo.attention import attend

ANGLES = ("none", "scalar", "bias")
recomputed: Callable[..., Any] = partial(checkpoint, use_reentrant=False, preserve_rng_state=False)
"""Calls a function of which nothing is kept for the gradient; in evaluation, without chance."""


@dataclass(frozen=True)
class Sizes:
    """What all modules are built from; the names are those of the official configuration.

    Attributes:
        angle_embedding: "none"; "scalar": logits get the cosine of both neighbours; "bias": a learned
            function of Legendre polynomials of it and of both distances. With either, keys are not weighed by
            their envelope, as in the official program.
        frequency_list: how many channels of a head turn with the harmonics of each degree; None: none do.
        ffn_multiplier, readout_multiplier, output_multiplier: hidden width of MLPs over `hidden_size`; 0
            makes them linear.
    """

    hidden_size: int
    num_heads: int
    max_num_elements: int
    atom_embedding_size: int
    node_direction_embedding_size: int
    node_direction_expansion_size: int
    edge_distance_expansion_size: int
    edge_distance_embedding_size: int
    frequency_list: tuple[int, ...] | None
    angle_embedding: str
    angle_embedding_size: int
    use_graph_attention: bool
    use_message_gate: bool
    ffn_multiplier: int
    readout_multiplier: int
    output_multiplier: int
    activation: str
    normalization: str
    dropout: float
    attn_dropout: float
    node_ffn_dropout: float
    edge_ffn_dropout: float
    drop_path: float

    def __post_init__(self) -> None:
        check_heads(self.hidden_size, self.num_heads, self.frequency_list)
        check_choice("activation", self.activation, ACTIVATIONS)
        check_choice("normalization", self.normalization, NORMS)
        check_choice("angle_embedding", self.angle_embedding, ANGLES)

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads

    def norm(self) -> nn.Module:
        return NORMS[self.normalization](self.hidden_size)

    def dense(self, width: int, out: int) -> Dense:
        return Dense(width, out, self.activation, self.dropout)

    def ffn(self, multiplier: int, dropout: float | None = None) -> FeedForward:
        """An MLP with the model's dropout unless it has its own."""
        dropout = self.dropout if dropout is None else dropout
        return FeedForward(self.hidden_size, multiplier, self.activation, dropout)


class Tile(NamedTuple):
    """Some atoms in turn (n of them), with as many slots as these need.

    Attributes:
        atoms: where they stand in the batch.
        index: `(n, K)` neighbours, atoms of the batch.
        pair: `(n, K)` rows of `Geometry.expansion`.
        key_bias: `(n, 1, 1, K)`, added to the logits of a key; -inf in unused slots.
        planes: Legendre polynomials `(n, 1, K, K)` of the angle between two neighbours, from degree 1.
        angles: `(n, K, K)` cosines, or `(n, K, K, L + 1)` their Legendre polynomials; None if not asked for.
        mask: `(n, K)` bool.
        unit: `(n, K, 3)`.
    """

    atoms: slice
    index: Tensor
    pair: Tensor
    key_bias: Tensor
    planes: list[Tensor]
    angles: Tensor | None
    mask: Tensor
    unit: Tensor


class Geometry(NamedTuple):
    """What all layers read of a batch.

    Attributes:
        numbers: `(N,)` atomic numbers.
        orders: `(N, L)` bond-orientational order parameters.
        expansion: `(P + 1, n)` expanded distances of the P pairs, and of an atom to itself.
        batch: `(N,)`, the structure of an atom.
        natoms: `(G,)`.
        tiles: edges are computed tile by tile: what a layer makes on its way is small, and used again before
            the processor's cache forgets it.
    """

    numbers: Tensor
    orders: Tensor
    expansion: Tensor
    batch: Tensor
    natoms: Tensor
    tiles: list[Tile]


class Parts(NamedTuple):
    """What edges are put together from: of both atoms `(N, H)`, and of their distance `(P + 1, H)`."""

    source: Tensor
    target: Tensor
    distance: Tensor | None = None

    def of(self, tile: Tile) -> Tensor:
        """`(n, K, H)`, the sum."""
        x = self.source[tile.index].add_(self.target[tile.atoms, None])
        return x if self.distance is None else x.add_(self.distance[tile.pair])


class EdgeAttributes(nn.Module):
    """What is known of an edge without looking at features (specification 2.1).

    The products of what belongs to one atom are made once for each atom, those of a distance once for both
    directions, and gathered.
    """

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        atom, order = sizes.atom_embedding_size, sizes.node_direction_embedding_size
        distance = sizes.edge_distance_embedding_size
        self.source_atom = nn.Embedding(sizes.max_num_elements, atom)
        self.target_atom = nn.Embedding(sizes.max_num_elements, atom)
        self.source_order = sizes.dense(sizes.node_direction_expansion_size, order)
        self.target_order = sizes.dense(sizes.node_direction_expansion_size, order)
        self.distance = sizes.dense(sizes.edge_distance_expansion_size, distance)
        self.widths = (distance, order, atom, order, atom)
        self.merge = sizes.dense(sum(self.widths), sizes.hidden_size)
        self.norm = sizes.norm()
        for table in (self.source_atom, self.target_atom):
            nn.init.uniform_(table.weight, -0.001, 0.001)

    def parts(self, geometry: Geometry) -> Parts:
        """All products."""
        of_distance, *rest = self.merge.weight.split(self.widths, dim=1)
        source = F.linear(self.source_order(geometry.orders), rest[0])
        source = source + F.linear(self.source_atom(geometry.numbers), rest[1])
        target = F.linear(self.target_order(geometry.orders), rest[2], self.merge.bias)
        target = target + F.linear(self.target_atom(geometry.numbers), rest[3])
        return Parts(source, target, F.linear(self.distance(geometry.expansion), of_distance))

    def forward(self, parts: Parts, tile: Tile) -> Tensor:
        """`(n, K, H)`"""
        return self.norm(self.merge.finish(parts.of(tile)))


class NeighbourAttention(nn.Module):
    """Self-attention among the neighbours of each atom.

    With a frequency list, channels of queries and keys are multiplied by the harmonics of their neighbours'
    directions. By the addition theorem that is `sum_l (q_l . k_l) P_l(cos angle)`, with the channels of
    degree l alone: the products stay as wide as a head. The scale is that of the multiplied width, as
    officially.
    """

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        width = sizes.hidden_size
        self.num_heads, self.dropout = sizes.num_heads, sizes.attn_dropout
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.groups = sizes.frequency_list
        expanded = sizes.head_dim
        if self.groups is not None:
            expanded = sum(count * (2 * degree + 1) for degree, count in enumerate(self.groups))
            expanded += -expanded % 8
        self.scale = expanded**-0.5
        self.angle = None if sizes.angle_embedding == "none" else AngleBias(sizes)

    def forward(self, x: Tensor, tile: Tile, expansion: Tensor, only_node: bool) -> Tensor:
        """`(n, K, H)` -> `(n, K, H)`; with `only_node` the query of slot 0 alone, `(n, 1, H)`."""
        width = x.shape[-1]
        weight, bias = self.qkv.weight, self.qkv.bias
        if only_node:
            q = F.linear(x[:, :1], weight[:width], bias[:width])
            k, v = F.linear(x, weight[width:], bias[width:]).chunk(2, -1)
        else:
            q, k, v = self.qkv(x).chunk(3, -1)
        q, k, v = (part.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for part in (q, k, v))
        logits = tile.key_bias
        if self.angle is not None:
            logits = logits + self.angle(tile, expansion)[:, :, : q.shape[2]]
        if self.groups is not None:
            q, k, turned = turned_logits(q, k, self.groups, tile.planes, self.scale)
            logits = logits + turned
        dropout = self.dropout if self.training else 0.0
        out = attend(q, k, v, bias=logits, scale=self.scale, dropout=dropout)
        return self.proj(out.transpose(1, 2).flatten(2))


class AngleBias(nn.Module):
    """Logits `(n, h, K, K)` from the angle between two neighbours, and with "bias" also their distances."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        size, heads = sizes.angle_embedding_size, sizes.num_heads
        self.scalar = None
        if sizes.angle_embedding == "scalar":
            self.scalar = nn.Parameter(torch.ones(heads))
            return
        self.distance = sizes.dense(sizes.edge_distance_expansion_size, size)
        self.angle = sizes.dense(sizes.node_direction_expansion_size + 1, size)
        self.project = nn.Linear(size**3, heads)
        self.dropout = sizes.dropout

    def forward(self, tile: Tile, expansion: Tensor) -> Tensor:
        angles = tile.angles
        assert angles is not None
        if self.scalar is not None:
            return angles[:, None] * self.scalar[:, None, None]
        distance = self.distance(expansion)[tile.pair]
        both = distance[:, :, None] * distance[:, None]
        products = (both[..., :, None] * both[..., None, :]).flatten(-2)
        angle = self.angle(angles)
        products = (angle[..., None] * products[..., None, :]).flatten(-2)
        return F.dropout(self.project(products), self.dropout, self.training).permute(0, 3, 1, 2)


class GraphAttention(nn.Module):
    """Messages on edges, attention among them, and what the atoms take from it (specification 2.3)."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        width, head = sizes.hidden_size, sizes.head_dim
        self.attributes = EdgeAttributes(sizes)
        self.node_hidden = sizes.dense(2 * width, width)
        self.edge_hidden = sizes.dense(width, width)
        self.message = None if sizes.use_message_gate else sizes.dense(3 * width, width)
        self.gate = nn.Linear(2 * width, width) if sizes.use_message_gate else None
        self.candidate = nn.Linear(2 * width, width) if sizes.use_message_gate else None
        self.norm = sizes.norm()
        self.attention = NeighbourAttention(sizes)
        self.pool = None
        if sizes.use_graph_attention:
            self.pool = nn.Parameter(torch.empty(sizes.num_heads, head))
            bound = (6.0 / (sizes.num_heads + head)) ** 0.5
            nn.init.uniform_(self.pool, -bound, bound)

    def parts(self, node: Tensor, geometry: Geometry) -> tuple[Parts, Parts]:
        """Products of what belongs to atoms `(N, H)` or to distances, of attributes and of features."""
        of_source, of_target = self.node_hidden.weight.chunk(2, 1)
        target = F.linear(node, of_target, self.node_hidden.bias)
        return self.attributes.parts(geometry), Parts(F.linear(node, of_source), target)

    def forward(
        self, parts: tuple[Parts, Parts], edge: Tensor, tile: Tile, expansion: Tensor, only_node: bool
    ) -> tuple[Tensor, Tensor]:
        """Edges `(n, K, H)` -> atoms `(n, H)` and edges; with `only_node` nobody may use the edges."""
        message = self.norm(self._messages(parts, edge, tile))
        edge = self.attention(message, tile, expansion, only_node and self.pool is None)
        return self._pooled(edge, tile.mask), edge

    def _messages(self, parts: tuple[Parts, Parts], edge: Tensor, tile: Tile) -> Tensor:
        attributes = self.attributes(parts[0], tile)
        edge_hidden = self.edge_hidden(edge)
        node_hidden = self.node_hidden.finish(parts[1].of(tile))
        if self.message is not None:
            a, e, n = self.message.weight.chunk(3, 1)
            out = F.linear(attributes, a, self.message.bias)
            out = out.add_(F.linear(edge_hidden, e)).add_(F.linear(node_hidden, n))
            return self.message.finish(out)
        assert self.gate is not None
        assert self.candidate is not None
        both = torch.cat([attributes, node_hidden], -1)
        return torch.lerp(edge_hidden, self.candidate(both).tanh(), self.gate(both).sigmoid())

    def _pooled(self, edge: Tensor, mask: Tensor) -> Tensor:
        """The atom's own slot, or a weighted mean of all (GATv2; Brody et al. 2022)."""
        if self.pool is None:
            return edge[:, 0]
        values = edge.unflatten(-1, self.pool.shape)
        scores = F.leaky_relu((values * self.pool).sum(-1), 0.2)
        weights = scores.masked_fill(~mask[..., None], -torch.inf).softmax(1)
        return (weights[..., None] * values).sum(1).flatten(1)


class Block(nn.Module):
    """Graph attention and MLPs, on atoms and edges, each added to what was there.

    Args:
        edge_ffn: whether edges have an MLP; the last block of a conservative model has none.
        only_node: nobody reads the edges that this block gives; they are not computed.
    """

    def __init__(self, sizes: Sizes, *, edge_ffn: bool, only_node: bool) -> None:
        super().__init__()
        multiplier = sizes.ffn_multiplier
        self.norm_attn_node, self.norm_attn_edge = sizes.norm(), sizes.norm()
        self.attention = GraphAttention(sizes)
        self.norm_ffn_node = sizes.norm()
        self.node_ffn = sizes.ffn(multiplier, sizes.node_ffn_dropout)
        self.norm_ffn_edge = sizes.norm() if edge_ffn else None
        self.edge_ffn = sizes.ffn(multiplier, sizes.edge_ffn_dropout) if edge_ffn else None
        self.drop_path, self.only_node = sizes.drop_path, only_node
        if only_node and self.norm_ffn_edge is not None and self.edge_ffn is not None:
            self.norm_ffn_edge.requires_grad_(False)
            self.edge_ffn.requires_grad_(False)

    def forward(
        self, node: Tensor, edges: list[Tensor], geometry: Geometry, recompute: bool = False
    ) -> tuple[Tensor, list[Tensor]]:
        """Atoms `(N, H)` and edges `(n, K, H)` of each tile; the edges as they came where `only_node`.

        Args:
            recompute: keep nothing of what is computed between, but compute it again for the gradient.
        """
        kept = [self._kept(geometry), self._kept(geometry)]
        parts = self.attention.parts(self.norm_attn_node(node), geometry)
        outs, new = [], []
        for edge, tile in zip(edges, geometry.tiles, strict=True):
            inputs = (parts, edge, tile, geometry.expansion, kept)
            out, edge = recomputed(self._tile, *inputs) if recompute else self._tile(*inputs)
            outs.append(out)
            new.append(edge)
        node = _added(node, outs[0] if len(outs) == 1 else torch.cat(outs), kept[0])
        return _added(node, self.node_ffn(self.norm_ffn_node(node)), kept[1]), new

    def _tile(
        self,
        parts: tuple[Parts, Parts],
        edge: Tensor,
        tile: Tile,
        expansion: Tensor,
        kept: list[Tensor | None],
    ) -> tuple[Tensor, Tensor]:
        """What attention adds to the atoms of a tile, and its edges after all."""
        first, second = (None if k is None else k[tile.atoms] for k in kept)
        node, out = self.attention(parts, self.norm_attn_edge(edge), tile, expansion, self.only_node)
        if self.only_node:
            return node, edge
        edge = _added(edge, out, first)
        if self.edge_ffn is not None and self.norm_ffn_edge is not None:
            edge = _added(edge, self.edge_ffn(self.norm_ffn_edge(edge)), second)
        return node, edge

    def _kept(self, geometry: Geometry) -> Tensor | None:
        """`(N,)`: 0 where a structure skips this branch (stochastic depth), else 1 over how many do not."""
        if not (self.training and self.drop_path):
            return None
        keep = 1 - self.drop_path
        chosen = torch.rand(geometry.natoms.shape, device=geometry.natoms.device) < keep
        return (chosen / keep)[geometry.batch]


def _added(x: Tensor, out: Tensor, kept: Tensor | None) -> Tensor:
    return x + (out if kept is None else out * kept.view(-1, *[1] * (out.ndim - 1)))
