"""Low-rank updates act in models that read weights instead of calling layers, as much as in the others."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from torch import Tensor, nn

from zoo.create import create_model
from zoo.registry import get_domain
from zoo.training.finetune import adapt, merge_lora

MODELS: dict[str, dict[str, Any]] = {
    "vision/biformer_digits": {},
    "vision/agent_deit_tiny": {"num_classes": 3},
    "traffic/st_link": {"history": 4, "horizon": 3, "num_nodes": 6},
    "superres/catanet_mini": {},
    "superres/dlgsanet_mini": {},
    "atoms/escaip_mini": {},
    "atoms/allscaip_mini": {},
    "detection/group_detr_mini": {},
    "detection/group_pose_mini": {},
}


def outputs(model: nn.Module, inputs: tuple[Any, ...]) -> list[Tensor]:
    found = model(*inputs)
    parts = found.values() if isinstance(found, dict) else found if isinstance(found, tuple) else [found]
    return [part for part in parts if isinstance(part, Tensor)]


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("grad", [True, False], ids=["training", "inference"])
def test_every_update_counts(name: str, grad: bool) -> None:
    pytest.importorskip("peft")
    torch.manual_seed(0)
    domain = get_domain(name.partition("/")[0])
    sizes = domain.example_sizes | MODELS[name]
    model = create_model(name, **sizes).eval()
    inputs = domain.load("example_inputs")(**sizes)
    with torch.set_grad_enabled(grad):
        before = outputs(model, inputs)
        lora = {"r": 2, "alpha": 4, "dropout": 0.0, "target": None}
        adapt(model, OmegaConf.create({"method": "lora", "freeze": [], "lora": lora, "probe": {}}))
        model.eval()
        for update, value in model.named_parameters():
            if "lora_B" in update:
                nn.init.normal_(value)
        adapted = outputs(model, inputs)
        merge_lora(model)
        merged = outputs(model, inputs)
    assert any((x - y).abs().max() > 1e-3 * x.abs().max() for x, y in zip(before, adapted, strict=True))
    for x, y in zip(adapted, merged, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-3, atol=1e-3 * y.abs().amax().item())
