"""A small AllScAIP with weights that let everything matter, and structures for it."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from ase import Atoms
from ase.build import bulk, molecule
from torch import nn

import zoo
from domains.atoms.models.allscaip import AllScAIP
from domains.atoms.structures import Structures

SIZES: dict[str, Any] = {
    "hidden_size": 16,
    "num_layers": 2,
    "num_heads": 2,
    "cutoff": 4.0,
    "knn_k": 8,
    "edge_distance_expansion_size": 12,
    "edge_direction_expansion_size": 3,
    "node_direction_expansion_size": 4,
    "frequency_list": [3, 2, 2, 1],
    "num_frequencies": 6,
}
PLAIN: dict[str, Any] = {"frequency_list": None, "num_frequencies": None}
"""Without masks, as the published md."""


def small_allscaip(*, double: bool = False, **options: Any) -> AllScAIP:
    """In eval mode; embeddings as strong as other weights, biases that are not zero."""
    torch.manual_seed(0)
    model = zoo.create_model("atoms/allscaip_mini", **(SIZES | options))
    assert isinstance(model, AllScAIP)
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
        elif parameter.ndim:
            nn.init.normal_(parameter, float("norm.weight" in name), 0.1)
    return (model.double() if double else model).eval()


def frames() -> list[Atoms]:
    """A molecule, a crystal in a cell smaller than the cutoff, an ion with a spin, a slab, a lone atom."""
    ion = molecule("H2O")
    ion.info |= {"charge": 1, "spin": 2}
    slab = bulk("Si").repeat((2, 1, 1))
    slab.pbc = [True, True, False]
    found = [molecule("CH3OH"), bulk("Cu", cubic=True), ion, slab, Atoms("He", [[0.0, 0, 0]])]
    draw = np.random.default_rng(0)
    for frame in found:
        frame.positions += draw.normal(0, 0.05, frame.positions.shape)
    return found


def batch_of(*atoms: Atoms, double: bool = False) -> Structures:
    return Structures.from_ase(atoms, torch.float64 if double else torch.float32)
