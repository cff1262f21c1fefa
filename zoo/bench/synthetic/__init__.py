"""Synthetic tasks that tell attention mechanisms apart in minutes: generators, a small model, a trainer."""

from __future__ import annotations

from zoo.bench.synthetic.base import IGNORED, Examples, Task
from zoo.bench.synthetic.copying import SelectiveCopy
from zoo.bench.synthetic.listops import ListOps
from zoo.bench.synthetic.needle import Needle
from zoo.bench.synthetic.parity import Parity
from zoo.bench.synthetic.recall import MQAR, Induction

TASKS: dict[str, Task] = {
    "mqar": MQAR(),
    "mqar_small": MQAR(32, 32, 4),
    "selective_copy": SelectiveCopy(8, 16, 4),
    "induction": Induction(16, 32, (32, 128, 512)),
    "needle": Needle(32, lengths=(32, 128, 512), depths=(0.0, 0.5, 1.0)),
    "listops": ListOps(),
    "parity": Parity(16, (16, 32, 64)),
}
"""With the sizes that `zoo bench suite=attention` trains: seconds each, a minute or more of `mqar` and
`listops`. The published ones are the defaults of the classes (of `ListOps`, in its description)."""

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
