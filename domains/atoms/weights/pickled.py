"""Checkpoints of fairchem (`.pt`): a pickled dataclass with weights and configs, read without fairchem.

The classes that such a file names become plain containers; what its configs would have built is never built.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.errors import CheckpointError
from zoo.weights.formats import FAIRCHEM, load_torch

PARTS = ("model_config", "model_state_dict", "ema_state_dict", "tasks_config")
COUNTER = "n_averaged"
"""What an average of weights keeps beside them: how many it is of."""
SCALE = "scale."
"""Prefix of the names that units of the outputs are given."""
KINDS = {"energy": "energy", "forces": "force", "stress": "stress"}


class Record:
    """Keeps the attributes an object was pickled with."""

    state: dict[str, Any]

    def __new__(cls, *_: Any) -> Record:
        record = super().__new__(cls)
        record.state = {}
        return record

    def __setstate__(self, state: Any) -> None:
        self.state.update(state if isinstance(state, dict) else {})


class CheckpointRecord(Record):
    """Stands for fairchem's dataclass."""


class NumberType:
    """Stands for a numpy dtype."""

    def __new__(cls, name: Any, *_: Any) -> NumberType:
        number_type = super().__new__(cls)
        number_type.name = name.decode() if isinstance(name, bytes) else str(name)
        return number_type

    name: str

    def __setstate__(self, state: Any) -> None:
        """Byte order and alignment, which a single number has no use for."""


def _number(number_type: NumberType, content: bytes) -> Any:
    """What `numpy.core.multiarray.scalar` gives, as a plain number."""
    return np.frombuffer(content, np.dtype(number_type.name))[0].item()


def _mapping(*_: Any) -> dict:
    """Stands for `collections.defaultdict`, whose default is never asked for."""
    return {}


def _named(name: str) -> Callable[..., None]:
    """Stands for a type that is only mentioned."""

    def refuse(*_: Any) -> None:
        raise ValueError(f"it makes an object of {name}")

    return refuse


NODES = ("nodes." + kind for kind in ("AnyNode", "StringNode", "IntegerNode", "FloatNode", "BooleanNode"))
STAND_INS: dict[str, Any] = {
    FAIRCHEM: CheckpointRecord,
    **dict.fromkeys((f"omegaconf.{name}" for name in (*NODES, "dictconfig.DictConfig")), Record),
    **dict.fromkeys(("omegaconf.listconfig.ListConfig", "omegaconf.base.Metadata"), Record),
    "omegaconf.base.ContainerMetadata": Record,
    "collections.defaultdict": _mapping,
    "numpy.dtype": NumberType,
    "numpy.core.multiarray.scalar": _number,
    "numpy._core.multiarray.scalar": _number,
    **{name: _named(name) for name in ("typing.Any", "builtins.dict", "builtins.list", "builtins.str")},
    **{f"builtins.{name}": _named(name) for name in ("int", "float", "bool")},
}
"""Everything that a file may name beside tensors."""


def read(path: str | Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The weights that inference uses, and the options of the backbone as the metadata `official`.

    These are the averaged weights, or the last ones where there is no average. Normalisers and element
    references of the tasks lie beside them under the names of `Scale`'s buffers, as `scale.energy_rmsd`.

    Raises:
        CheckpointError: the file names anything else than such a file needs (the message says what), lacks
            one of its parts, or is damaged.
    """
    record = load_torch(Path(path), STAND_INS)
    if not isinstance(record, CheckpointRecord):
        raise CheckpointError(f"{path} holds a {type(record).__name__}, not fairchem's inference checkpoint.")
    missing = [name for name in PARTS if name not in record.state]
    if missing:
        raise CheckpointError(f"{path} is no whole inference checkpoint: it lacks {', '.join(missing)}.")
    config, last, averaged, tasks = (_plain(record.state[name]) for name in PARTS)
    weights = _tensors(averaged, path) or _tensors(last, path)
    if not weights:
        raise CheckpointError(f"{path} holds no weights: ema_state_dict and model_state_dict are empty.")
    tasks = list(tasks.values() if isinstance(tasks, dict) else tasks or [])
    options = (config or {}).get("backbone", {})
    units = {f"{SCALE}{name}": value for name, value in scale_of(tasks, path).items()}
    return weights | units, {"official": json.dumps(options, default=str)}


def _tensors(state: Any, path: str | Path) -> dict[str, Tensor]:
    """A state dict under the names of the model alone."""
    weights = {}
    for name, value in (state or {}).items():
        if name == COUNTER:
            continue
        if not isinstance(value, Tensor):
            raise CheckpointError(f"{path}: {name} is a {type(value).__name__}, not a tensor.")
        while name.startswith("module."):
            name = name.removeprefix("module.")
        weights[name] = value.detach()
    return weights


def _plain(value: Any) -> Any:
    """Dicts, lists and values in the place of OmegaConf's nodes."""
    if isinstance(value, Record):
        state = value.state
        return _plain(state.get("_content", state.get("_val")))
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value


# ---- units of the outputs ----------------------------------------------------------------------------------


def scale_of(tasks: list[dict[str, Any]], path: str | Path) -> dict[str, Tensor]:
    """Normalisers and element references of tasks under the names of `Scale`'s buffers, float64.

    Raises:
        CheckpointError: tasks of several data sets, which have units of their own; a mean force.
    """
    datasets = {name for task in tasks for name in task.get("datasets") or ()}
    if len(datasets) > 1:
        raise CheckpointError(
            f"{path} serves several data sets ({', '.join(sorted(datasets))}) with units of their own; a "
            "model here has those of one."
        )
    found: dict[str, Tensor] = {}
    for task in tasks:
        kind = KINDS.get(str(task.get("property")))
        if kind is None:
            continue
        normaliser = task.get("normalizer") or {}
        found[f"{kind}_rmsd"] = _double(normaliser.get("rmsd", 1.0))
        mean = _double(normaliser.get("mean", 0.0))
        if kind == "energy":
            found |= {"energy_mean": mean} | _references(task.get("element_references"))
        elif float(mean) != 0:
            raise CheckpointError(f"{path}: the mean of {task['property']} is {float(mean)}, not 0.")
    return found


def _references(config: Any) -> dict[str, Tensor]:
    """The energies of a config `{element_references: values or {_target_: ..., _args_: [values]}}`."""
    values = config.get("element_references") if isinstance(config, dict) else config
    if isinstance(values, dict):
        (values,) = values.get("_args_") or [None]
    return {} if values is None else {"element_references": _double(values).flatten()}


def _double(value: Any) -> Tensor:
    return torch.as_tensor(value, dtype=torch.float64).detach().clone()


def fitted_scale(state: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """The buffers of a potential's `scale`: those of the file where it has them, else those of the model.

    References of elements that the model has no embedding of are dropped; those of elements that the file
    does not know are 0.
    """
    own = {name: value for name, value in model.state_dict().items() if name.startswith(SCALE)}
    given = {name: value for name, value in state.items() if name in own}
    name = f"{SCALE}element_references"
    if name in given:
        rows = len(own[name])
        given[name] = F.pad(given[name][:rows], (0, max(0, rows - len(given[name]))))
    return own | given
