"""Benchmarks of the attention core: one module per family, each with its `SUITE`."""

from __future__ import annotations

from zoo.bench.attention import deformable, heads, neighbourhood, scan, select, sharing
from zoo.bench.suite import Suite

SUITE = Suite.join(module.SUITE for module in (heads, sharing, scan, neighbourhood, select, deformable))
