"""Tiles: equal to the whole where they can be, without seams where they cannot."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from sr_small import Local, Repeat, smooth, tiny
from torch import Tensor

import zoo
from domains.superres import tiles
from domains.superres.tiles import automatic_pixels, free_memory, tile_shape, upscale, upscaled
from zoo.errors import ConfigError, ZooError


def _image(height: int, width: int) -> Tensor:
    return torch.from_numpy(smooth(height, width)).permute(2, 0, 1)


@pytest.mark.parametrize("scale", [2, 3, 4])
@pytest.mark.parametrize("tile", [16, 17, 24, 40])
def test_tiles_of_a_local_model_equal_the_whole(tile: int, scale: int) -> None:
    model, image = Local(scale), _image(61, 38)
    whole = upscaled(model, image, tile=None)
    torch.testing.assert_close(upscaled(model, image, tile=tile, overlap=8), whole, atol=1e-5, rtol=0)


@pytest.mark.parametrize("length", range(17, 60))
def test_weights_sum_to_one_and_no_three_tiles_meet(length: int) -> None:
    spans = tiles._spans(length, 16, 8, 3)
    total = torch.zeros(3 * length)
    for start, stop, weight, first in spans:
        assert 0 <= start < stop <= length
        assert 3 * start <= first
        assert first + len(weight) <= 3 * stop
        total[first : first + len(weight)] += weight
    torch.testing.assert_close(total, torch.ones_like(total))
    for (_, _, weight, first), (_, _, _, after) in zip(spans, spans[2:], strict=False):
        assert first + len(weight) <= after


def test_what_differs_fades_over_a_ramp() -> None:
    """A model that adds a number of its own to every tile: neighbouring rows differ by a step of the ramp."""

    class Biased(Repeat):
        calls = 0

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            return super().forward(x) + self.calls % 2 * 4 / 255

    result = 255 * upscaled(Biased(), torch.zeros(3, 60, 20), tile=40, overlap=16)
    steps = result.diff(dim=1).abs()
    assert float(result.max()) == pytest.approx(4, abs=1e-3)
    assert float(steps.max()) <= 4 / 16 + 1e-3


def test_rows_are_handed_out_once_in_order() -> None:
    seen: list[tuple[int, int]] = []
    upscale(Repeat(), _image(70, 50), lambda top, rows: seen.append((top, rows.shape[1])), tile=32, overlap=8)
    assert len(seen) == 3
    assert seen[0][0] == 0
    assert all(a + n == b for (a, n), (b, _) in pairwise(seen))
    assert seen[-1][0] + seen[-1][1] == 140


def test_no_tile_is_larger_than_asked_for() -> None:
    model = Local()
    upscaled(model, _image(100, 70), tile=32, overlap=8)
    assert {size[2:] for size in model.sizes} == {(32, 32)}


def test_self_ensemble_is_the_mean_over_flips_and_turns() -> None:
    model, image = Local(3), _image(15, 11)
    tile = image[None].float() / 255
    expected = torch.zeros(1, 3, 45, 33)
    for turns in range(4):
        for flip in (False, True):
            turned = tile.rot90(turns, (2, 3))
            turned = turned.flip(3) if flip else turned
            out = model(turned)
            out = out.flip(3) if flip else out
            expected += out.rot90(-turns, (2, 3)) / 8
    torch.testing.assert_close(upscaled(model, image, tile=None, self_ensemble=True), expected[0])


def test_sixteen_bits_and_grey_are_scaled_and_repeated() -> None:
    deep = torch.tensor([[[0, 65535], [13107, 257]]], dtype=torch.uint16)
    result = upscaled(Repeat(), deep, tile=None)
    assert result.shape == (3, 4, 4)
    np.testing.assert_allclose(result[1, ::2, ::2], [[0, 1], [0.2, 1 / 255]], atol=1e-6)


class Hungry(Local):
    """Runs out of memory on tiles of more than 24 pixels."""

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[2] > 24:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes.")
        return super().forward(x)


def test_tiles_are_halved_until_memory_suffices(capsys: pytest.CaptureFixture[str]) -> None:
    model, image = Hungry(), _image(80, 70)
    found = upscaled(model, image, tile=80, overlap=8)
    torch.testing.assert_close(found, upscaled(model, image, tile=20, overlap=8), atol=1e-5, rtol=0)
    printed = capsys.readouterr().out
    assert "tiles of 70x80 pixels; going on with 35x40 pixels" in printed
    assert "tiles of 35x40 pixels; going on with 17x20 pixels" in printed


def test_memory_that_never_suffices_is_an_error() -> None:
    with pytest.raises(ZooError, match="Out of memory even for tiles of 32x32 pixels"):
        upscaled(Hungry(), _image(80, 70), tile=64, overlap=16)


def test_other_errors_are_not_taken_for_a_lack_of_memory() -> None:
    class Broken(Local):
        def forward(self, x: Tensor) -> Tensor:
            raise RuntimeError("shapes do not fit")

    with pytest.raises(RuntimeError, match="shapes do not fit"):
        upscaled(Broken(), _image(80, 70), tile=64)


@pytest.mark.parametrize("tile", [63, 0, "big", 2.5])
def test_tiles_too_small_for_the_overlap_are_refused(tile: object) -> None:
    with pytest.raises(ConfigError, match=f"tile={tile}: write auto, null .* at least 64 pixels"):
        upscaled(Local(), _image(80, 70), tile=tile)


@pytest.mark.parametrize("size", [(1, 1), (3, 50), (20, 2)])
@pytest.mark.parametrize("name", ["catanet_mini", "dlgsanet_mini"])
def test_pictures_smaller_than_a_window(name: str, size: tuple[int, int]) -> None:
    torch.manual_seed(0)
    result = upscaled(zoo.create_model(name).eval(), _image(*size), tile="auto")
    assert result.shape == (3, 2 * size[0], 2 * size[1])
    assert result.isfinite().all()


def test_the_automatic_tile_follows_the_free_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    assert free_memory(cpu) > 0
    for scale in (2, 3, 4):
        found = []
        for free in (0, 2**29, 2**31, 2**40):
            monkeypatch.setattr(tiles, "free_memory", lambda _, free=free: free)
            found.append(automatic_pixels(torch.empty(3, 64, 64, dtype=torch.uint8), scale, cpu))
        assert found == sorted(found)
        assert found[0] == tiles.SMALLEST**2
        assert tiles.BYTES_PER_PIXEL[scale] * found[-1] <= tiles.TILE_MEMORY[1]


def test_the_automatic_tile_leaves_room_for_the_result(monkeypatch: pytest.MonkeyPatch) -> None:
    """Twice its bytes, more of 16 bits; 24 megapixels at x4 get the least."""
    monkeypatch.setattr(tiles, "free_memory", lambda _: 2**40)

    def memory(scale: int, dtype: torch.dtype = torch.uint8) -> float:
        photo = torch.empty(1, dtype=dtype).expand(3, 4000, 6000)
        pixels = automatic_pixels(photo, scale, torch.device("cpu"))
        return pixels * tiles.BYTES_PER_PIXEL[scale] / 2**30

    assert memory(2) == pytest.approx(2.25 - 2 * 288e6 / 2**30, abs=1e-4)
    assert memory(2, torch.uint16) == pytest.approx(2.25 - 4 * 288e6 / 2**30, abs=1e-4)
    assert memory(4) == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize(
    ("pixels", "size", "shape"),
    [
        (1000 * 400, (400, 1000), (400, 1000)),
        (1000 * 300, (400, 1000), (300, 1000)),
        (1000 * 300, (2000, 3000), (256, 1171)),
        (1000 * 300, (3000, 500), (600, 500)),
        (1000 * 300, (100, 9000), (100, 3000)),
        (100 * 100, (400, 500), (100, 100)),
        (1, (400, 500), (16, 16)),
    ],
)
def test_automatic_tiles_are_wide_but_not_too_low(
    pixels: int, size: tuple[int, int], shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tiles, "automatic_pixels", lambda *_: pixels)
    assert tile_shape(Local(), torch.zeros(1, *size), "auto", 8) == shape


def test_tiny_models_are_what_the_other_tests_take_them_for() -> None:
    assert upscaled(tiny(), _image(9, 8), tile=None).shape == (3, 18, 16)
