"""Every kind of weight file is read, and everything that only looks like one is refused by name."""

from __future__ import annotations

import os
import pickle
import zipfile
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

from zoo.errors import CheckpointError
from zoo.weights.checkpoint import read_state_dict

TENSORS = {
    "layer.weight": torch.arange(6, dtype=torch.float32).reshape(2, 3),
    "moments/Squeeze": torch.ones(4, dtype=torch.float64),
    "step": torch.tensor(7),
}


def _save_npz(tensors: dict[str, Tensor], path: Path) -> None:
    np.savez(path, **{name: value.numpy() for name, value in tensors.items()})


def _save_legacy(tensors: dict[str, Tensor], path: Path) -> None:
    torch.save(tensors, path, _use_new_zipfile_serialization=False)


WRITERS = {
    "weights.safetensors": safetensors.torch.save_file,
    "weights.pth": torch.save,
    "weights.pth.tar": torch.save,
    "pytorch_model.bin": _save_legacy,
    "weights.npz": _save_npz,
}


def _assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].dtype == value.dtype
        assert torch.equal(found[name], value)


@pytest.mark.parametrize("name", WRITERS)
def test_reads_every_format_by_content(name: str, tmp_path: Path) -> None:
    WRITERS[name](TENSORS, tmp_path / name)
    _assert_equal(read_state_dict(tmp_path / name), TENSORS)


@pytest.mark.parametrize("header_bytes", range(0x70, 0x90))
def test_a_safetensors_file_is_known_whatever_the_length_of_its_header(
    header_bytes: int, tmp_path: Path
) -> None:
    """Its first byte is that length, and 0x80 is also how a pickle begins."""
    path = tmp_path / "a.safetensors"
    safetensors.torch.save_file({"n" * (header_bytes - 0x30): torch.ones(1)}, path)
    assert len(read_state_dict(path)) == 1


@pytest.mark.parametrize(
    "wrap", [{"state_dict": TENSORS, "epoch": 3}, {"model": TENSORS, "optimizer": {"lr": 0.1}}]
)
def test_unwraps_what_training_programs_save(wrap: dict, tmp_path: Path) -> None:
    torch.save(wrap, tmp_path / "last.ckpt")
    _assert_equal(read_state_dict(tmp_path / "last.ckpt"), TENSORS)


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod."])
def test_drops_the_prefix_of_parallel_and_compiled_models(prefix: str, tmp_path: Path) -> None:
    torch.save({prefix + name: value for name, value in TENSORS.items()}, tmp_path / "a.pth")
    _assert_equal(read_state_dict(tmp_path / "a.pth"), TENSORS)


def test_keeps_a_prefix_that_only_some_names_have(tmp_path: Path) -> None:
    mixed = {"module.a": torch.ones(1), "b": torch.ones(1)}
    torch.save(mixed, tmp_path / "a.pth")
    _assert_equal(read_state_dict(tmp_path / "a.pth"), mixed)


# ---- refused -----------------------------------------------------------------------------------------------


class _Payload:
    """Creates a file when unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("legacy", [False, True])
def test_a_pickle_that_runs_code_is_refused_and_does_not_run(legacy: bool, tmp_path: Path) -> None:
    path, trace = tmp_path / "evil.pth", tmp_path / "executed"
    torch.save({"w": torch.ones(1), "x": _Payload(trace)}, path, _use_new_zipfile_serialization=not legacy)
    with pytest.raises(
        CheckpointError, match=r"evil.pth would run code on loading \(its pickle names \S*mkdir\)"
    ):
        read_state_dict(path)
    assert not trace.exists()


def test_a_plain_pickle_is_refused_and_does_not_run(tmp_path: Path) -> None:
    path, trace = tmp_path / "evil.pth", tmp_path / "executed"
    path.write_bytes(pickle.dumps({"x": _Payload(trace)}, protocol=2))
    with pytest.raises(CheckpointError, match=r"evil.pth"):
        read_state_dict(path)
    assert not trace.exists()


def test_a_whole_pickled_model_is_refused_with_the_way_out(tmp_path: Path) -> None:
    torch.save(nn.Linear(2, 2), tmp_path / "model.pth")
    with pytest.raises(CheckpointError, match=r"torch\.save\(model\.state_dict\(\), 'weights\.pth'\)"):
        read_state_dict(tmp_path / "model.pth")


def test_a_pickled_array_in_npz_is_refused_by_name(tmp_path: Path) -> None:
    np.savez(
        tmp_path / "a.npz", good=np.ones(2), bad=np.array([_Payload(tmp_path / "executed")], dtype=object)
    )
    with pytest.raises(CheckpointError, match=r"a.npz: array 'bad' cannot be used"):
        read_state_dict(tmp_path / "a.npz")
    assert not (tmp_path / "executed").exists()


def test_entries_that_are_no_tensors_are_named(tmp_path: Path) -> None:
    torch.save({"a": torch.ones(1), "epoch": 3}, tmp_path / "a.pth")
    with pytest.raises(CheckpointError, match="no plain state dict: epoch are not tensors"):
        read_state_dict(tmp_path / "a.pth")


def test_a_list_is_no_state_dict(tmp_path: Path) -> None:
    torch.save([torch.ones(1)], tmp_path / "a.pth")
    with pytest.raises(CheckpointError, match="holds a list, not a state dict"):
        read_state_dict(tmp_path / "a.pth")


STAND_INS = {
    "Git LFS pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n",
    "web page": b"\n<!DOCTYPE html><html><body>Sign in</body></html>",
    "is empty": b"",
    "no weight file": b"epoch,loss\n1,0.5\n",
}


@pytest.mark.parametrize("message", STAND_INS)
def test_what_lies_in_place_of_a_weight_file_is_named(message: str, tmp_path: Path) -> None:
    (tmp_path / "w.safetensors").write_bytes(STAND_INS[message])
    with pytest.raises(CheckpointError, match=message):
        read_state_dict(tmp_path / "w.safetensors")


@pytest.mark.parametrize("name", WRITERS)
@pytest.mark.parametrize("share", [0.02, 0.5, 0.98])
def test_a_truncated_file_says_so(name: str, share: float, tmp_path: Path) -> None:
    path = tmp_path / name
    WRITERS[name]({"w": torch.randn(64, 64)}, path)
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])
    with pytest.raises(CheckpointError, match=r"truncated|cut off|damaged|not a whole"):
        read_state_dict(path)


def test_a_damaged_array_in_npz_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a.npz"
    np.savez(path, w=np.arange(1000.0))
    content = bytearray(path.read_bytes())
    content[4000] ^= 0xFF
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match="array 'w' cannot be used"):
        read_state_dict(path)


def test_an_archive_without_weights_is_refused(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.pth", "w") as archive:
        archive.writestr("readme.txt", "hello")
    with pytest.raises(CheckpointError, match=r"a.pth"):
        read_state_dict(tmp_path / "a.pth")


def test_a_missing_file_names_its_neighbour(tmp_path: Path) -> None:
    (tmp_path / "weights.pth").write_bytes(b"x")
    with pytest.raises(CheckpointError, match=r"Did you mean 'weights.pth'"):
        read_state_dict(tmp_path / "weigths.pth")
    with pytest.raises(CheckpointError, match="is a folder"):
        read_state_dict(tmp_path)
