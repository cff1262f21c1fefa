"""Trained classifiers on other classes: what the head keeps."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from zoo.cli.console import console
from zoo.training.finetune import starting_point
from zoo.weights.checkpoint import read_checkpoint


def transfer(path: str | Path, data: Any) -> nn.Module:
    """The classifier of a checkpoint, made for the classes of `data`; says what was taken over.

    A class keeps its row of the head by its name, whatever its number; new classes start anew. Where the
    checkpoint knows no names, a head for as many classes is taken over as it is.
    """
    model, report = starting_point(path, data.model_kwargs())
    console.print(report)
    state, meta = read_checkpoint(path)
    old, new = meta["extra"].get("classes"), list(data.class_names)
    if old is None:
        kept = next((name in report.loaded for name in classifiers(model)), False)
        console.print(
            "The checkpoint names no classes: "
            + ("its head is taken over class by class." if kept else "the head starts anew."),
            highlight=False,
        )
    elif old != new:
        known = carry_classes(model, state, old, new)
        console.print(
            f"{len(known)} of {len(new)} classes are in the checkpoint and keep their rows of the head"
            + (f": {', '.join(known[:5])}{', ...' if len(known) > 5 else ''}." if known else "."),
            highlight=False,
        )
    return model


def classifiers(model: nn.Module) -> list[str]:
    """Names of the weights that have a row for each class."""
    cfg: Any = model.pretrained_cfg
    named = cfg["classifier"]
    return [f"{name}.weight" for name in ([named] if isinstance(named, str) else named)]


@torch.no_grad()
def carry_classes(
    model: nn.Module, state: dict[str, Tensor], old: Sequence[str], new: Sequence[str]
) -> list[str]:
    """Set the rows of the classifiers: those of `state` for classes known by name, else freshly drawn.

    Returns:
        The names of the classes known.
    """
    place = {name: i for i, name in enumerate(old)}
    known = [name for name in new if name in place]
    rows = torch.tensor([new.index(name) for name in known], dtype=torch.long)
    source = torch.tensor([place[name] for name in known], dtype=torch.long)
    for weight in classifiers(model):
        for name in (weight, weight.removesuffix("weight") + "bias"):
            parameter = model.get_parameter(name)
            if name == weight:
                nn.init.trunc_normal_(parameter, std=0.02)
            else:
                nn.init.zeros_(parameter)
            if name in state and len(state[name]) == len(old):
                parameter.index_copy_(0, rows, state[name].index_select(0, source).to(parameter))
    return known
