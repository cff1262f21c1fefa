"""EScAIP (v2) in the plain layout: the peer of `zoo bench domain=atoms`.

The same function as `domains.atoms.models.escaip`, laid out as it is described: every atom with every atom
in every image (N x N x M displacements), soft ranks by sorting all N M candidates of an atom, a table of K
slots per atom however few are taken, queries and keys expanded to one product per harmonic, every linear
layer applied to each slot, a readout asked once for its nodes and once for its edges, all readouts
concatenated. Parameters carry the official names, so an official state dict loads as it is; the heads are
`energy` and `forces`, or `efs` for conservative forces. A system is periodic along all axes or along none.

Shapes: N atoms, G systems, M images, K slots, H channels, h heads of c channels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

EXTRA = 20
"""Nearest candidates beyond `k` that are ranked."""
FAR = 1e5
"""The rank of all others."""
TINY = 1e-12


# ---- the graph ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Settings:
    """Those of H512L10 unless given."""

    num_layers: int = 10
    hidden: int = 512
    num_heads: int = 8
    cutoff: float = 6.0
    k: int = 30
    slots: int = 45
    rank_scale: float = 0.2
    envelope_scale: float = 0.1
    num_gaussians: int = 600
    num_degrees: int = 10
    frequencies: tuple[int, ...] = (20, 10, 4, 10, 20)
    elements: int = 110
    atom: int = 128
    direction: int = 64
    distance: int = 512
    multiple: int = 2
    direct: bool = True


@dataclass
class Graph:
    """A table of slots; slot 0 of an atom is the atom itself."""

    neighbours: Tensor
    """`(N, K)`, 0 in unused slots"""
    used: Tensor
    """`(N, K)` bool"""
    log_envelope: Tensor
    """`(N, K)`, -inf in unused slots"""
    directions: Tensor
    """`(N, K, 3)` unit vectors, 0 in unused slots and for the atom itself"""
    gaussians: Tensor
    """`(N, K, n)`"""
    orders: Tensor
    """Bond-orientational order `(N, degrees)`"""
    frequencies: Tensor
    """`(N, K, D)`"""


def norm(d: Tensor) -> Tensor:
    """Lengths `(...)` of `(..., 3)`, 0 with a gradient of 0 below 1e-6."""
    square = d.square().sum(-1)
    return torch.where(square <= TINY, 0.0, square.clamp(min=TINY).sqrt())


def images(cell: Tensor, cutoff: float) -> Tensor:
    """All triples `(M, 3)` of cells within the cutoff of the wrapped one."""
    counts = []
    for axis in range(3):
        area = torch.linalg.cross(cell[(axis + 1) % 3], cell[(axis + 2) % 3]).norm()
        counts.append(math.ceil(float(cutoff * area / torch.linalg.det(cell).abs())))
    ranges = [torch.arange(-n, n + 1, device=cell.device) for n in counts]
    return torch.cartesian_prod(*ranges)


def soft_step(x: Tensor) -> Tensor:
    """0 below -pi, 1 above pi, half a sine between."""
    return torch.where(x.abs() < math.pi, 0.5 + 0.5 * torch.sin(x / 2), 0.5 + 0.5 * torch.sign(x))


def soft_ranks(r: Tensor, k: int, scale: float) -> Tensor:
    """Of every candidate in its row `(N, C)`, by the nearest `k + EXTRA`."""
    near = r.sort(dim=1)
    count = min(k + EXTRA, r.shape[1])
    kept, places = near.values[:, :count], near.indices[:, :count]
    ranks = soft_step((kept[:, :, None] - kept[:, None, :]) / scale).sum(-1)
    return torch.full_like(r, FAR).scatter(1, places, ranks)


def envelopes(r: Tensor, settings: Settings) -> Tensor:
    """Envelope coordinates `(N, N, M)` of distances `(N, N, M)`; an edge is below 1."""
    n, _, m = r.shape
    ranks = [
        soft_ranks(r.reshape(n, n * m), settings.k, settings.rank_scale).view(n, n, m),
        soft_ranks(r.transpose(0, 1).reshape(n, n * m), settings.k, settings.rank_scale)
        .view(n, n, m)
        .transpose(0, 1),
    ]
    t = settings.envelope_scale
    parts = torch.stack([ranks[0] / settings.k, ranks[1] / settings.k, r / settings.cutoff])
    return torch.where(r == 0, 0.0, t * torch.logsumexp(parts / t, dim=0))


def neighbour_table(
    positions: Tensor, cell: Tensor, periodic: bool, settings: Settings
) -> tuple[Tensor, Tensor, Tensor]:
    """Neighbours `(N, K)`, displacements `(N, K, 3)` and envelopes `(N, K)`, inf where unused."""
    shifts = images(cell.detach(), settings.cutoff) if periodic else torch.zeros(1, 3, device=cell.device)
    offsets = shifts.to(positions.dtype) @ cell
    d = positions[None, :, None] + offsets[None, None] - positions[:, None, None]
    env = envelopes(norm(d), settings).flatten(1)
    d = d.flatten(1, 2)
    order = env.detach().argsort(dim=1)
    most = int((env < 1).sum(1).max())
    if most > settings.slots:
        raise ValueError(f"An atom has {most} neighbours, the table {settings.slots} slots.")
    order = order[:, : settings.slots]
    env, d = env.gather(1, order), d.gather(1, order[..., None].expand(-1, -1, 3))
    used = env < 1
    neighbours = torch.where(used, order // len(offsets), 0)
    env = torch.where(used, env, torch.inf)
    d = torch.where(used[..., None], d, 0.0)
    missing = settings.slots - neighbours.shape[1]
    env = F.pad(env, (0, missing), value=torch.inf)
    return F.pad(neighbours, (0, missing)), F.pad(d, (0, 0, 0, missing)), env


def harmonics(u: Tensor, num_degrees: int) -> list[Tensor]:
    """Real spherical harmonics `(..., 2 l + 1)` of every degree, squares summing to 2 l + 1; y is polar."""
    polar, radius = u[..., 1], u.square().sum(-1)
    real, imaginary = [torch.ones_like(polar)], [torch.zeros_like(polar)]
    for _ in range(1, num_degrees):
        a, b = real[-1], imaginary[-1]
        real.append(a * u[..., 2] - b * u[..., 0])
        imaginary.append(a * u[..., 0] + b * u[..., 2])
    legendre: dict[tuple[int, int], Tensor] = {}
    for m in range(num_degrees):
        legendre[m, m] = torch.full_like(polar, float(math.prod(range(1, 2 * m, 2))))
        for degree in range(m + 1, num_degrees):
            value = (2 * degree - 1) * polar * legendre[degree - 1, m]
            if degree - 2 >= m:
                value = value - (degree + m - 1) * radius * legendre[degree - 2, m]
            legendre[degree, m] = value / (degree - m)
    out = []
    for degree in range(num_degrees):
        parts = [legendre[degree, 0]]
        for m in range(1, degree + 1):
            factor = math.sqrt(2 * math.factorial(degree - m) / math.factorial(degree + m))
            value = factor * legendre[degree, m]
            parts = [value * imaginary[m], *parts, value * real[m]]
        out.append(math.sqrt(2 * degree + 1) * torch.stack(parts, dim=-1))
    return out


def log_envelope(env: Tensor) -> Tensor:
    inside = torch.where(env < 1, env, 0.0)
    return torch.where(env < 1, -inside.square() / (1 - inside.square()), -torch.inf)


def build_graph(
    positions: Tensor, cells: Tensor, periodic: Sequence[bool], natoms: Sequence[int], settings: Settings
) -> Graph:
    """The tables of all systems, one below the other, and what is computed from them."""
    tables, start = [], 0
    for system, count in enumerate(natoms):
        here = positions[start : start + count]
        neighbours, d, env = neighbour_table(here, cells[system], periodic[system], settings)
        tables.append((torch.where(env < 1, neighbours + start, 0), d, env))
        start += count
    neighbours, d, env = (torch.cat(parts) for parts in zip(*tables, strict=True))
    used, r = env < 1, norm(d)
    u = torch.where((r > 0)[..., None], d / r.clamp(min=TINY)[..., None], 0.0)
    highest = max(settings.num_degrees, len(settings.frequencies))
    by_degree = [y / math.sqrt(y.shape[-1]) for y in harmonics(u, highest)]
    count = used.sum(1).clamp(min=1)
    means = [(y * used[..., None]).sum(1) / count[:, None] for y in by_degree[: settings.num_degrees]]
    orders = torch.stack([mean.square().sum(-1).clamp(min=1e-6).sqrt() for mean in means], dim=-1)
    repeated = [y.repeat(1, 1, f) for y, f in zip(by_degree, settings.frequencies, strict=False) if f]
    centres = torch.linspace(0, settings.cutoff, settings.num_gaussians, device=r.device, dtype=r.dtype)
    width = 2 * (centres[1] - centres[0])
    gaussians = torch.exp(-0.5 * ((r[..., None] - centres) / width).square())
    return Graph(neighbours, used, log_envelope(env), u, gaussians, orders, torch.cat(repeated, dim=-1))


# ---- layers ------------------------------------------------------------------------------------------------


def activated(dim: int, out: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(dim, out), nn.GELU())


def feed_forward(dim: int, multiple: int) -> nn.Sequential:
    return nn.Sequential(activated(dim, multiple * dim), nn.Sequential(nn.Linear(multiple * dim, dim)))


class EdgeAttributes(nn.Module):
    """`(N, K, H)` from the distance, both elements and the order around both."""

    def __init__(self, settings: Settings) -> None:
        super().__init__()
        hidden = settings.hidden
        self.source_atomic_embedding = nn.Embedding(settings.elements, settings.atom)
        self.target_atomic_embedding = nn.Embedding(settings.elements, settings.atom)
        self.source_direction_embedding = activated(settings.num_degrees, settings.direction)
        self.target_direction_embedding = activated(settings.num_degrees, settings.direction)
        self.edge_distance_embedding = activated(settings.num_gaussians, settings.distance)
        width = settings.distance + 2 * settings.direction + 2 * settings.atom
        self.edge_attr_linear = activated(width, hidden)
        self.edge_attr_norm = nn.RMSNorm(hidden)

    def attributes(self, graph: Graph, numbers: Tensor) -> Tensor:
        j = graph.neighbours
        target_orders = graph.orders[:, None].expand(-1, j.shape[1], -1)
        target_numbers = numbers[:, None].expand_as(j)
        parts = [
            self.edge_distance_embedding(graph.gaussians),
            self.source_direction_embedding(graph.orders[j]),
            self.source_atomic_embedding(numbers[j]),
            self.target_direction_embedding(target_orders),
            self.target_atomic_embedding(target_numbers),
        ]
        return self.edge_attr_norm(self.edge_attr_linear(torch.cat(parts, dim=-1)))


class InputLayer(EdgeAttributes):
    def __init__(self, settings: Settings) -> None:
        super().__init__(settings)
        self.edge_ffn = feed_forward(settings.hidden, 1)

    def forward(self, graph: Graph, numbers: Tensor) -> Tensor:
        edge = self.attributes(graph, numbers)
        return edge + self.edge_ffn(edge)


class InputBlock(nn.Module):
    def __init__(self, settings: Settings) -> None:
        super().__init__()
        self.input_layer = InputLayer(settings)
        self.norm_node, self.norm_edge = nn.RMSNorm(settings.hidden), nn.RMSNorm(settings.hidden)

    def forward(self, graph: Graph, numbers: Tensor) -> tuple[Tensor, Tensor]:
        edge = self.input_layer(graph, numbers)
        return self.norm_node(edge[:, 0]), self.norm_edge(edge)


class GraphAttention(EdgeAttributes):
    def __init__(self, settings: Settings) -> None:
        super().__init__(settings)
        hidden = settings.hidden
        self.num_heads, self.frequencies = settings.num_heads, settings.frequencies
        self.node_hidden_linear = activated(2 * hidden, hidden)
        self.edge_hidden_linear = activated(hidden, hidden)
        self.message_linear = activated(3 * hidden, hidden)
        self.message_norm = nn.RMSNorm(hidden)
        self.attn_in_proj_q = nn.Linear(hidden, hidden)
        self.attn_in_proj_k = nn.Linear(hidden, hidden)
        self.attn_in_proj_v = nn.Linear(hidden, hidden)
        self.attn_out_proj = nn.Linear(hidden, hidden)

    def heads(self, x: Tensor) -> Tensor:
        """`(N, K, H) -> (N, h, K, c)`"""
        return x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)

    def expanded(self, x: Tensor, graph: Graph) -> Tensor:
        """`(N, h, K, c) -> (N, h, K, D)`: each channel times every harmonic of its degree."""
        groups = x.split(self.frequencies, dim=-1)
        wide = [group.repeat_interleave(2 * degree + 1, dim=-1) for degree, group in enumerate(groups)]
        x = torch.cat(wide, dim=-1) * graph.frequencies[:, None]
        return F.pad(x, (0, -x.shape[-1] % 8))

    def forward(self, node: Tensor, edge: Tensor, graph: Graph, numbers: Tensor) -> Tensor:
        pair = torch.cat([node[graph.neighbours], node[:, None].expand_as(edge)], dim=-1)
        hidden = [self.edge_hidden_linear(edge), self.node_hidden_linear(pair)]
        parts = [self.attributes(graph, numbers), *hidden]
        message = self.message_norm(self.message_linear(torch.cat(parts, dim=-1)))
        q = self.expanded(self.heads(self.attn_in_proj_q(message)), graph)
        k = self.expanded(self.heads(self.attn_in_proj_k(message)), graph)
        v = self.heads(self.attn_in_proj_v(message))
        slots = edge.shape[1]
        mask = graph.log_envelope[:, None, None].expand(-1, self.num_heads, slots, -1)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.attn_out_proj(out.transpose(1, 2).flatten(2))


class FeedForwards(nn.Module):
    def __init__(self, hidden: int, multiple: int, edges: bool) -> None:
        super().__init__()
        self.mlp_node = feed_forward(hidden, multiple)
        self.mlp_edge = feed_forward(hidden, multiple) if edges else nn.Identity()


class Block(nn.Module):
    def __init__(self, settings: Settings, edges: bool) -> None:
        super().__init__()
        hidden = settings.hidden
        self.graph_attention = GraphAttention(settings)
        self.feedforward = FeedForwards(hidden, settings.multiple, edges)
        self.norm_attn_node, self.norm_attn_edge = nn.RMSNorm(hidden), nn.RMSNorm(hidden)
        self.norm_ffn_node = nn.RMSNorm(hidden)
        self.norm_ffn_edge = nn.RMSNorm(hidden) if edges else nn.Identity()

    def forward(self, node: Tensor, edge: Tensor, graph: Graph, numbers: Tensor) -> tuple[Tensor, Tensor]:
        out = self.graph_attention(self.norm_attn_node(node), self.norm_attn_edge(edge), graph, numbers)
        node, edge = node + out[:, 0], edge + out
        node = node + self.feedforward.mlp_node(self.norm_ffn_node(node))
        return node, edge + self.feedforward.mlp_edge(self.norm_ffn_edge(edge))


class Readout(nn.Module):
    def __init__(self, hidden: int, multiple: int, edges: bool) -> None:
        super().__init__()
        self.node_ffn, self.pre_node_norm = feed_forward(hidden, multiple), nn.RMSNorm(hidden)
        if edges:
            self.edge_ffn, self.pre_edge_norm = feed_forward(hidden, multiple), nn.RMSNorm(hidden)
        self.edges = edges

    def forward(self, node: Tensor, edge: Tensor) -> tuple[Tensor, Tensor | None]:
        node = node + self.node_ffn(self.pre_node_norm(node))
        return node, edge + self.edge_ffn(self.pre_edge_norm(edge)) if self.edges else None


class OutputProjection(nn.Module):
    def __init__(self, hidden: int, count: int, edges: bool) -> None:
        super().__init__()
        self.node_projection = activated(count * hidden, hidden)
        self.output_norm_node = nn.RMSNorm(hidden)
        if edges:
            self.edge_projection = activated(count * hidden, hidden)
            self.output_norm_edge = nn.RMSNorm(hidden)

    def nodes(self, readouts: list[Tensor]) -> Tensor:
        return self.output_norm_node(self.node_projection(torch.cat(readouts, dim=-1)))

    def edges(self, readouts: list[Tensor]) -> Tensor:
        return self.output_norm_edge(self.edge_projection(torch.cat(readouts, dim=-1)))


class OutputLayer(nn.Module):
    def __init__(self, hidden: int, multiple: int, out: int) -> None:
        super().__init__()
        self.ffn = feed_forward(hidden, multiple)
        self.final_output = nn.Sequential(nn.Linear(hidden, out, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        return self.final_output(self.ffn(x))


class EnergyHead(nn.Module):
    """Atoms are not normed where forces are conservative."""

    def __init__(self, hidden: int, multiple: int, normed: bool) -> None:
        super().__init__()
        self.energy_layer, self.node_norm = OutputLayer(hidden, multiple, 1), nn.RMSNorm(hidden)
        self.normed = normed

    def forward(self, node: Tensor, natoms: Sequence[int]) -> Tensor:
        energies = self.energy_layer(self.node_norm(node) if self.normed else node)[:, 0]
        return torch.stack([part.sum() for part in energies.split(list(natoms))])


class DirectForceHead(nn.Module):
    def __init__(self, hidden: int, multiple: int) -> None:
        super().__init__()
        self.force_direction_layer = OutputLayer(hidden, multiple, 3)
        self.force_magnitude_layer = OutputLayer(hidden, multiple, 1)
        self.node_norm, self.edge_norm = nn.RMSNorm(hidden), nn.RMSNorm(hidden)

    def forward(self, node: Tensor, edge: Tensor, graph: Graph) -> Tensor:
        parts = self.force_direction_layer(self.edge_norm(edge)) * graph.directions
        return (parts * graph.used[..., None]).sum(1) * self.force_magnitude_layer(self.node_norm(node))


# ---- the model ---------------------------------------------------------------------------------------------


class Backbone(nn.Module):
    def __init__(self, settings: Settings) -> None:
        super().__init__()
        hidden, num_layers, edges = settings.hidden, settings.num_layers, settings.direct
        self.input_block = InputBlock(settings)
        self.transformer_blocks = nn.ModuleList(
            Block(settings, edges or i + 1 < num_layers) for i in range(num_layers)
        )
        self.readout_layers = nn.ModuleList(
            Readout(hidden, settings.multiple, edges) for _ in range(num_layers + 1)
        )
        self.output_projection = OutputProjection(hidden, num_layers + 1, edges)

    def forward(self, graph: Graph, numbers: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Nodes `(N, H)`, and the edge readouts, none with conservative forces."""
        node, edge = self.input_block(graph, numbers)
        nodes, edges = [], []
        for i, readout in enumerate(self.readout_layers):
            nodes.append(readout(node, edge)[0])
            edges.append(readout(node, edge)[1])
            if i < len(self.transformer_blocks):
                node, edge = self.transformer_blocks[i](node, edge, graph, numbers)
        return self.output_projection.nodes(nodes), [edge for edge in edges if edge is not None]


class PlainEScAIP(nn.Module):
    """The whole.

    Args:
        settings: `direct` for a head of forces, else they are the gradient of the energy.
        stress: also the gradient by a symmetric strain; conservative forces only.
    """

    def __init__(self, settings: Settings, stress: bool = False) -> None:
        super().__init__()
        self.settings, self.direct, self.stress = settings, settings.direct, stress
        self.backbone = Backbone(settings)
        if self.direct:
            energy = EnergyHead(settings.hidden, settings.multiple, True)
            force = DirectForceHead(settings.hidden, settings.multiple)
            self.output_heads = nn.ModuleDict({"energy": energy, "forces": force})
        else:
            efs = EnergyHead(settings.hidden, settings.multiple, False)
            self.output_heads = nn.ModuleDict({"efs": efs})

    def load_official(self, state: dict[str, Tensor]) -> None:
        """Of an official state dict, whatever its heads are called."""
        forces = {key.split(".")[1] for key in state if "force_direction_layer" in key}

        def renamed(key: str) -> str:
            if not key.startswith("output_heads."):
                return key
            _, head, *rest = key.split(".")
            name = ("forces" if head in forces else "energy") if self.direct else "efs"
            return ".".join(["output_heads", name, *(part for part in rest if part != "head")])

        self.load_state_dict({renamed(key): value for key, value in state.items()})

    def forward(
        self,
        positions: Tensor,
        numbers: Tensor,
        cells: Tensor,
        periodic: Sequence[bool],
        natoms: Sequence[int],
    ) -> dict[str, Tensor]:
        """Energies `(G)`, forces `(N, 3)` and stresses `(G, 3, 3)` by name.

        Args:
            positions: `(N, 3)`, wrapped, one system after the other.
            numbers: `(N)`.
            cells: `(G, 3, 3)`.
            periodic: of each system.
            natoms: of each system.
        """
        if self.direct:
            graph = build_graph(positions, cells, periodic, natoms, self.settings)
            node, edges = self.backbone(graph, numbers)
            edge = self.backbone.output_projection.edges(edges)
            energy = self.output_heads["energy"](node, natoms)
            return {"energy": energy, "forces": self.output_heads["forces"](node, edge, graph)}
        with torch.enable_grad():
            return self.conservative(positions, numbers, cells, periodic, natoms)

    def conservative(
        self,
        positions: Tensor,
        numbers: Tensor,
        cells: Tensor,
        periodic: Sequence[bool],
        natoms: Sequence[int],
    ) -> dict[str, Tensor]:
        here = positions.detach().requires_grad_()
        strain = torch.zeros_like(cells).requires_grad_()
        moved, strained = here, cells
        if self.stress:
            symmetric = (strain + strain.transpose(1, 2)) / 2
            parts = zip(here.split(list(natoms)), symmetric, strict=True)
            moved = torch.cat([part + part @ change for part, change in parts])
            strained = cells + cells @ symmetric
        graph = build_graph(moved, strained, periodic, natoms, self.settings)
        node, _ = self.backbone(graph, numbers)
        energy = self.output_heads["efs"](node, natoms)
        wrt = [here, strain] if self.stress else [here]
        gradients = torch.autograd.grad(energy.sum(), wrt, create_graph=self.training)
        found = {"energy": energy if self.training else energy.detach(), "forces": -gradients[0]}
        if self.stress:
            found["stress"] = gradients[1] / torch.linalg.det(cells).abs()[:, None, None]
        return found
