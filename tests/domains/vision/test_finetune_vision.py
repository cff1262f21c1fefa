"""`zoo finetune` on images: probes, LoRA, official weights, other classes."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import command_line
import pytest
import torch
from pictures import folders
from small_backbones import settled

import zoo as library
from domains.vision.preprocess import Preprocessing
from zoo.errors import CheckpointError, ConfigError, ZooError
from zoo.weights.checkpoint import load_model, read_checkpoint

QUICK = (
    "data=imagefolder",
    "data.baselines=false",
    "data.batch_size=8",
    "data.num_workers=0",
    "trainer.max_epochs=2",
    "trainer.enable_progress_bar=false",
    "trainer.accelerator=cpu",
    "logger.tensorboard=false",
    "optimizer.lr=0.01",
    "schedule.name=constant",
    "plots=false",
)
SMALL = {"embed_dims": [16, 16], "depths": [1, 1], "head_dim": 8, "n_win": 2, "img_size": 16}
OLD, NEW = ["red", "yellow", "blue"], ["blue", "green", "red"]


def zoo(*arguments: str) -> str:
    """What `zoo finetune` prints, on one line; a ZooError is raised as it is."""
    return " ".join(command_line.zoo(*arguments, columns=200).split())


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return folders(tmp_path_factory.mktemp("images"), dict.fromkeys(NEW, 10))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    model = settled(library.create_model("vision/biformer_digits", num_classes=3, **SMALL))
    path = tmp_path_factory.mktemp("weights") / "model.safetensors"
    library.save_model(
        model, path, extra={"classes": OLD, "preprocessing": asdict(Preprocessing.of(model, size=[16, 16]))}
    )
    return path


@pytest.mark.parametrize("probe", ["linear", "attentive"])
def test_a_probe_is_trained_stored_and_used(
    probe: str, checkpoint: Path, images: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    zoo(
        "finetune",
        *QUICK,
        f"data.path={images}",
        f"checkpoint={checkpoint}",
        "method=probe",
        f"probe={probe}",
        "finetune.probe.attentive.num_queries=4",
        f"run_dir={run}",
    )
    before, (after, meta) = read_checkpoint(checkpoint)[0], read_checkpoint(run / "model.safetensors")
    body = [name for name in before if not name.startswith("head.")]
    assert all(torch.equal(before[name], after[name]) for name in body)
    assert meta["model"]["config"]["head_norm"] is True
    assert any(name.startswith("pool.") for name in after) == (probe == "attentive")
    assert after["head_norm.running_mean"].abs().sum() > 0
    model, facts = load_model(run / "model.safetensors")
    assert facts["classes"] == NEW
    assert model(torch.randn(2, 3, 16, 16)).shape == (2, 3)
    assert "Top-1" in zoo("evaluate", f"run={run}", f"output={tmp_path / 'again'}", "plots=false")
    zoo("train", f"resume={run}", "trainer.max_epochs=3")
    assert len((run / "metrics.csv").read_text().splitlines()) == 4


def test_lora_leaves_a_plain_model(checkpoint: Path, images: Path, tmp_path: Path) -> None:
    pytest.importorskip("peft")
    run = tmp_path / "run"
    given = (f"data.path={images}", f"checkpoint={checkpoint}", f"run_dir={run}")
    zoo("finetune", *QUICK, *given, "method=lora", "finetune.lora.r=2")
    before, after = read_checkpoint(checkpoint)[0], read_checkpoint(run / "model.safetensors")[0]
    changed = {name for name in after if not torch.equal(before[name], after[name])}
    attention = {name for name in changed if ".attn." in name}
    assert attention
    assert changed - attention == {"head.weight", "head.bias"}


def test_layer_decay_spares_the_first_layers(checkpoint: Path, images: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    given = (f"data.path={images}", f"checkpoint={checkpoint}", f"run_dir={run}", "optimizer.weight_decay=0")
    zoo("finetune", *QUICK, *given, "trainer.max_epochs=1", "finetune.layer_decay=1e-6")
    before, after = read_checkpoint(checkpoint)[0], read_checkpoint(run / "model.safetensors")[0]
    for name in ("stem.1.conv.weight", "stages.0.0.attn.qkv.weight"):
        torch.testing.assert_close(after[name], before[name], atol=1e-6, rtol=0)
    changed = (after["stages.1.1.mlp.0.weight"] - before["stages.1.1.mlp.0.weight"]).abs().max()
    assert changed < 1e-6 < (after["head.weight"] - before["head.weight"]).abs().max()


def test_known_classes_keep_their_rows(checkpoint: Path, images: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    given = (f"data.path={images}", f"checkpoint={checkpoint}", f"run_dir={run}")
    output = zoo("finetune", *QUICK, *given, "method=head", "trainer.max_epochs=1", "optimizer.lr=1e-9")
    assert "2 of 3 classes are in the checkpoint and keep their rows of the head: blue, red." in output
    before, after = read_checkpoint(checkpoint)[0], read_checkpoint(run / "model.safetensors")[0]
    torch.testing.assert_close(after["head.weight"][[0, 2]], before["head.weight"][[2, 0]])


def test_official_weights_are_converted_and_trained_further(images: Path, tmp_path: Path) -> None:
    small = {"dims": [16, 16, 24], "depths": [1, 1, 1], "num_heads": [2, 2, 2]}
    model = library.create_model("vision/efficientvit_m0", num_classes=5, **small)
    torch.save(library.to_official(model), tmp_path / "official.pth")
    run = tmp_path / "run"
    given = (f"data.path={images}", "model=efficientvit_m0", f"checkpoint={tmp_path / 'official.pth'}")
    output = zoo(
        "finetune", *QUICK, *given, "data.size=32", "trainer.max_epochs=1", "method=probe", f"run_dir={run}"
    )
    assert "names no classes: the head starts anew" in output
    before = model.state_dict()
    for name in ("start.safetensors", "model.safetensors"):
        after, meta = read_checkpoint(run / name)
        assert meta["model"]["name"] == "efficientvit_m0"
        assert torch.equal(after["stem.0.conv.weight"], before["stem.0.conv.weight"])


@pytest.mark.parametrize(
    ("override", "error", "message"),
    [
        ("probe=atentive", ConfigError, "Did you mean 'attentive'"),
        ("finetune.probe.attentive.num_queries=5", ConfigError, "16 channels cannot be shared out evenly"),
        ("finetune.probe.attentive.queries=5", ConfigError, "Unknown key"),
        ("model=biformer_digits", ConfigError, "takes the model from the checkpoint"),
        ("checkpoint=null", ConfigError, "needs checkpoint=RUN"),
        ("checkpoint=OFFICIAL", CheckpointError, "name of the model: model=NAME"),
    ],
)
def test_mistakes_are_named(
    override: str, error: type[ZooError], message: str, checkpoint: Path, images: Path, tmp_path: Path
) -> None:
    if override == "checkpoint=OFFICIAL":
        torch.save({"stem.weight": torch.zeros(1)}, tmp_path / "official.pth")
        override = f"checkpoint={tmp_path / 'official.pth'}"
    given = [] if override.startswith("checkpoint=") else [f"checkpoint={checkpoint}"]
    method = [] if override.startswith("probe=") else ["probe=attentive"]
    run = f"run_dir={tmp_path / 'run'}"
    with pytest.raises(error, match=message):
        zoo("finetune", *QUICK, f"data.path={images}", *given, "method=probe", *method, override, run)
    assert not (tmp_path / "run" / "config.yaml").exists()
