"""Batches of atomic structures: molecules, surfaces and crystals side by side.

Letters in shapes: N atoms of the batch, G structures, P pairs. Lengths in Å, charges in e.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from zoo.errors import DataError

if TYPE_CHECKING:
    import ase

LARGEST_NUMBER = 118
"""The heaviest element that has a symbol."""
FLAT = 1e-6
"""Å^k: periodic lattice vectors that span less than this have no volume."""


@dataclass
class Pairs:
    """Candidate pairs: every ordered pair of atoms, or of an atom and an image, closer than `cutoff`.

    They stand by centre, neighbour and image in ascending order.

    The vector of a pair is `positions[neighbour] + shift @ cell - positions[centre]`. An atom is no neighbour
    of itself, of its images it is. A list stays right for a smaller cutoff, and while no atom moves more than
    half of what the cutoff is too large, if positions are not wrapped again.

    Attributes:
        centre: `(P,)`, atom of the batch.
        neighbour: `(P,)`.
        shift: `(P, 3)` int, the image of the neighbour in lattice vectors.
        cutoff: Å.
    """

    centre: Tensor
    neighbour: Tensor
    shift: Tensor
    cutoff: float

    def to(self, device: torch.device | str) -> Pairs:
        """The same pairs on `device`."""
        return _mapped(self, lambda tensor: tensor.to(device))

    @staticmethod
    def concat(parts: Sequence[Pairs], natoms: Sequence[int]) -> Pairs:
        """The pairs of a batch from those of its members, which have `natoms` atoms each."""
        atoms = _starts(natoms)
        return Pairs(
            torch.cat([part.centre + at for part, at in zip(parts, atoms, strict=True)]),
            torch.cat([part.neighbour + at for part, at in zip(parts, atoms, strict=True)]),
            torch.cat([part.shift for part in parts]),
            min(part.cutoff for part in parts),
        )


@dataclass
class Structures:
    """G structures, their atoms one after the other.

    Attributes:
        positions: `(N, 3)` in Å.
        atomic_numbers: `(N,)`.
        cell: `(G, 3, 3)`, rows = lattice vectors; zeros where there is none.
        pbc: `(G, 3)` bool, periodic along each lattice vector.
        batch: `(N,)`, the structure of each atom, ascending.
        natoms: `(G,)`.
        charge: `(G,)` int, total charge.
        spin: `(G,)` int, multiplicity 2S + 1; 0 = not given.
        fixed: `(N,)` bool, atoms that do not move (and do not count in the loss of forces).
        pairs: candidate pairs, if someone has found them already.
    """

    positions: Tensor
    atomic_numbers: Tensor
    cell: Tensor
    pbc: Tensor
    batch: Tensor
    natoms: Tensor
    charge: Tensor
    spin: Tensor
    fixed: Tensor
    pairs: Pairs | None = None

    def __len__(self) -> int:
        return len(self.natoms)

    @property
    def num_atoms(self) -> int:
        """N."""
        return len(self.atomic_numbers)

    # ---- making ----

    @classmethod
    def of(
        cls,
        positions: Tensor,
        atomic_numbers: Tensor,
        *,
        cell: Tensor | None = None,
        pbc: Tensor | None = None,
        natoms: Tensor | None = None,
        charge: Tensor | None = None,
        spin: Tensor | None = None,
        fixed: Tensor | None = None,
    ) -> Structures:
        """From what is known: without `natoms` one structure, without the rest a free, neutral molecule."""
        device = positions.device
        natoms = torch.tensor([len(positions)]) if natoms is None else natoms
        natoms = natoms.to(device, torch.long)
        count = len(natoms)
        graphs = torch.arange(count, device=device)
        nobody = torch.zeros(len(positions), dtype=torch.bool, device=device)
        zeros = torch.zeros(count, dtype=torch.long, device=device)
        return cls(
            positions,
            atomic_numbers.long(),
            positions.new_zeros(count, 3, 3) if cell is None else cell.view(count, 3, 3).to(positions),
            torch.zeros(count, 3, dtype=torch.bool, device=device) if pbc is None else pbc.view(-1, 3).bool(),
            graphs.repeat_interleave(natoms),
            natoms,
            zeros if charge is None else charge.long().view(count),
            zeros if spin is None else spin.long().view(count),
            nobody if fixed is None else fixed.bool(),
        )

    @classmethod
    def from_ase(cls, atoms: Sequence[ase.Atoms], dtype: torch.dtype = torch.float32) -> Structures:
        """Checked structures from ASE, wrapped into their cells in float64.

        Total charge and multiplicity are read from `info["charge"]` and `info["spin"]`, fixed atoms from
        `FixAtoms`.

        Raises:
            DataError: see `check`; a charge or spin that is no whole number.
        """
        from ase.constraints import FixAtoms

        if not atoms:
            raise DataError("There are no structures.")
        masks = [torch.zeros(len(frame), dtype=torch.bool) for frame in atoms]
        for frame, mask in zip(atoms, masks, strict=True):
            for constraint in frame.constraints:
                if isinstance(constraint, FixAtoms):
                    mask[torch.as_tensor(constraint.index)] = True
        natoms = torch.tensor([len(frame) for frame in atoms])
        structures = cls.of(
            torch.cat([torch.as_tensor(frame.positions, dtype=torch.float64) for frame in atoms]),
            torch.cat([torch.as_tensor(frame.numbers, dtype=torch.long) for frame in atoms]),
            cell=torch.stack([torch.as_tensor(frame.cell.array, dtype=torch.float64) for frame in atoms]),
            pbc=torch.stack([torch.as_tensor(frame.pbc) for frame in atoms]),
            natoms=natoms,
            charge=torch.tensor([_integer(frame, "charge", i) for i, frame in enumerate(atoms)]),
            spin=torch.tensor([_integer(frame, "spin", i) for i, frame in enumerate(atoms)]),
            fixed=torch.cat(masks),
        )
        structures.check()
        return structures.wrapped().to(dtype=dtype)

    @classmethod
    def from_graph(cls, graph: Any) -> Structures:
        """Checked structures from a torch_geometric `Data` or `Batch`.

        Its names are those of the field's datasets: `pos`, `atomic_numbers` or `z`; where there are any also
        `cell`, `pbc`, `natoms` or `ptr`, `charge`, `spin`, `fixed`. Positions are wrapped in float64.

        Raises:
            DataError: no positions or elements; see `check`.
        """
        pos = getattr(graph, "pos", None)
        numbers = next((getattr(graph, name) for name in ("atomic_numbers", "z") if name in graph), None)
        if pos is None or numbers is None:
            raise DataError(f"A graph has pos and atomic_numbers (or z); this has {', '.join(graph.keys())}.")
        natoms = getattr(graph, "natoms", None)
        if natoms is None and getattr(graph, "ptr", None) is not None:
            natoms = graph.ptr.diff()
        options = {name: getattr(graph, name, None) for name in ("cell", "pbc", "charge", "spin", "fixed")}
        natoms = None if natoms is None else torch.as_tensor(natoms).view(-1)
        structures = cls.of(pos.double(), numbers.view(-1), natoms=natoms, **options)
        structures.check()
        return structures.wrapped().to(dtype=pos.dtype)

    @classmethod
    def concat(cls, parts: Sequence[Structures]) -> Structures:
        """One batch of several; the pairs are kept where all have them."""
        graphs = _starts([len(part) for part in parts])
        natoms = [part.num_atoms for part in parts]
        names = [field.name for field in fields(cls) if field.name not in ("batch", "pairs")]
        tensors = {name: torch.cat([getattr(part, name) for part in parts]) for name in names}
        batch = torch.cat([part.batch + at for part, at in zip(parts, graphs, strict=True)])
        lists = [part.pairs for part in parts if part.pairs is not None]
        pairs = Pairs.concat(lists, natoms) if len(lists) == len(parts) else None
        return cls(**tensors, batch=batch, pairs=pairs)

    # ---- changing ----

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Structures:
        """On another device, with positions and cells of another dtype."""

        def moved(tensor: Tensor) -> Tensor:
            return tensor.to(device, dtype if tensor.is_floating_point() else None)

        pairs = self.pairs if self.pairs is None or device is None else self.pairs.to(device)
        return replace(_mapped(replace(self, pairs=None), moved), pairs=pairs)

    def cloned(self) -> Structures:
        """A copy of every tensor, which autograd may keep even where these were made in inference mode."""
        pairs = None if self.pairs is None else _mapped(self.pairs, torch.clone)
        return replace(_mapped(replace(self, pairs=None), torch.clone), pairs=pairs)

    def wrapped(self) -> Structures:
        """With all atoms inside the cell along periodic axes; pairs would no longer fit, and are dropped."""
        cell = completed(self.cell, self.pbc)[self.batch].double()
        fractional = torch.linalg.solve(cell.mT, self.positions.double())
        images = fractional.floor() * self.pbc[self.batch]
        positions = self.positions - (images[:, None] @ cell)[:, 0].to(self.positions)
        return replace(self, positions=positions, pairs=None)

    # ---- checking ----

    def check(self) -> None:
        """Raises where a structure is none.

        Atoms that lie on each other are found with the pairs (`graph.pairs.candidate_pairs`).

        Raises:
            DataError: no structure or an empty one, positions or cells that are no numbers, elements that do
                not exist, periodic axes without a cell or with a flat one. Names structure and atom.
        """
        if not len(self):
            raise DataError("There are no structures.")
        if self.num_atoms != int(self.natoms.sum()):
            raise DataError(
                f"natoms add up to {int(self.natoms.sum())}, but there are {self.num_atoms} atoms."
            )
        self._refuse(self.natoms == 0, "has no atoms")
        self._refuse_atoms(~self.positions.isfinite().all(1), "has a position that is no number")
        self._refuse(~self.cell.isfinite().all((1, 2)), "has a cell that is no number")
        real = (self.atomic_numbers >= 1) & (self.atomic_numbers <= LARGEST_NUMBER)
        self._refuse_atoms(~real, f"has no atomic number of 1 to {LARGEST_NUMBER}")
        lengths = self.cell.norm(dim=-1)
        self._refuse(
            (self.pbc & (lengths < FLAT)).any(1),
            "is periodic along an axis without lattice vector: set its cell, or pbc to False there",
        )
        flat = torch.linalg.det(completed(self.cell, self.pbc).double()).abs() < FLAT
        self._refuse(self.pbc.any(1) & flat, "has a flat cell: its periodic lattice vectors span no volume")

    def _refuse(self, wrong: Tensor, why: str) -> None:
        if bool(wrong.any()):
            raise DataError(f"Structure {int(wrong.nonzero()[0])} {why}.")

    def _refuse_atoms(self, wrong: Tensor, why: str) -> None:
        if bool(wrong.any()):
            atom = int(wrong.nonzero()[0])
            raise DataError(f"{self.place(atom)} {why}.")

    def place(self, atom: int) -> str:
        """`Atom 3 (Cu) of structure 0`: where an atom of the batch stands, for messages."""
        from zoo.errors import require

        graph = int(self.batch[atom])
        within = atom - int(self.natoms[:graph].sum())
        symbols = require("ase.data", "atoms").chemical_symbols
        number = int(self.atomic_numbers[atom])
        symbol = f" ({symbols[number]})" if 0 < number < len(symbols) else ""
        return f"Atom {within}{symbol} of structure {graph}"


def completed(cell: Tensor, pbc: Tensor) -> Tensor:
    """Cells `(G, 3, 3)` whose vectors along open axes stand upright on the periodic ones, of length 1.

    What an open axis is given does not matter to distances: no image along it is looked at.
    """
    out = cell.clone()
    for graph in (~pbc).any(1).nonzero()[:, 0].tolist():
        kept = cell[graph][pbc[graph]].double()
        _, _, directions = torch.linalg.svd(kept, full_matrices=True) if len(kept) else (0, 0, torch.eye(3))
        out[graph][~pbc[graph]] = directions[len(kept) :].to(cell)
    return out


def _integer(frame: ase.Atoms, name: str, index: int) -> int:
    value = frame.info.get(name, 0)
    try:
        whole = int(value)
    except (TypeError, ValueError):
        whole = None
    if whole is None or whole != value:
        raise DataError(f"Structure {index}: info[{name!r}] is a whole number, not {value!r}.")
    return whole


def _starts(lengths: Sequence[int]) -> list[int]:
    return [sum(lengths[:i]) for i in range(len(lengths))]


def _mapped(record: Any, change: Any) -> Any:
    """A dataclass with `change` applied to its tensors."""
    values = {field.name: getattr(record, field.name) for field in fields(record)}
    return replace(record, **{name: change(v) for name, v in values.items() if isinstance(v, Tensor)})
