"""Dynamic depth-wise convolution: filters of their own at every pixel, shared by a group of channels.

Han et al. 2022 ("On the connection between local attention and dynamic depth-wise convolution"): a local
aggregation like attention in a window, with weights that are predicted instead of compared:
`y[c, p] = sum_t w[c // (C / G), t, p] z[c, p + t]`, zeros outside of the map.

`reference` gathers the window of every pixel. The fast form adds K shifted products into the result. Rows lie
one after the other with a few zeros between them, so that every shift is an offset and every product one long
loop; a band of rows is finished before the next one begins, so that it stays in the cache, and filters that
come from a 1 x 1 convolution are made band by band: the K G filter planes of a map never exist. The backward
pass makes them anew.

Shapes: B maps, C channels, G groups, K = kh kw taps, R features that predict the filters, H x W pixels.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from zoo.errors import ConfigError

BAND = 4608
"""Pixels of a band on a CPU."""
FILTER_VALUES = 2**28
"""Filter values that may exist at once on a GPU, where a band is as large as it may be."""


def reference(z: Tensor, filters: Tensor) -> Tensor:
    """The definition, by a copy of every window: arguments and result of `dynamic_conv`."""
    batch, channels, height, width = z.shape
    groups, tall, wide = filters.shape[1:4]
    windows = F.unfold(z, (tall, wide), padding=(tall // 2, wide // 2))
    windows = windows.view(batch, groups, channels // groups, -1, height, width)
    products = windows * filters.reshape(batch, groups, 1, -1, height, width)
    return products.sum(3).view(batch, channels, height, width)


def dynamic_conv(z: Tensor, filters: Tensor) -> Tensor:
    """Every pixel's window, weighted by its own filter.

    Args:
        z: `(B, C, H, W)`.
        filters: `(B, G, kh, kw, H, W)`, kh and kw odd; group g weighs channels g C / G to (g + 1) C / G.

    Returns:
        `(B, C, H, W)` in the dtype of `z`; half precision is added up in float32.

    Raises:
        ConfigError: shapes that do not fit together, or an even kernel.
    """
    if filters.ndim != 6:
        raise ConfigError(f"Filters are (B, G, kh, kw, H, W), not {tuple(filters.shape)}.")
    kernel = list(filters.shape[2:4])
    _check(z, filters[:, 0, 0, 0, None], filters.shape[1], kernel)
    return _apply(z, filters.flatten(1, 3), None, kernel, filters.shape[1])


def predicted_conv(z: Tensor, features: Tensor, weight: Tensor, bias: Tensor | None, groups: int) -> Tensor:
    """`dynamic_conv` by the filters `weight @ features + bias` of each pixel, which never exist all at once.

    Args:
        z: `(B, C, H, W)`.
        features: `(B, R, H, W)`.
        weight: `(G k k, R)`, k odd.
        bias: `(G k k)`.
        groups: G.

    Returns:
        `(B, C, H, W)` in the dtype of `z`; half precision is added up in float32.

    Raises:
        ConfigError: shapes that do not fit together, or an even kernel.
    """
    size = round((weight.shape[0] / groups) ** 0.5)
    if size * size * groups != weight.shape[0] or weight.shape[1] != features.shape[1]:
        raise ConfigError(
            f"A weight {tuple(weight.shape)} does not give square filters of {groups} groups from "
            f"{features.shape[1]} features."
        )
    _check(z, features, groups, [size, size])
    ones = weight.new_zeros(len(weight)) if bias is None else bias
    return _apply(z, features, torch.cat([weight, ones[:, None]], 1), [size, size], groups)


def _check(z: Tensor, beside: Tensor, groups: int, kernel: list[int]) -> None:
    if z.ndim != 4 or beside.shape[0] != z.shape[0] or beside.shape[2:] != z.shape[2:]:
        raise ConfigError(
            f"z {tuple(z.shape)} and what its filters come from differ in B, H or W: {tuple(beside.shape)}."
        )
    if groups < 1 or z.shape[1] % groups:
        raise ConfigError(f"{z.shape[1]} channels cannot be shared out evenly to {groups} groups.")
    if not all(size % 2 for size in kernel):
        raise ConfigError(f"Dynamic kernels are odd, not {kernel[0]} x {kernel[1]}.")


# ---- bands -------------------------------------------------------------------------------------------------


class Plan(NamedTuple):
    """How the rows of a map lie in memory, and how they are shared out to blocks."""

    groups: int
    kernel: list[int]
    height: int
    width: int
    batch: int
    on_cpu: bool

    @property
    def row(self) -> int:
        """Length of a row with the zeros that it has in common with the next."""
        return self.width + self.kernel[1] // 2

    @property
    def taps(self) -> int:
        return self.kernel[0] * self.kernel[1]

    def blocks(self) -> Iterator[tuple[slice, slice]]:
        """Items and rows of each block."""
        budget = BAND if self.on_cpu else max(1, FILTER_VALUES // (self.taps * self.groups))
        items = max(1, min(self.batch, budget // (self.row * self.height)))
        count = -(-self.height * self.row // budget)
        rows = -(-self.height // min(count, self.height))
        for item in range(0, self.batch, items):
            for top in range(0, self.height, rows):
                yield slice(item, item + items), slice(top, min(top + rows, self.height))

    def padded(self, z: Tensor) -> Tensor:
        """`(B, C, H, W)` to flat `(B, G, C / G, N)`: zeros above, below and between the rows."""
        (tall, wide), channels = self.kernel, z.shape[1]
        above, beside = tall // 2, wide // 2
        lines = self.height + 2 * above
        flat = z.new_zeros(self.batch, channels, lines * self.row + 2 * beside)
        inner = flat[..., beside : beside + lines * self.row].unflatten(-1, (lines, self.row))
        inner[:, :, above : above + self.height, : self.width].copy_(z)
        return flat.unflatten(1, (self.groups, -1))

    def pixels(self, flat: Tensor) -> Tensor:
        """The map `(B, C, H, W)` in a `padded` one, as a view."""
        (tall, wide), lines = self.kernel, self.height + 2 * (self.kernel[0] // 2)
        inner = flat.flatten(1, 2)[..., wide // 2 :][..., : lines * self.row]
        inner = inner.unflatten(-1, (lines, self.row))
        return inner[:, :, tall // 2 : tall // 2 + self.height, : self.width]

    def shifted(self, flat: Tensor, items: slice, rows: slice) -> Tensor:
        """What each tap sees of a block, of a `padded` map: a view `(B, G, C / G, kh, kw, n)`."""
        part = flat[items, ..., rows.start * self.row :]
        length = (rows.stop - rows.start) * self.row
        return part.as_strided(
            (*part.shape[:3], *self.kernel, length),
            (*part.stride()[:3], self.row, 1, 1),
            part.storage_offset(),
        )

    def band(self, x: Tensor, items: slice, rows: slice) -> Tensor:
        """A block of a map `(B, D, H, W)` with zeros between the rows: `(B, D, n)`."""
        return F.pad(x[items, :, rows], (0, self.row - self.width)).flatten(2)

    def inside(self, band: Tensor) -> Tensor:
        """The pixels `(B, D, rows, W)` of a `band`, as a view."""
        return band.unflatten(-1, (-1, self.row))[..., : self.width]


class Filters:
    """The filters of one block after the other, `(B, G, K, n)`: given, or predicted from features."""

    def __init__(self, plan: Plan, source: Tensor, weight: Tensor | None, dtype: torch.dtype) -> None:
        self.plan, self.source, self.dtype = plan, source, dtype
        self.weight = None if weight is None else weight.to(dtype)

    def inputs(self, items: slice, rows: slice) -> Tensor:
        """`(B, R + 1, n)` with ones for the bias; the filters themselves where they are given."""
        if self.weight is None:
            return self.plan.band(self.source, items, rows).to(self.dtype)
        part = self.source[items, :, rows]
        sizes = len(part), self.weight.shape[1], part.shape[2], self.plan.row
        inputs = part.new_ones(sizes, dtype=self.dtype)
        inputs[:, :-1, :, : self.plan.width] = part
        inputs[:, :-1, :, self.plan.width :] = 0
        return inputs.flatten(2)

    def __call__(self, inputs: Tensor) -> Tensor:
        made = inputs if self.weight is None else torch.matmul(self.weight, inputs)
        return made.unflatten(1, (self.plan.groups, self.plan.taps))


def _prepared(
    z: Tensor, source: Tensor, weight: Tensor | None, kernel: list[int], groups: int
) -> tuple[Plan, Filters, torch.dtype]:
    batch, _, height, width = z.shape
    plan = Plan(groups, kernel, height, width, batch, z.device.type == "cpu")
    dtype = torch.promote_types(z.dtype, torch.float32)
    return plan, Filters(plan, source, weight, dtype), dtype


@torch.library.custom_op("zoo::dynamic_conv", mutates_args=())
def _apply(z: Tensor, source: Tensor, weight: Tensor | None, kernel: list[int], groups: int) -> Tensor:
    """`source` is the filters `(B, G K, H, W)`; with `weight` `(G K, R + 1)`, the features `(B, R, H, W)`."""
    plan, filters, dtype = _prepared(z, source, weight, kernel, groups)
    flat, out = plan.padded(z.to(dtype)), torch.empty_like(z, memory_format=torch.contiguous_format)
    for items, rows in plan.blocks():
        made = filters(filters.inputs(items, rows))
        out[items, :, rows] = plan.inside(_gathered(plan.shifted(flat, items, rows), made))
        del made  # before the next ones exist
    return out


def _gathered(shifted: Tensor, made: Tensor) -> Tensor:
    """`(B, G, c, kh, kw, n)` and filters `(B, G, K, n)` to the sums of their products over K: `(B, C, n)`."""
    views, taps = _by_tap(shifted), made.unsqueeze(2).unbind(3)
    total = views[0] * taps[0]
    for view, tap in zip(views[1:], taps[1:], strict=True):
        total.addcmul_(view, tap)
    return total.flatten(1, 2)


@torch.library.custom_op("zoo::dynamic_conv_backward", mutates_args=())
def _gradients(
    grad: Tensor, z: Tensor, source: Tensor, weight: Tensor | None, kernel: list[int], groups: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `z`, `source` and `weight` (without one: no values)."""
    plan, filters, dtype = _prepared(z, source, weight, kernel, groups)
    flat = plan.padded(z.to(dtype))
    grad_flat = torch.zeros_like(flat)
    grad_source = torch.empty_like(source, memory_format=torch.contiguous_format)
    grad_weight = z.new_zeros(() if weight is None else weight.shape, dtype=dtype)
    for items, rows in plan.blocks():
        slope = plan.band(grad, items, rows).to(dtype).unflatten(1, (groups, -1))
        inputs = filters.inputs(items, rows)
        _scatter(plan.shifted(grad_flat, items, rows), filters(inputs), slope)
        grad_made = _correlated(plan.shifted(flat, items, rows), slope)
        if filters.weight is not None:
            grad_weight += torch.matmul(grad_made, inputs.mT).sum(0)
            grad_made = torch.matmul(filters.weight.T[:-1], grad_made)
        grad_source[items, :, rows] = plan.inside(grad_made)
        del grad_made
    grad_z = plan.pixels(grad_flat).to(z.dtype, memory_format=torch.contiguous_format, copy=True)
    return grad_z, grad_source, grad_weight if weight is None else grad_weight.to(weight.dtype)


def _scatter(shifted: Tensor, made: Tensor, slope: Tensor) -> None:
    """Adds what each tap passes back `(B, G, c, n)` to where it looked."""
    for view, tap in zip(_by_tap(shifted), made.unsqueeze(2).unbind(3), strict=True):
        view.addcmul_(slope, tap)


def _by_tap(shifted: Tensor) -> list[Tensor]:
    return [view for line in shifted.unbind(3) for view in line.unbind(3)]


def _correlated(shifted: Tensor, slope: Tensor) -> Tensor:
    """`(B, G, c, kh, kw, n)` and `(B, G, c, n)` to the sums of their products over c: `(B, G K, n)`."""
    parts = zip(shifted.unbind(2), slope[:, :, :, None, None].unbind(2), strict=True)
    seen, upstream = next(parts)
    total = seen * upstream
    for seen, upstream in parts:
        total.addcmul_(seen, upstream)
    return total.flatten(1, 3)


# ---- registration ------------------------------------------------------------------------------------------


@_apply.register_fake
def _(z: Tensor, source: Tensor, weight: Tensor | None, kernel: list[int], groups: int) -> Tensor:
    return torch.empty_like(z, memory_format=torch.contiguous_format)


@_gradients.register_fake
def _(
    grad: Tensor, z: Tensor, source: Tensor, weight: Tensor | None, kernel: list[int], groups: int
) -> tuple[Tensor, Tensor, Tensor]:
    like = torch.contiguous_format
    grad_weight = z.new_empty(()) if weight is None else torch.empty_like(weight, memory_format=like)
    return torch.empty_like(z, memory_format=like), torch.empty_like(source, memory_format=like), grad_weight


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    z, source, weight, ctx.kernel, ctx.groups = inputs
    ctx.save_for_backward(z, source, weight)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    z, source, weight = ctx.saved_tensors
    grad_z, grad_source, grad_weight = _gradients(grad, z, source, weight, ctx.kernel, ctx.groups)
    return grad_z, grad_source, None if weight is None else grad_weight, None, None


_apply.register_autograd(_backward, setup_context=_save)


@register_flop_formula(torch.ops.zoo.dynamic_conv)
def _flops(
    z: torch.Size, source: torch.Size, weight: torch.Size | None, kernel: list[int], *_: Any, **__: Any
) -> int:
    """Twice the products with the filters, and of the matrix product that predicts them."""
    batch, channels, height, width = z
    predicted = 0 if weight is None else weight[0] * (weight[1] - 1)
    return 2 * batch * height * width * (channels * kernel[0] * kernel[1] + predicted)
