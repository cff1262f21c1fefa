"""What the adapters of all families share."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from parity.fixture import Fixture, official_gradients

SMOOTHED = ("BiFormer", "EfficientViT")
"""Models whose published classifiers are held to cross entropy with labels smoothed by 0.1."""


def loss_and_gradients(
    fixture: Fixture, out: dict[str, Tensor], module: nn.Module, official: dict[str, str] | None = None
) -> dict[str, Tensor]:
    """`loss/total` and `grad/*` where the fixture has them.

    Integer targets mean cross entropy of the logits, others the mean squared error of the output, none the
    mean of its squares.

    Args:
        official: our parameter names -> those of the reference, for a module that the zoo has no layout for.
    """
    if "loss/total" not in fixture.tensors:
        return {}
    target = fixture.tensors.get("input/target")
    pred = out.get("output/logits", out.get("output/out"))
    assert pred is not None, "the loss is of logits or of out"
    if target is None:
        loss = pred.square().mean()
    elif target.is_floating_point():
        loss = F.mse_loss(pred, target)
    else:
        published = fixture.model in SMOOTHED and pred.shape[-1] == 1000
        smoothing = 0.1 if published else 0.0
        loss = F.cross_entropy(pred, target.long(), label_smoothing=smoothing)
    loss.backward()
    if official is None:
        gradients = official_gradients(module)
    else:
        shapes = {name: entry["shape"] for name, entry in fixture.spec["state_dict"].items()}
        gradients = {
            f"grad/{official[n]}": p.grad.reshape(shapes[official[n]])
            for n, p in module.named_parameters()
            if p.grad is not None
        }
    return {"loss/total": loss} | _of_parameters(gradients, fixture)


def _of_parameters(gradients: dict[str, Tensor], fixture: Fixture) -> dict[str, Tensor]:
    """Some fixtures name gradients `grad/param.NAME`, and have that of the input."""
    named = gradients | {name.replace("grad/", "grad/param.", 1): g for name, g in gradients.items()}
    return {name: g for name, g in named.items() if name in fixture.tensors}


@contextmanager
def recorded(model: nn.Module, names: dict[str, str]) -> Iterator[dict[str, Tensor]]:
    """The outputs of modules (our names) under the fixture's names."""
    out: dict[str, Tensor] = {}

    def keep(key: str):
        def hook(_module: nn.Module, _args: tuple, result: Tensor) -> None:
            out[key] = result

        return hook

    hooks = [model.get_submodule(name).register_forward_hook(keep(key)) for name, key in names.items()]
    try:
        yield out
    finally:
        for hook in hooks:
            hook.remove()


def image(fixture: Fixture) -> Tensor:
    (x,) = fixture.inputs("x")
    return x.to(torch.float32)
