"""Any attention layer of the zoo in place of a model's own."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from torch import Tensor, nn

import zoo
from zoo.attention import AttentionError
from zoo.attention.layers import LAYERS, auxiliary_loss, create_attention
from zoo.config import compose
from zoo.errors import CheckpointError, ConfigError, UnknownName
from zoo.training.task import Task, new_model
from zoo.weights.checkpoint import save_model

N, P, Q, DAY = 8, 8, 8, 24
SIZES: dict[str, Any] = {"num_nodes": N, "history": P, "horizon": Q, "steps_per_day": DAY}
GMAN: dict[str, Any] = {"num_heads": 4, "head_dim": 4}
ST_LLM: dict[str, Any] = {"width": 48, "num_heads": 4, "llm_layers": 2, "trainable_layers": None}
NEEDED: dict[str, dict[str, Any]] = {
    "cca": {"num_kv_heads": 2, "rotary_factor": 1.0},
    "dgqa": {"num_kv_heads": 2},
    "hcam": {"chunk_size": 4, "k": 1},
    "kdgqa": {"num_kv_heads": 2},
    "local": {"window": 3},
    "mla": {"kv_rank": 8},
    "moh": {"shared_heads": 1, "routed_heads": 2},
    "moh_aggregated": {"shared_heads": 1, "routed_heads": 2},
    "moh_cosine": {"shared_heads": 1, "routed_heads": 2},
    "neighbourhood": {"kernel": 3},
    "pgqa": {"num_kv_heads": 2},
    "s2": {"num_groups": 2},
    "shifted_window": {"window": 4},
    "tpla": {"kv_rank": 8},
}
"""Arguments without a default, and sizes that fit 8 tokens and 4 heads."""


def layers(direction: str) -> pytest.MarkDecorator:
    return pytest.mark.parametrize(
        "name", sorted(n for n, c in LAYERS.items() if getattr(c.supports, direction))
    )


def choice(name: str) -> dict[str, Any]:
    return {"name": name, **NEEDED.get(name, {})}


def window(batch: int = 3) -> tuple[Tensor, Tensor]:
    start = torch.randint(0, 7 * DAY, (batch, 1)) + torch.arange(P + Q)
    return torch.randn(batch, P, N), torch.stack([start // DAY % 7, start % DAY], -1)


def learns(model: nn.Module) -> None:
    x, time = window()
    forecast = model(x, time)
    assert forecast.shape == (3, Q, N)
    forecast.square().sum().backward()
    used = [p for n, p in model.named_parameters() if "attention" in n or ".layer." in n]
    assert used
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in used)


@layers("bidirectional")
def test_gman_takes_it_over_the_sensors(name: str) -> None:
    learns(zoo.create_model("gman", **SIZES, **GMAN, attention=choice(name)))


@layers("causal")
def test_gman_takes_it_over_the_steps(name: str) -> None:
    learns(zoo.create_model("gman", **SIZES, **GMAN, causal=True, temporal_attention=choice(name)))


@layers("causal")
def test_st_llm_takes_it(name: str) -> None:
    learns(zoo.create_model("st_llm", **SIZES, **ST_LLM, attention=choice(name)))


def test_temporal_attention_follows_the_causal_option() -> None:
    model = zoo.create_model("gman", **SIZES, **GMAN, causal=True, temporal_attention="gated")
    assert model.encoder[0].temporal.layer.causal
    model = zoo.create_model("gman", **SIZES, **GMAN, temporal_attention="gated")
    assert not model.encoder[0].temporal.layer.causal


def test_arguments_of_the_mapping_win(tmp_path: Path) -> None:
    chosen = {"name": "multihead", "num_heads": 2, "num_kv_heads": 1, "causal": False}
    model = zoo.create_model("st_llm", **SIZES, **ST_LLM, attention=chosen).eval()
    layer = model.gpt2.blocks[0].attention
    assert (layer.num_heads, layer.num_kv_heads, layer.causal) == (2, 1, False)
    save_model(model, tmp_path / "model.safetensors")
    again = zoo.create_model("st_llm", checkpoint_path=tmp_path / "model.safetensors").eval()
    inputs = window()
    torch.testing.assert_close(again(*inputs), model(*inputs))


def test_a_swapped_model_compiles_without_graph_breaks() -> None:
    torch._dynamo.reset()
    model = zoo.create_model("gman", **SIZES, **GMAN, norm=False, attention="gated").eval()
    inputs = window()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(*inputs), model(*inputs))


@pytest.mark.parametrize(
    ("message", "attention"),
    [
        ("Did you mean 'gated'", "gatde"),
        ("Did you mean 'num_kv_heads'", {"name": "multihead", "num_kvheads": 2}),
        ("needs kv_rank", "mla"),
        ("'gla' is not bidirectional", "gla"),
    ],
)
def test_a_wrong_choice_is_named(message: str, attention: str | dict[str, Any]) -> None:
    with pytest.raises((ConfigError, UnknownName, AttentionError), match=message):
        zoo.create_model("gman", **SIZES, **GMAN, attention=attention)


def test_what_does_not_go_together_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="spatial_groups"):
        zoo.create_model("gman", **SIZES, **GMAN, attention="gated", spatial_groups=2)
    with pytest.raises(ConfigError, match="trainable_layers=null"):
        zoo.create_model("st_llm", **SIZES, **(ST_LLM | {"trainable_layers": 1}), attention="gated")
    model = zoo.create_model("st_llm", **SIZES, **ST_LLM, attention="gated")
    with pytest.raises(CheckpointError, match="attention"):
        zoo.to_official(model)
    with pytest.raises(CheckpointError, match="attention"):
        model.load_backbone(tmp_path / "gpt2.safetensors")


def test_config_takes_a_name_a_mapping_or_keys() -> None:
    def chosen(*overrides: str) -> Any:
        return compose("train", ["domain=traffic", "model=gman", *overrides]).model.attention

    assert chosen("model.attention=gated") == "gated"
    assert chosen("model.attention={name: mla, kv_rank: 8}") == {"name": "mla", "kv_rank": 8}
    assert chosen("model.attention.name=mla", "model.attention.kv_rank=8") == {"name": "mla", "kv_rank": 8}
    with pytest.raises(ConfigError, match=r"model\.attention\.kv_rank"):
        chosen("model.attention.name=mla", "model.attention.kv_rnak=8")


@pytest.mark.parametrize("name", ["st_llm", "st_link"])
def test_the_configs_that_train_from_scratch_freeze_nothing(name: str) -> None:
    config = compose("train", ["domain=traffic", f"model={name}", "model.width=48", "model.num_nodes=null"])
    data: Any = SimpleNamespace(model_kwargs=lambda: SIZES)
    model = new_model(config, data)
    assert model.num_nodes == N  # null where the data decide leaves it to them; elsewhere it is a value
    assert all(p.requires_grad for p in model.parameters())


def changed(before: Tensor, after: Tensor, axis: int) -> list[int]:
    """Places along an axis of `[B, S, N, D]` where the two differ."""
    others = [i for i in range(before.ndim) if i != axis]
    return (before != after).float().amax(others).nonzero()[:, 0].tolist()


def test_attention_over_sensors_stays_in_a_step_and_over_steps_in_a_sensor() -> None:
    chosen = {"attention": "multihead", "temporal_attention": "multihead"}
    model = zoo.create_model("gman", **(SIZES | {"history": 5}), **GMAN, **chosen).eval()
    block, h = model.encoder[0], torch.randn(2, 5, N, 16)
    embedding = model.embedding(torch.zeros(2, 5, 2, dtype=torch.long))
    other = h.clone()
    other[:, 1, 3] += 1
    spatial, temporal = (
        [part(x, embedding, None) for x in (h, other)] for part in (block.spatial, block.temporal)
    )
    assert changed(*spatial, axis=1) == [1]
    assert changed(*spatial, axis=2) == list(range(N))
    assert changed(*temporal, axis=1) == list(range(5))
    assert changed(*temporal, axis=2) == [3]


def test_training_minimises_the_auxiliary_loss_too(monkeypatch: pytest.MonkeyPatch) -> None:
    class Plain(Task):
        def loss(self, batch: Tensor, stage: str) -> tuple[Tensor, Tensor]:
            return self.model(batch).square().sum(), torch.tensor(1.0)

    monkeypatch.setattr(Task, "log", lambda *_, **__: None)
    monkeypatch.setattr(Task, "_global_mean", lambda self, total, count: total / count)
    layer = create_attention({"name": "moh", "shared_heads": 1, "routed_heads": 2}, 16, num_heads=4)
    x = torch.randn(2, 5, 16)
    loss = Plain(layer, OmegaConf.create()).training_step(x, 0)
    expected = layer(x).square().sum() + auxiliary_loss(layer)
    assert auxiliary_loss(layer) == 0
    torch.testing.assert_close(loss, expected)
    assert loss > layer(x).square().sum()
