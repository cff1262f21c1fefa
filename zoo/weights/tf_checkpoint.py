"""TensorFlow V2 checkpoints (`PREFIX.index` + `PREFIX.data-*`) without TensorFlow.

The index is a table in LevelDB's file format, from tensor name to a BundleEntryProto that says where in the
data files its bytes lie.
"""

from __future__ import annotations

import math
import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from zoo.errors import CheckpointError

MAGIC = 0xDB4775248B80FB57
FOOTER_BYTES = 48
HEADER_KEY = ""
BOOKKEEPING = "_CHECKPOINTABLE_OBJECT_GRAPH"
"""TensorFlow 2's description of its Python objects: text, not a weight."""
DTYPES = {1: np.dtype("<f4"), 2: np.dtype("<f8"), 3: np.dtype("<i4"), 9: np.dtype("<i8")}
"""TensorFlow's DataType numbers that weights and counters use."""
FILE_SUFFIX = re.compile(r"\.(index|meta|data-\d{5}-of-\d{5})$")


def find_prefix(path: Path) -> Path | None:
    """The checkpoint's prefix when `path` is one, or one of its files; else None."""
    if FILE_SUFFIX.search(path.name):
        return path.with_name(FILE_SUFFIX.sub("", path.name))
    return path if not path.is_file() and path.with_name(path.name + ".index").is_file() else None


def read(prefix: Path) -> dict[str, Tensor]:
    """All tensors of a checkpoint by name.

    Raises:
        CheckpointError: a file is missing, truncated or compressed, or a tensor's type is not supported.
    """
    index = prefix.with_name(prefix.name + ".index")
    if not index.is_file():
        raise CheckpointError(f"{prefix} is a TensorFlow checkpoint without its index file {index.name}.")
    try:
        records = dict(_read_table(index.read_bytes(), index))
        header = _fields(records.pop(HEADER_KEY, b""))
        records.pop(BOOKKEEPING, None)
        entries = {name: _entry(record) for name, record in records.items()}
    except (IndexError, TypeError, ValueError, struct.error):
        raise CheckpointError(f"{index} is truncated or damaged; copy it again.") from None
    if header.get(2, [0])[0]:
        raise CheckpointError(f"{index} was written on a big-endian machine, which is not supported.")
    shards = header.get(1, [1])[0]
    return {name: _read_tensor(prefix, shards, name, entry) for name, entry in entries.items()}


# ---- the tensors -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Entry:
    dtype: int
    shape: tuple[int, ...]
    shard: int
    offset: int
    size: int
    sliced: bool


def _entry(value: bytes) -> _Entry:
    """Decode BundleEntryProto: dtype 1, shape 2 (dim 2 {size 1}), shard 3, offset 4, size 5, slices 7."""
    fields = _fields(value)
    dims = _fields(fields[2][0]).get(2, []) if 2 in fields else []
    return _Entry(
        dtype=fields.get(1, [0])[0],
        shape=tuple(_fields(dim).get(1, [0])[0] for dim in dims),
        shard=fields.get(3, [0])[0],
        offset=fields.get(4, [0])[0],
        size=fields.get(5, [0])[0],
        sliced=7 in fields,
    )


def _read_tensor(prefix: Path, shards: int, name: str, entry: _Entry) -> Tensor:
    data = prefix.with_name(f"{prefix.name}.data-{entry.shard:05d}-of-{shards:05d}")
    dtype = DTYPES.get(entry.dtype)
    if dtype is None or entry.sliced:
        reason = "is partitioned" if entry.sliced else f"has TensorFlow type {entry.dtype}"
        raise CheckpointError(
            f"{data.name}: tensor {name!r} {reason}, which is not supported; save an npz in TensorFlow."
        )
    if not data.is_file():
        raise CheckpointError(f"{prefix} is a TensorFlow checkpoint without its data file {data.name}.")
    whole = entry.offset + entry.size <= data.stat().st_size
    if not whole or entry.size != math.prod(entry.shape) * dtype.itemsize:
        raise CheckpointError(f"{data} is truncated or damaged: tensor {name!r} is not whole. Copy it again.")
    with open(data, "rb") as file:
        file.seek(entry.offset)
        content = file.read(entry.size)
    return torch.from_numpy(
        np.frombuffer(content, dtype).reshape(entry.shape).astype(dtype.newbyteorder("="))
    )


# ---- the table ---------------------------------------------------------------------------------------------


def _read_table(data: bytes, path: Path) -> Iterator[tuple[str, bytes]]:
    footer = data[-FOOTER_BYTES:]
    if len(footer) < FOOTER_BYTES or struct.unpack("<Q", footer[-8:])[0] != MAGIC:
        raise CheckpointError(
            f"{path} is no TensorFlow V2 index, or is truncated: its closing magic number is missing."
        )
    _, position = _handle(footer, 0)
    index_block, _ = _handle(footer, position)
    for _, value in _read_block(data, index_block, path):
        block, _ = _handle(value, 0)
        for key, entry in _read_block(data, block, path):
            yield key.decode(), entry


def _read_block(data: bytes, handle: tuple[int, int], path: Path) -> Iterator[tuple[bytes, bytes]]:
    """Entries of a block: each key stores only what differs from the one before."""
    offset, size = handle
    if data[offset + size]:
        raise CheckpointError(
            f"{path} is compressed (snappy), which is not supported; save it again without compression."
        )
    block = data[offset : offset + size]
    (restarts,) = struct.unpack("<I", block[-4:])
    end = size - 4 * (restarts + 1)
    position, key = 0, b""
    while position < end:
        shared, position = _varint(block, position)
        unshared, position = _varint(block, position)
        length, position = _varint(block, position)
        key = key[:shared] + block[position : position + unshared]
        position += unshared
        yield key, block[position : position + length]
        position += length


def _handle(data: bytes, position: int) -> tuple[tuple[int, int], int]:
    offset, position = _varint(data, position)
    size, position = _varint(data, position)
    return (offset, size), position


# ---- protocol buffers --------------------------------------------------------------------------------------


def _varint(data: bytes, position: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, position
        shift += 7


def _fields(data: bytes) -> dict[int, list]:
    """Values of a message by field number: ints for varints and fixed widths, bytes for the rest."""
    fields: dict[int, list] = {}
    position = 0
    while position < len(data):
        tag, position = _varint(data, position)
        number, kind = tag >> 3, tag & 7
        if kind == 0:
            value, position = _varint(data, position)
        elif kind == 2:
            length, position = _varint(data, position)
            value, position = data[position : position + length], position + length
        else:
            width = {1: 8, 5: 4}.get(kind)
            if width is None:
                raise IndexError(f"wire type {kind}")
            value, position = int.from_bytes(data[position : position + width], "little"), position + width
        fields.setdefault(number, []).append(value)
    return fields
