"""`zoo bench domain=atoms`: what is timed is the same function."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from domains.atoms.bench import (
    ATOMS,
    FORCES,
    SUITE,
    contestants,
    crystal,
    growth,
    inference,
    molecule,
    potential,
    training,
)
from domains.atoms.structures import Structures
from zoo.bench.compare import relative_difference
from zoo.bench.suite import SUITES
from zoo.registry import load_object

CPU = torch.device("cpu")
SYSTEMS: dict[str, Callable[[], Any]] = {
    "molecule": molecule,
    "cell below the cutoff": lambda: crystal("Cu", 4),
    "crystal": lambda: crystal("Si", 64),
}


def test_the_suite_is_known_by_name() -> None:
    assert load_object(SUITES["atoms"]) is SUITE
    names = [part.name for part in (*SUITE.cases, *SUITE.growth)]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize("forces", FORCES)
@pytest.mark.parametrize("system", SYSTEMS)
def test_outputs_of_model_and_plain_layout_agree(system: str, forces: str) -> None:
    case = inference("escaip_mini", system, SYSTEMS[system], forces=forces, num_layers=2)
    job = case.build(CPU)
    ours = job.ours_result()
    count = len(SYSTEMS[system]())
    stress = 9 if forces == "conservative" and system != "molecule" else 0
    assert ours.shape == (1 + 3 * count + stress,)
    assert relative_difference(ours, job.peer_result()) < case.tolerance


@pytest.mark.parametrize("forces", FORCES)
def test_batches_of_molecules_and_crystals_agree(forces: str) -> None:
    structures = Structures.from_ase([molecule(), crystal("Cu", 4), crystal("Si", 8)])
    model = potential("escaip_mini", CPU, forces=forces, stress=forces == "conservative", num_layers=2)
    ours, peer = (run() for _, run in contestants(model, structures))
    for name, output in ours.items():
        known = output.isfinite()
        assert known[1:].all()
        assert relative_difference(output[known], peer[name][known]) < 1e-4, name


@pytest.mark.parametrize(
    "options",
    [
        {"num_layers": 1},
        {"frequency_list": (0, 8, 4, 4)},
        {"knn_k": 4, "cutoff": 4.0},
        {"ffn_multiplier": 3, "readout_multiplier": 3, "output_multiplier": 3},
        {"hidden_size": 32, "num_heads": 2, "edge_distance_expansion_size": 16},
    ],
    ids=str,
)
@pytest.mark.parametrize("forces", FORCES)
def test_other_sizes_agree(forces: str, options: dict[str, Any]) -> None:
    case = inference(
        "escaip_mini", "Si", lambda: crystal("Si", 8), forces=forces, **{"num_layers": 2} | options
    )
    job = case.build(CPU)
    assert relative_difference(job.ours_result(), job.peer_result()) < case.tolerance


@pytest.mark.parametrize("forces", FORCES)
def test_training_steps_of_model_and_plain_layout_agree(forces: str) -> None:
    case = training("escaip_mini", 2, forces=forces, num_layers=2)
    job = case.build(CPU)
    assert relative_difference(job.ours_result(), job.peer_result()) < case.tolerance


def test_other_weights_are_told_apart() -> None:
    structures = Structures.from_ase([crystal("Si", 8)])
    (model, ours), (peer, theirs) = contestants(potential("escaip_mini", CPU, num_layers=1), structures)
    with torch.no_grad():
        next(iter(peer.parameters())).mul_(1.5)
    assert type(peer) is not type(model)
    assert relative_difference(ours()["forces"], theirs()["forces"]) > 1e-4


def test_crystals_are_whole_cubes() -> None:
    assert [len(crystal("Si", count)) for count in ATOMS[:2]] == list(ATOMS[:2])
    assert len(molecule()) == 15
    with pytest.raises(ValueError, match=r"4 n\^3 atoms, not 100"):
        crystal("Cu", 100)


def test_cost_over_atoms_is_a_call() -> None:
    outputs = growth("escaip_mini", "conservative").build(8, CPU)()
    assert isinstance(outputs, dict)
    assert outputs["forces"].shape == (8, 3)
