"""Starting a potential from the weights of another, also with forces of the other kind."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, cast

import torch

from domains.atoms.models.potential import Potential
from zoo.cli.console import console
from zoo.create import create_model
from zoo.errors import CheckpointError
from zoo.weights.checkpoint import check_fit, load_state, read_checkpoint


def transfer(path: Path, changes: Mapping[str, Any]) -> Potential:
    """The model of a checkpoint; with `changes`, such as `forces: conservative`, what both have in common.

    Published recipes train direct forces first, then drop their head and go on with derivatives of the
    energy. The energy head is kept, and with it its unit, which forces and stress then share. Says what was
    loaded, what was dropped, and what starts anew.

    Args:
        path: a checkpoint of ours, with its config.
        changes: constructor arguments that differ.

    Raises:
        CheckpointError: the file does not fit its own config.
        ConfigError: the model cannot be built with these.
    """
    state, meta = read_checkpoint(path)
    built = meta["model"]
    name = f"{built['domain']}/{built['name']}"
    with torch.device("meta"):
        old = create_model(name, **built["config"])
    check_fit(state, old.state_dict(), source=str(path), target=f"model {built['name']!r}")
    model = cast(Potential, create_model(name, **(built["config"] | dict(changes))))
    own = model.state_dict()
    differing = [
        key for key in state.keys() | own.keys() if key not in own or _shape(state, key) != own[key].shape
    ]
    report = load_state(model, state, skip=differing, source=str(path))
    if not any(key.startswith("network.") for key in report.loaded):
        raise CheckpointError(f"{path} shares no tensor with the model asked for.")
    before = cast(Potential, old).forces
    if model.forces != before:
        dropped, fresh = (", ".join(_modules(names)) for names in (report.skipped, report.initial))
        console.print(
            f"Forces: {before} before, {model.forces} now. Dropped: {dropped or 'nothing'}. "
            f"New: {fresh or 'nothing'}.",
            highlight=False,
            soft_wrap=True,
        )
    if model.forces == "conservative" and before != "conservative":
        for rmsd in (model.scale.force_rmsd, model.scale.stress_rmsd):
            rmsd.copy_(model.scale.energy_rmsd)
    console.print(report)
    return model


def _modules(names: Iterable[str]) -> list[str]:
    """`network.force_head` of the tensors in it, blocks by number: the modules that tensors belong to."""
    parts = (name.split(".") for name in names)
    return sorted({".".join(part[1 : 4 if part[1] == "blocks" else 2]) for part in parts if len(part) > 2})


def _shape(state: Mapping[str, torch.Tensor], key: str) -> torch.Size | None:
    return state[key].shape if key in state else None
