"""What attention looks at: places of tokens on a grid, statistics of heads, attention rollout.

`zoo.attention.capture` records the maps; here they are read, tile by tile, without a dense N x N tensor.
"""

from __future__ import annotations

from zoo.explain.maps import received, seen_from
from zoo.explain.places import Places, find_places
from zoo.explain.rollout import rollout, token_mixing
from zoo.explain.statistics import HeadStatistics, head_statistics

__all__ = [
    "HeadStatistics",
    "Places",
    "find_places",
    "head_statistics",
    "received",
    "rollout",
    "seen_from",
    "token_mixing",
]
