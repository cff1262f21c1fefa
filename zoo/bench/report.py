"""What `zoo bench` shows and stores."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.console import Group, RenderableType
from rich.table import Table

from zoo.bench.timing import Ratio, Timing, ratio
from zoo.files import atomic_write

MIB = 2**20


@dataclass(frozen=True)
class Row:
    """One job done by the zoo and by its peer, whose results were compared first."""

    name: str
    ours: Timing
    peer: Timing
    ours_bytes: int
    peer_bytes: int
    difference: float
    """Largest relative difference of the results."""
    target: float | None = None
    """Times faster than the peer that is asked for."""
    items: int | None = None
    """What one call works on, for the throughput."""

    @property
    def speed(self) -> Ratio:
        return ratio(self.peer, self.ours)

    @property
    def memory(self) -> float:
        """Our peak memory as a share of the peer's."""
        return self.ours_bytes / self.peer_bytes

    def record(self) -> dict[str, Any]:
        return {**dataclasses.asdict(self), "speed": dataclasses.asdict(self.speed), "memory": self.memory}


@dataclass(frozen=True)
class Point:
    """Time and peak memory at one size."""

    size: int
    seconds: float
    bytes: int


@dataclass(frozen=True)
class Curve:
    """Time and peak memory of one contestant over sizes."""

    name: str
    points: tuple[Point, ...]

    def slopes(self) -> tuple[float, float] | None:
        """Exponents of time and of memory, fitted over all sizes; None for a single one."""
        if len(self.points) < 2:
            return None
        sizes = [p.size for p in self.points]
        return slope(sizes, [p.seconds for p in self.points]), slope(sizes, [p.bytes for p in self.points])

    def record(self) -> dict[str, Any]:
        return {**dataclasses.asdict(self), "slopes": self.slopes()}


@dataclass(frozen=True)
class Report:
    """All that one run of `zoo bench` found."""

    title: str
    settings: dict[str, Any]
    machine: dict[str, Any]
    rows: tuple[Row, ...]
    curves: tuple[Curve, ...] = field(default=())
    growth_name: str = "Cost over sizes"

    def write(self, path: Path) -> None:
        """Store everything, every round included, as JSON."""
        record = {
            "title": self.title,
            "settings": self.settings,
            "machine": self.machine,
            "rows": [row.record() for row in self.rows],
            "curves": [curve.record() for curve in self.curves],
        }
        with atomic_write(path, "w") as file:
            json.dump(record, file, indent=1)
            file.write("\n")

    def __rich__(self) -> RenderableType:
        tables = [self._row_table()] if self.rows else []
        return Group(*tables, *([self._curve_table()] if self.curves else []))

    def _row_table(self) -> Table:
        where = self.machine.get("gpu", f"{self.machine['cpu']}, threads: {self.machine['threads']}")
        worst = max(row.difference for row in self.rows)
        table = _plain_table(f"{self.title}\n{where}, torch {self.machine['torch']}")
        for heading in ("zoo ms", "peer ms", "faster", "memory"):
            table.add_column(heading, justify="right", no_wrap=True)
        for row in self.rows:
            table.add_row(
                row.name,
                _milliseconds(row.ours, row.items),
                _milliseconds(row.peer, row.items),
                _faster(row),
                f"{row.memory:.2f}x\n[dim]{row.ours_bytes / MIB:,.0f}/{row.peer_bytes / MIB:,.0f} MiB[/]",
            )
        table.caption = f"same results, to {worst:.0e} of the largest value"
        return table

    def _curve_table(self) -> Table:
        sizes = sorted({p.size for curve in self.curves for p in curve.points})
        table = _plain_table(f"{self.growth_name}: time, peak memory")
        for heading in (*(f"{size:,}" for size in sizes), "growth"):
            table.add_column(heading, justify="right", no_wrap=True)
        for curve in self.curves:
            points = {p.size: p for p in curve.points}
            cells = (_cell(points[size]) if size in points else "" for size in sizes)
            table.add_row(curve.name, *cells, _growth(curve))
        return table


def _plain_table(title: str) -> Table:
    table = Table(title=title, box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("")
    return table


def slope(sizes: Sequence[float], values: Sequence[float]) -> float:
    """Exponent p of the power law `values ~ sizes ** p`, fitted to the logarithms by least squares."""
    return float(np.polyfit(np.log(sizes), np.log(values), 1)[0])


def _milliseconds(timing: Timing, items: int | None) -> str:
    digits = 0 if timing.median >= 0.1 else 2
    median, low, high = (f"{s * 1e3:.{digits}f}" for s in (timing.median, *timing.quartiles))
    throughput = "" if items is None else f"\n[dim]{items / timing.median:,.1f} /s[/]"
    return f"{median}\n[dim]{low}-{high}[/]{throughput}"


def _faster(row: Row) -> str:
    speed = row.speed
    asked = "" if row.target is None else f"\n[dim]asked {row.target:.3g}x[/]"
    return f"{speed.value:.2f}x\n[dim]{speed.low:.1f}-{speed.high:.1f}[/]{asked}"


def _cell(point: Point) -> str:
    time = f"{point.seconds:.2f} s" if point.seconds >= 0.1 else f"{point.seconds * 1e3:.0f} ms"
    return f"{time}\n[dim]{point.bytes / MIB:,.0f} MiB[/]"


def _growth(curve: Curve) -> str:
    slopes = curve.slopes()
    return "-" if slopes is None else f"N^{slopes[0]:.1f}\n[dim]N^{slopes[1]:.1f}[/]"
