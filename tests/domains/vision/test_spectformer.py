"""SpectFormer: filters on any grid."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

import zoo
from domains.vision.models.spectformer import SpectFormer
from domains.vision.spectrum import filtered, filtered_by_matrices, from_spectrum, resized_filter, spectrum
from zoo.attention import capture
from zoo.errors import ConfigError
from zoo.weights.exchange import load_weights

TINY: dict[str, Any] = {"embed_dim": 24, "depth": 3, "num_spectral": 2, "num_classes": 5, "img_size": 96}
GRIDS = pytest.mark.parametrize("grid", [(14, 14), (7, 9), (5, 4), (1, 6), (1, 1)])


def build(**options: Any) -> SpectFormer:
    torch.manual_seed(0)
    model = zoo.create_model("spectformer_xs", **(TINY | options))
    assert isinstance(model, SpectFormer)
    return model.eval()


def weights(height: int, width: int, dim: int = 3) -> torch.Tensor:
    return torch.randn(2, height, width // 2 + 1, dim, dtype=torch.float64)


@pytest.mark.parametrize(
    ("name", "millions"),
    [("spectformer_tiny", 9), ("spectformer_xs", 20), ("spectformer_small", 32), ("spectformer_base", 57)],
)
def test_published_sizes(name: str, millions: int) -> None:
    parameters = zoo.model_card(name).parameters
    assert parameters is not None
    assert round(parameters / 1e6) == millions


@GRIDS
def test_the_spectrum_by_matrices_is_that_of_torch(grid: tuple[int, int]) -> None:
    x = torch.randn(2, *grid, 3, dtype=torch.float64)
    z = spectrum(x)
    torch.testing.assert_close(torch.complex(z[:, 0], z[:, 1]), torch.fft.rfft2(x, dim=(1, 2), norm="ortho"))
    torch.testing.assert_close(from_spectrum(z, grid[1]), x)


@GRIDS
def test_both_forms_of_the_filter_agree(grid: tuple[int, int]) -> None:
    x, weight = torch.randn(2, *grid, 3, dtype=torch.float64), weights(*grid)
    torch.testing.assert_close(filtered_by_matrices(x, weight), filtered(x, weight))


@pytest.mark.parametrize("grid", [(9, 12), (6, 7), (5, 3), (4, 20)])
def test_a_small_kernel_stays_the_same_convolution_on_other_grids(grid: tuple[int, int]) -> None:
    kernel = torch.randn(3, 1, 3, 3, dtype=torch.float64)
    whole = torch.zeros(1, 6, 7, 3, dtype=torch.float64)
    for row in range(3):
        for column in range(3):
            whole[0, (1 - row) % 6, (1 - column) % 7] = kernel[:, 0, row, column]
    weight = spectrum(whole)[0] * (6 * 7) ** 0.5
    x = torch.randn(2, *grid, 3, dtype=torch.float64)
    around = F.pad(x.permute(0, 3, 1, 2), (1, 1, 1, 1), mode="circular")
    expected = F.conv2d(around, kernel, groups=3).permute(0, 2, 3, 1)
    torch.testing.assert_close(filtered(x, resized_filter(weight, grid, 7)), expected)


def test_an_official_file_of_another_image_size_is_resized() -> None:
    large, x = build(), torch.randn(2, 3, 64, 128)
    small = build(img_size=(64, 128))
    load_weights(small, zoo.to_official(large))
    torch.testing.assert_close(small(x), large(x), atol=1e-5, rtol=1e-4)


def test_only_the_attention_blocks_are_captured_or_exchanged() -> None:
    model, x = build(), torch.randn(1, 3, 96, 96)
    with capture(model) as maps:
        model(x)
    assert list(maps) == ["stages.2.0.attn"]
    other = build(attention={"name": "neighbourhood", "kernel": 3})
    assert [key for key in other.state_dict() if "filter" in key] == [
        "stages.0.0.filter.complex_weight",
        "stages.1.0.filter.complex_weight",
    ]
    assert other(x).isfinite().all()


def test_wrong_numbers_are_told() -> None:
    with pytest.raises(ConfigError, match="num_spectral=4 of depth=3"):
        build(num_spectral=4)
    with pytest.raises(ConfigError, match="Width 24 is not divisible by num_heads=5"):
        build(num_heads=5)
