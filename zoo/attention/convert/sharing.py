"""Fewer keys and values: heads that share them, or one latent for all."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from zoo.attention.convert.calls import all_tokens
from zoo.attention.convert.registry import asked_of, conversion, plain
from zoo.attention.layers.base import AttentionLayer, Inputs
from zoo.attention.layers.latent import MultiHeadLatent
from zoo.attention.layers.multihead import GatedAttention, MultiHead, gqa_from_mha
from zoo.attention.transmla import transmla


def _has_key_heads(layer: AttentionLayer) -> bool:
    return isinstance(layer, MultiHead) and type(layer) is not GatedAttention


@conversion(
    "gqa", "a layer with key/value heads of MultiHead, but no gated one", _has_key_heads, calibrated=False
)
def to_gqa(layer: MultiHead, calls: Sequence[Inputs], *, num_kv_heads: int) -> MultiHead:
    """Each key/value head the mean of consecutive ones (Ainslie et al. 2023, section 2.1)."""
    made = gqa_from_mha(layer, num_kv_heads)
    asked = asked_of(layer)
    made.asked = None if asked is None else asked | {"num_kv_heads": num_kv_heads}
    return made


@conversion(
    "mqa", "a layer with key/value heads of MultiHead, but no gated one", _has_key_heads, calibrated=False
)
def to_mqa(layer: MultiHead, calls: Sequence[Inputs]) -> MultiHead:
    """One key/value head, the mean of all."""
    return to_gqa(layer, calls, num_kv_heads=1)


def _is_latent_of(layer: AttentionLayer) -> bool:
    return plain(layer, whole_rotary=True)


@conversion(
    "mla",
    "multihead (also with fewer key/value heads) without norms, window and YaRN, rotary on whole heads or "
    "not at all",
    _is_latent_of,
    calibrated=True,
)
def to_mla(
    layer: MultiHead,
    calls: Sequence[Inputs],
    *,
    kv_rank: int,
    q_rank: int | None = None,
    rope_dim: int | None = None,
    freqfold: int = 1,
    balance: float | None = 1.0,
    norm: Literal["undone", "official"] | None = None,
) -> MultiHeadLatent:
    """See `transmla`, whose options these are."""
    made = transmla(
        layer,
        all_tokens(calls),
        kv_rank=kv_rank,
        q_rank=q_rank,
        rope_dim=rope_dim,
        freqfold=freqfold,
        balance=balance,
        norm=norm,
    )
    made.asked = {"name": "mla"} | made.options()
    return made
