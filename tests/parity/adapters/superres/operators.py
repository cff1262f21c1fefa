"""The operators and metrics of the field, and the bicubic figures of Set5."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import asdict
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from domains.superres.metrics import Quality, judge, mean
from domains.superres.models.catanet_patches import Patches
from domains.superres.models.dlgsanet_layers import tlc_windows
from domains.superres.resize import degrade, imresize
from parity.fixture import EXTERNAL, Fixture, NoAdapter
from zoo.layers.dynamic_conv import dynamic_conv

Tensors = dict[str, Tensor]


def operators(fixture: Fixture) -> tuple[Tensors, dict[str, Any]]:
    computed = _dynamic_conv(fixture)
    for name in fixture.tensors:
        kind, *sizes = re.split(r"_", name.removeprefix("output/"))
        if name.startswith("output/") and kind == "patch":
            computed |= _patches(fixture, *sizes)
        elif name.startswith("output/") and kind == "tlc":
            computed[name] = _windows(*sizes)
        elif name.startswith("output/") and kind == "imresize":
            computed[name] = torch.from_numpy(_resized(fixture, *sizes))
    return computed, {"metrics": _metrics(fixture)}


def _dynamic_conv(fixture: Fixture) -> Tensors:
    x, weight, upstream = (t.requires_grad_() for t in fixture.inputs("dyn_x", "dyn_weight", "dyn_grad_out"))
    y = dynamic_conv(x, weight)
    y.backward(upstream.detach())
    assert x.grad is not None
    assert weight.grad is not None
    return {"output/dyn_y": y, "grad/dyn_x": x.grad, "grad/dyn_weight": weight.grad}


def _patches(fixture: Fixture, size: str, patch: str) -> Tensors:
    """`31x40`, `ps16`: cut and put back untouched."""
    (x,) = fixture.inputs(f"patch_{size}_{patch}")
    height, width = x.shape[2:]
    patches = Patches(height, width, int(patch[2:]), x.device)
    result = patches.apply(x.permute(0, 2, 3, 1), lambda tokens: tokens).permute(0, 3, 1, 2)
    count = torch.tensor([len(patches.rows.starts), len(patches.columns.starts)])
    return {f"output/patch_{size}_{patch}": result, f"output/patchcount_{size}_{patch}": count}


def _windows(size: str, kernel: str) -> Tensor:
    """`97x51`, `k48`: origins in order."""
    height, width = map(int, size.split("x"))
    tops, lefts = (tlc_windows(length, int(kernel[1:])) for length in (height, width))
    return torch.tensor([[top, left] for top in tops for left in lefts])


def _resized(fixture: Fixture, kind: str, change: str) -> np.ndarray:
    """`u8` or `f64`, `down3` or `up3`."""
    image = fixture.tensors["input/img_u8"].numpy()
    image = image if kind == "u8" else image / 255
    factor = int(change[-1])
    return (
        imresize(image[:16, :18], factor) if change.startswith("up") else imresize(image, Fraction(1, factor))
    )


def _metrics(fixture: Fixture) -> dict[str, dict[str, float]]:
    noisy, image = (tensor.numpy() for tensor in fixture.inputs("img_noisy_u8", "img_u8"))
    names = ("psnr_y", "ssim_y", "psnr_rgb", "ssim_rgb")
    found = {border: asdict(judge(noisy, image, border)) for border in (0, 2, 3, 4)}
    return {f"crop{border}": {name: values[name] for name in names} for border, values in found.items()}


# ---- Set5 --------------------------------------------------------------------------------------------------


def bicubic_set5(fixture: Fixture) -> tuple[Tensors, dict[str, Any]]:
    folder = Path(os.environ.get("ZOO_SHARED_DATA", EXTERNAL.parent / "data")) / "superres" / "Set5"
    if not folder.is_dir():
        raise NoAdapter(f"no pictures at {folder}")
    return {}, {f"x{scale}": _figures(fixture, folder, scale) for scale in (2, 3, 4)}


def _figures(fixture: Fixture, folder: Path, scale: int) -> dict[str, Any]:
    """Of every picture, and their means."""
    rows: dict[str, Quality] = {}
    unrounded, images = {}, {}
    for name, original, lr in _pairs(folder, list(fixture.spec[f"x{scale}"]["images"]), scale):
        whole = np.asarray(original.convert("RGB"))
        hr = whole[: scale * lr.shape[0], : scale * lr.shape[1]]
        rows[name] = judge(imresize(lr, scale), hr, scale)
        unrounded[name] = judge(imresize(lr / 255, scale).clip(0, 1), hr, scale).psnr_y_raw
        images[name] = _named(rows[name], unrounded[name]) | {
            "lr_pixels_differing": int((degrade(whole, scale) != lr).sum()),
            "mode": original.mode,
            "hr_size": list(whole.shape[:2]),
        }
    return {"mean": _named(mean(rows.values()), float(np.mean(list(unrounded.values())))), "images": images}


def _pairs(folder: Path, names: list[str], scale: int) -> Iterator[tuple[str, Image.Image, np.ndarray]]:
    for name in names:
        lr = Image.open(folder / "LR_bicubic" / f"X{scale}" / f"{name}x{scale}.png").convert("RGB")
        yield name, Image.open(folder / "HR" / f"{name}.png"), np.asarray(lr)


def _named(quality: Quality, unrounded: float) -> dict[str, Any]:
    return {
        "psnr_y": quality.psnr_y,
        "ssim_y": quality.ssim_y,
        "psnr_rgb": quality.psnr_rgb,
        "ssim_rgb": quality.ssim_rgb,
        "psnr_y_float": quality.psnr_y_raw,
        "ssim_y_float": quality.ssim_y_raw,
        "psnr_y_unrounded": unrounded,
    }


ADAPTERS = {"operators": operators, "bicubic_set5": bicubic_set5}
