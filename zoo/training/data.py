"""Data modules whose batches depend on nothing but (seed, epoch, position).

A run that is killed and resumed, and a run spread over several processes, therefore see the batches of one
uninterrupted process.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Sized
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytorch_lightning as pl
import torch
from torch.utils.data import BatchSampler, DataLoader, Dataset, Sampler, default_collate

from zoo.errors import ConfigError


@contextmanager
def drawn_from(*key: int) -> Iterator[None]:
    """Within, what `random`, numpy and torch (on the CPU) draw depends on `key` alone; afterwards they go on.

    For augmentation by libraries that draw from the global generators.
    """
    before = random.getstate(), np.random.get_state(), torch.get_rng_state()
    mixed = int(np.random.SeedSequence(key).generate_state(1)[0])
    random.seed(mixed)
    np.random.seed(mixed)
    torch.default_generator.manual_seed(mixed)
    try:
        yield
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])
        torch.set_rng_state(before[2])


class SeededOrder(Sampler[int]):
    """The indices 0 ... size-1; shuffled by (seed, epoch) alone when `shuffle` is set.

    With `repeats` above 1, a shuffled epoch has the first part of the samples, each so many times in a row:
    copy r of sample i is the index `i + r * size`.
    """

    def __init__(self, size: int, *, shuffle: bool, seed: int = 0, repeats: int = 1) -> None:
        self.size, self.shuffle, self.seed, self.repeats, self.epoch = size, shuffle, seed, repeats, 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the order of the next iteration; Lightning calls this at the start of every epoch."""
        self.epoch = epoch

    def generator(self) -> torch.Generator:
        """A generator seeded by (seed, epoch)."""
        mixed = np.random.SeedSequence([self.seed, self.epoch]).generate_state(1)[0]
        return torch.Generator().manual_seed(int(mixed))

    def __len__(self) -> int:
        return self.size

    def __iter__(self) -> Iterator[int]:
        if self.shuffle:
            order = torch.randperm(self.size, generator=self.generator()).repeat_interleave(self.repeats)
            copies = torch.arange(self.size) % self.repeats
            yield from (order[: self.size] + self.size * copies).tolist()
        else:
            yield from range(self.size)


class ShardedBatches(BatchSampler):
    """Global batches of `batch_size`, of which each of `world` processes takes its own share.

    The last batch may be short. Where it does not matter what a batch holds (`even`), as in evaluation, the
    batches are cut to equal sizes instead, so that every process has part of each.

    Raises:
        ConfigError: a batch has fewer samples than there are processes.
    """

    def __init__(
        self, sampler: SeededOrder, batch_size: int, *, rank: int = 0, world: int = 1, even: bool = False
    ):
        super().__init__(sampler, batch_size, drop_last=False)
        self.rank, self.world, self.first = rank, world, 0
        count = math.ceil(len(sampler) / batch_size)
        self.bounds = [min(i * batch_size, len(sampler)) for i in range(count + 1)]
        if even:
            self.bounds = [i * len(sampler) // count for i in range(count + 1)] if count else [0]
        smallest = min(np.diff(self.bounds), default=world)
        if smallest < world:
            raise ConfigError(
                f"{len(sampler)} samples in batches of {batch_size} leave a batch of {smallest} "
                f"for {world} processes."
                f" Choose another data.batch_size, for example {_dividing(len(sampler), batch_size, world)}."
            )

    def __len__(self) -> int:
        return len(self.bounds) - 1

    def __iter__(self) -> Iterator[list[int]]:
        first, self.first = self.first, 0
        order = list(cast(SeededOrder, self.sampler))
        for start, stop in zip(self.bounds[first:-1], self.bounds[first + 1 :], strict=True):
            yield order[start:stop][self.rank :: self.world]


class ResumableLoader(DataLoader):
    """A DataLoader that can stop after any batch and go on from there.

    Lightning stores `state_dict` in its checkpoints and hands it back on resume. Draws no number from the
    global generators: worker seeds come from (seed, epoch), too. A data set with a method `set_epoch` is told
    the epoch before its workers start.
    """

    batch_sampler: ShardedBatches

    def __init__(self, dataset: Dataset, batches: ShardedBatches, **options: Any) -> None:
        super().__init__(dataset, batch_sampler=batches, generator=torch.Generator(), **options)
        self.delivered = 0

    def __iter__(self) -> Iterator[Any]:  # pyright: ignore[reportIncompatibleMethodOverride]
        self.delivered = self.batch_sampler.first
        return self._batches()

    def _batches(self) -> Iterator[Any]:
        """Starts with the first batch, not before: Lightning sets the epoch of a resumed run in between."""
        order = cast(SeededOrder, self.batch_sampler.sampler)
        cast(torch.Generator, self.generator).set_state(order.generator().get_state())
        if hasattr(self.dataset, "set_epoch"):
            cast(Any, self.dataset).set_epoch(order.epoch)
        for batch in super().__iter__():
            self.delivered += 1
            yield batch

    def state_dict(self) -> dict[str, int]:
        return {"delivered": self.delivered}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.batch_sampler.first = state["delivered"] % len(self.batch_sampler)


class DataModule(pl.LightningDataModule):
    """Base of every domain's data: a subclass fills `train_set`, `val_set` and `test_set` in `setup`.

    Data sets are map-style; one with `__getitems__(indices)` may return a whole batch at once if the subclass
    overrides `collate` accordingly.

    Args:
        batch_size: samples per optimiser step over all processes together.
        num_workers: loader processes per training process.
        seed: fixes the order of the training samples.
    """

    repeats: int = 1
    """Copies of each training sample in a batch, see `SeededOrder`."""
    train_set: Dataset
    val_set: Dataset
    test_set: Dataset

    def __init__(self, *, batch_size: int = 32, num_workers: int = 0, seed: int = 0) -> None:
        super().__init__()
        if batch_size < 1:
            raise ConfigError(f"data.batch_size={batch_size}: at least 1 is needed.")
        self.batch_size, self.num_workers, self.seed = batch_size, num_workers, seed

    @staticmethod
    def collate(samples: Any) -> Any:
        """Make a batch of the samples of a list; `torch.utils.data.default_collate` unless overridden."""
        return default_collate(samples)

    def train_dataloader(self) -> ResumableLoader:
        return self.loader(self.train_set, shuffle=True)

    def val_dataloader(self) -> ResumableLoader:
        return self.loader(self.val_set)

    def test_dataloader(self) -> ResumableLoader:
        return self.loader(self.test_set)

    def predict_dataloader(self) -> ResumableLoader:
        return self.loader(self.test_set)

    def model_kwargs(self) -> dict[str, Any]:
        """What the data decide of a model's constructor arguments."""
        return {}

    def extra(self) -> dict[str, Any]:
        """Json-able facts that weights trained on these data depend on, stored with them."""
        return {}

    @staticmethod
    def make(output: Path | None = None, **options: Any) -> list[Path]:
        """Write the embedded data as files, for `zoo data make`; a ConfigError in a domain without such."""
        raise ConfigError(
            "The embedded data of this domain come with its libraries: there is nothing to make."
        )

    @staticmethod
    def describe(path: Path, **reading: Any) -> tuple[dict[str, str], list[dict[str, str]]]:
        """Facts and a table of what `path` holds, for `zoo data info`; a ConfigError in a domain without."""
        raise ConfigError("This domain has no description of data files.")

    @staticmethod
    def convert(source: Path, target: Path, **reading: Any) -> Any:
        """Write data in another format, for `zoo data convert`; a ConfigError in a domain with one format."""
        raise ConfigError("This domain does not convert data files.")

    @staticmethod
    def degrade(source: Path, target: Path, **options: Any) -> list[Path]:
        """Write pictures of low resolution, for `zoo data degrade`; a ConfigError in a domain without."""
        raise ConfigError("The data of this domain have no rule of degradation.")

    def size(self, split: str) -> int:
        """Number of samples of `split`, which is "train", "val" or "test"."""
        return len(cast(Sized, getattr(self, f"{split}_set")))

    def loader(self, dataset: Dataset, *, shuffle: bool = False) -> ResumableLoader:
        """The loader of this process' share of `dataset`, at the epoch where the trainer stands."""
        trainer = self.trainer
        rank, world = (trainer.global_rank, trainer.world_size) if trainer else (0, 1)
        order = SeededOrder(len(cast(Sized, dataset)), shuffle=shuffle, seed=self.seed, repeats=self.repeats)
        order.set_epoch(trainer.current_epoch if trainer else 0)
        return ResumableLoader(
            dataset,
            ShardedBatches(order, self.batch_size, rank=rank, world=world, even=not shuffle),
            num_workers=self.num_workers,
            collate_fn=self.collate,
            pin_memory=torch.cuda.is_available(),
            persistent_workers=False,
        )


def _dividing(size: int, batch_size: int, world: int) -> int:
    """The batch size nearest to `batch_size` whose last batch of `size` samples serves `world` processes."""
    sizes = (b for b in range(world, size + 1) if (size % b or b) >= world)
    return min(sizes, key=lambda b: abs(b - batch_size), default=world)
