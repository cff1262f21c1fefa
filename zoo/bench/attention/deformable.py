"""Deformable attention against one `grid_sample` for each map: an encoder's call, forward and backward."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from zoo.attention.deformable import Shapes, deformable_attend
from zoo.bench.compare import Job
from zoo.bench.suite import Case, Growth, Suite
from zoo.bench.timing import Call

SHAPES = ((60, 80), (30, 40), (15, 20), (8, 10))
"""The maps of an image of 480 x 640 pixels: 6,380 cells."""
HEADS, WIDTH, POINTS = 8, 32, 4
Sampling = Callable[[Tensor, Shapes, Tensor, Tensor], Tensor]


def stacked(values: Tensor, shapes: Shapes, locations: Tensor, weights: Tensor) -> Tensor:
    """The plain PyTorch form of the official program: all that is sampled, stacked and weighed."""
    batch, queries, heads = weights.shape[:3]
    grids, sampled = 2 * locations - 1, []
    for level, part in enumerate(values.split([rows * columns for rows, columns in shapes], 1)):
        image = part.flatten(2).transpose(1, 2).reshape(batch * heads, -1, *shapes[level])
        grid = grids[:, :, :, level].transpose(1, 2).flatten(0, 1)
        sampled.append(F.grid_sample(image, grid, "bilinear", "zeros", align_corners=False))
    given = weights.transpose(1, 2).reshape(batch * heads, 1, queries, -1)
    out = (torch.stack(sampled, -2).flatten(-2) * given).sum(-1)
    return out.view(batch, heads, -1, queries).permute(0, 3, 1, 2)


def _inputs(shapes: Shapes, device: torch.device) -> list[Tensor]:
    """Values, locations and weights of one query per cell, some cells around it."""
    g = torch.Generator().manual_seed(0)
    cells = sum(rows * columns for rows, columns in shapes)
    values = torch.randn(1, cells, HEADS, WIDTH, generator=g)
    centres = []
    for rows, columns in shapes:
        y, x = ((torch.arange(n) + 0.5) / n for n in (rows, columns))
        centres.append(torch.cartesian_prod(y, x).flip(1))
    sizes = torch.tensor([[columns, rows] for rows, columns in shapes])[:, None]
    offsets = 3 * torch.randn(1, cells, HEADS, len(shapes), POINTS, 2, generator=g) / sizes
    weights = torch.rand(1, cells, HEADS, len(shapes), POINTS, generator=g)
    made = (values, torch.cat(centres)[None, :, None, None, None] + offsets, weights / weights.sum())
    return [x.to(device).requires_grad_() for x in made]


def _call(sampling: Sampling, inputs: list[Tensor], shapes: Shapes) -> Tensor:
    values, locations, weights = inputs
    return sampling(values, shapes, locations, weights)


def _trained(sampling: Sampling, inputs: list[Tensor], shapes: Shapes) -> Tensor:
    """Output and gradients of one training call, each in parts of its largest value, flat."""
    out = _call(sampling, inputs, shapes)
    grads = torch.autograd.grad(out, inputs, torch.ones_like(out))
    return torch.cat([x.flatten() / x.abs().max() for x in (out, *grads)])


@torch.no_grad()
def _inferred(sampling: Sampling, inputs: list[Tensor], shapes: Shapes) -> Tensor:
    return _call(sampling, inputs, shapes)


def _case(name: str, run: Callable[[Sampling, list[Tensor], Shapes], Tensor], target: float) -> Case:
    def build(device: torch.device) -> Job:
        inputs = _inputs(SHAPES, device)

        def ours() -> Tensor:
            return run(deformable_attend, inputs, SHAPES)

        def theirs() -> Tensor:
            return run(stacked, inputs, SHAPES)

        return Job(name, ours, theirs, ours, theirs)

    return Case(name, build, target)


def _growth(size: int, device: torch.device) -> Call:
    """Of one map with so many cells, 32 in a column."""
    shapes = ((32, size // 32),)
    inputs = _inputs(shapes, device)
    return lambda: _trained(deformable_attend, inputs, shapes)


_SIZE = "6,380 queries, 4 maps of 4 points, 8 heads"
SUITE = Suite(
    cases=(
        _case(f"deformable attention, {_SIZE}, grid_sample", _trained, 1.5),
        _case(f"deformable attention, {_SIZE}, forward, grid_sample", _inferred, 1.5),
    ),
    growth=(Growth("deformable attention, a query for each cell", _growth),),
)
