"""NCPP: scores, what happens in the attention of every group, loss and gradients."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import zoo
from domains.forecasting.hardware.weights import NUMERIC_NAMES
from domains.forecasting.models.ncpp import NCPP
from parity.fixture import Fixture, official_gradients
from zoo.attention import capture


def run(fixture: Fixture) -> tuple[dict[str, Tensor], dict[str, Any]]:
    model = zoo.from_official("forecasting/ncpp", fixture.state_dict(), **fixture.spec["config"])
    assert isinstance(model, NCPP)
    numbers, codes = _inputs(fixture)
    (target,) = fixture.inputs("target")
    found = _hooked(model)
    with capture(model) as maps:
        prediction = model(numbers, codes)
    loss = F.huber_loss(prediction, target)
    loss.backward()
    out = {"output/prediction": prediction, "loss/total": loss[None], **found}
    for ours, official in _blocks(model).items():
        out[f"output/{official}_attn_weights"] = maps[ours].weights
    return out | official_gradients(model), {"parameters": _count(model)}


ADAPTERS = {"ncpp": run}


def _count(model: NCPP) -> int:
    """As Keras counts, with the running statistics."""
    return sum(value.numel() for value in zoo.to_official(model).values())


def _inputs(fixture: Fixture) -> tuple[Tensor, Tensor]:
    """All numbers `(B, N)` and all characters `(B, L)`, of the groups that the fixture has."""
    numeric = [f"input/{name}_numer_input" for name in ("mem", "cpu", "system")]
    text = [f"input/{name}_char_input" for name in ("system", "workload")]
    rows = len(fixture.tensors["input/target"])
    numbers, codes = (
        [fixture.tensors[name][..., 0] for name in names if name in fixture.tensors]
        for names in (numeric, text)
    )
    return (
        torch.cat(numbers, 1) if numbers else torch.zeros(rows, 0),
        torch.cat(codes, 1) if codes else torch.zeros(rows, 0, dtype=torch.long),
    )


def _blocks(model: NCPP) -> dict[str, str]:
    """Name of each group's attention, and the prefix of what the fixture keeps of it."""
    text = {} if model.text_attention is None else {"text_attention": "char"}
    return text | {f"numeric_attention.{i}": NUMERIC_NAMES[name] for i, name in enumerate(model.numeric)}


def _hooked(model: NCPP) -> dict[str, Tensor]:
    """Filled by the next forward pass."""
    found: dict[str, Tensor] = {}
    for ours, official in _blocks(model).items():
        block = model.get_submodule(ours)
        block.norm.register_forward_hook(_keep(found, f"output/{official}_normed"))  # pyright: ignore
        block.out.register_forward_hook(_keep(found, f"output/{official}_attn_out"))  # pyright: ignore
    model.head.register_forward_pre_hook(lambda _, args: found.update({"output/group_mean": args[0]}))
    return found


def _keep(found: dict[str, Tensor], name: str):
    return lambda module, args, result: found.update({name: result})
