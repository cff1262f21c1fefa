"""attention-zoo: the attention-based models of the applied fields, in one library.

>>> import zoo
>>> "gman" in zoo.list_models("traffic/*")
True
>>> model = zoo.create_model("stid", num_nodes=20)
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from zoo.create import create_model
    from zoo.registry import list_models, model_card, register_model
    from zoo.weights.checkpoint import load_model, save_model
    from zoo.weights.exchange import from_official, to_official

__version__ = "0.1.0"

_HOME = {
    "create_model": "zoo.create",
    "from_official": "zoo.weights.exchange",
    "list_models": "zoo.registry",
    "load_model": "zoo.weights.checkpoint",
    "model_card": "zoo.registry",
    "register_model": "zoo.registry",
    "save_model": "zoo.weights.checkpoint",
    "to_official": "zoo.weights.exchange",
}

__all__ = [
    "create_model",
    "from_official",
    "list_models",
    "load_model",
    "model_card",
    "register_model",
    "save_model",
    "to_official",
]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(_HOME[name]), name)
    if name in ("attention", "layers"):
        return importlib.import_module(f"zoo.{name}")
    raise AttributeError(f"module 'zoo' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME})
