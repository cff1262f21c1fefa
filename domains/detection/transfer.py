"""Starting a detector from trained weights: the same classes, or new heads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from domains.detection.annotations import skeleton_facts
from domains.detection.keypoints import default_skeleton
from domains.detection.weights.classes import CLASSES, HEADS, IDS, coco_ids, coco_names
from zoo.cli.console import console
from zoo.create import create_model
from zoo.registry import model_signature
from zoo.weights.checkpoint import load_state, read_checkpoint

if TYPE_CHECKING:
    from domains.detection.data import DetectionData


def official_facts(model: nn.Module) -> dict[str, Any]:
    """The `extra()` of weights that carry none: class numbers are category ids of COCO, 80 its classes in
    order."""
    count = cast(Any, model).num_classes
    points = getattr(model, "num_keypoints", None)
    names = [None, "person"] if points and count == 2 else coco_names() if count in (IDS, CLASSES) else None
    classes = names or [str(i) for i in range(count)]
    ids = [None if name is None else i for i, name in enumerate(classes)]
    if count == CLASSES:
        ids = coco_ids()
        classes = [classes[i] for i in ids]
    kind = points and default_skeleton(points)
    return {
        "data": None,
        "classes": classes,
        "category_ids": ids,
        "skeleton": skeleton_facts(kind) if kind else None,
    }


def transfer(path: Path, data: DetectionData) -> nn.Module:
    """The model of a checkpoint for other data; says what was taken over.

    Where the data have the classes of the checkpoint, these keep their numbers. Otherwise the class heads
    are new but for the rows of classes of the same name; with other keypoints, what depends on their number
    is new.
    """
    state, meta = read_checkpoint(path)
    built = meta["model"]
    name = f"{built['domain']}/{built['name']}"
    facts = meta["extra"]
    known: Sequence[str | None] = facts.get("classes") or ()
    same = {name for name in known if name} == set(data.classes)
    if same:
        data.number_classes(known)
    signature = model_signature(name)
    given = {key: value for key, value in data.model_kwargs().items() if key in signature}
    model = create_model(name, **(built["config"] | given))
    own = model.state_dict()
    other = [key for key, value in state.items() if key in own and own[key].shape != value.shape]
    heads = [] if same else [key for key in state if HEADS in key and key in own]
    report = load_state(model, state, skip=sorted({*other, *heads}), source=str(path))
    if not same:
        _say_classes(_take_rows(model, state, heads, known, data.classes), data.classes)
    console.print(report)
    return model


def _take_rows(
    model: nn.Module,
    state: Mapping[str, Tensor],
    heads: Sequence[str],
    known: Sequence[str | None],
    classes: Sequence[str],
) -> list[str]:
    """Copy the rows of classes that are known by name; which these are."""
    shared = [name for name in classes if name in known]
    rows = [classes.index(name) for name in shared], [known.index(name) for name in shared]
    own = model.state_dict()
    with torch.no_grad():
        for key in heads:
            if len(state[key]) == len(known):
                own[key][rows[0]] = state[key][rows[1]].to(own[key])
    return shared


def _say_classes(shared: Sequence[str], classes: Sequence[str]) -> None:
    new = [name for name in classes if name not in shared]
    taken = f"{len(shared)} taken over ({', '.join(shared[:6])})" if shared else "none taken over"
    fresh = f", {len(new)} start anew ({', '.join(new[:6])})" if new else ""
    console.print(
        f"Class heads, {len(classes)} classes: {taken}{fresh}", highlight=False, soft_wrap=True, markup=False
    )
