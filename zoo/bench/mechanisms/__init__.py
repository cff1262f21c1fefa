"""`zoo bench suite=attention`: the attention layers of the zoo on the same tasks, at the same cost measure.

Accuracy: one small token model, the same but for its attention, trained on each synthetic task by a fixed
number of steps. Cost: time and peak memory of a layer over the number of tokens, in the four patterns of
noncausal and causal, self and cross attention. Domains: the zoo's own models with their attention swapped.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from omegaconf import DictConfig

from zoo.attention import AttentionError
from zoo.bench.machine import machine
from zoo.bench.mechanisms.contestants import Contestant, contestants, lacking, several
from zoo.bench.mechanisms.cost import Limits, grown, patterns
from zoo.bench.mechanisms.domains import DOMAIN_TASKS, overrides, swapped
from zoo.bench.mechanisms.record import (
    BySeed,
    Cost,
    Entry,
    LeftOut,
    Record,
    Swapped,
    Trained,
    as_stored,
    opened,
)
from zoo.bench.mechanisms.report import Found
from zoo.bench.synthetic import MQAR, TASKS, Induction, ListOps, Needle, Parity, SelectiveCopy, Task
from zoo.bench.synthetic.train import Budget, learned
from zoo.cli.console import console
from zoo.errors import ConfigError, ZooError, did_you_mean

PARTS = (*TASKS, "cost", *DOMAIN_TASKS)
"""What `tasks=` chooses from."""
SHORT = Budget(dim=32, depth=1, steps=300, batch_size=32, examples=9600, lr=1e-2, tested=256)
BUDGETS = {
    "mqar": Budget(),
    "listops": Budget(dim=32, steps=600),
    "selective_copy": dataclasses.replace(SHORT, depth=2),
}
"""By task; the others have `SHORT`, the least with which softmax solves those that it can."""
QUICK_TASKS: dict[str, Task] = {
    "mqar": MQAR(16, 16, 2),
    "mqar_small": MQAR(16, 12, 1),
    "selective_copy": SelectiveCopy(4, 14, 2),
    "induction": Induction(4, 16, (16, 32)),
    "needle": Needle(16, 1, lengths=(16, 32), depths=(0.0, 1.0)),
    "listops": ListOps(longest=16, depth=2),
    "parity": Parity(8, (8, 16)),
}
QUICK = Budget(dim=16, depth=1, steps=2, batch_size=4, examples=16, tested=4)
QUICK_LIMITS = Limits((64, 256))


def run(cfg: DictConfig, device: torch.device) -> Found:
    """The layers like `cfg.only` in the parts of `cfg.tasks`; the record at the output is added to.

    Each result is written as soon as it is there. What the record holds already is done again with
    `cfg.again` only, so that a run that was cut off goes on where it was. A quick run tries the domains with
    one layer.

    Raises:
        UnknownName: no layer is like `cfg.only`.
        ConfigError: no such part, or the output holds something else.
    """
    from zoo.bench.suite import output_path

    chosen, parts = contestants(several(cfg.only)), _parts(cfg)
    path = output_path(cfg)
    record = opened(path, quick=cfg.quick)
    known = Record(cfg.quick) if cfg.again else opened(path, quick=cfg.quick)
    record.machines.append(machine(device) | {"only": several(cfg.only), "tasks": parts})
    for part in parts:
        one = cfg.quick and part in DOMAIN_TASKS
        for contestant in sorted(chosen, key=lambda c: c.name != "multihead")[:1] if one else chosen:
            start = time.monotonic()
            for entry in _found(contestant, part, cfg, device, known):
                record.add(entry)
                if not cfg.quick:
                    record.write(path)
            if not cfg.quick:
                took = time.monotonic() - start
                console.print(f"{contestant.name} on {part}: {took:.0f} s", highlight=False)
    return Found(record, cfg.picture)


def _parts(cfg: DictConfig) -> list[str]:
    parts = several(cfg.tasks) or list(PARTS)
    for part in parts:
        if part not in PARTS:
            raise ConfigError(
                f"There is no task {part!r} in suite=attention.{did_you_mean(str(part), PARTS)} "
                f"It has: {', '.join(PARTS)}."
            )
    return parts


def _found(
    contestant: Contestant, part: str, cfg: DictConfig, device: torch.device, known: Record
) -> Iterator[Entry]:
    """What one layer gives on one part and is not known yet; what it cannot do is told."""
    try:
        if missing := lacking(contestant):
            raise AttentionError(f"needs arguments: {', '.join(missing)}")
        if part == "cost":
            yield from _costs(contestant, cfg, device, known)
        elif part in DOMAIN_TASKS:
            yield from _swapped(contestant, part, cfg, known)
        else:
            yield from _trained(contestant, part, cfg, device, known)
    except ZooError as reason:
        yield LeftOut(contestant.name, part, str(reason))


def _trained(
    contestant: Contestant, name: str, cfg: DictConfig, device: torch.device, known: Record
) -> Iterator[Trained]:
    """One entry for each seed."""
    task, budget = (QUICK_TASKS[name], QUICK) if cfg.quick else (TASKS[name], BUDGETS.get(name, SHORT))
    settings = {
        "name": contestant.name,
        "task": name,
        "causal": contestant.causal,
        "options": contestant.short(),
        "sizes": as_stored(task),
        "budget": as_stored(budget),
        "chance": task.chance,
    }
    for seed in _seeds(cfg, known.trained.get((contestant.name, name)), settings):
        found = learned(contestant.short(), task, budget, seed=seed, device=device)
        yield Trained(
            **settings,
            parameters=found.parameters,
            seeds=(seed,),
            accuracies=(found.accuracy,),
            tests=(found.tests,),
            seconds=(found.seconds,),
        )


def _costs(contestant: Contestant, cfg: DictConfig, device: torch.device, known: Record) -> Iterator[Cost]:
    """One entry for each pattern; sizes that are known are not measured again."""
    attention, limits = contestant.long(), QUICK_LIMITS if cfg.quick else Limits(seconds=cfg.longest)
    repeats = 1 if cfg.quick else cfg.repeats
    found = {}
    for pattern in patterns(attention):
        same = "NC" if pattern == "CC" else pattern  # where queries stand apart it is one computation
        if same not in found:
            earlier = known.costs.get((contestant.name, same))
            points = earlier.curve.points if earlier and earlier.options == attention else ()
            found[same] = grown(contestant.name, attention, same, limits, repeats, device, points)
        yield Cost(contestant.name, pattern, attention, *found[same])


def _swapped(contestant: Contestant, domain: str, cfg: DictConfig, known: Record) -> Iterator[Swapped]:
    if contestant.name != contestant.layer:
        raise AttentionError(f"stands for {contestant.layer} on the synthetic tasks only")
    attention = contestant.both_ways()
    settings = {"overrides": overrides(attention, domain, quick=cfg.quick)}
    for seed in _seeds(cfg, known.swapped.get((contestant.name, domain)), settings):
        yield swapped(contestant.name, attention, domain, quick=cfg.quick, seed=seed)


def _seeds(cfg: DictConfig, earlier: BySeed | None, settings: Mapping[str, Any]) -> list[int]:
    """Those asked for that an earlier training with these settings does not have."""
    done = earlier.seeds if earlier is not None and earlier.has(settings) else ()
    return [seed for seed in range(cfg.seed, cfg.seed + cfg.seeds) if seed not in done]
