"""The traffic task: units, schedules inside the model, and weights that move between sensors and data."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import pytorch_lightning as pl
import torch
from omegaconf import OmegaConf
from torch import Tensor, nn

from domains.traffic.data import TrafficData
from domains.traffic.task import TrafficTask, carry_sensors
from zoo.create import create_model
from zoo.errors import CheckpointError
from zoo.registry import model_signature


class Persistence(nn.Module):
    """The last input for every step; `shift` is trainable."""

    norm_decay_epochs = 5.0

    def __init__(self) -> None:
        super().__init__()
        self.shift = nn.Parameter(torch.zeros(()))
        self.decays: list[tuple[int, int]] = []
        self.zoo_config = {"name": "persistence"}

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        return x[:, -1:].expand(-1, time.shape[1] - x.shape[1], -1) + self.shift

    def set_norm_decay(self, step: int, period: int) -> None:
        self.decays.append((step, period))


def data(path: Path, sensors: str = "abcd", level: float = 50.0, **options: Any) -> TrafficData:
    """Three days of readings around `level`, every 15 minutes, one in twenty missing; 3 + 2 steps."""
    draw = np.random.default_rng(0)
    values = level + draw.normal(0, 8, (288, len(sensors)))
    values[draw.random(values.shape) < 0.05] = 0.0
    stamps = pd.date_range("2024-01-01", periods=288, freq="15min")
    pd.DataFrame(values, index=pd.Index(stamps, name="timestamp"), columns=list(sensors)).to_csv(path)
    module = TrafficData("test", str(path), history=3, horizon=2, spatial_embedding="laplacian", **options)
    module.setup()
    return module


def config(**changes: Any) -> Any:
    return OmegaConf.create(
        {"optimizer": {"name": "sgd", "lr": 1e-3}, "schedule": {"name": "constant"}, "loss": {}} | changes
    )


def kwargs(name: str, module: TrafficData) -> dict[str, Any]:
    return {key: value for key, value in module.model_kwargs().items() if key in model_signature(name)}


def fit(task: TrafficTask, module: TrafficData) -> None:
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    pl.Trainer(max_epochs=1, accelerator="cpu", enable_model_summary=False, **quiet).fit(task, module)


def test_loss_and_metrics_are_in_original_units(tmp_path: Path) -> None:
    module = data(tmp_path / "a.csv")
    task = TrafficTask.build(config(), module, Persistence())
    batch = module.train_set.__getitems__(range(20))
    total, count = task.loss(batch, "val")
    last = module.train_set.targets[module.train_set.starts[:20] + 2][:, None]
    known = batch["y_mask"]
    assert count == known.sum()
    torch.testing.assert_close(total, (last - batch["y"]).abs()[known].sum(), rtol=1e-4, atol=0)
    torch.testing.assert_close(task.metrics("val")["mae"].float(), (total / count), rtol=1e-5, atol=0)


def test_norm_decay_is_told_the_step_and_the_period_of_the_model(tmp_path: Path) -> None:
    module = data(tmp_path / "a.csv", batch_size=32)
    model = Persistence()
    cfg = config(trainer={"max_epochs": 1})
    fit(TrafficTask.build(cfg, module, model), module)
    steps = -(-module.size("train") // 32)
    assert model.decays == [(step, 5 * module.size("train") // 32) for step in range(steps)]


def test_frozen_parameter_stays_bit_identical(tmp_path: Path) -> None:
    module = data(tmp_path / "a.csv")
    model = create_model("stid", **kwargs("stid", module))
    frozen, free = next(iter(model.named_parameters())), list(model.named_parameters())[-1]
    frozen[1].requires_grad_(False)
    before = frozen[1].detach().clone(), free[1].detach().clone()
    cfg = config(optimizer={"name": "adamw", "lr": 0.1, "weight_decay": 0.1}, trainer={"max_epochs": 1})
    fit(TrafficTask.build(cfg, module, model), module)
    assert torch.equal(frozen[1], before[0])
    assert not torch.equal(free[1], before[1])


def test_known_sensors_keep_their_entries_on_another_network(tmp_path: Path) -> None:
    old = create_model("stid", **kwargs("stid", data(tmp_path / "a.csv", "abcd")))
    new = create_model("stid", **kwargs("stid", data(tmp_path / "b.csv", "daxyz")))
    names = carry_sensors(new, old.state_dict(), list("abcd"), list("daxyz"))
    assert names
    for name in names:
        assert torch.equal(new.get_parameter(name)[:2], old.get_parameter(name)[[3, 0]])
        assert not torch.equal(new.get_parameter(name)[2:4], old.get_parameter(name)[1:3])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sensor_ids": list("abce")}, "other sensors.*only in the checkpoint: e; only in the data: d"),
        ({"sensor_ids": list("abdc")}, "other sensors: the same sensors in another order"),
        ({"horizon": 12}, "horizon=12, the data have 2"),
        ({"interval_minutes": 5}, "interval_minutes=5, the data have 15"),
    ],
)
def test_weights_of_other_data_are_refused(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    module = data(tmp_path / "a.csv")
    TrafficTask.check(module.extra(), module, "model.safetensors")
    with pytest.raises(CheckpointError, match=f"model.safetensors.*{message}"):
        TrafficTask.check(module.extra() | change, module, "model.safetensors")


def test_new_readings_are_scaled_as_the_training_data_were(tmp_path: Path) -> None:
    trained, new = data(tmp_path / "a.csv"), data(tmp_path / "b.csv", level=80.0)
    TrafficTask.prepare(trained.extra(), new)
    start = int(new.test_set.starts[0])
    raw = torch.from_numpy(new.series.values[start : start + 3, :, 0])
    torch.testing.assert_close(new.test_set[0]["x"], (raw - trained.mean) / trained.std)
    assert (new.mean, new.std) == (trained.mean, trained.std)
