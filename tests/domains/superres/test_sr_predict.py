"""`zoo predict domain=superres`: files in, larger files out."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sr_small import Repeat, smooth, tiny, write, write_many
from typer.testing import CliRunner

import zoo as library
from domains.superres.images import Picture, read_picture, write_picture
from domains.superres.predict import enlarge
from domains.superres.weights.detect import detect
from zoo.cli import app
from zoo.errors import CheckpointError, ConfigError, DataError, ZooError
from zoo.registry import list_models
from zoo.weights.checkpoint import save_model, save_state_dict
from zoo.weights.exchange import to_official


def predict(*arguments: object) -> str:
    """What the command prints; a ZooError is raised as it is."""
    given = ["predict", *map(str, arguments), "device=cpu"]
    result = CliRunner().invoke(app, given, env={"COLUMNS": "300"})
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result.output


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("weights") / "tiny.safetensors"
    save_model(tiny(), path)
    return path


# ---- kinds of pictures -------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_every_kind_of_picture_stays_what_it_is(channels: int, dtype: type) -> None:
    """Through a model that repeats pixels, every sample comes back, alpha too."""
    draw = np.random.default_rng(0)
    pixels = draw.integers(0, np.iinfo(dtype).max + 1, (9, 11, channels)).astype(dtype)
    result = enlarge(Repeat(3), Picture(pixels, b"profile", b"exif"), tile=None)
    np.testing.assert_array_equal(result.pixels, pixels.repeat(3, 0).repeat(3, 1))
    assert result.pixels.dtype == dtype
    assert (result.icc, result.exif) == (b"profile", b"exif")


@pytest.mark.parametrize("size", [(1, 1), (1, 40), (30, 2)])
def test_a_line_of_pixels_is_mirrored_to_what_models_know(size: tuple[int, int]) -> None:
    """Convolutions pad with zeros: a mean over 3 x 3 pixels is dark along a line, if that is all there is."""

    class Mean(Repeat):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(torch.nn.functional.avg_pool2d(x, 3, 1, 1))

    result = enlarge(Mean(), Picture(np.full((*size, 3), 180, np.uint8)), tile=None).pixels
    assert result.shape == (2 * size[0], 2 * size[1], 3)
    middle = result if max(size) < 16 else result[2:-2] if size[0] > 16 else result[:, 2:-2]
    assert (middle == 180).all()


def test_an_alpha_that_is_the_same_everywhere_needs_no_model() -> None:
    class Counted(Repeat):
        runs = 0

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.runs += 1
            return super().forward(x)

    pixels = np.concatenate([smooth(8, 8), np.full((8, 8, 1), 77, np.uint8)], 2)
    model = Counted()
    assert (enlarge(model, Picture(pixels), tile=None).pixels[..., 3] == 77).all()
    assert model.runs == 1


def test_files_of_every_format(weights: Path, tmp_path: Path) -> None:
    source = tmp_path / "in"
    for name in ("a.png", "b.jpg", "c.webp", "d.tif", "e.bmp"):
        write(source / name, smooth(20, 26))
    write_picture(Picture(smooth(20, 26).astype(np.uint16) * 257), source / "f16.png")
    write_picture(Picture(smooth(20, 26, 4)), source / "g.png")
    write(source / "deeper" / "grey.png", smooth(20, 26, 1))
    printed = predict(f"checkpoint={weights}", f"input={source}", f"output={tmp_path / 'out'}")
    found = {
        file.relative_to(tmp_path / "out").as_posix(): read_picture(file)
        for file in (tmp_path / "out").rglob("*.*")
    }
    names = ["a.png", "b.jpg", "c.webp", "d.tif", "deeper/grey.png", "e.png", "f16.png", "g.png"]
    assert sorted(found) == names
    assert {picture.size for picture in found.values()} == {(40, 52)}
    assert found["f16.png"].pixels.dtype == np.uint16
    assert found["g.png"].pixels.shape[2] == 4
    assert found["deeper/grey.png"].pixels.shape[2] == 1
    assert "8 pictures, x2" in printed


def test_the_result_is_that_of_the_model(weights: Path, tmp_path: Path) -> None:
    file = write(tmp_path / "a.png", smooth(20, 26))
    predict(f"checkpoint={weights}", f"input={file}", f"output={tmp_path / 'out.png'}", "tile=null")
    x = torch.from_numpy(smooth(20, 26)).permute(2, 0, 1)[None].float() / 255
    with torch.inference_mode():
        expected = (tiny()(x)[0].clamp(0, 1) * 255).round().permute(1, 2, 0).numpy()
    np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "out.png")), expected)


def test_format_suffix_and_comparison(weights: Path, tmp_path: Path) -> None:
    source = write_many(tmp_path / "in", 2)
    out, plots = tmp_path / "out", tmp_path / "plots"
    printed = predict(
        f"checkpoint={weights}",
        f"input={source}",
        f"output={out}",
        "format=webp",
        "suffix=_x2",
        f"plots={plots}",
    )
    assert sorted(file.name for file in out.iterdir()) == ["p0_x2.webp", "p1_x2.webp"]
    for file in ("p0_x2_comparison.png", "p1_x2_comparison.png"):
        assert (plots / file).stat().st_size > 5000
        assert file in printed


def test_tiles_and_self_ensemble_are_taken_from_the_command(weights: Path, tmp_path: Path) -> None:
    file = write(tmp_path / "a.png", smooth(50, 40))
    common = (f"checkpoint={weights}", f"input={file}")
    for name, options in {
        "whole": ["tile=null"],
        "tiles": ["tile=32", "overlap=8"],
        "eight": ["self_ensemble=true"],
    }.items():
        predict(*common, f"output={tmp_path / name}.png", *options)
    found = {name: np.asarray(Image.open(tmp_path / f"{name}.png")) for name in ("whole", "tiles", "eight")}
    assert (found["whole"] != found["eight"]).any()
    assert {image.shape for image in found.values()} == {(100, 80, 3)}
    with pytest.raises(ConfigError, match="tile=16: write auto"):
        predict(*common, f"output={tmp_path / 'small.png'}", "tile=16")


@pytest.mark.parametrize("size", [(1, 1), (5, 30), (27, 9)])
def test_pictures_smaller_than_a_window(size: tuple[int, int], tmp_path: Path) -> None:
    model = library.create_model("catanet_mini").eval()
    save_model(model, tmp_path / "w.safetensors")
    file = write(tmp_path / "a.png", smooth(*size))
    out, plots = tmp_path / "out.png", tmp_path / "plots"
    predict(f"checkpoint={tmp_path / 'w.safetensors'}", f"input={file}", f"output={out}", f"plots={plots}")
    assert read_picture(out).size == (2 * size[0], 2 * size[1])


# ---- which weights -----------------------------------------------------------------------------------------


def test_every_registered_model_is_told_from_its_official_file() -> None:
    for name in list_models("superres/*"):
        model = library.create_model(f"superres/{name}")
        assert detect(to_official(model)) == name


def test_other_files_are_not_taken_for_one() -> None:
    assert detect({"features.0.weight": torch.zeros(3)}) is None
    state = to_official(library.create_model("superres/dlgsanet_tiny_x2", dim=54))
    assert detect(state) is None
    assert detect({"blocks.0.0.means": torch.zeros(4, 8)}) is None


@pytest.mark.parametrize("key", ["params", "params_ema", None])
def test_official_weights_without_a_name(key: str | None, tmp_path: Path) -> None:
    file = write(tmp_path / "a.png", smooth(12, 14))
    save_state_dict(to_official(library.create_model("dlgsanet_mini", scale=2)), tmp_path / "w.pth", key)
    predict(
        "domain=superres", f"checkpoint={tmp_path / 'w.pth'}", f"input={file}", f"output={tmp_path / 'o.png'}"
    )
    assert read_picture(tmp_path / "o.png").size == (24, 28)


def test_weights_of_another_scale_or_model_are_named(tmp_path: Path) -> None:
    file = write(tmp_path / "a.png", smooth(12, 14))
    save_state_dict(to_official(library.create_model("catanet_x2")), tmp_path / "w.pth", "params")
    rest = (f"checkpoint={tmp_path / 'w.pth'}", f"input={file}", f"output={tmp_path / 'o.png'}")
    for asked in ("catanet_x4", "dlgsanet_light_x2"):
        with pytest.raises(CheckpointError, match=f"holds the weights of catanet_x2, not of {asked}"):
            predict("domain=superres", f"model={asked}", *rest)
    with pytest.raises(CheckpointError, match="The weights enlarge x2, not x4"):
        predict("domain=superres", "model=catanet_x2", "scale=4", *rest)


def test_own_weights_under_another_name_are_refused(weights: Path, tmp_path: Path) -> None:
    file = write(tmp_path / "a.png", smooth(12, 14))
    with pytest.raises(CheckpointError, match="holds the weights of dlgsanet_mini, not of catanet_x4"):
        predict("model=catanet_x4", f"checkpoint={weights}", f"input={file}", f"output={tmp_path / 'o.png'}")


def test_a_file_of_no_known_model_asks_for_the_name(tmp_path: Path) -> None:
    file = write(tmp_path / "a.png", smooth(12, 14))
    torch.save({"params": {"conv.weight": torch.zeros(1)}}, tmp_path / "w.pth")
    with pytest.raises(CheckpointError, match=r"holds tensors without a model config\. Name the model"):
        predict("domain=superres", f"checkpoint={tmp_path / 'w.pth'}", f"input={file}", "output=o.png")


# ---- what goes wrong ---------------------------------------------------------------------------------------


def _broken(folder: Path) -> Path:
    write_many(folder, 2)
    (folder / "garbage.png").write_bytes(b"no picture")
    content = write(folder / "cut.jpg", smooth(60, 60)).read_bytes()
    (folder / "cut.jpg").write_bytes(content[: len(content) // 2])
    return folder


def test_corrupt_files_are_left_out_and_named(weights: Path, tmp_path: Path) -> None:
    source = _broken(tmp_path / "in")
    printed = predict(f"checkpoint={weights}", f"input={source}", f"output={tmp_path / 'out'}")
    assert "2 of 4 files were left out" in printed
    assert "garbage.png cannot be read" in printed
    assert "cut.jpg cannot be read" in printed
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == ["p0.png", "p1.png"]


def test_corrupt_files_can_be_an_error_before_anything_is_written(weights: Path, tmp_path: Path) -> None:
    source = _broken(tmp_path / "in")
    with pytest.raises(DataError, match=r"cut\.jpg cannot be read"):
        predict(f"checkpoint={weights}", f"input={source}", f"output={tmp_path / 'out'}", "corrupt=error")
    assert not list((tmp_path / "out").iterdir())


def test_nothing_that_can_be_read_is_an_error(weights: Path, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"no picture")
    with pytest.raises(DataError, match="None of the 1 files"):
        predict(f"checkpoint={weights}", f"input={tmp_path / 'a.png'}", f"output={tmp_path / 'out'}")
    with pytest.raises(DataError, match="has no pictures"):
        predict(f"checkpoint={weights}", f"input={tmp_path / 'out'}", f"output={tmp_path / 'other'}")
    with pytest.raises(DataError, match="is no file or folder"):
        predict(f"checkpoint={weights}", f"input={tmp_path / 'gone'}", f"output={tmp_path / 'other'}")
    with pytest.raises(ConfigError, match="needs pictures: input="):
        predict(f"checkpoint={weights}")


def test_a_format_that_cannot_hold_a_picture_is_named(weights: Path, tmp_path: Path) -> None:
    source = write_many(tmp_path / "in", 1)
    write(source / "clear.png", smooth(20, 20, 4))
    printed = predict(f"checkpoint={weights}", f"input={source}", f"output={tmp_path / 'out'}", "format=jpg")
    assert "1 of 2 files were left out" in printed
    assert "clear.jpg: JPEG knows no transparency" in printed


def test_an_output_that_cannot_be_written_is_named_before_the_work(weights: Path, tmp_path: Path) -> None:
    source = write_many(tmp_path / "in", 1)
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(ZooError, match=r"Cannot write to .*file"):
        predict(f"checkpoint={weights}", f"input={source}", f"output={tmp_path / 'file'}")


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="permissions do not bind this user")
def test_a_folder_without_permission_is_named(weights: Path, tmp_path: Path) -> None:
    source = write_many(tmp_path / "in", 1)
    (tmp_path / "locked").mkdir(mode=0o500)
    with pytest.raises(ZooError, match=r"Cannot write to .*locked: Permission denied"):
        predict(f"checkpoint={weights}", f"input={source}", f"output={tmp_path / 'locked'}")


def test_no_input_is_replaced(weights: Path, tmp_path: Path) -> None:
    source = write_many(tmp_path / "in", 2)
    before = (source / "p0.png").read_bytes()
    with pytest.raises(ConfigError, match=r"p0\.png would replace an input: .*suffix=_x4"):
        predict(f"checkpoint={weights}", f"input={source}", f"output={source}")
    predict(f"checkpoint={weights}", f"input={source}", f"output={source}", "suffix=_x2")
    assert (source / "p0.png").read_bytes() == before
    assert (source / "p1_x2.png").is_file()


def test_inputs_of_one_name_keep_their_suffix(weights: Path, tmp_path: Path) -> None:
    for name in ("a.png", "a.jpg"):
        write(tmp_path / "in" / name, smooth(20, 20))
    predict(f"checkpoint={weights}", f"input={tmp_path / 'in'}", f"output={tmp_path / 'out'}", "format=png")
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == ["a.jpg.png", "a.png.png"]


def test_an_output_inside_of_the_input_is_not_taken_for_input(weights: Path, tmp_path: Path) -> None:
    write_many(tmp_path, 2)
    for _ in range(2):
        printed = predict(f"checkpoint={weights}", f"input={tmp_path}", f"output={tmp_path / 'out'}")
        assert "2 pictures, x2" in printed


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("format=gif", "format=gif is not one of png, jpg, webp, tif"),
        ("corrupt=ignore", "corrupt=ignore is not one of skip, error"),
        ("quality=0", "quality=0: 1 to 100"),
        ("overlap=-1", "overlap=-1: at least 0"),
        ("output=a.png format=jpg", "format=jpg contradict"),
    ],
)
def test_settings_that_cannot_be(option: str, message: str, weights: Path, tmp_path: Path) -> None:
    file = write(tmp_path / "in.png", smooth(20, 20))
    with pytest.raises(ConfigError, match=message):
        predict(f"checkpoint={weights}", f"input={file}", *option.split())
