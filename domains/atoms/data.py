"""Labelled structures for training, validation and test."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, overload

import numpy as np

from domains.atoms import labels, references
from domains.atoms.batches import FrameSet
from domains.atoms.sources import Frame, LabelReader, read_frames
from domains.atoms.sources.frames import NAMES
from domains.atoms.sources.units import Units
from domains.atoms.survey import JUMP, Survey
from zoo.cli.console import console
from zoo.errors import ConfigError, DataError, did_you_mean
from zoo.training.data import DataModule

NAMED = ("emt", "extxyz")
PARTS = ("train", "val", "test")
SPLIT = (0.8, 0.1, 0.1)


class Part(Sequence[Frame]):
    """Some of the frames, in an order of their own; read when asked for."""

    def __init__(self, frames: Sequence[Frame], places: Sequence[int]) -> None:
        self.frames, self.places = frames, [int(place) for place in places]

    def __len__(self) -> int:
        return len(self.places)

    @overload
    def __getitem__(self, index: int) -> Frame: ...
    @overload
    def __getitem__(self, index: slice) -> list[Frame]: ...
    def __getitem__(self, index: int | slice) -> Frame | list[Frame]:
        if isinstance(index, slice):
            return [self.frames[place] for place in self.places[index]]
        return self.frames[self.places[index]]


class Joined(Sequence[Frame]):
    """The frames of several files one after the other."""

    def __init__(self, parts: Sequence[Sequence[Frame]]) -> None:
        self.parts, self.ends = list(parts), np.cumsum([len(part) for part in parts])

    def __len__(self) -> int:
        return int(self.ends[-1]) if len(self.ends) else 0

    @overload
    def __getitem__(self, index: int) -> Frame: ...
    @overload
    def __getitem__(self, index: slice) -> list[Frame]: ...
    def __getitem__(self, index: int | slice) -> Frame | list[Frame]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not 0 <= index < len(self):
            raise IndexError(index)
        part = int(np.searchsorted(self.ends, index, side="right"))
        return self.parts[part][index - int(self.ends[part - 1] if part else 0)]


class AtomsData(DataModule):
    """Frames with energies, forces and stress, from files or from the embedded alloys.

    After `setup`: `parts` (frames of train, val and test), `surveys` of them, and the three `FrameSet`s.

    Args:
        name: `emt`: the embedded alloys, see `domains.atoms.labels`; `extxyz`: files of your own, of any
            format that `read_frames` knows.
        path: a file or folder that is split into the three parts; tested as a whole by `zoo evaluate`.
        train, val, test: instead, a file or a list of files for each part; without `val` or `test`, shares of
            `train` as `split` says.
        split: shares of train, val and test.
        split_seed: of the draw.
        frames: number of embedded frames.
        E0s: reference energies of the elements, see `element_references`; None: `least_squares`, and in
            fine-tuning those of the checkpoint.
        keys: names of labels in the files, by `energy`, `forces`, `stress`, `virial`, `group`, `charge`,
            `spin`; others are found by their usual names.
        units: of the files, see `Units.of`.
        nan: `error`, or `mask` labels that are not finite.
        forces: refuse training frames without forces; False for models of energies alone.
        check: refuse what looks like other units or energies per atom.
        rotate: turn training structures at random, for models that are not equivariant.
        max_atoms: pack training and test frames into batches of at most so many atoms.
        batch_size: frames of a step; with `max_atoms`, packs of a step (as many as there are processes).

    Raises:
        ConfigError: an argument out of its range.
        DataError: in `setup`, if the files cannot be used.
    """

    parts: dict[str, Sequence[Frame]]
    surveys: dict[str, Survey]
    train_set: FrameSet
    val_set: FrameSet
    test_set: FrameSet

    def __init__(
        self,
        name: str = "emt",
        path: str | Path | None = None,
        *,
        train: str | Sequence[str] | None = None,
        val: str | Sequence[str] | None = None,
        test: str | Sequence[str] | None = None,
        split: Sequence[float] = SPLIT,
        split_seed: int = 0,
        frames: int = 600,
        E0s: str | Path | Mapping[str, float] | None = None,
        keys: Mapping[str, str | None] | None = None,
        units: Mapping[str, str | None] | None = None,
        nan: str = "error",
        forces: bool = True,
        check: bool = True,
        rotate: bool = False,
        max_atoms: int | None = None,
        batch_size: int | None = None,
        num_workers: int = 0,
        seed: int = 0,
    ) -> None:
        size = batch_size or (1 if max_atoms else 8)
        super().__init__(batch_size=size, num_workers=num_workers, seed=seed)
        if name not in NAMED:
            raise ConfigError(
                f"data.name={name} is not one of {', '.join(NAMED)}.{did_you_mean(name, NAMED)}"
            )
        if len(split) != 3 or min(split) < 0 or sum(split) <= 0:
            raise ConfigError(f"data.split={list(split)}: three shares for train, val and test are expected.")
        if max_atoms is not None and max_atoms < 1:
            raise ConfigError(f"data.max_atoms={max_atoms}: at least 1 is needed.")
        self.name, self.path, self.split, self.split_seed = name, path, list(split), split_seed
        self.given = {"train": _listed(train), "val": _listed(val), "test": _listed(test)}
        self.frames, self.E0s, self.check, self.nan = frames, E0s, check, nan
        self.keys, self.units = dict(keys or {}), Units.of(units)
        self.rotate, self.max_atoms, self.forces = rotate, max_atoms, forces
        self.embedded = name == "emt" and not (path or any(self.given.values()))
        self.free_atoms: list[Frame] = []
        self._reader(needs_forces=False)

    # ---- reading -----------------------------------------------------------------------------------------

    def prepare_data(self) -> None:
        """Make the embedded frames, once on each machine."""
        if self.embedded:
            labels.emt_file(self.frames, seed=0)

    def setup(self, stage: str | None = None) -> None:
        """Read and split the frames; once, whatever the stage.

        Args:
            stage: `test`, of frames that nothing is trained on: `path` as a whole, or the files of `test`.
        """
        if hasattr(self, "parts"):
            return
        self.parts = self._tested() if stage == "test" else self._parts()
        if stage != "test":
            self._set_free_atoms_apart()
        self.surveys = {part: Survey.of(self.parts[part]) for part in PARTS}
        needed = ("test",) if stage == "test" else PARTS
        for part in needed:
            if not len(self.parts[part]):
                raise DataError(f"No frame is left for the {part} part: see data.split, or give more frames.")
            if self.check:
                self.surveys[part].check_units()
        if self.check and stage != "test":
            self._check_parts_agree()
        sets = {
            part: FrameSet(
                self.parts[part],
                self.surveys[part].natoms,
                max_atoms=self.max_atoms,
                rotate=self.rotate and part == "train",
                shuffle=part == "train",
                seed=self.seed,
            )
            for part in PARTS
        }
        self.train_set, self.val_set, self.test_set = (sets[part] for part in PARTS)
        counts = ", ".join(
            f"{len(self.parts[part])} {part} ({int(self.surveys[part].natoms.sum())} atoms)"
            for part in PARTS
            if len(self.parts[part])
        )
        console.print(f"Frames: {counts}", highlight=False)

    def use(self, cutoff: float) -> None:
        """Bring pairs of this cutoff in Å with every batch."""
        for part in (self.train_set, self.val_set, self.test_set):
            part.use(cutoff)

    @property
    def has_stress(self) -> bool:
        """Whether training frames have a stress."""
        return self.surveys["train"].stress_values > 0

    @property
    def tested_groups(self) -> list[str]:
        """The `config_type` of each tested frame."""
        return self.surveys["test"].groups

    def references(self) -> dict[int, float]:
        """Reference energies by atomic number, as `E0s` says."""
        choice = self.E0s if self.E0s is not None else "least_squares"
        reader = self._reader(needs_forces=False)
        return references.element_references(choice, self.surveys["train"], self.free_atoms, reader)

    def _reader(self, *, needs_forces: bool) -> LabelReader:
        return LabelReader(self.keys, self.units, self.nan, needs_forces=needs_forces)

    def _tested(self) -> dict[str, Sequence[Frame]]:
        files = self.given["test"] or ([str(self.path)] if self.path else [])
        if self.embedded:
            return {**dict.fromkeys(PARTS, ()), "test": self._parts()["test"]}
        if not files:
            raise ConfigError("There is nothing to test on: give data.test=FILE or data.path=FILE.")
        frames = self._read(files, needs_forces=False)
        apart = np.setdiff1d(np.arange(len(frames)), _free_places(frames))
        return {"train": (), "val": (), "test": Part(frames, apart.tolist() or range(len(frames)))}

    def _parts(self) -> dict[str, Sequence[Frame]]:
        given = self.given
        if self.embedded:
            return self._split(read_frames(labels.emt_file(self.frames, seed=0)), PARTS)
        if self.path and any(given.values()):
            raise ConfigError("Give data.path, which is split, or data.train with data.val and data.test.")
        if self.path:
            return self._split(self._read([str(self.path)], needs_forces=self.forces), PARTS)
        if not given["train"]:
            raise ConfigError("data=extxyz needs data.train=FILE (and data.test=FILE), or data.path=FILE.")
        missing = [part for part in PARTS if part == "train" or not given[part]]
        parts = self._split(self._read(given["train"], needs_forces=self.forces), missing)
        for part in ("val", "test"):
            if given[part]:
                parts[part] = self._read(given[part], needs_forces=False)
        return parts

    def _read(self, files: Sequence[str], *, needs_forces: bool) -> Sequence[Frame]:
        """All frames of the files; those without a group are named by their file where there are several."""
        read = [read_frames(file, self._reader(needs_forces=needs_forces)) for file in files]
        if len(read) == 1:
            return read[0]
        named = [_named(frames, Path(file).stem) for frames, file in zip(read, files, strict=True)]
        return Joined(named)

    def _split(self, frames: Sequence[Frame], wanted: Sequence[str]) -> dict[str, Sequence[Frame]]:
        """Frames dealt to the wanted parts at random, by their shares; free atoms go to the first."""
        free = _free_places(frames)
        rest = np.setdiff1d(np.arange(len(frames)), free)
        order = np.random.default_rng((self.split_seed, len(rest))).permutation(rest)
        shares = np.array([self.split[PARTS.index(part)] for part in wanted], dtype=np.float64)
        ends = np.round(np.cumsum(shares / shares.sum()) * len(order)).astype(int)
        dealt = dict(zip(wanted, np.split(order, ends[:-1]), strict=True))
        dealt[wanted[0]] = np.concatenate([dealt[wanted[0]], free]).astype(int)
        return {part: Part(frames, dealt[part].tolist()) for part in wanted}

    def _set_free_atoms_apart(self) -> None:
        """Free atoms give references; they are not trained on."""
        train = self.parts["train"]
        free = _free_places(train)
        if free and len(free) < len(train):
            self.free_atoms = [train[i] for i in free]
            self.parts["train"] = Part(train, np.setdiff1d(np.arange(len(train)), free).tolist())

    def _check_parts_agree(self) -> None:
        """Whether the tested energies are of the kind that was trained on.

        Raises:
            DataError: their energies per atom jump.
        """
        fitted = references.least_squares(self.surveys["train"])
        for part in ("val", "test"):
            survey = self.surveys[part]
            if not set(survey.numbers) <= set(fitted):
                continue
            away = survey.energies - references.reference_energies(fitted, survey)
            typical = float(np.nanmedian(np.abs(away / survey.natoms)))
            if typical > JUMP:
                raise DataError(
                    f"{survey.frames[0].origin.rpartition(', ')[0]}: the energies of the {part} part lie "
                    f"{typical:.0f} eV per atom from what the training data say of their elements: another "
                    "unit, another program, or energies per atom? Or take all as it is: data.check=false."
                )

    # ---- what training asks ------------------------------------------------------------------------------

    @staticmethod
    def collate(samples: Any) -> Any:
        """Batches are made by the data set."""
        return samples

    def extra(self) -> dict[str, Any]:
        """What a checkpoint must know to be tested on other data; json-able."""
        fitted = references.least_squares(self.surveys["train"])
        choice = self.E0s if self.E0s is not None else "least_squares"
        return {
            "data": self.name,
            "E0s": choice if isinstance(choice, str) else "given",
            "mean_energies": references.by_symbol(fitted),
        }

    @staticmethod
    def make(output: Path | None = None, **options: Any) -> list[Path]:
        """Write the embedded frames as extended XYZ; `seed` makes others, `frames` says how many."""
        known = {"seed": 0, "frames": 600}
        for option in options:
            if option not in known:
                raise ConfigError(f"There is no option {option!r} for the embedded frames of atoms.")
        chosen = known | options
        return [labels.emt_file(chosen["frames"], chosen["seed"], output)]

    @staticmethod
    def describe(path: Path, **reading: Any) -> tuple[dict[str, str], list[dict[str, str]]]:
        """Facts of a file, and a row per `config_type`; `units` and `keys` as in training."""
        keys = {key: reading.pop(key) for key in list(reading) if key in NAMES}
        if reading:
            raise ConfigError(
                f"There is no option {next(iter(reading))!r}.{did_you_mean(next(iter(reading)), NAMES)}"
            )
        frames = read_frames(path, LabelReader(keys))
        survey = Survey.of(frames)
        rows = []
        for group in dict.fromkeys(survey.groups):
            places = [i for i, name in enumerate(survey.groups) if name == group]
            part = Survey.of(Part(frames, places))
            per_atom = part.energies / part.natoms
            rows.append(
                {
                    "config_type": group or "-",
                    "frames": str(len(part)),
                    "atoms": f"{part.natoms.min()}-{part.natoms.max()}",
                    "periodic": str(part.periodic),
                    "eV/atom": f"{np.nanmin(per_atom):.3f} to {np.nanmax(per_atom):.3f}",
                    "forces (rms, eV/Å)": f"{part.force_rms:.3f}" if part.force_values else "-",
                    "stresses": str(part.stress_values // 9),
                }
            )
        elements = ", ".join(references.symbol(number) for number in survey.numbers)
        facts = {"source": str(path), "frames": str(len(survey)), "elements": elements}
        return facts, rows


def _listed(files: str | Sequence[str] | None) -> list[str]:
    return [] if files is None else [str(files)] if isinstance(files, str | Path) else [str(f) for f in files]


def _named(frames: Sequence[Frame], name: str) -> Sequence[Frame]:
    """Frames in memory without a group get this one."""
    if not isinstance(frames, list):
        return frames
    return [frame if frame.group else replace(frame, group=name) for frame in frames]


def _free_places(frames: Sequence[Frame]) -> list[int]:
    """Where the free atoms are; those of files larger than memory are not looked for."""
    if not _in_memory(frames):
        return []
    return [i for i in range(len(frames)) if references.is_isolated(frames[i])]


def _in_memory(frames: Sequence[Frame]) -> bool:
    if isinstance(frames, Part):
        return _in_memory(frames.frames)
    if isinstance(frames, Joined):
        return all(map(_in_memory, frames.parts))
    return isinstance(frames, list)
