"""Checkpoints that appear whole or not at all and are read without executing anything."""

from __future__ import annotations

from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from lightning_fabric.plugins.io.torch_io import TorchCheckpointIO

from zoo.errors import CheckpointError
from zoo.files import atomic_write


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes beside the target and moves into place; reads tensors and plain values only."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Write `checkpoint` to `path`.

        Raises:
            ZooError: the disk is full or the folder cannot be written; a checkpoint already there stays.
        """
        with atomic_write(path) as file:
            try:
                torch.save(checkpoint, file)
            except RuntimeError as error:  # torch trips over its own clean-up when the disk is full
                raise error.__context__ if isinstance(error.__context__, OSError) else error from None

    def load_checkpoint(self, path: Any, *args: Any, **options: Any) -> dict[str, Any]:
        """Read a checkpoint onto the CPU.

        Raises:
            CheckpointError: the file is missing, damaged, or holds more than tensors and plain values.
        """
        if not Path(path).is_file():
            raise CheckpointError(f"There is no checkpoint {path}.")
        try:
            return torch.load(path, map_location="cpu", weights_only=True)
        except (RuntimeError, EOFError, UnpicklingError, ValueError, KeyError) as error:
            reason = str(error).splitlines()[0]
            raise CheckpointError(f"{path} is not a checkpoint of the zoo, or is damaged: {reason}") from None
