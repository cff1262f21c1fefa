"""TensorFlow V2 checkpoints, against a writer of the format made for this test."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pytest
import torch

from zoo.create import create_model
from zoo.errors import CheckpointError, ConfigError
from zoo.weights.checkpoint import read_state_dict
from zoo.weights.exchange import from_official, to_official

DATA_TYPES = {"float32": 1, "float64": 2, "int32": 3, "int64": 9, "float16": 19}
TENSORS = {
    "Variable": np.array(123456789012, np.int64),
    "beta1_power": np.array(0.9, np.float32),
    "bias": np.arange(8, dtype=np.float32),
    **{
        f"kernel_{i}": np.random.default_rng(i).normal(size=(1, 1, 3, 5)).astype(np.float32)
        for i in range(40)
    },
    "moments/Squeeze/ExponentialMovingAverage": np.linspace(0, 1, 7),
    "steps": np.array([[1, -2], [3, 4]], np.int32),
}


# ---- the writer --------------------------------------------------------------------------------------------


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 127:
        out.append(value % 128 + 128)
        value //= 128
    return bytes([*out, value])


def _number(field: int, value: int) -> bytes:
    return _varint(field << 3) + _varint(value)


def _message(field: int, content: bytes) -> bytes:
    return _varint(field << 3 | 2) + _varint(len(content)) + content


def _entry(array: np.ndarray, shard: int, offset: int) -> bytes:
    shape = b"".join(_message(2, _number(1, length)) for length in array.shape)
    where = _number(3, shard) + _number(4, offset) + _number(5, array.nbytes)
    checksum = _varint(6 << 3 | 5) + struct.pack("<I", 0xDEADBEEF)
    return _number(1, DATA_TYPES[str(array.dtype)]) + _message(2, shape) + where + checksum


def _block(entries: list[tuple[bytes, bytes]], restart_every: int) -> bytes:
    out, restarts, previous = b"", [], b""
    for i, (key, value) in enumerate(entries):
        if i % restart_every == 0:
            restarts.append(len(out))
            previous = b""
        shared = next(
            (n for n, (a, b) in enumerate(zip(key, previous, strict=False)) if a != b),
            min(len(key), len(previous)),
        )
        out += _varint(shared) + _varint(len(key) - shared) + _varint(len(value)) + key[shared:] + value
        previous = key
    return out + b"".join(struct.pack("<I", r) for r in restarts) + struct.pack("<I", len(restarts))


def _table(entries: list[tuple[bytes, bytes]], block_entries: int, compression: int = 0) -> bytes:
    out, index = b"", []
    trailer = bytes([compression]) + b"\0\0\0\0"
    for start in range(0, len(entries), block_entries):
        block = _block(entries[start : start + block_entries], 4)
        index.append(
            (
                entries[min(start + block_entries, len(entries)) - 1][0],
                _varint(len(out)) + _varint(len(block)),
            )
        )
        out += block + trailer
    handles = b""
    for block in (_block([], 1), _block(index, 1)):
        handles += _varint(len(out)) + _varint(len(block))
        out += block + trailer
    return out + handles.ljust(40, b"\0") + struct.pack("<Q", 0xDB4775248B80FB57)


def _write(prefix: Path, tensors: dict[str, np.ndarray], shards: int = 1, compression: int = 0) -> None:
    data = [b""] * shards
    entries = [(b"", _number(1, shards) + _message(3, _number(1, 1)))]
    for i, name in enumerate(sorted(tensors)):
        array = tensors[name]
        entries.append((name.encode(), _entry(array, i % shards, len(data[i % shards]))))
        data[i % shards] += array.tobytes()
    prefix.with_name(prefix.name + ".index").write_bytes(_table(entries, 10, compression))
    for shard, content in enumerate(data):
        prefix.with_name(f"{prefix.name}.data-{shard:05d}-of-{shards:05d}").write_bytes(content)


# ---- reading -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("name", ["GMAN", "GMAN.index", "GMAN.meta"])
def test_reads_every_tensor_by_prefix_or_by_one_of_its_files(name: str, shards: int, tmp_path: Path) -> None:
    _write(tmp_path / "GMAN", TENSORS, shards)
    found = read_state_dict(tmp_path / name)
    assert found.keys() == TENSORS.keys()
    for key, array in TENSORS.items():
        assert found[key].numpy().dtype == array.dtype
        assert np.array_equal(found[key].numpy(), array)


def test_a_name_with_a_dot_is_a_prefix_too(tmp_path: Path) -> None:
    _write(tmp_path / "model.ckpt-500", {"w": TENSORS["bias"]})
    assert torch.equal(read_state_dict(tmp_path / "model.ckpt-500")["w"], torch.arange(8.0))
    assert read_state_dict(tmp_path / "model.ckpt-500.data-00000-of-00001").keys() == {"w"}


def test_the_object_graph_of_tensorflow_2_is_passed_over(tmp_path: Path) -> None:
    _write(
        tmp_path / "a", {"_CHECKPOINTABLE_OBJECT_GRAPH": np.zeros(2, np.float16), "w": np.ones(2, np.float32)}
    )
    assert read_state_dict(tmp_path / "a").keys() == {"w"}


# ---- refused -----------------------------------------------------------------------------------------------


def test_a_missing_data_file_is_named(tmp_path: Path) -> None:
    _write(tmp_path / "a", TENSORS)
    (tmp_path / "a.data-00000-of-00001").unlink()
    with pytest.raises(CheckpointError, match=r"without its data file a\.data-00000-of-00001"):
        read_state_dict(tmp_path / "a")


def test_a_missing_index_is_named(tmp_path: Path) -> None:
    _write(tmp_path / "a", TENSORS)
    (tmp_path / "a.index").unlink()
    with pytest.raises(CheckpointError, match=r"without its index file a\.index"):
        read_state_dict(tmp_path / "a.data-00000-of-00001")


def test_truncated_data_name_the_tensor(tmp_path: Path) -> None:
    _write(tmp_path / "a", TENSORS)
    data = tmp_path / "a.data-00000-of-00001"
    data.write_bytes(data.read_bytes()[:-4])
    with pytest.raises(CheckpointError, match="tensor 'steps' is not whole"):
        read_state_dict(tmp_path / "a")


@pytest.mark.parametrize("keep", [10, 0.5, -1])
def test_a_truncated_index_says_so(keep: float, tmp_path: Path) -> None:
    _write(tmp_path / "a", TENSORS)
    index = tmp_path / "a.index"
    content = index.read_bytes()
    index.write_bytes(content[: int(keep * len(content)) if keep == 0.5 else int(keep)])
    with pytest.raises(CheckpointError, match=r"a\.index .*truncated"):
        read_state_dict(tmp_path / "a")


def test_damage_inside_the_index_is_an_error_with_its_name(tmp_path: Path) -> None:
    """Any single damaged byte costs at most a CheckpointError, and most bytes are watched."""
    _write(tmp_path / "a", {"w": np.ones((2, 3), np.float32)})
    index = tmp_path / "a.index"
    content = index.read_bytes()
    noticed = 0
    for i in range(len(content)):
        index.write_bytes(content[:i] + bytes([content[i] ^ 0xFF]) + content[i + 1 :])
        try:
            read_state_dict(tmp_path / "a")
        except CheckpointError:
            noticed += 1
    assert noticed > len(content) // 3


def test_compression_is_refused(tmp_path: Path) -> None:
    _write(tmp_path / "a", TENSORS, compression=1)
    with pytest.raises(CheckpointError, match=r"compressed \(snappy\)"):
        read_state_dict(tmp_path / "a")


def test_an_unsupported_type_names_its_tensor(tmp_path: Path) -> None:
    _write(tmp_path / "a", {"half": np.ones(2, np.float16)})
    with pytest.raises(CheckpointError, match="tensor 'half' has TensorFlow type 19"):
        read_state_dict(tmp_path / "a")


# ---- a model from it ---------------------------------------------------------------------------------------


def test_a_checkpoint_of_the_official_gman_becomes_a_model(tmp_path: Path) -> None:
    sizes = {"history": 4, "horizon": 3, "steps_per_day": 24, "num_layers": 2, "num_heads": 2, "head_dim": 4}
    model = create_model("gman", num_nodes=6, **sizes)
    official = {name: tensor.numpy() for name, tensor in to_official(model).items()}
    slots = {f"{name}/Adam": array for name, array in official.items() if "moments" not in name}
    _write(tmp_path / "GMAN", official | slots | {"beta1_power": np.array(0.9, np.float32)})
    loaded = from_official("gman", tmp_path / "GMAN", N=6, P=4, Q=3, T=24, L=2, K=2, d=4)
    found = loaded.state_dict()
    assert len(official) > 100
    for name, tensor in model.state_dict().items():
        assert name == "embedding.spatial_embedding" or torch.equal(found[name], tensor), name


def test_a_checkpoint_of_another_size_names_the_tensors(tmp_path: Path) -> None:
    model = create_model("gman", num_nodes=6)
    _write(tmp_path / "GMAN", {name: tensor.numpy() for name, tensor in to_official(model).items()})
    with pytest.raises(CheckpointError) as error:
        from_official("gman", tmp_path / "GMAN", N=6, L=2)
    message = str(error.value)
    assert message.startswith(f"{tmp_path / 'GMAN'} does not fit official gman:\n  missing (")
    assert "kernel_* (x" in message
    assert len(message.splitlines()) <= 8


def test_a_size_that_the_checkpoint_does_not_tell_is_asked_for(tmp_path: Path) -> None:
    _write(tmp_path / "GMAN", TENSORS)
    with pytest.raises(ConfigError, match=r"official checkpoint of 'gman' does not tell N: give N=\.\.\."):
        from_official("gman", tmp_path / "GMAN")
