"""LWGANet: classifiers and dense-prediction backbones, as they are and fused for inference."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor

import zoo
from parity.adapters.vision.common import loss_and_gradients, recorded
from parity.fixture import Fixture


def lwganet(fixture: Fixture) -> tuple[dict[str, Tensor], dict[str, Any]]:
    with warnings.catch_warnings(action="ignore"):  # the licence
        model = zoo.from_official("lwganet_l0", fixture.state_dict(), **fixture.spec["config"])
    (x,) = fixture.inputs("x")
    facts = {"params": sum(p.numel() for p in model.parameters())}
    if model.features_only:
        maps = model(x)
        torch.testing.assert_close(model.fuse()(x), maps, atol=1e-4, rtol=1e-4)
        return {f"output/feat{i}": map for i, map in enumerate(maps)}, facts
    names = {"stem": "output/stage0_stem", "pre_head": "output/pre_logits"}
    names |= {f"stages.{i}": f"output/stage_idx{2 * i}" for i in range(4)}
    names |= {f"stages.{i}.0": f"output/stage_idx{2 * i - 1}" for i in range(1, 4)}
    with recorded(model, names) as out:
        out["output/logits"] = model(x)
    torch.testing.assert_close(model.fuse()(x), out["output/logits"], atol=1e-4, rtol=1e-4)
    return out | loss_and_gradients(fixture, out, model), facts


ADAPTERS = {"LWGANet": lwganet}
