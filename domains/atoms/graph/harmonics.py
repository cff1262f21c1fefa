"""Real spherical harmonics and Legendre polynomials, as polynomials of directions.

Directions are unit vectors, or zero where there is none: of a zero vector only degree 0 is left.
"""

from __future__ import annotations

from math import factorial, prod, sqrt

import torch
from torch import Tensor


def spherical_harmonics(unit: Tensor, degree: int) -> Tensor:
    """Real spherical harmonics `(..., (degree + 1)^2)` of `unit (..., 3)`, degrees 0 to `degree` in turn.

    Conventions of e3nn ("component" normalisation): `sum_m Y_lm^2 = 2l + 1`, `Y_1 = sqrt(3) (x, y, z)`; the
    polar axis is y, orders run from -l to l, without Condon-Shortley phase. By recursion in l (Legendre) and
    m (powers of z + ix), so that any degree, and any derivative, is a polynomial.
    """
    x, y, z = unit.unbind(-1)
    square = unit.square().sum(-1)
    cosines, sines = [torch.ones_like(x)], [torch.zeros_like(x)]
    for _ in range(degree):
        c, s = cosines[-1], sines[-1]
        cosines.append(z * c - x * s)
        sines.append(z * s + x * c)
    columns: dict[tuple[int, int], Tensor] = {}
    for m in range(degree + 1):
        before, current = None, torch.full_like(y, prod(range(1, 2 * m, 2)))
        for n in range(m, degree + 1):
            norm = _norm(n, m)
            columns[n, m] = norm * current * cosines[m]
            if m:
                columns[n, -m] = norm * current * sines[m]
            after = (2 * n + 1) * y * current
            if before is not None:
                after = after - (n + m) * square * before
            before, current = current, after / (n + 1 - m)
    return torch.stack([columns[n, m] for n in range(degree + 1) for m in range(-n, n + 1)], -1)


def _norm(degree: int, order: int) -> float:
    ratio = factorial(degree - order) / factorial(degree + order)
    return sqrt((2 * degree + 1) * (2 if order else 1) * ratio)


def legendre(cosine: Tensor, degree: int, weight: Tensor | float = 1.0) -> list[Tensor]:
    """Legendre polynomials `P_0 .. P_degree` of cosines.

    Args:
        weight: product of the squared lengths of both directions. With 0 for a missing direction, degrees
            above 0 vanish as harmonics do: `sum_m Y_lm(u) Y_lm(v) = (2l + 1) P_l(u . v, |u|^2 |v|^2)`.
    """
    planes = [torch.ones_like(cosine), cosine]
    for n in range(1, degree):
        planes.append(((2 * n + 1) * cosine * planes[n] - n * weight * planes[n - 1]) / (n + 1))
    return planes[: degree + 1]
