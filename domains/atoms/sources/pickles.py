"""Graph objects out of pickles without running what a pickle may carry.

OC20 and its successors store `torch_geometric.data.Data` objects. Here they become dicts of tensors and plain
values; nothing else is built.
"""

from __future__ import annotations

import io
import pickle
from collections import OrderedDict
from typing import Any

import numpy as np
import torch
from numpy._core import multiarray
from torch import _utils

from zoo.errors import DataError


class Refused(Exception):
    """What a pickle asks for and does not get, by name."""


class Container:
    """Stands for a graph object or its storage: keeps the state, has no behaviour."""

    state: dict[str, Any]

    def __new__(cls, *args: Any) -> Container:
        container = super().__new__(cls)
        container.state = {}
        return container

    def __setstate__(self, state: Any) -> None:
        self.state.update(state if isinstance(state, dict) else {})


def _tensor_of(content: bytes) -> Any:
    """What `torch.storage._load_from_bytes` gives, by the safe reader."""
    return torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)


def _latin(text: str, encoding: str) -> bytes:
    """How the second protocol writes bytes."""
    if encoding != "latin1":
        raise Refused(f"the encoding {encoding}")
    return text.encode("latin1")


def _array_of(buffer: Any, dtype: Any, shape: Any, order: Any, *rest: Any) -> np.ndarray:
    """How the fifth protocol writes arrays."""
    return np.frombuffer(buffer, dtype=dtype).reshape(shape, order=order).copy()


def _new(cls: type, *args: Any) -> Any:
    """`copyreg._reconstructor` for the containers alone."""
    if cls is not Container:
        raise Refused(f"an object of {cls.__module__}.{cls.__name__}")
    return Container()


GRAPHS = {
    ("torch_geometric.data.data", "Data"),
    ("torch_geometric.data.data", "DataEdgeAttr"),
    ("torch_geometric.data.data", "DataTensorAttr"),
    ("torch_geometric.data.storage", "GlobalStorage"),
}
NUMPY = ("numpy.core.multiarray", "numpy._core.multiarray", "numpy.core.numeric", "numpy._core.numeric")
ALLOWED: dict[tuple[str, str], Any] = {
    ("copyreg", "_reconstructor"): _new,
    ("builtins", "object"): object,
    ("_codecs", "encode"): _latin,
    ("collections", "OrderedDict"): OrderedDict,
    ("torch.storage", "_load_from_bytes"): _tensor_of,
    ("torch", "Size"): torch.Size,
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): np.dtype,
}
ALLOWED |= dict.fromkeys(GRAPHS, Container)
ALLOWED |= {
    ("torch._utils", name): getattr(_utils, name) for name in ("_rebuild_tensor", "_rebuild_tensor_v2")
}
ALLOWED |= {
    (module, name): getattr(multiarray, name) for module in NUMPY[:2] for name in ("_reconstruct", "scalar")
}
ALLOWED |= {(module, "_frombuffer"): _array_of for module in NUMPY[2:]}


class GraphUnpickler(pickle.Unpickler):
    """Builds tensors, arrays and plain values; graph objects become `Container`s."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in ALLOWED:
            raise Refused(f"{module}.{name}")
        return ALLOWED[module, name]


def read_graph(content: bytes, origin: str) -> dict[str, Any]:
    """The values of a pickled graph object by name.

    Raises:
        DataError: the pickle asks for anything but tensors, arrays and graph objects, or is cut off.
    """
    try:
        loaded = GraphUnpickler(io.BytesIO(content)).load()
    except Refused as error:
        raise DataError(
            f"{origin} asks for {error}, which a file of graphs has no need of; it is not run. "
            "Only torch_geometric Data objects of tensors and numbers are read."
        ) from None
    except Exception as error:  # a pickle that is cut off fails in many ways
        raise DataError(f"{origin} is no whole pickle of a graph: {error}") from None
    values = _plain(loaded)
    if not isinstance(values, dict):
        raise DataError(f"{origin} holds a {type(loaded).__name__}, not a graph.")
    return values


def _plain(value: Any) -> Any:
    """The contents of containers: of `_store` and its `_mapping` in newer graph objects."""
    if isinstance(value, Container):
        value = value.state
    if isinstance(value, dict):
        if "_store" in value:
            return _plain(value["_store"])
        if "_mapping" in value:
            return _plain(value["_mapping"])
    return value
