"""AllScAIP: all-to-all scalable attention interatomic potential (Qu, Wood, Krishnapriyan, Ulissi 2026).

Attention among the edges around each atom, and among all atoms of a structure. Total charge and spin
multiplicity are inputs. The model is not invariant to rotation, and with attention among all atoms not
size-extensive: two molecules far apart do not have the sum of their energies.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch

from domains.atoms.graph.biknn import Edges, Knn, find_edges
from domains.atoms.graph.features import directions, lengths
from domains.atoms.graph.separations import separations
from domains.atoms.graph.tables import two_sided_ranks
from domains.atoms.models.allscaip_parts import (
    LARGEST_CHARGE,
    LARGEST_SPIN,
    Graph,
    Network,
    Sizes,
)
from domains.atoms.models.node_layer import Attention
from domains.atoms.models.potential import Potential
from domains.atoms.structures import Structures
from domains.atoms.weights.allscaip import PUBLISHED_HEADS, AllScAIPOfficial
from zoo.attention import Groups
from zoo.errors import ConfigError, DataError
from zoo.registry import register_model


class AllScAIP(Potential):
    """Energies, forces and stress by attention among neighbours, and among all atoms.

    Molecules and crystals, periodic along any axes, may share a batch.

    Args:
        forces: "conservative", "direct" (a head predicts them), or None.
        stress: needs conservative forces.
        hidden_size: width of the features of atoms and edges.
        num_layers: blocks.
        num_heads: of all attention.
        cutoff: Å.
        knn_k, knn_soft, knn_low_mem, knn_sigmoid_scale, knn_lse_scale: see `graph.biknn.Knn`.
        max_neighbours: drop what is not among so many neighbours on both sides, the atom itself counted, with
            a warning; None: keep all. The official program trains with 50, and keeps all afterwards.
        use_envelope: weigh neighbours by their envelope; else all alike.
        max_num_elements: rows of the embedding; atomic numbers are below it.
        distance_function: how distances are expanded, see `graph.features.EXPANSIONS`.
        edge_distance_expansion_size: numbers that a distance becomes.
        edge_direction_expansion_size: degrees of the harmonics of an edge's direction.
        node_direction_expansion_size: degrees of the bond-orientational order of an atom.
        frequency_list: how many channels of a head turn with the harmonics of each degree; None: none do.
        use_node_path: attention among all atoms of a structure.
        num_frequencies: waves that the learned radial mask of this attention is made of; None: no mask.
        attention: another layer of the zoo among all atoms, by name or by mapping, that looks both ways,
            takes padded rows, and does not depend on the order of its tokens; it has no radial mask. No
            published weights have it.
        use_residual_scaling: scale branches by a learned number that starts at `1 / num_layers`.
        ffn_multiplier, output_multiplier: hidden width of the MLPs of blocks, and of heads, over
            `hidden_size`; 0 makes them linear.
        energy_reduce: "sum" or "mean" over the atoms.
        activation, normalization: see `layers.ACTIVATIONS` and `layers.NORMS`.
        dropout, attn_dropout: in training; published models have none.
        head_names: what the heads of energy and forces are called in official checkpoints; None: as in the
            published ones.

    Raises:
        ConfigError: sizes that do not fit together, or an option that does not exist.
        UnknownName: no attention layer of that name.
        AttentionError: an argument that the layer does not have, or a layer that cannot stand there.
    """

    network: Network

    def __init__(
        self,
        *,
        forces: str | None = "conservative",
        stress: bool = False,
        hidden_size: int = 640,
        num_layers: int = 10,
        num_heads: int = 10,
        cutoff: float = 6.0,
        knn_k: int = 30,
        knn_soft: bool = True,
        knn_low_mem: bool = True,
        knn_sigmoid_scale: float = 0.2,
        knn_lse_scale: float = 0.1,
        max_neighbours: int | None = None,
        use_envelope: bool = True,
        max_num_elements: int = 110,
        distance_function: str = "gaussian",
        edge_distance_expansion_size: int = 512,
        edge_direction_expansion_size: int = 6,
        node_direction_expansion_size: int = 10,
        frequency_list: Sequence[int] | None = (20, 10, 4, 10, 20),
        use_node_path: bool = True,
        num_frequencies: int | None = 32,
        attention: Attention | None = None,
        use_residual_scaling: bool = True,
        ffn_multiplier: int = 2,
        output_multiplier: int = 2,
        energy_reduce: str = "sum",
        activation: str = "gelu",
        normalization: str = "rmsnorm",
        dropout: float = 0.0,
        attn_dropout: float = 0.0,
        head_names: Sequence[str] | None = None,
    ) -> None:
        knn = Knn(knn_k, cutoff, knn_soft, knn_low_mem, knn_sigmoid_scale, knn_lse_scale, "bump")
        super().__init__(
            forces=forces,
            stress=stress,
            cutoff=cutoff,
            margin=knn.margin,
            max_atomic_number=max_num_elements - 1,
        )
        if max_neighbours is not None and max_neighbours < 1:
            raise ConfigError(f"max_neighbours is at least 1 (the atom itself), not {max_neighbours}.")
        if attention is not None and not use_node_path:
            raise ConfigError(
                f"attention={attention!r} is attention among all atoms, which use_node_path=False leaves out."
            )
        self.knn, self.max_neighbours = knn, max_neighbours
        self.extensive = energy_reduce == "sum" and not use_node_path
        self.head_names = tuple(head_names or PUBLISHED_HEADS[forces == "direct"])
        self.sizes = Sizes(
            hidden_size=hidden_size,
            num_layers=num_layers,
            num_heads=num_heads,
            max_num_elements=max_num_elements,
            cutoff=cutoff,
            distance_function=distance_function,
            use_envelope=use_envelope,
            node_direction_expansion_size=node_direction_expansion_size,
            edge_direction_expansion_size=edge_direction_expansion_size,
            edge_distance_expansion_size=edge_distance_expansion_size,
            frequency_list=None if frequency_list is None else tuple(frequency_list),
            num_frequencies=num_frequencies if use_node_path and attention is None else None,
            use_node_path=use_node_path,
            attention=attention,
            use_residual_scaling=use_residual_scaling,
            ffn_multiplier=ffn_multiplier,
            output_multiplier=output_multiplier,
            energy_reduce=energy_reduce,
            activation=activation,
            normalization=normalization,
            dropout=dropout,
            attn_dropout=attn_dropout,
        )
        self.network = Network(self.sizes, direct=forces == "direct")

    def graph(self, structures: Structures) -> Graph:
        """Edges, groups of tokens, and with radial masks the distances of all pairs.

        Raises:
            DataError: a charge or spin multiplicity that the model has no embedding of.
        """
        self._check_states(structures)
        edges = self.edges(structures)
        own = torch.arange(structures.num_atoms, device=edges.centre.device)
        by_structure, apart = Groups(structures.batch), None
        if self.sizes.num_frequencies is not None:
            apart = separations(structures, by_structure, self.cutoff)
        dtype = self.network.energy.ffn.fc1.weight.dtype
        return Graph(
            structures.atomic_numbers,
            structures.batch,
            structures.natoms,
            structures.charge,
            structures.spin,
            edges.centre,
            directions(edges.vectors).to(dtype),
            lengths(edges.vectors).to(dtype),
            edges.envelope.to(dtype),
            Groups(torch.cat([own, edges.centre])),
            Groups(torch.cat([own, edges.neighbour])),
            by_structure,
            None if apart is None else [distance.to(dtype) for distance in apart],
        )

    def edges(self, structures: Structures) -> Edges:
        """All neighbours, or with `max_neighbours` those that remain."""
        edges = find_edges(structures, self.knn)
        if self.max_neighbours is None:
            return edges
        ranks = torch.stack(two_sided_ranks(edges, structures.num_atoms))
        kept = (ranks < self.max_neighbours).all(0).nonzero()[:, 0]
        dropped = len(edges.centre) - len(kept)
        if not dropped:
            return edges
        warnings.warn(
            f"{dropped} of {len(edges.centre)} neighbours do not fit into "
            f"max_neighbours={self.max_neighbours} and are dropped, as by the official program with padding.",
            stacklevel=2,
        )
        return Edges(*(values[kept] for values in edges))

    def _check_states(self, structures: Structures) -> None:
        charge, spin = structures.charge, structures.spin
        wrong = (charge.abs() > LARGEST_CHARGE) | (spin < 0) | (spin > LARGEST_SPIN)
        if bool(wrong.any()):
            graph = int(wrong.nonzero()[0])
            raise DataError(
                f"Structure {graph} has charge {int(charge[graph])} and multiplicity {int(spin[graph])}. "
                f"The model knows charges of -{LARGEST_CHARGE} to {LARGEST_CHARGE}, and multiplicities "
                f"(spin) of 0 (not given) to {LARGEST_SPIN}."
            )


# ---- variants ----------------------------------------------------------------------------------------------

ABOUT: dict[str, Any] = {
    "model": AllScAIP,
    "paper": "AllScAIP (Qu, Wood, Krishnapriyan, Ulissi; arXiv 2603.06567, 2026)",
    "licence": "MIT",
    "source": "https://github.com/facebookresearch/fairchem",
    "official": AllScAIPOfficial,
    "preprocessing": {"positions": "Å", "energy": "eV", "forces": "eV/Å", "stress": "eV/Å^3"},
    "status": "official parity",
}
LIMITS = "Energies are neither invariant to rotation nor size-extensive."


@register_model(
    summary="AllScAIP of 10 layers of width 640: attention without masks, the size of the public weights",
    weights=("allscaip_md_omol", "allscaip_md_direct_omol"),
    notes=f"The weights (OMol25) are gated, under the FAIR Chemistry licence instead of MIT. {LIMITS}",
    **ABOUT,
)
def allscaip_md(
    *, frequency_list: Sequence[int] | None = None, num_frequencies: int | None = None, **options: Any
) -> AllScAIP:
    return AllScAIP(frequency_list=frequency_list, num_frequencies=num_frequencies, **options)


@register_model(
    summary="AllScAIP of 6 layers of width 512, with angular and radial masks",
    notes=f"No official weights were published. {LIMITS}",
    **ABOUT,
)
def allscaip_sm(
    *, hidden_size: int = 512, num_layers: int = 6, num_heads: int = 8, **options: Any
) -> AllScAIP:
    return AllScAIP(hidden_size=hidden_size, num_layers=num_layers, num_heads=num_heads, **options)


@register_model(
    summary="AllScAIP of 3 layers of width 64, to train on a CPU; not a published size",
    notes=LIMITS,
    **ABOUT,
)
def allscaip_mini(
    *,
    hidden_size: int = 64,
    num_layers: int = 3,
    num_heads: int = 4,
    cutoff: float = 5.0,
    knn_k: int = 16,
    edge_distance_expansion_size: int = 64,
    edge_direction_expansion_size: int = 4,
    node_direction_expansion_size: int = 5,
    frequency_list: Sequence[int] | None = (6, 4, 4, 2),
    num_frequencies: int | None = 16,
    **options: Any,
) -> AllScAIP:
    return AllScAIP(
        hidden_size=hidden_size,
        num_layers=num_layers,
        num_heads=num_heads,
        cutoff=cutoff,
        knn_k=knn_k,
        edge_distance_expansion_size=edge_distance_expansion_size,
        edge_direction_expansion_size=edge_direction_expansion_size,
        node_direction_expansion_size=node_direction_expansion_size,
        frequency_list=frequency_list,
        num_frequencies=num_frequencies,
        **options,
    )
