"""Chronos-2 with other layers of the core over time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import zoo
from domains.forecasting.pipeline import Forecaster
from domains.forecasting.weights import save_folder
from zoo.attention.layers.base import LAYERS
from zoo.errors import CheckpointError, ConfigError, ZooError

SMALL: dict[str, Any] = {
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 48,
    "num_layers": 2,
    "num_heads": 4,
    "context_length": 64,
}


def model(attention: Any) -> Any:
    return zoo.create_model("chronos2", **SMALL, initializer_factor=0.3, attention=attention)


@pytest.mark.parametrize("attention", ["gated", {"name": "multihead", "num_kv_heads": 2}, "linear"])
def test_it_forecasts_series_of_several_lengths_and_learns(attention: Any) -> None:
    torch.manual_seed(0)
    chosen = model(attention)
    inputs = [torch.randn(50).cumsum(0), torch.randn(2, 17), torch.full((20,), torch.nan)]
    with pytest.warns(UserWarning, match="no value"):
        found = Forecaster(chosen).predict_series(inputs, 20)
    assert [f.shape for f in found] == [(1, 21, 20), (2, 21, 20), (1, 21, 20)]
    assert all(f.isfinite().all() for f in found)
    chosen.train()
    out = chosen(torch.randn(3, 40), num_output_patches=1, future_target=torch.randn(3, 16))
    out.loss.backward()
    own = [p for block in chosen.encoder.block for p in block.layer[0].self_attention.parameters()]
    assert own
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in own)


def test_combined_weights_are_left_alone() -> None:
    """`folded` has nothing to combine in another layer: the same forecast."""
    chosen, x = model("gated").eval(), torch.randn(2, 64)
    with torch.no_grad():
        expected = chosen(x).quantiles
        with chosen.folded():
            torch.testing.assert_close(chosen(x).quantiles, expected)


def test_the_checkpoint_knows_its_layer(tmp_path: Path) -> None:
    chosen = model({"name": "multihead", "num_kv_heads": 2})
    zoo.save_model(chosen, tmp_path / "model.safetensors")
    (loaded, _), x = zoo.load_model(tmp_path / "model.safetensors"), torch.randn(2, 64)
    torch.testing.assert_close(loaded.eval()(x).quantiles, chosen.eval()(x).quantiles)
    with pytest.raises(CheckpointError, match="no attention="):
        save_folder(chosen, tmp_path / "official")


def test_every_layer_works_or_says_why_not() -> None:
    x = torch.randn(2, 60)
    x[0, :30] = torch.nan
    working = []
    for name in LAYERS:
        try:
            found = model(name).eval()(x).quantiles
        except ZooError:
            continue
        assert found.isfinite().all(), name
        working.append(name)
    assert len(working) > 10


def test_layers_without_padding_are_refused() -> None:
    without = next(
        n for n, layer in LAYERS.items() if layer.supports.bidirectional and not layer.supports.padding
    )
    with pytest.raises(ConfigError, match=r"takes no padded rows|needs"):
        model(without)
