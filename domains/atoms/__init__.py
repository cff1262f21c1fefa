"""Interatomic potentials: energy, forces and stress of molecules, surfaces and crystals."""

from __future__ import annotations

from typing import Any

from domains.atoms import models as models
from zoo.registry import Domain, register_domain


def example_inputs(**_: object) -> tuple[Any]:
    """A crystal of 32 copper atoms, a little rattled."""
    import torch

    from domains.atoms.structures import Structures

    grid = torch.cartesian_prod(*[torch.arange(2.0)] * 3)
    corners = torch.tensor([[0.0, 0, 0], [0, 0.5, 0.5], [0.5, 0, 0.5], [0.5, 0.5, 0]])
    positions = 3.61 * (grid[:, None] + corners).reshape(-1, 3)
    positions = positions + 0.05 * torch.randn(positions.shape, generator=torch.Generator().manual_seed(0))
    structures = Structures.of(
        positions,
        torch.full((len(positions),), 29),
        cell=7.22 * torch.eye(3),
        pbc=torch.ones(1, 3, dtype=torch.bool),
    )
    return (structures.wrapped(),)


def __getattr__(name: str) -> Any:
    if name == "ZooCalculator":
        from domains.atoms.calculator import ZooCalculator

        return ZooCalculator
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


register_domain(
    Domain(
        name="atoms",
        summary="Interatomic potentials",
        task="domains.atoms.task:AtomsTask",
        data="domains.atoms.data:AtomsData",
        predict="domains.atoms.predict:predict",
        verbs={
            "relax": "domains.atoms.relax:relax",
            "md": "domains.atoms.md:md",
            "check": "domains.atoms.physics:check",
        },
        detect="domains.atoms.weights.detect:detect",
        example_inputs="domains.atoms:example_inputs",
    )
)
