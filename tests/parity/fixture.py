"""Reference fixtures: a NAME.json that describes a model, and a NAME.safetensors with its inputs and outputs.

The weights are not stored but drawn from the official tensor names and shapes, so that any implementation
that loads official checkpoints can be held to the numbers of the official program.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

import zoo

HERE = Path(__file__).resolve().parent
BUNDLED = HERE / "fixtures"
EXTERNAL = Path(os.environ.get("ZOO_FIXTURES", HERE.parents[2] / "shared" / "fixtures"))


class NoAdapter(Exception):
    """Nothing in this zoo computes the fixture yet."""


@dataclass(frozen=True)
class Fixture:
    """One fixture; the id names its domain (the folder) and its file."""

    path: Path

    @property
    def id(self) -> str:
        return f"{self.domain}/{self.path.stem}"

    @property
    def domain(self) -> str:
        return self.path.parent.name

    @cached_property
    def spec(self) -> dict[str, Any]:
        return json.loads(self.path.read_text())

    @cached_property
    def tensors(self) -> dict[str, Tensor]:
        """Nothing where all that is recorded stands in the JSON file."""
        path = self.path.with_suffix(".safetensors")
        return load_file(path) if path.is_file() else {}

    @property
    def model(self) -> str:
        return str(self.spec.get("model", self.path.stem))

    def state_dict(self) -> dict[str, np.ndarray]:
        """The official checkpoint."""
        gain = float(self.spec.get("gain", 1.0))
        state = {}
        for name, entry in self.spec["state_dict"].items():
            fill = entry.get("fill", "named")
            if fill == "named":
                state[name] = drawn(name, tuple(entry["shape"]), gain)
            elif fill == "stored":
                state[name] = self.tensors[f"buffer/{name}"].numpy()
        return state

    def inputs(self, *names: str) -> list[Tensor]:
        return [self.tensors[f"input/{name}"] for name in names]

    def expected(self) -> dict[str, Tensor]:
        """Everything that the reference computed."""
        return {k: v for k, v in self.tensors.items() if not k.startswith(("input/", "buffer/"))}

    def check(self, name: str, actual: Tensor) -> str | None:
        """What is wrong with our value of an expected tensor; None if nothing is."""
        expected = self.tensors[name].double()
        actual = actual.detach().double()
        rule = self.spec.get("subsampled", {}).get(name)
        if rule is not None:
            actual = subsampled(actual, rule, tuple(expected.shape))
        if actual.shape != expected.shape:
            return f"{name}: shape {tuple(actual.shape)}, expected {tuple(expected.shape)}"
        if name.startswith("grad/") and (limit := self._norm_limit()) is not None:
            return _check_norm(name, actual, expected, limit)
        missing = (expected.isnan() & actual.isnan()) | (expected.isinf() & (actual == expected))
        expected, actual = expected.masked_fill(missing, 0.0), actual.masked_fill(missing, 0.0)
        atol, rtol = self._tolerance(name, expected)
        error = (actual - expected).abs()
        excess = error - atol - rtol * expected.abs()
        if not bool((excess <= 0).all()):
            return (
                f"{name}: off by {float(error.max()):.3g}, largest expected {float(expected.abs().max()):.3g}"
            )
        return None

    def _norm_limit(self) -> float | None:
        """Of the error of a gradient relative to its norm, where the norm and not each value counts.

        Rounding switches single rectified units and the order of near-equal corners of boxes.
        """
        given = self.spec["tolerance"]
        if "float32" in given:
            return 2e-3  # specification of the vision models, 1.4
        return given.get("grad_rel_l2", None if "grad_atol" in given else given.get("grad_rtol"))

    def _tolerance(self, name: str, expected: Tensor) -> tuple[float | Tensor, float]:
        """Absolute and relative; outputs, losses and gradients may each have their own."""
        given = self.spec["tolerance"]
        if (own := given.get(name.partition("/")[0])) is not None:
            return own.get("atol", 0.0), own.get("rtol", 0.0)
        given = given.get("float32", given)
        if "loss_rtol" in given:
            rtol = given["loss_rtol"]
            return (0.0 if name.startswith("loss/") else rtol * _scale(expected)), rtol
        if isinstance(atol := given.get("atol"), dict):
            # Of each output its own; of what happens inside 1e-5 of the largest value.
            largest = expected[expected.isfinite()].abs().max() if expected.isfinite().any() else 0.0
            return atol.get(name.partition("/")[2], 1e-5 * largest), given["rtol"]
        if "atol_of_scale" in given:
            scale = 1.0 if "normalised" in name else _scale(expected)
            return given["atol_of_scale"] * scale, given["rtol"]
        kind = "grad_" if name.startswith("grad/") and "grad_atol" in given else ""
        return given.get(f"{kind}atol", 0.0), given.get(f"{kind}rtol", 0.0)


def _scale(expected: Tensor) -> Tensor:
    """Spread of the values of each entry of the first axis, broadcastable; magnitude of a single value."""
    rows = expected.flatten(1) if expected.ndim > 1 else expected[None]
    scale = rows.std(1) if rows.shape[1] > 1 else rows.abs()[:, 0]
    return scale.view(-1, *[1] * (expected.ndim - 1))


def _check_norm(name: str, actual: Tensor, expected: Tensor, limit: float) -> str | None:
    error = float((actual - expected).norm() / expected.norm())
    return None if error <= limit else f"{name}: off by {error:.3g} of its norm"


def drawn(name: str, shape: tuple[int, ...], gain: float) -> np.ndarray:
    """The float32 weights that a tensor's name stands for.

    A PCG64 generator seeded with the first 8 bytes of the name's SHA-256 gives normal numbers; matrices are
    scaled by gain / sqrt(product of all axes but the first), vectors lie near 1 or 0 according to their role.
    """
    seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little")
    generator = np.random.Generator(np.random.PCG64(seed))
    noise = np.asarray(generator.standard_normal(shape, dtype=np.float32), dtype=np.float32)
    small = np.float32(0.1) * noise
    if len(shape) > 1:
        return noise * np.float32(gain / math.sqrt(max(1, math.prod(shape[1:]))))
    if name.endswith("running_var"):
        return np.float32(1) + np.abs(small)
    return np.float32(1) + small if not shape or name.endswith("weight") else small


def equal(fact: Any, stated: Any) -> bool:
    """Whether a computed fact is the one recorded; figures, also inside of dicts, within 1e-6."""
    if isinstance(stated, dict) and isinstance(fact, dict):
        return fact.keys() == stated.keys() and all(equal(fact[key], stated[key]) for key in stated)
    if isinstance(stated, float):
        return math.isclose(fact, stated, rel_tol=0, abs_tol=1e-6)
    return fact == stated


def subsampled(full: Tensor, rule: str, shape: tuple[int, ...]) -> Tensor:
    """Apply a rule such as `nodes [::40] on axis 2`; without an axis, to the one that gives `shape`."""
    found = re.search(r"\[(-?\d*):(-?\d*):?(-?\d*)\](?:.*axis (\d+))?", rule)
    if found is None:
        raise ValueError(f"no slice in the rule {rule!r}")
    start, stop, step, axis = (int(part) if part else None for part in found.groups())
    axes = range(full.ndim) if axis is None else [axis]
    parts = [full[(slice(None),) * a + (slice(start, stop, step),)] for a in axes]
    fitting = [part for part in parts if tuple(part.shape) == shape]
    return fitting[0] if fitting else parts[0]


def fixtures(domain: str = "*") -> list[Fixture]:
    """All that are found; a bundled one gives way to one of the same name in the external folder."""
    found = {fixture.id: fixture for folder in (BUNDLED, EXTERNAL) for fixture in _in(folder, domain)}
    return [found[name] for name in sorted(found)]


def _in(folder: Path, domain: str) -> Iterator[Fixture]:
    if folder.is_dir():
        yield from (Fixture(path) for path in folder.glob(f"{domain}/*.json"))


def official_gradients(model: torch.nn.Module) -> dict[str, Tensor]:
    """`grad/NAME` for every official tensor that has a gradient."""
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {f"grad/{name}": g for name, g in zoo.to_official(model, gradients).items()}
