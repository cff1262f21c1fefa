"""What linear attention adds to `scan`: feature maps, constant decays, gated slots, exponential gates.

Shapes: B batch, H heads, N tokens, D key width, V value width, M slots, F features.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from zoo.attention.attend import attend
from zoo.attention.errors import AttentionError
from zoo.attention.kernels import softmax
from zoo.attention.packed import Groups
from zoo.attention.patterns import Padding, Pattern, Window
from zoo.attention.scan import CHUNK, Form, scan


def elu_features(x: Tensor) -> Tensor:
    """`elu(x) + 1` (Katharopoulos et al. 2020, equation 7)."""
    return F.elu(x) + 1


def squared_features(x: Tensor) -> Tensor:
    """`(B, H, N, D)` to D (D + 1) / 2 products with `phi(q) . phi(k) = (q . k)^2 / D` (ReBased)."""
    return _products(x) * x.shape[-1] ** -0.5


def taylor_features(x: Tensor, *, symmetric: bool = True) -> Tensor:
    """`phi(q) . phi(k) = 1 + s + s^2 / 2` with `s = q . k / sqrt(D)` (Arora et al. 2024, Based, section 4.1).

    Args:
        x: `(..., D)`.
        symmetric: 1 + D + D (D + 1) / 2 features; else each mixed product twice, 1 + D + D^2 as published.
    """
    width = x.shape[-1]
    products = _products(x) if symmetric else (x[..., :, None] * x[..., None, :]).flatten(-2)
    return torch.cat([torch.ones_like(x[..., :1]), x * width**-0.25, products * (2 * width) ** -0.5], dim=-1)


def hedgehog_features(x: Tensor, weight: Tensor) -> Tensor:
    """`[softmax(x W), softmax(-x W)]`, at least 1e-12 (Zhang et al. 2024, Hedgehog, equation 6).

    Args:
        x: `(B, H, N, D)`.
        weight: W of each head, `(H, D, F)`.

    Returns:
        `(B, H, N, 2 F)`.
    """
    y = x @ weight
    return torch.cat([y.softmax(-1), (-y).softmax(-1)], dim=-1).clamp(min=1e-12)


def _products(x: Tensor) -> Tensor:
    """All `x_i x_j` with i <= j, mixed ones times sqrt 2: the inner product is `(x . y)^2`."""
    i, j = torch.triu_indices(x.shape[-1], x.shape[-1], device=x.device)
    weight = x.new_ones(len(i)).masked_fill(i != j, math.sqrt(2.0))
    return x[..., i] * x[..., j] * weight


def alibi_slopes(num_heads: int) -> Tensor:
    """`(H,)`: `2^(-8 (h + 1) / H)` for a power of two; otherwise the slopes of the power below, then every
    second one of its double (Press et al. 2022; the decays of Lightning attention)."""
    power = 1 << (num_heads.bit_length() - 1)

    def geometric(n: int) -> Tensor:
        return 2.0 ** (-8.0 / n * torch.arange(1, n + 1, dtype=torch.float64))

    return torch.cat([geometric(power), geometric(2 * power)[::2][: num_heads - power]]).float()


def retention_decay(num_heads: int) -> Tensor:
    """`(H,)`: `ln(1 - 2^(-5 - h))` (Sun et al. 2023, RetNet, equation 8)."""
    return torch.log1p(-(2.0 ** (-5.0 - torch.arange(num_heads, dtype=torch.float64)))).float()


def magnitude_aware(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    turned: tuple[Tensor, Tensor] | None = None,
    keep: Tensor | None = None,
    scale: float | None = None,
    eps: float = 1e-6,
) -> Tensor:
    """Linear attention that keeps the size of the query (Fan et al. 2025, MALA).

    `o_i = (1 + 1 / z_i) q_i S - z_i mean(v)`, `S = scale mean_j k_j v_j^T`, `z_i = scale q_i . mean(k)`. A
    larger query makes weights sharper, as in softmax. They sum to 1; some are negative.

    Args:
        q, k: `(B, H, N, D)` and `(B, H, M, D)`, not negative.
        v: `(B, H, M, V)`.
        turned: q and k with rotary positions, of which the weights are made; z is of those without.
        keep: which keys are real, bool `(B, M)`.
        eps: added to z.

    Returns:
        `(B, H, N, V)`.
    """
    dtype = v.dtype
    q, k, v, *rotated = (
        x.to(torch.promote_types(x.dtype, torch.float32)) for x in (q, k, v, *(turned or (q, k)))
    )
    factor = q.shape[-1] ** -0.5 if scale is None else scale
    with torch.autocast(q.device.type, enabled=False):
        count: Tensor | int = k.shape[2]
        if keep is not None:
            count = keep.sum(1).clamp(min=1)[:, None, None, None].to(q.dtype)
            k, v, rotated[1] = (torch.where(keep[:, None, :, None], x, 0.0) for x in (k, v, rotated[1]))
        z = q @ (k.sum(2, keepdim=True) * (factor / count)).mT
        state = (rotated[1].mT @ v) * (factor / count)
        out = (rotated[0] @ state) * (1 + 1 / (z + eps)) - z * (v.sum(2, keepdim=True) / count)
    return out.to(dtype)


def gated_slots(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    slots: Tensor,
    *,
    log_decay: Tensor,
    value_slots: Tensor | None = None,
    value_log_decay: Tensor | None = None,
    starts: Tensor | None = None,
    state: tuple[Tensor, Tensor] | None = None,
    scale: float | None = None,
    form: Form | None = None,
    chunk: int = CHUNK,
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """Softmax attention to M slots of decaying memory (Zhang et al. 2024, GSA, equation 6).

    `K_t = diag(exp g_t) K_{t-1} + s_t k_t^T`, V likewise, `o_t = V_t^T softmax(scale K_t q_t)`.

    Args:
        q, k: `(B, H, N, D)`.
        v: `(B, H, N, V)`.
        slots: s, `(B, H, N, M)`, what each token writes to each slot.
        log_decay: `(B, H, N, M)`.
        value_slots, value_log_decay: those of V, where they are not those of K.
        state: keys `(B, H, D, M)` and values `(B, H, M, V)` of the slots.
    """
    keys, values = (None, None) if state is None else state
    scores, keys = scan(
        q, k, slots, value_decay=log_decay, starts=starts, state=keys, scale=scale, form=form, chunk=chunk
    )
    weights = scores.softmax(-1)
    slots = slots if value_slots is None else value_slots
    log_decay = log_decay if value_log_decay is None else value_log_decay
    out, values = scan(
        weights, slots, v, log_decay=log_decay, starts=starts, state=values, scale=1.0, form=form, chunk=chunk
    )
    return out, (keys, values)


class MLSTMResult(NamedTuple):
    """out `(B, H, N, V)`; normaliser, peak `(B, H, N)`; state: `(B, H, D, V + 1)` and last peak `(B, H)`."""

    out: Tensor
    normaliser: Tensor
    peak: Tensor
    state: tuple[Tensor, Tensor]


def mlstm(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    input_gate: Tensor,
    forget_gate: Tensor,
    starts: Tensor | None = None,
    state: tuple[Tensor, Tensor] | None = None,
    scale: float | None = None,
    eps: float = 1e-6,
    form: Form | None = None,
    chunk: int = CHUNK,
) -> MLSTMResult:
    """The matrix memory of xLSTM with exponential input gates (Beck et al. 2024, equations 19 to 27).

    The state is kept relative to `exp(peak)`, `peak_t = max(logsigmoid f_t + peak_{t-1}, i_t)`; its last
    column is the normaliser state.

    Args:
        q, k: `(B, H, N, D)`.
        v: `(B, H, N, V)`.
        input_gate, forget_gate: i and f before their activations, `(B, H, N)`.
    """
    wide = torch.promote_types(v.dtype, torch.float32)
    log_forget, log_input = F.logsigmoid(forget_gate.to(wide)), input_gate.to(wide)
    peak, before = _peaks(
        log_forget.detach(), log_input.detach(), starts, None if state is None else state[1]
    )
    written = k.to(wide) * (log_input - peak).exp()[..., None]
    sums, memory = scan(
        q.to(wide),
        written,
        F.pad(v.to(wide), (0, 1), value=1.0),
        log_decay=log_forget + before - peak,
        starts=starts,
        state=None if state is None else state[0],
        scale=scale,
        form=form,
        chunk=chunk,
    )
    normaliser = torch.maximum(sums[..., -1].abs(), (-peak).exp())
    out = sums[..., :-1] / (normaliser + eps)[..., None]
    return MLSTMResult(out.to(v.dtype), normaliser, peak, (memory, peak[..., -1]))


def _peaks(
    log_forget: Tensor, log_input: Tensor, starts: Tensor | None, last: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The largest log weight of each row, and that of the row before; a new document forgets the last."""
    if starts is not None:
        log_forget = log_forget.masked_fill(starts[:, None], -1e3)
    total = log_forget.cumsum(-1)
    lead = (log_input - total).cummax(-1).values
    if last is not None:
        lead = torch.maximum(lead, last[..., None])
    peak = total + lead
    first = peak[..., :1] if last is None else last[..., None]
    return peak, torch.cat([first, peak[..., :-1]], dim=-1)


def window_and_features(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_features: Tensor,
    k_features: Tensor,
    *,
    window: int,
    window_factor: Tensor,
    rest_factor: Tensor | float = 1.0,
    mask: Tensor | None = None,
    documents: Tensor | None = None,
    state: Tensor | None = None,
    dropout: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Softmax in a causal window, linear attention before it, one denominator (Zhang et al. 2024, LoLCATs,
    equation 6); see `softmax_and_rest`.

    Args:
        q: `(B, H, N, D)`; the last query stands at the last key.
        k, v: `(B, Hk, M, D)`.
        q_features, k_features: `(B, H, N, F)` and `(B, H, M, F)`, not negative.
        window: keys that a query sees by softmax, its own included.
        window_factor, rest_factor: weights of the two parts, broadcastable to `(B, H, N, 1)`.
        mask: bool `(B, M)`, True = a real token.
        documents: integers `(B, N)`, N = M: runs of equal ids do not see each other.
        state: `(B, H, F, D + 1)`, of the keys that had left the window of the first query's predecessor.
        dropout: of the softmax weights.

    Returns:
        `(B, H, N, D)`, and the state after the last query.
    """
    if window < 1:
        raise AttentionError(f"a window has a positive size, not {window}")
    (heads, tokens), keys = q.shape[1:3], k.shape[2]
    late = min(window, keys)
    seen: Pattern = Window(late, causal=True)
    if mask is not None:
        seen, k_features = seen & Padding(mask), torch.where(mask[:, None, :, None], k_features, 0.0)
    if documents is not None:
        seen = seen & Groups(documents)
    near = attend(q, k, v, pattern=seen, kernel=softmax_above_peak, dropout=dropout, return_lse=True)

    def left(x: Tensor) -> Tensor:
        """The row of `(B, ?, M, ?)` that leaves the window as a query comes, `(B, ?, N, ?)`; or zeros."""
        return F.pad(x, (0, 0, late, 0))[:, :, keys - tokens : keys]

    starts, old = None, left(k_features)
    if documents is not None:
        starts = F.pad(documents[:, 1:] != documents[:, :-1], (1, 0), value=False)
        document = starts.long().cumsum(1)[:, None, :, None]
        old = torch.where(left(document) == document, old, 0.0)
    values = left(F.pad(v, (0, 1), value=1.0)).repeat_interleave(heads // v.shape[1], dim=1)
    far, state = scan(q_features, old, values, starts=starts, state=state, scale=1.0)
    return softmax_and_rest(near, far, window_factor, rest_factor), state


def softmax_and_rest(
    near: tuple[Tensor, Tensor], far: Tensor, near_factor: Tensor, far_factor: Tensor | float
) -> Tensor:
    """One mean of values over keys weighted by softmax, and others weighted by features.

    The first part is relative to its own largest score, so that the two are not on one scale (by design of
    LoLCATs). A query that sees no key gets zeros.

    Args:
        near: of `attend` with `softmax_above_peak`, `(B, H, N, D)` and `(B, H, N)`.
        far: of `scan`, weighted sums of values and of ones, `(B, H, N, D + 1)`.
        near_factor, far_factor: weights of the two parts, broadcastable to `(B, H, N, 1)`.
    """
    out, log_mass = near
    mass, rest = near_factor * log_mass.exp()[..., None], far_factor * far
    total = mass + rest[..., -1:]
    mixed = (mass * out + rest[..., :-1]) / total.masked_fill(total == 0, 1.0)
    return mixed.to(out.dtype)


def norm_preserving(features: Tensor, x: Tensor) -> Tensor:
    """Features `(..., F)` of the length of what they are of, x `(..., D)`: the map gives the direction only
    (Meng et al. 2026, STILL, NP-Map)."""
    size, own = (y.norm(dim=-1, keepdim=True) for y in (x.to(features.dtype), features))
    return features * (size / own)


def softmax_above_peak(scores: Tensor) -> tuple[Tensor, Tensor]:
    """Kernel: softmax, and its log-sum-exp less the largest score; -inf where no key is seen."""
    weights, lse = softmax(scores)
    peak = scores.amax(-1)
    return weights, lse - peak.masked_fill(peak == -torch.inf, 0.0)
