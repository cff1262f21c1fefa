"""Training and judging of super-resolution."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, ClassVar, Self, cast

import numpy as np
import torch
from omegaconf import DictConfig, OmegaConf
from rich.console import RenderableType
from rich.table import Table
from torch import Tensor, nn

from domains.superres.data import SuperresData
from domains.superres.losses import build_loss, l1
from domains.superres.metrics import Quality, judge, mean, to_uint8
from domains.superres.plots import cut_detail
from domains.superres.resize import imresize
from domains.superres.tiles import upscaled
from domains.superres.transfer import rescaled, transfer
from zoo.errors import CheckpointError, ConfigError
from zoo.training.callbacks import gather
from zoo.training.task import Mean, Task, checked, new_model

BICUBIC = "bicubic"
LISTED = 100
"""Up to so many pictures, each has a row in the table of the terminal."""


class SuperresTask(Task):
    """Trains a model on crops; judges whole pictures in the field's protocol.

    Args:
        model: `(B, 3, H, W)` in [0, 1] -> `(B, 3, s H, s W)`, with `scale` s and `min_size`.
        cfg: the run's config; `loss` is read beside what `Task` reads.
        facts: the `extra()` of the data the model was made for.
        data: what is trained on.
    """

    monitor: ClassVar[str] = "val/psnr_y"
    mode: ClassVar[str] = "max"

    def __init__(
        self, model: nn.Module, cfg: DictConfig, facts: Mapping[str, Any], data: SuperresData | None = None
    ) -> None:
        super().__init__(model, cfg)
        self.scale: int = cast(Any, model).scale
        options = OmegaConf.select(cfg, "loss", default=OmegaConf.create())
        self.error = build_loss(**checked("loss", build_loss, options))
        self.psnr_y = Mean()
        self.seen: list[dict[str, Any]] = []

    @classmethod
    def build(cls, cfg: DictConfig, data: SuperresData, model: nn.Module | None = None) -> Self:
        """The task for `data`, paired for the scale of `model`, which is made by `cfg.model` if not given."""
        if model is None:
            model = new_model(rescaled(cfg, data.scale) if "finetune" in cfg else cfg, data)
        smallest = cast(Any, model).min_size
        if data.patch < smallest:
            raise ConfigError(f"data.patch={data.patch}: the model needs at least {smallest} pixels a side.")
        data.use(cast(Any, model).scale)
        return cls(model, cfg, data.extra(), data)

    @staticmethod
    def facts_of(model: nn.Module) -> dict[str, Any]:
        """Facts of weights that carry none, as official ones."""
        return {"scale": cast(Any, model).scale}

    @staticmethod
    def check(facts: Mapping[str, Any], data: SuperresData, source: str) -> None:
        """See that the weights enlarge as much as the data ask for.

        Raises:
            CheckpointError: they are for another scale.
        """
        if data.scale not in (None, facts["scale"]):
            raise CheckpointError(
                f"{source} enlarges x{facts['scale']}, the data are x{data.scale}: leave out data.scale, "
                "or take weights of that scale."
            )

    @staticmethod
    def prepare(facts: Mapping[str, Any], data: SuperresData) -> None:
        """Pair the pictures at the scale of the weights."""
        data.use(facts["scale"])

    @classmethod
    def transfer(cls, path: Path, data: SuperresData) -> nn.Module:
        """The model of a checkpoint; for another `data.scale`, all of it but the up-sampler."""
        return transfer(path, data.scale)

    def predict_step(self, batch: Sequence[Mapping[str, Any]], batch_idx: int) -> list[Tensor]:
        return [upscaled(self.model, sample["lr"], tile=self._data.tile) for sample in batch]

    def loss(self, batch: Any, stage: str) -> tuple[Tensor, Tensor]:
        if stage == "train":
            count = torch.tensor(float(batch["hr"].numel()), device=batch["hr"].device)
            return self.error(self.model(batch["lr"]), batch["hr"]) * count, count
        totals, counts = zip(*(self._judged(sample, stage) for sample in batch), strict=True)
        return torch.stack(totals).sum(), torch.stack(counts).sum()

    def _judged(self, sample: Mapping[str, Any], stage: str) -> tuple[Tensor, Tensor]:
        """Sum and number of the absolute errors of a whole picture, whose quality is kept."""
        sr = upscaled(self.model, sample["lr"], tile=self._data.tile)
        hr = sample["hr"].cpu()
        quality = judge(_pixels(sr), _pixels(hr), self.border)
        self.psnr_y.update(torch.tensor(min(quality.psnr_y, 100.0)), torch.tensor(1.0))
        if stage == "test":
            kept = {key: sample[key] for key in ("name", "group", "index")}
            lr = np.round(_pixels(sample["lr"].cpu()) * 255).astype(np.uint8)
            bicubic, enlarged = self._bicubic(lr, _pixels(hr))
            detail = cut_detail(lr, enlarged, to_uint8(_pixels(sr)), _pixels(hr))
            self.seen.append(kept | {"quality": asdict(quality), BICUBIC: bicubic, "detail": detail})
        count = torch.tensor(float(hr.numel()), device=self.device)
        return l1(sr, hr / 255).to(self.device) * count, count

    def _bicubic(self, lr: np.ndarray, hr: np.ndarray) -> tuple[dict[str, float], np.ndarray]:
        """Quality of bicubic enlargement, and the picture; raw: of floats, clipped but not rounded."""
        enlarged = imresize(lr, self.scale)
        raw = asdict(judge(imresize(lr / 255, self.scale).clip(0, 1), hr, self.border))
        quality = asdict(judge(enlarged, hr, self.border))
        return quality | {key: raw[key] for key in ("psnr_y_raw", "ssim_y_raw")}, enlarged

    def metrics(self, stage: str) -> dict[str, Tensor]:
        value = self.psnr_y.compute()
        self.psnr_y.reset()
        if stage == "test":
            rows = {row["index"]: row for rows in gather(self.seen) for row in rows}
            self.seen = [rows[index] for index in sorted(rows)]
        return {"psnr_y": value}

    @property
    def _data(self) -> SuperresData:
        return cast(SuperresData, self.data)

    @property
    def border(self) -> int:
        """Pixels left out on each side when judging."""
        return self.scale if self._data.border is None else self._data.border

    # ---- results -----------------------------------------------------------------------------------------

    @property
    def name(self) -> str:
        return cast(Any, self.model).zoo_config["name"]

    def results(self, data: SuperresData) -> dict[str, Any]:  # pyright: ignore[reportIncompatibleMethodOverride]
        rows = self.seen
        groups = list(dict.fromkeys(row["group"] for row in rows))
        means = {group or "all": _means([row for row in rows if row["group"] == group]) for group in groups}
        return {
            "data": data.name,
            "model": self.name,
            "scale": self.scale,
            "border": self.border,
            "pictures": {part: len(data.parts[part]) for part in data.parts},
            "unreadable": data.unreadable,
            "mean": _plain(_means(rows)),
            "sets": {group: _plain(values) for group, values in means.items()},
            "images": [{"name": row["name"], "set": row["group"], **_plain(_means([row]))} for row in rows],
        }

    def report(self, results: dict[str, Any]) -> Sequence[RenderableType]:
        return [_table(results), *_verdict(results)]

    def plots(self, data: SuperresData, results: dict[str, Any], folder: Path) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        from domains.superres.plots import draw_results

        draw_results(self, data, results, folder)


def _pixels(image: Tensor) -> np.ndarray:
    """`(H, W, 3)` of `(3, H, W)`."""
    return image.permute(1, 2, 0).numpy()


def _means(rows: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    return {
        "model": asdict(mean(Quality(**row["quality"]) for row in rows)),
        BICUBIC: asdict(mean(Quality(**row[BICUBIC]) for row in rows)),
    }


def _plain(values: Mapping[str, Mapping[str, float]]) -> dict[str, dict[str, float | str]]:
    """Rounded, with `"inf"` for what JSON has no number for."""
    return {
        name: {key: round(value, 8) if math.isfinite(value) else str(value) for key, value in metrics.items()}
        for name, metrics in values.items()
    }


def _table(results: Mapping[str, Any]) -> Table:
    """A row per picture, then the means."""
    title = f"x{results['scale']}, border {results['border']}: PSNR (dB) / SSIM of luma"
    table = Table("picture", title=title)
    for heading in (results["model"], "raw", "bicubic", "gain"):
        table.add_column(heading, justify="right", no_wrap=True)
    rows = [(row["name"], row) for row in results["images"]]
    if len(rows) > LISTED:
        table.title = f"{title}; the {LISTED} pictures of least gain of {len(rows)}"
        rows = sorted(rows, key=lambda row: _gain(row[1]))[:LISTED]
    for name, row in rows:
        table.add_row(name, *_cells(row))
    table.add_section()
    if len(results["sets"]) > 1:
        for name, row in results["sets"].items():
            table.add_row(f"mean of {name}", *_cells(row))
    table.add_row("mean", *_cells(results["mean"]), style="bold")
    return table


def _cells(row: Mapping[str, Any]) -> list[str]:
    """PSNR / SSIM of the model in both flavours, those of bicubic, and the difference in dB."""
    own, bicubic = row["model"], row[BICUBIC]
    pairs = [(own["psnr_y"], own["ssim_y"]), (own["psnr_y_raw"], own["ssim_y_raw"])]
    pairs.append((bicubic["psnr_y"], bicubic["ssim_y"]))
    return [*(f"{float(psnr):.2f} / {float(ssim):.4f}" for psnr, ssim in pairs), f"{_gain(row):+.2f}"]


def _gain(row: Mapping[str, Any]) -> float:
    own, bicubic = float(row["model"]["psnr_y"]), float(row[BICUBIC]["psnr_y"])
    return 0.0 if own == bicubic else own - bicubic


def _verdict(results: Mapping[str, Any]) -> list[str]:
    own, bicubic = results["mean"]["model"], results["mean"][BICUBIC]
    lines = [
        f"{results['model']} x{results['scale']}: {float(own['psnr_y']):.2f} dB, SSIM {own['ssim_y']:.4f} on "
        f"luma of {len(results['images'])} pictures; {_gain(results['mean']):+.2f} dB on bicubic "
        f"({float(bicubic['psnr_y']):.2f} dB, {bicubic['ssim_y']:.4f}). Rounded to 8 bits as saved; raw: "
        f"{float(own['psnr_y_raw']):.2f} dB, {own['ssim_y_raw']:.4f}."
    ]
    if results["unreadable"]:
        lines.append(f"{len(results['unreadable'])} pictures could not be read and are left out.")
    return lines
