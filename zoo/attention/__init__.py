"""The attention core: nine primitives under every mechanism; `zoo.attention.layers` builds on them."""

from __future__ import annotations

from zoo.attention.attend import attend
from zoo.attention.backends import backend
from zoo.attention.capture import AttentionMap, capture
from zoo.attention.deformable import SampledMap, deformable_attend
from zoo.attention.errors import AttentionError
from zoo.attention.halo import Halo, Near
from zoo.attention.heads import expand
from zoo.attention.kernels import TopKSoftmax, softmax
from zoo.attention.merge import merge, sink
from zoo.attention.neighbourhood import Neighbourhood, ShiftedWindows
from zoo.attention.packed import Groups, Neighbours, OrderedGroups, ShiftedGroups
from zoo.attention.patterns import Causal, Dense, EqualGroups, Padding, Pattern, Window
from zoo.attention.rotary import plane_rotary, rotary, rotary_tables
from zoo.attention.scan import scan
from zoo.attention.select import attend_blocks, attend_shared, gather_blocks, select
from zoo.attention.streaming import SourceAndTarget, stream_positions

__all__ = [
    "AttentionError",
    "AttentionMap",
    "Causal",
    "Dense",
    "EqualGroups",
    "Groups",
    "Halo",
    "Near",
    "Neighbourhood",
    "Neighbours",
    "OrderedGroups",
    "Padding",
    "Pattern",
    "SampledMap",
    "ShiftedGroups",
    "ShiftedWindows",
    "SourceAndTarget",
    "TopKSoftmax",
    "Window",
    "attend",
    "attend_blocks",
    "attend_shared",
    "backend",
    "capture",
    "deformable_attend",
    "expand",
    "gather_blocks",
    "merge",
    "plane_rotary",
    "rotary",
    "rotary_tables",
    "scan",
    "select",
    "sink",
    "softmax",
    "stream_positions",
]
