"""Attention over depth: what a sub-layer reads is a mean of what the earlier ones have written."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.attention.errors import AttentionError


def attention_residual(
    sources: Sequence[Tensor], query: Tensor, norm_weight: Tensor, *, scale: float = 1.0, eps: float = 1e-6
) -> tuple[Tensor, Tensor]:
    """`sum_l p_l r_l` with `p = softmax_l(scale * w . RMSNorm(r_l))` (arXiv 2603.15031, equation 3).

    The sources are never stacked; statistics are float32.

    Args:
        sources: L times `(..., C)`.
        query: w, `(C,)`.
        norm_weight: of the RMS norm, `(C,)`.

    Returns:
        `(..., C)` in the dtype of the sources, and p `(L, ...)`.
    """
    if not sources:
        raise AttentionError("there is no source to read")
    if len({source.shape for source in sources}) > 1 or sources[0].shape[-1:] != query.shape:
        shapes = [tuple(source.shape) for source in sources]
        raise AttentionError(f"sources have one shape (..., {len(query)}), not {shapes}")
    wide = torch.promote_types(sources[0].dtype, torch.float32)
    direction = scale * query.to(wide) * norm_weight.to(wide)
    logits = [F.rms_norm(source.to(wide), query.shape, direction, eps).sum(-1) for source in sources]
    weights = torch.stack(logits).softmax(0)
    out = weights[0, ..., None] * sources[0]
    for weight, source in zip(weights[1:], sources[1:], strict=True):
        out = torch.addcmul(out, weight[..., None], source.to(wide))
    return out.to(sources[0].dtype), weights


class AttentionResidual(nn.Module):
    """One reader: a learned query and norm. It starts as the plain mean of its sources.

    Args:
        dim: C.
        eps: of the norm.
    """

    def __init__(self, dim: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.query = nn.Parameter(torch.zeros(dim))
        self.norm_weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, sources: Sequence[Tensor]) -> Tensor:
        return attention_residual(sources, self.query, self.norm_weight, eps=self.eps)[0]


class AttentionResiduals(nn.Module):
    """A stack of sub-layers whose residual stream is attention over depth (arXiv 2603.15031, section 3).

    Every `block_size` sub-layers, the sum of what they wrote becomes a source; each sub-layer reads all
    sources and the sum that is still growing. With blocks of one, every output is a source.

    Args:
        dim: C.
        sublayers: each maps `(B, N, C)` to `(B, N, C)`, its norm included.
        block_size: sub-layers per source.
        eps: of the readers' norms.
    """

    def __init__(
        self, dim: int, sublayers: Sequence[nn.Module], *, block_size: int = 1, eps: float = 1e-6
    ) -> None:
        super().__init__()
        if block_size < 1:
            raise AttentionError(f"a block has at least one sub-layer, not {block_size}")
        self.sublayers = nn.ModuleList(sublayers)
        self.readers = nn.ModuleList(AttentionResidual(dim, eps) for _ in sublayers)
        self.last = AttentionResidual(dim, eps)
        self.block_size = block_size

    def forward(self, x: Tensor) -> Tensor:
        """Embeddings `(B, N, C)` to what the last reader makes of all that was written."""
        sources = [x]
        for number, (reader, sublayer) in enumerate(zip(self.readers, self.sublayers, strict=True)):
            written = sublayer(reader(sources))
            if number % self.block_size == 0:
                sources.append(written)
            else:
                sources[-1] = sources[-1] + written
        return self.last(sources)
