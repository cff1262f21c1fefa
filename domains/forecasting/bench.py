"""`zoo bench suite=forecasting`: Chronos-2 beside the package `chronos-forecasting`, of the same weights.

The smaller models stand beside their plain layouts.
"""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from domains.forecasting.models.chronos2 import Chronos2
from domains.forecasting.pipeline import Forecaster
from domains.forecasting.plain_bench import CASES
from domains.forecasting.weights import save_folder
from zoo.bench.compare import Job
from zoo.bench.suite import Case, Growth, Suite
from zoo.bench.timing import Call
from zoo.create import create_model
from zoo.errors import require


@cache
def contestants(name: str, device: torch.device) -> tuple[Forecaster, Any]:
    """Our forecaster and the official pipeline, which reads the folder that ours writes.

    Raises:
        MissingExtra: `chronos-forecasting` is not installed.
    """
    package = require("chronos", "dev")
    torch.manual_seed(0)
    model: Any = create_model(f"forecasting/{name}", initializer_factor=0.2)
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        save_folder(model, Path(folder))
        peer = package.Chronos2Pipeline.from_pretrained(folder, device_map=str(device))
    return Forecaster(model.to(device)), peer


def walks(sizes: Sequence[int], steps: int) -> list[Tensor]:
    """Random walks of `steps`, one item of each size (its number of variates)."""
    draw = torch.Generator().manual_seed(0)
    return [torch.randn(size, steps, generator=draw).cumsum(-1) for size in sizes]


def predicting(
    name: str,
    sizes: Sequence[int],
    steps: int,
    horizon: int,
    *,
    words: str,
    target: float | None = None,
    form: str = "",
) -> Case:
    """A call of `predict` for items of `sizes` variates, with `steps` of history.

    Args:
        form: `bfloat16` (autocast) or `compiled`, of both contestants on a GPU; float32 by default.
    """

    def build(device: torch.device) -> Job:
        ours, peer = contestants(name, device)
        items = walks(sizes, steps)
        if form == "compiled":
            ours, peer = Forecaster(_compiled(ours.model)), _compiled_peer(peer)

        def run(predict: Callable[..., list[Tensor]], **options: Any) -> Callable[[], Tensor]:
            def call() -> Tensor:
                low = torch.autocast(device.type, torch.bfloat16) if form == "bfloat16" else nullcontext()
                with low:
                    return torch.cat(predict(items, **options)).float()

            return call

        mine, theirs = run(ours.predict_series, horizon=horizon), run(peer.predict, prediction_length=horizon)
        return Job(name, mine, theirs, mine, theirs)

    return Case(
        " ".join(filter(None, (name, form))) + f", {words}, context {steps}, horizon {horizon}",
        build,
        target,
        tolerance=5e-2 if form == "bfloat16" else 1e-4,
        items=sum(sizes),
        device="cuda" if form else None,
    )


def _compiled(model: Chronos2) -> Chronos2:
    model.forward = torch.compile(model.forward)  # pyright: ignore[reportAttributeAccessIssue]
    return model


def _compiled_peer(peer: Any) -> Any:
    peer.model.forward = torch.compile(peer.model.forward)
    return peer


def over_series(name: str, size: int, steps: int) -> Growth:
    """`predict` for more and more series of `steps`, in groups of `size`."""

    def build(series: int, device: torch.device) -> Call:
        model: Any = create_model(f"forecasting/{name}").to(device)
        forecaster, items = Forecaster(model), walks([size] * (series // size), steps)
        return lambda: forecaster.predict_series(items, 16)

    words = "alone" if size == 1 else f"in groups of {size}"
    return Growth(f"{name} over series {words}, context {steps}", build, (1000, 3000, 10_000))


SMALL = "chronos2_small"
SUITE = Suite(
    (
        predicting(SMALL, [1] * 32, 512, 64, words="32 series", target=1.6),
        predicting(SMALL, [1] * 32, 2048, 64, words="32 series", target=1.6),
        predicting(SMALL, [1] * 1000, 32, 16, words="1,000 short series", target=1.6),
        predicting(SMALL, [8] * 125, 32, 16, words="1,000 short series in groups of 8", target=1.4),
        predicting(SMALL, [64] * 15 + [40], 32, 16, words="1,000 short series in groups of 64"),
        predicting(SMALL, [4] * 64, 256, 64, words="64 groups of 4", target=1.4),
        predicting(SMALL, [20] * 12, 128, 64, words="12 groups of 20", target=1.4),
        predicting(SMALL, [4, 7, 13, 20] * 6, 128, 64, words="24 groups of 4 to 20", target=1.4),
        predicting("chronos2", [1] * 32, 512, 64, words="32 series", target=1.6),
        *(
            predicting(name, [1] * 256, steps, 64, words="256 series", form=form)
            for name in (SMALL, "chronos2")
            for form in ("bfloat16", "compiled")
            for steps in (512, 2048)
        ),
        *CASES,
    ),
    (over_series("chronos2_mini", 1, 512), over_series("chronos2_mini", 4, 512)),
)
