"""Structures: what comes in, what is refused, and lists of pairs."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import bulk, fcc111, molecule
from ase.constraints import FixAtoms
from ase.neighborlist import neighbor_list
from hypothesis import given, settings
from hypothesis import strategies as st

from domains.atoms.graph.pairs import candidate_pairs, pair_vectors, pairs_of
from domains.atoms.structures import Pairs, Structures, completed
from zoo.errors import DataError

NAN = float("nan")


def pair_set(pairs: Pairs) -> set[tuple[int, ...]]:
    columns = torch.cat([pairs.centre[:, None], pairs.neighbour[:, None], pairs.shift], 1)
    return {tuple(row) for row in columns.tolist()}


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    count=st.integers(1, 6),
    pbc=st.tuples(*[st.booleans()] * 3),
    cutoff=st.floats(1.0, 6.0),
)
def test_pairs_are_those_of_ase(seed: int, count: int, pbc: tuple[bool, ...], cutoff: float) -> None:
    """Cells smaller than the cutoff, atoms outside of the cell, axes that are open."""
    draw = np.random.default_rng(seed)
    cell = np.diag(draw.uniform(2.0, 5.0, 3)) + draw.normal(0, 0.3, (3, 3))
    atoms = Atoms("H" * count, draw.normal(0, 4, (count, 3)), cell=cell, pbc=pbc)
    structures = Structures.of(
        torch.tensor(atoms.positions),
        torch.ones(count),
        cell=torch.tensor(cell),
        pbc=torch.tensor(pbc),
    )
    pairs = candidate_pairs(structures, cutoff)
    i, j, shift = neighbor_list("ijS", atoms, cutoff)
    assert pair_set(pairs) == {
        (a, b, *s) for a, b, s in zip(i.tolist(), j.tolist(), shift.tolist(), strict=True)
    }
    assert bool((pair_vectors(structures, pairs).norm(dim=1) < cutoff).all())


def test_cells_may_lack_vectors_along_open_axes() -> None:
    slab = fcc111("Cu", (1, 1, 3), a=3.6)
    slab.set_cell([*slab.cell.array[:2], [0, 0, 0]])
    structures = Structures.from_ase([slab], torch.float64)
    assert not structures.cell[0, 2].any()
    i, _, _ = neighbor_list("ijS", slab, 4.0)
    assert len(candidate_pairs(structures, 4.0).centre) == len(i)
    upright = completed(structures.cell, structures.pbc)[0]
    assert torch.linalg.det(upright).abs() == pytest.approx(_area(slab))


def _area(slab: Atoms) -> float:
    return float(np.linalg.norm(np.cross(*slab.cell.array[:2])))


def test_pairs_of_a_batch_are_those_of_its_members() -> None:
    frames = [molecule("H2O"), bulk("Cu"), Atoms("H")]
    parts = [Structures.from_ase([frame]) for frame in frames]
    for part in parts:
        part.pairs = candidate_pairs(part, 5.0)
    batch = Structures.concat(parts)
    assert batch.pairs is not None
    assert pair_set(batch.pairs) == pair_set(candidate_pairs(Structures.from_ase(frames), 5.0))
    assert batch.batch.tolist() == [0, 0, 0, 1, 2]


def test_a_longer_list_serves_and_a_shorter_one_does_not() -> None:
    structures = Structures.from_ase([bulk("Cu")])
    structures.pairs = candidate_pairs(structures, 5.0)
    assert pairs_of(structures, 4.0) is structures.pairs
    assert len(pairs_of(structures, 6.0).centre) > len(structures.pairs.centre)


def test_atoms_are_wrapped_along_periodic_axes_alone() -> None:
    atoms = Atoms("HeNe", [[11.0, -1.0, 12.5], [1.0, 1.0, 1.0]], cell=[10, 10, 10], pbc=[True, True, False])
    structures = Structures.from_ase([atoms])
    assert torch.allclose(structures.positions[0], torch.tensor([1.0, 9.0, 12.5]))


def test_charge_spin_and_fixed_atoms_are_read() -> None:
    atoms = molecule("H2O")
    atoms.info |= {"charge": -1, "spin": 2}
    atoms.set_constraint(FixAtoms([1]))
    structures = Structures.from_ase([atoms, Atoms("H")])
    assert structures.charge.tolist() == [-1, 0]
    assert structures.spin.tolist() == [2, 0]
    assert structures.fixed.tolist() == [False, True, False, False]


def test_graphs_of_torch_geometric() -> None:
    data = pytest.importorskip("torch_geometric.data")
    graphs = [data.Data(pos=torch.rand(n, 3), z=torch.ones(n)) for n in (3, 2)]
    structures = Structures.from_graph(data.Batch.from_data_list(graphs))
    assert structures.natoms.tolist() == [3, 2]
    with pytest.raises(DataError, match="this has pos"):
        Structures.from_graph(data.Data(pos=torch.rand(3, 3)))


def _crystal(**changes: Any) -> Atoms:
    return Atoms("CuAg", [[0, 0, 0], [2, 0, 0]], **changes)


@pytest.mark.parametrize(
    ("atoms", "message"),
    [
        (Atoms(), "Structure 1 has no atoms"),
        (Atoms("He", [[NAN, 0, 0]]), r"Atom 0 \(He\) of structure 1 has a position that is no number"),
        (Atoms("X"), "Atom 0 of structure 1 has no atomic number"),
        (_crystal(pbc=True), "Structure 1 is periodic along an axis without lattice vector"),
        (_crystal(pbc=True, cell=[[4, 0, 0], [8, 0, 0], [0, 0, 4]]), "Structure 1 has a flat cell"),
        (_crystal(pbc=True, cell=[4, 4, NAN]), "Structure 1 has a cell that is no number"),
    ],
)
def test_what_is_no_structure_is_refused(atoms: Atoms, message: str) -> None:
    with pytest.raises(DataError, match=message):
        Structures.from_ase([molecule("H2O"), atoms])


def test_a_charge_is_a_whole_number() -> None:
    atoms = molecule("H2O")
    atoms.info["charge"] = 0.5
    with pytest.raises(DataError, match=r"info\['charge'\] is a whole number"):
        Structures.from_ase([atoms])


@pytest.mark.parametrize("image", [False, True])
def test_two_atoms_at_one_place_are_found(image: bool) -> None:
    atoms = Atoms("HHe", [[0, 0, 0], [4.0 if image else 0.0, 0, 0]], cell=[4, 4, 4], pbc=True)
    structures = Structures.from_ase([molecule("H2O"), atoms])
    with pytest.raises(DataError, match=r"Atom 0 \(H\) of structure 1 and atom 1 lie .* Å apart"):
        candidate_pairs(structures, 3.0)
