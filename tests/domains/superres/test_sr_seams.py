"""`zoo check domain=superres`: the differences at the seams of tiles, and what keeps them small."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest
import torch
from command_line import zoo
from skimage.data import astronaut, coffee
from sr_small import Repeat, smooth, tiny, write
from torch import Tensor, nn

import zoo as library
from domains.superres.models.catanet_patches import LocalAttention as PatchAttention
from domains.superres.models.dlgsanet_layers import ChannelAttention
from domains.superres.models.place import Place
from domains.superres.seams import Difference, differences
from domains.superres.tiles import OVERLAP, seams, upscaled
from zoo.attention.kernels import softmax
from zoo.errors import ConfigError, DataError, ZooError
from zoo.weights.checkpoint import save_model

SMALL = {"dim": 8, "qk_dim": 8, "mlp_dim": 16, "patch_sizes": [8], "num_tokens": [8], "group_sizes": [32]}
"""Of `catanet_mini`."""


def trained(model: nn.Module, steps: int) -> nn.Module:
    """After steps on crops of a photograph, enough that what it adds to the picture counts."""
    photo = torch.from_numpy(astronaut()).permute(2, 0, 1).float() / 255
    draw = np.random.default_rng(0)
    optimizer = torch.optim.Adam(model.train().parameters(), 5e-3)
    for _ in range(steps):
        places = draw.integers(0, 512 - 48, (4, 2))
        hr = torch.stack([photo[:, y : y + 48, x : x + 48] for y, x in places])
        loss = (model(nn.functional.avg_pool2d(hr, 2)) - hr).abs().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval()


@pytest.fixture(scope="module")
def photo() -> Tensor:
    """A part of a photograph that nothing was trained on, `(3, 192, 192)`."""
    return torch.from_numpy(coffee()[150:342, 150:342].copy()).permute(2, 0, 1)


@pytest.fixture(scope="module")
def dlgsanet() -> nn.Module:
    return trained(tiny().train(), 80)


@pytest.fixture(scope="module")
def catanet() -> nn.Module:
    torch.manual_seed(0)
    return trained(library.create_model("catanet_mini", **SMALL, n_iters=[1]), 80)


# ---- what is measured --------------------------------------------------------------------------------------


def at_seams(model: nn.Module, photo: Tensor, overlap: int) -> Difference:
    """Of four tiles that share `overlap` pixels, no more."""
    return differences(model, photo, [(192 + overlap) // 2], overlap, "coffee")[0]


@pytest.mark.parametrize("name", ["dlgsanet", "catanet"])
def test_seams_are_below_one_grey_level(name: str, photo: Tensor, request: pytest.FixtureRequest) -> None:
    """As set; with hardly any overlap, or none, the bound is passed."""
    model = request.getfixturevalue(name)
    assert at_seams(model, photo, OVERLAP).seam_rgb < 1
    assert at_seams(model, photo, 4).seam_rgb > 1
    assert at_seams(model, photo, 0).seam_mean > 1


def test_what_is_measured() -> None:
    """A model that adds three grey levels of red to its second tile, which a ramp of two pixels fades in."""

    class Uneven(Repeat):
        calls = 0

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            red = torch.tensor([3 / 255, 0, 0]).view(3, 1, 1)
            return super().forward(x) + (red if self.calls == 3 else 0)

    image = torch.full((3, 20, 36), 100, dtype=torch.uint8)
    tiled, cropped = differences(Uneven(1), image, [20], 4, "flat")
    assert (tiled.picture, tiled.width, tiled.height, tiled.tile, tiled.overlap) == (
        "flat",
        36,
        20,
        "20x20",
        4,
    )
    assert tiled.seam_rgb == pytest.approx(3 * 0.75, abs=1e-3)
    assert tiled.seam_luma == pytest.approx(3 * 0.75 * 65.481 / 255, abs=1e-3)
    assert tiled.seam_mean == pytest.approx(1.5 / 3, abs=1e-3)
    assert tiled.seam_above == pytest.approx(1 / 6)
    assert tiled.all_rgb == pytest.approx(3, abs=1e-3)
    assert tiled.all_above == pytest.approx(18 / 36 / 3, abs=0.02)
    assert cropped.tile == "cropped"
    assert cropped.all_rgb == 0
    assert np.isnan(cropped.seam_rgb)


def test_seams_without_overlap_are_where_tiles_meet() -> None:
    where = seams(torch.zeros(3, 10, 40), (10, 20), 0, 2)
    assert where.shape == (20, 80)
    assert where[0].nonzero().flatten().tolist() == [39, 40]


# ---- what tiles are told -----------------------------------------------------------------------------------


def test_patches_of_a_tile_lie_where_they_do_in_the_picture() -> None:
    torch.manual_seed(0)
    layer = PatchAttention(12, 8, 20, 2, 6).eval()
    x = torch.randn(1, 40, 44, 12)
    whole = layer(x)[:, 17:28, 13:24]
    found = layer(x[:, 7:38, 5:34], Place(7, 5, 40, 44))[:, 10:21, 8:19]
    torch.testing.assert_close(found, whole, atol=1e-5, rtol=1e-5)
    assert (layer(x[:, 7:38, 5:34])[:, 10:21, 8:19] - whole).abs().max() > 1e-3


def test_windows_of_a_tile_lie_where_they_do_in_the_picture() -> None:
    torch.manual_seed(0)
    layer, norm = ChannelAttention(12, 3, softmax, 8).eval(), nn.Identity()
    x = torch.randn(1, 40, 40, 12)
    whole = layer(x, norm)[:, 8:32, 8:32]
    found = layer(x[:, 6:36, 6:37], norm, Place(6, 6, 40, 40))[:, 2:26, 2:26]
    torch.testing.assert_close(found, whole, atol=1e-5, rtol=1e-5)
    assert (layer(x[:, 6:36, 6:37], norm)[:, 2:26, 2:26] - whole).abs().max() > 1e-3


@pytest.mark.parametrize("self_ensemble", [False, True])
def test_places_are_those_of_the_turned_picture(self_ensemble: bool) -> None:
    image = torch.randint(0, 256, (3, 40, 52), dtype=torch.uint8)
    whole = image[None].float() / 255
    turned = [whole.flip(flips) for flips in ((), (2,), (3,), (2, 3))]
    turned += [picture.transpose(2, 3) for picture in turned]
    seen = []

    class Placed(Repeat):
        placed = True

        def forward(self, x: Tensor, place: Place) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
            rows = slice(place.top, place.top + x.shape[2])
            columns = slice(place.left, place.left + x.shape[3])
            fits = [p for p in turned if p.shape[2:] == place[2:] and torch.equal(p[..., rows, columns], x)]
            seen.append(len(fits))
            return super().forward(x)

    upscaled(Placed(), image, tile=24, overlap=8, self_ensemble=self_ensemble)
    assert seen == [1] * 6 * (8 if self_ensemble else 1)


# ---- the command -------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    save_model(tiny(), "tiny.safetensors")
    write(Path("in/large.png"), smooth(70, 90))
    write(Path("in/small.png"), smooth(20, 22))
    return tmp_path


def check(*arguments: str) -> str:
    return zoo("check", "domain=superres", "checkpoint=tiny.safetensors", *arguments, "device=cpu")


def test_the_command_prints_a_table_and_writes_it(folder: Path) -> None:
    out = check("input=in", "tile=[64,48]", "overlap=8", "output=seams.csv")
    assert "large.png" in out
    assert "small.png" not in out
    with open("seams.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [(row["picture"], row["tile"]) for row in rows] == [
        ("large.png", "64x64"),
        ("large.png", "48x48"),
        ("large.png", "cropped"),
    ]
    assert all(f"{float(row['seam_rgb']):.2f}" in out for row in rows[:2])


def test_a_seam_above_the_limit_fails(folder: Path) -> None:
    check("input=in", "tile=48", "overlap=8", "limit=200")
    with pytest.raises(ZooError, match=r"Seams differ by up to .* grey levels, more than limit=0.0\."):
        check("input=in", "tile=48", "overlap=8", "limit=0.0")


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ([], ConfigError, "zoo check needs pictures: input="),
        (["input=nowhere"], DataError, "input=nowhere is no file"),
        (["input=in"], ConfigError, "No picture of input=in is larger than a tile"),
        (["input=in", "tile=null"], ConfigError, "tile=null has no seams"),
        (["input=in", "tile=48"], ConfigError, "tile=48: .* at least 64 pixels"),
        (["input=in", "overlap=-1"], ConfigError, "overlap=-1: at least 0"),
        (["input=in", "output=seams.txt"], ConfigError, "the suffix must be .csv"),
        (["input=in", "nve_ps=0"], ConfigError, "nve_ps"),
    ],
)
def test_settings_of_a_check_that_cannot_be(
    folder: Path, options: list[str], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        check(*options)


def test_a_whole_picture_that_does_not_fit_into_memory_is_an_error() -> None:
    class Hungry(Repeat):
        def forward(self, x: Tensor) -> Tensor:
            raise MemoryError("no room")

    with pytest.raises(ZooError, match="Out of memory even for tiles of 40x30 pixels"):
        differences(Hungry(), torch.zeros(3, 30, 40), [20], 8, "photo")
