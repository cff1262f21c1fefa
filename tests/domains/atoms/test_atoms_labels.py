"""The embedded alloys: honest labels, the same for the same seed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from ase.calculators.emt import EMT

from domains.atoms.labels import KINDS, METALS, emt_file, emt_frames
from domains.atoms.sources import read_frames
from zoo.errors import ConfigError


def test_labels_are_those_of_emt() -> None:
    for atoms in emt_frames(len(KINDS), seed=1):
        stored = atoms.calc.results
        again = atoms.copy()
        again.set_constraint()
        again.calc = EMT()
        assert stored["energy"] == pytest.approx(again.get_potential_energy())
        assert np.allclose(stored["forces"], again.get_forces())
        assert ("stress" in stored) == bool(atoms.pbc.all())
        if "stress" in stored:
            assert np.allclose(stored["stress"], again.get_stress())


def test_every_kind_comes_equally_often() -> None:
    frames = emt_frames(2 * len(KINDS), seed=0)
    groups = [atoms.info["config_type"] for atoms in frames]
    assert groups == [*KINDS, *KINDS]
    slab, cluster = (frames[groups.index(kind)] for kind in ("surface", "cluster"))
    assert slab.pbc.tolist() == [True, True, False]
    assert len(slab.constraints[0].index) == 4
    assert not cluster.pbc.any()
    assert {s for atoms in frames for s in atoms.get_chemical_symbols()} <= set(METALS)
    assert max(map(len, frames)) <= 32


def test_the_file_is_made_once_and_is_seeded(tmp_path: Path) -> None:
    path = emt_file(5, 0, tmp_path / "a")
    made = path.stat().st_mtime_ns
    assert emt_file(5, 0, tmp_path / "a").stat().st_mtime_ns == made
    assert emt_file(5, 0, tmp_path / "b").read_bytes() == path.read_bytes()
    assert emt_file(5, 1, tmp_path / "b").read_bytes() != path.read_bytes()
    assert [frame.group for frame in read_frames(path)] == list(KINDS)


def test_too_few_frames_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"data.frames=3: at least 5 are needed"):
        emt_frames(3, 0)
