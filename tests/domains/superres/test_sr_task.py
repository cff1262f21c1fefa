"""Losses, training, judging, and starting from another scale."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from command_line import QUIET, zoo
from sr_small import smooth, tiny, write, write_many

import zoo as library
from domains.superres.losses import build_loss, charbonnier, fft, l1
from domains.superres.metrics import judge, to_uint8
from domains.superres.plots import most_detailed
from domains.superres.resize import degrade, imresize
from domains.superres.tiles import upscaled
from domains.superres.transfer import transfer
from zoo.errors import CheckpointError, ConfigError, DataError
from zoo.weights.checkpoint import load_model, read_state_dict, save_model, save_state_dict
from zoo.weights.exchange import to_official

SMALL = (
    "model=dlgsanet_mini",
    "model.dim=6",
    "model.groups=1",
    "data.patch=8",
    "data.steps=3",
    "data.batch_size=4",
    "data.num_workers=0",
    "trainer.max_epochs=2",
    "schedule.name=constant",
    "schedule.warmup_steps=0",
)


def train(folder: Path, run: Path, *more: str) -> str:
    source = ("data=folder", f"data.path={folder}")
    return zoo("train", "domain=superres", *source, *SMALL, *QUIET, f"run_dir={run}", *more)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_many(tmp_path_factory.mktemp("pictures"), 5)


@pytest.fixture(scope="module")
def trained(pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    run = tmp_path_factory.mktemp("runs") / "run"
    return run, train(pictures, run)


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_model(run / "model.safetensors")[0].state_dict()


# ---- losses ------------------------------------------------------------------------------------------------


def test_losses_are_their_formulas() -> None:
    a, b = torch.rand(2, 3, 6, 8), torch.rand(2, 3, 6, 8)
    assert float(l1(a, b)) == pytest.approx(float((a - b).abs().mean()))
    expected = ((a - b) ** 2 + 1e-6).sqrt().mean()
    assert float(charbonnier(a, b)) == pytest.approx(float(expected))
    spectrum = np.fft.rfft2((a - b).numpy())
    expected = (np.abs(spectrum.real).mean() + np.abs(spectrum.imag).mean()) / 2
    assert float(fft(a, b)) == pytest.approx(float(expected), rel=1e-5)


def test_a_mix_is_the_weighted_sum() -> None:
    a, b = torch.rand(1, 3, 4, 4), torch.rand(1, 3, 4, 4)
    mixed = build_loss(name="charbonnier+0.05*fft", eps=0.01)
    assert float(mixed(a, b)) == pytest.approx(float(charbonnier(a, b, 0.01) + 0.05 * fft(a, b)))
    assert float(build_loss(name=None)(a, b)) == pytest.approx(float(l1(a, b)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "charbonier"}, "no loss.name=charbonier. Did you mean 'charbonnier'"),
        ({"name": "l1+x*fft"}, "'x' is no positive number"),
        ({"name": "l1+-1*fft"}, "'-1' is no positive number"),
        ({"name": "charbonnier", "eps": 0.0}, "loss.eps=0.0"),
    ],
)
def test_losses_that_do_not_exist(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build_loss(**options)


# ---- training and judging ----------------------------------------------------------------------------------


def test_a_run_prints_and_keeps_what_it_reached(trained: tuple[Path, str]) -> None:
    run, printed = trained
    results = json.loads((run / "results.json").read_text())
    assert results["scale"] == results["border"] == 2
    assert results["pictures"] == {"train": 3, "val": 1, "test": 1}
    (row,) = results["images"]
    assert f"{row['model']['psnr_y']:.2f} / {row['model']['ssim_y']:.4f}" in printed
    assert f"{row['bicubic']['psnr_y']:.2f} / {row['bicubic']['ssim_y']:.4f}" in printed
    assert results["mean"]["model"] == row["model"]
    for name in ("details.png", "training.png"):
        assert (run / "plots" / name).stat().st_size > 5000
    assert "val/psnr_y" in (run / "metrics.csv").read_text()


def test_figures_are_those_of_the_protocol(trained: tuple[Path, str], pictures: Path) -> None:
    """Computed again from the weights: whole picture, border 2, rounded and raw."""
    run, _ = trained
    row = json.loads((run / "results.json").read_text())["images"][0]
    hr = smooth(40, 44, seed=int(row["name"][1:]))
    lr = degrade(hr, 2)
    model, _ = load_model(run / "model.safetensors")
    sr = upscaled(model, torch.from_numpy(lr).permute(2, 0, 1), tile=None).permute(1, 2, 0).numpy()
    quality = judge(sr, hr, 2)
    assert row["model"]["psnr_y"] == pytest.approx(quality.psnr_y, abs=1e-4)
    assert row["model"]["psnr_y_raw"] == pytest.approx(quality.psnr_y_raw, abs=1e-4)
    assert row["model"]["ssim_y"] == pytest.approx(quality.ssim_y, abs=1e-5)
    assert row["bicubic"]["psnr_y"] == pytest.approx(judge(imresize(lr, 2), hr, 2).psnr_y, abs=1e-7)
    assert judge(to_uint8(sr), hr, 2).psnr_y == quality.psnr_y


def test_training_is_seeded_and_resumes_to_the_same_weights(
    trained: tuple[Path, str], pictures: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    train(pictures, run, "trainer.max_steps=3")
    zoo("train", f"resume={run}", "trainer.max_steps=-1", "trainer.max_epochs=2")
    for name, value in weights(trained[0]).items():
        torch.testing.assert_close(weights(run)[name], value, rtol=0, atol=0)


def test_evaluate_with_another_border_and_in_tiles(trained: tuple[Path, str], tmp_path: Path) -> None:
    write_many(tmp_path / "pictures", 2, (150, 140))
    printed = zoo(
        "evaluate",
        f"run={trained[0]}",
        "data=folder",
        f"data.path={tmp_path / 'pictures'}",
        "data.border=4",
        "data.tile=64",
        f"output={tmp_path}",
        "trainer.accelerator=cpu",
    )
    results = json.loads((tmp_path / "results.json").read_text())
    assert "x2, border 4" in printed
    assert results["border"] == 4
    assert len(results["images"]) == 2


def test_evaluate_official_weights_and_sets_beside_each_other(tmp_path: Path) -> None:
    """The name of the model may be left out; equal pictures are infinitely good, in valid JSON."""
    save_state_dict(to_official(library.create_model("catanet_x2")), tmp_path / "w.pth", "params")
    for name in ("A", "B"):
        write(tmp_path / "sets" / name / "HR" / "flat.png", np.full((40, 40, 3), 90, np.uint8))
    printed = zoo(
        "evaluate",
        f"checkpoint={tmp_path / 'w.pth'}",
        "data=folder",
        f"data.path={tmp_path / 'sets'}",
        f"output={tmp_path / 'out'}",
        "trainer.accelerator=cpu",
        "plots=false",
    )
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results["model"] == "catanet_x2"
    assert results["sets"].keys() == {"A", "B"}
    assert results["mean"]["bicubic"]["psnr_y"] == "inf"
    assert "inf / 1.0000" in printed
    assert "mean of A" in printed


def test_evaluate_refuses_data_of_another_scale(trained: tuple[Path, str], pictures: Path) -> None:
    with pytest.raises(CheckpointError, match="enlarges x2, the data are x4"):
        zoo("evaluate", f"run={trained[0]}", "data=folder", f"data.path={pictures}", "data.scale=4")


def test_evaluate_names_pictures_that_are_too_small_for_ssim(
    trained: tuple[Path, str], tmp_path: Path
) -> None:
    write(tmp_path / "small.png", smooth(12, 12))
    with pytest.raises(DataError, match="SSIM needs 11 x 11 pixels inside a border of 2"):
        zoo(
            "evaluate", f"run={trained[0]}", "data=folder", f"data.path={tmp_path}", "trainer.accelerator=cpu"
        )


def test_crops_below_what_the_model_needs_are_refused(pictures: Path, tmp_path: Path) -> None:
    source = ("domain=superres", "data=folder", f"data.path={pictures}", f"run_dir={tmp_path / 'run'}")
    with pytest.raises(ConfigError, match=r"data\.patch=8: the model needs at least 12 pixels"):
        zoo("train", *source, "model=catanet_mini", "data.patch=8", *QUIET)


def test_charbonnier_with_fft_trains(pictures: Path, tmp_path: Path) -> None:
    train(
        pictures,
        tmp_path / "run",
        "loss.name=charbonnier+0.05*fft",
        "loss.eps=0.01",
        "trainer.max_epochs=1",
        "plots=false",
    )
    assert json.loads((tmp_path / "run" / "results.json").read_text())["model"] == "dlgsanet_mini"


def test_the_detail_shown_is_where_luma_changes_the_most() -> None:
    image = np.full((200, 300, 3), 100, np.uint8)
    image[60:130, 180:260] = np.random.default_rng(0).integers(0, 256, (70, 80, 3))
    top, left, side = most_detailed(image, 60, 3)
    assert side == 60
    assert top % 3 == left % 3 == 0
    assert 57 <= top <= 72
    assert 177 <= left <= 201


# ---- from one scale to another -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "upsampler"), [("catanet_mini", "upsampler"), ("dlgsanet_mini", "upsample")]
)
def test_everything_but_the_up_sampler_is_taken_over(
    name: str, upsampler: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    old = library.create_model(name, scale=2)
    save_model(old, tmp_path / "x2.safetensors")
    new = transfer(tmp_path / "x2.safetensors", 4)
    printed = " ".join(capsys.readouterr().out.split())
    assert new.scale == 4
    assert f"{upsampler}" in printed
    assert "skipped" in printed
    before = old.state_dict()
    for key, value in new.state_dict().items():
        if not key.startswith(upsampler):
            assert torch.equal(value, before[key]), key


def test_a_published_variant_becomes_that_of_the_other_scale(tmp_path: Path) -> None:
    save_model(library.create_model("catanet_x2"), tmp_path / "x2.safetensors")
    built: Any = transfer(tmp_path / "x2.safetensors", 3).zoo_config
    assert built["name"] == "catanet_x3"


def test_finetune_from_x2_to_x4_and_reload(trained: tuple[Path, str], pictures: Path, tmp_path: Path) -> None:
    settings = [text for text in SMALL if text.startswith(("data.", "trainer.", "schedule."))]
    source = ("data=folder", f"data.path={pictures}", "data.scale=4", "data.patch=5")
    settings = [text for text in settings if not text.startswith("data.patch")]
    run = tmp_path / "run"
    zoo("finetune", f"checkpoint={trained[0]}", *source, *settings, *QUIET, f"run_dir={run}", "plots=false")
    assert json.loads((run / "results.json").read_text())["scale"] == 4
    zoo("train", f"resume={run}", "trainer.max_epochs=3", "plots=false")
    model: Any = load_model(run / "model.safetensors")[0]
    assert model.scale == 4
    official = tmp_path / "official.pth"
    zoo("weights", "convert", run / "model.safetensors", "to=official", f"output={official}")
    assert torch.load(official, weights_only=True).keys() == {"params"}
    x = torch.rand(1, 3, 9, 8)
    again = library.from_official("dlgsanet_mini", official).eval()
    torch.testing.assert_close(again(x), model(x))


def test_finetune_from_an_official_file_of_another_scale(pictures: Path, tmp_path: Path) -> None:
    official, run = tmp_path / "x2.pth", tmp_path / "run"
    save_state_dict(to_official(library.create_model("dlgsanet_mini", scale=2)), official, "params")
    source = ("data=folder", f"data.path={pictures}", "data.scale=4", "data.patch=5", "trainer.max_epochs=1")
    settings = [text for text in SMALL if text.startswith(("data.steps", "data.batch", "schedule."))]
    start = ("model=dlgsanet_mini", f"checkpoint={official}", f"run_dir={run}")
    printed = zoo("finetune", *start, *source, *settings, *QUIET, "plots=false", "optimizer.lr=1e-9")
    assert "From x2 to x4: upsampler starts anew" in printed
    tuned = to_official(load_model(run / "model.safetensors")[0])
    for name, value in read_state_dict(official).items():
        if not name.startswith("upsample."):
            torch.testing.assert_close(tuned[name], value, rtol=0, atol=1e-5)


def test_averaged_weights_of_an_official_file_come_first(tmp_path: Path) -> None:
    tensors = to_official(tiny())
    plain = {key: value + 1 for key, value in tensors.items()}
    torch.save({"params": plain, "params_ema": tensors}, tmp_path / "w.pth")
    read = read_state_dict(tmp_path / "w.pth")
    assert all(torch.equal(read[key], value) for key, value in tensors.items())


def test_example_inputs_serve_the_count_of_operations() -> None:
    assert library.registry.count_flops("dlgsanet_mini") > 1e6  # pyright: ignore[reportOptionalOperand]
