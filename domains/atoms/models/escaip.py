"""EScAIP: Efficiently Scaled Attention Interatomic Potential (Qu, Krishnapriyan; NeurIPS 2024, 2410.24169).

The second version of the program (2025): attention among the neighbours of each atom, who are chosen by a
two-sided, differentiable k-nearest rule. Forces are predicted by a head ("direct") or the derivative of the
energy ("conservative").

Letters in shapes: N atoms, G structures, K slots of neighbours (slot 0 is the atom itself), H hidden width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from domains.atoms.graph.biknn import Knn, find_edges
from domains.atoms.graph.tables import neighbour_table, pair_lengths
from domains.atoms.models.escaip_network import EScAIPNetwork, Graph, tiling
from domains.atoms.models.escaip_parts import Sizes
from domains.atoms.models.potential import Potential
from domains.atoms.structures import Structures
from domains.atoms.weights.escaip import EScAIPOfficial
from zoo.errors import ConfigError
from zoo.registry import register_model

REDUCTIONS = ("sum", "mean")
TILE_VALUES = {"cpu": 2**19, "gpu": 2**27}
"""Features of edges that are computed at once: what fits into the cache of a processor; enough for a GPU."""
KEPT_VALUES = 2**26
"""Features of edges in all layers up to which what lies between is kept for the gradient (about 4 GiB)."""


class EScAIP(Potential):
    """Energies, forces and stress by attention among neighbours.

    Args:
        forces: "direct" (not rotation equivariant, by design), "conservative", or None.
        stress: needs conservative forces.
        cutoff: Å.
        knn_k, knn_soft, knn_low_mem, knn_sigmoid_scale, knn_lse_scale: see `graph.biknn.Knn`.
        use_pbc: True: all structures are periodic along all axes; False: none is, whatever they say; None: as
            each says of each axis. The official program has only the first two.
        use_envelope: weigh neighbours by their envelope; else all alike.
        smooth_orders: also in the bond-orientational order parameters. Officially each neighbour counts there
            in full until it is gone, and the energy jumps when it goes.
        max_num_elements: rows of the embeddings; atomic numbers are below it.
        distance_function: how distances are expanded, see `graph.features.EXPANSIONS`.
        frequency_list: see `escaip_parts.Sizes`, also for the sizes without a line here.
        use_global_readout: the energy is read from the sum (or mean) over all atoms, layer by layer.
        energy_reduce: "sum" or "mean" over the atoms.
        dropout, attn_dropout, node_ffn_dropout, edge_ffn_dropout, scalar_output_dropout,
            vector_output_dropout, drop_path: in training; published models have none. The MLPs' own default
            to `dropout`.

    Raises:
        ConfigError: sizes that do not fit together, or an option that does not exist.
    """

    network: EScAIPNetwork
    invariant = True

    def __init__(
        self,
        *,
        forces: str | None = "direct",
        stress: bool = False,
        hidden_size: int = 512,
        num_layers: int = 10,
        num_heads: int = 8,
        cutoff: float = 6.0,
        knn_k: int = 30,
        knn_soft: bool = True,
        knn_low_mem: bool = True,
        knn_sigmoid_scale: float = 0.2,
        knn_lse_scale: float = 0.1,
        use_pbc: bool | None = None,
        use_envelope: bool = True,
        smooth_orders: bool = False,
        max_num_elements: int = 110,
        distance_function: str = "gaussian",
        atom_embedding_size: int = 128,
        node_direction_embedding_size: int = 64,
        node_direction_expansion_size: int = 10,
        edge_distance_expansion_size: int = 600,
        edge_distance_embedding_size: int = 512,
        frequency_list: Sequence[int] | None = (20, 10, 4, 10, 20),
        angle_embedding: str = "none",
        angle_embedding_size: int = 8,
        use_graph_attention: bool = False,
        use_message_gate: bool = False,
        use_global_readout: bool = False,
        ffn_multiplier: int = 2,
        readout_multiplier: int = 2,
        output_multiplier: int = 2,
        activation: str = "gelu",
        normalization: str = "rmsnorm",
        energy_reduce: str = "sum",
        dropout: float = 0.0,
        attn_dropout: float = 0.0,
        node_ffn_dropout: float = 0.0,
        edge_ffn_dropout: float = 0.0,
        scalar_output_dropout: float = 0.0,
        vector_output_dropout: float = 0.0,
        drop_path: float = 0.0,
    ) -> None:
        knn = Knn(knn_k, cutoff, knn_soft, knn_low_mem, knn_sigmoid_scale, knn_lse_scale, "sine")
        super().__init__(
            forces=forces,
            stress=stress,
            cutoff=cutoff,
            margin=knn.margin,
            max_atomic_number=max_num_elements - 1,
        )
        if energy_reduce not in REDUCTIONS:
            raise ConfigError(f"energy_reduce is one of {', '.join(REDUCTIONS)}, not {energy_reduce!r}.")
        self.knn, self.use_pbc = knn, use_pbc
        self.extensive = energy_reduce == "sum" and not use_global_readout
        sizes = Sizes(
            hidden_size=hidden_size,
            num_heads=num_heads,
            max_num_elements=max_num_elements,
            atom_embedding_size=atom_embedding_size,
            node_direction_embedding_size=node_direction_embedding_size,
            node_direction_expansion_size=node_direction_expansion_size,
            edge_distance_expansion_size=edge_distance_expansion_size,
            edge_distance_embedding_size=edge_distance_embedding_size,
            frequency_list=None if frequency_list is None else tuple(frequency_list),
            angle_embedding=angle_embedding,
            angle_embedding_size=angle_embedding_size,
            use_graph_attention=use_graph_attention,
            use_message_gate=use_message_gate,
            ffn_multiplier=ffn_multiplier,
            readout_multiplier=readout_multiplier,
            output_multiplier=output_multiplier,
            activation=activation,
            normalization=normalization,
            dropout=dropout,
            attn_dropout=attn_dropout,
            node_ffn_dropout=node_ffn_dropout,
            edge_ffn_dropout=edge_ffn_dropout,
            drop_path=drop_path,
        )
        self.network = EScAIPNetwork(
            sizes,
            num_layers=num_layers,
            cutoff=cutoff,
            forces=forces,
            distance_function=distance_function,
            use_envelope=use_envelope,
            smooth_orders=smooth_orders,
            use_global_readout=use_global_readout,
            energy_reduce=energy_reduce,
            output_dropouts=(scalar_output_dropout, vector_output_dropout),
        )

    def graph(self, structures: Structures) -> Graph:
        """The neighbours of all atoms, in the dtype of the weights.

        The table is as wide as the batch needs: where the official program would stop at more neighbours than
        its `knn_pad_size`, all of them are used.
        """
        if self.use_pbc is not None:
            pbc = torch.full_like(structures.pbc, self.use_pbc)
            if not torch.equal(pbc, structures.pbc):
                structures = replace(structures, pbc=pbc, pairs=None)
                structures.check()
        edges = find_edges(structures, self.knn)
        table = neighbour_table(edges, structures.num_atoms)
        dtype = self.network.energy_head.final.weight.dtype
        return Graph(
            structures.atomic_numbers,
            structures.batch,
            structures.natoms,
            table.index,
            table.mask,
            table.vectors.to(dtype),
            table.envelope.to(dtype),
            table.pair,
            pair_lengths(edges).to(dtype),
            tiling(table.mask, self.tile_slots(table.mask.device)),
        )

    def tile_slots(self, device: torch.device) -> int:
        """How many edges are computed at once."""
        return TILE_VALUES["cpu" if device.type == "cpu" else "gpu"] // self.network.sizes.hidden_size

    def run(self, graph: Graph, once: bool) -> dict[str, Tensor]:
        """With less memory where a derivative is asked for `once` and edges are many."""
        values = graph.mask.numel() * self.network.sizes.hidden_size * len(self.network.blocks)
        return self.network(graph, recompute=once and values > KEPT_VALUES)


# ---- variants ----------------------------------------------------------------------------------------------

ABOUT: dict[str, Any] = {
    "model": EScAIP,
    "paper": "The Importance of Being Scalable: Improving the Speed and Accuracy of Neural Network "
    "Interatomic Potentials Across Chemical Domains (Qu, Krishnapriyan; NeurIPS 2024, arXiv 2410.24169)",
    "licence": "MIT",
    "source": "https://github.com/facebookresearch/fairchem",
    "official": EScAIPOfficial,
    "preprocessing": {"positions": "Å", "energy": "eV", "forces": "eV/Å", "stress": "eV/Å^3"},
    "notes": "No official weights were ever published.",
}


@register_model(
    summary="EScAIP of 10 layers of width 512, the official size for SPICE, MPTrj and small OC20 runs",
    status="official parity",
    **ABOUT,
)
def escaip_h512l10(**options: Any) -> EScAIP:
    return EScAIP(**options)


@register_model(
    summary="EScAIP of 6 layers of width 640; its official file is called H640L10",
    status="official parity",
    **ABOUT,
)
def escaip_h640l6(
    *, hidden_size: int = 640, num_layers: int = 6, num_heads: int = 10, **options: Any
) -> EScAIP:
    return EScAIP(hidden_size=hidden_size, num_layers=num_layers, num_heads=num_heads, **options)


@register_model(
    summary="EScAIP of 8 layers of width 1024, the official size for large OC20 runs",
    status="official parity",
    **ABOUT,
)
def escaip_h1024l8(
    *, hidden_size: int = 1024, num_layers: int = 8, num_heads: int = 16, **options: Any
) -> EScAIP:
    return EScAIP(hidden_size=hidden_size, num_layers=num_layers, num_heads=num_heads, **options)


@register_model(
    summary="A small conservative EScAIP, 2 layers of width 64, to train from scratch on a CPU",
    status="re-implementation",
    **ABOUT,
)
def escaip_mini(
    *,
    forces: str | None = "conservative",
    hidden_size: int = 64,
    num_layers: int = 2,
    num_heads: int = 4,
    cutoff: float = 5.0,
    knn_k: int = 14,
    atom_embedding_size: int = 16,
    node_direction_embedding_size: int = 16,
    node_direction_expansion_size: int = 6,
    edge_distance_expansion_size: int = 32,
    edge_distance_embedding_size: int = 64,
    frequency_list: Sequence[int] | None = (6, 4, 3, 3),
    smooth_orders: bool = True,
    **options: Any,
) -> EScAIP:
    return EScAIP(
        forces=forces,
        hidden_size=hidden_size,
        num_layers=num_layers,
        num_heads=num_heads,
        cutoff=cutoff,
        knn_k=knn_k,
        atom_embedding_size=atom_embedding_size,
        node_direction_embedding_size=node_direction_embedding_size,
        node_direction_expansion_size=node_direction_expansion_size,
        edge_distance_expansion_size=edge_distance_expansion_size,
        edge_distance_embedding_size=edge_distance_embedding_size,
        frequency_list=frequency_list,
        smooth_orders=smooth_orders,
        **options,
    )
