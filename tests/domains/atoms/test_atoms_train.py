"""`zoo train`, `evaluate` and `finetune` of potentials, end to end on tiny files."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
import torch
from ase import Atoms
from ase.calculators.singlepoint import SinglePointCalculator
from atoms_small import TINY_MODEL, cluster, mixed_file, save
from command_line import QUIET, zoo

from domains.atoms.data import AtomsData
from domains.atoms.sources import read_frames
from domains.atoms.structures import Structures
from zoo.errors import CheckpointError, ConfigError, DataError
from zoo.training.checkpoint_io import AtomicCheckpointIO
from zoo.weights.checkpoint import load_model

SHORT = (
    *TINY_MODEL,
    *QUIET,
    "data.max_atoms=16",
    "trainer.max_epochs=2",
    "schedule.name=constant",
    "schedule.warmup_epochs=0",
)


def train(path: Path, run: Path, *more: str) -> str:
    return zoo("train", "domain=atoms", "data=extxyz", f"data.path={path}", *SHORT, f"run_dir={run}", *more)


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_model(run / "model.safetensors")[0].state_dict()


def last(run: Path) -> dict[str, torch.Tensor]:
    """The averaged weights at the end of a run."""
    return AtomicCheckpointIO().load_checkpoint(run / "checkpoints" / "last.ckpt")["state_dict"]


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return mixed_file(tmp_path_factory.mktemp("data") / "a.extxyz", 20)


@pytest.fixture(scope="module")
def trained(file: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    run = tmp_path_factory.mktemp("runs") / "run"
    return run, train(file, run)


@pytest.fixture(scope="module")
def direct(file: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    run = tmp_path_factory.mktemp("runs") / "direct"
    return run, train(file, run, "model.forces=direct", "data.rotate=true")


# ---- train and evaluate ------------------------------------------------------------------------------------


def test_a_run_prints_and_keeps_what_it_reached(trained: tuple[Path, str]) -> None:
    run, printed = trained
    results = json.loads((run / "results.json").read_text())
    assert results["forces"] == "conservative"
    assert results["frames"] == {"train": 16, "val": 2, "test": 2}
    assert f"MAE {1e3 * results['mean']['force_mae']:.1f} meV/Å" in printed
    assert f"({1e3 * results['baseline']['force_mae']:.1f})" in printed
    assert "equivariant." in printed
    for name in ("parity.png", "training.png"):
        assert (run / "plots" / name).stat().st_size > 5000
    rows = list(csv.DictReader((run / "metrics.csv").open()))
    assert {"train/loss", "val/force_mae", "val/energy_per_atom_mae"} <= set(rows[0])


def test_stress_is_learnt_where_frames_have_it(trained: tuple[Path, str], direct: tuple[Path, str]) -> None:
    model, facts = load_model(trained[0] / "model.safetensors")
    assert model.stress is True
    assert set(facts["mean_energies"]) == {"Cu", "Ag"}
    assert load_model(direct[0] / "model.safetensors")[0].stress is False


def test_stored_weights_predict_in_electronvolts(trained: tuple[Path, str]) -> None:
    """Evaluated again outside of training: the same error as in the results."""
    run, _ = trained
    results = json.loads((run / "results.json").read_text())
    printed = zoo("evaluate", f"run={run}", *QUIET[1:2], f"output={run / 'again'}", "plots=false")
    again = json.loads((run / "again" / "results.json").read_text())
    assert again["mean"] == pytest.approx(results["mean"], rel=1e-5)
    assert again["baseline"] == pytest.approx(results["baseline"])
    assert "MAE" in printed


def test_other_files_are_evaluated_by_group(trained: tuple[Path, str], tmp_path: Path) -> None:
    run, _ = trained
    scan = [cluster(i) for i in range(4)]
    for atoms in scan:
        atoms.info["config_type"] = "scan"
        del atoms.calc.results["forces"]
    other = (mixed_file(tmp_path / "b.extxyz", 6), save(tmp_path / "scan.extxyz", scan))
    tested = f"data.test=[{other[0]},{other[1]}]"
    printed = zoo("evaluate", f"run={run}", "data=extxyz", tested, f"output={tmp_path / 'out'}")
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert list(results["groups"]) == ["cluster", "crystal", "scan"]
    assert results["groups"]["scan"]["frames"] == 4
    assert "force_mae" not in results["groups"]["scan"]
    assert "scan" in printed
    assert (tmp_path / "out" / "plots" / "parity.png").is_file()


def test_unknown_elements_are_refused(trained: tuple[Path, str], tmp_path: Path) -> None:
    gold = Atoms("Au2", [[0, 0, 0], [2.5, 0, 0]])
    gold.calc = SinglePointCalculator(gold, energy=0.0, forces=[[0, 0, 0]] * 2)
    path = save(tmp_path / "gold.extxyz", [gold])
    with pytest.raises(CheckpointError, match=r"trained on .*; the data also have Au"):
        zoo("evaluate", f"run={trained[0]}", "data=extxyz", f"data.path={path}")


def test_training_is_seeded_and_resumes_to_the_same_weights(
    trained: tuple[Path, str], file: Path, tmp_path: Path
) -> None:
    train(file, tmp_path / "run", "trainer.max_epochs=1")
    zoo("train", f"resume={tmp_path / 'run'}", "trainer.max_epochs=2")
    whole, resumed = (last(run) | weights(run) for run in (trained[0], tmp_path / "run"))
    assert len(whole) > 20
    for name, value in whole.items():
        assert torch.equal(value, resumed[name]), name


def test_a_model_of_energies_alone(file: Path, tmp_path: Path) -> None:
    printed = train(file, tmp_path / "run", "model.forces=null", "trainer.max_epochs=1")
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert "force_mae" not in results["mean"]
    assert "Energy: MAE" in printed
    assert "Forces: MAE" not in printed


def test_a_direct_model_is_said_not_to_be_equivariant(direct: tuple[Path, str]) -> None:
    results = json.loads((direct[0] / "results.json").read_text())
    assert results["rotation"]["force_relative"] > 1e-3
    assert results["rotation"]["energy_per_atom"] < 1e-4
    assert "not equivariant, see data.rotate" in direct[1]


def test_the_embedded_alloys_train(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ZOO_CACHE", str(tmp_path / "cache"))
    few = ("data.frames=20", "data.max_atoms=64", "trainer.max_epochs=1")
    zoo("train", "domain=atoms", *SHORT, *few, f"run_dir={tmp_path / 'run'}", "plots=false")
    assert json.loads((tmp_path / "run" / "results.json").read_text())["data"] == "emt"
    assert list((tmp_path / "cache" / "atoms").glob("emt-20-0-*.extxyz"))
    (made,) = AtomsData.make(tmp_path / "made", frames=5)
    assert len(read_frames(made)) == 5


# ---- finetune ----------------------------------------------------------------------------------------------


def test_direct_forces_become_conservative(direct: tuple[Path, str], file: Path, tmp_path: Path) -> None:
    """The energy head is kept and with it the energies; the head of forces is dropped, and it is said."""
    run = tmp_path / "run"
    printed = zoo(
        "finetune",
        "domain=atoms",
        f"checkpoint={direct[0]}",
        "data=extxyz",
        f"data.path={file}",
        "model.forces=conservative",
        "model.stress=true",
        "data.max_atoms=16",
        "trainer.max_epochs=1",
        *QUIET,
        f"run_dir={run}",
    )
    assert "Forces: direct before, conservative now. Dropped: " in printed
    assert "edge_readout, force_head. New: nothing." in printed
    model, _ = load_model(run / "model.safetensors")
    before, _ = load_model(direct[0] / "model.safetensors")
    assert (model.forces, model.stress) == ("conservative", True)
    assert torch.equal(model.scale.element_references, before.scale.element_references)
    assert torch.equal(model.scale.force_rmsd, before.scale.energy_rmsd)
    assert "force_mae" in json.loads((run / "results.json").read_text())["mean"]
    zoo("train", f"resume={run}", "trainer.max_epochs=2")
    assert len((run / "metrics.csv").read_text().splitlines()) == 3


@pytest.mark.parametrize("method", ["head", "probe"])
def test_heads_alone_are_trained_on_frozen_blocks(
    direct: tuple[Path, str], file: Path, tmp_path: Path, method: str
) -> None:
    run = tmp_path / "run"
    options = ("data.max_atoms=16", "trainer.max_epochs=1", *QUIET, f"run_dir={run}", f"method={method}")
    zoo("finetune", "domain=atoms", f"checkpoint={direct[0]}", "data=extxyz", f"data.path={file}", *options)
    old, new = weights(direct[0]), weights(run)
    changed = {name.split(".")[1] for name in new if not torch.equal(old[name], new[name])}
    heads = {"node_readout", "edge_readout", "energy_norm", "energy_head", "force_head"}
    assert {"energy_head", "force_head"} <= changed - {"energy_rmsd", "force_rmsd"} <= heads


def test_transferred_weights_are_those_of_the_checkpoint(direct: tuple[Path, str]) -> None:
    from domains.atoms.transfer import transfer

    path = direct[0] / "model.safetensors"
    before, after = load_model(path)[0], transfer(path, {"forces": "conservative"})
    own, state = before.state_dict(), after.state_dict()
    shared = [name for name in state if name in own and not name.startswith("scale.")]
    assert len(shared) > 20
    for name in shared:
        assert torch.equal(state[name], own[name]), name
    assert any("force_head" in name for name in own.keys() - state.keys())
    structures = Structures.from_ase([cluster(0)])
    found = after.evaluate(structures)
    assert found["forces"].isfinite().all()


def test_references_are_kept_or_fitted_anew(trained: tuple[Path, str], tmp_path: Path) -> None:
    shifted = [cluster(i) for i in range(12)]
    for atoms in shifted:
        atoms.calc.results["energy"] -= 7.0 * len(atoms)
    path = save(tmp_path / "shifted.extxyz", shifted)
    before = weights(trained[0])["scale.element_references"]
    given = ("finetune", "domain=atoms", f"checkpoint={trained[0]}", "data=extxyz", f"data.path={path}")
    short = ("trainer.max_epochs=1", "data.max_atoms=16", "plots=false", *QUIET)
    zoo(*given, *short, f"run_dir={tmp_path / 'kept'}")
    assert torch.equal(weights(tmp_path / "kept")["scale.element_references"], before)
    zoo(*given, *short, "data.E0s=least_squares", f"run_dir={tmp_path / 'fitted'}")
    fitted = weights(tmp_path / "fitted")["scale.element_references"]
    assert float(fitted[29] - before[29]) == pytest.approx(-7.0, abs=1.0)


@pytest.mark.parametrize(
    ("override", "error", "message"),
    [
        (
            "model.hidden_size=16",
            ConfigError,
            "leave out model.hidden_size=16. Of its arguments, forces, stress",
        ),
        ("model.forces=conservativ", ConfigError, "forces are 'direct', 'conservative' or None"),
        ("data.path=gold.extxyz", DataError, "for which there is no reference energy in the checkpoint"),
    ],
)
def test_what_cannot_be_finetuned(
    override: str,
    error: type[Exception],
    message: str,
    trained: tuple[Path, str],
    file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    gold = []
    for i in range(10):
        atoms = Atoms("Au2", [[0, 0, 0], [2.5 + 0.01 * i, 0, 0]])
        atoms.calc = SinglePointCalculator(atoms, energy=0.1 * i, forces=[[0, 0, 1.0]] * 2)
        gold.append(atoms)
    save(tmp_path / "gold.extxyz", gold)
    given = [] if override.startswith("data.path") else [f"data.path={file}"]
    with pytest.raises(error, match=message):
        zoo("finetune", "domain=atoms", f"checkpoint={trained[0]}", "data=extxyz", *given, *QUIET, override)


# ---- what cannot be trained --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["model.forces=direct", "model.stress=true"], "stress=True needs forces='conservative'"),
        (["data.E0s={Cu: 0.1}"], "has Ag, for which there is no reference energy in data.E0s"),
        (["compile=true"], "compile=true: training conservative forces differentiates twice"),
        (["loss.reduction=sum"], "loss.reduction=sum is not one of"),
        (["loss.name=l1"], "There is no loss.name=l1 for atoms"),
        (["data.units.energy=Hartree"], "data.units.energy=Hartree: write one of"),
        (["data.keys.energy=u0"], r"has no 'u0' \(data.keys.energy\)"),
    ],
)
def test_mistakes_are_found_before_training(
    overrides: list[str], message: str, file: Path, tmp_path: Path
) -> None:
    with pytest.raises((ConfigError, DataError), match=message):
        train(file, tmp_path / "run", *overrides)
    assert not (tmp_path / "run" / "checkpoints").exists()
