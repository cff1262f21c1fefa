"""The linear recurrence under linear attention, retention, gated linear attention and the delta rule.

    S'  = diag(exp g_t) S_{t-1}
    S_t = S' + k_t (beta_t (v_t - k_t^T S'))^T        without beta:  S_t = S' + k_t v_t^T
    o_t = (scale q_t)^T S_t

Three forms compute it. `step` is the definition, token by token. `chunk` is exact too: inside a chunk all
pairs of tokens at once, from chunk to chunk the state; time and memory are linear in N. `parallel` is one
chunk of N tokens. The delta rule inside a chunk is a triangular system (Yang et al. 2024, DeltaNet, section
3.2). With a decay per channel, a pair of tokens meets at a place between them: what the query has
lost since, times what the key loses up to it (Yang et al. 2024, GLA, section 4). A chunk is cut into runs of
few tokens: those of one run meet in its middle, those of two in the middle of the later run. On a CPU, where
decays are mild, all of a chunk meet in its middle.

Shapes: B batch, H heads, N tokens, D key width, V value width; in chunks T chunks of C tokens.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from zoo.attention.errors import AttentionError

Form = Literal["parallel", "chunk", "step"]
CHUNK = 32  # tokens; the triangular system of the delta rule costs more with longer ones
_PART = 2**19  # elements of the keys that are worked on together where no gradients are kept
_RUN = 8  # tokens among which the factors of a decay per channel stay finite
_LOWEST = {torch.float32: -18.0, torch.float64: -170.0}  # log decays per channel below it count as this
_MILD = {torch.float32: -40.0, torch.float64: -340.0}  # with more left of half a chunk, it needs no runs


class _Recurrence(NamedTuple):
    """One checked call in float32 or wider: q, k `(B, H, N, D)`, v `(B, H, N, V)`, state `(B, H, D, V)`."""

    q: Tensor  # not scaled
    k: Tensor
    v: Tensor
    scale: float
    decay: Tensor | None  # (B or 1, H or 1, N, D or 1)
    value_decay: Tensor | None  # (B or 1, H or 1, N, V or 1)
    beta: Tensor | None  # (B or 1, H or 1, N, 1)
    starts: Tensor | None  # (B, 1, N, 1)
    state: Tensor


def scan(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    log_decay: Tensor | None = None,
    value_decay: Tensor | None = None,
    beta: Tensor | None = None,
    starts: Tensor | None = None,
    state: Tensor | None = None,
    scale: float | None = None,
    form: Form | None = None,
    chunk: int = CHUNK,
) -> tuple[Tensor, Tensor]:
    """The recurrence over tokens; see the module for its equations.

    Args:
        q, k: `(B, Hk, N, D)`; head h of the values reads query and key head `h // (H / Hk)`.
        v: `(B, H, N, V)`.
        log_decay: g <= 0, finite: `(B, H, N)` per head or `(B, H, N, D)` per key channel; axes of size 1 are
            repeated, so `(1, H, 1)` is one decay per head.
        value_decay: as `log_decay`, for the value channels of the state: `(B, H, N, V)`. Not with beta.
        beta: `(B, H, N)`, the delta rule with this rate; None = no delta rule, rate 1.
        starts: bool `(B, N)`; True empties the state before this token (first of a packed document).
        state: `(B, H, D, V)`, that of an earlier call; zeros by default.
        scale: of the queries, `D ** -0.5` by default.
        form: by default `step` for one token, else `chunk`.
        chunk: tokens per chunk; with a decay per channel rounded up to a multiple of 8.

    Returns:
        `(B, H, N, V)` in the dtype of v, and the state after the last token in float32 or wider.

    Raises:
        AttentionError: shapes or options that do not fit together.
    """
    if form is None:
        form = "step" if q.shape[-2] == 1 else "chunk"
    if form not in ("parallel", "chunk", "step"):
        raise AttentionError(f"a scan has the forms parallel, chunk and step, not {form!r}")
    if chunk < 1:
        raise AttentionError(f"a chunk has at least one token, not {chunk}")
    _check(q, k, v, log_decay, value_decay, beta, starts, state)
    factor = q.shape[-1] ** -0.5 if scale is None else scale
    device = q.device.type
    with torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext():
        p = _prepared(q, k, v, log_decay, value_decay, beta, starts, state, factor)
        if form == "step":
            out, last = _stepwise(p)
        elif form == "parallel" or torch.is_grad_enabled():
            out, last = _chunkwise(p, chunk if form == "chunk" else q.shape[-2])
        else:
            out, last = _in_parts(p, chunk)
    return out.to(v.dtype), last


def scan_mean(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    log_decay: Tensor | None = None,
    starts: Tensor | None = None,
    state: Tensor | None = None,
    scale: float | None = None,
    eps: float = 1e-6,
    floor: bool = False,
    form: Form | None = None,
    chunk: int = CHUNK,
) -> tuple[Tensor, Tensor]:
    """`scan` divided by the sum of its weights plus eps (Katharopoulos et al. 2020, equation 12).

    The last column of the state `(B, H, D, V + 1)` is the running sum of the keys. With `floor`, eps is not
    added, but the least that is divided by.
    """
    wide = torch.promote_types(v.dtype, torch.float32)
    ones = F.pad(v.to(wide), (0, 1), value=1.0)
    out, state = scan(
        q,
        k,
        ones,
        log_decay=log_decay,
        starts=starts,
        state=state,
        scale=scale,
        form=form,
        chunk=chunk,
    )
    return weighted_mean(out, eps, floor).to(v.dtype), state


def weighted_mean(sums: Tensor, eps: float, floor: bool) -> Tensor:
    """Means `(..., V)` from weighted sums `(..., V + 1)`, of which the last one is that of the weights."""
    total = sums[..., -1:]
    return sums[..., :-1] / (total.clamp(min=eps) if floor else total + eps)


def _stepwise(p: _Recurrence) -> tuple[Tensor, Tensor]:
    """The definition, O(D V) per token."""
    queries, state, outs = p.q * p.scale, p.state, []
    for t in range(p.q.shape[2]):
        q, k, v = queries[:, :, t, None], p.k[:, :, t, None], p.v[:, :, t, None]
        if p.starts is not None:
            state = state.masked_fill(p.starts[:, :, t, None], 0.0)
        if p.decay is not None:
            state = state * p.decay[:, :, t, :, None].exp()
        if p.value_decay is not None:
            state = state * p.value_decay[:, :, t, None].exp()
        new = v if p.beta is None else p.beta[:, :, t, None] * (v - k @ state)
        state = state + k.mT * new
        outs.append(q @ state)
    return torch.cat(outs, dim=2), state


def _in_parts(p: _Recurrence, size: int) -> tuple[Tensor, Tensor]:
    """The chunks of some thousand numbers at a time, which stay in the cache: what they need besides is freed
    before the next."""
    tokens, size = p.q.shape[2], _fitting(size, p)
    part = max(1, _PART * tokens // (p.k.numel() * size)) * size
    state, outs = p.state, []
    for begin in range(0, tokens, part):
        here = {n: x[:, :, begin : begin + part] for n, x in p._asdict().items() if isinstance(x, Tensor)}
        out, state = _chunkwise(p._replace(**(here | {"state": state})), size)
        outs.append(out)
    return (outs[0] if len(outs) == 1 else torch.cat(outs, dim=2)), state


def _chunkwise(p: _Recurrence, size: int) -> tuple[Tensor, Tensor]:
    """Inside of all chunks at once, then from chunk to chunk."""
    tokens = p.q.shape[2]
    size = _fitting(min(size, tokens), p)
    q, k, v = (_cut(x, size) for x in (p.q, p.k, p.v))
    decay, value_decay, rates = (
        None if x is None else _cut(x, size) for x in (p.decay, p.value_decay, p.beta)
    )
    pairs, readers, writers, carry, entry = _decayed([q] if rates is None else [q, k], k, decay)
    start = p.state if entry is None else p.state * entry
    if p.starts is not None:
        document = _cut(p.starts.long(), size).cumsum(-2)  # 0 = that of the chunk before
        last = document[..., -1:, :]
        pairs = [x.masked_fill(document != document.mT, 0.0) for x in pairs]
        readers = [x.masked_fill(document > 0, 0.0) for x in readers]
        writers = writers.masked_fill(document < last, 0.0)
        carry = (q.new_ones(()) if carry is None else carry) * (last == 0)

    if value_decay is not None:
        within, entering, leaving, kept = _decayed_values(pairs[0], v, value_decay)
        carry = kept if carry is None else carry * kept
        before, state = _carried(start, readers, writers, leaving, carry)
        out = torch.addcmul(within, before, entering).mul_(p.scale)
    else:
        corrections = None if rates is None else _inverse(pairs[1] * rates) * rates.mT
        out, state = _carried(start, readers, writers, v, carry, pairs[0], corrections, p.scale)
    return out.flatten(2, 3)[:, :, :tokens], state


def _inverse(system: Tensor) -> Tensor:
    """`(I + tril(system, -1))^-1` `(..., C, C)`."""
    identity = torch.eye(system.shape[-1], dtype=system.dtype, device=system.device)
    return torch.linalg.solve_triangular(system, identity, upper=False, unitriangular=True)


def _carried(
    state: Tensor,
    readers: list[Tensor],
    writers: Tensor,
    values: Tensor,
    carry: Tensor | None,
    pairs: Tensor | None = None,
    corrections: Tensor | None = None,
    scale: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """From chunk to chunk: what the readers see of the state, and by the pairs of what is written; the last
    state.

    `u = values`, or by the delta rule `A (values - readers[1] S)`; `o = scale (readers[0] S + pairs u)`; then
    `S <- carry * S + writers^T u`. All `(B, H, T, C, .)`.
    """
    sizes, state = state.shape[:2], state.flatten(0, 1)
    carry = None if carry is None else carry.expand(*sizes, *carry.shape[2:])
    outs = []
    for reader, eraser, writer, u, kept, pair, correction in zip(
        *(
            (None,) * values.shape[2] if x is None else x.flatten(0, 1).unbind(1)
            for x in (readers[0], readers[-1], writers, values, carry, pairs, corrections)
        ),
        strict=True,
    ):
        out = torch.bmm(reader, state)
        if correction is not None:
            u = torch.bmm(correction, torch.baddbmm(u, eraser, state, alpha=-1))
        outs.append(out if pair is None else out.baddbmm_(pair, u, beta=scale, alpha=scale))
        update = torch.bmm(writer.mT, u)
        state = update.add_(state) if kept is None else update.addcmul_(kept, state)
    return torch.stack(outs, dim=1).unflatten(0, sizes), state.unflatten(0, sizes)


def _decayed(
    queries: list[Tensor], k: Tensor, g: Tensor | None
) -> tuple[list[Tensor], list[Tensor], Tensor, Tensor | None, Tensor | None]:
    """What the queries and keys `(B, H, T, C, D)` of chunks are to each other and to the states.

    Returns:
        For each of the queries, pairs `(B, H, T, C, C)`: `sum_d q_id k_jd exp(c_id - c_jd)` for j <= i, c the
        sum of g; else 0 for the first of the queries, and finite for the others. The queries as readers of
        the state before the chunk; keys as writers of the state after it; what that keeps of the state
        before, `(B, H, T, D or 1, 1)`; what the first chunk reads of the first state, `(B, H, D, 1)`.
    """
    if g is None or g.shape[-1] == 1:
        k = k.contiguous()  # else each product would make its own copy
    if g is None:
        return _lower([q @ k.mT for q in queries]), queries, k, None, None
    if g.shape[-1] == 1:
        # Sums of each stretch by itself (Dao and Gu 2024, Mamba-2): differences of long sums lose digits.
        kept = g.expand(*g.shape[:-1], g.shape[-2]).tril(-1).cumsum(-2).exp()
        entering = g.cumsum(-2).exp()
        pairs = _lower([(q @ k.mT) * kept for q in queries])
        readers, writers = [q * entering for q in queries], k * kept[..., -1:, :].mT
        return pairs, readers, writers, entering[..., -1:, :], None
    if _is_mild(g):
        # States are those at the middles: a chunk writes to that of the next, the last one to the end.
        after, keys, middle, rest = _from_middle(k, g)
        readers = [q * after for q in queries]
        kept = (rest + F.pad(middle[:, :, 1:], (0, 0, 0, 0, 0, 1))).exp_()
        pairs = _lower([q @ keys.mT for q in readers])
        return pairs, readers, keys * kept, kept.mT, middle[:, :, 0].exp().mT
    runs = _runs(k, g)
    pairs, readers = zip(*(_met(q, runs) for q in queries), strict=True)
    return [*pairs], [*readers], runs.leaving, runs.total.mT, None


def _lower(pairs: list[Tensor]) -> list[Tensor]:
    """Without what is ahead, in the first; the system of the delta rule does not read that of the second."""
    return [pairs[0].tril(), *pairs[1:]]


def _is_mild(g: Tensor) -> bool:
    """Whether the factors of log decays `(..., C, D)` stay finite over each half of the chunks."""
    if g.device.type != "cpu" or torch.compiler.is_compiling():
        return False  # to look at them would wait for the device, or break the graph
    halves = g.detach().unflatten(-2, (2, -1)).sum(-2)
    return bool(halves.amin() > _MILD[g.dtype])


def _from_middle(x: Tensor, g: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Of writers x and log decays g `(..., C, D)`: the decay since the middle (before it, the inverse); the
    writers times their decay up to it; the log decays `(..., 1, D)` before and after it."""
    c = g.cumsum(-2)
    middle = c[..., g.shape[-2] // 2 - 1, None, :]
    after = (c - middle).exp_()
    return after, x / after, middle, c[..., -1:, :] - middle


class _Runs(NamedTuple):
    """Writers (keys, or values) with a decay per channel, in n runs of `_RUN` tokens. `_LOWEST` keeps
    everything finite."""

    after: Tensor  # decay since the middle of the run (before it, the inverse), (..., n, _RUN, D)
    writers: Tensor  # times their decay up to the middle of their run, (..., n, _RUN, D)
    ahead: list[Tensor]  # [i - 1]: those before run i times their decay up to its middle, (..., i _RUN, D)
    entering: Tensor  # decay since the chunk began up to the middle of a run, (..., n, 1, D)
    leaving: Tensor  # writers times their decay up to the end of the chunk, (..., C, D)
    total: Tensor  # decay over the chunk, (..., 1, D)


def _runs(x: Tensor, g: Tensor) -> _Runs:
    """Of writers x and log decays g `(..., C, D)`."""
    c = _cut(g.clamp(min=_LOWEST[g.dtype]), _RUN).cumsum_(-2)
    middle, end = c[..., _RUN // 2 - 1, None, :].clone(), c[..., -1:, :].clone()
    since = c.sub_(middle)
    writers = _cut(x, _RUN) * since.neg().exp_()
    until = writers * (end - middle).exp_()
    ahead, between = [], torch.zeros_like(end[..., :1, :, :])  # log decay over the runs that are skipped
    for i in range(1, c.shape[-3]):
        decay = (between + middle[..., i, None, :, :]).exp_()
        ahead.append((until[..., :i, :, :] * decay).flatten(-3, -2))
        between = F.pad(between + end[..., i, None, :, :], (0, 0, 0, 0, 0, 1))
    before = F.pad(end[..., :-1, :, :], (0, 0, 0, 0, 1, 0)).cumsum(-3)
    behind = F.pad(end[..., 1:, :, :], (0, 0, 0, 0, 0, 1)).flip(-3).cumsum(-3).flip(-3)
    return _Runs(
        since.exp_(),
        writers,
        ahead,
        (before + middle).exp_(),
        (until * behind.exp()).flatten(-3, -2),
        end.sum(-3).exp(),
    )


def _met(q: Tensor, runs: _Runs) -> tuple[Tensor, Tensor]:
    """Pairs of queries with the writers of runs, and the queries as readers of the state before the chunk."""
    q = _cut(q, _RUN) * runs.after
    count = q.shape[-3]
    pairs = q.new_zeros(*q.shape[:-1], count * _RUN)
    within = (q @ runs.writers.mT).tril()
    pairs.unflatten(-1, (count, _RUN)).diagonal(dim1=-4, dim2=-2).copy_(within.movedim(-3, -1))
    for i, writers in enumerate(runs.ahead, 1):
        pairs[..., i, :, : i * _RUN].copy_(q[..., i, :, :] @ writers.mT)
    return pairs.flatten(-3, -2), (q * runs.entering).flatten(-3, -2)


def _decayed_values(weights: Tensor, v: Tensor, g: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Of lower triangular weights `(..., C, C)`, values and their log decays `(..., C, V)`:

    `sum_j w_ij v_jm exp(c_im - c_jm)`; the decay since the chunk began; values as they leave it; the decay
    over it `(..., 1, V)`.
    """
    if _is_mild(g):
        after, values, middle, rest = _from_middle(v, g)
        out, leaving = (weights @ values) * after, values * rest.exp()
        return out, after * middle.exp(), leaving, (middle + rest).exp()
    runs = _runs(v, g)
    rows = weights.unflatten(-2, (-1, _RUN))  # (..., n, _RUN, C)
    within = rows.unflatten(-1, (-1, _RUN)).diagonal(dim1=-4, dim2=-2).movedim(-1, -3) @ runs.writers
    before = [rows[..., i, :, : i * _RUN] @ writers for i, writers in enumerate(runs.ahead, 1)]
    out = within + torch.stack([torch.zeros_like(within[..., 0, :, :]), *before], dim=-3)
    entering = runs.after * runs.entering
    return (out * runs.after).flatten(-3, -2), entering.flatten(-3, -2), runs.leaving, runs.total


def _fitting(size: int, p: _Recurrence) -> int:
    """A chunk of whole runs, where a decay per channel needs that."""
    if p.value_decay is None and (p.decay is None or p.decay.shape[-1] == 1):
        return size
    return -(-size // _RUN) * _RUN


def _cut(x: Tensor, size: int) -> Tensor:
    """`(..., N, D)` to `(..., T, C, D)`; zeros fill up the last."""
    rest = -x.shape[-2] % size
    return (F.pad(x, (0, 0, 0, rest)) if rest else x).unflatten(-2, (-1, size))


def _prepared(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    value_decay: Tensor | None,
    beta: Tensor | None,
    starts: Tensor | None,
    state: Tensor | None,
    scale: float,
) -> _Recurrence:
    wide = torch.promote_types(torch.promote_types(q.dtype, v.dtype), torch.float32)
    batch, heads, tokens, width = v.shape
    shared = heads // q.shape[1]
    q, k, v = q.to(wide), k.to(wide), v.to(wide)
    if shared > 1:
        q, k = q.repeat_interleave(shared, dim=1), k.repeat_interleave(shared, dim=1)
    decay, value_decay, rates = (
        None if x is None else _per_channel(x, tokens).to(wide) for x in (log_decay, value_decay, beta)
    )
    return _Recurrence(
        q,
        k,
        v,
        scale,
        decay,
        value_decay,
        rates,
        None if starts is None else starts[:, None, :, None],
        v.new_zeros(batch, heads, q.shape[-1], width) if state is None else state.to(wide),
    )


def _per_channel(g: Tensor, tokens: int) -> Tensor:
    """`(B, H, N)` or `(B, H, N, D)` to `(B, H, N, 1 or D)`, with the axis of tokens in full."""
    g = g[..., None] if g.ndim == 3 else g
    return g.expand(-1, -1, tokens, -1)


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    value_decay: Tensor | None,
    beta: Tensor | None,
    starts: Tensor | None,
    state: Tensor | None,
) -> None:
    if not q.ndim == k.ndim == v.ndim == 4 or q.shape != k.shape:
        shapes = ", ".join(str(tuple(x.shape)) for x in (q, k, v))
        raise AttentionError(f"a scan takes q and k (B, Hk, N, D) and v (B, H, N, V), not {shapes}")
    batch, heads, tokens, width = v.shape
    if (q.shape[0], q.shape[2]) != (batch, tokens) or tokens == 0:
        raise AttentionError(f"q, k and v differ in B or N, or are empty: {tuple(q.shape)}, {tuple(v.shape)}")
    if q.shape[1] == 0 or heads % q.shape[1]:
        raise AttentionError(f"{heads} value heads are not divisible by {q.shape[1]} query/key heads")
    _check_rate("log_decay", log_decay, (batch, heads, tokens, q.shape[-1]))
    _check_rate("value_decay", value_decay, (batch, heads, tokens, width))
    _check_rate("beta", beta, (batch, heads, tokens))
    if beta is not None and value_decay is not None:
        raise AttentionError("the delta rule (beta) does not go with a decay of the value channels")
    if starts is not None and (starts.dtype != torch.bool or tuple(starts.shape) != (batch, tokens)):
        raise AttentionError(f"starts is bool (B, N), not {starts.dtype} {tuple(starts.shape)}")
    if state is not None and tuple(state.shape) != (batch, heads, q.shape[-1], width):
        raise AttentionError(
            f"the state is (B, H, D, V) = {(batch, heads, q.shape[-1], width)}, not {tuple(state.shape)}"
        )


def _check_rate(name: str, rate: Tensor | None, sizes: tuple[int, ...]) -> None:
    if rate is None:
        return
    fits = 3 <= rate.ndim <= len(sizes) and all(
        have in (1, want) for have, want in zip(rate.shape, sizes, strict=False)
    )
    if not fits:
        raise AttentionError(f"{name} {tuple(rate.shape)} does not fit {sizes}, with or without the channels")
