"""Synthetic tasks that tell attention mechanisms apart in minutes: generators, a small model, a trainer."""

from __future__ import annotations

from zoo.bench.synthetic.base import IGNORED, Examples, Task
from zoo.bench.synthetic.copying import SelectiveCopy
from zoo.bench.synthetic.listops import ListOps
from zoo.bench.synthetic.needle import Needle
from zoo.bench.synthetic.parity import Parity
from zoo.bench.synthetic.recall import MQAR, Induction

TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        MQAR(),
        SelectiveCopy(context=64, data=8),
        Induction(length=64, lengths=(64, 256, 1024, 4096)),
        Needle(length=64, lengths=(64, 256, 1024), depths=(0.0, 0.5, 1.0)),
        ListOps(),
        Parity(),
    )
}
"""With the sizes that `zoo bench suite=attention` trains, in a minute or two each. The published ones are the
defaults of the classes (of `ListOps`, in its description)."""

__all__ = [
    "IGNORED",
    "MQAR",
    "TASKS",
    "Examples",
    "Induction",
    "ListOps",
    "Needle",
    "Parity",
    "SelectiveCopy",
    "Task",
]
