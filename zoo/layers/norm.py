"""Batch normalisation of channels-last features, alone and folded into the linear layer before it.

All statistics are over the flattened rows of a tensor `[..., C]`, with the population variance. When
`torch.distributed` runs more than one process they are pooled over all of them, gradients included, so that
data-parallel training computes what one process would with the whole batch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn


class Moments(NamedTuple):
    """First and second central moments over `count` rows of C channels."""

    mean: Tensor
    """`[C]`"""
    second: Tensor
    """`[C]` (variances) or `[C, C]` (the covariance matrix)."""
    count: int | Tensor


def variance(x: Tensor) -> Moments:
    """Mean and variance of each channel of `x` `[..., C]` over all its rows, of all processes."""
    rows = x.float().flatten(0, -2)
    var, mean = torch.var_mean(rows, 0, correction=0)
    return pooled(Moments(mean, var, rows.shape[0]))


def covariance(x: Tensor) -> Moments:
    """Mean and covariance matrix of the channels of `x` `[..., C]` over all its rows, of all processes."""
    return pooled(local_covariance(x))


def local_covariance(x: Tensor) -> Moments:
    """`covariance` over the rows of this process alone."""
    rows = x.flatten(0, -2)
    mean, cov = _Covariance.apply(rows)
    return Moments(mean, cov, rows.shape[0])


class _Covariance(torch.autograd.Function):
    """Mean and covariance of rows `[R, C]`; keeps no centred copy of them for the backward pass."""

    @staticmethod
    def forward(ctx, rows: Tensor) -> tuple[Tensor, Tensor]:
        with torch.autocast(rows.device.type, enabled=False):
            mean = rows.mean(0, dtype=torch.float32 if rows.dtype.itemsize < 4 else rows.dtype)
            centred = rows - mean
            cov = centred.T @ centred / rows.shape[0]
        ctx.save_for_backward(rows, mean)
        return mean, cov

    @staticmethod
    def backward(ctx, grad_mean: Tensor, grad_cov: Tensor) -> Tensor:
        rows, mean = ctx.saved_tensors
        with torch.autocast(rows.device.type, enabled=False):
            slope = (grad_cov + grad_cov.T) / rows.shape[0]
            offset = grad_mean / rows.shape[0] - mean @ slope
            return torch.addmm(offset.to(rows.dtype), rows, slope.to(rows.dtype))


def pooled(local: Moments) -> Moments:
    """The moments of the rows of all processes, given those of each; nothing changes with one process."""
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return local
    from torch.distributed.nn.functional import all_reduce

    mean, second, count = local
    total = torch.as_tensor(count, dtype=mean.dtype, device=mean.device).clone()
    dist.all_reduce(total)
    share = count / total
    overall = all_reduce(mean * share)
    shift = mean - overall
    between = torch.outer(shift, shift) if second.ndim == 2 else shift.square()
    return Moments(overall, all_reduce((second + between) * share), total)


class BatchNorm(nn.Module):
    """Batch normalisation over the last axis (Ioffe and Szegedy 2015).

    Args:
        features: number of channels C.
        eps: added to the variance.
        momentum: weight of the newest batch in the running statistics, `1 - decay`.
        unbiased: let the running variance follow the unbiased batch variance, as `torch.nn.BatchNorm2d` does,
            instead of the population variance, as TensorFlow does.
    """

    momentum: Tensor
    running_mean: Tensor
    running_var: Tensor

    def __init__(
        self, features: int, *, eps: float = 1e-5, momentum: float = 0.1, unbiased: bool = True
    ) -> None:
        super().__init__()
        self.eps = eps
        self.unbiased = unbiased
        self.weight = nn.Parameter(torch.ones(features))
        self.bias = nn.Parameter(torch.zeros(features))
        self.register_buffer("running_mean", torch.zeros(features))
        self.register_buffer("running_var", torch.ones(features))
        # A tensor, so that a schedule on it does not make torch.compile compile again.
        self.register_buffer("momentum", torch.tensor(momentum), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """`[..., C] -> [..., C]`"""
        scale, shift = self.scale_shift(variance(x) if self.training else None)
        return torch.addcmul(shift, x, scale)

    def scale_shift(self, batch: Moments | None) -> tuple[Tensor, Tensor]:
        """The affine map `x * scale + shift` that normalises: by `batch`, which the running statistics then
        follow, or by the running statistics when it is None. `batch.second` is `[C]`."""
        if batch is None:
            mean, var = self.running_mean, self.running_var
        else:
            mean, var = batch.mean, batch.second
            self._follow(mean.detach(), var.detach(), batch.count)
        scale = self.weight * torch.rsqrt(var + self.eps)
        return scale, self.bias - mean * scale

    def _follow(self, mean: Tensor, var: Tensor, count: int | Tensor) -> None:
        if self.unbiased:
            var = var * (count / (count - 1))
        self.running_mean.lerp_(mean, self.momentum)
        self.running_var.lerp_(var, self.momentum)


class NormLinear(nn.Module):
    """`act(BN(x W^T + b))` as one matrix product, in training as in evaluation.

    The batch statistics of `x W^T + b` follow from the mean m and covariance C of x (`W m + b` and
    `diag(W C W^T)`), so the normalisation is folded into W and b before the product: the output before the
    normalisation is never formed, and nothing but x and the result is kept for the backward pass. Layers with
    the same input can share its moments.

    Args:
        in_features, out_features, bias: as in `torch.nn.Linear`.
        norm: makes the batch norm for a number of channels; None for a plain linear layer.
        relu: apply a ReLU at the end.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        bias: bool = True,
        norm: Callable[[int], BatchNorm] | None = BatchNorm,
        relu: bool = True,
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_features, in_features))
        self.bias = nn.Parameter(torch.zeros(out_features)) if bias else None
        self.norm = norm(out_features) if norm is not None else None
        self.relu = relu
        nn.init.xavier_uniform_(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        """`[..., in_features] -> [..., out_features]`"""
        weight, bias = self.folded(covariance(x) if self.normalises_by_batch else None)
        y = F.linear(x, weight, bias)
        return y.relu_() if self.relu else y

    @property
    def normalises_by_batch(self) -> bool:
        """Whether `folded` needs the moments of the input now."""
        return self.norm is not None and self.training

    def folded(self, inputs: Moments | None) -> tuple[Tensor, Tensor | None]:
        """Weight `[out, in]` and bias `[out]` that hold the normalisation; `inputs` are the moments of x."""
        if self.norm is None:
            return self.weight, self.bias
        with torch.autocast(self.weight.device.type, enabled=False):
            scale, shift = self.norm.scale_shift(None if inputs is None else self._output_moments(inputs))
            if self.bias is None:
                return self.weight * scale[:, None], shift
            # Batch statistics cancel the bias. Written like this its gradient is exactly zero; rounding
            # errors in its place would make Adam walk.
            return self.weight * scale[:, None], self.bias * scale + shift

    def _output_moments(self, inputs: Moments) -> Moments:
        mean = self.weight @ inputs.mean
        var = ((self.weight @ inputs.second) * self.weight).sum(1).clamp_min(0)
        return Moments(mean if self.bias is None else mean + self.bias, var, inputs.count)
