"""TransMLA: a grouped-query layer becomes a latent one (Meng et al. 2025, arXiv 2502.07864).

Shapes: H query heads, Hk key/value heads, D head width, dr rotary channels kept, r rank of the latent, T
tokens of calibration. Everything is computed in float64.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.attention.errors import AttentionError
from zoo.attention.heads import shared_map
from zoo.attention.layers.latent import MultiHeadLatent
from zoo.attention.layers.multihead import HeadNorm, MultiHead


@torch.no_grad()
def transmla(
    layer: MultiHead,
    calibration: Tensor,
    *,
    kv_rank: int,
    q_rank: int | None = None,
    rope_dim: int | None = None,
    freqfold: int = 1,
    balance: float | None = 1.0,
    norm: Literal["undone", "official"] | None = None,
) -> MultiHeadLatent:
    """The latent layer closest to a `MultiHead` on tokens like those of `calibration`.

    Rotation is kept on dr channels only; keys are first turned across heads, frequency by frequency, so that
    these hold most of their energy. What is left and the values pass one bottleneck of rank r; with
    r = 2 Hk D - dr the loss is that of the partial rotation alone. Without rotation (dr = 0) there is none.

    Args:
        layer: without norms and window.
        calibration: tokens `(..., dim)` as the layer meets them.
        kv_rank: r.
        q_rank: bottleneck of the queries; None = one projection.
        rope_dim: dr, D or a part of it, D by default; of a layer without rotary positions 0.
        freqfold: neighbouring frequencies that are pooled, a divisor of D / 2.
        balance: energy of keys to that of values in the bottleneck; None leaves both as they are.
        norm: gives the latents RMS norms, with their mean root mean square as weight, which undoes them on
            average ('undone'), or with the mean of its inverse, as in the authors' program ('official').

    Raises:
        AttentionError: a layer or sizes that cannot be converted.
    """
    heads, width = layer.num_heads, layer.head_dim
    if rope_dim is None:
        rope_dim = 0 if layer.rope_theta is None else width
    _check(layer, kv_rank, q_rank, rope_dim, freqfold)
    tokens = F.pad(calibration.double().flatten(0, -2), (0, 1), value=1.0)
    query, key, value = (_affine(proj) for proj in (layer.q_proj, layer.k_proj, layer.v_proj))

    turn = key_turn(tokens @ key.T, width, rope_dim, freqfold) if rope_dim else torch.eye(len(key)).to(key)
    rope, nope = (turn.T @ key).tensor_split([rope_dim])
    ratio = _ratio(tokens @ nope.T, tokens @ value[rope_dim:].T, balance)  # as many channels of both
    joint = torch.cat([nope / ratio, value])
    basis = components(tokens @ joint.T)[:, :kv_rank]
    latent = basis.T @ joint

    group = shared_map(heads, layer.num_kv_heads)
    by_group = turn.unflatten(0, (-1, width))[group]  # (H, D, Hk D): keys of each query head from turned ones
    down_k, down_v = basis.tensor_split([len(nope)])
    up_k = ratio * by_group[..., rope_dim:] @ down_k
    up_v = down_v.unflatten(0, (-1, width))[group]
    # The scores of MLA are divided by sqrt(D + dr), those of the layer by sqrt(D).
    same = torch.eye(width).to(turn).expand(heads, -1, -1)
    up_q = (1 + rope_dim / width) ** 0.5 * torch.cat([same, by_group[..., :rope_dim].mT], dim=1)
    up_q = torch.block_diag(*up_q)  # (H (D + dr), H D)

    made = _blank(layer, kv_rank, q_rank, rope_dim, latent_norm=norm is not None)
    _store(made.kv_a_proj_with_mqa, torch.cat([latent, rope]))
    _store(made.kv_b_proj, torch.cat([up_k, up_v], dim=1).flatten(0, 1))
    _store(made.o_proj, _affine(layer.o_proj))
    if q_rank is None:
        _store(made.q_proj, up_q @ query)
    else:
        narrow = components(tokens @ query.T)[:, :q_rank]
        down, bias = narrow.T @ query[:, :-1], query[:, -1:]
        _store(made.q_a_proj, down)
        _store(made.q_b_proj, up_q @ torch.cat([narrow, bias], dim=1))
        _fill(made.q_a_layernorm, tokens[:, :-1] @ down.T, norm)
    measured = torch.cat([latent, rope]) if norm == "official" else latent  # theirs counts the rotary key
    _fill(made.kv_a_layernorm, tokens @ measured.T, norm)
    return made.train(layer.training)


def key_turn(keys: Tensor, width: int, rope_dim: int, freqfold: int = 1) -> Tensor:
    """Orthogonal `(Hk D, Hk D)` for keys `(T, Hk D)`: the first dr columns hold the most of every frequency.

    The two channels `(i, i + D/2)` of a frequency are turned alike, across heads and `freqfold` neighbouring
    frequencies; without folding, that commutes with the rotary positions. Columns come in blocks of dr,
    half-split.
    """
    groups, per_block = width // (2 * freqfold), freqfold * rope_dim // width
    parts = keys.unflatten(-1, (-1, 2, groups, freqfold)).permute(3, 0, 2, 1, 4)  # (G, T, 2, Hk, f)
    basis = components(parts.flatten(3).flatten(1, 2))  # (G, Hk f, Hk f)
    basis = basis.unflatten(1, (-1, freqfold)).unflatten(3, (-1, per_block))
    pair, same = (torch.eye(n).to(keys) for n in (2, groups))
    return torch.einsum("ghibj,pq,gm->hpgibqmj", basis, pair, same).reshape(keys.shape[-1], -1)


def components(x: Tensor) -> Tensor:
    """Principal directions `(..., C, C)` of `x` `(..., T, C)` about zero, as columns, the strongest first."""
    return torch.linalg.eigh(x.mT @ x).eigenvectors.flip(-1)


def _blank(
    layer: MultiHead, kv_rank: int, q_rank: int | None, rope_dim: int, latent_norm: bool
) -> MultiHeadLatent:
    """A latent layer of these sizes, with biases where `layer` has some."""
    query_bias = layer.q_proj.bias is not None
    return MultiHeadLatent(
        layer.dim,
        layer.num_heads,
        kv_rank=kv_rank,
        q_rank=q_rank,
        nope_dim=layer.head_dim,
        rope_dim=rope_dim,
        value_dim=layer.head_dim,
        bias=query_bias or layer.o_proj.bias is not None,
        query_bias=query_bias,
        latent_norm=latent_norm,
        rope_theta=layer.rope_theta or 0.0,
        interleaved=False,
        causal=layer.causal,
    ).to(layer.q_proj.weight)


def _affine(proj: nn.Linear) -> Tensor:
    """`[W | b]` in float64, which acts on tokens with a further channel of ones."""
    bias = proj.weight.new_zeros(len(proj.weight)) if proj.bias is None else proj.bias
    return torch.cat([proj.weight, bias[:, None]], dim=1).double()


def _store(proj: nn.Linear, matrix: Tensor) -> None:
    """Sets `W`, and `b` to the last column, or to 0 where there is none."""
    weight, bias = matrix.tensor_split([proj.in_features], dim=1)
    proj.weight.copy_(weight)
    if proj.bias is not None:
        proj.bias.copy_(bias.sum(1))


def _ratio(nope: Tensor, value: Tensor, balance: float | None) -> float:
    """How much stronger the channels of the keys are than those of the values."""
    if balance is None or not nope.shape[1]:
        return 1.0
    return float(nope.norm(dim=0).mean() / (value.norm(dim=0).mean() * balance))


def _fill(norm: nn.Module, latent: Tensor, how: str | None) -> None:
    if isinstance(norm, HeadNorm):
        rms = latent.square().mean(-1).sqrt()
        norm.weight.fill_((1 / rms).mean() if how == "official" else rms.mean())


def _check(layer: MultiHead, kv_rank: int, q_rank: int | None, rope_dim: int, freqfold: int) -> None:
    width = layer.head_dim
    bare = layer.window is None and layer.yarn is None and isinstance(layer.q_norm, nn.Identity)
    own_tokens = layer.context_dim in (None, layer.dim)
    if type(layer) is not MultiHead or not (bare and own_tokens and layer.rotary_dim == width):
        raise AttentionError(
            "TransMLA converts MultiHeads without rotary positions or with such on whole heads; no norms, "
            "window, YaRN, context of another width"
        )
    if layer.rope_theta is not None:
        _check_rotation(width, rope_dim, freqfold)
    elif rope_dim:
        raise AttentionError(f"a layer without rotary positions keeps none: rope_dim is 0, not {rope_dim}")
    full = 2 * layer.num_kv_heads * width - rope_dim
    if not 1 <= kv_rank <= full:
        raise AttentionError(f"kv_rank is 1 .. {full}, not {kv_rank}")
    if q_rank is not None and not 1 <= q_rank <= layer.num_heads * width:
        raise AttentionError(f"q_rank is 1 .. {layer.num_heads * width}, not {q_rank}")


def _check_rotation(width: int, rope_dim: int, freqfold: int) -> None:
    whole = rope_dim >= 2 and width % rope_dim == 0 and freqfold >= 1 and (width // 2) % freqfold == 0
    if not whole or freqfold * rope_dim % width:
        raise AttentionError(
            f"rope_dim divides the head width {width}, freqfold its half, and {width} / rope_dim freqfold: "
            f"not {rope_dim} and {freqfold}"
        )
