"""The plain peer of GMAN computes what GMAN does; `zoo bench domain=traffic` in small."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from omegaconf import DictConfig

from domains.traffic.bench import Batch, Run, bench, best_groups, plain_peer
from zoo.bench.compare import relative_difference
from zoo.config import compose
from zoo.create import create_model
from zoo.errors import ConfigError

CPU = torch.device("cpu")
SMALL = ["num_nodes=14", "batch_size=3", "repeats=2", "threads=1", "device=cpu"]
SHORT_CURVE = ["curve.num_nodes=[10,20]", "curve.peer_up_to=10", "curve.repeats=1"]


def _config(*overrides: str) -> DictConfig:
    return compose("bench", ["domain=traffic", *SMALL, *overrides])


def _pair(name: str, **options: object) -> tuple[torch.nn.Module, torch.nn.Module, Batch]:
    """A model with no parameter at its initial value, its peer, and a batch."""
    batch = Batch.random(3, 12, 12, 14, CPU)
    model = create_model(name, num_nodes=14, dropout=0.0, **options)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
        model.train()(batch.x, batch.time)
    return model, plain_peer(model), batch


@pytest.mark.parametrize("name", ["gman", "gman_metr_la", "gman_paper"])
@pytest.mark.parametrize("training", [False, True])
def test_peer_equals_the_model(name: str, training: bool) -> None:
    model, peer, batch = _pair(name)
    with torch.no_grad():
        ours, theirs = (m.train(training)(batch.x, batch.time) for m in (model, peer))
    assert relative_difference(ours, theirs) < 1e-4


def test_peer_has_the_same_gradients() -> None:
    """Our gradients go to the peer's layout the way weights do."""
    model, peer, batch = _pair("gman", num_heads=2, head_dim=3)
    for m in (model, peer):
        m.train()
        (m(batch.x, batch.time) - batch.y).abs().mean().backward()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.grad)
    expected = plain_peer(model)
    ours, theirs = (
        torch.cat([t.flatten() for t in tensors])
        for tensors in (expected.parameters(), (p.grad for p in peer.parameters()))
    )
    assert relative_difference(ours, theirs) < 1e-4


def test_a_model_without_peer_says_which_have_one() -> None:
    with pytest.raises(ConfigError, match=r"no plain peer.*gman, gman_metr_la, gman_paper"):
        plain_peer(create_model("gman_port", num_nodes=4))


def test_training_steps_lower_the_loss() -> None:
    run = Run(create_model("gman", num_nodes=14), Batch.random(3, 12, 12, 14, CPU))

    def loss() -> float:
        return float(run.loss(run.training_forecast(), (run.batch.y - 60) / 12))

    before = loss()
    for _ in range(5):
        run.train()
    assert loss() < before


def test_batch_is_plausible_and_repeats() -> None:
    batch, again = (Batch.random(4, 12, 6, 50, CPU) for _ in range(2))
    assert batch.x.shape == (4, 12, 50)
    assert batch.y.shape == (4, 6, 50)
    assert batch.time.shape == (4, 18, 2)
    assert torch.equal(batch.y, again.y)
    assert 0.04 < float((batch.y == 0).float().mean()) < 0.12
    weekday, slot = batch.time.unbind(-1)
    assert ((weekday * 288 + slot).diff(dim=1) % (7 * 288) == 1).all()


def test_number_of_groups_is_the_papers() -> None:
    assert best_groups(325) == 37


def test_bench_reports_rows_and_curves() -> None:
    report = bench(_config(*SHORT_CURVE))
    assert [row.name for row in report.rows] == ["inference", "training step"]
    assert all(row.difference < 1e-4 for row in report.rows)
    curves = {curve.name: [p.size for p in curve.points] for curve in report.curves}
    assert curves["zoo"] == curves["stid"] == [10, 20]
    assert curves["peer"] == [10]


def test_bfloat16_is_a_row_of_its_own() -> None:
    report = bench(_config("curve=null", "variants=[bfloat16]"))
    assert [row.name for row in report.rows] == ["inference, bfloat16", "training step, bfloat16"]
    assert report.curves == ()


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("variants=[bfloat]", "no variant 'bfloat'. Did you mean 'bfloat16'"),
        ("device=gpu", "device=gpu is not known. Options: auto, cpu, cuda"),
    ],
)
def test_unknown_choices_are_named(override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        bench(_config(override))


def test_full_width_memory_is_less_than_half_of_the_peers(tmp_path: Path) -> None:
    """The measure is exact, so this holds on any machine: 325 sensors, one short window."""
    short = ["batch_size=1", "history=4", "horizon=4"]
    report = bench(_config("num_nodes=325", *short, "repeats=1", "curve=null"))
    inference, training = report.rows
    assert inference.memory < 0.5
    assert training.memory < 0.5
    report.write(tmp_path / "bench.json")
    assert json.loads((tmp_path / "bench.json").read_text())["rows"][1]["memory"] == training.memory
