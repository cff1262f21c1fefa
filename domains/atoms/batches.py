"""From frames to batches: structures with their pairs, labels beside them, packed by the number of atoms.

Letters in shapes: N atoms of a batch, G structures.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from domains.atoms.graph.pairs import candidate_pairs
from domains.atoms.sources import Frame
from domains.atoms.structures import Structures
from zoo.errors import DataError

KEPT_ATOMS = 200_000
"""Up to so many atoms, structures with their pairs are kept in memory once they are made."""


class FrameSet(Dataset):
    """Batches of frames.

    A batch is `{"structures": Structures with pairs, "energy": (G,) float64, "forces": (N, 3), "stress":
    (G, 3, 3), "index": (G,)}`; unknown labels are NaN.

    Args:
        frames: in memory or read one by one.
        natoms: `(F,)` of the frames.
        max_atoms: if given, an index stands for a pack of frames with at most so many atoms together; else
            for one frame. Packs are dealt anew in every epoch; their number stays the same.
        rotate: turn each structure at random; by (seed, epoch, frame) alone.
        shuffle: deal packs anew in every epoch; otherwise they stay, and without packs frames of like size
            come together.

    Raises:
        DataError: a frame is larger than a pack.
    """

    def __init__(
        self,
        frames: Sequence[Frame],
        natoms: np.ndarray,
        *,
        max_atoms: int | None = None,
        rotate: bool = False,
        shuffle: bool = False,
        seed: int = 0,
    ) -> None:
        self.frames, self.natoms, self.rotate, self.shuffle, self.seed = frames, natoms, rotate, shuffle, seed
        self.cutoff = 0.0
        self.keep = int(natoms.sum()) <= KEPT_ATOMS
        self.made: dict[int, Structures] = {}
        self.by_size = np.argsort(natoms, kind="stable")
        self.max_atoms = max_atoms or 0
        self.packs = self._number_of_packs(max_atoms) if max_atoms and len(frames) else None
        self.set_epoch(0)

    def __len__(self) -> int:
        return len(self.frames) if self.packs is None else self.packs

    def use(self, cutoff: float) -> None:
        """Bring pairs of this cutoff in Å with every batch."""
        if cutoff != self.cutoff:
            self.cutoff, self.made = cutoff, {}

    def set_epoch(self, epoch: int) -> None:
        """Choose turns, and what packs hold."""
        self.epoch = epoch
        if self.packs is not None:
            self.members = self._deal(np.random.default_rng((self.seed, epoch, 1)), self.packs)

    def _deal(self, draw: np.random.Generator, packs: int) -> list[list[int]]:
        """The frames of each pack.

        Frames go to the emptiest pack, the larger ones first, in an order disturbed by the size of an average
        frame; or undisturbed but for those of one size, which always fits, where that overfills a pack.
        """
        if not self.shuffle:
            return _filled(self.by_size[::-1], self.natoms, packs)
        jitter = draw.uniform(0, self.natoms.mean(), len(self.natoms))
        for noise in (jitter, jitter / (1 + jitter.max())):
            members = _filled(np.argsort(-(self.natoms + noise)), self.natoms, packs)
            if self._fullest(members) <= self.max_atoms:
                return members
        raise AssertionError("packs that fit when they were counted fit again")

    def _number_of_packs(self, max_atoms: int) -> int:
        """So few that each holds at most `max_atoms`."""
        largest = int(self.natoms.max())
        if largest > max_atoms:
            frame = self.frames[int(self.natoms.argmax())]
            raise DataError(f"{frame.origin} has {largest} atoms, more than data.max_atoms={max_atoms}.")
        packs = -(-int(self.natoms.sum()) // max_atoms)
        while self._fullest(_filled(self.by_size[::-1], self.natoms, packs)) > max_atoms:
            packs += 1 + packs // 100
        return packs

    def _fullest(self, members: Sequence[Sequence[int]]) -> int:
        return max(int(self.natoms[list(pack)].sum()) for pack in members)

    # ---- batches ----

    def __getitems__(self, indices: Sequence[int]) -> dict[str, Any]:
        """The batch of these frames, or of the frames of these packs."""
        places = self._frames_of(indices)
        samples = [self._sample(place) for place in places]
        structures, labels = zip(*samples, strict=True)
        batch: dict[str, Any] = {
            name: torch.cat([label[name] for label in labels]) for name in ("energy", "forces", "stress")
        }
        return batch | {"structures": Structures.concat(structures), "index": torch.tensor(places)}

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.__getitems__([index])

    def _frames_of(self, indices: Sequence[int]) -> list[int]:
        if self.packs is None:
            places = np.asarray(indices) if self.shuffle else self.by_size[np.asarray(indices)]
        else:
            places = np.concatenate([self.members[i] for i in indices])
        return places.tolist()

    def _sample(self, place: int) -> tuple[Structures, dict[str, Tensor]]:
        frame = self.frames[place]
        structures = self.made.get(place)
        if structures is None:
            structures = _structures(frame, self.cutoff)
            if self.keep:
                self.made[place] = structures
        forces = np.full((len(frame), 3), np.nan) if frame.forces is None else frame.forces
        stress = np.full((3, 3), np.nan) if frame.stress is None else frame.stress
        labels = {
            "energy": torch.tensor([frame.energy], dtype=torch.float64),
            "forces": torch.from_numpy(forces).float(),
            "stress": torch.from_numpy(stress).float()[None],
        }
        if self.rotate:
            turn = random_rotation(np.random.default_rng((self.seed, self.epoch, place)))
            structures, labels = rotated(structures, turn), rotated_labels(labels, turn)
        return structures, labels


def _filled(order: np.ndarray, natoms: np.ndarray, packs: int) -> list[list[int]]:
    """Each frame in turn to the pack with the fewest atoms."""
    heap = [(0, i) for i in range(packs)]
    members: list[list[int]] = [[] for _ in range(packs)]
    for place in order.tolist():
        atoms, pack = heap[0]
        heapq.heapreplace(heap, (atoms + int(natoms[place]), pack))
        members[pack].append(place)
    return members


def random_rotation(draw: np.random.Generator) -> Tensor:
    """`(3, 3)` float64, uniform over all rotations: of a normal quaternion (Shoemake 1992)."""
    w, x, y, z = (q := draw.normal(size=4)) / np.linalg.norm(q)
    return torch.tensor(
        [
            [1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)],
            [2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)],
            [2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)],
        ],
        dtype=torch.float64,
    )


def rotated(structures: Structures, turn: Tensor) -> Structures:
    """Positions and cells turned by `turn (3, 3)`; who is near whom stays."""
    r = turn.to(structures.positions)
    return replace(structures, positions=structures.positions @ r.T, cell=structures.cell @ r.T)


def rotated_labels(labels: dict[str, Tensor], turn: Tensor) -> dict[str, Tensor]:
    """Forces `(N, 3)` and stress `(G, 3, 3)` turned by `turn (3, 3)`."""
    r = turn.to(labels["forces"])
    return labels | {"forces": labels["forces"] @ r.T, "stress": r @ labels["stress"] @ r.T}


def _structures(frame: Frame, cutoff: float) -> Structures:
    """With pairs of the cutoff, if it is not 0."""
    try:
        structures = Structures.from_ase([frame.atoms])
        if not cutoff:
            return structures
        return replace(structures, pairs=candidate_pairs(structures, cutoff))
    except DataError as error:
        raise DataError(f"{frame.origin}: {error}") from None
