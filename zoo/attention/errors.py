"""The one error of the attention core."""

from __future__ import annotations

from zoo.errors import ZooError


class AttentionError(ZooError, ValueError):
    """Tensors, pattern, kernel and backend that do not fit together; the message says which and why."""
