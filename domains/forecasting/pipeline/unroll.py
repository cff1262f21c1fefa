"""Horizons longer than one pass: quantiles of what is forecast become history, on several paths."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from domains.forecasting.models.chronos2 import Chronos2
from domains.forecasting.models.groups import RowGroups
from domains.forecasting.pipeline.quantiles import interpolated, probability_masses, weighted_quantiles


def forecast(
    model: Chronos2,
    context: Tensor,
    group_ids: Tensor | None,
    future: Tensor | None,
    horizon: int,
    *,
    max_output_patches: int,
    unrolled_quantiles: Sequence[float],
    batch_size: int,
) -> Tensor:
    """Quantiles of the next `horizon` steps.

    The first block of at most `max_output_patches` patches is one pass. Each later block continues, for every
    row, on one path per unrolled quantile of the block before it, rows of a group on paths of one level; all
    quantiles of all paths are pooled by the probability they stand for.

    Args:
        context: float32 `(B, T)`.
        group_ids: integers `(B,)`; None: every row is alone.
        future: `(B, horizon)`, NaN where unknown; None: nothing is known.
        batch_size: rows of one pass, as far as whole paths allow.

    Returns:
        `(B, Q, horizon)`.
    """
    size = model.patch_size
    levels = torch.tensor(model.quantiles, device=context.device)
    unrolled = torch.tensor(unrolled_quantiles, device=context.device)
    weights = torch.outer(probability_masses(unrolled_quantiles), probability_masses(model.quantiles))
    weights = weights.flatten().to(context.device)
    blocks: list[Tensor] = []
    paths, done = context[None], 0
    while done < horizon:
        count = min(math.ceil((horizon - done) / size), max_output_patches)
        if blocks:
            ahead = interpolated(blocks[-1].transpose(1, 2), levels, unrolled).permute(2, 0, 1)
            given = None if future is None else future[:, done - ahead.shape[-1] : done]
            if given is not None:
                ahead = torch.where(given.isnan(), ahead, given)
            paths = torch.cat([paths.expand(len(unrolled), -1, -1), ahead], -1)[..., -model.context_length :]
        known = None if future is None else future[:, done : done + count * size]
        samples = _paths(model, paths, group_ids, known, count, batch_size)
        block = samples[0]
        if blocks:
            pooled = samples.permute(1, 3, 0, 2).flatten(2)
            block = weighted_quantiles(pooled, weights, levels).transpose(1, 2)
        blocks.append(block)
        done += count * size
    return torch.cat(blocks, -1)[..., :horizon]


def _paths(
    model: Chronos2,
    paths: Tensor,
    group_ids: Tensor | None,
    known: Tensor | None,
    count: int,
    batch_size: int,
) -> Tensor:
    """One block `(paths, B, Q, count P)` on every path `(paths, B, T)`; paths do not see each other."""
    number, rows, _ = paths.shape
    at_once = max(1, min(number, batch_size // rows))
    groups, results = {}, []
    for part in paths.split(at_once):
        if len(part) not in groups:
            groups[len(part)] = _repeated(group_ids, len(part))
        result = model(
            part.flatten(0, 1),
            group_ids=groups[len(part)],
            future_covariates=None if known is None else known.repeat(len(part), 1),
            num_output_patches=count,
        )
        results.append(result.quantiles.unflatten(0, (len(part), rows)))
    return torch.cat(results)


def _repeated(ids: Tensor | None, times: int) -> RowGroups | None:
    """The groups of one path, for several below each other."""
    if ids is None:
        return None
    member = ids.unique(return_inverse=True)[1]
    first = torch.arange(times, device=ids.device)[:, None] * len(ids)
    return RowGroups.of((first + member).flatten())
