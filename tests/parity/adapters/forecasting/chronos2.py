"""Chronos-2: the model, its training step and its checkpoints."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

import zoo
from domains.forecasting.models.chronos2 import Chronos2
from domains.forecasting.models.groups import RowGroups
from domains.forecasting.models.patches import patches
from domains.forecasting.weights import ADAPTER_PREFIX, merged
from parity.adapters.forecasting import chronos2_pipeline
from parity.fixture import EXTERNAL, Fixture, NoAdapter, drawn, official_gradients
from zoo.attention import capture

Computed = tuple[dict[str, Tensor], dict[str, Any]]


def run(fixture: Fixture) -> Computed:
    variant = fixture.spec["variant"]
    parts = {
        "fixed-batch training": _training,
        "LoRA adapter": _adapter,
        "operators": chronos2_pipeline.operators,
        "pipeline level": chronos2_pipeline.cases,
        "data-frame interface": chronos2_pipeline.frames,
    }
    if variant.startswith("checkpoint files"):
        return _checkpoint(fixture), {}
    if variant in parts:
        return parts[variant](fixture), {}
    return _model(fixture), {}


ADAPTERS = {"chronos2": run}


def built(fixture: Fixture) -> Chronos2:
    model = zoo.from_official("chronos2", fixture.state_dict(), **fixture.spec["config"])
    assert isinstance(model, Chronos2)
    return model


def _inputs(fixture: Fixture) -> dict[str, Any]:
    names = ("context", "group_ids", "future_covariates", "context_mask", "future_covariates_mask")
    given = {name: fixture.tensors.get(f"input/{name}") for name in names}
    stated = fixture.spec["inputs"]
    count = stated.get("num_output_patches") if isinstance(stated, dict) else 2
    return given | {"num_output_patches": count}


def _model(fixture: Fixture) -> dict[str, Tensor]:
    model, inputs = built(fixture), _inputs(fixture)
    (projection,) = fixture.inputs("projection")
    targets = {key: fixture.tensors.get(f"input/{key}") for key in ("future_target", "future_target_mask")}
    result = model(**inputs, **targets)
    (result.normalised * projection).sum().backward()
    out = {
        "output/quantile_preds": result.quantiles,
        "output/normalised_preds": result.normalised,
        "output/loc": result.loc,
        "output/scale": result.scale,
        "loss/total": result.loss[None],
    }
    gradients = official_gradients(model)
    with torch.no_grad():
        out |= _inner(model, inputs) | _maps(model, inputs)
    out |= gradients
    return {name: _corner(value, fixture.tensors.get(name)) for name, value in out.items()}


def _inner(model: Chronos2, inputs: dict[str, Any]) -> dict[str, Tensor]:
    """Streams between the layers, rows first."""
    found: dict[str, Tensor] = {}
    hooks = [
        block.layer[i].register_forward_hook(_keep(found, f"output/block{number}_{part}"))
        for number, block in enumerate(model.encoder.block)
        for i, part in enumerate(("time", "group", "ff"))
    ]
    encoding = model.encode(**inputs)
    for hook in hooks:
        hook.remove()
    count = inputs["num_output_patches"]
    embedded = model.embed(inputs["context"], None, inputs["future_covariates"], None, count)
    tokens, size = embedded.tokens.transpose(0, 1), model.patch_size
    past = tokens.shape[1] - count - 1
    context = inputs["context"][:, -model.context_length :]
    z = ((context - embedded.loc) / embedded.scale).asinh()
    values = patches(z, size, size, fill=torch.nan)
    time = torch.arange(-past * size, 0).view(1, past, size) / model.time_encoding_scale
    features = [time.expand_as(values), values.nan_to_num(), (~values.isnan()).float()]
    return found | {
        "output/last_hidden_state": encoding.tokens,
        "output/embed_context": tokens[:, :past],
        "output/embed_future": tokens[:, -count:],
        "output/patched_context": torch.cat(features, -1),
        "output/attention_mask": embedded.seen.T[:, :past].float(),
    }


def _keep(found: dict[str, Tensor], name: str):
    def record(module: nn.Module, args: Any, result: Tensor) -> None:
        found[name] = result.transpose(0, 1)

    return record


def _maps(model: Chronos2, inputs: dict[str, Any]) -> dict[str, Tensor]:
    """Weights of the first block; a row that sees nothing spreads over the batch outside of the map."""
    with capture(model) as maps:
        model(**inputs)
    rows = maps["encoder.block.0.layer.1.self_attention"].weights
    seen = model.embed(inputs["context"], None, None, None, inputs["num_output_patches"]).seen
    visible = RowGroups.of(inputs["group_ids"]).any(seen)[:, None, :, None]
    return {
        "output/time_attn_block0": maps["encoder.block.0.layer.0.self_attention"].weights,
        "output/group_attn_block0": torch.where(visible, rows, 1 / rows.shape[-1]),
    }


def _corner(value: Tensor, expected: Tensor | None) -> Tensor:
    """What the fixture keeps: the last tokens of a stream, the first rows and columns of a gradient."""
    if expected is None or value.shape == expected.shape:
        return value
    if value.ndim == 3:
        return value[:, -expected.shape[1] :]
    return value[: expected.shape[0], : expected.shape[1]]


def _training(fixture: Fixture) -> dict[str, Tensor]:
    """Five steps of AdamW on one batch, the rate falling linearly to 0."""
    model, inputs = built(fixture).train(), _inputs(fixture)
    told = fixture.spec["training"]
    (target,) = fixture.inputs("future_target")
    optimizer = torch.optim.AdamW(model.parameters(), lr=told["lr"], weight_decay=0.0)
    losses, norms = [], []
    for step in range(told["steps"]):
        optimizer.param_groups[0]["lr"] = told["lr"] * (1 - step / told["steps"])
        loss = model(**inputs, future_target=target).loss
        optimizer.zero_grad()
        loss.backward()
        norms.append(nn.utils.clip_grad_norm_(model.parameters(), told["clip_norm"]))
        optimizer.step()
        losses.append(loss)
    result = model.eval()(**inputs, future_target=target)
    return {
        "loss/total": torch.stack([*losses, result.loss]),
        "output/grad_norm": torch.stack(norms),
        "output/quantile_preds": result.quantiles,
        "output/reg_embedding": model.shared.weight,
    }


def _adapter(fixture: Fixture) -> dict[str, Tensor]:
    told = fixture.spec["adapter"]
    tensors = {
        key: torch.from_numpy(drawn(key, tuple(shape), 1.0 if "lora_A" in key else 0.5))
        for key, shape in told["keys"].items()
    }
    assert all(key.startswith(ADAPTER_PREFIX) for key in tensors)
    model, inputs = built(fixture), _inputs(fixture)
    adapted = copy.deepcopy(model)
    adapted.load_state_dict(merged(model.state_dict(), tensors, told["config"], source="the fixture"))
    with torch.no_grad():
        base, result = model(**inputs), adapted(**inputs)
    return {
        "output/base_preds": base.quantiles,
        "output/quantile_preds": result.quantiles,
        "output/normalised_preds": result.normalised,
    }


def _checkpoint(fixture: Fixture) -> dict[str, Tensor]:
    folder = (EXTERNAL.parent / fixture.spec["config"]).parent
    if not folder.is_dir():
        raise NoAdapter(f"there is no {folder}")
    return chronos2_pipeline.checkpoint(fixture, folder)
