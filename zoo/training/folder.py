"""The folder of a run."""

from __future__ import annotations

import json
import platform
import subprocess
import sys
from datetime import datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf

from zoo import config as zoo_config
from zoo.cli.console import console
from zoo.errors import CheckpointError
from zoo.files import atomic_write


def new_folder(cfg: DictConfig) -> Path:
    """`runs/DOMAIN/MODEL/TIME` below the current folder."""
    return Path("runs") / cfg.domain.name / cfg.model.name / f"{datetime.now():%Y-%m-%d_%H-%M-%S}"


def open_folder(cfg: DictConfig, folder: Path) -> None:
    """Begin the folder of a run: its config, and what it runs on."""
    for leftover in (folder / "checkpoints").glob(".*.part"):
        leftover.unlink()
    zoo_config.write(cfg, folder / "config.yaml")
    environment(folder, {"command": sys.argv, "started": f"{datetime.now():%Y-%m-%d %H:%M:%S}"})
    console.print(f"Run folder: {folder}", highlight=False, soft_wrap=True)


def stored_config(run: Path) -> DictConfig:
    """The config of a run.

    Raises:
        CheckpointError: no run lies there.
    """
    if not (run / "config.yaml").is_file():
        raise CheckpointError(f"There is no run in {run}: config.yaml is missing.")
    config = OmegaConf.load(run / "config.yaml")
    assert isinstance(config, DictConfig)
    return config


def environment(folder: Path, facts: dict[str, Any]) -> None:
    """Add facts to `environment.json`; the first time, those of the machine and the code."""
    path = folder / "environment.json"
    known = (
        json.loads(path.read_text())
        if path.is_file()
        else {
            "python": platform.python_version(),
            "platform": platform.platform(),
            "torch": torch.__version__,
            "lightning": version("pytorch-lightning"),
            "threads": torch.get_num_threads(),
            "devices": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
            "git": _git_state(),
        }
    )
    write_json(path, known | facts)


def _git_state() -> str | None:
    """Commit of the code, with `-dirty` for changes on top; None outside a checkout."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=40"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Write a file whole or not at all."""
    with atomic_write(path, "w") as file:
        json.dump(value, file, indent=2)
