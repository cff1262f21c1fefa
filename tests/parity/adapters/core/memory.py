"""Memories in place of attention: trained slots (GAM), and weights that learn at test time (Titans)."""

from __future__ import annotations

import torch

from parity.adapters.core.heads import Result, _layer, _with_gradients
from parity.fixture import Fixture
from zoo.attention.layers.associative import GatedAssociativeBlock
from zoo.attention.layers.titans import NeuralMemory


def _gam(fixture: Fixture) -> Result:
    config = fixture.spec["config"]
    layer = GatedAssociativeBlock(config["n_embed"], slots=config["slots"], kernel=config["kernel"])
    return _layer(fixture, layer)


def _titans(fixture: Fixture) -> Result:
    config = fixture.spec["config"]
    layer = NeuralMemory(
        config["dim"],
        config["heads"],
        head_dim=config.get("dim_head"),
        chunk_size=config["chunk_size"],
        batch_size=config["batch_size"],
        depth=config["depth"],
        expansion=config["expansion_factor"],
        norm_residual=config["mem_model_norm_add_residual"],
        momentum=config["momentum"],
        max_lr=config["default_step_transform_max_lr"],
    )
    state = {name: torch.from_numpy(array) for name, array in fixture.state_dict().items()}
    templates = [name for name in state if name.startswith("memory_model.")]
    layer.load_state_dict({name: tensor for name, tensor in state.items() if name not in templates})
    x = fixture.tensors["input/x"].requires_grad_()
    out, after = layer.run(x, layer.initial(x))
    cache = layer.init_cache(len(x))
    steps = [layer.step(x[:, i : i + 1], cache) for i in range(x.shape[1])]
    torch.testing.assert_close(torch.cat(steps, dim=1), out, atol=1e-5, rtol=1e-4)
    memories = {f"memory_{i}": weight.flatten(0, 1) for i, weight in enumerate(after.weights)}
    leaves = {f"param.{name}": weight for name, weight in layer.named_parameters()} | {"x": x}
    return _with_gradients(fixture, {"o": out} | memories, leaves), {}


ADAPTERS = {"gam_block": _gam, "titans": _titans}
