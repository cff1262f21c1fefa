"""Traffic: GMAN (both TensorFlow programs), its PyTorch port, ST-LLM."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor, nn

import zoo
from parity.fixture import Fixture, NoAdapter, official_gradients

Computed = tuple[dict[str, Tensor], dict[str, Any]]


def run(fixture: Fixture) -> Computed:
    """Tensors under the fixture's names, and facts under the keys of its JSON."""
    programs = {"GMAN": _gman, "GMAN (PyTorch port)": _gman_port, "ST-LLM": _st_llm}
    if fixture.model not in programs:
        raise NoAdapter(f"no adapter for model {fixture.model!r} of domain 'traffic'")
    return programs[fixture.model](fixture)


def _gman(fixture: Fixture) -> Computed:
    model = zoo.from_official("gman", fixture.state_dict(), **fixture.spec["config"])
    out = _gman_outputs(model, fixture)
    (label,) = fixture.inputs("label")
    out["loss/total"] = masked_mae(out["output/pred"], label)
    out["loss/total"].backward()
    out |= official_gradients(model)
    if "loss/train_mode_total" in fixture.tensors:
        out |= _gman_training_step(model, fixture)
    return out, {"n_parameters_trainable": _trainable(model)}


def _gman_port(fixture: Fixture) -> Computed:
    model = zoo.from_official("gman_port", fixture.state_dict(), **fixture.spec["config"])
    out = _gman_outputs(model, fixture)
    (label,) = fixture.inputs("label")
    out["loss/masked_mae"] = masked_mae(out["output/pred"], label)
    out["loss/total"] = (out["output/pred"] - label).square().mean()
    out["loss/masked_mae"].backward()  # not the total, by which the port trains
    return out | official_gradients(model), {"n_parameters_trainable": _trainable(model)}


def _gman_outputs(model: nn.Module, fixture: Fixture) -> dict[str, Tensor]:
    (embedding,) = fixture.inputs("SE")
    model.get_buffer("embedding.spatial_embedding").copy_(embedding)
    inner = {"transform": "output/transform", "embedding": "output/ste"}
    for part in ("encoder", "decoder"):
        blocks = model.get_submodule(part)
        inner |= {f"{part}.{i}": f"output/{part}_{i}" for i in range(len(list(blocks.children())))}
    out: dict[str, Tensor] = {}
    hooks = [
        model.get_submodule(name).register_forward_hook(_recorder(out, key)) for name, key in inner.items()
    ]
    pred, scaled = _gman_prediction(model, fixture)
    for hook in hooks:
        hook.remove()
    return out | {"output/pred": pred, "output/pred_normalised": scaled}


def _recorder(out: dict[str, Tensor], key: str):
    def record(module: nn.Module, args: Any, result: Any) -> None:
        out[key] = result if isinstance(result, Tensor) else result.full()

    return record


def _gman_prediction(model: nn.Module, fixture: Fixture) -> tuple[Tensor, Tensor]:
    config = fixture.spec["config"]
    x, time = fixture.inputs("X", "TE")
    scaled = model(x, time.long())
    return scaled * config["std"] + config["mean"], scaled


def _gman_training_step(model: nn.Module, fixture: Fixture) -> dict[str, Tensor]:
    """One step of TensorFlow's Adam (whose epsilon enters before the bias correction) at global step 0."""
    model.train()
    model.zero_grad()
    model.set_norm_decay(0, 1)  # type: ignore[operator]
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3, eps=1e-8 / (1 - 0.999) ** 0.5)
    (label,) = fixture.inputs("label")
    loss = masked_mae(_gman_prediction(model, fixture)[0], label)
    loss.backward()
    optimizer.step()
    after = zoo.to_official(model).items()
    return {"loss/train_mode_total": loss} | {f"output/after_step/{name}": tensor for name, tensor in after}


def _st_llm(fixture: Fixture) -> Computed:
    model = zoo.from_official("st_llm", fixture.state_dict(), **fixture.spec["config"])
    x, label = fixture.inputs("x", "label")
    out: dict[str, Tensor] = {}
    hooks = [
        model.get_submodule("fusion").register_forward_hook(_recorder(out, "output/fused")),
        model.get_submodule("gpt2").register_forward_hook(_recorder(out, "output/llm")),
    ]
    out["output/pred"] = model.forward_official(x)  # type: ignore[operator]
    for hook in hooks:
        hook.remove()
    out["output/fused"] = out["output/fused"].transpose(1, 2)[..., None]
    scale, shift = _scaler(fixture)
    error = (out["output/pred"][..., 0] * scale + shift - label).abs()
    out["loss/total"] = error[label > 0].mean()
    out["loss/total"].backward()
    frozen = {name: p for name, p in model.named_parameters() if not p.requires_grad}
    unused_words = sum(
        torch.Size(entry["shape"]).numel()
        for name, entry in fixture.spec["state_dict"].items()
        if name == "gpt.gpt2.wte.weight"
    )
    facts = {
        "frozen_parameter_names": sorted(_official_names(model, frozen), key=_position(fixture)),
        "trainable_parameters": _trainable(model) + unused_words,
    }
    return out | official_gradients(model), facts


def _scaler(fixture: Fixture) -> tuple[float, float]:
    """The loss is stated as `mean |pred*STD+MEAN-label| over label>0`."""
    found = re.search(r"pred\*([\d.]+)\+([\d.]+)", fixture.spec["outputs"]["loss/total"])
    assert found is not None, "the fixture does not state the scaler of its loss"
    return float(found[1]), float(found[2])


def _official_names(model: nn.Module, tensors: dict[str, Tensor]) -> list[str]:
    return list(zoo.to_official(model, tensors))


def _position(fixture: Fixture):
    return list(fixture.spec["state_dict"]).index


def _trainable(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def masked_mae(pred: Tensor, label: Tensor) -> Tensor:
    """Zeros of the label count as missing."""
    present = (label != 0).float()
    return ((pred - label).abs() * present / present.mean()).mean()
