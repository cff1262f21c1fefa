"""What every test may use."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

# Tiny tensors and several processes: more threads only wait for each other.
torch.set_num_threads(1)
os.environ.setdefault("OMP_NUM_THREADS", "1")

SHARED = Path(__file__).resolve().parents[2] / "shared"


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real data sets beside the checkout; the test is skipped where it is absent."""
    folder = Path(os.environ.get("ZOO_SHARED_DATA", SHARED / "data"))
    if not folder.is_dir():
        pytest.skip(f"no real data at {folder}")
    return folder
