"""A trained model to one with another attention: what each layer loses, and what the test says."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, cast

import pytorch_lightning as pl
import torch
from lightning_fabric.utilities import move_data_to_device
from omegaconf import DictConfig, OmegaConf
from rich.table import Table
from torch import nn

from zoo import config as zoo_config
from zoo.attention.convert import CONVERSIONS
from zoo.attention.convert.registry import check_options
from zoo.cli.console import console
from zoo.errors import ConfigError, did_you_mean
from zoo.training.converted_model import (
    Calls,
    LayerLoss,
    as_core_layers,
    as_json,
    convert_model,
    loss_table,
    observe,
)
from zoo.training.folder import environment, new_folder, write_json
from zoo.training.run import RunResult, Trained, report, tested, trained_on
from zoo.training.task import Task, plain
from zoo.weights.checkpoint import save_model


def convert(cfg: DictConfig) -> RunResult:
    """Convert the attention that `cfg.argument` chooses as `cfg.to` says, and write the model as a run.

    Layers are fitted to tokens of the training data; their errors are measured on these and on tokens of the
    validation data; the model is tested before and after.

    Raises:
        ConfigError: no weights, no data, no such conversion, or a model whose attention cannot be converted.
        AttentionError: a layer that cannot be converted so, or options that do not fit.
    """
    options = plain(cfg.to)
    to = _checked(options.pop("name", None))
    check_options(to, options)
    if min(cfg.calibration.tokens, cfg.calibration.held_out) < 1:
        raise ConfigError("calibration.tokens and calibration.held_out are at least 1.")
    pl.seed_everything(cfg.seed, workers=True, verbose=False)
    trained = trained_on(cfg, "convert", fit=True)
    folder = _folder(cfg, trained)
    model = as_core_layers(trained.model, cfg.argument)
    before = tested(trained.task(model), trained.data, cfg)
    old = before.results(trained.data)
    device, data = before.trainer.strategy.root_device, trained.data
    seen = _observed(trained.task(model), data.train_dataloader(), cfg.calibration.tokens, device)
    unseen = _observed(trained.task(model), data.val_dataloader(), cfg.calibration.held_out, device)
    swapped, losses = convert_model(model, to, seen, unseen, argument=cfg.argument, **options)
    console.print(loss_table(losses))
    _write(cfg, folder, trained, swapped, losses)
    after = tested(trained.task(swapped), trained.data, cfg)
    new = report(cfg, folder, after, trained.data)
    scores = {"original": before.headline(old), "converted": after.headline(new)}
    console.print(_score_table(scores))
    write_json(
        folder / "conversion.json",
        {"to": plain(cfg.to), "layers": as_json(losses), "test": scores},
    )
    console.print(
        f"The converted model is in {folder}; to close its error: zoo finetune checkpoint={folder} data=NAME",
        highlight=False,
        soft_wrap=True,
    )
    return RunResult(folder, new)


def _checked(to: str | None) -> str:
    if to is None:
        raise ConfigError(f"zoo convert needs to=NAME, one of {', '.join(sorted(CONVERSIONS))}.")
    if to not in CONVERSIONS:
        raise ConfigError(
            f"There is no conversion to={to}.{did_you_mean(str(to), CONVERSIONS)} "
            f"There are: {', '.join(sorted(CONVERSIONS))}."
        )
    return to


def _folder(cfg: DictConfig, trained: Trained) -> Path:
    """Where the converted model goes, which holds no run yet."""
    built = cast(Any, trained.model).zoo_config
    named = OmegaConf.create({"domain": {"name": built["domain"]}, "model": {"name": built["name"]}})
    folder = Path(cfg.output) if cfg.output else new_folder(named)
    if (folder / "config.yaml").is_file():
        raise ConfigError(f"There is a run in {folder} already. Choose another output.")
    return folder


def _observed(task: Task, batches: Iterable[Any], tokens: int, device: torch.device) -> Calls:
    """What the layers of the model are called with for batches of data."""
    task.to(device).eval()

    def passes() -> Iterator[None]:
        for batch in batches:
            task.loss(move_data_to_device(batch, device), "val")
            yield

    return observe(task.model, passes(), tokens)


def _write(
    cfg: DictConfig, folder: Path, trained: Trained, model: nn.Module, losses: list[LayerLoss]
) -> None:
    """Weights and config of the converted model, as a finished run has them."""
    built = cast(Any, model).zoo_config
    stored = cast(
        DictConfig, OmegaConf.merge(trained.stored, {"data": cfg.get("data") or trained.stored.data})
    )
    stored.model = {"name": built["name"], **built["config"]}
    stored.domain = {"name": built["domain"]}
    stored.run_dir, stored.resume = str(folder), None
    zoo_config.write(stored, folder / "config.yaml")
    environment(folder, {"converted_from": str(cfg.run or cfg.checkpoint or cfg.model)})
    save_model(model, folder / "model.safetensors", extra=trained.facts)


def _score_table(scores: dict[str, dict[str, float]]) -> Table:
    table = Table("test", *scores, title="Before and after, not yet fine-tuned", title_justify="left")
    for name in scores["original"]:
        table.add_row(name, *(f"{values[name]:.4g}" for values in scores.values()))
    return table
