"""Forecasts of series in any form: `Forecaster`."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
import torch
from torch import Tensor

from domains.forecasting.models.chronos2 import Chronos2
from domains.forecasting.pipeline.frames import FrameInputs, forecast_frame
from domains.forecasting.pipeline.inputs import Item, prepare
from domains.forecasting.pipeline.quantiles import interpolated
from domains.forecasting.pipeline.unroll import forecast
from domains.forecasting.weights import load_folder
from zoo.errors import ConfigError, DataError

TOKENS_ON_CPU = 1600

DECILES = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)


class Batch(NamedTuple):
    """Items below each other."""

    context: Tensor
    """`(B, T)`, filled up with NaN on the left."""
    group_ids: Tensor | None
    """`(B,)` number of the item of each row; None: one row each."""
    future: Tensor | None
    """`(B, H)`; None: nothing is known."""
    targets: list[slice]
    """The target rows of each item."""
    places: list[int]
    """Of the items in the call."""


class Forecaster:
    """Forecasts by a Chronos-2, as its official pipeline makes them.

    Series are given as

    - an array or tensor `(series, variates, T)`: the variates of a series are forecast together;
    - a list of arrays or tensors `(T,)` or `(variates, T)`, of any lengths;
    - a list of dicts: `target` `(T,)` or `(variates, T)`; `past_covariates`, name to `(T,)`;
      `future_covariates`, name to `(H,)`, of covariates that are also in the past, or None where they are
      known in principle but not now. Booleans and text are categories. All dicts have the same names;
    - a long data frame (`predict_frame`).

    NaN is missing. Each series and its covariates are one group, forecast together and apart from all others
    (unless `cross_learning`).

    Args:
        model: put into eval mode; inputs are moved to its device.

    Example:
        >>> import torch, zoo
        >>> from domains.forecasting.pipeline import Forecaster
        >>> forecaster = Forecaster(zoo.create_model("chronos2_mini"))
        >>> [series] = forecaster.predict([torch.randn(100)], horizon=24)
        >>> series.shape
        torch.Size([1, 21, 24])
    """

    def __init__(self, model: Chronos2) -> None:
        self.model = model.eval()

    @classmethod
    def from_folder(
        cls, path: str | Path, *, base: str | Path | None = None, device: str | torch.device = "cpu"
    ) -> Forecaster:
        """From an official folder (`config.json`, `model.safetensors`), or a LoRA adapter for `base`."""
        return cls(load_folder(path, base=base).to(device))

    # ---- forecasts -----------------------------------------------------------------------------------------

    def predict(self, inputs: Any, horizon: int, **options: Any) -> list[Tensor] | pd.DataFrame:
        """`predict_series`, or `predict_frame` for a data frame, with their options."""
        if isinstance(inputs, pd.DataFrame):
            return self.predict_frame(inputs, horizon=horizon, **options)
        return self.predict_series(inputs, horizon, **options)

    @torch.no_grad()
    def predict_series(
        self,
        inputs: Any,
        horizon: int,
        *,
        batch_size: int = 256,
        context_length: int | None = None,
        cross_learning: bool = False,
        max_output_patches: int | None = None,
        unrolled_quantiles: Sequence[float] = DECILES,
        limit_horizon: bool = False,
    ) -> list[Tensor]:
        """All quantiles of the model for the next steps of each series.

        Args:
            inputs: see above.
            horizon: steps H.
            batch_size: rows (targets and covariates) of one pass at most; a series is never split.
            context_length: steps of history to read, at most the model's.
            cross_learning: all rows of a batch see each other. Results then depend on the batches; about 100
                rows are suggested.
            max_output_patches: patches of one pass; the model's by default. More steps are forecast by
                continuing from quantiles of the forecast.
            unrolled_quantiles: those quantiles, among the model's.
            limit_horizon: refuse to do that.

        Returns:
            `(targets, Q, H)` of each series, float32 on the CPU.

        Raises:
            DataError: series that cannot be used.
            ConfigError: options that cannot be.
        """
        if horizon < 1:
            raise DataError(f"A horizon of {horizon} steps cannot be forecast.")
        limit = self.model.max_output_patches if max_output_patches is None else max_output_patches
        self._check_horizon(horizon, limit_horizon)
        self._check_options(batch_size, limit, unrolled_quantiles)
        length = self._context_length(context_length)
        items = prepare(inputs, horizon)
        results: dict[int, Tensor] = {}
        most = None if cross_learning else self._most_steps()
        size = self.model.patch_size  # of the register token, too
        ahead = size + min(math.ceil(horizon / size), limit) * size
        with self._prepared(items, length):
            for batch in batches(items, length, batch_size, most_steps=most, ahead=ahead):
                batch = self._moved(batch)
                ids = batch.group_ids
                quantiles = forecast(
                    self.model,
                    batch.context,
                    batch.context.new_zeros(len(batch.context), dtype=torch.long) if cross_learning else ids,
                    batch.future,
                    horizon,
                    max_output_patches=limit,
                    unrolled_quantiles=unrolled_quantiles,
                    batch_size=batch_size
                    if most is None
                    else min(batch_size, most // batch.context.shape[1]),
                ).cpu()
                for place, rows in zip(batch.places, batch.targets, strict=True):
                    results[place] = quantiles[rows]
        return [results[i] for i in range(len(items))]

    def predict_quantiles(
        self, inputs: Any, horizon: int, levels: Sequence[float] = DECILES, **options: Any
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Quantiles at other levels, and the median as point forecast.

        Between the model's levels they are interpolated; beyond its lowest and highest, those stand in.

        Args:
            options: of `predict_series`.

        Returns:
            `(targets, H, levels)` and `(targets, H)` of each series.

        Raises:
            ConfigError: levels that are no probabilities.
        """
        self._check_levels(levels)
        own = torch.tensor(self.model.quantiles)
        wanted = torch.tensor([*levels, 0.5])
        found = [
            interpolated(series.transpose(1, 2), own, wanted)
            for series in self.predict_series(inputs, horizon, **options)
        ]
        return [series[..., :-1] for series in found], [series[..., -1] for series in found]

    def predict_frame(
        self,
        df: pd.DataFrame,
        future_df: pd.DataFrame | None = None,
        *,
        horizon: int,
        target: str | Sequence[str] = "target",
        id_column: str = "item_id",
        timestamp_column: str = "timestamp",
        levels: Sequence[float] = DECILES,
        freq: str | None = None,
        **options: Any,
    ) -> pd.DataFrame:
        """Forecasts of all series of a long frame, one row per series, target and step.

        Args:
            df: columns of the series' name, the time stamp and the targets; all others are covariates.
            future_df: the known covariates in the `horizon` steps after the end of each series.
            target: one column, or several that are forecast together.
            freq: of the time stamps, such as `"h"`; by default it is inferred from series of at least three
                rows, which must agree.
            options: of `predict_series`.

        Returns:
            Columns `id_column`, `timestamp_column`, `target_name`, `predictions` (the median), and one for
            each level, named by it; series in the order of their first appearance.

        Raises:
            DataError: frames that cannot be used; the message names the series.
        """
        self._check_levels(levels)
        frame = FrameInputs.read(
            df,
            future_df,
            horizon=horizon,
            target=[target] if isinstance(target, str) else list(target),
            id_column=id_column,
            timestamp_column=timestamp_column,
            freq=freq,
        )
        quantiles, medians = self.predict_quantiles(frame.items, horizon, levels, **options)
        return forecast_frame(frame, quantiles, medians, levels)

    @torch.no_grad()
    def embed(
        self, inputs: Any, *, batch_size: int = 256, context_length: int | None = None
    ) -> tuple[list[Tensor], list[tuple[Tensor, Tensor]]]:
        """Tokens of each series after the encoder: the N patches of history (of the longest series of its
        batch), the register token and one patch of the future; with mean and scale of its rows.

        Returns:
            `(targets, N + 2, D)`, and a pair of `(targets, 1)`, of each series, on the CPU.
        """
        tokens, scales = [], []
        items, length = prepare(inputs, 0), self._context_length(context_length)
        for batch in batches(items, length, batch_size):
            batch = self._moved(batch)
            found = self.model.encode(batch.context, group_ids=batch.group_ids)
            parts = [part.cpu() for part in found]
            tokens += [parts[0][rows] for rows in batch.targets]
            scales += [(parts[1][rows], parts[2][rows]) for rows in batch.targets]
        return tokens, scales

    def _prepared(self, items: Sequence[Item], length: int) -> AbstractContextManager[None]:
        """Combined weights, where there are enough tokens to make up for combining them."""
        steps = sum(len(item.context) * min(item.context.shape[1], length) for item in items)
        enough = steps >= self.model.patch_size * self.model.d_model
        return self.model.folded() if enough else nullcontext()

    def _most_steps(self) -> int | None:
        """Of one pass on a CPU, where more leave its cache: 128 series of 512 then take 1.1 times as long."""
        if self.model.shared.weight.device.type != "cpu":
            return None
        return TOKENS_ON_CPU * self.model.patch_size

    # ---- checks --------------------------------------------------------------------------------------------

    def _moved(self, batch: Batch) -> Batch:
        device = self.model.shared.weight.device
        ids, future = (None if x is None else x.to(device) for x in (batch.group_ids, batch.future))
        return batch._replace(context=batch.context.to(device), group_ids=ids, future=future)

    def _context_length(self, wanted: int | None) -> int:
        own = self.model.context_length
        if wanted is None:
            return own
        if wanted < 1:
            raise ConfigError(f"context_length={wanted} is not at least 1.")
        if wanted > own:
            text = f"context_length={wanted} is more than the {own} of the model, which is used."
            warnings.warn(text, stacklevel=4)
        return min(wanted, own)

    def _check_horizon(self, horizon: int, refuse: bool) -> None:
        most = self.model.max_output_patches * self.model.patch_size
        if horizon <= most:
            return
        text = f"A horizon of {horizon} steps is more than the {most} that the model forecasts in one pass"
        if refuse:
            raise ConfigError(f"{text}; limit_horizon=False continues from there.")
        warnings.warn(f"{text}: beyond, it continues from its own forecast, and gets worse.", stacklevel=4)

    def _check_options(self, batch_size: int, patches: int, unrolled: Sequence[float]) -> None:
        if batch_size < 1 or patches < 1:
            raise ConfigError(f"batch_size={batch_size} and max_output_patches={patches} must be at least 1.")
        stray = [level for level in unrolled if level not in self.model.quantiles]
        if stray or not unrolled or list(unrolled) != sorted(unrolled):
            raise ConfigError(
                f"unrolled_quantiles={list(unrolled)} must be some of the model's, ascending: "
                f"{', '.join(map(str, self.model.quantiles))}."
            )

    def _check_levels(self, levels: Sequence[float]) -> None:
        if not len(levels) or not all(0 <= level <= 1 for level in levels):
            raise ConfigError(f"levels={list(levels)} must be probabilities, at least one.")
        low, high = self.model.quantiles[0], self.model.quantiles[-1]
        if min(levels) < low or max(levels) > high:
            warnings.warn(
                f"The model forecasts quantiles from {low} to {high}, which stand in for those beyond.",
                stacklevel=3,
            )


def batches(
    items: Sequence[Item],
    context_length: int,
    batch_size: int,
    *,
    most_steps: int | None = None,
    ahead: int = 0,
) -> Iterator[Batch]:
    """Items in order in batches: each takes items until it has `batch_size` rows.

    With `most_steps`, those of similar length of a batch come together, in passes of at most about so many
    steps, of which every row has `ahead` more than its history. All
    rows of a batch are as long as its longest, in whichever pass: the mean of a constant series depends in
    its last digit on the length of the row, so its scale is 0 or that digit, and its forecast follows.
    """
    chosen: list[int] = []
    rows = 0
    for i, item in enumerate(items):
        chosen.append(i)
        rows += len(item.context)
        if rows >= batch_size or i + 1 == len(items):
            lengths = {j: min(items[j].context.shape[1], context_length) for j in chosen}
            width = max(lengths.values())
            steps = {j: length + ahead for j, length in lengths.items()}
            for places in [chosen] if most_steps is None else _passes(items, steps, most_steps):
                yield _collate(items, places, context_length, width)
            chosen, rows = [], 0


def _passes(items: Sequence[Item], steps: Mapping[int, int], most_steps: int) -> Iterator[list[int]]:
    """Places of items with rows of `steps`, the shortest first, in about equal parts of about `most_steps` at
    most.
    """
    total = sum(len(items[i].context) * count for i, count in steps.items())
    share = total / math.ceil(total / most_steps)
    chosen: list[int] = []
    done, end = 0, share
    for i in sorted(steps, key=lambda place: steps[place]):
        chosen.append(i)
        done += len(items[i].context) * steps[i]
        if done >= end:
            yield chosen
            chosen, end = [], end + share
    if chosen:
        yield chosen


def _collate(items: Sequence[Item], places: list[int], context_length: int, width: int) -> Batch:
    contexts = [items[i].context[:, -context_length:] for i in places]
    sizes = [len(context) for context in contexts]
    starts = list(accumulate(sizes, initial=0))
    context = torch.full((starts.pop(), width), torch.nan)
    for start, part in zip(starts, contexts, strict=True):
        context[start : start + len(part), width - part.shape[1] :] = part
    future = torch.cat([items[i].future for i in places])
    return Batch(
        context,
        None if max(sizes) == 1 else torch.repeat_interleave(torch.tensor(sizes)),
        None if bool(future.isnan().all()) else future,
        [slice(start, start + items[i].num_targets) for start, i in zip(starts, places, strict=True)],
        places,
    )
