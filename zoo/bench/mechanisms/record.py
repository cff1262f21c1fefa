"""What a comparison of mechanisms found, as one JSON file that further runs add to."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any, ClassVar, Self

from zoo.bench.report import Curve, Point
from zoo.errors import ConfigError
from zoo.files import atomic_write

TITLE = "attention mechanisms"


@dataclass(frozen=True)
class BySeed:
    """What was trained, and what each seed gave."""

    by_seed: ClassVar[tuple[str, ...]]
    """Fields with one entry for each seed."""

    name: str
    seeds: tuple[int, ...]

    def settings(self) -> dict[str, Any]:
        """All but what belongs to a seed."""
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name not in self.by_seed}

    def has(self, settings: Mapping[str, Any]) -> bool:
        return all(getattr(self, name) == value for name, value in settings.items())

    def with_seeds_of(self, earlier: Self | None) -> Self:
        """Those of an earlier one that are missing here, added, if it has the same settings."""
        if earlier is None or not earlier.has(self.settings()):
            return self
        kept = [i for i, seed in enumerate(earlier.seeds) if seed not in self.seeds]
        joined = {
            name: (*(getattr(earlier, name)[i] for i in kept), *getattr(self, name)) for name in self.by_seed
        }
        return dataclasses.replace(self, **joined)

    @classmethod
    def stored(cls, values: Mapping[str, Any]) -> Self:
        """From the fields as a file has them."""
        return cls(**{**values, **{name: tuple(values[name]) for name in cls.by_seed}})


@dataclass(frozen=True)
class Trained(BySeed):
    """A layer on a synthetic task."""

    by_seed = ("seeds", "accuracies", "tests", "seconds")

    task: str
    causal: bool
    options: dict[str, Any]
    sizes: dict[str, Any]
    """Of the task."""
    budget: dict[str, Any]
    chance: float
    parameters: int
    accuracies: tuple[float, ...]
    """One for each seed, as all that follows."""
    tests: tuple[dict[str, float], ...]
    seconds: tuple[float, ...]

    @property
    def part(self) -> str:
        return self.task

    @property
    def accuracy(self) -> float:
        return fmean(self.accuracies)

    def tested(self) -> dict[str, float]:
        """Mean over the seeds of each further test."""
        return {name: fmean(found[name] for found in self.tests) for name in self.tests[0]}


@dataclass(frozen=True)
class Cost:
    """Time and memory of a layer in one of the four patterns."""

    name: str
    pattern: str
    options: dict[str, Any]
    curve: Curve
    ends: str = ""
    """Why no further size was measured; empty where all were."""

    @property
    def part(self) -> str:
        return self.pattern


@dataclass(frozen=True)
class Swapped(BySeed):
    """A model of a domain with its attention swapped, after a short training."""

    by_seed = ("seeds", "values")

    domain: str
    measure: str
    overrides: tuple[str, ...]
    """Of `zoo train`, beside the seed."""
    values: tuple[float, ...]

    @property
    def part(self) -> str:
        return self.domain


@dataclass(frozen=True)
class LeftOut:
    """What a layer could not be compared on, and why."""

    name: str
    part: str
    reason: str


Entry = Trained | Cost | Swapped | LeftOut


@dataclass
class Record:
    """All that was found; `machines` has one entry for each run that added to it."""

    quick: bool
    machines: list[dict[str, Any]] = field(default_factory=list)
    trained: dict[tuple[str, str], Trained] = field(default_factory=dict)
    costs: dict[tuple[str, str], Cost] = field(default_factory=dict)
    swapped: dict[tuple[str, str], Swapped] = field(default_factory=dict)
    left_out: dict[tuple[str, str], LeftOut] = field(default_factory=dict)

    def add(self, entry: Entry) -> None:
        """Enter it in the place of an earlier one of the same layer and part; seeds are added to those of
        a training like it."""
        key = entry.name, entry.part
        self.left_out.pop(key, None)
        match entry:
            case Trained():
                self.trained[key] = entry.with_seeds_of(self.trained.get(key))
            case Cost():
                self.left_out.pop((entry.name, "cost"), None)
                self.costs[key] = entry
            case Swapped():
                self.swapped[key] = entry.with_seeds_of(self.swapped.get(key))
            case LeftOut():
                self.left_out[key] = entry

    def write(self, path: Path) -> None:
        """As JSON."""
        record = {
            "title": TITLE,
            "quick": self.quick,
            "machines": self.machines,
            "trained": [dataclasses.asdict(entry) for entry in self.trained.values()],
            "costs": [
                {**dataclasses.asdict(entry), "slopes": entry.curve.slopes()} for entry in self.costs.values()
            ],
            "swapped": [dataclasses.asdict(entry) for entry in self.swapped.values()],
            "left_out": [dataclasses.asdict(entry) for entry in self.left_out.values()],
        }
        with atomic_write(path, "w") as file:
            json.dump(record, file, indent=1)
            file.write("\n")


def opened(path: Path, *, quick: bool) -> Record:
    """What a file holds, to be added to; an empty record where there is none.

    Raises:
        ConfigError: the file is something else, or one of the two is a quick run and the other is not.
    """
    if not path.is_file():
        return Record(quick)
    stored = _read(path)
    if stored["quick"] != quick:
        kind = "quick" if stored["quick"] else "full"
        raise ConfigError(f"{path} holds a {kind} run, which this one cannot add to: give another output=")
    record = Record(quick, stored["machines"])
    for values in stored["trained"]:
        record.add(Trained.stored(values))
    for values in stored["costs"]:
        curve = Curve(values["name"], tuple(Point(**point) for point in values["curve"]["points"]))
        record.add(Cost(values["name"], values["pattern"], values["options"], curve, values["ends"]))
    for values in stored["swapped"]:
        record.add(Swapped.stored({**values, "overrides": tuple(values["overrides"])}))
    for values in stored["left_out"]:
        record.add(LeftOut(**values))
    return record


def as_stored(sizes: Any) -> dict[str, Any]:
    """The fields of a dataclass as they come back from a file."""
    return json.loads(json.dumps(dataclasses.asdict(sizes)))


def _read(path: Path) -> dict[str, Any]:
    try:
        stored = json.loads(path.read_text())
    except (ValueError, UnicodeDecodeError):
        stored = None
    if not isinstance(stored, dict) or stored.get("title") != TITLE:
        raise ConfigError(f"{path} is no record of suite=attention: give another output=")
    return stored
