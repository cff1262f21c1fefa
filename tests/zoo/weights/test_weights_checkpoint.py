"""Our own checkpoints: whole or not at all, enough to rebuild the model, and loaded with a full account."""

from __future__ import annotations

import errno
import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from rich.console import Console
from torch import nn

from zoo.create import create_model
from zoo.errors import CheckpointError, ZooError
from zoo.weights.checkpoint import (
    load_model,
    load_state,
    read_checkpoint,
    read_state_dict,
    resample,
    save_model,
    save_state_dict,
    summarise,
)

ROOT = Path(__file__).resolve().parents[3]


@pytest.mark.usefixtures("toys")
class TestFiles:
    def test_a_checkpoint_alone_rebuilds_the_model(self, tmp_path: Path) -> None:
        model = create_model("toy_net", width=3, depth=4, scale=0.5)
        extra = {"sensor_ids": ["a", "b"], "mean": 58.9, "coordinates": None}
        save_model(model, tmp_path / "a.safetensors", extra=extra)
        again, found = load_model(tmp_path / "a.safetensors")
        x = torch.randn(5, 3)
        assert torch.equal(again(x), model(x))
        assert (again.zoo_config, found, again.training) == (model.zoo_config, extra, False)

    def test_metadata_are_plain_json_that_any_reader_of_safetensors_sees(self, tmp_path: Path) -> None:
        save_model(create_model("toy_net", width=1), tmp_path / "a.safetensors", extra={"mean": 1.0})
        with safetensors.safe_open(tmp_path / "a.safetensors", framework="np") as file:
            meta = json.loads(file.metadata()["zoo"])
        built = {"name": "toy_net", "domain": "toys", "config": {"width": 1}}
        assert meta == {"format": 1, "model": built, "extra": {"mean": 1.0}}
        assert read_checkpoint(tmp_path / "a.safetensors")[1] == meta

    def test_tied_and_strided_tensors_are_saved_by_value(self, tmp_path: Path) -> None:
        model = create_model("toy_net", width=3)
        model.layers[1].weight = model.layers[0].weight
        model.graph = torch.arange(6.0)[::2]
        save_model(model, tmp_path / "a.safetensors")
        state = read_state_dict(tmp_path / "a.safetensors")
        assert torch.equal(state["layers.0.weight"], state["layers.1.weight"])
        assert state["graph"].tolist() == [0.0, 2.0, 4.0]

    def test_a_model_from_elsewhere_cannot_be_saved_without_its_config(self, tmp_path: Path) -> None:
        with pytest.raises(CheckpointError, match=r"Linear was not built by zoo.create_model"):
            save_model(nn.Linear(1, 1), tmp_path / "a.safetensors")

    def test_extra_must_be_json(self, tmp_path: Path) -> None:
        with pytest.raises(CheckpointError, match=r"extra can hold numbers.*ndarray"):
            save_model(create_model("toy_net", width=1), tmp_path / "a", extra={"mean": np.ones(1)})
        assert list(tmp_path.iterdir()) == []

    def test_bare_tensors_ask_for_the_name_of_their_model(self, tmp_path: Path) -> None:
        save_state_dict({"w": torch.ones(1)}, tmp_path / "a.safetensors")
        with pytest.raises(CheckpointError, match=r"without a model config.*checkpoint_path=FILE"):
            load_model(tmp_path / "a.safetensors")

    def test_a_newer_format_asks_for_an_upgrade(self, tmp_path: Path) -> None:
        path = tmp_path / "a.safetensors"
        safetensors.torch.save_file({"w": torch.ones(1)}, path, {"zoo": json.dumps({"format": 2})})
        with pytest.raises(CheckpointError, match="written by a newer attention-zoo"):
            read_checkpoint(path)

    @pytest.mark.parametrize("suffix", [".safetensors", ".npz", ".pth", ".pt"])
    def test_a_state_dict_is_written_for_other_programs(self, suffix: str, tmp_path: Path) -> None:
        tensors = {"moments/Squeeze": torch.randn(3, 2).T, "n": torch.tensor(3)}
        save_state_dict(tensors, tmp_path / f"a{suffix}")
        found = read_state_dict(tmp_path / f"a{suffix}")
        assert found.keys() == tensors.keys()
        assert all(torch.equal(found[name], tensors[name]) for name in tensors)

    def test_an_unknown_suffix_is_refused(self, tmp_path: Path) -> None:
        with pytest.raises(CheckpointError, match=r"cannot write \.h5"):
            save_state_dict({}, tmp_path / "a.h5")

    def test_a_full_disk_leaves_the_old_file(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        path = tmp_path / "a.safetensors"
        save_model(create_model("toy_net", width=2), path)
        before = path.read_bytes()

        def full(_: int) -> None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        monkeypatch.setattr(os, "fsync", full)
        with pytest.raises(ZooError, match=r"a\.safetensors: No space left on device"):
            save_model(create_model("toy_net", width=9), path)
        assert path.read_bytes() == before
        assert os.listdir(tmp_path) == [path.name]


def test_a_write_that_stops_half_way_leaves_the_old_file(tmp_path: Path) -> None:
    """A real refusal by the kernel in mid-file: a process whose files may not grow past 20 kB."""
    path = tmp_path / "a.safetensors"
    path.write_bytes(b"old")
    program = (
        "import torch; from zoo.weights.checkpoint import save_state_dict; from zoo.errors import ZooError\n"
        f"try: save_state_dict({{'w': torch.ones(100, 100)}}, {str(path)!r})\n"
        "except ZooError as error: print(error)"
    )
    limit = (20_000, 20_000)
    out = subprocess.run(
        [sys.executable, "-c", program],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, limit),
    )
    assert f"Cannot write {path}: File too large" in out.stdout
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == [path.name]


# ---- loading -----------------------------------------------------------------------------------------------


class Net(nn.Module):
    def __init__(self, positions: int = 4, classes: int = 3) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(2, 2) for _ in range(12))
        self.position = nn.Parameter(torch.zeros(positions, 2))
        self.head = nn.Linear(2, classes)


def test_strict_names_everything_that_does_not_fit_and_loads_nothing() -> None:
    model, state = Net(), Net(positions=6, classes=5).state_dict()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    del state["blocks.3.bias"]
    state |= {f"blocks.{i}.weight_g": torch.ones(1) for i in range(12)}
    with pytest.raises(CheckpointError) as error:
        load_state(model, state, source="old.pth")
    assert str(error.value).splitlines() == [
        "old.pth does not fit Net:",
        "  missing (1): blocks.3.bias",
        "  unexpected (12): blocks.*.weight_g (x12)",
        "  wrong shape (3): position is [6, 2], not [4, 2]; head.weight is [5, 2], not [3, 2]; "
        "head.bias is [5], not [3]",
    ]
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_skipped_tensors_stay_at_init_and_are_reported() -> None:
    model, other = Net(), Net(classes=5)
    head = model.head.weight.clone()
    report = load_state(model, other.state_dict(), skip=("head.*",))
    assert report.skipped == report.initial == ("head.bias", "head.weight")
    assert len(report.loaded) == 25
    assert torch.equal(model.head.weight, head)
    assert torch.equal(model.blocks[7].weight, other.blocks[7].weight)


def test_a_position_table_is_resized_where_asked() -> None:
    model, other = Net(positions=5), Net(positions=3)
    other.position.data = torch.tensor([[0.0, 1.0], [2.0, 1.0], [4.0, 3.0]])
    report = load_state(model, other.state_dict(), resize=("position",))
    assert report.resized == ("position",)
    assert model.position.tolist() == [[0.0, 1.0], [1.0, 1.0], [2.0, 1.0], [3.0, 2.0], [4.0, 3.0]]


def test_not_strict_reports_what_it_leaves_out() -> None:
    state = Net(classes=5).state_dict() | {"stray": torch.ones(1)}
    report = load_state(Net(), state, strict=False)
    assert report.skipped == ("head.bias", "head.weight", "stray")
    assert report.initial == ("head.bias", "head.weight")


def test_half_precision_weights_load_into_a_float_model() -> None:
    model, state = Net(), {name: value.half() for name, value in Net().state_dict().items()}
    load_state(model, state)
    assert torch.equal(model.blocks[0].weight, state["blocks.0.weight"].float())


def test_the_report_prints_as_a_table() -> None:
    report = load_state(Net(), Net(classes=5).state_dict(), skip=("head.*",))
    console = Console(width=100, record=True, quiet=False, file=open(os.devnull, "w"))  # noqa: SIM115
    console.print(report)
    rows = {
        line.split("│")[1].strip(): line
        for line in console.export_text().splitlines()
        if line.startswith("│")
    }
    assert " 25 " in rows["loaded"]
    assert "head.bias, head.weight" in rows["left at init"]


def test_resampling_keeps_the_ends_and_is_linear_on_every_axis() -> None:
    grid = torch.arange(4.0)[:, None] * 3 + torch.arange(3.0)
    finer = resample(grid, torch.Size([7, 5]))
    expected = torch.arange(7.0)[:, None] * 1.5 + torch.arange(5.0) * 0.5
    assert torch.allclose(finer, expected)


def test_names_that_differ_in_numbers_are_summarised_as_one() -> None:
    names = [f"h.{i}.{part}" for i in range(3) for part in ("w", "b")] + ["head"]
    assert summarise(names) == "h.*.b (x3), h.*.w (x3), head"
    assert summarise([f"{letter}" for letter in "abcdef"], most=4) == "a, b, c, d, and 2 more"
