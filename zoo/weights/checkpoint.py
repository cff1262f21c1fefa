"""Checkpoints of this zoo: safetensors that carry the config of their model, enough to rebuild it."""

from __future__ import annotations

import fnmatch
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import safetensors.torch
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from zoo.errors import CheckpointError
from zoo.files import atomic_write
from zoo.weights.formats import read_tensors

if TYPE_CHECKING:
    from rich.table import Table

FORMAT = 1
"""Version of the metadata layout; a reader refuses a newer one."""


# ---- files -------------------------------------------------------------------------------------------------


def save_model(model: nn.Module, path: str | Path, *, extra: Mapping[str, Any] | None = None) -> None:
    """Write weights, config and `extra` to one safetensors file; whole or not at all.

    Args:
        model: built by `zoo.create_model`, whose config is stored with it.
        path: the file to write; an older one is replaced only once the new one is complete.
        extra: JSON-able facts the weights depend on, e.g. sensor ids, mean and standard deviation.

    Raises:
        CheckpointError: the model carries no config, or `extra` cannot be stored.
        ZooError: the file cannot be written (e.g. the disk is full); an older one is left as it was.
    """
    built = getattr(model, "zoo_config", None)
    if built is None:
        raise CheckpointError(
            f"This {type(model).__name__} was not built by zoo.create_model: its config is unknown."
        )
    try:
        meta = json.dumps({"format": FORMAT, "model": built, "extra": dict(extra or {})})
    except TypeError as error:
        raise CheckpointError(
            f"{path}: extra can hold numbers, strings, lists and dicts only ({error})."
        ) from None
    save_tensors(model.state_dict(), path, {"zoo": meta})


def save_tensors(
    tensors: Mapping[str, Tensor], path: str | Path, metadata: dict[str, str] | None = None
) -> None:
    """Write named tensors to a safetensors file; whole or not at all. Shared memory is written twice."""
    own = {name: value.detach().to("cpu", copy=True).contiguous() for name, value in tensors.items()}
    content = safetensors.torch.save(own, metadata)
    with atomic_write(path) as file:
        file.write(content)


def save_state_dict(
    tensors: Mapping[str, Tensor],
    path: str | Path,
    wrapper: str | None = None,
    *,
    beside: Mapping[str, Any] | None = None,
) -> None:
    """Write named tensors for another program: `.safetensors`, `.npz`, `.pth` or `.pt`; whole or not at all.

    Args:
        wrapper: key under which a PyTorch file holds them; None: it holds nothing else.
        beside: what a PyTorch file holds under other keys.

    Raises:
        CheckpointError: another suffix, or one of a file that cannot hold what is beside the tensors.
        ZooError: the file cannot be written.
    """
    suffix = Path(path).suffix
    if beside and suffix not in (".pth", ".pt"):
        raise CheckpointError(f"{path}: the file also holds {', '.join(beside)}, as only .pth and .pt can.")
    if suffix == ".safetensors":
        save_tensors(tensors, path)
    elif suffix == ".npz":
        with atomic_write(path) as file:
            arrays: dict[str, Any] = {name: value.detach().cpu().numpy() for name, value in tensors.items()}
            np.savez(file, **arrays)
    elif suffix in (".pth", ".pt"):
        plain: dict[str, Any] = {name: value.detach().cpu().clone() for name, value in tensors.items()}
        with atomic_write(path) as file:
            torch.save({**(beside or {}), wrapper: plain} if wrapper else plain, file)
    else:
        raise CheckpointError(
            f"{path}: cannot write {suffix or 'a file without suffix'}; use .safetensors, .npz or .pth."
        )


def load_model(path: str | Path) -> tuple[nn.Module, dict[str, Any]]:
    """Rebuild a model from a checkpoint of ours.

    Returns:
        The model in eval mode (call `.train()` to train it further), and the `extra` it was saved with.

    Raises:
        CheckpointError: the file cannot be read, carries no config, or does not fit the model it names.
    """
    from zoo.create import create_model

    state, meta = read_checkpoint(path)
    if not meta:
        raise CheckpointError(
            f"{path} holds tensors without a model config. Name the model: "
            "zoo.create_model(NAME, checkpoint_path=FILE), or if official, zoo.from_official(NAME, FILE)."
        )
    built = meta["model"]
    model = create_model(f"{built['domain']}/{built['name']}", **built["config"])
    load_state(model, state, source=str(path))
    return model.eval(), meta["extra"]


def read_checkpoint(path: str | Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and metadata `{format, model: {name, domain, config}, extra}` of a checkpoint of ours.

    The metadata are empty for any other weight file.

    Raises:
        CheckpointError: the file cannot be read, or was written by a newer version of the zoo.
    """
    state, metadata = read_tensors(path)
    return state, told_by(metadata, path)


def told_by(metadata: Mapping[str, str], path: str | Path) -> dict[str, Any]:
    """`read_checkpoint`'s metadata from the text that a file carries."""
    meta = json.loads(metadata.get("zoo", "{}"))
    if meta.get("format", FORMAT) > FORMAT:
        raise CheckpointError(
            f"{path} was written by a newer attention-zoo (format {meta['format']}); upgrade to read it."
        )
    return meta


def read_state_dict(path: str | Path) -> dict[str, Tensor]:
    """Tensors by name from a `.safetensors`, `.pth`, `.pt`, `.ckpt`, `.npz` file or a TensorFlow V2 prefix.

    Raises:
        CheckpointError: the file is missing, truncated, of no known format, or would execute code.
    """
    return read_tensors(path)[0]


# ---- loading -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LoadReport:
    """What loading did with every tensor, by name; prints as a rich table."""

    loaded: tuple[str, ...]
    skipped: tuple[str, ...]
    """In the file, not used."""
    resized: tuple[str, ...]
    initial: tuple[str, ...]
    """In the model, left at init."""

    def __rich__(self) -> Table:
        from rich.table import Table

        table = Table("weights", "tensors", "names", title="Loaded weights")
        rows = {
            "loaded": self.loaded,
            "resized": self.resized,
            "skipped": self.skipped,
            "left at init": self.initial,
        }
        for label, names in rows.items():
            table.add_row(label, str(len(names)), "" if label == "loaded" else summarise(names))
        return table


def load_state(
    model: nn.Module,
    state_dict: Mapping[str, Tensor],
    strict: bool = True,
    resize: Iterable[str] = (),
    skip: Iterable[str] = (),
    *,
    source: str = "The checkpoint",
) -> LoadReport:
    """Copy tensors into a model and say what became of each.

    Args:
        strict: every tensor must match in name and shape, save those named by `resize` and `skip`; without it
            the others are left out and reported.
        resize: globs of names whose tensor is interpolated to the model's shape where the two differ, e.g. a
            position table for another length.
        skip: globs of names that stay at init, e.g. a head for other classes.
        source: what to call the checkpoint in an error.

    Raises:
        CheckpointError: (strict) what is missing, unexpected or ill-shaped, by name. Nothing was loaded.
    """
    own = model.state_dict()
    resize, skip = tuple(resize), tuple(skip)
    given = {name: value for name, value in state_dict.items() if not matches(name, skip)}
    resized = {
        name: resample(value, own[name].shape)
        for name, value in given.items()
        if name in own and matches(name, resize) and _differ_in_length(value, own[name])
    }
    given |= resized
    wanted = {name: value for name, value in own.items() if not matches(name, skip)}
    if strict:
        check_fit(given, wanted, source=source, target=_name_of(model))
    fitting = {
        name: value for name, value in given.items() if name in wanted and value.shape == wanted[name].shape
    }
    model.load_state_dict(fitting, strict=False)
    return LoadReport(
        loaded=tuple(sorted(fitting.keys() - resized.keys())),
        skipped=tuple(sorted(state_dict.keys() - fitting.keys())),
        resized=tuple(sorted(resized)),
        initial=tuple(sorted(own.keys() - fitting.keys())),
    )


def check_fit(
    given: Mapping[str, Tensor], expected: Mapping[str, Tensor], *, source: str, target: str
) -> None:
    """Compare names and shapes.

    Raises:
        CheckpointError: every tensor that is missing, unexpected or ill-shaped, similar names as one.
    """
    problems = []
    for label, names in (
        ("missing", expected.keys() - given.keys()),
        ("unexpected", given.keys() - expected.keys()),
    ):
        if names:
            problems.append(f"  {label} ({len(names)}): {summarise(names)}")
    shapes = [
        f"{name} is {list(given[name].shape)}, not {list(expected[name].shape)}"
        for name in expected
        if name in given and given[name].shape != expected[name].shape
    ]
    if shapes:
        rest = f"; and {len(shapes) - 4} more" if len(shapes) > 4 else ""
        problems.append(f"  wrong shape ({len(shapes)}): {'; '.join(shapes[:4])}{rest}")
    if problems:
        raise CheckpointError("\n".join([f"{source} does not fit {target}:", *problems]))


def summarise(names: Iterable[str], most: int = 8) -> str:
    """Names on one line, those that differ only in numbers as one: `h.*.attn.weight (x12)`."""
    groups: dict[str, list[str]] = {}
    for name in sorted(names):
        groups.setdefault(re.sub(r"\d+", "*", name), []).append(name)
    parts = [found[0] if len(found) == 1 else f"{key} (x{len(found)})" for key, found in groups.items()]
    rest = [f"and {len(parts) - most} more"] if len(parts) > most else []
    return ", ".join(parts[:most] + rest)


def matches(name: str, globs: Iterable[str]) -> bool:
    """Whether any of the globs matches the whole name."""
    return any(fnmatch.fnmatchcase(name, glob) for glob in globs)


def resample(value: Tensor, shape: torch.Size) -> Tensor:
    """Linear interpolation along every axis whose length differs, end points kept."""
    result = value.float()
    for axis, length in enumerate(shape):
        if result.shape[axis] != length:
            lines = result.movedim(axis, -1)
            flat = F.interpolate(
                lines.reshape(1, -1, lines.shape[-1]), length, mode="linear", align_corners=True
            )
            result = flat.reshape(*lines.shape[:-1], length).movedim(-1, axis)
    return result.to(value.dtype)


def _differ_in_length(value: Tensor, own: Tensor) -> bool:
    return value.shape != own.shape and value.ndim == own.ndim and value.is_floating_point()


def _name_of(model: nn.Module) -> str:
    built = getattr(model, "zoo_config", None)
    return f"model {built['name']!r}" if built else type(model).__name__
