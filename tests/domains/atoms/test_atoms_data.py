"""Splits, packs, batches and what training is told of the data."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from atoms_small import cluster, crystal, frame, mixed_file, save
from scipy.spatial.distance import pdist

from domains.atoms.batches import FrameSet, random_rotation
from domains.atoms.data import AtomsData
from domains.atoms.sources import Frame
from zoo.errors import ConfigError, DataError
from zoo.training.data import ResumableLoader

COPPER = {"Cu": -3.5}


def chain(count: int, number: int) -> Frame:
    return frame(f"Cu{count}" if count > 1 else "Cu", float(number))


def sizes(frames: list[Frame]) -> np.ndarray:
    return np.array([len(frame) for frame in frames])


def module(path: Path, **options: Any) -> AtomsData:
    data = AtomsData("extxyz", path, **({"batch_size": 4} | options))
    data.setup("fit")
    data.use(4.0)
    return data


# ---- packs -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("counts", [[2] * 17, [1, 9, 3, 5, 2, 8, 4, 7, 6] * 7, [10, 1, 1, 1, 1, 1, 1, 1]])
def test_packs_hold_every_frame_once_and_at_most_so_many_atoms(counts: list[int]) -> None:
    frames = [chain(count, i) for i, count in enumerate(counts)]
    packs = FrameSet(frames, sizes(frames), max_atoms=12, shuffle=True, seed=3)
    length = len(packs)
    for epoch in range(6):
        packs.set_epoch(epoch)
        assert len(packs) == length
        assert sorted(place for pack in packs.members for place in pack) == list(range(len(frames)))
        assert max(sum(counts[place] for place in pack) for pack in packs.members) <= 12
    assert length <= 1.25 * sum(counts) / 12 + 1


def test_packs_differ_by_epoch_and_are_seeded() -> None:
    frames = [chain(1 + i % 5, i) for i in range(40)]
    dealt = []
    for seed, epoch in ((0, 0), (0, 1), (1, 0), (0, 0)):
        packs = FrameSet(frames, sizes(frames), max_atoms=16, shuffle=True, seed=seed)
        packs.set_epoch(epoch)
        dealt.append(packs.members)
    assert dealt[0] == dealt[3]
    assert dealt[0] != dealt[1]
    assert dealt[0] != dealt[2]


def test_a_frame_larger_than_a_pack_is_named() -> None:
    frames = [chain(3, 0), chain(9, 1)]
    with pytest.raises(DataError, match=r"frame 1 has 9 atoms, more than data.max_atoms=8"):
        FrameSet(frames, sizes(frames), max_atoms=8)


# ---- batches -----------------------------------------------------------------------------------------------


def test_batches_hold_structures_pairs_and_labels(tmp_path: Path) -> None:
    data = module(mixed_file(tmp_path / "a.extxyz", 20))
    batch = next(iter(data.train_dataloader()))
    structures = batch["structures"]
    assert len(structures) == len(batch["energy"]) == 4
    assert batch["energy"].dtype == torch.float64
    assert structures.pairs is not None
    assert structures.pairs.cutoff == 4.0
    offset = 0
    for i, place in enumerate(batch["index"].tolist()):
        expected = data.parts["train"][place]
        rows = slice(offset, offset + len(expected))
        assert float(batch["energy"][i]) == expected.energy
        assert np.allclose(batch["forces"][rows], expected.forces, atol=1e-6)
        assert bool(batch["stress"][i].isnan().all()) == (expected.stress is None)
        offset += len(expected)


def test_turned_frames_keep_their_shape_and_turn_their_labels(tmp_path: Path) -> None:
    path = mixed_file(tmp_path / "a.extxyz", 20)
    plain, turned = module(path), module(path, rotate=True)
    a, b = plain.train_set[0], turned.train_set[0]
    assert torch.equal(a["index"], b["index"])
    first = a["structures"].natoms[0]
    assert not torch.allclose(a["structures"].positions, b["structures"].positions, atol=0.1)
    lengths = [pdist(batch["structures"].positions[:first].numpy()) for batch in (a, b)]
    assert np.allclose(*lengths, atol=1e-5)
    assert torch.allclose(a["forces"].norm(dim=1), b["forces"].norm(dim=1), atol=1e-5)
    eigen = [torch.linalg.eigvalsh(batch["stress"].nan_to_num()) for batch in (a, b)]
    assert torch.allclose(*eigen, atol=1e-5)
    turned.train_set.set_epoch(1)
    assert not torch.allclose(turned.train_set[0]["forces"], b["forces"], atol=1e-3)
    assert torch.equal(turned.val_set[0]["forces"], plain.val_set[0]["forces"])


def test_rotations_are_rotations() -> None:
    turn = random_rotation(np.random.default_rng(0))
    assert torch.allclose(turn @ turn.T, torch.eye(3, dtype=torch.float64), atol=1e-12)
    assert float(torch.linalg.det(turn)) == pytest.approx(1.0)


@pytest.mark.parametrize("options", [{"batch_size": 3}, {"max_atoms": 14, "batch_size": None}])
def test_loading_goes_on_where_it_stopped(options: dict[str, Any], tmp_path: Path) -> None:
    path = mixed_file(tmp_path / "a.extxyz", 20)

    def loader(data: AtomsData) -> ResumableLoader:
        found = data.train_dataloader()
        found.batch_sampler.sampler.set_epoch(2)  # pyright: ignore[reportAttributeAccessIssue]
        return found

    whole = [batch["index"].tolist() for batch in loader(module(path, rotate=True, **options))]
    again = loader(module(path, rotate=True, **options))
    again.load_state_dict({"delivered": 2})
    assert [batch["index"].tolist() for batch in again] == whole[2:]


def test_broken_structures_are_named_by_file_and_frame(tmp_path: Path) -> None:
    frames = [crystal(i) for i in range(10)]
    for atoms in frames:
        atoms.positions[1] = atoms.positions[0]
    data = module(save(tmp_path / "a.extxyz", frames), check=False)
    with pytest.raises(DataError, match=r"a.extxyz, frame \d+: Atom"):
        data.train_set[0]


# ---- parts -------------------------------------------------------------------------------------------------


def test_one_file_is_split_by_seed(tmp_path: Path) -> None:
    path = mixed_file(tmp_path / "a.extxyz", 20)
    data, again, other = module(path), module(path), module(path, split_seed=1)
    assert [len(data.parts[part]) for part in ("train", "val", "test")] == [16, 2, 2]
    origins = {part: [f.origin for f in data.parts[part]] for part in data.parts}
    assert len({origin for part in origins.values() for origin in part}) == 20
    assert origins == {part: [f.origin for f in again.parts[part]] for part in again.parts}
    assert origins != {part: [f.origin for f in other.parts[part]] for part in other.parts}


def test_given_files_are_the_parts_and_name_groups(tmp_path: Path) -> None:
    train = mixed_file(tmp_path / "train.extxyz", 20)
    scan = [cluster(i) for i in range(3)]
    for atoms in scan:
        del atoms.info["config_type"]
        del atoms.calc.results["forces"]
    tests = [str(mixed_file(tmp_path / "test.extxyz", 4)), str(save(tmp_path / "scan.extxyz", scan))]
    data = AtomsData("extxyz", train=str(train), test=tests)
    data.setup("fit")
    assert [len(data.parts[part]) for part in ("train", "val", "test")] == [18, 2, 7]
    assert data.tested_groups == ["cluster", "crystal", "cluster", "crystal", "scan", "scan", "scan"]
    assert data.parts["test"][6].forces is None


def test_training_frames_need_forces_unless_told_otherwise(tmp_path: Path) -> None:
    frames = [cluster(i) for i in range(20)]
    del frames[7].calc.results["forces"]
    path = save(tmp_path / "a.extxyz", frames)
    with pytest.raises(DataError, match=r"frame 7 has no 'forces'. It has: config_type, energy"):
        module(path)
    assert len(module(path, forces=False).parts["train"]) == 16
    for atoms in frames:
        atoms.calc.results.pop("forces", None)
    path = save(tmp_path / "b.extxyz", frames)
    with pytest.raises(DataError, match=r"has no forces under any usual name .*data.forces=false"):
        module(path)
    assert not module(path, forces=False).surveys["train"].force_values
    for atoms in frames:
        atoms.calc.results.clear()
    with pytest.raises(DataError, match="has no energies under any usual name"):
        module(save(tmp_path / "c.extxyz", frames), forces=False)


def test_free_atoms_give_references_and_are_not_trained_on(tmp_path: Path) -> None:
    free = [cluster(0, 1)]
    free[0].info["config_type"] = "IsolatedAtom"
    frames = [*free, *(cluster(i) for i in range(12))]
    data = module(save(tmp_path / "a.extxyz", frames), E0s="isolated")
    assert sum(len(part) for part in data.parts.values()) == 12
    assert data.references() == {29: pytest.approx(free[0].get_potential_energy())}


def test_data_say_what_weights_depend_on(tmp_path: Path) -> None:
    data = module(mixed_file(tmp_path / "a.extxyz", 20), E0s={"Cu": 0.1, "Ag": 0.2})
    assert data.has_stress
    assert set(data.extra()["mean_energies"]) == {"Cu", "Ag"}
    assert data.extra()["E0s"] == "given"
    assert data.references() == {29: 0.1, 47: 0.2}


def test_a_file_is_described_by_group(tmp_path: Path) -> None:
    facts, rows = AtomsData.describe(mixed_file(tmp_path / "a.extxyz", 6))
    assert facts["elements"] == "Cu, Ag"
    assert [row["config_type"] for row in rows] == ["cluster", "crystal"]
    assert [row["stresses"] for row in rows] == ["0", "3"]


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"name": "emtt"}, ConfigError, "data.name=emtt is not one of .* Did you mean 'emt'"),
        ({"split": [1, 1]}, ConfigError, r"data.split=\[1, 1\]: three shares"),
        ({"max_atoms": 0}, ConfigError, "data.max_atoms=0"),
        ({"nan": "skip"}, ConfigError, "data.nan=skip"),
        ({"keys": {"forcs": "f"}}, ConfigError, "data.keys.forcs is no label. Did you mean 'forces'"),
        ({}, ConfigError, "data=extxyz needs data.train=FILE"),
        ({"path": "x", "train": "y"}, ConfigError, "Give data.path, which is split, or data.train"),
        ({"path": "missing.extxyz"}, DataError, "There is no file missing.extxyz"),
    ],
)
def test_options_that_cannot_be(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        AtomsData(**({"name": "extxyz"} | options)).setup("fit")


def test_too_few_frames_for_three_parts_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="No frame is left for the test part"):
        module(mixed_file(tmp_path / "a.extxyz", 3))


def test_tested_energies_of_another_kind_are_refused(tmp_path: Path) -> None:
    train = mixed_file(tmp_path / "train.extxyz", 20)
    other = [crystal(i) for i in range(6)]
    for atoms in other:
        atoms.calc.results["energy"] -= 3000.0 * len(atoms)
    data = AtomsData("extxyz", train=str(train), test=str(save(tmp_path / "test.extxyz", other)))
    with pytest.raises(DataError, match=r"test.extxyz: the energies of the test part lie 3000 eV per atom"):
        data.setup("fit")
