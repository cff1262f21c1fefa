"""What all potentials have in common: forces and stress as derivatives, and the units of results."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from domains.atoms.structures import LARGEST_NUMBER, Structures
from zoo.errors import ConfigError, DataError

FORCES = ("direct", "conservative")


class Scale(nn.Module):
    """From the numbers a network gives to eV, eV/Å and eV/Å^3: `value * rmsd + mean`, energies + references.

    Args:
        max_atomic_number: elements 1 to this have a reference energy.

    Buffers, 0 and 1 until training or a checkpoint sets them:
        element_references: `(max_atomic_number + 1,)` float64 in eV by atomic number; stays float64.
        energy_mean, energy_rmsd, force_rmsd, stress_rmsd: numbers without axes, float64.
    """

    element_references: Tensor
    energy_mean: Tensor
    energy_rmsd: Tensor
    force_rmsd: Tensor
    stress_rmsd: Tensor

    def __init__(self, max_atomic_number: int) -> None:
        super().__init__()
        self.register_buffer("element_references", torch.zeros(max_atomic_number + 1, dtype=torch.float64))
        for name, value in {"energy_mean": 0, "energy_rmsd": 1, "force_rmsd": 1, "stress_rmsd": 1}.items():
            self.register_buffer(name, torch.tensor(float(value), dtype=torch.float64))

    def references(self, structures: Structures) -> Tensor:
        """Energy `(G,)` of the free atoms, float64 in eV."""
        energies = self.element_references[structures.atomic_numbers]
        return energies.new_zeros(len(structures)).index_add(0, structures.batch, energies)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Scale:
        """Moves with the model, but keeps float64: total energies need more digits than float32 has."""
        exact = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, value in exact.items():
            moved = self._buffers[name]
            assert value is not None
            assert moved is not None
            self._buffers[name] = value.to(moved.device)
        return self


class Potential(nn.Module):
    """Energy of structures, with forces and stress. A subclass gives `graph` and `network`.

    Args:
        forces: "direct": a head predicts them; "conservative": `F = -dE/dx`; None: energies only.
        stress: also `(dE/dstrain) / volume`, in ASE's sign; needs conservative forces.
        cutoff: Å, within which atoms are neighbours.
        margin: Å beyond the cutoff from which atoms still influence who is a neighbour.
        max_atomic_number: the heaviest element that the model has an embedding of.

    Attributes:
        predicts: the outputs, of "energy", "forces" and "stress".
        scale: units of the outputs, see `Scale`.
        elements: atomic numbers seen in training, where known; the calculator and `zoo predict` refuse
            others.
    """

    network: nn.Module
    invariant: bool = False
    """By construction a turned structure has the same energy."""
    extensive: bool = True
    """By construction the energies of two structures far apart add up."""

    def __init__(
        self, *, forces: str | None, stress: bool, cutoff: float, margin: float, max_atomic_number: int
    ) -> None:
        super().__init__()
        if forces is not None and forces not in FORCES:
            raise ConfigError(f"forces are {', '.join(map(repr, FORCES))} or None, not {forces!r}.")
        if stress and forces != "conservative":
            raise ConfigError(f"stress=True needs forces='conservative', not forces={forces!r}.")
        if cutoff <= 0:
            raise ConfigError(f"cutoff is a positive number of Å, not {cutoff}.")
        self.forces, self.stress = forces, stress
        self.cutoff, self.margin, self.max_atomic_number = cutoff, margin, max_atomic_number
        known = {"energy": True, "forces": forces is not None, "stress": stress}
        self.predicts = frozenset(name for name, given in known.items() if given)
        self.scale = Scale(max_atomic_number)
        self.elements: frozenset[int] | None = None

    @property
    def head_modules(self) -> tuple[str, ...]:
        """What fine-tuning of the heads alone trains: the network behind its blocks."""
        parts = [name for name, _ in self.network.named_children()]
        return tuple(f"network.{name}" for name in parts[parts.index("blocks") + 1 :])

    def graph(self, structures: Structures) -> Any:
        """What the network reads, differentiable in positions and cells."""
        raise NotImplementedError

    def run(self, graph: Any, once: bool) -> dict[str, Tensor]:
        """Outputs of the network.

        Args:
            once: no derivative of a derivative will be asked for.
        """
        return self.network(graph)

    def forward(self, structures: Structures) -> dict[str, Tensor]:
        """Outputs in the model's own units: `energy (G,)`, `forces (N, 3)`, `stress (G, 3, 3)`.

        Conservative forces are there in any grad mode; where gradients are enabled they can be differentiated
        once more, as training does. A structure without volume has a stress of nan.

        Raises:
            DataError: an element that the model does not know; atoms at one place.
        """
        self.check_elements(structures)
        if self.forces != "conservative":
            return self.run(self._geometry(structures), once=True)
        again = torch.is_grad_enabled()
        with ExitStack() as stack:
            if torch.is_inference_mode_enabled():
                stack.enter_context(torch.inference_mode(False))
                structures = structures.cloned()
            stack.enter_context(torch.enable_grad())
            if not again:
                stack.enter_context(frozen(self))
            outputs = self._differentiated(structures, again)
        return outputs if again else {name: value.detach() for name, value in outputs.items()}

    def compile(self, *args: Any, **options: Any) -> None:
        """Compiles the network, in place; neighbours are found outside of it, in numbers that vary."""
        self.network.compile(*args, **({"dynamic": True} | options))

    def physical(self, outputs: dict[str, Tensor], structures: Structures) -> dict[str, Tensor]:
        """Outputs in eV (float64, references included), eV/Å and eV/Å^3."""
        scale = self.scale
        found = dict(outputs)
        found["energy"] = (
            outputs["energy"].double() * scale.energy_rmsd + scale.energy_mean + scale.references(structures)
        )
        for name, rmsd in (("forces", scale.force_rmsd), ("stress", scale.stress_rmsd)):
            if name in outputs:
                found[name] = outputs[name] * rmsd.to(outputs[name])
        return found

    def evaluate(self, structures: Structures) -> dict[str, Tensor]:
        """`physical(forward(structures))`."""
        return self.physical(self(structures), structures)

    def _geometry(self, structures: Structures) -> Any:
        """`graph`, in full precision also under autocast."""
        with torch.autocast(structures.positions.device.type, enabled=False):
            return self.graph(structures)

    def _differentiated(self, structures: Structures, again: bool) -> dict[str, Tensor]:
        positions = structures.positions
        if not positions.requires_grad:
            positions = positions.detach().requires_grad_()
        inputs = [positions]
        structures = replace(structures, positions=positions)
        if self.stress:
            strain = torch.zeros_like(structures.cell).requires_grad_()
            inputs.append(strain)
            with torch.autocast(positions.device.type, enabled=False):
                structures = strained(structures, strain)
        # Fused attention kernels have no second derivative.
        with sdpa_kernel(SDPBackend.MATH) if again else nullcontext():
            outputs = self.run(self._geometry(structures), once=not again)
            slopes = torch.autograd.grad(
                outputs["energy"].sum(), inputs, create_graph=again, allow_unused=True
            )
        # A lone atom has no pair, and its energy no slope.
        slopes = [torch.zeros_like(x) if s is None else s for x, s in zip(inputs, slopes, strict=True)]
        outputs = outputs | {"forces": -slopes[0]}
        if self.stress:
            volume = torch.linalg.det(structures.cell.detach()).abs()[:, None, None]
            flat = volume == 0
            # Filled after the division, lest the gradient of what does not count be nan.
            outputs["stress"] = (slopes[1] / volume.masked_fill(flat, 1.0)).masked_fill(flat, torch.nan)
        return outputs

    def check_elements(self, structures: Structures) -> None:
        """A DataError where there is an element that the model has no embedding of."""
        # Reading the largest number costs a synchronisation on a GPU; 118 are all there are.
        if self.max_atomic_number >= LARGEST_NUMBER:
            return
        unknown = structures.atomic_numbers > self.max_atomic_number
        if bool(unknown.any()):
            place = structures.place(int(unknown.nonzero()[0]))
            raise DataError(f"{place}: this model knows the elements up to number {self.max_atomic_number}.")


@contextmanager
def frozen(module: nn.Module) -> Iterator[None]:
    """Weights without gradients: what these would need is not kept."""
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    try:
        for parameter in trained:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)


def strained(structures: Structures, strain: Tensor) -> Structures:
    """Positions and cells deformed by the symmetric part of `strain (G, 3, 3)`."""
    symmetric = (strain + strain.mT) / 2
    moved = (structures.positions[:, None] @ symmetric[structures.batch])[:, 0]
    return replace(
        structures,
        positions=structures.positions + moved,
        cell=structures.cell + structures.cell @ symmetric,
    )
