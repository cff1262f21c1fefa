"""Momentum made orthogonal for weight matrices, AdamW for all else."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from itertools import compress
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Of the quintic iteration that draws singular values to about 1 (Jordan et al. 2024)."""


RELATIVE_NOISE = 1e-5
"""A gradient this much smaller than the largest of all matrices is rounding; no full step is due to it."""


class Muon(Optimizer):
    """Muon (Jordan et al. 2024, "Muon: an optimizer for hidden layers in neural networks").

    The step of a matrix is its momentum with all singular values drawn to about 1, sized as a step of Adam
    (times 0.2 sqrt(larger side), Liu et al. 2025, arXiv 2502.16982, 2.2). Unlike `torch.optim.Muon` it takes
    a whole model, works in float32 and on many matrices of a shape at once. A matrix whose gradient is zero,
    or rounding beside that of others, takes no step. For weights that no process holds in parts.

    Args:
        params: groups of parameters; those with `matrices` true take steps of Muon, others of AdamW.
        lr: of the matrices.
        other: rate of all else, as a share of `lr`.
        momentum: of the matrices.
        betas, eps: of all else.
        weight_decay: for both, times their rate.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 0.02,
        other: float = 0.25,
        momentum: float = 0.95,
        betas: Sequence[float] = (0.9, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        defaults = {"momentum": momentum, "betas": tuple(betas), "eps": eps, "matrices": False}
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay} | defaults)
        for group in self.param_groups:
            if not group["matrices"]:
                group["lr"] *= other

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # pyright: ignore[reportIncompatibleMethodOverride]
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            known = [(p, p.grad) for p in group["params"] if p.grad is not None]
            for parameter, _ in known:
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
            if known:
                (self._matrix_steps if group["matrices"] else self._adam_steps)(known, group)
        return loss

    def _matrix_steps(self, known: Sequence[tuple[Tensor, Tensor]], group: dict[str, Any]) -> None:
        by_shape: dict[tuple[int, ...], list[tuple[Tensor, Tensor]]] = defaultdict(list)
        sizes = torch.stack([grad.norm() for _, grad in known])
        moves = (sizes > RELATIVE_NOISE * sizes.max()).tolist()
        for matrix, grad in compress(known, moves):
            average = self.state[matrix].setdefault("momentum", torch.zeros_like(matrix))
            average.lerp_(grad, 1 - group["momentum"])
            by_shape[matrix.shape].append((matrix, grad.lerp(average, group["momentum"])))
        for shape, steps in by_shape.items():
            size = group["lr"] * 0.2 * max(shape) ** 0.5
            for (matrix, _), step in zip(steps, orthogonal(torch.stack([s for _, s in steps])), strict=True):
                matrix.add_(step, alpha=-size)

    def _adam_steps(self, known: Sequence[tuple[Tensor, Tensor]], group: dict[str, Any]) -> None:
        low, high = group["betas"]
        for parameter, grad in known:
            state = self.state[parameter]
            if not state:
                state["step"] = 0
                state["mean"], state["square"] = torch.zeros_like(parameter), torch.zeros_like(parameter)
            state["step"] += 1
            state["mean"].lerp_(grad, 1 - low)
            state["square"].mul_(high).addcmul_(grad, grad, value=1 - high)
            spread = (state["square"] / (1 - high ** state["step"])).sqrt_().add_(group["eps"])
            parameter.addcdiv_(state["mean"], spread, value=-group["lr"] / (1 - low ** state["step"]))


def orthogonal(matrices: Tensor, steps: int = 5) -> Tensor:
    """Matrices `(n, rows, columns)` with singular values of about 1 (0.7 to 1.2), same singular vectors."""
    a, b, c = COEFFICIENTS
    tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.mT if tall else matrices
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + torch.baddbmm(gram, gram, gram, beta=b, alpha=c) @ x
    return x.mT if tall else x
