"""The one door to attention."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Literal, overload

import torch
from torch import Tensor

from zoo.attention.backends import Problem, chosen
from zoo.attention.capture import recorder
from zoo.attention.errors import AttentionError
from zoo.attention.kernels import Kernel, TopKSoftmax, softmax
from zoo.attention.patterns import Dense, Pattern

_DENSE = Dense()


@overload
def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    pattern: Pattern | None = None,
    bias: Tensor | None = None,
    scale: float | None = None,
    dropout: float = 0.0,
    kernel: Kernel = softmax,
    return_lse: Literal[False] = False,
) -> Tensor: ...


@overload
def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    pattern: Pattern | None = None,
    bias: Tensor | None = None,
    scale: float | None = None,
    dropout: float = 0.0,
    kernel: Kernel = softmax,
    return_lse: Literal[True],
) -> tuple[Tensor, Tensor]: ...


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    pattern: Pattern | None = None,
    bias: Tensor | None = None,
    scale: float | None = None,
    dropout: float = 0.0,
    kernel: Kernel = softmax,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention: `out_i = sum_j w_ij v_j`, `w_i = kernel(scale * q_i . k_j + bias_ij)`, j of the keys seen.

    Query head h reads key/value head `h // (H / Hk)` (MHA, GQA, MQA; Ainslie et al. 2023). A query that sees
    no key gets zeros, and lse = -inf. The statistics of half precision are float32. Under autocast the inputs
    are cast as for a matrix product.

    Args:
        q: `(B, H, Nq, D)`.
        k: `(B, Hk, Nk, D)`, with H divisible by Hk.
        v: `(B, Hk, Nk, Dv)`.
        pattern: which keys a query sees; None = all.
        bias: added to the scaled scores, broadcastable to `(B, H, Nq, Nk)`.
        scale: `D ** -0.5` by default.
        dropout: probability of dropping a weight, applied as given: pass 0 in eval mode.
        kernel: how scores become weights.
        return_lse: also return the log-sum-exp `(B, H, Nq)` of the scores, in float32 or wider.

    Returns:
        `(B, H, Nq, Dv)` in the dtype of the inputs, and the log-sum-exp where asked for.

    Raises:
        AttentionError: shapes, dtypes, pattern, kernel or forced backend that do not fit together.
    """
    pattern = _DENSE if pattern is None else pattern
    device = q.device.type
    autocast = torch.is_autocast_enabled(device) and q.dtype != torch.float64
    if autocast:
        dtype = torch.get_autocast_dtype(device)
        q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
    _check(q, k, v, pattern, bias, kernel)
    factor = q.shape[-1] ** -0.5 if scale is None else scale
    problem = Problem(q, k, v, pattern, bias, factor, dropout, kernel, return_lse)
    # Explicit products keep float32 statistics only outside of autocast.
    with torch.autocast(device, enabled=False) if autocast else nullcontext():
        recording = recorder()
        if recording is not None and (name := recording.wanted()) is not None:
            out, lse = recording.run(problem, name)
        else:
            out, lse = chosen(problem)(problem)
    if not return_lse:
        return out
    assert lse is not None  # `chosen` gives a backend that has it
    return out, lse


def _check(q: Tensor, k: Tensor, v: Tensor, pattern: Pattern, bias: Tensor | None, kernel: Kernel) -> None:
    if not q.ndim == k.ndim == v.ndim == 4:
        raise AttentionError(f"q, k, v are (B, H, N, D), not {_shape(q)}, {_shape(k)}, {_shape(v)}")
    if not q.dtype == k.dtype == v.dtype:
        raise AttentionError(f"q, k, v have one dtype, not {q.dtype}, {k.dtype}, {v.dtype}")
    if not q.is_floating_point():
        raise AttentionError(f"q, k, v are floating point, not {q.dtype}")
    batch, heads, nq, width = q.shape
    nk = k.shape[2]
    if k.shape[0] != batch or k.shape[:3] != v.shape[:3]:
        raise AttentionError(
            f"q, k, v differ in B, or k and v in Hk or Nk: {_shape(q)}, {_shape(k)}, {_shape(v)}"
        )
    if k.shape[3] != width:
        raise AttentionError(f"q has head width {width}, k has {k.shape[3]}")
    if k.shape[1] == 0 or heads % k.shape[1]:
        raise AttentionError(f"{heads} query heads are not divisible by {k.shape[1]} key/value heads")
    if nk == 0:
        raise AttentionError("there are no keys to attend to")
    if isinstance(kernel, TopKSoftmax) and kernel.k > nk:
        raise AttentionError(f"top-k softmax with k = {kernel.k}, but there are {nk} keys")
    if bias is not None:
        _check_bias(bias, (batch, heads, nq, nk))
    pattern.check(batch, nq, nk, q.device)


def _check_bias(bias: Tensor, sizes: tuple[int, ...]) -> None:
    if not bias.is_floating_point():
        raise AttentionError(
            f"a bias is added to the scores and is floating point, not {bias.dtype}; a mask is a pattern"
        )
    fits = bias.ndim <= 4 and all(
        have in (1, want) for have, want in zip(reversed(bias.shape), reversed(sizes), strict=False)
    )
    if not fits:
        raise AttentionError(f"bias {_shape(bias)} does not broadcast to (B, H, Nq, Nk) = {sizes}")


def _shape(x: Tensor) -> tuple[int, ...]:
    return tuple(x.shape)
