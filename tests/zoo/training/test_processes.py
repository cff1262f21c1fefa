"""Two processes train as one does with the same global batch."""

from __future__ import annotations

import csv
import socket
from itertools import chain
from pathlib import Path

import pytest
import torch
import toy
from safetensors.torch import load_file

from zoo.errors import ConfigError
from zoo.training.data import SeededOrder, ShardedBatches

SETTINGS = ("model.dropout=0", "optimizer.name=sgd", "optimizer.lr=0.1", "data.batch_size=7", "ema.decay=0.9")


def launch(log: Path, run: Path, world: int, *overrides: str) -> None:
    """Start `world` processes as torchrun does, and wait."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    common = {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_RUN_ID": "toy",
        "GROUP_RANK": "0",
    }
    common |= {"WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world)}
    children = [
        toy.process("train", log, run, *overrides, env=common | {"RANK": str(rank), "LOCAL_RANK": str(rank)})
        for rank in range(world)
    ]
    for child in children:
        child.join()
    assert [child.exitcode for child in children] == [0] * world, log.read_text()


def rows(run: Path) -> torch.Tensor:
    with open(run / "metrics.csv") as file:
        return torch.tensor([[float(value) for value in row.values()] for row in csv.DictReader(file)])


def test_two_processes_equal_one(tmp_path: Path) -> None:
    log = tmp_path / "log"
    launch(log, tmp_path / "one", 1, *SETTINGS)
    launch(log, tmp_path / "two", 2, *SETTINGS, "trainer.devices=2", "trainer.strategy=ddp")
    torch.testing.assert_close(rows(tmp_path / "two"), rows(tmp_path / "one"), rtol=1e-5, atol=0)
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    torch.testing.assert_close(two, one, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("even", [False, True])
def test_shares_of_the_processes_make_up_the_global_batches(world: int, even: bool) -> None:
    order = SeededOrder(52, shuffle=not even, seed=3)
    whole = list(ShardedBatches(order, 8, even=even))
    shares = [list(ShardedBatches(order, 8, rank=rank, world=world, even=even)) for rank in range(world)]
    for batch, *parts in zip(whole, *shares, strict=True):
        assert sorted(batch) == sorted(chain(*parts))
        assert all(parts)
    assert sorted(chain(*whole)) == list(range(52))


def test_batch_too_small_for_the_processes_names_a_batch_size_that_works() -> None:
    with pytest.raises(ConfigError, match=r"a batch of 1 for 2 processes.*for example 7"):
        ShardedBatches(SeededOrder(17, shuffle=True), 8, world=2)
    ShardedBatches(SeededOrder(17, shuffle=True), 7, world=2)


def test_order_depends_on_seed_and_epoch_alone() -> None:
    def order(seed: int, epoch: int) -> list[int]:
        sampler = SeededOrder(20, shuffle=True, seed=seed)
        sampler.set_epoch(epoch)
        torch.rand(3)
        return list(sampler)

    assert order(0, 1) == order(0, 1)
    assert order(0, 1) != order(0, 0)
    assert order(0, 1) != order(1, 1)
