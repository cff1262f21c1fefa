"""What can be made of partial results `(out, lse)` of `attend`: merged branches, attention sinks.

Whatever changes the denominator of a softmax only is a function of the output and of the log-sum-exp of the
scores, forward and backward: no kernel needs to know of it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from zoo.attention.errors import AttentionError
from zoo.attention.kernels import softmax


def merge(*parts: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Attention over all keys from attention over parts of them.

    Args:
        parts: out `(..., N, Dv)` and lse `(..., N)` each; a key that parts share counts as often.

    Returns:
        `(out, lse)` of the softmax over the keys of all parts; zeros and -inf where none sees a key.

    Example:
        >>> from zoo.attention import attend
        >>> q, k, v = torch.randn(3, 1, 2, 6, 4)
        >>> halves = [
        ...     attend(q, k[:, :, s], v[:, :, s], return_lse=True) for s in (slice(0, 3), slice(3, 6))
        ... ]
        >>> torch.allclose(merge(*halves)[0], attend(q, k, v), atol=1e-6)
        True
    """
    if not parts:
        raise AttentionError("there is nothing to merge")
    outs, lses = zip(*parts, strict=True)
    if any(out.shape[:-1] != lse.shape for out, lse in parts) or len({out.shape for out in outs}) > 1:
        shapes = [(tuple(out.shape), tuple(lse.shape)) for out, lse in parts]
        raise AttentionError(f"parts to merge have one shape, (..., N, Dv) and (..., N), not {shapes}")
    weights, lse = softmax(torch.stack(lses, dim=-1))
    out, *rest = (out * share[..., None] for out, share in zip(outs, weights.unbind(-1), strict=True))
    for more in rest:
        out = out + more
    return out.to(outs[0].dtype), lse


def sink(out: Tensor, lse: Tensor, logit: Tensor) -> Tensor:
    """Softmax with a sink: `exp(logit)` joins the denominator, and nothing the sum of values.

    A learned logit per head is gpt-oss (2025); 0 is softmax-off-by-one; -inf is plain softmax.

    Args:
        out: `(B, H, N, Dv)`.
        lse: `(B, H, N)`.
        logit: broadcastable to lse; one per head is `(H, 1)`.
    """
    seen = lse.masked_fill(lse == -torch.inf, 0.0)  # where no key is seen, out is zero already
    return out * torch.sigmoid(seen - logit)[..., None].to(out.dtype)
