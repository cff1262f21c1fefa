"""Synthetic series to pre-train on, each a function of a seed alone.

Named after the report of Chronos-2 (arXiv 2510.15821), which publishes the ideas of its generators but not
their numbers: `kernels` is that of Chronos-1; the distributions of the others are our own.
"""

from domains.forecasting.synthetic.mixture import GENERATORS, UNIVARIATE, Group, draw_group

__all__ = ["GENERATORS", "UNIVARIATE", "Group", "draw_group"]
