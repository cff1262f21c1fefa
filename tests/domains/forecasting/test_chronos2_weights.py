"""Folders of the official program, and LoRA adapters for them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf

import zoo
from domains.forecasting.models.chronos2 import Chronos2
from domains.forecasting.pipeline import Forecaster
from domains.forecasting.weights import load_folder, official_config, save_adapter, save_folder
from zoo.errors import CheckpointError, ConfigError
from zoo.training.finetune import adapt, merge_lora

SMALL = {"d_model": 16, "d_kv": 4, "d_ff": 24, "num_layers": 2, "num_heads": 2, "context_length": 64}


def small(**options: Any) -> Any:
    return zoo.create_model("chronos2", **(SMALL | options)).eval()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_folder(small(), tmp_path / "base")
    return tmp_path / "base"


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"activation": "gelu", "use_arcsinh": False, "use_reg_token": False, "time_encoding_scale": 32},
        {"patch_size": 8, "patch_stride": 4, "quantiles": [0.1, 0.5, 0.9], "max_output_patches": 2},
        {"dropout_rate": 0.0, "layer_norm_epsilon": 1e-5, "rope_theta": 500.0, "initializer_factor": 1.0},
    ],
)
def test_a_folder_keeps_every_option_and_weight(options: dict, tmp_path: Path) -> None:
    model = small(**options)
    save_folder(model, tmp_path)
    again = load_folder(tmp_path)
    assert again.options == model.options
    assert official_config(again) == official_config(model)
    for name, value in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name
    assert not again.training


def test_the_config_has_the_entries_of_the_official_one(shared_data: Path) -> None:
    official = shared_data / "forecasting" / "chronos2_dummy_checkpoint"
    if not official.is_dir():
        pytest.skip(f"no {official}")
    written, read = official_config(load_folder(official)), json.loads((official / "config.json").read_text())
    assert written == {key: value for key, value in read.items() if key != "transformers_version"}


def test_a_folder_stands_where_a_file_does(folder: Path) -> None:
    expected = load_folder(folder).state_dict()
    for model in (
        zoo.from_official("chronos2", folder),
        zoo.create_model("chronos2", checkpoint_path=folder),
        Forecaster.from_folder(folder).model,
    ):
        assert isinstance(model, Chronos2)
        assert model.d_model == 16
        assert all(torch.equal(value, expected[name]) for name, value in model.state_dict().items())


def test_own_checkpoints_rebuild_the_model(tmp_path: Path) -> None:
    model = small()
    zoo.save_model(model, tmp_path / "model.safetensors")
    again, _ = zoo.load_model(tmp_path / "model.safetensors")
    x = torch.randn(2, 50)
    with torch.no_grad():
        assert torch.equal(again(x).quantiles, model(x).quantiles)


# ---- adapters ----------------------------------------------------------------------------------------------


HEAD = ("output_patch_embedding.*.bias", "output_patch_embedding.*.base_layer.*", "*.[hr]*_layer.weight")


def trained_lora(folder: Path, freeze: Sequence[str] = HEAD) -> Any:
    """The model of a folder with updates of random values."""
    model = load_folder(folder)
    targets = ["*.self_attention.[qkvo]", "output_patch_embedding.output_layer"]
    lora = {"r": 4, "alpha": 8, "dropout": 0.0, "target": targets}
    adapt(model, OmegaConf.create({"method": "lora", "freeze": list(freeze), "lora": lora}))
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()


def test_an_adapter_is_written_as_the_official_program_reads_it(folder: Path, tmp_path: Path) -> None:
    model, x = trained_lora(folder), torch.randn(2, 50)
    save_adapter(model, tmp_path / "adapter", base=str(folder))
    with torch.no_grad():
        expected = model(x).normalised
    found = load_folder(tmp_path / "adapter")(x).normalised
    torch.testing.assert_close(found, expected)
    merge_lora(model)
    save_folder(model, tmp_path / "merged")
    torch.testing.assert_close(load_folder(tmp_path / "merged")(x).normalised, expected)
    assert (load_folder(folder)(x).normalised - expected).abs().max() > 1e-3


def test_peft_reads_our_adapter(folder: Path, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    model, x = trained_lora(folder), torch.randn(2, 50)
    save_adapter(model, tmp_path, base=str(folder))
    config = peft.PeftConfig.from_pretrained(str(tmp_path))
    base = load_folder(folder)
    base.config = {"model_type": "custom"}  # what peft asks any model for
    loaded = peft.PeftModel.from_pretrained(base, str(tmp_path), config=config).eval()
    with torch.no_grad():
        torch.testing.assert_close(loaded(x).normalised, model(x).normalised)


def test_an_adapter_names_its_base_or_is_told(folder: Path, tmp_path: Path) -> None:
    save_adapter(trained_lora(folder), tmp_path / "a", base="elsewhere/base")
    with pytest.raises(CheckpointError, match=r"is for elsewhere.base, .*base=DIR"):
        load_folder(tmp_path / "a")
    assert load_folder(tmp_path / "a", base=folder).d_model == 16
    with pytest.raises(CheckpointError, match="no adapter"):
        load_folder(folder, base=folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"use_dora": True}, "only plain LoRA"),
        ({"bias": "all"}, "only plain LoRA"),
        ({"modules_to_save": ["shared"]}, "only plain LoRA"),
    ],
)
def test_other_kinds_of_adapters_are_refused(
    changes: dict, message: str, folder: Path, tmp_path: Path
) -> None:
    save_adapter(trained_lora(folder), tmp_path / "a", base=str(folder))
    edit(tmp_path / "a" / "adapter_config.json", **changes)
    with pytest.raises(CheckpointError, match=message):
        load_folder(tmp_path / "a")


def test_an_adapter_of_another_model_is_refused(folder: Path, tmp_path: Path) -> None:
    save_adapter(trained_lora(folder), tmp_path / "a")
    save_folder(small(num_layers=1), tmp_path / "shallow")
    save_folder(small(d_model=8), tmp_path / "narrow")
    with pytest.raises(CheckpointError, match=r"encoder.block.1.* no such layer"):
        load_folder(tmp_path / "a", base=tmp_path / "shallow")
    with pytest.raises(CheckpointError, match=r"by \[8, 16\], but that has \[8, 8\]"):
        load_folder(tmp_path / "a", base=tmp_path / "narrow")


def test_unmerged_updates_are_not_written_as_a_model(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="merge them"):
        save_folder(trained_lora(folder), tmp_path / "x")
    with pytest.raises(CheckpointError, match=r"output_patch_embedding.*trained as well: freeze"):
        save_adapter(trained_lora(folder, freeze=()), tmp_path / "x")
    with pytest.raises(CheckpointError, match="no LoRA"):
        save_adapter(small(), tmp_path / "x")


# ---- mistakes ----------------------------------------------------------------------------------------------


def test_files_that_lack(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"has no config.json"):
        load_folder(tmp_path)
    (folder / "config.json").write_text("{]")
    with pytest.raises(CheckpointError, match="no JSON"):
        load_folder(folder)
    (folder / "config.json").write_text('{"model_type": "t5"}')
    with pytest.raises(CheckpointError, match="no chronos_config"):
        load_folder(folder)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"num_layers": 3}, CheckpointError, r"missing .*encoder.block.\*"),
        ({"num_layers": 1}, CheckpointError, r"unexpected .*encoder.block.\*"),
        ({"d_ff": 25}, CheckpointError, "wrong shape"),
        ({"feed_forward_proj": "gated-gelu"}, ConfigError, "no gated activations"),
        ({"dense_act_fn": "selu"}, ConfigError, "no activation 'selu'"),
        ({"chronos_config": {}}, ConfigError, "has no context_length"),
    ],
)
def test_configs_that_do_not_fit(changes: dict, error: type[Exception], message: str, folder: Path) -> None:
    edit(folder / "config.json", **changes)
    with pytest.raises(error, match=message):
        load_folder(folder)


def test_patch_sizes_must_agree(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())["chronos_config"]
    edit(folder / "config.json", chronos_config=config | {"output_patch_size": 8})
    with pytest.raises(ConfigError, match="must be equal"):
        load_folder(folder)
