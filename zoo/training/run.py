"""A run from config to results: train, resume, evaluate, finetune."""

from __future__ import annotations

import inspect
import logging
import time
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import pytorch_lightning as pl
import torch
from lightning_fabric.utilities.exceptions import MisconfigurationException
from omegaconf import DictConfig, OmegaConf
from pytorch_lightning.callbacks import Callback, LambdaCallback
from pytorch_lightning.loggers import TensorBoardLogger
from torch import nn

from zoo.cli.console import console, errors
from zoo.create import create_model
from zoo.errors import CheckpointError, ConfigError, ZooError, did_you_mean
from zoo.registry import Domain, get_domain, model_card
from zoo.training.callbacks import Checkpoints, MetricsTable, Patience, ProgressLine, RandomState, StopAtStep
from zoo.training.checkpoint_io import AtomicCheckpointIO
from zoo.training.data import DataModule
from zoo.training.ema import EMA
from zoo.training.finetune import adapt, changes, merge_lora
from zoo.training.folder import environment, new_folder, open_folder, stored_config, write_json
from zoo.training.task import Task, Tested
from zoo.weights.checkpoint import load_model, read_checkpoint, read_state_dict, save_model
from zoo.weights.exchange import detect_model, from_official


@dataclass(frozen=True)
class RunResult:
    """Where a run lies and what it reached."""

    folder: Path
    results: dict[str, Any]


# ---- training ----------------------------------------------------------------------------------------------


def train(cfg: DictConfig) -> RunResult | None:
    """Train as `cfg` says, test the best weights, and fill the run folder.

    Returns:
        The run; None on all processes but the first.

    Raises:
        ZooError: a mistake in config or data, a loss that is no longer finite, a full disk, memory used up;
            when training had begun, the message says how to resume.
    """
    _quiet()
    folder = Path(cfg.run_dir) if cfg.run_dir else new_folder(cfg)
    if not cfg.resume and (folder / "config.yaml").is_file():
        raise ConfigError(
            f"There is a run in {folder} already. "
            f"Go on with zoo train resume={folder}, or choose another run_dir."
        )
    pl.seed_everything(cfg.seed, workers=True, verbose=False)
    checkpoints = _checkpoints(cfg, folder)
    resumed = checkpoints.last_path if cfg.resume and checkpoints.last_path.is_file() else None
    data, task = _build(cfg, resumed)
    trainer = _trainer(cfg, folder, checkpoints)
    started = time.monotonic()
    _fit(trainer, task, data, checkpoints, resumed)
    best = trainer.strategy.broadcast(checkpoints.best_path)
    task.load_state_dict(AtomicCheckpointIO().load_checkpoint(best)["state_dict"])
    trainer.test(task, data, verbose=False)
    if not trainer.is_global_zero:
        return None
    results = _finish(cfg, folder, task, data)
    environment(folder, {"seconds": round(time.monotonic() - started, 1)})
    return RunResult(folder, results)


def finetune(cfg: DictConfig) -> RunResult | None:
    """Train from the weights of `cfg.finetune.checkpoint`, by `cfg.finetune.method`; otherwise as `train`.

    Official weights, of the model `cfg.finetune.model`, are first converted: `start.safetensors` in the run
    folder.
    """
    if not (cfg.finetune.checkpoint or cfg.finetune.model):
        raise ConfigError(
            "zoo finetune needs checkpoint=RUN or checkpoint=FILE.safetensors, or for official weights "
            "model=NAME, with checkpoint=FILE if they are not to be fetched."
        )
    if not cfg.get("data"):
        raise ConfigError("zoo finetune needs data to train on, for example data=metr_la data.path=FILE.")
    cfg = cast(DictConfig, OmegaConf.create(dict(cfg)))
    if cfg.finetune.model:
        _convert_official(cfg)
    meta = read_checkpoint(_source(cfg))[1]
    if not meta:
        raise CheckpointError(
            f"{cfg.finetune.checkpoint} carries no model config. Give a run or its model.safetensors, or for "
            "an official file the name of the model: model=NAME."
        )
    built, task = meta["model"], _domain_of(meta["model"]).load("task")
    chosen = {
        "model": {"name": built["name"], **built["config"], **changes(cfg.finetune, task.changes)},
        "domain": {"name": built["domain"]},
        "data": task.data_options(meta["extra"], cfg.data),
    }
    return train(cast(DictConfig, OmegaConf.merge(cfg, chosen)))


def _convert_official(cfg: DictConfig) -> None:
    """Make a checkpoint of ours of official weights, and enter it as the one to start from."""
    given = OmegaConf.create({"run": None, **{key: cfg.finetune[key] for key in ("checkpoint", "model")}})
    file = given.checkpoint
    if file and (_is_run(file) or _told_by(file)):
        raise ConfigError(
            f"zoo finetune takes the model from the checkpoint; leave out model={given.model}: "
            f"{file} is no official file."
        )
    model, facts = load_trained(given, "finetune")
    built: Any = model.zoo_config
    if not cfg.run_dir:
        named = OmegaConf.create({"domain": {"name": built["domain"]}, "model": {"name": built["name"]}})
        cfg.run_dir = str(new_folder(named))
    cfg.finetune.official = file
    cfg.finetune.checkpoint = str(Path(cfg.run_dir) / "start.safetensors")
    save_model(model, cfg.finetune.checkpoint, extra=facts)


def _is_run(path: str) -> bool:
    return (Path(path) / "config.yaml").is_file()


def _told_by(path: str | Path) -> dict[str, Any]:
    """What a checkpoint file says of its model; nothing where it is a folder of an official program."""
    return {} if Path(path).is_dir() else read_checkpoint(path)[1]


def resumed_config(run: str | Path, overrides: list[str]) -> DictConfig:
    """The config of the run in folder `run`, to go on with.

    Args:
        overrides: `key=value`; only what leaves the numbers of the steps already done meaningful may change.

    Raises:
        CheckpointError: no run lies there, or a converted one.
        ConfigError: an override of something that a resumed run keeps.
    """
    cfg = stored_config(Path(run))
    if (Path(run) / "conversion.json").is_file():
        raise CheckpointError(
            f"{run} holds a converted model, not a training that stopped: zoo finetune checkpoint={run}."
        )
    changeable = (
        "trainer.",
        "logger.",
        "early_stopping.",
        "checkpointing.every_n_steps",
        "plots",
        "data.num_workers",
    )
    for text in overrides:
        key, equals, value = text.partition("=")
        if not equals or not key.startswith(changeable):
            raise ConfigError(
                f"A resumed run keeps its {key}. What may change: {', '.join(changeable)}. "
                f"To start from its weights with other settings: zoo finetune checkpoint={run}."
            )
        parent = OmegaConf.select(cfg, key.rpartition(".")[0]) if "." in key else cfg
        if key.rpartition(".")[2] not in (parent or {}) and not key.startswith("trainer."):
            known = [f"{key.rpartition('.')[0]}.{name}" for name in parent or {}]
            raise ConfigError(f"Unknown key {key!r}.{did_you_mean(key, known)}")
        OmegaConf.update(cfg, key, OmegaConf.from_dotlist([f"value={value}"]).value, force_add=True)
    cfg.resume = cfg.run_dir = str(run)
    return cfg


def _checkpoints(cfg: DictConfig, folder: Path) -> Checkpoints:
    """By the task's own metric where the config names none; another is minimised unless the config says."""
    task = get_domain(cfg.domain.name, cfg.model.name).load("task")
    options = {key: value for key, value in cfg.checkpointing.items() if value is not None}
    monitor = options.setdefault("monitor", task.monitor)
    options.setdefault("mode", task.mode if monitor == task.monitor else "min")
    return Checkpoints(folder / "checkpoints", **cast(Any, options))


def _build(cfg: DictConfig, resumed: Path | None) -> tuple[DataModule, Task]:
    trained = model_card(cfg.model.name, count=False).domain
    if trained != cfg.domain.name:
        raise ConfigError(f"The model {cfg.model.name} is for domain={trained}, not {cfg.domain.name}.")
    domain = get_domain(cfg.domain.name, cfg.model.name)
    data = _data(domain, {"seed": cfg.seed} | dict(cfg.data))
    data.setup("fit")
    started = resumed is not None or "finetune" not in cfg
    task_class, other = domain.load("task"), {} if started else dict(cfg.finetune.get("changes", {}))
    task = task_class.build(cfg, data, None if started else task_class.transfer(_source(cfg), data, **other))
    if "finetune" in cfg:
        adapt(task.model, cfg.finetune)
    if cfg.compile:
        task.model.compile()
    return data, task


def _data(domain: Domain, settings: Any) -> DataModule:
    """The data module, its files at hand; a ConfigError for settings that it does not take."""
    module = domain.load("data")
    known = inspect.signature(module).parameters
    any_name = any(parameter.kind is parameter.VAR_KEYWORD for parameter in known.values())
    for name in settings:
        if name not in known and not any_name:
            raise ConfigError(
                f"The data of domain={domain.name} have no option data.{name}."
                f"{did_you_mean(str(name), known)} Is data={settings.get('name')} for another domain?"
            )
    data: DataModule = module(**settings)
    data.prepare_data()
    return data


def _trainer(cfg: DictConfig, folder: Path, checkpoints: Checkpoints) -> pl.Trainer:
    options = dict(cfg.trainer)
    max_steps = options.pop("max_steps", -1)
    if 0 in (max_steps, options.get("max_epochs")):
        raise ConfigError("trainer.max_epochs and trainer.max_steps must be at least 1, or -1 for no limit.")
    if max_steps > 0 and options.get("max_epochs") is None:
        options["max_epochs"] = -1
    callbacks: list[Callback] = [
        LambdaCallback(
            on_fit_start=lambda trainer, _: open_folder(cfg, folder) if trainer.is_global_zero else None
        ),
        RandomState(cfg.seed),
        MetricsTable(folder / "metrics.csv" if cfg.logger.csv else None),
    ]
    callbacks += [StopAtStep(max_steps)] if max_steps > 0 else []
    callbacks += [EMA(**cfg.ema)] if cfg.ema else []
    if cfg.early_stopping:
        monitored = {"monitor": checkpoints.monitor, "mode": checkpoints.mode} | dict(cfg.early_stopping)
        callbacks.append(Patience(**cast(Any, monitored), check_finite=False))
    callbacks += [ProgressLine()] if options.get("enable_progress_bar", True) else []
    logger = TensorBoardLogger(folder, name="tensorboard", version="") if cfg.logger.tensorboard else False
    defaults = {"num_sanity_val_steps": 0, "enable_model_summary": False, "log_every_n_steps": 10}
    try:
        return pl.Trainer(
            **(defaults | options),
            callbacks=[*callbacks, checkpoints],
            logger=logger,
            plugins=[AtomicCheckpointIO()],
            default_root_dir=folder,
            use_distributed_sampler=False,
        )
    except (TypeError, ValueError, MisconfigurationException) as error:
        raise ConfigError(f"Lightning refuses the trainer settings: {error}") from None


def _fit(
    trainer: pl.Trainer, task: Task, data: DataModule, checkpoints: Checkpoints, resumed: Path | None
) -> None:
    """`trainer.fit`, whose failures say how to go on."""
    try:
        trainer.fit(task, data, ckpt_path=resumed)
    except ConfigError:
        raise
    except ZooError as error:
        raise ZooError(f"{error}{_way_on(checkpoints)}") from error
    except torch.OutOfMemoryError as error:
        raise ZooError(f"Out of memory: {error} Lower data.batch_size.{_way_on(checkpoints)}") from error
    except BaseException:
        errors.print(f"[bold]Training stopped.[/]{_way_on(checkpoints)}", highlight=False, soft_wrap=True)
        raise


def _way_on(checkpoints: Checkpoints) -> str:
    if not checkpoints.last_path.is_file():
        return " No checkpoint had been written yet; set checkpointing.every_n_steps to have them earlier."
    last, run = checkpoints.last_path, checkpoints.folder.parent
    return f" The last checkpoint is {last}; go on with: zoo train resume={run}"


# ---- evaluation --------------------------------------------------------------------------------------------


def evaluate(cfg: DictConfig) -> RunResult | None:
    """Test the weights of a run, or of a checkpoint file, on the test part of the data; or judge a file of
    results.

    Raises:
        ConfigError: neither or both of `run` and `checkpoint` are given, or no data.
        CheckpointError: there are no such weights, or they belong to other sensors, classes or another task.
    """
    if cfg.get("results"):
        return _judge(cfg)
    trained = trained_on(cfg, "evaluate")
    task = tested(trained.task(), trained.data, cfg)
    if not task.trainer.is_global_zero:
        return None
    folder = Path(cfg.output or (cfg.run or "evaluation"))
    return RunResult(folder, report(cfg, folder, task, trained.data))


def _judge(cfg: DictConfig) -> RunResult:
    """Judge results that any program found, without a model."""
    if given := [f"{key}={cfg[key]}" for key in ("run", "checkpoint", "model") if cfg.get(key)]:
        raise ConfigError(f"zoo evaluate results=FILE judges results alone: leave out {' '.join(given)}.")
    if not (cfg.domain and cfg.get("data")):
        raise ConfigError(
            "zoo evaluate results=FILE needs a domain and data to judge by: domain=detection data=coco "
            "data.test=ANNOTATIONS.json."
        )
    domain = get_domain(cfg.domain)
    if not domain.judge:
        raise ConfigError(f"domain={cfg.domain} reads no results of other programs: leave out results=FILE.")
    data = _data(domain, cfg.data)
    folder = Path(cfg.output or "evaluation")
    return RunResult(folder, report(cfg, folder, domain.load("judge")(Path(cfg.results), data), data))


@dataclass(frozen=True)
class Trained:
    """Trained weights and data that they are tested on."""

    model: nn.Module
    facts: dict[str, Any]
    stored: DictConfig
    """The config of their run; empty for a file of weights."""
    data: DataModule

    def task(self, model: nn.Module | None = None) -> Task:
        """A fresh task with the model, or with another in its place."""
        return domain_for(self.model).load("task")(model or self.model, self.stored, self.facts)


def trained_on(cfg: DictConfig, verb: str, *, fit: bool = False) -> Trained:
    """The weights that a verb was given, and the data of its config, or else of their run.

    Args:
        fit: data are set up with their training part in any case.
    """
    _quiet()
    model, facts = load_trained(cfg, verb)
    stored = stored_config(Path(cfg.run)) if cfg.run else OmegaConf.create({})
    domain = domain_for(model)
    settings = cfg.get("data") or stored.get("data")
    if not settings:
        raise ConfigError(
            f"zoo {verb} checkpoint=FILE needs data to test on, for example data=metr_la data.path=FILE."
        )
    data = _data(domain, settings)
    data.setup("test" if cfg.get("data") and not fit else "fit")
    task_class = domain.load("task")
    task_class.check(facts, data, str(cfg.run or cfg.checkpoint or cfg.model))
    task_class.prepare(facts, data)
    return Trained(model, facts, stored, data)


def tested(task: Task, data: DataModule, cfg: DictConfig) -> Task:
    """The task after a test as `cfg.trainer` says."""
    trainer = pl.Trainer(
        **_for_test(cfg), logger=False, enable_checkpointing=False, use_distributed_sampler=False
    )
    trainer.test(task, data, verbose=False)
    return task


def load_trained(cfg: DictConfig, verb: str) -> tuple[nn.Module, dict[str, Any]]:
    """The model that a verb was given, in eval mode, and the facts stored with its weights.

    Args:
        cfg: `run=RUN`; or `checkpoint=FILE`; or `model=NAME` with an official `checkpoint=FILE`, or without,
            for its published weights. The name may be left out where the tensors of the file tell it.

    Raises:
        ConfigError: none of these is given, or both of run and checkpoint.
        CheckpointError: the weights cannot be read, or do not belong to the model.
    """
    _check_named_once(cfg, verb)
    facts: dict[str, Any] = {}
    if cfg.run or (cfg.checkpoint and _told_by(cfg.checkpoint)):
        model, facts = load_model(weights_of(cfg.run) if cfg.run else cfg.checkpoint)
        _check_name(cfg, cast(Any, model.zoo_config)["name"])
    elif cfg.checkpoint:
        found = _detected(cfg.checkpoint)
        _check_name(cfg, found)
        name = cfg.model or found
        model = from_official(name, cfg.checkpoint) if name else load_model(cfg.checkpoint)[0]
    else:
        model = create_model(cfg.model, pretrained=True).eval()
    return model, facts or domain_for(model).load("task").facts_of(model)


def _detected(path: str | Path) -> str | None:
    """The model of an official file, as far as its tensors tell."""
    return None if Path(path).is_dir() else detect_model(read_state_dict(path))


def _check_name(cfg: DictConfig, found: str | None) -> None:
    """A CheckpointError where the weights are those of another model than the one named."""
    if cfg.model and found and cfg.model.rpartition("/")[2] != found:
        raise CheckpointError(
            f"{cfg.checkpoint} holds the weights of {found}, not of {cfg.model}: take model={found}."
        )


def domain_for(model: nn.Module) -> Domain:
    """What serves a model of the zoo."""
    return _domain_of(cast(Any, model.zoo_config))


def _domain_of(built: Mapping[str, Any]) -> Domain:
    return get_domain(built["domain"], built["name"])


def domain_of(cfg: DictConfig, verb: str) -> str | None:
    """The domain, with the problem if that is not its own (`forecasting/ranking`), of the weights that
    `load_trained` would take, as far as it can be told.
    """
    _check_named_once(cfg, verb)
    path = weights_of(cfg.run) if cfg.run else cfg.checkpoint
    meta = _told_by(path) if path else {}
    if meta:
        return _domain_of(meta["model"]).name
    name = cfg.model or (path and _detected(path))
    return get_domain(model_card(name, count=False).domain, name).name if name else None


def _check_named_once(cfg: DictConfig, verb: str) -> None:
    if bool(cfg.run) == bool(cfg.checkpoint or cfg.model):
        raise ConfigError(
            f"zoo {verb} needs either run=RUN or checkpoint=FILE.safetensors, or for official weights "
            "model=NAME, with checkpoint=FILE if they are not to be fetched."
        )


def _source(cfg: DictConfig) -> Path:
    path = Path(cfg.finetune.checkpoint)
    return weights_of(path) if path.is_dir() else path


def weights_of(run: str | Path) -> Path:
    """The exported weights of a run.

    Raises:
        CheckpointError: the folder is no run, or the run has not finished.
    """
    run = Path(run)
    stored_config(run)
    if not (run / "model.safetensors").is_file():
        raise CheckpointError(
            f"The run {run} has not finished: there is no model.safetensors. zoo train resume={run}"
        )
    return run / "model.safetensors"


def _for_test(cfg: DictConfig) -> dict[str, Any]:
    known = (
        "accelerator",
        "devices",
        "num_nodes",
        "strategy",
        "precision",
        "limit_test_batches",
        "enable_progress_bar",
    )
    options = {key: value for key, value in cfg.trainer.items() if key in known}
    return options | {"enable_progress_bar": False, "enable_model_summary": False}


# ---- results -----------------------------------------------------------------------------------------------


def _finish(cfg: DictConfig, folder: Path, task: Task, data: DataModule) -> dict[str, Any]:
    """Export the weights, then report on them."""
    merge_lora(task.model)
    save_model(task.model, folder / "model.safetensors", extra=data.extra())
    results = report(cfg, folder, task, data)
    console.print(f"Weights, metrics and plots are in {folder}", highlight=False, soft_wrap=True)
    return results


def report(cfg: DictConfig, folder: Path, task: Tested, data: DataModule) -> dict[str, Any]:
    """Write and print the results of a test, and draw its plots."""
    results = task.results(data)
    write_json(folder / "results.json", results)
    for part in task.report(results):
        console.print(part, highlight=False)
    if cfg.plots:
        task.plots(data, results, folder / "plots")
    return results


def _quiet() -> None:
    """Leave out what Lightning says to developers."""
    for name in ("pytorch_lightning", "lightning_fabric", "lightning.pytorch"):
        logging.getLogger(name).setLevel(logging.ERROR)
    for module in ("pytorch_lightning", "lightning_fabric", "torchmetrics"):
        warnings.filterwarnings("ignore", module=module)
