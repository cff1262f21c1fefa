"""Tensors out of any weight file of the field, without running anything a file may carry."""

from __future__ import annotations

import argparse
import importlib
import json
import pickle
import re
import struct
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from zoo.errors import CheckpointError, did_you_mean
from zoo.weights import tf_checkpoint

WRAPPERS = ("state_dict", "model_state_dict", "model", "params_ema", "params")
"""Keys under which training programs store the state dict beside the optimiser and the epoch; of averaged and
plain weights (BasicSR) the averaged ones are read."""
PREFIXES = ("module.", "_orig_mod.")
"""What DistributedDataParallel and torch.compile put before every name."""

FAIRCHEM = "fairchem.core.units.mlip_unit.api.inference.MLIPInferenceCheckpoint"
HISTORY = "mmengine.logging.history_buffer.HistoryBuffer"
RUNNER = "domains.detection.weights.runner"
PICKLED = {FAIRCHEM: "domains.atoms.weights.pickled:read", HISTORY: f"{RUNNER}:read"}
"""Classes of which programs pickle an object into their checkpoint, and what reads it: imported on use."""
TOLD = "built_from"
"""The tensor in which a model of ours, trained by the runner of mmengine, tells how it is built."""
LONGEST_HEADER = 100_000_000
"""Bytes of JSON that safetensors allows at the front of a file."""


def read_tensors(path: str | Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and text metadata of a weight file; the format is told by its content, not its suffix.

    The metadata `official` are the options of an official program, as JSON, where its file tells them;
    `classes` the names of classes, as JSON, that programs on mmengine write beside the weights.

    Reads safetensors, PyTorch files (with `weights_only=True`), `.npz`, and TensorFlow V2 checkpoints by
    their prefix or either of their files.

    Raises:
        CheckpointError: the file is missing, truncated, of no known format, or would execute code.
    """
    path = Path(path)
    prefix = tf_checkpoint.find_prefix(path)
    if prefix is not None:
        return tf_checkpoint.read(prefix), {}
    _check_exists(path)
    with open(path, "rb") as file:
        head = file.read(512)
    reject_stand_in(head, path)
    if head[:4] == b"PK\x03\x04":
        return _read_zip(path)
    if head[8:9] == b"{" and int.from_bytes(head[:8], "little") <= LONGEST_HEADER:
        return _read_safetensors(path)
    if head[:1] == b"\x80":
        return _read_torch(path)
    raise CheckpointError(
        f"{path} is no weight file: neither safetensors, a PyTorch file, .npz nor a TensorFlow checkpoint."
    )


def reject_stand_in(head: bytes, path: str | Path) -> None:
    """Refuse what often lies in place of a weight file: nothing, a Git LFS pointer, a web page."""
    text = head.lstrip().lower()
    if not head:
        raise CheckpointError(f"{path} is empty; fetch it again.")
    if text.startswith(b"version https://git-lfs"):
        raise CheckpointError(
            f"{path} is a Git LFS pointer, not the file itself: run `git lfs pull` or download the file."
        )
    if text.startswith((b"<!doctype html", b"<html")):
        raise CheckpointError(
            f"{path} is a web page, not a weight file: the link led to a log-in or preview page. "
            "Download the file itself."
        )


def _check_exists(path: Path) -> None:
    if path.is_dir():
        raise CheckpointError(f"{path} is a folder; name a weight file in it.")
    if not path.is_file():
        siblings = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
        raise CheckpointError(f"There is no file {path}.{did_you_mean(path.name, siblings)}")


# ---- safetensors -------------------------------------------------------------------------------------------


def _read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            names = file.keys()
            return {name: file.get_tensor(name) for name in names}, file.metadata() or {}
    except SafetensorError as error:
        raise CheckpointError(
            f"{path} is not a whole safetensors file: {_size_problem(path) or error}."
        ) from None


def _size_problem(path: Path) -> str:
    """`it has 100 bytes of 400`, when the header can be read and says so."""
    size = path.stat().st_size
    with open(path, "rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        try:
            header = json.loads(file.read(length)) if 8 + length <= size else {}
        except ValueError:
            return ""
    ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
    needed = 8 + length + max(ends, default=0)
    return f"it has {size} bytes of {needed}; it was cut off, fetch it again" if size < needed else ""


# ---- PyTorch and NumPy -------------------------------------------------------------------------------------


def _read_zip(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except zipfile.BadZipFile:
        raise CheckpointError(
            f"{path} is truncated or damaged (its zip directory is missing); fetch it again."
        ) from None
    return (_read_npz(path), {}) if any(name.endswith(".npy") for name in names) else _read_torch(path)


def _read_npz(path: Path) -> dict[str, Tensor]:
    tensors = {}
    with np.load(path, allow_pickle=False) as archive:
        for name in archive.files:
            try:
                tensors[name] = torch.from_numpy(archive[name])
            except (ValueError, TypeError, zipfile.BadZipFile) as error:
                raise CheckpointError(f"{path}: array {name!r} cannot be used ({error}).") from None
    return tensors


def _read_torch(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    try:
        return unwrapped(load_torch(path), path)
    except NamedObject as error:
        if error.name not in PICKLED:
            raise
        module, _, function = PICKLED[error.name].partition(":")
        return getattr(importlib.import_module(module), function)(path)


class NamedObject(CheckpointError):
    """A pickle names a class or function that is not built."""

    def __init__(self, path: Path, name: str) -> None:
        super().__init__(
            f"{path} would run code on loading (its pickle names {name}) and was not opened. If it is a "
            "whole model, load it where its program is installed and save the state dict: "
            "torch.save(model.state_dict(), 'weights.pth')."
        )
        self.name = name


def load_torch(path: Path, stand_ins: Mapping[str, Any] | None = None) -> Any:
    """The content of a PyTorch file of tensors and plain values, on the CPU.

    Args:
        stand_ins: what to build in the place of classes and functions that the file names, by their full
            names, e.g. `{"program.config.Options": MyRecord}`. Nothing of these names is imported.

    Raises:
        CheckpointError: the file is damaged, or names anything else.
    """
    plain = [(stand_in, name) for name, stand_in in (stand_ins or {}).items()]
    try:
        # Training programs keep their options in a Namespace.
        with torch.serialization.safe_globals([argparse.Namespace, *plain]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise _refusal(path, str(error)) from None
    except (RuntimeError, EOFError, ValueError, KeyError) as error:
        reason = next(iter(str(error).splitlines()), "it ends early")
        raise CheckpointError(f"{path} is truncated, damaged or no PyTorch state dict: {reason}") from None


def _refusal(path: Path, message: str) -> CheckpointError:
    found = re.search(r"GLOBAL (\S+) (?:was not an allowed global|whose module)", message)
    if found is not None:
        return NamedObject(path, found[1])
    return CheckpointError(
        f"{path} is damaged, or a pickle that is not made of tensors only; it was not opened."
    )


def unwrapped(content: Any, path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata, as of `read_tensors`, of what a training program saved.

    Raises:
        CheckpointError: there is no state dict in it.
    """
    meta = content.get("meta") if isinstance(content, dict) else None
    told = meta.get("dataset_meta", meta) if isinstance(meta, dict) else {}
    classes = (told.get("classes") or told.get("CLASSES")) if isinstance(told, dict) else None
    state = _state_dict(content, path)
    if TOLD in state:
        return importlib.import_module(RUNNER).told(state, classes)
    return state, {"classes": json.dumps(list(classes))} if classes else {}


def _state_dict(content: Any, path: Path) -> dict[str, Tensor]:
    """The dict of tensors inside what a training program saved."""
    for key in WRAPPERS:
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
    if not isinstance(content, dict) or not content:
        raise CheckpointError(
            f"{path} holds a {type(content).__name__}, not a state dict (names to tensors)."
        )
    other = [str(key) for key, value in content.items() if not isinstance(value, Tensor)]
    if other:
        raise CheckpointError(
            f"{path} holds no plain state dict: {', '.join(sorted(other)[:5])} are not tensors. "
            f"Known wrappers: {', '.join(WRAPPERS)}."
        )
    for prefix in PREFIXES:
        if all(name.startswith(prefix) for name in content):
            content = {name.removeprefix(prefix): value for name, value in content.items()}
    return content
