"""`attention=NAME`: other layers of the zoo among the atoms of AllScAIP."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from allscaip_small import SIZES, batch_of, frames, small_allscaip
from ase.build import molecule

import zoo
from domains.atoms.models.allscaip import AllScAIP
from domains.atoms.models.node_layer import among_groups, node_layer
from zoo.attention import Groups
from zoo.attention.layers import LAYERS
from zoo.config import compose
from zoo.errors import CheckpointError, ConfigError, UnknownName

CHOICES: list[str | dict[str, Any]] = [
    "gated",
    "linear",
    "sinks",
    "simplicial",
    "head_tokens",
    {"name": "moh", "shared_heads": 1, "routed_heads": 1},
    {"name": "multihead", "num_heads": 4, "num_kv_heads": 2},
]


def chosen(attention: str | dict[str, Any]) -> str:
    return attention if isinstance(attention, str) else attention["name"]


CHOSEN = pytest.mark.parametrize("attention", CHOICES, ids=chosen)


@CHOSEN
def test_a_batch_is_its_members_one_by_one(attention: str | dict[str, Any]) -> None:
    """Atoms that fill up a structure do not influence it."""
    model, members = small_allscaip(double=True, attention=attention), frames()
    kind = LAYERS[chosen(attention)]
    assert sum(type(module) is kind for module in model.modules()) == SIZES["num_layers"]
    together = model(batch_of(*members, double=True))
    alone = [model(batch_of(frame, double=True)) for frame in members]
    for name, value in together.items():
        torch.testing.assert_close(value, torch.cat([one[name] for one in alone]))


@CHOSEN
def test_the_order_of_atoms_does_not_matter(attention: str | dict[str, Any]) -> None:
    model, frame = small_allscaip(double=True, attention=attention), molecule("CH3OH")
    order = np.random.default_rng(1).permutation(len(frame))
    there, back = (model(batch_of(atoms, double=True)) for atoms in (frame, frame[order]))
    torch.testing.assert_close(back["energy"], there["energy"])
    torch.testing.assert_close(back["forces"], there["forces"][torch.from_numpy(order)])


@pytest.mark.parametrize("attention", ["gated", "linear"])
def test_forces_are_the_slope_of_the_energy_through_the_layer(attention: str) -> None:
    model, frame, step = small_allscaip(double=True, attention=attention), frames()[0], 1e-5
    forces = model(batch_of(frame, double=True))["forces"].detach()
    moved = [frame.copy(), frame.copy()]
    for sign, atoms in zip((1, -1), moved, strict=True):
        atoms.positions[1, 2] += sign * step
    with torch.no_grad():
        up, down = model(batch_of(*moved, double=True))["energy"]
    assert float((down - up) / (2 * step)) == pytest.approx(float(forces[1, 2]), rel=1e-5, abs=1e-7)


@CHOSEN
def test_a_step_of_training_through_energy_and_forces(attention: str | dict[str, Any]) -> None:
    """Forces are derivatives: the layer is differentiated twice."""
    model, batch = small_allscaip(attention=attention).train(), batch_of(*frames())
    optimizer, losses = torch.optim.SGD(model.parameters(), 1e-5), []
    for _ in range(2):
        out = model(batch)
        loss = out["energy"].square().sum() + out["forces"].square().sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    inside = [p.grad for name, p in model.named_parameters() if "node_attention.layer" in name]
    assert inside
    assert all(grad is not None and bool(grad.isfinite().all()) for grad in inside)
    assert losses[1] < losses[0]


def test_a_swapped_model_is_saved_and_rebuilt(tmp_path: Path) -> None:
    model, batch = small_allscaip(attention={"name": "gated", "gate": "headwise"}), batch_of(*frames())
    zoo.save_model(model, tmp_path / "model.safetensors")
    loaded, _ = zoo.load_model(tmp_path / "model.safetensors")
    torch.testing.assert_close(loaded.eval()(batch), model(batch))
    with pytest.raises(CheckpointError, match="attention="):
        zoo.to_official(model)


def test_a_layer_among_groups_compiles_whole() -> None:
    torch._dynamo.reset()
    layer, groups = node_layer("gated", 16, 2), Groups(torch.tensor([0, 0, 1, 1, 1, 2, 2, 2, 2, 2, 2]))
    x = torch.randn(11, 16)
    compiled = torch.compile(among_groups, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(layer, x, groups), among_groups(layer, x, groups))


def test_drawing_a_layer_to_try_it_changes_no_random_number() -> None:
    drawn = []
    for attention in (None, "linear"):
        torch.manual_seed(0)
        options: dict[str, Any] = SIZES | {"num_frequencies": None, "attention": attention}
        model = zoo.create_model("allscaip_mini", **options)
        assert isinstance(model, AllScAIP)
        drawn.append(model.network.embedding.atom.weight)
    assert torch.equal(*drawn)


@pytest.mark.parametrize(
    ("attention", "message"),
    [
        ("gatde", "Did you mean 'gated'"),
        ("gla", "'gla' is not bidirectional"),
        ({"name": "local", "window": 3}, "depends on the order of its tokens.*multihead"),
        ({"name": "multihead", "rope_theta": 100.0}, "depends on the order"),
        ({"name": "agent", "agents": 4}, "no padding among what it supports, but structures.*gated"),
        ({"name": "kdgqa", "num_kv_heads": 2}, "no batch_invariant.*gated"),
        ({"name": "gated", "gates": 1}, "has no argument 'gates'"),
    ],
)
def test_what_cannot_stand_there_is_told(attention: str | dict[str, Any], message: str) -> None:
    with pytest.raises((ConfigError, UnknownName), match=message):
        zoo.create_model("allscaip_mini", **SIZES, attention=attention)


def test_attention_among_atoms_is_needed_to_be_exchanged() -> None:
    with pytest.raises(ConfigError, match="use_node_path=False"):
        zoo.create_model("allscaip_mini", **SIZES, use_node_path=False, attention="gated")


def test_the_config_takes_a_name_or_keys() -> None:
    config = compose(
        "train",
        [
            "domain=atoms",
            "model=allscaip_mini",
            "model.attention.name=gated",
            "model.attention.gate=headwise",
        ],
    )
    assert config.model.attention == {"name": "gated", "gate": "headwise"}
