"""Reading labelled structures: formats, names of labels, units, and what is refused."""

from __future__ import annotations

import json
import pickle
import zlib
from pathlib import Path
from typing import Any

import lmdb
import numpy as np
import pytest
import torch
from ase import Atoms, units
from ase.calculators.singlepoint import SinglePointCalculator
from ase.constraints import FixAtoms
from ase.db import connect
from ase.io import write
from ase.io.jsonio import encode
from atoms_small import cluster, crystal, mixed_file, save
from torch_geometric.data import Data

from domains.atoms.sources import LabelReader, read_frames
from domains.atoms.sources.frames import full_tensor
from domains.atoms.sources.pickles import read_graph
from domains.atoms.sources.units import Units
from domains.atoms.survey import Survey
from zoo.errors import ConfigError, DataError

STRESS = np.array([[1.0, 0.2, 0.3], [0.2, 2.0, 0.4], [0.3, 0.4, 3.0]])


def renamed(atoms: Atoms, **names: str) -> Atoms:
    """Labels moved from the calculator to `info` and `arrays` under other names."""
    results = atoms.calc.results
    atoms.calc = None
    for label, name in names.items():
        value = results[label]
        (atoms.arrays if label == "forces" else atoms.info)[name] = value
    return atoms


# ---- formats -----------------------------------------------------------------------------------------------


def test_extended_xyz_keeps_every_label(tmp_path: Path) -> None:
    atoms = crystal()
    (found,) = read_frames(save(tmp_path / "a.extxyz", [atoms]))
    assert found.energy == pytest.approx(atoms.get_potential_energy(), abs=1e-8)
    assert np.allclose(found.forces, atoms.get_forces(), atol=1e-7)
    assert found.stress is not None
    assert np.allclose(found.stress, atoms.get_stress(voigt=False), atol=1e-8)
    assert found.group == "crystal"
    assert found.origin.endswith("a.extxyz, frame 0")
    assert found.atoms.calc is None


@pytest.mark.parametrize("suffix", [".db", ".json", ".traj"])
def test_files_of_ase_give_what_the_extended_xyz_gives(suffix: str, tmp_path: Path) -> None:
    images = [crystal(1), cluster(2)]
    path = tmp_path / f"a{suffix}"
    if suffix == ".traj":
        write(path, images)
    else:
        with connect(path) as database:
            for atoms in images:
                database.write(atoms, config_type=atoms.info["config_type"])
    expected = read_frames(save(tmp_path / "a.extxyz", images))
    for found, wanted in zip(read_frames(path), expected, strict=True):
        assert found.energy == pytest.approx(wanted.energy, abs=1e-7)
        assert np.allclose(found.forces, wanted.forces, atol=1e-7)
        assert (found.stress is None) == (wanted.stress is None)
        assert found.group == wanted.group or suffix == ".traj"


def test_fixed_atoms_keep_their_forces_and_their_mark(tmp_path: Path) -> None:
    atoms = crystal()
    forces = atoms.calc.results["forces"].copy()
    atoms.set_constraint(FixAtoms([1, 3]))
    (found,) = read_frames(save(tmp_path / "a.extxyz", [atoms]))
    assert np.allclose(found.forces, forces, atol=1e-7)
    assert found.atoms.constraints[0].index.tolist() == [1, 3]


def test_charge_and_spin_are_read_and_must_be_whole(tmp_path: Path) -> None:
    atoms = cluster()
    atoms.info |= {"total_charge": -1, "spin_multiplicity": 2}
    (found,) = read_frames(save(tmp_path / "a.extxyz", [atoms]))
    assert found.atoms.info == {"charge": -1, "spin": 2}
    atoms.info["total_charge"] = 0.5
    with pytest.raises(DataError, match=r"frame 0: charge 0.5 is not a whole number"):
        read_frames(save(tmp_path / "b.extxyz", [atoms]))


# ---- names, units, shapes ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("energy", "forces", "keys"),
    [
        ("REF_energy", "REF_forces", {}),
        ("dft_energy", "dft_forces", {}),
        ("u0", "f0", {"energy": "u0", "forces": "f0"}),
    ],
)
def test_labels_are_found_by_their_names(
    energy: str, forces: str, keys: dict[str, str], tmp_path: Path
) -> None:
    atoms = cluster()
    expected = dict(atoms.calc.results)
    path = save(tmp_path / "a.extxyz", [renamed(atoms, energy=energy, forces=forces)])
    (found,) = read_frames(path, LabelReader(keys, needs_forces=True))
    assert found.energy == pytest.approx(expected["energy"], abs=1e-7)
    assert np.allclose(found.forces, expected["forces"], atol=1e-7)


def test_reference_labels_win_over_those_a_calculator_left(tmp_path: Path) -> None:
    atoms = cluster()
    atoms.info["REF_energy"] = -1.25
    (found,) = read_frames(save(tmp_path / "a.extxyz", [atoms]))
    assert found.energy == -1.25


def test_a_virial_is_minus_stress_times_volume(tmp_path: Path) -> None:
    atoms = crystal()
    stress = atoms.get_stress(voigt=False)
    del atoms.calc.results["stress"]
    atoms.info["virial"] = -stress * atoms.get_volume()
    (found,) = read_frames(save(tmp_path / "a.extxyz", [atoms]))
    assert np.allclose(found.stress, stress, atol=1e-8)


def test_stress_of_six_and_of_nine_numbers_agree() -> None:
    six = STRESS[[0, 1, 2, 1, 0, 0], [0, 1, 2, 2, 2, 1]]
    assert np.array_equal(full_tensor(six, "it"), STRESS)
    assert np.array_equal(full_tensor(STRESS.reshape(-1), "it"), STRESS)
    with pytest.raises(DataError, match="it has 3 values; 6"):
        full_tensor([1, 2, 3], "it")
    with pytest.raises(DataError, match="it is not symmetric"):
        full_tensor(STRESS + np.triu(np.ones((3, 3)), 1), "it")


def test_stress_without_three_periodic_axes_is_left_out_and_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    atoms = crystal()
    atoms.pbc = (True, True, False)
    (found,) = read_frames(save(tmp_path / "a.extxyz", [atoms]))
    assert found.stress is None
    assert "left out 1 x stress of frames that are not periodic" in capsys.readouterr().out


def test_units_are_converted() -> None:
    found = Units.of({"energy": "Ha", "length": "Bohr", "stress": "GPa"})
    assert found.energy == units.Hartree
    assert found.forces == pytest.approx(units.Hartree / units.Bohr)
    assert found.stress == pytest.approx(1 / 160.21766208)
    assert Units.of({"energy": "kcal/mol"}).forces == pytest.approx(units.kcal / units.mol)
    assert Units.of({"stress": "Ha/Bohr^3"}).stress == pytest.approx(units.Hartree / units.Bohr**3)
    assert Units.of({"energy": None}) == Units()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"energy": "Hartree"}, "data.units.energy=Hartree: write one of eV, meV, Ha"),
        ({"force": "eV/Ang"}, "data.units.force is not one of .* Did you mean 'forces'"),
        ({"stress": "atm"}, "data.units.stress=atm: write one of GPa"),
    ],
)
def test_unknown_units_are_named(given: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Units.of(given)


def test_positions_in_bohr_come_out_in_angstrom(tmp_path: Path) -> None:
    atoms = crystal()
    cell, positions = atoms.cell.array.copy(), atoms.positions.copy()
    path = save(tmp_path / "a.extxyz", [atoms])
    (found,) = read_frames(path, LabelReader(units=Units.of({"length": "Bohr"})))
    assert np.allclose(found.atoms.cell.array, cell * units.Bohr, atol=1e-7)
    assert np.allclose(found.atoms.positions, positions * units.Bohr, atol=1e-7)


# ---- bad input ---------------------------------------------------------------------------------------------


def test_missing_labels_name_what_there_is(tmp_path: Path) -> None:
    path = save(tmp_path / "a.extxyz", [renamed(cluster(), energy="u0", forces="f0")])
    with pytest.raises(DataError, match=r"no energies under any usual name .*It has: config_type, f0, u0"):
        read_frames(path)
    with pytest.raises(DataError, match=r"no forces under any usual name .*f0.*data.keys.forces"):
        read_frames(path, LabelReader({"energy": "u0"}, needs_forces=True))
    with pytest.raises(DataError, match=r"has no 'u1' \(data.keys.energy\). Did you mean 'u0'"):
        read_frames(path, LabelReader({"energy": "u1"}))


def test_a_frame_without_its_label_is_named(tmp_path: Path) -> None:
    bare = cluster()
    bare.calc = None
    with pytest.raises(DataError, match=r"frame 1 has no 'energy'"):
        read_frames(save(tmp_path / "a.extxyz", [cluster(), bare]))


def test_labels_that_are_no_numbers_are_refused_or_masked(tmp_path: Path) -> None:
    atoms = cluster()
    atoms.calc.results["forces"][2, 1] = np.nan
    path = save(tmp_path / "a.extxyz", [atoms])
    with pytest.raises(DataError, match=r"frame 0: the forces of atom 2 is not finite.*data.nan=mask"):
        read_frames(path)
    (found,) = read_frames(path, LabelReader(nan="mask"))
    assert found.forces is not None
    assert np.isnan(found.forces).all(1).tolist() == [False, False, True, False, False]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"5\nenergy=1.0\nCu 0 0 0\nCu 0 0 2\n", "frame 0 cannot be read"),
        (b"some text\n", "cannot be read"),
    ],
)
def test_broken_files_are_refused(content: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "a.extxyz"
    path.write_bytes(content)
    with pytest.raises(DataError, match=message):
        read_frames(path)


def test_a_missing_file_names_the_nearest(tmp_path: Path) -> None:
    mixed_file(tmp_path / "train.extxyz", 2)
    with pytest.raises(DataError, match=r"Did you mean 'train.extxyz'"):
        read_frames(tmp_path / "trian.extxyz")


def survey_of(frames: list[Atoms], tmp_path: Path) -> Survey:
    return Survey.of(read_frames(save(tmp_path / "a.extxyz", frames)))


def changed(atoms: Atoms, **factors: float) -> Atoms:
    for label, factor in factors.items():
        atoms.calc.results[label] = atoms.calc.results[label] * factor
    return atoms


def test_energies_per_atom_are_told_from_total_ones(tmp_path: Path) -> None:
    def shifted(i: int, *, per_atom: bool) -> Atoms:
        atoms = crystal(i, repeat=(1 + i % 3, 1, 1))
        atoms.calc.results["energy"] -= 30.0 * len(atoms)
        return changed(atoms, energy=1 / len(atoms)) if per_atom else atoms

    survey_of([shifted(i, per_atom=False) for i in range(12)], tmp_path).check_units()
    with pytest.raises(DataError, match=r"look like energies per atom.*data.check=false"):
        survey_of([shifted(i, per_atom=True) for i in range(12)], tmp_path).check_units()


def test_a_jump_of_the_energy_names_its_frame(tmp_path: Path) -> None:
    frames = [crystal(i) for i in range(8)]
    frames[5].calc.results["energy"] -= 4000.0
    with pytest.raises(DataError, match=r"the energy per atom jumps: frame 5"):
        survey_of(frames, tmp_path).check_units()


def test_suspicious_units_are_refused(tmp_path: Path) -> None:
    near = [crystal(i) for i in range(3)]
    for atoms in near:
        atoms.positions *= 0.1
    with pytest.raises(DataError, match=r"another unit of length. Set data.units.length=nm"):
        survey_of(near, tmp_path).check_units()
    with pytest.raises(DataError, match=r"forces of .* look like another unit"):
        survey_of([changed(crystal(i), forces=1e4) for i in range(3)], tmp_path).check_units()
    with pytest.raises(DataError, match=r"a stress of .* looks like another unit"):
        survey_of([changed(crystal(i), stress=1e4) for i in range(3)], tmp_path).check_units()


def test_all_electron_energies_in_hartree_are_recognised(tmp_path: Path) -> None:
    atoms = Atoms("CO2", [[0, 0, 0], [1.2, 0, 0], [-1.2, 0, 0]])
    atoms.calc = SinglePointCalculator(atoms, energy=-188.5, forces=np.zeros((3, 3)))
    with pytest.raises(DataError, match=r"they are in Ha, not eV. Set data.units.energy=Ha"):
        survey_of([atoms], tmp_path).check_units()
    survey_of([changed(atoms, energy=units.Hartree)], tmp_path).check_units()


# ---- LMDB --------------------------------------------------------------------------------------------------


def write_lmdb(path: Path, entries: dict[bytes, bytes]) -> Path:
    store = lmdb.open(str(path), subdir=False, map_size=2**22)
    with store.begin(write=True) as transaction:
        for key, value in entries.items():
            transaction.put(key, value)
    store.close()
    return path


def oc20(atoms: Atoms, protocol: int) -> bytes:
    graph = Data(
        pos=torch.tensor(atoms.positions, dtype=torch.float32),
        atomic_numbers=torch.tensor(atoms.numbers, dtype=torch.float32),
        cell=torch.tensor(atoms.cell.array, dtype=torch.float32)[None],
        force=torch.tensor(atoms.get_forces(), dtype=torch.float32),
        y=float(atoms.get_potential_energy()),
        natoms=len(atoms),
        fixed=torch.tensor([1.0] + [0.0] * (len(atoms) - 1)),
        tags=np.zeros(len(atoms)),
        sid=1,
        fid=np.int64(2),
    )
    return pickle.dumps(graph, protocol)


@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_s2ef_graphs_are_read_without_being_run(protocol: int, tmp_path: Path) -> None:
    images = [crystal(i) for i in range(11)]
    entries = {str(i).encode(): oc20(atoms, protocol) for i, atoms in enumerate(images)}
    path = write_lmdb(tmp_path / "data.0000.lmdb", entries | {b"length": pickle.dumps(11)})
    frames = read_frames(path)
    assert len(frames) == 11
    found, atoms = frames[10], images[10]
    assert found.energy == pytest.approx(atoms.get_potential_energy())
    assert np.allclose(found.forces, atoms.get_forces(), atol=1e-6)
    assert found.atoms.pbc.all()
    assert found.atoms.constraints[0].index.tolist() == [0]
    assert len(pickle.loads(pickle.dumps(frames))) == 11


def test_a_folder_of_lmdb_files_is_one_list(tmp_path: Path) -> None:
    for i in range(2):
        write_lmdb(tmp_path / f"part{i}.lmdb", {b"0": oc20(crystal(i), 4), b"1": oc20(crystal(i + 2), 4)})
    frames = read_frames(tmp_path)
    energies = [crystal(i).get_potential_energy() for i in (0, 2, 1, 3)]
    assert [frame.energy for frame in frames] == pytest.approx(energies)
    assert frames[3].origin.endswith("part1.lmdb, frame 1")


def test_aselmdb_rows_are_read(tmp_path: Path) -> None:
    atoms = crystal()
    with connect(tmp_path / "a.db") as database:
        database.write(atoms, data={"config_type": "x"})
        row = next(database.select())
    keys = (
        "numbers",
        "positions",
        "cell",
        "pbc",
        "energy",
        "forces",
        "stress",
        "unique_id",
        "ctime",
        "mtime",
    )
    content: dict[str, Any] = {key: row[key] for key in keys} | {"id": 1, "data": {}, "user": "x"}
    content |= {"calculator": "unknown", "calculator_parameters": {}, "key_value_pairs": {"config_type": "x"}}
    entries = {b"1": zlib.compress(encode(content).encode()), b"nextid": zlib.compress(b"2")}
    (found,) = read_frames(write_lmdb(tmp_path / "a.aselmdb", entries))
    assert found.energy == pytest.approx(atoms.get_potential_energy())
    assert found.group == "x"
    assert found.stress is not None


class Attack:
    def __reduce__(self) -> tuple[Any, ...]:
        return (eval, ("1/0",))


def test_a_pickle_that_would_run_code_is_refused_by_name(tmp_path: Path) -> None:
    path = write_lmdb(tmp_path / "a.lmdb", {b"0": pickle.dumps(Attack())})
    with pytest.raises(DataError, match=r"a.lmdb, frame 0 asks for builtins.eval.*it is not run"):
        read_frames(path)
    with pytest.raises(DataError, match=r"asks for os.system|asks for posix.system"):
        read_graph(b"cos\nsystem\n(S'true'\ntR.", "it")
    other = b"ccopyreg\n_reconstructor\n(ccollections\nOrderedDict\ncbuiltins\nobject\nNtR."
    with pytest.raises(DataError, match=r"asks for an object of collections.OrderedDict"):
        read_graph(other, "it")


def test_truncated_lmdb_files_are_refused(tmp_path: Path) -> None:
    short = write_lmdb(tmp_path / "a.lmdb", {b"0": oc20(crystal(), 4), b"length": pickle.dumps(5)})
    with pytest.raises(DataError, match="is cut off: it has 1 frames of 5"):
        read_frames(short)
    cut = tmp_path / "b.lmdb"
    cut.write_bytes(short.read_bytes()[:1000])
    with pytest.raises(DataError, match="no whole LMDB file"):
        read_frames(cut)
    cut.write_bytes(short.read_bytes()[:9000])
    with pytest.raises(DataError, match=r"b.lmdb is cut off: it has 9000 bytes of"):
        read_frames(cut)
    half = write_lmdb(tmp_path / "c.lmdb", {b"0": oc20(crystal(), 4)[:-50]})
    with pytest.raises(DataError, match=r"c.lmdb, frame 0 is no whole pickle of a graph"):
        read_frames(half)
    with pytest.raises(DataError, match=r"d.lmdb holds no frame"):
        read_frames(write_lmdb(tmp_path / "d.lmdb", {b"length": pickle.dumps(0)}))


# ---- MPTrj -------------------------------------------------------------------------------------------------


def mptrj(atoms: Atoms) -> dict[str, Any]:
    sites = [
        {"species": [{"element": symbol, "occu": 1}], "abc": abc.tolist()}
        for symbol, abc in zip(atoms.get_chemical_symbols(), atoms.get_scaled_positions(), strict=True)
    ]
    return {
        "structure": {"lattice": {"matrix": atoms.cell.array.tolist()}, "sites": sites},
        "corrected_total_energy": -10.5,
        "uncorrected_total_energy": -10.0,
        "energy_per_atom": -2.6,
        "force": atoms.get_forces().tolist(),
        "stress": (10 * STRESS).tolist(),
    }


def test_mptrj_stress_changes_sign_and_unit(tmp_path: Path) -> None:
    atoms = crystal()
    path = tmp_path / "MPtrj.json"
    path.write_text(json.dumps({"mp-1": {"mp-1-0-0": mptrj(atoms)}}))
    (found,) = read_frames(path)
    assert found.energy == -10.5
    assert np.allclose(found.stress, -STRESS * units.GPa)
    assert np.allclose(found.atoms.positions, atoms.get_positions(wrap=True), atol=1e-8)
    assert found.origin.endswith("MPtrj.json, mp-1, mp-1-0-0")
    (other,) = read_frames(path, LabelReader({"energy": "uncorrected_total_energy"}))
    assert other.energy == -10.0
    path.write_text(json.dumps({"mp-1": {"mp-1-0-0": {"structure": {}}}}))
    with pytest.raises(DataError, match="mp-1-0-0 is no structure as MPTrj has them"):
        read_frames(path)


def test_the_real_files_are_read(shared_data: Path) -> None:
    folder = shared_data / "atoms"
    frames = read_frames(folder / "mlearn_Si_test.extxyz")
    assert len(frames) == 25
    assert all(frame.stress is not None for frame in frames)
    scan = read_frames(folder / "acac_test_dihedral.extxyz")
    assert scan[0].forces is None
    assert scan[0].group == "dihedral_scan"
