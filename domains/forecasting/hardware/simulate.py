"""The embedded hardware data: computers drawn at random, and their scores by a roofline law with caches.

Not measurements: made-up architectures and workloads whose scores follow from the description by a law with
interactions, as real ones do (Williams et al. 2009, Roofline, CACM 52): a workload runs at the speed of the
cores or of the memory, whichever is slower, and caches take part of the traffic. Serial parts, vector units,
clock under vector load, threads of a core and noise come in between.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd

from zoo.errors import ConfigError

COLUMNS = {
    "numeric": {
        "memory": ["memory channels", "memory speed", "memory size"],
        "processor": [
            "sockets",
            "cores",
            "threads per core",
            "base clock",
            "all-core clock",
            "maximum clock",
            "L1 cache",
            "L2 cache",
            "L3 cache",
            "vector bits",
            "power",
        ],
        "system": ["NUMA nodes", "huge page size"],
    },
    "text": {"system_text": ["architecture", "operating system"], "workload_text": ["workload", "preset"]},
}
"""Columns of the table by group. Memory speed in MT/s, sizes in GB; clocks in GHz; L1 and L2 in KB of a core,
L3 in MB of a socket; power in W; huge pages in KB."""
TARGET = "score"
MACHINE = "machine"
"""The column that tells the computers apart; it describes none of them."""
MEMORY_EFFICIENCY = 0.8
SHARPNESS = 3.0
"""Of the roof: time is the p-norm of the times that cores and memory need, p = 3."""
NOISE_OF_RUNS, NOISE_OF_MACHINES = 0.02, 0.015
"""Standard deviations of the logarithm of the score."""


@dataclass(frozen=True)
class Architecture:
    """Scalar operations per cycle, vector bits, memory, most cores, caches in KB and MB."""

    ipc: float
    vector_bits: int
    channels: int
    speeds: tuple[int, ...]
    max_cores: int
    l1: int
    l2: int
    l3_per_core: float


@dataclass(frozen=True)
class Workload:
    """What a workload asks for.

    Attributes:
        intensity: operations per byte of traffic where no cache helps.
        working_set: MB of a core.
        vector: share of the operations that vector units take.
        serial: share of the time on one core that more cores do not shorten.
        threads: what a second thread of a core adds.
        reference: operations per second that score 1.
    """

    intensity: float
    working_set: float
    vector: float
    serial: float
    threads: float
    reference: float


ARCHITECTURES = {
    "alder": Architecture(1.0, 256, 6, (2400, 2666), 28, 32, 1024, 1.4),
    "birch": Architecture(1.15, 512, 6, (2666, 2933), 28, 32, 1024, 1.4),
    "cedar": Architecture(1.3, 256, 8, (2933, 3200), 64, 32, 512, 4.0),
    "fir": Architecture(1.4, 512, 8, (2933, 3200), 40, 48, 1280, 1.5),
    "larch": Architecture(1.5, 256, 12, (4400, 4800), 96, 32, 1024, 4.0),
    "maple": Architecture(1.6, 512, 8, (4400, 4800, 5600), 56, 48, 2048, 1.9),
}
WORKLOADS = {
    "stream": Workload(0.08, 500.0, 0.9, 0.0, 0.0, 2e9),
    "lattice": Workload(0.25, 60.0, 0.8, 0.0, 0.02, 1.2e9),
    "sparse": Workload(0.3, 25.0, 0.5, 0.001, 0.05, 1e9),
    "weather": Workload(0.8, 12.0, 0.6, 0.002, 0.1, 8e8),
    "routes": Workload(0.5, 8.0, 0.0, 0.0, 0.25, 1.1e9),
    "compiler": Workload(1.5, 5.0, 0.05, 0.0, 0.25, 7e8),
    "archive": Workload(2.0, 3.0, 0.1, 0.0, 0.3, 6e8),
    "molecules": Workload(12.0, 1.0, 0.85, 0.001, 0.15, 1.5e9),
    "dense": Workload(30.0, 2.0, 0.98, 0.0, 0.0, 4e9),
    "rays": Workload(10.0, 1.5, 0.4, 0.0, 0.35, 1.8e9),
    "video": Workload(5.0, 2.0, 0.7, 0.01, 0.2, 2.2e9),
    "chess": Workload(20.0, 0.5, 0.0, 0.0, 0.3, 5e8),
    "planner": Workload(3.0, 4.0, 0.1, 0.08, 0.2, 9e8),
}
PRESETS = {"sse": (128, 1.0), "avx2": (256, 0.95), "avx512": (512, 0.87)}
"""Vector bits, and what is left of the all-core clock under their load."""
TARGETS = {name: f"{name} score" for name in WORKLOADS}
"""The columns of the scores in a table with a row for every computer."""
SYSTEMS = ("linux 4.18", "linux 5.4", "linux 5.15", "linux 6.1")


def simulate(machines: int = 500, seed: int = 0) -> pd.DataFrame:
    """A table with a row for every computer, and its scores under the preset avx2 in a column per workload.

    Raises:
        ConfigError: no machine.
    """
    draw = _generator(machines, seed)
    rows = []
    for number in range(machines):
        machine = _draw_machine(draw, number)
        luck = draw.normal(0, NOISE_OF_MACHINES)
        values = {
            TARGETS[name]: _measured(score(machine, workload, "avx2"), luck, draw)
            for name, workload in WORKLOADS.items()
        }
        rows.append(machine | values)
    return pd.DataFrame(rows)


def simulate_runs(machines: int = 250, runs: int = 8, seed: int = 0) -> pd.DataFrame:
    """A table with a row for every run: each computer with `runs` of the workloads, each under one preset.

    Raises:
        ConfigError: no machine, or more runs than there are workloads.
    """
    if not 1 <= runs <= len(WORKLOADS):
        raise ConfigError(f"data.runs={runs}: there are 1 to {len(WORKLOADS)} workloads to run.")
    draw = _generator(machines, seed)
    rows = []
    for number in range(machines):
        machine = _draw_machine(draw, number)
        luck = draw.normal(0, NOISE_OF_MACHINES)
        for name in draw.choice(list(WORKLOADS), runs, replace=False):
            preset = str(draw.choice(list(PRESETS)))
            value = _measured(score(machine, WORKLOADS[name], preset), luck, draw)
            rows.append({**machine, "workload": name, "preset": preset, TARGET: value})
    return pd.DataFrame(rows)


def _generator(machines: int, seed: int) -> np.random.Generator:
    if machines < 1:
        raise ConfigError(f"data.machines={machines}: at least 1 is needed.")
    return np.random.default_rng(seed)


def _measured(value: float, luck: float, draw: np.random.Generator) -> float:
    """With noise, to six digits."""
    return float(f"{value * np.exp(luck + draw.normal(0, NOISE_OF_RUNS)):.6g}")


def _draw_machine(draw: np.random.Generator, number: int) -> dict[str, int | float | str]:
    name = str(draw.choice(list(ARCHITECTURES)))
    kind = ARCHITECTURES[name]
    cores = int(draw.choice(np.arange(8, kind.max_cores + 1, 4)))
    base = round(float(draw.uniform(1.8, 3.4) - 0.6 * cores / kind.max_cores), 1)
    top = round(base + float(draw.uniform(0.8, 1.6)), 1)
    sockets = int(draw.choice([1, 2], p=[0.3, 0.7]))
    channels = kind.channels if draw.random() < 0.7 else kind.channels // 2
    return {
        MACHINE: f"m{number:04d}",
        "memory channels": channels,
        "memory speed": int(draw.choice(kind.speeds)),
        "memory size": sockets * channels * int(draw.choice([16, 32, 64])),
        "sockets": sockets,
        "cores": cores,
        "threads per core": int(draw.choice([1, 2], p=[0.25, 0.75])),
        "base clock": base,
        "all-core clock": round(base + float(draw.uniform(0.2, 0.8)) * (top - base), 1),
        "maximum clock": top,
        "L1 cache": kind.l1,
        "L2 cache": kind.l2,
        "L3 cache": round(kind.l3_per_core * cores * float(draw.choice([1.0, 1.25])), 2),
        "vector bits": kind.vector_bits,
        "power": int(5 * round((60 + 2.6 * cores * base) / 5)),
        "NUMA nodes": sockets * int(draw.choice([1, 2, 4], p=[0.6, 0.2, 0.2])),
        "huge page size": int(draw.choice([2048, 1048576], p=[0.8, 0.2])),
        "architecture": name,
        "operating system": str(draw.choice(SYSTEMS)),
    }


def score(machine: dict[str, int | float | str], workload: Workload, preset: str) -> float:
    """The score without noise."""
    value = {name: float(number) for name, number in machine.items() if not isinstance(number, str)}
    bits, clock_left = PRESETS[preset]
    bits = min(bits, int(value["vector bits"]))
    per_cycle = ARCHITECTURES[str(machine["architecture"])].ipc
    per_cycle /= 1 - workload.vector + workload.vector * 64 / bits
    if value["threads per core"] > 1:
        per_cycle *= 1 + workload.threads
    cores = value["sockets"] * value["cores"]
    one_core = 1e9 * per_cycle * value["maximum clock"]
    all_cores = 1e9 * per_cycle * cores * value["all-core clock"] * clock_left
    compute = workload.serial / one_core + (1 - workload.serial) / all_cores
    channels = value["sockets"] * value["memory channels"]
    bandwidth = MEMORY_EFFICIENCY * 8e6 * channels * value["memory speed"]
    cache = value["L3 cache"] / value["cores"] + value["L2 cache"] / 1024
    missed = workload.working_set / (workload.working_set + cache)
    memory = missed / workload.intensity / bandwidth
    seconds = (compute**SHARPNESS + memory**SHARPNESS) ** (1 / SHARPNESS)
    return 1 / seconds / workload.reference
