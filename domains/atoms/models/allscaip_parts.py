"""The modules of AllScAIP, in the order in which data meets them.

The official program keeps the edges in tables of K slots, and re-indexes them between the attention around
the first atom of an edge (source) and around its second one (destination). Here edges are a list: both kinds
of attention are over groups of the same rows, nothing is re-indexed, and no slot is empty. First in the list
stand the edges of atoms to themselves, which carry the features of the atoms.

Letters in shapes: N atoms, E edges, M = N + E tokens, G structures, H hidden width, h heads, c head width; T
groups of n tokens each, padded within a bucket of similar size.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from domains.atoms.graph.features import DistanceExpansion, log_envelope, order_parameters
from domains.atoms.graph.harmonics import legendre, spherical_harmonics
from domains.atoms.models.layers import (
    ACTIVATIONS,
    NORMS,
    Dense,
    FeedForward,
    check_choice,
    check_heads,
    turned_logits,
)
from domains.atoms.models.node_layer import Attention, among_groups, check_order, node_layer
from zoo.attention import Groups, attend
from zoo.errors import ConfigError

LARGEST_CHARGE = 100
LARGEST_SPIN = 100
SHORTEST_WAVE, LONGEST_WAVE = 0.25, 30.0
"""Å: the frequencies of the radial mask run from `pi / (4 LONGEST)` to `pi / SHORTEST`."""
REDUCTIONS = ("sum", "mean")


@dataclass(frozen=True)
class Sizes:
    """What all modules are built from, see `AllScAIP`."""

    hidden_size: int
    num_layers: int
    num_heads: int
    max_num_elements: int
    cutoff: float
    distance_function: str
    use_envelope: bool
    node_direction_expansion_size: int
    edge_direction_expansion_size: int
    edge_distance_expansion_size: int
    frequency_list: tuple[int, ...] | None
    num_frequencies: int | None
    use_node_path: bool
    attention: Attention | None
    use_residual_scaling: bool
    ffn_multiplier: int
    output_multiplier: int
    energy_reduce: str
    activation: str
    normalization: str
    dropout: float
    attn_dropout: float

    def __post_init__(self) -> None:
        check_heads(self.hidden_size, self.num_heads, self.frequency_list)
        if self.num_layers < 1:
            raise ConfigError(f"num_layers is at least 1, not {self.num_layers}.")
        check_choice("activation", self.activation, ACTIVATIONS)
        check_choice("normalization", self.normalization, NORMS)
        check_choice("energy_reduce", self.energy_reduce, REDUCTIONS)
        if self.attention is not None:
            check_order(self.attention, self.hidden_size, self.num_heads)

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads

    def norm(self, width: int | None = None) -> nn.Module:
        return NORMS[self.normalization](width or self.hidden_size)

    def dense(self, width: int) -> Dense:
        return Dense(width, self.hidden_size, self.activation)

    def residual_scale(self) -> nn.Parameter:
        """`1 / num_layers`, learned; or 1."""
        value = 1 / self.num_layers if self.use_residual_scaling else 1.0
        return nn.Parameter(torch.tensor(value), requires_grad=self.use_residual_scaling)


class Graph(NamedTuple):
    """What the network reads of a batch.

    Attributes:
        numbers, batch: `(N,)`, atomic numbers, and the structure of each atom.
        natoms, charge, spin: `(G,)`.
        centre: `(E,)`, the first atom of each edge.
        unit, distance, envelope: `(E, 3)`, `(E,)` in Å, `(E,)` in (0, 1).
        by_centre, by_neighbour: groups of the M tokens that have an atom in common.
        by_structure: groups of the N atoms.
        separations: for each bucket of `by_structure` the distance `(T, n, n)` of all its pairs, in Å, to the
            nearest image; None where no mask needs them.
    """

    numbers: Tensor
    batch: Tensor
    natoms: Tensor
    charge: Tensor
    spin: Tensor
    centre: Tensor
    unit: Tensor
    distance: Tensor
    envelope: Tensor
    by_centre: Groups
    by_neighbour: Groups
    by_structure: Groups
    separations: list[Tensor] | None


class Layout(NamedTuple):
    """Groups of tokens, and for each bucket of them the geometry that attention looks at.

    Attributes:
        key_bias: `(T, 1, 1, n)`, added to the logits of a key; -inf where there is no token.
        planes: Legendre polynomials `(T, 1, n, n)` of the angle between two edges, from degree 1.
    """

    groups: Groups
    key_bias: list[Tensor]
    planes: list[list[Tensor]]


class Geometry(NamedTuple):
    """What all blocks read of a batch.

    Attributes:
        source, destination: the tokens by the first, and by the second atom of their edge.
        by_structure: the atoms by structure.
        waves: for each bucket of `by_structure` `sinc(omega r)` `(T, n, n, F)`; empty without radial mask.
    """

    source: Layout
    destination: Layout
    by_structure: Groups
    waves: list[Tensor]


def layout(groups: Groups, unit: Tensor, key_bias: Tensor, degree: int) -> Layout:
    """Groups of tokens with directions `(M, 3)` and biases `(M,)`, and planes up to a degree."""
    biases, planes = [], []
    for bucket in groups.plan:
        at = bucket.queries
        bias = key_bias[at.clamp(min=0)].masked_fill(at < 0, -torch.inf)
        biases.append(bias[:, None, None])
        if degree < 1:
            planes.append([])
            continue
        u = unit[at.clamp(min=0)]
        square = u.square().sum(-1)
        cosine, weight = u @ u.mT, square[:, :, None] * square[:, None]
        planes.append([plane[:, None] for plane in legendre(cosine, degree, weight)[1:]])
    return Layout(groups, biases, planes)


def sinc(x: Tensor) -> Tensor:
    """`sin(x) / x`, 1 at 0; by its series close to 0, so that all derivatives are finite."""
    small = x.abs() < 1e-4
    square = x.square()
    safe = x.masked_fill(small, 1.0)
    return torch.where(small, 1 - square / 6 + square.square() / 120, safe.sin() / safe)


class Embedding(nn.Module):
    """First features of atoms and edges.

    An edge takes the features of its first atom, and its distance and direction; of its second atom it learns
    by the attention around that one.
    """

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        width, orders = sizes.hidden_size, sizes.node_direction_expansion_size
        self.orders, self.degrees = orders, sizes.edge_direction_expansion_size
        self.atom = nn.Embedding(sizes.max_num_elements, width)
        self.order = sizes.dense(orders)
        self.norm = sizes.norm(2 * width)
        self.node = sizes.dense(2 * width)
        self.charge = nn.Embedding(2 * LARGEST_CHARGE + 1, width)
        self.spin = nn.Embedding(LARGEST_SPIN + 1, width)
        self.charge_spin = sizes.dense(2 * width)
        self.expansion = DistanceExpansion(
            sizes.distance_function, sizes.edge_distance_expansion_size, sizes.cutoff
        )
        self.attributes = sizes.dense(sizes.edge_distance_expansion_size + self.degrees**2)
        self.edge = sizes.dense(2 * width)
        nn.init.uniform_(self.atom.weight, -0.001, 0.001)

    def forward(self, graph: Graph) -> Tensor:
        """Tokens `(M, H)`."""
        harmonics = spherical_harmonics(graph.unit, max(self.orders, self.degrees) - 1)
        node = self._nodes(graph, self.bond_orders(graph, harmonics))
        attributes = torch.cat([self._distances(graph), self._directions(graph, harmonics)], -1)
        of_node, of_edge = self.edge.weight.chunk(2, 1)
        first = F.linear(node, of_node, self.edge.bias)
        first = torch.cat([first, first[graph.centre]])
        return self.edge.finish(first + F.linear(self.attributes(attributes), of_edge))

    def bond_orders(self, graph: Graph, harmonics: Tensor) -> Tensor:
        """`(N, L)`, as `graph.features.bond_order`, from the harmonics of each edge."""
        size = self.orders
        ones = harmonics.new_ones(len(graph.numbers), 1)
        sums = F.pad(ones, (0, size**2 - 1)).index_add(0, graph.centre, harmonics[:, : size**2])
        count = ones.index_add(0, graph.centre, ones.new_ones(len(harmonics), 1))
        return order_parameters(sums / count, size)

    def _nodes(self, graph: Graph, orders: Tensor) -> Tensor:
        node = self.node(self.norm(torch.cat([self.atom(graph.numbers), self.order(orders)], -1)))
        charge, spin = self.charge(graph.charge + LARGEST_CHARGE), self.spin(graph.spin)
        return node + self.charge_spin(torch.cat([charge, spin], -1))[graph.batch]

    def _distances(self, graph: Graph) -> Tensor:
        return self.expansion(torch.cat([graph.distance.new_zeros(len(graph.numbers)), graph.distance]))

    def _directions(self, graph: Graph, harmonics: Tensor) -> Tensor:
        size = self.degrees**2
        own = F.pad(harmonics.new_ones(len(graph.numbers), 1), (0, size - 1))
        return torch.cat([own, harmonics[:, :size]])


class GroupAttention(nn.Module):
    """Self-attention among the tokens of each group, normed before and added after.

    The tokens of a group are the edges around one atom. Keys are weighed by their envelope; with a frequency
    list, channels of queries and keys turn with the direction of their edge, see `turned_logits`.
    """

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        width = sizes.hidden_size
        self.num_heads, self.dropout = sizes.num_heads, sizes.attn_dropout
        self.frequencies, self.scale = sizes.frequency_list, sizes.head_dim**-0.5
        self.norm = sizes.norm()
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.res_scale = sizes.residual_scale()

    def forward(self, x: Tensor, layout: Layout) -> Tensor:
        """`(M, H)` -> `(M, H)`."""
        q, k, v = self.qkv(self.norm(x)).view(1, len(x), 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        parts = [
            self._attend(tile.q, tile.k, tile.v, bias, planes)
            for tile, bias, planes in zip(
                layout.groups.cut(q, k, v), layout.key_bias, layout.planes, strict=True
            )
        ]
        out = layout.groups.join(parts, 1, len(x))[0]
        return x + self.res_scale * self.proj(out.transpose(0, 1).flatten(1))

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor, planes: list[Tensor]) -> Tensor:
        if self.frequencies is not None:
            q, k, turned = turned_logits(q, k, self.frequencies, planes, self.scale)
            bias = bias + turned
        return attend(q, k, v, bias=bias, scale=self.scale, dropout=self.dropout if self.training else 0.0)


def radial_bias(waves: Tensor, weight: Tensor, keys: Tensor) -> Tensor:
    """Logits `(T, h, n, n)` of waves `(T, n, n, F)` by `weight (h, F)`; -inf where keys `(T, n)` are -1."""
    share = F.softplus((waves @ weight.mT).permute(0, 3, 1, 2)) + 1e-6
    return share.log().masked_fill((keys < 0)[:, None, None], -torch.inf)


class NodeAttention(nn.Module):
    """Self-attention among all atoms of each structure, normed before and added after.

    With a radial mask, logits get `log(softplus(sum_k w_hk sinc(omega_k r_ij)) + 1e-6)`. (Officially these
    are also normalised over the batch: a constant for each head, which the softmax does not see.)
    """

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        width = sizes.hidden_size
        self.num_heads, self.dropout = sizes.num_heads, sizes.attn_dropout
        self.norm = sizes.norm()
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.res_scale = sizes.residual_scale()
        self.radial_weight = None
        if (number := sizes.num_frequencies) is not None:
            self.radial_weight = nn.Parameter(torch.full((sizes.num_heads, number), 1 / number))

    def forward(self, x: Tensor, geometry: Geometry) -> Tensor:
        """`(N, H)` -> `(N, H)`."""
        q, k, v = self.qkv(self.norm(x)).view(1, len(x), 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        dropout = self.dropout if self.training else 0.0
        groups = geometry.by_structure
        if self.radial_weight is None:
            out = attend(q, k, v, pattern=groups, dropout=dropout)
        else:
            tiles = zip(groups.cut(q, k, v), groups.plan, geometry.waves, strict=True)
            parts = [
                attend(
                    tile.q,
                    tile.k,
                    tile.v,
                    bias=radial_bias(waves, self.radial_weight, bucket.keys),
                    dropout=dropout,
                )
                for tile, bucket, waves in tiles
            ]
            out = groups.join(parts, 1, len(x))
        return x + self.res_scale * self.proj(out[0].transpose(0, 1).flatten(1))


class OtherNodeAttention(nn.Module):
    """Any layer of the zoo that takes padded rows and knows no order, normed before and added after."""

    def __init__(self, sizes: Sizes, attention: Attention) -> None:
        super().__init__()
        self.norm = sizes.norm()
        self.layer = node_layer(attention, sizes.hidden_size, sizes.num_heads)
        self.res_scale = sizes.residual_scale()

    def forward(self, x: Tensor, geometry: Geometry) -> Tensor:
        """`(N, H)` -> `(N, H)`."""
        return x + self.res_scale * among_groups(self.layer, self.norm(x), geometry.by_structure)


def attention_of_nodes(sizes: Sizes) -> nn.Module | None:
    """Among all atoms of a structure, where there is such."""
    if not sizes.use_node_path:
        return None
    return NodeAttention(sizes) if sizes.attention is None else OtherNodeAttention(sizes, sizes.attention)


class ResidualMlp(nn.Module):
    """An MLP, normed before and added after."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.norm = sizes.norm()
        self.ffn = FeedForward(sizes.hidden_size, sizes.ffn_multiplier, sizes.activation, sizes.dropout)
        self.res_scale = sizes.residual_scale()

    def forward(self, x: Tensor) -> Tensor:
        return x + self.res_scale * self.ffn(self.norm(x))


class Block(nn.Module):
    """Attention around the first and the second atom of edges, then among atoms; MLPs.

    Args:
        last: nobody reads the edges that this block gives. Its MLP of edges is there for checkpoints alone.
    """

    def __init__(self, sizes: Sizes, *, last: bool) -> None:
        super().__init__()
        self.source, self.destination = GroupAttention(sizes), GroupAttention(sizes)
        self.edge_mlp = ResidualMlp(sizes)
        self.node_attention = attention_of_nodes(sizes)
        self.node_mlp = ResidualMlp(sizes)
        self.last = last
        if last:
            self.edge_mlp.requires_grad_(False)

    def forward(self, x: Tensor, geometry: Geometry) -> Tensor:
        """Tokens `(M, H)` -> the same, or only the atoms `(N, H)` after the last block."""
        x = self.destination(self.source(x, geometry.source), geometry.destination)
        number = geometry.by_structure.tokens
        node = x[:number]
        if self.node_attention is not None:
            node = self.node_attention(node, geometry)
        node = self.node_mlp(node)
        return node if self.last else torch.cat([node, self.edge_mlp(x[number:])])


class Head(nn.Module):
    """`(N, H)` -> `(N, out)`."""

    def __init__(self, sizes: Sizes, out: int) -> None:
        super().__init__()
        self.norm = sizes.norm()
        self.ffn = FeedForward(sizes.hidden_size, sizes.output_multiplier, sizes.activation, out=out)
        for linear in (self.ffn.fc1, self.ffn.fc2):
            if linear is not None:
                nn.init.xavier_uniform_(linear.weight)

    def forward(self, node: Tensor) -> Tensor:
        return self.ffn(self.norm(node))


def wide(x: Tensor) -> Tensor:
    """In float32 or wider: what autocast made narrow is not summed as it is."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


class Network(nn.Module):
    """From a graph to energies `(G,)`, and with a head for them forces `(N, 3)`."""

    omega: Tensor

    def __init__(self, sizes: Sizes, *, direct: bool) -> None:
        super().__init__()
        self.embedding = Embedding(sizes)
        last = sizes.num_layers - 1
        self.blocks = nn.ModuleList(Block(sizes, last=i == last) for i in range(sizes.num_layers))
        self.energy = Head(sizes, 1)
        self.forces = Head(sizes, 3) if direct else None
        self.mean = sizes.energy_reduce == "mean"
        self.smooth = sizes.use_envelope
        self.degree = 0 if sizes.frequency_list is None else len(sizes.frequency_list) - 1
        ends = math.log10(math.pi / (4 * LONGEST_WAVE)), math.log10(math.pi / SHORTEST_WAVE)
        self.register_buffer("omega", torch.logspace(*ends, sizes.num_frequencies or 0), persistent=False)
        for module in self.modules():
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)

    def forward(self, graph: Graph) -> dict[str, Tensor]:
        geometry = self.geometry(graph)
        x = self.embedding(graph)
        for block in self.blocks:
            x = block(x, geometry)
        atoms = wide(self.energy(x))[:, 0]
        energy = atoms.new_zeros(len(graph.natoms)).index_add(0, graph.batch, atoms)
        out = {"energy": energy / graph.natoms if self.mean else energy}
        return out if self.forces is None else out | {"forces": wide(self.forces(x))}

    def geometry(self, graph: Graph) -> Geometry:
        """What all blocks read."""
        own = len(graph.numbers)
        unit = torch.cat([graph.unit.new_zeros(own, 3), graph.unit])
        bias = torch.cat([graph.envelope.new_zeros(own), log_envelope(graph.envelope, self.smooth)])
        waves = [sinc(r[..., None] * self.omega) for r in graph.separations or []]
        return Geometry(
            layout(graph.by_centre, unit, bias, self.degree),
            layout(graph.by_neighbour, unit, bias, self.degree),
            graph.by_structure,
            waves,
        )
