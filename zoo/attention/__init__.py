"""The attention core: `attend`, its patterns, kernels and backends, rotary positions, capture of maps."""

from __future__ import annotations

from zoo.attention.attend import attend
from zoo.attention.backends import backend
from zoo.attention.capture import AttentionMap, capture
from zoo.attention.errors import AttentionError
from zoo.attention.kernels import TopKSoftmax, softmax
from zoo.attention.packed import Groups, Neighbours
from zoo.attention.patterns import Causal, Dense, EqualGroups, Padding, Pattern, Window
from zoo.attention.rotary import rotary, rotary_tables

__all__ = [
    "AttentionError",
    "AttentionMap",
    "Causal",
    "Dense",
    "EqualGroups",
    "Groups",
    "Neighbours",
    "Padding",
    "Pattern",
    "TopKSoftmax",
    "Window",
    "attend",
    "backend",
    "capture",
    "rotary",
    "rotary_tables",
    "softmax",
]
